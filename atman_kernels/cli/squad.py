"""What the commands that go through questions of a SQuAD-format file share: which questions, of which model."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from atman_kernels.cli.output import say
from atman_kernels.cli.values import SEED
from atman_kernels.errors import InputError

if TYPE_CHECKING:
    from atman_kernels.evaluation.squad import Item


def squad_options(
    split: str, drawn: str = "the passages' random order"
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """--squad, --model, --split with its default, --items, and --seed of what is drawn."""
    options = (
        click.option(
            "--squad", metavar="FILE", required=True, help="Questions with answer spans, in the format of SQuAD 1.1."
        ),
        click.option("--model", metavar="ID|FOLDER|smollm2", default="smollm2", show_default=True),
        click.option("--split", type=click.Choice(["dev", "test", "all"]), default=split, show_default=True),
        click.option("--items", type=click.IntRange(min=1), help="Only N of them, passage by passage.  [default: all]"),
        click.option("--seed", type=SEED, default=0, show_default=True, help=f"Of {drawn}."),
    )

    def added(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):  # as decorators, the last is applied first
            command = option(command)
        return command

    return added


def chosen_items(squad: str, split: str, items: int | None, seed: int) -> "list[Item]":
    """The file's usable questions of a split, so many of them.

    Raises:
        InputError: there are none.
    """
    from atman_kernels.evaluation.squad import drawn, read_items, split_of, usable

    chosen, left_out = usable(item for item in read_items(squad) if split in ("all", split_of(item)))
    for line in left_out:
        say(f"Note: left out {line}")
    chosen = drawn(chosen, items, seed)
    if not chosen:
        raise InputError(f"{squad} holds no usable question of the split {split!r}")
    return chosen
