"""The Triton kernels where the shared suites do not reach: tile borders, splits, flags, wide offsets, head dimensions.

They run on a GPU, or under Triton's interpreter: `test_triton_interpreter.py` starts it in a process of its own.
"""

import fcntl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import (
    BACKENDS,
    DENSE_CASES,
    MODES,
    PACK_CASES,
    DenseCase,
    PackCase,
    one_thread,
    plain_attention,
    poisoned_memory,
    to_float64,
)
from comparison import assert_same_bits, assert_within, few_roundings
from kernel_launches import launches
from op_checks import check_dense, check_packed, run_dense, run_packed
from torch import Tensor

from atman_kernels import backends
from atman_kernels.errors import BackendUnavailableError

if "triton" not in BACKENDS:
    pytest.skip(str(backends.availability()["triton"]), allow_module_level=True)

from atman_kernels.backends.triton import configs, launch
from atman_kernels.backends.triton.configs import KernelConfig

DEVICE = "cuda" if torch.cuda.is_available() and not launch.INTERPRETED else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # or on a CPU, under the interpreter
SMALL = KernelConfig(block_m=32, block_n=16, num_warps=4, num_stages=2)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_memory(), one_thread():
        yield


# --- tiles and splits ---

DENSE_BORDERS = ("causal_fewer_queries", "causal_more_queries", "left_padding", "window_both_ways_more_queries",
                 "sinks_dead_rows", "bias_hides_rows", "shared_keys_masked", "grouped_by_three",
                 "everything")  # fmt: skip
PACK_BORDERS = (
    "few_tokens_each",
    "one_token_each",
    "empty_suffixes",
    "no_base",
    "several_bases",
    "window_several_bases",
    "bias_hides_keys",
    "all_removed_sinks",
    "both_ways",
    "everything",
)


@pytest.mark.parametrize(("splits", "mode", "factor"), [(1, MODES[0], "keys"), (3, MODES[2], "heads")])
@pytest.mark.parametrize("name", DENSE_BORDERS)
def test_dense_at_the_borders_of_tiles(name: str, mode: str, factor: str, splits: int) -> None:
    with configs.forced(SMALL, splits):
        check_dense("triton", DENSE_CASES[name], mode, factor, torch.float32)


@pytest.mark.parametrize(("splits", "mode", "factor"), [(3, MODES[0], "keys"), (1, MODES[2], "heads")])
@pytest.mark.parametrize("name", PACK_BORDERS)
def test_packs_at_the_borders_of_tiles(name: str, mode: str, factor: str, splits: int) -> None:
    with configs.forced(SMALL, splits):
        check_packed("triton", PACK_CASES[name], mode, factor, torch.float32)


@pytest.mark.parametrize("mode", MODES)
def test_a_split_call_gives_the_same_bits_every_time(mode: str) -> None:
    case = DenseCase(batch=1, key_batch=1, query_length=1, key_length=200, is_causal=True, sinks=True)
    call = case.build(torch.float16, "keys", DEVICE)
    with configs.forced(SMALL, 5), launches() as found:
        first, first_lse = run_dense("triton", call, mode)
        again, again_lse = run_dense("triton", call, mode)
    assert [name for name, _ in found].count("merge") == 2
    assert_same_bits(again, first)
    assert_same_bits(again_lse, first_lse, "lse")
    with configs.forced(SMALL, 1):
        whole, whole_lse = run_dense("triton", call, mode)
    assert_within(first, whole, few_roundings(torch.float16))
    assert_within(first_lse, whole_lse, few_roundings(torch.float32), "lse")


def test_few_rows_are_split_by_themselves() -> None:
    case = DenseCase(batch=1, key_batch=1, query_heads=2, kv_heads=1, query_length=1, key_length=1100)
    with launches() as found:
        check_dense("triton", case, MODES[0], "keys", torch.float32)
    assert "merge" in [name for name, _ in found]


def test_many_variants_of_one_token() -> None:
    """A thousand are in the shared suite; these span two tiles and several blocks of keys."""
    case = PackCase((1,) * 200, tuple(range(200)), query_heads=1, kv_heads=1, factor_values="sparse")
    check_packed("triton", case, MODES[0], "keys", torch.float32)


# --- suppression ---


