"""Triton backend: kernels for NVIDIA GPUs of compute capability 8.0 and newer, and for Triton's interpreter.

`forward` and `backward` are the kernels, `primitives` and `backward_steps` are what they are made of, `launch` and
`launch_backward` get tensors into them, `configs` says in which tiles.
Triton itself is imported when a call comes.
"""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from atman_kernels.formula import Saved, ScoreOptions

LEAST_CAPABILITY = (8, 0)
LARGEST_HEAD_DIM = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INDICES = ("suffix_starts", "prefix_lengths", "base_starts", "row_variant", "row_position")


def unavailable_reason(device_type: str) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed; pip install 'atman-kernels[triton]'"
    if _interpreting():
        return None
    if device_type != "cuda":
        return "it needs a CUDA device; TRITON_INTERPRET=1 in the environment tries it on a CPU"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device; TRITON_INTERPRET=1 in the environment tries it on a CPU"
    if torch.version.hip is not None:
        return "its configurations are for NVIDIA GPUs, and this is an AMD build of torch"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        return f"it needs compute capability 8.0, {torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}"
    return None


def unsupported_reason(query: Tensor, value: Tensor) -> str | None:
    if query.dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, not {str(query.dtype).removeprefix('torch.')}"
    for name, dim in (("query and key", query.shape[-1]), ("value", value.shape[-1])):
        if dim > LARGEST_HEAD_DIM:
            return f"it takes head dimensions up to {LARGEST_HEAD_DIM}, {name} have {dim}"
    return None


def suppressed_attention(
    query: Tensor,  # (B, Hq, Lq, D)
    key: Tensor,  # (1|B, Hkv, Lk, D)
    value: Tensor,  # (1|B, Hkv, Lk, Dv)
    factor: Tensor | None,  # (B, Lk) or (B, Hq, Lk)
    key_mask: Tensor | None,  # (B, Lk) bool
    sinks: Tensor | None,  # (Hq,)
    position_bias: Tensor | None,  # (1|B, 1|Hq, 1|Lq, 1|Lk)
    options: ScoreOptions,
) -> tuple[Tensor, Tensor]:
    from atman_kernels.backends.triton import launch

    extras = launch.Extras(factor, key_mask, sinks, position_bias)
    return launch.attend(query, key, value, None, extras, options)


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
    factor: Tensor | None,  # (V, K) or (V, Hq, K)
    sinks: Tensor | None,  # (Hq,)
    position_bias: Tensor | None,  # (1|Hq, 1|P, 1|P)
    options: ScoreOptions,
) -> tuple[Tensor, Tensor]:
    from atman_kernels.backends.triton import launch

    layout = launch.Layout(key[None], value[None], suffix_starts, prefix_lengths, base_starts, row_variant)
    extras = launch.Extras(factor, None, sinks, None if position_bias is None else position_bias[None])
    output, lse = launch.attend(query[None], base_key[None], base_value[None], layout, extras, options)
    return output[0], lse[0] if options.return_lse else lse


def suppressed_attention_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    factor: Tensor | None,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    position_bias: Tensor | None,
    *,
    options: ScoreOptions,
    saved: Saved,
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    from atman_kernels.backends.triton import launch, launch_backward

    names = ("query", "key", "value", "factor", "key_mask", "sinks", "bias")
    asked = {name: want for name, want in zip(names, wanted, strict=True) if name != "key_mask"}
    extras = launch.Extras(factor, key_mask, sinks, position_bias)
    found = launch_backward.gradients(query, key, value, None, extras, options, saved, launch_backward.Wanted(**asked))
    return [found.get(name) for name in names]


def packed_suppressed_attention_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    base_key: Tensor,
    base_value: Tensor,
    suffix_starts: Tensor,
    prefix_lengths: Tensor,
    base_starts: Tensor,
    row_variant: Tensor,
    row_position: Tensor,
    factor: Tensor | None,
    sinks: Tensor | None,
    position_bias: Tensor | None,
    *,
    options: ScoreOptions,
    saved: Saved,
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    from atman_kernels.backends.triton import launch, launch_backward

    names = ("query", "own_key", "own_value", "key", "value", *INDICES, "factor", "sinks", "bias")
    asked = {name: want for name, want in zip(names, wanted, strict=True) if name not in INDICES}
    layout = launch.Layout(key[None], value[None], suffix_starts, prefix_lengths, base_starts, row_variant)
    extras = launch.Extras(factor, None, sinks, None if position_bias is None else position_bias[None])
    batched = Saved(
        saved.output[None],
        saved.lse[None],
        saved.grad_output[None],
        None if saved.grad_lse is None else saved.grad_lse[None],
    )
    found = launch_backward.gradients(
        query[None], base_key[None], base_value[None], layout, extras, options, batched, launch_backward.Wanted(**asked)
    )
    for name in found.keys() - {"factor", "sinks"}:  # those have no batch axis in a pack
        found[name] = found[name][0]
    return [found.get(name) for name in names]


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
