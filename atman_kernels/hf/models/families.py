"""Model families whose attention modules compute attention themselves instead of calling transformers' interface.

One line of `FAMILIES` per class of attention module: which of its methods is replaced while a run is active, and by
what, for the run's own calls. The replacement makes query, key, value and mask as the method does and hands them to
`attend`, which takes what transformers' interface takes. Subclasses, such as those of flash attention, are not taken
for their parents.
"""

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from atman_kernels.errors import UnsupportedModelError
from atman_kernels.hf.replacement import innermost_forward, overlaid, replaced
from atman_kernels.hf.scope import Scope


class Attend(Protocol):
    """`switch.attention`: returns ((B, T, Hq, Dv), None)."""

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]: ...


@dataclass(frozen=True)
class KeyBias:
    """A position bias that depends on the key's position alone, as ALiBi is written down: what a pack has to know.

    Attributes:
        of_length: from a length L to the bias (Hq, 1, L) that a sequence of L tokens gets.
        from_end: it counts from the last key, so that sequences of other lengths differ by a constant. Softmax does
            not see a constant, but the mode "multiplicative" does.
    """

    of_length: Callable[[int], Tensor]
    from_end: bool = False


@dataclass(frozen=True)
class Family:
    """How to reach the attention of one class of modules.

    Attributes:
        method: the method that is replaced.
        compute: (module, attend, *arguments of the method) -> what the method returns.
        mask_hides: the model turns its mask into bools, True = hidden, and cannot do without one.
        positions_by_key: tokens have no positions but in a `KeyBias`.
        cross_attends: some of its modules attend to another stack's states. Factors of tokens are not for those, so
            only a run that knows them may reach the family.
    """

    method: str
    compute: Callable[..., Any]
    mask_hides: bool = False
    positions_by_key: bool = False
    cross_attends: bool = False


def family_of(module: nn.Module) -> Family | None:
    """None for modules that are not in `FAMILIES`."""
    package, _, file = type(module).__module__.rpartition(".")
    library, _, name = package.rpartition(".")
    known = library == "transformers.models" and file.startswith(f"modeling_{name}")  # BLIP's text has its own file
    return FAMILIES.get((name, type(module).__qualname__)) if known else None


def families_in(model: nn.Module) -> list[Family]:
    """The families of a model's attention modules, without repetitions; none if it uses transformers' interface."""
    return list({id(f): f for f in map(family_of, model.modules()) if f is not None}.values())


def chooses_keys(model: nn.Module) -> bool:
    """Whether some attention sees only the keys that an indexer chose for it (sparse attention of DeepSeek's kind)."""
    return any(getattr(module, "indexer", None) is not None for module in model.modules())


def why_refused(model: nn.Module) -> str | None:
    """Why a family cannot be served, where more is known than that it does not call transformers' interface."""
    return REFUSED.get(type(model).__module__.rpartition(".")[2].removeprefix("modeling_"))


@contextmanager
def handed_over(model: nn.Module, attend: Attend, scope: Scope) -> Iterator[None]:
    """Inside, the attention modules of `model` call `attend` for callers in the scope; on exit they are as before."""
    with ExitStack() as stack:
        for module in model.modules():
            family = family_of(module)
            if family is None:
                continue
            name = innermost_forward(module) if family.method == "forward" else family.method
            stack.enter_context(_config_kept(module))
            stack.enter_context(replaced(module, scope, functools.partial(_computed, family, module, attend), name))
        yield


def _computed(family: Family, module: nn.Module, attend: Attend, own: Any, *args: Any, **kwargs: Any) -> Any:
    return family.compute(module, attend, *args, **kwargs)


@contextmanager
def _config_kept(module: Any) -> Iterator[None]:
    """For calls that stay the module's own: Falcon's looks at what the config names, which is changed for the masks."""
    config = getattr(module, "config", None)
    if config is None:
        yield
        return
    with overlaid(module, "config", copy.copy(config)):
        yield


# --- families with a method of their own for attention: query, key and value come as (B, H, T, D) ---


def _inner(
    module: nn.Module,
    attend: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: nn.Module,
    **options: Any,
) -> Tensor:
    """(B, H, T, D) as the method returns it, in the value's dtype; CodeGen rotates queries and keys into float32."""
    dtype = torch.promote_types(query.dtype, value.dtype)
    output, _ = attend(
        module, query.to(dtype), key.to(dtype), value.to(dtype), mask, dropout=_rate(module, dropout), **options
    )
    return output.transpose(1, 2).to(value.dtype)


