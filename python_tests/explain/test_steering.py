"""`steer`: the named tokens and no others, in every way of generating, and nothing silently unsteered."""

import re
import threading
import time

import eager_edits
import pytest
import tiny_models
import torch
import transformers as hf

import atman_kernels as ak
from atman_kernels.steering.spans import TokenizedText, resolve

IDS = [5, 6, 7, 8, 9, 10, 11, 6, 13, 14, 15, 16]
TEXT = tiny_models.text_of(IDS)  # "w5 w6 w7 w8 w9 w10 w11 w6 w13 w14 w15 w16": w6 occurs twice, w1 in several words
WITH_LOGITS = {"output_logits": True, "return_dict_in_generate": True}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_models.tokenizer()


@pytest.fixture(scope="module")
def llama():
    return tiny_models.build("llama")


def ids_of(texts: list[str]) -> list[list[int]]:
    return [[int(word[1:]) if word[0] == "w" else 0 for word in text.split()] for text in texts]


def without_key(model, ids: list[int], key: int) -> list[int]:
    return masked_run(model, ids, key).sequences[0, len(ids) :].tolist()


def masked_run(model, ids: list[int], key: int | None):
    """The unpatched model's answer to a prompt of which one key is masked: a hole, and the positions as they were."""
    mask = torch.ones(1, len(ids), dtype=torch.long)
    if key is not None:
        mask[0, key] = 0
    positions = torch.arange(len(ids))[None]
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": mask, "position_ids": positions}
    return model.generate(**inputs, pad_token_id=0, **GREEDY, **WITH_LOGITS)


# --- which tokens ---


@pytest.mark.parametrize(
    ("span", "tokens"),
    [
        ("w7", (2,)),
        ("w7 w8", (2, 3)),
        ("7", (2,)),  # a part of a token stands for all of it
        (re.compile(r"w9 \w+"), (4, 5)),
        (ak.Occurrence("w6", 1), (7,)),
        (ak.Occurrence("w6", -2), (1,)),
        (ak.Occurrence(re.compile(r"\bw1[3-5]"), "all"), (8, 9, 10)),
        ((3, 8), (1, 2)),
        ((2, 3), ()),
        (range(1, 6, 2), (1, 3, 5)),
        (range(5, 1, -2), (3, 5)),
    ],
)
def test_spans_hold_their_tokens_and_no_others(llama, tokenizer, span, tokens):
    if not tokens:
        with pytest.raises(ak.InputError, match=r"spans: \(2, 3\) holds no token"):
            resolve({span: 0.0}, tokenized(tokenizer))
        return
    expected = torch.ones(1, 12)
    expected[0, list(tokens)] = 0.25
    with ak.steer(llama, tokenizer, TEXT, {span: 0.25}) as steered:
        assert torch.equal(steered.factor, expected)
        assert steered.inputs["input_ids"].tolist() == [IDS]
        assert steered.texts == (TEXT,)
    assert sorted(t for s in steered.spans[0] for t in s.unit.token_indices) == list(tokens)


def tokenized(tokenizer) -> TokenizedText:
    found = tokenizer(TEXT, return_offsets_mapping=True)
    return TokenizedText(TEXT, tuple(found["input_ids"]), tuple(map(tuple, found["offset_mapping"])))


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ({"w6": 0.0}, r"spans: 'w6' occurs 2 times \(at characters 3, 23\)"),
        ({re.compile(r"w\d+"): 0.0}, r"spans: /w\\d\+/ occurs 12 times \(at characters 0, 3, .*, …\)"),
        ({"w77": 0.0}, "spans: 'w77' does not occur in the prompt"),
        ({re.compile("x*"): 0.0}, r"spans: /x\*/ does not occur"),
        ({"": 0.0}, "spans: '' does not occur"),
        ({ak.Occurrence("w6", 2): 0.0}, "spans: 'w6' has no occurrence 2; it occurs 2 times"),
        ({"w7": -0.1}, "spans: the factor of 'w7' must be finite and >= 0, got -0.1"),
        ({"w7": float("nan")}, "spans: the factor of 'w7' must be finite"),
        ({"w7": float("inf")}, "spans: the factor of 'w7' must be finite"),
        ({"w7": "much"}, "spans: the factor of 'w7' must be finite and >= 0, got 'much'"),
        ({"w7 w8": 0.0, "w8 w9": 2.0}, "spans: 'w7 w8' and 'w8 w9' share token 3, but their factors are 0 and 2"),
        ({(5, 5): 0.0}, r"spans: got \(5, 5\), expected \(start, end\) with 0 <= start < end <= 41"),
        ({(0, 99): 0.0}, r"spans: got \(0, 99\), expected"),
        ({range(3, 3): 0.0}, r"spans: got range\(3, 3\), expected token positions in \[0, 12\)"),
        ({range(9, 13): 0.0}, r"spans: got range\(9, 13\), expected token positions"),
        ({3: 0.0}, "spans: got 3, expected a text"),
        ({re.compile(b"w7"): 0.0}, "spans: got .*, expected a text"),
        ("w7", "spans must be one mapping .* got str"),
        ([{"w7": 0.0}] * 2, "spans must be one mapping .* each of 1 prompts, got 2"),
    ],
)
def test_spans_that_do_not_fit_are_refused_and_leave_the_model_alone(llama, tokenizer, spans, message):
    with pytest.raises(ak.InputError, match=message), ak.steer(llama, tokenizer, TEXT, spans):
        pass
    assert llama.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("arguments", [("w7", 0.5), ("w7", True), ("w7", "first"), (7, 0)])
