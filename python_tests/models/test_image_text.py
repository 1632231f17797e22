"""Explanations of image-text models: packed suffixes over merged embeddings against whole forwards, tower included."""

import re
from contextlib import nullcontext

import eager_oracle
import pytest
import tiny_image_models as tiny
import torch
from attention_cases import every_mode_for
from image_text_cases import ANSWER, PICTURE, TEXTS, explainer_of, made_by_hand, rows_of
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

import atman_kernels as ak
from atman_kernels.explain import methods
from atman_kernels.hf.forward import base as base_runs
from atman_kernels.hf.forward import packed
from atman_kernels.hf.forward.base import Base, PackingUnsupportedError
from atman_kernels.hf.images import layouts as image_layouts
from atman_kernels.hf.images import places
from atman_kernels.run import packed as execution


def expected_scores(family, model, images, text, rows, mode, layers=None):
    answer = torch.tensor([int(word[1:]) for word in ANSWER.split()])
    inputs, n = made_by_hand(family, tiny.processor(family), images, text, answer)

    def run(row):
        return eager_oracle.whole_model_logprobs(model, inputs, answer, n, row, mode, layers)

    length = inputs["input_ids"].shape[1]
    base = run(torch.ones(length))
    return torch.stack([base - run(row[:length]) for row in rows])


@pytest.mark.parametrize(("family", "mode"), every_mode_for(tiny.MODELS, "llava", "qwen2_vl", "gemma3"))
def test_packed_equals_whole_forwards_of_the_whole_model(family, mode):
    explainer = explainer_of(family, mode=mode)
    images = [tiny.picture(40, 30)]
    with pytest.warns(UserWarning, match="by a convolution") if family in tiny.BATCHED else nullcontext():
        explanation = explainer.explain(images=images, text=TEXTS[family], target=ANSWER)
    assert explanation.settings["path"] == ("batched" if family in tiny.BATCHED else "packed")
    rows = rows_of(explanation, 0.1)
    expected = expected_scores(family, explainer.model, images, TEXTS[family], rows, mode)
    of_images = [unit.source == "image" for unit in explanation.units]
    assert expected[of_images].abs().max() > 1e-2, "the oracle must move, or the comparison says nothing"
    torch.testing.assert_close(explanation.scores.double(), expected, atol=1e-4, rtol=0)


# --- what else can be asked ---


def check(explainer, family, explanation, images, text, rows=None, layers=None):
    rows = rows_of(explanation, 0.1) if rows is None else rows
    mode = explanation.settings["mode"]
    expected = expected_scores(family, explainer.model, images, text, rows, mode, layers)
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(explanation.scores.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "idefics3", "mistral3", "llava_next", "internvl"])
def test_tiles_are_suppressed_as_one(family):
    explainer, images = explainer_of(family), [tiny.picture(40, 30)]
    explanation = explainer.explain(images=images, text=TEXTS[family], target=ANSWER, units="sentence", image_units=2)
    assert any(len(unit.token_indices) == 4 for unit in explanation.units if unit.source == "image")
    check(explainer, family, explanation, images, TEXTS[family])


@pytest.mark.parametrize("family", tiny.MODELS)
def test_removed_tiles_are_not_missed(family):
    """Their rows are not run where nothing reads them; DeepStack's features and M-RoPE's positions follow the rest."""
    explainer, images = explainer_of(family, factor=0.0), [tiny.picture(40, 30)]
    tiles = "patch" if family == "blip2" else 2  # queries lie nowhere in the image
    explanation = explainer.explain(
        images=images, text=TEXTS[family], target=ANSWER, units="sentence", image_units=tiles
    )
    check(explainer, family, explanation, images, TEXTS[family], rows_of(explanation, 0.0))


