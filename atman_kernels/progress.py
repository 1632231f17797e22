"""How far an explanation is, and who is told: a bar, a function of the caller's, or a `Listener`.

Whoever is told may raise `atman_kernels.Cancelled`, which stops the work where it stands, between two forwards.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm.auto import tqdm

from atman_kernels.arguments import flag, shown
from atman_kernels.errors import InputError

if TYPE_CHECKING:
    from atman_kernels.inputs.objective import Objective

Tell = Callable[[int, int], object]  # tokens done, tokens in all
Progress = bool | Tell


class Listener:
    """Is told everything that becomes known while an explanation goes on, in the order of these methods.

    `question` counts the questions of `asked`: those of `explain_batch`'s prompts, then those of their other answers.
    Raising `atman_kernels.Cancelled` from any of these methods ends the call there.

    Example:
        >>> class Counting(Listener):
        ...     units = 0
        ...
        ...     def found(self, question, unit, scores):
        ...         self.units += 1
        >>> counting = Counting()
        >>> with listening(counting):                                                   # doctest: +SKIP
        ...     explainer.explain("The capital of France is", " Paris")
        >>> counting.units
        0
    """

    def answering(self) -> Callable[[int], object]:
        """The model begins an answer of its own: to the first prompt without a target, then to the next.

        Returns:
            what is told the id of every token of it.
        """
        return lambda token: None

    def asked(self, questions: "Sequence[Objective]") -> None:
        """All answers are there; their units are explained now."""

    def timed(self, tokens: int, seconds: float) -> None:
        """The unperturbed runs are done, and took so long: what the model manages here."""

    def progressed(self, done: int, total: int) -> None:
        """So many tokens went through the model, of so many. The total may grow where packs turn out not to work."""

    def retried(self) -> None:
        """A forward ran out of memory; its work is done in smaller ones."""

    def estimated(self, question: int, unit: int, scores: Tensor) -> None:
        """(m,) one unit's scores as a search estimates them by now, on the CPU; better ones may follow."""

    def found(self, question: int, unit: int, scores: Tensor) -> None:
        """(m,) one unit's final scores for the answer's tokens, on the CPU."""


_LISTENER: ContextVar[Listener | None] = ContextVar("atman_kernels_listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside, this thread's explanations tell the listener what they know.

    Example:
        >>> class Printing(Listener):
        ...     def found(self, question, unit, scores):
        ...         print(question, unit, scores.sum())
        >>> with listening(Printing()):                                                 # doctest: +SKIP
        ...     explainer.explain("The capital of France is", " Paris")
    """
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def listener() -> Listener | None:
    """Who listens to this thread's explanations."""
    return _LISTENER.get()


def checked_progress(value: Any) -> Progress:
    """Raises InputError if it is neither True nor False, nor a function."""
    if callable(value) and not isinstance(value, type):
        return value  # type: ignore[no-any-return]
    try:
        return flag(value, "progress")
    except InputError:
        raise InputError(
            f"progress must be True or False, or a function of (done, total), got {shown(value)}"
        ) from None


class Meter:
    """Counts tokens for whoever is told.

    Args:
        progress: True for a bar, shown once the work has taken a second; or a function of (done, total).
        total: tokens that will be counted.
        description: what the bar says.
    """

    def __init__(self, progress: Progress, total: int, description: str) -> None:
        self._tell = None if isinstance(progress, bool) else progress
        self._listener = listener()
        self._done, self._total = 0, total
        hidden = progress is not True
        self._bar = tqdm(total=total, unit="tok", desc=description, disable=hidden, delay=1, leave=False)

    def __enter__(self) -> "Meter":
        self._said()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def advance(self, tokens: int) -> None:
        """So many more are done."""
        self._done += tokens
        self._bar.update(tokens)
        self._said()

    def restart(self, total: int) -> None:
        """What was done counts for nothing; there are so many now."""
        self._done, self._total = 0, total
        self._bar.reset(total=total)
        self._said()

    def _said(self) -> None:
        if self._listener is not None:
            self._listener.progressed(self._done, self._total)
        if self._tell is not None:
            self._tell(self._done, self._total)
