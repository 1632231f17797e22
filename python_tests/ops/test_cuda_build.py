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
from attention_cases import DENSE_CASES, MODES, PACK_CASES, PackCase, every_mode_for, poisoned_memory
from comparison import assert_same_bits
from op_checks import check_dense, check_packed
from torch import Tensor

from atman_kernels import backends
from atman_kernels.backends import cuda
from atman_kernels.errors import BackendUnavailableError
from atman_kernels.ops import packed_suppressed_attention

CSRC = Path(__file__).parents[2] / "csrc"
NVCC = shutil.which("nvcc") or ("/usr/local/cuda/bin/nvcc" if Path("/usr/local/cuda/bin/nvcc").exists() else None)
HOPPER = [(dtype, dim) for dtype in ("bf16", "fp16") for dim in (64, 128, 256)]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with poisoned_memory():
        yield


def fitting(case: Any, head_dim: int = 64) -> Any:
    """The case in a head dimension that the kernel takes."""
    case = replace(case, head_dim=head_dim, value_dim=head_dim)
    return replace(case, scale=0.1) if case.scale is not None else case


PACKED = {name: fitting(case) for name, case in PACK_CASES.items() if case.position_bias == "none"}
DENSE = {name: fitting(case) for name, case in DENSE_CASES.items() if case.position_bias == "none"}
LONG = {
    "a_row_without_prefix": PackCase((2, 3), (300, 0)),
    "across_blocks": PackCase((130, 3, 201, 1), (17, 300, 0, 90), factor_values="sparse"),
    "window": PackCase((150, 40), (70, 210), sliding_window=40),
    "both_ways": PackCase((150, 40), (70, 210), is_causal=False),
    "grouped_by_eight": PackCase((3, 20, 1), (150, 60, 0), query_heads=8, kv_heads=1),
    "everything": PackCase(
        (3, 0, 130, 45, 2), (15, 16, 140, 20, 0), (0, 9, 20, 24, 30), query_heads=6, kv_heads=2,
        sliding_window=71, softcap=3.0, scale=0.1, sinks=True, layout="rows_first",
    ),
}  # fmt: skip
SPLIT = {  # few rows over many keys
    "one_row": PackCase((1,), (1300,), factor_values="sparse"),
    "few_rows": PackCase((2, 1, 3), (900, 1500, 40), (0, 10, 3), sinks=True),
    "window": PackCase((2, 1, 3), (900, 1500, 40), sliding_window=300),
    "all_removed": PackCase((2, 1), (900, 700), factor_values="0"),
    "no_visible_key_in_most_parts": PackCase((2, 1), (1500, 1500), sliding_window=2),
}


@pytest.mark.usefixtures("on_the_model")
@pytest.mark.parametrize(("name", "mode"), every_mode_for(PACKED, "few_tokens_each", "window_several_bases", "softcap"))
def test_packed(name: str, mode: str) -> None:
    check_packed("cuda:hopper", PACKED[name], mode, "keys", torch.bfloat16)


@pytest.mark.usefixtures("on_the_model")
@pytest.mark.parametrize(("name", "mode"), every_mode_for(DENSE, "causal", "sinks_dead_rows", "shared_keys"))
def test_dense(name: str, mode: str) -> None:
    check_dense("cuda:hopper", DENSE[name], mode, "heads", torch.bfloat16)


@pytest.mark.usefixtures("on_the_model")
@pytest.mark.parametrize("instantiation", HOPPER, ids=str)
@pytest.mark.parametrize("name", LONG)
def test_every_instantiation(name: str, instantiation: tuple[str, int]) -> None:
    """Each with every case, and two of the cases in each of the modes."""
    dtype, head_dim = DTYPES[instantiation[0]], instantiation[1]
    mode = MODES[(list(LONG).index(name) + HOPPER.index(instantiation)) % len(MODES)]
    check_packed("cuda:hopper", fitting(LONG[name], head_dim), mode, "keys", dtype)


@pytest.mark.usefixtures("on_the_model")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SPLIT)
def test_split_over_keys(name: str, mode: str, modelled: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Properties, "multi_processor_count", 132)
    sizes = []
    real = modelled.workspace_bytes
    monkeypatch.setattr(modelled, "workspace_bytes", lambda *shape: sizes.append(real(*shape)) or sizes[-1])
    case = fitting(SPLIT[name])
    check_packed("cuda:hopper", case, mode, "keys", torch.bfloat16)
    partial = 4 * 64 * case.query_heads * sum(case.suffix_lengths)  # of one part; "shifted" keeps its keys together
    assert (sizes[0] >= 2 * partial) == (mode != "shifted")


