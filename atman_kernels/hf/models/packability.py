"""What is known about a model before any probe: whether parts of sequences can stand in a pack as they do in a whole.

The probe compares numbers, and in 16 bits a small difference is noise. What can be told from how a model is built is
therefore not left to it.
"""

import inspect
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from atman_kernels.errors import InputError
from atman_kernels.hf.models.families import chooses_keys, families_in
from atman_kernels.hf.models.parts import decoder_of


def why_unpackable(model: nn.Module) -> str | None:
    """What keeps every suffix of this model out of a pack; None if nothing is known to.

    A pack tells each row its position, and attention which rows it may see: a model must ask for the one, and mix
    tokens by the other alone.
    """
    decoder = decoder_of(model)
    by_key = any(family.positions_by_key for family in families_in(decoder))
    if not by_key and "position_ids" not in inspect.signature(decoder.forward).parameters:
        return f"{type(decoder).__name__} counts positions itself and takes no position_ids"
    if any(hasattr(module, "create_position_ids_from_input_ids") for module in decoder.modules()):
        return f"{type(decoder).__name__} counts positions from its padding"
    mixing = next((m for m in decoder.modules() if isinstance(m, nn.Conv1d)), None)
    if mixing is not None:
        return f"{type(decoder).__name__} mixes tokens by a convolution beside its attention"
    if chooses_keys(decoder):
        return f"{type(decoder).__name__} chooses the keys that a query sees"
    return None


def why_lengths_do_not_mix(model: nn.Module, lengths: Sequence[int]) -> str | None:
    """What keeps sequences of these lengths out of one pack; None if nothing is known to.

    Raises:
        InputError: one after the other would not do either: dynamic rotary embeddings keep the frequencies of the
            longest sequence so far.
    """
    for kind, limit in _rotary(decoder_of(model)):
        if "dynamic" in kind and len(set(lengths)) > 1 and max(lengths) > limit:
            raise InputError(
                f"prompts of {min(lengths)} to {max(lengths)} tokens cannot be explained together: the dynamic rotary "
                f"embedding of {type(model).__name__} changes with the length beyond {limit}; explain them one by one"
            )
        if kind == "longrope" and min(lengths) <= limit < max(lengths):
            return f"its rotary embedding is another one for prompts beyond {limit} tokens, and lengths are mixed"
    return None


def _rotary(decoder: nn.Module) -> Iterator[tuple[str, int]]:
    """(kind, length up to which it is as trained) of every rotary embedding."""
    module: Any
    for module in decoder.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str):
            yield kinds, _trained_length(module, kinds, module.config.rope_parameters)
        elif isinstance(kinds, dict):
            for layer_type, kind in kinds.items():
                yield kind, _trained_length(module, kind, module.config.rope_parameters[layer_type])


def _trained_length(module: Any, kind: str, parameters: dict[str, Any]) -> int:
    """Where transformers' `dynamic_rope_update` draws the line; nowhere for kinds that it leaves alone."""
    if "dynamic" in kind:
        return int(module.original_max_seq_len)
    return int(parameters["original_max_position_embeddings"]) if kind == "longrope" else sys.maxsize


def grows_with_length(model: nn.Module) -> bool:
    """Whether a dynamic rotary embedding serves prompts beyond the positions that the model was trained with."""
    return any("dynamic" in kind for kind, _ in _rotary(decoder_of(model)))
