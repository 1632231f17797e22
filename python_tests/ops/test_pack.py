"""The packed op: every variant gets what dense attention over its prefix and its own rows would give it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from attention_cases import (
    ALL_DTYPES,
    BACKENDS,
    MODES,
    PACK_CASES,
    PackCase,
    backend_dtypes,
    device_for,
    first_dtype,
    one_thread,
    poisoned_memory,
)
from comparison import assert_same_bits, assert_unchanged_by_ones, assert_within, few_roundings
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import check_packed, run_packed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from atman_kernels.backends.call import PackedCall
from atman_kernels.backends.cpu import blocked, compiled
from atman_kernels.errors import InputError
from atman_kernels.formula import ScoreOptions
from atman_kernels.ops import packed_suppressed_attention, suppressed_attention
from atman_kernels.pack import VariantPack

FACTORS_AND_MODES = [("none", MODES[0])] + [(factor, mode) for factor in ("keys", "heads") for mode in MODES]
DTYPE_CASES = ("few_tokens_each", "empty_suffixes", "long_suffixes", "several_bases", "narrow_value", "window",
               "softcap", "sinks", "both_ways", "all_removed", "rows_first", "everything")  # fmt: skip
THOUSAND = PackCase((1,) * 1000, tuple(range(1000)), query_heads=2, kv_heads=1, factor_values="sparse")
ROW_TENSORS = {"query": 1, "key": 1, "value": 1}


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_memory(), one_thread():
        yield


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("factor", "mode"), FACTORS_AND_MODES)
@pytest.mark.parametrize("name", PACK_CASES)
def test_equals_each_variant_alone(name: str, factor: str, mode: str, backend: str) -> None:
    check_packed(backend, PACK_CASES[name], mode, factor, first_dtype(backend))


@pytest.mark.parametrize(("backend", "dtype"), backend_dtypes(ALL_DTYPES[1:]))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", DTYPE_CASES)
def test_equals_each_variant_alone_in(name: str, dtype: torch.dtype, mode: str, backend: str) -> None:
    check_packed(backend, PACK_CASES[name], mode, "keys", dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_thousand_variants_of_one_token(backend: str) -> None:
    dtype = first_dtype(backend)
    check_packed(backend, THOUSAND, "shifted" if dtype == torch.float32 else "log_additive", "keys", dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("factor", ["keys", "heads"])
@pytest.mark.parametrize("name", PACK_CASES)
def test_blocked_at_borders_of_its_tiles(name: str, factor: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of few variants, tiles of few rows, and variants cut into several tiles."""
    monkeypatch.setattr(blocked, "TILE_SCORES", 100)
    monkeypatch.setattr(blocked, "MINIMUM_ROWS", 29 if name.startswith("long") else 2)
    monkeypatch.setattr(blocked, "GATHERED_ROWS", 5)
    check_packed("cpu:torch", PACK_CASES[name], mode, factor, torch.float32)


@st.composite
def pack_cases(draw: st.DrawFn) -> PackCase:
    variants = draw(st.integers(1, 12))

    def lengths(largest: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(0, largest), min_size=variants, max_size=variants)))

    kv_heads, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    return PackCase(
        suffix_lengths=lengths(draw(st.sampled_from([1, 4, 30, 150]))),
        prefix_lengths=lengths(draw(st.sampled_from([3, 40]))),
        base_starts=draw(st.none() | st.just(lengths(50)) | st.just(tuple(sorted(lengths(2))))),
        spare_base=draw(st.integers(0, 5)),
        kv_heads=kv_heads,
        query_heads=kv_heads * draw(st.integers(1, 3)),
        head_dim=head_dim,
        value_dim=draw(st.just(head_dim) | st.integers(1, 20)),
        is_causal=draw(st.booleans()),
        sliding_window=draw(st.none() | st.integers(1, 30)),
        softcap=draw(st.none() | st.floats(0.5, 30)),
        scale=draw(st.none() | st.floats(0.05, 1.5)),
        sinks=draw(st.booleans()),
        position_bias=draw(st.sampled_from(["none", "full", "heads", "keys", "queries", "hidden"])),
        layout=draw(st.sampled_from(["contiguous", "rows_first", "every_second", "slice", "expanded"])),
        factor_values=draw(st.sampled_from(["mixed", "sparse", "0", "1", "2.5"])),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=pack_cases(), mode=st.sampled_from(MODES), factor=st.sampled_from(["none", "keys", "heads"]))
