"""Processes that share a model over gloo: started once, for many cases."""

import io
import multiprocessing
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

Program = Callable[..., dict[str, Any]]
PRELOADED = [
    "transformers.models.llama.modeling_llama",
    "transformers.distributed.tensor_parallel",
    "atman_kernels.explain.explainer",
]
NOTHING = {"ended": "without a result"}


def run_ranks(size: int, program: Program, *arguments: Any, seconds: float = 240) -> list[dict[str, Any]]:
    """What `program(*arguments)`, a function of a module, returns on each of so many ranks.

    A rank that ends by an exception gives {"failed": its traceback}, one that just ends `NOTHING`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    answers, port = context.Queue(), _free_port()
    processes = [context.Process(target=_rank, args=(program, r, size, port, answers, arguments)) for r in range(size)]
    for process in processes:
        process.start()
    found: dict[int, dict[str, Any]] = {}
    end = time.monotonic() + seconds
    while len(found) < size and time.monotonic() < end:
        try:
            rank, answer = answers.get(timeout=0.2)
            found[rank] = torch.load(io.BytesIO(answer), weights_only=True)
        except queue.Empty:
            if not any(process.is_alive() for process in processes):
                break
    for process in processes:
        process.join(timeout=10)
        if process.is_alive():
            process.kill()
    return [found.get(rank, NOTHING) for rank in range(size)]


def _rank(program: Program, rank: int, size: int, port: int, answers: Any, arguments: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        answer = program(*arguments)
    except BaseException as error:
        answer = {"failed": "".join(traceback.format_exception(error))}
    written = io.BytesIO()
    torch.save(answer, written)
    answers.put((rank, written.getvalue()))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
