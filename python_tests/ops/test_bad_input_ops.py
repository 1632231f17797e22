"""Bad input to the ops: one clear error that names the argument, what came and what was expected."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import DENSE_CASES, PACK_CASES
from torch import Tensor

import atman_kernels as ak
from atman_kernels import backends
from atman_kernels.ops import validation
from atman_kernels.pack import VariantPack

# (B, Hq, Lq, D) = (2, 4, 7, 16), (B, Hkv, Lk, D) = (2, 2, 11, 16)
DENSE = DENSE_CASES["grouped"]
# (Hq, T, D) = (4, 12, 8), Hkv = 2, four variants, S = 9, longest variant 8
PACKED = PACK_CASES["few_tokens_each"]
LONGEST = max(p + s for p, s in zip(PACKED.prefix_lengths, PACKED.suffix_lengths, strict=True))

Change = Callable[[Any], Any]


def refused(function: Callable[..., Any], good: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    """Bad input is refused the first time, and as well after the same call without the changes was accepted."""
    validation._accepted.clear()
    raises(function, good | changes, words)
    function(**good)
    assert len(validation._accepted) == 1
    raises(function, good | changes, words)


def raises(function: Callable[..., Any], call: dict[str, Any], words: str) -> None:
    """InputError with all the words, in this order, in a message of one line."""
    versions = {name: x._version for name, x in call.items() if isinstance(x, Tensor)}
    with pytest.raises(ak.InputError) as caught:
        function(**call)
    message = str(caught.value)
    assert "\n" not in message
    assert re.search(".*".join(map(re.escape, words.split())), message), f"{words!r} is not in: {message}"
    assert versions == {name: call[name]._version for name in versions}, "an input was written to"


def as_integers(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int64)


def elsewhere(tensor: Tensor | None) -> Tensor:
    """The tensor on a device that every machine has."""
    return torch.empty((2, 2) if tensor is None else tensor.shape, device="meta")


def set_first(number: float) -> Change:
    def change(factor: Tensor) -> Tensor:
        factor = factor.clone()
        factor.flatten()[3] = number
        return factor

    return change


def to(value: Any) -> Change:
    return lambda _: value


# Words that the message must hold, in order: the argument, what was expected, what came; or the other way round.
SHARED = [
    ("query", as_integers, "query float32 got torch.int64"),
    ("query", lambda q: q.tolist(), "query tensor list"),
    ("key", as_integers, "key torch.float32 torch.int64"),
    ("key", lambda k: k.double(), "key torch.float32 torch.float64"),
    ("value", lambda v: v.half(), "value torch.float32 torch.float16"),
    ("value", to(None), "value tensor NoneType"),
    ("key", elsewhere, "key cpu meta"),
    ("value", elsewhere, "value cpu meta"),
    ("factor", elsewhere, "factor cpu meta"),
    ("factor", as_integers, "factor torch.int64"),
    ("factor", lambda c: c.tolist(), "factor tensor list"),
    ("factor", to(0.5), "factor tensor float"),
    ("factor", lambda c: c[0], "factor shape got"),
    ("factor", lambda c: c[:1], "factor shape got"),
    ("factor", lambda c: c[:, None].expand(-1, 3, -1), "factor 4, got 3,"),
    ("factor", set_first(-0.25), "factor -0.25"),
    ("factor", set_first(math.nan), "factor NaN"),
    ("factor", set_first(math.inf), "factor inf"),
    ("factor", set_first(-math.inf), "factor inf"),
    ("mode", to("additive"), "mode 'log_additive' 'multiplicative' 'shifted' 'additive'"),
    ("mode", to(None), "mode 'log_additive' None"),
    ("backend", to("cudnn"), "backend 'reference' 'cpu' 'triton' 'cuda' 'cudnn'"),
    ("backend", to(3), "backend 'reference' 3"),
    ("backend", to("reference:fast"), "backend 'reference' variants 'reference:fast'"),
    ("scale", to(math.nan), "scale finite nan"),
    ("scale", to(math.inf), "scale finite inf"),
    ("scale", to("0.1"), "scale '0.1'"),
    ("sliding_window", to(0), "sliding_window 1 0"),
    ("sliding_window", to(-3), "sliding_window 1 -3"),
    ("sliding_window", to(2.5), "sliding_window 2.5"),
    ("softcap", to(0.0), "softcap positive 0"),
    ("softcap", to(-2.0), "softcap positive -2"),
    ("softcap", to(math.nan), "softcap positive nan"),
    ("softcap", to("30"), "softcap '30'"),
    ("sinks", to(torch.zeros(3)), "sinks (4,) (3,)"),
    ("sinks", to(torch.zeros(4, 1)), "sinks (4,) (4, 1)"),
    ("sinks", to(torch.zeros(4, dtype=torch.int32)), "sinks torch.int32"),
    ("sinks", to(torch.zeros(4, device="meta")), "sinks cpu meta"),
    ("sinks", to([0.0] * 4), "sinks tensor list"),
]

DENSE_ONLY = [
    ("query", lambda q: q[0], "query (B, Hq, Lq, D) (4, 7, 16)"),
    ("key", lambda k: k[0], "key (1|B, Hkv, Lk, D) (2, 11, 16)"),
    ("value", lambda v: v[None], "value (1|B, Hkv, Lk, Dv) (1, 2, 2, 11, 16)"),
    ("key", lambda k: k[..., :-1], "key (2, 2, 11, 16) (2, 2, 11, 15)"),
    ("key", lambda k: k.repeat(2, 1, 1, 1), "4"),
    ("value", lambda v: v[:, :, :-1], "value (2, 2, 11, 16) (2, 2, 10, 16)"),
    ("value", lambda v: v[:, :1], "value (2, 2, 11, 16) (2, 1, 11, 16)"),
    ("value", lambda v: v[:1], "value (2, 2, 11, 16) (1, 2, 11, 16)"),
    ("query", lambda q: q[:, :3], "query heads multiple 3 2"),
    ("factor", lambda c: c[:, :-1], "factor (2, 11) (2, 10)"),
    ("factor", lambda c: torch.cat([c, c], 1), "factor (2, 11) (2, 22)"),
    ("factor", lambda c: c[:, None, None], "factor (2, 11) (2, 1, 1, 11)"),
    ("key_mask", to(torch.ones(2, 10, dtype=torch.bool)), "key_mask (2, 11) (2, 10)"),
    ("key_mask", to(torch.ones(1, 11, dtype=torch.bool)), "key_mask (2, 11) (1, 11)"),
    ("key_mask", to(torch.ones(2, 1, 7, 11, dtype=torch.bool)), "key_mask (2, 11) (2, 1, 7, 11)"),
    ("key_mask", to(torch.ones(2, 11)), "key_mask bool torch.float32"),
    ("key_mask", to(torch.ones(2, 11, dtype=torch.int64)), "key_mask bool torch.int64"),
    ("key_mask", to(torch.ones(2, 11, dtype=torch.bool, device="meta")), "key_mask cpu meta"),
    ("key_mask", to([[True] * 11] * 2), "key_mask tensor list"),
    ("position_bias", to(torch.zeros(2, 4, 7, 10)), "position_bias (2, 4, 7, 11) (2, 4, 7, 10)"),
    ("position_bias", to(torch.zeros(3, 1, 1, 11)), "position_bias (2, 4, 7, 11) (3, 1, 1, 11)"),
    ("position_bias", to(torch.zeros(1, 1, 1, 1, 11)), "position_bias (2, 4, 7, 11) (1, 1, 1, 1, 11)"),
    ("position_bias", to(torch.zeros(7, 11, dtype=torch.bool)), "position_bias torch.bool"),
    ("position_bias", to(torch.zeros(7, 11, device="meta")), "position_bias cpu meta"),
    ("position_bias", to(0.0), "position_bias tensor float"),
]

PACKED_ONLY = [
    ("query", lambda q: q[None], "query (Hq, T, D) (1, 4, 12, 8)"),
    ("query", lambda q: q[:, :-1], "query 11 rows pack 12"),
    ("query", lambda q: q[:3], "query heads multiple 3 2"),
    ("key", lambda k: k[None], "key (Hkv, T (1, 2, 12, 8)"),
    ("key", lambda k: k[:, :-1], "key (2, 12, 8) (2, 11, 8)"),
    ("key", lambda k: k[..., :-1], "key (2, 12, 8) (2, 12, 7)"),
    ("value", lambda v: v[:, :-1], "value (2, 12, 8) (2, 11, 8)"),
    ("value", lambda v: v[:1], "value (2, 12, 8) (1, 12, 8)"),
    ("base_key", lambda k: k[..., :-1], "base_key (2, 9, 8) (2, 9, 7)"),
    ("base_key", lambda k: k[:1], "base_key (2, 9, 8) (1, 9, 8)"),
    ("base_key", lambda k: k.double(), "base_key torch.float32 torch.float64"),
    ("base_key", elsewhere, "base_key cpu meta"),
    ("base_value", lambda v: v[:, :-1], "base_value (2, 9, 8) (2, 8, 8)"),
    ("base_value", lambda v: v[..., :-1], "base_value (2, 9, 8) (2, 9, 7)"),
    ("base_value", lambda v: v[0], "base_value (Hkv, (9, 8)"),
    ("base_value", to(None), "base_value tensor NoneType"),
    ("factor", lambda c: c[:, : LONGEST - 1], f"factor (4, {LONGEST}) (4, {LONGEST - 1})"),
    ("factor", lambda c: c[:3], f"factor (4, {LONGEST}) (3, {LONGEST})"),
    ("position_bias", lambda _: torch.zeros(4, LONGEST - 1, LONGEST), f"position_bias (4, {LONGEST}"),
    ("position_bias", lambda _: torch.zeros(3, 1, LONGEST), "position_bias (4, (3, 1, "),
    ("position_bias", lambda _: torch.zeros(1, 4, 1, LONGEST), "position_bias (1, 4, 1, "),
    ("position_bias", lambda _: torch.zeros(LONGEST, dtype=torch.int64), "position_bias floating torch.int64"),
    ("pack", to(None), "pack VariantPack NoneType"),
    ("pack", to([3, 2, 4, 3]), "pack VariantPack list"),
    ("pack", to(VariantPack.build([3, 2, 4, 3], [5, 6, 4, 5], device="meta")), "pack cpu meta"),
    ("pack", to(VariantPack.build([3, 2, 4, 3], [5, 6, 4, 10])), "base_key 9 pack 10"),
    ("pack", to(VariantPack.build([3, 2, 4, 3], [5, 6, 4, 5], [0, 4, 0, 0])), "base_key 9 pack 10"),
    ("pack", to(VariantPack.build([3, 2, 4, 4], [5, 6, 4, 5])), "query 12 rows pack 13"),
]


def names(cases: list[tuple[str, Change, str]]) -> list[str]:
    return [words.replace(" ", "_") for _, _, words in cases]


@pytest.mark.parametrize(("argument", "change", "words"), SHARED + DENSE_ONLY, ids=names(SHARED + DENSE_ONLY))
def test_dense_op_refuses(argument: str, change: Change, words: str) -> None:
    call = DENSE.build(torch.float32)
    refused(ak.suppressed_attention, call, {argument: change(call.get(argument))}, words)


@pytest.mark.parametrize(("argument", "change", "words"), SHARED + PACKED_ONLY, ids=names(SHARED + PACKED_ONLY))
def test_packed_op_refuses(argument: str, change: Change, words: str) -> None:
    call = PACKED.build(torch.float32)
    refused(ak.packed_suppressed_attention, call, {argument: change(call.get(argument))}, words)


def test_packed_op_refuses_a_base_that_is_too_short() -> None:
    call = PACKED.build(torch.float32)
    short = {name: call[name][:, :5] for name in ("base_key", "base_value")}
    refused(ak.packed_suppressed_attention, call, short, "base_key 5 pack 6")


@pytest.mark.parametrize("backend", [name for name, reason in backends.availability().items() if reason is not None])
def test_a_backend_that_cannot_run_says_why(backend: str) -> None:
    reason = backends.availability()[backend]
    for function, case in ((ak.suppressed_attention, DENSE), (ak.packed_suppressed_attention, PACKED)):
        with pytest.raises(ak.BackendUnavailableError) as caught:
            function(**case.build(torch.float32), backend=backend)
        assert repr(backend) in str(caught.value)
        assert reason in str(caught.value)


def test_the_cpu_backend_refuses_other_devices() -> None:
    call = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in DENSE.build(torch.float32).items()}
    with pytest.raises(ak.BackendUnavailableError, match=r"'cpu'.*'meta'"):
        ak.suppressed_attention(**call, backend="cpu")


def test_options_are_looked_at_in_every_call() -> None:
    """Numbers that equal an accepted one are of the right type too, or refused."""
    call = DENSE.build(torch.float32)
    ak.suppressed_attention(**call, sliding_window=4)
    raises(ak.suppressed_attention, call | {"sliding_window": 4.0}, "sliding_window 4.0")


def test_what_was_accepted_does_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "_MOST_ACCEPTED", 3)
    validation._accepted.clear()
    for keys in range(1, 8):
        call = replace(DENSE, key_length=keys).build(torch.float32)
        ak.suppressed_attention(**call)
        assert len(validation._accepted) <= 3


def test_what_is_right_is_accepted() -> None:
    """The calls above fail for the change alone."""
    ak.suppressed_attention(**DENSE.build(torch.float32))
    ak.packed_suppressed_attention(**PACKED.build(torch.float32))
    ak.suppressed_attention(**DENSE.build(torch.float32) | {"softcap": 30, "scale": 1, "sliding_window": 4})
