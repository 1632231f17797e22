"""Runs that change attention by factors of its keys: of any model, and of an encoder-decoder's source."""

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atman_kernels.arguments import choice
from atman_kernels.errors import InputError
from atman_kernels.formula import MODES
from atman_kernels.hf.attention.calls import AttentionCall
from atman_kernels.hf.attention.layers import LayerSelection
from atman_kernels.hf.attention.masks import compact_mask
from atman_kernels.hf.attention.positional import Factors, LayerFactors, Queries, checked_queries
from atman_kernels.hf.attention.switch import Run
from atman_kernels.hf.models.parts import encoder_of
from atman_kernels.hf.models.ranks import ALONE, Ranks
from atman_kernels.hf.models.sharding import has_heads_of_its_own
from atman_kernels.hf.replacement import replaced
from atman_kernels.hf.scope import Scope

Attention = Literal["self", "cross", "both"]

# under these names a module is handed the states of the encoder
_OTHER_STATES = ("key_value_states", "encoder_hidden_states")


class _ForwardState(threading.local):
    """What is known of the forward at hand, of which each thread has its own."""

    def __init__(self) -> None:
        # where the queries and the keys of a call begin, by their numbers; a sliding cache drops its oldest keys
        self.offsets: dict[tuple[int, int], tuple[int, int]] = {}
        self.cross: set[int] = set()  # ids of modules that were handed another stack's states


class SuppressedRun(Run):
    """Dense attention, changed layer by layer; arguments as of `suppress`."""

    def __init__(
        self,
        factor: Factors,
        *,
        mode: str = "log_additive",
        layers: Iterable[int] | None = None,
        queries: Queries = None,
        value_factor: Factors = None,
        backend: str | None = None,
    ) -> None:
        choice(mode, "mode", MODES)
        self.factors = LayerFactors("factor", factor)
        self.value_factors = LayerFactors("value_factor", value_factor)
        self.queries = checked_queries(queries)
        self.mode = mode
        self.layers = LayerSelection(layers)
        self.backend = backend
        self.reached = False
        self.computing: Callable[[nn.Module], None] | None = None  # is told of every module that attends
        self.ranks: Ranks = ALONE  # among which the model's heads may be dealt out
        self._forward = _ForwardState()

    def mask(self, **kwargs: Any) -> Tensor | None:
        """See `Run.mask`; notes where the queries and keys of the forward begin."""
        # a static cache counts on the device, in a tensor that it changes: read only where it is needed, and now
        first_query = 0 if self.queries is None else int(kwargs.get("q_offset", 0))
        self._forward.offsets[kwargs["q_length"], kwargs["kv_length"]] = first_query, int(kwargs.get("kv_offset", 0))
        return compact_mask(**kwargs)

    def forget_offsets(self) -> None:
        """A forward that brings its own mask must not be taken for the one before."""
        self._forward.offsets.clear()

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        """See `Run.attend`: under the factors of the module's layer, if it is among the layers to act on."""
        self.reached = True
        return self._attend(module, call, self.layers)

    def _attend(self, module: nn.Module, call: AttentionCall, layers: "LayerSelection") -> Tensor:
        if self.computing is not None:
            self.computing(module)
        changed, factor = self._changed(module, call, layers)
        if changed is call and factor is None:
            return call.attend(None, self.mode, self.backend)
        rows = self._rows(call)
        if rows is not None and not rows.any():
            return call.attend(None, self.mode, self.backend)
        output = changed.attend(factor, self.mode, self.backend)
        if rows is None or rows.all():
            return output
        untouched = call.attend(None, self.mode, self.backend)
        return torch.where(rows.to(output.device)[:, :, None, None], output, untouched)

    def _changed(
        self, module: nn.Module, call: AttentionCall, layers: "LayerSelection"
    ) -> tuple[AttentionCall, Tensor | None]:
        """The call with its values scaled, and the factors of its scores."""
        layer = layers.index(module)
        if layer not in layers:
            return call, None
        batch, keys, device = call.query.shape[0], call.key.shape[2], call.query.device
        first = self._forward.offsets.get((call.query.shape[2], keys), (0, 0))[1]
        factors, value_factors = self.factors.of(layer), self.value_factors.of(layer)
        if value_factors is not None and not value_factors.neutral:
            scaled = self._of_own_heads(value_factors.at(batch, first, keys, device), module, call, "value_factor")
            call = _with_scaled_values(call, scaled)
        if factors is None:
            return call, None
        return call, self._of_own_heads(factors.at(batch, first, keys, device), module, call, "factor")

    def _of_own_heads(self, factor: Tensor, module: nn.Module, call: AttentionCall, name: str) -> Tensor:
        """(B, S) as it is; of (B, Hq, S) what belongs to the heads that this rank computes."""
        number, size = self.ranks.tensor
        if factor.ndim == 2 or size == 1 or not has_heads_of_its_own(module):
            return factor
        own = call.query.shape[1]
        if factor.shape[1] != own * size:
            raise InputError(f"{name} has {factor.shape[1]} heads, but the model's attention has {own * size}")
        return factor[:, number * own : (number + 1) * own]

    def _rows(self, call: AttentionCall) -> Tensor | None:
        """(B, T) bool on the CPU, the queries to act on; None for all."""
        if self.queries is None:
            return None
        count, keys = call.query.shape[2], call.key.shape[2]
        if (count, keys) not in self._forward.offsets and count != keys:
            raise InputError(
                f"queries: {count} queries over {keys} keys came with a mask of their own, which does not tell their "
                "positions; pass a 2D attention_mask"
            )
        first = self._forward.offsets.get((count, keys), (0, 0))[0]
        return self.queries.at(call.query.shape[0], first, count, torch.device("cpu"))


