"""Random encoder-decoders with two or three layers, a listener among them, and their explainer."""

import tiny_models
import torch
import transformers as hf
from whole_row_oracle import enlarge

import atman_kernels as ak

TEXT = "w5 w6 w7 w8 w9 w10"
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
STACKS = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    **SPECIAL,
}
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
START = {"decoder_start_token_id": 2, "forced_eos_token_id": None}
FAMILIES = {
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, decoder_start_token_id=0, pad_token_id=0)),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**STACKS, **START, max_position_embeddings=64)),
    "mbart": lambda: hf.MBartForConditionalGeneration(hf.MBartConfig(**STACKS, **START, max_position_embeddings=64)),
    "pegasus": lambda: hf.PegasusForConditionalGeneration(
        hf.PegasusConfig(**STACKS, **START, max_position_embeddings=64)
    ),
    "marian": lambda: hf.MarianMTModel(
        hf.MarianConfig(**STACKS, **START, max_position_embeddings=64, decoder_vocab_size=99)
    ),
}


def build(family: str):
    torch.manual_seed(0)
    return enlarge(FAMILIES[family]())


def start(family: str) -> int:
    return 0 if family == "t5" else 2


def explainer(model, tokenizer=None, **options):
    return ak.Explainer(model, tokenizer or tiny_models.tokenizer(), progress=False, **{"factor": 0.1} | options)


def whisper():
    config = hf.WhisperConfig(
        **{**STACKS, "pad_token_id": 0}, num_mel_bins=8, max_source_positions=100, max_target_positions=16,
        decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = enlarge(hf.WhisperForConditionalGeneration(config))
    extractor = hf.WhisperFeatureExtractor(feature_size=8, chunk_length=2)
    processor = hf.WhisperProcessor.__new__(hf.WhisperProcessor)  # its tokenizer would have to be Whisper's
    processor.feature_extractor, processor.tokenizer = extractor, tiny_models.tokenizer()
    return model, processor


SAMPLES = torch.randn(24000, generator=torch.Generator().manual_seed(0)) * 0.1  # 1.5 s
