"""Decoders that compute attention themselves: suppressed, packed and explained like all others, then as before."""

import threading
import warnings

import pytest
import softmax_oracle
import tiny_models
import torch

import atman_kernels as ak
from atman_kernels.hf.attention import switch
from atman_kernels.hf.models import families

MODES = ("log_additive", "multiplicative", "shifted")
FAMILIES = tuple(tiny_models.OWN_ATTENTION)
PROMPT = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 21, 34]])
LENGTH = PROMPT.shape[1]


def draw(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, tiny_models.VOCABULARY, (count,), generator=generator).tolist()


def explained(model, prompts, answers, **settings):
    explainer = ak.Explainer(model, tiny_models.tokenizer(), progress=False, **{"factor": 0.1} | settings)
    texts = [[tiny_models.text_of(ids) for ids in group] for group in (prompts, answers)]
    return explainer.explain_batch(*texts)


def expected_scores(model, prompt, answer, mode, factor=0.1, layers=None):
    ids = torch.tensor(prompt + answer)
    rows = torch.ones(len(prompt), len(ids))
    rows.fill_diagonal_(factor)
    return softmax_oracle.leave_one_out(model, ids, len(prompt), rows, mode, layers)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_suppressed_forward_equals_the_models_own_with_changed_scores(family, mode):
    model = tiny_models.build(family)
    factor = torch.ones(1, LENGTH)
    factor[0, 2], factor[0, 7] = 0.2, 1.7
    with torch.no_grad():
        with ak.suppress(model, factor, mode=mode):
            logits = model(PROMPT).logits
        with softmax_oracle.Suppressed(factor[0], mode):
            expected = model(PROMPT, use_cache=False).logits
        assert (model(PROMPT).logits - expected).abs().max() > 1e-2
    torch.testing.assert_close(logits, expected, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_explanation_equals_separate_full_runs(family, mode):
    model = tiny_models.build(family)
    prompt, answer = draw(19, 1), draw(3, 2)
    (explanation,) = explained(model, [prompt], [answer], mode=mode)
    expected = expected_scores(model, prompt, answer, mode)
    assert explanation.settings["path"] == "packed"
    assert expected.abs().max() > 1e-2, "the oracle must move, or the comparison says nothing"
    torch.testing.assert_close(explanation.scores.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_questions_about_one_passage_share_what_is_run_over_it(family):
    model, passage = tiny_models.build(family), draw(14, 3)
    prompts, answers = [passage + draw(length, 4 + length) for length in (2, 5, 3)], [draw(2, 6)] * 3
    found = explained(model, prompts, answers, token_budget=64)
    assert found[0].stats["tokens_through_model"] < 0.85 * sum(sum(range(2, len(p) + 2)) for p in prompts)
    for explanation, prompt, answer in zip(found, prompts, answers, strict=True):
        expected = expected_scores(model, prompt, answer, "log_additive")
        torch.testing.assert_close(explanation.scores.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_several_lengths_share_packs(family):
    model = tiny_models.build(family)
    prompts, answers = [draw(21, 3), draw(12, 4), draw(17, 5)], [draw(2, 6), draw(3, 7), draw(1, 8)]
    found = explained(model, prompts, answers, layers=[1], token_budget=64)
    for explanation, prompt, answer in zip(found, prompts, answers, strict=True):
        assert explanation.settings["path"] == "packed"
        expected = expected_scores(model, prompt, answer, "log_additive", layers=[1])
        torch.testing.assert_close(explanation.scores.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["multiplicative", "shifted"])
def test_mpt_counts_from_the_end_of_each_prompt(mode):
    """One pack has one bias, so that prompts of different lengths cannot share one where constants count."""
    model = tiny_models.build("mpt")
    prompts, answers = [draw(21, 3), draw(12, 4)], [draw(2, 6), draw(3, 7)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = explained(model, prompts, answers, mode=mode)
    fell_back = [str(w.message) for w in caught if "counts positions from the end" in str(w.message)]
    assert bool(fell_back) == (mode == "multiplicative")
    for explanation, prompt, answer in zip(found, prompts, answers, strict=True):
        expected = expected_scores(model, prompt, answer, mode)
        torch.testing.assert_close(explanation.scores.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_longer_than_the_prompt_brings_padding_that_changes_nothing(family):
    model = tiny_models.build(family)
    prompt, answer = draw(26, 9), draw(2, 10)
    (explanation,) = explained(model, [prompt], [answer], token_budget=4096)
    expected = expected_scores(model, prompt, answer, "log_additive")
    torch.testing.assert_close(explanation.scores.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_equals_full_recomputation(family):
    model = tiny_models.build(family)
    factor = torch.ones(1, LENGTH)
    factor[0, 6:10] = 0.1
    settings = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with ak.suppress(model, factor):
        cached = model.generate(PROMPT, pad_token_id=0, eos_token_id=None, **settings)
        with torch.no_grad():
            full = model(cached.sequences[:, :-1], use_cache=False).logits[:, LENGTH - 1 :]
    torch.testing.assert_close(torch.stack(cached.logits, dim=1), full, atol=1e-4, rtol=0)
    plain = model.generate(PROMPT, pad_token_id=0, eos_token_id=None, **settings)
    assert (plain.logits[0] - cached.logits[0]).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding(family):
    model = tiny_models.build(family)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), PROMPT[:, 3:]], dim=1)
    ids, mask = torch.cat([PROMPT, padded]), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :3] = 0
    factor = torch.ones(2, LENGTH)
    factor[0, 3], factor[1, 9] = 0.1, 0.0
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    with ak.suppress(model, None):
        ours = model.generate(ids, attention_mask=mask, **settings)
    own = model.generate(ids, attention_mask=mask, **settings)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(own.logits), atol=1e-4, rtol=0)
    with ak.suppress(model, factor):
        together = model.generate(ids, attention_mask=mask, **settings)
    with ak.suppress(model, factor[1:]):
        alone = model.generate(padded, attention_mask=mask[1:], **settings)
    both = torch.stack([logits[1] for logits in together.logits])
    torch.testing.assert_close(both, torch.stack([logits[0] for logits in alone.logits]), atol=1e-4, rtol=0)
    assert (both - torch.stack([logits[1] for logits in own.logits])).abs().max() > 1e-3


@pytest.mark.parametrize("family", [f for f in FAMILIES if "alibi" not in f and f not in ("bloom", "openai-gpt")])
def test_a_mask_of_the_users_own_keeps_its_meaning(family):
    """Models with ALiBi made from the mask take no whole masks; MPT's is not."""
    model = tiny_models.build(family)
    visible = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    visible[5:, 1] = visible[9:, 6] = False
    mask = torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(~visible, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = model(PROMPT, attention_mask=mask).logits
        assert (model(PROMPT).logits - expected).abs().max() > 1e-2
        with ak.suppress(model, None):
            torch.testing.assert_close(model(PROMPT, attention_mask=mask).logits, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_left_behind(family):
    model = tiny_models.build(family)
    expected = model(PROMPT).logits
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    implementation = model.config._attn_implementation
    with pytest.raises(KeyError), ak.suppress(model, torch.zeros(1, LENGTH)):  # noqa: PT012
        model(PROMPT)
        raise KeyError("in the middle")
    with pytest.raises(ak.InputError), ak.suppress(model, torch.ones(2, LENGTH)):
        model(PROMPT.expand(3, -1))
    explained(model, [draw(9, 1)], [draw(1, 2)])
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert model.config._attn_implementation == implementation
    assert not switch._switches
    assert torch.equal(model(PROMPT).logits, expected)


@pytest.mark.parametrize("family", ["gptj", "bloom"])
def test_threads_suppress_the_same_model_apart(family):
    model = tiny_models.build(family)
    factors = [torch.ones(1, LENGTH), torch.ones(1, LENGTH)]
    factors[0][0, 3] = factors[1][0, 8] = 0.0
    expected, results, lost = [], {}, []
    with torch.no_grad():
        plain = model(PROMPT).logits
        for factor in factors:
            with ak.suppress(model, factor):
                expected.append(model(PROMPT).logits)
    inside = threading.Barrier(2, timeout=20)

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
    with ak.suppress(model, factors[0]), pytest.warns(RuntimeWarning, match="copy_context"):  # noqa: PT031
        outside = threading.Thread(target=lambda: lost.append(model(PROMPT).logits))
        outside.start()
        outside.join()
    assert torch.equal(lost[0], plain)
    assert not any(families.family_of(m) and {"forward", "_attn"} & set(m.__dict__) for m in model.modules())


@pytest.mark.parametrize("family", ["falcon", "mpt", "gptj"])
def test_hooks_of_other_libraries_stay_in_charge(family):
    hooks = pytest.importorskip("accelerate.hooks")

    class Counting(hooks.ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Counting.calls += 1
            return args, kwargs

    model = tiny_models.build(family)
    factor = torch.ones(1, LENGTH)
    factor[0, 2] = 0.0
    with torch.no_grad(), ak.suppress(model, factor):
        expected = model(PROMPT).logits
    attention = [m for m in model.modules() if families.family_of(m)]
    for module in attention:
        hooks.add_hook_to_module(module, Counting())
    with torch.no_grad(), ak.suppress(model, factor):
        assert torch.equal(model(PROMPT).logits, expected)
    assert Counting.calls == len(attention)
    plain = model(PROMPT).logits
    for module in attention:
        hooks.remove_hook_from_module(module)
    assert torch.equal(model(PROMPT).logits, plain)


@pytest.mark.parametrize("family", ["gptj", "falcon alibi", "bloom", "mpt", "codegen"])
def test_bfloat16(family):
    model = tiny_models.build(family).bfloat16()
    prompt, answer = draw(19, 1), draw(3, 2)
    (explanation,) = explained(model, [prompt], [answer])
    assert explanation.settings["path"] == "packed"
    expected = expected_scores(model.float(), prompt, answer, "log_additive")
    assert (explanation.scores - expected).square().mean().sqrt() < 0.1


def test_training_mode_is_refused_where_attention_drops():
    model = tiny_models.OWN_ATTENTION["openai-gpt"]().train()
    with pytest.raises(ak.InputError, match="eval mode"), ak.suppress(model, torch.ones(1, LENGTH)):
        model(PROMPT)


def test_subclasses_are_not_taken_for_their_parents():
    from transformers.models.gptj.modeling_gptj import GPTJFlashAttention2

    model = tiny_models.build("gptj")
    for module in model.modules():
        if families.family_of(module):
            module.__class__ = GPTJFlashAttention2
    with pytest.raises(ak.UnsupportedModelError, match="GPTJForCausalLM"), ak.suppress(model, torch.ones(1, LENGTH)):
        pass


def test_what_differs_from_the_models_own_attention_is_refused():
    """Falcon's eager branch adds ALiBi twice where its mask holds it already; with sdpa, its default, it is added once.

    Whatever the cause: numbers that do not follow the model's own attention are not explained.
    """
    model = tiny_models.build("falcon alibi")
    model.config._attn_implementation_internal = "eager"
    with torch.no_grad():
        eager = model(PROMPT).logits
        model.config._attn_implementation_internal = "sdpa"
        differ = (model(PROMPT).logits - eager).abs().max() > 1e-2
    if not differ:
        pytest.skip("this transformers has one formula for both")
    model.config._attn_implementation_internal = "eager"
    with pytest.raises(ak.UnsupportedModelError, match="does not reproduce its own"):
        explained(model, [draw(9, 1)], [draw(2, 2)])


def test_a_16_bit_heads_bias_counts():
    """The head's product is made anew in float32; GPT-J's has a bias."""
    model = tiny_models.build("gptj").to(torch.bfloat16)
    with torch.no_grad():
        model.lm_head.bias.normal_(std=4, generator=torch.Generator().manual_seed(0))
        logits = model(torch.tensor([[5, 6, 7, 20]])).logits[0, [2, 3]].float().log_softmax(-1)
    found = ak.Explainer(model, tiny_models.tokenizer(), progress=False).explain("w5 w6 w7", "w20 w21")
    torch.testing.assert_close(found.base_logprobs, logits[[0, 1], [20, 21]], atol=0.2, rtol=0)