@pytest.mark.parametrize("family", ["llava", "idefics3", "blip2"])
def test_a_whole_image_is_one_unit(family):
    explainer, images = explainer_of(family), [tiny.picture(40, 30)]
    explanation = explainer.explain(images=images, text=TEXTS[family], target=ANSWER, units=None, image_units="image")
    (unit,) = explanation.units
    seen = {"blip2": None, "llava": (5, 0, 35, 30), "idefics3": (0, 0, 40, 30)}  # LLaVA's processor crops the middle
    assert (unit.text, unit.box) == ("image 1", seen[family])
    check(explainer, family, explanation, images, TEXTS[family])


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("llava", "w5 <image> w6 <image><image> w7"),
        ("qwen2_vl", "w5 <start><image><end> w6 <start><image><end><start><image><end> w7"),
        ("gemma3", "w5 <start> w6 <start> <start> w7"),
        ("idefics3", "w5 <image> w6 <image><image> w7"),
        ("pixtral", "w5 <image> w6 <image><image> w7"),
        ("mistral3", "w5 <image> w6 <image><image> w7"),
        ("llava_next", "w5 <image> w6 <image><image> w7"),
        ("llava_onevision", "w5 <image> w6 <image><image> w7"),
        ("internvl", "w5 <image> w6 <image><image> w7"),
        ("aya_vision", "w5 <image> w6 <image><image> w7"),
        ("cohere2_vision", "w5 <image> w6 <image><image> w7"),
        ("glm4v", "w5 <start><image><end> w6 <start><image><end><start><image><end> w7"),
    ],
)
def test_several_images(family, text):
    explainer = explainer_of(family)
    images = [tiny.picture(40, 30, 1), tiny.picture(24, 24, 2), tiny.picture(30, 50, 3)]
    explanation = explainer.explain(text, ANSWER, images=images)
    check(explainer, family, explanation, images, text)
    assert explanation.settings["images"] == [{"width": i.width, "height": i.height} for i in images]
    for number, image in enumerate(images):
        boxes = [unit.box for unit in explanation.units if unit.source == "image" and unit.image == number]
        assert max(box[2] for box in boxes) <= image.width
        assert max(box[3] for box in boxes) <= image.height
    assert any(unit.text.startswith("image 3, ") for unit in explanation.units)


def test_layers_and_small_packs():
    images, text = [tiny.picture(40, 30)], TEXTS["gemma3"]
    explainer = explainer_of("gemma3", layers=[1], token_budget=9)
    check(explainer, "gemma3", explainer.explain(images=images, text=text, target=ANSWER), images, text, layers=[1])


@pytest.mark.parametrize("family", ["llava", "gemma3", "paligemma"])
def test_neighbours_are_found_behind_the_projector(family):
    model = tiny.build(family)
    images, text, threshold = [tiny.picture(40, 30)], TEXTS[family], 0.5
    explainer = explainer_of(family, model, similarity_threshold=threshold)
    explanation = explainer.explain(images=images, text=text, target=ANSWER)
    inputs = tiny.processor(family)(images=images, text=text, return_tensors="pt")
    with torch.no_grad():
        ids = inputs["input_ids"][0]
        merged = model.get_input_embeddings()(torch.cat([ids, torch.tensor([20, 21])])).double()
        patches = torch.cat(list(model.get_image_features(inputs["pixel_values"]).pooler_output)).double()
    merged[: len(ids)][ids == tiny.IMAGE] = patches.reshape(-1, merged.shape[1])
    rows = torch.ones(len(explanation.units), len(merged))
    for row, unit in zip(rows, explanation.units, strict=True):
        cosine = torch.cosine_similarity(merged[list(unit.token_indices)].mean(0), merged, dim=-1)
        row[cosine >= threshold] = (1 - 0.9 * cosine[cosine >= threshold]).float()
        row[list(unit.token_indices)] = 0.1
    assert ((rows != 1).sum(1) > 1).sum() > 3, "some patches must have neighbours"
    check(explainer, family, explanation, images, text, rows=rows)


def count_tower_runs(model):
    """A list that grows with every run of the vision tower's first layer."""
    first = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Conv3d | torch.nn.Linear))
    assert first not in set(model.get_decoder().modules())
    runs = []
    first.register_forward_hook(lambda *args: runs.append(1))
    return runs


