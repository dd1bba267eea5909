"""The server: addresses, one worker thread, and protection against other web pages."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import socket
import threading
import webbrowser
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unmask.core.errors import UnmaskError
from unmask.serve import HOST
from unmask.serve.inference import ENDPOINTS, Models, in_request_words
from unmask.serve.requests import MAX_BODY_BYTES, Endpoint, ErrorAnswer, build_request, openapi

_NAMES: Final = (HOST, "localhost")
_MAX_WAITING: Final = 64  # requests
_MAX_DRAINED: Final = (
    1 << 24
)  # bytes of a request that are read though it is too large, so that its client gets the answer
_GONE: Final = "the client closed the connection"
_SHUTDOWN_SECONDS: Final = 2
_STATIC: Final = Path(__file__).parent / "static"
_MEDIA: Final = {  # not from the system's table, which may call a script plain text
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS: Final = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}
Result = TypeVar("Result")


# Server -------------------------------------------------------------------------------------------------------------


def serve(paths: Sequence[Path], listener: socket.socket, on_start: Callable[[str], None]) -> None:
    """Serve models until a signal ends the process.

    Args:
        paths: Models, runs or steps.
        listener: Socket that is bound to the loopback address.
        on_start: Called with the address when the server accepts connections.

    Raises:
        UnmaskError: a path has no model.
    """
    models = Models(paths)
    address = f"http://{HOST}:{listener.getsockname()[1]}/"
    config = uvicorn.Config(
        build_app(models),
        log_config=None,
        log_level="warning",
        ws="none",
        lifespan="off",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
    )
    with contextlib.suppress(KeyboardInterrupt):  # raised after the server has shut down
        _Server(config, lambda: on_start(address)).run([listener])


class _Server(uvicorn.Server):
    """A server that reports when it accepts connections."""

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then report it."""
        await super().startup(sockets)
        self._on_start()


def open_browser(address: str) -> None:
    """Open an address in the user's browser, without waiting for a browser that runs in the terminal."""
    threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()


# Worker -------------------------------------------------------------------------------------------------------------


class Worker:
    """Runs functions one after the other on one thread, because two would only slow each other down.

    A long computation is an iterator. It waits in the queue again after each step, so others run in between.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "unmask")
        self._waiting = 0

    async def run(self, function: Callable[..., Result], *arguments: Any, is_next_step: bool = False) -> Result:
        """Return the result of a function. If the caller is canceled, a function that has not begun is left out.

        Raises:
            HTTPException: too many functions are waiting. A next step of a computation is never refused, because its
                answer has begun.
        """
        if self._waiting >= _MAX_WAITING and not is_next_step:
            raise HTTPException(503, f"{self._waiting} requests are waiting already")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)
        finally:
            self._waiting -= 1


# Application --------------------------------------------------------------------------------------------------------


def build_app(models: Models) -> ASGIApp:
    """Return the application: the page, its files, the API and its OpenAPI document."""
    worker, document = Worker(), openapi(ENDPOINTS)

    async def list_models(_: Request) -> Response:
        return JSONResponse(plain(await worker.run(models.answer)))

    async def describe(_: Request) -> Response:
        return JSONResponse(document)

    routes = [
        Route("/", _static),
        Route("/static/{name}", _static),
        Route("/models", list_models),
        Route("/openapi.json", describe),
        *(Route(each.path, _handler(each, models, worker), methods=["POST"]) for each in ENDPOINTS),
    ]
    handlers: Mapping[Any, Any] = {UnmaskError: _user_error, HTTPException: _http_error, Exception: _internal_error}
    return _Guard(Starlette(routes=routes, exception_handlers=handlers))


def _handler(endpoint: Endpoint, models: Models, worker: Worker) -> Callable[[Request], Any]:
    """Return the function that answers the requests of an endpoint."""

    def compute(request: object) -> Any:
        return endpoint.run(models.get(cast("Any", request).model), request)

    async def answer(http: Request) -> Response:
        request = build_request(endpoint.request, await _json(http))
        found = await _unless_disconnected(http, worker.run(compute, request))
        if not endpoint.is_stream:
            return JSONResponse(plain(found))
        first = await worker.run(next, found, is_next_step=True)  # its errors are answers with their own status
        return StreamingResponse(_lines(http, worker, found, first), media_type="application/x-ndjson")

    return answer


async def _json(http: Request) -> object:
    """Return the parsed body of a request.

    Raises:
        HTTPException: it is too large, or not JSON.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, f"unsupported content type: got {kind[:100]!r}, expected application/json")
    body, size = bytearray(), 0
    try:
        async for chunk in http.stream():
            size += len(chunk)
            if size > _MAX_DRAINED:
                break
            if size <= MAX_BODY_BYTES:
                body += chunk
    except ClientDisconnect as error:
        raise HTTPException(499, _GONE) from error
    if size > MAX_BODY_BYTES:
        raise HTTPException(413, f"the request is larger than {MAX_BODY_BYTES:,} bytes")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, not UTF-8, or a number of too many digits
        raise HTTPException(400, "the body is not JSON in UTF-8") from error


