"""Workers that die, refuse or disagree: nothing is lost, nothing is there twice, and what is wrong is said once.

One small Ray serves all of this; its workers hold no model but in the last test.
"""

import json
import os
import re
import signal
import subprocess
import warnings
from functools import partial
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from click.testing import CliRunner

import atman_kernels as ak
from atman_kernels.cli import main
from atman_kernels.errors import InputError
from atman_kernels.scale import DatasetRun, Pool, dataset, explain_dataset, read_results
from atman_kernels.scale.cluster import Share, cluster
from atman_kernels.scale.crew import Crew

ray = pytest.importorskip("ray")
parquet = pytest.importorskip("pyarrow.parquet")
import fragile_worker  # noqa: E402
from fragile_worker import FragileWorker  # noqa: E402

PROMPT = "The lighthouse keeper had a grey dog"
LOCAL = {"workers": 2, "gpus_per_worker": 0, "cpus_per_worker": 1, "progress": False}


@pytest.fixture(scope="module", autouse=True)
def two_cores():
    ray.cloudpickle.register_pickle_by_value(fragile_worker)  # its processes do not find it
    os.environ.setdefault("RAY_worker_niceness", "0")  # else they wait for whatever else runs here
    with cluster(None, Share(workers=2, gpus=0, cpus=1), "these tests"):
        yield


class Found(NamedTuple):
    run: DatasetRun
    rows: list[dict[str, Any]]
    warnings: list[str]


@pytest.fixture
def fragile(monkeypatch, tmp_path):
    """`explain_dataset` of some prompts on workers that hold no model."""
    monkeypatch.setattr(dataset, "Crew", partial(Crew, worker=FragileWorker))

    def run(prompts, model="tiny", **more):
        file = tmp_path / "in.jsonl"
        file.write_text("".join(json.dumps({"id": i, "prompt": p}) + "\n" for i, p in enumerate(prompts)))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run = explain_dataset(file, tmp_path / "out", model=model, prompts_per_task=3, **{**LOCAL, **more})
        rows = parquet.read_table(tmp_path / "out").select(["id", "error", "prompt"]).to_pylist()
        return Found(run, sorted(rows, key=lambda row: row["id"]), [str(each.message) for each in caught])

    return run


def test_deaths_cost_nobody_else_anything(fragile, tmp_path):
    """One row ends every process, one the first that meets it, one fails: all others are explained, each once."""
    prompts = [f"row {i}" for i in range(20)]
    prompts[4], prompts[10], prompts[15] = "die", f"die once {tmp_path / 'mark'}", "fail"
    found = fragile(prompts)
    assert [row["id"] for row in found.rows] == list(range(20))
    errors = {row["id"]: row["error"] for row in found.rows if row["error"]}
    assert errors.keys() == {4, 15}
    assert errors[4].startswith("the worker died 3 times on this row: The actor died")
    assert errors[15] == "InputError: fails"
    assert all(row["prompt"] == prompts[row["id"]] for row in found.rows if row["id"] != 4)
    assert (found.run.rows, found.run.explained, found.run.failed) == (20, 20, 2)
    assert found.warnings.count("a word of warning") == 1


def test_a_second_run_does_what_is_left(fragile):
    assert fragile([f"row {i}" for i in range(5)]).run.explained == 5
    found = fragile([f"row {i}" for i in range(8)])
    assert (found.run.rows, found.run.explained, found.run.failed) == (8, 3, 0)
    assert [row["prompt"] for row in found.rows] == [f"row {i}" for i in range(8)]
    assert fragile([f"row {i}" for i in range(8)]).run.explained == 0
    with pytest.raises(InputError, match="the row with id 3 has another prompt or target than when"):
        fragile(["row 0", "row 1", "row 2", "another row 3"])


@pytest.mark.parametrize(
    ("model", "prompts", "message"),
    [
        ("nowhere", ["a"] * 9, "^model 'nowhere' is not there$"),
        ("tiny", ["fail"] * 30, "none of the first 2[0-9] rows could be explained: InputError: fails"),
    ],
)
def test_what_would_fail_every_row_is_one_error_and_no_output(fragile, tmp_path, model, prompts, message):
    with pytest.raises(InputError, match=message):
        fragile(prompts, model)
    assert not (tmp_path / "out").exists()