def test_equals_each_variant_alone_for_any_pack(backend: str, case: PackCase, mode: str, factor: str) -> None:
    check_packed(backend, case, mode, factor, first_dtype(backend))


# --- nothing leaks from one variant into another ---


def take(call: dict[str, Any], case: PackCase, variants: Sequence[int]) -> tuple[dict[str, Any], Tensor]:
    """The call with these variants only, in this order, and the rows it takes from the original."""
    firsts = [sum(case.suffix_lengths[:v]) for v in variants]
    rows = [torch.arange(f, f + case.suffix_lengths[v]) for f, v in zip(firsts, variants, strict=True)]
    kept = torch.cat(rows).to(call["query"].device)
    starts = case.base_starts or (0,) * len(case.prefix_lengths)
    pack = VariantPack.build(
        [case.suffix_lengths[v] for v in variants], [case.prefix_lengths[v] for v in variants],
        [starts[v] for v in variants], device=call["query"].device,
    )  # fmt: skip
    picked = {name: call[name].index_select(1, kept) for name in ROW_TENSORS}
    return call | picked | {"pack": pack, "factor": call["factor"][list(variants)]}, kept


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["every_prefix_length", "empty_suffixes", "several_bases_long_suffixes", "everything"])
@pytest.mark.parametrize("change", ["reversed", "every_other", "one_alone"])
def test_company_does_not_matter(change: str, name: str, mode: str, backend: str) -> None:
    dtype = first_dtype(backend)
    case = PACK_CASES[name]
    call = case.build(dtype, "keys", device_for(backend, dtype))
    output, lse = run_packed(backend, call, mode)
    variants = range(len(case.suffix_lengths))
    with_rows = [v for v in variants if case.suffix_lengths[v]]
    chosen = {"reversed": variants[::-1], "every_other": variants[::2], "one_alone": with_rows[1:2]}[change]
    other, rows = take(call, case, chosen)
    other_output, other_lse = run_packed(backend, other, mode)
    assert rows.numel() > 0
    assert_within(other_output, output.index_select(1, rows), few_roundings(dtype))
    assert_within(other_lse, lse.index_select(1, rows), few_roundings(dtype), "lse")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_a_variant_reads_nothing_of_its_neighbours(mode: str, backend: str) -> None:
    """Everything that belongs to others is replaced by NaN, base keys past the prefix included.

    NaN times a weight of zero is NaN, so only small, finite garbage may stand in a shared tile: values are large
    instead, and one wrong weight shows.
    """
    dtype = first_dtype(backend)
    case = PackCase((3, 70, 2, 4), (9, 9, 5, 9), sliding_window=20)
    call = case.build(dtype, "keys", device_for(backend, dtype))
    mine = slice(73, 75)  # the rows of variant 2, which reuses five base keys
    garbage = {name: call[name].clone() for name in ("key", "value", "base_key", "base_value")}
    for name in ("key", "value"):
        kept = garbage[name][:, mine].clone()
        garbage[name].mul_(50).add_(100)
        garbage[name][:, mine] = kept
        garbage[f"base_{name}"][:, 5:] += 100
    factor = call["factor"].clone()
    factor[[0, 1, 3]] = 7.0
    factor[2, 7:] = 9.0  # positions that this variant does not have
    output, _ = run_packed(backend, call, mode)
    changed, _ = run_packed(backend, call | garbage | {"factor": factor}, mode)
    assert_within(changed[:, mine], output[:, mine], few_roundings(dtype))
    assert not torch.allclose(changed[:, :73], output[:, :73]), "the garbage did not even reach its owners"


# --- properties shared with the dense op ---


