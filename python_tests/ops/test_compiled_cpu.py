"""The compiled CPU kernels where they can differ from other backends: threads, block borders, vector tails, 16 bits.

The formula itself is tested for each instruction set, as "cpu:avx2" and so on, in test_backends.py and test_pack.py.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import (
    DENSE_CASES,
    MODES,
    PACK_CASES,
    DenseCase,
    PackCase,
    one_thread,
    poisoned_allocations,
    poisoned_memory,
)
from comparison import absolute_error, assert_same_bits, assert_same_pattern, assert_within
from op_checks import check_dense, check_packed
from torch import Tensor

from atman_kernels.backends import cpu
from atman_kernels.backends.cpu import compiled
from atman_kernels.errors import BackendUnavailableError, InputError
from atman_kernels.ops import packed_suppressed_attention, suppressed_attention
from atman_kernels.pack import VariantPack

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = [(name, dtype) for dtype in FLOATS for name in compiled.instruction_sets(dtype)]
PAIRED = ("avx512_bf16", "amx")  # multiply pairs of bfloat16; these instructions take subnormal numbers for 0

needs_module = pytest.mark.skipif(
    compiled.unavailable_reason() is not None, reason=f"the compiled module: {compiled.unavailable_reason()}"
)
every_kernel = pytest.mark.parametrize(
    ("backend", "dtype"),
    [pytest.param(f"cpu:{name}", dtype, id=f"{name}-{str(dtype)[6:]}") for name, dtype in KERNELS]
    or [pytest.param("", torch.float32, marks=needs_module)],
)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_memory(), poisoned_allocations(), one_thread():
        yield


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def attend(call: dict[str, Any], backend: str, mode: str = "log_additive") -> tuple[Tensor, Tensor]:
    op: Callable[..., Any] = packed_suppressed_attention if "pack" in call else suppressed_attention
    output, lse = op(**call, mode=mode, return_lse=True, backend=backend)
    return output, lse


def same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    """Bit for bit."""
    return all(a.numpy(force=True).tobytes() == e.numpy(force=True).tobytes() for a, e in zip(
        (x.view(torch.int16) if x.element_size() == 2 else x for x in actual),
        (x.view(torch.int16) if x.element_size() == 2 else x for x in expected), strict=True,
    ))  # fmt: skip


# --- which implementation runs ---


@needs_module
@pytest.mark.parametrize("name", ["suppressed_attention", "packed_suppressed_attention"])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_cpu_takes_the_compiled_module_for_what_it_can(
    dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []

    def watch(implementation: Any, label: str) -> None:
        real = getattr(implementation, name)
        monkeypatch.setattr(implementation, name, lambda *tensors: called.append(label) or real(*tensors))

    watch(compiled, "compiled")
    watch(cpu._TORCH, "torch")
    case = DENSE_CASES["causal"] if name == "suppressed_attention" else PACK_CASES["few_tokens_each"]
    attend(case.build(dtype), "cpu")
    assert called == ["torch" if dtype == torch.float64 else "compiled"]


@needs_module
def test_a_kernel_refuses_what_it_does_not_take() -> None:
    call = DENSE_CASES["causal"].build(torch.float64)
    for backend in (f"cpu:{name}" for name in cpu.variants() if name != "torch"):
        with pytest.raises(BackendUnavailableError, match=f"{backend}.*float64.*: torch"):
            attend(call, backend)
    for backend in (f"cpu:{name}" for name in cpu.variants() if name in PAIRED):
        with pytest.raises(BackendUnavailableError, match=f"{backend}.*float32.*plain"):
            attend(DENSE_CASES["causal"].build(torch.float32), backend)


def test_unknown_variants_are_refused() -> None:
    call = DENSE_CASES["causal"].build(torch.float32)
    with pytest.raises(BackendUnavailableError, match="cpu:nonsense"):
        attend(call, "cpu:nonsense")
    with pytest.raises(InputError, match="reference:avx2"):
        attend(call, "reference:avx2")


def test_without_the_module_torch_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    call = DENSE_CASES["everything"].build(torch.float32)
    expected = attend(call, "cpu:torch")
    monkeypatch.setattr(compiled, "_load", lambda: "it was not built")
    compiled.instruction_sets.cache_clear()
    try:
        assert cpu.variants() == ("torch",)
        assert same(attend(call, "cpu"), expected)
        with pytest.raises(BackendUnavailableError, match=r"cpu:plain.*it was not built"):
            attend(call, "cpu:plain")
    finally:
        compiled.instruction_sets.cache_clear()


# --- threads ---

MANY_TILES = PackCase((50, 3, 120, 1, 1, 260, 0, 7) * 2, (140, 130, 5, 300, 300, 0, 9, 200) * 2, query_heads=6)
ONE_TILE = PackCase((2, 3, 1), (40, 130, 5), query_heads=2, kv_heads=1)
THREAD_CASES = {
    "dense": DenseCase(batch=2, query_length=150, key_length=300, is_causal=True, sinks=True),
    "shared_keys": DenseCase(batch=5, key_batch=1, query_heads=6, kv_heads=2, query_length=40, key_length=260),
    "one_query": DenseCase(batch=1, key_batch=1, query_heads=4, kv_heads=1, query_length=1, key_length=500),
    "more_tiles_than_threads": MANY_TILES,
    "fewer_tiles_than_threads": ONE_TILE,
}


@every_kernel
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", THREAD_CASES)
def test_the_number_of_threads_changes_no_bit(name: str, mode: str, backend: str, dtype: torch.dtype) -> None:
    call = THREAD_CASES[name].build(dtype, "heads")
    expected = attend(call, backend, mode)
    for number in (2, 3, 7):
        with threads(number):
            assert same(attend(call, backend, mode), expected), f"{number} threads"


@every_kernel
def test_callers_on_several_threads_do_not_meet(backend: str, dtype: torch.dtype) -> None:
    calls = [THREAD_CASES[name].build(dtype, "keys") for name in THREAD_CASES] * 3
    expected = [attend(call, backend, MODES[i % 3]) for i, call in enumerate(calls)]

    def work(i: int) -> tuple[Tensor, Tensor]:
        with threads(1 + i % 3):  # torch keeps this number per thread
            return attend(calls[i], backend, MODES[i % 3])

    with ThreadPoolExecutor(5) as pool:
        found = list(pool.map(work, range(len(calls))))
    for i in range(len(calls)):
        assert same(found[i], expected[i]), f"call {i}"


@needs_module
def test_python_goes_on_while_a_kernel_runs() -> None:
    case = DenseCase(batch=1, key_batch=1, query_length=1500, key_length=1500, head_dim=64, value_dim=64)
    call = case.build(torch.float32)
    started, finished = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        attend(call, "cpu:plain")
        finished.set()

    worker = threading.Thread(target=work)
    worker.start()
    started.wait()
    turns = 0
    while not finished.is_set():
        time.sleep(0.001)
        turns += 1
    worker.join()
    assert turns >= 10, "the interpreter's lock was held"


# --- sizes ---

DIMS = [*range(1, 36), 47, 48, 49, 63, 64, 65, 80, 95, 96, 97, 112, 127, 128, 129, 160, 191, 192, 193, 255, 256, 257,
        299, 300]  # fmt: skip


@every_kernel
def test_any_head_and_value_dimension(backend: str, dtype: torch.dtype) -> None:
    for head_dim, value_dim in zip(DIMS, DIMS[17:] + DIMS[:17], strict=True):
        case = DenseCase(batch=1, key_batch=1, query_length=3, key_length=9, head_dim=head_dim, value_dim=value_dim)
        check_dense(backend, case, "log_additive", "keys", dtype)


@every_kernel
@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128, 192, 256])
def test_head_dimensions_of_models(dim: int, backend: str, dtype: torch.dtype) -> None:
    case = PackCase((3, 40, 1), (131, 7, 140), base_starts=(0, 9, 3), head_dim=dim, value_dim=dim, query_heads=6)
    check_packed(backend, case, "multiplicative", "keys", dtype)


@every_kernel
@pytest.mark.parametrize("group", [1, 3, 7, 12, 33, 71, 96, 97, 128])
def test_any_number_of_query_heads_per_key_head(group: int, backend: str, dtype: torch.dtype) -> None:
    """A tile has at most 96 rows, all query heads of a position counted: also when there are more of them."""
    dense = DenseCase(batch=1, key_batch=1, query_heads=group, kv_heads=1, query_length=5, key_length=9, is_causal=True)
    check_dense(backend, dense, "log_additive", "heads", dtype)
    packed = PackCase((3, 1, 0, 2), (4, 9, 2, 1), query_heads=2 * group, kv_heads=2)
    check_packed(backend, packed, "shifted", "heads", dtype)


@every_kernel
@pytest.mark.parametrize("keys", [1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 513])
@pytest.mark.parametrize("mode", MODES)
def test_borders_of_key_blocks(mode: str, keys: int, backend: str, dtype: torch.dtype) -> None:
    """Blocks have 128 or 256 keys, panels of a product 8 to 32; windows lie inside of them, across, and beyond."""
    for window in (None, 1, 32, 100, 129, 257):
        case = DenseCase(batch=1, key_batch=1, query_length=min(keys, 23), key_length=keys, is_causal=True, head_dim=8,
                         value_dim=8, sliding_window=window)  # fmt: skip
        check_dense(backend, case, mode, "keys", dtype)


@every_kernel
@pytest.mark.parametrize("window", [None, 5, 127, 128, 129, 140])
@pytest.mark.parametrize("is_causal", [True, False])
def test_bases_that_begin_inside_a_block(is_causal: bool, window: int | None, backend: str, dtype: torch.dtype) -> None:
    starts = (0, 0, 1, 1, 63, 64, 65, 127, 128, 129, 200, 255)
    prefixes = (1, 129, 127, 127, 128, 64, 63, 130, 128, 256, 0, 1)
    suffixes = (2, 1, 3, 1, 5, 1, 129, 2, 1, 4, 3, 130)
    case = PackCase(suffixes, prefixes, starts, spare_base=0, sliding_window=window, is_causal=is_causal)
    check_packed(backend, case, "log_additive", "keys", dtype)


@every_kernel
@pytest.mark.parametrize("mode", MODES)
def test_a_lone_factor_per_variant(mode: str, backend: str, dtype: torch.dtype) -> None:
    """Of factors that are 1 the kernel keeps only those that a vector may read beside others."""
    prefixes = tuple(130 + v for v in range(130))
    suffixes = tuple(1 + v % 40 for v in range(130))
    case = PackCase(suffixes, prefixes, query_heads=2, kv_heads=1, factor_values="lone")
    check_packed(backend, case, mode, "keys", dtype)


@every_kernel
def test_thousands_of_tiny_variants(backend: str, dtype: torch.dtype) -> None:
    suffixes = tuple(1 + v % 2 for v in range(2000))
    prefixes = tuple((7 * v) % 50 for v in range(2000))
    starts = tuple(v // 700 * 3 for v in range(2000))
    case = PackCase(suffixes, prefixes, starts, query_heads=2, kv_heads=1, factor_values="sparse")
    check_packed(backend, case, MODES[FLOATS.index(dtype)], "keys", dtype)


@needs_module
def test_an_empty_slice_may_begin_beyond_its_storage() -> None:
    base = torch.zeros(2, 3, 8)[1:, 3:]
    assert base.storage_offset() * base.element_size() == base.untyped_storage().nbytes()
    beyond = torch.zeros(1, 1, 8)[1:, 1:].expand(0, 0, 8)
    assert beyond.storage_offset() > beyond.untyped_storage().nbytes() // beyond.element_size()
    empty = beyond.reshape(0, 0, 8).as_strided((1, 0, 8), (8, 8, 1), beyond.storage_offset())
    rows = torch.ones(1, 2, 8)
    pack = VariantPack.build([2], [0])
    output = packed_suppressed_attention(rows, rows, rows, empty, empty, pack, backend="cpu")
    assert_same_bits(output, rows)


# --- exp and tanh, seen through the op ---


@every_kernel
def test_exponential_is_accurate(backend: str, dtype: torch.dtype) -> None:
    """Two keys with scores 0 and s weigh 1 : e^s; the values 0 and 1 show it."""
    s = torch.cat([torch.linspace(-110, 20, 4001), -torch.logspace(-8, 1.9, 300)]).to(dtype)
    key = torch.stack([torch.zeros_like(s), s], dim=1)[:, None, :, None]
    value = torch.tensor([0.0, 1.0], dtype=dtype).reshape(1, 1, 2, 1).expand(len(s), 1, 2, 1)
    output, lse = attend({"query": torch.ones(len(s), 1, 1, 1, dtype=dtype), "key": key, "value": value}, backend)
    exact, found = s.double().sigmoid(), output.flatten().double()
    # the kernels compute 2^(s / ln 2): rounding that quotient shifts the weight by s roundings
    allowed = 2 * torch.finfo(dtype).eps + 5e-7 + s.double().abs() * 2**-24
    smallest = max(torch.finfo(dtype).tiny, 2e-38)
    normal = exact > smallest
    assert (((found - exact).abs() / exact)[normal] / allowed[normal]).max() < 1
    assert (found - exact).abs()[~normal].max() < smallest  # subnormal or 0
    assert found[s < -104].abs().max() == 0
    assert_within(lse.flatten(), torch.logaddexp(s.double(), torch.zeros(())), 3e-6, "lse")


@every_kernel
@pytest.mark.parametrize("softcap", [1e-30, 1e-6, 0.3, 1.0, 50.0, 1e6, 1e30])
def test_hyperbolic_tangent_is_accurate(softcap: float, backend: str, dtype: torch.dtype) -> None:
    """With one key the lse is the score."""
    s = torch.cat([torch.linspace(-30, 30, 2001), torch.logspace(-8, 4, 500), torch.tensor([1e30])]).to(dtype)
    ones = torch.ones(len(s), 1, 1, 1, dtype=dtype)
    _, lse = attend({"query": ones, "key": s.reshape(-1, 1, 1, 1), "value": ones, "softcap": softcap}, backend)
    cap = torch.tensor(softcap).double()  # float32, as the kernels have it
    exact = cap * torch.tanh(s.double() / cap)
    normal = (exact.abs() > 2e-38) & ((s.double() / cap).abs() > 2e-38)  # else the quotient has fewer digits
    error = (lse.flatten().double() - exact).abs() / exact.abs()
    assert error[normal & s.isfinite()].max() < 5e-7


@every_kernel
def test_a_softcap_that_float32_cannot_hold_is_refused(backend: str, dtype: torch.dtype) -> None:
    """Rounded to 0 it would mean that there is none."""
    call = DENSE_CASES["causal"].build(dtype)
    for softcap in (1e-50, 1e50):
        with pytest.raises(ValueError, match="softcap"):
            attend(call | {"softcap": softcap}, backend)


@every_kernel
@pytest.mark.parametrize("scale", [1e-30, 1e4, 1e8, 1e10, 1e12, 1e20, 1e30, -1e12])
@pytest.mark.parametrize("mode", MODES)
def test_tiny_and_huge_scores(mode: str, scale: float, backend: str, dtype: torch.dtype) -> None:
    """A few whole numbers as scores, so that any order of additions gives the same: the largest takes all."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randint(-3, 4, (1, 2, n, 16), generator=generator).to(dtype) for n in (5, 300, 300))
    factor = torch.ones(1, 300)
    factor[0, ::7] = 2.0
    for call in ({}, {"factor": factor}):
        call = call | {"query": query, "key": key, "value": value, "scale": scale}
        output, lse = attend(call, backend, mode)
        exact, exact_lse = attend(call, "reference", mode)
        assert_within(output, exact, 3 * torch.finfo(dtype).eps)
        assert_within(lse, exact_lse, 1e-6 * max(1.0, exact_lse.abs().max().item()), "lse")


