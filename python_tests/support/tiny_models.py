"""Random-weight models of a few thousand parameters, one per architecture that packing must serve."""

from collections.abc import Callable

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

VOCABULARY = 99
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
WINDOW = 7  # shorter than the prompts of the tests


def _gpt2() -> hf.PreTrainedModel:
    config = hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=128, bos_token_id=1)
    return hf.GPT2LMHeadModel(config)


def _opt() -> hf.PreTrainedModel:
    return hf.OPTForCausalLM(hf.OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=32))


def _gemma(name: str, **extra: object) -> Callable[[], hf.PreTrainedModel]:
    def build() -> hf.PreTrainedModel:
        config = getattr(hf, f"{name}Config")(**GROUPED, head_dim=8, sliding_window=WINDOW, **extra)
        return getattr(hf, f"{name.removesuffix('Text')}ForCausalLM")(config)

    return build


def _gemma3n() -> hf.PreTrainedModel:
    config = hf.Gemma3nTextConfig(
        **{**GROUPED, "num_hidden_layers": 4, "intermediate_size": [48] * 4},
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        altup_num_inputs=2,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
    )
    return hf.Gemma3nForCausalLM(config)


def _deepseek_v3() -> hf.PreTrainedModel:
    config = hf.DeepseekV3Config(
        **COMMON,
        num_key_value_heads=4,
        moe_intermediate_size=16,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=10,
    )
    return hf.DeepseekV3ForCausalLM(config)


def _gpt_oss() -> hf.PreTrainedModel:
    config = hf.GptOssConfig(
        **GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    return hf.GptOssForCausalLM(config)


def _falcon(**extra: object) -> Callable[[], hf.PreTrainedModel]:
    return lambda: hf.FalconForCausalLM(hf.FalconConfig(**COMMON, **extra, attention_dropout=0.0, hidden_dropout=0.0))


def _gpt_neo() -> hf.PreTrainedModel:
    config = hf.GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_layers=3, num_heads=4, max_position_embeddings=128,
        window_size=WINDOW, attention_types=[[["global", "local", "local"], 1]], bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return hf.GPTNeoForCausalLM(config)


def _rotary_gpt(name: str) -> Callable[[], hf.PreTrainedModel]:
    def build() -> hf.PreTrainedModel:
        config = getattr(hf, f"{name}Config")(
            vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=128, n_ctx=128, rotary_dim=4,
            bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        return getattr(hf, f"{name}ForCausalLM")(config)

    return build


def _mpt(heads: int = 4, **attention: object) -> Callable[[], hf.PreTrainedModel]:
    def build() -> hf.PreTrainedModel:
        config = hf.MptConfig(
            vocab_size=VOCABULARY, d_model=8 * heads, n_heads=heads, n_layers=3, max_seq_len=128, attn_config=attention
        )
        return hf.MptForCausalLM(config)

    return build


def _xglm() -> hf.PreTrainedModel:
    config = hf.XGLMConfig(
        vocab_size=VOCABULARY, d_model=32, ffn_dim=48, num_layers=3, attention_heads=4, max_position_embeddings=128,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return hf.XGLMForCausalLM(config)


def _simple(name: str, **extra: object) -> Callable[[], hf.PreTrainedModel]:
    def build() -> hf.PreTrainedModel:
        return getattr(hf, f"{name}ForCausalLM")(getattr(hf, f"{name}Config")(**GROUPED, **extra))

    return build


PACKABLE: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "llama": _simple("Llama"),
    "qwen3": _simple("Qwen3", head_dim=8),
    "gemma2": _gemma("Gemma2", attn_logit_softcapping=5.0, query_pre_attn_scalar=8),
    "gemma3": _gemma("Gemma3Text", query_pre_attn_scalar=8),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**COMMON)),
    "gpt2": _gpt2,
    "gpt_oss": _gpt_oss,
    "mistral": _simple("Mistral", sliding_window=WINDOW, head_dim=8),
    "phi3": _simple("Phi3"),
    "opt": _opt,
    "mixtral": _simple("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "olmo2": _simple("Olmo2"),
    "deepseek_v3": _deepseek_v3,
    "gemma3n": _gemma3n,
}

# models whose attention modules do not call transformers' attention interface: hf/models/families.py
OWN_ATTENTION: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "gptj": _rotary_gpt("GPTJ"),
    "codegen": _rotary_gpt("CodeGen"),
    "gpt_neo": _gpt_neo,
    "gpt_neox_japanese": lambda: hf.GPTNeoXJapaneseForCausalLM(
        hf.GPTNeoXJapaneseConfig(**{k: v for k, v in COMMON.items() if k != "intermediate_size"})
    ),
    "openai-gpt": lambda: hf.OpenAIGPTLMHeadModel(
        hf.OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=128)
    ),
    "falcon": _falcon(multi_query=True),
    "falcon grouped": _falcon(new_decoder_architecture=True, num_kv_heads=2),
    "falcon alibi": _falcon(alibi=True, multi_query=False),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=3, n_head=4)),
    "mpt": _mpt(),
    "mpt of 3 heads": _mpt(3, clip_qkv=1.0),
    "xglm": _xglm,
}


def build(family: str, seed: int = 0) -> hf.PreTrainedModel:
    """A model of a family, in eval mode, with weights large enough that attention matters."""
    torch.manual_seed(seed)
    model = (PACKABLE | OWN_ATTENTION)[family]().eval()
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # transformers 5.17 lets Gemma 2 take sdpa, which drops the softcap
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn_like(parameter) * (0.5 if "embed" in name else 0.25))
            elif "sinks" in name:
                parameter.copy_(torch.randn_like(parameter))
    return model


def tokenizer() -> hf.PreTrainedTokenizerFast:
    """Words w3 … w98, separated by spaces; <pad>, <s>, </s> are 0, 1, 2."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    fast = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def text_of(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)
