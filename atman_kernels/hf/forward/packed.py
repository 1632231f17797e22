"""Packed forwards: suffixes of many variants in one sequence, on the K/V of a base."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atman_kernels import ops
from atman_kernels.hf.attention.calls import AttentionCall
from atman_kernels.hf.attention.layers import LayerSelection
from atman_kernels.hf.attention.switch import Run
from atman_kernels.hf.forward.base import Base, PackingUnsupportedError
from atman_kernels.hf.forward.logprobs import input_logprobs
from atman_kernels.hf.models.model_input import ModelInput, suffix_inputs
from atman_kernels.hf.models.placement import PerDevice
from atman_kernels.pack import VariantPack


class _PackedRun(Run):
    """Each layer's rows attend to that layer's base K/V and to their own variant."""

    def __init__(self, base: Base, pack: VariantPack, factor: Tensor, mode: str, layers: Iterable[int] | None) -> None:
        self.base, self.pack, self.mode = base, pack, mode
        self.layers = LayerSelection(layers)
        self._on = PerDevice(lambda device: (pack.to(device), factor.to(device)))
        self._grown: dict[int, Tensor] = {}

    def mask(self, **kwargs: Any) -> None:
        return None  # the pack says who sees whom

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        if module not in self.base.keys:
            raise PackingUnsupportedError(f"{type(module).__name__} was not called in the base run")
        pattern = self._pattern(module)
        if not (call.is_causal or pattern is not None):
            raise PackingUnsupportedError(f"{type(module).__name__} attends both ways")
        pack, factor = self._on[call.query.device]
        output = ops.packed_suppressed_attention(
            call.query[0],
            call.key[0],
            call.value[0],
            self.base.keys[module],
            self.base.values[module],
            pack,
            factor if module in self.layers else None,
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
        prefixes, bases = pack.prefix_lengths.tolist(), pack.base_starts.tolist()
        spans = list(zip(places, prefixes, bases, strict=False))  # padding, the last variant, has no place
        reused = torch.cat([torch.arange(b, b + p, device="cpu") for _, p, b in spans])
        reused_to = torch.cat([torch.arange(at, at + p, device="cpu") for at, p, _ in spans])
        rows_to = torch.cat([at + own for at, own in zip(places, positions, strict=True)])
        self._moves = PerDevice(lambda device: tuple(x.to(device) for x in (reused, reused_to, rows_to)))

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        output = super().attend(module, call)
        reused, reused_to, rows_to = self._moves[call.query.device]
        for own, base, grown in (
            (call.key[0], self.base.keys, self.grown.keys),
            (call.value[0], self.base.values, self.grown.values),
        ):
            grown[module].index_copy_(1, reused_to, base[module].index_select(1, reused))
            grown[module].index_copy_(1, rows_to, own[:, : len(rows_to)])
        return output


def packed_logprobs(
    model: PreTrainedModel,
    base: Base,
    pack: VariantPack,
    ids: ModelInput,
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
    with run.installed(model) as scope:
        return input_logprobs(model, ids, inputs, rows, targets[None], scope)[0]


def grow(
    model: PreTrainedModel,
    base: Base,
    pack: VariantPack,
    ids: ModelInput,
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
    with run.installed(model) as scope:
        input_logprobs(model, ids, inputs, nothing, nothing[None], scope)
