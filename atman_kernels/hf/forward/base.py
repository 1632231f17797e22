"""The unperturbed run over one sequence: its log-probabilities, and the K/V that packs go on from."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atman_kernels.errors import UnsupportedModelError
from atman_kernels.formula import window_visible
from atman_kernels.hf.attention.calls import AttentionCall
from atman_kernels.hf.attention.masks import additive
from atman_kernels.hf.attention.switch import Run
from atman_kernels.hf.forward.logprobs import input_logprobs
from atman_kernels.hf.models.model_input import ModelInput, whole_inputs
from atman_kernels.hf.models.packability import why_unpackable
from atman_kernels.hf.models.parts import decoder_of
from atman_kernels.hf.models.placement import devices_of
from atman_kernels.hf.models.ranks import Ranks, ranks_of
from atman_kernels.hf.scope import Scope


class PackingUnsupportedError(RuntimeError):
    """A layer asked for something that a packed forward cannot give it."""


@dataclass(frozen=True, eq=False)
class Base:
    """K/V of unperturbed runs, layer by layer.

    Attributes:
        keys, values: by attention module, (Hkv, S, D|Dv); S runs over all prompts, one after the other.
        starts: where each prompt begins in S.
        patterns: by attention module, (1|Hq, L, L) over positions: 0 where a query sees a key, -inf where not. Only
            modules whose attention is more than causal have one: image blocks are bidirectional.
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

        What comes before a suffix must not see it. A bidirectional block is therefore never cut.
        """
        if not self.patterns:
            return None
        distinct = {id(pattern): pattern for pattern in self.patterns.values()}
        # of layers on several devices
        visible = torch.stack([(pattern > -math.inf).any(dim=0).cpu() for pattern in distinct.values()]).any(dim=0)
        positions = torch.arange(visible.shape[0] + 1, device="cpu")
        last = positions[-2] - visible.flip(1).byte().argmax(dim=1)  # argmax gives the first of equal maxima
        furthest = last.masked_fill(~visible.any(dim=1), 0).cummax(dim=0).values  # key seen by a row or any before it
        free = torch.cat([torch.tensor([True], device="cpu"), furthest < positions[1:]])
        return torch.where(free, positions, 0).cummax(dim=0).values


def join_and_clear(bases: list[Base]) -> Base:
    """Bases of one prompt each as one of all of them.

    Takes the list over, which is empty afterwards: where nobody else holds the bases, their K/V go as they are copied.

    Raises:
        PackingUnsupportedError: one of several prompts has an attention mask of its own.
    """
    if len(bases) > 1 and any(base.patterns for base in bases):
        raise PackingUnsupportedError("each of several prompts has an attention mask of its own")
    if len(bases) == 1:
        return bases.pop()
    lengths = [next(iter(base.keys.values())).shape[1] for base in bases]
    starts = tuple(sum(lengths[:i]) for i in range(len(lengths)))
    by_position = any(base.by_position for base in bases)
    keys, values = [dict(base.keys) for base in bases], [dict(base.values) for base in bases]
    bases.clear()
    modules = list(keys[0])
    return Base(
        {m: torch.cat([own.pop(m) for own in keys], dim=1) for m in modules},
        {m: torch.cat([own.pop(m) for own in values], dim=1) for m in modules},
        starts,
        by_position=by_position,
    )


class _LayerStore:
    """One tensor per layer, all in one allocation: between a forward's temporaries they would leave holes.

    Args:
        layers: how many; None where that is not known, or their devices are several: then each has its own.
    """

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
        self._made: list[tuple[Tensor, bool, int | None, Tensor | None]] = []  # of which masks, and the patterns

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
        for mask, *around, pattern in self._made:
            if around == [call.is_causal, call.sliding_window] and _same(mask, call.mask):
                return pattern
        pattern = _beyond_causal(call)
        self._made.append((call.mask, call.is_causal, call.sliding_window, pattern))
        return pattern


def _same(mask: Tensor, other: Tensor) -> bool:
    """Whether two masks are one. Each layer gets a copy of its own where the layers are on several devices."""
    if mask is other:
        return True
    alike = (mask.device, mask.dtype, mask.shape) == (other.device, other.dtype, other.shape)
    return alike and torch.equal(mask, other)


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


def own_logprobs(model: PreTrainedModel, ids: ModelInput, rows: Tensor, targets: Tensor) -> Tensor:
    """Log-probs with the attention that the model came with; arguments as in `base_run`."""
    with Scope() as scope:
        return input_logprobs(model, ids, whole_inputs(ids), rows, targets[None], scope)[0]


def base_run(model: PreTrainedModel, ids: ModelInput, rows: Tensor, targets: Tensor) -> tuple[Base, Tensor]:
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
    ranks = ranks_of(model)
    layers = ranks.layers_of(decoder_of(model))
    run = _CaptureRun(layers if len(devices_of(model)) == 1 else None)
    with run.installed(model) as scope:
        logprobs = input_logprobs(model, ids, whole_inputs(ids), rows, targets[None], scope)[0]
    captured = len(run.keys.tensors)
    if not captured:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be explained: a forward of it never called the attention function"
        )
    reason = why_unpackable(model)
    if reason is None and layers is not None and captured < layers:
        reason = f"only {captured} of {layers} layers of {type(model).__name__} are attention layers"
    if reason is None and ranks.stage is not None and run.patterns:
        reason = f"layers of {type(model).__name__}, on several stages, have attention masks of their own"
    by_position = _agreed(ranks, reason, run.by_position)
    return Base(run.keys.tensors, run.values.tensors, (0,), run.patterns, by_position=by_position), logprobs


def _agreed(ranks: Ranks, reason: str | None, by_position: bool) -> bool:
    """Whether layers of any rank look at distances.

    Raises:
        PackingUnsupportedError: some rank has a reason not to pack.
    """
    said = ranks.gathered("a base run", (reason, by_position))
    for theirs, _ in said:
        if theirs is not None:
            raise PackingUnsupportedError(theirs)
    return any(theirs for _, theirs in said)
