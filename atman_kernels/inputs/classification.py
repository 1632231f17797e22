"""Classifiers of texts, pairs of texts and images: the log-probability of a label."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atman_kernels.arguments import integer
from atman_kernels.errors import InputError
from atman_kernels.formula import widened
from atman_kernels.inputs.encoder_inputs import EncoderInputs, encoder_objective
from atman_kernels.inputs.objective import ForwardObjective


def label_objective(
    model: PreTrainedModel, part: PreTrainedModel, read: EncoderInputs, target: str | int | None
) -> ForwardObjective:
    """The log-probability of a label; the logit itself of a model that has one output only, such as a reranker."""

    def logits(rows: int) -> Tensor:
        return widened(model(**read.repeated(rows), return_dict=True).logits)

    with torch.no_grad():
        try:
            own = logits(1)[0]
        except (IndexError, ValueError) as error:
            raise InputError(f"prompt does not fit {type(model).__name__}: {str(error).splitlines()[0]}") from error
    label = _label(model, target, own)
    several = getattr(model.config, "problem_type", None) == "multi_label_classification"
    single = own.shape[-1] == 1 or getattr(model.config, "problem_type", None) == "regression"

    def values(rows: int) -> Tensor:
        found = logits(rows)
        if not single:
            found = torch.nn.functional.logsigmoid(found) if several else found.log_softmax(-1)
        return found[:, label : label + 1]

    names = getattr(model.config, "id2label", None) or {}
    value = "logit" if single else "log-probability"
    return encoder_objective(part, read, str(names.get(label, label)), value, values, {"label": label})


def _label(model: PreTrainedModel, target: Any, logits: Tensor) -> int:
    """The index of a label that is given by name or index; the model's own choice if none is."""
    count = logits.shape[-1]
    if target is None:
        return int(logits.argmax())
    if not isinstance(target, str):
        return integer(target, "target", least=0, most=count - 1, expected=f"a label in [0, {count}) or its name")
    names: dict[int, str] = {
        index: str(name) for index, name in (getattr(model.config, "id2label", None) or {}).items()
    }
    matching = [index for index, name in names.items() if name == target]
    matching = matching or [i for i, name in names.items() if name.casefold() == target.casefold()]
    if len(matching) != 1:
        shown = ", ".join(map(repr, list(names.values())[:8])) + (", …" if len(names) > 8 else "")
        raise InputError(f"target must be one of the model's labels ({shown}) or the index of one, got {target!r}")
    return matching[0]
