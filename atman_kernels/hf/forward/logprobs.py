"""Forwards of an unmodified model that an explanation is made of: the base run, packed suffixes, full rows.

All return log-probabilities of given tokens at given rows, in float32 (float64 for float64 models), and none holds
logits for more than a few rows at once.
"""

import inspect
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as model_hooks
from transformers import PreTrainedModel

from atman_kernels import ops
from atman_kernels.errors import UnsupportedModelError
from atman_kernels.formula import window_visible
from atman_kernels.hf.attention.interface import (
    AttentionCall,
    Run,
    additive,
    computing_dtype,
    decoder_of,
    text_stack,
)
from atman_kernels.hf.attention.replacement import innermost_forward, is_replacement, replaced
from atman_kernels.hf.attention.scope import Scope
from atman_kernels.hf.attention.suppression import LayerSelection
from atman_kernels.hf.forward.sequence import (
    Embedded,
    Pictured,
    Sequence,
    reader_of,
    suffix_inputs,
    whole_inputs,
)
from atman_kernels.hf.images.vision import ImageTextRun
from atman_kernels.hf.models.packability import why_rows_do_not_mix, why_unpackable
from atman_kernels.pack import VariantPack

LOGITS_BYTES = 8 << 20  # float32 logits of one chunk of rows
WIDENED_ROWS = 512  # of a 16-bit head's weights at a time; larger pieces leave larger holes in the heap


class PackingUnsupportedError(RuntimeError):
    """A layer asked for something that a packed forward cannot give it."""


@dataclass(frozen=True, eq=False)
class Base:
    """K/V of unperturbed runs, layer by layer.

    Attributes:
        keys, values: by attention module, (Hkv, S, D|Dv); S runs over all prompts, one after the other.
        starts: where each prompt begins in S.
        patterns: by attention module, (1|Hq, L, L) over positions: 0 where a query sees a key, -inf where not. Only
            modules whose attention is more than causal have one: image blocks attend both ways.
        whole_lengths: of the prompts with their targets, where the K/V do not reach as far.
        by_position: whether some layer looks at the distance of query and key, by a window, a bias or a pattern.
    """

    keys: dict[nn.Module, Tensor]
    values: dict[nn.Module, Tensor]
    starts: tuple[int, ...]
    patterns: dict[nn.Module, Tensor] = field(default_factory=dict)
    whole_lengths: tuple[int, ...] | None = None
    by_position: bool = False

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of the prompts with their targets."""
        if self.whole_lengths is not None:
            return self.whole_lengths
        ends = (*self.starts[1:], next(iter(self.keys.values())).shape[1])
        return tuple(end - start for start, end in zip(self.starts, ends, strict=True))

    @classmethod
    def join(cls, bases: "list[Base]") -> "Base":
        if len(bases) == 1:
            return bases[0]
        if any(base.patterns for base in bases):
            raise PackingUnsupportedError("each of several prompts has an attention mask of its own")
        lengths = [next(iter(base.keys.values())).shape[1] for base in bases]
        starts = tuple(sum(lengths[:i]) for i in range(len(lengths)))
        modules = list(bases[0].keys)
        keys = {m: torch.cat([base.keys.pop(m) for base in bases], dim=1) for m in modules}
        values = {m: torch.cat([base.values.pop(m) for base in bases], dim=1) for m in modules}
        return cls(keys, values, starts, by_position=any(base.by_position for base in bases))

    def emptied(self, lengths: list[int]) -> "Base":
        """One with room for stretches of these lengths, all zero."""
        starts = tuple(sum(lengths[:i]) for i in range(len(lengths)))
        keys, values = (
            {m: x.new_zeros(x.shape[0], sum(lengths), x.shape[2]) for m, x in kept.items()}
            for kept in (self.keys, self.values)
        )
        return Base(keys, values, starts, whole_lengths=self.lengths, by_position=self.by_position)

    @property
    def bytes_per_key(self) -> int:
        """Of all layers."""
        kept = (*self.keys.values(), *self.values.values())
        return sum(x.shape[0] * x.shape[2] * x.element_size() for x in kept)

    def suffix_starts(self) -> Tensor | None:
        """(L + 1,) on the CPU: for every position the last one up to it at which a suffix may begin; None: anywhere.

        What comes before a suffix must not see it. A block that attends both ways is therefore never cut.
        """
        if not self.patterns:
            return None
        distinct = {id(pattern): pattern for pattern in self.patterns.values()}
        visible = torch.stack([(pattern > -math.inf).any(dim=0) for pattern in distinct.values()]).any(dim=0).cpu()
        positions = torch.arange(visible.shape[0] + 1, device="cpu")
        last = positions[-2] - visible.flip(1).byte().argmax(dim=1)  # argmax gives the first of equal maxima
        furthest = last.masked_fill(~visible.any(dim=1), 0).cummax(dim=0).values  # key seen by a row or any before it
        free = torch.cat([torch.tensor([True], device="cpu"), furthest < positions[1:]])
        return torch.where(free, positions, 0).cummax(dim=0).values


class _LayerStore:
    """One tensor per layer, all in one allocation: between a forward's temporaries they would leave holes."""

    def __init__(self, layers: int | None) -> None:
        self.tensors: dict[nn.Module, Tensor] = {}
        self._layers = layers or 1
        self._block: Tensor | None = None

    def add(self, module: nn.Module, tensor: Tensor) -> None:
        if self._block is None:
            self._block = tensor.new_empty(self._layers, *tensor.shape)
        index = len(self.tensors)
        fits = index < self._layers and tensor.shape == self._block.shape[1:] and tensor.device == self._block.device
        self.tensors[module] = self._block[index].copy_(tensor) if fits else tensor.contiguous()


