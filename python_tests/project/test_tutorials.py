"""The tutorials: pasted one after the other, their Python prints what they show."""

import contextlib
import io
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAIR = re.compile(r"^```python\n(.*?)^```(?:\n\n```text\n(.*?)^```)?", re.MULTILINE | re.DOTALL)


def run(page: str) -> int:
    """Runs a page in one namespace, and compares what it shows; how many outputs there were."""
    shown, space = 0, {"__name__": "tutorial"}
    for number, (code, expected) in enumerate(PAIR.findall((DOCS / page).read_text(encoding="utf-8"))):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"{page}, snippet {number}", "exec"), space)
        if expected:
            assert printed.getvalue() == expected, f"{page}, snippet {number}"
            shown += 1
    return shown


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("page", "outputs"), [("packs.md", 1), ("tutorials/own-library.md", 6)])
def test_pages_with_torch_alone(page, outputs):
    assert run(page) == outputs


def test_the_picture_is_explained_as_shown(tmp_path, monkeypatch):
    pytest.importorskip("PIL")
    monkeypatch.syspath_prepend(DOCS.parent)
    assert run("tutorials/picture.md") == 3
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "outputs"), [("tutorials/answer.md", 4), ("tutorials/retrieval.md", 5), ("tutorials/timing.md", 1)]
)
def test_pages_with_real_weights(page, outputs):
    pytest.importorskip("gguf")
    pytest.importorskip("matplotlib")
    from atman_kernels.errors import InputError
    from atman_kernels.hf.models.loading import find_smollm2

    try:
        find_smollm2()
    except InputError as error:
        pytest.skip(str(error))
    assert run(page) == outputs


def test_the_drawings_are_what_their_program_draws():
    space: dict = {"__file__": str(DOCS / "_site" / "drawings.py"), "__name__": "drawings"}
    exec(compile(Path(space["__file__"]).read_text(encoding="utf-8"), "drawings.py", "exec"), space)
    for draw in space["ALL"]:
        drawn = draw()
        assert (DOCS / "images" / f"{drawn.name}.svg").read_text(encoding="utf-8") == drawn.svg()
