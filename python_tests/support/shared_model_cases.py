"""What is asked of a model that is shared among ranks, and of the same model in one process."""

import ast
import os
import re
import warnings
from typing import Any

import torch
import transformers as hf
from tiny_models import COMMON, WINDOW, build, text_of, tokenizer

import atman_kernels as ak
from atman_kernels.explain import methods

PROMPT, OTHER = text_of([*range(3, 25)]), text_of([4, 9, *range(30, 44)])
LONG = text_of([3 + i % 40 for i in range(90)])  # more units than are all exact, beside those at its end
IDS = torch.arange(3, 20)[None]
TENSOR, PIPELINE = {"tp_size": 2}, {"pp_size": 2}
HEADS: dict[str, Any] = {**COMMON, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}


def made(name: str) -> hf.PreTrainedModel:
    """A tiny model whose vocabulary two and three ranks divide; see `_made`."""
    torch.manual_seed(0)
    model = _made(name)
    model.resize_token_embeddings(96, mean_resizing=False)
    return model


def _made(name: str) -> hf.PreTrainedModel:
    """One of `tiny_models`, or one with sinks that transformers' plan shards, with 6 heads, or with one layer."""
    if name == "granite_swa":
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        options: dict[str, Any] = {**COMMON, "num_key_value_heads": 2, "sliding_window": WINDOW, "layer_types": kinds}
        model = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(name, **options))
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks)
        return model.eval()
    if name == "six_heads":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**HEADS)).eval()
    if name == "one_layer":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**{**COMMON, "num_hidden_layers": 1})).eval()
    return build(name)


def loaded(folder: Any, sharding: dict[str, Any] | None = None, dtype: str = "float32") -> hf.PreTrainedModel:
    """A saved model, sharded if it is said how."""
    options: dict[str, Any] = {"distributed_config": hf.DistributedConfig(**sharding)} if sharding else {}
    return hf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def explainer_of(model: Any, **options: Any) -> ak.Explainer:
    return ak.Explainer(model, tokenizer(), progress=False, **options)


def answers(model: Any, heads: int) -> dict[str, Any]:
    """Everything that is served, as tensors and texts; a warning would be a fallback."""
    explainer = explainer_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        one = explainer.explain(PROMPT, " w5 w6")
        both = explainer.explain_batch([PROMPT, OTHER], [" w5", None], units="word", max_new_tokens=3)
        found, long = explainer.explain(LONG, " w5 w6", exact=3), explainer.explain(LONG, " w5 w6")
        similar = explainer_of(model, similarity_threshold=0.3).explain(PROMPT, " w5")
        shapley = explainer.explain(OTHER, " w7", method="shapley", permutations=4)
        halves = explainer.ablate(PROMPT, " w5", masks=lambda units: torch.arange(len(units))[None] % 2 == 0)
    scores = {"one": one.scores, "similar": similar.scores, "shapley": shapley.scores, "ablated": halves.logprobs}
    scores |= {"batch": both[0].scores, "own": both[1].scores, "long": long.scores}
    scores["search"] = (found.scores - long.scores)[torch.tensor(found.exact)].abs().max()  # exact is exact
    texts = {"path": one.settings["path"], "answer": both[1].target}
    if getattr(model, "_pp_stage", None) is None:  # a pipeline has no gradients to search by
        texts |= {"hints": found.settings["hints"], "exact": str(found.exact)}
        scores["estimates"] = found.scores
    return scores | texts | suppressions(model, heads)


