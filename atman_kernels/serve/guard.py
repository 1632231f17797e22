"""What every request goes through before anything else: its size, its token, where it comes from; and what is written
down of it afterwards."""

import asyncio
import hmac
import ipaddress
import json
import logging
import time
import uuid
from collections.abc import MutableMapping
from contextlib import ExitStack
from typing import Any
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atman_kernels.serve.errors import RequestError, request_error
from atman_kernels.serve.service import Service

LOG = logging.getLogger("atman_kernels.serve")
# A page of ours runs no script and loads no style but those it came with, and is in nobody's frame.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
BODY_SECONDS = 300.0  # for a whole body
SILENCE_SECONDS = 20.0  # between two pieces of it
OPEN = ("/", "/health", "/ready", "/openapi.json", "/favicon.ico")  # without a token; so is what is below /page/


class Guard:
    """ASGI middleware: refuses what must not come in, and counts what came.

    Args:
        app: the application.
        service: whose limits and token count.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":  # else a websocket, which nothing here speaks
                await self._app(scope, receive, send)
            return
        name, began, status, answered = uuid.uuid4().hex, time.perf_counter(), 499, False
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        state["id"] = name

        async def answer(message: Message) -> None:
            nonlocal status, answered
            if message["type"] == "http.response.start":
                status, answered = message["status"], True
                _complete(MutableHeaders(scope=message), name, scope["path"])
            await send(message)

        with ExitStack() as arriving:
            state["arriving"] = arriving
            if scope["method"] == "POST":
                arriving.enter_context(self._service.waiting.arriving())
            try:
                self._check(scope)
                await self._app(scope, _limited(receive, self._service.settings.max_bytes), answer)
            except Exception as error:  # refused here, or a defect of ours
                if not isinstance(error, RequestError):
                    LOG.exception("request %s failed", name)
                if answered:
                    raise
                await _refuse(answer, request_error(error))
            finally:
                self._write_down(scope, name, status, time.perf_counter() - began)

    def _check(self, scope: Scope) -> None:
        headers, token = Headers(scope=scope), self._service.settings.token
        most = self._service.settings.max_bytes
        length = headers.get("content-length", "0").lstrip("0") or "0"
        if not length.isdecimal() or len(length) > len(str(most)) or int(length) > most:
            raise _too_long(most)
        if token is None:
            _check_same_machine(headers, scope["method"])
        elif scope["path"] not in OPEN and not scope["path"].startswith("/page/"):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
                raise RequestError("unauthorized", "this service needs its token: Authorization: Bearer TOKEN")

    def _write_down(self, scope: Scope, name: str, status: int, seconds: float) -> None:
        route = scope.get("route")
        endpoint = getattr(route, "path", "other")
        metrics = self._service.metrics
        metrics.requests.labels(endpoint, str(status)).inc()
        metrics.seconds.labels(endpoint).observe(seconds)
        if endpoint not in ("/health", "/ready", "/metrics"):
            LOG.info("%s %s %s %d %.3fs", name, scope["method"], endpoint, status, seconds)


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own.

    >>> is_loopback("127.0.0.1"), is_loopback("[::1]"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, True, False)
    """
    host = host.strip("[]")
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_same_machine(headers: Headers, method: str) -> None:
    """Without a token, a page of another site must not reach the service through this machine's browser.

    Neither under a name of its own that was made to mean this machine, nor from its own origin; where the browser names
    no origin, as for scripts and pictures, it says that the page is another's. People may follow a link to ours.
    """
    host = _address(f"//{headers.get('host', '')}")
    if host is None or not is_loopback(host.hostname or ""):
        raise RequestError(
            "forbidden", f"Host is {headers.get('host')!r}: without a token only this machine's own names are served"
        )
    origin = headers.get("origin")
    if origin is not None and getattr(_address(origin), "netloc", None) != host.netloc:
        raise RequestError("forbidden", f"a page of {origin} asks; without a token only this service's own page may")
    follows_link = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not follows_link:
        raise RequestError("forbidden", "a page of another site asks; without a token only this service's own page may")


def _address(text: str) -> SplitResult | None:
    try:
        return urlsplit(text)
    except ValueError:  # half a bracket
        return None


def _too_long(most: int) -> RequestError:
    return RequestError("too_large", f"the body is longer than {most} bytes, which is the most that is taken")


def _limited(receive: Receive, most: int) -> Receive:
    """The request's body: up to so many bytes, in good time. What comes after it may take as long as it likes."""
    read, is_whole, began = 0, False, time.monotonic()

    async def limited() -> Message:
        nonlocal read, is_whole
        if is_whole:
            return await receive()
        left = began + BODY_SECONDS - time.monotonic()
        try:
            message = await asyncio.wait_for(receive(), min(SILENCE_SECONDS, left))
        except TimeoutError:
            raise HTTPException(408, "the body did not come in time") from None
        read += len(message.get("body", b""))
        is_whole = not message.get("more_body", False)
        if read > most:
            error = _too_long(most)
            raise HTTPException(error.status, error.message)
        return message

    return limited


def _complete(headers: MutableHeaders, name: str, path: str) -> None:
    headers.setdefault("X-Request-Id", name)
    headers["X-Content-Type-Options"] = "nosniff"
    headers["Content-Security-Policy"] = POLICY
    headers["Referrer-Policy"] = "no-referrer"
    headers.setdefault("Cache-Control", "no-cache" if path == "/" or path.startswith("/page/") else "no-store")


async def _refuse(send: Send, error: RequestError) -> None:
    body = json.dumps(error.content()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.kind == "unauthorized":
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
