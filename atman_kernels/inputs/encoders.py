"""What is measured of a model that is no causal language model: a label, a likeness, a translation, a transcript.

`task_of` is the one place that says which model is asked what.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atman_kernels.arguments import choice, integer
from atman_kernels.arguments import texts as texts_of
from atman_kernels.errors import InputError, UnsupportedModelError
from atman_kernels.hf.models import tasks
from atman_kernels.inputs import blip, seq2seq
from atman_kernels.inputs.encoder_inputs import Reading, checked_text, encode, only, read_audio, read_image, read_text
from atman_kernels.inputs.image_text import read_source
from atman_kernels.inputs.limits import check_ids
from atman_kernels.run.full_rows import Task

POOLINGS = ("mean", "cls", "last")


@dataclass(frozen=True)
class Asked:
    """The arguments of `Explainer.explain`, as they came."""

    prompt: Any
    images: Any
    audio: Any
    target: Any
    units: Any
    image_units: Any
    labels: Sequence[str] | None
    pooling: str
    max_new_tokens: int
    language: str
    vision: bool

    @property
    def picture_units(self) -> Any:
        """Units of a picture that is all a model reads, for which either name will do."""
        return self.units if self.image_units == "patch" else self.image_units


def task_of(model: PreTrainedModel, processor: Any, name: tasks.Task, asked: Asked) -> Task:
    """What a model is asked, ready to run.

    Raises:
        InputError: an argument does not fit the model.
        UnsupportedModelError: the model cannot be explained, with the reason.
    """
    given = {"prompt": asked.prompt, "images": asked.images, "audio": asked.audio}
    wanted = {
        "image-classification": "images",
        "zero-shot-image-classification": "images",
        "visual-question-answering": "images",
        "image-to-text": "images",
        "image-text-to-text": "images",
        "automatic-speech-recognition": "audio",
    }.get(name, "prompt")
    if name in ("visual-question-answering", "image-to-text", "image-text-to-text"):
        del given["prompt"]  # may come, too
    thing = only(given, wanted, model)
    choice(asked.pooling, "pooling", POOLINGS)
    if asked.labels is not None and name != "zero-shot-image-classification":
        raise InputError(f"labels are for models that compare images with texts; {type(model).__name__} is none")
    if asked.pooling != "mean" and name != "feature-extraction":
        raise InputError(f"pooling is for embedding models; {type(model).__name__} is none")
    if wanted == "prompt" and isinstance(thing, tuple) and name != "text-classification":
        raise InputError(f"prompt must be a text, got a pair; {type(model).__name__} is no classifier of pairs")
    part = tasks.part_of(model, name)
    if name in ("text2text-generation", "automatic-speech-recognition", "image-text-to-text"):
        tokenizer = seq2seq.tokenizer_of(processor)
        if name == "image-text-to-text":
            read = read_source(
                model, processor, tokenizer, asked.prompt, thing, asked.units, asked.image_units, asked.language
            )
        elif name == "automatic-speech-recognition":
            read = read_audio(model, processor, thing, asked.units)
        else:
            read = read_text(model, tokenizer, thing, asked.units, asked.language)
        return seq2seq.task(part, tokenizer, read, asked.target, asked.max_new_tokens)
    if name in ("visual-question-answering", "image-to-text"):
        return blip.task(
            model,
            processor,
            asked.prompt,
            thing,
            asked.target,
            asked.units,
            asked.image_units,
            vision=asked.vision,
            max_new_tokens=asked.max_new_tokens,
            language=asked.language,
        )
    if name in ("image-classification", "zero-shot-image-classification"):
        read = read_image(model, part, processor, thing, asked.picture_units)
        ask = _label_task if name == "image-classification" else _likeness_to_text
        return ask(model, part, processor, read, asked)
    read = read_text(model, processor, thing, asked.units, asked.language)
    return (_label_task if name == "text-classification" else _embedding_task)(model, part, processor, read, asked)


def _task(
    part: PreTrainedModel,
    read: Reading,
    target: str,
    value: str,
    values: Callable[[int], Tensor],
    facts: dict[str, Any],
) -> Task:
    embeddings = None
    if "input_ids" in read.inputs:

        def embeddings() -> Tensor:
            return part.get_input_embeddings()(read.inputs["input_ids"])[0].float().cpu()

    return Task(
        prompt=read.shown,
        target=target,
        units=read.units,
        target_tokens=(target,),
        positions=read.positions,
        cost=read.positions,
        part=part,
        values=values,
        value=value,
        embeddings=embeddings,
        facts=_named(value) | read.facts | facts,
    )


def _named(value: str) -> dict[str, Any]:
    """What an explanation calls its scores; it knows log-probabilities and rises of a loss by itself."""
    return {} if value == "log-probability" else {"value": value, "measure": f"fall of the {value} when suppressed"}


# Labels -------------------------------------------------------------------------------------------------------


def _label_task(model: PreTrainedModel, part: PreTrainedModel, processor: Any, read: Reading, asked: Asked) -> Task:
    """The log-probability of a label; the logit itself of a model that has one output only, such as a reranker."""

    def logits(rows: int) -> Tensor:
        return _wide(model(**read.repeated(rows), return_dict=True).logits)

    with torch.inference_mode():
        try:
            own = logits(1)[0]
        except (IndexError, ValueError) as error:
            raise InputError(f"prompt does not fit {type(model).__name__}: {str(error).splitlines()[0]}") from error
    label = _label(model, asked.target, own)
    several = getattr(model.config, "problem_type", None) == "multi_label_classification"
    single = own.shape[-1] == 1 or getattr(model.config, "problem_type", None) == "regression"

    def values(rows: int) -> Tensor:
        found = logits(rows)
        if not single:
            found = torch.nn.functional.logsigmoid(found) if several else found.log_softmax(-1)
        return found[:, label : label + 1]

    names = getattr(model.config, "id2label", None) or {}
    value = "logit" if single else "log-probability"
    return _task(part, read, str(names.get(label, label)), value, values, {"label": label})


def _label(model: PreTrainedModel, target: Any, logits: Tensor) -> int:
    """The index of a label that is given by name or index; the model's own choice if none is."""
    count = logits.shape[-1]
    if target is None:
        return int(logits.argmax())
    if not isinstance(target, str):
        return integer(target, "target", least=0, most=count - 1, expected=f"a label in [0, {count}) or its name")
    names = {index: str(name) for index, name in (getattr(model.config, "id2label", None) or {}).items()}
    matching = [index for index, name in names.items() if name == target]
    matching = matching or [i for i, name in names.items() if name.casefold() == target.casefold()]
    if len(matching) != 1:
        shown = ", ".join(map(repr, list(names.values())[:8])) + (", …" if len(names) > 8 else "")
        raise InputError(f"target must be one of the model's labels ({shown}) or the index of one, got {target!r}")
    return matching[0]


