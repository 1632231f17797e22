"""Our own protocol over real HTTP: explanations are the library's, whoever else asks; and what is refused."""

import json
import logging
import re
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import tiny_models
import torch
from running_service import Gate, events_of, running, until

import atman_kernels as ak

PROMPT, ANSWER = "w5 w6 w7 w8 w9 w10", " w20 w21"
ASKED = {"prompt": PROMPT, "target": ANSWER}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def model():
    model = tiny_models.build("llama")
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}w3"
    return tokenizer


@pytest.fixture(scope="module")
def service(model, tokenizer):
    with running(model, tokenizer, max_tokens=120, max_units=50, max_new_tokens=20, max_bytes=20_000) as found:
        yield found


@pytest.fixture
def gate(model):
    gate = Gate(model)
    yield gate
    gate.remove()


@pytest.fixture(scope="module")
def explainer(model, tokenizer):
    return ak.Explainer(model, tokenizer, progress=False)


def same(response, expected):
    """The response is that explanation."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(json.dumps(response) if isinstance(response, dict) else response.text)
        file.flush()
        found = ak.Explanation.load(file.name)
    assert (found.prompt, found.target, found.units) == (expected.prompt, expected.target, expected.units)
    assert found.target_tokens == expected.target_tokens
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.base_logprobs, expected.base_logprobs, rtol=1e-4, atol=1e-5)


# What is asked, and how the library is asked the same -----------------------------------------------------------------

ALIKE = {
    "given": (ASKED, (PROMPT, ANSWER), {}),
    "own answer": ({"prompt": PROMPT, "max_new_tokens": 3}, (PROMPT,), {"max_new_tokens": 3}),
    "words": ({**ASKED, "units": "word", "language": "de"}, (PROMPT, ANSWER, "word"), {"language": "de"}),
    "spans": ({**ASKED, "units": [[0, 5], [6, 8]]}, (PROMPT, ANSWER, [(0, 5), (6, 8)]), {}),
    "versus": ({**ASKED, "versus": " w30"}, (PROMPT, ANSWER), {"versus": " w30"}),
    "earlier answer tokens": ({**ASKED, "include_target": True}, (PROMPT, ANSWER), {"include_target": True}),
    "chat": ({**ASKED, "chat": True}, (PROMPT, ANSWER), {"chat": True}),
    "direct effect": ({**ASKED, "recompute": 1}, (PROMPT, ANSWER), {"recompute": 1}),
    "messages": (
        {"messages": [{"role": "w4", "content": PROMPT}], "target": ANSWER},
        ([{"role": "w4", "content": PROMPT}], ANSWER),
        {},
    ),
    "method": (
        {**ASKED, "method": "shapley", "options": {"permutations": 4, "seed": 3}},
        (PROMPT, ANSWER),
        {"method": "shapley", "permutations": 4, "seed": 3},
    ),
}


@pytest.mark.parametrize("name", ALIKE)
def test_an_explanation_is_the_librarys(service, explainer, name):
    body, given, options = ALIKE[name]
    response = service.explain(**body)
    assert response.status_code == 200, response.text
    same(response, explainer.explain(*given, **options))


def test_the_strongest_exactly(service, explainer):
    prompt = " ".join(f"w{5 + number % 90}" for number in range(60))
    body = {"prompt": prompt, "target": ANSWER, "exact": 3, "units": [[4 * n, 4 * n + 2] for n in range(45)]}
    expected = explainer.explain(prompt, ANSWER, body["units"], exact=3)
    response = service.explain(**body)
    assert response.status_code == 200, response.text
    same(response, expected)
    assert tuple(response.json()["exact"]) == expected.exact
    assert 3 <= sum(expected.exact) < 45
    last = {data["index"]: data for name, data in service.events(**body) if name == "unit"}
    assert [last[unit]["exact"] for unit in range(45)] == list(expected.exact)
    found = torch.tensor([last[unit]["scores"] for unit in range(45)])
    torch.testing.assert_close(found, expected.scores, rtol=1e-4, atol=1e-5)  # estimates too: the deepest round's


def test_settings_of_the_explainer(service, model, tokenizer):
    settings = {"mode": "shifted", "factor": 0.25, "similarity_threshold": 0.5, "layers": [0, 2]}
    explainer = ak.Explainer(model, tokenizer, progress=False, **settings)
    same(service.explain(**ASKED, **settings), explainer.explain(PROMPT, ANSWER))


# Events ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["given", "own answer", "versus", "earlier answer tokens", "chat"])
def test_events_say_the_same_before_the_result_does(service, explainer, name):
    body, given, options = ALIKE[name]
    events = service.events(**body)
    names = [name for name, _ in events]
    expected = explainer.explain(*given, **options)
    assert (names[0], names[-1]) == ("queued", "result")
    same(events[-1][1], expected)
    (question,) = [data for name, data in events if name == "question"]
    assert names.index("question") < names.index("unit")
    assert [unit["text"] for unit in question["units"]] == [unit.text for unit in expected.units]
    assert (question["prompt"], question["target"]) == (expected.prompt, expected.target)
    units = {data["index"]: data["scores"] for name, data in events if name == "unit"}
    assert sorted(units) == list(range(len(expected.units)))
    found = torch.tensor([units[index] for index in sorted(units)])
    torch.testing.assert_close(found, expected.scores, rtol=1e-4, atol=1e-5)
    said = "".join(data["text"] for name, data in events if name == "answer")
    assert said == ("" if body.get("target") else expected.target)
    done = [data for name, data in events if name == "progress"]
    assert done[-1]["done"] == done[-1]["total"] > 0


def test_an_answer_is_told_token_by_token(service, gate):
    with service.http.stream("POST", "/v1/explanations", json={"prompt": PROMPT, "stream": True}) as response:
        events = events_of(response)
        assert next(events)[0] == "queued"
        assert next(events)[0] == "answer"
        with gate.shut():  # what was said is here before the rest is computed
            pass
        assert [name for name, _ in events][-1] == "result"


def test_a_fault_after_the_beginning_is_an_event(service, model):
    hook = model.get_output_embeddings().register_forward_hook(lambda *_: 1 / 0)
    try:
        events = service.events(**ASKED)
    finally:
        hook.remove()
    assert events[-1] == (
        "error",
        {"status": 500, "error": {"type": "internal", "param": None, "message": events[-1][1]["error"]["message"]}},
    )
    assert service.explain(**ASKED).status_code == 200


# Several at once ------------------------------------------------------------------------------------------------------


def test_what_comes_together_is_explained_together_and_each_gets_its_own(service, explainer, gate):
    passage = " ".join(f"w{i}" for i in range(30, 50))
    bodies = [{"prompt": f"{passage} w{i} w{i + 1}"[6 * (i % 2) :], "target": f" w{i + 20}"} for i in range(5, 17)]
    bodies[3] |= {"units": "word"}
    bodies[5] |= {"versus": " w7"}
    bodies[7] |= {"factor": 0.5}
    batches = service.metric("atman_batch_requests_count")
    with ThreadPoolExecutor(12) as pool:
        with gate.shut():
            answers = [pool.submit(service.explain, **body) for body in bodies]
            until(lambda: service.known() == 12)
        for answer, body in zip(answers, bodies, strict=True):
            direct = ak.Explainer(explainer.model, explainer.tokenizer, factor=body.get("factor", 0.0), progress=False)
            given = (body["prompt"], body["target"], body.get("units", "token"))
            same(answer.result(), direct.explain(*given, versus=body.get("versus")))
    assert 2 <= service.metric("atman_batch_requests_count") - batches <= 5


def test_a_fault_of_one_is_not_the_others(service, explainer, gate):
    def broken(number):
        return {"prompt": f"w5 w6 w{number}", "target": " w1", "versus": " w1"} if number == 7 else {
            "prompt": f"w5 w6 w{number}", "target": " w9"
        }  # fmt: skip

    with ThreadPoolExecutor(4) as pool:
        with gate.shut():
            first = pool.submit(service.explain, **ASKED)
            until(service.busy)
            answers = {number: pool.submit(service.explain, **broken(number)) for number in (6, 7, 8)}
            until(lambda: service.known() == 4)
        assert first.result().status_code == 200
        for number, answer in answers.items():
            response = answer.result()
            if number == 7:
                assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request")
                assert "prompt 1" not in response.text  # of a batch that it knows nothing of
            else:
                same(response, explainer.explain(f"w5 w6 w{number}", " w9"))


# Those who go away ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_goes_away_ends_its_work(service, gate, streamed):
    before, forwards = service.metric("atman_cancelled_total"), gate.forwards
    with gate.shut():
        with pytest.raises(httpx.ReadTimeout):
            service.http.post("/v1/explanations", json={**ASKED, "stream": streamed}, timeout=0.3)
        assert gate.forwards > forwards
        until(lambda: service.metric("atman_cancelled_total") == before + 1)
    until(lambda: not service.service.worker._at_work)
    assert gate.forwards <= forwards + 6  # the base run, the model's own, a probe and a pack make eight
    assert service.explain(**ASKED).status_code == 200


def test_who_waits_and_goes_away_is_never_begun(service, gate):
    with ThreadPoolExecutor(1) as pool, gate.shut():
        first = pool.submit(service.explain, **ASKED)
        until(service.busy)
        with service.http.stream("POST", "/v1/explanations", json={**ASKED, "stream": True, "factor": 0.9}) as response:
            events = events_of(response)  # kept, for the connection ends with it
            name = next(events)[1]["id"]
            assert len(service.service.waiting) == 1
        until(lambda: len(service.service.waiting) == 0)
        assert service.http.delete(f"/v1/requests/{name}").status_code == 404
    assert first.result().status_code == 200


def test_a_request_is_stopped_by_its_id_and_the_others_of_its_batch_go_on(service, explainer, gate):
    with ThreadPoolExecutor(3) as pool:
        with gate.shut():
            first = pool.submit(service.explain, **ASKED)
            until(service.busy)
            others = [pool.submit(service.events, prompt=f"w5 w6 w{n}", target=" w9") for n in (7, 8)]
            until(lambda: len(service.service.waiting) == 2)
            doomed = next(iter(service.service.waiting._clients.values()))[0]
            kept = next(iter(service.service.waiting._clients.values()))[1]
            assert service.http.delete(f"/v1/requests/{doomed.id}").status_code == 204
        assert first.result().status_code == 200
        ends = {events[0][1]["id"]: events[-1] for events in (each.result() for each in others)}
        assert ends[doomed.id][0] == "error"
        assert ends[doomed.id][1]["error"]["type"] == "cancelled"
        same(ends[kept.id][1], explainer.explain(kept.request.prompt, " w9"))


def test_work_that_one_of_two_does_not_want_any_more(service, explainer, gate):
    """Both are in one batch already: the other one's result is what it would have been alone."""
    long = " ".join(f"w{i}" for i in range(10, 55))
    with ThreadPoolExecutor(3) as pool:
        with gate.shut():
            first = pool.submit(service.explain, **ASKED)
            until(service.busy)
            others = [pool.submit(service.events, prompt=prompt, target=" w9") for prompt in (long, "w3 w4")]
            until(lambda: service.known() == 3)
            jobs = [job for line in service.service.waiting._clients.values() for job in line]

            def cancel_when_both_are_at_work(*_):
                if service.service.worker._at_work == jobs:
                    next(job for job in jobs if job.request.prompt == long).cancel()

            hook = gate.model.register_forward_hook(cancel_when_both_are_at_work)
        try:
            assert first.result().status_code == 200
            assert others[0].result()[-1][1]["error"]["type"] == "cancelled"
            same(others[1].result()[-1][1], explainer.explain("w3 w4", " w9"))
        finally:
            hook.remove()


