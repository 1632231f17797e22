"""Forward and backward together: ours against FlashAttention, cuDNN, FlexAttention and SDPA with a bias, where right.

    python -m benchmarks.gpu.backward --seconds 60

Gradients of queries, keys and values are compared with autograd's through the plain formula in float64: all of them at
a small shape of the same kind, and those of sampled queries on the very tensors that are timed. What is not right gets
no time. Operations are counted as 3.5 times the forward's; memory is what a call takes beyond its inputs. What to reach
is 60 % of FlashAttention's rate at head dimension 128.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atman_kernels import backends
from benchmarks.gpu import flex
from benchmarks.gpu.__main__ import FAILED, NOTHING_RUN, PASSED, missing_gpu
from benchmarks.gpu.cases import LLAMA, Shape, exact, prefill, shared
from benchmarks.gpu.contenders import CONTENDERS, Contender, Setting, Unsupported
from benchmarks.gpu.problems import PackProblem, Problem, build, plain_attention
from benchmarks.gpu.report import label, plain_table
from benchmarks.gpu.results import write_json
from benchmarks.gpu.timing import Stopwatch
from benchmarks.machine import RESULTS, environment, gpu_environment, gpu_slug

OPERATIONS = 3.5  # of the forward's: scores once more, and four products of their size
WHO = ("triton", "flash", "cudnn", "sdpa_bias", "flex")
DENSE_TENSORS = ("query", "key", "value")
PACK_TENSORS = (*DENSE_TENSORS, "base_key", "base_value")
Gradients = tuple[Tensor, ...]


def shapes(tiny: bool) -> list[tuple[Shape, Shape]]:
    """(what is timed, a small one of the same kind, of which every gradient is looked at)"""
    k = 1024
    small: list[Shape] = [prefill(200, True), exact(96, rows=250), shared(130, 6, 8)]
    if tiny:
        heads = replace(LLAMA, query=4, kv=2, dim=16)
        small = [prefill(60, True, heads), exact(40, heads, rows=60), shared(33, 3, 4, heads)]
        return [(shape, shape) for shape in small]
    large: list[Shape] = [prefill(16 * k, True), exact(1 * k), shared(8 * k, 256, 8)]
    return list(zip(large, small, strict=True))


def settings(contender: Contender) -> list[Setting]:
    return [Setting("none"), Setting("sparse")] if contender.is_ours else list(contender.settings(prefill(1, True)))


def differentiable(problem: Any, dtype: torch.dtype) -> tuple[Problem, list[Tensor]]:
    """The same problem over tensors that gradients are wanted of."""
    names = PACK_TENSORS if isinstance(problem, PackProblem) else DENSE_TENSORS
    leaves = {name: getattr(problem, name).detach().to(dtype).requires_grad_() for name in names}
    return replace(problem, **leaves), list(leaves.values())


def exact_gradients(problem: Problem, setting: Setting, grad: Tensor, dtype: torch.dtype) -> Gradients:
    """By the plain formula in a dtype, of those rows of the output that are sampled."""
    wide, leaves = differentiable(problem, dtype)
    sampled = torch.zeros((), dtype=dtype, device=grad.device)
    for piece in wide.pieces():
        output = plain_attention(piece, problem.factors[setting.factor], setting.mode, dtype)
        sampled = sampled + (output * piece.of(grad).to(dtype)).sum()
    return torch.autograd.grad(sampled, leaves)


def objection(found: Gradients, problem: Problem, setting: Setting, grad: Tensor, whole: bool) -> str | None:
    """What is wrong with gradients; `whole`: all rows are sampled. Otherwise those of the sampled queries count."""
    exact_ones = exact_gradients(problem, setting, grad, torch.float64)
    plain_ones = exact_gradients(problem, setting, grad, problem.query.dtype)
    names = PACK_TENSORS if isinstance(problem, PackProblem) else DENSE_TENSORS
    for name, came, exact_one, plain_one in zip(names, found, exact_ones, plain_ones, strict=True):
        if not whole and name != "query":
            continue
        here = torch.ones_like(came, dtype=torch.bool)
        if not whole:
            here = torch.zeros_like(came, dtype=torch.bool)
            view = here if here.ndim == 4 else here[None]
            for piece in problem.pieces():
                view[piece.entry][:, piece.rows] = True
        size = exact_one[here].norm()
        off = float((came[here].double() - exact_one[here]).norm() / size)
        allowed = float(2 * (plain_one[here].double() - exact_one[here]).norm() / size) + torch.finfo(came.dtype).eps
        if not (off <= allowed and bool(came.isfinite().all())):
            return f"the gradient of {name} is off by {off:.3g} of its norm where rounding explains {allowed:.3g}"
    return None


def prepared(contender: Contender, problem: Problem, setting: Setting) -> tuple[Callable[[], Gradients], Tensor]:
    """A call that runs forward and backward, and the gradient of the output that it is given."""
    asked, leaves = differentiable(problem, problem.query.dtype)
    forward = contender.prepare(asked, setting)
    output = forward()
    grad = torch.randn(output.shape, dtype=output.dtype, device=output.device)
    wanted = leaves if contender.covers == "everything" else leaves[:1]
    return lambda: torch.autograd.grad(forward(), wanted, grad), grad


def memory(call: Callable[[], object]) -> int:
    """Bytes that a call takes at its peak beyond what was there before."""
    if not torch.cuda.is_available():
        return 0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def with_shares(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each with its share of FlashAttention's rate at the same shape, where both have one."""
    flash = {row["case"]: row["tflops_per_second"] for row in rows if row["contender"] == "flash" and "ms" in row}
    return [
        row | {"of_flash": row["tflops_per_second"] / flash[row["case"]]}
        if "ms" in row and row["case"] in flash
        else row
        for row in rows
    ]


