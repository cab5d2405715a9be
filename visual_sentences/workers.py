"""Who runs the units of a build: this process, or a pool of processes that end with it."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait

import torch

import tokenizer
from tokenizer.cli import CommandError
from tokenizer.encode import BulkEncoder
from visual_sentences.unit import Job, Result, Unit, run_unit


def in_process(job: Job, units: Sequence[Unit]) -> Iterator[tuple[Unit, Result]]:
    """Yield results in order, with one torch thread as in a worker, so that the bytes are equal."""
    threads = torch.get_num_threads()
    try:
        worker = Worker(job)
        for unit in units:
            yield unit, run_unit(unit, job=job, encoder=worker.encoder)
    finally:
        torch.set_num_threads(threads)


def in_pool(job: Job, units: Sequence[Unit], *, workers: int) -> Iterator[tuple[Unit, Result]]:
    """Yield results as they come; when anything goes wrong the workers are ended at once."""
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        min(workers, len(units)),
        mp_context=multiprocessing.get_context("spawn"),  # fork would copy torch's threads badly
        initializer=Worker.start,
        initargs=(job,),
    )
    try:
        futures = {pool.submit(Worker.run, unit): unit for unit in units}
        for future in as_completed(futures):
            yield futures[future], future.result()
        pool.shutdown()
    except BrokenProcessPool as error:
        raise CommandError(
            "a worker process was killed, often for want of memory; the same command goes on from "
            "what is finished, with fewer --workers or a smaller --batch if it happens again"
        ) from error
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
    """A process that runs units: one torch thread, its own encoder, gone when its parent is."""

    current: "Worker | None" = None

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(1)  # the bits of a sum may depend on how many threads shared it
        self.job = job
        self.encoder = BulkEncoder(
            tokenizer.load(job.tokenizer),
            device=job.device,
            precision=job.precision,
            batch=job.batch,
        )

    @classmethod
    def start(cls, job: Job) -> None:
        """Prepare this process; the pool calls it once in each."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
        threading.Thread(target=_die_with_parent, daemon=True).start()
        cls.current = cls(job)

    @classmethod
    def run(cls, unit: Unit) -> Result:
        assert cls.current is not None, "the pool calls start first"
        return run_unit(unit, job=cls.current.job, encoder=cls.current.encoder)


def _die_with_parent() -> None:
    """Leave no writer behind that a next run could meet."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