# Limits ---------------------------------------------------------------------------------------------------------------


def test_a_full_queue_says_when_to_come_again(model, tokenizer, gate):
    with running(model, tokenizer, queue=2) as service, ThreadPoolExecutor(4) as pool:
        with gate.shut():
            first = pool.submit(service.explain, **ASKED)
            until(service.busy)
            waiting = [pool.submit(service.explain, **ASKED) for _ in range(2)]
            until(lambda: len(service.service.waiting) == 2)
            refused = service.explain(**ASKED)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["error"]["type"] == "busy"
        assert [each.result().status_code for each in (first, *waiting)] == [200, 200, 200]
        assert service.explain(**ASKED).status_code == 200


def test_work_that_takes_too_long(model, tokenizer, gate):
    with running(model, tokenizer, seconds=0.2) as service:
        with ThreadPoolExecutor(1) as pool, gate.shut():
            late = pool.submit(service.explain, **ASKED)
            until(service.busy)
            threading.Event().wait(0.3)
        assert (late.result().status_code, late.result().json()["error"]["type"]) == (504, "timed_out")
        assert service.http.get("/ready").status_code == 200


def test_no_method_goes_on_for_ever(model, tokenizer):
    with running(model, tokenizer, seconds=0.5) as service:
        body = {**ASKED, "method": "integrated_gradients", "options": {"steps": 500, "batch": 1}}
        began = time.monotonic()
        assert service.explain(**body).status_code == 504
        assert time.monotonic() - began < 20
        assert not model.get_decoder()._forward_pre_hooks
        assert service.explain(**body | {"options": {"steps": 501}}).status_code == 400


