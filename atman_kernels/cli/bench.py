"""`atman bench`: what needs nothing but the package, one quick measurement and the tuning of the Triton kernels."""

import json
import os
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from atman_kernels.cli.output import check_destinations, say, show, shown, write
from atman_kernels.errors import InputError
from atman_kernels.files import write_whole

if TYPE_CHECKING:
    import torch

LENGTHS = (128, 256, 512)
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64  # of SmolLM2-135M
VARIANTS = 64  # spread over the prompt, so that the suffixes' mean length is that of all of them
ROWS_PER_PACK = 4096
ROUNDS = 3


@click.group("bench", invoke_without_command=True)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Measure on this machine. Every other benchmark is in the repository: `python -m benchmarks` there."""
    if ctx.invoked_subcommand is None:
        raise _in_the_repository("benchmarks")


@command.command("scaling", context_settings={"ignore_unknown_options": True}, add_help_option=False, hidden=True)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def scaling(options: tuple[str, ...]) -> None:
    """Says where time and memory over model size and prompt length are measured."""
    raise _in_the_repository("benchmarks.scaling")


def _in_the_repository(module: str) -> InputError:
    return InputError(
        f"this benchmark is in the repository, not in the package: run `python -m {module}` there; "
        "atman bench ops runs anywhere"
    )


@command.command("ops")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--length", "lengths", type=click.IntRange(2, 32768), multiple=True, help="Prompt length; repeatable.")
@click.option("--device", help="cpu, cuda, ...  [default: a GPU if there is one]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
def ops(as_json: bool, lengths: tuple[int, ...], device: str | None, dtype: str) -> None:
    """Time packed suppressed attention against scaled_dot_product_attention with a float bias.

    One attention layer of SmolLM2-135M's shape; one variant for each of 64 positions of a prompt.
    """
    from atman_kernels.hf.models.loading import resolve_device, resolve_dtype

    target = resolve_device(device)
    rows = [measure(length, target, resolve_dtype(dtype, target)) for length in lengths or LENGTHS]
    if as_json:
        write(json.dumps(rows, indent=2) + "\n")
    else:
        _print(rows, f"{dtype} on {target}, {HEADS} heads of {HEAD_DIM} over {KV_HEADS} key-value heads")


@command.command("tune")
@click.option("--dry-run", is_flag=True, help="Measure and print, write nothing.")
@click.option(
    "--regime", "regimes", type=click.Choice(["dense", "packed", "decode"]), multiple=True, help="Repeatable."
)
@click.option("--dtype", "dtypes", type=click.Choice(["16-bit", "32-bit"]), multiple=True, help="Repeatable.")
@click.option(
    "--head-dim", "dims", type=click.Choice(["16", "32", "64", "128", "256"]), multiple=True, help="Repeatable."
)
def tune(dry_run: bool, regimes: tuple[str, ...], dtypes: tuple[str, ...], dims: tuple[str, ...]) -> None:
    """Find the fastest tile sizes of the Triton kernels on this GPU, and put them into the package's table.

    Options restrict it to some entries and may be repeated; without them, every entry is measured.
    """
    import torch

    from atman_kernels import backends
    from atman_kernels.errors import BackendUnavailableError

    if not torch.cuda.is_available():
        raise BackendUnavailableError("tuning needs a GPU: torch sees no CUDA device")
    backends.load("triton", "cuda")
    from atman_kernels.backends.triton import configs, tuning

    device = torch.device("cuda")
    name = configs.architecture(torch.cuda.get_device_capability(device))
    table = dict(configs.load(name))
    wanted = [
        key
        for key in table
        if (not regimes or key.regime in regimes)
        and (not dtypes or key.dtype in dtypes)
        and (not dims or str(key.head_dim) in dims)
    ]
    path = configs.FOLDER / f"{name}.json"
    if not dry_run:
        check_destinations({"the package's table": str(path)})
    say(f"{torch.cuda.get_device_name(device)}, {len(wanted)} of {len(table)} entries of {name}")
    for found in tuning.tune(table, wanted, device, processes=os.cpu_count() or 1):
        table[found.key] = found.new
        if not dry_run:  # what was found stays found if the next one is never reached
            write_whole(path, configs.dump(table).encode("utf-8"))
        old, new = (
            f"{_tile(tile)} {milliseconds:.3f} ms"
            for tile, milliseconds in ((found.old, found.old_milliseconds), (found.new, found.new_milliseconds))
        )
        write(f"{found.key.dtype} {found.key.regime:6} {found.key.head_dim:3}  {old} -> {new}\n")
    if dry_run:
        say("nothing was written")
        return
    say(f"wrote {path}")


def _tile(config: Any) -> str:
    return f"{config.block_m}x{config.block_n}, {config.num_warps} warps, {config.num_stages} stages"


def measure(length: int, device: "torch.device", dtype: "torch.dtype") -> dict[str, Any]:
    """Milliseconds per variant at one prompt length, once both ways have given the same result."""
    import torch

    generator = torch.Generator().manual_seed(length)
    query, key, value = (
        torch.randn(heads, length, HEAD_DIM, generator=generator, dtype=torch.float32, device="cpu").to(device, dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    positions = torch.linspace(0, length - 1, min(VARIANTS, length), dtype=torch.float32, device="cpu").long()
    factors = torch.ones(len(positions), length, dtype=torch.float32, device="cpu")  # (V, K)
    factors[torch.arange(len(positions), device="cpu"), positions] = 0.1
    factors = factors.to(device)

    packed = _packed(query, key, value, factors, positions.tolist())
    dense = _dense(query, key, value, factors)
    difference = _largest_difference(packed(), dense(), positions.tolist())
    limit = 1e-5 if dtype == torch.float32 else 5e-2
    if not difference <= limit:
        raise RuntimeError(f"the two ways differ by {difference:.2g} at length {length}, more than {limit:g}")
    ours, theirs = (_milliseconds(run, device) / len(positions) for run in (packed, dense))
    return {
        "length": length,
        "packed_ms_per_variant": ours,
        "dense_bias_ms_per_variant": theirs,
        "ratio": theirs / ours,
        "largest_difference": difference,
    }


def _packed(
    query: "torch.Tensor", key: "torch.Tensor", value: "torch.Tensor", factors: "torch.Tensor", positions: list[int]
) -> "Callable[[], list[torch.Tensor]]":
    """Every variant from its suppressed position on, in packs; q (Hq, L, D), k and v (Hkv, L, D)."""
    import torch

    from atman_kernels import VariantPack, packed_suppressed_attention

    length = query.shape[1]
    packs: list[list[int]] = [[]]
    for variant, position in enumerate(positions):
        if packs[-1] and sum(length - positions[v] for v in packs[-1]) + length - position > ROWS_PER_PACK:
            packs.append([])
        packs[-1].append(variant)
    work = []
    for variants in packs:
        starts = [positions[v] for v in variants]
        pack = VariantPack.build([length - start for start in starts], starts, device=query.device)
        q, k, v = (torch.cat([tensor[:, start:] for start in starts], dim=1) for tensor in (query, key, value))
        work.append(partial(packed_suppressed_attention, q, k, v, key, value, pack, factors[variants]))

    def run() -> list[Any]:
        return [attend() for attend in work]

    return run


def _dense(
    query: "torch.Tensor", key: "torch.Tensor", value: "torch.Tensor", factors: "torch.Tensor", batch: int = 8
) -> "Callable[[], list[torch.Tensor]]":
    """Every variant in full, in batches, with its factors in a float bias, as one does without this package."""
    import torch

    length = query.shape[1]
    causal = torch.full((length, length), float("-inf"), device=query.device, dtype=torch.float32).triu(1)

    def run() -> list[torch.Tensor]:
        outputs = []
        for part in factors.split(batch):
            bias = (causal + part.log()[:, None, None, :]).to(query.dtype)  # (batch, 1, L, L)
            q, k, v = (tensor[None].expand(len(part), -1, -1, -1) for tensor in (query, key, value))
            outputs.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True))
        return outputs

    return run


def _largest_difference(packs: "list[torch.Tensor]", batches: "list[torch.Tensor]", positions: list[int]) -> float:
    import torch

    suffixes = torch.cat(packs, dim=1).float()  # (Hq, rows, D)
    whole = torch.cat(batches).float()  # (V, Hq, L, D)
    expected = torch.cat([whole[v, :, start:] for v, start in enumerate(positions)], dim=1)
    return float((suffixes - expected).abs().max())


def _milliseconds(run: Callable[[], object], device: "torch.device") -> float:
    """Median of a few rounds."""
    import torch

    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - started))
    return sorted(times)[ROUNDS // 2]


def _print(rows: list[dict[str, Any]], title: str) -> None:
    from rich.table import Table

    table = Table(title=shown(title))
    for heading in ("tokens", "packed, ms/variant", "dense bias, ms/variant", "ratio", "max difference"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row["length"]),
            f"{row['packed_ms_per_variant']:.2f}",
            f"{row['dense_bias_ms_per_variant']:.2f}",
            f"{row['ratio']:.1f}",
            f"{row['largest_difference']:.1e}",
        )
    show(table)
