"""From a model's task to what is asked of it: the one table in which every kind of model has its row.

A new kind of model is a builder in a module of this package, and a row here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedModel

from atman_kernels.arguments import choice
from atman_kernels.errors import InputError
from atman_kernels.hf.models.tasks import Task, part_of
from atman_kernels.inputs import blip, seq2seq, similarity
from atman_kernels.inputs.classification import label_objective
from atman_kernels.inputs.encoder_inputs import only, read_audio, read_image, read_text
from atman_kernels.inputs.image_text import ask_about_images, check_without_images, read_source
from atman_kernels.inputs.objective import Objective
from atman_kernels.inputs.request import Request
from atman_kernels.inputs.text_generation import CausalObjective, ask_all
from atman_kernels.inputs.tokenization import tokenizer_of
from atman_kernels.planning.levels import Levels

CAUSAL: Task = "text-generation"


@dataclass(frozen=True)
class Reader:
    """What is given to a model, and who reads it.

    Attributes:
        model, processor: as they came; the processor may be a tokenizer.
        task: of the model.
    """

    model: PreTrainedModel
    processor: Any
    task: Task

    @property
    def part(self) -> PreTrainedModel:
        """Whose attention is suppressed."""
        return part_of(self.model, self.task)

    @property
    def image_processor(self) -> Any:
        """The processor, if it reads images."""
        return self.processor if hasattr(self.processor, "image_processor") else None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, or what came in its place."""
        return self.processor if self.image_processor is None else self.processor.tokenizer


@dataclass(frozen=True)
class Row:
    """What a task takes, and who builds its objectives.

    Attributes:
        takes: the argument that must be there.
        build: makes the objectives of requests that belong to one call; the names are theirs in errors.
        beside: a prompt may come beside the images.
        pairs: the prompt may be a pair of texts.
        options: which of "labels" and "pooling" it has.
    """

    takes: Literal["prompt", "images", "audio"]
    build: Callable[[Reader, Sequence[Request], Sequence[str | None] | None], Sequence[Objective]]
    beside: bool = False
    pairs: bool = False
    options: tuple[str, ...] = ()


# Builders -----------------------------------------------------------------------------------------------------


def causal_objectives(
    reader: Reader, asked: Sequence[Request], names: Sequence[str | None] | None = None
) -> list[CausalObjective]:
    """Of requests that belong to one call: texts, all of them, or one with images.

    Args:
        names: of the requests, for errors; see `ask_all`.

    Raises:
        InputError: one of them does not fit; of several it says which.
        UnsupportedModelError: the model's images cannot be explained, with the reason.
    """
    common = asked[0].common
    options: dict[str, Any] = {
        "include_target": common.include_target,
        "chat": common.chat,
        "max_new_tokens": common.max_new_tokens,
        "language": common.language,
    }
    if not asked[0].has_images:
        entries = [(each.prompt, each.target, each.units) for each in asked]
        return ask_all(reader.model, reader.tokenizer, entries, names=names, **options)
    (only_one,) = asked
    return [
        ask_about_images(
            reader.model,
            reader.image_processor,
            reader.tokenizer,
            only_one.prompt,
            only_one.images,
            only_one.target,
            only_one.units,
            common.image_units,
            vision=common.vision,
            **options,
        )
    ]


def _text_to_text(reader: Reader, asked: Request) -> Objective:
    tokenizer = tokenizer_of(reader.processor)
    read = read_text(reader.model, tokenizer, asked.prompt, asked.units, asked.common.language)
    return seq2seq.objective(reader.part, tokenizer, read, asked.target, asked.common.max_new_tokens)


def _audio_to_text(reader: Reader, asked: Request) -> Objective:
    tokenizer = tokenizer_of(reader.processor)
    read = read_audio(reader.model, reader.processor, asked.audio, asked.units)
    return seq2seq.objective(reader.part, tokenizer, read, asked.target, asked.common.max_new_tokens)


def _images_to_text(reader: Reader, asked: Request) -> Objective:
    tokenizer = tokenizer_of(reader.processor)
    read = read_source(
        reader.model,
        reader.processor,
        tokenizer,
        asked.prompt,
        asked.images,
        asked.units,
        asked.common.image_units,
        asked.common.language,
    )
    return seq2seq.objective(reader.part, tokenizer, read, asked.target, asked.common.max_new_tokens)


