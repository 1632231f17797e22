"""Nested units and named ones: against explanations of one level."""

import json

import pytest
import tiny_encoders
import tiny_models
import torch

import atman_kernels as ak

PROMPT = "w3 w4 w5\n\nw6 w7 w8 w9\n\nw10\n\nw11 w12 w13 w14 w15\n\nw16 w17 w18 w19"
ANSWER = "w20 w21"
NESTED = ("paragraph", "word")
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def explainer():
    return ak.Explainer(tiny_models.build("llama"), tiny_models.tokenizer(), progress=False)


@pytest.fixture(scope="module")
def nested(explainer):
    return explainer.explain(PROMPT, ANSWER, NESTED, refine=2)


def scores_by_place(explanation):
    return {(u.start, u.end): s for u, s in zip(explanation.units, explanation.scores, strict=True)}


def test_every_level_has_the_scores_of_an_explanation_of_its_own(explainer, nested):
    for level in NESTED:
        alone = scores_by_place(explainer.explain(PROMPT, ANSWER, level))
        for unit, scores in zip(nested.at(level).units, nested.at(level).scores, strict=True):
            torch.testing.assert_close(scores, alone[unit.start, unit.end], **CLOSE)
    assert len(nested.at("paragraph").units) == 5
    assert nested.settings["units"] == ["paragraph", "word"]


def test_the_strongest_are_cut_and_know_what_is_inside(nested):
    totals = nested.total.abs().tolist()
    can = [i for i in nested.of_level(0) if len(nested.units[i].token_indices) > 1]  # "w10" is one word anyway
    strongest = sorted(can, key=lambda i: -totals[i])[:2]
    assert {i for i, inside in enumerate(nested.children) if inside} == set(strongest)
    for i in strongest:
        words = [nested.units[child].text for child in nested.children[i]]
        assert words == nested.units[i].text.split()
        assert all(nested.units[child].parent == i for child in nested.children[i])
    assert nested.depths == tuple(int(unit.parent is not None) for unit in nested.units)


def test_top_lists_the_finest_level_unless_another_is_named(nested):
    assert nested.top(3) == nested.top(3, level="word") == nested.top(3, level=-1)
    assert {unit.text for unit, _ in nested.top(3)} <= set(PROMPT.split())
    assert nested.top(1, level="paragraph")[0][1] == float(nested.total[nested.of_level(0)].max())
    with pytest.raises(ak.InputError, match="level must be one of 0 to 1, 'paragraph', 'word', got 'sentence'"):
        nested.top(3, level="sentence")


def test_what_cannot_be_cut_is_the_finest_level_there_is(explainer):
    found = explainer.explain("w3", ANSWER, NESTED)
    assert (len(found.units), found.levels, found.finest) == (1, NESTED, 0)
    assert [unit.text for unit, _ in found.top()] == ["w3"]
    assert "±1.00" in found.to_html()  # the scale of a level without units
    with pytest.raises(ak.InputError, match="level 'word' has no units: none of the level above it can be cut"):
        found.at("word")


def test_three_levels_from_documents_down_to_tokens(explainer):
    documents = [(0, 21, "Doc A"), (23, 46, "Doc B"), (48, len(PROMPT), "Doc C")]
    found = explainer.explain(PROMPT, ANSWER, (documents, "paragraph", "token"), refine=1)
    assert found.levels == ("span", "paragraph", "token")
    assert [unit.name for unit in found.units[:3]] == ["Doc A", "Doc B", "Doc C"]
    alone = explainer.explain(PROMPT, ANSWER, [span[:2] for span in documents])
    torch.testing.assert_close(found.scores[:3], alone.scores, **CLOSE)
    tokens = scores_by_place(explainer.explain(PROMPT, ANSWER))
    finest = found.at("token")
    assert 1 < len(finest.units) < 6
    for unit, scores in zip(finest.units, finest.scores, strict=True):
        torch.testing.assert_close(scores, tokens[unit.start, unit.end], **CLOSE)


def test_levels_go_on_from_one_base_run(explainer, nested):
    tokens = len(PROMPT.split()) + 1
    rows = sum(tokens - min(unit.token_indices) for unit in nested.units)
    rows -= sum(len(unit.token_indices) - 1 for unit in nested.units)  # of a unit that is gone nothing reads on
    fixed = explainer.explain(PROMPT, ANSWER, "paragraph").stats["tokens_through_model"]
    fixed -= sum(tokens - min(u.token_indices) - len(u.token_indices) + 1 for u in nested.at("paragraph").units)
    assert abs(nested.stats["tokens_through_model"] - fixed - rows) <= 3 * len(nested.units)


