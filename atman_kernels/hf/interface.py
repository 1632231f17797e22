"""How a run reaches a model's attention: the interface name, the switch, and the state of active runs.

transformers looks attention and mask functions up by name. Both are registered here under `NAME`, and a model is
switched to that name for as long as a `Run` is active on it. The functions themselves do nothing of their own: they
find the run that owns the calling module, and hand the call over. Without one they are plain SDPA.
"""

import contextvars
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

from atman_kernels import ops
from atman_kernels.errors import InputError, UnsupportedModelError

NAME = "atman"


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention function, in the op's terms.

    query (B, Hq, T, D); key and value (B, Hkv, S, D|Dv), after rotary embedding and cache update; mask None,
    (B, 1, 1, S) for padding alone, or the whole (B, 1, T, S), bool (True = visible) or additive.
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

    def attend(self, factor: Tensor | None, mode: str, backend: str | None = None) -> Tensor:
        """Dense suppressed attention; factor (B, S) or (B, Hq, S). Returns (B, T, Hq, Dv)."""
        mask, bias, key_mask = self.mask, self.position_bias, None
        is_causal, window = self.is_causal, self.sliding_window
        if mask is not None and mask.dtype == torch.bool and _same_for_all_queries(mask):
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


def _same_for_all_queries(mask: Tensor) -> bool:
    return mask.shape[1] == 1 and (mask.shape[2] == 1 or mask.stride(2) == 0)


def additive(mask: Tensor) -> Tensor:
    """A mask as a float32 bias; transformers writes the dtype's minimum where it means -inf."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -math.inf)
    return mask.float().masked_fill(mask <= torch.finfo(mask.dtype).min, -math.inf)


class Run(Protocol):
    """What is done with a model's attention while the run is active."""

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        """The attention output of one layer, (B, T, Hq, Dv)."""
        ...

    def mask(self, **kwargs: Any) -> Tensor | None:
        """The mask that the model's layers get; arguments as of transformers' mask functions."""
        ...


@dataclass(frozen=True)
class _Active:
    run: Run
    modules: frozenset[int]  # ids of the modules that the run owns
    configs: frozenset[int]  # ids of the configs, by which mask functions know their model
    model_name: str


# runs of this thread or task; other threads have their own
_active: contextvars.ContextVar[tuple[_Active, ...]] = contextvars.ContextVar("atman_active_runs", default=())
# runs of all threads, only to notice a call that came without its run
_everywhere: list[_Active] = []


@torch.compiler.disable  # a compiled model would keep the run that was active when it was traced
def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls; returns ((B, T, Hq, Dv), None)."""
    active = next((a for a in _active.get() if id(module) in a.modules), None)
    if active is None:
        _refuse_lost_run(module)
        return _plain(module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("dropout"):
        raise InputError(f"model must be in eval mode: {type(module).__name__} asks for attention dropout")
    call = _call(module, query, key, value, attention_mask, kwargs)
    return active.run.attend(module, call), None


def _call(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> AttentionCall:
    is_causal = kwargs.get("is_causal")
    return AttentionCall(
        query=query,
        key=key,
        value=value,
        mask=mask,
        is_causal=bool(getattr(module, "is_causal", True) if is_causal is None else is_causal),
        scale=kwargs.get("scaling"),
        sliding_window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        position_bias=kwargs.get("position_bias"),
    )


def _plain(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """SDPA; the op without factors for the two things that SDPA cannot do."""
    if kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    return _call(module, query, key, value, mask, kwargs).attend(None, "log_additive"), None


def _refuse_lost_run(module: nn.Module) -> None:
    lost = next((a for a in _everywhere if id(module) in a.modules), None)
    if lost is not None:
        raise RuntimeError(
            f"{lost.model_name} is under a suppression that was entered in another thread. Start the thread with "
            "target=contextvars.copy_context().run, args=(model.generate, …) to take the suppression along"
        )


@torch.compiler.disable
def mask(*, config: Any = None, **kwargs: Any) -> Tensor | None:
    """The mask function that transformers calls; a bool mask (True = visible) or None."""
    active = next((a for a in _active.get() if id(config) in a.configs), None)
    if active is None:
        return sdpa_mask(config=config, **kwargs)
    return active.run.mask(config=config, **kwargs)


def compact_mask(**kwargs: Any) -> Tensor | None:
    """A mask in as little memory as its pattern allows, in the forms that `AttentionCall` understands.

    None for plain causal attention aligned at the end, (B, 1, 1, S) for that with padding, an expanded
    (B, 1, T, S) for bidirectional attention, and the whole (B, 1, T, S) for every other pattern.
    """
    pattern = kwargs.get("mask_function", causal_mask_function)
    queries, keys, batch = kwargs["q_length"], kwargs["kv_length"], kwargs["batch_size"]
    offset = kwargs.get("kv_offset", 0)
    padding = kwargs.get("attention_mask")
    if padding is not None:
        padding = padding[:, offset : offset + keys]
    if pattern is causal_mask_function:
        ends_together = offset + keys == kwargs.get("q_offset", 0) + queries  # not so with a static cache
        if ends_together and (padding is None or padding.shape[1] == keys):
            return None if padding is None else padding[:, None, None, :]
    if pattern is bidirectional_mask_function and (padding is None or padding.shape[1] == keys):
        if padding is None:
            padding = torch.ones(batch, keys, dtype=torch.bool, device=kwargs.get("device"))
        return padding[:, None, None, :].expand(batch, 1, queries, keys)
    return sdpa_mask(**{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)


def decoder_of(model: nn.Module) -> PreTrainedModel:
    """The part of a model whose attention is suppressed: its text decoder, or the encoder of an encoder.

    Raises:
        InputError: `model` is not a transformers model.
        UnsupportedModelError: its attention cannot be reached, with the reason.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    return reachable(model.get_decoder(), type(model).__name__)


