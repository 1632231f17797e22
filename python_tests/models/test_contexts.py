"""Whose calls a suppression acts on: generators, tasks, executors and threads, and what is left when they are gone."""

import asyncio
import contextvars
import copy
import gc
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager

import pytest
import tiny_models
import torch
import transformers as hf

import atman_kernels as ak
from atman_kernels.hf import replacement
from atman_kernels.hf.attention import switch

PROMPT = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
OTHER = torch.tensor([[1.0, 1, 1, 1, 1, 0, 1, 1]])
FACTOR = torch.tensor([[1.0, 1, 0, 1, 1, 1, 1, 1]])


@pytest.fixture(scope="module", params=["llama", "gptj"])
def model(request):
    return tiny_models.build(request.param)


@pytest.fixture(autouse=True)
def _nothing_is_left(request):
    yield
    if "model" in request.fixturenames:
        assert not switch._everywhere
        assert not switch._switches
        assert not replacement._sites


def logits(model):
    with torch.no_grad():
        return model(PROMPT).logits


def suppressed(model, factor=FACTOR):
    with ak.suppress(model, factor):
        return logits(model)


def in_new_contexts(steps):
    """Every step of a generator in a context of its own, as web frameworks do it."""
    found = []
    while True:
        try:
            found.append(contextvars.copy_context().run(next, steps))
        except StopIteration:
            return found


def same(found, expected):
    assert all(torch.equal(one, expected) for one in found), found


# --- generators ---


def stream(model, factor=FACTOR, steps=3):
    with ak.suppress(model, factor):
        for _ in range(steps):
            yield logits(model)


def test_steps_of_a_generator_in_contexts_of_their_own(model):
    plain, expected = logits(model), suppressed(model)
    found = in_new_contexts(stream(model))
    assert len(found) == 3
    same(found, expected)
    same([logits(model)], plain)


@contextmanager
def own_manager(model):
    with ExitStack() as stack:
        stack.enter_context(ak.suppress(model, FACTOR))
        yield


class OwnManager:
    def __init__(self, model):
        self.inner = own_manager(model)

    def __enter__(self):
        return self.inner.__enter__()

    def __exit__(self, *exception):
        return self.inner.__exit__(*exception)


@pytest.mark.parametrize("manager", [own_manager, OwnManager])
def test_context_managers_made_of_others_belong_to_who_enters_them(model, manager):
    def steps():
        with manager(model):
            for _ in range(3):
                yield logits(model)

    expected = suppressed(model)
    same(in_new_contexts(steps()), expected)
    with manager(model):
        same([logits(model)], expected)


def test_two_generators_taking_turns_and_their_caller_each_have_their_own(model):
    plain, ours, others = logits(model), suppressed(model), suppressed(model, OTHER)
    one, other = stream(model), stream(model, OTHER)
    with pytest.warns(RuntimeWarning, match="from outside a generator"):  # noqa: PT031
        for _ in range(3):
            same([next(one)], ours)
            same([next(other)], others)
            same([logits(model)], plain)
    one.close()
    other.close()
    same([logits(model)], plain)


def test_a_generator_that_is_dropped_in_the_middle_leaves_nothing(model):
    plain = logits(model)
    steps = stream(model)
    contextvars.copy_context().run(next, steps)
    del steps
    gc.collect()
    assert not switch._everywhere
    same([logits(model)], plain)


def test_a_generator_that_fails_or_is_interrupted_leaves_nothing(model):
    plain = logits(model)
    for error in (ZeroDivisionError, KeyboardInterrupt):
        steps = stream(model)
        next(steps)
        with pytest.raises(error):
            steps.throw(error)
        same([logits(model)], plain)


