"""What a GPU is asked for, in the order of what it is worth: steps, what each is planned to take, and what it may take.

Every step is a program of its own, so that a hang, or a CUDA error after which nothing works, costs that step alone.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

SUITES = (
    "ops/test_triton.py",
    "ops/test_triton_backward.py",
    "ops/test_gradients.py",
    "ops/test_real_head_dimensions.py",
    "ops/test_backends.py",
    "ops/test_pack.py",
    "ops/test_op_registration.py",
    "ops/test_cuda_build.py",
    "models/test_placement.py",
)
TEST_SECONDS = 60  # of one test
CEILINGS = "flash,cudnn,flash_prefix,cudnn_prefix,flash_varlen"
# torch's allocator hands out parts of large blocks, between which nothing is out of bounds
NO_POOL = ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")


@dataclass(frozen=True)
class Step:
    """One program.

    Attributes:
        part: the letter under which benchmarks/README.md lists it.
        command: a module with its arguments, run as ``python -m``; ``{device}``, ``{output}``, ``{seconds}`` (a little
            less than the limit) are filled in.
        planned: seconds on an H100, the start of the program included; the step is not begun with less left.
        limit: seconds after which it and all that it started are killed.
        after: a step that must have passed.
        wrapper: a program that runs Python instead of the shell.
        measures: whether it gives figures, which hold for one kind of GPU only.
        needs: modules without which it cannot run.
    """

    name: str
    part: str
    command: tuple[str, ...]
    planned: float
    limit: float
    after: str | None = None
    wrapper: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    measures: bool = False
    needs: tuple[str, ...] = ()


def plan(sanitizer: str | None = "compute-sanitizer", cores: int | None = None) -> list[Step]:
    """All steps, the most valuable first."""
    shapes = ("benchmarks.gpu.small_shapes", "--device", "{device}", "--seconds", "{seconds}")
    ops = ("benchmarks.gpu", "--device", "{device}", "--output", "{output}", "--resume", "--seconds", "{seconds}")
    headline = (*ops, "--preset", "headline")
    every_dtype = ("--dtype", "bfloat16,float16,float32")
    memcheck = (sanitizer or "compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "86",
                "--print-limit", "20", "--report-api-errors", "no")  # fmt: skip
    return [
        Step("shapes triton", "a", (*shapes, "triton", *every_dtype), 35, 75),
        Step("smoke hopper", "b", (*shapes, "cuda:hopper"), 12, 20),
        Step("rows hopper", "b", (*headline, "--contenders", "cuda:hopper"), 40, 80, after="smoke hopper",
             measures=True),
        Step("headline 128", "c", (*headline, "--cases", "*x128*", "--contenders", f"triton,{CEILINGS}"), 35, 75,
             measures=True),
        Step("headline 64", "c", (*headline, "--cases", "*x64*", "--contenders", f"triton,{CEILINGS}"), 30, 70,
             measures=True),
        Step("explanation", "d",
             ("benchmarks.gpu.explanation", "--device", "{device}", "--output", "{output}", "--rounds", "2",
              "--seconds", "{seconds}"), 95, 150, measures=True, needs=("transformers", "psutil", "tqdm")),
        Step("peers 128", "e", (*headline, "--cases", "*x128*", "--contenders", "flex,sdpa_bias"), 60, 110,
             measures=True),
        Step("backward", "e", ("benchmarks.gpu.backward", "--output", "{output}", "--seconds", "{seconds}"), 45, 80,
             measures=True),
        Step("peers 64", "e", (*headline, "--cases", "*x64*", "--contenders", "flex,sdpa_bias"), 50, 100,
             measures=True),
        Step("tuning", "f",
             ("benchmarks.gpu.tuning", "--device", "{device}", "--output", "{output}", "--seconds", "{seconds}"),
             45, 90, measures=True),
        Step("tests", "g", _pytest(cores), 110, 170, needs=("pytest",)),
        Step("memcheck triton", "h", (*shapes, "triton"), 40, 70, wrapper=memcheck, variables=(NO_POOL,),
             after="shapes triton"),
        Step("memcheck hopper", "h", (*shapes, "cuda:hopper"), 40, 70, wrapper=memcheck, variables=(NO_POOL,),
             after="smoke hopper"),
        Step("shapes plain", "h", (*shapes, "cuda:plain", *every_dtype), 15, 40),
        Step("ladder", "i", ("benchmarks.gpu.bundle", "ladder"), 15, 45, after="smoke hopper", measures=True),
        Step("more shapes", "i", (*ops, "--preset", "quick", "--contenders", f"triton,{CEILINGS}"), 120, 300,
             measures=True),
    ]  # fmt: skip


def _pytest(cores: int | None) -> tuple[str, ...]:
    """The tests that need a GPU, each named as it ends; on several cores, with a limit for each, where that can be."""
    command = ["pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["-k", "not any_combination"]  # each of its examples is compiled anew: minutes
    if find_spec("xdist") is not None:
        command += ["-n", str(min(12, cores or os.cpu_count() or 1))]
    if find_spec("pytest_timeout") is not None:
        # "thread" ends the worker with the test: a signal is not heard by a process that waits for the GPU
        command += ["--timeout", str(TEST_SECONDS), "--timeout-method", "thread"]
    return (*command, *(f"python_tests/{name}" for name in SUITES))


def fits(steps: Sequence[Step], seconds: float) -> list[Step]:
    """Those that a call of so many seconds reaches if each takes what it is planned to."""
    reached = []
    for step in steps:
        if step.planned <= seconds:
            reached.append(step)
            seconds -= step.planned
    return reached
