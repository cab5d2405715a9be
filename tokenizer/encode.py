"""Bulk encoding: uint8 pixels in, codes out, as fast as device and wanted precision allow.

    encoder = BulkEncoder(tok, device="cuda", batch=64)
    for codes in encoder.encode_all(batches):   # uint8 [≤ 64, H, W, 3] → int64 [≤ 64, h·w]
        …

`tokenizer.precision` says what the precisions are and how the network is made for them.
"""

import copy
import shutil
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizer.cli import CommandError, InputError
from tokenizer.precision import Precision, encoding_half, float32_sums, resolve
from tokenizer.protocol import Tokenizer
from tokenizer.vqgan import VQGAN

LOST = -1  # in place of the codes of an image whose latents are not finite
REMEDIES = {
    "exact": "the weights of the tokenizer are damaged; fetch or save it anew",
    "fp16": "fp16 ends at 65504; use precision bf16, or exact if that fails too",
}
REMEDY = "use precision exact; if that fails too, the weights of the tokenizer are damaged"


class BulkEncoder:
    """A tokenizer made ready to encode many images; the tokenizer itself is left as it is.

    Holds a copy of the encoding half alone. A tokenizer that is no VQGAN is called as it is and
    must live on `device`. On CUDA the network is compiled and replayed as one CUDA graph where
    triton and a C compiler are there. On a CPU it is not: it would be 1.2 to 1.3 times as fast,
    after 10 to 40 s in each process, and only where there is a compiler.
    """

    def __init__(
        self,
        tok: Tokenizer,
        *,
        device: str | torch.device = "cpu",
        precision: Precision = "auto",
        batch: int = 64,
    ) -> None:
        self.device = torch.device(device)
        self.precision = resolve(precision, tok=tok, device=device)
        self.batch = batch
        self.codebook_size = tok.codebook_size
        self.channels, self.factor = 3, 1
        self.padded = False  # to `batch` images, so that one compiled graph serves them all
        self.side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        if not isinstance(tok, VQGAN):
            self.search = lambda pixels: tok.encode(pixels.float().div(255))
            return
        self.channels, self.factor = tok.config.in_channels, tok.config.factor
        network: Any = encoding_half(tok, precision=self.precision, device=self.device)
        if self.side is not None and self.precision != "exact" and can_compile():
            # Nothing is chosen by a race of kernels, which would end differently in another
            # process, and with it the codes.
            options: dict[str, Any] = {"triton.cudagraphs": True, "deterministic": True}
            network = torch.compile(network, dynamic=False, options=options)
            self.padded = True
        codebook = copy.deepcopy(tok.quantize).to(self.device)
        self.search = lambda pixels: finite_codes(network(pixels), codebook.search)

    def encode(self, pixels: np.ndarray | Tensor) -> np.ndarray:
        """Return int64 codes [B, h·w] of uint8 pixels [B, H, W, C] or [B, C, H, W]."""
        return next(self.encode_all([pixels]))

    def encode_all(self, batches: Iterable[np.ndarray | Tensor]) -> Iterator[np.ndarray]:
        """Yield the codes of each batch, in order; shapes as of `encode`.

        Codes come one batch late: on CUDA a batch is copied and encoded while the caller makes the
        next one. A batch may be overwritten as soon as the next one is asked for.
        Raises InputError for pixels that do not fit, CommandError for latents that are not finite.
        """
        start = self._start if self.side is None else self._start_beside
        running: Callable[[], np.ndarray] | None = None
        for pixels in batches:
            started = start(self._checked(pixels))
            if running is not None:
                yield running()
            running = started
        if running is not None:
            yield running()

    def _checked(self, pixels: np.ndarray | Tensor) -> Tensor:
        """Return `pixels` as [B, C, H, W], a view of the same memory."""
        x = torch.from_numpy(pixels) if isinstance(pixels, np.ndarray) else pixels
        if x.ndim == 4 and x.shape[-1] == self.channels:
            x = x.movedim(-1, 1)
        fits = x.ndim == 4 and x.shape[1] == self.channels
        if not fits or x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise InputError(
                f"pixels of shape {list(pixels.shape)}: wanted [images, height, width, "
                f"{self.channels}] or [images, {self.channels}, height, width] with sides that are "
                f"multiples of {self.factor}"
            )
        if x.dtype != torch.uint8:
            raise InputError(f"pixels of {x.dtype}: wanted uint8, 0 to 255")
        if not 0 < len(x) <= self.batch:
            raise InputError(f"a batch of {len(x)} images: wanted 1 to {self.batch}")
        return x

    def _start(self, pixels: Tensor) -> Callable[[], np.ndarray]:
        codes = self._codes(pixels.to(self.device))
        return lambda: self._values(codes)

    def _start_beside(self, pixels: Tensor) -> Callable[[], np.ndarray]:
        """Copy on a stream of its own, encode on the current one; the result waits for both.

        torch hands a freed piece of pinned memory out again only when the copies from it are over,
        so batches take turns between two pieces with no help from us.
        """
        assert self.side is not None
        here = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.side):
            moved = pixels.pin_memory().to(self.device, non_blocking=True)
        here.wait_stream(self.side)
        moved.record_stream(here)
        codes = self._codes(moved).to("cpu", non_blocking=True)
        done = torch.cuda.Event()
        done.record(here)

        def values() -> np.ndarray:
            done.synchronize()
            return self._values(codes)

        return values

    @torch.no_grad()
    def _codes(self, pixels: Tensor) -> Tensor:
        """Return int64 codes [B, h·w] on the device, LOST throughout images without finite ones."""
        full = pixels
        if self.padded:  # `F.pad` keeps the order in memory, on which the compiled graph depends
            full = F.pad(pixels, (0, 0) * 3 + (0, self.batch - len(pixels)))
        with float32_sums(tf32=self.precision == "tf32"):
            return self.search(full)[: len(pixels)]

    def _values(self, codes: Tensor) -> np.ndarray:
        values = codes.cpu().numpy()
        if lost := int((values == LOST).any(1).sum()):
            raise CommandError(
                f"the latents of {lost} of {len(values)} images are not finite in "
                f"{self.precision}: {REMEDIES.get(self.precision, REMEDY)}"
            )
        if values.max() >= self.codebook_size:
            raise CommandError(
                f"the tokenizer made codes up to {values.max()}, but it says that it has "
                f"{self.codebook_size}; it is not one that can be used"
            )
        return values


def finite_codes(latents: Tensor, search: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the codes of latents [B, D, h, w], LOST for images with one that is not finite.

    No answer of a search among NaN would look wrong, so it has to be told apart here.
    """
    finite = latents.isfinite().flatten(1).all(1)[:, None]
    return torch.where(finite, search(latents), LOST)


def can_compile() -> bool:
    """Say whether torch.compile has what it needs for CUDA: triton, and a compiler of C."""
    return find_spec("triton") is not None and any(map(shutil.which, ("cc", "gcc", "clang")))
