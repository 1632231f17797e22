"""What a worker does, in this process: rows with their errors, and its part of one prompt; and who shares them out."""

import warnings
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import build, text_of, tokenizer

import atman_kernels as ak
from atman_kernels.errors import InputError, UnsupportedModelError
from atman_kernels.scale import Pool, explain_dataset, pool
from atman_kernels.scale.cluster import Settled
from atman_kernels.scale.options import model_name, sorted_options
from atman_kernels.scale.question import Begun, Question
from atman_kernels.scale.shares import deal
from atman_kernels.scale.source import Row
from atman_kernels.scale.worker import Worker, facts_of

PROMPT = text_of([5, 40, 17, 23, 88, 9, 61, 35, 35, 70, 12])
ASKING = {"units": "token"}


def worker_of(explainer):
    worker = Worker()
    worker.explainer = explainer
    return worker


@pytest.fixture(scope="module")
def explainer():
    return ak.Explainer(build("llama"), tokenizer(), progress=False)


def test_rows_are_explained_together_and_bad_ones_become_errors(explainer):
    rows = [Row(i, PROMPT[: 12 + 3 * i], " w4 w5") for i in range(6)]
    rows[2] = Row(2, "", " w4")
    rows[5] = Row(5, None, " w4")
    rows[3] = Row(3, PROMPT * 60, " w4")  # longer than the model's positions
    found, _ = worker_of(explainer).explain(rows, ASKING)
    assert [row["id"] for row in found] == [0, 1, 2, 3, 4, 5]
    assert [bool(row.get("error")) for row in found] == [False, False, True, True, False, True]
    assert found[2]["error"].startswith("InputError: prompt is empty")
    for row, result in zip(rows, found, strict=True):
        assert (result["fingerprint"], result["version"]) == (row.fingerprint, ak.__version__)
        if not result.get("error"):
            expected = explainer.explain(row.prompt, row.target).scores
            assert torch.allclose(torch.tensor(result["scores"]), expected, atol=1e-4)


def test_a_model_s_fault_is_no_row_s(explainer, monkeypatch):
    def refused(*_, **__):
        raise UnsupportedModelError("no attention here")

    monkeypatch.setattr(explainer, "explain_batch", refused)
    with pytest.raises(UnsupportedModelError, match="no attention here"):
        worker_of(explainer).explain([Row(0, PROMPT, " w4")], ASKING)


def test_warnings_come_back_with_the_results(explainer, monkeypatch):
    def warned(prompts, *_, **__):
        warnings.warn("slower than it might be", stacklevel=1)
        warnings.warn("an old name", DeprecationWarning, stacklevel=1)
        return [explainer.explain(prompt, " w4") for prompt in prompts]

    monkeypatch.setattr(explainer, "explain_batch", warned)
    assert worker_of(explainer).explain([Row(0, PROMPT, None)], ASKING)[1] == ["slower than it might be"]


@given(st.lists(st.integers(1, 100), max_size=40), st.integers(1, 6))
def test_dealing_is_fair_and_forgets_nothing(costs, shares):
    dealt = deal(costs, shares)
    assert sorted(index for own in dealt for index in own) == list(range(len(costs)))
    sums = [sum(costs[i] for i in own) for own in dealt]
    assert max(sums) - min(sums) <= max(costs, default=0)


class Hands:
    """A crew whose workers are in this process, each a model of its own; some forget a question, as new ones would."""

    is_closed = False

    def __init__(self, workers):
        self.workers, self.calls = workers, []

    def run(self, next_task, most=None):
        while (task := next_task()) is not None:
            number = len(self.calls) % len(self.workers)
            if len(self.calls) % 3 == 2:
                self.workers[number] = worker_of(self.workers[number].explainer)
            self.calls.append((number, task.method))
            yield task, getattr(self.workers[number], task.method)(*task.arguments)

    def close(self):
        self.is_closed = True