# --- NaN and infinity ---


@every_kernel
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("mode", MODES)
def test_numbers_that_are_none_show_where_the_reference_shows_them(
    mode: str, where: str, bad: float, backend: str, dtype: torch.dtype
) -> None:
    call = DenseCase(batch=1, key_batch=1, query_length=20, key_length=150, is_causal=True).build(dtype, "keys")
    call["factor"].clamp_(min=0.1)
    clean = attend(call, backend, mode)
    sees = torch.zeros(1, 4, 20, dtype=torch.bool)
    if where == "query":
        call["query"][0, 1, 8, 3] = bad
        sees[0, 1, 8] = True
    else:  # the second key head serves the last two query heads
        call[where][0, 1, 138, 3] = bad
        sees[0, 2:, 8:] = True
    (output, lse), (expected, expected_lse) = attend(call, backend, mode), attend(call, "reference", mode)
    if where == "value":
        finite = output.isfinite()
        assert_same_pattern(output[sees], expected[sees])
        assert same((output[finite], lse), (clean[0][finite], clean[1]))
        assert not expected[0, 2:, :, 3].isfinite().any(), "0 times such a number is none either, also in the reference"
    else:
        assert_same_pattern(output, expected)
        assert torch.equal(lse.isfinite(), expected_lse.isfinite())
        assert torch.equal(lse.isneginf(), expected_lse.isneginf())
        assert same((output[~sees], lse[~sees]), (clean[0][~sees], clean[1][~sees]))
        assert not (output[sees].isfinite().all() and where == "query"), "it left no trace"