def test_a_bad_occurrence_is_refused(arguments):
    with pytest.raises(ak.InputError, match="Occurrence: "):
        ak.Occurrence(*arguments)


def test_overlapping_spans_of_one_factor_agree(llama, tokenizer):
    with ak.steer(llama, tokenizer, TEXT, {"w7 w8": 0.5, "w8 w9": 0.5}) as steered:
        assert steered.factor[0].tolist() == [1, 1, 0.5, 0.5, 0.5] + [1] * 7


@pytest.mark.parametrize("prompt", ["", [], None, 3, ["w5", ""]])
def test_bad_prompts_are_refused(llama, tokenizer, prompt):
    with pytest.raises(ak.InputError, match="prompt"), ak.steer(llama, tokenizer, prompt, {}):
        pass


# --- what comes out ---


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma2"])
def test_factor_zero_is_a_model_that_never_sees_the_key(family, tokenizer):
    model = tiny_models.build(family)
    with ak.steer(model, tokenizer, TEXT, {"w13": 0.0}) as steered:
        output = model.generate(**steered.inputs, pad_token_id=0, **GREEDY, **WITH_LOGITS)
        assert ids_of(steered.generate(**GREEDY)) == output.sequences[:, 12:].tolist()
    got, expected, plain = (
        torch.stack(run.logits) for run in (output, masked_run(model, IDS, 8), masked_run(model, IDS, None))
    )
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert (got[0] - plain[0]).abs().max() > 1e-2


def test_factor_zero_equals_a_mask_over_every_row_of_one_forward(llama, tokenizer):
    visible = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
    visible[..., 8] = False
    with torch.no_grad():
        with ak.steer(llama, tokenizer, TEXT, {"w13": 0.0}) as steered:
            logits = llama(**steered.inputs).logits
        expected = llama(torch.tensor([IDS]), attention_mask=visible).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("mode", "factor"), [("log_additive", 3.0), ("multiplicative", 0.2), ("multiplicative", 1.6)])
def test_factors_change_the_scores_by_the_formula(llama, tokenizer, mode, factor):
    def scaled(layer, scores):
        at = torch.zeros(12, dtype=torch.bool)
        at[[2, 3]] = True
        change = scores + torch.tensor(factor).log() if mode == "log_additive" else scores * factor
        return torch.where(at & torch.tensor(layer == 1), change, scores)

    with torch.no_grad():
        with ak.steer(llama, tokenizer, TEXT, {"w7 w8": factor}, mode=mode, layers=[1]) as steered:
            logits = llama(**steered.inputs).logits
        with eager_edits.edited(llama, scores=scaled):
            expected = llama(torch.tensor([IDS])).logits
        plain = llama(torch.tensor([IDS])).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert (logits - plain).abs().max() > 1e-3


