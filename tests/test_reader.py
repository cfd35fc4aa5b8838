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
from collections.abc import Callable
from typing import Any

import pytest

from karna.door import HOLD_CALLS
from karna.errors import StartError
from karna.reader import READ_BYTES, Turns
from karna_ws import Client, WebSocketManager, serving
from services import Context, Service
from support import execute, served, turns_in_a_while, until
from support_peers import close_frame, dial, engine, frame, head, post, raw, request


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
            assert await turns_in_a_while() < 50


def newest(manager: WebSocketManager) -> Any:
    """The connection that was accepted last."""
    return max(manager.connections, key=lambda connection: int(connection.name[1:]))


@pytest.mark.parametrize("door", ["raw", "http"])
async def test_connection_that_another_cuts_is_not_served_any_more(door: str) -> None:
    manager = WebSocketManager()
    marked: list[int] = []
    async with (
        served(manager) as server,
        raw(server.port) as cutting,
        (raw if door == "raw" else dial)(server.port) as other,
    ):
        await until(lambda: len(manager.connections) == 2)
        manager.commands.command(inline=True, name="cut")(newest(manager).abort)
        manager.commands.command(inline=True, name="mark")(lambda: marked.append(1))
        # Both are written before the server reads any of them.
        cutting.writer.write(frame(1, json.dumps(execute("cut")).encode()))
        if door == "raw":
            other.writer.write(frame(1, json.dumps(execute("mark")).encode()))
        else:
            other.writer.write(post("/api/execute_command", {"command": "mark"}))
        assert (await cutting.json())["type"] == "command_response"
        with contextlib.suppress(ConnectionError):  # as where what it sent was not even read
            await other.reader.read()
    assert not marked


async def test_end_of_a_peer_that_another_holds_is_seen_later() -> None:
    manager = WebSocketManager()
    async with served(manager) as server, raw(server.port) as holding, raw(server.port) as other:
        await other.sync()
        held = newest(manager)
        manager.commands.command(inline=True, name="hold")(lambda: held.hold(HOLD_CALLS))
        holding.writer.write(frame(1, json.dumps(execute("hold")).encode()))
        other.writer.write_eof()
        assert (await holding.json())["type"] == "command_response"
        await holding.sync()
        assert len(manager.raw) == 2
        held.release(HOLD_CALLS)
        await until(lambda: len(manager.raw) == 1)


needs_epoll = pytest.mark.skipif(not hasattr(select, "epoll"), reason="there is no epoll")


@needs_epoll
def test_loop_that_is_interrupted_and_goes_on_has_forgotten_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read, count = os.read, 0

    def interrupted(fd: int, size: int) -> bytes:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return read(fd, size)

    async def begin() -> list[Any]:
        server = await stack.enter_async_context(served())
        return [await stack.enter_async_context(raw(server.port)) for _ in range(6)]

    async def ids_of_answers(peers: list[Any]) -> list[int]:
        return [(await peer.json())["id"] for peer in peers]

    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        peers = runner.run(begin())
        for number, peer in enumerate(peers):
            peer.writer.write(frame(1, json.dumps(execute("echo hi", number)).encode()))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "read", interrupted)
            runner.run(asyncio.sleep(10))
        assert runner.run(ids_of_answers(peers)) == list(range(6))
        runner.run(stack.aclose())


