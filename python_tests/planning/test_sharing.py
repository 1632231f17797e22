"""Stretches that variants have in common: found, run once, and the result is as if every variant ran alone."""

import itertools
from dataclasses import replace

import eager_oracle
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atman_kernels import Explainer
from atman_kernels.hf.forward.base import Base
from atman_kernels.planning.factors import first_suppressed
from atman_kernels.planning.packing import Variant
from atman_kernels.planning.sharing import Content, PrefixTree, SharedPrefix, chunks, share, standing_on
from atman_kernels.run import packed as execution

# --- what is found ---


def paths(tree: PrefixTree, way: tuple[Variant, ...] = ()) -> list[tuple[Variant, ...]]:
    """For every variant, the prefixes that it stands on and itself."""
    own = [(*way, variant) for variant in tree.variants]
    return own + [path for shared in tree.prefixes for path in paths(shared.then, (*way, shared.stretch))]


def state(asked: list[Content], variant: Variant, end: int) -> tuple[list[int], list[float]]:
    """All that decides about the keys and values of a variant before `end`."""
    own = asked[variant.objective]
    return own.tokens[:end].tolist(), own.factors[variant.row, :end].tolist()


def check(variants: list[Variant], asked: list[Content], tree: PrefixTree) -> None:
    """Every variant is run exactly once, over [its prefix, its length), on stretches that are its own."""
    found = {}
    for *prefixes, last in paths(tree):
        assert (last.objective, last.row) not in found
        steps = [*prefixes, last]
        for before, after in itertools.pairwise(steps):
            assert before.length == after.prefix
        for shared in prefixes:
            assert state(asked, shared, shared.length) == state(asked, last, shared.length)
            assert shared.prefix < shared.length <= asked[shared.objective].limit
            assert shared.length <= asked[last.objective].limit
        found[last.objective, last.row] = replace(last, prefix=steps[0].prefix)
    assert found == {(v.objective, v.row): v for v in variants}


def variants_of(asked: list[Content]) -> list[Variant]:
    return [
        Variant(q, unit, first, len(one.tokens))
        for q, one in enumerate(asked)
        for unit, first in enumerate(first_suppressed(one.factors).tolist())
        if first < len(one.tokens)
    ]


def subsets(rows: int, length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.where(torch.rand(rows, length, generator=generator) < 0.5, 0.1, 1.0)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_variant_is_run_once_on_what_is_its_own(data):
    length = data.draw(st.integers(1, 12))
    asked = []
    for _ in range(data.draw(st.integers(1, 3))):
        own = data.draw(st.integers(1, length))
        tokens = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=own, max_size=own)))
        factors = subsets(data.draw(st.integers(1, 20)), own, data.draw(st.integers(0, 99)))
        asked.append(Content(tokens, factors, data.draw(st.integers(0, own))))
    variants = variants_of(asked)
    cost = data.draw(st.integers(0, 3))
    tree = share(variants, asked, cost)
    check(variants, asked, tree)
    assert tree.tokens <= sum(v.suffix for v in variants)


def test_one_questions_units_share_nothing():
    factors = torch.ones(8, 9) - 0.9 * torch.eye(8, 9)
    asked = [Content(torch.arange(9), factors, 8)]
    tree = share(variants_of(asked), asked)
    assert (len(tree.variants), tree.prefixes) == (8, [])


def test_where_nothing_is_suppressed_nothing_is_run():
    asked = [Content(torch.arange(3), torch.ones(2, 3), 2)]
    assert share(variants_of(asked), asked).tokens == 0
    explainer = Explainer(tiny_models.build("llama"), tiny_models.tokenizer(), factor=1.0, progress=False)
    assert not explainer.explain("w5 w6 w7", "w8").scores.any()


def test_questions_about_one_passage_share_it():
    passage, questions, units = 40, 5, 40
    tokens = [torch.cat([torch.arange(passage), torch.full((5,), 100 + q)]) for q in range(questions)]
    factors = torch.ones(units, passage + 5) - 0.9 * torch.eye(units, passage + 5)
    asked = [Content(t, factors, passage + 4) for t in tokens]
    variants = variants_of(asked)
    tree = share(variants, asked)
    check(variants, asked, tree)
    over_passage = sum(passage - unit for unit in range(units))
    # the last of the passage's tokens are not worth prefixes of their own
    assert tree.tokens == pytest.approx(over_passage + questions * units * 5, rel=0.01)


def test_a_forward_that_saves_less_than_it_costs_is_not_run():
    tokens = [torch.tensor([1, 2, 3, 4, last]) for last in (5, 6)]
    asked = [Content(t, torch.tensor([[0.1, 1, 1, 1, 1]]), 4) for t in tokens]
    assert share(variants_of(asked), asked, forward_cost=3).prefixes
    assert not share(variants_of(asked), asked, forward_cost=4).prefixes


