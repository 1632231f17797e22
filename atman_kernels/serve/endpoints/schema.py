"""Our own protocol's fields: what is said in JSON, and how it becomes a request."""

import base64
import binascii
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, field_validator, model_validator

from atman_kernels.formula import Mode
from atman_kernels.run.perturbation import Perturbation
from atman_kernels.serve.errors import RequestError
from atman_kernels.serve.requests import AnswerRequest, ExplainRequest, Prompt
from atman_kernels.serve.settings import Settings

MOST_IMAGES = 16
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Factor = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Positive = Annotated[int, Field(strict=True, ge=1)]
Index = Annotated[int, Field(strict=True, ge=0)]
Granularity = Literal["token", "word", "sentence", "paragraph"]
Spans = list[tuple[Index, Index] | tuple[Index, Index, str]]
Units = Granularity | Spans | list[Granularity | Spans]


class Message(BaseModel):
    """One chat message."""

    model_config = ConfigDict(extra="allow")  # templates read more of it: names, tool calls
    role: str
    content: str | list[dict[str, Any]] | None = None


class Asking(BaseModel):
    """What every request to the model says."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, description="If given, the served model's name.")
    prompt: str | None = Field(None, description="A text; or give messages.")
    messages: list[Message] | None = Field(None, description="Chat messages, for the model's chat template.")
    chat: StrictBool = Field(False, description="Put prompt into the chat template, as the user's message.")
    max_new_tokens: Positive | None = Field(None, description="Of the model's own answer; null: 32, or fewer here.")
    mode: Mode = "log_additive"
    layers: list[StrictInt] | None = Field(None, description="Attention layers to act on; null for all.")
    stream: StrictBool = Field(False, description="Answer with server-sent events.")

    @model_validator(mode="after")
    def _one_prompt(self) -> "Asking":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of prompt and messages")
        return self

    def asked(self) -> Prompt:
        """The prompt, or the messages of a chat."""
        if self.messages is None:
            assert self.prompt is not None
            return self.prompt
        return [message.model_dump(exclude_unset=True) for message in self.messages]

    def new_tokens(self, settings: Settings) -> int:
        """How many tokens the model may write."""
        return min(32, settings.max_new_tokens) if self.max_new_tokens is None else self.max_new_tokens


class ExplanationBody(Asking):
    """An explanation that is wanted; docs/service.md says what the fields mean."""

    target: str | None = Field(None, description="The answer, as it continues the prompt; null: the model answers.")
    versus: str | None = Field(None, description="Another answer: why the target rather than this one.")
    units: Units | None = Field("token", description="A granularity, spans, or several from coarse to fine.")
    factor: Factor = Field(0.0, description="What is kept of the attention to a unit.")
    similarity_threshold: Annotated[Number, Field(gt=0, le=1)] | None = None
    include_target: StrictBool = False
    language: str = "en"
    method: str = "atman"
    options: dict[str, StrictBool | StrictInt | Number | str | None] = Field(default_factory=dict)
    images: list[str] | None = Field(
        None, max_length=MOST_IMAGES, description="base64 or data: URLs of PNG, JPEG or WebP."
    )
    image_units: Positive | Literal["patch", "image"] | None = "patch"
    exact: Positive | None = Field(None, description="So many of the strongest units exactly, the others estimated.")
    recompute: Positive | None = Field(None, description="Last prompt tokens that feel a suppression; null: all.")
    refine: Positive | None = Field(
        None, description="Of nested units: so many of each level are cut; null: most effect."
    )
    store: StrictBool = Field(False, description="Keep the result, for GET /v1/explanations/{id}.")

    def request(self, settings: Settings) -> ExplainRequest:
        """The request that the body asks for."""
        return ExplainRequest(
            self.asked(),
            self.target,
            self.versus,
            self.units,
            Perturbation(
                self.mode, self.factor, self.similarity_threshold, None if self.layers is None else tuple(self.layers)
            ),
            chat=self.chat,
            include_target=self.include_target,
            max_new_tokens=self.new_tokens(settings),
            language=self.language,
            method=self.method,
            options=self.options,
            images=tuple(decoded(text, f"images[{number}]") for number, text in enumerate(self.images or ())),
            image_units=self.image_units,
            exact=self.exact,
            recompute=self.recompute,
            refine=self.refine,
            store=self.store,
            stream=self.stream,
        )


class SpanBody(BaseModel):
    """Characters [start, end) of the tokenized text, and what the attention to them is scaled by."""

    model_config = ConfigDict(extra="forbid")
    start: Index
    end: Index
    factor: Factor


class AnswerBody(Asking):
    """An answer that is wanted."""

    spans: list[SpanBody] = Field(default_factory=list, max_length=4096)

    @field_validator("spans")
    @classmethod
    def _each_once(cls, spans: list[SpanBody]) -> list[SpanBody]:
        if len({(span.start, span.end) for span in spans}) < len(spans):
            raise ValueError("the same characters are there twice")
        return spans

    def request(self, settings: Settings) -> AnswerRequest:
        """The request that the body asks for."""
        return AnswerRequest(
            self.asked(),
            tuple((span.start, span.end, span.factor) for span in self.spans),
            self.mode,
            None if self.layers is None else tuple(self.layers),
            self.chat,
            self.new_tokens(settings),
            self.stream,
        )


class ErrorBody(BaseModel):
    """What went wrong."""

    class Wrong(BaseModel):
        """What is wrong, and which parameter it is about."""

        type: str
        message: str
        param: str | None

    error: Wrong


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": description}
    for status, description in {
        400: "A field does not fit.",
        401: "The token is missing or wrong.",
        403: "From elsewhere, where there is no token.",
        404: "No such model, request or result.",
        408: "The body did not come in time.",
        413: "More bytes, characters, tokens, units or variants than this service takes.",
        422: "The model cannot be explained so.",
        500: "A defect of ours.",
        503: "The queue is full, or the service is about to end.",
        504: "The work took longer than a request may.",
        507: "Out of memory.",
    }.items()
}


def result(description: str) -> dict[str, Any]:
    """OpenAPI's words for a response that may be streamed."""
    kinds = {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {"schema": {"type": "string"}}}
    return {"description": description, "content": kinds}


def decoded(text: str, name: str) -> bytes:
    """The bytes of base64, or of a data: URL of it.

    Raises:
        RequestError: it is neither.
    """
    if text.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.endswith(";base64"):
            raise RequestError("invalid_request", f"{name} must be base64 or a data: URL of it", param="images")
    elif text[:8].lower().startswith(("http:", "https:", "file:")):
        raise RequestError("invalid_request", f"{name} is an address; this service fetches nothing", param="images")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError("invalid_request", f"{name} is no base64: {error}", param="images") from error
