"""Models whose layers run on several devices, or whose weights lie elsewhere until they run: the same explanation.

What is split between two devices needs a second one: those tests are run where there is one, and in
`ops/test_pretended_cuda.py` on one that is not there.
"""

from functools import partial

import image_text_cases
import pytest
import tiny_image_models
import tiny_models
import torch
import transformers as hf

import atman_kernels as ak
from atman_kernels.hf.models.placement import devices_of, input_device
from atman_kernels.pack import VariantPack

accelerate = pytest.importorskip("accelerate")

N, PROMPT, ANSWER = 12, tiny_models.text_of(list(range(10, 22))), "w30 w31 w32"
TWO_DEVICES = [
    "llama",
    "gemma2",  # softcaps, and windows in some layers
    "gpt_oss",  # sinks
    "gptj",  # attention taken over inside its modules
    "bloom",  # a bias by position
]


def explained(model, **options):
    settings = {name: options.pop(name) for name in ("mode", "factor", "token_budget") if name in options}
    explainer = ak.Explainer(model, tiny_models.tokenizer(), progress=False, **settings)
    return explainer.explain(PROMPT, ANSWER, **options)


def by_full_rows(model, **settings):
    explainer = ak.Explainer(model, tiny_models.tokenizer(), progress=False, **settings)
    explainer.runner.unpackable = "not wanted"
    return explainer.explain(PROMPT, ANSWER)


def same(found, expected):
    """But for the order of additions, in which a kernel may go by where in memory a weight begins."""
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


# --- weights that are brought when they run ---


def from_memory(model, folder):
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def from_disk(model, folder):
    return accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))


def whole_from_memory(model, folder):
    return accelerate.cpu_offload_with_hook(model, execution_device=torch.device("cpu"))[0]


def loaded_onto(device_map):
    def load(model, folder):
        model.save_pretrained(folder / "saved")
        options = {"device_map": device_map, "offload_folder": folder / "offloaded", "dtype": model.dtype}
        return hf.AutoModelForCausalLM.from_pretrained(folder / "saved", **options)

    return load


BESIDE = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
ELSEWHERE = {
    "memory": from_memory,
    "disk": from_disk,
    "memory, as a whole": whole_from_memory,
    "disk, as loaded": loaded_onto({"": "disk"}),
    "disk, some layers": loaded_onto(BESIDE | {f"model.layers.{i}": "disk" if i else "cpu" for i in range(3)}),
    "disk, all but layers": loaded_onto(dict.fromkeys(BESIDE, "disk") | {f"model.layers.{i}": "cpu" for i in range(3)}),
}


@pytest.mark.parametrize("where", ELSEWHERE)
def test_weights_that_lie_elsewhere(where, tmp_path):
    plain, model = tiny_models.build("llama"), ELSEWHERE[where](tiny_models.build("llama"), tmp_path)
    lying = {name: parameter.device for name, parameter in model.named_parameters()}
    found = explained(model)
    assert (found.settings["path"], found.settings["device"]) == ("packed", "cpu")
    same(found.scores, explained(plain).scores)
    assert {name: parameter.device for name, parameter in model.named_parameters()} == lying


def test_all_else_with_weights_on_disk(tmp_path):
    tiny_models.build("llama").save_pretrained(tmp_path / "tiny")
    load = partial(hf.AutoModelForCausalLM.from_pretrained, tmp_path / "tiny", dtype="bfloat16")  # its head is widened
    plain, model, tokenizer = load(), from_disk(load(), tmp_path), tiny_models.tokenizer()
    same(by_full_rows(model).scores, by_full_rows(plain).scores)
    ids, factor = tokenizer(PROMPT, return_tensors="pt").input_ids, torch.ones(1, N)
    factor[0, 3] = 0
    answers, steered = [], []
    for one in (plain, model):
        with ak.suppress(one, factor):
            answers.append(one.generate(ids, max_new_tokens=4, do_sample=False))
        with ak.steer(one, tokenizer, PROMPT, {"w12": 0.1}) as steering:
            steered.append(steering.generate(max_new_tokens=4))
    assert torch.equal(*answers)
    assert steered[0] == steered[1]
    for method in ("rollout", "attnlrp"):
        same(explained(model, method=method).scores, explained(plain, method=method).scores)
    own_answer = ak.Explainer(model, tokenizer, progress=False).explain(PROMPT, max_new_tokens=2)
    assert own_answer.target == ak.Explainer(plain, tokenizer, progress=False).explain(PROMPT, max_new_tokens=2).target


def test_encoders_with_weights_on_disk(tmp_path):
    def build():
        torch.manual_seed(0)
        sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        return hf.BertForSequenceClassification(hf.BertConfig(**sizes, num_attention_heads=4, num_labels=3)).eval()

    found = [
        ak.Explainer(model, tiny_models.tokenizer(), progress=False).explain(PROMPT, target=1).scores
        for model in (build(), from_disk(build(), tmp_path))
    ]
    same(*found)


def test_where_a_model_takes_its_inputs():
    assert input_device(torch.nn.Identity()) == torch.device("cpu")
    model = tiny_models.build("llama").to("meta")
    assert input_device(model) == torch.device("meta")  # no hook brings anything: refused by name elsewhere
    assert devices_of(from_memory(tiny_models.build("llama"), None)) == [torch.device("cpu")]
    with pytest.raises(ak.UnsupportedModelError, match="no weights"):
        explained(model)


