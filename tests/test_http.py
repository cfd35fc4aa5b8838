"""One HTTP exchange: bodies, deadlines, slow readers, the REST doors."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from karna_ws import WebSocketManager
from services import Context
from support import EXECUTE, Gate, Raw, http, served, until
from support_peers import RAISED, RETURNED, TOKEN, Headers, ask, dial, head, misbehaving, post, upgrade


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


async def test_pipelined_requests_get_one_answer_and_the_end() -> None:
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
    body = b"9;x=y\r\n{\"command\r\n8 \r\n\":\"echo \r\n4\r\nhi\"}\r\n0\r\nTrailer: t\r\n\r\n"
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


async def test_body_beyond_its_length_is_ignored() -> None:
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
