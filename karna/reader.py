"""One epoll for all sockets, and fairness between them.

A turn of the loop serves everybody, so it belongs to nobody: whoever has more to do than one turn
allows goes on when the others had theirs. What a turn does for all it does at once, system calls
with system calls. Imports nothing of ours; `hub` owns the objects, `connection` uses them.
"""

from __future__ import annotations

import asyncio
import os
import select
from collections import deque
from collections.abc import Callable, Iterable
from time import perf_counter
from typing import Protocol

READ_BYTES = 64 * 1024  # taken from a socket at a time; malloc maps pages anew from 128 KiB on
READ_AHEAD_BYTES = 2 * READ_BYTES  # of all sockets together, before any of it is handled
MAX_READS = 128  # sockets looked at before the loop has another look at its timers
TURN_S = 0.002  # then the loop looks at everything else: HTTP, timers, sockets in handshake
FLUSH_BYTES = 4096  # what is longer does not wait for others


class Turns:
    """Work that goes on in a later turn of the loop, one piece after another, each as it came."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[Callable[[], None]] = deque()
        self._is_scheduled = False
        self._breathe_at = 0.0

    def wait(self, go_on: Callable[[], None]) -> None:
        """Call `go_on` in a later turn, behind what waits already. It must not raise."""
        self._waiting.append(go_on)
        self._schedule()

    def _schedule(self) -> None:
        if self._waiting and not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._run)

    def _run(self) -> None:
        self._is_scheduled = False
        until = perf_counter() + TURN_S
        try:
            for _ in range(len(self._waiting)):
                self._waiting.popleft()()
                if perf_counter() > until:
                    break
        finally:
            self._schedule()

    async def breathe(self) -> None:
        """For what a program may await in a loop: let the loop turn when it is time."""
        if perf_counter() > self._breathe_at:
            await asyncio.sleep(0)
            self._breathe_at = perf_counter() + TURN_S


class Writable(Protocol):
    """What is needed of a connection to write its answers with those of others."""

    def unqueue(self) -> bytes:
        """The queued answers, in one piece, for the caller to write."""

    def write(self, data: bytes) -> None:
        """Write this, whatever is queued."""


class Readable(Writable, Protocol):
    """What the reader needs of a connection besides."""

    @property
    def fd(self) -> int:
        """Of its socket, which does not block."""

    def take(self, data: bytes) -> None:
        """Handle what was read; answers are queued."""

    def take_end(self) -> None:
        """Nothing more will arrive."""

    def flush(self) -> None:
        """Write the queued answers."""

    def abort(self) -> None:
        """Cut the connection."""


def flush_all(connections: Iterable[Writable]) -> None:
    """Write what each has queued: first the Python of all, then the system calls of all.

    A processor that goes to and fro finds neither in its caches: up to a fifteenth of a raw
    request's time, a fifth of a POST's.
    """
    leaving = []
    for connection in connections:
        frames = connection.unqueue()
        if frames:
            leaving.append((connection, frames))
    for connection, frames in leaving:
        connection.write(frames)


class Outbox:
    """What connections queue outside a read, for one turn of the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._connections: list[Writable] = []

    def add(self, connection: Writable) -> None:
        """Write, in the next turn, what this one has queued by then."""
        if not self._connections:
            self._loop.call_soon(self._flush)
        self._connections.append(connection)

    def _flush(self) -> None:
        connections, self._connections = self._connections, []
        flush_all(connections)


