"""Builds the compiled module with sanitizers, each build in a directory of its own, and runs its tests on it.

    python csrc/checks/sanitize.py [address] [thread] [amx]

address: AddressSanitizer and UndefinedBehaviorSanitizer, with AMX emulated, so that its kernel is tested as well.
thread: ThreadSanitizer, with std::thread for OpenMP, whose barriers it does not understand.
amx: no sanitizer, but the machine code of the AMX kernel, instruction by instruction (`amx_trap.c`), where the
    processor has AVX512-BF16 and no AMX.
Linux and GCC or Clang. The first finding ends the run with an error.
"""

import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Build:
    flags: str
    runtime: str  # library to preload, since Python itself is not instrumented; or a C file to make one of
    options: dict[str, str]
    tests: tuple[tuple[str, ...], ...]  # arguments of pytest


# Python's own flags for extensions include -fwrapv, with which no signed sum overflows.
COMMON = "-O1 -g1 -fno-wrapv -fno-omit-frame-pointer -fno-sanitize-recover=all"
KERNELS = "cpu: and not torch and not cpu:plain"  # what is plain differs in the length of its vectors only
BUILDS = {
    "address": Build(
        f"{COMMON} -fsanitize=address,undefined -fno-sanitize=vptr -DATMAN_EMULATE_AMX",
        "asan",
        # Python keeps memory until its end; torch and pybind11 throw through code that is not instrumented
        {"ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1", "UBSAN_OPTIONS": "print_stacktrace=1"},
        (
            ("test_binding_fuzz.py",),
            ("test_compiled_cpu.py", "-k", "not thousands and not memory"),
            ("test_backends.py", "test_pack.py", "-k", f"({KERNELS}) and not any_ and not ones_change"),
            ("test_gradients.py", "-k", f"({KERNELS}) or one_order"),
        ),
    ),
    "thread": Build(
        f"{COMMON} -fsanitize=thread -DATMAN_STD_THREADS",
        "tsan",
        {"TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1:report_signal_unsafe=0"},
        (
            ("test_compiled_cpu.py", "-k", "threads or python_goes_on"),
            ("test_binding_fuzz.py", "-k", "calls"),
            ("test_gradients.py", "-k", "one_order"),
        ),
    ),
    "amx": Build(
        "-DATMAN_ASSUME_AMX",
        "amx_trap.c",
        {},
        (
            ("test_compiled_cpu.py", "-k", "amx and not thousands"),
            ("test_backends.py", "test_pack.py", "-k", "cpu:amx and not any_ and not ones_change"),
            ("test_gradients.py", "-k", "cpu:amx"),
        ),
    ),
}

# pytest on the package of this build, and no other
RUN = """
import sys, torch, pytest
from atman_kernels import _C
assert _C.__file__.startswith(sys.argv[1]), f"{_C.__file__} is not of this build"
sys.exit(pytest.main(["-q", "-x", "-s", "-p", "no:cacheprovider", "-p", "no:faulthandler", *sys.argv[2:]]))
"""


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


def build(name: str, target: Path) -> None:
    environment = os.environ | {"ATMAN_KERNELS_BUILD": "cpu", "ATMAN_KERNELS_FLAGS": BUILDS[name].flags}
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", target.parent, "--build-lib", target]
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True)


def runtime(name: str, target: Path) -> str:
    """What to preload: a sanitizer's library, and the one of C++ whose exceptions it watches from the start."""
    if name.endswith(".c"):
        library = target.parent / f"{Path(name).stem}.so"
        flags = ("-O2", "-Wall", "-Wextra", "-shared", "-fPIC")
        source = Path(__file__).with_name(name)
        subprocess.run([*compiler(), *flags, "-x", "c", source, "-o", library], check=True)
        return str(library)
    paths = []
    for library in (f"lib{name}.so", "libstdc++.so"):
        path = subprocess.check_output([*compiler(), f"-print-file-name={library}"], text=True).strip()
        if not os.path.isabs(path):  # the compiler echoes the name of what it does not have
            sys.exit(f"{shlex.join(compiler())} has no {library}")
        paths.append(path)
    return " ".join(paths)


def test(name: str, target: Path) -> None:
    settings = BUILDS[name]
    environment = os.environ | settings.options
    environment |= {
        "LD_PRELOAD": runtime(settings.runtime, target),
        "PYTHONPATH": str(target),
        "OMP_WAIT_POLICY": "passive",
    }
    for arguments in settings.tests:
        files = [a if not a.endswith(".py") else f"python_tests/ops/{a}" for a in arguments]
        # -P: the repository's own package must not come first. -R: ThreadSanitizer cannot bear random addresses.
        command = ["setarch", "-R", sys.executable, "-P", "-c", RUN, str(target), *files]
        subprocess.run(command, cwd=REPOSITORY, env=environment, check=True)


def main() -> None:
    for name in sys.argv[1:] or BUILDS:
        target = REPOSITORY / "build" / f"sanitize-{name}" / "lib"
        started = time.monotonic()
        try:
            build(name, target)
            built = time.monotonic()
            test(name, target)
        except subprocess.CalledProcessError as error:
            sys.exit(f"{name}: failed with exit status {error.returncode}")
        print(f"{name}: clean; built in {built - started:.0f} s, tested in {time.monotonic() - built:.0f} s")


if __name__ == "__main__":
    main()