@pytest.mark.parametrize(("apart", "shared"), [(20, True), (60, False)])
def test_what_saves_less_than_a_fifth_is_not_shared(apart, shared):
    """Two variants suppressed at 0 that agree up to 30, and go on for so many tokens more."""
    factors = torch.ones(2, 30 + apart)
    factors[:, 0] = 0.5
    factors[1, 30] = 0.5
    tokens = torch.arange(30 + apart)
    asked = [Content(tokens, factors, 29 + apart)]
    assert bool(share(variants_of(asked), asked).prefixes) == shared


def test_many_subsets_of_few_units_share_their_beginnings():
    factors = subsets(2000, 16, seed=0).unique(dim=0)
    asked = [Content(torch.arange(16), factors, 15)]
    variants = variants_of(asked)
    tree = share(variants, asked)
    check(variants, asked, tree)
    apart = sum(v.suffix for v in variants)
    assert tree.tokens < 0.5 * apart
    assert any(shared.then.prefixes for shared in tree.prefixes)  # prefixes on prefixes


def test_pictures_are_not_told_apart_by_their_placeholders():
    factors = torch.tensor([[0.1, 1.0, 1.0, 1.0, 0.1], [0.1, 1.0, 1.0, 1.0, 0.2]])
    asked = [Content(None, factors, 4), Content(None, factors, 4)]
    tree = share([Variant(q, unit, 0, 5) for q in (0, 1) for unit in (0, 1)], asked)
    assert sorted((t.stretch.objective, len(t.then.variants)) for t in tree.prefixes) == [(0, 2), (1, 2)]


def test_shared_prefixes_go_in_chunks_that_fit():
    prefixes = [SharedPrefix(Variant(0, u, 0, length), PrefixTree([])) for u, length in enumerate((5, 4, 9, 30, 1))]
    assert [[t.stretch.length for t in chunk] for chunk in chunks(prefixes, 18)] == [[5, 4, 9], [30], [1]]


def test_what_stands_on_a_shared_prefix_takes_its_base():
    inner = SharedPrefix(Variant(0, 1, 3, 5), PrefixTree([Variant(0, 1, 5, 9)]))
    prefixes = [SharedPrefix(Variant(0, u, 0, 3), PrefixTree([Variant(0, u, 3, 9)], [inner])) for u in (0, 1)]
    tree = standing_on(prefixes)
    assert [v.base for v in tree.variants] == [0, 1]
    assert [t.stretch.base for t in tree.prefixes] == [0, 1]


# --- the results ---


