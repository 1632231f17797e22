"""Full rows of an encoder or an encoder-decoder under factors of what it reads.

SigLIP pools its patches inside torch's own `nn.MultiheadAttention`, past transformers' interface.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from atman_kernels.errors import UnsupportedModelError
from atman_kernels.hf.attention.calls import AttentionCall
from atman_kernels.hf.attention.suppressed_runs import SourceRun, SuppressedRun
from atman_kernels.hf.models.parts import is_encoder_decoder
from atman_kernels.hf.replacement import replaced
from atman_kernels.hf.scope import Scope


def encoder_run(part: PreTrainedModel, factor: Tensor | None, **options: Any) -> SuppressedRun:
    """A run over whole rows of a part that reads its input in both directions.

    Args:
        part: an encoder, or an encoder-decoder, whose attention to its source is suppressed.
        factor: (V, L) over the positions of the encoder; None: our attention without any.
        options: of `SuppressedRun`.
    """
    return SourceRun(part, factor, **options) if is_encoder_decoder(part) else EncoderRun(factor, **options)


class EncoderRun(SuppressedRun):
    """An encoder's attention under factors, that of its pooling head included."""

    @contextmanager
    def hooks(self, part: PreTrainedModel, scope: Scope) -> Iterator[None]:
        """In the scope, every `nn.MultiheadAttention` of the part goes through the run, as its other attention does."""
        with ExitStack() as stack:
            for module in part.modules():
                if isinstance(module, nn.MultiheadAttention):
                    stack.enter_context(replaced(module, scope, partial(_attend, module, self)))
            yield


def _attend(
    module: nn.MultiheadAttention,
    run: SuppressedRun,
    own: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    **options: Any,
) -> tuple[Tensor, None]:
    """What the module computes for (B, T, E) and (B, S, E), scores changed by the run."""
    plain = module.in_proj_weight is not None and module.bias_k is None and not module.add_zero_attn
    masked = any(options.get(name) is not None for name in ("attn_mask", "key_padding_mask")) or options.get(
        "is_causal"
    )
    if not plain or not module.batch_first or masked:
        raise UnsupportedModelError("the model pools with a masked or unusual nn.MultiheadAttention")
    weights = module.in_proj_weight.chunk(3)
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    q, k, v = (
        nn.functional.linear(states, weight, bias).reshape(*states.shape[:2], module.num_heads, -1).transpose(1, 2)
        for states, weight, bias in zip((query, key, value), weights, biases, strict=True)
    )
    call = AttentionCall(q, k, v, None, False, None, None, None, None, None)
    return module.out_proj(run.attend(module, call).flatten(2)), None
