"""What AT2 knows of a model: one weight for each head of each layer, in a file of safetensors."""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

import atman_kernels
from atman_kernels.arguments import described
from atman_kernels.errors import InputError
from atman_kernels.files import FilePath, write_whole

FORMAT, VERSION = "atman-at2", "1"
SAMPLED = 4  # numbers of each parameter that tell a model from another one of its shape
CLOSE = {"rtol": 0.02, "atol": 1e-4}  # of such numbers in two dtypes


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """How much the attention of each head says about what an ablation does, learned for one model by `fit_at2`.

    Attributes:
        weights: (layers, heads) float32 on the CPU; their absolute values add up to 1.
        model: the name of the model that they belong to.
        sample: (k,) float32, a few of that model's parameters, by which it is known again in any dtype.
        fit: how they were learned, JSON types.

    Example:
        >>> weights = HeadWeights(torch.full((2, 4), 0.125), "tiny", torch.zeros(3))
        >>> weights.weights.sum().item()
        1.0
    """

    weights: Tensor
    model: str
    sample: Tensor
    fit: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PreTrainedModel, weights: Tensor, fit: dict[str, Any]) -> "HeadWeights":
        """Weights of a model, with what it is known by."""
        return cls(weights.float().cpu(), name_of(model), _sample(model), fit)

    def check(self, model: PreTrainedModel) -> None:
        """Raises InputError if a model is another one than they were learned for: by its name and its numbers."""
        found = _sample(model)
        same = found.shape == self.sample.shape
        if not same or not torch.allclose(found, self.sample, equal_nan=True, **CLOSE):
            own = name_of(model)
            other = f"another model, {own!r}" if own != self.model else "another model of that name"
            raise InputError(
                f"weights were fitted on {self.model!r}, and this is {other}: AT2's weights are of one model; fit its "
                "own (atman bench fit-at2)"
            )

    def save(self, path: FilePath) -> None:
        """Write the file; an existing one is replaced whole.

        Raises:
            InputError: path is no file in an existing folder.
            OSError: the system refuses.
        """
        about = {"format": FORMAT, "version": VERSION, "model": self.model, "fit": json.dumps(self.fit)}
        about |= {"atman_kernels": atman_kernels.__version__}
        write_whole(path, save({"weights": self.weights.contiguous(), "sample": self.sample}, about))

    @classmethod
    def load(cls, path: FilePath) -> "HeadWeights":
        """Read a file that `save` wrote.

        Raises:
            InputError: it cannot be read, or is something else.
        """
        shown = repr(os.fspath(path))
        if not Path(path).is_file():
            raise InputError(f"weights: {shown} is no file; expected one that atman bench fit-at2 wrote")
        try:
            with safe_open(os.fspath(path), framework="pt") as stored:
                about, names = stored.metadata() or {}, set(stored.keys())
                if about.get("format") != FORMAT:
                    raise InputError(f"weights: {shown} holds no weights of AT2; expected a file of fit-at2")
                if about.get("version") != VERSION:
                    raise InputError(
                        f"weights: {shown} has version {about.get('version')!r}; this package reads {VERSION!r}"
                    )
                if not {"weights", "sample"} <= names:
                    raise InputError(f"weights: {shown} is damaged: it lacks a tensor")
                found = cls(
                    stored.get_tensor("weights"), about["model"], stored.get_tensor("sample"), json.loads(about["fit"])
                )
        except (SafetensorError, OSError, LookupError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"weights: {shown} cannot be read as safetensors: {error}") from error
        if found.weights.ndim != 2 or not found.weights.isfinite().all():
            raise InputError(f"weights: {shown} is damaged: expected (layers, heads) finite numbers")
        return found


def checked_weights(value: Any) -> str:
    """The absolute path of a file of head weights, which was read.

    Raises:
        InputError: it is no path, or `HeadWeights.load` refuses the file.
    """
    if value is None:
        raise InputError("weights is missing: method 'at2' needs a file that atman bench fit-at2 wrote")
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise InputError(f"weights must be a path, got {described(value)}")
    HeadWeights.load(value)
    return os.path.abspath(os.fspath(value))


def recorded(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a method as records keep them: of a file its name and what is in it, not where it lies."""
    return {name: _file(value) if name == "weights" and value is not None else value for name, value in options.items()}


def name_of(model: PreTrainedModel) -> str:
    """What a model is called: the last part of the name or folder that it was loaded from, else its class."""
    return Path(getattr(model.config, "name_or_path", "") or type(model).__name__).name


def _file(path: str) -> dict[str, str]:
    return {"file": Path(path).name, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}


def _sample(model: PreTrainedModel) -> Tensor:
    """(k,) a few numbers of every floating-point parameter; NaN where it is not in memory."""
    picked = [
        torch.full((SAMPLED,), torch.nan, dtype=torch.float32, device="cpu")
        if parameter.is_meta
        else _evenly(parameter.detach().flatten())
        for _, parameter in model.named_parameters()
        if parameter.is_floating_point()
    ]
    return torch.cat(picked)


def _evenly(numbers: Tensor) -> Tensor:
    places = torch.linspace(0, len(numbers) - 1, SAMPLED, dtype=torch.float64, device="cpu").long()
    return numbers[places.to(numbers.device)].to("cpu", torch.float32)
