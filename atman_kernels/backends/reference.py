"""The definition of suppressed attention, in plain PyTorch. Every other backend is compared with it.

It holds all scores at once. float64 stays float64; everything narrower is computed in float32. Its gradients are
those of torch.autograd through it.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from atman_kernels.backends.call import DenseCall, Gradients, PackedCall, Result, Wanted
from atman_kernels.formula import Saved, suppress_scores, widened, window_visible


def unavailable_reason(device_type: str) -> str | None:
    """None: it runs on every device."""
    return None


def suppressed_attention(call: DenseCall) -> Result:
    options, factor, sinks = call.options, call.factor, call.sinks
    q, k, v = (widened(x) for x in (call.query, call.key, call.value))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    queries, keys = q.shape[2], k.shape[2]

    key_position = torch.arange(keys, device=q.device)
    query_position = torch.arange(queries, device=q.device) + keys - queries  # the last query sees every key
    visible = window_visible(query_position, key_position, options.is_causal, options.sliding_window)
    visible = visible[None, None]
    if call.key_mask is not None:
        visible = visible & call.key_mask[:, None, None, :]

    scores = options.scale * (q @ k.mT)  # [B, Hq, Lq, Lk]
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if call.position_bias is not None:
        bias = call.position_bias
        visible = visible & (bias > -math.inf)
        scores = scores + bias.to(q.dtype).masked_fill(bias == -math.inf, 0.0)
    unsuppressed, per_head = scores, None
    if factor is not None:
        per_head = (factor if factor.ndim == 3 else factor[:, None])[:, :, None].to(q.dtype)  # [B, 1|Hq, 1, Lk]
        scores = suppress_scores(scores, per_head, options.mode, visible)
    scores = scores.masked_fill(~visible, -math.inf)

    if sinks is not None:
        scores = torch.cat([scores, sinks.to(q.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    live = (scores != -math.inf).any(dim=-1, keepdim=True)  # NaN is alive, and shows
    scores = scores.masked_fill(~live, 0.0)  # a row of -inf has NaN gradients
    weights = scores.softmax(dim=-1).masked_fill(~live, 0.0)[..., :keys]
    lse = scores.logsumexp(dim=-1).masked_fill(~live.squeeze(-1), -math.inf)
    output = weights @ v
    if per_head is not None and per_head.requires_grad and options.mode == "log_additive":
        growth = _growth_from_zero(unsuppressed, lse, per_head, visible)
        output, lse = output + growth @ v - growth.sum(-1, keepdim=True) * output, lse + growth.sum(-1)
    return output.to(call.query.dtype), lse if options.return_lse else lse.new_empty(0)


def _growth_from_zero(scores: Tensor, lse: Tensor, factor: Tensor, visible: Tensor) -> Tensor:
    """(B, Hq, Lq, Lk) zeros that grow with the factors that are 0, as the keys' weights do: by exp(s - lse).

    They give a removed key the slope that ln c does not have at 0, the limit from the right. A row whose keys are all
    removed has none: the smallest factor would give it that key's whole value.
    """
    lse = lse.detach()[..., None]
    most = math.log(torch.finfo(lse.dtype).max)
    slope = (scores.detach() - lse).clamp(max=most).exp().masked_fill(~visible | (lse == -math.inf), 0.0)
    return slope * (factor - factor.detach()).masked_fill(factor != 0, 0.0)


def packed_suppressed_attention(call: PackedCall) -> Result:
    """Each variant alone: dense attention of its suffix to its prefix and itself."""
    outputs, lses = [], []
    starts, prefixes, bases = (x.tolist() for x in (call.suffix_starts, call.prefix_lengths, call.base_starts))
    for v, (prefix, base) in enumerate(zip(prefixes, bases, strict=True)):
        rows = slice(starts[v], starts[v + 1])
        own_key = torch.cat([call.base_key[:, base : base + prefix], call.key[:, rows]], dim=1)
        own_value = torch.cat([call.base_value[:, base : base + prefix], call.value[:, rows]], dim=1)
        keys = own_key.shape[1]
        own_factor = None if call.factor is None else call.factor[v : v + 1, ..., :keys]
        own_bias = call.position_bias
        if own_bias is not None:  # the queries of the variant stand at positions prefix ..
            own_bias = own_bias[:, prefix:keys] if own_bias.shape[1] > 1 else own_bias
            own_bias = own_bias[None, ..., :keys]
        alone = DenseCall(
            query=call.query[None, :, rows],
            key=own_key[None],
            value=own_value[None],
            factor=own_factor,
            key_mask=None,
            sinks=call.sinks,
            position_bias=own_bias,
            options=call.options,
        )
        output, lse = suppressed_attention(alone)
        outputs.append(output[0])
        lses.append(lse[0] if call.options.return_lse else lse)
    return torch.cat(outputs, dim=1), torch.cat(lses, dim=-1)


def suppressed_attention_backward(call: DenseCall, saved: Saved, wanted: Wanted) -> Gradients:
    return _gradients(suppressed_attention, call, saved, wanted)


def packed_suppressed_attention_backward(call: PackedCall, saved: Saved, wanted: Wanted) -> Gradients:
    return _gradients(packed_suppressed_attention, call, saved, wanted)


def _gradients(
    forward: Callable[[Any], Result], call: DenseCall | PackedCall, saved: Saved, wanted: Wanted
) -> Gradients:
    """The definition, computed again and differentiated."""
    options = replace(call.options, return_lse=saved.grad_lse is not None)
    with torch.enable_grad():
        leaves = {name: getattr(call, name).detach().requires_grad_() for name in wanted}
        output, lse = forward(replace(call, **leaves, options=options))
        pairs = [(output, saved.grad_output)]
        pairs += [] if saved.grad_lse is None else [(lse, saved.grad_lse)]
        results, gradients = zip(*pairs, strict=True)
        found = torch.autograd.grad(
            results, list(leaves.values()), gradients, allow_unused=True, materialize_grads=True
        )
    return {name: gradient.contiguous() for name, gradient in zip(leaves, found, strict=True)}
