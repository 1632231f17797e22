"""Methods that score single tokens, each against its formula written out here, or against captum."""

import warnings
from contextlib import contextmanager

import pytest
import tiny_models
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from atman_kernels import InputError, UnsupportedModelError, suppress
from atman_kernels.explain import methods
from atman_kernels.explain.methods import unit_scores
from atman_kernels.explain.methods.attention import chefer, gradcam, raw_attention, rollout
from atman_kernels.explain.methods.attnlrp import attnlrp
from atman_kernels.explain.methods.gradients import input_x_gradient, integrated_gradients
from atman_kernels.hf.attention import weights as attention_weights
from atman_kernels.inputs.text_generation import CausalObjective, ask

PROMPT = "w5 w6 w7 w8 w9 w10 w11 w12 w13 w14"
ANSWER = "w20 w21 w22"
pytestmark = pytest.mark.filterwarnings("ignore:integrated gradients have not converged")
FAMILIES = ["llama", "gemma2", "mistral", "gpt2", "gpt_neox", "gpt_oss"]  # softcap, window, no rotation, bias, sinks
METHODS = [raw_attention, rollout, chefer, gradcam, input_x_gradient, integrated_gradients]


def question_for(model, units="token", include_target=False) -> CausalObjective:
    options = {"include_target": include_target, "chat": False, "max_new_tokens": 1, "language": "en"}
    return ask(model, tiny_models.tokenizer(), PROMPT, ANSWER, units, **options)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return tiny_models.build(request.param)


@pytest.fixture
def llama():
    return tiny_models.build("llama")


# Attention weights, computed here -------------------------------------------------------------------------------

_kept: list[torch.Tensor] = []


