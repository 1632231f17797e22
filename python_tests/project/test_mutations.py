"""The list of deliberate faults fits the package, and the tool puts each in and takes it out again."""

from pathlib import Path

import mutations
import pytest
from mutation_list import FAULTS, Fault, Tests


def test_most_faults_still_have_a_place() -> None:
    """Lines that a change has moved or reworded are found by `make mutations`, which names the rest."""
    lost = [fault.name for fault in FAULTS if mutations.place_of(fault, mutations.ROOT) is None]
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 40
    assert len(lost) <= len(FAULTS) // 8, f"tools/mutation_list.py no longer fits the package: {lost}"


def fault(text: str, instead: str) -> Fault:
    return Fault("a sign", text, instead, "", (Tests("test_a"),))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, content in {
        "atman_kernels/__init__.py": "",
        "atman_kernels/a.py": "def less(x):\n    return x - 1\n",
        "python_tests/test_a.py": "from atman_kernels.a import less\n\n\ndef test_less():\n    assert less(3) == 2\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def test_a_text_is_found_once_or_refused(tree: Path) -> None:
    assert mutations.place_of(fault("x - 2", ""), tree) is None
    found = mutations.place_of(fault("x - 1", ""), tree)
    assert found is not None
    assert found[0] == tree / "atman_kernels" / "a.py"
    (tree / "atman_kernels" / "b.py").write_text("x - 1")
    with pytest.raises(SystemExit, match="a sign: its text is found more than once"):
        mutations.place_of(fault("x - 1", ""), tree)


@pytest.mark.slow
def test_a_fault_is_seen_by_its_test_and_gone_afterwards(tree: Path) -> None:
    runners = {False: mutations.Runner(False)}
    content = (tree / "atman_kernels" / "a.py").read_text()
    try:
        for instead, seen in (("x + 1", "python_tests/test_a.py::test_less"), ("-1 + x", None)):
            one = fault("x - 1", instead)
            place = mutations.place_of(one, tree)
            assert place is not None
            with mutations.broken(one, tree, place, mutations.Builds()) as is_built:
                assert is_built
                assert mutations.seen_by(one, tree, runners, thorough=False) == seen
            assert (tree / "atman_kernels" / "a.py").read_text() == content
    finally:
        runners[False].close()
