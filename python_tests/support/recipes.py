"""The recipes of docs/interventions.md, as they are printed."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import atman_kernels as ak

GUIDE = Path(__file__).parents[2] / "docs" / "interventions.md"


def recipe(name: str) -> Callable[..., Any]:
    """A function of the guide; all of them have at most ten lines below their head."""
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    (block,) = (block for block in blocks if f"def {name}(" in block)
    assert len(block[block.index("def ") :].splitlines()) <= 11
    if "sklearn" in block:
        pytest.importorskip("sklearn")
    namespace = {"torch": torch, "ak": ak}
    exec(block, namespace)
    return namespace[name]  # type: ignore[return-value]
