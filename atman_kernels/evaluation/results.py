"""A file of results that a run can be resumed from: JSON lines.

A header first, then one line per setting that measurements refer to by name, and one per finished measurement.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from atman_kernels.errors import InputError
from atman_kernels.files import check_destination

FORMAT = "atman-quality"
VERSION = 2


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
        check_destination(path)
        if self.path.exists() and not self.path.is_file():
            raise InputError(f"path must be a file, which a later run can read; {os.fspath(path)!r} is none")
        self.entries: list[dict[str, Any]] = []
        self.settings: dict[str, Any] = {}
        if self.path.exists() and self.path.stat().st_size:
            for line in self._read():
                if "definition" in line:
                    self.settings[line["setting"]] = line["definition"]
                else:
                    self.entries.append(line)
        else:
            self._append(self.header, "w")

    def define(self, setting: str, definition: dict[str, Any]) -> None:
        """Say what measurements under this name are of; others may join those that the file has.

        Raises:
            InputError: the file has measurements of something else under this name.
        """
        definition = json.loads(json.dumps(definition))
        known = self.settings.get(setting)
        if known is None:
            self._append({"setting": setting, "definition": definition}, "a")
            self.settings[setting] = definition
        elif known != definition:
            raise InputError(
                f"{self.path} is of another run: setting {setting!r} was {known!r}, now it is {definition!r}; give "
                "another file, or the same options to continue"
            )

    def add(self, entry: dict[str, Any]) -> None:
        """Write one finished measurement, JSON types with "item" and "setting", and keep it in `entries`.

        Raises:
            OSError: it cannot be written.
        """
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
        except (ValueError, RecursionError) as error:
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
        for number, entry in enumerate(entries, 2):
            fits = isinstance(entry, dict) and isinstance(entry.get("setting"), str)
            if not fits or not ({"definition", "item"} & entry.keys()):
                raise InputError(f"{self.path} is no result file: line {number} is no measurement")
        if len(whole) < len(text):
            with open(self.path, "rb+") as stream:
                stream.truncate(len(whole))
        yield from entries
