"""Models that `torch.compile` or peft was put around: what the layers inside do, exactly."""

import pytest
import tiny_models
import torch
from torch import nn

import atman_kernels as ak
from atman_kernels.hf.models.wrapped import unwrapped

PROMPT, ANSWER = "w5 w6 w7 w8", "w9 w10"


@pytest.fixture
def model():
    return tiny_models.build("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_models.tokenizer()


def with_lora(model, **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
    return peft.get_peft_model(model, config).eval()


def scores(model, tokenizer, **options):
    return ak.Explainer(model, tokenizer, progress=False).explain(PROMPT, ANSWER, **options).scores


@pytest.mark.parametrize("wrap", [torch.compile, lambda m: torch.compile(m, fullgraph=True), lambda m: m])
def test_a_compiled_model_is_explained_as_it_is(model, tokenizer, wrap):
    expected = scores(model, tokenizer)
    wrapped = wrap(model)
    assert torch.equal(scores(wrapped, tokenizer), expected)
    assert ak.Explainer(wrapped, tokenizer).model is model


def test_adapters_in_the_layers_are_active(model, tokenizer):
    plain = scores(model, tokenizer)
    wrapped = with_lora(model)
    found = scores(wrapped, tokenizer)
    assert not torch.allclose(found, plain, atol=1e-3)
    assert torch.equal(found, scores(wrapped.get_base_model(), tokenizer))
    assert torch.equal(scores(torch.compile(wrapped), tokenizer), found)
    with wrapped.disable_adapter():
        torch.testing.assert_close(scores(wrapped, tokenizer), plain, atol=1e-5, rtol=0)
    ids = torch.tensor([[5, 6, 7, 8, 9]])  # the suppressed model is the wrapped one, called as the user calls it
    with ak.suppress(wrapped, torch.tensor([[1.0, 0.0, 1.0, 1.0, 1.0]])), torch.no_grad():
        by_suppress = wrapped(ids).logits.log_softmax(-1)[0, 3, 9]
    with torch.no_grad():
        own = wrapped(ids).logits.log_softmax(-1)[0, 3, 9]
    torch.testing.assert_close(own - by_suppress, found[1, 0], atol=1e-4, rtol=0)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(scores(merged, tokenizer), found, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["rollout", "input_x_gradient", "shapley", "attnlrp"])
def test_every_method_takes_adapters(model, tokenizer, method):
    wrapped = with_lora(model)
    found = scores(wrapped, tokenizer, method=method)
    assert torch.equal(found, scores(wrapped.get_base_model(), tokenizer, method=method))
    torch.testing.assert_close(found, scores(wrapped.merge_and_unload(), tokenizer, method=method), atol=1e-3, rtol=0)


def test_steering_a_model_with_adapters(model, tokenizer):
    wrapped = with_lora(model)
    for one in (wrapped, wrapped.get_base_model()):
        with ak.steer(one, tokenizer, PROMPT, {"w6": 0.1}) as steered:
            answer = steered.generate(max_new_tokens=4)
        if one is wrapped:
            expected = answer
    assert answer == expected


def test_captum_takes_wrapped_models(model, tokenizer):
    pytest.importorskip("captum")
    from captum.attr import FeatureAblation

    from atman_kernels.adapters.captum import AtManAttribution, SuppressedLLMAttribution, SuppressedTextInput

    for wrapped in (torch.compile(model), with_lora(model)):
        attribution = AtManAttribution(wrapped, tokenizer, progress=False)
        expected = scores(wrapped, tokenizer)
        torch.testing.assert_close(attribution.attribute(PROMPT, ANSWER).token_attr.T, expected, atol=1e-5, rtol=0)
        inp = SuppressedTextInput(PROMPT, attribution.explainer)
        by_captum = SuppressedLLMAttribution(FeatureAblation(wrapped), tokenizer).attribute(inp, ANSWER)
        torch.testing.assert_close(by_captum.token_attr.T, expected, atol=1e-5, rtol=0)


def virtual_tokens(peft, kind):
    if kind == "prompt":
        return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    return peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_are_refused(model, tokenizer, kind):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, virtual_tokens(peft, kind))
    with pytest.raises(ak.UnsupportedModelError, match="puts virtual tokens before the prompt"):
        ak.Explainer(wrapped, tokenizer)
    with pytest.raises(ak.UnsupportedModelError, match=r"model\.get_base_model\(\)"), ak.suppress(wrapped, None):
        pass


def test_adapters_that_wait_for_a_token_are_refused(model, tokenizer):
    wrapped = with_lora(model, task_type="CAUSAL_LM", alora_invocation_tokens=[5])
    with pytest.raises(ak.UnsupportedModelError, match="acts from certain tokens on"):
        ak.Explainer(wrapped, tokenizer)


class BaseTuner(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


class Router(BaseTuner):
    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


class Wrapped(nn.Module):
    """What peft puts around a model, as far as it matters here."""

    def __init__(self, tuner, config):
        super().__init__()
        self.base_model, self.peft_config, self.active_adapters = tuner, {"default": config}, ["default"]

    def get_base_model(self):
        return self.base_model.model


class Config:
    peft_type = "LORA"
    is_prompt_learning = False


def test_without_peft(model, tokenizer):
    wrapped = Wrapped(BaseTuner(model), Config())
    assert unwrapped(wrapped) is model
    assert torch.equal(scores(wrapped, tokenizer), scores(model, tokenizer))
    with pytest.raises(ak.UnsupportedModelError, match="does more than its base model's layers do"):
        unwrapped(Wrapped(Router(model), Config()))


@pytest.mark.parametrize("given", [None, "gpt2", 3, nn.Linear(2, 2)])
def test_what_is_no_model_is_refused(tokenizer, given):
    with pytest.raises(
        ak.InputError, match=f"model must be a transformers PreTrainedModel, got {type(given).__name__}"
    ):
        ak.Explainer(given, tokenizer)
    with pytest.raises(ak.InputError, match="model must be a transformers"), ak.suppress(given, None):
        pass
