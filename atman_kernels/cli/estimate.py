"""What an explanation will take, said before it starts."""

from contextlib import AbstractContextManager, nullcontext

from atman_kernels.cli.output import say
from atman_kernels.progress import Listener, listening

WORTH_SAYING = 10.0  # seconds
TOO_LONG = 60.0  # seconds, from which what is faster is offered


class Estimate(Listener):
    """Says once how long the work will take, from what the unperturbed runs took on this machine.

    Args:
        shorter: whether --exact and --recompute may be offered.
    """

    def __init__(self, shorter: bool) -> None:
        self._shorter = shorter
        self._rate, self._total, self._said = 0.0, 0, False

    def timed(self, tokens: int, seconds: float) -> None:
        """The model's rate is known."""
        self._rate = tokens / max(seconds, 1e-9)
        self._say()

    def progressed(self, done: int, total: int) -> None:
        """How much there is to do is known; variants of full rows are counted before their rate is."""
        self._total = total - done
        self._say()

    def _say(self) -> None:
        if self._said or not self._rate or not self._total:
            return
        self._said = True
        seconds = self._total / self._rate
        if seconds < WORTH_SAYING:
            return
        message = f"{self._total:,} tokens through the model will take about {duration(seconds)} here"
        if self._shorter and seconds >= TOO_LONG:
            message += (
                "; for less, --exact 16 finds the 16 strongest units and runs only these exactly, and --recompute 1 "
                "shows what the answer reads from each unit directly"
            )
        say(f"{message}.")


def estimated(shorter: bool, said: bool) -> AbstractContextManager[None]:
    """Says inside how long an explanation will take, or nothing."""
    return listening(Estimate(shorter)) if said else nullcontext()


def duration(seconds: float) -> str:
    """A time as people say it: two digits are enough.

    >>> duration(14.2), duration(95), duration(4000)
    ('14 s', '2 min', '1.1 h')
    """
    if seconds < TOO_LONG:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