@every_kernel
def test_a_nan_shows_beside_a_sink_of_no_weight(backend: str, dtype: torch.dtype) -> None:
    """The NaN is all that the row sees of its last block, in the lane that a maximum forgets first."""
    call = DenseCase(batch=1, key_batch=1, query_length=3, key_length=256, sinks=True).build(dtype, "none")
    call["sinks"].fill_(-math.inf)
    call["key"][:, :, 255] = math.nan
    call["key_mask"] = torch.ones(1, 256, dtype=torch.bool)
    for hidden in (slice(128, 255), slice(0, 255)):  # what came before is seen, or nothing is
        call["key_mask"][:, hidden] = False
        output, lse = attend(call, backend)
        assert output.isnan().all()
        assert lse.isnan().all()


@every_kernel
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("mode", MODES)
def test_numbers_that_are_none_stay_with_their_variant(
    mode: str, where: str, bad: float, backend: str, dtype: torch.dtype
) -> None:
    """Queries and keys touch their own variant only.

    A value that is none may reach variants that share rows of a product with its own, where its weight is 0. They show
    it: what is finite is right.
    """
    case = PackCase((3, 4, 2, 151, 5, 60), (9, 140, 5, 20, 9, 3), query_heads=4)
    call = case.build(dtype, "keys")
    call["factor"].clamp_(min=0.1)
    clean = attend(call, backend, mode)
    call[where][:, 3, 2] = bad  # first row of variant 1
    found = attend(call, backend, mode)
    others = [0, 1, 2, *range(7, 225)]
    assert not found[0][:, 3:7].isfinite().all(-1).all()
    finite = found[0][:, others].isfinite()
    assert same((found[0][:, others][finite], found[1][:, others]), (clean[0][:, others][finite], clean[1][:, others]))
    assert finite.all() or where == "value"
    assert finite[:, 160:].all(), "so far away no product is shared"


