"""Sets of units: `ablate`, Shapley values, ContextCite's Lasso and contrasts, against an eager oracle that knows none.

The oracle runs one full forward per set; Shapley values are summed over all 2^n sets, and the Lasso is solved by
proximal gradient steps.
"""

import dataclasses
import itertools
import json
import math
import sys

import eager_oracle
import numpy as np
import pytest
import tiny_image_models
import tiny_models
import torch
from rich.console import Console

import atman_kernels as ak
from atman_kernels.explain.methods import lasso, shapley
from atman_kernels.planning.factors import subset_rows

PROMPT = "w5 w6 w7 w8 w9"
ANSWER = "w20 w21"
OTHER = "w30"


@pytest.fixture(scope="module")
def model():
    return tiny_models.build("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_models.tokenizer()


def explainer_of(model, tokenizer, **settings):
    return ak.Explainer(model, tokenizer, **{"progress": False, "factor": 0.0, **settings})


@pytest.fixture(scope="module")
def explainer(model, tokenizer):
    return explainer_of(model, tokenizer)


def oracle(model, suppressed, *, answer=ANSWER, prompt=PROMPT, factor=0.0, mode="log_additive"):
    """(m,) log-probs with a set of token positions suppressed."""
    ids = torch.tensor([int(word[1:]) for word in f"{prompt} {answer}".split()])
    row = torch.ones(len(ids))
    row[list(suppressed)] = factor
    return eager_oracle.target_logprobs(model, ids, len(prompt.split()), row, mode)


def exact_shapley(worth, n):
    """(n, m): Σ over sets S without i of |S|! (n − |S| − 1)! / n! · (v(S + i) − v(S)), S being who is there."""
    values = []
    for unit in range(n):
        rest = [other for other in range(n) if other != unit]
        total = 0.0
        for size in range(n):
            weight = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
            for there in itertools.combinations(rest, size):
                total = total + weight * (worth(frozenset({*there, unit})) - worth(frozenset(there)))
        values.append(total)
    return torch.stack(values)


@pytest.fixture(scope="module")
def shapley_values(model):
    everyone = set(range(5))
    return exact_shapley(lambda there: oracle(model, everyone - there), 5)


# --- ablate ---


@pytest.mark.parametrize(
    ("mode", "factor"), [("log_additive", 0.0), ("log_additive", 3.0), ("multiplicative", 0.2), ("shifted", 0.0)]
)
def test_every_set_of_tokens(model, tokenizer, mode, factor):
    masks = torch.tensor(list(itertools.product([False, True], repeat=5)))
    found = explainer_of(model, tokenizer, mode=mode, factor=factor).ablate(PROMPT, ANSWER, masks=masks)
    for mask, logprobs in zip(masks, found.logprobs, strict=True):
        expected = oracle(model, mask.nonzero().flatten().tolist(), factor=factor, mode=mode)
        torch.testing.assert_close(logprobs.double(), expected, atol=1e-4, rtol=0)
    assert found.logprobs.dtype == torch.float32
    assert torch.equal(found.logprobs[0], found.base_logprobs), "nothing suppressed"
    assert torch.equal(found.rises, found.base_logprobs - found.logprobs)
    assert float(found.rises.abs().max()) > 0.1


def test_overlapping_spans_are_suppressed_together(model, explainer):
    spans = [(0, 5), (3, 8), (12, 14)]  # w5 w6 | w6 w7 | w9
    found = explainer.ablate(PROMPT, ANSWER, spans, masks=[[True, True, False], [False, True, True]])
    for logprobs, positions in zip(found.logprobs, ((0, 1, 2), (1, 2, 4)), strict=True):
        torch.testing.assert_close(logprobs.double(), oracle(model, positions), atol=1e-4, rtol=0)
    assert found.settings["units"] == "spans"


def test_one_unit_each_is_what_explain_does(model, tokenizer):
    explainer = explainer_of(model, tokenizer, factor=0.1, similarity_threshold=0.1)
    found = explainer.ablate(PROMPT, ANSWER, masks=lambda units: torch.eye(len(units), dtype=torch.bool))
    torch.testing.assert_close(found.rises, explainer.explain(PROMPT, ANSWER).scores, atol=1e-5, rtol=0)


def test_equal_masks_run_once(explainer):
    one = torch.tensor([[True, False, False, True, False]])
    few, many = (explainer.ablate(PROMPT, ANSWER, masks=one.repeat(n, 1)) for n in (1, 500))
    assert many.stats["variants"] == few.stats["variants"]
    assert torch.equal(many.logprobs, few.logprobs.repeat(500, 1))


def test_order_of_masks_and_small_packs_change_nothing(model, tokenizer):
    masks = np.random.default_rng(0).random((200, 5)) < 0.5
    whole = explainer_of(model, tokenizer).ablate(PROMPT, ANSWER, masks=masks)
    parts = explainer_of(model, tokenizer, token_budget=13).ablate(PROMPT, ANSWER, masks=masks[::-1].copy())
    torch.testing.assert_close(parts.logprobs.flip(0), whole.logprobs, atol=1e-5, rtol=0)
    assert parts.stats["forwards"] > whole.stats["forwards"]


def test_whole_rows_where_packing_cannot(model, tokenizer):
    explainer = explainer_of(model, tokenizer)
    explainer.runner.unpackable = "so that rows are recomputed"
    masks = [[True, True, False, False, True], [False] * 5, [False, False, True, False, False]]
    found = explainer.ablate(PROMPT, ANSWER, masks=masks)
    assert found.settings["path"] == "batched"
    for logprobs, positions in zip(found.logprobs, ((0, 1, 4), (), (2,)), strict=True):
        torch.testing.assert_close(logprobs.double(), oracle(model, positions), atol=1e-4, rtol=0)


def test_models_own_answer(explainer):
    found = explainer.ablate(PROMPT, masks=lambda units: torch.ones(1, len(units), dtype=torch.bool), max_new_tokens=3)
    assert found.target == explainer.explain(PROMPT, max_new_tokens=3).target
    assert found.logprobs.shape == (1, len(found.target_tokens))


def test_several_factors_on_one_token():
    rows = torch.tensor([[0.0, 0.5, 1.0, 2.0], [0.4, 0.2, 1.0, 1.5], [1.0, 1.0, 1.0, 1.0]])
    found = subset_rows(rows, torch.tensor([[True, True, True], [False, True, True], [False, False, False]]))
    assert torch.equal(found, torch.stack([torch.tensor([0.0, 0.2, 1.0, 2.0]), rows[1], rows[2]]))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (torch.zeros(2, 5), "bool.*float32"),
        (torch.full((2, 5), math.nan), "bool.*float32"),
        (torch.zeros(2, 5, dtype=torch.long), "bool.*int64"),
        (torch.zeros(2, 4, dtype=torch.bool), r"\(n_variants, 5\).*\(2, 4\)"),
        (torch.zeros(5, dtype=torch.bool), r"\(n_variants, 5\).*\(5,\)"),
        (torch.zeros(0, 5, dtype=torch.bool), r"at least one row, got \(0, 5\)"),
        ([], "float32"),
        ([[True], [True, False]], "masks must be a bool tensor"),
        ("all", "masks must be a bool tensor.*str"),
        (None, "masks must be a bool tensor.*NoneType"),
    ],
)
def test_masks_that_do_not_fit(explainer, masks, message):
    with pytest.raises(ak.InputError, match=message):
        explainer.ablate(PROMPT, ANSWER, masks=masks)


