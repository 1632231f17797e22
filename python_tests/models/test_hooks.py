"""Hooks that users have on a model run once per forward, and an explanation is one of the model with its hooks."""

import pytest
import tiny_models
import torch

import atman_kernels as ak
from atman_kernels.hf.forward import logprobs as forward

PROMPT = " ".join(f"w{i}" for i in range(3, 13))
ANSWER = " w20 w21 w22 w23 w24"


@pytest.fixture
def model():
    return tiny_models.build("llama")


@pytest.fixture(autouse=True)
def _logits_of_two_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(forward, "LOGITS_BYTES", 2 * 4 * tiny_models.VOCABULARY)


VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(0))
BIAS = torch.randn(tiny_models.VOCABULARY, generator=torch.Generator().manual_seed(1))


def add_to_states(module, args, output):
    output.last_hidden_state += VECTOR  # in place, as many do


def add_to_logits(module, args, output):
    return output + BIAS


def add_to_outputs_logits(module, args, output):
    output.logits += BIAS


def add_to_layer(module, args, output):
    output += VECTOR


def add_to_embeddings(module, args, output):
    return output + 0.1 * VECTOR


PLACES = {
    "model": add_to_outputs_logits,
    "model.model": add_to_states,
    "model.lm_head": add_to_logits,
    "model.model.layers.1": add_to_layer,
    "model.model.embed_tokens": add_to_embeddings,
}


def part(model, place):
    return model.get_submodule(place.partition(".")[2])


def by_whole_forwards(model, target=ANSWER) -> torch.Tensor:
    """(units, m) from one forward per unit whose key is masked."""
    tokenizer = tiny_models.tokenizer()
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    answer = tokenizer(target, return_tensors="pt").input_ids
    whole, m = torch.cat([prompt, answer[:, :-1]], 1), answer.shape[1]

    def logprobs(removed):
        visible = torch.ones(whole.shape[1], whole.shape[1], dtype=torch.bool).tril()
        if removed is not None:
            visible[:, removed] = False
        with torch.no_grad():
            logits = model(whole, attention_mask=visible[None, None]).logits[0, -m:]
        return logits.log_softmax(-1).gather(-1, answer[0, :, None])[:, 0]

    return torch.stack([logprobs(None) - logprobs(unit) for unit in range(1, prompt.shape[1])])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("packed", [True, False])
def test_scores_are_those_of_whole_forwards_with_the_hook(model, place, packed, monkeypatch):
    explainer = ak.Explainer(model, tiny_models.tokenizer(), progress=False)
    if not packed:
        monkeypatch.setattr(explainer.runner, "unpackable", "not wanted")
    part(model, place).register_forward_hook(PLACES[place])
    explanation = explainer.explain(PROMPT, ANSWER)
    assert explanation.settings["path"] == ("packed" if packed else "batched")
    # the first token sees itself alone, so that no row is left without a key
    torch.testing.assert_close(explanation.scores[1:], by_whole_forwards(model), atol=2e-5, rtol=0)


@pytest.mark.parametrize("method", ["atman", "input_x_gradient", "chefer", "attnlrp"])
def test_every_hook_runs_as_often_as_the_model(model, method):
    counts = dict.fromkeys(PLACES, 0)

    def counting(place):
        def count(*given):
            counts[place] += 1

        return count

    for place in PLACES:
        part(model, place).register_forward_hook(counting(place))
        part(model, place).register_forward_pre_hook(counting(place))
    explanation = ak.Explainer(model, tiny_models.tokenizer(), progress=False).explain(PROMPT, ANSWER, method=method)
    assert len(set(counts.values())) == 1, counts
    if method == "atman":
        assert counts["model"] == 2 * explanation.stats["forwards"]


def test_gradients_go_through_hooks_on_the_embeddings_once(model):
    part(model, "model.model.embed_tokens").register_forward_hook(lambda module, args, output: output * 1.5)
    ids = torch.tensor([[5, 6, 7, 8]])
    explanation = ak.Explainer(model, tiny_models.tokenizer(), progress=False).explain(
        "w2 w3 w4 w5", " w20", method="input_x_gradient"
    )
    tokenizer = tiny_models.tokenizer()
    ids = tokenizer("w2 w3 w4 w5", return_tensors="pt").input_ids
    (target,) = tokenizer(" w20").input_ids
    embeddings = model.model.embed_tokens.weight[ids].detach().requires_grad_()
    logprob = model(inputs_embeds=embeddings * 1.5).logits[0, -1].log_softmax(-1)[target]
    (gradient,) = torch.autograd.grad(logprob, embeddings)
    torch.testing.assert_close(explanation.scores[:, 0], (embeddings * gradient)[0].sum(-1).detach())
