"""AttnLRP (Achtibat et al., arXiv 2402.05602): the target's logit, propagated back by rules instead of by gradients.

Relevance is embedding · gradient, so every rule of the paper becomes a change of one gradient (its "efficient" form):

| where | rule | gradient |
|---|---|---|
| linear map, residual sum, rotary embedding | ε → 0 | its own |
| elementwise activation f | identity: the relevance passes whole | f(x) / x |
| normalisation | identity on the division by its statistic | as if the statistic were a constant |
| gate ⊙ up | half to each factor | halved |
| softmax(QKᵀ) | Taylor | its own |
| the products A · V and Q · Kᵀ | half to each factor | v halved; q and k halved twice, once per product |

Attention itself is touched at its inputs only, so a fused function stays usable. Nothing of the model is replaced for
good: the rules stand in for forwards, and a run for attention, while the scores are computed and for no other caller.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2CLS
from transformers.pytorch_utils import Conv1D

from atman_kernels.errors import UnsupportedModelError
from atman_kernels.explain.methods import TokenScores
from atman_kernels.formula import widened
from atman_kernels.hf.attention.calls import AttentionCall
from atman_kernels.hf.attention.switch import Run
from atman_kernels.hf.forward.gradients import differentiable_run, differentiation, target_gradients
from atman_kernels.hf.models.parts import decoder_of
from atman_kernels.hf.replacement import replaced
from atman_kernels.inputs.text_generation import CausalObjective

# model_type of the decoder -> name of the linear map that reads a gated product; None where nothing is gated
FAMILIES: dict[str, str | None] = {
    "llama": "down_proj",
    "mistral": "down_proj",
    "qwen2": "down_proj",
    "qwen3": "down_proj",
    "gemma": "down_proj",
    "gemma3_text": "down_proj",
    "phi3": "down_proj",
    "olmo2": "down_proj",
    "smollm3": "down_proj",
    "gpt2": None,
    "gpt_neox": None,
}
_LINEAR = (nn.Linear, Conv1D, nn.Embedding, nn.Dropout, nn.Identity)  # the gradient is the rule
_EMPTY = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)  # no forward: what peft's adapters may use
_ACTIVATIONS: tuple[type[nn.Module], ...] = tuple({c if isinstance(c, type) else c[0] for c in ACT2CLS.values()})
ROUNDING = 8  # how many epsilons of its dtype a normalisation may differ from what its rule takes it for


def attnlrp(
    model: PreTrainedModel, question: CausalObjective, *, whole_answer: bool = False, checkpointing: bool = False
) -> TokenScores:
    """Relevance of each input token for each target token's logit.

    A column adds up to the logit, less what the softmax of each layer and additive biases absorb (position embeddings
    are such a bias). Cost: one forward and m backward passes, with fused attention; the graph of all layers, or with
    `checkpointing` that of one layer and the inputs of all.

    Args:
        whole_answer: one column, the sum of the m, in one backward pass.
        checkpointing: compute the layers again on the way back instead of keeping their activations.

    Returns:
        scores (L, m or 1) over the model's inputs, in units of the logit; log-probs (m,) of the target.

    Raises:
        UnsupportedModelError: there are no rules for this model's family, or for some module of this model.
    """
    with differentiation(model, checkpointing=checkpointing), rules(model):
        run = differentiable_run(model, question.ids[:-1], question.rows, question.targets)
        embeddings = run.embeddings.detach()[0].to(run.logits.dtype)  # (L, H)
        gradients = target_gradients(run.logits, [run.embeddings], whole_answer=whole_answer)
        columns = [(embeddings * gradient[0].to(embeddings.dtype)).sum(-1) for (gradient,) in gradients]
    return TokenScores(torch.stack(columns, dim=1), run.logprobs[0].detach())


@contextmanager
def rules(model: PreTrainedModel) -> Iterator[None]:
    """Gradients of `model` are AttnLRP's inside; its values are what they were.

    Raises:
        UnsupportedModelError: see `attnlrp`.
    """
    found = _rules(decoder_of(model))  # refuses before anything is changed
    with ExitStack() as stack:
        scope = stack.enter_context(_AttentionRules(type(model).__name__).installed(model))
        for module, rule in found:
            stack.enter_context(replaced(module, scope, partial(rule, module)))
        yield


def _rules(decoder: PreTrainedModel) -> list[tuple[nn.Module, Callable[..., Tensor]]]:
    """(module, its forward by the rule) for every module that has a rule of its own."""
    config, name = decoder.config, type(decoder).__name__
    if config.model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"{name} has no AttnLRP rules: they are known for {', '.join(FAMILIES)}, not for {config.model_type!r}"
        )
    if getattr(config, "final_logit_softcapping", None):
        raise UnsupportedModelError(f"{name} has no AttnLRP rules: its head caps the logits")
    gated = FAMILIES[config.model_type]
    found: list[tuple[nn.Module, Callable[..., Tensor]]] = []
    for path, module in decoder.named_modules():
        if isinstance(module, nn.LayerNorm):
            found.append((module, _layer_norm))
        elif type(module).__name__.endswith("RMSNorm"):
            found.append((module, _rms_norm))
        elif isinstance(module, _ACTIVATIONS):
            found.append((module, _activation))
        elif gated is not None and path.endswith(f".{gated}"):
            found.append((module, _halved))
        elif not any(True for _ in module.children()) and not _passes_gradient(module):
            raise UnsupportedModelError(f"{name} has no AttnLRP rules: {path} is a {type(module).__name__}")
    return found


def _passes_gradient(module: nn.Module) -> bool:
    return isinstance(module, _LINEAR + _EMPTY) or type(module).__name__.endswith("RotaryEmbedding")


class _Secant(torch.autograd.Function):
    """`value`, as if it had been x times constant slopes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, *slopes: Tensor) -> Tensor:
        ctx.save_for_backward(*slopes)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        slopes = ctx.saved_tensors  # once: checkpoints hand them out no second time
        for slope in slopes:
            gradient = gradient * slope
        return (gradient, *(None,) * (1 + len(slopes)))


