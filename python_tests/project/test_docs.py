"""The documentation: public names have a place and an example that runs, pages are short, links lead somewhere."""

import doctest
import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

import atman_kernels as ak

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
GENERAL = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "csrc/README.md")

# Modules whose names are public although they are not in `atman_kernels` itself.
PUBLIC_MODULES = {
    "atman_kernels.adapters.captum": ("AtManAttribution", "SuppressedTextInput", "SuppressedLLMAttribution"),
    "atman_kernels.adapters.inseq": ("AtManAttribution",),
    "atman_kernels.backends": ("availability",),
    "atman_kernels.evaluation.metrics": None,  # all that it defines
    "atman_kernels.explain.at2_fitting": ("fit_at2",),
    "atman_kernels.explain.head_weights": ("HeadWeights",),
    "atman_kernels.explain.methods": ("names", "method", "TokenScores", "MethodOutcome"),
    "atman_kernels.hf.models.loading": ("choose_dtype", "find_smollm2"),
    "atman_kernels.plots": ("bar", "heat"),
    "atman_kernels.progress": ("Listener", "listening"),
    "atman_kernels.result.data": ("AnswerLogprobs", "ImageSize"),
    "atman_kernels.serve.app": ("create_app",),
    "atman_kernels.serve.settings": ("Settings",),
    "atman_kernels.scale": ("DatasetRun", "Pool", "Result", "explain_dataset", "explain_part", "read_results"),
}
NEEDS = {
    "adapters.captum": "captum",
    "adapters.inseq": "inseq",
    "plots": "matplotlib",
    "evaluation.metrics": "scipy",
    "serve.app": "fastapi",
}


def public_names() -> list[tuple[str, str]]:
    """(module, name) of all that is public."""
    found = [("atman_kernels", name) for name in ak.__all__ if name != "__version__"]
    for module, names in PUBLIC_MODULES.items():
        if names is None:
            code = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
            names = tuple(re.findall(r"^(?:def|class) ([a-z]\w*|[A-Z]\w*)", code, re.MULTILINE))
        found += [(module, name) for name in names]
    return found


def named(module: str, name: str):
    need = NEEDS.get(module.removeprefix("atman_kernels."))
    if need is not None:
        pytest.importorskip(need)
    return getattr(import_module(module), name)


@pytest.mark.parametrize(("module", "name"), public_names())
def test_a_public_name_is_on_a_page_and_its_example_runs(module, name):
    written = set(re.findall(r"^::: (\S+)$", "\n".join(p.read_text(encoding="utf-8") for p in PAGES), re.MULTILINE))
    assert written & {f"{module}.{name}", module}, f"{module}.{name} is on no page of the reference"
    what = named(module, name)
    text = inspect.getdoc(what) or ""
    assert ">>> " in text, f"{name} has no example"
    space = vars(sys.modules[what.__module__]) | {"ak": ak}
    options = doctest.ELLIPSIS
    (test,) = doctest.DocTestFinder(recurse=False).find(what, name, globs=space)
    assert doctest.DocTestRunner(optionflags=options).run(test).failed == 0


def test_the_reference_names_nothing_else():
    """A page must not promise what the lists above do not know."""
    known = {f"{module}.{name}" for module, name in public_names()} | set(PUBLIC_MODULES)
    for page in (DOCS / "reference").glob("*.md"):
        assert set(re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)) <= known


@pytest.mark.parametrize("page", [*(str(p.relative_to(ROOT)) for p in PAGES), *GENERAL])
def test_a_page_is_short_enough_and_its_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.count("\n") <= 300
    prose = re.sub(r"^```.*?^```|`[^`\n]+`", "", text, flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        file = link.partition("#")[0]
        if file and not re.match(r"\w+:", file):
            assert ((ROOT / page).parent / file).exists(), f"{page} links to {link}"


def test_every_page_is_in_the_navigation():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        assert re.search(rf"\b{re.escape(page.relative_to(DOCS).as_posix())}$", menu, re.MULTILINE), page


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")

    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    html = (tmp_path / "site" / "reference" / "explaining.html").read_text(encoding="utf-8")
    assert "Score every unit of a prompt" in html
    for page in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=\"?(https?:[^\"\s>]+)", page.read_text(encoding="utf-8"))
        loaded += re.findall(r"<link rel=\"?(?:stylesheet|preconnect)\"?[^>]*https?:[^>]+", page.read_text("utf-8"))
        assert not loaded, f"{page.name} loads from elsewhere"


def test_links_out_of_the_docs_lead_on_and_a_broken_one_stops_the_build():
    plugins = pytest.importorskip("mkdocs.exceptions")
    space: dict = {"__file__": str(DOCS / "_site" / "outside.py"), "__name__": "outside"}
    exec(compile(Path(space["__file__"]).read_text(encoding="utf-8"), "outside.py", "exec"), space)

    def turned(text: str, page: str) -> str:
        page = SimpleNamespace(file=SimpleNamespace(src_uri=page))
        return space["on_page_markdown"](text, page, SimpleNamespace(repo_url="https://host/repo"), None)

    assert turned("[x](../CHANGELOG.md#a)", "cost.md") == "[x](project/changelog.md#a)"
    assert turned("[x](../../csrc/README.md)", "tutorials/timing.md") == "[x](../project/native.md)"
    assert turned("[x](docs/cost.md)", "project/contributing.md") == "[x](../cost.md)"
    assert turned("[x](../Makefile)", "cost.md") == "[x](https://host/repo/blob/main/Makefile)"
    assert turned("[x](../csrc)", "cost.md") == "[x](https://host/repo/tree/main/csrc)"
    assert turned("`[x](nowhere.md)` [y](https://a.b)", "cost.md") == "`[x](nowhere.md)` [y](https://a.b)"
    with pytest.raises(plugins.PluginError, match="not there"):
        turned("[x](nowhere.md)", "cost.md")
