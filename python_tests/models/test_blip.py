"""BLIP against its own code, whose scores a test changes between the product of queries and keys and the softmax.

BLIP-2 over an encoder-decoder goes through transformers' interface: against eager attention with its scores changed.
"""

import pytest
import tiny_image_models as tiny
import torch
import transformers as hf
from blip_oracle import (
    ANSWER,
    CLASSES,
    PICTURE,
    PROMPTS,
    STATES,
    TARGET,
    TEXT,
    VISION,
    build,
    changed,
    factors_by_place,
    logprobs,
    pixels_of,
    processor,
)
from whole_row_oracle import enlarge, suppressed

import atman_kernels as ak


def explainer(model, **options):
    return ak.Explainer(model, processor(), progress=False, **{"factor": 0.1} | options)


def expected_scores(model, kind, prompt, rows, mode, vision, layers=None):
    def run(row):
        with changed(model, factors_by_place(kind, row, vision, layers), mode):
            return logprobs(model, kind, prompt, pixels_of(PICTURE))

    base = logprobs(model, kind, prompt, pixels_of(PICTURE))
    return torch.stack([base - run(row) for row in rows])


def rows_of(kind, prompt, units, factor=0.1):
    rows = torch.ones(len(units), STATES + len(prompt.split()) + (kind == "caption"))
    for row, unit in zip(rows, units, strict=True):
        row[list(unit.token_indices)] = factor
    return rows


def check(model, kind, explanation, prompt, vision, layers=None, rows=None):
    rows = rows_of(kind, prompt, explanation.units) if rows is None else rows
    mode = explanation.settings["mode"]
    expected = expected_scores(model, kind, prompt, rows, mode, vision, layers)
    assert expected.abs().max() > 1e-2, "suppression makes no difference"
    torch.testing.assert_close(explanation.scores.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("vision", [False, True])
@pytest.mark.parametrize("mode", ["log_additive", "multiplicative", "shifted"])
@pytest.mark.parametrize("kind", CLASSES)
def test_scores_are_those_of_the_models_own_attention(kind, mode, vision):
    model, prompt = build(kind), PROMPTS[kind]
    explanation = explainer(model, mode=mode, vision=vision).explain(prompt, ANSWER, images=PICTURE)
    assert [unit.source for unit in explanation.units] == ["image"] * 16 + ["prompt"] * 3
    assert [explanation.prompt[unit.start : unit.end] for unit in explanation.units[-3:]] == ["w5", "w6", "w7"]
    check(model, kind, explanation, prompt, vision)
    other = explainer(model, mode=mode, vision=not vision).explain(prompt, ANSWER, images=PICTURE)
    moved = (other.scores - explanation.scores).abs().amax(dim=1)
    assert moved[:16].max() > 1e-3
    assert moved[16:].max() < 1e-4
    torch.testing.assert_close(
        explanation.base_logprobs.double(), logprobs(model, kind, prompt, pixels_of(PICTURE)), atol=1e-4, rtol=0
    )


def test_a_caption_without_a_beginning():
    model = build("caption")
    explanation = explainer(model).explain(target=ANSWER, images=PICTURE, image_units=2)
    assert len(explanation.units) == 4
    assert explanation.units[1].box == (12, 0, 24, 12)
    check(model, "caption", explanation, "", vision=False)


@pytest.mark.parametrize("kind", CLASSES)
def test_layers_are_those_of_the_text_counted_in_each_stack(kind):
    model, prompt = build(kind), PROMPTS[kind]
    explanation = explainer(model, layers=[1], vision=True).explain(prompt, ANSWER, images=PICTURE)
    check(model, kind, explanation, prompt, vision=True, layers=[1])
    with pytest.raises(ak.InputError, match=r"layers must be indices in \[0, 2\)"):
        explainer(model, layers=[2])


@pytest.mark.parametrize("kind", CLASSES)
def test_neighbours_of_patches_are_patches_and_of_words_words(kind):
    model, prompt = build(kind), "w5 w6 w5"
    explanation = explainer(model, similarity_threshold=0.3).explain(prompt, ANSWER, images=PICTURE)
    with torch.no_grad():
        seen = model.vision_model(pixel_values=pixels_of(PICTURE)).last_hidden_state[0].double()
        words = model.get_input_embeddings()(torch.tensor(([1] if kind == "caption" else []) + [5, 6, 5])).double()
    rows = rows_of(kind, prompt, explanation.units)
    neighbours = 0
    for row, unit in zip(rows, explanation.units, strict=True):
        own = list(unit.token_indices)
        states, first = (seen, 0) if unit.source == "image" else (words, STATES)
        cosine = torch.cosine_similarity(states[[i - first for i in own]].mean(0), states, dim=-1).float()
        part = row[first : first + len(states)]
        part[cosine >= 0.3] = 1 - 0.9 * cosine[cosine >= 0.3]
        row[own] = 0.1
        neighbours += int((row != 1).sum() > len(own))
    assert neighbours > 3
    check(model, kind, explanation, prompt, vision=False, rows=rows)


@pytest.mark.parametrize("kind", CLASSES)
def test_the_model_answers_itself(kind):
    model = build(kind)
    found = explainer(model).explain(PROMPTS[kind], images=PICTURE, max_new_tokens=4)
    ids, mask = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.long)
    if kind == "caption":  # its generate writes the first token over the first of these, and leaves out the last
        ids, mask = torch.tensor([[9, 5, 6, 7, 2]]), torch.ones(1, 5, dtype=torch.long)
    output = model.generate(
        pixel_values=pixels_of(PICTURE), input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False
    )[0].tolist()
    expected = output[4 if kind == "caption" else 1 :]
    while expected[-1] in (0, 2):
        expected.pop()
    assert found.target.split() == tiny.tokenizer().decode(expected, skip_special_tokens=False).split()
    assert found.scores.shape == (19, len(expected))


