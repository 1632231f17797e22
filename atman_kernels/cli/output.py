"""Output of the command line: results to standard output or files, messages to standard error.

Characters that a stream's encoding lacks are written as code points; control characters of a prompt are displayed,
never obeyed. Destinations are checked before any work. A result that cannot be written is still shown, and the exit
code is 1.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from atman_kernels.errors import InputError
from atman_kernels.files import check_destination, is_descriptor, same_file, write_whole
from atman_kernels.result.characters import printable

if TYPE_CHECKING:
    from rich.console import Console


NARROWEST = 80  # where the terminal's width is said to be none
LONGEST_LINE = 1000  # characters of an error; what somebody typed may be in it


class NotWrittenError(Exception):
    """A result that was there could not be written; the message says where to and why not."""


class Result(NamedTuple):
    """What an option asks for in a file; "-", or a name of standard output, puts it there instead of what is shown."""

    option: str
    path: str | None
    make: Callable[[], str]

    @property
    def is_shown(self) -> bool:
        """Whether it goes to standard output."""
        return self.path is not None and goes_to_standard_output(self.path)


def prepare() -> None:
    """Makes the streams take any text, and opens closed ones, whose numbers a file opened later would get."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say(message: str) -> None:
    """A message on standard error; dropped where it cannot be written."""
    try:
        if sys.stderr is not None:
            sys.stderr.write(printable(message) + "\n")
            sys.stderr.flush()
    except (OSError, ValueError):  # a full disk, a reader that is gone, a closed stream
        pass


def progress_is_seen() -> bool:
    """Whether standard error is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


def write(text: str) -> None:
    """A result to standard output, in UTF-8 as in a file.

    Raises:
        NotWrittenError: it cannot be written.
        BrokenPipeError: nobody reads it any more.
    """
    with _standard_output() as stream:
        stream.flush()
        stream.buffer.write(text.encode("utf-8"))  # a page says that it is UTF-8, JSON is ASCII


def show(*parts: Any, wide: int | None = None) -> None:
    """Rich's renderables to standard output, at least `wide` columns wide where that is no terminal."""
    with _standard_output():
        console(wide).print(*parts, sep="\n")


def console(wide: int | None = None) -> "Console":
    """Standard output for rich: text is text there, whatever brackets it has."""
    from rich.console import Console

    screen = Console(file=sys.stdout, markup=False, emoji=False, highlight=False)
    if screen.width < 1:  # COLUMNS=0, which would leave nothing of a line
        screen.width = NARROWEST
    if wide is not None and not screen.is_terminal:
        screen.width = max(wide, screen.width)
    return screen


def shown(text: str) -> str:
    """Text as standard output can show it, so that its width is known before it is laid out."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return printable(text).encode(encoding, "backslashreplace").decode(encoding)


def sign(character: str, otherwise: str) -> str:
    """A character of ours, or what stands for it where standard output does not have it."""
    return character if shown(character) == character else otherwise


def finish() -> bool:
    """Whether all that was given to standard output got there; what did not is dropped, and said."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError) as error:
        lose(error)
        return False
    return True


def lose(error: Exception) -> None:
    """Says why standard output cannot be written, and gives up what was meant for it."""
    if not isinstance(error, BrokenPipeError):
        say(f"Error: {_refused(error)}")
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (Python flushes it once more at its very end)


def check_standard_output() -> None:
    """Raises InputError if there is none."""
    if sys.stdout is None or sys.stdout.closed:
        raise InputError("standard output is closed; send it to a file, or to /dev/null if it is not wanted")


def check_destinations(outputs: Mapping[str, str | None], inputs: Mapping[str, str | None] | None = None) -> None:
    """Raises InputError, before any work, if an option's file cannot be written or is another's, too.

    Args:
        outputs: option -> path, "-" or None.
        inputs: options whose files are read, which must not be written over.
    """
    given = [(option, path) for option, path in outputs.items() if path is not None]
    for i, (option, path) in enumerate(given):
        to_output = goes_to_standard_output(path)
        for other, taken in given[:i]:
            if to_output and goes_to_standard_output(taken):
                raise InputError(f"{other} and {option} cannot both go to standard output")
            if not to_output and same_file(path, taken) and (os.path.isfile(path) or not os.path.exists(path)):
                raise InputError(f"{other} and {option} must be different files, got {path!r} for both")
        if to_output:
            continue
        check_destination(path, option)
        for other, source in (inputs or {}).items():
            if source is not None and os.path.isfile(source) and same_file(path, source):
                raise InputError(f"{option} would overwrite {other}, {path!r}")


def deliver(
    results: Sequence[Result], display: Callable[[], None], notes: Sequence[str] = (), quiet: bool = False
) -> None:
    """Writes every result that was asked for; displays them in the usual way, unless one of them takes that place.

    Raises:
        NotWrittenError: some of them could not be written; all others were, and the display was shown.
    """
    written, refused = [], []
    for result in results:
        if result.path is None or result.is_shown:
            continue
        try:
            write_whole(result.path, result.make().encode("utf-8"))
        except OSError as error:
            refused.append(f"{result.option}: {result.path} cannot be written: {error.strerror or error}")
        else:
            written.append(result.path)
    taken = [result for result in results if result.is_shown]
    if taken:
        write(taken[0].make())
    else:
        with _standard_output():
            display()
    for note in [] if quiet else [*notes, *(f"Wrote {path}" for path in written)]:
        say(note)
    if refused:
        raise NotWrittenError("; ".join(refused))


def goes_to_standard_output(path: str) -> bool:
    """Whether this path is "-" or a name of the first descriptor, such as /dev/stdout."""
    return path == "-" or is_descriptor(path, 1)


@contextmanager
def _standard_output() -> Iterator[Any]:
    check_standard_output()
    try:
        yield sys.stdout
        sys.stdout.flush()
    except BrokenPipeError:  # click ends the program, as is usual
        raise
    except OSError as error:
        raise _refused(error) from error


def _refused(error: Exception) -> NotWrittenError:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return NotWrittenError(f"standard output cannot be written: {reason}")


class Failure(click.ClickException):
    """One line on standard error and an exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        line = " ".join(message.split())
        super().__init__(
            line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE // 2]}…{line[-LONGEST_LINE // 2 :]}"
        )
        self.exit_code = exit_code  # type: ignore[misc]  # click reads it from the instance

    def show(self, file: Any = None) -> None:
        """Prints the line, to standard error whatever file is given."""
        say(f"Error: {self.format_message()}")
