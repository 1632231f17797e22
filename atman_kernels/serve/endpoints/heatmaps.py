"""Heatmaps for the page, rendered as saved pages are: the browser has no renderer of its own."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from starlette.responses import HTMLResponse, Response

from atman_kernels.errors import InputError
from atman_kernels.result.explanation import Explanation
from atman_kernels.result.html import bare_fragment, unfinished
from atman_kernels.result.json_format import units_from_json, values_from_json

router = APIRouter(include_in_schema=False)


@router.post("/v1/heatmaps/explanation")
async def explanation(http: Request) -> Response:
    """An explanation, in the form in which it is saved, as a fragment of HTML."""
    content = await _content(http)
    return HTMLResponse(await run_in_threadpool(lambda: bare_fragment(Explanation(**values_from_json(content)))))


@router.post("/v1/heatmaps/question")
async def question(http: Request) -> Response:
    """What is known before the first score: prompt, target and units, as a fragment of HTML."""
    content = await _content(http)
    try:
        prompt, target, units = content["prompt"], content["target"], units_from_json(content["units"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"not a question: {error}") from error
    return HTMLResponse(await run_in_threadpool(unfinished, prompt, target, units))


async def _content(http: Request) -> Any:
    http.state.arriving.close()  # it does not wait for the model
    try:
        return await http.json()
    except (ValueError, RecursionError) as error:
        raise InputError(f"the body is no JSON: {error}") from error
