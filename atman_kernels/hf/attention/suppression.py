"""`suppress`: any forward of an unmodified model, `generate` included, with the attention to some keys changed."""

import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atman_kernels.arguments import choice, entries, integer, shown
from atman_kernels.errors import InputError, UnsupportedModelError
from atman_kernels.formula import MODES
from atman_kernels.hf.attention.interface import (
    AttentionCall,
    Run,
    compact_mask,
    decoder_of,
    is_under_a_run,
    text_stack,
)
from atman_kernels.hf.attention.positional import Factors, LayerFactors, Queries, checked_queries
from atman_kernels.hf.attention.replacement import observed, replaced
from atman_kernels.hf.attention.scope import Scope, entering_frame
from atman_kernels.hf.forward.recomputation import Recomputations
from atman_kernels.hf.models.wrapped import unwrapped

Attention = Literal["self", "cross", "both"]
# under these names a module is handed the states of the encoder
_OTHER_STATES = ("key_value_states", "encoder_hidden_states")


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model has an encoder and a decoder that attends to it."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def encoder_of(model: nn.Module) -> nn.Module:
    """The encoder of an encoder-decoder model."""
    assert isinstance(model, PreTrainedModel)
    return model.get_encoder()


@contextmanager
def suppress(
    model: nn.Module,
    factor: Factors,
    *,
    mode: str = "log_additive",
    layers: Iterable[int] | None = None,
    queries: Queries = None,
    value_factor: Factors = None,
    attention: Attention = "both",
    backend: str | None = None,
) -> Iterator[None]:
    """Scale the attention to some tokens in every forward of `model` inside the context.

    Args:
        model: a transformers model, compiled by torch or not, with peft's adapters in its layers or not; it is used as
            it is, and is as before when the context ends. Compiled code leaves its graph for the attention meanwhile,
            so `fullgraph=True` fails.
        factor: (B, L) or (B, Hq, L) over key positions, finite and >= 0; 1 leaves a token alone, 0 removes it in
            "log_additive" mode. Positions are those of the (padded) input; later keys, such as those that `generate`
            adds, count as 1. With beams or several returned sequences each row serves all of its copies. A mapping
            {layer: tensor} acts on its layers only, on each with its own factors. None leaves all scores alone.
        mode: see `atman_kernels.suppressed_attention`.
        layers: indices of the layers to act on, the model's own (`layer_idx`) where it counts them; None for all.
        queries: the positions whose attention is changed, counted like those of the keys: (start, end), where end
            may be None for all that follows, or a bool tensor (L,) or (B, L), whose end ends the change. None: all.
        value_factor: what each key's value vector is scaled by after the softmax, which is not normalised again;
            shapes, positions and mappings as for `factor`. 0 is value zeroing.
        attention: of an encoder-decoder model, which attention to the source is changed: the encoder's
            "self"-attention, the decoder's "cross"-attention, or "both". Positions of `factor` are then those of the
            encoder, layers are counted in each stack, and the decoder's attention to its own tokens stays as it is.
            `queries` cannot be chosen there. Other models have "self"-attention alone.
        backend: see `atman_kernels.suppressed_attention`.

    Raises:
        InputError: an argument does not fit, or the model is under another suppression already.
        UnsupportedModelError: the model's attention cannot be reached. If that shows only when a forward did not
            come by, the error is raised by that forward.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8,
        ...                          num_hidden_layers=1, num_attention_heads=2)).eval()
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> with suppress(model, torch.tensor([[1.0, 0.0, 1.0]])):
        ...     without_token_1 = model(ids).logits[0, -1]
        >>> with suppress(model, {0: torch.tensor([[0.0]])}, queries=(2, None)):
        ...     last_token_does_not_see_token_0 = model(ids).logits[0, -1]
    """
    options: dict[str, Any] = {"mode": mode, "layers": layers, "queries": queries, "value_factor": value_factor}
    with suppressed(model, factor, attention=attention, backend=backend, **options):
        yield


