"""K/V of several prompts' base runs as those of one."""

import weakref

import pytest
import torch
from torch import nn

from atman_kernels.hf.forward import base as base_runs
from atman_kernels.hf.forward.base import Base, PackingUnsupportedError, join_and_clear

LAYERS = [nn.Identity() for _ in range(3)]
LENGTHS = (4, 1, 6)
NAMES = ("keys", "values")


def bases() -> list[Base]:
    """One per prompt, with two heads of three; every layer's K/V have tensors of their own."""
    return [
        Base(*({m: torch.randn(2, length, 3) for m in LAYERS} for _ in range(2)), (0,), by_position=length == 1)
        for length in LENGTHS
    ]


def test_prompts_stand_one_after_the_other() -> None:
    given = bases()
    keys, values = ({m: [x.clone() for x in (getattr(b, name)[m] for b in given)] for m in LAYERS} for name in NAMES)
    joined = join_and_clear(given)
    assert joined.starts == (0, 4, 5)
    assert joined.lengths == LENGTHS
    assert joined.by_position
    for m in LAYERS:
        assert torch.equal(joined.keys[m], torch.cat(keys[m], dim=1))
        assert torch.equal(joined.values[m], torch.cat(values[m], dim=1))


def test_what_is_copied_goes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than one layer of one kind is there twice; the list that was given is empty."""
    given = bases()
    watched = [weakref.ref(x) for base in given for kept in (base.keys, base.values) for x in kept.values()]
    there, own = [], torch.cat
    monkeypatch.setattr(
        base_runs.torch, "cat", lambda *a, **k: there.append(sum(ref() is not None for ref in watched)) or own(*a, **k)
    )
    join_and_clear(given)
    assert given == []
    assert there == [18, 15, 12, 9, 6, 3]


def test_one_prompt_is_as_it_was() -> None:
    given = bases()[:1]
    only = given[0]
    assert join_and_clear(given) is only
    assert given == []


def test_masks_of_several_prompts_are_refused_and_nothing_is_lost() -> None:
    given = bases()
    given[1].patterns[LAYERS[0]] = torch.zeros(1, 1, 1)
    with pytest.raises(PackingUnsupportedError, match="each of several prompts"):
        join_and_clear(given)
    assert len(given) == 3
    assert all(len(base.keys) == 3 for base in given)
