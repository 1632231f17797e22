"""Chat messages: contents of parts, and what is wrong with a message or a template."""

import copy
import re

import jinja2
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import atman_kernels as ak

QUESTION = "The dog is named Pilot."
ASKED = [{"role": "user", "content": QUESTION}]
# goes through the parts of a content, as SmolVLM's does; a plain text would be left out without a word
OF_PARTS = (
    "{% for m in messages %}{{ m.role }}:{% for p in m.content %}{% if p['type'] == 'text' %}{{ p['text'] }}"
    "{% endif %}{% endfor %}{% endfor %}"
)
STRICT = (
    "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}"
    "{{ raise_exception('Only user and assistant') }}{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
)
CALLING = (
    "{% for m in messages %}{{ m.content or '' }}{% for c in m.tool_calls or [] %}<{{ c.name }}>{% endfor %}"
    "{% endfor %}"
)


@pytest.fixture(scope="module")
def model(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama)


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return copy.copy(tiny_tokenizer)


def prompt_of(model, tokenizer, messages, **options):
    explainer = ak.Explainer(model, tokenizer, progress=False)
    return explainer.explain(messages, " Pilot", "word", **options).prompt


def part(text):
    return {"type": "text", "text": text}


@pytest.mark.parametrize(
    "content",
    [
        [part(QUESTION)],
        [part("The dog"), part(" is named Pilot.")],
        [{"text": "The dog"}, " is named Pilot."],
        (part(QUESTION),),
        np.array([part(QUESTION)], dtype=object),
    ],
)
def test_parts_of_text_are_their_text(model, tokenizer, content):
    expected = prompt_of(model, tokenizer, ASKED)
    assert expected == f"[user] {QUESTION}\n[assistant] "
    assert prompt_of(model, tokenizer, [{"role": "user", "content": content}]) == expected
    with ak.steer(model, tokenizer, [{"role": "user", "content": content}], {"Pilot": 0.5}) as steered:
        assert steered.texts == (expected,)


@pytest.mark.parametrize("make", [tuple, iter, lambda m: np.array(m, dtype=object)])
def test_messages_in_any_kind_of_list(model, tokenizer, make):
    assert prompt_of(model, tokenizer, make(ASKED)) == prompt_of(model, tokenizer, ASKED)


def test_a_template_of_parts_gets_parts(model, tokenizer):
    tokenizer.chat_template = OF_PARTS
    for given, options in ((ASKED, {}), (QUESTION, {"chat": True}), ([ASKED[0] | {"content": [part(QUESTION)]}], {})):
        assert prompt_of(model, tokenizer, given, **options) == f"user:{QUESTION}"


def test_what_else_a_message_holds_reaches_the_template(model, tokenizer):
    tokenizer.chat_template = CALLING
    calls = [*ASKED, {"role": "assistant", "content": None, "tool_calls": [{"name": "bark"}]}]
    assert prompt_of(model, tokenizer, calls) == f"{QUESTION}<bark>"
    assert (
        prompt_of(model, tokenizer, [calls[0], {k: v for k, v in calls[1].items() if k != "content"}])
        == f"{QUESTION}<bark>"
    )


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user"}], "prompt[0] has no 'content'"),
        ([*ASKED, {"content": "x"}], "prompt[1] has no 'role'"),
        ([{"role": "user", "content": None}], "prompt[0]['content'] must be a list of parts, or a text, got None"),
        ([{"role": "user", "content": 3}], "prompt[0]['content'] must be a list of parts, or a text, got int 3"),
        ([{"role": "user", "content": {"a": 1}}], "prompt[0]['content'] must be a list of parts, or a text, got dict"),
        ([{"role": 3, "content": "x"}], "prompt[0]['role'] must be a text, got int 3"),
        ([{"role": "", "content": "x"}], "prompt[0]['role'] is empty"),
        ([{"role": "user", "content": [3]}], "prompt[0]['content'][0] must be a part"),
        ([{"role": "user", "content": [{}]}], "prompt[0]['content'][0] has no 'type'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "prompt[0]['content'][0] has no 'text'"),
        ([{"role": "user", "content": [part(None)]}], "prompt[0]['content'][0]['text'] must be a text, got None"),
        ([{"role": "user", "content": [{"type": "image"}]}], "prompt[0]['content'][0] is of type 'image'"),
        ([*ASKED, "x"], "prompt[1] must be a chat message {'role': …, 'content': …}, got str 'x'"),
        (["x", "y"], "prompt must be a text or a list of chat messages, got list ['x', 'y']; several prompts go to"),
        (ASKED[0], "prompt must be a text or a list of chat messages, got dict"),
        ([], "prompt is empty"),
    ],
)
def test_the_wrong_message_and_its_key_are_named(model, tokenizer, monkeypatch, messages, message):
    monkeypatch.setattr(model, "forward", lambda *a, **k: pytest.fail("the model ran"))
    with pytest.raises(ak.InputError, match=re.escape(message)):
        prompt_of(model, tokenizer, messages)
    if isinstance(messages, list) and messages and isinstance(messages[0], dict):
        with pytest.raises(ak.InputError, match=re.escape(message)), ak.steer(model, tokenizer, messages, {}):
            pass


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (STRICT, [*ASKED, {"role": "tool", "content": "x"}], "prompt[1]['role'] is 'tool': .* Only user and assistant"),
        ("{% for m in messages %}", ASKED, "chat template is broken in line 1"),
        ("{{ nothing.here.at_all }}", ASKED, "prompt[0]['role'] is 'user': .*'nothing' is undefined"),
        ("{{ messages[0].content + 1 }}", ASKED, "prompt[0]['role'] is 'user': .* take this message: "),
        ("{{ messages[3].content.x }}", ASKED, "prompt[0]['role'] is 'user': "),
        ("{{ 1 / 0 }}", ASKED, "prompt[0]['role'] is 'user': .*division"),
        ("", ASKED, "no chat template"),
        ("{# nothing #}", ASKED, "prompt is empty: the tokenizer's chat template makes no text"),
    ],
)
def test_templates_that_refuse_or_are_broken(model, tokenizer, template, messages, message):
    tokenizer.chat_template = template
    with pytest.raises(ak.InputError, match=re.escape(message).replace(r"\.\*", ".*")) as error:
        prompt_of(model, tokenizer, messages)
    assert not isinstance(error.value, jinja2.TemplateError)


def test_an_answer_is_explained_like_the_text_that_the_template_makes(model, tokenizer):
    explainer = ak.Explainer(model, tokenizer, progress=False)
    by_messages = explainer.explain([ASKED[0] | {"content": [part(QUESTION)]}], " Pilot")
    by_text = explainer.explain(f"[user] {QUESTION}\n[assistant] ", " Pilot")
    assert torch.equal(by_messages.scores, by_text.scores)
