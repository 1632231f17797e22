"""FlexAttention in its best form for each group: static shapes, compiled, factors captured by the score function.

Variants that share a prefix are rows of one sequence whose factors are read by row // rows per variant; their few own
keys are a second, small attention, and the two are merged by their log-sum-exps, all in one compiled function.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from benchmarks.gpu.masks import BLOCK, Visible, block_states, dense_visible, joined, pack_visible
from benchmarks.gpu.problems import DenseProblem, PackProblem

Call = Callable[[], Tensor]
compiles = True  # False: FlexAttention's own slow form, to check these functions where compiling takes too long


def dense(problem: DenseProblem, factor: Tensor) -> Call:
    log_factor, shape = factor.log(), problem.shape
    ahead = shape.keys - shape.queries

    def suppressed(score: Tensor, b: Tensor, _h: Tensor, _q: Tensor, k: Tensor) -> Tensor:
        return score + log_factor[b, k]

    def causal(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k <= q + ahead

    mask = None
    if shape.is_causal and shape.queries > 1:
        mask = _block_mask(shape.queries, shape.keys, dense_visible(problem), causal)
    attend = _compiled(flex_attention)
    options = {"score_mod": suppressed, "block_mask": mask, "enable_gqa": True}
    return lambda: attend(problem.query, problem.key, problem.value, **options)


def pack(problem: PackProblem, factor: Tensor) -> Call:
    """One call over the pack's rows and the base's keys beside the rows' own."""
    log_factor, base = factor.log(), problem.shape.base
    variants, positions = problem.pack.row_variant.long(), problem.pack.row_position
    prefixes = problem.pack.prefix_lengths
    key_variant = torch.cat([torch.full((base,), -1, device=variants.device), variants])
    key_position = torch.cat([torch.arange(base, device=variants.device), positions])

    def suppressed(score: Tensor, _b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + log_factor[variants[q], key_position[k]]

    def sees(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (key_variant[k] == variants[q]) & (key_position[k] <= positions[q])
        return own | ((k < base) & (key_position[k] < prefixes[variants[q]]))

    rows = problem.shape.rows
    mask = _block_mask(rows, base + rows, pack_visible(problem), sees)
    key, value = joined(problem)
    attend = _compiled(flex_attention)
    options = {"score_mod": suppressed, "block_mask": mask, "enable_gqa": True}
    return lambda: attend(problem.query[None], key[None], value[None], **options)


def shared_prefix(problem: PackProblem, factor: Tensor) -> Call:
    shape, heads = problem.shape, problem.shape.heads
    variants, rows, prefix = shape.variants, shape.suffixes[0], shape.base
    log_factor = factor.log()
    own_bias = log_factor[:, prefix : prefix + rows]  # [V, rows]
    hidden = torch.ones(rows, rows, dtype=torch.bool, device=factor.device).triu(1)
    own_bias = own_bias[:, None].masked_fill(hidden, -torch.inf)  # [V, rows, rows]
    group, scale = heads.query // heads.kv, heads.dim**-0.5

    def suppressed(score: Tensor, _b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + log_factor[q // rows, k]

    def attend(query: Tensor, key: Tensor, value: Tensor, base_key: Tensor, base_value: Tensor) -> Tensor:
        output, aux = flex_attention(
            query[None],
            base_key[None],
            base_value[None],
            score_mod=suppressed,
            enable_gqa=True,
            return_aux=AuxRequest(lse=True),
        )
        own_query = query.reshape(heads.kv, group, variants, rows, -1)
        own_key, own_value = (x.reshape(heads.kv, 1, variants, rows, -1) for x in (key, value))
        scores = (own_query @ own_key.mT).float() * scale + own_bias  # [Hkv, group, V, rows, rows]
        own_lse = scores.logsumexp(dim=-1).clamp(min=-1e30)  # finite where factors of 0 leave a row no own key
        own_output = (scores - own_lse[..., None]).exp().to(value.dtype) @ own_value
        assert aux.lse is not None
        own_output, own_lse = own_output.reshape(output.shape), own_lse.reshape(aux.lse.shape)
        share = torch.sigmoid(own_lse - aux.lse)[..., None]  # of the suffix's keys
        return (output * (1 - share) + own_output * share).to(query.dtype)

    compiled = _compiled(attend)
    p = problem
    return lambda: compiled(p.query, p.key, p.value, p.base_key, p.base_value)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Afresh for every problem: past a number of recompilations torch runs the slow form without a word."""
    if not compiles:
        return function
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)


def _block_mask(rows: int, keys: int, visible: Visible, mask_mod: Callable[..., Tensor]) -> BlockMask:
    """FlexAttention's block mask, made a few rows at a time: `create_block_mask` holds all rows x keys at once."""
    some, every = block_states(rows, visible, keys)
    partial, full = (_ordered(states) for states in (some & ~every, every))
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK, mask_mod, seq_lengths=(rows, keys))


def _ordered(states: Tensor) -> tuple[Tensor, Tensor]:
    """(1, 1, row blocks) counts and (1, 1, row blocks, key blocks) indices, those that count first."""
    indices = states.int().argsort(dim=1, descending=True, stable=True)
    return states.sum(dim=1, dtype=torch.int32)[None, None], indices.to(torch.int32)[None, None]
