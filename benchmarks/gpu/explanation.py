"""A whole explanation on a GPU: every token of a prompt scored exactly, by a Llama with random weights.

    python -m benchmarks.gpu.explanation                              # 8 billion parameters, 1024 tokens
    python -m benchmarks.gpu.explanation --preset tiny --device cpu   # see that it runs

Random weights cost what trained ones do, and need no download. The scores of some spans are compared with a full
recomputation in float32 first; only if they agree is a time reported. Then the strongest units alone are searched for,
and direct effects explained, which take less.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import atman_kernels as ak
from atman_kernels import backends
from benchmarks.gpu.__main__ import FAILED, NOTHING_RUN, PASSED, missing_gpu
from benchmarks.gpu.results import write_json
from benchmarks.gpu.timing import Stopwatch
from benchmarks.machine import RESULTS, cpu_slug, environment, gpu_environment, gpu_slug
from benchmarks.measure import explanation_flops, layer_linears, linear_flops

FACTOR = 0.1
TARGET_TOKENS = 4
WARM_UP_UNITS = 8
RECOMPUTED_BATCH = 16  # rows per forward of the full recomputation
SHORTER = {"exact": 16, "recompute": 1}  # what may be asked for instead of every score exactly

Span = tuple[int, int]


@dataclass(frozen=True)
class Preset:
    prompt_tokens: int
    config: dict[str, Any]  # of LlamaConfig


PRESETS = {
    "8b": Preset(
        1024,
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
        },
    ),
    "1b": Preset(
        1024,
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
        },
    ),
    "tiny": Preset(
        24,
        {
            "vocab_size": 300,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.3,  # of the usual 0.02 so narrow a model would not see what is suppressed
        },
    ),
}


@dataclass(frozen=True, eq=False)
class Question:
    """A prompt of random words, each one token, and a target."""

    prompt: str
    target: str
    ids: Tensor  # (n + m,)
    prompt_tokens: int

    @property
    def inputs(self) -> Tensor:
        return self.ids[:-1]

    @property
    def target_ids(self) -> Tensor:
        return self.ids[self.prompt_tokens :]

    def span(self, first: int, last: int) -> Span:
        """Characters of the tokens first … last - 1."""
        words = self.prompt.split(" ")
        start = sum(len(word) + 1 for word in words[:first])
        return start, start + len(" ".join(words[first:last]))

    @classmethod
    def random(cls, tokens: int, vocabulary: int, device: torch.device) -> "Question":
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, vocabulary, (tokens + TARGET_TOKENS,), generator=generator)
        words = [f"w{i}" for i in ids.tolist()]
        return cls(" ".join(words[:tokens]), " " + " ".join(words[tokens:]), ids.to(device), tokens)


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Word "w17" is token 17."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def random_model(preset: Preset, dtype: torch.dtype, device: torch.device) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**preset.config, bos_token_id=None, eos_token_id=None)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


# Correctness ----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def recomputed_scores(model: Any, question: Question, spans: list[tuple[int, int]]) -> Tensor:
    """(K, m) by whole rows through the model's own attention with a float bias, the base among them."""
    length = len(question.inputs)
    bias = torch.full((length, length), -torch.inf, device=model.device).triu(1).repeat(len(spans) + 1, 1, 1, 1)
    for row, (first, last) in zip(bias[1:], spans, strict=True):
        row[..., first:last] += torch.tensor(FACTOR).log()
    rows = torch.arange(question.prompt_tokens - 1, length, device=model.device)
    ids = question.inputs.expand(len(bias), -1)
    logits = model(ids, attention_mask=bias.to(model.dtype), use_cache=False, logits_to_keep=rows).logits.float()
    wanted = question.target_ids.expand(len(bias), -1)[..., None]
    log_probs = logits.log_softmax(dim=-1).gather(-1, wanted)[..., 0].cpu()
    return log_probs[:1] - log_probs[1:]


