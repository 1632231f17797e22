"""Who gets in, what every response says, the page's files, KServe's protocol, and the command."""

import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
import tiny_models
from click.testing import CliRunner
from running_service import running

from atman_kernels.cli import main
from atman_kernels.serve.guard import is_loopback

TOKEN = "a-word-that-nobody-knows"
ASKED = {"prompt": "w5 w6 w7", "target": " w8"}


@pytest.fixture(scope="module")
def model():
    return tiny_models.build("llama")


@pytest.fixture(scope="module")
def locked(model):
    with running(model, tiny_models.tokenizer(), token=TOKEN) as found:
        yield found


@pytest.fixture(scope="module")
def opened(model):
    with running(model, tiny_models.tokenizer()) as found:
        yield found


# The token ------------------------------------------------------------------------------------------------------------

OPEN = ("/", "/page/explanation.js", "/health", "/ready", "/openapi.json")
CLOSED = ("/v1/models", "/v1/explanations/x", "/version", "/metrics", "/nothing")


@pytest.mark.parametrize("path", OPEN)
def test_what_needs_no_token(locked, path):
    assert locked.http.get(path).status_code == 200


@pytest.mark.parametrize("path", CLOSED)
@pytest.mark.parametrize(
    "header", [None, "", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer", "Bearer é"]
)
def test_what_needs_the_token(locked, path, header):
    headers = {} if header is None else {"Authorization": header.encode()}
    response = locked.http.get(path, headers=headers)
    assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
    assert response.json()["error"]["type"] == "unauthorized"
    assert TOKEN not in response.text


def test_with_the_token(locked):
    headers = {"Authorization": f"Bearer {TOKEN}", "Host": "explain.example.org", "Origin": "https://elsewhere.org"}
    assert locked.http.post("/v1/explanations", json=ASKED).status_code == 401
    assert locked.http.post("/v1/explanations", json=ASKED, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:8080"}, 200),
        ({"Host": "[::1]:8080"}, 200),
        ({"Host": "localhost:8080", "Origin": "http://localhost:8080"}, 200),
        ({"Host": "rebound.example.org"}, 403),
        ({"Host": "127.0.0.1.example.org"}, 403),
        ({"Host": "localhost:8080", "Origin": "http://localhost:9090"}, 403),
        ({"Host": "localhost:8080", "Origin": "https://elsewhere.org"}, 403),
        ({"Host": "localhost:8080", "Origin": "null"}, 403),
        ({"Host": "["}, 403),
    ],
)
def test_without_a_token_only_this_machine_is_served(opened, headers, status):
    assert opened.http.get("/v1/models", headers=headers).status_code == status


@pytest.mark.parametrize(
    ("host", "own"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("LOCALHOST", True), ("::1", True), ("0.0.0.0", False),
     ("::", False), ("10.0.0.1", False), ("localhost.example.org", False), ("", False)],
)  # fmt: skip
def test_loopback(host, own):
    assert is_loopback(host) is own


def test_a_defect_is_answered_counted_and_logged_as_one(model, monkeypatch, caplog):
    with running(model, tiny_models.tokenizer()) as service:
        monkeypatch.setattr(service.service.engine, "describe", lambda: 1 / 0)
        response = service.http.get("/v1/models")
        counted = service.http.get("/metrics").text
    assert (response.status_code, response.json()["error"]["type"]) == (500, "internal")
    assert response.headers["x-content-type-options"] == "nosniff"
    assert 'atman_requests_total{endpoint="/v1/models",status="500"} 1.0' in counted
    (said,) = [record for record in caplog.records if record.exc_info]
    assert said.getMessage() == f"request {response.headers['x-request-id']} failed"


# The page -------------------------------------------------------------------------------------------------------------


def test_the_page_runs_nothing_but_its_own(opened):
    response = opened.http.get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    for name in ("x-content-type-options", "referrer-policy", "x-request-id"):
        assert response.headers[name]
    assert "://" not in response.text, "something from elsewhere"


