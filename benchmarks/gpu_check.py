"""Everything that a GPU is wanted for, by value: small shapes, headlines, a whole explanation, peers, tuning, tests.

    make gpu-check ARGS="--budget 330"                          # or: python -m benchmarks.gpu_check --budget 330
    python -m benchmarks.gpu_check --list                       # the steps, what they take and which fit the budget
    python -m benchmarks.gpu_check --budget 330 --resume DIR    # on another machine: what DIR's results leave to do
    python -m benchmarks.gpu_check --pretend                    # the same way through, on a pretended CUDA device

A step is a program of its own with a hard limit. What it found is in the output folder before the next one begins, and
a figure as soon as it is measured. Nothing is installed; what was compiled beforehand comes from `make gpu-bundle`.

Exit code: 0 everything passed. 1 something failed. 2 nothing could run, such as without a GPU. 3 nothing failed, but
not everything ran.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu import bundle
from benchmarks.gpu.__main__ import FAILED, NOTHING_RUN, PASSED, missing_gpu
from benchmarks.gpu.plan import Step, fits, plan
from benchmarks.gpu.report import line, plain_table
from benchmarks.gpu.results import MEASURED
from benchmarks.machine import REPOSITORY, RESULTS, environment, gpu_environment

INCOMPLETE = 3
LEAVE_SECONDS = 8  # between what a program is told and its limit, to end in order
LISTED_FAILURES = 40
JOURNAL, LOG = "gpu-check.jsonl", "gpu-check.log"
PRETENDED = "pretended CUDA"


@dataclass(frozen=True)
class Outcome:
    """What became of a step."""

    step: str
    status: str  # passed | failed | stopped: at its limit | incomplete: it could not run, or not all of it | left out
    seconds: float
    detail: str
    failures: tuple[str, ...] = ()  # names of tests


class Journal:
    """One line per event, on disk before anything else happens: where it runs, a step begun, a step's outcome."""

    def __init__(self, folder: Path, where: dict[str, Any]) -> None:
        self.path, self.where = folder / JOURNAL, where
        self._before = [json.loads(text) for text in _lines(self.path)]
        self._write({"run": where})

    def begin(self, step: Step) -> None:
        self._write({"step": step.name, "status": "begun"})

    def end(self, outcome: Outcome) -> None:
        self._write(asdict(outcome) | {"gpu": self.where["gpu_name"], "commit": self.where["commit"]})

    def done(self, step: Step) -> str | None:
        """How a step ended before, if that is final: a figure on this kind of GPU only, a check anywhere."""
        status = None
        for event in self._before:
            if event.get("step") == step.name and "gpu" in event:
                there = not step.measures or event["gpu"] == self.where["gpu_name"]
                status = event["status"] if there and event["status"] in ("passed", "failed") else status
        return status

    def _write(self, event: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _lines(path: Path) -> list[str]:
    """Complete ones: the last may be cut off."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [part for part in text.split("\n")[:-1] if part]


Execute = Callable[[Step, float], Outcome]


def run_plan(
    steps: Sequence[Step],
    budget: float,
    execute: Execute,
    journal: Journal,
    again: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """The steps in order, none begun with less time than it is planned to take, none running past the budget."""
    ends = clock() + budget
    statuses: dict[str, str] = {}
    outcomes = []
    for step in steps:
        before = None if again else journal.done(step)
        left = ends - clock()
        if before is not None:
            outcome = Outcome(step.name, before, 0.0, "in an earlier run")
        elif lacking := [name for name in step.needs if find_spec(name) is None]:
            outcome = Outcome(step.name, "incomplete", 0.0, f"not installed: {', '.join(lacking)}")
        elif step.after is not None and statuses.get(step.after, journal_status(journal, step.after)) != "passed":
            outcome = Outcome(step.name, "left out", 0.0, f"{step.after!r} has not passed")
        elif left < step.planned:
            outcome = Outcome(step.name, "left out", 0.0, f"takes about {step.planned:.0f} s, {max(left, 0):.0f} left")
        else:
            journal.begin(step)
            outcome = execute(step, min(step.limit, left))
            journal.end(outcome)
        statuses[step.name] = outcome.status
        outcomes.append(outcome)
    return outcomes


def journal_status(journal: Journal, name: str) -> str | None:
    """Of a step that is not among those asked for."""
    found = [step for step in plan() if step.name == name]
    return journal.done(found[0]) if found else None


# Programs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Programs:
    """Runs steps as programs."""

    output: Path
    pretend: bool = False
    variables: dict[str, str] | None = None

    def __call__(self, step: Step, seconds: float) -> Outcome:
        if step.wrapper and shutil.which(step.wrapper[0]) is None:
            return Outcome(step.name, "incomplete", 0.0, f"{step.wrapper[0]} is not installed")
        cached = bundle.cached_kernels(self._environment(step))
        started = time.monotonic()
        code, lines = self._run(step, seconds)
        took = time.monotonic() - started
        for partial in self.output.glob("*.partial"):
            partial.unlink()
        last = next((text for text in reversed(lines) if text.strip()), "").strip()
        compiled = bundle.cached_kernels(self._environment(step)) - cached
        notes = f"; {compiled} kernels compiled" if compiled > 0 else ""
        failures = failed_tests(lines)
        if code is None:
            return Outcome(step.name, "stopped", took, f"after {seconds:.0f} s: {last}{notes}", failures)
        known = {PASSED: "passed", NOTHING_RUN: "incomplete", 5: "incomplete"}
        status = "failed" if failures else known.get(code, "failed")
        return Outcome(step.name, status, took, f"{last} (exit code {code}){notes}", failures)

    def command(self, step: Step, seconds: float) -> list[str]:
        filled = {"device": "cuda", "output": str(self.output), "seconds": f"{max(seconds - LEAVE_SECONDS, 1):.0f}"}
        module, *arguments = [part.format(**filled) for part in step.command]
        if self.pretend:
            arguments = pretended_arguments(module, arguments)
            return [sys.executable, "-m", "benchmarks.gpu.pretended_cuda", module, *arguments]
        return [*step.wrapper, sys.executable, "-m", module, *arguments]

    def _environment(self, step: Step) -> dict[str, str]:
        return {**os.environ, "PYTHONUNBUFFERED": "1", **(self.variables or {}), **dict(step.variables)}

    def _run(self, step: Step, seconds: float) -> tuple[int | None, list[str]]:
        """Exit code, None if it was stopped; and what it printed. Its whole process group ends with it."""
        command = self.command(step, seconds)
        print(f"\n--- {step.part} {step.name} (at most {seconds:.0f} s): {' '.join(command[1:])}", flush=True)
        lines: list[str] = []
        quiet = "pytest" in step.command

        def read(stream: Any) -> None:
            with (self.output / LOG).open("a", encoding="utf-8", buffering=1) as log, contextlib.suppress(ValueError):
                for text in stream:
                    log.write(f"[{step.name}] {text}")
                    lines.append(text)
                    if not quiet or FAILED_TEST.search(text):
                        print(text, end="", flush=True)

        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=self._environment(step),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        reader = threading.Thread(target=read, args=(process.stdout,), daemon=True)
        reader.start()
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold a process that was killed
            process.wait(5)
        reader.join(2)
        return code, lines


# As pytest says it: in the end ("FAILED test - why"), at once ("test FAILED"), at once from several processes.
FAILED_TEST = re.compile(
    r"^(?:\[gw\d+\] \[ *\d+%\] )?(?:FAILED|ERROR) (\S+::.*?)(?: - .*)?\s*$|^(\S+::.*?) (?:FAILED|ERROR)\b"
)


def failed_tests(lines: Sequence[str]) -> tuple[str, ...]:
    """Their names, from what pytest prints while it runs: one that is killed prints no summary."""
    found = [match[1] or match[2] for text in lines if (match := FAILED_TEST.search(text.rstrip()))]
    crashed = [match[1] for text in lines if (match := re.search(r"crashed while running '([^']+)'", text))]
    return tuple(dict.fromkeys(name.strip() for name in (*found, *crashed)))


def pretended_arguments(module: str, arguments: list[str]) -> list[str]:
    """The same program with tiny shapes, a fraction of a second per row, and a few tests."""
    if module == "benchmarks.gpu":
        arguments = [*arguments, "--preset", "tiny", "--cases", "*", "--no-compile", "--seconds-per-row", "0.001"]
    if module == "benchmarks.gpu.explanation":
        arguments = [*arguments, "--preset", "tiny", "--rounds", "1"]
    if module == "benchmarks.gpu.small_shapes":
        arguments = [*arguments, "--first", "4"]
    if module in ("benchmarks.gpu.tuning", "benchmarks.gpu.backward"):
        arguments = [*arguments, "--tiny"]
    if module == "pytest":
        with_value = [i for i, part in enumerate(arguments) if part in ("-n", "--timeout", "--timeout-method")]
        skipped = {j for i in with_value for j in (i, i + 1)}
        # these launch kernels or record gradients
        suites = (
            "test_triton.py",
            "test_triton_backward.py",
            "test_gradients.py",
            "test_op_registration.py",
            "test_cuda_build.py",
        )
        kept = [part for i, part in enumerate(arguments) if i not in skipped and not part.endswith(suites)]
        arguments = [*kept, "-k", "triton and (test_packs and 64 and bfloat16 and two_bases)"]
    return arguments


# Program ---------------------------------------------------------------------------------------------------------


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=1500.0, help="seconds for everything together [%(default).0f]")
    parser.add_argument("--only", default="*", help="steps, by letter, name or pattern, separated by commas")
    parser.add_argument("--list", action="store_true", help="name the steps with their seconds, and stop")
    parser.add_argument("--resume", nargs="?", type=Path, const=Path(), metavar="DIR",
                        help="go on after the results in DIR, or in the output folder")  # fmt: skip
    parser.add_argument("--again", action="store_true", help="with --resume: run the steps that are done as well")
    parser.add_argument("--output", type=Path, default=None, help="folder of the results [$OUT, or benchmarks/results]")
    parser.add_argument("--bundle", type=Path, default=bundle.ARCHIVE, help="what make gpu-bundle made [%(default)s]")
    parser.add_argument("--pretend", action="store_true", help="on a pretended CUDA device, with tiny shapes")
    options = parser.parse_args(given)
    options.output = options.output or Path(os.environ.get("OUT") or RESULTS)
    options.steps = chosen(options.only.split(","))
    if not options.steps:
        parser.error(f"--only: {options.only!r} is none of {', '.join(f'{s.part} ({s.name})' for s in plan())}")
    return options


def chosen(patterns: Sequence[str]) -> list[Step]:
    return [step for step in plan() if any(p == step.part or fnmatch(step.name, p) for p in patterns)]


def listing(steps: Sequence[Step], budget: float) -> str:
    """The steps with their seconds, and how far a call of the budget comes."""
    reached = {step.name for step in fits(steps, budget)}
    body = [
        [s.part, s.name, "yes" if s.name in reached else "", f"{s.planned:.0f}", f"{s.limit:.0f}", s.after or ""]
        for s in steps
    ]
    head = ("", "step", f"in {budget:.0f} s", "planned s", "limit s", "after")
    total = sum(s.planned for s in steps)
    return plain_table(head, body, texts=3) + f"\nall together: {total:.0f} s planned"


def main(given: list[str] | None = None) -> int:
    options = arguments(given)
    if options.list:
        print(listing(options.steps, options.budget))
        return PASSED
    reason = None if options.pretend else missing_gpu()
    if reason is not None:
        print(f"no GPU check: {reason}. --pretend goes through the same steps on the CPU", file=sys.stderr)
        return NOTHING_RUN
    output = options.output.resolve()
    prepare_output(output, options.resume)
    unpacked = bundle.unpack(options.bundle)
    gpu = {"name": PRETENDED} if options.pretend else gpu_environment()
    where = environment() | {"gpu": gpu, "gpu_name": gpu["name"], "budget": options.budget, "bundle": unpacked.record()}
    for objection in unpacked.objections:
        print(f"bundle: {objection}", flush=True)
    journal = Journal(output, where)
    programs = Programs(output, options.pretend, unpacked.variables)
    outcomes = run_plan(options.steps, options.budget, programs, journal, options.again)
    print(summary(outcomes, output))
    return verdict(outcomes)


def prepare_output(output: Path, resume: Path | None) -> None:
    """An output folder with the results to go on after, and without those that are not."""
    output.mkdir(parents=True, exist_ok=True)
    if resume is None:
        for stale in (JOURNAL, LOG):
            (output / stale).unlink(missing_ok=True)
        for stale_rows in output.glob("gpu-ops-*.json"):  # of an earlier run; what is committed has another folder
            if output != RESULTS.resolve():
                stale_rows.unlink()
        return
    source = resume.resolve() if resume != Path() else output
    if not (source / JOURNAL).is_file():
        sys.exit(f"--resume: there is no {JOURNAL} in {source}")
    if source != output:
        for path in source.iterdir():
            if path.is_file():
                shutil.copy2(path, output / path.name)


def summary(outcomes: Sequence[Outcome], output: Path) -> str:
    """What a reader of the last lines needs: figures, failures, steps."""
    parts = []
    for path in sorted(output.glob("gpu-ops-*.json")):
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        parts.append("\n".join(line(row, rows) for row in rows if row["status"] == MEASURED))
    for outcome in outcomes:
        shown = outcome.failures[:LISTED_FAILURES]
        more = len(outcome.failures) - len(shown)
        parts += [f"{outcome.step} failed: {name}" for name in shown] + ([f"and {more} more"] if more else [])
    body = [[o.step, o.status, f"{o.seconds:.0f} s", o.detail[:160]] for o in outcomes]
    return "\n" + "\n".join([*parts, plain_table(("step", "status", "time", "detail"), body, texts=4)])


def verdict(outcomes: Sequence[Outcome]) -> int:
    statuses = {outcome.status for outcome in outcomes}
    if statuses & {"failed", "stopped"}:
        return FAILED
    if "passed" not in statuses:
        return NOTHING_RUN
    return PASSED if statuses == {"passed"} else INCOMPLETE


if __name__ == "__main__":
    sys.exit(main())