def _keeping_attention(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores + attention_mask
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    if weights.requires_grad:
        weights.retain_grad()
    _kept.append(weights)
    return torch.einsum("bhqk,bhkd->bqhd", weights, value), None


AttentionInterface.register("test_keeping", _keeping_attention)
AttentionMaskInterface.register("test_keeping", eager_mask)


@contextmanager
def keeping_weights(model):
    before = model.config._attn_implementation
    model.set_attn_implementation("test_keeping")
    _kept.clear()
    try:
        yield _kept
    finally:
        model.set_attn_implementation(before)


def kept_weights(model, question, target: int | None = None):
    """Per layer (Hq, L, L) weights, and their gradients by the logit of a target token."""
    with keeping_weights(model) as kept:
        logits = model(question.inputs[None], use_cache=False).logits[0]
        if target is None:
            return [w[0].detach() for w in kept]
        logits[question.rows[target], question.targets[target]].backward()
        model.zero_grad()
        return [w[0].detach() for w in kept], [torch.zeros_like(w[0]) if w.grad is None else w.grad[0] for w in kept]


def test_raw_attention_is_the_last_layers_mean(model):
    question = question_for(model)
    weights = kept_weights(model, question)
    found = raw_attention(model, question)
    torch.testing.assert_close(found.scores, weights[-1].mean(0)[9:12].T, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        raw_attention(model, question, layer=0).scores, weights[0].mean(0)[9:12].T, atol=1e-5, rtol=0
    )


def test_rollout_is_the_product_of_all_layers(model):
    question = question_for(model)
    product = torch.eye(12)
    for weights in kept_weights(model, question):
        product = (weights.mean(0) + torch.eye(12)) / 2 @ product
    torch.testing.assert_close(rollout(model, question).scores, product[9:12].T, atol=1e-5, rtol=0)


def test_chefer_follows_its_equations(model):
    question = question_for(model)
    found = chefer(model, question).scores
    for target in range(3):
        relevance = torch.eye(12)
        for weights, gradient in zip(*kept_weights(model, question, target), strict=True):
            relevance = relevance + (weights * gradient).clamp(min=0).mean(0) @ relevance
        torch.testing.assert_close(found[:, target], relevance[9 + target], atol=1e-4, rtol=1e-4)
        assert (found[: 9 + target, target] > 1e-4).any(), "more than the identity"


def test_gradcam_weighs_the_last_layers_heads(model):
    question = question_for(model)
    found = gradcam(model, question).scores
    for target, row in enumerate((9, 10, 11)):
        weights, gradients = (tensors[-1] for tensors in kept_weights(model, question, target))
        expected = torch.zeros(12)
        for head in range(len(weights)):
            seen = [key for key in range(row + 1) if weights[head, row, key] > 0]  # a window hides some
            expected += gradients[head, row, seen].mean() * weights[head, row] / len(weights)
        torch.testing.assert_close(found[:, target], expected.relu(), atol=1e-5, rtol=1e-4)


# Against the model's own eager attention ------------------------------------------------------------------------


def all_layers_at_once(model, question):
    """What raw attention, rollout, Chefer and GradCAM are, by (L, L) matrices of every layer that the model tells."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    embeddings = model.get_input_embeddings()(question.inputs[None]).detach().requires_grad_()
    output = model(inputs_embeds=embeddings, output_attentions=True, use_cache=False)
    model.set_attn_implementation(before)
    length, weights = len(question.inputs), [w[0] for w in output.attentions]
    eye = torch.eye(length, dtype=weights[0].dtype)
    rolled, raw = eye, weights[-1].mean(0)
    for w in weights:
        rolled = (w.mean(0) + eye) / 2 @ rolled
    found = {raw_attention: raw[question.rows].T, rollout: rolled[question.rows].T, chefer: [], gradcam: []}
    for row, token in zip(question.rows.tolist(), question.targets.tolist(), strict=True):
        slopes = torch.autograd.grad(output.logits[0, row, token], output.attentions, retain_graph=True)
        relevance = eye
        for w, slope in zip(weights, slopes, strict=True):
            relevance = relevance + (w * slope[0]).clamp_min(0).mean(0) @ relevance
        found[chefer].append(relevance[row])
        maps, slope = weights[-1][:, row], slopes[-1][0, :, row]
        importance = torch.where(maps > 0, slope, 0.0).sum(-1) / (maps > 0).sum(-1)
        found[gradcam].append((importance[:, None] * maps).mean(0).clamp_min(0))
    return {m: x if isinstance(x, torch.Tensor) else torch.stack(x, dim=1) for m, x in found.items()}


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2", "gpt_oss", "gemma3n", "bloom", "gptj"])
@pytest.mark.parametrize("rows", [3, 128])
def test_layer_by_layer_is_what_all_layers_at_once_give(family, rows, monkeypatch):
    """Window, softcap, sinks, shared keys and biases; a few rows at a time, and all of them."""
    monkeypatch.setattr(attention_weights, "ROWS", rows)
    model = tiny_models.build(family).double()
    if hasattr(model, "set_experts_implementation"):  # torch's grouped products take no float64
        model.set_experts_implementation("eager")
    question = question_for(model)
    for method, expected in all_layers_at_once(model, question).items():
        found = method(model, question).scores
        # sums in another order; softmax and norms of some families are float32 inside
        torch.testing.assert_close(found, expected.detach(), atol=2e-6, rtol=1e-5)


def test_chefer_with_and_without_recomputed_layers(llama):
    question = question_for(llama)
    assert torch.equal(*(chefer(llama, question, checkpointing=c).scores for c in (False, True)))


# Gradients, by captum -------------------------------------------------------------------------------------------


def logprob_function(model, question, target: int):
    def logprob(ids):
        logits = model(ids, use_cache=False).logits[:, question.rows[target]].float()
        return logits.log_softmax(-1)[:, question.targets[target]]

    return logprob


def test_input_x_gradient_is_captums(model):
    from captum.attr import LayerGradientXActivation

    question = question_for(model)
    found = input_x_gradient(model, question).scores
    for target in range(3):
        captum = LayerGradientXActivation(logprob_function(model, question, target), model.get_input_embeddings())
        expected = captum.attribute(question.inputs[None]).sum(-1)[0].detach()
        torch.testing.assert_close(found[:, target], expected, atol=1e-5, rtol=1e-4)


def test_integrated_gradients_are_captums(model):
    from captum.attr import LayerIntegratedGradients

    question = question_for(model)
    found = integrated_gradients(model, question, steps=6, baseline=3, batch=4)
    for target in range(3):
        captum = LayerIntegratedGradients(logprob_function(model, question, target), model.get_input_embeddings())
        ids = question.inputs[None]
        expected = captum.attribute(ids, torch.full_like(ids, 3), n_steps=6, method="gausslegendre").sum(-1)[0]
        torch.testing.assert_close(found.scores[:, target], expected.detach().float(), atol=1e-4, rtol=1e-3)


def test_integrated_gradients_add_up():
    model = tiny_models.build("gpt_neox").double()  # smooth enough for a few steps
    question = question_for(model)
    found = integrated_gradients(model, question, steps=40, baseline=7)
    with torch.no_grad():
        ids = torch.stack([question.inputs, torch.full_like(question.inputs, 7)])
        logprobs = model(ids).logits.log_softmax(-1)[:, question.rows, question.targets]
    torch.testing.assert_close(found.scores.sum(0), logprobs[0] - logprobs[1], atol=1e-4, rtol=0)
    assert found.stats["completeness_gap"] < 1e-4
    assert integrated_gradients(model, question, steps=1, baseline=7).stats["completeness_gap"] > 1e-3


def test_integrated_gradients_begin_at_zeros_unless_told():
    model = tiny_models.build("gpt_neox")
    question = question_for(model)
    by_default = integrated_gradients(model, question, steps=2).scores
    assert not torch.allclose(by_default, integrated_gradients(model, question, steps=2, baseline=0).scores)
    with torch.no_grad():
        model.gpt_neox.embed_in.weight[50] = 0.0
    torch.testing.assert_close(integrated_gradients(model, question, steps=2, baseline=50).scores, by_default)


def test_integrated_gradients_say_when_they_have_not_converged():
    model = tiny_models.build("gpt_neox").double()
    question = question_for(model)
    with pytest.warns(UserWarning, match="have not converged: with 1 steps their sum is .* nats off"):
        integrated_gradients(model, question, steps=1, baseline=7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        integrated_gradients(model, question, steps=40, baseline=7)


@pytest.mark.parametrize("method", [input_x_gradient, integrated_gradients, attnlrp])
def test_the_whole_answers_scores_are_the_sums(llama, method):
    question = question_for(llama)
    options = {"steps": 2} if method is integrated_gradients else {}
    single, whole = (method(llama, question, **options, whole_answer=flag) for flag in (False, True))
    torch.testing.assert_close(whole.scores, single.scores.sum(1, keepdim=True))
    torch.testing.assert_close(whole.logprobs, single.logprobs)
    assert whole.scores.shape == (12, 1)
    with pytest.raises(InputError, match="whole_answer must be True or False, got 'yes'"):
        method(llama, question, whole_answer="yes")


def test_the_whole_answer_should_add_up_as_well():
    model = tiny_models.build("gpt_neox").double()
    question = question_for(model)
    found = integrated_gradients(model, question, steps=40, baseline=7, whole_answer=True)
    with torch.no_grad():
        ids = torch.stack([question.inputs, torch.full_like(question.inputs, 7)])
        logprobs = model(ids).logits.log_softmax(-1)[:, question.rows, question.targets].sum(1)
    torch.testing.assert_close(found.scores.sum(), logprobs[0] - logprobs[1], atol=1e-4, rtol=0)
    assert found.stats["completeness_gap"] < 1e-4


# What all have in common ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_values_are_the_models_own_and_nothing_stays(model, method):
    question = question_for(model)
    with torch.no_grad():
        expected = model(question.inputs[None]).logits[0, question.rows].log_softmax(-1)
    before = model.config._attn_implementation
    grads = [p.requires_grad for p in model.parameters()]
    with torch.inference_mode():
        found = method(model, question)
    assert found.scores.shape == (12, 3)
    assert not found.scores.requires_grad
    assert not found.logprobs.requires_grad
    torch.testing.assert_close(found.logprobs, expected.gather(1, question.targets[:, None])[:, 0], atol=1e-4, rtol=0)
    assert (found.scores[10:, 0] == 0).all(), "what comes later does not count"
    assert found.scores.abs().sum() > 0
    assert model.config._attn_implementation == before
    assert [p.requires_grad for p in model.parameters()] == grads
    assert all(p.grad is None for p in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("method", METHODS)
def test_frozen_parameters_stay_frozen(llama, method):
    for parameter in list(llama.parameters())[::2]:
        parameter.requires_grad_(False)
    grads = [p.requires_grad for p in llama.parameters()]
    method(llama, question_for(llama))
    assert [p.requires_grad for p in llama.parameters()] == grads


@pytest.mark.parametrize("method", METHODS)
def test_everything_is_restored_after_a_failure(llama, method, monkeypatch):
    question = question_for(llama)

    def fail(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(llama.model.layers[-1].mlp, "forward", fail)
    with pytest.raises(ZeroDivisionError):
        method(llama, question)
    assert llama.config._attn_implementation == "sdpa"
    assert all(p.requires_grad for p in llama.parameters())
    assert not llama.get_input_embeddings()._forward_hooks


def test_recomputed_layers_give_the_same(model):
    question = question_for(model)
    for method, options in ((input_x_gradient, {}), (integrated_gradients, {"steps": 2})):
        plain = method(model, question, **options).scores
        torch.testing.assert_close(method(model, question, **options, checkpointing=True).scores, plain)


def test_units_are_sums_of_their_tokens(llama):
    spans = [(0, 5), (3, 11)]  # w5 w6 | w6 w7 w8
    question = question_for(llama, units=spans)
    scores = torch.randn(12, 3)
    expected = torch.stack([scores[:2].sum(0), scores[1:4].sum(0)])
    torch.testing.assert_close(unit_scores(question, scores), expected)
    with_target = question_for(llama, include_target=True)
    assert torch.equal(unit_scores(with_target, scores), scores)


def test_sixteen_bits_stay_near(llama):
    question = question_for(llama)
    expected = [method(llama, question).scores for method in METHODS[:5]]
    llama.bfloat16()
    for method, exact in zip(METHODS, expected, strict=False):
        assert (method(llama, question).scores.float() - exact).norm() < 0.15 * exact.norm()


# What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [3, -4])
def test_layers_that_are_not_there(llama, layer):
    with pytest.raises(InputError, match=f"layer must be an index into 3 layers, got {layer}"):
        methods.method("raw_attention", {"layer": layer}).check(llama)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be an integer from 1 to 10,000, got 0"),
        ({"steps": 2.5}, "steps must be an integer from 1 to 10,000, got 2.5"),
        ({"batch": 0}, "batch must be an integer from 1 to 10,000, got 0"),
        ({"baseline": 99}, "a token id below 99, got 99"),
        ({"baseline": -1}, "None or a token id, got -1"),
        ({"baseline": "mean"}, "None or a token id, got 'mean'"),
    ],
)
def test_bad_options(llama, options, message):
    with pytest.raises(InputError, match=message):
        methods.method("integrated_gradients", options).check(llama)


@pytest.mark.parametrize("method", [raw_attention, rollout, chefer, gradcam])
def test_attention_weights_are_refused_under_a_suppression(llama, method):
    question = question_for(llama)
    with suppress(llama, torch.ones(1, 12)), pytest.raises(InputError, match="already under a suppression"):
        method(llama, question)


def test_models_without_reachable_attention_are_refused_by_name():
    from transformers import XLNetConfig, XLNetLMHeadModel

    xlnet = XLNetLMHeadModel(XLNetConfig(vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=32)).eval()
    for method in METHODS[:4]:
        with pytest.raises(UnsupportedModelError, match="XLNet"):
            method(xlnet, question_for(tiny_models.build("llama")))


def test_layers_that_are_no_attention_are_refused():
    from transformers import Lfm2Config, Lfm2ForCausalLM

    config = Lfm2Config(**tiny_models.GROUPED, layer_types=["conv", "full_attention", "conv"])
    model = Lfm2ForCausalLM(config).eval()
    with pytest.raises(UnsupportedModelError, match="does not give its attention weights: 1 of 3 layers did"):
        rollout(model, question_for(model))
