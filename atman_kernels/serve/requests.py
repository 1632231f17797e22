"""What is asked of the model, whichever protocol it came by."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from atman_kernels.run.perturbation import Perturbation

Prompt = str | list[dict[str, Any]]  # a text, or chat messages
Spans = tuple[tuple[int, int, float], ...]  # characters [start, end) of the tokenized text, factor
Overlap = Literal["partial", "complete"]  # of a token that lies inside in part: in proportion, or as a whole


@dataclass(frozen=True)
class TextControl:
    """Characters [start, end) of the prompt, and what the attention to them is scaled by."""

    start: int
    end: int
    factor: float
    overlap: Overlap = "partial"


@dataclass(frozen=True)
class ImageControl:
    """Left, top, right and bottom in pixels of one of the images, and what the attention to them is scaled by."""

    image: int
    box: tuple[float, float, float, float]
    factor: float
    overlap: Overlap = "partial"


Control = TextControl | ImageControl


@dataclass(frozen=True)
class ExplainRequest:
    """An explanation that is wanted; see `Explainer.explain` for what the fields mean.

    Attributes:
        overlap: what becomes of tokens that a unit holds in part.
        controls: what the attention to parts of the prompt is scaled by all the time, with and without a unit
            suppressed.
        images: the pictures' bytes, as they came.
        store, stream: what is to become of the result.
    """

    prompt: Prompt
    target: str | None = None
    versus: str | None = None
    units: str | list[Any] | None = "token"  # a granularity, spans, or levels of them
    perturbation: Perturbation = field(default_factory=Perturbation)
    chat: bool = False
    include_target: bool = False
    max_new_tokens: int = 32
    language: str = "en"
    method: str = "atman"
    options: dict[str, Any] = field(default_factory=dict)
    images: tuple[bytes, ...] = ()
    image_units: int | str | None = "patch"
    overlap: Overlap = "complete"
    controls: tuple[Control, ...] = ()
    exact: int | None = None
    recompute: int | None = None
    refine: int | None = None
    store: bool = False
    stream: bool = False

    @property
    def needs_own_factors(self) -> bool:
        """Whether tokens have factors of this request alone."""
        return bool(self.controls) or (self.overlap == "partial" and isinstance(self.units, list))

    @property
    def depth(self) -> dict[str, int | None]:
        """How much of it is computed."""
        return {"exact": self.exact, "recompute": self.recompute, "refine": self.refine}

    @property
    def key(self) -> str:
        """Requests of equal keys can be explained in one call."""
        alone = id(self) if self.images or self.needs_own_factors else 0
        together = (self.chat, self.include_target, self.max_new_tokens, self.language, self.method, self.depth)
        return repr((alone, self.perturbation, together, json.dumps(self.options, sort_keys=True)))


@dataclass(frozen=True)
class AnswerRequest:
    """An answer that is wanted, with the attention to spans of the prompt scaled."""

    prompt: Prompt
    spans: Spans = ()
    mode: str = "log_additive"
    layers: tuple[int, ...] | None = None
    chat: bool = False
    max_new_tokens: int = 32
    stream: bool = False

    @property
    def key(self) -> str:
        """Of this request alone: answers are not shared."""
        return repr(("answer", id(self)))
