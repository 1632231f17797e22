"""The reference backend against things that were not written here, or not from its code.

transformers' eager attention, a T5 layer, FlexAttention and SDPA know plain attention and additive masks; the
other two modes are held against the formula written out for one number at a time.
"""

import math
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_cases import DENSE_CASES, MODES, DenseCase, one_thread, plain_attention, to_float64, visible_by_position
from comparison import assert_within
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from atman_kernels.ops import suppressed_attention

# transformers' eager functions take the softmax in float32, whatever the dtype of the inputs.
FLOAT32_SOFTMAX = 2e-6
FLOAT64 = 1e-12


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def reference(mode: str = "log_additive", **call: Any) -> tuple[Tensor, Tensor]:
    return suppressed_attention(**call, mode=mode, return_lse=True, backend="reference")


def with_live_rows(name: str) -> dict[str, Any]:
    """A case in float64 whose factors remove no key, since eager attention knows no empty rows."""
    call = DENSE_CASES[name].build(torch.float64)
    return call | {"factor": call["factor"].clamp_min(0.05)}


def additive_mask(call: dict[str, Any]) -> Tensor:
    """(B, 1, Lq, Lk): ln c where a query sees the key, -inf elsewhere."""
    queries, keys = call["query"].shape[2], call["key"].shape[2]
    mask = torch.zeros(queries, keys, dtype=torch.float64)
    if call["is_causal"]:
        mask = mask.masked_fill(~torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries), -math.inf)
    if "sliding_window" in call:
        seen = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries - call["sliding_window"] + 1)
        mask = mask.masked_fill(~seen, -math.inf)
    mask = mask + call["factor"].log()[:, None, None, :]
    if "key_mask" in call:
        mask = mask.masked_fill(~call["key_mask"][:, None, None, :], -math.inf)
    return mask


def eager_module(call: dict[str, Any]) -> SimpleNamespace:
    group = call["query"].shape[1] // call["key"].shape[1]
    return SimpleNamespace(num_key_value_groups=group, training=False, sinks=call.get("sinks"))


@pytest.mark.parametrize(
    "name", ["multi_head", "grouped", "multi_query", "wide_value", "causal", "causal_fewer_queries", "key_mask",
             "window_causal", "window_causal_cached", "rows_first"]
)  # fmt: skip
def test_llama_eager_attention(name: str) -> None:
    from transformers.models.llama.modeling_llama import eager_attention_forward

    call = with_live_rows(name)
    scale = call["query"].shape[-1] ** -0.5
    expected, _ = eager_attention_forward(
        eager_module(call), call["query"], call["key"], call["value"], additive_mask(call), scaling=scale
    )
    output, _ = reference(**call)
    assert_within(output, expected.transpose(1, 2), FLOAT32_SOFTMAX)


def test_gemma2_eager_attention_with_softcap() -> None:
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    call = with_live_rows("causal_fewer_queries") | {"softcap": 1.5, "scale": 0.7}
    expected, _ = eager_attention_forward(
        eager_module(call), call["query"], call["key"], call["value"], additive_mask(call), scaling=0.7, softcap=1.5
    )
    output, _ = reference(**call)
    assert_within(output, expected.transpose(1, 2), FLOAT32_SOFTMAX)
    uncapped, _ = reference(**(call | {"softcap": None}))
    assert (uncapped - output).abs().max() > 0.01, "a cap that changes nothing was tested"


def test_gpt_oss_eager_attention_with_sinks() -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    call = with_live_rows("causal_fewer_queries") | {"sinks": torch.tensor([0.3, -2.0, 1.5, 4.0]).double()}
    scale = call["query"].shape[-1] ** -0.5
    expected, _ = eager_attention_forward(
        eager_module(call), call["query"], call["key"], call["value"], additive_mask(call), scaling=scale
    )
    output, _ = reference(**call)
    assert_within(output, expected.transpose(1, 2), FLOAT64)


