"""Runs the application on a socket, and ends it in good order when the process is asked to."""

import logging
import signal
import socket
from typing import Any

import uvicorn

from atman_kernels.errors import InputError
from atman_kernels.serve.app import create_app
from atman_kernels.serve.connections import Connection
from atman_kernels.serve.guard import is_loopback
from atman_kernels.serve.settings import Settings

LAST_WORDS = 5.0  # seconds after the grace period for responses that say so
TOKEN = 16  # characters of the shortest token


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address, before anything costly is begun.

    Raises:
        InputError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host.strip("[]"), port))
    except (OSError, OverflowError) as error:
        taken.close()
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--host {host} --port {port} cannot be used: {reason}") from error
    return taken


def read_token(path: str | None, host: str) -> str | None:
    """The token in a file: its first line.

    Raises:
        InputError: it cannot be read or is too short; or there is none, where others can reach the service.
    """
    if path is None:
        if not is_loopback(host):
            raise InputError(
                f"--host {host} can be reached from elsewhere: give --token-file FILE, a file with a secret word of at "
                f"least {TOKEN} characters that requests must show, as of: openssl rand -hex 32"
            )
        return None
    try:
        with open(path, encoding="ascii") as file:
            token = file.readline(4096).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--token-file {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(token) < TOKEN or not token.isprintable() or " " in token:
        raise InputError(f"--token-file {path}: its first line must be one word of at least {TOKEN} characters")
    return token


def serve(model: Any, tokenizer: Any, settings: Settings, taken: socket.socket) -> bool:
    """Serves until the process is asked to end; whether that was why it ended.

    Args:
        model, tokenizer, settings: see `create_app`.
        taken: the socket to listen on.
    """
    server = _Server()
    app = create_app(model, tokenizer, settings, on_end=server.end)
    server.prepare(app, settings)
    server.run(sockets=[taken])
    return server.was_asked


def configured(app: Any, settings: Settings, **more: Any) -> uvicorn.Config:
    """How uvicorn serves an application of `create_app`; `more` are further options of uvicorn's."""
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        access_log=False,  # ours knows more, and nothing that was asked
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=int(settings.grace + LAST_WORDS),
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=64 << 10,
        **more,
    )


class _Server(uvicorn.Server):
    """uvicorn's, which lets the model's thread know first; a second signal ends it at once."""

    was_asked = False

    def __init__(self) -> None:
        self.app: Any = None

    def prepare(self, app: Any, settings: Settings) -> None:
        self.app = app
        super().__init__(configured(app, settings))

    def end(self) -> None:
        """The model's thread has ended, so there is nothing left to do."""
        self.should_exit = True

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        if not self.should_exit:
            logging.getLogger("atman_kernels.serve").info("ending: no new requests are taken")
        self.was_asked = self.should_exit = True
        self.app.state.service.worker.drain(self.app.state.service.settings.grace)
