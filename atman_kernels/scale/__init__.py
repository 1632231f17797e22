"""Many prompts, or one long one, over several processes, GPUs and machines, with Ray (the extra `ray`).

`explain_dataset` explains the rows of a file on workers that each hold the model, and goes on where it was stopped;
`read_results` reads what it wrote. `Pool` splits the variants of one prompt over such workers. `explain_part` does
without Ray, for models that a group of processes shares.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "DatasetRun": "dataset",
    "Pool": "pool",
    "Result": "results",
    "explain_dataset": "dataset",
    "explain_part": "part",
    "read_results": "results",
}
__all__ = ["DatasetRun", "Pool", "Result", "explain_dataset", "explain_part", "read_results"]

if TYPE_CHECKING:
    from atman_kernels.scale.dataset import DatasetRun, explain_dataset
    from atman_kernels.scale.part import explain_part
    from atman_kernels.scale.pool import Pool
    from atman_kernels.scale.results import Result, read_results


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