def measure(contender: Contender, pair: tuple[Shape, Shape], stopwatch: Stopwatch) -> list[dict[str, Any]]:
    rows = []
    for setting in settings(contender):
        timed, small = pair
        row = {"case": timed.name, "contender": contender.name, "is_ours": contender.is_ours, **vars(setting)}
        try:
            for shape, whole in ((small, True), (timed, False)):
                problem = build(shape, torch.bfloat16, stopwatch.device)
                call, grad = prepared(contender, problem, setting)
                if (reason := objection(call(), problem, setting, grad, whole)) is not None:
                    row |= {"status": "wrong", "reason": f"{shape.name}: {reason}"}
                    break
            else:
                timing = stopwatch.time(call)
                flops = OPERATIONS * timed.work(2, setting.factor).flops
                row |= {"status": "ok", **timing.record(), "tflops_per_second": flops / timing.ms / 1e9}
                row["peak_bytes"] = memory(call)
        except Unsupported as error:
            row |= {"status": "unsupported", "reason": str(error)}
        except Exception as error:
            first = (str(error).strip() or "no message").splitlines()[0]
            row |= {"status": "error", "reason": f"{type(error).__name__}: {first}"[:300]}
        rows.append(row)
        said = f"{row['ms']:.3f} ms {row['tflops_per_second']:.0f} TFLOP/s" if "ms" in row else row["reason"]
        print(f"{row['case']:34} {label(row):24} {row['status']}: {said}", flush=True)
    return rows


def without_backward() -> str | None:
    """Why ours cannot be measured: the reference would hold all scores."""
    if reason := backends.unavailable_reason("triton", "cuda"):
        return reason
    module = backends.load("triton", "cuda")
    return None if hasattr(module, "suppressed_attention_backward") else "the Triton backend has no backward"


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu.backward", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=300.0, help="begin nothing after so many")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, nothing compiled: to see that it runs")
    options = parser.parse_args(given)
    if reason := missing_gpu() or without_backward():
        print(f"no gradients to measure: {reason}", file=sys.stderr)
        return NOTHING_RUN
    ends = time.monotonic() + options.seconds
    flex.compiles = not options.tiny
    stopwatch = Stopwatch(torch.device("cuda"), 0.001 if options.tiny else 0.3, small=options.tiny)
    header = environment() | {"gpu": gpu_environment()}
    rows: list[dict[str, Any]] = []
    path = options.output / f"gpu-backward-{gpu_slug()}.json"
    for pair in shapes(options.tiny):
        for name in WHO:
            contender = CONTENDERS[name]
            if pair[0].group in contender.groups and time.monotonic() < ends:
                rows = with_shares(rows + measure(contender, pair, stopwatch))
                write_json(path, {"header": header, "rows": rows})
                torch.cuda.empty_cache()
    body = [
        [
            row["case"],
            label(row),
            f"{row['ms']:.3f}",
            f"{row['tflops_per_second']:.0f}",
            f"{row['of_flash']:.2f}" if "of_flash" in row else "",
            f"{row['peak_bytes'] / 2**20:.0f}",
        ]
        for row in rows
        if "ms" in row
    ]
    print(plain_table(("case", "contender", "ms", "TFLOP/s", "of flash", "MiB"), body, texts=2))
    if any(row["status"] == "wrong" or (row["status"] == "error" and row["is_ours"]) for row in rows):
        return FAILED
    return PASSED if body else NOTHING_RUN


if __name__ == "__main__":
    sys.exit(main())