def _rate(module: nn.Module, dropout: Any) -> float:
    return float(getattr(dropout, "p", dropout)) if module.training else 0.0


def _scaled_inner(
    module: Any, attend: Attend, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, None]:
    """GPT-J and CodeGen; float32 scores over the square root of the head dimension."""
    return _inner(module, attend, query, key, value, attention_mask, module.attn_dropout), None


def _gpt_neox_japanese(
    module: Any, attend: Attend, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, None]:
    return _inner(module, attend, query, key, value, attention_mask, module.attention_dropout), None


def _gpt_neo(
    module: Any, attend: Attend, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, None]:
    """Unscaled scores. A buffer by row and key index makes every layer causal, and every local one a window."""
    window = module.config.window_size if module.attention_type == "local" else None
    mask = attention_mask
    if mask is not None and mask.shape[2] > 1:  # a whole mask; the buffer comes on top of it
        keys = key.shape[2]
        seen = module.bias[:, :, keys - query.shape[2] : keys, :keys]
        mask = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
    options = {"scaling": 1.0, "sliding_window": window}
    return _inner(module, attend, query, key, value, mask, module.attn_dropout, **options), None


def _openai_gpt(
    module: Any,
    attend: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    output_attentions: bool = False,
) -> list[Tensor]:
    """The key comes as (B, H, D, S); the mask, (B, 1, 1, S), is the model's own and additive."""
    mask = None if attention_mask is None else attention_mask > torch.finfo(attention_mask.dtype).min
    options = {} if module.scale else {"scaling": 1.0}
    return [_inner(module, attend, query, key.transpose(2, 3), value, mask, module.attn_dropout, **options)]


# --- families that compute attention inside forward ---


