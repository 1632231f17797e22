"""`atman steer`: what a model answers as it is, and with parts of the prompt suppressed or amplified."""

import json
import re
from typing import TYPE_CHECKING, Any

import click

from atman_kernels.cli.explain import MODES
from atman_kernels.cli.model import check_model_given, device_options, load, model_options, warnings_as_messages
from atman_kernels.cli.output import Result, check_destinations, deliver, show, shown, sign
from atman_kernels.cli.prompts import check_texts, read_prompt
from atman_kernels.cli.values import LARGEST_FACTOR, SEED, Number, Temperature, layer_numbers, which
from atman_kernels.errors import InputError
from atman_kernels.result.characters import isolated
from atman_kernels.result.labels import label

if TYPE_CHECKING:
    from rich.text import Text

    from atman_kernels.steering.spans import Span, SteeredSpan


@click.command("steer")
@click.argument("prompt", required=False)
@model_options
@click.option("--file", metavar="FILE", help="Read the prompt from a file.")
@click.option("--suppress", metavar="TEXT", multiple=True, help="A part of the prompt to turn down; repeatable.")
@click.option("--amplify", metavar="TEXT", multiple=True, help="A part of the prompt to turn up; repeatable.")
@click.option("--factor", type=Number(0, 1), default=0.1, show_default=True, help="What suppression leaves; 0 removes.")
@click.option(
    "--amplify-factor", type=Number(1, LARGEST_FACTOR), default=10.0, show_default=True, help="How much more counts."
)
@click.option("--regex", is_flag=True, help="The texts are regular expressions.")
@click.option(
    "--occurrence", callback=which, metavar="N|all", help="Which one, from 0, of texts that occur several times."
)
@click.option("--mode", type=click.Choice(MODES), default="log_additive", show_default=True, help="How to scale.")
@click.option("--layers", callback=layer_numbers, metavar="0-5,8", help="Steer in these layers only.")
@click.option("--chat/--no-chat", default=False, help="Put the prompt into the model's chat template.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Of each answer.")
@click.option("--beams", type=click.IntRange(1, 1024), default=1, show_default=True, help="Search with so many beams.")
@click.option(
    "--temperature", type=Temperature(0, 1e6), default=0.0, show_default=True, help="Draw the answers; 0 does not."
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the draws, of both answers.")
@click.option("--json", "json_file", metavar="FILE|-", help="Write the result as JSON; - instead of the table.")
@device_options
@click.option("--quiet", "-q", is_flag=True, help="No messages.")
def command(
    prompt: str | None,
    model: str | None,
    gguf: str | None,
    trust_remote_code: bool,
    file: str | None,
    suppress: tuple[str, ...],
    amplify: tuple[str, ...],
    factor: float,
    amplify_factor: float,
    regex: bool,
    occurrence: int | str | None,
    mode: str,
    layers: list[int] | None,
    chat: bool,
    max_new_tokens: int,
    beams: int,
    temperature: float,
    seed: int,
    json_file: str | None,
    device: str | None,
    dtype: str,
    quiet: bool,
) -> None:
    """Answer PROMPT twice: as the model does, and with parts of the prompt turned down or up.

    PROMPT is a text, or - for standard input.

    \b
    atman steer --model smollm2 --chat --suppress Pilot --factor 0 "Our dog is called Pilot. What is his name?"
    """
    check_model_given(model, gguf)
    check_texts({"--suppress": suppress, "--amplify": amplify})
    text = read_prompt(prompt, file)
    spans = _spans(suppress, amplify, factor, amplify_factor, regex, occurrence)
    if not chat:  # a template may add to the text; what it has not may be said before a model is loaded
        _find_all(spans, text)
    check_destinations({"--json": json_file}, {"--file": file, "--gguf": gguf, "--model": model})
    with warnings_as_messages(quiet):
        loaded, tokenizer = load(
            model, device=device, dtype=dtype, quiet=quiet, gguf_file=gguf, trust_remote_code=trust_remote_code
        )
        settings: dict[str, Any] = {"mode": mode, "layers": layers, "chat": chat, "max_new_tokens": max_new_tokens}
        settings |= {"beams": beams, "temperature": temperature, "seed": seed}
        found = answers(loaded, tokenizer, text, spans, **settings)
    report(found | {"settings": settings}, json_file, quiet)


def _spans(
    suppress: tuple[str, ...],
    amplify: tuple[str, ...],
    factor: float,
    amplify_factor: float,
    regex: bool,
    occurrence: int | str | None,
) -> "dict[Span, float]":
    from atman_kernels.steering.spans import Occurrence

    if not suppress and not amplify:
        raise InputError("--suppress or --amplify is missing: which part of the prompt should count less, or more?")
    spans: dict[Span, float] = {}
    for texts, wanted in ((suppress, factor), (amplify, amplify_factor)):
        for text in texts:
            try:
                part = re.compile(text) if regex else text
            except re.error as error:
                raise InputError(f"--regex: {text!r} is no regular expression: {error}") from error
            span = part if occurrence is None else Occurrence(part, occurrence)
            if spans.setdefault(span, wanted) != wanted:
                raise InputError(f"{text!r} is both in --suppress and in --amplify")
    return spans


def _find_all(spans: "dict[Span, float]", text: str) -> None:
    from atman_kernels.steering.spans import Occurrence, occurrences

    for span in spans:
        if isinstance(span, str | re.Pattern | Occurrence):
            list(occurrences(span, text))


def answers(
    model: Any,
    tokenizer: Any,
    prompt: str,
    spans: "dict[Span, float]",
    *,
    mode: str,
    layers: list[int] | None,
    chat: bool,
    max_new_tokens: int,
    beams: int,
    temperature: float,
    seed: int,
) -> dict[str, Any]:
    """Both answers, the text that was tokenized, and its spans."""
    import torch

    from atman_kernels.steering.steer import steer

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0, "num_beams": beams}
    if temperature > 0:
        options["temperature"] = temperature
    with steer(model, tokenizer, prompt, {}, chat=chat) as plain:
        torch.manual_seed(seed)
        plain_answer = plain.generate(**options)[0]
    with steer(model, tokenizer, prompt, spans, mode=mode, layers=layers, chat=chat) as steered:
        torch.manual_seed(seed)
        steered_answer = steered.generate(**options)[0]
    return {
        "prompt": steered.texts[0],
        "spans": [_as_dict(span) for span in steered.spans[0]],
        "plain": plain_answer,
        "steered": steered_answer,
    }


