"""The two public ops: what they accept, how they are registered with torch, and who computes them.

`suppressed_attention` takes a batch of sequences, `packed_suppressed_attention` suffixes of many variants over one
shared base. Both exist as torch ops (``torch.ops.atman_kernels.*``) with schemas, fakes and a backward, so they
pass through ``torch.compile(fullgraph=True)``.
"""

import math
from typing import Any

import torch
from torch import Tensor

from atman_kernels import autograd, backends
from atman_kernels.arguments import choice, flag, integer, real
from atman_kernels.errors import InputError
from atman_kernels.formula import MODES, WIDEST_WINDOW, ScoreOptions
from atman_kernels.pack import VariantPack

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
    described = _describe(query, key, value, factor, key_mask, position_bias, sinks)
    is_known = described is not None and described in _accepted
    if not is_known:
        _check_dense(query, key, value, factor, key_mask, position_bias)
    if position_bias is not None:
        position_bias = _with_rank(position_bias, 4)
    options = _checked_options(query, mode, is_causal, scale, sliding_window, softcap, return_lse)
    if not is_known:
        _check_sinks(sinks, query)
        _accept(described)
    _check_backend(backend, query)
    tensors = (query, key, value, factor, key_mask, sinks, position_bias)
    output, lse = torch.ops.atman_kernels.suppressed_attention(*tensors, *_unpacked(options, *tensors), backend)
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
    described = _describe(
        query, key, value, base_key, base_value, pack.prefix_lengths, factor, position_bias, sinks,
        of=(pack.num_rows, pack.longest, pack.base_end),
    )  # fmt: skip
    is_known = described is not None and described in _accepted
    if not is_known:
        _check_packed(query, key, value, base_key, base_value, pack, factor, position_bias)
    if position_bias is not None:
        position_bias = _with_rank(position_bias, 3)
    options = _checked_options(query, mode, is_causal, scale, sliding_window, softcap, return_lse)
    if not is_known:
        _check_sinks(sinks, query)
        _accept(described)
    _check_backend(backend, query)
    layout = (pack.suffix_starts, pack.prefix_lengths, pack.base_starts, pack.row_variant, pack.row_position)
    tensors = (query, key, value, base_key, base_value, *layout, factor, sinks, position_bias)
    output, lse = torch.ops.atman_kernels.packed_suppressed_attention(*tensors, *_unpacked(options, *tensors), backend)
    return (output, lse) if return_lse else output


# --- validation: one clear error that names the argument, what came and what was expected ---

# What `_describe` said of tensors that passed all checks. Models call with the same few kinds of tensors again and
# again; the checks look at nothing else of a tensor, so what passed once passes again.
_accepted: set[tuple[Any, ...]] = set()
_MOST_ACCEPTED = 4096


def _describe(*tensors: Tensor | None, of: tuple[int, ...] = ()) -> tuple[Any, ...] | None:
    """All that the checks see of tensors; None where they shall look again: in compilers, or at what is no tensor."""
    if torch.compiler.is_compiling():
        return None
    try:
        described = (of, *[None if x is None else (type(x), x.shape, x.dtype, x.device, x.layout) for x in tensors])
        hash(described)  # symbolic sizes have none
    except (AttributeError, TypeError):
        return None
    return described


def _accept(described: tuple[Any, ...] | None) -> None:
    if described is None:
        return
    if len(_accepted) >= _MOST_ACCEPTED:
        _accepted.clear()
    _accepted.add(described)


