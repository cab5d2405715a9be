"""Cards to plan for: the figures of makers' data sheets (dense bf16, SXM parts), nothing measured.

A100 80GB, H100, H200: NVIDIA's data sheets of the SXM parts; B200: that of HGX B200, an eighth of a
board. A data sheet's GB is taken as 10^9 bytes; cards report a few per cent more.
"""

import os
from dataclasses import dataclass

from lvm.metrics import PEAKS


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One device. Rates are a second's; 0 where no data sheet says."""

    name: str
    memory: float
    """Bytes."""
    peak: float = 0.0
    """Dense bf16 FLOP/s."""
    bandwidth: float = 0.0
    """Bytes of its memory a second."""
    nvlink: float = 0.0
    """Bytes a second to the other cards of a node, in one direction."""

    @property
    def kind(self) -> str:
        """Device type as torch names it."""
        return "cuda" if self.peak else "cpu"


def cards() -> dict[str, Card]:
    """Return every card by the name that `--gpu` takes; `cpu` is this machine, without rates."""
    sheets = (
        Card(name="a100-80", memory=80e9, peak=PEAKS["A100"], bandwidth=2.039e12, nvlink=300e9),
        Card(name="h100", memory=80e9, peak=PEAKS["H100"], bandwidth=3.35e12, nvlink=450e9),
        Card(name="h200", memory=141e9, peak=PEAKS["H200"], bandwidth=4.8e12, nvlink=450e9),
        Card(name="b200", memory=180e9, peak=PEAKS["B200"], bandwidth=8.0e12, nvlink=900e9),
        Card(name="cpu", memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")),
    )
    return {card.name: card for card in sheets}
