"""Random-weight image-text models of a few thousand parameters with processors that read real pictures."""

import re
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

IMAGE = 98
SPECIAL = {
    "<pad>": 0, "<s>": 1, "</s>": 2, "<image>": IMAGE, "<video>": 97, "<start>": 96, "<end>": 95,
    "<fake_token_around_image>": 94, "<global-img>": 93, "<end_of_utterance>": 92, "<nl>": 91,
    "<break>": 90,
} | {f"<row_{r}_col_{c}>": 80 + 3 * r + c for r in (1, 2) for c in (1, 2)}  # fmt: skip
VOCABULARY = 100
SIDE, PATCH = 24, 6  # a grid of 4 × 4
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [SIDE, 3 * SIDE]]
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": SIDE, "patch_size": PATCH,
}  # fmt: skip


def tokenizer(named: bool = True) -> hf.PreTrainedTokenizerFast:
    """Words w3 … w79 and the special tokens of all families."""
    words = SPECIAL | {f"w{i}": i for i in range(3, 80)}
    fast = Tokenizer(models.WordLevel(words, unk_token="<nl>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL])
    names = {
        "image_token": "<image>", "video_token": "<video>", "boi_token": "<start>", "eoi_token": "<end>",
        "context_image_token": "<image>", "start_image_token": "<start>", "end_image_token": "<end>",
        "img_line_break_token": "<break>",
    }  # fmt: skip
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens=names if named else {},
    )


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def _llava(side: int = SIDE) -> hf.PreTrainedModel:
    vision = hf.CLIPVisionConfig(**VISION | {"image_size": side}, projection_dim=16)
    text = hf.LlamaConfig(**TEXT)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=-1)
    return hf.LlavaForConditionalGeneration(config)


def _vipllava() -> hf.PreTrainedModel:
    vision, text = hf.CLIPVisionConfig(**VISION, projection_dim=16), hf.LlamaConfig(**TEXT)
    layers = [-1, -2]
    config = hf.VipLlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layers=layers,
        vision_feature_layer=layers,
    )  # fmt: skip
    return hf.VipLlavaForConditionalGeneration(config)


def _pixtral() -> hf.PreTrainedModel:
    vision = hf.PixtralVisionConfig(**VISION | {"image_size": 96}, head_dim=8)
    config = hf.LlavaConfig(
        vision_config=vision, text_config=hf.MistralConfig(**TEXT), image_token_id=IMAGE, vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config)


def _mistral3() -> hf.PreTrainedModel:
    vision = hf.PixtralVisionConfig(**VISION | {"image_size": 96}, head_dim=8)
    config = hf.Mistral3Config(
        vision_config=vision, text_config=hf.MistralConfig(**TEXT), image_token_index=IMAGE, spatial_merge_size=2
    )
    return hf.Mistral3ForConditionalGeneration(config)


def _llava_next() -> hf.PreTrainedModel:
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**VISION, projection_dim=16), text_config=hf.LlamaConfig(**TEXT),
        image_token_index=IMAGE, vision_feature_layer=-1, image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    return hf.LlavaNextForConditionalGeneration(config)


def _llava_onevision() -> hf.PreTrainedModel:
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False), text_config=hf.Qwen2Config(**TEXT),
        image_token_index=IMAGE, video_token_index=97, vision_feature_layer=-1, image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
    )  # fmt: skip
    return hf.LlavaOnevisionForConditionalGeneration(config)


def _internvl() -> hf.PreTrainedModel:
    vision = hf.InternVLVisionConfig(**VISION | {"image_size": (SIDE, SIDE), "patch_size": (PATCH, PATCH)})
    config = hf.InternVLConfig(
        vision_config=vision, text_config=hf.Qwen2Config(**TEXT), image_token_id=IMAGE, downsample_ratio=0.5
    )
    return hf.InternVLForConditionalGeneration(config)


def _aya_vision() -> hf.PreTrainedModel:
    vision, text = hf.SiglipVisionConfig(**VISION, vision_use_head=False), hf.Cohere2Config(**TEXT)
    config = hf.AyaVisionConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, downsample_factor=2)
    return hf.AyaVisionForConditionalGeneration(config)


def _cohere2_vision() -> hf.PreTrainedModel:
    vision, text = hf.SiglipVisionConfig(**VISION, vision_use_head=False), hf.Cohere2Config(**TEXT)
    config = hf.Cohere2VisionConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, downsample_factor=2,
        alignment_intermediate_size=32,
    )  # fmt: skip
    return hf.Cohere2VisionForConditionalGeneration(config)