@pytest.mark.parametrize("family", tiny.MODELS)
def test_the_model_answers_itself_and_its_vision_tower_runs_once(family):
    model, images = tiny.build(family), [tiny.picture(40, 30)]
    runs = count_tower_runs(model)
    explanation = explainer_of(family, model).explain(images=images, text=TEXTS[family], max_new_tokens=3)
    assert len(runs) == 1
    inputs = dict(tiny.processor(family)(images=images, text=TEXTS[family], return_tensors="pt"))
    inputs = {key: value for key, value in inputs.items() if key not in ("labels", "num_crops")}
    expected = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert explanation.target.split() == tiny.tokenizer().decode(expected, skip_special_tokens=False).split()
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_576_patches_cost_half_of_full_recomputation_and_one_run_of_the_tower():
    side = 24 * tiny.PATCH
    model, text = tiny.build("llava", side=side), "w5 w6 <image> w7 w8 w9 w10 w11 w12"
    runs = count_tower_runs(model)
    explainer = ak.Explainer(model, tiny.processor("llava", side=side), progress=False)
    explanation = explainer.explain(images=tiny.picture(200, 150), text=text, target="w20 w21", units=None)
    assert len(explanation.units) == 576
    assert explanation.settings["path"] == "packed"
    assert explanation.stats["tokens_through_model"] <= 0.55 * 576 * (576 + 8 + 1)
    assert len(runs) == 1


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl", "gemma3", "idefics3"])
def test_text_alone_is_explained_before_and_after_images(family):
    explainer = explainer_of(family)
    before = explainer.explain("w5 w6 w7 w8", ANSWER)
    assert before.settings["path"] == "packed"
    explainer.explain(images=tiny.picture(40, 30), text=TEXTS[family], target=ANSWER)
    after = explainer.explain("w5 w6 w7 w8", ANSWER)
    assert torch.equal(before.scores, after.scores)


def test_methods_that_read_token_ids_are_refused(monkeypatch):
    explainer, asked = explainer_of("llava"), {"images": PICTURE, "text": "w5 <image>", "target": ANSWER}
    assert explainer.explain(**asked, method="random").scores.shape == (17, 3)
    monkeypatch.setattr(methods, "WITH_IMAGES", ("atman",))
    with pytest.raises(ak.InputError, match="method with images must be one of atman, got 'random'"):
        explainer.explain(**asked, method="random")


def test_prompts_with_and_without_images_in_one_batch():
    explainer, text = explainer_of("llava"), TEXTS["llava"]
    one, two = tiny.picture(40, 30, 1), tiny.picture(24, 24, 2)
    several = explainer.explain_batch(
        ["w5 w6 w7", text, "w8 w9", "<image> w5 <image>"],
        [ANSWER, None, "w20", ANSWER],
        ["token", None, "word", "token"],
        images=[None, one, None, [one, two]],
        image_units=2,
        max_new_tokens=2,
        versus=["w30", None, None, None],
    )
    alone = [
        explainer.explain("w5 w6 w7", ANSWER, versus="w30"),
        explainer.explain(text, None, None, images=one, image_units=2, max_new_tokens=2),
        explainer.explain("w8 w9", "w20", "word"),
        explainer.explain("<image> w5 <image>", ANSWER, images=[one, two], image_units=2),
    ]
    for found, expected in zip(several, alone, strict=True):
        assert (found.prompt, found.target, found.units) == (expected.prompt, expected.target, expected.units)
        torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=0)
    both = explainer.explain_batch([text, text], [ANSWER] * 2, None, images=[one, [two]], image_units="image")
    assert [[unit.text for unit in found.units] for found in both] == [["image 1"], ["image 1"]]
    made = explainer.explain_batch([llava_inputs(), "w5 w6"], [ANSWER, ANSWER])
    assert [unit.source for unit in made[0].units[:2]] == ["prompt", "image"]


@pytest.mark.parametrize(
    ("images", "more", "message"),
    [
        (PICTURE, {}, "images must be a list of one entry per prompt, got Image"),
        ([PICTURE], {}, "images has 1 entries for 2 prompts"),
        ([None, "cat.png"], {}, r"images\[0\] must be a PIL image, got str"),
        ([None, []], {}, "images is empty"),
        ([None, None], {}, "images is missing, but the text has the placeholder"),
        ([None, PICTURE], {"versus": [None, "w30"]}, "versus does not go with images"),
        ([None, PICTURE], {"units": [None, "token"]}, "units is None, which needs images"),
        ([None, PICTURE], {"units": None}, "units is None, which needs images"),
        ([None, PICTURE], {"method": "rollout"}, "method with images must be one of atman, .*, got 'rollout'"),
    ],
)
def test_bad_batches(images, more, message):
    with pytest.raises(ak.InputError, match=message):
        explainer_of("llava").explain_batch(["w5 w6", "w5 <image>"], [ANSWER] * 2, images=images, **more)


# --- where units lie ---


def without_mixing(model):
    """Patches of the vision tower do not see one another any more: a token is made of its own pixels alone."""
    found = 0
    decoder = {id(parameter) for parameter in model.get_decoder().parameters()}
    for name, parameter in model.named_parameters():
        is_output = re.search(r"(attn|attention)\.(out_proj|proj|projection_layer|o_proj)\.(weight|bias)$", name)
        if is_output and id(parameter) not in decoder:
            parameter.data.zero_()
            found += 1
    assert found
    return model


