"""Log-probs of a bfloat16 head without logits: the same numbers, where the model's logits are a plain product."""

import pytest
import tiny_models
import torch
import transformers as hf

import atman_kernels as ak
from atman_kernels.backends.cpu import compiled
from atman_kernels.hf.forward import fused_head, logprobs

PROMPT = " ".join(f"w{i}" for i in range(30))
ANSWER = "w20 w21 w22"


@pytest.fixture(autouse=True)
def fast_everywhere(monkeypatch):
    """As on a processor with AMX: the kernel computes the same on any."""
    monkeypatch.setattr(fused_head, "FAST", compiled.instruction_sets(torch.bfloat16))
    if not fused_head.FAST:
        pytest.skip("no compiled CPU kernel")


@pytest.fixture
def rows_of_logits(monkeypatch):
    """How many rows each call of a model's head had; and how many went without."""
    counts = {"logits": 0, "fused": 0}
    own, without = logprobs._log_softmax_at, fused_head.FusedHead.logprobs

    def counted(tokens, logits):
        counts["logits"] += tokens.numel()
        return own(tokens, logits)

    def counted_without(self, states, tokens):
        counts["fused"] += tokens.numel()
        return without(self, states, tokens)

    monkeypatch.setattr(logprobs, "_log_softmax_at", counted)
    monkeypatch.setattr(fused_head.FusedHead, "logprobs", counted_without)
    return counts


def explained(model, **options):
    return ak.Explainer(model, tiny_models.tokenizer(), progress=False).explain(PROMPT, ANSWER, **options)


@pytest.mark.parametrize("hidden", [576, 64, 2048])
def test_log_probs_are_those_of_float64_logits(hidden):
    generator = torch.Generator().manual_seed(hidden)
    weight = (torch.randn(1001, hidden, generator=generator) * hidden**-0.5).bfloat16()
    states = (torch.randn(2, 37, hidden, generator=generator) * 4).bfloat16()
    tokens = torch.randint(0, 1001, (2, 37), generator=generator)
    found = fused_head.FusedHead(weight).logprobs(states, tokens)
    expected = (states.double() @ weight.double().T).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_plain_heads_go_without_logits(family, rows_of_logits, monkeypatch):
    model = tiny_models.build(family).bfloat16()
    found = explained(model)
    assert rows_of_logits["fused"] > rows_of_logits["logits"] > 0
    monkeypatch.setattr(logprobs, "fused_head", lambda *arguments: None)
    plain = explained(model)
    torch.testing.assert_close(found.scores, plain.scores, atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(found.base_logprobs, plain.base_logprobs, atol=5e-5, rtol=1e-5)


def test_a_batch_is_probed_by_no_more_logits_than_it_may_hold(rows_of_logits, monkeypatch):
    """Full rows of many variants: one row of logits of each, and a copy of one variant's."""
    made, kept = [], []
    own, see = logprobs._log_softmax_at, fused_head.FusedHead.see

    def measured(tokens, logits):
        made.append(tuple(logits.shape[:2]))
        return own(tokens, logits)

    def seen(self, hidden, logits):
        see(self, hidden, logits)
        kept.append(self._seen[1].shape[0])

    monkeypatch.setattr(logprobs, "LOGITS_BYTES", 1)
    monkeypatch.setattr(logprobs, "_log_softmax_at", measured)
    monkeypatch.setattr(fused_head.FusedHead, "see", seen)
    model = tiny_models.build("llama").bfloat16()
    found = by_full_rows(model)
    assert {rows for _, rows in made} == {1}
    assert max(variants for variants, _ in made) > 20
    assert set(kept) == {1}
    assert rows_of_logits["fused"] > rows_of_logits["logits"]
    monkeypatch.setattr(logprobs, "fused_head", lambda *arguments: None)
    torch.testing.assert_close(found.scores, by_full_rows(model).scores, atol=5e-5, rtol=1e-5)


def by_full_rows(model):
    explainer = ak.Explainer(model, tiny_models.tokenizer(), progress=False)
    explainer.runner.unpackable = "full rows are wanted"
    return explainer.explain(PROMPT, ANSWER)


SCALED = {
    "gemma2": lambda: tiny_models.build("gemma2"),  # caps its logits
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**tiny_models.COMMON, logit_scale=0.5)),
    "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**tiny_models.COMMON, logits_scaling=3.0)),
}


@pytest.mark.parametrize("family", SCALED)
def test_logits_that_are_capped_or_scaled_stay_logits(family, rows_of_logits, monkeypatch):
    model = SCALED[family]().eval().bfloat16()
    found = explained(model)
    assert rows_of_logits["fused"] == 0
    monkeypatch.setattr(logprobs, "fused_head", lambda *arguments: None)
    torch.testing.assert_close(found.scores, explained(model).scores, atol=0, rtol=0)


def test_a_model_that_changes_its_states_or_logits_is_noticed(rows_of_logits):
    head = fused_head.FusedHead(torch.eye(4).bfloat16())
    states = torch.ones(1, 2, 4).bfloat16()
    logits = states.float()
    assert not head.makes(logits, states), "nothing was seen"
    head.see(states, logits)
    assert head.makes(logits.clone(), states)
    assert not head.makes(logits * 1.001, states)
    assert not head.makes(logits, states * 2)
    logits.mul_(2)
    assert not head.makes(logits, states), "in place"


def test_hooks_biases_other_dtypes_and_few_rows_keep_their_logits():
    model = tiny_models.build("llama")
    assert fused_head.fused_head(model, 100) is None, "float32"
    model.bfloat16()
    assert fused_head.fused_head(model, 100) is not None
    assert fused_head.fused_head(model, fused_head.LEAST_ROWS - 1) is None
    handle = model.get_output_embeddings().register_forward_hook(lambda *arguments: None)
    assert fused_head.fused_head(model, 100) is None
    handle.remove()
    model.get_output_embeddings().bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size).bfloat16())
    assert fused_head.fused_head(model, 100) is None
