"""Suppression behind transformers' attention interface: one function, and a context that says what it scales.

>>> model.set_attn_implementation("suppressed")                                              # doctest: +SKIP
>>> with kernel.suppress(model, factor):                                                     # doctest: +SKIP
...     logits = model(**inputs).logits

The factors are those of keys in one sequence, by position, so models with one stack are served: decoders and encoders.
"""

import contextvars
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError, UnsupportedModelError
from .formula import MODES
from .ops import suppressed_attention


@dataclass(frozen=True, eq=False)
class _Suppression:
    modules: frozenset[int]  # ids of the model's modules
    factor: Tensor  # (B, L) or (B, Hq, L)
    mode: str
    reached: list[bool]


_active: contextvars.ContextVar[tuple[_Suppression, ...]] = contextvars.ContextVar("suppressions", default=())
_everywhere: list[_Suppression] = []  # of all threads, to notice a call that came without its own


def register(name: str = "suppressed") -> str:
    """Makes `attention` known to transformers, for `model.set_attn_implementation(name)`; returns the name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


@contextmanager
def suppress(model: nn.Module, factor: Tensor, *, mode: str = "log_additive") -> Iterator[None]:
    """Scale the attention to some tokens in every forward of `model` inside the context.

    Args:
        model: a transformers model with one stack that computes attention by this kernel.
        factor: (B, L) or (B, Hq, L) over key positions of the padded input; later keys count as 1. A row serves all
            beams and returned sequences of its prompt.
        mode: as of `suppressed_attention`.

    Raises:
        InputError: an argument does not fit, or the model is suppressed already.
        UnsupportedModelError: an encoder-decoder; or, at the end, no forward came by this kernel.
    """
    if mode not in MODES:
        raise InputError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
    if not isinstance(factor, Tensor) or factor.ndim not in (2, 3) or not factor.is_floating_point():
        raise InputError("factor must be a floating point tensor (B, L) or (B, Hq, L)")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{type(model).__name__} has two stacks, whose keys are not in one sequence")
    mine = _Suppression(frozenset(id(m) for m in model.modules()), factor, mode, [])
    if any(other.modules & mine.modules for other in _active.get()):
        raise InputError(f"model {type(model).__name__} is already suppressed; leave that context first")
    ran: list[bool] = []
    hook = model.register_forward_hook(lambda *_: ran.append(True))
    token = _active.set((*_active.get(), mine))
    _everywhere.append(mine)
    try:
        yield
    finally:
        _everywhere.remove(mine)
        _active.reset(token)
        hook.remove()
    if ran and not mine.reached:
        raise UnsupportedModelError(
            f"{type(model).__name__} was not suppressed: none of its forwards came by this kernel; set its attention "
            "implementation first"
        )


@torch.compiler.disable  # a compiled model would keep the factors that were there when it was traced
def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """The function that transformers calls: query (B, Hq, T, D), key and value (B, Hkv, S, D|Dv) → (B, T, Hq, Dv)."""
    found = next((s for s in _active.get() if id(module) in s.modules), None)
    if found is None and any(id(module) in s.modules for s in _everywhere):
        raise RuntimeError(
            "the model is suppressed in another thread; start this one with target=contextvars.copy_context().run"
        )
    if options.get("dropout"):
        raise InputError(f"{type(module).__name__} asks for attention dropout; put the model into eval mode")
    for name in ("indices", "sinks"):
        if options.get(name) is not None:
            raise UnsupportedModelError(f"{type(module).__name__} has {name}, which this kernel does not know")
    is_causal = options.get("is_causal")
    is_causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    window, bias, key_mask = options.get("sliding_window"), options.get("position_bias"), None
    if attention_mask is not None and attention_mask.ndim == 2:  # (B, S), True = visible
        key_mask = attention_mask.bool()
    elif attention_mask is not None:  # (B, 1|Hq, T, S), which holds causality and window already
        is_causal, window = False, None
        bias = _additive(attention_mask) if bias is None else _additive(attention_mask) + bias
    output = suppressed_attention(
        query,
        key,
        value,
        None if found is None else _factor(found, module, query, key, options.get("sliding_window")),
        mode="log_additive" if found is None else found.mode,
        is_causal=is_causal,
        key_mask=key_mask,
        scale=options.get("scaling"),
        sliding_window=window,
        softcap=options.get("softcap"),
        sinks=options.get("s_aux"),
        position_bias=bias,
    )
    assert isinstance(output, Tensor)
    return output.transpose(1, 2).contiguous(), None


def _factor(found: _Suppression, module: nn.Module, query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """The factors of this call's keys, (B, S) or (B, Hq, S)."""
    found.reached.append(True)
    batch, keys = query.shape[0], key.shape[2]
    rows, length = found.factor.shape[0], found.factor.shape[-1]
    if rows != 1 and batch % rows:
        raise InputError(f"factor has {rows} rows, which does not divide the batch of {batch}")
    if keys < length or (window is not None and query.shape[2] < keys and keys >= window):
        raise InputError(
            f"factor reaches to position {length}, but {type(module).__name__} came with {keys} keys: a cache that "
            "drops old keys does not tell their positions"
        )
    factor = found.factor.to(query.device).repeat_interleave(batch // rows, dim=0)
    return nn.functional.pad(factor, (0, keys - length), value=1.0)


def _additive(mask: Tensor) -> Tensor:
    """A mask as a float32 bias; transformers writes the dtype's minimum where it means −inf."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -math.inf)
    return mask.float().masked_fill(mask <= torch.finfo(mask.dtype).min, -math.inf)
