"""What `pytest benchmarks` measured, as a table of ratios and a small result file.

python -m benchmarks.ops_table REPORT.json        # REPORT.json: from pytest's --benchmark-json
"""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import RESULTS, cpu_slug, environment

OURS = "ours"


def rows_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per shape and contender: milliseconds (best and median of the rounds), rates, and ratios to ours."""
    rows = []
    for entry in report["benchmarks"]:
        shape, layout, dtype = entry["group"].split()
        contender = entry["params"].get("contender") or "flex"
        extra, stats = entry["extra_info"], entry["stats"]
        rows.append(
            {
                "shape": shape,
                "layout": layout,
                "dtype": dtype,
                "contender": contender,
                "ms": stats["median"] * 1e3,
                "best_ms": stats["min"] * 1e3,
                "rounds": stats["rounds"],
                **{name: extra[name] for name in extra if name.endswith("gflops_per_second")},
            }
        )
    ours = {_key(row): row["ms"] for row in rows if row["contender"] == OURS}
    for row in rows:
        row["times_ours"] = row["ms"] / ours[_key(row)] if _key(row) in ours else None
        row["share_of_product"] = row["gflops_per_second"] / row["product_gflops_per_second"]
        row["share_of_tile_product"] = row["gflops_per_second"] / row["tile_product_gflops_per_second"]
    return rows


def table_of(rows: list[dict[str, Any]]) -> Table:
    """Per shape: our time and rate, its share of a matrix product's, and how many times longer the others take."""
    others = [name for name in dict.fromkeys(row["contender"] for row in rows) if name != OURS]
    table = Table("shape", "heads", "dtype", "ms", "GFLOP/s", "of product", "of tile's", *others)
    for row in rows:
        if row["contender"] != OURS:
            continue
        same = {other["contender"]: other["times_ours"] for other in rows if _key(other) == _key(row)}
        table.add_row(
            row["shape"],
            row["layout"],
            row["dtype"],
            f"{row['ms']:.2f}",
            f"{row['gflops_per_second']:.0f}",
            f"{row['share_of_product']:.0%}",
            f"{row['share_of_tile_product']:.0%}",
            *(f"{same[name]:.1f}×" if same.get(name) else "" for name in others),
        )
    return table


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["shape"], row["layout"], row["dtype"]


def main(report: str) -> int:
    rows = rows_of(json.loads(Path(report).read_text(encoding="utf-8")))
    console = Console(width=max(140, Console().width))
    console.print(table_of(rows))
    target = RESULTS / f"ops-{cpu_slug()}.json"
    RESULTS.mkdir(exist_ok=True)
    target.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    console.print(f"Wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
