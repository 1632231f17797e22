"""`Explainer`: what it returns, what it refuses, and what it does when something goes wrong on the way."""

import warnings

import eager_oracle
import pytest
import tiny_models
import torch
import transformers as hf

import atman_kernels as ak
from atman_kernels.hf.attention.calls import AttentionCall
from atman_kernels.hf.forward import logprobs as forward
from atman_kernels.hf.forward.base import own_logprobs
from atman_kernels.run import packed as execution

PROMPT = "w5 w6 w7 w8 w9 w10 w11 w12 w13 w14 w15 w16"
ANSWER = "w20 w21 w22"


@pytest.fixture(scope="module")
def model():
    return tiny_models.build("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_models.tokenizer()


def explainer_of(model, tokenizer, **settings):
    return ak.Explainer(model, tokenizer, progress=False, **{"factor": 0.1} | settings)


@pytest.fixture
def explainer(model, tokenizer):
    return explainer_of(model, tokenizer)


def oracle(model, prompt, answer, rows):
    ids = torch.tensor([int(w[1:]) for w in f"{prompt} {answer}".split()])
    return eager_oracle.leave_one_out(model, ids, len(prompt.split()), rows, "log_additive")


def test_fields(explainer):
    explanation = explainer.explain(PROMPT, ANSWER)
    assert [u.text for u in explanation.units] == PROMPT.split()
    assert [PROMPT[u.start : u.end] for u in explanation.units] == PROMPT.split()
    assert explanation.target == ANSWER
    assert "".join(explanation.target_tokens).split() == ANSWER.split()
    assert explanation.scores.shape == (12, 3)
    assert explanation.scores.dtype == torch.float32
    assert explanation.settings["path"] == "packed"
    assert explanation.settings["dtype"] == "float32"
    # two whole runs, two probes, and every suffix once, padded from 102 to 104 rows
    assert explanation.stats["tokens_through_model"] == 2 * 14 + (8 + 3) + 104


def test_base_logprobs_are_the_models_own(explainer, model):
    explanation = explainer.explain(PROMPT, ANSWER)
    ids = torch.tensor([int(w[1:]) for w in f"{PROMPT} {ANSWER}".split()])
    expected = eager_oracle.target_logprobs(model, ids, 12, torch.ones(15), "log_additive")
    torch.testing.assert_close(explanation.base_logprobs.double(), expected, atol=1e-5, rtol=0)


def test_overlapping_spans_are_scored_each_on_its_own(explainer, model):
    spans = [(0, 5), (3, 11), (0, 5)]  # w5 w6 | w6 w7 w8 | w5 w6
    explanation = explainer.explain(PROMPT, ANSWER, spans)
    rows = torch.ones(3, 15)
    rows[0, :2] = rows[1, 1:4] = rows[2, :2] = 0.1
    torch.testing.assert_close(explanation.scores.double(), oracle(model, PROMPT, ANSWER, rows), atol=1e-4, rtol=0)
    torch.testing.assert_close(explanation.scores[0], explanation.scores[2], atol=1e-5, rtol=0)


def test_target_tokens_explain_later_ones(explainer, model):
    explanation = explainer.explain(PROMPT, ANSWER, include_target=True)
    rows = torch.ones(14, 15)
    for i in range(14):
        rows[i, i] = 0.1
    expected = oracle(model, PROMPT, ANSWER, rows)
    torch.testing.assert_close(explanation.scores.double(), expected, atol=1e-4, rtol=0)
    assert [u.source for u in explanation.units[-3:]] == ["prompt", "target", "target"]
    assert explanation.scores[13, :2].tolist() == [0.0, 0.0], "a token cannot explain those before it"
    assert explanation.scores[13, 2] != 0


def test_batch_equals_one_by_one(model, tokenizer):
    prompts = [PROMPT, "w30 w31 w32", "w40 w41 w42 w43 w44 w45 w46"]
    answers = [ANSWER, "w50", "w51 w52"]
    together = explainer_of(model, tokenizer, token_budget=60).explain_batch(
        prompts, answers, ["token", "token", "word"]
    )
    forwards = 0
    for prompt, answer, joint in zip(prompts, answers, together, strict=True):
        alone = explainer_of(model, tokenizer, token_budget=60).explain(prompt, answer)
        forwards += alone.stats["forwards"]
        torch.testing.assert_close(joint.scores, alone.scores, atol=1e-5, rtol=0)
        torch.testing.assert_close(joint.base_logprobs, alone.base_logprobs, atol=1e-5, rtol=0)
    assert together[0].stats["forwards"] < forwards - 4, "variants of different prompts share forwards"


def test_model_answers_itself_when_no_target_is_given(explainer, model):
    explanation = explainer.explain(PROMPT, max_new_tokens=4)
    ids = torch.tensor([[int(w[1:]) for w in PROMPT.split()]])
    expected = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, 12:]
    assert explanation.target.split() == [f"w{i}" for i in expected.tolist() if i != 2]
    assert explanation.stats["answering_seconds"] > 0