def _with_scaled_values(call: AttentionCall, factor: Tensor) -> AttentionCall:
    """The call with every key's value (B, Hkv, S, Dv) times factor, (B, S) or (B, Hq, S)."""
    key, value = call.key, call.value
    if factor.ndim == 3:
        heads = call.query.shape[1]
        if factor.shape[1] != heads:
            raise InputError(f"value_factor has {factor.shape[1]} heads, but the model's attention has {heads}")
        key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    else:
        factor = factor[:, None]
    return replace(call, key=key, value=(value * factor[..., None]).to(value.dtype))


class SourceRun(SuppressedRun):
    """An encoder-decoder model whose attention to the source is suppressed; the decoder's to itself is not.

    A call is cross-attention if its module, or one around it, was handed another stack's states: neither its shapes
    nor `is_causal` tell. The run's hooks note that.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        factor: Factors,
        *,
        attention: Attention = "both",
        layers: Iterable[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(factor, **options)
        wanted = None if layers is None else tuple(layers)
        self._layers_by_role = {role: LayerSelection(wanted) for role in ("self", "cross")}
        self._roles = {"self", "cross"} if attention == "both" else {attention}
        self._to_see = set(self._roles)
        self._encoder = frozenset(id(module) for module in encoder_of(model).modules())

    @contextmanager
    def hooks(self, part: PreTrainedModel, scope: Scope) -> Iterator[None]:
        """Inside, forwards of the scope tell which of their modules attend to another stack."""
        with ExitStack() as stack:
            for module in part.modules():
                names = list(inspect.signature(module.forward).parameters)
                given = [(name, names.index(name)) for name in _OTHER_STATES if name in names]
                if given:
                    stack.enter_context(replaced(module, scope, partial(self._note_states, id(module), given)))
            yield

    def _note_states(
        self, module: int, given: list[tuple[str, int]], own: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        handed = (kwargs.get(name, args[at] if at < len(args) else None) for name, at in given)
        if any(states is not None for states in handed):
            self._forward.cross.add(module)
        else:
            self._forward.cross.discard(module)
        return own(*args, **kwargs)

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        """See `Run.attend`: under factors in the encoder, in cross-attention, or in both."""
        if id(module) in self._forward.cross:
            role, call = "cross", replace(call, is_causal=False, sliding_window=None)
        elif id(module) in self._encoder:
            role = "self"
        else:  # the decoder among itself
            return call.attend(None, self.mode, self.backend)
        self._to_see.discard(role)
        self.reached = not self._to_see
        if role not in self._roles:
            return call.attend(None, self.mode, self.backend)
        return self._attend(module, call, self._layers_by_role[role])
