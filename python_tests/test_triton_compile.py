"""The Triton kernels compile for GPUs that are not here, fit into their registers and their shared memory."""

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

from atman_kernels.backends.triton import configs, offline
from atman_kernels.backends.triton.configs import KernelConfig, Key
from atman_kernels.backends.triton.offline import Call, compile_call
from benchmarks import compile_report

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


def test_nothing_is_left_behind() -> None:
    """A process that compiled for other GPUs still knows its own."""
    from triton.runtime.driver import driver

    from atman_kernels.backends.triton import launch

    before = driver._active, launch.run
    compile_call(90, Call("dense", torch.float16, 16))
    assert (driver._active, launch.run) == before


@pytest.mark.slow
@pytest.mark.parametrize("architecture", configs.ARCHITECTURES)
def test_every_entry_fits(architecture: str) -> None:
    assert [row for row in compile_report.rows([architecture], features=False) if not row["fits"]] == []
