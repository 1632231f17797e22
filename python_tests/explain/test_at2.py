"""AT2: scores against transformers' eager attention, learning against an oracle of its own, files, what is refused."""

import json
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from at2_files import even_weights
from click.testing import CliRunner
from safetensors.torch import save_file

import atman_kernels as ak
from atman_kernels.cli import main
from atman_kernels.explain.at2_fitting import fit_at2, fitted
from atman_kernels.explain.head_weights import HeadWeights
from atman_kernels.explain.methods import attention

PROMPTS = ["w5 w6 w7 w8 w9 w10 w11 w12", "w33 w3 w40 w41 w5 w6", "w60 w61 w62 w63 w64 w65 w66"]
ANSWERS = ["w20 w21 w22", "w9", "w71 w72"]


@pytest.fixture(scope="module")
def llama():
    return tiny_models.build("llama")


def explainer_of(model):
    return ak.Explainer(model, tiny_models.tokenizer(), progress=False)


def ids_of(*texts):
    return [torch.tensor(tiny_models.tokenizer()(text, add_special_tokens=False)["input_ids"]) for text in texts]


def eager(model, ids, mask=None, left=0.0):
    """(log-probs, per layer the attention weights) of transformers' own eager attention.

    Args:
        mask: tokens whose keys are there; of the others, `left` is left.
    """
    if mask is not None:
        gone = torch.full_like(ids, left, dtype=torch.float32).log()
        later = torch.full((len(ids), len(ids)), -torch.inf).triu(1)
        mask = mask[None].long() if left == 0 else (torch.where(mask, 0.0, gone) + later)[None, None]
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(
            ids[None],
            attention_mask=mask,
            position_ids=torch.arange(len(ids))[None],
            output_attentions=True,
            use_cache=False,
        )
    model.set_attn_implementation(before)
    return out.logits[0].double().log_softmax(-1), torch.stack([weights[0] for weights in out.attentions])


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2", "gpt_oss"])  # window, softcap, sinks
def test_scores_are_the_models_own_attention(family, tmp_path):
    model = tiny_models.build(family)
    prompt, answer = ids_of(PROMPTS[0], ANSWERS[0])
    _, weights = eager(model, torch.cat([prompt, answer[:-1]]))
    rows = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
    heads = torch.randn(weights.shape[:2], generator=torch.Generator().manual_seed(0))
    HeadWeights.of(model, heads, {}).save(tmp_path / "w")
    found = explainer_of(model).explain(PROMPTS[0], ANSWERS[0], method="at2", weights=tmp_path / "w")
    expected = torch.einsum("lh,lhmk->km", heads, weights[:, :, rows])[: len(prompt)]
    torch.testing.assert_close(found.scores, expected, atol=1e-5, rtol=1e-5)


def oracle(model, samples, steps, seed, factor):
    """AT2 from scratch: eager attention, whole forwards under an attention mask, Pearson's correlation, Adam."""
    features, responses = [], []
    for number, (prompt, answer) in enumerate(zip(map(ids_of, PROMPTS), map(ids_of, ANSWERS), strict=True)):
        prompt, answer = prompt[0], answer[0]
        ids, n = torch.cat([prompt, answer[:-1]]), len(prompt)
        rows = torch.arange(n - 1, len(ids))
        _, weights = eager(model, ids)
        to_token = weights[:, :, rows].mean(2)[..., :n].flatten(0, 1)  # [layers · heads, n]
        there = torch.rand(samples, n, generator=torch.Generator().manual_seed(seed + number)) < 0.5
        logits = []
        for kept in there:
            mask = torch.cat([kept, torch.ones(len(ids) - n, dtype=torch.bool)])
            # a suppressed token is seen by none, itself included; no row that counts depends on it
            p = eager(model, ids, mask, factor)[0][rows, answer].sum()
            logits.append(p - torch.log(-torch.expm1(p)))
        features.append(torch.where(there, 1.0, -1.0) @ to_token.T)
        responses.append(torch.stack(logits).float())
    w = torch.full((features[0].shape[1],), 1 / features[0].shape[1], requires_grad=True)
    adam = torch.optim.Adam([w], 1e-3)
    for step in range(steps):
        adam.param_groups[0]["lr"] = 1e-3 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item()) / 2
        pairs = [torch.stack([x @ w, y]) for x, y in zip(features, responses, strict=True)]
        loss = -torch.stack([torch.corrcoef(pair)[0, 1] for pair in pairs]).mean()
        (gradient,) = torch.autograd.grad(loss, w)
        w.grad = gradient * min(1.0, 1 / gradient.norm().item())
        adam.step()
    return (w / w.abs().sum()).detach()


