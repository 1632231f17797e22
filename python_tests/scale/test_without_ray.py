"""Without the extra, its name is in the error, and nothing was begun."""

import sys

import pytest
from click.testing import CliRunner

from atman_kernels import scale
from atman_kernels.cli import main


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
