"""Which tile sizes a call gets, which backend is chosen and why not; no kernel runs here, and none is compiled."""

import json
import warnings
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from atman_kernels import backends
from atman_kernels.backends import triton as backend
from atman_kernels.errors import BackendUnavailableError

pytest.importorskip("triton")

from atman_kernels.backends.triton import configs
from atman_kernels.backends.triton.configs import KernelConfig, Key


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@pytest.mark.parametrize("name", configs.ARCHITECTURES)
def test_tables_are_complete(name: str) -> None:
    table = configs.load(name)
    assert set(table) == {Key(*key) for key in product(configs.DTYPES, configs.REGIMES, configs.HEAD_DIMS)}
    for key, config in table.items():
        assert is_power_of_two(config.block_m), key
        assert 16 <= config.block_m <= 128, key
        assert is_power_of_two(config.block_n), key
        assert 16 <= config.block_n <= 128, f"{key}: two flags must be enough for a block"
        assert config.num_warps in (4, 8), key
        assert 1 <= config.num_stages <= 4, key
        assert key.regime != "decode" or config.block_m <= configs.DECODE_ROWS, key


@pytest.mark.parametrize("name", configs.ARCHITECTURES)
def test_files_are_as_they_are_written(name: str) -> None:
    text = (configs.FOLDER / f"{name}.json").read_text(encoding="utf-8")
    assert configs.dump(configs.parse(json.loads(text))) == text


@pytest.mark.parametrize("dim", [1, 15, 16, 17, 64, 80, 96, 112, 128, 129, 255, 256])
def test_every_head_dimension_has_a_config(dim: int) -> None:
    for element_size, regime in product((2, 4), configs.REGIMES):
        config = configs.choose(configs.load("sm_90"), element_size, regime, dim, 16, rows=1000)
        wanted = configs.load("sm_90")[Key("16-bit" if element_size == 2 else "32-bit", regime, configs.padded(dim))]
        most = wanted.num_stages if dim == configs.padded(dim) else 2  # masked loads take registers
        assert config == replace(wanted, num_stages=min(wanted.num_stages, most))


def test_tiles_are_no_taller_than_the_rows() -> None:
    table = {Key("16-bit", "decode", 64): KernelConfig(64, 32, 4, 2)}
    assert [configs.choose(table, 2, "decode", 64, 33, rows).block_m for rows in (1, 17, 64, 999)] == [16, 32, 64, 64]


def test_a_bias_takes_a_smaller_tile() -> None:
    table = configs.load("sm_90")
    for regime, dim in product(configs.REGIMES, configs.HEAD_DIMS):
        without = configs.choose(table, 2, regime, dim, dim, 1000)
        beside = configs.choose(table, 2, regime, dim, dim, 1000, has_bias=True)
        assert beside.block_m <= min(without.block_m, 64)
        assert beside.block_n <= min(without.block_n, 32)


@pytest.mark.parametrize(
    ("capability", "name"),
    [((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 9), "sm_86"), ((9, 0), "sm_90"), ((10, 0), "sm_100"),
     ((10, 3), "sm_100"), ((12, 0), "sm_86"), ((15, 0), "sm_86")],
)  # fmt: skip
def test_architectures(capability: tuple[int, int], name: str) -> None:
    assert configs.architecture(capability) == name


@pytest.mark.parametrize(
    ("programs", "keys", "processors", "splits"),
    [(1, 255, 132, 1), (1, 256, 132, 1), (1, 512, 132, 2), (1, 10**6, 132, 64), (66, 10**6, 132, 4),
     (67, 10**6, 132, 1), (33, 2048, 132, 8), (5000, 10**6, 132, 1), (1, 0, 132, 1)],
)  # fmt: skip
def test_splits_of_few_rows(programs: int, keys: int, processors: int, splits: int) -> None:
    assert configs.choose_splits(programs, keys, processors) == splits


def test_forced_configs_end_with_their_block() -> None:
    config = KernelConfig(16, 16, 4, 1)
    with configs.forced(config, 3):
        assert configs.forced_now() == configs.Forced(config, 3)
    assert configs.forced_now() == configs.Forced()


# --- tuning ---


def test_tuning_takes_the_fastest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    from atman_kernels.backends.triton import tuning

    slow, fast, too_large = KernelConfig(64, 32, 4, 2), KernelConfig(64, 64, 4, 2), KernelConfig(128, 128, 4, 4)
    times = {slow: 2.0, fast: 1.0, too_large: 0.5}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(tuning, "workload", lambda key, device: None)
    monkeypatch.setattr(tuning, "milliseconds", lambda call, config: times.get(config, 3.0))
    monkeypatch.setattr(tuning, "fits", lambda key, config, capability: config != too_large)
    key, other = Key("16-bit", "dense", 64), Key("16-bit", "packed", 64)
    found = list(tuning.tune({key: slow, other: fast}, [key, other], torch.device("cuda")))
    assert found == [tuning.Tuned(key, slow, 2.0, fast, 1.0), tuning.Tuned(other, fast, 1.0, fast, 1.0)]


