"""The README's Python snippets run as they stand."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
OUTPUT = re.findall(r"```python\n[^`]*load_model.*?```\n\n```text\n(.*?)```", README, flags=re.DOTALL)


def test_the_readme_has_snippets():
    assert len(SNIPPETS) >= 2
    assert "@@" not in README


def test_the_readme_shows_what_make_prints():
    """The start of the demo's output is that of the command line, so that a change of it is noticed."""
    console = re.search(r"```console\n(.*?)```", README, flags=re.DOTALL)[1]
    assert re.search(r"^\$ make demo .*\nLoading smollm2 on cpu in \w+ \(.*\) …\nAnswer  log p ", console)
    assert re.search(r"^Wrote atman-demo\.html\n\$ make test .*\n\d+ passed, ", console, flags=re.MULTILINE)


@pytest.mark.parametrize("snippet", [s for s in SNIPPETS if "load_model" not in s], ids=lambda s: s.split("\n")[0])
def test_snippet(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})


@pytest.mark.slow
def test_snippet_on_real_weights_prints_what_the_readme_shows(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gguf")
    from atman_kernels.errors import InputError
    from atman_kernels.hf.models.loading import find_smollm2

    try:
        find_smollm2()
    except InputError as error:
        pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)
    (snippet,) = [s for s in SNIPPETS if "load_model" in s]
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out == OUTPUT[0]
    assert (tmp_path / "explanation.html").stat().st_size > 10_000
