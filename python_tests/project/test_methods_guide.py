"""The guide to methods: it knows them all, and its example prints what it shows."""

import re
from pathlib import Path

import pytest
import tiny_models
import torch

import atman_kernels as ak
from atman_kernels.explain import methods
from atman_kernels.explain.methods import chance

GUIDE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)


@pytest.mark.parametrize("name", [*methods.OF_TOKENS, "atman", "random"])
def test_every_method_has_its_row(name):
    assert re.search(rf"^\| `{name}` \|", GUIDE, flags=re.MULTILINE)


def test_the_method_of_ones_own_explains(monkeypatch):
    space: dict = {}
    exec(compile(SNIPPETS[-1], "docs/methods.md", "exec"), space)
    monkeypatch.setattr(chance, "first_token", space["first_token"], raising=False)
    monkeypatch.setitem(methods.OF_TOKENS, "first_token", ("chance", "all or nothing"))
    explainer = ak.Explainer(tiny_models.build("llama"), tiny_models.tokenizer(), progress=False)
    found = explainer.explain("w5 w6 w7", "w8 w9", method="first_token")
    assert found.scores.tolist() == [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    torch.testing.assert_close(found.base_logprobs, explainer.explain("w5 w6 w7", "w8 w9").base_logprobs)


@pytest.mark.slow
def test_the_example_prints_what_the_guide_shows(capsys):
    pytest.importorskip("gguf")
    from atman_kernels.errors import InputError
    from atman_kernels.hf.models.loading import find_smollm2

    try:
        find_smollm2()
    except InputError as error:
        pytest.skip(str(error))
    (expected,) = re.findall(r"```text\n(.*?)```", GUIDE, flags=re.DOTALL)
    space: dict = {}
    exec(compile(SNIPPETS[0], "docs/methods.md", "exec"), space)
    assert capsys.readouterr().out == expected
    with pytest.warns(UserWarning, match="have not converged"):
        exec(compile(SNIPPETS[1], "docs/methods.md", "exec"), space)
