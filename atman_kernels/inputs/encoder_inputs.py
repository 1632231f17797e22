"""What an encoder reads, and the units of it: a text or a pair, an image, audio."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel

from atman_kernels.arguments import entries, integer, real, shown
from atman_kernels.errors import InputError, UnsupportedModelError
from atman_kernels.hf.images.patches import patch_grid
from atman_kernels.hf.images.places import seen_region
from atman_kernels.hf.models.parts import is_encoder_decoder
from atman_kernels.hf.models.placement import input_device
from atman_kernels.inputs.limits import check_ids, check_length, positions_of
from atman_kernels.inputs.objective import ForwardObjective
from atman_kernels.inputs.tokenization import check_fast, checked_text, special_flags
from atman_kernels.planning.image_units import Region, patch_units
from atman_kernels.planning.units import Unit, split_units

BETWEEN = "\n\n"  # the texts of a pair


@dataclass(frozen=True, eq=False)
class EncoderInputs:
    """What an encoder is given, and the units of it.

    Attributes:
        shown: what stands for it as a text, to which the units' characters refer.
        inputs: the model's arguments, batch 1.
        units: token positions are those of the keys in the part that reads.
        positions: number of those keys.
        facts: what an explanation's settings say of it.
    """

    shown: str
    inputs: dict[str, Tensor]
    units: tuple[Unit, ...]
    positions: int
    facts: dict[str, Any]

    def repeated(self, rows: int) -> dict[str, Tensor]:
        """The arguments for a batch of equal rows."""
        return {name: x.expand(rows, *x.shape[1:]) for name, x in self.inputs.items()}


# Text ---------------------------------------------------------------------------------------------------------


def encode(tokenizer: Any, model: PreTrainedModel, *texts: str, name: str = "prompt") -> BatchEncoding:
    """Token ids and all else the tokenizer makes of a text or a pair, with offsets.

    Raises:
        InputError: there is no fast tokenizer, the text is longer than the model's positions, or a token is none that
            the model knows.
    """
    check_fast(tokenizer)
    encoded = tokenizer(*texts, return_offsets_mapping=True)
    source = model.get_encoder() if is_encoder_decoder(model) else model
    check_length(len(encoded["input_ids"]), positions_of(source), f"{name} has")
    check_ids(model, tokenizer, encoded["input_ids"], name)
    return encoded


def read_text(model: PreTrainedModel, tokenizer: Any, prompt: Any, units: Any, language: str) -> EncoderInputs:
    """A text, or a pair, as an encoder reads it; its special tokens are units too.

    A pair is shown with an empty line between, and characters are counted in that.

    Raises:
        InputError: the text, the units or the tokenizer do not fit.
    """
    texts = [checked_text(part) for part in prompt] if isinstance(prompt, tuple) else [checked_text(prompt)]
    if len(texts) > 2:
        raise InputError(f"prompt must be a text or a pair of texts, got {len(texts)}")
    encoded = encode(tokenizer, model, *texts)
    ids, second = encoded["input_ids"], len(texts[0]) + len(BETWEEN)
    found = split_units(
        BETWEEN.join(texts),
        [
            (start + second, end + second) if part == 1 else (start, end)
            for part, (start, end) in zip(encoded.sequence_ids(), encoded["offset_mapping"], strict=True)
        ],
        units,
        special=special_flags(tokenizer, ids),
        token_texts=tokenizer.convert_ids_to_tokens(ids),
        language=language,
    )
    taken = [name for name in ("input_ids", "token_type_ids") if name in encoded]
    inputs = {str(name): torch.tensor([encoded[name]], device=input_device(model)) for name in taken}
    return EncoderInputs(BETWEEN.join(texts), inputs, found, len(ids), {})


# Images -------------------------------------------------------------------------------------------------------


def read_image(model: PreTrainedModel, part: PreTrainedModel, processor: Any, images: Any, units: Any) -> EncoderInputs:
    """An image, or the pixel values that a processor made of one, as a vision transformer reads it.

    Class and register tokens stand before the patches and are no units.

    Raises:
        InputError: there is not one image, or units or processor do not fit.
        UnsupportedModelError: the model's tokens are not a grid of patches.
    """
    pixels, size, region = _pixels(model, processor, images)
    grid = patch_grid(model, part, pixels)
    tile = _tile(units, grid.rows, grid.columns)
    found = patch_units(grid.rows, grid.columns, size, tile, first_position=grid.before, region=region)
    return EncoderInputs(
        "", {"pixel_values": pixels}, found, grid.keys, {"images": [{"width": size[0], "height": size[1]}]}
    )


def _tile(units: Any, rows: int, columns: int) -> int:
    if isinstance(units, str) and units in ("token", "patch"):
        return 1
    if isinstance(units, str) and units == "image":
        return max(rows, columns)
    return integer(units, "units of an image", least=1, expected='"patch", "image" or n for tiles of n × n patches')


def one_or_several(images: Any) -> list[Any]:
    """Images as a list, where a single one is none: whatever they are, they are still to be checked."""
    is_array = str(getattr(images, "dtype", "object")) != "object"  # of numbers, not of pictures
    several = hasattr(images, "__iter__") and not isinstance(images, str | bytes | Mapping | set | frozenset)
    return entries(images, "images", "pictures") if several and not is_array else [images]


def _pixels(model: PreTrainedModel, processor: Any, images: Any) -> tuple[Tensor, tuple[int, int], Region | None]:
    """(1, C, H, W) for the model, the image's (width, height), and what of it the model sees."""
    listed = one_or_several(images)
    if len(listed) != 1:
        raise InputError(f"images must be one picture for {type(model).__name__}, got {len(listed)}")
    image = listed[0]
    if isinstance(image, Tensor):
        if image.ndim not in (3, 4) or (image.ndim == 4 and image.shape[0] != 1) or not image.is_floating_point():
            raise InputError(f"images as pixel values must be floating point (C, H, W), got {tuple(image.shape)}")
        if not bool(image.isfinite().all()):
            raise InputError("images as pixel values must be finite; they hold infinite or NaN entries")
        pixels = image if image.ndim == 4 else image[None]
        return pixels.to(input_device(model), model.dtype), (pixels.shape[3], pixels.shape[2]), None
    size = getattr(image, "size", None)
    if not (isinstance(size, tuple) and len(size) == 2):
        raise InputError(f"images must be a PIL image or a tensor of pixel values, got {type(image).__name__}")
    image_processor = getattr(processor, "image_processor", processor)
    if not hasattr(image_processor, "preprocess"):
        raise InputError(f"images need the model's image processor, got {type(processor).__name__}")
    pixels = image_processor(images=image, return_tensors="pt")["pixel_values"]
    return pixels.to(input_device(model), model.dtype), size, seen_region(image_processor, *size)


