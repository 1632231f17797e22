"""What is measured: each method as something that can be done in part, with what a part costs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

import atman_kernels as ak
from atman_kernels.explain.methods import attention, gradients
from atman_kernels.explain.methods.attnlrp import attnlrp
from atman_kernels.inputs.text_generation import CausalObjective, ask
from benchmarks.peers import DenseEager
from benchmarks.prompts import Case, sample_positions
from benchmarks.scaling.models import text, tokenizer

IG_STEPS = 32
FACTOR = 0.1
MODE = "log_additive"
BACKWARD = 2  # forwards that a backward pass costs


@dataclass(frozen=True)
class Work:
    """A method on one prompt.

    Attributes:
        total: units (IG: steps) that the whole takes; 1 where it is all or nothing.
        run: does some number of them, and returns what is worth keeping.
        cost: of some number of them, in any measure that time is proportional to.
        fixed: whether `run` also has a part that does not grow, which `run(1)` is nearly all of.
    """

    total: int
    run: Callable[[int], dict[str, Any]]
    cost: Callable[[int], float]
    fixed: bool = False


def case_of(tokens: int, target_tokens: int, device: str) -> Case:
    target = " " + text(target_tokens, seed=2)
    case = Case.tokenize(tokenizer(), text(tokens, seed=1), target, "random words")
    return replace(case, ids=case.ids.to(device))


def prepare(method: str, model: Any, case: Case, token_budget: int | None) -> Work:
    """The work of a method of `METHODS`."""
    makers: dict[str, Callable[[], Work]] = {
        "plain": lambda: _whole(partial(_plain, model, case)),
        "naive": lambda: _naive(model, case),
        "ours": lambda: _ours(model, case, token_budget),
        "chefer": lambda: _whole(partial(attention.chefer, model, _question(model, case))),
        "integrated_gradients": lambda: _integrated_gradients(model, case),
        "attnlrp": lambda: _whole(partial(attnlrp, model, _question(model, case))),
        "attnlrp_checkpointed": lambda: _whole(partial(attnlrp, model, _question(model, case), checkpointing=True)),
    }
    return makers[method]()


METHODS = ("plain", "naive", "ours", "chefer", "integrated_gradients", "attnlrp", "attnlrp_checkpointed")


def _whole(run: Callable[[], Any]) -> Work:
    def once(count: int) -> dict[str, Any]:
        run()
        return {}

    return Work(1, once, lambda count: 1.0)


@torch.inference_mode()
def _plain(model: Any, case: Case) -> None:
    model(case.inputs[None], use_cache=False, logits_to_keep=len(case.target_ids))


def _naive(model: Any, case: Case) -> Work:
    """Full recomputation, one variant per forward, eager attention with dense factors, logits of every row."""
    eager = DenseEager(model, FACTOR, MODE, batch=1, full_logits=True)

    def run(count: int) -> dict[str, Any]:
        eager.scores(case, sample_positions(case, count))
        return {}

    return Work(case.prompt_tokens, run, lambda count: count + 1.0)  # the base run is a forward as well


def _ours(model: Any, case: Case, token_budget: int | None) -> Work:
    explainer = ak.Explainer(model, tokenizer(), mode=MODE, factor=FACTOR, token_budget=token_budget, progress=False)
    length = len(case.inputs)

    def positions(count: int) -> list[int]:  # of one, the last: it leaves the fixed part alone
        return [case.prompt_tokens - 1] if count == 1 else sample_positions(case, count)

    def run(count: int) -> dict[str, Any]:
        spans = [case.spans[position] for position in positions(count)]
        explanation = explainer.explain(case.prompt, target=case.target, units=spans)
        kept = {name: explanation.stats[name] for name in ("forwards", "tokens_through_model", "token_budget")}
        return kept | {"path": explanation.settings["path"]}

    def cost(count: int) -> float:
        return float(sum(length - position for position in positions(count)))

    return Work(case.prompt_tokens, run, cost, fixed=True)


def _integrated_gradients(model: Any, case: Case) -> Work:
    question = _question(model, case)

    def run(steps: int) -> dict[str, Any]:
        return gradients.integrated_gradients(model, question, steps=steps, batch=1).stats

    per_step = 1 + BACKWARD * len(case.target_ids)
    return Work(IG_STEPS, run, lambda steps: float(per_step * steps + 2))  # log-probs of both ends at last


def _question(model: Any, case: Case) -> CausalObjective:
    return ask(
        model, tokenizer(), case.prompt, case.target, "token",
        include_target=False, chat=False, max_new_tokens=1, language="en",
    )  # fmt: skip