def test_chat_template_is_used_only_when_asked_for(model):
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<s> {{ m['content'] }} w3 {% endfor %}w4"
    explainer = explainer_of(model, tokenizer)
    assert explainer.explain("w5 w6", "w7").prompt == "w5 w6"
    from_text = explainer.explain("w5 w6", "w7", chat=True)
    from_messages = explainer.explain([{"role": "user", "content": "w5 w6"}], "w7")
    assert from_text.prompt == from_messages.prompt == "<s> w5 w6 w3 w4"
    assert [u.text for u in from_text.units] == ["<s>", "w5", "w6", "w3", "w4"]


def test_model_is_left_as_it_was(model, tokenizer):
    before = model.config._attn_implementation
    model.train()
    explainer_of(model, tokenizer).explain(PROMPT, ANSWER)
    assert model.training
    model.eval()
    assert model.config._attn_implementation == before
    assert "forward" not in model.model.__dict__


# --- memory ---


def run_out_of_memory(monkeypatch, above: int, error: Exception):
    """Packed forwards of more than `above` tokens fail; returns the sizes of all that were tried."""
    real, tried = execution.packed_logprobs, []

    def limited(model, base, pack, *args, **kwargs):
        tried.append(pack.num_rows)
        if pack.num_rows > above:
            raise error
        return real(model, base, pack, *args, **kwargs)

    monkeypatch.setattr(execution, "packed_logprobs", limited)
    return tried


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_packs_are_halved_when_memory_runs_out_and_nothing_is_lost(explainer, monkeypatch, error):
    expected = explainer.explain(PROMPT, ANSWER)
    tried = run_out_of_memory(monkeypatch, above=30, error=error)
    explanation = explainer.explain(PROMPT, ANSWER)
    torch.testing.assert_close(explanation.scores, expected.scores, atol=1e-5, rtol=0)
    finished = [size for size in tried if size <= 30]
    assert len(tried) > len(finished), "the test must hit the limit"
    assert sum(finished) == 11 + sum(14 - i for i in range(12)), "every variant ran to its end exactly once"
    assert explanation.stats["token_budget"] <= 54


def test_a_single_variant_that_does_not_fit_is_an_error_that_says_so(explainer, model, monkeypatch):
    run_out_of_memory(monkeypatch, above=5, error=MemoryError())
    with pytest.raises(MemoryError, match="single variant of 8 tokens"):
        explainer.explain(PROMPT, ANSWER)
    assert model.config._attn_implementation == "sdpa"