def _blip(reader: Reader, asked: Request) -> Objective:
    return blip.objective(reader.model, reader.processor, asked)


def _text_label(reader: Reader, asked: Request) -> Objective:
    read = read_text(reader.model, reader.processor, asked.prompt, asked.units, asked.common.language)
    return label_objective(reader.model, reader.part, read, asked.target)


def _image_label(reader: Reader, asked: Request) -> Objective:
    read = read_image(reader.model, reader.part, reader.processor, asked.images, asked.only_image_units)
    return label_objective(reader.model, reader.part, read, asked.target)


def _image_among_texts(reader: Reader, asked: Request) -> Objective:
    read = read_image(reader.model, reader.part, reader.processor, asked.images, asked.only_image_units)
    return similarity.image_objective(reader.model, reader.part, reader.processor, read, asked.target, asked.labels)


def _embedding(reader: Reader, asked: Request) -> Objective:
    read = read_text(reader.model, reader.processor, asked.prompt, asked.units, asked.common.language)
    return similarity.text_objective(reader.model, reader.part, reader.processor, read, asked.target, asked.pooling)


def _each(
    builder: Callable[[Reader, Request], Objective],
) -> Callable[[Reader, Sequence[Request], Sequence[str | None] | None], list[Objective]]:
    """A builder of one objective, for every request."""
    return lambda reader, asked, names: [builder(reader, request) for request in asked]


ROWS: dict[Task, Row] = {
    CAUSAL: Row("prompt", causal_objectives),
    "text2text-generation": Row("prompt", _each(_text_to_text)),
    "automatic-speech-recognition": Row("audio", _each(_audio_to_text)),
    "image-text-to-text": Row("images", _each(_images_to_text), beside=True),
    "visual-question-answering": Row("images", _each(_blip), beside=True),
    "image-to-text": Row("images", _each(_blip), beside=True),
    "text-classification": Row("prompt", _each(_text_label), pairs=True),
    "image-classification": Row("images", _each(_image_label)),
    "zero-shot-image-classification": Row("images", _each(_image_among_texts), options=("labels",)),
    "feature-extraction": Row("prompt", _each(_embedding), options=("pooling",)),
}


def units_named(task: Task, asked: Request) -> Any:
    """The units as an explanation's settings name them."""
    row = ROWS[task]
    units = asked.only_image_units if row.takes == "images" and not row.beside else asked.units
    if isinstance(units, Levels):
        return list(units.names)
    return units if units is None or isinstance(units, str | int | float) else "spans"


# Checks -------------------------------------------------------------------------------------------------------


def check_request(reader: Reader, asked: Request) -> None:
    """Raises InputError if what was given is not what the model takes."""
    row, name = ROWS[reader.task], type(reader.model).__name__
    if reader.task == CAUSAL:
        _check_causal(reader, asked)
        return
    given = {"prompt": asked.prompt, "images": asked.images, "audio": asked.audio}
    if row.beside:
        del given["prompt"]  # may come, too
    thing = only(given, row.takes, reader.model)
    choice(asked.pooling, "pooling", similarity.POOLINGS)
    if asked.labels is not None and "labels" not in row.options:
        raise InputError(f"labels are for models that compare images with texts; {name} is none")
    if asked.pooling != "mean" and "pooling" not in row.options:
        raise InputError(f"pooling is for embedding models; {name} is none")
    if row.takes == "prompt" and isinstance(thing, tuple) and not row.pairs:
        raise InputError(f"prompt must be a text, got a pair; {name} is no classifier of pairs")


def _check_causal(reader: Reader, asked: Request) -> None:
    if asked.is_nested and (asked.has_images or asked.common.include_target):
        other = "images" if asked.has_images else "include_target"
        raise InputError(f"nested units do not go with {other}: give one level of units")
    if asked.has_images:
        if asked.versus is not None:
            raise InputError("versus does not go with images; explain either answer by itself")
        return
    if asked.units is None:
        raise InputError("units is None, which needs images; without them nothing would get a score")
    check_without_images(reader.model, reader.image_processor, asked.prompt)
