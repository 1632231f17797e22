"""Whose calls a `with` block acts on: those that come from inside it, in whatever context or thread they run.

A context variable says so for threads and tasks, and for copies of their contexts (`asyncio.to_thread`, new tasks).
Generators are the exception, in both directions. Their steps may run in different contexts, as web frameworks run
them, so that what the first step set is not there in the second; and what a step sets stays set for the caller between
steps. Where a block was entered by a generator or a coroutine, its frame on the call stack decides.
"""

import contextlib
import inspect
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from types import FrameType

_YIELDS = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_SUSPENDS = _YIELDS | inspect.CO_COROUTINE | inspect.CO_ITERABLE_COROUTINE
_CONTEXTLIB = contextlib.__file__

_entered: ContextVar[tuple["Scope", ...]] = ContextVar("atman_entered_scopes", default=())
_joined: ContextVar[tuple["Scope", ...]] = ContextVar("atman_joined_scopes", default=())
_here: ContextVar[None] = ContextVar("atman_here")  # its tokens tell a context from its copies


class Scope:
    """A block of code that is being run: entered once, left once, in whatever context and thread.

    Args:
        owner: the frame whose block it is, see `entering_frame`; None for a block that runs no code but our own.
    """

    def __init__(self, owner: FrameType | None = None) -> None:
        flags = 0 if owner is None else owner.f_code.co_flags
        self._frame = owner if flags & _SUSPENDS else None  # other functions run to their end in one context
        self._yields = bool(flags & _YIELDS)
        self._token: Token[None] | None = None
        self._threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet(threading.enumerate() if owner else ())
        self._left = False
        self._unwarned = threading.Lock()

    def __enter__(self) -> "Scope":
        _entered.set((*(scope for scope in _entered.get() if not scope._left), self))
        self._token = _here.set(None) if self._yields else None
        return self

    def __exit__(self, *exception: object) -> None:
        """Needs nothing of the context that was entered: a stale entry elsewhere says that it is one."""
        self._left = True
        self._frame = self._token = None
        _entered.set(tuple(scope for scope in _entered.get() if not scope._left))

    def holds(self) -> bool:
        """Whether the calling code is inside."""
        if self._left:
            return False
        if self in _joined.get():
            return True
        if self in _entered.get():
            return not self._yields or self._on_stack() or not self._is_here()
        return self._on_stack()

    @contextmanager
    def joined(self) -> Iterator[None]:
        """What is called inside is inside this scope, too."""
        token = _joined.set((*_joined.get(), self))
        try:
            yield
        finally:
            _joined.reset(token)

    def warn_if_lost(self, name: str) -> None:
        """Warns, once, of a call from outside that may have been meant to be inside; other threads' are not.

        Args:
            name: of what was called.
        """
        if self._left:
            return
        if self in _entered.get():
            lost = "from outside a generator that was inside and is to go on; call it in the generator"
        elif threading.current_thread() not in self._threads:
            lost = (
                "in a thread that was started inside without its context; to take it along, start the thread with "
                "target=contextvars.copy_context().run, args=(model.generate, …)"
            )
        else:
            return
        if self._unwarned.acquire(blocking=False):
            warnings.warn(f"{name} was called without the suppression that it is under: {lost}", RuntimeWarning, 3)

    def _on_stack(self) -> bool:
        owner = self._frame
        if owner is None:
            return False
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not owner:
            frame = frame.f_back
        return frame is not None

    def _is_here(self) -> bool:
        """Whether the caller's context is the one that was entered, not a copy of it."""
        token = self._token
        if token is None:
            return False
        try:
            _here.reset(token)  # refuses in another context
        except (ValueError, RuntimeError):
            return False
        self._token = _here.set(None)
        return True


def entering_frame() -> FrameType | None:
    """The frame whose `with` is being entered by the context manager that calls this.

    Context managers made of others stand between the two: methods named `__enter__`, and generators that contextlib
    runs.
    """
    frame: FrameType | None = sys._getframe(2)  # whoever runs the context manager that calls
    while frame is not None and _enters_for_another(frame):
        frame = frame.f_back
    return frame


def _enters_for_another(frame: FrameType) -> bool:
    code, caller = frame.f_code, frame.f_back
    if code.co_filename == _CONTEXTLIB or code.co_name in ("__enter__", "__aenter__"):
        return True
    return caller is not None and caller.f_code.co_filename == _CONTEXTLIB and bool(code.co_flags & _YIELDS)
