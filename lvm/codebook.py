"""The codebook of a tokenizer as the embedding of a model (DeLVM): read, and held to the data."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import tokenizer
from lvm.config import Run
from tokenizer.cli import InputError
from visual_sentences.manifest import Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeVectors:
    """What a tokenizer puts in the place of its codes."""

    id: str
    """Of the tokenizer."""
    vectors: Tensor
    """fp32 [K, E] on the CPU, as its decoder reads them: at unit length where it compares
    directions."""


def read_codebook(folder: Path | str) -> CodeVectors:
    """Read the vectors of a tokenizer's codes; raises InputError where there is no tokenizer."""
    tok = tokenizer.load(folder)
    with torch.no_grad():
        vectors = tok.quantize.scaled(tok.quantize.embedding.weight).float().clone()
    return CodeVectors(id=tok.id, vectors=vectors)


def codes_alone(run: Run, manifest: Manifest) -> int:
    """Return how many ids a model with a codebook has: the codes. A special has no vector.

    Raises InputError where the layout or the recipe wants more.
    """
    if run.layout == "bos":
        raise InputError(
            f"--layout bos with model.codebook_dim {run.model.codebook_dim}: a codebook has "
            "vectors for codes and none for bos; use --layout none"
        )
    codes = manifest.codebook_size
    if run.model.vocab_size not in (0, codes):
        raise InputError(
            f"--model.vocab-size {run.model.vocab_size}: {run.data} has {codes} codes, and a model "
            f"with a codebook has these ids and no others; use {codes}, or 0"
        )
    return codes


def require_codebook(run: Run, manifest: Manifest) -> None:
    """Raise InputError where `run.codebook` is not the tokenizer of the data, or does not fit."""
    if not run.codebook:
        raise InputError(
            f"--codebook missing: {run.recipe} embeds codes by the codebook of their tokenizer; "
            f"wanted the folder of the one that {run.data} was built with"
        )
    found = read_codebook(run.codebook)
    if found.id != manifest.tokenizer:
        raise InputError(
            f"--codebook {run.codebook} is tokenizer {found.id[:12]}, {run.data} was built with "
            f"{manifest.tokenizer[:12]}: its codes mean other vectors. Give the one it was built "
            "with"
        )
    if (channels := found.vectors.shape[1]) != run.model.codebook_dim:
        raise InputError(
            f"--codebook {run.codebook} has vectors of {channels} channels, the model wants "
            f"{run.model.codebook_dim}; use --model.codebook-dim {channels}"
        )
