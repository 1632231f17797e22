"""`atman bench quality`: reading questions, finding the answer's units, resuming, the table."""

import itertools
import json
import math

import pytest
import torch
from at2_files import even_weights

from atman_kernels.errors import InputError, UnsupportedModelError
from atman_kernels.evaluation.quality import EvaluationProtocol, Setting, agreement, locate, measure, summarize
from atman_kernels.evaluation.results import ResultFile
from atman_kernels.evaluation.squad import Item, drawn, read_items, split_of, usable
from atman_kernels.explain.explainer import Explainer
from atman_kernels.hf.models.loading import load_model
from atman_kernels.planning.units import Unit
from atman_kernels.result.explanation import Explanation

CONTEXT = "The keeper had a grey dog named Pilot. The dog Pilot rang the bell."
SQUAD = {
    "data": [
        {
            "title": "Lighthouse",
            "paragraphs": [
                {
                    "context": CONTEXT,
                    "qas": [
                        {"id": "a", "question": "Name?", "answers": [{"text": "Pilot", "answer_start": 47}]},
                        {"id": "b", "question": "Colour?", "answers": [{"text": "green", "answer_start": 17}]},
                        {"id": "c", "question": "Why?", "answers": []},
                        {"id": "d", "question": "Colour?", "answers": [{"text": "grey dog", "answer_start": 17}]},
                    ],
                }
            ],
        }
    ]
}


@pytest.fixture
def squad(tmp_path):
    file = tmp_path / "squad.json"
    file.write_text(json.dumps(SQUAD), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def model(tiny_llama):
    return load_model(str(tiny_llama), device="cpu", dtype="float32")


def explanation_of(prompt: str, units: tuple[Unit, ...], totals: list[float]) -> Explanation:
    scores = torch.tensor(totals)[:, None]
    return Explanation(prompt, " x", units, scores, (" x",), torch.tensor([-1.0]), {}, {})


def words(prompt: str) -> tuple[Unit, ...]:
    """Each word with the space before it, as tokens often are."""
    units, at = [], 0
    for index, word in enumerate(prompt.split(" ")):
        start = max(0, at - 1)
        units.append(Unit(prompt[start : at + len(word)], start, at + len(word), (index,)))
        at += len(word) + 1
    return tuple(units)


# --- questions ---


def test_items_whose_answer_is_elsewhere_are_left_out_by_name(squad):
    good, left_out = usable(read_items(squad))
    assert [item.id for item in good] == ["a", "d"]
    assert [line.split(":")[0] for line in left_out] == ["b", "c"]
    assert "green" in left_out[0]
    assert "no answer" in left_out[1]


def test_a_split_is_by_article_and_does_not_change():
    def item(article: str) -> Item:
        return Item("", article, "", "", None, None)

    splits = [split_of(item(f"article {i}")) for i in range(400)]
    assert 60 < splits.count("dev") < 140
    assert [split_of(item(title)) for title in ("Prime_number", "Chloroplast")] == ["dev", "test"]
    assert splits[:10] == [split_of(item(f"article {i}")) for i in range(10)]


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"{", "not JSON"), (b"\xff", "not UTF-8"), (b"[]", "SQuAD format"), (b'{"data": [{}]}', "SQuAD format")],
)
def test_other_files_are_refused(tmp_path, content, says):
    file = tmp_path / "x.json"
    file.write_bytes(content)
    with pytest.raises(InputError, match=says):
        read_items(file)


# --- where the answer is ---


def test_only_the_gold_occurrence_is_the_truth():
    item = Item("a", "", CONTEXT, "Name?", "Pilot", 47)
    prompt = f"Read. {CONTEXT} Name?"
    first, last, truth = locate(explanation_of(prompt, words(prompt), [0.0] * len(words(prompt))), item)
    assert [words(prompt)[i].text for i in truth] == [" Pilot"]
    assert truth == [11]
    assert (first, last) == (1, 15)


def test_a_span_of_several_units_is_found_whole():
    item = Item("d", "", CONTEXT, "?", "grey dog", 17)
    _, _, truth = locate(explanation_of(CONTEXT, words(CONTEXT), [0.0] * 14), item)
    assert [words(CONTEXT)[i].text for i in truth] == [" grey", " dog"]


