"""`explain(..., method=…)`: every method's explanation, its options, what is refused, and how its scores are shown."""

import dataclasses
import html
import io

import matplotlib.pyplot as plt
import pytest
import tiny_models
import torch
from at2_files import options_for
from rich.console import Console

import atman_kernels as ak
from atman_kernels.explain import methods
from atman_kernels.explain.methods.attention import rollout
from atman_kernels.inputs.text_generation import ask

PROMPT = "w5 w6 w7 w8 w9 w10 w11 w12 w13 w14"
ANSWER = "w20 w21 w22"
pytestmark = pytest.mark.filterwarnings("ignore:integrated gradients have not converged")
OTHERS = methods.names()[1:]


@pytest.fixture(scope="module")
def explainer():
    return ak.Explainer(tiny_models.build("llama"), tiny_models.tokenizer(), progress=False)


@pytest.mark.parametrize("method", methods.names())
def test_every_method_explains(explainer, method, tmp_path):
    options = options_for(method, explainer.model, tmp_path)
    found = explainer.explain(PROMPT, ANSWER, method=method, **options)
    columns = 1 if method == "lasso" else 3  # its weights are of the whole answer
    assert found.scores.shape == (10, columns)
    assert found.scores.dtype == torch.float32
    if method != "lasso":  # which may well find that nothing matters in a random model
        assert found.scores.abs().max() > 0
    plain = explainer.explain(PROMPT, ANSWER).base_logprobs
    expected = plain.sum(0, keepdim=True) if columns == 1 else plain
    torch.testing.assert_close(found.base_logprobs, expected, atol=1e-4, rtol=0)
    assert found.settings["method"] == method
    found.save(tmp_path / "explanation.json")
    loaded = ak.Explanation.load(tmp_path / "explanation.json")
    assert torch.equal(loaded.scores, found.scores)
    assert loaded.measure == found.measure


def test_atman_is_the_default(explainer):
    by_default, named = explainer.explain(PROMPT, ANSWER), explainer.explain(PROMPT, ANSWER, method="atman")
    assert torch.equal(by_default.scores, named.scores)
    assert by_default.settings == named.settings
    assert by_default.measures_suppression


def test_units_get_the_sum_of_their_tokens(explainer):
    spans = [(0, 5), (3, 11), (0, 5)]  # w5 w6 | w6 w7 w8 | w5 w6
    options = {"include_target": False, "chat": False, "max_new_tokens": 1, "language": "en"}
    question = ask(explainer.model, explainer.tokenizer, PROMPT, ANSWER, spans, **options)
    by_token = rollout(explainer.model, question).scores
    found = explainer.explain(PROMPT, ANSWER, spans, method="rollout").scores
    torch.testing.assert_close(found, torch.stack([by_token[:2].sum(0), by_token[1:4].sum(0), by_token[:2].sum(0)]))


@pytest.mark.parametrize("method", ["rollout", "attnlrp"])
def test_answer_tokens_are_units_too(explainer, method):
    found = explainer.explain(PROMPT, ANSWER, include_target=True, method=method)
    assert found.scores.shape == (12, 3)
    assert (found.scores[10:, 0] == 0).all()
    assert found.scores[11, 2] != 0


@pytest.mark.parametrize("method", [name for name in OTHERS if name != "random"])
def test_a_batch_is_its_prompts_one_by_one(explainer, method, tmp_path):
    prompts, answers = [PROMPT, "w30 w31 w32"], [ANSWER, "w50"]
    options = options_for(method, explainer.model, tmp_path)
    together = explainer.explain_batch(prompts, answers, method=method, **options)
    for prompt, answer, found in zip(prompts, answers, together, strict=True):
        alone = explainer.explain(prompt, answer, method=method, **options).scores
        if method in methods.OF_UNITS:  # packs of both prompts add up in another order
            torch.testing.assert_close(found.scores, alone, atol=1e-4, rtol=0)
        else:
            assert torch.equal(found.scores, alone)


def test_options_reach_the_method_and_the_settings(explainer):
    found = explainer.explain(PROMPT, ANSWER, method="integrated_gradients", steps=3, baseline=7)
    defaults = {"batch": 4, "whole_answer": False, "checkpointing": False}
    assert found.settings["options"] == {"steps": 3, "baseline": 7, **defaults}
    assert len(found.stats["completeness_gap"]) == 1
    other = explainer.explain(PROMPT, ANSWER, method="integrated_gradients", steps=4, baseline=7)
    assert not torch.equal(found.scores, other.scores)