# Audio --------------------------------------------------------------------------------------------------------


def read_audio(model: PreTrainedModel, processor: Any, audio: Any, units: Any) -> EncoderInputs:
    """Audio as Whisper's encoder reads it: two mel frames are one position.

    Raises:
        InputError: audio, units or processor do not fit.
        UnsupportedModelError: the model does not read mel spectrograms as Whisper does.
    """
    name = type(model).__name__
    extractor = getattr(processor, "feature_extractor", None)
    most = getattr(model.config, "max_source_positions", None)
    if model.main_input_name != "input_features" or most is None or getattr(model.config, "num_mel_bins", None) is None:
        raise UnsupportedModelError(f"{name} does not read a mel spectrogram of fixed length, as Whisper does")
    if extractor is None:
        raise InputError(f"tokenizer must be {name}'s processor, which reads audio; got {type(processor).__name__}")
    try:
        samples = torch.as_tensor(audio, device="cpu").detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"audio must be samples (n,), got {type(audio).__name__}") from error
    if samples.ndim != 1 or not samples.is_floating_point() or not samples.numel():
        raise InputError(
            f"audio must be floating point samples (n,) at {extractor.sampling_rate} Hz, got {samples.dtype} "
            f"{tuple(samples.shape)}"
        )
    if not bool(samples.isfinite().all()):
        raise InputError("audio must be finite samples; it holds infinite or NaN entries")
    features = extractor(samples.numpy(), sampling_rate=extractor.sampling_rate, return_tensors="pt")["input_features"]
    per_position = features.shape[-1] / most * extractor.hop_length / extractor.sampling_rate  # seconds
    duration = samples.numel() / extractor.sampling_rate
    if duration > most * per_position + 1e-9:
        raise InputError(f"audio has {duration:.1f} s, but {name} reads {most * per_position:g} s at most")
    spans = _seconds(units, duration, per_position)
    shown, found = "", []
    for start, end in spans:
        first = min(int(start / per_position + 1e-6), most - 1)
        last = max(first + 1, min(most, math.ceil(end / per_position - 1e-6)))
        label = f"{start:g}–{end:g} s"
        shown += " | " if shown else ""
        found.append(Unit(label, len(shown), len(shown) + len(label), tuple(range(first, last))))
        shown += label
    facts = {"seconds": [list(span) for span in spans]}
    return EncoderInputs(
        shown, {"input_features": features.to(input_device(model), model.dtype)}, tuple(found), most, facts
    )


