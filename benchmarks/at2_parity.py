"""AT2 here against at2, its authors' library: `python -m benchmarks.at2_parity` in an environment that has both.

    python -m venv both
    both/bin/pip install . at2==0.0.1

On a Llama with random weights: the attention that features are made of, the answers' log-odds under the same sets, and
the weights that are learned of the same features, rounded to float16 as at2 keeps them. Prints one line of JSON, the
largest differences over the largest value each.
"""

import json
from typing import Any

import torch
from at2.attribution.attention import get_attention_weights  # type: ignore[import-not-found]
from at2.attribution.features import AttentionFeatureExtractor  # type: ignore[import-not-found]
from at2.attribution.trainer import LinearScoreEstimatorTrainer  # type: ignore[import-not-found]
from at2.attribution.utils import aggregate_logit_probs  # type: ignore[import-not-found]
from at2.tasks.base import compute_logit_probs  # type: ignore[import-not-found]
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from atman_kernels.explain.at2_fitting import fitted
from atman_kernels.explain.methods.attention import each_layer
from atman_kernels.explain.methods.lasso import log_odds
from atman_kernels.inputs.text_generation import CausalObjective
from atman_kernels.planning.factors import subset_rows
from atman_kernels.planning.units import Unit
from atman_kernels.run.perturbation import Perturbation
from atman_kernels.run.runner import Runner

LAYERS, HEADS, PROMPT, ANSWER = 3, 4, 24, 3
PROMPTS, SAMPLES, STEPS = 4, 32, 300


class Trainer(LinearScoreEstimatorTrainer):
    """at2's own learner over features that are already there."""

    def __init__(self, features: list[Tensor], responses: list[Tensor]) -> None:
        self._found = [(x[None].numpy(), y[None].numpy()) for x, y in zip(features, responses, strict=True)]
        self.dataset, self.num_masks = range(len(features)), SAMPLES
        self.feature_extractor = AttentionFeatureExtractor(LAYERS, HEADS, "llama")
        self._task_datas = {number: {"num_targets": 1} for number in self.dataset}

    def get_features_and_outputs(self, i: int) -> Any:
        """(targets, samples, features) and (targets, samples)."""
        return self._found[i]


def model() -> Any:
    """Large random weights, so that attention is uneven."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    for parameter in made.parameters():
        if parameter.ndim >= 2:
            parameter.data.normal_(0, 0.25)
    return made


def theirs(made: Any, ids: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """(F, n) attention to the prompt's tokens, the mean over the answer's; (samples,) log-odds."""
    made.set_attn_implementation("eager")
    with torch.no_grad():
        hidden = made(ids[None, :-1], output_hidden_states=True).hidden_states
        weights = get_attention_weights(
            made, hidden, attribution_start=PROMPT, attribution_end=len(ids), model_type="llama"
        )
        found = []
        for row in kept:
            mask = torch.cat([row, torch.ones(ANSWER, dtype=torch.bool)])[None].long()
            logits = made(ids[None], attention_mask=mask, position_ids=torch.arange(len(ids))[None]).logits
            found.append(compute_logit_probs(logits[:, PROMPT - 1 : -1], ids[None, PROMPT:])[0])
    made.set_attn_implementation("sdpa")
    return weights.mean(2).flatten(0, 1)[:, :PROMPT], torch.tensor(aggregate_logit_probs(torch.stack(found).numpy()))


def ours(made: Any, ids: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The same."""
    units = tuple(Unit(str(token), token, token + 1, (token,)) for token in range(PROMPT))
    question = CausalObjective(
        prompt="", target="", units=units, target_tokens=("",) * ANSWER, ids=ids, prompt_length=PROMPT
    )
    layers: list[Tensor] = []
    each_layer(made, question, lambda index, attention: layers.append(attention.mean(1)[:, :PROMPT]))
    runner = Runner(made, Perturbation(), None, False)
    factors = subset_rows(runner.perturbation.factors(made, question), ~kept)
    return torch.cat(layers), log_odds(runner.run([question], [factors]).perturbed[0].double().sum(1))


def main() -> None:
    """Compare, print."""
    made, apart = model(), {"attention": 0.0, "log_odds": 0.0}
    features, responses = [], []
    for number in range(PROMPTS):
        drawn = torch.Generator().manual_seed(number)
        ids = torch.randint(3, 99, (PROMPT + ANSWER,), generator=drawn)
        kept = torch.rand(SAMPLES, PROMPT, generator=drawn) < 0.5
        kept[:, 0] = True  # of a row that sees nothing at all, the two say different things
        for name, one, other in zip(apart, theirs(made, ids, kept), ours(made, ids, kept), strict=True):
            apart[name] = max(apart[name], ((one - other).abs().max() / one.abs().max()).item())
        to_tokens, odds = theirs(made, ids, kept)
        features.append(((2 * kept.float() - 1) @ to_tokens.T).half())
        responses.append(odds.half())
    estimator = Trainer(features, responses).train(
        num_iterations=STEPS, batch_size=PROMPTS, device="cpu", print_every=STEPS
    )
    learned = estimator.linear.weight.detach()[0]
    again = fitted(torch.stack(features).float(), torch.stack(responses).float(), STEPS, 0)
    apart["weights"] = ((learned - again).abs().max() / learned.abs().max()).item()
    print(json.dumps(apart))


if __name__ == "__main__":
    main()
