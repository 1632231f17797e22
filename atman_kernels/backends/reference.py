"""The definition of suppressed attention, in plain PyTorch. Every other backend is compared with it.

It holds all scores at once. float64 stays float64; everything narrower is computed in float32. Its gradients are
those of torch.autograd through it.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from atman_kernels.formula import Saved, ScoreOptions, suppress_scores, window_visible


def unavailable_reason(device_type: str) -> str | None:
    return None


def suppressed_attention(
    query: Tensor,  # (B, Hq, Lq, D)
    key: Tensor,  # (1|B, Hkv, Lk, D)
    value: Tensor,  # (1|B, Hkv, Lk, Dv)
    factor: Tensor | None,  # (B, Lk) or (B, Hq, Lk)
    key_mask: Tensor | None,  # (B, Lk) bool, True = visible
    sinks: Tensor | None,  # (Hq,)
    position_bias: Tensor | None,  # broadcastable to (B, Hq, Lq, Lk)
    options: ScoreOptions,
) -> tuple[Tensor, Tensor]:
    q, k, v = (x if x.dtype == torch.float64 else x.float() for x in (query, key, value))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    queries, keys = q.shape[2], k.shape[2]

    key_position = torch.arange(keys, device=q.device)
    query_position = torch.arange(queries, device=q.device) + keys - queries  # the last query sees every key
    visible = window_visible(query_position, key_position, options.is_causal, options.sliding_window)
    visible = visible[None, None]
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]

    scores = options.scale * (q @ k.mT)  # [B, Hq, Lq, Lk]
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if position_bias is not None:
        visible = visible & (position_bias > -math.inf)
        scores = scores + position_bias.to(q.dtype).masked_fill(position_bias == -math.inf, 0.0)
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
    return output.to(query.dtype), lse if options.return_lse else lse.new_empty(0)


def _growth_from_zero(scores: Tensor, lse: Tensor, factor: Tensor, visible: Tensor) -> Tensor:
    """(B, Hq, Lq, Lk) zeros that grow with the factors that are 0, as the keys' weights do: by exp(s - lse).

    They give a removed key the slope that ln c does not have at 0, the limit from the right. A row whose keys are all
    removed has none: the smallest factor would give it that key's whole value.
    """
    lse = lse.detach()[..., None]
    most = math.log(torch.finfo(lse.dtype).max)
    slope = (scores.detach() - lse).clamp(max=most).exp().masked_fill(~visible | (lse == -math.inf), 0.0)
    return slope * (factor - factor.detach()).masked_fill(factor != 0, 0.0)


def packed_suppressed_attention(
    query: Tensor,  # (Hq, T, D)
    key: Tensor,  # (Hkv, T, D)
    value: Tensor,  # (Hkv, T, Dv)
    base_key: Tensor,  # (Hkv, S, D)
    base_value: Tensor,  # (Hkv, S, Dv)
    suffix_starts: Tensor,  # (V + 1,)
    prefix_lengths: Tensor,  # (V,)
    base_starts: Tensor,  # (V,)
    row_variant: Tensor,  # (T,)
    row_position: Tensor,  # (T,)
    factor: Tensor | None,  # (V, K) or (V, Hq, K), over absolute positions
    sinks: Tensor | None,  # (Hq,)
    position_bias: Tensor | None,  # (1|Hq, 1|P, 1|P), over absolute positions
    options: ScoreOptions,
) -> tuple[Tensor, Tensor]:
    """Each variant alone: dense attention of its suffix to its prefix and itself."""
    outputs, lses = [], []
    starts = suffix_starts.tolist()
    for v, (prefix, base) in enumerate(zip(prefix_lengths.tolist(), base_starts.tolist(), strict=True)):
        rows = slice(starts[v], starts[v + 1])
        own_key = torch.cat([base_key[:, base : base + prefix], key[:, rows]], dim=1)
        own_value = torch.cat([base_value[:, base : base + prefix], value[:, rows]], dim=1)
        keys = own_key.shape[1]
        own_factor = None if factor is None else factor[v : v + 1, ..., :keys]
        own_bias = position_bias
        if own_bias is not None:  # the queries of the variant stand at positions prefix ..
            own_bias = own_bias[:, prefix:keys] if own_bias.shape[1] > 1 else own_bias
            own_bias = own_bias[None, ..., :keys]
        output, lse = suppressed_attention(
            query[None, :, rows], own_key[None], own_value[None], own_factor, None, sinks, own_bias, options
        )
        outputs.append(output[0])
        lses.append(lse[0] if options.return_lse else lse)
    return torch.cat(outputs, dim=1), torch.cat(lses, dim=-1)


def suppressed_attention_backward(
    *tensors: Tensor | None, options: ScoreOptions, saved: Saved, wanted: tuple[bool, ...]
) -> list[Tensor | None]:
    return _gradients(suppressed_attention, tensors, options, saved, wanted)


def packed_suppressed_attention_backward(
    *tensors: Tensor | None, options: ScoreOptions, saved: Saved, wanted: tuple[bool, ...]
) -> list[Tensor | None]:
    return _gradients(packed_suppressed_attention, tensors, options, saved, wanted)


def _gradients(
    forward: Callable[..., tuple[Tensor, Tensor]],
    tensors: tuple[Tensor | None, ...],
    options: ScoreOptions,
    saved: Saved,
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    """The definition, computed again and differentiated."""
    options = replace(options, return_lse=saved.grad_lse is not None)
    with torch.enable_grad():
        leaves = [
            x.detach().requires_grad_() if x is not None and need else x
            for x, need in zip(tensors, wanted, strict=True)
        ]
        results = forward(*leaves, options)
        asked = [x for x, need in zip(leaves, wanted, strict=True) if x is not None and need]
        pairs = [(saved.grad_output, results[0])]
        pairs += [] if saved.grad_lse is None else [(saved.grad_lse, results[1])]
        found = torch.autograd.grad(
            [result for _, result in pairs], asked, [gradient for gradient, _ in pairs],
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
    gradients = iter(found)
    return [next(gradients).contiguous() if need else None for need in wanted]
