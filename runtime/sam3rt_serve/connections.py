"""Connections of ``sam3rt serve``: who sends no whole request keeps no place for long.

uvicorn itself waits for a header without end, and counts every connection against its limit: a
thousand callers that each send half a header would keep all others out.
"""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class BoundedProtocol(H11Protocol):
    """uvicorn's HTTP protocol, with a bound on waiting for the other side.

    A connection is closed when a header, or a body that nobody reads any more, takes longer than
    :attr:`seconds`, and when nothing of an answer is taken for as long. Where as many connections
    are open as may be, a new one takes the place of the one that has owed a whole request for the
    longest time: an idle one, or one whose header or body is still coming. Where all others wait
    for answers, uvicorn answers 503.

    Attributes:
        seconds: what the other side has.
    """

    seconds = 10.0

    _owing_since = 0.0
    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        most = self.limit_concurrency
        if most is not None and len(self.connections) >= most - 1:
            self._make_room()
        super().connection_made(transport)
        self._owing_since = self.loop.time()
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._owing_since = self.loop.time()
        self._expect_reading(1 << 62)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_watching()

    def _make_room(self) -> None:
        owing = [
            other
            for other in self.connections
            if isinstance(other, BoundedProtocol)
            and other.conn.their_state in (h11.IDLE, h11.SEND_BODY)
            and not other.transport.is_closing()
        ]
        if owing:
            longest = min(owing, key=lambda other: other._owing_since)
            longest.transport.abort()
            self.connections.discard(longest)  # at once, so that the next one finds another

    def _watch(self) -> None:
        """Give the other side its time, from the first byte that is waited for."""
        answered = self.conn.our_state in (h11.IDLE, h11.DONE, h11.MUST_CLOSE)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY) or not answered:
            self._stop_watching()  # the application has it, and limits of its own
        elif self._patience is None:
            self._patience = self.loop.call_later(self.seconds, self.transport.abort)

    def _stop_watching(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _expect_reading(self, before: int) -> None:
        """Close the connection unless less of the answer is left than before."""
        left = self.transport.get_write_buffer_size()
        if left >= before:
            self.transport.abort()
        elif left:
            self.loop.call_later(self.seconds, self._expect_reading, left)
