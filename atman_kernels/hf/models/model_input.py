"""What a model reads: token ids, or embeddings in which images are merged among the tokens.

Where a token stands in the sequence and which position ids the model gives it are two things: packs and factors go by
the first, the model's rotary embedding by the second.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atman_kernels.hf.models.parts import decoder_of


@dataclass(frozen=True, eq=False)
class Embedded:
    """A sequence as the text decoder of an image-text model reads it.

    Attributes:
        embeddings: (L, E), images merged in.
        position_ids: (axes, L), the model's own: M-RoPE has three axes. None where the model counts tokens itself.
        types: (L,) each, by the name under which the model takes them ("token_type_ids"). A model makes its mask from
            them when it reads a whole sequence; suffixes go without.
        later: (L, E) each, what the decoder adds to the hidden states after its first layers (DeepStack, Qwen3-VL);
            0 at text.
    """

    embeddings: Tensor
    position_ids: Tensor | None = None
    types: dict[str, Tensor] = field(default_factory=dict)
    later: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return self.embeddings.shape[0]

    def __getitem__(self, part: slice | Tensor) -> "Embedded":
        positions = None if self.position_ids is None else self.position_ids[:, part]
        types = {name: kinds[part] for name, kinds in self.types.items()}
        return Embedded(self.embeddings[part], positions, types, tuple(rows[part] for rows in self.later))


@dataclass(frozen=True, eq=False)
class WithPixels:
    """A sequence whose images are still to be seen: what the whole model reads, for runs that change how it sees them.

    Attributes:
        inputs: the model's arguments for one prompt and its answer, batch 1, pixels included.
        owners: (images, patches), for every patch in the vision encoder's order the position in the sequence of the
            token that it becomes part of; (1, patches) where the encoder takes all images in one row.
        in_one_row: which of the two.
    """

    inputs: dict[str, Tensor]
    owners: Tensor
    in_one_row: bool

    def patch_factors(self, factor: Tensor) -> Tensor:
        """Factors of tokens (V, L) as those of patches, in the encoder's order: (V · images, patches) or (1, all)."""
        patches = factor[:, self.owners.to(factor.device)]  # (V, images, patches)
        return patches.reshape(1, -1) if self.in_one_row else patches.flatten(0, 1)


ModelInput = Tensor | Embedded  # (L,) token ids, or embeddings


def concatenated(pieces: Sequence[ModelInput], padding: int = 0) -> ModelInput:
    """Suffixes one after the other, then `padding` rows that mean nothing."""
    first = pieces[0]
    if isinstance(first, Tensor):
        return torch.cat([*pieces, first.new_zeros(padding)])  # type: ignore[list-item]
    embedded = [piece for piece in pieces if isinstance(piece, Embedded)]
    positions = [piece.position_ids for piece in embedded if piece.position_ids is not None]
    return Embedded(
        _joined([piece.embeddings for piece in embedded], padding),
        torch.cat([*positions, positions[0].new_zeros(len(positions[0]), padding)], dim=1) if positions else None,
        later=tuple(_joined(list(rows), padding) for rows in zip(*(piece.later for piece in embedded), strict=True)),
    )


def _joined(rows: list[Tensor], padding: int) -> Tensor:
    return torch.cat([*rows, rows[0].new_zeros(padding, rows[0].shape[1])])


def whole_inputs(sequence: ModelInput | WithPixels, batch: int = 1) -> dict[str, Tensor]:
    """A model's arguments for `batch` copies of a whole sequence."""
    if isinstance(sequence, WithPixels):  # processors put images and crops along the first dimension, too
        return {name: x.repeat(batch, *[1] * (x.ndim - 1)) for name, x in sequence.inputs.items()}
    if isinstance(sequence, Tensor):
        return {"input_ids": sequence.expand(batch, -1)}
    inputs = {"inputs_embeds": sequence.embeddings.expand(batch, -1, -1)}
    if sequence.position_ids is not None:
        inputs["position_ids"] = _by_axes(sequence.position_ids, batch)
    return inputs | {name: kinds.expand(batch, -1) for name, kinds in sequence.types.items()}


def suffix_inputs(sequence: ModelInput, row_position: Tensor) -> dict[str, Tensor]:
    """A model's arguments for packed suffixes; `row_position` (T,) says where each row stands in its sequence."""
    if isinstance(sequence, Tensor):
        return {"input_ids": sequence[None], "position_ids": row_position[None]}
    positions = row_position[None] if sequence.position_ids is None else _by_axes(sequence.position_ids, 1)
    return {"inputs_embeds": sequence.embeddings[None], "position_ids": positions}


def _by_axes(position_ids: Tensor, batch: int) -> Tensor:
    """(axes, L) as models want it: (B, L) for one axis, (axes, B, L) for several."""
    axes = position_ids.shape[0]
    return position_ids.expand(batch, -1) if axes == 1 else position_ids[:, None].expand(-1, batch, -1)


def reader_of(model: PreTrainedModel, sequence: ModelInput | WithPixels) -> PreTrainedModel:
    """The model that makes logits of a sequence: BLIP-2 takes embeddings in its language model only."""
    if not isinstance(sequence, Embedded):
        return model
    decoder = decoder_of(model)
    return model if decoder.get_output_embeddings() is None else decoder