def test_other_errors_are_not_swallowed(explainer, monkeypatch):
    run_out_of_memory(monkeypatch, above=5, error=RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        explainer.explain(PROMPT, ANSWER)


def test_logits_are_made_a_few_rows_at_a_time(explainer, model, monkeypatch):
    expected = explainer.explain(PROMPT, ANSWER)
    seen, own = [], forward._log_softmax_at
    monkeypatch.setattr(forward, "_log_softmax_at", lambda *given: seen.append(given[1].shape[1]) or own(*given))
    monkeypatch.setattr(forward, "LOGITS_BYTES", 2 * 4 * tiny_models.VOCABULARY)
    explanation = explainer.explain(PROMPT, ANSWER)
    assert max(seen) == 2
    torch.testing.assert_close(explanation.scores, expected.scores, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_are_packed_with_float32_logits(tokenizer, dtype):
    model = tiny_models.build("llama").to(dtype)
    explanation = explainer_of(model, tokenizer).explain(PROMPT, ANSWER)
    assert explanation.settings["path"] == "packed"
    expected = explainer_of(model.float(), tokenizer).explain(PROMPT, ANSWER)  # the same rounded weights
    assert (explanation.scores - expected.scores).abs().max() < (0.3 if dtype == torch.bfloat16 else 0.04)
    assert "forward" not in model.lm_head.__dict__


def test_16_bit_head_is_widened_exactly():
    torch.manual_seed(0)
    model = tiny_models.build("llama").bfloat16()
    ids, rows = torch.randint(3, 99, (9,)), torch.arange(9)
    with torch.no_grad():
        hidden = model.model(ids[None], use_cache=False).last_hidden_state[0].float()
        expected = (hidden @ model.lm_head.weight.float().T).log_softmax(-1)[rows, ids]
    torch.testing.assert_close(own_logprobs(model, ids, rows, ids), expected, atol=1e-5, rtol=0)


# --- never silently wrong ---


def test_a_layer_that_ignores_positions_is_found_by_the_probe(tokenizer):
    """A model whose rotary embedding counts rows instead of positions must not be packed."""
    model = tiny_models.build("llama")
    rotary = model.model.rotary_emb
    own = rotary.forward
    rotary.forward = lambda x, position_ids: own(x, torch.arange(x.shape[1])[None])
    with pytest.warns(UserWarning, match="cannot be packed .*differ by"):
        explanation = explainer_of(model, tokenizer).explain(PROMPT, ANSWER)
    assert explanation.settings["path"] == "batched"
    rows = torch.ones(12, 15) - 0.9 * torch.eye(12, 15)
    torch.testing.assert_close(explanation.scores.double(), oracle(model, PROMPT, ANSWER, rows), atol=1e-4, rtol=0)


def test_layers_that_mix_tokens_otherwise_are_recomputed_in_batches(tokenizer):
    torch.manual_seed(0)
    config = hf.Lfm2Config(
        **tiny_models.GROUPED, layer_types=["conv", "full_attention", "conv"], block_ff_dim=48, conv_L_cache=3
    )
    model = hf.Lfm2ForCausalLM(config).eval()
    explainer = explainer_of(model, tokenizer)
    with pytest.warns(UserWarning, match="mixes tokens by a convolution"):
        explanation = explainer.explain(PROMPT, ANSWER)
    rows = torch.ones(12, 15) - 0.9 * torch.eye(12, 15)
    torch.testing.assert_close(explanation.scores.double(), oracle(model, PROMPT, ANSWER, rows), atol=1e-4, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        explainer.explain(PROMPT, ANSWER)


def test_attention_that_we_do_not_reproduce_is_refused(tokenizer, monkeypatch):
    model = tiny_models.build("llama")
    real = AttentionCall.attend
    monkeypatch.setattr(AttentionCall, "attend", lambda self, *args: real(self, *args) * 1.1)
    with pytest.raises(ak.UnsupportedModelError, match="does not reproduce its own"):
        explainer_of(model, tokenizer).explain(PROMPT, ANSWER)
    assert model.config._attn_implementation == "sdpa"


# --- bad input ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "", "target": ANSWER}, "prompt is empty"),
        ({"prompt": [], "target": ANSWER}, "prompt is empty"),
        ({"prompt": 7, "target": ANSWER}, "prompt must be a text or a list of chat messages, got int"),
        ({"prompt": PROMPT, "target": ""}, "target is empty"),
        ({"prompt": PROMPT, "target": ANSWER, "units": "syllable"}, "units: got 'syllable'"),
        ({"prompt": PROMPT, "target": ANSWER, "units": [(0, 999)]}, "999"),
        ({"prompt": PROMPT, "target": ANSWER, "units": [(5, 5)]}, "5"),
        ({"prompt": PROMPT, "target": ANSWER, "chat": True}, "no chat template"),
        ({"prompt": " ".join(["w5"] * 128), "target": "w5 w5"}, "129 tokens, but the model has 128 positions"),
        ({"prompt": PROMPT, "max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, got 0"),
    ],
)
def test_bad_questions(explainer, model, arguments, message):
    with pytest.raises(ak.InputError, match=message):
        explainer.explain(**arguments)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "loud"}, "mode must be one of"),
        ({"factor": -0.1}, "factor must be a finite number >= 0"),
        ({"factor": float("nan")}, "factor must be a finite number >= 0"),
        ({"factor": "0.1"}, "factor must be a finite number >= 0"),
        ({"similarity_threshold": 1.5}, r"similarity_threshold must be in \(0, 1\]"),
        ({"layers": []}, "layers must be indices"),
        ({"layers": [3]}, r"layers must be indices in \[0, 3\), got \[3\]"),
        ({"token_budget": 0}, "token_budget must be an integer >= 1 or None, got 0"),
    ],
)
def test_bad_settings(model, tokenizer, settings, message):
    with pytest.raises(ak.InputError, match=message):
        explainer_of(model, tokenizer, **settings)


def test_bad_batches(explainer):
    with pytest.raises(ak.InputError, match="prompts must be a list"):
        explainer.explain_batch("w5 w6")
    with pytest.raises(ak.InputError, match="targets has 1 entries for 2 prompts"):
        explainer.explain_batch(["w5", "w6"], ["w7"])


def test_slow_tokenizers_are_refused(model):
    class Slow:
        is_fast = False

    with pytest.raises(ak.InputError, match="tokenizer must be a fast one"):
        explainer_of(model, Slow()).explain(PROMPT, ANSWER)
