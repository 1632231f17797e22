"""A file of results that a run can be resumed from: JSON lines, a header first, one line per finished measurement."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from atman_kernels.errors import InputError

FORMAT = "atman-quality"
VERSION = 1


class ResultFile:
    """Finished measurements on disk; each is written whole, once, as soon as it is there.

    Args:
        path: a new file, or one that an interrupted run with the same header left.
        header: what all measurements have in common, JSON types.

    Raises:
        InputError: the file is something else, of another version, or of a run with another header.
    """

    def __init__(self, path: str | Path, header: dict[str, Any]) -> None:
        self.path = Path(path)
        self.header = {"format": FORMAT, "version": VERSION, **json.loads(json.dumps(header))}
        if not self.path.absolute().parent.is_dir() or self.path.is_dir():
            raise InputError(f"path must be a file in an existing folder, got {os.fspath(path)!r}")
        self.entries: list[dict[str, Any]] = []
        if self.path.exists() and self.path.stat().st_size:
            self.entries = list(self._read())
        else:
            self._append(self.header, "w")

    def add(self, entry: dict[str, Any]) -> None:
        self._append(entry, "a")
        self.entries.append(entry)

    def _append(self, value: dict[str, Any], how: str) -> None:
        with open(self.path, how, encoding="utf-8") as stream:
            stream.write(json.dumps(value, allow_nan=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def _read(self) -> Iterator[dict[str, Any]]:
        """The finished lines; what an interruption cut off in the middle is removed from the file."""
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        try:
            header, *entries = [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise InputError(f"{self.path} is no result file: {error}") from error
        found = header.get("format") if isinstance(header, dict) else None
        if found != FORMAT:
            raise InputError(f"{self.path} is no result file: expected format {FORMAT!r}, found {found!r}")
        if header.get("version") != VERSION:
            raise InputError(f"{self.path} has version {header.get('version')!r}; only {VERSION} can be continued")
        different = [name for name in self.header if header.get(name) != self.header[name]]
        if different:
            name = different[0]
            raise InputError(
                f"{self.path} is of another run: {name} was {header.get(name)!r}, now it is {self.header[name]!r}; "
                "give another file, or the same options to continue"
            )
        if len(whole) < len(text):
            with open(self.path, "rb+") as stream:
                stream.truncate(len(whole))
        yield from entries
