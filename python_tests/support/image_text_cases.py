"""Questions to the tiny image-text models, and their inputs written down a second time."""

import tiny_image_models as tiny
import torch

import atman_kernels as ak

ANSWER = "w20 w21 w22"
PICTURE = tiny.picture(24, 24)
TEXTS = {
    "llava": "w5 w6 <image> w7 w8 w9",
    "qwen2_vl": "w5 w6 <start><image><end> w7 w8 w9",
    "qwen2_5_vl": "w5 w6 <start><image><end> w7 w8 w9",
    "qwen3_vl": "w5 w6 <start><image><end> w7 w8 w9",
    "paligemma": "<image> w7 w8 w9",
    "gemma3": "w5 w6 <start> w7 w8 w9",
    "idefics3": "w5 w6 <image> w7 w8 w9",
    "smolvlm": "w5 w6 <image> w7 w8 w9",
    "blip2": "w7 w8 w9",
    "vipllava": "w5 w6 <image> w7 w8 w9",
    "pixtral": "w5 w6 <image> w7 w8 w9",
    "mistral3": "w5 w6 <image> w7 w8 w9",
    "llava_next": "w5 w6 <image> w7 w8 w9",
    "llava_onevision": "w5 w6 <image> w7 w8 w9",
    "internvl": "w5 w6 <image> w7 w8 w9",
    "aya_vision": "w5 w6 <image> w7 w8 w9",
    "cohere2_vision": "w5 w6 <image> w7 w8 w9",
    "qwen3_vl_moe": "w5 w6 <start><image><end> w7 w8 w9",
    "qwen3_5": "w5 w6 <start><image><end> w7 w8 w9",
    "qwen3_5_moe": "w5 w6 <start><image><end> w7 w8 w9",
    "glm4v": "w5 w6 <start><image><end> w7 w8 w9",
    "glm46v": "w5 w6 <start><image><end> w7 w8 w9",
    "glm4v_moe": "w5 w6 <start><image><end> w7 w8 w9",
}


def explainer_of(family, model=None, **settings):
    model = tiny.build(family) if model is None else model
    return ak.Explainer(model, tiny.processor(family), progress=False, **{"factor": 0.1} | settings)


def made_by_hand(family, processor, images, text, answer):
    """What the model takes for prompt and answer, written down here a second time; and the prompt's length."""
    inputs = dict(processor(images=images, text=text, return_tensors="pt"))
    inputs = {key: value for key, value in inputs.items() if key not in ("labels", "num_crops")}
    n, more = inputs["input_ids"].shape[1], answer[None, :-1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], more], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    fill = {"paligemma": 1}.get(family, 0)  # answers are causal: PaliGemma writes 1 for that, the others 0
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            inputs[key] = torch.cat([inputs[key], torch.full_like(more, fill)], dim=1)
    return inputs, n


def rows_of(explanation, factor):
    """One row per unit, from the positions that the unit says it has."""
    length = max(max(unit.token_indices) for unit in explanation.units) + 10
    rows = torch.ones(len(explanation.units), length)
    for row, unit in zip(rows, explanation.units, strict=True):
        row[list(unit.token_indices)] = factor
    return rows
