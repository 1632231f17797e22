"""The scaling benchmark on a tiny model: what it measures, how it scales up, that it resumes, and what it draws."""

import json
import math

import pytest
import torch
from click.testing import CliRunner

from benchmarks.scaling import __main__ as program
from benchmarks.scaling import cell as cells
from benchmarks.scaling.models import SIZES, build
from benchmarks.scaling.work import METHODS, Work, case_of, prepare

pytestmark = pytest.mark.filterwarnings("ignore:integrated gradients have not converged")
TINY = ["--size", "tiny", "--tokens", "12", "--threads", "1", "--budget", "1"]


def cell(method: str, **changes) -> cells.Cell:
    values = {"method": method, "size": "tiny", "tokens": 12, "target_tokens": 2, "dtype": "float32", "device": "cpu"}
    return cells.Cell(**{**values, "budget": 5.0, "token_budget": None, "threads": 1, **changes})


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_measured(method):
    record = cells.measure(cell(method))
    assert record["status"] == "ok"
    assert record["seconds"] > 0
    assert record["weights_bytes"] == 4 * record["parameters"]
    assert record["peak_bytes"] is None or record["peak_bytes"] >= record["weights_bytes"]
    assert record["measured"] == record["total"] == {"naive": 12, "ours": 12, "integrated_gradients": 32}.get(method, 1)
    assert record.get("path") == ("packed" if method == "ours" else None)


class Clock:
    """Time passes only where work is done: `fixed` seconds, and one per unit of cost."""

    def __init__(self, total: int, fixed: float) -> None:
        self.now, self.done = 0.0, []

        def run(count: int) -> dict:
            self.done.append(count)
            self.now += fixed + cost(count)
            return {}

        def cost(count: int) -> float:
            return 0.0 if fixed and count == 1 else float(count)

        self.work = Work(total, run, cost, fixed=fixed > 0)

    def timed(self, budget: float) -> dict:
        return cells.timed(self.work, budget, lambda: self.now)


@pytest.mark.parametrize("fixed", [0.0, 7.0])
def test_a_part_is_scaled_to_the_whole(fixed):
    clock = Clock(1000, fixed)
    record = clock.timed(200.0)
    assert 1 < record["measured"] < 1000
    assert record["measured_seconds"] == fixed + record["measured"]
    assert math.isclose(record["seconds"], fixed + 1000)
    assert clock.now <= 200


def test_the_whole_is_measured_where_the_budget_allows():
    record = Clock(100, 0.0).timed(1000.0)
    assert record["measured"] == record["total"] == 100
    assert record["seconds"] == 100


def test_a_fixed_part_alone_is_never_scaled():
    clock = Clock(100, 50.0)
    record = clock.timed(1.0)
    assert clock.done == [1, 1, 2]
    assert math.isclose(record["seconds"], 150.0)


def test_naive_and_ours_explain_alike():
    """The two columns of the figure that say AtMan are the same scores."""
    from benchmarks.peers import DenseEager, Ours
    from benchmarks.scaling.models import tokenizer

    model, case = build("tiny", "cpu", "float32", 14), case_of(12, 2, "cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)  # of the usual 0.02 nothing would be left to measure
    positions = list(range(12))
    naive = DenseEager(model, 0.1, "log_additive", batch=1, full_logits=True).scores(case, positions)
    ours = Ours(model, tokenizer(), 0.1, "log_additive").scores(case, positions)
    assert naive.abs().max() > 0.01
    torch.testing.assert_close(ours, naive, atol=1e-4, rtol=0)


def test_running_out_of_memory_is_a_result(monkeypatch):
    def out_of_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cells, "prepare", out_of_memory)
    record = cells.measure(cell("chefer"))
    assert record["status"] == "out of memory"
    assert "seconds" not in record


def test_sizes_are_what_they_are_called():
    found = {name: program.parameters(name) for name in SIZES}
    assert found["tiny"] == build("tiny", "cpu", "float32", 8).num_parameters()
    for name, count in found.items():
        if name != "tiny":
            unit = 1e6 if name.endswith("M") else 1e9
            assert 0.85 < count / (float(name[:-1]) * unit) < 1.25, name


def test_a_run_resumes_and_retries_what_failed(tmp_path, monkeypatch):
    path = tmp_path / "scaling.json"
    measured = []

    def fake(cell):
        measured.append(cell.method)
        if cell.method == "chefer":
            return {"parameters": 1000, "status": "out of memory"}
        done = {"parameters": 1000, "status": "ok", "seconds": 2.0, "measured": 1, "total": 2, "peak_bytes": 5000}
        return done | {"weights_bytes": 4000, "measured_seconds": 1.0}

    monkeypatch.setattr(program, "run_cell", fake)
    arguments = [*TINY, "--method", "plain", "--method", "chefer", "--output", str(path)]

    def run(*more: str) -> list[str]:
        measured.clear()
        result = CliRunner().invoke(program.main, [*arguments, *more], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return list(measured)

    assert run() == ["plain", "chefer"]
    assert run() == []
    assert run("--retry") == ["chefer"]
    assert run("--target-tokens", "2") == ["plain", "chefer"], "other settings are other cells"
    content = json.loads(path.read_text())
    assert len(content["cells"]) == 4
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_cell_runs_in_its_own_process():
    record = program.run_cell(cell("plain"))
    assert record["status"] == "ok", record


def test_a_cell_whose_process_fails_says_so(monkeypatch):
    monkeypatch.setattr(program.sys, "executable", "false")
    assert program.run_cell(cell("plain")) == {
        "parameters": program.parameters("tiny"),
        "status": "failed",
        "error": "no message",
    }


def test_unknown_methods_are_refused():
    with pytest.raises(KeyError):
        prepare("no such method", build("tiny", "cpu", "float32", 14), case_of(12, 1, "cpu"), None)