def _glm(name: str, text: dict[str, Any]) -> Callable[[], hf.PreTrainedModel]:
    def build() -> hf.PreTrainedModel:
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}
        config = getattr(hf, f"{name}Config")(
            vision_config={
                "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 24, "image_size": 16,
                "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "depth": 2,
            },
            text_config=TEXT | {"rope_parameters": rope} | text,
            image_token_id=IMAGE, video_token_id=97, image_start_token_id=96, image_end_token_id=95,
            video_start_token_id=94, video_end_token_id=93,
        )  # fmt: skip
        return getattr(hf, f"{name}ForConditionalGeneration")(config)

    return build


def _paligemma() -> hf.PreTrainedModel:
    vision, text = hf.SiglipVisionConfig(**VISION), hf.GemmaConfig(**TEXT, head_dim=8)
    config = hf.PaliGemmaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, projection_dim=32)
    return hf.PaliGemmaForConditionalGeneration(config)


def _gemma3() -> hf.PreTrainedModel:
    text = hf.Gemma3TextConfig(
        **TEXT, head_dim=8, sliding_window=7, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    config = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**VISION), text_config=text, image_token_id=IMAGE, mm_tokens_per_image=4
    )
    return hf.Gemma3ForConditionalGeneration(config)


def _qwen(name: str, vision: dict[str, Any], text: dict[str, Any] | None = None) -> Callable[[], hf.PreTrainedModel]:
    def build() -> hf.PreTrainedModel:
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        config = getattr(hf, f"{name}Config")(
            vision_config=vision | {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "depth": 2},
            text_config=TEXT | {"head_dim": 8, "rope_parameters": rope, "rope_scaling": rope} | (text or {}),
            image_token_id=IMAGE, video_token_id=97, vision_start_token_id=96, vision_end_token_id=95,
        )  # fmt: skip
        return getattr(hf, f"{name}ForConditionalGeneration")(config)

    return build


def _idefics(name: str) -> Callable[[], hf.PreTrainedModel]:
    def build() -> hf.PreTrainedModel:
        config = getattr(hf, f"{name}Config")(
            vision_config=VISION, text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2,
            pad_token_id=0,
        )  # fmt: skip
        return getattr(hf, f"{name}ForConditionalGeneration")(config)

    return build


def _blip2() -> hf.PreTrainedModel:
    opt = {key: value for key, value in TEXT.items() if key not in ("num_key_value_heads", "intermediate_size")}
    config = hf.Blip2Config(
        vision_config=VISION,
        qformer_config={
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "encoder_hidden_size": 16, "vocab_size": VOCABULARY,
        },
        text_config=hf.OPTConfig(**opt, ffn_dim=48, word_embed_proj_dim=32),
        num_query_tokens=5,
        image_token_index=IMAGE,
    )  # fmt: skip
    return hf.Blip2ForConditionalGeneration(config)


