"""Images to discrete codes and back.

    tok = tokenizer.load("folder")
    codes = tok.encode(images)     # float [B, 3, H, W] in [0, 1] → int64 [B, codes], raster order
    images = tok.decode(codes)

Names are fetched on first use: importing the package costs nothing, not even torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizer.config import VQGANConfig
    from tokenizer.interop import load, save
    from tokenizer.protocol import Tokenizer
    from tokenizer.vqgan import VQGAN

__all__ = ["VQGAN", "Tokenizer", "VQGANConfig", "load", "save"]

_HOMES = {
    "VQGAN": "tokenizer.vqgan",
    "VQGANConfig": "tokenizer.config",
    "Tokenizer": "tokenizer.protocol",
    "load": "tokenizer.interop",
    "save": "tokenizer.interop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tokenizer' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