@pytest.mark.usefixtures("on_the_model")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("softcap", [None, 0.3, 1e-38])
@pytest.mark.parametrize("scale", [0.0, -0.7, 1e-8, 3.0])
def test_any_scale(scale: float, softcap: float | None, mode: str) -> None:
    """Scaling is left to the exponent, or not where the unit of scores would not be positive, or not be a number."""
    case = replace(PACKED["few_tokens_each"], scale=scale, softcap=softcap)
    check_packed("cuda:hopper", case, mode, "keys", torch.bfloat16)


@pytest.mark.usefixtures("on_the_model")
@pytest.mark.parametrize(
    ("name", "mode"),
    every_mode_for([name for name in PACK_CASES if not name.startswith("long")], "few_tokens_each", "everything"),
)
def test_plain_packed(name: str, mode: str) -> None:
    check_packed("cuda:plain", PACK_CASES[name], mode, "keys", torch.bfloat16)


@pytest.mark.usefixtures("on_the_model")
@pytest.mark.parametrize(
    ("name", "mode"),
    every_mode_for([name for name in DENSE_CASES if not name.startswith("odd")], "causal", "everything"),
)
def test_plain_dense(name: str, mode: str) -> None:
    check_dense("cuda:plain", DENSE_CASES[name], mode, "heads", torch.bfloat16)


@pytest.mark.usefixtures("on_the_model")
def test_factors_of_one_change_no_bit() -> None:
    """Neither where nothing is touched, nor in the untouched variants of a tile where something is."""
    call = fitting(LONG["across_blocks"]).build(torch.bfloat16, "keys")
    factor = torch.ones_like(call["factor"])
    plain = packed_suppressed_attention(**(call | {"factor": None}), backend="cuda:hopper")
    for mode in MODES:
        touched = factor.clone()
        touched[1, 5] = 0.5
        assert_same_bits(
            packed_suppressed_attention(**(call | {"factor": factor}), mode=mode, backend="cuda:hopper"), plain
        )
        output = packed_suppressed_attention(**(call | {"factor": touched}), mode=mode, backend="cuda:hopper")
        start, end = call["pack"].suffix_starts[1:3].tolist()
        assert_same_bits(output[:, :start], plain[:, :start])
        assert_same_bits(output[:, end:], plain[:, end:])
        assert not torch.equal(output[:, start:end], plain[:, start:end])


@pytest.mark.usefixtures("on_the_model")
@pytest.mark.parametrize(
    ("changes", "feature"),
    [
        ({"head_dim": 80, "value_dim": 80}, "head dimensions 64, 128 and 256, not 80"),
        ({"head_dim": 64, "value_dim": 128}, "values of the keys' head dimension 64, not 128"),
        ({"head_dim": 64, "value_dim": 64, "position_bias": "full"}, "position_bias"),
        (
            {"head_dim": 64, "value_dim": 64, "query_heads": 130, "kv_heads": 1},
            "128 query heads to a key head, not 130",
        ),
    ],
)
def test_what_it_cannot_do_is_named(changes: dict[str, Any], feature: str) -> None:
    call = replace(PACK_CASES["few_tokens_each"], **changes).build(torch.bfloat16, "keys")
    with pytest.raises(BackendUnavailableError, match=f"cuda:hopper.*{feature}.*cuda:plain"):
        packed_suppressed_attention(**call, backend="cuda:hopper")


@pytest.mark.usefixtures("on_the_model")
def test_float32_is_refused() -> None:
    call = fitting(PACK_CASES["few_tokens_each"]).build(torch.float32, "keys")
    with pytest.raises(BackendUnavailableError, match=r"float32.*triton"):
        packed_suppressed_attention(**call, backend="cuda:hopper")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, 3, 64, dtype=torch.bfloat16)[..., ::2],
        torch.zeros(2, 3, 68, dtype=torch.bfloat16)[..., 4:],
        torch.zeros(2, 3, 65, dtype=torch.bfloat16)[..., :64],
        torch.zeros(1, 3, 64, dtype=torch.bfloat16).expand(2, -1, -1),
    ],
    ids=["strided", "shifted", "odd_rows", "expanded"],
)
def test_rows_are_copied_where_they_cannot_be_read_in_steps_of_16_bytes(tensor: Tensor) -> None:
    copy = cuda.aligned(tensor)
    assert torch.equal(copy, tensor)
    assert copy.is_contiguous()
    assert copy.data_ptr() % 16 == 0
    assert copy.data_ptr() != tensor.data_ptr()


