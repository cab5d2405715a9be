"""Many prompts from a file (`prompt_file`): batched by length, on many devices, resumable.

Each process of torchrun answers every so-manieth batch and writes images atomically, then a line of
its part of the results, so that a run killed at any moment goes on from what is finished.
C candidates, n codes an image.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lvm import interop
from lvm.evaluation.in_context import target_nll
from lvm.generate import Sampling, draw, encode, rank
from lvm.model import Transformer
from lvm.prompting import answers
from lvm.prompting.frames import read_picture
from lvm.prompting.prompt_file import (
    PARTS,
    RESULTS,
    BadLine,
    Line,
    failure,
    finished,
    read_lines,
    seal,
)
from tokenizer.cli import CommandError, Progress
from tokenizer.images import BadImage, Preprocess
from tokenizer.protocol import Tokenizer
from tokenizer.world import World, world

if TYPE_CHECKING:
    from lvm.prompt import Prompt

ENCODED = 32  # images encoded at once
REMEMBERED = 4096  # images whose codes are kept: the same examples often stand before many queries
NAMED = 20  # bad lines that are printed; the results have all


class Codes:
    """Codes of image files, each read and encoded once while it is remembered."""

    def __init__(
        self, model: Transformer, tok: Tokenizer, preprocess: Preprocess, device: torch.device
    ) -> None:
        self.model, self.tok, self.preprocess, self.device = model, tok, preprocess, device
        self.known: dict[Path, Tensor | BadImage] = {}

    def read(self, files: Sequence[Path]) -> Mapping[Path, Tensor | BadImage]:
        """Return the codes [n] of each file, or why it cannot be used."""
        if len(self.known) > REMEMBERED:
            self.known.clear()
        new = [file for file in dict.fromkeys(files) if file not in self.known]
        for first in range(0, len(new), ENCODED):
            images, read = [], []
            for file in new[first : first + ENCODED]:
                try:
                    images.append(self.pixels(file))
                    read.append(file)
                except BadImage as error:
                    self.known[file] = error
            if read:
                floats = answers.floats(np.stack(images), self.device)
                self.known.update(zip(read, encode(self.model, self.tok, floats), strict=True))
        return self.known

    def pixels(self, file: Path) -> np.ndarray:
        return read_picture(file, size=self.tok.image_size, preprocess=self.preprocess)


def answer_lines(
    model: Transformer,
    codes: Codes,
    lines: Sequence[Line],
    sampling: Sampling,
    *,
    by: answers.Rank | None,
) -> Iterator[dict[str, Any]]:
    """Answer lines together, write their images, and yield a record of each.

    A line whose images cannot be used does not stop the others.
    """
    known = codes.read([file for line in lines for file in line.input + line.target])
    good, prompts = [], []
    for line in lines:
        try:
            prompts.append(torch.stack([_usable(known[file], file) for file in line.input]))
            for file in line.target:
                _usable(known[file], file)
            good.append(line)
        except BadLine as error:
            yield failure(line.number, error)
    if not good:
        return
    drawn = draw(model, prompts[: len(good)], sampling)
    for i, line in enumerate(good):
        one = type(drawn)(drawn.codes[i], drawn.log_likelihood[i])
        order = torch.arange(sampling.candidates)
        if by is not None:
            order = rank(model, prompts[i], one, by=by).cpu()
        score = one.log_likelihood.double().cpu()[order]
        pictures = answers.pictures(codes.tok, one.codes.to(codes.device)[order.to(codes.device)])
        record: dict[str, Any] = {
            "line": line.number,
            "key": line.key,
            "output": line.name,
            "log_likelihood": score.sum(-1).tolist(),
            "nats_per_code": (-score.mean(-1) / one.codes.shape[-1]).tolist(),
            "drawn_as": (order + 1).tolist(),
        }
        if line.target:
            record |= _against_target(model, codes, line, prompts[i], pictures)
        try:
            line.output.parent.mkdir(parents=True, exist_ok=True)
            answers.write_answers(line.output, pictures)
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            yield failure(line.number, BadLine("output cannot be written", str(error)))
            continue
        yield record


def _against_target(
    model: Transformer, codes: Codes, line: Line, prompt: Tensor, pictures: np.ndarray
) -> dict[str, Any]:
    """Return what the model makes of the true answer, and how far each candidate is from it.

    perplexity  exp of the mean of -log p over the codes of all targets, each after those before it:
                LVM's figure of one example
    mse         mean over pixels and channels in [0, 1], one a candidate, over the images that both
                have; LVM's script prints three times that
    """
    nll, context = [], prompt
    for file in line.target:
        target = codes.known[file]
        assert isinstance(target, Tensor)
        nll.append(target_nll(model, context[None], target[None]))
        context = torch.cat([context, target[None]])
    both = min(len(line.target), pictures.shape[1])
    wanted = np.stack([codes.pixels(file) for file in line.target[:both]])
    error = (pictures[:, :both].astype(np.float64) - wanted) / 255
    return {
        "perplexity": float(torch.cat(nll).double().mean().exp()),
        "mse": (error**2).mean(axis=(1, 2, 3, 4)).tolist(),
    }


def _usable(found: Tensor | BadImage, file: Path) -> Tensor:
    if isinstance(found, BadImage):
        raise BadLine(found.reason, str(file))
    return found


def run_batch(command: "Prompt") -> int:
    """Answer all lines of `command.batch`; returns 1 if any could not be."""
    from lvm.prompt import check_batch, look, make_folder, sampling_of

    check_batch(command)
    sampling = sampling_of(command, new=1 if command.new is None else command.new, bare=1)
    make_folder(command.out)
    assert command.batch is not None
    with world(command.device) as here:
        reads, tok = look(command)
        model = interop.load(command.model).to(here.device)
        todo: list[Line] = []
        old: dict[int, dict[str, Any]] = {}
        if here.main:
            lines, bad = read_lines(
                command.batch,
                root=command.root or command.batch.parent,
                out=command.out,
                anywhere=command.anywhere,
                room=reads.images_per_row,
                settings=_settings(command, model, tok, sampling),
            )
            known = finished(command.out)
            old = {
                line.number: known[line.number]
                for line in lines
                if known.get(line.number, {}).get("key") == line.key and line.output.is_file()
            }
            seal(command.out, old | {record["line"]: record for record in bad})
            # Prompts of like lengths together: a batch takes the time of its longest.
            todo = sorted(
                (line for line in lines if line.number not in old),
                key=lambda line: (len(line.input), line.number),
            )
            if old:
                print(f"{len(old)} lines were finished before", flush=True)
        todo = here.share(todo)
        codes = Codes(model, tok.to(here.device), command.preprocess, here.device)
        _answer_mine(command, here, model=model, codes=codes, todo=todo, sampling=sampling)
        here.wait()
        failed = 0
        if here.main:
            records = finished(command.out)
            seal(command.out, records)
            failed = report(command, records)
        return 1 if here.share(failed) else 0


def _answer_mine(
    command: "Prompt",
    here: World,
    *,
    model: Transformer,
    codes: Codes,
    todo: Sequence[Line],
    sampling: Sampling,
) -> None:
    size = command.batch_size
    batches = [todo[i : i + size] for i in range(0, len(todo), size)][here.rank :: here.size]
    part = command.out / PARTS.replace("*", str(here.rank))
    total = sum(map(len, batches))
    with (
        open(part, "a", encoding="utf-8") as file,
        Progress("answers", total=total, unit="prompts", enabled=here.main) as progress,
    ):
        for batch in batches:
            try:
                for record in answer_lines(model, codes, batch, sampling, by=command.rank):
                    file.write(json.dumps(record) + "\n")
                    file.flush()
            except torch.OutOfMemoryError as error:
                raise CommandError(
                    f"{len(batch)} prompts of {sampling.candidates} candidates do not fit into the "
                    f"memory of {here.device}: give a smaller --batch-size or fewer --candidates; "
                    "what is finished stays"
                ) from error
            progress.update(len(batch))


def report(command: "Prompt", records: Mapping[int, dict[str, Any]]) -> int:
    """Print what became of the lines; returns how many failed."""
    bad = {number: record for number, record in records.items() if "error" in record}
    for number, record in sorted(bad.items())[:NAMED]:
        detail = f" ({record['detail']})" if record["detail"] else ""
        print(f"{command.batch}, line {number}: {record['error']}{detail}", file=sys.stderr)
    if len(bad) > NAMED:
        print(f"… and {len(bad) - NAMED} more", file=sys.stderr)
    print(f"{len(records) - len(bad)} of {len(records)} prompts answered")
    for reason, count in Counter(record["error"] for record in bad.values()).most_common():
        print(f"  not answered, {reason}: {count}")
    if perplexity := [r["perplexity"] for r in records.values() if "perplexity" in r]:
        print(f"  perplexity of targets, mean of {len(perplexity)}: {np.mean(perplexity):.3f}")
        first = np.mean([r["mse"][0] for r in records.values() if "mse" in r])
        print(f"  squared error of the first candidates, mean: {first:.4f}")
    print(f"wrote {command.out / RESULTS}")
    return len(bad)


def _settings(command: "Prompt", model: Transformer, tok: Tokenizer, sampling: Sampling) -> str:
    """Return what decides the answers beside the line: with other settings none is finished."""
    # A few rows that every update moves tell one checkpoint of a run from another.
    weights = model.embed.weight[:64].detach().float().cpu().numpy().tobytes()
    return json.dumps({
        **asdict(sampling),
        "rank": command.rank,
        "preprocess": command.preprocess,
        "tokenizer": tok.id,
        "model": hashlib.sha256(weights).hexdigest(),
    })  # fmt: skip
