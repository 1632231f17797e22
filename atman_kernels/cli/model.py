"""What the commands that run a model share: its options, loading it with a word on what was chosen, messages."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from atman_kernels.cli.output import say
from atman_kernels.errors import InputError


def device_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--device and --dtype."""
    command = click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        show_default=True,
        help="auto: bfloat16 where this machine multiplies it fast, else float32.",
    )(command)
    return click.option("--device", help="cpu, cuda, cuda:1, ...  [default: a GPU if there is one]")(command)


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--model, --gguf and --trust-remote-code."""
    where = "Hub id, local folder, or smollm2 (what the demo uses)."
    options = (
        click.option("--model", metavar="ID|FOLDER|smollm2", help=where),
        click.option("--gguf", metavar="FILE", help="GGUF file to take the model from."),
        click.option("--trust-remote-code", is_flag=True, help="Let code that comes with the model run."),
    )
    for option in reversed(options):  # as decorators, the last is applied first
        command = option(command)
    return command


def check_model_given(model: str | None, gguf: str | None) -> None:
    """Raises InputError if neither option names a model."""
    if model is None and gguf is None:
        raise InputError("--model or --gguf is missing; --model smollm2 takes the demo's")


def load(model: str | None, *, device: str | None, dtype: str, quiet: bool = False, **options: Any) -> tuple[Any, Any]:
    """`load_model`, having said which device and dtype were chosen, and why."""
    # libgomp's threads spin while they wait: beside any other busy process that made the demo 10 times slower than
    # on one thread. It reads this when torch is imported, which is about to happen.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from transformers.utils import logging

    from atman_kernels.hf.models.loading import choose_dtype, load_model, resolve_device, resolve_dtype

    logging.set_verbosity_error()  # its advice is for people who call it themselves
    logging.disable_progress_bar()  # of reading local weights; downloads keep theirs
    target = resolve_device(device)
    reason = choose_dtype(target)[1] if dtype == "auto" else "as asked"
    if not quiet:
        name = options.get("gguf_file") or model
        chosen = str(resolve_dtype(dtype, target)).removeprefix("torch.")
        say(f"Loading {name} on {target} in {chosen} ({reason}) …")
    return load_model(model, device=target, dtype=dtype, **options)


@contextmanager
def warnings_as_messages(quiet: bool = False) -> Iterator[None]:
    """What the library warns of becomes one plain line each; with `quiet`, nothing."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if not quiet and issubclass(category, UserWarning):
            say(f"Note: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = show
        yield