def _check_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    factor: Tensor | None,
    key_mask: Tensor | None,
    position_bias: Tensor | None,
) -> None:
    _check_rank("query", query, 4, "(B, Hq, Lq, D)")
    _check_rank("key", key, 4, "(1|B, Hkv, Lk, D)")
    _check_rank("value", value, 4, "(1|B, Hkv, Lk, Dv)")
    _check_alike("query", query, key=key, value=value)
    batch, q_heads, _, head_dim = query.shape
    _check_head_dim(query)
    kv_batch, kv_heads, length, _ = key.shape
    _check_shape("key", key, (kv_batch, kv_heads, length, head_dim), "last dimension as in query")
    _check_shape("value", value, (kv_batch, kv_heads, length, value.shape[3]), "batch, heads and length as in key")
    if kv_batch not in (1, batch):
        raise InputError(f"key must have batch 1 or the query's {batch}, got {kv_batch}")
    _check_heads(q_heads, kv_heads)
    if factor is not None:
        _check_factor(factor, query, batch, q_heads, length, exact=True)
    if key_mask is not None:
        _check_device("key_mask", key_mask, query)
        _check_shape("key_mask", key_mask, (batch, length), "(B, Lk)")
        if key_mask.dtype != torch.bool:
            raise InputError(f"key_mask must be bool (True = visible), got {key_mask.dtype}")
    if position_bias is not None:
        _check_bias(position_bias, query, (batch, q_heads, query.shape[2], length))


def _check_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    base_key: Tensor,
    base_value: Tensor,
    pack: VariantPack,
    factor: Tensor | None,
    position_bias: Tensor | None,
) -> None:
    _check_rank("query", query, 3, "(Hq, T, D)")
    for name, tensor in (("key", key), ("base_key", base_key)):
        _check_rank(name, tensor, 3, "(Hkv, T|S, D)")
    for name, tensor in (("value", value), ("base_value", base_value)):
        _check_rank(name, tensor, 3, "(Hkv, T|S, Dv)")
    _check_alike("query", query, key=key, value=value, base_key=base_key, base_value=base_value)
    _check_device("pack", pack.prefix_lengths, query)
    q_heads, rows, head_dim = query.shape
    _check_head_dim(query)
    kv_heads, value_dim, base_length = key.shape[0], value.shape[2], base_key.shape[1]
    if rows != pack.num_rows:
        raise InputError(f"query has {rows} rows, but the pack has {pack.num_rows}")
    _check_shape("key", key, (kv_heads, rows, head_dim), "(Hkv, T, D)")
    _check_shape("value", value, (kv_heads, rows, value_dim), "(Hkv, T, Dv)")
    _check_shape("base_key", base_key, (kv_heads, base_length, head_dim), "(Hkv, S, D)")
    _check_shape("base_value", base_value, (kv_heads, base_length, value_dim), "(Hkv, S, Dv)")
    if base_length < pack.base_end:
        raise InputError(f"base_key holds {base_length} keys, but the pack reaches to key {pack.base_end}")
    _check_heads(q_heads, kv_heads)
    if factor is not None:
        _check_factor(factor, query, pack.num_variants, q_heads, pack.longest, exact=False)
    if position_bias is not None:
        _check_packed_bias(position_bias, query, pack.longest)


def _check_rank(name: str, tensor: Tensor, rank: int, shape: str) -> None:
    if not isinstance(tensor, Tensor):
        raise InputError(f"{name} must be a tensor {shape}, got {type(tensor).__name__}")
    if tensor.ndim != rank:
        raise InputError(f"{name} must be {shape}, got shape {tuple(tensor.shape)}")
    _check_layout(name, tensor)


def _check_layout(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided:
        raise InputError(f"{name} must be a dense tensor, got layout {tensor.layout}")


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], what: str) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise InputError(f"{name} must have shape {tuple(expected)} ({what}), got {tuple(tensor.shape)}")


def _check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise InputError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.device != like.device:
        raise InputError(f"{name} must be on {like.device} as query is, got {tensor.device}")
    _check_layout(name, tensor)


def _check_alike(first: str, tensor: Tensor, **others: Tensor) -> None:
    if tensor.dtype not in _FLOATS:
        raise InputError(f"{first} must be float32, float64, bfloat16 or float16, got {tensor.dtype}")
    for name, other in others.items():
        if other.dtype != tensor.dtype:
            raise InputError(f"{name} must have {first}'s dtype {tensor.dtype}, got {other.dtype}")
        _check_device(name, other, tensor)


