"""The demo's pictures: answers to analogy and sequence prompts from held-out maps, and sentences.

Writes DIR/answers.json and the PNG files that it names. An analogy is asked three times: with pairs
of its own task before the query, with pairs of another task, and with nothing before it. An answer
is scored by its PSNR against the true target, both as the tokenizer shows them.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import lvm
import tokenizer
from lvm.generate import Sampling, decode, draw
from lvm.in_context import Prompts, find_prompts
from lvm.model import Transformer
from tokenizer.cli import Progress, run
from tokenizer.files import atomic_write
from tokenizer.images import save_image
from tokenizer.metrics import psnr
from tokenizer.protocol import Tokenizer
from visual_sentences.loader import Reader
from visual_sentences.manifest import Manifest

SENTENCES = 2  # rows shown of each source
SHOWN_FRAMES = 2  # frames drawn in a sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Answer prompts made of held-out sentences, and write the pictures that the report shows."""

    model: Path
    """Run folder of lvm.train."""
    tokenizer: Path
    data: Path
    """Folder of shards from maps that nothing was trained on."""
    out: Path
    split: str = "train"
    """Split of the shards: a folder built of held-out maps alone calls all of it train."""
    prompts: int = 96
    """Analogies that are answered; best, median and worst are shown."""
    sequences: int = 6
    temperature: float = 0.8
    seed: int = 0


def uint8(images: Tensor) -> np.ndarray:
    """Return float images [..., 3, H, W] in [0, 1] as uint8 [..., H, W, 3]."""
    return (images.movedim(-3, -1) * 255).round().to(torch.uint8).numpy()


class Sheet:
    """Writes pictures under running numbers and remembers nothing else."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, images: Tensor) -> list[str]:
        """Write float images [N, 3, H, W]; returns their file names."""
        names = []
        for image in uint8(images):
            names.append(f"{self.count:04d}.png")
            save_image(self.folder / names[-1], image)
            self.count += 1
        return names


def contexts(prompts: Prompts) -> dict[str, Tensor]:
    """Return the prompts [S, images, n] of each kind; wrong only where there is another task."""
    kinds = {"right": prompts.right, "none": prompts.shots(0)}
    return kinds if prompts.wrong is None else {**kinds, "wrong": prompts.wrong}


def analogies(
    model: Transformer, tok: Tokenizer, prompts: Prompts, sheet: Sheet, command: Answers
) -> list[dict[str, object]]:
    """Answer every prompt of every kind; returns one entry a prompt, best answers first."""
    sampling = Sampling(temperature=command.temperature, seed=command.seed)
    target = decode(tok, prompts.target)
    kinds = contexts(prompts)
    answers, scores = {}, {}
    with Progress("answer", total=len(kinds) * len(target), unit="prompts") as progress:
        for kind, codes in kinds.items():
            answers[kind] = decode(tok, draw(model, codes, sampling).codes[:, 0, 0])
            scores[kind] = psnr(answers[kind], target).tolist()
            progress.update(len(target))
    entries: list[dict[str, object]] = []
    for i in np.argsort(scores["right"])[::-1].tolist():
        entries.append({
            "task": prompts.tasks[i],
            "key": prompts.keys[i],
            "prompt": sheet.add(decode(tok, prompts.right[i])),
            "wrong_prompt": [] if prompts.wrong is None
            else sheet.add(decode(tok, prompts.wrong[i])),
            "target": sheet.add(target[i : i + 1])[0],
            "answers": {kind: sheet.add(images[i : i + 1])[0] for kind, images in answers.items()},
            "psnr": {kind: round(values[i], 2) for kind, values in scores.items()},
        })  # fmt: skip
    return entries


def rows_of(
    reader: Reader, source: int, count: int, *, split: str, full: bool
) -> list[list[Tensor]]:
    """Return up to `count` rows of a source as sentences of codes [images, n]; full rows alone."""
    total = list(reader.manifest.rows(split).values())[source]
    n, found = reader.manifest.codes_per_image, []
    for row in range(total):
        read = reader.read(np.array([source]), np.array([row]))
        images = read.tokens[0, : int(read.length[0])].long().view(-1, n)
        if full and len(images) < reader.manifest.images_per_row:
            continue
        starts = (read.starts[0][read.starts[0] >= 0] // n).tolist()
        ends = [*starts[1:], len(images)]
        found.append([images[a:b] for a, b in zip(starts, ends, strict=True)])
        if len(found) == count:
            break
    return found


def sequences(
    model: Transformer, tok: Tokenizer, reader: Reader, sheet: Sheet, command: Answers
) -> list[dict[str, object]]:
    """Continue walks: all but the last frames are given, the last ones are drawn."""
    entries: list[dict[str, object]] = []
    for i, source in enumerate(reader.manifest.sources):
        if source.kind != "video":
            continue
        rows = rows_of(reader, i, command.sequences, split=command.split, full=True)
        clips = [row[0] for row in rows if len(row) == 1]
        if not clips:
            continue
        clip = torch.stack(clips)
        given, truth = clip[:, :-SHOWN_FRAMES], clip[:, -SHOWN_FRAMES:]
        sampling = Sampling(new=SHOWN_FRAMES, temperature=command.temperature, seed=command.seed)
        drawn = draw(model, given, sampling).codes[:, 0]
        for k in range(len(clip)):
            shown, true = decode(tok, drawn[k]), decode(tok, truth[k])
            last = decode(tok, given[k, -1:]).expand_as(true)
            entries.append({
                "source": source.name,
                "given": sheet.add(decode(tok, given[k])),
                "drawn": sheet.add(shown),
                "true": sheet.add(true),
                "psnr": [round(v, 2) for v in psnr(shown, true).tolist()],
                "psnr_still": [round(v, 2) for v in psnr(last, true).tolist()],
            })  # fmt: skip
    return entries


def sentences(
    tok: Tokenizer, reader: Reader, sheet: Sheet, command: Answers
) -> list[dict[str, object]]:
    """Decode a few rows of each source back to pictures."""
    entries: list[dict[str, object]] = []
    for i, source in enumerate(reader.manifest.sources):
        rows = rows_of(reader, i, SENTENCES, split=command.split, full=True)
        shown = [[sheet.add(decode(tok, sentence)) for sentence in row] for row in rows]
        entries.append({"source": source.name, "kind": source.kind, "rows": shown})
    return entries


def main(command: Answers) -> None:
    model, tok = lvm.load(command.model), tokenizer.load(command.tokenizer)
    reader = Reader(command.data, Manifest.load(command.data), split=command.split, random=False)
    sheet = Sheet(command.out)
    found = find_prompts(reader, split=command.split, count=command.prompts, seed=command.seed)
    result = {
        "temperature": command.temperature,
        "analogies": [] if found is None else analogies(model, tok, found, sheet, command),
        "sequences": sequences(model, tok, reader, sheet, command),
        "sentences": sentences(tok, reader, sheet, command),
    }
    with atomic_write(command.out / "answers.json", "w") as file:
        json.dump(result, file, indent=1)
    print(f"{sheet.count} pictures in {command.out}")


if __name__ == "__main__":
    run(Answers, main, prog="python -m examples.answers")
