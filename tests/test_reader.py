"""One epoll for all sockets: nothing is left unread, and no client's fault meets another."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import socket
import struct
import tempfile
from typing import Any

import pytest

from karna.connection import HOLD_CALLS
from karna.errors import StartError
from karna_ws import Client, WebSocketManager, serving
from services import Service
from support import execute, served, until
from support_peers import close_frame, frame, raw, request


class Faulty(Service):
    """Its status can't be told while it is bad."""

    bad: BaseException | None = None

    def get_status(self) -> dict[str, Any]:
        if self.bad is not None:
            raise self.bad
        return super().get_status()


@pytest.mark.parametrize("fault", [asyncio.CancelledError(), SystemExit(3), RuntimeError("bug")])
async def test_fault_of_one_request_leaves_the_others_answered(fault: BaseException) -> None:
    faulty = Faulty("faulty")
    manager = WebSocketManager(services=[faulty])
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(served(manager, logs_errors=True))
        peers = [await stack.enter_async_context(raw(server.port)) for _ in range(20)]
        faulty.bad = fault
        # All are written before the server reads any of them.
        for number, peer in enumerate(peers):
            message = request("get_status", number) if number == 3 else execute("echo hi", number)
            peer.writer.write(frame(1, json.dumps(message).encode()))
        answers = [await peer.json() for peer in peers]
        assert [answer["id"] for answer in answers] == list(range(20))
        assert answers[3]["data"]["code"] == "internal_error"
        faulty.bad = None
        await peers[3].send_json(request("get_status", 99))
        assert (await peers[3].json())["type"] == "status_update"


class Picky(WebSocketManager):
    """A program of its own protocol that can't bear one message."""

    def __init__(self, fault: type[BaseException]) -> None:
        self.fault = fault
        super().__init__()

    def handle_message(self, client: Client, payload: bytes, is_text: bool) -> str:
        if payload == b"bad":
            raise self.fault
        return payload.decode()


@pytest.mark.parametrize("is_text", [True, False])
async def test_overridden_handler_that_is_cancelled_ends_no_other_client(is_text: bool) -> None:
    manager = Picky(asyncio.CancelledError)
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(served(manager, logs_errors=True))
        peers = [await stack.enter_async_context(raw(server.port)) for _ in range(10)]
        for number, peer in enumerate(peers):
            text = b"bad" if number == 2 else b"good"
            peer.writer.write(frame(1 if is_text else 2, text))
        for number, peer in enumerate(peers):
            if number == 2:
                assert (await peer.json())["data"]["code"] == "internal_error"
            else:
                assert (await peer.frame()).payload == b"good"


class Strange(BaseException):
    """As some extension modules raise for a panic of theirs."""


async def test_strange_error_ends_its_own_client_alone() -> None:
    # Where there is no epoll, asyncio reads: it tells the exception handler below instead.
    manager, logs_errors = Picky(Strange), hasattr(select, "epoll")
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(served(manager, logs_errors=logs_errors))
        peers = [await stack.enter_async_context(raw(server.port)) for _ in range(20)]
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        for number, peer in enumerate(peers):
            peer.writer.write(frame(1, b"bad" if number == 3 else b"good"))
        for number, peer in enumerate(peers):
            if number == 3:
                assert await peer.at_end()
            else:
                assert (await peer.frame()).payload == b"good"


async def test_urgent_byte_between_two_requests_keeps_neither_back() -> None:
    async with served() as server, raw(server.port) as peer:
        client = peer.writer.get_extra_info("socket")
        texts = [json.dumps(execute("echo hi", number)).encode() for number in range(2)]
        with socket.socket(fileno=os.dup(client.fileno())) as same:
            same.send(frame(1, texts[0]))
            same.send(b"!", socket.MSG_OOB)  # it is not part of the stream, and ends a read early
            same.send(frame(1, texts[1]))
        assert [(await peer.json())["id"] for _ in range(2)] == [0, 1]


async def test_descriptors_sent_along_keep_no_request_back() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/karna"
        async with served(unix=path), raw(path) as peer:
            client = peer.writer.get_extra_info("socket")
            texts = [json.dumps(execute("echo hi", number)).encode() for number in range(3)]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", 0))]
            with socket.socket(fileno=os.dup(client.fileno())) as same:
                for text in texts:  # each ends a read early
                    same.sendmsg([frame(1, text)], rights)
            assert [(await peer.json())["id"] for _ in range(3)] == [0, 1, 2]


async def test_last_words_are_read_before_the_end() -> None:
    heard: list[int] = []
    manager = WebSocketManager()

    @manager.commands.command(inline=True)
    def hear(number: int) -> None:
        heard.append(number)

    async with served(manager) as server:
        for number in range(50):
            async with raw(server.port) as peer:
                text = json.dumps(execute(f"hear {number}")).encode()
                peer.writer.write(frame(1, text))
                peer.writer.write_eof()
                assert await peer.frame()
        await until(lambda: not manager.connections)
    assert heard == list(range(50))


async def test_server_without_descriptors_for_its_reader_does_not_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: Any) -> Any:
        raise OSError(24, "Too many open files")

    manager = WebSocketManager()
    with monkeypatch.context() as patch:
        patch.setattr(select, "epoll", refuse, raising=False)
        with pytest.raises(StartError, match="can't watch sockets: Too many open files"):
            async with serving(manager, port=0):
                pass
    async with served(manager) as server, raw(server.port) as peer:
        await peer.send_json(execute("echo again", 1))
        assert (await peer.json())["data"]["result"] == "again"


async def test_idle_server_with_closed_and_half_closed_peers_rests() -> None:
    """An epoll that stays ready would turn the loop for ever."""
    manager = WebSocketManager()
    async with served(manager, close_timeout_s=100.0) as server:
        port = server.port
        async with raw(port) as peer, raw(port) as gone, raw(port) as held:
            await peer.send(close_frame())  # and leaves the socket open
            assert (await peer.frame()).opcode == 8
            gone.writer.transport.abort()
            await until(lambda: len(manager.raw) == 1)
            [client] = manager.raw.values()
            client.connection.hold(HOLD_CALLS)
            await held.send(frame(1, b"{}"))
            held.writer.write_eof()
            turns, loop = 0, asyncio.get_running_loop()
            select_once = loop._selector.select  # type: ignore[attr-defined]

            def count(timeout: float | None = None) -> Any:
                nonlocal turns
                turns += 1
                return select_once(timeout)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(loop._selector, "select", count)  # type: ignore[attr-defined]
                await asyncio.sleep(0.2)  # the sweep and the monitor turn it now and then
            assert turns < 50
