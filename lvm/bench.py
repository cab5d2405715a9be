"""Time sampling on this machine: python -m lvm.bench [--device cuda].

Tokens a second of drawing one image after a prompt that leaves room for just that, with random
weights in fp32: our `draw` and transformers' `generate` on the same weights, one after the other in
each round, so that a change of the machine's speed meets both. On a CPU the demo's model, on a GPU
the shape of lvm_300m.
"""

from dataclasses import replace
from typing import Any

import torch

from kernels.bench import options, report, seconds
from lvm.config import Reads
from lvm.generate import Sampling, draw
from lvm.interop import hf_names, to_llama
from lvm.model import Transformer, build
from lvm.recipes import recipe


def subject(device: str) -> Transformer:
    """Return the model that is timed."""
    name, codes, per_image, images = (
        ("lvm_300m", 8192, 256, 16) if device == "cuda" else ("demo", 512, 64, 8)
    )
    reads = Reads(layout="bos", codes=codes, codes_per_image=per_image, row_len=per_image * images)
    config = replace(recipe(name).model, vocab_size=reads.vocab.size)
    return build(config, seed=0, reads=reads).to(device).eval()


def in_transformers(model: Transformer, reads: Reads) -> Any:
    """Return transformers' LlamaForCausalLM with the weights of `model`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs: Any = LlamaForCausalLM(
        LlamaConfig(**to_llama(model.config, reads, dtype=torch.float32))
    )
    names = hf_names(model.config)
    theirs.load_state_dict({names[k]: v for k, v in model.state_dict().items()})
    return theirs.to(model.embed.weight.device).eval()


def generate_table(device: str, *, repeats: int) -> list[dict[str, object]]:
    """Time both for 1 and 16 candidates."""
    model = subject(device)
    reads = model.reads
    assert reads is not None
    theirs = in_transformers(model, reads)
    n, k = reads.codes_per_image, reads.images_per_row - 1
    codes = torch.randint(reads.codes, (k, n), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([torch.tensor([reads.vocab.bos]), codes.flatten()])[None].to(device)
    table: list[dict[str, object]] = []
    for candidates in (1, 16):
        rest = {"do_sample": True, "top_k": 0, "min_new_tokens": n, "max_new_tokens": n}
        rest |= {"num_return_sequences": candidates, "pad_token_id": reads.vocab.pad}

        def ours() -> None:
            draw(model, codes, Sampling(candidates=candidates))  # noqa: B023 - called at once

        def other() -> None:
            with torch.inference_mode():
                theirs.generate(ids, attention_mask=torch.ones_like(ids), **rest)  # noqa: B023

        times = [
            (seconds(ours, device=device, repeats=1), seconds(other, device=device, repeats=1))
            for _ in range(repeats)
        ]
        a, b = sorted(times, key=lambda t: t[1] / t[0])[len(times) // 2]
        table.append(
            {
                "candidates": candidates,
                "ours tokens/s": round(candidates * n / a),
                "transformers tokens/s": round(candidates * n / b),
                "ratio": round(b / a, 2),
            }
        )
    return table


def main() -> None:
    found = options("python -m lvm.bench", __doc__)
    report("generate", found.device, generate_table(found.device, repeats=found.repeats))


if __name__ == "__main__":
    main()
