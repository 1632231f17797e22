"""`/health`, `/ready`, `/metrics`: for whoever runs the service."""

from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import PlainTextResponse, Response

from atman_kernels.serve.service import TheService, json_response

router = APIRouter(tags=["operations"])


@router.get("/health", summary="Whether the service works at all")
async def health(service: TheService) -> Response:
    """Whether the service works."""
    alive = service.worker.is_alive
    return json_response({"status": "ok" if alive else "failed"}, 200 if alive else 503)


@router.get("/ready", summary="Whether it takes requests")
async def ready(service: TheService) -> Response:
    """Whether it takes requests now."""
    takes = service.worker.is_alive and not service.waiting.is_closed
    return json_response({"ready": takes}, 200 if takes else 503)


COUNTERS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


@router.get("/metrics", summary="Counters, in Prometheus' format", response_class=PlainTextResponse, responses=COUNTERS)
async def metrics(service: TheService) -> Response:
    """Metrics in Prometheus' text format."""
    return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)
