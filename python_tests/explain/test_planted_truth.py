"""On a task whose right explanation is known, the explanation is right.

The model is trained here, on look-ups among records (see `benchmarks.planted_lookup.task`); the value in the asked
key's record is the only token that can tell the answer.
"""

import pytest
import torch
from recipes import recipe

import atman_kernels as ak
from benchmarks.planted_lookup import task as planted_lookup

MODES = ("log_additive", "multiplicative", "shifted")
PROMPTS = 100
FACTOR = 0.1


@pytest.fixture(scope="module")
def tokenizer():
    return planted_lookup.tokenizer()


@pytest.fixture(scope="module")
def model():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products this small gain nothing from more, and sum in one order only
    try:
        yield planted_lookup.train(seed=0)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def answered(model, tokenizer):
    """Look-ups that training did not see and the model answers; it must answer nearly all."""
    asked = planted_lookup.look_ups(PROMPTS + 10, seed=20_000)
    ids = torch.tensor([tokenizer(look_up.prompt)["input_ids"] for look_up in asked])
    with torch.no_grad():
        answers = tokenizer.batch_decode(model(ids).logits[:, -1:].argmax(-1))
    right = [look_up for look_up, answer in zip(asked, answers, strict=True) if answer == look_up.answer]
    assert len(right) >= 0.98 * len(asked), f"the model has learned only {len(right)} of {len(asked)}"
    return right[:PROMPTS]


def test_the_answer_stands_where_the_task_says_it_does():
    for look_up in planted_lookup.look_ups(20, seed=3):
        tokens = look_up.prompt.split()
        records = [tokens[i : i + 3] for i in range(0, len(tokens) - 1, 3)]
        assert tokens[look_up.value_position] == look_up.answer
        assert [value for first, second, value in records if first == second == tokens[-1]] == [look_up.answer]
        assert tokens.count(look_up.answer) == 1


@pytest.mark.parametrize("mode", MODES)
def test_the_right_value_comes_first(model, tokenizer, answered, mode):
    explainer = ak.Explainer(model, tokenizer, mode=mode, factor=FACTOR, progress=False)
    missed = []
    for look_up in answered:
        explanation = explainer.explain(look_up.prompt, target=look_up.answer, units="token")
        [(unit, score)] = explanation.top(1)
        assert explanation.settings["path"] == "packed"
        if unit.token_indices != (look_up.value_position,) or score <= 0:
            missed.append(f"{look_up.prompt} -> {look_up.answer}: {unit.text} at {unit.token_indices}, {score:.2g}")
    assert len(answered) == PROMPTS
    assert len(missed) <= 0.05 * PROMPTS, "\n".join(missed)


def test_scores_equal_full_runs_under_a_float_mask(model, tokenizer, answered):
    explainer = ak.Explainer(model, tokenizer, factor=FACTOR, progress=False)
    some = answered[:10]
    ids = [torch.tensor(tokenizer(f"{look_up.prompt} {look_up.answer}")["input_ids"]) for look_up in some]
    expected = torch.stack([planted_lookup.loss_rise_by_float_mask(model, row, FACTOR) for row in ids])
    assert expected.max() > 0.1, "the oracle must move, or the comparison says nothing"
    explanations = [explainer.explain(look_up.prompt, target=look_up.answer) for look_up in some]
    torch.testing.assert_close(torch.stack([e.total for e in explanations]).double(), expected, atol=1e-4, rtol=0)


def test_a_learned_mask_leaves_what_ablation_finds(model, tokenizer, answered):
    """The guide's recipe: one token, which is enough for the answer, and without which there is none."""
    learn_mask, found, some = recipe("learn_mask"), 0, answered[:8]
    explainer = ak.Explainer(model, tokenizer, factor=0.0, progress=False)
    for look_up in some:
        ids = torch.tensor([tokenizer(look_up.prompt)["input_ids"]])
        (answer,) = tokenizer(look_up.answer)["input_ids"]
        kept = learn_mask(model, ids, answer) > 0.5
        [(unit, _)] = explainer.explain(look_up.prompt, target=look_up.answer, units="token").top(1)
        with torch.no_grad():
            with ak.suppress(model, kept[None].float()):
                with_it = int(model(ids).logits[0, -1].argmax())
            with ak.suppress(model, (~kept)[None].float()):
                without = int(model(ids).logits[0, -1].argmax())
        is_found = kept.nonzero().flatten().tolist() == list(unit.token_indices) == [look_up.value_position]
        found += is_found and with_it == answer != without
    assert found >= 0.8 * len(some)
