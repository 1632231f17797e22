"""Clients that we did not write, each in an environment of its own; and many clients at once."""

import json
import os
import random
import subprocess
import sys
import threading
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import tiny_models
import torch
from running_service import Gate, events_of, running, until

import atman_kernels as ak

pytestmark = pytest.mark.slow

TEXT, TARGET = "w5 w6 w7 w8 w9 w10", " w20 w21"
TOKEN = "a-word-that-nobody-knows"


@pytest.fixture(scope="module")
def model():
    model = tiny_models.build("llama")
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_models.tokenizer()


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """name -> the folder of programs of an environment that has nothing but that package."""

    def build(package):
        given = os.environ.get("ATMAN_TEST_" + package.partition("=")[0].replace("-", "_").upper())
        if given:
            return Path(given)
        folder = tmp_path_factory.mktemp("environment")
        venv.create(folder, with_pip=True)
        done = subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "-q", package], capture_output=True)
        if done.returncode:
            pytest.skip(f"{package} cannot be installed here")
        return folder / "bin"

    return build


def test_aleph_alphas_client(model, tokenizer, environment):
    programs = environment("aleph-alpha-client==11.5.1")
    script = Path(__file__).parents[1] / "support" / "aleph_alpha_calls.py"
    gate = Gate(model)
    with running(model, tokenizer, token=TOKEN, queue=4, batch=2) as service:
        with gate.shut():  # the first requests fill the queue, so that some are refused and come again
            threading.Timer(1.0, gate._open.set).start()
            done = subprocess.run(
                [programs / "python", script, service.url, "tiny", TOKEN], capture_output=True, text=True, timeout=200
            )
        busy = httpx.get(f"{service.url}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}).text
    gate.remove()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    expected = ak.Explainer(model, tokenizer, factor=0.1, progress=False).explain(TEXT, TARGET)
    (target, items), *others = found["defaults"]
    assert (target, not others) == (TARGET, True)
    assert [kind for kind, _ in items] == ["TextPromptItemExplanation", "TargetPromptItemExplanation"]
    torch.testing.assert_close(torch.tensor(items[0][1]), expected.total, rtol=1e-4, atol=1e-5)
    assert found["token"] == found["defaults"] == found["word"]
    assert [len(each[0][1][0][1]) for each in (found["sentence"], found["paragraph"], found["delimiter"])] == [1, 1, 2]
    assert [target for target, _ in found["target tokens"]] == ["w20", " w21"]
    assert (min(found["every control"][0][1][0][1]), max(found["every control"][0][1][0][1])) == (0, 1)
    assert [kind for kind, _ in found["token ids"][0][1]][:2] == [
        "TokenPromptItemExplanation",
        "TextPromptItemExplanation",
    ]
    assert found["with text"] == TEXT.split()
    explainer = ak.Explainer(model, tokenizer, factor=0.1, progress=False)
    for number, answer in enumerate(found["at once"], 5):
        direct = explainer.explain(f"w{number} w6 w7", TARGET).total
        torch.testing.assert_close(torch.tensor(answer[0][1][0][1]), direct, rtol=1e-4, atol=1e-5)
    assert "target is empty" in found["wrong"]
    assert "needs its token" in found["no token"]
    assert 'endpoint="/explain",status="503"' in busy, "no request was refused and came again"


def test_its_description_holds(model, tokenizer, environment, tmp_path):
    programs = environment("schemathesis")
    config = tmp_path / "schemathesis.toml"
    config.write_text('[parameters]\n"path.name" = "tiny"\n')  # the one model there is; ids of requests are unknown
    with running(model, tokenizer, max_tokens=100, max_units=50, max_new_tokens=8) as service:
        done = subprocess.run(
            [
                programs / "schemathesis", "--config-file", config, "run", f"{service.url}/openapi.json",
                "--max-examples", "60", "--checks",
                "not_a_server_error,status_code_conformance,content_type_conformance,"
                "response_schema_conformance,response_headers_conformance", "--generation-database", "none",
                "--request-timeout", "60", "--phases", "examples,fuzzing,stateful",
            ],
            capture_output=True, text=True, timeout=900, cwd=tmp_path,  # it keeps a folder where it runs
        )  # fmt: skip
        assert service.explain(prompt=TEXT, target=TARGET).status_code == 200
    assert done.returncode == 0, done.stdout[-6000:]


def passage(draw):
    return " ".join(f"w{draw.randrange(3, 99)}" for _ in range(draw.randrange(2, 40)))


def test_two_hundred_clients_of_every_kind(model, tokenizer):
    """None gets another's answer, none is forgotten, and those who leave or talk nonsense harm nobody."""
    draw = random.Random(64)
    kinds = [draw.choice(("plain", "plain", "stream", "leave", "slow", "wrong")) for _ in range(200)]
    asked = [{"prompt": passage(draw), "target": f" w{draw.randrange(3, 99)}"} for _ in kinds]
    explainer = ak.Explainer(model, tokenizer, progress=False)
    start = threading.Barrier(200)

    def client(kind, body):
        start.wait()
        with httpx.Client(base_url=service.url, timeout=120) as http:
            while True:
                if kind == "wrong":
                    return http.post("/v1/explanations", content=draw.choice((b"{", b'{"prompt": 3}', b"\xff" * 100)))
                if kind == "leave":
                    with http.stream("POST", "/v1/explanations", json={**body, "stream": True}) as response:
                        next(response.iter_raw(), None)
                    return None
                if kind == "plain":
                    response = http.post("/v1/explanations", json=body)
                    if response.status_code != 503:
                        return response.json()
                else:
                    with http.stream("POST", "/v1/explanations", json={**body, "stream": True}) as response:
                        if response.status_code == 200:
                            name, data = "", None
                            for name, data in events_of(response):  # noqa: B007  (the last one counts)
                                if kind == "slow":
                                    threading.Event().wait(0.05)
                            assert name == "result", data
                            return data
                threading.Event().wait(0.1 + draw.random())

    with running(model, tokenizer, queue=64) as service:
        with ThreadPoolExecutor(200) as pool:
            answers = list(pool.map(client, kinds, asked))
        until(lambda: service.known() == 0)
        assert len(service.service.waiting) == 0
        assert service.http.get("/ready").status_code == 200
    for kind, body, answer in zip(kinds, asked, answers, strict=True):
        if kind == "wrong":
            assert answer.status_code == 400
        elif kind != "leave":
            direct = explainer.explain(body["prompt"], body["target"])
            assert answer["prompt"] == body["prompt"]
            torch.testing.assert_close(torch.tensor(answer["scores"]), direct.scores, rtol=1e-3, atol=1e-4)


def test_memory_stays_flat_over_two_thousand_requests(model, tokenizer):
    """Texts, events, refusals, cancellations and kept results; the first 400 fill caches."""
    process, resident = psutil.Process(), []
    draw = random.Random(0)
    with running(model, tokenizer, keep=16) as service:
        for number in range(2000):
            body = {
                "prompt": passage(draw),
                "target": " w9",
                "store": number % 5 == 0,
                "factor": draw.choice((0.0, 0.5)),
            }
            if number % 4 == 0:
                assert service.events(**body)[-1][0] == "result"
            elif number % 4 == 1:
                with service.http.stream("POST", "/v1/explanations", json={**body, "stream": True}) as response:
                    next(response.iter_raw())
            elif number % 4 == 2:
                assert service.explain(**body | {"target": ""}).status_code == 400
            else:
                assert service.explain(**body).status_code == 200
            if number % 100 == 99:
                resident.append(process.memory_info().rss >> 20)
        until(lambda: service.known() == 0)
    print(f"resident MiB, every 100 requests: {resident} ({sys.version.split()[0]})")
    assert max(resident[-4:]) - resident[3] < 60, resident
