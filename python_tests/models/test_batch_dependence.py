"""Models whose rows depend on the rows beside them: every row then runs alone, and scores are those of lone runs."""

import warnings

import pytest
import tiny_models
import torch
from shared_grid import on_a_shared_grid
from torch import nn

import atman_kernels as ak
from atman_kernels.hf.models.packability import why_rows_do_not_mix

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
    kind = type("Linear8bitLt", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    model.model.layers[0].mlp.up_proj.__class__ = kind
    assert "outliers" in why_rows_do_not_mix(model)
