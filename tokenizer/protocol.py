"""What the rest of the house asks of a tokenizer; code that only uses one imports this alone."""

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class Tokenizer(Protocol):
    """Square images to rows of integer codes and back.

    Pixels are float in [0, 1] whatever range the network inside was trained on. Codes are in raster
    order: row 0 left to right, then row 1.
    """

    @property
    def image_size(self) -> int:
        """Side in pixels of the images it was made for."""

    @property
    def codes_per_image(self) -> int:
        """Codes of one image of `image_size`."""

    @property
    def codebook_size(self) -> int:
        """Codes lie in 0 .. codebook_size - 1."""

    @property
    def id(self) -> str:
        """Equal for two tokenizers exactly if their weights are; shards carry it."""

    def encode(self, images: "Tensor") -> "Tensor":
        """Return int64 [B, codes] of float images [B, 3, H, W]."""

    def decode(self, codes: "Tensor") -> "Tensor":
        """Return float images [B, 3, H, W] of int64 codes [B, codes]."""
