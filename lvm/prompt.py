"""Ask a model with pictures: an analogy, several tasks at once, the next frames, the rest of one.

    python -m lvm.prompt MODEL --tokenizer TOK --pair x1.png y1.png --pair x2.png y2.png \\
        --query q.png --out answer.png
    python -m lvm.prompt MODEL --tokenizer TOK --frames walk.gif --stride 2 --new 4 --out next.gif
    python -m lvm.prompt MODEL --tokenizer TOK --image photo.png --keep 0.5 --out whole.png
    python -m lvm.prompt MODEL --tokenizer TOK --batch prompts.jsonl --out answers

Importing this loads no torch, so that --help and a mistyped option are answered at once.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from tokenizer.cli import InputError, run
from tokenizer.devices import Device
from tokenizer.images import Preprocess

if TYPE_CHECKING:
    from lvm.config import Reads
    from lvm.generate import Sampling
    from lvm.prompting.prompts import Plan
    from tokenizer.vqgan import VQGAN


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Answer a visual prompt: examples and a query, a sequence, the upper part of an image.

    One answer is written to --out itself, at the tokenizer's size. Several (--candidates, --new)
    make --out a grid, a candidate a row and a frame a column, and each answer a file of its own
    beside it: OUT-1.png … for candidates or frames, OUT-1-2.png (candidate 1, frame 2) for both.
    OUT-sheet.png always shows the prompt as the model saw it with the answers. docs/prompting.md
    has an example of each kind of prompt.
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Run folder of lvm.train, export of lvm.export, or Hugging Face LLaMA or Qwen3 folder."""
    tokenizer: Path
    """Tokenizer folder, the one whose codes the model was trained on."""
    out: Path
    """File to write: .png, .jpg or .webp; .gif or .mp4 show prompt and answers as an animation, and
    the images are written beside it as PNG. With --batch a folder."""

    pair: tyro.conf.UseAppendAction[tuple[tuple[Path, Path], ...]] = ()
    """An example: input image, output image. Give it several times, all of one task."""
    example: tyro.conf.UseAppendAction[tuple[tuple[Path, ...], ...]] = ()
    """An example of more than two images, as an image, its depth and its edges: all after the query
    are drawn, each with those before it in view. Give it several times, in one order."""
    query: tuple[Path, ...] = ()
    """Image to be answered as the examples were; with --example also several, the first of a
    further example. Without examples the model has to guess the task."""
    frames: tuple[Path, ...] = ()
    """A sequence in place of examples and query: images in order, or one folder of images, file of
    video (extra `video`) or GIF, of which the last frames are taken."""
    stride: int = 1
    """Take every so-manieth frame of a folder, video or GIF, the last included."""
    count: int | None = None
    """Take so many frames of it (default: as many as leave room for the answers)."""
    image: Path | None = None
    """Image whose upper part (--keep) is the beginning of the first answer; alone, or with any of
    the prompts above. What is below is never shown to the model."""
    keep: float = 0.5
    """Part of the height of --image that is kept, rounded to whole rows of codes."""

    batch: Path | None = None
    """JSONL file of many prompts, a line each: {"input": [paths], "output": path} and, where known,
    "target": path. Runs on many devices under torchrun; a killed run goes on."""
    root: Path | None = None
    """With --batch: the folder that its paths start from (default: that of the file)."""
    anywhere: bool = False
    """With --batch: let paths be absolute, or leave --root and --out. Only for files you trust."""
    batch_size: int = 8
    """With --batch: prompts drawn at once, each with all its candidates."""

    new: int | None = None
    """Images to draw (default: 1, or what an example has after the query). Past the model's row the
    oldest images are dropped."""
    candidates: int = 1
    """Independent answers; the first ones stay the same when more are asked for."""
    rank: Literal["likelihood", "gain"] | None = None
    """Put the best candidate first: the likeliest after the prompt, which tends to flat pictures;
    or the one that the prompt has made likelier most (gain)."""
    temperature: float = 1.0
    """0 takes the most likely code each time, which tends to flat pictures."""
    top_k: int = 0
    """Draw from this many most likely codes (0: all)."""
    top_p: float = 1.0
    """Draw from the most likely codes up to this probability (1: all)."""
    min_p: float = 0.0
    """Draw from codes at least this many times as likely as the likeliest (0: all)."""
    guidance: float = 1.0
    """Push away from what would be drawn without the examples: logits = bare + guidance · (full -
    bare). 1 is off; above it costs a second pass."""
    seed: int = 0
    preprocess: Preprocess = "squash"
    """How images become squares: squash loses the aspect ratio, crop cuts the centre."""
    fps: float = 4.0
    """Frames a second of a GIF or MP4 that is written."""
    device: Device = "auto"


