"""How a model may be loaded to be explained, and how exactly it then is: a table written by trying every way.

    python tools/loading_table.py               tries all, writes docs/loading.json and the table in docs/loading.md
    python tools/loading_table.py nf4 LoRA      tries those whose name holds a word, and prints what came out
    python tools/loading_table.py --update nf4  … and replaces their rows

`loading_trials.WAYS` says which ways there are, and how one is tried.
"""

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python_tests" / "support"))
import loading_trials
import torch
from loading_trials import WAYS, Result, Way

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- written by tools/loading_table.py: begin -->", "<!-- end -->"
PACKAGES = ("torch", "transformers", "accelerate", "peft", "torchao", "optimum-quanto", "bitsandbytes")


def tried(ways: Iterable[Way]) -> list[Result]:
    """What came of each way in each of its dtypes, printed as it comes."""
    results = []
    for way in ways:
        for dtype in way.dtypes:
            results.append(loading_trials.tried(way, dtype))
            print(_row(results[-1]), flush=True)
    return results


def table(record: dict) -> str:
    """What stands between the markers; `record` is what docs/loading.json holds."""
    results = [Result(**row) for row in record["results"]]
    versions = ", ".join(f"{name} {found}" for name, found in record["versions"].items())
    lines = [BEGIN, "", f"With {versions}."]
    for group in dict.fromkeys(r.group for r in results):
        lines += [
            "",
            f"| {group} | dtype | state | own noise | to full rows | to eager | largest score | remark |",
            "|---|---|---|---|---|---|---|---|",
            *(_row(r) for r in results if r.group == group),
        ]
    return "\n".join([*lines, "", END])


def _row(r: Result) -> str:
    small = ["" if x is None else f"{x:.0e}" for x in (r.noise, r.full, r.eager)]
    size = "" if r.size is None else f"{r.size:.2g}"
    cells = [r.way, r.dtype, r.state, *small, size, r.remark.replace("|", "\\|").replace("<", "&lt;")]
    cells[0] = cells[0].replace("|", "\\|")
    return "| " + " | ".join(cells) + " |"


def versions() -> dict[str, str]:
    """Of what is installed."""
    found = {package: loading_trials.installed(package) for package in PACKAGES}
    return {package: number for package, number in found.items() if number is not None}


def write(results: list[Result], root: Path = ROOT) -> None:
    """Replace the record and the table."""
    record = {"versions": versions(), "results": [asdict(r) for r in results]}
    (root / "docs" / "loading.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    page = root / "docs" / "loading.md"
    before, rest = page.read_text(encoding="utf-8").split(BEGIN, 1)
    page.write_text(before + table(record) + rest.split(END, 1)[1], encoding="utf-8")


def update(results: list[Result], root: Path = ROOT) -> None:
    """Replace the rows of some ways; the others must be of the same versions."""
    record = json.loads((root / "docs" / "loading.json").read_text(encoding="utf-8"))
    if record["versions"] != versions():
        raise SystemExit(f"the table is of {record['versions']}, here are {versions()}; run all of it")
    new = {(r.way, r.dtype): r for r in [*(Result(**row) for row in record["results"]), *results]}
    places = [(way.name, dtype) for way in WAYS for dtype in way.dtypes]
    write([new[place] for place in places if place in new], root)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="of the ways' names, to print only; all if none is given")
    parser.add_argument("--update", action="store_true", help="write the rows of the named ways, too")
    arguments = parser.parse_args()
    if arguments.update and not arguments.words:
        parser.error("--update is for ways that are named; without any, the whole table is written")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)  # the model is tiny
    chosen = [way for way in WAYS if not arguments.words or any(word in way.name for word in arguments.words)]
    if not chosen:
        parser.error(f"no way's name holds any of {', '.join(arguments.words)}")
    results = tried(chosen)
    if arguments.update:
        update(results)
    elif not arguments.words:
        write(results)
    return int(any(r.state == "wrong" for r in results))


if __name__ == "__main__":
    sys.exit(main())
