"""`/explain` and `/version` in Aleph Alpha's schema, so that its client works against this service.

The schema is the one that the published `aleph-alpha-client` sends and reads; defaults are those that its documentation
states. A prompt is a list of items, which become one text; scores go back item by item.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field, StrictBool
from starlette.responses import PlainTextResponse, Response
from torch import Tensor

from atman_kernels.result.explanation import Explanation
from atman_kernels.run.perturbation import Perturbation
from atman_kernels.serve.endpoints.schema import ERRORS, MOST_IMAGES, Factor, Index, Number, decoded
from atman_kernels.serve.errors import RequestError
from atman_kernels.serve.measuring import Measuring
from atman_kernels.serve.requests import ExplainRequest, ImageControl, Overlap, TextControl
from atman_kernels.serve.service import TheService, json_response

router = APIRouter(tags=["Aleph Alpha"])
VERSION = "1.20.0"  # of that API; the client takes 1.19 and later of 1
AROUND = 30  # units that a prompt gets where no granularity is asked for, or as near to that as there is
TILES: dict[str, int | str] = {"token": "patch", "word": 2, "sentence": 4, "paragraph": "image"}  # sides, in patches
EXAMPLE = {
    "model": "smollm2",
    "prompt": [{"type": "text", "data": "The capital of France is"}],
    "target": " Paris",
    "prompt_granularity": {"type": "word"},
}


class Rect(BaseModel):
    """A rectangle, in parts of an image's width and height."""

    left: Number
    top: Number
    width: Number
    height: Number


class Control(BaseModel):
    """Attention that is scaled all the time: to characters, to a token by its index, or to a place of a picture."""

    factor: Factor
    start: Index | None = None
    length: Index | None = None
    index: Index | None = None
    rect: Rect | None = None
    token_overlap: Overlap | None = None


class Item(BaseModel):
    """A part of a prompt."""

    type: Literal["text", "token_ids", "image"]
    data: str | list[Index]
    controls: list[Control] = Field(default_factory=list, max_length=4096)
    x: Index | None = None
    y: Index | None = None
    size: Index | None = None


class Granularity(BaseModel):
    """What scores are for."""

    type: Literal["token", "word", "sentence", "paragraph", "custom"]
    delimiter: str | None = None


class ExplainBody(BaseModel):
    """The client's `ExplanationRequest`."""

    model_config = ConfigDict(extra="ignore")  # "hosting" and what later clients add
    model: str
    prompt: str | Annotated[list[Item], Field(max_length=4096)]
    target: str
    control_factor: Factor | None = None
    contextual_control_threshold: Annotated[Number, Field(gt=0, le=1)] | None = None
    control_log_additive: StrictBool | None = None
    control_token_overlap: Overlap | None = None
    prompt_granularity: Granularity | None = None
    target_granularity: Literal["complete", "token"] | None = None
    postprocessing: Literal["none", "absolute", "square"] | None = None
    normalize: StrictBool | None = None


@dataclass(frozen=True)
class Part:
    """An item in the text that all of them become.

    Attributes:
        start, end: its characters there.
        tokens: of token ids, the characters of each.
        image: of a picture, its number.
        size: of a picture, in pixels.
        crop: of a picture of which a part was shown: left, top and side of that part.
    """

    kind: str
    start: int
    end: int
    tokens: tuple[tuple[int, int], ...] = ()
    image: int = 0
    size: tuple[int, int] = (1, 1)
    crop: tuple[int, int, int] | None = None


@router.get("/version", summary="Of Aleph Alpha's API", response_class=PlainTextResponse)
async def version() -> str:
    """The version of the API that is answered."""
    return VERSION


@router.post("/explain", summary="Explain an answer, in Aleph Alpha's schema", responses=ERRORS)
async def explain(
    http: Request,
    service: TheService,
    body: Annotated[ExplainBody, Body(openapi_examples={"a question": {"value": EXAMPLE}})],
) -> Response:
    """Explains an answer, in the form of Aleph Alpha's API."""
    service.check_model(body.model)
    wanted, parts = await run_in_threadpool(_request, service.engine.measuring, body)
    explanation = await service.outcome(http, wanted)
    return json_response(await run_in_threadpool(_response, body, parts, explanation))


# What comes in --------------------------------------------------------------------------------------------------------


def _request(measuring: Measuring, body: ExplainBody) -> tuple[ExplainRequest, list[Part]]:
    items = [Item(type="text", data=body.prompt)] if isinstance(body.prompt, str) else body.prompt
    if not items:
        raise _wrong("prompt must have at least one item, got none")
    text, parts, images = _joined(measuring, items)
    wanted = ExplainRequest(
        prompt=text,
        target=body.target,
        perturbation=Perturbation(
            "shifted" if body.control_log_additive is False else "log_additive",
            0.1 if body.control_factor is None else body.control_factor,
            body.contextual_control_threshold,
        ),
        include_target=body.target_granularity == "token",
        images=tuple(images),
        overlap=body.control_token_overlap or "partial",
        controls=tuple(_controls(items, parts, body.control_token_overlap)),
    )
    return _with_units(measuring, wanted, body, parts), parts


