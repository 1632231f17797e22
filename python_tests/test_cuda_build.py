"""The CUDA kernels without a GPU: the Hopper kernel run over a model of its instructions, and what the compiler made.

The model (csrc/checks/instructions_model.h) says again, for the host, what wgmma, TMA and barriers do. The kernel's
source is the one that nvcc compiles, thread for thread: geometry, block lists, flags, swizzles, register layouts,
pipeline and turns are those of the GPU. It cannot show speed, nor memory ordering between the GPU's units.
"""

import importlib.util
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from attention_cases import BACKEND_DTYPES, DENSE_CASES, MODES, PACK_CASES, DenseCase, PackCase, poisoned_memory
from comparison import assert_within_rounding
from test_backends import check as check_dense
from test_pack import check as check_packed
from torch import Tensor

from atman_kernels import backends
from atman_kernels.backends import cuda
from atman_kernels.errors import BackendUnavailableError

CSRC = Path(__file__).parents[1] / "csrc"
NVCC = shutil.which("nvcc") or ("/usr/local/cuda/bin/nvcc" if Path("/usr/local/cuda/bin/nvcc").exists() else None)
HOPPER = [(dtype, dim) for dtype in ("bf16", "fp16") for dim in (64, 128, 256)]
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


# --- the kernel over a model of its instructions ---


def build_model(folder: Path, flags: tuple[str, ...] = ()) -> ModuleType:
    """The module `_cuda` with the kernel on the host."""
    import pybind11

    compiler = shutil.which("g++")
    if NVCC is None or compiler is None:
        pytest.skip("needs g++ and the headers of CUDA")
    headers = Path(NVCC).resolve().parents[1] / "include"
    if not (headers / "cuda.h").exists():
        headers = Path("/usr/local/cuda/include")
    if not (headers / "cuda_bf16.h").exists():
        pytest.skip("the headers of CUDA are not beside nvcc")
    include = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"), headers)]
    sources = ("tensor.cpp", "cuda/binding.cpp", "cuda/call.cpp", "checks/hopper_on_host.cpp")
    common = [compiler, "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-w", *flags, *include]

    def compile_one(source: str) -> str:
        output = str(folder / f"{Path(source).stem}.o")
        run([*common, "-c", str(CSRC / source), "-o", output])
        return output

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    target = folder / "_cuda.so"
    run([compiler, "-shared", *objects, "-o", str(target)])
    spec = importlib.util.spec_from_file_location("_cuda", target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def modelled(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return build_model(tmp_path_factory.mktemp("modelled"))


class Properties:
    multi_processor_count = 3  # blocks of the grid: each takes several tiles


class Stream:
    cuda_stream = 0


@pytest.fixture
def on_the_model(modelled: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Backend "cuda:hopper" takes CPU tensors and runs the model."""
    monkeypatch.setattr(cuda, "_load", lambda: modelled)
    monkeypatch.setattr(cuda, "_device_problem", lambda device: "")
    monkeypatch.setattr(cuda, "unavailable_reason", lambda device_type: None)
    monkeypatch.setattr(cuda, "variants", lambda: cuda.KERNELS)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    monkeypatch.setattr(cuda, "_device_index", lambda tensor: 0)
    monkeypatch.setitem(BACKEND_DTYPES, "cuda:hopper", (torch.bfloat16, torch.float16))
    with poisoned_memory():
        yield


def fitting(case: Any, head_dim: int = 64) -> Any:
    """The case in a head dimension that the kernel takes."""
    case = replace(case, head_dim=head_dim, value_dim=head_dim)
    return replace(case, scale=0.1) if case.scale is not None else case


PACKED = {name: fitting(case) for name, case in PACK_CASES.items() if case.position_bias == "none"}
DENSE = {name: fitting(case) for name, case in DENSE_CASES.items() if case.position_bias == "none"}
WIDE = {
    "across_blocks": PackCase((130, 3, 201, 1), (17, 300, 0, 90), factor_values="sparse"),
    "window": PackCase((150, 40), (70, 210), sliding_window=40),
    "both_ways": PackCase((150, 40), (70, 210), is_causal=False),
    "grouped_by_eight": PackCase((3, 20, 1), (150, 60, 0), query_heads=8, kv_heads=1),
}


@pytest.mark.usefixtures("on_the_model")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PACKED)
def test_packed(name: str, mode: str) -> None:
    check_packed("cuda:hopper", PACKED[name], mode, "keys", torch.bfloat16)


@pytest.mark.usefixtures("on_the_model")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", DENSE)
def test_dense(name: str, mode: str) -> None:
    check_dense("cuda:hopper", DENSE[name], mode, "heads", torch.bfloat16)
