"""Does an installed package work? Run in a folder without a checkout: `python smoke.py [--compiled | --pure]`."""

import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import atman_kernels as ak
from atman_kernels.backends.cpu import compiled


def check_module(expected: str) -> None:
    """Whether the compiled module is there as it should be."""
    reason = compiled.unavailable_reason()
    if expected == "--compiled" and reason is not None:
        sys.exit(f"the compiled module is missing: {reason}")
    if expected == "--pure" and reason is None:
        sys.exit("a package of Python alone has a compiled module")


def check_op() -> None:
    query, key, value = (torch.randn(1, 4, 9, 64) for _ in range(3))
    found = ak.suppressed_attention(query, key, value, torch.ones(1, 9), is_causal=True)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def check_explanation() -> None:
    """A tiny model of random weights, explained, saved, shown."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(9)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    sizes = {"vocab_size": 9, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()
    explainer = ak.Explainer(model, PreTrainedTokenizerFast(tokenizer_object=words), progress=False)
    explanation = explainer.explain("w1 w2 w3 w4", "w5 w6")
    assert explanation.settings["path"] == "packed"
    with tempfile.TemporaryDirectory() as folder:
        explanation.to_html(Path(folder, "page.html"))
        explanation.save(Path(folder, "scores.json"))
        assert torch.equal(ak.Explanation.load(Path(folder, "scores.json")).scores, explanation.scores)


def check_command_line() -> None:
    atman = Path(sysconfig.get_path("scripts"), "atman")
    shown = subprocess.run([atman, "--version"], capture_output=True, text=True, check=True).stdout
    assert ak.__version__ in shown, shown
    subprocess.run([atman, "doctor"], check=True)


if __name__ == "__main__":
    if Path(ak.__file__).is_relative_to(Path(__file__).resolve().parents[1]):
        sys.exit(f"this is the checkout's package, not an installed one: {ak.__file__}")
    check_module(sys.argv[1] if len(sys.argv) > 1 else "")
    check_op()
    check_explanation()
    check_command_line()
    print(f"atman-kernels {ak.__version__} works")
