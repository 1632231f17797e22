"""Masks as the op takes them: what transformers writes for "hidden" is minus infinity there, not a very low score."""

import math

import pytest
import torch

import atman_kernels as ak
from atman_kernels.hf.attention.masks import additive


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_dtypes_minimum_means_hidden(dtype):
    written = torch.tensor([0.0, torch.finfo(dtype).min, -math.inf, -3.5], dtype=dtype)
    assert additive(written).tolist() == [0.0, -math.inf, -math.inf, -3.5]
    assert additive(torch.tensor([True, False])).tolist() == [0.0, -math.inf]


def test_a_hidden_key_is_no_rows_smallest_score():
    """In mode "shifted" everything that is suppressed would fall to it."""
    query, factor = torch.randn(1, 1, 3, 4, generator=torch.Generator().manual_seed(0)), torch.full((1, 3), 0.5)
    hidden = torch.zeros(1, 1, 3, 3).masked_fill(torch.ones(3, 3).triu(1).bool(), torch.finfo(torch.float32).min)
    options = {"factor": factor, "mode": "shifted"}
    found = ak.suppressed_attention(query, query, query, position_bias=additive(hidden), **options)
    torch.testing.assert_close(found, ak.suppressed_attention(query, query, query, is_causal=True, **options))
