"""BLIP: text with cross-attention to an image. It writes captions, or answers a question that was read with the image.

| model | reads the image | reads the text |
|---|---|---|
| `BlipForConditionalGeneration` | decoder: cross-attention | decoder: self-attention over the caption's beginning |
| `BlipForQuestionAnswering` | question encoder: cross-attention | encoder: self-attention; decoder: cross-attention |
"""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from atman_kernels.hf.attention.calls import AttentionCall
from atman_kernels.hf.attention.layers import LayerSelection
from atman_kernels.hf.attention.suppressed_runs import SuppressedRun
from atman_kernels.hf.forward.logprobs import logprobs_of
from atman_kernels.hf.models.families import family_of

_Source = Literal["image", "text"]


def answers_questions(model: PreTrainedModel) -> bool:
    """Whether a BLIP model reads a question first; the others write a caption."""
    return hasattr(model, "text_encoder")


def image_states(model: Any, pixel_values: Tensor) -> Tensor:
    """(B, patches + 1, E) what the vision encoder makes of images (B, C, H, W); its class token stands first."""
    return model.vision_model(pixel_values=pixel_values, return_dict=True).last_hidden_state  # type: ignore[no-any-return]


def source_states(model: Any, image: Tensor, question: Tensor | None) -> Tensor:
    """What the decoder cross-attends to: the image's states, or those of the question (B, L) read with it."""
    if question is None:
        return image
    read = model.text_encoder(input_ids=question, encoder_hidden_states=image, return_dict=True)
    return read.last_hidden_state  # type: ignore[no-any-return]


def answer_logprobs(
    model: Any, image: Tensor, question: Tensor | None, written: Tensor, rows: Tensor, targets: Tensor
) -> Tensor:
    """(B, R) log-probs of `targets` (B, R) at `rows` (R,) of what the decoder is given, `written` (B, T)."""
    inputs = {"input_ids": written, "encoder_hidden_states": source_states(model, image, question)}
    return logprobs_of(model.text_decoder, inputs, rows, targets)


class BlipRun(SuppressedRun):
    """Attention to the image and to the prompt's text under factors, wherever the model has it.

    Args:
        model: one of the two above.
        factor: (V, states + L), first over the image's states, then over the text's tokens; None: our attention
            without any.
        states: how many belong to the image.
        vision: act in the vision encoder as well, in all of its layers.
        layers: of the text's stacks, counted in each.
        options: of `SuppressedRun`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        factor: Tensor | None,
        *,
        states: int,
        vision: bool,
        layers: Iterable[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(None, **options)
        self._of = {} if factor is None else {"image": factor[:, :states], "text": factor[:, states:]}
        self._roles = _roles(model, vision)
        self._unseen = set(self._roles)
        wanted = None if layers is None else tuple(layers)
        self._layers = {
            role: LayerSelection(None if role.stack == "vision_model" else wanted) for role in self._roles.values()
        }

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        """See `Run.attend`: factors of the image or of the text, by whose states are the module's keys."""
        role = self._roles.get(module)
        self._unseen.discard(module)
        self.reached = not self._unseen
        factor = None
        if role is not None and module in self._layers[role] and self._of:
            own = self._of[role.source]
            factor = nn.functional.pad(own, (0, call.key.shape[2] - own.shape[1]), value=1.0)  # of what is written
        return call.attend(factor, self.mode)


class _Role(NamedTuple):
    """What some attention modules do, one in each layer of their stack."""

    stack: str
    source: _Source  # whose states are their keys
    is_cross: bool


def _roles(model: PreTrainedModel, vision: bool) -> dict[nn.Module, _Role]:
    """The attention modules that are suppressed, told by their places in the model."""
    asks = answers_questions(model)
    found: dict[nn.Module, _Role] = {}
    for name, module in model.named_modules():
        if family_of(module) is None:
            continue
        stack, is_cross = name.split(".")[0], ".crossattention." in name
        if stack == "vision_model":
            if vision:
                found[module] = _Role(stack, "image", False)
        elif stack == "text_decoder" and asks:
            if is_cross:  # what it writes itself is no source
                found[module] = _Role(stack, "text", True)
        else:
            found[module] = _Role(stack, "image" if is_cross else "text", is_cross)
    return found
