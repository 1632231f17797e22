"""The folder that explanations of a data set go to: Parquet files, in which every id stands once.

One process writes, each file as a whole, and what is written is the only record of what is done: there is nothing
beside it that could disagree.
"""

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from atman_kernels import Explanation
from atman_kernels.arguments import shown
from atman_kernels.errors import InputError
from atman_kernels.files import write_whole
from atman_kernels.result.data import as_json
from atman_kernels.result.json_format import FORMAT, VERSION, values_from_json
from atman_kernels.scale.extra import needed
from atman_kernels.scale.source import Id

SETTINGS, LOCK = "_run.json", "_lock"  # readers of Parquet pass over names that begin so
PART = "part-{:05d}.parquet"
ROWS_PER_PART = 1000
SECONDS_BETWEEN_WRITES = 10.0  # what a killed process can lose
IN_JSON = ("settings", "stats")
FIELDS = (  # of an explanation; what else it has stands in its settings, too
    "prompt", "target", "target_tokens", "base_logprobs", "units", "scores", "standard_errors", "exact", "recompute",
    *IN_JSON,
)  # fmt: skip
COLUMNS = (*FIELDS, "error", "version", "fingerprint")


class Result(NamedTuple):
    """What became of one row: an explanation, or the error that stood in the way.

    Example:
        >>> Result(7, None, "InputError: prompt is empty").error
        'InputError: prompt is empty'
    """

    id: Id
    explanation: Explanation | None
    error: str | None


def read_results(output: str | os.PathLike[str]) -> Iterator[Result]:
    """What `explain_dataset` wrote, row by row, in the order in which it was finished; or every `explain_part` in it.

    The files can be read with anything that reads Parquet, too; docs/many-prompts.md describes the columns.

    Raises:
        InputError: output is no folder of `explain_dataset`.
        ImportError: pyarrow is not installed; the message says how to get it.

    Example:
        >>> for found in read_results("out"):                                           # doctest: +SKIP
        ...     print(found.id, found.error or found.explanation.top(1))
    """
    folder = Path(output)
    inner = sorted(file.parent for file in folder.glob(f"*/{SETTINGS}"))
    if inner and not (folder / SETTINGS).exists():
        for part in inner:
            yield from read_results(part)
        return
    name = _settings_of(folder)["id_column"]
    parquet = needed("pyarrow.parquet", "reading results")
    for file in _parts(folder):
        with parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    yield Result(row[name], None if row["error"] else _explanation(row), row["error"])


