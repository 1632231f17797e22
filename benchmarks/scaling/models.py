"""Llama-shaped models of many sizes, with random weights: time and memory do not ask what the weights are."""

from dataclasses import dataclass
from typing import Any

import torch

WORDS = 1000  # of the tokenizer, each one token


@dataclass(frozen=True)
class Size:
    """The shape of a published model."""

    like: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool = True


SIZES = {
    "tiny": Size("nothing, for tests", 64, 2, 4, 2, 128, 2048),
    "135M": Size("SmolLM2-135M", 576, 30, 9, 3, 1536, 49152),
    "360M": Size("SmolLM2-360M", 960, 32, 15, 5, 2560, 49152),
    "1B": Size("Llama-3.2-1B", 2048, 16, 32, 8, 8192, 128256),
    "1.5B": Size("Qwen2.5-1.5B", 1536, 28, 12, 2, 8960, 151936),
    "3B": Size("Llama-3.2-3B", 3072, 28, 24, 8, 8192, 128256),
    "8B": Size("Llama-3.1-8B", 4096, 32, 32, 8, 14336, 128256, tied=False),
    "14B": Size("Qwen2.5-14B", 5120, 48, 40, 8, 13824, 152064, tied=False),
    "32B": Size("Qwen2.5-32B", 5120, 64, 40, 8, 27648, 152064, tied=False),
}


def build(name: str, device: str, dtype: str, positions: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = SIZES[name]
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=positions,
        tie_word_embeddings=size.tied,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def tokenizer() -> Any:
    """Words t1 … t999, separated by spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(WORDS)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0")


def text(tokens: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"t{i}" for i in torch.randint(1, WORDS, (tokens,), generator=generator).tolist())
