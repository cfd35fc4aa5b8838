"""HTTP heads: in one piece or many, at their limits, malformed."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest

from karna.errors import RequestError
from karna.head import ChunkedBody
from support import execute, served
from support_peers import ENGINE, ask, dial, frame, head, post, upgrade


async def test_head_split_at_every_byte_is_read_the_same() -> None:
    async with served() as server:
        for whole, expected in (
            (post("/api/execute_command", {"command": "echo hi"}), b'"result":"hi"'),
            (upgrade(), b"101 Switching"),
        ):
            for cut in range(1, len(whole)):
                async with dial(server.port) as peer:
                    peer.writer.write(whole[:cut])
                    await asyncio.sleep(0)
                    peer.writer.write(whole[cut:])
                    answer = await peer.reader.readuntil(expected)
                    assert answer.startswith(b"HTTP/1.1 ")


async def test_request_one_byte_at_a_time_is_read_the_same() -> None:
    async with served() as server, dial(server.port) as peer:
        peer.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        message = frame(1, json.dumps(execute("echo hi", 7)).encode())
        for byte in upgrade() + message:
            peer.writer.write(bytes((byte,)))
            await asyncio.sleep(0)
        assert (await peer.answer()).status == 101
        assert (await peer.json())["data"]["result"] == "hi"


async def test_handshake_and_first_messages_may_come_in_one_piece() -> None:
    async with served() as server, dial(server.port) as peer:
        messages = [frame(1, json.dumps(execute(f"echo {n}", n)).encode()) for n in range(3)]
        data = upgrade() + b"".join(messages)
        await peer.send(data)
        assert (await peer.answer()).status == 101
        assert [(await peer.json())["data"]["result"] for _ in range(3)] == ["0", "1", "2"]
        assert server.manager.bytes_in == len(data)


BAD_HEADS: list[tuple[bytes, int]] = [
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # TLS on the plain port
    (b"\r\n\r\n", 400),
    (b"\x00" * 100, 400),
    (b"get / HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", 400),
    (b"GARBAGE\r\n\r\n", 400),
    (b"GET\r\n\r\n", 400),
    (b"GET /\r\n\r\n", 400),
    (b"GET / HTTP/2.0\r\nHost: localhost\r\n\r\n", 400),
    (b"GET / HTTP/1.1 \r\nHost: localhost\r\n\r\n", 400),
    (b"GET  / HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    (b"GET / HTTP/1.10\r\nHost: localhost\r\n\r\n", 400),
    (b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    (b"GET /a b HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    (b"GET localhost/health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    (b"CONNECT localhost:443 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\n\r\n", 400),
    (b"GET / HTTP/1.0\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost localhost\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\n Host: localhost\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\n folded: x\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\rb\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: localhost\nX: y\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\nContent-Length: 5\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\n: empty\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nX\xe9: y\r\n\r\n", 400),
    (head("GET", "/?" + "x&" * 101), 400),
    (head("GET", "/nowhere"), 404),
    (head("GET", "/ws%2f"), 404),
    (head("GET", "/../etc/passwd"), 404),
    (head("GET", "//evil.example/health"), 404),
    (head("GET", "/ws"), 426),
    (head("GET", "/ws/"), 426),
    (head("GET", "/api/execute_command"), 405),
    (head("BREW", "/health"), 405),
    (head("GET", ENGINE), 400),
    (upgrade("/socket.io/?EIO=4&transport=polling"), 400),
    (upgrade("/socket.io/?EIO=5&transport=websocket"), 400),
    (upgrade(ENGINE + "&sid=x"), 400),
    (upgrade("/"), 404),
    (upgrade("/health"), 404),
    (upgrade("/nowhere"), 404),
    (upgrade("/ws/x"), 404),
    (upgrade("/ws", {"Upgrade": "h2c"}), 426),
    (upgrade("/ws", {"Upgrade": None}), 426),
    (upgrade("/ws", {"Connection": "keep-alive"}), 426),
    (upgrade("/ws", {"Upgrade": "websocket, h2c"}), 426),
    (upgrade("/ws", {"Sec-WebSocket-Version": "12"}), 426),
    (upgrade("/ws", {"Sec-WebSocket-Version": "8, 13"}), 426),
    (upgrade("/ws", {"Sec-WebSocket-Version": None}), 426),
    (upgrade("/ws", {"Sec-WebSocket-Key": None}), 400),
    (upgrade("/ws", {"Sec-WebSocket-Key": "short"}), 400),
    (upgrade("/ws", {"Sec-WebSocket-Key": ["dGhlIHNhbXBsZSBub25jZQ=="] * 2}), 400),
    (upgrade("/ws", {"Content-Length": "5"}) + b"hello", 400),
    (upgrade("/ws", {"Transfer-Encoding": "chunked"}) + b"0\r\n\r\n", 400),
    (upgrade("/ws").replace(b"GET", b"POST"), 405),
    (upgrade("/ws").replace(b"HTTP/1.1", b"HTTP/1.0"), 505),
]


async def test_malformed_requests_get_their_status_and_an_error() -> None:
    async with served() as server:
        for data, status in BAD_HEADS:
            answer = await ask(server.port, data)
            assert answer.status == status, data
            if ENGINE.partition("?")[0].encode() not in data:  # socket.io has words of its own
                assert answer.error["code"] == "invalid_request", data
            assert answer.headers["cache-control"] == "no-store"
        assert (await ask(server.port, head("GET", "/health"))).status == 200


async def test_malformed_heads_split_at_every_byte_get_the_same_status() -> None:
    async with served() as server:
        for data, status in BAD_HEADS[::3]:
            if len(data) > 250:
                continue
            for cut in range(1, len(data), 7):
                async with dial(server.port) as peer:
                    peer.writer.write(data[:cut])
                    await asyncio.sleep(0)
                    peer.writer.write(data[cut:])
                    assert (await peer.answer()).status == status, data


def padded_head(size: int, lines: int = 20) -> bytes:
    """A GET of /health whose head has `size` bytes, in `lines` header lines besides Host."""
    fixed = head("GET", "/health", {f"X-{n}": "" for n in range(lines)})
    missing = size - len(fixed)
    share = -(-missing // lines)
    sizes = [min(share, max(0, missing - n * share)) for n in range(lines)]
    return head("GET", "/health", {f"X-{n}": "y" * sizes[n] for n in range(lines)})


async def test_head_limits_are_exact_and_the_same_in_one_piece_or_many() -> None:
    line = len("GET /?x= HTTP/1.1")
    edges = [
        (head("GET", "/health?x=" + "y" * (8190 - line - 6)), 200),
        (head("GET", "/health?x=" + "y" * (8190 - line - 5)), 414),
        (head("GET", "/health?x=" + "y" * 60_000), 414),
        (head("GET", "/health", {"X": "y" * (8190 - 3)}), 200),
        (head("GET", "/health", {"X": "y" * (8190 - 2)}), 431),
        (head("GET", "/health", {"X": "y" * 60_000}), 431),
        (head("GET", "/health", {f"X-{n}": "y" for n in range(126)}), 200),  # and Host, Connection
        (head("GET", "/health", {f"X-{n}": "y" for n in range(127)}), 431),
        (head("GET", "/health", {f"X-{n}": "y" for n in range(3000)}), 431),
        (padded_head(65535), 200),
        (padded_head(65536), 200),
        (padded_head(65537), 431),
        (padded_head(150_000), 431),
    ]
    async with served() as server:
        for data, status in edges:
            for size in (len(data), 30_011, 4096, 4):
                if size == 4 and len(data) > 9000:
                    continue
                async with dial(server.port) as peer:
                    for start in range(0, len(data), size):
                        peer.writer.write(data[start : start + size])
                        if size < len(data):
                            await asyncio.sleep(0)
                    answer = await peer.answer()
                    assert answer.status == status, (len(data), size)
                    assert status == 200 or answer.error["code"] == "too_large"


async def test_endless_head_is_refused_while_it_arrives() -> None:
    for endless, status in (
        (b"GET /" + b"x" * 65536, 414),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 11000, 431),
    ):
        async with (
            served() as server,
            dial(server.port) as peer,
        ):
            for start in range(0, len(endless), 1000):
                peer.writer.write(endless[start : start + 1000])
                await asyncio.sleep(0)
            answer = await peer.answer()
            assert (answer.status, answer.error["code"]) == (status, "too_large")


def test_trailers_are_bounded_as_chunks_are() -> None:
    """Each is looked at: without a bound they come for as long as a request may take."""
    body = ChunkedBody(1024)
    assert body.take(b"0\r\nA: 1\r\nB: 2\r\n\r\nrest") == (b"rest", True)
    body = ChunkedBody(1024)
    with pytest.raises(RequestError, match="too many"):
        body.take(b"0\r\n" + b"a\r\n" * 10_000 + b"\r\n")
