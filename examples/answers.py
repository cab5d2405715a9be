"""The demo's pictures: answers to analogy and sequence prompts from held-out maps, and sentences.

Writes DIR/answers.json and the PNG files that it names. An analogy is asked three times: with pairs
of its own task before the query, with pairs of another task, and with nothing before it. Answers
are scored by their task's metric (`lvm.evaluation.tasks`) against the true target, both as the
tokenizer shows them, and each task shows its best, its median and its worst.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import tokenizer
from examples.tasks import PALETTES
from lvm import interop
from lvm.evaluation.gallery import Case, cases
from lvm.evaluation.in_context import find_prompts, group_keys
from lvm.evaluation.judge import judge
from lvm.generate import Sampling, decode, draw
from lvm.model import Transformer
from tokenizer.cli import run
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
    """Analogies that are answered, over all tasks; best, median and worst are shown."""
    group_by: str = ""
    """Regular expression on the key of a target, as lvm.evaluate has it."""
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
        return self.write(uint8(images))

    def write(self, images: Iterable[np.ndarray]) -> list[str]:
        """Write uint8 images [H, W, 3]; returns their file names."""
        names = []
        for image in images:
            names.append(f"{self.count:04d}.png")
            save_image(self.folder / names[-1], image)
            self.count += 1
        return names


def palettes(tasks: Sequence[str]) -> list[str]:
    """Return the colours of the segmentations among `tasks`, as lvm.evaluate's --task has them."""
    return [
        f"{task}=segment:" + ",".join("#" + bytes(row).hex() for row in PALETTES[task].tolist())
        for task in dict.fromkeys(tasks)
        if task in PALETTES
    ]


def entry_of(case: Case, sheet: Sheet) -> dict[str, object]:
    """Write the pictures of a case; returns its entry in answers.json."""
    answers = {"right": case.candidates[0], **case.others}
    return {
        "task": case.task,
        "place": case.place,
        "figure": case.figure,
        "key": case.key,
        "prompt": sheet.write(case.prompt),
        "wrong_prompt": sheet.write(case.wrong_prompt),
        "target": sheet.write([case.target])[0],
        "answers": {kind: sheet.write([image])[0] for kind, image in answers.items()},
        "scores": {
            kind: {name: round(value, 4) for name, value in case.scores[kind].items()}
            for kind in answers
        },
    }


def analogies(
    model: Transformer, tok: Tokenizer, reader: Reader, sheet: Sheet, command: Answers
) -> dict[str, object]:
    """Answer and score prompts; returns the scores by task, and best, median and worst of each."""
    found = find_prompts(reader, split=command.split, count=command.prompts, seed=command.seed)
    if found is None:
        return {"scores": {}, "analogies": []}
    judged = judge(
        model,
        tok,
        found,
        Sampling(temperature=command.temperature, seed=command.seed),
        groups=group_keys(found.keys, command.group_by),
        tasks=palettes(found.tasks),
        batch=len(found.keys),
        show=True,
    )
    shown = cases(tok, judged, most=3 * len(judged.scored))
    return {
        "scores": judged.report["tasks"],
        "analogies": [entry_of(case, sheet) for case in shown],
    }


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
    model, tok = interop.load(command.model), tokenizer.load(command.tokenizer)
    reader = Reader(command.data, Manifest.load(command.data), split=command.split, random=False)
    sheet = Sheet(command.out)
    result = {
        "temperature": command.temperature,
        **analogies(model, tok, reader, sheet, command),
        "sequences": sequences(model, tok, reader, sheet, command),
        "sentences": sentences(tok, reader, sheet, command),
    }
    with atomic_write(command.out / "answers.json", "w") as file:
        json.dump(result, file, indent=1)
    print(f"{sheet.count} pictures in {command.out}")


if __name__ == "__main__":
    run(Answers, main, prog="python -m examples.answers")
