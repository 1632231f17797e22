"""What a prompt becomes: its tokens, its units, what a request with it would cost. Needs the tokenizer alone, not the
model's turn, and may be called from any thread."""

import copy
import threading
from collections.abc import Sequence
from typing import Any

from atman_kernels.explain import methods
from atman_kernels.inputs.image_text import placeholder_of
from atman_kernels.inputs.token_texts import token_texts_of
from atman_kernels.inputs.tokenization import PromptTokens, encode, read_prompt, special_flags, target_ids, tokenizer_of
from atman_kernels.planning.levels import checked_units
from atman_kernels.planning.units import GRANULARITIES, split_units
from atman_kernels.serve.errors import RequestError
from atman_kernels.serve.requests import AnswerRequest, ExplainRequest
from atman_kernels.serve.settings import Settings

Span = tuple[int, int]  # characters, end exclusive
MOST_STEPS = 500  # of integrated gradients


class Measuring:
    """A tokenizer of its own: they change while they work.

    Args:
        model: whose limits count; it is not run.
        given: its tokenizer or processor.
        settings: limits.
    """

    def __init__(self, model: Any, given: Any, settings: Settings) -> None:
        self._model, self._settings = model, settings
        self._tokenizer = copy.deepcopy(tokenizer_of(given))
        self._placeholder = placeholder_of(given)
        self._lock = threading.Lock()

    def measure(self, request: ExplainRequest | AnswerRequest) -> int:
        """Tokens of the request's prompt with its answer, or with the longest that the model may give.

        Raises:
            InputError: something about it does not fit.
            RequestError: it is larger than what the service takes.
        """
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
            self._check_units(len(tokens.units))
            return self._checked(len(tokens.ids) + longest)

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
        cut = None if units is None else checked_units(units)
        return read_prompt(self._model, self._tokenizer, request.prompt, cut, chat=request.chat, language=language)

    def _check_units(self, units: int) -> None:
        most = self._settings.max_units
        if units > most:
            message = f"units: the prompt has {units}, this service takes {most}; larger units are fewer"
            raise RequestError("too_large", message, param="units")

    def _checked(self, tokens: int) -> int:
        most = self._settings.max_tokens
        if tokens > most:
            raise RequestError("too_large", f"prompt and answer have {tokens} tokens, this service takes {most}")
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
