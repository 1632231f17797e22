"""The notebooks: each runs from top to bottom, and ends in something to look at."""

import re
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_listed_and_begins_with_its_title(notebook):
    code = notebook.read_text(encoding="utf-8")
    compile(code, notebook.name, "exec")
    assert re.search(r"^# %% \[markdown\]\n# # \w", code, re.MULTILINE)
    assert f"[{notebook.name}]({notebook.name})" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook, monkeypatch):
    jupytext = pytest.importorskip("jupytext")
    nbclient = pytest.importorskip("nbclient")
    for needed in ("ipykernel", "gguf", "matplotlib", "PIL", "captum", "inseq", "sklearn"):
        pytest.importorskip(needed)
    from atman_kernels.errors import InputError
    from atman_kernels.hf.models.loading import find_smollm2

    try:
        find_smollm2()
    except InputError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    book = jupytext.read(notebook)
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    last = [cell for cell in book.cells if cell.cell_type == "code"][-1]
    shown = {kind for output in last.outputs for kind in output.get("data", {})}
    assert shown & {"image/png", "text/html"}, f"the last cell of {notebook.name} shows {shown or 'nothing'}"
