"""`atman explain --dataset`: every row of a data set explained, the results in a folder."""

import functools
from collections.abc import Callable
from typing import Any

import click

from atman_kernels.cli.model import check_model_given, warnings_as_messages
from atman_kernels.cli.output import progress_is_seen, say
from atman_kernels.cli.values import Number
from atman_kernels.errors import InputError

# what goes with one prompt alone
_ONE_PROMPT = (
    "prompt", "file", "squad", "item", "target", "versus", "html", "json_file", "top", "named_spans", "refine",
)  # fmt: skip
_OF_DATASETS = ("out", "workers", "address", "id_column", "prompt_column", "target_column", "gpus_per_worker")
_OPTIONS = (
    click.option("--dataset", metavar="FILE|FOLDER", help="Explain every row of it: Parquet, JSON lines, CSV."),
    click.option("--out", metavar="FOLDER", help="Where the results of --dataset go; again: go on there."),
    click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Processes.  [default: one per GPU]"),
    click.option("--gpus-per-worker", type=Number(0, 1), metavar="N", help="[default: 1 where there are GPUs]"),
    click.option("--address", metavar="HOST:PORT|auto", help="A running Ray cluster.  [default: this machine]"),
    click.option("--id-column", default="id", show_default=True, metavar="NAME", help="Of --dataset."),
    click.option("--prompt-column", default="prompt", show_default=True, metavar="NAME"),
    click.option("--target-column", metavar="NAME", help="[default: none, the model's own answers]"),
)


def dataset_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds --dataset and what goes with it to a command that explains one prompt, and serves it."""

    @functools.wraps(command)
    def either(dataset: str | None, **values: Any) -> None:
        with_dataset = {name: values.pop(name) for name in _OF_DATASETS}
        if dataset is None:
            _refuse(_OF_DATASETS, "goes with --dataset")
            command(**values)
        else:
            _refuse(_ONE_PROMPT, "does not go with --dataset")
            _explain(dataset, **with_dataset, **{name: x for name, x in values.items() if name not in _ONE_PROMPT})

    found: Callable[..., None] = either
    for option in reversed(_OPTIONS):
        found = option(found)
    return found


def _refuse(names: tuple[str, ...], why: str) -> None:
    context = click.get_current_context()
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in names and source is click.core.ParameterSource.COMMANDLINE:
            raise InputError(f"{parameter.opts[0] if parameter.param_type_name == 'option' else 'a prompt'} {why}")


def _explain(
    dataset: str,
    out: str | None,
    model: str | None,
    gguf: str | None,
    quiet: bool,
    **options: Any,
) -> None:
    check_model_given(model, gguf)
    if out is None:
        raise InputError("--dataset needs --out, the folder for the results")
    for name in ("permutations", "seed"):
        if options[name] is None:
            del options[name]
    if model is not None:
        options["gguf_file"] = gguf
    from atman_kernels.scale import explain_dataset

    with warnings_as_messages(quiet):
        found = explain_dataset(
            dataset,
            out,
            model=model or gguf or "",
            progress=not quiet and progress_is_seen(),
            **options,
        )
    if not quiet:
        failed = f", {found.failed:,} with an error" if found.failed else ""
        say(
            f"{found.rows:,} rows in {found.output}{failed}; {found.explained:,} of them explained now, "
            f"in {found.seconds:.1f} s"
        )
