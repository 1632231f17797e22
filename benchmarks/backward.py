"""Forward and backward of the op on a CPU, against the other ways to get the same gradients: time and peak memory.

    python -m benchmarks.backward                       # 512 to 8,192 keys, float32; some minutes on two cores
    python -m benchmarks.backward --lengths 512 --rounds 1

One causal sequence in SmolLM2's head layout, gradients of queries, keys and values, of the factors where asked. Every
contender is held against autograd through the plain formula in float64 at 256 keys before anything is timed; all take
turns within a round, and a ratio is the median of those of the rounds. Peak memory is the growth of the process that
runs the contender once and nothing else.
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import atman_kernels as ak
from benchmarks.machine import REPOSITORY, RESULTS, cpu_slug, environment
from benchmarks.measure import can_measure_peak, peak_bytes

HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
LENGTHS = (512, 1024, 2048, 4096, 8192)
CHECKED = 256  # keys at which every gradient is looked at
TOLERANCE = 1e-4  # of the largest gradient, float32
MOST_SCORES = 1 << 28  # numbers of one scores tensor: what holds several of these would not fit
OPERATIONS = 3.5  # of the forward's: scores once more, and four products of their size
FACTOR = 0.1
CONTENDERS = ("ours", "ours_d_factor", "sdpa_bias", "sdpa_math", "sdpa_flash", "eager", "flex")


def problem(length: int, contender: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """query, key, value (1, heads, L, D), factor (1, L) with every 64th key turned down, d_output."""
    generator = torch.Generator().manual_seed(length)
    query, key, value, d_output = (
        torch.randn(1, heads, length, HEAD_DIM, generator=generator).to(dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    factor = torch.ones(1, length, dtype=dtype)
    if contender != "sdpa_flash":  # which takes no bias
        factor[0, ::64] = FACTOR
    return {"query": query, "key": key, "value": value, "factor": factor, "d_output": d_output}


def plain(query: Tensor, key: Tensor, value: Tensor, factor: Tensor) -> Tensor:
    """The formula over all scores, by autograd."""
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (key, value))
    scores = query @ key.mT * HEAD_DIM**-0.5 + factor.log()[:, None, None]
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -math.inf).softmax(-1) @ value


def forward_of(contender: str, case: dict[str, Tensor]) -> Callable[[dict[str, Tensor]], Tensor]:
    """From the tensors to the output; what a contender needs beside them is made here, before the clock starts."""
    length = case["query"].shape[2]
    if contender.startswith("ours"):
        return lambda x: ak.suppressed_attention(x["query"], x["key"], x["value"], x["factor"], is_causal=True)  # type: ignore[return-value]
    if contender == "eager":
        return lambda x: plain(x["query"], x["key"], x["value"], x["factor"])
    if contender == "flex":
        return _flex(case)
    bias = None
    if contender != "sdpa_flash":
        causal = torch.full((length, length), -math.inf, dtype=case["query"].dtype).triu(1)
        bias = causal + case["factor"].log()[:, None, None]  # [1, 1, L, L]
    backend = {"sdpa_math": SDPBackend.MATH}.get(contender, SDPBackend.FLASH_ATTENTION)

    def attend(x: dict[str, Tensor]) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(
                x["query"], x["key"], x["value"], attn_mask=bias, is_causal=bias is None, enable_gqa=True
            )

    return attend


def _flex(case: dict[str, Tensor]) -> Callable[[dict[str, Tensor]], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length, log_factor = case["query"].shape[2], case["factor"][0].log()
    mask = create_block_mask(lambda b, h, q, k: k <= q, None, None, length, length, device="cpu")
    compiled = torch.compile(flex_attention, dynamic=False)

    def suppressed(score: Tensor, _b: Tensor, _h: Tensor, _q: Tensor, k: Tensor) -> Tensor:
        return score + log_factor[k]

    return lambda x: compiled(x["query"], x["key"], x["value"], score_mod=suppressed, block_mask=mask, enable_gqa=True)


def step_of(contender: str, case: dict[str, Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """One forward and one backward; the gradients of queries, keys, values, and of the factors where asked."""
    names = ["query", "key", "value", *(["factor"] if contender == "ours_d_factor" else [])]
    leaves = {name: case[name].detach().requires_grad_() for name in names}
    forward, d_output = forward_of(contender, case), case["d_output"]
    return lambda: torch.autograd.grad(forward(case | leaves), list(leaves.values()), d_output)


def why_not(contender: str, length: int) -> str | None:
    """The reason why a contender gets no time at a length."""
    if contender in ("eager", "sdpa_math") and HEADS * length * length > MOST_SCORES:
        return f"would keep several tensors of {HEADS * length * length * 4 / 1e9:.1f} GB"
    return None


def wrong(contender: str) -> str | None:
    """What is wrong with a contender's gradients, if anything."""
    case = problem(CHECKED, contender)
    try:
        found = step_of(contender, case)()
    except Exception as error:  # whatever it is: another project's code
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    names = ("query", "key", "value", "factor")[: len(found)]
    exact = {name: case[name].double().requires_grad_() for name in names}
    wide = {name: x.double() for name, x in case.items()} | exact
    output = plain(wide["query"], wide["key"], wide["value"], wide["factor"])
    expected = torch.autograd.grad(output, list(exact.values()), wide["d_output"])
    for name, got, truth in zip(names, found, expected, strict=True):
        off = float((got - truth).abs().max() / truth.abs().max())
        if not off < TOLERANCE:
            return f"gradient by {name} is off by {off:.2g} of the largest"
    return None


