"""Suppression written independently of the package, for any model: scores are changed on their way into softmax.

The model runs its own attention, masks and biases included; only the tensor that it gives to softmax, or the call of
scaled_dot_product_attention, is caught. A score below HIDDEN is a masked one. Every variant is one full forward.
"""

import math

import torch
from torch.nn.functional import multi_head_attention_forward, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

HIDDEN = -5e3  # transformers writes the dtype's minimum, or that over a scale; OpenAI GPT -1e4
SOFTMAX = (torch.nn.functional.softmax, torch.softmax, torch.Tensor.softmax)


class Suppressed(TorchFunctionMode):
    """Attention scores (..., L, L), or (..., L, L + 1) with a sink at the end, changed by factor (L,).

    `calls` counts the attention layers that came by; `layers` are the ones to act on, in that order. `queries` are the
    numbers of queries that the attention in question may have, where that is not L.
    """

    def __init__(self, factor: torch.Tensor, mode: str, layers=None, hidden: float = HIDDEN, queries=None) -> None:
        super().__init__()
        self.factor, self.mode, self.layers, self.hidden = factor, mode, layers, hidden
        self.queries = queries or (len(factor),)
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and self._is_meant(args[0].shape[-2], args[1].shape[-2]):
            return self._sdpa(*args, **kwargs)
        if func is multi_head_attention_forward and self._is_meant(args[0].shape[0], args[1].shape[0]):
            return self._multi_head(*args, **kwargs)
        if func in SOFTMAX and self._are_scores(args[0]):
            args = (self._changed(args[0]), *args[1:])
        return func(*args, **kwargs)

    def _are_scores(self, x: torch.Tensor) -> bool:
        return x.ndim >= 3 and any(self._is_meant(x.shape[-2], x.shape[-1] - sink) for sink in (0, 1))

    def _is_meant(self, queries: int, keys: int) -> bool:
        return queries in self.queries and keys == len(self.factor)

    def _changed(self, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.layers is not None and self.calls - 1 not in self.layers:
            return scores
        s, c = scores[..., : len(self.factor)], self.factor.to(scores.dtype)
        hidden = s < self.hidden
        if self.mode == "log_additive":
            new = s + c.log()
        elif self.mode == "multiplicative":
            new = s * c
        else:
            lowest = s.masked_fill(hidden, math.inf).amin(-1, keepdim=True)
            new = lowest + (s - lowest) * c
        new = torch.where(hidden, -math.inf, new)
        new = new.masked_fill((new == -math.inf).all(-1, keepdim=True), 0.0)  # rows that see nothing must not be NaN
        return torch.cat([new, scores[..., len(self.factor) :]], dim=-1)

    def _sdpa(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        return self._changed(scores).softmax(-1) @ value

    def _multi_head(
        self, query, key, value, width, heads, weight, bias, bias_k, bias_v, add_zero, dropout, out, out_bias, **options
    ):
        """The function behind torch's nn.MultiheadAttention: (T, B, E) and (S, B, E), here without masks."""
        assert all(options.get(name) is None for name in ("attn_mask", "key_padding_mask"))
        q, k, v = (
            torch.nn.functional.linear(x, w, b).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
            for x, w, b in zip((query, key, value), weight.chunk(3), bias.chunk(3), strict=True)
        )
        mixed = self._sdpa(q, k, v).permute(2, 0, 1, 3).flatten(2)
        return torch.nn.functional.linear(mixed, out, out_bias), None


def target_logprobs(model, ids: torch.Tensor, n: int, factor: torch.Tensor, mode: str, layers=None) -> torch.Tensor:
    """(m,) log-probs of ids[n:] under one factor row (L,), by one full forward of all but the last token."""
    oracle = Suppressed(factor[: len(ids) - 1], mode, layers)
    with torch.no_grad(), oracle:
        logits = model(ids[None, :-1], use_cache=False).logits[0, n - 1 :]
    assert oracle.calls, "no attention was seen"
    return logits.double().log_softmax(-1).gather(1, ids[n:, None])[:, 0]


def leave_one_out(model, ids: torch.Tensor, n: int, rows: torch.Tensor, mode: str, layers=None) -> torch.Tensor:
    """(n_units, m): rise of the loss of every target token, for every row of factors (L,)."""
    base = target_logprobs(model, ids, n, torch.ones(len(ids)), mode, layers)
    return torch.stack([base - target_logprobs(model, ids, n, row, mode, layers) for row in rows])
