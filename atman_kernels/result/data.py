"""The fields of an explanation: what they are, and that they fit together. Nothing here shows or stores them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import torch

from atman_kernels.errors import InputError
from atman_kernels.planning.levels import SPANS
from atman_kernels.planning.units import GRANULARITIES, Unit

LOG_PROBABILITY = "log-probability"
MOST_LEVELS = 1 + len(GRANULARITIES)  # spans, and what they are cut into
RISE = "rise of the loss when suppressed, in nats"


@dataclass(frozen=True)
class ImageSize:
    """The size of an image, in `Explanation.images`.

    Attributes:
        width, height: in pixels, each at least 1.

    Example:
        >>> ImageSize(640, 480).width
        640
    """

    width: int
    height: int


@dataclass(frozen=True)
class AnswerLogprobs:
    """How likely two answers to one prompt are, in `Explanation.logprobs`.

    Attributes:
        target: natural log of the explained answer's probability.
        versus: natural log of the other answer's probability.

    Example:
        >>> AnswerLogprobs(target=-0.5, versus=-2.0).versus
        -2.0
    """

    target: float
    versus: float


@dataclass(frozen=True, eq=False)
class ExplanationData:
    """The fields of an `Explanation`, where they are documented; views take this class.

    Raises:
        InputError: as `Explanation` does.
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
    measure: str = RISE
    value: str = LOG_PROBABILITY
    versus: str | None = None
    logprobs: AnswerLogprobs | None = None
    images: tuple[ImageSize, ...] = ()
    recompute: int | None = None
    exact: tuple[bool, ...] | None = None
    levels: tuple[str, ...] = ()
    sides: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "target", "measure", "value"):
            _check_text(name, getattr(self, name))
        _check_units(self.units, {"prompt": self.prompt, "target": self.target, "image": self.prompt})
        _check_target_tokens(self.target_tokens)
        _check_tensor("scores", self.scores, (len(self.units), len(self.target_tokens)))
        _check_tensor("base_logprobs", self.base_logprobs, (len(self.target_tokens),))
        if self.standard_errors is not None:
            _check_tensor("standard_errors", self.standard_errors, (len(self.units),))
        if self.sides is not None:
            _check_tensor("sides", self.sides, (len(self.units), 2))
        if self.versus is not None:
            _check_text("versus", self.versus)
        _check_logprobs(self.logprobs)
        _check_images(self.images)
        if self.recompute is not None and (not _is_index(self.recompute) or self.recompute < 1):
            raise InputError(f"recompute must be an integer >= 1 or None, got {self.recompute!r}")
        _check_exact(self.exact, len(self.units))
        _check_levels(self.levels, self.units)
        for name in ("settings", "stats"):
            object.__setattr__(self, name, _json_copy(name, getattr(self, name)))
        _check_settings(self.settings)
        self._agree_with_settings()

    def _agree_with_settings(self) -> None:
        """Fields at their defaults are taken from `settings`, where version 1 kept them; the others are set there."""
        defaults = {field.name: field.default for field in fields(self)}
        for name, fact in _facts_in(self.settings).items():
            if getattr(self, name) == defaults[name]:
                object.__setattr__(self, name, fact)
        for name in ("measure", "value", "versus", "logprobs", "images"):
            if getattr(self, name) != defaults[name]:
                self.settings[name] = as_json(getattr(self, name))

    @property
    def measures_suppression(self) -> bool:
        """Whether scores are rises of the loss, and so ratios of probabilities."""
        return self.measure == RISE

    @property
    def has_probabilities(self) -> bool:
        """Whether `base_logprobs` are logs of probabilities, rather than logits or cosines."""
        return self.value == LOG_PROBABILITY

    @property
    def effect(self) -> str:
        """Which effect of a unit a score measures, as causal mediation analysis calls them.

        "total": all that the suppression changes. "direct": what the answer's own rows read from the unit, later prompt
        tokens being as they were (Pearl's controlled direct effect; Geva et al., arXiv 2304.14767, knock attention out
        likewise). "last 8": direct, and what the last 8 prompt tokens pass on.
        """
        return "total" if self.recompute is None else "direct" if self.recompute == 1 else f"last {self.recompute}"

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """(n_units,) the level of each unit, 0 being the coarsest; all 0 where units are not nested."""
        depths: list[int] = []
        for unit in self.units:
            depths.append(0 if unit.parent is None else depths[unit.parent] + 1)
        return tuple(depths)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Per unit the indices of the units that it was cut into, in reading order; () where it was not."""
        found: list[list[int]] = [[] for _ in self.units]
        for index, unit in enumerate(self.units):
            if unit.parent is not None:
                found[unit.parent].append(index)
        return tuple(map(tuple, found))

    @property
    def has_bands(self) -> bool:
        """Whether the coarsest of nested units are stretches of text that are shown one below the other."""
        return self.levels[:1] in (("paragraph",), (SPANS,))

    @property
    def scales(self) -> tuple[float, ...]:
        """Per level the largest total in absolute value, or 1 where all are 0."""
        total = self.total.abs()
        return tuple(
            (float(total[own].max()) if own else 0.0) or 1.0 for own in map(self.of_level, range(len(self.levels) or 1))
        )

    @property
    def finest(self) -> int:
        """The finest level that was reached: 0 where units are not nested, or none of them can be cut."""
        return max(self.depths)

    def of_level(self, level: int) -> list[int]:
        """The indices of one level's units, in reading order."""
        return [index for index, depth in enumerate(self.depths) if depth == level]

    def level_number(self, level: object) -> int:
        """A level by its name or number, 0 being the coarsest and -1 the finest, as a number from 0.

        Raises:
            InputError: there is no such level.
        """
        count = len(self.levels) or 1
        if isinstance(level, str) and level in self.levels:
            return self.levels.index(level)
        number = level if isinstance(level, int) and not isinstance(level, bool) else count
        if not -count <= number < count:
            names = "".join(f", {name!r}" for name in self.levels)
            raise InputError(f"level must be one of 0 to {count - 1}{names}, got {level!r}")
        return number % count

    def is_exact(self, unit: int) -> bool:
        """Whether a unit's scores are exact, by its index; otherwise they are the estimate of a search."""
        return self.exact is None or self.exact[unit]

    @property
    def total(self) -> torch.Tensor:
        """(n_units,) float32: each unit's scores summed over the target tokens; finite, as they are."""
        return self.scores.sum(dim=1).nan_to_num()