@pytest.mark.parametrize(
    "name",
    ["nothing.js", "../engine.py", "%2e%2e%2fengine.py", "..%5cengine.py", "%00", "__init__.py", "explanation.py"],
)
def test_nothing_but_the_pages_files(opened, name):
    assert opened.http.get(f"/page/{name}").status_code == 404


# KServe ---------------------------------------------------------------------------------------------------------------


def test_kserve(opened):
    instances = ["w5 w6 w7", {**ASKED, "units": "word", "factor": 0.5}, ASKED]
    answer = opened.http.post("/v1/models/tiny:explain", json={"instances": instances, "signature_name": "x"}).json()
    assert answer["predictions"] == [each["target"] for each in answer["explanations"]]
    assert [each["settings"]["factor"] for each in answer["explanations"]] == [0.0, 0.5, 0.0]
    direct = [opened.explain(**{"prompt": each} if isinstance(each, str) else each).json() for each in instances]
    for found, expected in zip(answer["explanations"], direct, strict=True):
        assert found["units"] == expected["units"]
        assert sum(found["scores"], []) == pytest.approx(sum(expected["scores"], []), abs=1e-4)  # noqa: RUF017


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("other", {"instances": ["w5"]}, 404),
        ("tiny", {"instances": []}, 400),
        ("tiny", {}, 400),
        ("tiny", {"instances": [3]}, 400),
        ("tiny", {"instances": ["w5", {"prompt": ""}]}, 400),
        ("tiny", {"instances": [{**ASKED, "stream": True}]}, 400),
        ("tiny", {"instances": [{**ASKED, "factor": -1}]}, 400),
    ],
)
def test_kserve_refuses(opened, path, body, status):
    response = opened.http.post(f"/v1/models/{path}:explain", json=body)
    assert response.status_code == status, response.text
    if "factor" in str(body):
        assert response.json()["error"]["message"].startswith("instances.0.factor")


# The command ----------------------------------------------------------------------------------------------------------


def refused(*arguments):
    result = CliRunner().invoke(main, ["serve", *arguments])
    assert result.exit_code == 2, result.output
    return result.output


def test_the_command_refuses_before_it_loads(tmp_path):
    token = tmp_path / "token"
    token.write_text("short\n")
    folder = ["--model", str(tmp_path / "no-model")]
    assert "--model or --gguf is missing" in refused()
    assert "--token-file" in refused(*folder, "--host", "0.0.0.0")
    assert "at least 16 characters" in refused(*folder, "--host", "0.0.0.0", "--token-file", str(token))
    assert "cannot be read" in refused(*folder, "--token-file", str(tmp_path / "nothing"))
    assert "--name must be" in refused(*folder, "--name", "a/b")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot be used" in refused(*folder, "--port", str(taken.getsockname()[1]))
    assert "--queue" in refused(*folder, "--queue", "0")


def test_the_command_serves_and_ends_when_told(tiny_llama, tmp_path):
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    command = [
        sys.executable, "-c", "from atman_kernels.cli import main; main()", "serve", "--model", str(tiny_llama),
        "--token-file", str(token),
        "--dtype", "float32", "--model_name", "small", "--predictor_host", "predictor.svc", "--http_port", "0",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        assert process.stderr is not None
        said = ""
        while "Serving small on http://127.0.0.1:" not in said:
            said = process.stderr.readline()
            assert said, process.wait()
        url = said.split()[3]
        headers = {"Authorization": f"Bearer {TOKEN}"}
        with httpx.Client(base_url=url, headers=headers, timeout=30) as http:
            for _ in range(200):
                try:
                    http.get("/health")
                    break
                except httpx.TransportError:
                    time.sleep(0.05)
            body = {"instances": [{"prompt": "The dog", "target": " Pilot"}]}
            assert http.post("/v1/models/small:explain", json=body).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        log = process.stderr.read()
        assert "POST /v1/models/{name}:explain 200" in log
        assert "Pilot" not in log
        assert TOKEN not in log
    finally:
        process.kill()