class _CaptureRun(Run):
    """The model's own attention, recomputed by our op, with every layer's K/V kept."""

    def __init__(self, layers: int | None) -> None:
        self.keys = _LayerStore(layers)
        self.values = _LayerStore(layers)
        self.patterns: dict[nn.Module, Tensor] = {}
        self.by_position = False
        self._made: dict[tuple[int, bool, int | None], tuple[Tensor, Tensor | None]] = {}

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        if module in self.keys.tensors:
            raise PackingUnsupportedError(f"{type(module).__name__} attends more than once per forward")
        self.keys.add(module, call.key[0])
        self.values.add(module, call.value[0])
        pattern = self._pattern(call)
        if pattern is not None:
            self.patterns[module] = pattern
        if pattern is not None or call.sliding_window is not None or call.position_bias is not None:
            self.by_position = True
        return call.attend(None, "log_additive")

    def _pattern(self, call: AttentionCall) -> Tensor | None:
        """What a mask says beyond causality; one tensor for all layers that share the mask."""
        if call.mask is None:
            return None
        key = (id(call.mask), call.is_causal, call.sliding_window)
        if key not in self._made:
            self._made[key] = (call.mask, _beyond_causal(call))  # holding the mask keeps its id from being reused
        return self._made[key][1]


def _beyond_causal(call: AttentionCall) -> Tensor | None:
    """The mask of one whole sequence as (1|Hq, L, L); None if it is what causality and the window say already."""
    length = call.key.shape[2]
    positions = torch.arange(length, device=call.key.device)
    plain = window_visible(positions, positions, call.is_causal, call.sliding_window)
    assert call.mask is not None
    pattern = additive(call.mask)[0].expand(-1, length, length)
    if call.mask.shape[2] == 1:
        pattern = pattern.masked_fill(~plain, -math.inf)
    same = call.is_causal and bool((pattern[plain.expand_as(pattern)] == 0).all())
    if same and bool((pattern[~plain.expand_as(pattern)] == -math.inf).all()):
        return None
    return pattern


class _PackedRun(Run):
    """Each layer's rows attend to that layer's base K/V and to their own variant."""

    def __init__(self, base: Base, pack: VariantPack, factor: Tensor, mode: str, layers: Iterable[int] | None) -> None:
        self.base, self.pack, self.factor, self.mode = base, pack, factor, mode
        self.layers = LayerSelection(layers)
        self._grown: dict[int, Tensor] = {}

    def mask(self, **kwargs: Any) -> None:
        return None  # the pack says who sees whom

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        if module not in self.base.keys:
            raise PackingUnsupportedError(f"{type(module).__name__} was not called in the base run")
        pattern = self._pattern(module)
        if not (call.is_causal or pattern is not None):
            raise PackingUnsupportedError(f"{type(module).__name__} attends both ways")
        output = ops.packed_suppressed_attention(
            call.query[0],
            call.key[0],
            call.value[0],
            self.base.keys[module],
            self.base.values[module],
            self.pack,
            self.factor if module in self.layers else None,
            mode=self.mode,
            is_causal=pattern is None,
            scale=call.scale,
            sliding_window=call.sliding_window if pattern is None else None,  # the pattern holds it
            softcap=call.softcap,
            sinks=call.sinks,
            position_bias=self._position_bias(module, call, pattern),
        )
        return output.transpose(0, 1)[None]  # type: ignore[union-attr]

    def _pattern(self, module: nn.Module) -> Tensor | None:
        """The module's pattern, grown to the pack's longest variant: padding may reach further than a prompt."""
        pattern = self.base.patterns.get(module)
        if pattern is None:
            return None
        if id(pattern) not in self._grown:
            more = max(0, self.pack.longest - pattern.shape[-1])
            self._grown[id(pattern)] = nn.functional.pad(pattern, (0, more, 0, more))
        return self._grown[id(pattern)]

    def _position_bias(self, module: nn.Module, call: AttentionCall, pattern: Tensor | None) -> Tensor | None:
        """(1|Hq, 1|P, P) over absolute positions, P at least the pack's longest variant."""
        if call.position_bias is None:
            return pattern
        if call.key_bias is None or pattern is not None:
            raise PackingUnsupportedError(f"{type(module).__name__} attends with a position bias")
        longest = self.pack.longest
        if not call.key_bias.from_end:
            return call.key_bias.of_length(longest)
        lengths = self.base.lengths
        if self.mode == "multiplicative" and len(set(lengths)) > 1:
            raise PackingUnsupportedError(
                f"{type(module).__name__} counts positions from the end of each prompt, and those differ in length"
            )
        bias = call.key_bias.of_length(max(lengths))
        return nn.functional.pad(bias, (0, max(0, longest - bias.shape[-1])))  # padding may be longer than a prompt


