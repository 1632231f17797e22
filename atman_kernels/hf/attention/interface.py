"""How a run reaches a model's attention: the interface name, the switch, and the state of installed runs.

transformers looks attention and mask functions up by name. Both are registered here under `NAME`, and a model is
switched to that name for as long as a `Run` is installed on it. The functions themselves do nothing of their own: they
find the run that owns the calling module and whose scope the caller is in, and hand the call over. A call without one,
such as another thread's, goes to what the model would have called under its own name.
"""

import inspect
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    eager_mask,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from atman_kernels import ops
from atman_kernels.errors import InputError, UnsupportedModelError
from atman_kernels.hf.attention.families import KeyBias, chooses_keys, families_in, handed_over, why_refused
from atman_kernels.hf.attention.scope import Scope

NAME = "atman"
AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


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


class Run(ABC):
    """What is done with a model's attention while the run is installed."""

    @abstractmethod
    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        """The attention output of one layer, (B, T, Hq, Dv)."""

    def mask(self, **kwargs: Any) -> Tensor | None:
        """The mask that the model's layers get; arguments as of transformers' mask functions."""
        return compact_mask(**kwargs)

    def hooks(self, part: PreTrainedModel, scope: Scope) -> AbstractContextManager[object]:
        """What the run needs beside the attention and mask functions, for callers in the scope; by default nothing."""
        return nullcontext()

    @contextmanager
    def installed(
        self, model: nn.Module, part: PreTrainedModel | None = None, scope: Scope | None = None
    ) -> Iterator[Scope]:
        """Route a model's attention through this run; on exit, and after any exception, all is as before.

        Calls from outside the context, such as other threads', are the model's own meanwhile.

        Args:
            model: what the errors name.
            part: whose attention; None for the model's decoder, see `decoder_of`.
            scope: a new one, whose calls the run is for; None: of our own code alone.

        Yields:
            the scope.

        Raises:
            InputError, UnsupportedModelError: see `decoder_of`; also if the caller is inside another run on the model.
        """
        decoder = decoder_of(model) if part is None else reachable(part, type(model).__name__)
        active = _active_on(decoder, self, Scope() if scope is None else scope, type(model).__name__)
        _check_free(active)
        with _acting(decoder, active), self.hooks(decoder, active.scope):
            yield active.scope

    @contextmanager
    def reinstalled(self, part: PreTrainedModel) -> Iterator[Scope]:
        """As `installed`, in preference to whatever is active: for what repeats an earlier call."""
        active = _active_on(part, self, Scope(), type(part).__name__)
        with _acting(part, active), self.hooks(part, active.scope):
            yield active.scope


@dataclass(frozen=True, eq=False)
class _Active:
    run: Run | None  # None: the model's own eager attention
    scope: Scope
    modules: frozenset[int]  # ids of the modules that the run owns
    configs: frozenset[int]  # ids of the configs, by which mask functions know their model
    model_name: str
    mask_hides: bool = False  # the model takes True for hidden, and no mask for an error
    whole_masks: bool = False  # the model looks into its masks, or its modules do not say that they are causal


