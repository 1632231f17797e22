"""Every unit's suppression to first order: what it changes in each attention output, times the gradient there.

Suppression turns a row's weights p into w p / Σ w p, where w is what the factor of each key makes of its weight: c for
"log_additive", exp(s' − s) for the others. So the row's output o = Σ p v changes by exactly

    Δo = Σ (w − 1) p (v − o) / (1 + Σ (w − 1) p)

with sums over the keys of the unit; for one key that is removed, −p / (1 − p) · (v − o). What that does to the answer
is taken to first order: Δo · ∂ log p(answer) / ∂o, added up over rows, heads and layers. All units share one forward
and one backward pass. Weights are made again on the way back, for some rows of one layer at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from atman_kernels.errors import UnsupportedModelError
from atman_kernels.explain.methods import MethodContext, MethodOutcome
from atman_kernels.formula import wide_dtype
from atman_kernels.hf.attention.calls import AttentionCall
from atman_kernels.hf.attention.layers import LayerSelection
from atman_kernels.hf.attention.switch import Run
from atman_kernels.hf.attention.weights import RowBlock, by_group, grouped, noted, row_blocks
from atman_kernels.hf.forward.gradients import differentiable_run, differentiation, target_gradients
from atman_kernels.hf.models.ranks import Ranks, ranks_of
from atman_kernels.hf.models.sharding import has_heads_of_its_own
from atman_kernels.inputs.text_generation import CausalObjective

NOTHING_LEFT = 1e-6  # of a row's weight: its output is taken to vanish then
LARGEST_EXPONENT = 80.0


def linear(
    context: MethodContext,
    questions: Sequence[CausalObjective],
    *,
    whole_answer: bool = False,
    checkpointing: bool = False,
) -> MethodOutcome:
    """The rise of each target token's loss, in nats, with the attention to a unit turned down, to first order.

    Exact within an attention; what comes after it is linearised. Modes, factors, neighbours and layers are the
    explainer's, as for "atman", which it approximates at the cost of one forward and m backward passes (one for the
    whole answer), whatever the number of units.

    Args:
        whole_answer: one column, the sum of the m, in one backward pass.
        checkpointing: compute the layers again on the way back instead of keeping their activations.

    Raises:
        UnsupportedModelError: the model cannot be differentiated with its attention replaced.
    """
    found = [_linear(context, question, whole_answer, checkpointing) for question in questions]
    return MethodOutcome(
        scores=[scores for scores, _ in found],
        logprobs=[logprobs for _, logprobs in found],
        settings=context.suppression,
    )


def _linear(
    context: MethodContext, question: CausalObjective, whole_answer: bool, checkpointing: bool
) -> tuple[Tensor, Tensor]:
    """(n_units, m or 1) scores and (m,) log-probabilities, on the CPU."""
    how = context.perturbation
    ids = question.ids[:-1]
    ranks = ranks_of(context.model)
    run = _EffectsRun(context.factors(question)[:, : len(ids)], how.mode, LayerSelection(how.layers))
    differentiated = differentiation(context.model, checkpointing=checkpointing)
    with differentiated, run.installed(context.model), ranks.forward():
        forward = differentiable_run(context.model, ids, question.rows, question.targets)
        columns = []
        for _ in target_gradients(forward.logprobs, [forward.embeddings], whole_answer=whole_answer):
            columns.append(-run.collect(ranks))
    return torch.stack(columns, dim=1).cpu(), ranks.shared(forward.logprobs[0].detach().cpu())


class _EffectsRun(Run):
    """The model's attention by our op, and on the way back the sum of every unit's effects."""

    def __init__(self, factor: Tensor, mode: str, layers: LayerSelection) -> None:
        self.factor, self.mode, self.layers = factor, mode, layers
        self.touched = TouchedKeys.of(factor) if mode == "log_additive" else None
        self._effects: dict[bool, Tensor] = {}  # (n_units,), those of modules of which this rank has some heads apart

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        output = call.attend(None, self.mode)  # (1, T, Hq, Dv)
        if self.layers.index(module) not in self.layers:
            return output
        if call.query.shape[2] != call.key.shape[2] or call.key.shape[2] != self.factor.shape[1]:
            raise UnsupportedModelError(
                f"{type(module).__name__} attends to {call.key.shape[2]} keys where {self.factor.shape[1]} tokens were "
                'read: method "linear" needs one key for each'
            )
        return noted(output, call, partial(self._add, has_heads_of_its_own(module)))

    def _add(self, of_own_heads: bool, call: AttentionCall, output: Tensor, gradient: Tensor) -> None:
        effects = _effects(call, output, gradient, self.factor.to(output.device), self.touched, self.mode)
        before = self._effects.get(of_own_heads)
        self._effects[of_own_heads] = effects if before is None else before + effects.to(before.device)

    def collect(self, ranks: Ranks) -> Tensor:
        """(n_units,) of the backward pass that just ended; the next begins at 0."""
        nothing = self.factor.new_zeros(len(self.factor))
        whole, of_own_heads = (self._effects.pop(key, nothing) for key in (False, True))
        return ranks.shared(whole) + ranks.summed(of_own_heads).to(whole.device)


@dataclass(frozen=True)
class TouchedKeys:
    """The keys of units that have none in common: with them a block takes one pass, whatever the number of units.

    Attributes:
        key: (N,) ascending.
        unit: (N,) whose each is.
        change: (N,) w − 1.
        single: whether every unit has one key.
    """

    key: Tensor
    unit: Tensor
    change: Tensor
    single: bool

    @classmethod
    def of(cls, factor: Tensor) -> "TouchedKeys | None":
        """Of factors (n_units, S) on the CPU; None where two units have a key in common.

        Example:
            >>> TouchedKeys.of(torch.tensor([[1.0, 0.0, 1.0], [0.5, 1.0, 1.0]])).key.tolist()
            [0, 1]
            >>> TouchedKeys.of(torch.tensor([[0.0, 0.0], [0.5, 1.0]]))
        """
        key, unit = (factor != 1).T.nonzero().T
        if len(key.unique()) < len(key):
            return None
        return cls(key, unit, factor[unit, key] - 1, single=len(unit.unique()) == len(unit))

    def among(self, keys: slice, like: Tensor) -> "tuple[Tensor | slice, Tensor, Tensor]":
        """Of a block's keys: where they stand in it, whose they are, and w − 1 in the dtype of another tensor."""
        first, last = torch.searchsorted(self.key, torch.tensor([keys.start, keys.stop], device="cpu")).tolist()
        place, unit = self.key[first:last] - keys.start, self.unit[first:last].to(like.device)
        change = self.change[first:last].to(like)
        if last > first and int(place[-1] - place[0]) == last - first - 1:  # no gaps: a view will do
            return slice(int(place[0]), int(place[-1]) + 1), unit, change
        return place.to(like.device), unit, change


