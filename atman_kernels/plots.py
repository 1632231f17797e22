"""Explanations drawn with matplotlib: `bar` and `heat`. Needs the extra `plots`."""

from atman_kernels.result.plots import bar, heat

__all__ = ["bar", "heat"]
