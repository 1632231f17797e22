"""Models whose rows depend on the rows beside them: every row then runs alone, and scores are those of lone runs."""

import operator
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from shared_grid import on_a_shared_grid
from torch import nn

import atman_kernels as ak
from atman_kernels.hf.models.quantised import rounding_dtype, why_rows_do_not_mix

PROMPT, ANSWER = list(range(10, 22)), [30, 31, 32]


def dynamically_quantised(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao moves to another package
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def lone_runs(model: nn.Module) -> torch.Tensor:
    """(n_units, m) rise of the loss, every row in a forward of its own."""
    ids = torch.tensor([PROMPT + ANSWER[:-1]])

    def logprobs(removed: int | None) -> torch.Tensor:
        factor = torch.ones(ids.shape)
        if removed is not None:
            factor[0, removed] = 0
        with ak.suppress(model, factor), torch.no_grad():
            rows = model(ids).logits[0, -len(ANSWER) :].log_softmax(-1)
        return rows.gather(-1, torch.tensor(ANSWER)[:, None])[:, 0]

    return torch.stack([logprobs(None) - logprobs(unit) for unit in range(len(PROMPT))])


@pytest.mark.parametrize("change", [dynamically_quantised, on_a_shared_grid])
def test_rows_that_depend_on_one_another_run_one_by_one(change) -> None:
    model = change(tiny_models.build("llama"))
    explainer = ak.Explainer(model, tiny_models.tokenizer(), progress=False)
    target = " " + tiny_models.text_of(ANSWER)
    with pytest.warns(UserWarning, match="one by one"):
        explanation = explainer.explain(tiny_models.text_of(PROMPT), target=target)
    torch.testing.assert_close(explanation.scores, lone_runs(model), atol=2e-4, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        again = explainer.explain(tiny_models.text_of(PROMPT), target=target)
    torch.testing.assert_close(again.scores, explanation.scores, atol=2e-4, rtol=0)


def test_what_is_known_to_mix_is_not_left_to_numbers() -> None:
    model = tiny_models.build("llama")
    assert why_rows_do_not_mix(model) is None
    assert "one scale" in why_rows_do_not_mix(dynamically_quantised(model))
    layer = _as_of(model, "bitsandbytes.nn.modules", "Linear8bitLt")
    assert "outliers" in why_rows_do_not_mix(model)
    layer.state = SimpleNamespace(threshold=0.0)  # no outliers: a scale for each row
    assert why_rows_do_not_mix(model) is None


def _as_of(model: nn.Module, module: str, name: str) -> Any:
    """One of the model's layers, as one of a package's class."""
    layer: Any = model.model.layers[0].mlp.up_proj
    layer.__class__ = type(name, (nn.Linear,), {"__module__": module})
    return layer


class PerTensor:
    pass


class PerRow:
    pass


# how packages say that activations are quantised: what is set, and whether all rows of a product share a scale
ACTIVATIONS = {
    "torchao, rows": ("weight.act_quant_kwargs", SimpleNamespace(granularity=PerRow()), False),
    "torchao, all": ("weight.act_quant_kwargs", SimpleNamespace(granularity=PerTensor()), True),
    "torchao, int4 weights": ("weight.activation_quantization", "int8_asym_per_token", False),
    "quanto": ("activation_qtype", "qint8", False),  # scales found beforehand
    "compressed-tensors, rows": (
        "quantization_scheme",
        SimpleNamespace(input_activations=SimpleNamespace(dynamic=True, strategy=SimpleNamespace(value="token"))),
        False,
    ),
    "compressed-tensors, all": (
        "quantization_scheme",
        SimpleNamespace(input_activations=SimpleNamespace(dynamic=True, strategy=SimpleNamespace(value="tensor"))),
        True,
    ),
    "compressed-tensors, beforehand": (
        "quantization_scheme",
        SimpleNamespace(input_activations=SimpleNamespace(dynamic=False, strategy=SimpleNamespace(value="tensor"))),
        False,
    ),
}


@pytest.mark.parametrize("package", ACTIVATIONS)
def test_how_activations_are_quantised(package: str) -> None:
    place, how, shared = ACTIVATIONS[package]
    model = tiny_models.build("llama")
    assert rounding_dtype(model) == torch.float32
    owner, _, name = f"model.layers.0.mlp.up_proj.{place}".rpartition(".")
    setattr(operator.attrgetter(owner)(model), name, how)
    assert rounding_dtype(model) == torch.bfloat16
    assert ("one scale" in (why_rows_do_not_mix(model) or "")) == shared
    if place.endswith("act_quant_kwargs"):
        model.model.layers[0].mlp.up_proj.weight.act_quant_scale = torch.ones(1)  # found beforehand
        assert why_rows_do_not_mix(model) is None


def test_how_coarse_products_are() -> None:
    model = tiny_models.build("llama")
    layer = _as_of(model, "bitsandbytes.nn.modules", "Linear4bit")
    layer.compute_dtype = torch.float32
    assert rounding_dtype(model) == torch.float32
    layer.compute_dtype = torch.float16
    assert rounding_dtype(model) == torch.bfloat16
    layer.compute_dtype, layer.support_avx512bf16_for_cpu = torch.float32, True  # its CPU kernel rounds all the same
    assert rounding_dtype(model) == torch.bfloat16
    model = tiny_models.build("llama")
    _as_of(model, "transformers.integrations.bitnet", "BitLinear")
    assert rounding_dtype(model) == torch.bfloat16
    assert rounding_dtype(dynamically_quantised(tiny_models.build("llama"))) == torch.bfloat16
