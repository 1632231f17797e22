"""Clients that mean no good: what they cost is bounded, and everybody else is served."""

import base64
import io
import json
import socket
import time
from contextlib import closing, suppress

import pytest
import tiny_models
from PIL import Image
from running_service import running, until

from atman_kernels.serve import connections, guard
from atman_kernels.serve import service as services

TOKEN = "a-word-that-nobody-knows"
ASKED = {"prompt": "w5 w6 w7", "target": " w8"}
HEAD = b"POST /v1/explanations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def model():
    return tiny_models.build("llama")


@pytest.fixture(scope="module")
def service(model):
    with running(model, tiny_models.tokenizer(), max_tokens=100, max_units=40) as found:
        yield found


@pytest.fixture
def hasty(monkeypatch):
    """What takes half a minute takes a fifth of a second."""
    for place, name in ((connections, "IDLE_SECONDS"), (connections, "STUCK_SECONDS"), (guard, "SILENCE_SECONDS")):
        monkeypatch.setattr(place, name, 0.2)


def connected(service, sent=b"", receive_buffer=None):
    taken = socket.socket()
    if receive_buffer:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    taken.settimeout(10)
    taken.connect(("127.0.0.1", int(service.url.rpartition(":")[2])))
    taken.sendall(sent)
    return taken


def rest(taken):
    """All that still comes, until the other side ends the connection."""
    found = b""
    with suppress(ConnectionError):
        while piece := taken.recv(1 << 16):
            found += piece
    return found


def trickle(taken, data):
    for letter in data:
        taken.sendall(bytes([letter]))
        time.sleep(0.02)


# Connections ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: 127", HEAD[:-2]])
def test_who_says_nothing_or_half_is_let_go(service, hasty, sent):
    with closing(connected(service, sent)) as taken:
        assert rest(taken) == b""


def test_a_head_that_trickles_is_let_go(service, hasty):
    with closing(connected(service)) as taken, pytest.raises(ConnectionError):
        trickle(taken, HEAD * 20)


def test_who_waits_between_two_requests_is_not(service, hasty):
    with closing(connected(service)) as taken:
        for _ in range(2):
            taken.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):  # head and body may come apart
                answer += taken.recv(1 << 16)
            assert answer.startswith(b"HTTP/1.1 200")
            time.sleep(0.5)


def test_a_body_that_does_not_come(service, hasty):
    """The first answer says so; then the connection ends, though pieces of the body still trickle."""
    with closing(connected(service, HEAD + b"Content-Length: 1000\r\n\r\n{")) as taken:
        assert taken.recv(1 << 16).startswith(b"HTTP/1.1 408")
        with pytest.raises(ConnectionError):
            trickle(taken, b" " * 500)


def test_work_that_takes_longer_than_a_body_may_is_done(service, model, hasty):
    hook = model.get_decoder().register_forward_pre_hook(lambda *_: time.sleep(0.2))
    try:
        assert service.explain(**ASKED).status_code == 200
    finally:
        hook.remove()


def test_who_opens_more_connections_than_there_may_be(service, monkeypatch):
    until(lambda: len(service.connections) <= 1)  # our own client's
    monkeypatch.setattr(connections, "MOST", 4)
    opened = [connected(service) for _ in range(8)]
    try:
        until(lambda: len(service.connections) <= 4)
        assert sum(rest_of_closed(each) for each in opened) >= 4
    finally:
        for each in opened:
            each.close()
    until(lambda: len(service.connections) <= 1)
    assert service.explain(**ASKED).status_code == 200


def rest_of_closed(taken):
    """Whether the other side has ended the connection."""
    taken.settimeout(0.05)
    try:
        return taken.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def test_who_reads_nothing_is_let_go(service, hasty):
    service.service._kept["large"] = "x" * (12 << 20)
    try:
        before = len(service.connections)
        sent = b"GET /v1/explanations/large HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        with closing(connected(service, sent, receive_buffer=4096)) as taken:
            until(lambda: len(service.connections) > before)
            until(lambda: len(service.connections) == before)
            assert len(rest(taken)) < 12 << 20
    finally:
        del service.service._kept["large"]


def test_who_reads_slowly_gets_all(service, monkeypatch):
    monkeypatch.setattr(connections, "STUCK_SECONDS", 1.0)
    service.service._kept["large"] = "x" * (12 << 20)
    try:
        sent = b"GET /v1/explanations/large HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
        with closing(connected(service, sent, receive_buffer=1 << 17)) as taken:
            count = 0
            while piece := taken.recv(1 << 17):
                count += len(piece)
                time.sleep(0.008)
        assert count > 12 << 20
    finally:
        del service.service._kept["large"]


@pytest.mark.parametrize("length", [b"9" * 30, b"9" * 5000, b"-1", b"1e3", "²".encode("latin-1")])
def test_lengths_that_are_none(service, length):
    with closing(connected(service, HEAD + b"Connection: close\r\nContent-Length: " + length + b"\r\n\r\n{}")) as taken:
        assert rest(taken).split()[1] in (b"400", b"413")


