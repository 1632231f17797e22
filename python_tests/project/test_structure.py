"""How files are built: no circles, none over 450 lines, no function over 50, a docstring for all that is public."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_import_boundaries import PACKAGE, all_imports

LONGEST_MODULE, LONGEST_FUNCTION = 450, 50
KERNELS = {
    f"backends/triton/{name}.py"
    for name in (
        "forward",
        "backward_broadcast",
        "backward_keys",
        "backward_queries",
        "backward_steps",
        "primitives",
    )
}
# What is longer, and why it may be.
LONGER_MODULES: dict[str, str] = {}
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


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public(tree: ast.Module) -> Iterator[tuple[Definition, ast.ClassDef | None]]:
    """Functions and classes without an underscore, and what such classes have of them, with the class that has it."""

    def visit(node: ast.Module | ast.ClassDef) -> Iterator[tuple[Definition, ast.ClassDef | None]]:
        for child in node.body:
            if isinstance(child, Definition) and not child.name.startswith("_"):
                yield child, node if isinstance(node, ast.ClassDef) else None
                if isinstance(child, ast.ClassDef):
                    yield from visit(child)

    yield from visit(tree)


def undocumented(trees: dict[str, ast.Module]) -> list[str]:
    """What is public and has no docstring, but for what fulfils a documented method of a class in the package.

    That is a method of a class that derives from it, or in a backend a function that a `Protocol` of backends asks for.
    """
    said: dict[str, set[str]] = {}  # of each class, its methods that have a docstring
    for tree in trees.values():
        for node, owner in public(tree):
            if owner is not None and ast.get_docstring(node):
                said.setdefault(owner.name, set()).add(node.name)
    of_backends = said.get("Backend", set()) | said.get("Differentiable", set())
    found = [name for name, tree in trees.items() if ast.get_docstring(tree) is None]
    for name, tree in trees.items():
        for node, owner in public(tree):
            bases = [ast.unparse(base) for base in owner.bases] if owner else []
            told = any(node.name in said.get(base, ()) for base in bases)
            told = told or (owner is None and name.startswith("backends/") and node.name in of_backends)
            if not told and ast.get_docstring(node) is None:
                found.append(f"{name}:{owner.name + '.' if owner else ''}{node.name}")
    return found


def test_no_circle_between_files() -> None:
    assert circles(graph()) == []


def test_modules_are_short() -> None:
    lengths = {path.relative_to(PACKAGE).as_posix(): len(path.read_text().splitlines()) for path in modules().values()}
    longer = {name: lines for name, lines in lengths.items() if lines > LONGEST_MODULE and name not in KERNELS}
    assert longer.keys() == LONGER_MODULES.keys(), longer


def test_functions_fit_a_screen() -> None:
    longer = {}
    for path in modules().values():
        name = path.relative_to(PACKAGE).as_posix()
        if name not in KERNELS:
            longer |= {f"{name}:{of}": lines for of, lines in functions(path) if lines > LONGEST_FUNCTION}
    assert longer.keys() == LONGER_FUNCTIONS.keys(), longer


def test_what_is_public_has_a_docstring() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    trees = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in files}
    assert undocumented(trees) == []


def test_what_has_no_docstring_is_found() -> None:
    """The test above can only fail if it is."""
    code = """'module'
class Base:
    'class'
    def told(self): 'method'
class Heir(Base):
    'class'
    def told(self): return 1
    def silent(self): return 2
    def _private(self): return 3
def silent(): return 4
"""
    assert undocumented({"a.py": ast.parse(code), "b.py": ast.parse("")}) == ["b.py", "a.py:Heir.silent", "a.py:silent"]


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
