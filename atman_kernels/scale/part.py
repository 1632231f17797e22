"""`explain_part`: rows of a data set explained in this process, or in a group of processes that share a model."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

import atman_kernels
from atman_kernels import Explainer, arguments
from atman_kernels.errors import InputError
from atman_kernels.hf.models.ranks import Ranks
from atman_kernels.scale.crew import Task
from atman_kernels.scale.dataset import DatasetRun, Queue, Results, Run, rows_left
from atman_kernels.scale.options import sorted_options
from atman_kernels.scale.results import Output
from atman_kernels.scale.source import Id, Source
from atman_kernels.scale.worker import Worker, facts_of


def explain_part(
    explainer: Explainer,
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    part: int = 0,
    parts: int = 1,
    id_column: str = "id",
    prompt_column: str = "prompt",
    target_column: str | None = None,
    units: str = "token",
    prompts_per_task: int = 8,
    progress: bool = True,
    **options: Any,
) -> DatasetRun:
    """As `explain_dataset`, without Ray: with an explainer that is there, for every parts-th row.

    In processes that `torchrun` started, with a model sharded over them, all of them call this: they explain every row
    together, and the first one reads and writes the results.

    Args:
        explainer: of any model that it takes, however that was loaded.
        source, id_column, prompt_column, target_column, units, prompts_per_task, progress: as in `explain_dataset`.
        output: a folder for this part alone; with a folder around those of all parts, `read_results` reads them all.
        part: which of the parts, from 0.
        parts: how many there are.
        options: of `Explainer.explain_batch`, by name.

    Returns:
        A `DatasetRun`, in every process of a group; rows are those of the part.

    Raises:
        InputError: as in `explain_dataset`; also where the processes of a group were given different things.
        ImportError: pyarrow is not installed; the message names the extra.

    Example:
        >>> explain_part(explainer, "prompts.jsonl", "out/3", part=3, parts=16)         # doctest: +SKIP
        DatasetRun(output='out/3', rows=63, explained=63, failed=0, seconds=20.1)
    """
    started = time.perf_counter()
    parts = arguments.integer(parts, "parts", least=1)
    part = arguments.integer(part, "part", least=0, most=parts - 1)
    size = arguments.integer(prompts_per_task, "prompts_per_task", least=1)
    progress = arguments.flag(progress, "progress")
    ranks = explainer.ranks
    with ExitStack() as stack:
        results: Results = _Nowhere(id_column)
        with ranks.in_step("explain_part"):
            asking = _asking(options, units)
            data = Source(source, id_column, prompt_column, target_column)
            there = dict(islice(data.fingerprints().items(), part, None, parts))
            settings = {
                "model": getattr(explainer.model.config, "name_or_path", "") or type(explainer.model).__name__,
                "id_column": id_column, "prompt_column": prompt_column, "target_column": target_column,
                "explainer": explainer.suppression, "options": asking, "part": part, "parts": parts,
                "atman_kernels": atman_kernels.__version__,
            }  # fmt: skip
            ranks.agree("a data set", settings=settings, rows=list(there.items()))
            left: set[Id] = set()
            if ranks.own == 0 and there:
                results = stack.enter_context(closing(Output(output, settings, type(next(iter(there))))))
                left = rows_left(there, results.fingerprints)
            ranks.agree("the results that are there")
            left = _of_the_first(ranks, list(there), left)
        if left:
            rows = (row for row in data.rows() if row.id in left)
            crew = _Here(explainer, in_step=ranks.size > 1)
            Run(crew, results, Queue(rows, size, asking), len(left), len(there)).go(progress and ranks.own == 0)
    return DatasetRun(os.fspath(output), len(there), len(left), results.failed, time.perf_counter() - started)


def _asking(options: Mapping[str, Any], units: str) -> dict[str, Any]:
    chosen = sorted_options(options, units, Explainer.explain_batch)
    early = [name for name in options if name not in chosen.asking]
    if early:
        raise InputError(f"{early[0]} was settled when the explainer was made")
    return chosen.asking


class _Here:
    """This process in place of a crew: it holds the model, or a part of it."""

    def __init__(self, explainer: Explainer, in_step: bool) -> None:
        self.worker = Worker()
        self.worker.explainer, self.worker.in_step = explainer, in_step
        self.facts: dict[str, Any] | None = facts_of(explainer.model)

    def run(self, next_task: Callable[[], Task | None], most: int | None = None) -> Iterator[tuple[Task, Any]]:
        while (task := next_task()) is not None:
            yield task, getattr(self.worker, task.method)(*task.arguments)


@dataclass
class _Nowhere:
    """Results of a process that is not the first of its group: only counted."""

    id_column: str
    failed: int = 0
    fingerprints: dict[Id, str] = field(default_factory=dict)

    def begin(self, facts: Mapping[str, Any]) -> None:
        pass

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.failed += sum(row.get("error") is not None for row in rows)


def _of_the_first(ranks: Ranks, keys: Sequence[Id], chosen: set[Id]) -> set[Id]:
    """Which of the keys the first rank has chosen."""
    marks = torch.tensor([key in chosen for key in keys], dtype=torch.uint8, device="cpu")
    marks = ranks.shared(marks, of_the_first=True) if keys else marks
    return {key for key, mark in zip(keys, marks.tolist(), strict=True) if mark}
