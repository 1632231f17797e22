"""The benchmark of long prompts on a tiny model: what it measures, what it scales up, and what it leaves out."""

import json

import own_text_model
import pytest
from click.testing import CliRunner

import atman_kernels as ak
from benchmarks import long_prompt


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return own_text_model.saved(tmp_path_factory.mktemp("model"))


def ran(folder, output, monkeypatch, *options):
    monkeypatch.setattr(long_prompt, "find_squad", lambda _: None)
    fixed = ["--model", str(folder), "--output", str(output), "--dtype", "float32"]
    done = CliRunner().invoke(long_prompt.main, [*fixed, *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(output.read_text(encoding="utf-8")), done.output


def test_the_program(folder, tmp_path, monkeypatch):
    options = ("--tokens", "160", "--exact-tokens", "160", "--budget", "300")
    result, shown = ran(folder, tmp_path / "out.json", monkeypatch, *options)
    assert result["environment"]["cpu"]
    (record,) = result["records"]
    assert record["tokens"] == 160
    whole = record["ways"]["all exact"]["rounds"][0]
    assert (whole["units"], whole["share_measured"]) == (160, 1.0)
    nested = record["ways"]["nested"]["rounds"][0]
    assert sum(nested["units_of_levels"]) == nested["units"]
    tokens = {name: way["rounds"][0].get("tokens_through_model") for name, way in record["ways"].items()}
    assert tokens["recompute=1"] < tokens["exact=16"] < tokens["all exact"]
    assert "nested" in shown


def test_what_is_beyond_the_budget_is_left_out_and_said(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(long_prompt, "LEAST", 1e9)
    result, shown = ran(
        folder, tmp_path / "out.json", monkeypatch, "--tokens", "96", "--exact-tokens", "96", "--budget", "1e9"
    )
    (record,) = result["records"]
    assert all("beyond the budget" in way["left_out"] and not way["rounds"] for way in record["ways"].values())
    assert "left out" in shown


def test_what_is_stopped_is_scaled_by_the_tokens_that_are_done(monkeypatch):
    clock = iter([0.0, 2.0, 3.0, 7.0])
    monkeypatch.setattr(long_prompt.time, "perf_counter", lambda: next(clock))
    watch = long_prompt.Watch(limit=5.0)
    watch(0, 1000)
    watch(100, 1000)
    with pytest.raises(ak.Cancelled):
        watch(250, 1000)
    assert watch.record() == {"seconds": 2 + 5 / 0.25, "share_measured": 0.25, "seconds_measured": 7.0}
