"""Which families of transformers this package serves, and how exactly: a table written by running them all.

    python tools/coverage_table.py                            runs all, writes docs/coverage.json, a page per
                                                                     kind in docs/coverage, and coverage.md's summary
    python tools/coverage_table.py --kind image-classifiers   runs one kind, writes its part of them
    python tools/coverage_table.py llama mpt                  runs some families and prints what came out
    python tools/coverage_table.py --update llama mpt         … and replaces their rows

`KINDS` says which families there are of each kind of model; how one is tried stands in `coverage_trials`.
"""

import argparse
import contextlib
import gc
import json
import logging
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python_tests" / "support"))
import coverage_trials
import torch
import transformers
from coverage_trials import STATES, Result, Trial
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- written by tools/coverage_table.py: begin -->", "<!-- end -->"
SECONDS = 180  # for one family


@dataclass(frozen=True)
class Entry:
    """A family in a table of transformers: its kind, a key of `CONFIG_MAPPING`, and the name of a model class."""

    kind: str
    key: str
    model: str


@dataclass(frozen=True)
class Kind:
    """Models of one kind.

    Attributes:
        tables: transformers' tables of their classes, by the middle of the name; none: all families in no other kind.
        trial_of: how one of them is tried.
        measured: what a score is a fall of.
        headless: whether the body of these classes is meant, without its head.
    """

    tables: tuple[str, ...]
    trial_of: Callable[..., Trial]
    measured: str
    headless: bool = False


KINDS = {
    "text decoders": Kind(("CAUSAL_LM",), coverage_trials.text_decoder, "log-probability of an answer's tokens"),
    "text classifiers": Kind(
        ("SEQUENCE_CLASSIFICATION",), coverage_trials.text_classifier, "log-probability of a label"
    ),
    "embedding models": Kind(
        ("MASKED_LM", "TEXT_ENCODING"),
        coverage_trials.embedding_model,
        "cosine with another text's embedding",
        headless=True,
    ),
    "image classifiers": Kind(
        ("IMAGE_CLASSIFICATION",), coverage_trials.image_classifier, "log-probability of a label"
    ),
    "dual encoders": Kind(
        ("ZERO_SHOT_IMAGE_CLASSIFICATION",), coverage_trials.dual_encoder, "log-probability of a text for a picture"
    ),
    "encoder-decoders": Kind(
        ("SEQ_TO_SEQ_CAUSAL_LM",), coverage_trials.encoder_decoder, "log-probability of a target's tokens"
    ),
    "speech models": Kind(
        ("SPEECH_SEQ_2_SEQ",), coverage_trials.speech_model, "log-probability of a transcript's tokens"
    ),
    "image-text models": Kind(
        ("IMAGE_TEXT_TO_TEXT",), coverage_trials.image_text_model, "log-probability of an answer's tokens"
    ),
    "other models": Kind((), coverage_trials.other_model, "cosine with another text's embedding"),
}


def entries(kind: str, only: set[str]) -> Iterator[Entry]:
    """The families of a kind, each class once; `only` names some of them, empty for all."""
    seen = set()
    for key, models in _listed(kind):
        config = CONFIG_MAPPING[key]
        for model in (models,) if isinstance(models, str) else models:
            if (config, model) not in seen and (not only or only & {key, config.model_type}):
                seen.add((config, model))
                yield Entry(kind, key, model)


def _listed(kind: str) -> Iterator[tuple[str, str | tuple[str, ...]]]:
    """Keys of `CONFIG_MAPPING` with the names of their classes."""
    bodies = modeling_auto.MODEL_MAPPING_NAMES
    if not KINDS[kind].tables:
        yield from _others()
    for table in KINDS[kind].tables:
        for key, models in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").items():
            yield key, bodies.get(key, ()) if KINDS[kind].headless else models


def _others() -> Iterator[tuple[str, str | tuple[str, ...]]]:
    """What no kind has: the body of each, or the first class with a head where there is no such body."""
    named = {key for kind in KINDS if KINDS[kind].tables for key, models in _listed(kind) if models}
    known = {CONFIG_MAPPING[key].model_type for key in named}
    for table in [name for name in vars(modeling_auto) if name.startswith("MODEL_") and name.endswith("MAPPING_NAMES")]:
        for key, models in getattr(modeling_auto, table).items():
            if (
                key in CONFIG_MAPPING
                and isinstance(models, str | tuple)
                and CONFIG_MAPPING[key].model_type not in known
            ):
                known.add(CONFIG_MAPPING[key].model_type)
                yield key, models


def tried(entry: Entry) -> Result:
    model_class = getattr(transformers, entry.model, None)
    if model_class is None:
        return Result(entry.kind, entry.key, entry.model, "not built", remark="transformers does not export the class")
    return coverage_trials.tried(entry.kind, CONFIG_MAPPING[entry.key], model_class, KINDS[entry.kind].trial_of)


# --- a family must not take the others down ---


class Workshop:
    """A process that tries one family after the other, and is replaced when it ends or takes too long."""

    def __init__(self, attempt: Callable[[Entry], Result] = tried, seconds: float = SECONDS) -> None:
        self._attempt, self._seconds = attempt, seconds
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None

    def tried(self, entry: Entry) -> Result:
        if self._process is None:
            self._start()
        assert self._process is not None
        assert self._pipe is not None
        self._pipe.send(entry)
        remark = f"took more than {self._seconds} s"
        if self._pipe.poll(self._seconds):
            try:
                return self._pipe.recv()
            except EOFError:
                remark = "ended the process"
        self._process.kill()
        self.close()
        return Result(entry.kind, entry.key, entry.model, "failed", remark=remark)

    def close(self) -> None:
        """End the process, which does so when nobody speaks to it any more."""
        if self._process is not None and self._pipe is not None:
            self._pipe.close()
            self._process.join(self._seconds)
            self._process.kill()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._attempt), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv()  # all is imported


