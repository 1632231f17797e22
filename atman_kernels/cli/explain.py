"""`atman explain`: a prompt in, a heatmap out."""

from typing import TYPE_CHECKING, Any

import click

from atman_kernels.cli.dataset import dataset_options
from atman_kernels.cli.model import check_model_given, device_options, load, model_options, warnings_as_messages
from atman_kernels.cli.output import Result, check_destinations, console, deliver, progress_is_seen, say
from atman_kernels.cli.prompts import check_texts, read_prompt, squad_question
from atman_kernels.cli.values import LARGEST_FACTOR, SEED, Number, layer_numbers, spans, units
from atman_kernels.errors import InputError

if TYPE_CHECKING:
    from atman_kernels.result.explanation import Explanation

# Those of atman_kernels.formula, which takes torch to import; a test compares them.
MODES = ("log_additive", "multiplicative", "shifted")


@click.command("explain")
@click.argument("prompt", required=False)
@model_options
@click.option("--file", metavar="FILE", help="Read the prompt from a file.")
@click.option("--squad", metavar="FILE", help="Ask a question of a file in SQuAD format.")
@click.option("--item", type=int, metavar="N", help="Which question of it, from 0.")
@click.option("--target", help="The answer to explain; usually starts with a space.  [default: the model's own]")
@click.option("--versus", metavar="TEXT", help="Another answer: show why the model prefers the target to it.")
@click.option(
    "--units",
    callback=units,
    metavar="KIND,...",
    default="token",
    show_default=True,
    help="What gets a score: token, word, sentence, paragraph; several, from coarse to fine, are nested.",
)
@click.option(
    "--span",
    "named_spans",
    callback=spans,
    multiple=True,
    metavar="0-120=NAME",
    help="Characters of the prompt as a unit, such as a document; with --units they are cut into these.",
)
@click.option("--refine", type=click.IntRange(min=1), metavar="K", help="Nested: cut the K strongest of each level.")
@click.option(
    "--method", metavar="NAME", default="atman", show_default=True, help="Or shapley, lasso, ...: see the docs."
)
@click.option(
    "--permutations", type=click.IntRange(4, 10**6), metavar="N", help="Orders that shapley draws; even, at least 4."
)
@click.option(
    "--exact", type=click.IntRange(min=1), metavar="K", help="Find the K strongest units, and run only those exactly."
)
@click.option(
    "--recompute",
    type=click.IntRange(min=1),
    metavar="K",
    help="Let only the last K prompt tokens feel it: 1 is what the answer reads directly.",
)
@click.option("--seed", type=SEED, metavar="N", help="Of methods that draw.")
@click.option("--mode", type=click.Choice(MODES), default="log_additive", show_default=True, help="How to suppress.")
@click.option(
    "--factor", type=Number(0, LARGEST_FACTOR), default=0.0, show_default=True, help="Attention that is kept."
)
@click.option(
    "--threshold",
    "similarity_threshold",
    type=Number(0, 1, min_open=True),
    help="Suppress tokens of at least this cosine similarity along with each unit.",
)
@click.option("--layers", callback=layer_numbers, metavar="0-5,8", help="Suppress in these layers only.")
@click.option("--chat/--no-chat", default=False, help="Put the prompt into the model's chat template.")
@click.option("--include-target", is_flag=True, help="Earlier answer tokens explain the later ones, too.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=32, show_default=True, help="Of its own answer.")
@click.option("--top", type=click.IntRange(min=1), default=8, show_default=True, help="Strongest units to list.")
@click.option("--html", metavar="FILE|-", help="Write a page with the heatmap; - instead of the one here.")
@click.option("--json", "json_file", metavar="FILE|-", help="Write the result as JSON; - instead of the heatmap.")
@dataset_options
@device_options
@click.option("--quiet", "-q", is_flag=True, help="No messages, no progress bar.")
def command(
    prompt: str | None,
    model: str | None,
    gguf: str | None,
    trust_remote_code: bool,
    file: str | None,
    squad: str | None,
    item: int | None,
    target: str | None,
    versus: str | None,
    units: str | list[str],
    named_spans: list[tuple[Any, ...]],
    refine: int | None,
    method: str,
    permutations: int | None,
    seed: int | None,
    exact: int | None,
    recompute: int | None,
    chat: bool,
    include_target: bool,
    max_new_tokens: int,
    top: int,
    html: str | None,
    json_file: str | None,
    device: str | None,
    dtype: str,
    quiet: bool,
    **suppression: Any,
) -> None:
    """Show which parts of PROMPT a model's answer rests on. PROMPT is a text, or - for standard input.

    \b
    atman explain --model smollm2 "The capital of France is"
    atman explain --model smollm2 --squad dev-v1.1.json --item 7 --units word --html why.html
    atman explain --model smollm2 --dataset prompts.parquet --out results --workers 2
    """
    check_model_given(model, gguf)
    check_texts({"--target": target, "--versus": versus})
    text, answer = _question(prompt, file, squad, item, target, chat)
    read = {"--file": file, "--squad": squad, "--gguf": gguf, "--model": model}
    check_destinations({"--html": html, "--json": json_file}, read)
    cut, options = _cut(units, named_spans), _method_options(method, permutations=permutations, seed=seed)
    with warnings_as_messages(quiet):
        loaded, tokenizer = load(
            model, device=device, dtype=dtype, quiet=quiet, gguf_file=gguf, trust_remote_code=trust_remote_code
        )
        from atman_kernels.cli.estimate import estimated
        from atman_kernels.explain.explainer import Explainer

        explainer = Explainer(loaded, tokenizer, progress=not quiet and progress_is_seen(), **suppression)
        asked: dict[str, Any] = {"include_target": include_target, "chat": chat, "max_new_tokens": max_new_tokens}
        asked |= {"exact": exact, "recompute": recompute, "refine": refine}
        shorter = explainer.task == "text-generation" and method == "atman" and exact is recompute is None
        # how much a search and nested units will take is not known yet; both are quick
        with estimated(shorter, said=not quiet and exact is None and isinstance(cut, str | list)):
            explanation = explainer.explain(text, answer, cut, versus=versus, method=method, **asked, **options)
    report(explanation, html=html, json_file=json_file, top=top, quiet=quiet)


def _cut(units: str | list[str], named_spans: list[tuple[Any, ...]]) -> Any:
    """What the options ask for, checked before a model is loaded for nothing: units of one level, or of several."""
    from atman_kernels.planning.levels import checked_units

    if not named_spans:
        return checked_units(units)
    source = click.get_current_context().get_parameter_source("units")
    if source is not click.core.ParameterSource.COMMANDLINE:
        return checked_units(named_spans)
    return checked_units([named_spans, *([units] if isinstance(units, str) else units)])


def _method_options(name: str, **given: Any) -> dict[str, Any]:
    """The options that were given, of a method that has them; checked before a model is loaded for nothing."""
    options = {option: value for option, value in given.items() if value is not None}
    if name != "atman" or options:
        from atman_kernels.explain.methods import method

        method(name, options)
    return options


def _question(
    prompt: str | None, file: str | None, squad: str | None, item: int | None, target: str | None, chat: bool
) -> tuple[str, str | None]:
    """(prompt, target or None) from whichever source was given."""
    if squad is None:
        if item is not None:
            raise InputError("--item needs --squad")
        text = read_prompt(prompt, file)
        if target and not chat and not text[-1].isspace() and target[0].isalnum():
            say(f"Note: the target continues the prompt without a space: …{text[-12:] + target[:12]!r}")
        return text, target
    if prompt is not None or file is not None:
        raise InputError("--squad brings its own prompt; leave out the other one")
    if item is None:
        raise InputError("--squad needs --item N, the number of the question from 0")
    question = squad_question(squad, item)
    return question.prompt(chat), question.target(chat) if target is None else target


def report(explanation: "Explanation", *, html: str | None, json_file: str | None, top: int, quiet: bool) -> None:
    """Write the files that were asked for, then the heatmap, or what takes its place, to standard output."""
    stats, settings = explanation.stats, explanation.settings
    cost = ""  # other methods than perturbation have other costs
    if "tokens_through_model" in stats:
        cost = f", {stats['tokens_through_model']:,} tokens through the model ({settings['path']})"
    note = f"\n{len(explanation.units)} units explained in {stats['seconds']:.1f} s, {settings['dtype']}{cost}"
    deliver(
        [Result("--html", html, explanation.to_html), Result("--json", json_file, explanation.to_json)],
        lambda: explanation.show(top=top, console=console()),
        [note],
        quiet,
    )
