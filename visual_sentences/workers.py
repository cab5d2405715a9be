"""Who runs the units of a build: this process, or a pool of processes that end with it."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any

import torch

import tokenizer
from tokenizer.cli import CommandError
from tokenizer.encode import BulkEncoder
from visual_sentences.job import Job
from visual_sentences.plan import Unit
from visual_sentences.unit import Result, run_unit

LOSSES = 3  # times that the pool may break in a row without a unit being finished

Done = tuple[Unit, Result]


def in_process(job: Job, units: Sequence[Unit]) -> Iterator[Done]:
    """Yield results in order, with one torch thread as in a worker, so that the bytes are equal."""
    threads = torch.get_num_threads()
    try:
        worker = Worker(job)
        for unit in units:
            yield unit, worker.run(unit)
    finally:
        torch.set_num_threads(threads)


def in_pool(
    job: Job, units: Sequence[Unit], *, workers: int, log: Callable[[str], None]
) -> Iterator[Done]:
    """Yield results as they come. A killed worker takes its pool along; another goes on.

    Raises CommandError when workers are killed again and again and nothing is finished.
    """
    left = {unit.name: unit for unit in units}
    losses = 0
    while left:
        try:
            for unit, result in _in_one_pool(job, list(left.values()), workers=workers):
                del left[unit.name]
                losses = 0
                yield unit, result
        except BrokenProcessPool as error:
            losses += 1
            if losses == LOSSES:
                raise CommandError(
                    f"a worker process was killed {LOSSES} times before anything was finished, "
                    "often for want of memory; the same command goes on from what is finished, "
                    "with fewer --workers or a smaller --batch"
                ) from error
            log("a worker process was killed; what it was at is done again")


def _in_one_pool(job: Job, units: Sequence[Unit], *, workers: int) -> Iterator[Done]:
    """Yield results as they come; when anything goes wrong the workers are ended at once."""
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # fork would copy torch's threads badly
    pool = ProcessPoolExecutor(
        min(workers, len(units)),
        mp_context=context,
        initializer=Worker.start,
        initargs=(job, context.Value("i", 0)),
    )
    try:
        futures = {pool.submit(Worker.run_here, unit): unit for unit in units}
        for future in as_completed(futures):
            yield futures[future], future.result()
        pool.shutdown()
    finally:
        for child in set(multiprocessing.active_children()) - others:
            child.kill()
        pool.shutdown(cancel_futures=True)


def cores() -> int:
    """Return how many processes this one may keep busy."""
    if hasattr(os, "sched_getaffinity"):  # what a Slurm job may use, not what the machine has
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Worker:
    """A process that runs units: one torch thread, its own encoder, gone when its parent is.

    `number` chooses the GPU where there are several.
    """

    current: "Worker | None" = None
    prepared: tuple[Job, int] | None = None

    def __init__(self, job: Job, *, number: int = 0) -> None:
        torch.set_num_threads(1)  # the bits of a sum may depend on how many threads shared it
        self.job = job
        self.encoder: BulkEncoder | None = None
        if job.form == "codes":
            several = job.device == "cuda" and torch.cuda.device_count() > 1
            self.encoder = BulkEncoder(
                tokenizer.load(job.tokenizer),
                device=f"cuda:{number % torch.cuda.device_count()}" if several else job.device,
                precision=job.precision,
                batch=job.batch,
            )

    def run(self, unit: Unit) -> Result:
        return run_unit(unit, job=self.job, encoder=self.encoder)

    @classmethod
    def start(cls, job: Job, count: Any) -> None:
        """Prepare this process; the pool calls it once in each. `count` counts the processes."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
        threading.Thread(target=_die_with_parent, daemon=True).start()
        with count.get_lock():
            number = count.value
            count.value += 1
        cls.prepared = (job, number)

    @classmethod
    def run_here(cls, unit: Unit) -> Result:
        if cls.current is None:  # not in `start`, whose errors would look like a killed process
            assert cls.prepared is not None, "the pool calls start first"
            job, number = cls.prepared
            cls.current = cls(job, number=number)
        return cls.current.run(unit)


def _die_with_parent() -> None:
    """Leave no writer behind that a next run could meet."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
