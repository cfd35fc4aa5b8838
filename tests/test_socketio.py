"""Socket.IO sessions: namespaces, events, acks, attachments, heartbeat, and what ends a session."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import orjson
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from karna_ws import Client, WebSocketManager, serving
from services import Unavailable
from support import (
    DEADLINE_S,
    REQUEST_ERRORS,
    Gate,
    Raw,
    Sio,
    execute,
    failing_manager,
    http,
    limit_for,
    served,
    until,
)
from support_peers import TOKEN, engine, frame


# --- A session and its namespaces ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "code", "message"),
    [
        ("EIO=4&transport=polling", 0, "Transport unknown"),
        ("EIO=4", 0, "Transport unknown"),
        ("EIO=4&transport=flash&sid=x", 0, "Transport unknown"),
        ("EIO=4&transport=websocket&sid=x", 1, "Session ID unknown"),
        ("EIO=5&transport=websocket", 5, "Unsupported protocol version"),
        ("EIO=2&transport=websocket", 5, "Unsupported protocol version"),
        ("EIO=&transport=websocket", 5, "Unsupported protocol version"),
    ],
)
async def test_engine_handshake_is_refused_as_socket_io_does(
    query: str, code: int, message: str
) -> None:
    async with served() as server:
        with pytest.raises(InvalidStatus) as caught:
            await connect(f"ws://127.0.0.1:{server.port}/socket.io/?{query}")
        response = caught.value.response
        assert response.status_code == 400
        assert orjson.loads(response.body or b"") == {"code": code, "message": message}
        plain = (400, {"code": 3 if code == 5 else code, "message": "Bad request"})
        status, body = await http(server, "GET", f"/socket.io/?{query}")
        assert status == 400
        assert body == (plain[1] if code == 5 else {"code": code, "message": message})


async def test_engine_handshake_over_plain_http_is_refused_as_socket_io_does() -> None:
    async with served() as server:
        path = "/socket.io/?EIO=4&transport=websocket"
        assert await http(server, "GET", path) == (400, {"code": 3, "message": "Bad request"})
        answer = await http(server, "POST", path, {})
        assert answer == (400, {"code": 2, "message": "Bad handshake method"})


async def test_one_session_holds_several_namespaces() -> None:
    manager = WebSocketManager()
    async with served(manager) as server, Sio.open(server) as client:
        for namespace in ("/", "/ws", "/ws/"):
            await client.join(namespace)
        assert manager.notify("to all three") == 3
        frames = sorted([await client.next() for _ in range(3)])
        assert [frame.split("[")[0] for frame in frames] == ["42/ws,", "42/ws/,", "42"]
        await client.send("41/ws,")
        await until(lambda: manager.count_clients() == 2)
        assert (await client.rpc(execute("echo on"), namespace="/ws/"))["data"]["result"] == "on"
        assert "sid" in await client.join("/ws")


async def test_namespaces_beyond_the_served_ones_are_refused() -> None:
    async with (
        served() as server,
        engine(server.port, connect=None) as peer,
    ):
        for name in (b"/admin", b"/ws/x", b"/WS", b"/ws?token=x", b"//"):
            await peer.send(frame(1, b"40" + name + b","))
            answer = (await peer.frame()).payload
            assert answer == b"44" + name + b',{"message":"Invalid namespace"}'


async def test_client_that_leaves_its_namespace_has_its_commands_cancelled() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    async with served(manager) as server, Sio.open(server, join="/") as client:
        await client.join("/ws")
        for prefix, name in (("", "root"), ("/ws,", "ws")):
            await client.send(f'42{prefix}1["rpc",{json.dumps(execute(f"gate {name}"))}]')
        await until(lambda: len(gate.begun) == 2)
        await client.send("41/ws,")
        await until(lambda: gate.cancelled == ["ws"])
        gate.let("root")
        assert (await client.packet("431"))[0]["data"]["result"] == "root"


async def test_requests_that_waited_in_a_namespace_count_no_more_once_it_was_left() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    async with served(manager) as server, Sio.open(server, join="/") as client:
        for number, name in enumerate(("a", "b", "c"), 1):
            await client.join("/ws")
            await client.send(f'42/ws,["rpc",{json.dumps(execute(f"gate {name}"))}]')
            # Cancelled before its first step it would not reach its gate.
            await until(lambda: len(gate.begun) == number)
            for _ in range(256 // 2):
                await client.send(f'42/ws,["rpc",{json.dumps(execute("echo waits"))}]')
            await client.send("41/ws,")
        assert (await client.rpc(execute("echo read")))["data"]["result"] == "read"
        (connection,) = manager.connections
        assert (connection.waiting, connection.waiting_bytes) == (0, 0)
        assert gate.cancelled == ["a", "b", "c"]


async def test_leaving_a_namespace_frees_the_places_of_what_waited() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    async with (
        served(manager, max_running_commands=1) as server,
        engine(server.port) as peer,
    ):
        for turn in range(1, 5):  # 4 times 200 are more than may wait
            for number in range(200):
                text = json.dumps(execute("gate g", number)).encode()
                await peer.send(frame(1, b'42/ws,["rpc",%b]' % text))
            await until(lambda: len(gate.begun) == turn)  # or it would not reach its gate
            await peer.send(frame(1, b"41/ws,") + frame(1, b"40/ws,"))
            assert (await peer.frame()).payload.startswith(b"40/ws,{")
        (connection,) = manager.connections
        assert (connection.waiting, connection.waiting_bytes) == (0, 0)
        await until(lambda: len(gate.ended) == 4)


async def test_disconnect_handler_is_told_why() -> None:
    manager = WebSocketManager()
    reasons: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

    @manager.on("disconnect")
    async def gone(client: Client, reason: str) -> None:
        reasons.put_nowait((client.door, reason))

    @manager.on("leave")
    async def leave(client: Client) -> None:
        await client.disconnect()

    async with served(manager) as server:
        async with Sio.open(server, join="/") as client:
            await client.join("/ws")
            await client.send("41/ws,")
            assert await reasons.get() == ("socket.io", "client namespace disconnect")
            await client.send('42["leave"]')
            assert await client.next() == "41"
            assert await reasons.get() == ("socket.io", "server namespace disconnect")
            await client.join("/")
        assert await reasons.get() == ("socket.io", "transport close")
        async with Raw.open(server):
            pass
        assert await reasons.get() == ("raw", "transport close")
    assert reasons.empty()


async def test_sessions_that_ended_make_room_for_others() -> None:
    manager = WebSocketManager()
    async with served(manager, max_clients=1) as server:
        for _ in range(3):
            async with Sio.open(server, join="/ws"):
                assert manager.is_full
            await until(lambda: not manager.is_full)
        async with Raw.open(server):
            assert manager.is_full


# --- Time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [[], ["40/nope,"], ["40/nope,", "40/ws,"]])
async def test_session_that_joins_no_namespace_in_time_is_closed(frames: list[str]) -> None:
    manager = WebSocketManager()

    @manager.on("connect")
    async def refuse(client: Client, auth: Any) -> None:
        raise ValueError("not today")

    # Scaled: 0.1 s to join, looked at every 0.025 s; the time of a ping is far away.
    async with served(manager, connect_timeout_s=0.1) as server, Sio.open(server) as client:
        await client.send(*frames)
        code, reason = await client.closed()
        assert (code, reason) == (1008, "no namespace joined in time")
        assert manager.metrics.drops == {"no namespace": 1}


async def test_session_that_joins_no_namespace_is_closed() -> None:
    async with served(connect_timeout_s=0.2, token=TOKEN) as server:
        async with engine(server.port, connect=None) as peer:
            closed = await peer.closed()
            assert (closed.code, closed.reason) == (1008, "no namespace joined in time")
        async with engine(server.port, connect=None) as peer:  # knocking is not joining
            knock = frame(1, b'40/ws,{"token":"wrong"}') + frame(1, b"3")
            await peer.send(knock)
            while (received := await peer.frame()).opcode != 8:
                await peer.send(knock)
            assert (received.code, received.reason) == (1008, "no namespace joined in time")


async def test_session_that_joined_in_time_stays() -> None:
    # Scaled: 0.2 s to join, a ping every 0.15 s: two pings later that time is over.
    async with (
        served(connect_timeout_s=0.2, ping_interval_s=0.15) as server,
        Sio.open(server, join="/") as client,
    ):
        for _ in range(2):
            assert await client.connection.recv() == "2"
            await client.send("3")
        assert (await client.rpc(execute("echo here")))["data"]["result"] == "here"
        await client.send("41")  # left, it may take as long as it likes to come back
        for _ in range(2):
            assert await client.connection.recv() == "2"
            await client.send("3")
        assert "sid" in await client.join("/ws")


async def test_session_with_subsecond_heartbeat_lives_while_it_answers() -> None:
    # Scaled: a ping every 0.05 s, 0.3 s to answer it. A client that answers sees ping after ping;
    # one that does not is dropped.
    manager = WebSocketManager()
    reasons: list[str] = []

    @manager.on("disconnect")
    def gone(client: Client, reason: str) -> None:
        reasons.append(reason)

    options = {"ping_interval_s": 0.05, "ping_timeout_s": 0.3}
    async with served(manager, **options) as server, Sio.open(server, join="/") as client:
        assert client.handshake["pingInterval"] == 50
        assert client.handshake["pingTimeout"] == 300
        for _ in range(8):
            assert await client.connection.recv() == "2"
            await client.send("3")
        assert manager.count_clients() == 1
        with contextlib.suppress(ConnectionClosed):
            while True:  # from here on silent
                assert await client.connection.recv() == "2"
        await until(lambda: reasons)
        assert manager.metrics.drops == {"silent": 1}


# --- Events and acks -------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["", ",5", ",null", ',"x"', ",[]", ",{}", ',{"method":5}'])
async def test_rpc_that_is_no_request_is_answered_with_an_error(argument: str) -> None:
    async with served() as server, Sio.open(server, join="/") as client:
        await client.send(f'42["rpc"{argument}]', f'421["rpc"{argument}]')
        event, envelope = await client.packet("42")
        assert event == "rpc_response" and envelope["data"]["code"] == "invalid_request"
        assert await client.packet("431") == [envelope]


@pytest.mark.parametrize(
    ("message", "code", "part"),
    [
        (message, code, part)
        for message, code, part in REQUEST_ERRORS
        if isinstance(message, dict)
        and "id" not in message
        and message != execute("give bytes")  # bytes have a form on this door
    ],
    ids=lambda value: str(value)[:50],
)
async def test_socket_request_that_fails_is_acked_with_its_code(
    message: Any, code: str, part: str
) -> None:
    async with (
        served(failing_manager(), command_timeout_s=limit_for(code)) as server,
        Sio.open(server, join="/ws") as client,
    ):
        await client.send("42/ws,5" + json.dumps(["rpc", {**message, "id": "x"}]))
        while not (frame := await client.next()).startswith("43/ws,5"):
            assert '"command_progress"' in frame
        (envelope,) = json.loads(frame.removeprefix("43/ws,5"))
        assert (envelope["type"], envelope["id"]) == ("error", "x")
        assert envelope["data"]["code"] == code
        assert part in json.dumps(envelope["data"]).replace('\\"', '"')


async def test_rpc_progress_comes_as_event_before_the_ack() -> None:
    async with served() as server, Sio.open(server, join="/") as client:
        await client.send('427["rpc",' + json.dumps(execute("countdown 0.01", id=1)) + "]")
        progress = []
        while (frame := await client.next()).startswith("42["):
            event, envelope = json.loads(frame[2:])
            assert (event, envelope["type"], envelope["id"]) == (
                "rpc_response", "command_progress", 1,
            )  # fmt: skip
            progress.append(envelope["data"]["progress"]["percent"])
        assert progress == [0, 100]
        assert json.loads(frame.removeprefix("437"))[0]["type"] == "command_response"


async def test_event_named_like_a_method_calls_it() -> None:
    manager = WebSocketManager()

    @manager.method("add")
    async def add(a: int, b: int = 1) -> int:
        return a + b

    async with served(manager) as server, Sio.open(server, join="/") as client:
        await client.send('421["get_status"]')
        assert (await client.packet("431"))[0]["type"] == "status_update"
        await client.send('422["execute_command",{"command":"echo hi"}]')
        assert (await client.packet("432"))[0]["data"]["result"] == "hi"
        await client.send('42["execute_command",{"command":"echo hi"}]')
        assert (await client.packet("42"))[1]["data"]["result"] == "hi"
        await client.send('423["add",{"a":2}]')
        assert await client.packet("433") == [{"type": "command_response", "data": 3}]
        await client.send('424["add","two"]')
        assert (await client.packet("434"))[0]["data"]["code"] == "invalid_request"


async def test_acks_of_the_client_are_ignored() -> None:
    async with served() as server, Sio.open(server, join="/") as client:
        await client.send("431[]", '4361["x"]'[:2] + '1["x"]')
        await client.send('461-2[{"_placeholder":true,"num":0}]', b"x")
        assert (await client.rpc(execute("echo on")))["data"]["result"] == "on"


async def test_handler_that_fails_acks_an_error_and_logs_no_traceback() -> None:
    manager = WebSocketManager()

    @manager.on("fail")
    async def fail(client: Client, how: str) -> Any:
        if how == "unencodable":
            return object()
        raise {"value": ValueError, "exit": SystemExit, "away": Unavailable}[how]("as planned")

    async with served(manager) as server, Sio.open(server, join="/") as client:
        for number, (how, code) in enumerate(
            [("value", "command_failed"), ("exit", "command_failed"), ("away", "unavailable"),
             ("unencodable", "command_failed")]
        ):  # fmt: skip
            await client.send(f'42{number}["fail","{how}"]', f'42["fail","{how}"]')
            (envelope,) = await client.packet(f"43{number}")
            assert envelope["type"] == "error" and envelope["data"]["code"] == code
            assert "Traceback" not in json.dumps(envelope)
        await client.send('429["fail"]')  # too few arguments: the handler's own fault
        assert (await client.packet("439"))[0]["data"]["code"] == "command_failed"


async def test_client_emits_events_with_any_arguments() -> None:
    manager = WebSocketManager()

    @manager.on("ask")
    async def ask(client: Client) -> None:
        await client.emit("plain", 1, None, {"a": [True]})
        await client.emit("bytes", b"\x01", {"more": bytearray(b"\x02")})
        await client.send("custom", {"x": 1})
        with pytest.raises((TypeError, ValueError)):
            await client.emit("bad", object())

    async with served(manager) as server, Sio.open(server, join="/ws") as client:
        await client.send('42/ws,["ask"]')
        assert await client.next() == '42/ws,["plain",1,null,{"a":[true]}]'
        assert (await client.next()).startswith('452-/ws,["bytes",{"_placeholder":true,"num":0}')
        assert [await client.next(), await client.next()] == [b"\x01", b"\x02"]
        assert await client.next() == '42/ws,["rpc_response",{"type":"custom","data":{"x":1}}]'


# --- Attachments -----------------------------------------------------------------------------------


async def test_binary_reaches_commands_as_bytes_and_comes_back_as_attachment() -> None:
    manager = WebSocketManager()

    @manager.commands.command
    async def double(data: bytes) -> dict[str, Any]:
        return {"size": len(data), "data": [data, data]}

    async with served(manager) as server, Sio.open(server, join="/ws") as client:
        request = json.dumps(execute("double", data={"_placeholder": True, "num": 0}))
        for ack in ("", "3"):
            await client.send(f'451-/ws,{ack}["rpc",{request}]', b"\x00\xff")
            answer = await client.packet(f"462-/ws,{ack}" if ack else "452-/ws,")
            envelope = answer[0] if ack else answer[1]
            assert envelope["data"]["result"] == {
                "size": 2,
                "data": [{"_placeholder": True, "num": 0}, {"_placeholder": True, "num": 1}],
            }
            assert [await client.next(), await client.next()] == [b"\x00\xff", b"\x00\xff"]


async def test_binary_event_without_attachments_is_handled_at_once() -> None:
    async with served() as server, Sio.open(server, join="/") as client:
        await client.send('450-5["rpc",' + json.dumps(execute("echo now")) + "]")
        assert (await client.packet("435"))[0]["data"]["result"] == "now"


async def test_progress_that_is_binary_is_an_event_and_leaves_the_ack_to_the_answer() -> None:
    manager = WebSocketManager()

    @manager.commands.command
    async def frames() -> AsyncIterator[bytes]:
        yield b"one"

    async with served(manager) as server, Sio.open(server, join="/") as client:
        await client.send('427["rpc",' + json.dumps(execute("frames")) + "]")
        event, envelope = await client.packet("451-")
        assert (event, envelope["type"]) == ("rpc_response", "command_progress")
        assert await client.next() == b"one"
        (envelope,) = await client.packet("461-7")
        assert envelope["type"] == "command_response"
        assert await client.next() == b"one"


def places_for(count: int) -> str:
    """The placeholders of so many attachments."""
    return ",".join(f'{{"_placeholder":true,"num":{number}}}' for number in range(count))


@pytest.mark.parametrize(("count", "code"), [(1, None), (10, None), (11, 1002), (100, 1002)])
async def test_attachments_are_limited_in_number(count: int, code: int | None) -> None:
    async with served() as server, engine(server.port) as peer:
        places = places_for(count)
        packet = f'45{count}-/ws,7["nothing",{places}]'.encode()
        await peer.send(frame(1, packet) + frame(2, b"x") * count)
        if code is None:
            assert (await peer.frame()).payload.startswith(b"43/ws,7[")
        else:
            assert (await peer.closed()).code == code


@pytest.mark.parametrize(("sizes", "code"), [
    ([1000], None), ([500, 500], None), ([0, 1000], None), ([501, 500], 1009), ([1000, 1], 1009),
    ([1001], 1009), ([300, 300, 300, 300], 1009),
])  # fmt: skip
async def test_attachments_are_limited_in_bytes(sizes: list[int], code: int | None) -> None:
    async with (
        served(max_message_bytes=1000) as server,
        engine(server.port) as peer,
    ):
        places = places_for(len(sizes))
        packet = f'45{len(sizes)}-/ws,7["nothing",{places}]'.encode()
        await peer.send(frame(1, packet) + b"".join(frame(2, b"x" * size) for size in sizes))
        if code is None:
            assert (await peer.frame()).payload.startswith(b"43/ws,7[")
        else:
            assert (await peer.closed()).code == code


async def test_session_closes_with_1009_when_its_attachments_are_too_large() -> None:
    async with served(max_message_bytes=1000) as server, Sio.open(server, join="/") as client:
        await client.send('452-["a",{"_placeholder":true,"num":0}]', b"x" * 600, b"x" * 401)
        assert (await client.closed())[0] == 1009


async def test_message_limit_holds_on_the_socket_io_door() -> None:
    async with served(max_message_bytes=1000) as server:
        for extra, code in ((0, None), (1, 1009)):
            async with engine(server.port) as peer:
                packet = b'42/ws,7["rpc",{"method":"get_status","x":"'
                packet += b"x" * (1000 + extra - len(packet) - 4) + b'"}]'
                await peer.send(frame(1, packet + b" " * (1000 + extra - len(packet))))
                received = await peer.frame()
                if code is None:
                    assert received.payload.startswith(b"43/ws,7[")
                else:
                    assert received.code == code


# --- What breaks the protocol ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        (['42["rpc",{}]'], "event before connect"),
        (['42/ws,1["rpc",{}]'], "event before connect"),
        (["43/ws,1[]"], "ACK while absent"),
        (["41"], "DISCONNECT while absent"),
        (["40", "40"], "CONNECT while connected"),
        (["40/ws,", '42["rpc",{}]'], "event before connect"),
        (["40", "41", '42["rpc",{}]'], "event before connect"),
        (["40", '44{"message":"x"}'], "CONNECT_ERROR while connected"),
        (["40", "42"], "invalid payload"),
        (["40", "42{}"], "invalid payload"),
        (["40", '42"rpc"'], "invalid payload"),
        (["40", "42[]"], "invalid payload"),
        (["40", '42["rpc"'], "invalid payload"),
        (["40", '42["connect"]'], "invalid payload"),
        (["40", '42["disconnect"]'], "invalid payload"),
        (["40", "42[null]"], "invalid payload"),
        (["40", '42x["rpc"]'], "invalid payload"),
        (["40", '42' + "1" * 16 + '["rpc"]'], "ack id is too long"),
        (["40[]"], "invalid payload"),
        (["47"], "unknown packet type"),
        (["4"], "unknown packet type"),
        (["40", "2"], "unknown packet type"),
        (["5"], "unknown packet type"),
        (["x"], "unknown packet type"),
        ([""], "unknown packet type"),
        (["40", b"stray"], "binary frame without a packet"),
        ([b""], "binary frame without a packet"),
        (["40", '451-["a",{"_placeholder":true,"num":0}]', '42["a"]'],
         "text while attachments are pending"),
        (["40", '452-["a",{"_placeholder":true,"num":5}]', b"1", b"2"], "illegal attachments"),
        (["40", '4511-["a"]'], "too many attachments"),
        (["40", '45["a"]'], "illegal attachments"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
async def test_session_is_closed_when_the_client_breaks_the_protocol(
    frames: list[str | bytes], reason: str
) -> None:
    manager = WebSocketManager()
    async with served(manager) as server, Sio.open(server, join="/") as other:
        async with Sio.open(server) as client:
            await client.send(*frames)
            assert await client.closed() == (1002, reason)
        await until(lambda: len(manager.sessions) == 1)
        assert (await other.rpc(execute("echo fine")))["data"]["result"] == "fine"


BAD_PACKETS = [
    b"", b"2", b"5", b"6", b"9", b"x", b"4", b"47", b"4x", b"43/ws,[]", b"43/ws,1{}", b"43/ws,x[]",
    b"42/ws,", b"42/ws,{}", b"42/ws,[]", b'42/ws,["connect"]', b'42/ws,["disconnect"]',
    b'42/ws,["newListener"]', b"42/ws,[null]", b"42/ws,[[]]", b"42/ws,[1.5]", b"42/ws,[true]",
    b'42/ws,-1["rpc"]', b'42/ws,1234567890123456["rpc"]', b'42/ws,["rpc"', b"40/ws,", b"40/ws,{}",
    b"40/ws,[]", b'40/ws,"x"', b"41/ws,{}", b'42["rpc"]', b'42/other,["rpc"]', b"44/ws,{}",
    b'451-/ws,["rpc",{"_placeholder":true,"num":1}]',
    b'451-/ws,["rpc",{"_placeholder":true,"num":-1}]',
    b'451-/ws,["rpc",{"_placeholder":true}]', b'451-/ws,["rpc",{"_placeholder":true,"num":"0"}]',
    b'45-/ws,["rpc"]', b'45/ws,["rpc"]', b'42-/ws,["rpc"]', b'421-/ws,["rpc"]', b'4511-/ws,["rpc"]',
    b'45999999999999999999-/ws,["rpc"]', b'451-/ws,{"a":1}', b"42/" + b"n" * 300 + b',["rpc"]',
]  # fmt: skip


async def test_broken_socket_io_packets_close_the_session() -> None:
    async with served() as server:
        for packet in BAD_PACKETS:
            async with engine(server.port) as peer:
                await peer.send(frame(1, packet))
                if packet.startswith(b"451-/ws"):
                    await peer.send(frame(2, b"x"))
                closed = await peer.closed()
                assert closed.code == 1002, packet
        async with engine(server.port) as peer:
            await peer.send(frame(2, b"stray"))
            assert (await peer.closed()).code == 1002
        async with engine(server.port) as peer:
            await peer.send(
                frame(1, b'451-/ws,["rpc",{"_placeholder":true,"num":0}]') + frame(1, b"3")
            )
            await peer.send(frame(1, b'42/ws,1["rpc",{}]'))
            assert (await peer.closed()).code == 1002
        for packet in (b"42/ws,[\xff]", b"\xff", b"42/\xff,[]", b"4\xff", b"40/\xff,"):
            async with engine(server.port) as peer:
                await peer.send(frame(1, packet))
                assert (await peer.closed()).code == 1007, packet


async def test_event_before_the_token_closes_the_session() -> None:
    async with served(token=TOKEN) as server:
        for packet in (b'42["rpc",{}]', b'42/ws,0["rpc",{}]', b'451-["rpc",{}]', b"41", b"43[]"):
            async with engine(server.port, connect=None) as peer:
                await peer.send(frame(1, packet))
                assert (await peer.closed()).code == 1002


# --- The public test suite of the protocol ---------------------------------------------------------


SOCKET_IO_QUERY = "EIO=4&transport=websocket"


def connect_answer(prefix: str) -> Callable[[str | bytes], bool]:
    def is_connect_answer(frame: str | bytes) -> bool:
        assert isinstance(frame, str) and frame.startswith(prefix)
        fields = json.loads(frame.removeprefix(prefix))
        assert list(fields) == ["sid"] and isinstance(fields["sid"], str)
        return True

    return is_connect_answer


# The cases of the public Socket.IO protocol test suite, websocket transport: the same exchanges and
# expectations as in socketio/socket.io-protocol, folder test-suite, as one table: ">" is sent, "<"
# must come back (heartbeat pings aside, unless a ping is what is expected).

PING_INTERVAL_S, PING_TIMEOUT_S = 0.3, 0.2


def is_open_packet(frame: str | bytes) -> bool:
    assert isinstance(frame, str) and frame.startswith("0")
    fields = json.loads(frame[1:])
    assert isinstance(fields.pop("sid"), str)
    assert fields == {
        "upgrades": [],
        "pingInterval": PING_INTERVAL_S * 1000,
        "pingTimeout": PING_TIMEOUT_S * 1000,
        "maxPayload": 1_000_000,
    }
    return True


OPENED = [("<", is_open_packet)]
JOINED = [*OPENED, (">", "40"), ("<", connect_answer("40")), ("<", '42["auth",{}]')]
TWO_PLACES = '{"_placeholder":true,"num":0},{"_placeholder":true,"num":1}'
TWO_ATTACHMENTS = (b"\x01\x02\x03", b"\x04\x05\x06")
SEND_ATTACHMENTS = [(">", data) for data in TWO_ATTACHMENTS]
GET_ATTACHMENTS = [("<", data) for data in TWO_ATTACHMENTS]


PROTOCOL_CASES: dict[str, list[tuple[str, Any]]] = {
    # Engine.IO
    "session_opens": OPENED,
    "heartbeat_goes_on_while_answered": [*OPENED, *[("<", "2"), (">", "3")] * 3],
    "session_closes_when_pings_stay_unanswered": [*OPENED, ("closed", "silent")],
    "session_closes_on_close_packet": [*OPENED, (">", "1"), ("closed", None)],
    "joined_session_closes_on_close_packet": [*JOINED, (">", "1"), ("closed", None)],  # not theirs
    # Socket.IO: connect
    "main_namespace_connects": JOINED,
    "main_namespace_connects_with_payload": [
        *OPENED,
        (">", '40{"token":"123"}'),
        ("<", connect_answer("40")),
        ("<", '42["auth",{"token":"123"}]'),
    ],
    "custom_namespace_connects": [
        *OPENED,
        (">", "40/custom,"),
        ("<", connect_answer("40/custom,")),
        ("<", '42/custom,["auth",{}]'),
    ],
    "custom_namespace_connects_with_payload": [
        *OPENED,
        (">", '40/custom,{"token":"abc"}'),
        ("<", connect_answer("40/custom,")),
        ("<", '42/custom,["auth",{"token":"abc"}]'),
    ],
    "unknown_namespace_is_refused": [
        *OPENED,
        (">", "40/random"),
        ("<", '44/random,{"message":"Invalid namespace"}'),
    ],
    "invalid_handshake_closes": [*OPENED, (">", "4abc"), ("closed", None)],
    "missing_handshake_closes": [*OPENED, ("closed", None)],
    # Socket.IO: disconnect
    "main_namespace_disconnects_and_session_stays": [*JOINED, (">", "41"), ("<", "2")],
    "custom_namespace_disconnects_and_main_stays": [
        *JOINED,
        ("<", "2"),
        (">", "40/custom"),
        ("<", connect_answer("40/custom,")),
        ("<", '42/custom,["auth",{}]'),
        (">", "41/custom"),
        (">", '42["message","message to main namespace"]'),
        ("<", '42["message-back","message to main namespace"]'),
    ],
    # Socket.IO: messages
    "text_event_is_handled": [
        *JOINED,
        (">", '42["message",1,"2",{"3":[true]}]'),
        ("<", '42["message-back",1,"2",{"3":[true]}]'),
    ],
    "binary_event_is_handled": [
        *JOINED,
        (">", f'452-["message",{TWO_PLACES}]'),
        *SEND_ATTACHMENTS,
        ("<", f'452-["message-back",{TWO_PLACES}]'),
        *GET_ATTACHMENTS,
    ],
    "text_event_is_acknowledged": [
        *JOINED,
        (">", '42456["message-with-ack",1,"2",{"3":[false]}]'),
        ("<", '43456[1,"2",{"3":[false]}]'),
    ],
    "binary_event_is_acknowledged": [
        *JOINED,
        (">", f'452-789["message-with-ack",{TWO_PLACES}]'),
        *SEND_ATTACHMENTS,
        ("<", f"462-789[{TWO_PLACES}]"),
        *GET_ATTACHMENTS,
    ],
    "unknown_packet_type_closes": [*JOINED, (">", "4abc"), ("closed", None)],
    "payload_that_is_no_array_closes": [*JOINED, (">", "42{}"), ("closed", None)],
    "invalid_ack_id_closes": [
        *JOINED,
        (">", '42abc["message-with-ack",1,"2",{"3":[false]}]'),
        ("closed", None),
    ],
}


def suite_manager() -> WebSocketManager:
    """The dozen lines of user code which the suite expects on the server."""
    manager = WebSocketManager()

    @manager.on("connect")
    async def greet(client: Any, auth: Any) -> None:
        await client.emit("auth", auth)

    @manager.on("message")
    async def send_back(client: Any, *args: Any) -> None:
        await client.emit("message-back", *args)

    @manager.on("message-with-ack")
    async def acknowledge(client: Any, *args: Any) -> tuple[Any, ...]:
        return args

    return manager


@pytest.fixture
async def suite_port() -> AsyncIterator[int]:
    options = {
        "namespaces": ["/custom"],
        "ping_interval_s": PING_INTERVAL_S,
        "ping_timeout_s": PING_TIMEOUT_S,
        "connect_timeout_s": 1.0,  # after the three heartbeats of a case that never connects
        "max_message_bytes": 1_000_000,
        "history_messages": 0,  # with recovery on, a CONNECT answer has a `pid` too
    }
    async with serving(suite_manager(), port=0, **options) as server:
        yield server.port


async def expect_frame(connection: ClientConnection, expected: Any) -> None:
    frame = await connection.recv()
    while frame == "2" and expected != "2":
        await connection.send("3")
        frame = await connection.recv()
    assert expected(frame) if callable(expected) else frame == expected


async def expect_close(connection: ClientConnection, *, answers_pings: bool) -> None:
    """The server closes. Answered pings prove that it is not for the heartbeat."""
    with contextlib.suppress(ConnectionClosed):
        while True:
            assert await connection.recv() == "2"
            if answers_pings:
                await connection.send("3")


@pytest.mark.parametrize("case", PROTOCOL_CASES)
async def test_socket_io_protocol_case(suite_port: int, case: str) -> None:
    uri = f"ws://127.0.0.1:{suite_port}/socket.io/?{SOCKET_IO_QUERY}"
    async with asyncio.timeout(DEADLINE_S), connect(uri, ping_interval=None) as connection:
        for direction, frame in PROTOCOL_CASES[case]:
            if direction == ">":
                await connection.send(frame)
            elif direction == "<":
                await expect_frame(connection, frame)
            else:
                await expect_close(connection, answers_pings=frame != "silent")


@pytest.mark.parametrize(
    ("query", "statuses"),
    [
        ("transport=websocket", {400, 404}),  # no EIO: not known as Socket.IO at all
        ("EIO=abc&transport=websocket", {400}),
        ("EIO=4", {400}),
        ("EIO=4&transport=abc", {400}),
    ],
)
async def test_socket_io_protocol_refuses_handshake(
    suite_port: int, query: str, statuses: set[int]
) -> None:
    with pytest.raises(InvalidStatus) as refused:
        await connect(f"ws://127.0.0.1:{suite_port}/socket.io/?{query}")
    assert refused.value.response.status_code in statuses
