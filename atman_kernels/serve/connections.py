"""A connection as uvicorn has it, for clients that mean no good: those that open many, say nothing, or read nothing.

What they send after the head of a request is the guard's business, and how fast they read events that of the stream.
"""

import asyncio
import logging
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

LOG = logging.getLogger("atman_kernels.serve")
MOST = 512  # at the same time; sockets are files, of which a process often may have 1024
IDLE_SECONDS = 20.0  # for a request's first line and headers, and for the rest of a body that was answered already
STUCK_SECONDS = 120.0  # that a reader may take nothing of what is there for it
LOOKS = 6  # within the shorter of these


class Connection(H11Protocol):
    """Ends itself where a request's head does not come or a response is not read; there are `MOST` of them."""

    _idle_since: float | None = None
    _unread = 0  # bytes, when they were looked at last
    _read_at = 0.0  # when they had become fewer
    _watch: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Called by asyncio."""
        super().connection_made(transport)
        if len(self.connections) > MOST:
            LOG.warning("a connection was refused: there are %d", MOST)
            transport.abort()
        else:
            self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        super().connection_lost(exc)
        if self._watch is not None:
            self._watch.cancel()

    @property
    def _is_idle(self) -> bool:
        """Whether the client owes us something, and we owe it nothing."""
        if self.cycle is None:
            return True
        if not self.cycle.response_complete:
            return False
        waits = self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]  # uvicorn's own limit counts then
        return not waits

    def _look(self) -> None:
        now, unread = self.loop.time(), self.transport.get_write_buffer_size()
        if not unread or unread < self._unread:
            self._read_at = now
        self._unread = unread
        self._idle_since = (self._idle_since or now) if self._is_idle and not unread else None
        is_late = self._idle_since is not None and now - self._idle_since > IDLE_SECONDS
        if is_late or now - self._read_at > STUCK_SECONDS:
            self.transport.abort()
        else:
            self._watch = self.loop.call_later(min(IDLE_SECONDS, STUCK_SECONDS) / LOOKS, self._look)
