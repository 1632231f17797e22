"""Every variant as a whole row of a batch: what packing replaces, and what serves where packing cannot."""

from collections.abc import Iterable

from torch import Tensor
from transformers import PreTrainedModel

from atman_kernels.hf.attention.vision import ImageTextRun
from atman_kernels.hf.forward.logprobs import input_logprobs
from atman_kernels.hf.models.model_input import ModelInput, WithPixels, whole_inputs


def full_row_logprobs(
    model: PreTrainedModel,
    ids: ModelInput | WithPixels,
    factor: Tensor,
    rows: Tensor,
    targets: Tensor,
    *,
    mode: str,
    layers: Iterable[int] | None = None,
) -> Tensor:
    """Every variant as a whole row of a batch: what packing replaces, and what serves where packing cannot.

    Args:
        ids: (L,) token ids, or what stands for them, the same for all variants. With images still to be seen, the
            vision encoder runs for every variant, suppressed likewise.
        factor: (V, L).
        rows, targets: (R,), the same for all variants.

    Returns:
        (V, R) log-probs.
    """
    variants = factor.shape[0]
    run = ImageTextRun(model, ids, factor, mode=mode, layers=layers)
    with run.installed(model) as scope:
        return input_logprobs(model, ids, whole_inputs(ids, variants), rows, targets.expand(variants, -1), scope)
