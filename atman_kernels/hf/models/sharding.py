"""How a model's weights lie on the ranks that share it: rows of a head, heads of an attention, layers."""

from typing import Any

import torch
from torch import Tensor, nn

from atman_kernels.errors import UnsupportedModelError
from atman_kernels.hf.models.ranks import ranks_of


def _is_sharded(parameter: Tensor, dim: int | None = None) -> bool:
    """Whether ranks have different parts of a parameter, along a dimension if one is given."""
    placements = getattr(parameter, "placements", ())
    return any(each.is_shard(dim) for each in placements)


def own_rows(weight: Any) -> Any:
    """The rows of a linear layer's weight, or of its bias, that this rank has; None where it is cut in another way."""
    placements = getattr(weight, "placements", None)
    if placements is None:
        return weight
    return weight.to_local() if len(placements) == 1 and placements[0].is_shard(0) else None


def gathered(outputs: Tensor, weight: Any, size: int) -> Tensor:
    """What a linear layer gives, (…, size), of what each rank's rows of its weight give."""
    if not hasattr(weight, "placements"):
        return outputs
    from torch.distributed.tensor import DTensor, Shard

    shape = torch.Size((*outputs.shape[:-1], size))
    stride = torch.empty(shape, device="meta", dtype=outputs.dtype).stride()
    whole = DTensor.from_local(outputs, weight.device_mesh, [Shard(-1)], run_check=False, shape=shape, stride=stride)
    return whole.full_tensor()


def has_heads_of_its_own(attention: nn.Module) -> bool:
    """Whether each tensor-parallel rank computes some of an attention module's heads; otherwise all compute all."""
    return any(_is_sharded(parameter, 0) for parameter in attention.parameters())


def check_sharding(model: nn.Module, decoder: nn.Module) -> None:
    """Raises UnsupportedModelError where heads or layers cannot be dealt out to the ranks."""
    ranks = ranks_of(model)
    config: Any = decoder.config
    layers = getattr(config, "num_hidden_layers", None)
    name = type(model).__name__
    if ranks.stage is not None and layers is not None and layers < ranks.stage.pp_size:
        raise UnsupportedModelError(
            f"{name} cannot be explained or suppressed: it has {layers} layers, too few for {ranks.stage.pp_size} "
            "pipeline stages"
        )
    if ranks.tensor[1] == 1:
        return
    heads = getattr(config, "num_attention_heads", None)
    for kind, count in (("attention", heads), ("key-value", getattr(config, "num_key_value_heads", None) or heads)):
        uneven = isinstance(count, int) and count % ranks.tensor[1]
        keys = _sharded_projections(model, decoder) if uneven else []
        if keys:
            from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

            plan = ", ".join(f'"{key}": "replicate"' for key in keys)
            size = ranks.tensor[1]
            advice = f"keep its attention whole on every rank, by DistributedConfig(tp_size={size}, tp_plan={{{plan}}})"
            if "replicate" not in ALL_PARALLEL_STYLES:
                advice = 'take as many as do, or a transformers in whose plans there is a style "replicate"'
            raise UnsupportedModelError(
                f"{name} cannot be explained or suppressed on {size} tensor-parallel ranks, which do not divide its "
                f"{count} {kind} heads; {advice}"
            )


def _sharded_projections(model: nn.Module, decoder: nn.Module) -> list[str]:
    """By the names that transformers' plans give them: what is sharded in attention modules with sharded heads."""
    inside = {id(module) for module in decoder.modules()}
    found: dict[str, None] = {}
    for name, module in model.named_modules():
        if id(module) not in inside or "att" not in name.rpartition(".")[2] or not has_heads_of_its_own(module):
            continue
        for child, part in module.named_modules():
            if any(_is_sharded(parameter) for parameter in part.parameters(recurse=False)):
                places = f"{name}.{child}".strip(".").split(".")
                found[".".join("*" if place.isdigit() else place for place in places)] = None
    return list(found)
