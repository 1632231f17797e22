"""`atman bench fit-at2`: learns which heads' attention says what ablations do."""

import click

from atman_kernels.cli.model import device_options, load, warnings_as_messages
from atman_kernels.cli.output import check_destinations, progress_is_seen, say
from atman_kernels.cli.squad import chosen_items, squad_options


@click.command("fit-at2")
@squad_options(split="dev", drawn="the random order and the random sets")
@click.option("--out", metavar="FILE", required=True, help="Where the weights go, as safetensors.")
@click.option(
    "--samples", type=click.IntRange(2, 10**6), default=32, show_default=True, help="Random sets of every passage."
)
@click.option("--chat/--no-chat", default=False, help="Ask through the model's chat template.")
@device_options
def command(
    squad: str,
    out: str,
    model: str,
    split: str,
    items: int | None,
    seed: int,
    samples: int,
    chat: bool,
    device: str | None,
    dtype: str,
) -> None:
    """Learn AT2's weights of a model from ablations of the passages' tokens, for `--method at2`.

    \b
    atman bench fit-at2 --squad dev-v1.1.json --out at2.safetensors
    atman bench quality --squad dev-v1.1.json --methods atman,at2 --at2-weights at2.safetensors
    """
    check_destinations({"--out": out}, {"--squad": squad})
    chosen = chosen_items(squad, split, items, seed)
    with warnings_as_messages():
        loaded, tokenizer = load(model, device=device, dtype=dtype)
        from atman_kernels.evaluation.quality import EvaluationProtocol, units_of
        from atman_kernels.explain.at2_fitting import fit_at2
        from atman_kernels.explain.explainer import Explainer

        explainer = Explainer(loaded, tokenizer, progress=progress_is_seen())
        protocol = EvaluationProtocol(chat=chat, passage_only=True)
        weights = fit_at2(
            explainer,
            [item.prompt(chat) for item in chosen],
            [item.target(chat) for item in chosen],
            [units_of(explainer, item, protocol) for item in chosen],
            samples=samples,
            seed=seed,
            chat=chat,
        )
    weights.save(out)
    layers, heads = weights.weights.shape
    say(f"Weights of {layers} × {heads} heads, of {len(chosen)} questions with {samples} ablations each, are in {out}")
