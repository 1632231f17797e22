"""What a service is told when it starts: limits, the token, how much it does at once."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Settings:
    """How a service behaves; the defaults are those of `atman serve`.

    Attributes:
        name: what the model is called.
        token: what a request must show; None on machines that nobody else can reach.
        max_tokens: of one prompt with its answer, and of the prompts that are explained together.
        max_units: of one request.
        max_new_tokens: of the model's own answer.
        max_bytes: of a request's body.
        seconds: that the work for one request may take.
        queue: requests that may wait.
        batch: requests that are explained together at most.
        keep: results kept for `GET /v1/explanations/{id}`, in memory.
        grace: seconds for what is queued when the service is asked to end.
        log_prompts: whether prompts and answers may be written to the log.

    Example:
        >>> settings = Settings(name="smollm2", token="a secret")
        >>> settings.max_tokens, "secret" in repr(settings)
        (8192, False)
    """

    name: str
    token: str | None = field(default=None, repr=False)
    max_tokens: int = 8192
    max_units: int = 4096
    max_new_tokens: int = 512
    max_bytes: int = 16 << 20
    seconds: float = 600.0
    queue: int = 64
    batch: int = 8
    keep: int = 64
    grace: float = 30.0
    log_prompts: bool = False
