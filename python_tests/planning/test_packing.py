"""Which variants go into a pack, how large it may be, and which factors its rows have."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atman_kernels import InputError
from atman_kernels.planning.packing import (
    Variant,
    VariantQueue,
    full_row_factors,
    lay_out,
    pack_factors,
    padding,
    token_budget,
)

CPU = torch.device("cpu")


def variants_of(*suffixes: int) -> list[Variant]:
    return [Variant(0, row, prefix=3, length=3 + suffix) for row, suffix in enumerate(suffixes)]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 60))
def test_packs_hold_every_variant_once_and_no_more_than_the_budget(suffixes: list[int], budget: int) -> None:
    variants = variants_of(*suffixes)
    packs = list(VariantQueue(variants, budget))
    assert sorted(v.row for pack in packs for v in pack if v.row is not None) == list(range(len(suffixes)))
    for pack in packs:
        assert len(pack) == 1 or sum(v.suffix for v in pack) <= budget
    waiting = sorted(suffixes)
    for pack in packs:  # nothing that waits would have fitted as well
        for v in pack:
            waiting.remove(v.suffix)
        left = budget - sum(v.suffix for v in pack)
        assert not waiting or waiting[0] > left


def test_what_ran_out_of_memory_comes_back_under_half_the_budget() -> None:
    queue = VariantQueue(variants_of(8, 7, 6), token_budget=21)
    packs = iter(queue)
    taken = next(packs)
    assert [v.suffix for v in taken] == [8, 7, 6]
    assert queue.put_back(taken)
    assert queue.token_budget == 10
    assert [[v.suffix for v in pack] for pack in packs] == [[8], [7], [6]]
    assert not queue.put_back(variants_of(5))  # alone: nothing smaller is left to try


@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 100, 1000, 1024, 1025, 5000, 20_000])
def test_packs_come_in_few_sizes(tokens: int) -> None:
    assert 0 <= padding(tokens) <= tokens / 16
    sizes = {n + padding(n) for n in range(tokens, 2 * tokens)}
    assert len(sizes) <= max(33, tokens // 256 + 2)


def test_a_pack_begins_at_its_variants_bases_and_ends_with_what_sees_only_itself() -> None:
    first, second = Variant(0, 0, prefix=2, length=5), Variant(1, None, prefix=4, length=5, base=2)
    pack = lay_out([first, second], base_starts=(0, 9, 20), device=CPU, padding=3)
    assert pack.base_starts.tolist() == [0, 20, 0]
    assert pack.prefix_lengths.tolist() == [2, 4, 0]
    assert pack.suffix_starts.tolist() == [0, 3, 4, 7]
    assert lay_out([second], base_starts=(0, 9, 20), device=CPU).num_variants == 1


def test_factors_follow_the_rows_that_are_run() -> None:
    """Row 4 of the sequence is left out: the pack's positions are those of what remains."""
    factors = [torch.tensor([[1.0, 0.5, 1.0, 0.25, 0.0, 2.0]])]
    thin = Variant(0, 0, prefix=1, length=6, removed=1)
    found = pack_factors([thin, Variant(0, None, 2, 6)], [torch.tensor([1, 2, 3, 5])], factors, rows=3, width=7)
    assert found.tolist() == [[1.0, 0.5, 1.0, 0.25, 2.0, 1.0, 1.0], [1.0] * 7, [1.0] * 7]
    full = full_row_factors([Variant(0, 0, 0, 6), Variant(0, None, 0, 6)], factors, width=7)
    assert full.tolist() == [[1.0, 0.5, 1.0, 0.25, 0.0, 2.0, 1.0], [1.0] * 7]


def test_a_budget_takes_half_of_the_free_memory_within_what_is_useful() -> None:
    assert token_budget(1000, 10, "cpu") == 50
    assert token_budget(1 << 40, 10, "cpu") == 2048
    assert token_budget(1 << 40, 10, "cuda") == 16384
    assert token_budget(1 << 40, 0, "xpu") == 2048
    assert token_budget(20, 10, "cpu") == 1
    with pytest.raises(InputError, match="token_budget: 19 free bytes do not hold one token of 10 bytes"):
        token_budget(19, 10, "cpu")
