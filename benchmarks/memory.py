"""Peak memory of one contender in a fresh process, so that nothing before it counts.

    python -m benchmarks.memory ours --units 100

prints one line of JSON; `benchmarks.explain` starts it once per contender.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import click
import torch

from benchmarks.machine import REPOSITORY
from benchmarks.measure import metered, peak_bytes
from benchmarks.peers import BiasedSdpa, CaptumAblation, DenseEager
from benchmarks.prompts import Case, find_squad, long_case, sample_positions

TOKENS = 512
MANY_UNITS = (100, 1000)
LAST_TOKENS = 128  # units begin within the last so many prompt tokens, which keeps 1000 of them affordable


def memory_record(
    model: str, dtype: str, plan: Any, timed: list[dict[str, Any]], squad: str | None, tokens: int = TOKENS
) -> dict[str, Any]:
    """Peaks over the loaded model: ours with few and many variants, the peers, a plain forward of a pack's size."""

    def measure(what: str, **options: Any) -> dict[str, Any]:
        common = {"model": model, "dtype": dtype, "tokens": tokens, "threads": torch.get_num_threads()}
        common |= {"mode": plan.mode, "factor": plan.factor, "token_budget": plan.token_budget, "squad": squad}
        return run_worker(what, {**common, **options})

    ours = {units: measure("ours", units=units) for units in MANY_UNITS}
    rows = max(run["largest_forward"] for run in ours.values())
    peaks = {"plain": measure("plain", rows=rows)["peak_bytes"]}
    labels = {"plain": f"plain forward, {rows} tokens"}
    for units, run in ours.items():
        name = f"ours_{units}"
        peaks[name], labels[name] = run["peak_bytes"], f"ours, {units} units"
    batches = _batches(timed, dtype, tokens)
    for name in plan.contenders:
        if name not in ("ours", "ours_torch", "eager_full_logits"):
            batch = batches.get(name, 1)
            peaks[name] = measure(name, units=2 * batch - 1, batch=batch)["peak_bytes"]
            labels[name] = name if batch == 1 else f"{name} × {batch}"
    return {
        "dtype": dtype,
        "tokens": tokens,
        "peak_bytes": peaks,
        "labels": labels,
        "ours_over_plain": {str(units): run["peak_bytes"] / peaks["plain"] for units, run in ours.items()},
        "ours_many_over_few": ours[MANY_UNITS[1]]["peak_bytes"] / ours[MANY_UNITS[0]]["peak_bytes"],
    }


def run_worker(what: str, options: dict[str, Any]) -> dict[str, Any]:
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
    command = [sys.executable, "-m", "benchmarks.memory", what, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _batches(timed: list[dict[str, Any]], dtype: str, tokens: int) -> dict[str, int]:
    """The batch sizes that were fastest at this length, where they were measured."""
    for record in timed:
        if record["dtype"] == dtype and record["tokens"] == tokens:
            return {name: entry["batch"] for name, entry in record["contenders"].items()}
    return {}


def many_spans(case: Case, count: int) -> list[tuple[int, int]]:
    """`count` different spans of one, two, … tokens that begin within the last prompt tokens."""
    spans: list[tuple[int, int]] = []
    width = 1
    while len(spans) < count:
        for first in range(max(0, case.prompt_tokens - LAST_TOKENS), case.prompt_tokens - width + 1):
            spans.append((case.spans[first][0], case.spans[first + width - 1][1]))
        width += 1
    return spans[:count]


@click.command()
@click.argument("what", type=click.Choice(["plain", "ours", "eager", "sdpa", "captum"]))
@click.option("--model", default="smollm2")
@click.option("--dtype", default="float32")
@click.option("--tokens", type=int, default=TOKENS)
@click.option("--units", type=int, default=100)
@click.option("--batch", type=int, default=1)
@click.option("--rows", type=int, default=1024)
@click.option("--mode", default="log_additive")
@click.option("--factor", type=float, default=0.1)
@click.option("--token-budget", type=int)
@click.option("--threads", type=int)
@click.option("--squad")
def main(
    what: str, model: str, dtype: str, tokens: int, threads: int | None, squad: str | None, **options: Any
) -> None:
    """Measure the peak of one contender, over the loaded model, in this process."""
    from atman_kernels.hf.models.loading import load_model

    if threads:
        torch.set_num_threads(threads)
    loaded, tokenizer = load_model(model, dtype=dtype)
    for parameter in loaded.parameters():
        parameter.sum()  # weights mapped from a file are resident only once they have been read
    case = long_case(tokenizer, tokens, find_squad(squad))
    work = _work(what, loaded, tokenizer, case, **options)
    with metered() as meter:
        peak = peak_bytes(work)
    print(json.dumps({"peak_bytes": peak, "largest_forward": meter.largest_forward, "tokens": meter.tokens}))


def _work(
    what: str,
    model: Any,
    tokenizer: Any,
    case: Case,
    *,
    units: int,
    batch: int,
    rows: int,
    mode: str,
    factor: float,
    token_budget: int | None,
) -> Callable[[], Any]:
    if what == "plain":
        ids = case.ids.repeat(1 + rows // len(case.ids))[None, :rows]
        return lambda: _plain_forward(model, ids, len(case.target_ids))
    if what == "ours":
        import atman_kernels as ak

        explainer = ak.Explainer(model, tokenizer, mode=mode, factor=factor, token_budget=token_budget, progress=False)
        spans = many_spans(case, units)
        return lambda: explainer.explain(case.prompt, target=case.target, units=spans)
    positions = sample_positions(case, units)
    if what == "captum":
        return lambda: CaptumAblation(model, tokenizer).scores(case, positions)
    if what == "sdpa":
        return lambda: BiasedSdpa(model, factor, mode, batch).scores(case, positions)
    return lambda: DenseEager(model, factor, mode, batch).scores(case, positions)


@torch.inference_mode()
def _plain_forward(model: Any, ids: torch.Tensor, target_rows: int) -> None:
    """Like a pack, it asks for logits at the target's rows alone and keeps no cache."""
    model(ids, use_cache=False, logits_to_keep=target_rows)


if __name__ == "__main__":
    main()
