"""Plain sockets: what is kept for one leaves in order, its end comes once, and accepting goes on."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from karna import transport as room
from karna.reader import EpollReader
from karna.transport import Acceptor, SocketTransport
from support import until

pytestmark = pytest.mark.skipif(
    not hasattr(select, "epoll") or "KARNA_TEST_WITHOUT_EPOLL" in os.environ,
    reason="asyncio's transports serve systems without epoll",
)


class Recorder:
    """The connection of a transport: what it was told, in order."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.fd = -1
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport, self.fd = transport, transport.fd

    def connection_lost(self, exc: Exception | None) -> None:
        self.told.append("lost")

    def pause_writing(self) -> None:
        self.told.append("pause")

    def resume_writing(self) -> None:
        self.told.append("resume")

    def take(self, data: bytes) -> None:
        self.told.append(data)

    def take_end(self) -> None:
        self.told.append("end")
        self.transport.end_reading()

    def flush(self) -> None:
        pass

    def abort(self) -> None:
        self.transport.abort()


class Ends:
    """A transport on one socket of a pair, the peer on the other, which blocks."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        ours, self.theirs = socket.socketpair()
        for each in (ours, self.theirs):
            each.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.reader = EpollReader(loop, lambda count: None, lambda connection, exc: None)
        self.peer = Recorder()
        self.transport = SocketTransport(loop, self.reader, ours, "", self.peer)
        self.peer.connection_made(self.transport)

    async def read_all(self) -> bytes:
        loop, received = asyncio.get_running_loop(), b""
        while piece := await loop.sock_recv(self.theirs, 65536):
            received += piece
        return received

    def close(self) -> None:
        self.transport.abort()
        self.reader.close()
        self.theirs.close()


@pytest.fixture
async def ends() -> Any:
    made = Ends()
    yield made
    made.close()
    await asyncio.sleep(0)


MUCH = bytes(range(256)) * 4096  # more than a socket takes


async def test_what_the_socket_does_not_take_leaves_in_order_before_the_end(ends: Ends) -> None:
    ends.transport.write(MUCH)
    ends.transport.write(b"and then")
    assert ends.peer.told == ["pause"] and ends.transport.get_write_buffer_size() == len(MUCH) + 8
    ends.transport.write_eof()
    assert await ends.read_all() == MUCH + b"and then"
    assert ends.peer.told == ["pause", "resume"] and not ends.transport.get_write_buffer_size()


async def test_close_waits_for_what_is_kept_and_loses_the_connection_once(ends: Ends) -> None:
    ends.transport.write(MUCH)
    ends.transport.close()
    assert ends.transport.is_closing() and "lost" not in ends.peer.told
    ends.transport.close()
    assert await ends.read_all() == MUCH
    await until(lambda: "lost" in ends.peer.told)
    ends.transport.abort()
    ends.transport.write(b"too late")
    await asyncio.sleep(0)
    assert ends.peer.told == ["pause", "resume", "lost"]


async def test_abort_drops_what_is_kept_and_tells_in_a_turn_of_its_own(ends: Ends) -> None:
    ends.transport.write(MUCH)
    ends.transport.abort()
    assert ends.peer.told == ["pause"] and ends.transport.get_write_buffer_size() == 0
    assert len(await ends.read_all()) < len(MUCH)
    assert ends.peer.told == ["pause", "lost"]


async def test_peer_that_is_gone_ends_what_is_kept_for_it(ends: Ends) -> None:
    ends.transport.write(MUCH)
    ends.theirs.close()
    await until(lambda: "lost" in ends.peer.told)
    assert ends.peer.told == ["pause", "lost"]


async def test_end_of_the_peer_is_told_once_however_often_reading_goes_on(ends: Ends) -> None:
    ends.transport.resume_reading()
    ends.transport.resume_reading()
    ends.theirs.send(b"last")
    ends.theirs.shutdown(socket.SHUT_WR)
    await until(lambda: "end" in ends.peer.told)
    ends.transport.pause_reading()
    ends.transport.resume_reading()
    for _ in range(5):  # looks of the loop at its sockets
        await asyncio.sleep(0)
    assert ends.peer.told == [b"last", "end"]


async def test_paused_transport_reads_nothing_until_it_goes_on(ends: Ends) -> None:
    ends.transport.resume_reading()
    ends.transport.pause_reading()
    ends.theirs.send(b"wait")
    for _ in range(5):
        await asyncio.sleep(0)
    assert ends.peer.told == []
    ends.transport.resume_reading()
    await until(lambda: ends.peer.told == [b"wait"])


async def test_socket_that_the_system_does_not_watch_is_closed(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def register(self, fd: int, events: int) -> None:
            raise OSError(errno.ENOSPC, "no more")

    with monkeypatch.context() as patched:
        patched.setattr(ends.reader, "_epoll", Full())
        ends.transport.resume_reading()
    await until(lambda: ends.peer.told == ["lost"])
    assert not ends.reader._connections


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


async def test_acceptor_goes_on_after_a_failure_that_it_reports(
    listening: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    reader = EpollReader(loop, lambda count: None, lambda connection, exc: None)
    monkeypatch.setattr(room, "ACCEPT_RETRY_S", 0.01)
    reported: list[Any] = []
    loop.set_exception_handler(lambda loop, context: reported.append(context["exception"].errno))
    made: list[Recorder] = []

    def make() -> Recorder:
        made.append(Recorder())
        return made[-1]

    acceptor = Acceptor(loop, reader, listening, make)
    accept, failures = socket.socket.accept, [errno.EMFILE, errno.ECONNABORTED]

    def failing(self: socket.socket) -> Any:
        if failures:
            raise OSError(failures.pop(0), "no")
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", failing)
    with socket.create_connection(listening.getsockname()) as one:
        await until(lambda: made and made[0].transport is not None)
        assert made[0].transport.get_extra_info("peername") == one.getsockname()
        assert reported == [errno.EMFILE], "and a connection that was aborted is no failure"
    acceptor.close()
    made[0].transport.abort()
    await until(lambda: made[0].told == ["lost"])
    reader.close()


async def test_acceptor_that_was_closed_leaves_the_listening_socket_to_others(
    listening: socket.socket,
) -> None:
    loop = asyncio.get_running_loop()
    reader = EpollReader(loop, lambda count: None, lambda connection, exc: None)
    acceptor = Acceptor(loop, reader, listening, Recorder)
    acceptor.close()
    with socket.create_connection(listening.getsockname()):
        listening.setblocking(False)
        other, _ = await loop.sock_accept(listening)
        other.close()
    reader.close()
