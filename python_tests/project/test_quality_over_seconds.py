"""The benchmark of quality over seconds on a tiny model: its prompts, that it goes on, its rows, its figure."""

import json
import random

import pytest
from at2_files import even_weights
from click.testing import CliRunner

from atman_kernels.evaluation.squad import Item, split_of
from atman_kernels.hf.models.loading import load_model
from benchmarks.quality_over_seconds import __main__ as program
from benchmarks.quality_over_seconds.__main__ import ahead, main, markdown, table
from benchmarks.quality_over_seconds.questions import lengthened, short_questions

WORDS = ("rope", "harbour", "lamp", "winter", "keeper", "stone", "bell", "grey", "railway", "salt")


def passage(number: int) -> str:
    rng = random.Random(number)
    return " ".join(rng.choice(WORDS) for _ in range(12)) + f" Pilot{number}."


def items() -> list[Item]:
    """Two questions about each of 20 passages, an article each, all of the split test."""
    articles = [
        name for name in (f"article {n}" for n in range(60)) if split_of(Item("", name, "", "", "", 0)) == "test"
    ]
    found = []
    for number, article in enumerate(articles[:20]):
        context = passage(number)
        for question, answer in (("name?", f"Pilot{number}"), ("what?", context.split(" ")[0])):
            found.append(Item(f"{number} {question}", article, context, question, answer, context.find(answer)))
    return found


@pytest.fixture(scope="module")
def model(tiny_llama):
    return load_model(str(tiny_llama), device="cpu", dtype="float32")


def test_a_passage_stands_among_others_of_other_articles(model):
    _, tokenizer = model
    heads = []
    for item in items():
        found = lengthened(tokenizer, item, items(), 300, seed=0)
        length = len(tokenizer(found.prompt(False))["input_ids"])
        assert 280 <= length <= 300
        assert found.problem is None
        assert found.context.count(item.context) == 1
        assert found.context[found.start - item.start :].startswith(item.context)
        heads.append(found.start - item.start)
        before, after = found.context[: heads[-1]], found.context[heads[-1] + len(item.context) :]
        assert all(word.strip(".").rstrip("0123456789") in (*WORDS, "Pilot") for word in (before + after).split())
        assert found == lengthened(tokenizer, item, items(), 300, seed=0)
    room = max(heads)
    assert min(heads) < room / 4 < 3 * room / 4 < sorted(heads)[-3], "anywhere, beginnings and ends included"


def test_where_there_is_no_room_the_passage_stands_alone(model):
    _, tokenizer = model
    for item in items()[:10]:
        for room in range(9):
            tokens = len(tokenizer(item.prompt(False))["input_ids"]) + room
            found = lengthened(tokenizer, item, items(), tokens, seed=0)
            assert item.context in found.context
            assert len(tokenizer(found.prompt(False))["input_ids"]) <= tokens


def test_a_question_that_is_too_long_is_no_short_one(model):
    _, tokenizer = model
    with pytest.raises(ValueError, match="tokens by itself, 20 are wanted"):
        lengthened(tokenizer, items()[0], items(), 20, seed=0)
    assert short_questions(tokenizer, items(), 20, seed=0) == []
    found = short_questions(tokenizer, items(), 10_000, seed=0)
    assert len({item.context for item in found[:20]}) == 20, "every passage once before any twice"
    assert len(found) == 40


@pytest.fixture
def squad(tmp_path):
    by_context: dict = {}
    for item in items():
        answers = [{"text": item.answer, "answer_start": item.start}]
        by_context.setdefault((item.article, item.context), []).append(
            {"id": item.id, "question": item.question, "answers": answers}
        )
    data = [{"title": a, "paragraphs": [{"context": c, "qas": qas}]} for (a, c), qas in by_context.items()]
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"data": data}))
    return file


def stopped(*arguments):
    raise KeyboardInterrupt