class _GrowingRun(_PackedRun):
    """A packed run that leaves the K/V of its variants, each from the sequence's first key on, in another base."""

    def __init__(
        self,
        base: Base,
        pack: VariantPack,
        factor: Tensor,
        mode: str,
        layers: Iterable[int] | None,
        grown: Base,
        places: list[int],
        positions: list[Tensor],
    ) -> None:
        super().__init__(base, pack, factor, mode, layers)
        self.grown = grown
        device = pack.device
        prefixes, bases = pack.prefix_lengths.tolist(), pack.base_starts.tolist()
        spans = list(zip(places, prefixes, bases, strict=False))  # padding, the last variant, has no place
        self.reused = torch.cat([torch.arange(b, b + p, device="cpu") for _, p, b in spans]).to(device)
        self.reused_to = torch.cat([torch.arange(at, at + p, device="cpu") for at, p, _ in spans]).to(device)
        self.rows_to = torch.cat([at + own for at, own in zip(places, positions, strict=True)]).to(device)

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        output = super().attend(module, call)
        for own, base, grown in (
            (call.key[0], self.base.keys, self.grown.keys),
            (call.value[0], self.base.values, self.grown.values),
        ):
            grown[module].index_copy_(1, self.reused_to, base[module].index_select(1, self.reused))
            grown[module].index_copy_(1, self.rows_to, own[:, : len(self.rows_to)])
        return output


def own_logprobs(model: PreTrainedModel, ids: Sequence, rows: Tensor, targets: Tensor) -> Tensor:
    """Log-probs with the attention that the model came with; arguments as in `base_run`."""
    with Scope() as scope, _later_features(model, ids, scope):
        return logprobs_of(reader_of(model, ids), whole_inputs(ids), rows, targets[None])[0]


def base_run(model: PreTrainedModel, ids: Sequence, rows: Tensor, targets: Tensor) -> tuple[Base, Tensor]:
    """The unperturbed run over one sequence.

    Args:
        ids: (L,) token ids, or what stands for them.
        rows: (R,) rows whose next token is scored.
        targets: (R,) those tokens.

    Returns:
        its K/V, and the (R,) log-probs of the targets.

    Raises:
        UnsupportedModelError: no layer of the model reaches the attention function.
        PackingUnsupportedError: some do not, or the model is built so that parts of a sequence cannot stand alone.
    """
    layers = getattr(decoder_of(model).config, "num_hidden_layers", None)
    run = _CaptureRun(layers)
    with run.installed(model) as scope, _later_features(model, ids, scope):
        logprobs = logprobs_of(reader_of(model, ids), whole_inputs(ids), rows, targets[None])[0]
    captured = len(run.keys.tensors)
    if not captured:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be explained: a forward of it never called the attention function"
        )
    reason = why_unpackable(model)
    if reason is not None:
        raise PackingUnsupportedError(reason)
    if layers is not None and captured < layers:
        raise PackingUnsupportedError(
            f"only {captured} of {layers} layers of {type(model).__name__} are attention layers"
        )
    return Base(run.keys.tensors, run.values.tensors, (0,), run.patterns, by_position=run.by_position), logprobs


