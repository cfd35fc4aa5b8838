"""One socket: back-pressure, heartbeat, close."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import time
from typing import Any

import pytest

from karna.door import HOLD_CALLS, HOLD_WRITES
from karna_ws import Client, WebSocketManager
from services import Command
from support import Gate, execute, served, until
from support_peers import (
    ENGINE,
    EchoManager,
    ask,
    close_frame,
    dial,
    engine,
    frame,
    in_fragments,
    lazy,
    post,
    raw,
)


async def test_message_limit_needs_no_more_than_the_frame_head_to_be_enforced() -> None:
    async with served() as server:
        for size in (1024 * 1024 + 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1):
            for opcode in (1, 2):
                async with raw(server.port) as peer:
                    start = bytes((0x80 | opcode, 0xFF)) + size.to_bytes(8, "big")
                    await peer.send(start + b"\1\2\3\4")
                    assert (await peer.closed()).code == 1009


async def test_client_that_sends_without_reading_is_paused_and_loses_nothing() -> None:
    async with served() as server, lazy(server.port) as peer:
        peer.writer.transport.pause_reading()
        (connection,) = server.manager.connections
        count = 4000  # answers of about 5 KiB: 20 MB, of which buffers take a few
        data = b"".join(frame(1, json.dumps(execute("help", n)).encode()) for n in range(count))
        sending = asyncio.create_task(peer.send(data))
        await until(lambda: connection._holds & HOLD_WRITES)
        await asyncio.sleep(0.1)  # whatever still comes in, comes in now
        assert (
            connection.transport.get_write_buffer_size() < 64 * 8 * 1024 + 64 * 1024
        )  # one write of joined answers
        peer.writer.transport.resume_reading()
        for number in range(count):
            assert (await peer.json())["id"] == number
        await sending


async def test_pings_without_reading_are_bounded_even_behind_a_close() -> None:
    pings = frame(9, b"x" * 125) * 20_000  # 2.6 MB, and as much again in pongs
    async with served(close_timeout_s=1.0) as server:
        for packet in (b'42/ws,["rpc",{}]', b"x"):  # the second makes the server close with 1002
            async with lazy(server.port, ENGINE) as peer:
                await peer.frame()
                await peer.send(frame(1, b"40/ws,"))
                await peer.frame()
                peer.writer.transport.pause_reading()
                (connection,) = server.manager.connections
                peer.writer.write(frame(1, packet))
                most = 0
                with contextlib.suppress(ConnectionError, TimeoutError):
                    async with asyncio.timeout(0.6):
                        while True:
                            most = max(most, connection.transport.get_write_buffer_size())
                            await peer.send(pings)
                            await asyncio.sleep(0)
                assert most < 2 * 1024 * 1024, packet
            await until(lambda: not server.manager.connections)


@pytest.mark.parametrize("door", ["raw", "socket.io"])
@pytest.mark.parametrize("life", [
    frame(10), frame(9), frame(1, b"3"), frame(10, b"unasked"),
    frame(1, b"3", fin=False) + frame(0),
])  # fmt: skip
async def test_any_frame_counts_as_life(door: str, life: bytes) -> None:
    options = {"ping_interval_s": 0.1, "ping_timeout_s": 0.1}
    async with (
        served(**options) as server,
        (raw if door == "raw" else engine)(server.port) as peer,
    ):
        until_ = time.monotonic() + 0.5  # twice what a silent peer has
        while time.monotonic() < until_:
            await peer.send(life)
            await asyncio.sleep(0.03)
        assert server.manager.count_clients() == 1
        await peer.send(close_frame())
        assert (await peer.closed()).code == 1000


async def test_peer_that_waits_for_its_own_commands_is_not_taken_for_dead() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    options = {"ping_interval_s": 0.1, "ping_timeout_s": 0.1, "max_running_commands": 1}
    async with served(manager, **options) as server, raw(server.port) as peer:
        texts = [json.dumps(execute("gate g", n)).encode() for n in range(300)]
        await peer.send(b"".join(frame(1, text) for text in texts) + frame(10))
        (connection,) = manager.connections
        await until(lambda: connection._holds == HOLD_CALLS)
        await asyncio.sleep(0.4)  # it could not be heard in this time
        gate.let("g")
        for number in range(300):
            assert (await peer.json())["id"] == number


@pytest.mark.parametrize("reads", [True, False])
async def test_peer_that_ignores_the_close_is_cut(reads: bool) -> None:
    manager = WebSocketManager()
    async with (
        served(manager, close_timeout_s=0.2) as server,
        lazy(server.port) as peer,
    ):
        if not reads:
            peer.writer.transport.pause_reading()
        (client,) = manager.raw.values()
        began = time.monotonic()
        await client.disconnect("enough")
        await until(lambda: not manager.connections)
        assert 0.15 < time.monotonic() - began < 0.5
        if reads:
            assert await peer.frame() == (8, b"\x03\xe8enough")


@pytest.mark.parametrize("through", ["broadcast", "send"])
async def test_burst_of_one_turn_leaves_a_stuck_reader_no_more_than_its_limit(through: str) -> None:
    manager = WebSocketManager()
    options = {"max_unsent_bytes": 200_000, "close_timeout_s": 0.2}
    async with served(manager, **options) as server:
        async with lazy(server.port) as stuck:
            stuck.writer.transport.pause_reading()
            [connection] = manager.connections
            [client] = manager.raw.values()
            most = 0
            for _ in range(300):
                if through == "broadcast":
                    manager.broadcast("tick", "x" * 100_000)
                    manager.flush_broadcasts()
                else:
                    client.deliver(b"x" * 100_000, None)
                most = max(most, connection.transport.get_write_buffer_size())
            assert most < 500_000
            assert manager.metrics.drops == {"slow": 1}
        await until(lambda: not manager.connections)


@pytest.mark.parametrize("inline", [True, False])
async def test_long_answer_is_no_sign_of_a_slow_client(inline: bool) -> None:
    manager = WebSocketManager()

    async def later(size: int) -> str:
        return "x" * size

    manager.commands.add(Command((lambda size: "x" * int(size)) if inline else later,
                                 name="long", inline=inline))  # fmt: skip
    async with served(manager) as server, lazy(server.port) as peer:
        [client] = manager.raw.values()
        peer.writer.transport.pause_reading()
        await peer.send_json(execute("long 12000000", 1))
        await until(lambda: not client.connection.is_writable)
        manager.notify("news")
        manager.flush_broadcasts()
        peer.writer.transport.resume_reading()
        assert len((await peer.json())["data"]["result"]) == 12_000_000
        assert (await peer.json())["data"]["message"] == "news"


async def test_what_leaves_behind_other_frames_is_counted_once() -> None:
    manager = WebSocketManager()
    async with served(manager) as server, raw(server.port) as peer:
        [client] = manager.raw.values()

        def counters() -> tuple[int, int]:
            return manager.bytes_out, manager.messages_out + manager.deliveries

        before = counters()
        client.deliver(b"{}", None)  # queued until the next turn...
        manager.broadcast("tick", 1)
        manager.flush_broadcasts()  # ...and this behind it
        received = [await peer.frame() for _ in range(2)]
        size = sum(2 + len(each.payload) for each in received)
        assert tuple(b - a for a, b in zip(before, counters(), strict=True)) == (size, 2)


async def test_stream_stays_whole_when_writes_are_cut_anywhere() -> None:
    """Answers, tasks and broadcasts of all sizes to a reader that is often behind."""
    manager = WebSocketManager()
    sizes = (1, 110, 126, 4_095, 4_097, 65_536, 300_000)

    @manager.commands.command(inline=True)
    def block(number: int) -> list[Any]:
        return ["answer", number, "x" * sizes[number % 7]]

    async def talk(client: Client) -> None:
        for number in range(60):
            await client.send("task", [number, "x" * sizes[number % 7]])
            manager.broadcast("all", [number, "x" * sizes[number % 5]])

    options = {"max_unsent_bytes": 2**30}
    async with served(manager, **options) as server, lazy(server.port) as peer:
        [client] = manager.raw.values()
        peer.writer.transport.pause_reading()
        task = asyncio.create_task(talk(client))
        for number in range(60):
            text = json.dumps(execute(f"block {number}", number)).encode()
            peer.writer.write(frame(1, text))
        await until(lambda: not client.connection.is_writable)
        peer.writer.transport.resume_reading()
        seen: dict[str, list[int]] = {"task": [], "all": [], "answer": []}
        while min(map(len, seen.values())) < 60:
            message = await peer.json()
            data = message["data"]
            if message["type"] == "command_response":
                seen["answer"].append(data["result"][1])
                assert data["result"][2] == "x" * sizes[message["id"] % 7]
            else:
                seen[message["type"]].append(data[0])
        await task
        assert all(numbers == list(range(60)) for numbers in seen.values())


async def test_client_that_takes_what_is_written_lives_without_a_word() -> None:
    manager = WebSocketManager()
    async with served(manager) as server, lazy(server.port) as peer:
        [client] = manager.raw.values()
        connection = client.connection
        peer.writer.transport.pause_reading()
        count = 0
        while connection.is_writable:
            client.deliver(b"x" * 100_000, None)
            count += 1
        connection.heard = False
        peer.writer.transport.resume_reading()
        for _ in range(count):
            await peer.frame()
        await until(lambda: connection.is_writable)
        assert connection.heard


@pytest.mark.parametrize("limit", [128, 1000, 70_000])
async def test_message_limit_is_exact_for_frames_and_fragments(limit: int) -> None:
    async with served(EchoManager(), max_message_bytes=limit) as server:
        async with raw(server.port) as peer:
            for size in (0, limit - 1, limit):
                for opcode in (1, 2):
                    for count in (1, 2, 7):
                        await peer.send(in_fragments(opcode, b"x" * size, count))
                        assert await peer.frame() == (opcode, b"x" * size)
        for opcode, count in itertools.product((1, 2), (1, 2, 7)):
            async with raw(server.port) as peer:
                data = in_fragments(opcode, b"x" * (limit + 1), count)
                await peer.send(frame(1, b"before") + data)
                assert await peer.frame() == (1, b"before")
                closed = await peer.closed()
                assert closed.code == 1009 and str(limit) in closed.reason


async def said_and_left(port: int, talk: Any) -> None:
    async with talk(port) as peer:
        await peer.sync()
        await peer.send(close_frame())
        await peer.closed()


async def posted(port: int, target: str, value: Any) -> None:
    """Twice on one connection, and once on one that ends with its answer."""
    async with dial(port) as peer:
        for _ in range(2):
            await peer.send(post(target, value, {**ACCEPTED, "Connection": "keep-alive"}))
            await peer.answer()
    await ask(port, post(target, value, ACCEPTED))


async def cut(server: Any) -> None:
    """While its command runs."""
    async with dial(server.port) as peer:
        await peer.send(post("/api/execute_command", {"command": "countdown 9"}))
        await until(lambda: server.manager.commands.tasks.running)
        peer.writer.transport.abort()


ACCEPTED = {"Accept": "application/json, text/event-stream"}
TOOL = {"jsonrpc": "2.0", "id": 1, "method": "tools/call",
        "params": {"name": "describe", "arguments": {"image": "x"}}}  # fmt: skip
ENDED: dict[str, Any] = {
    "raw": lambda server: said_and_left(server.port, raw),
    "Socket.IO": lambda server: said_and_left(server.port, engine),
    "POST": lambda server: posted(server.port, "/api/execute_command", {"command": "describe x"}),
    "JSON-RPC": lambda server: posted(
        server.port, "/rpc", {"jsonrpc": "2.0", "method": "x", "id": 1}
    ),
    "MCP": lambda server: posted(server.port, "/mcp", TOOL),
    "POST that is cut": cut,
}


@pytest.mark.parametrize("door", ENDED)
async def test_connection_that_has_ended_leaves_nothing_that_only_the_collector_finds(
    door: str,
) -> None:
    """Its last request may be a mebibyte, its `state` more."""
    async with served() as server:
        await ENDED[door](server)
        await until(lambda: not server.manager.connections)
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            await ENDED[door](server)
            await until(lambda: not server.manager.connections)
            assert await server.manager.commands.tasks.wait(5.0)
            await asyncio.sleep(0)  # the callback that closed it has ended
            gc.collect()
            ours = [each for each in gc.garbage if type(each).__module__.startswith("karna")]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
        assert not ours
