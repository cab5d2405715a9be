"""One trunk probed: features, a sweep on a held-out part of training, the chosen head on all of it.

What is finished lies in OUT/parts and is not done again; a head in training in OUT/state. The
probed split is read once, at the very end: blocks, rates and decays are chosen without it.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file

from lvm.probing import knn
from lvm.probing.features import Cache, Features, Form, Streamed, size
from lvm.probing.fit import Setting, best, fit, measure, places, unusable
from lvm.probing.heads import AttentiveBank, Bank, LinearBank, read_head
from lvm.probing.settings import Kind, Result, Settings, Splits
from lvm.probing.trunk import Trunk, chosen_blocks
from tokenizer.cli import InputError
from tokenizer.files import atomic_write
from visual_sentences.augment import View

PARTS, STATE = "parts", "state"


class Experiment:
    """Probes of one trunk. `trunk(tokens)` gives it for features of all positions or pooled."""

    def __init__(
        self,
        name: str,
        trunk: Callable[[bool], Trunk],
        splits: Splits,
        settings: Settings,
        *,
        show: bool = False,
    ) -> None:
        self.name, self.trunk, self.splits = name, trunk, splits
        self.settings, self.show = settings, show
        self.windows = chosen_blocks(
            settings.blocks if trunk(False).blocks > 1 else ["last"],
            blocks=trunk(False).blocks,
            window=settings.window,
        )

    @property
    def streams(self) -> bool:
        """Whether features of all positions are computed whenever they are wanted."""
        return self.settings.stream or self.settings.augment

    def fill(self, kinds: Sequence[Kind], *, rank: int, world: int) -> None:
        """Compute this rank's part of the features that can be computed before anything is chosen;
        those of all positions are not, where their blocks are still to be searched for."""
        forms = [self._pooled()] if {"linear", "knn"} & {*kinds} or len(self.windows) > 1 else []
        if "attentive" in kinds and len(self.windows) == 1 and not self.streams:
            forms.append(self._tokens(self.windows[0]))
        for form in forms:
            for split in ("train", "val"):
                self._cache(form, split).fill(
                    batch=self.settings.batch,
                    workers=self.settings.workers,
                    rank=rank,
                    world=world,
                    show=self.show,
                )

    def run(self, kind: Kind) -> Result:
        """Return the result of a probe; from OUT/parts where it is finished."""
        path = self._part(f"{kind}.npz")
        if not path.is_file():
            result = self._knn() if kind == "knn" else self._heads(kind)
            path.parent.mkdir(parents=True, exist_ok=True)
            about = json.dumps({"chosen": result.chosen, "sweep": result.sweep})
            with atomic_write(path) as file:
                np.savez(file, top1=result.top1, top5=result.top5, about=np.array(about))
        with np.load(path) as found:
            about = json.loads(str(found["about"]))
            return Result(top1=found["top1"], top5=found["top5"], **about)

    def _knn(self) -> Result:
        memory, asked = (
            self._features(self._pooled(), "train"),
            self._features(self._pooled(), "val"),
        )
        held, train, val = self.splits.held_out, self.splits.train, self.splits.val
        sweep: list[dict[str, Any]] = []
        number = 0
        if len(self.windows) > 1:
            inside, outside = np.flatnonzero(~held), np.flatnonzero(held)
            for w, blocks in enumerate(self.windows):
                found = self._nearest(memory, memory, inside, outside, train.labels, window=w)
                sweep.append({"blocks": list(blocks), "top1": float((found < 1).mean())})
            number = max(range(len(sweep)), key=lambda w: (sweep[w]["top1"], -w))
        everyone = (np.arange(len(train)), np.arange(len(val)))
        found = self._nearest(memory, asked, *everyone, val.labels, window=number)
        return Result(
            top1=found < 1,
            top5=found < 5,
            chosen={"blocks": list(self.windows[number])},
            sweep=sweep,
        )

    def _nearest(
        self,
        memory: Features,
        asked: Features,
        known: np.ndarray,
        rows: np.ndarray,
        goal: np.ndarray,
        *,
        window: int,
    ) -> np.ndarray:
        """Return the place of the right class of images `rows` among the votes of `known`, [n]."""
        weights = self._weights()[window].to(self.settings.device)

        def pooled(features: Features, which: np.ndarray) -> torch.Tensor:
            return torch.einsum("c,bcd->bd", weights, features.batch(which))

        step = 4096
        cuts = range(0, len(known), step)
        remembered = torch.cat([pooled(memory, known[i : i + step]) for i in cuts])
        labels = torch.from_numpy(self.splits.train.labels[known]).to(remembered.device)
        found = []
        for first in range(0, len(rows), 1024):
            chosen = rows[first : first + 1024]
            votes = knn.votes(
                pooled(asked, chosen),
                remembered,
                labels,
                classes=len(self.splits.train.classes),
                k=self.settings.neighbours,
                temperature=self.settings.temperature,
            )
            found.append(places(votes, torch.from_numpy(goal[chosen]).to(votes.device)))
        return torch.cat(found).cpu().numpy()

    def _heads(self, kind: Kind) -> Result:
        """Sweep, choose, train the chosen head on all images of train, probe."""
        settings, labels = self.settings, self.splits.train.labels
        options = settings.settings
        if kind == "attentive" and settings.head is not None:
            return self._given(settings.head)
        window, number = 0, 0
        sweep: list[dict[str, Any]] = []
        if kind == "linear" or len(self.windows) > 1:
            # The blocks of the attentive probe are searched for by the linear one, whose features
            # of all windows fit a disk.
            window, number, sweep = self._sweep("linear", self.windows)
        blocks = self.windows[window]
        if kind == "attentive":
            window_sweep = sweep
            _, number, sweep = self._sweep("attentive", [blocks])
            sweep = [*window_sweep, *sweep]
        features, bank = self._learner(kind, [blocks], 1)
        everyone = np.arange(len(labels))
        state = settings.out / STATE / f"{self.name}-{kind}.pt"
        self._fit(bank, [options[number]], features, everyone, state, f"{self.name} {kind}")
        self._save(bank, kind, blocks)
        val = self.splits.val
        asked = self._features(self._form(kind, [blocks]), "val")
        found = measure(bank, asked, val.labels, np.arange(len(val)), batch=settings.batch)
        unusable(found)
        state.unlink(missing_ok=True)
        setting = options[number]
        return Result(
            top1=found.top1[0],
            top5=found.top5[0],
            chosen={"blocks": list(blocks), "rate": setting.rate, "decay": setting.decay},
            sweep=sweep,
        )

    def _given(self, path: Path) -> Result:
        """Ask a head from a file; nothing is trained."""
        head, val = read_head(path, self.trunk(True)), self.splits.val
        if head.linear.out_features != len(val.classes):
            raise InputError(
                f"{path} tells {head.linear.out_features} classes apart, and the images are of "
                f"{len(val.classes)}; wanted the split that it was trained for"
            )
        asked = self._features(self._tokens(self.windows[0]), "val")
        rows, device = np.arange(len(val)), self.settings.device
        found = measure(head.to(device), asked, val.labels, rows, batch=self.settings.batch)
        unusable(found)
        chosen = {"blocks": list(self.windows[0]), "head": str(path)}
        return Result(top1=found.top1[0], top5=found.top5[0], chosen=chosen, sweep=[])

    def _sweep(
        self, kind: Kind, windows: Sequence[tuple[int, ...]]
    ) -> tuple[int, int, list[dict[str, Any]]]:
        """Return the best window and setting, by images held out, and what all of them reached."""
        options, held = self.settings.settings, self.splits.held_out
        if len(windows) * len(options) == 1:
            return 0, 0, []
        path = self._part(f"sweep-{kind}.json")
        if not path.is_file():
            features, bank = self._learner(kind, windows, len(options))
            state = self.settings.out / STATE / f"{self.name}-sweep-{kind}.pt"
            label = f"{self.name} {kind}, {len(bank.members)} settings"
            self._fit(bank, options, features, np.flatnonzero(~held), state, label)
            centre = self._features(self._form(kind, windows), "train")
            found = measure(
                bank,
                centre,
                self.splits.train.labels,
                np.flatnonzero(held),
                batch=self.settings.batch,
            )
            unusable(found)
            lines = [
                {
                    "probe": kind,
                    "blocks": list(windows[m // len(options)]),
                    "rate": options[m % len(options)].rate,
                    "decay": options[m % len(options)].decay,
                    "top1": float(found.top1[m].mean()),
                    "loss": float(found.loss[m]) if np.isfinite(found.loss[m]) else None,
                }
                for m in range(len(bank.members))
            ]
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path, "w") as file:
                json.dump({"best": best(found), "sweep": lines}, file, indent=1)
            state.unlink(missing_ok=True)
        stored = json.loads(path.read_text(encoding="utf-8"))
        return *divmod(stored["best"], len(options)), stored["sweep"]

    def _fit(
        self,
        bank: Bank,
        options: Sequence[Setting],
        features: Features,
        rows: np.ndarray,
        state: Path,
        label: str,
    ) -> None:
        state.parent.mkdir(parents=True, exist_ok=True)
        fit(
            bank,
            options,
            features,
            self.splits.train.labels,
            rows,
            schedule=self.settings.schedule,
            state=state,
            device=self.settings.device,
            label=label,
            show=self.show,
        )

    def _learner(
        self, kind: Kind, windows: Sequence[tuple[int, ...]], settings: int
    ) -> tuple[Features, Bank]:
        """Return the features to learn from, and a bank for them."""
        form, classes = self._form(kind, windows), len(self.splits.train.classes)
        trunk = self.trunk(form.tokens)
        features = self._features(form, "train", learn=True)
        if kind == "attentive":
            return features, AttentiveBank(trunk.width, trunk.heads, classes, settings=settings)
        weights = self._weights()
        if len(windows) == 1:
            weights = weights[[self.windows.index(windows[0])]]
        return features, LinearBank(trunk.width, classes, windows=weights, settings=settings)

    def _form(self, kind: Kind, windows: Sequence[tuple[int, ...]]) -> Form:
        return self._tokens(windows[0]) if kind == "attentive" else self._pooled()

    def _pooled(self) -> Form:
        """One window's mean; or, to search, every block's."""
        sets = tuple(self.windows)
        if len(sets) > 1:
            sets = tuple((block,) for block in range(self.trunk(False).blocks))
        return Form(sets=sets, precision=self.settings.precision)

    def _tokens(self, blocks: tuple[int, ...]) -> Form:
        return Form(sets=(blocks,), tokens=True, precision=self.settings.precision)

    def _weights(self) -> torch.Tensor:
        """Return fp32 [W, C]: which mean of the pooled sets each window is."""
        if len(self.windows) == 1:
            return torch.ones(1, 1)
        weights = torch.zeros(len(self.windows), self.trunk(False).blocks)
        for w, blocks in enumerate(self.windows):
            weights[w, list(blocks)] = 1 / len(blocks)
        return weights

    def _features(
        self, form: Form, split: Literal["train", "val"], learn: bool = False
    ) -> Features:
        settings = self.settings
        random = settings.augment and learn
        if random or (self.streams and form.tokens):
            trunk = self.trunk(form.tokens)
            return Streamed(
                trunk,
                self.splits.train if split == "train" else self.splits.val,
                form,
                device=settings.device,
                batch=settings.batch,
                workers=settings.workers,
                random=View(size=trunk.image_size) if random else None,
                seed=settings.schedule.seed,
            )
        cache = self._cache(form, split)
        if self.show and cache.missing:
            print(
                f"{self.name}: {'all positions' if form.tokens else 'pooled'} of {split}, "
                f"{len(cache)} images, take {size(cache.missing_bytes)} in {cache.folder}",
                flush=True,
            )
        cache.fill(batch=settings.batch, workers=settings.workers, show=self.show)
        return cache

    def _cache(self, form: Form, split: str) -> Cache:
        return Cache(
            self.settings.cache,
            self.trunk(form.tokens),
            self.splits.train if split == "train" else self.splits.val,
            form,
            split=split,
            dtype=self.settings.dtype,
            device=self.settings.device,
        )

    def _save(self, bank: Bank, kind: Kind, blocks: tuple[int, ...]) -> None:
        """Write the head alone, under the names of Apple's released ones: head.linear.weight, …"""
        head = bank.member(0)
        path = self.settings.out / "heads" / f"{self.name}-{kind}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"head.{k}": v.detach().cpu().contiguous() for k, v in head.state_dict().items()}
        about: dict[str, Any] = {"kind": kind, "blocks": list(blocks)}
        if isinstance(bank, AttentiveBank):
            about["heads"] = bank.heads
        temporary = path.with_name(f"{path.name}.tmp-{self.name}")
        # one entry: safetensors writes several in a random order
        save_file(tensors, temporary, metadata={"probe": json.dumps(about)})
        temporary.replace(path)

    def _part(self, name: str) -> Path:
        return self.settings.out / PARTS / f"{self.name}-{name}"