def _as_dict(span: "SteeredSpan") -> dict[str, Any]:
    unit = span.unit
    tokens = list(unit.token_indices)
    return {"text": unit.text, "start": unit.start, "end": unit.end, "token_indices": tokens, "factor": span.factor}


def report(found: dict[str, Any], json_file: str | None, quiet: bool) -> None:
    """Write the JSON that was asked for, and print both answers side by side."""
    result = Result("--json", json_file, lambda: json.dumps(found, indent=2) + "\n")
    deliver([result], lambda: _print(found), quiet=quiet)


def _print(found: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(expand=True)
    table.add_column("Plain", ratio=1, overflow="fold")
    table.add_column("Steered", ratio=1, overflow="fold")
    nothing = sign("∅", "(nothing)")
    table.add_row(*(Text(shown(found[name].strip()) or nothing) for name in ("plain", "steered")))
    same = [Text("The answers are the same.", "dim")] if found["plain"] == found["steered"] else []
    show(Text("Prompt", "bold"), _marked(found["prompt"], found["spans"]), Text(), table, *same)


def _marked(prompt: str, spans: list[dict[str, Any]]) -> "Text":
    """The prompt with every span as [text ×factor]; where spans overlap, the first of them."""
    from rich.text import Text

    marked, reached = Text(overflow="fold"), 0
    for span in sorted(spans, key=lambda span: (span["start"], -span["end"])):
        if span["start"] < reached:
            continue
        marked.append(shown(prompt[reached : span["start"]]))
        style = "bold red" if span["factor"] < 1 else "bold green"
        text = span["text"] if "\n" not in span["text"] and span["text"].strip() else label(span["text"], 1 << 30)
        marked.append(f"[{isolated(shown(text))} {sign('×', 'x')}{span['factor']:g}]", style)
        reached = span["end"]
    marked.append(shown(prompt[reached:]))
    return marked