def read_by_decoder(model, processor, image, text):
    """(L, E) what the text decoder gets."""
    inputs = {k: v for k, v in processor(images=[image], text=text, return_tensors="pt").items() if k != "labels"}
    seen = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"][0]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return seen[0]


def padded_llava():
    processor = tiny.processor("llava")
    processor.image_processor = LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}
    )
    return processor


@pytest.mark.parametrize(
    ("family", "size"),
    [  # none of these is resized, so that a pixel of the picture is a pixel of the tower's input
        ("llava", (36, 24)), ("padded llava", (24, 16)), ("paligemma", (24, 24)), ("gemma3", (24, 24)),
        ("qwen2_vl", (40, 24)), ("qwen2_5_vl", (40, 24)), ("qwen3_vl", (40, 24)), ("idefics3", (48, 48)),
        ("smolvlm", (48, 48)), ("vipllava", (36, 24)), ("pixtral", (42, 30)), ("mistral3", (48, 24)),
        ("llava_next", (48, 40)), ("llava_next", (40, 24)), ("llava_onevision", (48, 24)),
        ("internvl", (48, 48)), ("internvl", (72, 24)), ("internvl", (24, 48)), ("aya_vision", (48, 24)),
        ("cohere2_vision", (72, 48)), ("qwen3_vl_moe", (40, 24)), ("qwen3_5", (40, 24)), ("glm4v", (40, 24)),
        ("glm4v_moe", (40, 24)),
    ],
)  # fmt: skip
def test_tokens_are_made_of_the_pixels_in_their_units_box(family, size):
    processor = padded_llava() if family == "padded llava" else tiny.processor(family)
    family = family.removeprefix("padded ")
    image, text, model = tiny.picture(*size), TEXTS[family], without_mixing(tiny.build(family))
    units = ak.Explainer(model, processor, progress=False).explain(text, ANSWER, images=image, units=None).units
    before = read_by_decoder(model, processor, image, text)
    in_small = {token for unit in units if unit.text.startswith("whole") for token in unit.token_indices}
    checked = 0
    for unit in units:
        if unit.text.startswith("whole"):  # crops come again in a smaller copy of the whole image
            continue
        changed = image.copy()
        changed.paste((255, 0, 0), unit.box)
        after = read_by_decoder(model, processor, changed, text)
        moved = (before - after).abs().amax(dim=1) > 1e-4
        assert set(moved.nonzero()[:, 0].tolist()) - in_small == set(unit.token_indices)
        checked += 1
    assert checked == len(units) - len(in_small) >= 4


def test_crops_of_an_image_lie_side_by_side_under_the_whole():
    explanation = explainer_of("smolvlm").explain(TEXTS["smolvlm"], ANSWER, images=tiny.picture(40, 30))
    units = [unit for unit in explanation.units if unit.source == "image"]
    assert [unit.text for unit in units[:2]] == ["crop 1·1, row 1, column 1", "crop 1·1, row 1, column 2"]
    covered = torch.zeros(30, 40)
    for unit in units:
        left, top, right, bottom = unit.box
        covered[top:bottom, left:right] += 1
    assert bool((covered == 2).all()), "each pixel once in a crop, once in the whole image"
    assert units[-1].text == "whole, row 2, column 2"


@pytest.mark.parametrize("family", ["internvl", "aya_vision", "cohere2_vision"])
def test_crops_of_a_canvas_cover_the_image_once(family):
    picture = tiny.picture(75, 24)
    explanation = explainer_of(family).explain(TEXTS[family], ANSWER, None, images=picture)
    assert [unit.text for unit in explanation.units[:2]] == ["crop 1·1, row 1, column 1", "crop 1·1, row 1, column 2"]
    assert explanation.units[-1].text == "whole, row 2, column 2"
    covered = torch.zeros(24, 75)
    for unit in explanation.units[:-4]:
        left, top, right, bottom = unit.box
        covered[top:bottom, left:right] += 1
    assert len(explanation.units) == 4 * (3 + 1)
    assert bool((covered == 1).all())
    inputs = tiny.processor(family)(images=[picture], text=TEXTS[family], return_tensors="pt")
    with pytest.raises(ak.InputError, match="hold crops of an image, and only its proportions tell"):
        explainer_of(family).explain(inputs, ANSWER)
    small = tiny.processor(family)(images=[tiny.picture(24, 24)], text=TEXTS[family], return_tensors="pt")
    assert len(explainer_of(family).explain(small, ANSWER, None).units) == 4, "without crops nothing is open"


