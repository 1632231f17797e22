"""The contenders: ours, and the other ways to get token scores out of a language model.

Each gives (K, m) scores in float32, positive = important: how much the log-prob of every target token falls when the
token at one of K positions is suppressed. Captum's ablation replaces the token instead, so its scores are its own.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from atman_kernels.backends import cpu
from atman_kernels.backends.cpu import blocked
from benchmarks.prompts import Case

DENSE_FACTOR = "atman_bench_dense_factor"


class Contender(Protocol):
    name: str
    batch: int  # sequences per forward

    def scores(self, case: Case, positions: Sequence[int]) -> Tensor: ...


def factor_rows(case: Case, positions: Sequence[int], factor: float) -> Tensor:
    """(K + 1, L) float32: a row of ones, the base, and one row per position with that key turned down."""
    rows = torch.ones(len(positions) + 1, len(case.inputs))
    rows[torch.arange(1, len(rows)), torch.as_tensor(positions)] = factor
    return rows


def target_log_probs(logits: Tensor, case: Case) -> Tensor:
    """(B, m, vocabulary) logits of the target rows -> (B, m) float32."""
    wanted = case.target_ids.expand(logits.shape[0], -1)[..., None]
    return logits.float().log_softmax(-1).gather(-1, wanted)[..., 0]


def drop(log_probs: Tensor) -> Tensor:
    """(K + 1, m) with the base first -> (K, m): base minus suppressed."""
    return log_probs[:1] - log_probs[1:]


# Peer: eager attention with a dense factor tensor ---------------------------------------------------------------

_dense_factor: ContextVar[tuple[Tensor, str]] = ContextVar("atman_bench_dense_factor")


def dense_factor_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention over materialised scores (B, Hq, L, L), changed by a factor tensor (B, 1, L, L) in every layer."""
    factor, mode = _dense_factor.get()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.mT * scaling
    if mode == "log_additive":
        scores = scores + factor  # its logarithm already
    elif mode == "multiplicative":
        scores = scores * factor
    else:
        lowest = scores.masked_fill(attention_mask < 0, math.inf).amin(-1, keepdim=True)
        scores = lowest + (scores - lowest) * factor
    weights = (scores + attention_mask).softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(DENSE_FACTOR, dense_factor_attention)
AttentionMaskInterface.register(DENSE_FACTOR, eager_mask)


class DenseEager:
    """Full recomputation in batches, as AtMan's authors do it: eager attention, a dense factor in every layer.

    Logits are computed at the target rows only, which is more than the authors' code does; `full_logits` takes
    that back.
    """

    def __init__(self, model: Any, factor: float, mode: str, batch: int = 4, full_logits: bool = False) -> None:
        self.name = "eager_full_logits" if full_logits else "eager"
        self.model, self.factor, self.mode, self.batch, self.full_logits = model, factor, mode, batch, full_logits

    @torch.inference_mode()
    def scores(self, case: Case, positions: Sequence[int]) -> Tensor:
        rows = factor_rows(case, positions, self.factor)
        with _attention(self.model, DENSE_FACTOR):
            return drop(torch.cat([self._log_probs(case, chunk) for chunk in rows.split(self.batch)]))

    def _log_probs(self, case: Case, rows: Tensor) -> Tensor:
        batch, length = rows.shape
        rows = rows.log() if self.mode == "log_additive" else rows
        dense = (
            rows.to(self.model.device, self.model.dtype)[:, None, None, :].expand(batch, 1, length, length).contiguous()
        )
        token = _dense_factor.set((dense, self.mode))
        try:
            ids = case.inputs.expand(batch, -1)
            if self.full_logits:
                logits = self.model(ids, use_cache=False).logits[:, case.target_rows]
            else:
                logits = self.model(ids, use_cache=False, logits_to_keep=case.target_rows).logits
        finally:
            _dense_factor.reset(token)
        return target_log_probs(logits, case)


# Peer: SDPA with a float bias -----------------------------------------------------------------------------------


class BiasedSdpa:
    """Full recomputation in batches through PyTorch's fused attention; the bias (B, 1, L, L) is causal + ln c."""

    name = "sdpa"

    def __init__(self, model: Any, factor: float, mode: str, batch: int = 4) -> None:
        if mode != "log_additive":
            raise ValueError(f"a bias can only express mode 'log_additive', got {mode!r}")
        self.model, self.factor, self.batch = model, factor, batch

    @torch.inference_mode()
    def scores(self, case: Case, positions: Sequence[int]) -> Tensor:
        rows = factor_rows(case, positions, self.factor).log().to(self.model.dtype)
        length = rows.shape[1]
        causal = torch.full((length, length), -math.inf, dtype=self.model.dtype).triu(1)
        with _attention(self.model, "sdpa"):
            return drop(torch.cat([self._log_probs(case, causal, chunk) for chunk in rows.split(self.batch)]))

    def _log_probs(self, case: Case, causal: Tensor, rows: Tensor) -> Tensor:
        bias = causal + rows[:, None, None, :]
        ids = case.inputs.expand(rows.shape[0], -1)
        output = self.model(ids, attention_mask=bias, use_cache=False, logits_to_keep=case.target_rows)
        return target_log_probs(output.logits, case)


