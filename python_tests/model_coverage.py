"""Which families of transformers this package serves, and how exactly: a table written by running them all.

    python python_tests/model_coverage.py            runs all, writes docs/coverage.json and coverage.md
    python python_tests/model_coverage.py llama mpt  runs some families and prints what came out

One function per kind of model in `KINDS` says which families there are and how one of them is checked.
"""

import argparse
import gc
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import eager_oracle
import softmax_oracle
import tiny_configs
import tiny_models
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import atman_kernels as ak
from atman_kernels.hf import families

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN, END = "<!-- written by python_tests/model_coverage.py: begin -->", "<!-- end -->"
MODES = ("log_additive", "multiplicative", "shifted")
EXACT = 1e-3  # nats; float32 models of random weights, some of them ill-conditioned
STATES = ("packed", "batched", "refused", "not built", "wrong")


@dataclass(frozen=True)
class Result:
    """What came of one family.

    Attributes:
        kind: of model, a key of `KINDS`.
        family: transformers' model_type.
        model: the class.
        state: one of `STATES`.
        difference: largest one between an explanation's scores and the oracle's over all modes, in nats.
        size: largest score of the oracle, to hold the difference against.
        remark: the reason, or what is special.
    """

    kind: str
    family: str
    model: str
    state: str
    difference: float | None = None
    size: float | None = None
    remark: str = ""


# --- text decoders ---


def text_decoders(only: set[str]) -> Iterator[Result]:
    """Every entry of transformers' mapping for causal language models, asked about a text."""
    seen = set()
    for kind, found in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        model_class = found[0] if isinstance(found, tuple) else found
        if (only and kind.model_type not in only) or (kind, model_class) in seen:
            continue
        seen.add((kind, model_class))
        yield text_decoder(kind, model_class)


def text_decoder(kind: type[PreTrainedConfig], model_class: type[PreTrainedModel]) -> Result:
    name = ("text decoder", kind.model_type, model_class.__name__)
    try:
        model = tiny_configs.tiny_model(kind, model_class)
        ids = torch.tensor(_draw(11, 1) + _draw(2, 2))
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits
    except Exception as error:  # whatever a family's code has against tiny sizes
        return Result(*name, "not built", remark=_line(error))
    if not bool(logits.isfinite().all()):
        return Result(*name, "not built", remark="random weights give no finite logits")
    try:
        return _compared(name, model, ids, len(ids) - 2)
    except ak.UnsupportedModelError as error:
        return Result(*name, "refused", remark=_reason(str(error)))
    except Exception as error:
        return Result(*name, "wrong", remark=f"{type(error).__name__}: {_line(error)}")


def _compared(name: tuple[str, str, str], model: PreTrainedModel, ids: torch.Tensor, n: int) -> Result:
    """One explanation per mode, held against one full forward of transformers' own attention per score."""
    rows = torch.ones(n, len(ids))
    rows.fill_diagonal_(0.1)
    prompt, answer = (tiny_models.text_of(part) for part in (ids[:n].tolist(), ids[n:].tolist()))
    difference, size, paths, remarks = 0.0, 0.0, set(), []
    shifted = model.config.model_type in SHIFTED
    if shifted:
        remarks.append("multiplicative mode not compared: the eager code shifts scores before softmax")
    for mode in MODES:
        if shifted and mode == "multiplicative":
            continue
        explainer = ak.Explainer(model, tiny_models.tokenizer(), mode=mode, progress=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            explanation = explainer.explain(prompt, answer)
        paths.add(explanation.settings["path"])
        if explainer.runner.unpackable:
            remarks.append(explainer.runner.unpackable)
        oracle = eager_oracle if model.config.model_type in SCORES_ELSEWHERE else softmax_oracle
        expected = oracle.leave_one_out(model, ids, n, rows, mode)
        difference = max(difference, float((explanation.scores.double() - expected).abs().max()))
        size = max(size, float(expected.abs().max()))
    if families.families_in(model.get_decoder()):
        remarks.append("attention taken over inside its modules")
    state = "batched" if "batched" in paths else "packed"
    if not difference <= EXACT:
        state = "wrong"
    return Result(*name, state, difference, size, "; ".join(dict.fromkeys(remarks)))


# Families whose eager attention takes the row's maximum off before softmax, or works its sinks out from the scores
# beside it: what softmax sees is not what the formula speaks of. An attention function of the tests' own serves them.
SCORES_ELSEWHERE = {"gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash"}

# the same, where that function will not do either, since indexers speak to transformers' own only
SHIFTED = {"hy_v4"}


def _draw(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, tiny_models.VOCABULARY, (count,), generator=generator).tolist()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


def _reason(message: str) -> str:
    """Without the class's name, which stands beside it."""
    return message.split(": ", 1)[-1] if "cannot be" in message.split(": ", 1)[0] else message


# each yields the results of its families; `only` names some of them, empty for all
KINDS: dict[str, Callable[[set[str]], Iterator[Result]]] = {"text decoder": text_decoders}


# --- the table ---


def markdown(results: list[Result]) -> str:
    lines = [BEGIN, ""]
    for kind in KINDS:
        own = sorted((r for r in results if r.kind == kind), key=lambda r: (STATES.index(r.state), r.family))
        counts = ", ".join(f"{sum(r.state == s for r in own)} {s}" for s in STATES if any(r.state == s for r in own))
        lines += [f"### {kind.capitalize()}s", "", f"transformers {transformers.__version__}: {counts}.", ""]
        lines += [
            "| family | class | state | largest difference | largest score | remark |",
            "|---|---|---|---|---|---|",
        ]
        lines += [_row(r) for r in own] + [""]
    return "\n".join([*lines, END])


def _row(r: Result) -> str:
    numbers = ["" if x is None else f"{x:.1e}" if i == 0 else f"{x:.2g}" for i, x in enumerate((r.difference, r.size))]
    remark = r.remark.replace("|", "\\|").replace("<", "&lt;")
    return f"| {r.family} | {r.model} | {r.state} | {numbers[0]} | {numbers[1]} | {remark} |"


def write(results: list[Result]) -> None:
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    record = {"versions": versions, "results": [asdict(r) for r in results]}
    (DOCS / "coverage.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    page = DOCS / "coverage.md"
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    page.write_text(before + markdown(results) + rest.split(END, 1)[1], encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="model types; all if none is named")
    wanted = set(parser.parse_args().families)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    results = []
    for kind, check in KINDS.items():
        started = time.perf_counter()
        for result in check(wanted):
            results.append(result)
            print(f"{kind}  {_row(result)}", flush=True)
            gc.collect()
        print(f"{kind}: {time.perf_counter() - started:.0f} s", flush=True)
    if not wanted:
        write(results)
    return int(any(r.state == "wrong" for r in results))


if __name__ == "__main__":
    sys.exit(main())