# --- Shapley values ---


def test_all_orders_give_the_exact_values(explainer, shapley_values, monkeypatch):
    every = torch.tensor(list(itertools.permutations(range(5))))
    monkeypatch.setattr(shapley, "_orders", lambda *_: every)
    found = explainer.explain(PROMPT, ANSWER, method="shapley")
    torch.testing.assert_close(found.scores.double(), shapley_values, atol=1e-4, rtol=0)


def test_sampled_orders_come_close(explainer, shapley_values):
    found = explainer.explain(PROMPT, ANSWER, method="shapley", permutations=2000)
    errors = found.standard_errors.double()
    assert bool(((found.total.double() - shapley_values.sum(1)).abs() < 4.5 * errors + 1e-4).all())
    assert float(errors.max()) < 0.1 * float(shapley_values.sum(1).abs().max()), "many draws must tell units apart"
    assert found.stats["variants"] <= 2**5 + 3, "sets that orders share run once"


@pytest.mark.parametrize("units", ["token", [(0, 5), (6, 8), (9, 14)]])
def test_values_add_up_for_every_target_token(model, explainer, units):
    found = explainer.explain(PROMPT, ANSWER, units, method="shapley", permutations=4, seed=3)
    gone = oracle(model, range(5))
    torch.testing.assert_close(found.scores.sum(0).double(), oracle(model, ()) - gone, atol=1e-4, rtol=0)