@pytest.mark.parametrize(("family", "factor"), [("llama", 0.0), ("gpt2", 0.0), ("llama", 0.4)])
def test_what_is_learned_is_what_an_oracle_learns(family, factor):
    model = tiny_models.build(family)
    explainer = ak.Explainer(model, tiny_models.tokenizer(), factor=factor, progress=False)
    found = fit_at2(explainer, PROMPTS, ANSWERS, samples=12, steps=60, seed=5)
    expected = oracle(model, 12, 60, 5, factor)
    assert found.weights.shape == (3, 4)
    torch.testing.assert_close(found.weights.flatten(), expected, atol=2e-4, rtol=2e-3)
    assert expected.max() > 1.2 * expected.min(), "it learned something"
    assert found.fit == {
        "prompts": 3, "samples": 12, "steps": 60, "seed": 5,
        "suppression": {"mode": "log_additive", "factor": factor, "similarity_threshold": None, "layers": None},
    }  # fmt: skip


def test_learning_comes_near_the_best_there_is():
    """Of one prompt, the largest correlation is that of least squares."""
    draw = torch.Generator().manual_seed(1)
    features = torch.randn(1, 40, 5, generator=draw)
    responses = features @ torch.tensor([0.3, 0.02, -0.1, 0.0, 0.2]) + 0.05 * torch.randn(1, 40, generator=draw)
    found = fitted(features, responses, 1500, 0)
    x, y = features[0] - features[0].mean(0), responses[0] - responses[0].mean()
    best = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    correlations = [torch.corrcoef(torch.stack([x @ w, y]))[0, 1].item() for w in (found, best)]
    assert correlations[0] > correlations[1] - 1e-3
    assert found.abs().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_prompts_that_tell_nothing_are_left_out():
    features = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))
    responses = torch.stack([torch.ones(8), features[1] @ torch.tensor([1.0, 0.0, 0.0])])
    torch.testing.assert_close(fitted(features, responses, 20, 0), fitted(features[1:], responses[1:], 20, 0))
    with pytest.raises(ak.InputError, match="there is nothing to learn from"):
        fitted(features, torch.ones(2, 8), 20, 0)


# Files -------------------------------------------------------------------------------------------------------------


def test_a_file_keeps_everything(llama, tmp_path):
    first = HeadWeights.of(llama, torch.rand(3, 4, generator=torch.Generator().manual_seed(0)), {"prompts": 7})
    first.save(tmp_path / "w")
    again = HeadWeights.load(tmp_path / "w")
    assert torch.equal(again.weights, first.weights)
    assert (again.model, again.fit) == ("LlamaForCausalLM", {"prompts": 7})
    again.check(llama)


def test_a_model_is_known_again_in_any_dtype(llama, tmp_path):
    path = even_weights(llama, tmp_path)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        HeadWeights.load(path).check(tiny_models.build("llama").to(dtype))


def test_records_say_what_is_in_the_file_and_not_where_it_lies(llama, tmp_path):
    found = explainer_of(llama).explain(
        PROMPTS[0], ANSWERS[0], method="at2", weights=str(even_weights(llama, tmp_path))
    )
    assert str(tmp_path) not in json.dumps(found.settings)
    recorded = found.settings["options"]["weights"]
    assert recorded["file"] == "LlamaForCausalLM.safetensors"
    assert len(recorded["sha256"]) == 64


def test_weights_of_another_model_are_refused_by_name(llama, tmp_path):
    path = even_weights(llama, tmp_path)
    with pytest.raises(ak.InputError, match="fitted on 'LlamaForCausalLM', and this is another model, 'GPT2LMHeadM"):
        explainer_of(tiny_models.build("gpt2")).explain(PROMPTS[0], ANSWERS[0], method="at2", weights=path)
    tuned = tiny_models.build("llama")
    tuned.model.layers[1].self_attn.q_proj.weight.data.add_(0.01)
    with pytest.raises(ak.InputError, match="fitted on 'LlamaForCausalLM', and this is another model of that name"):
        explainer_of(tuned).explain(PROMPTS[0], ANSWERS[0], method="at2", weights=path)


