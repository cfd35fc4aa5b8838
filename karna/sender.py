"""What leaves a connection: joined, bounded, and never waited for.

Frames are queued while a read is handled, or for one turn of the loop, and leave in one write:
straight to the socket where that is ours, through asyncio's transport where something waits
before them. A client that does not take them is dropped at its limit.

Touches the hub and its own socket; `connection` extends it by reading.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable

from websockets.frames import CloseCode

from karna.door import HOLD_WRITES, Phase
from karna.hub import Hub
from karna.reader import FLUSH_BYTES

FLUSH_FRAMES = 64  # joined into one write before it leaves

_OPEN = Phase.OPEN  # a global: looking a member up in its Enum costs as much as a frame's header


def peer_address(transport: asyncio.BaseTransport) -> str:
    """The IP address at the other end; empty for a Unix socket, or once it is closed."""
    name = transport.get_extra_info("peername")
    return str(name[0]) if isinstance(name, tuple) else ""


class Sender(asyncio.Protocol):
    """The half of a connection that writes."""

    __slots__ = (
        "_drained", "_holds", "_queue", "allowance", "fd", "forwarded_for", "hub", "is_queueing",
        "loop", "name", "phase", "transport",
    )  # fmt: skip
    transport: asyncio.Transport

    def __init__(self, hub: Hub) -> None:
        self.loop = asyncio.get_running_loop()
        self.hub = hub
        self.name = f"c{next(hub.names)}"  # in logs
        self.forwarded_for: str | None = None  # its peer's address, where a proxy is trusted
        self.phase = Phase.HTTP
        self.fd = -1  # of its socket, if we may use that ourselves
        self.allowance = 0  # unsent bytes beyond the limit: a replay is no fault of the client's
        self.is_queueing = False  # until the next flush frames are queued, to leave together
        self._queue: list[bytes] = []
        self._drained: asyncio.Future[None] | None = None
        self._holds = 0

    def close(self, code: int, reason: str = "") -> None:
        """Start the closing handshake; the socket is cut if the peer does not answer in time."""
        raise NotImplementedError

    def abort(self) -> None:
        """Cut the connection; nothing that has arrived is read any more."""
        raise NotImplementedError

    @property
    def peer(self) -> str:
        """The IP address at the other end; empty for a Unix socket."""
        return peer_address(self.transport)

    @property
    def is_near(self) -> bool:
        """Is its peer on this machine, by loopback or a Unix socket?"""
        address = self.peer
        return not address or address.startswith("127.") or address == "::1"

    @property
    def who(self) -> str:
        """As logs name it: with its peer's address, or what a trusted proxy says that is."""
        return f"{self.name} {self.forwarded_for or self.peer or ''}".rstrip()

    def send_frame(self, frame: bytes, *, is_delivery: bool = False) -> None:
        """Send one or more frames, behind the answers of this read or of this turn of the loop.

        Never waits. A client whose unsent bytes are over its limit gets no more: it is dropped.
        """
        if self.phase is not _OPEN:
            return
        if self._holds & HOLD_WRITES and self.is_behind:
            return self._drop_slow()
        if not self.is_queueing:
            self.is_queueing = True
            self.hub.outbox.add(self)
        self._queue.append(frame)
        if is_delivery:
            self.hub.messages_out -= 1  # the flush will count it, and so do deliveries
        if len(frame) > FLUSH_BYTES or len(self._queue) >= FLUSH_FRAMES:
            self.flush()
            self.is_queueing = True  # as the read or the callback that will flush the rest expects

    def _drop_slow(self) -> None:
        """It reads too slowly: it gets no more, and may come back through its offset."""
        self.hub.drop(self.who, "slow")
        limit = self.hub.config.max_unsent_bytes
        self.close(CloseCode.TRY_AGAIN_LATER, f"over {limit} bytes unread (--max-unsent)")

    def write(self, data: bytes) -> None:
        """Give the socket what it takes at once, and the transport the rest."""
        fd = self.fd
        if fd < 0 or self._holds & HOLD_WRITES:
            return self.transport.write(data)
        try:
            sent = os.write(fd, data)
        except BlockingIOError:
            sent = 0
        except OSError:
            return self.abort()  # the peer is gone
        if sent < len(data):
            self.transport.write(memoryview(data)[sent:])

    def allow(self, size: int) -> None:
        """That much more may be unsent: it was asked for, and is no sign of a slow client."""
        self.allowance = size + (0 if self.is_writable else self.allowance)

    @property
    def is_behind(self) -> bool:
        """Has its socket left more bytes untaken than it may?"""
        limit = self.hub.config.max_unsent_bytes + self.allowance
        return self.transport.get_write_buffer_size() > limit

    @property
    def is_writable(self) -> bool:
        """Does the client read as fast as we write?"""
        return not self._holds & HOLD_WRITES

    async def written(self) -> None:
        """Wait while the client reads more slowly than we write to it; let others have a turn."""
        await self.hub.turns.breathe()
        if self._holds & HOLD_WRITES and self.phase in (Phase.OPEN, Phase.HTTP):
            if self._drained is None:
                self._drained = self.loop.create_future()
            await asyncio.shield(self._drained)

    async def written_within(self, seconds: float) -> bool:
        """`written`; can it still be written to? Who takes nothing for so long is dropped."""
        try:
            async with asyncio.timeout(seconds):
                await self.written()
        except TimeoutError:
            self._drop_slow()
        return self.phase is _OPEN

    def _wake_writers(self) -> None:
        if self._drained is not None:
            self._drained.set_result(None)
            self._drained = None

    def send_bytes(self, data: bytes) -> None:
        """Send what is no frame, behind the other answers of this read."""
        self._queue.append(data)
        if not self.is_queueing or len(data) > FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is queued, in one piece."""
        data = self.unqueue()
        if data:
            self.write(data)

    def unqueue(self) -> bytes:
        """What is queued, in one piece, and counted: for the caller to write."""
        self.is_queueing = False
        queue = self._queue
        count = len(queue)
        if not count:
            return b""
        if count == 1:
            data = queue.pop()
        else:
            data = b"".join(queue)
            queue.clear()
        if self.phase is _OPEN:
            self.hub.messages_out += count
            self.hub.bytes_out += len(data)
            return data
        return data if self.phase is Phase.HTTP else b""


def write_all(connections: Iterable[Sender], frames: bytes) -> None:
    """Write the same frames to each connection, without waiting for any."""
    write, size, written, hub = os.write, len(frames), 0, None
    for connection in connections:
        hub = connection.hub
        if connection._holds or connection.is_queueing:
            connection.send_frame(frames, is_delivery=True)
            continue
        written += 1
        try:
            sent = write(connection.fd, frames)  # as Connection.write, without the call
        except OSError:  # it takes nothing now, is gone, or its transport has to write
            connection.write(frames)
        else:
            if sent < size:
                connection.transport.write(memoryview(frames)[sent:])
    if hub is not None:
        hub.bytes_out += size * written  # those of the others count when they leave
