"""A tiny model for the benchmarks that run on their own text."""

from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.prompts import OWN_PARAGRAPH


def saved(folder: Path, vocabulary: int = 500) -> Path:
    """The folder with a random two-layer Llama and a byte-level tokenizer that knows the text and special tokens."""
    special = ["<pad>", "<s>", "</s>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    bpe.train_from_iterator([OWN_PARAGRAPH], trainer)
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<pad>", **names)
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