def damaged(llama, folder, **metadata):
    whole = {"format": "atman-at2", "version": "1", "model": "x", "fit": "{}"} | metadata
    tensors = {"weights": torch.full((3, 4), torch.nan), "sample": torch.zeros(1)}
    save_file(tensors, folder / "w", {name: value for name, value in whole.items() if value})
    return folder / "w"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda llama, folder: folder / "none", "none' is no file; expected one that atman bench fit-at2 wrote"),
        (lambda llama, folder: folder, "is no file"),
        (lambda llama, folder: 3, "weights must be a path, got int 3"),
        (lambda llama, folder: "", "weights must be a path"),
        (lambda llama, folder: (folder / "w").write_text("{}") and folder / "w", "cannot be read as safetensors"),
        (lambda llama, folder: damaged(llama, folder, format="else"), "holds no weights of AT2"),
        (lambda llama, folder: damaged(llama, folder, version="2"), "has version '2'; this package reads '1'"),
        (lambda llama, folder: damaged(llama, folder, fit=""), "cannot be read as safetensors"),
        (lambda llama, folder: damaged(llama, folder), "is damaged: expected .layers, heads. finite numbers"),
    ],
)  # fmt: skip
def test_other_files_are_refused_before_the_model_runs(llama, tmp_path, monkeypatch, make, message):
    monkeypatch.setattr(llama, "forward", lambda *a, **k: pytest.fail("the model ran"))
    with pytest.raises(ak.InputError, match=message):
        explainer_of(llama).explain(PROMPTS[0], ANSWERS[0], method="at2", weights=make(llama, tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "prompts must be a list with at least one prompt, got none"),
        ({"prompts": PROMPTS, "targets": ["w1"]}, "targets has 1 entries for 3 prompts"),
        ({"prompts": PROMPTS, "targets": ANSWERS, "samples": 1}, "samples must be an integer from 2"),
        ({"prompts": PROMPTS, "targets": ANSWERS, "steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"prompts": PROMPTS, "targets": ANSWERS, "seed": -1}, "seed must be an integer"),
        ({"prompts": PROMPTS, "targets": ANSWERS, "units": ["token"]}, "units has 1 entries for 3 prompts"),
        ({"prompts": [{"input_ids": [[1]]}], "targets": ["w1"]}, "AT2 is fitted on texts"),
        ({"prompts": PROMPTS[:1], "targets": ["w1"], "units": [("sentence", "word")]}, "fitted on units of one level"),
    ],
)
def test_what_learning_refuses(llama, monkeypatch, arguments, message):
    monkeypatch.setattr(llama, "forward", lambda *a, **k: pytest.fail("the model ran"))
    with pytest.raises(ak.InputError, match=message):
        fit_at2(explainer_of(llama), **arguments)


def test_layers_with_different_numbers_of_heads_are_refused(llama, monkeypatch):
    def uneven(model, question, tell):
        tell(0, torch.zeros(4, 1, len(question.ids) - 1))
        tell(1, torch.zeros(2, 1, len(question.ids) - 1))

    monkeypatch.setattr("atman_kernels.explain.at2_fitting.each_layer", uneven)
    with pytest.raises(ak.UnsupportedModelError, match="layers of LlamaForCausalLM have different numbers of heads"):
        fit_at2(explainer_of(llama), PROMPTS, ANSWERS)


@pytest.mark.parametrize("stage", [None, "the first"])
def test_a_model_that_is_shared_among_processes_is_refused(llama, monkeypatch, stage):
    """A rank would learn weights of its own heads alone."""
    explainer = explainer_of(llama)
    monkeypatch.setattr("atman_kernels.explain.methods.ranks_of", lambda _: SimpleNamespace(size=2, stage=stage))
    monkeypatch.setattr(llama, "forward", lambda *a, **k: pytest.fail("the model ran"))
    with pytest.raises(ak.UnsupportedModelError, match="'at2' needs all heads and layers of LlamaForCausalLM in one"):
        fit_at2(explainer, PROMPTS, ANSWERS)


def test_progress_is_told_in_tokens(llama):
    told = []
    explainer = ak.Explainer(llama, tiny_models.tokenizer(), progress=lambda done, total: told.append((done, total)))
    fit_at2(explainer, PROMPTS[:2], ANSWERS[:2], samples=4, steps=2)
    assert told == [(0, 64), (40, 64), (64, 64)]


def test_no_matrix_of_all_layers_is_kept(llama, monkeypatch):
    """Every layer gives the answer's rows, and only those."""
    shapes = []
    own = attention._weights
    monkeypatch.setattr(attention, "_weights", lambda *a: shapes.append(own(*a).shape) or own(*a))
    fit_at2(explainer_of(llama), PROMPTS[:1], ANSWERS[:1], samples=2, steps=1)
    assert shapes == [(4, 3, 10)] * 3


# The commands ------------------------------------------------------------------------------------------------------

CONTEXT = "The keeper had a grey dog named Pilot. The dog Pilot rang the bell."


def run(*arguments):
    return CliRunner().invoke(main, [str(each) for each in arguments])


def test_fitted_and_compared_on_the_command_line(tiny_llama, tmp_path):
    questions = [
        {"id": "a", "question": "Name?", "answers": [{"text": "Pilot", "answer_start": 47}]},
        {"id": "d", "question": "Colour?", "answers": [{"text": "grey dog", "answer_start": 17}]},
    ]
    content = {"data": [{"title": "x", "paragraphs": [{"context": CONTEXT, "qas": questions}]}]}
    squad, out, table = tmp_path / "s.json", tmp_path / "w.safetensors", tmp_path / "t.json"
    squad.write_text(json.dumps(content))
    common = ("--squad", squad, "--split", "all", "--model", tiny_llama, "--dtype", "float32")
    made = run("bench", "fit-at2", *common, "--out", out, "--samples", 4)
    assert made.exit_code == 0, made.output
    assert HeadWeights.load(out).fit["prompts"] == 2
    names = "direct,search,contextcite_32,at2,atman"
    compared = ("bench", "quality", *common, "--methods", names, "--passage-only", "--results", tmp_path / "r.jsonl")
    found = run(*compared, "--at2-weights", out, "--json", table)
    assert found.exit_code == 0, found.output
    found = json.loads(table.read_text())
    assert [row["setting"] for row in found["rows"]] == names.split(",")
    assert found["settings"]["direct"]["options"] == {"recompute": 1}
    assert found["settings"]["search"]["options"] == {"exact": 16}
    assert found["settings"]["contextcite_32"] | {"explainer": 0} == {
        "method": "lasso", "options": {"samples": 32}, "explainer": 0,
    }  # fmt: skip
    assert found["settings"]["at2"]["options"]["weights"]["file"] == "w.safetensors"
    assert found["passage_only"] is True
    refitted = run("bench", "fit-at2", *common, "--out", out, "--samples", 5)
    assert refitted.exit_code == 0
    other = run(*compared, "--at2-weights", out)
    assert (other.exit_code, "is of another run: setting 'at2'" in other.stderr) == (2, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--methods", "at2"), "at2 needs --at2-weights FILE, which atman bench fit-at2 writes"),
        (("--methods", "contextcite_99"), "'contextcite_99' is none of atman, "),
        (("--methods", "atman", "--at2-weights", "w"), "which --methods leaves out"),
        (("--methods", "at2", "--at2-weights", "w"), "'w' is no file"),
        (("--sweep", "--at2-weights", "w"), "leave out --methods and --at2-weights"),
    ],
)
def test_what_the_comparison_refuses(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    questions = [{"id": "a", "question": "Name?", "answers": [{"text": "Pilot", "answer_start": 47}]}]
    content = {"data": [{"title": "x", "paragraphs": [{"context": CONTEXT, "qas": questions}]}]}
    (tmp_path / "s.json").write_text(json.dumps(content))
    found = run("bench", "quality", "--squad", "s.json", "--split", "all", "--model", "nowhere", *options)
    assert (found.exit_code, message in found.stderr) == (2, True), found.stderr
