"""Both ops at small, odd shapes with every option, against the reference backend in float64 on the CPU.

    python -m benchmarks.gpu.small_shapes triton          # also what compute-sanitizer watches: it is slow
    python -m benchmarks.gpu.small_shapes triton --dtype bfloat16,float16,float32

It needs torch and the package alone: on a machine without pytest it is the check of the ops that remains. Exit code:
0 all are right, 1 some are not, 2 not all were tried.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import atman_kernels as ak
from atman_kernels import backends
from atman_kernels.errors import BackendUnavailableError
from atman_kernels.formula import MODES

Arguments = dict[str, Any]
# relative to the largest output; the reference computes with the very same rounded inputs
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # float32: products in TF32 allowed
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# batch, queries, keys, query heads, KV heads, head dim
DENSE = ((2, 17, 45, 4, 2, 64), (1, 130, 130, 8, 2, 128), (3, 1, 77, 4, 4, 64), (1, 65, 200, 2, 1, 256))
# suffixes, prefixes, query heads, KV heads, head dim
PACKED = (
    ((3, 1, 17), (70, 5, 33), 4, 2, 64),
    ((1,) * 40, (129,) * 40, 8, 2, 128),
    ((150, 0, 9), (0, 12, 140), 4, 4, 64),
)
OPTIONS: dict[str, Arguments] = {
    "window": {"sliding_window": 20},
    "softcap": {"softcap": 5.0},
    "scale": {"scale": 0.05},
    "sinks": {"sinks": True},
}


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Any, Arguments]]:
    """(what, the op, its arguments on the CPU): every option at the first shapes, the default mode at the others."""
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(dtype)

    def factor(*sizes: int) -> Tensor:
        menu = torch.tensor([0.0, 0.1, 1.0, 1.0, 1.0, 1.5])
        return menu[torch.randint(len(menu), sizes, generator=generator)]

    for suffixes, prefixes, heads, kv_heads, dim in PACKED:
        pack = ak.VariantPack.build(suffixes, prefixes)
        tensors: Arguments = {
            "query": normal(heads, pack.num_rows, dim),
            "key": normal(kv_heads, pack.num_rows, dim),
            "value": normal(kv_heads, pack.num_rows, dim),
            "base_key": normal(kv_heads, pack.base_end + 3, dim),
            "base_value": normal(kv_heads, pack.base_end + 3, dim),
            "pack": pack,
            "factor": factor(pack.num_variants, pack.longest + 1),
        }
        for what, options in _combinations(normal(heads), everything=suffixes is PACKED[0][0]):
            name = f"packed {len(suffixes)} variants, {pack.num_rows} rows, {heads}/{kv_heads} heads of {dim}, {what}"
            yield name, ak.packed_suppressed_attention, tensors | options
    for shape in DENSE:
        batch, queries, keys, heads, kv_heads, dim = shape
        tensors = {
            "query": normal(batch, heads, queries, dim),
            "key": normal(batch, kv_heads, keys, dim),
            "value": normal(batch, kv_heads, keys, dim),
            "factor": factor(batch, keys),
        }
        for what, options in _combinations(normal(heads), everything=shape is DENSE[0]):
            for is_causal in (True, False):
                name = f"dense {queries} x {keys}, {heads}/{kv_heads} heads of {dim}, causal {is_causal}, {what}"
                yield name, ak.suppressed_attention, tensors | options | {"is_causal": is_causal}


def _combinations(sinks: Tensor, everything: bool) -> Iterator[tuple[str, Arguments]]:
    """The default mode and a call without factors; or every mode, and every option in one of them, too."""
    yield MODES[0], {}
    yield "no factors", {"factor": None}
    if everything:
        for mode in MODES[1:]:
            yield mode, {"mode": mode}
        for i, (name, options) in enumerate(OPTIONS.items()):
            given = options | ({"sinks": sinks} if "sinks" in options else {})
            yield f"{MODES[i % 3]}, {name}", given | {"mode": MODES[i % 3]}


def check(
    backend: str, device: str, dtype: torch.dtype, seconds: float = math.inf, first: int | None = None
) -> tuple[list[str], int]:
    """What went wrong, one line each, and how many calls were not made: none is begun after so many seconds."""
    failures, done, started = [], 0, time.monotonic()
    every = list(calls(dtype))[:first]
    for name, op, arguments in every:
        if time.monotonic() - started > seconds:
            break
        done += 1
        reason = _difference(op, arguments, backend, device, TOLERANCE[dtype])
        if reason is not None:
            failures.append(f"{backend}, {dtype}, {name}: {reason}")
            print(failures[-1], flush=True)
    took = time.monotonic() - started
    left = len(every) - done
    late = f", {left} were not made for want of time" if left else ""
    print(f"{backend}, {dtype}: {done - len(failures)} of {done} calls are right{late} ({took:.0f} s)", flush=True)
    return failures, left


def _difference(op: Any, arguments: Arguments, backend: str, device: str, tolerance: float) -> str | None:
    exact, exact_lse = op(**_converted(arguments, "cpu", torch.float64), backend="reference", return_lse=True)
    try:
        output, lse = op(**_converted(arguments, device, None), backend=backend, return_lse=True)
    except BackendUnavailableError as error:
        # one kernel of several need not take everything, as long as it says so
        return None if ":" in backend else str(error)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    for what, came, expected in (("output", output, exact), ("lse", lse, exact_lse)):
        came = came.double().cpu()
        same_infinities = torch.equal(came.isinf(), expected.isinf())
        off = (came - expected).masked_fill(expected.isinf(), 0.0).abs()
        largest = expected.masked_fill(expected.isinf(), 0.0).abs().max().clamp(min=1.0)
        if not (same_infinities and bool((off <= tolerance * largest).all())):  # so that NaN is wrong
            return (
                f"{what} is off by {float(off.nan_to_num(torch.inf).max()):.3g}, {tolerance * largest:.3g} is allowed"
            )
    return None


def _converted(arguments: Arguments, device: str, dtype: torch.dtype | None) -> Arguments:
    """On a device; floating-point tensors in `dtype` if one is given."""
    result: Arguments = {}
    for name, value in arguments.items():
        if isinstance(value, ak.VariantPack):
            starts = value.suffix_starts.diff(), value.prefix_lengths, value.base_starts
            value = ak.VariantPack.build(*starts, device=device)
        elif isinstance(value, Tensor):
            value = value.to(device, dtype)
        result[name] = value
    return result


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.small_shapes", description=__doc__.splitlines()[0])
    parser.add_argument("backend", help=f"one of {', '.join(backends.NAMES)}, or one with a variant, as in cuda:hopper")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", default="bfloat16", help=f"some of {','.join(DTYPES)}")
    parser.add_argument("--first", type=int, help="only so many calls")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no call after so many")
    options = parser.parse_args(given)
    dtypes = options.dtype.split(",")
    if unknown := [name for name in dtypes if name not in DTYPES]:
        parser.error(f"--dtype: {unknown[0]!r} is none of {', '.join(DTYPES)}")
    if options.backend.partition(":")[0] not in backends.NAMES:
        parser.error(f"backend must be one of {', '.join(backends.NAMES)}, got {options.backend!r}")
    if reason := backends.unavailable_reason(options.backend, options.device):
        print(f"{options.backend} cannot run on {options.device}: {reason}", file=sys.stderr)
        return 2
    failed, left, ends = 0, 0, time.monotonic() + options.seconds
    for dtype in dtypes:
        seconds = ends - time.monotonic() if options.seconds < math.inf else math.inf
        failures, not_made = check(options.backend, options.device, DTYPES[dtype], seconds, options.first)
        failed, left = failed + len(failures), left + not_made
    return 1 if failed else 2 if left else 0


if __name__ == "__main__":
    sys.exit(main())
