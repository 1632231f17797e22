"""Image-text models: what the text decoder reads in place of the image tokens, and whose patches become which token."""

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atman_kernels.errors import InputError, UnsupportedModelError
from atman_kernels.hf.forward.logprobs import logprobs_of
from atman_kernels.hf.images.layouts import ImageTokens, image_family_of
from atman_kernels.hf.models.memory import is_out_of_memory
from atman_kernels.hf.models.model_input import Embedded, WithPixels
from atman_kernels.hf.models.parts import decoder_of, towers, vision_encoder_of
from atman_kernels.hf.models.placement import input_device
from atman_kernels.hf.replacement import has_hooks, replaced
from atman_kernels.hf.scope import Scope

NOT_READ = ("labels", "num_crops")  # what processors return for training and for themselves
READ_BY_DECODER = ("inputs_embeds", "position_ids", "attention_mask", "visual_pos_masks", "deepstack_visual_embeds")
FOR_DECODER = ("use_cache", "output_router_logits")  # passed on to towers, which know neither
PASSED_ON = ("logits_to_keep",)  # to decoders, which make no logits


def checked_inputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """A processor's output for one prompt, on the model's device and in its dtype.

    Raises:
        InputError: it is not for one unpadded prompt, or holds what the model does not take.
    """
    name = type(model).__name__
    taken = inspect.signature(model.forward).parameters
    kept = {key: value for key, value in inputs.items() if key not in NOT_READ and value is not None}
    for key, value in kept.items():
        if key not in taken:
            raise InputError(f"inputs hold {key!r}, which {name} does not take; are they from this model's processor?")
        if not isinstance(value, Tensor):
            raise InputError(f'inputs[{key!r}] must be a tensor (return_tensors="pt"), got {type(value).__name__}')
    for key in ("input_ids", "pixel_values"):
        if key not in kept:
            raise InputError(f"inputs hold no {key!r}, which {name} needs; they hold {', '.join(kept) or 'nothing'}")
    shape = tuple(kept["input_ids"].shape)
    if len(shape) != 2 or shape[0] != 1:
        raise InputError(f"inputs['input_ids'] must be (1, tokens), one prompt at a time; got {shape}")
    for key in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
        if key in kept and tuple(kept[key].shape) != shape:
            raise InputError(f"inputs[{key!r}] must be {shape} as input_ids are, got {tuple(kept[key].shape)}")
    if "attention_mask" in kept and not bool((kept["attention_mask"] == 1).all()):
        raise InputError("inputs['attention_mask'] hides tokens; pass the prompt without padding")
    return {
        key: value.to(input_device(model), model.dtype if value.is_floating_point() else None)
        for key, value in kept.items()
    }


def with_answer(model: PreTrainedModel, inputs: Mapping[str, Tensor], answer: Tensor) -> dict[str, Tensor]:
    """The model's arguments for a prompt and all of its answer (m,) but the last token, which is only predicted."""
    answer_type = image_family_of(model).answer_type
    longer = {key: value for key, value in inputs.items() if key != "attention_mask"}  # all ones
    longer["input_ids"] = torch.cat([inputs["input_ids"], answer[None, :-1]], dim=1)
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in longer:
            kind = answer_type if key == "token_type_ids" else 0
            longer[key] = torch.cat([inputs[key], torch.full_like(answer[None, :-1], kind)], dim=1)
    return longer


def with_pixels(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], answer: Tensor, blocks: list[ImageTokens]
) -> WithPixels:
    """Prompt and answer with images that are still to be seen, and which patch becomes part of which token.

    Raises:
        UnsupportedModelError: that is not known of the model.
    """
    check_vision(model)
    layout = image_family_of(model).layout
    if layout == "grid":
        merged = int(model.config.vision_config.spatial_merge_size) ** 2  # they come one after the other
        tokens = torch.cat([_in_windows(model, block) for block in blocks])
        return WithPixels(with_answer(model, inputs, answer), tokens.repeat_interleave(merged)[None], True)
    owners = [_owners(model, block) for block in blocks]
    if layout == "rows":
        return WithPixels(with_answer(model, inputs, answer), torch.cat(owners)[None], True)
    return WithPixels(with_answer(model, inputs, answer), torch.stack(owners), False)


def _in_windows(model: PreTrainedModel, block: ImageTokens) -> Tensor:
    """(count,) tokens in the encoder's order: Qwen2.5-VL sorts them into square windows, the others leave them."""
    assert block.grid is not None
    vision = model.config.vision_config
    tokens = block.positions()
    if not hasattr(vision, "window_size"):
        return tokens.flatten()
    side = vision.window_size // vision.spatial_merge_size // vision.patch_size
    row, column = torch.arange(block.grid[0], device="cpu")[:, None], torch.arange(block.grid[1], device="cpu")
    window = row // side * block.grid[1] + column // side  # numbers them row by row, some of them not at all
    return tokens.flatten()[window.flatten().argsort(stable=True)]


def _owners(model: PreTrainedModel, block: ImageTokens) -> Tensor:
    """(patches,) the token of each patch of a square: patches run row by row, and k × k of them are one token."""
    assert block.grid is not None
    (width, height), patch = block.pixels, _side(model.config.vision_config.patch_size)
    rows, columns = height // patch, width // patch
    if rows % block.grid[0] or columns % block.grid[1]:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be suppressed in its vision encoder: {rows} × {columns} patches are no "
            f"whole multiple of its {block.grid[0]} × {block.grid[1]} image tokens"
        )
    row = torch.arange(rows, device="cpu") // (rows // block.grid[0])
    column = torch.arange(columns, device="cpu") // (columns // block.grid[1])
    return block.positions()[row[:, None], column].flatten()


