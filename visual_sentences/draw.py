"""From an item of a source to the pictures of its passes, each a sample for the layout.

Every choice is a hash of (seed, source, stem of the item, number of the pass, what is chosen): of
no other item, so one that is added or found bad changes nothing in the rest.
"""

from collections.abc import Container, Iterator
from math import gcd

from visual_sentences.edits import joined, random_cut, random_mask
from visual_sentences.layouts import SHORTEST_CLIP
from visual_sentences.seeds import seeded
from visual_sentences.sentence import Item, Picture, Sample
from visual_sentences.spec import CLIPS, Kind, Source

FORMS = ("separate", "interleaved")  # of video with annotations


def draw(
    item: Item, *, source: Source, images_per_row: int, image_size: int, seed: int
) -> list[Sample]:
    """Return all passes of an item, numbered from 0; none for a clip with too few frames.

    kind                             passes         pictures of a pass
    image, category                  1              the image
    pair, style                      1              input, target
    colorize                         1              gray, colour
    inpaint                          1              with something hidden, whole
    annotated                        1              the image, its annotations
    video, orbit                     1 a stride     frames
    annotated_video                  2 a stride     frame, its annotations, frame, …

    `augment` copies have as many again. Copy 0 is the item as it is; each other copy has one cut, a
    crop and perhaps a flip, for all of its pictures, so that an input and its target stay aligned:

        augment = 2    x.png                       y.png
                       x.png|crop .1 0 .8 .9 flip  y.png|crop .1 0 .8 .9 flip

    Passes that would be equal are made once: a clip no longer than a row has one for all strides.
    Of clips, `item.names` are the frames: those of the first role, then those of the next.
    LVM has no augmentation; DeLVM names it, for its smallest tasks, and has not released it.
    """
    passes: dict[tuple[tuple[Picture, ...], str], None] = {}
    for copy in range(source.augment):
        cut = random_cut(seed, source.name, item.stem, "cut", copy) if copy else ""
        if source.kind in CLIPS:
            drawn = _clip(item, copy, source=source, images_per_row=images_per_row, seed=seed)
        else:
            drawn = _still(item, copy, source=source, image_size=image_size, seed=seed)
        for pictures, form in drawn:
            cut_out = tuple(Picture(one.name, joined(cut, one.edit)) for one in pictures)
            passes[cut_out, form] = None
    return [
        Sample(item.stem, pictures, item.group, number, _width(source), form)
        for number, (pictures, form) in enumerate(passes)
    ]


def clip_frames(total: int, *, stride: int, most: int, drawn: int) -> list[int]:
    """Choose evenly spaced frames of a clip, by a number drawn from [0, 2^64).

    With n = min(most, total) frames, a stride is capped at (total - 1) // (n - 1), so that every
    clip is used, and the start is uniform over what is left. LVM caps alike, and puts another clip
    in the place of one that has no n frames. 9 frames, 4 wanted, stride 2, or 5, which becomes 2:

        frames   0 1 2 3 4 5 6 7 8
        start 0  ^   ^   ^   ^
        start 1    ^   ^   ^   ^
        start 2      ^   ^   ^   ^
    """
    count = min(most, total)
    step = min(stride, (total - 1) // (count - 1))
    start = drawn % (total - (count - 1) * step)
    return [start + i * step for i in range(count)]


def orbit_views(total: int, *, stride: int, most: int, drawn: int) -> list[int]:
    """Choose views around an object, by a number drawn from [0, 2^64).

    The last view is beside the first, and the start is uniform over all views. None is shown twice:
    a stride that is soon back at the start gives fewer than `most`. 8 views, 4 wanted, start 5:

        views     0 1 2 3 4 5 6 7
        stride 1  4         1 2 3
        stride 2    3   4   1   2
        stride 4    2       1

    A stride of whole turns is read as 1. LVM's objects have 24 views, 15° apart.
    """
    step = stride % total or 1
    start = drawn % total
    return [(start + i * step) % total for i in range(min(most, total // gcd(total, step)))]


def usable(sample: Sample, good: Container[Picture], *, kind: Kind) -> Sample | None:
    """Return what is left of a sample of which only some pictures could be read.

    Of clips the bad frames are left out, with what belongs to them; two frames or more make a
    clip. Anything else is used as a whole or not at all.

        frame and annotation     f1 a1 f2 a2 f3 a3     a2 is bad
        becomes                  f1 a1       f3 a3
    """
    pictures, width = sample.pictures, sample.width
    if all(picture in good for picture in pictures):
        return sample
    if kind not in CLIPS:
        return None
    frames = [pictures[i : i + width] for i in range(0, len(pictures), width)]
    kept = [frame for frame in frames if all(picture in good for picture in frame)]
    if len(kept) < SHORTEST_CLIP:
        return None
    left = tuple(picture for frame in kept for picture in frame)
    return Sample(sample.stem, left, sample.group, sample.number, width, sample.form)


def _width(source: Source) -> int:
    return len(source.origins) if source.kind == "annotated_video" else 1


def _still(
    item: Item, copy: int, *, source: Source, image_size: int, seed: int
) -> Iterator[tuple[list[Picture], str]]:
    pictures = [Picture(name) for name in item.names]
    if source.kind == "colorize":
        pictures = [Picture(item.names[0], "gray"), *pictures]
    elif source.kind == "inpaint":
        mask = random_mask(image_size, seed, source.name, item.stem, "mask", copy)
        pictures = [Picture(item.names[0], mask), *pictures]
    yield pictures, ""


def _clip(
    item: Item, copy: int, *, source: Source, images_per_row: int, seed: int
) -> Iterator[tuple[list[Picture], str]]:
    width = _width(source)
    most, (total, rest) = images_per_row // width, divmod(len(item.names), width)
    assert not rest, f"{item.stem}: {len(item.names)} names of {width} roles"
    assert most >= SHORTEST_CLIP, f"rows of {images_per_row} images for frames of {width}"
    if total < SHORTEST_CLIP:
        return
    choose = orbit_views if source.kind == "orbit" else clip_frames
    for number, stride in enumerate(source.stride, start=copy * len(source.stride)):
        drawn = seeded(seed, source.name, item.stem, "start", number)
        frames = choose(total, stride=stride, most=most, drawn=drawn)
        names = [item.names[role * total + i] for i in frames for role in range(width)]
        for form in FORMS if source.kind == "annotated_video" else ("",):
            yield [Picture(name) for name in names], form