@pytest.mark.parametrize(("backend", "dtype"), backend_dtypes())
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("factor", ["keys", "heads"])
@pytest.mark.parametrize("name", ["few_tokens_each", "long_suffixes", "everything"])
def test_ones_change_no_bit(name: str, factor: str, dtype: torch.dtype, mode: str, backend: str) -> None:
    call = PACK_CASES[name].build(dtype, factor, device_for(backend, dtype))
    ones = run_packed(backend, call | {"factor": torch.ones_like(call["factor"])}, mode)
    assert_unchanged_by_ones(ones, run_packed(backend, call | {"factor": None}, mode), backend, factor)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_one_variant_equals_the_dense_op(mode: str, backend: str) -> None:
    dtype = first_dtype(backend)
    call = PACK_CASES["one_variant"].build(dtype, "keys", device_for(backend, dtype))
    output, lse = run_packed(backend, call, mode)
    expected, expected_lse = suppressed_attention(
        call["query"][None],
        torch.cat([call["base_key"][:, :9], call["key"]], dim=1)[None],
        torch.cat([call["base_value"][:, :9], call["value"]], dim=1)[None],
        call["factor"], mode=mode, is_causal=True, return_lse=True, backend=backend,
    )  # fmt: skip
    assert_within(output, expected[0], few_roundings(dtype))
    assert_within(lse, expected_lse[0], few_roundings(dtype), "lse")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [True, False])
def test_causal_unless_told_otherwise(is_causal: bool, backend: str) -> None:
    dtype = first_dtype(backend)
    call = PACK_CASES["few_tokens_each"].build(dtype, "keys", device_for(backend, dtype))
    del call["is_causal"]
    default, _ = run_packed(backend, call)
    told, _ = run_packed(backend, call | {"is_causal": is_causal})
    assert torch.allclose(default, told, atol=1e-5) == is_causal


@pytest.mark.parametrize("backend", BACKENDS)
def test_factors_may_reach_further_than_the_pack(backend: str) -> None:
    dtype = first_dtype(backend)
    call = PACK_CASES["few_tokens_each"].build(dtype, "keys", device_for(backend, dtype))
    longer = torch.nn.functional.pad(call["factor"], (0, 5), value=0.0)
    assert_same_bits(run_packed(backend, call | {"factor": longer})[0], run_packed(backend, call)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_not_modified(backend: str) -> None:
    dtype = first_dtype(backend)
    call = PACK_CASES["everything"].build(dtype, "heads", device_for(backend, dtype))
    tensors = {name: x for name, x in (call | vars(call["pack"])).items() if isinstance(x, Tensor)}
    before = {name: (x.clone(), x._version) for name, x in tensors.items()}
    assert len(before) == 13
    run_packed(backend, call)
    for name, (copy, version) in before.items():
        assert torch.equal(tensors[name], copy), f"{name} changed"
        assert tensors[name]._version == version, f"{name} was written to"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["few_tokens_each", "sinks", "everything"])