def _side(size: int | Sequence[int]) -> int:
    """InternVL's config says (height, width)."""
    return int(size if isinstance(size, int) else size[0])


def check_vision(model: PreTrainedModel) -> None:
    """Raises UnsupportedModelError if patches cannot be suppressed in the model's vision encoder."""
    refused = image_family_of(model).vision_refused
    if refused:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be suppressed in its vision encoder: {refused}")
    vision_encoder_of(model)


def embed(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], answer: Tensor, rows: Tensor
) -> tuple[Embedded, Tensor]:
    """One forward of the whole model over prompt and answer.

    Args:
        inputs: of the prompt, from `checked_inputs`.
        answer: (m,) token ids; the last one is only predicted.
        rows: (m,) rows that predict them.

    Returns:
        What the text decoder read, and the (m,) log-probs of the answer.

    Raises:
        InputError: the model does not take the inputs.
        UnsupportedModelError: its decoder reads more than embeddings.
    """
    longer = with_answer(model, inputs, answer)
    with _reading(model) as read, refusals_named(model):
        logprobs = logprobs_of(model, longer, rows, answer[None])[0]
    types = {key: longer[key][0] for key in ("token_type_ids",) if key in longer}
    return _as_read(model, read, longer["input_ids"].shape[1], types), logprobs


def source_embeddings(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """(1, L, E) what the encoder of an encoder-decoder's language model reads of a prompt, images merged in.

    Raises:
        InputError: the model does not take the inputs.
    """
    begun = torch.zeros(1, 1, dtype=torch.long, device=input_device(model))  # any token: the encoder does not see it
    with _reading(model) as read, refusals_named(model), torch.no_grad():
        model(**inputs, decoder_input_ids=begun)
    return read[0]["inputs_embeds"]  # type: ignore[no-any-return]


@contextmanager
def _reading(model: PreTrainedModel) -> Iterator[list[dict[str, Any]]]:
    """What the decoder is called with inside, call by call."""
    read: list[dict[str, Any]] = []

    def note(own: Any, *args: Any, **kwargs: Any) -> Any:
        read.append(kwargs)
        return own(*args, **kwargs)

    with Scope() as scope, replaced(decoder_of(model), scope, note):
        yield read


def _as_read(model: PreTrainedModel, read: list[dict[str, Any]], length: int, types: dict[str, Tensor]) -> Embedded:
    name = type(model).__name__
    if len(read) != 1 or not isinstance(read[0].get("inputs_embeds"), Tensor):
        raise UnsupportedModelError(f"{name} cannot be explained with images: its decoder is not given embeddings once")
    more = [key for key, value in read[0].items() if key not in READ_BY_DECODER + PASSED_ON and _holds_tensors(value)]
    if more:
        raise UnsupportedModelError(
            f"{name} cannot be explained with images: its decoder reads {', '.join(more)} beside the embeddings"
        )
    embeddings, positions = read[0]["inputs_embeds"][0], read[0].get("position_ids")
    if embeddings.shape[0] != length:
        raise UnsupportedModelError(
            f"{name} cannot be explained with images: {length} tokens became {embeddings.shape[0]} embeddings"
        )
    if positions is not None:
        positions = positions[:, 0] if positions.ndim == 3 else positions[:1]
    places, features = read[0].get("visual_pos_masks"), read[0].get("deepstack_visual_embeds")
    later = (
        () if places is None or features is None else tuple(_spread(places[0], rows, embeddings) for rows in features)
    )
    return Embedded(embeddings, positions, types, later)


def _spread(places: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """(L, E) with rows where places (L,) are true, else 0."""
    spread = torch.zeros_like(like)
    spread[places] = rows.to(like)
    return spread


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, list | tuple) and any(map(_holds_tensors, value)))


@contextmanager
def refusals_named(model: PreTrainedModel) -> Iterator[None]:
    """What a model says of inputs that do not fit is the caller's mistake, in one line."""
    try:
        yield
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        if isinstance(error, InputError | UnsupportedModelError) or is_out_of_memory(error):
            raise
        said = str(error).strip().splitlines()
        raise InputError(
            f"inputs do not fit {type(model).__name__}: {said[0] if said else type(error).__name__}"
        ) from error


@contextmanager
def vision_runs_once(model: PreTrainedModel) -> Iterator[None]:
    """Inside, each part of the model before its decoder computes the same inputs once, however often it is asked."""
    decoder = decoder_of(model)
    with Scope() as scope, ExitStack() as stack:
        for tower in towers(model, decoder):
            if not has_hooks(tower):  # which would see what is remembered again, changed by themselves
                stack.enter_context(replaced(tower, scope, _remembering(tower)))
        yield


def _remembering(tower: nn.Module) -> Any:
    signature = inspect.signature(tower.forward)
    known: list[tuple[dict[str, Any], Any]] = []

    def remember(own: Any, *args: Any, **kwargs: Any) -> Any:
        matters = {name: value for name, value in kwargs.items() if name not in FOR_DECODER}
        asked = dict(signature.bind(*args, **matters).arguments)
        for earlier, output in known:
            if _alike(earlier, asked):
                return copy.copy(output)  # models write into the container, not into its tensors
        output = own(*args, **kwargs)
        known.append((asked, copy.copy(output)))
        return output

    return remember


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    return one is other or (type(one) is type(other) and isinstance(one, str | int | float) and one == other)
