"""The kernel for Hugging Face's hub: loaded by `kernels` from a folder, it does what the package does."""

import contextvars
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny_models
import torch
from transformers import T5Config, T5ForConditionalGeneration

import atman_kernels as ak

ROOT = Path(__file__).resolve().parents[2]
kernels = pytest.importorskip("kernels")
if not (ROOT / "kernel_hub").is_dir():
    pytest.skip("the program that writes the kernel is in a checkout", allow_module_level=True)
sys.path.insert(0, str(ROOT))
from kernel_hub import __main__ as program  # noqa: E402

sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    program.write(folder)
    return folder


@pytest.fixture(scope="module")
def kernel(folder):
    return kernels.get_local_kernel(folder)


@pytest.fixture(scope="module")
def name(kernel):
    return kernel.register("suppressed-for-tests")


def run(code: str, folder: Path, **environment: str) -> str:
    load = f"from pathlib import Path\nk = kernels.get_local_kernel(Path({str(folder)!r}))\n"
    code = f"import torch, kernels, sys\n{load}{code}"
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=settings)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_stands_alone_and_triton_computes_the_same(folder):
    code = """
g = torch.Generator().manual_seed(0)
q, key, v = (torch.randn(2, 2, 7, 16, generator=g) for _ in range(3))
c = torch.rand(2, 7, generator=g)
want = k.suppressed_attention(q, key, v, c, is_causal=True, backend="reference")
found = k.suppressed_attention(q, key, v, c, is_causal=True, backend="triton")
torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
print("atman_kernels" in sys.modules, "transformers" in sys.modules)
"""
    pytest.importorskip("triton")
    assert run(code, folder, TRITON_INTERPRET="1") == "False False\n"


@pytest.mark.parametrize("mode", ["log_additive", "multiplicative", "shifted"])
def test_the_ops_are_those_of_the_package(kernel, mode):
    query, key, value = (torch.randn(2, 6, 9, 16, requires_grad=True) for _ in range(3))
    factor = torch.rand(2, 9)
    ours = ak.suppressed_attention(query, key, value, factor, mode=mode, is_causal=True, backend="cpu:torch")
    theirs = kernel.suppressed_attention(query, key, value, factor, mode=mode, is_causal=True, backend="cpu:torch")
    assert torch.equal(ours, theirs)
    wanted, got = (torch.autograd.grad(x.sum(), (query, key, value)) for x in (ours, theirs))
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))

    lengths = {"suffix_lengths": [3, 2], "prefix_lengths": [5, 7]}
    packed = [
        library.packed_suppressed_attention(
            query[0, :, :5], key[0, :, :5], value[0, :, :5], key[1], value[1], library.VariantPack.build(**lengths),
            factor, mode=mode, backend="cpu:torch",
        )
        for library in (ak, kernel)
    ]  # fmt: skip
    assert torch.equal(*packed)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_oss"])
