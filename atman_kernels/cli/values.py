"""Kinds of values that options take."""

import math
import re
from typing import Any

import click

SEED = click.IntRange(0, 2**63 - 1)  # what torch's generators take
MOST_LAYERS = 10_000  # of any model, so that a slip of the finger is not counted through

# Those of atman_kernels.planning.units, which takes torch to import; a test compares them.
UNITS = ("token", "word", "sentence", "paragraph")

LEAST_TEMPERATURE = 1e-3
LARGEST_FACTOR = 1e30  # so that its products with scores stay within float32


class Number(click.FloatRange):
    """A range of finite floats."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """click's, without NaN and infinity."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class Temperature(Number):
    """0, or large enough that logits can be divided by it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """click's, without what is between 0 and `LEAST_TEMPERATURE`."""
        number = super().convert(value, param, ctx)
        if 0 < number < LEAST_TEMPERATURE:
            self.fail(f"{value!r} is neither 0 nor at least {LEAST_TEMPERATURE:g}.", param, ctx)
        return number


def layer_numbers(_ctx: click.Context, _option: click.Parameter, text: str | None) -> list[int] | None:
    """ "0-5,8" as [0, 1, 2, 3, 4, 5, 8]."""
    if text is None:
        return None
    layers: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*([0-9]+)(?:-([0-9]+))?\s*", part)
        if found is None:
            raise click.BadParameter(f"expected layer numbers like 0-5,8, got {text!r}")
        first, last = found[1].lstrip("0") or "0", (found[2] or found[1]).lstrip("0") or "0"
        if max(len(first), len(last)) > len(str(MOST_LAYERS)) or int(last) >= MOST_LAYERS:
            raise click.BadParameter(f"no model has a layer {max(first, last, key=lambda n: (len(n), n)):.20}")
        if int(first) > int(last):
            raise click.BadParameter(f"expected the lower number of a range first, got {part.strip()!r}")
        layers |= set(range(int(first), int(last) + 1))
    return sorted(layers)


def units(_ctx: click.Context, _option: click.Parameter, text: str) -> str | list[str]:
    """ "word", or "paragraph,sentence,word" as a list."""
    levels = [part.strip() for part in text.split(",")]
    for level in levels:
        if level not in UNITS:
            raise click.BadParameter(f"{level!r} is not one of {', '.join(UNITS)}, or several from coarse to fine.")
    return levels if len(levels) > 1 else levels[0]


def spans(_ctx: click.Context, _option: click.Parameter, texts: tuple[str, ...]) -> list[tuple[Any, ...]]:
    """ "0-120=Doc A" as (0, 120, "Doc A"), "0-120" as (0, 120)."""
    found: list[tuple[Any, ...]] = []
    for text in texts:
        parts = re.fullmatch(r"\s*([0-9]{1,18})-([0-9]{1,18})(?:=(.+))?", text, re.DOTALL)
        if parts is None:
            raise click.BadParameter(f"expected characters as in 0-120 or 0-120=Name, got {text!r}")
        found.append((int(parts[1]), int(parts[2]), *([parts[3]] if parts[3] else [])))
    return found


def which(_ctx: click.Context, _option: click.Parameter, text: str | None) -> int | str | None:
    """ "all" or a number."""
    if text is None or text == "all":
        return text
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise click.BadParameter(f"expected a number, from 0, or all, got {text!r}")
    return int(text)
