"""One HTTP exchange: bodies, deadlines, slow readers, the REST doors."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
import struct
import time
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

import karna.page
import karna_ws
from karna.door import HOLD_ANSWER
from karna.errors import InvalidRequest
from karna.http import Exchange
from karna_ws import WebSocketManager
from services import Context
from support import EXECUTE, Gate, Raw, http, served, until
from support_peers import (
    RAISED,
    RETURNED,
    TOKEN,
    Headers,
    ask,
    dial,
    frame,
    head,
    misbehaving,
    post,
    raw,
    upgrade,
)


async def test_http_answer_is_the_commands_whatever_it_sends_before() -> None:
    manager = WebSocketManager()

    @manager.commands.command
    async def tell(context: Context) -> str:
        await context.client.send("hello", 1)
        await context.client.emit("hello", 1)
        return "told"

    async with served(manager) as server:
        status, answer = await http(server, "POST", "/api/execute_command", {"command": "tell"})
        assert (status, answer["data"]["result"]) == (200, "told")
        request = {"jsonrpc": "2.0", "method": EXECUTE, "params": ["tell"], "id": 1}
        status, answer = await http(server, "POST", "/rpc", request)
        assert (status, answer["result"]["result"]) == (200, "told")


async def test_rest_client_that_disconnects_has_its_command_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A FIN alone may be half a close: the first question after it meets a RST, the next one fails.
    monkeypatch.setattr("karna.http.PROBE_S", 0.05)
    manager = WebSocketManager()
    gate = Gate(manager)
    async with served(manager, close_timeout_s=0.2) as server:  # a sweep each 50 ms
        for path, body in (
            ("/api/execute_command", {"command": "gate rest"}),
            ("/rpc", {"jsonrpc": "2.0", "method": EXECUTE, "params": ["gate rpc"], "id": 1}),
        ):
            request = asyncio.create_task(http(server, "POST", path, body))
            await until(lambda: gate.running)
            request.cancel()  # closes its socket
            with pytest.raises(asyncio.CancelledError):
                await request
            await until(lambda: not gate.running)
        assert gate.cancelled == ["rest", "rpc"]
        await until(lambda: not manager.connections and not manager.commands.tasks.running)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "invalid_json"), ([], "invalid_request"), ({}, "invalid_params"),
        ({"message": ""}, "invalid_params"), ({"message": 5}, "invalid_params"),
        ({"message": "x", "level": "loud"}, "invalid_params"),
        ({"message": "x", "level": None}, "invalid_params"),
        ({"message": "x", "level": ["info"]}, "invalid_params"),
        ({"message": "x", "level": {}}, "invalid_params"),
    ],
    ids=str,
)  # fmt: skip
async def test_rest_notify_of_wrong_form_is_refused(body: Any, code: str) -> None:
    async with served() as server, Raw.open(server) as client:
        status, answer = await http(server, "POST", "/api/notify", body)
        assert (status, answer["type"], answer["data"]["code"]) == (400, "error", code)
        assert await client.received() == []


async def test_index_of_the_doors_takes_the_place_of_a_missing_page(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("karna.page.load_page", lambda: None)
    async with served() as server:
        status, index = await http(server, "GET", "/")
        assert (status, index["name"]) == (200, "karna-ws")
        assert {"/ws", "/socket.io/", "/health", "/api/status", "/rpc"} <= set(index["doors"])


async def test_unknown_path_is_told_the_doors() -> None:
    async with served() as server:
        status, answer = await http(server, "GET", "/nope")
        assert (status, answer["type"]) == (404, "error")
        assert "/ws" in answer["data"]["doors"]
        with pytest.raises(InvalidStatus) as caught:
            await connect(f"ws://127.0.0.1:{server.port}/nope")
        assert caught.value.response.status_code == 404
        for path in ("/ws", "/ws/"):
            assert (await http(server, "GET", path))[0] == 426


async def test_requests_behind_one_that_closes_get_no_answer_but_the_end() -> None:
    async with served() as server:
        body = post("/api/execute_command", {"command": "echo once"})
        for first in (head("GET", "/health"), body, head("GET", "/nowhere")):
            async with dial(server.port) as peer:
                await peer.send(first + body * 200 + upgrade())
                answer = await peer.answer()
                assert answer.headers["connection"] == "close"
                assert await peer.at_end()
        await until(lambda: not server.manager.connections)


BAD_LENGTHS: list[tuple[Headers, int]] = [
    ({"Content-Length": None}, 411),
    ({"Transfer-Encoding": "chunked"}, 400),  # and a Content-Length: RFC 9112, 6.1
    ({"Content-Length": None, "Transfer-Encoding": ["chunked", "chunked"]}, 501),
    ({"Content-Length": None, "Transfer-Encoding": "gzip, chunked"}, 501),
    ({"Content-Length": None, "Transfer-Encoding": "identity"}, 501),
    ({"Content-Length": None, "transfer-encoding": ""}, 501),
    ({"Content-Length": ["2", "2"]}, 400),
    ({"Content-Length": ["2", "3"]}, 400),
    ({"Content-Length": "2, 2"}, 400),
    ({"Content-Length": ""}, 400),
    ({"Content-Length": "-1"}, 400),
    ({"Content-Length": "+2"}, 400),
    ({"Content-Length": "2.0"}, 400),
    ({"Content-Length": "0x2"}, 400),
    ({"Content-Length": "2 2"}, 400),
    ({"Content-Length": "\xb2"}, 400),
    ({"Content-Length": "two"}, 400),
    ({"Content-Length": "9" * 16}, 400),
    ({"Content-Length": "9" * 5000}, 400),
    ({"Content-Length": "9" * 15}, 413),
]


async def test_bodies_of_unclear_length_are_refused() -> None:
    async with served() as server:
        for headers, status in BAD_LENGTHS:
            answer = await ask(server.port, post("/api/execute_command", b"{}", headers))
            assert answer.status == status, headers
            assert answer.error["code"] == ("too_large" if status == 413 else "invalid_request")
        for target in ("/api/execute_command", "/api/notify"):
            for body, code in ((b"", "invalid_json"), (b"\xff", "invalid_json"),
                               (b"{", "invalid_json"), (b"[]", "invalid_request"),
                               (b"1" * 5000, "invalid_json"), (b"[" * 5000, "invalid_json"),
                               (b'"x"', "invalid_request"), (b"{}", "invalid_params")):  # fmt: skip
                answer = await ask(server.port, post(target, body))
                assert (answer.status, answer.error["code"]) == (400, code), body


CHUNKED: Headers = {"Content-Length": None, "Transfer-Encoding": "chunked"}


async def test_chunked_body_is_taken_in_any_pieces_and_the_connection_goes_on() -> None:
    body = b'9;x=y\r\n{"command\r\n8 \r\n":"echo \r\n4\r\nhi"}\r\n0\r\nTrailer: t\r\n\r\n'
    whole = post("/api/execute_command", b"", {**CHUNKED, "Connection": "keep-alive"}) + body
    async with served() as server, dial(server.port) as peer:
        for cut in range(len(whole) - len(body), len(whole)):
            await peer.send(whole[:cut])
            await until(lambda: not peer.writer.transport.get_write_buffer_size())
            await peer.send(whole[cut:])
            answer = await peer.answer()
            assert (answer.status, answer.json["data"]["result"]) == (200, "hi"), cut


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"x\r\n", 400),
        (b"-1\r\n", 400),
        (b"2\r\n{}x\r\n0\r\n\r\n", 400),
        (b"2\n{}\r\n0\r\n\r\n", 400),
        (b"123456789\r\n", 400),
        (b"2;" + b"x" * 2000 + b"\r\n{}\r\n", 400),
        (b"7ff\r\n", 413),
        (b"3e9\r\n", 413),
        (b"1\r\n \r\n" * 990 + b"b\r\n", 413),
        (b"1\r\n \r\n" * 4097, 413),
    ],
)
async def test_chunked_body_that_is_malformed_or_too_long_is_refused(
    body: bytes, status: int
) -> None:
    async with served(max_body_bytes=1000 if len(body) < 20_000 else 10_000) as server:
        answer = await ask(server.port, post("/api/execute_command", b"", CHUNKED) + body)
        assert answer.status == status


async def test_absolute_target_is_judged_by_its_own_authority() -> None:
    """RFC 9112, 3.2.2: it takes the place of Host, so it must pass for it."""
    async with served(allow_host="karna.example") as server:
        for target, status in (
            ("http://localhost/health", 200), ("HTTP://127.0.0.1:8000/health", 200),
            ("https://karna.example/health?x", 200), ("http://evil.example/health", 403),
            ("http://user@localhost/health", 400), ("ftp://localhost/health", 400),
            ("http:///health", 400), ("localhost/health", 400),
        ):  # fmt: skip
            answer = await ask(server.port, head("GET", target))
            assert answer.status == status, target
        answer = await ask(server.port, head("GET", "http://localhost"))
        assert b"<title>" in answer.body


async def test_load_balancer_of_this_machine_may_ask_for_health_without_a_host() -> None:
    async with served(token=TOKEN) as server:
        probe = b"GET /health HTTP/1.0\r\n\r\n"  # HAProxy's `option httpchk GET /health`
        assert (await ask(server.port, probe)).status == 200
        for other in (
            b"GET /health HTTP/1.1\r\n\r\n", b"GET /api/status HTTP/1.0\r\n\r\n",
            b"GET /health HTTP/1.0\r\nOrigin: http://evil.example\r\n\r\n",
            b"GET /health HTTP/1.0\r\nHost: evil.example\r\n\r\n",
        ):  # fmt: skip
            assert (await ask(server.port, other)).status in (400, 403), other


async def test_expect_continue_is_answered_before_the_body_and_refusals_at_once() -> None:
    async with served(max_body_bytes=100) as server:
        body = b'{"command":"echo hi"}'
        for size, status in ((len(body), 100), (101, 413)):
            async with dial(server.port) as peer:
                expect = {"Expect": "100-continue", "Content-Length": size}
                await peer.send(post("/api/execute_command", b"", expect))
                assert (await peer.answer()).status == status
                if status == 100:
                    await peer.send(body)
                    assert (await peer.answer()).json["data"]["result"] == "hi"


async def test_refused_body_is_answered_though_it_is_still_being_sent() -> None:
    async with served() as server:
        for headers, status in (
            ({}, 413),
            ({"Content-Type": "text/plain"}, 415),
            ({"Origin": "null"}, 403),
        ):
            async with dial(server.port) as peer:
                size = 30_000_000
                start = post("/rpc", b"", {"Content-Length": size, **headers})
                peer.writer.write(start + b"x" * size)  # the answer is there long before its end
                await peer.writer.drain()
                answer = await peer.answer()
                assert answer.status == status
                assert await peer.at_end()
        await until(lambda: not server.manager.connections)


async def test_body_beyond_its_length_is_ignored_on_a_connection_that_closes() -> None:
    async with served() as server:
        request_ = post("/api/execute_command", {"command": "echo hi"}) + b"x" * 100_000
        assert (await ask(server.port, request_)).json["data"]["result"] == "hi"


async def test_large_answer_reaches_a_slow_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("karna.connection.LINGER_S", 0.2)
    manager = WebSocketManager()

    @manager.commands.command
    async def much() -> str:
        """Answer at length."""
        return "x" * 8_000_000

    # The whole answer takes about 1 s: five times what a peer has to read the end of one.
    async with (
        served(manager, open_timeout_s=0.4) as server,
        dial(server.port) as peer,
    ):
        await peer.send(post("/api/execute_command", {"command": "much"}))
        received = 0
        while data := await peer.reader.read(400_000):
            received += len(data)
            await asyncio.sleep(0.05)
        assert received > 8_000_000


async def test_request_has_one_deadline_over_head_and_body() -> None:
    # 0.0 first byte; 0.25 head is whole; 0.4 deadline; 0.5 swept at the latest; 0.65 would be a
    # deadline that began anew with the body.
    async with (
        served(open_timeout_s=0.4) as server,
        dial(server.port) as peer,
    ):
        began = time.monotonic()
        data = post("/api/execute_command", {"command": "time"})
        await peer.send(data[:20])
        await asyncio.sleep(0.25)
        await peer.send(data[20:-5])
        answer = await peer.answer()
        assert (answer.status, answer.error["code"]) == (408, "timeout")
        assert "--open-timeout" in answer.error["message"]
        assert 0.35 < time.monotonic() - began < 0.64


@pytest.mark.parametrize("start", [b"", b"GET / HT", upgrade()[:-2], post("/rpc", b"x" * 50)[:-20]])
async def test_dribbling_request_is_cut_at_its_deadline(start: bytes) -> None:
    async with served(open_timeout_s=0.3) as server:
        async with dial(server.port) as peer:
            began = time.monotonic()
            await peer.send(start)
            while not peer.reader.at_eof() and not peer.reader._buffer:  # type: ignore[attr-defined]
                if start:
                    with contextlib.suppress(ConnectionError):
                        await peer.send(b"a")
                await asyncio.sleep(0.02)
            if start:
                assert (await peer.answer()).status == 408
            assert await peer.at_end()
            assert 0.25 < time.monotonic() - began < 0.7
        await until(lambda: not server.manager.connections)


async def test_http_answers_for_handlers_that_fail() -> None:
    manager = WebSocketManager()
    misbehaving(manager)
    async with served(manager) as server:
        for kind in ("coroutine", "thread", "inline"):
            for name in [*RAISED, *RETURNED]:
                answer = await ask(
                    server.port, post("/api/execute_command", {"command": f"{kind} {name}"})
                )
                expected = (403,) if name == "refused" else (500, 409)
                assert answer.status in expected and answer.error["code"], (kind, name)
                rpc = {"jsonrpc": "2.0", "method": f"method_{kind}", "params": [name], "id": 1}
                answer = await ask(server.port, post("/rpc", rpc))
                assert answer.status == 200 and answer.json["error"]["message"], (kind, name)


async def test_head_answers_as_get_without_the_body() -> None:
    async with served() as server:
        for path in ("/", "/health", "/api/status", "/nowhere", "/ws", "/rpc"):
            get = await ask(server.port, head("GET", path))
            without = await ask(server.port, head("HEAD", path))
            assert (without.status, without.body) == (get.status, b"")
            assert without.headers["content-type"] == get.headers["content-type"]
            assert without.headers["content-length"] == get.headers["content-length"]


# --- Connections that are kept ---------------------------------------------------------------------


KEPT: Headers = {"Connection": None}  # as browsers and HTTP/1.1 libraries ask: `head` says close


async def test_connection_is_kept_for_one_request_after_another() -> None:
    async with served() as server, dial(server.port) as peer:
        for number in range(50):
            await peer.send(post("/api/execute_command", {"command": f"echo {number}"}, KEPT))
            answer = await peer.answer()
            assert "connection" not in answer.headers
            assert (answer.status, answer.json["data"]["result"]) == (200, str(number))
            for method, target, status in (
                ("GET", "/health", 200), ("HEAD", "/", 200), ("GET", "/nowhere", 404),
                ("OPTIONS", "/rpc", 204), ("DELETE", "/rpc", 405), ("GET", "/ws", 426),
            ):  # fmt: skip
                await peer.send(head(method, target, KEPT))
                assert (await peer.answer(to_head=method == "HEAD")).status == status
        assert len(server.manager.connections) == 1


async def test_two_thousand_posts_need_one_connection() -> None:
    manager = WebSocketManager()
    async with served(manager) as server, dial(server.port) as peer:
        for number in range(2_000):
            await peer.send(post("/api/execute_command", {"command": f"echo {number}"}, KEPT))
            assert (await peer.answer()).json["data"]["result"] == str(number)
        assert next(manager.names) == 2, "one connection was made before"
        assert not manager.commands.tasks.running


async def test_pipelined_requests_are_answered_in_order_each_once() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    async with served(manager) as server, dial(server.port) as peer:
        requests = [
            post("/api/execute_command", {"command": "gate slow"}, KEPT),
            *(post("/api/execute_command", {"command": f"echo {n}"}, KEPT) for n in range(300)),
            head("GET", "/nowhere", KEPT),
            post("/api/execute_command", {"command": "echo last"}),
            head("GET", "/health"),  # behind a `Connection: close`: never answered
        ]
        data = b"".join(requests)
        for start in range(0, len(data), 1_001):
            peer.writer.write(data[start : start + 1_001])
            await asyncio.sleep(0)
        await until(lambda: gate.begun)
        gate.let("slow")
        answers = [(await peer.answer()).json["data"] for _ in range(303)]
        assert [each.get("result") for each in answers] == ["slow", *map(str, range(300)), None,
                                                            "last"]  # fmt: skip
        assert await peer.at_end()


async def test_body_beyond_its_length_is_the_next_request() -> None:
    async with served() as server, dial(server.port) as peer:
        first = post("/api/execute_command", {"command": "echo hi"}, KEPT)
        await peer.send(first + head("GET", "/health", KEPT) + b"x" * 100)
        assert (await peer.answer()).json["data"]["result"] == "hi"
        assert (await peer.answer()).json == {"status": "healthy"}
        assert (await peer.answer()).status == 400
        assert await peer.at_end()


async def test_pipelined_requests_each_have_a_turn_of_their_own() -> None:
    order: list[str] = []
    manager = WebSocketManager()

    @manager.commands.command(inline=True)
    def mark(name: str) -> None:
        order.append(name)

    async with (
        served(manager) as server,
        dial(server.port) as greedy, dial(server.port) as modest,
    ):  # fmt: skip
        for peer in (greedy, modest):  # both are accepted before either sends more
            await peer.send(head("GET", "/health", KEPT))
            await peer.answer()
        request = post("/api/execute_command", {"command": "mark greedy"}, KEPT)
        greedy.writer.write(request * 300)
        modest.writer.write(post("/api/execute_command", {"command": "mark modest"}, KEPT))
        await modest.answer()
        assert order.index("modest") < 10
        for _ in range(300):
            assert (await greedy.answer()).status == 200


async def test_peer_that_pipelines_faster_than_it_is_answered_is_not_read() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    async with served(manager) as server, dial(server.port) as peer:
        await peer.send(post("/api/execute_command", {"command": "gate slow"}, KEPT))
        await until(lambda: gate.begun)
        request = post("/api/execute_command", {"command": "echo " + "x" * 50_000}, KEPT)
        sending = asyncio.create_task(peer.send(request * 400))  # 20 MB
        (connection,) = manager.connections
        await until(lambda: connection._holds & HOLD_ANSWER)
        assert len(connection.door.rest) < 64 * 1024 + 256 * 1024  # asyncio's one read
        gate.let("slow")
        assert (await peer.answer()).json["data"]["result"] == "slow"
        for _ in range(400):
            assert len((await peer.answer()).json["data"]["result"]) == 50_000
        await sending
        assert connection._holds == 0


async def test_kept_connection_that_idles_is_closed_after_the_open_timeout() -> None:
    # 0.0 request; 0.3 the deadline of the first; 0.4 another; 0.7 to 0.78 closed (a sweep each
    # 75 ms). What takes long does not idle.
    manager = WebSocketManager()
    gate = Gate(manager)
    async with served(manager, open_timeout_s=0.3) as server, dial(server.port) as peer:
        for name in ("one", "two"):
            await peer.send(post("/api/execute_command", {"command": f"gate {name}"}, KEPT))
            await asyncio.sleep(0.4)
            gate.let(name)
            assert (await peer.answer()).json["data"]["result"] == name
        began = time.monotonic()
        assert await peer.at_end()
        assert 0.25 < time.monotonic() - began < 0.6
        assert manager.metrics.refusals["timeout"] == 0  # it is no fault of the peer's


async def test_later_request_has_its_time_from_its_first_byte() -> None:
    # 0.0 answer; 0.2 first byte; 0.3 an idle one would be closed; 0.4 the rest.
    async with served(open_timeout_s=0.3) as server, dial(server.port) as peer:
        await peer.send(head("GET", "/health", KEPT))
        assert (await peer.answer()).status == 200
        await asyncio.sleep(0.2)
        data = head("GET", "/health", KEPT)
        await peer.send(data[:5])
        await asyncio.sleep(0.2)
        await peer.send(data[5:])
        assert (await peer.answer()).status == 200


async def test_later_request_that_dribbles_is_told_of_its_deadline() -> None:
    async with served(open_timeout_s=0.3) as server, dial(server.port) as peer:
        await peer.send(head("GET", "/health", KEPT))
        assert (await peer.answer()).status == 200
        await peer.send(b"GET / HT")
        answer = await peer.answer()
        assert (answer.status, answer.headers["connection"]) == (408, "close")
        assert await peer.at_end()


@pytest.mark.parametrize("options", ["close", "Close", "foo, close", ["foo", "close"]])
async def test_connection_close_is_heeded_in_any_form(options: Any) -> None:
    async with served() as server, dial(server.port) as peer:
        again = head("GET", "/health", KEPT)
        await peer.send(head("GET", "/health", {"Connection": options}) + again)
        answer = await peer.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert await peer.at_end()


@pytest.mark.parametrize("connection", [None, "keep-alive", "close"])
async def test_http_1_0_is_answered_once_and_closed(connection: str | None) -> None:
    async with served() as server, dial(server.port) as peer:
        data = head("GET", "/health", {"Connection": connection}).replace(b"HTTP/1.1", b"HTTP/1.0")
        await peer.send(data * 2)
        answer = await peer.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert await peer.at_end()


@pytest.mark.parametrize("target", ["/nowhere", "/health", "/rpc"])
async def test_error_before_the_body_was_read_closes(target: str) -> None:
    """Else the body, of which a proxy may say other things than we, would be the next request."""
    async with served() as server, dial(server.port) as peer:
        smuggled = post("/api/execute_command", {"command": "echo smuggled"}, KEPT)
        refused = head("POST", target, {**KEPT, "Content-Length": len(smuggled)})
        await peer.send(refused + smuggled)
        answer = await peer.answer()
        assert answer.status in (404, 405, 415) and answer.headers["connection"] == "close"
        assert await peer.at_end()


async def test_connection_that_was_used_for_requests_can_be_upgraded() -> None:
    async with served() as server, dial(server.port) as peer:
        for _ in range(3):
            await peer.send(head("GET", "/health", KEPT))
            assert (await peer.answer()).status == 200
        await peer.send(upgrade() + frame(1, b'{"method":"get_status","id":1}'))
        assert (await peer.answer()).status == 101
        assert (await peer.json())["id"] == 1
        await peer.sync()


async def test_shutdown_closes_kept_connections_that_idle_and_answers_the_others() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    async with (
        served(manager, grace_s=20.0) as server,
        dial(server.port) as idle, dial(server.port) as busy,
    ):  # fmt: skip
        for peer in (idle, busy):
            await peer.send(head("GET", "/health", KEPT))
            assert (await peer.answer()).status == 200
        await busy.send(post("/api/execute_command", {"command": "gate slow"}, KEPT))
        await until(lambda: gate.begun)
        closing = server.close()
        gate.let("slow")
        answer = await busy.answer()
        assert answer.json["data"]["result"] == "slow" and answer.headers["connection"] == "close"
        assert await busy.at_end() and await idle.at_end()
        busy.writer.close()
        await closing


# --- Peers that end their side ---------------------------------------------------------------------


async def test_half_close_keeps_the_answers_of_slow_and_pipelined_requests() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    async with served(manager) as server:
        for turn, before in enumerate((b"", head("GET", "/health", KEPT) * 30)):
            async with dial(server.port) as peer:
                slow = post("/api/execute_command", {"command": f"gate {turn}"}, KEPT)
                await peer.send(before + slow + head("GET", "/nowhere", KEPT))
                peer.writer.write_eof()
                for _ in range(before.count(b"GET")):
                    assert (await peer.answer()).status == 200
                await until(lambda turn=turn: len(gate.begun) == turn + 1)
                gate.let(str(turn))
                assert (await peer.answer()).json["data"]["result"] == str(turn)
                last = await peer.answer()
                assert (last.status, last.headers["connection"]) == (404, "close")
                assert await peer.at_end()
        assert gate.cancelled == []
        await until(lambda: not manager.connections)


@pytest.mark.parametrize(
    "rest", [b"", b"GET", head("GET", "/health")[:-2], post("/rpc", b"{}")[:-1]]
)
async def test_request_that_ends_in_the_middle_closes_at_once(rest: bytes) -> None:
    manager = WebSocketManager()
    async with served(manager, open_timeout_s=1000.0, close_timeout_s=1000.0) as server:
        for before in (0, 1, 30):
            async with dial(server.port) as peer:
                await peer.send(head("GET", "/health", KEPT) * before + rest)
                peer.writer.write_eof()
                for _ in range(before):
                    assert (await peer.answer()).status == 200
                assert await peer.at_end()
        await until(lambda: not manager.connections)


async def test_peer_that_half_closed_is_asked_whether_it_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("karna.http.PROBE_S", 0.05)
    manager = WebSocketManager()
    gate = Gate(manager)
    async with served(manager, close_timeout_s=0.2) as server:  # a sweep each 50 ms
        async with dial(server.port) as peer:
            await peer.send(post("/api/execute_command", {"command": "gate there"}, KEPT))
            peer.writer.write_eof()
            for _ in range(3):
                assert (await peer.answer()).status == 102
            gate.let("there")
            while (answer := await peer.answer()).status == 102:
                pass
            assert answer.json["data"]["result"] == "there"
        async with dial(server.port) as old:  # HTTP/1.0 knows no such answer
            data = post("/api/execute_command", {"command": "gate old"})
            await old.send(data.replace(b"HTTP/1.1", b"HTTP/1.0"))
            old.writer.write_eof()
            await until(lambda: "old" in gate.begun)
            await asyncio.sleep(0.2)
            gate.let("old")
            assert (await old.answer()).json["data"]["result"] == "old"
        async with dial(server.port) as dead:
            await dead.send(post("/api/execute_command", {"command": "gate dead"}, KEPT))
            await until(lambda: "dead" in gate.begun)
        # It has closed its socket: a probe is answered with RST.
        await until(lambda: gate.cancelled == ["dead"])
        await until(lambda: not manager.connections)


async def test_reset_cancels_the_command_at_once() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    async with served(manager, close_timeout_s=1000.0) as server, dial(server.port) as peer:
        await peer.send(post("/api/execute_command", {"command": "gate reset"}, KEPT))
        await until(lambda: gate.begun)
        linger = struct.pack("ii", 1, 0)
        peer.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        peer.writer.transport.abort()
        await until(lambda: gate.cancelled == ["reset"])


# --- One answer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [KEPT, {}], ids=["kept", "closing"])
async def test_exchange_answers_once_whoever_asks_it_to(
    headers: Headers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(manager: Any, exchange: Exchange, body: bytes) -> None:
        for number in range(2):
            exchange.answer(200, b"%d" % number)
        exchange.fail(InvalidRequest("too late"))

    monkeypatch.setitem(karna_ws.ROUTES, "/health", karna_ws.Route("GET", twice))
    async with served() as server, dial(server.port) as peer:
        await peer.send(head("GET", "/health", headers))
        assert (await peer.answer()).body == b"0"
        if headers:
            await peer.send(head("GET", "/nowhere"))
            assert (await peer.answer()).status == 404
        assert await peer.at_end()


async def test_closing_exchange_gives_no_second_answer() -> None:
    # Refused while its body arrives: the rest of it, a deadline and another request say nothing.
    async with served(open_timeout_s=0.2, max_body_bytes=1000) as server, dial(server.port) as peer:
        await peer.send(post("/rpc", b"x" * 500, {**KEPT, "Content-Length": 1001}))
        answer = await peer.answer()
        assert (answer.status, answer.headers["connection"]) == (413, "close")
        with contextlib.suppress(ConnectionError):
            for _ in range(10):
                await peer.send(b"x" * 100 + head("GET", "/health", KEPT))
                await asyncio.sleep(0.04)
        assert await peer.at_end()


async def test_handshake_that_fails_late_is_not_answered_in_the_websocket() -> None:
    manager = WebSocketManager()

    def admit(client: Any) -> None:
        raise RuntimeError("as planned")

    manager.admit = admit  # type: ignore[method-assign]
    async with served(manager, logs_errors=True) as server, raw(server.port) as peer:
        await peer.sync()  # a frame comes next, no HTTP


async def test_page_is_back_as_soon_as_its_file_can_be_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("karna.page.PAGE", tmp_path / "console.html")
    karna.page._read_page.cache_clear()
    try:
        async with served() as server:
            assert (await http(server, "GET", "/"))[1]["name"] == "karna-ws"
            karna.page.PAGE.write_text("<script>1</script><style>b{}</style>")
            answer = await ask(server.port, head("GET", "/"))
            assert answer.body == b"<script>1</script><style>b{}</style>"
            digest = b64encode(hashlib.sha256(b"1").digest()).decode()
            assert f"script-src 'sha256-{digest}'" in answer.headers["content-security-policy"]
    finally:
        karna.page._read_page.cache_clear()
