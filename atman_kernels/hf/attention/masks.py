"""Masks as attention functions get them: in as little memory as their pattern allows."""

import math
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from atman_kernels.errors import InputError


def compact_mask(*, whole: bool = False, **kwargs: Any) -> Tensor | None:
    """A mask in as little memory as its pattern allows, in the forms that `AttentionCall` understands.

    None for plain causal attention aligned at the end, (B, 1, 1, S) for that with padding, an expanded
    (B, 1, T, S) for bidirectional attention, and the whole (B, 1, T, S) for every other pattern, or for causal ones
    too where `whole` asks for it.
    """
    pattern = kwargs.get("mask_function", causal_mask_function)
    queries, keys, batch = kwargs["q_length"], kwargs["kv_length"], kwargs["batch_size"]
    offset = kwargs.get("kv_offset", 0)
    padding = kwargs.get("attention_mask")
    if padding is not None:
        padding = padding[:, offset : offset + keys]
    if pattern is causal_mask_function and not whole:
        ends_together = offset + keys == kwargs.get("q_offset", 0) + queries  # not so with a static cache
        if ends_together and (padding is None or padding.shape[1] == keys):
            return None if padding is None else padding[:, None, None, :]
    if pattern is bidirectional_mask_function and (padding is None or padding.shape[1] == keys):
        if padding is None:
            padding = torch.ones(batch, keys, dtype=torch.bool, device=kwargs.get("device"))
        return padding[:, None, None, :].expand(batch, 1, queries, keys)
    mask: Tensor | None = sdpa_mask(**{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    return mask


def same_for_all_queries(mask: Tensor) -> bool:
    """Whether a mask (B, 1, 1|T, S) is one row of keys per sequence, as padding is."""
    return mask.shape[1] == 1 and (mask.shape[2] == 1 or mask.stride(2) == 0)


def additive(mask: Tensor) -> Tensor:
    """A mask as a float32 bias; transformers writes the dtype's minimum where it means -inf."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -math.inf)
    return mask.float().masked_fill(mask <= torch.finfo(mask.dtype).min, -math.inf)


def only_chosen(mask: Tensor | None, chosen: Tensor, keys: int) -> Tensor:
    """The mask (B, 1, T, S) without the keys that an indexer did not choose; chosen (B, T, k) are their indices."""
    if mask is None:
        raise InputError("an attention that chooses its keys came without a mask")
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    picked = torch.zeros(*chosen.shape[:2], keys, dtype=torch.bool, device=mask.device)
    return visible & picked.scatter_(-1, chosen.long(), True)[:, None]