async def _unless_disconnected(http: Request, computation: Any) -> Any:
    """Await a computation; leave it out if the client goes away before it begins, as a page does that types on."""

    async def disconnected() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    running, watching = asyncio.ensure_future(computation), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait((running, watching), return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            raise HTTPException(499, _GONE)
        return running.result()
    finally:
        running.cancel()
        watching.cancel()


async def _lines(http: Request, worker: Worker, found: Any, first: Any) -> AsyncIterator[str]:
    """Yield the steps of a computation as lines of JSON, until the client goes away."""
    line = first
    while line is not None:
        yield json.dumps(plain(line), ensure_ascii=False) + "\n"
        line = None if await http.is_disconnected() else await worker.run(next, found, None, is_next_step=True)


def plain(value: Any) -> Any:
    """Return dataclasses as dictionaries and tuples as lists, with None in place of NaN and infinity."""
    if dataclasses.is_dataclass(value):
        return {each.name: plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, tuple | list):
        return [plain(entry) for entry in cast("Sequence[Any]", value)]
    return value


async def _static(http: Request) -> Response:
    """Answer with a file of the page."""
    name = http.path_params.get("name", "index.html")
    known = {path.name: path for path in _STATIC.iterdir() if path.suffix in _MEDIA}
    if name not in known:
        raise HTTPException(404)
    return Response(known[name].read_bytes(), media_type=_MEDIA[known[name].suffix])


# Errors and protection ----------------------------------------------------------------------------------------------

_HINTS: Final = {
    400: "send a JSON object, with quotes around its keys",
    404: "see /openapi.json for the addresses",
    405: "see /openapi.json for the methods",
    413: "shorten the text, or send it in several requests",
    415: "send JSON, with the header Content-Type: application/json",
    503: "wait for the answers, then send the request again",
}


def _user_error(_: Request, error: Exception) -> Response:
    """Answer an error that the client can fix; the status is that of a request that can't be processed."""
    named = in_request_words(cast("UnmaskError", error))
    message = f"{named.message} ({named.location})" if named.location else named.message
    return _refusal(400, message, named.hint)


def _http_error(_: Request, error: Exception) -> Response:
    failure = cast("HTTPException", error)
    detail = failure.detail if failure.detail[:1].islower() else failure.detail.lower()
    return _refusal(failure.status_code, detail, _HINTS.get(failure.status_code, ""), failure.headers)


def _internal_error(_: Request, error: Exception) -> Response:
    summary = f"internal error: {type(error).__name__}: {error}"
    return _refusal(500, summary, "report this error; the traceback is in the terminal of `unmask serve`")


def _refusal(status: int, message: str, hint: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse(plain(ErrorAnswer(message, hint)), status, headers)


class _Guard:
    """Refuses requests that another web page may have caused, and adds the headers of security to all answers.

    A page of another origin can send requests to the loopback address. Its browser then names that origin. With DNS
    rebinding, the origin is a name of the attacker that resolves to this machine; the browser sends it as the host.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message["headers"])
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        headers = Headers(scope=scope)
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        name, _, port = host.partition(":")
        app = self._app
        if name not in _NAMES or not (port.isdecimal() or port == "") or len(headers.getlist("host")) != 1:
            app = _refusal(403, f"the host {host[:100]!r} is not this machine", f"open http://{HOST} and the port")
        elif origin is not None and origin != f"http://{host}":
            app = _refusal(403, f"requests of the origin {origin[:100]!r} are refused", "use the page of this server")
        await app(scope, receive, send_with_headers)
