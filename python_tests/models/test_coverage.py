"""What keeps a model out of packs, and that such models are explained exactly all the same, or refused by name."""

import json
import os
import time
import warnings

import coverage_table
import coverage_trials
import pytest
import softmax_oracle
import tiny_configs
import tiny_models
import torch
import transformers as hf
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import atman_kernels as ak
from atman_kernels.hf.models.packability import why_lengths_do_not_mix, why_unpackable

CLASSES = {kind.model_type: (kind, found) for kind, found in MODEL_FOR_CAUSAL_LM_MAPPING.items()}


def classes_of(family):
    if family not in CLASSES:
        pytest.skip(f"transformers {hf.__version__} has no {family}")
    return CLASSES[family]


def tried(kind, family):
    """What the table says of a family; the class that is looked at first, if it has several."""
    found = list(coverage_table.entries(kind, {family}))
    if not found:
        pytest.skip(f"transformers {hf.__version__} has no {family}")
    return coverage_table.tried(found[0])


def build(family):
    return tiny_configs.tiny_model(*classes_of(family))


# layers that mix tokens otherwise (states, convolutions), or positions that no pack can give
UNPACKABLE = {
    "bamba": "convolution",
    "bart": "takes no position_ids",
    "bigbird_pegasus": "takes no position_ids",  # causal by its masks alone
    "deepseek_v32": "chooses the keys",
    "falcon_h1": "convolution",
    "granitemoehybrid": "convolution",
    "jamba": "convolution",
    "lfm2": "convolution",
    "minimax": "of 4 layers",
    "nemotron_h": "convolution",
    "qwen3_next": "convolution",
    "recurrent_gemma": "convolution",
    "zamba2": "convolution",
}


@pytest.mark.parametrize("family", UNPACKABLE)
def test_what_cannot_be_packed_is_recomputed_and_exact(family):
    result = tried("text decoders", family)
    assert (result.state, UNPACKABLE[family] in result.remark) == ("batched", True), result
    assert result.difference < 1e-4
    assert result.size > 1e-2, "the oracle must move, or the comparison says nothing"


@pytest.mark.parametrize("family", ["afmoe", "jetmoe", "gemma4_text", "modernbert-decoder"])
def test_families_with_ways_of_their_own_are_packed(family):
    result = tried("text decoders", family)
    assert (result.state, result.difference < 1e-4) == ("packed", True), result


@pytest.mark.parametrize("family", ["bigbird_pegasus", "deepseek_v32", "jamba", "lfm2", "falcon_h1"])
def test_generation_with_a_cache_equals_full_recomputation(family):
    model = build(family)
    prompt = torch.arange(5, 17)[None]
    factor = torch.ones(1, 12)
    factor[0, 4:8] = 0.1
    settings = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with ak.suppress(model, factor), torch.no_grad():
        cached = model.generate(prompt, pad_token_id=0, eos_token_id=None, **settings)
        full = model(cached.sequences[:, :-1], use_cache=False).logits[:, 11:]
    torch.testing.assert_close(torch.stack(cached.logits, dim=1), full, atol=1e-4, rtol=0)
    with torch.no_grad():
        assert (model(cached.sequences[:, :-1], use_cache=False).logits[:, 11:] - full).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["deepseek_v4", "inkling2_text"])
def test_attention_that_no_factor_fits_is_refused_with_a_reason(family):
    model = build(family)
    with pytest.raises(ak.UnsupportedModelError, match=r"blocks|sinks"), ak.suppress(model, torch.ones(1, 9)):
        model(torch.arange(5, 14)[None])


@pytest.mark.parametrize("family", ["falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"])
def test_models_without_attention_are_refused_by_name(family):
    model = build(family)
    with pytest.raises(ak.UnsupportedModelError, match=f"{type(model).__name__}.*no attention layers"):
        ak.Explainer(model, tiny_models.tokenizer())


def rotary_model(kind, **extra):
    torch.manual_seed(0)
    parameters = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0} | extra
    positions = 16 if kind == "dynamic" else 64
    config = hf.LlamaConfig(**{**tiny_models.GROUPED, "max_position_embeddings": positions}, rope_parameters=parameters)
    model = hf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 if parameter.ndim > 1 else parameter)
    return model


