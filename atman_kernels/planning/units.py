"""Units: the pieces of a prompt that get a score, how a text is cut into them, and the tokens each of them owns."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from typing import Any

from atman_kernels import arguments
from atman_kernels.arguments import entries, integer, shown, text_or_empty
from atman_kernels.errors import InputError

GRANULARITIES = ("token", "word", "sentence", "paragraph")
_CHOICES = f"one of {', '.join(GRANULARITIES)}, or a list of (start, end) or (start, end, name) spans"
_SPAN = "a span of two integers and perhaps a name: (start, end) or (start, end, name)"

Span = tuple[int, int]  # character offsets, end exclusive
SpanChoice = Span | tuple[int, int, str]  # the same, with a name


@dataclass(frozen=True)
class Unit:
    """A piece of text or of an image that is suppressed as one and gets one score per target token.

    Attributes:
        text: what to show.
        start, end: character offsets into the prompt (into the target where source is "target"), end exclusive.
        token_indices: absolute positions in the sequence prompt + target.
        source: "prompt" | "target" | "image".
        box: left, top, right, bottom in pixels of the image; None for text, and for image tokens that are no place
            of it.
        image: which of the prompt's images.
        name: what its reader calls it, such as the title of a document; None: its text says it.
        parent: of nested units, the index of the unit that it lies in, among the units of its explanation; None for
            those of the coarsest level.

    Example:
        >>> Unit(" sky", start=3, end=7, token_indices=(1,))
        Unit(text=' sky', start=3, end=7, token_indices=(1,), source='prompt')
    """

    text: str
    start: int
    end: int
    token_indices: tuple[int, ...]
    source: str = "prompt"
    box: tuple[int, int, int, int] | None = field(default=None, repr=False)
    image: int = field(default=0, repr=False)
    name: str | None = field(default=None, repr=False)
    parent: int | None = field(default=None, repr=False)


def split_units(
    text: str,
    offsets: Iterable[Sequence[int]],
    units: str | Sequence[SpanChoice] | None = "token",
    *,
    special: Iterable[Any] | None = None,
    token_texts: Sequence[str] | None = None,
    language: str = "en",
) -> tuple[Unit, ...]:
    """Cut a tokenized text into units.

    Named granularities put every token into exactly one unit, in reading order:

    - special tokens are units of their own, and the text on either side of one is split separately;
    - any other token belongs to the piece of text that holds its first character that is no white space;
    - tokens of white space alone join the unit before them, else the one after, else stand alone.

    A word keeps its inner apostrophes, hyphens and decimal points; punctuation marks and emoji stand alone,
    as does each character of a script written without spaces (Chinese, hiragana, Thai, ...). Blank lines
    separate paragraphs; sentences, found by `sentencex`, never cross them. The role line that chat templates
    write after a special token ("user") is no part of the sentence or paragraph that follows it.

    Custom spans may overlap and may leave tokens out. A span, without the white space around it, owns every
    token that shares a character with it.

    Args:
        text: the text that was tokenized, n_characters long.
        offsets: (n_tokens, 2) characters [start, end) of every token; start == end for a token without any.
        units: "token", "word", "sentence", "paragraph", or a list of character spans: (start, end), or
            (start, end, name).
        special: (n_tokens,) true for special tokens. None: tokens without characters are the special ones.
        token_texts: (n_tokens,) what to show for tokens without characters, such as "<s>".
        language: code of the language whose abbreviations the sentence splitter knows; codes it has no rules
            for are split by its general ones.

    Returns:
        The units. Their offsets leave out surrounding white space unless there is nothing else; token units
        keep it. A unit without characters sits at the end of the text before it.

    Raises:
        InputError: empty text, no tokens, offsets or spans that do not fit the text, lengths that differ, an
            unknown granularity, a span that holds no token.

    >>> offsets = [(0, 3), (3, 7), (7, 8), (8, 11), (11, 12)]
    >>> [unit.text for unit in split_units("Why not? Go!", offsets, "sentence")]
    ['Why not?', 'Go!']
    >>> split_units("Why not? Go!", offsets, [(0, 5)])
    (Unit(text='Why n', start=0, end=5, token_indices=(0, 1), source='prompt'),)
    """
    spans = _checked_offsets(text, offsets)
    is_special = _checked_special(special, spans)
    if token_texts is not None and len(token_texts) != len(spans):
        raise InputError(f"token_texts: got {len(token_texts)} texts, expected one per token ({len(spans)})")
    check_language(language)
    chosen = checked_choice(units)
    if not isinstance(chosen, str):
        return _custom_units(text, spans, chosen)
    if chosen == "token":
        return tuple(_unit(text, spans, [token], token_texts, trim=False) for token in range(len(spans)))
    groups = _group_tokens(text, spans, is_special, chosen, language)
    return tuple(_unit(text, spans, group, token_texts, trim=not is_special[group[0]]) for group in groups)


def target_units(
    text: str,
    offsets: Iterable[Sequence[int]],
    first_position: int,
    *,
    token_texts: Sequence[str] | None = None,
) -> tuple[Unit, ...]:
    """Token units of a target, for explaining later target tokens by earlier ones.

    The last target token gets no unit: nothing comes after it that it could have influenced.

    Args:
        text: the target text.
        offsets: (n_target_tokens, 2) characters of every target token, as in `split_units`.
        first_position: position of the first target token in the sequence prompt + target.
        token_texts: (n_target_tokens,) what to show for tokens without characters.

    Returns:
        n_target_tokens - 1 units with source "target": offsets into the target, absolute token positions.

    Raises:
        InputError: as `split_units`, and for a first_position that is no position.

    >>> target_units(" Paris.", [(0, 6), (6, 7)], 12)
    (Unit(text=' Paris', start=0, end=6, token_indices=(12,), source='target'),)
    """
    first_position = integer(first_position, "first_position", least=0)
    tokens = split_units(text, offsets, "token", token_texts=token_texts)
    return tuple(
        Unit(unit.text, unit.start, unit.end, (first_position + index,), source="target")
        for index, unit in enumerate(tokens[:-1])
    )


# Checks --------------------------------------------------------------------------------------------------


def checked_choice(units: Any) -> str | list[SpanChoice]:
    """Units as they were chosen, before there is a text: a granularity, or spans of plain integers, named or not.

    Raises:
        InputError: an unknown granularity, no list of spans, or an empty one.
    """
    if isinstance(units, str):
        if units not in GRANULARITIES:
            raise InputError(f"units: got {units!r}, expected {_CHOICES}")
        return units
    try:
        listed = entries(units, "units", "(start, end) spans")
    except InputError:
        raise InputError(f"units: got {shown(units)}, expected {_CHOICES}") from None
    if any(isinstance(entry, str) for entry in listed):
        raise InputError(
            f"units: got {shown(units)}, expected {_CHOICES}; "
            "several levels are for Explainer.explain and causal language models"
        )
    if not listed:
        raise InputError("units: got an empty list, expected at least one (start, end) span")
    return [_checked_span(f"units[{index}]", span) for index, span in enumerate(listed)]


def _checked_span(name: str, span: Any) -> SpanChoice:
    if not isinstance(span, tuple | list) or len(span) != 3:
        return _checked_pair(name, span, _SPAN)
    start, end = _checked_pair(name, span[:2], _SPAN)
    return start, end, arguments.text(span[2], f"{name}[2], its name,", blank=False)


def check_language(language: Any) -> None:
    """Raises InputError if it is no code of a language."""
    if not isinstance(language, str):
        raise InputError(f"language: got {language!r}, expected a language code such as 'en'")
    text_or_empty(language, "language")


def _checked_offsets(text: str, offsets: Iterable[Sequence[int]]) -> list[Span]:
    """Offsets as plain integers; tokens without characters are moved to the end of the text before them."""
    if not isinstance(text, str) or not text:
        raise InputError(f"text: got {text!r}, expected a text with at least one character")
    spans = []
    reached = 0  # tokenizers report (0, 0) for tokens without characters, wherever they stand
    for index, pair in enumerate(offsets):
        start, end = _checked_pair(f"offsets[{index}]", pair)
        if not 0 <= start <= end <= len(text):
            limits = f"0 <= start <= end <= {len(text)}"
            raise InputError(f"offsets[{index}]: got ({start}, {end}), expected {limits}")
        reached = max(reached, end)
        spans.append((start, end) if start < end else (reached, reached))
    if not spans:
        raise InputError("offsets: got no tokens, expected at least one")
    return spans


def _checked_pair(name: str, pair: Any, expected: str = "a pair of integers (start, end)") -> Span:
    try:
        start, end = entries(pair, name, "two integers")
        return integer(start, name), integer(end, name)
    except ValueError:
        raise InputError(f"{name}: got {shown(pair)}, expected {expected}") from None


def _checked_special(special: Iterable[Any] | None, spans: Sequence[Span]) -> list[bool]:
    if special is None:
        return [start == end for start, end in spans]
    flags = [bool(flag) for flag in special]
    if len(flags) != len(spans):
        raise InputError(f"special: got {len(flags)} flags, expected one per token ({len(spans)})")
    return flags


# From pieces of text to tokens ---------------------------------------------------------------------------


def _group_tokens(
    text: str, spans: Sequence[Span], special: Sequence[bool], granularity: str, language: str
) -> list[list[int]]:
    """Token indices of every unit, in reading order."""
    groups: list[list[int]] = []
    for is_special, run in groupby(range(len(spans)), key=special.__getitem__):
        tokens = list(run)
        if is_special:
            groups += [[token] for token in tokens]
            continue
        start = min(spans[token][0] for token in tokens)
        end = max(spans[token][1] for token in tokens)
        starts = [start + at for at in _piece_starts(text[start:end], granularity, language)]
        marker = spans[tokens[0] - 1] if tokens[0] > 0 else (0, 0)  # the special token before
        role = _ROLE_LINE.match(text, start, end) if marker[0] < marker[1] else None
        if role and granularity != "word":
            starts = sorted({*starts, role.end()})
        groups += _group_run(text, spans, tokens, starts)
    return groups


def _group_run(text: str, spans: Sequence[Span], tokens: Iterable[int], starts: Sequence[int]) -> list[list[int]]:
    """Tokens between two special tokens, grouped by the piece that holds their first visible character."""
    groups: dict[int, list[int]] = {}
    current: list[int] = []  # before the first piece: white space that waits for it
    leading = current
    for token in tokens:
        start, end = spans[token]
        covered = text[start:end]
        visible = covered.lstrip()
        if visible:
            piece = bisect_right(starts, end - len(visible))
            current = groups.setdefault(piece, [])
        current.append(token)
    if not groups:
        return [leading]
    next(iter(groups.values()))[:0] = leading
    return list(groups.values())


def _unit(
    text: str, spans: Sequence[Span], tokens: Sequence[int], token_texts: Sequence[str] | None, trim: bool
) -> Unit:
    covered = [spans[token] for token in tokens if spans[token][0] < spans[token][1]]
    if not covered:
        shown = "".join(token_texts[token] for token in tokens) if token_texts is not None else ""
        return Unit(shown, *spans[tokens[0]], tuple(tokens))
    start, end = min(start for start, _ in covered), max(end for _, end in covered)
    if trim:
        start, end = _trimmed(text, start, end)
    return Unit(text[start:end], start, end, tuple(tokens))


def _custom_units(text: str, spans: Sequence[Span], chosen: list[SpanChoice]) -> tuple[Unit, ...]:
    tokens_at: list[list[int]] = [[] for _ in text]
    for token, (start, end) in enumerate(spans):
        for at in range(start, end):
            tokens_at[at].append(token)
    found = []
    for index, (start, end, *named) in enumerate(chosen):
        if not 0 <= start < end <= len(text):
            limits = f"0 <= start < end <= {len(text)}"
            raise InputError(f"units[{index}]: got ({start}, {end}), expected {limits}")
        # White space at the rim is the neighbours' as much as the span's: " cat" is one token after "the ".
        start, end = _trimmed(text, start, end)
        tokens = sorted({token for at in range(start, end) for token in tokens_at[at]})
        if not tokens:
            came = f"({start}, {end}), {text[start:end]!r}"
            raise InputError(f"units[{index}]: got {came}, expected a span that holds at least one token")
        found.append(Unit(text[start:end], start, end, tuple(tokens), name=named[0] if named else None))
    return tuple(found)


def _trimmed(text: str, start: int, end: int) -> Span:
    """The span without surrounding white space, unless it is nothing else."""
    visible = text[start:end].strip()
    if not visible:
        return start, end
    start = text.index(visible, start)
    return start, start + len(visible)


# Pieces of text ------------------------------------------------------------------------------------------

_LINE_BREAK = r"(?>\r\n|[\n\r\x85\u2028])"  # atomic: "\r\n" is never two breaks
_BLANK_LINES = re.compile(rf"{_LINE_BREAK}[^\S\r\n]*{_LINE_BREAK}|\u2029")
_ROLE_LINE = re.compile(r"\w+[^\S\n]*\n")  # one word alone on its line


def _piece_starts(text: str, granularity: str, language: str) -> list[int]:
    """Where the pieces of a text begin; white space belongs to the piece before it."""
    if granularity == "word":
        return [match.start() for match in _word_pattern().finditer(text)]
    paragraphs = [0, *(match.end() for match in _BLANK_LINES.finditer(text))]
    if granularity == "paragraph":
        return paragraphs
    return [
        start + at
        for start, end in zip(paragraphs, [*paragraphs[1:], len(text)], strict=True)
        for at in _sentence_starts(text[start:end], language)
    ]


def _sentence_starts(text: str, language: str) -> list[int]:
    from sentencex import get_sentence_boundaries  # type: ignore[import-untyped, unused-ignore]

    # The splitter may abort on white space of several bytes (it cuts strings at bytes), and half a surrogate
    # pair cannot be handed to it at all. Replaced one for one, so that offsets hold.
    plain = re.sub(r"[^\S\n ]|[\ud800-\udfff]", " ", text)
    return [boundary["start_index"] for boundary in get_sentence_boundaries(language, plain)]


@cache
def _word_pattern() -> Any:
    """A word, or else one character as readers see it (with its accents, modifiers and joiners)."""
    import regex  # type: ignore[import-untyped, unused-ignore]

    unspaced = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
    letter = rf"[\p{{L}}--[{unspaced}]]"
    inner = rf"[[\p{{L}}\p{{N}}\p{{M}}_\u00ad\u200c\u200d]--[{unspaced}]]"  # soft hyphen, (non-)joiners
    letters = rf"[[\p{{L}}\p{{N}}_]--[{unspaced}]]{inner}*+"
    return regex.compile(
        rf"""
        (?:{letter}\.){{2,}}                             # U.S., e.g.
        | [\p{{Katakana}}ー]+                            # コーヒー: these runs are words
        | {letters} (?: (?: ['’\-‐‑·]                    # don't, well-known
                          | (?<=\p{{N}})[.,](?=\p{{N}})  # 3.14, 1,000
                        ) {letters} )*
        | (?!\s)\X
        """,
        regex.VERBOSE | regex.VERSION1,
    )