def term_rows(arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """What `prepare_factors` leaves: (rows, chunks) flags, (rows, chunks) reach, (rows, positions) terms."""
    words, pitch = arguments["words"], arguments["pitch"]
    rows = arguments["terms"][: words * pitch].view(words, pitch)
    header = rows[:, : launch.HEADER].view(torch.int64)
    return header[:, : launch.CHUNKS], header[:, launch.CHUNKS :], rows[:, launch.HEADER :]


@pytest.mark.parametrize("kind", ["dense", "packed"])
@pytest.mark.parametrize("mode", MODES)
def test_unflagged_blocks_equal_flagged_ones_bit_for_bit(mode: str, kind: str) -> None:
    """With every flag raised the factors of 1 are read; without, nobody looks at them."""
    run: Any = run_dense if kind == "dense" else run_packed
    case: Any = DenseCase(query_length=20, key_length=203, factor_values="sparse")
    if kind == "packed":
        case = PackCase((2,) * 8, (300,) * 8, query_heads=2, kv_heads=1, factor_values="sparse")
    call = case.build(torch.float16, "keys", DEVICE)

    def all_flags(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], ready: Any) -> Any:
        prepares = kernel.fn.__name__ == "prepare_factors"
        if prepares:  # terms are written where flags are set
            arguments["terms"].fill_(1.0 if mode == "multiplicative" else 0.0)
        done = launch.on_stream(kernel, grid, arguments, ready)
        if prepares:
            flags, reach, _ = term_rows(arguments)
            flags.fill_(-1)
            reach.fill_(2**31 - 1)
        return done

    config = KernelConfig(block_m=64, block_n=32, num_warps=4, num_stages=2)
    with configs.forced(config, 1):
        output, lse = run("triton", call, mode)
        with launch.intercepted(all_flags):
            flagged, flagged_lse = run("triton", call, mode)
    assert_same_bits(flagged, output)
    assert_same_bits(flagged_lse, lse, "lse")


