"""Figures: what is drawn is what the numbers say, and prompts are drawn as they are."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from atman_kernels.errors import InputError
from atman_kernels.planning.units import Unit
from atman_kernels.result.explanation import Explanation

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def explain(scores: list[list[float]], texts: list[str] | None = None) -> Explanation:
    texts = texts or [f"w{i}" for i in range(len(scores))]
    starts = [sum(map(len, texts[:i])) for i in range(len(texts))]
    return Explanation(
        prompt="".join(texts),
        target="t",
        units=tuple(Unit(text, start, start + len(text), (0,)) for text, start in zip(texts, starts, strict=True)),
        scores=torch.tensor(scores),
        target_tokens=tuple(f"t{i}" for i in range(len(scores[0]))),
        base_logprobs=torch.zeros(len(scores[0])),
        settings={},
        stats={},
    )


def ticks(axis: Any) -> list[str]:
    return [tick.get_text() for tick in axis.get_ticklabels()]


def test_bar_shows_the_largest_in_order_of_value():
    ax = explain([[1.0, 0.5], [-4.0, 0.0], [0.1, 0.0], [3.0, 0.0]]).plot("bar", top=3)
    assert ticks(ax.yaxis) == ["w3", "w0", "w1"]
    assert [bar.get_width() for bar in ax.patches] == [3.0, 1.5, -4.0]
    assert ax.yaxis_inverted()
    assert [text.get_text() for text in ax.texts] == ["+3.00", "+1.50", "−4.00"]
    colours = [bar.get_facecolor() for bar in ax.patches]
    assert colours[0] == colours[1] != colours[2]


def test_bar_is_the_default():
    assert len(explain([[1.0], [2.0]]).plot().patches) == 2


def test_heat_keeps_reading_order_and_ranks_by_the_largest_cell():
    explanation = explain([[0.1, 0.2], [5.0, -5.0], [0.0, 0.3], [1.0, 1.0]])  # w1 sums to 0 and is strongest
    ax = explanation.plot("heat", top=3)
    assert ticks(ax.yaxis) == ["w1", "w2", "w3"]
    assert ticks(ax.xaxis) == ["t0", "t1"]
    image = ax.get_images()[0]
    assert image.get_array().tolist() == explanation.scores[1:].tolist()
    assert image.get_clim() == (-5.0, 5.0)
    written = {tuple(text.get_position()): text.get_text() for text in ax.texts}
    assert written == {(0, 0): "+5.00", (1, 0): "−5.00", (0, 2): "+1.00", (1, 2): "+1.00"}


def test_heat_of_all_units():
    scores = torch.randn(300, 20).tolist()
    ax = explain(scores).plot("heat", top=None)
    assert len(ticks(ax.yaxis)) == 300
    assert not ax.texts  # numbers would not fit


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_rows_are_high_enough_to_read(rows):
    ax = explain([[1.0]] * rows).plot("heat")
    ax.figure.canvas.draw()
    assert ax.get_window_extent().height / ax.figure.dpi / rows > 0.15  # inches; labels are 10 points: 0.14


@pytest.mark.parametrize("kind", ["bar", "heat"])
class TestBoth:
    def test_given_axes_are_used(self, kind):
        _, ax = plt.subplots()
        assert explain([[1.0], [2.0]]).plot(kind, ax=ax) is ax
        assert len(plt.get_fignums()) == 1

    @pytest.mark.filterwarnings("ignore:Glyph")
    def test_dollars_and_control_characters_are_text(self, kind, tmp_path):
        ax = explain([[1.0], [2.0]], ["$a_$ and \\frac$", "\x1b\n"]).plot(kind)
        ax.figure.savefig(tmp_path / "figure.png")
        assert set(ticks(ax.yaxis)) == {"$a_$ and \\frac$", "␛↵"}
        assert not any(tick.get_parse_math() for tick in ax.get_yticklabels())

    def test_no_effect_at_all(self, kind, tmp_path):
        explain([[0.0], [0.0]]).plot(kind).figure.savefig(tmp_path / "figure.png")

    @pytest.mark.parametrize("top", [0, -1, 2.5, "all"])
    def test_bad_top(self, kind, top):
        with pytest.raises(InputError, match="top must be a positive integer"):
            explain([[1.0]]).plot(kind, top=top)


def test_unknown_kind():
    with pytest.raises(InputError, match='kind must be "bar" or "heat", got \'pie\''):
        explain([[1.0]]).plot("pie")


def test_matplotlib_is_asked_for_by_name_where_it_is_missing():
    code = """
import sys
sys.modules["matplotlib"] = None
try:
    import atman_kernels.plots
except ImportError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "plots need matplotlib: pip install atman-kernels[plots]"
