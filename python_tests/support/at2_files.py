"""What methods need that read a file: weights of AT2 that count every head alike."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from atman_kernels.explain.head_weights import HeadWeights


def even_weights(model: PreTrainedModel, folder: Path) -> Path:
    """The file, for a model of the tests."""
    text = model.config.get_text_config()
    heads = torch.full((text.num_hidden_layers, text.num_attention_heads), 1.0)
    path = folder / f"{type(model).__name__}.safetensors"
    HeadWeights.of(model, heads / heads.sum(), {"prompts": 0}).save(path)
    return path


def options_for(method: str, model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    """Options that a method cannot do without."""
    return {"weights": even_weights(model, folder)} if method == "at2" else {}