def as_json(value: Any) -> Any:
    """A field's value in JSON types. float32 → float64 → shortest decimal loses nothing, in both directions."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, tuple):
        return [as_json(member) for member in value]
    if isinstance(value, Unit):  # most units have neither name nor parent
        return {name: member for name, member in asdict(value).items() if member is not None or name == "box"}
    return asdict(value) if isinstance(value, ImageSize | AnswerLogprobs) else value


def _facts_in(settings: dict[str, Any]) -> dict[str, Any]:
    """The fields that version 1 kept in the settings, as far as they are well formed."""
    facts = {name: settings[name] for name in ("measure", "value") if settings.get(name)}
    if settings.get("versus") is not None:
        facts["versus"] = settings["versus"]
    both = settings.get("logprobs") or {}
    if both.keys() == {"target", "versus"}:
        facts["logprobs"] = AnswerLogprobs(float(both["target"]), float(both["versus"]))
    sizes = settings.get("images")
    if isinstance(sizes, list) and all(isinstance(size, dict) for size in sizes):
        found = tuple(ImageSize(size.get("width"), size.get("height")) for size in sizes)
        if all(map(_is_size, found)):
            facts["images"] = found
    return facts


def shortened(text: str, limit: int = 40) -> str:
    """The text's repr, cut to `limit` characters of text."""
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise InputError(f"{name} must be a str, got {type(value).__name__}")