def test_measured_in_stages_and_row_by_row(model, tiny_llama, squad, tmp_path, monkeypatch):
    weights = even_weights(model[0], tmp_path)
    common = ["--squad", squad, "--model", tiny_llama, "--dtype", "float32", "--at2-weights", weights]
    common += [
        "--measurements",
        tmp_path / "m.jsonl",
        "--output",
        tmp_path / "out.json",
        "--figure",
        tmp_path / "f.svg",
    ]

    def run(*more):
        found = CliRunner().invoke(main, [str(each) for each in (*common, *more)])
        assert found.exit_code == 0, found.output
        return json.loads((tmp_path / "out.json").read_text()), (tmp_path / "m.jsonl").read_text().splitlines()

    only = ("--only", "direct,search,at2,random")
    result, first = run(*only, "--counts", "90:2,120:1")
    assert [(row["tokens"], row["setting"], row["items"]) for row in result["rows"]] == [
        (tokens, name, count) for tokens, count in ((90, 2), (120, 1)) for name in ("direct", "at2", "search", "random")
    ]
    assert all(row["values"]["processor_seconds"] > 0 for row in result["rows"])
    assert all(size[1] <= int(tokens) for tokens, size in result["prompt_tokens"].items())
    assert "<svg" in (tmp_path / "f.svg").read_text()
    result, second = run(*only, "--counts", "90:3,120:1")
    assert second[: len(first)] == first, "what was there is not measured again"
    assert len(second) == len(first) + 4
    with monkeypatch.context() as patch:
        patch.setattr(program, "measure", stopped)
        assert len(run(*only, "--counts", "90:3,120:1")[0]["rows"]) == 8, "the table is of what is there"
    result, third = run("--only", "search", "--counts", "90:3,120:1", "--again")
    kept = [line for line in second if json.loads(line).get("setting") != "search"]
    assert third[: len(kept)] == kept
    assert [json.loads(line)["setting"] for line in third[len(kept) :]] == ["search"] * 5
    assert len(result["rows"]) == 8, "the other rows stay"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--counts", "128"), "--counts must be like 128:40"),
        (("--counts", "128:0"), "--counts must be like 128:40"),
        (("--only", "chefer"), "'chefer' is none of direct, "),
        (("--only", "at2", "--model", "other"), "--at2-weights is missing"),
        (("--only", "direct", "--squad", "nowhere.json"), "does not exist"),
    ],
)
def test_what_is_refused(options, message, tmp_path):
    found = CliRunner().invoke(main, ["--measurements", str(tmp_path / "m"), "--output", str(tmp_path / "o"), *options])
    assert (found.exit_code, message in found.output) == (2, True), found.output


def row(setting, seconds, precision, hits=0.5):
    values = {"processor_seconds": seconds, "mAP": precision, "hit@5": hits}
    return {"tokens": 128, "setting": setting, "items": 3, "values": values}


def test_who_is_ahead_for_its_seconds_is_said():
    rows = [row("direct", 1.0, 0.6), row("atman", 5.0, 0.4), row("attnlrp", 2.0, 0.7), row("linear", 6.0, 0.5)]
    assert ahead(rows) == ["128: attnlrp is ahead in mAP, 70.0 against 60.0"]
    assert ahead([row("direct", 1.0, 0.6), row("at2", 0.5, 0.1)])[0].startswith("128: at2 takes less time")


def test_the_table_of_the_documentation():
    one = row("search", 1.0, 0.1) | {"intervals": {"mAP": (0.05, 0.25), "processor_seconds": (0.5, 1.5)}}
    one["values"]["hit@1"] = 1.0
    assert markdown([one])[2] == "| 128 | search | 10.0 (5.0 – 25.0) | 100.0 | 50.0 | 1.00 (0.50 – 1.50) |"


def test_rows_are_replaced_one_by_one(tmp_path):
    old, new = row("search", 1.0, 0.1), row("search", 2.0, 0.2)
    (tmp_path / "o.json").write_text(json.dumps({"rows": [row("direct", 1.0, 0.6), old]}))
    found = table(tmp_path / "o.json", {"model": "m"}, [new])
    assert [(each["setting"], each["values"]["mAP"]) for each in found["rows"]] == [("direct", 0.6), ("search", 0.2)]