def longrope():
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]}
    return rotary_model("longrope", **factors, original_max_position_embeddings=16)


def prompts(*lengths):
    return [list(range(3 + n, 3 + n + length)) for n, length in enumerate(lengths)]


def explained(model, *ids):
    explainer = ak.Explainer(model, tiny_models.tokenizer(), factor=0.1, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return explainer.explain_batch([tiny_models.text_of(i) for i in ids], ["w70 w71"] * len(ids))


@pytest.mark.parametrize("make", [longrope, lambda: rotary_model("dynamic")])
@pytest.mark.parametrize("lengths", [(9,), (25,), (9, 12)])
def test_rotary_embeddings_that_grow_with_the_prompt_pack_where_they_agree(make, lengths):
    model = make()
    for ids, explanation in zip(prompts(*lengths), explained(model, *prompts(*lengths)), strict=True):
        rows = torch.ones(len(ids), len(ids) + 2).fill_diagonal_(0.1)
        expected = softmax_oracle.leave_one_out(model, torch.tensor([*ids, 70, 71]), len(ids), rows, "log_additive")
        assert explanation.settings["path"] == "packed"
        torch.testing.assert_close(explanation.scores.double(), expected, atol=1e-4, rtol=0)


def test_longrope_prompts_on_both_sides_of_its_limit_are_not_packed_together():
    model = longrope()
    for ids, explanation in zip(prompts(9, 25), explained(model, *prompts(9, 25)), strict=True):
        rows = torch.ones(len(ids), len(ids) + 2).fill_diagonal_(0.1)
        expected = softmax_oracle.leave_one_out(model, torch.tensor([*ids, 70, 71]), len(ids), rows, "log_additive")
        assert explanation.settings["path"] == "batched"
        torch.testing.assert_close(explanation.scores.double(), expected, atol=1e-4, rtol=0)


def test_dynamic_rotary_embeddings_keep_the_longest_prompt_and_are_refused_others():
    with pytest.raises(ak.InputError, match="prompts of 10 to 26 tokens cannot be explained together"):
        explained(rotary_model("dynamic"), *prompts(9, 25))
    assert why_lengths_do_not_mix(rotary_model("dynamic"), [9, 15]) is None


def test_ordinary_models_have_no_reason():
    for family in ("llama", "gpt2", "bloom", "mpt", "gptj", "xglm"):
        assert why_unpackable(tiny_models.build(family)) is None
        assert why_lengths_do_not_mix(tiny_models.build(family), [3, 9000]) is None


# --- the program itself ---

SAMPLES = {
    "text decoders": {"gpt_oss": "packed", "llama": "packed"},
    "text classifiers": {"bert": "batched", "gpt_oss": "batched", "deberta": "refused"},
    "embedding models": {"modernbert": "batched", "deberta": "refused"},
    "image classifiers": {"vit": "batched", "siglip": "batched", "swin": "refused"},
    "dual encoders": {"clip": "batched", "siglip": "batched", "blip": "batched"},
    "encoder-decoders": {"bart": "batched", "t5": "batched", "led": "refused"},
    "speech models": {"whisper": "batched", "voxtral": "text only", "moonshine": "refused"},
    "image-text models": {
        "llava": "packed", "blip-2": "packed", "qwen3_5": "batched", "idefics2": "text only", "git": "refused",
    },
}  # fmt: skip


@pytest.mark.parametrize(("kind", "family"), [(kind, family) for kind, found in SAMPLES.items() for family in found])
def test_every_kind_is_held_against_transformers_itself(kind, family):
    result = tried(kind, family)
    assert (result.kind, result.family, result.state) == (kind, family, SAMPLES[kind][family]), result
    if result.state == "refused":
        assert result.remark
    else:
        assert result.difference < 1e-4
        assert result.size > 1e-2, "the oracle must move, or the comparison says nothing"


@pytest.mark.parametrize("kind", SAMPLES)
def test_scores_of_another_factor_are_wrong(kind, monkeypatch):
    real = coverage_trials.ak.Explainer
    other = lambda *given, factor, **options: real(*given, factor=2 * factor, **options)  # noqa: E731
    monkeypatch.setattr(coverage_trials.ak, "Explainer", other)
    result = tried(kind, next(iter(SAMPLES[kind])))
    assert result.state == "wrong", result


def test_an_oracle_that_changes_the_model_is_no_oracle(monkeypatch):
    """By a threshold that takes ordinary scores for masked ones."""
    monkeypatch.setattr(softmax_oracle.Suppressed.__init__, "__defaults__", (None, 0.0, None))
    result = tried("text classifiers", "bert")
    assert (result.state, "the oracle itself" in result.remark) == ("wrong", True), result


def _troublesome(entry):
    if entry.key == "ends":
        os._exit(3)
    if entry.key == "hangs":
        time.sleep(600)
    return coverage_table.Result(entry.kind, entry.key, entry.model, "packed")


def test_a_family_does_not_take_the_others_down():
    workshop = coverage_table.Workshop(_troublesome, seconds=1)
    try:
        results = [workshop.tried(coverage_table.Entry("text decoders", key, "C")) for key in ("ends", "fine", "hangs")]
    finally:
        workshop.close()
    assert [(r.family, r.state, r.remark) for r in results] == [
        ("ends", "failed", "ended the process"),
        ("fine", "packed", ""),
        ("hangs", "failed", "took more than 1 s"),
    ]


def test_the_table_says_what_came_out(tmp_path):
    kept = coverage_table.Result("text decoders", "gpt2", "GPT2LMHeadModel", "packed", 1e-6, 1.0)
    result = coverage_table.Result("text classifiers", "a|b", "C", "batched", 1.2e-6, 0.5, "x < y")
    docs = tmp_path / "docs"
    docs.mkdir()
    overview = docs / "coverage.md"
    overview.write_text(f"Before\n{coverage_table.BEGIN}\n{coverage_table.END}\nAfter\n")
    coverage_table.write({"text decoders": [kept], "text classifiers": []}, tmp_path)
    coverage_table.write({"text classifiers": [result]}, tmp_path)
    decoders, classifiers = (docs / "coverage" / f"text-{kind}.md" for kind in ("decoders", "classifiers"))
    assert "| gpt2 | GPT2LMHeadModel | packed | 1.0e-06 | 1 |  |" in decoders.read_text()
    assert "| 1.2e-06 | 0.5 | x &lt; y |" in classifiers.read_text()
    assert "1 batched." in classifiers.read_text()
    text = overview.read_text()
    assert text.startswith("Before\n")
    assert text.endswith("\nAfter\n")
    assert "| [text decoders](coverage/text-decoders.md) | 1 |  |  |  |  | 1e-06 |" in text
    assert "| [text classifiers](coverage/text-classifiers.md) |  | 1 |  |  |  | 1e-06 |" in text
    record = json.loads((docs / "coverage.json").read_text())
    assert {kind: len(part["results"]) for kind, part in record.items()} == {"text decoders": 1, "text classifiers": 1}
    assert all(part["transformers"] == hf.__version__ for part in record.values())
    again = coverage_table.Result("text decoders", "gpt2", "GPT2LMHeadModel", "batched", 2e-6, 1.0)
    other = coverage_table.Result("text decoders", "opt", "OPTForCausalLM", "packed", 3e-6, 1.0)
    coverage_table.update({"text decoders": [again, other], "text classifiers": []}, tmp_path)
    record = json.loads((docs / "coverage.json").read_text())
    assert [r["state"] for r in record["text decoders"]["results"]] == ["batched", "packed"]
    assert len(record["text classifiers"]["results"]) == 1


def test_the_pages_are_what_the_record_says():
    docs = coverage_table.ROOT / "docs"
    record = json.loads((docs / "coverage.json").read_text(encoding="utf-8"))
    assert set(record) == set(coverage_table.KINDS)
    for kind, part in record.items():
        assert (docs / coverage_table.page_name(kind)).read_text(encoding="utf-8") == coverage_table.page(kind, part)
    assert coverage_table.summary(record) in (docs / "coverage.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("kind", coverage_table.KINDS)
def test_no_family_is_silently_wrong(kind):
    results = list(coverage_table.results_of(kind, set()))
    assert not [r for r in results if r.state in ("failed", "wrong")]
    assert any(r.state in ("packed", "batched") for r in results)
