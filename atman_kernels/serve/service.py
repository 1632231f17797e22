"""What the endpoints share: putting a request into the queue, and giving back what becomes of it."""

import asyncio
import json
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from atman_kernels.serve.engine import Engine, as_json
from atman_kernels.serve.errors import RequestError
from atman_kernels.serve.job import LAST, Event, Job
from atman_kernels.serve.metrics import Metrics
from atman_kernels.serve.requests import AnswerRequest, ExplainRequest
from atman_kernels.serve.settings import Settings
from atman_kernels.serve.waiting import Waiting
from atman_kernels.serve.worker import Worker

LOG = logging.getLogger("atman_kernels.serve")
SILENCE = 15.0  # seconds without an event after which a stream says that it is still there
MOST_KEPT = 256 << 20  # characters of all kept results
STUCK = 60.0  # seconds that a reader may take nothing


class Service:
    """One model with its queue and its thread.

    Args:
        model, tokenizer: see `Engine`.
        settings: limits.
        on_end: called when the thread ends.
    """

    def __init__(
        self, model: Any, tokenizer: Any, settings: Settings, on_end: Callable[[], None] = lambda: None
    ) -> None:
        self.settings, self.metrics = settings, Metrics()
        self.engine = Engine(model, tokenizer, settings, self.metrics)
        self.waiting = Waiting(settings.queue, settings.batch, settings.max_tokens)
        self.worker = Worker(self.engine, self.waiting, on_end)
        self.metrics.watch_queue(lambda: len(self.waiting))
        self._jobs: dict[str, Job] = {}
        self._kept: OrderedDict[str, str] = OrderedDict()

    def check_model(self, name: str | None) -> None:
        """Raises RequestError if another model is asked for."""
        if name is not None and name != self.settings.name:
            raise RequestError("not_found", f"model {name!r} is not served here, {self.settings.name!r} is")

    async def submit(self, http: Request, wanted: ExplainRequest | AnswerRequest) -> Job:
        """A request into the queue.

        Raises:
            InputError, RequestError: it does not fit, or the queue is full.
        """
        return (await self._submit(http, [wanted]))[0]

    async def _submit(self, http: Request, wanted: Sequence[ExplainRequest | AnswerRequest]) -> list[Job]:
        client, name = http.client.host if http.client else "", http.state.id
        jobs: list[Job] = []
        try:
            tokens = [await run_in_threadpool(self.engine.measuring.measure, each) for each in wanted]
            for number, (each, count) in enumerate(zip(wanted, tokens, strict=True)):
                job = Job(each, client, count, id=name if len(wanted) == 1 else f"{name}.{number}")
                if self.settings.log_prompts:
                    LOG.info("request %s asks: %r", job.id, each)
                job.tell("queued", {"id": job.id, "position": self.waiting.put(job)})
                jobs.append(job)
                self._jobs[job.id] = job
        except BaseException:
            for job in jobs:  # all of them or none
                self.left(job)
            raise
        http.state.arriving.close()
        return jobs

    def left(self, job: Job) -> None:
        """Nobody reads of this job any more."""
        self._jobs.pop(job.id, None)
        if not job.finished:
            self.metrics.cancelled.inc()
        job.cancel()

    def cancel(self, name: str) -> None:
        """Raises RequestError if there is no such request."""
        job = self._jobs.get(name)
        if job is None:
            raise RequestError("not_found", f"no request {name!r} waits or is worked on")
        job.cancel()

    async def outcome(self, http: Request, wanted: ExplainRequest | AnswerRequest) -> Any:
        """The result of a request, unless the client goes away before.

        Raises:
            InputError, RequestError: there is none.
        """
        return (await self.outcomes(http, [wanted]))[0]

    async def outcomes(self, http: Request, wanted: Sequence[ExplainRequest | AnswerRequest]) -> list[Any]:
        """The results of several; an error of one is the error of all."""
        jobs = await self._submit(http, wanted)
        results: asyncio.Future[list[Any]] = asyncio.gather(*(job.outcome() for job in jobs))
        gone = asyncio.ensure_future(_disconnected(http.receive))
        both: set[asyncio.Future[Any]] = {results, gone}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not results.done():
                raise RequestError("cancelled", "the client went away")
            found = results.result()
            for job, result in zip(jobs, found, strict=True):
                self.keep(job, result)
            return found
        finally:
            for job in jobs:
                self.left(job)
            results.add_done_callback(_seen)
            for task in both:
                task.cancel()

    def keep(self, job: Job, result: Any) -> None:
        """Keeps a result whose request asks for it; the oldest goes when there are too many, or they are too long."""
        if getattr(job.request, "store", False):
            self._kept[job.id] = as_json(result)
            while len(self._kept) > self.settings.keep or sum(map(len, self._kept.values())) > MOST_KEPT:
                self._kept.popitem(last=False)

    def kept(self, name: str) -> str:
        """Raises RequestError if there is no such result."""
        if name not in self._kept:
            raise RequestError("not_found", f"no result {name!r} is kept (the oldest go first)")
        return self._kept[name]


class EventStream(Response):
    """The events of a job as server-sent events; the job is cancelled when its reader goes away."""

    media_type = "text/event-stream"

    def __init__(self, service: Service, job: Job) -> None:
        super().__init__(headers={"X-Request-Id": job.id, "X-Accel-Buffering": "no", "Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._service, self._job = service, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await send(start)
            async for part in self._parts(gone):
                body = {"type": "http.response.body", "body": part, "more_body": True}
                await asyncio.wait_for(send(body), STUCK)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            LOG.info("request %s: its reader takes nothing", self._job.id)
        finally:
            gone.cancel()
            self._service.left(self._job)

    async def _parts(self, gone: "asyncio.Future[None]") -> AsyncIterator[bytes]:
        events = self._job.events()
        coming: asyncio.Task[Event] | None = None
        try:
            while not gone.done():
                coming = coming or asyncio.create_task(anext(events))  # type: ignore[arg-type]
                both: set[asyncio.Future[Any]] = {coming, gone}
                await asyncio.wait(both, timeout=SILENCE, return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    yield b": still there\n\n"
                    continue
                event, coming = coming.result(), None
                yield self._part(event)
                if event.name in LAST:
                    return
        finally:
            if coming is not None:
                coming.cancel()

    def _part(self, event: Event) -> bytes:
        data = event.data
        if event.name == "result":
            text = as_json(data).strip()
            self._service.keep(self._job, data)
        elif event.name == "error":
            text = json.dumps(data.content() | {"status": data.status})
        else:
            text = json.dumps(data)
        return f"event: {event.name}\ndata: {text}\n\n".encode()


class JsonText(Response):
    """JSON that is text already."""

    media_type = "application/json"


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII characters: an error may tell of text that is no text."""
    return JsonText(json.dumps(content, allow_nan=False), status, headers)


def _seen(results: "asyncio.Future[Any]") -> None:
    """Looks at an error that nobody waits for, or the event loop would complain of it."""
    if not results.cancelled():
        results.exception()


async def _disconnected(receive: Callable[[], Awaitable[Mapping[str, Any]]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _service_of(http: Request) -> Service:
    return http.app.state.service  # type: ignore[no-any-return]


TheService = Annotated[Service, Depends(_service_of)]
