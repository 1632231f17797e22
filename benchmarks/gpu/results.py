"""The result file: written after every row, so that what was measured survives whatever ends the program."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SCHEMA = 1
MEASURED = "ok"
# ok: right, and timed. wrong: checked and not right, so never timed. error: it raised. unsupported: it cannot do this,
# and says why. skipped: it was not tried; the reason says why.
STATUSES = (MEASURED, "wrong", "error", "unsupported", "skipped")
FINAL = (MEASURED, "unsupported")  # what a resumed run does not try again
_KEY = ("case", "contender", "factor", "mode")
# Rows measured under another of these are not comparable, and a resumed run begins anew, beside them.
_SAME = ("commit", "versions", "python", "gpu_name", "dtype")


class Results:
    """Rows by case, contender, factor and mode, with where and how they were measured."""

    def __init__(self, path: Path, header: dict[str, Any], resume: bool = False) -> None:
        self.path, self.header = path, header
        self._rows: dict[tuple[str, ...], Row] = {}
        self.runs: list[dict[str, Any]] = []
        if resume and path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            if before.get("schema") == SCHEMA and all(before["header"].get(k) == header.get(k) for k in _SAME):
                self.runs = before["runs"]
                self._rows = {_key(row): row for row in before["rows"]}
            else:
                until = str(header.get("date", "now"))[:19].replace(":", "")
                path.rename(path.with_name(f"{path.stem}-until-{until}.json"))

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())

    def done(self, **key: str) -> bool:
        row = self._rows.get(_key(key))
        return row is not None and row["status"] in FINAL

    def add(self, row: Row) -> None:
        assert row["status"] in STATUSES, row
        assert (row["status"] == MEASURED) == ("ms" in row), (
            "a time is reported for what is right, and for nothing else"
        )
        self._rows.pop(_key(row), None)
        self._rows[_key(row)] = row
        self.write()

    def write(self) -> None:
        write_json(self.path, {"schema": SCHEMA, "header": self.header, "runs": self.runs, "rows": self.rows})


def write_json(path: Path, result: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def of_case(rows: Iterable[Row], case: str) -> list[Row]:
    return [row for row in rows if row["case"] == case]


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in _KEY)
