"""One family tried: a tiny model of it is explained, and next to each score stands what transformers itself computes.

`Trial` is a question put twice, once to the package and once to the model with its scores changed on their way into
softmax. One function per kind of model makes it.
"""

import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import blip_oracle
import eager_oracle
import image_text_cases
import softmax_oracle
import tiny_configs
import tiny_image_models
import tiny_models
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, WhisperFeatureExtractor

import atman_kernels as ak
from atman_kernels.hf.images.layouts import IMAGE_FAMILIES
from atman_kernels.hf.models import families

MODES = ("log_additive", "multiplicative", "shifted")
EXACT = 1e-3  # nats; float32 models of random weights, some of them ill-conditioned
STATES = ("packed", "batched", "text only", "refused", "not built", "failed", "wrong")
FACTOR = 0.1


@dataclass(frozen=True)
class Result:
    """What came of one family.

    Attributes:
        kind: of model, a key of `coverage_table.KINDS`.
        family: transformers' model_type.
        model: the class.
        state: one of `STATES`.
        difference: largest one between an explanation's scores and the oracle's over all modes.
        size: largest score of the oracle, to hold the difference against.
        remark: the reason, or what is special.
    """

    kind: str
    family: str
    model: str
    state: str
    difference: float | None = None
    size: float | None = None
    remark: str = ""


@dataclass(frozen=True)
class Trial:
    """A model and one question about it.

    Attributes:
        model: in eval mode.
        reader: its tokenizer or processor.
        ask: puts the question to the package.
        values: (m,) what is asked for, by the model's own forward.
        keys: positions that factors speak of; None: up to the last one that belongs to a unit.
        queries: numbers of queries that attend to these keys, where they are not as many.
        oracle: the context in which the model's scores are changed by factors (keys,) in a mode; None: by `queries`.
        modes: those to compare.
        text_only: whether the model reads more than was asked about.
        remarks: what is special.
    """

    model: PreTrainedModel
    reader: Any
    ask: Callable[[ak.Explainer], ak.Explanation]
    values: Callable[[], Tensor]
    keys: int | None = None
    queries: tuple[int, ...] = ()
    oracle: Callable[[Tensor, str], AbstractContextManager[Any]] | None = None
    modes: tuple[str, ...] = MODES
    text_only: bool = False
    remarks: tuple[str, ...] = ()

    def under(self, row: Tensor, mode: str) -> Tensor:
        """(m,) values with factors (keys,), in float64."""
        oracle: Any
        if self.oracle is not None:
            oracle = self.oracle(row, mode)
        elif self.model.config.model_type in SCORES_ELSEWHERE:
            oracle = eager_oracle.suppressed(self.model, row[None], mode, None)
        else:
            oracle = softmax_oracle.Suppressed(row, mode, queries=(len(row), *self.queries))
        with torch.no_grad(), oracle:
            found = self.values().double()
        assert getattr(oracle, "calls", 1), "no attention was seen"
        return found


# Families whose eager attention takes the row's maximum off before softmax, or works its sinks out from the scores
# beside it: what softmax sees is not what the formula speaks of. An attention function of the tests' own serves them.
SCORES_ELSEWHERE = {"gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash", "openai_privacy_filter"}

# the same, where that function will not do either, since indexers speak to transformers' own only
SHIFTED = {"hy_v4"}


def tried(
    kind: str,
    config_class: type[PreTrainedConfig],
    model_class: type[PreTrainedModel],
    trial_of: Callable[[type[PreTrainedConfig], type[PreTrainedModel]], Trial],
) -> Result:
    """What comes of a family; every way to end is a state, none an exception."""
    name = (kind, config_class.model_type, model_class.__name__)
    try:
        trial = trial_of(config_class, model_class)
    except ak.UnsupportedModelError as error:
        return Result(*name, "refused", remark=_reason(str(error)))
    except Exception as error:  # whatever a family's code has against tiny sizes
        return Result(*name, "not built", remark=_line(error))
    trouble = _trouble(trial)
    try:
        if trouble == NOT_FINITE:
            return Result(*name, "not built", remark=trouble)
        return _compared(name, trial)
    except ak.UnsupportedModelError as error:
        return Result(*name, "refused", remark=_reason(str(error)))
    except Exception as error:
        if trouble is not None:  # the model alone cannot do it either
            return Result(*name, "not built", remark=trouble)
        if isinstance(error, ak.InputError):
            return Result(*name, "refused", remark=_reason(str(error)))
        return Result(*name, "wrong", remark=f"{type(error).__name__}: {_line(error)}")


