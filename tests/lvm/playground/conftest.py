"""A playground that serves: a small model and tokenizer behind a real server on a free port."""

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lvm.playground.answers import Answerer
from lvm.playground.examples import Example, shapes
from lvm.playground.jobs import Jobs
from lvm.playground.serve import make_server
from lvm.playground.service import Service
from lvm.playground.store import Store
from tokenizer.config import VQGANConfig
from tokenizer.images import encode_image
from tokenizer.vqgan import VQGAN

SIDE, ROOM = 8, 5  # pixels of the tokenizer's images, 4 codes each; images before an answer
LONGEST = 20.0  # seconds until a request of these tests is given up


@pytest.fixture(scope="session")
def tok() -> VQGAN:
    config = VQGANConfig(
        image_size=SIDE, channels=32, multipliers=(1, 1, 1), res_blocks=1, latent_dim=4, code_dim=4,
        codebook_size=40,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = VQGAN(config)
        torch.nn.init.normal_(made.quantize.embedding.weight)
    return made.eval()


@pytest.fixture
def answerer(make_model, tok) -> Answerer:
    return Answerer(make_model(tokenizer=tok.id, row_images=ROOM + 1), tok)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Client:
    """Talks to a server as a browser would, and as one would not."""

    port: int
    service: Service
    jobs: Jobs

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=LONGEST)

    def ask(
        self, path: str, body: bytes | None = None, *, headers: dict[str, str] | None = None
    ) -> Answer:
        connection = self.connect()
        try:
            connection.request("GET" if body is None else "POST", path, body, headers or {})
            got = connection.getresponse()
            return Answer(got.status, {k.lower(): v for k, v in got.getheaders()}, got.read())
        finally:
            connection.close()

    def upload(self, picture: np.ndarray) -> str:
        return self.ask("/api/images?name=x.png", encode_image(picture)).json["id"]

    def open_answers(self, asked: object) -> tuple[socket.socket, Iterator[dict[str, Any]]]:
        """Ask for answers; returns the socket, to be hung up, and the events as they come."""
        connection = self.connect()
        connection.request("POST", "/api/answers", json.dumps(asked))
        sock = connection.sock
        got = connection.getresponse()
        assert got.status == 200, got.read()

        def events() -> Iterator[dict[str, Any]]:
            with got:
                while line := got.readline():
                    yield json.loads(line)

        return sock, events()

    def answers(self, asked: object) -> list[dict[str, Any]]:
        return list(self.open_answers(asked)[1])


@pytest.fixture
def pictures(np_rng) -> np.ndarray:
    """Five pictures uint8 [5, 8, 8, 3]: two pairs and a query."""
    return np_rng.integers(0, 256, (ROOM, SIDE, SIDE, 3), np.uint8)


@pytest.fixture
def start(answerer, tmp_path: Path) -> Iterator[Callable[..., Client]]:
    """Return a function that starts a server; all end with the test."""
    with ExitStack() as stack:

        def serve(
            *,
            waiting: int = 8,
            most: int = 10**6,
            names: tuple[str, ...] = (),
            bound: str = "127.0.0.1",
            examples: list[Example] | None = None,
        ) -> Client:
            service = Service(
                answerer,
                Store(tmp_path / "store", most=most),
                shapes(size=SIDE, room=ROOM) if examples is None else examples,
                name="small",
                preprocess="squash",
            )
            jobs = Jobs(most=waiting)
            sock = socket.create_server(("127.0.0.1", 0))
            server = make_server(service, jobs, host=bound, names=names)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
            thread.start()

            def end() -> None:
                server.should_exit = True
                jobs.stop()
                thread.join(LONGEST)
                jobs.thread.join(LONGEST)
                assert not thread.is_alive() and not jobs.thread.is_alive()

            stack.callback(end)
            return Client(sock.getsockname()[1], service, jobs)

        yield serve


@pytest.fixture
def client(start) -> Client:
    return start()
