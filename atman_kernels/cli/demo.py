"""`atman demo`: a question over a paragraph that travels with the package, answered and explained on this machine."""

import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import click

from atman_kernels.cli.explain import report
from atman_kernels.cli.model import device_options, load, warnings_as_messages
from atman_kernels.cli.output import check_destinations, progress_is_seen, say

if TYPE_CHECKING:
    from atman_kernels import Explanation

STRONGEST = 8  # words that are listed, and searched for


@click.command("demo")
@click.option("--html", metavar="FILE", default="atman-demo.html", show_default=True, help="Where the page goes.")
@device_options
def command(html: str, device: str | None, dtype: str) -> None:
    """Explain what SmolLM2-135M answers about a paragraph it has never seen."""
    check_destinations({"--html": html})
    with warnings_as_messages():
        explanation = explain_demo(*load("smollm2", device=device, dtype=dtype), progress=progress_is_seen())
    report(explanation, html=html, json_file=None, top=STRONGEST, quiet=False)
    say(
        "How to read it: the stronger a word's colour or score, the less likely the answer becomes when the model "
        "cannot attend to that word; the page shows it for each part of the answer. The strongest words were searched "
        "for and are exact, hatched ones are estimates; without --exact, atman explain makes all of them exact."
    )


def explain_demo(model: Any, tokenizer: Any, progress: bool = False) -> "Explanation":
    """The demo's paragraph and question, the strongest words exactly; the model finds the answer by itself."""
    from atman_kernels import Explainer
    from atman_kernels.evaluation.squad import Item

    content = json.loads(files("atman_kernels").joinpath("assets", "demo.json").read_text(encoding="utf-8"))
    item = Item("demo", "", content["paragraph"], content["question"], answer=None, start=None)
    explainer = Explainer(model, tokenizer, progress=progress)
    return explainer.explain(item.prompt(chat=True), units="word", chat=True, exact=STRONGEST)
