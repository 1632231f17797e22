"""Aleph Alpha's schema: what its client sends and reads, and that scores are what its documentation says they are."""

import base64
import io

import pytest
import tiny_image_models
import tiny_models
import torch
from PIL import Image
from running_service import running

import atman_kernels as ak

PROMPT, ANSWER = "w5 w6 w7 w8 w9 w10", " w20 w21"


@pytest.fixture(scope="module")
def model():
    return tiny_models.build("llama")


@pytest.fixture(scope="module")
def service(model):
    with running(model, tiny_models.tokenizer()) as found:
        yield found


def ask(service, prompt=PROMPT, target=ANSWER, status=200, **body):
    prompt = [{"type": "text", "data": prompt, "controls": []}] if isinstance(prompt, str) else prompt
    response = service.http.post(
        "/explain?nice=true", json={"model": "tiny", "prompt": prompt, "target": target, **body}
    )
    assert response.status_code == status, response.text
    return response.json()


def scores(answer, item=0, explanation=0):
    return torch.tensor([each["score"] for each in answer["explanations"][explanation]["items"][item]["scores"]])


def direct(model, units="token", **settings):
    explainer = ak.Explainer(model, tiny_models.tokenizer(), progress=False, **{"factor": 0.1} | settings)
    return explainer.explain(PROMPT, ANSWER, units)


def test_its_version(service):
    response = service.http.get("/version")
    assert response.headers["content-type"].startswith("text/plain")
    assert [int(part) for part in response.text.split(".")] >= [1, 19]


def test_defaults(service, model):
    answer = ask(service)
    (explanation,) = answer["explanations"]
    assert explanation["target"] == ANSWER
    assert [item["type"] for item in explanation["items"]] == ["text", "target"]
    places = [(each["start"], each["length"]) for each in explanation["items"][0]["scores"]]
    assert [PROMPT[start : start + length] for start, length in places] == PROMPT.split()
    torch.testing.assert_close(scores(answer), direct(model).total)


@pytest.mark.parametrize(
    ("body", "settings"),
    [
        ({"control_factor": 0.4}, {"factor": 0.4}),
        ({"control_log_additive": False}, {"mode": "shifted"}),
        ({"contextual_control_threshold": 0.3}, {"similarity_threshold": 0.3}),
        ({"prompt_granularity": {"type": "sentence"}}, {"units": "sentence"}),
    ],
)
def test_controls_of_the_request(service, model, body, settings):
    torch.testing.assert_close(scores(ask(service, **body)), direct(model, **settings).total)


def test_target_tokens_and_what_earlier_ones_did(service, model):
    answer = ask(service, target_granularity="token")
    assert [each["target"] for each in answer["explanations"]] == ["w20", " w21"]
    explainer = ak.Explainer(model, tiny_models.tokenizer(), factor=0.1, progress=False)
    expected = explainer.explain(PROMPT, ANSWER, include_target=True).scores
    for number in (0, 1):
        torch.testing.assert_close(scores(answer, 0, number), expected[:6, number])
    first, second = (each["items"][1] for each in answer["explanations"])
    assert first == {"type": "target", "scores": []}
    assert (second["scores"][0]["start"], second["scores"][0]["length"]) == (0, 3)
    assert second["scores"][0]["score"] == pytest.approx(float(expected[6, 1]), abs=1e-4)


def test_postprocessing_goes_by_token_and_normalising_comes_after(service, model):
    raw = direct(model).scores
    torch.testing.assert_close(scores(ask(service, postprocessing="absolute")), raw.abs().sum(1))
    torch.testing.assert_close(scores(ask(service, postprocessing="square")), raw.square().sum(1))
    squares = raw.square().sum(1)
    expected = (squares - squares.min()) / (squares.max() - squares.min())
    found = scores(ask(service, postprocessing="square", normalize=True))
    torch.testing.assert_close(found, expected)


def test_a_delimiter_of_ones_own(service, model):
    answer = ask(service, prompt_granularity={"type": "custom", "delimiter": " w7 "})
    places = [(each["start"], each["length"]) for each in answer["explanations"][0]["items"][0]["scores"]]
    assert places == [(0, 5), (9, 9)]
    torch.testing.assert_close(scores(answer), direct(model, [(0, 5), (9, 18)]).total)


