"""Explanations in a terminal: a heatmap where there are colours, numbered brackets where there are none."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.cells import cell_len, set_cell_size
from rich.color import Color
from rich.color_triplet import ColorTriplet
from rich.console import Console, RenderableType
from rich.style import Style
from rich.text import Text

from atman_kernels.result import NEGATIVE, POSITIVE
from atman_kernels.result.characters import isolated, printable, supported
from atman_kernels.result.data import ExplanationData
from atman_kernels.result.labels import (
    about,
    give_or_take,
    label,
    likelihood,
    measure_of,
    signed,
    token_label,
    unit_label,
)
from atman_kernels.result.segments import Segment, in_tree_order, nested_segments, outlined, strongest

BAR_WIDTH = 24  # characters
FAINTEST = 0.06  # share of the largest score below which a unit stays uncoloured


def print_explanation(explanation: ExplanationData, console: Console | None = None, top: int = 8) -> None:
    """Prints the answer with its log-probabilities, the text as a heatmap, and the strongest units.

    Without colours (piped output, NO_COLOR, fewer than 256 colours) the strongest units stand in brackets,
    with their number in the list.

    Args:
        explanation: what to print.
        console: where to; standard output by default.
        top: how many units that speak for the answer to list, and at most half as many that speak against it.
    """
    console = console or Console()
    for part in renderables(explanation, console, top):
        console.print(part)


def renderables(explanation: ExplanationData, console: Console, top: int = 8) -> Iterator[RenderableType]:
    """The parts that `print_explanation` prints, for a rich layout of one's own."""
    printout = _Printout(explanation, console, top)
    yield printout.answer()
    yield printout.heading("Prompt")
    yield printout.text("prompt", explanation.prompt)
    if any(unit.source == "target" for unit in explanation.units):
        yield printout.heading("Answer as input")
        yield printout.text("target", explanation.target)
    which = "Strongest units of each level" if explanation.levels else "Strongest units"
    yield printout.heading(printout.safe(f"{which}: {measure_of(explanation)}"))
    yield printout.ranking()


