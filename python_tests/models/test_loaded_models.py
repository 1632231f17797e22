"""Every way to load a model that docs/loading.md lists: exact, or refused by name. Those whose package is not here
are skipped; `make loading-table` installs them all."""

import dataclasses
import json
import re
from importlib.metadata import version

import loading_table
import loading_trials
import pytest
import torch
from loading_trials import WAYS, Result

RECORD = json.loads((loading_table.ROOT / "docs" / "loading.json").read_text(encoding="utf-8"))
RECORDED = {(row["way"], row["dtype"]): Result(**row) for row in RECORD["results"]}
# what is plain, or tried elsewhere: `test_placement.py`, `test_wrapped_models.py`
MORE = ("Where weights lie", "Compiled", "`low_cpu_mem_usage=True`", '`attn_implementation="sdpa"`')
CASES = [
    pytest.param(
        way,
        dtype,
        id=f"{way.name}, {dtype}",
        marks=[pytest.mark.slow] if way.slow or {way.group, way.name} & {*MORE} else [],
    )
    for way in WAYS
    for dtype in way.dtypes
]


@pytest.mark.parametrize(("way", "dtype"), CASES)
def test_a_model_is_explained_exactly_or_refused_however_it_was_loaded(way, dtype):
    result = loading_trials.tried(way, dtype)
    if result.state == "not tried":
        pytest.skip(result.remark)
    recorded = RECORDED[way.name, dtype]
    if result.state == "not loaded" and recorded.state != "not loaded" and way.packages:
        pytest.skip(f"not loaded by {', '.join(f'{name} {version(name)}' for name in way.packages)}: {result.remark}")
    assert result.state == recorded.state, result
    if result.state == "refused":
        assert result.remark == recorded.remark


def test_scores_of_another_suppression_are_wrong(monkeypatch):
    real = loading_trials.ak.Explainer
    monkeypatch.setattr(loading_trials.ak, "Explainer", lambda *given, **options: real(*given, **options, factor=0.5))
    assert loading_trials.tried(WAYS[0], "float32").state == "wrong"


def test_packs_that_differ_from_full_rows_are_wrong(monkeypatch):
    real = loading_trials.explained

    def off(model, *, by_full_rows=False):
        explanation, explainer = real(model, by_full_rows=by_full_rows)
        scores = explanation.scores + (0.01 if by_full_rows else 0)
        return dataclasses.replace(explanation, scores=scores), explainer

    monkeypatch.setattr(loading_trials, "explained", off)
    assert loading_trials.tried(WAYS[0], "float32").state == "wrong"


def test_a_model_that_is_left_in_another_mode_is_wrong(monkeypatch):
    real = loading_trials.explained

    def left_in_evaluation(model, **options):
        found = real(model, **options)
        model.eval()
        return found

    monkeypatch.setattr(loading_trials, "explained", left_in_evaluation)
    (way,) = [way for way in WAYS if "training mode" in way.name]
    result = loading_trials.tried(way, "float32")
    assert (result.state, "another mode" in result.remark) == ("wrong", True)


def test_what_does_not_load_and_what_is_not_there_are_told_apart():
    def broken(dtype):
        raise OSError("no such\nfile")

    way = dataclasses.replace(WAYS[0], load=broken)
    assert loading_trials.tried(way, "float32").state == "not loaded"
    assert loading_trials.tried(way, "float32").remark == "no such file"
    result = loading_trials.tried(dataclasses.replace(way, packages=("no-such-package",)), "float32")
    assert (result.state, result.remark) == ("not tried", "no-such-package is not installed")


def test_noise_is_what_a_model_says_differently_by_itself():
    model = loading_trials.load("float32")
    assert 0 < loading_trials.own_noise(model) < 1e-4
    head = model.lm_head.forward
    model.lm_head.forward = lambda states: head(states) + (0.1 if len(states) > 1 else 0) * torch.arange(99) / 99
    assert loading_trials.own_noise(model) > 1e-3


# --- the table ---


def test_the_table_is_what_the_record_says():
    page = (loading_table.ROOT / "docs" / "loading.md").read_text(encoding="utf-8")
    assert loading_table.table(RECORD) in page


def test_every_way_is_in_the_table_and_none_is_wrong():
    assert list(RECORDED) == [(way.name, dtype) for way in WAYS for dtype in way.dtypes]
    for result in RECORDED.values():
        assert result.state in loading_trials.STATES
        assert result.state != "wrong", result
        assert result.remark or result.state in ("packed", "batched"), result
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (loading_table.ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for name, number in RECORD["versions"].items():
        assert number.partition("+")[0] == pins.get(name, number), name


def test_rows_are_replaced_one_by_one(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    for name in ("loading.json", "loading.md"):
        (tmp_path / "docs" / name).write_text((loading_table.ROOT / "docs" / name).read_text(encoding="utf-8"))
    monkeypatch.setattr(loading_table, "versions", lambda: RECORD["versions"])
    new = Result(WAYS[0].name, WAYS[0].group, "float32", "refused", remark="a | b")
    loading_table.update([new], tmp_path)
    record = json.loads((tmp_path / "docs" / "loading.json").read_text(encoding="utf-8"))
    assert record["results"][0] == dataclasses.asdict(new)
    assert record["results"][1:] == RECORD["results"][1:]
    assert "| refused |  |  |  |  | a \\| b |" in (tmp_path / "docs" / "loading.md").read_text(encoding="utf-8")
    monkeypatch.setattr(loading_table, "versions", lambda: {"torch": "0"})
    with pytest.raises(SystemExit, match="run all of it"):
        loading_table.update([new], tmp_path)
