"""The web application of a service."""

import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio.to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

import atman_kernels
from atman_kernels.errors import InputError, UnsupportedModelError
from atman_kernels.serve.endpoints import aleph_alpha, answers, explanations, heatmaps, kserve, models, operations, page
from atman_kernels.serve.errors import RequestError, of_status, request_error
from atman_kernels.serve.guard import Guard
from atman_kernels.serve.service import Service, json_response
from atman_kernels.serve.settings import Settings

DESCRIPTION = (
    "Which parts of a prompt a language model's answer rests on, and what it says with some of them turned down."
)


def create_app(model: Any, tokenizer: Any, settings: Settings, *, on_end: Callable[[], None] = lambda: None) -> FastAPI:
    """An ASGI application that explains one model; its thread runs while the application does.

    Args:
        model: a transformers language model.
        tokenizer: its tokenizer, or the processor of a model that reads images, too.
        settings: name, token and limits.
        on_end: called when the thread that works ends, however it does.

    Raises:
        InputError, UnsupportedModelError: the model cannot be explained.

    Example:
        >>> model, tokenizer = ak.load_model("smollm2")                                     # doctest: +SKIP
        >>> app = create_app(model, tokenizer, Settings(name="smollm2"))                    # doctest: +SKIP
        >>> uvicorn.run(app, host="127.0.0.1", port=8080)                                   # doctest: +SKIP
    """
    service = Service(model, tokenizer, settings, on_end)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await anyio.to_thread.run_sync(service.worker.stop, settings.grace)

    app = FastAPI(
        title="atman-kernels",
        version=atman_kernels.__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # these pages load their scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    for endpoint in (explanations, heatmaps, answers, models, aleph_alpha, kserve, operations, page):
        app.include_router(endpoint.router)
    for kind in (InputError, UnsupportedModelError, RequestError):
        app.add_exception_handler(kind, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _of_framework)
    app.add_middleware(Guard, service=service)
    return app


async def _refused(http: Request, error: Exception) -> Response:
    wrong = request_error(error)
    headers = {} if wrong.retry_after is None else {"Retry-After": str(wrong.retry_after)}
    return json_response(wrong.content(), wrong.status, headers)


async def _invalid(http: Request, error: Exception) -> Response:
    """What the schema says against a body: its first fault, with the field's name."""
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    field, said = max((_field(each["loc"]) for each in errors), key=len), []
    for each in errors:  # of a field that may be several things there is one for each of them
        message = each["msg"].removeprefix("Value error, ")
        if _field(each["loc"]) == field and message not in said:
            said.append(message)
    name = ".".join(field)
    wrong = RequestError(
        "invalid_request", f"{name or 'body'}: {', or '.join(said)}", param=field[0] if field else None
    )
    return await _refused(http, wrong)


def _field(places: Sequence[int | str]) -> list[str]:
    """The way to a field, without the names of the kinds of values that it might have had."""
    kinds = ("body", "path", "query", "str", "int", "float", "bool", "none")
    named = [str(place) for place in places if not re.search(r"[\[(]|^[A-Z]", str(place))]
    return [place for place in named if place not in kinds and not place.startswith(("constrained-", "list["))]


async def _of_framework(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = await _refused(http, of_status(error.status_code, str(error.detail)))
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response