def test_a_batch_a_contrast_and_a_depth(explainer, nested):
    other = "w3 w4\n\nw5 w6 w7"
    units = [NESTED, "token", ([(0, 5, "A"), (7, 15, "B")], "word")]
    found = explainer.explain_batch([PROMPT, PROMPT, other], [ANSWER] * 3, units, refine=2)
    torch.testing.assert_close(found[0].scores, nested.scores, **CLOSE)
    assert found[0].units == nested.units
    assert (found[1].levels, found[2].levels) == ((), ("span", "word"))
    torch.testing.assert_close(found[1].scores, explainer.explain(PROMPT, ANSWER).scores, **CLOSE)

    contrast = explainer.explain(PROMPT, ANSWER, NESTED, versus="w30", refine=1)
    alone = scores_by_place(explainer.explain(PROMPT, ANSWER, "word", versus="w30"))
    for unit, scores in zip(contrast.at(1).units, contrast.at(1).scores, strict=True):
        torch.testing.assert_close(scores, alone[unit.start, unit.end], **CLOSE)
    can = [i for i in contrast.of_level(0) if len(contrast.units[i].token_indices) > 1]
    assert contrast.units[contrast.of_level(1)[0]].parent == max(can, key=lambda i: abs(contrast.total[i]))

    direct = explainer.explain(PROMPT, ANSWER, NESTED, recompute=1)
    alone = scores_by_place(explainer.explain(PROMPT, ANSWER, "word", recompute=1))
    for unit, scores in zip(direct.at("word").units, direct.at("word").scores, strict=True):
        torch.testing.assert_close(scores, alone[unit.start, unit.end], **CLOSE)


def test_models_that_do_not_pack_are_served_too(nested):
    whole = ak.Explainer(tiny_models.build("llama"), tiny_models.tokenizer(), progress=False)
    whole.runner.unpackable = "it is told so"
    found = whole.explain(PROMPT, ANSWER, NESTED, refine=2)
    assert found.settings["path"] == "batched"
    torch.testing.assert_close(found.scores, nested.scores, **CLOSE)


def test_a_file_keeps_the_tree_and_its_version_warns_old_readers(nested, explainer, tmp_path):
    nested.save(tmp_path / "nested.json")
    content = json.loads((tmp_path / "nested.json").read_text())
    assert content["version"] == 3
    loaded = ak.Explanation.load(tmp_path / "nested.json")
    assert (loaded.units, loaded.levels, loaded.children) == (nested.units, nested.levels, nested.children)
    assert torch.equal(loaded.scores, nested.scores)

    named = explainer.explain(PROMPT, ANSWER, [(0, 8, "Doc A"), (10, 21)])
    assert json.loads(named.to_json())["version"] == 2  # what an old reader leaves out changes no meaning
    named.save(tmp_path / "named.json")
    assert [unit.name for unit in ak.Explanation.load(tmp_path / "named.json").units] == ["Doc A", None]

    for name in ("name", "parent"):
        for unit in content["units"]:
            unit.pop(name, None)
    del content["levels"]
    (tmp_path / "old.json").write_text(json.dumps(content | {"version": 2}))
    assert ak.Explanation.load(tmp_path / "old.json").levels == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parent": 9}, "parent must be None or the index of a unit before it, got 9"),
        ({"parent": -1}, "parent must be None or the index of a unit before it, got -1"),
        ({"parent": 1}, r"units\[6\] must lie in its parent, units\[1\]"),
        ({"parent": 5}, r"units\[6\] is of level 2, but levels names 2"),
        ({"name": ""}, r"units\[6\].name must be a str that is not empty, or None, got ''"),
    ],
)
def test_a_tree_that_is_none_is_refused(nested, tmp_path, change, message):
    content = json.loads(nested.to_json())
    content["units"][6] |= change
    (tmp_path / "broken.json").write_text(json.dumps(content))
    with pytest.raises(ak.InputError, match=message):
        ak.Explanation.load(tmp_path / "broken.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exact": 3}, "exact does not go with nested units, which are all exact"),
        ({"method": "attnlrp"}, "method with nested units must be 'atman', got 'attnlrp'"),
        ({"include_target": True}, "nested units do not go with include_target"),
        ({"refine": 0}, "refine must be an integer >= 1 or None, got 0"),
        ({"refine": 2, "units": "word"}, "refine is for nested units, such as"),
        ({"units": ("word", "paragraph")}, "paragraphs do not refine words"),
    ],
)
def test_what_does_not_go_with_nested_units(explainer, options, message):
    with pytest.raises(ak.InputError, match=message):
        explainer.explain(PROMPT, ANSWER, **{"units": NESTED, **options})


def test_other_models_and_ablations_refuse_nested_units(explainer):
    with pytest.raises(ak.InputError, match="units of an ablation are of one level"):
        explainer.ablate(PROMPT, ANSWER, NESTED, masks=torch.ones(1, 2, dtype=torch.bool))
    encoder = ak.Explainer(tiny_encoders.CLASSIFIERS["bert"](), tiny_models.tokenizer(), progress=False)
    with pytest.raises(ak.InputError, match=r"nested units are for causal language models; Bert.* is none"):
        encoder.explain("w3 w4", 0, NESTED)
