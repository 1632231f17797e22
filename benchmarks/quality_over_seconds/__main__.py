"""Quality over seconds: how well each method finds the answer in the passage, and what it takes, by length of prompt.

    atman bench fit-at2 --squad dev-v1.1.json --out at2.safetensors
    python -m benchmarks.quality_over_seconds --squad dev-v1.1.json --at2-weights at2.safetensors
    python -m benchmarks.quality_over_seconds --squad dev-v1.1.json --only search --again      # that row alone, anew
    python -m benchmarks.quality_over_seconds --draw

Every finished explanation is a line of --measurements, so that a run which was stopped goes on; lengths take turns, so
that it may be stopped (Ctrl-C) at any time: the table is then of what is there. The rows of the result file are
replaced setting by setting. AT2's weights of SmolLM2 are beside the results.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from tqdm.auto import tqdm

from atman_kernels.cli.bench_quality import compared
from atman_kernels.evaluation.metrics import confidence_interval
from atman_kernels.evaluation.quality import EvaluationProtocol, Setting, measure, summarize
from atman_kernels.evaluation.results import ResultFile
from atman_kernels.evaluation.squad import Item, read_items, split_of, usable
from atman_kernels.explain.head_weights import HeadWeights
from benchmarks.explain import write
from benchmarks.machine import REPOSITORY, RESULTS, cpu_slug, environment
from benchmarks.prompts import find_squad
from benchmarks.quality_over_seconds.figure import draw
from benchmarks.quality_over_seconds.questions import lengthened, short_questions

COUNTS = "128:40,256:20,512:8"
SETTINGS = ("direct", "at2", "attnlrp", "linear", "search", "atman", "contextcite_32", "contextcite_64",
            "contextcite_256", "random")  # fmt: skip
OURS = ("direct", "search", "atman")
WEIGHTS = {"smollm2": RESULTS / "at2-smollm2.safetensors"}  # fitted on the split dev
PROTOCOL = EvaluationProtocol(units="token", passage_only=True)
FIGURE = REPOSITORY / "docs" / "images" / "quality-over-seconds.svg"


@click.command()
@click.option("--squad", type=click.Path(path_type=Path), help="Questions in SQuAD's format.")
@click.option("--counts", default=COUNTS, show_default=True, metavar="TOKENS:N,…", help="Lengths, questions of each.")
@click.option("--model", default="smollm2", show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option(
    "--at2-weights", type=click.Path(path_type=Path), help="What atman bench fit-at2 wrote.  [default: of smollm2]"
)
@click.option("--only", metavar="NAME,NAME", help=f"Some of {', '.join(SETTINGS)}.")
@click.option("--again", is_flag=True, help="Forget what was measured of these settings.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--measurements", type=click.Path(path_type=Path), help="[default: under build/]")
@click.option("--output", type=click.Path(path_type=Path), help="[default: under benchmarks/results]")
@click.option("--figure", type=click.Path(path_type=Path), default=FIGURE, help="[default: docs/images/….svg]")
@click.option("--draw", "draw_only", is_flag=True, help="Draw the result file, measure nothing.")
def main(
    squad: Path | None,
    counts: str,
    model: str,
    dtype: str,
    at2_weights: Path | None,
    only: str | None,
    again: bool,
    threads: int,
    seed: int,
    measurements: Path | None,
    output: Path | None,
    figure: Path,
    draw_only: bool,
) -> None:
    """Measure, write the table, draw it."""
    output = output or RESULTS / f"quality-over-seconds-{cpu_slug()}.json"
    if not draw_only:
        torch.set_num_threads(threads)
        lengths = _counts(counts)
        at2_weights = at2_weights or WEIGHTS.get(model)
        settings = _settings(only, at2_weights)
        measurements = measurements or REPOSITORY / "build" / f"quality-over-seconds-{cpu_slug()}.jsonl"
        measurements.parent.mkdir(parents=True, exist_ok=True)
        header = {"model": model, "dtype": dtype, "threads": threads, "seed": seed}
        if again:
            forget(measurements, {setting.name for setting in settings})
        facts = _run(_squad(squad), lengths, header, settings, ResultFile(measurements, header))
        if at2_weights is not None and at2_weights.is_file():
            facts |= {"at2": HeadWeights.load(at2_weights).fit}
        write(output, table(output, header | facts, rows_of(ResultFile(measurements, header), settings, lengths)))
    result = json.loads(output.read_text(encoding="utf-8"))
    draw(result, figure)
    for line in (*markdown(result["rows"]), *ahead(result["rows"])):
        click.echo(line)


def _run(
    squad: Path, lengths: dict[int, int], header: dict[str, Any], settings: list[Setting], file: ResultFile
) -> dict[str, Any]:
    """Everything that the file has not; tells how long the prompts were."""
    from atman_kernels.hf.models.loading import load_model

    loaded, tokenizer = load_model(header["model"], dtype=header["dtype"], device="cpu")
    items = questions(tokenizer, squad, lengths, header["seed"])
    warm = replace(items[0], id="warm-up", context=items[0].context[-120:])
    _warm_up(loaded, tokenizer, warm, settings)
    with tqdm(total=len(items) * len(settings), unit="explanation", disable=not sys.stderr.isatty()) as bar:
        try:
            measure(loaded, tokenizer, items, settings, PROTOCOL, file, bar.update)
        except KeyboardInterrupt:
            click.echo("Stopped; what was measured so far is in the table. The same command goes on.", err=True)
    sizes: dict[str, list[int]] = {}
    for item in items:
        sizes.setdefault(item.id.rpartition("@")[2], []).append(len(tokenizer(item.prompt(False))["input_ids"]))
    return {"prompt_tokens": {tokens: [min(found), max(found)] for tokens, found in sizes.items()}}


def _warm_up(model: Any, tokenizer: Any, item: Item, settings: Iterable[Setting]) -> None:
    """What is slow the first time (memory, compiled plans) is no method's fault."""
    from atman_kernels.explain.explainer import Explainer

    for setting in settings:
        explainer = Explainer(model, tokenizer, progress=False)
        explainer.explain(item.context, item.target(False), method=setting.method, **setting.options)


