"""The client's connection: its URL, the messages it understands, and how it comes back."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from websockets.protocol import State

from karna.client import ConnectionLost, NotConnected, Refused, connect
from karna.client.link import FIRST_PAUSE_S, LONGEST_PAUSE_S, BadMessage, authorization, back_off
from karna.client.link import decode_message, parse_url, with_since
from karna_ws import WebSocketManager
from support import Gate, served, until
from support_clients import Wire
from support_link import HELLO, Peer, hurried, join, scripted, take
from support_process import AUTH, process
from support_property import JSON, PROPERTY, given, st
from support_peers import TOKEN

URLS = [
    ("ws://localhost:8000/ws", "ws://localhost:8000/ws"),
    ("ws://localhost:8000", "ws://localhost:8000/ws"),
    ("ws://localhost:8000/", "ws://localhost:8000/ws"),
    (" http://localhost:8000 \n", "ws://localhost:8000/ws"),
    ("https://karna.example", "wss://karna.example/ws"),
    ("WSS://karna.example/home/ws?room=1#top", "wss://karna.example/home/ws?room=1"),
    ("ws://[::1]:8000", "ws://[::1]:8000/ws"),
]

WRONG_URLS = [
    "", "localhost:8000", "localhost", "ftp://localhost/ws", "ws://", "ws:///ws", "ws://:8000",
    "ws://localhost:port", "ws://localhost:99999", "ws://localhost:0", "ws://[::1", "/ws",
]  # fmt: skip


@pytest.mark.parametrize(("url", "found"), URLS)
def test_url_is_that_of_the_raw_door(url: str, found: str) -> None:
    assert parse_url(url) == found
    assert parse_url(found) == found


@pytest.mark.parametrize("url", WRONG_URLS)
def test_url_that_is_none_is_explained(url: str) -> None:
    with pytest.raises(ValueError, match="looks like ws://localhost:8000/ws"):
        parse_url(url)


def test_url_takes_no_password_and_does_not_repeat_it() -> None:
    with pytest.raises(ValueError, match="token") as caught:
        parse_url("ws://me:secret@localhost:8000/ws")
    assert "secret" not in str(caught.value)


@given(st.text(max_size=30) | st.from_regex(r"(ws|wss|http)://[^/]*(:[0-9]*)?/?.*", fullmatch=True))
@PROPERTY
def test_url_is_understood_or_refused(url: str) -> None:
    try:
        found = parse_url(url)
    except ValueError:
        return
    assert found.startswith(("ws://", "wss://")) and parse_url(found) == found


def test_since_is_added_to_the_query() -> None:
    assert with_since("ws://a/ws", None) == "ws://a/ws"
    assert with_since("ws://a/ws", "1-2") == "ws://a/ws?since=1-2"
    assert with_since("ws://a/ws?b=c", "1&2") == "ws://a/ws?b=c&since=1%262"


def test_token_that_no_header_can_hold_is_refused() -> None:
    assert authorization(None) == authorization("") == {}
    assert authorization("sesame") == {"Authorization": "Bearer sesame"}
    for token in ("a\nb", "a\r\nX: y", "tökén", "\0"):
        with pytest.raises(ValueError, match="ASCII"):
            authorization(token)


MESSAGES: list[Any] = [
    HELLO,
    {"type": "notification", "data": None, "offset": "1-2"},
    {"type": "command_progress", "data": {"command": "x", "progress": None}, "id": 3},
    {"type": "error", "data": {"code": "usage", "message": "no"}, "id": "a"},
    {"type": "error", "data": "a program's own"},
    {"type": "call", "data": "a program's own"},
    {"type": "call", "data": "a program's own", "call": 1, "offset": "1-2"},
    {"type": "call", "data": {"event": "confirm", "args": []}, "call": [1]},
    {"type": "odd", "data": {}, "more": 1},
]

BAD_MESSAGES: list[Any] = [
    b"", b"{", b"\xff", b"null", b"[]", b"5", b'"x"', b'{"type":"x","data":NaN}', b"[" * 10_000,
    {}, {"type": "x"}, {"data": 1}, {"type": 1, "data": 1}, {"type": None, "data": 1},
    {"type": "x", "data": 1, "offset": 5}, {"type": "x", "data": 1, "offset": None},
    {"type": "x", "data": 1, "id": None}, {"type": "x", "data": 1, "id": True},
    {"type": "x", "data": 1, "id": 1.5}, {"type": "x", "data": 1, "id": [1]},
    {"type": "error", "data": "x", "id": 1}, {"type": "error", "data": {"code": "x"}, "id": 1},
    {"type": "error", "data": {"code": 1, "message": "x"}, "id": 1},
    {"type": "error", "data": {"code": "x", "message": None}, "id": 1},
    {"type": "command_progress", "data": {}, "id": 1},
    {"type": "command_progress", "data": 5, "id": 1},
    {"type": "call", "data": {}, "call": 1}, {"type": "call", "data": [], "call": 1},
    {"type": "call", "data": {"event": 1, "args": []}, "call": 1},
    {"type": "call", "data": {"event": "x", "args": {}}, "call": 1},
]  # fmt: skip


def as_bytes(message: Any) -> bytes:
    return message if isinstance(message, bytes) else orjson.dumps(message)


@pytest.mark.parametrize("message", MESSAGES)
def test_message_is_decoded(message: Any) -> None:
    assert decode_message(as_bytes(message)) == message


@pytest.mark.parametrize("message", BAD_MESSAGES, ids=lambda message: str(message)[:40])
def test_bad_message_is_told(message: Any) -> None:
    with pytest.raises(BadMessage, match="the server sent a message"):
        decode_message(as_bytes(message))


@given(st.binary(max_size=20) | JSON.map(orjson.dumps))
@PROPERTY
def test_message_of_any_bytes_is_an_envelope_or_bad(payload: bytes) -> None:
    try:
        message = decode_message(payload)
    except BadMessage:
        return
    assert isinstance(message["type"], str) and "data" in message


@given(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["error", "call", "command_progress", "tick"]), "data": JSON},
        optional={"id": st.integers(0, 9) | JSON, "offset": st.text(max_size=3), "call": JSON},
    )
)
@PROPERTY
def test_message_that_is_an_envelope_has_what_its_type_needs(message: dict[str, Any]) -> None:
    try:
        found = decode_message(orjson.dumps(message))
    except BadMessage:
        return
    if "id" in found and found["type"] == "error":
        assert isinstance(found["data"]["code"] + found["data"]["message"], str)
    if "id" in found and found["type"] == "command_progress":
        assert "progress" in found["data"]


def test_pauses_grow_to_a_limit_with_jitter() -> None:
    tries = [list(itertools.islice(back_off(), 12)) for _ in range(20)]
    limits = [min(FIRST_PAUSE_S * 2**number, LONGEST_PAUSE_S) for number in range(12)]
    for pauses in tries:
        assert all(limit / 2 <= pause <= limit for pause, limit in zip(pauses, limits, strict=True))
    assert len({pauses[-1] for pauses in tries}) == 20
    assert limits[0] <= 1 and limits[-1] == 30  # what README promises


@asynccontextmanager
async def over_wire(**options: Any) -> AsyncIterator[tuple[WebSocketManager, Wire, Any]]:
    """A manager that serves, a wire to cut, and a client at its other end."""
    manager = WebSocketManager()
    async with (
        served(manager, **options) as server,
        Wire(server.port) as wire,
        hurried(),
        join(wire.port) as client,
    ):
        yield manager, wire, client


async def cut(manager: WebSocketManager, wire: Wire, client: Any) -> None:
    """Cut the wire; both ends have noticed."""
    wire.cut()
    await until(lambda: not manager.raw and not client.is_connected)


async def test_client_that_was_away_gets_what_it_missed_in_order() -> None:
    async with over_wire() as (manager, wire, client):
        stream = client.broadcasts()
        manager.broadcast("number", 0)
        assert await take(stream, 1) == [0]
        await cut(manager, wire, client)
        for number in range(1, 6):
            manager.broadcast("number", number)
        wire.mend()
        assert await take(stream, 5) == [1, 2, 3, 4, 5]
        await until(lambda: client.is_connected)
        manager.broadcast("number", 6)
        assert await take(stream, 1) == [6]


async def test_client_that_saw_no_broadcast_misses_none() -> None:
    async with over_wire() as (manager, wire, client):
        stream = client.broadcasts()
        await cut(manager, wire, client)
        manager.broadcast("number", 1)
        wire.mend()
        assert await take(stream, 1) == [1]


async def test_client_that_missed_too_much_is_told_of_a_gap_once() -> None:
    async with over_wire(history_messages=2) as (manager, wire, client):
        stream = client.broadcasts()
        await cut(manager, wire, client)
        for number in range(3):
            manager.broadcast("number", number)
        wire.mend()
        gap = await anext(stream)
        assert (gap.type, gap.is_gap, gap.data["code"]) == ("gap", True, "history_gap")
        # It has learnt the new offset: the next reconnection is without a gap.
        await until(lambda: client.is_connected)
        await cut(manager, wire, client)
        manager.broadcast("number", 3)
        wire.mend()
        assert await take(stream, 1) == [3]


async def test_client_comes_back_to_a_server_that_was_restarted() -> None:
    async with (
        hurried(),
        served(WebSocketManager()) as first,
        Wire(first.port) as wire,
        join(wire.port) as client,
    ):
        stream = client.broadcasts()
        await first.close()
        await until(lambda: not client.is_connected)
        manager = WebSocketManager()
        async with served(manager) as second:
            wire.target_port = second.port
            assert (await anext(stream)).is_gap
            assert await client.execute("echo again") == "again"
            manager.broadcast("number", 1)
            assert await take(stream, 1) == [1]


async def test_client_comes_back_to_a_process_that_was_restarted() -> None:
    environment = {"KARNA_GRACE": "0"}
    async with (
        process(*AUTH, environment=environment) as first,
        hurried(longest_s=0.05),
        join(first.port, token=TOKEN) as client,
    ):
        first.stop()
        assert await first.ended() == 0
        await until(lambda: not client.is_connected)
        waiting = asyncio.create_task(client.execute("echo again"))
        async with process(*AUTH, "--port", str(first.port), port=None):
            assert await waiting == "again"


@pytest.mark.parametrize("code", [1000, 1001, 1006, 1009, 1011, 1012, 1013])
async def test_client_comes_back_after_a_close_code(code: int) -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        if peer.number == 0 and code == 1006:
            peer.connection.transport.abort()
        elif peer.number == 0:
            await peer.close(code, "come back")
        else:
            assert peer.path == "/ws?since=1-0"
            await peer.answer({"result": 1})

    async with scripted(script) as port, hurried(), join(port) as client:
        await until(lambda: not client.is_connected)
        assert await client.execute("brew") == 1


async def test_client_that_policy_is_against_does_not_come_back() -> None:
    connections = 0

    async def script(peer: Peer) -> None:
        nonlocal connections
        connections += 1
        await peer.welcome()
        await peer.next()
        await peer.close(1008, "not\x1b[2J you")

    async with scripted(script) as port, hurried(), join(port) as client:
        stream = client.broadcasts()
        with pytest.raises(ConnectionLost, match="1008 not"):
            await client.execute("brew")
        with pytest.raises(Refused, match=r"\(1008 not \[2J you\)") as one:
            await client.execute("brew")
        with pytest.raises(Refused, match="1008 not") as other:
            await anext(stream)
        assert one.value is not other.value
        assert connections == 1


async def test_client_without_the_token_is_told_why() -> None:
    async with served(WebSocketManager(), token=TOKEN) as server:
        with pytest.raises(Refused, match="401: .*token"):
            await join(server).__aenter__()
        with pytest.raises(Refused, match="401: ") as caught:
            await join(server, token="wrong-token").__aenter__()
        assert "wrong-token" not in str(caught.value)
        async with join(server, token=TOKEN) as client:
            assert await client.execute("echo in") == "in"


async def test_client_takes_the_token_from_the_environment(
    clean_environment: pytest.MonkeyPatch,
) -> None:
    clean_environment.setenv("KARNA_TOKEN", TOKEN)
    async with served(WebSocketManager(), token=TOKEN) as server:
        async with join(server, token=None) as client:
            assert client.is_connected
        with pytest.raises(Refused):
            await join(server, token="").__aenter__()


async def test_client_whose_token_is_withdrawn_ends() -> None:
    async with (
        served(WebSocketManager(), token="old") as old,
        Wire(old.port) as wire,
        served(WebSocketManager(), token="new") as new,
        hurried(),
        join(wire.port, token="old") as client,
    ):
        stream = client.broadcasts()
        wire.cut()
        await until(lambda: not client.is_connected)
        waiting = asyncio.create_task(client.execute("echo x"))
        wire.target_port = new.port
        wire.mend()
        for refused in (waiting, anext(stream), client.status()):
            with pytest.raises(Refused, match="401"):
                await refused


async def test_client_that_a_connect_handler_refuses_never_is_in() -> None:
    manager = WebSocketManager()

    @manager.on("connect")
    async def refuse(client: Any, auth: Any) -> None:
        raise PermissionError("members only")

    async with served(manager) as server:
        with pytest.raises(Refused, match="members only"):
            await join(server).__aenter__()


async def test_client_that_is_forbidden_is_told_why() -> None:
    async with served(WebSocketManager()) as server:
        client = join(server)
        client._link._headers["Origin"] = "https://evil.example"
        with pytest.raises(Refused, match="403: .*--allow-origin"):
            await client.__aenter__()


@pytest.mark.parametrize(
    "message", [b"{", "[]", {"type": "x"}, {"type": "error", "data": 1, "id": 1}]
)
async def test_broken_message_ends_the_connection_and_its_requests(message: Any) -> None:
    codes: list[Any] = []

    async def script(peer: Peer) -> None:
        await peer.welcome()
        if peer.number == 0:
            await peer.next()
            await peer.send(message)
            codes.append(await peer.closed())
        else:
            await peer.answer({"result": "well"})

    async with scripted(script) as port, hurried(), join(port) as client:
        with pytest.raises(ConnectionLost, match="the server sent a message"):
            await client.execute("brew")
        assert await client.execute("brew") == "well"
    assert codes == [1002]


@pytest.mark.parametrize("data", [None, 5, {}, []])
async def test_answer_without_a_result_is_an_error(data: Any) -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.answer(data)
        await peer.answer(data)

    async with scripted(script) as port, join(port) as client:
        with pytest.raises(BadMessage, match="without a result"):
            await client.execute("brew")
        assert await client.call("any") == data


async def test_too_long_message_fails_its_request() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.answer({"result": "x" * 2_000})

    async with scripted(script) as port, hurried(MAX_MESSAGE_BYTES=1_000), join(port) as client:
        with pytest.raises(ConnectionLost, match="1009"):
            await client.execute("brew")


async def test_peer_that_is_no_such_server_is_told() -> None:
    async def chatty(peer: Peer) -> None:
        await peer.send("welcome to my chat")
        await peer.closed()

    async with scripted(chatty) as port:
        with pytest.raises(NotConnected, match="is no such server"):
            await join(port).__aenter__()
    async with served(WebSocketManager()) as server:
        with pytest.raises(NotConnected, match="404") as caught:
            await connect(f"ws://127.0.0.1:{server.port}/nowhere?token=hidden").__aenter__()
        assert not isinstance(caught.value, Refused) and "hidden" not in str(caught.value)


async def test_peer_that_says_nothing_is_left() -> None:
    closed = asyncio.Event()

    async def silent(peer: Peer) -> None:
        await peer.closed()
        closed.set()

    async with scripted(silent) as port:
        async with hurried(OPEN_TIMEOUT_S=0.05):
            with pytest.raises(NotConnected, match="does not answer"):
                await join(port).__aenter__()
        await closed.wait()


async def test_server_that_is_not_there_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for url in (f"ws://127.0.0.1:{port}", f"ws://{'a' * 70}.example"):
        with pytest.raises(NotConnected, match="cannot connect to ws://"):
            await connect(url).__aenter__()


async def test_client_that_could_not_connect_may_try_again() -> None:
    async with served(WebSocketManager()) as server, Wire(server.port) as wire:
        client = join(wire.port)
        wire.cut()
        with pytest.raises(NotConnected):
            await client.__aenter__()
        wire.mend()
        async with client:
            assert await client.execute("echo in") == "in"
        with pytest.raises(RuntimeError, match="entered once"):
            await client.__aenter__()


async def test_pauses_grow_while_connections_break_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []

    def pauses() -> Any:
        begun.append(0)
        while True:
            begun[-1] += 1
            yield 0.0

    async def script(peer: Peer) -> None:
        await peer.welcome()
        if peer.number < 4:
            await peer.close(1012)
        else:
            await peer.answer({"result": "stays"})

    monkeypatch.setattr("karna.client.link.back_off", pauses)
    for stable_s, expected in ((60.0, [4]), (0.0, [1, 1, 1, 1])):
        begun.clear()
        async with scripted(script) as port, hurried(STABLE_S=stable_s), join(port) as client:
            await until(lambda: sum(begun) == 4 and client.is_connected)
            assert await client.execute("brew") == "stays"
        assert begun == expected


async def test_bug_of_ours_is_logged_and_fails_what_waits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with served(WebSocketManager()) as server, join(server) as client:
        stream = client.broadcasts()
        monkeypatch.setattr("karna.client.link.decode_message", lambda payload: 1 / 0)
        with pytest.raises(ConnectionLost):
            await client.execute("echo x")
        with pytest.raises(NotConnected, match="its log tells why"):
            await client.execute("echo x")
        with pytest.raises(NotConnected, match="its log tells why"):
            await anext(stream)
    assert any("ZeroDivisionError" in str(record.exc_info) for record in caplog.records)


async def test_log_tells_when_it_is_away_and_never_the_query(
    caplog: pytest.LogCaptureFixture,
) -> None:
    manager = WebSocketManager()
    caplog.set_level(logging.INFO, "karna.client")
    async with served(manager, token=TOKEN) as server, Wire(server.port) as wire, hurried():
        url = f"ws://127.0.0.1:{wire.port}/ws?token={TOKEN}"
        async with connect(url, token=""):
            wire.cut()
            await until(lambda: "cannot connect" in caplog.text)
            wire.mend()
            await until(lambda: "connected again" in caplog.text)
    ours = [record for record in caplog.records if record.name == "karna.client"]
    assert "the connection ended (1006)" in ours[0].getMessage()
    assert "connecting again in" in ours[1].getMessage()
    assert not any(TOKEN in record.getMessage() for record in ours)


async def test_close_leaves_no_task_and_no_connection() -> None:
    manager = WebSocketManager()
    Gate(manager)
    async with served(manager) as server, Wire(server.port) as wire:
        before = asyncio.all_tasks()
        async with join(server):
            pass  # its own task has not begun
        async with join(server) as client:
            await client.status()
        async with hurried(first_s=60.0, longest_s=60.0), join(wire.port) as client:
            wire.cut()
            await until(lambda: not client.is_connected)
        assert asyncio.all_tasks() - before <= wire._tasks
        await until(lambda: not manager.connections)


async def test_close_that_is_cancelled_does_not_wait_for_the_peer() -> None:
    over = asyncio.Event()

    async def deaf(peer: Peer) -> None:
        await peer.welcome()
        peer.connection.transport.pause_reading()
        await over.wait()
        peer.connection.transport.abort()

    async with scripted(deaf) as port, hurried(CLOSE_TIMEOUT_S=60.0):
        before = asyncio.all_tasks()
        client = join(port)
        await client.__aenter__()
        ours = asyncio.all_tasks() - before
        closing = asyncio.create_task(client.close())
        connection = client._link.connection
        assert connection is not None
        await until(lambda: connection.state is State.CLOSING)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await connection.wait_closed()
        over.set()
    assert not ours & asyncio.all_tasks()


async def test_connecting_that_is_cancelled_leaves_nothing() -> None:
    arrived, left = asyncio.Event(), asyncio.Event()

    async def silent(peer: Peer) -> None:
        await peer.next()
        arrived.set()
        await peer.closed()
        left.set()

    async with scripted(silent) as port:
        task = asyncio.create_task(join(port).__aenter__())
        await arrived.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await left.wait()