def _check_head_dim(query: Tensor) -> None:
    if query.shape[-1] == 0:
        raise InputError(f"query must have a head dimension D >= 1, got shape {tuple(query.shape)}")


def _check_heads(q_heads: int, kv_heads: int) -> None:
    if kv_heads == 0 or q_heads % kv_heads:
        raise InputError(f"query's heads must be a multiple of key's heads, got {q_heads} and {kv_heads}")


def _check_factor(factor: Tensor, query: Tensor, rows: int, heads: int, length: int, exact: bool) -> None:
    _check_device("factor", factor, query)
    if factor.dtype not in _FLOATS:
        raise InputError(f"factor must be a floating point tensor, got {factor.dtype}")
    fits = factor.ndim in (2, 3) and factor.shape[0] == rows and (factor.ndim == 2 or factor.shape[1] == heads)
    if not fits or (factor.shape[-1] != length if exact else factor.shape[-1] < length):
        longer = "" if exact else ", or longer in the last"  # here, since dynamo cannot format symbolic sizes
        expected = f"({rows}, {length}) or ({rows}, {heads}, {length}){longer}"
        raise InputError(f"factor must have shape {expected}, got {tuple(factor.shape)}")


def _check_bias(bias: Tensor, query: Tensor, full: tuple[int, ...]) -> None:
    _check_device("position_bias", bias, query)
    if bias.dtype not in _FLOATS:
        raise InputError(f"position_bias must be a floating point tensor, got {bias.dtype}")
    shape = (1,) * (4 - bias.ndim) + tuple(bias.shape)
    if len(shape) != 4 or any(have not in (1, want) for have, want in zip(shape, full, strict=True)):
        raise InputError(f"position_bias must broadcast to (B, Hq, Lq, Lk) = {full}, got {tuple(bias.shape)}")


def _check_packed_bias(bias: Tensor, query: Tensor, longest: int) -> None:
    _check_device("position_bias", bias, query)
    if bias.dtype not in _FLOATS:
        raise InputError(f"position_bias must be a floating point tensor, got {bias.dtype}")
    heads = query.shape[0]
    shape = (1,) * (3 - bias.ndim) + tuple(bias.shape)
    if len(shape) != 3 or shape[0] not in (1, heads) or any(have != 1 and have < longest for have in shape[1:]):
        expected = f"({heads}, P, P), P >= {longest} as the pack's longest variant"
        raise InputError(f"position_bias must broadcast to {expected}, got {tuple(bias.shape)}")


def _with_rank(bias: Tensor, rank: int) -> Tensor:
    return bias if bias.ndim == rank else bias.reshape((1,) * (rank - bias.ndim) + tuple(bias.shape))


def _checked_options(
    query: Tensor,
    mode: str,
    is_causal: bool,
    scale: float | None,
    sliding_window: int | None,
    softcap: float | None,
    return_lse: bool,
) -> ScoreOptions:
    if type(mode) is not str or mode not in MODES:  # what is plain takes no call, of which an op has none to spare
        mode = choice(mode, "mode", MODES)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    elif type(scale) is not float or not math.isfinite(scale):
        scale = real(scale, "scale", "a finite number")
    if sliding_window is not None:
        sliding_window = integer(sliding_window, "sliding_window", least=1, expected="an integer >= 1 or None")
        if type(sliding_window) is int:  # compilers have sizes of their own, which no limit would leave symbolic
            sliding_window = min(sliding_window, WIDEST_WINDOW)
    if softcap is not None:
        softcap = real(softcap, "softcap", "positive and finite or None", lambda x: 0 < x < math.inf)
    if type(is_causal) is not bool or type(return_lse) is not bool:
        is_causal, return_lse = flag(is_causal, "is_causal"), flag(return_lse, "return_lse")
    return ScoreOptions(mode, is_causal, scale, sliding_window, softcap, return_lse)


