"""`suppress` on unmodified models: right numbers, and nothing left behind."""

import contextvars
import threading

import eager_edits
import eager_oracle
import pytest
import tiny_models
import torch
import transformers as hf

import atman_kernels as ak
from atman_kernels.hf.attention import switch

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


# --- factors by layer and head, values, queries ---


def random_factors(*shape: int) -> torch.Tensor:
    """Seeded by the shape; the first key stays, so that every query sees one."""
    factor = torch.rand(*shape, generator=torch.Generator().manual_seed(len(shape))) * 1.5
    factor[..., 5] = 0.0
    factor[..., 0] = 1.0
    return factor


INTERVENTIONS = {
    "layers": lambda heads: {"factor": {0: random_factors(1, 12), 2: random_factors(1, heads, 12)}},
    "queries": lambda heads: {"factor": random_factors(1, 12), "queries": (6, 9)},
    "query_mask": lambda heads: {"factor": random_factors(1, heads, 12), "queries": torch.arange(12) % 3 == 1},
    "values": lambda heads: {"factor": None, "value_factor": random_factors(1, 12)},
    "head_values": lambda heads: {"factor": None, "value_factor": {1: random_factors(1, heads, 12)}},
    "all": lambda heads: {
        "factor": {0: random_factors(1, 12), 1: random_factors(1, 12)},
        "value_factor": random_factors(1, heads, 12),
        "queries": (3, None),
    },
}


def edits(factor, value_factor=None, queries=None):
    """The same, as edits of all scores (B, Hq, T, S) and all weights."""

    def at(factors, layer, tensor):
        found = factors.get(layer) if isinstance(factors, dict) else factors
        if found is None:
            return torch.ones_like(tensor)
        found = found if found.ndim == 3 else found[:, None]
        beyond = tensor.shape[-1] - found.shape[-1]
        spread = torch.cat([found, found.new_ones(*found.shape[:-1], beyond)], dim=-1)[:, :, None].expand_as(tensor)
        chosen = torch.zeros(tensor.shape[-2], dtype=torch.bool)
        if isinstance(queries, torch.Tensor):
            chosen[: len(queries)] = queries
        else:
            start, end = queries or (0, None)
            chosen[start:end] = True
        return torch.where(chosen[:, None], spread, 1.0)

    return {
        "scores": lambda layer, scores: scores + at(factor, layer, scores).log(),
        "weights": lambda layer, weights: weights * at(value_factor, layer, weights),
    }


@pytest.mark.parametrize("kind", INTERVENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_interventions_equal_edits_of_all_scores(family, kind):
    """Forward, and generation with a cache: prompt and answer exceed the sliding window, so that caches drop keys."""
    model = tiny_models.build(family)
    what = INTERVENTIONS[kind](model.config.num_attention_heads)
    with ak.suppress(model, **what):
        output = model.generate(
            PROMPT, max_new_tokens=7, do_sample=False, output_logits=True, return_dict_in_generate=True,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        with torch.no_grad():
            prompt_logits = model(PROMPT).logits
    with torch.no_grad():
        with eager_edits.edited(model, **edits(**what)):
            expected = model(output.sequences, use_cache=False).logits
        plain = model(PROMPT).logits
    torch.testing.assert_close(prompt_logits, expected[:, :12], atol=2e-5, rtol=0)
    torch.testing.assert_close(torch.stack(output.logits, dim=1), expected[:, 11:-1], atol=1e-4, rtol=0)
    assert (prompt_logits - plain).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_interventions_with_a_static_cache(family):
    model = tiny_models.build(family)
    what = INTERVENTIONS["all"](4) | {"queries": (4, 15)}  # from within the prompt to within the answer
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    with ak.suppress(model, **what):
        output = model.generate(PROMPT, cache_implementation="static", **settings)
    with torch.no_grad(), eager_edits.edited(model, **edits(**what)):
        expected = model(output.sequences, use_cache=False).logits[:, 11:-1]
    torch.testing.assert_close(torch.stack(output.logits, dim=1), expected, atol=1e-4, rtol=0)


def test_interventions_of_left_padded_rows_and_beams():
    model = tiny_models.build("mistral")
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), PROMPT[:, 4:]], dim=1)
    ids, mask = torch.cat([PROMPT, padded]), torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    factor, value_factor, queries = torch.ones(2, 12), torch.ones(2, 4, 12), torch.zeros(2, 12, dtype=torch.bool)
    factor[0, 3], value_factor[1, 2, 6] = 0.1, 0.0
    queries[0, 5:], queries[1, 9:] = True, True
    settings = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with ak.suppress(model, factor, value_factor=value_factor, queries=queries):
        together = model.generate(ids, attention_mask=mask, **settings)
    for row, (prompt, first) in enumerate(((PROMPT, 0), (PROMPT[:, 4:], 4))):
        own = [x[row : row + 1, ..., first:] for x in (factor, value_factor, queries)]
        with ak.suppress(model, own[0], value_factor=own[1], queries=own[2]):
            alone = model.generate(prompt, **settings)
        assert together[row, 12:].tolist() == alone[0, prompt.shape[1] :].tolist()


