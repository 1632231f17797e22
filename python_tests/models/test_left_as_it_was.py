"""What was there before an explanation, a suppression or a steering is there after it, module by module."""

import tempfile
from pathlib import Path

import pytest
import sklearn.linear_model  # noqa: F401  (draws random numbers while it is imported for the first time)
import tiny_models
import torch
from at2_files import options_for
from model_snapshot import snapshot

import atman_kernels as ak
from atman_kernels.explain import methods

PROMPT, ANSWER = "w3 w4 w5 w6 w7", " w20 w21"


def used_by_somebody(family):
    """A model in the middle of other work: parts in training, parts frozen, hooked, with settings of its own."""
    model = tiny_models.build(family)
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    next(layers[1].children()).train()  # its parents are not
    next(iter(layers[0].parameters())).requires_grad_(False)
    layers[2].register_forward_hook(lambda module, args, output: None)
    model.generation_config.update(do_sample=True, temperature=0.7, top_k=5, max_new_tokens=3)
    return model


def answered(model):
    return ak.Explainer(model, tiny_models.tokenizer(), progress=False).explain(PROMPT, max_new_tokens=2)


def explained(method):
    def do(model):
        with tempfile.TemporaryDirectory() as folder:
            options = options_for(method, model, Path(folder))
            ak.Explainer(model, tiny_models.tokenizer(), progress=False).explain(
                PROMPT, ANSWER, method=method, **options
            )

    return do


def suppressed(model):
    with ak.suppress(model, torch.tensor([[1.0, 0.0, 1.0]])):
        model(torch.tensor([[4, 5, 6]]))


def steered(model):
    with ak.steer(model, tiny_models.tokenizer(), PROMPT, {"w4": 0.0}) as steering:
        steering.generate(do_sample=False, temperature=None, top_k=None)


def failed(model):
    hook = model.get_output_embeddings().register_forward_hook(lambda *_: 1 / 0)
    try:
        with pytest.raises(ZeroDivisionError):
            explained("atman")(model)
        with pytest.raises(ZeroDivisionError):
            suppressed(model)
    finally:
        hook.remove()


THINGS = {"answer": answered, "suppress": suppressed, "steer": steered, "fail": failed}
THINGS |= {name: explained(name) for name in methods.names()}


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("family", ["llama", "gptj"])
@pytest.mark.filterwarnings("ignore:integrated gradients have not converged")
def test_everything(family, thing):
    if family == "gptj" and thing in ("raw_attention", "rollout", "chefer", "gradcam", "attnlrp"):
        pytest.skip("not for this family")
    model = used_by_somebody(family)
    # transformers keeps hooks and marks of its own once attention weights or an answer were asked for
    model.generate(torch.tensor([[4, 5, 6]]))
    if family == "llama":
        implementation = model.config._attn_implementation
        model.set_attn_implementation("eager")
        model(torch.tensor([[4, 5, 6]]), output_attentions=True)
        model.set_attn_implementation(implementation)
    before = snapshot(model)
    THINGS[thing](model)
    after = snapshot(model)
    for what, value in before.items():
        assert after[what] == value, what