# Likeness -----------------------------------------------------------------------------------------------------


def _embedding_task(model: PreTrainedModel, part: PreTrainedModel, tokenizer: Any, read: Reading, asked: Asked) -> Task:
    """The cosine of the text's embedding with another text's, which is read without suppression."""
    if asked.target is None:
        raise InputError("target is missing; an embedding model needs the text to compare the prompt's embedding with")
    target = checked_text(asked.target, "target")

    def embed(rows: int, inputs: dict[str, Tensor]) -> Tensor:
        output = model(**inputs, return_dict=True)
        if not hasattr(output, "last_hidden_state"):
            raise UnsupportedModelError(f"{type(model).__name__} gives no states of its tokens that could be pooled")
        states = _wide(output.last_hidden_state)  # (rows, L, E): no padding
        pooled = {"mean": states.mean(1), "cls": states[:, 0], "last": states[:, -1]}[asked.pooling]
        return torch.nn.functional.normalize(pooled, dim=-1)

    ids = torch.tensor([encode(tokenizer, model, target, name="target")["input_ids"]], device=model.device)
    with torch.inference_mode():
        other = embed(1, {"input_ids": ids})[0]
    return _task(
        part,
        read,
        target,
        "cosine",
        lambda rows: (embed(rows, read.repeated(rows)) @ other)[:, None],
        {"pooling": asked.pooling},
    )


def _likeness_to_text(
    model: PreTrainedModel, part: PreTrainedModel, processor: Any, read: Reading, asked: Asked
) -> Task:
    """The likeness of an image to a text, as the model scales it: a log-probability among labels, or the logit."""
    target = checked_text(asked.target, "target")
    labels = [target] if asked.labels is None else texts_of(asked.labels, "labels")
    if target not in labels:
        raise InputError(f"target must be one of the labels, got {target!r}")
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        raise InputError(f"tokenizer must be {type(model).__name__}'s processor, got {type(processor).__name__}")
    sigmoid = hasattr(model, "logit_bias")  # SigLIP judges each text for itself
    length = model.config.text_config.max_position_embeddings
    for text, ids in zip(labels, tokenizer(labels)["input_ids"], strict=True):
        if len(ids) > length:
            raise InputError(f"target and labels have {length} tokens at most, got {len(ids)} in {text[:40]!r}")
        check_ids(model.text_model, tokenizer, ids, "prompt" if text != target else "target")
    fixed = {"padding": "max_length", "max_length": length} if sigmoid else {"padding": True}
    texts = dict(tokenizer(labels, return_tensors="pt", **fixed))
    texts = {name: x.to(model.device) for name, x in texts.items() if name in ("input_ids", "attention_mask")}
    if sigmoid:
        texts.pop("attention_mask", None)  # it was trained with its padding in sight
    label = labels.index(target)

    def values(rows: int) -> Tensor:
        logits = _wide(model(**texts, **read.repeated(rows), return_dict=True).logits_per_image)
        if sigmoid:
            logits = torch.nn.functional.logsigmoid(logits)
        elif len(labels) > 1:
            logits = logits.log_softmax(-1)
        return logits[:, label : label + 1]

    value = "log-probability" if sigmoid or len(labels) > 1 else "logit"
    return _task(part, read, target, value, values, {"labels": labels})


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