def test_a_prompt_without_the_passage_is_refused():
    with pytest.raises(InputError, match="does not stand in the prompt"):
        locate(explanation_of("other", words("other"), [0.0]), Item("a", "", CONTEXT, "?", "Pilot", 47))


# --- measures ---


def test_known_values():
    entries = [
        {"item": "1", "setting": "s", "relevance": [9.0, 3.0, 1.0, 0.0, 7.0], "context": [1, 4], "truth": [1],
         "seconds": 1.0},
        {"item": "2", "setting": "s", "relevance": [9.0, 1.0, 3.0, -5.0, 7.0], "context": [1, 4], "truth": [1],
         "seconds": 3.0},
    ]  # fmt: skip
    (found,) = summarize(entries)
    assert found.items == 2
    assert found.values["mAP"] == pytest.approx((3 / 4 + 1 / 4) / 2)  # what stands outside the passage does not count
    assert found.values["mAR"] == pytest.approx((1 + 1 / 3) / 2)
    assert found.values["hit@1"] == 0.5
    assert found.values["hit@5"] == 1.0
    assert found.values["seconds"] == 2.0
    low, high = found.intervals["hit@1"]
    assert (low, high) == (0.0, 1.0)


def test_agreement_is_over_the_passage_of_common_items():
    def entry(item, setting, relevance):
        return {"item": item, "setting": setting, "relevance": relevance, "context": [1, 4]}

    found = agreement(
        [
            entry("1", "a", [9.0, 1.0, 2.0, 3.0, 0.0]),
            entry("2", "a", [9.0, 1.0, 2.0, 3.0, 0.0]),
            entry("1", "b", [0.0, 10.0, 20.0, 30.0, 9.0]),
            entry("2", "b", [0.0, 3.0, 2.0, 1.0, 9.0]),
            entry("1", "constant", [0.0, 1.0, 1.0, 1.0, 9.0]),
            entry("3", "c", [0.0, 3.0, 2.0, 1.0, 9.0]),
            {"item": "1", "setting": "refused", "refused": "why"},
        ]
    )
    assert found == {("a", "b"): pytest.approx(0.0)}
    assert agreement([entry("1", "a", [0, 1, 2, 3]), entry("1", "b", [0, 9, 8, 7])]) == {("a", "b"): pytest.approx(-1)}


def test_a_method_that_finds_nothing_scores_nothing():
    entry = {"item": "1", "setting": "s", "relevance": [0.0, -1.0], "context": [0, 2], "truth": [0], "seconds": 1.0}
    (found,) = summarize([entry, entry | {"item": "2"}])
    assert [found.values[name] for name in ("mAP", "mAR", "hit@1", "hit@5")] == [0, 0, 0, 0]


# --- runs ---


def test_runs_are_resumed_and_nothing_is_counted_twice(model, squad, tmp_path):
    items, _ = usable(read_items(squad))
    settings = [Setting("atman"), Setting("other", explainer={"mode": "shifted"})]
    protocol, path = EvaluationProtocol(units="word"), tmp_path / "r.jsonl"
    calls = []

    class Stopped(Exception):
        pass

    def stop() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Stopped

    with pytest.raises(Stopped):
        measure(*model, items, settings, protocol, ResultFile(path, {"run": 1}), stop)
    with open(path, "a", encoding="utf-8") as stream:
        stream.write('{"item": "d", "sett')  # cut off while it was written
    resumed = ResultFile(path, {"run": 1})
    assert len(resumed.entries) == 3
    before = [json.dumps(entry) for entry in resumed.entries]
    measure(*model, items, settings, protocol, resumed)
    again = ResultFile(path, {"run": 1})
    assert [json.dumps(entry) for entry in again.entries][:3] == before
    pairs = [(entry["item"], entry["setting"]) for entry in again.entries]
    assert sorted(pairs) == sorted((item.id, s.name) for item in items for s in settings)


