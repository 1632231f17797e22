"""`atman bench quality`: do explanations point to the passage that holds the answer?"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from atman_kernels.cli.explain import MODES
from atman_kernels.cli.model import device_options, load, warnings_as_messages
from atman_kernels.cli.output import Result, check_destinations, deliver, progress_is_seen, shown
from atman_kernels.cli.output import show as show_here
from atman_kernels.cli.squad import chosen_items, squad_options
from atman_kernels.cli.values import LARGEST_FACTOR, UNITS, Number
from atman_kernels.errors import InputError

if TYPE_CHECKING:
    from atman_kernels.evaluation.quality import EvaluationProtocol, Setting, Summary
    from atman_kernels.evaluation.results import ResultFile
    from atman_kernels.evaluation.squad import Item

FACTORS = (0.0, 0.1, 0.5)
THRESHOLDS = (None, 0.7)
# What has a name of its own here: AtMan for less work, and ContextCite at the numbers of ablations that its paper has.
NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "direct": ("atman", {"recompute": 1}),
    "search": ("atman", {"exact": 16}),
    **{f"contextcite_{samples}": ("lasso", {"samples": samples}) for samples in (32, 64, 256)},
}
OF_ANY_METHOD = ("recompute", "exact")
# Slower by a hundred times what they add here; ask for them by name.
UNASKED = ("shapley", "lasso", "contextcite_32", "contextcite_64", "contextcite_256")
WITH_INTERVALS = ("mAP", "hit@1", "area")  # in the terminal, where there is not room for all
WIDTH = 120  # of the table, wherever it goes
COLUMNS = ("mAP", "mAP_IQ", "mAR", "mAR_IQ", "hit@1", "hit@5", "area", "seconds")


@click.command("quality")
@squad_options(split="test")
@click.option(
    "--methods",
    metavar="NAME,NAME",
    help="Which to compare: methods, direct (recompute=1), search (exact=16), contextcite_32, _64, _256.  "
    "[default: all but shapley, lasso and contextcite; at2 with its weights]",
)
@click.option("--at2-weights", metavar="FILE", help="What atman bench fit-at2 wrote for this model.")
@click.option("--sweep", is_flag=True, help="AtMan alone, in every mode with several factors and thresholds.")
@click.option("--mode", type=click.Choice(MODES), help="Of AtMan.  [default: the package's]")
@click.option("--factor", type=Number(0, LARGEST_FACTOR), help="Of AtMan.  [default: the package's]")
@click.option(
    "--threshold", "similarity_threshold", type=Number(0, 1, min_open=True), help="Of AtMan.  [default: none]"
)
@click.option(
    "--ig-steps", type=click.IntRange(1, 10_000), default=32, show_default=True, help="Of integrated gradients."
)
@click.option("--units", type=click.Choice(UNITS), default="token", show_default=True)
@click.option("--passage-only", is_flag=True, help="Units of the passage alone, as ContextCite and AT2 have them.")
@click.option("--chat/--no-chat", default=False, help="Ask through the model's chat template.")
@click.option("--faithfulness", type=click.IntRange(min=0), default=0, show_default=True, metavar="N",
              help="Run deletion and insertion curves for the first N items.")  # fmt: skip
@click.option("--results", metavar="FILE", default="quality.jsonl", show_default=True,
              help="Every measurement, as it is finished; later runs go on from it and add to it.")  # fmt: skip
@click.option("--json", "json_file", metavar="FILE|-", help="Write the table as JSON, too; - instead of it.")
@device_options
def command(
    squad: str,
    model: str,
    split: str,
    items: int | None,
    seed: int,
    methods: str | None,
    at2_weights: str | None,
    sweep: bool,
    ig_steps: int,
    units: str,
    passage_only: bool,
    chat: bool,
    faithfulness: int,
    results: str,
    json_file: str | None,
    device: str | None,
    dtype: str,
    **suppression: Any,
) -> None:
    """Explain the gold answers of a SQuAD-format file in several ways, and compare.

    \b
    atman bench quality --squad dev-v1.1.json --split dev --sweep --items 50
    atman bench quality --squad dev-v1.1.json --methods atman,rollout,attnlrp --json table.json
    """
    if sweep and (methods or at2_weights):
        raise InputError("--sweep is AtMan alone; leave out --methods and --at2-weights")
    check_destinations({"--results": results, "--json": json_file}, {"--squad": squad, "--at2-weights": at2_weights})
    from atman_kernels.evaluation.quality import EvaluationProtocol, agreement, summarize
    from atman_kernels.evaluation.results import ResultFile

    chosen = chosen_items(squad, split, items, seed)
    explainer = {name: value for name, value in suppression.items() if value is not None}
    settings = swept() if sweep else compared(methods, explainer, ig_steps, at2_weights)
    protocol = EvaluationProtocol(units, chat, faithfulness, passage_only)
    header = _header(squad, protocol, {"split": split, "model": model, "dtype": dtype})
    file = ResultFile(results, header)
    loaded = _measure(model, device, dtype, chosen, settings, protocol, file)
    wanted = {item.id for item in chosen}
    named = {setting.name for setting in settings}
    entries = [entry for entry in file.entries if entry["item"] in wanted and entry["setting"] in named]
    summaries = summarize(entries)
    facts = {"dtype": str(loaded.dtype).removeprefix("torch."), "items": len(chosen), "seed": seed}
    facts |= {"settings": {name: file.settings[name] for name in named}}

    def as_json() -> str:
        ranks = {f"{one} / {other}": value for (one, other), value in agreement(entries).items()}
        return table_as_json(header | facts, summaries, ranks)

    deliver([Result("--json", json_file, as_json)], lambda: show(summaries))


def _header(squad: str, protocol: "EvaluationProtocol", others: dict[str, Any]) -> dict[str, Any]:
    """What all measurements of a result file have in common."""
    from atman_kernels.evaluation.squad import CHAT_PROMPT

    header = {
        "data": hashlib.sha256(Path(squad).read_bytes()).hexdigest(),
        **others,
        "units": protocol.units,
        "chat": protocol.chat,
        "faithfulness": protocol.faithfulness_items,
    }
    header |= {"passage_only": True} if protocol.passage_only else {}
    # earlier versions put the plain prompt into the template: their measurements are of other prompts
    return header | ({"prompt": CHAT_PROMPT} if protocol.chat else {})


def _measure(
    model: str,
    device: str | None,
    dtype: str,
    items: "list[Item]",
    settings: "list[Setting]",
    protocol: "EvaluationProtocol",
    file: "ResultFile",
) -> Any:
    """The model, once every measurement that the file has not is in it."""
    from tqdm.auto import tqdm

    from atman_kernels.evaluation.quality import measure

    with warnings_as_messages():
        loaded, tokenizer = load(model, device=device, dtype=dtype)
        hidden = not progress_is_seen()
        with tqdm(total=len(items) * len(settings), unit="explanation", desc="explaining", disable=hidden) as bar:
            measure(loaded, tokenizer, items, settings, protocol, file, bar.update)
    return loaded


def compared(
    methods: str | None, explainer: dict[str, Any], ig_steps: int, at2_weights: str | None = None
) -> list["Setting"]:
    """One setting per method. What is measured is the whole answer's; where that is cheaper, it is asked for.

    Raises:
        InputError: a name is not known, or is of a method that needs a file which was not given.
    """
    from atman_kernels.evaluation.quality import Setting
    from atman_kernels.explain.methods import method, names

    known: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in names()} | NAMED
    known["at2"] = ("at2", {"weights": at2_weights})
    unasked = UNASKED if at2_weights is not None else (*UNASKED, "at2")
    wanted = methods.split(",") if methods else [name for name in known if name not in unasked]
    if at2_weights is not None and "at2" not in wanted:
        raise InputError("--at2-weights are for the method at2, which --methods leaves out")
    asked = {"whole_answer": True, "steps": ig_steps}
    settings = []
    for name in wanted:
        if name not in known:
            raise InputError(f"--methods: {name!r} is none of {', '.join(known)}")
        if name == "at2" and at2_weights is None:
            raise InputError("--methods: at2 needs --at2-weights FILE, which atman bench fit-at2 writes")
        of, options = known[name]
        has = method(of, {option: x for option, x in options.items() if option not in OF_ANY_METHOD}).options
        settings.append(Setting(name, of, options | {o: asked[o] for o in asked if o in has}, explainer))
    return settings


def swept() -> list["Setting"]:
    """AtMan in every mode, with several factors, with and without neighbours."""
    from atman_kernels.evaluation.quality import Setting

    grid = itertools.product(MODES, FACTORS, THRESHOLDS)
    return [
        Setting(
            f"{mode} {factor:g}" + ("" if threshold is None else f" κ={threshold:g}"),
            explainer={"mode": mode, "factor": factor, "similarity_threshold": threshold},
        )
        for mode, factor, threshold in grid
    ]


def show(summaries: Sequence["Summary"]) -> None:
    """The table, with half the width of the 95 % interval behind each mean."""
    from rich import box
    from rich.table import Column, Table

    columns = [name for name in COLUMNS if any(name in summary.values for summary in summaries)]
    table = Table(
        "", *(Column(name, justify="right", no_wrap=True) for name in ("items", *columns)), box=box.SIMPLE_HEAD
    )
    table.columns[0].no_wrap = True
    for summary in summaries:
        cells = [_cell(summary, name) for name in columns] if summary.items else [summary.refused or ""]
        table.add_row(*map(shown, (summary.setting, str(summary.items), *cells)))
    show_here(table, wide=WIDTH)


def _cell(summary: "Summary", name: str) -> str:
    if name not in summary.values:
        return ""
    if name not in summary.intervals or name not in WITH_INTERVALS:
        return f"{summary.values[name]:.2f}" if name in ("seconds", "area") else f"{100 * summary.values[name]:.1f}"
    low, high = summary.intervals[name]
    factor, digits = (1, 2) if name == "area" else (100, 1)
    return f"{factor * summary.values[name]:.{digits}f} ±{factor * (high - low) / 2:.{digits}f}"


def table_as_json(header: dict[str, Any], summaries: Sequence["Summary"], ranks: dict[str, float]) -> str:
    """The table, what it was measured with, and rank correlations by pair of settings."""
    rows = [
        {"setting": s.setting, "items": s.items, "values": s.values, "intervals": s.intervals, "refused": s.refused}
        for s in summaries
    ]
    versions = {name: version(name) for name in ("atman-kernels", "torch", "transformers")}
    content = {**header, "versions": versions, "rows": rows, "rank_correlation": ranks}
    return json.dumps(content, indent=1) + "\n"
