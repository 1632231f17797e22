"""Who is served next, and with whom."""

import asyncio
import threading

import pytest

from atman_kernels.serve.errors import RequestError
from atman_kernels.serve.job import Job
from atman_kernels.serve.requests import ExplainRequest
from atman_kernels.serve.waiting import Waiting


@pytest.fixture
def job():
    loop = asyncio.new_event_loop()

    def make(client="a", tokens=10, **request):
        async def made():
            return Job(ExplainRequest(**{"prompt": "w5"} | request), client, tokens)

        return loop.run_until_complete(made())

    yield make
    loop.close()


def taken(waiting):
    found = []
    while len(waiting):
        found.append(waiting.take(0))
    return found


def test_clients_take_turns(job):
    waiting = Waiting(most=20, batch=1, tokens=100)
    many, few = [job("a") for _ in range(4)], [job("b") for _ in range(2)]
    for each in (*many, *few):
        waiting.put(each)
    assert taken(waiting) == [[each] for each in (many[0], few[0], many[1], few[1], many[2], many[3])]


def test_what_goes_together(job):
    waiting = Waiting(most=20, batch=3, tokens=25)
    alike = [job(client) for client in "aabb"]
    other, long, pictured = job(chat=True), job("c", tokens=60), job("c", images=(b"",))
    for each in (*alike, other, long, pictured):
        waiting.put(each)
    first, *rest = taken(waiting)
    assert first == [alike[0], alike[2]], "one of each client, for a third would be too long"
    assert [long] in rest
    assert [other] in rest
    assert [pictured] in rest
    assert {each.id for batch in (first, *rest) for each in batch} == {j.id for j in (*alike, other, long, pictured)}


def test_it_is_bounded_and_says_how_many_are_before(job):
    waiting = Waiting(most=2, batch=8, tokens=100)
    assert [waiting.put(job()), waiting.put(job("b"))] == [0, 1]
    with pytest.raises(RequestError, match="2 requests are waiting") as refused:
        waiting.put(job())
    assert refused.value.retry_after == 1


def test_who_leaves_frees_its_place(job):
    waiting = Waiting(most=1, batch=8, tokens=100)
    first = job()
    waiting.put(first)
    first.cancel()
    assert len(waiting) == 0
    assert first.finished
    assert waiting.put(job()) == 0


def test_the_only_one_leaves_while_others_are_awaited(job):
    """The thread that works goes on waiting; it had taken that for the end."""
    waiting = Waiting(most=9, batch=8, tokens=100)
    first, second, found = job(), job(), []
    with waiting.arriving():
        thread = threading.Thread(target=lambda: found.append(waiting.take(0.3)))
        waiting.put(first)
        thread.start()
        threading.Event().wait(0.1)
        first.cancel()
        threading.Event().wait(0.4)
    assert thread.is_alive()
    waiting.put(second)
    thread.join(5)
    assert found == [[second]]


def test_what_arrives_at_the_same_time_comes_along(job):
    waiting = Waiting(most=9, batch=8, tokens=100)
    first, second, found = job(), job(), []
    with waiting.arriving():
        waiting.put(first)
        thread = threading.Thread(target=lambda: found.append(waiting.take(30)))
        thread.start()
        waiting.put(second)
    thread.join(5)
    assert found == [[first, second]]


def test_once_closed_it_hands_out_what_is_left(job):
    waiting = Waiting(most=9, batch=1, tokens=100)
    jobs = [job(), job()]
    for each in jobs:
        waiting.put(each)
    waiting.close(RequestError("busy", "the end"))
    with pytest.raises(RequestError, match="the end"):
        waiting.put(job())
    assert [waiting.take(0), waiting.take(0), waiting.take(0)] == [[jobs[0]], [jobs[1]], []]
