"""What is asked of the model, whichever protocol it came by."""

import json
from dataclasses import dataclass, field
from typing import Any

Prompt = str | list[dict[str, Any]]  # a text, or chat messages
Spans = tuple[tuple[int, int, float], ...]  # characters [start, end) of the tokenized text, factor


@dataclass(frozen=True)
class Suppression:
    """How units are suppressed: the settings of an `Explainer`."""

    mode: str = "log_additive"
    factor: float = 0.0
    similarity_threshold: float | None = None
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ExplainRequest:
    """An explanation that is wanted; see `Explainer.explain` for what the fields mean.

    Attributes:
        controls: what the attention to parts of the prompt is scaled by all the time, with and without a unit
            suppressed.
        images: the pictures' bytes, as they came.
        listens: whether somebody wants to know of units as they come.
    """

    prompt: Prompt
    target: str | None = None
    versus: str | None = None
    units: str | list[tuple[int, int]] | None = "token"
    suppression: Suppression = Suppression()
    chat: bool = False
    include_target: bool = False
    max_new_tokens: int = 32
    language: str = "en"
    method: str = "atman"
    options: dict[str, Any] = field(default_factory=dict)
    images: tuple[bytes, ...] = ()
    image_units: int | str | None = "patch"
    controls: Spans = ()
    store: bool = False
    stream: bool = False

    @property
    def key(self) -> str:
        """Requests of equal keys can be explained in one call."""
        alone = id(self) if self.images or self.controls else 0
        together = (self.chat, self.include_target, self.max_new_tokens, self.language, self.method)
        return repr((alone, self.suppression, together, json.dumps(self.options, sort_keys=True)))


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
        return repr(("answer", id(self)))