def questions(tokenizer: Any, squad: Path, lengths: dict[int, int], seed: int) -> list[Item]:
    """The same questions at every length, the shorter lists being beginnings of the longer; lengths take turns.

    Raises:
        click.UsageError: there are not so many short enough.
    """
    items, _ = usable(item for item in read_items(squad) if split_of(item) == "test")
    short = short_questions(tokenizer, items, min(lengths), seed)
    if len(short) < max(lengths.values()):
        raise click.UsageError(
            f"--counts: {squad.name} has {len(short)} test questions of at most {min(lengths)} tokens"
        )
    turns = sorted(((n + 0.5) / count, tokens, n) for tokens, count in lengths.items() for n in range(count))
    return [lengthened(tokenizer, short[n], items, tokens, seed) for _, tokens, n in turns]


def rows_of(file: ResultFile, settings: list[Setting], lengths: dict[int, int]) -> list[dict[str, Any]]:
    """One row per length and setting, with 95 % bootstrap intervals."""
    rows, where = [], environment()
    tabulated = {"date": where["date"], "commit": where["commit"], "package": where["sources"]["package"]}
    for tokens in lengths:
        own = [entry for entry in file.entries if entry["item"].endswith(f"@{tokens}")]
        for setting in settings:
            entries = [entry for entry in own if entry["setting"] == setting.name]
            for summary in summarize(entries):
                row = {"tokens": tokens, "setting": setting.name, "items": summary.items, "values": summary.values}
                rows.append(row | {"intervals": summary.intervals | _seconds(entries), "tabulated": tabulated})
    return rows