def test_leaving_in_another_thread_frees_the_one_that_entered(model):
    expected, others = suppressed(model), suppressed(model, OTHER)
    manager = ak.suppress(model, FACTOR)
    manager.__enter__()
    same([logits(model)], expected)
    thread = threading.Thread(target=manager.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    same([suppressed(model, OTHER)], others)


def test_a_thread_that_a_generator_started_goes_on_between_its_steps(model):
    expected, go_on, found = suppressed(model), threading.Event(), []

    def body():
        go_on.wait(20)
        found.append(logits(model))

    def steps():
        with ak.suppress(model, FACTOR):
            thread = threading.Thread(target=contextvars.copy_context().run, args=(body,))
            thread.start()
            yield
            thread.join()

    started = steps()
    next(started)
    go_on.set()
    with pytest.raises(StopIteration):
        next(started)
    same(found, expected)


# --- tasks and executors ---


def test_tasks_are_suppressed_apart(model):
    plain, ours, others = logits(model), suppressed(model), suppressed(model, OTHER)

    async def with_factor(factor):
        with ak.suppress(model, factor):
            found = []
            for _ in range(3):
                await asyncio.sleep(0)
                found += [logits(model), await asyncio.to_thread(logits, model)]
            return found + list(await asyncio.gather(*(asyncio.to_thread(logits, model) for _ in range(2))))

    async def untouched():
        found = []
        for _ in range(5):
            await asyncio.sleep(0)
            found.append(logits(model))
        return found

    async def everything():
        return await asyncio.gather(with_factor(FACTOR), untouched(), with_factor(OTHER))

    for found, expected in zip(asyncio.run(everything()), (ours, plain, others), strict=True):
        same(found, expected)


def test_executors_do_not_take_the_suppression_along_and_say_so(model):
    plain, expected = logits(model), suppressed(model)
    with ThreadPoolExecutor(1) as before, ThreadPoolExecutor(1) as after:
        before.submit(int).result()

        async def body():
            loop = asyncio.get_running_loop()
            with ak.suppress(model, FACTOR):
                known = await loop.run_in_executor(before, logits, model)  # a server's thread, on its own business
                with pytest.warns(RuntimeWarning, match="copy_context"):
                    started = await loop.run_in_executor(after, logits, model)
                along = await loop.run_in_executor(after, contextvars.copy_context().run, logits, model)
            return known, started, along

        known, started, along = asyncio.run(body())
    same([known, started], plain)
    same([along], expected)


def test_a_cancelled_task_leaves_nothing(model):
    plain = logits(model)

    async def body():
        with ak.suppress(model, FACTOR):
            await asyncio.sleep(60)

    async def cancelled():
        task = asyncio.create_task(body())
        await asyncio.sleep(0)
        assert switch._everywhere
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    same([logits(model)], plain)


async def astream(model):
    with ak.suppress(model, FACTOR):
        for _ in range(3):
            yield [logits(model)]


async def astream_by_threads(model):
    with ak.suppress(model, FACTOR):
        for _ in range(3):
            yield [logits(model), await asyncio.to_thread(logits, model)]


@pytest.mark.parametrize(("stream", "own_tasks"), [(astream, False), (astream, True), (astream_by_threads, False)])
def test_steps_of_an_async_generator(model, stream, own_tasks):
    plain, expected = logits(model), suppressed(model)

    async def body():
        steps, found, between = stream(model), [], []
        while True:
            try:
                step = anext(steps)
                found += await (asyncio.create_task(asyncio.wait_for(step, 20)) if own_tasks else step)
            except StopAsyncIteration:
                return found, between
            between.append(logits(model))

    if own_tasks:
        found, between = asyncio.run(body())
    else:
        with pytest.warns(RuntimeWarning, match="from outside a generator"):
            found, between = asyncio.run(body())
    assert len(found) >= 3
    same(found, expected)
    same(between, plain)


def test_an_async_generator_that_is_dropped_leaves_nothing(model):
    plain = logits(model)

    async def body():
        async for _ in astream(model):
            break

    asyncio.run(body())
    gc.collect()
    same([logits(model)], plain)


def test_async_context_managers_made_of_others(model):
    @asynccontextmanager
    async def manager():
        with ak.suppress(model, FACTOR):
            yield

    async def body():
        async with manager():
            await asyncio.sleep(0)
            return logits(model)

    same([asyncio.run(body())], suppressed(model))


# --- what a call by nobody of ours gets ---


OWN = [("llama", "eager"), ("llama", "sdpa"), ("gemma2", "eager"), ("gpt_oss", "eager"), ("gpt2", "eager")]
OWN += [("falcon", "sdpa"), ("falcon alibi", "eager"), ("bloom", "eager"), ("t5", "eager")]
SLOW = pytest.param("llama", "flex_attention", marks=pytest.mark.slow)  # which torch compiles


@pytest.mark.parametrize(("family", "implementation"), [*OWN, SLOW])
def test_a_plain_forward_of_another_thread_is_the_models_own(family, implementation):
    if family == "t5":
        model = hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
        ).eval()
    else:
        model = tiny_models.build(family)
    if model._can_set_attn_implementation():
        model.set_attn_implementation(implementation)
    mask = torch.ones_like(PROMPT)
    mask[0, :2] = 0
    inputs = {"input_ids": PROMPT, "attention_mask": mask}
    if family == "t5":
        inputs["decoder_input_ids"] = PROMPT[:, :3]
    with torch.no_grad():
        expected = model(**inputs).logits
    go_on, found = threading.Event(), []

    def body():
        go_on.wait(20)
        with torch.no_grad():
            found.append(model(**inputs).logits)

    thread = threading.Thread(target=body)
    thread.start()
    with ak.suppress(model, FACTOR):
        go_on.set()
        thread.join()
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("family", ["llama", "gptj", "falcon", "t5"])
def test_copies_of_a_model_under_suppression_are_the_model_itself(family):
    if family == "t5":
        model = hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
        ).eval()
        inputs = {"input_ids": PROMPT, "decoder_input_ids": PROMPT[:, :3]}
    else:
        model, inputs = tiny_models.build(family), {"input_ids": PROMPT}
    names = {name: set(module.__dict__) for name, module in model.named_modules()}
    with torch.no_grad():
        expected = model(**inputs).logits
        with ak.suppress(model, FACTOR):
            copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model.config)]
    for made in copies[:2]:
        with torch.no_grad():
            assert torch.equal(made(**inputs).logits, expected)
        assert {name: set(module.__dict__) for name, module in made.named_modules()} == names
        assert not any(module._forward_hooks for module in made.modules())
    assert {config._attn_implementation for config in [c.config for c in copies[:2]] + copies[2:]} == {
        model.config._attn_implementation
    }
