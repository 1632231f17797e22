"""Many threads on one model: each gets what it would get alone."""

import threading
import time

import pytest
import tiny_models
import torch
from transformers import PreTrainedModel

import atman_kernels as ak
from atman_kernels.hf import replacement
from atman_kernels.hf.attention import switch

WORDS = [f"w{i}" for i in range(12)]
TEXT = " ".join(WORDS)
ANSWER = " w13 w14"
GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def things_to_do(model: PreTrainedModel, tokenizer) -> dict:
    """By name, what a thread may do with a model: functions that give tensors."""
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    explainers = {
        "explain": {},
        "explain shifted": {"mode": "shifted", "factor": 0.3},
        "explain two layers": {"layers": (0, 2)},
    }

    def forward():
        with torch.no_grad():
            return model(ids).logits

    def suppressed(position, factor):
        factors = torch.ones(1, ids.shape[1])
        factors[0, position] = factor
        with ak.suppress(model, factors):
            return forward()

    def steered(word):
        with ak.steer(model, tokenizer, TEXT, {word: 0.0}) as steering:
            return tokenizer(steering.generate(**GREEDY), return_tensors="pt").input_ids

    def explained(method="atman", **settings):
        explainer = ak.Explainer(model, tokenizer, token_budget=64, progress=False, **settings)
        return explainer.explain(TEXT, target=ANSWER, method=method).scores

    found = {
        "forward": forward,
        "generate": lambda: model.generate(ids, **GREEDY),
        "suppress": lambda: suppressed(3, 0.0),
        "amplify": lambda: suppressed(5, 2.0),
        "steer": lambda: steered("w2"),
        "steer otherwise": lambda: steered("w8"),
        "input_x_gradient": lambda: explained("input_x_gradient"),
    }
    found |= {name: (lambda options=options: explained(**options)) for name, options in explainers.items()}
    if model._can_set_attn_implementation():
        found |= {"chefer": lambda: explained("chefer"), "attnlrp": lambda: explained("attnlrp")}
    return found


def disturbed(things: dict, expected: dict, seconds: float) -> tuple[dict[str, int], list[str]]:
    """How often each thing was done by eight threads at once, and what was not as expected."""
    counts, wrong, until = dict.fromkeys(things, 0), [], time.monotonic() + seconds
    lock, names = threading.Lock(), list(things)

    def body(first: int) -> None:
        step = first
        while time.monotonic() < until or step < first + 2:
            name = names[step % len(names)]
            step += 1 + 2 * (first % 3)
            try:
                got = things[name]()
                error = "" if got.shape == expected[name].shape else f"shape {tuple(got.shape)}"
                error = error or ("" if torch.allclose(got, expected[name], atol=1e-5) else "another result")
            except Exception as raised:
                error = f"{type(raised).__name__}: {raised}"
            with lock:
                counts[name] += 1
                wrong.extend([f"{name}: {error}"] if error else [])

    threads = [threading.Thread(target=body, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts, wrong


def check(family: str, seconds: float) -> None:
    model = tiny_models.build(family)
    things = things_to_do(model, tiny_models.tokenizer())
    expected = {name: do() for name, do in things.items()}  # transformers keeps hooks of its own for attention weights
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    hooks = {name: list(module._forward_hooks.values()) for name, module in model.named_modules()}
    counts, wrong = disturbed(things, expected, seconds)
    assert not wrong, sorted(set(wrong))
    assert sum(counts.values()) >= 16
    assert not switch._everywhere
    assert not switch._switches
    assert not replacement._sites
    for name, module in model.named_modules():
        assert set(module.__dict__) == attributes[name], name
        assert list(module._forward_hooks.values()) == hooks[name], name


@pytest.mark.parametrize("family", ["llama", "falcon alibi"])
def test_for_a_moment(family):
    check(family, 1.5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3", "gptj", "mpt"])
def test_for_half_a_minute(family):
    check(family, 30.0)
