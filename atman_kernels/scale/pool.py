"""`Pool`: the variants of one long prompt, split over workers."""

import os
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch

from atman_kernels import Ablation, Explainer, Explanation, arguments
from atman_kernels.errors import InputError
from atman_kernels.scale.cluster import Share, cluster
from atman_kernels.scale.crew import Crew, Died, Task
from atman_kernels.scale.options import model_name, sorted_options

# Log-probs of the unperturbed answer may differ so much between processes that run the same model.
NOISE = {"float64": 1e-6, "float32": 1e-2, "float16": 0.25, "bfloat16": 1.0}


class Pool:
    """Workers that each hold the model and explain one prompt together.

    A worker runs the whole prompt once, and then its share of the variants; shares have nearly the same number of
    suffix tokens. Scores are those of one `Explainer`. The prompt's own run is there once for every worker: of t tokens
    that are units each, t of about t² / 2 tokens.

    Args:
        model: hub id, folder, GGUF file or "smollm2", as `load_model` takes it; workers must find it where they run.
        workers: None: one for every GPU, else one.
        gpus_per_worker, cpus_per_worker, address: as in `explain_dataset`.
        options: of `load_model` and of `Explainer`, by name.

    Raises:
        InputError: an argument does not fit.
        ImportError: the extra `ray` is not installed; the message names it.

    Example:
        >>> with Pool("smollm2", workers=2) as pool:                                    # doctest: +SKIP
        ...     pool.explain(open("contract.txt").read(), " No", units="sentence").top(1)
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        workers: int | None = None,
        *,
        gpus_per_worker: float | None = None,
        cpus_per_worker: int | None = None,
        address: str | None = None,
        **options: Any,
    ) -> None:
        share = Share(workers, gpus_per_worker, cpus_per_worker)
        chosen = sorted_options(options, "token", Explainer.ablate)
        late = [name for name in options if name in chosen.asking]
        if late:
            raise InputError(f"{late[0]} is an option of Pool.explain, not of Pool")
        name = model_name(model)
        self._stack = ExitStack()
        self.settled = self._stack.enter_context(cluster(address, share, "Pool"))
        self._crew = Crew(self.settled, name, self.settled.placed(chosen.loading), chosen.explaining)
        self._stack.callback(self._crew.close)

    def explain(
        self, prompt: str | Sequence[dict[str, Any]], target: str | None = None, units: str = "token", **options: Any
    ) -> Explanation:
        """As `Explainer.explain`, with AtMan's method.

        Args:
            prompt: a text, or a list of chat messages.
            target: the answer; None: the model's own.
            units: "token" | "word" | "sentence" | "paragraph".
            options: of `Explainer.ablate`, by name: chat, include_target, max_new_tokens, language, recompute.

        Raises:
            InputError: an argument does not fit, or the workers do not compute the same.
            UnsupportedModelError: the model cannot be explained.
            RuntimeError: workers cannot start or die again and again, or the pool is closed.
        """
        chosen = sorted_options(options, units, Explainer.ablate)
        early = [name for name in options if name not in chosen.asking]
        if early:
            raise InputError(f"{early[0]} is an option of Pool, not of Pool.explain")
        if target is not None:
            arguments.text(target, "target", expected="a text or None")
        if self._crew.is_closed:
            raise RuntimeError("the pool is closed")
        started = time.perf_counter()
        number = self.settled.workers
        waiting = [Task("share", (i, number, prompt, target, chosen.asking)) for i in range(number)]
        found: dict[int, tuple[list[int], Ablation]] = {}
        for task, outcome in self._crew.run(lambda: waiting.pop(0) if waiting else None):
            if isinstance(outcome, Died):
                raise RuntimeError(f"{task.deaths} workers died of the same share of the variants: {outcome.reason}")
            indices, ablation, messages = outcome
            for message in messages:
                warnings.warn(message, stacklevel=2)
            found[task.arguments[0]] = indices, ablation
        shares = [found[i] for i in range(number)]
        _check_agree([ablation for _, ablation in shares])
        return _joined(shares, time.perf_counter() - started)

    def close(self) -> None:
        """Ends the workers, and Ray if the pool started it."""
        self._stack.close()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


def _check_agree(ablations: list[Ablation]) -> None:
    """Raises InputError if processes saw different questions or compute different things."""
    first = ablations[0]
    for other in ablations[1:]:
        for name in ("prompt", "target", "target_tokens", "units"):
            if getattr(other, name) != getattr(first, name):
                raise InputError(
                    f"workers disagree on the {name}: {getattr(first, name)!r:.200} and {getattr(other, name)!r:.200}; "
                    "where the answer is the model's own, give it as target"
                )
        apart = float((other.base_logprobs - first.base_logprobs).abs().max())
        if apart > NOISE.get(first.settings["dtype"], 1.0):
            raise InputError(f"workers disagree on the answer's log-probabilities, by {apart:.2g}: their models differ")


def _joined(shares: list[tuple[list[int], Ablation]], seconds: float) -> Explanation:
    """Every share's scores in their places; each against its own process's unperturbed run."""
    first = shares[0][1]
    scores = torch.zeros(len(first.units), len(first.target_tokens), dtype=torch.float32, device="cpu")
    for indices, ablation in shares:
        scores[indices] = ablation.rises[: len(indices)]
    every = [ablation.stats for _, ablation in shares]
    stats: dict[str, Any] = {
        "seconds": seconds,
        "answering_seconds": max(each["answering_seconds"] for each in every),
        "questions": 1,
        "workers": len(shares),
    }
    settings = {"method": "atman", **first.settings}
    stats |= {name: sum(each[name] for each in every) for name in ("tokens_through_model", "forwards", "variants")}
    return Explanation(
        prompt=first.prompt,
        target=first.target,
        units=first.units,
        scores=scores,
        target_tokens=first.target_tokens,
        base_logprobs=first.base_logprobs,
        recompute=settings.pop("recompute", None),  # an ablation has it there
        settings=settings,
        stats=stats | {"token_budget": max(each["token_budget"] for each in every)},
    )
