"""A tiny random model of any family of transformers, from the family's config class.

Every config is asked for the same small sizes, as far as it knows them; `EXCEPTIONS` says what a family needs beyond
that.
"""

import inspect
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

VOCABULARY = 99
HIDDEN, HEADS, KEY_HEADS, HEAD_DIM, LAYERS, WIDE, LENGTH, EXPERTS = 32, 4, 2, 8, 4, 48, 128, 4
WINDOW = 7  # shorter than the prompts

_SIZES: tuple[tuple[Any, str], ...] = (
    (VOCABULARY, "vocab_size vocab_size_per_layer_input n_token"),
    (HIDDEN, "hidden_size n_embd d_model embed_dim dim emb_dim decoder_hidden_size embedding_size word_embed_proj_dim "
    "attention_hidden_size lru_width hidden_dim d_embed out_hidden_size text_hidden_size audio_hidden_size"),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers"),
    (HEADS, "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads "
    "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads mamba_n_heads mamba_num_heads"),
    (KEY_HEADS, "num_key_value_heads num_kv_heads linear_num_key_heads"),
    (HEAD_DIM, "head_dim d_kv mamba_d_state state_size ssm_state_size mamba_d_head mamba_head_dim kv_channels "
    "v_head_dim qk_nope_head_dim linear_key_head_dim linear_value_head_dim index_head_dim attention_head_dim "
    "mamba_state_dim hidden_size_per_layer_input"),
    (WIDE, "intermediate_size ffn_dim n_inner d_ff decoder_ffn_dim encoder_ffn_dim dim_feedforward ffn_hidden_size "
    "shared_expert_intermediate_size mlp_intermediate_size dense_intermediate_size"),
    (LENGTH, "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length"),
    (EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts linear_num_value_heads"),
    (16, "moe_intermediate_size kv_lora_rank q_lora_rank moe_shared_expert_intermediate_size expert_ffn_hidden_size "
    "block_size chunk_size mamba_chunk_size shared_intermediate_size"),
    (WINDOW, "sliding_window attention_window window_size attention_window_size"),
    (2, "num_experts_per_tok moe_topk num_experts_per_token top_k moe_k moe_top_k top_k_experts index_n_heads "
    "eos_token_id attn_layer_period"),
    (4, "qk_rope_head_dim index_topk rotary_dim num_filters"),
    (1, "n_group topk_group n_shared_experts moe_num_shared_experts bos_token_id n_groups mamba_n_groups "
    "first_k_dense_replace attn_layer_offset num_shared_experts expert_layer_period num_mem_blocks"),
    (0, "pad_token_id padding_idx expert_layer_offset"),
    (0.0, "attention_dropout hidden_dropout attn_pdrop resid_pdrop embd_pdrop dropout activation_dropout "
    "hidden_dropout_prob attention_probs_dropout_prob router_jitter_noise layerdrop attention_dropout_prob"),
    (True, "is_decoder"),
)  # fmt: skip
SMALL = {name: value for value, names in _SIZES for name in names.split()}

SKIP = object()  # a size that a family is not given
MAMBA_HEADS = {"mamba_d_head": 16}  # times the heads, twice the hidden size

STAGES = dict.fromkeys(("num_attention_heads", "num_heads", "embed_dim", "patch_size"), SKIP)  # one for each stage

# by model type: what its config takes beyond `SMALL`
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "bamba": MAMBA_HEADS | {"attn_layer_indices": [1, 3]},
    "cvt": STAGES,
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dinat": STAGES,
    "donut-swin": STAGES,
    "esmc": {"num_key_value_heads": SKIP},
    "falcon_h1": MAMBA_HEADS | {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": MAMBA_HEADS | {"layer_types": ["mamba", "attention"] * 2},
    "hiera": STAGES | {"image_size": [24, 24]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "led": {"attention_window": 8},
    "levit": STAGES,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "layoutlmv3": {"coordinate_size": 5, "shape_size": 6},
    "lilt": {"hidden_size": 48},
    "longcat_flash": {"head_dim": 4},
    "longformer": {"attention_window": 8},
    "mamba2": {"head_dim": 16},
    "mobilebert": {"normalization_type": "layer_norm"},  # without, scores grow to 1e22
    "phimoe": {"router_jitter_noise": SKIP},  # 0 makes its router's choice depend on the last bit
    "prophetnet": {"num_hidden_layers": SKIP},
    "pvt": STAGES,
    "pvt_v2": STAGES,
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_embds": False, "num_hidden_layers": SKIP},
    "segformer": STAGES,
    "swin": STAGES,
    "swinv2": STAGES,
    "xlnet": {"d_inner": WIDE},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "mamba_headdim": 16, "n_mamba_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(
    kind: type[PreTrainedConfig], family_says: dict[str, Any] | None = None, **wanted: Any
) -> PreTrainedConfig:
    """A config of small sizes; parts of a larger model are shrunk likewise.

    Args:
        family_says: what a larger model's config says of this one as its part.
        wanted: what the config, and those of its parts, shall say besides, where they know it.
    """
    special = EXCEPTIONS.get(kind.model_type, {})
    known = set(inspect.signature(kind.__init__).parameters) | set(getattr(kind, "__dataclass_fields__", {}))
    values = {name: value for name, value in SMALL.items() if name in known}
    if "kv_lora_rank" in known:
        values["num_key_value_heads"] = HEADS  # latent attention has as many key heads as query heads
    for name, part in kind.sub_configs.items():
        spec = getattr(kind, "sub_configs_defaults", {}).get(name)  # since transformers 5.20 or so
        if part is AutoConfig:
            part = CONFIG_MAPPING[spec.model_type] if spec is not None else type(getattr(kind(), name))
        if isinstance(part, type) and issubclass(part, PreTrainedConfig) and part.model_type:  # type: ignore[attr-defined]
            values[name] = tiny_config(part, spec.init_kwargs if spec else None, **wanted)
    taken = {name: value for name, value in wanted.items() if name in known | {"num_labels"}}
    values = (family_says or {}) | values | taken | special
    return kind(**{name: value for name, value in values.items() if value is not SKIP})


def tiny_model(
    kind: type[PreTrainedConfig], model_class: type[PreTrainedModel], seed: int = 0, **wanted: Any
) -> PreTrainedModel:
    """In eval mode, with weights large enough that attention matters, and eager attention."""
    torch.manual_seed(seed)
    config = tiny_config(kind, **wanted)
    taken = model_class.config_class
    if not isinstance(config, taken) and isinstance(config.get_text_config(decoder=True), taken):
        config = config.get_text_config(decoder=True)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and parameter.is_floating_point():
                parameter.copy_(torch.randn_like(parameter) * (0.5 if "embed" in name else 0.25))
    if model._can_set_attn_implementation():
        model.set_attn_implementation("eager")
    return model