# Peer: captum ---------------------------------------------------------------------------------------------------


class CaptumAblation:
    """`LLMAttribution(FeatureAblation)` in the fastest setting that is right.

    One forward per token (`forward_in_tokens=False`), plain causal SDPA without a mask, no K/V cache. It cannot
    batch them (`perturbations_per_eval > 1` fails for language models), and it computes logits for every row.
    """

    name = "captum"
    batch = 1
    baseline = 0  # captum's default: the id that a removed token is replaced by

    def __init__(self, model: Any, tokenizer: Any) -> None:
        from captum.attr import FeatureAblation, LLMAttribution  # type: ignore[import-untyped]

        self.model, self.tokenizer = model, tokenizer
        self.attribution = LLMAttribution(FeatureAblation(model), tokenizer)

    @torch.inference_mode()
    def scores(self, case: Case, positions: Sequence[int]) -> Tensor:
        tokens = _token_input(case, positions, self.tokenizer, self.baseline)
        with _attention(self.model, "sdpa"), _no_cache(self.model):
            result = self.attribution.attribute(tokens, target=case.target_ids, forward_in_tokens=False)
        return result.token_attr.T  # (m, K) -> (K, m)

    @torch.inference_mode()
    def expected_scores(self, case: Case, positions: Sequence[int]) -> Tensor:
        """What captum should give, from forwards of our own with the token replaced."""
        rows = case.inputs.repeat(len(positions) + 1, 1)
        rows[torch.arange(1, len(rows)), torch.as_tensor(positions)] = self.baseline
        with _attention(self.model, "sdpa"):
            logits = [self.model(row[None], use_cache=False, logits_to_keep=case.target_rows).logits for row in rows]
        return drop(target_log_probs(torch.cat(logits), case))


def _token_input(case: Case, positions: Sequence[int], tokenizer: Any, baseline: int) -> Any:
    """Captum's token input, with only the tokens at `positions` as features."""
    from captum.attr import TextTokenInput

    tokens = TextTokenInput(case.prompt, tokenizer, baselines=baseline)
    if not torch.equal(tokens.inp_tensor[0], case.ids[: case.prompt_tokens]):
        raise RuntimeError("captum tokenized the prompt differently from the other contenders")
    if len(positions) < case.prompt_tokens:  # the state that `skip_tokens` leaves; that option goes by token id
        tokens.itp_mask = torch.zeros_like(tokens.inp_tensor, dtype=torch.bool)
        tokens.itp_mask[0, list(positions)] = True
        tokens.itp_tensor = tokens.inp_tensor[tokens.itp_mask][None]
        tokens.values = tokenizer.convert_ids_to_tokens(tokens.itp_tensor[0].tolist())
        tokens.n_itp_features = len(positions)
    return tokens


# Ours -----------------------------------------------------------------------------------------------------------


class Ours:
    """`atman_kernels.Explainer`, one token per unit."""

    name = "ours"
    batch = 1

    def __init__(self, model: Any, tokenizer: Any, factor: float, mode: str, token_budget: int | None = None) -> None:
        import atman_kernels as ak

        self.model = model
        self.explainer = ak.Explainer(
            model, tokenizer, mode=mode, factor=factor, token_budget=token_budget, progress=False
        )
        self.stats: dict[str, Any] = {}
        self.path = ""

    def scores(self, case: Case, positions: Sequence[int]) -> Tensor:
        everything = list(positions) == list(range(case.prompt_tokens))
        units: Any = "token" if everything else [case.spans[position] for position in positions]
        with _attention(self.model, "sdpa"):
            explanation = self.explainer.explain(case.prompt, target=case.target, units=units)
        owned = [unit.token_indices for unit in explanation.units]
        if owned != [(position,) for position in positions]:
            raise RuntimeError(f"units do not own the tokens at {list(positions)}, but {owned}")
        self.stats, self.path = explanation.stats, str(explanation.settings.get("path"))
        return explanation.scores


class OursWithoutModule(Ours):
    """The same with attention made of torch's products, as where the compiled module was not built."""

    name = "ours_torch"

    def scores(self, case: Case, positions: Sequence[int]) -> Tensor:
        with patch.object(cpu, "_implementation", lambda _: blocked):
            return super().scores(case, positions)


# Switches -------------------------------------------------------------------------------------------------------


@contextmanager
def _attention(model: Any, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _no_cache(model: Any) -> Iterator[None]:
    before = model.config.use_cache
    model.config.use_cache = False
    try:
        yield
    finally:
        model.config.use_cache = before
