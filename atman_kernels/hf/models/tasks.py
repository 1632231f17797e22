"""What a model is for, by the names of transformers' pipelines. Told by transformers' own tables of model classes."""

import inspect
from typing import Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto as tables

from atman_kernels.errors import InputError, UnsupportedModelError
from atman_kernels.hf.models.parts import decoder_of, reachable

Task = Literal[
    "text-generation",  # by a causal decoder; images among its tokens included
    "text2text-generation",  # by an encoder-decoder
    "image-text-to-text",  # by an encoder-decoder behind a vision tower: BLIP-2 over T5
    "automatic-speech-recognition",
    "text-classification",
    "image-classification",
    "zero-shot-image-classification",
    "visual-question-answering",  # BLIP's
    "image-to-text",  # BLIP's captions
    "feature-extraction",  # embeddings of texts
]

# A class is looked up from the top; what stands in none of these is taken for a causal language model.
_TABLES: tuple[tuple[Task, tuple[str, ...]], ...] = (
    ("automatic-speech-recognition", ("SPEECH_SEQ_2_SEQ",)),
    ("text-generation", ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT")),
    ("text2text-generation", ("SEQ_TO_SEQ_CAUSAL_LM",)),
    ("text-classification", ("SEQUENCE_CLASSIFICATION",)),
    ("image-classification", ("IMAGE_CLASSIFICATION",)),
    ("zero-shot-image-classification", ("ZERO_SHOT_IMAGE_CLASSIFICATION",)),
)
# transformers has no table of BLIP's two
_BLIP: dict[str, Task] = {
    "BlipForConditionalGeneration": "image-to-text",
    "BlipForQuestionAnswering": "visual-question-answering",
}
_REFUSED = {
    "MASKED_LM": "fills in masked tokens",
    "TOKEN_CLASSIFICATION": "labels tokens",
    "QUESTION_ANSWERING": "marks an answer's ends in the text",
    "MULTIPLE_CHOICE": "chooses among texts",
    "NEXT_SENTENCE_PREDICTION": "judges pairs of sentences",
    "AUDIO_CLASSIFICATION": "labels audio",
    "CTC": "labels audio frames",
    "OBJECT_DETECTION": "finds objects",
    "SEMANTIC_SEGMENTATION": "labels pixels",
}


def task_of(model: nn.Module) -> Task:
    """What a model is for, which decides what can be asked of it.

    Raises:
        InputError: `model` is not a transformers model.
        UnsupportedModelError: it is for something that is not explained.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(vocab_size=9, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
        >>> task_of(BertForSequenceClassification(config))
        'text-classification'
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    name = type(model).__name__
    for base in type(model).__mro__:
        if base.__name__ in _BLIP:
            return _BLIP[base.__name__]
    both = bool(getattr(model.config, "is_encoder_decoder", False))
    for task, listed in _TABLES:
        if any(_is_in(model, table) for table in listed):
            if both == (task in ("text2text-generation", "automatic-speech-recognition")):
                return task
            if both:
                break
    if both and getattr(model.config, "model_type", None) == "blip-2" and _is_in(model, "IMAGE_TEXT_TO_TEXT"):
        return "image-text-to-text"
    if both:
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder model that neither translates text nor transcribes speech, which is not "
            "supported"
        )
    for table, purpose in _REFUSED.items():
        if _is_in(model, table):
            raise UnsupportedModelError(f"{name} {purpose}; what it does cannot be explained here")
    if _is_headless(model):
        if not _reads_text(model):
            raise UnsupportedModelError(f"{name} has no head: there is no label or text whose score could change")
        return "feature-extraction"
    if not _reads_text(model) and not model.can_generate():
        raise UnsupportedModelError(f"{name} reads no text, and is for nothing that can be explained here")
    return "text-generation"


def part_of(model: PreTrainedModel, task: Task) -> PreTrainedModel:
    """The part whose attention is suppressed: all stacks of an encoder-decoder, the tower that sees the image.

    Raises:
        UnsupportedModelError: its attention cannot be reached, with the reason.
    """
    if task in (
        "text2text-generation",
        "automatic-speech-recognition",
        "visual-question-answering",
        "image-to-text",
    ):
        return reachable(model, type(model).__name__)
    if task == "image-text-to-text":  # BLIP-2 over T5
        return decoder_of(model)
    if task in ("image-classification", "zero-shot-image-classification"):
        tower = getattr(model, "vision_model", None)
        if isinstance(tower, PreTrainedModel):
            return reachable(tower, type(model).__name__)
    if task == "zero-shot-image-classification":
        raise UnsupportedModelError(f"{type(model).__name__} has no part of its own that sees the image")
    return decoder_of(model)


def _is_in(model: PreTrainedModel, table: str) -> bool:
    names = _classes(getattr(tables, f"MODEL_FOR_{table}_MAPPING_NAMES", {}).values())
    return any(base.__name__ in names for base in type(model).__mro__)


def _reads_text(model: PreTrainedModel) -> bool:
    """Some towers leave the name of what they read at transformers' default."""
    return model.main_input_name == "input_ids" and "input_ids" in inspect.signature(type(model).forward).parameters


def _is_headless(model: PreTrainedModel) -> bool:
    return type(model).__name__ in _classes(tables.MODEL_MAPPING_NAMES.values()) and not model.can_generate()


def _classes(values: object) -> set[str]:
    """Names of classes; a table may give several for one model type."""
    found: set[str] = set()
    for value in values:  # type: ignore[attr-defined]
        found |= {value} if isinstance(value, str) else set(value)
    return found
