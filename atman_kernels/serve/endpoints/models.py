"""`/v1/models`: what is served."""

from fastapi import APIRouter
from starlette.responses import Response

from atman_kernels.serve.endpoints.schema import ERRORS
from atman_kernels.serve.service import TheService, json_response

router = APIRouter(tags=["models"])


@router.get("/v1/models", summary="What is served")
async def models(service: TheService) -> Response:
    """In the form of OpenAI's list, with KServe's in it."""
    about = service.engine.describe()
    return json_response({"object": "list", "models": [about["id"]], "data": [about]})


@router.get("/v1/models/{name}", summary="One of them", responses=ERRORS)
async def model(service: TheService, name: str) -> Response:
    """The model that is served."""
    service.check_model(name)
    return json_response(service.engine.describe() | {"name": name, "ready": service.worker.is_alive})
