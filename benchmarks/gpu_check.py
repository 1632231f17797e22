"""Everything that needs a GPU, in one command: tests, compute-sanitizer, benchmarks, a whole explanation.

    make gpu-check                                          # or: python -m benchmarks.gpu_check
    python -m benchmarks.gpu_check --only tests,bench --minutes 9
    python -m benchmarks.gpu_check --dry-run                # the same way through on a CPU, with tiny shapes

It works from a checkout with torch, Triton and transformers alone. What it has to leave out for want of something else
it names, and then it does not report success.

Exit code: 0 everything passed. 1 something failed. 2 nothing could run, such as without a GPU. 3 nothing failed, but
not everything ran.
"""

import argparse
import ast
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from atman_kernels import backends
from benchmarks.gpu.__main__ import FAILED, NOTHING_RUN, PASSED, missing_gpu
from benchmarks.gpu.cases import GROUPS
from benchmarks.gpu.report import plain_table
from benchmarks.gpu.results import write_json
from benchmarks.machine import REPOSITORY, RESULTS, cpu_slug, environment, gpu_environment, gpu_slug

INCOMPLETE = 3
GPU_BACKENDS = ("triton", "cuda:plain", "cuda:hopper")
TESTS = REPOSITORY / "python_tests"
SHARED_SUITES = (
    "test_backends.py",
    "test_pack.py",
    "test_op_registration.py",
)  # each test once per backend, whose name is in the test's id
MODEL_NEEDS = ("transformers", "psutil", "tqdm")
SHARES = {"tests": 4.0, "sanitizer": 1.5, "bench": 5.0, "explain": 1.5}  # of the time that is left
GRACE_SECONDS = 60  # for a program to finish what it is at when its time is up
SANITIZER_ERRORS = 86  # the exit code by which compute-sanitizer says that it found some


@dataclass(frozen=True)
class Outcome:
    """One stage, or a part of it."""

    name: str
    status: str  # passed | failed | incomplete: it could not run, or not all of it
    seconds: float
    detail: str


@dataclass(frozen=True)
class Check:
    """What the stages have in common."""

    options: argparse.Namespace
    device: str
    output: Path

    def run(self, name: str, command: Sequence[str], seconds: float, quiet: bool = False, **variables: str) -> Outcome:
        """A program of its own, stopped with everything it started when its time is up."""
        started = time.monotonic()
        print(f"\n--- {name}: {' '.join(command)} (at most {seconds:.0f} s)", flush=True)
        last = ""
        with (
            self.log.open("a", encoding="utf-8", buffering=1) as log,  # by lines: several programs share it
            subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **variables},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            ) as process,
        ):
            timed_out = threading.Event()
            timer = threading.Timer(seconds, lambda: (timed_out.set(), _kill(process)))
            timer.start()
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    log.write(f"[{name}] {line}")
                    last = line.strip() or last
                    if not quiet or line.startswith(("FAILED", "ERROR")):
                        print(line, end="", flush=True)
                code = process.wait()
            finally:
                timer.cancel()
                _kill(process)
        if quiet:
            print(f"--- {name}: {last}", flush=True)
        status = {PASSED: "passed", NOTHING_RUN: "incomplete"}.get(code, "failed")
        if timed_out.is_set():
            last = f"stopped after {seconds:.0f} s; {last}"
        return Outcome(name, status, time.monotonic() - started, f"{last} (exit code {code})")

    @property
    def log(self) -> Path:
        return self.output / "gpu-check.log"

    def backends(self) -> dict[str, str | None]:
        """Those of this device, each with the reason why it cannot run, or None."""
        names = ("cpu",) if self.options.dry_run else GPU_BACKENDS
        return {name: backends.unavailable_reason(name, self.device) for name in names}


