"""The result of an explanation: a score per unit and target token, and all it takes to show and keep them."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from atman_kernels.arguments import entries, integer
from atman_kernels.errors import InputError
from atman_kernels.files import write_whole
from atman_kernels.planning.units import Unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image
    from rich.console import Console, ConsoleOptions, RenderableType

FORMAT = "atman-explanation"
VERSION = 1
LOG_PROBABILITY = "log-probability"
RISE = "rise of the loss when suppressed, in nats"


@dataclass(frozen=True, eq=False)
class Explanation:
    """Which units of a prompt an answer rests on.

    A score is how much the loss of a target token rises, in nats, when the attention to a unit is suppressed:
    positive means that the unit speaks for the token, negative that it speaks against it. Methods other than AtMan
    have scores of their own kind, and say in `measure` which.

    Attributes:
        prompt: the exact text that was tokenized; with images what the processor made of it, one placeholder each.
        target: the text whose loss was measured.
        units: what has a score: of the text, of the answer or of images; they may overlap, and need not cover the
            prompt.
        scores: (n_units, n_target_tokens) float32 on the CPU, finite.
        target_tokens: the text to show for each target token.
        base_logprobs: (n_target_tokens,) float32 on the CPU: natural log of each target token's probability
            with nothing suppressed.
        settings: how it was computed; JSON types only (a copy is kept, tuples become lists).
        stats: what it cost; JSON types only, likewise.
        standard_errors: (n_units,) float32 on the CPU, of each unit's total, where scores are estimates from random
            draws; None where they are exact.

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

    prompt: str
    target: str
    units: tuple[Unit, ...]
    scores: torch.Tensor
    target_tokens: tuple[str, ...]
    base_logprobs: torch.Tensor
    settings: dict[str, Any]
    stats: dict[str, Any]
    standard_errors: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "target"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"{name} must be a str, got {type(getattr(self, name)).__name__}")
        _check_units(self.units, {"prompt": self.prompt, "target": self.target, "image": self.prompt})
        _check_target_tokens(self.target_tokens)
        _check_tensor("scores", self.scores, (len(self.units), len(self.target_tokens)))
        _check_tensor("base_logprobs", self.base_logprobs, (len(self.target_tokens),))
        if self.standard_errors is not None:
            _check_tensor("standard_errors", self.standard_errors, (len(self.units),))
        for name in ("settings", "stats"):
            object.__setattr__(self, name, _json_copy(name, getattr(self, name)))
        _check_settings(self.settings)

    @property
    def measure(self) -> str:
        """What a score is, with its unit."""
        return self.settings.get("measure") or RISE

    @property
    def value(self) -> str:
        """What the model says of a target token: its "log-probability", or else a "logit" or "cosine"."""
        return self.settings.get("value") or LOG_PROBABILITY

    @property
    def measures_suppression(self) -> bool:
        """Whether scores are rises of the loss, and so ratios of probabilities."""
        return self.measure == RISE

    @property
    def versus(self) -> str | None:
        """The other answer, if this explains why the model prefers one to the other."""
        return self.settings.get("versus")

    @property
    def total(self) -> torch.Tensor:
        """(n_units,) float32: each unit's scores summed over the target tokens; finite, as they are."""
        return self.scores.sum(dim=1).nan_to_num()

    def top(self, k: int = 10) -> list[tuple[Unit, float]]:
        """The k units with the highest total (all if there are fewer), highest first, ties in reading order.

        Raises:
            InputError: k is not a positive integer.
        """
        k = integer(k, "k", least=1, expected="a positive integer")
        total = self.total
        order = torch.argsort(total, descending=True, stable=True)[:k].tolist()
        return [(self.units[i], float(total[i])) for i in order]

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

    def _repr_html_(self) -> str:
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
        """Lays the scores of an image's units over the picture: orange speaks for the answer, blue against it.

        Args:
            image: the PIL image that was explained, in any resolution; an explanation keeps no pixels.
            path: where to write the result as well, as PNG; the file appears whole or not at all.
            index: which of the prompt's images it is.
            target_token: None: the whole answer; an index: that target token; several: side by side, on one scale.
            opacity: of the colour at the largest score, in (0, 1].

        Returns:
            A PIL image in the picture's own resolution, which is grey below the colours; several panels have a
            caption above each.

        Raises:
            InputError: the picture is not the explained one, it has no unit with a place in it, or an argument does
                not fit.
            ImportError: pillow is not installed; the message says how to get it.

        Example:
            >>> explanation.overlay(picture, "answer.png")                              # doctest: +SKIP
            >>> explanation.overlay(picture, target_token=[0, 2]).show()                # doctest: +SKIP
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
        content: dict[str, Any] = {"format": FORMAT, "version": VERSION}
        content |= {field.name: getattr(self, field.name) for field in fields(self)}
        content["units"] = [asdict(unit) for unit in self.units]
        # float32 → float64 → shortest decimal is lossless in both directions.
        content["scores"] = self.scores.tolist()
        content["base_logprobs"] = self.base_logprobs.tolist()
        content["standard_errors"] = None if self.standard_errors is None else self.standard_errors.tolist()
        return json.dumps(content, allow_nan=False) + "\n"

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
            return _from_json(content)
        except InputError as error:
            raise InputError(f"{os.fspath(path)}: {error}") from error

    def __repr__(self) -> str:
        n_units, n_tokens = self.scores.shape
        name = "log odds" if self.versus is not None else "log p" if self.value == LOG_PROBABILITY else self.value
        likelihood = f"{name} = {float(self.base_logprobs.double().sum()):.2f}"
        strongest = ", ".join(f"{_shortened(unit.text)} {score:+.2f}" for unit, score in self.top(3))
        return (
            f"Explanation({n_units} units × {n_tokens} target tokens, target={_shortened(self.target)}, "
            f"{likelihood}, top: {strongest})"
        )


def _shortened(text: str, limit: int = 40) -> str:
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")


def _check_units(units: object, texts: dict[str, str]) -> None:
    if not isinstance(units, tuple) or not units or not all(isinstance(unit, Unit) for unit in units):
        raise InputError(f"units must be a tuple of at least one Unit, got {_shortened(repr(units), 80)}")
    for i, unit in enumerate(units):
        if unit.source not in texts:
            raise InputError(f'units[{i}].source must be "prompt", "target" or "image", got {unit.source!r}')
        length = len(texts[unit.source])
        if not all(map(_is_index, (unit.start, unit.end))) or not 0 <= unit.start <= unit.end <= length:
            raise InputError(
                f"units[{i}] spans characters {unit.start}..{unit.end}, expected integers with "
                f"0 <= start <= end <= {length} (the length of the {unit.source})"
            )
        if not isinstance(unit.text, str):
            raise InputError(f"units[{i}].text must be a str, got {type(unit.text).__name__}")
        if not isinstance(unit.token_indices, tuple) or not all(map(_is_index, unit.token_indices)):
            indices = _shortened(repr(unit.token_indices), 80)
            raise InputError(f"units[{i}].token_indices must be a tuple of integers >= 0, got {indices}")
        _check_box(i, unit)


def _check_box(i: int, unit: Unit) -> None:
    if not _is_index(unit.image):
        raise InputError(f"units[{i}].image must be an integer >= 0, got {unit.image!r}")
    if unit.box is None:
        return
    box = unit.box
    if (
        not isinstance(box, tuple)
        or len(box) != 4
        or not all(_is_index(side) and side < 1 << 31 for side in box)
        or box[0] >= box[2]
        or box[1] >= box[3]
    ):
        raise InputError(
            f"units[{i}].box must be (left, top, right, bottom) in pixels, got {_shortened(repr(box), 80)}"
        )


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_target_tokens(tokens: object) -> None:
    if not isinstance(tokens, tuple) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise InputError(f"target_tokens must be a tuple of at least one str, got {_shortened(repr(tokens))}")


def _check_tensor(name: str, tensor: object, shape: tuple[int, ...]) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise InputError(f"{name} must be float32 on the CPU, got {tensor.dtype} on {tensor.device}")
    if tuple(tensor.shape) != shape:
        raise InputError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if not torch.isfinite(tensor).all():
        where = torch.nonzero(~torch.isfinite(tensor))[0].tolist()
        raise InputError(f"{name} must be finite, got {tensor[tuple(where)].item()} at {where}")


def _json_copy(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{name} must be a dict, got {type(value).__name__}")
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must hold JSON types only: {error}") from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e308  # JSON has longer ints


# What an explanation is shown by, in JSON types; other settings may be anything, and null is the same as none.
_SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("measure", "value", "versus", "model", "method", "mode", "dtype", "path"),
        (lambda value: isinstance(value, str), "a str"),
    ),
    "factor": (_is_number, "a number"),
    "logprobs": (
        lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
        "a dict of numbers",
    ),
}


def _check_settings(settings: dict[str, Any]) -> None:
    for name, (fits, expected) in _SETTINGS.items():
        if settings.get(name) is not None and not fits(settings[name]):
            raise InputError(f"settings[{name!r}] must be {expected}, got {_shortened(repr(settings[name]), 80)}")


def _from_json(content: Any) -> Explanation:
    """An Explanation from parsed JSON of any origin; whatever is wrong with it becomes an InputError."""
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise InputError(f'not an explanation: expected "format": "{FORMAT}", found {found!r}')
    if content.get("version") != VERSION:
        raise InputError(f"version {content.get('version')!r} cannot be read, only version {VERSION}")
    missing = [field.name for field in fields(Explanation) if field.name not in content and field.default is MISSING]
    if missing:
        raise InputError(f"missing {', '.join(missing)}")
    values = {field.name: content[field.name] for field in fields(Explanation) if field.name in content}
    try:
        values["units"] = tuple(map(_unit_from_json, _list("units", values["units"])))
        values["target_tokens"] = tuple(_list("target_tokens", values["target_tokens"]))
        estimated = values.get("standard_errors") is not None
        for name in ("scores", "base_logprobs", *(["standard_errors"] if estimated else [])):
            values[name] = torch.tensor(_list(name, values[name]), dtype=torch.float32, device="cpu")
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"a field has the wrong form: {error}") from error
    return Explanation(**values)


def _unit_from_json(unit: dict[str, Any]) -> Unit:
    added_later = {"box": None, "image": 0}
    values = added_later | {field.name: unit[field.name] for field in fields(Unit) if field.name not in added_later}
    values |= {name: unit[name] for name in added_later if name in unit}
    for name in ("token_indices", "box"):
        values[name] = None if values[name] is None else tuple(_list(name, values[name]))
    return Unit(**values)


def _list(name: str, value: object) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(f"{name} must be a list, got {type(value).__name__}")
    return value