def test_a_pack_is_copied_to_where_it_is_not():
    pack = VariantPack.build([3, 2], [5, 6])
    assert pack.to("cpu") is pack
    there = pack.to("meta")
    assert {x.device.type for x in vars(there).values() if isinstance(x, torch.Tensor)} == {"meta"}
    assert (there.num_rows, there.longest, there.base_end) == (pack.num_rows, pack.longest, pack.base_end)


# --- layers on two devices ---

cuda = pytest.mark.gpu


def split(model):
    """Every other layer on the other device, where it also runs, and the norm after them; ids go to the CPU."""
    layers = next(part for part in model.get_decoder().children() if isinstance(part, torch.nn.ModuleList))

    def places(name, module):
        if module is layers:
            return {f"{name}.{i}": ("cuda:0", "cpu")[i % 2] for i in range(len(layers))}
        if not any(part is layers for part in module.modules()):
            return {name: "cuda:0" if name.endswith(("norm", "ln_f")) else "cpu"}
        found = (places(f"{name}.{own}".lstrip("."), part) for own, part in module.named_children())
        return {name: place for each in found for name, place in each.items()}

    return accelerate.dispatch_model(model, places("", model), main_device="cpu")


@cuda
@pytest.mark.parametrize("family", TWO_DEVICES)
@pytest.mark.parametrize("mode", ["log_additive", "shifted"])
def test_layers_on_two_devices(family, mode):
    plain, model = tiny_models.build(family), tiny_models.build(family)
    if family == "gpt_oss":
        model.set_experts_implementation("eager")  # on a device that is not there, counting differs
    model = split(model)
    found = explained(model, mode=mode, factor=0.1)
    assert found.settings["path"] == "packed"
    assert found.settings["device"] == "cpu, cuda:0"
    expected = explained(plain, mode=mode, factor=0.1).scores
    torch.testing.assert_close(found.scores, expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(by_full_rows(model, mode=mode, factor=0.1).scores, expected, atol=2e-4, rtol=0)


@cuda
def test_shared_prefixes_on_two_devices():
    plain, model = tiny_models.build("llama"), split(tiny_models.build("llama"))
    masks = torch.rand(60, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    units = [(0, 15), (16, 31), (32, len(PROMPT))]
    found = []
    for one in (plain, model):
        explainer = ak.Explainer(one, tiny_models.tokenizer(), progress=False, token_budget=24)
        found.append(explainer.ablate(PROMPT, ANSWER, units, masks=masks))
    assert found[1].settings["path"] == "packed"
    assert found[1].stats["tokens_through_model"] == found[0].stats["tokens_through_model"]
    torch.testing.assert_close(found[1].logprobs, found[0].logprobs, atol=2e-4, rtol=0)


@cuda
def test_patterns_of_images_on_two_devices():
    family = "paligemma"  # whose prompt is bidirectional
    plain, model = tiny_image_models.build(family), split(tiny_image_models.build(family))
    found = [
        image_text_cases.explainer_of(family, one).explain(
            text=image_text_cases.TEXTS[family], target=image_text_cases.ANSWER, images=image_text_cases.PICTURE
        )
        for one in (plain, model)
    ]
    assert found[1].settings["path"] == "packed"
    torch.testing.assert_close(found[1].scores, found[0].scores, atol=2e-4, rtol=0)


@cuda
@pytest.mark.parametrize("method", ["rollout", "input_x_gradient", "attnlrp"])
def test_methods_on_two_devices(method):
    plain, model = tiny_models.build("llama"), split(tiny_models.build("llama"))
    expected = explained(plain, method=method).scores
    torch.testing.assert_close(explained(model, method=method).scores, expected, atol=1e-3, rtol=1e-3)


@cuda
def test_suppression_on_two_devices():
    plain, model, tokenizer = tiny_models.build("llama"), split(tiny_models.build("llama")), tiny_models.tokenizer()
    ids, factor = tokenizer(PROMPT, return_tensors="pt").input_ids, torch.ones(1, N)
    factor[0, 3] = 0
    logits = []
    for one in (plain, model):
        with ak.suppress(one, factor, queries=(5, None), value_factor=1 - factor / 2), torch.no_grad():
            logits.append(one(ids).logits)
    torch.testing.assert_close(logits[1], logits[0], atol=2e-4, rtol=0)
    with torch.no_grad():
        assert (plain(ids).logits - logits[0]).abs().max() > 1e-2


@cuda
@pytest.mark.parametrize("where", ["memory", "part of it in memory"])
def test_weights_from_memory_run_on_the_other_device(where, tmp_path):
    plain, model = tiny_models.build("llama"), tiny_models.build("llama")
    if where == "memory":
        model = accelerate.cpu_offload(model, execution_device=torch.device("cuda:0"))
    else:
        places = dict.fromkeys(BESIDE, "cuda:0") | {f"model.layers.{i}": "cpu" if i else "cuda:0" for i in range(3)}
        model = accelerate.dispatch_model(model, places)
    found = explained(model)
    assert (found.settings["path"], found.settings["device"]) == ("packed", "cuda:0")
    torch.testing.assert_close(found.scores, explained(plain).scores, atol=2e-4, rtol=0)