def reachable(part: PreTrainedModel, name: str) -> PreTrainedModel:
    """The part itself.

    Raises:
        UnsupportedModelError: not all of its attention goes through transformers' interface; `name` is the model's.
    """
    for module in part.modules():
        if isinstance(module, PreTrainedModel) and not module._can_set_attn_implementation():
            raise UnsupportedModelError(
                f"{name} cannot be suppressed: {type(module).__name__} computes attention inside its own layers and "
                "never calls transformers' attention interface"
            )
    return part


@contextmanager
def activate(model: nn.Module, run: Run, part: PreTrainedModel | None = None) -> Iterator[None]:
    """Route the attention of `model` through `run`; on exit, and after any exception, all is as before.

    Args:
        part: whose attention; None for its decoder, see `decoder_of`.

    Raises:
        InputError, UnsupportedModelError: see `decoder_of`; also if another run is active on the model.
    """
    decoder = decoder_of(model) if part is None else reachable(part, type(model).__name__)
    name = type(model).__name__
    modules = frozenset(id(m) for m in decoder.modules())
    if any(a.modules & modules for a in _active.get()):
        raise InputError(f"model {name} is already under a suppression or an explanation; leave that context first")
    active = _Active(run, modules, frozenset(id(c) for c in _configs(decoder)), name)
    with _switched(decoder, NAME):
        _everywhere.append(active)
        token = _active.set((*_active.get(), active))
        try:
            yield
        finally:
            _active.reset(token)
            _everywhere.remove(active)


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """The model's own eager attention, the one that can tell its weights; on exit all is as before.

    Raises:
        InputError, UnsupportedModelError: see `decoder_of`; also if a run is active on the model.
    """
    with _switched(decoder_of(model), "eager"):
        yield


def is_active(run: Run) -> bool:
    """Whether the calling thread or task is inside the run's context."""
    return any(a.run is run for a in _active.get())


@dataclass
class _Switch:
    name: str
    holders: int
    before: list[tuple[Any, str | None]]  # configs and the names they had


_switches: dict[int, _Switch] = {}  # by id of the decoder, which its holders keep alive
_switch_lock = threading.Lock()


@contextmanager
def _switched(decoder: PreTrainedModel, name: str) -> Iterator[None]:
    """`name` in the decoder's configs until the last of the threads that hold it has left."""
    with _switch_lock:
        switch = _switches.get(id(decoder))
        if switch is None:
            switch = _Switch(name, 0, [(config, config._attn_implementation) for config in _configs(decoder)])
            decoder.set_attn_implementation(name)
            for config, _ in switch.before:  # transformers 5.17 forgets stacks whose config is of the model's class: T5
                config._attn_implementation_internal = name
            _switches[id(decoder)] = switch
        elif switch.name != name:
            raise InputError(
                f"model {type(decoder).__name__} is in use with attention {switch.name!r}, where {name!r} is needed; "
                "leave that suppression or explanation first"
            )
        switch.holders += 1
    try:
        yield
    finally:
        with _switch_lock:
            switch.holders -= 1
            if switch.holders == 0:
                del _switches[id(decoder)]
                for config, implementation in switch.before:
                    config._attn_implementation_internal = implementation


def _configs(decoder: PreTrainedModel) -> list[Any]:
    """Every config by which a part of the decoder chooses its attention, each once."""
    found: dict[int, Any] = {}
    pending = [m.config for m in decoder.modules() if isinstance(m, PreTrainedModel)]
    while pending:
        config = pending.pop()
        if config is not None and id(config) not in found:
            found[id(config)] = config
            pending += [getattr(config, name, None) for name in config.sub_configs]
    return list(found.values())
