"""The parts of a model: its text decoder, its encoders, and the dtype in which they compute."""

import torch
from torch import nn
from transformers import PreTrainedModel

from atman_kernels.errors import InputError, UnsupportedModelError
from atman_kernels.hf.models.families import families_in, why_refused
from atman_kernels.hf.models.placement import input_device


def decoder_of(model: nn.Module) -> PreTrainedModel:
    """The part of a model whose attention is suppressed: its text decoder, or the encoder of an encoder.

    Raises:
        InputError: `model` is not a transformers model.
        UnsupportedModelError: its attention cannot be reached, with the reason.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    decoder = text_stack(model)
    if any(family.cross_attends for family in families_in(decoder)):
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


def computing_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype of a model's products: its own, or that of autocast."""
    return autocast_dtype(input_device(model), model.dtype)


def autocast_dtype(device: torch.device, own: torch.dtype) -> torch.dtype:
    """What autocast, where there is one and it is on, makes of a dtype; it leaves float64 alone."""
    kind = device.type  # "meta" of models whose weights lie elsewhere
    if own == torch.float64 or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return own
    return torch.get_autocast_dtype(kind)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model has an encoder and a decoder that attends to it."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def encoder_of(model: nn.Module) -> nn.Module:
    """The encoder of an encoder-decoder model."""
    assert isinstance(model, PreTrainedModel)
    encoder: nn.Module = model.get_encoder()
    return encoder


def towers(module: nn.Module, decoder: nn.Module) -> list[PreTrainedModel]:
    """The outermost transformers models that lie beside the decoder."""
    found = []
    for child in module.children():
        if child is decoder:
            continue
        if any(part is decoder for part in child.modules()) or not isinstance(child, PreTrainedModel):
            found += towers(child, decoder)
        else:
            found.append(child)
    return found


def vision_encoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The one encoder beside the text decoder.

    Raises:
        UnsupportedModelError: there are several, or none, or its attention cannot be reached.
    """
    name, found = type(model).__name__, towers(model, decoder_of(model))
    if len(found) != 1:
        raise UnsupportedModelError(f"{name} cannot be suppressed in its vision encoder: it has {len(found)} encoders")
    return reachable(found[0], name)
