"""Peers that write bytes: HTTP heads, frames and streams cut anywhere, and what comes back of them.

For what is said rather than how, `Raw`, `Sio` and `http` of `support` are simpler.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import json
import socket
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

import websockets.frames

from karna.errors import BadPacket, RequestError
from karna_ws import Client, WebSocketManager
from support import needs


TOKEN = "correct-horse"


class Answer(NamedTuple):
    """One HTTP response; names of headers in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The data of its `error` envelope, which every refusal has."""
        assert self.headers["content-type"] == "application/json"
        assert set(self.json) == {"type", "data"} and self.json["type"] == "error"
        assert self.json["data"]["message"]
        return self.json["data"]


class Received(NamedTuple):
    """One frame from the server, which masks none and fragments none."""

    opcode: int
    payload: bytes

    @property
    def code(self) -> int:
        assert self.opcode == 8
        return struct.unpack("!H", self.payload[:2])[0] if self.payload else 1005

    @property
    def reason(self) -> str:
        return self.payload[2:].decode()

    @property
    def json(self) -> Any:
        return json.loads(self.payload)


class Peer:
    """One socket to the server. Reading raises IncompleteReadError at its end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def send_json(self, value: Any) -> None:
        await self.send(frame(1, json.dumps(value).encode()))

    async def answer(self, *, to_head: bool = False) -> Answer:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head[:-4].split("\r\n")
        version, status, _ = first.split(" ", 2)
        assert version == "HTTP/1.1"
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        assert len(headers) == len(lines)
        size = (
            0
            if to_head or status in ("100", "101", "102")
            else int(headers.get("content-length", 0))
        )
        return Answer(int(status), headers, await self.reader.readexactly(size))

    async def frame(self) -> Received:
        first, size = await self.reader.readexactly(2)
        assert first & 0xF0 == 0x80 and size < 128
        if size >= 126:
            size = int.from_bytes(await self.reader.readexactly(2 if size == 126 else 8), "big")
        return Received(first & 15, await self.reader.readexactly(size))

    async def json(self) -> Any:
        """The next text message; pings between are left out."""
        while (received := await self.frame()).opcode == 9:
            pass
        assert received.opcode == 1, received
        return received.json

    async def frames(self) -> list[Received]:
        """All frames up to the end of the stream, which falls between two frames."""
        found = []
        while not await self.at_end():
            found.append(await self.frame())
        return found

    async def at_end(self) -> bool:
        """Wait for one more byte or the end of the stream; is it the end?"""
        is_over = self.reader.at_eof() or self.reader.exception() is not None
        if not self.reader._buffer and not is_over:  # type: ignore[attr-defined]
            with contextlib.suppress(ConnectionResetError):
                await self.reader._wait_for_data("at_end")  # type: ignore[attr-defined]
        return not self.reader._buffer  # type: ignore[attr-defined]

    async def closed(self) -> Received:
        """The close frame, after whatever messages come before it; then the stream ends."""
        while (received := await self.frame()).opcode != 8:
            pass
        self.writer.write(frame(8, received.payload))
        assert await self.at_end()
        return received

    async def sync(self) -> None:
        """Wait until the server has handled everything sent so far."""
        await self.send(frame(9, b"sync"))
        while (await self.frame()) != (10, b"sync"):
            pass


@contextlib.asynccontextmanager
async def dial(port: int | str, **options: Any) -> AsyncIterator[Peer]:
    """A socket to a TCP port or a Unix path. It is cut at the end, whatever still waits."""
    if isinstance(port, str):
        reader, writer = await asyncio.open_unix_connection(port, **options)
    else:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, **options)
    try:
        yield Peer(reader, writer)
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


UPGRADE = {
    "Host": "localhost",
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version": "13",
}


ENGINE = "/socket.io/?EIO=4&transport=websocket"
Headers = dict[str, Any]


def head(method: str, target: str, headers: Headers | None = None) -> bytes:
    """An HTTP head. A header that is None is left out, one that is a list comes once for each.

    The connection is closed behind the answer, unless `headers` say otherwise.
    """
    lines = [f"{method} {target} HTTP/1.1"]
    for name, value in {"Host": "localhost", "Connection": "close", **(headers or {})}.items():
        values = value if isinstance(value, list) else [] if value is None else [value]
        lines += [f"{name}: {one}" for one in values]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def post(target: str, value: Any, headers: Headers | None = None) -> bytes:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    length = {"Content-Type": "application/json", "Content-Length": len(body)}
    return head("POST", target, {**length, **(headers or {})}) + body


