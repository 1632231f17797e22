"""Short, safe texts for units and numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from atman_kernels.explain.explanation import Explanation

# Control characters but line feed and tab, and halves of surrogate pairs: shown instead of obeyed.
_SHOWN = (
    {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
    | {0x7F: "␡"}
    | dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], "�")
)


def printable(text: str) -> str:
    """Text that a terminal or a page displays and never obeys; line feeds and tabs stay."""
    return text.translate(_SHOWN)


def label(text: str, limit: int = 40) -> str:
    """A unit's text on one line of at most `limit` characters; shows spaces where there is nothing else."""
    if not text.strip(" "):
        text = "␣" * len(text) or "∅"
    text = printable(text.strip(" ").replace("\n", "↵").replace("\t", "⇥"))
    if len(text) <= limit:
        return text
    kept = limit - 1
    return f"{text[: (kept + 1) // 2].rstrip()}…{text[len(text) - kept // 2 :].lstrip()}"


def signed(value: float) -> str:
    """A score for a reader: its sign and two decimals, or one significant digit where that would be 0.00."""
    digits = f"{abs(value):.2f}" if abs(value) >= 0.005 or value == 0 else f"{abs(value):.1g}"
    return digits if value == 0 else ("+" if value > 0 else "−") + digits


def likelihood(explanation: Explanation) -> tuple[str, str]:
    """How likely the model finds the answer, as a logarithm and in another way; for a contrast, its log odds."""
    logprob = float(explanation.base_logprobs.sum())
    if explanation.value != "log-probability":
        return f"{explanation.value} {signed(logprob)}", "with nothing suppressed"
    if explanation.versus is None:
        return f"log p {signed(logprob)}", percent(logprob)
    both = [f"{signed(value)}" for value in explanation.settings.get("logprobs", {}).values()]
    return f"log odds {signed(logprob)}", f"log p {' and '.join(both)}"


def token_label(explanation: Explanation, token: int) -> str:
    """What stands for a target token; a contrast's only one names both answers."""
    if explanation.versus is None:
        return label(explanation.target_tokens[token], 24)
    return f"{label(explanation.target, 24)} rather than {label(explanation.versus, 24)}"


def give_or_take(error: float | None) -> str:
    """What stands behind a score that is an estimate, and nothing behind an exact one."""
    return "" if error is None else f" ±{signed(abs(error)).lstrip('+')}"


def percent(logprob: float) -> str:
    """The probability behind a natural logarithm, for a reader; a very small one as a power of ten."""
    power = round(logprob / math.log(10))
    if power < -3:
        return "10" + f"{power}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{100 * math.exp(min(logprob, 0.0)):.2g} %".replace("1e+02", "100")
