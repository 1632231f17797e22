"""Fused suppressed attention: each key's score is scaled by a factor before the softmax.

`suppressed_attention` and `packed_suppressed_attention` are the ops, in Triton on NVIDIA GPUs and in PyTorch anywhere.
`attention` is a function for transformers' attention interface, `suppress` says what it scales. Written by the program
`kernel_hub` of atman-kernels, whose docs say more.
"""

from .attention import attention, register, suppress
from .backends import availability
from .errors import BackendUnavailableError, InputError, UnsupportedModelError
from .ops import packed_suppressed_attention, suppressed_attention
from .pack import VariantPack

# By these names transformers knows that a kernel from the hub brings an attention function of its own.
flash_attn_forward, supports_flash_attn = attention, True

__all__ = [
    "BackendUnavailableError",
    "InputError",
    "UnsupportedModelError",
    "VariantPack",
    "attention",
    "availability",
    "packed_suppressed_attention",
    "register",
    "suppress",
    "suppressed_attention",
]
