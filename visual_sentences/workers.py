"""Who runs the units of a build: this process, or a pool of processes that end with it."""

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

import tokenizer
from tokenizer.cli import CommandError
from tokenizer.encode import BulkEncoder
from visual_sentences.job import Job
from visual_sentences.plan import Unit
from visual_sentences.unit import Result, run_unit

LOSSES = 3  # processes that may be killed in a row without a unit being finished
AT_HAND = 2  # units that a process has, so that it never waits for the next

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
    """Yield results as they come. Another process does what a killed one was at.

    Raises what a unit raised; CommandError when processes are killed again and again and nothing is
    finished. However this ends, all processes have ended too.
    """
    hands = [Hand(job, number) for number in range(min(workers, len(units)))]
    left = deque(units)
    losses = 0
    try:
        while left or any(hand.units for hand in hands):
            _share(left, hands)
            for hand in _ready(hands):
                try:
                    done = hand.take()
                except Lost as error:
                    losses += 1
                    if losses == LOSSES:
                        raise CommandError(
                            f"a worker process was killed {LOSSES} times before anything was "
                            "finished, often for want of memory; the same command goes on from "
                            "what is finished, with fewer --workers or a smaller --batch"
                        ) from error
                    log("a worker process was killed; what it was at is done again")
                    left.extend(hand.dismiss())  # last: what kills one may do so again
                    break
                losses = 0
                yield done
    finally:
        for hand in hands:
            hand.dismiss()


def _share(left: deque[Unit], hands: Sequence["Hand"]) -> None:
    """Give every process a unit, and then the next, so that none waits for it."""
    for wanted in range(1, AT_HAND + 1):
        for hand in hands:
            if left and len(hand.units) < wanted:
                hand.give(left.popleft())


def _ready(hands: Sequence["Hand"]) -> list["Hand"]:
    """Wait for processes that have a result, or are no more."""
    by_pipe = {hand.pipe: hand for hand in hands if hand.units}
    return [by_pipe[pipe] for pipe in wait(list(by_pipe))]  # type: ignore[index]


class Lost(Exception):
    """A worker process has been killed."""


class Hand:
    """A process that does units, in the order given; it starts with the first.

    One pipe and no threads: nothing is shared with other processes, so that the end of one stops
    nothing but what it was at.
    """

    def __init__(self, job: Job, number: int) -> None:
        self.job, self.number = job, number
        self.units = deque[Unit]()
        self.process: Any = None
        self.pipe, self.other = multiprocessing.Pipe()

    def give(self, unit: Unit) -> None:
        self.units.append(unit)
        with suppress(ConnectionError):  # it was killed, as `take` will find
            if self.process is None:
                self._start()
            self.pipe.send(unit)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # fork would copy torch's threads badly
        self.process = context.Process(
            target=Worker.serve, args=(self.job, self.number, self.other), daemon=True
        )
        try:
            self.process.start()
        finally:
            self.other.close()  # so that the pipe ends with the process

    def take(self) -> Done:
        """Return the next result; raises what the unit raised, or Lost."""
        try:
            result = self.pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise Lost from error
        if isinstance(result, BaseException):
            raise result
        return self.units.popleft(), result

    def dismiss(self) -> list[Unit]:
        """End the process; returns the units that it has not finished. It may be given others."""
        if self.process is not None and self.process.pid is not None:
            self.process.kill()
            self.process.join()
        self.pipe.close()
        self.other.close()
        left = list(self.units)
        Hand.__init__(self, self.job, self.number)
        return left


def cores() -> int:
    """Return how many processes this one may keep busy."""
    if hasattr(os, "sched_getaffinity"):  # what a Slurm job may use, not what the machine has
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Worker:
    """A process that runs units: one torch thread, its own encoder, gone when its parent is.

    `number` chooses the GPU where there are several.
    """

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
    def serve(cls, job: Job, number: int, pipe: Connection) -> None:
        """Run the units that come through a pipe, until it ends."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
        threading.Thread(target=_die_with_parent, daemon=True).start()
        worker: Worker | None = None
        with suppress(EOFError, ConnectionError):  # of the pipe alone
            while True:
                unit = pipe.recv()
                try:
                    worker = worker or cls(job, number=number)
                    result: Any = worker.run(unit)
                except Exception as error:
                    result = portable(error)
                pipe.send(result)


def portable(error: Exception) -> Exception:
    """Return an error that another process can raise, with what led to it as a note."""
    story = "".join(traceback.format_exception(error))
    error.add_note(f"in a worker process:\n{story}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(story)
    return error


def _die_with_parent() -> None:
    """Leave no writer behind that a next run could meet."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
