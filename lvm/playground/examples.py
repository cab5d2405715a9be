"""Prompts to start from: a folder of pictures, sentences of built data, or shapes drawn here."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lvm.playground.asked import Kind
from tokenizer.cli import InputError
from tokenizer.images import BadImage, Preprocess, list_images, read_image
from tokenizer.protocol import Tokenizer

MOST = 12  # examples of one folder, or of each kind in built data
SMOOTH = 4  # shapes are drawn this many times larger and averaged


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    name: str
    kind: Kind
    pictures: Sequence[np.ndarray]  # uint8 [size, size, 3]: x1, y1, …, query, or frames in order


def of_folder(folder: Path, *, size: int, room: int, preprocess: Preprocess) -> list[Example]:
    """Read one example of each folder in `folder`, none of more than `room` pictures.

    Pictures x1, y1, x2, y2, … and query, each with any suffix, are an analogy; any other pictures
    are frames, in natural order of their names. Raises InputError where there is none, or a bad
    one.
    """
    if not folder.is_dir():
        raise InputError(f"--examples {folder}: no such folder; wanted a folder of folders")
    examples = []
    for place in sorted(path for path in folder.iterdir() if path.is_dir())[:MOST]:
        files = list_images(place)
        if not files:
            continue
        if len(files) > room:
            raise InputError(
                f"--examples: {place} has {len(files)} pictures; this model reads at most {room} "
                "before its answer: take some away"
            )
        kind: Kind = "pairs" if any(file.stem == "query" for file in files) else "frames"
        try:
            pictures = [
                read_image(file, size=size, preprocess=preprocess)
                for file in (_in_pairs(place, files) if kind == "pairs" else files)
            ]
        except BadImage as error:
            raise InputError(f"--examples: {error}; mend the file or take it away") from error
        examples.append(Example(name=place.name, kind=kind, pictures=pictures))
    if not examples:
        raise InputError(
            f"--examples {folder} has no folder with pictures in it; wanted one folder an example"
        )
    return examples


def _in_pairs(place: Path, files: Sequence[Path]) -> list[Path]:
    """Return files in the order x1, y1, x2, y2, …, query, having checked that all are there."""
    by_name = {file.stem: file for file in files}
    wanted = [f"{letter}{i + 1}" for i in range(len(files) // 2) for letter in "xy"] + ["query"]
    if sorted(file.stem for file in files) != sorted(wanted):
        raise InputError(
            f"--examples: {place} has {', '.join(sorted(file.name for file in files))}; wanted "
            "x1 and y1, x2 and y2, … and one query, or frames without a query"
        )
    return [by_name[name] for name in wanted]


def of_data(folder: Path, tok: Tokenizer, *, room: int) -> list[Example]:
    """Decode the first sentence of each source of pairs or of frames in built shards.

    Of the split val where there is one, else of the first. `room` is the most images of a prompt.
    The last image of a sentence, the answer, is left out.
    """
    from lvm.generate import decode
    from visual_sentences.manifest import Manifest
    from visual_sentences.reading import Reader, require_codes

    manifest = Manifest.load(folder)
    require_codes(manifest, folder)
    if manifest.tokenizer and manifest.tokenizer != tok.id:
        raise InputError(
            f"--data {folder} was built with tokenizer {manifest.tokenizer[:12]}…, not with "
            f"{tok.id[:12]}…; give data of the same tokenizer, or --examples"
        )
    split = "val" if "val" in manifest.splits else manifest.splits[0]
    reader = Reader(folder, manifest, split=split, random=False)
    examples = []
    for number, (name, rows) in enumerate(manifest.rows(split).items()):
        kind = manifest.sources[number].kind
        if not rows or kind not in ("pair", "video"):
            continue
        read = reader.read(np.array([number]), np.array([0]))
        n = manifest.codes_per_image
        ends = [int(start) for start in read.starts[0] if start > 0] + [int(read.length[0])]
        codes = read.tokens[0, : ends[0]].long().view(-1, n)[:-1][-room:]
        if kind == "pair" and len(codes) % 2 == 0:  # cut to the room: a query lost its pair
            codes = codes[1:]
        if len(codes) < (3 if kind == "pair" else 1):
            continue
        pixels = (decode(tok, codes).float() * 255).round().byte().movedim(-3, -1).cpu().numpy()
        examples.append(
            Example(name=name, kind="pairs" if kind == "pair" else "frames", pictures=list(pixels))
        )
    if not examples:
        raise InputError(
            f'--data {folder} has no sentence of pairs or frames in split "{split}"; give other '
            "data, or --examples"
        )
    of_kind = [[e for e in examples if e.kind == kind][:MOST] for kind in ("pairs", "frames")]
    return of_kind[0] + of_kind[1]


def shapes(*, size: int, room: int) -> list[Example]:
    """Draw examples that need no files: three tasks on flat shapes, and a disc that moves."""
    tasks: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "negative": lambda image: 255 - image,
        "swap red and blue": lambda image: image[..., ::-1],
        "mirror": lambda image: image[:, ::-1],
    }
    pairs = max(0, min(3, (room - 1) // 2))
    examples = []
    for seed, (name, change) in enumerate(tasks.items()):
        inputs = [_shape(size, np.random.default_rng([seed, i])) for i in range(pairs + 1)]
        pictures = [
            x for image in inputs[:-1] for x in (image, np.ascontiguousarray(change(image)))
        ]
        if pairs:
            examples.append(Example(name=name, kind="pairs", pictures=[*pictures, inputs[-1]]))
    frames = list(_moving(size, min(4, max(1, room))))
    examples.append(Example(name="moving disc", kind="frames", pictures=frames))
    return examples


def _paint(
    size: int, background: np.ndarray, parts: Sequence[tuple[str, np.ndarray, float, np.ndarray]]
) -> np.ndarray:
    """Paint (form, centre, radius, colour) one over the other; lengths are parts of the side."""
    side = size * SMOOTH
    y, x = (np.mgrid[:side, :side] + 0.5) / side
    canvas = np.broadcast_to(background, (side, side, 3)).astype(np.float32)
    for form, (cy, cx), radius, colour in parts:
        dy, dx = np.abs(y - cy), np.abs(x - cx)
        inside = {
            "disc": dy**2 + dx**2 < radius**2,
            "square": np.maximum(dy, dx) < radius,
            "diamond": dy + dx < 1.2 * radius,
        }[form]
        canvas = np.where(inside[..., None], colour, canvas)
    small = canvas.reshape(size, SMOOTH, size, SMOOTH, 3).mean((1, 3))
    return np.rint(small).astype(np.uint8)


def _shape(size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw two shapes of strong colours on a dark or a light ground."""
    ground = rng.integers(20, 80, 3) + 150 * rng.integers(2)
    forms = rng.choice(["disc", "square", "diamond"], 2, replace=False)
    parts = [
        (
            str(form),
            rng.uniform(0.3, 0.7, 2),
            float(rng.uniform(0.14, 0.3)),
            rng.permutation(strong),
        )
        for form, strong in zip(forms, ([235, 60, 40], [250, 190, 30]), strict=True)
    ]
    return _paint(size, ground, parts)


def _moving(size: int, count: int) -> Iterator[np.ndarray]:
    for i in range(count):
        centre = np.array([0.35 + 0.06 * i, 0.25 + 0.12 * i])
        yield _paint(
            size, np.array([40, 60, 110]), [("disc", centre, 0.16, np.array([250, 190, 30]))]
        )
