"""Time bulk encoding on this machine: python -m tokenizer.bench [--device cuda].

Images a second of the whole path from uint8 pixels to codes, with random weights, in the precision
that the build uses (fp32, TF32 off).
"""

import torch

from kernels.bench import options, report, seconds
from tokenizer.config import VQGANConfig
from tokenizer.presets import muse_f16_8192, tiny_f4
from tokenizer.vqgan import VQGAN


def encode_row(
    name: str, config: VQGANConfig, *, batch: int, device: str, repeats: int
) -> dict[str, object]:
    """Time one network on one batch size."""
    torch.manual_seed(0)
    model = VQGAN(config).to(device).eval()
    side = config.image_size
    pixels = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, device=device)
    took = seconds(lambda: model.encode(pixels.float() / 255), device=device, repeats=repeats)
    return {
        "tokenizer": name,
        "pixels": side,
        "batch": batch,
        "ms": round(took * 1e3, 2),
        "images/s": round(batch / took, 2),
    }


def main() -> None:
    found = options("python -m tokenizer.bench", __doc__)
    large = 64 if found.device == "cuda" else 1
    cases = [("tiny_f4", tiny_f4(), 64), ("muse_f16_8192", muse_f16_8192(), large)]
    report(
        "encode",
        found.device,
        [
            encode_row(name, recipe.model, batch=batch, device=found.device, repeats=found.repeats)
            for name, recipe, batch in cases
        ],
    )


if __name__ == "__main__":
    main()
