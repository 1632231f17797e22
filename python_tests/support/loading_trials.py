"""One way to load a model tried: what is explained of it, next to full rows of it and to what it says by itself.

Three things are compared. Scores by packs with scores by full rows, both the package's. Scores with those of the
model's own eager attention, whose scores are changed on their way into softmax, one forward per unit. And log-probs of
the model alone: of rows alone and beside others, of sequences at once and in two parts, by eager attention and by its
own. What these differ by is the model's own noise: nothing said about it can be more exact than that.
"""

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import softmax_oracle
import tiny_models
import torch
import transformers as hf
from torch import Tensor, nn

import atman_kernels as ak
from atman_kernels.hf.models.wrapped import unwrapped

STATES = ("packed", "batched", "one by one", "refused", "not loaded", "not tried", "wrong")
N, M, ROWS = 18, 4, 16  # tokens of the prompt and of the answer; prompts by which noise is measured
FLOOR = {"float32": 2e-4, "bfloat16": 0.05}  # what the order of additions does to any model of this dtype
MARGIN = 4.0  # a score is the difference of two log-probs, and so is what it is compared with


@dataclass(frozen=True)
class Way:
    """A way to load a model.

    Attributes:
        name: what the table calls it.
        group: under which heading.
        load: dtype -> the model.
        packages: what has to be installed.
        dtypes: those to try.
        twin: loads the same model uncompiled, where that is what can be asked for its own attention.
        slow: it takes longer than a few seconds.
        remark: what is special.
    """

    name: str
    group: str
    load: Callable[[str], Any]
    packages: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("float32",)
    twin: Callable[[str], Any] | None = None
    slow: bool = False
    remark: str = ""


@dataclass(frozen=True)
class Result:
    """What came of one way in one dtype.

    Attributes:
        way, group, dtype: which.
        state: one of `STATES`.
        noise: the model's own, in nats.
        full: largest difference between scores by packs and by full rows.
        eager: the same to the model's own eager attention.
        size: the largest score.
        remark: what is special, the reason of a fallback, or the text of a refusal.
    """

    way: str
    group: str
    dtype: str
    state: str
    noise: float | None = None
    full: float | None = None
    eager: float | None = None
    size: float | None = None
    remark: str = ""


