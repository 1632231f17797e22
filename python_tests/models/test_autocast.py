"""Explanations under torch.autocast: the products are in its dtype, and so is the noise that is allowed."""

import warnings

import pytest
import tiny_models
import torch

import atman_kernels as ak

PROMPT, ANSWER = tiny_models.text_of(list(range(10, 22))), " " + tiny_models.text_of([30, 31, 32])


def scores(model: torch.nn.Module) -> torch.Tensor:
    return ak.Explainer(model, tiny_models.tokenizer(), progress=False).explain(PROMPT, target=ANSWER).scores


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_under_autocast_are_those_of_the_model_within_its_rounding(family: str, dtype: torch.dtype) -> None:
    model = tiny_models.build(family)
    exact = scores(model)
    with torch.autocast("cpu", dtype=dtype):
        rounded = scores(model)
    allowed = {torch.bfloat16: 0.15, torch.float16: 0.02}[dtype] * max(1.0, float(exact.abs().max()))
    assert float((rounded - exact).abs().max()) < allowed
    assert not torch.equal(rounded, exact), "autocast was not in force"


def test_what_was_found_under_autocast_ends_with_it() -> None:
    explainer = ak.Explainer(tiny_models.build("llama"), tiny_models.tokenizer(), progress=False)
    paths = []
    for enabled in (False, True, False):
        with warnings.catch_warnings(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            warnings.simplefilter("error")
            paths.append(explainer.explain(PROMPT, target=ANSWER).settings["path"])
    assert paths == ["packed"] * 3


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = type(tiny_models.build("llama"))(tiny_models.build("llama").config).eval()
    with pytest.raises(ak.UnsupportedModelError, match=r"has no weights: .* meta"):
        scores(model)


def test_weights_of_inference_mode_are_refused_where_gradients_are_needed() -> None:
    with torch.inference_mode():
        model = tiny_models.build("llama")
    explainer = ak.Explainer(model, tiny_models.tokenizer(), progress=False)
    explainer.explain(PROMPT, target=ANSWER)
    with pytest.raises(ak.UnsupportedModelError, match="inference_mode"):
        explainer.explain(PROMPT, target=ANSWER, method="attnlrp")
