"""Train a model on visual sentences: `python -m lvm.train RECIPE --data DIR --out RUN`.

One loop for a laptop, one GPU and many. A run folder holds

    config.json        the run, with every value resolved
    lvm.json           what the model reads: layout, codes, specials, tokenizer
    environment.json   code, packages, command and hardware of each start
    metrics.jsonl      see lvm.metrics
    checkpoints/       and `latest`, the name of the newest: see lvm.checkpoint
    DONE               the summary, once the run is finished

The same command goes on where a run was stopped: the weights, optimiser and place in the data are
those of its latest checkpoint, so at the same number of ranks it ends bit by bit where it would
have ended undisturbed. SIGTERM, SIGUSR1 and SIGINT finish the update, save and exit with code 0.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lvm import checkpoint, metrics, optim, parallel, stability
from lvm.checkpoint import Trainer
from lvm.config import Run
from lvm.dashboards import sinks
from lvm.feed import feed_of
from lvm.learner import Learner, backward, make_learner
from lvm.recipes import recipe, recipes
from lvm.run_folder import close_folder, finished, open_folder, resolve, standing, summary
from lvm.teacher import guide_of
from lvm.trace import Trace
from tokenizer.cli import CommandError, InputError, Progress, guarded
from tokenizer.cli import run as run_command
from tokenizer.world import Signals, World
from tokenizer.world import world as open_world
from visual_sentences.manifest import Manifest

PROG = "python -m lvm.train"


class Training:
    """One start of a run: model, data and optimiser as its last checkpoint left them."""

    def __init__(
        self, run: Run, trainer: Trainer, folder: Path | None, *, manifest: Manifest, world: World
    ) -> None:
        self.run, self.trainer, self.manifest, self.world = run, trainer, manifest, world
        self.out = Path(run.out)
        self.first = self.saved = trainer.step
        self.readers = world  # of ranks that share the work on the same rows, only one counts
        self.prepare(folder)
        self.feed = feed_of(run, manifest, self.readers)
        self.guide = guide_of(run, manifest, world)
        if self.guide is not None and isinstance(self.learner, Learner):
            self.learner.guide, self.learner.distil = self.guide, run.distil
        self.saver = checkpoint.Saver(
            self.out, world, keep=run.keep, background=run.save_in_background
        )
        self.log = metrics.Log(
            self.out / "metrics.jsonl",
            step=trainer.step,
            enabled=world.main,
            sinks=sinks(run, step=trainer.step) if world.main else (),
        )
        self.window = metrics.Window(world.device)
        self.began = time.perf_counter() - trainer.elapsed
        self.factor, self.norm = 0.0, torch.zeros(())
        self.progress = Progress(
            "train",
            total=run.steps,
            unit="updates",
            done=trainer.step,
            seconds=run.seconds - trainer.elapsed if run.seconds else None,
            enabled=world.main,
        )

    def prepare(self, folder: Path | None) -> None:
        """Make the learner and its optimisers, as the checkpoint in `folder` left them or anew."""
        run, world = self.run, self.world
        self.learner = make_learner(run)
        parallel.parallelize(
            self.learner,
            self.learner.blocks,
            world,
            precision=run.precision,
            recompute=run.recompute,
            compiled=run.compile,
            shards=run.shards,
        )
        if folder is None:
            parallel.initialise(self.learner, run.seed)
        self.parameters = list(self.learner.parameters())
        self.optimisers = optim.optimisers(self.learner, run.optim)
        if folder is not None:
            checkpoint.load(folder, model=self.learner, optimisers=self.optimisers, world=world)

    def go(self, signals: Signals) -> None:
        """Train until the run is finished or a rank has been told to stop, and save."""
        run, stream = self.run, iter(self.feed.rows(self.trainer.samples))
        dog = stability.Watchdog(self.out, rank=self.world.rank, seconds=run.hang_seconds)
        recorded = run.trace_updates if self.world.main else 0
        trace = Trace(self.out, first=run.trace_from, count=recorded)
        with self.progress, dog:
            while not finished(run, self.trainer):
                dog.beat(self.trainer.step)
                trace.at(self.trainer.step)
                # One small sum over the hosts, so that all ranks stop and schedule alike.
                clock = time.perf_counter() - self.began if self.world.main else 0.0
                told, elapsed = self.world.add(bool(signals.seen), clock)
                self.trainer = replace(self.trainer, elapsed=elapsed)
                if told or finished(run, self.trainer):
                    break
                self.update(stream)
                self.progress.update(1)
                step = self.trainer.step
                saves, evaluates = step % run.save_every == 0, _due(step, run.eval_every)
                if saves or step % run.log_every == 0:
                    self.report()  # before a save, so that none holds a loss that is not finite
                paused = time.perf_counter()
                if evaluates:
                    self.validate()
                if saves:
                    self.save()
                self.window.pause(time.perf_counter() - paused)
            trace.close()
            self.report()
            if self.trainer.step != self.saved:
                self.save()
            self.saver.finish()

    def update(self, stream: Iterator[Any]) -> None:
        """Take one batch and make one update; waits for the device only with a `spike_limit`."""
        run, trainer = self.run, self.trainer
        clock = self.window.clock
        clock.mark("")
        asked = time.perf_counter()
        rows = next(stream)
        waited = time.perf_counter() - asked
        batch = self.feed.batch(rows)
        if self.guide is not None:
            batch = self.guide.attach(batch, rows)
        if trainer.step == self.first:
            self.feed.check(batch)
        clock.mark("data")
        horizon = optim.horizon(
            trainer.step, steps=run.steps, elapsed=trainer.elapsed, seconds=run.seconds
        )
        self.factor = optim.rate(trainer.step, run.optim, horizon=horizon)
        optim.set_rate(self.optimisers, self.factor)
        sums = backward(self.learner, batch, run=run, world=self.world)
        clock.mark("model")
        self.norm = optim.clip(self.parameters, run.optim.clip)
        tokens = batch.tokens * self.world.size
        self.trainer = replace(
            trainer,
            step=trainer.step + 1,
            samples=trainer.samples + run.batch_rows,
            tokens=trainer.tokens + tokens,
        )
        if not self.left_out():
            for optimiser in self.optimisers:
                optimiser.step()
            self.window.add(sums, step=trainer.step, tokens=tokens, waited=waited)
        for optimiser in self.optimisers:
            optimiser.zero_grad()
        clock.mark("optimiser")

    def left_out(self) -> bool:
        """Say whether the update with the gradient of norm `self.norm` is not made; count it.

        Raises CommandError after `max_skips` in a row.
        """
        run, trainer = self.run, self.trainer
        if not run.spike_limit:
            return False
        norm = self.world.share(float(self.norm))  # no rank may judge by another last bit
        why = stability.judge(norm, trainer.norms, limit=run.spike_limit)
        if not why:
            norms = stability.remember(norm, trainer.norms)
            self.trainer = replace(trainer, norms=norms, in_a_row=0)
            return False
        first = trainer.samples - run.batch_rows
        self.log.write({
            "step": trainer.step,
            "split": "skip",
            "why": why,
            "samples": [first, trainer.samples - 1],
            "grad_norm": norm if math.isfinite(norm) else None,
        })  # fmt: skip
        self.trainer = replace(trainer, skipped=trainer.skipped + 1, in_a_row=trainer.in_a_row + 1)
        if self.trainer.in_a_row > run.max_skips:
            raise CommandError(
                f"{self.trainer.in_a_row} updates in a row are left out, the last, {trainer.step} "
                f"(samples {first} to {trainer.samples - 1}), since {why}. The last checkpoint is "
                "from before; try a lower --optim.lr or --optim.muon-lr, or look at these samples"
            )
        return True

    def report(self) -> None:
        """Write a line on the updates since the last one, if any; waits for the device."""
        if not self.window.sums:
            return
        trainer = self.trainer
        learner = self.learner
        values = self.window.close(
            self.world, batch_rows=self.run.batch_rows, measures=learner.measures
        )
        speed = values["tokens_per_s"]
        values |= metrics.utilisation(
            learner.flops_per_token, self.world, tokens_per_s=speed, row_len=self.feed.row_len
        )
        self.log.write({
            "step": trainer.step,
            "split": "train",
            "samples": trainer.samples,
            "tokens": trainer.tokens,
            **values,
            "lr": self.run.optim.lr * self.factor,
            "grad_norm": float(self.norm),
            "skipped": trainer.skipped,
            "memory_gib": metrics.memory_gib(self.world),
            "elapsed": time.perf_counter() - self.began,
        })  # fmt: skip
        shown = {key: values[key] for key in ("loss", "perplexity") if key in values}
        self.progress.update(0, **shown, **{"tokens/s": round(speed)})
        self.window = metrics.Window(self.world.device)

    @torch.no_grad()
    def validate(self) -> None:
        """Write a line on rows of the split `val`, the same ones every time, also by source and
        by kind."""
        run, world, sources = self.run, self.world, self.manifest.sources
        totals = torch.zeros(3, len(sources), device=world.device)
        for rows in self.feed.held_out():
            with parallel.compute(world, precision=run.precision):
                batch = self.feed.batch(rows)
                sums = self.learner(batch, batch.source.long(), len(sources))
            totals += torch.stack([sums.nll, sums.correct, sums.count])
        parallel.reshard(self.learner)
        found = world.total(totals).double().cpu().T
        kinds = sorted({source.kind for source in sources})
        groups = {
            "by_kind": {k: [s.kind == k for s in sources] for k in kinds},
            "by_source": {s.name: [s is other for other in sources] for s in sources},
        }
        measures = self.learner.measures
        apart: dict[str, Any] = {}
        for name, parts in groups.items():
            sums_of = {part: found[torch.tensor(chosen)].sum(0) for part, chosen in parts.items()}
            apart[name] = {k: measures(*sums.tolist()) for k, sums in sums_of.items() if sums[2]}
        values = measures(*found.sum(0).tolist())
        self.log.write({"step": self.trainer.step, "split": "val", **values, **apart})
        self.progress.update(0, val=values["perplexity" if "perplexity" in values else "distance"])

    def save(self) -> None:
        self.saver.save(self.trainer, model=self.learner, optimisers=self.optimisers)
        self.saved = self.trainer.step


def train(run: Run) -> int:
    """Start or continue a run; returns the exit code. Raises InputError and CommandError."""
    require_folders(run)
    with Signals() as signals, open_world(run.device) as world:
        return carry_on(run, world=world, signals=signals)


def require_folders(run: Run) -> None:
    """Raise InputError where a run was given no data or no folder of its own."""
    if missing := [f"--{name}" for name in ("data", "out") if not getattr(run, name)]:
        raise InputError(
            f"{' and '.join(missing)} missing; wanted --data DIR, a folder made by "
            "`python -m visual_sentences.build`, and --out RUN, the folder of this run"
        )


def carry_on(
    run: Run,
    *,
    world: World,
    signals: Signals,
    readers: World | None = None,
    make: Callable[..., Training] = Training,
) -> int:
    """Take a run from where it stands to its end, or until told to stop; every rank calls.

    `readers` are the ranks that read different rows, where not all do, and `make` the training.
    """
    manifest = Manifest.load(run.data)
    run = resolve(run, manifest, readers or world)
    folder = world.share(checkpoint.latest(Path(run.out)))
    trainer = standing(run, manifest, folder)
    world.wait()  # nobody writes before everybody has looked
    text = f"{run.out} is finished"
    if not finished(run, trainer):
        parallel.set_deterministic(run.deterministic)
        if world.main:
            open_folder(run, metrics.environment(world, step=trainer.step))
            feed_of(run, manifest, world).describe(Path(run.out))
        training = make(run, trainer, folder, manifest=manifest, world=world)
        try:
            training.go(signals)
        except CommandError:  # every rank raises it, so every rank can wait for the save
            training.saver.finish()
            raise
        trainer = training.trainer
        text = "done" if finished(run, trainer) else "told to stop; the same command goes on"
    if world.main:
        if finished(run, trainer):
            close_folder(run, trainer)
        print(f"{text}: {summary(run, trainer)}", flush=True)
    return 0


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def main(args: Sequence[str]) -> int:
    """Read a recipe's name, then the values that replace its own."""
    names = ", ".join(recipes())
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(
            f"usage: {PROG} RECIPE --data DIR --out RUN [--steps N] [--optim.lr X] …\n\n"
            f"Recipes: {names}; or your own function as package.module.name.\n"
            f"`{PROG} RECIPE --help` lists every value of a recipe and what it means.\n"
        )
        return 0 if args else 2
    if args[0].startswith("-"):
        raise InputError(f"{args[0]} stands where the recipe's name is wanted, one of {names}")
    run_command(Run, train, prog=f"{PROG} {args[0]}", default=recipe(args[0]), args=args[1:])
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:]), prog=PROG))
