"""Patches suppressed in the vision encoder, too: against eager attention of encoder and decoder, changed by the test.

Which patches a unit has is told here by its box, in pixels of pictures that processors leave as they are.
"""

import re
from dataclasses import replace
from types import SimpleNamespace

import eager_oracle
import pytest
import tiny_image_models as tiny
import torch
from attention_cases import every_mode_for
from image_text_cases import ANSWER, TEXTS, explainer_of, made_by_hand, rows_of
from transformers import LlamaConfig, LlamaForCausalLM

import atman_kernels as ak
from atman_kernels.hf.images import embedding as hf_images
from atman_kernels.hf.images.layouts import ImageTokens
from atman_kernels.inputs import image_text as image_question

SIZES = {
    "llava": (24, 24), "paligemma": (24, 24), "gemma3": (24, 24), "idefics3": (48, 48), "smolvlm": (48, 48),
    "qwen2_vl": (40, 24), "qwen2_5_vl": (40, 24), "qwen3_vl": (40, 24), "qwen3_vl_moe": (40, 24), "qwen3_5": (40, 24),
    "qwen3_5_moe": (40, 24), "glm4v": (40, 24), "glm4v_moe": (40, 24), "glm46v": (40, 24),
    "vipllava": (24, 24), "internvl": (48, 48), "aya_vision": (48, 48), "cohere2_vision": (48, 48),
    "pixtral": (42, 30), "mistral3": (48, 24),
}  # fmt: skip
MERGED = tuple(family for family in SIZES if family.startswith(("qwen", "glm")))
IN_CROPS = ("idefics3", "smolvlm", "internvl", "aya_vision", "cohere2_vision")
CLASS_TOKEN = ("llava", "vipllava", "internvl")


def square_factors(unit, image_count, factor, class_token):
    """[(images, keys)]: 4 × 4 patches of 6 pixels each; crops of a picture of 48 × 48 are images, then the whole."""
    found = torch.ones(image_count, 16)
    left, top, right, bottom = unit.box
    crop = re.match(r"crop (\d)·(\d)", unit.text)
    number, scale = unit.image, 1
    if crop:
        row, column = int(crop[1]) - 1, int(crop[2]) - 1
        number, left, right = 2 * row + column, left - 24 * column, right - 24 * column
        top, bottom = top - 24 * row, bottom - 24 * row
    elif unit.text.startswith("whole"):
        number, scale = 4, 2
    for y in range(4):
        for x in range(4):
            centre_x, centre_y = (6 * x + 3) * scale, (6 * y + 3) * scale
            if left <= centre_x < right and top <= centre_y < bottom:
                found[number, 4 * y + x] = factor
    return [torch.cat([torch.ones(image_count, 1), found], dim=1) if class_token else found]


def merged_factors(unit, sizes, factor):
    """[(1, patches of an image)]: patches of 4 pixels come 2 × 2 at a time, one image per call."""
    found = []
    for number, (width, height) in enumerate(sizes):
        own = []
        for top in range(0, height, 8):
            for left in range(0, width, 8):
                for y, x in ((0, 0), (0, 4), (4, 0), (4, 4)):
                    inside = unit.box[0] <= left + x < unit.box[2] and unit.box[1] <= top + y < unit.box[3]
                    own.append(factor if inside and unit.image == number else 1.0)
        found.append(torch.tensor([own]))
    return found


def row_factors(unit, sizes, factor):
    """[(1, patches of all images)]: patches of 6 pixels, row by row, in one call."""
    own = []
    for number, (width, height) in enumerate(sizes):
        for y in range(0, height, 6):
            for x in range(0, width, 6):
                inside = unit.box[0] <= x < unit.box[2] and unit.box[1] <= y < unit.box[3]
                own.append(factor if inside and unit.image == number else 1.0)
    return [torch.tensor([own])]


def windowed_factors(unit, sizes, factor):
    """Of Qwen2.5-VL: windows of 16 × 16 pixels come one after the other.

    Its first layer attends within windows, one call for each, and the second within images.
    """
    found = []
    for number, (width, height) in enumerate(sizes):
        for window_top in range(0, height, 16):
            for window_left in range(0, width, 16):
                own = []
                for top in range(window_top, min(window_top + 16, height), 8):
                    for left in range(window_left, min(window_left + 16, width), 8):
                        for y, x in ((0, 0), (0, 4), (4, 0), (4, 4)):
                            inside = unit.box[0] <= left + x < unit.box[2] and unit.box[1] <= top + y < unit.box[3]
                            own.append(factor if inside and unit.image == number else 1.0)
                found.append((number, torch.tensor([own])))
    images = [torch.cat([own for n, own in found if n == number], dim=1) for number in range(len(sizes))]
    return {"blocks.0.attn": [own for _, own in found], "blocks.1.attn": images}


