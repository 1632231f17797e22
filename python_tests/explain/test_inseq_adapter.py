"""inseq's method "atman": equal to the explainer and to an eager definition, in inseq's own shapes."""

from importlib import import_module

import eager_oracle
import pytest
import tiny_models
import torch
import transformers as hf

import atman_kernels as ak
from atman_kernels.hf.models.parts import decoder_of

inseq = pytest.importorskip("inseq")
import_module("atman_kernels.adapters.inseq")  # which registers the method

PROMPT = "w5 w6 w7 w8 w9"
ANSWER = "w20 w6 w22"
WHOLE = f"{PROMPT} {ANSWER}"
N, M = 5, 3


@pytest.fixture(scope="module")
def model():
    return tiny_models.build("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_models.tokenizer()


@pytest.fixture
def attributed(model, tokenizer):
    return inseq.load_model(model, "atman", tokenizer=tokenizer)


def ids_of(text):
    return torch.tensor([int(word[1:]) for word in text.split()])


def oracle(model, text, n, factor=0.0, mode="log_additive", layers=None):
    """(n + m, m) as inseq lays it out: NaN where a token does not come before the one explained."""
    ids = ids_of(text)
    rows = torch.ones(len(ids), len(ids))
    rows.fill_diagonal_(factor)
    scores = eager_oracle.leave_one_out(model, ids, n, rows, mode, layers)
    later = torch.arange(len(ids))[:, None] >= torch.arange(n, len(ids))
    return scores.masked_fill(later, float("nan"))


def close(found, expected, atol=1e-4):
    torch.testing.assert_close(found.double(), expected.double(), atol=atol, rtol=0, equal_nan=True)


def scores_of(output, index=0):
    assert output[index].source_attributions is None
    return output[index].target_attributions


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_is_the_eager_definition(tokenizer, family):
    model = tiny_models.build(family)
    output = inseq.load_model(model, "atman", tokenizer=tokenizer).attribute(PROMPT, WHOLE, show_progress=False)
    close(scores_of(output), oracle(model, WHOLE, N))
    assert [token.token for token in output[0].target] == WHOLE.split()
    assert output.info["attribution_method"] == "atman"
    assert output.info["attributed_fn"] == "log_probability"


@pytest.mark.parametrize(
    "settings", [{}, {"mode": "shifted", "factor": 0.4, "layers": [0, 2]}, {"mode": "multiplicative"}]
)
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_is_the_explainer(model, tokenizer, attributed, settings, threshold):
    settings = settings | {"similarity_threshold": threshold}
    output = attributed.attribute(PROMPT, WHOLE, show_progress=False, **settings)
    explainer = ak.Explainer(model, tokenizer, progress=False, **settings)
    expected = explainer.explain(PROMPT, ANSWER, include_target=True).scores
    # inseq shows no score of a token for earlier ones: a twin before them, suppressed along with it, can give it one
    later = torch.arange(N + M - 1)[:, None] >= torch.arange(N, N + M)
    close(scores_of(output)[:-1], expected.masked_fill(later, float("nan")), 1e-5)
    assert output.info["attribution_args"] == settings


def test_recompute_is_the_explainers(model, tokenizer, attributed):
    explainer = ak.Explainer(model, tokenizer, progress=False)
    expected = explainer.explain(PROMPT, ANSWER, include_target=True, recompute=2).scores
    assert (expected - explainer.explain(PROMPT, ANSWER, include_target=True).scores).abs().max() > 1e-3
    found = scores_of(attributed.attribute(PROMPT, f"{PROMPT} {ANSWER}", recompute=2, show_progress=False))
    later = torch.isnan(found[: len(expected)])
    close(found[: len(expected)][~later], expected[~later])
    with pytest.raises(ak.InputError, match="recompute must be an integer >= 1 or None, got 0"):
        attributed.attribute(PROMPT, WHOLE, recompute=0, show_progress=False)


def test_settings_of_the_model_hold_until_a_call_has_its_own(model, tokenizer):
    attributed = inseq.load_model(model, "atman", tokenizer=tokenizer, factor=0.5, layers=[1])
    close(scores_of(attributed.attribute(PROMPT, WHOLE, show_progress=False)), oracle(model, WHOLE, N, 0.5, layers=[1]))
    once = attributed.attribute(PROMPT, WHOLE, show_progress=False, factor=0.2)
    close(scores_of(once), oracle(model, WHOLE, N, 0.2, layers=[1]))
    close(scores_of(attributed.attribute(PROMPT, WHOLE, show_progress=False)), oracle(model, WHOLE, N, 0.5, layers=[1]))


def test_positions(model, attributed):
    whole = oracle(model, WHOLE, N)
    later = attributed.attribute(PROMPT, WHOLE, attr_pos_start=6, show_progress=False)
    close(scores_of(later), whole[:, 1:])
    assert later[0].attr_pos_start == 6
    earlier = attributed.attribute(PROMPT, WHOLE, attr_pos_end=7, show_progress=False)
    close(scores_of(earlier)[:7], whole[:7, :2])


def test_several_generated_texts_are_one_batch(model, attributed):
    prompts = ["w30 w31 w32", PROMPT, "w40"]
    output = attributed.attribute(prompts, generation_args={"max_new_tokens": 3}, show_progress=False)
    for index, prompt in enumerate(prompts):
        n = len(prompt.split())
        answered = output.info["generated_texts"][index]
        assert answered.startswith(prompt)
        close(scores_of(output, index), oracle(model, answered, n))


def test_several_given_answers(model, attributed):
    prompts, wholes = [PROMPT, "w30 w31"], [WHOLE, "w30 w31 w50 w51 w52 w53"]
    output = attributed.attribute(prompts, wholes, show_progress=False)
    for index, (prompt, whole) in enumerate(zip(prompts, wholes, strict=True)):
        close(scores_of(output, index), oracle(model, whole, len(prompt.split())))


def test_one_packed_run_for_all_texts_and_tokens(model, attributed):
    texts = ["w30 w31 w32", PROMPT]
    count = 0

    def counted(*_):
        nonlocal count
        count += 1

    answers = attributed.generate(texts, max_new_tokens=3)
    batch = inseq.models.decoder_only.DecoderOnlyInputFormatter.prepare_inputs_for_attribution(attributed, answers)
    hook = decoder_of(model).register_forward_hook(counted)
    try:
        attributed.attribution_method.attribute(
            batch, attributed.get_attributed_fn(None), attr_pos_start=5, show_progress=False
        )
    finally:
        hook.remove()
    assert count == 2 + 1 + 1 + 1  # two bases, the check of the attention, the probe, one pack


def test_step_attributions_and_aggregation(model, attributed):
    output = attributed.attribute(PROMPT, WHOLE, output_step_attributions=True, show_progress=False)
    assert len(output.step_attributions) == M
    close(output.step_attributions[1].target_attributions[0], oracle(model, WHOLE, N)[: N + 1, 1])
    summed = output.aggregate(inseq.data.ContiguousSpanAggregator, target_spans=[(0, 2)])
    assert summed[0].target_attributions.shape[0] == N + M - 1


def test_show(attributed, capsys):
    output = attributed.attribute(PROMPT, WHOLE, show_progress=False)
    html = output.show(display=False, return_html=True)
    for word in WHOLE.split():
        assert word in html
    output.show()
    assert "Target Saliency Heatmap" in capsys.readouterr().out


def test_save_and_load(attributed, tmp_path):
    path = tmp_path / "attribution.json"
    output = attributed.attribute(PROMPT, WHOLE, layers=[0], show_progress=False)
    output.save(path)
    loaded = inseq.FeatureAttributionOutput.load(path)
    close(scores_of(loaded), scores_of(output), 0)
    assert loaded.info["attribution_args"] == {"layers": [0]}


def test_another_method_in_between(model, attributed):
    occlusion = attributed.attribute(PROMPT, WHOLE, method="occlusion", show_progress=False)
    assert occlusion.info["attribution_method"] == "occlusion"
    close(scores_of(attributed.attribute(PROMPT, WHOLE, show_progress=False)), oracle(model, WHOLE, N))
    before = model.config._attn_implementation
    other = inseq.load_model(model, "saliency", tokenizer=attributed.tokenizer)
    output = other.attribute(PROMPT, WHOLE, method="atman", factor=0.3, show_progress=False)
    close(scores_of(output), oracle(model, WHOLE, N, 0.3))
    assert model.config._attn_implementation == before


def test_attribute_target_is_ignored_as_for_other_methods(model, attributed):
    output = attributed.attribute(PROMPT, WHOLE, attribute_target=True, show_progress=False)
    close(scores_of(output), oracle(model, WHOLE, N))


def test_log_probability_is_what_is_measured(model, attributed):
    close(scores_of(attributed.attribute(PROMPT, WHOLE, logprob=True, show_progress=False)), oracle(model, WHOLE, N))
    for options in ({"attributed_fn": "logit"}, {"attributed_fn": "entropy"}, {"logprob": False}):
        with pytest.raises(ak.InputError, match="measures log-probabilities"):
            attributed.attribute(PROMPT, WHOLE, show_progress=False, **options)


def test_refused(model, tokenizer, attributed):
    with pytest.raises(ak.InputError, match="no setting 'threshold'; it has mode, factor"):
        inseq.load_model(model, "atman", tokenizer=tokenizer, threshold=0.3)
    with pytest.raises(ak.InputError, match="factor must be"):
        inseq.load_model(model, "atman", tokenizer=tokenizer, factor=-1.0)
    with pytest.raises(ak.InputError, match="mode must be"):
        attributed.attribute(PROMPT, WHOLE, mode="off", show_progress=False)
    with pytest.raises(ValueError, match="Step scores are not supported"):
        attributed.attribute(PROMPT, WHOLE, step_scores=["probability"], show_progress=False)


def test_encoder_decoder_models_are_refused(tokenizer):
    config = hf.T5Config(
        vocab_size=99, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    with pytest.raises(ak.UnsupportedModelError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        inseq.load_model(hf.T5ForConditionalGeneration(config), "atman", tokenizer=tokenizer)


@pytest.mark.slow
def test_smollm2():
    pytest.importorskip("gguf")
    from atman_kernels.hf.models.loading import find_smollm2, load_model

    try:
        find_smollm2()
    except ak.InputError as error:
        pytest.skip(str(error))
    model, tokenizer = load_model("smollm2", dtype="float32")
    prompt, answer = "The Eiffel Tower stands in the city of", " Paris, France"
    output = inseq.load_model(model, "atman", tokenizer=tokenizer).attribute(
        prompt, prompt + answer, show_progress=False
    )
    explanation = ak.Explainer(model, tokenizer, progress=False).explain(prompt, answer, include_target=True)
    close(scores_of(output)[:-1].nan_to_num(0.0), explanation.scores, 1e-4)
    best = int(scores_of(output)[:, 0].nan_to_num(0).argmax())
    assert output[0].target[best].token.strip("Ġ") in ("E", "iffel", "Tower")
