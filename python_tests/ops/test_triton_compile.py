"""The Triton kernels compile for GPUs that are not here, fit into their registers and their shared memory."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

from triton import JITFunction

from atman_kernels import ops
from atman_kernels.backends.triton import configs, launch, launch_backward, offline
from atman_kernels.backends.triton.configs import KernelConfig, Key
from atman_kernels.backends.triton.offline import Call, compile_call
from atman_kernels.pack import VariantPack
from benchmarks import compile_report, host_time

DATA_CENTRE = ("sm_80", "sm_90", "sm_100")
UNLIKE: tuple[dict[str, Any], ...] = ({}, {"factor": False}, {"mode": "shifted"})


def entry(architecture: str, key: Key) -> KernelConfig:
    return configs.load(architecture)[key]


@pytest.mark.parametrize("architecture", DATA_CENTRE)
@pytest.mark.parametrize("regime", configs.REGIMES)
def test_common_entries_fit(regime: str, architecture: str) -> None:
    key = Key("16-bit", regime, 128)
    for call in compile_report.calls(key, entry(architecture, key)):
        row = compile_report.measure(architecture, key, call)
        assert row["fits"], row


@pytest.mark.parametrize("regime", ["packed_query", "dense_key"])
def test_common_entries_of_the_backward_fit(regime: str) -> None:
    key = Key("16-bit", regime, 128)
    for call in compile_report.calls(key, configs.load("sm_80_backward")[key]):
        row = compile_report.measure("sm_80", key, call)
        assert row["fits"], row


@pytest.mark.slow
@pytest.mark.parametrize("regime", configs.BACKWARD_REGIMES)
def test_features_of_the_backward_fit(regime: str) -> None:
    key = Key("16-bit", regime, 128)
    for call in compile_report.feature_calls(key, configs.load("sm_90_backward")[key]):
        row = compile_report.measure("sm_90", key, call)
        assert row["fits"], row


@pytest.mark.parametrize("index", range(len(compile_report.FEATURES)), ids=map(str, compile_report.FEATURES))
def test_features_fit(index: int) -> None:
    dim = 128 if "head_dim" in compile_report.FEATURES[index] else 64  # whose entry the call would get
    key = Key("16-bit", "packed", dim)
    call = list(compile_report.feature_calls(key, entry("sm_90", key)))[index]
    row = compile_report.measure("sm_90", key, call)
    assert row["fits"], row


def test_dense_features_compile() -> None:
    key = Key("32-bit", "dense", 64)
    call = Call("dense", torch.float32, 64, config=entry("sm_80", key), key_mask=True, bias=True, sinks=True, splits=3)
    kernels = compile_call(80, call)
    assert [kernel.kernel for kernel in kernels] == ["prepare_factors", "attention", "merge"]
    assert all(kernel.spilled == 0 for kernel in kernels)


def test_the_report_sees_what_does_not_fit() -> None:
    key, config = Key("16-bit", "dense", 256), KernelConfig(block_m=128, block_n=128, num_warps=4, num_stages=3)
    row = compile_report.measure("sm_80", key, Call("dense", torch.bfloat16, 256, config=config))
    assert row["spilled"] > 0
    assert row["shared"] > configs.SHARED_MEMORY["sm_80"]
    assert not row["fits"]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("regime", ["dense", "packed"])
def test_hopper_products_overlap(regime: str, head_dim: int) -> None:
    """They are warpgroup products, and none waits for the one before it."""
    key = Key("16-bit", regime, head_dim)
    for call in compile_report.calls(key, entry("sm_90", key)):
        for changes in UNLIKE:
            row = compile_report.measure("sm_90", key, replace(call, **changes))
            assert row["wgmma"] > 0, row
            assert not row["serialized"], row


def test_the_report_hears_the_assembler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its remarks are read, and one about serialised products makes a kernel unfit."""
    key = Key("16-bit", "dense", 64)
    call = next(compile_report.calls(key, entry("sm_90", key)))
    monkeypatch.setattr(offline, "SERIALIZED", "ptxas info")
    row = compile_report.measure("sm_90", key, call)
    assert row["serialized"]
    assert not row["fits"]


@contextmanager
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[Any], list[str]]]:
    """Nothing runs; what reaches the launcher, and the kernels whose arguments Triton looked at."""
    arguments: list[Any] = []
    looked: list[str] = []
    before = JITFunction.run

    def run(kernel: Any, *given: Any, **options: Any) -> Any:
        looked.append(kernel.fn.__name__)
        return before(kernel, *given, **options)

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(host_time._Launcher, "__call__", lambda launcher, *given: arguments.append(given))
    with host_time.nothing_runs(), torch.no_grad():
        yield arguments, looked