def suppressions(model: Any, heads: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    by_head, by_token = (torch.rand(1, *shape, 17, generator=draw) for shape in ((heads,), ()))
    found: dict[str, Any] = {}
    with torch.no_grad():
        with ak.suppress(model, by_token):
            found["by token"] = model(IDS).logits
        with ak.suppress(model, by_head, mode="shifted"):
            found["by head"] = model(IDS).logits
        with ak.suppress(model, {2: by_head}, value_factor=by_head):
            found["values by head"] = model(IDS).logits
            cache = {"use_cache": getattr(model, "_pp_stage", None) is None}  # False is asked for in a pipeline
            found["generated"] = str(model.generate(IDS, max_new_tokens=4, do_sample=False, **cache).tolist())
    with ak.steer(model, tokenizer(), PROMPT, {"w5": 0.0}) as steered:
        found["steered"] = str(steered.generate(max_new_tokens=4, do_sample=False))
    return found


def by_method(model: Any) -> dict[str, Any]:
    """Scores of every method, or why there are none."""
    found: dict[str, Any] = {}
    explainer = explainer_of(model)
    few: dict[str, dict[str, Any]] = {"shapley": {"permutations": 4}, "lasso": {"samples": 40}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in (each for each in methods.names() if each not in methods.WITH_FILES):
            try:
                found[name] = explainer.explain(OTHER, " w5", method=name, **few.get(name, {})).scores
            except ak.UnsupportedModelError as error:
                found[name] = str(error)
    return found


def error_of(call: Any) -> str:
    """The error that a call ends with."""
    try:
        call()
    except (ak.InputError, ak.UnsupportedModelError, ak.RankError, ak.Cancelled, MemoryError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def two_ranks(folders: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, sharding in (("llama", TENSOR), ("granite_swa", TENSOR), ("gpt_oss", PIPELINE), ("gemma2", PIPELINE)):
        if name in folders:
            found[f"{name} {sharding}"] = answers(loaded(folders[name], sharding), 4)
    for sharding in (TENSOR, PIPELINE):
        found[f"methods {sharding}"] = by_method(loaded(folders["llama"], sharding))
        found[f"bfloat16 {sharding}"] = in_16_bits(loaded(folders["gpt_oss"], sharding, "bfloat16"))
    found["heads"] = heads_that_do_not_divide(folders["six_heads"])
    found["layers"] = error_of(lambda: explainer_of(loaded(folders["one_layer"], PIPELINE)))
    found["cache"] = error_of(lambda: suppress_and_run(loaded(folders["llama"], PIPELINE), torch.ones(1, 17), True))
    found["differences"] = differences(loaded(folders["llama"], TENSOR))
    found["lost"] = out_of_memory_on_one(loaded(folders["llama"], TENSOR))  # after which nothing goes
    return found


def in_16_bits(model: Any) -> torch.Tensor:
    return explainer_of(model).explain(PROMPT, " w5 w6").scores


def heads_that_do_not_divide(folder: str) -> dict[str, Any]:
    said = error_of(lambda: explainer_of(loaded(folder, TENSOR)))
    plan = re.search(r"tp_plan=(\{.*\})", said)
    if plan is None:
        return {"said": said}
    model = loaded(folder, TENSOR | {"tp_plan": ast.literal_eval(plan[1])})
    return {"said": said, "scores": explainer_of(model).explain(PROMPT, " w5 w6").scores} | suppressions(model, 6)


def differences(model: Any) -> dict[str, Any]:
    """What ranks do that is not the same."""
    first = int(os.environ["RANK"]) == 0
    explainer = explainer_of(model)

    def stop(done: int, total: int) -> None:
        if first and done:
            raise ak.Cancelled("enough")

    def suppress(factor: torch.Tensor, **options: Any) -> None:
        with ak.suppress(model, factor, **options):
            pass

    found: dict[str, Any] = {
        "prompt": error_of(lambda: explainer.explain(PROMPT if first else OTHER, " w5")),
        "target": error_of(lambda: explainer.explain_batch([PROMPT, OTHER], [" w5", " w6" if first else None])),
        "settings": error_of(lambda: explainer_of(model, factor=0.5 if first else 0).explain(PROMPT, " w5")),
        "calls": error_of(lambda: (explainer.explain if first else explainer.explain_batch)(PROMPT, " w5")),
        "empty": error_of(lambda: explainer.explain("" if first else PROMPT, " w5")),
        "cancelled": error_of(lambda: ak.Explainer(model, tokenizer(), progress=stop).explain(PROMPT, " w5")),
        "factor": error_of(lambda: suppress(torch.full((1, 17), 0.5 if first else 0.0))),
        "mode": error_of(lambda: suppress(torch.ones(1, 17), mode="none" if first else "shifted")),
        "heads": error_of(lambda: suppress_and_run(model, torch.ones(1, 2, 17))),
    }
    budget = explainer_of(model, token_budget=60 if first else 1000)
    explained = budget.explain(PROMPT, " w5 w6")
    found |= {"bar": ak.Explainer(model, tokenizer()).runner.progress}
    return found | {"budget": explained.stats["token_budget"], "scores": explained.scores}


def suppress_and_run(model: Any, factor: torch.Tensor, with_cache: bool = False) -> None:
    with torch.no_grad(), ak.suppress(model, factor):
        model.generate(IDS, max_new_tokens=2) if with_cache else model(IDS)


def out_of_memory_on_one(model: Any) -> dict[str, Any]:
    """In the middle of a forward of packs, on the second rank; what both say, and what comes of a further call."""
    explainer = explainer_of(model)
    if int(os.environ["RANK"]) == 1:
        count: list[int] = []
        module, own = model.model.layers[1].mlp, model.model.layers[1].mlp.forward

        def fails(*args: Any) -> Any:
            count.append(1)
            if len(count) == 4:
                raise torch.OutOfMemoryError("tried to allocate 9 GiB")
            return own(*args)

        module.forward = fails
    causes: list[BaseException | None] = []

    def explain() -> None:
        try:
            explainer.explain(PROMPT, " w5 w6")
        except (MemoryError, ak.RankError) as error:
            causes.append(error.__cause__)
            raise

    said = error_of(explain)
    return {"said": said, "cause": str(causes[0]), "again": error_of(explain)}


def three_ranks(folders: dict[str, str]) -> dict[str, Any]:
    found = {f"six_heads {s}": answers(loaded(folders["six_heads"], s), 6) for s in ({"tp_size": 3}, {"pp_size": 3})}
    return found | {"killed": killed(loaded(folders["six_heads"], {"tp_size": 3}))}


def killed(model: Any) -> str:
    """One rank dies between two forwards; the others say so."""

    def die(done: int, total: int) -> None:
        if os.environ["RANK"] == "2" and done:
            os._exit(9)

    return error_of(lambda: ak.Explainer(model, tokenizer(), progress=die).explain(PROMPT, " w5"))


def real_weights(folder: str, plan: dict[str, str] | None) -> dict[str, Any]:
    model = loaded(folder, {"tp_size": int(os.environ["WORLD_SIZE"]), "tp_plan": plan})
    return smollm2_answers(model, hf.AutoTokenizer.from_pretrained(folder))


def smollm2_answers(model: Any, its_tokenizer: Any) -> dict[str, Any]:
    explainer = ak.Explainer(model, its_tokenizer, progress=False)
    prompt = "The lighthouse keeper had a grey dog named Pilot. Question: What is the name of the dog? Answer:"
    one = explainer.explain(prompt, " Pilot.")
    own = explainer.explain(prompt, units="word", exact=4, max_new_tokens=6)
    factor = torch.rand(1, 9, 12, generator=torch.Generator().manual_seed(0))
    ids = its_tokenizer(prompt, return_tensors="pt").input_ids[:, :12]
    with torch.no_grad(), ak.suppress(model, factor):
        logits = model(ids).logits.log_softmax(-1)
    texts = {"path": one.settings["path"], "answer": own.target, "exact": str(own.exact)}
    return {"one": one.scores, "own": own.scores, "by head": logits} | texts
