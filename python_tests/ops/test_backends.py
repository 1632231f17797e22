"""The dense op: every backend, the reference among them, against the plain formula in float64."""

from collections.abc import Iterator

import pytest
import torch
from attention_cases import (
    ALL_DTYPES,
    BACKEND_DTYPES,
    BACKENDS,
    DENSE_CASES,
    HARDWARE_BACKENDS,
    MODES,
    DenseCase,
    backend_dtypes,
    device_for,
    factor_dtype,
    first_dtype,
    one_thread,
    poisoned_memory,
    to_float64,
)
from comparison import assert_same_bits, assert_unchanged_by_ones, assert_within, assert_within_rounding, few_roundings
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import check_dense, run_dense
from torch import Tensor

from atman_kernels import backends
from atman_kernels.backends.cpu import blocked, compiled
from atman_kernels.ops import suppressed_attention

FACTORS = ("none", "keys", "heads")
FACTORS_AND_MODES = [("none", MODES[0])] + [(factor, mode) for factor in FACTORS[1:] for mode in MODES]
DTYPE_CASES = ("grouped", "wide_value", "causal", "causal_more_queries", "key_mask_dead_rows", "window_causal_cached",
               "softcap", "sinks", "sinks_dead_rows", "bias_hides_keys", "shared_keys", "one_by_one", "odd_113_203",
               "odd_3_799", "rows_first", "everything")  # fmt: skip


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_memory(), one_thread():
        yield


def test_poison_is_seen() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.zeros(3).new_empty(2).isnan().all()
    assert torch.empty_like(torch.zeros(3)).isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("factor", "mode"), FACTORS_AND_MODES)
@pytest.mark.parametrize("name", DENSE_CASES)
def test_agrees_with_the_formula(name: str, factor: str, mode: str, backend: str) -> None:
    check_dense(backend, DENSE_CASES[name], mode, factor, first_dtype(backend))


