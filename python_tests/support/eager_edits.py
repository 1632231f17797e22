"""Edits of attention written independently of the package: an eager attention that holds all scores and weights.

The masks are those that transformers makes for its own eager attention. Only full forwards: query i is at position i.
"""

import math
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

Edit = Callable[[int, Tensor], Tensor]  # (layer, (B, Hq, T, S)) -> the same, changed
_setting: dict = {}


def _attention(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
    group = query.shape[1] // key.shape[1]
    key, value = (x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (key, value))
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    layer = _setting["layers"].setdefault(id(module), len(_setting["layers"]))
    scores = _setting["scores"](layer, scores)
    if attention_mask is not None:
        scores = torch.where(attention_mask < -1e9, -math.inf, scores)
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    if s_aux is not None:
        sink = s_aux.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, sink.to(scores.dtype)], dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[2]].masked_fill(nothing, 0.0)
    weights = _setting["weights"](layer, weights)
    return torch.einsum("bhqk,bhkd->bqhd", weights, value).contiguous(), None


AttentionInterface.register("test_edits", _attention)
AttentionMaskInterface.register("test_edits", eager_mask)


def _same(layer: int, tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def edited(model: PreTrainedModel, scores: Edit = _same, weights: Edit = _same):
    """Forwards of `model` inside have their scores changed before mask and softmax, their weights after."""
    before = model.config._attn_implementation
    model.set_attn_implementation("test_edits")
    _setting.update(scores=scores, weights=weights, layers={})
    try:
        yield
    finally:
        model.set_attn_implementation(before)
