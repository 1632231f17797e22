"""A model's own answer: what it says greedily, whatever its generation config asks for beside that."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from atman_kernels.errors import InputError
from atman_kernels.hf.models.ranks import Ranks, ranks_of
from atman_kernels.progress import Listener, listener

# One answer, as a tensor of ids, by plain greedy search. What a config says of logits and of stopping stays.
_GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "output_logits": False,
    # other ways to search, and to guess several tokens at a time
    "constraints": None,
    "force_words_ids": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "num_beam_groups": None,
    "use_mtp": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "token_healing": False,
    # what is faster or smaller elsewhere, and what depends on the clock
    "cache_implementation": None,
    "compile_config": None,
    "max_time": None,
    "max_length": None,
    # of beams and draws, of which transformers would say that they are not used
    "early_stopping": False,
    "length_penalty": 1.0,
    "temperature": None,
    "top_k": None,
    "top_p": None,
    "min_p": None,
    "top_h": None,
    "typical_p": None,
    "epsilon_cutoff": None,
    "eta_cutoff": None,
}


def generated(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    inputs: dict[str, Tensor],
    before: int,
    max_new_tokens: int,
    *,
    generate: Callable[..., Tensor] | None = None,
    **options: Any,
) -> list[int]:
    """Token ids of the model's own greedy answer, with what ends it. Its generation config is read, not changed.

    Args:
        model: which answers.
        tokenizer: its tokenizer, by which stop strings are found.
        inputs: arguments of its `generate`, batch 1.
        before: tokens at the beginning of what `generate` returns that are no answer.
        max_new_tokens: at most; see `limits.room_for_answer`.
        generate: in place of the model's own.
        options: more of `generate`'s.

    Raises:
        InputError: the config has stop strings that cannot be looked for with this tokenizer.
    """
    config = getattr(model, "generation_config", None)
    known = GenerationConfig()  # versions of transformers have some options and not others
    asked = {name: value for name, value in _GREEDY.items() if hasattr(known, name)}
    asked |= {"max_new_tokens": max_new_tokens, **options}
    stops = getattr(config, "stop_strings", None)
    if stops:
        asked["tokenizer"] = tokenizer
    if asked.get("pad_token_id") is None and getattr(config, "pad_token_id", None) is None:  # it would say so
        asked["pad_token_id"] = next(iter([*_ids(tokenizer.pad_token_id), *sorted(end_ids(model, tokenizer)), 0]))
    heard, ranks = listener(), ranks_of(model)
    if heard is not None or ranks.size > 1:
        asked["streamer"] = _Telling((heard or Listener()).answering(), ranks)
    if ranks.stage is not None:  # later stages cannot tell from a cache where a token stands
        asked["use_cache"] = False
    ranks.agree("the model's own answer", tokens=inputs, max_new_tokens=max_new_tokens)
    try:
        with ranks.forward():
            output = (generate or model.generate)(**inputs, **asked)
    except ValueError as error:
        if not stops:
            raise
        said = str(error).strip().splitlines()[0]
        raise InputError(
            f"model.generation_config.stop_strings, {stops!r}, do not go with this model: {said}"
        ) from error
    return output[0, before:].tolist()


class _Telling(BaseStreamer):
    """Passes on the ids of an answer, one by one; `generate` gives a streamer what was there before, first."""

    def __init__(self, tell: Callable[[int], object], ranks: Ranks) -> None:
        self._tell, self._ranks, self._begun = tell, ranks, False

    def put(self, value: Tensor) -> None:
        if self._begun:
            for token in value.flatten().tolist():
                self._tell(token)
            self._ranks.agree("a token of the model's own answer", token=value)
        self._begun = True

    def end(self) -> None:
        pass


def end_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Token ids that end an answer."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return {*_ids(tokenizer.eos_token_id), *_ids(configured)}


def without_ends(answer: list[int], ends: set[int]) -> list[int]:
    """The answer without the marks at its end; nothing may be left."""
    while answer and answer[-1] in ends:
        answer = answer[:-1]
    return answer


def check_said(answer: list[int]) -> list[int]:
    """Raises InputError if there is none."""
    if not answer:
        raise InputError("target: the model answers this prompt with nothing; give the target to explain")
    return answer


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(each) for each in (value.flatten().tolist() if isinstance(value, Tensor) else _as_list(value))]


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple | set) else [value]
