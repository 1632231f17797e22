"""`/v1/answers`: what the model says with parts of the prompt turned down or up; docs/service.md describes it."""

from typing import Annotated

from fastapi import APIRouter, Body, Request
from starlette.responses import Response

from atman_kernels.serve.endpoints.schema import ERRORS, AnswerBody, result
from atman_kernels.serve.service import EventStream, TheService, json_response

router = APIRouter(tags=["answers"])
EXAMPLES = {
    "without the dog": {
        "value": {
            "prompt": "Our dog is called Pilot and our cat is called Minka. The name of our pet is",
            "spans": [{"start": 0, "end": 24, "factor": 0.0}],
        }
    }
}
RESULT = result("The answer; with `stream` its events.")


@router.post("/v1/answers", summary="Answer, steered", responses={200: RESULT, **ERRORS})
async def answer(
    http: Request, service: TheService, body: Annotated[AnswerBody, Body(openapi_examples=EXAMPLES)]
) -> Response:
    """An answer of the model, with spans of the prompt suppressed or amplified."""
    service.check_model(body.model)
    wanted = body.request(service.settings)
    if body.stream:
        return EventStream(service, await service.submit(http, wanted))
    return json_response(await service.outcome(http, wanted))