def vision_factors(family, unit, images, factor):
    if unit is None or unit.source != "image":
        unit = SimpleNamespace(box=(0, 0, 0, 0), text="", image=0)
    if family == "qwen2_5_vl":
        return windowed_factors(unit, [image.size for image in images], factor)
    if family in MERGED:
        return merged_factors(unit, [image.size for image in images], factor)
    if family in ("pixtral", "mistral3"):
        return row_factors(unit, [image.size for image in images], factor)
    count = 5 if family in IN_CROPS else len(images)
    return square_factors(unit, count, factor, class_token=family in CLASS_TOKEN)


def check(family, explainer, explanation, images, text):
    answer = torch.tensor([int(word[1:]) for word in ANSWER.split()])
    inputs, n = made_by_hand(family, tiny.processor(family), images, text, answer)
    length, mode = inputs["input_ids"].shape[1], explanation.settings["mode"]

    def run(row, unit):
        vision = vision_factors(family, unit, images, 0.1)
        return eager_oracle.seen_logprobs(explainer.model, inputs, answer, n, row[:length], vision, mode)

    base = run(torch.ones(length), None)
    rows = rows_of(explanation, 0.1)
    expected = torch.stack([base - run(row, unit) for row, unit in zip(rows, explanation.units, strict=True)])
    of_images = [unit.source == "image" for unit in explanation.units]
    assert expected[of_images].abs().max() > 1e-2, "the oracle must move, or the comparison says nothing"
    torch.testing.assert_close(explanation.scores.double(), expected, atol=1e-4, rtol=0)
    return expected


def loud(family):
    """A model whose vision encoder's attention matters: its queries and keys are large."""
    model = tiny.build(family)
    decoder = {id(parameter) for parameter in model.get_decoder().parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if id(parameter) not in decoder and re.search(r"(q_proj|k_proj|qkv|v_proj|out_proj)\.weight$", name):
                parameter.mul_(3)
    return model


@pytest.mark.parametrize(("family", "mode"), every_mode_for(SIZES, "llava", "qwen2_5_vl"))
def test_scores_are_those_of_eager_attention_in_both_parts(family, mode):
    explainer, images = explainer_of(family, loud(family), mode=mode, vision=True), [tiny.picture(*SIZES[family])]
    explanation = explainer.explain(TEXTS[family], ANSWER, images=images)
    expected = check(family, explainer, explanation, images, TEXTS[family])
    assert (explanation.settings["vision"], explanation.settings["path"]) == (True, "batched")
    alone = explainer_of(family, explainer.model, mode=mode).explain(TEXTS[family], ANSWER, images=images)
    of_images = torch.tensor([unit.source == "image" for unit in explanation.units])
    moved = (alone.scores.double() - expected).abs().amax(dim=1)
    assert moved[of_images].max() > 1e-3, "suppression in the vision encoder makes a difference"
    assert moved[~of_images].max() < 1e-4, "none to words"


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("llava", "w5 <image> w6 <image> w7"),
        ("qwen2_vl", "w5 <start><image><end> w6 <start><image><end> w7"),
        ("qwen2_5_vl", "w5 <start><image><end> w6 <start><image><end> w7"),
        ("pixtral", "w5 <image> w6 <image> w7"),
        ("mistral3", "w5 <image> w6 <image> w7"),
    ],
)
def test_several_images_and_few_tokens_per_forward(family, text):
    explainer = explainer_of(family, loud(family), vision=True, token_budget=90)
    second = (16, 32) if family in MERGED else (24, 24)
    images = [tiny.picture(*SIZES[family], 1), tiny.picture(*second, 2)]
    explanation = explainer.explain(text, ANSWER, images=images)
    assert {unit.image for unit in explanation.units if unit.source == "image"} == {0, 1}
    check(family, explainer, explanation, images, text)


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_vl"])
def test_tiles_and_the_model_s_own_answer(family):
    explainer, images = explainer_of(family, loud(family), vision=True), [tiny.picture(*SIZES[family])]
    explanation = explainer.explain(TEXTS[family], ANSWER, None, images=images, image_units=2)
    check(family, explainer, explanation, images, TEXTS[family])
    answered = explainer.explain(TEXTS[family], images=images, max_new_tokens=2)
    plain = explainer_of(family, explainer.model).explain(TEXTS[family], images=images, max_new_tokens=2)
    assert answered.target == plain.target


