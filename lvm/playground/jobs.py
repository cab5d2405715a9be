"""One thread that has the model, and a short queue before it.

A job is an iterator of events (JSON objects). It is stepped by the thread, and closed, which stops
its work, as soon as nobody waits for it any more.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Generator
from typing import Any

from tokenizer.cli import InputError

Event = dict[str, Any]
log = logging.getLogger("lvm.playground")


class Busy(Exception):
    """No more jobs are taken; the message says why and until when."""


class Ticket:
    """One job in the queue or at work; its events arrive in the loop it was submitted from."""

    def __init__(self, work: Generator[Event, None, None]) -> None:
        self.work = work
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[Event | None] = asyncio.Queue()  # None: no more will come
        self.cancelled = threading.Event()

    def put(self, event: Event | None) -> None:
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the loop has ended, and whoever listened with it
            self.cancelled.set()


class Jobs:
    """At most `most` jobs wait behind the one at work. `stop` ends the thread."""

    def __init__(self, *, most: int = 8) -> None:
        self.most = most
        self.waiting: deque[Ticket] = deque()
        self.running: Ticket | None = None
        self.stopped = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._work, name="model", daemon=True)
        self.thread.start()

    def submit(self, work: Generator[Event, None, None]) -> Ticket:
        """Queue a job from a running event loop; raises Busy where the queue is full or stopped.

        Its first events say how many are before it, each time that changes.
        """
        ticket = Ticket(work)
        with self.changed:
            if self.stopped:
                raise Busy("the server is being stopped; start it again")
            if len(self.waiting) + (self.running is not None) > self.most:
                raise Busy(
                    f"one prompt is at work and {self.most} wait, the most that this server "
                    "takes; try again soon"
                )
            self.waiting.append(ticket)
            self._tell(ticket, len(self.waiting) - 1)
            self.changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Take a job out of the queue, or stop it at its next step; done jobs are left alone."""
        ticket.cancelled.set()
        with self.changed:
            if ticket in self.waiting:
                self.waiting.remove(ticket)
                self._tell_all()

    def stop(self) -> None:
        """Cancel every job, telling those who wait, and end the thread after the current step."""
        with self.changed:
            self.stopped = True
            jobs = [*self.waiting, *([self.running] if self.running else [])]
            self.waiting.clear()
            self.changed.notify()
        for ticket in jobs:
            ticket.put({"event": "error", "error": "the server was stopped; start it again"})
            ticket.put(None)
            ticket.cancelled.set()

    def _tell_all(self) -> None:
        for place, ticket in enumerate(self.waiting):
            self._tell(ticket, place)

    def _tell(self, ticket: Ticket, place: int) -> None:
        ticket.put({"event": "queued", "ahead": place + (self.running is not None)})

    def _work(self) -> None:
        while True:
            with self.changed:
                self.running = None
                self.changed.wait_for(lambda: self.waiting or self.stopped)
                if self.stopped:
                    return
                self.running = ticket = self.waiting.popleft()
                self._tell_all()
            _run(ticket)


def _run(ticket: Ticket) -> None:
    try:
        for event in ticket.work:
            if ticket.cancelled.is_set():
                break
            ticket.put(event)
    except InputError as error:
        ticket.put({"event": "error", "error": str(error)})
    except Exception:
        log.exception("a job failed")
        seen = (
            "the server failed on this prompt; its log says where: report it, or change the prompt"
        )
        ticket.put({"event": "error", "error": seen})
    finally:
        ticket.work.close()
        ticket.put(None)
