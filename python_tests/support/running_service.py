"""A service that listens on a free port of this machine, in a thread of the test's process, and its model at will."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

from atman_kernels.serve.app import create_app
from atman_kernels.serve.server import configured
from atman_kernels.serve.settings import Settings


class Running:
    """A service that runs.

    Attributes:
        url: where.
        http: a client of it, which has no token.
        service: its insides.
        connections: that are open.
    """

    def __init__(self, url: str, service: Any, connections: Any = ()) -> None:
        self.url, self.service, self.connections = url, service, connections
        self.http = httpx.Client(base_url=url, timeout=60)

    def explain(self, **body: Any) -> httpx.Response:
        return self.http.post("/v1/explanations", json=body)

    def events(self, path: str = "/v1/explanations", **body: Any) -> list[tuple[str, Any]]:
        """All events of a streamed request."""
        with self.http.stream("POST", path, json={"stream": True, **body}) as response:
            assert response.status_code == 200, response.read()
            return list(events_of(response))

    def known(self) -> int:
        """Requests that wait or are worked on."""
        return len(self.service._jobs)

    def busy(self) -> bool:
        """Whether a request is worked on that somebody waits for."""
        jobs = self.service.worker._at_work
        return bool(jobs) and all(job.id in self.service._jobs for job in jobs)

    def metric(self, name: str) -> float:
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith(f"{name} "):
                return float(line.rpartition(" ")[2])
        raise AssertionError(f"no metric {name}")


def events_of(response: httpx.Response) -> Iterator[tuple[str, Any]]:
    name = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


@contextmanager
def running(model: Any, tokenizer: Any, **settings: Any) -> Iterator[Running]:
    given: dict[str, Any] = {"name": "tiny", "grace": 5.0} | settings
    limits = Settings(**given)
    app = create_app(model, tokenizer, limits)
    server = uvicorn.Server(configured(app, limits, port=0))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        found = Running(f"http://127.0.0.1:{port}", app.state.service, server.server_state.connections)
        yield found
        found.http.close()
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


class Gate:
    """Holds a model's forwards while it is shut, and counts them."""

    def __init__(self, model: Any) -> None:
        self.model, self.forwards = model, 0
        self._open = threading.Event()
        self._open.set()
        self._hook = model.register_forward_pre_hook(self._pass, with_kwargs=True)
        inner = model.get_decoder()
        self._inner = inner.register_forward_pre_hook(self._pass, with_kwargs=True)

    def _pass(self, *_: Any) -> None:
        self.forwards += 1
        assert self._open.wait(30)

    @contextmanager
    def shut(self) -> Iterator[None]:
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    def remove(self) -> None:
        self._hook.remove()
        self._inner.remove()


def until(true: Any, seconds: float = 10) -> None:
    """Waits until something is so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