def agreement(model: Any, explainer: ak.Explainer, question: Question) -> dict[str, Any]:
    """Scores of long spans, which matter, and of single tokens; the recomputation's own error says what is rounding."""
    n = question.prompt_tokens
    spans = [(0, n // 2), (n // 4, n // 2), (n // 2, n), (n - 1, n), (n // 3, n // 3 + 1)]
    ours = explainer.explain(question.prompt, question.target, [question.span(*span) for span in spans])
    plain = recomputed_scores(model, question, spans)
    wide = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
    exact = recomputed_scores(wide, question, spans)
    noise = float((plain - exact).abs().max())
    allowed = 1e-3 if model.dtype == torch.float32 else 3 * noise + 0.01
    error = float((ours.scores - exact).abs().max())
    largest = float(exact.abs().max())
    objection = None
    if ours.settings["path"] != "packed":
        objection = f"the explainer went the {ours.settings['path']} way, not the packed one"
    elif not error <= allowed:
        objection = f"scores are off by up to {error:.2g} where rounding explains {allowed:.2g}"
    elif not allowed < largest:
        objection = f"all scores are below {largest:.2g}: zeros would pass this check, within {allowed:.2g}"
    return {
        "largest_error": error,
        "allowed_error": allowed,
        "recomputation_error": noise,
        "largest_score": largest,
        "path": ours.settings["path"],
        "right": objection is None,
        "objection": objection,
    }


# Measurement ----------------------------------------------------------------------------------------------------


@dataclass
class AttentionCalls:
    """What passed through our attention function."""

    events: list[tuple[Any, Any]]  # CUDA events before and after each call
    largest: int = 0  # rows of the largest forward

    @property
    def seconds(self) -> float:
        return sum(before.elapsed_time(after) for before, after in self.events) / 1e3


@contextmanager
def attention_calls(cuda: bool) -> Iterator[AttentionCalls]:
    calls, name = AttentionCalls([]), "atman"
    attend = ALL_ATTENTION_FUNCTIONS[name]

    def recorded(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.largest = max(calls.largest, query.shape[0] * query.shape[2])
        if not cuda:
            return attend(module, query, *args, **kwargs)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        result = attend(module, query, *args, **kwargs)
        after.record()
        calls.events.append((before, after))
        return result

    ALL_ATTENTION_FUNCTIONS[name] = recorded  # a local entry, which shadows the registered one
    try:
        yield calls
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]


@dataclass
class Bench:
    """One model and question, with the explainer that is measured."""

    model: Any
    explainer: ak.Explainer
    question: Question
    stopwatch: Stopwatch

    @property
    def cuda(self) -> bool:
        return self.stopwatch.cuda

    def round(self, **depth: Any) -> dict[str, Any]:
        """One explanation of every token; `depth` as `Explainer.explain` takes it."""
        self._synchronize()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        with attention_calls(self.cuda) as attention:
            explanation = self.explainer.explain(self.question.prompt, self.question.target, **depth)
            self._synchronize()
        seconds = time.perf_counter() - started
        assert len(explanation.units) == self.question.prompt_tokens
        tokens = explanation.stats["tokens_through_model"]
        flops = explanation_flops(self.model, self.question, tokens)
        return {
            "seconds": seconds,
            "tokens_through_model": tokens,
            "forwards": explanation.stats["forwards"],
            "token_budget": explanation.stats["token_budget"],
            "path": explanation.settings["path"],
            "flops": flops,
            "tflops_per_second": flops / seconds / 1e12,
            "largest_forward": attention.largest,
            "attention_share": attention.seconds / seconds if self.cuda else None,
            "peak_bytes": torch.cuda.max_memory_allocated() if self.cuda else None,
        }

    def warm_up(self) -> None:
        """Compile what there is to compile."""
        step = max(1, self.question.prompt_tokens // WARM_UP_UNITS)
        spans = [self.question.span(i, i + 1) for i in range(0, self.question.prompt_tokens, step)]
        self.explainer.explain(self.question.prompt, self.question.target, spans)

    @torch.inference_mode()
    def linear_rate(self, rows: int) -> float:
        """FLOP/s of the layers' own products at this number of rows, with nothing between them."""
        layers = layer_linears(self.model)
        widths = {layer.in_features for layer in layers}
        inputs = {w: torch.randn(rows, w, dtype=self.model.dtype, device=self.model.device) for w in widths}
        timing = self.stopwatch.time(lambda: [layer(inputs[layer.in_features]) for layer in layers] and None)
        return linear_flops(self.model, rows) / timing.ms * 1e3

    @torch.inference_mode()
    def plain_forward_bytes(self, rows: int) -> int | None:
        """What a plain causal forward over as many tokens as a pack allocates at its peak, weights not counted."""
        if not self.cuda:
            return None
        ids = self.question.ids.repeat(rows // len(self.question.ids) + 1)[None, :rows]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.model(ids, use_cache=False, logits_to_keep=TARGET_TOKENS)
        return torch.cuda.max_memory_allocated() - before

    def recompute_seconds(self) -> float:
        """What full recomputation would take for all units, from one batch of it."""
        n = self.question.prompt_tokens
        spans = [(i, i + 1) for i in range(RECOMPUTED_BATCH - 1)]
        recomputed_scores(self.model, self.question, spans)
        seconds = []
        for _ in range(3):
            self._synchronize()
            started = time.perf_counter()
            recomputed_scores(self.model, self.question, spans)
            self._synchronize()
            seconds.append(time.perf_counter() - started)
        return median(seconds) * (n + 1) / RECOMPUTED_BATCH

    def _synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def memory_record(bench: Bench, rounds: list[dict[str, Any]], rows: int) -> dict[str, Any] | None:
    """The explanation's peak against weights, base K/V and a plain forward over one pack."""
    if not bench.cuda:
        return None
    model, config = bench.model, bench.model.config
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    base = per_token * len(bench.question.inputs) * torch.finfo(model.dtype).bits // 8
    plain = bench.plain_forward_bytes(rows)
    peak = max(entry["peak_bytes"] for entry in rounds)
    parts = {"weights": weights, "base": base, f"plain forward over {rows} tokens": plain}
    return {"peak_bytes": peak, "parts": parts, "peak_over_parts": peak / sum(parts.values())}


def shorter(bench: Bench, **depth: Any) -> dict[str, Any]:
    """A round that does less, after one that compiles what there is to compile."""
    try:
        bench.round(**depth)
        found = bench.round(**depth)
    except Exception as error:  # the exact figures stand without it
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    return {name: found[name] for name in ("seconds", "tokens_through_model", "forwards", "peak_bytes")}


def measure(
    options: argparse.Namespace, say: Callable[[str], None], save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Everything, saved after every step; `rounds` is missing where the scores are not right."""
    ends = time.monotonic() + (options.seconds or 60 * options.minutes)
    device, dtype, preset = torch.device(options.device), getattr(torch, options.dtype), PRESETS[options.preset]
    vocabulary = preset.config["vocab_size"]
    say("building the model")
    model = random_model(preset, dtype, device)
    question = Question.random(options.tokens or preset.prompt_tokens, vocabulary, device)
    explainer = ak.Explainer(model, word_tokenizer(vocabulary), factor=FACTOR, progress=False)
    record: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "prompt_tokens": question.prompt_tokens,
        "target_tokens": TARGET_TOKENS,
        "dtype": options.dtype,
        "backend": backends.load(None, device.type).__name__.rpartition(".")[2],
    }
    say("comparing scores with a full recomputation in float32")
    record["agreement"] = agreement(model, explainer, question)
    save(record)
    if not record["agreement"]["right"]:
        return record
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of the float32 copy
    bench = Bench(model, explainer, question, Stopwatch(device, small=options.preset == "tiny"))
    record["rates"] = vars(bench.stopwatch.rates(dtype))
    say("warming up")
    bench.warm_up()
    rounds: list[dict[str, Any]] = []
    record["rounds"] = rounds
    while len(rounds) < options.rounds and (not rounds or time.monotonic() < ends):
        rounds.append(bench.round())
        say(f"explained {question.prompt_tokens} tokens in {rounds[-1]['seconds']:.2f} s")
        save(record)
    rows = rounds[-1]["largest_forward"]
    say(f"the layers' own products, and a plain forward, over {rows} tokens")
    linear_rate = bench.linear_rate(rows)
    achieved = median(entry["flops"] / entry["seconds"] for entry in rounds)
    recompute = bench.recompute_seconds()
    record |= {
        "seconds": median(entry["seconds"] for entry in rounds),
        "share_of_matrix_rate": achieved / record["rates"]["flops_per_second"],
        "linear_flops_per_second": linear_rate,
        "share_of_linear_rate": achieved / linear_rate,
        "memory": memory_record(bench, rounds, rows),
        "recompute_seconds_extrapolated": recompute,
        "faster_than_recompute": recompute / median(entry["seconds"] for entry in rounds),
        "shorter": {},
    }
    save(record)
    for name, value in SHORTER.items():
        if time.monotonic() < ends:
            say(f"{name}={value}")
            record["shorter"][f"{name}={value}"] = shorter(bench, **{name: value})
            save(record)
    return record


def summary(record: dict[str, Any]) -> str:
    checked = record["agreement"]
    lines = [
        f"{record['parameters'] / 1e9:.3g} billion parameters, {record['dtype']}, {record['prompt_tokens']} tokens, "
        f"backend {record['backend']}",
        f"scores: off by up to {checked['largest_error']:.2g}, {checked['allowed_error']:.2g} is allowed, "
        f"the largest is {checked['largest_score']:.2g}; path: {checked['path']}",
    ]
    if "rounds" not in record:
        return "\n".join([*lines, f"no time is reported: {checked['objection']}"])
    last = record["rounds"][-1]
    lines += [
        f"time: {record['seconds']:.2f} s; {last['tokens_through_model']:,} tokens through the model in "
        f"{last['forwards']} forwards",
        f"rate: {last['tflops_per_second']:.4g} TFLOP/s, {record['share_of_matrix_rate']:.0%} of a large matrix "
        f"product's, {record['share_of_linear_rate']:.0%} of the layers' own products'",
        f"full recomputation, extrapolated from one batch of {RECOMPUTED_BATCH} rows: "
        f"{record['recompute_seconds_extrapolated']:.2f} s, {record['faster_than_recompute']:.2f} times as long",
    ]
    for name, found in record["shorter"].items():
        cost = found.get("error") or f"{found['seconds']:.2f} s; {found['tokens_through_model']:,} tokens"
        lines.append(f"{name}: {cost}")
    if last["attention_share"] is not None:
        lines.append(f"attention: {last['attention_share']:.1%} of the time")
    memory = record["memory"]
    if memory is not None:
        parts = " + ".join(f"{name} {size / 1e9:.2f}" for name, size in memory["parts"].items())
        lines.append(f"peak memory: {memory['peak_bytes'] / 1e9:.2f} GB, {memory['peak_over_parts']:.2f} of {parts}")
    return "\n".join(lines)


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu.explanation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="8b")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--tokens", type=int, help="length of the prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=10.0, help="start no further round after so many")
    parser.add_argument("--seconds", type=float, help="the same in seconds")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    options = arguments(given)
    if options.device == "cuda" and (reason := missing_gpu()):
        print(f"no explanation on a GPU: {reason}; --device cpu --preset tiny shows that it runs", file=sys.stderr)
        return NOTHING_RUN
    started = time.monotonic()
    where = environment() | ({"gpu": gpu_environment()} if options.device == "cuda" else {})
    slug = gpu_slug() if options.device == "cuda" else cpu_slug()
    path = options.output / f"gpu-explanation-{options.preset}-{slug}.json"
    try:
        record = measure(
            options,
            say=lambda text: print(f"{time.monotonic() - started:5.0f} s  {text}", flush=True),
            save=lambda record: write_json(path, {"environment": where, **record}),
        )
    except torch.OutOfMemoryError as error:
        print(f"preset {options.preset} does not fit this device: {str(error).splitlines()[0]}", file=sys.stderr)
        return NOTHING_RUN
    print(summary(record))
    print(f"written to {path}")
    return PASSED if "rounds" in record else FAILED


if __name__ == "__main__":
    sys.exit(main())
