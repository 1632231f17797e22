"""Parts of a prompt, as people name them, and the tokens that they hold."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atman_kernels.arguments import described, entries, integer, text_or_empty
from atman_kernels.errors import InputError
from atman_kernels.planning.factors import checked_factor
from atman_kernels.planning.units import Unit, split_units


@dataclass(frozen=True)
class Occurrence:
    """Which occurrence of a text or a compiled regular expression is meant.

    Args:
        of: what is looked for; occurrences do not overlap one another.
        which: its number, from 0, or from the end if negative; "all" for every one.

    Example:
        >>> text = "The dog saw a dog."
        >>> [text[start:end] for start, end in occurrences(Occurrence("dog", "all"), text)]
        ['dog', 'dog']
        >>> list(occurrences(Occurrence("dog", -1), text))
        [(14, 17)]
    """

    of: str | re.Pattern[str]
    which: int | str

    def __post_init__(self) -> None:
        if not isinstance(self.of, re.Pattern):
            expected = "a text or a compiled regular expression"
            object.__setattr__(self, "of", text_or_empty(self.of, "Occurrence: of", expected=expected))
        if not isinstance(self.which, str) or self.which != "all":
            which = integer(self.which, "Occurrence: which", expected="a number or 'all'")
            object.__setattr__(self, "which", which)


Span = str | re.Pattern[str] | Occurrence | tuple[int, int] | range
Spans = Mapping[Span, float]


@dataclass(frozen=True)
class SteeredSpan:
    """A part of the prompt and what its tokens' attention is scaled by."""

    unit: Unit
    factor: float


@dataclass(frozen=True)
class TokenizedText:
    """A text, and the characters [start, end) of each of its tokens."""

    text: str
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]


def resolve(spans: Spans, prompt: TokenizedText | int) -> tuple[SteeredSpan, ...]:
    """Every span with its tokens, in the order given.

    Args:
        spans: what to steer: a text or a regular expression that occurs once, an `Occurrence`, characters
            (start, end), or a range of token positions; and the factor of each, finite and >= 0.
        prompt: the prompt; where no text is known, the number of its tokens.

    Raises:
        InputError: a span is not in the prompt, occurs more than once, or holds no token; a factor does not fit;
            two spans share a token, but not the factor.

    Example:
        >>> prompt = TokenizedText("a cat", (5, 6), ((0, 1), (1, 5)))
        >>> resolve({"cat": 0.0}, prompt)
        (SteeredSpan(unit=Unit(text='cat', start=2, end=5, token_indices=(1,), source='prompt'), factor=0.0),)
    """
    if not isinstance(spans, Mapping):
        raise InputError(f"spans must be a mapping {{span: factor}}, got {type(spans).__name__}")
    found: list[SteeredSpan] = []
    named: dict[int, tuple[Span, float]] = {}  # by token
    for span, given in spans.items():
        factor = _checked_factor(span, given)
        for unit in _units(span, prompt):
            for token in unit.token_indices:
                other, before = named.setdefault(token, (span, factor))
                if before != factor:
                    raise InputError(
                        f"spans: {_shown(other)} and {_shown(span)} share token {token}, but their factors are "
                        f"{before:g} and {factor:g}"
                    )
            found.append(SteeredSpan(unit, factor))
    return tuple(found)


def _checked_factor(span: Span, factor: Any) -> float:
    name = f"spans: the factor of {_shown(span)}"
    return checked_factor(factor, name, "finite and >= 0")


def _units(span: Span, prompt: TokenizedText | int) -> Iterator[Unit]:
    if isinstance(span, range):
        yield _of_tokens(span, prompt)
        return
    if isinstance(prompt, int):
        raise InputError(f"spans: {_shown(span)} cannot be found in inputs without a text; name a range of tokens")
    for start, end in (
        [_checked_characters(span, prompt)] if isinstance(span, tuple) else occurrences(span, prompt.text)
    ):
        try:
            yield from split_units(prompt.text, prompt.offsets, [(start, end)])
        except InputError:
            raise InputError(f"spans: {_shown(span)} holds no token") from None