def test_canvases_are_those_of_transformers():
    generator = torch.Generator().manual_seed(0)
    for width, height in torch.randint(20, 900, (500, 2), generator=generator).tolist():
        for most in (4, 6, 12):
            columns, rows = get_optimal_tiled_canvas((height, width), (100, 100), 1, most)
            if columns * rows > 1:
                last = places.canvas_cells(columns * rows + 1, (width, height), (100, 100))[-2:]
                assert last == [(rows, columns), None]


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_pictures_of_other_sizes_are_refused(family):
    explainer, text = explainer_of(family), TEXTS[family]
    inputs = dict(tiny.processor(family)(images=[tiny.picture(40, 30)], text=text, return_tensors="pt"))
    told = explainer.explain(inputs, ANSWER)
    shown = explainer.explain(text, ANSWER, images=tiny.picture(40, 30))
    assert told.units == shown.units, "the processor says how large the picture was"
    with pytest.raises(ak.InputError, match="must be those that the processor saw, of 40 × 30 pixels; got 30 × 40"):
        explainer.explain(inputs, ANSWER, images=tiny.picture(30, 40))
    with pytest.raises(ak.InputError, match="inputs hold no 'image_sizes', which Llava"):
        explainer.explain({key: value for key, value in inputs.items() if key != "image_sizes"}, ANSWER)


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_tokens_of_two_resolutions_are_as_many_as_the_processor_makes(family):
    model, processor = tiny.build(family), tiny.processor(family)
    generator = torch.Generator().manual_seed(0)
    class_token = family == "llava_next"
    for height, width in torch.randint(5, 200, (300, 2), generator=generator).tolist():
        inputs = {"image_sizes": torch.tensor([[height, width]])}
        ours = sum(size.tokens for size in image_layouts._two_resolutions(model, inputs))
        assert ours == processor._get_number_of_features(height, width, tiny.SIDE, tiny.SIDE) - class_token


def test_onevision_cuts_no_images_that_came_together():
    family, images = "llava_onevision", [tiny.picture(40, 30, 1), tiny.picture(24, 30, 2)]
    text = "w5 <image> w6 <image> w7"
    inputs = tiny.processor(family)(images=[images], text=text, return_tensors="pt")
    assert inputs["batch_num_images"].tolist() == [2]
    explainer = explainer_of(family)
    explanation = explainer.explain(inputs, ANSWER)
    assert [unit.source for unit in explanation.units].count("image") == 2 * 16
    check(explainer, family, explanation, [images], text)


def test_rows_end_where_the_processor_says():
    """Tokens that do not stand in the rows of the picture they are said to be of have no place in it."""
    explainer, text = explainer_of("pixtral"), TEXTS["pixtral"]
    inputs = dict(tiny.processor("pixtral")(images=[tiny.picture(42, 30)], text=text, return_tensors="pt"))
    turned = inputs | {"image_sizes": inputs["image_sizes"].flip(1)}
    with pytest.raises(ak.UnsupportedModelError, match="other tokens stand among those of an image"):
        explainer.explain(turned, ANSWER)
    tokens = [5, 6, *[tiny.IMAGE] * 35, 95, 7, 8, 9]
    unbroken = inputs | {"input_ids": torch.tensor([tokens]), "attention_mask": torch.ones(1, len(tokens))}
    with pytest.raises(ak.UnsupportedModelError, match="other tokens stand among those of an image"):
        explainer.explain(unbroken, ANSWER)


def test_text_units_leave_the_placeholder_out():
    explanation = explainer_of("llava").explain("w5 w6 <image> w7 w8", ANSWER, "sentence", images=tiny.picture(24, 24))
    text = [unit for unit in explanation.units if unit.source == "prompt"]
    assert [(unit.text, unit.token_indices) for unit in text] == [("w5 w6", (0, 1)), ("w7 w8", (18, 19))]
    assert explanation.prompt == "w5 w6 <image> w7 w8"
    of_image = next(unit for unit in explanation.units if unit.source == "image")
    assert explanation.prompt[of_image.start : of_image.end] == " <image>"


