"""What quantised layers do to the activations that they are given: how coarsely, and whether rows share a scale.

Packages are told by the names of their classes: none is imported for it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from atman_kernels.hf.models.parts import computing_dtype

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
# of transformers' own, which round the activations of each token to 8 bits
ROUNDING_LAYERS = ("AutoBitLinear", "BitLinear", "FP8Linear", "FbgemmFp8Linear")


def why_rows_do_not_mix(model: nn.Module) -> str | None:
    """What makes a row's result depend on the rows beside it; None if nothing is known to.

    Quantised activations may share a scale, or a choice of outliers, over all rows of a product.
    """
    for module in model.modules():
        name = type(module).__name__
        if _is_dynamic_in_torch(module):
            return f"{name}, dynamically quantised, has one scale for the activations of all rows"
        if _is_of(module, "bitsandbytes", "Linear8bitLt"):
            threshold = getattr(getattr(module, "state", None), "threshold", None)
            if threshold != 0:  # which switches it off
                return f"{name} chooses the outliers of its activations over all rows"
        for weight, how in _activations(module):
            if getattr(weight, "act_quant_scale", None) is None and _is_per_tensor(how):
                return f"{name}, of a {type(weight).__name__}, has one scale for the activations of all rows"
    return None


def rounding_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype whose rounding a model's products have.

    That in which it computes, or bfloat16 where layers of a wider model round activations to 16 or 8 bits: two ways to
    compute the same differ by what float32 would round, and that may be all the difference between two neighbours on
    such a grid.
    """
    dtype = computing_dtype(model)
    return torch.bfloat16 if any(_rounds(module) for module in model.modules()) else dtype


def _rounds(module: Any) -> bool:
    if _is_of(module, "bitsandbytes", "Linear4bit"):
        in_16_bits = getattr(module, "compute_dtype", None) in SIXTEEN_BITS
        on_cpu = module.weight.device.type == "cpu" and getattr(module, "support_avx512bf16_for_cpu", False)
        return in_16_bits or on_cpu
    return (
        _is_dynamic_in_torch(module)
        or _is_of(module, "bitsandbytes", "Linear8bitLt")
        or (type(module).__module__.startswith("transformers.") and type(module).__name__ in ROUNDING_LAYERS)
        or getattr(module, "activation_qtype", None) is not None  # quanto
        or next(_activations(module), None) is not None
    )


def _activations(module: Any) -> Iterator[tuple[Any, Any]]:
    """What holds the way in which a layer's activations are quantised, and that way: torchao, compressed-tensors."""
    weight = getattr(module, "weight", None)
    for name in ("act_quant_kwargs", "activation_quantization"):
        how = getattr(weight, name, None)
        if how is not None:
            yield weight, how
    how = getattr(getattr(module, "quantization_scheme", None), "input_activations", None)
    if how is not None:
        yield module, how


def _is_per_tensor(how: Any) -> bool:
    """Of a scale that is found out in every product, over all of its rows."""
    if getattr(how, "dynamic", True) is False:
        return False
    granularity = type(getattr(how, "granularity", None)).__name__
    strategy = getattr(how, "strategy", None)
    return granularity == "PerTensor" or str(getattr(strategy, "value", strategy)) == "tensor"


def _is_dynamic_in_torch(module: nn.Module) -> bool:
    home = type(module).__module__
    return home.startswith(("torch.ao.nn.quantized.dynamic", "torch.ao.nn.intrinsic.quantized.dynamic"))


def _is_of(module: nn.Module, package: str, name: str) -> bool:
    """Whether a module is of a package's class, or of one made from it."""
    return any(kind.__name__ == name and kind.__module__.startswith(package) for kind in type(module).__mro__)
