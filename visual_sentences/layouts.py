"""One function a sentence kind: good samples in seeded order to sentences.

n is `images_per_row`, row_len / codes_per_image. A sample that cannot be used as a whole has been
taken out before; what these functions get is read and encoded.
"""

import hashlib
from collections.abc import Sequence

from visual_sentences.sentence import Sample, Sentence

SHORTEST_CLIP = 2  # frames below which there is nothing to continue


def seeded(*parts: object) -> int:
    """Return 64 bits that depend on `parts` alone: no order of work, process or machine."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def image(samples: Sequence[Sample], *, images_per_row: int) -> list[Sentence]:
    """Make every image its own sentence.

    Three images are three documents, packed into one row of n = 4:

        a | b | c | .
    """
    return [Sentence(sample.keys) for sample in samples]


def pair(samples: Sequence[Sample], *, images_per_row: int) -> list[Sentence]:
    """Join consecutive pairs into sentences of n // 2 examples of one task.

    Pairs in seeded order (x input, y target), n = 4; the last sentence of a unit may be shorter:

        x0 y0 x1 y1 | x2 y2 x3 y3 | x4 y4
    """
    each = images_per_row // 2
    groups = [samples[i : i + each] for i in range(0, len(samples), each)]
    return [Sentence(tuple(key for sample in group for key in sample.keys)) for group in groups]


def video(samples: Sequence[Sample], *, images_per_row: int) -> list[Sentence]:
    """Make the frames that were drawn from a clip one sentence, if two or more could be read.

    A clip of 9 frames, n = 4, stride 2, start 1:

        frames    0 1 2 3 4 5 6 7 8
        sentence    ^   ^   ^   ^
    """
    return [Sentence(sample.keys) for sample in samples if len(sample.keys) >= SHORTEST_CLIP]


LAYOUTS = {"image": image, "pair": pair, "video": video}


def draw_frames(
    stem: str,
    frames: Sequence[str],
    *,
    strides: Sequence[int],
    images_per_row: int,
    seed: int,
    source: str,
) -> list[Sample]:
    """Choose frames of one clip: each stride is one pass, with a seeded start.

    With N frames and n = min(images_per_row, N), a stride is capped at (N - 1) // (n - 1), so every
    clip is used, and the start is uniform over what is left. Passes that would repeat the same
    frames (a clip no longer than a row has only one) are made once.
    """
    if len(frames) < SHORTEST_CLIP:
        return []
    count = min(images_per_row, len(frames))
    longest = (len(frames) - 1) // (count - 1)
    passes: dict[tuple[str, ...], None] = {}
    for number, wanted in enumerate(strides):
        stride = min(wanted, longest)
        free = len(frames) - (count - 1) * stride
        start = seeded(seed, source, stem, "start", number) % free
        passes[tuple(frames[start + i * stride] for i in range(count))] = None
    return [Sample(stem, keys) for keys in passes]