def test_workers_that_differ_do_not_go_on(fragile, tmp_path):
    """Here the one that takes a dead one's place."""
    with pytest.raises(InputError, match="workers would disagree: dtype is float"):
        fragile([f"die once {tmp_path / 'mark'}"], "differs", workers=1)


def test_few_rows_may_all_fail(fragile):
    assert [row["error"] for row in fragile(["fail"] * 4).rows] == ["InputError: fails"] * 4


def test_nobody_listens_but_this_machine():
    """Ray's servers, those of its children included."""
    listing = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("no ss here")
    own = _children(os.getpid())
    addresses = [line.split()[3] for line in listing.stdout.splitlines() if any(f"pid={pid}," in line for pid in own)]
    assert len(addresses) > 3
    assert all(address.startswith(("127.0.0.1:", "[::ffff:127.0.0.1]:", "[::1]:")) for address in addresses)


def _children(process):
    return [process, *(child.pid for child in psutil.Process(process).children(recursive=True))]


def test_the_command_line_explains_a_data_set(tiny_llama, tmp_path):
    """The whole way with a model."""
    rows = [{"key": f"{i}", "text": PROMPT[: 20 + 4 * i]} for i in range(4)]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    columns = ("--id-column", "key", "--prompt-column", "text", "--gpus-per-worker", 0, "--workers", 1)
    arguments = ("--model", tiny_llama, "--dataset", tmp_path / "in.jsonl", "--out", tmp_path / "out", *columns)
    options = ("--dtype", "float32", "--max-new-tokens", 3, "--units", "word", "--exact", 2)
    found = CliRunner().invoke(main, ["explain", *map(str, (*arguments, *options))])
    assert found.exit_code == 0, found.stderr
    assert re.search(r"^4 rows in .*out; 4 of them explained now, in [0-9.]+ s$", found.stderr, re.MULTILINE)
    explainer = ak.Explainer(*ak.load_model(tiny_llama, dtype="float32"), progress=False)
    results = {each.id: each.explanation for each in read_results(tmp_path / "out")}
    assert results.keys() == {row["key"] for row in rows}
    for row in rows:
        expected, got = explainer.explain(row["text"], None, "word", max_new_tokens=3, exact=2), results[row["key"]]
        assert torch.allclose(got.scores, expected.scores, atol=1e-4)
        for name in ("units", "target", "settings", "exact"):
            assert getattr(got, name) == getattr(expected, name)


@pytest.mark.slow
def test_a_pool_explains_what_one_process_does(tiny_llama):
    """Also after a worker was killed, and not with what belongs to a call before."""
    explainer = ak.Explainer(*ak.load_model(tiny_llama, dtype="float32"), progress=False)
    with Pool(tiny_llama, 2, gpus_per_worker=0, cpus_per_worker=1, dtype="float32") as pool:
        for units in ("token", "word"):
            expected, found = (each.explain(PROMPT, None, units, max_new_tokens=3) for each in (explainer, pool))
            assert torch.allclose(found.scores, expected.scores, atol=1e-4)
            assert (found.units, found.target, found.settings) == (expected.units, expected.target, expected.settings)
            assert found.stats["workers"] == 2
            for process in _children(os.getpid()):
                if "ray::Worker" in " ".join(psutil.Process(process).cmdline()):
                    os.kill(process, signal.SIGKILL)
                    break
            else:
                pytest.fail("no worker to kill")
        long = " ".join(f"{PROMPT} {number}" for number in range(9))
        expected, found = (each.explain(long, " rang", exact=5) for each in (explainer, pool))
        assert torch.allclose(found.scores, expected.scores, atol=1e-4)
        assert found.exact == expected.exact
        assert 5 <= sum(found.exact) < len(found.units)
        with pytest.raises(InputError, match="prompt is empty"):
            pool.explain("")
        assert torch.allclose(
            pool.explain(PROMPT, " rang").scores, explainer.explain(PROMPT, " rang").scores, atol=1e-4
        )
    with pytest.raises(RuntimeError, match="the pool is closed"):
        pool.explain(PROMPT)
