"""The ops on a GPU, shape by shape, against what PyTorch offers and against the machine's roofline.

python -m benchmarks.gpu                                  # the shapes that matter most
python -m benchmarks.gpu --groups shared --minutes 8      # one group, for so long
python -m benchmarks.gpu --resume                         # go on where the result file ends
python -m benchmarks.gpu --device cpu --preset tiny       # see that everything runs, without a GPU
"""

import argparse
import sys
import time
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from atman_kernels import backends
from benchmarks.gpu import flex
from benchmarks.gpu.cases import GROUPS, PRESETS, Shape
from benchmarks.gpu.contenders import CONTENDERS, Contender
from benchmarks.gpu.report import line, markdown, table
from benchmarks.gpu.results import MEASURED, STATUSES, Results, Row
from benchmarks.gpu.runner import DeviceLost, Runner
from benchmarks.gpu.timing import Stopwatch
from benchmarks.machine import RESULTS, cpu_slug, environment, gpu_environment, gpu_slug, gpu_state

# Exit codes, of this program and of benchmarks.gpu_check
PASSED, FAILED, NOTHING_RUN = 0, 1, 2


def missing_gpu() -> str | None:
    """Why there is no CUDA device to run on; None if there is one."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) was built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no CUDA device"
    return None


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="quick")
    parser.add_argument("--groups", type=_names(GROUPS), default=GROUPS, help=f"some of {','.join(GROUPS)}")
    parser.add_argument("--contenders", type=_names(CONTENDERS), help=f"some of {','.join(CONTENDERS)}")
    parser.add_argument("--cases", default="*", help="a pattern for the names of shapes, such as 'prefill-16k-*'")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--minutes", type=float, default=60.0, help="start nothing after so many")
    parser.add_argument("--seconds", type=float, help="the same in seconds")
    parser.add_argument("--seconds-per-row", type=float, default=0.5, help="repeat a call for about so long")
    parser.add_argument("--resume", action="store_true", help="keep what the result file holds, measure the rest")
    parser.add_argument("--no-compile", action="store_true", help="FlexAttention uncompiled: right, but no rival")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--list", action="store_true", help="name the shapes and contenders, and stop")
    return parser.parse_args(given)


def _names(known: Any) -> Any:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return parse


def main(given: list[str] | None = None) -> int:
    options = arguments(given)
    shapes = [
        shape
        for shape in PRESETS[options.preset]()
        if shape.group in options.groups and fnmatch(shape.name, options.cases)
    ]
    # The backend for CPUs is there so that everything can be tried without a GPU.
    chosen = options.contenders or [name for name in CONTENDERS if (name == "cpu") == (options.device == "cpu")
                                    or not CONTENDERS[name].is_ours]  # fmt: skip
    if options.list:
        print("\n".join([shape.name for shape in shapes] + [f"contender {name}" for name in chosen]))
        return PASSED
    if not shapes:
        print(
            f"no shape of preset {options.preset} in {', '.join(options.groups)} fits {options.cases!r}",
            file=sys.stderr,
        )
        return NOTHING_RUN
    if options.device == "cuda" and (reason := missing_gpu()):
        print(f"no GPU benchmarks: {reason}; --device cpu --preset tiny shows that they run", file=sys.stderr)
        return NOTHING_RUN
    left_out = {}
    if not options.contenders:  # who is asked for by name gets rows that say why there is nothing
        left_out = {name: reason for name in chosen if (reason := unavailable_reason(name, options.device))}
    return measure(options, shapes, [CONTENDERS[name] for name in chosen if name not in left_out], left_out)


def unavailable_reason(name: str, device: str) -> str | None:
    """Why a contender cannot run on this device at all; None if it may."""
    return backends.unavailable_reason(name, device) if CONTENDERS[name].is_ours else None


def measure(
    options: argparse.Namespace, shapes: list[Shape], contenders: list[Contender], left_out: dict[str, str]
) -> int:
    started = time.monotonic()
    device = torch.device(options.device)
    flex.compiles = not options.no_compile
    header = environment() | {"dtype": options.dtype, "gpu_name": None, "flex_compiled": flex.compiles}
    header["left_out"] = left_out
    if options.device == "cuda":
        header |= {"gpu": gpu_environment(), "gpu_name": torch.cuda.get_device_name()}
    slug = gpu_slug() if options.device == "cuda" else cpu_slug()
    results = Results(options.output / f"gpu-ops-{slug}.json", header, options.resume)
    stopwatch = Stopwatch(device, options.seconds_per_row, small=options.preset == "tiny")
    dtype = getattr(torch, options.dtype)
    rates = stopwatch.rates(dtype)
    states: dict[str, Any] = {}  # after every shape: clocks, power, temperature
    run = {"groups": list(options.groups), "preset": options.preset, "cases": options.cases, "rates": vars(rates)}
    run["gpu_states"] = states
    results.runs.append(run)
    where = f"{header['gpu_name'] or header['cpu']}, torch {torch.__version__}, {options.dtype}"
    print(f"{where}: {rates}, measured now", flush=True)
    for name, reason in left_out.items():
        print(f"without {name}: {reason}", flush=True)

    def say(row: Row) -> None:
        print(f"{time.monotonic() - started:5.0f} s  {line(row, results.rows)}", flush=True)

    runner = Runner(device, dtype, stopwatch, rates, results, started + (options.seconds or 60 * options.minutes), say)
    lost = False
    try:
        for shape in shapes:
            runner.run(shape, contenders)
            if device.type == "cuda":
                states[shape.name] = gpu_state()
    except DeviceLost as error:
        lost = True
        print(f"the device is lost, the rest was not measured: {error}", file=sys.stderr)
    run["seconds"] = time.monotonic() - started
    results.write()
    names = {shape.name for shape in shapes}
    rows = [row for row in results.rows if row["case"] in names]
    print(table(rows))
    summary = results.path.with_suffix(".md")
    summary.write_text(markdown(header, results.runs, results.rows), encoding="utf-8")
    counts = Counter(row["status"] for row in rows)
    print(f"{', '.join(f'{counts[s]} {s}' for s in STATUSES if counts[s])}; in {results.path} and {summary.name}")
    return verdict(rows, lost)


def verdict(rows: list[Row], lost: bool = False) -> int:
    """Anything wrong fails, and so does an error of ours; what peers cannot do is only reported."""
    if lost or any(row["status"] == "wrong" or (row["status"] == "error" and row["is_ours"]) for row in rows):
        return FAILED
    return PASSED if any(row["status"] == MEASURED for row in rows) else NOTHING_RUN


if __name__ == "__main__":
    sys.exit(main())
