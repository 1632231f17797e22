"""What a worker does, in this process: rows with their errors, and shares that make up one explanation."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import build, text_of, tokenizer

import atman_kernels as ak
from atman_kernels.errors import InputError, UnsupportedModelError
from atman_kernels.scale import Pool, explain_dataset, pool
from atman_kernels.scale.options import model_name, sorted_options
from atman_kernels.scale.shares import deal
from atman_kernels.scale.source import Row
from atman_kernels.scale.worker import Worker, facts_of, suffix_tokens

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


@pytest.mark.parametrize(
    ("units", "count", "recompute"), [("token", 1, None), ("token", 3, 1), ("word", 2, None), ("sentence", 2, 4)]
)
def test_shares_make_up_one_explanation(explainer, units, count, recompute):
    asked = {"max_new_tokens": 3, "recompute": recompute}
    whole = explainer.explain(PROMPT, None, units, **asked)
    shares = [worker_of(explainer).share(i, count, PROMPT, None, {"units": units, **asked})[:2] for i in range(count)]
    pool._check_agree([ablation for _, ablation in shares])
    joined = pool._joined(shares, 1.0)
    assert torch.allclose(joined.scores, whole.scores, atol=1e-4)
    assert torch.allclose(joined.base_logprobs, whole.base_logprobs, atol=1e-4)
    for name in ("units", "target_tokens", "settings", "measure", "recompute"):
        assert getattr(joined, name) == getattr(whole, name), name
    assert set(whole.stats) | {"workers"} == set(joined.stats)


def test_a_variant_costs_its_suffix(explainer):
    units = explainer.explain(PROMPT, " w4").units
    assert suffix_tokens(units) == list(range(len(units), 0, -1))


def test_shares_of_different_questions_are_refused(explainer):
    one, other = (worker_of(explainer).share(0, 1, PROMPT, target, ASKING)[1] for target in (" w4", " w5"))
    with pytest.raises(InputError, match="workers disagree on the target: ' w4' and ' w5'"):
        pool._check_agree([one, other])


def test_shares_of_different_models_are_refused(explainer):
    other = ak.Explainer(build("llama", seed=1), tokenizer(), progress=False)
    ablations = [worker_of(each).share(0, 1, PROMPT, " w4", ASKING)[1] for each in (explainer, other)]
    with pytest.raises(InputError, match="their models differ"):
        pool._check_agree(ablations)


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
