"""captum's methods on suppressed attention: equal to an eager definition, to captum's own loop, and batched."""

import gc
import itertools
import math
import random
from types import SimpleNamespace

import eager_oracle
import pytest
import tiny_models
import torch

import atman_kernels as ak

pytest.importorskip("captum")
from captum.attr import (
    FeatureAblation,
    KernelShap,
    Lime,
    LLMAttribution,
    LLMAttributionResult,
    ShapleyValues,
    ShapleyValueSampling,
    TextTemplateInput,
    TextTokenInput,
)

from atman_kernels.adapters.captum import AtManAttribution, SuppressedLLMAttribution, SuppressedTextInput
from atman_kernels.hf.models.parts import decoder_of

PROMPT = "w5 w6 w7 w8 w9 w10"
ANSWER = "w20 w6 w22"  # w6 is in the prompt as well: similar tokens are sought in both
IDS = torch.tensor([int(word[1:]) for word in f"{PROMPT} {ANSWER}".split()])
N, M = 6, 3


@pytest.fixture(scope="module")
def model():
    return tiny_models.build("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_models.tokenizer()


@pytest.fixture
def attribution(model, tokenizer):
    return AtManAttribution(model, tokenizer, progress=False)


def oracle(model, groups, factor=0.0, mode="log_additive", layers=None):
    """(m, n_groups) by full eager forwards, one per group of suppressed positions."""
    rows = torch.ones(len(groups), N + M)
    for row, group in zip(rows, groups, strict=True):
        row[list(group)] = factor
    return eager_oracle.leave_one_out(model, IDS, N, rows, mode, layers).T


def close(found, expected, atol=1e-4):
    torch.testing.assert_close(found.double(), expected.double(), atol=atol, rtol=0)


def stock(model, tokenizer, inp, target=ANSWER, method=FeatureAblation, **options):
    options = {"forward_in_tokens": False} | options
    return LLMAttribution(method(model), tokenizer).attribute(inp, target, **options)


# AtMan --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["log_additive", "multiplicative", "shifted"])
@pytest.mark.parametrize("layers", [None, (1, 2)])
def test_atman_is_the_eager_definition(model, tokenizer, mode, layers):
    attribution = AtManAttribution(model, tokenizer, mode=mode, factor=0.3, layers=layers, progress=False)
    result = attribution.attribute(PROMPT, ANSWER)
    expected = oracle(model, [(i,) for i in range(N)], 0.3, mode, layers)
    assert isinstance(result, LLMAttributionResult)
    close(result.token_attr, expected)
    close(result.seq_attr, expected.sum(dim=0))
    base = eager_oracle.target_logprobs(model, IDS, N, torch.ones(N + M), mode)
    close(result.output_probs, base.exp(), 1e-5)
    assert result.input_tokens == PROMPT.split()
    assert [text.strip() for text in result.output_tokens] == ANSWER.split()


def test_tokens_are_shown_as_captum_shows_them(tiny_llama):
    model, tokenizer = ak.load_model(tiny_llama, dtype="float32", device="cpu")
    attribution = AtManAttribution(model, tokenizer, progress=False)
    for target in ("🦊", " the dog 🦊\nand 本", " Pilot  "):
        result = attribution.attribute("The dog is", target)
        theirs = stock(model, tokenizer, TextTokenInput("The dog is", tokenizer), target)
        assert result.output_tokens == theirs.output_tokens
    assert attribution.attribute("The dog is", "🦊").output_tokens[0] == "🦊"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt", "deepseek_v3"])
def test_atman_is_captums_ablation_of_the_suppressed_input(tokenizer, family):
    model = tiny_models.build(family)
    attribution = AtManAttribution(model, tokenizer, similarity_threshold=0.9, progress=False)
    ours = attribution.attribute(PROMPT, ANSWER)
    inp = SuppressedTextInput(PROMPT, attribution.explainer)
    for options in ({"forward_in_tokens": False}, {"use_cached_outputs": False, "forward_in_tokens": True}):
        theirs = stock(model, tokenizer, inp, **options)
        close(ours.token_attr, theirs.token_attr)
        close(ours.seq_attr, theirs.seq_attr)
    assert ours.token_attr.abs().max() > 0.1


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_atman_is_the_explainer(model, tokenizer, threshold):
    attribution = AtManAttribution(model, tokenizer, similarity_threshold=threshold, progress=False)
    explainer = ak.Explainer(model, tokenizer, similarity_threshold=threshold, progress=False)
    for units in ("token", "word", [(0, 5), (3, 11)]):
        expected = explainer.explain(PROMPT, ANSWER, units)
        result = attribution.attribute(PROMPT, ANSWER, units=units)
        close(result.token_attr, expected.scores.T, 1e-5)
        assert result.input_tokens == [unit.text for unit in expected.units]


def test_recompute_is_the_explainers(attribution, model, tokenizer):
    expected = attribution.explainer.explain(PROMPT, ANSWER, recompute=2).scores.T
    assert (expected - attribution.explainer.explain(PROMPT, ANSWER).scores.T).abs().max() > 1e-3
    close(attribution.attribute(PROMPT, ANSWER, recompute=2).token_attr, expected)
    inp = SuppressedTextInput(PROMPT, attribution.explainer, recompute=2)
    close(attribution.attribute(inp, ANSWER).token_attr, expected)
    ablated = SuppressedLLMAttribution(FeatureAblation(model), tokenizer).attribute(inp, ANSWER)
    close(ablated.token_attr, expected)
    with pytest.raises(ak.InputError, match=r"recompute must be None with LLMAttribution.*got 2; Suppressed"):
        stock(model, tokenizer, inp)
    with pytest.raises(ak.InputError, match="inp brings its own units, recompute and explainer"):
        attribution.attribute(inp, ANSWER, recompute=1)
    with pytest.raises(ak.InputError, match="recompute must be an integer >= 1 or None, got 0"):
        attribution.attribute(PROMPT, ANSWER, recompute=0)


def test_targets(attribution, model, tokenizer):
    by_text = attribution.attribute(PROMPT, ANSWER)
    by_ids = attribution.attribute(PROMPT, IDS[N:], forward_in_tokens=False, num_trials=2)
    assert torch.equal(by_text.token_attr, by_ids.token_attr)
    generated = model.generate(IDS[None, :N], attention_mask=torch.ones(1, N), max_new_tokens=4, do_sample=False)
    answered = attribution.attribute(PROMPT, gen_args={"max_new_tokens": 4, "do_sample": False})
    assert [text.strip() for text in answered.output_tokens] == tokenizer.convert_ids_to_tokens(generated[0, N:])


def test_the_models_mode_is_kept(attribution, model):
    model.train()
    try:
        attribution.attribute(PROMPT, ANSWER)
        assert model.training
    finally:
        model.eval()


def test_plots(attribution):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    result = attribution.attribute(PROMPT, ANSWER)
    figure, axes = result.plot_token_attr()
    assert [label.get_text() for label in axes.get_xticklabels()] == PROMPT.split()
    assert len(axes.get_yticklabels()) == M
    figure.canvas.draw()
    figure, axes = result.plot_seq_attr()
    close(torch.tensor([bar.get_height() for bar in axes.patches[:N]]), result.seq_attr.clamp(min=0), 1e-6)
    figure.canvas.draw()


# captum's inputs ----------------------------------------------------------------------------------------------------


def test_named_spans_are_shown_by_their_names(attribution):
    found = attribution.attribute("w5 w6 w7 w8", "w9", units=[(0, 5, "Doc A"), (6, 11)])
    assert found.input_tokens == ["Doc A", "w7 w8"]
    with pytest.raises(ak.InputError, match="several levels are for"):
        attribution.attribute("w5 w6 w7 w8", "w9", units=("sentence", "word"))


def test_token_input(attribution, model, tokenizer):
    inp = TextTokenInput(PROMPT, tokenizer)
    result = attribution.attribute(inp, ANSWER)
    close(result.token_attr, oracle(model, [(i,) for i in range(N)]))
    assert result.inp is inp


def test_skipped_tokens_are_no_features(attribution, model, tokenizer):
    result = attribution.attribute(TextTokenInput(PROMPT, tokenizer, skip_tokens=["w6", "w9"]), ANSWER)
    assert result.input_tokens == ["w5", "w7", "w8", "w10"]
    close(result.token_attr, oracle(model, [(0,), (2,), (3,), (5,)]))


TEMPLATES = {
    "list": (("{} w6 {} w10", ["w5", "w7 w8 w9"]), [(0,), (2, 3, 4)]),
    "names": (("{a} w6 {b} w10", {"b": "w7 w8 w9", "a": "w5"}), [(2, 3, 4), (0,)]),
    "function": ((lambda a, b: f"{a} w6 {b} w10", ["w5", "w7 w8 w9"]), [(0,), (2, 3, 4)]),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_templates(attribution, model, kind):
    arguments, groups = TEMPLATES[kind]
    result = attribution.attribute(TextTemplateInput(*arguments), ANSWER)
    close(result.token_attr, oracle(model, groups))


def test_a_value_that_comes_twice_is_suppressed_twice(attribution, model):
    result = attribution.attribute(TextTemplateInput("{a} w6 {b} {a}", {"a": "w5", "b": "w8"}), ANSWER)
    ids = torch.tensor([5, 6, 8, 5, 20, 6, 22])
    rows = torch.ones(2, 7)
    rows[0, [0, 3]] = rows[1, 2] = 0.0
    close(result.token_attr.T, eager_oracle.leave_one_out(model, ids, 4, rows, "log_additive"))


def test_masked_values_share_a_score(attribution, model, tokenizer):
    template = TextTemplateInput("{} w6 {} {} w9 {}", ["w5", "w7", "w8", "w10"], mask=[0, 1, 0, 1])
    result = attribution.attribute(template, ANSWER)
    groups = oracle(model, [(0, 3), (2, 5)])
    close(result.token_attr, groups[:, [0, 1, 0, 1]])
    assert result.input_tokens == ["w5", "w7", "w8", "w10"]
    batched = SuppressedLLMAttribution(FeatureAblation(model), tokenizer)
    inp = SuppressedTextInput(template, attribution.explainer)
    close(batched.attribute(inp, ANSWER).token_attr, result.token_attr)


# captum's methods ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [FeatureAblation, ShapleyValueSampling, ShapleyValues, KernelShap, Lime])
def test_methods_batched_equal_captums_own_loop(attribution, model, tokenizer, method):
    inp = SuppressedTextInput(PROMPT, attribution.explainer, [(0, 2), (3, 8), (9, 14), (6, 17)])
    settings = {} if method in (FeatureAblation, ShapleyValues) else {"n_samples": 12}
    torch.manual_seed(3)
    ours = SuppressedLLMAttribution(method(model), tokenizer).attribute(inp, ANSWER, **settings)
    torch.manual_seed(3)
    theirs = stock(model, tokenizer, inp, method=method, **settings)
    close(ours.seq_attr, theirs.seq_attr)
    assert ours.seq_attr.abs().max() > 0.05
    assert (ours.token_attr is None) == (method in (KernelShap, Lime))
    if ours.token_attr is not None:
        close(ours.token_attr, theirs.token_attr)
    assert ours.inp is inp


@pytest.mark.parametrize("method", [ShapleyValueSampling, KernelShap])
def test_random_numbers_go_on_as_after_captums_own_loop(attribution, model, tokenizer, method):
    inp = SuppressedTextInput(PROMPT, attribution.explainer)
    torch.manual_seed(3)
    SuppressedLLMAttribution(method(model), tokenizer).attribute(inp, ANSWER, n_samples=4)
    ours = torch.rand(1)
    torch.manual_seed(3)
    stock(model, tokenizer, inp, method=method, n_samples=4)
    assert torch.equal(ours, torch.rand(1))


def test_samples_that_differ_between_the_two_runs_are_computed_all_the_same(attribution, model, tokenizer):
    method, unseeded = ShapleyValueSampling(model), random.Random(1)
    method.permutation_generator = lambda n, samples: (unseeded.sample(range(n), n) for _ in range(samples))
    inp = SuppressedTextInput(PROMPT, attribution.explainer)
    result = SuppressedLLMAttribution(method, tokenizer).attribute(inp, ANSWER, n_samples=3)
    close(result.token_attr.sum(dim=1), oracle(model, [range(N)])[:, 0])  # all absent, in any order


def test_shapley_values_are_the_average_over_all_orders(attribution, model, tokenizer):
    groups = [(0, 1), (2,), (3, 4, 5)]
    inp = SuppressedTextInput(PROMPT, attribution.explainer, [(0, 5), (6, 8), (9, 17)])
    result = SuppressedLLMAttribution(ShapleyValues(model), tokenizer).attribute(inp, ANSWER)

    def value(present):
        row = torch.ones(N + M)
        for index, group in enumerate(groups):
            row[list(group)] = 1.0 if index in present else 0.0
        return eager_oracle.target_logprobs(model, IDS, N, row, "log_additive")

    expected = torch.zeros(M, 3, dtype=torch.float64)
    for order in itertools.permutations(range(3)):
        for place, index in enumerate(order):
            gain = value(set(order[: place + 1])) - value(set(order[:place]))
            expected[:, index] += gain / math.factorial(3)
    close(result.token_attr, expected)


@pytest.mark.parametrize("factor", [0.0, 0.1, 3.0])
def test_a_token_of_two_absent_features_keeps_what_the_strongest_leaves(model, tokenizer, factor):
    explainer = ak.Explainer(model, tokenizer, factor=factor, similarity_threshold=0.3, progress=False)
    inp = SuppressedTextInput(PROMPT, explainer).asking(IDS[N:])
    rows = inp.factors(torch.tensor([[0.0, 0, 1, 1, 1, 1], [1.0] * N]))
    first, second = inp.unit_factors[0], inp.unit_factors[1]
    chosen = torch.where((first - 1).abs() > (second - 1).abs(), first, second)
    assert torch.equal(rows[0], chosen)
    assert rows[0, :2].tolist() == pytest.approx([factor] * 2)
    assert torch.equal(rows[1], torch.ones(N + M - 1))


def test_probabilities(attribution, model, tokenizer):
    inp = SuppressedTextInput(PROMPT, attribution.explainer)
    result = SuppressedLLMAttribution(FeatureAblation(model), tokenizer, attr_target="prob").attribute(inp, ANSWER)
    base = eager_oracle.target_logprobs(model, IDS, N, torch.ones(N + M), "log_additive")
    suppressed = base[:, None] - oracle(model, [(i,) for i in range(N)])
    close(result.token_attr, base.exp()[:, None] - suppressed.exp(), 1e-5)
    close(result.seq_attr, base.sum().exp() - suppressed.sum(dim=0).exp(), 1e-6)


def forwards_of(model, work):
    count = 0

    def counted(*_):
        nonlocal count
        count += 1

    hook = decoder_of(model).register_forward_hook(counted)
    try:
        work()
    finally:
        hook.remove()
    return count


def test_perturbations_share_forwards(attribution, model, tokenizer):
    inp = SuppressedTextInput(PROMPT, attribution.explainer)
    attribution.attribute(PROMPT, ANSWER)  # the check of the model's attention is behind it
    batched = SuppressedLLMAttribution(FeatureAblation(model), tokenizer)
    assert forwards_of(model, lambda: stock(model, tokenizer, inp)) == N + 1
    # base, probe, and one pack for all features, or all samples
    assert forwards_of(model, lambda: batched.attribute(inp, ANSWER)) == 3
    sampling = SuppressedLLMAttribution(ShapleyValueSampling(model), tokenizer)
    assert forwards_of(model, lambda: sampling.attribute(inp, ANSWER, n_samples=5)) == 3
    assert forwards_of(model, lambda: attribution.attribute(PROMPT, ANSWER)) == 3


# What is refused ----------------------------------------------------------------------------------------------------


def test_refused_inputs(attribution, model, tokenizer):
    other = ak.Explainer(tiny_models.build("llama", 1), tokenizer, progress=False)
    foreign = SimpleNamespace(get_vocab=dict, encode=tokenizer.encode, convert_ids_to_tokens=lambda ids: ["a"] * 6)
    mine = SuppressedTextInput(PROMPT, attribution.explainer)
    for inp, options, message in [
        (TextTokenInput(PROMPT, tokenizer, baselines=7), {}, "baselines must be 0"),
        (TextTokenInput(PROMPT, foreign), {}, "another tokenizer"),
        (TextTokenInput(PROMPT, tokenizer), {"units": "word"}, "units are for texts"),
        (TextTemplateInput("{} w6", ["w5"], baselines=["w7"]), {}, "baselines must be None"),
        (TextTemplateInput("{} w6", ["w5"], baselines=lambda: ["w7"]), {}, "baselines must be None"),
        (TextTemplateInput("{:>9} w6", ["w5"]), {}, "no piece of its text"),
        (TextTemplateInput(lambda a: a.upper(), ["w5"]), {}, "no piece of its text"),
        (TextTemplateInput(lambda a, b: f"w9 {b}", ["w5", "w6"]), {}, "no piece of its text"),
        (TextTemplateInput("{} w6", [""]), {}, "no piece of its text"),
        (torch.ones(1, 3), {}, "got Tensor"),
        ("", {}, "inp is empty"),
        (mine, {"units": "word"}, "its own units"),
        (SuppressedTextInput(PROMPT, other), {}, "another model|own units"),
        (
            SuppressedTextInput(PROMPT, ak.Explainer(model, tokenizer, progress=False)),
            {},
            "own units, recompute and explainer",
        ),
    ]:
        with pytest.raises(ak.InputError, match=message):
            attribution.attribute(inp, ANSWER, **options)


def test_images_are_refused(attribution):
    image = pytest.importorskip("PIL.Image").new("RGB", (4, 4))
    from captum.attr import ImageMaskInput

    inp = ImageMaskInput(image=image, mask=torch.zeros(4, 4, dtype=torch.int32), processor_fn=lambda _: {})
    with pytest.raises(ak.InputError, match="got ImageMaskInput"):
        attribution.attribute(inp, ANSWER)


def test_refused_arguments(attribution, model, tokenizer):
    for target, options, message in [
        ("", {}, "at least one token"),
        (torch.tensor([[3]]), {}, "one dimension"),
        (["w5"], {}, "a text, token ids or None"),
        ("w5", {"gen_args": {"max_new_tokens": 1}}, "gen_args"),
        ("w5 " * 200, {}, "205 tokens, but the model has 128 positions"),
        ("w5", {"feature_mask": torch.zeros(1, N)}, "feature_mask is no argument"),
    ]:
        with pytest.raises(ak.InputError, match=message):
            attribution.attribute(PROMPT, target, **options)
    inp = SuppressedTextInput(PROMPT, attribution.explainer)
    batched = SuppressedLLMAttribution(FeatureAblation(model), tokenizer)
    with pytest.raises(ak.InputError, match="must be a SuppressedTextInput, got TextTokenInput"):
        batched.attribute(TextTokenInput(PROMPT, tokenizer), ANSWER)
    with pytest.raises(ak.InputError, match="baselines must be 0"):
        batched.attribute(inp, ANSWER, baselines=torch.full((1, N), 0.5))
    with pytest.raises(ak.InputError, match="perturbations_per_eval"):
        stock(model, tokenizer, inp, perturbations_per_eval=2)
    with pytest.raises(ak.InputError, match="factor"):
        AtManAttribution(model, tokenizer, factor=-1.0)


def test_captums_cached_path_is_refused_and_leaves_nothing_behind(attribution, model, tokenizer):
    inp = SuppressedTextInput(PROMPT, attribution.explainer)
    before = model.config._attn_implementation
    with torch.no_grad():
        plain = model(IDS[None]).logits
        with pytest.raises(ak.InputError, match="use_cached_outputs must be False"):
            stock(model, tokenizer, inp, forward_in_tokens=True)
        assert model.config._attn_implementation == before
        assert torch.equal(model(IDS[None]).logits, plain)
    result = stock(model, tokenizer, inp)  # and the next one is right
    close(result.token_attr, oracle(model, [(i,) for i in range(N)]))


def test_an_error_inside_a_forward_leaves_nothing_behind(attribution, model, tokenizer):
    inp = SuppressedTextInput(PROMPT, attribution.explainer)
    before = model.config._attn_implementation
    hook = decoder_of(model).layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stock(model, tokenizer, inp)
    hook.remove()
    assert model.config._attn_implementation == before
    close(stock(model, tokenizer, inp).token_attr, oracle(model, [(i,) for i in range(N)]))
    del inp
    gc.collect()
    assert not decoder_of(model)._forward_hooks
    assert not decoder_of(model)._forward_pre_hooks


def test_a_model_that_drops_keyword_arguments_is_noticed(tokenizer):
    model = tiny_models.build("llama")
    inp = SuppressedTextInput(PROMPT, ak.Explainer(model, tokenizer, progress=False))
    forward = model.forward
    model.forward = lambda input_ids, **_: forward(input_ids=input_ids)
    with pytest.raises(ak.UnsupportedModelError, match="does not hand keyword arguments on"):
        stock(model, tokenizer, inp)
    model.forward = forward
    close(stock(model, tokenizer, inp).token_attr, oracle(model, [(i,) for i in range(N)]))


# Real weights -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2():
    pytest.importorskip("gguf")
    from atman_kernels.hf.models.loading import find_smollm2, load_model

    try:
        find_smollm2()
    except ak.InputError as error:
        pytest.skip(str(error))
    model, tokenizer = load_model("smollm2", dtype="float32")
    attribution = AtManAttribution(model, tokenizer, progress=False)
    template = TextTemplateInput("The capital of {} is {}. They speak {}", ["France", "Paris", "the language"])
    for source in ("The Eiffel Tower stands in the city of", template):
        ours = attribution.attribute(source, " Paris, France")
        inp = SuppressedTextInput(source, attribution.explainer)
        theirs = stock(model, tokenizer, inp, " Paris, France")
        close(ours.token_attr, theirs.token_attr)
        assert theirs.output_tokens == [text.strip() for text in ours.output_tokens]
    best = attribution.attribute("The Eiffel Tower stands in the city of", " Paris", units="word")
    assert best.input_tokens[int(best.seq_attr.argmax())] in ("Eiffel", "Tower")
