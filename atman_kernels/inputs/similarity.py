"""Models that compare: the similarity of a text's embedding, or an image's, to another text."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atman_kernels.arguments import texts as texts_of
from atman_kernels.errors import InputError, UnsupportedModelError
from atman_kernels.formula import widened
from atman_kernels.hf.models.placement import input_device
from atman_kernels.inputs.encoder_inputs import EncoderInputs, encode, encoder_objective
from atman_kernels.inputs.limits import check_ids
from atman_kernels.inputs.objective import ForwardObjective
from atman_kernels.inputs.tokenization import checked_text

POOLINGS = ("mean", "cls", "last")


def text_objective(
    model: PreTrainedModel, part: PreTrainedModel, tokenizer: Any, read: EncoderInputs, target: Any, pooling: str
) -> ForwardObjective:
    """The cosine of a text's embedding with another text's, which is read without suppression.

    Args:
        part: whose attention is suppressed.
        read: the text that is explained.
        target: the other text.
        pooling: how an embedding is made of the states of its tokens, one of `POOLINGS`.

    Raises:
        InputError: there is no other text, or it does not fit the model.
        UnsupportedModelError: the model gives no states of its tokens.
    """
    if target is None:
        raise InputError("target is missing; an embedding model needs the text to compare the prompt's embedding with")
    target = checked_text(target, "target")

    def embed(rows: int, inputs: dict[str, Tensor]) -> Tensor:
        output = model(**inputs, return_dict=True)
        if not hasattr(output, "last_hidden_state"):
            raise UnsupportedModelError(f"{type(model).__name__} gives no states of its tokens that could be pooled")
        states = widened(output.last_hidden_state)  # (rows, L, E): no padding
        pooled = {"mean": states.mean(1), "cls": states[:, 0], "last": states[:, -1]}[pooling]
        return torch.nn.functional.normalize(pooled, dim=-1)

    ids = torch.tensor([encode(tokenizer, model, target, name="target")["input_ids"]], device=input_device(model))
    with torch.no_grad():
        other = embed(1, {"input_ids": ids})[0]
    return encoder_objective(
        part,
        read,
        target,
        "cosine",
        lambda rows: (embed(rows, read.repeated(rows)) @ other)[:, None],
        {"pooling": pooling},
    )


def image_objective(
    model: PreTrainedModel, part: PreTrainedModel, processor: Any, read: EncoderInputs, target: Any, labels: Any
) -> ForwardObjective:
    """The similarity of an image to a text, as the model scales it: a log-probability among labels, or the logit.

    Args:
        part: the encoder that sees the image, whose attention is suppressed.
        read: the image.
        target: the text.
        labels: the texts among which it is one; None: there are no others.

    Raises:
        InputError: the texts do not fit one another or the model.
    """
    target = checked_text(target, "target")
    labels = [target] if labels is None else texts_of(labels, "labels")
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
    texts = {name: x.to(input_device(model)) for name, x in texts.items() if name in ("input_ids", "attention_mask")}
    if sigmoid:
        texts.pop("attention_mask", None)  # it was trained with its padding in sight
    label = labels.index(target)

    def values(rows: int) -> Tensor:
        logits = widened(model(**texts, **read.repeated(rows), return_dict=True).logits_per_image)
        if sigmoid:
            logits = torch.nn.functional.logsigmoid(logits)
        elif len(labels) > 1:
            logits = logits.log_softmax(-1)
        return logits[:, label : label + 1]

    value = "log-probability" if sigmoid or len(labels) > 1 else "logit"
    return encoder_objective(part, read, target, value, values, {"labels": labels})