def _seconds(units: Any, duration: float, shortest: float) -> list[tuple[float, float]]:
    """Spans of audio; named and regular ones end with it, and leave out what pads it.

    Regular ones are at least as long as what one position of the model hears: `shortest` seconds.
    """
    expected = '"second", a number of seconds, or (start, end) spans'
    if isinstance(units, str) and units in ("token", "second"):
        units = 1.0
    if isinstance(units, str | bytes | Mapping) or not hasattr(units, "__iter__") or getattr(units, "ndim", 1) == 0:
        step = real(units, "units of a recording", expected, lambda x: 0 < x < math.inf)
        if step < shortest * (1 - 1e-6):
            raise InputError(f"units of a recording must be at least the {shortest:g} s of a position, got {step:g}")
        count = math.ceil(duration / step - 1e-9)
        return [(round(i * step, 6), round(min((i + 1) * step, duration), 6)) for i in range(count)]
    spans = entries(units, "units of a recording", "(start, end) spans")
    if not spans:
        raise InputError(f"units of a recording must be {expected}; got none")
    return [_checked_seconds(span, f"units[{index}]", duration) for index, span in enumerate(spans)]


def _checked_seconds(span: Any, name: str, duration: float) -> tuple[float, float]:
    try:
        start, end = (real(x, name, "seconds") for x in entries(span, name, "two numbers"))
    except ValueError:
        start, end = math.nan, math.nan
    if not 0 <= start < end <= duration + 1e-9:
        limits = f"(start, end) with 0 <= start < end <= {duration:g} s"
        raise InputError(f"{name}: got {shown(span)}, expected {limits}")
    return start, end


def only(given: Mapping[str, Any], wanted: str, model: PreTrainedModel) -> Any:
    """The one of "prompt", "images", "audio" that the model takes.

    Raises:
        InputError: it is missing, or another was given.
    """
    takes = f"{type(model).__name__} takes {'a text' if wanted == 'prompt' else wanted}"
    for name, value in given.items():
        if name != wanted and value is not None:
            raise InputError(f"{name} was given, but {takes}")
    if given[wanted] is None:
        raise InputError(f"{wanted} is missing; {takes}")
    return given[wanted]


# What is asked ------------------------------------------------------------------------------------------------


def encoder_objective(
    part: PreTrainedModel,
    read: EncoderInputs,
    target: str,
    value: str,
    forward: Callable[[int], Tensor],
    facts: dict[str, Any],
) -> ForwardObjective:
    """What is asked of an encoder: one value per row.

    Args:
        part: whose attention is suppressed.
        target: the text of the answer.
        value: what is measured, see `Objective.value`.
        forward: n -> (n, 1), the value of n equal rows.
        facts: for the explanation's settings.
    """
    embeddings = None
    if "input_ids" in read.inputs:

        def embeddings() -> Tensor:
            words: Tensor = part.get_input_embeddings()(read.inputs["input_ids"])
            return words[0].float().cpu()

    return ForwardObjective(
        prompt=read.shown,
        target=target,
        units=read.units,
        target_tokens=(target,),
        keys=read.positions,
        row_cost=read.positions,
        suppressed=part,
        forward=forward,
        kind_of_value=value,
        read_embeddings=embeddings,
        facts=read.facts | facts,
    )