QWEN3_VISION = {
    "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 24, "num_position_embeddings": 64,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
HYBRID = {
    "layer_types": ["linear_attention", "full_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip

MODELS: dict[str, Callable[..., hf.PreTrainedModel]] = {
    "llava": _llava,
    "qwen2_vl": _qwen("Qwen2VL", {"embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}),
    "qwen2_5_vl": _qwen(
        "Qwen2_5_VL",
        {"hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 24, "window_size": 16,
         "fullatt_block_indexes": [1]},
    ),
    "qwen3_vl": _qwen("Qwen3VL", QWEN3_VISION | {"deepstack_visual_indexes": [0, 1]}),
    "paligemma": _paligemma,
    "gemma3": _gemma3,
    "idefics3": _idefics("Idefics3"),
    "smolvlm": _idefics("SmolVLM"),
    "blip2": _blip2,
    "vipllava": _vipllava,
    "pixtral": _pixtral,
    "mistral3": _mistral3,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "internvl": _internvl,
    "aya_vision": _aya_vision,
    "cohere2_vision": _cohere2_vision,
    "qwen3_vl_moe": _qwen("Qwen3VLMoe", QWEN3_VISION | {"deepstack_visual_indexes": [0, 1]}, EXPERTS),
    "qwen3_5": _qwen("Qwen3_5", QWEN3_VISION, HYBRID),
    "qwen3_5_moe": _qwen("Qwen3_5Moe", QWEN3_VISION, HYBRID | EXPERTS),
    "glm4v": _glm("Glm4v", {}),
    "glm46v": _glm("Glm46V", {"model_type": "glm4v_text"}),
    "glm4v_moe": _glm("Glm4vMoe", EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1}),
}  # fmt: skip
BATCHED = ("qwen3_5", "qwen3_5_moe")  # layers that mix tokens beside attention


def build(family: str, seed: int = 0, **options: int) -> hf.PreTrainedModel:
    """A model of a family, in eval mode, with weights large enough that attention matters."""
    torch.manual_seed(seed)
    model = MODELS[family](**options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn_like(parameter) * (0.5 if "embed" in name else 0.25))
    return model


class Pixtral:
    """What `PixtralProcessor`, which needs torchvision, makes of images: rows with a break after each."""

    image_token = "<image>"

    def __init__(self, words, merge: int) -> None:
        self.tokenizer, self.side = words, PATCH * merge
        self.image_processor = PixtralImageProcessorPil(size={"longest_edge": 48}, patch_size=self.side)

    def __call__(self, images, text: str, return_tensors: str, **options):
        listed = images if isinstance(images, list) else [images]
        made = self.image_processor(listed, return_tensors=return_tensors)
        for height, width in made["image_sizes"].tolist():
            row = "<img>" * (width // self.side)
            text = text.replace("<image>", "<break>".join([row] * (height // self.side)) + "<end>", 1)
        return {**self.tokenizer(text.replace("<img>", "<image>"), return_tensors=return_tensors), **made}


def _assembled(kind, images, words, **attributes):
    """A processor of a class whose constructor wants torchvision."""
    made = object.__new__(kind)
    made.image_processor, made.tokenizer, made.chat_template = images, words, None
    for name, value in {"image_token": "<image>", "image_token_id": IMAGE, **attributes}.items():
        setattr(made, name, value)
    return made


def processor(family: str, side: int = SIDE):
    """The family's own processor over the tiny tokenizer, with its PIL image processor."""
    words, square = tokenizer(named=family != "blip2"), {"height": side, "width": side}
    if family in ("llava", "vipllava"):
        images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square)
        return hf.LlavaProcessor(
            images, words, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
        )
    if family.startswith(("qwen", "glm")):
        size = {"shortest_edge": 64, "longest_edge": 2048}
        images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=size)
        kind = hf.Qwen2VLProcessor if family.startswith("qwen") else hf.Glm4vProcessor
        ids = {"video_token_id": 97, "video_start_id": 94, "video_end_id": 93}
        return _assembled(kind, images, words, video_token="<video>", **ids)
    if family in ("pixtral", "mistral3"):
        return Pixtral(words, merge=1 if family == "pixtral" else 2)
    if family == "llava_next":
        images = LlavaNextImageProcessorPil(
            size={"shortest_edge": side}, crop_size=square, image_grid_pinpoints=PINPOINTS
        )
        return hf.LlavaNextProcessor(
            images, words, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
        )
    if family == "llava_onevision":
        images = LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=PINPOINTS)
        return _assembled(
            hf.LlavaOnevisionProcessor, images, words, num_image_tokens=(side // PATCH) ** 2,
            vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_2", video_token="<video>",
        )  # fmt: skip
    if family in ("internvl", "aya_vision", "cohere2_vision"):
        images = GotOcr2ImageProcessorPil(size=square, crop_to_patches=True, max_patches=6)
        if family == "aya_vision":
            return hf.AyaVisionProcessor(
                images, words, patch_size=PATCH, img_size=side, downsample_factor=2, image_token="<image>",
                img_patch_token="<image>", start_of_img_token="<start>", end_of_img_token="<end>",
                tile_token="<tile>", tile_global_token="<global-img>",
            )  # fmt: skip
        return _assembled(
            hf.InternVLProcessor if family == "internvl" else hf.Cohere2VisionProcessor, images, words,
            image_seq_length=4, patch_size=2, start_image_token="<start>", end_image_token="<end>",
            start_image_token_id=96, end_image_token_id=95, boi_token="<start>", eoi_token="<end>",
            img_line_break_token="<break>", video_token="<video>",
            multimodal_pattern=re.compile("(?P<image><image>)|(?P<video><video>)"),
        )  # fmt: skip
    if family == "paligemma":
        images = SiglipImageProcessorPil(size=square)
        images.image_seq_length = (side // PATCH) ** 2
        return hf.PaliGemmaProcessor(images, words)
    if family == "gemma3":
        return hf.Gemma3Processor(Gemma3ImageProcessorPil(size=square), words, image_seq_length=4)
    if family in ("idefics3", "smolvlm"):
        images = Idefics3ImageProcessorPil(size={"longest_edge": 2 * side}, max_image_size={"longest_edge": side})
        return hf.Idefics3Processor(images, words, image_seq_len=(side // PATCH // 2) ** 2)
    assert family == "blip2"
    return hf.Blip2Processor(BlipImageProcessorPil(size=square), words, num_query_tokens=5)
