"""Compile every Triton kernel of the plan, for a Hopper GPU that need not be there.

    TRITON_CACHE_DIR=DIR python -m benchmarks.gpu.precompile [--part 0/2] [--list]

The same calls are made as on the GPU, on tensors that nobody writes to, and each launch compiles instead of running.
Kernels that one Triton's cache holds are found by the same Triton elsewhere: the key is made of the kernels' source,
of the arguments' kinds and of Triton itself.
"""

import argparse
import atexit
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from atman_kernels.backends.call import DenseCall, PackedCall
from atman_kernels.formula import MODES, ScoreOptions
from benchmarks.gpu import pretended_cuda

CAPABILITY = 90
Call = Callable[[], object]


def work() -> Iterator[tuple[str, Call]]:
    """(what for, a call that launches its kernels), to be made one after the other."""
    yield from _small_shapes()
    yield from _headline()
    yield from _backward()
    yield from _explanation()
    yield from _tuning()


def _small_shapes() -> Iterator[tuple[str, Call]]:
    from benchmarks.gpu import small_shapes

    for dtype in small_shapes.DTYPES.values():
        for name, op, arguments in small_shapes.calls(dtype):
            yield f"{dtype} {name}", _placed(op, arguments, small_shapes._converted)


def _placed(op: Any, arguments: dict[str, Any], convert: Any) -> Call:
    return lambda: op(**convert(arguments, "cuda", None), backend="triton", return_lse=True)


def _headline() -> Iterator[tuple[str, Call]]:
    from benchmarks.gpu import cases, contenders, problems

    problems._normal = lambda dtype, device: lambda *sizes: torch.empty(sizes, dtype=dtype, device=device)
    ours = contenders.CONTENDERS["triton"]
    for shape in cases.PRESETS["headline"]():

        def run(shape: Any = shape) -> None:
            problem = problems.build(shape, torch.bfloat16, torch.device("cuda"))
            for setting in ours.settings(shape):
                ours.prepare(problem, setting)()

        yield shape.name, run


def _backward() -> Iterator[tuple[str, Call]]:
    """Forward and backward as autograd calls them, of the small shapes that are compared and those that are timed."""
    from benchmarks.gpu import backward, contenders, problems

    ours = contenders.CONTENDERS["triton"]
    for shape in (shape for pair in backward.shapes(tiny=False) for shape in pair):

        def run(shape: Any = shape) -> None:
            problem = problems.build(shape, torch.bfloat16, torch.device("cuda"))
            for setting in backward.settings(ours):
                _gradients(problem, problem.factors[setting.factor])

        yield f"gradients, {shape.name}", run


def _gradients(problem: Any, factor: torch.Tensor | None) -> None:
    """By all tensors that the measurement asks for, without autograd, which wants a real device."""
    from atman_kernels.backends import triton as backend
    from atman_kernels.formula import Saved
    from benchmarks.gpu.problems import DenseProblem

    p, scale = problem, problem.query.shape[-1] ** -0.5
    call: Any
    if isinstance(p, DenseProblem):
        options = ScoreOptions(MODES[0], p.shape.is_causal, scale, None, None, True)
        call = DenseCall(p.query, p.key, p.value, factor, None, None, None, options)
    else:
        pack, options = p.pack, ScoreOptions(MODES[0], True, scale, None, None, True)
        indices = pack.suffix_starts, pack.prefix_lengths, pack.base_starts, pack.row_variant, pack.row_position
        call = PackedCall(p.query, p.key, p.value, p.base_key, p.base_value, *indices, factor, None, None, options)
    output, lse = getattr(backend, call.OP)(call)
    wanted = {"query", "key", "value"} | ({"base_key", "base_value"} & set(call.TENSORS))
    getattr(backend, f"{call.OP}_backward")(call, Saved(output, lse, torch.empty_like(output), None), wanted)


def _explanation() -> Iterator[tuple[str, Call]]:
    """As a Llama's layers call the packed op: heads side by side in rows, factors as long as prompt and answer."""
    import atman_kernels as ak
    from benchmarks.gpu.explanation import PRESETS, TARGET_TOKENS

    config = PRESETS["8b"].config
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim, length = config["hidden_size"] // heads, PRESETS["8b"].prompt_tokens + TARGET_TOKENS - 1

    def run(variants: int, keys: int) -> None:
        pack = ak.VariantPack.build([keys - v for v in range(variants)], list(range(variants)), device="cuda")

        def rows(count: int, length: int) -> torch.Tensor:
            made = torch.empty(1, length, count, dim, dtype=torch.bfloat16, device="cuda")
            return made.transpose(1, 2)[0]

        query, key, value = (rows(n, pack.num_rows) for n in (heads, kv_heads, kv_heads))
        base_key, base_value = rows(kv_heads, keys), rows(kv_heads, keys)
        for base in ((base_key, base_value), (base_key.contiguous(), base_value.contiguous())):
            factor = torch.ones(variants, keys, device="cuda")
            ak.packed_suppressed_attention(query, key, value, *base, pack, factor, backend="triton")

    for variants in (16, 1):
        for keys in (length, length + 1):
            yield f"explanation, {variants} variants of {keys} keys", partial(run, variants, keys)


def _tuning() -> Iterator[tuple[str, Call]]:
    from atman_kernels.backends.triton import configs, tuning

    table = configs.load("sm_90")
    for key, config in tuning.hand_picked(table):

        def run(key: Any = key, config: Any = config) -> None:
            with configs.forced(config):
                tuning.workload(key, torch.device("cuda"))()

        yield f"{key} {config}", run


_HELD = ExitStack()  # of the process, which compiles and does nothing else
atexit.register(_HELD.close)


def compile_only() -> list[str]:
    """From here on launches compile; the list gets the name of each kernel that was not in the cache."""
    from triton.runtime.driver import driver

    from atman_kernels.backends import triton as backend
    from atman_kernels.backends.triton import launch, offline

    compiled: list[str] = []

    def ours(func: Any, arguments: list[Any]) -> Any:
        name = func._schema.name.partition("::")[2]
        call, _ = (DenseCall if name == DenseCall.OP else PackedCall).read(arguments)
        return getattr(backend, name)(call)

    def run(kernel: Any, grid: Any, arguments: dict[str, Any], *_: Any, **__: Any) -> None:
        held = {n: a.held if isinstance(a, pretended_cuda.Pretended) else a for n, a in arguments.items()}
        compiled.append(kernel.fn.__name__)
        kernel.warmup(grid=grid, **held)

    pretended_cuda.install(ours)
    _HELD.enter_context(launch.intercepted(run))
    driver.set_active(offline._Driver(CAPABILITY))
    return compiled


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu.precompile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", default="0/1", help="which of how many processes this one is, such as 0/2")
    parser.add_argument("--list", action="store_true", help="name the calls, and stop")
    options = parser.parse_args()
    compiled = compile_only()
    index, parts = map(int, options.part.split("/"))
    started, failed = time.monotonic(), 0
    for i, (name, call) in enumerate(work()):
        if options.list:
            print(name)
            continue
        if i % parts != index:
            continue
        try:
            with torch.no_grad():
                call()
        except Exception as error:
            failed += 1
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr, flush=True)
    print(
        f"part {options.part}: {len(compiled)} launches, {failed} failed, {time.monotonic() - started:.0f} s",
        flush=True,
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