def test_interventions_without_effect_change_no_bit():
    model = tiny_models.build("gpt_oss")
    ones, heads = torch.ones(1, 12), torch.ones(1, 4, 12)
    with torch.no_grad():
        with ak.suppress(model, None):
            expected = model(PROMPT).logits
        for what in (
            {"factor": ones},
            {"factor": {1: heads}, "queries": (3, 7)},
            {"factor": ones, "value_factor": ones},
            {"factor": None, "value_factor": {0: heads}},
            {"factor": heads * 0.2, "queries": (12, None)},
            {"factor": heads * 0.2, "queries": torch.zeros(1, 12, dtype=torch.bool)},
        ):
            with ak.suppress(model, **what):
                assert torch.equal(model(PROMPT).logits, expected)


def test_queries_of_a_4d_mask_count_from_the_start_or_are_refused():
    model = tiny_models.build("llama")
    visible = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
    what = {"factor": random_factors(1, 12), "queries": (6, 9)}
    with torch.no_grad(), ak.suppress(model, **what):
        expected = model(PROMPT).logits
        torch.testing.assert_close(model(PROMPT, attention_mask=visible).logits, expected, atol=1e-5, rtol=0)
        cache = model(PROMPT[:, :8]).past_key_values
        with pytest.raises(ak.InputError, match="queries: 4 queries over 12 keys came with a mask of their own"):
            model(PROMPT[:, 8:], attention_mask=visible[:, :, 8:], past_key_values=cache)


@pytest.mark.parametrize("way", ["wrapped", "in place", "called by compiled code"])
def test_a_compiled_model_is_suppressed_by_the_run_at_hand(way):
    """Each suppression differs, so that a graph which kept the first one would show."""
    model, same = tiny_models.build("llama"), tiny_models.build("llama")
    call = suppressed = model
    if way == "wrapped":
        call = suppressed = torch.compile(model, backend="eager")
    elif way == "in place":
        model.compile(backend="eager")
    else:
        call = torch.compile(lambda ids: model(ids), backend="eager")
    with torch.no_grad():
        for key in (3, 5, 2):
            factor = torch.ones(1, 12)
            factor[0, key] = 0.1
            with ak.suppress(same, factor):
                expected = same(PROMPT).logits
            with ak.suppress(suppressed, factor):
                torch.testing.assert_close(call(PROMPT).logits, expected, atol=1e-6, rtol=0)
            torch.testing.assert_close(call(PROMPT).logits, same(PROMPT).logits, atol=1e-6, rtol=0)


# --- nothing is left behind ---


def test_model_is_as_before_on_exit_and_after_an_exception():
    model = tiny_models.build("llama")
    before, expected = implementations(model), model(PROMPT).logits
    with ak.suppress(model, torch.zeros(1, 12)):
        assert set(implementations(model)) == {switch.NAME}
    with pytest.raises(KeyError), ak.suppress(model, torch.zeros(1, 12)):
        raise KeyError("in the middle")
    assert implementations(model) == before
    assert not model.model._forward_hooks
    assert not switch._everywhere
    assert not switch._switches
    assert torch.equal(model(PROMPT).logits, expected)