def timed(contenders: list[str], length: int, rounds: int) -> dict[str, list[float]]:
    """Seconds per contender and round, after one call that is not counted."""
    steps = {name: step_of(name, problem(length, name)) for name in contenders}
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_in_a_process(contender: str, length: int) -> int | None:
    command = [sys.executable, "-m", "benchmarks.backward", "--peak-of", contender, "--lengths", str(length)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def measure(
    lengths: tuple[int, ...], rounds: int, contenders: tuple[str, ...], result: dict[str, Any], path: Path
) -> None:
    """Fills the result, and writes it after every length."""
    refused = {name: reason for name in contenders if (reason := wrong(name))}
    rows: list[dict[str, Any]] = []
    result |= {"refused": refused, "rows": rows}
    for length in lengths:
        names = [name for name in contenders if name not in refused and not why_not(name, length)]
        seconds = timed(names, length, rounds)
        operations = OPERATIONS * 2 * HEADS * HEAD_DIM * length * (length + 1)
        for name in names:
            ratios = [a / b for a, b in zip(seconds[name], seconds["ours"], strict=True)]
            rows.append(
                {
                    "length": length,
                    "contender": name,
                    "ms": median(seconds[name]) * 1e3,
                    "all_ms": [x * 1e3 for x in seconds[name]],
                    "gflops_per_second": operations / median(seconds[name]) / 1e9,
                    "times_ours": median(ratios),
                    "peak_bytes": peak_in_a_process(name, length) if can_measure_peak() else None,
                }
            )
            click.echo(shown(rows[-1]))
        result["environment"]["load_average_at_end"] = os.getloadavg()[0]
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def shown(row: dict[str, Any]) -> str:
    peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:8.0f} MB"
    rate = f"{row['gflops_per_second']:6.0f} GFLOP/s"
    return f"{row['length']:5}  {row['contender']:14} {row['ms']:9.1f} ms {rate} {row['times_ours']:6.2f} × ours {peak}"


@click.command(help=__doc__)
@click.option("--lengths", default=",".join(map(str, LENGTHS)), show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--only", default=",".join(CONTENDERS), show_default=True, help="Contenders; ours is always among them.")
@click.option("--threads", type=int)
@click.option("--peak-of", type=click.Choice(CONTENDERS), hidden=True)
@click.option("--output", type=click.Path(path_type=Path), help="[default: results/backward-<cpu>.json]")
def main(lengths: str, rounds: int, only: str, threads: int | None, peak_of: str | None, output: Path | None) -> None:
    if threads:
        torch.set_num_threads(threads)
    wanted = tuple(int(x) for x in lengths.split(","))
    if peak_of is not None:
        step_of(peak_of, problem(CHECKED, peak_of))()  # what is loaded or compiled once
        case = problem(wanted[0], peak_of)
        click.echo(peak_bytes(lambda: step_of(peak_of, case)()))  # a bias is a part of what SDPA takes
        return
    contenders = tuple(dict.fromkeys(("ours", *only.split(","))))
    result: dict[str, Any] = {
        "environment": environment(),
        "layout": {"query_heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "dtype": "float32"},
        "rounds": rounds,
    }
    path = output or RESULTS / f"backward-{cpu_slug()}.json"
    measure(wanted, rounds, contenders, result, path)
    for name, reason in result["refused"].items():
        click.echo(f"{name}: {reason}")
    click.echo(f"written to {path}")


if __name__ == "__main__":
    main()