def test_spans_of_the_callers_text():
    explainer, text = explainer_of("paligemma"), "<image> w7 w8 w9"
    with pytest.raises(ak.InputError, match="spans of the text have no place in what the processor made of it"):
        explainer.explain(text, ANSWER, [(8, 10)], images=tiny.picture(24, 24))
    spans = explainer_of("llava").explain("w5 <image> w7 w8", ANSWER, [(11, 16)], images=tiny.picture(24, 24)).units
    assert [(u.text, u.token_indices) for u in spans if u.source == "prompt"] == [("w7 w8", (17, 18))]
    with pytest.raises(ak.InputError, match="holds an image only"):
        explainer_of("llava").explain("w5 <image> w7", ANSWER, [(3, 10)], images=tiny.picture(24, 24))


def test_a_processors_output_is_as_good_as_pictures_and_text():
    processor, image, text = tiny.processor("llava"), tiny.picture(24, 24), TEXTS["llava"]
    inputs = processor(images=image, text=text, return_tensors="pt")
    expected = explainer_of("llava").explain(text, ANSWER, images=image)
    for made_with in (tiny.tokenizer(), processor):
        explanation = ak.Explainer(tiny.build("llava"), made_with, factor=0.1, progress=False).explain(inputs, ANSWER)
        torch.testing.assert_close(explanation.scores, expected.scores, atol=1e-6, rtol=0)
        assert explanation.units == expected.units, "a picture of 24 × 24 has the tower's own pixels"
    larger = explainer_of("llava").explain(inputs, ANSWER, images=tiny.picture(48, 48))
    assert larger.units[-4].box == (36, 36, 48, 48)


def test_earlier_answer_tokens_and_chat_messages():
    processor, image = tiny.processor("llava"), tiny.picture(24, 24)
    processor.chat_template = (
        "{% for m in messages %}w60 {% for c in m['content'] %}"
        "{{ '<image>' if c['type'] == 'image' else c['text'] }} {% endfor %}{% endfor %}w61"
    )
    explainer = ak.Explainer(tiny.build("llava"), processor, factor=0.1, progress=False)
    explanation = explainer.explain("w5 w6", ANSWER, images=image, chat=True, include_target=True)
    assert explanation.prompt == "w60 <image> w5 w6 w61"
    assert [unit.source for unit in explanation.units[-2:]] == ["target", "target"]
    rows = rows_of(explanation, 0.1)
    check(explainer, "llava", explanation, [image], "w60 <image> w5 w6 w61", rows=rows)
    content = [{"type": "image"}, {"type": "text", "text": "w5 w6"}]
    messages = explainer.explain([{"role": "user", "content": content}], ANSWER, images=image)
    torch.testing.assert_close(messages.scores, explanation.scores[:-2], atol=1e-6, rtol=0)


# --- never silently wrong ---


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_blocks_taken_for_causal_are_found_by_the_probe(family, monkeypatch):
    """Without its pattern a packed suffix would not see the later part of its own block."""
    monkeypatch.setattr(base_runs, "_beyond_causal", lambda call: None)
    explainer, images = explainer_of(family), [tiny.picture(40, 30)]
    with pytest.warns(UserWarning, match="cannot be packed .*(differ by|both ways)"):
        explanation = explainer.explain(images=images, text=TEXTS[family], target=ANSWER)
    assert explanation.settings["path"] == "batched"
    check(explainer, family, explanation, images, TEXTS[family])


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl", "gemma3", "blip2"])
def test_full_rows_serve_where_packing_cannot(family, monkeypatch):
    def refuse(*args, **kwargs):
        raise PackingUnsupportedError("for this test")

    monkeypatch.setattr(execution, "packed_logprobs", refuse)
    explainer, images = explainer_of(family), [tiny.picture(40, 30)]
    with pytest.warns(UserWarning, match="for this test"):
        explanation = explainer.explain(images=images, text=TEXTS[family], target=ANSWER)
    check(explainer, family, explanation, images, TEXTS[family])


def test_position_ids_of_the_model_are_not_positions_in_the_sequence(monkeypatch):
    """With M-RoPE an image takes fewer position ids than tokens; counting rows instead must not go unnoticed."""
    real = packed.suffix_inputs
    monkeypatch.setattr(
        packed, "suffix_inputs", lambda sequence, rows: real(sequence, rows) | {"position_ids": rows[None]}
    )
    with pytest.warns(UserWarning, match="cannot be packed .*differ by"):
        explainer_of("qwen2_vl").explain(images=tiny.picture(40, 30), text=TEXTS["qwen2_vl"], target=ANSWER)