def tried(way: Way, dtype: str) -> Result:
    """What comes of a way; every way to end is a state, none an exception."""
    name = (way.name, way.group, dtype)
    missing = [package for package in way.packages if installed(package) is None]
    if missing:
        return Result(*name, "not tried", remark=f"{', '.join(missing)} is not installed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            model = way.load(dtype)
            itself = _inner(model) if way.twin is None else way.twin(dtype)
            noise = own_noise(itself)
    except Exception as error:  # whatever transformers and the package have against it
        return Result(*name, "not loaded", remark=_line(error))
    try:
        return _compared(way, name, model, itself, noise)
    except (ak.UnsupportedModelError, ak.InputError) as error:
        return Result(*name, "refused", noise, remark=_line(error))
    except Exception as error:
        return Result(*name, "wrong", noise, remark=f"{type(error).__name__}: {_line(error)}")


def installed(package: str) -> str | None:
    """Its version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _line(error: BaseException) -> str:
    return " ".join(f"{error or type(error).__name__}".split())[:240]


def _inner(model: Any) -> Any:
    """The transformers model, where one can be told."""
    try:
        return unwrapped(model)
    except ak.UnsupportedModelError:
        return model


# --- what is compared ---


@cache
def ids() -> Tensor:
    """(N + M,) the prompt and the answer."""
    return torch.randint(3, tiny_models.VOCABULARY, (N + M,), generator=torch.Generator().manual_seed(1))


def explained(model: Any, *, by_full_rows: bool = False) -> tuple[ak.Explanation, ak.Explainer]:
    explainer = ak.Explainer(model, tiny_models.tokenizer(), progress=False)
    if by_full_rows:
        explainer.runner.unpackable = "full rows are wanted"
    prompt, answer = (tiny_models.text_of(part.tolist()) for part in (ids()[:N], ids()[N:]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return explainer.explain(prompt, answer), explainer


def _compared(way: Way, name: tuple[str, str, str], model: Any, itself: Any, noise: float) -> Result:
    modes = [module.training for module in _inner(model).modules()]
    explanation, explainer = explained(model)
    full = explained(model, by_full_rows=True)[0]
    assert [module.training for module in _inner(model).modules()] == modes, "modules are in another mode"
    runner = explainer.runner
    state = "one by one" if runner._mixing is not None else explanation.settings["path"]
    remarks = [way.remark, runner._mixing or runner.unpackable or ""]
    to_full = float((explanation.scores - full.scores).abs().max())
    to_eager = float((explanation.scores - eager_scores(itself)).abs().max())
    limit = FLOOR[name[2]] + MARGIN * noise
    if not (to_full <= limit and to_eager <= limit):
        state = "wrong"
    size = float(full.scores.abs().max())
    assert size > 0.1, "scores this small would be right by chance"
    return Result(*name, state, noise, to_full, to_eager, size, "; ".join(filter(None, remarks)))


def eager_scores(model: Any) -> Tensor:
    """(N, M) rise of the loss, one forward of the model's own eager attention per unit, in eval mode."""
    with in_use(model, "eager"):
        rows = torch.ones(N, N + M).fill_diagonal_(0)
        return softmax_oracle.leave_one_out(model, ids(), N, rows, "log_additive").float()


def own_noise(model: Any) -> float:
    """Largest difference between log-probs of the answer, by ways that all are the model's own.

    They are asked for after the prompt as it is, and with another token in one place.
    """
    rows = ids().repeat(ROWS, 1)
    places = torch.arange(1, ROWS)
    rows[places, places] = rows[0, places - 1]
    read = rows[:, :-1]

    def logprobs(logits: Tensor) -> Tensor:
        return logits[:, -M:].double().log_softmax(-1).gather(-1, rows[:, -M:, None])[..., 0]

    with torch.no_grad(), in_use(model):
        alone = logprobs(torch.cat([model(row[None], use_cache=False).logits for row in read]))
        others = [logprobs(model(read, use_cache=False).logits)]
        for cut in (N // 3, N - 2):
            past = model(read[:, :cut], use_cache=True).past_key_values
            others.append(logprobs(model(read[:, cut:], past_key_values=past, use_cache=True).logits))
    with torch.no_grad(), in_use(model, "eager"):
        others.append(logprobs(model(read, use_cache=False).logits))
    return max(float((alone - other).abs().max()) for other in others)


@contextmanager
def in_use(model: Any, attention: str | None = None) -> Iterator[None]:
    """The model in eval mode, with another attention if that is wanted; then as before."""
    training = [module for module in model.modules() if module.training]
    before = model.config._attn_implementation
    model.eval()
    if attention is not None:
        model.set_attn_implementation(attention)
    try:
        yield
    finally:
        if attention is not None:
            model.set_attn_implementation(before)
        for module in training:
            module.training = True


# --- the model, and ways to load it ---


@cache
def folder(tied: bool = False) -> Path:
    """A Llama of three layers, wide enough for blocks of 64 weights."""
    path = Path(tempfile.mkdtemp(prefix="loading-trials-")) / "tiny-llama"
    torch.manual_seed(0)
    sizes = {**tiny_models.GROUPED, "hidden_size": 64, "intermediate_size": 128}
    config = hf.LlamaConfig(**sizes, initializer_range=0.25, attention_dropout=0.1, tie_word_embeddings=tied)
    hf.LlamaForCausalLM(config).save_pretrained(path)
    return path


def load(dtype: str, *, tied: bool = False, **options: Any) -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(folder(tied), dtype=dtype, **options)


def _offloaded(how: str, dtype: str) -> Any:
    import accelerate

    here = torch.device("cpu")
    if how == "cpu":
        return accelerate.cpu_offload(load(dtype), execution_device=here)
    return accelerate.disk_offload(load(dtype), tempfile.mkdtemp(), execution_device=here)


def _mapped(places: dict[str, str], dtype: str) -> Any:
    return load(dtype, device_map=places, offload_folder=tempfile.mkdtemp())


BESIDE = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
HALF_ON_DISK = dict.fromkeys(BESIDE, "cpu") | {f"model.layers.{i}": "disk" if i else "cpu" for i in range(3)}


def _training(dtype: str) -> Any:
    return load(dtype).train()


def _checkpointed(dtype: str) -> Any:
    model = load(dtype).train()
    model.gradient_checkpointing_enable()
    return model


def _compiled(how: str, backend: str, dtype: str) -> Any:
    torch._dynamo.reset()
    model = load(dtype)
    if how == "wrapper":
        return torch.compile(model, backend=backend)
    for module in [model] if how == "in place" else model.model.layers:
        module.compile(backend=backend)
    return model


def _with_adapter(config: Callable[[Any], Any], dtype: str, *, base: Callable[[str], Any] = load) -> Any:
    import peft

    return _stirred(peft.get_peft_model(base(dtype), config(peft)).eval())


def _stirred(model: nn.Module) -> nn.Module:
    """With what starts at zero away from it, so that adapters matter."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ADAPTERS) and parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1)
    return model


ADAPTERS = ("lora_", "ia3_", "hada_", "lokr_", "oft_", "vera_lambda", "lora_magnitude", "prompt_", "prefix")
LAYERS = ["q_proj", "v_proj", "up_proj"]


def lora(peft: Any, **options: Any) -> Any:
    return peft.LoraConfig(r=4, target_modules=LAYERS, **options)


def _merged(how: str, dtype: str) -> Any:
    model = _with_adapter(lora, dtype)
    if how == "unloaded":
        return model.merge_and_unload()
    model.merge_adapter()
    return model


def _two_adapters(dtype: str) -> Any:
    import peft

    model = _with_adapter(lora, dtype)
    model.add_adapter("other", lora(peft))
    model.base_model.set_adapter(["default", "other"])
    return _stirred(model)


def _by_transformers(dtype: str) -> Any:
    import peft

    model = load(dtype)
    model.add_adapter(lora(peft))
    return _stirred(model).eval()


def _quantised(config: Callable[[], Any], dtype: str) -> Any:
    return load(dtype, quantization_config=config(), device_map="cpu")


def _torchao(name: str, **options: Any) -> Callable[[], Any]:
    def config() -> Any:
        import torchao.quantization as ao

        made = {key: value(ao) if callable(value) else value for key, value in options.items()}
        return hf.TorchAoConfig(getattr(ao, name)(**made))

    return config


def _afterwards(name: str, dtype: str) -> Any:
    import torchao.quantization as ao

    model = load(dtype)
    ao.quantize_(model.model, getattr(ao, name)())
    return model


def _bits_and_bytes(**options: Any) -> Callable[[], Any]:
    return lambda: hf.BitsAndBytesConfig(**options)


def _groups_of_32(ao: Any) -> Any:
    return ao.PerGroup(32)


BOTH = ("float32", "bfloat16")
INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]
NF4 = _bits_and_bytes(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def _way(group: str, name: str, load: Callable[[str], Any], *packages: str, **more: Any) -> Way:
    return Way(name, group, load, packages, **more)


_plain = partial(_way, "As it is loaded")
_placed = partial(_way, "Where weights lie")
_compile = partial(_way, "Compiled", twin=load)
_adapted = partial(_way, "Adapters")
_coarse = partial(_way, "Quantised", dtypes=BOTH)

WAYS = (
    _plain("`from_pretrained`, in evaluation mode", load, dtypes=BOTH),
    _plain('`dtype="auto"`', lambda dtype: load("auto")),
    _plain("`low_cpu_mem_usage=True`", partial(load, low_cpu_mem_usage=True)),
    _plain("tied weights", partial(load, tied=True), dtypes=BOTH),
    _plain("in training mode, with dropout", _training, remark="explained in evaluation mode, and left as it was"),
    _plain("gradient checkpointing left on", _checkpointed),
    *(
        _plain(f'`attn_implementation="{name}"`', partial(load, attn_implementation=name), *packages, slow=slow)
        for name, packages, slow in (
            ("eager", (), False),
            ("sdpa", (), False),
            ("flex_attention", (), True),
            ("paged|sdpa", (), False),
            ("flash_attention_2", ("flash-attn",), False),
        )
    ),
    _placed('`device_map="cpu"`', partial(load, device_map="cpu"), "accelerate"),
    _placed("`device_map`, some layers on disk", partial(_mapped, HALF_ON_DISK), "accelerate", dtypes=BOTH),
    _placed("`device_map`, all on disk", partial(_mapped, {"": "disk"}), "accelerate"),
    _placed("`accelerate.cpu_offload`", partial(_offloaded, "cpu"), "accelerate"),
    _placed("`accelerate.disk_offload`", partial(_offloaded, "disk"), "accelerate", dtypes=BOTH),
    _compile("`model.compile()`", partial(_compiled, "in place", "inductor"), slow=True),
    _compile("`torch.compile(model)`", partial(_compiled, "wrapper", "inductor"), remark="its layers run uncompiled"),
    _compile("each layer compiled", partial(_compiled, "layers", "inductor"), slow=True),
    _compile('`model.compile(backend="eager")`', partial(_compiled, "in place", "eager")),
    _compile('each layer compiled, `backend="eager"`', partial(_compiled, "layers", "eager")),
    _adapted("LoRA", partial(_with_adapter, lora), "peft", dtypes=BOTH),
    _adapted("LoRA, `merge_adapter()`", partial(_merged, "in place"), "peft"),
    _adapted("LoRA, `merge_and_unload()`", partial(_merged, "unloaded"), "peft"),
    _adapted("LoRA, two at once", _two_adapters, "peft"),
    _adapted("LoRA, `model.add_adapter`", _by_transformers, "peft"),
    _adapted("DoRA", partial(_with_adapter, partial(lora, use_dora=True)), "peft"),
    _adapted("LoRA on bitsandbytes nf4", partial(_with_adapter, lora, base=partial(_quantised, NF4)), "peft",
             "bitsandbytes", dtypes=BOTH),
    _adapted("IA³", partial(_with_adapter, lambda peft: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])), "peft"),
    _adapted("LoHa", partial(_with_adapter, lambda peft: peft.LoHaConfig(r=4, target_modules=LAYERS)), "peft"),
    _adapted("VeRA", partial(_with_adapter, lambda peft: peft.VeraConfig(r=4, target_modules=["q_proj"])), "peft"),
    _adapted("OFT", partial(_with_adapter, lambda peft: peft.OFTConfig(
        oft_block_size=8, target_modules=["q_proj"])), "peft"),
    _adapted("aLoRA", partial(_with_adapter, partial(
        lora, task_type="CAUSAL_LM", alora_invocation_tokens=[5])), "peft"),
    _adapted("prompt tuning", partial(_with_adapter, lambda peft: peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2)), "peft"),
    _adapted("prefix tuning", partial(_with_adapter, lambda peft: peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2)), "peft"),
    _adapted("P-tuning", partial(_with_adapter, lambda peft: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2)), "peft"),
    _adapted("LLaMA-Adapter", partial(_with_adapter, lambda peft: peft.AdaptionPromptConfig(
        task_type="CAUSAL_LM", adapter_len=2, adapter_layers=2)), "peft"),
    _coarse("torchao int8 weights", partial(_quantised, _torchao("Int8WeightOnlyConfig")), "torchao"),
    _coarse("torchao int4 weights, groups of 32", partial(_quantised, _torchao(
        "IntxWeightOnlyConfig", weight_dtype=INT4, granularity=_groups_of_32)), "torchao"),
    _coarse("torchao float8 weights", partial(_quantised, _torchao("Float8WeightOnlyConfig")), "torchao"),
    _coarse("torchao int8 weights and activations", partial(_quantised, _torchao(
        "Int8DynamicActivationInt8WeightConfig")), "torchao"),
    _coarse("torchao int8 activations, int4 weights", partial(_quantised, _torchao(
        "Int8DynamicActivationIntxWeightConfig", weight_dtype=INT4, weight_granularity=_groups_of_32)),
            "torchao"),
    _coarse("torchao float8 weights and activations", partial(_afterwards, "Float8DynamicActivationFloat8WeightConfig"),
            "torchao"),
    *(
        _coarse(f"quanto {kind} weights", partial(_quantised, partial(hf.QuantoConfig, weights=kind)), "optimum-quanto",
                slow=kind == "int4")
        for kind in ("int8", "int4", "int2", "float8")
    ),
    _coarse("bitsandbytes nf4", partial(_quantised, NF4), "bitsandbytes"),
    _coarse("bitsandbytes fp4, nested", partial(_quantised, _bits_and_bytes(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True)), "bitsandbytes"),
    _coarse("bitsandbytes int8", partial(_quantised, _bits_and_bytes(load_in_8bit=True)), "bitsandbytes"),
    _coarse("bitsandbytes int8, no outliers", partial(_quantised, _bits_and_bytes(
        load_in_8bit=True, llm_int8_threshold=0.0)), "bitsandbytes"),
    _coarse("HQQ int4", partial(_quantised, partial(hf.HqqConfig, nbits=4, group_size=32)), "hqq"),
    _coarse("GPTQ", partial(_quantised, partial(hf.GPTQConfig, bits=4)), "gptqmodel"),
    _coarse("AWQ", partial(_quantised, hf.AwqConfig), "gptqmodel"),
)  # fmt: skip