# --- 16 bits ---


@every_kernel
def test_values_pass_unchanged_through_a_single_key(backend: str, dtype: torch.dtype) -> None:
    """All 65536 numbers of a 16-bit type, infinities and NaN among them; their weight is 1."""
    if dtype == torch.float32:
        patterns = torch.cat([torch.logspace(-38, 38, 8000), torch.tensor([math.inf, math.nan, 0.0, 1e-45, 1e-40])])
        value = torch.cat([patterns, -patterns]).reshape(1, 1, 1, -1)
    else:
        value = torch.arange(65536).to(torch.int16).view(dtype).reshape(1, 4, 1, 16384)
    heads = value.shape[1]
    ones = torch.ones(1, heads, 1, 1, dtype=dtype)
    output, _ = attend({"query": ones, "key": ones, "value": value}, backend)
    expected = value.clone()
    if backend.partition(":")[2] in PAIRED:
        expected[value.abs() < torch.finfo(dtype).tiny] = 0.0
    assert_same_bits(output, expected)


@every_kernel
def test_results_are_rounded_to_the_nearest(backend: str, dtype: torch.dtype) -> None:
    """The mean of two numbers is exact in float32 and falls between two 16-bit ones as often as not."""
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.float32:
        pytest.skip("float32 is not rounded at the end")
    patterns = torch.randint(-(2**15), 2**15, (1, 4, 2, 16384), generator=generator).to(torch.int16).view(dtype)
    value = torch.where(patterns.abs() <= torch.finfo(dtype).max / 4, patterns, 0.0)  # NaN compares false
    value[:, 0] /= 2.0**13 if dtype == torch.float16 else 1.0  # many subnormal ones
    value[:, :, 1, ::2] = (value[:, :, 0, ::2].float() * (1 + torch.finfo(dtype).eps)).to(dtype)  # neighbours: ties
    if backend.partition(":")[2] in PAIRED:
        value = torch.where(value.abs() < torch.finfo(dtype).tiny, 0.0, value)
    ones = torch.ones(1, 4, 1, 1, dtype=dtype)
    output, _ = attend({"query": ones, "key": ones.expand(1, 4, 2, 1), "value": value}, backend)
    expected = value.float().mean(dim=2, keepdim=True).to(dtype)
    if dtype == torch.bfloat16 and backend.partition(":")[2] in PAIRED:
        tiny = expected.abs() < torch.finfo(dtype).tiny
        output, expected = output.masked_fill(tiny, 0.0), expected.masked_fill(tiny, 0.0)
    assert_same_bits(output, expected)
    assert (expected.float() != value.float().mean(dim=2, keepdim=True)).float().mean() > 0.1, "nothing was rounded"


