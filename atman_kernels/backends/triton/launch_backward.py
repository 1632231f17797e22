"""From validated tensors to the launches of the backward kernels. Nothing here waits for the device."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from atman_kernels.backends.triton import backward, backward_steps, configs, launch
from atman_kernels.backends.triton.configs import KernelConfig
from atman_kernels.backends.triton.launch import Extras, Layout
from atman_kernels.formula import WIDEST_WINDOW, Saved, ScoreOptions

PREPARED_ROWS = 64
FLAGGED_BLOCK = 64  # times 64 flags: factors that are read at once
LISTED_TILES = 1024  # tiles of rows that are looked at at once

# What the tables `configs/*_backward.json` have entries for: kernels, and whether the call is a pack.
REGIMES = ("dense_query", "packed_query", "dense_key", "packed_key", "broadcast")


@dataclass(frozen=True)
class Wanted:
    """Which gradients a call asks for."""

    query: bool = False
    key: bool = False
    value: bool = False
    own_key: bool = False
    own_value: bool = False
    factor: bool = False
    sinks: bool = False
    bias: bool = False


Gradients = dict[str, Tensor]  # by the names of `Wanted`


def gradients(
    query: Tensor,  # (B, Hq, rows, D)
    key: Tensor,  # (1|B, Hkv, keys, D)
    value: Tensor,  # (1|B, Hkv, keys, Dv)
    layout: Layout | None,  # None: a dense batch; else B = 1
    extras: Extras,
    options: ScoreOptions,
    saved: Saved,  # with a batch axis, of a pack too
    wanted: Wanted,
) -> Gradients:
    """What is wanted, each of the shape and the dtype of the tensor that it belongs to."""
    return _Backward(query, key, value, layout, extras, options, saved, wanted).run()


class _Backward:
    """One call: the arguments that its kernels have in common, and the results."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: Layout | None,
        extras: Extras,
        options: ScoreOptions,
        saved: Saved,
        wanted: Wanted,
    ) -> None:
        self.extras, self.options, self.saved, self.wanted = extras, options, saved, wanted
        self.batch, self.heads, self.rows, self.head_dim = query.shape
        self.key_batch, self.kv_heads, self.keys, self.value_dim = value.shape
        self.results = _empty(query, key, value, layout, extras, wanted)
        if layout is not None:
            layout = replace(layout, **{name: getattr(layout, name).contiguous() for name in launch.LAYOUT})
        if launch.INTERPRETED and query.dtype == torch.bfloat16:  # it gets products of bfloat16 wrong
            query, key, value = query.float(), key.float(), value.float()
            self.saved = Saved(saved.output.float(), saved.lse, saved.grad_output.float(), saved.grad_lse)
            if layout is not None:
                layout = replace(layout, own_key=layout.own_key.float(), own_value=layout.own_value.float())
        self.query, self.key, self.value, self.layout = query, key, value, layout
        per_head = extras.factor is not None and extras.factor.ndim == 3
        self.group = 1 if per_head else self.heads // self.kv_heads
        self.unit, self.inner_scale = launch.score_units(options.scale, options.softcap)
        self.mode = "log_additive" if extras.factor is None else options.mode

    def run(self) -> Gradients:
        if not self.results:
            return self.results
        if self.rows == 0 or self.batch == 0 or self.heads == 0:
            for result in self.results.values():
                result.zero_()
            return self.results
        with launch._on(self.query.device):
            self._prepare()
            self._query_gradient()
            self._key_gradients()
            self._broadcast_gradients()
            if self.wanted.sinks:
                assert self.extras.sinks is not None
                self.results["sinks"] = self.saved.sink_gradient(self.extras.sinks, self.delta)
        return self.results

    # --- what the kernels need before they start ---

    def _prepare(self) -> None:
        window = self.options.sliding_window
        self.window = None if window is None else min(window, WIDEST_WINDOW)
        self.total, self.delta = self._rows_of(torch.float32), self._rows_of(torch.float32)
        launch.run(
            backward_steps.prepare_rows,
            (-(-self.rows // PREPARED_ROWS) * self.heads * self.batch,),
            {
                **_with_strides("output", self.saved.output, 4),
                **_with_strides("grad_output", self.saved.grad_output, 4),
                **_with_strides("lse", self.saved.lse, 3),
                **_with_strides("grad_lse", self.saved.grad_lse, 3),
                "total": self.total,
                "delta": self.delta,
                "rows": self.rows,
                "HEADS": self.heads,
                "DV": self.value_dim,
                "BLOCK_M": PREPARED_ROWS,
                "BLOCK_DV": configs.padded(self.value_dim),
            },
        )
        self._prepare_factors()
        self.places: Tensor | None = None
        self.reach: Tensor | None = None
        self.tile_touched: Tensor | None = None
        self.key_config = self._config("key")
        self.key_tiles = -(-self.rows * self.group // self.key_config.block_m)
        if self.layout is not None:
            self._prepare_places(self.layout)
        self.states: dict[str, Tensor | None] = {"minimum": None, "lowest": None, "share": None}
        if self.mode == "shifted":
            kinds = (torch.float32, torch.int32, torch.float32)
            self.states = {name: self._rows_of(kind) for name, kind in zip(self.states, kinds, strict=True)}

    def _prepare_factors(self) -> None:
        """Factors in rows of float32, and flags that tell where they are 1."""
        self.factors: Tensor | None = None
        self.touched: Tensor | None = None
        self.own_factors: Tensor | None = None
        self.positions, self.touched_shift, self.factor_heads = 0, 0, 1
        factor = self.extras.factor
        if factor is None:
            return
        self.factors = factor.to(torch.float32).contiguous()
        self.positions = factor.shape[-1]
        self.factor_heads = factor.shape[1] if factor.ndim == 3 else 1
        self.touched_shift = launch.touched_shift(self.positions)
        words = factor.shape[0] * self.factor_heads
        self.touched = factor.new_empty((words,), dtype=torch.int64)
        launch.run(
            backward_steps.flag_factors,
            (words,),
            {
                "factors": self.factors,
                "touched": self.touched,
                "length": self.positions,
                "touched_shift": self.touched_shift,
                "BLOCK": FLAGGED_BLOCK,
            },
        )

    def _prepare_places(self, layout: Layout) -> None:
        new = self.query.new_empty
        self.places = new((backward_steps.PLACES.value, self.rows), dtype=torch.int32)
        self.reach = new((backward_steps.REACH.value, self.key_tiles), dtype=torch.int32)
        if self.factors is not None:
            self.tile_touched = new((self.key_tiles,), dtype=torch.int64)
            self.own_factors = new((self.factor_heads, self.rows), dtype=torch.float32)
        launch.run(
            backward_steps.prepare_places,
            (self.key_tiles,),
            {
                "suffix_starts": layout.suffix_starts,
                "prefix_lengths": layout.prefix_lengths,
                "base_starts": layout.base_starts,
                "row_variant": layout.row_variant,
                "factors": self.factors,
                "touched": self.touched,
                "own_factors": self.own_factors,
                "tile_touched": self.tile_touched,
                "places": self.places,
                "reach": self.reach,
                "positions": self.positions,
                "rows": self.rows,
                "num_tiles": self.key_tiles,
                "window": self.window,
                "GROUP": self.group,
                "TERM_HEADS": self.factor_heads,
                "IS_CAUSAL": self.options.is_causal,
                "BLOCK_M": self.key_config.block_m,
            },
        )

    def _rows_of(self, dtype: torch.dtype) -> Tensor:
        return self.query.new_empty((self.batch, self.heads, self.rows), dtype=dtype)

    def _config(self, kernel: str) -> KernelConfig:
        forced = configs.forced_now().config
        if forced is not None:
            return forced
        table = configs.load(f"{_architecture(self.query.device)}_backward")
        regime = kernel if kernel == "broadcast" else f"{'dense' if self.layout is None else 'packed'}_{kernel}"
        rows = self.rows * (1 if kernel == "broadcast" else self.group)
        dims, has_bias = (self.head_dim, self.value_dim), self.extras.bias is not None
        found = configs.choose(table, self.query.element_size(), regime, *dims, rows, has_bias)
        return narrowed(found, regime, *dims, self.mode)

    def _arguments(self, config: KernelConfig) -> dict[str, Any]:
        """What all three kernels have in common."""
        key_mask = self.extras.key_mask
        return {
            **_with_strides("query", self.query, 4),
            **_with_strides("grad_output", self.saved.grad_output, 4),
            "total": self.total,
            "delta": self.delta,
            "positions": self.positions,
            **_with_strides("key_mask", None if key_mask is None else key_mask.view(torch.uint8), 2),
            **_with_strides("bias", self.extras.bias, 4),
            **self.states,
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

    def _keys_and_values(self) -> dict[str, Any]:
        own_key, own_value = (self.layout.own_key, self.layout.own_value) if self.layout else (None, None)
        return {
            **_with_strides("key", self.key, 4),
            **_with_strides("value", self.value, 4),
            **_with_strides("own_key", own_key, 4),
            **_with_strides("own_value", own_value, 4),
        }

    # --- rows that walk over keys ---

    def _query_gradient(self) -> None:
        """The queries' gradient; before it, in "shifted", each row's minimum and what it is owed."""
        config = self._config("query")
        tiles = -(-self.rows * self.group // config.block_m)
        arguments = self._arguments(config) | self._keys_and_values()
        arguments |= {
            "row_variant": None if self.layout is None else self.layout.row_variant,
            "places": self.places,
            "factors": self.factors,
            "touched": self.touched,
            "touched_shift": self.touched_shift,
            "own_factors": self.own_factors,
            "grad_query": self.results.get("query"),
            "num_tiles": tiles,
            "scale": self.options.scale,
            "BATCH": self.batch,
            "GROUP": self.group,
        }
        wanted = self.wanted
        passes = []
        if self.mode == "shifted":
            passes.append("minimum")
            if wanted.query or wanted.key or wanted.own_key or wanted.bias:
                passes.append("owed")
        if wanted.query:
            passes.append("query")
        for name in passes:
            launch.run(
                backward.query_gradient, (tiles * (self.heads // self.group) * self.batch,), arguments | {"PASS": name}
            )

    # --- keys that walk over rows ---

    def _key_gradients(self) -> None:
        wanted, factor = self.wanted, self.extras.factor
        if self.layout is None:
            by_factor = None
            if wanted.factor:
                assert factor is not None
                by_factor = factor.new_empty((self.batch, self.heads // self.group, self.keys), dtype=torch.float32)
            if wanted.key or wanted.value or wanted.factor:
                self._key_gradient("dense", self.key, self.value, "key", "value", by_factor)
            if by_factor is not None:
                assert factor is not None
                self.results["factor"].copy_(by_factor if factor.ndim == 3 else by_factor.sum(1))
            return
        if wanted.key or wanted.value:
            self._key_gradient("base", self.key, self.value, "key", "value")
        if wanted.own_key or wanted.own_value:
            self._key_gradient("own", self.layout.own_key, self.layout.own_value, "own_key", "own_value")

    def _key_gradient(
        self, kind: str, key: Tensor, value: Tensor, key_name: str, value_name: str, by_factor: Tensor | None = None
    ) -> None:
        config, length = self.key_config, key.shape[2]
        blocks = -(-length // config.block_n)
        if blocks == 0:
            return
        layout = self.layout
        arguments = self._arguments(config) | {
            **_with_strides("key", key, 4),
            **_with_strides("value", value, 4),
            "row_variant": None if layout is None else layout.row_variant,
            "suffix_starts": None if layout is None else layout.suffix_starts,
            "places": self.places,
            "tiles": None,
            "counts": None,
            "factors": self.own_factors if kind == "own" else self.factors,
            "grad_key": self.results.get(key_name),
            "grad_value": self.results.get(value_name),
            "grad_factor": by_factor,
            "keys": length,
            "num_tiles": self.key_tiles,
            "num_blocks": blocks,
            "scale": self.options.scale,
            "KIND": kind,
            "BATCH": self.batch,
            "KEY_BATCH": key.shape[0],
            "GROUP": self.group,
        }
        if kind == "own":
            arguments["positions"] = self.rows
        if kind == "base":
            arguments |= self._listed(blocks)
        launch.run(backward.key_gradient, (blocks * self.kv_heads * key.shape[0],), arguments)

    def _listed(self, blocks: int) -> dict[str, Tensor]:
        """Which tiles of rows see which block of base keys."""
        tiles = self.query.new_empty((blocks, self.key_tiles), dtype=torch.int32)
        counts = self.query.new_empty((blocks,), dtype=torch.int32)
        launch.run(
            backward_steps.list_tiles,
            (blocks,),
            {
                "reach": self.reach,
                "tile_touched": self.tile_touched,
                "tiles": tiles,
                "counts": counts,
                "num_tiles": self.key_tiles,
                "touched_shift": self.touched_shift,
                "BLOCK_N": self.key_config.block_n,
                "BLOCK": LISTED_TILES,
            },
        )
        return {"tiles": tiles, "counts": counts}

    # --- one number for many pairs ---

    def _broadcast_gradients(self) -> None:
        if self.wanted.bias:
            assert self.extras.bias is not None
            self._broadcast_gradient("bias", self.results["bias"])
        if self.wanted.factor and self.layout is not None:
            result = self.results["factor"]
            per_head = result if result.ndim == 3 else result.unsqueeze(1)
            self._broadcast_gradient("factor", per_head.unsqueeze(2))

    def _broadcast_gradient(self, of: str, result: Tensor) -> None:
        """`result` is (1|V, 1|Hq, 1|queries, 1|keys) and contiguous, V the batch of a dense call."""
        config, layout = self._config("broadcast"), self.layout
        variants = self.batch if layout is None else layout.prefix_lengths.shape[0]
        over = [n == 1 for n in result.shape]
        blocks = 1 if over[2] else -(-result.shape[2] // config.block_m)
        blocks *= 1 if over[3] else -(-result.shape[3] // config.block_n)
        grid = blocks * result.shape[0] * result.shape[1]
        if grid == 0:
            return
        launch.run(
            backward.broadcast_gradient,
            (grid,),
            self._arguments(config)
            | self._keys_and_values()
            | {
                "suffix_starts": None if layout is None else layout.suffix_starts,
                "prefix_lengths": None if layout is None else layout.prefix_lengths,
                "base_starts": None if layout is None else layout.base_starts,
                "factors": self.factors,
                "result": result,
                "variants": variants,
                "queries": result.shape[2],
                "places_of_keys": result.shape[3],
                "OF": of,
                "OVER_VARIANTS": over[0],
                "OVER_HEADS": over[1],
                "OVER_QUERIES": over[2],
                "OVER_KEYS": over[3],
            },
        )


def narrowed(config: KernelConfig, regime: str, head_dim: int, value_dim: int, mode: str) -> KernelConfig:
    """What is left of an entry beside what else a thread's registers hold: half a step of the walk for each.

    Scores are kept where factors multiply them, for a pack's queries with factors of their own; the loads of a head
    dimension that is padded are masked.

    Example:
        >>> narrowed(KernelConfig(64, 128, 8, 2), "dense_key", 80, 80, "log_additive")
        KernelConfig(block_m=32, block_n=128, num_warps=8, num_stages=2)
    """
    keeps_scores = mode != "log_additive"
    is_padded = (configs.padded(head_dim), configs.padded(value_dim)) != (head_dim, value_dim)
    if keeps_scores and regime == "packed_query":
        config = replace(config, block_m=max(config.block_m // 2, 16))
    for _ in range(keeps_scores + is_padded):
        if regime.endswith("_key"):
            config = replace(config, block_m=max(config.block_m // 2, 16))
        else:
            config = replace(config, block_n=max(config.block_n // 2, 16))
    return config


def _empty(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout | None, extras: Extras, wanted: Wanted
) -> Gradients:
    """Room for what is wanted."""
    tensors: dict[str, Tensor | None] = {"query": query, "key": key, "value": value}
    tensors |= {"factor": extras.factor, "sinks": extras.sinks, "bias": extras.bias}
    if layout is not None:
        tensors |= {"own_key": layout.own_key, "own_value": layout.own_value}
    return {
        name: tensor.new_empty(tensor.shape)
        for name, tensor in tensors.items()
        if tensor is not None and getattr(wanted, name)
    }


def _with_strides(name: str, tensor: Tensor | None, rank: int) -> dict[str, Any]:
    return {name: tensor, f"{name}_strides": launch._strides(tensor, rank)}


def _architecture(device: torch.device) -> str:
    if launch.INTERPRETED:
        return launch.INTERPRETED_ARCHITECTURE
    return configs.architecture(torch.cuda.get_device_capability(device))
