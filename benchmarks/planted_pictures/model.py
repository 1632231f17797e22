"""A small vision–language model for the pictures: transformers' own Llava over a tiny CLIP and a tiny Llama."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from benchmarks.planted_pictures.pictures import COLOURS, PATCH, QUESTION, SHAPES, SIDE, TILES

WEIGHTS = Path(__file__).parent / "weights"
IMAGE = "<image>"
WORDS = (IMAGE, *QUESTION.split()[:-1], *SHAPES, *COLOURS)
IDS = {word: index for index, word in enumerate(WORDS)}


def untrained(seed: int) -> LlavaForConditionalGeneration:
    """Half a million weights; equal seeds give equal ones."""
    vision = CLIPVisionConfig(
        image_size=SIDE,
        patch_size=PATCH,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=3,
        projection_dim=96,
    )
    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=256,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IDS[IMAGE],
        image_seq_length=TILES**2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",  # without the class token
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(config)


def load() -> LlavaForConditionalGeneration:
    """The trained model, in float32 and eval mode."""
    return LlavaForConditionalGeneration.from_pretrained(WEIGHTS, dtype=torch.float32).eval()


def pixel_values(pixels: Tensor) -> Tensor:
    """What the vision model takes for pixels from 0 to 1."""
    return pixels * 2 - 1


def prompts(shapes: Tensor) -> Tensor:
    """(n, 64 + 5) ids: the picture's tiles, then the question for a shape each; `shapes` are indices, (n,)."""
    rows = [[IDS[IMAGE]] * TILES**2 + [IDS[w] for w in QUESTION.format(shape=SHAPES[s]).split()] for s in shapes]
    return torch.tensor(rows)


def colour_ids(colours: Tensor) -> Tensor:
    """Token ids of colours given as indices."""
    return torch.tensor([IDS[name] for name in COLOURS])[colours]
