"""The web server of the playground: what browsers may ask, and who may ask it.

    GET  /                      the page, and its files under /static/
    GET  /api/about             model, limits, examples
    POST /api/images?name=N     the bytes of one picture file  -> {"id"}
    GET  /api/images/ID.png     as the model sees it
    POST /api/answers           {"kind", "images", "settings"} -> events, one JSON object a line
    GET  /api/prompts/ID        the same three and "same_model", for links

Every error is {"error": what was seen, what was wanted, what to do}. A page of another site can
neither read nor ask: foreign Origin and Host are refused (the second is DNS rebinding).
"""

import ipaddress
import json
from collections.abc import AsyncIterator, Collection, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lvm.playground.asked import IMAGE_ID, PROMPT_ID
from lvm.playground.jobs import Busy, Jobs, Ticket
from lvm.playground.pictures import MOST_BYTES
from lvm.playground.service import Gone, Service
from tokenizer.cli import InputError

STATIC = Path(__file__).parent / "static"
MOST_JSON = 1 << 16  # bytes of a request that is no picture
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


def make_app(
    service: Service, jobs: Jobs, *, open_to_network: bool, names: Collection[str] = ()
) -> ASGIApp:
    """Return the ASGI application; `names` and `open_to_network` say which Host is ours."""

    async def page(request: Request) -> Response:
        return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})

    async def about(request: Request) -> Response:
        return JSONResponse(service.about)

    reading = anyio.CapacityLimiter(1)  # files decoded at once: one may take 500 MiB

    async def upload(request: Request) -> Response:
        name = request.query_params.get("name", "picture")[:200]
        data = await _body(request, most=MOST_BYTES, what=name)
        key = await anyio.to_thread.run_sync(service.add, data, name, limiter=reading)
        return JSONResponse({"id": key})

    async def picture(request: Request) -> Response:
        key = request.path_params["key"]
        data = (
            await anyio.to_thread.run_sync(service.picture, key)
            if IMAGE_ID.fullmatch(key)
            else None
        )
        if data is None:
            raise HTTPException(404, "this picture is not stored any more; drop it in again")
        return Response(
            data, media_type="image/png", headers={"cache-control": "private, max-age=3600"}
        )

    async def prompt(request: Request) -> Response:
        key = request.path_params["key"]
        found = (
            await anyio.to_thread.run_sync(service.recall, key)
            if PROMPT_ID.fullmatch(key)
            else None
        )
        if found is None:
            raise HTTPException(
                404, "the prompt of this link is not stored here; links hold on the server that "
                "made them, until its store is full: drop the pictures in again"
            )  # fmt: skip
        return JSONResponse(found)

    async def answers(request: Request) -> Response:
        data = await _body(request, most=MOST_JSON, what="the request")
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise InputError(f"the request is no JSON ({error})") from error
        key, work = await anyio.to_thread.run_sync(service.ask, found)
        try:
            ticket = jobs.submit(work)
        except Busy as error:
            raise HTTPException(503, str(error)) from None
        return _Events(ticket, jobs, first={"event": "prompt", "id": key})

    routes = [
        Route("/", page),
        Route("/api/about", about),
        Route("/api/images", upload, methods=["POST"]),
        Route("/api/images/{key}.png", picture),
        Route("/api/answers", answers, methods=["POST"]),
        Route("/api/prompts/{key}", prompt),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={
            InputError: _refused, Gone: _gone, OSError: _full, HTTPException: _http,
            Exception: _failed,
        },
    )  # fmt: skip
    return _Guard(app, names={name.lower() for name in names}, open_to_network=open_to_network)


class _Events(StreamingResponse):
    """The events of a job; whoever hangs up cancels it."""

    def __init__(self, ticket: Ticket, jobs: Jobs, *, first: dict[str, Any]) -> None:
        async def lines() -> AsyncIterator[str]:
            yield json.dumps(first) + "\n"
            while (event := await ticket.events.get()) is not None:
                yield json.dumps(event) + "\n"

        super().__init__(
            lines(), media_type="application/x-ndjson", headers={"cache-control": "no-store"}
        )
        self.ticket, self.jobs = ticket, jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.jobs.cancel(self.ticket)


async def _body(request: Request, *, most: int, what: str) -> bytes:
    """Return the body, or raise as soon as it is known to be too long."""
    limit = f"{most / 2**20:.0f} MiB" if most >= 1 << 20 else f"{most >> 10} KiB"
    message = f"{what} is larger than {limit}, the most that is taken; make it smaller first"
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length) > most:
        raise HTTPException(413, message)
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > most:
            raise HTTPException(413, message)
    return bytes(data)


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse(
        {"error": message}, status_code=status, headers={"cache-control": "no-store"}
    )


async def _refused(request: Request, error: Exception) -> Response:
    return _error(400, str(error))


async def _gone(request: Request, error: Exception) -> Response:
    return _error(410, str(error))


async def _full(request: Request, error: Exception) -> Response:
    assert isinstance(error, OSError)
    seen = error.strerror or "an error of its disk"
    return _error(507, f"the server's store cannot be used ({seen}); free some space there")


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail)


async def _failed(request: Request, error: Exception) -> Response:
    return _error(500, "the server failed; its log says where")


class _Guard:
    """Refuse other sites, and put the security headers on everything."""

    def __init__(self, app: ASGIApp, *, names: Collection[str], open_to_network: bool) -> None:
        self.app, self.names, self.open = app, names, open_to_network

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # no websockets here

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        refusal = self._refusal(
            [(k.decode("latin-1"), v.decode("latin-1")) for k, v in scope["headers"]]
        )
        if refusal:
            await _error(403, refusal)(scope, receive, with_headers)
        else:
            await self.app(scope, receive, with_headers)

    def _refusal(self, headers: Sequence[tuple[str, str]]) -> str:
        """Return why a request is refused, or nothing."""
        hosts = [value for name, value in headers if name == "host"]
        if len(hosts) != 1 or not self._ours(hosts[0]):
            return (
                f"the address {', '.join(hosts) or '(none)'} is not this server's; open the one "
                "that it printed, or start it with --name NAME"
            )
        for origin in (value for name, value in headers if name == "origin"):
            if origin.lower() not in (f"http://{hosts[0].lower()}", f"https://{hosts[0].lower()}"):
                return f"a page of {origin} may not ask this server; use its own page"
        return ""

    def _ours(self, host: str) -> bool:
        """Whether a browser that was sent here by name or number meant this server.

        The port is not compared: it is another behind an SSH tunnel.
        """
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name == "localhost" or name in self.names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or self.open  # a number cannot be rebound
