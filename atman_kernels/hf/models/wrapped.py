"""The transformers model inside what `torch.compile` and peft put around one."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from atman_kernels.errors import UnsupportedModelError


def unwrapped(model: Any) -> Any:
    """The model whose layers run, with the adapters that are active in them; anything else as it is.

    peft puts most adapters (LoRA and its kin) into the base model's layers, whose forward then has them. What does
    more than that around the base model is refused: virtual tokens, routers, adapters that wait for certain tokens.

    Raises:
        UnsupportedModelError: the base model alone does not compute what the wrapped one does.
    """
    while not isinstance(model, PreTrainedModel):
        if hasattr(model, "_orig_mod"):  # of torch.compile(model)
            model = model._orig_mod
        elif isinstance(model, nn.Module) and hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
            _check_adapters(model)
            model = model.get_base_model()  # type: ignore[operator]
        else:
            break
    return model


def _check_adapters(model: Any) -> None:
    active: Any = getattr(model, "active_adapters", None) or getattr(model, "active_adapter", None) or ()
    names = [active] if isinstance(active, str) else list(active)
    for config in (model.peft_config[name] for name in names if name in model.peft_config):
        kind = str(getattr(config, "peft_type", "adapter")).rsplit(".", 1)[-1]
        forward = type(model.base_model).forward  # the tuner's, which for adapters inside the layers is peft's own
        reason = None
        if getattr(config, "is_prompt_learning", False):
            reason = "puts virtual tokens before the prompt"
        elif getattr(config, "alora_invocation_tokens", None):
            reason = "acts from certain tokens on"
        elif kind == "POLY" or not forward.__qualname__.startswith("BaseTuner."):
            reason = "does more than its base model's layers do"
        if reason is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be explained or suppressed: its adapter ({kind}) {reason}; "
                "model.get_base_model() is the model without it"
            )
