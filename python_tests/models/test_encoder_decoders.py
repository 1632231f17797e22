"""Encoder-decoders: which attention is suppressed, and scores against eager attention with the same scores changed."""

import pytest
import tiny_models
import torch
import transformers as hf
from tiny_encoder_decoders import FAMILIES, SAMPLES, STACKS, TEXT, build, explainer, start, whisper
from whole_row_oracle import scores_by_hand, suppressed

import atman_kernels as ak

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
TARGET = torch.tensor([20, 21, 22])


def is_source(name: str, attention: str = "both") -> bool:
    """By the names of T5's and BART's modules."""
    across = "EncDecAttention" in name or ".encoder_attn" in name
    within = name.startswith(("encoder.", "model.encoder."))
    return (across and attention != "self") or (within and attention != "cross")


def target_logprobs(model, first: int, **source):
    ids = torch.cat([torch.tensor([first]), TARGET[:-1]])[None]
    logits = model(**source, decoder_input_ids=ids).logits[0].double()
    return logits.log_softmax(-1).gather(1, TARGET[:, None])[:, 0]


@pytest.mark.parametrize("mode", ["log_additive", "multiplicative", "shifted"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_eager_attention(family, mode):
    model = build(family)
    found = explainer(model, mode=mode, token_budget=30).explain(TEXT, target="w20 w21 w22", units="word")
    by_hand, base = scores_by_hand(
        lambda: target_logprobs(model, start(family), input_ids=IDS), model, 6, found.units, mode, 0.1, is_source
    )
    assert found.scores.shape == (6, 3)
    assert by_hand.abs().max() > 1e-2, "suppression makes no difference"
    torch.testing.assert_close(found.scores, by_hand, atol=5e-5, rtol=1e-3)
    torch.testing.assert_close(found.base_logprobs, base, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["self", "cross", "both"])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_suppress_acts_on_the_attention_that_is_named(family, attention):
    model = build(family)
    factor = torch.tensor([[1.0, 0.1, 1.0, 0.0, 1.0, 1.7]])
    with torch.no_grad(), ak.suppress(model, factor, attention=attention):
        found = target_logprobs(model, start(family), input_ids=IDS)
    with suppressed(model, factor[0], "log_additive", lambda name: is_source(name, attention)):
        expected = target_logprobs(model, start(family), input_ids=IDS)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        plain = target_logprobs(model, start(family), input_ids=IDS)
    assert (found - plain).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["t5", "marian"])
def test_source_and_target_of_one_length_are_not_mixed_up(family):
    """Cross-attention and the decoder's own have the same shapes then."""
    model = build(family)
    factor = torch.tensor([[0.0, 1.0, 1.0]])
    source = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), ak.suppress(model, factor, attention="cross"):
        found = target_logprobs(model, start(family), input_ids=source)
    with suppressed(model, factor[0], "log_additive", lambda name: is_source(name, "cross")):
        expected = target_logprobs(model, start(family), input_ids=source)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_layers_are_counted_in_each_stack(family):
    model = build(family)
    layer = {"t5": "block.1.", "bart": "layers.1."}[family]
    found = explainer(model, layers=[1]).explain(TEXT, "w20 w21 w22")
    by_hand, _ = scores_by_hand(
        lambda: target_logprobs(model, start(family), input_ids=IDS),
        model, 6, found.units, "log_additive", 0.1, lambda name: is_source(name) and layer in name,
    )  # fmt: skip
    torch.testing.assert_close(found.scores, by_hand, atol=5e-5, rtol=1e-3)
    count = {"t5": 2, "bart": 3}[family]  # BART's decoder has one more than its encoder
    assert explainer(model, layers=[count - 1]).explain(TEXT, "w20").scores.abs().max() > 1e-4
    with pytest.raises(ak.InputError, match=rf"\[0, {count}\)"):
        explainer(model, layers=[count])


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_generation_with_a_cache_equals_full_recomputation(family):
    model = build(family)
    factor = torch.tensor([[1.0, 0.05, 1.0, 1.0, 0.0, 1.0]])
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 1}
    with ak.suppress(model, factor):
        cached = model.generate(IDS, **settings, output_logits=True, return_dict_in_generate=True)
        with torch.no_grad():
            full = model(input_ids=IDS, decoder_input_ids=cached.sequences[:, :-1], use_cache=False).logits
    torch.testing.assert_close(torch.stack(cached.logits, dim=1), full, atol=2e-4, rtol=1e-4)
    plain = model.generate(IDS, **settings, output_logits=True, return_dict_in_generate=True)
    assert (plain.logits[0] - cached.logits[0]).abs().max() > 1e-2