def _falcon(
    module: Any,
    attend: Attend,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """With ALiBi, scores and bias are divided by the root of the head dimension; the mask holds the bias already."""
    batch, length, _ = hidden_states.shape
    heads = module._split_heads(module.query_key_value(hidden_states))
    query, key, value = (x.transpose(1, 2) for x in heads)
    if alibi is None:
        query, key = _modeling(module).apply_rotary_pos_emb(query, key, *(position_embeddings or ()))
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    # the new architecture repeats each key head for the queries that share it
    group = key.shape[1] // module.num_kv_heads
    options: dict[str, Any] = {"dropout": 0.0}
    if alibi is not None:
        root = module.head_dim**0.5
        options = {
            "dropout": _rate(module, module.attention_dropout),
            "position_bias": alibi.reshape(batch, module.num_heads, 1, -1) / root,
            "key_bias": KeyBias(lambda count: _slopes_by_key(module, count, alibi) / root),
        }
        if attention_mask is not None:
            attention_mask = attention_mask[:, :1] > torch.finfo(attention_mask.dtype).min
    output, _ = attend(module, query, key[:, ::group], value[:, ::group], attention_mask, **options)
    return module.dense(output.reshape(batch, length, -1)), None


def _bloom(
    module: Any,
    attend: Attend,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Tensor | None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The bias is slope · (place among the tokens that are not padding)."""
    if module.pretraining_tp > 1 and module.slow_but_exact:
        raise UnsupportedModelError("BLOOM with slow_but_exact and pretraining_tp > 1 cannot be suppressed")
    batch, length, _ = hidden_states.shape
    query, key, value = module._reshape(module.query_key_value(hidden_states))
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    output, _ = attend(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=_rate(module, module.attention_dropout),
        scaling=module.inv_norm_factor,
        position_bias=alibi.view(batch, module.num_heads, 1, -1),
        key_bias=KeyBias(lambda count: _slopes_by_key(module, count, alibi)),
    )
    output = module.dense(output.reshape(batch, length, -1))
    return nn.functional.dropout(output, module.hidden_dropout, module.training) + residual, None


def _mpt(
    module: Any,
    attend: Attend,
    hidden_states: Tensor,
    position_bias: Tensor,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The bias, (H, 1, max_seq_len), is slope · (place − last place of the call)."""
    batch, length, _ = hidden_states.shape
    mixed = module.Wqkv(hidden_states)
    if module.clip_qkv:
        mixed = mixed.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    heads = mixed.reshape(batch, length, 3, module.n_heads, module.head_dim)
    query, key, value = heads.permute(2, 0, 3, 1, 4)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, module.layer_idx)

    def last(count: int) -> Tensor:
        return position_bias[..., max(0, position_bias.shape[2] - count) :]

    output, _ = attend(
        module,
        query,
        key,
        value,
        None if attention_mask is None else ~attention_mask,
        dropout=_rate(module, module.attn_dropout_p),
        scaling=module.softmax_scale,
        position_bias=last(key.shape[2])[None],
        key_bias=KeyBias(last, from_end=True),
    )
    return module.out_proj(output.reshape(batch, length, -1)), None


def _xglm(
    module: Any,
    attend: Attend,
    hidden_states: Tensor,
    key_value_states: Tensor | None = None,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if key_value_states is not None:
        raise UnsupportedModelError("XGLM cannot be suppressed where it attends to an encoder")
    batch, length, _ = hidden_states.shape
    projections = (module.q_proj(hidden_states) * module.scaling, module.k_proj(hidden_states))
    query, key, value = (
        x.view(batch, length, module.num_heads, module.head_dim).transpose(1, 2)
        for x in (*projections, module.v_proj(hidden_states))
    )
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, module.layer_idx)
    dropout = _rate(module, module.dropout)
    output, _ = attend(module, query, key, value, attention_mask, dropout=dropout, scaling=1.0)
    return module.out_proj(output.reshape(batch, length, -1)), None


def _blip_vision(module: Any, attend: Attend, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
    batch, length, _ = hidden_states.shape
    mixed = module.qkv(hidden_states).reshape(batch, length, 3, module.num_heads, -1)
    query, key, value = mixed.permute(2, 0, 3, 1, 4)
    options = {"dropout": _rate(module, module.dropout), "scaling": module.scale, "is_causal": False}
    output, _ = attend(module, query, key, value, None, **options)
    return module.projection(output.reshape(batch, length, -1)), None


def _blip_text(
    module: Any,
    attend: Attend,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Its own keys, or those of another stack: the mask of these comes under a name of its own, if it comes at all."""
    if past_key_values is not None:
        raise UnsupportedModelError("BLIP cannot be suppressed with a cache")
    is_cross = encoder_hidden_states is not None
    states = encoder_hidden_states if is_cross else hidden_states
    query, key, value = (
        x.unflatten(-1, (-1, module.attention_head_size)).transpose(1, 2)
        for x in (module.query(hidden_states), module.key(states), module.value(states))
    )
    output, _ = attend(
        module,
        query,
        key,
        value,
        encoder_attention_mask if is_cross else attention_mask,
        dropout=_rate(module, module.dropout),
        is_causal=not is_cross,
    )
    return output.flatten(2), None


def _modeling(module: nn.Module) -> Any:
    """The file of transformers that defines the module."""
    return sys.modules[type(module).__module__]


def _slopes_by_key(module: Any, count: int, like: Tensor) -> Tensor:
    """(H, 1, count), by the function that made `like`."""
    every = torch.ones(1, count, dtype=torch.long, device=like.device)
    slopes: Tensor = _modeling(module).build_alibi_tensor(every, module.num_heads, dtype=like.dtype)
    return slopes


# by the model's folder in transformers and the class
FAMILIES: dict[tuple[str, str], Family] = {
    ("gptj", "GPTJAttention"): Family("_attn", _scaled_inner),
    ("codegen", "CodeGenAttention"): Family("_attn", _scaled_inner),
    ("gpt_neo", "GPTNeoSelfAttention"): Family("_attn", _gpt_neo),
    ("gpt_neox_japanese", "GPTNeoXJapaneseAttention"): Family("_attn", _gpt_neox_japanese),
    ("openai", "Attention"): Family("_attn", _openai_gpt),
    ("falcon", "FalconAttention"): Family("forward", _falcon),
    ("bloom", "BloomAttention"): Family("forward", _bloom, positions_by_key=True),
    ("mpt", "MptAttention"): Family("forward", _mpt, mask_hides=True, positions_by_key=True),
    ("xglm", "XGLMAttention"): Family("forward", _xglm),
    ("blip", "BlipAttention"): Family("forward", _blip_vision),
    ("blip", "BlipTextSelfAttention"): Family("forward", _blip_text, cross_attends=True),
}

NO_ATTENTION = "it has no attention layers"
# by the name of the family's file
REFUSED: dict[str, str] = {
    "deepseek_v4": "beside tokens its keys are compressed blocks of them, which have no factor of their own",
    "diffusion_gemma": "it fills a canvas of tokens at once, so that no token has a probability after those before it",
    "falcon_mamba": NO_ATTENTION,
    "mamba": NO_ATTENTION,
    "mamba2": NO_ATTENTION,
    "rwkv": NO_ATTENTION,
    "xlstm": NO_ATTENTION,
}
