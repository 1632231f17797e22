"""The result file as a figure: quality over a processor's seconds, one column per length of prompt."""

from pathlib import Path
from typing import Any

MEASURES = (("mAP", "mAP [%]"), ("hit@5", "hit@5 [%]"))
# what belongs together, from the cheapest to the dearest: name, settings, colour, mark
CURVES = (
    ("AtMan here: direct effect, search, exact", ("direct", "search", "atman"), "C3", "o"),
    ("ContextCite: 32, 64, 256 ablations", ("contextcite_32", "contextcite_64", "contextcite_256"), "C0", "s"),
    ("AttnLRP", ("attnlrp",), "C4", "D"),
    ("linear", ("linear",), "C2", "^"),
    ("AT2", ("at2",), "C1", "v"),
)
FLOOR = "random"


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the figure, in the format that the name ends in.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = {(row["tokens"], row["setting"]): row for row in result["rows"]}
    lengths = sorted({tokens for tokens, _ in rows})
    figure, axes = plt.subplots(
        len(MEASURES), len(lengths), figsize=(1 + 3.4 * len(lengths), 6.4), sharex=True, sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for place, (measure, label) in enumerate(MEASURES):
        for column, tokens in enumerate(lengths):
            _panel(axes[place][column], {name: row for (own, name), row in rows.items() if own == tokens}, measure)
        axes[place][0].set_ylabel(label)
    for column, tokens in enumerate(lengths):
        items = max(row["items"] for (own, _), row in rows.items() if own == tokens)
        axes[0][column].set_title(f"{tokens} tokens ({items} questions)")
        axes[-1][column].set_xlabel("processor seconds per question")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(axis: Any, rows: dict[str, dict[str, Any]], measure: str) -> None:
    for name, settings, colour, mark in CURVES:
        found = [rows[setting] for setting in settings if setting in rows and rows[setting]["items"]]
        if not found:
            continue
        seconds = [row["values"]["processor_seconds"] for row in found]
        heights = [100 * row["values"][measure] for row in found]
        low, high = zip(*(row["intervals"].get(measure, (row["values"][measure],) * 2) for row in found), strict=True)
        below = [height - 100 * bound for height, bound in zip(heights, low, strict=True)]
        above = [100 * bound - height for height, bound in zip(heights, high, strict=True)]
        axis.errorbar(
            seconds, heights, yerr=(below, above), color=colour, marker=mark, label=name, capsize=2, linewidth=1.2
        )
    if FLOOR in rows and rows[FLOOR]["items"]:
        axis.axhline(100 * rows[FLOOR]["values"][measure], color="0.5", linestyle=":", label="at random")
    axis.set(xscale="log", ylim=(-4, 104))
    axis.grid(alpha=0.25, which="major")