def test_padded_sources_in_a_batch():
    model = build("bart")
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    factor = torch.tensor([[1.0, 0.1, 1, 1], [0.0, 1, 1, 1]])
    decoder = torch.tensor([[2, 20, 21], [2, 22, 23]])
    with torch.no_grad(), ak.suppress(model, factor):
        together = model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder).logits
    for row, length in ((0, 4), (1, 2)):
        with suppressed(model, factor[row, :length], "log_additive", is_source):
            alone = model(input_ids=ids[row : row + 1, :length], decoder_input_ids=decoder[row : row + 1]).logits[0]
        torch.testing.assert_close(together[row], alone, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_answers_first_if_no_target_is_given(family):
    model = build(family)
    found = explainer(model).explain(TEXT, max_new_tokens=4)
    own = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False, num_beams=1)
    words = [f"w{i}" for i in own[0].tolist() if i > 2]
    assert found.target.split() == words
    again = explainer(model).explain(TEXT, target=found.target)
    torch.testing.assert_close(found.scores, again.scores, atol=1e-5, rtol=1e-4)


def test_special_tokens_before_a_target_are_given_and_those_after_it_left_out():
    """As BART's tokenizer writes them: <s> text </s>, behind the decoder's start token."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_models.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    model = build("bart")
    found = explainer(model, tokenizer).explain(TEXT, target="w20 w21")
    assert len(found.units) == 8
    assert [token.strip() for token in found.target_tokens] == ["w20", "w21"]
    source = torch.tensor([[1, 5, 6, 7, 8, 9, 10, 2]])
    with torch.no_grad():
        logits = model(input_ids=source, decoder_input_ids=torch.tensor([[2, 1, 20]])).logits[0].log_softmax(-1)
    torch.testing.assert_close(found.base_logprobs, logits[[1, 2], [20, 21]], atol=1e-5, rtol=1e-4)


# Recordings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["log_additive", "shifted"])
def test_a_transcript_rests_on_seconds(mode):
    model, processor = whisper()
    found = explainer(model, processor, mode=mode).explain(audio=SAMPLES.numpy(), target="w20 w21 w22", units=0.5)
    assert [unit.text for unit in found.units] == ["0–0.5 s", "0.5–1 s", "1–1.5 s"]
    assert [unit.token_indices for unit in found.units] == [tuple(range(i, i + 25)) for i in (0, 25, 50)]
    features = processor.feature_extractor(SAMPLES.numpy(), sampling_rate=16000, return_tensors="pt")["input_features"]
    by_hand, base = scores_by_hand(
        lambda: target_logprobs(model, 1, input_features=features), model, 100, found.units, mode, 0.1, is_source
    )
    assert by_hand.abs().max() > 1e-2
    torch.testing.assert_close(found.scores, by_hand, atol=5e-5, rtol=1e-3)
    torch.testing.assert_close(found.base_logprobs, base, atol=5e-5, rtol=1e-4)
    assert found.settings["seconds"] == [[0, 0.5], [0.5, 1.0], [1.0, 1.5]]
    assert "0.5–1 s" in found.to_html()


def test_the_model_transcribes_and_spans_are_chosen():
    model, processor = whisper()
    found = explainer(model, processor).explain(audio=SAMPLES, units=[(0, 0.1), (0.05, 1.5)], max_new_tokens=3)
    assert found.target
    assert [unit.token_indices[0] for unit in found.units] == [0, 2]
    assert len(explainer(model, processor).explain(audio=SAMPLES, target="w5").units) == 2  # seconds


def test_language_and_task_stand_before_a_transcript():
    """Whisper's tokenizer says which tokens these are, once it knows the language."""

    class Tokenizer(hf.PreTrainedTokenizerFast):
        language = None
        prefix_tokens = (1, 4, 5)

    model, processor = whisper()
    plain = tiny_models.tokenizer()
    processor.tokenizer = Tokenizer(tokenizer_object=plain.backend_tokenizer, pad_token="<pad>", bos_token="<s>")
    model.generation_config.is_multilingual = True
    with pytest.raises(ak.InputError, match="set_prefix_tokens"):
        explainer(model, processor).explain(audio=SAMPLES, target="w20")
    processor.tokenizer.language = "english"
    found = explainer(model, processor).explain(audio=SAMPLES, target="w20 w21")
    features = processor.feature_extractor(SAMPLES.numpy(), sampling_rate=16000, return_tensors="pt")["input_features"]
    with torch.no_grad():
        logits = model(input_features=features, decoder_input_ids=torch.tensor([[1, 4, 5, 20]])).logits[0]
    torch.testing.assert_close(found.base_logprobs, logits.log_softmax(-1)[[2, 3], [20, 21]], atol=2e-5, rtol=1e-4)
    answered = explainer(model, processor).explain(audio=SAMPLES, max_new_tokens=3)
    greedy = [1, 4, 5]
    for _ in range(3):
        with torch.no_grad():
            logits = model(input_features=features, decoder_input_ids=torch.tensor([greedy])).logits[0, -1]
        greedy.append(int(logits.argmax()))
    assert answered.target.split() == [f"w{i}" for i in greedy[3:]]


# Bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_named():
    model, (listener, processor) = build("bart"), whisper()
    for arguments, words in (
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": TEXT, "target": "  "}, "target is empty"),
        ({"prompt": (TEXT, TEXT)}, "prompt must be a text, got a pair"),
        ({"audio": SAMPLES}, "takes a text"),
        ({"prompt": TEXT, "include_target": True}, "include_target"),
        ({"prompt": TEXT, "max_new_tokens": 0}, "max_new_tokens"),
    ):
        with pytest.raises(ak.InputError, match=words):
            explainer(model).explain(**arguments)
    for arguments, words in (
        ({"prompt": TEXT}, "takes audio"),
        ({"audio": SAMPLES, "units": "word"}, "seconds"),
        ({"audio": SAMPLES, "units": [(1.0, 2.0)]}, r"units\[0\]"),
        ({"audio": torch.zeros(2, 9)}, "samples"),
        ({"audio": "hello.wav"}, "samples"),
        ({"audio": torch.full((9,), torch.nan)}, "audio must be finite samples"),
        ({"audio": SAMPLES, "units": 1e-9}, r"at least the \S+ s of a position, got 1e-09"),
        ({"audio": SAMPLES, "units": {0.0: 1.0}}, "units of a recording must be"),
        ({"audio": torch.zeros(40000)}, "2 s at most"),
        ({"audio": SAMPLES, "target": " ".join(["w5"] * 17)}, "17 tokens, but the model has 16 positions"),
    ):
        with pytest.raises(ak.InputError, match=words):
            explainer(listener, processor).explain(**arguments)
    with pytest.raises(ak.InputError, match="processor"):
        explainer(listener).explain(audio=SAMPLES)
    with pytest.raises(ak.InputError, match="audio, labels and pooling are not for language models such as Llama"):
        explainer(tiny_models.build("llama")).explain(audio=SAMPLES)
    model.generation_config.decoder_start_token_id = model.config.decoder_start_token_id = None
    with pytest.raises(ak.InputError, match="decoder_start_token_id"):
        explainer(model).explain(TEXT, "w5")


def test_suppress_says_what_it_cannot_do():
    model = build("bart")
    with pytest.raises(ak.InputError, match='"self", "cross" or "both"'), ak.suppress(model, None, attention="all"):
        pass
    with pytest.raises(ak.InputError, match="queries must be None"), ak.suppress(model, None, queries=(0, 1)):
        pass
    llama = tiny_models.build("llama")
    with pytest.raises(ak.InputError, match="no encoder-decoder"), ak.suppress(llama, None, attention="cross"):
        pass
    with torch.no_grad():
        states = model.get_encoder()(IDS)
    with pytest.raises(ak.UnsupportedModelError, match="never called"), ak.suppress(model, torch.ones(1, 6)):
        model(encoder_outputs=states, decoder_input_ids=IDS)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.config._attn_implementation != "atman"


def test_nothing_takes_source_and_target_for_one_sequence():
    explainer = ak.Explainer(build("bart"), tiny_models.tokenizer(), progress=False)
    with pytest.raises(ak.UnsupportedModelError, match="BartForConditionalGeneration is no language model"):
        explainer.ablate("Anna", "Bert", masks=torch.ones(1, 4, dtype=torch.bool))


def test_encoder_decoders_for_anything_else_are_refused():
    model = hf.BartForSequenceClassification(hf.BartConfig(**STACKS, max_position_embeddings=64))
    with pytest.raises(ak.UnsupportedModelError, match="BartForSequenceClassification"):
        explainer(model)
