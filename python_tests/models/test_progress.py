"""Who is told how far an explanation is, and how it is stopped."""

import pytest
import tiny_configs
import tiny_models
import torch
import transformers as hf
from model_snapshot import snapshot
from shared_grid import on_a_shared_grid
from tiny_encoders import CLASSIFIERS

import atman_kernels as ak
from atman_kernels.progress import Listener, listening

PROMPT = "w5 w6 w7 w8 w9 w10 w11 w12"
ANSWER = "w20 w21"
# what each way of running variants is tried on: model -> an explanation of it
WAYS = {
    "packed": lambda: tiny_models.build("llama"),
    "rows": lambda: tiny_configs.tiny_model(hf.Lfm2Config, hf.Lfm2ForCausalLM),
    "rows alone": lambda: on_a_shared_grid(tiny_models.build("llama")),
    "whole": CLASSIFIERS["bert"],
}


def explain(model, progress=False, **settings):
    explainer = ak.Explainer(model, tiny_models.tokenizer(), progress=progress, token_budget=20, **settings)
    return explainer.explain(PROMPT, None if explainer.task != "text-generation" else ANSWER)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:.*cannot (be packed|run rows)")
def test_a_function_is_told_of_every_forward(way):
    told = []
    explain(WAYS[way](), lambda done, total: told.append((done, total)))
    done, totals = zip(*told, strict=True)
    assert done[0] == 0
    assert done[-1] == totals[-1]
    assert len(told) >= 3
    last = max(index for index, count in enumerate(done) if count == 0)  # it may begin anew once, in other packs
    assert list(done[last:]) == sorted(set(done[last:]))
    assert len(set(totals[last:])) == 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.filterwarnings("ignore:.*cannot (be packed|run rows)")
def test_what_it_raises_ends_the_work_and_leaves_the_model_as_it_was(way, after):
    model, done_when_stopped = WAYS[way](), []
    expected = explain(model).scores
    before = snapshot(model)

    def stop(done, total):
        if done >= after:
            done_when_stopped.append(done)
            raise ak.Cancelled("enough")

    with pytest.raises(ak.Cancelled, match="enough"):
        explain(model, stop)
    assert len(done_when_stopped) == 1  # and nothing went on
    assert snapshot(model) == before
    torch.testing.assert_close(explain(model).scores, expected, rtol=0, atol=0)


def test_a_cancelled_explainer_serves_again():
    stops = [True]

    def stop_once(done, total):
        if done and stops:
            stops.pop()
            raise ak.Cancelled

    model = tiny_models.build("llama")
    explainer = ak.Explainer(model, tiny_models.tokenizer(), progress=stop_once, token_budget=20)
    with pytest.raises(ak.Cancelled):
        explainer.explain(PROMPT, ANSWER)
    torch.testing.assert_close(explainer.explain(PROMPT, ANSWER).scores, explain(model).scores)


@pytest.mark.parametrize("bad", [int, object()])
def test_neither_a_flag_nor_a_function(bad):
    with pytest.raises(ak.InputError, match=r"^progress must be True or False, or a function of"):
        ak.Explainer(tiny_models.build("llama"), tiny_models.tokenizer(), progress=bad)


class Hearing(Listener):
    def __init__(self):
        self.answers, self.questions, self.scores, self.progress = [], (), {}, []

    def answering(self):
        self.answers.append([])
        return self.answers[-1].append

    def asked(self, questions):
        assert not self.scores
        self.questions = questions

    def progressed(self, done, total):
        self.progress.append((done, total))

    def found(self, question, unit, scores):
        assert (question, unit) not in self.scores
        self.scores[question, unit] = scores.clone()


@pytest.mark.parametrize("way", ["packed", "rows", "rows alone"])
@pytest.mark.filterwarnings("ignore:.*cannot (be packed|run rows)")
def test_a_listener_hears_answers_and_units_of_every_prompt(way):
    heard, model, tokenizer = Hearing(), WAYS[way](), tiny_models.tokenizer()
    model.generation_config.eos_token_id = tokenizer.eos_token_id = None
    explainer = ak.Explainer(model, tokenizer, progress=False)
    with listening(heard):
        found = explainer.explain_batch([PROMPT, "w3 w4 w5", "w6 w7"], [ANSWER, None, None], max_new_tokens=3)
    assert [tokenizer.decode(ids) for ids in heard.answers] == [each.target for each in found[1:]]
    assert [question.prompt for question in heard.questions] == [each.prompt for each in found]
    assert heard.scores.keys() == {(q, u) for q, each in enumerate(found) for u in range(len(each.units))}
    for (question, unit), scores in heard.scores.items():
        torch.testing.assert_close(scores, found[question].scores[unit])
    assert heard.progress[-1][0] == heard.progress[-1][1] > 0

    told = len(heard.progress)
    explainer.explain(PROMPT, ANSWER)
    assert len(heard.progress) == told  # nobody listens any more


def test_a_listener_ends_an_answer_between_two_tokens():
    class Stopping(Hearing):
        def answering(self):
            tell = super().answering()

            def stop(token):
                tell(token)
                if len(self.answers[-1]) == 2:
                    raise ak.Cancelled

            return stop

    heard, model = Stopping(), tiny_models.build("llama")
    model.generation_config.eos_token_id = None
    explainer = ak.Explainer(model, tiny_models.tokenizer(), progress=False)
    before = snapshot(model)
    with listening(heard), pytest.raises(ak.Cancelled):
        explainer.explain(PROMPT, max_new_tokens=8)
    assert [len(answer) for answer in heard.answers] == [2]
    assert snapshot(model) == before
