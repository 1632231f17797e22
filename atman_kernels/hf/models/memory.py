"""Memory: how much is free, what a token of a forward takes, and what running out of it looks like."""

import torch
from torch import nn
from transformers import PreTrainedModel

from atman_kernels.hf.models.parts import text_stack
from atman_kernels.hf.models.placement import devices_of


def free_bytes(model: nn.Module) -> int:
    """Bytes that can still be allocated wherever a model runs: of several devices, on the one with the fewest."""
    return min(_free_on(device) for device in devices_of(model))


def _free_on(device: torch.device) -> int:
    """On one device, torch's own unused reserve included."""
    if device.type != "cuda":
        import psutil  # not needed where there is a GPU, on machines with little else than torch

        return int(psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def activation_bytes_per_token(model: PreTrainedModel) -> int:
    """Peak activations of one token in a forward without gradients, generously.

    At most a few tensors of the hidden, intermediate and attention widths live at once; norms and rotary
    embeddings compute in float32. Mixtures of experts hold the intermediate width once per chosen expert.
    """
    config = text_stack(model).config
    hidden = int(config.hidden_size)
    widths = getattr(config, "intermediate_size", None) or 0  # Gemma 3n gives one per layer
    intermediate = max(4 * hidden, *widths) if isinstance(widths, list) else max(4 * hidden, widths)
    experts = int(getattr(config, "num_experts_per_tok", 1) or 1)
    # some configs give sizes per layer, and refuse to be asked for one
    layers = list(getattr(config, "per_layer_config", None) or [config])
    heads = max(int(getattr(x, "num_attention_heads", 1)) * int(getattr(x, "head_dim", 0) or 0) for x in layers)
    return 4 * (6 * hidden + 3 * intermediate * experts + 6 * max(hidden, heads))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an allocation failed, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