class EpollReader:
    """Reads all sockets of a server in one callback of the loop.

    The loop watches one epoll of ours in place of every socket: a read costs no Handle, no Context
    and none of asyncio's four calls. A turn reads what is ready, handles it, and then writes all
    answers: `flush_all` says why, and peers that the first one wakes are awake for the rest.

    count: told how many bytes were read; failed: told what a connection raised.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, count: Callable[[int], None],
        failed: Callable[[Readable, BaseException], None],
    ) -> None:  # fmt: skip
        self._loop = loop
        self._count = count
        self._failed = failed
        self._connections: dict[int, Readable] = {}
        # What is to be read without a new event, by descriptor: its last ones.
        self._unread: dict[int, int] = {}
        self._waiting: dict[int, int] = {}  # for it has had a turn, and has more
        self._arrived: deque[tuple[Readable, bytes]] = deque()  # read, and to be handled
        self._is_scheduled = False
        self._epoll = select.epoll()
        self._events = select.EPOLLIN | select.EPOLLPRI | select.EPOLLRDHUP
        loop.add_reader(self._epoll.fileno(), self._have_turn)

    def trust_edges(self) -> None:
        """Look at a socket that was read empty only when more arrives.

        Not for Unix sockets: a read of theirs also ends early where descriptors were sent along.
        """
        self._events |= select.EPOLLET

    def add(self, connection: Readable) -> None:
        """Read this connection from now on. Raises OSError where the system watches no more."""
        self._epoll.register(connection.fd, self._events)
        self._connections[connection.fd] = connection

    def remove(self, connection: Readable) -> None:
        """Read it no more; what arrives stays in its socket."""
        if self._is_read(connection):
            del self._connections[connection.fd]
            self._waiting.pop(connection.fd, None)
            self._unread.pop(connection.fd, None)
            self._epoll.unregister(connection.fd)

    def _is_read(self, connection: Readable) -> bool:
        return self._connections.get(connection.fd) is connection

    def close(self) -> None:
        """Read nothing any more."""
        self._connections.clear()
        self._waiting.clear()
        self._unread.clear()
        self._arrived.clear()
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    def _have_next_turn(self) -> None:
        self._is_scheduled = False
        if not self._epoll.closed:
            self._have_turn()

    def _have_turn(self) -> None:
        """First who has something new, then one of those who have had a turn and have more."""
        try:
            if not self._arrived:
                self._read(self._look())
            self._handle()
            if self._waiting and not self._arrived:
                fd = next(iter(self._waiting))
                self._read([(fd, self._waiting.pop(fd))])
                self._handle()
        except KeyboardInterrupt:  # the loop ends; should it go on, all are looked at again
            self._unread = dict.fromkeys(self._connections, self._events)
            raise
        finally:
            if (self._arrived or self._unread or self._waiting) and not self._is_scheduled:
                self._is_scheduled = True
                self._loop.call_soon(self._have_next_turn)

    def _look(self) -> Iterable[tuple[int, int]]:
        """Descriptors that are ready, with their events, but for those that wait."""
        ready = self._epoll.poll(0, MAX_READS)
        if not self._unread and not self._waiting:
            return ready
        fresh, self._unread = self._unread, {}
        for fd, events in ready:
            group = self._waiting if fd in self._waiting else fresh
            group[fd] = group.get(fd, 0) | events
        return fresh.items()

    def _read(self, ready: Iterable[tuple[int, int]]) -> None:
        """Read from each of these sockets, but not without end."""
        connections, read, only_data = self._connections, os.read, select.EPOLLIN
        received = 0
        in_turn = iter(ready)
        for fd, events in in_turn:
            connection = connections[fd]
            try:
                data = read(fd, READ_BYTES)
            except BlockingIOError:
                continue
            except OSError:  # the peer is gone
                connection.abort()
                continue
            self._arrived.append((connection, data))
            size = len(data)
            received += size
            if size == READ_BYTES:
                self._waiting[fd] = events
            elif events != only_data:
                self._unread[fd] = events
            if received >= READ_AHEAD_BYTES:
                break
        self._unread.update(in_turn)
        self._count(received)

    def _handle(self) -> None:
        """Handle what has arrived, for as long as a turn may take, and write the answers."""
        arrived, until = self._arrived, perf_counter() + TURN_S
        handled = []
        try:
            while arrived:
                connection, data = arrived.popleft()
                handled.append(connection)
                try:
                    if data:
                        connection.take(data)
                    elif self._is_read(connection):  # else it is held, and its end is read again
                        connection.take_end()
                except KeyboardInterrupt:
                    raise
                except BaseException as exc:  # a bug ends this client, not the others
                    self._failed(connection, exc)
                    connection.abort()
                if len(data) > FLUSH_BYTES:
                    connection.flush()
                if perf_counter() > until:
                    break
        finally:
            flush_all(handled)