@every_kernel
def test_bfloat16_is_as_good_as_the_fused_attention_of_torch(backend: str, dtype: torch.dtype) -> None:
    if dtype != torch.bfloat16:
        pytest.skip("of interest in bfloat16")
    case = DenseCase(batch=1, key_batch=1, query_heads=8, kv_heads=8, query_length=200, key_length=400, head_dim=64,
                     value_dim=64)  # fmt: skip
    call = case.build(dtype, "none")
    exact, _ = attend({name: x.double() if isinstance(x, Tensor) else x for name, x in call.items()}, "reference")
    torchs = torch.nn.functional.scaled_dot_product_attention(call["query"], call["key"], call["value"])
    ours, _ = attend(call, backend)

    def error(x: Tensor) -> float:
        return absolute_error(x, exact).square().mean().sqrt().item()

    assert error(ours) <= 1.5 * error(torchs)


# --- memory ---


def peak_of(call: dict[str, Any]) -> int:
    """Bytes by which the process grows at most during a call."""
    attend(call, "cpu")
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        pytest.skip("this system does not reset the peak of a process's memory")

    def kilobytes(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))

    before = kilobytes("VmRSS")
    attend(call, "cpu")
    return 1024 * (kilobytes("VmHWM") - before)


@needs_module
@pytest.mark.parametrize("mode", ["log_additive", "shifted"])
def test_memory_does_not_grow_with_the_variants(mode: str) -> None:
    """What is held beside the inputs: the base laid out anew, the factors' logarithms, the output."""

    def call(variants: int) -> dict[str, Any]:
        case = PackCase((2,) * variants, (3000,) * variants, query_heads=8, kv_heads=1, head_dim=16, value_dim=16)
        return case.build(torch.float32)

    few, many = call(100), call(1000)
    factors, output = (many[name].nbytes - few[name].nbytes for name in ("factor", "query"))
    growth = peak_of(many) - peak_of(few)
    scores = 4 * 8 * 2 * 900 * 3000
    allowed = factors + 4 * output + (4 << 20)
    assert allowed < scores / 5
    assert growth <= allowed


# --- a processor on which a kernel goes wrong ---


def test_a_kernel_that_computes_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    before = compiled.instruction_sets(torch.float32)
    fastest, right = before[0], compiled._attend

    def wrong(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        output, lse = right(query, *arguments)
        return (output * 1.01 if arguments[-1] == fastest else output), lse

    monkeypatch.setattr(compiled, "_attend", wrong)
    with pytest.warns(RuntimeWarning, match=f"{fastest} is off by .* not used"):
        assert compiled.instruction_sets.__wrapped__(torch.float32) == before[1:]


def test_a_kernel_that_gives_nan_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    nan = torch.full((1, 4, 37, 72), float("nan"))
    monkeypatch.setattr(compiled, "_attend", lambda *_: (nan, nan))
    with pytest.warns(RuntimeWarning, match="off by nan"):
        assert compiled.instruction_sets.__wrapped__(torch.bfloat16) == ()
