"""One call of a model's attention function, in the op's terms."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from atman_kernels import ops
from atman_kernels.errors import UnsupportedModelError
from atman_kernels.hf.attention.masks import additive, only_chosen, same_for_all_queries
from atman_kernels.hf.models.families import KeyBias
from atman_kernels.hf.models.parts import autocast_dtype


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention function, in the op's terms.

    query (B, Hq, T, D); key and value (B, Hkv, S, D|Dv), after rotary embedding and cache update; mask None,
    (B, 1, 1, S) for padding alone, or the whole (B, 1, T, S), bool (True = visible) or additive. key_bias says how
    a position_bias follows from the keys' positions, where it does.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    is_causal: bool
    scale: float | None
    sliding_window: int | None
    softcap: float | None
    sinks: Tensor | None
    position_bias: Tensor | None
    key_bias: KeyBias | None = None

    def attend(self, factor: Tensor | None, mode: str, backend: str | None = None) -> Tensor:
        """Dense suppressed attention; factor (B, S) or (B, Hq, S). Returns (B, T, Hq, Dv)."""
        mask, bias, key_mask = self.mask, self.position_bias, None
        is_causal, window = self.is_causal, self.sliding_window
        if mask is not None and mask.dtype == torch.bool and same_for_all_queries(mask):
            key_mask = mask[:, 0, 0].expand(self.query.shape[0], -1)
            is_causal = is_causal and mask.shape[2] == 1
        elif mask is not None:
            is_causal, window = False, None  # the mask holds both already
            bias = additive(mask) if bias is None else additive(mask) + bias
        output = ops.suppressed_attention(
            self.query,
            self.key,
            self.value,
            factor,
            mode=mode,
            is_causal=is_causal,
            key_mask=key_mask,
            scale=self.scale,
            sliding_window=window,
            softcap=self.softcap,
            sinks=self.sinks,
            position_bias=bias,
            backend=backend,
        )
        return output.transpose(1, 2)  # type: ignore[union-attr]


def call_of(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> AttentionCall:
    """What transformers' interface is called with, in the op's terms.

    Args:
        module, query, key, value, mask, kwargs: of the call, see transformers' `AttentionInterface`.

    Raises:
        InputError: the module chooses its keys, but no mask came.
        UnsupportedModelError: its sinks are of a kind that the ops do not have.
    """
    is_causal = kwargs.get("is_causal")
    if kwargs.get("sinks") is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} cannot be suppressed: its sinks are not one per head but of another kind"
        )
    chosen = kwargs.get("indices")
    query, key, value = (as_computed(x) for x in (query, key, value))
    return AttentionCall(
        query=query,
        key=key,
        value=value,
        mask=mask if chosen is None else only_chosen(mask, chosen, key.shape[2]),
        is_causal=bool(getattr(module, "is_causal", True) if is_causal is None else is_causal),
        scale=kwargs.get("scaling"),
        sliding_window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        position_bias=kwargs.get("position_bias"),
        key_bias=kwargs.get("key_bias"),
    )


def as_computed(states: Tensor) -> Tensor:
    """Queries, keys or values in the dtype in which torch's own attention would take them: that of autocast, if any."""
    return states.to(autocast_dtype(states.device, states.dtype))
