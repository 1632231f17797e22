"""`Explanation`: a score per unit and target token, with its views (page, terminal, plots, overlay) and its file."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from atman_kernels.arguments import entries, integer
from atman_kernels.errors import InputError
from atman_kernels.files import write_whole
from atman_kernels.planning.units import Unit
from atman_kernels.result.data import ExplanationData, shortened
from atman_kernels.result.json_format import json_line, values_from_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image
    from rich.console import Console, ConsoleOptions, RenderableType


@dataclass(frozen=True, eq=False)
class Explanation(ExplanationData):
    """Which units of a prompt an answer rests on.

    A score is how much the loss of a target token rises, in nats, when the attention to a unit is suppressed:
    positive means that the unit speaks for the token, negative that it speaks against it. Methods other than AtMan
    have scores of their own kind, and say in `measure` which.

    Attributes:
        prompt: the exact text that was tokenized; with images what the processor made of it, one placeholder each.
        target: the text whose loss was measured.
        units: what has a score: of the text, of the answer or of images; they may overlap, and need not cover the
            prompt. Nested units follow level after level, each with its `parent`.
        scores: (n_units, n_target_tokens) float32 on the CPU, finite.
        target_tokens: the text to show for each target token.
        base_logprobs: (n_target_tokens,) float32 on the CPU: natural log of each target token's probability
            with nothing suppressed, or what `value` names instead.
        settings: how it was computed; JSON types only (a copy is kept, tuples become lists). measure, value, versus,
            logprobs and images are here, too: one that is at its default takes what stands here, any other is written
            here.
        stats: what it cost; JSON types only, likewise.
        standard_errors: (n_units,) float32 on the CPU, of each unit's total, where scores are estimates from random
            draws; None where they are exact.
        measure: what a score is, with its unit.
        value: what the model says of a target token: its "log-probability", or else a "logit" or "cosine".
        versus: the other answer, if this explains why the model prefers one to the other.
        logprobs: with versus, the natural log of either answer's probability: `logprobs.target`, `logprobs.versus`.
        sides: with versus, (n_units, 2) float32 on the CPU: each unit's total for the answer and for the other one,
            whose difference its score is.
        recompute: how many prompt tokens before the answer felt a suppression; None: all of them. See `effect`.
        exact: per unit whether its scores are exact; the others are estimates of a search. None: all are exact.
        levels: of nested units the names of the levels, coarsest first; () otherwise. See `at`, `depths`, `children`.
        images: per image of the prompt its size in pixels, to which the units' boxes refer: `images[0].width`.

    Raises:
        InputError: a field has the wrong type, shape, dtype or device or is not finite, or a unit lies
            outside its text.

    Example:
        >>> explanation = Explanation(
        ...     prompt="The sky is", target=" blue",
        ...     units=(Unit("The", 0, 3, (0,)), Unit(" sky", 3, 7, (1,)), Unit(" is", 7, 10, (2,))),
        ...     scores=torch.tensor([[0.0], [2.5], [-0.5]]), target_tokens=(" blue",),
        ...     base_logprobs=torch.tensor([-0.25]), settings={"mode": "log_additive"}, stats={})
        >>> explanation.top(1)
        [(Unit(text=' sky', start=3, end=7, token_indices=(1,), source='prompt'), 2.5)]
    """

    def top(self, k: int = 10, *, estimates: bool = False, level: int | str | None = None) -> list[tuple[Unit, float]]:
        """The k units with the highest total (all if there are fewer), highest first, ties in reading order.

        Args:
            estimates: list units whose scores are but estimates among the others, see `exact`.
            level: of nested units the level, by its name or number; None: the finest that was reached.

        Raises:
            InputError: k is not a positive integer, or there is no such level.
        """
        k = integer(k, "k", least=1, expected="a positive integer")
        wanted = self.finest if level is None else self.level_number(level)
        total = self.total
        order = torch.argsort(total, descending=True, stable=True).tolist()
        listed = [i for i in order if self.depths[i] == wanted and (estimates or self.is_exact(i))]
        return [(self.units[i], float(total[i])) for i in listed[:k]]

    def at(self, level: int | str) -> Explanation:
        """One level of nested units as an explanation by itself: of the levels below the coarsest, what was reached.

        Args:
            level: its name or its number; 0 is the coarsest, -1 the finest.

        Raises:
            InputError: there is no such level, or none of its units was reached.

        Example:
            >>> explanation.at("sentence").plot()                                     # doctest: +SKIP
        """
        number = self.level_number(level)
        if not self.levels:
            return self
        own = self.of_level(number)
        if not own:
            raise InputError(f"level {level!r} has no units: none of the level above it can be cut")
        errors = self.standard_errors
        return replace(
            self,
            units=tuple(replace(self.units[i], parent=None) for i in own),
            scores=self.scores[own],
            standard_errors=None if errors is None else errors[own],
            exact=None if self.exact is None else tuple(self.exact[i] for i in own),
            settings=self.settings | {"units": self.levels[number]},
            levels=(),
            sides=None if self.sides is None else self.sides[own],
        )

    def to_html(
        self, path: str | os.PathLike[str] | None = None, *, images: Image | Sequence[Image] | None = None
    ) -> str:
        """A complete HTML page with the heatmap, self-contained: no network, no other files.

        Args:
            path: where to write the page as well (UTF-8); the file appears whole or not at all.
            images: the PIL images that were explained, to lie below their patches; an explanation keeps no pixels.

        Raises:
            InputError: path is a folder or lies in a folder that does not exist, or the images are not those of the
                explanation.
            ImportError: images are given and pillow is not installed; the message says how to get it.
        """
        from atman_kernels.result.html import page

        text = page(self, images)
        if path is not None:
            write_whole(path, text.encode("utf-8"))
        return text

    def _repr_html_(self) -> str:  # what notebooks show
        from atman_kernels.result.html import fragment

        return fragment(self)

    def show(self, top: int = 8, console: Console | None = None) -> None:
        """Prints the heatmap and the strongest units; without colours where the terminal has none."""
        from atman_kernels.result.terminal import print_explanation

        print_explanation(self, console=console, top=integer(top, "top", least=1))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from atman_kernels.result.terminal import renderables

        yield from renderables(self, console)

    def plot(self, kind: str = "bar", **options: Any) -> Axes:
        """Draws with matplotlib: "bar" shows the strongest units, "heat" units × target tokens.

        Args:
            kind: "bar" or "heat".
            options: passed on to `atman_kernels.plots.bar` or `atman_kernels.plots.heat`: `top`, `ax`.

        Raises:
            InputError: unknown kind.
            ImportError: matplotlib is not installed; the message says how to get it.
        """
        from atman_kernels.result import plots

        kinds = {"bar": plots.bar, "heat": plots.heat}
        if kind not in kinds:
            raise InputError(f'kind must be "bar" or "heat", got {kind!r}')
        return kinds[kind](self, **options)

    def overlay(
        self,
        image: Image,
        path: str | os.PathLike[str] | None = None,
        *,
        index: int = 0,
        target_token: int | Sequence[int] | None = None,
        opacity: float = 0.7,
    ) -> Image:
        """Lays the scores of an image's units over it: orange speaks for the answer, blue against it.

        Args:
            image: the PIL image that was explained, in any resolution; an explanation keeps no pixels.
            path: where to write the result as well, as PNG; the file appears whole or not at all.
            index: which of the prompt's images it is.
            target_token: None: the whole answer; an index: that target token; several: side by side, on one scale.
            opacity: of the colour at the largest score, in (0, 1].

        Returns:
            A PIL image in the same resolution, grey below the colours; several panels have a caption above each.

        Raises:
            InputError: the image is not the explained one, no unit has a place in it, or an argument does not fit.
            ImportError: pillow is not installed; the message says how to get it.

        Example:
            >>> explanation.overlay(image, "answer.png")                              # doctest: +SKIP
            >>> explanation.overlay(image, target_token=[0, 2]).show()                # doctest: +SKIP
        """
        from atman_kernels.result.overlay import overlay

        tokens: Any = target_token
        if tokens is not None:
            tokens = entries(tokens, "target_token", "indices") if hasattr(tokens, "__iter__") else [tokens]
        drawn = overlay(self, image, index, tokens, opacity)
        if path is not None:
            buffer = io.BytesIO()
            drawn.save(buffer, "PNG")
            write_whole(path, buffer.getvalue())
        return drawn

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON that `load` reads back exactly; the file appears whole or not at all.

        Raises:
            InputError: path is a folder or lies in a folder that does not exist.
            OSError: it cannot be written.
        """
        write_whole(path, self.to_json().encode("ascii"))

    def to_json(self) -> str:
        """What `save` writes: one line of JSON in ASCII characters."""
        return json_line(self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Explanation:
        """Reads what `save` wrote.

        Raises:
            InputError: the file is not JSON, no explanation, of another version, incomplete or inconsistent.
            FileNotFoundError: there is no such file.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{os.fspath(path)} is not a JSON file: {error}") from error
        try:
            return cls(**values_from_json(content))
        except InputError as error:
            raise InputError(f"{os.fspath(path)}: {error}") from error

    def __repr__(self) -> str:
        n_units, n_tokens = self.scores.shape
        name = "log odds" if self.versus is not None else "log p" if self.has_probabilities else self.value
        likelihood = f"{name} = {float(self.base_logprobs.double().sum()):.2f}"
        strongest = ", ".join(f"{shortened(unit.text)} {score:+.2f}" for unit, score in self.top(3))
        return (
            f"Explanation({n_units} units × {n_tokens} target tokens, target={shortened(self.target)}, "
            f"{likelihood}, top: {strongest})"
        )
