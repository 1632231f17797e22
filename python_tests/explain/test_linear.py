"""method="linear": the slope of moving attention outputs to where suppression takes them."""

from typing import Any

import pytest
import tiny_models
import torch
from attention_cases import MODES
from comparison import assert_within
from torch import Tensor, nn

import atman_kernels as ak
from atman_kernels.hf.attention.calls import AttentionCall
from atman_kernels.hf.attention.switch import Run

PROMPT = "w5 w6 w7 w8 w9 w10 w11 w12 w13 w14"
ANSWER = "w20 w21"
IDS = torch.tensor([[*range(5, 15), 20, 21]])
UNITS = [(0, 8), (9, 11), (12, 18), (19, 30)]  # w5 w6 w7 | w8 | w9 w10 | w11 w12 w13
TOKENS = [(0, 3), (3, 4), (4, 6), (6, 9)]
FAMILIES = ["llama", "gemma2", "mistral", "gpt2", "gpt_oss", "bloom"]  # softcap, window, no rotation, sinks, bias
STEP = 1e-3


class Towards(Run):
    """Attention outputs moved by a share of the way to what suppression makes of them."""

    def __init__(self, factor: Tensor, mode: str, share: float, layers: tuple[int, ...]) -> None:
        self.factor, self.mode, self.share, self.layers = factor, mode, share, layers
        self.seen: list[nn.Module] = []

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        self.seen.append(module)
        output = call.attend(None, self.mode, "reference")
        if len(self.seen) - 1 not in self.layers:
            return output
        return output + self.share * (call.attend(self.factor, self.mode, "reference") - output)


def slopes(model: Any, factor: float, mode: str, layers: tuple[int, ...]) -> Tensor:
    """(n_units, m): how each target's loss begins to rise."""

    def losses(first: int, last: int, share: float) -> Tensor:
        row = torch.ones(1, IDS.shape[1] - 1)
        row[:, first:last] = factor
        with torch.no_grad(), Towards(row, mode, share, layers).installed(model):
            logits = model(IDS[:, :-1], use_cache=False).logits[0, 9:]
        return -logits.double().log_softmax(-1).gather(1, IDS[0, 10:, None])[:, 0]

    return torch.stack([(losses(*at, STEP) - losses(*at, -STEP)) / (2 * STEP) for at in TOKENS])


def explained(model: Any, factor: float, mode: str, **options: Any) -> Tensor:
    settings = {name: options.pop(name) for name in ("layers",) if name in options}
    explainer = ak.Explainer(model, tiny_models.tokenizer(), factor=factor, mode=mode, **settings)
    return explainer.explain(PROMPT, ANSWER, units=UNITS, method="linear", **options).scores


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("factor", [0.0, 0.1, 1.5])
def test_is_the_slope_towards_suppression(factor: float, mode: str, family: str) -> None:
    model = tiny_models.build(family).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    found, expected = explained(model, factor, mode), slopes(model, factor, mode, (0, 1, 2))
    assert expected.abs().max() > 1e-2, "nothing happens"
    assert_within(found, expected, 1e-2 * max(1.0, expected.abs().max().item()), "slope")


def test_layers_and_the_whole_answer() -> None:
    model = tiny_models.build("llama").double()
    found = explained(model, 0.0, "log_additive", layers=[1], whole_answer=True)
    expected = slopes(model, 0.0, "log_additive", (1,)).sum(1, keepdim=True)
    assert_within(found, expected, 1e-2 * max(1.0, expected.abs().max().item()))


def test_checkpointed_scores_are_the_same() -> None:
    model = tiny_models.build("llama")
    assert_within(
        explained(model, 0.1, "log_additive", checkpointing=True), explained(model, 0.1, "log_additive"), 1e-4
    )


def test_weak_suppression_is_what_it_says() -> None:
    """Where little is turned down, first order is all there is."""
    model, factor = tiny_models.build("llama").double(), 0.999
    explainer = ak.Explainer(model, tiny_models.tokenizer(), factor=factor)
    atman, linear = (explainer.explain(PROMPT, ANSWER, units=UNITS, method=m).scores for m in ("atman", "linear"))
    assert_within(linear, atman, 0.02 * atman.abs().max().item())


@pytest.mark.parametrize("factor", [0.0, 0.5])
@pytest.mark.parametrize(
    "units",
    ["token", UNITS, [(0, 2), (3, 5), (9, 11)], [(15, 18), (9, 14)]],
    ids=["every token", "of several tokens", "one token each, with gaps", "late, and out of order"],
)
def test_units_that_share_no_key_take_one_pass_with_the_same_scores(
    monkeypatch: pytest.MonkeyPatch, units: Any, factor: float
) -> None:
    """Rows in blocks of four, the first of which stand before some units."""
    from atman_kernels.explain.methods.linear import TouchedKeys
    from atman_kernels.hf.attention import weights

    monkeypatch.setattr(weights, "ROWS", 4)
    model = tiny_models.build("llama").double()
    explainer = ak.Explainer(model, tiny_models.tokenizer(), factor=factor)
    in_one_pass = explainer.explain(PROMPT, ANSWER, units=units, method="linear").scores
    monkeypatch.setattr(TouchedKeys, "of", lambda factor: None)
    by_product = explainer.explain(PROMPT, ANSWER, units=units, method="linear").scores
    assert by_product.abs().max() > 1e-2
    assert_within(in_one_pass, by_product, 1e-10)


def test_keys_of_units_in_a_block() -> None:
    """Which begins where a window does."""
    from atman_kernels.explain.methods.linear import TouchedKeys

    assert TouchedKeys.of(torch.tensor([[0.0, 0.3, 1.0], [1.0, 0.0, 1.0]])) is None
    apart = TouchedKeys.of(torch.tensor([[1.0, 1.0, 0.3], [0.0, 1.0, 1.0]]))
    assert apart is not None
    assert (apart.key.tolist(), apart.unit.tolist(), apart.single) == ([0, 2], [1, 0], True)
    place, unit, change = apart.among(slice(1, 3), torch.empty(0))
    assert (place, unit.tolist(), change.tolist()) == (slice(1, 2), [0], [pytest.approx(-0.7)])
    place, unit, _ = apart.among(slice(0, 3), torch.empty(0))
    assert isinstance(place, Tensor)
    assert (place.tolist(), unit.tolist()) == ([0, 2], [1, 0])
    assert len(apart.among(slice(1, 2), torch.empty(0))[1]) == 0