TOO_LARGE = {
    "tokens": {"prompt": " ".join(["w5"] * 119), "target": " w6 w7", "units": "sentence"},
    "tokens of its own answer": {"prompt": " ".join(["w5"] * 110), "units": "sentence", "max_new_tokens": 20},
    "units": {"prompt": " ".join(["w5"] * 51), "target": " w6"},
    "bytes": {"prompt": "w5 " * 10_000},
}


@pytest.mark.parametrize("what", TOO_LARGE)
def test_what_is_too_large_is_refused_before_any_work(service, gate, what):
    forwards = gate.forwards
    response = service.explain(**TOO_LARGE[what])
    assert (response.status_code, response.json()["error"]["type"]) == (413, "too_large"), response.text
    assert gate.forwards == forwards


def test_a_body_that_hides_its_length(service):
    response = service.http.post("/v1/explanations", content=(b"x" * 5000 for _ in range(9)))
    assert response.status_code == 413
    assert service.explain(**ASKED).status_code == 200


def test_out_of_memory(service, model):
    def fail(*_):
        raise MemoryError("no more")

    hook = model.get_decoder().register_forward_pre_hook(fail)
    try:
        response = service.explain(**ASKED)
    finally:
        hook.remove()
    assert (response.status_code, response.json()["error"]["type"]) == (507, "out_of_memory")


