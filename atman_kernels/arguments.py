"""What arguments of the public API may be: one check for each kind of value, and the form of its error.

Every check returns the value in its plain form (a `str`, `int`, `float`, `bool` or `list`) and raises `InputError`
with the argument's name, what came and what was expected. Numbers and arrays of other libraries (numpy, pandas, torch)
are known by what they can do, so that none of these is imported.
"""

import math
import numbers
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

from atman_kernels.errors import InputError

MOST_ENTRIES = 1 << 24  # what is longer is no list that anybody wrote, but a range or a generator without an end
_SHOWN = 80  # characters of a value in a message
_SURROGATE = re.compile("[\ud800-\udfff]")


def text(value: Any, name: str, *, expected: str = "a text", blank: bool = True) -> str:
    """The text.

    Args:
        blank: whether white space alone will do.

    Raises:
        InputError: it is no str, it is empty, or it holds half a surrogate pair, which no tokenizer and no file takes.

    >>> text("\\udce9t\\xe9", "prompt")
    Traceback (most recent call last):
    ...
    atman_kernels.errors.InputError: prompt is no text: character 0 is U+DCE9, the byte 0xE9 that was not UTF-8
    """
    plain = text_or_empty(value, name, expected=expected)
    if not (plain if blank else plain.strip()):
        raise InputError(f"{name} is empty; expected a text with at least one character")
    return plain


def text_or_empty(value: Any, name: str, *, expected: str = "a text") -> str:
    """As `text`, and "" will do."""
    if not isinstance(value, str):
        hint = "; decode it first" if isinstance(value, bytes | bytearray) else ""
        raise InputError(f"{name} must be {expected}, got {described(value)}{hint}")
    half = _SURROGATE.search(value)
    if half is not None:
        code = ord(half[0])
        what = f"the byte 0x{code - 0xDC00:02X} that was not UTF-8" if 0xDC80 <= code <= 0xDCFF else "half a character"
        raise InputError(f"{name} is no text: character {half.start()} is U+{code:04X}, {what}")
    return str.__str__(value)  # without what a subclass makes of itself


def entries(value: Any, name: str, of: str) -> list[Any]:
    """A list argument as a list: of a list, a tuple, an array, a pandas Series, a range, a generator.

    Arrays and tensors of two dimensions become lists of lists. What is iterable without being a list is refused: a
    text, a mapping, a set.

    Args:
        of: what the entries are, as in "a list of texts".

    >>> entries(range(3), "layers", "layer indices")
    [0, 1, 2]
    >>> entries("ok", "targets", "texts")
    Traceback (most recent call last):
    ...
    atman_kernels.errors.InputError: targets must be a list of texts, got str 'ok'
    """
    listed = value
    if not isinstance(value, str | bytes | bytearray | Mapping | set | frozenset):
        if hasattr(value, "tolist"):  # arrays, tensors, Series; of none or one dimension less, a single value
            listed = value.tolist()
        elif hasattr(value, "__array__"):  # a DataFrame, which iterates over the names of its columns
            listed = value.__array__().tolist()
        if isinstance(listed, list | tuple):
            return list(listed)
        try:
            iterator = None if isinstance(listed, str) else iter(listed)
        except TypeError:
            iterator = None
        if iterator is not None:
            found = list(islice(iterator, MOST_ENTRIES + 1))
            if len(found) > MOST_ENTRIES:
                raise InputError(f"{name} has more than {MOST_ENTRIES:,} entries")
            return found
    raise InputError(f"{name} must be a list of {of}, got {described(value)}")


def texts(value: Any, name: str) -> list[str]:
    """A list of texts, none of them empty."""
    return [text(entry, f"{name}[{index}]") for index, entry in enumerate(entries(value, name, "texts"))]


def integer(
    value: Any, name: str, *, least: int | None = None, most: int | None = None, expected: str | None = None
) -> int:
    """A whole number, numpy's and torch's included; `True` is none, and neither is 3.0.

    Args:
        least, most: the limits, both included.
        expected: what the message says; by default it names the limits.

    >>> integer(0, "steps", least=1)
    Traceback (most recent call last):
    ...
    atman_kernels.errors.InputError: steps must be an integer >= 1, got 0
    """
    found = value if isinstance(value, int) else _plain(value)
    if not isinstance(found, int):
        try:
            found = None if getattr(found, "ndim", 0) else operator.index(found)
        except TypeError:
            found = None
    if (
        found is None
        or isinstance(found, bool)
        or (least is not None and found < least)
        or (most is not None and found > most)
    ):
        limits = "" if least is None else f" >= {least}" if most is None else f" from {least} to {most:,}"
        what = expected or f"an integer{limits}"
        raise InputError(f"{name} must be {what}, got {shown(value)}")
    return found


def count_or_none(value: Any, name: str) -> int | None:
    """A whole number of at least 1, or None.

    >>> count_or_none(0, "recompute")
    Traceback (most recent call last):
    ...
    atman_kernels.errors.InputError: recompute must be an integer >= 1 or None, got 0
    """
    return None if value is None else integer(value, name, least=1, expected="an integer >= 1 or None")


def real(value: Any, name: str, expected: str, fits: Callable[[float], bool] = math.isfinite) -> float:
    """A number, numpy's and torch's included, that `fits`; `True` is none, nor is a text.

    >>> real(float("nan"), "factor", "a finite number >= 0", lambda x: 0 <= x < float("inf"))
    Traceback (most recent call last):
    ...
    atman_kernels.errors.InputError: factor must be a finite number >= 0, got nan
    """
    found = value if isinstance(value, int | float) else _plain(value)
    if isinstance(found, bool) or not isinstance(found, int | float | numbers.Real):
        raise InputError(f"{name} must be {expected}, got {shown(value)}")
    try:
        number = float(found)
    except OverflowError:  # an integer beyond the largest float
        number = math.inf
    if not fits(number):
        raise InputError(f"{name} must be {expected}, got {shown(value)}")
    return number


def flag(value: Any, name: str) -> bool:
    """True or False, numpy's included; nothing that is only taken for one of them, such as the text "no"."""
    found = value if isinstance(value, bool) else _plain(value)
    if not isinstance(found, bool):
        raise InputError(f"{name} must be True or False, got {shown(value)}")
    return found


def choice(value: Any, name: str, choices: Sequence[str]) -> str:
    """One of some names."""
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")
    return str.__str__(value)


@contextmanager
def of_entry(name: str | None) -> Iterator[None]:
    """Errors inside say first to which of several entries they belong; None: there is but one."""
    try:
        yield
    except InputError as error:
        raise error if name is None else InputError(f"{name}: {error}") from error.__cause__


def shown(value: Any) -> str:
    """What came, for a message: short values as they are, others by their type.

    >>> shown(3), shown("a" * 100)[-12:], shown(object())
    ('3', 'aaaaaaaaaaa…', 'object')
    """
    is_plain = value is None or isinstance(
        value, str | bytes | bytearray | numbers.Number | list | tuple | dict | set | frozenset | range
    )
    if not is_plain:
        return type(value).__name__
    told = repr(value)
    return told if len(told) <= _SHOWN else told[: _SHOWN - 1] + "…"


def described(value: Any) -> str:
    """What came, with its type."""
    kind = type(value).__name__
    told = shown(value)
    return told if told in (kind, "None") or told.startswith((f"{kind}(", f"np.{kind}(")) else f"{kind} {told}"


def _plain(value: Any) -> Any:
    """A number of numpy or torch as Python's own; None for numpy's times, which count as its integers."""
    if getattr(getattr(value, "dtype", None), "kind", "") in ("m", "M"):
        return None
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    return value
