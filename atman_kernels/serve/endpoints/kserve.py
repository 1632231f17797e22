"""`:explain` in KServe's V1 protocol: several instances in, as many explanations out."""

from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from atman_kernels.serve.endpoints.schema import ERRORS, ExplanationBody
from atman_kernels.serve.engine import as_json
from atman_kernels.serve.errors import RequestError
from atman_kernels.serve.service import JsonText, TheService

router = APIRouter(tags=["KServe"])
EXAMPLES = {
    "one prompt": {"value": {"instances": ["The capital of France is"]}},
    "two, as for /v1/explanations": {
        "value": {
            "instances": [
                {"prompt": "The capital of France is", "target": " Paris"},
                {"prompt": "The capital of Italy is", "units": "word"},
            ]
        }
    },
}


class Instances(BaseModel):
    """Prompts, or the fields of `POST /v1/explanations`."""

    model_config = ConfigDict(extra="allow")  # "signature_name" and others, which the protocol lets be there
    instances: list[str | ExplanationBody] = Field(min_length=1, max_length=64)


@router.post("/v1/models/{name}:explain", summary="Explain answers, in KServe's V1 protocol", responses=ERRORS)
async def explain(
    http: Request, service: TheService, name: str, body: Annotated[Instances, Body(openapi_examples=EXAMPLES)]
) -> Response:
    """`predictions` are the answers, `explanations` what `POST /v1/explanations` gives."""
    service.check_model(name)
    bodies = [
        ExplanationBody.model_validate({"prompt": each}) if isinstance(each, str) else each for each in body.instances
    ]
    for each in bodies:
        service.check_model(each.model)
        if each.stream:
            raise RequestError("invalid_request", "instances: stream is for POST /v1/explanations", param="instances")
    found: list[Any] = await service.outcomes(http, [each.request(service.settings) for each in bodies])
    predictions = as_json([each.target for each in found])
    explanations = ", ".join(as_json(each).strip() for each in found)
    return JsonText(f'{{"predictions": {predictions.strip()}, "explanations": [{explanations}]}}')
