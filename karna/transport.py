"""Plain sockets: accepted, what they do not take at once kept for them, and closed.

asyncio makes a task, a future, five callbacks and some 2 KiB for a socket that it accepts, half of
what a handshake costs. So where there is epoll it only binds: this room accepts, and `reader`
reads. TLS, and systems without epoll, keep asyncio's transports, whose part this one plays.

Touches the loop and the reader; `listen` has an Acceptor for each listening socket.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from karna.reader import EpollReader, Readable

BACKLOG = 512  # connections the kernel completes while we are busy
ACCEPTS = 32  # sockets in a turn, some 20 microseconds each
ACCEPT_RETRY_S = 1.0  # after a failure, such as no descriptors left


class Peer(Readable, Protocol):
    """What a transport needs of a connection."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A socket was accepted."""

    def connection_lost(self, exc: Exception | None) -> None:
        """It is about to be closed."""

    def pause_writing(self) -> None:
        """The socket does not take what is written."""

    def resume_writing(self) -> None:
        """It has taken all."""


class SocketTransport(asyncio.Transport):
    """One plain socket, as a connection writes and closes it; `reader` reads it.

    `write` keeps what its caller could not write to `fd` by itself.
    """

    __slots__ = (
        "_has_ended", "_has_eof", "_is_closing", "_is_lost", "_is_reading", "_kept", "_loop",
        "_peer", "_peername", "_reader", "_socket", "fd",
    )  # fmt: skip

    def __init__(
        self, loop: asyncio.AbstractEventLoop, reader: EpollReader, sock: socket.socket,
        peername: Any, peer: Peer,
    ) -> None:  # fmt: skip
        # Not super(): it makes a dict for what get_extra_info tells.
        self._loop = loop
        self._reader = reader
        self._socket = sock
        self._peername = peername
        self._peer = peer
        self.fd = sock.fileno()
        self._kept: bytearray | None = None  # what the socket did not take yet
        self._is_reading = False
        self._has_ended = False  # nothing more will be read
        self._has_eof = False  # nothing more will be written
        self._is_closing = False
        self._is_lost = False  # and what is kept will not be written, either

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """The `peername` or the `socket`."""
        return {"peername": self._peername, "socket": self._socket}.get(name, default)

    # Reading.

    def pause_reading(self) -> None:
        if self._is_reading:
            self._is_reading = False
            self._reader.remove(self._peer)

    def resume_reading(self) -> None:
        if not (self._is_reading or self._has_ended or self._is_closing):
            try:
                self._reader.add(self._peer)
            except OSError:  # the system watches no more sockets (fs.epoll.max_user_watches)
                return self.abort()
            self._is_reading = True

    def end_reading(self) -> None:
        """The peer sends no more."""
        self._has_ended = True
        self.pause_reading()

    # Writing.

    def get_write_buffer_size(self) -> int:
        return len(self._kept) if self._kept is not None else 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Keep `data` until the socket takes it."""
        if self._kept is not None:
            self._kept += data
        elif data and not self._is_lost:
            self._kept = bytearray(data)
            self._loop.add_writer(self.fd, self._write_kept)
            self._peer.pause_writing()

    def _write_kept(self) -> None:
        assert self._kept is not None
        try:
            sent = os.write(self.fd, self._kept)
        except BlockingIOError:
            return
        except OSError:
            return self.abort()  # the peer is gone
        del self._kept[:sent]
        if not self._kept:
            self._forget_kept()
            if self._has_eof:
                with suppress(OSError):  # the peer is gone
                    self._socket.shutdown(socket.SHUT_WR)
            self._peer.resume_writing()
            if self._is_closing and self._kept is None:
                self._lose()

    def _forget_kept(self) -> None:
        if self._kept is not None:
            self._kept = None
            self._loop.remove_writer(self.fd)

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        """Say that nothing more comes, behind what is kept. Raises OSError: the peer is gone."""
        if not (self._has_eof or self._is_closing):
            self._has_eof = True
            if self._kept is None:
                self._socket.shutdown(socket.SHUT_WR)

    # Its end.

    def is_closing(self) -> bool:
        return self._is_closing

    def close(self) -> None:
        """Close it once what is kept is written."""
        if not self._is_closing:
            self.end_reading()
            self._is_closing = True
            if self._kept is None:
                self._lose()

    def abort(self) -> None:
        """Close it, whatever is kept."""
        self.end_reading()
        self._is_closing = True
        self._lose()

    def _lose(self) -> None:
        if not self._is_lost:
            self._is_lost = True
            self._forget_kept()
            self._loop.call_soon(self._close)

    def _close(self) -> None:
        try:
            self._peer.connection_lost(None)
        finally:
            del self._peer
            self._socket.close()


class Acceptor:
    """Accepts what comes to one listening socket, a bounded number in a turn."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, reader: EpollReader, listening: socket.socket,
        make: Callable[[], Peer],
    ) -> None:  # fmt: skip
        self._loop = loop
        self._reader = reader
        self._make = make
        # A descriptor of our own: asyncio's is asyncio's to close.
        self._socket = socket.socket(fileno=os.dup(listening.fileno()))
        self._socket.setblocking(False)
        if self._socket.family != socket.AF_UNIX:  # each accepted one inherits it
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        self._retry: asyncio.TimerHandle | None = None
        self._socket.listen(BACKLOG)
        self._begin()

    def _begin(self) -> None:
        self._loop.add_reader(self._socket.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTS):
            try:
                accepted, peername = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError):  # another process was quicker
                return
            except OSError as exc:
                return self._wait(exc)
            accepted.setblocking(False)
            peer = self._make()
            transport = SocketTransport(self._loop, self._reader, accepted, peername, peer)
            peer.connection_made(transport)

    def _wait(self, exc: OSError) -> None:
        """It would be ready again at once."""
        self._loop.remove_reader(self._socket.fileno())
        self._retry = self._loop.call_later(ACCEPT_RETRY_S, self._begin)
        message = "a connection can't be accepted"
        self._loop.call_exception_handler({"message": message, "exception": exc})

    def close(self) -> None:
        """Accept nobody any more."""
        if self._retry is not None:
            self._retry.cancel()
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
