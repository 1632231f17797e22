"""The vision encoder of an image-text model, and suppression in it: a patch has the factor of the token it becomes."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from atman_kernels.errors import UnsupportedModelError
from atman_kernels.hf.attention.calls import AttentionCall
from atman_kernels.hf.attention.suppressed_runs import SuppressedRun
from atman_kernels.hf.models.model_input import ModelInput, WithPixels
from atman_kernels.hf.models.parts import vision_encoder_of
from atman_kernels.hf.scope import Scope


class ImageTextRun(SuppressedRun):
    """The attention of a text decoder under factors of its tokens, and of the vision encoder under those of patches.

    Args:
        model: the image-text model.
        sequence: what the model reads. Images that are not still to be seen are left alone.
        factor: (V, L) over the tokens.
        options: of `SuppressedRun`; layers are the decoder's.
    """

    def __init__(
        self, model: PreTrainedModel, sequence: ModelInput | WithPixels, factor: Tensor, *, mode: str, **options: Any
    ) -> None:
        super().__init__(factor, mode=mode, **options)
        self._model = model
        self._vision: VisionRun | None = None
        if isinstance(sequence, WithPixels):
            patch_factors = sequence.patch_factors(factor)
            self._vision = VisionRun(type(model).__name__, patch_factors, sequence.in_one_row, mode)

    @contextmanager
    def hooks(self, part: PreTrainedModel, scope: Scope) -> Iterator[None]:
        """Inside, the vision encoder sees the images of each variant under its factors.

        Raises:
            UnsupportedModelError: at the end, the encoder did not attend to all patches; in a forward, to others.
        """
        if self._vision is None:
            yield
            return
        with self._vision.installed(self._model, vision_encoder_of(self._model)):
            yield
        self._vision.check_finished()


class VisionRun(SuppressedRun):
    """The attention of a vision encoder under factors of its patches.

    Args:
        name: the model's.
        patch_factors: (images, patches). What an encoder puts before the patches, such as a class token, counts as 1.
        in_one_row: patches of all images came as one row, (1, patches), and calls take them piece by piece.
    """

    def __init__(self, name: str, patch_factors: Tensor, in_one_row: bool, mode: str) -> None:
        super().__init__(None, mode=mode)
        self._name, self._factors, self._in_one_row = name, patch_factors, in_one_row
        self._taken: Counter[nn.Module] = Counter()  # patches of the row that calls of a module had so far

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        """See `Run.attend`.

        Raises:
            UnsupportedModelError: the call has other images or patches than the factors are for.
        """
        images, keys = call.key.shape[0], call.key.shape[2]
        first = self._taken[module] if self._in_one_row else 0
        own = self._factors[:, first : first + keys]
        before = keys - own.shape[1]
        if images != len(own) or before > (0 if self._in_one_row else 1):
            raise UnsupportedModelError(
                f"{self._name} cannot be suppressed in its vision encoder: {type(module).__name__} attends to "
                f"{images} × {keys} keys, where {len(own)} × {own.shape[1]} patches are"
            )
        self._taken[module] += keys - before
        return call.attend(nn.functional.pad(own, (before, 0), value=1.0).to(call.query.device), self.mode)

    def check_finished(self) -> None:
        """Raises UnsupportedModelError if there are patches that some module never attended to."""
        if not self._taken or set(self._taken.values()) != {self._factors.shape[1]}:
            raise UnsupportedModelError(
                f"{self._name} cannot be suppressed in its vision encoder, which did not attend to all patches"
            )