WAYS = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "looked up in the prompt": {"prompt_lookup_num_tokens": 2},
    "result object": {"return_dict_in_generate": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_greedy_way_of_generating_gives_the_same_answer(llama, tokenizer, way):
    with ak.steer(llama, tokenizer, TEXT, {"w13": 0.0}) as steered:
        assert ids_of(steered.generate(**GREEDY, **WAYS[way])) == [without_key(llama, IDS, 8)]


def test_assisted_generation_gives_the_same_answer(llama, tokenizer):
    """The assistant is another model and not steered: it can only propose."""
    assistant = tiny_models.build("llama", seed=3)
    with ak.steer(llama, tokenizer, TEXT, {"w13": 0.0}) as steered:
        assert ids_of(steered.generate(**GREEDY, assistant_model=assistant)) == [without_key(llama, IDS, 8)]


def test_beams_and_samples_are_those_of_the_suppressed_model(llama, tokenizer):
    factor = torch.ones(1, 12)
    factor[0, 8] = 0.3
    ids = torch.tensor([IDS])
    for options in (
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 20},
    ):
        settings = {"max_new_tokens": 5, "eos_token_id": None, **options}
        torch.manual_seed(7)
        with ak.steer(llama, tokenizer, TEXT, {"w13": 0.3}) as steered:
            answers = steered.generate(**settings, skip_special_tokens=False)
        torch.manual_seed(7)
        with ak.suppress(llama, factor):
            expected = llama.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **settings)[:, 12:]
        assert answers == tokenizer.batch_decode(expected)
        assert len(answers) == options["num_return_sequences"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_a_batch_gives_what_each_prompt_gives_alone(family, tokenizer):
    model = tiny_models.build(family)
    prompts = [TEXT, "w9 w13 w20", "w30 w13 w40 w13 w50 w60"]
    every = ak.Occurrence("w13", "all")
    with ak.steer(model, tokenizer, prompts, {every: 0.05}) as steered:
        together = steered.generate(**GREEDY)
    assert [s.unit.token_indices for found in steered.spans for s in found] == [(8,), (1,), (1,), (3,)]
    for prompt, answer in zip(prompts, together, strict=True):
        with ak.steer(model, tokenizer, prompt, {every: 0.05}) as steered:
            assert steered.generate(**GREEDY) == [answer]
    spans = [{"w7": 0.0}, {range(1): 4.0}, {(4, 7): 0.0}]
    with ak.steer(model, tokenizer, prompts, spans) as steered:
        apart = steered.generate(**GREEDY)
    assert steered.factor[1].tolist() == [1] * 9 + [4, 1, 1]
    assert steered.factor[2].tolist() == [1] * 7 + [0] + [1] * 4
    for prompt, own, answer in zip(prompts, spans, apart, strict=True):
        with ak.steer(model, tokenizer, prompt, own) as steered:
            assert steered.generate(**GREEDY) == [answer]


def test_a_batch_says_in_which_prompt_a_span_is_missing(llama, tokenizer):
    with (
        pytest.raises(ak.InputError, match="prompt 1: spans: 'w7' does not occur"),
        ak.steer(llama, tokenizer, [TEXT, "w9 w13"], {"w7": 0.0}),
    ):
        pass


def test_chat_messages_and_chat_are_the_same_prompt(tiny_llama, tiny_tokenizer):
    model = hf.AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    messages = [{"role": "user", "content": "The dog rang."}]
    answers = []
    for prompt, chat in ((messages, False), ("The dog rang.", True), ([messages], False)):
        with ak.steer(model, tiny_tokenizer, prompt, {"dog": 0.0}, chat=chat) as steered:
            assert steered.texts == ("[user] The dog rang.\n[assistant] ",)
            (span,) = steered.spans[0]
            assert span.unit.text == "dog"
            answers.append(steered.generate(max_new_tokens=4, do_sample=False))
    assert answers[0] == answers[1] == answers[2]


# --- tokens without a text: images ---


def test_image_tokens_are_steered_by_their_positions(tokenizer):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**vision, image_size=8, patch_size=4, projection_dim=16),
        text_config=hf.LlamaConfig(**{**tiny_models.GROUPED, "vocab_size": 99}),
        image_token_index=98,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = hf.LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(8.0) if parameter.ndim >= 2 else None
    ids = torch.tensor([[5, 98, 98, 98, 98, 7, 8]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 8, 8)}
    removed = torch.zeros(7, dtype=torch.bool)
    removed[2:4] = True
    with torch.no_grad():
        with ak.steer(model, tokenizer, inputs, {range(2, 4): 0.0}) as steered:
            logits = model(**steered.inputs).logits
            assert len(steered.generate(max_new_tokens=2, do_sample=False)) == 1
        with eager_edits.edited(model.get_decoder(), scores=lambda _, s: s.masked_fill(removed, -torch.inf)):
            expected = model(**inputs).logits
        plain = model(**inputs).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert (logits - plain)[0, -1].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("inputs", "spans", "message"),
    [
        ({"input_ids": torch.tensor([IDS])}, {"w7": 0.0}, "spans: 'w7' cannot be found in inputs without a text"),
        ({"input_ids": torch.tensor([IDS])}, {range(12, 13): 0.0}, "spans: got range"),
        ({"input_ids": torch.tensor(IDS)}, {}, r"input_ids must be a tensor \(B, L\), got shape \(12,\)"),
        ({}, {}, r"input_ids must be a tensor \(B, L\), got NoneType"),
    ],
)
def test_ready_inputs_take_ranges_of_tokens_only(llama, tokenizer, inputs, spans, message):
    with pytest.raises(ak.InputError, match=message), ak.steer(llama, tokenizer, inputs, spans):
        pass


