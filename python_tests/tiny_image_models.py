"""Random-weight image-text models of a few thousand parameters with processors that read real pictures."""

from collections.abc import Callable

import torch
import transformers as hf
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

IMAGE = 98
SPECIAL = {
    "<pad>": 0, "<s>": 1, "</s>": 2, "<image>": IMAGE, "<video>": 97, "<start>": 96, "<end>": 95,
    "<fake_token_around_image>": 94, "<global-img>": 93, "<end_of_utterance>": 92, "<nl>": 91,
} | {f"<row_{r}_col_{c}>": 80 + 3 * r + c for r in (1, 2) for c in (1, 2)}  # fmt: skip
VOCABULARY = 100
SIDE, PATCH = 24, 6  # a grid of 4 × 4
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
    names = {"image_token": "<image>", "video_token": "<video>", "boi_token": "<start>", "eoi_token": "<end>"}
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


def _qwen(name: str, vision: dict[str, object]) -> Callable[[], hf.PreTrainedModel]:
    def build() -> hf.PreTrainedModel:
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        config = getattr(hf, f"{name}Config")(
            vision_config=vision | {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "depth": 2},
            text_config=TEXT | {"head_dim": 8, "rope_parameters": rope, "rope_scaling": rope},
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


MODELS: dict[str, Callable[..., hf.PreTrainedModel]] = {
    "llava": _llava,
    "qwen2_vl": _qwen("Qwen2VL", {"embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}),
    "qwen2_5_vl": _qwen(
        "Qwen2_5_VL",
        {"hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 24, "window_size": 16,
         "fullatt_block_indexes": [1]},
    ),
    "qwen3_vl": _qwen(
        "Qwen3VL",
        {"hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 24,
         "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
    ),
    "paligemma": _paligemma,
    "gemma3": _gemma3,
    "idefics3": _idefics("Idefics3"),
    "smolvlm": _idefics("SmolVLM"),
    "blip2": _blip2,
}  # fmt: skip


def build(family: str, seed: int = 0, **options: int) -> hf.PreTrainedModel:
    """A model of a family, in eval mode, with weights large enough that attention matters."""
    torch.manual_seed(seed)
    model = MODELS[family](**options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn_like(parameter) * (0.5 if "embed" in name else 0.25))
    return model


def processor(family: str, side: int = SIDE):
    """The family's own processor over the tiny tokenizer, with its PIL image processor."""
    words, square = tokenizer(named=family != "blip2"), {"height": side, "width": side}
    if family == "llava":
        images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square)
        return hf.LlavaProcessor(
            images, words, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
        )
    if family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        size = {"shortest_edge": 64, "longest_edge": 2048}
        images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=size)
        made = object.__new__(hf.Qwen2VLProcessor)  # its constructor wants a video processor: torchvision
        made.image_processor, made.tokenizer, made.chat_template = images, words, None
        made.image_token, made.image_token_id = "<image>", IMAGE
        made.video_token, made.video_token_id = "<video>", 97
        return made
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