def test_standard_errors_are_what_estimates_scatter_by(explainer):
    runs = [explainer.explain(PROMPT, ANSWER, method="shapley", permutations=12, seed=seed) for seed in range(60)]
    scatter = torch.stack([run.total for run in runs]).std(0)
    claimed = torch.stack([run.standard_errors for run in runs]).square().mean(0).sqrt()
    assert bool(((claimed / scatter > 0.7) & (claimed / scatter < 1.4)).all())


def test_seeds(explainer):
    first, same, other = (
        explainer.explain(PROMPT, ANSWER, method="shapley", permutations=4, seed=s).scores for s in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_settings_tell_the_method(explainer):
    found = explainer.explain(PROMPT, ANSWER, method="shapley", permutations=6)
    assert found.settings["method"] == "shapley"
    assert found.settings["options"] == {"permutations": 6, "seed": 0}
    assert "Shapley" in found.measure
    assert explainer.explain(PROMPT, ANSWER).settings["method"] == "atman"


def test_one_unit_gets_everything(model, explainer):
    found = explainer.explain(PROMPT, ANSWER, [(0, 14)], method="shapley", permutations=4)
    expected = oracle(model, ()) - oracle(model, range(5))
    torch.testing.assert_close(found.scores[0].double(), expected, atol=1e-4, rtol=0)
    assert found.standard_errors.tolist() == pytest.approx([0.0], abs=1e-6)


def test_a_batch_is_its_prompts_one_by_one(explainer):
    prompts, answers = [PROMPT, "w40 w41 w42"], [ANSWER, "w50"]
    together = explainer.explain_batch(prompts, answers, method="shapley", permutations=4)
    for prompt, answer, joint in zip(prompts, answers, together, strict=True):
        alone = explainer.explain(prompt, answer, method="shapley", permutations=4)
        torch.testing.assert_close(joint.scores, alone.scores, atol=1e-5, rtol=0)
        torch.testing.assert_close(joint.standard_errors, alone.standard_errors, atol=1e-5, rtol=0)


def test_values_of_an_image_and_its_text_add_up():
    """Beside the fall that `explain` measures with all of them as one: the image and the words around it."""
    model, text = tiny_image_models.build("llava"), "w5 w6 <image> w7 w8"
    explainer = explainer_of(model, tiny_image_models.processor("llava"), factor=0.1)
    asked = {"images": tiny_image_models.picture(24, 24), "text": text, "target": ANSWER, "image_units": 2}
    found = explainer.explain(**asked, method="shapley", permutations=4)
    inputs = dict(tiny_image_models.processor("llava")(images=asked["images"], text=text, return_tensors="pt"))
    answer = torch.tensor([20, 21])
    n = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer[None, :-1]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    gone = torch.ones(2, n + 1)
    gone[1, sorted({index for unit in found.units for index in unit.token_indices})] = 0.1
    base, left = (
        eager_oracle.whole_model_logprobs(model, inputs, answer, n, row, "log_additive", None) for row in gone
    )
    torch.testing.assert_close(found.scores.sum(0).double(), (base - left).double(), atol=1e-4, rtol=0)
    assert {unit.source for unit in found.units} == {"prompt", "image"}
    with pytest.raises(ak.InputError, match="versus does not go with images"):
        explainer.explain(**asked, versus=OTHER)
    with pytest.raises(ak.InputError, match="images is missing"):
        explainer.ablate(text, ANSWER, masks=[[True]])


# --- Lasso ---


def proximal_lasso(features, response, alpha, steps=4000):
    """argmin over w of |y − Xw|² / 2N + α |w|₁, both sides centred, by proximal gradient steps."""
    features, response = features - features.mean(0), response - response.mean()
    size = len(features) / np.linalg.norm(features, 2) ** 2
    weights = np.zeros(features.shape[1])
    for _ in range(steps):
        moved = weights - size * features.T @ (features @ weights - response) / len(features)
        weights = np.sign(moved) * np.maximum(np.abs(moved) - size * alpha, 0)
    return weights


@pytest.mark.parametrize("alpha", [0.01, 0.3])
def test_lasso_is_contextcites(model, explainer, alpha):
    pytest.importorskip("sklearn")
    found = explainer.explain(PROMPT, ANSWER, method="lasso", samples=40, alpha=alpha, seed=5)
    there = torch.rand(40, 5, generator=torch.Generator().manual_seed(5)) < 0.5
    logprobs = torch.stack([oracle(model, (~row).nonzero().flatten().tolist()).sum() for row in there]).numpy()
    logits = logprobs - np.log1p(-np.exp(logprobs))
    features = there.numpy().astype(float)
    scale = features.std(0)
    expected = proximal_lasso(features / scale, logits / 2, alpha) / scale * 2
    assert found.scores.shape == (5, 1)
    np.testing.assert_allclose(found.scores[:, 0].numpy(), expected, atol=2e-3)
    assert np.abs(expected).max() > 0.1
    if alpha > 0.1:
        assert (found.scores == 0).any(), "a strong penalty leaves some units out"


def test_lasso_has_one_score_for_the_whole_answer(explainer):
    pytest.importorskip("sklearn")
    found = explainer.explain(PROMPT, ANSWER, method="lasso", samples=8)
    assert found.target_tokens == (ANSWER,)
    whole = explainer.explain(PROMPT, ANSWER).base_logprobs.sum()
    torch.testing.assert_close(found.base_logprobs[0], whole, atol=1e-5, rtol=0)


def test_certain_answers_have_finite_logits():
    assert bool(lasso.log_odds(torch.tensor([0.0, -1e-12, -1e-3, -900.0], dtype=torch.float64)).isfinite().all())


def test_without_scikit_learn(explainer, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r"atman-kernels\[lasso\]"):
        explainer.explain(PROMPT, ANSWER, method="lasso")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("shapely", {}, "method must be one of.*'shapley'.*got 'shapely'"),
        (None, {}, "method must be one of"),
        ("shapley", {"samples": 3}, "'shapley' has no option 'samples'; it has permutations, seed"),
        ("atman", {"permutations": 4}, "'atman' has no option 'permutations'; it has none"),
        ("shapley", {"permutations": 0}, "permutations must be an even integer from 4 to 1,000,000"),
        ("shapley", {"permutations": 7}, "permutations must be an even integer from 4 to 1,000,000"),
        ("shapley", {"permutations": 4.0}, "permutations must be an even integer from 4 to 1,000,000"),
        ("shapley", {"permutations": True}, "permutations must be an even integer from 4 to 1,000,000"),
        ("shapley", {"seed": -1}, "seed must be an integer"),
        ("shapley", {"seed": 2**64}, "seed must be an integer"),
        ("lasso", {"samples": 1}, "samples must be an integer from 2 to 1,000,000"),
        ("lasso", {"alpha": 0.0}, "alpha must be a finite number > 0"),
        ("lasso", {"alpha": math.nan}, "alpha must be a finite number > 0"),
        ("lasso", {"keep": 1.0}, "keep must be a number between 0 and 1"),
        ("random", {"seed": "1"}, "seed must be an integer"),
    ],
)
def test_methods_that_do_not_fit(explainer, method, options, message):
    with pytest.raises(ak.InputError, match=message):
        explainer.explain(PROMPT, ANSWER, method=method, **options)