def test_lse_is_only_an_extra(name: str, backend: str) -> None:
    dtype = first_dtype(backend)
    call = PACK_CASES[name].build(dtype, "keys", device_for(backend, dtype))
    alone = packed_suppressed_attention(**call, backend=backend)
    assert isinstance(alone, Tensor)
    assert_within(alone, run_packed(backend, call)[0], few_roundings(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_at_all(backend: str) -> None:
    dtype = first_dtype(backend)
    call = PackCase((0, 0), (4, 2)).build(dtype, "keys", device_for(backend, dtype))
    output, lse = run_packed(backend, call)
    assert output.shape == (4, 0, 8)
    assert lse.shape == (4, 0)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("factor", ["none", "keys", "heads"])
def test_cpu_is_the_fastest_of_its_variants(dtype: torch.dtype, factor: str) -> None:
    """Bit for bit; all other tests of what it computes are for the variants."""
    call = PACK_CASES["everything"].build(dtype, factor)
    fastest = (*compiled.instruction_sets(dtype), "torch")[0]
    for mode in MODES:
        for ours, expected in zip(run_packed("cpu", call, mode), run_packed(f"cpu:{fastest}", call, mode), strict=True):
            assert_same_bits(ours, expected)


# --- memory ---


class LargestTensor(TorchDispatchMode):
    """Watches how many elements the largest newly made tensor has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else [result]:
            if isinstance(made, Tensor):
                self.elements = max(self.elements, made.untyped_storage().nbytes() // max(1, made.element_size()))
        return result


def largest_tensor_of(backend: str, case: PackCase, mode: str) -> int:
    """Calls the backend's own function, since a dispatch mode does not see inside a registered op."""
    call = case.build(torch.float32)
    pack = call["pack"]
    module = import_module(f"atman_kernels.backends.{backend}")
    layout = (pack.suffix_starts, pack.prefix_lengths, pack.base_starts, pack.row_variant, pack.row_position)
    options = ScoreOptions(mode, True, case.head_dim**-0.5, None, case.softcap, False)
    tensors = [call[name] for name in ("query", "key", "value", "base_key", "base_value")]
    with LargestTensor() as watch:
        module.packed_suppressed_attention(PackedCall(*tensors, *layout, call["factor"], None, None, options))
    return watch.elements


@pytest.mark.parametrize("mode", MODES)
def test_cpu_memory_does_not_grow_with_the_variants(mode: str) -> None:
    def packed(variants: int) -> PackCase:
        return PackCase((2,) * variants, (300,) * variants, query_heads=2, kv_heads=1)

    few, many = largest_tensor_of("cpu", packed(100), mode), largest_tensor_of("cpu", packed(1000), mode)
    inputs = 1000 * 302  # the factors themselves
    assert many <= max(few, inputs)
    scores = 2 * 2000 * 302
    assert largest_tensor_of("reference", PackCase((2000,), (300,), query_heads=2, kv_heads=1), mode) >= scores


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_cpu_memory_of_one_long_suffix(softcap: float | None) -> None:
    case = PackCase((3000,), (100,), query_heads=2, kv_heads=1, softcap=softcap)
    assert largest_tensor_of("cpu", case, "multiplicative") < 2 * 3000 * 3100 / 4


# --- VariantPack ---


def test_layout_of_a_pack() -> None:
    pack = VariantPack.build([3, 0, 2], [5, 9, 6], [0, 2, 7])
    assert pack.suffix_starts.tolist() == [0, 3, 3, 5]
    assert pack.row_variant.tolist() == [0, 0, 0, 2, 2]
    assert pack.row_position.tolist() == [5, 6, 7, 6, 7]
    assert (pack.num_variants, pack.num_rows, pack.longest, pack.base_end) == (3, 5, 9, 13)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=20))
@settings(deadline=None)
def test_layout_follows_from_the_lengths(variants: list[tuple[int, int, int]]) -> None:
    suffixes, prefixes, bases = (list(column) for column in zip(*variants, strict=True))
    pack = VariantPack.build(torch.tensor(suffixes), prefixes, torch.tensor(bases))
    rows = [(v, prefix + i) for v, (suffix, prefix, _) in enumerate(variants) for i in range(suffix)]
    assert list(zip(pack.row_variant.tolist(), pack.row_position.tolist(), strict=True)) == rows
    assert pack.base_end == max(base + prefix for _, prefix, base in variants)
    assert pack.base_starts.tolist() == bases


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([3, -1], [1, 1]), "suffix_lengths.*-1"),
        (([3, 1], [1, -2]), "prefix_lengths.*-2"),
        (([3, 1], [1, 2], [0, -4]), "base_starts.*-4"),
        (([3, 1], [1]), "prefix_lengths.*1.*2"),
        (([3, 1], [1, 1], [0]), "base_starts.*1.*2"),
        (([], []), "suffix_lengths.*empty"),
        (([2.5], [1]), "suffix_lengths.*2.5"),
        (([1], ["a"]), "prefix_lengths.*'a'"),
        ((torch.tensor([1.0]), [1]), "suffix_lengths.*float32"),
        ((torch.tensor([[1]]), [1]), r"suffix_lengths.*\(1, 1\)"),
        (([1], torch.tensor([True])), "prefix_lengths.*bool"),
        ((3, [1]), "suffix_lengths.*3"),
        ((None, [1]), "suffix_lengths.*None"),
    ],
)
def test_bad_lengths(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        VariantPack.build(*arguments)


def test_a_pack_cannot_be_changed_by_accident() -> None:
    pack = VariantPack.build([1], [1])
    with pytest.raises(AttributeError):
        pack.num_rows = 5  # type: ignore[misc]
    assert replace(pack, num_rows=5).num_rows == 5
