"""`/explain` and `/version` in Aleph Alpha's schema, so that its client works against this service."""

from fastapi import APIRouter

router = APIRouter(tags=["Aleph Alpha"])