def test_a_whole_answer_is_one_column(explainer):
    found = explainer.explain(PROMPT, ANSWER, method="input_x_gradient", whole_answer=True)
    single = explainer.explain(PROMPT, ANSWER, method="input_x_gradient")
    assert found.target_tokens == (ANSWER,)
    torch.testing.assert_close(found.total, single.total)
    torch.testing.assert_close(found.base_logprobs, single.base_logprobs.sum(0, keepdim=True))


def test_random_scores_go_by_their_seed(explainer):
    first, again, other = (explainer.explain(PROMPT, ANSWER, method="random", seed=s).scores for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert ((first >= 0) & (first < 1)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "lime"}, "method must be one of 'atman', 'linear', 'shapley', .*, got 'lime'"),
        ({"method": ["atman"]}, "method must be one of"),
        ({"method": "rollout", "steps": 3}, "method 'rollout' has no option 'steps'; it has none"),
        (
            {"method": "attnlrp", "model": 1},
            "method 'attnlrp' has no option 'model'; it has whole_answer, checkpointing",
        ),
        ({"steps": 3}, "method 'atman' has no option 'steps'; it has none"),
        ({"method": "raw_attention", "layer": "last"}, "layer must be an integer, got 'last'"),
        ({"method": "raw_attention", "layer": 3}, "layer must be an index into 3 layers, got 3"),
        ({"method": "attnlrp", "checkpointing": "yes"}, "checkpointing must be True or False, got 'yes'"),
        ({"method": "input_x_gradient", "checkpointing": 1}, "checkpointing must be True or False, got 1"),
        ({"method": "at2"}, "weights is missing: method 'at2' needs a file that atman bench fit-at2 wrote"),
        ({"method": "random", "seed": -1}, "seed must be an integer from 0 to .*, got -1"),
    ],
)
def test_what_is_refused(explainer, arguments, message):
    with pytest.raises(ak.InputError, match=message):
        explainer.explain(PROMPT, ANSWER, **arguments)


def test_wrong_options_are_refused_before_the_model_answers(explainer, monkeypatch):
    monkeypatch.setattr(explainer.model, "generate", lambda *a, **k: pytest.fail("the model was asked to answer"))
    with pytest.raises(ak.InputError, match="no option"):
        explainer.explain(PROMPT, method="rollout", steps=3)


def test_a_refused_model_says_why(explainer):
    gpt_oss = ak.Explainer(tiny_models.build("gpt_oss"), tiny_models.tokenizer(), progress=False)
    with pytest.raises(ak.UnsupportedModelError, match="GptOssModel has no AttnLRP rules"):
        gpt_oss.explain(PROMPT, ANSWER, method="attnlrp")


@pytest.mark.parametrize("method", OTHERS)
def test_scores_are_called_what_they_are(explainer, method, tmp_path):
    found = explainer.explain(PROMPT, ANSWER, method=method, **options_for(method, explainer.model, tmp_path))
    assert not found.measures_suppression
    terminal = Console(file=io.StringIO(), width=200)
    found.show(console=terminal)
    figure = found.plot().figure
    shown = [terminal.file.getvalue(), html.unescape(found.to_html()), figure.axes[0].get_xlabel()]
    plt.close(figure)
    for text in shown:
        assert found.measure in text
        assert "when suppressed" not in text
    assert '"suppressed": false' in found.to_html().replace('"suppressed":false', '"suppressed": false')


def test_a_measure_from_a_file_is_text(explainer, tmp_path):
    found = explainer.explain(PROMPT, ANSWER, method="random")
    found = dataclasses.replace(found, measure="<script>$x^$[bold]")
    assert "<script>$x" not in found.to_html()
    terminal = Console(file=io.StringIO(), width=200)
    found.show(console=terminal)
    assert "<script>$x^$[bold]" in terminal.file.getvalue()
    for kind in ("bar", "heat"):
        figure = found.plot(kind).figure
        figure.savefig(tmp_path / "plot.png")  # mathtext would be parsed, and fail, here
        plt.close(figure)