@contextmanager
def suppressed(
    model: nn.Module,
    factor: Factors,
    *,
    mode: str,
    layers: Iterable[int] | None,
    queries: Queries = None,
    value_factor: Factors = None,
    attention: Attention = "both",
    backend: str | None = None,
) -> Iterator[Scope]:
    """`suppress`, which tells whose calls it acts on: those of the block around which this is entered."""
    model = unwrapped(model)
    part = _part_of(model, attention, queries)
    for name, factors in (("factor", factor), ("value_factor", value_factor)):
        if isinstance(factors, Mapping):
            if layers is not None:
                raise InputError(f"layers must be left out where {name} is a mapping, whose keys are the layers")
            checked_layers(model, list(factors), f"the keys of {name}")
    options: dict[str, Any] = {
        "mode": mode,
        "layers": checked_layers(model, layers),
        "queries": queries,
        "value_factor": value_factor,
        "backend": backend,
    }
    is_both = is_encoder_decoder(model)
    run = SourceRun(part, factor, attention=attention, **options) if is_both else SuppressedRun(factor, **options)

    scope = Scope(entering_frame())
    recomputations = Recomputations(part, scope, partial(run.reinstalled, part))
    run.computing = recomputations.note

    @torch.compiler.disable
    def check_reached(module: nn.Module, args: Any, output: Any) -> None:
        run.forget_offsets()
        if not scope.holds():  # another thread's forward, perhaps with a suppression of its own
            if not is_under_a_run(part):
                scope.warn_if_lost(type(model).__name__)
        elif not run.reached:
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be suppressed: a forward of it never called the attention function"
                + (f" for attention={attention!r}" if is_both else "")
            )

    with ExitStack() as stack:
        stack.enter_context(run.installed(model, part, scope))
        stack.enter_context(observed(part, check_reached))
        stack.enter_context(recomputations.watched())
        yield scope


def _part_of(model: nn.Module, attention: Attention, queries: Queries) -> PreTrainedModel:
    """Whose attention is changed: an encoder-decoder's as a whole, otherwise the decoder's."""
    if attention not in get_args(Attention):
        raise InputError(f'attention must be "self", "cross" or "both", got {attention!r}')
    decoder = decoder_of(model)
    assert isinstance(model, PreTrainedModel)
    if not is_encoder_decoder(model):
        if attention == "cross":
            raise InputError(f'attention is "cross", but {type(model).__name__} is no encoder-decoder model')
        return decoder
    if queries is not None:
        raise InputError(f"queries must be None for {type(model).__name__}, which has those of two stacks")
    return model


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
        self._forward = _ForwardState()

    def mask(self, **kwargs: Any) -> Tensor | None:
        # a static cache counts on the device, in a tensor that it changes: read only where it is needed, and now
        first_query = 0 if self.queries is None else int(kwargs.get("q_offset", 0))
        self._forward.offsets[kwargs["q_length"], kwargs["kv_length"]] = first_query, int(kwargs.get("kv_offset", 0))
        return compact_mask(**kwargs)

    def forget_offsets(self) -> None:
        """A forward that brings its own mask must not be taken for the one before."""
        self._forward.offsets.clear()

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
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
            call = _with_scaled_values(call, value_factors.at(batch, first, keys, device))
        return call, None if factors is None else factors.at(batch, first, keys, device)

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


class LayerSelection:
    """Attention layers by the index that they have in the model, or else by the order in which the model calls them."""

    def __init__(self, layers: Iterable[int] | None) -> None:
        self._wanted = None if layers is None else frozenset(layers)
        self._called: dict[int, int] = {}
        self._lock = threading.Lock()

    def index(self, module: nn.Module) -> int:
        own = getattr(module, "layer_idx", None)  # where layers lie on several machines, each calls only some
        if isinstance(own, int):
            return own
        with self._lock:
            return self._called.setdefault(id(module), len(self._called))

    def __contains__(self, layer: nn.Module | int) -> bool:
        if self._wanted is None:
            return True
        return (layer if isinstance(layer, int) else self.index(layer)) in self._wanted


def checked_layers(model: nn.Module, layers: Iterable[int] | None, name: str = "layers") -> tuple[int, ...] | None:
    """The layers as a tuple.

    Raises:
        InputError: there are none, or one of them is no index of a layer of the model.
    """
    if layers is None:
        return None
    assert isinstance(model, PreTrainedModel)
    count = int(getattr(text_stack(model).config, "num_hidden_layers", sys.maxsize))
    if is_encoder_decoder(model):  # BART's stacks share one config, T5's do not
        count = max(count, *(int(getattr(model.config, f"{stack}_layers", 0)) for stack in ("encoder", "decoder")))
        count = max(count, int(getattr(encoder_of(model).config, "num_hidden_layers", 0)))
    given = entries(layers, name, "layer indices")
    try:
        wanted = tuple(integer(x, name, least=0, most=count - 1) for x in given)
    except InputError:
        wanted = ()
    if not wanted:
        raise InputError(f"{name} must be indices in [0, {count}), got {shown(given)}")
    return wanted
