"""Where a benchmark ran: versions, processor, commit, date. Imports torch only, so that it works on a bare machine."""

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

COMMIT_VARIABLE = "ATMAN_COMMIT"
REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
PROVENANCE = REPOSITORY / "build" / "gpu-bundle" / "provenance.json"  # brought by benchmarks.gpu.bundle
# What decides a result, by name: patterns of files under the repository.
SOURCES = {
    "triton": ("atman_kernels/backends/triton/*.py",),
    "cuda": ("csrc/*.h", "csrc/tensor.cpp", "csrc/cuda/**/*", "benchmarks/ladder/*.cu"),
    "tables": ("atman_kernels/backends/triton/configs/*.json",),
    "package": ("atman_kernels/**/*.py",),
}
# Instruction sets that decide how fast matrix products are.
_FEATURES = {"avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "sve"}
_STATE = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")


def environment() -> dict[str, Any]:
    """Versions, CPU, threads, commit, date and the load of the machine, as JSON types."""
    cpu, features = _cpu()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "sources": sources(),
        "cpu": cpu,
        "cpu_features": features,
        "cpu_count": os.cpu_count(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {
            name: _version(name)
            for name in ("atman-kernels", "torch", "triton", "transformers", "captum", "inseq", "numpy", "scipy")
        },
        "command": " ".join(map(_without_folder, sys.argv)),
    }


def _without_folder(argument: str) -> str:
    """A result file tells what was run, and nothing about where things lie on the machine."""
    name, equals, value = argument.rpartition("=")
    return f"{name}{equals}{Path(value).name}" if os.sep in value else argument


def gpu_environment() -> dict[str, Any]:
    """The GPU, its driver and CUDA, with its clocks, power and temperature at this moment, as JSON types."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **gpu_state(),
    }


def gpu_state() -> dict[str, str]:
    """What nvidia-smi says about the GPU now; empty where it says nothing."""
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid).removeprefix("GPU-")
    query = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(_STATE)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):  # no nvidia-smi, or it refuses
        return {}
    values = [value.strip() for value in said.splitlines()[0].split(",")]
    return dict(zip(_STATE, values, strict=False))


def gpu_slug() -> str:
    """The GPU's name as part of a file name."""
    return _slug(torch.cuda.get_device_name())


def cpu_slug() -> str:
    """The CPU's name as part of a file name."""
    return _slug(f"{_cpu()[0]}-{os.cpu_count()}")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _cpu() -> tuple[str, list[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), []
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    known = set(flags[1].split()) if flags else set()
    return (name[1] if name else platform.machine()), sorted(_FEATURES & known)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        if name == "atman-kernels":
            import atman_kernels

            return atman_kernels.__version__
        return None


@cache
def sources() -> dict[str, str]:
    """Name -> hash of the files that decide a result, as they were when this was first asked for."""
    return hashes()


def hashes() -> dict[str, str]:
    """The same of the files as they are."""
    return {name: _hash(patterns) for name, patterns in SOURCES.items()}


def _hash(patterns: tuple[str, ...]) -> str:
    found = sorted({path for pattern in patterns for path in REPOSITORY.glob(pattern) if path.is_file()})
    digest = hashlib.sha256()
    for path in found:
        digest.update(f"{path.relative_to(REPOSITORY).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def commit() -> str | None:
    """The commit of this tree: by the environment, git or a bundle; "-dirty" if the package is not as it was then."""
    if COMMIT_VARIABLE in os.environ:  # a copy of the tree without its history
        return os.environ[COMMIT_VARIABLE]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", "atman_kernels") else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or not a checkout
        return _bundled_commit()


def _bundled_commit() -> str | None:
    if not PROVENANCE.is_file():
        return None
    made = json.loads(PROVENANCE.read_text(encoding="utf-8"))
    same = made["sources"]["package"] == sources()["package"]
    return made["commit"] if same or made["commit"] is None else f"{made['commit'].removesuffix('-dirty')}-dirty"
