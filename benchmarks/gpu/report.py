"""Rows as tables: on the terminal while they come, and as a markdown summary beside the result file."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from benchmarks.gpu.results import MEASURED, Row
from benchmarks.gpu.timing import Rates

COLUMNS = ("case", "contender", "ms", "TFLOP/s", "GB/s", "floor ms", "of floor", "of suppression", "host µs", "error")


def label(row: Row) -> str:
    """A contender with what it was asked for, as far as that is not the usual."""
    mode = "" if row["mode"] == "log_additive" else f" {row['mode']}"
    return f"{row['contender']}, {row['factor']}{mode}" if row["is_ours"] else row["contender"]


def overhead(row: Row, rows: Sequence[Row]) -> float | None:
    """By which part suppression makes our kernel slower than the same kernel without factors; None if not known."""
    if not row["is_ours"] or row["factor"] == "none" or row["status"] != MEASURED:
        return None
    for other in rows:
        same = all(other[k] == row[k] for k in ("case", "contender"))
        if same and other["factor"] == "none" and other["status"] == MEASURED:
            return row["ms"] / other["ms"] - 1
    return None


def cells(row: Row, rows: Sequence[Row]) -> list[str]:
    """A measured row in the order of `COLUMNS`."""
    slower = overhead(row, rows)
    return [
        row["case"],
        label(row),
        f"{row['ms']:.4g}",
        f"{row['tflops_per_second']:.4g}",
        f"{row['gigabytes_per_second']:.4g}",
        f"{row['floor_ms']:.3g}",
        f"{row['share_of_floor']:.0%}",
        "" if slower is None else f"{slower:+.1%}",
        f"{row['host_us']:.0f}",
        f"{row['agreement']['relative_error']:.1e}",
    ]


def line(row: Row, rows: Sequence[Row]) -> str:
    """One row, as it is printed when it has been measured."""
    where = f"{row['case']:34} {label(row):28}"
    if row["status"] != MEASURED:
        return f"{where} {row['status']}: {row['reason']}"
    slower = overhead(row, rows)
    return (
        f"{where} {row['ms']:9.4f} ms {row['tflops_per_second']:7.1f} TFLOP/s {row['gigabytes_per_second']:7.0f} GB/s "
        f"{row['share_of_floor']:5.0%} of the roofline" + ("" if slower is None else f", suppression {slower:+.1%}")
    )


def table(rows: Sequence[Row]) -> str:
    """What was measured, as text, a case's name once; then what was not, with the reason."""
    body = [cells(row, rows) for row in rows if row["status"] == MEASURED]
    for before, now in reversed(list(pairwise(body))):
        if now[0] == before[0]:
            now[0] = ""
    rest = [row for row in rows if row["status"] != MEASURED]
    return "\n".join([plain_table(COLUMNS, body, texts=2), "", *[line(row, rows) for row in rest]])


def plain_table(header: Sequence[str], body: Sequence[Sequence[str]], texts: int) -> str:
    """Columns as wide as they need to be, the first `texts` of them aligned to the left."""
    widths = [max(len(cells[i]) for cells in (header, *body)) for i in range(len(header))]
    lines = []
    for cells in (header, *body):
        aligned = [c.ljust(w) if i < texts else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def markdown(header: dict[str, Any], runs: Sequence[dict[str, Any]], rows: Sequence[Row]) -> str:
    """The whole result for reading: where it ran, then a table per group, then what was not measured and why."""
    versions = ", ".join(f"{name} {number}" for name, number in header["versions"].items() if number)
    parts = [
        f"# The ops on {header['gpu_name'] or header['cpu']}, {header['dtype']}",
        f"Commit {header['commit']}; {header['date']}; {versions}.",
    ]
    for run in runs:
        parts.append(f"- {', '.join(run['groups'])}: {Rates(**run['rates'])}, measured in the same run")
    parts += [f"- without {name}: {reason}" for name, reason in header["left_out"].items()]
    for group in dict.fromkeys(row["group"] for row in rows):
        measured = [row for row in rows if row["group"] == group and row["status"] == MEASURED]
        if measured:
            parts.append(f"\n## {group}\n\n" + _markdown_table(COLUMNS, [cells(row, rows) for row in measured]))
    rest = [row for row in rows if row["status"] != MEASURED]
    if rest:
        body = [[row["case"], label(row), row["status"], row["reason"]] for row in rest]
        parts.append("\n## Not measured\n\n" + _markdown_table(("case", "contender", "status", "reason"), body))
    return "\n".join(parts) + "\n"


def _markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *[[cell.replace("|", "\\|") for cell in cells] for cells in body]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