def _check_sinks(sinks: Tensor | None, query: Tensor) -> None:
    if sinks is None:
        return
    _check_device("sinks", sinks, query)
    _check_shape("sinks", sinks, (query.shape[-3],), "one per query head")
    if sinks.dtype not in _FLOATS:
        raise InputError(f"sinks must be a floating point tensor, got {sinks.dtype}")


def _check_backend(backend: str | None, query: Tensor) -> None:
    if backend is not None and not torch.compiler.is_compiling():
        backends.load(backend, query.device.type)


def _check_factor_values(factor: Tensor | None, query: Tensor) -> None:
    """Reads values, so only where that costs no device synchronisation."""
    if factor is None or factor.device.type != "cpu" or factor.numel() == 0:
        return
    lowest, highest = torch.aminmax(factor.detach())  # NaN propagates and fails both comparisons
    # scores are float32, or float64 for float64 queries: what a factor of float64 may be goes by that
    most = torch.finfo(torch.float64 if query.dtype == torch.float64 else torch.float32).max
    if not (lowest >= 0 and highest <= most):
        bad = (factor.isnan().any() and "NaN") or (f"{lowest:g}" if lowest < 0 else f"{highest:g}")
        raise InputError(f"factor must be finite and >= 0 everywhere, got {bad}")


# --- torch ops: schema, implementation, fake; their backward is in `autograd` ---

_OPTIONS = "str mode, bool is_causal, float scale, SymInt? sliding_window, float? softcap, bool return_lse"
_library = torch.library.Library("atman_kernels", "DEF")
_TENSORS = {
    "suppressed_attention": (
        "Tensor query, Tensor key, Tensor value, Tensor? factor, Tensor? key_mask, Tensor? sinks, Tensor? position_bias"
    ),
    "packed_suppressed_attention": (
        "Tensor query, Tensor key, Tensor value, Tensor base_key, Tensor base_value, Tensor suffix_starts, "
        "Tensor prefix_lengths, Tensor base_starts, Tensor row_variant, Tensor row_position, Tensor? factor, "
        "Tensor? sinks, Tensor? position_bias"
    ),
}


def _unpacked(options: ScoreOptions, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The options of an op call, which keeps its lse for a backward."""
    return (
        options.mode,
        options.is_causal,
        options.scale,
        options.sliding_window,
        options.softcap,
        options.return_lse or autograd.requires_gradient(*tensors),
    )


def _run_dense(*arguments: Any) -> tuple[Tensor, Tensor]:
    *tensors, mode, is_causal, scale, window, softcap, return_lse, backend = arguments
    _check_factor_values(tensors[3], tensors[0])
    module = backends.load_for(backend, tensors[0], tensors[2])
    options = ScoreOptions(mode, is_causal, scale, window, softcap, return_lse)
    return module.suppressed_attention(*tensors, options)


def _run_packed(*arguments: Any) -> tuple[Tensor, Tensor]:
    *tensors, mode, is_causal, scale, window, softcap, return_lse, backend = arguments
    _check_factor_values(tensors[10], tensors[0])
    module = backends.load_for(backend, tensors[0], tensors[2])
    options = ScoreOptions(mode, is_causal, scale, window, softcap, return_lse)
    return module.packed_suppressed_attention(*tensors, options)


def _fake(query: Tensor, value: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return output, query.new_empty(query.shape[:-1] if return_lse else (0,), dtype=lse_dtype)


def _register() -> None:
    for name, run in (("suppressed_attention", _run_dense), ("packed_suppressed_attention", _run_packed)):
        _library.define(f"{name}({_TENSORS[name]}, {_OPTIONS}, str? backend) -> (Tensor, Tensor)")
        _library.impl(name, run, "CompositeExplicitAutograd")

        def fake(*arguments: Any) -> tuple[Tensor, Tensor]:
            return _fake(arguments[0], arguments[2], arguments[-2])

        torch.library.register_fake(f"atman_kernels::{name}", fake, lib=_library)
        autograd.register(_library, name, _TENSORS[name], _OPTIONS)


_register()