# runs of all threads, replaced as a whole whenever one comes or goes
_everywhere: tuple[_Active, ...] = ()
_everywhere_lock = threading.RLock()


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
    active = next((a for a in reversed(_everywhere) if id(module) in a.modules and a.scope.holds()), None)
    if active is None:
        return _own_attention(module, query, key, value, attention_mask, **kwargs)
    if active.run is None:
        return _eager_of(module)(module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("dropout"):
        raise InputError(f"model must be in eval mode: {type(module).__name__} asks for attention dropout")
    call = _call(module, query, key, value, attention_mask, kwargs)
    return active.run.attend(module, call).contiguous(), None  # some callers take a view of it


def _call(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> AttentionCall:
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
        mask=mask if chosen is None else _only_chosen(mask, chosen, key.shape[2]),
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
    return states.to(_autocast(states.device, states.dtype))


def computing_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype of a model's products: its own, or that of autocast."""
    return _autocast(model.device, model.dtype)


def _autocast(device: torch.device, own: torch.dtype) -> torch.dtype:
    """What autocast, where there is one and it is on, makes of a dtype; it leaves float64 alone."""
    kind = device.type  # "meta" of models whose weights lie elsewhere
    if own == torch.float64 or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return own
    return torch.get_autocast_dtype(kind)


def _only_chosen(mask: Tensor | None, chosen: Tensor, keys: int) -> Tensor:
    """The mask (B, 1, T, S) without the keys that an indexer did not choose; chosen (B, T, k) are their indices."""
    if mask is None:
        raise InputError("an attention that chooses its keys came without a mask")
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    picked = torch.zeros(*chosen.shape[:2], keys, dtype=torch.bool, device=mask.device)
    return visible & picked.scatter_(-1, chosen.long(), True)[:, None]


def _own_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """What the module computes under the name that its config had, or has."""
    name = own_name(getattr(module, "config", None))
    if kwargs.get("indices") is not None and name in ("eager", "sdpa"):  # models merge these themselves for the two
        visible = _only_chosen(mask, kwargs["indices"], key.shape[2])
        mask = visible if name == "sdpa" else additive(visible).to(query.dtype)
    if name in (None, "eager"):
        return _eager_of(module)(module, query, key, value, mask, **kwargs)
    if name != NAME:
        function: AttentionFunction = ALL_ATTENTION_FUNCTIONS[name]
        return function(module, query, key, value, mask, **kwargs)
    # chosen by the user: SDPA; the op without factors for the two things that SDPA cannot do
    if kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    return _without_factors(module, query, key, value, mask, **kwargs)


def _eager_of(module: nn.Module) -> AttentionFunction:
    """The eager attention function that the module's forward names; our op without factors if it names none."""
    forward = inspect.unwrap(type(module).forward)
    names = [name for name in forward.__code__.co_names if name.endswith("eager_attention_forward")]
    return forward.__globals__[names[0]] if len(names) == 1 else _without_factors  # type: ignore[no-any-return]


def _without_factors(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    return _call(module, query, key, value, mask, kwargs).attend(None, "log_additive"), None


@torch.compiler.disable
def mask(*, config: Any = None, **kwargs: Any) -> Tensor | None:
    """The mask function that transformers calls; a bool mask (True = visible) or None."""
    active = next((a for a in reversed(_everywhere) if id(config) in a.configs and a.scope.holds()), None)
    if active is None:
        name = own_name(config)
        function = sdpa_mask if name in (None, NAME) else ALL_MASK_ATTENTION_FUNCTIONS.get(name)
        return None if function is None else function(config=config, **kwargs)
    if active.run is None:
        return eager_mask(config=config, **kwargs)
    visible = active.run.mask(config=config, whole=active.whole_masks, **kwargs)
    if not active.mask_hides:
        return visible
    if visible is None:
        return torch.zeros(1, 1, 1, kwargs["kv_length"], dtype=torch.bool, device=kwargs.get("device"))
    return ~visible


def compact_mask(*, whole: bool = False, **kwargs: Any) -> Tensor | None:
    """A mask in as little memory as its pattern allows, in the forms that `AttentionCall` understands.

    None for plain causal attention aligned at the end, (B, 1, 1, S) for that with padding, an expanded
    (B, 1, T, S) for bidirectional attention, and the whole (B, 1, T, S) for every other pattern, or for causal ones
    too where `whole` asks for it.
    """
    pattern = kwargs.get("mask_function", causal_mask_function)
    queries, keys, batch = kwargs["q_length"], kwargs["kv_length"], kwargs["batch_size"]
    offset = kwargs.get("kv_offset", 0)
    padding = kwargs.get("attention_mask")
    if padding is not None:
        padding = padding[:, offset : offset + keys]
    if pattern is causal_mask_function and not whole:
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
    decoder = text_stack(model)
    if any(family.across for family in families_in(decoder)):
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be suppressed by factors of its tokens: it attends to an image beside them"
        )
    return reachable(decoder, type(model).__name__)


def text_stack(model: PreTrainedModel) -> PreTrainedModel:
    """What `decoder_of` answers, whether or not its attention can be reached."""
    decoder = model.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else model.base_model  # ModernBERT's: a layer of its head


def reachable(part: PreTrainedModel, name: str) -> PreTrainedModel:
    """The part itself.

    Raises:
        UnsupportedModelError: not all of its attention can be reached; `name` is the model's.
    """
    reason = why_refused(part)
    if reason is not None:
        raise UnsupportedModelError(f"{name} cannot be suppressed: {reason}")
    for module in part.modules():
        if isinstance(module, PreTrainedModel) and not (module._can_set_attn_implementation() or families_in(module)):
            raise UnsupportedModelError(
                f"{name} cannot be suppressed: {type(module).__name__} computes attention inside its own layers and "
                "never calls transformers' attention interface"
            )
    return part


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """The model's own eager attention, the one that can tell its weights; on exit all is as before.

    Raises:
        InputError, UnsupportedModelError: see `decoder_of`; also if the caller is inside a run on the model.
    """
    decoder = decoder_of(model)
    if families_in(decoder):
        raise UnsupportedModelError(
            f"{type(model).__name__} computes attention inside its own layers, where its weights cannot be asked for"
        )
    active = _active_on(decoder, None, Scope(), type(model).__name__)
    _check_free(active)
    with _acting(decoder, active):
        yield


def _active_on(decoder: PreTrainedModel, run: Run | None, scope: Scope, model_name: str) -> _Active:
    modules = frozenset(id(m) for m in decoder.modules())
    configs = frozenset(id(c) for c in _configs(decoder))
    hides = any(family.mask_hides for family in families_in(decoder))
    return _Active(run, scope, modules, configs, model_name, hides, _takes_whole_masks(decoder))


def _check_free(active: _Active) -> None:
    """Raises InputError if the caller is inside a run on some of the same modules."""
    if any(a.modules & active.modules and a.scope.holds() for a in _everywhere):
        raise InputError(
            f"model {active.model_name} is already under a suppression or an explanation; leave that context first"
        )


@contextmanager
def _acting(decoder: PreTrainedModel, active: _Active) -> Iterator[None]:
    global _everywhere
    with handed_over(decoder, attention, active.scope), _switched(decoder), active.scope:
        with _everywhere_lock:
            _everywhere = (*_everywhere, active)
        try:
            yield
        finally:
            with _everywhere_lock:
                _everywhere = tuple(a for a in _everywhere if a is not active)


def _takes_whole_masks(decoder: PreTrainedModel) -> bool:
    """Indexers choose keys among those that a mask shows; some causal modules leave it to the mask to be so."""
    unsure = any(getattr(module, "is_causal", None) is False for module in decoder.modules())
    return unsure or chooses_keys(decoder)


def is_under_a_run(decoder: PreTrainedModel) -> bool:
    """Whether a call of the decoder by the caller goes through some run."""
    return any(id(decoder) in a.modules and a.scope.holds() for a in _everywhere)


class _SwitchedName(str):
    """`NAME` in a config for the time being. What copies the config meanwhile gets the name that it had."""

    own: str | None

    @classmethod
    def over(cls, own: str | None) -> "_SwitchedName":
        name = cls(NAME)
        name.own = own
        return name

    def __deepcopy__(self, memo: dict[int, Any]) -> str | None:
        return self.own

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _as_it_is, (self.own,)


def _as_it_is(value: Any) -> Any:
    return value


def own_name(config: Any) -> str | None:
    """The name of the attention that a config has chosen, whether or not runs are active on its model."""
    name = getattr(config, "_attn_implementation", None)
    return name.own if isinstance(name, _SwitchedName) else name


@dataclass
class _Switch:
    config: Any
    before: str | None
    holders: int = 0


_switches: dict[int, _Switch] = {}  # by id of the config
_switch_lock = threading.RLock()


@contextmanager
def _switched(decoder: PreTrainedModel) -> Iterator[None]:
    """`NAME` in the decoder's configs, in each until the last that holds it has left."""
    configs = _configs(decoder)
    with _switch_lock:
        for config in configs:
            switch = _switches.setdefault(id(config), _Switch(config, config._attn_implementation))
            switch.holders += 1
            if switch.holders == 1:
                config._attn_implementation_internal = _SwitchedName.over(switch.before)
    try:
        yield
    finally:
        with _switch_lock:
            for config in configs:
                switch = _switches[id(config)]
                switch.holders -= 1
                if switch.holders == 0:
                    del _switches[id(config)]
                    config._attn_implementation_internal = switch.before


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
