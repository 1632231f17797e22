"""The gradient of what is one number for many pairs of a row and a key: a position bias, or a pack's factors.

A tile of it walks over all of these pairs. Nothing is added atomically, see `backward_queries`.
"""

import triton
import triton.language as tl

from atman_kernels.backends.triton.backward_steps import exponential, pair_gradients, row_states, score
from atman_kernels.backends.triton.primitives import load_rows, sees, visible_positions


@triton.jit(do_not_specialize=["rows", "keys", "variants", "queries", "places_of_keys", "window"])
def broadcast_gradient(
    query,  # (B, Hq, rows, D)
    query_strides,
    key,  # (1|B, Hkv, keys, D), the base
    key_strides,
    value,  # (1|B, Hkv, keys, DV)
    value_strides,
    own_key,  # (1, Hkv, rows, D) of a pack; None for a dense batch, as the next four tensors
    own_key_strides,
    own_value,  # (1, Hkv, rows, DV)
    own_value_strides,
    suffix_starts,  # (V + 1,)
    prefix_lengths,  # (V,)
    base_starts,  # (V,)
    grad_output,  # (B, Hq, rows, DV)
    grad_output_strides,
    total,  # (B, Hq, rows) from `prepare_rows`
    delta,
    factors,  # (V|B, TERM_HEADS, positions) float32, or None
    positions,
    key_mask,  # (B, keys) uint8, or None
    key_mask_strides,
    bias,  # (1|B, 1|Hq, 1|rows, 1|keys), of a pack (1, 1|Hq, 1|P, 1|P) over positions, or None
    bias_strides,
    minimum,  # (B, Hq, rows) from `query_gradient`, "shifted" only; as the next two
    lowest,
    share,
    result,  # (1|V, 1|Hq, 1|queries, 1|places_of_keys) contiguous
    rows,
    keys,
    variants,  # V, or B
    queries,  # places that the result has for queries and for keys where it is not broadcast: rows and keys of a
    places_of_keys,  # dense batch, positions of a pack
    window,
    unit,
    inner_scale,
    OF: tl.constexpr,  # "bias" | "factor"
    OVER_VARIANTS: tl.constexpr,  # whether one number of the result stands for all variants,
    OVER_HEADS: tl.constexpr,  # all heads,
    OVER_QUERIES: tl.constexpr,  # all queries
    OVER_KEYS: tl.constexpr,  # and all keys
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    TERM_HEADS: tl.constexpr,
    MODE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One tile of the result. Queries and keys go by row and key of a dense batch, by position in a pack."""
    program = tl.program_id(0)
    key_blocks = 1 if OVER_KEYS else tl.cdiv(places_of_keys, BLOCK_N)
    query_blocks = 1 if OVER_QUERIES else tl.cdiv(queries, BLOCK_M)
    result_heads: tl.constexpr = 1 if OVER_HEADS else HEADS
    key_begin = program % key_blocks * BLOCK_N
    query_begin = program // key_blocks % query_blocks * BLOCK_M
    result_head = program // key_blocks // query_blocks % result_heads
    result_variant = program // key_blocks // query_blocks // result_heads

    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    summed = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for turn in range(variants if OVER_VARIANTS else 1):
        variant = turn if OVER_VARIANTS else result_variant
        # where the variant's queries and keys stand
        if suffix_starts is None:
            prefix = keys
            base_start = 0
            row_origin = 0  # the row of query 0
            first_query, last_query = 0, rows
            ahead = keys - rows  # from a query to its position
            all_keys = keys
        else:
            prefix = tl.load(prefix_lengths + variant)
            base_start = tl.load(base_starts + variant)
            suffix_start = tl.load(suffix_starts + variant)
            suffix = tl.load(suffix_starts + variant + 1) - suffix_start
            row_origin = suffix_start - prefix
            first_query, last_query = prefix, prefix + suffix
            ahead = 0
            all_keys = prefix + suffix
        batch = tl.cast(variant if suffix_starts is None else 0, tl.int64)
        key_stop = all_keys
        if not OVER_QUERIES:
            first_query = tl.maximum(first_query - query_begin, 0) // BLOCK_M * BLOCK_M + query_begin
            last_query = tl.minimum(last_query, query_begin + BLOCK_M)
        elif not OVER_KEYS and IS_CAUSAL:
            first_query = tl.maximum(first_query, key_begin - ahead)
        if not OVER_KEYS:
            key_stop = tl.minimum(key_stop, key_begin + BLOCK_N)

        for head in range(0 if OVER_HEADS else result_head, HEADS if OVER_HEADS else result_head + 1):
            kv_head = tl.cast(head // (HEADS // KV_HEADS), tl.int64)
            wide_head = tl.cast(head, tl.int64)
            for query_start in range(first_query, last_query, BLOCK_M):
                at_query = query_start + tl.arange(0, BLOCK_M)
                row_exists = at_query < last_query
                if suffix_starts is not None:
                    row_exists = row_exists & (at_query >= prefix)
                row = tl.where(row_exists, at_query + row_origin, 0)
                offset = (batch * HEADS + wide_head) * rows + row
                b_query = load_rows(query, query_strides, batch, wide_head, row, D, BLOCK_D)
                b_grad = load_rows(grad_output, grad_output_strides, batch, wide_head, row, DV, BLOCK_DV)
                states = row_states(total, delta, minimum, lowest, share, offset, row_exists, MODE, 1)
                first, last = visible_positions(at_query + ahead, 0, all_keys, window, IS_CAUSAL)
                last = tl.where(row_exists, last, 0)
                seen_stop = tl.minimum(key_stop, tl.max(last))
                for key_start in range(0 if OVER_KEYS else key_begin, seen_stop, BLOCK_N):
                    at_key = key_start + tl.arange(0, BLOCK_N)
                    key_exists = at_key < key_stop
                    visible = sees(at_key, first, last)
                    b_factor = None
                    if factors is not None:
                        word = tl.cast(variant, tl.int64) * TERM_HEADS + head % TERM_HEADS
                        b_factor = tl.load(factors + word * positions + at_key, mask=key_exists, other=1.0)[None, :]
                    b_bias = None
                    if bias is not None:
                        o_bias = (
                            batch * bias_strides[0]
                            + wide_head * bias_strides[1]
                            + at_query.to(tl.int64) * bias_strides[2]
                        )
                        p_bias = bias + o_bias[:, None] + at_key.to(tl.int64)[None, :] * bias_strides[3]
                        b_bias = tl.load(p_bias, mask=visible, other=float("-inf")).to(tl.float32)
                        visible &= b_bias > float("-inf")
                    if key_mask is not None:
                        p_mask = key_mask + batch * key_mask_strides[0] + at_key.to(tl.int64) * key_mask_strides[1]
                        visible &= (tl.load(p_mask, mask=key_exists, other=0) != 0)[None, :]

                    base_index = (base_start + at_key).to(tl.int64)
                    p_key = key + batch * key_strides[0] + kv_head * key_strides[1] + base_index * key_strides[2]
                    p_value = (
                        value + batch * value_strides[0] + kv_head * value_strides[1] + base_index * value_strides[2]
                    )
                    p_key = p_key[:, None] + o_d[None, :] * key_strides[3]
                    p_value = p_value[:, None] + o_dv[None, :] * value_strides[3]
                    if suffix_starts is not None:
                        own = (at_key >= prefix)[:, None]
                        own_index = (at_key + row_origin).to(tl.int64)
                        p_own = own_key + kv_head * own_key_strides[1] + own_index * own_key_strides[2]
                        p_key = tl.where(own, p_own[:, None] + o_d[None, :] * own_key_strides[3], p_key)
                        p_own = own_value + kv_head * own_value_strides[1] + own_index * own_value_strides[2]
                        p_value = tl.where(own, p_own[:, None] + o_dv[None, :] * own_value_strides[3], p_value)
                    b_key = tl.load(p_key, mask=key_exists[:, None] & (o_d[None, :] < D), other=0.0)
                    b_value = tl.load(p_value, mask=key_exists[:, None] & (o_dv[None, :] < DV), other=0.0)

                    product = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION)
                    scores, _ = score(product, b_bias, unit, inner_scale, SOFTCAP)
                    by_weight = tl.dot(b_grad, tl.trans(b_value), input_precision=PRECISION) - states[1]
                    exponentials = exponential(scores, b_factor, True, states, unit, MODE, OF == "factor")
                    exponentials = tl.where(visible, exponentials, 0.0)
                    by_weight = tl.where(visible, by_weight, 0.0)
                    scores = tl.where(visible, scores, 0.0)
                    _, by_score, by_factor = pair_gradients(
                        exponentials,
                        by_weight,
                        scores,
                        b_factor,
                        True,
                        at_key[None, :],
                        visible,
                        states,
                        unit,
                        MODE,
                        OF == "factor",
                    )
                    summed += by_factor if OF == "factor" else by_score

    at_query = query_begin + tl.arange(0, BLOCK_M)
    at_key = key_begin + tl.arange(0, BLOCK_N)
    if OVER_QUERIES:
        summed = tl.sum(summed, 0, keep_dims=True) + tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if OVER_KEYS:
        summed = tl.sum(summed, 1, keep_dims=True) + tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    result_queries = 1 if OVER_QUERIES else queries
    result_keys = 1 if OVER_KEYS else places_of_keys
    place = tl.cast(result_variant, tl.int64) * result_heads + result_head
    place = (place * result_queries + at_query.to(tl.int64))[:, None] * result_keys + at_key.to(tl.int64)[None, :]
    inside = (at_query < result_queries)[:, None] & (at_key < result_keys)[None, :]
    tl.store(result + place, summed.to(result.dtype.element_ty), mask=inside)