def _kill(process: subprocess.Popen[str]) -> None:
    """The process and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


# Stages: (check, seconds) -> outcomes ----------------------------------------------------------------------------


def run_tests(check: Check, seconds: float) -> list[Outcome]:
    """`pytest -m gpu`, and the suites that every backend goes through; small shapes where those cannot run."""
    running = [name for name, reason in check.backends().items() if reason is None]
    if find_spec("pytest") is None:
        left_out = Outcome("pytest", "incomplete", 0.0, "pytest is not installed: the small shapes alone were checked")
        return [left_out, *_small_shapes(check, running, seconds)]
    usable, unusable = [], {}
    for path in sorted(TESTS.glob("test_*.py")):
        lacking = missing_modules(path)
        if lacking:
            unusable[path.name] = lacking
        else:
            usable.append(path)
    shared = [path for path in usable if path.name in SHARED_SUITES]
    dry = ["--collect-only"] if check.options.dry_run else []
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *dry]
    if find_spec("xdist") is not None:
        pytest += ["-n", str(min(8, os.cpu_count() or 1))]
    commands = {"tests marked gpu": [*pytest, "-m", "gpu", *map(str, usable)]}
    for backend in dict.fromkeys(name.partition(":")[0] for name in running):
        for path in shared:
            commands[f"{path.stem} {backend}"] = [*pytest, "-k", backend, str(path)]
    ends = time.monotonic() + seconds

    def run(name: str) -> Outcome:
        return _judged_pytest(check.run(name, commands[name], max(5.0, ends - time.monotonic()), quiet=True))

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # each compiles its kernels on one core
        outcomes = list(pool.map(run, commands))
    if unusable:
        reasons = ", ".join(f"{name} ({', '.join(sorted(lacking))})" for name, lacking in unusable.items())
        outcomes.append(
            Outcome("tests left out", "incomplete", 0.0, f"modules that they import are missing: {reasons}")
        )
    if len(shared) < len(SHARED_SUITES):
        outcomes += _small_shapes(check, running, max(5.0, ends - time.monotonic()))
    return outcomes


def _judged_pytest(outcome: Outcome) -> Outcome:
    """pytest's exit code 5 says that no test was selected; 2, that it was interrupted or could not collect."""
    codes = {"(exit code 5)": "incomplete", "(exit code 2)": "failed"}
    status = next((status for code, status in codes.items() if code in outcome.detail), outcome.status)
    return Outcome(outcome.name, status, outcome.seconds, outcome.detail)


def missing_modules(path: Path, seen: set[Path] | None = None) -> set[str]:
    """Top-level modules that a test file, or a helper beside it, imports and that are not installed."""
    seen = set() if seen is None else seen
    if path in seen:
        return set()
    seen.add(path)
    lacking: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        for name in {name.split(".")[0] for name in names}:
            helper = path.parent / f"{name}.py"
            if helper.is_file():
                lacking |= missing_modules(helper, seen)
            elif name not in sys.modules and find_spec(name) is None:
                lacking.add(name)
    return lacking


def _small_shapes(check: Check, running: Sequence[str], seconds: float) -> list[Outcome]:
    return [
        check.run(
            f"small shapes {backend}",
            [sys.executable, "-m", "benchmarks.gpu.small_shapes", backend, "--device", check.device],
            seconds / len(running),
        )
        for backend in running
    ]


def run_sanitizer(check: Check, seconds: float) -> list[Outcome]:
    """compute-sanitizer over calls at small shapes, after the same calls without it, which compiles the kernels."""
    running = [name for name, reason in check.backends().items() if reason is None]
    ends = time.monotonic() + seconds
    outcomes = _small_shapes(check, running, seconds / 2)
    program = find_sanitizer()
    if program is None:
        return [*outcomes, Outcome("sanitizer", "incomplete", 0.0, "compute-sanitizer is not installed")]
    if check.options.dry_run:
        return [*outcomes, Outcome("sanitizer", "incomplete", 0.0, "compute-sanitizer watches GPUs only")]
    commands = [(tool, backend) for backend in running for tool in check.options.sanitizer_tools.split(",")]
    for i, (tool, backend) in enumerate(commands):
        command = [program, "--tool", tool, "--error-exitcode", str(SANITIZER_ERRORS), "--print-limit", "20"]
        if tool == "memcheck":
            command += ["--report-api-errors", "no"]  # torch asks the driver questions whose answer may be an error
        left = max(30.0, (ends - time.monotonic()) / (len(commands) - i))
        command += [sys.executable, "-m", "benchmarks.gpu.small_shapes", backend, "--seconds", f"{left:.0f}"]
        # torch's allocator hands out parts of large blocks, between which nothing is out of bounds
        no_pool = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        outcomes.append(check.run(f"{tool} {backend}", command, left + GRACE_SECONDS, **no_pool))
    return outcomes


