"""Ask a model with pictures: an analogy by example pairs, or the next frames of a sequence.

    python -m lvm.prompt MODEL --tokenizer TOK --pair x1.png y1.png --pair x2.png y2.png \\
        --query q.png --out answer.png
    python -m lvm.prompt MODEL --tokenizer TOK --frames f1.png f2.png f3.png --new 2 --out next.png
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

import tokenizer
from lvm import interop
from lvm.generate import Drawn, Sampling, decode, draw, encode
from lvm.model import Transformer
from tokenizer.cli import InputError, run
from tokenizer.devices import Device, pick_device
from tokenizer.files import atomic_write
from tokenizer.images import BadImage, Preprocess, encode_image, grid, read_image
from tokenizer.protocol import Tokenizer

SHEET_SIDE = 96  # pixels; smaller images are enlarged to about this on sheets


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Answer a visual prompt: example pairs and a query, or the frames of a sequence.

    One answer is written to --out itself, at the tokenizer's size. Several (--candidates, --new)
    make --out a grid, a candidate a row and a frame a column, and each answer a file of its own
    beside it: OUT-1.png … for candidates or frames, OUT-1-2.png (candidate 1, frame 2) for both.
    OUT-sheet.png always shows the prompt as the model saw it with the answers.
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Run folder of lvm.train, export of lvm.export, or Hugging Face LLaMA or Qwen3 folder."""
    tokenizer: Path
    """Tokenizer folder, the one whose codes the model was trained on."""
    pair: tyro.conf.UseAppendAction[tuple[tuple[Path, Path], ...]] = ()
    """An example: input image, output image. Give it several times, all of one task."""
    query: Path | None = None
    """Image to be answered as the pairs were. Without pairs the model has to guess the task."""
    frames: tuple[Path, ...] = ()
    """Images of a sequence in order, in place of pairs and query."""
    out: Path
    """PNG file to write."""
    new: int = 1
    """Frames to draw after --frames; past the model's row the oldest images are dropped."""
    candidates: int = 1
    """Independent answers; the first ones stay the same when more are asked for."""
    temperature: float = 1.0
    """0 takes the most likely code each time, which tends to flat pictures."""
    top_k: int = 0
    """Draw from this many most likely codes (0: all)."""
    top_p: float = 1.0
    """Draw from the most likely codes up to this probability (1: all)."""
    seed: int = 0
    preprocess: Preprocess = "squash"
    """How images become squares: squash loses the aspect ratio, crop cuts the centre."""
    device: Device = "auto"


def prompt_files(command: Prompt) -> list[Path]:
    """Return the prompt's images in the order of the sentence; refuses what makes no prompt."""
    if command.frames and (command.pair or command.query):
        raise InputError("--frames is a prompt of its own: leave --pair and --query out")
    if command.frames:
        return list(command.frames)
    if command.query is None:
        wanted = "--query is missing: which image shall be answered as the pairs were?"
        raise InputError(wanted if command.pair else "give --pair … --query, or --frames")
    if command.new != 1:
        raise InputError(f"--new {command.new} goes with --frames; a query has one answer image")
    return [*(image for pair in command.pair for image in pair), command.query]


def read_images(files: Sequence[Path], *, size: int, preprocess: Preprocess) -> np.ndarray:
    """Read images to uint8 [k, size, size, 3]; raises InputError that names all bad files."""
    images, bad = [], []
    for file in files:
        try:
            images.append(read_image(file, size=size, preprocess=preprocess))
        except BadImage as error:
            bad.append(f"{file} ({error.reason})")
    if bad:
        raise InputError(f"these images cannot be used: {', '.join(bad)}")
    return np.stack(images)


def answer(
    model: Transformer, tok: Tokenizer, images: np.ndarray, sampling: Sampling
) -> tuple[np.ndarray, Drawn]:
    """Return answers uint8 [candidates, new, H, W, 3] to images uint8 [k, H, W, 3]."""
    device = model.embed.weight.device
    floats = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255
    drawn = draw(model, encode(model, tok, floats), sampling)
    frames = decode(tok, drawn.codes.to(device)).float()
    return (frames * 255).round().byte().movedim(-3, -1).cpu().numpy(), drawn


def sheet(prompt: np.ndarray, answers: np.ndarray, *, pairs: bool) -> np.ndarray:
    """Lay the prompt and its answers out on one sheet, uint8 [H, W, 3].

    Pairs: a row a pair, then a row a candidate, query and answer. Frames: a row a candidate, the
    frames of the prompt and then its own.
    """
    scale = max(1, SHEET_SIDE // prompt.shape[1])
    if pairs:
        rows = [*prompt[:-1], *(x for a in answers for x in (prompt[-1], a[0]))]
        return grid(np.stack(rows), columns=2, scale=scale)
    rows = [np.concatenate([prompt, a]) for a in answers]
    return grid(np.concatenate(rows), columns=len(rows[0]), scale=scale)


def write_answers(out: Path, answers: np.ndarray) -> list[Path]:
    """Write answers as the help of the command says; returns the files, `out` first."""
    candidates, new = answers.shape[:2]
    if candidates * new == 1:
        _save(out, answers[0, 0])
        return [out]
    _save(out, grid(answers.reshape(-1, *answers.shape[2:]), columns=new))
    files = [out]
    for c in range(candidates):
        for f in range(new):
            places = ([c + 1] if candidates > 1 else []) + ([f + 1] if new > 1 else [])
            files.append(out.with_stem("-".join([out.stem, *map(str, places)])))
            _save(files[-1], answers[c, f])
    return files


def _save(path: Path, image: np.ndarray) -> None:
    with atomic_write(path) as file:
        file.write(encode_image(image))


def main(command: Prompt) -> None:
    files = prompt_files(command)
    sampling = Sampling(
        new=command.new,
        candidates=command.candidates,
        temperature=command.temperature,
        top_k=command.top_k,
        top_p=command.top_p,
        seed=command.seed,
    )
    if command.out.suffix.lower() != ".png":
        raise InputError(f"--out {command.out}: wanted a name that ends in .png")
    try:
        command.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {command.out}: its folder cannot be made ({error})") from error
    device = pick_device(command.device)

    tok = tokenizer.load(command.tokenizer)
    images = read_images(files, size=tok.image_size, preprocess=command.preprocess)
    model = interop.load(command.model)
    answers, drawn = answer(model.to(device), tok.to(device), images, sampling)

    written = write_answers(command.out, answers)
    written.append(command.out.with_stem(f"{command.out.stem}-sheet"))
    _save(written[-1], sheet(images, answers, pairs=not command.frames))
    for c, score in enumerate(drawn.log_likelihood.sum(-1), 1):
        print(f"candidate {c}: {-score / drawn.codes[0].numel():.3f} nats a code")
    print("wrote " + ", ".join(map(str, written)))


if __name__ == "__main__":
    run(Prompt, main, prog="python -m lvm.prompt")