@needs_epoll
@pytest.mark.parametrize("how", ["close", "eof", "reset", "cut", "last words", "lost", "held"])
async def test_connection_that_is_gone_leaves_the_reader(how: str) -> None:
    manager = WebSocketManager()
    async with served(manager, close_timeout_s=0.2) as server, raw(server.port) as other:
        reader = manager.reader
        assert reader is not None
        await other.sync()
        before = set(reader._connections.values())
        async with raw(server.port) as peer:
            await peer.sync()
            connection: Any
            [connection] = set(reader._connections.values()) - before
            if how == "close":
                await peer.send(close_frame())
                await peer.closed()
            elif how == "eof":
                peer.writer.write_eof()
                await peer.reader.read()
            elif how == "reset":
                linger = struct.pack("ii", 1, 0)
                client = peer.writer.get_extra_info("socket")
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                peer.writer.transport.abort()
            elif how == "cut":
                connection.abort()
            elif how == "last words":  # cut while the end behind them is still to be read
                manager.commands.command(inline=True, name="cut")(connection.abort)
                peer.writer.write(frame(1, json.dumps(execute("cut")).encode()))
                peer.writer.write_eof()
            elif how == "held":
                connection.hold(HOLD_CALLS)
                connection.abort()
            else:  # as asyncio does when a write of its own fails
                connection.transport.abort()
            await until(lambda: len(manager.connections) == 1)
        assert set(reader._connections.values()) == before
        assert not (reader._arrived or reader._unread or reader._waiting)
        await other.sync()


# --- Fairness --------------------------------------------------------------------------------------


class Order:
    """Who was served, in which order: a command `mark NAME`."""

    def __init__(self, manager: WebSocketManager) -> None:
        self.names: list[str] = []
        manager.commands.command(inline=True)(self.mark)

    def mark(self, name: str) -> None:
        """Note that this one is served."""
        self.names.append(name)

    def between(self, name: str) -> list[int]:
        """How many others were served before the first of this name, and between each two."""
        places = [place for place, each in enumerate(self.names) if each == name]
        return [after - before - 1 for before, after in zip([-1, *places], places, strict=False)]


@pytest.mark.parametrize("door", ["raw", "socket.io"])
async def test_connection_that_sends_thousands_delays_another_by_a_few_turns(door: str) -> None:
    manager = WebSocketManager()
    order = Order(manager)
    text = json.dumps(execute("mark greedy")).encode()
    async with (
        served(manager) as server,
        (raw if door == "raw" else engine)(server.port) as greedy,
        raw(server.port) as modest,
        dial(server.port) as rest,
    ):
        if door == "socket.io":
            text = b'42/ws,0["rpc",%b]' % text
        await rest.send(head("GET", "/health", {"Connection": None}))
        await rest.answer()
        greedy.writer.write(frame(1, text) * 5_000)  # what its socket takes goes out at once
        for _ in range(10):
            await modest.send_json(execute("mark modest"))
            await modest.json()
            command = {"command": "mark rest"}
            await rest.send(post("/api/execute_command", command, {"Connection": None}))
            await rest.answer()
        assert order.names.count("greedy") < 5_000, "it was served first, all of it"
        for name in ("modest", "rest"):
            # An answer and the next request take some turns; in each a connection has 32 messages.
            assert max(order.between(name)) <= 20 * 32, order.between(name)
        for _ in range(5_000):
            await greedy.frame()
        assert order.names.count("greedy") == 5_000


async def test_connections_that_send_thousands_take_turns_with_each_other() -> None:
    manager = WebSocketManager()
    order = Order(manager)
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(served(manager))
        peers = [await stack.enter_async_context(raw(server.port)) for _ in range(4)]
        for number, peer in enumerate(peers):
            peer.writer.write(frame(1, json.dumps(execute(f"mark {number}")).encode()) * 1_000)
        for peer in peers:
            for _ in range(1_000):
                await peer.frame()
    # Up to the end of the first that ends: each is behind the others by a turn or two, no more.
    counts = dict.fromkeys("0123", 0)
    for name in order.names:
        counts[name] += 1
        if counts[name] == 1_000:
            break
        assert max(counts.values()) - min(counts.values()) <= 4 * 32, counts


@needs_epoll
async def test_who_has_something_new_is_served_before_those_who_have_more() -> None:
    manager = WebSocketManager()
    order = Order(manager)
    command = manager.commands.command(inline=True, name="store")
    command(lambda data: order.names.append("stored"))
    text = json.dumps(request("execute_command", command="store", data="x" * READ_BYTES)).encode()
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(served(manager))
        modest = await stack.enter_async_context(raw(server.port))
        greedy = [await stack.enter_async_context(raw(server.port)) for _ in range(16)]
        for peer in greedy:
            peer.writer.write(frame(1, text) * 10)  # each is more than one read
        await modest.sync()  # all are new to the first turn
        for _ in range(5):
            seen = len(order.names)
            await modest.send_json(execute("mark modest"))
            await modest.json()
            assert order.names.index("modest", seen) - seen <= 2, "one of the others in a turn"
        await until(lambda: len(order.names) == 16 * 10 + 5)


