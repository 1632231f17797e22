"""Breaks the package in one place at a time, and says whether the tests see it.

    python tools/mutations.py                 every fault of `mutation_list.FAULTS`, in a copy of this checkout
    python tools/mutations.py --only window   those whose name holds a word
    python tools/mutations.py TREE …          other checkouts beside it: which suite sees which fault

A fault is a piece of text and what stands there instead; the text is looked for, so that it may move between files.
The tests that should see it run first, then, if none of them failed, the whole fast suite. A fault that nothing sees
is a missing test. Compiled code is built anew for every fault in it.

Tests run in forks of one process that has torch and transformers loaded: a fault costs a few seconds.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from mutation_list import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("atman_kernels", "csrc")
SUFFIXES = (".py", ".cpp", ".h", ".cu")
FAST = "not slow and not gpu"


# --- a checkout, and faults in it ---


def copied(tree: Path, to: Path) -> Path:
    """What git knows of a checkout, and the compiled modules."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=tree, capture_output=True, text=True, check=True).stdout
    modules = [str(path.relative_to(tree)) for path in (tree / "atman_kernels").glob("*.so")]
    for name in [*filter(None, names.split("\0")), *modules]:
        if (tree / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(tree / name, to / name)
    return to


def place_of(fault: Fault, tree: Path) -> tuple[Path, str] | None:
    """The only file that has the fault's text, and its content; None where none has it."""
    found = []
    for path in (p for source in SOURCES for p in sorted((tree / source).rglob("*")) if p.suffix in SUFFIXES):
        content = path.read_text(encoding="utf-8")
        if fault.text in content:
            found.append((path, content))
    if not found:
        return None
    if len(found) > 1 or found[0][1].count(fault.text) > 1:
        sys.exit(f"{fault.name}: its text is found more than once: {', '.join(str(path) for path, _ in found)}")
    return found[0]


class Builds:
    """Compiled modules, each built once for whatever trees have the same sources."""

    def __init__(self) -> None:
        self._made: dict[str, bytes | None] = {}

    def module(self, tree: Path) -> bytes | None:
        """The module for the sources of a tree; None if they do not compile."""
        sources = sorted(path for path in (tree / "csrc").rglob("*") if path.suffix in SUFFIXES)
        key = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
        if key not in self._made:
            command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            environment = os.environ | {"ATMAN_KERNELS_BUILD": "cpu", "ATMAN_KERNELS_FLAGS": "-O1"}  # soon compiled
            done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, check=False)
            self._made[key] = module_of(tree).read_bytes() if done.returncode == 0 else None
        return self._made[key]


def module_of(tree: Path) -> Path:
    return tree / "atman_kernels" / f"_C{EXTENSION_SUFFIXES[0]}"


@contextmanager
def broken(fault: Fault, tree: Path, place: tuple[Path, str], builds: Builds) -> Iterator[bool]:
    """The tree with the fault in it; whether it could be built."""
    path, content = place
    compiled = path.suffix in (".cpp", ".h") and "cuda" not in path.parts
    before = module_of(tree).read_bytes() if compiled else b""
    path.write_text(content.replace(fault.text, fault.instead), encoding="utf-8")
    try:
        module = builds.module(tree) if compiled else b""
        if module:
            module_of(tree).write_bytes(module)
        yield module is not None
    finally:
        path.write_text(content, encoding="utf-8")
        if compiled:
            module_of(tree).write_bytes(before)


# --- tests, in forks of a process that has the large libraries loaded ---


class Runner:
    """Runs tests of any tree; with `interpreted`, Triton's kernels run on the CPU."""

    def __init__(self, interpreted: bool) -> None:
        self._interpreted = interpreted
        self._process: subprocess.Popen[str] | None = None

    def _start(self) -> subprocess.Popen[str]:
        environment = os.environ | {
            "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        environment |= {"TRITON_INTERPRET": "1"} if self._interpreted else {}
        return subprocess.Popen(
            [sys.executable, __file__, "--serve"], env=environment, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip

    def failed(self, tree: Path, *arguments: str) -> str | None:
        """The first test that failed; None if all passed."""
        self._process = self._process or self._start()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([str(tree), arguments]), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()


def serve() -> None:
    """A line in: a tree and pytest's arguments. A line out: the first test that failed, or null."""
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    for line in sys.stdin:
        tree, arguments = json.loads(line)
        with tempfile.NamedTemporaryFile("r", suffix=".json") as report:
            child = os.fork()
            if child == 0:
                run_tests(tree, arguments, report.name)
            _, status = os.waitpid(child, 0)
            told = report.read()
        found = json.loads(told) if told else f"the process ended with status {status}"
        print(json.dumps(found), flush=True)


def run_tests(tree: str, arguments: list[str], report: str) -> None:
    """In a fork, which ends here."""
    import pytest

    class First:
        name: str | None = None

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed and self.name is None:
                self.name = report.nodeid

        def pytest_collectreport(self, report: pytest.CollectReport) -> None:
            if report.failed and self.name is None:
                self.name = report.nodeid

    first = First()
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    os.chdir(tree)
    sys.path.insert(0, tree)
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", FAST]
    status = pytest.main([*options, *arguments], plugins=[first])
    if status not in (0, 5) and first.name is None:
        first.name = f"pytest ended with status {status}"
    Path(report).write_text(json.dumps(first.name))
    os._exit(0)


# --- the whole of it ---


def seen_by(fault: Fault, tree: Path, runners: dict[bool, Runner], thorough: bool) -> str | None:
    """The test that sees a fault in a tree which has it."""
    for tests in fault.tests:
        files = [str(path) for path in (tree / "python_tests").rglob(f"{tests.module}.py")]
        chosen = ["-k", tests.keyword] if tests.keyword else []
        found = runners[tests.interpreted].failed(tree, *files, *chosen) if files else None
        if found is not None:
            return found
    return runners[False].failed(tree) if thorough else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="*", type=Path, help="other checkouts, whose own tests see their own faults")
    parser.add_argument("--only", default="", help="faults whose name holds this")
    parser.add_argument("--quick", action="store_true", help="leave out the whole suite where the nearest tests pass")
    parser.add_argument("--list", action="store_true", help="say where every fault would be, and run nothing")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve()
    faults = [fault for fault in FAULTS if options.only in fault.name]
    originals = [ROOT, *(tree.resolve() for tree in options.trees)]
    if options.list:
        for fault in faults:
            places = [(tree, place_of(fault, tree)) for tree in originals]
            print(f"{fault.name:40}", *(str(place[0].relative_to(tree)) if place else "-" for tree, place in places))
        return None
    runners, builds = {kind: Runner(kind) for kind in (False, True)}, Builds()
    missed = 0
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        trees = [copied(tree, Path(folder) / str(index)) for index, tree in enumerate(originals)]
        for fault in faults:
            for tree, original in zip(trees, originals, strict=True):
                started, place = time.monotonic(), place_of(fault, tree)
                if place is None:
                    said = "is not there"
                    missed += original == ROOT
                else:
                    with broken(fault, tree, place, builds) as is_built:
                        test = seen_by(fault, tree, runners, not options.quick) if is_built else "the compiler"
                    said = f"seen by {test}" if test else "SEEN BY NOTHING"
                    missed += test is None
                print(f"{fault.name:40} {original.name:12} {time.monotonic() - started:6.1f} s  {said}", flush=True)
    for runner in runners.values():
        runner.close()
    sys.exit(f"{missed} faults are seen by nothing, or are not there" if missed else 0)


if __name__ == "__main__":
    main()