def test_several_items_keep_their_scores_apart(service, model):
    items = [
        {"type": "text", "data": "w5 w6 "},
        {"type": "token_ids", "data": [7, 8]},
        {"type": "text", "data": " w9 w10"},
    ]
    answer = ask(service, items)
    found = answer["explanations"][0]["items"]
    assert [item["type"] for item in found] == ["text", "token_ids", "text", "target"]
    expected = direct(model).total
    torch.testing.assert_close(scores(answer, 0), expected[:2])
    torch.testing.assert_close(torch.tensor(found[1]["scores"]), expected[2:4])
    torch.testing.assert_close(scores(answer, 2), expected[4:])
    assert found[2]["scores"][0]["start"] == 1


# Controls on items: against the model itself under the same factors ---------------------------------------------------


def by_hand(model, controls, factor=0.1):
    """(n,) fall of the answer's log-probability, every row of factors in a forward of its own."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 20]])

    def logprob(row):
        with ak.suppress(model, row[None]), torch.no_grad():
            rows = model(ids).logits[0, -2:].log_softmax(-1)
        return rows[0, 20] + rows[1, 21]

    def under(token):
        row = torch.ones(7)
        row[:6] = torch.tensor(controls)
        if token is not None:
            row[token] *= factor
        return row

    return torch.stack([logprob(under(None)) - logprob(under(token)) for token in range(6)])


@pytest.mark.parametrize(
    ("control", "factors"),
    [
        ({"start": 3, "length": 5, "factor": 0.25}, [1, 0.25, 0.25, 1, 1, 1]),
        ({"start": 15, "length": 3, "factor": 3.0}, [1, 1, 1, 1, 1, 3.0]),
        ({"start": 15, "length": 1, "factor": 4.0}, [1, 1, 1, 1, 1, 2.0]),  # a third of it
        ({"start": 15, "length": 1, "factor": 4.0, "token_overlap": "complete"}, [1, 1, 1, 1, 1, 4.0]),
    ],
)
def test_controls_on_a_text(service, model, control, factors):
    answer = ask(
        service, [{"type": "text", "data": PROMPT, "controls": [control]}], prompt_granularity={"type": "token"}
    )
    torch.testing.assert_close(scores(answer), by_hand(model, factors), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(scores(answer), by_hand(model, [1.0] * 6), atol=1e-2), "the control must matter"


def test_controls_reach_similar_tokens_where_units_do(service, model):
    items = [{"type": "text", "data": PROMPT, "controls": [{"start": 3, "length": 2, "factor": 0.25}]}]
    found = scores(ask(service, items, prompt_granularity={"type": "token"}, contextual_control_threshold=0.05))
    embedded = torch.nn.functional.normalize(
        model.get_input_embeddings().weight[[5, 6, 7, 8, 9, 10, 20]].detach(), dim=1
    )
    cosine = embedded @ embedded.T

    def factors(token, factor):
        row = torch.where(cosine[token] >= 0.05, 1 - (1 - factor) * cosine[token], 1.0)
        row[token] = factor
        return row

    control = factors(1, 0.25)
    assert int((control != 1).sum()) > 1, "a token that is similar to the one under the control"
    rows = torch.stack([control, *(control * factors(token, 0.1) for token in range(6))])
    with ak.suppress(model, rows), torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7, 8, 9, 10, 20]] * 7)).logits[:, -2:].log_softmax(-1)
    logprobs = logits[:, 0, 20] + logits[:, 1, 21]
    torch.testing.assert_close(found, logprobs[0] - logprobs[1:], rtol=1e-3, atol=1e-4)


def test_controls_on_token_ids(service, model):
    items = [{"type": "token_ids", "data": [5, 6, 7, 8, 9, 10], "controls": [{"index": 2, "factor": 0.5}]}]
    found = torch.tensor(ask(service, items)["explanations"][0]["items"][0]["scores"])
    torch.testing.assert_close(found, by_hand(model, [1, 1, 0.5, 1, 1, 1]), rtol=1e-3, atol=1e-4)


def test_units_that_hold_a_token_in_part(service, model):
    """ "w10" is cut after "w1": two thirds of it are suppressed with the first unit, one third with the second."""
    asked = {"prompt_granularity": {"type": "custom", "delimiter": "|"}}
    items = [{"type": "text", "data": "w5 w6 w7 w8 w9 w1"}, {"type": "text", "data": "0"}]
    whole = ask(service, items, control_token_overlap="complete", **asked)
    part = ask(service, items, **asked)
    assert float(scores(whole, 1)) == pytest.approx(float(by_hand(model, [1] * 6)[5]), abs=1e-3)
    third = by_hand(model, [1] * 6, factor=1 - 0.9 / 3)[5]
    assert float(scores(part, 1)) == pytest.approx(float(third), abs=1e-3)


WRONG = {
    "no item": {"prompt": []},
    "kind": {"prompt": [{"type": "sound", "data": "w5"}]},
    "ids as text": {"prompt": [{"type": "token_ids", "data": "w5"}]},
    "unknown id": {"prompt": [{"type": "token_ids", "data": [4000]}]},
    "factor": {"control_factor": -1},
    "threshold": {"contextual_control_threshold": 2},
    "delimiter": {"prompt_granularity": {"type": "custom"}},
    "granularity": {"prompt_granularity": {"type": "letter"}},
    "control outside": {
        "prompt": [{"type": "text", "data": "w5", "controls": [{"start": 1, "length": 5, "factor": 1}]}]
    },
    "control without place": {"prompt": [{"type": "text", "data": "w5", "controls": [{"factor": 1}]}]},
    "index outside": {"prompt": [{"type": "token_ids", "data": [5], "controls": [{"index": 1, "factor": 1}]}]},
    "picture": {"prompt": [{"type": "image", "data": "AAAA"}]},
    "empty target": {"target": ""},
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit(service, what):
    body = {"model": "tiny", "prompt": [{"type": "text", "data": PROMPT}], "target": ANSWER} | WRONG[what]
    response = service.http.post("/explain", json=body)
    assert response.status_code == 400, response.text


def test_a_model_of_another_name(service):
    assert service.http.post("/explain", json={"model": "x", "prompt": "w5", "target": " w6"}).status_code == 404


# Pictures -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeing():
    model, processor = tiny_image_models.build("llava"), tiny_image_models.processor("llava")
    with running(model, processor) as found:
        yield found, model, processor


def picture(side=tiny_image_models.SIDE):
    torch.manual_seed(0)
    return Image.fromarray((torch.rand(side, side, 3) * 255).byte().numpy())


def as_item(image, **more):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"type": "image", "data": base64.b64encode(buffer.getvalue()).decode(), "controls": [], **more}


def test_a_picture(seeing):
    service, model, processor = seeing
    image = picture()
    answer = ask(service, [as_item(image), {"type": "text", "data": " w5 w6"}], prompt_granularity={"type": "token"})
    found = answer["explanations"][0]["items"]
    assert [item["type"] for item in found] == ["image", "text", "target"]
    explainer = ak.Explainer(model, processor, factor=0.1, progress=False)
    expected = explainer.explain("<image> w5 w6", ANSWER, images=image)
    places = [(each["rect"]["left"], each["rect"]["top"]) for each in found[0]["scores"]]
    assert places == [(column / 4, row / 4) for row in range(4) for column in range(4)]
    total = [expected.total[n] for n, unit in enumerate(expected.units) if unit.source == "image"]
    torch.testing.assert_close(scores(answer, 0), torch.stack(total), rtol=1e-3, atol=1e-4)
    total = [expected.total[n] for n, unit in enumerate(expected.units) if unit.text.strip() in ("w5", "w6")]
    torch.testing.assert_close(scores(answer, 1), torch.stack(total), rtol=1e-3, atol=1e-4)
    tiles = ask(service, [as_item(image), {"type": "text", "data": " w5"}], prompt_granularity={"type": "word"})
    assert len(tiles["explanations"][0]["items"][0]["scores"]) == 4


def test_a_part_of_a_picture(seeing):
    service, *_ = seeing
    side = tiny_image_models.SIDE
    whole = ask(service, [as_item(picture()), {"type": "text", "data": " w5"}], prompt_granularity={"type": "token"})
    frame = Image.new("RGB", (2 * side, 2 * side))
    frame.paste(picture(), (side, 0))
    cut = ask(
        service,
        [as_item(frame, x=side, y=0, size=side), {"type": "text", "data": " w5"}],
        prompt_granularity={"type": "token"},
    )
    torch.testing.assert_close(scores(cut), scores(whole), rtol=1e-3, atol=1e-4)
    rect = cut["explanations"][0]["items"][0]["scores"][0]["rect"]
    assert rect == {"left": 0.5, "top": 0.0, "width": 0.125, "height": 0.125}


def test_controls_on_a_picture(seeing):
    """A patch that is gone all the time has no score, and the others have others than before."""
    service, *_ = seeing
    text, asked = {"type": "text", "data": " w5"}, {"prompt_granularity": {"type": "token"}}
    gone = {"rect": {"left": 0.25, "top": 0, "width": 0.25, "height": 0.25}, "factor": 0.0}
    plain = scores(ask(service, [as_item(picture()), text], **asked))
    found = scores(ask(service, [as_item(picture(), controls=[gone]), text], **asked))
    assert float(found[1].abs()) < 1e-5 < float(plain[1].abs())
    assert not torch.allclose(found[2:], plain[2:], atol=1e-5)