def upgrade(target: str = "/ws", headers: Headers | None = None) -> bytes:
    return head("GET", target, {**UPGRADE, **(headers or {})})


async def ask(port: int | str, request: bytes, **options: Any) -> Answer:
    """Send one HTTP request, read its answer, and see that the server ends the stream."""
    async with dial(port, **options) as peer:
        await peer.send(request)
        answer = await peer.answer(to_head=request.startswith(b"HEAD"))
        if answer.headers.get("connection") == "close":
            assert await peer.at_end()
        return answer


@contextlib.asynccontextmanager
async def raw(
    port: int | str, target: str = "/ws", headers: Headers | None = None, **options: Any
) -> AsyncIterator[Peer]:
    """A client of the raw door."""
    async with dial(port, **options) as peer:
        await peer.send(upgrade(target, headers))
        assert (await peer.answer()).status == 101
        yield peer


@contextlib.asynccontextmanager
async def engine(
    port: int, headers: Headers | None = None, connect: bytes | None = b"40/ws,", **options: Any
) -> AsyncIterator[Peer]:
    """A client of the Socket.IO door, in namespace /ws unless `connect` says otherwise."""
    async with raw(port, ENGINE, headers, **options) as peer:
        assert (await peer.frame()).payload[:2] == b"0{"
        if connect is not None:
            await peer.send(frame(1, connect))
            assert (await peer.frame()).payload.startswith(connect.partition(b"{")[0] + b"{")
        yield peer


def frame(
    opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0, mask: bytes = b"\1\2\3\4",
    is_masked: bool = True, length_bytes: int | None = None,
) -> bytes:  # fmt: skip
    """A client's frame; `length_bytes` 0, 2 or 8 chooses a form of the length."""
    size = len(payload)
    form = length_bytes if length_bytes is not None else 0 if size < 126 else 2
    if length_bytes is None and size > 65535:
        form = 8
    first = (0x80 if fin else 0) | rsv << 4 | opcode
    second = size if form == 0 else 126 if form == 2 else 127
    start = bytes((first, second | (0x80 if is_masked else 0)))
    if form:
        start += size.to_bytes(form, "big")
    if not is_masked:
        return start + payload
    return start + mask + websockets.frames.apply_mask(payload, mask)  # type: ignore[attr-defined]


def close_frame(code: int = 1000, reason: bytes = b"") -> bytes:
    return frame(8, struct.pack("!H", code) + reason)


def request(method: str, id: Any = None, /, **params: Any) -> dict[str, Any]:
    message: dict[str, Any] = {"method": method, "params": params}
    return message if id is None else {**message, "id": id}


async def get_metrics(port: int, headers: Headers | None = None) -> dict[str, float]:
    """All samples of /metrics, as 'name{label=value,...}'."""
    needs("prometheus_client")
    from prometheus_client import parser

    text = (await ask(port, head("GET", "/metrics", headers))).body.decode()
    found = {}
    for family in parser.text_string_to_metric_families(text):
        assert family.type != "unknown" and family.documentation
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            key = sample.name + (f"{{{labels}}}" if labels else "")
            assert key not in found
            found[key] = sample.value
    return found


class EchoManager(WebSocketManager):
    """Answers every message with itself: text as text, binary as binary."""

    def handle_message(self, client: Client, payload: bytes, is_text: bool) -> str | bytes:
        return payload.decode() if is_text else payload


DOORS: dict[str, Callable[[Headers], bytes]] = {
    "raw": lambda headers: upgrade("/ws", headers),
    "socket.io": lambda headers: upgrade(ENGINE, headers),
    "get": lambda headers: head("GET", "/api/status", headers),
    "post": lambda headers: post("/api/execute_command", {"command": "time"}, headers),
    "rpc": lambda headers: post(
        "/rpc", {"jsonrpc": "2.0", "method": "get_status", "id": 1}, headers
    ),
    "preflight": lambda headers: head(
        "OPTIONS", "/api/execute_command", {"Access-Control-Request-Method": "POST", **headers}
    ),
    "metrics": lambda headers: head("GET", "/metrics", headers),
    "page": lambda headers: head("GET", "/", headers),
    "health": lambda headers: head("GET", "/health", headers),
}


WELCOMED = {"raw": 101, "socket.io": 101, "preflight": 204}  # 200 elsewhere


