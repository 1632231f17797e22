"""Two workers of one thread against one: rows of a data set per second, and one prompt's variants split over both.

    python -m benchmarks.scale --output benchmarks/results

`rows`: of questions about one paragraph each, words as units, two to a task. `pool`: one prompt, tokens as units, all
of them exactly and the 16 strongest; ideal is what one worker takes for it by itself, divided by the workers. Scores of
both are compared. Processor time stands beside the time that passed: on a machine that does other things, too, it says
more. On two cores of an Intel Xeon with AMX `--rows 8 --tokens 256` takes three minutes, the defaults several
times as long.
"""

import json
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import click
import psutil
import torch

from atman_kernels import load_model
from atman_kernels.scale import Pool
from atman_kernels.scale.cluster import Settled, Share, cluster
from atman_kernels.scale.crew import Crew, Task
from atman_kernels.scale.source import Row
from benchmarks.machine import cpu_slug, environment
from benchmarks.prompts import OWN, find_squad, long_case, questions

WORKERS = 2
DEPTHS = {"all": None, "exact=16": 16}
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}  # of scores, in nats


def worker_seconds() -> float:
    """Processor time of all workers of this process."""
    spent = 0.0
    for process in psutil.Process().children(recursive=True):
        if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::"):
            times = process.cpu_times()
            spent += times.user + times.system
    return spent


@contextmanager
def timed(measured: dict[str, float]) -> Iterator[None]:
    before, started = worker_seconds(), time.perf_counter()
    yield
    measured["seconds"] = time.perf_counter() - started
    measured["processor_seconds"] = worker_seconds() - before
    click.echo(f"{measured}", err=True)


def done(crew: Crew, tasks: list[Task]) -> list[Any]:
    """What came of tasks, in their order."""
    waiting = list(tasks)
    found = {id(task): outcome for task, outcome in crew.run(lambda: waiting.pop(0) if waiting else None)}
    return [found[id(task)] for task in tasks]


def of_crew(workers: int, model: str, dtype: str, rows: list[Row], long: Row | None) -> dict[str, Any]:
    """Rows on so many workers, and a whole prompt by one."""
    measured: dict[str, Any] = {"rows": {}}
    with closing(Crew(Settled(workers, 0, 1), model, {"dtype": dtype, "device": "cpu"}, {})) as crew:
        while not crew.is_complete:  # every worker has the model, and has run it
            done(crew, [Task("explain", (rows[:1], {"units": "sentence"})) for _ in range(workers)])
        tasks = [Task("explain", (rows[i : i + 2], {"units": "word"})) for i in range(0, len(rows), 2)]
        with timed(measured["rows"]):
            done(crew, tasks)
        for name, exact in DEPTHS.items() if long else ():
            measured[name] = {}
            with timed(measured[name]):
                (((explained,), _),) = done(crew, [Task("explain", ([long], {"units": "token", "exact": exact}))])
            measured[name]["scores"] = explained["scores"]
    return measured


def of_pool(model: str, dtype: str, long: Row) -> dict[str, Any]:
    measured: dict[str, Any] = {}
    with Pool(model, WORKERS, gpus_per_worker=0, cpus_per_worker=1, dtype=dtype, device="cpu") as pool:
        while not pool._crew.is_complete:
            pool.explain(OWN.prompt, OWN.target, "sentence")
        for name, exact in DEPTHS.items():
            measured[name] = {}
            with timed(measured[name]):
                found = pool.explain(long.prompt, long.target, exact=exact)
            measured[name]["scores"] = found.scores.tolist()
    return measured


def compared(alone: dict[str, Any], pooled: dict[str, Any], dtype: str) -> dict[str, Any]:
    """One worker and the pool over the same prompt."""
    one, both = (torch.tensor(measured.pop("scores")) for measured in (alone, pooled))
    apart = float((one - both).abs().max())
    if dtype in TOLERANCE and apart > TOLERANCE[dtype] and len(one) == len(both):
        click.echo(f"scores differ by up to {apart:.2g} nats", err=True)
    return {
        "one worker": alone,
        "pool": pooled,
        "speed-up": alone["seconds"] / pooled["seconds"],
        "over ideal": pooled["seconds"] / (alone["seconds"] / WORKERS) - 1,
        "more work": pooled["processor_seconds"] / alone["processor_seconds"] - 1,
        "largest difference of scores": apart,
    }


@click.command()
@click.option("--model", default="smollm2")
@click.option("--dtype", default="bfloat16")
@click.option("--rows", default=32, help="Of the data set.")
@click.option("--tokens", default=512, help="Of the prompt whose variants are split.")
@click.option("--squad")
@click.option("--output", metavar="FOLDER", help="Also write scale-<processor>.json there.")
def main(model: str, dtype: str, rows: int, tokens: int, squad: str | None, output: str | None) -> None:
    file = find_squad(squad)
    asked = list(islice(questions(file, per_paragraph=1), rows)) if file else [OWN] * rows
    data = [Row(i, question.prompt, question.target) for i, question in enumerate(asked)]
    case = long_case(load_model(model, dtype=dtype)[1], tokens, file)
    long = Row("long", case.prompt, case.target)
    facts = environment() | {"threads": 1, "model": model, "dtype": dtype, "rows": rows, "tokens": tokens}
    with cluster(None, Share(workers=WORKERS, gpus=0, cpus=1), "benchmarks.scale"):
        one = of_crew(1, model, dtype, data, long)
        two = of_crew(WORKERS, model, dtype, data, None)
        pooled = of_pool(model, dtype, long)
    results: dict[str, Any] = {
        "rows": {
            "one worker": one["rows"] | {"rows per second": rows / one["rows"]["seconds"]},
            "two workers": two["rows"] | {"rows per second": rows / two["rows"]["seconds"]},
            "speed-up": one["rows"]["seconds"] / two["rows"]["seconds"],
            "more work": two["rows"]["processor_seconds"] / one["rows"]["processor_seconds"] - 1,
        },
        "pool": {name: compared(one[name], pooled[name], dtype) for name in DEPTHS},
        "environment": facts,
    }
    print(json.dumps(results, indent=2))
    if output:
        name = f"scale-{cpu_slug()}.json"
        Path(output, name).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