def test_relevance_is_the_explainers(model, squad, tmp_path):
    items, _ = usable(read_items(squad))
    protocol = EvaluationProtocol(units="token")
    results = ResultFile(tmp_path / "r.jsonl", {})
    measure(*model, items[:1], [Setting("x", explainer={"factor": 0.3})], protocol, results)
    expected = Explainer(*model, factor=0.3, progress=False).explain(items[0].prompt(chat=False), " Pilot")
    assert results.entries[0]["relevance"] == pytest.approx(expected.total.tolist(), abs=1e-4)
    held = "".join(expected.units[i].text for i in results.entries[0]["truth"])
    assert held.strip() == "Pilot"


def test_questions_about_one_passage_are_explained_together_and_as_if_alone(model, squad, tmp_path):
    items, _ = usable(read_items(squad))
    results = ResultFile(tmp_path / "r.jsonl", {})
    measure(*model, items, [Setting("x")], EvaluationProtocol(), results)
    explainer = Explainer(*model, progress=False)
    for item, entry in zip(items, results.entries, strict=True):
        alone = explainer.explain(item.prompt(chat=False), f" {item.answer}")
        assert entry["relevance"] == pytest.approx(alone.total.tolist(), abs=1e-4)
    assert results.entries[0]["seconds"] == results.entries[1]["seconds"]  # of both together, halved


def test_units_of_the_passage_alone(model, squad, tmp_path):
    """Those of the whole prompt that lie in it, but for tokens of white space alone; others are not suppressed."""
    items, _ = usable(read_items(squad))
    protocol = EvaluationProtocol(passage_only=True)
    results = ResultFile(tmp_path / "r.jsonl", {})
    measure(*model, items[:1], [Setting("lasso", "lasso", {"samples": 8}), Setting("x")], protocol, results)
    whole = Explainer(*model, progress=False).explain(items[0].prompt(chat=False), " Pilot")
    first, last, truth = locate(whole, items[0])
    inside = [index for index in range(first, last) if whole.units[index].text.strip()]
    assert len(inside) < len(whole.units)
    sparse, own = results.entries
    assert own["context"] == sparse["context"] == [0, len(inside)]
    assert [inside[index] for index in own["truth"]] == truth
    assert own["relevance"] == pytest.approx(whole.total[inside].tolist(), abs=1e-4)
    assert len(sparse["relevance"]) == len(inside)
    assert own["processor_seconds"] > 0


@pytest.mark.parametrize("chat", [False, True])
def test_a_question_is_put_as_the_command_line_puts_it(model, squad, tmp_path, monkeypatch, chat):
    """The same prompt and target from `atman explain --squad`, and what the result is of."""
    from atman_kernels.cli.explain import _question

    asked = []

    def note(self, prompts, targets, *args, **options):
        asked.extend(zip(prompts, targets, strict=True))
        raise UnsupportedModelError("not needed")

    monkeypatch.setattr(Explainer, "explain_batch", note)
    items = [item for item in read_items(squad) if item.problem is None]
    results = ResultFile(tmp_path / "r.jsonl", {})
    measure(*model, items, [Setting("x")], EvaluationProtocol(chat=chat), results)
    numbers = [read_items(squad).index(item) for item in items]
    assert asked == [_question(None, None, str(squad), number, None, chat) for number in numbers]
    name, answer = asked[0]
    assert ("Answer:" in name, answer.startswith(" ")) == (not chat, not chat)
    assert name.startswith(f"{CONTEXT}\n\n")


def test_measurements_of_another_chat_prompt_are_not_continued(squad, tmp_path):
    from atman_kernels.cli.bench_quality import _header

    def header(chat):
        return _header(str(squad), EvaluationProtocol(chat=chat), {"split": "all", "model": "m", "dtype": "float32"})

    plain, chat = header(chat=False), header(chat=True)
    assert "prompt" not in plain, "files of earlier versions go on"
    ResultFile(tmp_path / "r.jsonl", {name: value for name, value in chat.items() if name != "prompt"})
    with pytest.raises(InputError, match="of another run: prompt was None, now it is"):
        ResultFile(tmp_path / "r.jsonl", chat)


