"""The benchmark of the search: recall and cost counted by hand, and passages of a length."""

import json

import pytest
from click.testing import CliRunner

from atman_kernels.evaluation.squad import Item
from benchmarks import search_recall
from benchmarks.prompts import passages_of_length

UNITS = 120


def entry(item="a", found=(0, 1, 2, 3)):
    """Effects fall from the first unit on; the direct ones do not know the third, hints know only that."""
    exact = [float(UNITS - i) for i in range(UNITS)]
    direct = [-1.0 if i == 2 else score for i, score in enumerate(exact)]
    hints = [score if i == 2 else 0.0 for i, score in enumerate(exact)]
    rounds = {f"recompute {depth}": {"scores": direct} for depth in (1, 4, 8, 16)}
    search = {"exact": list(found), "tokens": 300, "seconds": 1.0}
    common = {"length": 100, "item": item, "dtype": "bfloat16", "units": UNITS, "linear": {"scores": hints}}
    common["attnlrp"] = {"scores": [-score for score in exact]}  # its sign is not what speaks
    return common | {"exact": {"scores": exact, "tokens": 600, "seconds": 4.0}, "search": search} | rounds


def run(tmp_path, command, *entries):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(each) + "\n" for each in entries))
    arguments = [command, str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.json")]
    result = CliRunner().invoke(search_recall.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return json.loads((tmp_path / "out.json").read_text())["lengths"]["100"]


def test_report(tmp_path):
    found = run(tmp_path, "report", entry("a"), entry("b", found=[1, 2, 3, 4]))
    assert (found["questions"], found["passages"]) == (2, 1), "the two cost the same together: they are of one passage"
    assert [found[f"top {top}"]["mean"] for top in (1, 5, 10)] == [0.5, 0.8, 0.4]
    ten = sum(UNITS - unit for unit in range(10))
    four, others = ten - sum(UNITS - unit for unit in range(4, 10)), sum(UNITS - unit for unit in (1, 2, 3, 4))
    assert found["strength of the 10 strongest chosen over that of the 10"]["mean"] == round(
        (four + others) / 2 / ten, 4
    )
    assert (found["part of the tokens, together"], found["part of the seconds, together"]) == (0.5, 0.25)
    of_chosen = [sum(UNITS - unit for unit in chosen) + 3 * UNITS for chosen in ([0, 1, 2, 3], [1, 2, 3, 4])]
    assert found["part of the tokens, a question alone"] == round(sum(of_chosen) / (UNITS * (UNITS + 1)), 4)


def test_units_of_several_tokens_cost_what_stands_behind_their_first(tmp_path):
    words = entry() | {"starts": [2 * unit for unit in range(UNITS)], "tokens": 2 * UNITS}
    found = run(tmp_path, "report", words)
    of_chosen = sum(2 * (UNITS - unit) for unit in range(4)) + 2 * 2 * UNITS + UNITS
    assert found["part of the tokens, a question alone"] == round(of_chosen / (UNITS * (UNITS + 1)), 4)


def test_rounding(tmp_path):
    files = [str(tmp_path / name) for name in ("narrow.jsonl", "wide.jsonl")]
    wide, narrow = entry(), entry()
    narrow["exact"] = {"scores": [score - 12 * (i == 9) for i, score in enumerate(narrow["exact"]["scores"])]}
    for file, entries in zip(files, ([narrow, entry("not in the other")], [wide]), strict=True):
        with open(file, "w") as stream:
            stream.writelines(json.dumps(each) + "\n" for each in entries)
    said = json.loads(CliRunner().invoke(search_recall.main, ["rounding", *files], catch_exceptions=False).output)
    assert (said["questions"], said["top 5"]["mean"], said["top 10"]["mean"]) == (1, 1.0, 0.9)
    assert said["largest difference"]["mean"] == 12


def test_choose(tmp_path):
    found = run(tmp_path, "choose", entry("a"), entry("b"))
    assert found["relevance of AttnLRP as a hint, too"]["top 10"]["mean"] == 1.0
    assert found["as it is"]["top 10"]["mean"] == 1.0
    blind = found["without hints"]
    assert blind["top 10"]["mean"] == 0.9, "the third, which no round sees"
    assert found["as it is"]["part of the tokens"] < found["first_depth = 8"]["part of the tokens"]


class Words:
    """A tokenizer whose tokens are words."""

    def __call__(self, text, add_special_tokens=True, return_offsets_mapping=False):
        spans, at = [], 0
        for word in text.split():
            at = text.index(word, at)
            spans.append((at, at + len(word)))
            at += len(word)
        return {"input_ids": list(range(len(spans))), "offset_mapping": spans}


@pytest.mark.parametrize("tokens", [60, 100])
def test_passages_are_filled_up_and_the_answer_stays_where_it_is(tokens):
    def item(number, passage):
        text = f"the answer of {passage} is {passage}x " + "word " * 20
        return Item(str(number), f"article {passage}", text, "what?", f"{passage}x", text.index(f"{passage}x"))

    items = [item(0, 0), item(1, 0), item(2, 0), *(item(3 + i, 1 + i) for i in range(8))]
    groups = list(passages_of_length(Words(), items, tokens, per_passage=2))
    assert [len(group) for group in groups] == [2] + [1] * 8
    for asked in groups:
        assert {each.context for each in asked} == {asked[0].context}
        assert all(each.problem is None for each in asked)
        assert tokens - 8 <= len(asked[0].prompt(chat=False).split()) <= tokens + 2
    assert groups == list(passages_of_length(Words(), items, tokens, per_passage=2)), "drawn from the passage itself"
    assert len({group[0].start for group in groups}) > 1, "at different places"


def test_passages_that_are_too_long_are_left_out():
    text = "word " * 100 + "here"
    assert not list(passages_of_length(Words(), [Item("0", "a", text, "where?", "here", 500)], 50, per_passage=1))