NOT_FINITE = "random weights give no finite answer"


def _trouble(trial: Trial) -> str | None:
    """Why the model does not answer even without us."""
    try:
        with torch.no_grad():
            return None if bool(trial.values().isfinite().all()) else NOT_FINITE
    except Exception as error:
        return _line(error)


def _compared(name: tuple[str, str, str], trial: Trial) -> Result:
    """One explanation per mode, held against one full forward of transformers' own attention per score."""
    difference, size, paths, remarks = 0.0, 0.0, set(), list(trial.remarks)
    for mode in trial.modes:
        explainer = ak.Explainer(trial.model, trial.reader, mode=mode, factor=FACTOR, progress=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            explanation = trial.ask(explainer)
        paths.add(explanation.settings["path"])
        if explainer.runner.unpackable:
            remarks.append(explainer.runner.unpackable)
        expected = _expected(trial, explanation, mode)
        difference = max(difference, float((explanation.scores.double() - expected).abs().max()))
        size = max(size, float(expected.abs().max()))
    state = "batched" if "batched" in paths else "packed"
    if trial.text_only:
        state, remarks = "text only", [state, *remarks]
    if not difference <= EXACT:
        state = "wrong"
    return Result(*name, state, difference, size, "; ".join(dict.fromkeys(remarks)))


def _expected(trial: Trial, explanation: ak.Explanation, mode: str) -> Tensor:
    """(n_units, m) in float64: what is asked for, minus that with a unit's keys suppressed."""
    keys = trial.keys or 1 + max(max(unit.token_indices) for unit in explanation.units)
    base = trial.under(torch.ones(keys), mode)
    with torch.no_grad():
        assert (trial.values() - base).abs().max() < EXACT, "the oracle itself moves what the model answers"
    rows = torch.ones(len(explanation.units), keys)
    for row, unit in zip(rows, explanation.units, strict=True):
        row[list(unit.token_indices)] = FACTOR
    return torch.stack([base - trial.under(row, mode) for row in rows])


def _line(error: BaseException) -> str:
    return " ".join(f"{error or type(error).__name__}".split())[:160]


def _reason(message: str) -> str:
    """Without the class's name, which stands beside it."""
    return message.split(": ", 1)[-1] if "cannot be" in message.split(": ", 1)[0] else message


# --- texts ---


def draw(count: int, seed: int) -> list[int]:
    """Token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, tiny_models.VOCABULARY, (count,), generator=generator).tolist()


def text_decoder(config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel]) -> Trial:
    """The log-probabilities of an answer of two tokens."""
    return _answer_to_text(tiny_configs.tiny_model(config_class, model_class))


def _answer_to_text(model: PreTrainedModel) -> Trial:
    n, ids = 11, torch.tensor(draw(11, 1) + draw(2, 2))
    prompt, answer = (tiny_models.text_of(part) for part in (ids[:n].tolist(), ids[n:].tolist()))

    def values() -> Tensor:
        logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0, n - 1 :].double()
        return logits.log_softmax(-1).gather(1, ids[n:, None])[:, 0]

    shifted = model.config.model_type in SHIFTED
    remarks = ["multiplicative mode not compared: the eager code shifts scores before softmax"] if shifted else []
    if families.families_in(model.get_decoder()):
        remarks.append("attention taken over inside its modules")
    return Trial(
        model,
        tiny_models.tokenizer(),
        ask=lambda explainer: explainer.explain(prompt, answer),
        values=values,
        keys=len(ids) - 1,
        modes=("log_additive", "shifted") if shifted else MODES,
        remarks=tuple(remarks),
    )


def _text_alone(model: PreTrainedModel, reader: Any, question: dict[str, Any]) -> Trial:
    """A text, for a model that reads more; `question` is one with more, which the package has to refuse.

    Raises:
        UnsupportedModelError: the refusal, where the model reads no text alone.
    """
    try:
        ak.Explainer(model, reader, progress=False).explain(**question)
    except (ak.UnsupportedModelError, ak.InputError) as error:
        trial, reason = _answer_to_text(model), _reason(str(error))
        if _trouble(trial):
            raise ak.UnsupportedModelError(reason) from error
        return replace(trial, text_only=True, remarks=(f"more than text refused: {reason}", *trial.remarks))
    raise AssertionError(f"{', '.join(question)} taken without a refusal")


def text_classifier(config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel]) -> Trial:
    """The log-probability of one of three labels."""
    model = tiny_configs.tiny_model(config_class, model_class, is_decoder=False, num_labels=3)
    ids = draw(11, 1)
    given = torch.tensor([ids])
    return Trial(
        model,
        tiny_models.tokenizer(),
        ask=lambda explainer: explainer.explain(tiny_models.text_of(ids), target=1),
        values=lambda: model(input_ids=given, return_dict=True).logits[0].log_softmax(-1)[1:2],
        keys=len(ids),
    )


def embedding_model(config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel]) -> Trial:
    """The cosine of a text's mean state with another text's."""
    model = tiny_configs.tiny_model(config_class, model_class, is_decoder=False)
    ids, other_ids = draw(11, 1), draw(4, 2)

    def mean(tokens: list[int]) -> Tensor:
        return model(input_ids=torch.tensor([tokens]), return_dict=True).last_hidden_state[0].mean(0)

    other = functools.cache(lambda: mean(other_ids))  # first asked for by `_trouble`: without suppression
    return Trial(
        model,
        tiny_models.tokenizer(),
        ask=lambda explainer: explainer.explain(tiny_models.text_of(ids), target=tiny_models.text_of(other_ids)),
        values=lambda: torch.cosine_similarity(mean(ids), other(), dim=0)[None],
        keys=len(ids),
    )


# --- pictures ---

SIDE, PATCH = 24, 8
POOLING = (1,)  # queries of a head that pools patches by attention


def _pixels() -> Tensor:
    return torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def image_classifier(config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel]) -> Trial:
    """The log-probability of one of three labels of a picture of nine patches."""
    model = tiny_configs.tiny_model(
        config_class, model_class, is_decoder=False, num_labels=3, image_size=SIDE, patch_size=PATCH
    )
    return Trial(
        model,
        tiny_models.tokenizer(),
        ask=lambda explainer: explainer.explain(images=_pixels(), target=1, units="patch"),
        values=lambda: model(pixel_values=_pixels()).logits[0].log_softmax(-1)[1:2],
        queries=POOLING,
    )


def dual_encoder(config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel]) -> Trial:
    """The log-probability of one of three texts for a picture."""
    length = 12
    model = tiny_configs.tiny_model(
        config_class, model_class, is_decoder=False, image_size=SIDE, patch_size=PATCH, max_position_embeddings=length
    )
    labels, label = ["w5 w6 </s>", "w9 w7 </s>", "w4 w4 </s>"], 1
    ids = torch.tensor([[5, 6, 2], [9, 7, 2], [4, 4, 2]])
    sigmoid = hasattr(model, "logit_bias")  # SigLIP, which was trained with its padding in sight
    if sigmoid:
        texts = {"input_ids": torch.nn.functional.pad(ids, (0, length - ids.shape[1]))}
    else:
        texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def values() -> Tensor:
        logits = model(**texts, pixel_values=_pixels()).logits_per_image[0]
        return (torch.nn.functional.logsigmoid(logits) if sigmoid else logits.log_softmax(-1))[label : label + 1]

    return Trial(
        model,
        SimpleNamespace(tokenizer=tiny_models.tokenizer(), image_processor=None),
        ask=lambda explainer: explainer.explain(images=_pixels(), target=labels[label], labels=labels),
        values=values,
        queries=POOLING,
    )


# --- source and target ---

START, TARGET = 2, (20, 21, 22)


def _target_logprobs(model: PreTrainedModel, source: dict[str, Tensor]) -> Tensor:
    given = torch.tensor([[START, *TARGET[:-1]]])
    logits = model(**source, decoder_input_ids=given, use_cache=False).logits[0].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(TARGET)[:, None])[:, 0]


def _begins_answers(model: PreTrainedModel) -> None:
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = START


def _samples() -> Tensor:
    return torch.randn(24000, generator=torch.Generator().manual_seed(0)) * 0.1  # 1.5 s at 16 kHz


def encoder_decoder(config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel]) -> Trial:
    """The log-probabilities of a translation of three tokens; of an answer, if there is but a decoder."""
    model = tiny_configs.tiny_model(config_class, model_class, is_decoder=False)
    if not model.config.is_encoder_decoder:
        return _text_alone(model, tiny_models.tokenizer(), {"audio": _samples(), "target": "w7"})
    _begins_answers(model)
    ids = draw(11, 1)
    source = torch.tensor([ids])
    return Trial(
        model,
        tiny_models.tokenizer(),
        ask=lambda explainer: explainer.explain(tiny_models.text_of(ids), target=tiny_models.text_of(list(TARGET))),
        values=lambda: _target_logprobs(model, {"input_ids": source}),
        keys=len(ids),
        queries=(len(TARGET),),
    )


def speech_model(config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel]) -> Trial:
    """The log-probabilities of a transcript of three tokens; of an answer to a text, if there is but a decoder."""
    bins, seconds, positions = 8, 2, 100
    model = tiny_configs.tiny_model(
        config_class, model_class, is_decoder=False, num_mel_bins=bins, max_source_positions=positions
    )
    if not model.config.is_encoder_decoder:
        return _text_alone(model, tiny_models.tokenizer(), {"audio": _samples(), "target": "w7"})
    _begins_answers(model)
    extractor = WhisperFeatureExtractor(feature_size=bins, chunk_length=seconds)
    samples = _samples()
    heard = extractor(samples.numpy(), sampling_rate=16000, return_tensors="pt")["input_features"]
    return Trial(
        model,
        SimpleNamespace(tokenizer=tiny_models.tokenizer(), feature_extractor=extractor),
        ask=lambda explainer: explainer.explain(audio=samples, target=tiny_models.text_of(list(TARGET)), units=0.5),
        values=lambda: _target_logprobs(model, {"input_features": heard}),
        keys=positions,
        queries=(len(TARGET),),
    )


# --- pictures and texts ---


def image_text_model(config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel]) -> Trial:
    """The log-probabilities of an answer about a picture; about a text alone, where no picture can be explained."""
    if config_class.model_type == "blip":
        return _caption()
    family = config_class.model_type.replace("blip-2", "blip2")
    if family not in tiny_image_models.MODELS:
        if config_class.model_type in IMAGE_FAMILIES:
            raise NotImplementedError("its images are explained, but there is no tiny processor of it here")
        model = tiny_configs.tiny_model(config_class, model_class)
        question = {"text": "w5 w6", "images": tiny_image_models.picture(SIDE, SIDE), "target": "w7"}
        return _text_alone(model, _Placeholders(tiny_models.tokenizer()), question)
    model, processor = tiny_image_models.build(family), tiny_image_models.processor(family)
    model.set_attn_implementation("eager")
    images, text = [tiny_image_models.picture(40, 30)], image_text_cases.TEXTS[family]
    answer = torch.tensor([int(word[1:]) for word in image_text_cases.ANSWER.split()])
    inputs, n = image_text_cases.made_by_hand(family, processor, images, text, answer)

    def values() -> Tensor:
        logits = model(**inputs, use_cache=False).logits[0, n - 1 :].double()
        return logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]

    return Trial(
        model,
        processor,
        ask=lambda explainer: explainer.explain(images=images, text=text, target=image_text_cases.ANSWER),
        values=values,
        keys=inputs["input_ids"].shape[1],
    )


def _caption() -> Trial:
    """BLIP's: keys of the image are attended to across, those of the text by itself."""
    kind, text = "caption", blip_oracle.PROMPTS["caption"]
    model, pixels = blip_oracle.build(kind), blip_oracle.pixels_of(blip_oracle.PICTURE)
    return Trial(
        model,
        blip_oracle.processor(),
        ask=lambda explainer: explainer.explain(text, blip_oracle.ANSWER, images=blip_oracle.PICTURE),
        values=lambda: blip_oracle.logprobs(model, kind, text, pixels),
        keys=blip_oracle.STATES + len(text.split()) + 1,
        oracle=lambda row, mode: blip_oracle.changed(
            model, blip_oracle.factors_by_place(kind, row, vision=False), mode
        ),
    )


class _Placeholders:
    """A processor of a model whose real one needs files: pixels, and no tokens for them."""

    image_processor = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(self, images: Any, text: str, **options: Any) -> dict[str, Tensor]:
        return {"input_ids": self.tokenizer(text, return_tensors="pt")["input_ids"], "pixel_values": _pixels()}


# --- all else ---


def other_model(config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel]) -> Trial:
    """The cosine of two texts, unless the model is refused as what reads no text, or has another purpose."""
    model = tiny_configs.tiny_model(config_class, model_class, is_decoder=False, image_size=SIDE, patch_size=PATCH)
    task = ak.Explainer(model, tiny_models.tokenizer(), progress=False).task
    return _answer_to_text(model) if task == "text-generation" else embedding_model(config_class, model_class)
