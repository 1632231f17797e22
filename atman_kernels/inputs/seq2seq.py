"""Encoder-decoders: which parts of a source a translation, summary or transcript rests on.

Factors are over the encoder's positions. The target is teacher-forced in the decoder, behind the tokens that the
model begins its answers with.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase

from atman_kernels.errors import InputError
from atman_kernels.hf.forward.logprobs import logprobs_of
from atman_kernels.hf.models.placement import input_device
from atman_kernels.inputs.encoder_inputs import EncoderInputs
from atman_kernels.inputs.limits import check_length, positions_of, room_for_answer
from atman_kernels.inputs.objective import ForwardObjective
from atman_kernels.inputs.own_answer import check_said, generated
from atman_kernels.inputs.token_texts import token_texts_of
from atman_kernels.inputs.tokenization import checked_target_ids, checked_text, special_flags


def objective(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, read: EncoderInputs, target: Any, max_new_tokens: int
) -> ForwardObjective:
    """The question, with the model's own greedy answer if no target is given.

    Args:
        model: with encoder and decoder.
        read: the source.

    Raises:
        InputError: an argument does not fit, or the model does not say how its answers begin.
    """
    beginning, most = _beginning(model, tokenizer), positions_of(model.get_decoder())
    if target is None:
        check_length(len(beginning), most, "the beginning of every answer has")
        begun, answer = _answer(
            model, tokenizer, read, beginning, room_for_answer(len(beginning), most, max_new_tokens)
        )
    else:
        begun, answer = _tokens(tokenizer, checked_text(target, "target"), beginning)
    checked_target_ids(model, tokenizer, answer)
    check_length(len(begun) + len(answer) - 1, most, "target and its beginning have")
    decoder_ids = torch.tensor([begun + answer[:-1]], device=input_device(model))
    rows = torch.arange(len(answer), device=input_device(model)) + len(begun) - 1
    targets = torch.tensor([answer], device=input_device(model))

    def values(count: int) -> Tensor:
        inputs = {**read.repeated(count), "decoder_input_ids": decoder_ids.expand(count, -1)}
        return logprobs_of(model, inputs, rows, targets.expand(count, -1))

    def embeddings() -> Tensor:
        merged = read.inputs.get("inputs_embeds")
        merged = model.get_input_embeddings()(read.inputs["input_ids"]) if merged is None else merged
        return merged[0].float().cpu()

    pieces, _ = token_texts_of(tokenizer, answer)
    return ForwardObjective(
        prompt=read.shown,
        target="".join(pieces) if target is None else target,
        units=read.units,
        target_tokens=tuple(pieces),
        keys=read.positions,
        row_cost=read.positions + decoder_ids.shape[1],
        suppressed=model,
        forward=values,
        read_embeddings=None if "input_features" in read.inputs else embeddings,
        facts={"attention": "both", **read.facts},
    )


def _beginning(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Decoder tokens before an answer: Whisper's language, task and timestamps, or the start token alone."""
    start = getattr(model.generation_config, "decoder_start_token_id", None)
    start = getattr(model.config, "decoder_start_token_id", None) if start is None else start
    if start is None:
        raise InputError(
            f"model: {type(model).__name__} does not say how its answers begin; set "
            "model.generation_config.decoder_start_token_id"
        )
    prefix = list(getattr(tokenizer, "prefix_tokens", None) or [])
    is_whisper = bool(prefix) and prefix[0] == start
    if is_whisper and getattr(model.generation_config, "is_multilingual", False) and not tokenizer.language:
        raise InputError(
            "tokenizer: this model knows many languages; say which by "
            'processor.tokenizer.set_prefix_tokens(language="english", task="transcribe")'
        )
    return prefix if is_whisper else [int(start)]


def _tokens(tokenizer: PreTrainedTokenizerBase, target: str, beginning: list[int]) -> tuple[list[int], list[int]]:
    """What is given to the decoder before the target, and the target.

    Special tokens that the tokenizer writes before a target (BART's <s>, mBART's language) are given, too; those
    after it are left out.
    """
    ids = list(tokenizer(text_target=target)["input_ids"])
    if ids[: len(beginning)] == beginning:
        ids = ids[len(beginning) :]
    before, answer = _without_specials(tokenizer, ids)
    return beginning + before, answer


def _without_specials(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> tuple[list[int], list[int]]:
    """Special tokens before the text, and the text without those after it."""
    plain = [i for i, special in enumerate(special_flags(tokenizer, ids)) if not special]
    return (ids[: plain[0]], ids[plain[0] : plain[-1] + 1]) if plain else (ids, [])


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    read: EncoderInputs,
    beginning: list[int],
    max_new_tokens: int,
) -> tuple[list[int], list[int]]:
    """The model's own greedy answer: what the decoder was given before it, and the answer without end marks."""
    inputs = dict(read.inputs)
    if "input_ids" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    given = torch.tensor([beginning], device=input_device(model))
    # not Whisper's own `generate`, which cuts audio into windows and returns text without its beginning
    said = generated(
        model,
        tokenizer,
        inputs,
        len(beginning),
        max_new_tokens,
        generate=partial(GenerationMixin.generate, model),
        decoder_input_ids=given,
    )
    before, answer = _without_specials(tokenizer, said)
    return beginning + before, check_said(answer)
