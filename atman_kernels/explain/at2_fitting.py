"""AT2's learning: which heads' attention says what an ablation does (Cohen-Wang et al., arXiv 2504.13752)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atman_kernels.arguments import integer
from atman_kernels.errors import InputError, UnsupportedModelError
from atman_kernels.explain.explainer import Explainer
from atman_kernels.explain.head_weights import HeadWeights
from atman_kernels.explain.methods import MOST_DRAWS, OPTIONS, check_sharing, seeded
from atman_kernels.explain.methods.attention import each_layer
from atman_kernels.explain.methods.lasso import log_odds
from atman_kernels.hf.models.eval_mode import evaluating
from atman_kernels.inputs.request import Common, batch_of
from atman_kernels.inputs.tasks import CAUSAL
from atman_kernels.inputs.text_generation import CausalObjective, ask_all
from atman_kernels.inputs.tokenization import Prompt, UnitChoice
from atman_kernels.progress import Meter
from atman_kernels.run.runner import Runner
from atman_kernels.run.subsets import run_subsets

KEEP = 0.5  # probability that a unit stays in a random set
LEARNING_RATE = 1e-3
BATCH = 512  # prompts per step
LARGEST_NORM = 1.0  # of a step's gradient
SAME = 1e-8  # of log-odds: below, all sets of a prompt were alike, and there is nothing to learn of it


def fit_at2(
    explainer: Explainer,
    prompts: Sequence[Prompt],
    targets: Sequence[str | None] | None = None,
    units: str | Sequence[UnitChoice] = "token",
    *,
    samples: int = 32,
    steps: int = 1000,
    seed: int = 0,
    chat: bool = False,
) -> HeadWeights:
    """Learn one weight per head, so that weighted attention goes with what ablations do to the answers.

    Of every prompt, `samples` random halves of the units are suppressed, as the explainer suppresses. A set's features
    are, per head, the attention from the answer's rows (their mean) to the units that stay, minus that to the others.
    The weights maximise the correlation over the sets of a prompt between the weighted features and the answer's
    log-odds, on average over prompts: Adam from equal weights, a cosine's slope of its rate, as in AT2.

    Cost: `samples` variants per prompt; each runs nearly the whole prompt.

    Args:
        explainer: of the model; how it suppresses is noted in the result.
        prompts, targets, units, chat: as in `Explainer.explain_batch`; the more prompts, the better.
        samples: random sets of each prompt.
        steps: of the optimiser.
        seed: equal seeds give equal sets.

    Raises:
        InputError: an argument does not fit, or in no prompt any set changes the answer.
        UnsupportedModelError: the model's attention cannot be reached, its layers have different numbers of heads, or
            it is shared among processes.

    Example:
        >>> weights = fit_at2(explainer, prompts, answers)                               # doctest: +SKIP
        >>> weights.save("at2.safetensors")                                              # doctest: +SKIP
        >>> explainer.explain(prompt, answer, method="at2", weights="at2.safetensors")   # doctest: +SKIP
    """
    model = explainer.model
    samples = integer(samples, "samples", least=2, most=MOST_DRAWS)
    steps, seed = integer(steps, "steps", least=1), OPTIONS["seed"](seed)
    if explainer.task != CAUSAL:
        raise InputError(f"AT2 is for language models; {type(model).__name__} is none")
    check_sharing("at2", model)
    common = Common.checked(include_target=False, chat=chat, max_new_tokens=32, language="en")
    asked = batch_of(common, prompts, targets, units, None, None)
    if any(request.has_images for request in asked):
        raise InputError("prompts: AT2 is fitted on texts; one of them has images")
    if any(request.is_nested for request in asked):
        raise InputError("units: AT2 is fitted on units of one level; those of one of the prompts are nested")
    features, responses = [], []
    runner = Runner(model, explainer.runner.perturbation, explainer.runner.token_budget, False)
    with evaluating(model):
        questions = ask_all(
            model,
            explainer.tokenizer,
            [(each.prompt, each.target, each.units) for each in asked],
            include_target=False,
            chat=chat,
            max_new_tokens=common.max_new_tokens,
            language=common.language,
        )
        tokens = samples * sum(question.positions for question in questions)
        with Meter(explainer.runner.progress, tokens, "learning from ablations") as meter:
            for number, question in enumerate(questions):
                kept = _kept(samples, len(question.units), seed + number)
                features.append(_features(model, question, kept))
                outcome = run_subsets(runner, [question], [~kept], "ablating")
                responses.append(log_odds(outcome.perturbed[0].double().sum(1)))
                meter.advance(samples * question.positions)
    how: dict[str, object] = {"prompts": len(asked), "samples": samples, "steps": steps, "seed": seed}
    how |= {"suppression": explainer.suppression}
    shape = features[0].shape[1:]
    weights = fitted(torch.stack(features).flatten(2), torch.stack(responses), steps, seed)
    return HeadWeights.of(model, weights.reshape(shape), how)


def _kept(samples: int, n_units: int, seed: int) -> Tensor:
    """(samples, n_units) bool, at random."""
    drawn = torch.rand(samples, n_units, generator=seeded(seed), dtype=torch.float32, device="cpu")
    return drawn < KEEP


def fitted(features: Tensor, responses: Tensor, steps: int, seed: int) -> Tensor:
    """(F,) the weights w whose features · w go with the responses; their absolute values add up to 1.

    Args:
        features: (prompts, samples, F).
        responses: (prompts, samples).

    Raises:
        InputError: no prompt's responses differ.
    """
    x = (features - features.mean(1, keepdim=True)).float()
    y = (responses - responses.mean(1, keepdim=True)).float()
    told = y.abs().amax(1) > SAME
    if not told.any():
        raise InputError("prompts: in none of them any set of units changed the answer; there is nothing to learn from")
    x, y, generator = x[told], y[told], seeded(seed)
    with torch.inference_mode(False), torch.enable_grad():
        x, y = x.clone(), y.clone()
        weights = torch.full(x.shape[2:], 1 / x.shape[2], dtype=torch.float32, device="cpu", requires_grad=True)
        optimizer = torch.optim.Adam([weights], lr=LEARNING_RATE)
        slower = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            chosen = (
                torch.randperm(len(x), generator=generator, device="cpu")[:BATCH] if len(x) > BATCH else slice(None)
            )
            optimizer.zero_grad()
            correlation = torch.nn.functional.cosine_similarity(x[chosen] @ weights, y[chosen], dim=1)
            (-correlation.mean()).backward()
            torch.nn.utils.clip_grad_norm_([weights], LARGEST_NORM)
            optimizer.step()
            slower.step()
    return weights.detach() / weights.detach().abs().sum()


def _features(model: PreTrainedModel, question: CausalObjective, kept: Tensor) -> Tensor:
    """(samples, layers, heads): attention to the units that stay, minus that to the others."""
    layers: dict[int, Tensor] = {}  # (n_units, Hq) each

    def tell(index: int, attention: Tensor) -> None:
        to_tokens = attention.mean(1).cpu()  # [Hq, L]
        layers[index] = torch.stack([to_tokens[:, list(unit.token_indices)].sum(1) for unit in question.units])

    each_layer(model, question, tell)
    if len({found.shape for found in layers.values()}) > 1:
        raise UnsupportedModelError(f"the layers of {type(model).__name__} have different numbers of heads")
    to_units = torch.stack([layers[index] for index in sorted(layers)], dim=1)
    return torch.einsum("su,ulh->slh", 2 * kept.to(to_units) - 1, to_units)
