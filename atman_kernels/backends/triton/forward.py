"""The kernels: one tile of rows against the keys of its bases, then against the rows of its own variants.

A tile holds BLOCK_M rows of one key head. A row is one query head of the head's group at one place of the sequence,
so that a group shares the loads of its keys. Every row sees one interval of base keys and one interval of the pack's
own rows; that alone is a causal mask, a sliding window, a prefix length and a variant's border. A dense batch is the
pack in which every batch entry is a variant whose prefix is all keys and which has no rows of its own.
"""

import triton
import triton.language as tl

from atman_kernels.backends.triton.primitives import (
    ALIGNED,
    FAR,
    FLAGS,
    LN_2,
    LOG2_E,
    OWN,
    add_sink,
    flags_of_block,
    keys_of_part,
    load_rows,
    next_part,
    online_softmax,
    reach,
    reciprocal,
    rows_of_program,
    sees,
    share_of,
    suppress,
    suppression_term,
    tanh,
    untouched_term,
    visible_positions,
)

CHUNKS: tl.constexpr = tl.constexpr(4)  # parts of a row of factors, each with a program that flags it
HEADER: tl.constexpr = tl.constexpr(4 * CHUNKS.value)  # float32 before a row of terms: two words for each chunk


@triton.jit
def _is_flagged(p_flags, flag):
    """Whether a flag is set, from pointers to the headers of rows of terms, in bytes."""
    byte = flag // (FLAGS // CHUNKS) * 8 + flag // 8
    return (tl.load(p_flags + byte) >> (flag % 8).to(tl.uint8) & 1) != 0


