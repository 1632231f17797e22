"""Short, safe texts for units and numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import TYPE_CHECKING

from atman_kernels.result.characters import BLANK, isolated, name, pieces, printable, supported

if TYPE_CHECKING:  # labels are for the command line, too, which starts without torch
    from atman_kernels.planning.units import Unit
    from atman_kernels.result.data import ExplanationData


def label(text: str, limit: int = 40) -> str:
    """A unit's text on one line of at most `limit` characters.

    Control characters are shown, not obeyed. Blanks are shown where there is nothing else, and at either end if they
    are no spaces; a mark without its letter stands on a circle.
    """
    text = text.strip(" ") or " " * len(text)
    inner = text.strip(_BLANKS)
    start = text.index(inner) if inner else len(text)
    shown = [
        *_visible(text[:start], everything=not inner),
        *(_LINE.get(piece, piece) for piece in pieces(inner)),
        *_visible(text[start + len(inner) :]),
    ] or ["∅"]
    shown[0] = supported(shown[0])
    if sum(map(len, shown)) <= limit:
        return "".join(shown)
    head, tail = _fitting(shown, limit // 2), _fitting(shown[::-1], (limit - 1) // 2)[::-1]
    return f"{''.join(head).rstrip()}…{''.join(tail).lstrip()}"


def unit_label(unit: Unit, limit: int = 40) -> str:
    """What a unit is called: its name, where it has one, or its text; as `label`."""
    return label(unit.text if unit.name is None else unit.name, limit)


_BLANKS = "".join(filter(str.isspace, map(chr, range(0x3001)))) + BLANK
_LINE = {"\n": "↵", "\t": "⇥"}


def _visible(blanks: str, everything: bool = False) -> list[str]:
    space = "␣" if everything else " "
    return [space if blank == " " else _LINE.get(blank) or name(blank) for blank in blanks]


def _fitting(shown: list[str], limit: int) -> list[str]:
    """As many of the first pieces as have no more than `limit` characters together."""
    lengths = accumulate(map(len, shown))
    return [piece for piece, length in zip(shown, lengths, strict=True) if length <= limit]


def signed(value: float) -> str:
    """A score for a reader: its sign and two decimals, or one significant digit where that would be 0.00."""
    digits = f"{abs(value):.2f}" if abs(value) >= 0.005 or value == 0 else f"{abs(value):.1g}"
    return digits if value == 0 else ("+" if value > 0 else "−") + digits


def likelihood(explanation: ExplanationData) -> tuple[str, str]:
    """How likely the model finds the answer, as a logarithm and in another way; for a contrast, its log odds."""
    logprob = float(explanation.base_logprobs.double().sum())
    if not explanation.has_probabilities:
        return f"{printable(explanation.value)} {signed(logprob)}", "with nothing suppressed"
    if explanation.versus is None:
        return f"log p {signed(logprob)}", percent(logprob)
    both = explanation.logprobs
    if both is None:
        return f"log odds {signed(logprob)}", "with nothing suppressed"
    return f"log odds {signed(logprob)}", f"log p {signed(both.target)} and {signed(both.versus)}"


def token_label(explanation: ExplanationData, token: int, isolated: Callable[[str], str] = isolated) -> str:
    """The label of a target token; that of a contrast names both answers, each `isolated`."""
    if explanation.versus is None:
        return isolated(label(explanation.target_tokens[token], 24))
    return " rather than ".join(isolated(label(answer, 24)) for answer in (explanation.target, explanation.versus))


def measure_of(explanation: ExplanationData) -> str:
    """What a score is, with the effect that it measures where that is not the total one."""
    effect = explanation.effect
    if effect == "total":
        return explanation.measure
    through = "direct effect" if effect == "direct" else f"effect through the {effect} prompt tokens"
    return f"{explanation.measure} ({through})"


def about(explanation: ExplanationData, unit: int) -> str:
    """What stands before a score that is the estimate of a search, and nothing before an exact one."""
    return "" if explanation.is_exact(unit) else "≈"


def give_or_take(error: float | None) -> str:
    """An estimate\'s standard error, to stand behind the score; "" for an exact score."""
    return "" if error is None else f" ±{signed(abs(error)).lstrip('+')}"


def percent(logprob: float) -> str:
    """The probability behind a natural logarithm, for a reader; a very small one as a power of ten."""
    power = round(logprob / math.log(10))
    if power < -3:
        return "10" + f"{power}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{100 * math.exp(min(logprob, 0.0)):.2g} %".replace("1e+02", "100")
