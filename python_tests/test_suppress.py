"""`suppress` on unmodified models: right numbers, and nothing left behind."""

import contextvars
import threading

import eager_oracle
import pytest
import tiny_models
import torch
import transformers as hf

import atman_kernels as ak
from atman_kernels.hf import interface

FAMILIES = ("llama", "mistral", "gemma2", "gpt_oss", "gpt2")
PROMPT = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]])


def implementations(model) -> list[str]:
    return [m.config._attn_implementation for m in model.modules() if isinstance(m, hf.PreTrainedModel)]


@pytest.mark.parametrize("mode", ["log_additive", "multiplicative", "shifted"])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_equals_the_oracle(family, mode):
    model = tiny_models.build(family)
    factor = torch.ones(1, PROMPT.shape[1])
    factor[0, 2], factor[0, 7] = 0.2, 1.7
    with torch.no_grad(), ak.suppress(model, factor, mode=mode):
        logits = model(PROMPT).logits[0, -1].double()
    ids = torch.cat([PROMPT[0], torch.tensor([20])])
    expected = eager_oracle.target_logprobs(model, ids, PROMPT.shape[1], factor[0], mode)
    torch.testing.assert_close(logits.log_softmax(-1)[20], expected[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_equals_full_recomputation(family):
    """Prompt and answer exceed the sliding window, so that caches drop keys."""
    model = tiny_models.build(family)
    factor = torch.ones(1, PROMPT.shape[1])
    factor[0, 6:10] = 0.1
    settings = {"max_new_tokens": 9, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with ak.suppress(model, factor):
        cached = model.generate(PROMPT, pad_token_id=0, eos_token_id=None, **settings)
        sequence = cached.sequences
        with torch.no_grad():
            full = model(sequence[:, :-1], use_cache=False).logits[:, PROMPT.shape[1] - 1 :]
    torch.testing.assert_close(torch.stack(cached.logits, dim=1), full, atol=1e-4, rtol=0)
    plain = model.generate(PROMPT, pad_token_id=0, eos_token_id=None, **settings)
    assert (plain.logits[0] - cached.logits[0]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_left_padding_and_rows_with_factors_of_their_own(family):
    model = tiny_models.build(family)
    short = PROMPT[:, 4:]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), short], dim=1)
    ids, mask = torch.cat([PROMPT, padded]), torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    factor = torch.ones(2, 12)
    factor[0, 3], factor[1, 9] = 0.1, 0.0
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with ak.suppress(model, factor):
        together = model.generate(ids, attention_mask=mask, **settings)
    with ak.suppress(model, factor[:1]):
        first = model.generate(PROMPT, **settings)
    with ak.suppress(model, factor[1:, 4:]):
        second = model.generate(short, **settings)
    assert together[0, 12:].tolist() == first[0, 12:].tolist()
    assert together[1, 12:].tolist() == second[0, 8:].tolist()


def test_beams_and_several_sequences_share_their_prompts_factors():
    model = tiny_models.build("llama")
    factor = torch.ones(2, 12)
    factor[0, 3] = factor[1, 8] = 0.0
    ids = torch.cat([PROMPT, PROMPT.flip(1)])
    settings = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with ak.suppress(model, factor):
        together = model.generate(ids, **settings)
    for row in range(2):
        with ak.suppress(model, factor[row : row + 1]):
            assert model.generate(ids[row : row + 1], **settings)[0].tolist() == together[row].tolist()


def test_removed_token_equals_a_model_that_never_sees_the_key():
    model = tiny_models.build("llama")
    factor = torch.ones(1, 12)
    factor[0, 4] = 0.0
    visible = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
    visible[..., 4] = False
    visible[..., 4, 4] = True  # one key must remain for row 4 here; rows after it never see key 4
    with torch.no_grad():
        with ak.suppress(model, factor):
            suppressed = model(PROMPT).logits[:, 5:]
        masked = model(PROMPT, attention_mask=visible).logits[:, 5:]
    torch.testing.assert_close(suppressed, masked, atol=1e-5, rtol=0)


def test_layers_are_counted_in_the_order_of_calls():
    model = tiny_models.build("llama")
    factor = torch.full((1, 12), 0.3)
    factor[:, 6:] = 1.0
    ids = torch.cat([PROMPT[0], torch.tensor([20])])
    for layers in ([0], [1, 2]):
        with torch.no_grad(), ak.suppress(model, factor, layers=layers):
            got = model(PROMPT).logits[0, -1].double().log_softmax(-1)[20]
        expected = eager_oracle.target_logprobs(model, ids, 12, factor[0], "log_additive", layers)
        torch.testing.assert_close(got, expected[0], atol=1e-5, rtol=0)


def test_encoder_is_suppressed_both_ways_and_with_padding():
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = hf.BertModel(config, add_pooling_layer=False).eval()
    ids = torch.randint(3, 50, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    factor = torch.rand(2, 9)
    bias = factor.log()[:, None, None].expand(2, 1, 9, 9).masked_fill(mask[:, None, None] == 0, -1e9)
    with torch.no_grad():
        with ak.suppress(model, factor):
            got = model(ids, attention_mask=mask).last_hidden_state
        expected = model(ids, attention_mask=bias).last_hidden_state
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


# --- nothing is left behind ---


def test_model_is_as_before_on_exit_and_after_an_exception():
    model = tiny_models.build("llama")
    before, expected = implementations(model), model(PROMPT).logits
    with ak.suppress(model, torch.zeros(1, 12)):
        assert set(implementations(model)) == {interface.NAME}
    with pytest.raises(KeyError), ak.suppress(model, torch.zeros(1, 12)):
        raise KeyError("in the middle")
    assert implementations(model) == before
    assert not model.model._forward_hooks
    assert not interface._everywhere
    assert not interface._switches
    assert torch.equal(model(PROMPT).logits, expected)


def test_without_a_run_the_function_is_plain_sdpa():
    model = tiny_models.build("llama")
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[0, :3] = 0
    expected = model(PROMPT, attention_mask=mask).logits
    model.set_attn_implementation(interface.NAME)
    assert torch.equal(model(PROMPT, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_without_a_run_softcap_and_sinks_still_count(family):
    model = tiny_models.build(family)
    model.set_attn_implementation("eager")
    expected = model(PROMPT).logits
    model.set_attn_implementation(interface.NAME)
    torch.testing.assert_close(model(PROMPT).logits, expected, atol=1e-5, rtol=1e-5)


def test_factor_none_is_the_model_itself():
    model = tiny_models.build("gemma3")
    with torch.no_grad():
        expected = model(PROMPT).logits
        with ak.suppress(model, None):
            torch.testing.assert_close(model(PROMPT).logits, expected, atol=1e-5, rtol=0)


def test_another_model_is_not_touched():
    model, other = tiny_models.build("llama"), tiny_models.build("llama", seed=1)
    expected = other(PROMPT).logits
    with ak.suppress(model, torch.zeros(1, 12) + 0.01):
        assert torch.equal(other(PROMPT).logits, expected)


def test_two_models_at_once():
    first, second = tiny_models.build("llama"), tiny_models.build("gpt2")
    factor = torch.ones(1, 12)
    factor[0, 3] = 0.1
    with torch.no_grad():
        with ak.suppress(first, factor):
            expected_first = first(PROMPT).logits
        with ak.suppress(second, factor.flip(1)):
            expected_second = second(PROMPT).logits
        with ak.suppress(first, factor), ak.suppress(second, factor.flip(1)):
            assert torch.equal(first(PROMPT).logits, expected_first)
            assert torch.equal(second(PROMPT).logits, expected_second)


def run_in_thread(target) -> list:
    results: list = []

    def body():
        try:
            results.append(target())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    return results


def test_a_thread_started_inside_is_told_how_to_take_the_suppression_along():
    model = tiny_models.build("llama")
    factor = torch.ones(1, 12)
    factor[0, 3] = 0.0
    with torch.no_grad(), ak.suppress(model, factor):
        expected = model(PROMPT).logits
        (lost,) = run_in_thread(lambda: model(PROMPT).logits)
        context = contextvars.copy_context()
        (found,) = run_in_thread(lambda: context.run(lambda: model(PROMPT).logits))
    assert isinstance(lost, RuntimeError)
    assert "copy_context" in str(lost)
    assert torch.equal(found, expected)


def test_threads_suppress_the_same_model_apart():
    model = tiny_models.build("llama")
    factors = [torch.ones(1, 12), torch.ones(1, 12)]
    factors[0][0, 3] = factors[1][0, 8] = 0.0
    with torch.no_grad():
        expected = []
        for factor in factors:
            with ak.suppress(model, factor):
                expected.append(model(PROMPT).logits)
        inside = threading.Barrier(2, timeout=20)
        results = {}

        def body(i):
            with torch.no_grad(), ak.suppress(model, factors[i]):
                inside.wait()
                results[i] = model(PROMPT).logits
                inside.wait()

        threads = [threading.Thread(target=body, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(results[i], expected[i]) for i in range(2))
    assert set(implementations(model)) == {"sdpa"}


# --- bad input ---


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (torch.full((1, 12), -0.5), "factor must be finite and >= 0"),
        (torch.full((1, 12), torch.nan), "factor must be finite and >= 0"),
        (torch.ones(12), r"factor must be .* got torch.float32 \(12,\)"),
        (torch.ones(1, 12, dtype=torch.long), "factor must be a floating point tensor"),
        ([[1.0]], "factor must be .* got list"),
    ],
)
def test_bad_factor_is_refused_and_leaves_the_model_alone(factor, message):
    model = tiny_models.build("llama")
    with pytest.raises(ak.InputError, match=message), ak.suppress(model, factor):
        pass
    assert set(implementations(model)) == {"sdpa"}


def test_factor_rows_must_divide_the_batch():
    model = tiny_models.build("llama")
    with pytest.raises(ak.InputError, match="factor has 2 rows"), ak.suppress(model, torch.ones(2, 12)):
        model(PROMPT.expand(3, -1))
    assert set(implementations(model)) == {"sdpa"}


def test_nested_suppression_mode_layers_and_model_are_checked():
    model = tiny_models.build("llama")
    with (
        ak.suppress(model, None),
        pytest.raises(ak.InputError, match="already under a suppression"),
        ak.suppress(model, None),
    ):
        pass
    with pytest.raises(ak.InputError, match="mode must be one of"), ak.suppress(model, None, mode="loud"):
        pass
    with pytest.raises(ak.InputError, match="layers must be indices in"), ak.suppress(model, None, layers=[-1]):
        pass
    with pytest.raises(ak.InputError, match="model must be a transformers"), ak.suppress(torch.nn.Linear(1, 1), None):
        pass


def test_dropout_is_refused():
    model = tiny_models.build("gpt2").train()
    with pytest.raises(ak.InputError, match="eval mode"), ak.suppress(model, torch.ones(1, 12)):
        model(PROMPT)


UNREACHABLE = {
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2)),
    "codegen": lambda: hf.CodeGenForCausalLM(
        hf.CodeGenConfig(vocab_size=50, n_embd=16, n_layer=1, n_head=4, rotary_dim=4, n_positions=32)
    ),
    "gptj": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(vocab_size=50, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)),
    "falcon": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    ),
    "mpt": lambda: hf.MptForCausalLM(hf.MptConfig(vocab_size=50, d_model=16, n_heads=2, n_layers=1)),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ),
}


@pytest.mark.parametrize("family", UNREACHABLE)
def test_models_that_never_reach_us_are_refused_by_name(family):
    model = UNREACHABLE[family]().eval()
    name = type(model).__name__
    with pytest.raises(ak.UnsupportedModelError, match=name), ak.suppress(model, torch.ones(1, 12)):
        pass
    with pytest.raises(ak.UnsupportedModelError, match=name):
        ak.Explainer(model, tiny_models.tokenizer())