@triton.jit
def _sweep(
    accumulator,  # [BLOCK_M, BLOCK_DV] weighted values so far
    extreme,  # [BLOCK_M] largest score so far, as an exponent; in the minimum pass the smallest score
    total,  # [BLOCK_M] sum of weights so far
    query,  # [BLOCK_M, BLOCK_D]
    keys_and_values,  # (pointer to the keys of one head, its two strides, pointer to its values, its two strides)
    first,  # [BLOCK_M] each row sees the keys [first, last) of them
    last,
    split,
    num_splits,
    origin,  # index of the key at position 0
    terms,  # None, or pointer to the terms of the first row
    term_rows,  # None if all rows have the same terms; else (whether they do, distance of two rows of terms,
    # [BLOCK_M] which each row has, the first of them 0)
    flags,  # None without terms; else (flags of all rows, touched_shift, positions [first, last) that are not 1)
    key_mask,  # None, or (pointer to one sequence's, stride)
    bias,  # None, or (pointer, [BLOCK_M] offset of key 0, stride)
    row_minimum,  # [BLOCK_M], read by "shifted"
    unit,
    inner_scale,
    MODE: tl.constexpr,
    MINIMUM_PASS: tl.constexpr,
    SPARSE_TERMS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """All rows of a tile against one array of keys, or against this split's share of it."""
    key, key_row_stride, key_stride, value, value_row_stride, value_stride = keys_and_values
    first, last, start, stop, full_start, full_stop = reach(first, last, origin)
    start, stop = share_of(start, stop, split, num_splits, BLOCK_N)

    if term_rows is not None:
        one_term_row, pitch, row_word = term_rows
    if flags is not None:
        touched, touched_shift, touched_first, touched_last = flags
        untouched: tl.constexpr = untouched_term(MODE)
    if key_mask is not None:
        p_mask, mask_stride = key_mask
    if bias is not None:
        p_bias, bias_row, bias_stride = bias
        bias_unit = 1 / (unit * LN_2)
    # Terms of single rows that are only added go where the product's sums begin: registers are what there is least of.
    ADDED_FIRST: tl.constexpr = term_rows is not None and MODE == "log_additive" and not SOFTCAP and inner_scale is None
    hidden = float("inf") if MINIMUM_PASS else float("-inf")

    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    p_key = key + o_n.to(tl.int64)[:, None] * key_row_stride + o_d[None, :] * key_stride
    p_value = value + o_n.to(tl.int64)[:, None] * value_row_stride + o_dv[None, :] * value_stride

    for block in tl.range(start, stop, BLOCK_N):
        keys = block + o_n
        in_reach = keys < stop
        # What is read per row and key is read before the product of queries and keys: the compiler then spreads
        # the scores over threads as the product leaves them, not as these loads would like it.
        if terms is not None:
            position = tl.multiple_of(block - origin, ALIGNED)
            p_terms = terms + position + o_n
            # BLOCK_N <= 1 << touched_shift, so a block's keys have at most two flags: the second's begin at `border`
            first_flag, last_flag, flagged = flags_of_block(touched, touched_shift, position, BLOCK_N)
            border = tl.multiple_of((last_flag << touched_shift).to(tl.int32), 16)
            before_border = position + o_n < border
            flagged &= (position < touched_last) & (position + BLOCK_N > touched_first)
            shared = flagged
            if term_rows is not None:
                shared = flagged & one_term_row
                gathered = flagged & (not one_term_row)
                row_terms = tl.full([BLOCK_M, BLOCK_N], untouched, tl.float32)
                if gathered:
                    o_row = row_word.to(tl.int64) * pitch  # here, so that 64 bits per row do not stay in registers
                    p_row_terms = o_row[:, None] + p_terms[None, :]
                    if SPARSE_TERMS:
                        p_flags = (terms - HEADER).to(tl.pointer_type(tl.uint8)) + o_row * 4
                        in_first = _is_flagged(p_flags, first_flag)[:, None] & before_border[None, :]
                        there = in_first | (_is_flagged(p_flags, last_flag)[:, None] & ~before_border[None, :])
                        row_terms = tl.load(p_row_terms, mask=there, other=untouched)
                    else:
                        row_terms = tl.load(p_row_terms)
        if bias is not None:
            o_bias = bias_row[:, None] + keys.to(tl.int64)[None, :] * bias_stride
            b_bias = tl.load(p_bias + o_bias, mask=sees(keys, first, last), other=float("-inf")).to(tl.float32)

        p_block = p_key + tl.cast(block, tl.int64) * key_row_stride
        b_key = tl.load(p_block, mask=in_reach[:, None] & (o_d[None, :] < D), other=0.0)
        if ADDED_FIRST:
            scores = tl.dot(query, tl.trans(b_key), row_terms, input_precision=PRECISION)
        else:
            scores = tl.dot(query, tl.trans(b_key), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if inner_scale is not None:
            scores *= inner_scale
        if SOFTCAP:
            scores = tanh(scores)
        if bias is not None:
            scores += tl.where(b_bias > float("-inf"), b_bias, 0.0) * bias_unit

        if terms is not None:
            if shared:
                if SPARSE_TERMS:
                    in_first, in_last = (touched >> first_flag & 1) != 0, (touched >> last_flag & 1) != 0
                    there = (before_border & in_first) | (~before_border & in_last)
                    b_terms = tl.load(p_terms, mask=there, other=untouched)
                else:
                    b_terms = tl.load(p_terms)
                scores = suppress(scores, b_terms[None, :], row_minimum, MODE)
            if term_rows is not None and not ADDED_FIRST:  # noqa: SIM102, the first is decided when compiling
                if gathered:
                    scores = suppress(scores, row_terms, row_minimum, MODE)
        if (block < full_start) | (block + BLOCK_N > full_stop):
            scores = tl.where(sees(keys, first, last), scores, hidden)
        if key_mask is not None:
            b_mask = tl.load(p_mask + keys.to(tl.int64) * mask_stride, mask=in_reach, other=0)
            scores = tl.where((b_mask != 0)[None, :], scores, hidden)
        if bias is not None:
            scores = tl.where(b_bias > float("-inf"), scores, hidden)

        if MINIMUM_PASS:
            extreme = tl.minimum(extreme, tl.min(scores, 1))
        else:
            weights, extreme, total, rescale = online_softmax(scores, extreme, total, unit)
            p_block = p_value + tl.cast(block, tl.int64) * value_row_stride
            b_value = tl.load(p_block, mask=in_reach[:, None] & (o_dv[None, :] < DV), other=0.0)
            accumulator *= rescale[:, None]
            accumulator = tl.dot(weights.to(b_value.dtype), b_value, accumulator, input_precision=PRECISION)
    return accumulator, extreme, total


@triton.jit(do_not_specialize=["rows", "keys", "num_tiles", "num_splits", "window", "touched_shift"])
def attention(
    query,  # (B, Hq, rows, D)
    query_strides,
    key,  # (1|B, Hkv, keys, D), the base
    key_strides,
    value,  # (1|B, Hkv, keys, DV)
    value_strides,
    own_key,  # (1, Hkv, rows, D) of a pack; None for a dense batch, as everything down to row_variant
    own_key_strides,
    own_value,  # (1, Hkv, rows, DV)
    own_value_strides,
    suffix_starts,  # (V + 1,)
    prefix_lengths,  # (V,)
    base_starts,  # (V,)
    row_variant,  # (rows,)
    terms,  # (V|B, TERM_HEADS, pitch) float32 from `prepare_factors`, or None; so are the next three
    touched_shift,
    pitch,  # a multiple of 16, which the compiler is told
    own_terms,  # (TERM_HEADS, rows) float32, from there as well; None for a dense batch
    key_mask,  # (B, keys) uint8, or None
    key_mask_strides,
    bias,  # (1|B, 1|Hq, 1|rows, 1|keys), of a pack (1, 1|Hq, 1|P, 1|P) over positions, or None
    bias_strides,  # 0 where it is broadcast
    sinks,  # (Hq,), or None
    sinks_stride,
    minimum,  # (num_splits, B, Hq, rows): written by the minimum pass, read by "shifted"; else None
    output,  # (num_splits, B, Hq, rows, DV), float32 if there are several splits; None in the minimum pass
    lse,  # (num_splits, B, Hq, rows) natural log, or None
    rows,
    keys,
    num_tiles,
    num_splits,
    window,  # or None
    unit,  # see `launch.score_units`
    inner_scale,
    BATCH: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads that are folded into a tile's rows: all that share a key head, or 1
    TERM_HEADS: tl.constexpr,  # 1, or HEADS; then GROUP is 1
    MODE: tl.constexpr,
    MINIMUM_PASS: tl.constexpr,
    SPARSE_TERMS: tl.constexpr,  # whether terms are there only where a flag is set
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
    """A tile of rows against all keys that they see: output and lse, or in the minimum pass the smallest scores."""
    batch, split, row, head, kv_head, stored = rows_of_program(rows, num_tiles, BATCH, HEADS, KV_HEADS, GROUP, BLOCK_M)

    # where each row stands
    if suffix_starts is None:
        variant = tl.zeros([BLOCK_M], tl.int32) + batch
        prefix = keys
        base_start = tl.zeros([BLOCK_M], tl.int32)
        position = row + (keys - rows)
        bias_query = row
    else:
        variant = tl.load(row_variant + row)
        prefix = tl.load(prefix_lengths + variant)
        base_start = tl.load(base_starts + variant)
        suffix_start = tl.load(suffix_starts + variant)
        suffix = tl.load(suffix_starts + variant + 1) - suffix_start
        position = prefix + row - suffix_start
        bias_query = position
    batch = tl.cast(batch, tl.int64)

    # what belongs to each row
    offset = ((split * BATCH + batch) * HEADS + head) * rows + row  # in (num_splits, B, Hq, rows)
    b_query = load_rows(query, query_strides, batch, head, row, D, BLOCK_D)
    mask_row = None
    if key_mask is not None:
        mask_row = (key_mask + batch * key_mask_strides[0], key_mask_strides[1])
    if bias is not None:
        bias_row = batch * bias_strides[0] + head * bias_strides[1] + bias_query.to(tl.int64) * bias_strides[2]

    row_minimum = tl.full([BLOCK_M], float("inf"), tl.float32)
    extreme = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if MINIMUM_PASS:
        extreme = row_minimum
    elif minimum is not None:
        all_rows = tl.cast(BATCH * HEADS, tl.int64) * rows
        for other in range(num_splits):
            row_minimum = tl.minimum(row_minimum, tl.load(minimum + offset + (other - split) * all_rows))
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    # The base's keys; if the tile's variants have several bases, one base after the other; then the variants' own rows.
    # All go through one loop, whose parts differ in numbers only: with a second loop the assembler moves accumulators
    # between registers, and waits for each product before it starts the next.
    parts: tl.constexpr = FAR if suffix_starts is None else OWN
    first, last = visible_positions(position, 0, prefix, window, IS_CAUSAL)
    p_key = key + batch * key_strides[0] + kv_head * key_strides[1]
    p_value = value + batch * value_strides[0] + kv_head * value_strides[1]
    base_keys = (p_key, key_strides[2], key_strides[3], p_value, value_strides[2], value_strides[3])
    if terms is not None:
        word = variant.to(tl.int64) * TERM_HEADS + head % TERM_HEADS
        first_word = tl.min(word)
        p_terms = terms + first_word * pitch + HEADER
        p_flags = (terms + word * pitch).to(tl.pointer_type(tl.int64))
        row_touched = tl.zeros([BLOCK_M], tl.int64)
        row_first = tl.full([BLOCK_M], FAR, tl.int64)
        row_last = tl.zeros([BLOCK_M], tl.int64)
        for chunk in tl.static_range(CHUNKS):
            row_touched |= tl.load(p_flags + chunk)
            reach = tl.load(p_flags + CHUNKS + chunk)
            row_first = tl.minimum(row_first, reach >> 32)
            row_last = tl.maximum(row_last, reach & FAR)
        b_touched = tl.reduce_or(row_touched, 0)
        touched_first, touched_last = tl.min(row_first).to(tl.int32), tl.max(row_last).to(tl.int32)
        one_term_row = tl.max(word) == first_word
    if suffix_starts is not None:
        own_first, own_last = visible_positions(position, prefix, prefix + suffix, window, IS_CAUSAL)
        shift = prefix - suffix_start  # from an index to its position
        p_key = own_key + kv_head * own_key_strides[1]
        p_value = own_value + kv_head * own_value_strides[1]
        own_keys = (
            p_key, own_key_strides[2], own_key_strides[3], p_value, own_value_strides[2], own_value_strides[3]
        )  # fmt: skip
    base_start = tl.where(first < last, base_start, parts)
    part = tl.min(base_start)
    while part < FAR:
        here = base_start == part
        part_first = tl.where(here, part + first, 0)
        part_last = tl.where(here, part + last, 0)
        part_keys = base_keys
        origin = part
        part_terms = None
        term_rows = None
        flags = None
        part_bias = None
        if terms is not None:
            part_terms = p_terms
            flags = (b_touched, touched_shift, touched_first, touched_last)
        if bias is not None:
            part_bias = (bias, bias_row - tl.cast(part, tl.int64) * bias_strides[3], bias_strides[3])
        if suffix_starts is not None:
            own = part == OWN
            part_first = tl.where(own, own_first - shift, part_first)
            part_last = tl.where(own, own_last - shift, part_last)
            part_keys = keys_of_part(own, own_keys, base_keys)
            origin = tl.where(own, 0, part)
            if terms is not None:
                part_terms = tl.where(own, own_terms + tl.min(head) % TERM_HEADS * rows, p_terms)
                term_rows = (own | one_term_row, pitch, (word - first_word).to(tl.int32))
                flags = (  # one flag for all: read them
                    tl.where(own, -1, b_touched),
                    tl.where(own, 31, touched_shift),
                    tl.where(own, 0, touched_first),
                    tl.where(own, FAR, touched_last),
                )
            if bias is not None:
                own_bias_row = bias_row + shift.to(tl.int64) * bias_strides[3]
                part_bias = (bias, tl.where(own, own_bias_row, part_bias[1]), bias_strides[3])
        accumulator, extreme, total = _sweep(
            accumulator,
            extreme,
            total,
            b_query,
            part_keys,
            part_first,
            part_last,
            split,
            num_splits,
            origin,
            part_terms,
            term_rows,
            flags,
            mask_row,
            part_bias,
            row_minimum,
            unit,
            inner_scale,
            MODE,
            MINIMUM_PASS,
            SPARSE_TERMS,
            SOFTCAP,
            PRECISION,
            D,
            DV,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            BLOCK_DV,
        )
        part = next_part(part, base_start, parts)

    if MINIMUM_PASS:
        tl.store(minimum + offset, extreme, mask=stored)
    else:
        if sinks is not None:
            sink = tl.load(sinks + head * sinks_stride).to(tl.float32)
            extreme, total, rescale = add_sink(sink, extreme, total)
            accumulator *= rescale[:, None]
        o_dv = tl.arange(0, BLOCK_DV)
        b_output = (accumulator * reciprocal(total)[:, None]).to(output.dtype.element_ty)
        tl.store(output + offset[:, None] * DV + o_dv[None, :], b_output, mask=stored[:, None] & (o_dv[None, :] < DV))
        if lse is not None:
            tl.store(lse + offset, (extreme + tl.log2(total)) * LN_2, mask=stored)


@triton.jit(do_not_specialize=["all_rows", "rows", "num_splits"])
def merge(
    partial,  # (num_splits, B, Hq, rows, DV) float32
    partial_lse,  # (num_splits, B, Hq, rows) natural log
    sinks,  # (Hq,), or None
    sinks_stride,
    output,  # (B, Hq, rows, DV)
    lse,  # (B, Hq, rows), or None
    all_rows,  # B * Hq * rows
    rows,
    num_splits,
    HEADS: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One row of the result from its splits: always in the same order, so the same bits every time."""
    row = tl.program_id(0).to(tl.int64)
    o_split = tl.arange(0, BLOCK_SPLITS).to(tl.int64)
    o_dv = tl.arange(0, BLOCK_DV)
    is_split = o_split < num_splits
    # a split's lse is a score, its output the value that goes with it
    scores = tl.load(partial_lse + o_split * all_rows + row, mask=is_split, other=float("-inf"))
    extreme = tl.full([1], float("-inf"), tl.float32)
    weights, extreme, total, _ = online_softmax(scores[None, :], extreme, tl.zeros([1], tl.float32), LOG2_E)
    p_partial = partial + (o_split * all_rows + row)[:, None] * DV + o_dv[None, :]
    values = tl.load(p_partial, mask=is_split[:, None] & (o_dv[None, :] < DV), other=0.0)
    mean = tl.sum(tl.reshape(weights, [BLOCK_SPLITS, 1]) * values, 0)[None, :]  # [1, BLOCK_DV]
    if sinks is not None:
        sink = tl.load(sinks + row // rows % HEADS * sinks_stride).to(tl.float32)
        extreme, total, rescale = add_sink(sink, extreme, total)
        mean *= rescale[:, None]
    mean = (mean * reciprocal(total)[:, None]).to(output.dtype.element_ty)
    tl.store(output + row * DV + o_dv[None, :], mean, mask=o_dv[None, :] < DV)
    if lse is not None:
        tl.store(lse + row + tl.arange(0, 1), (extreme + tl.log2(total)) * LN_2)


@triton.jit(do_not_specialize=["rows", "length", "touched_shift", "words"])
def prepare_factors(
    factor,  # (V, H, length)
    factor_strides,
    terms,  # (V, H, pitch) float32, contiguous: a header, see `_flag`, and what `suppress` wants of each factor
    length,
    pitch,
    words,  # V * H
    touched_shift,
    unit,
    own_terms,  # (H, rows) float32, contiguous; None for a dense batch, as is the rest
    suffix_starts,
    prefix_lengths,
    row_variant,
    rows,
    HEADS: tl.constexpr,
    MODE: tl.constexpr,
    SPARSE_TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
    OWN_BLOCK: tl.constexpr,
):
    """What the kernel reads of factors, one chunk of a row of them per program; then the own rows' terms."""
    program = tl.program_id(0)
    if program < words * CHUNKS:
        word, chunk = tl.cast(program // CHUNKS, tl.int64), program % CHUNKS
        p_factor = factor + word // HEADS * factor_strides[0] + word % HEADS * factor_strides[1]
        header = terms + word * pitch
        _flag(p_factor, factor_strides[2], header, chunk, length, touched_shift, unit, MODE, SPARSE_TERMS, BLOCK)
    elif own_terms is not None:
        program -= words * CHUNKS
        head = tl.cast(program % HEADS, tl.int64)
        row = program // HEADS * OWN_BLOCK + tl.arange(0, OWN_BLOCK)
        exists = row < rows
        variant = tl.load(row_variant + row, mask=exists, other=0)
        position = tl.load(prefix_lengths + variant) + row - tl.load(suffix_starts + variant)
        o_factor = variant.to(tl.int64) * factor_strides[0] + position.to(tl.int64) * factor_strides[2]
        b_factor = tl.load(factor + head * factor_strides[1] + o_factor, mask=exists, other=1.0).to(tl.float32)
        tl.store(own_terms + head * rows + row, suppression_term(b_factor, unit, MODE), mask=exists)


@triton.jit
def _flag(
    factor,  # one row of them
    stride,
    header,  # of the row of terms
    chunk,
    length,
    touched_shift,
    unit,
    MODE: tl.constexpr,
    SPARSE_TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Bit i of the flags: is one of the factors [i << touched_shift, (i + 1) << touched_shift) not 1?

    Terms are written where a flag is set, or everywhere. The header has a word with its own flags from each chunk, then
    one with where what is not 1 begins (upper half) and ends.
    """
    flag = chunk * (FLAGS // CHUNKS) + tl.arange(0, FLAGS // CHUNKS)
    found = tl.zeros([FLAGS // CHUNKS], tl.int32)
    first, last = tl.full([FLAGS // CHUNKS], FAR, tl.int32), tl.zeros([FLAGS // CHUNKS], tl.int32)
    for begin in range(0, 1 << touched_shift, BLOCK):
        position = (flag << touched_shift)[:, None] + begin + tl.arange(0, BLOCK)[None, :]
        b_factor = tl.load(factor + position.to(tl.int64) * stride, mask=position < length, other=1.0).to(tl.float32)
        is_touched = b_factor != 1
        found |= tl.max(is_touched.to(tl.int32), 1)
        first = tl.minimum(first, tl.min(tl.where(is_touched, position, FAR), 1))
        last = tl.maximum(last, tl.max(tl.where(is_touched, position + 1, 0), 1))
    for begin in range(0, 1 << touched_shift, BLOCK):
        position = (flag << touched_shift)[:, None] + begin + tl.arange(0, BLOCK)[None, :]
        wanted = position < length
        if SPARSE_TERMS:
            wanted &= (found != 0)[:, None]
        b_factor = tl.load(factor + position.to(tl.int64) * stride, mask=wanted, other=1.0).to(tl.float32)
        tl.store(header + HEADER + position, suppression_term(b_factor, unit, MODE), mask=wanted)
    p_flags = header.to(tl.pointer_type(tl.int64)) + chunk
    tl.store(p_flags, tl.sum(found.to(tl.int64) << flag.to(tl.int64)))
    tl.store(p_flags + CHUNKS, tl.min(first).to(tl.int64) << 32 | tl.max(last).to(tl.int64))
