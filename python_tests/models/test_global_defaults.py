"""Nothing of ours takes its dtype or its device from torch's global defaults, which loading code may leave."""

import ast
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers as hf

import atman_kernels as ak
from atman_kernels.evaluation import metrics

PACKAGE = Path(ak.__file__).parent
MAKE_TENSORS = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn"}
MAKE_TENSORS |= {"randperm", "tensor", "zeros"}
TAKE_THE_DEFAULT_DTYPE = MAKE_TENSORS - {"arange", "as_tensor", "randint", "randperm", "tensor"}

PROMPT, ANSWER = "w3 w4 w5 w6 w7 w8", " w20 w21"


def makers_without(path: Path) -> list[str]:
    """Calls such as torch.ones that leave the device, or the dtype, to whatever is set."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"):
            continue
        given = {keyword.arg for keyword in node.keywords}
        needed = {"device"} if node.func.attr in MAKE_TENSORS else set()
        needed |= {"dtype"} if node.func.attr in TAKE_THE_DEFAULT_DTYPE else set()
        if None not in given and needed - given:
            found.append(f"{path.name}:{node.lineno}: torch.{node.func.attr} without {', '.join(needed - given)}")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_new_tensor_says_its_dtype_and_device(path):
    assert not makers_without(path)


def explained(model, tokenizer, method="atman", **options):
    settings = {name: options.pop(name) for name in ("factor", "similarity_threshold", "mode") if name in options}
    explainer = ak.Explainer(model, tokenizer, progress=False, **settings)
    return explainer.explain(PROMPT, ANSWER, method=method, **options).scores


def batched(model, tokenizer):
    explainer = ak.Explainer(model, tokenizer, progress=False, factor=0.1)
    explainer.runner.unpackable = "not wanted"
    return explainer.explain(PROMPT, ANSWER).scores


def ablated(model, tokenizer):
    masks = [[True, False, True, False, False, False], [True, True, True, False, False, True]] * 4
    return ak.Explainer(model, tokenizer, progress=False).ablate(PROMPT, ANSWER, masks=masks).logprobs


def suppressed(model, tokenizer, **options):
    ids = torch.tensor([tokenizer(PROMPT).input_ids], device="cpu")
    factor = torch.tensor([[1.0, 0.1, 1.0, 0.3, 1.0, 1.0]], dtype=torch.float32, device="cpu")
    with torch.no_grad(), ak.suppress(model, factor, **options):
        return model(ids).logits


def steered(model, tokenizer):
    with torch.no_grad(), ak.steer(model, tokenizer, [PROMPT, "w5 w6"], [{"w4": 0.1}, {"w6": 3.0}]) as steering:
        return model(**steering.inputs).logits


def encoded(model, tokenizer):
    config = hf.BertConfig(
        num_labels=3, vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    bert = hf.BertForSequenceClassification._from_config(config, dtype=torch.float32).to("cpu").eval()
    return ak.Explainer(bert, tokenizer, factor=0.1, progress=False).explain(PROMPT, target=1).scores


def measured(model, tokenizer):
    relevance = torch.tensor([0.1, 0.9, 0.3], dtype=torch.float64, device="cpu")
    truth = torch.tensor([False, True, True], device="cpu")
    localised = metrics.localisation([relevance], [truth])
    return torch.stack([localised.precision, localised.recall])


THINGS = {
    "packed": lambda *given: explained(*given, factor=0.1),
    "shifted": lambda *given: explained(*given, factor=0.1, mode="shifted"),
    "neighbours": lambda *given: explained(*given, factor=0.1, similarity_threshold=0.1),
    "batched": batched,
    "versus": lambda *given: explained(*given, factor=0.1, versus=" w33"),
    "ablated": ablated,
    "shapley": lambda *given: explained(*given, "shapley", permutations=4),
    "lasso": lambda *given: explained(*given, "lasso", samples=16),
    "random": lambda *given: explained(*given, "random"),
    "integrated_gradients": lambda *given: explained(*given, "integrated_gradients", steps=2, batch=1),
    "attnlrp": lambda *given: explained(*given, "attnlrp"),
    "chefer": lambda *given: explained(*given, "chefer"),
    "suppressed": suppressed,
    "some queries": lambda *given: suppressed(*given, queries=(2, 5)),
    "steered": steered,
    "encoder": encoded,
    "metrics": measured,
}


@pytest.fixture(scope="module")
def expected():
    model, tokenizer = tiny_models.build("llama"), tiny_models.tokenizer()
    return model, tokenizer, {name: do(model, tokenizer) for name, do in THINGS.items()}


@pytest.mark.filterwarnings("ignore:integrated gradients have not converged")
@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, "meta"], ids=str)
def test_results_are_the_same_under_other_defaults(expected, thing, default):
    model, tokenizer, results = expected
    if default == "meta" and thing == "encoder":
        pytest.skip("transformers builds models on the default device")
    dtype = torch.get_default_dtype()
    try:
        if isinstance(default, torch.dtype):
            torch.set_default_dtype(default)
        else:
            torch.set_default_device(default)
        found = THINGS[thing](model, tokenizer)
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(None)
    assert found.dtype == results[thing].dtype
    assert torch.equal(found, results[thing])
