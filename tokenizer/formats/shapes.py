"""From a table of tensors to a network: infer its shape, check that every tensor fits, build it."""

import math
from collections.abc import Callable, Mapping
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizer.cli import InputError
from tokenizer.config import VQGANConfig
from tokenizer.formats.checkpoint import some
from tokenizer.vqgan import VQGAN

UNIT, SIGNED = (0.0, 1.0), (-1.0, 1.0)  # pixel ranges
IMAGE_SIZE = 256  # of every published f8 and f16 tokenizer; tensors do not tell it

# Our name of a tensor, or the start of one, and the number of levels, to the name in a family.
# Names in the encoder must not depend on the number of levels, which is counted with them.
Names = Callable[[str, int], str]


def own_names(name: str, levels: int) -> str:
    """Return `name`: muse and taming call their tensors as we do."""
    return name


def infer_config(
    state: Mapping[str, Tensor],
    names: Names,
    *,
    source: Path,
    image_size: int = IMAGE_SIZE,
    pixel_range: tuple[float, float],
    normalize_codes: bool = False,
) -> VQGANConfig:
    """Return the shape of the network whose encoder and codes are in `state`.

    What tensors do not tell (the keyword arguments) is the family's convention. The levels with
    attention are told by their tensors; `attention_resolutions` says so in terms of `image_size`.
    """

    def shape(name: str, dims: int = 4) -> torch.Size:
        theirs = names(name, 0)
        if theirs not in state or state[theirs].ndim != dims:
            raise InputError(
                f"{source} has no {dims}-dimensional tensor {theirs}, without which its network "
                "cannot be known"
            )
        return state[theirs].shape

    def has(prefix: str) -> bool:
        return any(key.startswith(names(prefix, 0)) for key in state)

    def length(prefix: str) -> int:
        return sum(1 for _ in takewhile(lambda i: has(f"{prefix}.{i}."), count()))

    levels = range(max(1, length("encoder.down")))
    widths = [shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in levels]
    channels = math.gcd(*widths)
    attended = [level for level in levels if has(f"encoder.down.{level}.attn.")]
    codes, code_dim = shape("quantize.embedding.weight", 2)
    return build_config(
        {
            "image_size": image_size,
            "in_channels": shape("encoder.conv_in.weight")[1],
            "channels": channels,
            "multipliers": tuple(width // channels for width in widths),
            "res_blocks": length("encoder.down.0.block"),
            "attention_resolutions": tuple(image_size // 2**level for level in attended),
            "mid_attention": has("encoder.mid.attn_1."),
            "latent_dim": shape("encoder.conv_out.weight")[0],
            "code_dim": code_dim,
            "codebook_size": codes,
            "normalize_codes": normalize_codes,
            "pixel_range": pixel_range,
        },
        source,
    )


def build_config(values: Mapping[str, Any], source: Path) -> VQGANConfig:
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return VQGANConfig(**values)
    except (InputError, TypeError) as error:
        raise InputError(f"{source} describes no network: {error}") from error


def build_model(
    config: VQGANConfig, state: dict[str, Tensor], names: Names, *, source: Path, told_by: str
) -> VQGAN:
    """Return the network of `config` with the tensors of `state`, fp32, in eval mode."""
    try:
        with torch.device("meta"):
            model = VQGAN(config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{told_by} describes no network: {error}") from error
    theirs = {ours: names(ours, len(config.widths)) for ours in model.state_dict()}
    wanted = {theirs[ours]: tensor for ours, tensor in model.state_dict().items()}
    check_tensors(state, wanted, source, told_by=told_by)
    model.load_state_dict({k: state[name].float() for k, name in theirs.items()}, assign=True)
    return model.eval()


def check_tensors(
    found: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    source: Path,
    *,
    told_by: str = "its config.json",
) -> None:
    """Raise InputError that names what is missing, unexpected or of another shape."""
    faults = []
    if missing := wanted.keys() - found.keys():
        faults.append(f"missing: {some(missing)}")
    if unexpected := found.keys() - wanted.keys():
        faults.append(f"unexpected: {some(unexpected)}")
    shapes = [
        f"{name} {list(found[name].shape)}, wanted {list(wanted[name].shape)}"
        for name in wanted.keys() & found.keys()
        if found[name].shape != wanted[name].shape
    ]
    if shapes:
        faults.append(f"of another shape: {some(shapes)}")
    if faults:
        raise InputError(f"{source} does not fit {told_by}; tensors " + "; ".join(faults))


def check_holds(config: VQGANConfig, family: str, **held: object) -> None:
    """Raise InputError where a file of `family` cannot hold a value, so codes would be others."""
    for field, value in held.items():
        if (ours := getattr(config, field)) != value:
            raise InputError(
                f"{family} cannot hold this tokenizer: its {field} is {ours}, and {family}'s is "
                f"always {value}"
            )


def whole_multipliers(config: VQGANConfig, family: str) -> list[int]:
    """Return the channels of the levels over those of the first, which muse and taming want whole.

    Both give their first convolution the base number of channels, so the first of them is 1.
    """
    first = config.widths[0]
    if any(width % first for width in config.widths):
        raise InputError(
            f"{family} cannot hold this tokenizer: the channels of its levels, "
            f"{list(config.widths)}, are no whole multiples of the first"
        )
    return [width // first for width in config.widths]
