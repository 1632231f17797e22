"""What a prompt becomes: its tokens, its units, what a request with it would cost. Needs the tokenizer alone, not the
model's turn, and may be called from any thread."""

import copy
import json
import threading
from collections.abc import Sequence
from typing import Any

from atman_kernels.errors import InputError
from atman_kernels.explain import methods
from atman_kernels.inputs.image_text import placeholder_of
from atman_kernels.inputs.token_texts import token_texts_of
from atman_kernels.inputs.tokenization import (
    PromptTokens,
    encode,
    encode_prompt,
    read_prompt,
    special_flags,
    target_ids,
    tokenizer_of,
)
from atman_kernels.planning.levels import checked_units
from atman_kernels.planning.units import GRANULARITIES, split_units
from atman_kernels.serve.errors import RequestError
from atman_kernels.serve.requests import AnswerRequest, ExplainRequest
from atman_kernels.serve.settings import Settings

Span = tuple[int, int]  # characters, end exclusive
MOST_STEPS = 500  # of integrated gradients
CHARACTERS = 64  # of a request's texts for each token that may be: whoever sends more is not asked how many they are


def check_size(settings: Settings, request: ExplainRequest | None, tokens: int, units: int) -> None:
    """Raises RequestError if a request is larger than what the service takes.

    Args:
        request: None where units are none of its business.
        tokens: of prompt and answer.
        units: of the prompt.
    """
    if tokens > settings.max_tokens:
        message = f"prompt and answer have {tokens} tokens, this service takes {settings.max_tokens}"
        raise RequestError("too_large", message)
    if units > settings.max_units:
        raise _too_many(units, settings.max_units)
    if request is None:
        return
    options = methods.method(request.method, request.options).options
    variants = max(options.get("permutations", 0) * (units + 1), options.get("samples", 0))
    most = settings.max_units * settings.max_tokens // max(1, tokens)  # each has a number for each token
    if variants > most:
        message = f"options: method {request.method!r} would run {variants} variants, of this prompt {most} are taken"
        raise RequestError("too_large", message, param="options")


def _spans_of(units: Sequence[Any]) -> list[Any]:
    """All spans of a choice of units, those of a level among several too."""
    return [span for entry in units for span in ([entry] if isinstance(entry, tuple) else entry) if len(span) > 1]


def _too_many(units: int, most: int) -> RequestError:
    message = f"units: the prompt has {units}, this service takes {most}; larger units are fewer"
    return RequestError("too_large", message, param="units")


