"""The result file as a figure: time above, memory below, over model size; one column per prompt length."""

from pathlib import Path
from typing import Any

LABELS = {
    "plain": "plain forward",
    "naive": "AtMan, recomputed",
    "ours": "AtMan, packed (ours)",
    "chefer": "Chefer",
    "integrated_gradients": "integrated gradients",
    "attnlrp": "AttnLRP",
    "attnlrp_checkpointed": "AttnLRP, checkpointed",
}
COLOURS = dict(zip(LABELS, ("0.6", "C0", "C3", "C1", "C2", "C4", "C5"), strict=True))
QUANTITIES = (("seconds", "time per explanation [s]", 1.0), ("peak_bytes", "peak memory [GB]", 1e9))


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the PNG. A hollow mark was measured in part and scaled up; a cross ran out of memory or time.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = result["cells"]
    lengths = sorted({record["tokens"] for record in records})
    sizes = [record["parameters"] / 1e9 for record in records]
    figure, axes = plt.subplots(
        2, len(lengths), figsize=(1.5 + 3.6 * len(lengths), 7), sharex=True, sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for row, (quantity, name, scale) in enumerate(QUANTITIES):
        for column, tokens in enumerate(lengths):
            chosen = [record for record in records if record["tokens"] == tokens]
            limits = (min(sizes) / 1.5, max(sizes) * 1.5)
            axes[row][column].set(xscale="log", yscale="log", xlim=limits)
            _panel(axes[row][column], chosen, quantity, scale)
        axes[row][0].set_ylabel(name)
    for column, tokens in enumerate(lengths):
        axes[0][column].set_title(f"{tokens} tokens")
        axes[1][column].set_xlabel("parameters [billion]")
    handles = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _panel(axis: Any, records: list[dict[str, Any]], quantity: str, scale: float) -> None:
    for method, label in LABELS.items():
        found = sorted(
            (r["parameters"] / 1e9, r[quantity] / scale, r["measured"] < r["total"])
            for r in records
            if r["method"] == method and r["status"] == "ok" and r[quantity]
        )
        if found:
            x, y, scaled = zip(*found, strict=True)
            colour = COLOURS[method]
            axis.plot(x, y, color=colour, label=label, linewidth=1.2)
            faces = ["white" if hollow else colour for hollow in scaled]
            axis.scatter(x, y, c=faces, edgecolors=colour, s=24, zorder=3)
        failed = [r["parameters"] / 1e9 for r in records if r["method"] == method and r["status"] != "ok"]
        heights = [0.97 - 0.035 * list(LABELS).index(method)] * len(failed)
        axis.plot(failed, heights, "x", color=COLOURS[method], transform=axis.get_xaxis_transform())
    axis.grid(alpha=0.25, which="major")