@pytest.mark.parametrize(("backend", "dtype"), backend_dtypes(ALL_DTYPES[1:]))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", DTYPE_CASES)
def test_agrees_with_the_formula_in(name: str, dtype: torch.dtype, mode: str, backend: str) -> None:
    check_dense(backend, DENSE_CASES[name], mode, "keys", dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("factor", ["keys", "heads"])
@pytest.mark.parametrize("name", DENSE_CASES)
def test_blocked_at_borders_of_its_tiles(name: str, factor: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a few rows: some see no key at all, some have one row, the last is shorter."""
    monkeypatch.setattr(blocked, "TILE_SCORES", 100)
    monkeypatch.setattr(blocked, "MINIMUM_ROWS", 37 if name.startswith("odd") else 3)
    check_dense("cpu:torch", DENSE_CASES[name], mode, factor, torch.float32)


def test_cpu_tiles_that_see_nothing() -> None:
    """Twice as many causal queries as keys, enough of them that whole tiles stand before the first key."""
    case = DenseCase(batch=1, key_batch=1, query_heads=8, kv_heads=1, query_length=1200, key_length=600, head_dim=4,
                     value_dim=4, is_causal=True)  # fmt: skip
    for factor in ("none", "keys"):
        check_dense("cpu", case, MODES[0], factor, torch.float32)


@st.composite
def dense_cases(draw: st.DrawFn) -> DenseCase:
    batch, kv_heads, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 20))
    return DenseCase(
        batch=batch,
        key_batch=draw(st.sampled_from([1, batch])),
        kv_heads=kv_heads,
        query_heads=kv_heads * draw(st.integers(1, 3)),
        query_length=draw(st.integers(1, 70)),
        key_length=draw(st.integers(1, 140)),
        head_dim=head_dim,
        value_dim=draw(st.just(head_dim) | st.integers(1, 20)),
        is_causal=draw(st.booleans()),
        key_mask=draw(st.sampled_from(["none", "ragged", "left", "dead"])),
        sliding_window=draw(st.none() | st.integers(1, 30)),
        softcap=draw(st.none() | st.floats(0.5, 30)),
        scale=draw(st.none() | st.floats(0.05, 1.5)),
        sinks=draw(st.booleans()),
        position_bias=draw(st.sampled_from(["none", "full", "heads", "keys", "queries", "hidden", "dead"])),
        layout=draw(st.sampled_from(["contiguous", "rows_first", "every_second", "slice", "expanded"])),
        factor_values=draw(st.sampled_from(["mixed", "sparse", "0", "1", "2.5"])),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=80, deadline=None, derandomize=True)
@given(case=dense_cases(), mode=st.sampled_from(MODES), factor=st.sampled_from(FACTORS))
def test_agrees_with_the_formula_on_any_combination(backend: str, case: DenseCase, mode: str, factor: str) -> None:
    check_dense(backend, case, mode, factor, first_dtype(backend))


@pytest.mark.parametrize(("backend", "dtype"), backend_dtypes())
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("factor", ["keys", "heads"])
@pytest.mark.parametrize("name", ["causal", "odd_113_203", "everything"])
def test_ones_change_no_bit(name: str, factor: str, mode: str, dtype: torch.dtype, backend: str) -> None:
    device = device_for(backend, dtype)
    call = DENSE_CASES[name].build(dtype, factor, device)
    ones = run_dense(backend, call | {"factor": torch.ones_like(call["factor"])}, mode)
    assert_unchanged_by_ones(ones, run_dense(backend, call | {"factor": None}, mode), backend, factor)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_a_row_of_ones_is_untouched_beside_others(mode: str, backend: str) -> None:
    """One variant with factors does not change its unsuppressed neighbour in the batch."""
    device = device_for(backend, first_dtype(backend))
    call = DenseCase(batch=3, key_batch=1, is_causal=True).build(first_dtype(backend), "keys", device)
    call["factor"][1] = 1.0
    output, _ = run_dense(backend, call, mode)
    plain, _ = run_dense(backend, call | {"factor": None}, mode)
    exact, _ = run_dense("reference", to_float64(call), mode)
    assert_within_rounding(output[1], exact[1], plain[1])
    assert (output[0] - plain[0]).abs().max() > 0.01, "the neighbours were not suppressed"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sinks", [False, True])
def test_all_keys_removed(sinks: bool, backend: str) -> None:
    dtype = first_dtype(backend)
    device = device_for(backend, dtype)
    call = DenseCase(factor_values="0", sinks=sinks).build(dtype, "keys", device)
    output, lse = run_dense(backend, call)
    assert_same_bits(output, torch.zeros_like(output))
    expected = call["sinks"][None, :, None].expand(lse.shape) if sinks else torch.full_like(lse, -torch.inf)
    assert_within(lse, expected, few_roundings(dtype), "lse")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["multiplicative", "shifted"])
def test_zero_everywhere_is_the_mean(mode: str, backend: str) -> None:
    """These modes flatten the scores of a row: each visible value weighs the same."""
    dtype = first_dtype(backend)
    device = device_for(backend, dtype)
    call = DenseCase(factor_values="0", is_causal=True, query_length=11, kv_heads=4).build(dtype, "keys", device)
    output, _ = run_dense(backend, call, mode)
    counts = torch.arange(1, 12, device=device).reshape(1, 1, 11, 1)
    assert_within(output, call["value"].cumsum(dim=2) / counts, few_roundings(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_removed_key_is_as_if_it_were_not_there(backend: str) -> None:
    dtype = first_dtype(backend)
    device = device_for(backend, dtype)
    call = DenseCase(factor_values="1").build(dtype, "keys", device)
    gone = [2, 3, 9]
    call["factor"][:, gone] = 0.0
    kept = [i for i in range(11) if i not in gone]
    without = call | {"key": call["key"][:, :, kept], "value": call["value"][:, :, kept], "factor": None}
    output, lse = run_dense(backend, call)
    expected, expected_lse = run_dense(backend, without)
    assert_within(output, expected, few_roundings(dtype))
    assert_within(lse, expected_lse, few_roundings(dtype), "lse")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("hidden_by", ["key_mask", "position_bias"])
def test_hidden_keys_do_not_matter(hidden_by: str, mode: str, backend: str) -> None:
    """Whatever stands in padding, even the smallest score of a row, changes nothing."""
    dtype = first_dtype(backend)
    device = device_for(backend, dtype)
    call = DenseCase(layout="contiguous").build(dtype, "keys", device)
    visible = torch.ones(2, 11, dtype=torch.bool, device=device)
    visible[0, 3:6] = visible[1, 0] = False
    if hidden_by == "key_mask":
        call["key_mask"] = visible
    else:
        bias = torch.zeros(2, 1, 1, 11, dtype=dtype, device=device)
        call["position_bias"] = bias.masked_fill(~visible[:, None, None], -torch.inf)
    hidden = ~visible[:, None, :, None]
    other = call | {"key": call["key"].masked_fill(hidden, -1e3), "value": call["value"].masked_fill(hidden, 1e3)}
    assert_within(run_dense(backend, other, mode)[0], run_dense(backend, call, mode)[0], few_roundings(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_large_scores_do_not_overflow(mode: str, backend: str) -> None:
    dtype = first_dtype(backend)
    device = device_for(backend, dtype)
    call = DenseCase(is_causal=True, scale=100.0, sinks=True).build(dtype, "keys", device)
    output, lse = run_dense(backend, call, mode)
    exact, exact_lse = run_dense("reference", to_float64(call), mode)
    assert exact_lse.max() > 200, "the scores were not large"
    assert_within(output, exact, max(1e-3, few_roundings(dtype)))
    assert_within(lse, exact_lse, 1e-3 * exact_lse.abs().max().item(), "lse")


@pytest.mark.parametrize("backend", BACKENDS)
def test_shared_keys_are_the_same_as_repeated_keys(backend: str) -> None:
    dtype = first_dtype(backend)
    device = device_for(backend, dtype)
    call = DENSE_CASES["shared_keys"].build(dtype, "keys", device)
    repeated = call | {name: call[name].repeat(5, 1, 1, 1) for name in ("key", "value")}
    assert_within(run_dense(backend, call)[0], run_dense(backend, repeated)[0], few_roundings(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_inputs_are_not_modified(mode: str, backend: str) -> None:
    dtype = first_dtype(backend)
    device = device_for(backend, dtype)
    call = DENSE_CASES["everything"].build(dtype, "heads", device)
    before = {name: (x.clone(), x._version) for name, x in call.items() if isinstance(x, Tensor)}
    assert len(before) == 7
    run_dense(backend, call, mode)
    for name, (copy, version) in before.items():
        assert_same_bits(call[name], copy, name)
        assert call[name]._version == version, f"{name} was written to"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["causal_fewer_queries", "sinks", "everything"])
def test_lse_is_only_an_extra(name: str, backend: str) -> None:
    dtype = first_dtype(backend)
    device = device_for(backend, dtype)
    call = DENSE_CASES[name].build(dtype, "keys", device)
    alone = suppressed_attention(**call, backend=backend)
    assert isinstance(alone, Tensor)
    assert_within(alone, run_dense(backend, call)[0], few_roundings(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_empty_axes(mode: str, sinks: bool, queries: int, keys: int, backend: str) -> None:
    dtype = first_dtype(backend)
    device = device_for(backend, dtype)
    call = DenseCase(query_length=queries, key_length=keys, sinks=sinks).build(dtype, "keys", device)
    output, lse = run_dense(backend, call, mode)
    assert_same_bits(output, torch.zeros(2, 4, queries, 16, dtype=dtype, device=device))
    expected = call["sinks"][None, :, None].expand(2, 4, queries) if sinks else torch.full_like(lse, -torch.inf)
    assert_within(lse, expected, few_roundings(dtype), "lse")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("extra", ["sinks", "position_bias", "factor"])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_extras_may_have_another_dtype(dtype: torch.dtype, extra: str, backend: str) -> None:
    """Models keep sinks and biases in dtypes of their own; the result is in the query's."""
    own_dtype = first_dtype(backend)
    device = device_for(backend, own_dtype)
    call = DenseCase(position_bias="full", sinks=True).build(own_dtype, "keys", device)
    call[extra] = call[extra].to(dtype)
    output, lse = run_dense(backend, call)
    assert (output.dtype, lse.dtype) == (own_dtype, factor_dtype(own_dtype))
    exact, exact_lse = run_dense("reference", to_float64(call))
    assert_within(output, exact, few_roundings(own_dtype))
    assert_within(lse, exact_lse, few_roundings(own_dtype), "lse")


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("factor", FACTORS)
def test_cpu_is_the_fastest_of_its_variants(dtype: torch.dtype, factor: str) -> None:
    """Bit for bit; all other tests of what it computes are for the variants."""
    call = DENSE_CASES["everything"].build(dtype, factor)
    fastest = (*compiled.instruction_sets(dtype), "torch")[0]
    for mode in MODES:
        for ours, expected in zip(run_dense("cpu", call, mode), run_dense(f"cpu:{fastest}", call, mode), strict=True):
            assert_same_bits(ours, expected)


def test_default_backend_is_one_that_runs() -> None:
    call = DENSE_CASES["everything"].build(torch.float32)
    chosen, _ = run_dense(None, call)
    reference, _ = run_dense("reference", call)
    assert_within(chosen, reference, few_roundings(torch.float32))


@pytest.mark.parametrize("backend", backends.NAMES)
def test_every_backend_is_tested(backend: str) -> None:
    """The other tests run for the backends that can run here."""
    report = backends.availability()
    assert {name.partition(":")[0] for name in BACKEND_DTYPES} == set(report)
    if report[backend] is not None:
        assert backend in HARDWARE_BACKENDS, f"{backend} must run everywhere, but: {report[backend]}"
        assert len(report[backend]) > 5, "a reason says why"
        pytest.skip(f"{backend}: {report[backend]}")
    assert backend in {name.partition(":")[0] for name in BACKENDS}