class _Printout:
    """What the parts of one printout share: scores, scale, ranks, and what the console can show."""

    def __init__(self, explanation: ExplanationData, console: Console, top: int) -> None:
        self.explanation = explanation
        self.total: list[float] = explanation.total.tolist()
        errors = explanation.standard_errors
        self.errors: list[float | None] = [None] * len(self.total) if errors is None else errors.tolist()
        self.scales = explanation.scales
        speaks_for, speaks_against = outlined(self.total, explanation.units, explanation.depths, top)
        self.listed = speaks_for + speaks_against
        if explanation.levels:
            self.listed = in_tree_order({*self.listed}, self.total, explanation.units)
        self.ascii = console.options.ascii_only
        self.colour = console.color_system in ("256", "truecolor") and not console.no_color
        self.dark = _dark_background()

    def safe(self, text: str) -> str:
        """Text that this console can show and does not obey."""
        text = printable(text)
        return text.encode("ascii", "backslashreplace").decode() if self.ascii else text

    def alone(self, text: str) -> str:
        """A label that keeps its neighbours in their places, whichever way it is written."""
        return isolated(self.safe(text))

    def number(self, value: float) -> str:
        """A score, signed."""
        return self.safe(signed(value).replace("−", "-") if self.ascii else signed(value))

    def uncertain(self, unit: int) -> str:
        """A unit's total, with its standard error if it has one."""
        sign = "+-" if self.ascii else "±"
        sure = about(self.explanation, unit)
        return (
            (sure.replace("≈", "~") if self.ascii else sure)
            + self.number(self.total[unit])
            + give_or_take(self.errors[unit]).replace("±", sign)
        )

    def heading(self, text: str) -> Text:
        """A title above a part."""
        return Text("\n" + text, style="bold")

    def answer(self) -> Text:
        """The answer's tokens with the natural log of each one's probability."""
        logprobs: list[float] = self.explanation.base_logprobs.tolist()
        whole = ", ".join(
            self.safe(part.replace("−", "-") if self.ascii else part) for part in likelihood(self.explanation)
        )
        line = Text.assemble(("Answer", "bold"), (f"  {whole}", "dim"), "\n")
        for token, logprob in enumerate(logprobs):
            line.append(token_label(self.explanation, token, self.alone), "bold")
            line.append(f" {self.number(logprob)}   ", "dim")
        line.rstrip()
        return line

    def text(self, source: str, text: str) -> RenderableType:
        """The text painted, or with the listed units in brackets."""
        pieces = nested_segments(text, self.explanation.units, self.explanation.children, source)
        return self.painted(pieces) if self.colour else self.bracketed(pieces)

    def painted(self, pieces: Sequence[Segment]) -> Text:
        """Every piece on the colour of its strongest unit; of what is cut, those of the units inside, underlined."""
        painted = Text(overflow="fold")
        named: set[int] = set()
        for piece in pieces:
            unit = strongest(piece.units, self.total)
            painted.append(self.titles(piece, named), "bold")
            if piece.inside:
                inside = self.painted(piece.inside)
                inside.stylize("underline")
                painted.append_text(inside)
                continue
            shown = piece.text or self.chip(piece)
            if piece.text.isspace() and "\n" in piece.text and unit is not None:
                shown = piece.text.replace("\n", "↵\n")
            painted.append(self.safe(shown), self.style(unit))
        return painted

    def titles(self, piece: Segment, named: set[int]) -> str:
        """What named units that begin here are called, with their scores."""
        begun = [i for i in piece.units if self.explanation.units[i].name is not None and i not in named]
        named.update(begun)
        return "".join(
            f"{self.alone(unit_label(self.explanation.units[i]))} {self.uncertain(i)} {self.safe('▸')} " for i in begun
        ).replace("\\u25b8", ">")

    def bracketed(self, pieces: Sequence[Segment]) -> Text:
        """Listed units as [rank:text]; of units that overlap, the strongest gets the brackets."""
        bracketed = Text(overflow="fold")
        named: set[int] = set()
        for unit, group in groupby(pieces, key=lambda piece: strongest(piece.units, self.total)):
            members = list(group)
            bracketed.append(self.titles(members[0], named))
            if members[0].inside:
                inside = self.bracketed(members[0].inside)
                rank = f"{self.listed.index(unit) + 1}:" if unit in self.listed else ""
                bracketed.append_text(Text.assemble(f"[{rank}", inside, "]") if rank else inside)
                continue
            text = "".join(piece.text for piece in members) or self.chip(members[0])
            if unit in self.listed:
                inner = supported(text.strip()) or label(text)
                before, after = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
                if text.isspace():
                    before, after = "", "\n" * text.count("\n")
                text = f"[{self.listed.index(unit) + 1}:{self.alone(inner)}]"
                bracketed.append(f"{self.safe(before)}{text}{self.safe(after)}")
            else:
                bracketed.append(self.safe(text))
        return bracketed

    def chip(self, piece: Segment) -> str:
        """What stands for a unit without characters."""
        return f"<{label(self.explanation.units[piece.units[0]].text, 24).strip('<>')}>"

    def style(self, unit: int | None) -> Style:
        """Background for a unit, with a text colour that is readable on it whatever the terminal's own."""
        strength = 0.0 if unit is None else self.share(unit)
        if abs(strength) < FAINTEST:
            return Style.null()
        hue = ColorTriplet(*bytes.fromhex((POSITIVE if strength > 0 else NEGATIVE)[1:]))
        ground, ink = ((24, 24, 24), "#ffffff") if self.dark else ((255, 255, 255), "#000000")
        # In the dark the full hue would be too bright for white text.
        full = tuple(round(0.72 * part) for part in hue) if self.dark else hue
        mixed = (round(g + abs(strength) * (h - g)) for g, h in zip(ground, full, strict=True))
        return Style(color=ink, bgcolor=Color.from_triplet(ColorTriplet(*mixed)))

    def share(self, unit: int) -> float:
        """A unit's total as a part of the largest of its level."""
        return self.total[unit] / self.scales[self.explanation.depths[unit]]

    def ranking(self) -> Text:
        """The strongest units, one a line: rank, text, score, bar; nested ones below what they lie in."""
        indents = ["  " * self.explanation.depths[unit] for unit in self.listed]
        labels = [
            indent + self.alone(unit_label(self.explanation.units[unit], 40 - len(indent)))
            for unit, indent in zip(self.listed, indents, strict=True)
        ]
        width = max(map(cell_len, labels), default=0)
        numbers = [self.uncertain(unit) for unit in self.listed]
        digits = max([7, *map(len, numbers)])
        lines = Text(no_wrap=True, overflow="ellipsis")
        for rank, (unit, shown, number) in enumerate(zip(self.listed, labels, numbers, strict=True), 1):
            score = self.total[unit]
            lines.append(f"{rank:3}  ", "dim")
            lines.append(f"{set_cell_size(shown, width)}  {number:>{digits}}  ")
            hue = POSITIVE if score > 0 else NEGATIVE
            lines.append(self.bar(self.share(unit)) + "\n", hue if self.colour else None)
        lines.rstrip()
        return lines if self.listed else Text("  no unit changes it")

    def bar(self, share: float) -> str:
        """A line as long as the score is large."""
        length = max(1, round(BAR_WIDTH * abs(share)))
        if self.colour:
            return "━" * length
        return ("#-" if self.ascii else "█░")[share < 0] * length


def _dark_background() -> bool:
    """What the terminal says of its background (COLORFGBG ends in its colour's number); most are dark."""
    ground = os.environ.get("COLORFGBG", "").rpartition(";")[2]
    return ground not in ("7", "15")
