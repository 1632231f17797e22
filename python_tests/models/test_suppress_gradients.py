"""Gradients by the factors of `suppress`: through any served decoder, compiled or checkpointed or neither."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from attention_cases import MODES, one_thread
from comparison import assert_within
from tiny_models import OWN_ATTENTION, PACKABLE, VOCABULARY, build
from torch import Tensor

from atman_kernels import suppress

FAMILIES = [x for x in (*PACKABLE, *OWN_ATTENTION) if x != "mixtral"]  # whose router jumps between two differences
LENGTH = 12


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def inputs() -> tuple[Tensor, Tensor]:
    """ids (2, L), the second row padded on the left, and its mask."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return ids, mask


def loss_of(model: Any, **options: Any) -> Callable[[Tensor], Tensor]:
    ids, mask = inputs()

    def loss(factor: Tensor) -> Tensor:
        with suppress(model, factor, **options):
            logits = model(ids, attention_mask=mask).logits[:, -1]
        return logits.log_softmax(-1)[:, 5].sum()

    return loss


def factors(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(1), dtype=dtype) + 0.2


def gradient(loss: Callable[[Tensor], Tensor], factor: Tensor) -> Tensor:
    leaf = factor.detach().requires_grad_()
    (found,) = torch.autograd.grad(loss(leaf), [leaf])
    return found


def check_slope(loss: Callable[[Tensor], Tensor], factor: Tensor) -> None:
    """Along a random direction, against central differences; norms and rotary angles are float32 in most models."""
    direction = torch.randn(factor.shape, generator=torch.Generator().manual_seed(2), dtype=factor.dtype)
    found = (gradient(loss, factor) * direction).sum()
    with torch.no_grad():
        slopes = [(loss(factor + h * direction) - loss(factor - h * direction)) / (2 * h) for h in (1e-3, 2e-3)]
    expected = (4 * slopes[0] - slopes[1]) / 3  # without the error that goes with h²
    assert abs(expected) > 1e-2, "nothing depends on these factors"
    assert abs(found - expected) <= 5e-3 * abs(expected) + 1e-3, (found.item(), expected.item())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_against_finite_differences(family: str) -> None:
    model = build(family).double()
    if hasattr(model, "set_experts_implementation"):  # torch's grouped products take no float64
        model.set_experts_implementation("eager")
    check_slope(loss_of(model), factors())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options", [{}, {"layers": [1]}, {"queries": (4, 10)}], ids=lambda options: "-".join(options) or "all"
)
def test_every_mode_layers_and_queries(mode: str, options: dict[str, Any]) -> None:
    check_slope(loss_of(build("llama").double(), mode=mode, **options), factors())


def test_factors_per_layer_and_head_and_of_values() -> None:
    model = build("llama").double()
    per_head = factors()[:, None].expand(2, 4, LENGTH)
    ids, mask = inputs()

    def loss(factor: Tensor) -> Tensor:
        with suppress(model, {0: factor, 2: factor[:, 0] * 0.5}, value_factor={1: factor}):
            return model(ids, attention_mask=mask).logits[:, -1].log_softmax(-1)[:, 5].sum()

    check_slope(loss, per_head)


def test_steps_inside_one_context_see_the_factors_as_they_are() -> None:
    model = build("llama")
    ids, mask = inputs()
    factor = factors(torch.float32).requires_grad_()
    with suppress(model, factor, value_factor=torch.ones(2, LENGTH, requires_grad=True)):
        for _ in range(2):
            loss = model(ids, attention_mask=mask).logits[:, -1].log_softmax(-1)[:, 5].sum()
            (found,) = torch.autograd.grad(loss, [factor])
            with torch.no_grad():
                factor -= 0.1 * found.sign() * factor
    before = factors(torch.float32)
    first = gradient(loss_of(model), before)
    assert_within(found, gradient(loss_of(model), before - 0.1 * first.sign() * before), 1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant: bool) -> None:
    """The backward comes when the context has ended."""
    model = build("llama")
    expected = gradient(loss_of(model), factors(torch.float32))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    if reentrant:  # such checkpoints need an input with a gradient
        model.enable_input_require_grads()
    leaf = factors(torch.float32).requires_grad_()
    loss_of(model)(leaf).backward()
    assert leaf.grad is not None
    assert_within(leaf.grad, expected, 1e-5)


@pytest.mark.slow
def test_compiled() -> None:
    model = build("llama")
    expected = gradient(loss_of(model), factors(torch.float32))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    assert_within(gradient(loss_of(compiled), factors(torch.float32)), expected, 1e-5)
    torch.compiler.reset()
