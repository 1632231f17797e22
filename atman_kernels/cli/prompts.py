"""Where a prompt comes from: an argument, a file, standard input, or a question of a SQuAD-format file."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from atman_kernels import arguments
from atman_kernels.cli.output import say
from atman_kernels.errors import InputError

if TYPE_CHECKING:
    from atman_kernels.evaluation.squad import Item

MOST_BYTES = 64 << 20  # of a prompt


def read_prompt(text: str | None, file: str | None) -> str:
    """The one prompt that was given; "-" as the text or the file is standard input.

    Line ends at the very end are left out: editors and `echo` add them, and they would be part of the question.

    Raises:
        InputError: none or several were given, or it is empty, too large, no UTF-8 or cannot be read.
    """
    if (text is None) == (file is None):
        raise InputError("prompt: give exactly one of a text, '-' for standard input, --file and --squad")
    if "-" in (text, file):
        prompt = _decoded(_standard_input(), "standard input").rstrip("\r\n")
    elif file is not None:
        prompt = _decoded(_bytes(file), file).rstrip("\r\n")
    else:
        prompt = text or ""
    return arguments.text(prompt, "prompt", blank=False)


def check_texts(given: Mapping[str, str | Sequence[str] | None]) -> None:
    """Raises InputError if an option's text, or one of several, holds what was not UTF-8 on the command line."""
    for option, texts in given.items():
        for text in [texts] if isinstance(texts, str) else texts or ():
            arguments.text_or_empty(text, option)


def squad_question(file: str, item: int) -> "Item":
    """Question number `item` (from 0, in the order of the file) of a file in the format of SQuAD 1.1 or 2.0.

    Raises:
        InputError: the file cannot be read or has another format, or it has fewer questions.
    """
    from atman_kernels.evaluation.squad import read_items

    try:
        questions = read_items(file)
    except InputError as error:
        raise InputError(f"--squad: {error}") from error
    if not 0 <= item < len(questions):
        raise InputError(f"--item must be in 0..{len(questions) - 1} for {file}, got {item}")
    return questions[item]


def _standard_input() -> bytes:
    if sys.stdin is None or sys.stdin.closed:
        raise InputError("standard input is closed; pipe the prompt in, or give it as a text or with --file")
    if sys.stdin.isatty():
        say("Reading the prompt from here; an empty line with Ctrl-D (Windows: Ctrl-Z, Enter) ends it ...")
    return _bounded(sys.stdin.buffer, "standard input")


def _bytes(file: str) -> bytes:
    try:
        with Path(file).open("rb") as stream:
            return _bounded(stream, file)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _bounded(stream: BinaryIO, name: str) -> bytes:
    """All of it, unless it does not end: no model reads so much."""
    try:
        data = stream.read(MOST_BYTES + 1)
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}") from error
    if len(data) > MOST_BYTES:
        raise InputError(f"{name} holds more than {MOST_BYTES >> 20} MiB; no prompt is that long")
    return data


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text: {error}") from error