def test_without_a_run_the_function_is_plain_sdpa():
    model = tiny_models.build("llama")
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[0, :3] = 0
    expected = model(PROMPT, attention_mask=mask).logits
    model.set_attn_implementation(switch.NAME)
    assert torch.equal(model(PROMPT, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_without_a_run_softcap_and_sinks_still_count(family):
    model = tiny_models.build(family)
    model.set_attn_implementation("eager")
    expected = model(PROMPT).logits
    model.set_attn_implementation(switch.NAME)
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
    with torch.no_grad():
        plain = model(PROMPT).logits
    with torch.no_grad(), ak.suppress(model, factor):
        expected = model(PROMPT).logits
        with pytest.warns(RuntimeWarning, match="copy_context") as warned:  # noqa: PT031
            (lost,) = run_in_thread(lambda: model(PROMPT).logits)
            run_in_thread(lambda: model(PROMPT).logits)
        context = contextvars.copy_context()
        (found,) = run_in_thread(lambda: context.run(lambda: model(PROMPT).logits))
    assert len(warned) == 1
    assert torch.equal(lost, plain)
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


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"factor": {}}, r"the keys of factor must be indices in \[0, 3\), got \[\]"),
        ({"factor": {3: torch.ones(1, 12)}}, r"the keys of factor must be indices in \[0, 3\), got \[3\]"),
        ({"factor": {1: torch.ones(1, 12) * -1}}, r"factor\[1\] must be finite and >= 0"),
        ({"factor": {1: torch.ones(1, 12)}, "layers": [0]}, "layers must be left out where factor is a mapping"),
        ({"value_factor": torch.ones(12)}, r"value_factor must be .* got torch.float32 \(12,\)"),
        ({"value_factor": {0: torch.ones(1, 12) * torch.inf}}, r"value_factor\[0\] must be finite"),
        ({"value_factor": torch.ones(0, 12)}, "value_factor must have at least one row"),
        ({"queries": (3, 3)}, r"queries: got \(3, 3\), expected"),
        ({"queries": (-1, 3)}, r"queries: got \(-1, 3\), expected"),
        ({"queries": (0.5, 3)}, r"queries: got \(0.5, 3\), expected"),
        ({"queries": 3}, "queries: got 3, expected"),
        ({"queries": torch.ones(12)}, r"queries must be bool .* got torch.float32 \(12,\)"),
    ],
)
def test_bad_interventions_are_refused_and_leave_the_model_alone(what, message):
    model = tiny_models.build("llama")
    with pytest.raises(ak.InputError, match=message), ak.suppress(model, **{"factor": None, **what}):
        pass
    assert set(implementations(model)) == {"sdpa"}


def test_heads_and_rows_of_interventions_must_fit_the_model():
    model = tiny_models.build("llama")
    for what, message in (
        ({"value_factor": torch.zeros(1, 3, 12)}, "value_factor has 3 heads, but the model's attention has 4"),
        ({"value_factor": torch.zeros(2, 12)}, "value_factor has 2 rows"),
        ({"value_factor": torch.zeros(1, 12), "queries": torch.ones(2, 12) > 0}, "queries has 2 rows"),
    ):
        with pytest.raises(ak.InputError, match=message), ak.suppress(model, None, **what):
            model(PROMPT)


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
    "roformer": lambda: hf.RoFormerForCausalLM(
        hf.RoFormerConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, is_decoder=True)
    ),
    "rwkv": lambda: hf.RwkvForCausalLM(hf.RwkvConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2)),
}


@pytest.mark.parametrize("family", UNREACHABLE)
def test_models_that_never_reach_us_are_refused_by_name(family):
    model = UNREACHABLE[family]().eval()
    name = type(model).__name__
    with pytest.raises(ak.UnsupportedModelError, match=name), ak.suppress(model, torch.ones(1, 12)):
        pass
    with pytest.raises(ak.UnsupportedModelError, match=name):
        ak.Explainer(model, tiny_models.tokenizer())
