"""The rows of a data set: from Parquet, JSON lines, CSV, or a folder that the library `datasets` saved."""

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from atman_kernels.arguments import described, shown, text
from atman_kernels.errors import InputError
from atman_kernels.scale.extra import needed

LONGEST_FIELD = 64 << 20  # characters of a CSV field
ROWS_AT_ONCE = 256
Id = str | int


class Row(NamedTuple):
    """One prompt: a text, or a list of chat messages; None is for the model to refuse, and becomes an error."""

    id: Id
    prompt: Any
    target: str | None

    @property
    def fingerprint(self) -> str:
        """The same for the same prompt and target, so that another prompt under an old id is noticed."""
        content = json.dumps([self.prompt, self.target], sort_keys=True, default=str)
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


class _Record(NamedTuple):
    place: str  # for errors
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """A data set on this machine.

    Args:
        path: a file (.parquet, .jsonl, .ndjson, .csv), a folder of such files of one kind, or a folder written by
            `datasets.Dataset.save_to_disk`.
        id_column: texts or integers, each once.
        prompt_column: texts, or lists of chat messages.
        target_column: the answers; missing ones, and None for all of them, let the model answer.

    Raises:
        InputError: there is nothing to read, or a column's name is no text or is used twice.
    """

    path: str | os.PathLike[str]
    id_column: str = "id"
    prompt_column: str = "prompt"
    target_column: str | None = None

    def __post_init__(self) -> None:
        for name in ("id_column", "prompt_column"):
            text(getattr(self, name), name)
        if self.target_column is not None:
            text(self.target_column, "target_column", expected="a column's name or None")
        if len(set(self.columns)) < len(self.columns):
            raise InputError(f"id, prompt and target must be different columns, got {', '.join(self.columns)}")
        files(self.path)

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        return [c for c in (self.id_column, self.prompt_column, self.target_column) if c is not None]

    def fingerprints(self) -> dict[Id, str]:
        """Every row's id, and what tells its content; reads all rows once, so that nothing is found out half way.

        Raises:
            InputError: a file cannot be read, a column is missing or holds values of another type, an id is missing or
                there twice, or there are no rows.
        """
        found: dict[Id, str] = {}
        has_targets = self.target_column is None
        for record in _records(self.path, self.columns):
            row = self._row(record)
            if row.id in found:
                raise InputError(f"{record.place}: the id {row.id!r} is there twice; ids must differ")
            if found and type(row.id) is not type(next(iter(found))):
                raise InputError(
                    f"{record.place}: ids must all be texts or all integers, got {described(row.id)} after "
                    f"{described(next(iter(found)))}"
                )
            found[row.id] = row.fingerprint
            has_targets = has_targets or self.target_column in record.values
        if not found:
            raise InputError(f"source {os.fspath(self.path)!r} has no rows")
        if not has_targets:
            raise InputError(f"source {os.fspath(self.path)!r}: no row has a {self.target_column!r}")
        return found

    def rows(self) -> Iterator[Row]:
        """The rows in their order, some at a time in memory; errors as of `fingerprints`."""
        return map(self._row, _records(self.path, self.columns))

    def _row(self, record: _Record) -> Row:
        place, values = record
        for column in (self.id_column, self.prompt_column):
            if column not in values:
                raise InputError(f"{place}: no column {column!r}; there are {', '.join(map(repr, values))}")
        key, prompt = values[self.id_column], values[self.prompt_column]
        target = values.get(self.target_column) if self.target_column is not None else None
        if isinstance(key, bool) or not isinstance(key, str | int):
            raise InputError(f"{place}: {self.id_column!r} must be a text or an integer, got {described(key)}")
        if isinstance(key, int) and not -(2**63) <= key < 2**63:
            raise InputError(f"{place}: {self.id_column!r} must be an integer of 64 bits, got {key}")
        if not (prompt is None or isinstance(prompt, str) or _is_messages(prompt)):
            expected = "a text or a list of chat messages"
            raise InputError(f"{place}: {self.prompt_column!r} must be {expected}, got {described(prompt)}")
        if not (target is None or isinstance(target, str)):
            raise InputError(f"{place}: {self.target_column!r} must be a text or empty, got {described(target)}")
        return Row(key, prompt, target)


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, dict) for entry in value)


