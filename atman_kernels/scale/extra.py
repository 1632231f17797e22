"""The two libraries of the extra `ray`, imported when they are needed."""

import importlib
import os
from typing import Any

INSTALL = "pip install 'atman-kernels[ray]'"


def needed(library: str, purpose: str) -> Any:
    """A module of the extra.

    Raises:
        ImportError: it is not installed; the message says how to get it.
    """
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ImportError(f"{purpose} needs {library.partition('.')[0]}: {INSTALL}") from error


def ray(purpose: str) -> Any:
    """Ray, without usage reports."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    return needed("ray", purpose)