def sampling_of(command: Prompt, *, new: int, bare: int) -> "Sampling":
    from lvm.generate import Sampling

    return Sampling(
        new=new,
        candidates=command.candidates,
        temperature=command.temperature,
        top_k=command.top_k,
        top_p=command.top_p,
        min_p=command.min_p,
        seed=command.seed,
        guidance=command.guidance,
        bare=bare,
    )


def look(command: Prompt) -> tuple["Reads", "VQGAN"]:
    """Return what the model reads, and the tokenizer, having checked that it is the model's: before
    gigabytes of weights are read."""
    import tokenizer
    from lvm import interop
    from lvm.config import Reads
    from lvm.generate import check_tokenizer, reads_of

    found = interop.read_json(command.model / interop.CONFIG)
    try:
        reads = None if found.get("patches") else Reads.load(command.model)
    except (TypeError, ValueError):
        reads = None
    if reads is None:  # of pixels, or with a damaged lvm.json: `load` says so
        reads = reads_of(interop.load(command.model))
    tok = tokenizer.load(command.tokenizer)
    check_tokenizer(reads, tok)
    return reads, tok


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder}: this folder cannot be made ({error})") from error


def check_batch(command: Prompt) -> None:
    """Refuse options that do not go with --batch, and what makes no batch."""
    single = {
        "--pair": command.pair,
        "--example": command.example,
        "--query": command.query,
        "--frames": command.frames,
        "--count": command.count,
        "--image": command.image,
    }
    if given := [name for name, value in single.items() if value]:
        raise InputError(f"--batch has its prompts in a file: leave {', '.join(given)} out")
    if command.batch_size < 1:
        raise InputError(f"--batch-size {command.batch_size}: wanted at least 1")


def main(command: Prompt) -> int:
    if command.batch is not None:
        from lvm.prompting.batch import run_batch

        return run_batch(command)

    from lvm.prompting import prompts

    if (command.root, command.anywhere) != (None, False):
        raise InputError("--root and --anywhere go with --batch")
    plan = prompts.plan(
        pairs=command.pair,
        examples=command.example,
        query=command.query,
        sequence=command.frames,
        new=command.new,
        part=command.image,
        keep=command.keep,
        stride=command.stride,
        count=command.count,
    )
    one(command, plan)
    return 0


def one(command: Prompt, plan: "Plan") -> None:
    """Answer one prompt and write the files."""
    import torch

    from lvm import interop
    from lvm.generate import check_prompt
    from lvm.prompting import answers, frames, prompts
    from tokenizer.devices import pick_device

    suffix, images_out = command.out.suffix.lower(), command.out
    if suffix in frames.WRITTEN:
        images_out = command.out.with_suffix(".png")
    elif suffix not in answers.IMAGE_FORMATS:
        wanted = ", ".join([*answers.IMAGE_FORMATS, *frames.WRITTEN])
        raise InputError(f"--out {command.out}: wanted a name that ends in one of {wanted}")
    if not 0 < command.fps <= 60:
        raise InputError(f"--fps {command.fps}: wanted more than 0, at most 60")
    if suffix == ".mp4":
        frames.require_video(command.out)
    sampling = sampling_of(command, new=plan.new, bare=plan.bare)
    make_folder(command.out.parent)
    device = pick_device(command.device)

    reads, tok = look(command)
    question = prompts.read(
        plan,
        size=tok.image_size,
        codes_per_image=reads.codes_per_image,
        room=reads.images_per_row,
        preprocess=command.preprocess,
    )
    check_prompt(reads, torch.zeros(1, len(question.images), reads.codes_per_image).long())
    if plan.width and len(plan.files) < plan.width and plan.part is None:
        print("note: without an example the model has to guess the task", file=sys.stderr)
    model = interop.load(command.model).to(device)
    pictures, found = answers.answer_question(
        model, tok.to(device), question, sampling, by=command.rank
    )

    written = answers.write_answers(images_out, pictures)
    written.append(images_out.with_name(f"{images_out.stem}-sheet.png"))
    answers.write_image(written[-1], answers.sheet(question, pictures))
    if suffix in frames.WRITTEN:
        frames.write_frames(command.out, answers.animation(question, pictures), fps=command.fps)
        written.insert(0, command.out)
    for place, (nats, number) in enumerate(zip(found.nats, found.order, strict=True), 1):
        drawn = "" if command.rank is None else f" (drawn as {number + 1})"
        print(f"candidate {place}{drawn}: {nats:.3f} nats a code")
    print("wrote " + ", ".join(map(str, written)))


if __name__ == "__main__":
    run(Prompt, main, prog="python -m lvm.prompt")
