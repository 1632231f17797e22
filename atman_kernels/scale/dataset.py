"""`explain_dataset`: every row of a data set explained, on as many workers as there are."""

import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from tqdm.auto import tqdm

import atman_kernels
from atman_kernels import Explainer, arguments
from atman_kernels.errors import InputError
from atman_kernels.scale import extra
from atman_kernels.scale.cluster import Share, cluster
from atman_kernels.scale.crew import Crew, Died, Task
from atman_kernels.scale.options import model_name, sorted_options
from atman_kernels.scale.results import Output
from atman_kernels.scale.source import Id, Row, Source
from atman_kernels.scale.worker import failed

DEATHS_OF_SEVERAL = 2  # processes that may die of several rows; then each row comes alone, for three more
SAME_FAILURES = 20  # of the first rows, none of which was explained: then it is not the rows


@dataclass(frozen=True)
class DatasetRun:
    """What became of a data set.

    Attributes:
        output: the folder with the results.
        rows: of the data set.
        explained: rows of these that this run explained.
        failed: rows, of this run and those before it, that have an error in place of an explanation.
        seconds: of this run.

    Example:
        >>> DatasetRun("out", rows=3, explained=3, failed=1, seconds=0.5).failed
        1
    """

    output: str
    rows: int
    explained: int
    failed: int
    seconds: float


def explain_dataset(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str],
    id_column: str = "id",
    prompt_column: str = "prompt",
    target_column: str | None = None,
    units: str = "token",
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    cpus_per_worker: int | None = None,
    address: str | None = None,
    prompts_per_task: int = 8,
    progress: bool = True,
    **options: Any,
) -> DatasetRun:
    """Explain every row of a data set on Ray workers that each load the model once.

    Results are Parquet files in `output`, one row per prompt; `read_results` reads them. Called again after it was
    stopped, however that was, it goes on with the rows that are not there yet. A row that cannot be explained has an
    `error`, and a worker that dies is replaced. This process alone reads the data set and writes the results, so
    workers need no access to either.

    Args:
        source: a Parquet, JSON lines or CSV file, a folder of one of these, or one saved by the library `datasets`.
        output: a folder on a local or mounted disk: a new one, or that of the run to go on with.
        model: hub id, folder, GGUF file or "smollm2", as `load_model` takes it; workers must find it where they run.
        id_column: texts or integers, each once.
        prompt_column: texts or lists of chat messages.
        target_column: the answers to explain; where there is none, the model's own is.
        units: "token" | "word" | "sentence" | "paragraph".
        workers: processes with a model each; None: one for every GPU, else one.
        gpus_per_worker: None: 1 where there are GPUs.
        cpus_per_worker: and threads; None: 1 beside a GPU, else this machine's cores by the workers.
        address: of a running Ray cluster, or "auto"; None starts Ray on this machine, for this call, at the loopback
            address.
        prompts_per_task: rows that go to a worker together and share packs.
        progress: show a progress bar.
        options: of `load_model` (dtype, device, ...), `Explainer` (mode, factor, layers, ...) and
            `Explainer.explain_batch` (chat, method, max_new_tokens, ...), by name.

    Returns:
        A `DatasetRun`.

    Raises:
        InputError: an argument or the data set does not fit, or output holds something else than such results. Nothing
            is written then.
        UnsupportedModelError: the model cannot be explained.
        ImportError: the extra `ray` is not installed; the message names it.
        RuntimeError: workers cannot start, or die of everything.

    Example:
        >>> explain_dataset("prompts.parquet", "out", model="smollm2", units="word", workers=2)  # doctest: +SKIP
        DatasetRun(output='out', rows=1000, explained=1000, failed=0, seconds=412.8)
    """
    started = time.perf_counter()
    extra.ray("explain_dataset")  # before anything else is done for nothing
    share = Share(workers, gpus_per_worker, cpus_per_worker)
    size = arguments.integer(prompts_per_task, "prompts_per_task", least=1)
    progress = arguments.flag(progress, "progress")
    chosen = sorted_options(options, units, Explainer.explain_batch)
    name = model_name(model)
    data = Source(source, id_column, prompt_column, target_column)
    fingerprints = data.fingerprints()
    settings = {
        "model": name, "id_column": id_column, "prompt_column": prompt_column, "target_column": target_column,
        "options": {key: dict(part) for key, part in chosen._asdict().items()},
        "atman_kernels": atman_kernels.__version__,
    }  # fmt: skip
    with closing(Output(output, settings, type(next(iter(fingerprints))))) as results:
        left = rows_left(fingerprints, results.fingerprints)
        if left:
            rows = (row for row in data.rows() if row.id in left)
            with (
                cluster(address, share, "explain_dataset") as settled,
                closing(Crew(settled, name, settled.placed(chosen.loading), chosen.explaining)) as crew,
            ):
                Run(crew, results, Queue(rows, size, chosen.asking), len(left), len(fingerprints)).go(progress)
    seconds = time.perf_counter() - started
    return DatasetRun(os.fspath(output), len(fingerprints), len(left), results.failed, seconds)


