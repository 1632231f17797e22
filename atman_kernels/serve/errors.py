"""What a request may end with, apart from its result: one class, and which exception becomes which kind."""

from http import HTTPStatus
from typing import Any

from atman_kernels.errors import Cancelled, InputError, UnsupportedModelError

STATUS = {
    "invalid_request": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "too_large": 413,
    "unsupported": 422,
    "cancelled": 499,  # as nginx calls what a client gave up
    "internal": 500,
    "busy": 503,
    "timed_out": 504,
    "out_of_memory": 507,
}


class RequestError(Exception):
    """A request cannot be served.

    Attributes:
        kind: one of `STATUS`.
        message: what came, what was expected, what to do next.
        param: the field that is wrong, if it is one.
        status: for HTTP, usually the kind's.
        retry_after: seconds after which it may work, if it may.
    """

    def __init__(
        self,
        kind: str,
        message: str,
        *,
        param: str | None = None,
        status: int | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.kind, self.message, self.param, self.retry_after = kind, message, param, retry_after
        self.status = status or STATUS[kind]

    def content(self) -> dict[str, Any]:
        """The body of the response."""
        return {"error": {"type": self.kind, "message": self.message, "param": self.param}}


def request_error(error: BaseException) -> RequestError:
    """What a request is told of an exception; of a defect of ours no more than that it is one."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, InputError):
        return RequestError("invalid_request", str(error))
    if isinstance(error, UnsupportedModelError | NotImplementedError):
        return RequestError("unsupported", str(error))
    if isinstance(error, MemoryError):
        return RequestError("out_of_memory", str(error) or "out of memory")
    if isinstance(error, Cancelled):
        return RequestError("cancelled", str(error) or "the request was stopped")
    return RequestError("internal", "the service failed; its log says more under this request's id")


def of_status(status: int, message: str) -> RequestError:
    """An error that the web framework found."""
    kinds = {number: kind for kind, number in STATUS.items()}
    kind = kinds.get(status, "invalid_request" if status < 500 else "internal")
    return RequestError(kind, message or HTTPStatus(status).phrase, status=status)
