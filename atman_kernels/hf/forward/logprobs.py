"""Log-probabilities of given tokens at given rows of a forward, in float32 (float64 for float64 models).

No forward holds logits for more than a few rows at once.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atman_kernels.formula import wide_dtype, widened
from atman_kernels.hf.forward.fused_head import PROBE_ROWS, FusedHead, fused_head
from atman_kernels.hf.models.model_input import (
    Embedded,
    ModelInput,
    WithPixels,
    reader_of,
)
from atman_kernels.hf.models.parts import computing_dtype, decoder_of, text_stack
from atman_kernels.hf.models.placement import input_device
from atman_kernels.hf.models.quantised import why_rows_do_not_mix
from atman_kernels.hf.models.ranks import ranks_of
from atman_kernels.hf.models.sharding import gathered, own_rows
from atman_kernels.hf.replacement import has_hooks, innermost_forward, is_rewritten, replaced
from atman_kernels.hf.scope import Scope

LOGITS_BYTES = 8 << 20  # float32 logits of one chunk of rows
WIDENED_ROWS = 512  # of a 16-bit head's weights at a time; larger pieces leave larger holes in the heap


def input_logprobs(
    model: PreTrainedModel,
    read: ModelInput | WithPixels,
    arguments: dict[str, Tensor],
    rows: Tensor,
    targets: Tensor,
    scope: Scope,
) -> Tensor:
    """(B, R) log-probs of `targets` (B, R) at `rows` (R,), by whichever part of the model makes logits of its input.

    Args:
        read: what the model reads, of which `arguments` are made.
        arguments: the model's, for a batch of B sequences.
        scope: the forward's.
    """
    with later_features(model, read, scope, len(targets)):
        return logprobs_of(reader_of(model, read), arguments, rows, targets)


def logprobs_of(model: PreTrainedModel, inputs: dict[str, Tensor], rows: Tensor, targets: Tensor) -> Tensor:
    """(B, R) log-probs of `targets` (B, R) at `rows` (R,) of every sequence in the batch.

    The model's own head makes the logits, a few rows at a time over one run of its layers. Where the first rows show
    that they are a plain product, and there is a faster way to the log-probs of one, the other rows go that way.
    """
    vocabulary = int(getattr(text_stack(model).config, "vocab_size", 1 << 16))
    step = max(1, LOGITS_BYTES // (4 * vocabulary * targets.shape[0]))
    # a head whose rows depend on one another is given all of them, as in a forward of the user's
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters and why_rows_do_not_mix(model) is None
    fused, ranks = None, ranks_of(model)
    if not keeps or _is_watched_outside_its_layers(model):
        step = max(1, len(rows))
    elif ranks.size == 1 and len(rows) > PROBE_ROWS:
        fused = fused_head(model, targets.numel())
    pieces, first = [], 0
    # tensors of other packages, such as quantised weights, refuse inference_mode
    with (
        torch.no_grad(),
        Scope() as scope,
        states_with_inputs(model, scope),
        _layers_run_once(model, scope) as outputs,
        head_in_float32(model, scope, fused),
        ranks.forward(),
        ranks.logits_staying(),
    ):
        while first < len(rows):
            chunk = rows[first : first + (min(PROBE_ROWS, step) if fused else step)]
            keep = {"logits_to_keep": chunk} if keeps else {}
            logits = model(**inputs, use_cache=False, return_dict=True, **keep).logits
            tokens = targets[:, first : first + len(chunk)]
            first += len(chunk)
            if logits is None:  # they are on the last pipeline stage
                pieces.append(torch.zeros_like(tokens, dtype=wide_dtype(model.dtype)))
                continue
            states = None if fused is None else _plain_states(fused, outputs, chunk, logits)
            pieces.append(_log_softmax_at(tokens, logits if keeps else logits[:, chunk]))
            if fused is not None and states is not None:
                pieces.append(fused.logprobs(states[:, rows[first:]], targets[:, first:]))
                break
            fused = None
    return ranks.shared(torch.cat(pieces, dim=1))


def _plain_states(fused: FusedHead, outputs: list[Any], rows: Tensor, logits: Tensor) -> Tensor | None:
    """(B, L, H) the layers' states, if logits of these rows of them are the head's product and nothing else."""
    states = getattr(outputs[0], "last_hidden_state", None) if outputs else None
    return states if states is not None and fused.makes(logits, states[:, rows]) else None


def _is_watched_outside_its_layers(model: PreTrainedModel) -> bool:
    """Whether hooks would run as often as logits are made: they are to run once."""
    inside = {id(module) for child in model.base_model.children() for module in child.modules()}
    return any(has_hooks(module) for module in model.modules() if id(module) not in inside)


def _log_softmax_at(tokens: Tensor, logits: Tensor) -> Tensor:
    """(B, R) log-probs of `tokens` (B, R) under `logits` (B, R, vocabulary), which are used up: no second copy."""
    logits = widened(logits)
    highest = logits.amax(dim=-1, keepdim=True)
    chosen = logits.gather(-1, tokens[..., None]) - highest
    return (chosen - logits.sub_(highest).exp_().sum(dim=-1, keepdim=True).log()).squeeze(-1)


@contextmanager
def _layers_run_once(model: PreTrainedModel, scope: Scope) -> Iterator[list[Any]]:
    """Calls of `model` in the scope compute its layers once; later ones differ in their head's rows only.

    Yields:
        their output, once it is there; nothing where the model is its layers alone.
    """
    body = model.base_model
    outputs: list[Any] = []
    if body is model:
        yield outputs
        return

    def once(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not outputs:
            outputs.append(own(*args, **kwargs))
        return outputs[0]

    with replaced(body, scope, once):
        yield outputs


@contextmanager
def states_with_inputs(model: PreTrainedModel, scope: Scope) -> Iterator[None]:
    """In the scope, the layers' states come back to the device of the inputs, on which rows of them are chosen."""
    body, device = model.base_model, input_device(model)
    if body is model or not hasattr(model, "_hf_hook"):  # which accelerate puts around the parts
        yield
        return

    def brought(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state.to(device)
        return output

    with replaced(body, scope, brought):
        yield


@contextmanager
def later_features(
    model: PreTrainedModel, sequence: ModelInput | WithPixels, scope: Scope, batch: int = 1
) -> Iterator[None]:
    """In the scope, the decoder is given what it adds after its first layers; see `Embedded.later`.

    The model itself makes these features from pixels, which a run over embeddings does not have.
    """
    if not isinstance(sequence, Embedded) or not sequence.later:
        yield
        return
    everywhere = torch.ones(batch, len(sequence), dtype=torch.bool, device=input_device(model))
    features = [rows.repeat(batch, 1) for rows in sequence.later]

    def with_features(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = {"visual_pos_masks": everywhere, "deepstack_visual_embeds": features}
        return own(*args, **kwargs | given)

    with replaced(decoder_of(model), scope, with_features):
        yield


@contextmanager
def head_in_float32(model: PreTrainedModel, scope: Scope, fused: FusedHead | None = None) -> Iterator[None]:
    """The last product of a 16-bit model with float32 logits, in the scope.

    A logit of 20 is a multiple of 1/8 in bfloat16: rounding it would add more noise to a loss than all layers do.
    The weights are widened a few rows at a time. A head whose forward somebody else has replaced computes as it does;
    accelerate's hooks, which bring weights that lie elsewhere, stay in charge.

    Args:
        fused: is shown what the head makes of what.
    """
    head = model.get_output_embeddings()
    is_16_bit = computing_dtype(model) in (torch.bfloat16, torch.float16)
    if type(head) is not nn.Linear or not is_16_bit or is_rewritten(head):
        yield
        return

    def wide(own: Callable[..., Tensor], hidden: Tensor) -> Tensor:
        if head.weight.is_meta:  # brought by something that wraps the weight's use, not this call
            return own(hidden)
        weights, biases = own_rows(head.weight), own_rows(head.bias)
        if weights is None or (weights is not head.weight and torch.is_grad_enabled()):
            return own(hidden)  # which knows how the weight lies on several ranks, and the way back
        given, hidden = hidden, hidden.float()
        logits = hidden.new_empty(*hidden.shape[:-1], len(weights))
        with torch.autocast(hidden.device.type, enabled=False):
            for first in range(0, len(weights), WIDENED_ROWS):
                part = slice(first, first + WIDENED_ROWS)
                bias = None if biases is None else biases[part].float()
                logits[..., part] = nn.functional.linear(hidden, weights[part].float(), bias)
        if fused is not None:
            fused.see(given, logits)
        return gathered(logits, head.weight, head.out_features)

    with replaced(head, scope, wide, innermost_forward(head)):
        yield
