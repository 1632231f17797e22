"""Which module may import which: heavy libraries stay where they belong, and imports point downwards only."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import atman_kernels
from atman_kernels import backends

PACKAGE = Path(atman_kernels.__file__).parent

# From the bottom up. A module may import from its own layer and from those below.
LAYERS = (
    ("errors", "arguments", "files", "assets"),
    ("formula", "pack", "progress"),
    ("backends",),
    ("ops",),
    ("planning",),
    ("hf",),
    ("result",),
    ("inputs",),
    ("run",),
    ("explain", "steering"),
    ("serve", "scale", "plots", "evaluation", "adapters"),
    ("cli",),
)
# The same inside `hf`.
HF_LAYERS = ("scope", "replacement", "models", "attention", "forward", "images")
# A layer that must do without one below it, although it may import it by its place.
FORBIDDEN = {"planning": ("backends", "ops"), "result": ("backends", "ops", "hf")}

# Libraries and the only places that may import them.
HEAVY = {
    "triton": ("backends.triton",),
    "transformers": ("hf", "inputs", "run", "explain", "steering", "cli", "evaluation", "adapters"),
    "matplotlib": ("result.plots",),
    "PIL": ("result.overlay", "serve.pictures"),
    "fastapi": ("serve",),
    "starlette": ("serve",),
    "uvicorn": ("serve",),
    "prometheus_client": ("serve",),
    "ray": ("scale",),
    "pyarrow": ("scale",),
    "captum": ("adapters",),
    "inseq": ("adapters",),
    "click": ("cli",),
}


@dataclass(frozen=True)
class Import:
    importer: str  # without the package's name; "" is the package itself
    imported: str  # absolute
    line: int


def imports_of(path: Path) -> Iterator[Import]:
    """Every import of a file but those under `if TYPE_CHECKING`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    importer = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    package = ["atman_kernels", *parts[:-1]]

    def visit(node: ast.AST) -> Iterator[Import]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(importer, alias.name, node.lineno)
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(importer, f"{source}.{alias.name}", node.lineno)
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")))


def all_imports() -> list[Import]:
    return [found for path in sorted(PACKAGE.rglob("*.py")) for found in imports_of(path)]


def layer_of(module: str) -> int:
    head = module.split(".")[0]
    places = [index for index, names in enumerate(LAYERS) if head in names]
    assert places, f"atman_kernels.{module} belongs to no layer: add it to LAYERS"
    return places[0]


def own(found: Import) -> str | None:
    """The imported module inside the package, or None if it is someone else's or the package itself."""
    head, _, rest = found.imported.partition(".")
    is_module = rest and ((PACKAGE / rest.split(".")[0]).is_dir() or (PACKAGE / f"{rest.split('.')[0]}.py").is_file())
    return rest if head == "atman_kernels" and is_module else None


def test_imports_point_downwards() -> None:
    wrong = []
    for found in all_imports():
        target = own(found)
        # The package itself names everything lazily; `__main__` only starts the command line.
        if target is None or found.importer in ("", "__main__"):
            continue
        heads = (found.importer.split(".")[0], target.split(".")[0])
        if layer_of(target) > layer_of(found.importer):
            wrong.append(f"{found.importer}:{found.line} imports {target} from a layer above")
        if heads[1] in FORBIDDEN.get(heads[0], ()):
            wrong.append(f"{found.importer}:{found.line} imports {target}; {heads[0]} must do without")
    assert not wrong, "\n".join(wrong)


def test_imports_inside_hf_point_downwards() -> None:
    wrong = []
    for found in all_imports():
        target = own(found)
        if target is None or not (found.importer.startswith("hf.") and target.startswith("hf.")):
            continue
        mine, theirs = (HF_LAYERS.index(module.split(".")[1]) for module in (found.importer, target))
        if theirs > mine:
            wrong.append(f"{found.importer}:{found.line} imports {target} from a layer above")
    assert not wrong, "\n".join(wrong)


def test_backends_do_not_import_one_another() -> None:
    wrong = []
    for found in all_imports():
        target = own(found)
        if target is None or not found.importer.startswith("backends.") or not target.startswith("backends."):
            continue
        mine, theirs = found.importer.split(".")[1], target.split(".")[1]
        if mine != theirs and {mine, theirs} <= set(backends.NAMES):
            wrong.append(f"{found.importer}:{found.line} imports {target}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("library", HEAVY)
def test_heavy_libraries_stay_where_they_belong(library: str) -> None:
    wrong = [
        f"{found.importer}:{found.line} imports {found.imported}"
        for found in all_imports()
        if found.imported.split(".")[0] == library
        and not any(found.importer == place or found.importer.startswith(f"{place}.") for place in HEAVY[library])
    ]
    assert not wrong, "\n".join(wrong)


def test_the_checks_see_imports() -> None:
    """The tests above can only fail if imports are found at all."""
    found = {(entry.importer, own(entry)) for entry in all_imports()}
    assert ("ops.validation", "errors.InputError") in found
    assert any(importer == "backends.reference" and target for importer, target in found)


def loaded_by(statement: str) -> set[str]:
    """Modules that a statement brings into a fresh process beyond those that torch itself brings."""
    code = (
        "import sys, json, torch\n"
        "before = set(sys.modules)\n"
        f"{statement}\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in set(sys.modules) - before})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("module", ["atman_kernels", "atman_kernels.ops", "atman_kernels.backends.cpu"])
def test_a_fresh_import_stays_light(module: str) -> None:
    loaded = loaded_by(f"import {module}")
    assert "atman_kernels" in loaded
    assert not loaded & {"triton", "transformers", "matplotlib", "captum", "inseq", "click", "rich", "jinja2"}


def test_a_call_stays_light() -> None:
    """Backends are imported when first called; that must not bring in what `import` avoided."""
    loaded = loaded_by(
        "import atman_kernels as ak\nx = torch.zeros(1, 1, 2, 2)\nak.suppressed_attention(x, x, x, torch.ones(1, 2))"
    )
    assert not loaded & {"triton", "transformers", "matplotlib", "captum", "inseq", "click", "rich", "jinja2"}