@needs_epoll
@pytest.mark.parametrize("limit", ["TURN_S", "READ_AHEAD_BYTES"])
async def test_reader_that_has_had_its_share_goes_on_in_the_next_turn(
    monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(f"karna.reader.{limit}", -1)  # one socket, and its share is over
    manager = WebSocketManager()
    turns, served_in = 0, []

    @manager.commands.command(inline=True)
    def mark() -> None:
        served_in.append(turns)

    def turn() -> None:
        nonlocal turns
        turns += 1
        if len(served_in) < 20:
            asyncio.get_running_loop().call_soon(turn)

    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(served(manager))
        peers = [await stack.enter_async_context(raw(server.port)) for _ in range(20)]
        turn()
        for peer in peers:
            peer.writer.write(frame(1, json.dumps(execute("mark")).encode()))
        for peer in peers:  # an edge is told once: none may be forgotten
            await peer.frame()
    assert len(set(served_in)) == 20, "others have their turn between any two"


async def test_turns_are_had_in_order_and_later() -> None:
    loop = asyncio.get_running_loop()
    turns, seen = Turns(loop), []

    def again(name: str, count: int) -> Callable[[], None]:
        def go_on() -> None:
            seen.append(name)
            if count:
                turns.wait(again(name, count - 1))

        return go_on

    for name in "abc":
        turns.wait(again(name, 2))
    assert seen == [], "never from within"
    await until(lambda: len(seen) == 9)
    assert "".join(seen) == "abcabcabc"


async def test_turns_that_take_long_let_the_loop_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("karna.reader.TURN_S", -1.0)
    turns, seen = Turns(asyncio.get_running_loop()), []
    for number in range(5):
        turns.wait(lambda number=number: seen.append(number))
    for number in range(5):
        await asyncio.sleep(0)
        assert seen == list(range(number + 1)), "one a turn of the loop"


async def test_turn_that_raises_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, context: told.append(context["exception"]))
    turns, seen = Turns(loop), []
    turns.wait(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    turns.wait(lambda: seen.append(1))
    await until(lambda: seen)
    assert isinstance(told[0], ZeroDivisionError)


async def test_breathing_lets_the_loop_turn_when_it_is_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("karna.reader.perf_counter", lambda: now)
    turns, turned = Turns(asyncio.get_running_loop()), 0

    def count() -> None:
        nonlocal turned
        turned += 1
        asyncio.get_running_loop().call_soon(count)

    count()
    turned = 0
    for _ in range(1_000):
        await turns.breathe()
    assert turned == 1, "once, and then not before its time is over"
    now += 0.0021
    for _ in range(1_000):
        await turns.breathe()
    assert turned == 2


@pytest.mark.parametrize("how", ["send", "emit", "progress", "yield"])
async def test_program_that_sends_in_a_loop_does_not_hold_up_the_others(how: str) -> None:
    manager = WebSocketManager()
    over = False

    async def flood(context: Context) -> None:
        while not over:
            if how == "progress":
                await context.progress(1)
            elif how == "emit":
                await context.client.emit("x", 1)
            else:
                await context.client.send("x", 1)

    async def stream() -> Any:
        while not over:
            yield 1

    manager.commands.command(name="flood")(stream if how == "yield" else flood)
    async with served(manager) as server, raw(server.port) as peer, raw(server.port) as other:
        await peer.send_json(execute("flood", 1))
        await peer.frame()
        for number in range(5):
            await other.send_json(execute(f"echo {number}", number))
            assert (await other.json())["data"]["result"] == str(number)
        over = True
        while (await peer.json())["type"] != "command_response":
            pass