def _joined(measuring: Measuring, items: list[Item]) -> tuple[str, list[Part], list[bytes]]:
    """The text that items become, where each of them stands in it, and the pictures."""
    text = ""
    parts: list[Part] = []
    images: list[bytes] = []
    pictures = _pictures(items)
    for number, item in enumerate(items):
        start, name = len(text), f"prompt[{number}].data"
        if (item.type == "token_ids") != isinstance(item.data, list):
            raise _wrong(f"{name} does not go with type {item.type!r}")
        if isinstance(item.data, list):
            piece, spans = measuring.text_of(item.data, name)
            text += piece
            parts.append(Part(item.type, start, len(text), tuple((start + a, start + b) for a, b in spans)))
        elif item.type == "text":
            text += item.data
            parts.append(Part(item.type, start, len(text)))
        else:
            text += measuring.image_placeholder()
            part, data = _picture(item, pictures[len(images)], len(images))
            parts.append(replace(part, start=start, end=len(text)))
            images.append(data)
    measuring.check_ids(text, [item.data for item in items if isinstance(item.data, list)])
    return text, parts, images


def _pictures(items: list[Item]) -> list[bytes]:
    """The bytes of all pictures, none of which is unpacked yet."""
    found = [
        decoded(item.data, f"prompt[{number}].data")
        for number, item in enumerate(items)
        if item.type == "image" and isinstance(item.data, str)
    ]
    if len(found) > MOST_IMAGES:
        raise _wrong(f"prompt must have at most {MOST_IMAGES} images, got {len(found)}")
    if found:
        from atman_kernels.serve.pictures import check_together

        check_together(found)
    return found


def _picture(item: Item, data: bytes, number: int) -> tuple[Part, bytes]:
    from atman_kernels.serve.pictures import cropped, size_of

    size = size_of(data, number)
    if item.x is None or item.y is None or item.size is None:
        return Part("image", 0, 0, image=number, size=size), data
    crop = (item.x, item.y, item.size)
    return Part("image", 0, 0, image=number, size=size, crop=crop), cropped(data, number, *crop)


def _controls(items: list[Item], parts: list[Part], overlap: Overlap | None) -> "list[TextControl | ImageControl]":
    found: list[TextControl | ImageControl] = []
    for number, (item, part) in enumerate(zip(items, parts, strict=True)):
        for index, control in enumerate(item.controls):
            name = f"prompt[{number}].controls[{index}]"
            how = control.token_overlap or overlap or "partial"
            if part.kind == "image":
                found.append(_image_control(control, part, how, name))
                continue
            if part.kind == "token_ids":
                if control.index is None or control.index >= len(part.tokens):
                    raise _wrong(f"{name}.index must be below {len(part.tokens)}")
                start, end = part.tokens[control.index]
            else:
                if control.start is None or control.length is None:
                    raise _wrong(f"{name} needs start and length")
                start, end = part.start + control.start, part.start + control.start + control.length
                if end > part.end or start == end:
                    raise _wrong(f"{name} holds no characters of its item")
            found.append(TextControl(start, end, control.factor, how))
    return found


def _image_control(control: Control, part: Part, how: Overlap, name: str) -> ImageControl:
    rect, (width, height) = control.rect, part.size
    if rect is None or rect.width <= 0 or rect.height <= 0:
        raise _wrong(f"{name} needs a rect with a width and a height")
    left, top, _ = part.crop or (0, 0, 0)
    box = (rect.left * width - left, rect.top * height - top, rect.width * width, rect.height * height)
    return ImageControl(part.image, (box[0], box[1], box[0] + box[2], box[1] + box[3]), control.factor, how)


def _with_units(measuring: Measuring, wanted: ExplainRequest, body: ExplainBody, parts: list[Part]) -> ExplainRequest:
    """The request with its units: of a granularity, or spans where a delimiter or token ids decide."""
    asked = body.prompt_granularity
    assert isinstance(wanted.prompt, str)
    texts = [part for part in parts if part.kind != "image"]
    if asked is not None and asked.type == "custom":
        if not asked.delimiter:
            raise _wrong("prompt_granularity.delimiter must be a text", "prompt_granularity")
        units: Any = _split(wanted.prompt, texts, asked.delimiter)
        name = "sentence"
    else:
        name = asked.type if asked is not None else measuring.granularity_near(wanted.prompt, AROUND)
        units = name
        if any(part.kind == "token_ids" for part in parts):
            units = [span for part in texts for span in _spans(measuring, wanted.prompt, part, name)]
    return replace(wanted, units=units if texts else None, image_units=TILES[name])


