"""The ops as torch knows them: schema, implementation, fake. Their backward is in `autograd`."""

from typing import Any

import torch
from torch import Tensor

from atman_kernels import backends
from atman_kernels.backends.call import DenseCall, PackedCall, Result
from atman_kernels.formula import wide_dtype
from atman_kernels.ops import autograd, validation

_library = torch.library.Library("atman_kernels", "DEF")


def register() -> None:
    """Defines ``torch.ops.atman_kernels.suppressed_attention`` and ``.packed_suppressed_attention``."""
    for kind in (DenseCall, PackedCall):
        _register(kind)


def _register(kind: type[DenseCall] | type[PackedCall]) -> None:
    def run(*row: Any) -> Result:
        call, (backend,) = kind.read(row)
        validation.check_factor_values(call.factor, call.query)
        module = backends.load_for(backend, call.query, call.value)
        found: Result = getattr(module, kind.OP)(call)
        return found

    def fake(*row: Any) -> Result:
        call, _ = kind.read(row)
        return _results(call.query, call.value, call.options.return_lse)

    _library.define(f"{kind.OP}({kind.SCHEMA}, str? backend) -> (Tensor, Tensor)")
    _library.impl(kind.OP, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"atman_kernels::{kind.OP}", fake, lib=_library)
    autograd.register(_library, kind)


def _results(query: Tensor, value: Tensor, return_lse: bool) -> Result:
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    return output, query.new_empty(query.shape[:-1] if return_lse else (0,), dtype=wide_dtype(query.dtype))