def find_sanitizer() -> str | None:
    """compute-sanitizer on the path, or where CUDA puts it."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [str(Path(home, folder)) for home in homes if home for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *places]))


def run_bench(check: Check, seconds: float) -> list[Outcome]:
    """One process per group of shapes: a fault in one leaves the device usable for the next."""
    options, outcomes = check.options, []
    ends = time.monotonic() + seconds
    groups = options.groups.split(",")
    for i, group in enumerate(groups):
        left = max(30.0, (ends - time.monotonic()) / (len(groups) - i))
        command = [sys.executable, "-m", "benchmarks.gpu", "--groups", group, "--output", str(check.output)]
        command += ["--minutes", f"{left / 60:.2f}", "--device", check.device, "--preset", options.preset]
        if options.dry_run:
            command += ["--no-compile", "--seconds-per-row", "0.01"]
        if i or options.resume:
            command.append("--resume")
        outcomes.append(check.run(f"bench {group}", command, left + GRACE_SECONDS))
    return outcomes


def run_explain(check: Check, seconds: float) -> list[Outcome]:
    """A whole explanation by a model of 8 billion parameters."""
    lacking = [name for name in MODEL_NEEDS if find_spec(name) is None]
    if lacking:
        return [Outcome("explain", "incomplete", 0.0, f"not installed: {', '.join(lacking)}")]
    command = [sys.executable, "-m", "benchmarks.gpu.explanation", "--device", check.device]
    command += ["--output", str(check.output), "--minutes", f"{seconds / 60:.2f}"]
    command += ["--preset", "tiny"] if check.options.dry_run else []
    return [check.run("explain", command, seconds + GRACE_SECONDS)]


STAGES: dict[str, Callable[[Check, float], list[Outcome]]] = {
    "tests": run_tests,
    "sanitizer": run_sanitizer,
    "bench": run_bench,
    "explain": run_explain,
}


# Program --------------------------------------------------------------------------------------------------------


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(STAGES), help="stages, separated by commas")
    parser.add_argument("--minutes", type=float, default=25.0, help="for everything together")
    parser.add_argument("--preset", default=None, help="shapes of the benchmarks: quick, full, tiny")
    parser.add_argument("--groups", default=",".join(GROUPS), help="groups of shapes, separated by commas")
    parser.add_argument("--sanitizer-tools", default="memcheck", help="such as memcheck,racecheck,synccheck")
    parser.add_argument("--resume", action="store_true", help="keep what the benchmarks' result file holds")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result files and logs")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny shapes; tests are only collected")
    options = parser.parse_args(given)
    options.preset = options.preset or ("tiny" if options.dry_run else "quick")
    for option, known in (("only", STAGES), ("groups", GROUPS)):
        for name in getattr(options, option).split(","):
            if name not in known:
                parser.error(f"--{option}: {name!r} is none of {', '.join(known)}")
    return options


def main(given: list[str] | None = None) -> int:
    options = arguments(given)
    reason = None if options.dry_run else missing_gpu()
    if reason is not None:
        print(f"no GPU check: {reason}. --dry-run goes through the same steps on the CPU", file=sys.stderr)
        return NOTHING_RUN
    options.output.mkdir(parents=True, exist_ok=True)
    check = Check(options, "cpu" if options.dry_run else "cuda", options.output.resolve())
    check.log.write_text("")
    where = environment() | ({} if options.dry_run else {"gpu": gpu_environment()})
    stages = [name for name in STAGES if name in options.only.split(",")]
    outcomes = [
        Outcome(f"backend {name}", "incomplete", 0.0, reason) for name, reason in check.backends().items() if reason
    ]
    ends = time.monotonic() + 60 * options.minutes
    path = check.output / f"gpu-check-{cpu_slug() if options.dry_run else gpu_slug()}.json"
    for i, name in enumerate(stages):
        share = SHARES[name] / sum(SHARES[later] for later in stages[i:])
        left = (ends - time.monotonic()) * share
        if left < 1:
            outcomes.append(Outcome(name, "incomplete", 0.0, "the time budget was used up"))
            continue
        outcomes += STAGES[name](check, left)
        record = {"environment": where, "dry_run": options.dry_run, "outcomes": [asdict(o) for o in outcomes]}
        write_json(path, record)
    body = [[o.name, o.status, f"{o.seconds:.0f} s", o.detail] for o in outcomes]
    print("\n" + plain_table(("stage", "status", "time", "detail"), body, texts=4))
    print(f"written to {path}")
    return verdict(outcomes)


def verdict(outcomes: Sequence[Outcome]) -> int:
    statuses = {outcome.status for outcome in outcomes}
    if "failed" in statuses:
        return FAILED
    if "passed" not in statuses:
        return NOTHING_RUN
    return INCOMPLETE if "incomplete" in statuses else PASSED


if __name__ == "__main__":
    sys.exit(main())
