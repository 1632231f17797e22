"""A request on its way through the service: what is wanted, and the events that tell of it."""

import asyncio
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from atman_kernels.serve.errors import RequestError
from atman_kernels.serve.requests import AnswerRequest, ExplainRequest

LAST = ("result", "error")


class Event(NamedTuple):
    """Something that became known: its name as in docs/service.md, and what there is to say."""

    name: str
    data: Any


@dataclass(eq=False)
class Job:
    """A request that is waiting or being worked on.

    Events are put in by the thread that works and read by the event loop that the job was made in. A reader may be
    slow: of progress that it has not read, only the newest is kept.

    Attributes:
        request: what is wanted.
        client: whose it is, for taking turns.
        tokens: of the prompt with the answer, or with the longest that the model may give.
        deadline: when it must be done, once its work has begun.
        cancelled: why nobody waits for it any more.
        finished: whether its last event was told.
    """

    request: ExplainRequest | AnswerRequest
    client: str
    tokens: int
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    queued: float = field(default_factory=time.monotonic)
    deadline: float | None = None
    cancelled: RequestError | None = None
    finished: bool = False

    def __post_init__(self) -> None:
        self._events: deque[Event] = deque()
        self._lock = threading.Lock()
        self._loop, self._news = asyncio.get_running_loop(), asyncio.Event()
        self._whenever_cancelled: list[Callable[[], None]] = []

    @property
    def streamed(self) -> bool:
        """Whether the client takes events as they come."""
        return self.request.stream

    def tell(self, name: str, data: Any) -> None:
        """Another event, from any thread; nothing follows the last one."""
        with self._lock:
            if self.finished:
                return
            self.finished = name in LAST
            if name == "progress" and self._events and self._events[-1].name == "progress":
                self._events.pop()
            self._events.append(Event(name, data))
        with suppress(RuntimeError):  # where the loop is gone, and whoever read with it
            self._loop.call_soon_threadsafe(self._news.set)

    def begin(self, seconds: float) -> None:
        """Its work begins, and may take so long."""
        self.deadline = time.monotonic() + seconds

    def fail(self, error: RequestError) -> None:
        """Ends the job with an error, which the client is told."""
        self.tell("error", error)

    def cancel(self, error: RequestError | None = None) -> None:
        """Nobody waits for it any more: it is not begun, or ends before the next forward."""
        with self._lock:
            if self.finished or self.cancelled is not None:
                return
            self.cancelled = error or RequestError("cancelled", "the request was stopped")
            told = list(self._whenever_cancelled)
        for tell in told:
            tell()

    def when_cancelled(self, tell: Callable[[], None]) -> None:
        """Calls `tell` once it is cancelled, at once if it is already."""
        with self._lock:
            self._whenever_cancelled.append(tell)
            late = self.cancelled is not None
        if late:
            tell()

    async def events(self) -> AsyncIterator[Event]:
        """All events, up to the last one."""
        while True:
            await self._news.wait()
            self._news.clear()
            while True:
                with self._lock:
                    event = self._events.popleft() if self._events else None
                if event is None:
                    break
                yield event
                if event.name in LAST:
                    return

    async def outcome(self) -> Any:
        """The result.

        Raises:
            RequestError: there is none.
        """
        async for event in self.events():
            if event.name == "result":
                return event.data
            if event.name == "error":
                raise event.data
        raise AssertionError("events ended without a last one")
