"""The launches of one kind of backward: what follows from shapes, strides and options alone, made once and kept.

A plan holds no tensor. It names those that each kernel takes: of the call, of its results, or of the room that it asks
for. A kernel's parameter takes the tensor of its own name unless the launch says otherwise; None if there is none.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from atman_kernels.backends.triton import backward_steps, configs, launch
from atman_kernels.backends.triton.backward_broadcast import broadcast_gradient
from atman_kernels.backends.triton.backward_keys import key_gradient
from atman_kernels.backends.triton.backward_queries import query_gradient
from atman_kernels.backends.triton.configs import KernelConfig, Key
from atman_kernels.backends.triton.launch import Room, Step
from atman_kernels.formula import WIDEST_WINDOW, ScoreOptions

PREPARED_ROWS = 64
FLAGGED_BLOCK = 64  # times 64 flags: factors that are read at once
LISTED_TILES = 1024  # tiles of rows that are looked at at once
ADDED = 1024  # numbers of a result that one program adds up

Tensors = dict[str, Tensor | None]  # by the kernels' names for them; gradients as "grad_query" and so on


@dataclass
class Launch:
    """A kernel, and the name of the tensor that each of its parameters takes."""

    step: Step
    takes: dict[str, str]

    def __call__(self, tensors: Tensors) -> None:
        self.step({parameter: tensors[name] for parameter, name in self.takes.items()})


@dataclass
class Plan:
    """What is to be allocated, and what is to be done, in order."""

    room: Room = field(default_factory=dict)
    actions: list[Callable[[Tensors], None]] = field(default_factory=list)

    def run(self, tensors: Tensors) -> Tensors:
        """All tensors of the call, with what the results now hold."""
        query = tensors["query"]
        assert query is not None
        tensors = {**tensors, **launch.allocated(self.room, query)}
        for action in self.actions:
            action(tensors)
        return tensors


def make_plan(tensors: Tensors, options: ScoreOptions) -> Plan:
    """For all calls with tensors of these kinds; what is not wanted has no "grad_" among them."""
    planner = _Planner(tensors, options)
    planner.prepare()
    planner.query_gradient()
    planner.key_gradients()
    planner.broadcast_gradients()
    return planner.plan


class _Planner:
    """One plan under way: the arguments that its kernels have in common, and what it asks for so far."""

    def __init__(self, tensors: Tensors, options: ScoreOptions) -> None:
        self.plan = Plan()
        self.tensors, self.options = tensors, options
        query, value, factor = tensors["query"], tensors["value"], tensors["factor"]
        assert query is not None
        assert value is not None
        self.device, self.dtype = query.device, query.dtype
        self.batch, self.heads, self.rows, self.head_dim = query.shape
        self.key_batch, self.kv_heads, self.keys, self.value_dim = value.shape
        self.is_packed = tensors["own_key"] is not None
        # query heads that are folded into the rows of a tile: rows of a tile differ in their factors by variant only
        self.group = 1 if factor is not None and factor.ndim == 3 else self.heads // self.kv_heads
        self.mode = "log_additive" if factor is None else options.mode
        self.factor_heads = factor.shape[1] if factor is not None and factor.ndim == 3 else 1
        self.positions = 0 if factor is None else factor.shape[-1]
        self.touched_shift = 0 if factor is None else launch.touched_shift(self.positions)
        self.unit, self.inner_scale = launch.score_units(options.scale, options.softcap)
        window = options.sliding_window
        self.window = None if window is None else min(window, WIDEST_WINDOW)
        self.key_config = self._config("key")
        self.key_tiles = -(-self.rows * self.group // self.key_config.block_m)

    def _wants(self, *names: str) -> bool:
        return any(self.tensors[f"grad_{name}"] is not None for name in names)

    def _config(self, kernel: str) -> KernelConfig:
        forced = configs.forced_now().config
        if forced is not None:
            return forced
        regime = kernel if kernel == "broadcast" else f"{'packed' if self.is_packed else 'dense'}_{kernel}"
        dims, has_bias = (self.head_dim, self.value_dim), self.tensors["bias"] is not None
        table = configs.load(f"{launch.architecture_of(self.device)}_backward")
        entry = table[Key("16-bit" if self.dtype.itemsize == 2 else "32-bit", regime, max(map(configs.padded, dims)))]
        found = configs.fitted_backward(entry, regime, *dims, has_bias, self.mode, self.options.softcap is not None)
        rows = self.rows * (1 if kernel == "broadcast" else self.group)
        return replace(found, block_m=min(found.block_m, configs.padded(rows)))

    # --- what is asked for ---

    def _room(self, shape: tuple[int, ...], dtype: torch.dtype, *names: str) -> None:
        self.plan.room |= dict.fromkeys(names, (shape, dtype))

    def _launch(self, kernel: Any, programs: int, arguments: dict[str, Any], **renamed: str) -> None:
        """`renamed`: the tensors that parameters take which go by other names."""
        there = {name for name, tensor in self.tensors.items() if tensor is not None} | set(self.plan.room)
        if self.tensors["factor"] is not None:
            there.add("factors")  # by `_widen_factors`
        takes = {name: renamed.get(name, name) for name in kernel.arg_names}
        takes = {parameter: name for parameter, name in takes.items() if name in there and parameter not in arguments}
        strides = {}
        for parameter in kernel.arg_names:
            if parameter.endswith("_strides"):
                named = parameter.removesuffix("_strides")
                strides[parameter] = self._strides(renamed.get(named, named))
        nothing = dict.fromkeys(kernel.arg_names)
        self.plan.actions.append(Launch(Step(kernel, (programs, 1, 1), nothing | strides | arguments), takes))

    def _strides(self, name: str) -> tuple[int, ...]:
        rank = {"lse": 3, "grad_lse": 3, "key_mask": 2}.get(name, 4)
        return launch.strides_of(self.tensors[name], rank)

    def _split(self, name: str, splits: int) -> str:
        """The room in which so many programs leave their parts of a result, or the result itself."""
        result = self.tensors[name]
        if result is None or splits == 1:
            return name
        self._room((splits, *result.shape), torch.float32, f"partial_{name}")
        return f"partial_{name}"

    def _add_splits(self, name: str, splits: int) -> None:
        result = self.tensors[name]
        if result is None or splits == 1:
            return
        arguments = {"size": result.numel(), "num_splits": splits, "BLOCK": ADDED}
        programs = -(-result.numel() // ADDED)
        self._launch(backward_steps.add_splits, programs, arguments, partial=f"partial_{name}", result=name)

    # --- what the kernels need before they start ---

    def prepare(self) -> None:
        each_row = (self.batch, self.heads, self.rows)
        self._room(each_row, torch.float32, "total", "delta")
        arguments = {
            "rows": self.rows,
            "HEADS": self.heads,
            "DV": self.value_dim,
            "BLOCK_M": PREPARED_ROWS,
            "BLOCK_DV": configs.padded(self.value_dim),
        }
        programs = -(-self.rows // PREPARED_ROWS) * self.heads * self.batch
        self._launch(backward_steps.prepare_rows, programs, arguments)
        if self.tensors["factor"] is not None:
            self._prepare_factors(self.tensors["factor"])
        if self.is_packed:
            self._prepare_places()
        if self.mode == "shifted":
            self._room(each_row, torch.float32, "minimum", "share")
            self._room(each_row, torch.int32, "lowest")

    def _prepare_factors(self, factor: Tensor) -> None:
        """Factors in rows of float32, and flags that tell where they are 1."""
        words = factor.shape[0] * self.factor_heads
        self._room((words,), torch.int64, "touched")
        self.plan.actions.append(_widen_factors)
        arguments = {"length": self.positions, "touched_shift": self.touched_shift, "BLOCK": FLAGGED_BLOCK}
        self._launch(backward_steps.flag_factors, words, arguments)

    def _prepare_places(self) -> None:
        self._room((backward_steps.PLACES.value, self.rows), torch.int32, "places")
        self._room((backward_steps.REACH.value, self.key_tiles), torch.int32, "reach")
        if self.tensors["factor"] is not None:
            self._room((self.key_tiles,), torch.int64, "tile_touched")
            self._room((self.factor_heads, self.rows), torch.float32, "own_factors")
        arguments = {
            "positions": self.positions,
            "rows": self.rows,
            "num_tiles": self.key_tiles,
            "window": self.window,
            "GROUP": self.group,
            "TERM_HEADS": self.factor_heads,
            "IS_CAUSAL": self.options.is_causal,
            "BLOCK_M": self.key_config.block_m,
        }
        self._launch(backward_steps.prepare_places, self.key_tiles, arguments)

    def _arguments(self, config: KernelConfig) -> dict[str, Any]:
        """What all three kernels have in common."""
        return {
            "positions": self.positions,
            "rows": self.rows,
            "keys": self.keys,
            "window": self.window,
            "unit": self.unit,
            "inner_scale": self.inner_scale,
            "HEADS": self.heads,
            "KV_HEADS": self.kv_heads,
            "TERM_HEADS": self.factor_heads,
            "MODE": self.mode,
            "IS_CAUSAL": self.options.is_causal,
            "SOFTCAP": self.options.softcap is not None,
            "PRECISION": launch.float32_precision(),
            "D": self.head_dim,
            "DV": self.value_dim,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_D": configs.padded(self.head_dim),
            "BLOCK_DV": configs.padded(self.value_dim),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "maxnreg": launch.MOST_REGISTERS,
        }

    # --- rows that walk over keys ---

    def query_gradient(self) -> None:
        """The queries' gradient; before it, in "shifted", each row's minimum and what it is owed."""
        config = self._config("query")
        tiles = -(-self.rows * self.group // config.block_m)
        programs = tiles * (self.heads // self.group) * self.batch
        arguments = self._arguments(config) | {
            "touched_shift": self.touched_shift,
            "num_tiles": tiles,
            "num_splits": 1,
            "scale": self.options.scale,
            "BATCH": self.batch,
            "GROUP": self.group,
        }
        if self.mode == "shifted":
            self._launch(query_gradient, programs, arguments | {"PASS": "minimum"})
            if self._wants("query", "key", "own_key", "bias"):
                self._launch(query_gradient, programs, arguments | {"PASS": "owed"})
        if self._wants("query"):
            splits = launch.splits_for(self.device, programs, self.keys)
            arguments |= {"PASS": "query", "num_splits": splits}
            if splits > 1:  # where a share ends takes registers: half a step makes room for them
                arguments |= {"BLOCK_N": max(config.block_n // 2, 16)}
            place = self._split("grad_query", splits)
            self._launch(query_gradient, programs * splits, arguments, grad_query=place)
            self._add_splits("grad_query", splits)

    # --- keys that walk over rows ---

    def key_gradients(self) -> None:
        if not self.is_packed:
            self._key_gradient("dense", "key", "value", self.keys)
            return
        self._key_gradient("base", "key", "value", self.keys)
        self._key_gradient("own", "own_key", "own_value", self.rows)

    def _key_gradient(self, kind: str, key: str, value: str, length: int) -> None:
        by_factor = kind == "dense" and self._wants("factor")
        blocks = -(-length // self.key_config.block_n)
        if blocks == 0 or not (self._wants(key, value) or by_factor):
            return
        programs = blocks * self.kv_heads * self.key_batch
        # Tiles of rows are shared out, but for own rows, which few others see.
        walked = self.rows * (self.heads // self.kv_heads) * (self.batch // self.key_batch)
        splits = 1 if kind == "own" else launch.splits_for(self.device, programs, walked)
        arguments = self._arguments(self.key_config) | {
            "keys": length,
            "num_tiles": self.key_tiles,
            "num_blocks": blocks,
            "num_splits": splits,
            "scale": self.options.scale,
            "KIND": kind,
            "BATCH": self.batch,
            "KEY_BATCH": self.key_batch,
            "GROUP": self.group,
        }
        grads = {name: self._split(f"grad_{name}", splits) for name in (key, value)}
        renamed = {"key": key, "value": value, "grad_key": grads[key], "grad_value": grads[value]}
        if kind == "own":
            arguments["positions"] = self.rows
            renamed["factors"] = "own_factors"
        if kind == "base":
            self._list_tiles(blocks)
        if by_factor:
            per_group = (splits, self.batch, self.heads // self.group, length)
            self._room(per_group, torch.float32, "partial_grad_factor")
            renamed["grad_factor"] = "partial_grad_factor"
        else:
            arguments["grad_factor"] = None
        self._launch(key_gradient, programs * splits, arguments, **renamed)
        self._add_splits(f"grad_{key}", splits)
        self._add_splits(f"grad_{value}", splits)
        if by_factor:
            self.plan.actions.append(_add_factor_gradients)

    def _list_tiles(self, blocks: int) -> None:
        """Which tiles of rows see which block of base keys."""
        self._room((blocks, self.key_tiles), torch.int32, "tiles")
        self._room((blocks,), torch.int32, "counts")
        arguments = {
            "num_tiles": self.key_tiles,
            "touched_shift": self.touched_shift,
            "BLOCK_N": self.key_config.block_n,
            "BLOCK": LISTED_TILES,
        }
        self._launch(backward_steps.list_tiles, blocks, arguments)

    # --- one number for many pairs ---

    def broadcast_gradients(self) -> None:
        bias, factor = self.tensors["grad_bias"], self.tensors["grad_factor"]
        if bias is not None:
            self._broadcast_gradient("bias", tuple(bias.shape), "grad_bias")
        if factor is None or not self.is_packed:
            return
        variants, positions = factor.shape[0], self.positions
        if factor.ndim == 3 or not self._makes_few(variants, positions):
            self._broadcast_gradient("factor", (variants, self.factor_heads, 1, positions), "grad_factor")
            return
        per_head = (variants, self.heads, 1, positions)
        self._room(per_head, torch.float32, "partial_grad_factor")
        self._broadcast_gradient("factor", per_head, "partial_grad_factor")
        self.plan.actions.append(_add_heads_of_factors)

    def _makes_few(self, variants: int, positions: int) -> bool:
        """Whether factors for all heads at once make so few programs that each head shall have some of its own."""
        programs = variants * -(-positions // self._config("broadcast").block_n)
        return launch.splits_for(self.device, programs, self.heads * configs.LEAST_SHARE) > 1

    def _broadcast_gradient(self, of: str, shape: tuple[int, ...], result: str) -> None:
        """A result of shape (1|V, 1|Hq, 1|queries, 1|keys), contiguous; V the batch of a dense call."""
        config = self._config("broadcast")
        prefixes = self.tensors["prefix_lengths"]
        over = [n == 1 for n in shape]
        blocks = 1 if over[2] else -(-shape[2] // config.block_m)
        blocks *= 1 if over[3] else -(-shape[3] // config.block_n)
        programs = blocks * shape[0] * shape[1]
        if programs == 0:
            return
        arguments = self._arguments(config) | {
            "variants": self.batch if prefixes is None else prefixes.shape[0],
            "queries": shape[2],
            "places_of_keys": shape[3],
            "OF": of,
            "OVER_VARIANTS": over[0],
            "OVER_HEADS": over[1],
            "OVER_QUERIES": over[2],
            "OVER_KEYS": over[3],
        }
        self._launch(broadcast_gradient, programs, arguments, result=result)


# --- what torch does between launches ---


def _widen_factors(tensors: Tensors) -> None:
    factor = tensors["factor"]
    assert factor is not None
    tensors["factors"] = factor.to(torch.float32).contiguous()


def _add_factor_gradients(tensors: Tensors) -> None:
    """Of a dense call: (splits, B, groups of heads, keys), to be added up in that order."""
    partial, result = tensors["partial_grad_factor"], tensors["grad_factor"]
    assert partial is not None
    assert result is not None
    each_head = partial[0] if len(partial) == 1 else partial.sum(0)
    result.copy_(each_head if result.ndim == 3 else each_head.sum(1))


def _add_heads_of_factors(tensors: Tensors) -> None:
    """Of a pack: (V, Hq, 1, positions)."""
    partial, result = tensors["partial_grad_factor"], tensors["grad_factor"]
    assert partial is not None
    assert result is not None
    result.copy_(partial.sum((1, 2)))