def occurrences(span: str | re.Pattern[str] | Occurrence, text: str) -> Iterator[tuple[int, int]]:
    """Where in the text a span is, (start, end) in characters.

    Raises:
        InputError: nowhere, or more often than it says.
    """
    which: int | str | None = None
    wanted: Any = span
    if isinstance(span, Occurrence):
        wanted, which = span.of, span.which
    if not isinstance(wanted, str | re.Pattern) or isinstance(getattr(wanted, "pattern", ""), bytes):
        expected = "a text, a compiled regular expression of one, an Occurrence, (start, end), or a range of tokens"
        raise InputError(f"spans: got {span!r}, expected {expected}")
    if isinstance(wanted, str):
        text_or_empty(wanted, "spans")
    pattern = re.compile(re.escape(wanted)) if isinstance(wanted, str) else wanted
    found = [match.span() for match in pattern.finditer(text) if match.end() > match.start()]
    if not found:
        raise InputError(f"spans: {_shown(wanted)} does not occur in the prompt")
    if which == "all":
        yield from found
    elif which is None:
        if len(found) > 1:
            places = ", ".join(str(start) for start, _ in found[:8]) + (", …" if len(found) > 8 else "")
            raise InputError(
                f"spans: {_shown(wanted)} occurs {len(found)} times (at characters {places}); say which with "
                f"Occurrence({_shown(wanted)}, 0), or every one with 'all' (command line: --occurrence 0|all)"
            )
        yield found[0]
    elif not -len(found) <= int(which) < len(found):
        raise InputError(f"spans: {_shown(wanted)} has no occurrence {which}; it occurs {len(found)} times, from 0")
    else:
        yield found[int(which)]


def _checked_characters(span: tuple[Any, ...], prompt: TokenizedText) -> tuple[int, int]:
    try:
        start, end = (integer(x, "spans") for x in span)
    except ValueError:
        start = end = -1
    if not 0 <= start < end <= len(prompt.text):
        limits = f"(start, end) with 0 <= start < end <= {len(prompt.text)}"
        raise InputError(f"spans: got {span!r}, expected {limits}")
    return start, end


def _of_tokens(span: range, prompt: TokenizedText | int) -> Unit:
    count = prompt if isinstance(prompt, int) else len(prompt.ids)
    if not span or min(span[0], span[-1]) < 0 or max(span[0], span[-1]) >= count:  # not through what may be endless
        raise InputError(f"spans: got {span!r}, expected token positions in [0, {count}), at least one")
    tokens = tuple(sorted(span))
    if isinstance(prompt, int):
        return Unit("", 0, 0, tokens)
    covered = [prompt.offsets[token] for token in tokens if prompt.offsets[token][0] < prompt.offsets[token][1]]
    if not covered:
        return Unit("", 0, 0, tokens)
    start, end = min(start for start, _ in covered), max(end for _, end in covered)
    return Unit(prompt.text[start:end], start, end, tokens)


def _shown(span: Any) -> str:
    return f"/{span.pattern}/" if isinstance(span, re.Pattern) else repr(span)


def spans_by_prompt(spans: Spans | Sequence[Spans], prompts: int) -> Sequence[Spans]:
    """One mapping for each prompt; a single one serves all.

    Raises:
        InputError: there are not as many as prompts.
    """
    if isinstance(spans, Mapping):
        return [spans] * prompts
    expected = f"one mapping {{span: factor}}, or one for each of {prompts} prompts"
    try:
        listed = entries(spans, "spans", "mappings")
    except InputError:
        raise InputError(f"spans must be {expected}, got {described(spans)}") from None
    if len(listed) != prompts:
        raise InputError(f"spans must be {expected}, got {len(listed)}")
    return listed
