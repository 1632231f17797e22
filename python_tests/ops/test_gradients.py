"""Gradients of both ops: every backend against autograd through the plain formula in float64."""

from collections.abc import Iterator
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
    device_for,
    first_dtype,
    one_thread,
    plain_attention,
    poisoned_allocations,
    poisoned_memory,
)
from comparison import assert_same_bits, assert_within, few_roundings
from gradient_checks import Case, check_gradients, leaves_of, op_of
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from atman_kernels.backends.cpu import blocked, compiled
from atman_kernels.ops import suppressed_attention

DENSE = ("grouped", "grouped_by_three", "wide_value", "narrow_value", "causal_more_queries", "decoding",
         "key_mask_dead_rows", "window_causal", "window_both_ways", "softcap", "scale", "sinks_dead_rows",
         "bias_hides_rows", "bias_two_axes", "shared_keys_masked", "one_by_one", "odd_799_3", "every_second",
         "everything")  # fmt: skip
PACKED = ("few_tokens_each", "empty_suffixes", "no_base", "several_bases", "multi_query", "window",
          "window_both_ways", "bias_per_head", "bias_hides_keys", "encoder", "all_removed_sinks",
          "everything")  # fmt: skip
CASES: dict[str, Case] = {f"dense-{name}": DENSE_CASES[name] for name in DENSE} | {
    f"packed-{name}": PACK_CASES[name] for name in PACKED
}


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_memory(), one_thread():
        yield


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_formula(name: str, mode: str, backend: str) -> None:
    """Removed keys too: the formula's gradient at 0 is the limit from the right."""
    case, dtype = CASES[name], first_dtype(backend)
    call = case.build(dtype, "keys", device_for(backend, dtype))
    if torch.finfo(dtype).bits == 16:  # the plain formula's own factors have no digits for less
        call["factor"] = call["factor"].clamp_min(0.05)
    check_gradients(case, call, mode, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", ["none", "heads"])
@pytest.mark.parametrize(
    "name", ["dense-grouped", "dense-causal_more_queries", "packed-several_bases", "packed-everything"]
)
def test_factors_per_head_and_none(name: str, factor: str, backend: str) -> None:
    case, dtype = CASES[name], first_dtype(backend)
    call = case.build(dtype, factor, device_for(backend, dtype))
    if "factor" in call and torch.finfo(dtype).bits == 16:
        call["factor"] = call["factor"].clamp_min(0.05)
    check_gradients(case, call, MODES[0] if factor == "none" else MODES[2], backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["dense-everything", "dense-odd_799_3", "packed-few_tokens_each"])
def test_every_dtype_on_the_cpu(name: str, mode: str, dtype: torch.dtype) -> None:
    call = CASES[name].build(dtype, "keys")
    call["factor"] = call["factor"].clamp_min(0.05)
    check_gradients(CASES[name], call, mode, "cpu")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_blocked_at_borders_of_its_tiles(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a few rows: some see no key at all, some have one row, the last is shorter."""
    monkeypatch.setattr(blocked, "TILE_SCORES", 100)
    monkeypatch.setattr(blocked, "MINIMUM_ROWS", 37 if "odd" in name else 3)
    check_gradients(CASES[name], CASES[name].build(torch.float64, "keys"), mode, "cpu:torch")


# --- the definition ---


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_gradcheck_of_the_definition(kind: str, mode: str) -> None:
    case: Case = DenseCase(batch=1, key_batch=1, query_length=3, key_length=5, head_dim=3, value_dim=2, sinks=True,
                           softcap=2.0, position_bias="heads", is_causal=True)  # fmt: skip
    if kind == "packed":
        case = PackCase((2, 1), (3, 2), head_dim=3, value_dim=2, sinks=True, position_bias="heads")
    call = case.build(torch.float64, "heads")
    call["factor"] = call["factor"].clamp_min(0.3)
    leaves = leaves_of(call)

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(leaves, tensors, strict=True))
        return op_of(case)(**call | named, mode=mode, return_lse=True, backend="reference")  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(run, [x.clone().requires_grad_() for x in leaves.values()])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("sinks", [False, True])
def test_a_removed_key_has_the_slope_of_its_return(sinks: bool, backend: str) -> None:
    """Against finite differences to the right of 0; the first row sees removed keys only."""
    case = DenseCase(batch=1, key_batch=1, query_length=6, key_length=6, is_causal=True, sinks=sinks)
    call = case.build(torch.float64, "keys")
    call["factor"] = torch.tensor([[0.0, 0.7, 0.0, 1.0, 0.0, 2.0]], dtype=torch.float64)
    rows = slice(0 if sinks else 1, None)  # where nothing is left, the function jumps

    def outputs(factor: Tensor) -> Tensor:
        return suppressed_attention(**call | {"factor": factor}, backend=backend)[:, :, rows].sin().sum()  # type: ignore[no-any-return, union-attr]

    leaf = call["factor"].clone().requires_grad_()
    (found,) = torch.autograd.grad(outputs(leaf), [leaf])
    step = 1e-7
    for key in (0, 2, 4):
        more = call["factor"].clone()
        more[0, key] = step
        slope = (outputs(more) - outputs(call["factor"])) / step
        assert abs(slope - found[0, key]) < 1e-4 * max(1.0, abs(slope))
    assert found.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_rows_that_see_nothing_have_no_gradient(mode: str, backend: str) -> None:
    dtype = first_dtype(backend)
    call = DenseCase(key_mask="dead").build(dtype, "keys", device_for(backend, dtype))
    leaves = {n: x.detach().requires_grad_() for n, x in leaves_of(call).items()}
    output = suppressed_attention(**call | leaves, mode=mode, backend=backend)
    found = torch.autograd.grad(output[-1].sum(), list(leaves.values()))  # type: ignore[index]
    for name, gradient in zip(leaves, found, strict=True):
        assert not gradient.any(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_that_tie_for_the_minimum_share_its_gradient(backend: str) -> None:
    dtype = first_dtype(backend)
    case = DenseCase(batch=1, key_batch=1, query_length=4, key_length=6)
    call = case.build(dtype, "keys", device_for(backend, dtype))
    call["key"] = call["key"][:, :, [0, 1, 2, 0, 1, 2]].contiguous()
    check_gradients(case, call, "shifted", backend)


# --- what is asked for ---


@pytest.mark.parametrize("backend", ["reference", "cpu", "cpu:torch"])
@pytest.mark.parametrize("name", ["dense-everything", "packed-everything"])
def test_each_gradient_alone_is_what_it_is_among_all(name: str, backend: str) -> None:
    call, op = CASES[name].build(torch.float32, "heads"), op_of(CASES[name])

    def found(*wanted: str) -> list[Tensor]:
        leaves = {n: call[n].detach().requires_grad_() for n in wanted}
        output = op(**call | leaves, backend=backend)
        return list(torch.autograd.grad(output.sin().sum(), list(leaves.values())))

    names = list(leaves_of(call))
    for wanted, among_all in zip(names, found(*names), strict=True):
        (alone,) = found(wanted)
        assert_within(alone, among_all, few_roundings(torch.float32) * max(1.0, among_all.abs().max().item()), wanted)


def test_only_what_is_wanted_is_returned() -> None:
    call = DENSE_CASES["grouped"].build(torch.float32, "keys")
    tensors = (call["query"], call["key"], call["value"], call["factor"], None, None, None)
    options = ("log_additive", False, 0.25, None, None)
    ops = torch.ops.atman_kernels
    output, lse = ops.suppressed_attention(*tensors, *options, True, "cpu")
    wanted = [False, False, False, True, False, False, False]
    found = ops.suppressed_attention_backward(*tensors, *options, True, "cpu", wanted, output, lse, output, None)
    assert [x.shape for x in found] == [call["factor"].shape]


def test_a_backward_finds_the_lse_that_nobody_kept() -> None:
    call = DENSE_CASES["grouped"].build(torch.float32, "keys")
    query = call["query"].detach().requires_grad_()
    options = ("log_additive", False, 0.25, None, None)
    tensors = (query, call["key"], call["value"], call["factor"], None, None, None)
    results = []
    for return_lse in (False, True):
        output, lse = torch.ops.atman_kernels.suppressed_attention(*tensors, *options, return_lse, "cpu")
        assert lse.numel() == (output.numel() // output.shape[-1] if return_lse else 0)
        results += torch.autograd.grad(output.sin().sum(), [query])
    assert_same_bits(*results)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradients_of_the_lse_alone(backend: str) -> None:
    call = DENSE_CASES["sinks"].build(torch.float64, "keys")
    call["factor"] = call["factor"].clamp_min(0.1)
    leaves = {n: x.detach().requires_grad_() for n, x in leaves_of(call).items() if n != "value"}

    def found(lse: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(lse.sin().sum(), list(leaves.values()))

    expected = found(plain_attention(**call | leaves)[1])
    for got, exact in zip(
        found(suppressed_attention(**call | leaves, return_lse=True, backend=backend)[1]), expected, strict=True
    ):
        assert_within(got, exact, 1e-12)


def test_no_gradient_is_asked_for_nothing() -> None:
    call = DENSE_CASES["grouped"].build(torch.float32)
    assert not suppressed_attention(**call).requires_grad  # type: ignore[union-attr]
    with torch.no_grad():
        assert not suppressed_attention(**call | {"query": call["query"].requires_grad_()}).requires_grad  # type: ignore[union-attr]
    with torch.inference_mode():
        assert suppressed_attention(**call).is_inference()  # type: ignore[union-attr]


def test_second_derivatives_are_refused() -> None:
    call = DENSE_CASES["grouped"].build(torch.float32)
    query = call["query"].detach().requires_grad_()
    output = suppressed_attention(**call | {"query": query})
    (first,) = torch.autograd.grad(output.sum(), [query], create_graph=True)  # type: ignore[union-attr]
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        first.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_are_the_same(reentrant: bool) -> None:
    call = DENSE_CASES["causal"].build(torch.float32, "keys")
    leaves = {n: x.detach().requires_grad_() for n, x in leaves_of(call).items()}

    def run(*tensors: Tensor) -> Tensor:
        return suppressed_attention(*tensors, is_causal=True)  # type: ignore[return-value]

    tensors = list(leaves.values())
    expected = torch.autograd.grad(run(*tensors).sin().sum(), tensors)
    found = checkpoint(run, *tensors, use_reentrant=reentrant).sin().sum()
    found.backward()
    for leaf, exact in zip(tensors, expected, strict=True):
        assert leaf.grad is not None
        assert_same_bits(leaf.grad, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["dense-shared_keys_masked", "packed-several_bases", "packed-everything"])
def test_sums_have_one_order(name: str, dtype: torch.dtype) -> None:
    """Whatever the number of threads, and whatever memory held before."""
    call, op = CASES[name].build(dtype, "heads"), op_of(CASES[name])

    def found(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        leaves = {n: x.detach().requires_grad_() for n, x in leaves_of(call).items()}
        return list(torch.autograd.grad(op(**call | leaves, backend="cpu").sin().sum(), list(leaves.values())))

    expected = found(1)
    with poisoned_allocations():
        for threads in (1, 2, 3):
            for got, exact in zip(found(threads), expected, strict=True):
                assert_same_bits(got, exact)


@pytest.mark.parametrize("name", ["query", "key", "value", "factor"])
def test_what_nobody_asked_for_is_not_allocated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the compiled backward, which writes each gradient into a tensor of its own."""
    if not compiled.instruction_sets(torch.float32):
        pytest.skip("no compiled CPU kernel")
    shapes = {"query": (1, 4, 64, 32), "key": (1, 2, 64, 32), "value": (1, 2, 64, 24), "factor": (1, 64)}
    tensors = {of: torch.rand(shape, dtype=torch.float32, device="cpu") for of, shape in shapes.items()}
    own, made = torch.Tensor.new_empty, []

    def counted(tensor: Tensor, *size: Any, **options: Any) -> Tensor:
        made.append(own(tensor, *size, **options))
        return made[-1]

    def bytes_of(wanted: set[str]) -> int:
        leaves = {of: tensor.clone().requires_grad_(of in wanted) for of, tensor in tensors.items()}
        output = suppressed_attention(**leaves, is_causal=True, backend="cpu")
        made.clear()
        torch.autograd.grad(output, [leaves[of] for of in sorted(wanted)], torch.ones_like(output))
        return sum(each.nbytes for each in made)

    monkeypatch.setattr(torch.Tensor, "new_empty", counted)
    assert bytes_of(set(tensors)) >= sum(each.nbytes for each in tensors.values())
    others = sum(each.nbytes for of, each in tensors.items() if of != name)
    assert bytes_of({name}) <= bytes_of(set(tensors)) - others
