"""Explanations of image-text models: packed suffixes over merged embeddings against whole forwards, tower included."""

import eager_oracle
import pytest
import tiny_image_models as tiny
import torch

import atman_kernels as ak

MODES = ("log_additive", "multiplicative", "shifted")
ANSWER = "w20 w21 w22"
TEXTS = {
    "llava": "w5 w6 <image> w7 w8 w9",
    "qwen2_vl": "w5 w6 <start><image><end> w7 w8 w9",
    "qwen2_5_vl": "w5 w6 <start><image><end> w7 w8 w9",
    "paligemma": "<image> w7 w8 w9",
    "gemma3": "w5 w6 <start> w7 w8 w9",
    "idefics3": "w5 w6 <image> w7 w8 w9",
    "smolvlm": "w5 w6 <image> w7 w8 w9",
    "blip2": "w7 w8 w9",
}


def explainer_of(family, model=None, **settings):
    model = tiny.build(family) if model is None else model
    return ak.Explainer(model, tiny.processor(family), progress=False, **settings)


def made_by_hand(family, processor, images, text, answer):
    """What the model takes for prompt and answer, written down here a second time; and the prompt's length."""
    inputs = dict(processor(images=images, text=text, return_tensors="pt"))
    inputs = {key: value for key, value in inputs.items() if key not in ("labels", "num_crops")}
    n, more = inputs["input_ids"].shape[1], answer[None, :-1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], more], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    fill = {"paligemma": 1}.get(family, 0)  # answers are causal: PaliGemma writes 1 for that, the others 0
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            inputs[key] = torch.cat([inputs[key], torch.full_like(more, fill)], dim=1)
    return inputs, n


def expected_scores(family, model, images, text, rows, mode, layers=None):
    answer = torch.tensor([int(word[1:]) for word in ANSWER.split()])
    inputs, n = made_by_hand(family, tiny.processor(family), images, text, answer)

    def run(row):
        return eager_oracle.whole_model_logprobs(model, inputs, answer, n, row, mode, layers)

    length = inputs["input_ids"].shape[1]
    base = run(torch.ones(length))
    return torch.stack([base - run(row[:length]) for row in rows])


def rows_of(explanation, factor):
    """One row per unit, from the positions that the unit says it has."""
    length = max(max(unit.token_indices) for unit in explanation.units) + 10
    rows = torch.ones(len(explanation.units), length)
    for row, unit in zip(rows, explanation.units, strict=True):
        row[list(unit.token_indices)] = factor
    return rows


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", tiny.MODELS)
def test_packed_equals_whole_forwards_of_the_whole_model(family, mode):
    explainer = explainer_of(family, mode=mode)
    images = [tiny.picture(40, 30)]
    explanation = explainer.explain(images=images, text=TEXTS[family], target=ANSWER)
    assert explanation.settings["path"] == "packed"
    rows = rows_of(explanation, 0.1)
    expected = expected_scores(family, explainer.model, images, TEXTS[family], rows, mode)
    of_images = [unit.source == "image" for unit in explanation.units]
    assert expected[of_images].abs().max() > 1e-2, "the oracle must move, or the comparison says nothing"
    torch.testing.assert_close(explanation.scores.double(), expected, atol=1e-4, rtol=0)
