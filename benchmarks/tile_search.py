"""Find the tiles of the backward's tables by compiling, on a machine without a GPU.

    python -m benchmarks.tile_search --architecture sm_90 [--dtype 16-bit] [--regime dense_key] [--head-dim 128]
    python -m benchmarks.tile_search --log FILE --write     # what was found so far, into the tables

For each entry candidates are compiled, the most promising first; the first one is taken that neither spills nor asks
for more shared memory than there is, with features too. What is promising is an argument, no measurement: a large tile
reads keys and values less often, eight warps hold more of it, more stages hide more of what is read. On a GPU,
measure. Every compilation is a line of the log, and a search with the same log goes on where it ended.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

from atman_kernels.backends.triton import configs
from atman_kernels.backends.triton.configs import BACKWARD_REGIMES, KernelConfig, Key
from benchmarks import compile_report

MOST_REGISTERS = 255
STAGES = (3, 2, 1)
HELD, WALKED = (128, 64, 32, 16), (64, 32, 16)
LARGEST = {"16-bit": 128 * 64, "32-bit": 32 * 32}  # rows times keys; larger ones of float32 take minutes to compile
# What takes more registers than the plain call does.
MODE = {"mode": "shifted"}
PADDED = {64: 48, 128: 80, 256: 192}  # head dimensions that an entry serves beside its own
# A table whose entries are tried first: of an architecture that is much alike.
LIKE = {"sm_86": "sm_80", "sm_100": "sm_90"}
COMMON = (128, 64, 256, 32, 16)  # head dimensions, the most common first


def entries(architectures: list[str], dtypes: list[str], regimes: list[str], dims: Sequence[int]) -> Iterator[Any]:
    """(architecture, key): the common ones first."""
    for dtype, dim, architecture, regime in product(dtypes, dims, architectures, regimes):
        yield architecture, Key(dtype, regime, dim)


def candidates(key: Key) -> Iterator[KernelConfig]:
    """Tiles worth a try, the most promising first; `block_m` are rows, `block_n` keys."""
    largest = LARGEST[key.dtype] // (4 if (key.dtype, key.head_dim) == ("32-bit", 256) else 1)
    sizes = [(held, walked) for held, walked in product(HELD, WALKED) if held * walked <= largest]
    sizes.sort(key=lambda size: (-size[0] * size[1], size[0] > 4 * size[1], -size[0]))
    for held, walked in sizes:
        for warps in (8, 4) if held * walked >= 2048 else (4, 8):
            if _registers(key, held, walked, warps) <= MOST_REGISTERS:
                block_m, block_n = (walked, held) if key.regime.endswith("_key") else (held, walked)
                yield from (KernelConfig(block_m, block_n, warps, stages) for stages in STAGES)


def _registers(key: Key, held: int, walked: int, warps: int) -> float:
    """What a thread needs at the least: its part of what is summed, and of the scores and their gradients."""
    sums = {"key": 2 * key.head_dim, "query": key.head_dim}.get(key.regime.rpartition("_")[2], walked)
    return held * (sums + 2 * walked) / (32 * warps)


class Search:
    """Compiles, and keeps a log."""

    def __init__(self, path: Path | None, keep: bool) -> None:
        self.path, self.keep = path, keep
        self.known: dict[Any, dict[str, Any]] = {}
        self.found: dict[tuple[str, Key], KernelConfig] = {}
        if path is not None and path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                self._remember(json.loads(line))

    def _remember(self, row: dict[str, Any]) -> None:
        key, config = Key(**row["key"]), KernelConfig(**row["config"])
        if row["what"] == "taken":
            self.found[row["architecture"], key] = config
        self.known[row["architecture"], key, config, row["what"]] = row

    def _write(self, row: dict[str, Any]) -> None:
        self._remember(row)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def entry(self, architecture: str, key: Key) -> KernelConfig | None:
        """The first candidate that fits."""
        if (taken := self.found.get((architecture, key))) is not None:
            return taken
        first = [configs.load(f"{architecture}_backward").get(key)] if self.keep else []
        if architecture in LIKE:
            first.append(self.found.get((LIKE[architecture], key)))
        if key.head_dim < 64:
            first.append(self.found.get((architecture, replace(key, head_dim=64))))
        spilled: set[Any] = set()
        for config in dict.fromkeys((*filter(None, first), *candidates(key))):
            tile = config.block_m, config.block_n, config.num_warps
            if tile in spilled:  # with fewer stages, too
                continue
            refused = self._objection(architecture, key, config)
            if refused is None:
                self._write({"architecture": architecture, "key": asdict(key), "config": asdict(config),
                             "what": "taken"})  # fmt: skip
                return config
            if refused["spilled"] or refused["serialized"]:
                spilled.add(tile)
        return None

    def _objection(self, architecture: str, key: Key, config: KernelConfig) -> dict[str, Any] | None:
        """What a call that the entry serves asks too much of; None if all fit."""
        changes: list[dict[str, Any]] = [{}]
        if key.head_dim in PADDED and architecture != "sm_86":  # else tiles are small, or known from elsewhere
            changes.append(MODE)
        if key.head_dim in PADDED and architecture not in LIKE:
            changes.append({"head_dim": PADDED[key.head_dim]})
        for change in changes:
            what = json.dumps(change)
            row = self.known.get((architecture, key, config, what))
            if row is None:
                started = time.monotonic()
                (call,) = compile_report.feature_calls(key, config, (change,))
                measured = compile_report.measure(architecture, key, call)
                row = {"architecture": architecture, "key": asdict(key), "config": asdict(config), "what": what}
                row |= {name: measured[name] for name in ("registers", "spilled", "shared", "wgmma", "serialized",
                                                          "fits")}  # fmt: skip
                row["seconds"] = round(time.monotonic() - started, 1)
                self._write(row)
            if not row["fits"]:
                return row
        return None

    def write_tables(self) -> int:
        """What was found, into the tables; how many entries that is."""
        for architecture in configs.ARCHITECTURES:
            name = f"{architecture}_backward"
            table = dict(configs.load(name))
            table |= {key: config for (where, key), config in self.found.items() if where == architecture}
            (configs.FOLDER / f"{name}.json").write_text(configs.dump(table), encoding="utf-8")
        return len(self.found)


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.tile_search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architecture", action="append", choices=list(configs.ARCHITECTURES))
    parser.add_argument("--dtype", action="append", choices=configs.DTYPES)
    parser.add_argument("--regime", action="append", choices=BACKWARD_REGIMES)
    parser.add_argument("--head-dim", action="append", type=int, choices=configs.HEAD_DIMS)
    parser.add_argument("--keep", action="store_true", help="try what stands in the table first")
    parser.add_argument("--log", type=Path, help="file of JSON lines; it is read first if it is there")
    parser.add_argument("--write", action="store_true", help="write the tables from the log, and search no more")
    options = parser.parse_args()
    search = Search(options.log, options.keep)
    if options.write:
        print(f"{search.write_tables()} entries written")
        return 0
    missing = 0
    for architecture, key in entries(
        options.architecture or list(configs.ARCHITECTURES),
        options.dtype or list(configs.DTYPES),
        options.regime or list(BACKWARD_REGIMES),
        options.head_dim or COMMON,
    ):
        started = time.monotonic()
        config = search.entry(architecture, key)
        missing += config is None
        shown = "nothing fits" if config is None else tuple(asdict(config).values())
        print(f"{architecture:7}{key.dtype:7}{key.regime:13}{key.head_dim:4}  {shown}"
              f"  {time.monotonic() - started:.0f} s", flush=True)  # fmt: skip
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
