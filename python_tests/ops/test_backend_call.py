"""A call as torch's ops take it: the row that `backends.call` makes, and reads."""

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from atman_kernels import ops  # noqa: F401, defines the ops
from atman_kernels.backends import cpu, reference
from atman_kernels.backends.call import DenseCall, PackedCall, pinned
from atman_kernels.formula import ScoreOptions

OPTIONS = ScoreOptions("shifted", True, 0.5, 7, 30.0, False)
KINDS = (DenseCall, PackedCall)


def call_of(kind: type[Any], **tensors: Tensor) -> Any:
    """A call whose tensors tell one from another."""
    return kind(*(tensors.get(name, torch.full((), float(i))) for i, name in enumerate(kind.TENSORS)), OPTIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_is_read_from_its_row(kind: type[Any]) -> None:
    call = call_of(kind)
    found, rest = kind.read((*call.row(), "cpu", "more"))
    assert all(getattr(found, field.name) is getattr(call, field.name) for field in fields(kind)[:-1])
    assert found.options == OPTIONS
    assert tuple(rest) == ("cpu", "more")


@pytest.mark.parametrize("kind", KINDS)
def test_the_row_is_what_torch_calls_it(kind: type[Any]) -> None:
    """Each argument by the name in the registered schema, so that no two can be exchanged."""
    call = call_of(kind)
    schema = getattr(torch.ops.atman_kernels, kind.OP).default._schema
    row = dict(zip((argument.name for argument in schema.arguments), (*call.row(), None), strict=True))
    assert all(row.pop(name) is getattr(call, name) for name in kind.TENSORS)
    assert row == {field.name: getattr(OPTIONS, field.name) for field in fields(OPTIONS)} | {"backend": None}


@pytest.mark.parametrize("kind", KINDS)
def test_the_lse_is_kept_for_a_backward(kind: type[Any]) -> None:
    call = call_of(kind, value=torch.zeros((), requires_grad=True))
    assert kind.read(call.row())[0].options.return_lse
    with torch.no_grad():
        assert not kind.read(call.row())[0].options.return_lse


def test_what_is_pinned_has_the_functions_of_its_backend() -> None:
    assert hasattr(pinned(reference, "any"), "suppressed_attention_backward")
    forward_only = type("module", (), {kind.OP: staticmethod(lambda call, variant: variant) for kind in KINDS})
    found: Any = pinned(forward_only, "fast")  # type: ignore[arg-type]
    assert found.suppressed_attention(None) == "fast"
    assert not hasattr(found, "suppressed_attention_backward")
    assert cpu.variant("torch") is cpu.variant("torch")
