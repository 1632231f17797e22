"""Methods of a model's modules that compute something else for whoever is inside a scope, and for nobody else.

A replacement lives on the module's instance while somebody needs it. Calls from outside its scopes, such as another
thread's, go to the module's own method; so do calls that come when everybody has left. The instance's `__dict__` is
then what it was, and a copy of a module that is made meanwhile has none of it.
"""

import functools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules import module as model_hooks

from atman_kernels.hf.scope import Scope

# (what the module would compute otherwise, *arguments of the method) -> what the method returns
Compute = Callable[..., Any]

_REDUCE = "__reduce_ex__"  # which copy.deepcopy and pickle look up on the instance
_ABSENT: Any = object()
_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


@contextmanager
def replaced(module: nn.Module, scope: Scope, compute: Compute, name: str = "forward") -> Iterator[None]:
    """Inside, `module.<name>` is `compute` for callers in the scope; of several, the newest is asked first."""
    claim = (scope, compute)
    with _lock:
        method = _site_of(module).put(name, lambda: _Method(getattr(module, name)))
        method.claims = (*method.claims, claim)
    try:
        yield
    finally:
        with _lock:
            method.claims = tuple(other for other in method.claims if other is not claim)
            _site_of(module).take_back(name)


@contextmanager
def overlaid(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Inside, `module.<name>` is the value that the first of several gave it, for everybody."""
    with _lock:
        _site_of(module).put(name, lambda: value)
    try:
        yield
    finally:
        with _lock:
            _site_of(module).take_back(name)


@contextmanager
def observed(module: nn.Module, hook: Callable[[nn.Module, Any, Any], None]) -> Iterator[None]:
    """Inside, a forward hook, which no copy of the module gets."""
    with _lock:
        handle = module.register_forward_hook(hook)
        _site_of(module).hooks.append(handle.id)
    try:
        yield
    finally:
        with _lock:
            handle.remove()
            _site_of(module).hooks.remove(handle.id)
            _site_of(module).leave_if_empty()


def innermost_forward(module: nn.Module) -> str:
    """The name of what accelerate's hook wraps, which stays in charge, or plain "forward"."""
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


def is_replacement(method: Any) -> bool:
    """Whether it is what `replaced` puts on an instance."""
    return isinstance(method, _Method)


def has_hooks(module: nn.Module) -> bool:
    """Whether calls of a module run something of the user's, by hooks or by a forward put on the instance."""
    of_all = model_hooks._global_forward_hooks or model_hooks._global_forward_pre_hooks
    return bool(of_all or module._forward_hooks or module._forward_pre_hooks or is_rewritten(module))


def is_rewritten(module: nn.Module) -> bool:
    """Whether somebody has put a forward on the instance, other than us.

    accelerate does, which only brings weights, and transformers, which deals modules out to several processes.
    """
    own = module.__dict__.get("forward")
    if own is None or "_old_forward" in module.__dict__ or is_replacement(own):
        return False
    return not getattr(own, "__globals__", {}).get("__name__", "").startswith("transformers.")


class _Method:
    """What stands in place of a method."""

    def __init__(self, own: Callable[..., Any]) -> None:
        self._own = own
        self.claims: tuple[tuple[Scope, Compute], ...] = ()
        functools.update_wrapper(self, own)  # transformers asks for the signature of forwards

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._asked(self.claims, *args, **kwargs)

    def _asked(self, claims: tuple[tuple[Scope, Compute], ...], /, *args: Any, **kwargs: Any) -> Any:
        for index in range(len(claims) - 1, -1, -1):
            scope, compute = claims[index]
            if scope.holds():
                return compute(functools.partial(self._asked, claims[:index]), *args, **kwargs)
        return self._own(*args, **kwargs)


class _Put:
    """Something in an instance's `__dict__`, what was there before, and how many need it."""

    def __init__(self, value: Any, before: Any) -> None:
        self.value, self.before, self.holders = value, before, 0


class _Site:
    """A module with something on its instance that is to go again."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self.puts: dict[str, _Put] = {}
        self.hooks: list[int] = []
        self.put(_REDUCE, lambda: self._reduced)

    def put(self, name: str, make: Callable[[], Any]) -> Any:
        """What stands under the name, made if nothing of ours does."""
        put = self.puts.get(name)
        if put is None:
            instance = self._instance
            put = self.puts[name] = _Put(make(), instance.get(name, _ABSENT))
            instance[name] = put.value
        put.holders += 1
        return put.value

    def take_back(self, name: str) -> None:
        put = self.puts[name]
        put.holders -= 1
        if put.holders:
            return
        del self.puts[name]
        if self._instance.get(name) is put.value:  # else wrapped by somebody, for whom it goes on as the module's own
            _restore(self._instance, name, put.before)
        if name != _REDUCE:
            self.leave_if_empty()

    def leave_if_empty(self) -> None:
        if self.puts.keys() == {_REDUCE} and not self.hooks:
            self.take_back(_REDUCE)
            module = self._module()
            if module is not None:
                _sites.pop(module, None)

    @property
    def _instance(self) -> dict[str, Any]:
        module = self._module()
        return {} if module is None else module.__dict__

    def _reduced(self, protocol: Any) -> Any:
        """What the module's class makes of it, less what is here for the time being."""
        module = self._module()
        kind: Any = type(module)
        with _lock:
            made = kind.__reduce_ex__(module, protocol)
            if len(made) < 3 or not isinstance(made[2], dict):
                return made
            state = dict(made[2])
            for name, put in self.puts.items():
                if state.get(name) is put.value:
                    _restore(state, name, put.before)
            for kept in _HOOKS:
                state[kept] = OrderedDict((i, hook) for i, hook in state[kept].items() if i not in self.hooks)
        return (*made[:2], state, *made[3:])


def _restore(instance: dict[str, Any], name: str, before: Any) -> None:
    if before is _ABSENT:
        instance.pop(name, None)
    else:
        instance[name] = before


_sites: weakref.WeakKeyDictionary[nn.Module, _Site] = weakref.WeakKeyDictionary()
_lock = threading.RLock()  # a garbage collection inside it may leave a scope


def _site_of(module: nn.Module) -> _Site:
    site = _sites.get(module)
    if site is None:
        site = _sites[module] = _Site(module)
    return site