def packed_logprobs(
    model: PreTrainedModel,
    base: Base,
    pack: VariantPack,
    ids: Sequence,
    positions: Tensor,
    factor: Tensor,
    rows: Tensor,
    targets: Tensor,
    *,
    mode: str,
    layers: Iterable[int] | None = None,
) -> Tensor:
    """One forward over the suffixes of many variants.

    Args:
        ids: (T,) the suffixes' token ids, in the pack's order.
        positions: (T,) where they stand in their sequences: the pack's `row_position`, unless rows are left out.
        factor: (V, K) over the pack's positions.
        rows: (R,) rows of the pack whose next token is scored.
        targets: (R,) those tokens.

    Returns:
        (R,) log-probs.

    Raises:
        PackingUnsupportedError: a layer needs what a packed forward does not have.
    """
    inputs = suffix_inputs(ids, positions)
    run = _PackedRun(base, pack, factor, mode, layers)
    with run.installed(model) as scope, _later_features(model, ids, scope):
        return logprobs_of(reader_of(model, ids), inputs, rows, targets[None])[0]


def grow(
    model: PreTrainedModel,
    base: Base,
    pack: VariantPack,
    ids: Sequence,
    positions: list[Tensor],
    factor: Tensor,
    grown: Base,
    places: list[int],
    *,
    mode: str,
    layers: Iterable[int] | None = None,
) -> None:
    """One forward over stretches of variants, whose K/V are kept together with those that they go on from.

    Args:
        positions: per variant, where its rows stand in its sequence, on the CPU; the padding's last.
        grown: takes, for every variant, all K/V from position 0 to where the variant's rows end.
        places: per variant, where in `grown` its K/V begin.
        others: as in `packed_logprobs`.
    """
    inputs = suffix_inputs(ids, torch.cat(positions).to(pack.device))
    run = _GrowingRun(base, pack, factor, mode, layers, grown, places, positions[: len(places)])
    nothing = torch.zeros(1, dtype=torch.int64, device=pack.device)  # a model's forward ends with some logits
    with run.installed(model) as scope, _later_features(model, ids, scope):
        logprobs_of(reader_of(model, ids), inputs, nothing, nothing[None])


def full_row_logprobs(
    model: PreTrainedModel,
    ids: Sequence | Pictured,
    factor: Tensor,
    rows: Tensor,
    targets: Tensor,
    *,
    mode: str,
    layers: Iterable[int] | None = None,
) -> Tensor:
    """Every variant as a whole row of a batch: what packing replaces, and what serves where packing cannot.

    Args:
        ids: (L,) token ids, or what stands for them, the same for all variants. With images still to be seen, the
            vision encoder runs for every variant, suppressed likewise.
        factor: (V, L).
        rows, targets: (R,), the same for all variants.

    Returns:
        (V, R) log-probs.
    """
    variants = factor.shape[0]
    run = ImageTextRun(model, ids, factor, mode=mode, layers=layers)
    with run.installed(model) as scope, _later_features(model, ids, scope, variants):
        return logprobs_of(reader_of(model, ids), whole_inputs(ids, variants), rows, targets.expand(variants, -1))


