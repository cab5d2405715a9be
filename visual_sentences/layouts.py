"""One function a sentence kind: samples in seeded order to sentences.

n is `images_per_row`, row_len / codes_per_image. What a sentence cannot use has been taken out
before: these functions get pictures that are read and encoded, and put each sample into exactly one
sentence. Samples are joined with others of their pass only, so that no picture stands beside its
own augmented copy.

In the drawings letters with a number are images, "|" ends a sentence, and n is 4 if not given.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from visual_sentences.seeds import seeded
from visual_sentences.sentence import Sample, Sentence
from visual_sentences.spec import Kind, Source

SHORTEST_CLIP = 2  # frames below which there is nothing to continue


class Layout(Protocol):
    """What all kinds have in common; a kind uses of the arguments what it needs."""

    def __call__(
        self, samples: Sequence[Sample], *, images_per_row: int, source: Source, seed: int
    ) -> list[Sentence]: ...


def image(
    samples: Sequence[Sample], *, images_per_row: int, source: Source, seed: int
) -> list[Sentence]:
    """Make every image its own sentence.

    Three images are three documents, packed into one row:

        x0 | x1 | x2 |

    LVM has {image, EOS} for LAION: the end of the document is ours as well, without the symbol.
    """
    return [Sentence(sample.pictures) for sample in samples]


def category(
    samples: Sequence[Sample], *, images_per_row: int, source: Source, seed: int
) -> list[Sentence]:
    """Show m = n // `classes` images of each of several classes, class by class.

    Classes a (5 images), b (4) and c (2), n = 8, classes = 2, so m = 4:

        a0 a1 a2 a3 b0 b1 b2 b3 | c0 c1 a4 |

    With classes = 1 a sentence is up to n images of one class:

        a0 a1 a2 a3 a4 | b0 b1 b2 b3 | c0 c1 |

    The classes of a sentence differ. Those with most left are taken first, which makes as many
    sentences with all their classes as there can be, and stand in random order. Where too few
    classes are left, or fewer than m images of one, the sentence is shorter.
    LVM's mixture has 1, 2 and 4 classes of ImageNet; its script, 4 × 4 images, does not run.
    """
    most = images_per_row // source.classes
    sentences = []
    for number, samples_of_pass in _passes(samples):
        key = (seed, source.name, "classes", number)
        chunks = {group: _cut(of, most) for group, of in _groups(samples_of_pass).items()}
        left = [(-len(c), seeded(*key, group, len(c)), group) for group, c in chunks.items()]
        heapq.heapify(left)
        while left:
            chosen = [heapq.heappop(left)[2] for _ in range(min(source.classes, len(left)))]
            chosen.sort(key=lambda group: seeded(*key, group, "place", len(chunks[group])))
            sentences.append(_sentence(s for group in chosen for s in chunks[group].pop(0)))
            for group in chosen:
                if count := len(chunks[group]):
                    heapq.heappush(left, (-count, seeded(*key, group, count), group))
    return sentences


def pair(
    samples: Sequence[Sample], *, images_per_row: int, source: Source, seed: int
) -> list[Sentence]:
    """Join n // 2 examples of one task, each an input and its target.

        x0 y0 x1 y1 | x2 y2 x3 y3 | x4 y4 |

    LVM: 8 pairs, several random permutations (copies here: `augment`), a rest is dropped; here the
    last sentence is shorter.
    """
    return [
        _sentence(chunk)
        for _, samples_of_pass in _passes(samples)
        for chunk in _cut(samples_of_pass, images_per_row // 2)
    ]


def colorize(
    samples: Sequence[Sample], *, images_per_row: int, source: Source, seed: int
) -> list[Sentence]:
    """Join pairs of an image without and with its colours.

        gray0 x0 gray1 x1 | gray2 x2 gray3 x3 |

    As LVM, which reads 0.2989 R + 0.587 G + 0.114 B for gray.
    """
    return pair(samples, images_per_row=images_per_row, source=source, seed=seed)


def inpaint(
    samples: Sequence[Sample], *, images_per_row: int, source: Source, seed: int
) -> list[Sentence]:
    """Join pairs of an image with something hidden and the whole image.

        hidden0 x0 hidden1 x1 | hidden2 x2 hidden3 x3 |

    What is hidden, a square or patches of a grid, is drawn for each image by itself, as LVM does.
    """
    return pair(samples, images_per_row=images_per_row, source=source, seed=seed)


def style(
    samples: Sequence[Sample], *, images_per_row: int, source: Source, seed: int
) -> list[Sentence]:
    """Join n // 2 pairs of one style: what is done to an input is the same all along a sentence.

    Styles s (pairs 0, 2, 3) and t (pairs 1, 4):

        x0 y0 x2 y2 | x3 y3 | x1 y1 x4 y4 |

    LVM has such pairs of InstructPix2Pix in the order of any others.
    """
    return [
        _sentence(chunk)
        for _, samples_of_pass in _passes(samples)
        for of_style in _groups(samples_of_pass).values()
        for chunk in _cut(of_style, images_per_row // 2)
    ]


def annotated(
    samples: Sequence[Sample], *, images_per_row: int, source: Source, seed: int
) -> list[Sentence]:
    """Join n // (1 + k) images with their k annotations; the modalities take a random order.

    The order is one for the whole sentence, drawn anew for each. Image x, depth d, edges e, n = 8:

        d0 x0 e0 d1 x1 e1 | x2 d2 e2 x3 d3 e3 | e4 d4 x4 |

    The keys in a shard record it. As LVM, which has 3 images of exactly 5 modalities, 15 in a row.
    Its paper also chooses some of the modalities at random, its code does not, nor does this: list
    a source with fewer annotations beside the one with all.
    """
    sentences = []
    for number, samples_of_pass in _passes(samples):
        each = images_per_row // len(source.origins)
        for chunk in _cut(samples_of_pass, each):
            key = (seed, source.name, "order", number, *(sample.stem for sample in chunk))
            order = sorted(range(len(source.origins)), key=lambda role: seeded(*key, role))
            pictures = [sample.pictures[role] for sample in chunk for role in order]
            sentences.append(Sentence(tuple(pictures)))
    return sentences


def video(
    samples: Sequence[Sample], *, images_per_row: int, source: Source, seed: int
) -> list[Sentence]:
    """Make the frames that were drawn from a clip one sentence.

    A clip of 9 frames, stride 2, start 1:

        frames    0 1 2 3 4 5 6 7 8
        sentence    ^   ^   ^   ^

        f1 f3 f5 f7 |

    LVM: 16 frames, strides 10, 20 and 30 (8 in its script), one pass for each.
    """
    return [Sentence(sample.pictures) for sample in samples]


def orbit(
    samples: Sequence[Sample], *, images_per_row: int, source: Source, seed: int
) -> list[Sentence]:
    """Make the views that were drawn around an object one sentence.

    8 views, stride 1, start 6; the circle is closed:

        views     0 1 2 3 4 5 6 7
        sentence  ^ ^         ^ ^

        f6 f7 f0 f1 |

    LVM: 16 of Objaverse's 24 views.
    """
    return [Sentence(sample.pictures) for sample in samples]


def annotated_video(
    samples: Sequence[Sample], *, images_per_row: int, source: Source, seed: int
) -> list[Sentence]:
    """Write each clip and its annotations twice: first all frames, and frame by frame.

    Frames f, annotations a:

        separate      f0 f1 a0 a1 |
        interleaved   f0 a0 f1 a1 |

    With n // (1 + k) frames of k annotations a sentence fits a row. LVM writes the same two forms
    with 16 frames and two clips a sentence: 64 images with one annotation, four of its rows.
    """
    sentences = []
    for sample in samples:
        pictures = sample.pictures
        if sample.form == "separate":
            roles = [pictures[role :: sample.width] for role in range(sample.width)]
            pictures = tuple(picture for of_role in roles for picture in of_role)
        sentences.append(Sentence(pictures))
    return sentences


LAYOUTS: Mapping[Kind, Layout] = {
    "image": image,
    "category": category,
    "video": video,
    "orbit": orbit,
    "pair": pair,
    "colorize": colorize,
    "inpaint": inpaint,
    "style": style,
    "annotated": annotated,
    "annotated_video": annotated_video,
}


def _passes(samples: Sequence[Sample]) -> list[tuple[int, list[Sample]]]:
    passes: dict[int, list[Sample]] = {}
    for sample in samples:
        passes.setdefault(sample.number, []).append(sample)
    return sorted(passes.items())


def _groups(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample)
    return groups


def _cut(samples: Sequence[Sample], size: int) -> list[Sequence[Sample]]:
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def _sentence(samples: Iterable[Sample]) -> Sentence:
    return Sentence(tuple(picture for sample in samples for picture in sample.pictures))