def test_headers_without_end(service):
    with closing(connected(service, b"GET /health HTTP/1.1\r\n")) as taken:
        with suppress(ConnectionError):
            for number in range(100):
                taken.sendall(f"X-{number}: {'y' * 4000}\r\n".encode())
        assert rest(taken)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 431", b"")
    assert service.explain(**ASKED).status_code == 200


# Other sites ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "site", "mode", "status"),
    [
        ("/v1/models", "same-origin", "cors", 200),
        ("/v1/models", "none", "navigate", 200),
        ("/", "cross-site", "navigate", 200),
        ("/v1/models", "cross-site", "no-cors", 403),
        ("/page/page.js", "same-site", "no-cors", 403),
    ],
)
def test_what_a_browser_says_of_a_page_counts(service, path, site, mode, status):
    headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode}
    assert service.http.get(path, headers=headers).status_code == status
    if mode == "navigate" and site == "cross-site":  # a form that another site's page sends off
        assert service.http.post("/v1/explanations", json=ASKED, headers=headers).status_code == 403


def test_a_websocket_is_a_request_like_others(model):
    upgrade = {
        "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }  # fmt: skip
    with running(model, tiny_models.tokenizer(), token=TOKEN) as locked:
        assert locked.http.get("/v1/models", headers=upgrade).status_code == 401
        assert locked.http.get("/health", headers=upgrade).status_code == 200


# Requests -------------------------------------------------------------------------------------------------------------


def picture(side):
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"prompt": "w5 " * 2200}, 413, "the texts have 6603 characters, this service takes 6400"),
        ({"prompt": "w5", "versus": "x" * 6400}, 413, "the texts have"),
        ({"messages": [{"role": "user", "content": ""}] * 400}, 413, "the texts have"),
        ({"prompt": "w5 w6 " * 10, "units": [[0, 59 - n] for n in range(41)]}, 413, "units: the prompt has 41"),
        ({"prompt": "w" * 400, "units": [[n, 400] for n in range(20)]}, 413, "units: they hold"),
        ({"method": "shapley", "options": {"permutations": 1_000_000}}, 413, "would run 4000000 variants"),
        ({"method": "lasso", "options": {"samples": 1_000_000}}, 413, "would run 1000000 variants"),
        ({"images": [picture(1)] * 17}, 400, "images: List should have at most 16 items"),
    ],
)  # fmt: skip
def test_what_would_cost_too_much_is_refused_before_any_work(service, monkeypatch, body, status, message):
    monkeypatch.setattr(service.service.engine, "run", None)
    body = body if "messages" in body else {**ASKED, **body}
    began = time.monotonic()
    response = service.explain(**body)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("images", "message"),
    [([picture(4100)] * 2, "images have 33620000 pixels together"), ([picture(5800)], "5800 × 5800 pixels")],
)
def test_pictures_are_not_unpacked_where_they_are_too_large_together(service, monkeypatch, images, message):
    monkeypatch.setattr(service.service.engine, "run", None)
    monkeypatch.setattr(service.service.engine.measuring, "_reads_images", True)
    response = service.explain(**ASKED, images=images)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_texts_that_are_too_long_are_not_tokenized(service, monkeypatch):
    monkeypatch.setattr(service.service.engine.measuring, "_tokenizer", None)
    assert service.explain(prompt="w5 " * 3000).status_code == 413


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([{"type": "image", "data": picture(4100)}] * 2, "pixels together"),
        ([{"type": "image", "data": picture(4100), "x": 0, "y": 0, "size": 9}] * 2, "pixels together"),
        ([{"type": "image", "data": picture(1)}] * 17, "at most 16 images"),
        ([{"type": "text", "data": "w5"}] * 5000, "at most 4096"),
    ],
)
def test_items_that_would_cost_too_much(service, items, message):
    response = service.http.post("/explain", json={"model": "tiny", "prompt": items, "target": " w8"})
    assert response.status_code == 400
    assert message in response.text


def test_results_are_kept_up_to_a_size_in_all(service, monkeypatch):
    lengths = [len(service.explain(**ASKED).text) for _ in range(2)]
    monkeypatch.setattr(services, "MOST_KEPT", 2 * max(lengths) + 50)
    names = [service.explain(**ASKED, store=True).headers["x-request-id"] for _ in range(3)]
    assert [service.http.get(f"/v1/explanations/{name}").status_code for name in names] == [404, 200, 200]


def test_texts_do_not_break_events(service):
    """Each event is one line of data, whatever is in the texts."""
    asked = {"prompt": "w5\n\nevent: result\rdata: {}\u2028w6", "target": " w8\n\n", "units": "word", "stream": True}
    with service.http.stream("POST", "/v1/explanations", json=asked) as response:
        events = response.read().decode().split("\n\n")
    assert events.pop() == ""
    for event in events:
        name, data = event.split("\n")
        assert name.startswith("event: ")
        json.loads(data.removeprefix("data: "))
    assert [event.split("\n")[0] for event in events if event.startswith("event: result")] == ["event: result"]


def test_other_methods_say_their_question_too(service):
    events = service.events(**ASKED, method="shapley", options={"permutations": 4})
    assert [name for name, _ in events if name in ("queued", "question", "result")] == ["queued", "question", "result"]