def _with_slope(x: Tensor, value: Tensor, *slopes: Tensor) -> Tensor:
    return _Secant.apply(x, value.detach(), *(s.detach().to(x.dtype) for s in slopes))  # type: ignore[no-any-return, no-untyped-call]


def _scaled_gradient(x: Tensor, by: float) -> Tensor:
    return _with_slope(x, x, x.new_tensor(by))


def _halved(module: nn.Module, own: Callable[..., Tensor], given: Tensor) -> Tensor:
    return own(_scaled_gradient(given, 0.5))


def _activation(module: nn.Module, own: Callable[..., Tensor], given: Tensor) -> Tensor:
    with torch.no_grad():
        output = own(given)
        slope = (output / given).masked_fill_(given == 0, 0.0)
    return _with_slope(given, output, slope)


def _rms_norm(module: nn.Module, own: Callable[..., Tensor], given: Tensor) -> Tensor:
    with torch.no_grad():
        output, x = own(given), widened(given)
        eps = float(getattr(module, "variance_epsilon", getattr(module, "eps", 0.0)))
        # whatever a family makes of its weight (Gemma adds 1), of ones it makes that
        scale = own(torch.ones_like(given[..., :1, :])) * (1 + eps) ** 0.5
        slope = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        _check_rule(module, (x * slope).mul_(scale), output)
    return _with_slope(given, output, slope, scale)


def _layer_norm(module: nn.Module, own: Callable[..., Tensor], given: Tensor) -> Tensor:
    assert isinstance(module, nn.LayerNorm)
    centred = given - given.mean(-1, keepdim=True)  # linear, so the gradient goes through it
    with torch.no_grad():
        output, wide = own(given), widened(centred)
        slopes = [torch.rsqrt(wide.square().mean(-1, keepdim=True) + module.eps)]
        slopes += [] if module.weight is None else [module.weight]
        expected = wide * slopes[0] if module.weight is None else (wide * slopes[0]).mul_(module.weight)
        _check_rule(module, expected if module.bias is None else expected + module.bias, output)
    return _with_slope(centred, output, *slopes)


def _check_rule(module: nn.Module, expected: Tensor, output: Tensor) -> None:
    """Refuses a normalisation that computes something else than its rule supposes."""
    error = float((expected - output).abs_().amax())
    eps = max(torch.finfo(output.dtype).eps, torch.finfo(torch.float32).eps)  # families compute in float32 at most
    if not error <= ROUNDING * eps * (1 + float(output.abs().amax())):
        raise UnsupportedModelError(
            f"{type(module).__name__} has no AttnLRP rule: it is no plain normalisation, from which it differs by "
            f"{error:.2g}"
        )


class _AttentionRules(Run):
    """Fused attention whose inputs get AttnLRP's shares."""

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        if call.softcap is not None or call.sinks is not None or call.position_bias is not None:
            raise UnsupportedModelError(
                f"{self.model_name} has no AttnLRP rules: its attention has a softcap, sinks or a position bias"
            )
        query, key = _scaled_gradient(call.query, 0.25), _scaled_gradient(call.key, 0.25)
        changed = replace(call, query=query, key=key, value=_scaled_gradient(call.value, 0.5))
        return changed.attend(None, "log_additive")