def _check_units(units: object, texts: dict[str, str]) -> None:
    if not isinstance(units, tuple) or not units or not all(isinstance(unit, Unit) for unit in units):
        raise InputError(f"units must be a tuple of at least one Unit, got {shortened(repr(units), 80)}")
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
        if unit.name is not None and (not isinstance(unit.name, str) or not unit.name.strip()):
            raise InputError(f"units[{i}].name must be a str that is not empty, or None, got {unit.name!r}")
        if not isinstance(unit.token_indices, tuple) or not all(map(_is_index, unit.token_indices)):
            indices = shortened(repr(unit.token_indices), 80)
            raise InputError(f"units[{i}].token_indices must be a tuple of integers >= 0, got {indices}")
        _check_box(i, unit)


def _check_exact(exact: object, count: int) -> None:
    if exact is None:
        return
    if not isinstance(exact, tuple) or len(exact) != count or not all(isinstance(flag, bool) for flag in exact):
        raise InputError(f"exact must be None or a tuple of {count} bools, got {shortened(repr(exact), 80)}")


def _check_levels(levels: object, units: tuple[Unit, ...]) -> None:
    names = isinstance(levels, tuple) and all(isinstance(level, str) for level in levels)
    if not isinstance(levels, tuple) or not names or len(levels) not in (0, *range(2, MOST_LEVELS + 1)):
        raise InputError(f"levels must be () or a tuple of 2 to {MOST_LEVELS} str, got {shortened(repr(levels), 80)}")
    depths: list[int] = []
    for i, unit in enumerate(units):
        parent = unit.parent
        if parent is not None and not (_is_index(parent) and parent < i):
            raise InputError(f"units[{i}].parent must be None or the index of a unit before it, got {parent!r}")
        depths.append(0 if parent is None else depths[parent] + 1)
        if depths[-1] and depths[-1] >= len(levels):
            raise InputError(f"units[{i}] is of level {depths[-1]}, but levels names {len(levels)}: {levels!r}")
        if parent is None:
            continue
        above = units[parent]
        if unit.source != above.source or not set(unit.token_indices) <= set(above.token_indices):
            raise InputError(f"units[{i}] must lie in its parent, units[{parent}]")


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
        raise InputError(f"units[{i}].box must be (left, top, right, bottom) in pixels, got {shortened(repr(box), 80)}")


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_target_tokens(tokens: object) -> None:
    if not isinstance(tokens, tuple) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise InputError(f"target_tokens must be a tuple of at least one str, got {shortened(repr(tokens))}")


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


def _check_logprobs(logprobs: object) -> None:
    if logprobs is None:
        return
    if not isinstance(logprobs, AnswerLogprobs):
        raise InputError(f"logprobs must be AnswerLogprobs or None, got {type(logprobs).__name__}")
    for name, value in vars(logprobs).items():
        if not _is_number(value):
            raise InputError(f"logprobs.{name} must be a finite number, got {value!r}")


def _check_images(images: object) -> None:
    if not isinstance(images, tuple) or not all(map(_is_size, images)):
        raise InputError(f"images must be a tuple of ImageSize in pixels, got {shortened(repr(images), 80)}")


def _is_size(value: object) -> bool:
    return isinstance(value, ImageSize) and all(_is_index(side) and 0 < side < 1 << 31 for side in vars(value).values())


def _json_copy(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{name} must be a dict, got {type(value).__name__}")
    try:
        copy: dict[str, Any] = json.loads(json.dumps(value, allow_nan=False))
        return copy
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must hold JSON types only: {error}") from error


def _is_number(value: object) -> bool:
    """Whether this is a finite number that a float can hold; JSON has longer integers."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e308


# Settings that views show, in JSON types. Others may be anything; null is the same as none.
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
            raise InputError(f"settings[{name!r}] must be {expected}, got {shortened(repr(settings[name]), 80)}")
