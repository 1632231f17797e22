"""The recipes of docs/interventions.md, run as they are printed, against the methods' definitions over all scores."""

import math

import eager_edits
import pytest
import tiny_models
import torch
import transformers as hf
from recipes import recipe

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]])
FAMILIES = ("llama", "gpt2", "gemma2", "gpt_oss")


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_knockout_puts_chosen_scores_at_minus_infinity(family):
    model = tiny_models.build(family)

    def blocked(layer, scores):
        if layer not in (1, 2):
            return scores
        scores = scores.clone()
        for query in (10, 11):
            for key in (3, 4):
                scores[:, :, query, key] = -math.inf
        return scores

    with torch.no_grad():
        with recipe("knock_out")(model, keys=[3, 4], queries=(10, 12), layers=range(1, 3)):
            got = model(IDS).logits
        with eager_edits.edited(model, scores=blocked):
            expected = model(IDS).logits
        plain = model(IDS).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(got[:, :10], plain[:, :10], atol=1e-5, rtol=0)
    assert (got - plain)[0, -1].abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_pasta_scales_the_weights_of_the_complement_and_normalises(family):
    """In the prompt and in what is generated, whose own tokens count in full."""
    model = tiny_models.build(family)
    heads, tokens, alpha = {0: [1], 2: [0, 3]}, [2, 3, 4], 0.05

    def steered(layer, weights):
        weights = weights.clone()
        for head in heads.get(layer, []):
            for key in range(12):
                if key not in tokens:
                    weights[:, head, :, key] *= alpha
        return weights / weights.sum(-1, keepdim=True)

    with recipe("emphasise")(model, tokens, 12, heads, alpha=alpha):
        output = model.generate(
            IDS, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    with torch.no_grad():
        with eager_edits.edited(model, weights=steered):
            expected = model(output.sequences).logits[:, 11:-1]
        plain = model(output.sequences).logits[:, 11:-1]
    got = torch.stack(output.logits, dim=1)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert (got - plain).abs().max() > 1e-3


def encoder():
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2
    )
    model = hf.BertModel(config, add_pooling_layer=False).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.25)
    return model


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_value_zeroing_drops_one_keys_share_of_every_output(family):
    model = encoder() if family == "bert" else tiny_models.build(family)
    zeroed = None

    def without_value(layer, weights):  # a value of zero and a weight of zero give the same product
        weights = weights.clone()
        if layer == 1 and zeroed is not None:
            weights[..., zeroed] = 0.0
        return weights

    expected = torch.zeros(12, 12)
    with torch.no_grad(), eager_edits.edited(model, weights=without_value):
        before = model(IDS, output_hidden_states=True).hidden_states[2][0]
        for zeroed in range(12):
            after = model(IDS, output_hidden_states=True).hidden_states[2][0]
            for query in range(12):
                cosine = after[query] @ before[query] / (after[query].norm() * before[query].norm())
                expected[query, zeroed] = 1 - cosine
    got = recipe("value_zeroing")(model, IDS, layer=1)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)
    assert expected.max() > 1e-3


def test_contextcite_fits_the_log_odds_of_random_removals():
    linear_model = pytest.importorskip("sklearn.linear_model")
    model = tiny_models.build("llama")
    sources, prompt_length = [[1, 2], [3, 4, 5], [6], [7, 8]], 10
    torch.manual_seed(5)
    got = recipe("cite")(model, IDS, prompt_length, sources, removals=24)
    torch.manual_seed(5)
    kept = torch.rand(24, 4) < 0.5
    odds = []
    for row in kept:
        removed = [t for source, tokens in enumerate(sources) for t in tokens if not row[source]]

        def unseen(layer, scores, removed=removed):
            scores = scores.clone()
            scores[..., removed] = -math.inf
            return scores

        with torch.no_grad(), eager_edits.edited(model, scores=unseen):
            probabilities = model(IDS).logits[0].double().softmax(-1)
        whole = math.prod(float(probabilities[at - 1, IDS[0, at]]) for at in range(prompt_length, 12))
        odds.append(math.log(whole / (1 - whole)))
    expected = linear_model.Lasso(0.01).fit(kept.numpy(), odds).coef_
    assert abs(expected).max() > 0.05
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), atol=1e-4, rtol=0)