def test_tuning_ignores_what_is_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    from atman_kernels.backends.triton import tuning

    old = KernelConfig(64, 32, 4, 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(tuning, "workload", lambda key, device: None)
    monkeypatch.setattr(tuning, "milliseconds", lambda call, config: 1.0 if config == old else 0.99)
    monkeypatch.setattr(tuning, "fits", lambda key, config, capability: True)
    key = Key("32-bit", "decode", 16)
    assert [found.new for found in tuning.tune({key: old}, [key], torch.device("cuda"))] == [old]


def test_times_are_told_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    from atman_kernels.backends.triton import tuning

    told: list[tuple[KernelConfig, float]] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(tuning, "workload", lambda key, device: None)
    monkeypatch.setattr(tuning, "fits", lambda key, config, capability: config.num_stages == 2)

    def milliseconds(call: object, config: KernelConfig) -> float:
        if len(told) == 3:
            raise KeyboardInterrupt
        return 1.0 / config.block_n

    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    key, old = Key("16-bit", "decode", 64), KernelConfig(16, 16, 4, 1)
    with pytest.raises(KeyboardInterrupt):
        list(tuning.tune({key: old}, [key], torch.device("cuda"), tried=lambda key, *found: told.append(found)))
    assert told[0] == (old, 1 / 16)
    assert len(told) == 3


def test_a_call_is_timed_while_the_gpu_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a short call would be timed with the host's work for it."""
    from atman_kernels.backends.triton import tuning

    happened: list[str] = []
    event = SimpleNamespace(
        record=lambda: happened.append("record"), synchronize=lambda: None, elapsed_time=lambda other: 1.0
    )
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: happened.append("busy"))
    assert tuning.milliseconds(lambda: happened.append("call"), KernelConfig(16, 16, 4, 1)) == 1.0
    assert happened == ["call"] * tuning.WARMUP + ["busy", "record", "call", "record"] * tuning.ROUNDS


def test_hand_picked_configurations() -> None:
    from atman_kernels.backends.triton import tuning

    for name in configs.ARCHITECTURES:
        table = configs.load(name)
        found = tuning.hand_picked(table)
        assert {(key.regime, key.head_dim) for key, _ in found} == set(product(configs.REGIMES, (64, 128)))
        assert len(set(found)) == len(found) <= 30, "minutes are few"
        assert all(config.block_m * config.block_n <= 128 * 128 for _, config in found)


# --- availability ---


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with an H100; tests take parts of it away."""
    found = SimpleNamespace(triton=True, cuda=True, capability=(9, 0))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backend, "find_spec", lambda name: found.triton or None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found.cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: found.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")
    monkeypatch.setattr(torch.version, "hip", None)
    return found


def test_available_on_a_gpu(machine: SimpleNamespace) -> None:
    assert backends.unavailable_reason("triton", "cuda") is None
    assert backends.load(None, "cuda").__name__.endswith("triton")


def test_reasons_why_not(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "needs a CUDA device; TRITON_INTERPRET=1" in str(backends.unavailable_reason("triton", "cpu"))
    machine.capability = (7, 5)
    assert "compute capability 8.0, Some GPU has 7.5" in str(backends.unavailable_reason("triton", "cuda"))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "NVIDIA" in str(backends.unavailable_reason("triton", "cuda"))
    machine.cuda = False
    assert "torch sees no CUDA device; TRITON_INTERPRET=1" in str(backends.unavailable_reason("triton", "cuda"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.unavailable_reason("triton", "cpu") is None
    machine.triton = False
    assert "not installed; pip install" in str(backends.unavailable_reason("triton", "cpu"))
    with pytest.raises(BackendUnavailableError, match="'triton' cannot run on 'cuda' tensors: triton is not installed"):
        backends.load("triton", "cuda")


def test_the_default_says_once_why_it_is_slow(machine: SimpleNamespace) -> None:
    backends._say_once.cache_clear()
    machine.capability = (7, 5)
    with pytest.warns(UserWarning, match=r"without a kernel.*'triton'.*8\.0"):
        assert backends.load(None, "cuda").__name__.endswith("reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.load(None, "cuda").__name__.endswith("reference")


def test_what_the_default_cannot_do_goes_to_the_definition(machine: SimpleNamespace) -> None:
    backends._say_once.cache_clear()
    double, wide = torch.zeros(1, 1, 1, 8, dtype=torch.float64), torch.zeros(1, 1, 1, 300)
    for tensor, reason in ((double, "float64"), (wide, "256.*300")):
        fake = SimpleNamespace(device=torch.device("cuda"), dtype=tensor.dtype, shape=tensor.shape)
        with pytest.warns(UserWarning, match=reason):
            assert backends.load_for(None, fake, fake).__name__.endswith("reference")  # type: ignore[arg-type]
        with pytest.raises(BackendUnavailableError, match=f"{reason}.*'reference'"):
            backends.load_for("triton", fake, fake)  # type: ignore[arg-type]
