"""What a connection hands what it has read: the door its peer comes in by.

The first door of a socket is an HTTP exchange; an upgrade swaps it for a raw client or a Socket.IO
session. Imports nothing of ours; each door implements it, `connection` calls it.
"""

from __future__ import annotations

import math
from enum import Enum

NEVER = math.inf


class Phase(Enum):
    """Where a socket is in its life; what arrives is read accordingly."""

    HTTP = "http"  # requests, one after another, until one of them upgrades
    OPEN = "open"  # WebSocket frames
    CLOSING = "closing"  # a close frame or a last answer is out; the peer may still read
    CLOSED = "closed"


# Reasons not to read a client, as bits.
HOLD_WRITES = 1  # it does not read: its answers pile up
HOLD_CALLS = 2  # too many of its requests wait for running commands
HOLD_CONNECT = 4  # its connect handler is still deciding
HOLD_CLOSED = 8  # nothing that still arrives counts
HOLD_TURN = 16  # it has had its turn: others are served before it goes on
HOLD_ANSWER = 32  # it pipelines HTTP requests faster than they are answered
HOLD_LEAVING = 64  # too many of its disconnect handlers run
HOLD_BATCH = 128  # a batch of its requests is done in several turns


class Door:
    """What a Connection hands what it has read: bytes before an upgrade, then messages."""

    __slots__ = ()

    def take(self, data: bytes) -> None:
        """Handle bytes that are no WebSocket's; what is left of them goes to `connection.keep`."""
        raise NotImplementedError

    def receive(self, payload: bytes, is_text: bool) -> bytes | None:
        """Handle one message; the text to send now, if any. May raise: see `failed`."""
        raise NotImplementedError

    def failed(self) -> bytes | None:
        """What is said where a bug of ours kept a message from being handled; already logged."""
        return None

    @property
    def is_idle(self) -> bool:
        """Is nothing being done for it that its peer waits for?"""
        return True

    def take_end(self) -> bool:
        """The peer sends no more, before an upgrade; is an answer to it still to come?"""
        return False

    def on_deadline(self, now: float) -> None:
        """The connection's deadline has passed: heartbeat, or time-outs of the door's own."""
        raise NotImplementedError

    def end(self) -> None:
        """The connection closes: cancel what runs for it."""
        raise NotImplementedError