def test_another_setting_joins_and_another_meaning_does_not(model, squad, tmp_path):
    items, _ = usable(read_items(squad))
    path = tmp_path / "r.jsonl"
    measure(*model, items, [Setting("a", explainer={"factor": 0.5})], EvaluationProtocol("word"), ResultFile(path, {}))
    measure(*model, items, [Setting("b", "random")], EvaluationProtocol("word"), ResultFile(path, {}))
    again = ResultFile(path, {})
    assert [entry["setting"] for entry in again.entries] == ["a", "a", "b", "b"]
    in_full = {"mode": "log_additive", "factor": 0.5, "similarity_threshold": None, "layers": None}
    assert again.settings["a"]["explainer"] == in_full, "another version may have other defaults"
    with pytest.raises(InputError, match="setting 'a' was"):
        measure(*model, items, [Setting("a")], EvaluationProtocol("word"), again)


def test_items_are_drawn_by_whole_passages():
    items = [Item(f"{p}{q}", "", f"passage {p}", "", None, None) for q in range(3) for p in range(20)]
    chosen = drawn(items, 10, seed=1)
    contexts = [item.context for item in chosen]
    assert [len(list(group)) for _, group in itertools.groupby(contexts)] == [3, 3, 3, 1]
    assert chosen == drawn(items, 10, seed=1) == drawn(items, None, seed=1)[:10]
    assert chosen != drawn(items, 10, seed=2)
    assert sorted(item.id for item in drawn(items, None, seed=1)) == sorted(item.id for item in items)
    with pytest.raises(InputError, match="seed"):
        drawn(items, 1, seed=-1)


def test_a_method_that_a_model_refuses_is_named_in_the_table(model, squad, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise UnsupportedModelError("no attention weights")

    monkeypatch.setattr(Explainer, "explain_batch", refuse)
    items, _ = usable(read_items(squad))
    results = ResultFile(tmp_path / "r.jsonl", {})
    measure(*model, items, [Setting("x")], EvaluationProtocol(), results)
    (found,) = summarize(results.entries)
    assert (found.items, found.refused) == (0, "no attention weights")


def test_curves_fall_faster_when_the_strongest_units_go_first(model, squad, tmp_path):
    items, _ = usable(read_items(squad))
    results = ResultFile(tmp_path / "r.jsonl", {})
    protocol = EvaluationProtocol(units="word", faithfulness_items=2)
    measure(*model, items, [Setting("atman", explainer={"factor": 0.0})], protocol, results)
    areas = [entry["faithfulness"] for entry in results.entries]
    assert all(map(math.isfinite, areas))
    assert sum(areas) > 0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"format": "other"}\n', "no result file"),
        ("hello\n", "no result file"),
        ('{"format": "atman-quality", "version": 9}\n', "version 9"),
        ('{"format": "atman-quality", "version": 2, "run": 2}\n', "of another run: run was 2, now it is 1"),
    ],
)
def test_other_result_files_are_refused(tmp_path, content, says):
    path = tmp_path / "r.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=says):
        ResultFile(path, {"run": 1})
    assert path.read_text(encoding="utf-8") == content


def test_methods_are_asked_for_the_whole_answer_where_that_is_cheaper():
    from atman_kernels.cli.bench_quality import compared

    found = compared("atman,rollout,attnlrp,integrated_gradients", {"factor": 0.1}, ig_steps=5)
    assert [setting.options for setting in found] == [
        {},
        {},
        {"whole_answer": True},
        {"whole_answer": True, "steps": 5},
    ]
    assert all(setting.explainer == {"factor": 0.1} for setting in found)


def test_what_is_compared_unasked(model, tmp_path):
    """All but what takes a hundred times as long, or a file that was not given."""
    from atman_kernels.cli.bench_quality import compared
    from atman_kernels.explain.methods import names

    weights = str(even_weights(model[0], tmp_path))

    def asked(at2_weights=None):
        return {setting.name: (setting.method, setting.options) for setting in compared(None, {}, 5, at2_weights)}

    assert set(asked()) == {*names(), "direct", "search"} - {"shapley", "lasso", "at2"}
    assert asked()["direct"] == ("atman", {"recompute": 1})
    assert asked()["search"] == ("atman", {"exact": 16})
    assert asked(weights) == asked() | {"at2": ("at2", {"weights": weights})}