@pytest.mark.parametrize("kind", CLASSES)
def test_pixel_values_few_tokens_per_forward_and_all_left_as_it_was(kind):
    model, prompt = build(kind), PROMPTS[kind]
    before = [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]
    whole = explainer(model, vision=True).explain(prompt, ANSWER, images=PICTURE)
    few = explainer(model, vision=True, token_budget=1).explain(prompt, ANSWER, images=pixels_of(PICTURE))
    assert few.stats["variants"] == few.stats["forwards"], "each variant alone"
    torch.testing.assert_close(few.scores, whole.scores, atol=1e-4, rtol=0)
    assert before == [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_picture_of_it():
    explanation = explainer(build("question")).explain("w5 w6", ANSWER, images=tiny.picture(48, 36), image_units=2)
    assert explanation.settings["images"] == [{"width": 48, "height": 36}]
    assert explanation.overlay(tiny.picture(48, 36)).size[0] >= 48


def test_likeness_of_an_image_to_texts():
    """`BlipModel` compares as CLIP does; its vision encoder is the part that is suppressed."""
    model = enlarge(hf.BlipModel(hf.BlipConfig(text_config=TEXT, vision_config=VISION)))
    explanation = explainer(model).explain(target="w20", labels=["w20", "w21"], images=PICTURE)
    texts = {"input_ids": torch.tensor([[20], [21]]), "attention_mask": torch.ones(2, 1, dtype=torch.long)}

    def value(row):
        def of(name):
            return row if name.startswith("vision_model") else None

        with changed(model, of, "log_additive"), torch.no_grad():
            logits = model(pixel_values=pixels_of(PICTURE), **texts).logits_per_image
        return logits.double().log_softmax(-1)[0, :1]

    base = value(torch.ones(STATES))
    expected = torch.stack([base - value(row[:STATES]) for row in rows_of("question", "", explanation.units)])
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(explanation.scores.double(), expected, atol=1e-4, rtol=0)


# --- BLIP-2 over T5: queries and words in one sequence, read by an encoder ---


def blip2():
    t5 = hf.T5Config(
        vocab_size=100, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    qformer = {key: TEXT[key] for key in ("vocab_size", "num_hidden_layers", "num_attention_heads")}
    config = hf.Blip2Config(
        vision_config=tiny.VISION, text_config=t5, num_query_tokens=5, image_token_index=tiny.IMAGE,
        qformer_config=qformer | {"hidden_size": 16, "intermediate_size": 24, "encoder_hidden_size": 16},
    )  # fmt: skip
    torch.manual_seed(0)
    return enlarge(hf.Blip2ForConditionalGeneration(config))


def blip2_explainer(model, **options):
    return ak.Explainer(model, tiny.processor("blip2"), progress=False, **{"factor": 0.1} | options)


def blip2_inputs():
    inputs = dict(tiny.processor("blip2")(images=PICTURE, text="w5 w6 w7", return_tensors="pt"))
    return {name: inputs[name] for name in ("input_ids", "pixel_values")}


@pytest.mark.parametrize("threshold", [None, 0.4])
@pytest.mark.parametrize("mode", ["log_additive", "multiplicative", "shifted"])
def test_queries_and_words_of_an_encoder_decoder(mode, threshold):
    model = blip2()
    explainer = blip2_explainer(model, mode=mode, similarity_threshold=threshold)
    explanation = explainer.explain("w5 w6 w7", ANSWER, images=PICTURE)
    assert [unit.source for unit in explanation.units] == ["image"] * 5 + ["prompt"] * 3
    inputs = blip2_inputs()
    length = inputs["input_ids"].shape[1]
    written = torch.cat([torch.tensor([0]), TARGET[:-1]])[None]

    def value(row):
        def is_source(name):
            within = name.startswith("language_model.encoder.")
            return name.startswith("language_model.") and (within or "EncDecAttention" in name)

        with suppressed(model, row, mode, is_source):
            logits = model(**inputs, decoder_input_ids=written).logits[0].double()
        return logits.log_softmax(-1).gather(1, TARGET[:, None])[:, 0]

    with torch.no_grad():
        merged = model.get_input_embeddings()(inputs["input_ids"])[0]
        merged[inputs["input_ids"][0] == tiny.IMAGE] = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    rows = torch.ones(8, length)
    for row, unit in zip(rows, explanation.units, strict=True):
        own = list(unit.token_indices)
        cosine = torch.cosine_similarity(merged[own].mean(0), merged, dim=-1)
        if threshold is not None:
            row[cosine >= threshold] = 1 - 0.9 * cosine[cosine >= threshold]
        row[own] = 0.1
    assert bool(((rows != 1).sum(1) > 1).any()) == (threshold is not None)
    base = value(torch.ones(length))
    expected = torch.stack([base - value(row) for row in rows])
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(explanation.scores.double(), expected, atol=1e-4, rtol=0)


def test_its_own_answer_is_the_whole_model_s():
    model = blip2()
    found = blip2_explainer(model).explain("w5 w6 w7", images=PICTURE, image_units="image", max_new_tokens=3)
    assert found.units[0].text == "image 1"
    expected = model.generate(**blip2_inputs(), max_new_tokens=3, do_sample=False)[0].tolist()
    words = tiny.tokenizer().decode(expected, skip_special_tokens=False).split()
    assert found.target.split() == [word for word in words if word not in ("<pad>", "</s>")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": None}, "images is missing; Blip2ForConditionalGeneration takes images"),
        ({"prompt": None}, "prompt must be a text or a list of chat messages, got None"),
        ({"image_units": 2}, "tiles of 2 need patches, and this model has queries"),
        ({"units": None, "image_units": None}, "are both None"),
        ({"target": ""}, "target is empty"),
    ],
)
def test_bad_questions_to_it(arguments, message):
    with pytest.raises(ak.InputError, match=message):
        blip2_explainer(blip2()).explain(**{"prompt": "w5", "target": ANSWER, "images": PICTURE} | arguments)


def test_its_vision_encoder_is_not_suppressed():
    with pytest.raises(ak.UnsupportedModelError, match="its image tokens are queries, which no patches belong to"):
        blip2_explainer(blip2(), vision=True)


# --- never silently wrong ---


def test_suppress_and_other_heads_are_refused():
    for kind in CLASSES:
        model = build(kind)
        message = f"{type(model).__name__} cannot be suppressed by factors of its tokens: it attends to an image"
        with pytest.raises(ak.UnsupportedModelError, match=message), ak.suppress(model, torch.ones(1, 3)):
            pass
        with (
            pytest.raises(ak.UnsupportedModelError, match="BlipTextLMHeadModel cannot be suppressed by factors"),
            ak.suppress(model.text_decoder, torch.ones(1, 3)),
        ):
            pass
    other = hf.BlipForImageTextRetrieval(hf.BlipConfig(text_config=TEXT, vision_config=VISION)).eval()
    with pytest.raises(ak.UnsupportedModelError, match="BlipForImageTextRetrieval cannot be suppressed by factors"):
        explainer(other)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("question", {"prompt": None}, "prompt is missing; BlipForQuestionAnswering answers questions about images"),
        ("question", {"images": None}, "images is missing; BlipForQuestionAnswering takes images"),
        ("caption", {"images": None}, "images is missing; BlipForConditionalGeneration takes images"),
        ("caption", {"images": [PICTURE, PICTURE]}, "images must be one picture"),
        ("caption", {"images": "cat.png"}, "images must be a PIL image or a tensor of pixel values, got str"),
        ("caption", {"images": torch.zeros(3, 30, 30)}, "inputs do not fit BlipForConditionalGeneration"),
        ("caption", {"prompt": ("w5", "w6")}, "prompt must be a text, got tuple"),
        ("caption", {"prompt": None, "image_units": None}, "units and image_units: there is no text"),
        ("question", {"units": None, "image_units": None}, "units and image_units: there is no text"),
        ("question", {"image_units": "tile"}, "image_units must be .*, got 'tile'"),
        ("question", {"units": "syllable"}, "units: got 'syllable'"),
        ("question", {"target": ""}, "target is empty"),
        ("question", {"target": 3}, "target must be a text, got int"),
        ("question", {"target": None, "max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, got 0"),
        ("question", {"prompt": " ".join(["w5"] * 13)}, "prompt has 13 tokens, but the model has 12 positions"),
        ("caption", {"prompt": " ".join(["w5"] * 10)}, "have 13 tokens, but the model has 12 positions"),
        ("caption", {"audio": [0.0]}, "audio was given, but BlipForConditionalGeneration takes images"),
        ("caption", {"labels": ["w5"]}, "labels are for models that compare images with texts"),
        ("caption", {"method": "shapley"}, "other methods are for language models"),
    ],
)  # fmt: skip
def test_bad_questions(kind, arguments, message):
    asked = {"prompt": PROMPTS[kind], "target": ANSWER, "images": PICTURE} | arguments
    with pytest.raises(ak.InputError, match=message):
        explainer(build(kind)).explain(**asked)
