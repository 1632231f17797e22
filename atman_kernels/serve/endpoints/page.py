"""The page for people: files of ours and nothing else."""

from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import Response

from atman_kernels.serve.errors import RequestError

router = APIRouter(include_in_schema=False)
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
SHARED = ("explanation.css", "explanation.js")  # which saved pages have, too


@router.get("/")
async def page() -> Response:
    """The page in the browser."""
    return _file("index.html")


@router.get("/page/{name}")
async def part(name: str) -> Response:
    """A file of the page."""
    return _file(name)


def _file(name: str) -> Response:
    package = "atman_kernels.result" if name in SHARED else "atman_kernels.serve"
    folder = files(package) if name in SHARED else files(package).joinpath("page")
    known = {entry.name: entry for entry in folder.iterdir() if entry.is_file()}  # a name is looked up, never a path
    kind = TYPES.get(name.rpartition(".")[2])
    if name not in known or kind is None:
        raise RequestError("not_found", f"the page has no part {name!r}")
    return Response(known[name].read_bytes(), media_type=kind)
