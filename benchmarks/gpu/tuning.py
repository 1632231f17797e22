"""Time the hand-picked configurations of the Triton kernels; each time is a line of a file as soon as it is known.

    python -m benchmarks.gpu.tuning --seconds 80        # atman bench tune tries all there are, and takes its time

A configuration whose output is not that of the table's entry gets no time.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.__main__ import FAILED, NOTHING_RUN, PASSED, missing_gpu
from benchmarks.machine import RESULTS, gpu_slug, gpu_state, sources

ALLOWED = 0.02  # of the largest output: two orders of the same sums, in bfloat16
TINY = 64  # what lengths are divided by to see that everything runs


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu.tuning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda",), default="cuda")
    parser.add_argument("--seconds", type=float, default=300.0, help="begin nothing after so many")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--tiny", action="store_true", help="short calls, to see that everything runs")
    options = parser.parse_args(given)
    if reason := missing_gpu():
        print(f"no tuning: {reason}", file=sys.stderr)
        return NOTHING_RUN
    from atman_kernels import backends

    if reason := backends.unavailable_reason("triton", "cuda"):
        print(f"no tuning: {reason}", file=sys.stderr)
        return NOTHING_RUN
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / f"gpu-tuning-{gpu_slug()}.jsonl").open("a", encoding="utf-8", buffering=1) as file:

        def record(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")

        record({"sources": sources(), "gpu": torch.cuda.get_device_name(), "state": gpu_state()})
        return measure(options.seconds, TINY if options.tiny else 1, record)


def measure(seconds: float, shrink: int, record: Any) -> int:
    from atman_kernels.backends.triton import configs, tuning

    ends, device = time.monotonic() + seconds, torch.device("cuda")
    table = configs.load(configs.architecture(torch.cuda.get_device_capability()))
    key, call, expected, wrong, late = None, None, None, 0, 0
    for wanted, config in tuning.hand_picked(table):
        row: dict[str, Any] = asdict(wanted) | asdict(config)
        if time.monotonic() > ends:
            late += 1
            continue
        if wanted != key:  # the table's own entry comes first
            key, call = wanted, tuning.workload(wanted, device, shrink)
            with configs.forced(config):
                expected = call()[0].float()
        assert call is not None
        assert expected is not None
        try:
            with configs.forced(config):
                off = float((call()[0].float() - expected).abs().max() / expected.abs().max())
            if not off <= ALLOWED and shrink == 1:
                wrong += 1
                row |= {"status": "wrong", "off": off}
            else:
                row |= {"status": "ok", "milliseconds": tuning.milliseconds(call, config)}
        except Exception as error:
            row |= {"status": "error", "reason": f"{type(error).__name__}: {str(error)[:200]}"}
        record(row)
        shown = f"{row['milliseconds']:.4f} ms" if "milliseconds" in row else str(row)
        print(f"{wanted.regime:6} {wanted.head_dim:3}  {tuple(asdict(config).values())}  {shown}", flush=True)
    if late:
        print(f"{late} configurations were not tried for want of time")
    return FAILED if wrong else NOTHING_RUN if late and key is None else PASSED


if __name__ == "__main__":
    sys.exit(main())
