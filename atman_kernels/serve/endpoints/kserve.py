"""`:explain` in KServe's V1 protocol."""

from fastapi import APIRouter

router = APIRouter(tags=["KServe"])