def test_suffixes_never_begin_inside_a_block():
    visible = torch.ones(7, 7).tril().bool()
    visible[2:5, 2:5] = True  # an image of three tokens
    pattern = torch.zeros(1, 7, 7).masked_fill(~visible, -torch.inf)
    base = Base({}, {}, (0,), {torch.nn.Identity(): pattern})
    assert base.suffix_starts().tolist() == [0, 1, 2, 2, 2, 5, 6, 7]
    blind = base.patterns | {torch.nn.Identity(): torch.full((1, 7, 7), -torch.inf)}
    assert Base({}, {}, (0,), blind).suffix_starts().tolist() == [0, 1, 2, 2, 2, 5, 6, 7]
    nothing = {torch.nn.Identity(): torch.full((1, 7, 7), -torch.inf)}
    assert Base({}, {}, (0,), nothing).suffix_starts().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert Base({}, {}, (0,)).suffix_starts() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    family, images = "gemma3", [tiny.picture(40, 30)]
    explainer = explainer_of(family, tiny.build(family).to(dtype))
    explanation = explainer.explain(images=images, text=TEXTS[family], target=ANSWER)
    assert explanation.settings["path"] == "packed"
    reference = explainer_of(family, tiny.build(family).to(dtype).double())
    expected = reference.explain(images=images, text=TEXTS[family], target=ANSWER).scores
    torch.testing.assert_close(explanation.scores, expected, atol=0.3 if dtype == torch.bfloat16 else 1e-6, rtol=0)


def test_decoders_that_read_more_than_embeddings_are_refused(monkeypatch):
    """Gemma 3n reads something of every token in every layer."""
    model = tiny.build("llava")
    decoder = model.get_decoder()
    own = model.model.forward

    def with_features(*args, **kwargs):
        return own(*args, **kwargs, per_layer_inputs=[torch.zeros(1)])

    monkeypatch.setattr(model.model, "forward", with_features)
    with pytest.raises(ak.UnsupportedModelError, match="its decoder reads per_layer_inputs beside the embeddings"):
        explainer_of("llava", model).explain(images=tiny.picture(24, 24), text="<image> w5", target=ANSWER)
    assert not decoder._forward_pre_hooks


def test_other_image_models_are_refused_by_name():
    model = tiny.build("llava")
    model.config.model_type = "llava_none"
    with pytest.raises(ak.UnsupportedModelError, match="where its image tokens lie in a picture is not known"):
        explainer_of("llava", model).explain(images=tiny.picture(24, 24), text="<image> w5", target=ANSWER)


# --- bad input ---


