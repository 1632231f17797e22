"""Fused suppressed attention and exact, fast AtMan explanations for Hugging Face models.

Importing the package pulls in torch only; transformers and the rest come with the names that need them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_HOME = {
    "suppressed_attention": "ops",
    "packed_suppressed_attention": "ops",
    "VariantPack": "pack",
    "load_model": "hf.models.loading",
    "suppress": "hf.attention.suppression",
    "Explainer": "explain.explainer",
    "Explanation": "result.explanation",
    "Ablation": "result.ablation",
    "Unit": "planning.units",
    "steer": "steering.steer",
    "Steered": "steering.steer",
    "Occurrence": "steering.spans",
    "InputError": "errors",
    "UnsupportedModelError": "errors",
    "BackendUnavailableError": "errors",
    "Cancelled": "errors",
    "RankError": "errors",
}
__all__ = [
    "Ablation",
    "BackendUnavailableError",
    "Cancelled",
    "Explainer",
    "Explanation",
    "InputError",
    "Occurrence",
    "RankError",
    "Steered",
    "Unit",
    "UnsupportedModelError",
    "VariantPack",
    "__version__",
    "load_model",
    "packed_suppressed_attention",
    "steer",
    "suppress",
    "suppressed_attention",
]

if TYPE_CHECKING:
    from atman_kernels.errors import BackendUnavailableError, Cancelled, InputError, RankError, UnsupportedModelError
    from atman_kernels.explain.explainer import Explainer
    from atman_kernels.hf.attention.suppression import suppress
    from atman_kernels.hf.models.loading import load_model
    from atman_kernels.ops import packed_suppressed_attention, suppressed_attention
    from atman_kernels.pack import VariantPack
    from atman_kernels.planning.units import Unit
    from atman_kernels.result.ablation import Ablation
    from atman_kernels.result.explanation import Explanation
    from atman_kernels.steering.spans import Occurrence
    from atman_kernels.steering.steer import Steered, steer


def __getattr__(name: str) -> Any:
    if name in _HOME:
        found = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)  # asked for once
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
