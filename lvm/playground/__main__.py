"""Prompt a model with pictures on a local web page.

    python -m lvm.playground runs/demo/model --tokenizer runs/demo/tokenizer \\
        --data runs/demo/sentences

Listens first, so that a port in use is known before minutes of loading; then loads, then serves.
"""

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tokenizer.cli import InputError, run
from tokenizer.devices import Device, pick_device
from tokenizer.images import Preprocess


@dataclass(frozen=True, slots=True, kw_only=True)
class Playground:
    """Open a local web page: drop in pairs and a query, or frames, and watch the answers appear.

    The page is for whoever can open this machine's port, by default its own users alone. It asks
    nothing of any other machine. Ctrl-C ends it.
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Run folder of lvm.train, export of lvm.export, or Hugging Face LLaMA or Qwen3 folder."""
    tokenizer: Path
    """Tokenizer folder, the one whose codes the model was trained on."""
    examples: Path | None = None
    """Folder of prompts to start from, a folder each: query.png with x1.png y1.png …, or frames."""
    data: Path | None = None
    """Folder of shards: a sentence of each source of pairs and frames becomes an example."""
    port: int = 8000
    """0 takes a free one."""
    host: str = "127.0.0.1"
    """Address to listen on; any but this machine's own lets others in, without a password."""
    name: tuple[str, ...] = ()
    """Further host names that browsers reach this server by."""
    store: Path | None = None
    """Folder for pictures and prompts, so that links last (default: ~/.cache/lvm-playground)."""
    store_mb: int = 256
    """Size of that folder in MB; what was used longest ago is dropped."""
    waiting: int = 8
    """Prompts that may wait behind the one at work."""
    preprocess: Preprocess = "squash"
    """How pictures become squares: squash loses the aspect ratio, crop cuts the centre."""
    device: Device = "auto"


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; raises InputError where the address cannot be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, proto)
        try:
            # Or a server that has just ended blocks its port for a minute.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(128)
        except BaseException:
            sock.close()
            raise
    except (OSError, OverflowError) as error:
        raise InputError(
            f"--host {host} --port {port} cannot be listened on ({error}); is another server "
            "there? Give another --port, or 0 for any that is free"
        ) from error
    return sock


def main(command: Playground) -> None:
    import tokenizer  # here, so that --help and a wrong option need not wait for torch
    from lvm import interop
    from lvm.generate import reads_of
    from lvm.playground.answers import Answerer
    from lvm.playground.examples import of_data, of_folder, shapes
    from lvm.playground.jobs import Jobs
    from lvm.playground.service import Service
    from lvm.playground.store import Store

    try:
        from lvm.playground import serve
    except ImportError as error:
        raise InputError(
            f"the playground needs starlette and uvicorn ({error}): pip install "
            "'large-vision-models[playground]'"
        ) from error
    if command.store_mb < 1 or command.waiting < 0 or not 0 <= command.port < 65536:
        raise InputError(
            f"--store-mb {command.store_mb} --waiting {command.waiting} --port {command.port}: "
            "wanted at least 1, at least 0, and 0 to 65535"
        )
    device = pick_device(command.device)
    sock = listen(command.host, command.port)
    with sock:
        tok = tokenizer.load(command.tokenizer)
        model = interop.load(command.model)
        answerer = Answerer(model.to(device), tok.to(device))
        size, room = answerer.size, reads_of(model).images_per_row - 1
        examples = []
        if command.examples is not None:
            examples += of_folder(
                command.examples, size=size, room=room, preprocess=command.preprocess
            )
        if command.data is not None:
            examples += of_data(command.data, tok, room=room)
        service = Service(
            answerer,
            Store(command.store or default_store(), most=command.store_mb * 10**6),
            examples or shapes(size=size, room=room),
            name="/".join(command.model.resolve().parts[-2:]),
            preprocess=command.preprocess,
        )
        serve.run(service, Jobs(most=command.waiting), sock, names=command.name)


def default_store() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if cache else Path.home() / ".cache") / "lvm-playground"


if __name__ == "__main__":
    run(Playground, main, prog="python -m lvm.playground")
