"""The connection set: who joins, broadcasts to all, and recovery of what was missed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from typing import Any

import orjson
import pytest

from karna.door import HOLD_CONNECT
from karna.broadcasts import FLUSH_BROADCAST_BYTES
from karna_ws import Client, Server, WebSocketManager
from services import CommandProcessor, Service
from support import EXECUTE, Lamp, Raw, Sio, execute, needs, offsets, served, until
from support_peers import ENGINE, RAISED, Peer, Received, engine, frame, lazy, raw
from support_process import process


# --- Who joins -------------------------------------------------------------------------------------


async def test_connect_handler_that_waits_holds_the_client_back() -> None:
    manager = WebSocketManager()
    deciding = asyncio.Event()

    @manager.on("connect")
    async def decide(client: Client, auth: Any) -> None:
        await deciding.wait()

    async with served(manager) as server:
        async with Raw.open(server) as raw, Sio.open(server) as client:
            await raw.send(execute("echo held", id=1))
            await client.send("40/ws,")
            await until(lambda: len(manager.commands.tasks.running) == 2)
            deciding.set()
            assert (await raw.final(1))["data"]["result"] == "held"
            assert "sid" in await client.packet("40/ws,")
        deciding.clear()
        async with Sio.open(server) as client:
            await client.send("40", '42["rpc",{}]')
            assert await client.closed() == (1002, "event before connect")
        await until(lambda: not manager.sessions)
        deciding.set()
        await until(lambda: not manager.commands.tasks.running)
        assert manager.count_clients() == 0, "a client that left while it waited never joins"


async def test_connect_handlers_of_a_client_that_joins_and_leaves_do_not_pile_up() -> None:
    manager = WebSocketManager()
    started, deciding = 0, asyncio.Event()

    @manager.on("connect")
    async def decide(client: Client, auth: Any) -> None:
        nonlocal started
        started += 1
        await deciding.wait()

    async with served(manager) as server, Sio.open(server) as client:
        await client.send("40/ws,")
        await until(lambda: started == 1)
        await client.send("41/ws,", "40/ws,")
        (connection,) = manager.connections
        await until(lambda: connection._holds & HOLD_CONNECT)
        assert len(manager.commands.tasks.running) == 1, (
            "it is not read until the first handler has decided"
        )
        deciding.set()
        assert "sid" in await client.packet("40/ws,")
        assert (started, connection._holds) == (2, 0)


@pytest.mark.parametrize("name", [name for name in RAISED if name != "cancelled"])
async def test_connect_handlers_that_fail_refuse_their_client_alone(name: str) -> None:
    manager = WebSocketManager()

    @manager.on("connect")
    async def connect(client: Client, auth: Any) -> None:
        if client.door == "raw" or auth.get("fail"):
            raise RAISED[name]()

    @manager.on("disconnect")
    async def disconnect(client: Client, reason: str) -> None:
        raise RAISED[name]()

    async with served(manager) as server:
        async with raw(server.port) as peer:
            assert (await peer.closed()).code == 1008
        async with engine(server.port, connect=None) as peer:
            await peer.send(frame(1, b'40/ws,{"fail":1}'))
            answer = (await peer.frame()).payload
            assert json.loads(answer.removeprefix(b"44/ws,"))["message"]
            await peer.send(frame(1, b"40/ws,"))
            assert (await peer.frame()).payload.startswith(b"40/ws,{")
        await until(lambda: not manager.connections)


async def test_clients_command_lists_who_is_connected() -> None:
    async with (
        served() as server, Raw.open(server) as client, Sio.open(server, join="/ws") as other
    ):  # fmt: skip
        listed = await client.run("clients")
        assert listed["count"] == 2
        by_door = {each["door"]: each for each in listed["clients"]}
        assert by_door["raw"]["id"] == listed["you"]
        assert by_door["socket.io"]["namespace"] == "/ws"
        answer = await other.rpc(execute("clients"), namespace="/ws")
        assert answer["data"]["result"]["you"] == by_door["socket.io"]["id"]


# --- Broadcast -------------------------------------------------------------------------------------


async def test_broadcast_reaches_all_clients_of_both_doors_in_the_same_order() -> None:
    manager = WebSocketManager()

    @manager.commands.command
    async def say(number: int) -> None:
        manager.broadcast("number", f"async {number}")

    @manager.commands.command
    def say_in_thread(number: int) -> None:
        manager.broadcast("number", f"thread {number}")

    async def background() -> None:
        for number in range(20):
            manager.broadcast("number", f"task {number}")
            await asyncio.sleep(0)

    async with (
        served(manager) as server,
        Raw.open(server) as one,
        Raw.open(server) as two,
        Sio.open(server, join="/") as three,
        Sio.open(server, join="/ws") as four,
    ):
        task = asyncio.create_task(background())
        for number in range(20):
            await one.send(execute(f"say {number}", id=f"a{number}"))
            await two.send(execute(f"say_in_thread {number}", id=f"t{number}"))
            await four.send(f'42/ws,["rpc",{json.dumps(execute(f"say {number}"))}]')
        await task
        seen: list[list[str]] = []
        for raw in (one, two):
            numbers = [await raw.next_of("number") for _ in range(80)]
            assert [each["offset"] for each in numbers] == offsets(manager, 80)
            seen.append([each["data"] for each in numbers])
        for client in (three, four):
            texts = []
            while len(texts) < 80:
                frame = await client.next()
                _, envelope, *offset = json.loads(frame[frame.index("[") :])
                if envelope["type"] == "number":
                    assert offset == [envelope["offset"]]
                    texts.append(envelope["data"])
            seen.append(texts)
        assert seen[0] == seen[1] == seen[2] == seen[3]
        for kind, count in (("task", 20), ("thread", 20), ("async", 40)):
            assert len([text for text in seen[0] if text.startswith(kind)]) == count
        in_task = [text for text in seen[0] if text.startswith("task")]
        assert in_task == [f"task {number}" for number in range(20)]


async def test_broadcast_counts_every_client_once_a_namespace() -> None:
    manager = WebSocketManager()
    assert manager.notify("before anybody is served") == 0
    async with served(manager) as server:
        assert manager.notify("nobody is there") == 0
        async with (
            Raw.open(server),
            Raw.open(server),
            Sio.open(server, join="/") as client,
            Sio.open(server),  # has joined no namespace
        ):
            await client.join("/ws")
            await client.join("/ws/")
            assert manager.broadcast("x", None) == 5
        await until(lambda: manager.count_clients() == 0)
        assert manager.notify("all are gone") == 0


async def test_broadcast_from_a_thread_is_handed_to_the_loop() -> None:
    manager = WebSocketManager()

    @manager.commands.command
    def shout() -> int:
        return manager.notify("from a thread")

    async with served(manager) as server, Raw.open(server) as client:
        asyncio.get_running_loop().set_debug(True)  # call_soon() from a thread raises then
        assert await client.run("shout") == 1
        assert (await client.next_of("notification"))["data"]["message"] == "from a thread"


async def test_notify_command_broadcasts_and_counts() -> None:
    async with (
        served() as server, Raw.open(server) as client, Sio.open(server, join="/ws") as other
    ):  # fmt: skip
        assert await client.run("notify build done --level warning") == {"clients": 2}
        data = (await client.next_of("notification"))["data"]
        assert (data["message"], data["level"]) == ("build done", "warning")
        assert (await other.packet("42/ws,"))[1]["data"] == data
        for line in ("notify", "notify x --level loud"):
            error = await client.ask("execute_command", command=line)
            assert error["data"]["code"] == "usage"
            assert "notify MESSAGE..." in error["data"]["message"]


@pytest.mark.parametrize(
    ("message", "level"), [("", "info"), ("x", "loud"), ("x", ""), (5, "info"), ("x", None)]
)
async def test_notification_of_wrong_message_or_level_is_refused(message: Any, level: Any) -> None:
    manager = WebSocketManager()
    async with served(manager) as server, Raw.open(server) as client:
        with pytest.raises(ValueError, match="must be"):
            manager.notify(message, level)
        assert await client.received() == []


async def test_broadcast_of_what_json_cannot_hold_raises_and_disturbs_nobody() -> None:
    manager = WebSocketManager()
    async with served(manager) as server, Raw.open(server) as client:
        before = manager.history.last
        for data in (b"bytes", {1, 2}, "\ud800", 2**64):
            with pytest.raises(TypeError):
                manager.broadcast("bad", data)
        assert manager.history.last == before
        manager.broadcast("good", {1: None})
        assert (await client.next_of("good"))["data"] == {"1": None}


async def test_broadcasts_of_one_iteration_leave_in_one_write_a_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manager = WebSocketManager()
    writes: list[int] = []
    write = os.write

    def count(fd: int, data: bytes) -> int:
        if fd in [connection.fd for connection in manager.connections]:
            writes.append(fd)
        return write(fd, data)

    async with (
        served(manager) as server, Raw.open(server) as raw, Sio.open(server, join="/") as client
    ):  # fmt: skip
        if manager.reader is None:
            pytest.skip("asyncio writes where there is no epoll")
        monkeypatch.setattr(os, "write", count)
        for number in range(50):
            manager.broadcast("number", number)
        assert [(await raw.next_of("number"))["data"] for _ in range(50)] == list(range(50))
        for number in range(50):
            assert (await client.packet("42"))[1]["data"] == number
        assert sorted(writes) == sorted(connection.fd for connection in manager.connections)


async def test_broadcasts_of_one_iteration_that_are_large_together_all_arrive_in_order() -> None:
    manager = WebSocketManager()
    options = {"history_messages": 5, "max_unsent_bytes": 2**26}
    async with served(manager, **options) as server, Raw.open(server) as client:
        padding = "x" * (FLUSH_BROADCAST_BYTES // 3)
        for number in range(20):
            manager.broadcast("number", [number, padding])
        manager.broadcast("number", [20, ""])
        numbers = [(await client.next_of("number"))["data"][0] for _ in range(21)]
        assert numbers == list(range(21))


async def test_broadcasts_of_the_next_turns_leave_together_when_clients_are_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("karna.broadcasts.CLIENTS_A_TURN", 1)
    manager = WebSocketManager()
    async with served(manager) as server, contextlib.AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(raw(server.port)) for _ in range(4)]
        flushes: list[int] = []
        flush = manager.flush_broadcasts
        monkeypatch.setattr(
            manager, "flush_broadcasts", lambda: (flushes.append(len(manager._pending)), flush())
        )
        for number in range(3):
            manager.broadcast("number", number)
            await asyncio.sleep(0)
        for peer in peers:
            assert [(await peer.json())["data"] for _ in range(3)] == [0, 1, 2]
        assert flushes == [3]
        # Flushed early, for one who joins: the turns that still come must not flush again.
        manager.broadcast("number", 3)
        flush()
        manager.broadcast("number", 4)
        for peer in peers:
            assert [(await peer.json())["data"] for _ in range(2)] == [3, 4]
        assert flushes == [3, 1]


async def test_broadcast_just_before_the_end_still_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("karna.broadcasts.CLIENTS_A_TURN", 1)  # a flush waits as with many clients
    monkeypatch.setattr("karna.server.SHUTDOWN_CLOSE_S", 0.3)  # the peers leave their sockets open
    manager = WebSocketManager()
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(served(manager))
        peers = [await stack.enter_async_context(raw(server.port)) for _ in range(8)]
        manager.notify("going down")
        closing = server.close()
        for peer in peers:
            assert (await peer.json())["data"]["message"] == "going down"
            assert (await peer.closed()).code == 1012
        await closing


async def test_broadcast_survives_clients_that_vanish_at_any_time() -> None:
    for loop in ("asyncio", "uvloop"):
        if loop == "uvloop":
            needs("uvloop")
        async with process("--loop", loop) as karna:
            async with raw(karna.port) as reader, raw(karna.port) as publisher:
                for number in range(60):
                    async with contextlib.AsyncExitStack() as stack:
                        doors = (raw(karna.port), engine(karna.port), lazy(karna.port))
                        peers = [await stack.enter_async_context(door) for door in doors]
                        for kind, peer in enumerate(peers):
                            sock = peer.writer.get_extra_info("socket")
                            if (number + kind) % 3 == 0:  # a reset rather than an end
                                linger = struct.pack("ii", 1, 0)
                                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                            if (number + kind) % 3 == 1:
                                peer.writer.write_eof()
                        await publisher.send_json(execute(f"notify {number}", number))
                    while (got := await reader.json())["type"] != "notification":
                        pass
                    assert got["data"]["message"] == str(number)
            assert "Traceback" not in karna.log()


# --- Recovery --------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["status first", "notify first", "together"])
async def test_status_offset_lines_up_with_the_stream(order: str) -> None:
    manager = WebSocketManager()
    async with served(manager) as server, Raw.open(server) as client:
        manager.broadcast("number", 1)
        await client.next_of("number")
        assert (await client.ask("get_status"))["offset"] == manager.history.last
        requests = [{"method": "get_status", "id": "s"}, execute("notify now", id="n")]
        if order == "together":  # one read of the server, its answers in one write
            texts = [json.dumps(request).encode() for request in requests * 3]
            mask = b"\0\0\0\0"
            frames = [bytes((0x81, 0x80 | len(text))) + mask + text for text in texts]
            client.connection.transport.write(b"".join(frames))
        else:
            await client.send(*(requests if order == "status first" else requests[::-1]))
        await client.final("n")
        status = await client.final("s")
        await client.next_of("notification")
        missed = manager.history.since(status["offset"])
        assert missed is not None
        # What the client saw of the stream after the snapshot is what followed its offset.
        async with Raw.open(server, f"/ws?since={status['offset']}") as back:
            assert len(await back.received()) == len(missed)


async def test_raw_client_may_come_back_to_the_offset_of_its_status() -> None:
    manager = WebSocketManager()
    async with served(manager) as server:
        async with Raw.open(server) as client:
            start = (await client.ask("get_status"))["offset"]
        manager.broadcast("number", 1)
        async with Raw.open(server, f"/ws?since={start}") as client:
            assert (await client.next())["data"] == 1
        async with Raw.open(server) as client:
            assert await client.received() == [], "who does not ask gets no history"


async def test_broadcast_that_waits_for_its_flush_reaches_a_client_that_joins_once() -> None:
    manager = WebSocketManager()
    admit = manager.admit

    def admit_after_a_broadcast(client: Any) -> None:
        manager.broadcast("number", 2)
        admit(client)
        manager.broadcast("number", 3)

    async with served(manager) as server:
        start = manager.history.last
        manager.broadcast("number", 1)
        manager.admit = admit_after_a_broadcast  # type: ignore[method-assign]
        async with Raw.open(server, f"/ws?since={start}") as client:
            assert [each["data"] for each in await client.received()] == [1, 2, 3]
        async with Raw.open(server) as client:
            found = [each["data"] for each in await client.received()]
            assert found in ([2, 3], [3])  # 2 came before it was in, 3 after


@pytest.mark.parametrize(
    "auth",
    [
        {"pid": "", "offset": "OFFSET"}, {"pid": 5, "offset": "OFFSET"},
        {"pid": None, "offset": "OFFSET"}, {"offset": "OFFSET"}, {"pid": ["x"], "offset": "OFFSET"},
        {"pid": "x" * 5000, "offset": "OFFSET"}, {"pid": "unknown", "offset": "unknown"},
        {"pid": "unknown.unknown"}, {"pid": "unknown", "offset": 5}, {"pid": "unknown"},
    ],
    ids=lambda auth: str(auth)[:40],
)  # fmt: skip
async def test_socket_with_wrong_pid_or_offset_starts_anew(auth: dict[str, Any]) -> None:
    manager = WebSocketManager()
    async with served(manager) as server:
        offset = manager.history.last
        manager.broadcast("number", 1)
        given = {key: offset if value == "OFFSET" else value for key, value in auth.items()}
        async with Sio.open(server) as client:
            answer = await client.join("/ws", given)  # fails if an event comes first
            assert answer["pid"] != given.get("pid")


async def test_socket_recovery_can_be_switched_off() -> None:
    manager = WebSocketManager()
    async with served(manager, recovery=False) as server:
        offset = manager.history.last
        manager.broadcast("number", 1)
        async with Sio.open(server) as client:
            assert list(await client.join("/ws", {"pid": "x", "offset": offset})) == ["sid"]
            manager.broadcast("number", 2)
            event = await client.packet("42/ws,")
            assert len(event) == 2 and event[1]["data"] == 2
        async with Raw.open(server, f"/ws?since={offset}") as raw:
            assert (await raw.next())["data"] == 1, "the raw door's recovery is its own"


async def test_emitted_string_never_takes_the_place_of_the_offset() -> None:
    # socket.io-client takes the last argument of any event for its offset when it is a string.
    manager = WebSocketManager()

    @manager.on("connect")
    async def welcome(client: Client, auth: Any) -> None:
        if client.door == "socket.io":
            await client.emit("welcome", "Ada")

    @manager.on("greet")
    async def greet(client: Client) -> None:
        await client.emit("greeting", "Hello")
        await client.emit("bare")
        await client.emit("number", 5)

    async with served(manager) as server, Sio.open(server, join="/") as client:
        # An ack id that nobody waits for makes a function the last argument there.
        assert await client.packet("421") == ["welcome", "Ada"]
        await client.send('42["greet"]')
        assert await client.packet("422") == ["greeting", "Hello"]
        assert await client.packet("423") == ["bare"]
        assert await client.packet("42") == ["number", 5]


@pytest.mark.parametrize("door", ["raw", "socket.io"])
async def test_client_over_the_unsent_limit_is_closed_with_1013_and_recovers(door: str) -> None:
    manager = WebSocketManager()
    is_raw = door == "raw"

    def payloads(frames: list[Received]) -> Iterator[Any]:
        for received in frames:
            text = received.payload if is_raw else received.payload.removeprefix(b"42/ws,")
            if received.opcode == 1 and text[:1] in b"{[":
                value = json.loads(text)
                envelope = value if is_raw else value[1]
                if envelope["type"] == "tick":
                    yield (envelope["data"]["n"], envelope["offset"])

    async with served(manager, max_unsent_bytes=64 * 1024) as server:
        async with lazy(server.port, "/ws" if is_raw else ENGINE) as slow:
            pid = ""
            if not is_raw:
                await slow.frame()
                await slow.send(frame(1, b"40/ws,"))
                pid = json.loads((await slow.frame()).payload[6:])["pid"]
            slow.writer.transport.pause_reading()
            await until(lambda: manager.count_clients())
            sent = 0
            while manager.count_clients():
                manager.broadcast("tick", {"n": sent, "pad": "x" * 20_000})
                sent += 1
                assert sent < 1000
                await asyncio.sleep(0)
            slow.writer.transport.resume_reading()
            frames = []
            while (received := await slow.frame()).opcode != 8:
                frames.append(received)
            assert received.code == 1013 and "--max-unsent" in received.reason
            got = list(payloads(frames))
            assert [n for n, _ in got] == list(range(len(got))) and 3 < len(got) < sent
        last = got[-1][1]
        if is_raw:
            async with raw(server.port, f"/ws?since={last}") as back:
                missed = list(payloads([await back.frame() for _ in range(sent - len(got))]))
        else:
            async with raw(server.port, ENGINE) as back:
                await back.frame()
                auth = json.dumps({"pid": pid, "offset": last}).encode()
                await back.send(frame(1, b"40/ws," + auth))
                missed = list(payloads([await back.frame() for _ in range(sent - len(got))]))
                assert pid.encode() in (await back.frame()).payload
        assert [n for n, _ in missed] == list(range(len(got), sent))


async def test_unsent_limit_is_not_met_by_a_replay_alone() -> None:
    manager = WebSocketManager()
    async with served(manager, max_unsent_bytes=4096, history_bytes=10**7) as server:
        async with raw(server.port) as first:
            manager.broadcast("tick", 0)
            offset = (await first.json())["offset"]
        for number in range(100):
            manager.broadcast("tick", [number, "x" * 20_000])
        async with lazy(server.port, f"/ws?since={offset}") as peer:
            assert [(await peer.json())["data"][0] for _ in range(100)] == list(range(100))


@contextlib.asynccontextmanager
async def returning(server: Server, door: str, offset: str) -> AsyncIterator[Peer]:
    """A client with small buffers that comes back; it does not read until it is told to."""
    async with lazy(server.port, ENGINE if door == "socket.io" else f"/ws?since={offset}") as peer:
        if door == "socket.io":
            await peer.frame()
            auth = json.dumps({"pid": "p", "offset": offset}).encode()
            await peer.send(frame(1, b"40/ws," + auth))
        peer.writer.transport.pause_reading()
        yield peer


async def numbers_of(peer: Peer, count: int) -> list[int]:
    """The next numbers that were broadcast; what is no broadcast is passed over."""
    found: list[int] = []
    while len(found) < count:
        received = await peer.frame()
        assert received.opcode == 1, received
        match = re.search(rb'"data":\[(\d+),', received.payload)
        found += [int(match[1])] if match else []
    return found


@pytest.mark.parametrize("door", ["raw", "socket.io"])
async def test_short_replay_is_no_sign_of_a_slow_client(door: str) -> None:
    manager = WebSocketManager()
    async with served(manager, max_unsent_bytes=1024) as server:
        start = manager.history.last
        for number in range(40):
            manager.broadcast("n", [number, "x" * 600])  # 27 KB: sent at once
        manager.flush_broadcasts()
        admit = manager.admit

        def admit_with_a_small_buffer(client: Any) -> None:
            our_side = client.connection.transport.get_extra_info("socket")
            our_side.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            admit(client)

        manager.admit = admit_with_a_small_buffer  # type: ignore[method-assign]
        async with returning(server, door, start) as peer:
            [connection] = manager.connections
            await until(connection.transport.get_write_buffer_size)
            manager.broadcast("n", [40, "x"])
            manager.flush_broadcasts()
            peer.writer.transport.resume_reading()
            assert await numbers_of(peer, 41) == list(range(41))
        assert not manager.metrics.drops


@pytest.mark.parametrize("door", ["raw", "socket.io"])
async def test_long_replay_and_what_is_broadcast_meanwhile_arrive_once_in_order(door: str) -> None:
    manager = WebSocketManager()
    options = {"max_unsent_bytes": 2**24, "history_bytes": 2**26, "history_messages": 10_000}
    async with served(manager, **options) as server:
        start = manager.history.last
        for number in range(200):
            manager.broadcast("n", [number, "x" * 20_000])  # 4 MB: more than sockets take
        manager.flush_broadcasts()
        async with returning(server, door, start) as peer:
            [connection] = manager.connections
            await until(lambda: not connection.is_writable)
            assert manager.count_clients() == 0, "it is live when it has caught up"
            for number in range(200, 260):
                manager.broadcast("n", [number, "x" * 20_000])
            peer.writer.transport.resume_reading()
            seen = await numbers_of(peer, 100)
            for number in range(260, 300):
                manager.broadcast("n", [number, "x"])
            seen += await numbers_of(peer, 200)
            await until(lambda: manager.count_clients() == 1)
            manager.broadcast("n", [300, "x"])
            assert seen + await numbers_of(peer, 1) == list(range(301))


@pytest.mark.parametrize("door", ["raw", "socket.io"])
async def test_replay_of_many_small_broadcasts_does_not_drop_who_asked_for_it(door: str) -> None:
    count = 120_000
    manager = WebSocketManager()
    options = {"history_messages": count, "history_bytes": 2**27, "max_unsent_bytes": 1024}
    async with served(manager, **options) as server:
        start = manager.history.last
        for number in range(count):
            manager.broadcast("n", number)
        manager.flush_broadcasts()
        async with returning(server, door, start) as peer:
            [connection] = manager.connections
            await until(lambda: not connection.is_writable)
            peer.writer.transport.resume_reading()
            for number in range(count):
                received = await peer.frame()
                assert received.opcode == 1 and b'"data":%d,' % number in received.payload


@pytest.mark.parametrize("is_gap", [False, True], ids=["recovered", "gap"])
async def test_client_that_comes_back_takes_the_place_of_its_other_connection(
    is_gap: bool,
) -> None:
    """Else one client that we did not know to be dead would be there twice."""
    manager = WebSocketManager()
    told: list[tuple[str, str, str]] = []

    @manager.on("connect")
    async def connect(client: Client, auth: Any) -> None:
        told.append(("connect", client.namespace, client.id))

    @manager.on("disconnect")
    async def disconnect(client: Client, reason: str) -> None:
        told.append(("disconnect", client.namespace, client.id))

    async with served(manager) as server:
        async with Sio.open(server) as old, Sio.open(server) as new:
            first = await old.join("/ws")
            other = await old.join("/")
            manager.broadcast("number", 1)
            offset = manager.history.last
            manager.broadcast("number", 2)
            auth = {"pid": first["pid"], "offset": "1-1" if is_gap else offset}
            await new.send("40/ws," + json.dumps(auth))
            if not is_gap:
                assert (await new.packet("42/ws,"))[1]["data"] == 2
            answer = await new.packet("40/ws,")
            assert answer["sid"] == first["sid"]
            assert (answer["pid"] == first["pid"]) != is_gap
            code, reason = await old.closed()
            assert code == 1008 and "another connection" in reason
            assert manager.count_clients() == 1
            await until(lambda: len(manager.connections) == 1)
            assert manager.broadcast("number", 3) == 1, "the end of the old one is not its end"
            assert (await new.packet("42/ws,"))[1]["data"] == 3
            await until(lambda: len(told) == 5)
            assert sorted(told) == sorted([
                ("connect", "/ws", first["sid"]), ("connect", "/", other["sid"]),
                ("connect", "/ws", first["sid"]), ("disconnect", "/ws", first["sid"]),
                ("disconnect", "/", other["sid"]),
            ])  # fmt: skip
        await until(lambda: len(told) == 6)
        assert told[-1] == ("disconnect", "/ws", first["sid"])
        assert manager.count_clients() == 0


class Reader:
    """A client of the model below: what it has seen, and what it must have seen."""

    def __init__(self, door: str) -> None:
        self.door = door
        self.seen: list[Any] = []
        self.expected: list[Any] = []
        self.offset = ""  # of the last broadcast seen, or where it began
        self.pid: str | None = None
        self.sid = ""
        self.client: Any = None  # while it is connected
        self.leave = contextlib.AsyncExitStack()


GAP = "gap"


class RecoveryModel:
    """What each client must have seen after any sequence of broadcast, connect, drop and recover.

    The model is a plain list of all broadcasts. A client that is connected sees each one; one that
    comes back sees what followed its offset if the history's bounds still hold all of that, and
    else is told of a gap. In order, exactly once.
    """

    MESSAGES, BYTES = 6, 1500

    def __init__(self, manager: WebSocketManager, server: Server) -> None:
        self.manager = manager
        self.server = server
        self.all: list[tuple[str, int, int]] = []  # offset, number, size of the envelope
        self.readers: list[Reader] = []
        self.gaps = self.recoveries = 0

    # The model.

    def kept(self) -> list[tuple[str, int, int]]:
        kept = self.all[-self.MESSAGES :]
        while sum(size for _, _, size in kept) > self.BYTES:
            kept.pop(0)
        return kept

    def missed_since(self, offset: str) -> list[int] | None:
        places = [place for place, (each, _, _) in enumerate(self.all) if each == offset]
        missed = self.all[places[0] + 1 :] if places else self.all
        return [number for _, number, _ in missed] if len(missed) <= len(self.kept()) else None

    # The steps.

    def broadcast(self, size: int) -> None:
        number = len(self.all)
        self.manager.broadcast("number", [number, "x" * size])
        offset = self.manager.history.last
        envelope = {"type": "number", "data": [number, "x" * size], "offset": offset}
        self.all.append((offset, number, len(orjson.dumps(envelope))))
        for reader in self.readers:
            if reader.client is not None:
                reader.expected.append(number)

    async def connect(self, reader: Reader) -> None:
        self.readers.append(reader)
        if reader.door == "raw":
            reader.client = await reader.leave.enter_async_context(Raw.open(self.server))
            reader.offset = (await reader.client.ask("get_status"))["offset"]
        else:
            reader.client = await reader.leave.enter_async_context(Sio.open(self.server))
            answer = await reader.client.join("/ws")
            self._begin(reader, answer)

    async def drop(self, reader: Reader) -> None:
        await self.read(reader)
        before = self.manager.count_clients()
        reader.client.connection.transport.abort()
        await reader.leave.aclose()
        await until(lambda: self.manager.count_clients() == before - 1)
        reader.client = None

    async def recover(self, reader: Reader, at_the_same_time: int) -> None:
        """Come back, while broadcasts still wait for their flush: they are missed ones too."""
        admit = self.manager.admit

        def admit_at_the_same_time(client: Any) -> None:
            for _ in range(at_the_same_time):
                self.broadcast(0)
            missed = self.missed_since(reader.offset)
            reader.expected += [GAP] if missed is None else missed
            self.gaps += missed is None
            self.recoveries += missed is not None
            admit(client)

        self.manager.admit = admit_at_the_same_time  # type: ignore[method-assign]
        if reader.door == "raw":
            path = f"/ws?since={reader.offset}"
            raw = await reader.leave.enter_async_context(Raw.open(self.server, path))
            status = await raw.ask("get_status")
            for message in raw.kept:
                self._take_message(reader, message)
            raw.kept.clear()
            reader.offset = status["offset"]  # after a gap there is no other
            reader.client = raw
        else:
            client = await reader.leave.enter_async_context(Sio.open(self.server))
            auth = {"pid": reader.pid, "offset": reader.offset}
            await client.send("40/ws," + json.dumps(auth))
            while not (frame := await client.next()).startswith("40/ws,"):
                self._take_event(reader, frame)
            answer = json.loads(frame.removeprefix("40/ws,"))
            assert answer["sid"] == reader.sid
            if answer["pid"] != reader.pid:  # what its own client takes for not recovered
                reader.seen.append(GAP)
                self._begin(reader, answer)
            reader.client = client
        self.manager.admit = admit  # type: ignore[method-assign]

    def _begin(self, reader: Reader, answer: dict[str, Any]) -> None:
        reader.sid, reader.pid = answer["sid"], answer["pid"]
        reader.offset = answer["pid"].partition(".")[2]

    # What was seen.

    async def read(self, reader: Reader) -> None:
        """Read all that was sent to this client up to now, and compare."""
        if reader.door == "raw":
            for message in await reader.client.received():
                self._take_message(reader, message)
        else:
            await reader.client.send('42/ws,0["rpc",{"method":"get_status"}]')
            while not (frame := await reader.client.next()).startswith("43/ws,0"):
                self._take_event(reader, frame)
        assert reader.seen == reader.expected

    def _take_message(self, reader: Reader, message: dict[str, Any]) -> None:
        if message["type"] == "number":
            reader.seen.append(message["data"][0])
            reader.offset = message["offset"]
        else:
            assert message["data"]["code"] == "history_gap"
            reader.seen.append(GAP)

    def _take_event(self, reader: Reader, frame: str) -> None:
        _, envelope, reader.offset = json.loads(frame.removeprefix("42/ws,"))
        reader.seen.append(envelope["data"][0])


@pytest.mark.parametrize("seed", range(30))
async def test_recovery_shows_every_broadcast_once_or_tells_of_a_gap(seed: int) -> None:
    chance = random.Random(seed)
    manager = WebSocketManager()
    options = {"history_messages": RecoveryModel.MESSAGES, "history_bytes": RecoveryModel.BYTES}
    async with served(manager, **options) as server, contextlib.AsyncExitStack() as leave:
        model = RecoveryModel(manager, server)
        for _ in range(10):  # nothing of the start is in the history
            model.broadcast(0)
        for _ in range(4):
            reader = Reader(chance.choice(["raw", "socket.io"]))
            leave.push_async_callback(reader.leave.aclose)
            await model.connect(reader)
        for _ in range(100):
            here = [reader for reader in model.readers if reader.client]
            away = [reader for reader in model.readers if not reader.client]
            step = chance.choice(["broadcast", "broadcast", "drop", "recover", "recover", "read"])
            if step == "broadcast":
                for _ in range(chance.randint(1, 4)):
                    model.broadcast(chance.choice([0, 0, 0, 0, 300, 2000]))
            elif step == "drop" and here:
                await model.drop(chance.choice(here))
            elif step == "recover" and away:
                await model.recover(chance.choice(away), chance.choice([0, 0, 1, 2]))
            elif step == "read" and here:
                await model.read(chance.choice(here))
        for reader in model.readers:
            if reader.client:
                await model.read(reader)
                await model.drop(reader)
        assert model.recoveries and (model.gaps or seed)


# --- Commands and services of a manager ------------------------------------------------------------


async def test_manager_serves_its_own_processor_with_or_without_builtins() -> None:
    commands = CommandProcessor(builtins=False)

    @commands.command(name="greet", aliases=["hi"])
    def greet(name: str) -> str:
        """Greet somebody."""
        return f"hello {name}"

    manager = WebSocketManager(commands)
    assert manager.commands is commands
    async with served(manager) as server, Raw.open(server) as client:
        assert await client.run("hi Ada") == "hello Ada"
        answer = await client.ask(EXECUTE, command="echo x")
        assert answer["data"]["code"] == "unknown_command"

    own = CommandProcessor()

    @own.command
    def clients() -> str:  # takes the place of the manager's own
        return "mine"

    async with served(WebSocketManager(own)) as server, Raw.open(server) as client:
        assert await client.run("clients") == "mine"


async def test_program_may_remove_or_replace_the_commands_of_the_manager() -> None:
    manager = WebSocketManager()
    del manager.commands.commands["notify"]
    async with served(manager) as server, raw(server.port) as peer:
        await peer.send_json(execute("notify x", 1))
        assert (await peer.json())["data"]["code"] == "unknown_command"

    manager = WebSocketManager(CommandProcessor(builtins=False))

    @manager.commands.command
    async def notify(*words: str) -> str:
        return "mine"

    async with served(manager) as server, raw(server.port) as peer:
        await peer.send_json(execute("notify x", 1))
        assert (await peer.json())["data"]["result"] == "mine"


async def test_program_may_replace_services_and_add_its_own() -> None:
    class Eyes(Service):
        def __init__(self) -> None:
            super().__init__("vision")
            self.calls: list[str] = []

        async def start(self) -> None:
            self.calls.append("start")
            self.set_state("running", "two eyes")

        async def stop(self) -> None:
            self.calls.append("stop")

    eyes, lamp = Eyes(), Lamp()
    manager = WebSocketManager(services=[lamp, eyes])
    assert manager.services["vision"] is eyes and manager.services["lamp"] is lamp
    async with served(manager) as server, Raw.open(server) as client:
        status = (await client.ask("get_status"))["data"]
        assert status["vision"]["detail"] == "two eyes"
        answer = await client.ask(EXECUTE, command="describe x")
        assert answer["data"]["code"] == "unknown_command", "it went with the service"
    assert eyes.calls == ["start", "stop"]
    assert lamp.state == "stopped"


async def test_message_handler_that_fails_answers_an_internal_error() -> None:
    class Broken(WebSocketManager):
        def handle_message(self, client: Client, payload: bytes, is_text: bool) -> Any:
            raise LookupError("bug")

    async with served(Broken(), logs_errors=True) as server, Raw.open(server) as client:
        for _ in range(2):
            await client.send("x")
            assert (await client.next())["data"]["code"] == "internal_error"


# --- What a program registers ----------------------------------------------------------------------


async def test_decorators_work_bare_called_and_named() -> None:
    manager = WebSocketManager()

    @manager.method
    async def one() -> int:
        return 1

    @manager.method()
    def two() -> int:
        return 2

    @manager.method("three", inline=True)
    def other() -> int:
        return 3

    @manager.on
    async def poke(client: Any, value: int) -> int:
        return value + 1

    @manager.on()
    def push(client: Any) -> str:
        return "pushed"

    @manager.on("connect")
    async def welcome(client: Any, auth: Any) -> None:
        client.state["name"] = "guest"

    assert await one() == 1 and two() == 2 and other() == 3, "a decorated function is what it was"
    async with served(manager) as server, Sio.open(server, join="/") as client:
        for name, value in (("one", 1), ("two", 2), ("three", 3)):
            answer = await client.rpc({"method": name})
            assert answer["data"] == value
        await client.send('421["poke",1]', '422["push"]')
        assert [await client.next(), await client.next()] == ["431[2]", '432["pushed"]']
        (member,) = manager.all_clients()
        assert member.state == {"name": "guest"}


@pytest.mark.parametrize("given", [5, ["name"], b"name"])
def test_decorator_refuses_what_is_no_name_at_once(given: Any) -> None:
    manager = WebSocketManager()
    for decorator in (manager.method, manager.on):
        with pytest.raises(TypeError, match="a name is a text, not"):
            decorator(given)


def test_decorator_refuses_a_name_that_is_taken() -> None:
    manager = WebSocketManager()

    def get_status() -> None: ...
    def rpc(client: Any) -> None: ...

    with pytest.raises(ValueError, match="method 'get_status' exists already"):
        manager.method(get_status)
    with pytest.raises(ValueError, match="event 'rpc' has a handler already"):
        manager.on(rpc)


@pytest.mark.parametrize(
    ("event", "handler", "wanted"),
    [
        (
            "connect",
            lambda client: None,
            "a handler of 'connect' takes (client, auth), not (client)",
        ),
        ("connect", lambda: None, "(client, auth)"),
        ("disconnect", lambda client, auth, reason: None, "takes (client, reason), not"),
        ("poke", lambda: None, "a handler of 'poke' takes (client, *args), not ()"),
        ("poke", lambda *, client: None, "(client, *args)"),
    ],
)
def test_handler_that_could_not_be_called_is_refused_at_once(
    event: str, handler: Any, wanted: str
) -> None:
    with pytest.raises(TypeError, match=re.escape(wanted)):
        WebSocketManager().on(event)(handler)


def test_handler_whose_arguments_are_unknown_is_taken() -> None:
    manager = WebSocketManager()
    manager.on("connect")(lambda *values: None)
    manager.on("poke")(print)
    manager.on("push")(max)  # written in C, without a signature
    assert set(manager.handlers) == {"connect", "poke", "push"}


STRAY: list[tuple[dict[str, Any], str]] = [
    ({"method": "execute_command", "command": "echo hi"}, '"command" stands outside "params"'),
    (
        {"method": "double", "number": 2},
        'NUMBER is missing; usage: double NUMBER; "number" stands outside "params"',
    ),
    ({"jsonrpc": "2.0", "method": "double", "number": 2}, '"number" stands outside "params"'),
    ({"method": "cancel", "id": 5}, '"id" in "params" must be the id of a running command'),
]


@pytest.mark.parametrize(("message", "said"), STRAY)
async def test_parameter_outside_params_is_told_so(message: dict[str, Any], said: str) -> None:
    manager = WebSocketManager()
    manager.method("double")(double)
    async with served(manager) as server, Raw.open(server) as client:
        await client.send({"id": 5, **message})
        answer = await client.next()
        error = answer["error"] if "jsonrpc" in message else answer["data"]
        assert error["message"].endswith(said)
        await client.send({"method": "double", "params": {"nr": 1}, "colour": "red"})
        error = (await client.next())["data"]
        assert error["message"] == "unknown parameter 'nr'; usage: double NUMBER"


def double(number: int) -> int:
    return number * 2
