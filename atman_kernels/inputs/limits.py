"""What a model can read: how many positions it has, and which token ids it knows. Both are checked before it runs."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from atman_kernels.errors import InputError
from atman_kernels.hf.models.packability import grows_with_length
from atman_kernels.hf.models.parts import decoder_of

# how configs call it: of decoders that attend to an encoder, in general, MPT's ALiBi
_POSITIONS = ("max_target_positions", "max_position_embeddings", "max_seq_len")


def positions_of(stack: nn.Module, owner: nn.Module | None = None) -> int | None:
    """How many tokens a stack of layers reads at most; None where nothing limits it.

    Args:
        stack: a decoder or an encoder.
        owner: what to look into for position embeddings, if not the stack itself.

    Example:
        >>> from transformers import OPTConfig, OPTForCausalLM
        >>> config = OPTConfig(vocab_size=9, hidden_size=8, ffn_dim=8, num_attention_heads=2, num_hidden_layers=1,
        ...                    max_position_embeddings=16)
        >>> positions_of(OPTForCausalLM(config))
        16
    """
    for name, module in (owner or stack).named_modules():
        # RoBERTa and its kin count from behind the padding's index, which their configs leave out of account
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.num_embeddings) - int(module.padding_idx) - 1
    found = (getattr(stack.config, name, None) for name in _POSITIONS)
    return next((most for most in found if isinstance(most, int)), None)


def language_positions(model: nn.Module) -> int | None:
    """As `positions_of`, of a model in which prompt and answer are one sequence."""
    return None if grows_with_length(model) else positions_of(decoder_of(model))


def check_length(length: int, most: int | None, what: str = "prompt and target have") -> None:
    """Raises InputError if so many tokens are more than the model's positions."""
    if most is not None and length > most:
        raise InputError(f"{what} {length} tokens, but the model has {most} positions")


def room_for_answer(before: int, most: int | None, wanted: int) -> int:
    """How many tokens a model may answer with: as many as are wanted, or as its positions hold.

    The last one is predicted and never read, so that n tokens and an answer of m take n + m − 1 positions.

    Args:
        before: n, tokens before the answer; at least one and at most all positions.

    >>> room_for_answer(12, 16, 32), room_for_answer(16, 16, 32), room_for_answer(12, None, 32)
    (5, 1, 32)
    """
    return wanted if most is None else min(wanted, most - before + 1)


def check_ids(model: Any, tokenizer: Any, ids: Sequence[int], name: str) -> None:
    """Raises InputError if a token's id is beyond those that the model has embeddings for.

    Args:
        model: of which the input embeddings count, and the output's where ids are predicted.
        name: whose ids they are, "prompt" or "target".
    """
    known = [_rows(model, "get_input_embeddings")]
    if name == "target":
        known.append(_rows(model, "get_output_embeddings"))
    most = min((count for count in known if count is not None), default=None)
    wrong = next((i for i in ids if i < 0 or (most is not None and i >= most)), None)
    if wrong is not None and wrong < 0:
        raise InputError(f"{name}: token ids must be >= 0, got {wrong}")
    if wrong is not None:
        worst = max(ids)
        raise InputError(
            f"{name}: token {tokenizer.convert_ids_to_tokens(wrong)!r} has id {wrong}, but {type(model).__name__} has "
            f"embeddings for {most} ids; where tokens were added to the tokenizer, call "
            f"model.resize_token_embeddings({max(len(tokenizer), worst + 1)}) and train them"
        )


def _rows(model: Any, getter: str) -> int | None:
    """Ids that a table of embeddings or a head serves, whatever its weight is stored as; None if it does not tell."""
    try:
        module = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None
    weight: Any = getattr(module, "weight", None)
    told = [getattr(module, name, None) for name in ("num_embeddings", "out_features")]
    told += [weight.shape[0]] if getattr(weight, "ndim", 0) == 2 else []
    return max((int(count) for count in told if count is not None), default=None)