def test_neighbours_are_suppressed_in_both_parts_and_all_is_left_as_it_was():
    model, images = loud("llava"), [tiny.picture(24, 24)]
    before = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    explainer = explainer_of("llava", model, vision=True, similarity_threshold=0.5)
    explanation = explainer.explain(TEXTS["llava"], ANSWER, images=images)
    answer = torch.tensor([int(word[1:]) for word in ANSWER.split()])
    inputs, n = made_by_hand("llava", tiny.processor("llava"), images, TEXTS["llava"], answer)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        merged = model.get_input_embeddings()(inputs["input_ids"][0]).double()
        merged[2:18] = torch.cat(list(model.get_image_features(inputs["pixel_values"]).pooler_output)).double()
    neighbours = 0
    for unit, scores in zip(explanation.units, explanation.scores.double(), strict=True):
        cosine = torch.cosine_similarity(merged[list(unit.token_indices)].mean(0), merged, dim=-1)
        row = torch.where(cosine >= 0.5, 1 - 0.9 * cosine, 1.0).float()
        row[list(unit.token_indices)] = 0.1
        neighbours += int((row[2:18] != 1).sum() > 1)
        one = torch.ones(1, 17)
        suppressed = torch.cat([torch.ones(1, 1), row[None, 2:18]], dim=1)  # the class token, then the patches
        base = eager_oracle.seen_logprobs(model, inputs, answer, n, torch.ones(length), [one], "log_additive")
        found = eager_oracle.seen_logprobs(model, inputs, answer, n, row, [suppressed], "log_additive")
        torch.testing.assert_close(scores, base - found, atol=1e-4, rtol=0)
    assert neighbours > 3
    assert before == [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]


def test_text_alone_is_explained_as_without():
    text = explainer_of("llava", vision=True).explain("w5 w6 w7", ANSWER)
    assert text.settings["path"] == "packed"
    torch.testing.assert_close(text.scores, explainer_of("llava").explain("w5 w6 w7", ANSWER).scores)


def test_subsets_of_units_are_suppressed_in_both_parts():
    """Shapley values of two units, from all four sets of them."""
    explainer, images = explainer_of("llava", loud("llava"), vision=True), [tiny.picture(24, 24)]
    text = "<image> w7"
    exact = explainer.explain(text, "w20", "sentence", images=images, image_units="image", method="shapley")
    image, words = (u.source == "image" for u in exact.units)
    assert (image, words) == (True, False)
    answer = torch.tensor([20])
    inputs, n = made_by_hand("llava", tiny.processor("llava"), images, text, answer)

    def value(image_factor, word_factor):
        row = torch.cat([torch.full((16,), image_factor), torch.tensor([word_factor])])
        vision = torch.cat([torch.ones(1), torch.full((16,), image_factor)])[None]
        return eager_oracle.seen_logprobs(explainer.model, inputs, answer, n, row, [vision], "log_additive")

    whole, no_image, no_words, none = value(1.0, 1.0), value(0.1, 1.0), value(1.0, 0.1), value(0.1, 0.1)
    expected = ((whole - no_image) + (no_words - none)) / 2
    torch.testing.assert_close(exact.scores[0].double(), expected, atol=1e-4, rtol=0)


# --- never silently wrong ---


def test_queries_that_no_patches_belong_to_are_refused():
    reason = "Blip2ForConditionalGeneration cannot be suppressed in its vision encoder: its image tokens are queries"
    with pytest.raises(ak.UnsupportedModelError, match=reason):
        explainer_of("blip2", vision=True)


def test_a_patch_count_that_tokens_do_not_divide_is_refused():
    model = tiny.build("gemma3")
    block = ImageTokens(0, 9, (3, 3), 3, (24, 24))
    with pytest.raises(ak.UnsupportedModelError, match="4 × 4 patches are no whole multiple of its 3 × 3 image tokens"):
        hf_images._owners(model, block)


def test_an_encoder_that_attends_to_something_else_is_refused(monkeypatch):
    model, images = tiny.build("llava"), [tiny.picture(24, 24)]
    real = hf_images._owners
    monkeypatch.setattr(hf_images, "_owners", lambda model, block: real(model, block)[:-2])
    with pytest.raises(ak.UnsupportedModelError, match="CLIPAttention attends to 1 × 17 keys, where 1 × 14 patches"):
        explainer_of("llava", model, vision=True).explain(TEXTS["llava"], ANSWER, images=images)
    assert model.model.vision_tower.config._attn_implementation != "atman"


def test_patches_that_no_module_attended_to_are_noticed(monkeypatch):
    real = image_question.with_pixels

    def with_more(*args):
        found = real(*args)
        return replace(found, owners=torch.cat([found.owners, found.owners[:, :4]], dim=1))

    monkeypatch.setattr(image_question, "with_pixels", with_more)
    with pytest.raises(ak.UnsupportedModelError, match="its vision encoder, which did not attend to all patches"):
        explainer_of("qwen2_vl", vision=True).explain(TEXTS["qwen2_vl"], ANSWER, images=[tiny.picture(40, 24)])


def test_bad_arguments():
    model = LlamaForCausalLM(LlamaConfig(**tiny.TEXT))
    with pytest.raises(ak.InputError, match="images beside text; LlamaForCausalLM has no vision encoder"):
        ak.Explainer(model, tiny.tokenizer(), vision=True)
    with pytest.raises(ak.InputError, match="vision must be True or False, got 'yes'"):
        explainer_of("llava", vision="yes")