# --- contrasts ---


def test_contrast_is_the_fall_of_the_log_odds(model, tokenizer):
    found = explainer_of(model, tokenizer, factor=0.1).explain(PROMPT, ANSWER, versus=OTHER)

    def odds(suppressed):
        own, other = (oracle(model, suppressed, answer=answer, factor=0.1).sum() for answer in (ANSWER, OTHER))
        return own - other

    expected = torch.stack([odds(()) - odds((position,)) for position in range(5)])
    torch.testing.assert_close(found.scores[:, 0].double(), expected, atol=1e-4, rtol=0)
    assert float(found.base_logprobs) == pytest.approx(float(odds(())), abs=1e-4)
    assert found.target_tokens == (f"{ANSWER} rather than {OTHER}",)
    assert found.versus == OTHER
    assert "answer" in found.measure


def test_contrast_of_shapley_values(model, explainer):
    found = explainer.explain(PROMPT, ANSWER, versus=OTHER, method="shapley", permutations=2000)
    values = [
        exact_shapley(lambda there, a=answer: oracle(model, set(range(5)) - there, answer=a).sum(), 5)
        for answer in (ANSWER, OTHER)
    ]
    expected = values[0] - values[1]
    errors = found.standard_errors.double()
    assert bool(((found.total.double() - expected).abs() < 4.5 * errors + 1e-4).all())
    assert float(errors.max()) < 0.1 * float(expected.abs().max())