@pytest.mark.parametrize("length", [100, 64 * 128, 64 * 128 + 1, 70 * 128, 300 * 128])
def test_flags_reach_over_long_sequences(length: int) -> None:
    """One factor at each end of each flag's stretch, and nowhere else; terms where there is a flag, and only there."""
    shift = launch.touched_shift(length)
    assert 64 << shift >= length
    factor = torch.ones(4, length, device=DEVICE)
    factor[0, length - 1] = 0.5
    factor[1, min(length, 1 << shift) - 1] = 0.5
    factor[2, 0] = factor[2, length // 2] = 0.5
    case = DenseCase(batch=4, key_batch=1, query_heads=1, kv_heads=1, query_length=1, key_length=length, head_dim=16)
    with configs.forced(splits=1), launches() as found:
        run_dense("triton", case.build(torch.float32, "keys", DEVICE) | {"factor": factor})
    made = next(arguments for name, arguments in found if name == "prepare_factors")
    flags, reach, terms = term_rows(made)
    words = [[i for i in range(64) if any(word >> i & 1 for word in row)] for row in flags.tolist()]
    assert words == [[(length - 1) >> shift], [0], sorted({0, length // 2 >> shift}), []]
    where = [(min(r >> 32 for r in row), max(r & 2**32 - 1 for r in row)) for row in reach.tolist()]
    assert where == [(length - 1, length), (min(length, 1 << shift) - 1, min(length, 1 << shift)),
                     (0, length // 2 + 1), (2**31 - 1, 0)]  # fmt: skip
    terms = terms[:, :length]
    flagged = torch.tensor([[position >> shift in row for position in range(length)] for row in words], device=DEVICE)
    assert_within(terms[flagged].cpu(), (factor.log2() / made["unit"])[flagged].cpu(), few_roundings(torch.float32))
    assert terms[~flagged].isnan().all(), "poison that nobody wrote over"


def test_a_factor_far_out_is_found() -> None:
    case = DenseCase(batch=1, key_batch=1, query_heads=1, kv_heads=1, query_length=2, key_length=8400,
                     factor_values="1")  # fmt: skip
    call = case.build(torch.float32, "keys", DEVICE)
    call["key"][..., 8399, :] = call["query"][..., 0, :]  # a key that matters
    call["factor"][0, 8399] = 0.0
    output, _ = run_dense("triton", call)
    exact, _ = plain_attention(**to_float64(call))
    untouched, _ = plain_attention(**to_float64(call) | {"factor": None})
    assert_within(output.cpu(), exact.float(), few_roundings(torch.float32))
    assert (exact - untouched).abs().max() > 0.01


@pytest.mark.parametrize("touched", [201, 262])
def test_blocks_between_two_flags(touched: int) -> None:
    """The window begins at key 200: the first block of 64 keys lies across the border of two flags, at 256."""
    case = DenseCase(batch=1, key_batch=1, query_length=1, key_length=300, is_causal=True, sliding_window=100,
                     factor_values="1")  # fmt: skip
    call = case.build(torch.float32, "keys", DEVICE)
    call["factor"][0, touched] = 20.0
    with configs.forced(KernelConfig(16, 64, 4, 2), 1):
        output, _ = run_dense("triton", call)
    exact, _ = plain_attention(**to_float64(call))
    untouched, _ = plain_attention(**to_float64(call) | {"factor": None})
    assert_within(output.cpu(), exact.float(), few_roundings(torch.float32))
    assert (exact - untouched).abs().max() > 0.01


# --- scores ---


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("softcap", [None, 0.3, 40.0])
@pytest.mark.parametrize("scale", [0.0, -0.7, 1e-8, 3.0])
def test_any_scale(scale: float, softcap: float | None, mode: str) -> None:
    case = DenseCase(scale=scale, softcap=softcap, position_bias="hidden", is_causal=True, query_length=11)
    check_dense("triton", case, mode, "keys", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("head_dim", "value_dim"), [(40, 40), (80, 80), (96, 112), (112, 16), (16, 256), (256, 3), (192, 128)]
)
def test_head_dimensions(head_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    case = PackCase((3, 2, 20), (5, 6, 4), head_dim=head_dim, value_dim=value_dim)
    check_packed("triton", case, MODES[0], "keys", dtype)


# --- wide offsets ---


def spread(tensor: Tensor, dim: int) -> Tensor:
    """The same values, the last along `dim` more than 2**31 elements from the first, in memory that is never touched.

    Memory of that size is asked for and mostly not used.
    """
    stride = 2**31 // (tensor.shape[dim] - 1) + 1
    near = tensor.movedim(dim, 0).contiguous()
    room = torch.empty(stride * near.shape[0], dtype=tensor.dtype, device=tensor.device)
    far = room.as_strided(near.shape, (stride, *near.stride()[1:]))
    return far.copy_(near).movedim(0, dim)


@contextmanager
def alone_with_memory() -> Iterator[None]:
    """One test at a time, of those that run at once on a GPU, whose memory is taken whether or not it is used."""
    if DEVICE == "cpu":
        yield
        return
    with open(Path(tempfile.gettempdir(), "atman-kernels-gpu-memory.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


@pytest.mark.parametrize("dim", [0, 1], ids=["heads", "rows"])
@pytest.mark.parametrize("name", ["base_key", "base_value", "key", "value", "query"])
def test_offsets_beyond_31_bits(name: str, dim: int) -> None:
    torch.use_deterministic_algorithms(False)  # or all of the memory is filled
    with alone_with_memory():
        _check_wide_offsets(name, dim)


def _check_wide_offsets(name: str, dim: int) -> None:
    call = PackCase((3, 2, 20), (5, 6, 4), query_heads=2, kv_heads=2).build(torch.float16, "keys", DEVICE)
    expected, expected_lse = run_packed("triton", call)
    wide = spread(call[name], dim)
    assert wide.stride(dim) * (wide.shape[dim] - 1) > 2**31
    output, lse = run_packed("triton", call | {name: wide})
    assert_same_bits(output, expected)
    assert_same_bits(lse, expected_lse, "lse")


# --- what it does not do ---


def test_unsupported_calls_say_what_would_do() -> None:
    wide = DenseCase(head_dim=257).build(torch.float32, "keys", DEVICE)
    with pytest.raises(BackendUnavailableError, match=r"'triton'.*up to 256.*257.*'reference'"):
        run_dense("triton", wide)
    double = DenseCase().build(torch.float64, "keys", DEVICE)
    with pytest.raises(BackendUnavailableError, match=r"'triton'.*float32.*float64.*'reference'"):
        run_dense("triton", double)


# --- on a GPU only ---


def _call(kind: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, dict[str, Any]]:
    if kind == "dense":
        return run_dense, DENSE_CASES["odd_113_203"].build(dtype, "keys", "cuda")
    if kind == "decode":
        return run_dense, DenseCase(query_length=1, key_length=3000, is_causal=True).build(dtype, "keys", "cuda")
    return run_packed, PACK_CASES["long_suffixes"].build(dtype, "keys", "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dense", "packed", "decode"])
@pytest.mark.parametrize("mode", MODES)
def test_a_captured_graph_follows_its_inputs(mode: str, kind: str) -> None:
    torch.use_deterministic_algorithms(False)
    run, call = _call(kind)
    run("triton", call, mode)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, lse = run("triton", call, mode)
    call["query"].copy_(call["query"].flip(-2))
    call["factor"].copy_(call["factor"].flip(0))
    graph.replay()
    expected, expected_lse = run("triton", call, mode)
    assert_same_bits(output, expected)
    assert_same_bits(lse, expected_lse, "lse")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_a_call_does_not_wait_for_the_device(kind: str) -> None:
    torch.use_deterministic_algorithms(False)
    run, call = _call(kind)
    run(None, call, "shifted")
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(None, call, "shifted")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_compiles_on_a_gpu(kind: str) -> None:
    run, call = _call(kind)
    compiled = torch.compile(lambda **arguments: run(None, arguments), fullgraph=True)
    output, _ = compiled(**call)
    assert_within(output, run("triton", call)[0], few_roundings(torch.bfloat16))


@pytest.mark.gpu
def test_it_is_the_default_on_a_gpu() -> None:
    assert backends.load(None, "cuda").__name__.endswith(".triton")