@pytest.mark.parametrize("is_decoder", [False, True])
def test_t5_layer_with_position_bias(is_decoder: bool) -> None:
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    torch.manual_seed(0)
    config = T5Config(d_model=24, d_kv=6, num_heads=4, is_decoder=is_decoder, relative_attention_num_buckets=8)
    config._attn_implementation = "eager"
    layer = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).double().eval()
    hidden = 3 * torch.randn(2, 9, 24, dtype=torch.float64)
    heads = [proj(hidden).unflatten(-1, (4, 6)).transpose(1, 2) for proj in (layer.q, layer.k, layer.v)]
    factor = torch.rand(2, 9, dtype=torch.float64) + 0.05
    mask = additive_mask({"query": heads[0], "key": heads[1], "is_causal": is_decoder, "factor": factor})

    output, _ = reference(
        query=heads[0], key=heads[1], value=heads[2], factor=factor, scale=1.0, is_causal=is_decoder,
        position_bias=layer.compute_bias(9, 9).detach(),
    )  # fmt: skip
    with torch.no_grad():
        expected = layer(hidden, mask=mask)[0]
        assert_within(layer.o(output.transpose(1, 2).flatten(2)), expected, 10 * FLOAT32_SOFTMAX)


@pytest.mark.parametrize(("queries", "keys"), [(1, 9), (4, 9), (9, 9)])
def test_causal_is_aligned_at_the_end(queries: int, keys: int) -> None:
    """The last rows of a full causal SDPA are what a cached decoding step computes."""
    torch.manual_seed(1)
    query, key, value = torch.randn(3, 2, 4, keys, 8, dtype=torch.float64).unbind()
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)[:, :, -queries:]
    output, _ = reference(query=query[:, :, -queries:], key=key, value=value, is_causal=True)
    assert_within(output, expected, FLOAT64)


# --- FlexAttention ---


def flex_score_mod(mode: str, factor: Tensor) -> Any:
    if mode == "log_additive":
        return lambda score, batch, head, query, key: score + torch.log(factor[batch, key])
    return lambda score, batch, head, query, key: score * factor[batch, key]


def flex_mask(call: dict[str, Any]) -> Any:
    batch, queries, keys = call["query"].shape[0], call["query"].shape[2], call["key"].shape[2]
    offset, window = keys - queries, call.get("sliding_window", keys + queries)

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if call["is_causal"]:
            return (key <= query + offset) & (key > query + offset - window)
        return (key < query + offset + window) & (key > query + offset - window)

    return create_block_mask(visible, batch, None, queries, keys, device="cpu")


def run_flex(call: dict[str, Any], mode: str, function: Any = flex_attention) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is slow without compilation
        return function(
            call["query"], call["key"], call["value"], score_mod=flex_score_mod(mode, call["factor"]),
            block_mask=flex_mask(call), enable_gqa=True,
        )  # fmt: skip


@pytest.mark.parametrize("mode", ["log_additive", "multiplicative"])
@pytest.mark.parametrize(
    "name", ["grouped", "multi_query", "causal", "causal_fewer_queries", "window_causal", "window_causal_cached",
             "window_both_ways", "odd_113_203"]
)  # fmt: skip
def test_flex_attention(name: str, mode: str) -> None:
    call = with_live_rows(name)
    output, _ = reference(mode, **call)
    assert_within(output, run_flex(call, mode), FLOAT64)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["log_additive", "multiplicative"])
def test_compiled_flex_attention(mode: str) -> None:
    call = DenseCase(is_causal=True, query_length=96, key_length=160, sliding_window=70, head_dim=32, value_dim=32)
    tensors = call.build(torch.float32)
    tensors["factor"] = tensors["factor"].clamp_min(0.05)
    expected = run_flex(tensors, mode, torch.compile(flex_attention))
    output, _ = reference(mode, **to_float64(tensors))
    assert_within(expected, output, 1e-5, "FlexAttention")


# --- the formula, one number at a time ---