def rows_left(there: Mapping[Id, str], done: Mapping[Id, str]) -> set[Id]:
    """Ids of the rows to do.

    Raises:
        InputError: a row that is done has another prompt or target by now.
    """
    for key in there.keys() & done.keys():
        if there[key] != done[key]:
            raise InputError(
                f"the row with id {key!r} has another prompt or target than when it was explained; give another output"
            )
    return there.keys() - done.keys()


class Workers(Protocol):
    """What does tasks: a `Crew`, or this process."""

    facts: dict[str, Any] | None

    def run(self, next_task: Callable[[], Task | None], most: int | None = None) -> Iterator[tuple[Task, Any]]:
        """Each task with what came of it, in the order in which they end."""


class Results(Protocol):
    """Where rows go: an `Output`, or nowhere."""

    id_column: str
    failed: int
    fingerprints: dict[Id, str]

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Called once before the first rows, with what holds for all of them."""

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keeps rows that are done."""


@dataclass
class Queue:
    """Rows as tasks: some at a time from the data set, and one by one what came back."""

    rows: Iterator[Row]
    size: int
    asking: Mapping[str, Any]
    returned: deque[Row] = field(default_factory=deque)

    def next(self) -> Task | None:
        """The next task; None when no row is left."""
        if self.returned:
            return Task("explain", ([self.returned.popleft()], self.asking))
        some = list(islice(self.rows, self.size))
        return Task("explain", (some, self.asking), DEATHS_OF_SEVERAL if len(some) > 1 else 3) if some else None


@dataclass
class Run:
    """The rows that are left, on their way through the crew into the results."""

    crew: Workers
    results: Results
    queue: Queue
    left: int
    total: int
    held: list[dict[str, Any]] | None = field(default_factory=list)  # first failures, until a row is explained
    warned: set[str] = field(default_factory=set)

    def go(self, progress: bool) -> None:
        """Explains what is left, with a bar if `progress`."""
        done, tasks = self.total - self.left, -(-self.left // self.queue.size)
        with tqdm(
            total=self.total, initial=done, unit="row", desc="explaining", disable=not progress, smoothing=0.05
        ) as bar:
            for task, outcome in self.crew.run(self.queue.next, tasks):
                rows = self._finished(task, outcome)
                self._keep(rows)
                bar.update(len(rows))
                if self.results.failed:
                    bar.set_postfix(failed=self.results.failed, refresh=False)
        self._keep_held()

    def _finished(self, task: Task, outcome: Any) -> list[dict[str, Any]]:
        """What a task brought; rows that processes died of come again one by one, then fail."""
        rows: list[Row] = task.arguments[0]
        if not isinstance(outcome, Died):
            found: list[dict[str, Any]]
            found, messages = outcome
            for message in messages:
                if message not in self.warned:
                    self.warned.add(message)
                    warnings.warn(message, stacklevel=2)
            return found
        if len(rows) > 1:
            self.queue.returned.extend(rows)
            return []
        return [failed(rows[0], f"the worker died {task.deaths} times on this row: {outcome.reason}")]

    def _keep(self, rows: list[dict[str, Any]]) -> None:
        """Into the results, once there is a model and it explains something.

        Raises:
            InputError: it is not the rows' fault that none is explained.
        """
        if not rows:
            return
        if self.held is None:
            self._add(rows)
            return
        self.held += rows
        errors = [row["error"] for row in self.held if row.get("error")]
        if len(errors) < len(self.held):
            self._keep_held()
        elif len(errors) >= SAME_FAILURES and len(set(errors)) == 1:
            raise InputError(f"none of the first {len(errors)} rows could be explained: {errors[0]}")

    def _keep_held(self) -> None:
        held, self.held = self.held, None
        if held:
            self._add(held)

    def _add(self, rows: list[dict[str, Any]]) -> None:
        if self.crew.facts is not None:
            self.results.begin(self.crew.facts)
        own = self.results.id_column
        self.results.add([{own if name == "id" else name: value for name, value in row.items()} for row in rows])
