"""One clear error for what does not fit: it names the argument, what came and what was expected."""

import math
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from atman_kernels import backends
from atman_kernels.arguments import choice, flag, integer, real
from atman_kernels.errors import InputError
from atman_kernels.formula import MODES, WIDEST_WINDOW, ScoreOptions, wide_dtype
from atman_kernels.pack import VariantPack

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# What `describe` said of tensors that passed all checks. Models call with the same few kinds of tensors again and
# again; the checks look at nothing else of a tensor, so what passed once passes again.
_accepted: set[tuple[Any, ...]] = set()
_MOST_ACCEPTED = 4096


def describe(*tensors: Tensor | None, of: tuple[int, ...] = ()) -> tuple[Any, ...] | None:
    """All that the checks see of tensors; None where they shall look again: in compilers, or at what is no tensor."""
    if torch.compiler.is_compiling():
        return None
    try:
        return of, *[None if x is None else (type(x), x.shape, x.dtype, x.device, x.layout) for x in tensors]
    except AttributeError:
        return None


def is_known(described: tuple[Any, ...] | None) -> bool:
    """Whether tensors of this description have passed all checks before."""
    try:
        return described is not None and described in _accepted
    except TypeError:  # symbolic sizes have no hash
        return False


def remember(described: tuple[Any, ...] | None) -> None:
    """The tensors of this description have passed all checks."""
    if described is None:
        return
    if len(_accepted) >= _MOST_ACCEPTED:
        _accepted.clear()
    with suppress(TypeError):
        _accepted.add(described)


def check_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    factor: Tensor | None,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    position_bias: Tensor | None,
) -> None:
    """Raises InputError for the first tensor of a dense call that does not fit; shapes as of `suppressed_attention`."""
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
    _check_sinks(sinks, query)


def check_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    base_key: Tensor,
    base_value: Tensor,
    pack: VariantPack,
    factor: Tensor | None,
    sinks: Tensor | None,
    position_bias: Tensor | None,
) -> None:
    """Raises InputError for the first tensor of a packed call that does not fit."""
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
    _check_sinks(sinks, query)


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


def with_rank(bias: Tensor, rank: int) -> Tensor:
    """A position bias with axes of 1 before its own, `rank` of them in all."""
    return bias if bias.ndim == rank else bias.reshape((1,) * (rank - bias.ndim) + tuple(bias.shape))


def checked_options(
    query: Tensor,
    mode: str,
    is_causal: bool,
    scale: float | None,
    sliding_window: int | None,
    softcap: float | None,
    return_lse: bool,
) -> ScoreOptions:
    """The options of a call to which the query belongs.

    Raises:
        InputError: one of them is not what `suppressed_attention` takes.
    """
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


def check_backend(backend: str | None, query: Tensor) -> None:
    """Raises InputError or BackendUnavailableError if a backend was asked for that cannot run on the query's device."""
    if backend is not None and not torch.compiler.is_compiling():
        backends.load(backend, query.device.type)


def check_factor_values(factor: Tensor | None, query: Tensor) -> None:
    """Reads values, so only where that costs no device synchronisation."""
    if factor is None or factor.device.type != "cpu" or factor.numel() == 0:
        return
    lowest, highest = torch.aminmax(factor.detach())  # NaN propagates and fails both comparisons
    most = torch.finfo(wide_dtype(query.dtype)).max  # scores hold no more, whatever the factors' dtype
    if not (lowest >= 0 and highest <= most):
        bad = (factor.isnan().any() and "NaN") or (f"{lowest:g}" if lowest < 0 else f"{highest:g}")
        raise InputError(f"factor must be finite and >= 0 everywhere, got {bad}")
