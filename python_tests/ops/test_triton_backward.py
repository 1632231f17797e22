"""The Triton backward where the shared gradients do not reach: tile borders, dtypes, layouts, what is wanted, order.

It runs on a GPU, or under Triton's interpreter: `test_triton_interpreter.py` starts it in a process of its own.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_cases import BACKENDS, DENSE_CASES, MODES, PACK_CASES, DenseCase, PackCase, one_thread, poisoned_memory
from comparison import assert_same_bits, assert_within, few_roundings
from gradient_checks import Case, check_gradients, leaves_of, op_of
from kernel_launches import launches
from torch import Tensor

from atman_kernels import backends

if "triton" not in BACKENDS:
    pytest.skip(str(backends.availability()["triton"]), allow_module_level=True)

from atman_kernels.backends.triton import configs, launch
from atman_kernels.backends.triton.configs import KernelConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDE, HIGH = KernelConfig(16, 32, 4, 2), KernelConfig(32, 16, 4, 2)
PASSES = ("query_gradient", "key_gradient", "broadcast_gradient")


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_memory(), one_thread():
        yield


def gradients(
    case: Case, call: dict[str, Any], mode: str, *wanted: str, grad: Tensor | None = None
) -> dict[str, Tensor]:
    leaves = {name: call[name].detach().requires_grad_() for name in wanted or leaves_of(call)}
    output = op_of(case)(**call | leaves, mode=mode, backend="triton")
    found = torch.autograd.grad(output, list(leaves.values()), output.detach().sin() if grad is None else grad)
    return dict(zip(leaves, found, strict=True))


# --- tiles, against autograd through the plain formula in float64 ---

TWO: dict[str, Any] = {"query_heads": 2, "kv_heads": 1}  # little to do for the interpreter
ONE: dict[str, Any] = {"batch": 1, "key_batch": 1, **TWO}
SHARED: dict[str, Any] = {"batch": 2, "key_batch": 1, **TWO}
BORDERS: dict[str, tuple[Case, str, str, KernelConfig]] = {
    "causal": (DenseCase(**ONE, is_causal=True, query_length=37, key_length=41), MODES[0], "keys", WIDE),
    "window": (
        DenseCase(**ONE, is_causal=True, sliding_window=9, query_length=45, key_length=40), MODES[2], "keys", HIGH,
    ),
    "window_both_ways": (DenseCase(**ONE, sliding_window=5, query_length=21, key_length=37), MODES[1], "heads", WIDE),
    "shared_keys": (
        DenseCase(**SHARED, query_length=18, key_length=35, key_mask="dead", sinks=True), MODES[0], "heads", HIGH,
    ),
    "bias_of_keys": (
        DenseCase(**SHARED, query_length=18, key_length=35, position_bias="keys"), MODES[2], "keys", WIDE,
    ),
    "bias_of_pairs": (
        DenseCase(**ONE, query_length=34, key_length=20, position_bias="queries"), MODES[0], "keys", WIDE,
    ),
    "bias_dead": (DenseCase(**ONE, query_length=5, key_length=20, position_bias="dead"), MODES[2], "heads", WIDE),
    "softcap": (DenseCase(**ONE, softcap=1.5, scale=-0.7, query_length=19), MODES[1], "keys", HIGH),
    "bases": (PackCase((20, 3, 15), (18, 21, 17), (0, 10, 40), **TWO), MODES[0], "keys", WIDE),
    "bases_in_one_tile": (
        PackCase((2, 1, 3, 2), (18, 21, 17, 30), (0, 40, 0, 20), sliding_window=12, **TWO), MODES[2], "keys", HIGH,
    ),
    "many_variants": (
        PackCase((1,) * 20, (20,) * 20, factor_values="sparse", **TWO), MODES[1], "keys", HIGH,
    ),
    "heads_apart": (PackCase((3, 0, 18), (5, 6, 20), **TWO), MODES[2], "heads", WIDE),
    "both_ways": (PackCase((18, 3), (20, 5), is_causal=False, sliding_window=7, **TWO), MODES[0], "keys", HIGH),
    "pack_bias": (PackCase((3, 18), (5, 20), position_bias="heads", **TWO), MODES[0], "keys", WIDE),
    "pack_bias_of_keys": (
        PackCase((3, 0, 18), (5, 6, 4), (0, 3, 2), position_bias="keys", sinks=True, **TWO), MODES[1], "none", HIGH,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BORDERS)
def test_at_the_borders_of_tiles(name: str) -> None:
    case, mode, factor, config = BORDERS[name]
    with configs.forced(config, 1):
        check_gradients(case, case.build(torch.float32, factor, DEVICE), mode, "triton")


@pytest.mark.parametrize("name", ["window", "shared_keys", "bases_in_one_tile", "heads_apart", "pack_bias"])
def test_in_splits(name: str) -> None:
    """Rows and keys are shared out among three programs, some of which get none."""
    case, mode, factor, config = BORDERS[name]
    call = case.build(torch.float32, factor, DEVICE)
    with configs.forced(config, 3), launches() as found:
        check_gradients(case, call, mode, "triton")
    passes = {(a.get("PASS", a.get("KIND")), a["num_splits"]) for n, a in found if n in PASSES[:2]}
    assert passes >= {("query", 3), ("dense" if isinstance(case, DenseCase) else "base", 3)}
    assert not {("own", 3), ("minimum", 3)} & passes


def test_splits_are_for_calls_of_few_blocks() -> None:
    few, many = DenseCase(**ONE, query_length=300, key_length=9), DenseCase(query_length=300, key_length=9)
    splits = {}
    for case in (few, many):
        with launches() as found:
            gradients(case, case.build(torch.float32, "keys", DEVICE), MODES[0], "key")
        ((splits[case.query_heads],),) = [[a["num_splits"] for name, a in found if name == "key_gradient"]]
    assert splits[few.query_heads] > splits[many.query_heads] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["dense", "packed"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    case: Case = DenseCase(**ONE, query_length=9, key_length=20, head_dim=20, value_dim=12, is_causal=True)
    if name == "packed":
        case = PackCase((3, 17), (18, 6), head_dim=12, value_dim=20, **TWO)
    call = case.build(dtype, "keys", DEVICE)
    call["factor"] = call["factor"].clamp_min(0.05)  # the plain formula's own factors have no digits for less
    with configs.forced(WIDE, 1):
        check_gradients(case, call, MODES[0], "triton")


@pytest.mark.parametrize("name", ["dense", "packed"])
def test_tiles_of_the_tables(name: str) -> None:
    cases: dict[str, Case] = {"dense": DenseCase(**ONE), "packed": PackCase((3, 2), (5, 9), **TWO)}
    check_gradients(cases[name], cases[name].build(torch.float32, "keys", DEVICE), MODES[2], "triton")


# --- flags of factors ---


@pytest.mark.parametrize("touched", [201, 262])
@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_factors_are_found_by_their_flags(kind: str, touched: int) -> None:
    """The window begins at key 200: the first block of 64 keys lies across the border of two flags, at 256."""
    case: Case = DenseCase(**ONE, query_length=1, key_length=300, is_causal=True, sliding_window=100, factor_values="1")
    if kind == "packed":  # blocks of base keys lie across borders, too
        case = PackCase((1,), (299,), (30,), sliding_window=100, factor_values="1", **TWO)
    call = case.build(torch.float32, "keys", DEVICE)
    call["factor"][0, touched] = 0.3
    with configs.forced(KernelConfig(16, 64, 4, 2), 1):
        check_gradients(case, call, MODES[1], "triton")


def test_what_lies_behind_the_factors_is_not_read() -> None:
    case = DenseCase(**ONE, query_length=5, key_length=21)
    call = case.build(torch.float32, "keys", DEVICE)
    behind = torch.nn.functional.pad(call["factor"], (0, 64), value=torch.nan)
    call["factor"] = behind[:, :21]
    assert call["factor"].is_contiguous()
    with configs.forced(WIDE, 1):
        check_gradients(case, call, MODES[1], "triton")


# --- what keys that nobody sees hold ---


def test_unseen_base_keys_may_hold_anything() -> None:
    case = PackCase((2, 3), (9, 5), (0, 21), spare_base=7, **TWO)
    call = case.build(torch.float32, "keys", DEVICE)
    expected = gradients(case, call, MODES[2])
    for name in ("base_key", "base_value"):
        call[name] = call[name].clone()
        call[name][:, 10:20] = torch.nan
        call[name][:, 26:] = torch.nan
    with configs.forced(KernelConfig(16, 16, 4, 2), 1):
        found = gradients(case, call, MODES[2])
    for name, exact in expected.items():
        assert_within(found[name], exact, few_roundings(torch.float32) * max(1.0, exact.abs().max().item()), name)


# --- what is wanted ---


@pytest.mark.parametrize(
    ("case", "wanted", "kernels"),
    [
        (DENSE_CASES["causal"], ("query",), ["query_gradient"]),
        (DENSE_CASES["causal"], ("value",), ["key_gradient"]),
        (DENSE_CASES["causal"], ("factor",), ["key_gradient"]),
        (DENSE_CASES["bias"], ("position_bias",), ["broadcast_gradient"]),
        (DENSE_CASES["sinks"], ("sinks",), []),
        (PACK_CASES["few_tokens_each"], ("base_value",), ["key_gradient"]),
        (PACK_CASES["few_tokens_each"], ("factor",), ["broadcast_gradient"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_only_what_is_wanted_is_computed(case: Case, wanted: tuple[str, ...], kernels: list[str]) -> None:
    call = case.build(torch.float32, "keys", DEVICE)
    with configs.forced(HIGH, 1):
        everything = gradients(case, call, MODES[0])
        with launches() as found:
            alone = gradients(case, call, MODES[0], *wanted)
    assert [name for name, _ in found if name in PASSES] == kernels
    results = ("grad_query", "grad_key", "grad_value", "grad_factor", "result")
    written = [arguments.get(name) for _, arguments in found for name in results]
    assert sum(x is not None for x in written) == len(kernels)
    for name in wanted:  # a removed key's slope is kept beside its weight only where it is asked for
        limit = few_roundings(torch.float32) * max(1.0, everything[name].abs().max().item())
        assert_within(alone[name], everything[name], limit, name)


def test_the_minimum_is_owed_only_where_scores_are_wanted() -> None:
    case = DENSE_CASES["grouped"]
    call = case.build(torch.float32, "keys", DEVICE)
    with launches() as found:
        gradients(case, call, "shifted", "value")
    assert [a["PASS"] for name, a in found if name == "query_gradient"] == ["minimum"]


# --- layouts, order ---


@pytest.mark.parametrize("layout", ["rows_first", "every_second", "slice"])
def test_gradients_come_contiguous_whatever_came(layout: str) -> None:
    case, plain = DenseCase(layout=layout, is_causal=True), DenseCase(is_causal=True)
    call = case.build(torch.float32, "keys", DEVICE)
    grad = torch.ones((), device=DEVICE).expand(2, 4, 7, 16)  # of stride 0, as that of a sum
    with configs.forced(HIGH, 1):
        found = gradients(case, call, MODES[0], grad=grad)
        same = {name: x.contiguous() if isinstance(x, Tensor) else x for name, x in call.items()}
        expected = gradients(plain, same, MODES[0], grad=grad.contiguous())
    for name, exact in expected.items():
        assert found[name].is_contiguous(), name
        assert_same_bits(found[name], exact, name)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_the_same_bits_every_time(kind: str, splits: int) -> None:
    case: Case = DENSE_CASES["shared_keys"] if kind == "dense" else PACK_CASES["several_bases"]
    call = case.build(torch.float16, "keys", DEVICE)
    with configs.forced(splits=splits):
        first, again = gradients(case, call, "shifted"), gradients(case, call, "shifted")
    for name, exact in first.items():
        assert_same_bits(again[name], exact, name)


def test_empty_calls_have_gradients_of_zero() -> None:
    case = DenseCase(query_length=0)
    found = gradients(case, case.build(torch.float32, "keys", DEVICE), MODES[0])
    assert not any(bool(x.any()) for x in found.values())
    assert found["key"].shape == (2, 2, 11, 16)


# --- tables ---


@pytest.mark.parametrize("name", configs.ARCHITECTURES)
def test_tables_are_complete(name: str) -> None:
    table = configs.load(f"{name}_backward")
    expected = {
        configs.Key(dtype, regime, dim)
        for dtype in configs.DTYPES
        for regime in configs.BACKWARD_REGIMES
        for dim in configs.HEAD_DIMS
    }
    assert set(table) == expected
    assert configs.dump(table) == (configs.FOLDER / f"{name}_backward.json").read_text(encoding="utf-8")
    for key, config in table.items():
        assert 16 <= config.block_m <= 128, key
        assert 16 <= config.block_n <= launch.MOST_KEYS, f"{key}: two flags must be enough for a block"


# --- on a GPU only ---


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_a_backward_does_not_wait_for_the_device(kind: str) -> None:
    torch.use_deterministic_algorithms(False)
    case: Case = DENSE_CASES["odd_113_203"] if kind == "dense" else PACK_CASES["long_suffixes"]
    call = case.build(torch.bfloat16, "keys", "cuda")
    gradients(case, call, "shifted")
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(case, call, "shifted")
    finally:
        torch.cuda.set_sync_debug_mode("default")