def draw(count: int, seed: int) -> list[int]:
    return torch.randint(3, tiny_models.VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def check_against_oracle(model, explanations, prompts, answer, mode):
    for explanation, prompt in zip(explanations, prompts, strict=True):
        rows = 1 - 0.9 * torch.eye(len(prompt), len(prompt) + len(answer))
        ids = torch.tensor(prompt + answer)
        expected = eager_oracle.leave_one_out(model, ids, len(prompt), rows, mode)
        assert expected.abs().max() > 1e-2, "the oracle must move, or the comparison says nothing"
        torch.testing.assert_close(explanation.scores.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", tiny_models.PACKABLE)
def test_questions_about_one_passage_equal_separate_full_runs(family):
    model, passage, answer = tiny_models.build(family), draw(16, 1), draw(2, 2)
    prompts = [passage + draw(3, 10 + seed) for seed in range(3)]
    explainer = Explainer(model, tiny_models.tokenizer(), factor=0.1, token_budget=60, progress=False)
    texts, answers = [tiny_models.text_of(ids) for ids in prompts], [tiny_models.text_of(answer)] * 3
    explanations = explainer.explain_batch(texts, answers)
    check_against_oracle(model, explanations, prompts, answer, "log_additive")
    if explanations[0].settings["path"] == "packed":
        alone = 3 * sum(19 + 2 - 1 - unit for unit in range(19))
        assert explanations[0].stats["tokens_through_model"] < 0.8 * alone


@pytest.mark.parametrize("mode", ["log_additive", "multiplicative", "shifted"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_questions_of_several_lengths(family, mode):
    model, passage, answer = tiny_models.build(family), draw(12, 3), draw(3, 4)
    prompts = [passage + draw(3 + seed, 20 + seed) for seed in range(3)]
    explainer = Explainer(model, tiny_models.tokenizer(), mode=mode, factor=0.1, progress=False)
    texts, answers = [tiny_models.text_of(ids) for ids in prompts], [tiny_models.text_of(answer)] * 3
    explanations = explainer.explain_batch(texts, answers)
    check_against_oracle(model, explanations, prompts, answer, mode)


@pytest.mark.parametrize("layers", [None, [1]])
def test_random_subsets_equal_separate_full_runs(layers):
    model, ids, answer = tiny_models.build("llama"), draw(10, 5), draw(2, 6)
    explainer = Explainer(model, tiny_models.tokenizer(), factor=0.0, layers=layers, token_budget=256, progress=False)
    masks = torch.rand(200, 10, generator=torch.Generator().manual_seed(0)) < 0.5
    found = explainer.ablate(tiny_models.text_of(ids), tiny_models.text_of(answer), masks=masks)
    distinct, places = masks.unique(dim=0, return_inverse=True)
    rows = torch.cat([torch.where(distinct, 0.0, 1.0), torch.ones(len(distinct), 2)], dim=1)
    expected = eager_oracle.leave_one_out(model, torch.tensor(ids + answer), 10, rows, "log_additive", layers)
    torch.testing.assert_close(found.rises.double(), expected[places], atol=1e-4, rtol=0)
    # half of the tokens are removed, and where they are in all layers, their rows are not run either
    assert found.stats["tokens_through_model"] < (0.7 if layers else 0.5) * len(distinct) * 11


@pytest.mark.parametrize("mode", ["log_additive", "multiplicative"])
@pytest.mark.parametrize("family", tiny_models.PACKABLE)
def test_removed_tokens_are_not_missed(family, mode):
    """Rows that nobody reads may be left out; a factor of 0 removes a key in one mode only."""
    model, ids, answer = tiny_models.build(family), draw(14, 11), draw(2, 12)
    units = [[0], [1, 2, 3], [5, 6, 7, 8], [9, 10, 11, 12, 13]]
    prompt, spans = tiny_models.text_of(ids), []
    ends = [len(tiny_models.text_of(ids[: i + 1])) for i in range(14)]
    for unit in units:
        spans.append((0 if unit[0] == 0 else ends[unit[0] - 1] + 1, ends[unit[-1]]))
    masks = torch.tensor(
        [[True, False, True, False], [False, True, True, False], [True] * 4, [False, True, False, True]]
    )
    explainer = Explainer(model, tiny_models.tokenizer(), mode=mode, factor=0.0, progress=False)
    found = explainer.ablate(prompt, tiny_models.text_of(answer), spans, masks=masks)
    rows = torch.ones(4, 16)
    for row, mask in zip(rows, masks.tolist(), strict=True):
        row[[i for unit, gone in zip(units, mask, strict=True) if gone for i in unit]] = 0
    expected = eager_oracle.leave_one_out(model, torch.tensor(ids + answer), 14, rows, mode)
    torch.testing.assert_close(found.rises.double(), expected, atol=1e-4, rtol=0)


def test_running_out_of_memory_halves_packs_of_shared_prefixes_too(monkeypatch):
    model, passage, answer = tiny_models.build("llama"), draw(24, 7), draw(1, 8)
    explainer = Explainer(model, tiny_models.tokenizer(), factor=0.1, progress=False)
    prompts = [passage + draw(2, 30 + seed) for seed in range(3)]
    grow, refused = execution.grow, []

    def failing(model, base, pack, *args, **kwargs):
        if pack.num_rows > 100:
            refused.append(pack.num_rows)
            raise MemoryError
        return grow(model, base, pack, *args, **kwargs)

    monkeypatch.setattr(execution, "grow", failing)
    texts = [tiny_models.text_of(ids) for ids in prompts]
    explanations = explainer.explain_batch(texts, [tiny_models.text_of(answer)] * 3)
    assert refused
    check_against_oracle(model, explanations, prompts, answer, "log_additive")


def test_little_memory_takes_shared_prefixes_a_few_at_a_time(monkeypatch):
    model, ids, answer = tiny_models.build("llama"), draw(12, 9), draw(1, 10)
    monkeypatch.setattr(execution, "FREE_SHARE", 10**12)  # each chunk is a single shared prefix
    held = noted_rooms(monkeypatch)
    explainer = Explainer(model, tiny_models.tokenizer(), factor=0.0, token_budget=64, progress=False)
    masks = torch.rand(200, 12, generator=torch.Generator().manual_seed(1)) < 0.5
    found = explainer.ablate(tiny_models.text_of(ids), tiny_models.text_of(answer), masks=masks)
    assert 0 < max(held) <= 12
    rows = torch.cat([torch.where(masks, 0.0, 1.0), torch.ones(200, 1)], dim=1)
    expected = eager_oracle.leave_one_out(model, torch.tensor(ids + answer), 12, rows, "log_additive")
    torch.testing.assert_close(found.rises.double(), expected, atol=1e-4, rtol=0)


def noted_rooms(monkeypatch) -> list[int]:
    """How many tokens each new set of bases has room for, as they are made."""
    emptied, held = Base.emptied, []

    def noted(base, lengths):
        held.append(sum(lengths))
        return emptied(base, lengths)

    monkeypatch.setattr(Base, "emptied", noted)
    return held


@pytest.mark.parametrize("rows", [200, 1000])
def test_shared_prefixes_take_no_more_room_than_a_pack(monkeypatch, rows):
    model, ids, answer = tiny_models.build("llama"), draw(12, 9), draw(1, 10)
    held = noted_rooms(monkeypatch)
    explainer = Explainer(model, tiny_models.tokenizer(), factor=0.0, token_budget=64, progress=False)
    masks = torch.rand(rows, 12, generator=torch.Generator().manual_seed(1)) < 0.5
    explainer.ablate(tiny_models.text_of(ids), tiny_models.text_of(answer), masks=masks)
    assert 40 < max(held) <= 64
