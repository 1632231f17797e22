"""AttnLRP by changed gradients against relevances carried through the model by hand; restoration; refusals."""

import os

import explicit_lrp
import pytest
import tiny_models
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from atman_kernels import UnsupportedModelError, suppress
from atman_kernels.explain.methods.attnlrp import FAMILIES, attnlrp, rules
from atman_kernels.hf.forward.base import own_logprobs
from atman_kernels.inputs.text_generation import CausalObjective, ask

PROMPT = "w5 w6 w7 w8 w9 w10 w11 w12 w13 w14"
ANSWER = "w20 w21 w22"


def question_for(model) -> CausalObjective:
    options = {"include_target": False, "chat": False, "max_new_tokens": 1, "language": "en"}
    return ask(model, tiny_models.tokenizer(), PROMPT, ANSWER, "token", **options)


def explicit(model, question: CausalObjective) -> list[explicit_lrp.Relevance]:
    pairs = zip(question.rows.tolist(), question.targets.tolist(), strict=True)
    return [explicit_lrp.attnlrp(model, question.inputs, row, target) for row, target in pairs]


def supported() -> list[str]:
    return sorted(
        {"llama", "mistral", "qwen3", "gemma3", "phi3", "olmo2", "gpt2", "gpt_neox"} & set(tiny_models.PACKABLE)
    )


def test_llama_equals_relevances_carried_by_hand():
    model = tiny_models.build("llama").double()
    question = question_for(model)
    found = attnlrp(model, question)
    expected = torch.stack([r.tokens for r in explicit(model, question)], dim=1)
    assert expected.abs().amax(0).min() > 0.1
    # the model's own normalisations compute in float32
    torch.testing.assert_close(found.scores, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        found.logprobs.float(), own_logprobs(model, question.inputs, question.rows, question.targets).float()
    )


def test_relevance_adds_up_to_the_logit_and_what_the_softmax_absorbs():
    model = tiny_models.build("llama").double()
    question = question_for(model)
    by_hand = explicit(model, question)
    whole = attnlrp(model, question).scores.sum(0) + torch.stack([r.absorbed for r in by_hand])
    torch.testing.assert_close(whole, torch.stack([r.logit for r in by_hand]), atol=1e-4, rtol=0)
    assert max(abs(float(r.absorbed)) for r in by_hand) > 0.01


def test_relevance_adds_up_to_the_logit_where_attention_writes_nothing():
    model = tiny_models.build("llama").double()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    question = question_for(model)
    logits = model(question.inputs[None]).logits[0, question.rows].gather(1, question.targets[:, None])[:, 0]
    torch.testing.assert_close(attnlrp(model, question).scores.sum(0), logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", supported())
def test_values_stay_and_the_model_comes_back(family):
    model = tiny_models.build(family)
    question = question_for(model)
    before = own_logprobs(model, question.inputs, question.rows, question.targets)
    attention = model.config._attn_implementation
    found = attnlrp(model, question)
    assert found.scores.shape == (12, 3)
    assert torch.isfinite(found.scores).all()
    assert found.scores.abs().amax(0).min() > 0
    assert (found.scores[11, :2] == 0).all(), "a token cannot explain those before it"
    torch.testing.assert_close(found.logprobs, before, atol=1e-4, rtol=0)
    assert model.config._attn_implementation == attention
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == [m for m in tiny_models.build(family).modules() if m._forward_hooks or m._forward_pre_hooks]
    torch.testing.assert_close(own_logprobs(model, question.inputs, question.rows, question.targets), before)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_layer_norms_and_biases_keep_what_is_theirs(family):
    """Without position embeddings and biases, and with attention that writes nothing, the logit is all there."""
    model = tiny_models.build(family).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "wpe" in name or "attn.c_proj" in name or "attention.dense" in name:
                parameter.zero_()
    question = question_for(model)
    logits = model(question.inputs[None]).logits[0, question.rows].gather(1, question.targets[:, None])[:, 0]
    torch.testing.assert_close(attnlrp(model, question).scores.sum(0), logits, atol=1e-5, rtol=1e-5)


def test_recomputed_layers_give_the_same():
    model = tiny_models.build("llama")
    question = question_for(model)
    plain, recomputed = (attnlrp(model, question, checkpointing=c) for c in (False, True))
    assert torch.equal(plain.scores, recomputed.scores)
    assert "forward" not in vars(model.model.layers[0])


def test_works_where_the_caller_switched_gradients_off():
    model = tiny_models.build("llama")
    question = question_for(model)
    expected = attnlrp(model, question).scores
    with torch.inference_mode():
        assert torch.equal(attnlrp(model, question_for(model)).scores, expected)


def test_bfloat16_stays_near():
    model = tiny_models.build("llama")
    expected = attnlrp(model, question_for(model)).scores
    model = model.bfloat16()
    found = attnlrp(model, question_for(model)).scores
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.15 * expected.norm()


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "opt", "mixtral", "deepseek_v3"])
def test_other_families_are_refused_by_name(family):
    model = tiny_models.build(family)
    with pytest.raises(UnsupportedModelError, match=f"has no AttnLRP rules: .* not for '{model.config.model_type}'"):
        attnlrp(model, question_for(model))
    assert not any(m._forward_hooks for m in model.modules())


def test_unknown_modules_are_refused_by_name():
    model = tiny_models.build("llama")
    model.model.layers[1].self_attn.o_proj = torch.nn.Bilinear(2, 2, 2)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.self_attn\.o_proj is a Bilinear"), rules(model):
        pass


def test_capped_logits_are_refused():
    model = tiny_models.build("gemma3")
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(UnsupportedModelError, match="its head caps the logits"):
        attnlrp(model, question_for(model))


def test_a_normalisation_that_is_none_is_refused_and_everything_restored(monkeypatch):
    model = tiny_models.build("llama")
    question = question_for(model)
    before = model.config._attn_implementation
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: torch.tanh(x) * self.weight)
    with pytest.raises(UnsupportedModelError, match="LlamaRMSNorm has no AttnLRP rule: it is no plain normalisation"):
        attnlrp(model, question)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation == before


def test_no_rules_under_a_suppression():
    model = tiny_models.build("llama")
    question = question_for(model)
    with suppress(model, torch.ones(1, 12)), pytest.raises(ValueError, match="already under a suppression"):
        attnlrp(model, question)


def test_families_are_model_types():
    from transformers import CONFIG_MAPPING

    assert [name for name in FAMILIES if name not in CONFIG_MAPPING] == []


@pytest.mark.slow
def test_equals_lxt():
    python = os.environ.get("ATMAN_LXT_PYTHON")
    if not python:
        pytest.skip("ATMAN_LXT_PYTHON names no interpreter of an environment with lxt (benchmarks/lxt_parity.py)")
    from benchmarks.lxt_parity import FAMILIES as COMPARED
    from benchmarks.lxt_parity import parity

    found = parity(python)
    assert set(found) == set(COMPARED)
    assert max(found.values()) < 1e-4, found
