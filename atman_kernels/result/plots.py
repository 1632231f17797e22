"""Explanations as matplotlib figures; the only module of this package that imports matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from atman_kernels.arguments import integer
from atman_kernels.errors import InputError
from atman_kernels.result import NEGATIVE, POSITIVE
from atman_kernels.result.data import ExplanationData
from atman_kernels.result.labels import about, label, measure_of, signed, unit_label
from atman_kernels.result.segments import outlined

try:
    import matplotlib.pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap
except ImportError as error:
    raise ImportError("plots need matplotlib: pip install atman-kernels[plots]") from error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.text import Text


COLOURS = LinearSegmentedColormap.from_list("atman", [NEGATIVE, "#ffffff", POSITIVE])
WRITTEN_CELLS = 240  # a heat plot with more cells than this has no numbers in them
ROW = 0.26  # inches per unit


def bar(explanation: ExplanationData, top: int = 15, ax: Axes | None = None, *, level: int | str | None = None) -> Axes:
    """Horizontal bars: the units with the largest totals in absolute value, most important at the top.

    Scores that are estimates get a line of one standard error to either side.

    Args:
        explanation: what to draw.
        top: how many units to show.
        ax: where to draw; a new figure of a fitting size by default.
        level: of nested units the one level to show; None: `top` of every level, each below what it lies in.

    Raises:
        InputError: top is not a positive integer, or there is no such level.

    Example:
        >>> bar(explanation, top=10).figure.savefig("bars.png")  # doctest: +SKIP
    """
    total = explanation.total
    if explanation.levels and level is None:
        shown = _outline(explanation, top)
    else:
        shown = _largest(total, top, _of_level(explanation, level))
        shown = shown[torch.argsort(total[shown], descending=True, stable=True)]
    values = total[shown].tolist()
    ax = ax or _axes(7.0, 1.2 + ROW * len(values))

    colours = [POSITIVE if value > 0 else NEGATIVE for value in values]
    errors = None if explanation.standard_errors is None else explanation.standard_errors[shown].tolist()
    style: dict[str, Any] = {"ecolor": "0.3", "capsize": 2.5, "error_kw": {"elinewidth": 1}}
    bars = ax.barh(range(len(values)), values, height=0.72, color=colours, xerr=errors, **style)
    for unit, drawn in zip(shown.tolist(), bars, strict=True):
        if not explanation.is_exact(unit):
            drawn.set(hatch="////", edgecolor="white", linewidth=0)
    texts = [about(explanation, unit) + signed(value) for unit, value in zip(shown.tolist(), values, strict=True)]
    ax.bar_label(bars, texts, padding=4, fontsize=9)
    ax.axvline(0, color="0.4", linewidth=0.8)
    ax.margins(x=0.14, y=0.01)
    ax.invert_yaxis()
    ax.set_yticks(range(len(values)), _names(explanation, shown))
    ax.set_xlabel(measure_of(explanation)).set_parse_math(False)
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    _write_plainly(ax.get_yticklabels())
    if explanation.levels and level is None:
        _indent(ax, [explanation.depths[unit] for unit in shown.tolist()])
    return ax


def heat(
    explanation: ExplanationData, top: int | None = 40, ax: Axes | None = None, *, level: int | str | None = None
) -> Axes:
    """A matrix of scores: units (rows, in reading order) by target tokens (columns).

    Args:
        explanation: what to draw.
        top: show only this many units, those with the largest score in absolute value; None shows all.
        ax: where to draw; a new figure of a fitting size by default.
        level: of nested units the one level to show; None: the finest that was reached.

    Raises:
        InputError: top is neither None nor a positive integer, or there is no such level.

    Example:
        >>> heat(explanation, top=None).figure.savefig("heat.png")  # doctest: +SKIP
    """
    n_units, n_tokens = explanation.scores.shape
    peak = explanation.scores.abs().amax(dim=1)
    own = _of_level(explanation, level)
    shown = _largest(peak, n_units if top is None else top, own).sort().values  # reading order
    scores = explanation.scores[shown]
    rows = len(shown)
    ax = ax or _axes(min(3.8 + 0.5 * n_tokens, 24.0), min(2.0 + ROW * rows, 80.0))

    scale = float(peak[own].max()) or 1.0
    image = ax.imshow(scores.numpy(), COLOURS, aspect="auto", vmin=-scale, vmax=scale)
    thin, near = 20 + 2 * n_tokens, min(0.05, 0.5 / rows)
    legend = ax.figure.colorbar(image, ax=ax, location="bottom", aspect=thin, pad=near)
    legend.set_label(measure_of(explanation), parse_math=False)
    legend.outline.set_visible(False)

    ax.set_yticks(range(rows), _names(explanation, shown))
    ax.xaxis.tick_top()
    names = [label(token, 16) for token in explanation.target_tokens]
    slanted: dict[str, Any] = {"rotation": 60, "ha": "left", "rotation_mode": "anchor"}
    ax.set_xticks(range(n_tokens), names, **(slanted if max(map(len, names)) > 5 else {}))
    ax.tick_params(length=0)
    ax.spines[:].set_color("0.85")
    _write_plainly(ax.get_xticklabels() + ax.get_yticklabels())
    if rows * n_tokens <= WRITTEN_CELLS:
        for row, column in torch.nonzero(scores.abs() >= 0.1 * scale).tolist():
            ax.text(column, row, signed(float(scores[row, column])), ha="center", va="center", fontsize=8)
    return ax


def _largest(values: torch.Tensor, top: int, among: torch.Tensor) -> torch.Tensor:
    """Indices of the `top` values that are largest in absolute value, of those at these indices."""
    top = integer(top, "top", least=1, expected="a positive integer")
    return among[torch.argsort(values[among].abs(), descending=True, stable=True)[:top]]


def _of_level(explanation: ExplanationData, level: int | str | None) -> torch.Tensor:
    """The indices of a level's units; of all units where they are not nested."""
    number = explanation.finest if level is None else explanation.level_number(level)
    found = explanation.of_level(number)
    if not found:
        raise InputError(f"level {level!r} has no units: none of the level above it can be cut")
    return torch.tensor(found, device="cpu")


def _outline(explanation: ExplanationData, top: int) -> torch.Tensor:
    """The strongest units of every level, each below what it lies in."""
    top = integer(top, "top", least=1, expected="a positive integer")
    sizes = explanation.total.abs().tolist()
    return torch.tensor(outlined(sizes, explanation.units, explanation.depths, top)[0], device="cpu")


def _axes(width: float, height: float) -> Axes:
    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def _names(explanation: ExplanationData, shown: torch.Tensor) -> list[str]:
    return [unit_label(explanation.units[i], 32) for i in shown.tolist()]


def _indent(ax: Axes, depths: list[int]) -> None:
    """Names of bars from left to right, those of nested units further in."""
    labels = ax.get_yticklabels()
    for name, depth in zip(labels, depths, strict=True):
        name.set_text("\u2003" * depth + name.get_text())
    ax.set_yticks(range(len(labels)), [name.get_text() for name in labels], ha="left")
    _write_plainly(ax.get_yticklabels())
    widest = max(name.get_window_extent().width for name in ax.get_yticklabels())
    ax.tick_params(axis="y", pad=72 * widest / ax.figure.dpi + 4)


def _write_plainly(labels: Sequence[Text]) -> None:
    """A prompt's dollar signs are no formulas."""
    for text in labels:
        text.set_parse_math(False)
