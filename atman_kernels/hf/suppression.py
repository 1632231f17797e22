"""`suppress`: any forward of an unmodified model, `generate` included, with some keys turned down."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from atman_kernels.errors import InputError, UnsupportedModelError
from atman_kernels.formula import MODES
from atman_kernels.hf.interface import AttentionCall, activate, compact_mask, decoder_of, is_active


@contextmanager
def suppress(
    model: nn.Module,
    factor: Tensor | None,
    *,
    mode: str = "log_additive",
    layers: Iterable[int] | None = None,
    backend: str | None = None,
) -> Iterator[None]:
    """Scale the attention to some tokens in every forward of `model` inside the context.

    Args:
        model: a transformers model; it is used as it is, and is as before when the context ends.
        factor: (B, L) or (B, Hq, L) over key positions, finite and >= 0; 1 leaves a token alone, 0 removes it in
            "log_additive" mode. Positions are those of the (padded) input; later keys, such as those that `generate`
            adds, count as 1. With beams or several returned sequences each row serves all of its copies. None
            runs the model through the same attention without suppression.
        mode: see `atman_kernels.suppressed_attention`.
        layers: indices of the attention layers to act on, in the order in which the model calls them; None for all.
        backend: see `atman_kernels.suppressed_attention`.

    Raises:
        InputError: factor, mode or layers do not fit, or the model is under another suppression already.
        UnsupportedModelError: the model's attention cannot be reached. If that shows only when a forward did not
            come by, the error is raised by that forward.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8,
        ...                          num_hidden_layers=1, num_attention_heads=2)).eval()
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> with suppress(model, torch.tensor([[1.0, 0.0, 1.0]])):
        ...     without_token_1 = model(ids).logits[0, -1]
    """
    decoder = decoder_of(model)
    run = SuppressedRun(factor, mode=mode, layers=checked_layers(model, layers), backend=backend)

    def check_reached(module: nn.Module, args: Any, output: Any) -> None:
        if is_active(run) and not run.reached:  # not another thread's forward
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be suppressed: a forward of it never called the attention function"
            )

    with activate(model, run):
        hook = decoder.register_forward_hook(check_reached)
        try:
            yield
        finally:
            hook.remove()


class SuppressedRun:
    """Dense attention under one factor tensor, layer by layer."""

    def __init__(
        self,
        factor: Tensor | None,
        *,
        mode: str = "log_additive",
        layers: Iterable[int] | None = None,
        backend: str | None = None,
    ) -> None:
        if mode not in MODES:
            raise InputError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
        self.factor = None if factor is None else checked_factor(factor)
        self.mode = mode
        self.layers = LayerSelection(layers)
        self.backend = backend
        self.reached = False
        # where the keys of a call begin, by (queries, keys); a sliding cache drops its oldest keys
        self._key_offsets: dict[tuple[int, int], int] = {}
        self._expanded: dict[tuple[Any, ...], Tensor] = {}

    def mask(self, **kwargs: Any) -> Tensor | None:
        self._key_offsets[kwargs["q_length"], kwargs["kv_length"]] = int(kwargs.get("kv_offset", 0))
        return compact_mask(**kwargs)

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        self.reached = True
        factor = self._factor_for(call) if module in self.layers else None
        return call.attend(factor, self.mode, self.backend)

    def _factor_for(self, call: AttentionCall) -> Tensor | None:
        """The rows and keys of this call; the same tensor for all layers of a forward."""
        if self.factor is None:
            return None
        batch, keys, device = call.query.shape[0], call.key.shape[2], call.query.device
        offset = self._key_offsets.get((call.query.shape[2], keys), 0)
        wanted = (batch, keys, device, offset)
        if wanted not in self._expanded:
            rows = self.factor.shape[0]
            if batch % rows:
                raise InputError(f"factor has {rows} rows, which does not divide the model's batch of {batch}")
            fitted = self.factor[..., offset : offset + keys].to(device).repeat_interleave(batch // rows, dim=0)
            self._expanded = {wanted: torch.nn.functional.pad(fitted, (0, keys - fitted.shape[-1]), value=1.0)}
        return self._expanded[wanted]


class LayerSelection:
    """Attention layers by index, in the order in which the model calls them."""

    def __init__(self, layers: Iterable[int] | None) -> None:
        self._wanted = None if layers is None else frozenset(layers)
        self._index: dict[int, int] = {}

    def __contains__(self, module: nn.Module) -> bool:
        index = self._index.setdefault(id(module), len(self._index))
        return self._wanted is None or index in self._wanted


def checked_layers(model: nn.Module, layers: Iterable[int] | None) -> tuple[int, ...] | None:
    """The layers as a tuple.

    Raises:
        InputError: there are none, or one of them is no index of a layer of the model.
    """
    if layers is None:
        return None
    wanted = tuple(layers)
    count = int(getattr(decoder_of(model).config, "num_hidden_layers", sys.maxsize))
    if not wanted or not all(isinstance(x, int) and 0 <= x < count for x in wanted):
        raise InputError(f"layers must be indices in [0, {count}), got {list(wanted)}")
    return wanted


def checked_factor(factor: Tensor) -> Tensor:
    """The factor as float32.

    Raises:
        InputError: it is not a floating point tensor (B, L) or (B, Hq, L), or not finite and >= 0 everywhere.
    """
    if not isinstance(factor, Tensor) or not factor.is_floating_point() or factor.ndim not in (2, 3):
        came = f"{factor.dtype} {tuple(factor.shape)}" if isinstance(factor, Tensor) else type(factor).__name__
        raise InputError(f"factor must be a floating point tensor (B, L) or (B, Hq, L), got {came}")
    if factor.numel() and not bool(((factor >= 0) & factor.isfinite()).all()):
        raise InputError("factor must be finite and >= 0 everywhere; it holds negative, infinite or NaN entries")
    return factor.detach().float()
