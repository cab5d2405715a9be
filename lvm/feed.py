"""Where a run's batches come from: shards of codes, or shards of images.

Both kinds of feed have the same methods, so that the trainer knows of neither.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from lvm.config import Patches, Reads, Run
from lvm.learner import refuse_leaks
from lvm.patch_learner import refuse_sight
from tokenizer.world import World
from visual_sentences.batch import Batch
from visual_sentences.image_loader import (
    Cut,
    ImageLoader,
    Images,
    View,
    held_out_images,
    require_images,
)
from visual_sentences.loader import Loader, held_out
from visual_sentences.manifest import Manifest
from visual_sentences.pack import Rows, pack
from visual_sentences.reading import require_codes


class CodeFeed:
    """Visual sentences of codes, packed on the device."""

    def __init__(self, run: Run, manifest: Manifest, world: World) -> None:
        self.run, self.manifest, self.world = run, manifest, world
        self.row_len = manifest.row_len

    def rows(self, start: int) -> Iterable[Rows]:
        """Return this rank's rows, a step an item, from sample `start` on."""
        run, world = self.run, self.world
        return Loader(
            run.data,
            batch_rows=run.batch_rows,
            rank=world.rank,
            world=world.size,
            start=start,
            seed=run.seed,
            workers=run.workers,
            mix=run.mix,
        )

    def held_out(self) -> Iterator[Rows]:
        """Yield this rank's rows of a validation, a micro-batch an item."""
        run, world = self.run, self.world
        return held_out(
            run.data,
            rows=run.eval_rows,
            micro_rows=run.micro_rows,
            rank=world.rank,
            world=world.size,
        )

    def batch(self, rows: Rows) -> Batch:
        """Pack on the device; a GPU fetches the rows while it computes what was asked before."""
        if self.world.device.type == "cuda":
            rows = rows.pin_memory()
        return pack(
            rows.to(self.world.device, non_blocking=True),
            layout=self.run.layout,
            vocab=self.manifest.vocab,
            whole_rows=self.run.whole_rows,
        )

    def check(self, batch: Batch) -> None:
        """Refuse a batch in which a position may read its own label."""
        refuse_leaks(batch.split(self.run.micro_rows)[0])

    def describe(self, out: Path) -> None:
        """Write beside the run what its model reads."""
        manifest = self.manifest
        Reads(
            layout=self.run.layout,
            codes=manifest.codebook_size,
            codes_per_image=manifest.codes_per_image,
            row_len=manifest.row_len,
            image_size=manifest.image_size,
            tokenizer=manifest.tokenizer,
            whole_rows=self.run.whole_rows,
        ).save(out)


class ImageFeed:
    """Images, cut and coloured at random by the workers that decode them."""

    def __init__(self, run: Run, patches: Patches, manifest: Manifest, world: World) -> None:
        self.run, self.patches, self.world = run, patches, world
        self.row_len = patches.count
        self.cut = Cut(
            view=View(
                size=patches.image_size,
                least_crop=patches.least_crop,
                flip=patches.flip,
                jitter=patches.jitter,
                jitter_chance=patches.jitter_chance,
            ),
            places=patches.count,
            step=patches.step,
            prefix=patches.prefix,
        )

    def rows(self, start: int) -> Iterable[Images]:
        """Return this rank's images, a step an item, from sample `start` on."""
        run, world = self.run, self.world
        return ImageLoader(
            run.data,
            cut=self.cut,
            batch_rows=run.batch_rows,
            rank=world.rank,
            world=world.size,
            start=start,
            seed=run.seed,
            workers=run.workers,
            mix=run.mix,
        )

    def held_out(self) -> Iterator[Images]:
        """Yield this rank's images of a validation, a micro-batch an item."""
        run, world = self.run, self.world
        return held_out_images(
            run.data,
            cut=self.cut,
            rows=run.eval_rows,
            micro_rows=run.micro_rows,
            rank=world.rank,
            world=world.size,
        )

    def batch(self, rows: Images) -> Images:
        if self.world.device.type == "cuda":
            rows = rows.pin_memory()
        return rows.to(self.world.device, non_blocking=True)

    def check(self, batch: Images) -> None:
        """Refuse a batch in which a place may read the patch that it predicts."""
        refuse_sight(batch.split(self.run.micro_rows)[0], self.patches)

    def describe(self, out: Path) -> None:
        """Nothing more is to be written: what the model reads is a part of its config."""


class Feed(Protocol):
    """What the trainer asks of either."""

    row_len: int  # positions of a row, or patches of an image

    def rows(self, start: int) -> Iterable[Any]: ...

    def held_out(self) -> Iterator[Any]: ...

    def batch(self, rows: Any) -> Any: ...

    def check(self, batch: Any) -> None: ...

    def describe(self, out: Path) -> None: ...


def feed_of(run: Run, manifest: Manifest, world: World) -> Feed:
    """Return the feed of a run; raises InputError where the data are of the other form."""
    if run.patches is None:
        require_codes(manifest, run.data)
        return CodeFeed(run, manifest, world)
    require_images(manifest, run.data)
    return ImageFeed(run, run.patches, manifest, world)
