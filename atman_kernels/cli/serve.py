"""`atman serve`: the model behind an address, with a page for people and endpoints for programs."""

import logging
import sys
from pathlib import Path
from typing import Any

import click

from atman_kernels.cli.model import check_model_given, device_options, load, model_options, warnings_as_messages
from atman_kernels.cli.output import say
from atman_kernels.cli.values import Number
from atman_kernels.errors import InputError

COUNT = click.IntRange(min=1)


@click.command("serve")
@model_options
@click.option("--name", metavar="NAME", help="What requests call it.  [default: the last part of its id or file]")
@click.option("--host", metavar="ADDRESS", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any that is free.")
@click.option("--token-file", metavar="FILE", help="What requests must show; a must where others can reach it.")
@click.option("--max-tokens", type=COUNT, default=8192, show_default=True, help="Of a prompt with its answer.")
@click.option("--max-units", type=COUNT, default=4096, show_default=True, help="Of a request.")
@click.option("--max-new-tokens", type=COUNT, default=512, show_default=True, help="Of the model's own answer.")
@click.option("--max-bytes", type=COUNT, default=16 << 20, show_default=True, help="Of a request's body.")
@click.option("--seconds", type=Number(0.1), default=600, show_default=True, help="Of work for a request.")
@click.option("--queue", type=COUNT, default=64, show_default=True, help="Requests that may wait.")
@click.option("--batch", type=COUNT, default=8, show_default=True, help="Requests that are explained together.")
@click.option("--keep", type=click.IntRange(0), default=64, show_default=True, help='Results kept for "store".')
@click.option("--grace", type=Number(0), default=30, show_default=True, help="Seconds to end in.")
@click.option("--log-prompts", is_flag=True, help="Write prompts to the log, which never happens otherwise.")
@device_options
@click.option("--quiet", "-q", is_flag=True, help="No messages, no log of requests.")
@click.option("--model_name", "kserve_name", hidden=True, help="As KServe starts its containers; --name.")
@click.option("--http_port", "kserve_port", type=click.IntRange(0, 65535), hidden=True, help="Likewise; --port.")
@click.option("--predictor_host", "_predictor", hidden=True, help="Likewise; the model is in this process.")
@click.option("--workers", "_workers", type=COUNT, hidden=True, help="Likewise; one thread works on one model.")
def command(
    model: str | None,
    gguf: str | None,
    trust_remote_code: bool,
    name: str | None,
    host: str,
    port: int,
    token_file: str | None,
    device: str | None,
    dtype: str,
    quiet: bool,
    kserve_name: str | None,
    kserve_port: int | None,
    _predictor: str | None,
    _workers: int | None,
    **limits: Any,
) -> None:
    """Explain answers over HTTP: a page at /, and endpoints as in docs/service.md.

    \b
    atman serve --model smollm2
    atman serve --model Qwen/Qwen3-8B --host 0.0.0.0 --token-file /run/secrets/atman
    """
    check_model_given(model, gguf)
    server = _server()
    settings_of = server.Settings
    token = server.read_token(token_file, host)
    name = name or kserve_name or (Path(gguf).stem if gguf else Path(model or "").name)
    if "/" in name or not name.strip():
        raise InputError(f"--name must be a name without '/', got {name!r}")
    with server.bound(host, port if kserve_port is None else kserve_port) as taken:
        _log(quiet)
        with warnings_as_messages(quiet):
            loaded, tokenizer = load(
                model, device=device, dtype=dtype, quiet=quiet, gguf_file=gguf, trust_remote_code=trust_remote_code
            )
            if _workers is not None and _workers > 1:
                say(f"Note: --workers {_workers}: one thread works on one model; start more processes for more")
            settings = settings_of(name=name, token=token, **limits)
            if not quiet:
                at, number = taken.getsockname()[:2]
                shown = f"[{at}]" if ":" in at else at
                say(f"Serving {name} on http://{shown}:{number}/ (Ctrl-C ends it)")
            if not server.serve(loaded, tokenizer, settings, taken):
                raise RuntimeError("the thread that works on requests ended; the log says why")


def _server() -> Any:
    try:
        from atman_kernels.serve import server
    except ImportError as error:
        raise InputError(f"{error.name} is not installed; run: pip install 'atman-kernels[serve]'") from error
    return server


def _log(quiet: bool) -> None:
    """One line per request on standard error; nothing of what it said."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("atman_kernels.serve", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.propagate = False
        logger.setLevel(logging.WARNING if quiet or name == "uvicorn.error" else logging.INFO)
