"""Registers, spills, shared memory and warpgroup products of every configured kernel, on a machine without a GPU.

    python -m benchmarks.compile_report [--architecture sm_90] [--dtype 16-bit] [--head-dim 128] [--regime dense]
        [--features] [--json FILE] [--markdown FILE]

Exits with 1 if a kernel spills, asks for more shared memory than its architecture has, or has its warpgroup products
serialised by the assembler.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from atman_kernels.backends.triton import configs
from atman_kernels.backends.triton.configs import KernelConfig, Key
from atman_kernels.backends.triton.offline import Call, compile_call

DTYPES = {"16-bit": torch.bfloat16, "32-bit": torch.float32}
# What changes the code beside the table's keys. Each is tried on one head dimension.
FEATURES: tuple[dict[str, Any], ...] = (
    {"mode": "multiplicative"},
    {"mode": "shifted"},
    {"factor": False},
    {"is_causal": False, "sliding_window": 64},
    {"softcap": 30.0},
    {"sinks": True, "splits": 4},
    {"bias": True},
    {"head_dim": 80},
    {"head_dim": 96, "value_dim": 128},
    {"dtype": torch.float16},
)

# Regime of the backward's tables → kernel, kind of call, what is wanted of it.
BACKWARD: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "dense_query": ("query_gradient", "dense", ("query",)),
    "packed_query": ("query_gradient", "packed", ("query",)),
    "dense_key": ("key_gradient", "dense", ("key", "value", "factor")),
    "packed_key": ("key_gradient", "packed", ("key", "value", "own_key", "own_value")),
    "broadcast": ("broadcast_gradient", "packed", ("factor",)),
}


def calls(key: Key, config: KernelConfig) -> Iterator[Call]:
    """What a table's entry is compiled for: the regime's kinds of batch, with factors."""
    if key.regime in BACKWARD:
        _, kind, gradients = BACKWARD[key.regime]
        yield Call(kind, DTYPES[key.dtype], key.head_dim, config=config, gradients=gradients)
        return
    kinds = ("dense", "packed") if key.regime == "decode" else (key.regime,)
    for kind in kinds:
        splits = 4 if key.regime == "decode" else 1
        yield Call(kind, DTYPES[key.dtype], key.head_dim, config=config, splits=splits)


def feature_calls(
    key: Key, config: KernelConfig, features: tuple[dict[str, Any], ...] = (*FEATURES, {"key_mask": True})
) -> Iterator[Call]:
    """The same with features, each with what is left of the entry beside it."""
    for call in calls(key, config):
        for changes in features:
            changed = replace(call, **changes)
            if changed.key_mask and changed.kind == "packed":
                continue
            if key.regime not in BACKWARD:
                yield replace(changed, config=changed.fitted(config))
                continue
            wanted = changed.gradients if changed.factor else tuple(x for x in changed.gradients if x != "factor")
            if changed.bias and key.regime == "broadcast":
                wanted = ("bias",)
            if wanted:
                dims = changed.head_dim, changed.value_dim or changed.head_dim
                mode = changed.mode if changed.factor else "log_additive"
                smaller = configs.fitted_backward(
                    config, key.regime, *dims, changed.bias, mode, changed.softcap is not None
                )
                yield replace(changed, config=smaller, gradients=wanted)


def measure(architecture: str, key: Key, call: Call) -> dict[str, Any]:
    """One row of the report: the kernel that a regime is for, the larger one if a call has two."""
    capability = configs.ARCHITECTURES[architecture][0]
    name = BACKWARD[key.regime][0] if key.regime in BACKWARD else "attention"
    found = [kernel for kernel in compile_call(capability, call) if kernel.kernel == name]
    usage = {
        name: max(getattr(kernel, name) for kernel in found) for name in ("registers", "spilled", "shared", "wgmma")
    }
    serialized = any(kernel.serialized for kernel in found)
    described = {**asdict(call), "dtype": str(call.dtype).removeprefix("torch."), "config": asdict(call.config)}  # type: ignore[arg-type]
    fits = usage["spilled"] == 0 and usage["shared"] <= configs.SHARED_MEMORY[architecture] and not serialized
    named = {"architecture": architecture, "regime": key.regime}
    return {**named, **described, **usage, "serialized": serialized, "fits": fits}


def rows(
    architectures: list[str], features: bool, is_asked: Callable[[Key], bool] = lambda key: True
) -> Iterator[dict[str, Any]]:
    for architecture in architectures:
        table = configs.load(architecture) | configs.load(f"{architecture}_backward")
        for key, config in table.items():
            if not is_asked(key):
                continue
            wanted = feature_calls(key, config) if features and key.head_dim == 128 else calls(key, config)
            for call in wanted:
                yield measure(architecture, key, call)


def markdown(found: list[dict[str, Any]]) -> str:
    """The rows as a table, one per tile and use."""
    lines = [
        f"Compiled with Triton {version('triton')}; nothing was run. Bytes spilled are per thread, shared memory per",
        "block; `wgmma` counts a Hopper GPU's warpgroup products in the code. A tile has rows × keys.",
        "",
        "| architecture | kernel of | dtype | D | tile | warps | stages | registers | spilled | shared KiB | wgmma |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        config = row["config"]
        cells = [row["architecture"], row["regime"], row["dtype"], row["head_dim"]]
        cells += [f"{config['block_m']} × {config['block_n']}", config["num_warps"], config["num_stages"]]
        cells += [row["registers"], row["spilled"], f"{row['shared'] / 1024:.1f}", row["wgmma"] or ""]
        lines.append(f"| {' | '.join(map(str, cells))} |".replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", action="append", choices=list(configs.ARCHITECTURES))
    parser.add_argument("--dtype", action="append", choices=configs.DTYPES)
    parser.add_argument("--head-dim", action="append", type=int, choices=configs.HEAD_DIMS)
    parser.add_argument("--regime", action="append", choices=(*configs.REGIMES, *configs.BACKWARD_REGIMES))
    parser.add_argument("--features", action="store_true", help="also every feature, at head dimension 128")
    parser.add_argument("--json", type=Path, help="where to write the rows as JSON")
    parser.add_argument("--markdown", type=Path, help="where to write them as a table")
    options = parser.parse_args()
    asked = (options.dtype, options.head_dim, options.regime)

    def is_asked(key: Key) -> bool:
        its = key.dtype, key.head_dim, key.regime
        return all(wanted is None or one in wanted for one, wanted in zip(its, asked, strict=True))

    found = []
    print("arch    regime       kind    dtype     D    M    N warps stages  registers spilled  shared KiB  wgmma")
    for row in rows(options.architecture or list(configs.ARCHITECTURES), options.features, is_asked):
        found.append(row)
        config = row["config"]
        print(
            f"{row['architecture']:7} {row['regime']:12} {row['kind']:7} {row['dtype']:9}{row['head_dim']:4}"
            f"{config['block_m']:5}{config['block_n']:5}{config['num_warps']:6}{config['num_stages']:7}"
            f"{row['registers']:11}{row['spilled']:8}{row['shared'] / 1024:12.1f}{row['wgmma']:7}"
            f"{'  serialised' if row['serialized'] else ''}"
            f"{'' if row['fits'] else '  does not fit'}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(markdown(found), encoding="utf-8")
    return 0 if all(row["fits"] for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
