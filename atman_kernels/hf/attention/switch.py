"""How a run reaches a model's attention: the interface name, the switch, and the state of installed runs.

transformers looks attention and mask functions up by name. Both are registered here under `NAME`, and a model is
switched to that name for as long as a `Run` is installed on it. The functions themselves do nothing of their own: they
find the run that owns the calling module and whose scope the caller is in, and hand the call over. A call without one,
such as another thread's, goes to what the model would have called under its own name.
"""

import inspect
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
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from atman_kernels.errors import InputError
from atman_kernels.hf.attention.calls import AttentionCall, call_of
from atman_kernels.hf.attention.masks import additive, compact_mask, only_chosen
from atman_kernels.hf.models.families import chooses_keys, families_in, handed_over
from atman_kernels.hf.models.parts import decoder_of, reachable
from atman_kernels.hf.scope import Scope

NAME = "atman"
AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


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
    run: Run
    scope: Scope
    modules: frozenset[int]  # ids of the modules that the run owns
    configs: frozenset[int]  # ids of the configs, by which mask functions know their model
    model_name: str
    mask_hides: bool = False  # the model takes True for hidden, and no mask for an error
    whole_masks: bool = False  # the model looks into its masks, or its modules do not say that they are causal


# runs of all threads, replaced as a whole whenever one comes or goes
_everywhere: tuple[_Active, ...] = ()
_everywhere_lock = threading.RLock()


# a compiled model would keep the run that was active when it was traced
@torch.compiler.disable  # type: ignore[untyped-decorator]
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
    if kwargs.get("dropout"):
        raise InputError(f"model must be in eval mode: {type(module).__name__} asks for attention dropout")
    call = call_of(module, query, key, value, attention_mask, kwargs)
    return active.run.attend(module, call).contiguous(), None  # some callers take a view of it


def _own_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """What the module computes under the name that its config had, or has."""
    name = own_name(getattr(module, "config", None))
    if kwargs.get("indices") is not None and name in ("eager", "sdpa"):  # models merge these themselves for the two
        visible = only_chosen(mask, kwargs["indices"], key.shape[2])
        mask = visible if name == "sdpa" else additive(visible).to(query.dtype)
    if name in (None, "eager"):
        return _eager_of(module)(module, query, key, value, mask, **kwargs)
    function: AttentionFunction
    if name != NAME:
        function = ALL_ATTENTION_FUNCTIONS[name]
    elif kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
        function = sdpa_attention_forward  # chosen by the user
    else:
        function = _without_factors  # what SDPA cannot do
    return function(module, query, key, value, mask, **kwargs)


def _eager_of(module: nn.Module) -> AttentionFunction:
    """The eager attention function that the module's forward names; our op without factors if it names none."""
    forward = inspect.unwrap(type(module).forward)
    names = [name for name in forward.__code__.co_names if name.endswith("eager_attention_forward")]
    return forward.__globals__[names[0]] if len(names) == 1 else _without_factors


def _without_factors(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    return call_of(module, query, key, value, mask, kwargs).attend(None, "log_additive"), None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def mask(*, config: Any = None, **kwargs: Any) -> Tensor | None:
    """The mask function that transformers calls; a bool mask (True = visible) or None."""
    active = next((a for a in reversed(_everywhere) if id(config) in a.configs and a.scope.holds()), None)
    if active is None:
        name = own_name(config)
        function = sdpa_mask if name in (None, NAME) else ALL_MASK_ATTENTION_FUNCTIONS.get(name)
        return None if function is None else function(config=config, **kwargs)
    visible = active.run.mask(config=config, whole=active.whole_masks, **kwargs)
    if not active.mask_hides:
        return visible
    if visible is None:
        return torch.zeros(1, 1, 1, kwargs["kv_length"], dtype=torch.bool, device=kwargs.get("device"))
    return ~visible


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)


def _active_on(decoder: PreTrainedModel, run: Run, scope: Scope, model_name: str) -> _Active:
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