class Output:
    """The folder, held by one process at a time.

    Args:
        folder: a new or empty one, or one that an earlier run with the same settings wrote to.
        settings: what the results depend on, in JSON types; `id_column` is among them.
        id_type: of the ids, str or int.

    Raises:
        InputError: other things are in the folder, another run's results, or another process writes to it. Nothing is
            changed then.

    Attributes:
        fingerprints: id -> fingerprint of the rows that are done.
        failed: how many of them are errors.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: Mapping[str, Any], id_type: type) -> None:
        self.folder, self.settings = Path(folder), dict(settings)
        self.id_column = settings["id_column"]
        if self.id_column in COLUMNS:
            raise InputError(f"id_column {self.id_column!r} is the name of a column of the results; rename it")
        self._arrow, self._parquet = needed("pyarrow", "results"), needed("pyarrow.parquet", "results")
        self._schema = _schema(self._arrow, self.id_column, id_type)
        self.fingerprints: dict[Id, str] = {}
        self.failed, self._number, self._pending = 0, 0, 0
        self._open: list[Any] = []  # tables of the part that is not full yet
        self._written_at = time.monotonic()
        self._lock: IO[str] | None = None
        _check_folder(self.folder, self.settings)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.folder)
        try:
            _check_folder(self.folder, self.settings)  # once more, now that nobody else writes
            self._take_over()
        except BaseException:
            self.close()
            raise

    def _take_over(self) -> None:
        """Goes on where another process stopped, perhaps in the middle of writing a file."""
        for unfinished in self.folder.glob(".*.tmp"):
            unfinished.unlink()
        parts = _parts(self.folder)
        for file in parts:
            table = self._read(file, columns=[self.id_column, "fingerprint", "error"])
            self.fingerprints |= zip(table[self.id_column].to_pylist(), table["fingerprint"].to_pylist(), strict=True)
            self.failed += table.num_rows - table["error"].null_count
            self._number = _number(file) + 1
        if parts and table.num_rows < ROWS_PER_PART:
            self._open = [self._read(parts[-1])]
            self._number -= 1

    def _read(self, file: Path, columns: list[str] | None = None) -> Any:
        try:
            return self._parquet.read_table(file, columns=columns, partitioning=None)
        except (OSError, self._arrow.ArrowException) as error:
            raise InputError(f"{file} cannot be read: {error}; without it, its rows are explained anew") from error

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Once a model is loaded and before the first row: `facts` of it that the results depend on as well.

        Raises:
            InputError: an earlier run had another model under the same name.
        """
        if (self.folder / SETTINGS).exists():
            _check_same("the model", _settings_of(self.folder).get("facts", {}), facts, self.folder)
        else:
            content = json.dumps({**self.settings, "facts": dict(facts)}, indent=1, ensure_ascii=True)
            write_whole(self.folder / SETTINGS, content.encode("ascii") + b"\n")

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keeps finished rows, and writes them now and then."""
        self._open.append(self._arrow.Table.from_pylist(list(rows), schema=self._schema))
        self._pending += len(rows)
        for row in rows:
            self.fingerprints[row[self.id_column]] = row["fingerprint"]
            self.failed += row.get("error") is not None
        full = sum(table.num_rows for table in self._open) >= ROWS_PER_PART
        if full or time.monotonic() - self._written_at >= SECONDS_BETWEEN_WRITES:
            self.write()
        if full:
            self._open, self._number = [], self._number + 1

    def write(self) -> None:
        """Writes what is not on disk yet: the open part as a whole, in the place of what it was."""
        self._written_at = time.monotonic()
        if not self._pending:
            return
        sink = self._arrow.BufferOutputStream()
        self._parquet.write_table(self._arrow.concat_tables(self._open), sink, compression="zstd")
        write_whole(self.folder / PART.format(self._number), sink.getvalue().to_pybytes())
        self._pending = 0

    def close(self) -> None:
        """Writes the rest, and lets other processes in. A folder that nothing was written to goes again."""
        if self._lock is None:
            return
        try:
            self.write()
        finally:
            if not (self.folder / SETTINGS).exists():
                (self.folder / LOCK).unlink(missing_ok=True)
                with suppress(OSError):
                    self.folder.rmdir()
            self._lock.close()
            self._lock = None


def row_of(explanation: Explanation) -> dict[str, Any]:
    """An explanation as a row, without its id."""
    row = {name: as_json(getattr(explanation, name)) for name in FIELDS}
    return row | {name: json.dumps(row[name]) for name in IN_JSON}


def _explanation(row: Mapping[str, Any]) -> Explanation:
    content = {name: row[name] for name in FIELDS} | {name: json.loads(row[name]) for name in IN_JSON}
    return Explanation(**values_from_json({"format": FORMAT, "version": VERSION, **content}))


def _schema(arrow: Any, id_column: str, id_type: type) -> Any:
    texts, floats = arrow.string(), arrow.list_(arrow.float32())
    unit = {
        "text": texts, "start": arrow.int32(), "end": arrow.int32(), "token_indices": arrow.list_(arrow.int32()),
        "source": texts,
    }  # fmt: skip
    kinds = dict.fromkeys(COLUMNS, texts) | {
        "target_tokens": arrow.list_(texts),
        "base_logprobs": floats,
        "units": arrow.list_(arrow.struct(list(unit.items()))),
        "scores": arrow.list_(floats),
        "standard_errors": floats,
        "exact": arrow.list_(arrow.bool_()),
        "recompute": arrow.int32(),
    }
    return arrow.schema([(id_column, texts if id_type is str else arrow.int64()), *kinds.items()])


def _parts(folder: Path) -> list[Path]:
    return sorted((file for file in folder.glob("part-*.parquet") if re.fullmatch(r"part-\d+", file.stem)), key=_number)


def _number(file: Path) -> int:
    return int(file.stem.removeprefix("part-"))


def _settings_of(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        found["id_column"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"output {os.fspath(folder)!r} is no folder of explanations: {error}") from error
    return found


def _check_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises InputError where there is something else than results of these settings."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output must be a folder, got {os.fspath(folder)!r}")
    if not folder.is_dir() or all(entry.name == LOCK for entry in folder.iterdir()):
        return
    if not (folder / SETTINGS).exists():
        names = ", ".join(sorted(entry.name for entry in folder.iterdir())[:3])
        raise InputError(f"output {os.fspath(folder)!r} holds other things ({names}); give a new or an empty folder")
    _check_same("this run", {k: v for k, v in _settings_of(folder).items() if k != "facts"}, settings, folder)


def _check_same(what: str, before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    plain = json.loads(json.dumps(dict(now)))
    for name in before | plain:
        if before.get(name) != plain.get(name):
            raise InputError(
                f"output {os.fspath(folder)!r} holds results with {name} = {shown(before.get(name))}, {what} has "
                f"{shown(plain.get(name))}; give another folder"
            )


def _locked(folder: Path) -> IO[str]:
    import fcntl  # POSIX, as Ray's clusters

    stream = (folder / LOCK).open("a", encoding="ascii")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.stat(stream.name).st_ino != os.fstat(stream.fileno()).st_ino:
            raise FileNotFoundError(stream.name)  # its owner took it away in between
    except OSError as error:
        stream.close()
        raise InputError(f"output {os.fspath(folder)!r} is being written to by another process") from error
    return stream
