"""No circle between files, no module over 450 lines, no function over 50; kernels aside, whose parts share too much."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_import_boundaries import PACKAGE, all_imports

LONGEST_MODULE, LONGEST_FUNCTION = 450, 50
KERNELS = {f"backends/triton/{name}.py" for name in ("forward", "backward", "backward_steps", "primitives")}
# What is longer, and why it may be.
LONGER_MODULES: dict[str, str] = {
    "backends/triton/launch_backward.py": "to be shortened",
}
LONGER_FUNCTIONS: dict[str, str] = {}


def modules() -> dict[str, Path]:
    """Every file of the package by its module's name, the package's own left out: it names everything, lazily."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if name := ".".join(parts[:-1] if parts[-1] == "__init__" else parts):
            found[name] = path
    return found


def graph() -> dict[str, set[str]]:
    """Which modules each imports, inside of functions too."""
    known = modules()
    found: dict[str, set[str]] = {name: set() for name in known}
    for entry in all_imports():
        _, _, target = entry.imported.partition("atman_kernels.")
        if target not in known:  # a name that a module has
            target = target.rpartition(".")[0]
        if entry.importer in known and target in known and target != entry.importer:
            found[entry.importer].add(target)
    return found


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """A shortest way from each module that is on a circle back to itself, each circle once."""
    found: dict[frozenset[str], list[str]] = {}
    for start in edges:
        ways, seen = [[start]], set()
        while ways:
            way = ways.pop(0)
            if start in edges[way[-1]]:
                found.setdefault(frozenset(way), [*way, start])
                break
            ways += [[*way, after] for after in sorted(edges[way[-1]] - seen)]
            seen |= edges[way[-1]]
    return list(found.values())


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Each function by its qualified name, and its lines but for the docstring."""

    def visit(node: ast.AST, inside: str) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            name = f"{inside}{getattr(child, 'name', '')}"
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (child.end_lineno or child.lineno) - child.lineno + 1
                if ast.get_docstring(child, clean=False) is not None:
                    lines -= (child.body[0].end_lineno or 0) - child.body[0].lineno + 1
                yield name, lines
            is_named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            yield from visit(child, f"{name}." if is_named else inside)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), "")


def test_no_circle_between_files() -> None:
    assert circles(graph()) == []


def test_modules_are_short() -> None:
    lengths = {path.relative_to(PACKAGE).as_posix(): len(path.read_text().splitlines()) for path in modules().values()}
    longer = {name: lines for name, lines in lengths.items() if lines > LONGEST_MODULE and name not in KERNELS}
    assert longer.keys() <= LONGER_MODULES.keys(), longer


def test_functions_fit_a_screen() -> None:
    longer = {}
    for path in modules().values():
        name = path.relative_to(PACKAGE).as_posix()
        if name not in KERNELS:
            longer |= {f"{name}:{of}": lines for of, lines in functions(path) if lines > LONGEST_FUNCTION}
    assert longer.keys() <= LONGER_FUNCTIONS.keys(), longer


@pytest.mark.parametrize(
    ("edges", "expected"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"a"}}, [["a", "b", "a"]]),
        ({"a": {"b", "c"}, "b": {"c"}, "c": {"b"}}, [["b", "c", "b"]]),
    ],
)
def test_circles_are_found(edges: dict[str, set[str]], expected: list[list[str]]) -> None:
    """The test above can only fail if they are."""
    assert circles(edges) == expected
