"""`/v1/explanations`: our own protocol; docs/service.md describes it."""

from typing import Annotated

from fastapi import APIRouter, Body, Request
from starlette.responses import Response

from atman_kernels.serve.endpoints.schema import ERRORS, ExplanationBody, result
from atman_kernels.serve.engine import as_json
from atman_kernels.serve.service import EventStream, JsonText, TheService

router = APIRouter(tags=["explanations"])
EXAMPLES = {
    "a given answer": {"value": {"prompt": "The capital of France is", "target": " Paris", "units": "word"}},
    "the model's own answer": {
        "value": {"messages": [{"role": "user", "content": "Which city is France governed from?"}], "stream": True}
    },
    "one answer rather than another": {
        "value": {"prompt": "The capital of Australia is", "target": " Canberra", "versus": " Sydney"}
    },
}
RESULT = result("The explanation as `Explanation.save` writes it; with `stream` its events.")


@router.post("/v1/explanations", summary="Explain an answer", responses={200: RESULT, **ERRORS})
async def explain(
    http: Request, service: TheService, body: Annotated[ExplanationBody, Body(openapi_examples=EXAMPLES)]
) -> Response:
    """Which parts of the prompt an answer rests on."""
    service.check_model(body.model)
    wanted = body.request(service.settings)
    if body.stream:
        return EventStream(service, await service.submit(http, wanted))
    return JsonText(as_json(await service.outcome(http, wanted)))


@router.get("/v1/explanations/{name}", summary="A kept result", responses={200: RESULT, **ERRORS})
async def kept(service: TheService, name: str) -> Response:
    """An explanation that was asked for before, by its name."""
    return JsonText(service.kept(name))


@router.delete("/v1/requests/{name}", summary="Stop a request", status_code=204, responses=ERRORS)
async def stop(service: TheService, name: str) -> Response:
    """Stops an explanation that runs or waits."""
    service.cancel(name)
    return Response(status_code=204)
