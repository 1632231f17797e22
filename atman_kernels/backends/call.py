"""What a backend is asked for, `DenseCall` and `PackedCall`, and what it offers, `Backend`.

torch's ops take tensors and numbers in a row. Here, and nowhere else, a call becomes such a row and is read from it:
the call's tensors in the order of its fields, then the fields of its `ScoreOptions`.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass, fields
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, Protocol, Self, cast

import torch
from torch import Tensor

from atman_kernels.formula import Saved, ScoreOptions

Result = tuple[Tensor, Tensor]  # output (…, Dv), and lse (…), which has no elements unless `options.return_lse`
Wanted = Set[str]  # names of a call's tensors, of which a backward is to find the gradients
Gradients = dict[str, Tensor]  # by these names, each contiguous, of its tensor's shape and dtype

_OPTIONS = len(fields(ScoreOptions))
_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    str: "str",
    bool: "bool",
    float: "float",
    float | None: "float?",
    int | None: "SymInt?",  # compilers have lengths of their own
}


class Call:
    """The row of arguments that a torch op takes for a call."""

    __slots__ = ()
    OP: ClassVar[str]  # its name, which is that of a backend's function, too
    TENSORS: ClassVar[tuple[str, ...]]  # names of the fields, but for `options`
    SCHEMA: ClassVar[str]  # the row in the language of torch's schemas

    options: ScoreOptions

    def __init_subclass__(cls) -> None:
        types = {name: of for name, of in cls.__annotations__.items() if of in (Tensor, Tensor | None)}
        cls.TENSORS = tuple(types)
        types |= {field.name: field.type for field in fields(ScoreOptions)}
        cls.SCHEMA = ", ".join(f"{_SCHEMA_TYPES[of]} {name}" for name, of in types.items())

    @classmethod
    def read(cls, row: Sequence[Any]) -> tuple[Self, Sequence[Any]]:
        """A call from the row that begins with it, and what follows there."""
        tensors = len(cls.TENSORS)
        end = tensors + _OPTIONS
        return cls(*row[:tensors], ScoreOptions(*row[tensors:end])), row[end:]  # type: ignore[call-arg]

    def row(self) -> tuple[Any, ...]:
        """The row of this call, which keeps its lse where there will be a backward."""
        tensors, o = self.tensors(), self.options
        keeps_lse = o.return_lse or (
            torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
        )
        return (*tensors, o.mode, o.is_causal, o.scale, o.sliding_window, o.softcap, keeps_lse)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Those of the call, as `TENSORS` names them: written out, since every call on a GPU waits for it."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, eq=False)
class DenseCall(Call):
    """Attention of a batch of sequences, as `ops.suppressed_attention` has checked it.

    Attributes:
        query: (B, Hq, Lq, D).
        key: (1|B, Hkv, Lk, D).
        value: (1|B, Hkv, Lk, Dv).
        factor: (B, Lk) or (B, Hq, Lk).
        key_mask: (B, Lk) bool, True = visible.
        sinks: (Hq,).
        position_bias: (1|B, 1|Hq, 1|Lq, 1|Lk).
    """

    OP: ClassVar[str] = "suppressed_attention"

    query: Tensor
    key: Tensor
    value: Tensor
    factor: Tensor | None
    key_mask: Tensor | None
    sinks: Tensor | None
    position_bias: Tensor | None
    options: ScoreOptions

    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the order of the fields."""
        return self.query, self.key, self.value, self.factor, self.key_mask, self.sinks, self.position_bias


@dataclass(frozen=True, slots=True, eq=False)
class PackedCall(Call):
    """Attention of many variants' suffixes to one base, as `ops.packed_suppressed_attention` has checked it.

    Attributes:
        query: (Hq, T, D).
        key, value: (Hkv, T, D) and (Hkv, T, Dv), the rows' own.
        base_key, base_value: (Hkv, S, D) and (Hkv, S, Dv).
        suffix_starts: (V + 1,) int32; this and the next four are a `VariantPack`'s.
        prefix_lengths: (V,) int32.
        base_starts: (V,) int32.
        row_variant: (T,) int32.
        row_position: (T,) int64.
        factor: (V, K) or (V, Hq, K), over absolute positions.
        sinks: (Hq,).
        position_bias: (1|Hq, 1|P, 1|P), over absolute positions.
    """

    OP: ClassVar[str] = "packed_suppressed_attention"

    query: Tensor
    key: Tensor
    value: Tensor
    base_key: Tensor
    base_value: Tensor
    suffix_starts: Tensor
    prefix_lengths: Tensor
    base_starts: Tensor
    row_variant: Tensor
    row_position: Tensor
    factor: Tensor | None
    sinks: Tensor | None
    position_bias: Tensor | None
    options: ScoreOptions

    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the order of the fields."""
        layout = self.suffix_starts, self.prefix_lengths, self.base_starts, self.row_variant, self.row_position
        vectors = self.query, self.key, self.value, self.base_key, self.base_value
        return (*vectors, *layout, self.factor, self.sinks, self.position_bias)


class Backend(Protocol):
    """What every backend offers, a module or one of its variants."""

    def suppressed_attention(self, call: DenseCall, /) -> Result:
        """Output (B, Hq, Lq, Dv) in the query's dtype, lse (B, Hq, Lq)."""

    def packed_suppressed_attention(self, call: PackedCall, /) -> Result:
        """Output (Hq, T, Dv) in the query's dtype, lse (Hq, T)."""


class Differentiable(Backend, Protocol):
    """A backend that finds gradients itself; for others the reference does it, holding all scores of the call."""

    def suppressed_attention_backward(self, call: DenseCall, saved: Saved, wanted: Wanted, /) -> Gradients:
        """The gradients by what is wanted."""

    def packed_suppressed_attention_backward(self, call: PackedCall, saved: Saved, wanted: Wanted, /) -> Gradients:
        """The gradients by what is wanted."""


def pinned(backend: ModuleType, variant: str) -> Backend:
    """A backend's forwards, and its backwards where it has them, with one of its variants pinned."""
    names = [f"{call.OP}{end}" for call in (DenseCall, PackedCall) for end in ("", "_backward")]
    found = {name: getattr(backend, name) for name in names if hasattr(backend, name)}
    return cast(Backend, SimpleNamespace(**{name: partial(of, variant=variant) for name, of in found.items()}))