def test_a_model_that_takes_it_is_suppressed_as_by_the_package(kernel, name, family):
    model = tiny_models.build(family)
    ids = torch.randint(3, 20, (3, 8))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    factor = torch.rand(3, 8)
    with torch.no_grad():
        plain = model(**inputs).logits
        with ak.suppress(model, factor):
            wanted = model(**inputs).logits
            answers = model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=2, pad_token_id=0)
        windows = family in ("gemma2", "gpt_oss")
        model.set_attn_implementation(name)
        with kernel.suppress(model, factor):
            found = model(**inputs).logits
            if windows:  # whose caches drop old keys
                with pytest.raises(kernel.InputError, match="drops old keys"):
                    model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
            else:
                found_answers = model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=2, pad_token_id=0)
                assert torch.equal(found_answers, answers)
        unsuppressed = model(**inputs).logits
    seen = mask.bool()
    torch.testing.assert_close(found[seen], wanted[seen], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(unsuppressed[seen], plain[seen], atol=2e-5, rtol=2e-5)
    assert (found - plain)[seen].abs().max() > 1e-3


def test_transformers_takes_it_by_its_name(folder, kernel, monkeypatch):
    """As from the hub, `owner/name`; `kernels` looks into a folder instead. (No network in tests.)"""
    from kernels import load
    from transformers.integrations import hub_kernels

    monkeypatch.setenv("LOCAL_KERNELS", f"some/suppressed-attention={folder}")
    load._parse_local_kernel_overrides.cache_clear()
    # This release of transformers may want a newer `kernels` than there is, for features that this does not use.
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "get_kernel_hub", kernels.get_kernel, raising=False)
    model, ids, mask = tiny_models.build("llama"), torch.randint(3, 20, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    factor, seen = torch.rand(2, 6), mask.bool()
    with torch.no_grad():
        with ak.suppress(model, factor):
            wanted = model(ids, attention_mask=mask).logits[seen]
        model.set_attn_implementation("some/suppressed-attention", allow_all_kernels=True)
        with kernel.suppress(model, factor):
            torch.testing.assert_close(model(ids, attention_mask=mask).logits[seen], wanted, atol=2e-5, rtol=2e-5)


def test_what_does_not_fit_is_refused(kernel, name):
    model = tiny_models.build("llama")
    ids, factor = torch.randint(3, 20, (1, 6)), torch.rand(1, 6)
    with pytest.raises(kernel.UnsupportedModelError, match="none of its forwards"), kernel.suppress(model, factor):
        model(ids)
    model.set_attn_implementation(name)
    with pytest.raises(kernel.InputError, match="mode must be one of"), kernel.suppress(model, factor, mode="off"):
        pass
    with kernel.suppress(model, factor), pytest.raises(kernel.InputError, match="already suppressed"):
        kernel.suppress(model, factor).__enter__()
    with pytest.raises(kernel.InputError, match="position 9"), kernel.suppress(model, torch.rand(1, 9)):
        model(ids)
    with pytest.raises(kernel.InputError, match="2 rows"), kernel.suppress(model, torch.rand(2, 6)):
        model(ids)
    config = T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(kernel.UnsupportedModelError, match="two stacks"):
        kernel.suppress(T5ForConditionalGeneration(config), factor).__enter__()
    model(ids)  # nothing is left behind


def test_a_thread_must_take_the_suppression_along(kernel, name):
    model = tiny_models.build("llama")
    model.set_attn_implementation(name)
    ids, found = torch.randint(3, 20, (1, 6)), []

    def forward() -> None:
        try:
            found.append(model(ids).logits)
        except RuntimeError as error:
            found.append(str(error))

    with kernel.suppress(model, torch.rand(1, 6)):
        wanted = model(ids).logits
        for target, arguments in ((forward, ()), (contextvars.copy_context().run, (forward,))):
            thread = threading.Thread(target=target, args=arguments)
            thread.start()
            thread.join()
    assert "another thread" in found[0]
    assert torch.equal(found[1], wanted)


def test_two_versions_live_in_one_process(folder, kernel, tmp_path, monkeypatch):
    changed = program.sources() | {"extra.py": "# another version\n"}
    monkeypatch.setattr(program, "sources", lambda: changed)
    program.write(tmp_path)
    other = kernels.get_local_kernel(tmp_path)
    assert other.__name__ != kernel.__name__
    x = torch.randn(1, 1, 3, 8)
    assert torch.equal(other.suppressed_attention(x, x, x), kernel.suppressed_attention(x, x, x))
    metadata = [json.loads((x / program.VARIANT / "metadata.json").read_text()) for x in (folder, tmp_path)]
    assert metadata[0]["id"] != metadata[1]["id"]


@pytest.mark.parametrize(
    ("code", "written"),
    [
        ("    from atman_kernels import _C", "    from .. import _C"),
        ("from atman_kernels.ops import x", "from ..ops import x"),
        ("torch.ops.atman_kernels.x", "torch.ops.n.x"),
        ("f'atman_kernels::x'", "f'n::x'"),
        ("import atman_kernels", None),
        ("import_module('atman_kernels.ops')", None),
    ],
)
def test_nothing_written_reaches_for_the_installed_package(code, written):
    with pytest.raises(SystemExit, match="installed package"):
        program.check("module.py", code.strip())
    changed = program.in_namespace(program.relative(code, 1), "n")
    if written is not None:
        assert changed == written
        program.check("module.py", changed.strip())
