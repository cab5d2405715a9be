"""Measure a model on held-out sentences: perplexity, and whether the prompt helps.

    python -m lvm.evaluate runs/demo --data data/demo --split val --out report.json

Perplexity by source, kind and place in the sentence, in two definitions: exp of the mean over all
codes, and LVM's, exp of the mean of each image given those before it, then the mean over images.
The prompt experiment is `lvm.in_context`. n codes an image.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor

from lvm import interop
from lvm.config import Reads
from lvm.generate import check_codes, reads_of
from lvm.in_context import (
    POSITIONS,
    does_the_prompt_help,
    find_prompts,
    group_keys,
    spread,
    summarise,
    target_nll,
)
from lvm.mask import attention_mask
from lvm.model import Transformer
from lvm.objectives.next_code import token_nll
from tokenizer.cli import InputError, Progress, run
from tokenizer.devices import Device, pick_device
from tokenizer.files import atomic_write
from visual_sentences.batch import IGNORE
from visual_sentences.loader import Reader
from visual_sentences.manifest import Manifest
from visual_sentences.pack import Rows, pack

__all__ = ["Evaluate", "corpus", "evaluate", "image_nll", "summarise", "target_nll"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate:
    """Measure perplexity on held-out sentences, and how much a right prompt helps."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Run folder of lvm.train, export of lvm.export, or Hugging Face LLaMA or Qwen3 folder."""
    data: Path
    """Folder of shards with manifest.json, from visual_sentences.build."""
    split: str = "val"
    rows: int = 0
    """Rows to measure perplexity on, spread evenly over the split (0: all)."""
    prompts: int = 256
    """Targets of the prompt experiment, over all pair sources (0: leave it out)."""
    group_by: str = ""
    """Regular expression on the key of a target: samples with equal first group (or whole match)
    are drawn together in the bootstrap. Default: every key for itself."""
    out: Path | None = None
    """JSON file to write, or a folder for evaluation.json."""
    seed: int = 0
    device: Device = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageNLL:
    """Sums over the codes of each image of a corpus, one entry an image."""

    source: np.ndarray  # int, index into the manifest's sources
    position: np.ndarray  # int, place in its sentence
    nll: np.ndarray  # float64, sum over its predicted codes
    codes: np.ndarray  # int, how many those are


