"""The definition of suppressed attention, in plain PyTorch. Every other backend is compared with it.

It holds all scores at once. float64 stays float64; everything narrower is computed in float32.
"""

import math

import torch
from torch import Tensor

from atman_kernels.formula import ScoreOptions, suppress_scores, window_visible


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
    if factor is not None:
        per_head = factor if factor.ndim == 3 else factor[:, None]
        scores = suppress_scores(scores, per_head[:, :, None].to(q.dtype), options.mode, visible)
    scores = scores.masked_fill(~visible, -math.inf)

    if sinks is not None:
        scores = torch.cat([scores, sinks.to(q.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    live = (scores != -math.inf).any(dim=-1, keepdim=True)  # NaN is alive, and shows
    scores = scores.masked_fill(~live, 0.0)  # a row of -inf has NaN gradients
    weights = scores.softmax(dim=-1).masked_fill(~live, 0.0)[..., :keys]
    lse = scores.logsumexp(dim=-1).masked_fill(~live.squeeze(-1), -math.inf)
    output = (weights @ v).to(query.dtype)
    return output, lse if options.return_lse else lse.new_empty(0)


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
