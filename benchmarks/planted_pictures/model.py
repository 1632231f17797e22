"""A small vision–language model for the pictures: transformers' own Llava over a tiny CLIP and a tiny Llama.

The vision model gets a picture cut into its 16 cells, as larger models get large pictures in crops. Without the cut
its attention carries an object's colour to tiles elsewhere, and the truth is not where the object is: of such a model,
trained alike, the answer about some objects stayed the same with all of the object's own tiles removed.
"""

from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from benchmarks.planted_pictures.pictures import CELL, CELLS, COLOURS, PATCH, QUESTION, SHAPES, TILES

WEIGHTS = Path(__file__).parent / "weights"
IMAGE = "<image>"
WORDS = (IMAGE, *QUESTION.split()[:-1], *SHAPES, *COLOURS)
IDS = {word: index for index, word in enumerate(WORDS)}


def untrained(seed: int) -> LlavaForConditionalGeneration:
    """Half a million weights; equal seeds give equal ones."""
    vision = CLIPVisionConfig(
        image_size=CELL,
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
        image_seq_length=(CELL // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",  # without the class token
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(config)


def load() -> LlavaForConditionalGeneration:
    """The trained model, in float32 and eval mode."""
    return LlavaForConditionalGeneration.from_pretrained(WEIGHTS, dtype=torch.float32).eval()


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word."""
    words = Tokenizer(WordLevel(IDS, unk_token=IMAGE))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, extra_special_tokens={"image_token": IMAGE})


def pixel_values(pixels: Tensor) -> Tensor:
    """(count · 16, 3, 16, 16): what the vision model takes for pictures (count, 3, 64, 64) with pixels from 0 to 1."""
    cells = pixels.view(-1, 3, CELLS, CELL, CELLS, CELL).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(-1, 3, CELL, CELL) * 2 - 1


def in_order(tiles: Tensor) -> Tensor:
    """(…, 64): values of the tiles of a picture, (…, 8, 8), in the order of their tokens: cell by cell."""
    inside = TILES // CELLS
    cells = tiles.view(*tiles.shape[:-2], CELLS, inside, CELLS, inside).transpose(-3, -2)
    return cells.reshape(*tiles.shape[:-2], TILES**2)


def prompts(shapes: Tensor) -> Tensor:
    """(n, 64 + 5) ids: the picture's tiles, then the question for a shape each; `shapes` are indices, (n,)."""
    rows = [[IDS[IMAGE]] * TILES**2 + [IDS[w] for w in QUESTION.format(shape=SHAPES[s]).split()] for s in shapes]
    return torch.tensor(rows)


def colour_ids(colours: Tensor) -> Tensor:
    """Token ids of colours given as indices."""
    return torch.tensor([IDS[name] for name in COLOURS])[colours]
