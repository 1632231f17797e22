"""What several test files need: no network, tiny models on disk, the real weights and questions where they are."""

import os
from pathlib import Path

if os.environ.get("PYTEST_XDIST_WORKER"):  # a process per core: threads would only wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported; no test may wait for a network

import pytest
import torch

TEXT = (
    "The lighthouse keeper had a grey dog named Pilot.",
    "Question: What is the name of the dog?",
    "Answer: Pilot rang the bell.",
)


LONGEST = ("test_triton_interpreter.py", "test_crew.py")  # first, so that no process is left with them at the end


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first. On a machine with a GPU, what the shared suites do with a backend for GPUs is marked so."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET"):
        return
    from attention_cases import HARDWARE_BACKENDS

    for item in items:
        backend = getattr(item, "callspec", None) and item.callspec.params.get("backend")  # type: ignore[attr-defined]
        if isinstance(backend, str) and backend.partition(":")[0] in HARDWARE_BACKENDS:
            item.add_marker("gpu")


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Byte-level BPE, so that any text has tokens; with a chat template, without special tokens of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
    return fast


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory, tiny_tokenizer) -> Path:
    """A folder with a random two-layer Llama and its tokenizer, as `save_pretrained` writes them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,  # of the usual 0.02 nothing would be left to measure
        bos_token_id=None,
        eos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def squad_sample() -> Path:
    """A SQuAD-format file of real questions, which lies beside a checkout and is not part of it."""
    file = Path(__file__).resolve().parents[2] / "shared" / "data" / "squad-v1.1-sample.json"
    if not file.is_file():
        pytest.skip(f"{file.name} is not here")
    return file
