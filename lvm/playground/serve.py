"""Running the server until it is told to stop."""

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Collection
from types import FrameType

import uvicorn

from lvm.playground.jobs import Jobs
from lvm.playground.server import make_app
from lvm.playground.service import Service

CONNECTIONS = 128  # open at once; a browser has six


class Server(uvicorn.Server):
    """Ends what streams at once when it is told to stop: uvicorn alone waits for them."""

    def __init__(self, config: uvicorn.Config, jobs: Jobs) -> None:
        super().__init__(config)
        self.jobs = jobs

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.jobs.stop()
        super().handle_exit(sig, frame)


def make_server(service: Service, jobs: Jobs, *, host: str, names: Collection[str] = ()) -> Server:
    """Return the server for a socket that is bound to the address `host`."""
    config = uvicorn.Config(
        make_app(
            service,
            jobs,
            open_to_network=not ipaddress.ip_address(host).is_loopback,
            names=names,
        ),
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=3,
    )
    return Server(config, jobs)


def run(service: Service, jobs: Jobs, sock: socket.socket, *, names: Collection[str] = ()) -> None:
    """Serve on a listening socket until SIGINT or SIGTERM."""
    host, port = sock.getsockname()[:2]
    server = make_server(service, jobs, host=host, names=names)
    shown = f"[{host}]" if ":" in host else host
    print(f"{service.about['model']}: open http://{shown}:{port}  (Ctrl-C ends it)", flush=True)
    if not ipaddress.ip_address(host).is_loopback:
        print("everybody who reaches this port may use it; there is no password", flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn hands the signal on when it has stopped
        asyncio.run(server.serve(sockets=[sock]))
    jobs.stop()