def _seconds(entries: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    found = {
        clock: torch.tensor([entry[clock] for entry in entries if clock in entry], dtype=torch.float64)
        for clock in ("seconds", "processor_seconds")
    }
    return {clock: confidence_interval(values) for clock, values in found.items() if len(values) > 1}


def table(output: Path, header: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The result file's content: new rows in the place of those that it has of the same length and setting."""
    new = {(row["tokens"], row["setting"]) for row in rows}
    old = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {"rows": []}
    kept = [row for row in old["rows"] if (row["tokens"], row["setting"]) not in new]
    rows = sorted([*kept, *rows], key=lambda row: (row["tokens"], SETTINGS.index(row["setting"])))
    return {**old, **header, "units": "tokens of the passages", "environment": environment(), "rows": rows}


def forget(measurements: Path, settings: set[str]) -> None:
    """Take what was measured of some settings out of the file."""
    if measurements.is_file():
        lines = measurements.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line).get("setting") not in settings]
        measurements.write_text("".join(kept), encoding="utf-8")


def ahead(rows: list[dict[str, Any]]) -> list[str]:
    """Where a method is better on average than each of ours that takes no more of the processor's time."""
    found = []
    for row in rows:
        if row["setting"] in (*OURS, "random") or not row["items"]:
            continue
        ours = [each for each in rows if each["tokens"] == row["tokens"] and each["setting"] in OURS and each["items"]]
        seconds = row["values"]["processor_seconds"]
        within = [each for each in ours if each["values"]["processor_seconds"] <= seconds]
        for measure_name in ("mAP", "hit@5"):
            best = max((each["values"][measure_name] for each in within), default=None)
            if best is None:
                found.append(f"{row['tokens']}: {row['setting']} takes less time than any of ours ({measure_name})")
            elif row["values"][measure_name] > best:
                found.append(
                    f"{row['tokens']}: {row['setting']} is ahead in {measure_name}, "
                    f"{100 * row['values'][measure_name]:.1f} against {100 * best:.1f}"
                )
    return found


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """The table of the documentation: percent with 95 % intervals, and seconds."""
    lines = ["| tokens | method | mAP | hit@1 | hit@5 | processor seconds |", "|---|---|---|---|---|---|"]
    for row in rows:
        if row["items"]:
            percent = [_with_interval(row, measure_name, 100, 1) for measure_name in ("mAP", "hit@1", "hit@5")]
            cells = [str(row["tokens"]), row["setting"], *percent, _with_interval(row, "processor_seconds", 1, 2)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _with_interval(row: dict[str, Any], name: str, factor: int, digits: int) -> str:
    found, bounds = row["values"][name], row.get("intervals", {}).get(name)
    ends = "" if bounds is None else f" ({factor * bounds[0]:.{digits}f} – {factor * bounds[1]:.{digits}f})"
    return f"{factor * found:.{digits}f}{ends}"


def _counts(text: str) -> dict[int, int]:
    try:
        found = {int(tokens): int(count) for tokens, count in (each.split(":") for each in text.split(","))}
        if min(*found, *found.values()) < 1:
            raise ValueError
    except (ValueError, TypeError) as error:
        raise click.UsageError(f"--counts must be like {COUNTS}, got {text!r}") from error
    return dict(sorted(found.items()))


def _settings(only: str | None, at2_weights: Path | None) -> list[Setting]:
    names = only.split(",") if only else SETTINGS
    unknown = [name for name in names if name not in SETTINGS]
    if unknown:
        raise click.UsageError(f"--only: {unknown[0]!r} is none of {', '.join(SETTINGS)}")
    if "at2" not in names:
        at2_weights = None
    elif at2_weights is None or not at2_weights.is_file():
        raise click.UsageError("--at2-weights is missing; leave at2 out by --only, or fit it: atman bench fit-at2")
    return compared(",".join(names), {}, 16, None if at2_weights is None else str(at2_weights))


def _squad(given: Path | None) -> Path:
    found = find_squad(given)
    if found is None:
        raise click.UsageError("--squad is missing: a file of questions in SQuAD's format")
    return found


if __name__ == "__main__":
    main()
