"""Suppression of encoders and encoder-decoders, written independently of the package: eager attention, all scores held.

Which attention is suppressed is told by the modules' names in transformers' code. One row at a time.
"""

import math
from contextlib import contextmanager

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

_setting: dict = {}


def _attention(module, query, key, value, attention_mask, scaling=None, position_bias=None, **kwargs):
    scores = query.double() @ key.double().transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if position_bias is not None:
        scores = scores + position_bias
    is_causal = kwargs.get("is_causal", getattr(module, "is_causal", False))
    if attention_mask is not None:
        hidden = (attention_mask < -1e9).expand_as(scores)
    else:
        assert not is_causal or query.shape[2] == 1, "eager masks of causal attention are there"
        hidden = torch.zeros_like(scores, dtype=torch.bool)
    if module in _setting["modules"]:
        c = _setting["factor"].double()
        assert c.shape == (key.shape[2],)
        if _setting["mode"] == "log_additive":
            scores = scores + torch.log(c)
        elif _setting["mode"] == "multiplicative":
            scores = scores * c
        else:
            lowest = torch.where(hidden, math.inf, scores).min(dim=-1, keepdim=True).values
            scores = lowest + (scores - lowest) * c
        _setting["reached"].add(module)
    weights = torch.where(hidden, -math.inf, scores).softmax(dim=-1)
    return (weights @ value.double()).to(value.dtype).transpose(1, 2).contiguous(), None


AttentionInterface.register("test_whole_rows", _attention)
AttentionMaskInterface.register("test_whole_rows", eager_mask)


@contextmanager
def suppressed(model, factor: torch.Tensor, mode: str, is_suppressed):
    """Inside, attention modules for whose name `is_suppressed` holds see keys under `factor` (S,)."""
    before = {id(m.config): (m.config, m.config._attn_implementation) for m in model.modules() if hasattr(m, "config")}
    modules = {module for name, module in model.named_modules() if is_suppressed(name)}
    _setting.update(factor=factor, mode=mode, modules=modules, reached=set())
    for config, _ in before.values():
        config._attn_implementation_internal = "test_whole_rows"
    try:
        with torch.no_grad():
            yield
        assert _setting["reached"], "the oracle suppressed nothing"
    finally:
        for config, implementation in before.values():
            config._attn_implementation_internal = implementation


def everywhere(name: str) -> bool:
    return True


def scores_by_hand(values, model, length, units, mode, factor, is_suppressed=everywhere):
    """(n, m): base minus suppressed, one full forward per unit."""

    def under(row):
        with suppressed(model, row, mode, is_suppressed):
            return values().double()

    base = under(torch.ones(length))
    found = []
    for unit in units:
        row = torch.ones(length)
        row[list(unit.token_indices)] = factor
        found.append(base - under(row))
    return torch.stack(found).float(), base.float()


def enlarge(model, seed: int = 0):
    """Random weights large enough that attention matters, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "position" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.5 if "embed" in name else 0.25))
    return model.eval()
