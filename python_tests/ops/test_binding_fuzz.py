"""The binding `atman_kernels._C` with descriptions that lie: it refuses them or computes, and never crashes.

No description claims more bytes than there are, since nobody could notice that. Each tensor has memory of its own, so
that the address sanitizer (`make sanitize`) sees a step beyond it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from atman_kernels.backends.cpu import compiled

pytestmark = pytest.mark.skipif(
    compiled.unavailable_reason() is not None, reason=f"the compiled module: {compiled.unavailable_reason()}"
)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int32: 3, torch.bool: 4}
PACK = ("suffix_starts", "prefix_lengths", "base_starts")
CASES = 6000


@dataclass(frozen=True)
class Description:
    """What `_C.Tensor` takes, and the tensor that keeps the memory alive."""

    tensor: Tensor
    address: int
    bytes: int
    dtype: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "Description":
        readable = tensor.untyped_storage().nbytes()
        return cls(tensor, tensor.data_ptr(), readable, CODES[tensor.dtype], tuple(tensor.shape), tensor.stride())


def attend(call: dict[str, Any]) -> None:
    from atman_kernels import _C

    def made(names: Iterable[str]) -> dict[str, Any]:
        found = ((name, call[name]) for name in names)
        return {
            name: _C.Tensor(x.address, x.bytes, x.dtype, x.shape, x.strides) if isinstance(x, Description) else x
            for name, x in found
        }

    of_run = [name for name in call if name in ("instruction_set", "threads", "delta") or name[:5] == "grad_"]
    described = _C.Call(**made(call.keys() - of_run))
    run = _C.differentiate_cpu if "delta" in call else _C.attend_cpu
    run(described, **made(of_run))


# --- calls that are right ---


def right_call(random: Random, packed: bool | None = None) -> dict[str, Any]:
    dtype = random.choice(FLOATS)
    kv_heads, head_dim, value_dim = random.randint(1, 3), random.randint(1, 20), random.randint(1, 40)
    heads = kv_heads * random.randint(1, 3)
    if packed is None:
        packed = random.random() < 0.5
    batch = 1 if packed else random.randint(1, 3)
    key_batch = random.choice([1, batch])
    keys = random.randint(0, 150)
    suffixes = [random.randint(0, 6) for _ in range(random.randint(1, 30))]
    rows = sum(suffixes) if packed else random.randint(0, 40)

    def floats(*shape: int, dtype: torch.dtype = dtype) -> Description:
        return Description.of(torch.randn(shape).to(dtype))

    call: dict[str, Any] = {
        "query": floats(batch, heads, rows, head_dim),
        "key": floats(key_batch, kv_heads, keys, head_dim),
        "value": floats(key_batch, kv_heads, keys, value_dim),
        "output": floats(batch, heads, rows, value_dim),
        "mode": random.choice(["log_additive", "multiplicative", "shifted"]),
        "is_causal": random.random() < 0.5,
        "scale": random.uniform(0.1, 1.0),
        "sliding_window": random.choice([0, 0, 1, 5, 200]),
        "softcap": random.choice([0.0, 2.0]),
        "instruction_set": random.choice(compiled.instruction_sets(dtype)),
        "threads": random.randint(1, 3),
    }
    reach, lines = keys, batch
    if packed:
        prefixes = [random.randint(0, keys) for _ in suffixes]
        bases = [random.randint(0, keys - prefix) for prefix in prefixes]
        starts = [sum(suffixes[:v]) for v in range(len(suffixes) + 1)]
        for name, numbers in zip(PACK, (starts, prefixes, bases), strict=True):
            call[name] = Description.of(torch.tensor(numbers, dtype=torch.int32))
        call["own_key"] = floats(kv_heads, rows, head_dim)
        call["own_value"] = floats(kv_heads, rows, value_dim)
        reach, lines = max(p + s for p, s in zip(prefixes, suffixes, strict=True)), len(suffixes)
    elif random.random() < 0.5:
        call["key_mask"] = Description.of(torch.rand(batch, keys) < 0.7)
    if random.random() < 0.5:
        call["lse"] = floats(batch, heads, rows, dtype=torch.float32)
    if random.random() < 0.6:
        factor = torch.rand(lines, random.choice([1, heads]), reach + random.choice([0, 3]) * packed)
        call["factor"] = Description.of(factor)
    if random.random() < 0.3:
        call["sinks"] = floats(heads, dtype=torch.float32)
    if random.random() < 0.3:
        shape = (reach, reach) if packed else (rows, keys)
        shape = tuple(random.choice([1, size]) if size else size for size in (batch, heads, *shape))
        call["position_bias"] = floats(*shape, dtype=torch.float32)
    return call


def right_backward(random: Random, packed: bool | None = None) -> dict[str, Any]:
    call = right_call(random, packed)
    shape = call["query"].shape[:-1]
    call |= {name: Description.of(torch.randn(shape)) for name in ("lse", "delta")}
    places = {"grad_query": "query", "grad_key": "key", "grad_value": "value", "grad_own_key": "own_key",
              "grad_own_value": "own_value", "grad_factor": "factor"}  # fmt: skip
    for place, name in places.items():
        if name in call and random.random() < 0.7:
            call[place] = Description.of(torch.empty(call[name].shape, dtype=call[name].tensor.dtype))
    return call


RIGHT = {"forward": right_call, "backward": right_backward}


@pytest.mark.parametrize("way", RIGHT)
@pytest.mark.parametrize("packed", [False, True])
def test_right_calls_run(packed: bool, way: str) -> None:
    for seed in range(300 if way == "forward" else 150):
        attend(RIGHT[way](Random(seed), packed))


# --- calls that are wrong somehow ---

SIZES = (-(2**63), -1, 0, 1, 2, 3, 2**31, 2**40, 2**40 + 1, 2**62, 2**63 - 1, 2**63)
NUMBERS = {  # of options
    "scale": (math.nan, math.inf, -math.inf, 1e39, -1.0, 0.0, 1e38),
    "sliding_window": (*SIZES, 1.5),
    "softcap": (-1.0, math.nan, math.inf, 1e-50, 1e-40, 1e38, 1e300),
    "threads": (0, -1, -(2**31), 4096, 4097, 2**31 - 1, 2**31),
    "mode": ("", "shift", "log_additive\0", None, 3),
    "instruction_set": ("", "torch", "amx", "avx512_bf16", "plain", None),
    "is_causal": (None, 2, "yes"),
}


def damage(call: dict[str, Any], random: Random) -> dict[str, Any]:
    names = [name for name, x in call.items() if isinstance(x, Description)]
    name = random.choice(names)
    tensor = call[name]
    if not tensor.shape or not tensor.strides:
        return call
    kind = random.choice(["shape", "strides", "dtype", "address", "bytes", "rank", "swap", "type", "option", "pack"])
    if kind == "pack" and not all(isinstance(call.get(name), Description) for name in PACK):
        kind = "factor"
    if kind == "option":
        option = random.choice(list(NUMBERS))
        return call | {option: random.choice(NUMBERS[option])}
    if kind == "swap":
        others = [x for x in names if x not in ("output", "lse") and x[:5] != "grad_"]  # of two writers one is a race
        return call | {name: random.choice([None, call[random.choice(others)]])} if name in others else call
    if kind == "type":
        return call | {name: random.choice(["a string", 3, [1, 2], tensor.tensor])}
    if kind == "pack":
        name = random.choice(PACK)
        numbers = call[name].tensor.clone()
        if numbers.dtype != torch.int32 or not numbers.numel():  # swapped before
            return call
        at = random.randrange(len(numbers))
        numbers[at] = random.choice([-1, 0, 1, 10, 2**31 - 1, -(2**31), numbers[at] + 1, numbers[at] - 1])
        return call | {name: replace(Description.of(numbers), shape=call[name].shape)}
    if kind == "factor":
        if not isinstance(call.get("factor"), Description) or not call["factor"].tensor.numel():
            return call
        values = call["factor"].tensor.clone()
        values.flatten()[random.randrange(values.numel())] = random.choice([math.nan, math.inf, -1.0, -math.inf, 1e30])
        return call | {"factor": Description.of(values)}
    if kind == "dtype":
        changed = replace(tensor, dtype=random.choice([-1, 0, 1, 2, 3, 4, 5, 255, 2**32, 2**40]))
    elif kind == "address":
        step = random.choice([1, 2, 3, 4])
        changed = replace(tensor, address=tensor.address + step, bytes=max(0, tensor.bytes - step))
        changed = random.choice([changed, replace(tensor, address=0), replace(tensor, address=-8)])
    elif kind == "bytes":
        fewer = (0, 1, -1, -(2**63), tensor.bytes - 1, tensor.bytes // 2)
        changed = replace(tensor, bytes=min(tensor.bytes, random.choice(fewer)))
    elif kind == "rank":
        shape, strides = list(tensor.shape), list(tensor.strides)
        axis = random.randrange(len(shape))
        if random.random() < 0.5:
            shape.insert(axis, random.choice([0, 1, 2]))
        else:
            del shape[axis]
        if random.random() < 0.7:
            strides = strides[: len(shape)] + [1] * (len(shape) - len(strides))
        changed = replace(tensor, shape=tuple(shape), strides=tuple(strides))
    else:
        numbers = list(getattr(tensor, kind))
        axis = random.randrange(len(numbers))
        numbers[axis] = random.choice([*SIZES, numbers[axis] + 1, numbers[axis] - 1, 2 * numbers[axis]])
        changed = replace(tensor, **{kind: tuple(numbers)})
    if any(size > 1000 and stride == 0 for size, stride in zip(changed.shape, changed.strides, strict=False)):
        return call  # true, but would keep us busy for days
    return call | {name: changed}


@pytest.mark.parametrize("way", RIGHT)
def test_damaged_calls_run_or_are_refused(way: str) -> None:
    refused, cases = 0, CASES if way == "forward" else CASES // 3
    for seed in range(cases):
        random = Random(seed)
        torch.manual_seed(seed)
        call = RIGHT[way](random)
        for _ in range(random.randint(1, 3)):
            call = damage(call, random)
        try:
            attend(call)
        except (ValueError, TypeError):
            refused += 1
    assert cases / 2 < refused < cases * 0.95


# --- what must be refused, and how it is called ---


def described(*shape: int, dtype: torch.dtype = torch.float32) -> Description:
    return Description.of(torch.zeros(shape, dtype=dtype))


def integers(*numbers: int) -> Description:
    return Description.of(torch.tensor(numbers, dtype=torch.int32))


def small_call(packed: bool) -> dict[str, Any]:
    call: dict[str, Any] = {
        "query": described(1, 4, 6, 8), "key": described(1, 2, 9, 8), "value": described(1, 2, 9, 5),
        "output": described(1, 4, 6, 5), "lse": described(1, 4, 6), "factor": described(1, 4, 9),
        "key_mask": described(1, 9, dtype=torch.bool), "position_bias": described(1, 1, 6, 9),
        "sinks": described(4), "mode": "shifted", "is_causal": True, "scale": 1.0, "instruction_set": "plain",
        "threads": 1,
    }  # fmt: skip
    if not packed:
        return call
    del call["key_mask"]
    return call | {
        "own_key": described(2, 6, 8), "own_value": described(2, 6, 5), "suffix_starts": integers(0, 4, 6),
        "prefix_lengths": integers(5, 6), "base_starts": integers(4, 0), "factor": described(2, 1, 9),
        "position_bias": described(1, 4, 9, 9),
    }  # fmt: skip


WRONG = [  # packed, argument, what it is, message
    (False, "query", described(4, 6, 8), r"query must have 4 dimensions, got shape \(4, 6, 8\)"),
    (False, "query", described(1, 3, 6, 8), "query must have a multiple of key's heads, got 3 and 2"),
    (False, "query", described(1, 0, 6, 8), "query must have a multiple of key's heads, got 0 and 2"),
    (False, "query", described(1, 4, 6, 8, dtype=torch.int32), "query must hold float32"),
    (False, "query", described(1, 4, 6, 0), "query must have a head dimension"),
    (
        False,
        "query",
        replace(described(1, 4, 6, 16), shape=(1, 4, 6, 8), strides=(384, 96, 16, 2)),
        "query .*contiguous",
    ),
    (False, "key", described(2, 2, 9, 8), "key must have batch 1 or the query's"),
    (False, "key", described(1, 2, 9, 7), r"key must have shape \(1, 2, 9, 8\), got \(1, 2, 9, 7\)"),
    (False, "key", described(1, 0, 9, 8), "query must have a multiple of key's heads"),
    (False, "key", described(1, 2, 9, 8, dtype=torch.float16), "key has dtype code 2, expected 0"),
    (False, "value", described(1, 2, 8, 5), "value must have shape"),
    (False, "value", described(1, 2, 9, 0), "value must have a head dimension"),
    (False, "value", described(1, 2, 9, 16385), "value must have a head dimension from 1 to 16384"),
    (False, "output", described(1, 4, 6, 8), "output must have shape"),
    (False, "output", replace(described(1, 4, 6, 5), strides=(0, 0, 5, 1)), "output must be contiguous"),
    (False, "lse", described(1, 4, 6, 1), "lse must have shape"),
    (False, "lse", described(1, 4, 6, dtype=torch.int32), "lse has dtype code 3"),
    (False, "lse", replace(described(1, 4, 6), strides=(6, 0, 1)), "lse must be contiguous"),
    (False, "factor", described(1, 4, 8), r"factor has shape \(1, 4, 8\)"),
    (False, "factor", described(2, 4, 9), "factor has shape"),
    (False, "factor", described(1, 2, 9), "factor has shape"),
    (False, "factor", described(1, 9), "factor must have 3 dimensions"),
    (False, "factor", described(1, 4, 9, dtype=torch.bfloat16), "factor has dtype code"),
    (False, "key_mask", described(1, 8, dtype=torch.bool), "key_mask must have shape"),
    (False, "key_mask", described(1, 9), "key_mask has dtype code"),
    (
        False,
        "key_mask",
        replace(described(1, 18, dtype=torch.bool), shape=(1, 9), strides=(18, 2)),
        "key_mask must be co",
    ),
    (False, "sinks", described(3), "sinks must have shape"),
    (False, "position_bias", described(1, 2, 6, 9), "position_bias has shape"),
    (False, "position_bias", described(1, 1, 6, 8), "position_bias has shape"),
    (False, "position_bias", described(6, 9), "position_bias must have 4 dimensions"),
    (False, "own_key", described(2, 6, 8), "own_key.*go together"),
    (False, "suffix_starts", integers(0, 6), "suffix_starts.*go together"),
    (False, "mode", "soft", "mode is unknown: 'soft'"),
    (False, "scale", math.nan, "scale must be finite"),
    (False, "scale", 1e39, "scale must be finite"),
    (False, "sliding_window", -1, "sliding_window must be >= 0"),
    (False, "softcap", -1.0, "softcap must be >= 0"),
    (False, "softcap", math.nan, "softcap must be >= 0"),
    (False, "softcap", 1e-50, "softcap is too small"),
    (False, "threads", 0, "threads must be from 1 to 4096, got 0"),
    (False, "threads", 10**6, "threads must be from 1 to 4096"),
    (False, "instruction_set", "avx10", "instruction set 'avx10' cannot run here"),
    (False, "instruction_set", "avx512_bf16", "cannot run here"),  # float32
    (True, "query", described(2, 4, 6, 8), "output must have shape|query must have batch 1"),
    (True, "key_mask", described(1, 9, dtype=torch.bool), "key_mask is for dense calls"),
    (True, "own_key", None, "own_key.*go together"),
    (True, "base_starts", None, "base_starts.*go together"),
    (True, "own_key", described(2, 5, 8), "own_key must have shape"),
    (True, "own_value", described(2, 6, 5, dtype=torch.float16), "own_value has dtype code"),
    (True, "suffix_starts", integers(0), "suffix_starts must have one entry more"),
    (True, "suffix_starts", integers(0, 5, 4), "suffix_starts must begin with 0 and end with the number of rows"),
    (True, "suffix_starts", integers(1, 4, 6), "suffix_starts must begin with 0"),
    (True, "suffix_starts", integers(0, 7, 6), "suffix_starts must not decrease|factor is shorter than a variant"),
    (True, "suffix_starts", integers(0, -3, 6), "suffix_starts must not decrease"),
    (True, "suffix_starts", described(3), "suffix_starts has dtype code 0, expected 3"),
    (True, "prefix_lengths", integers(5), "prefix_lengths must have shape"),
    (True, "prefix_lengths", integers(-1, 6), "prefix_lengths must be >= 0, got -1"),
    (True, "prefix_lengths", integers(6, 6), "key holds 9 keys, but a variant reaches to key 10"),
    (True, "prefix_lengths", integers(2**31 - 1, 6), "key holds 9 keys, but a variant reaches to key 2147483651"),
    (True, "base_starts", integers(0, -1), "base_starts must be >= 0, got -1"),
    (True, "base_starts", integers(2**31 - 1, 0), "key holds 9 keys, but a variant reaches"),
    (True, "factor", described(2, 1, 8), "factor is shorter than a variant"),
    (True, "factor", described(2, 1, 0), "factor is shorter than a variant"),
    (True, "factor", described(1, 1, 9), "factor has shape"),
    (True, "position_bias", described(1, 4, 8, 9), "position_bias is shorter than a variant"),
    (True, "position_bias", described(1, 4, 9, 8), "position_bias is shorter than a variant"),
    (True, "position_bias", described(1, 4, 0, 0), "position_bias is shorter than a variant"),
]


@pytest.mark.parametrize(("packed", "name", "argument", "message"), WRONG, ids=[f"{w[1]}-{w[3]}" for w in WRONG])
def test_refusals_name_the_argument(packed: bool, name: str, argument: Any, message: str) -> None:
    attend(small_call(packed))
    with pytest.raises(ValueError, match=message):
        attend(small_call(packed) | {name: argument})


@pytest.mark.parametrize(
    ("packed", "changes", "message"),
    [
        (False, {"delta": described(1, 4, 5)}, r"delta must have shape \(1, 4, 6\)"),
        (False, {"grad_query": described(1, 4, 6, 5)}, "grad_query must have shape"),
        (False, {"grad_key": described(1, 2, 9, 8, dtype=torch.float16)}, "grad_key has dtype code 2, expected 0"),
        (False, {"grad_value": replace(described(1, 2, 9, 5), strides=(0, 0, 5, 1))}, "grad_value must be contiguous"),
        (False, {"grad_own_key": described(2, 6, 8)}, "grad_own_key and grad_own_value are for packs"),
        (False, {"grad_factor": described(1, 1, 9)}, "grad_factor must have shape"),
        (False, {"factor": None, "grad_factor": described(1, 4, 9)}, "grad_factor is for calls with a factor"),
        (True, {"grad_own_value": described(2, 6, 8)}, "grad_own_value must have shape"),
        (True, {"grad_factor": described(2, 1, 9, dtype=torch.bfloat16)}, "grad_factor has dtype code"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else None,
)
def test_refusals_of_a_backward(packed: bool, changes: dict[str, Any], message: str) -> None:
    call = small_call(packed)
    call["delta"] = described(1, 4, 6)
    attend(call)
    with pytest.raises(ValueError, match=message):
        attend(call | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"address": 0}, r"tensor of shape \(4, 8\) has a null address"),
        ({"address": 2}, "tensor is not aligned to its elements"),
        ({"bytes": 127}, r"tensor of shape \(4, 8\) and strides \(8, 1\) reaches beyond its 127 bytes"),
        ({"bytes": -1}, "negative number of bytes"),
        ({"strides": (9, 1)}, "reaches beyond its 128 bytes"),
        ({"strides": (-8, 1)}, "negative strides"),
        ({"strides": (2**62, 1)}, "reaches beyond"),
        ({"strides": (8,)}, r"shape \(4, 8\) but strides \(8\)"),
        ({"shape": (5, 8)}, "reaches beyond"),
        ({"shape": (-4, 8)}, r"shape \(-4, 8\)"),
        ({"shape": (2**62, 8)}, "shape"),
        ({"shape": (2**40, 2**40), "strides": (2**62, 2**62)}, "reaches beyond"),
        ({"dtype": 5}, "dtype code is unknown: 5"),
        ({"dtype": -1}, "dtype code is unknown: -1"),
        ({"dtype": 2**32}, "dtype code is unknown: 4294967296"),
    ],
)
def test_tensors_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    from atman_kernels import _C

    right = described(4, 8)
    if changes.get("address"):
        changes = {"address": right.address + changes["address"]}
    x = replace(right, **changes)
    with pytest.raises(ValueError, match=message):
        _C.Tensor(x.address, x.bytes, x.dtype, x.shape, x.strides)


def test_dtype_codes_are_checked() -> None:
    from atman_kernels import _C

    for code in (-1, 3, 4, 99):
        with pytest.raises(ValueError, match=f"got {code}"):
            _C.cpu_instruction_sets(code)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_largest_window_is_none(is_causal: bool, packed: bool) -> None:
    """Sums of positions and windows must not overflow."""
    torch.manual_seed(0)
    call = small_call(packed) | {"is_causal": is_causal}
    for x in call.values():
        if isinstance(x, Description) and x.dtype == CODES[torch.float32]:
            x.tensor.uniform_()
        if isinstance(x, Description) and x.dtype == CODES[torch.bool]:
            x.tensor.fill_(True)
    attend(call)
    expected = call["output"].tensor.clone()
    assert expected.abs().max() > 0
    for window in (2**40, 2**62, 2**63 - 1):
        attend(call | {"sliding_window": window})
        assert torch.equal(call["output"].tensor, expected)


def test_work_space_beyond_all_memory_is_refused() -> None:
    """One key, repeated with stride 0: its layout for the products would take 2^64 bytes and more."""
    heads, rows, dim = 256, 97, 16384
    key = replace(described(dim), shape=(1, heads, 2**40, dim), strides=(0, 0, 0, 1))
    value = replace(described(1), shape=(1, heads, 2**40, 1), strides=(0, 0, 0, 1))
    query = replace(described(dim), shape=(1, heads, rows, dim), strides=(0, 0, 0, 1))
    call = {"query": query, "key": key, "value": value, "output": described(1, heads, rows, 1)}
    options = {"mode": "shifted", "is_causal": False, "scale": 1.0, "instruction_set": "plain", "threads": 1}
    with pytest.raises(MemoryError):
        attend(call | options)


def test_sizes_without_elements_do_nothing() -> None:
    """No rows, but more heads than any work space could hold."""
    query = replace(described(0), shape=(1, 2**40, 0, 8), strides=(0, 0, 0, 1))
    output = replace(described(0), shape=(1, 2**40, 0, 8), strides=(0, 0, 0, 1))
    call = {"query": query, "key": described(1, 1, 3, 8), "value": described(1, 1, 3, 8), "output": output}
    options = {"mode": "shifted", "is_causal": False, "scale": 1.0, "instruction_set": "plain", "threads": 3}
    attend(call | options)