def test_memory_that_runs_out_in_the_middle_is_counted_and_no_fault(service, explainer, monkeypatch):
    from atman_kernels.run import packed

    real, failed = packed.packed_logprobs, []

    def short_of_memory(model, base, pack, *rest, **options):
        if pack.num_variants > 1 and not failed:
            failed.append(pack.num_variants)
            raise torch.OutOfMemoryError("out of memory")
        return real(model, base, pack, *rest, **options)

    monkeypatch.setattr(packed, "packed_logprobs", short_of_memory)
    same(service.explain(**ASKED), explainer.explain(PROMPT, ANSWER))
    assert failed
    assert service.metric("atman_out_of_memory_retries_total") == 1


# What does not fit ----------------------------------------------------------------------------------------------------

WRONG = {
    "nothing": ({}, None, "exactly one of prompt and messages"),
    "both": ({**ASKED, "messages": [{"role": "user", "content": "w5"}]}, None, "exactly one"),
    "empty": ({"prompt": ""}, None, "prompt is empty"),
    "a number": ({"prompt": 5}, "prompt", "prompt: Input should be a valid string"),
    "half a character": ({"prompt": "\ud800"}, None, "prompt is no text"),
    "factor": ({**ASKED, "factor": -1}, "factor", "factor: Input should be greater"),
    "not a number": ({**ASKED, "factor": "1"}, "factor", "factor: Input should be a valid number"),
    "units": ({**ASKED, "units": "letter"}, "units", "'sentence' or 'paragraph', or Input should be a valid list"),
    "span": ({**ASKED, "units": [[3, 99]]}, None, "99"),
    "mode": ({**ASKED, "mode": "off"}, "mode", "'shifted'"),
    "unknown": ({**ASKED, "temperature": 1}, "temperature", "temperature: Extra inputs"),
    "method": ({**ASKED, "method": "none"}, None, "method must be one of"),
    "a method that reads files": (
        {**ASKED, "method": "at2", "options": {"weights": "/etc/passwd"}},
        "method",
        "not do for its clients",
    ),
    "option": ({**ASKED, "options": {"x": 1}}, None, "no option 'x'"),
    "layers": ({**ASKED, "layers": [7]}, None, "layers"),
    "new tokens": ({"prompt": PROMPT, "max_new_tokens": 21}, "max_new_tokens", "at most 20"),
    "exact": ({**ASKED, "exact": True}, "exact", "exact: Input should be a valid integer"),
    "recompute": ({**ASKED, "recompute": 0}, "recompute", "recompute: Input should be greater"),
    "two depths": ({**ASKED, "recompute": 1, "exact": 1}, None, "recompute and exact do not go together"),
    "images": ({**ASKED, "images": ["aGVsbG8="]}, None, "reads none"),
    "address": ({**ASKED, "images": ["http://localhost/"]}, "images", "fetches nothing"),
    "no base64": ({**ASKED, "images": ["%"]}, "images", "no base64"),
    "versus": ({**ASKED, "versus": ANSWER}, None, "versus must be another answer"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_named(service, what):
    body, param, said = WRONG[what]
    response = service.http.post(
        "/v1/explanations", content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request", param)
    assert said in error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 3000, b"NaN", b'{"prompt": NaN}', b"\xff", b'"prompt"', b"null"])
def test_what_is_no_body(service, body):
    response = service.http.post("/v1/explanations", content=body, headers=JSON)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request"


def test_a_form_of_another_site_is_no_request(service):
    response = service.http.post("/v1/explanations", content=json.dumps(ASKED), headers={"Content-Type": "text/plain"})
    assert response.status_code in (400, 415)


def test_another_model(service):
    assert service.explain(**ASKED, model="tiny").status_code == 200
    response = service.explain(**ASKED, model="large")
    assert (response.status_code, response.json()["error"]["type"]) == (404, "not_found")


# Results that are kept, answers, models -------------------------------------------------------------------------------


def test_a_result_is_kept_if_asked_for(model, tokenizer):
    with running(model, tokenizer, keep=2) as service:
        responses = [service.explain(**ASKED, store=store) for store in (True, False, True, True)]
        names = [response.headers["x-request-id"] for response in responses]
        found = [service.http.get(f"/v1/explanations/{name}") for name in names]
        assert [each.status_code for each in found] == [404, 404, 200, 200]
        assert found[2].json() == responses[2].json()
        events = service.events(**ASKED, store=True)
        assert service.http.get(f"/v1/explanations/{events[0][1]['id']}").json() == events[-1][1]


def test_an_answer_with_words_turned_down(service, model, tokenizer):
    spans = {(0, 2): 0.0, (6, 11): 3.0}
    with ak.steer(model, tokenizer, PROMPT, spans) as steered:
        (expected,) = steered.generate(max_new_tokens=6, do_sample=False)
    body = {"prompt": PROMPT, "max_new_tokens": 6}
    listed = [{"start": start, "end": end, "factor": factor} for (start, end), factor in spans.items()]
    found = service.http.post("/v1/answers", json={**body, "spans": listed}).json()
    plain = service.http.post("/v1/answers", json=body).json()
    assert found["answer"] == expected != plain["answer"]
    assert plain["answer"] == service.explain(**body).json()["target"]
    assert found["prompt"] == PROMPT
    assert [span["token_indices"] for span in found["spans"]] == [[0], [2, 3]]
    events = service.events("/v1/answers", **body, spans=listed)
    assert "".join(data["text"] for name, data in events if name == "answer") == expected
    assert events[-1] == ("result", found)


@pytest.mark.parametrize(
    "spans",
    [
        [{"start": 0, "end": 99, "factor": 1}],
        [{"start": 0, "end": 2, "factor": -1}],
        [{"start": 0, "end": 2, "factor": 0}, {"start": 0, "end": 2, "factor": 2}],
        [{"start": 0, "end": 2, "factor": 0}, {"start": 0, "end": 5, "factor": 2}],
    ],
)
def test_spans_that_do_not_fit(service, spans):
    response = service.http.post("/v1/answers", json={"prompt": PROMPT, "spans": spans})
    assert response.status_code == 400, response.text


def test_what_is_served(service):
    (about,) = service.http.get("/v1/models").json()["data"]
    assert (about["id"], about["chat"], about["positions"], about["dtype"]) == ("tiny", True, 128, "float32")
    assert about["limits"]["tokens"] == 120
    one = service.http.get("/v1/models/tiny").json()
    assert (one["name"], one["ready"]) == ("tiny", True)
    assert service.http.get("/v1/models/other").status_code == 404


def test_examples_of_the_description_work(service):
    description = service.http.get("/openapi.json").json()
    tried = 0
    for path, methods in description["paths"].items():
        for content in methods.get("post", {}).get("requestBody", {}).get("content", {}).values():
            for example in content.get("examples", {}).values():
                body = example["value"] | ({"model": "tiny"} if "model" in example["value"] else {})
                body.pop("versus", None)  # to words that the tiny tokenizer does not know, all is the same
                response = service.http.post(path.replace("{name}", "tiny"), json=body)
                assert response.status_code == 200, (path, body, response.text)
                tried += 1
    assert tried >= 6


# What is written down -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [False, True])
def test_prompts_are_logged_only_if_asked_for(model, tokenizer, caplog, asked):
    caplog.set_level(logging.DEBUG)
    with running(model, tokenizer, log_prompts=asked) as service:
        assert service.explain(**ASKED).status_code == 200
        assert service.explain(prompt=PROMPT, target=" w6", units=[[0, 99]]).status_code == 400
        assert service.http.get(f"/v1/models/{PROMPT}").status_code == 404
    assert ("w5 w6" in caplog.text) is asked
    assert "POST /v1/explanations 200" in caplog.text


def test_counters(model, tokenizer):
    with running(model, tokenizer) as service:
        stats = service.explain(**ASKED).json()["stats"]
        service.explain(prompt="")
        service.http.get("/nothing/of/that/name")
        assert service.metric("atman_model_tokens_total") == stats["tokens_through_model"]
        assert service.metric("atman_units_total") == 6
        assert service.metric("atman_queue_requests") == 0
        for status in (200, 400):
            name = f'atman_requests_total{{endpoint="/v1/explanations",status="{status}"}}'
            assert service.metric(name) == 1
        assert service.metric('atman_requests_total{endpoint="other",status="404"}') == 1


# The end --------------------------------------------------------------------------------------------------------------


def test_what_is_queued_is_finished_and_what_comes_later_refused(model, tokenizer, gate):
    with running(model, tokenizer) as service, ThreadPoolExecutor(3) as pool:
        with gate.shut():
            found = [pool.submit(service.explain, **ASKED, factor=n / 10) for n in range(3)]
            until(lambda: service.known() == 3)
            service.service.worker.drain(60.0)
            late = service.explain(**ASKED)
            assert (late.status_code, late.headers["retry-after"]) == (503, "5")
            assert service.http.get("/ready").status_code == 503
            assert service.http.get("/health").status_code == 200
        assert [each.result().status_code for each in found] == [200] * 3


def test_what_is_not_done_in_time_is_refused(model, tokenizer, gate):
    with running(model, tokenizer) as service, ThreadPoolExecutor(3) as pool:
        with gate.shut():
            found = [pool.submit(service.explain, **ASKED, factor=n / 10) for n in range(3)]
            until(lambda: service.known() == 3)
            service.service.worker.drain(0.05)
            until(lambda: len(service.service.waiting) == 0)
        assert [each.result().status_code for each in found] == [503] * 3


def test_a_thread_that_ended_is_said(model, tokenizer, monkeypatch):
    with running(model, tokenizer) as service:
        monkeypatch.setattr(service.service.engine, "run", lambda jobs: 1 / 0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(threading, "excepthook", lambda *_: None)
            response = service.explain(**ASKED)
            until(lambda: not service.service.worker.is_alive)
        assert response.status_code == 500
        assert service.http.get("/health").status_code == 503
        assert service.explain(**ASKED).status_code == 503


# Nested and named units -----------------------------------------------------------------------------------------------

DOCUMENTS = [[0, 8, "Doc A"], [9, 18, "Doc B"]]


def test_nested_and_named_units_are_the_librarys(service, explainer):
    expected = explainer.explain(PROMPT, ANSWER, (DOCUMENTS, "word"), refine=1)
    same(service.explain(**ASKED, units=[DOCUMENTS, "word"], refine=1), expected)
    named = service.explain(**ASKED, units=DOCUMENTS).json()
    assert [unit["name"] for unit in named["units"]] == ["Doc A", "Doc B"]


def test_a_stream_tells_the_units_of_each_level_before_their_scores(service):
    events = service.events(**ASKED, units=[DOCUMENTS, "sentence", "word"], versus=" w30")
    result = events[-1][1]
    (question,) = [data for name, data in events if name == "question"]
    further = [data for name, data in events if name == "units"]
    assert question["levels"] == result["levels"] == ["span", "sentence", "word"]
    assert question["units"] + further[0]["units"] + further[1]["units"] == result["units"]
    assert [data["first"] for data in further] == [2, 4]
    for units in (question["units"], result["units"]):
        html = service.http.post("/v1/heatmaps/question", json={**question, "units": units}).text
        assert html.count("data-units") == len(units)
    known = {data["index"]: data["scores"] for name, data in events if name == "unit"}
    assert sorted(known) == list(range(len(result["units"])))
    torch.testing.assert_close(torch.tensor([known[i] for i in sorted(known)]), torch.tensor(result["scores"]))
    names = [name for name, _ in events]
    assert names.index("units") < len(names) - 1 - names[::-1].index("unit")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"units": ["word", "sentence"]}, "units: got .*sentences do not refine words"),
        ({"units": ["sentence", "word"], "exact": 2}, "exact does not go with nested units"),
        ({"refine": 2}, "refine is for nested units"),
        ({"units": [[0, 5, ""]]}, "its name, is empty"),
        ({"units": [[[0, 5]], 7]}, "units"),
    ],
)
def test_nested_units_that_do_not_fit_are_refused(service, body, message):
    response = service.explain(**{**ASKED, **body})
    assert response.status_code == 400
    assert re.search(message, response.json()["error"]["message"])