def _effects(
    call: AttentionCall, output: Tensor, gradient: Tensor, factor: Tensor, touched: TouchedKeys | None, mode: str
) -> Tensor:
    """(n_units,) Σ Δo · dO over rows and heads; output and gradient (1, T, Hq, Dv), factor (n_units, S)."""
    wide = wide_dtype(output.dtype)
    value = call.value[0].to(wide)  # [Hkv, S, Dv]
    output, gradient = (x[0].transpose(0, 1).to(wide) for x in (output, gradient))  # [Hq, T, Dv]
    factor = factor.to(wide)
    total = factor.new_zeros(len(factor), dtype=wide)
    for block in row_blocks(call):
        d_output = gradient[:, block.rows]
        at_output = (d_output * output[:, block.rows]).sum(-1, keepdim=True)  # [Hq, M, 1]
        gain = by_group(grouped(d_output, call), value[:, block.keys].mT).sub_(at_output)  # [Hq, M, N]
        gain = gain.mul_(block.weights)  # of the answer's log-prob with each weight
        if touched is not None:
            place, unit, change = touched.among(block.keys, gain)
            if len(unit) == 0:
                continue
            moved, left = gain[..., place] * change, block.weights[..., place] * change
            if not touched.single:
                moved, left = _by_unit(moved, unit, len(factor)), _by_unit(left, unit, len(factor))
                unit = torch.arange(len(factor), device=unit.device)
            total.index_add_(0, unit, _at_answer(moved, left.add_(1), at_output))
            continue
        own = factor[:, block.keys]
        if mode == "log_additive":
            moved, left = gain @ (own - 1).T, 1 + block.weights @ (own - 1).T  # [Hq, M, n_units]
        else:
            moved, left = _by_scores(block, gain, own, mode)
        total += _at_answer(moved, left, at_output)
    return total


def _at_answer(moved: Tensor, left: Tensor, at_output: Tensor) -> Tensor:
    """Δo · dO summed over heads and rows: (N,) for moved and left (Hq, M, N). What has no weight left has no output."""
    if float(left.amin()) > NOTHING_LEFT:
        return moved.div_(left).sum((0, 1))
    return torch.where(left > NOTHING_LEFT, moved / left.clamp_min(NOTHING_LEFT), -at_output).sum((0, 1))


def _by_unit(x: Tensor, unit: Tensor, n_units: int) -> Tensor:
    """(Hq, M, n_units) sums of x (Hq, M, N) over the keys of each unit."""
    by_key = x.movedim(-1, 0).contiguous()  # whole rows of memory are added up
    return x.new_zeros(n_units, *x.shape[:2]).index_add_(0, unit, by_key).movedim(0, -1)


def _by_scores(block: RowBlock, gain: Tensor, factor: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """The same where a key's weight changes with its score: one unit at a time, at the keys that it touches."""
    lowest = block.scores.masked_fill(~block.visible, torch.inf).amin(-1, keepdim=True)
    moved, left = gain.new_zeros(*gain.shape[:2], len(factor)), gain.new_ones(*gain.shape[:2], len(factor))
    for unit, own in enumerate(factor):
        keys = (own != 1).nonzero().flatten()
        height = block.scores[..., keys] if mode == "multiplicative" else block.scores[..., keys] - lowest
        change = ((own[keys] - 1) * height).clamp_max(LARGEST_EXPONENT).expm1()
        change = change.masked_fill(~block.visible.expand_as(block.scores)[..., keys], 0.0)
        moved[..., unit] = (gain[..., keys] * change).sum(-1)
        left[..., unit] += (block.weights[..., keys] * change).sum(-1)
    return moved, left