@pytest.fixture
def pooled(monkeypatch):
    """A pool of workers that have these explainers."""

    def made(*explainers):
        crew = Hands([worker_of(explainer) for explainer in explainers])
        monkeypatch.setattr(pool, "cluster", lambda *_: nullcontext(Settled(len(explainers), 0, 1)))
        monkeypatch.setattr(pool, "Crew", lambda *_: crew)
        return Pool("tiny")

    return made


@pytest.mark.parametrize(
    ("units", "count", "options"),
    [
        ("token", 1, {}),
        ("token", 3, {"recompute": 1}),
        ("word", 2, {"include_target": True}),
        ("sentence", 2, {"recompute": 4, "chat": False}),
        ("token", 3, {"exact": 11}),  # of eleven
    ],
)
def test_a_pool_explains_what_one_process_does(explainer, pooled, units, count, options):
    asked = {"max_new_tokens": 3, **options}
    whole = explainer.explain(PROMPT, None, units, **asked)
    with pooled(*[explainer] * count) as several:
        joined = several.explain(PROMPT, None, units, **asked)
    assert torch.allclose(joined.scores, whole.scores, atol=1e-4)
    assert torch.allclose(joined.base_logprobs, whole.base_logprobs, atol=1e-4)
    for name in ("units", "target_tokens", "settings", "measure", "recompute", "exact"):
        assert getattr(joined, name) == getattr(whole, name), name
    assert set(whole.stats) | {"workers"} == set(joined.stats)
    assert joined.stats["variants"] >= len(whole.units)


def test_a_pool_s_search_decides_once_for_all(explainer, pooled):
    """Flags and scores are one process's, estimates too; each round goes on from the run that a worker keeps."""
    long = text_of(torch.randint(3, 99, (100,), generator=torch.Generator().manual_seed(64)).tolist())
    whole = explainer.explain(long, " w4 w5", exact=6)
    with pooled(explainer, explainer, explainer) as several:
        joined = several.explain(long, " w4 w5", exact=6)
        calls = [method for _, method in several._crew.calls]
    assert joined.exact == whole.exact
    assert 6 <= sum(whole.exact) < 100
    assert joined.settings == whole.settings
    assert torch.allclose(joined.scores, whole.scores, atol=1e-4)
    assert calls == ["ask"] * 3 + ["hint"] + ["score"] * (len(calls) - 4)
    assert len(calls) == 4 + 6 + 3  # hints by one; the round in twice as many shares; the exact units, by all three
    everything = explainer.explain(long, " w4 w5").stats["tokens_through_model"]
    assert joined.stats["tokens_through_model"] < everything


def test_a_pool_keeps_its_question_s_run(explainer, pooled, monkeypatch):
    """Of each question a worker runs what its rounds go on from once, and lets it go with the next question."""
    begun = []
    monkeypatch.setattr(
        explainer.runner, "start", lambda asked, of=explainer.runner.start: begun.append(1) or of(asked)
    )
    long = text_of(range(3, 99))
    with pooled(explainer) as one:
        one.explain(long, " w4", exact=3)  # its third call forgets
        assert len(one._crew.calls) >= 3
        assert len(begun) == 1 + len(one._crew.calls) // 3
        before = one._crew.workers[0]._begun
        one.explain(PROMPT, " w4")
        assert one._crew.workers[0]._begun is not before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"target": 3}, "target must be a text or None"),
        ({"exact": 0}, "exact must be an integer >= 1 or None, got 0"),
        ({"exact": 2, "recompute": 2}, "recompute and exact do not go together"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1"),
        ({"factor": 0.5}, r"factor is an option of Pool, not of Pool\.explain"),
        ({"versus": " w5"}, "there is no option 'versus'"),
        ({"method": "shapley"}, "there is no option 'method'"),
    ],
)
def test_a_pool_refuses_before_it_asks_its_workers(explainer, pooled, arguments, message):
    with pooled(explainer) as one:
        with pytest.raises(InputError, match=message):
            one.explain(**{"prompt": PROMPT, **arguments})
        assert one._crew.calls == []


