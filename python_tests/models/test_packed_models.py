"""Explanations by packed forwards equal separate full runs, on every architecture that packing serves."""

import eager_oracle
import pytest
import tiny_models
import torch

import atman_kernels as ak

MODES = ("log_additive", "multiplicative", "shifted")


def scores_of_both(model, tokens, answer, *, mode, threshold=None, layers=None, budget=None, factor=0.1):
    tokenizer = tiny_models.tokenizer()
    explainer = ak.Explainer(
        model, tokenizer, mode=mode, factor=factor, similarity_threshold=threshold, layers=layers,
        token_budget=budget, progress=False,
    )  # fmt: skip
    explanation = explainer.explain(tiny_models.text_of(tokens), tiny_models.text_of(answer))
    ids = torch.tensor(tokens + answer)
    rows = torch.ones(len(tokens), len(ids))
    for i in range(len(tokens)):
        rows[i, i] = factor
        if threshold is not None:
            vectors = model.get_input_embeddings().weight[ids[:-1]].detach().double()
            for k in range(len(ids) - 1):
                cosine = float(torch.cosine_similarity(vectors[i], vectors[k], dim=0))
                if k != i and cosine >= threshold:
                    rows[i, k] = 1 - (1 - factor) * min(cosine, 1.0)
    return explanation, eager_oracle.leave_one_out(model, ids, len(tokens), rows, mode, layers)


def draw(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, tiny_models.VOCABULARY, (count,), generator=generator).tolist()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", tiny_models.PACKABLE)
def test_packed_explanation_equals_separate_full_runs(family, mode):
    model = tiny_models.build(family)
    explanation, expected = scores_of_both(model, draw(19, 1), draw(3, 2), mode=mode)
    assert explanation.settings["path"] == "packed"
    assert expected.abs().max() > 1e-2, "the oracle must move, or the comparison says nothing"
    torch.testing.assert_close(explanation.scores.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gpt_oss"])
def test_layers_neighbours_and_small_packs_change_nothing_but_what_they_should(family):
    model = tiny_models.build(family)
    tokens = draw(9, 3) * 2  # every token has a twin
    for settings in ({"layers": [1]}, {"threshold": 0.9}, {"budget": 7}, {"factor": 0.0}, {"factor": 3.0}):
        explanation, expected = scores_of_both(model, tokens, draw(2, 4), mode="log_additive", **settings)
        torch.testing.assert_close(explanation.scores.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_double_precision_agrees_to_rounding(family):
    model = tiny_models.build(family).double()
    explanation, expected = scores_of_both(model, draw(19, 1), draw(3, 2), mode="shifted")
    torch.testing.assert_close(explanation.scores.double(), expected, atol=1e-6, rtol=1e-6)  # stored as float32