def test_heatmaps_are_rendered_for_whoever_may_use_the_service(service, model, tokenizer):
    hostile = "w5 <script>w6</script>"
    result = service.explain(prompt=hostile, target=ANSWER, units="word").json()
    response = service.http.post("/v1/heatmaps/explanation", json=result)
    assert response.headers["content-type"].startswith("text/html")
    assert 'class="atman-explanation"' in response.text
    assert "<script>w6" not in response.text
    question = {name: result[name] for name in ("prompt", "target", "units", "levels")}
    assert "&lt;script" in service.http.post("/v1/heatmaps/question", json=question).text.replace("</span>", "")
    odd = {**question["units"][0], "start": "x"}
    for kind, wrong in (
        ("explanation", {"prompt": "w5"}),
        ("explanation", {**result, "levels": ["a"] * 6}),
        ("question", {"prompt": "w5"}),
        ("question", []),
        ("question", {**question, "units": [odd]}),
        ("question", {**question, "levels": 7}),
    ):
        response = service.http.post(f"/v1/heatmaps/{kind}", json=wrong)
        assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request"), wrong
    many = {**question, "units": question["units"][:1] * 51}  # of units that overlap a heatmap says each at every piece
    response = service.http.post("/v1/heatmaps/question", json=many)
    assert response.status_code == 413
    assert "units: the prompt has 51" in response.json()["error"]["message"]
    assert service.http.post("/v1/heatmaps/explanation", content="{", headers=JSON).status_code == 400
    with running(model, tokenizer, token="secret") as locked:
        assert locked.http.post("/v1/heatmaps/explanation", json=result).status_code == 401


def test_a_search_for_what_tells_two_answers_apart_is_told_as_it_goes(model, tokenizer):
    prompt = " ".join(f"w{5 + number % 90}" for number in range(110))
    with running(model, tokenizer) as service:
        events = service.events(prompt=prompt, target=" w20", versus=" w30", exact=4)
    assert events[-1][0] == "result", events[-1]
    told = [data for name, data in events if name == "unit"]
    assert {data["exact"] for data in told} == {True, False}
    assert all(len(data["scores"]) == 1 for data in told)
    last = {data["index"]: data["scores"] for data in told}
    result = events[-1][1]
    exact = [i for i, flag in enumerate(result["exact"]) if flag]
    torch.testing.assert_close(
        torch.tensor([last[i] for i in exact]), torch.tensor([result["scores"][i] for i in exact]), atol=1e-5, rtol=1e-4
    )
