"""AttnLRP here against lxt, its authors' library, on the same tiny models: `python -m benchmarks.lxt_parity PYTHON`.

PYTHON is the interpreter of an environment of lxt's own, which needs an older transformers than this package:

    python -m venv lxt
    lxt/bin/pip install torch==2.13.0
    lxt/bin/pip install lxt==2.1 transformers==4.52.4

Prints one line of JSON: per family the largest difference between the two relevances, over the largest relevance.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

COMMON: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
# family -> prefix of its classes, what its config adds; lxt patches the module transformers.models.<family>
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}),
    "gemma3": ("Gemma3", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64}),
}
IDS = (5, 17, 31, 8, 64, 90, 12, 45, 77, 23)
TARGETS = (20, 21)  # explained at the last two rows


def build(family: str) -> Any:
    """A model with large random weights; the same ones in every environment once they are loaded from a file."""
    import transformers

    prefix, extra = FAMILIES[family]
    config_class = getattr(transformers, f"{prefix}TextConfig" if family == "gemma3" else f"{prefix}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}{'LMHeadModel' if family == 'gpt2' else 'ForCausalLM'}")(
        config_class(**COMMON, **extra)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn_like(parameter) * 0.25)
            else:  # the normalisations' weights, which begin at 1 (Gemma's at 0), and biases
                parameter.add_(torch.randn_like(parameter) * 0.25)
    return model


def parity(python: str) -> dict[str, float]:
    """Per family max |ours − lxt's| / max |lxt's|."""
    from safetensors.torch import save_file

    models = {family: build(family) for family in FAMILIES}
    with tempfile.TemporaryDirectory() as folder:
        for family, model in models.items():
            save_file(model.state_dict(), Path(folder) / f"{family}.safetensors")
        command = [python, str(Path(__file__).resolve()), "--peer", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    theirs = {family: torch.tensor(rows) for family, rows in json.loads(done.stdout.splitlines()[-1]).items()}
    differences = {family: (ours(models[family]) - theirs[family]).abs().max() for family in FAMILIES}
    return {family: float(differences[family] / theirs[family].abs().max()) for family in FAMILIES}


def ours(model: Any) -> torch.Tensor:
    """(L, 2) relevances by this package."""
    from atman_kernels.explain.methods.attnlrp import attnlrp
    from atman_kernels.inputs.text_generation import CausalObjective

    ids = torch.tensor([*IDS, TARGETS[1]])
    ids[-2] = TARGETS[0]  # rows L - 2 and L - 1 predict the two targets
    question = CausalObjective(
        prompt="", target="", ids=ids, prompt_length=len(ids) - 2, units=(), target_tokens=("", "")
    )
    return attnlrp(model, question).scores


def peer(folder: str) -> dict[str, list[list[float]]]:
    """The same by lxt, in its own environment: one backward pass per target."""
    from importlib import import_module

    from lxt.efficient import monkey_patch  # type: ignore[import-not-found]
    from safetensors.torch import load_file

    relevances = {}
    for family in FAMILIES:
        monkey_patch(import_module(f"transformers.models.{family}.modeling_{family}"))
        model = build(family)
        model.load_state_dict(load_file(Path(folder) / f"{family}.safetensors"))
        ids = torch.tensor([[*IDS]])
        ids[0, -1] = TARGETS[0]
        columns = []
        for row, target in zip((len(IDS) - 2, len(IDS) - 1), TARGETS, strict=True):
            embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
            model(inputs_embeds=embeddings, use_cache=False).logits[0, row, target].backward()
            columns.append((embeddings.detach() * embeddings.grad).sum(-1)[0])
        relevances[family] = torch.stack(columns, dim=1).tolist()
    return relevances


def main() -> int:
    if len(sys.argv) == 3 and sys.argv[1] == "--peer":
        print(json.dumps(peer(sys.argv[2])))
    elif len(sys.argv) == 2:
        print(json.dumps(parity(sys.argv[1])))
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