def _spans(measuring: Measuring, text: str, part: Part, granularity: str) -> list[tuple[int, int]]:
    """Of the units of a part by itself: its tokens where it was given as such."""
    if part.kind == "token_ids":
        return [span for span in part.tokens if text[span[0] : span[1]].strip()]
    return [(part.start + a, part.start + b) for a, b in measuring.spans(text[part.start : part.end], granularity)]


def _split(text: str, parts: list[Part], delimiter: str) -> list[tuple[int, int]]:
    """Spans between delimiters that are more than white space; no span leaves its item."""
    spans = []
    for part in parts:
        start = part.start
        for piece in text[part.start : part.end].split(delimiter):
            if piece.strip():
                spans.append((start, start + len(piece)))
            start += len(piece) + len(delimiter)
    if not spans:
        raise _wrong("prompt holds nothing but delimiters and white space")
    return spans


def _wrong(message: str, param: str = "prompt") -> RequestError:
    return RequestError("invalid_request", message, param=param)


# What goes back -------------------------------------------------------------------------------------------------------


def _response(body: ExplainBody, parts: list[Part], found: Explanation) -> dict[str, Any]:
    scores = found.scores.double()
    if body.postprocessing == "absolute":
        scores = scores.abs()
    elif body.postprocessing == "square":
        scores = scores.square()
    parts = _as_shown(parts, body, found.prompt)
    if body.target_granularity == "token":
        ends, length = [], 0
        for token in found.target_tokens:
            length += len(token)
            ends.append(length)
        explanations = [
            _explanation(body, parts, found, scores[:, number], token, ends[number] - len(token))
            for number, token in enumerate(found.target_tokens)
        ]
    else:
        explanations = [_explanation(body, parts, found, scores.sum(1), found.target, 0)]
    return {"model_version": f"{found.settings['model']} {found.settings['versions']['atman_kernels']}"} | {
        "explanations": explanations
    }


def _as_shown(parts: list[Part], body: ExplainBody, shown: str) -> list[Part]:
    """Where the items stand in the explained text, which a processor of pictures may have added to."""
    if all(part.kind != "image" for part in parts) or isinstance(body.prompt, str):
        return parts
    moved, cursor = [], 0
    for part, item in zip(parts, body.prompt, strict=True):
        if part.kind != "image" and isinstance(item.data, str):
            start = max(shown.find(item.data, cursor), cursor)
            cursor = start + len(item.data)
            part = replace(part, start=start, end=cursor)
        moved.append(part)
    return moved


def _explanation(
    body: ExplainBody, parts: list[Part], found: Explanation, scores: Tensor, target: str, before: int
) -> dict[str, Any]:
    """Scores for one target; of earlier answer tokens those that end where it begins, or before."""
    kept = [number for number, unit in enumerate(found.units) if unit.source != "target" or unit.end <= before]
    values = {number: float(scores[number]) for number in kept}
    if body.normalize:
        least, most = min(values.values(), default=0.0), max(values.values(), default=0.0)
        values = {n: (value - least) / (most - least) if most > least else 0.0 for n, value in values.items()}
    items = [{"type": part.kind, "scores": _of_part(part, found, values)} for part in parts]
    earlier = [
        {"start": unit.start, "length": unit.end - unit.start, "score": values[number]}
        for number, unit in enumerate(found.units)
        if unit.source == "target" and number in values
    ]
    return {"target": target, "items": [*items, {"type": "target", "scores": earlier}]}


def _of_part(part: Part, found: Explanation, values: dict[int, float]) -> list[Any]:
    if part.kind == "image":
        return [
            {"rect": _rect(unit.box, part), "score": values[number]}
            for number, unit in enumerate(found.units)
            if unit.source == "image" and unit.image == part.image and unit.box is not None
        ]
    inside = [
        (max(unit.start, part.start), min(unit.end, part.end), values[number])
        for number, unit in enumerate(found.units)
        if unit.source == "prompt" and unit.start < unit.end and part.start <= unit.start < part.end
    ]
    if part.kind == "token_ids":
        # a token of white space alone is no unit, and counts for nothing; others' units begin after their white space
        return [sum(score for start, _, score in inside if first <= start < last) for first, last in part.tokens]
    return [{"start": start - part.start, "length": end - start, "score": score} for start, end, score in inside]


def _rect(box: tuple[int, int, int, int], part: Part) -> dict[str, float]:
    left, top, _ = part.crop or (0, 0, 0)
    width, height = part.size
    return {
        "left": (box[0] + left) / width,
        "top": (box[1] + top) / height,
        "width": (box[2] - box[0]) / width,
        "height": (box[3] - box[1]) / height,
    }
