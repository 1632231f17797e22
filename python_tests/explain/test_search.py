"""Recompute depth, and the search for the strongest units: against runs by hand, and against explanations of all."""

import json

import pytest
import tiny_image_models
import tiny_models
import torch
from image_text_cases import TEXTS

import atman_kernels as ak
from atman_kernels.planning.halving import Rung, agreement, kept, promise, rungs
from atman_kernels.progress import Listener, listening

WORDS = " ".join(f"w{i % 90}" for i in range(110))
TAIL = 48  # tokens at the end whose units are exact in any case
ANSWER = "w20 w21 w22"


def explainer(family="llama", **options):
    return ak.Explainer(tiny_models.build(family), tiny_models.tokenizer(), progress=False, **options)


def by_hand(model, ids, n, position, depth):
    """(m,) log-probs: what comes before the last `depth` prompt tokens never feels that a token is gone."""
    start = max(position, n - depth)
    with torch.no_grad():
        cache = model(ids[:, :start], use_cache=True).past_key_values if start else None
        factor = torch.ones(1, ids.shape[1])
        factor[0, position] = 0
        with ak.suppress(model, factor):
            logits = model(ids[:, start:], past_key_values=cache).logits[0]
    return logits.log_softmax(-1)[n - 1 - start : -1].gather(1, ids[0, n:, None])[:, 0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("depth", [1, 5, 200])
def test_only_the_last_tokens_feel_a_suppression(family, depth):
    with_depth = explainer(family)
    prompt = " ".join(WORDS.split()[:12])
    found = with_depth.explain(prompt, ANSWER, recompute=depth)
    tokenizer, model = tiny_models.tokenizer(), with_depth.model
    prompt_ids = tokenizer(prompt)["input_ids"]
    ids = torch.tensor([prompt_ids + tokenizer(ANSWER, add_special_tokens=False)["input_ids"]])
    for unit, scores in zip(found.units, found.scores, strict=True):
        (position,) = unit.token_indices
        expected = found.base_logprobs - by_hand(model, ids, len(prompt_ids), position, depth)
        torch.testing.assert_close(scores, expected, atol=2e-5, rtol=1e-4)
    whole = with_depth.explain(prompt, ANSWER)
    assert ((found.scores - whole.scores).abs().max() > 1e-4) == (depth < 12)
    assert (found.effect, whole.effect) == ({1: "direct"}.get(depth, f"last {depth}"), "total")


def test_depth_holds_for_sets_of_units_other_methods_and_contrasts():
    one = explainer()
    prompt = " ".join(WORDS.split()[:12])
    alone = one.explain(prompt, ANSWER, recompute=2)
    masks = torch.eye(len(alone.units), dtype=torch.bool)
    ablation = one.ablate(prompt, ANSWER, masks=masks, recompute=2)
    torch.testing.assert_close(ablation.rises, alone.scores, atol=2e-5, rtol=1e-4)
    assert ablation.settings["recompute"] == 2
    other = one.explain(prompt, "w33 w34", recompute=2)
    contrasted = one.explain(prompt, ANSWER, versus="w33 w34", recompute=2)
    torch.testing.assert_close(contrasted.total, alone.total - other.total, atol=2e-5, rtol=1e-4)
    assert contrasted.recompute == 2
    batch = one.explain_batch([prompt, prompt + " w7"], [ANSWER, ANSWER], recompute=2)
    torch.testing.assert_close(batch[0].scores, alone.scores, atol=2e-5, rtol=1e-4)
    shapley = one.explain(prompt, ANSWER, method="shapley", permutations=4, recompute=2)
    everything = one.ablate(prompt, ANSWER, masks=torch.ones(1, len(alone.units), dtype=torch.bool), recompute=2)
    torch.testing.assert_close(shapley.scores.sum(0), everything.rises[0], atol=2e-5, rtol=1e-4)


def test_sets_that_agree_later_on_share_nothing_before_their_depth():
    """Sets whose factors agree from some token on still differ in what that token sees."""
    one, prompt = explainer(), " ".join(WORDS.split()[:12])
    count = len(one.explain(prompt, ANSWER, recompute=3).units)
    masks = torch.zeros(64, count, dtype=torch.bool)
    for row in range(64):
        masks[row, : count // 2] = torch.tensor([bool(row >> bit & 1) for bit in range(count // 2)])
    together = one.ablate(prompt, ANSWER, masks=masks, recompute=3).logprobs
    apart = torch.cat([one.ablate(prompt, ANSWER, masks=row[None], recompute=3).logprobs for row in masks[:8]])
    torch.testing.assert_close(together[:8], apart, atol=2e-5, rtol=1e-4)


def test_exact_units_are_exact_and_the_others_are_said_to_be_estimates():
    one = explainer()
    everything = one.explain(WORDS, ANSWER)
    found = one.explain(WORDS, ANSWER, exact=10)
    exact = torch.tensor(found.exact)
    assert exact[-TAIL:].all()
    assert 10 <= exact[:-TAIL].sum() <= 15, "more where the rounds disagree"
    assert found.settings["hints"] == "effects to first order"
    torch.testing.assert_close(found.scores[exact], everything.scores[exact], atol=2e-5, rtol=1e-4)
    assert not torch.allclose(found.scores[~exact], everything.scores[~exact], atol=1e-4)
    assert found.stats["tokens_through_model"] < everything.stats["tokens_through_model"]
    listed = {unit.token_indices for unit, _ in found.top(len(WORDS))}
    assert listed == {unit.token_indices for unit, flag in zip(found.units, found.exact, strict=True) if flag}
    assert len(found.top(len(WORDS), estimates=True)) == len(found.units)


def test_estimates_are_direct_effects_and_the_strongest_of_them_and_of_the_hints_are_exact():
    one = explainer()
    found, direct = one.explain(WORDS, ANSWER, exact=10), one.explain(WORDS, ANSWER, recompute=1)
    hints = one.explain(WORDS, ANSWER, method="linear", whole_answer=True)
    exact = torch.tensor(found.exact)
    torch.testing.assert_close(found.scores[~exact], direct.scores[~exact], atol=2e-5, rtol=1e-4)
    ahead = torch.maximum(direct.total, hints.total)[:-TAIL]
    assert exact[:-TAIL][ahead.topk(5).indices].all()
    assert not exact[direct.total[:-TAIL].topk(15).indices].all(), "the hints made a difference"


def test_where_nothing_can_be_differentiated_there_are_no_hints_and_that_is_said(monkeypatch):
    def refuses(*arguments, **options):
        raise ak.UnsupportedModelError("its weights have no derivative\nand more")

    monkeypatch.setattr("atman_kernels.explain.methods.perturbation.linear", refuses)
    one = explainer()
    found, direct = one.explain(WORDS, ANSWER, exact=10), one.explain(WORDS, ANSWER, recompute=1)
    assert found.settings["hints"] == "none: its weights have no derivative"
    assert torch.tensor(found.exact)[direct.total[:-TAIL].topk(5).indices].all()


def test_the_end_of_a_process_that_has_a_part_of_the_model_is_not_taken_for_a_missing_hint(monkeypatch):
    def ends(*arguments, **options):
        raise ak.RankError("rank 1 ended")

    monkeypatch.setattr("atman_kernels.explain.methods.perturbation.linear", ends)
    with pytest.raises(ak.RankError, match="rank 1 ended"):
        explainer().explain(WORDS, ANSWER, exact=10)


def test_hints_are_asked_for_where_something_is_searched_only(monkeypatch):
    from atman_kernels.explain.methods import perturbation

    asked, own = [], perturbation.linear

    def counted(context, questions, **options):
        asked.extend(question.prompt for question in questions)
        return own(context, questions, **options)

    monkeypatch.setattr(perturbation, "linear", counted)
    one, short, most_in_the_tail = explainer(), " ".join(WORDS.split()[:9]), " ".join(WORDS.split()[:57])
    one.explain_batch([WORDS, short, most_in_the_tail], [ANSWER] * 3, exact=10)
    assert asked == [WORDS]


def test_the_first_estimates_are_told_before_the_hints_are_computed(monkeypatch):
    from atman_kernels.explain.methods import perturbation

    told: list[tuple[int, int]] = []
    before_hints: list[list[tuple[int, int]]] = []

    class Listening(Listener):
        def estimated(self, question, unit, scores):
            told.append((question, unit))

    def noted(*given, own=perturbation.linear, **options):
        before_hints.append(list(told))
        return own(*given, **options)

    monkeypatch.setattr(perturbation, "linear", noted)
    with listening(Listening()):
        explainer().explain_batch([WORDS, WORDS[4:]], [ANSWER, ANSWER], exact=10)
    searched = [(0, unit) for unit in range(110 - TAIL)] + [(1, unit) for unit in range(109 - TAIL)]
    assert [sorted(each) for each in before_hints] == [searched, searched]  # the hints of either


def test_a_search_over_several_prompts_finds_for_each_what_it_finds_alone():
    one, short = explainer(), " ".join(WORDS.split()[:9])
    prompts, targets = [WORDS, short, WORDS[4:] + " w4"], [ANSWER, ANSWER, "w5"]
    together = one.explain_batch(prompts, targets, exact=8)
    for explanation, prompt, target in zip(together, prompts, targets, strict=True):
        alone = one.explain(prompt, target, exact=8)
        assert alone.exact == explanation.exact
        torch.testing.assert_close(alone.scores, explanation.scores, atol=2e-5, rtol=1e-4)
    assert all(together[1].exact), "so few units are all exact"


def test_with_another_answer_the_search_is_for_what_tells_them_apart():
    one, other = explainer(), "w33 w34"
    everything = one.explain(WORDS, ANSWER, versus=other)
    found, plain = one.explain_batch([WORDS, WORDS], [ANSWER, ANSWER], versus=[other, None], exact=10)
    exact = torch.tensor(found.exact)
    assert 10 <= exact[:-TAIL].sum() <= 15
    torch.testing.assert_close(found.scores[exact], everything.scores[exact], atol=2e-5, rtol=1e-4)
    direct = one.explain(WORDS, ANSWER, versus=other, recompute=1).total
    assert exact[direct.argmax()], "the first round's strongest"
    assert plain.exact == one.explain(WORDS, ANSWER, exact=10).exact != found.exact, (
        "the other answer bears on one only"
    )
    assert found.exact == one.explain(WORDS, ANSWER, versus=other, exact=10).exact


def test_exact_scores_of_a_float64_model_are_not_rounded_on_their_way():
    model = tiny_models.build("llama").double()
    one = ak.Explainer(model, tiny_models.tokenizer(), progress=False)
    everything, found = one.explain(WORDS, ANSWER), one.explain(WORDS, ANSWER, exact=10)
    exact = torch.tensor(found.exact)
    torch.testing.assert_close(found.scores[exact], everything.scores[exact], atol=1e-9, rtol=3e-7)


def test_more_than_there_are_units_makes_all_exact():
    one = explainer()
    with pytest.warns(UserWarning, match=r"exact is 1000, but there are \d+ units: all of them are exact"):
        found = one.explain(WORDS, ANSWER, exact=1000)
    assert all(found.exact)
    torch.testing.assert_close(found.scores, one.explain(WORDS, ANSWER).scores, atol=2e-5, rtol=1e-4)


def test_files_and_views_keep_what_is_an_estimate(tmp_path):
    found = explainer().explain(WORDS, ANSWER, exact=5)
    found.save(tmp_path / "e.json")
    again = ak.Explanation.load(tmp_path / "e.json")
    assert (again.exact, again.recompute, again.effect) == (found.exact, None, "total")
    page = found.to_html()
    assert page.count('class="unit estimate"') + page.count('class="unit negative estimate"') > 30
    assert "Hatched and ≈" in page
    whole = explainer().explain(WORDS, ANSWER, recompute=1)
    assert "(direct effect)" in whole.to_html()
    assert "estimate of the search" not in whole.to_html()
    content = json.loads((tmp_path / "e.json").read_text())
    del content["exact"], content["recompute"]
    (tmp_path / "old.json").write_text(json.dumps(content))
    assert ak.Explanation.load(tmp_path / "old.json").exact is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recompute": 0}, "recompute must be an integer >= 1 or None, got 0"),
        ({"exact": 0}, "exact must be an integer >= 1 or None, got 0"),
        ({"exact": 2.5}, "exact must be an integer >= 1 or None, got 2.5"),
        ({"exact": 2, "recompute": 2}, "do not go together"),
        ({"exact": 2, "method": "shapley"}, "method with exact must be 'atman', got 'shapley'"),
        ({"recompute": 2, "method": "attnlrp"}, "method with recompute must be one of atman, shapley, lasso"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ak.InputError, match=message):
        explainer().explain(WORDS, ANSWER, **options)


def test_full_rows_have_no_depth():
    one = explainer()
    one.runner.unpackable = "because"
    for option in ("recompute", "exact"):
        with pytest.raises(ak.UnsupportedModelError, match=r"recompute: .* shares no keys and values .*because"):
            one.explain(WORDS, ANSWER, **{option: 4})


def test_images_that_every_variant_sees_anew_have_no_depth():
    image, text = tiny_image_models.picture(24, 24), TEXTS["llava"]
    one = ak.Explainer(
        tiny_image_models.build("llava"), tiny_image_models.processor("llava"), vision=True, progress=False
    )
    for option in ("recompute", "exact"):
        with pytest.raises(ak.UnsupportedModelError, match=r"recompute: .* shares no keys and values"):
            one.explain(text, "w20 w21", images=image, **{option: 4})
    packed = ak.Explainer(one.model, one.processor, progress=False)
    direct = packed.explain(text, "w20 w21", images=image, recompute=1)
    whole = packed.explain(text, "w20 w21", images=image, recompute=1000)
    assert (direct.effect, direct.settings["path"]) == ("direct", "packed")
    torch.testing.assert_close(whole.scores, packed.explain(text, "w20 w21", images=image).scores, atol=2e-5, rtol=1e-4)


def test_rounds():
    assert rungs(40, 4000, 16) == ()
    for units, length, exact in [(41, 41, 1), (1000, 1000, 16), (5000, 8000, 10), (300, 10_000, 16), (100, 60, 90)]:
        found = rungs(units, length, exact)
        assert found[0].recompute <= found[-1].recompute <= length // 2
        candidates = units
        for before, rung in zip([None, *found], found, strict=False):
            assert exact <= rung.keep <= candidates
            assert before is None or rung.recompute > before.recompute
            candidates = rung.keep
        assert found[-1].keep == exact, "these run exactly"
    assert kept(Rung(64, 40), 0.0, 2.0) == 80
    assert agreement([1, 2, 3], [3, 2, 1], 2) == 0.5
    assert agreement([], [3, 2, 1], 2) == 0.5


def test_what_comes_before_a_strong_unit_goes_on_with_it():
    following = {0: [1, 2, 3], 1: [2, 3], 2: [3], 3: []}
    assert promise({0: 0.0, 1: 0.0, 2: 8.0, 3: -1.0}, following) == {0: 2.0, 1: 4.0, 2: 8.0, 3: -1.0}
    assert promise({0: 1.0, 2: 8.0}, following) == {0: 2.0, 2: 8.0}, "one that is out lends nothing"
