"""All that could be left changed in a model and around it."""

import random

import numpy as np
import torch
import transformers as hf


def snapshot(model) -> dict:
    """All that could be left changed, in terms that can be compared."""
    return {
        "training": {name: module.training for name, module in model.named_modules()},
        "attributes": {name: {k: id(v) for k, v in m.__dict__.items()} for name, m in model.named_modules()},
        "hooks": {
            name: [list(getattr(module, kind).values()) for kind in sorted(module.__dict__) if kind.endswith("_hooks")]
            for name, module in model.named_modules()
        },
        "attention": [m.config._attn_implementation for m in model.modules() if isinstance(m, hf.PreTrainedModel)],
        "generation": model.generation_config.to_dict() if model.can_generate() else None,
        "config": model.config.to_dict(),
        "gradients": {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()},
        "weights": {name: p._version for name, p in model.named_parameters()},
        "random": (
            random.getstate(),
            np.random.get_state(legacy=False)["state"]["key"].tolist(),
            torch.get_rng_state().tolist(),
        ),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()),
    }
