"""Tiny BLIP models, and their attention under factors, written independently of the package."""

import math
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import tiny_image_models as tiny
import torch
import transformers as hf
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from whole_row_oracle import enlarge

PICTURE = tiny.picture(24, 24)
ANSWER, TARGET = "w20 w21 w22", torch.tensor([20, 21, 22])
STATES = 17  # a class token and 4 × 4 patches
TEXT = {
    "vocab_size": 100, "hidden_size": 32, "encoder_hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 12, "projection_dim": 8, "bos_token_id": 1,
    "sep_token_id": 2, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
VISION = tiny.VISION | {"projection_dim": 8}
CLASSES = {"caption": hf.BlipForConditionalGeneration, "question": hf.BlipForQuestionAnswering}
PROMPTS = {"caption": "w5 w6 w7", "question": "w5 w6 w7"}


def build(kind: str):
    torch.manual_seed(0)
    # a caption's decoder may be wider than what it attends to; that of answers attends to text of its own width
    text = TEXT if kind == "caption" else TEXT | {"hidden_size": 16}
    model = enlarge(CLASSES[kind](hf.BlipConfig(text_config=text, vision_config=VISION)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("qkv.weight", "query.weight", "key.weight")):
                parameter.mul_(2)
    return model


def processor():
    image_processor = BlipImageProcessorPil(size={"height": 24, "width": 24})
    return hf.BlipProcessor(image_processor, tiny.tokenizer(named=False))


@contextmanager
def changed(model, factor_of, mode):
    """Modules whose name `factor_of` gives factors (S,) have their scores changed; later keys count as 1."""
    current: list[Any] = []
    finished, hooks, real = SimpleNamespace(), [], torch.nn.functional.softmax

    def softmax(scores, *args, **kwargs):
        if current and current[-1] is not None:
            c = torch.ones(scores.shape[-1])
            c[: len(current[-1])] = current[-1]
            hidden = scores < -1e30
            if mode == "log_additive":
                scores = scores + c.log()
            elif mode == "multiplicative":
                scores = torch.where(hidden, scores, scores * c)
            else:
                lowest = torch.where(hidden, math.inf, scores).amin(-1, keepdim=True)
                scores = torch.where(hidden, scores, lowest + (scores - lowest) * c)
        return real(scores, *args, **kwargs)

    for name, module in model.named_modules():
        if type(module).__name__ in ("BlipAttention", "BlipTextSelfAttention"):
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: current.append(factor_of(name))))
            hooks.append(module.register_forward_hook(lambda *_: setattr(finished, "last", current.pop())))
    torch.nn.functional.softmax = softmax  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.nn.functional.softmax = real
        for hook in hooks:
            hook.remove()


def factors_by_place(kind, factor, vision, layers=None):
    """Of modules by their names in transformers' code; `factor` is over the image's states, then the text's tokens."""
    image, text = factor[:STATES], factor[STATES:]

    def of(name):
        stack, layer = name.split(".")[0], int(name.split("layer")[-1].split(".")[1])
        if stack == "vision_model":
            return image if vision else None
        if layers is not None and layer not in layers:
            return None
        if stack == "text_decoder" and kind == "question":
            return text if "crossattention" in name else None
        return image if "crossattention" in name else text

    return of


def logprobs(model, kind, prompt, pixels):
    """(3,) of the answer, by the forward of the whole model."""
    ids = [int(word[1:]) for word in prompt.split()]
    written = [1, *(ids if kind == "caption" else []), *TARGET.tolist()[:-1]]
    seen = []
    hook = model.text_decoder.register_forward_hook(lambda module, args, output: seen.append(output.logits))
    with torch.no_grad():
        if kind == "caption":
            model(pixel_values=pixels, input_ids=torch.tensor([written]))
        else:
            model(pixel_values=pixels, input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([written]))
    hook.remove()
    return seen[0][0, -3:].double().log_softmax(-1).gather(1, TARGET[:, None])[:, 0]


def pixels_of(picture):
    return processor().image_processor(images=picture, return_tensors="pt")["pixel_values"]