# --- threads ---


def test_streamers_get_the_steered_answer_from_another_thread(llama, tokenizer):
    streamer = hf.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    with ak.steer(llama, tokenizer, TEXT, {"w13": 0.0}) as steered:
        thread = threading.Thread(target=steered.generate, kwargs={"streamer": streamer, **GREEDY})
        thread.start()
        streamed = "".join(streamer)
        thread.join()
        assert [streamed] == steered.generate(**GREEDY)
    assert ids_of([streamed]) == [without_key(llama, IDS, 8)]


def test_a_thread_that_calls_the_model_itself_is_told_that_it_is_not_steered(llama, tokenizer):
    answers = []
    lost = pytest.warns(RuntimeWarning, match="copy_context")
    with ak.steer(llama, tokenizer, TEXT, {"w13": 0.0}) as steered, lost:
        thread = threading.Thread(target=lambda: answers.append(llama.generate(**steered.inputs, **GREEDY)))
        thread.start()
        thread.join()
    assert torch.equal(answers[0], llama.generate(**steered.inputs, **GREEDY))


def test_a_reader_of_a_streamer_does_not_wait_for_a_generation_that_failed(llama, tokenizer):
    streamer, raised = hf.TextIteratorStreamer(tokenizer, timeout=20), []

    def body():
        try:
            steered.generate(streamer=streamer, no_such_option=1)
        except ValueError as error:
            raised.append(error)

    with ak.steer(llama, tokenizer, TEXT, {"w13": 0.0}) as steered:
        thread = threading.Thread(target=body)
        thread.start()
        assert "".join(streamer) == ""
        thread.join()
    assert "no_such_option" in str(raised[0])
    with pytest.raises(ak.InputError, match="has ended"):
        steered.generate(streamer=streamer)
    assert "".join(streamer) == ""


class WaitsAtTheThirdToken(hf.generation.streamers.BaseStreamer):
    """Holds its generation until the steering is being left."""

    def __init__(self) -> None:
        self.reached, self.steered, self._puts = threading.Event(), None, 0

    def put(self, value) -> None:
        self._puts += 1  # the first is the prompt
        if self._puts == 4:
            self.reached.set()
            for _ in range(30_000):
                if self.steered._scope is None:
                    return
                time.sleep(1e-3)

    def end(self) -> None:
        pass


def test_leaving_ends_a_generation_in_another_thread(llama, tokenizer):
    """Not one token of it is unsteered, and the model is as before when the context has ended."""
    streamer, answers = WaitsAtTheThirdToken(), []

    def body():
        answers.extend(steered.generate(streamer=streamer, **GREEDY))

    with ak.steer(llama, tokenizer, TEXT, {"w13": 0.0}) as steered:
        streamer.steered = steered
        thread = threading.Thread(target=body)
        thread.start()
        assert streamer.reached.wait(60)
    assert llama.config._attn_implementation == "sdpa"
    thread.join()
    (answer,) = ids_of(answers)
    assert answer == without_key(llama, IDS, 8)[: len(answer)]
    assert 3 <= len(answer) < 6


def test_nothing_is_generated_once_the_steering_has_ended(llama, tokenizer):
    with pytest.raises(KeyError), ak.steer(llama, tokenizer, TEXT, {"w13": 0.0}) as steered:
        raise KeyError("in the middle")
    with pytest.raises(ak.InputError, match="the steering has ended"):
        steered.generate()
    assert llama.config._attn_implementation == "sdpa"
