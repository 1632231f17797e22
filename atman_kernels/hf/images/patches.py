"""The grid of patches that a vision transformer cuts an image into, and what stands before it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atman_kernels.errors import InputError, UnsupportedModelError
from atman_kernels.hf.attention.calls import AttentionCall
from atman_kernels.hf.attention.suppressed_runs import SuppressedRun

CLASS_TOKENS = 2  # at most: DeiT has one more than others, for distillation


@dataclass(frozen=True)
class PatchGrid:
    """What the layers of a vision transformer attend to.

    Attributes:
        rows, columns: of the patches, whose keys run row by row.
        before: keys before the first patch: class and register tokens.
    """

    rows: int
    columns: int
    before: int

    @property
    def keys(self) -> int:
        """Of every layer."""
        return self.before + self.rows * self.columns


def patch_grid(model: PreTrainedModel, part: PreTrainedModel, pixels: Tensor) -> PatchGrid:
    """The patches of one image, counted in a forward of the part that sees it.

    Args:
        model: what the errors name.
        part: the model's vision transformer.
        pixels: (1, C, H, W) on its device and in its dtype.

    Raises:
        InputError: the part does not take images of this size.
        UnsupportedModelError: its layers do not attend to one grid of patches.
    """
    name, patch = type(model).__name__, getattr(part.config, "patch_size", None)
    if patch is None:
        raise UnsupportedModelError(f"{name} cannot be explained: it does not cut pictures into patches")
    height, width = patch if isinstance(patch, list | tuple) else (patch, patch)
    rows, columns = pixels.shape[-2] // height, pixels.shape[-1] // width
    counts = _KeyCounts()
    with counts.installed(part, part), torch.no_grad():
        try:
            part(pixel_values=pixels)
        except (TypeError, InputError) as error:  # another argument is missing; attention that our op does not know
            raise UnsupportedModelError(f"{name} cannot be explained: {error}") from error
        except ValueError as error:
            raise InputError(f"images do not fit {name}: {str(error).splitlines()[0]}") from error
    keys = next(iter(counts.seen))[1] if len(counts.seen) == 1 else 0
    before = keys - rows * columns
    if counts.seen != {(1, keys)} or not 0 <= before <= CLASS_TOKENS + getattr(part.config, "num_register_tokens", 0):
        raise UnsupportedModelError(
            f"{name} cannot be explained: its layers do not attend to one grid of {rows} × {columns} patches"
        )
    return PatchGrid(rows, columns, before)


class _KeyCounts(SuppressedRun):
    """Unsuppressed attention that notes how many rows and keys each call had."""

    def __init__(self) -> None:
        super().__init__(None)
        self.seen: set[tuple[int, int]] = set()

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        self.seen.add((call.query.shape[0], call.key.shape[2]))
        return super().attend(module, call)