def _serve(pipe: Connection, attempt: Callable[[Entry], Result]) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)  # the models are tiny
    pipe.send(None)
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(attempt(pipe.recv()))
            gc.collect()


def results_of(kind: str, only: set[str]) -> Iterator[Result]:
    """What came of every family of a kind, or of some."""
    workshop = Workshop()
    try:
        for entry in entries(kind, only):
            yield workshop.tried(entry)
    finally:
        workshop.close()


# --- the table ---


def page(kind: str, part: dict) -> str:
    """The page of a kind; `part` is what `docs/coverage.json` holds of it."""
    own = sorted((Result(**r) for r in part["results"]), key=lambda r: (STATES.index(r.state), r.family, r.model))
    lines = [
        f"# {kind[0].upper()}{kind[1:]}",
        "",
        "Written by `tools/coverage_table.py`; [what the states mean](../coverage.md).",
        "",
        f"transformers {part['transformers']}: {counts(own)}. A score is the fall of the {KINDS[kind].measured}.",
        "",
        "| family | class | state | largest difference | largest score | remark |",
        "|---|---|---|---|---|---|",
        *(_row(r) for r in own),
    ]
    return "\n".join([*lines, ""])


def page_name(kind: str) -> str:
    """Where the page of a kind lies, from docs."""
    return f"coverage/{kind.replace(' ', '-')}.md"


def summary(record: dict[str, dict]) -> str:
    """A line for each kind of models."""
    states = [state for state in STATES if state not in ("failed", "wrong")]
    lines = [BEGIN, "", f"| | {' | '.join(states)} | largest difference |", "|---" * (len(states) + 2) + "|"]
    for kind in [kind for kind in KINDS if kind in record]:
        results = [Result(**row) for row in record[kind]["results"]]
        numbers = [sum(r.state == state for r in results) for state in states]
        largest = max((r.difference for r in results if r.difference is not None), default=0)
        lines.append(f"| [{kind}]({page_name(kind)}) | {' | '.join(str(n or '') for n in numbers)} | {largest:.0e} |")
    return "\n".join([*lines, "", END])


def counts(results: list[Result]) -> str:
    of_state = {state: sum(r.state == state for r in results) for state in STATES}
    return ", ".join(f"{count} {state}" for state, count in of_state.items() if count)


def _row(r: Result) -> str:
    numbers = ["" if x is None else f"{x:.1e}" if i == 0 else f"{x:.2g}" for i, x in enumerate((r.difference, r.size))]
    remark = r.remark.replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")
    return f"| {r.family} | {r.model} | {r.state} | {numbers[0]} | {numbers[1]} | {remark} |"


def write(found: dict[str, list[Result]], root: Path = ROOT) -> None:
    """Replace the parts of these kinds in the record, their pages and the summary; the other kinds keep theirs."""
    docs = root / "docs"
    table, overview = docs / "coverage.json", docs / "coverage.md"
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    record = json.loads(table.read_text(encoding="utf-8")) if table.exists() else {}
    record |= {kind: {**versions, "results": [asdict(r) for r in results]} for kind, results in found.items()}
    table.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (docs / "coverage").mkdir(exist_ok=True)
    for kind, part in record.items():
        (docs / page_name(kind)).write_text(page(kind, part), encoding="utf-8")
    before, rest = overview.read_text(encoding="utf-8").split(BEGIN, 1)
    overview.write_text(before + summary(record) + rest.split(END, 1)[1], encoding="utf-8")


def update(found: dict[str, list[Result]], root: Path = ROOT) -> None:
    """Replace the rows of some classes; the other rows of their kinds must be of the same versions."""
    record = json.loads((root / "docs" / "coverage.json").read_text(encoding="utf-8"))
    whole = {}
    for kind, results in found.items():
        if results and record[kind]["transformers"] != transformers.__version__:
            raise SystemExit(f"{kind} was tried with transformers {record[kind]['transformers']}; run all of it")
        new = {(r.family, r.model): r for r in results}
        kept = [Result(**row) for row in record[kind]["results"]]
        whole[kind] = [new.pop((r.family, r.model), r) for r in kept] + list(new.values())
    write(whole, root)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="model types, to print only; all if none is named")
    names = {kind.replace(" ", "-"): kind for kind in KINDS}
    parser.add_argument("--kind", action="append", choices=names, help="of model; again for more; all if none is named")
    parser.add_argument("--update", action="store_true", help="write the rows of the named families, too")
    arguments = parser.parse_args()
    if arguments.update and not arguments.families:
        parser.error("--update is for families that are named; without any, whole tables are written")
    chosen = [names[name] for name in arguments.kind or names]
    wanted = set(arguments.families)
    found: dict[str, list[Result]] = {}
    for kind in chosen:
        started = time.perf_counter()
        found[kind] = []
        for result in results_of(kind, wanted):
            found[kind].append(result)
            print(f"{kind}  {_row(result)}", flush=True)
        print(f"{kind}: {counts(found[kind])}; {time.perf_counter() - started:.0f} s", flush=True)
        if not wanted:
            write({kind: found[kind]})
    if arguments.update:
        update(found)
    return int(any(r.state in ("failed", "wrong") for results in found.values() for r in results))


if __name__ == "__main__":
    sys.exit(main())
