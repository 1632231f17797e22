"""Workers in processes of their own, and tasks that reach one of them even if some die."""

import re
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import atman_kernels
from atman_kernels.errors import InputError
from atman_kernels.scale import extra
from atman_kernels.scale.cluster import Settled
from atman_kernels.scale.worker import DeviceLostError, Worker

MOST_LOADING_DEATHS = 3  # of one worker in a row, after which it is given up
MOST_FRUITLESS_DEATHS = 30  # of all workers, with nothing finished in between
PATIENCE = 60.0  # seconds until a word on workers that have no place yet


@dataclass
class Task:
    """One call of a worker's method.

    Attributes:
        method, arguments: the call.
        most_deaths: how many processes may die of it.
        deaths: how many have.
    """

    method: str
    arguments: tuple[Any, ...]
    most_deaths: int = 3
    deaths: int = 0


@dataclass(frozen=True)
class Died:
    """What comes of a task that no process survived: the last one's end."""

    reason: str


@dataclass
class _Member:
    """A worker's place in the crew: whatever process fills it, and what that is doing."""

    actor: Any
    doing: Any = None  # a reference to what will come of it
    task: Task | None = None
    is_loaded: bool = False
    loading_deaths: int = 0


@dataclass
class Crew:
    """Workers on Ray that hold the same model; a worker that dies is replaced, and its task repeated.

    Args:
        settled: how many workers, and what of the machine each gets.
        model, loading, explaining: as in `Worker.load`.
        worker: what the processes hold.

    Attributes:
        facts: of the model, once a worker has loaded it.
        is_closed: whether its workers have been ended.
    """

    settled: Settled
    model: str
    loading: Mapping[str, Any]
    explaining: Mapping[str, Any]
    worker: type = Worker
    facts: dict[str, Any] | None = None
    is_closed: bool = False
    _members: list[_Member] = field(default_factory=list)
    _again: deque[Task] = field(default_factory=deque)
    _lost: list[Exception] = field(default_factory=list)  # why workers were given up, until it is told
    _fruitless: int = 0
    _told: bool = False

    def __post_init__(self) -> None:
        self._ray = extra.ray("scale")
        self._actor = self._ray.remote(self.worker).options(num_cpus=self.settled.cpus, num_gpus=self.settled.gpus)

    def run(self, next_task: Callable[[], Task | None], most: int | None = None) -> Iterator[tuple[Task, Any]]:
        """Yields tasks with what came of them, in the order in which they are done.

        Args:
            next_task: asked whenever a worker is free; None: nothing to do until something else is done.
            most: how many workers are of use at most.

        Raises:
            InputError, UnsupportedModelError: what a worker raised while it loaded the model or in a task.
            RuntimeError: workers die of everything, or cannot start.
        """
        wanted = self.settled.workers if most is None else min(self.settled.workers, most)
        while len(self._members) < wanted:
            self._members.append(self._started())
        try:
            while True:
                idle = [member for member in self._members if member.is_loaded and member.doing is None]
                all_busy = all(self._employ(member, next_task) for member in idle)
                if not all_busy and not any(member.task for member in self._members):
                    return
                busy = {member.doing: member for member in self._members if member.doing is not None}
                ready, _ = self._ray.wait(list(busy), num_returns=1, timeout=PATIENCE)
                if not ready:
                    self._tell_of_waiting()
                for reference in ready:
                    yield from self._outcome(busy[reference])
        finally:  # where this did not come to its end, nothing may come of it later
            self._again.clear()
            for member in [member for member in self._members if member.task is not None]:
                self._end(member)
                self._members.remove(member)

    @property
    def is_complete(self) -> bool:
        """Whether every worker holds the model."""
        return sum(member.is_loaded for member in self._members) == self.settled.workers

    def close(self) -> None:
        """Ends the workers."""
        self.is_closed = True
        for member in self._members:
            self._end(member)
        self._members.clear()

    def _started(self) -> _Member:
        member = _Member(self._actor.remote())
        member.doing = member.actor.load.remote(self.model, self.settled.cpus, self.loading, self.explaining)
        return member

    def _employ(self, member: _Member, next_task: Callable[[], Task | None]) -> bool:
        """Whether there was something to do."""
        task = self._again.popleft() if self._again else next_task()
        if task is not None:
            member.task = task
            member.doing = getattr(member.actor, task.method).remote(*task.arguments)
        return task is not None

    def _outcome(self, member: _Member) -> Iterator[tuple[Task, Any]]:
        """What a worker's call came to."""
        errors = self._ray.exceptions
        reference, task = member.doing, member.task
        member.doing = member.task = None
        try:
            value = self._ray.get(reference)
        except errors.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if isinstance(cause, DeviceLostError):
                yield from self._replace(member, task, str(cause))
            elif task is not None:
                raise cause from None
            else:
                self._give_up(member, cause)
        except (
            errors.RayActorError, errors.OutOfMemoryError, errors.NodeDiedError, errors.WorkerCrashedError,
            errors.ObjectLostError,
        ) as error:  # fmt: skip
            yield from self._replace(member, task, _reason(error))
        else:
            if task is None:
                self._check_facts(value)
                member.is_loaded, member.loading_deaths = True, 0
                self._tell_of_lost()
            else:
                self._fruitless = 0
                yield task, value

    def _replace(self, member: _Member, task: Task | None, reason: str) -> Iterator[tuple[Task, Any]]:
        """A new process in a dead one's place; the task comes again, unless too many have died of it."""
        self._end(member)
        self._fruitless += 1
        if self._fruitless >= MOST_FRUITLESS_DEATHS:
            raise RuntimeError(f"{self._fruitless} workers died one after the other, the last with: {reason}")
        deaths = member.loading_deaths + (task is None)
        if deaths >= MOST_LOADING_DEATHS:
            self._give_up(member, RuntimeError(f"a worker died {deaths} times while it loaded the model: {reason}"))
        else:
            fresh = self._started()
            member.actor, member.doing, member.is_loaded = fresh.actor, fresh.doing, False
            member.loading_deaths = deaths
        if task is not None:
            task.deaths += 1
            if task.deaths < task.most_deaths:
                self._again.append(task)
            else:
                yield task, Died(reason)

    def _give_up(self, member: _Member, cause: Exception) -> None:
        """Goes on without a worker that cannot load the model; raises the first one's reason if none can."""
        self._end(member)
        self._members.remove(member)
        self._lost.append(cause)
        if not self._members:
            raise self._lost[0] from None
        if self.facts is not None:
            self._tell_of_lost()

    def _tell_of_lost(self) -> None:
        if self._lost:
            some = f"{len(self._lost)} of {self.settled.workers} workers could not load the model and are left out"
            warnings.warn(f"{some}: {self._lost[0]}", stacklevel=2)
            self._lost.clear()

    def _check_facts(self, facts: dict[str, Any]) -> None:
        """Raises InputError if workers would give different results."""
        own = atman_kernels.__version__
        if facts["versions"]["atman_kernels"] != own:
            raise InputError(f"workers have atman-kernels {facts['versions']['atman_kernels']}, this process has {own}")
        if self.facts is None:
            self.facts = facts
        for name, value in self.facts.items():
            if facts[name] != value:
                raise InputError(f"workers would disagree: {name} is {value} on one and {facts[name]} on another")

    def _tell_of_waiting(self) -> None:
        if self.facts is None and not self._told:
            self._told = True
            there = self._ray.cluster_resources()
            warnings.warn(
                f"no worker has loaded the model yet; each of {self.settled.workers} asks for {self.settled.cpus} CPUs "
                f"and {self.settled.gpus:g} GPUs, Ray has {there.get('CPU', 0):g} and {there.get('GPU', 0):g}",
                stacklevel=2,
            )

    def _end(self, member: _Member) -> None:
        self._ray.kill(member.actor, no_restart=True)


def _reason(error: Exception) -> str:
    """What Ray says of a death, in a line; of one before it was there, what its own process said."""
    lines = [line.strip() for line in re.sub(r"\x1b\[\d*m", "", str(error)).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1] if "creation task" in lines[0] else lines[0]
