"""Who is served next: clients take turns, and what can be explained together with the one whose turn it is comes along.

A client with a hundred requests does not keep another with one waiting: turns go around by client, and by order of
arrival within one.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from itertools import count

from atman_kernels.serve.errors import RequestError
from atman_kernels.serve.job import Job


class Waiting:
    """A bounded queue of jobs.

    Args:
        most: jobs that may wait.
        batch: jobs that are handed out together at most.
        tokens: that jobs handed out together may have together; a longer one goes alone.
    """

    def __init__(self, most: int, batch: int, tokens: int) -> None:
        self._most, self._batch, self._tokens = most, batch, tokens
        self._changed = threading.Condition()
        self._clients: OrderedDict[str, deque[Job]] = OrderedDict()  # the next turn's first
        self._arriving = 0
        self._closed: RequestError | None = None

    def __len__(self) -> int:
        with self._changed:
            return self._count()

    @property
    def is_closed(self) -> bool:
        """Whether it takes no more requests."""
        return self._closed is not None

    def put(self, job: Job) -> int:
        """Puts a job at the end of its client's line; how many jobs are there before it.

        Raises:
            RequestError: the queue is full, or closed.
        """
        with self._changed:
            if self._closed is not None:
                raise self._closed
            before = self._count()
            if before >= self._most:
                raise RequestError("busy", f"{before} requests are waiting already; try again later", retry_after=1)
            self._clients.setdefault(job.client, deque()).append(job)
            self._changed.notify_all()
        job.when_cancelled(lambda: self._left(job))
        return before

    def arriving(self) -> "_Arriving":
        """A context for a request that is being read: `take` waits a moment for it."""
        return _Arriving(self)

    def take(self, patience: float) -> list[Job]:
        """The next jobs, of equal keys; none once the queue is closed and empty.

        Args:
            patience: seconds to wait at most for requests that are arriving, so that they come along.
        """
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._count() or self._closed is not None)
                if not self._count():
                    return []
                self._changed.wait_for(lambda: not self._arriving or self._count() >= self._batch, patience)
                if jobs := self._taken():  # the only one may have left meanwhile
                    return jobs

    def close(self, error: RequestError) -> None:
        """Takes no more jobs, and says why."""
        with self._changed:
            self._closed = error
            self._changed.notify_all()

    def drop(self, error: RequestError) -> None:
        """Ends all jobs that wait."""
        with self._changed:
            dropped = [job for line in self._clients.values() for job in line]
            self._clients.clear()
            self._changed.notify_all()
        for job in dropped:
            job.fail(error)

    def _count(self) -> int:
        return sum(map(len, self._clients.values()))

    def _left(self, job: Job) -> None:
        with self._changed:
            line = self._clients.get(job.client, ())
            if job not in line:
                return
            self._remove(job)
            self._changed.notify_all()
        assert job.cancelled is not None
        job.fail(job.cancelled)

    def _remove(self, job: Job) -> None:
        line = self._clients[job.client]
        line.remove(job)
        if not line:
            del self._clients[job.client]

    def _taken(self) -> list[Job]:
        jobs: list[Job] = []
        tokens = 0
        for job in list(self._in_turn()):
            if jobs and (job.request.key != jobs[0].request.key or tokens + job.tokens > self._tokens):
                continue
            self._remove(job)
            jobs.append(job)
            tokens += job.tokens
            if len(jobs) == self._batch:
                break
        for job in jobs:  # whose turn it was is last in the next round
            if job.client in self._clients:
                self._clients.move_to_end(job.client)
        return jobs

    def _in_turn(self) -> Iterator[Job]:
        """Every client's first job, then every client's second, and so on."""
        for number in count():
            at_hand = [line[number] for line in self._clients.values() if len(line) > number]
            if not at_hand:
                return
            yield from at_hand


class _Arriving:
    def __init__(self, waiting: Waiting) -> None:
        self._waiting = waiting

    def __enter__(self) -> None:
        self._add(1)

    def __exit__(self, *error: object) -> None:
        self._add(-1)

    def _add(self, number: int) -> None:
        with self._waiting._changed:
            self._waiting._arriving += number
            self._waiting._changed.notify_all()