def logprobs_of(model: PreTrainedModel, inputs: dict[str, Tensor], rows: Tensor, targets: Tensor) -> Tensor:
    """(B, R) log-probs of `targets` (B, R) at `rows` (R,) of every sequence in the batch.

    The model's own head makes the logits, a few rows at a time over one run of its layers.
    """
    vocabulary = int(getattr(text_stack(model).config, "vocab_size", 1 << 16))
    step = max(1, LOGITS_BYTES // (4 * vocabulary * targets.shape[0]))
    # a head whose rows depend on one another is given all of them, as in a forward of the user's
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters and why_rows_do_not_mix(model) is None
    if not keeps or _is_watched_outside_its_layers(model):
        step = max(1, len(rows))
    pieces = []
    with torch.inference_mode(), Scope() as scope, _layers_run_once(model, scope), head_in_float32(model, scope):
        for first in range(0, len(rows), step):
            chunk = rows[first : first + step]
            keep = {"logits_to_keep": chunk} if keeps else {}
            logits = model(**inputs, use_cache=False, return_dict=True, **keep).logits
            logits = logits if keeps else logits[:, chunk]
            pieces.append(_log_softmax_at(targets[:, first : first + step], logits))
    return torch.cat(pieces, dim=1)


def _is_watched_outside_its_layers(model: PreTrainedModel) -> bool:
    """Whether hooks would run as often as logits are made: they are to run once."""
    inside = {id(module) for child in model.base_model.children() for module in child.modules()}
    return any(has_hooks(module) for module in model.modules() if id(module) not in inside)


def has_hooks(module: nn.Module) -> bool:
    """Whether calls of a module run something of the user's, by hooks or by a forward put on the instance."""
    of_all = model_hooks._global_forward_hooks or model_hooks._global_forward_pre_hooks
    return bool(of_all or module._forward_hooks or module._forward_pre_hooks or is_rewritten(module))


def is_rewritten(module: nn.Module) -> bool:
    """Whether somebody has put a forward on the instance, other than accelerate, which only brings weights, and us."""
    own = module.__dict__.get("forward")
    return own is not None and "_old_forward" not in module.__dict__ and not is_replacement(own)


def _log_softmax_at(tokens: Tensor, logits: Tensor) -> Tensor:
    """(B, R) log-probs of `tokens` (B, R) under `logits` (B, R, vocabulary), which are used up: no second copy."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    highest = logits.amax(dim=-1, keepdim=True)
    chosen = logits.gather(-1, tokens[..., None]) - highest
    return (chosen - logits.sub_(highest).exp_().sum(dim=-1, keepdim=True).log()).squeeze(-1)


@contextmanager
def _layers_run_once(model: PreTrainedModel, scope: Scope) -> Iterator[None]:
    """Calls of `model` in the scope compute its layers once; later ones differ in their head's rows only."""
    body = model.base_model
    if body is model:
        yield
        return
    outputs: list[Any] = []

    def once(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not outputs:
            outputs.append(own(*args, **kwargs))
        return outputs[0]

    with replaced(body, scope, once):
        yield


@contextmanager
def _later_features(
    model: PreTrainedModel, sequence: Sequence | Pictured, scope: Scope, batch: int = 1
) -> Iterator[None]:
    """In the scope, the decoder is given what it adds after its first layers; see `Embedded.later`.

    The model itself makes these features from pixels, which a run over embeddings does not have.
    """
    if not isinstance(sequence, Embedded) or not sequence.later:
        yield
        return
    everywhere = torch.ones(batch, len(sequence), dtype=torch.bool, device=model.device)
    features = [rows.repeat(batch, 1) for rows in sequence.later]

    def with_features(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = {"visual_pos_masks": everywhere, "deepstack_visual_embeds": features}
        return own(*args, **kwargs | given)

    with replaced(decoder_of(model), scope, with_features):
        yield


@contextmanager
def head_in_float32(model: PreTrainedModel, scope: Scope) -> Iterator[None]:
    """The last product of a 16-bit model with float32 logits, in the scope.

    A logit of 20 is a multiple of 1/8 in bfloat16: rounding it would add more noise to a loss than all layers do.
    The weights are widened a few rows at a time. A head whose forward somebody else has replaced computes as it does;
    accelerate's hooks, which bring weights that lie elsewhere, stay in charge.
    """
    head = model.get_output_embeddings()
    is_16_bit = computing_dtype(model) in (torch.bfloat16, torch.float16)
    if type(head) is not nn.Linear or not is_16_bit or is_rewritten(head):
        yield
        return

    def wide(own: Callable[..., Any], hidden: Tensor) -> Tensor:
        if head.weight.is_meta:  # brought by something that wraps the weight's use, not this call
            return own(hidden)
        hidden = hidden.float()
        logits = hidden.new_empty(*hidden.shape[:-1], head.out_features)
        with torch.autocast(hidden.device.type, enabled=False):
            for first in range(0, head.out_features, WIDENED_ROWS):
                part = slice(first, first + WIDENED_ROWS)
                bias = None if head.bias is None else head.bias[part].float()
                logits[..., part] = nn.functional.linear(hidden, head.weight[part].float(), bias)
        return logits

    with replaced(head, scope, wide, innermost_forward(head)):
        yield


def check_loaded(model: nn.Module) -> None:
    """Raises UnsupportedModelError if weights are missing that nothing will bring when they are needed."""
    missing = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if missing is not None and not any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no weights: {missing} is on the meta device; load the model first, for "
            "example by from_pretrained"
        )


# those who explain a model take turns: what a forward may take of the memory, and whether dropout drops
_turns: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_turns_lock = threading.Lock()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, for one thread at a time; then every module is in the mode that it had."""
    check_loaded(model)
    with _turns_lock:
        turn = _turns.setdefault(model, threading.RLock())
    with turn:
        training = [module for module in model.modules() if module.training]
        if not training:
            yield
            return
        resting = [module for module in model.modules() if not module.training]
        model.eval()
        try:
            yield
        finally:
            model.train()  # what classes do beside the flag
            for module in training:
                module.training = True
            for module in resting:
                module.training = False
