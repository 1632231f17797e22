"""Registers, spills, shared memory and warpgroup products of every configured kernel, on a machine without a GPU.

    python -m benchmarks.compile_report [--architecture sm_90] [--features] [--json FILE]

Exits with 1 if a kernel spills, asks for more shared memory than its architecture has, or has its warpgroup products
serialised by the assembler.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
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


def calls(key: Key, config: KernelConfig) -> Iterator[Call]:
    """What a table's entry is compiled for: the regime's kinds of batch, with factors."""
    kinds = ("dense", "packed") if key.regime == "decode" else (key.regime,)
    for kind in kinds:
        splits = 4 if key.regime == "decode" else 1
        yield Call(kind, DTYPES[key.dtype], key.head_dim, config=config, splits=splits)


def feature_calls(key: Key, config: KernelConfig) -> Iterator[Call]:
    for call in calls(key, config):
        for changes in FEATURES:
            changed = replace(call, **changes)
            yield replace(changed, config=changed.fitted(config))
        if call.kind == "dense":
            yield replace(call, key_mask=True)


def measure(architecture: str, key: Key, call: Call) -> dict[str, Any]:
    """One row of the report: the attention kernel of a call, the larger one if there are two."""
    capability = configs.ARCHITECTURES[architecture][0]
    attention = [kernel for kernel in compile_call(capability, call) if kernel.kernel == "attention"]
    usage = {
        name: max(getattr(kernel, name) for kernel in attention) for name in ("registers", "spilled", "shared", "wgmma")
    }
    serialized = any(kernel.serialized for kernel in attention)
    described = {**asdict(call), "dtype": str(call.dtype).removeprefix("torch."), "config": asdict(call.config)}  # type: ignore[arg-type]
    fits = usage["spilled"] == 0 and usage["shared"] <= configs.SHARED_MEMORY[architecture] and not serialized
    named = {"architecture": architecture, "regime": key.regime}
    return {**named, **described, **usage, "serialized": serialized, "fits": fits}


def rows(architectures: list[str], features: bool) -> Iterator[dict[str, Any]]:
    for architecture in architectures:
        for key, config in configs.load(architecture).items():
            wanted = feature_calls(key, config) if features and key.head_dim == 128 else calls(key, config)
            for call in wanted:
                yield measure(architecture, key, call)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", action="append", choices=list(configs.ARCHITECTURES))
    parser.add_argument("--features", action="store_true", help="also every feature, at head dimension 128")
    parser.add_argument("--json", type=Path, help="where to write the rows as JSON")
    options = parser.parse_args()
    found = []
    print("arch    regime   kind    dtype     D    M    N warps stages  registers spilled  shared KiB  wgmma")
    for row in rows(options.architecture or list(configs.ARCHITECTURES), options.features):
        found.append(row)
        config = row["config"]
        print(
            f"{row['architecture']:7} {row['regime']:8} {row['kind']:7} {row['dtype']:9}{row['head_dim']:4}"
            f"{config['block_m']:5}{config['block_n']:5}{config['num_warps']:6}{config['num_stages']:7}"
            f"{row['registers']:11}{row['spilled']:8}{row['shared'] / 1024:12.1f}{row['wgmma']:7}"
            f"{'  serialised' if row['serialized'] else ''}"
            f"{'' if row['fits'] else '  does not fit'}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["fits"] for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
