"""Without the extra, its name is in the error, and nothing was begun."""

import inspect
import sys

import pytest
from click.testing import CliRunner

from atman_kernels import Explainer, scale
from atman_kernels.cli import main
from atman_kernels.scale import dataset
from atman_kernels.scale.options import sorted_options


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed


def test_the_extra_is_named(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"id": 1, "prompt": "a"}\n')
    with pytest.raises(ImportError, match=r"explain_dataset needs ray: pip install 'atman-kernels\[ray\]'"):
        scale.explain_dataset(tmp_path / "in.jsonl", tmp_path / "out", model="smollm2")
    with pytest.raises(ImportError, match=r"Pool needs ray: pip install 'atman-kernels\[ray\]'"):
        scale.Pool("smollm2")
    assert not (tmp_path / "out").exists()


def test_the_command_line_says_so_in_one_line(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"id": 1, "prompt": "a"}\n')
    found = CliRunner().invoke(
        main, ["explain", "--model", "smollm2", "--dataset", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out")]
    )
    assert found.exit_code == 1
    assert found.stderr.startswith("Error: ImportError: explain_dataset needs ray: pip install 'atman-kernels[ray]'")
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "in.jsonl"], "--dataset needs --out"),
        (["--out", "out", "Hello"], "--out goes with --dataset"),
        (["--workers", "2", "Hello"], "--workers goes with --dataset"),
        (["--dataset", "in.jsonl", "--out", "out", "Hello"], "a prompt does not go with --dataset"),
        (["--dataset", "in.jsonl", "--out", "out", "--html", "x.html"], "--html does not go with --dataset"),
    ],
)
def test_options_that_do_not_go_together(arguments, message):
    found = CliRunner().invoke(main, ["explain", "--model", "smollm2", *arguments])
    assert found.exit_code == 2
    assert message in found.stderr


def test_all_options_of_the_command_line_find_their_place(monkeypatch):
    given = {}

    def instead(source, output, **options):
        given.update(options, source=source, output=output)
        return scale.DatasetRun("out", 3, 2, 1, 0.5)

    signature = inspect.signature(dataset.explain_dataset).parameters
    monkeypatch.setattr(dataset, "explain_dataset", instead)
    options = (
        "--threshold",
        "0.5",
        "--layers",
        "0-1",
        "--method",
        "shapley",
        "--seed",
        "3",
        "--chat",
        "--recompute",
        "4",
        "--workers",
        "2",
    )
    found = CliRunner().invoke(
        main, ["explain", "--model", "smollm2", "--dataset", "in.csv", "--out", "out", "--dtype", "float32", *options]
    )
    assert found.exit_code == 0, found.stderr
    assert found.stderr == "3 rows in out, 1 with an error; 2 of them explained now, in 0.5 s\n"
    assert (given["source"], given["output"], given["model"], given["workers"]) == ("in.csv", "out", "smollm2", 2)
    others = {name: value for name, value in given.items() if name not in signature or name == "options"}
    placed = sorted_options(others, given["units"], Explainer.explain_batch)
    assert (placed.explaining["similarity_threshold"], placed.explaining["layers"]) == (0.5, [0, 1])
    assert placed.loading["dtype"] == "float32"
    assert (placed.asking["method"], placed.asking["seed"], placed.asking["chat"]) == ("shapley", 3, True)
    assert (placed.asking["recompute"], placed.asking["exact"]) == (4, None)