def test_workers_that_make_something_else_of_a_question_are_refused(explainer, pooled):
    other = ak.Explainer(build("llama", seed=1), tokenizer(), progress=False)
    with pooled(explainer, other) as several:
        with pytest.raises(InputError, match=r"workers disagree on the target.*give it as target"):
            several.explain(PROMPT, max_new_tokens=3)
        with pytest.raises(InputError, match="their models differ"):
            several.explain(PROMPT, " w4")


def test_a_variant_costs_its_suffix(explainer):
    asked = Begun(explainer, Question(1, PROMPT, " w4", sorted_options({}, "token", ak.Explainer.ablate).asking)).asked
    count = len(asked.units)
    assert asked.suffix_tokens(range(count), None) == list(range(count + 1, 1, -1))
    assert asked.suffix_tokens([0, count - 2, count - 1], 2) == [3, 3, 2]


def test_facts_tell_models_apart():
    facts = [facts_of(build("llama", seed)) for seed in (0, 0, 1)]
    assert facts[0] == facts[1]
    assert facts[0]["weights"] != facts[2]["weights"]


def test_options_find_their_places():
    found = sorted_options(
        {"dtype": torch.float32, "layers": range(2), "chat": True, "method": "shapley", "permutations": 8},
        "word",
        ak.Explainer.explain_batch,
    )
    assert found.loading["dtype"] == "float32"
    assert found.explaining["layers"] == [0, 1]
    assert found.asking["chat"]
    assert (found.asking["units"], found.asking["permutations"]) == ("word", 8)
    assert "seed" in found.asking, "the method's defaults are settings, too"
    given_default = sorted_options({"factor": 0.0}, "token", ak.Explainer.explain_batch)
    assert given_default == sorted_options({}, "token", ak.Explainer.explain_batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"colour": "red"}, "there is no option 'colour'; there are attn_implementation, chat, device"),
        ({"method": "shapley", "colour": "red"}, "method 'shapley' has no option 'colour'"),
        ({"method": "none"}, "method must be one of 'atman'"),
        ({"units": "sentense"}, "units must be one of 'token', 'word'"),
        ({"units": [(0, 1)]}, "units must be one of 'token', 'word'"),
        ({"layers": object()}, "layers must be a number, a text or a list of them, got object"),
        ({"model": object()}, "model must be a hub id, a folder, a GGUF file or 'smollm2'"),
        ({"model": ""}, "model is empty"),
        ({"workers": 0}, "workers must be an integer"),
        ({"gpus_per_worker": 2}, "gpus_per_worker must be a number from 0 to 1"),
        ({"cpus_per_worker": 0.5}, "cpus_per_worker must be an integer"),
        ({"prompts_per_task": 0}, "prompts_per_task must be an integer >= 1"),
        ({"progress": "no"}, "progress must be True or False"),
        ({"exact": 0}, "exact must be an integer >= 1 or None, got 0"),
        ({"exact": 4, "recompute": 4}, "recompute and exact do not go together"),
        ({"exact": 4, "method": "shapley"}, "method with exact must be 'atman', got 'shapley'"),
        ({"recompute": 1, "method": "attnlrp"}, "method with recompute must be one of atman"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1"),
        ({"chat": 1}, "chat must be True or False"),
    ],
)
def test_arguments_are_checked_before_anything_starts(tmp_path, options, message):
    pytest.importorskip("ray")
    with pytest.raises(InputError, match=message):
        explain_dataset(tmp_path / "no.jsonl", tmp_path / "out", **{"model": "tiny", **options})
    assert not list(tmp_path.iterdir())


def test_options_of_a_pool_and_of_its_calls_are_told_apart():
    with pytest.raises(InputError, match=r"chat is an option of Pool\.explain, not of Pool"):
        Pool("tiny", chat=True)


def test_a_folder_is_found_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert model_name("here") == str(tmp_path / "here")
    assert model_name("org/name") == "org/name"
