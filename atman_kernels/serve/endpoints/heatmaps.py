"""Heatmaps for the page, rendered as saved pages are: the browser has no renderer of its own."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from starlette.responses import HTMLResponse, Response

from atman_kernels.errors import InputError
from atman_kernels.result.explanation import Explanation
from atman_kernels.result.html import bare_fragment, unfinished
from atman_kernels.result.json_format import units_from_json, values_from_json
from atman_kernels.serve.measuring import Measuring
from atman_kernels.serve.service import TheService

router = APIRouter(include_in_schema=False)


@router.post("/v1/heatmaps/explanation")
async def explanation(http: Request, service: TheService) -> Response:
    """An explanation, in the form in which it is saved, as a fragment of HTML."""
    return HTMLResponse(await run_in_threadpool(_finished, await _content(http), service.engine.measuring))


@router.post("/v1/heatmaps/question")
async def question(http: Request, service: TheService) -> Response:
    """What is known before the first score: prompt, target, units and levels, as a fragment of HTML."""
    return HTMLResponse(await run_in_threadpool(_unfinished, await _content(http), service.engine.measuring))


def _finished(content: Any, measuring: Measuring) -> str:
    found = Explanation(**values_from_json(content))
    measuring.check_spans([(unit.start, unit.end) for unit in found.units])
    return bare_fragment(found)


def _unfinished(content: Any, measuring: Measuring) -> str:
    try:
        units, levels = units_from_json(content["units"]), tuple(content.get("levels", ()))
        measuring.check_spans([(unit.start, unit.end) for unit in units])
        return unfinished(content["prompt"], content["target"], units, levels)
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"not a question: {error}") from error


async def _content(http: Request) -> Any:
    http.state.arriving.close()  # it does not wait for the model
    try:
        return await http.json()
    except (ValueError, RecursionError) as error:
        raise InputError(f"the body is no JSON: {error}") from error