def test_aligned_rows_are_not_copied() -> None:
    tensor = torch.zeros(3, 2, 64, dtype=torch.bfloat16).transpose(0, 1)
    assert cuda.aligned(tensor) is tensor


@pytest.mark.filterwarnings("ignore:attention on 'cuda' runs without a kernel")
def test_unmeasured_kernels_are_not_dispatched_to() -> None:
    """When something has been measured, this test says so too."""
    assert cuda.MEASURED == {}
    assert all(backends.load(None, device) is not cuda for device in ("cpu", "cuda"))


# --- on a GPU ---


@pytest.fixture
def on_hopper() -> Iterator[None]:
    if "hopper" not in cuda.variants():
        pytest.skip(f"'cuda:hopper' cannot run here: {cuda.unavailable_reason('cuda') or 'the GPU is of another kind'}")
    with poisoned_memory():
        yield


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", [*PACKED, *LONG, *SPLIT])
def test_packed_on_a_gpu(name: str, head_dim: int, dtype: torch.dtype, mode: str) -> None:
    check_packed("cuda:hopper", fitting((PACKED | LONG | SPLIT)[name], head_dim), mode, "keys", dtype)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", DENSE)
def test_dense_on_a_gpu(name: str, head_dim: int, mode: str) -> None:
    check_dense("cuda:hopper", fitting(DENSE[name], head_dim), mode, "heads", torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("name", ["across_blocks", "one_row"])
def test_in_a_graph(name: str) -> None:
    """Captured once and replayed on new numbers: nothing is allocated, read back or waited for."""
    call = fitting((LONG | SPLIT)[name], 128).build(torch.bfloat16, "keys", "cuda")
    packed_suppressed_attention(**call, backend="cuda:hopper")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = packed_suppressed_attention(**call, backend="cuda:hopper")
    call["query"].copy_(torch.randn_like(call["query"]))
    graph.replay()
    assert_same_bits(output, packed_suppressed_attention(**call, backend="cuda:hopper"))


# --- what nvcc makes of it ---


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str]]:
    """Compiles an instantiation: the object, and what ptxas said."""
    folder, built = tmp_path_factory.mktemp("sm_90a"), {}

    def build(name: str) -> tuple[Path, str]:
        if name not in built:
            target = folder / f"{Path(name).name}.o"
            flags = ["-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v"]
            source = str(CSRC / "cuda" / "hopper" / f"{name}.cu")
            built[name] = target, run([str(NVCC), *flags, "-c", source, "-o", str(target)])
        return built[name]

    return build


def disassemble(target: Path) -> str:
    beside = Path(str(NVCC)).parent / "cuobjdump"
    candidates = [shutil.which("cuobjdump"), str(beside)]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        candidates.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"))
    for program in candidates:
        if program is not None and Path(program).exists():
            return run([program, "-sass", str(target)])
    pytest.skip("there is no cuobjdump")


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "head_dim"), HOPPER)
def test_nothing_spills(dtype: str, head_dim: int, objects: Callable[[str], tuple[Path, str]]) -> None:
    _, said = objects(f"instantiations/{dtype}_d{head_dim}")
    assert re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said) == [
        ("0", "0", "0")
    ], said
    assert "wgmma" not in said, said  # C7510 and its like: products that wait for each other
    assert "setmaxnreg" not in said, said  # C7508: ignored


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "head_dim"), HOPPER)
def test_machine_code(dtype: str, head_dim: int, objects: Callable[[str], tuple[Path, str]]) -> None:
    target, _ = objects(f"instantiations/{dtype}_d{head_dim}")
    code = disassemble(target)
    keys = 64 if head_dim == 256 else 128
    products = re.findall(r"HGMMA\.(64x\d+x16)", code)
    assert set(products) == {f"64x{keys}x16", f"64x{head_dim}x16"}
    assert "UTMALDG.4D" in code
    assert "UTMASTG.4D" in code
    assert len(re.findall(r"USETMAXREG", code)) == 2
    assert not re.findall(r"\b(?:LDL|STL)\b", code)
    assert not re.findall(r"\bHMMA\b", code)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("name", ["plan", "plain", "merge"])
def test_the_rest_compiles_for_older_gpus(name: str, tmp_path: Path) -> None:
    flags = ["-std=c++17", "-gencode=arch=compute_80,code=sm_80"]
    run([str(NVCC), *flags, "-c", str(CSRC / "cuda" / f"{name}.cu"), "-o", str(tmp_path / "o.o")])
