"""Log-probabilities without logits: the softmax over a vocabulary has the denominator of an attention to it.

    log p(t) = h · W_t − log Σ_v exp(h · W_v)

The second term is the lse that attention returns for the query h, the keys W and a scale of 1. The compiled kernel
multiplies bfloat16 exactly and adds up in float32, as a widened product does, and writes no product down: with AMX,
1,024 rows of SmolLM2's head took a ninth of the time of float32 logits (Sapphire Rapids, one thread).
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atman_kernels.backends.cpu import compiled
from atman_kernels.hf.replacement import has_hooks, is_rewritten
from atman_kernels.ops import suppressed_attention

FAST = ("amx", "avx512_bf16")  # instruction sets that multiply bfloat16 as it is
PROBE_ROWS = 2  # at most, of which the model makes logits, to see that they are its head's product
LEAST_ROWS = 16  # below which nothing is gained
CHOSEN_ROWS = 512  # weights of chosen tokens that are widened at a time
VALUE_WIDTH = 16  # of values that nobody reads


class FusedHead:
    """A head of which one call has been seen, in the forward that it is for.

    Args:
        weight: (vocabulary, H) bfloat16, on the CPU.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self._seen: tuple[Tensor, Tensor] | None = None

    def see(self, hidden: Tensor, logits: Tensor) -> None:
        """A call of the head: (B, R, H), and (B, R, vocabulary) before anybody can have changed them.

        Logits of one sequence are kept, since those of a batch of hundreds are large: a model treats all alike.
        """
        self._seen = (hidden, logits[:1].clone())

    def makes(self, logits: Tensor, states: Tensor) -> bool:
        """Whether logits that a model returned are this head's product of the layers' states, and nothing else.

        A model may scale or cap its logits, or do something to the states before.

        Args:
            logits: (B, R, vocabulary) of the call that was seen.
            states: (B, R, H) of the same rows.
        """
        if self._seen is None:
            return False
        (hidden, made), returned = self._seen, logits[:1]
        same_shapes = hidden.shape == states.shape and made.shape == returned.shape
        return same_shapes and torch.equal(hidden, states) and torch.equal(made, returned)

    def logprobs(self, states: Tensor, tokens: Tensor) -> Tensor:
        """(B, R) float32, of tokens (B, R) after states (B, R, H)."""
        rows = states.reshape(-1, states.shape[-1])
        values = self._weight.new_zeros(1, 1, len(self._weight), VALUE_WIDTH)
        keys = self._weight[None, None]
        _, lse = suppressed_attention(rows[None, None], keys, values, None, scale=1.0, return_lse=True, backend="cpu")
        chosen = [
            (part.float() * self._weight[own].float()).sum(-1)
            for part, own in zip(rows.split(CHOSEN_ROWS), tokens.reshape(-1).split(CHOSEN_ROWS), strict=True)
        ]
        return (torch.cat(chosen) - lse.flatten()).view(tokens.shape)


def fused_head(model: PreTrainedModel, n_rows: int) -> FusedHead | None:
    """The model's head, if its log-probs can be had without logits, and faster: a plain bfloat16 product on a fast CPU.

    Args:
        n_rows: how many log-probs are wanted.
    """
    head = model.get_output_embeddings()
    if n_rows < LEAST_ROWS or type(head) is not nn.Linear or head.bias is not None:
        return None
    weight = head.weight
    is_plain = type(weight) is nn.Parameter and not has_hooks(head) and not is_rewritten(head)
    if not is_plain or weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not weight.is_contiguous():
        return None
    return FusedHead(weight.detach()) if set(FAST) & set(compiled.instruction_sets(torch.bfloat16)) else None