def known(arguments: tuple[Any, ...]) -> list[Any]:
    """What two launches of a plan have in common: not the addresses, and not the profiler's dictionary."""
    return [(x.shape, x.dtype) if isinstance(x, torch.Tensor) else x for x in arguments[:6] + arguments[7:]]


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("dense", ["attention"]),
        ("decode, factors, split", ["prepare_factors", "attention", "merge"]),
        ("pack, factors", ["prepare_factors", "attention"]),
    ],
)
def test_a_known_kind_of_call_only_launches(name: str, kernels: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton looks at arguments the first time; what it is given then is what the launcher is given ever after."""
    call = host_time.calls()[name]
    monkeypatch.setattr(launch, "_plans", {})
    with launched(monkeypatch) as (arguments, looked):
        call()
        assert looked == kernels
        first = [known(given) for given in arguments]
        arguments.clear()
        call()
        assert looked == kernels
        assert [known(given) for given in arguments] == first


def test_a_known_kind_of_backward_only_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """In two splits, whose parts of the base's gradients are added up."""
    pack = VariantPack.build([2, 3], [20, 20])
    rows, base = torch.zeros(2, 5, 16, requires_grad=True), torch.zeros(2, 20, 16, requires_grad=True)
    monkeypatch.setattr(launch_backward, "_plans", {})
    with launched(monkeypatch) as (arguments, looked), configs.forced(KernelConfig(16, 16, 4, 1), 2):
        with torch.enable_grad():
            factor = torch.ones(2, 23)
            output = ops.packed_suppressed_attention(rows, rows, rows, base, base, pack, factor, backend="triton")
        found = []
        for _ in range(3):
            arguments.clear()
            looked.clear()
            torch.autograd.grad(output, [rows, base], torch.zeros_like(output), retain_graph=True)
            found.append(([known(given) for given in arguments], looked.copy()))
    first, second, third = found
    assert first[1] == ["prepare_rows", "flag_factors", "prepare_places", "query_gradient", "add_splits", "list_tiles",
                        "key_gradient", "add_splits", "add_splits", "key_gradient"]  # fmt: skip
    assert second == (first[0], [])
    assert third == second
    assert len(launch_backward._plans) == 1


def test_another_kind_of_call_has_a_plan_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever Triton would compile anew for: shapes, strides, dtypes, alignment, options, forced configurations."""
    monkeypatch.setattr(launch, "_plans", {})
    room = torch.zeros(3, 1, 2, 33, 64)
    query = room[0, :, :, :32].half()
    factor = torch.ones(1, 32)
    misaligned = torch.zeros(query.numel() + 1, dtype=torch.float16)[1:].view(query.shape)
    turned = query.mT.contiguous().mT

    def call(query: torch.Tensor = query, key: torch.Tensor = query, **options: Any) -> Any:
        return ops.suppressed_attention(query, key, key, **options, backend="triton")

    calls: list[Callable[[], Any]] = [
        call,
        lambda: call(query[:, :, :31]),
        lambda: call(turned),
        lambda: call(misaligned),
        lambda: call(query.bfloat16(), query.bfloat16()),
        lambda: call(is_causal=True),
        lambda: call(scale=0.5),
        lambda: call(factor=factor),
        lambda: call(factor=factor, mode="shifted"),
        lambda: call(factor=factor.half()),
        lambda: call(sinks=torch.zeros(2)),
        lambda: call(return_lse=True),
    ]
    with launched(monkeypatch):
        for number, each in enumerate(calls, 1):
            each()
            each()
            assert len(launch._plans) == number
        with configs.forced(KernelConfig(16, 32, 4, 1)):
            call()
        assert len(launch._plans) == len(calls) + 1


def test_plans_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_plans", {})
    monkeypatch.setattr(launch, "MOST_PLANS", 2)
    with launched(monkeypatch):
        for rows in (1, 2, 3, 4, 5):
            ops.suppressed_attention(*[torch.zeros(1, 1, rows, 16)] * 3, backend="triton")
            assert len(launch._plans) <= 2


def test_plans_of_backwards_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_backward, "_plans", {})
    monkeypatch.setattr(launch, "MOST_PLANS", 2)
    with launched(monkeypatch), configs.forced(KernelConfig(16, 16, 4, 1), 1):
        for rows in (1, 2, 3):
            leaf = torch.zeros(1, 1, rows, 16, requires_grad=True)
            with torch.enable_grad():
                ops.suppressed_attention(leaf, leaf.detach(), leaf.detach(), backend="triton").sum().backward()
            assert len(launch_backward._plans) <= 2


def test_nothing_is_left_behind() -> None:
    """A process that compiled for other GPUs still knows its own."""
    from triton.runtime.driver import driver

    before = driver._active, launch._launcher.get()
    compile_call(90, Call("dense", torch.float16, 16))
    assert (driver._active, launch._launcher.get()) == before


@pytest.mark.slow
@pytest.mark.parametrize("architecture", configs.ARCHITECTURES)
def test_every_entry_fits(architecture: str) -> None:
    assert [row for row in compile_report.rows([architecture], features=False) if not row["fits"]] == []