class Measuring:
    """A tokenizer of its own: they change while they work.

    Args:
        model: whose limits count; it is not run.
        given: its tokenizer or processor.
        settings: limits.
        reads_images: whether the model does.
    """

    def __init__(self, model: Any, given: Any, settings: Settings, reads_images: bool) -> None:
        self._model, self._settings, self._reads_images = model, settings, reads_images
        self._tokenizer = copy.deepcopy(tokenizer_of(given))
        self._placeholder = placeholder_of(given)
        self._lock = threading.Lock()

    def measure(self, request: ExplainRequest | AnswerRequest) -> int:
        """Tokens of the request's prompt with its answer, or with the longest that the model may give.

        Raises:
            InputError: something about it does not fit.
            RequestError: it is larger than what the service takes.
        """
        self._check_texts(request)
        most = self._settings.max_new_tokens
        if getattr(request, "target", None) is None and request.max_new_tokens > most:
            message = f"max_new_tokens must be at most {most} here, got {request.max_new_tokens}"
            raise RequestError("invalid_request", message, param="max_new_tokens")
        with self._lock:
            if isinstance(request, AnswerRequest):
                return self._checked(len(self._read(request, "token", "en").ids) + request.max_new_tokens)
            self._check_method(request)
            answers = [text for text in (request.target, request.versus) if text is not None]
            longest = max((len(target_ids(self._model, self._tokenizer, text)) for text in answers), default=0)
            if request.target is None:
                longest = max(longest, request.max_new_tokens)
            if request.images:  # what they become is known once they are seen
                return self._checked(longest)
            tokens = self._read(request, request.units, request.language)
            check_size(self._settings, request, len(tokens.ids) + longest, len(tokens.units))
            return len(tokens.ids) + longest

    def _check_texts(self, request: ExplainRequest | AnswerRequest) -> None:
        """Before a tokenizer sees them, which others wait for."""
        most = self._settings.max_tokens * CHARACTERS
        texts = [request.prompt, getattr(request, "target", None), getattr(request, "versus", None)]
        characters = sum(len(text if isinstance(text, str) else json.dumps(text)) for text in texts if text is not None)
        if characters > most:
            raise RequestError("too_large", f"the texts have {characters} characters, this service takes {most}")
        if isinstance(request, ExplainRequest) and request.images:
            if not self._reads_images:
                raise InputError(f"images: {type(self._model).__name__} reads none")
            from atman_kernels.serve.pictures import check_together

            check_together(request.images)
        if isinstance(request, ExplainRequest) and isinstance(request.units, list):
            self.check_spans(_spans_of(request.units))

    def check_spans(self, spans: Sequence[Any]) -> None:
        """Raises RequestError for more of them, or more characters in them, than the service takes."""
        most = self._settings.max_tokens * CHARACTERS
        if len(spans) > self._settings.max_units:
            raise _too_many(len(spans), self._settings.max_units)
        characters = sum(end - start for start, end, *_ in spans)
        if characters > most:
            message = f"units: they hold {characters} characters together, this service takes {most}"
            raise RequestError("too_large", message, param="units")

    def _check_method(self, request: ExplainRequest) -> None:
        if request.method in methods.WITH_FILES:  # before a file is looked for, which would tell what is there
            message = f"method {request.method!r} reads a file, which this service does not do for its clients"
            raise RequestError("invalid_request", message, param="method")
        options = methods.method(request.method, request.options).options
        steps = options.get("steps")
        if steps is not None and steps > MOST_STEPS:  # to find their places takes long, and nothing could stop it
            message = f"options: steps must be at most {MOST_STEPS} here, got {steps}"
            raise RequestError("invalid_request", message, param="options")

    def _read(self, request: ExplainRequest | AnswerRequest, units: Any, language: str) -> PromptTokens:
        _, encoded = encode_prompt(self._model, self._tokenizer, request.prompt, request.chat)
        self._checked(len(encoded["input_ids"]))  # before the text is cut into units, which takes longer
        cut = None if units is None else checked_units(units)
        return read_prompt(self._model, self._tokenizer, request.prompt, cut, chat=request.chat, language=language)

    def _checked(self, tokens: int) -> int:
        check_size(self._settings, None, tokens, 0)
        return tokens

    # Prompts that come in pieces ---------------------------------------------------------------------------------

    def image_placeholder(self) -> str:
        """What stands for a picture in a text.

        Raises:
            RequestError: this model sees none.
        """
        if self._placeholder is None:
            raise RequestError("invalid_request", "prompt: this model reads no images", param="prompt")
        return self._placeholder

    def text_of(self, ids: Sequence[int], name: str) -> tuple[str, list[Span]]:
        """The text of token ids, and the characters of each.

        Raises:
            RequestError: the model does not know one of them.
        """
        unknown = next((token for token in ids if token >= len(self._tokenizer)), None)
        if unknown is not None or not ids:
            what = "is empty" if not ids else f"has the id {unknown}, of {len(self._tokenizer)}"
            raise RequestError("invalid_request", f"{name} {what}", param="prompt")
        with self._lock:
            pieces, spans = token_texts_of(self._tokenizer, ids)
        return "".join(pieces), spans

    def check_ids(self, text: str, given: Sequence[Sequence[int]]) -> None:
        """Raises RequestError if the model would not read these ids, one list after the other, in this text."""
        with self._lock:
            read = encode(self._tokenizer, text, add_special_tokens=True)["input_ids"] if given else []
        at = 0
        for ids in given:
            found = next((n for n in range(at, len(read)) if list(read[n : n + len(ids)]) == list(ids)), None)
            if found is None:
                message = "prompt: these token_ids are not what the tokenizer makes of their text; send the text"
                raise RequestError("invalid_request", message, param="prompt")
            at = found + len(ids)

    def granularity_near(self, text: str, number: int) -> str:
        """Of which units a text has about as many."""
        with self._lock:
            encoded = encode(self._tokenizer, text, add_special_tokens=False)
            counts = {
                name: len(split_units(text, encoded["offset_mapping"], name, special=self._specials(encoded)))
                for name in GRANULARITIES
            }
        return min(counts, key=lambda name: abs(counts[name] - number))

    def spans(self, text: str, granularity: str) -> list[Span]:
        """Characters of a text's units, without the white space around them; tokens that are marks are none."""
        with self._lock:
            encoded = encode(self._tokenizer, text, add_special_tokens=False)
            units = split_units(text, encoded["offset_mapping"], granularity, special=self._specials(encoded))
        return [(unit.start, unit.end) for unit in units if text[unit.start : unit.end].strip()]

    def _specials(self, encoded: Any) -> list[bool]:
        return special_flags(self._tokenizer, encoded["input_ids"])
