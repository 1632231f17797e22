"""Gradient checkpointing under a suppression: what is recomputed is what was computed."""

import copy
import threading

import pytest
import tiny_models
import torch
import transformers as hf
from torch.utils.checkpoint import checkpoint

import atman_kernels as ak

PROMPT = torch.tensor([[5, 6, 7, 8, 9, 10]])
FACTOR = torch.tensor([[1.0, 0.0, 1.0, 0.3, 1.0, 1.0]])
REENTRANT = pytest.mark.parametrize("reentrant", [True, False])


def t5():
    config = hf.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, dropout_rate=0.0)
    torch.manual_seed(0)
    return hf.T5ForConditionalGeneration(config)


def build(family):
    return (t5() if family == "t5" else tiny_models.build(family)).train()


def checkpoints(model, reentrant):
    """transformers 6 will have it under another name only."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def loss_of(model):
    inputs = {"decoder_input_ids": PROMPT[:, :3]} if isinstance(model, hf.T5ForConditionalGeneration) else {}
    embeddings = model.get_input_embeddings()(PROMPT).detach().requires_grad_()  # reentrant checkpoints need one
    logits = model(inputs_embeds=embeddings, use_cache=False, **inputs).logits
    return logits[:, -1].log_softmax(-1)[:, 7].sum()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def expected_gradients(model, suppressed=True):
    model = copy.deepcopy(model)
    for module in model.modules():
        module.gradient_checkpointing = False
    if suppressed:
        with ak.suppress(model, FACTOR):
            loss_of(model).backward()
    else:
        loss_of(model).backward()
    return gradients(model)


def check(model, expected):
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@REENTRANT
@pytest.mark.parametrize("family", ["llama", "gptj", "t5"])
@pytest.mark.parametrize("when", ["inside", "after", "under another", "in another thread"])
def test_the_recomputation_is_under_the_forwards_suppression(family, reentrant, when):
    model = build(family)
    checkpoints(model, reentrant)
    expected = expected_gradients(model)
    assert any((expected[name] - plain).abs().max() > 1e-4 for name, plain in expected_gradients(model, False).items())
    with ak.suppress(model, FACTOR):
        loss = loss_of(model)
        if when == "inside":
            loss.backward()
    if when == "after":
        loss.backward()
    elif when == "under another":
        with ak.suppress(model, FACTOR.flip(1)):
            loss.backward()
    elif when == "in another thread":
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    check(model, expected)


@REENTRANT
def test_a_plain_forward_is_not_recomputed_under_a_suppression(reentrant):
    model = build("llama")
    checkpoints(model, reentrant)
    loss = loss_of(model)
    with ak.suppress(model, FACTOR), pytest.raises(ak.UnsupportedModelError, match="recomputed"):
        loss.backward()


def checkpointed_by_the_user(model, reentrant):
    embeddings = model.get_input_embeddings()(PROMPT).detach().requires_grad_()

    def run(states):
        return model(inputs_embeds=states, use_cache=False).logits

    return checkpoint(run, embeddings, use_reentrant=reentrant)[:, -1].log_softmax(-1)[:, 7].sum()


@REENTRANT
def test_checkpoints_that_users_make_are_recomputed_inside_or_a_warning_says_that_they_will_not_be(reentrant):
    model = build("llama")
    expected = expected_gradients(model)
    with ak.suppress(model, FACTOR):
        checkpointed_by_the_user(model, reentrant).backward()
    check(model, expected)
    with pytest.warns(RuntimeWarning, match="backward"), ak.suppress(model, FACTOR):
        checkpointed_by_the_user(model, reentrant)
