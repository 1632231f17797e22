"""Relevance of a picture's tiles for the model's answer, by AtMan and by what it is compared with.

Every method sees the same input embeddings (the projected tiles, then the question) and acts on the language model
alone; each returns one value per tile, positive = important.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

import atman_kernels as ak
from benchmarks.planted_pictures.model import WORDS, pixel_values, prompts, tokenizer
from benchmarks.planted_pictures.pictures import TILES

FACTOR = 0.0
THRESHOLD = 0.7  # the paper's κ


@dataclass(frozen=True)
class Asked:
    """A question about a picture, as the language model gets it.

    Attributes:
        model: the whole model.
        inputs: what a processor would make of picture and question: ids (1, length), and the picture's 16 cells.
        embeddings: (length, width), the picture's tiles first.
        answer: token id of what is explained.
    """

    model: PreTrainedModel
    inputs: dict[str, Tensor]
    embeddings: Tensor
    answer: int

    def logprobs(self, factors: Tensor, mode: str) -> Tensor:
        """(variants,) float64 log-probs of the answer under (variants, length) factors."""
        rows = self.embeddings.expand(len(factors), -1, -1)
        with torch.no_grad(), ak.suppress(self.model, factors, mode=mode):
            logits = self.model(inputs_embeds=rows, logits_to_keep=1, use_cache=False).logits[:, -1]
        return logits.double().log_softmax(-1)[:, self.answer]

    def without(self, suppressed: Tensor) -> Tensor:
        """(variants,) log-probs with the tiles gone that bool (variants, tiles) names; for `metrics.faithfulness`."""
        factors = torch.ones(len(suppressed), len(self.embeddings))
        factors[:, : TILES**2] = (~suppressed).float()
        return self.logprobs(factors, "log_additive")


def ask(model: PreTrainedModel, pixels: Tensor, shape: int, answer: int | None = None) -> Asked:
    """The question for a shape (an index) about a picture (3, 64, 64); the model's own answer unless one is given."""
    seen: dict[str, Tensor] = {}
    inputs = {"input_ids": prompts(torch.tensor([shape])), "pixel_values": pixel_values(pixels[None])}
    decoder = model.get_decoder()
    keep = decoder.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    with torch.no_grad(), keep:
        logits = model(**inputs, logits_to_keep=1).logits
    return Asked(model, inputs, seen["inputs_embeds"][0], int(logits[0, -1].argmax()) if answer is None else answer)


def atman(asked: Asked, mode: str, threshold: float | None) -> Tensor:
    """Rise of the answer's loss with a tile suppressed, and with it, given a threshold, the tiles that look alike."""
    explanation = _explainer(asked.model, mode, threshold).explain(asked.inputs, WORDS[asked.answer], units=None)
    return explanation.scores[:, 0].double()


@cache
def _explainer(model: PreTrainedModel, mode: str, threshold: float | None) -> ak.Explainer:
    """In float64: of an answer this sure, float32 does not tell small rises of the loss apart."""
    precise = deepcopy(model).double()
    return ak.Explainer(precise, tokenizer(), mode=mode, factor=FACTOR, similarity_threshold=threshold, progress=False)


def raw_attention(asked: Asked) -> Tensor:
    """What the last position attends to in the last layer, the mean over heads."""
    return _attentions(asked)[-1].mean(0)[-1, : TILES**2]


def rollout(asked: Asked) -> Tensor:
    """Attention followed through the layers, (A + I) / 2 in each (Abnar & Zuidema, arXiv 2005.00928)."""
    relevance = torch.eye(len(asked.embeddings))[-1]
    for weights in reversed(_attentions(asked)):
        relevance = (relevance @ weights.mean(0) + relevance) / 2
    return relevance[: TILES**2]


def input_x_gradient(asked: Asked) -> Tensor:
    """x · ∂ log p / ∂x, summed over the features of each tile's embedding x."""
    rows = asked.embeddings.detach()[None].requires_grad_()
    logits = asked.model(inputs_embeds=rows, logits_to_keep=1).logits[0, -1]
    [gradient] = torch.autograd.grad(logits.log_softmax(-1)[asked.answer], rows)
    return (rows * gradient).detach().sum(-1)[0, : TILES**2]


def chefer(asked: Asked) -> Tensor:
    """Rollout with each layer's attention weighted by the gradient of the answer's logit, negative products left out.

    R ← R + mean over heads of max(A ⊙ ∂y/∂A, 0) · R (Chefer et al., arXiv 2103.15679, eq. 5 and 6).
    """
    rows = asked.embeddings.detach()[None].requires_grad_()
    with _eager(asked.model):
        found = asked.model(inputs_embeds=rows, output_attentions=True)
    gradients = torch.autograd.grad(found.logits[0, -1, asked.answer], found.attentions)
    relevance = torch.eye(len(asked.embeddings))[-1]
    for weights, gradient in zip(reversed(found.attentions), reversed(gradients), strict=True):
        relevance = relevance + relevance @ (weights.detach() * gradient)[0].clamp(min=0).mean(0)
    return relevance[: TILES**2]


def at_random(asked: Asked, generator: torch.Generator) -> Tensor:
    """What knowing nothing gives."""
    return torch.rand(TILES**2, generator=generator)


METHODS: dict[str, Callable[[Asked], Tensor]] = {
    **{
        f"AtMan {mode}{f', κ {threshold}' if threshold else ''}": partial(atman, mode=mode, threshold=threshold)
        for mode in ("log_additive", "multiplicative", "shifted")
        for threshold in (None, THRESHOLD)
    },
    "raw attention": raw_attention,
    "attention rollout": rollout,
    "Chefer et al.": chefer,
    "input × gradient": input_x_gradient,
    "at random": partial(at_random, generator=torch.Generator().manual_seed(0)),
}


def _attentions(asked: Asked) -> list[Tensor]:
    """(heads, length, length) of every layer, the first layer first."""
    with torch.no_grad(), _eager(asked.model):
        found = asked.model(inputs_embeds=asked.embeddings[None], output_attentions=True).attentions
    return [weights[0] for weights in found]


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    """Attention that gives its weights away, in the language model."""
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation({"text_config": "eager"})
    try:
        yield
    finally:
        model.set_attn_implementation({"text_config": before})
