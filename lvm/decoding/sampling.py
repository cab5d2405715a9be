"""How a code is chosen from a distribution: temperature, cuts, and one uniform number a code."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenizer.cli import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What to draw, and how. Top-k, then top-p, then min-p cut the distribution over codes."""

    new: int = 1
    """Images to draw after the prompt."""
    candidates: int = 1
    """Independent answers."""
    temperature: float = 1.0
    """0 takes the most likely code each time."""
    top_k: int = 0
    """Keep this many most likely codes (0: all)."""
    top_p: float = 1.0
    """Keep the most likely codes up to this probability (1: all)."""
    min_p: float = 0.0
    """Keep codes that are at least this times as likely as the most likely one (0: all)."""
    seed: int = 0
    guidance: float = 1.0
    """Draw from bare + guidance · (full - bare), where full are the logits after the whole prompt
    and bare those after its last images alone (Ho & Salimans, "Classifier-free diffusion guidance",
    2022, on logits). Above 1 the prompt counts for more; 1 is off and costs nothing, any other
    value a second row for each candidate."""
    bare: int = 1
    """Images at the end of the prompt that the bare context keeps (1: the query alone)."""

    def __post_init__(self) -> None:
        if self.new < 1 or self.candidates < 1:
            raise InputError(
                f"{self.new} new images, {self.candidates} candidates: wanted at least 1 of each"
            )
        if not (0 <= self.temperature < math.inf and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise InputError(
                f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}: wanted "
                "temperature >= 0, top_k >= 0 and 0 < top_p <= 1"
            )
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p {self.min_p}: wanted 0 (all codes) to 1 (the most likely)")
        if not 0 <= self.guidance < math.inf or self.bare < 0:
            raise InputError(
                f"guidance {self.guidance}, bare {self.bare}: wanted guidance >= 0 (1 is off) and "
                "bare >= 0 images"
            )


def pick(logits: Tensor, u: Tensor, sampling: Sampling) -> Tensor:
    """Return the codes [R, 1] that uniform numbers u [R, 1] choose from fp32 logits [R, K].

    A code is where the running sum of the probabilities passes u: one number a code and no state,
    so that a row's draws depend on nothing but its own numbers. Reads nothing on the host.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    p = logits.softmax(-1)
    ids = None
    if 0 < sampling.top_k < p.shape[-1]:
        p, ids = p.topk(sampling.top_k, dim=-1)
    elif sampling.top_p < 1:
        p, ids = p.sort(dim=-1, descending=True)
    if sampling.top_p < 1:
        before = p.cumsum(-1) - p
        p = p * (before < sampling.top_p * p.sum(-1, keepdim=True))
    if sampling.min_p > 0:
        p = p * (p >= sampling.min_p * p.amax(-1, keepdim=True))
    sums = p.cumsum(-1)
    index = torch.searchsorted(sums, u * sums[:, -1:], right=True)
    return index if ids is None else ids.gather(-1, index)


def uniform(rows: int, steps: int, seed: int) -> Tensor:
    """Return numbers in [0, 1), fp32 [rows, steps], each row from a generator of its own.

    The largest stays 2⁻²⁰ below 1, so that times a sum it never rounds up to the sum.
    """
    out = torch.empty(rows, steps)
    for i, row in enumerate(out):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**63)
        row.copy_(torch.rand(steps, generator=generator))
    return out.clamp_(max=1 - 2**-20)
