"""The service against the library and against itself, over HTTP on this machine, with SmolLM2-135M.

    python -m benchmarks.service --output benchmarks/results

1. One explanation through the service, in units of the same call of the library: what HTTP, the queue and JSON cost.
2. Eight requests at once, in units of eight in a row: about one passage, which they share, and about eight passages.
3. A prompt of some 200 tokens, streamed: seconds to the first token of the answer, and to the first unit; with all
   units exact, and with the search, as the page asks, whose first units are estimates.

Before anything is timed, each result is compared with the library's.
"""

import argparse
import json
import logging
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn

import atman_kernels as ak
from atman_kernels.serve.app import create_app
from atman_kernels.serve.server import configured
from atman_kernels.serve.settings import Settings
from benchmarks.machine import cpu_slug, environment

PASSAGE = (
    "The lighthouse on the northern cape was built in 1871 of grey granite from the island's own quarry. Its keeper, "
    "Anna Holm, lived there for thirty years with two dogs, Pilot and Skipper. In the winter of 1904 a Danish steamer "
    "ran onto the rocks below, and Pilot found the first of the eleven sailors who were saved. The lamp was lit with "
    "paraffin until 1932; today it is electric and nobody lives at the cape."
)
QUESTIONS = {
    "Of what was the lighthouse built?": " Grey granite",
    "Who was the keeper?": " Anna Holm",
    "What were the dogs called?": " Pilot and Skipper",
    "When did the steamer run onto the rocks?": " 1904",
    "How many sailors were saved?": " Eleven",
    "What was the lamp lit with?": " Paraffin",
    "Until when was it lit with paraffin?": " 1932",
    "Who lives at the cape today?": " Nobody",
}


def asked(passage: str, question: str, answer: str) -> dict[str, Any]:
    return {"prompt": f"{passage}\n\nQuestion: {question}\nAnswer:", "target": answer, "units": "word"}


def interleaved(rounds: int, **ways: Callable[[], Any]) -> dict[str, dict[str, float]]:
    """Median seconds of each way, tried in turn, after a round that does not count.

    Of the clock, and of this process's cores: where other processes take turns on them, the second is what is left.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began, cpu = time.perf_counter(), time.process_time()
            way()
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
            counts = "" if number else " (does not count)"
            print(f"{name}: {seconds:.2f} s, {cpu:.2f} s of cores{counts}", file=sys.stderr, flush=True)
            if number:
                taken[name].append((seconds, cpu))
    return {
        name: {"seconds": statistics.median(s for s, _ in each), "cpu_seconds": statistics.median(c for _, c in each)}
        for name, each in taken.items()
    }


def median_of(pairs: Iterable[tuple[float, float]]) -> dict[str, float]:
    seconds, cpu = zip(*pairs, strict=True)
    return {"seconds": statistics.median(seconds), "cpu_seconds": statistics.median(cpu)}


class Service:
    """A service in this process, and a client of it."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        settings = Settings(name="smollm2")
        self._server = uvicorn.Server(configured(create_app(model, tokenizer, settings), settings, port=0))
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600)
        self.pool = ThreadPoolExecutor(8)

    def explain(self, body: dict[str, Any]) -> dict[str, Any]:
        response = self.http.post("/v1/explanations", json=body)
        response.raise_for_status()
        return response.json()

    def in_a_row(self, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [self.explain(body) for body in bodies]

    def at_once(self, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return list(self.pool.map(self.explain, bodies))

    def first(self, body: dict[str, Any]) -> dict[str, tuple[float, float]]:
        """To the first event of each name: seconds, and those of this process's cores."""
        found: dict[str, tuple[float, float]] = {}
        began, cpu = time.perf_counter(), time.process_time()
        with self.http.stream("POST", "/v1/explanations", json={**body, "stream": True}) as response:
            for line in response.iter_lines():
                if line.startswith("event: "):
                    at = (time.perf_counter() - began, time.process_time() - cpu)
                    found.setdefault(line.removeprefix("event: "), at)
        return found

    def end(self) -> None:
        self.pool.shutdown()
        self._server.should_exit = True
        self._thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--words", type=int, default=72, help="of the passage: all it has, or its first ones")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", metavar="FOLDER", help="also write service-<processor>.json there")
    options = parser.parse_args()
    if options.output and not Path(options.output).is_dir():  # not after the minutes that it takes
        parser.error(f"--output: {options.output} is not a folder")
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    model, tokenizer = ak.load_model("smollm2")
    explainer = ak.Explainer(model, tokenizer, progress=False)
    service = Service(model, tokenizer)
    words = PASSAGE.split()[: options.words]
    shared = [asked(" ".join(words), question, answer) for question, answer in QUESTIONS.items()]
    turned = [" ".join(words[number * len(words) // 8 :] + words[: number * len(words) // 8]) for number in range(8)]
    apart = [asked(passage, *item) for passage, item in zip(turned, QUESTIONS.items(), strict=True)]
    try:
        one = shared[0]
        given = (one["prompt"], one["target"], one["units"])
        direct = explainer.explain(*given)
        found = torch.tensor(service.explain(one)["scores"])
        tolerance = 1e-3 if model.dtype == torch.float32 else 0.5
        assert float((found - direct.scores).abs().max()) < tolerance, "the service says something else"
        results: dict[str, Any] = {"tokens": len(tokenizer(one["prompt"])["input_ids"]), "units": len(direct.units)}
        results["one"] = interleaved(
            options.rounds, library=lambda: explainer.explain(*given), service=lambda: service.explain(one)
        )
        for name, bodies in (("one passage", shared), ("eight passages", apart)):
            results[name] = interleaved(
                max(1, options.rounds // 2),
                **{"in a row": lambda b=bodies: service.in_a_row(b), "at once": lambda b=bodies: service.at_once(b)},
            )
        message = f"{PASSAGE} {PASSAGE.partition('.')[0]}. Which dog found the sailors?"
        body = {"messages": [{"role": "user", "content": message}], "units": "word", "max_new_tokens": 16}
        given_answer = {"prompt": f"{PASSAGE} {PASSAGE}"[: int(len(PASSAGE) * 1.9)], "target": " The", "units": "word"}
        results["streamed tokens"] = len(tokenizer(given_answer["prompt"])["input_ids"])
        for name, depth in (("all exact", {}), ("exact=16", {"exact": 16})):
            for what, asking in (("own answer", body), ("answer given", given_answer)):
                firsts = [service.first(asking | depth) for _ in range(2 if depth else 1)]
                results[f"streamed, {what}, {name}"] = {
                    event: median_of(each[event] for each in firsts) for event in firsts[0]
                }
    finally:
        service.end()
    pairs = {
        "service / library": (results["one"]["service"], results["one"]["library"]),
        "in a row / at once, one passage": (results["one passage"]["in a row"], results["one passage"]["at once"]),
        "in a row / at once, eight passages": (
            results["eight passages"]["in a row"],
            results["eight passages"]["at once"],
        ),
    }
    results["ratios"] = {
        name: {clock: one[clock] / other[clock] for clock in ("seconds", "cpu_seconds")}
        for name, (one, other) in pairs.items()
    }
    results |= {"dtype": str(model.dtype), "environment": environment()}
    print(json.dumps(results, indent=2))
    if options.output:
        file = Path(options.output, f"service-{cpu_slug()}.json")
        file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
