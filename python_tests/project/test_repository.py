"""What stands around the code says the same everywhere: version, address, tools, what `make` rebuilds for."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import atman_kernels as ak

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_is_the_same_everywhere():
    assert re.search(r"^version: (.*)$", text("CITATION.cff"), re.MULTILINE)[1] == ak.__version__
    assert re.findall(r"^## \[(\d.*?)\]", text("CHANGELOG.md"), re.MULTILINE)[0] == ak.__version__
    assert "version" not in tomllib.loads(text("pyproject.toml"))["project"]


@pytest.mark.parametrize("name", ["CITATION.cff", ".github/ISSUE_TEMPLATE/config.yml"])
def test_the_address_is_the_same_everywhere(name):
    assert set(re.findall(r"https://github\.com/[\w-]+/[\w-]+", text(name))) == {ADDRESS}


def test_a_commit_is_checked_by_what_lint_runs():
    hooks = re.findall(r"^ +entry: ([\w-]+(?: \w+)?)", text(".pre-commit-config.yaml"), re.MULTILINE)
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", text("Makefile"), re.MULTILINE)[1]
    assert set(hooks) == set(re.findall(r"\$\(BIN\)/(ruff \w+|clang-format|mypy)", recipe))


def test_everything_that_is_compiled_is_rebuilt_for():
    if shutil.which("make") is None:
        pytest.skip("there is no make here")
    database = subprocess.run(["make", "-pn", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    known = set(re.search(r"^NATIVE := (.*)$", database, re.MULTILINE)[1].split())
    compiled = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu", ".h")}
    assert any(name.endswith(".cu") for name in compiled)
    assert compiled | {"setup.py"} == known


def test_the_extras_that_make_installs_exist():
    extras = set(tomllib.loads(text("pyproject.toml"))["project"]["optional-dependencies"])
    for named in re.findall(r"'\.\[(.*?)\]'", text("Makefile")):
        assert set(named.split(",")) <= extras


def test_a_unit_is_public_and_comes_without_transformers():
    code = "import sys, atman_kernels as ak; ak.Unit; print({name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'atman_kernels'" in loaded
    assert not re.search(r"'(transformers|rich|jinja2|triton)'", loaded)
    assert ak.Unit("a", 0, 1, (0,)).text == "a"
    assert callable(ak.load_model)


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_calls_targets_that_exist(file):
    targets = set(re.findall(r"^([\w-]+(?: [\w-]+)*):", text("Makefile"), re.MULTILINE))
    targets = {name for line in targets for name in line.split()}
    workflow = file.read_text(encoding="utf-8")
    called = {
        name for line in re.findall(r"run: make ([^\n]*)", workflow) for name in re.findall(r"(?<!\S)[a-z-]+", line)
    }
    called |= set(re.findall(r"target: ([a-z-]+)", workflow))
    assert called, "a workflow that calls no target can be run nowhere else"
    assert called <= targets


def test_the_linter_of_workflows_finds_nothing():
    zizmor = shutil.which("zizmor", path=str(Path(sys.executable).parent))
    if zizmor is None:
        pytest.skip("zizmor is not installed")
    done = subprocess.run([zizmor, "--offline", *map(str, WORKFLOWS)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_extra_is_tried():
    space: dict = {"__file__": str(ROOT / ".ci" / "environments.py"), "__name__": "environments"}
    exec(compile(text(".ci/environments.py"), "environments.py", "exec"), space)
    assert set(space["PROMISES"]) == set(tomllib.loads(text("pyproject.toml"))["project"]["optional-dependencies"])
