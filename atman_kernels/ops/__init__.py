"""The two public ops: what they accept and what they return.

`suppressed_attention` takes a batch of sequences, `packed_suppressed_attention` suffixes of many variants over one
shared base. `validation` checks their arguments; both exist as torch ops (``torch.ops.atman_kernels.*``), which
`registration` defines and `autograd` differentiates, so they pass through ``torch.compile(fullgraph=True)``.
"""

import torch
from torch import Tensor

from atman_kernels.backends.call import DenseCall, PackedCall
from atman_kernels.errors import InputError
from atman_kernels.ops import registration, validation
from atman_kernels.pack import VariantPack

registration.register()


def suppressed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    factor: Tensor | None = None,
    *,
    mode: str = "log_additive",
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which each key's score is scaled by a factor before the softmax.

    Equivalent, in the default mode and for equal numbers of heads, to::

        scores = scale * query @ key.mT + factor.log()[:, None, None, :]
        output = scores.softmax(-1) @ value

    Args:
        query: (B, Hq, Lq, D).
        key: (1|B, Hkv, Lk, D); Hq must be a multiple of Hkv, query heads h*Hq/Hkv … share key head h.
        value: (1|B, Hkv, Lk, Dv).
        factor: (B, Lk) or (B, Hq, Lk), finite and >= 0. 1 leaves a key alone, 0 turns it down as far as the mode
            goes (in "log_additive" the key is gone), > 1 amplifies. None: plain attention.
        mode: "log_additive": s + ln c. "multiplicative": c * s (AtMan, Eq. 4). "shifted": m + c * (s - m), m the
            smallest visible score of the row (AtMan's released code).
        is_causal: aligned at the end: the last query sees every key, the one before it all but the last, …
        key_mask: (B, Lk) bool, True = visible.
        scale: default 1 / sqrt(D).
        sliding_window: causal: query at position p sees keys in (p - window, p]; else keys with |p - k| < window.
            The last query stands at the position of the last key.
        softcap: scores become softcap * tanh(score / softcap), before bias and suppression.
        sinks: (Hq,), one extra unsuppressed score per head that takes part in the softmax and carries no value.
        position_bias: broadcastable to (B, Hq, Lq, Lk), added before suppression; -inf hides the key.
        return_lse: also return the natural log of the softmax denominator, (B, Hq, Lq), sinks included.
        backend: "reference" | "cpu" | "triton" | "cuda"; None takes the fastest for the device.

    Returns:
        (B, Hq, Lq, Dv) in the query's dtype; with `return_lse` also the lse in float32 (float64 for float64).
        Rows that see nothing give 0 and lse = -inf.

    Raises:
        InputError: an argument does not fit; the message names it.
        BackendUnavailableError: the requested backend cannot run here.

    Example:
        >>> q = k = v = torch.eye(2).reshape(1, 1, 2, 2)
        >>> suppressed_attention(q, k, v, torch.tensor([[1.0, 0.0]]))[0, 0, 1]
        tensor([1., 0.])
    """
    described = validation.describe(query, key, value, factor, key_mask, position_bias, sinks)
    if not validation.is_known(described):
        validation.check_dense(query, key, value, factor, key_mask, sinks, position_bias)
        validation.remember(described)
    if position_bias is not None:
        position_bias = validation.with_rank(position_bias, 4)
    options = validation.checked_options(query, mode, is_causal, scale, sliding_window, softcap, return_lse)
    validation.check_backend(backend, query)
    call = DenseCall(query, key, value, factor, key_mask, sinks, position_bias, options)
    output, lse = torch.ops.atman_kernels.suppressed_attention(*call.row(), backend)
    return (output, lse) if return_lse else output


def packed_suppressed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    base_key: Tensor,
    base_value: Tensor,
    pack: VariantPack,
    factor: Tensor | None = None,
    *,
    mode: str = "log_additive",
    is_causal: bool = True,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Suppressed attention of many variants' suffixes, packed along one axis, over one shared base.

    Equivalent, for every variant v with p = pack.prefix_lengths[v], b = pack.base_starts[v] and its rows r, to::

        k = torch.cat([base_key[:, b : b + p], key[:, r]], dim=1)
        v = torch.cat([base_value[:, b : b + p], value[:, r]], dim=1)
        output[:, r] = suppressed_attention(query[None, :, r], k[None], v[None], factor[v, None, : p + len(r)],
                                            is_causal=is_causal)[0]

    Args:
        query: (Hq, T, D), T = pack.num_rows.
        key, value: (Hkv, T, D) and (Hkv, T, Dv), the rows' own keys and values.
        base_key, base_value: (Hkv, S, D) and (Hkv, S, Dv), S >= pack.base_end.
        pack: which rows belong to which variant, see `VariantPack`.
        factor: (V, K) or (V, Hq, K) over absolute positions, K >= pack.longest, finite and >= 0; None: plain.
        is_causal: whether a row sees only the rows of its variant up to itself; False: all of them.
        position_bias: broadcastable to (Hq, P, P) over absolute positions, P >= pack.longest; entry [h, i, j] is
            added to the score of a query at position i and a key at position j. -inf hides the key. ALiBi is
            (Hq, 1, P).
        mode, scale, sliding_window, softcap, sinks, return_lse, backend: as in `suppressed_attention`; windows go
            by absolute position.

    Returns:
        (Hq, T, Dv); with `return_lse` also the lse, (Hq, T).

    Raises:
        InputError, BackendUnavailableError: as in `suppressed_attention`.

    Example:
        >>> pack = VariantPack.build(suffix_lengths=[1, 1], prefix_lengths=[2, 2])
        >>> q, own = torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)
        >>> base = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
        >>> packed_suppressed_attention(q, own, own, base, base, pack, torch.tensor([[1., 1, 1], [1, 0, 1]]))
        tensor([[[0.6667, 0.6667],
                 [1.0000, 0.0000]]])
    """
    if not isinstance(pack, VariantPack):
        raise InputError(f"pack must be a VariantPack, got {type(pack).__name__}")
    described = validation.describe(
        query, key, value, base_key, base_value, pack.prefix_lengths, factor, position_bias, sinks,
        of=(pack.num_rows, pack.longest, pack.base_end),
    )  # fmt: skip
    if not validation.is_known(described):
        validation.check_packed(query, key, value, base_key, base_value, pack, factor, sinks, position_bias)
        validation.remember(described)
    if position_bias is not None:
        position_bias = validation.with_rank(position_bias, 3)
    options = validation.checked_options(query, mode, is_causal, scale, sliding_window, softcap, return_lse)
    validation.check_backend(backend, query)
    layout = (pack.suffix_starts, pack.prefix_lengths, pack.base_starts, pack.row_variant, pack.row_position)
    call = PackedCall(query, key, value, base_key, base_value, *layout, factor, sinks, position_bias, options)
    output, lse = torch.ops.atman_kernels.packed_suppressed_attention(*call.row(), backend)
    return (output, lse) if return_lse else output