def formula_for_one_row(
    row: dict[str, Any], mode: str, scale: float, softcap: float | None, sink: float | None
) -> tuple[list[float], float]:
    """Output and lse of one query of one head; `row` holds python floats, only for the keys it may see."""
    scores = [scale * sum(a * b for a, b in zip(row["query"], key, strict=True)) for key in row["keys"]]
    if softcap is not None:
        scores = [softcap * math.tanh(score / softcap) for score in scores]
    scores = [score + bias for score, bias in zip(scores, row["bias"], strict=True)]
    pairs = list(zip(scores, row["factors"], strict=True))
    if mode == "log_additive":
        weights = [c * math.exp(s) for s, c in pairs]
    elif mode == "multiplicative":
        weights = [math.exp(c * s) for s, c in pairs]
    else:
        lowest = min(scores, default=0.0)
        weights = [math.exp(lowest + c * (s - lowest)) for s, c in pairs]
    total = sum(weights) + (0.0 if sink is None else math.exp(sink))
    if total == 0.0:
        return [0.0] * row["value_dim"], -math.inf
    output = [0.0] * row["value_dim"]
    for weight, value in zip(weights, row["values"], strict=True):
        output = [o + weight / total * v for o, v in zip(output, value, strict=True)]
    return output, math.log(total)


def formula_number_by_number(call: dict[str, Any], mode: str) -> tuple[Tensor, Tensor]:
    query, key, value = (call[name].tolist() for name in ("query", "key", "value"))
    (batch, heads, queries, head_dim), (_, kv_heads, keys, _) = call["query"].shape, call["key"].shape
    factor = call.get("factor", torch.ones(batch, keys))
    factor = factor.reshape(batch, -1, keys).expand(batch, heads, keys).tolist()
    bias = call.get("position_bias", torch.zeros(1)).broadcast_to(batch, heads, queries, keys).tolist()
    key_mask = call.get("key_mask", torch.ones(batch, keys, dtype=torch.bool)).tolist()
    sinks = call["sinks"].tolist() if "sinks" in call else [None] * heads
    window = call.get("sliding_window")

    def sees(b: int, h: int, i: int, j: int) -> bool:
        position = i + keys - queries
        if not key_mask[b][j] or bias[b][h][i][j] == -math.inf:
            return False
        if call["is_causal"] and j > position:
            return False
        return window is None or (position - window < j if call["is_causal"] else abs(position - j) < window)

    output = torch.zeros(batch, heads, queries, call["value"].shape[3], dtype=torch.float64)
    lse = torch.zeros(batch, heads, queries, dtype=torch.float64)
    for b in range(batch):
        source = b if len(key) > 1 else 0
        for h in range(heads):
            shared = h // (heads // kv_heads)
            for i in range(queries):
                seen = [j for j in range(keys) if sees(b, h, i, j)]
                row = {
                    "query": query[b][h][i],
                    "keys": [key[source][shared][j] for j in seen],
                    "values": [value[source][shared][j] for j in seen],
                    "bias": [bias[b][h][i][j] for j in seen],
                    "factors": [factor[b][h][j] for j in seen],
                    "value_dim": output.shape[3],
                }
                scale = call.get("scale", head_dim**-0.5)
                numbers, lse[b, h, i] = formula_for_one_row(row, mode, scale, call.get("softcap"), sinks[h])
                output[b, h, i] = torch.tensor(numbers, dtype=torch.float64)
    return output, lse


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [name for name in DENSE_CASES if not name.startswith("odd")])
def test_formula_number_by_number(name: str, mode: str) -> None:
    call = DENSE_CASES[name].build(torch.float64, factor="heads" if name == "everything" else "keys")
    expected, expected_lse = formula_number_by_number(call, mode)
    results = {"reference": reference(mode, **call), "plain": plain_attention(**call, mode=mode)}
    for who, (output, lse) in results.items():
        assert_within(output, expected, FLOAT64, f"{who} output")
        assert_within(lse, expected_lse, FLOAT64, f"{who} lse")


def test_positions_of_a_window() -> None:
    assert visible_by_position(2, 4, True, 2).int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
    assert visible_by_position(2, 4, False, 2).int().tolist() == [[0, 1, 1, 1], [0, 0, 1, 1]]
