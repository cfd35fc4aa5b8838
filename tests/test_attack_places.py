"""Places: who was let in keeps one, and nobody holds a socket that he was not let in for."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any

import pytest

from karna.door import HOLD_CALLS
from karna_ws import Client, WebSocketManager
from support import Gate, Raw, Sio, served, until
from support_peers import ENGINE, TOKEN, Peer, ask, dial, frame, head, lazy, raw, upgrade
from test_listen import make_certificate

PENDING = 128  # hub.PENDING_CONNECTIONS


@pytest.mark.parametrize("start", [
    head("GET", "/health", {"Content-Length": 9000}),
    head("GET", "/", {"Transfer-Encoding": "chunked"}) + b"1\r\nx\r\n",
    head("OPTIONS", "/rpc", {"Content-Length": 9000}),
], ids=["length", "chunked", "preflight"])  # fmt: skip
async def test_bodies_that_never_end_give_way_to_newcomers(start: bytes) -> None:
    """Without a token they held all sockets for as long as a request may take to arrive."""
    async with (
        served(token=TOKEN, max_clients=2, open_timeout_s=60.0) as server,
        contextlib.AsyncExitStack() as stack,
    ):
        for _ in range(PENDING + 4):
            await (await stack.enter_async_context(dial(server.port))).send(start)
        assert (await ask(server.port, head("GET", "/health"))).status == 200


async def test_sockets_that_never_end_their_closing_give_way_to_newcomers() -> None:
    """Neither seated nor pending, they held all sockets for the close timeout."""
    async with (
        served(max_clients=2, close_timeout_s=60.0) as server,
        contextlib.AsyncExitStack() as stack,
    ):
        for _ in range(PENDING + 4):
            peer: Peer = await stack.enter_async_context(dial(server.port))
            await peer.send(upgrade())
            assert (await peer.answer()).status == 101
            await peer.send(frame(8))
            assert (await peer.frame()).opcode == 8
        assert (await ask(server.port, head("GET", "/health"))).status == 200


async def test_connect_handlers_of_who_has_left_keep_their_places() -> None:
    """A peer that came and went in turn started as many as it liked.

    On the raw door it is not read meanwhile, so that it keeps its own place.
    """
    manager, running, go_on = WebSocketManager(), 0, asyncio.Event()

    @manager.on("connect")
    async def decide(client: Client, auth: Any) -> None:
        nonlocal running
        running += 1
        await go_on.wait()

    async with served(manager, max_clients=3) as server:
        for number in range(1, 4):
            async with raw(server.port, ENGINE) as peer:
                await peer.send(frame(1, b"40"))
                await until(lambda: running == number)
            await until(lambda: not manager.connections)
        answer = await ask(server.port, upgrade())
        assert (answer.status, answer.error["code"]) == (503, "unavailable")
        go_on.set()
        await until(lambda: not manager.is_full)
        async with raw(server.port):
            await until(lambda: manager.raw)
        await until(lambda: not manager.connections)
    assert (manager.leaving, manager.deciding) == (0, set())


async def test_client_sent_away_by_its_connect_handler_gives_its_place_back() -> None:
    manager = WebSocketManager()

    @manager.on("connect")
    async def decide(client: Client, auth: Any) -> None:
        await client.disconnect("no")

    async with served(manager) as server, Sio.open(server) as client:
        for _ in range(3):
            await client.send("40")
            assert (await client.packet("44"))["message"] == "no"
        await until(lambda: not manager.commands.running)
        assert (manager.leaving, manager.deciding) == (0, set())


async def test_answers_that_wait_in_batches_are_bounded() -> None:
    """Of 288 batches that one slow command each kept open, all other answers were kept: 40 MiB."""
    manager = WebSocketManager()
    gate = Gate(manager)
    slow = {"jsonrpc": "2.0", "method": "execute_command", "params": ["gate a"], "id": 0}
    quick = {"jsonrpc": "2.0", "method": "get_status", "id": 1}
    async with served(manager) as server, Raw.open(server) as client:
        await client.send(*([slow, *[quick] * 200] for _ in range(100)))
        connection = next(iter(manager.raw.values())).connection
        await until(lambda: connection.is_held(HOLD_CALLS))
        assert connection.waiting_bytes < 2 * 1024 * 1024
        gate.let("a")
        for _ in range(100):
            assert len(await client.next()) == 201
        assert await client.run("echo x") == "x"
        assert (connection.waiting, connection.waiting_bytes) == (0, 0)


@pytest.mark.parametrize("who", ["handshake", "replay"])
async def test_stop_does_not_wait_for_who_has_not_come_in(who: str, tmp_path: Path) -> None:
    """One silent stranger made each restart take 10 s."""
    tls = {}
    if who == "handshake":
        certificate, key = make_certificate(tmp_path)
        tls = {"certfile": str(certificate), "keyfile": str(key)}
    manager = WebSocketManager()
    async with served(manager, grace_s=25.0, **tls) as server, contextlib.AsyncExitStack() as stack:
        if who == "handshake":
            await stack.enter_async_context(dial(server.port))
            await until(lambda: manager.connections)
        else:
            before = manager.history.last
            for _ in range(200):
                manager.broadcast("x", "y" * 20_000)
            await stack.enter_async_context(lazy(server.port, f"/ws?since={before}"))
            await until(lambda: any(not each.is_writable for each in manager.connections))
        began = time.monotonic()
        await server.close()
        assert time.monotonic() - began < 10.0  # 25 and more, with the grace