def llava_inputs(**changes):
    inputs = dict(tiny.processor("llava")(images=tiny.picture(24, 24), text="w5 <image> w6", return_tensors="pt"))
    return {key: value for key, value in (inputs | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": "w5 w6", "images": PICTURE}, "(does not take these images|text has no image)"),
        ({"prompt": llava_inputs(input_ids=torch.full((1, 18), 5))}, "text has no image placeholder"),
        ({"text": "<image> <image> w5", "images": PICTURE}, "text has 2 times the placeholder '<image>', but .* 1"),
        ({"text": "<image> w5", "images": [PICTURE] * 2}, "text has 1 times the placeholder '<image>', but .* 2"),
        ({"text": "<image> w5", "images": []}, "images is empty"),
        ({"text": "<image> w5", "images": "cat.png"}, r"images\[0\] must be a PIL image, got str"),
        ({"text": "<image> w5", "images": torch.zeros(3, 24, 24)}, r"images\[0\] must be a PIL image, got Tensor"),
        ({"text": "<image> w5", "images": PICTURE, "image_units": 0}, 'image_units must be "patch", "image"'),
        ({"text": "<image> w5", "images": PICTURE, "image_units": "tile"}, "image_units must be .*, got 'tile'"),
        ({"text": "<image> w5", "images": PICTURE, "image_units": None, "units": None}, "are both None"),
        ({"text": "<image> w5", "images": PICTURE, "units": "syllable"}, "units: got 'syllable'"),
        ({"text": "<image> w5", "images": PICTURE, "units": [(3, 99)]}, r"units\[0\]: got \(3, 99\)"),
        ({"text": "<image> w5", "images": PICTURE, "units": [7]}, r"units\[0\]: got 7, expected a span"),
        ({"text": "<image> w5", "images": PICTURE, "target": ""}, "target is empty"),
        ({"prompt": llava_inputs(pixel_values=torch.zeros(1, 3, 30, 30)), "target": None}, "inputs do not fit Llava"),
        ({"text": "<image> w5", "prompt": "<image> w5", "images": PICTURE}, "give the prompt once"),
        ({"images": PICTURE}, "give the prompt once"),
        ({"text": 7, "images": PICTURE}, "prompt must be a text or a list of chat messages, got int"),
        ({"text": "w5", "units": None}, "units is None, which needs images"),
        ({"prompt": llava_inputs(), "images": [PICTURE] * 2}, "images has 2, but the processor made tokens of 1"),
        ({"prompt": llava_inputs(pixel_values=None)}, "inputs hold no 'pixel_values'"),
        ({"prompt": llava_inputs(image_grid_thw=torch.ones(1, 3))}, "inputs hold 'image_grid_thw', which Llava"),
        ({"prompt": llava_inputs(pixel_values=torch.zeros(1, 3, 30, 30))}, "inputs do not fit Llava"),
        ({"prompt": llava_inputs(pixel_values=torch.zeros(2, 3, 24, 24))}, "a patch grid that is not square"),
        ({"prompt": llava_inputs(pixel_values=torch.zeros(1, 3, 24, 18))}, "a patch grid that is not square"),
        ({"prompt": llava_inputs(pixel_values=torch.zeros(3, 3, 24, 24))}, "do not divide among 3 images"),
        ({"prompt": llava_inputs(pixel_values=[1.0])}, r"inputs\['pixel_values'\] must be a tensor .* got list"),
        ({"prompt": llava_inputs(input_ids=torch.ones(2, 18).long())}, "one prompt at a time; got"),
        ({"prompt": llava_inputs(attention_mask=torch.ones(1, 7))}, r"inputs\['attention_mask'\] must be \(1, 18\)"),
        ({"prompt": llava_inputs(attention_mask=torch.zeros(1, 18))}, "hides tokens; pass the prompt without padding"),
    ],
)  # fmt: skip
def test_bad_questions(arguments, message):
    explainer = explainer_of("llava")
    before = explainer.model.get_decoder().config._attn_implementation
    with pytest.raises(ak.InputError, match=message):
        explainer.explain(**{"target": ANSWER} | arguments)
    assert explainer.model.get_decoder().config._attn_implementation == before
    assert not any("forward" in module.__dict__ for module in explainer.model.modules())


def test_bad_questions_of_other_families():
    picture = tiny.picture(40, 30)
    with pytest.raises(ak.InputError, match="tiles of 2 need patches, and this model has queries"):
        explainer_of("blip2").explain("w5", ANSWER, images=picture, image_units=2)
    inputs = dict(tiny.processor("qwen2_vl")(images=picture, text=TEXTS["qwen2_vl"], return_tensors="pt"))
    wrong = inputs | {"image_grid_thw": torch.tensor([[1, 4, 4]])}
    with pytest.raises(ak.InputError, match="text has 20 image tokens, but the images' grids make 4"):
        explainer_of("qwen2_vl").explain(wrong, ANSWER)
    film = inputs | {"image_grid_thw": torch.tensor([[2, 4, 10]])}
    with pytest.raises(ak.InputError, match="has 2 frames; images have one"):
        explainer_of("qwen2_vl").explain(film, ANSWER)
    with pytest.raises(ak.InputError, match="inputs hold no 'image_grid_thw'"):
        explainer_of("qwen2_vl").explain(llava_inputs(), ANSWER)
    fewer = tiny.processor("blip2")
    fewer.num_query_tokens = 4
    with pytest.raises(ak.InputError, match="text has 4 image tokens per image, but the model has 5 queries"):
        ak.Explainer(tiny.build("blip2"), fewer, progress=False).explain("w5", ANSWER, images=picture)


def test_images_need_a_processor():
    explainer = ak.Explainer(tiny.build("llava"), tiny.tokenizer(), progress=False)
    with pytest.raises(ak.InputError, match=r"images need the model's processor: Explainer\(model, processor\)"):
        explainer.explain("<image> w5", ANSWER, images=PICTURE)
    with pytest.raises(ak.InputError, match="images beside a processor's output need the processor too"):
        explainer.explain(llava_inputs(), ANSWER, images=PICTURE)
    with pytest.raises(ak.InputError, match="images is missing"):
        explainer_of("llava").explain("<image> w5", ANSWER)
    with pytest.raises(ak.InputError, match="images is missing; Blip2ForConditionalGeneration reads no text without"):
        explainer_of("blip2").explain("w5", ANSWER)
