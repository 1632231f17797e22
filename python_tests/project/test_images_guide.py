"""The guide to images: its example without a download prints what it shows."""

import re
from pathlib import Path

GUIDE = (Path(__file__).parents[2] / "docs" / "images.md").read_text(encoding="utf-8")


def test_the_example_prints_what_the_guide_shows(tmp_path, monkeypatch, capsys):
    (snippet,) = [s for s in re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL) if "from_pretrained" not in s]
    (expected,) = re.findall(r"```text\n(.*?)```", GUIDE, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "docs/images.md", "exec"), {})
    assert capsys.readouterr().out == expected
    assert (tmp_path / "over.png").stat().st_size > 500
    assert "data:image/png;base64," in (tmp_path / "explanation.html").read_text(encoding="utf-8")