def files(path: str | os.PathLike[str]) -> list[Path]:
    """The files of a data set, in order.

    Raises:
        InputError: there is none that can be read, or they are of several kinds.
    """
    try:
        folder = Path(os.fspath(path))
        if folder.is_file():
            found = [folder]
        elif (folder / "state.json").is_file():
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            return [folder / entry["filename"] for entry in state["_data_files"]]
        elif (folder / "dataset_dict.json").is_file():
            splits = sorted(p.name for p in folder.iterdir() if (p / "state.json").is_file())
            raise InputError(f"source {os.fspath(path)!r} has the splits {', '.join(splits)}; give the folder of one")
        elif folder.is_dir():
            found = sorted(p for p in folder.iterdir() if p.suffix in _READERS and p.name[0] not in "._")
        else:
            raise InputError(f"source {os.fspath(path)!r} does not exist")
    except (OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"source {shown(path)} cannot be read: {error}") from error
    kinds = sorted({p.suffix for p in found})
    if len(kinds) != 1 or kinds[0] not in _READERS:
        expected = f"one of {', '.join(_READERS)}, a folder of one of these, or one that datasets saved"
        raise InputError(f"source {os.fspath(path)!r} must be {expected}; got {', '.join(kinds) or 'no files'}")
    return found


def _records(path: str | os.PathLike[str], columns: Sequence[str]) -> Iterator[_Record]:
    for file in files(path):
        try:
            yield from _READERS.get(file.suffix, _arrow)(file, columns)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{file} cannot be read: {error}") from error


def _parquet(file: Path, columns: Sequence[str]) -> Iterator[_Record]:
    parquet, arrow = needed("pyarrow.parquet", "Parquet"), needed("pyarrow", "Parquet")
    try:
        with parquet.ParquetFile(file) as opened:
            _check_columns(file, columns, opened.schema_arrow.names)
            batches = opened.iter_batches(batch_size=ROWS_AT_ONCE, columns=list(columns))
            yield from _of_batches(file, batches, columns)
    except arrow.ArrowException as error:
        raise InputError(f"{file} cannot be read: {error}") from error


def _arrow(file: Path, columns: Sequence[str]) -> Iterator[_Record]:
    """What `datasets` writes: Arrow's stream format."""
    arrow = needed("pyarrow", "a folder of datasets")
    try:
        with arrow.memory_map(str(file)) as mapped, arrow.ipc.open_stream(mapped) as stream:
            _check_columns(file, columns, stream.schema.names)
            yield from _of_batches(file, stream, columns)
    except arrow.ArrowException as error:
        raise InputError(f"{file} cannot be read: {error}") from error


def _of_batches(file: Path, batches: Any, columns: Sequence[str]) -> Iterator[_Record]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_AT_ONCE):
            for values in batch.slice(start, ROWS_AT_ONCE).select(list(columns)).to_pylist():
                yield _Record(f"{file}, row {number}", values)
                number += 1


def _json_lines(file: Path, columns: Sequence[str]) -> Iterator[_Record]:
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            place = f"{file}, line {number}"
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{place} is not JSON: {error}") from error
            if not isinstance(values, dict):
                raise InputError(f"{place} must be a JSON object, got {described(values)}")
            yield _Record(place, values)


def _csv(file: Path, columns: Sequence[str]) -> Iterator[_Record]:
    """All values are texts, so that an id 007 stays one; an empty target is none."""
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_FIELD))
    with file.open(encoding="utf-8-sig", newline="") as stream:
        table = csv.DictReader(stream, strict=True)
        _check_columns(file, columns, table.fieldnames or [])
        for values in table:
            place = f"{file}, line {table.line_num}"
            if None in values or None in values.values():
                raise InputError(f"{place} has another number of fields than the header")
            yield _Record(place, {name: value or None for name, value in values.items()})


def _check_columns(file: Path, wanted: Sequence[str], there: Sequence[str]) -> None:
    missing = [column for column in wanted if column not in there]
    if missing:
        names = ", ".join(map(repr, there)) or "none"
        raise InputError(f"{file}: no column {', '.join(map(repr, missing))}; there are {names}")


_READERS: dict[str, Callable[[Path, Sequence[str]], Iterator[_Record]]] = {
    ".parquet": _parquet,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _csv,
}
