"""The ops as torch sees them: schemas, fakes, tracing, compilation, gradients."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_cases import (
    DENSE_CASES,
    FAMILIES,
    MODES,
    PACK_CASES,
    DenseCase,
    PackCase,
    device_for,
    first_dtype,
    one_thread,
)
from comparison import assert_same_bits, assert_within, few_roundings
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from atman_kernels.errors import InputError
from atman_kernels.ops import packed_suppressed_attention, suppressed_attention

OPS = torch.ops.atman_kernels
OPTIONAL = {"dense": ("factor", "key_mask", "sinks", "position_bias"), "packed": ("factor", "sinks", "position_bias")}
LAYOUT = ("suffix_starts", "prefix_lengths", "base_starts", "row_variant", "row_position")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def op_arguments(kind: str, call: dict[str, Any], mode: str, return_lse: bool, backend: str | None) -> tuple[Any, ...]:
    """The flat arguments of the registered op, from the keywords of the public function."""
    if kind == "dense":
        tensors = [call["query"], call["key"], call["value"]]
    else:
        tensors = [call[name] for name in ("query", "key", "value", "base_key", "base_value")]
        tensors += [getattr(call["pack"], name) for name in LAYOUT]
    scale = call.get("scale", call["query"].shape[-1] ** -0.5)
    options = (mode, call["is_causal"], scale, call.get("sliding_window"), call.get("softcap"), return_lse)
    return (*tensors, *(call.get(name) for name in OPTIONAL[kind]), *options, backend)


def run_op(kind: str, call: dict[str, Any], mode: str, backend: str | None) -> tuple[Tensor, Tensor]:
    function = suppressed_attention if kind == "dense" else packed_suppressed_attention
    output, lse = function(**call, mode=mode, return_lse=True, backend=backend)
    return output, lse


def build(kind: str, name: str, dtype: torch.dtype, factor: str = "keys", device: str = "cpu") -> dict[str, Any]:
    return (DENSE_CASES if kind == "dense" else PACK_CASES)[name].build(dtype, factor, device)


# --- opcheck ---

CHECKED = [
    ("dense", "grouped", "keys"),
    ("dense", "everything", "heads"),
    ("dense", "key_mask_dead_rows", "none"),
    ("packed", "few_tokens_each", "keys"),
    ("packed", "everything", "heads"),
    ("packed", "encoder", "none"),
]
QUICK_CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")


def opcheck(kind: str, call: dict[str, Any], backend: str, return_lse: bool, checks: tuple[str, ...]) -> None:
    op = OPS.suppressed_attention if kind == "dense" else OPS.packed_suppressed_attention
    torch.library.opcheck(op.default, op_arguments(kind, call, MODES[0], return_lse, backend), test_utils=checks)


@pytest.mark.parametrize("backend", FAMILIES)
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize(("kind", "name", "factor"), CHECKED)
def test_schema_and_fake(kind: str, name: str, factor: str, return_lse: bool, backend: str) -> None:
    dtype = first_dtype(backend)
    opcheck(kind, build(kind, name, dtype, factor, device_for(backend, dtype)), backend, return_lse, QUICK_CHECKS)


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize(("kind", "name"), [("dense", "everything"), ("packed", "few_tokens_each")])
def test_traces_with_dynamic_shapes(kind: str, name: str, needs_grad: bool) -> None:
    call = build(kind, name, torch.float32)
    if needs_grad:
        for argument in ("query", "key", "value"):
            call[argument].requires_grad_()
    opcheck(kind, call, "cpu", True, ("test_aot_dispatch_dynamic",))


# --- torch.compile ---


@pytest.fixture
def _forget_compiled_code() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_forget_compiled_code")
@pytest.mark.parametrize("kind", ["dense", "packed"])
@pytest.mark.parametrize("backend", [None, "cpu"])
def test_compiles_without_a_graph_break(backend: str | None, kind: str) -> None:
    call = build(kind, "everything", torch.float32, "heads")

    def model(query: Tensor, **others: Any) -> tuple[Tensor, Tensor]:
        output, lse = run_op(kind, {"query": query * 2, **others}, MODES[0], backend)
        return output + 1, lse

    expected = model(**call)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(**call)
    assert_same_bits(compiled[0], expected[0])
    assert_same_bits(compiled[1], expected[1], "lse")


@pytest.mark.usefixtures("_forget_compiled_code")
def test_compiled_once_for_many_shapes() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(suppressed_attention, fullgraph=True, dynamic=True, backend=counter)
    for queries, keys in ((5, 9), (6, 14), (11, 23)):
        call = DenseCase(query_length=queries, key_length=keys, is_causal=True).build(torch.float32)
        assert_same_bits(compiled(**call), suppressed_attention(**call))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("_forget_compiled_code")
def test_compiled_packs_follow_their_pack() -> None:
    compiled = torch.compile(packed_suppressed_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for suffixes, prefixes in (((3, 2), (5, 6)), ((2, 3), (5, 6)), ((4, 1, 6), (9, 2, 5))):
        call = PackCase(suffixes, prefixes).build(torch.float32)
        assert_same_bits(compiled(**call), packed_suppressed_attention(**call))


@pytest.mark.usefixtures("_forget_compiled_code")
@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_compiled_gradients(kind: str) -> None:
    call = build(kind, "rows_first", torch.float32)
    del call["factor"]
    call["query"] = call["query"].contiguous().requires_grad_()

    def loss(**arguments: Any) -> Tensor:
        return run_op(kind, arguments, MODES[0], None)[0].sin().sum()

    (expected,) = torch.autograd.grad(loss(**call), [call["query"]])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(**call), [call["query"]])
    assert_within(gradient, expected, few_roundings(torch.float32), "gradient")


@pytest.mark.slow
@pytest.mark.usefixtures("_forget_compiled_code")
@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_compiles_with_inductor(kind: str) -> None:
    call = build(kind, "everything", torch.float32, "heads")

    def model(query: Tensor, **others: Any) -> tuple[Tensor, Tensor]:
        return run_op(kind, {"query": query * 2, **others}, MODES[1], None)

    expected, compiled = model(**call), torch.compile(model, fullgraph=True)(**call)
    assert_within(compiled[0], expected[0], few_roundings(torch.float32))
    assert_within(compiled[1], expected[1], few_roundings(torch.float32), "lse")


@pytest.mark.usefixtures("_forget_compiled_code")
@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_bad_factors_are_found_in_compiled_code(kind: str) -> None:
    function = suppressed_attention if kind == "dense" else packed_suppressed_attention
    call = build(kind, "rows_first", torch.float32)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    compiled(**call)
    with pytest.raises(InputError, match="factor must be finite"):
        compiled(**call | {"factor": call["factor"] - 1})
