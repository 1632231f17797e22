"""The search for tiles takes the first candidate that fits, and goes on where it ended."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from atman_kernels.backends.triton import configs
from atman_kernels.backends.triton.configs import KernelConfig, Key
from atman_kernels.backends.triton.offline import Call
from benchmarks import compile_report, tile_search

KEY = Key("16-bit", "dense_key", 128)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Call]]:
    """What was compiled; tiles of more than 2048 pairs spill, more than two stages do not fit into shared memory."""
    calls: list[tuple[str, Call]] = []

    def measure(architecture: str, key: Key, call: Call) -> dict[str, Any]:
        assert call.config is not None
        calls.append((architecture, call))
        size, stages = call.config.block_m * call.config.block_n, call.config.num_stages
        found = {
            "registers": 200,
            "spilled": 8 * (size > 2048),
            "shared": stages << 10,
            "wgmma": 0,
            "serialized": False,
        }
        return found | {"fits": size <= 2048 and stages < 3}

    monkeypatch.setattr(compile_report, "measure", measure)
    return calls


def test_the_first_that_fits_is_taken(compiled: list[Any], tmp_path: Path) -> None:
    search = tile_search.Search(tmp_path / "log", keep=False)
    config = search.entry("sm_90", KEY)
    assert config == KernelConfig(32, 64, 8, 2)
    tried = [call.config for _, call in compiled]
    assert tried[: tried.index(config)] == [
        other for other in tile_search.candidates(KEY) if other.block_m * other.block_n > 2048 and other.num_stages == 3
    ] + [KernelConfig(32, 64, 8, 3)], "what spills is not tried with fewer stages"
    assert {call.mode for _, call in compiled if call.config is not None} >= {"log_additive", "shifted"}
    assert any(call.head_dim == 80 for _, call in compiled)

    before = len(compiled)
    again = tile_search.Search(tmp_path / "log", keep=False)
    assert again.entry("sm_90", KEY) == config
    assert again.entry("sm_100", KEY) == config, "what fits an architecture that is much alike is tried first"
    assert {architecture for architecture, _ in compiled[before:]} == {"sm_100"}
    assert {call.config.block_m for _, call in compiled[before:]} <= {16, 32}


def test_what_stands_in_the_table_can_be_kept(compiled: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    stands = KernelConfig(16, 32, 4, 1)
    monkeypatch.setattr(configs, "load", lambda name: {KEY: stands})
    assert tile_search.Search(None, keep=True).entry("sm_90", KEY) == stands


def test_where_nothing_fits_nothing_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = {"registers": 255, "spilled": 8, "shared": 0, "wgmma": 0, "serialized": False, "fits": False}
    monkeypatch.setattr(compile_report, "measure", lambda *_: nothing)
    assert tile_search.Search(None, keep=False).entry("sm_90", KEY) is None


def test_tables_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in configs.ARCHITECTURES:
        text = (configs.FOLDER / f"{name}_backward.json").read_text(encoding="utf-8")
        (tmp_path / f"{name}_backward.json").write_text(text, encoding="utf-8")
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    configs.load.cache_clear()
    search = tile_search.Search(None, keep=False)
    search.found["sm_90", KEY] = KernelConfig(16, 16, 4, 1)
    assert search.write_tables() == 1
    configs.load.cache_clear()
    try:
        table = configs.load("sm_90_backward")
        assert table[KEY] == KernelConfig(16, 16, 4, 1)
        assert len(table) == 50
    finally:
        configs.load.cache_clear()
