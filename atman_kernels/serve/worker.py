"""The thread that works: takes what waits, has the engine work on it, and ends in good order."""

import logging
import threading
import time
from collections.abc import Callable

from atman_kernels.serve.engine import Engine
from atman_kernels.serve.errors import RequestError
from atman_kernels.serve.job import Job
from atman_kernels.serve.waiting import Waiting

LOG = logging.getLogger("atman_kernels.serve")
PATIENCE = 0.02  # seconds for requests that arrive at the same time, which cost less together than in a row
ENDING = "the service is about to end; try again in a moment, it may be back or there may be another"


class Worker:
    """One thread, the only one that touches the model.

    Args:
        engine: what does the work.
        waiting: where it comes from.
        on_end: called in that thread when it ends, however it does.
    """

    def __init__(self, engine: Engine, waiting: Waiting, on_end: Callable[[], None] = lambda: None) -> None:
        self.engine, self.waiting = engine, waiting
        self._at_work: list[Job] = []
        self._ending: threading.Timer | None = None
        self._thread = threading.Thread(target=self._loop, name="atman-model", daemon=True)
        self._on_end = on_end

    @property
    def is_alive(self) -> bool:
        """Whether the thread that works is there."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Starts the thread that works."""
        self._thread.start()

    def drain(self, grace: float) -> None:
        """Takes no new requests. What waits is worked on for so many seconds, and what is left then is refused."""
        self.waiting.close(RequestError("busy", ENDING, retry_after=5))
        if self._ending is None:
            self._ending = threading.Timer(grace, self._refuse)
            self._ending.daemon = True
            self._ending.start()

    def stop(self, grace: float) -> None:
        """Ends the thread, at the latest after so many seconds and the forward at hand."""
        self.drain(grace)
        self._thread.join()
        assert self._ending is not None
        self._ending.cancel()

    def _refuse(self) -> None:
        error = RequestError("busy", ENDING, retry_after=5)
        self.waiting.drop(error)
        for job in self._at_work:
            job.cancel(error)

    def _loop(self) -> None:
        try:
            while jobs := self.waiting.take(PATIENCE):
                self._at_work = jobs
                now = time.monotonic()
                for job in jobs:
                    self.engine.metrics.waited.observe(now - job.queued)
                self.engine.metrics.batches.observe(len(jobs))
                self.engine.run(jobs)
                self._at_work = []
        except BaseException:  # nothing of a request comes here, so this is a defect of ours
            LOG.exception("the thread that works on requests ended")
            raise
        finally:
            error = RequestError("busy", ENDING, retry_after=5)
            self.waiting.close(error)
            self.waiting.drop(error)
            for job in self._at_work:
                job.fail(RequestError("internal", "the service failed"))
            self._on_end()