@torch.inference_mode()
def code_nll(model: Transformer, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return -log p of each stored code given its row so far, fp32 [B, T], and where there is one.

    Codes that the layout does not predict (the first of a document in layout none) and padding have
    none.
    """
    reads = reads_of(model)
    batch = pack(rows, layout=reads.layout, vocab=reads.vocab, whole_rows=reads.whole_rows)
    ids = batch.ids.clamp_max(model.config.vocab_size - 1)  # pad, where a table has no room for it
    logits = model(ids, pos=batch.pos, mask=attention_mask(batch.doc, batch.block))
    nll, known = token_nll(logits, batch.labels), batch.labels != IGNORE
    if reads.layout == "none":  # the label of a position is the code of the next
        nll, known = nll.roll(1, dims=1), known.roll(1, dims=1)
    return nll, known


def image_nll(
    model: Transformer, reader: Reader, places: Sequence[tuple[int, int]], *, progress: Progress
) -> ImageNLL:
    """Evaluate the rows at `places`, pairs of source and row."""
    n, device = reads_of(model).codes_per_image, model.embed.weight.device
    step = max(1, POSITIONS // reader.manifest.row_len)
    parts: list[list[np.ndarray]] = []
    for first in range(0, len(places), step):
        sources, numbers = np.array(places[first : first + step], np.int64).T
        rows = reader.read(sources, numbers)
        nll, known = (x.unflatten(1, (-1, n)).cpu() for x in code_nll(model, rows.to(device)))
        codes = known.sum(-1).numpy()  # [B, images]
        index = np.arange(codes.shape[1])
        starts = np.zeros_like(codes)
        for row, begin in enumerate(rows.starts.numpy()):
            begin = begin[begin >= 0] // n
            starts[row, begin] = begin
        position = index - np.maximum.accumulate(starts, axis=1)
        there = codes > 0
        parts.append([
            np.broadcast_to(sources[:, None], codes.shape)[there],
            position[there],
            nll.double().sum(-1).numpy()[there],
            codes[there],
        ])  # fmt: skip
        progress.update(len(sources))
    source, position, total, codes = (np.concatenate(column) for column in zip(*parts, strict=True))
    return ImageNLL(source=source, position=position, nll=total, codes=codes)


def corpus(found: ImageNLL, manifest: Manifest) -> dict[str, Any]:
    """Return perplexities of all, by source, by kind and by place in the sentence."""

    def figures(chosen: np.ndarray) -> dict[str, float | int]:
        nll, codes = found.nll[chosen], found.codes[chosen]
        return {
            "perplexity": float(np.exp(nll.sum() / codes.sum())),
            "perplexity_lvm": float(np.exp(nll / codes).mean()),
            "codes": int(codes.sum()),
            "images": len(codes),
        }

    def positions(chosen: np.ndarray) -> list[dict[str, float | int]]:
        places = np.unique(found.position[chosen])
        return [{"position": int(p), **figures(chosen & (found.position == p))} for p in places]

    every = np.ones(len(found.nll), bool)
    sources, kinds = {}, {}
    for i in np.unique(found.source):
        chosen, entry = found.source == i, manifest.sources[i]
        sources[entry.name] = {
            "kind": entry.kind, **figures(chosen), "positions": positions(chosen)
        }  # fmt: skip
    kind_of = np.array([entry.kind for entry in manifest.sources])[found.source]
    for kind in sorted(set(kind_of.tolist())):
        kinds[kind] = figures(kind_of == kind)
    return {
        "all": figures(every), "sources": sources, "kinds": kinds, "positions": positions(every)
    }  # fmt: skip


def check_data(reads: Reads, manifest: Manifest, split: str) -> None:
    """Refuse data of other codes than the model's, of longer rows, or without the split."""
    check_codes(
        reads,
        tokenizer=manifest.tokenizer,
        codes=manifest.codebook_size,
        codes_per_image=manifest.codes_per_image,
        what="data",
    )
    if manifest.row_len > reads.row_len:
        raise InputError(
            f"the data has rows of {manifest.row_len} codes, the model was trained on "
            f"{reads.row_len}; build the data again with that row_len"
        )
    if not sum(manifest.rows(split).values()):
        raise InputError(
            f'there are no rows of split "{split}"; this data has {", ".join(manifest.splits)}'
        )


def evaluate(
    model: Transformer,
    folder: Path | str,
    *,
    split: str = "val",
    rows: int = 0,
    prompts: int = 256,
    group_by: str = "",
    seed: int = 0,
    show: bool = False,
) -> dict[str, Any]:
    """Return the report of a model on the data in `folder`; arguments as the command's.

    {"corpus": {"all", "sources", "kinds", "positions"},
     "perplexity", "paired", "shots", "tasks": as `lvm.in_context.summarise`, where measured}
    """
    manifest = Manifest.load(folder)
    check_data(reads_of(model), manifest, split)
    reader = Reader(folder, manifest, split=split, random=False)
    places = [(i, r) for i, c in enumerate(manifest.rows(split).values()) for r in range(c)]
    places = [places[i] for i in spread(len(places), rows)]
    with Progress("perplexity", total=len(places), unit="rows", enabled=show) as progress:
        report = {"corpus": corpus(image_nll(model, reader, places, progress=progress), manifest)}
    found = find_prompts(reader, split=split, count=prompts, seed=seed) if prompts else None
    if found is not None:
        groups = group_keys(found.keys, group_by)
        report |= does_the_prompt_help(model, found, groups, seed=seed)
    return report


def table(report: dict[str, Any]) -> str:
    """Write a report as plain lines."""

    def line(name: str, figures: dict[str, Any]) -> str:
        return (
            f"{name:<28} {figures['perplexity']:>12.3f} {figures['perplexity_lvm']:>12.3f} "
            f"{figures['images']:>9}"
        )

    def interval(figures: dict[str, Any]) -> str:
        if figures["low"] is None:
            return f"{figures['mean']:.4g}  (one group: no interval)"
        return f"{figures['mean']:.4g}  [{figures['low']:.4g}, {figures['high']:.4g}]"

    found = report["corpus"]
    lines = [
        f"{'perplexity':<28} {'by code':>12} {'by image':>12} {'images':>9}",
        line("all", found["all"]),
        *(line(f"source {name}", figures) for name, figures in found["sources"].items()),
        *(line(f"kind {name}", figures) for name, figures in found["kinds"].items()),
        *(line(f"image {f['position']} of a sentence", f) for f in found["positions"]),
    ]
    if "perplexity" not in report:
        return "\n".join(lines)
    lines += ["", "targets of pair sentences, mean and 95 % interval"]
    for kind, figures in report["perplexity"].items():
        lines.append(f"  {kind + ' prompt':<26} {interval(figures)}  n {figures['n']}")
    for kind, figures in report["paired"].items():
        lines.append(f"  paired {kind:<19} {interval(figures)}")
    for shot in report["shots"]:
        lines.append(f"  {shot['pairs']} right pairs              {interval(shot)}")
    for task, parts in report["tasks"].items():
        ratios = ", ".join(f"{k} {interval(v)}" for k, v in parts["paired"].items())
        lines.append(f"  {task}: {ratios}")
    return "\n".join(lines)


def main(command: Evaluate) -> None:
    device = pick_device(command.device)
    if command.rows < 0 or command.prompts < 0:
        raise InputError(
            "--rows and --prompts cannot be negative; --rows 0 is all, --prompts 0 none"
        )
    model = interop.load(command.model)
    model.to(device)
    report = evaluate(
        model,
        command.data,
        split=command.split,
        rows=command.rows,
        prompts=command.prompts,
        group_by=command.group_by,
        seed=command.seed,
        show=True,
    )
    print(table(report))
    if command.prompts and "perplexity" not in report:
        print("prompt experiment: left out, the split has no sentence of two pairs or more")
    elif command.prompts and "wrong" not in report["perplexity"]:
        print("wrong prompt: left out, it needs a second pair source")
    if command.out is not None:
        out = command.out
        out = out if out.suffix == ".json" else out / "evaluation.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        about = {"model": str(command.model), "data": str(command.data), "split": command.split}
        with atomic_write(out, "w") as file:
            json.dump({**about, **report}, file, indent=1)
        print(f"wrote {out}")


if __name__ == "__main__":
    run(Evaluate, main, prog="python -m lvm.evaluate")
