"""Time and peak memory of explanation methods over model size and prompt length.

python -m benchmarks.scaling                                        # 135M to 1.5B, 128 to 1024 tokens, on a CPU
python -m benchmarks.scaling --device cuda --dtype bfloat16 --size 1B --size 8B --size 32B
python -m benchmarks.scaling --figure-only                          # draw again what was measured

Every cell runs in a process of its own. The result file is written after each; a run that was stopped goes on
where it was, and cells that failed are tried again with --retry.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.machine import REPOSITORY, RESULTS, cpu_slug, environment, gpu_environment, gpu_slug
from benchmarks.scaling.cell import Cell
from benchmarks.scaling.figure import draw
from benchmarks.scaling.models import SIZES
from benchmarks.scaling.work import FACTOR, IG_STEPS, METHODS, MODE

PATIENCE = 10  # budgets, and as many minutes for loading, after which a cell is given up


def run_cell(cell: Cell) -> dict[str, Any]:
    """The record of one cell, whatever becomes of its process."""
    command = [sys.executable, "-m", "benchmarks.scaling.cell", json.dumps(asdict(cell))]
    patience = PATIENCE * (cell.budget + 60)
    failed = {"parameters": parameters(cell.size)}
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=patience, check=False)
    except subprocess.TimeoutExpired:
        return failed | {"status": f"longer than {patience:.0f} s"}
    if done.returncode < 0:
        return failed | {"status": f"killed by signal {-done.returncode}"}  # 9: by the kernel, for memory
    if done.returncode:
        return failed | {"status": "failed", "error": (done.stderr.strip() or "no message").splitlines()[-1]}
    return failed | json.loads(done.stdout.splitlines()[-1])


def parameters(name: str) -> int:
    """Of a size, without building it."""
    size = SIZES[name]
    head = size.hidden // size.heads
    attention = size.hidden * head * (2 * size.heads + 2 * size.kv_heads)
    layer = attention + 3 * size.hidden * size.intermediate + 2 * size.hidden
    return size.layers * layer + size.hidden + size.vocabulary * size.hidden * (1 if size.tied else 2)


def load(path: Path) -> dict[str, Any]:
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    return {"benchmark": "scaling", "mode": MODE, "factor": FACTOR, "ig_steps": IG_STEPS, "cells": []}


def store(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def is_same(record: dict[str, Any], cell: Cell) -> bool:
    return all(record.get(name) == value for name, value in asdict(cell).items())


def described(record: dict[str, Any]) -> str:
    where = f"{record['size']:>5} {record['tokens']:>5} tokens  {record['method']:<20}"
    if record["status"] != "ok":
        return f"{where}  {record['status']} {record.get('error', '')}"
    mark = "≈" if record["measured"] < record["total"] else " "
    peak = record["peak_bytes"]
    return f"{where} {mark}{record['seconds']:10.2f} s  {'?' if peak is None else f'{peak / 1e9:.2f}'} GB"


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--size", "sizes", type=click.Choice(list(SIZES)), multiple=True, default=("135M", "360M", "1B", "1.5B"))
@click.option("--tokens", "lengths", type=click.IntRange(min=8), multiple=True, default=(128, 256, 512, 1024))
@click.option("--method", "methods", type=click.Choice(METHODS), multiple=True, default=METHODS)
@click.option("--target-tokens", type=click.IntRange(min=1), default=1, help="A backward pass for each.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32")
@click.option("--device", default="cpu")
@click.option("--budget", type=click.FloatRange(min=0), default=120.0, help="Seconds for a cell, loading apart.")
@click.option("--token-budget", type=click.IntRange(min=1), help="Of ours.  [default: what memory allows]")
@click.option("--threads", type=click.IntRange(min=1), default=torch.get_num_threads())
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="[default: results/scaling-….json]")
@click.option("--retry", is_flag=True, help="Measure again what failed.")
@click.option("--figure-only", is_flag=True, help="Measure nothing.")
def main(
    sizes: tuple[str, ...], lengths: tuple[int, ...], methods: tuple[str, ...], device: str, output: Path | None,
    retry: bool, figure_only: bool, **settings: Any,
) -> None:  # fmt: skip
    slug = gpu_slug() if device.startswith("cuda") else cpu_slug()
    path = output or RESULTS / f"scaling-{slug}.json"
    result = load(path)
    for size, tokens, method in product(() if figure_only else sizes, lengths, methods):
        cell = Cell(method=method, size=size, tokens=tokens, device=device, **settings)
        known = next((record for record in result["cells"] if is_same(record, cell)), None)
        if known is not None:
            if known["status"] == "ok" or not retry:
                continue
            result["cells"].remove(known)
        now = environment()
        result["environment"] = now | ({"gpu": gpu_environment()} if device.startswith("cuda") else {})
        when = {name: now[name] for name in ("date", "commit", "load_average")}
        record = asdict(cell) | run_cell(cell) | when
        result["cells"].append(record)
        store(path, result)
        click.echo(described(record))
    if not result["cells"]:
        raise click.UsageError(f"{path} has no cells to draw")
    draw(result, path.with_suffix(".png"))
    click.echo(f"{path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