def test_contrasts_in_a_batch(explainer):
    prompts, answers = [PROMPT, "w40 w41 w42", PROMPT], [ANSWER, "w50", "w60"]
    plain, contrasted, own = explainer.explain_batch(prompts, answers, versus=[None, "w51 w52", None])
    torch.testing.assert_close(plain.scores, explainer.explain(PROMPT, ANSWER).scores, atol=1e-5, rtol=0)
    torch.testing.assert_close(own.scores, explainer.explain(PROMPT, "w60").scores, atol=1e-5, rtol=0)
    alone = explainer.explain(prompts[1], "w50", versus="w51 w52")
    torch.testing.assert_close(contrasted.scores, alone.scores, atol=1e-5, rtol=0)
    assert plain.versus is own.versus is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": ANSWER, "versus": ANSWER}, "versus must be another answer than target"),
        ({"target": ANSWER, "versus": f" {ANSWER}"}, "versus must be another answer.*the same tokens"),
        ({"target": ANSWER, "versus": ""}, "versus is empty"),
        ({"target": ANSWER, "versus": 3}, "versus must be a text.*got int 3"),
        ({"target": ANSWER, "versus": OTHER, "include_target": True}, "include_target does not go with versus"),
    ],
)
def test_versus_that_does_not_fit(explainer, arguments, message):
    with pytest.raises(ak.InputError, match=message):
        explainer.explain(PROMPT, **arguments)


def test_versus_the_models_own_answer(explainer):
    own = explainer.explain(PROMPT, max_new_tokens=2).target
    with pytest.raises(ak.InputError, match="versus must be another answer than target"):
        explainer.explain(PROMPT, versus=own, max_new_tokens=2)
    assert explainer.explain(PROMPT, versus="w97", max_new_tokens=2).target == own


def test_versus_of_another_length(explainer):
    with pytest.raises(ak.InputError, match="versus has 1 entries for 2 prompts"):
        explainer.explain_batch([PROMPT, PROMPT], [ANSWER, ANSWER], versus=[OTHER])


# --- shown and kept ---


def printed(explanation, **options):
    console = Console(file=None, width=200, color_system=None, force_terminal=False, **options)
    with console.capture() as capture:
        explanation.show(console=console)
    return capture.get()


@pytest.fixture(scope="module")
def estimated(explainer):
    return explainer.explain(PROMPT, ANSWER, versus=OTHER, method="shapley", permutations=4)


def test_saved_and_loaded(estimated, explainer, tmp_path):
    estimated.save(tmp_path / "e.json")
    loaded = ak.Explanation.load(tmp_path / "e.json")
    assert torch.equal(loaded.standard_errors, estimated.standard_errors)
    assert (loaded.versus, loaded.measure) == (estimated.versus, estimated.measure)
    content = json.loads((tmp_path / "e.json").read_text())
    del content["standard_errors"]  # as earlier versions wrote it
    (tmp_path / "e.json").write_text(json.dumps(content))
    assert ak.Explanation.load(tmp_path / "e.json").standard_errors is None
    content["standard_errors"] = [1.0]
    (tmp_path / "e.json").write_text(json.dumps(content))
    with pytest.raises(ak.InputError, match="standard_errors must have shape"):
        ak.Explanation.load(tmp_path / "e.json")


def test_terminal_shows_errors_and_both_answers(estimated):
    text = printed(estimated)
    assert f"{ANSWER} rather than {OTHER}" in text
    assert "log odds" in text
    assert "%" not in text, "log odds are no probability"
    assert text.count("±") == len(estimated.units)
    assert "in nats; of the answer minus of the other answer" in text


def test_page_shows_errors_and_both_answers(model, tokenizer):
    explanation = explainer_of(model, tokenizer).explain(PROMPT, ANSWER, versus=OTHER, method="shapley", permutations=4)
    page = dataclasses.replace(explanation, versus="<b>no</b>").to_html()
    assert "log odds" in page
    assert "rather than &lt;b&gt;no&lt;/b&gt;" in page
    assert "<b>no</b>" not in page
    assert page.count("±") >= len(explanation.units)


def test_bars_have_error_lines(estimated, explainer):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    from matplotlib.container import BarContainer

    for explanation, drawn in ((estimated, True), (explainer.explain(PROMPT, ANSWER), False)):
        axes = explanation.plot()
        bars = next(each for each in axes.containers if isinstance(each, BarContainer))
        assert (bars.errorbar is not None) is drawn
        pyplot.close(axes.figure)