def in_fragments(opcode: int, payload: bytes, count: int) -> bytes:
    size = -(-len(payload) // count)
    parts = [payload[n * size : (n + 1) * size] for n in range(count)]
    return b"".join(
        frame(0 if number else opcode, part, fin=number == count - 1)
        for number, part in enumerate(parts)
    )


def small_buffers() -> socket.socket:
    """A client's socket that takes little: what is not read stays with the server."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    return client


@contextlib.asynccontextmanager
async def lazy(port: int, target: str = "/ws") -> AsyncIterator[Peer]:
    """A client that can stop to read: little is taken in its stead."""
    client = small_buffers()
    await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=client, limit=2048)
    try:
        peer = Peer(reader, writer)
        await peer.send(upgrade(target))
        assert (await peer.answer()).status == 101
        yield peer
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def feed(peer: Peer, pieces: list[bytes], *, pause: int = 1) -> None:
    """Send each piece in a packet of its own, as far as that is ours to say."""
    peer.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for piece in pieces:
        peer.writer.write(piece)
        for _ in range(pause):
            await asyncio.sleep(0)


class Unspeakable(Exception):
    """An exception that can't be shown."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


class Unexpected(BaseException):
    """Neither an Exception nor one of Python's own."""


def recursive() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


RAISED: dict[str, Callable[[], BaseException]] = {
    "plain": lambda: ValueError("plain"),
    "empty": lambda: ValueError(),
    "exit": lambda: SystemExit(3),
    "interrupt": lambda: KeyboardInterrupt(),
    "cancelled": lambda: asyncio.CancelledError(),
    "generator": lambda: GeneratorExit(),
    "memory": lambda: MemoryError(),
    "recursion": lambda: RecursionError("deep"),
    "base": lambda: Unexpected("base"),
    "unspeakable": lambda: Unspeakable(),
    "surrogate": lambda: ValueError("\ud800 in the text"),
    "bytes": lambda: ValueError(b"\xff"),
    "long": lambda: ValueError("x" * 100_000),
    "group": lambda: ExceptionGroup("group", [ValueError("inner")]),
    "timeout": lambda: TimeoutError("its own"),
    "refused": lambda: RequestError("its own refusal", code="forbidden"),
    "packet": lambda: BadPacket("its own"),
    "unicode": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "its own"),
    "closed": lambda: ConnectionResetError("its own"),
}


RETURNED: dict[str, Callable[[], Any]] = {
    "object": object,
    "set": lambda: {1},
    "lambda": lambda: lambda: 1,
    "bigint": lambda: 2**64,
    "recursive": recursive,
    "deep": lambda: deep(300),
    "abyss": lambda: deep(100_000),
    "lone": lambda: "\udfff",
    "key": lambda: {"\ud800": 1},
    "keys": lambda: {(1, 2): 1},
    "coroutine": lambda: iter(()),
    "exception": lambda: ValueError("returned"),
    "inside": lambda: {"a": [1, {"b": object()}]},
}


def misbehaving(manager: WebSocketManager) -> None:
    """Commands, methods and events that raise and return as told, in every kind of handler."""

    def act(name: str) -> Any:
        if name in RAISED:
            raise RAISED[name]()
        return RETURNED[name]()

    async def coroutine(name: str) -> Any:
        """Fail after a wait."""
        await asyncio.sleep(0)
        return act(name)

    async def at_once(name: str) -> Any:
        """Fail before any wait."""
        return act(name)

    def thread(name: str) -> Any:
        """Fail in a thread."""
        return act(name)

    def inline(name: str) -> Any:
        """Fail on the loop."""
        return act(name)

    async def stream(name: str) -> AsyncIterator[Any]:
        """Fail in the middle of progress."""
        yield 1
        yield act(name)

    for function in (coroutine, at_once, thread, stream):
        manager.commands.command(function)
        manager.method(f"method_{function.__name__}")(function)
        if function is not stream:
            manager.on(f"event_{function.__name__}")(
                functools.wraps(function)(_drop_client(function))
            )
    manager.commands.command(inline=True)(inline)
    manager.method("method_inline", inline=True)(inline)
    manager.on("event_inline", inline=True)(lambda client, name: inline(name))


def _drop_client(function: Any) -> Any:
    if inspect.iscoroutinefunction(function):

        async def handler(client: Client, name: str) -> Any:
            return await function(name)

        return handler
    return lambda client, name: function(name)
