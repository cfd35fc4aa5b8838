"""Tests of Karna WS, in the order of the code.

The rules:

- Real sockets on port 0, real clients, real programs. What is faked is a clock or a model server.
- A test waits for events, never for time. Where time is the subject, its limits are scaled down and
  a comment gives the timeline. "Nothing more arrives" is shown by something sent afterwards that
  arrives first.
- Every test has a deadline (`deadline` below): a hanging one fails, alone.
- A server that logged an error fails its test, unless the test said that it expects one (`served`).
- Names are subject, verb, condition. Codec cases are one table, used both ways.
- A test is trusted once it was seen to fail: break the code, run it, mend the code.
- `KARNA_TEST_WITHOUT_EPOLL=1` runs everything as on a system without epoll, where asyncio's own
  transports read; CI runs the tests both ways.
- What a machine may lack (Node, a browser, Redis, a library) is asked for with `needs`: such a test
  is skipped with the reason, but in CI, where everything is installed, it fails.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import contextvars
import functools
import hashlib
import importlib.util
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zlib
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional, Self
from urllib.request import Request, urlopen

import orjson
import pytest
import websockets.frames
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import serve as plain_serve
from websockets.exceptions import ConnectionClosed, InvalidStatus

import karna_ws
import services
from karna_ws import (
    BadPacket,
    Client,
    Config,
    Packet,
    PacketType,
    Server,
    StartError,
    WebSocketManager,
    decode_packet,
    encode_packet,
    insert_attachments,
    make_config,
    serving,
)
from services import (
    Command,
    CommandFailed,
    CommandProcessor,
    CommandTimeout,
    Context,
    LanguageService,
    Monitor,
    STREAM,
    Service,
    Unavailable,
    UnknownCommand,
    UsageError,
    VisionService,
)

if os.environ.get("KARNA_TEST_WITHOUT_EPOLL"):
    del select.epoll  # asyncio has taken its own already

try:
    import hypothesis.strategies as st
    from hypothesis import HealthCheck, example, given, settings
except ImportError:  # its tests are skipped then, the others run

    class _Absent:
        """Takes any use of hypothesis while this module is loaded; decorates nothing."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any, **options: Any) -> Any:
            is_test = args and getattr(args[0], "__name__", "").startswith(("test_", "skipped"))
            return args[0] if is_test else self

        def __or__(self, other: Any) -> Any:
            return self

    def given(*args: Any, **options: Any) -> Any:
        def replace(test: Any) -> Any:
            def skipped() -> None:
                needs("hypothesis")

            skipped.__name__ = test.__name__
            return skipped

        return replace

    st = HealthCheck = settings = example = _Absent()


DEADLINE_S = 30.0
SERVER_FILE = Path(karna_ws.__file__)
PROPERTY = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


# --- helpers -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    """Fail a test that takes too long; a busy loop too, which no timer of asyncio would end."""
    if not hasattr(signal, "setitimer"):  # Windows
        yield
        return

    def fail(number: int, frame: Any) -> None:
        pytest.fail(f"not done within {DEADLINE_S:g} s")

    before = signal.signal(signal.SIGALRM, fail)
    # Again each second: the first may meet code that swallows it.
    signal.setitimer(signal.ITIMER_REAL, DEADLINE_S, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


MODULES = {
    "aiohttp", "hypothesis", "jsonrpc_websocket", "jsonrpcclient", "prometheus_client",
    "redis", "socketio", "uvloop",
}  # fmt: skip


def needs(*tools: str) -> None:
    """Skip the test (in CI: fail it) unless all these programs or Python modules are there."""
    find = {True: importlib.util.find_spec, False: shutil.which}
    missing = [tool for tool in tools if find[tool in MODULES](tool) is None]
    if not missing:
        return
    reason = f"needs {', '.join(missing)}, which is not installed"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


class ErrorLog(logging.Handler):
    """Collects the lines that say a server met a bug."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else ""
        self.lines.append(f"{record.name}: {record.getMessage()}\n{trace}")


@contextlib.contextmanager
def error_log(*, expected: bool = False) -> Iterator[ErrorLog]:
    """While the block runs no error may be logged; or, if expected, at least one must be."""
    handler = ErrorLog()
    loggers = [logging.getLogger(name) for name in ("karna_ws", "karna.services", "asyncio")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield handler
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert bool(handler.lines) == expected, "\n".join(handler.lines) or "no error was logged"


@contextlib.asynccontextmanager
async def served(
    manager: WebSocketManager | None = None, *, logs_errors: bool = False, **options: Any
) -> AsyncIterator[Server]:
    """A server whose services have all started: no `status_update` of theirs is still to come."""
    manager = manager if manager is not None else WebSocketManager()
    with error_log(expected=logs_errors):
        async with serving(manager, port=0, **options) as server:
            await settled(manager)
            yield server


async def settled(manager: WebSocketManager) -> None:
    """Wait until no service is starting and all that was broadcast has been written."""
    await until(lambda: all(each.state != "starting" for each in manager.services.values()))
    await until(lambda: not manager._pending)


async def until(is_so: Callable[[], object]) -> None:
    """Wait for something that only the server's own state shows."""
    while not is_so():
        await asyncio.sleep(0.001)


class Raw:
    """A client of the raw door: messages are dicts.

    `next` gives what comes next, `next_where` skips to what is asked for, `ask` sends a request
    under a fresh id and gives its final answer; whatever was passed over is kept for later.
    """

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self.kept: list[dict[str, Any]] = []
        self._ids = 0

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, server: Server, path: str = "/ws", **options: Any) -> AsyncIterator[Raw]:
        options = {"compression": None, "max_size": None, "ping_interval": None, **options}
        async with connect(f"ws://127.0.0.1:{server.port}{path}", **options) as connection:
            yield cls(connection)

    async def send(self, *messages: Any) -> None:
        """Send messages: a dict or list as JSON text, str as text, bytes as a binary frame."""
        for message in messages:
            is_plain = isinstance(message, str | bytes)
            await self.connection.send(message if is_plain else json.dumps(message))

    async def next(self) -> Any:
        """The next message."""
        if self.kept:
            return self.kept.pop(0)
        return await self._receive()

    async def _receive(self) -> Any:
        text = await self.connection.recv()
        assert isinstance(text, str), "answers are text"
        return json.loads(text)

    async def next_where(self, is_wanted: Callable[[dict[str, Any]], bool]) -> Any:
        """The next message that is wanted; the others are kept."""
        for place, message in enumerate(self.kept):
            if is_wanted(message):
                return self.kept.pop(place)
        while not is_wanted(message := await self._receive()):
            self.kept.append(message)
        return message

    async def next_of(self, type: str) -> Any:
        """The next message of a type."""
        return await self.next_where(lambda message: message.get("type") == type)

    async def final(self, id: Any) -> Any:
        """The final answer to the request of this id."""
        return await self.next_where(
            lambda message: message.get("id") == id and message["type"] != "command_progress"
        )

    async def ask(self, method: str, **params: Any) -> Any:
        """Send a request; its final answer."""
        self._ids += 1
        id = f"ask-{self._ids}"
        await self.send({"method": method, "params": params, "id": id})
        return await self.final(id)

    async def run(self, line: str, **params: Any) -> Any:
        """Run a command; its result. An error answer fails the test."""
        answer = await self.ask("execute_command", command=line, **params)
        assert answer["type"] == "command_response", answer
        return answer["data"]["result"]

    async def error_of(self, message: Any) -> dict[str, Any]:
        """Send a message as it is; the data of the error that answers it."""
        await self.send(message)
        answer = await self.next_of("error")
        return answer["data"]

    async def received(self) -> list[dict[str, Any]]:
        """Everything that was sent to this client up to now, in order."""
        await self.send({"method": "get_status", "id": "received"})
        await self.next_where(lambda message: message.get("id") == "received")
        found, self.kept = self.kept, []
        return found

    async def closed(self) -> tuple[int | None, str]:
        """Wait for the server to close; its code and reason."""
        with contextlib.suppress(ConnectionClosed):
            while True:
                self.kept.append(await self._receive())
        return self.connection.close_code, self.connection.close_reason or ""


class Sio:
    """A client of the Socket.IO door that sends and receives packets by hand."""

    def __init__(self, connection: ClientConnection, handshake: dict[str, Any]) -> None:
        self.connection = connection
        self.handshake = handshake

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls, server: Server, *, join: str | None = None, auth: Any = None,
        path: str = "/socket.io/?EIO=4&transport=websocket",
    ) -> AsyncIterator[Sio]:  # fmt: skip
        """Open a session; `join` connects to a namespace too, with `auth`."""
        url = f"ws://127.0.0.1:{server.port}{path}"
        options = {"compression": None, "max_size": None, "ping_interval": None}
        async with connect(url, **options) as connection:
            first = await connection.recv()
            assert isinstance(first, str) and first[0] == "0"
            client = cls(connection, json.loads(first[1:]))
            if join is not None:
                await client.join(join, auth)
            yield client

    async def send(self, *frames: str | bytes) -> None:
        for frame in frames:
            await self.connection.send(frame)

    async def next(self) -> Any:
        """The next frame that is no heartbeat; heartbeats are answered."""
        while (frame := await self.connection.recv()) == "2":
            await self.connection.send("3")
        return frame

    async def packet(self, head: str) -> Any:
        """The JSON of the next frame, which must begin with `head`."""
        frame = await self.next()
        assert isinstance(frame, str) and frame.startswith(head), frame
        return json.loads(frame[len(head) :])

    async def join(self, namespace: str = "/", auth: Any = None) -> dict[str, Any]:
        """CONNECT to a namespace; the server's answer."""
        head = "40" + prefix_of(namespace)
        await self.send(head + ("" if auth is None else json.dumps(auth)))
        answer: dict[str, Any] = await self.packet(head)
        return answer

    async def rpc(self, request: Any, *, namespace: str = "/", ack: int = 0) -> Any:
        """Emit `rpc` with an ack; the envelope in the ack."""
        prefix = prefix_of(namespace)
        await self.send(f"42{prefix}{ack}" + json.dumps(["rpc", request]))
        (envelope,) = await self.packet(f"43{prefix}{ack}")
        return envelope

    async def closed(self) -> tuple[int | None, str]:
        """Wait for the server to close; its code and reason."""
        with contextlib.suppress(ConnectionClosed):
            while True:
                await self.connection.recv()
        return self.connection.close_code, self.connection.close_reason or ""


def prefix_of(namespace: str) -> str:
    """The namespace as packets show it."""
    return "" if namespace == "/" else namespace + ","


async def http(
    server: Server, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, Any]:
    """One HTTP request; status and body, decoded if it is JSON."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    content = body if isinstance(body, bytes) else b"" if body is None else orjson.dumps(body)
    fields = {"Host": "localhost", "Content-Type": "application/json", **headers}
    if method == "POST":
        fields["Content-Length"] = str(len(content))
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    try:
        writer.write("\r\n".join([*lines, "", ""]).encode() + content)
        answer = await reader.read()
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    head, _, rest = answer.partition(b"\r\n\r\n")
    is_json = b"application/json" in head and rest
    return int(head.split()[1]), orjson.loads(rest) if is_json else rest


class Gate:
    """Commands and methods that say when they have begun, and go on when they are let."""

    def __init__(self, manager: WebSocketManager) -> None:
        self.begun: list[str] = []
        self.cancelled: list[str] = []
        self.opened: dict[str, asyncio.Event] = {}
        self.running = self.most_running = 0

        @manager.commands.command
        async def gate(name: str) -> str:
            """Wait until the test lets this one go on."""
            self.begun.append(name)
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            try:
                await self.event(name).wait()
            except asyncio.CancelledError:
                self.cancelled.append(name)
                raise
            finally:
                self.running -= 1
            return name

    def event(self, name: str) -> asyncio.Event:
        return self.opened.setdefault(name, asyncio.Event())

    def let(self, *names: str) -> None:
        for name in names:
            self.event(name).set()


def execute(line: str, id: Any = None, **params: Any) -> dict[str, Any]:
    """An `execute_command` request."""
    request: dict[str, Any] = {"method": "execute_command", "params": {"command": line, **params}}
    return request if id is None else {**request, "id": id}


# --- 1 limits ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"port": "80"}, "port must be a whole number, not str"),
        ({"port": True}, "port must be a whole number, not bool"),
        ({"port": 80.5}, "port must be a whole number, not float"),
        ({"port": -1}, "port must be 0 or more, not -1"),
        ({"port": 65536}, "port must be 65535 at most, not 65536"),
        ({"host": None}, "host must be a text, not NoneType"),
        ({"max_clients": 0}, "max_clients must be 1 or more, not 0"),
        ({"max_clients": None}, "max_clients must be a whole number, not NoneType"),
        ({"max_message_bytes": 127}, "max_message_bytes must be 128 or more, not 127"),
        ({"max_unsent_bytes": 1023}, "max_unsent_bytes must be 1024 or more, not 1023"),
        ({"ping_timeout_s": math.nan}, "ping_timeout_s must be 0.01 or more, not nan"),
        ({"command_timeout_s": math.inf}, "command_timeout_s must be 0.001 or more, not inf"),
        ({"command_timeout_s": "60"}, "command_timeout_s must be a number, not str"),
        ({"ping_interval_s": 0}, "ping_interval_s must be 0.01 or more, not 0"),
        ({"reuse_port": 1}, "reuse_port must be True or False, not int"),
        ({"token": ""}, "token must be printable ASCII, without blanks around it"),
        ({"token": b"secret"}, "token must be a text, not bytes"),
        ({"keyfile": "key.pem"}, "keyfile needs certfile"),
        ({"loop": "trio"}, "loop must be auto, asyncio or uvloop, not 'trio'"),
        ({"allow_origin": 5}, "allow_origin must be a text or a list of texts, not int"),
        ({"allow_origin": [5]}, "allow_origin must be a text or a list of texts, not tuple"),
        (
            {"allow_origin": "https://a.example/"},
            "allow_origin must look like https://app.example, without a path: 'https://a.example/'",
        ),
        ({"namespaces": "chat"}, "namespaces must start with / and hold no comma: 'chat'"),
        ({"namespaces": ["/a,b"]}, "namespaces must start with / and hold no comma: '/a,b'"),
    ],
)
def test_config_refuses_wrong_value_in_one_line(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(complaint)}$"):
        make_config(options)


def test_config_refuses_unknown_option_by_name() -> None:
    with pytest.raises(TypeError, match="prot"):
        make_config({"prot": 1})


def test_config_takes_one_text_or_several_for_a_list() -> None:
    assert make_config({"allow_host": "a.example"}).allow_host == ("a.example",)
    assert make_config({"allow_host": ["a.example", "b"]}).allow_host == ("a.example", "b")
    assert make_config({"namespaces": {"/chat"}}).namespaces == ("/chat",)
    assert make_config({"allow_origin": None}).allow_origin == ()


def test_config_never_shows_secrets() -> None:
    shown = repr(Config(token="t0ps3cret", backplane="redis://:pa55w0rd@host"))
    assert "t0ps3cret" not in shown and "pa55w0rd" not in shown


def test_config_has_the_options_of_the_contract_with_their_defaults() -> None:
    promised = """host, port, unix, token, allow_origin, allow_host, namespaces, ping_interval_s,
    ping_timeout_s, connect_timeout_s, open_timeout_s, close_timeout_s, command_timeout_s, grace_s,
    max_message_bytes, max_body_bytes, max_clients, max_running_commands, max_unsent_bytes,
    history_messages, history_bytes, backplane, reuse_port, loop, certfile, keyfile"""
    config = Config()
    for name in promised.replace(",", " ").split():
        assert hasattr(config, name), name
    assert (config.host, config.port) == ("127.0.0.1", 8000)
    assert (config.history_messages, config.history_bytes) == (1000, 4 * 1024 * 1024)
    assert (config.max_message_bytes, config.max_body_bytes) == (1024 * 1024, 1024 * 1024)
    assert (config.max_running_commands, config.max_clients) == (32, 1000)
    assert (config.raw_ping_interval_s, config.engine_ping_interval_s) == (20, 25)
    assert (config.ping_timeout_s, config.connect_timeout_s) == (20, 45)
    assert (config.command_timeout_s, config.open_timeout_s, config.grace_s) == (60, 10, 5)


# --- 2 errors ----------------------------------------------------------------------------------


def test_every_error_code_has_an_http_status_and_a_json_rpc_code() -> None:
    codes = {
        "invalid_json", "invalid_request", "unknown_method", "invalid_params", "unknown_command",
        "usage", "command_failed", "timeout", "cancelled", "unavailable", "too_large",
        "unauthorized", "forbidden", "internal_error",
    }  # fmt: skip
    assert codes <= karna_ws.HTTP_STATUS.keys()
    assert {*codes, "history_gap"} == karna_ws.JSON_RPC_CODES.keys()
    assert len(set(karna_ws.JSON_RPC_CODES.values())) == len(codes) + 1


# --- 3 packets ---------------------------------------------------------------------------------

T = PacketType
PACKETS: list[tuple[bytes, list[bytes], Packet]] = [
    # text, attachments, packet
    (b"0", [], Packet(T.CONNECT)),
    (b"0/ws,", [], Packet(T.CONNECT, "/ws")),
    (b'0/ws,{"token":"abc"}', [], Packet(T.CONNECT, "/ws", {"token": "abc"})),
    (b'0{"sid":"x"}', [], Packet(T.CONNECT, "/", {"sid": "x"})),
    ("0/grüße,{}".encode(), [], Packet(T.CONNECT, "/grüße", {})),
    (b"1", [], Packet(T.DISCONNECT)),
    (b"1/ws,", [], Packet(T.DISCONNECT, "/ws")),
    (b'2["rpc"]', [], Packet(T.EVENT, "/", ["rpc"])),
    (b'2["a","b"]', [], Packet(T.EVENT, "/", ["a", "b"])),
    (b"2[1,null]", [], Packet(T.EVENT, "/", [1, None])),
    (b'2/ws,["rpc",{"method":"x"}]', [], Packet(T.EVENT, "/ws", ["rpc", {"method": "x"}])),
    (b'20["a"]', [], Packet(T.EVENT, "/", ["a"], 0)),
    (b'2/ws/,12["a"]', [], Packet(T.EVENT, "/ws/", ["a"], 12)),
    (b'2999999999999999["a"]', [], Packet(T.EVENT, "/", ["a"], 999999999999999)),
    (b"30[]", [], Packet(T.ACK, "/", [], 0)),
    (b'3/ws,7["ok",{"a":[1]}]', [], Packet(T.ACK, "/ws", ["ok", {"a": [1]}], 7)),
    (b'4{"message":"no"}', [], Packet(T.CONNECT_ERROR, "/", {"message": "no"})),
    (b'4/ws,{"message":"no"}', [], Packet(T.CONNECT_ERROR, "/ws", {"message": "no"})),
    (
        b'51-["a",{"_placeholder":true,"num":0}]', [b"\x00\xff"],
        Packet(T.BINARY_EVENT, "/", ["a", b"\x00\xff"], None, 1),
    ),
    (
        b'52-/ws,3["a",{"x":{"_placeholder":true,"num":0}},[{"_placeholder":true,"num":1}]]',
        [b"", b"two"],
        Packet(T.BINARY_EVENT, "/ws", ["a", {"x": b""}, [b"two"]], 3, 2),
    ),
    (
        b'61-/ws,4[{"_placeholder":true,"num":0}]', [b"x"],
        Packet(T.BINARY_ACK, "/ws", [b"x"], 4, 1),
    ),
]  # fmt: skip
PACKET_IDS = [text.decode() for text, _, _ in PACKETS]


def decode_whole(text: bytes, attachments: list[bytes]) -> Packet:
    packet = decode_packet(text)
    assert packet.attachments == len(attachments)
    if attachments:
        packet = packet._replace(data=insert_attachments(packet.data, attachments))
    return packet


@pytest.mark.parametrize(("text", "attachments", "packet"), PACKETS, ids=PACKET_IDS)
def test_packet_is_decoded_and_encoded(
    text: bytes, attachments: list[bytes], packet: Packet
) -> None:
    assert decode_whole(text, attachments) == packet
    assert encode_packet(packet) == [text, *attachments]


@pytest.mark.parametrize("text", [text for text, _, _ in PACKETS], ids=PACKET_IDS)
def test_packet_cut_anywhere_is_another_packet_or_bad(text: bytes) -> None:
    for stop in range(len(text)):
        for piece in (text[:stop], text[stop:]):
            with contextlib.suppress(BadPacket):
                assert isinstance(decode_packet(piece), Packet)
    if text.endswith((b"]", b"}")):  # a payload cut short is never taken for a whole one
        start = min(text.find(mark) for mark in (b"[", b"{") if mark in text)
        for stop in range(start + 1, len(text)):
            with pytest.raises(BadPacket):
                decode_packet(text[:stop])


@pytest.mark.parametrize(
    "text",
    [
        b"", b"7", b"9[]", b"x", b" 2", b"\xff", b"-1",
        b"0[]", b'0"x"', b"0{", b'0/ws,["a"]', b'0/ws{"a":1}' + b"/" * 300,
        b"0/\xff\xfe,", b"0/" + b"n" * 300 + b",", b"0/" + b"n" * 300,
        b"1{}", b'1["a"]', b"1/ws,[]",
        b"2", b"2{}", b'2"a"', b"2[]", b"2[null]", b"2[1.5]", b"2[true]", b"2[{}]", b"2[[]]",
        b'2["a"', b'2["a"]x', b'2["\xff"]', b'2["\\ud800"]', b"2[1e999]", b"2" + b"[" * 5000,
        b'2["connect"]', b'2["connect_error"]', b'2["disconnect"]', b'2["disconnecting"]',
        b'2["newListener"]', b'2["removeListener"]',
        b'2-1["a"]', b'2+1["a"]', b'21.5["a"]', b'2x["a"]', b'2 1["a"]',
        b'2' + b"1" * 16 + b'["a"]', b"2" + b"9" * 100_000 + b'["a"]',
        b"3[]", b"3", b"30", b"30{}", b"3/ws,[]",
        b"4", b"4[]", b'4"no"',
        b'5["a"]', b'5-["a"]', b'511-["a"]', b"5" + b"9" * 100_000 + b'-["a"]', b'51-["connect"]',
        b"61-[]", b"6[]", b'5-1["a"]', b'51-{"_placeholder":true,"num":0}',
        b'21-["a"]', b'31-0["a"]', b"01-", b"11-",
    ],
    ids=lambda text: repr(text[:24]),
)  # fmt: skip
def test_packet_that_breaks_the_protocol_is_bad(text: bytes) -> None:
    with pytest.raises(BadPacket):
        decode_packet(text)


def test_packet_bounds_are_exact() -> None:
    assert decode_packet(b'510-["a"]').attachments == 10
    assert decode_packet(b'50-["a"]').attachments == 0
    assert decode_packet(b"2" + b"1" * 15 + b'["a"]').ack == 111111111111111
    longest = b"/" + b"n" * (karna_ws.MAX_NAMESPACE_BYTES - 2)
    assert decode_packet(b"0" + longest + b",").namespace == longest.decode()
    deep = b'2["a",' + b"[" * 1000 + b"]" * 1000 + b"]"
    assert decode_packet(deep).type is T.EVENT


@pytest.mark.parametrize(
    "value",
    [
        [{"_placeholder": True, "num": 1}], [{"_placeholder": True, "num": -1}],
        [{"_placeholder": True, "num": True}], [{"_placeholder": True, "num": 0.0}],
        [{"_placeholder": True, "num": "0"}], [{"_placeholder": True}],
        {"a": [{"_placeholder": True, "num": 2**63}]},
    ],
    ids=str,
)  # fmt: skip
def test_placeholder_without_its_attachment_is_bad(value: Any) -> None:
    with pytest.raises(BadPacket):
        insert_attachments(value, [b"one"])


def test_attachments_in_deep_values_are_bounded() -> None:
    deep: Any = b"x"
    for _ in range(karna_ws.MAX_JSON_DEPTH + 1):
        deep = [deep]
    with pytest.raises(ValueError, match="deep"):
        encode_packet(Packet(T.EVENT, "/", ["a", deep]))
    with pytest.raises(BadPacket):
        insert_attachments([orjson.loads(b"[" * 500 + b"]" * 500)], [b"x"])


def test_only_true_makes_a_placeholder() -> None:
    value = [{"_placeholder": 1, "num": 0}, {"_placeholder": False}, {"num": 0}]
    assert insert_attachments(value, [b"x"]) == value


@pytest.mark.parametrize("data", [["a", {1, 2}], ["a", object()], ["a", "\ud800"], ["a", 2**64]])
def test_packet_that_json_cannot_hold_is_refused(data: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        encode_packet(Packet(T.EVENT, "/", data))


def test_packet_takes_any_kind_of_bytes_and_odd_keys() -> None:
    packet = Packet(T.EVENT, "/", ["a", bytearray(b"1"), memoryview(b"2"), {5: (1,)}])
    text, *attachments = encode_packet(packet)
    assert text.endswith(b',{"5":[1]}]')
    assert attachments == [b"1", b"2"]


def test_binary_packet_without_bytes_is_encoded_as_a_plain_one() -> None:
    assert encode_packet(decode_packet(b'50-["a"]')) == [b'2["a"]']
    assert encode_packet(decode_packet(b"60-3[]")) == [b"33[]"]


def assert_stable(text: bytes) -> None:
    """Whatever can be decoded can be encoded, and means the same once more decoded."""
    try:
        packet = decode_packet(text)
    except BadPacket:
        return
    try:
        again, *attachments = encode_packet(packet)
    except (TypeError, ValueError):  # too deep for orjson to write
        assert text.count(b"[") + text.count(b"{") > 90
        return
    assert not attachments
    plain = {T.BINARY_EVENT: T.EVENT, T.BINARY_ACK: T.ACK}.get(packet.type, packet.type)
    assert decode_packet(again) == packet._replace(type=plain, attachments=0)
    assert encode_packet(decode_packet(again)) == [again]


@PROPERTY
@given(st.one_of(st.binary(max_size=64), st.text('0123456789-/,[]{}"a:trueonl ').map(str.encode)))
def test_decoder_never_raises_anything_but_bad_packet_for_random_bytes(text: bytes) -> None:
    assert_stable(text)


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    """A valid packet with a few bytes changed, put in, taken out or said twice."""
    text = bytearray(draw(st.sampled_from(PACKETS))[0])
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        piece = draw(st.one_of(st.binary(max_size=3), st.sampled_from([b"[", b'"', b",", b"/"])))
        end = min(len(text), at + draw(st.integers(0, 4)))
        text[at:end] = piece * draw(st.sampled_from([1, 1, 1, 2, 50]))
    return bytes(text)


@settings(PROPERTY, max_examples=300)
@given(mutations())
def test_decoder_never_raises_anything_but_bad_packet_for_mutations(text: bytes) -> None:
    assert_stable(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=8)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner,
                                                                max_size=4),
    max_leaves=12,
)  # fmt: skip


@PROPERTY
@given(
    st.sampled_from([T.EVENT, T.ACK]),
    st.sampled_from(["/", "/ws", "/a/b?c"]),
    st.integers(0, 10**15 - 1),
    st.lists(st.recursive(JSON | st.binary(max_size=8), lambda inner: st.lists(inner, max_size=3)),
             max_size=4),
)  # fmt: skip
def test_packet_survives_encoding_and_decoding(
    kind: PacketType, namespace: str, ack: int, values: list[Any]
) -> None:
    packet = Packet(kind, namespace, ["event", *values], ack)
    text, *attachments = encode_packet(packet)
    if len(attachments) > karna_ws.MAX_ATTACHMENTS or b"_placeholder" in text.replace(
        b'{"_placeholder":true', b""
    ):
        return
    assert decode_whole(text, attachments)[1:4] == packet[1:4]


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 200_000])
def test_frame_header_is_the_shortest_that_holds_the_length(size: int) -> None:
    payload = b"x" * size
    for frame, first in (
        (karna_ws.frame_text(payload), 0x81),
        (karna_ws.frame_binary(payload), 0x82),
    ):
        head = frame[: len(frame) - size]
        assert frame[len(head) :] == payload
        assert head[0] == first
        assert not head[1] & 0x80, "a server's frame is not masked"
        if size < 126:
            assert (len(head), head[1]) == (2, size)
        elif size < 65536:
            assert (len(head), head[1]) == (4, 126)
            assert int.from_bytes(head[2:], "big") == size
        else:
            assert (len(head), head[1]) == (10, 127)
            assert int.from_bytes(head[2:], "big") == size


@pytest.mark.parametrize("value", [b"bytes", "\ud800", 2**64, {1, 2}, object()])
def test_encode_json_raises_type_error_for_what_json_has_no_form_for(value: Any) -> None:
    with pytest.raises(TypeError):
        karna_ws.encode_json({"value": value})


def test_encode_json_makes_strings_of_odd_keys() -> None:
    assert karna_ws.encode_json({1: 2, None: 3}) == b'{"1":2,"null":3}'


# --- 5 clients: the raw door ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "id", ["x", "", "0", "\x00", "ключ 🗝", "a" * 1000, 0, 1, -1, 2**53 + 1, 2**63 - 1, -(2**63),
           2**64 - 1],
    ids=lambda id: repr(id)[:24],
)  # fmt: skip
async def test_raw_answer_repeats_the_id_as_it_was(id: str | int) -> None:
    async with served() as server, Raw.open(server) as client:
        for request, kind in (
            ({"method": "get_status", "id": id}, "status_update"),
            (execute("echo hi") | {"id": id}, "command_response"),
            (execute("countdown 0") | {"id": id}, "command_response"),
            (execute("nope") | {"id": id}, "error"),
            ({"method": "nope", "id": id}, "error"),
            ({"method": 5, "id": id}, "error"),
        ):
            await client.send(request)
            answer = await client.next_where(lambda each: each["type"] != "command_progress")
            assert answer["type"] == kind
            assert answer["id"] == id and isinstance(answer["id"], type(id))
            client.kept.clear()


async def test_raw_answer_has_no_id_when_the_request_had_none_or_null() -> None:
    async with served() as server, Raw.open(server) as client:
        for id in ({}, {"id": None}):
            for request in ({"method": "get_status"}, execute("echo hi"), {"method": "nope"}):
                await client.send(request | id)
                assert "id" not in await client.next()


async def test_raw_door_takes_text_and_binary_frames_and_answers_text() -> None:
    async with served() as server, Raw.open(server, "/ws/") as client:
        request = execute("echo grüße 🗝", id=1)
        await client.send(orjson.dumps(request), orjson.dumps(request).decode(), b" \n" + b"{}")
        one, two, three = [await client.next() for _ in range(3)]
        assert (
            one
            == two
            == {
                "type": "command_response",
                "data": {"command": "echo grüße 🗝", "result": "grüße 🗝"},
                "id": 1,
            }
        )
        assert three["data"]["code"] == "invalid_request"


async def test_raw_door_takes_fragments_with_a_ping_in_between() -> None:
    async with served() as server, Raw.open(server) as client:
        text = json.dumps(execute("echo fragments", id=1))

        async def pieces() -> AsyncIterator[str]:
            for start in range(0, len(text), 7):
                yield text[start : start + 7]
                await (await client.connection.ping())

        await client.connection.send(pieces())
        assert (await client.final(1))["data"]["result"] == "fragments"


# --- 5 clients: the Socket.IO door ---------------------------------------------------------------


async def test_engine_session_opens_with_the_fields_of_the_protocol() -> None:
    async with (
        served(max_message_bytes=5000, ping_timeout_s=7.5) as server,
        Sio.open(server) as client,
        Sio.open(server) as other,
    ):
        sid = client.handshake.pop("sid")
        assert client.handshake == {
            "upgrades": [], "pingInterval": 25000, "pingTimeout": 7500, "maxPayload": 5000,
        }  # fmt: skip
        answer = await client.join()
        second = await client.join("/ws")
        third = await other.join()
        sids = [sid, answer["sid"], second["sid"], other.handshake["sid"], third["sid"]]
        assert all(isinstance(each, str) and len(each) >= 20 for each in sids)
        assert len(set(sids)) == 5
        assert answer["pid"] not in sids


@pytest.mark.parametrize("path", ["/socket.io/", "/socket.io", "/ws", "/ws/", "/anything/else"])
async def test_engine_session_opens_on_any_path(path: str) -> None:
    async with (
        served() as server,
        Sio.open(server, path=f"{path}?transport=websocket&EIO=4", join="/ws") as client,
    ):
        assert (await client.rpc(execute("echo hi"), namespace="/ws"))["data"]["result"] == "hi"


@pytest.mark.parametrize("namespace", ["/", "/ws", "/ws/", "/extra"])
@pytest.mark.parametrize("auth", [None, {}, {"token": "whatever", "name": "Ada"}])
async def test_socket_connects_to_served_namespace(namespace: str, auth: Any) -> None:
    async with (
        served(namespaces="/extra") as server,
        Sio.open(server, join=namespace, auth=auth) as client,
    ):
        answer = await client.rpc({"method": "get_status", "id": 5}, namespace=namespace, ack=3)
        assert answer["type"] == "status_update" and answer["id"] == 5


@pytest.mark.parametrize("namespace", ["/nope", "/wsx", "/ws//", "/WS", "/extra"])
async def test_socket_is_refused_other_namespaces_and_may_try_again(namespace: str) -> None:
    async with served() as server, Sio.open(server) as client:
        await client.send(f"40{namespace},")
        assert await client.packet(f"44{namespace},") == {"message": "Invalid namespace"}
        assert "sid" in await client.join("/ws")


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


async def test_session_closes_with_1009_when_its_attachments_are_too_large() -> None:
    async with served(max_message_bytes=1000) as server, Sio.open(server, join="/") as client:
        await client.send('452-["a",{"_placeholder":true,"num":0}]', b"x" * 600, b"x" * 401)
        assert (await client.closed())[0] == 1009


async def test_packet_1_ends_the_session() -> None:
    manager = WebSocketManager()
    async with served(manager) as server, Sio.open(server, join="/ws") as client:
        await client.send("1")
        assert (await client.closed())[0] == 1000
        await until(lambda: not manager.sessions and not manager.connections)
        assert manager.count_clients() == 0


async def test_sessions_that_ended_make_room_for_others() -> None:
    manager = WebSocketManager()
    async with served(manager, max_clients=1) as server:
        for _ in range(3):
            async with Sio.open(server, join="/ws"):
                assert manager.is_full
            await until(lambda: not manager.is_full)
        async with Raw.open(server):
            assert manager.is_full


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


async def test_rpc_is_answered_by_event_or_by_ack_alone() -> None:
    async with served() as server, Sio.open(server, join="/ws") as client:
        request = json.dumps(execute("echo hi", id="r"))
        envelope = {
            "type": "command_response", "data": {"command": "echo hi", "result": "hi"}, "id": "r"
        }  # fmt: skip
        await client.send(f'42/ws,["rpc",{request}]')
        assert await client.packet("42/ws,") == ["rpc_response", envelope]
        await client.send(f'42/ws,0["rpc",{request}]')
        assert await client.packet("43/ws,0") == [envelope]
        await client.send(f'42/ws,999999999999999["rpc",{request}]')
        assert await client.packet("43/ws,999999999999999") == [envelope]
        await client.send('42/ws,["rpc",{"method":"get_status"}]')
        assert (await client.packet("42/ws,"))[1]["type"] == "status_update"


@pytest.mark.parametrize("argument", ["", ",5", ",null", ',"x"', ",[]", ",{}", ',{"method":5}'])
async def test_rpc_that_is_no_request_is_answered_with_an_error(argument: str) -> None:
    async with served() as server, Sio.open(server, join="/") as client:
        await client.send(f'42["rpc"{argument}]', f'421["rpc"{argument}]')
        event, envelope = await client.packet("42")
        assert event == "rpc_response" and envelope["data"]["code"] == "invalid_request"
        assert await client.packet("431") == [envelope]


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


async def test_unknown_event_is_acked_with_an_error_or_else_ignored() -> None:
    async with served() as server, Sio.open(server, join="/") as client:
        await client.send('42["nobody",1]', "42[7]", '425["nobody",1]', '426["nobody"]', "427[9]")
        for ack, name in ((5, "nobody"), (6, "nobody"), (7, "9")):
            (envelope,) = await client.packet(f"43{ack}")
            assert envelope["type"] == "error"
            assert envelope["data"]["code"] == "unknown_method"
            assert envelope["data"]["method"] == name


async def test_acks_of_the_client_are_ignored() -> None:
    async with served() as server, Sio.open(server, join="/") as client:
        await client.send("431[]", '4361["x"]'[:2] + '1["x"]')
        await client.send('461-2[{"_placeholder":true,"num":0}]', b"x")
        assert (await client.rpc(execute("echo on")))["data"]["result"] == "on"


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


async def test_handlers_of_the_program_get_events_and_answer_acks() -> None:
    manager = WebSocketManager()
    got: list[Any] = []

    @manager.on("echo")
    async def echo(client: Client, *args: Any) -> Any:
        got.append((client.door, args))
        return args  # a tuple: several values

    @manager.on("sync")
    def sync(client: Client, value: Any) -> Any:
        return [threading.current_thread() is threading.main_thread(), value]

    @manager.on("inline", inline=True)
    def inline(client: Client) -> Any:
        return threading.current_thread() is threading.main_thread()

    @manager.on("nothing")
    async def nothing(client: Client) -> None:
        return None

    @manager.on("5")
    async def five(client: Client) -> str:
        return "by number"

    async with served(manager) as server, Sio.open(server, join="/") as client:
        for event, ack in (
            ('["echo",1,"two",{"3":[4]}]', '[1,"two",{"3":[4]}]'),
            ('["echo"]', "[]"),
            ('["sync",{"a":1}]', '[[false,{"a":1}]]'),
            ('["inline"]', "[true]"),
            ('["nothing"]', "[null]"),
            ("[5]", '["by number"]'),
        ):
            await client.send(f"421{event}")
            assert await client.next() == f"431{ack}"
        await client.send('42["echo","no ack"]')
        await client.send('451-2["echo",{"_placeholder":true,"num":0}]', b"bytes")
        assert await client.next() == '461-2[{"_placeholder":true,"num":0}]'
        assert await client.next() == b"bytes"
        assert got[-2:] == [("socket.io", ("no ack",)), ("socket.io", (b"bytes",))]


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


async def test_connect_handler_sees_auth_and_may_refuse() -> None:
    manager = WebSocketManager()
    seen: list[Any] = []

    @manager.on("connect")
    async def welcome(client: Client, auth: dict[str, Any]) -> None:
        seen.append((client.door, client.namespace, auth))
        if auth.get("name") == "Mallory":
            raise PermissionError("not you")
        await client.emit("welcome", {"name": auth.get("name")})

    async with served(manager) as server:
        async with Sio.open(server) as client:
            await client.send('40/ws,{"name":"Mallory"}')
            assert await client.packet("44/ws,") == {"message": "not you"}
            assert manager.count_clients() == 0
            answer = await client.join("/ws", {"name": "Ada", "pid": "x", "offset": "y"})
            assert "sid" in answer  # what the handler emitted follows the CONNECT answer
            assert await client.packet("42/ws,") == ["welcome", {"name": "Ada"}]
        async with Raw.open(server) as raw:
            assert await raw.next() == {"type": "welcome", "data": {"name": None}}
        assert seen[1:] == [("socket.io", "/ws", {"name": "Ada"}), ("raw", "/", {})]


async def test_connect_handler_that_refuses_closes_a_raw_client_with_its_reason() -> None:
    manager = WebSocketManager()

    @manager.on("connect")
    async def refuse(client: Client, auth: Any) -> None:
        raise PermissionError("members only")

    async with served(manager) as server, Raw.open(server) as raw:
        assert await raw.closed() == (1008, "members only")


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
            await until(lambda: len(manager.tasks) == 2)
            deciding.set()
            assert (await raw.final(1))["data"]["result"] == "held"
            assert "sid" in await client.packet("40/ws,")
        deciding.clear()
        async with Sio.open(server) as client:
            await client.send("40", '42["rpc",{}]')
            assert await client.closed() == (1002, "event before connect")
        await until(lambda: not manager.sessions)
        deciding.set()
        await until(lambda: not manager.tasks)
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
        await until(lambda: connection._holds & karna_ws.HOLD_CONNECT)
        assert len(manager.tasks) == 1, "it is not read until the first handler has decided"
        deciding.set()
        assert "sid" in await client.packet("40/ws,")
        assert (started, connection._holds) == (2, 0)


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


async def test_old_socket_io_client_is_told_in_its_own_protocol() -> None:
    manager = WebSocketManager()
    path = "/socket.io/?EIO=3&transport=websocket"
    async with served(manager) as server, Sio.open(server, path=path) as client:
        assert await client.connection.recv() == "40"
        assert "socket.io-client 3 or later" in await client.packet("44/ws,")
        assert "socket.io-client 3 or later" in await client.packet("44")
        assert (await client.closed())[0] == 1008
        assert not manager.sessions


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


# --- 6 manager: broadcast ------------------------------------------------------------------------


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


def offsets(manager: WebSocketManager, count: int) -> list[str]:
    """The offsets of the latest broadcasts, oldest first."""
    return [offset for offset, _ in manager.history.entries][-count:]


async def test_broadcast_from_a_thread_is_handed_to_the_loop() -> None:
    manager = WebSocketManager()

    @manager.commands.command
    def shout() -> int:
        return manager.notify("from a thread")

    async with served(manager) as server, Raw.open(server) as client:
        asyncio.get_running_loop().set_debug(True)  # call_soon() from a thread raises then
        assert await client.run("shout") == 1
        assert (await client.next_of("notification"))["data"]["message"] == "from a thread"


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
        padding = "x" * (karna_ws.FLUSH_BROADCAST_BYTES // 3)
        for number in range(20):
            manager.broadcast("number", [number, padding])
        manager.broadcast("number", [20, ""])
        numbers = [(await client.next_of("number"))["data"][0] for _ in range(21)]
        assert numbers == list(range(21))


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


@pytest.mark.parametrize("level", ["info", "warning", "error"])
async def test_notification_has_message_level_and_time(level: str) -> None:
    manager = WebSocketManager()
    async with served(manager) as server, Raw.open(server) as client:
        manager.notify("build done", level)
        found = await client.next_of("notification")
        assert found["offset"] == manager.history.last
        assert found["data"].pop("time").endswith("Z")
        assert found["data"] == {"message": "build done", "level": level}


@pytest.mark.parametrize(
    ("message", "level"), [("", "info"), ("x", "loud"), ("x", ""), (5, "info"), ("x", None)]
)
async def test_notification_of_wrong_message_or_level_is_refused(message: Any, level: Any) -> None:
    manager = WebSocketManager()
    async with served(manager) as server, Raw.open(server) as client:
        with pytest.raises(ValueError, match="must be"):
            manager.notify(message, level)
        assert await client.received() == []


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


# --- 6 manager: status ---------------------------------------------------------------------------

SINCE = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


class Lamp(Service):
    """A program's own service."""

    def __init__(self, name: str = "lamp") -> None:
        super().__init__(name)


class Meter(Lamp):
    """A service whose status differs each time it is asked, without saying so."""

    asked = 0

    def get_status(self) -> dict[str, Any]:
        self.asked += 1
        return {**super().get_status(), "asked": self.asked}


async def test_status_has_one_shape_everywhere() -> None:
    manager = WebSocketManager(services=[Lamp()])
    async with (
        served(manager) as server, Raw.open(server) as raw, Sio.open(server, join="/ws") as client
    ):  # fmt: skip
        status = (await raw.ask("get_status"))["data"]
        assert list(status) == ["vision", "language", "command", "lamp"]
        for entry in status.values():
            assert entry["state"] == "running"
            assert isinstance(entry["detail"], str) and "\n" not in entry["detail"]
            assert re.fullmatch(SINCE, entry["since"])
        assert status["command"].items() >= {"running": 0, "done": 0, "failed": 0}.items()
        assert (await http(server, "GET", "/api/status")) == (200, status)
        answer = await client.rpc({"method": "get_status"}, namespace="/ws")
        assert answer["data"] == status
        assert manager.status() == status


async def test_status_update_is_broadcast_on_each_change_of_a_service() -> None:
    lamp = Lamp()
    manager = WebSocketManager(services=[lamp])
    async with (
        served(manager) as server, Raw.open(server) as raw, Sio.open(server, join="/ws") as client
    ):  # fmt: skip
        changes = [("degraded", "one bulb is out"), ("degraded", "two\nbulbs"), ("failed", ""),
                   ("running", "")]  # fmt: skip
        since = []
        for state, detail in changes:
            lamp.set_state(state, detail)  # type: ignore[arg-type]
            lamp.set_state(state, detail)  # type: ignore[arg-type]  # no change, no broadcast
            update = await raw.next()
            assert update["type"] == "status_update"
            assert update["offset"] == manager.history.last
            assert list(update["data"]) == ["vision", "language", "command", "lamp"]
            entry = update["data"]["lamp"]
            assert (entry["state"], entry["detail"]) == (state, detail.replace("\n", " "))
            since.append(entry["since"])
            event = await client.packet("42/ws,")
            assert event == ["rpc_response", update, update["offset"]]
        assert since[0] == since[1], "the detail changed, the state did not"
        assert await raw.received() == []


async def test_status_is_never_stale() -> None:
    lamp = Lamp()
    manager = WebSocketManager(services=[lamp])
    gate = Gate(manager)

    async def counts(client: Raw) -> tuple[int, int, int]:
        before = (await http(server, "GET", "/api/status"))[1]["command"]
        status = (await client.ask("get_status"))["data"]["command"]
        after = (await http(server, "GET", "/api/status"))[1]["command"]
        assert before == status == after
        return status["running"], status["done"], status["failed"]

    async with served(manager) as server, Raw.open(server) as client:
        assert await counts(client) == (0, 0, 0)
        await client.run("echo hi")
        assert await counts(client) == (0, 1, 0)
        await client.send(execute("gate a", id=1))
        await until(lambda: gate.begun)
        assert await counts(client) == (1, 1, 0)
        gate.let("a")
        await client.final(1)
        assert await counts(client) == (0, 2, 0)
        await client.ask("execute_command", command="gate")  # a usage error is no call
        assert await counts(client) == (0, 2, 0)
        await client.ask("execute_command", command="describe not-an-image")
        assert await counts(client) == (0, 2, 1)
        lamp.set_state("failed", "dark")
        assert (await client.ask("get_status"))["data"]["lamp"]["detail"] == "dark"
        commands = (await client.ask("get_status"))["data"]["command"]["commands"]

        @manager.commands.command
        def another() -> None: ...

        status = await client.ask("get_status")
        assert status["data"]["command"]["commands"] == commands + 1


async def test_status_of_a_service_with_its_own_is_asked_each_time() -> None:
    manager = WebSocketManager(services=[Meter()])
    async with served(manager) as server, Raw.open(server) as client:
        asked = [(await client.ask("get_status"))["data"]["lamp"]["asked"] for _ in range(3)]
        assert asked[0] < asked[1] < asked[2]


async def test_status_of_a_service_that_raises_is_an_internal_error() -> None:
    class Broken(Lamp):
        def get_status(self) -> dict[str, Any]:
            raise RuntimeError("no status today")

    manager = WebSocketManager(services=[Broken()])
    async with served(manager, logs_errors=True) as server, Raw.open(server) as client:
        error = await client.ask("get_status")
        assert error["data"]["code"] == "internal_error"
        assert "today" not in json.dumps(error), "the text of a bug is for the log"
        assert await client.run("echo still here") == "still here"
        assert (await http(server, "GET", "/api/status"))[0] == 500


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


# --- 6 manager: recovery -------------------------------------------------------------------------


async def notifications(client: Raw, count: int) -> list[dict[str, Any]]:
    return [await client.next_of("number") for _ in range(count)]


async def test_raw_client_gets_what_it_missed_in_order_then_goes_on_live() -> None:
    manager = WebSocketManager()
    async with served(manager) as server:
        async with Raw.open(server) as client:
            manager.broadcast("number", 0)
            last = (await client.next_of("number"))["offset"]
        await until(lambda: manager.count_clients() == 0)
        for number in range(1, 6):
            manager.broadcast("number", number)
        async with Raw.open(server, f"/ws?since={last}") as client:
            manager.broadcast("number", 6)
            numbers = await notifications(client, 6)
            assert [each["data"] for each in numbers] == [1, 2, 3, 4, 5, 6]
            assert [each["offset"] for each in numbers] == offsets(manager, 6)
            assert await client.received() == []
        async with Raw.open(server, f"/ws?since={manager.history.last}") as client:
            assert await client.received() == [], "nothing was missed"


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


@pytest.mark.parametrize(
    "since", ["", "nonsense", "-1", "0", "00000000-1", "x" * 5000, "%00", "%ff", "%F0%9F%97%9D",
              "EPOCH", "EPOCH-", "EPOCH--1", "EPOCH-01", "EPOCH-1e1", "EPOCH-999", "EPOCH-1%20"],
)  # fmt: skip
async def test_raw_client_with_unknown_offset_is_told_of_a_gap_once_then_is_live(
    since: str,
) -> None:
    manager = WebSocketManager()
    async with served(manager) as server:
        manager.broadcast("number", 1)
        since = since.replace("EPOCH", manager.epoch)
        async with Raw.open(server, f"/ws?since={since}") as client:
            first = await client.next()
            assert (first["type"], first["data"]["code"]) == ("error", "history_gap")
            manager.broadcast("number", 2)
            assert [each["data"] for each in await client.received()] == [2]


async def test_raw_client_of_an_earlier_process_is_told_of_a_gap() -> None:
    manager = WebSocketManager()
    async with served(manager) as server:
        manager.broadcast("number", 1)
        first = manager.history.last
    async with served(manager) as server:  # the offset's number exists here too
        manager.broadcast("number", 1)
        assert first != manager.history.last
        async with Raw.open(server, f"/ws?since={first}") as client:
            assert (await client.next())["data"]["code"] == "history_gap"


async def test_history_is_trimmed_by_count() -> None:
    manager = WebSocketManager()
    async with served(manager, history_messages=3) as server:
        known = [manager.history.last]
        for number in range(5):
            manager.broadcast("number", number)
            known.append(manager.history.last)
        for place, offset in enumerate(known):
            async with Raw.open(server, f"/ws?since={offset}") as client:
                found = await client.received()
                if place < 2:
                    assert [each["data"]["code"] for each in found] == ["history_gap"]
                else:
                    assert [each["data"] for each in found] == list(range(place, 5))


async def test_history_is_trimmed_by_bytes() -> None:
    manager = WebSocketManager()
    async with served(manager, history_bytes=1000) as server:
        known = [manager.history.last]
        for number in range(5):
            manager.broadcast("number", [number, "x" * 270])  # three fit, four do not
            known.append(manager.history.last)
        assert manager.history.bytes <= 1000
        for place, offset in enumerate(known):
            async with Raw.open(server, f"/ws?since={offset}") as client:
                found = await client.received()
                if place < 2:
                    assert [each["data"]["code"] for each in found] == ["history_gap"]
                else:
                    assert [each["data"][0] for each in found] == list(range(place, 5))
        manager.broadcast("number", "x" * 2000)  # alone larger than all that is kept
        assert (manager.history.bytes, len(manager.history.entries)) == (0, 0)
        async with Raw.open(server, f"/ws?since={known[-1]}") as client:
            assert (await client.next())["data"]["code"] == "history_gap"


async def test_history_of_zero_keeps_nothing() -> None:
    manager = WebSocketManager()
    async with served(manager, history_messages=0) as server:
        before = manager.history.last
        manager.broadcast("number", 1)
        assert not manager.history.entries and len(manager.history._numbers) == 1
        async with Raw.open(server, f"/ws?since={before}") as client:
            assert (await client.next())["data"]["code"] == "history_gap"
        async with Sio.open(server) as client2:
            assert list(await client2.join("/ws")) == ["sid"]


async def test_history_forgets_as_it_goes() -> None:
    history = karna_ws.History(10, 10**6, "e-0")
    for number in range(1, 1001):
        history.append(f"e-{number}", b"x" * 10)
    assert (len(history.entries), len(history._numbers), history.bytes) == (10, 11, 100)
    assert [offset for offset, _ in history.since("e-997") or ()] == ["e-998", "e-999", "e-1000"]
    assert history.since("e-990") is not None and history.since("e-989") is None


async def test_broadcast_that_waits_for_its_flush_reaches_a_client_that_joins_once() -> None:
    manager = WebSocketManager()
    join = manager.join_raw

    def join_after_a_broadcast(client: Any, since: str | None) -> None:
        manager.broadcast("number", 2)
        join(client, since)
        manager.broadcast("number", 3)

    async with served(manager) as server:
        start = manager.history.last
        manager.broadcast("number", 1)
        manager.join_raw = join_after_a_broadcast  # type: ignore[method-assign]
        async with Raw.open(server, f"/ws?since={start}") as client:
            assert [each["data"] for each in await client.received()] == [1, 2, 3]
        async with Raw.open(server) as client:
            found = [each["data"] for each in await client.received()]
            assert found in ([2, 3], [3])  # 2 came before it was in, 3 after


async def test_socket_recovers_with_pid_and_offset() -> None:
    manager = WebSocketManager()
    async with served(manager) as server:
        async with Sio.open(server) as client:
            first = await client.join("/ws")
            manager.broadcast("number", 0)
            _, _, offset = await client.packet("42/ws,")
        await until(lambda: manager.count_clients() == 0)
        for number in range(1, 4):
            manager.broadcast("number", number)
        async with Sio.open(server) as client:
            await client.send("40/ws," + json.dumps({"pid": first["pid"], "offset": offset}))
            for number in range(1, 4):  # before the CONNECT answer, as socket.io sends them
                event, envelope, trailing = await client.packet("42/ws,")
                assert (event, envelope["data"]) == ("rpc_response", number)
                assert trailing == envelope["offset"]
            assert await client.packet("40/ws,") == first, "sid and pid are kept"
            manager.broadcast("number", 4)
            assert (await client.packet("42/ws,"))[1]["data"] == 4


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
        last = manager.history.last
        assert await client.packet("42") == ["welcome", "Ada", last]
        await client.send('42["greet"]')
        assert await client.packet("42") == ["greeting", "Hello", last]
        assert (await client.packet("42"))[0] == "bare"
        assert await client.packet("42") == ["number", 5]


@pytest.mark.parametrize("door", ["raw", "socket.io"])
async def test_slow_client_is_dropped_and_recovers_everything(door: str) -> None:
    manager = WebSocketManager()
    options = {"max_unsent_bytes": 64 * 1024, "history_messages": 5000, "history_bytes": 2**28}
    async with served(manager, **options) as server:
        url = f"ws://127.0.0.1:{server.port}"
        url += "/ws" if door == "raw" else "/socket.io/?EIO=4&transport=websocket"
        seen: list[int] = []
        offset = pid = ""

        def take(frame: Any) -> bool:
            """Note a broadcast; is this frame one?"""
            nonlocal offset
            is_broadcast = '"number"' in frame[:40]
            if is_broadcast:
                found = json.loads(frame[2:])[1] if door == "socket.io" else json.loads(frame)
                seen.append(found["data"][0])
                offset = found["offset"]
            return is_broadcast

        async with connect(url, compression=None, max_size=None, max_queue=(1, 0)) as client:
            if door == "socket.io":
                await client.recv()
                await client.send("40")
                pid = json.loads(str(await client.recv())[2:])["pid"]
            await until(lambda: manager.count_clients() == 1)
            number = 0
            while "slow" not in manager.metrics.drops:  # it does not read meanwhile
                manager.broadcast("number", [number, "x" * 20_000])
                number += 1
                await asyncio.sleep(0)
            with contextlib.suppress(ConnectionClosed):
                while True:
                    assert take(await client.recv())
            assert client.close_code == 1013
        assert 0 < len(seen) < number
        if door == "raw":
            url += f"?since={offset}"
        async with connect(url, compression=None, max_size=None) as client:
            if door == "socket.io":
                await client.recv()
                await client.send("40" + json.dumps({"pid": pid, "offset": offset}))
            manager.broadcast("number", [number, ""])
            while seen[-1] < number:
                take(await client.recv())
        assert seen == list(range(number + 1))


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
        joins = self.manager.join_raw if reader.door == "raw" else self.manager._join_socket

        def join(*args: Any) -> None:
            for _ in range(at_the_same_time):
                self.broadcast(0)
            missed = self.missed_since(reader.offset)
            reader.expected += [GAP] if missed is None else missed
            self.gaps += missed is None
            self.recoveries += missed is not None
            joins(*args)

        setattr(self.manager, joins.__name__, join)
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
            if answer["sid"] != reader.sid:
                reader.seen.append(GAP)
                self._begin(reader, answer)
            assert (answer["sid"], answer["pid"]) == (reader.sid, reader.pid)
            reader.client = client
        setattr(self.manager, joins.__name__, joins)

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


# --- 7 dispatch ----------------------------------------------------------------------------------


def failing_manager() -> WebSocketManager:
    """A manager with a command for every way to fail."""
    manager = WebSocketManager()

    @manager.commands.command
    async def fail(how: Literal["value", "away", "exit", "interrupt", "empty", "odd"]) -> Any:
        errors = {
            "value": ValueError("no luck"), "away": Unavailable("the lamp is away"),
            "exit": SystemExit(3), "interrupt": KeyboardInterrupt(), "empty": ValueError(),
            "odd": ValueError("lone \ud800 surrogate"),
        }  # fmt: skip
        raise errors[how]

    @manager.commands.command(inline=True)
    def fail_inline() -> None:
        raise ValueError("no luck")

    @manager.commands.command
    def fail_in_thread() -> None:
        raise ValueError("no luck")

    @manager.commands.command
    async def give(what: Literal["bytes", "set", "huge", "surrogate", "deep"]) -> Any:
        deep: list[Any] = []
        for _ in range(500):
            deep = [deep]
        return {"bytes": b"x", "set": {1}, "huge": 2**70, "surrogate": "\ud800", "deep": deep}[what]

    @manager.commands.command
    async def report() -> AsyncIterator[Any]:
        yield 1
        yield {1, 2}

    @manager.commands.command
    async def forever() -> None:
        await asyncio.Event().wait()

    @manager.method("double")
    async def double(number: int) -> int:
        return 2 * number

    @manager.method("break")
    async def break_() -> None:
        raise LookupError("as planned")

    return manager


def limit_for(code: str) -> float:
    """A command's time limit for a test of this code: short only where it is to be met."""
    return 0.1 if code == "timeout" else 10.0


EXECUTE = "execute_command"
REQUEST_ERRORS: list[tuple[Any, str, str]] = [
    # a message, the code that answers it, a part of the answer's data
    ("", "invalid_json", "JSON"),
    ("{", "invalid_json", "JSON"),
    ("nul", "invalid_json", "JSON"),
    ("{'method': 'get_status'}", "invalid_json", "JSON"),
    ('{"method":"get_status"}{}', "invalid_json", "JSON"),
    ("[" * 100_000, "invalid_json", "JSON"),
    ('{"a":' * 2000 + "1" + "}" * 2000, "invalid_json", "JSON"),
    ('{"id":1e999}', "invalid_json", "JSON"),
    ('{"id":NaN}', "invalid_json", "JSON"),
    ('{"id":"\\ud800"}', "invalid_json", "JSON"),
    (b'{"id":"\xff"}', "invalid_json", "UTF-8"),
    (b"\x00\xff", "invalid_json", "UTF-8"),
    ("null", "invalid_request", "object"),
    ("5", "invalid_request", "object"),
    ('"get_status"', "invalid_request", "object"),
    ("[]", "invalid_request", "object"),
    ('[{"method":"get_status"}]', "invalid_request", "object"),
    ({}, "invalid_request", '"method"'),
    ({"method": None}, "invalid_request", '"method"'),
    ({"method": 5}, "invalid_request", '"method"'),
    ({"method": ["get_status"]}, "invalid_request", '"method"'),
    ({"method": {}}, "invalid_request", '"method"'),
    ({"method": "get_status", "params": None}, "invalid_request", '"params"'),
    ({"method": "get_status", "params": []}, "invalid_request", '"params"'),
    ({"method": "get_status", "params": "x"}, "invalid_request", '"params"'),
    ({"method": "get_status", "id": 1.5}, "invalid_request", '"id"'),
    ({"method": "get_status", "id": True}, "invalid_request", '"id"'),
    ({"method": "get_status", "id": []}, "invalid_request", '"id"'),
    ({"method": "get_status", "id": {}}, "invalid_request", '"id"'),
    ({"method": "get_status", "id": 2**64}, "invalid_request", '"id"'),
    ({"method": "get_status", "id": -(2**63) - 1}, "invalid_request", '"id"'),
    ({"method": ""}, "unknown_method", "get_status, execute_command, cancel"),
    ({"method": "nope"}, "unknown_method", '"method": "nope"'),
    ({"method": "GET_STATUS"}, "unknown_method", "GET_STATUS"),
    ({"method": "echo"}, "unknown_method", "echo is a command, which execute_command runs"),
    ({"method": "__class__"}, "unknown_method", "__class__"),
    ({"method": EXECUTE}, "invalid_params", '"command'),
    ({"method": EXECUTE, "params": {"command": ""}}, "invalid_params", '"command'),
    ({"method": EXECUTE, "params": {"command": " \n"}}, "invalid_params", '"command'),
    ({"method": EXECUTE, "params": {"command": 5}}, "invalid_params", '"command'),
    ({"method": EXECUTE, "params": {"command": None}}, "invalid_params", '"command'),
    ({"method": EXECUTE, "params": {"command": ["echo"]}}, "invalid_params", '"command'),
    ({"method": "cancel"}, "invalid_params", '"id'),
    ({"method": "cancel", "params": {"id": None}}, "invalid_params", '"id'),
    ({"method": "cancel", "params": {"id": True}}, "invalid_params", '"id'),
    ({"method": "cancel", "params": {"id": 1.5}}, "invalid_params", '"id'),
    ({"method": "cancel", "params": {"id": "unknown"}}, "invalid_params", "'unknown'"),
    ({"method": "double"}, "invalid_params", "double NUMBER"),
    ({"method": "double", "params": {"number": "x"}}, "invalid_params", "NUMBER"),
    ({"method": "double", "params": {"number": 1, "more": 2}}, "invalid_params", "more"),
    ({"method": "break"}, "command_failed", "as planned"),
    (execute("ecko hi"), "unknown_command", '"suggestions": ["echo"]'),
    (execute("''"), "unknown_command", "suggestions"),
    (execute("countdown"), "usage", "countdown SECONDS"),
    (execute("countdown soon"), "usage", "countdown SECONDS"),
    (execute("countdown 1e400"), "usage", "countdown SECONDS"),
    (execute("time now"), "usage", '"usage": "time"'),
    (execute('echo "open'), "usage", "quote"),
    (execute("echo x", nope=1), "usage", "nope"),
    (execute("countdown 1", seconds=2), "usage", "SECONDS"),
    (execute("countdown", seconds=[1]), "usage", "SECONDS"),
    (execute("echo x", **{"": 1}), "usage", "unknown parameter"),
    (execute("fail value"), "command_failed", "no luck"),
    (execute("fail empty"), "command_failed", "ValueError"),
    (execute("fail odd"), "command_failed", "lone ? surrogate"),
    (execute("fail exit"), "command_failed", "3"),
    (execute("fail interrupt"), "command_failed", "KeyboardInterrupt"),
    (execute("fail_inline"), "command_failed", "no luck"),
    (execute("fail_in_thread"), "command_failed", "no luck"),
    (execute("fail away"), "unavailable", "the lamp is away"),
    (execute("give bytes"), "command_failed", "can't be encoded"),
    (execute("give set"), "command_failed", "can't be encoded"),
    (execute("give huge"), "command_failed", "can't be encoded"),
    (execute("give surrogate"), "command_failed", "can't be encoded"),
    (execute("give deep"), "command_failed", "can't be encoded"),
    (execute("report"), "command_failed", "can't be encoded"),
    (execute("ask why"), "unavailable", "--language-url"),
    (execute("forever"), "timeout", "longer than "),
]


@pytest.mark.parametrize(("message", "code", "part"), REQUEST_ERRORS, ids=lambda v: str(v)[:50])
async def test_raw_request_that_fails_is_answered_with_its_code(
    message: Any, code: str, part: str
) -> None:
    async with (
        served(failing_manager(), command_timeout_s=limit_for(code)) as server,
        Raw.open(server) as client,
    ):
        error = await client.error_of(message)
        assert error["code"] == code
        assert part in json.dumps(error).replace('\\"', '"')
        assert "Traceback" not in json.dumps(error)
        if isinstance(message, dict) and message.get("method") == EXECUTE:
            line = (message.get("params") or {}).get("command")
            if code not in ("invalid_params", "invalid_request"):
                assert error["command"] == line
        assert await client.run("echo still here") == "still here"
        assert all(each["type"] == "command_progress" for each in client.kept)


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


async def test_error_answers_carry_the_id_unless_the_id_is_what_is_wrong() -> None:
    async with (
        served(failing_manager(), command_timeout_s=0.5) as server,
        Raw.open(server) as client,
    ):
        for message, code, _ in REQUEST_ERRORS:
            if isinstance(message, dict) and "id" not in message:
                await client.send({**message, "id": 7})
                assert (await client.final(7))["data"]["code"] == code
        await client.send({"method": "get_status", "id": [7]})
        assert "id" not in await client.next_of("error")


async def test_internal_error_is_logged_and_tells_the_client_nothing() -> None:
    class Buggy(CommandProcessor):
        def prepare(self, line: str, params: Any = None) -> Any:
            if line == "bug":
                raise LookupError("of the program's own processor")
            return super().prepare(line, params or {})

    manager = WebSocketManager(Buggy())
    gate = Gate(manager)
    async with served(manager, logs_errors=True) as server, Raw.open(server) as client:
        await client.send(execute("bug", id=1))
        first = await client.final(1)
        assert first["data"]["code"] == "internal_error"
        assert "own" not in json.dumps(first)
        # The same for one that has waited for its turn; those behind it get theirs.
        await client.send(execute("gate a"), execute("bug"), execute("echo behind"))
        await until(lambda: gate.begun)
        gate.let("a")
        assert (await client.next())["data"]["result"] == "a"
        assert (await client.next())["data"]["code"] == "internal_error"
        assert (await client.next())["data"]["result"] == "behind"


# Order.


async def test_commands_without_id_run_one_after_another_and_are_answered_in_order() -> None:
    manager = failing_manager()
    gate = Gate(manager)
    async with served(manager) as server, Raw.open(server) as client:
        lines = ["gate a", "nope", "echo 1", "gate b", "countdown x", "fail value", "echo 2",
                 "fail_in_thread", "gate c", "echo 3"]  # fmt: skip
        await client.send(*(execute(line) for line in lines))
        gate.let("b", "c")
        assert (await client.ask("get_status"))["type"] == "status_update", "at once"
        assert await client.run("echo with an id") == "with an id"
        assert gate.begun == ["a"] and client.kept == []
        gate.let("a")
        answers = [await client.next() for _ in lines]
        assert [answer["data"]["command"] for answer in answers] == lines
        assert gate.begun == ["a", "b", "c"] and gate.most_running == 1
        assert [answer["data"].get("code") for answer in answers] == [
            None, "unknown_command", None, None, "usage", "command_failed", None, "command_failed",
            None, None,
        ]  # fmt: skip


async def test_commands_with_id_run_concurrently() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    async with served(manager) as server, Raw.open(server) as client:
        await client.send(*(execute(f"gate {name}", id=name) for name in "abc"))
        await client.send(execute("gate serial"))
        await until(lambda: len(gate.begun) == 4)
        for name in "cab":
            gate.let(name)
            assert (await client.next())["id"] == name
        gate.let("serial")
        assert (await client.next())["data"]["result"] == "serial"


async def test_commands_beyond_the_limit_wait_in_order() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    async with (
        served(manager, max_running_commands=2) as server,
        Raw.open(server) as client, Raw.open(server) as other,
    ):  # fmt: skip
        names = ["a", "b", "c", "d", "e"]
        await client.send(*(execute(f"gate {name}", id=name) for name in names))
        await client.send(execute("echo even this waits", id="echo"))
        await until(lambda: gate.begun == ["a", "b"])
        assert (await client.ask("get_status"))["data"]["command"]["running"] == 2
        assert await other.run("echo not mine") == "not mine", "the limit is per client"
        answer = await client.ask("cancel", id="d")
        assert answer["data"] == {"cancelled": "d"}
        assert (await client.final("d"))["data"]["code"] == "cancelled"
        gate.let("c", "e", "b")
        for name in ("b", "c", "e"):
            assert (await client.next())["id"] == name
        assert (await client.next())["id"] == "echo"
        assert gate.begun == ["a", "b", "c", "e"] and gate.most_running == 2
        gate.let("a")
        assert (await client.next())["id"] == "a"


async def test_client_with_too_many_waiting_is_not_read_until_some_have_ended() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    count = karna_ws.MAX_WAITING + 50
    async with served(manager) as server, Raw.open(server) as client:
        await client.send(execute("gate a"))
        await client.send(*(execute(f"echo {number}") for number in range(count)))
        await client.send({"method": "get_status", "id": "s"})
        (connection,) = manager.connections
        await until(lambda: connection._holds & karna_ws.HOLD_CALLS)
        assert connection.waiting == karna_ws.MAX_WAITING + 1
        gate.let("a")
        await client.final("s")
        results = [each["data"]["result"] for each in [client.kept.pop(0) for _ in range(count)]]
        assert results == ["a", *map(str, range(count - 1))]
        assert (await client.next())["data"]["result"] == str(count - 1)
        assert (connection.waiting, connection.waiting_bytes, connection._holds) == (0, 0, 0)


async def test_client_whose_waiting_requests_are_large_is_not_read_either() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    async with served(manager) as server, Raw.open(server) as client:
        await client.send(execute("gate a"))
        for _ in range(5):
            await client.send(execute("echo", text="x" * 300_000))
        (connection,) = manager.connections
        await until(lambda: connection._holds & karna_ws.HOLD_CALLS)
        assert connection.waiting < 5
        gate.let("a")
        assert len([await client.next() for _ in range(6)]) == 6
        assert connection.waiting_bytes == 0


async def test_requests_that_waited_in_a_namespace_count_no_more_once_it_was_left() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    async with served(manager) as server, Sio.open(server, join="/") as client:
        for name in ("a", "b", "c"):
            await client.join("/ws")
            await client.send(f'42/ws,["rpc",{json.dumps(execute(f"gate {name}"))}]')
            for _ in range(karna_ws.MAX_WAITING // 2):
                await client.send(f'42/ws,["rpc",{json.dumps(execute("echo waits"))}]')
            await client.send("41/ws,")
        assert (await client.rpc(execute("echo read")))["data"]["result"] == "read"
        (connection,) = manager.connections
        assert (connection.waiting, connection.waiting_bytes) == (0, 0)
        assert gate.cancelled == ["a", "b", "c"]


# Progress and cancellation.


async def test_progress_comes_before_the_response_and_the_last_is_the_result() -> None:
    manager = WebSocketManager()

    @manager.commands.command
    async def steps(count: int) -> AsyncIterator[int]:
        for number in range(count):
            yield number

    @manager.commands.command
    async def told(context: Context) -> str:
        await context.progress({"half": True})
        return "done"

    @manager.commands.command
    def told_by_thread(context: Context) -> str:
        context.report("from a thread")
        return "done"

    async with served(manager) as server, Raw.open(server) as client:
        for line, reports, result in (
            ("steps 3", [0, 1, 2], 2), ("steps 0", [], None), ("told", [{"half": True}], "done"),
            ("told_by_thread", ["from a thread"], "done"),
        ):  # fmt: skip
            for request in (execute(line, id="p"), execute(line)):
                await client.send(request)
                id = {key: request[key] for key in request if key == "id"}
                for report in reports:
                    data = {"command": line, "progress": report}
                    assert await client.next() == {"type": "command_progress", "data": data, **id}
                data = {"command": line, "result": result}
                assert await client.next() == {"type": "command_response", "data": data, **id}


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


@pytest.mark.parametrize("id", ["x", "", 5, 0, -(2**63), 2**64 - 1])
async def test_cancel_ends_the_running_command_of_that_id(id: str | int) -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    async with served(manager) as server, Raw.open(server) as client, Raw.open(server) as other:
        await client.send(execute("gate mine") | {"id": id}, execute("gate other", id="other"))
        await other.send(execute("gate theirs") | {"id": id})
        await until(lambda: len(gate.begun) == 3)
        unlike = str(id) if isinstance(id, int) else 12345
        assert (await client.ask("cancel", id=unlike))["data"]["code"] == "invalid_params"
        assert (await client.ask("cancel", id=id))["data"] == {"cancelled": id}
        answer = await client.final(id)
        assert answer["data"] == {
            "code": "cancelled", "message": "cancelled", "command": "gate mine"
        }  # fmt: skip
        assert gate.cancelled == ["mine"]
        assert (await client.ask("cancel", id=id))["data"]["code"] == "invalid_params"
        gate.let("other", "theirs")
        assert (await client.final("other"))["data"]["result"] == "other"
        assert (await other.final(id))["data"]["result"] == "theirs"


async def test_cancel_ends_all_commands_of_an_id_that_was_used_twice() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    async with served(manager, max_running_commands=1) as server, Raw.open(server) as client:
        await client.send(execute("gate a", id=1), execute("gate b", id=1))
        await until(lambda: gate.begun)
        await client.ask("cancel", id=1)
        for _ in range(2):
            assert (await client.final(1))["data"]["code"] == "cancelled"
        assert gate.begun == ["a"]


async def test_client_that_goes_away_has_its_commands_cancelled() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    async with served(manager, max_running_commands=2) as server:
        async with Raw.open(server) as other:
            await other.send(execute("gate other", id=1))
            async with Raw.open(server) as client:
                await client.send(*(execute(f"gate {name}", id=name) for name in "abc"))
                await client.send(execute("gate serial"))
                await until(lambda: len(gate.begun) == 3)
            await until(lambda: sorted(gate.cancelled) == ["a", "b"])
            async with Sio.open(server, join="/ws") as socket:
                await socket.send(f'42/ws,["rpc",{json.dumps(execute("gate socket"))}]')
                await until(lambda: len(gate.begun) == 4)
                socket.connection.transport.abort()
                await until(lambda: gate.cancelled[2:] == ["socket"])
            gate.let("other")
            assert (await other.final(1))["data"]["result"] == "other"
        assert gate.begun == ["other", "a", "b", "socket"], "what waited never began"
        await until(lambda: not manager.tasks)


async def test_pipelined_requests_are_each_answered_once() -> None:
    manager = failing_manager()
    lines = ["echo x", "countdown 0", "fail value", "fail_in_thread", "nope", "countdown x", "help"]
    async with served(manager) as server, Raw.open(server) as client:
        ids = list(range(700))
        requests = [execute(lines[id % len(lines)], id=id + 1) for id in ids]
        texts = [json.dumps(request).encode() for request in requests]
        frames = [
            (bytes((0x81, 0x80 | len(text))) if len(text) < 126
             else bytes((0x81, 0xFE)) + len(text).to_bytes(2, "big")) + b"\0\0\0\0" + text
            for text in texts
        ]  # fmt: skip
        data = b"".join(frames)
        for start in range(0, len(data), 10_007):  # frames are cut anywhere
            client.connection.transport.write(data[start : start + 10_007])
        finals: list[int] = []
        while len(finals) < len(ids):
            answer = await client.next()
            if answer["type"] != "command_progress":
                finals.append(answer["id"])
        assert sorted(finals) == [id + 1 for id in ids]
        assert [each for each in await client.received() if each["type"] != "x"] == []


# Requests of any shape.


async def test_params_reach_the_command_by_name() -> None:
    manager = WebSocketManager()

    @manager.commands.command
    async def greet(
        name: str, times: int = 1, *, loud: bool = False, tags: list[str] | None = None
    ) -> str:
        text = " ".join([f"hello {name}"] * times) + "".join(tags or [])
        return text.upper() if loud else text

    async with served(manager) as server, Raw.open(server) as client:
        for line, params, result in (
            ("greet Ada", {}, "hello Ada"),
            ("greet", {"name": "Ada Lovelace"}, "hello Ada Lovelace"),
            ("greet", {"name": "'", "times": 2}, "hello ' hello '"),
            ("greet Ada", {"times": "2"}, "hello Ada hello Ada"),
            ("greet Ada --loud", {"times": 1}, "HELLO ADA"),
            ("greet 'Ada L'", {"loud": True, "tags": ["!", "?"]}, "HELLO ADA L!?"),
            ("greet --no-loud", {"name": ""}, "hello "),
        ):
            assert await client.run(line, **params) == result
        for line, params in (
            ("greet Ada", {"name": "Ada"}), ("greet Ada", {"loud": "loud"}),
            ("greet Ada", {"times": 1.5}), ("greet Ada", {"times": True}),
            ("greet Ada", {"tags": "x"}), ("greet Ada", {"tags": [1]}),
            ("greet", {"name": None}), ("greet", {"name": 5}), ("greet", {}),
            ("greet Ada", {"more": 1}),
        ):  # fmt: skip
            answer = await client.ask(EXECUTE, command=line, **params)
            assert answer["data"]["code"] == "usage", (line, params)


async def test_method_of_the_program_is_called_with_params() -> None:
    manager = failing_manager()
    seen: list[Any] = []

    @manager.method("who")
    async def who(context: Context, name: str = "nobody") -> dict[str, Any]:
        seen.append(context.client)
        await context.progress("looking")
        return {"name": name}

    @manager.method("block")
    def block() -> bool:
        return threading.current_thread() is threading.main_thread()

    @manager.method("inline", inline=True)
    def inline(*, flag: bool = True) -> bool:
        return flag and threading.current_thread() is threading.main_thread()

    with pytest.raises(ValueError, match="get_status"):
        manager.method("get_status")(inline)
    with pytest.raises(ValueError, match="inline"):
        manager.method("inline")(inline)
    async with served(manager) as server, Raw.open(server) as client:
        assert await client.ask("double", number=21) == {
            "type": "command_response", "data": 42, "id": "ask-1"
        }  # fmt: skip
        answer = await client.ask("who", name="Ada")
        assert answer["data"] == {"name": "Ada"}
        (progress,) = client.kept
        assert (progress["type"], progress["id"]) == ("command_progress", answer["id"])
        assert isinstance(seen[0], Client) and seen[0].door == "raw"
        assert (await client.ask("block"))["data"] is False
        assert (await client.ask("inline"))["data"] is True
        assert (await client.ask("inline", flag=False))["data"] is False


METHODS = st.sampled_from(
    ["get_status", EXECUTE, EXECUTE, EXECUTE, "cancel", "double", "break", "nope", "rpc.discover"]
)
LINES = st.sampled_from(
    ["echo hi", "countdown 0", "time", "help", "nope", "", " ", 'echo "', "fail value", "fail exit",
     "give deep", "give bytes", "fail_in_thread", "clients", "interpret hi", "ask x", "describe x"]
) | st.text(max_size=10)  # fmt: skip
PARAMS = st.fixed_dictionaries(
    {}, optional={"command": LINES | JSON, "id": JSON, "number": JSON, "text": JSON, "how": JSON}
)
REQUESTS = st.fixed_dictionaries(
    {},
    optional={"method": METHODS | JSON, "params": PARAMS | JSON,
              "id": st.integers(0, 5) | st.text(max_size=2) | JSON},
)  # fmt: skip


@settings(PROPERTY, max_examples=60)
@given(st.lists(REQUESTS | JSON | st.binary(max_size=20), max_size=12), st.booleans())
@example([{"id": 2**63}, {"method": [], "id": "x"}, [], None, b"\xff"], True)
async def test_every_request_gets_one_final_answer_and_the_connection_stays(
    messages: list[Any], is_binary: bool
) -> None:
    async with served(failing_manager()) as server, Raw.open(server) as client:
        for message in messages:
            data = message if isinstance(message, bytes) else orjson.dumps(message)
            await client.send(data if is_binary or data == message else data.decode())
        answers = []
        while len(answers) < len(messages):
            answer = await client.next()
            if answer["type"] != "command_progress":
                answers.append(answer)
        assert await client.received() == []
        for answer in answers:
            assert answer["type"] in ("command_response", "status_update", "error")
        ids = [each.get("id") for each in messages if isinstance(each, dict)]
        wanted = [id for id in ids if type(id) in (int, str)]
        key = repr
        assert sorted((each["id"] for each in answers if "id" in each), key=key) == sorted(
            wanted, key=key
        )


# JSON-RPC 2.0.


def rpc_manager() -> WebSocketManager:
    """The methods of the examples in the JSON-RPC 2.0 specification."""
    manager = WebSocketManager()
    manager.notified = []  # type: ignore[attr-defined]

    @manager.method("subtract")
    async def subtract(minuend: int, subtrahend: int) -> int:
        return minuend - subtrahend

    @manager.method("sum")
    def sum_(first: int, second: int, third: int) -> int:
        return first + second + third

    @manager.method("get_data")
    async def get_data() -> list[Any]:
        return ["hello", 5]

    @manager.method("update", inline=True)
    def update(a: int, b: int, c: int, d: int, e: int) -> None:
        manager.notified.append([a, b, c, d, e])  # type: ignore[attr-defined]

    @manager.method("notify_hello", inline=True)
    def notify_hello(number: int) -> None:
        manager.notified.append(number)  # type: ignore[attr-defined]

    @manager.method("later")
    async def later(text: str) -> str:
        await asyncio.sleep(0)
        return text

    return manager


def result(value: Any, id: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "result": value, "id": id}


def error(code: int, id: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "error": {"code": code}, "id": id}


# Section 7 of the specification, in its order; error messages and data are ours.
JSON_RPC_EXAMPLES: list[tuple[str, str, Any]] = [
    ("positional", '{"jsonrpc": "2.0", "method": "subtract", "params": [42, 23], "id": 1}',
     result(19, 1)),
    ("positional, swapped", '{"jsonrpc": "2.0", "method": "subtract", "params": [23, 42], "id": 2}',
     result(-19, 2)),
    ("named", '{"jsonrpc": "2.0", "method": "subtract", '
     '"params": {"subtrahend": 23, "minuend": 42}, "id": 3}', result(19, 3)),
    ("named, swapped", '{"jsonrpc": "2.0", "method": "subtract", '
     '"params": {"minuend": 42, "subtrahend": 23}, "id": 4}', result(19, 4)),
    ("notification", '{"jsonrpc": "2.0", "method": "update", "params": [1,2,3,4,5]}', None),
    ("unknown notification", '{"jsonrpc": "2.0", "method": "foobar"}', None),
    ("unknown method", '{"jsonrpc": "2.0", "method": "foobar", "id": "1"}', error(-32601, "1")),
    ("invalid request", '{"jsonrpc": "2.0", "method": 1, "params": "bar"}', error(-32600, None)),
    ("batch", '''[
        {"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"},
        {"jsonrpc": "2.0", "method": "notify_hello", "params": [7]},
        {"jsonrpc": "2.0", "method": "subtract", "params": [42,23], "id": "2"},
        {"foo": "boo"},
        {"jsonrpc": "2.0", "method": "foo.get", "params": {"name": "myself"}, "id": "5"},
        {"jsonrpc": "2.0", "method": "get_data", "id": "9"}
    ]''', [result(7, "1"), result(19, "2"), error(-32600, None), error(-32601, "5"),
           result(["hello", 5], "9")]),
    ("batch of notifications", '''[
        {"jsonrpc": "2.0", "method": "notify_sum", "params": [1,2,4]},
        {"jsonrpc": "2.0", "method": "notify_hello", "params": [7]}
    ]''', None),
]  # fmt: skip
# Those a raw-door message can't show, because nothing in it says that it is JSON-RPC.
JSON_RPC_HTTP_EXAMPLES: list[tuple[str, str, Any]] = [
    ("invalid JSON", '{"jsonrpc": "2.0", "method": "foobar, "params": "bar", "baz]',
     error(-32700, None)),
    ("batch, invalid JSON", '''[
        {"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"},
        {"jsonrpc": "2.0", "method"
    ]''', error(-32700, None)),
    ("empty batch", "[]", error(-32600, None)),
    ("invalid batch of one", "[1]", [error(-32600, None)]),
    ("invalid batch", "[1,2,3]", [error(-32600, None)] * 3),
]  # fmt: skip


def without_words(answer: Any) -> Any:
    """An answer without the texts of errors; a batch in one order."""
    if isinstance(answer, list):
        return sorted(map(without_words, answer), key=repr)
    if "error" in answer:
        assert isinstance(answer["error"]["message"], str)
        assert isinstance(answer["error"]["data"]["code"], str)
        return {**answer, "error": {"code": answer["error"]["code"]}}
    return answer


@pytest.mark.parametrize(
    ("text", "expected"), [each[1:] for each in JSON_RPC_EXAMPLES],
    ids=[each[0] for each in JSON_RPC_EXAMPLES],
)  # fmt: skip
async def test_json_rpc_example_of_the_specification_on_the_raw_door(
    text: str, expected: Any
) -> None:
    async with served(rpc_manager()) as server, Raw.open(server) as client:
        await client.send(text)
        if expected is None:
            assert await client.received() == []
        elif isinstance(expected, list):
            assert without_words(await client.next()) == sorted(expected, key=repr)
        else:
            assert without_words(await client.next()) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [each[1:] for each in JSON_RPC_EXAMPLES + JSON_RPC_HTTP_EXAMPLES],
    ids=[each[0] for each in JSON_RPC_EXAMPLES + JSON_RPC_HTTP_EXAMPLES],
)  # fmt: skip
async def test_json_rpc_example_of_the_specification_over_http(text: str, expected: Any) -> None:
    async with served(rpc_manager()) as server:
        status, answer = await http(server, "POST", "/rpc", text.encode())
        if expected is None:
            assert (status, answer) == (204, b"")
        else:
            assert status == 200
            assert without_words(answer) == (
                sorted(expected, key=repr) if isinstance(expected, list) else expected
            )


async def test_json_rpc_request_with_id_null_is_no_notification() -> None:
    async with served(rpc_manager()) as server, Raw.open(server) as client:
        request = {"jsonrpc": "2.0", "method": "get_data", "id": None}
        await client.send(request)
        assert await client.next() == result(["hello", 5], None)
        assert await http(server, "POST", "/rpc", request) == (200, result(["hello", 5], None))
        batch = [request, {"jsonrpc": "2.0", "method": "notify_hello", "params": [7]}]
        assert await http(server, "POST", "/rpc", batch) == (200, [result(["hello", 5], None)])


async def test_json_rpc_notifications_are_carried_out() -> None:
    manager = rpc_manager()
    async with served(manager) as server, Raw.open(server) as client:
        await client.send(JSON_RPC_EXAMPLES[4][1], JSON_RPC_EXAMPLES[9][1])
        assert await client.received() == []
        await http(server, "POST", "/rpc", JSON_RPC_EXAMPLES[4][1].encode())
        assert manager.notified == [[1, 2, 3, 4, 5], 7, [1, 2, 3, 4, 5]]  # type: ignore


@pytest.mark.parametrize(
    ("message", "ours", "code"),
    [
        ({"method": "get_status", "params": 5}, "invalid_request", -32600),
        ({"method": "nope"}, "unknown_method", -32601),
        ({"method": "nope", "params": [1]}, "unknown_method", -32601),
        ({"method": [], "params": [1]}, "invalid_request", -32600),
        ({"method": "subtract", "params": [1]}, "invalid_params", -32602),
        ({"method": "subtract", "params": [1, 2, 3]}, "invalid_params", -32602),
        ({"method": "subtract", "params": ["x", 2]}, "invalid_params", -32602),
        ({"method": "get_status", "params": [1]}, "invalid_params", -32602),
        ({"method": EXECUTE}, "invalid_params", -32602),
        ({"method": "cancel", "params": ["nope"]}, "invalid_params", -32602),
        ({"method": EXECUTE, "params": ["fail value"]}, "command_failed", -32000),
        ({"method": EXECUTE, "params": ["nope"]}, "unknown_command", -32001),
        ({"method": EXECUTE, "params": ["countdown"]}, "usage", -32002),
        ({"method": EXECUTE, "params": ["forever"]}, "timeout", -32003),
        ({"method": EXECUTE, "params": ["ask why"]}, "unavailable", -32005),
    ],
    ids=str,
)  # fmt: skip
async def test_json_rpc_error_has_its_number_and_our_code(
    message: dict[str, Any], ours: str, code: int
) -> None:
    manager = failing_manager()

    @manager.method("subtract")
    async def subtract(minuend: int, subtrahend: int) -> int:
        return minuend - subtrahend

    limit = limit_for(ours)
    async with served(manager, command_timeout_s=limit) as server, Raw.open(server) as client:
        request = {"jsonrpc": "2.0", "id": "x", **message}
        await client.send(request)
        answer = await client.next()
        assert (answer["jsonrpc"], answer["id"]) == ("2.0", "x")
        assert answer["error"]["code"] == code
        assert answer["error"]["data"]["code"] == ours
        if ours == "unknown_command":
            assert answer["error"]["data"]["suggestions"] == []
        assert await http(server, "POST", "/rpc", request) == (200, answer)


@pytest.mark.parametrize(
    ("message", "id"),
    [
        ({"jsonrpc": "1.0", "method": "get_status", "id": 1}, 1),
        ({"jsonrpc": 2.0, "method": "get_status", "id": "a"}, "a"),
        ({"jsonrpc": None}, None),
        ({"jsonrpc": "2.0"}, None),
        ({"jsonrpc": "2.0", "id": 5}, 5),
        ({"jsonrpc": "2.0", "method": "get_status", "id": {}}, None),
        ({"jsonrpc": "2.0", "method": "get_status", "id": 1.5}, None),
        ({"jsonrpc": "2.0", "method": "get_status", "id": True}, None),
        ({"jsonrpc": "1.0", "method": "get_status", "id": [1]}, None),
    ],
    ids=str,
)
async def test_json_rpc_request_of_wrong_form_is_invalid(message: Any, id: Any) -> None:
    async with served() as server, Raw.open(server) as client:
        await client.send(message)
        assert without_words(await client.next()) == error(-32600, id)


async def test_json_rpc_runs_commands_and_tells_progress_and_cancels() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)

    @manager.commands.command
    async def steps() -> AsyncIterator[int]:
        yield 1
        yield 2

    async with served(manager) as server, Raw.open(server) as client:
        call = {"jsonrpc": "2.0", "method": EXECUTE, "id": 1}
        await client.send({**call, "params": {"command": "steps"}})
        for number in (1, 2):
            assert await client.next() == {
                "jsonrpc": "2.0", "method": "command_progress",
                "params": {"command": "steps", "progress": number, "id": 1},
            }  # fmt: skip
        assert await client.next() == result({"command": "steps", "result": 2}, 1)
        await client.send({**call, "params": ["gate a"]})
        await until(lambda: gate.begun)
        await client.send({"jsonrpc": "2.0", "method": "cancel", "params": [1], "id": "c"})
        answers = [await client.next(), await client.next()]
        assert result({"cancelled": 1}, "c") in answers
        assert error(-32004, 1) in list(map(without_words, answers))
        await client.send({"jsonrpc": "2.0", "method": "get_status", "id": "s"})
        assert (await client.next())["result"] == manager.status()


async def test_json_rpc_batch_is_answered_when_all_of_it_is() -> None:
    manager = rpc_manager()
    gate = Gate(manager)
    async with served(manager, max_running_commands=1) as server, Raw.open(server) as client:
        call = {"jsonrpc": "2.0", "method": EXECUTE}
        await client.send([
            {**call, "params": ["gate a"], "id": "a"},
            {**call, "params": ["gate b"], "id": "b"},
            {**call, "params": ["gate c"], "id": "c"},
            {**call, "params": ["gate silent"]},
            {**call, "params": ["countdown 0"], "id": "d"},
        ])  # fmt: skip
        await until(lambda: gate.begun)
        await client.send({"jsonrpc": "2.0", "method": "cancel", "params": ["b"], "id": "x"})
        assert (await client.next())["result"] == {"cancelled": "b"}
        gate.let("a", "c", "silent")
        batch = await client.next()
        assert sorted(each["id"] for each in batch) == ["a", "b", "c", "d"]
        assert [each["error"]["code"] for each in batch if "error" in each] == [-32004]
        assert await client.received() == [], "no progress of a batch"


async def test_json_rpc_batch_is_bounded() -> None:
    async with served() as server, Raw.open(server) as client:
        one = {"jsonrpc": "2.0", "method": "get_status", "id": 1}
        await client.send([one] * (karna_ws.MAX_BATCH + 1))
        assert without_words(await client.next()) == error(-32600, None)
        await client.send([one] * karna_ws.MAX_BATCH)
        assert len(await client.next()) == karna_ws.MAX_BATCH


@pytest.mark.parametrize("text", ["command_progress", "status_update", "error", "jsonrpc"])
async def test_json_rpc_result_over_http_may_be_any_text(text: str) -> None:
    async with served(rpc_manager()) as server:
        request = {"jsonrpc": "2.0", "method": "later", "params": [text], "id": 1}
        assert await http(server, "POST", "/rpc", request) == (200, result(text, 1))
        batch = (200, [result(text, 1)])
        assert await http(server, "POST", "/rpc", [request]) == batch


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


async def test_json_rpc_over_http_leaves_progress_out() -> None:
    async with served() as server:
        request = {"jsonrpc": "2.0", "method": EXECUTE, "params": ["countdown 0.01"], "id": 1}
        status, answer = await http(server, "POST", "/rpc", request)
        assert (status, answer["result"]["result"]) == (200, {"remaining": 0, "percent": 100})


async def test_json_rpc_discover_describes_methods_and_commands() -> None:
    manager = rpc_manager()

    @manager.method("paint")
    async def paint(color: Literal["red", "green"], *, thick: bool = False) -> None:
        """Paint the wall."""

    async with served(manager) as server, Raw.open(server) as client:
        await client.send({"jsonrpc": "2.0", "method": "rpc.discover", "id": 1})
        document = (await client.next())["result"]
        assert document["openrpc"].startswith("1.")
        assert document["info"]["title"] and document["info"]["version"]
        methods = {each["name"]: each for each in document["methods"]}
        assert {"get_status", EXECUTE, "cancel", "subtract", "sum", "paint"} <= set(methods)
        assert "countdown SECONDS" in methods[EXECUTE]["summary"]
        assert methods["paint"]["summary"] == "Paint the wall."
        color, thick = methods["paint"]["params"]
        assert (color["name"], color["required"]) == ("color", True)
        assert color["schema"] == {"type": "string", "enum": ["red", "green"]}
        assert (thick["required"], thick["schema"]) == (False, {"type": "boolean"})
        for method in document["methods"]:  # what OpenRPC demands of a method
            assert {"name", "params", "result"} <= set(method)
            assert all({"name", "schema"} <= set(each) for each in method["params"])
        http_answer = await http(server, "POST", "/rpc",
                                 {"jsonrpc": "2.0", "method": "rpc.discover", "id": 1})  # fmt: skip
        assert http_answer == (200, result(document, 1))


async def test_json_rpc_library_of_the_public_works_unmodified_over_websocket() -> None:
    needs("jsonrpc_websocket", "aiohttp")
    import aiohttp
    import jsonrpc_base
    import jsonrpc_websocket

    told: list[Any] = []
    async with served(rpc_manager()) as server, aiohttp.ClientSession() as session:
        url = f"ws://127.0.0.1:{server.port}/ws"
        library = jsonrpc_websocket.Server(url, session=session)
        library.command_progress = lambda **params: told.append(params["progress"])
        await library.ws_connect()
        try:
            assert await library.subtract(42, 23) == 19
            assert await library.subtract(minuend=42, subtrahend=23) == 19
            assert await library.sum(1, 2, 4) == 7
            answer = await library.execute_command(command="countdown 0.01")
            assert answer["result"] == {"remaining": 0, "percent": 100}
            assert [each["percent"] for each in told] == [0, 100]
            with pytest.raises(jsonrpc_base.ProtocolError) as caught:
                await library.foobar()
            assert caught.value.args[0] == -32601
            await library.update(1, 2, 3, 4, 5, _notification=True)
            assert (await library.get_status())["command"]["state"] == "running"
            assert server.manager.notified == [[1, 2, 3, 4, 5]]  # type: ignore[attr-defined]
        finally:
            await library.close()


async def test_json_rpc_library_of_the_public_works_unmodified_over_http() -> None:
    needs("jsonrpcclient")
    import jsonrpcclient

    async with served(rpc_manager()) as server:
        request = jsonrpcclient.request("subtract", params=[42, 23])
        _, answer = await http(server, "POST", "/rpc", request)
        assert jsonrpcclient.parse(answer) == jsonrpcclient.Ok(19, request["id"])
        _, answer = await http(server, "POST", "/rpc", jsonrpcclient.request("foobar"))
        parsed = jsonrpcclient.parse(answer)
        assert isinstance(parsed, jsonrpcclient.Error) and parsed.code == -32601
        batch = [jsonrpcclient.request("sum", params=(1, 2, number)) for number in range(3)]
        _, answer = await http(server, "POST", "/rpc", batch)
        assert sorted(each.result for each in jsonrpcclient.parse(answer)) == [3, 4, 5]
        silent = jsonrpcclient.notification("update", params=[1, 2, 3, 4, 5])
        assert await http(server, "POST", "/rpc", silent) == (204, b"")


# --- 8 http --------------------------------------------------------------------------------------


async def test_rest_executes_a_command_as_the_raw_door_would() -> None:
    manager = WebSocketManager()

    @manager.commands.command
    async def greet(name: str, *, times: int = 1) -> str:
        return " ".join([f"hello {name}"] * times)

    async with served(manager) as server, Raw.open(server) as client:
        body = {"command": "greet", "name": "Ada", "times": 2}
        status, answer = await http(server, "POST", "/api/execute_command", body)
        assert status == 200
        assert answer == {
            "type": "command_response",
            "data": {"command": "greet", "result": "hello Ada hello Ada"},
        }
        await client.send({"method": EXECUTE, "params": body})
        assert await client.next() == answer
        status, answer = await http(
            server, "POST", "/api/execute_command", {"command": "countdown 0.01"}
        )
        assert (status, answer["data"]["result"]["percent"]) == (200, 100), "no progress"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "invalid_json"), (b"{", 400, "invalid_json"), (b"\xff", 400, "invalid_json"),
        (b"[" * 5000, 400, "invalid_json"),
        ([], 400, "invalid_request"), ("x", 400, "invalid_request"), (b"null", 400,
                                                                      "invalid_request"),
        ({}, 400, "invalid_params"), ({"command": 5}, 400, "invalid_params"),
        ({"command": " "}, 400, "invalid_params"),
        ({"command": "countdown"}, 400, "usage"), ({"command": "echo", "x": 1}, 400, "usage"),
        ({"command": "nope"}, 404, "unknown_command"),
        ({"command": "fail value"}, 500, "command_failed"),
        ({"command": "fail exit"}, 500, "command_failed"),
        ({"command": "fail_inline"}, 500, "command_failed"),
        ({"command": "give bytes"}, 500, "command_failed"),
        ({"command": "fail away"}, 503, "unavailable"), ({"command": "ask x"}, 503, "unavailable"),
        ({"command": "forever"}, 504, "timeout"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
async def test_rest_command_that_fails_has_a_fitting_status(
    body: Any, status: int, code: str
) -> None:
    async with served(failing_manager(), command_timeout_s=limit_for(code)) as server:
        answer = await http(server, "POST", "/api/execute_command", body)
        assert (answer[0], answer[1]["type"], answer[1]["data"]["code"]) == (status, "error", code)
        assert "Traceback" not in json.dumps(answer[1])
        assert (await http(server, "GET", "/health"))[0] == 200


async def test_rest_client_that_disconnects_has_its_command_cancelled() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    async with served(manager) as server:
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
        await until(lambda: not manager.connections and not manager.tasks)


@pytest.mark.parametrize("level", ["info", "warning", "error", None])
async def test_rest_notify_broadcasts_and_counts(level: str | None) -> None:
    async with (
        served() as server, Raw.open(server) as raw, Sio.open(server, join="/ws") as client
    ):  # fmt: skip
        body = {"message": "build done"} | ({"level": level} if level else {})
        assert await http(server, "POST", "/api/notify", body) == (202, {"clients": 2})
        data = (await raw.next_of("notification"))["data"]
        assert (data["message"], data["level"]) == ("build done", level or "info")
        assert (await client.packet("42/ws,"))[1]["data"] == data


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
    monkeypatch.setattr(karna_ws, "load_page", lambda: None)
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


async def test_health_tells_which_service_failed() -> None:
    lamp = Lamp()
    manager = WebSocketManager(services=[lamp])
    async with served(manager) as server:
        assert await http(server, "GET", "/health") == (200, {"status": "healthy"})
        lamp.set_state("degraded", "one bulb is out")
        assert (await http(server, "GET", "/health"))[0] == 200
        lamp.set_state("failed", "dark")
        status, answer = await http(server, "GET", "/health")
        assert (status, answer["status"]) == (503, "unhealthy")
        assert answer["services"] == {"lamp": lamp.get_status()}
        lamp.set_state("running")
        assert (await http(server, "GET", "/health"))[0] == 200


# --- 9 server: the embedding API -----------------------------------------------------------------


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


async def test_service_that_fails_to_start_takes_nothing_down() -> None:
    class Broken(Lamp):
        async def start(self) -> None:
            raise SystemExit("no lamp here")

    manager = WebSocketManager(services=[Broken()])
    async with served(manager) as server, Raw.open(server) as client:
        status = (await client.ask("get_status"))["data"]["lamp"]
        assert (status["state"], status["detail"]) == ("failed", "no lamp here")
        assert await client.run("echo fine") == "fine"


async def test_clients_may_connect_while_services_start() -> None:
    class Slow(Lamp):
        def __init__(self) -> None:
            super().__init__()
            self.may_start = asyncio.Event()

        async def start(self) -> None:
            await self.may_start.wait()

    slow = Slow()
    manager = WebSocketManager(services=[slow])
    with error_log():
        async with serving(manager, port=0) as server, Raw.open(server) as client:
            assert (await client.ask("get_status"))["data"]["lamp"]["state"] == "starting"
            assert await client.run("echo early") == "early"
            slow.may_start.set()
            while (await client.next_of("status_update"))["data"]["lamp"]["state"] != "running":
                pass


async def test_handle_message_can_be_overridden() -> None:
    class Echo(WebSocketManager):
        def handle_message(self, client: Client, payload: bytes, is_text: bool) -> Any:
            if payload == b"json":
                return None
            if payload == b"request":
                return super().handle_message(client, b'{"method":"cancel"}', is_text)
            return payload.decode() if is_text else payload

    async with served(Echo()) as server, Raw.open(server) as client:
        await client.send("text", b"\x00\xff", "json", "request", "last")
        received = [await client.connection.recv() for _ in range(4)]
        assert received[:2] == ["text", b"\x00\xff"]
        assert "invalid_params" in str(received[2])
        assert received[3] == "last"


async def test_message_handler_that_fails_answers_an_internal_error() -> None:
    class Broken(WebSocketManager):
        def handle_message(self, client: Client, payload: bytes, is_text: bool) -> Any:
            raise LookupError("bug")

    async with served(Broken(), logs_errors=True) as server, Raw.open(server) as client:
        for _ in range(2):
            await client.send("x")
            assert (await client.next())["data"]["code"] == "internal_error"


async def test_client_send_and_disconnect_reach_a_raw_client() -> None:
    manager = WebSocketManager()

    @manager.on("connect")
    async def welcome(client: Client, auth: Any) -> None:
        await client.send("welcome", {"door": client.door})
        await client.emit("two", 1, "x")

    @manager.method("leave")
    async def leave(context: Context) -> None:
        await context.client.disconnect("as you asked")

    async with served(manager) as server, Raw.open(server) as client:
        assert await client.next() == {"type": "welcome", "data": {"door": "raw"}}
        assert await client.next() == {"type": "two", "data": [1, "x"]}
        await client.send({"method": "leave", "id": 1})
        assert await client.closed() == (1000, "as you asked")


async def test_manager_is_served_again_after_its_close() -> None:
    manager = WebSocketManager(services=[Lamp()])
    gate = Gate(manager)
    epochs = set()
    for turn in range(3):
        async with served(manager, history_messages=turn) as server, Raw.open(server) as client:
            epochs.add(manager.epoch)
            status = (await client.ask("get_status"))["data"]
            assert {entry["state"] for entry in status.values()} == {"running"}
            gate.let(f"turn{turn}")
            assert await client.run(f"gate turn{turn}") == f"turn{turn}"
            assert manager.notify("again") == 1
            await client.next_of("notification")
            assert manager.config.history_messages == turn
        assert {service.state for service in manager.services.values()} == {"stopped"}
        assert not manager.connections and not manager.raw and not manager.tasks
        assert manager.loop is None
    assert len(epochs) == 3
    assert manager.notify("nobody") == 0


async def test_manager_is_not_served_twice_at_once() -> None:
    manager = WebSocketManager()
    async with served(manager) as server, Raw.open(server) as client:
        with pytest.raises(StartError, match="already"):
            async with serving(manager, port=0):
                pass
        assert await client.run("echo unharmed") == "unharmed"


async def test_manager_that_could_not_start_can_be_served_later() -> None:
    manager = WebSocketManager()
    async with served() as other:
        with pytest.raises(StartError, match=f"{other.port} is in use"):
            async with serving(manager, port=other.port):
                pass
    async with served(manager) as server, Raw.open(server) as client:
        assert await client.run("echo now") == "now"


async def test_two_managers_in_one_loop_know_nothing_of_each_other() -> None:
    one, two = WebSocketManager(), WebSocketManager()

    @one.commands.command
    def only_one() -> str:
        return "one"

    async with (
        served(one) as first, served(two) as second,
        Raw.open(first) as a, Raw.open(second) as b,
    ):  # fmt: skip
        assert first.port != second.port
        assert one.notify("to one") == 1
        assert (await a.next_of("notification"))["data"]["message"] == "to one"
        assert await a.run("only_one") == "one"
        assert (await b.ask(EXECUTE, command="only_one"))["data"]["code"] == "unknown_command"
        assert await b.received() == []


async def test_server_closes_once_however_often_it_is_asked() -> None:
    manager = WebSocketManager()
    async with served(manager) as server, Raw.open(server) as client:
        port = server.port
        tasks = {server.close(), server.close()}
        assert len(tasks) == 1
        assert await client.closed() == (1012, "service restart")
        await asyncio.gather(server.close(), server.wait_closed(), *tasks)
        with pytest.raises(ConnectionRefusedError):
            await connect(f"ws://127.0.0.1:{port}/ws")


async def test_serve_runs_until_it_is_cancelled() -> None:
    manager = WebSocketManager()
    task = asyncio.create_task(karna_ws.serve(manager, port=0))
    await until(lambda: manager.loop is not None)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert manager.loop is None
    assert {service.state for service in manager.services.values()} == {"stopped"}


# --- 10 main -------------------------------------------------------------------------------------


def run_main(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the server's command line, for flags that end it at once."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("KARNA_")}
    return subprocess.run(
        [sys.executable, str(SERVER_FILE), *arguments],
        env=clean | environment, capture_output=True, text=True, timeout=20, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def parsed(*arguments: str) -> Config:
    """The Config that these flags and the present environment make."""
    found = vars(karna_ws.make_parser().parse_args(arguments))
    return make_config({name: found[name] for name in Config.__dataclass_fields__})


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in os.environ:
        if name.startswith("KARNA_"):
            monkeypatch.delenv(name)
    return monkeypatch


# Every option: its flag with a value, and what that value means.
FLAGS: dict[str, tuple[str, Any]] = {
    "host": ("--host=::1", "::1"),
    "port": ("--port=9000", 9000),
    "unix": ("--unix=/tmp/k.sock", "/tmp/k.sock"),
    "certfile": ("--certfile=cert.pem", "cert.pem"),
    "keyfile": ("--keyfile=key.pem", "key.pem"),
    "reuse_port": ("--reuse-port", True),
    "token": ("--token=secret", "secret"),
    "allow_origin": ("--allow-origin=https://a.example", ("https://a.example",)),
    "allow_host": ("--allow-host=a.example", ("a.example",)),
    "insecure_no_token": ("--insecure-no-token", True),
    "max_clients": ("--max-clients=5", 5),
    "max_message_bytes": ("--max-message=2000", 2000),
    "max_body_bytes": ("--max-body=2000", 2000),
    "max_running_commands": ("--max-running-commands=5", 5),
    "max_unsent_bytes": ("--max-unsent=2000", 2000),
    "command_timeout_s": ("--command-timeout=1.5", 1.5),
    "open_timeout_s": ("--open-timeout=1.5", 1.5),
    "close_timeout_s": ("--close-timeout=1.5", 1.5),
    "grace_s": ("--grace=0", 0),
    "ping_interval_s": ("--ping-interval=0.5", 0.5),
    "ping_timeout_s": ("--ping-timeout=0.5", 0.5),
    "connect_timeout_s": ("--connect-timeout=0.5", 0.5),
    "namespaces": ("--namespace=/chat", ("/chat",)),
    "history_messages": ("--history-messages=0", 0),
    "history_bytes": ("--history-bytes=0", 0),
    "recovery": ("--no-recovery", False),
    "backplane": ("--backplane=redis://localhost", "redis://localhost"),
    "loop": ("--loop=asyncio", "asyncio"),
}


def test_every_option_has_a_flag_and_an_environment_variable(
    clean_environment: pytest.MonkeyPatch,
) -> None:
    assert set(FLAGS) == set(Config.__dataclass_fields__)
    assert parsed() == Config()
    for name, (flag, value) in FLAGS.items():
        needed = ["--certfile=cert.pem"] if name == "keyfile" else []
        assert getattr(parsed(flag, *needed), name) == value, flag
        variable, _, text = flag.removeprefix("--").partition("=")
        if name == "recovery":
            variable, text = "recovery", "0"
        variable = "KARNA_" + variable.replace("-", "_").upper()
        clean_environment.setenv(variable, text or "1")
        assert getattr(parsed(*needed), name) == value, variable
        clean_environment.delenv(variable)


def test_flag_wins_over_environment_and_lists_add_up(
    clean_environment: pytest.MonkeyPatch,
) -> None:
    clean_environment.setenv("KARNA_PORT", "9000")
    clean_environment.setenv("KARNA_ALLOW_HOST", "a.example, b.example,")
    clean_environment.setenv("KARNA_MAX_CLIENTS", "")
    config = parsed("--port", "9001", "--allow-host", "c.example")
    assert (config.port, config.max_clients) == (9001, 1000)
    assert config.allow_host == ("a.example", "b.example", "c.example")
    assert parsed().allow_host == ("a.example", "b.example"), "parsing leaves no trace"


def test_help_names_every_option_in_its_group() -> None:
    shown = run_main("--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    for flag, _ in FLAGS.values():
        assert flag.partition("=")[0] in shown.stdout
    for flag in ("--allow-program", "--vision-url", "--vision-model", "--language-url",
                 "--language-model", "--log-level", "--version"):  # fmt: skip
        assert flag in shown.stdout
    for title in karna_ws.GROUPS.values():
        assert f"\n{title}:\n" in shown.stdout
    assert run_main("--version").stdout == f"karna_ws {karna_ws.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "environment", "part"),
    [
        (["--nope"], {}, "--nope"),
        (["stray"], {}, "stray"),
        (["--port", "high"], {}, "--port"),
        (["--port", "99999"], {}, "--port must be 65535 at most"),
        (["--max-clients", "0"], {}, "--max-clients must be 1 or more"),
        (["--ping-timeout", "nan"], {}, "--ping-timeout must be"),
        (["--grace", "-1"], {}, "--grace must be 0 or more"),
        (["--loop", "trio"], {}, "--loop must be"),
        (["--log-level", "loud"], {}, "--log-level"),
        (["--allow-origin", "nonsense"], {}, "--allow-origin must"),
        (["--max-message", "1"], {}, "--max-message must be 128 or more"),
        (["--language-model", "x"], {}, "--language-model needs --language-url"),
        (["--allow-program", "no-such-program-here"], {}, "no-such-program-here"),
        (["--certfile", "/nonexistent.pem", "--port", "0"], {}, "/nonexistent.pem"),
        (["--host", "0.0.0.0", "--port", "0"], {}, "--insecure-no-token"),
        ([], {"KARNA_PORT": "high"}, "--port"),
        ([], {"KARNA_REUSE_PORT": "maybe"}, "KARNA_REUSE_PORT must be 1 or 0"),
        ([], {"KARNA_LOG_LEVEL": "loud"}, "loud"),
    ],
    ids=str,
)
def test_wrong_command_line_ends_with_one_line_and_exit_code_2(
    arguments: list[str], environment: dict[str, str], part: str
) -> None:
    ended = run_main(*arguments, **environment)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith("karna_ws: ") and part.lower() in ended.stderr.lower()
    assert ended.stderr.count("\n") == 1


def test_misspelt_variable_is_reported_with_what_it_may_mean() -> None:
    ended = run_main("--port", "nope", KARNA_PROT="1")
    assert "KARNA_PROT" not in ended.stderr  # an error is one line
    logged: list[tuple[Any, ...]] = []
    names = ["KARNA_PROT", "KARNA_MAX_CLIENT", "KARNA_SOMETHING_ELSE", "KARNA_GRACE", "PORT",
             "KARNA_LOG_LEVEL", "KARNA_VISION_KEY", "KARNA_RECOVERY", "KARNA_MAX_UNSENT"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(karna_ws.log, "warning", lambda text, *values: logged.append(values))
        karna_ws.warn_of_misspelt(names, vars(karna_ws.make_parser().parse_args([])))
    assert logged == [("KARNA_PROT", "KARNA_PORT"), ("KARNA_MAX_CLIENT", "KARNA_MAX_CLIENTS")]


# --- who may come in, limits, frames, lifecycle -----------------------------------------------

HERE = Path(karna_ws.__file__).resolve().parent
TOKEN = "correct-horse"


@contextlib.asynccontextmanager
async def hardening_serving(
    manager: WebSocketManager, **options: Any
) -> AsyncIterator[karna_ws.Server]:
    """A server whose services have started: no broadcast of their states comes in between."""
    async with karna_ws.serving(manager, **options) as server:
        services = manager.services.values()
        await until(lambda: all(service.state != "starting" for service in services))
        await until(lambda: not manager._pending)
        yield server


# Peers that write bytes.


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
        size = 0 if to_head or status in ("101", "100") else int(headers.get("content-length", 0))
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
    """An HTTP head. A header that is None is left out, one that is a list comes once for each."""
    lines = [f"{method} {target} HTTP/1.1"]
    for name, value in {"Host": "localhost", **(headers or {})}.items():
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
        if answer.status != 101:
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


def command(line: str, id: Any = None, /, **params: Any) -> dict[str, Any]:
    return request("execute_command", id, command=line, **params)


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


# --- who may come in ---------------------------------------------------------------------------

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

BAD_HOSTS: list[tuple[Any, int, str | None]] = [
    (None, 400, None),
    (["localhost", "localhost"], 400, None),
    (["localhost", "evil.example"], 400, None),
    ("", 400, None),
    ("localhost evil.example", 400, None),
    ("localhost, evil.example", 400, None),
    ("localhost:", 400, None),
    ("localhost:x", 400, None),
    ("localhost:123456", 400, None),
    ("user@localhost", 400, None),
    ("localhost/evil", 400, None),
    ("http://localhost", 400, None),
    ("::1", 400, None),
    ("[::1", 400, None),
    ("[fe80::1%25eth0]", 400, None),
    ("löcalhost", 400, None),
    ("evil.example", 403, "--allow-host evil.example"),
    ("evil.example:8000", 403, "--allow-host evil.example"),
    ("EVIL.example", 403, "--allow-host evil.example"),
    ("localhost.evil.example", 403, "--allow-host localhost.evil.example"),
    ("evil.localhost", 403, "--allow-host evil.localhost"),
    ("localhost.", 403, "--allow-host localhost."),
    ("127.0.0.1.nip.io", 403, "--allow-host 127.0.0.1.nip.io"),
    ("127.1", 403, "--allow-host 127.1"),
    ("0x7f.0.0.1", 403, "--allow-host"),
    ("0177.0.0.1", 403, "--allow-host"),
    ("2130706433", 403, "--allow-host"),
    ("127.0.0.1.", 403, "--allow-host"),
    ("[127.0.0.1]", 403, "--allow-host"),
    ("karna.example.evil", 403, "--allow-host"),
]
GOOD_HOSTS = [
    "localhost", "localhost:8000", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:8000", "192.168.1.7:80",
    "[::1]", "[::1]:8000", "[::ffff:127.0.0.1]", "karna.example", "Karna.Example:443",
]  # fmt: skip
BAD_ORIGINS: list[Any] = [
    "", "null", "NULL", "*", "file://", "file:///etc/passwd", "about:blank", "data:text/html,x",
    "chrome-extension://abcdefghijklmnop", "moz-extension://11111111-2222", "vscode-webview://x",
    "http://evil.example", "https://evil.example", "http://evil.example:8000",
    "http://localhost.evil.example", "http://evil.localhost", "http://localhost.", "http://127.0.0.2",
    "http://127.1", "http://0.0.0.0", "http://[::]", "http://localhost@evil.example",
    "http://evil.example#localhost", "http://localhost/", "http://localhost:", "http://localhost:x",
    "http://localhost:123456", "ws://localhost", "wss://localhost", "ftp://localhost", "localhost",
    "localhost:8000", "//localhost", "HTTP://LOCALHOST", "http://localhost http://evil.example",
    "http://localhost, http://evil.example", "http://evil.example/http://localhost",
    "https://app.example.evil", "https://app.example:444", "http://app.example", "https://APP.example",
    "http://[::1", "http://\xe9vil.example", "http://evil.example\x9b31m", "a" * 6000,
    ["http://localhost", "http://localhost"], ["http://localhost", "http://evil.example"],
    ["null", "null"],
]  # fmt: skip
GOOD_ORIGINS = [
    None, "http://localhost", "https://localhost", "http://localhost:3000", "http://127.0.0.1:5173",
    "https://[::1]:1", "http://[::1]", "https://app.example",
]  # fmt: skip


@pytest.mark.parametrize("door", DOORS)
async def test_every_door_refuses_bad_hosts_and_takes_good_ones(door: str) -> None:
    async with hardening_serving(
        WebSocketManager(), port=0, allow_host=["karna.example"]
    ) as server:
        for host, status, flag in BAD_HOSTS:
            answer = await ask(server.port, DOORS[door]({"Host": host}))
            code = "forbidden" if status == 403 else "invalid_request"
            assert (answer.status, answer.error["code"]) == (status, code), host
            assert flag is None or flag in answer.error["message"], host
            assert "access-control-allow-origin" not in answer.headers
        for host in GOOD_HOSTS:
            answer = await ask(server.port, DOORS[door]({"Host": host}))
            assert answer.status == WELCOMED.get(door, 200), host


@pytest.mark.parametrize("door", DOORS)
async def test_every_door_refuses_bad_origins_and_takes_good_ones(door: str) -> None:
    async with hardening_serving(
        WebSocketManager(), port=0, allow_origin=["https://app.example"]
    ) as server:
        for origin in BAD_ORIGINS:
            answer = await ask(server.port, DOORS[door]({"Origin": origin}))
            assert (answer.status, answer.error["code"]) == (403, "forbidden"), origin
            assert "access-control-allow-origin" not in answer.headers
            assert answer.headers["vary"] == "Origin"
        for origin in GOOD_ORIGINS:
            answer = await ask(server.port, DOORS[door]({"Origin": origin}))
            assert answer.status == WELCOMED.get(door, 200), origin
            if answer.status != 101:
                assert answer.headers.get("access-control-allow-origin") == origin
                assert answer.headers["vary"] == "Origin"


@pytest.mark.parametrize("door", DOORS)
async def test_origin_that_equals_host_is_allowed_once_host_has_passed(door: str) -> None:
    same = [
        ("karna.example", "http://karna.example"),
        ("karna.example", "https://karna.example"),
        ("karna.example:80", "http://karna.example"),
        ("karna.example:443", "https://karna.example"),
        ("KARNA.example:8443", "https://karna.example:8443"),
        ("192.168.1.7:8000", "http://192.168.1.7:8000"),
    ]
    other = [
        ("evil.example", "http://evil.example"),  # the rebinding attack
        ("karna.example:8443", "https://karna.example"),
        ("karna.example", "ws://karna.example"),
        ("192.168.1.7:8000", "http://192.168.1.7:8001"),
    ]
    async with hardening_serving(
        WebSocketManager(), port=0, allow_host=["karna.example"]
    ) as server:
        for host, origin in same:
            answer = await ask(server.port, DOORS[door]({"Host": host, "Origin": origin}))
            assert answer.status == WELCOMED.get(door, 200), (host, origin)
        for host, origin in other:
            answer = await ask(server.port, DOORS[door]({"Host": host, "Origin": origin}))
            assert answer.status == 403, (host, origin)


async def test_refusal_names_the_flag_only_where_it_would_help() -> None:
    async with hardening_serving(WebSocketManager(), port=0) as server:
        for origin in ("https://evil.example", "chrome-extension://abc"):
            answer = await ask(server.port, upgrade(headers={"Origin": origin}))
            assert f"--allow-origin {origin} would" in answer.error["message"]
        for origin in ("null", "", "file://", "http://localhost/", "http://evil.example\x9b31m"):
            answer = await ask(server.port, upgrade(headers={"Origin": origin}))
            assert "--allow-origin" not in answer.error["message"], origin
            assert "\x9b" not in answer.error["message"]


BAD_TOKENS: list[Headers] = [
    {},
    {"Authorization": ""},
    {"Authorization": "Bearer"},
    {"Authorization": "Bearer "},
    {"Authorization": "Bearer wrong"},
    {"Authorization": f"Bearer {TOKEN}x"},
    {"Authorization": f"Bearer {TOKEN[:-1]}"},
    {"Authorization": f"Bearer {TOKEN.upper()}"},
    {"Authorization": f"Bearer {TOKEN}, Bearer {TOKEN}"},
    {"Authorization": [f"Bearer {TOKEN}", f"Bearer {TOKEN}"]},
    {"Authorization": ["Bearer wrong", f"Bearer {TOKEN}"]},
    {"Authorization": f"Basic {TOKEN}"},
    {"Authorization": TOKEN},
    {"Authorization": "Bearer \xff\xfe"},
    {"Cookie": f"token={TOKEN}"},
    {"X-Token": TOKEN},
]
BAD_QUERIES = ["token=", "token=wrong", f"Token={TOKEN}", f"token=wrong&token={TOKEN}", "token=%ff"]
NEEDS_TOKEN = ["raw", "get", "post", "rpc", "metrics"]


@pytest.mark.parametrize("door", NEEDS_TOKEN)
async def test_every_door_refuses_bad_tokens_and_takes_the_right_one(door: str) -> None:
    async with hardening_serving(WebSocketManager(), port=0, token=TOKEN) as server:
        for headers in BAD_TOKENS:
            answer = await ask(server.port, DOORS[door](headers))
            assert (answer.status, answer.error["code"]) == (401, "unauthorized"), headers
            assert answer.headers["www-authenticate"] == "Bearer"
            assert TOKEN not in str(answer)
        for scheme in ("Bearer", "bearer", "BEARER"):
            answer = await ask(server.port, DOORS[door]({"Authorization": f"{scheme} {TOKEN}"}))
            assert answer.status == WELCOMED.get(door, 200)


async def test_query_token_opens_the_doors_and_a_wrong_one_does_not() -> None:
    async with hardening_serving(WebSocketManager(), port=0, token=TOKEN) as server:
        for query in BAD_QUERIES:
            assert (await ask(server.port, upgrade(f"/ws?{query}"))).status == 401, query
            assert (await ask(server.port, head("GET", f"/metrics?{query}"))).status == 401, query
        assert (await ask(server.port, upgrade(f"/ws?token={TOKEN}"))).status == 101
        assert (await ask(server.port, upgrade(f"/ws/?since=x&token={TOKEN}"))).status == 101
        wrong_header = {"Authorization": "Bearer wrong"}
        assert (await ask(server.port, upgrade(f"/ws?token={TOKEN}", wrong_header))).status == 401


@pytest.mark.parametrize("query", ["EIO=4", "EIO=4&transport=websocket", "EIO=3", "EIO=", "eio=4"])
@pytest.mark.parametrize(
    "path", ["/ws", "/metrics", "/api/status", "/api/execute_command", "/rpc", "/nowhere"]
)
async def test_engine_query_on_another_path_does_not_bypass_the_token(
    path: str, query: str
) -> None:
    async with hardening_serving(WebSocketManager(), port=0, token=TOKEN) as server:
        target = f"{path}?{query}"
        for plain in (
            head("GET", target),
            post(target, {"command": "time", "jsonrpc": "2.0", "method": "get_status", "id": 1}),
            head("DELETE", target),
        ):
            answer = await ask(server.port, plain)
            assert answer.status in (400, 401) and b"time" not in answer.body
        answer = await ask(server.port, upgrade(target))
        if query != "EIO=4&transport=websocket":
            assert answer.status in (400, 401)
            return
        async with raw(server.port, target) as peer:  # the Socket.IO door, which asks at CONNECT
            assert (await peer.frame()).payload[:2] == b"0{"
            await peer.send(frame(1, b"40/ws,"))
            assert (await peer.frame()).payload.startswith(b"44/ws,")
            await peer.send(frame(1, b'42/ws,0["rpc",{"method":"get_status"}]'))
            assert (await peer.closed()).code == 1002


async def test_health_page_and_preflight_need_no_token() -> None:
    async with hardening_serving(WebSocketManager(), port=0, token=TOKEN) as server:
        for request_head in (
            head("GET", "/health"), head("HEAD", "/health"), head("GET", "/"), head("HEAD", "/"),
            DOORS["preflight"]({"Origin": "http://localhost:3000"}),
        ):  # fmt: skip
            assert (await ask(server.port, request_head)).status in (200, 204)
        for path in ("/health/", "//health", "/Health", "/health%2f", "/.", "/index.html", "/ws"):
            assert (await ask(server.port, head("GET", path))).status == 401, path


BAD_CONNECTS = [
    b"40/ws,", b"40", b"40/ws,{}", b'40/ws,{"token":null}', b'40/ws,{"token":""}',
    b'40/ws,{"token":"wrong"}', b'40/ws,{"token":["correct-horse"]}', b'40/ws,{"token":1}',
    b'40/ws,{"token":true}', b'40/ws,{"Token":"correct-horse"}',
    b'40/ws,{"token":"correct-hors\xc3\xa9"}',
    b'40/ws,{"token":"\\u0000correct-horse"}',
]  # fmt: skip


async def test_socket_io_token_is_asked_with_every_connect() -> None:
    good = b'{"token":"%b"}' % TOKEN.encode()
    async with hardening_serving(WebSocketManager(), port=0, token=TOKEN) as server:
        async with engine(server.port, connect=None) as peer:
            for connect in BAD_CONNECTS:
                await peer.send(frame(1, connect))
                answer = (await peer.frame()).payload
                prefix = b"44/ws," if b"/ws" in connect else b"44"
                error = json.loads(answer.removeprefix(prefix))
                assert error["data"] == {"code": "unauthorized"} and "token" in error["message"]
            await peer.send(frame(1, b"40/ws," + good))
            assert (await peer.frame()).payload.startswith(b'40/ws,{"sid"')
            await peer.send(frame(1, b"40"))  # another namespace, another CONNECT
            assert (await peer.frame()).payload.startswith(b"44{")
            await peer.send(frame(1, b"41/ws,") + frame(1, b"40/ws,"))
            assert (await peer.frame()).payload.startswith(b"44/ws,{")
        async with engine(server.port, {"Authorization": f"Bearer {TOKEN}"}) as peer:
            await peer.send(frame(1, b"40"))  # the handshake had it: no CONNECT needs it
            assert (await peer.frame()).payload.startswith(b"40{")


async def test_event_before_the_token_closes_the_session() -> None:
    async with hardening_serving(WebSocketManager(), port=0, token=TOKEN) as server:
        for packet in (b'42["rpc",{}]', b'42/ws,0["rpc",{}]', b'451-["rpc",{}]', b"41", b"43[]"):
            async with engine(server.port, connect=None) as peer:
                await peer.send(frame(1, packet))
                assert (await peer.closed()).code == 1002


async def test_namespaces_beyond_the_served_ones_are_refused() -> None:
    async with (
        hardening_serving(WebSocketManager(), port=0) as server,
        engine(server.port, connect=None) as peer,
    ):
        for name in (b"/admin", b"/ws/x", b"/WS", b"/ws?token=x", b"//"):
            await peer.send(frame(1, b"40" + name + b","))
            answer = (await peer.frame()).payload
            assert answer == b"44" + name + b',{"message":"Invalid namespace"}'


BAD_TYPES = [
    None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
    "application/jsonx", "application/json2; charset=utf-8", "text/plain; application/json",
    "text/plain, application/json", "application/json, text/plain", "application/ json", "json",
    ["text/plain", "application/json"], ["application/json", "text/plain"],
]  # fmt: skip


@pytest.mark.parametrize("target", ["/api/execute_command", "/api/notify", "/rpc"])
async def test_post_takes_json_alone(target: str) -> None:
    async with hardening_serving(WebSocketManager(), port=0) as server:
        for kind in BAD_TYPES:
            answer = await ask(server.port, post(target, {}, {"Content-Type": kind}))
            assert (answer.status, answer.error["code"]) == (415, "invalid_request"), kind
            assert "application/json" in answer.error["message"]
        for kind in ("application/json", "Application/JSON", "application/json;charset=utf-8"):
            answer = await ask(server.port, post(target, {}, {"Content-Type": kind}))
            assert answer.status != 415


async def test_cross_site_post_needs_an_allowed_origin() -> None:
    value = {"command": "time"}
    async with hardening_serving(
        WebSocketManager(), port=0, allow_origin=["https://app.example"]
    ) as server:
        for site, origin, status in (
            ("cross-site", None, 403),
            ("cross-site", "https://evil.example", 403),
            ("cross-site", "null", 403),
            ("cross-site", "https://app.example", 200),
            ("same-origin", "https://evil.example", 403),
            ("same-origin", None, 200),
            ("same-site", None, 200),
            ("none", None, 200),
            (None, None, 200),
        ):
            for target in ("/api/execute_command",):
                headers = {"Sec-Fetch-Site": site, "Origin": origin}
                answer = await ask(server.port, post(target, value, headers))
                assert answer.status == status, (site, origin)
                if status == 403:
                    assert answer.error["code"] == "forbidden"


async def test_preflight_names_methods_headers_and_the_private_network() -> None:
    asked = {
        "Origin": "http://localhost:3000",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
        "Access-Control-Request-Private-Network": "true",
    }
    async with hardening_serving(WebSocketManager(), port=0, token=TOKEN) as server:
        answer = await ask(server.port, head("OPTIONS", "/api/execute_command", asked))
        assert (answer.status, answer.body) == (204, b"")
        assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"
        assert answer.headers["access-control-allow-methods"] == "POST, OPTIONS"
        assert answer.headers["access-control-allow-headers"] == "Authorization, Content-Type"
        assert answer.headers["access-control-allow-private-network"] == "true"
        assert answer.headers["vary"] == "Origin"
        assert "content-length" not in answer.headers  # RFC 9110, 8.6: not with 204
        refused = await ask(server.port, head("OPTIONS", "/rpc", {**asked, "Origin": "null"}))
        assert refused.status == 403
        assert not [name for name in refused.headers if name.startswith("access-control")]


async def test_refused_post_has_no_effect() -> None:
    manager, ran = WebSocketManager(), []

    @manager.commands.command
    def touch() -> None:
        """Leave a trace."""
        ran.append(1)

    refused: list[Headers] = [
        {"Origin": "https://evil.example"}, {"Host": "evil.example"},
        {"Content-Type": "text/plain"},
        {"Sec-Fetch-Site": "cross-site"}, {"Authorization": None}, {"Origin": ["null", "null"]},
    ]  # fmt: skip
    async with hardening_serving(manager, port=0, token=TOKEN) as server:
        allowed: Headers = {"Authorization": f"Bearer {TOKEN}"}
        for headers in refused:
            request_ = post("/api/execute_command", {"command": "touch"}, {**allowed, **headers})
            assert (await ask(server.port, request_)).status in (400, 401, 403, 415)
        assert not ran
        answer = await ask(server.port, post("/api/execute_command", {"command": "touch"}, allowed))
        assert answer.status == 200 and ran == [1]


SECRETS = [TOKEN, "other-secret", "hush-hush", "query-secret", "from-elsewhere"]


async def test_logs_never_hold_tokens_queries_or_auth_payloads(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    manager = WebSocketManager()

    @manager.on("connect")
    async def connect(client: Client, auth: dict[str, Any]) -> None:
        if auth.get("fail"):
            raise RuntimeError("no")

    async with hardening_serving(manager, port=0, token=TOKEN) as server:
        port = server.port
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        for request_ in (
            upgrade(f"/ws?token={TOKEN}&x=query-secret"),
            upgrade("/ws?token=other-secret"),
            upgrade("/nowhere?token=other-secret"),
            upgrade(f"/ws?token={TOKEN}", {"Origin": "https://evil.example"}),
            upgrade(f"/ws?token={TOKEN}", {"Host": "evil.example"}),
            upgrade("/ws", {"Authorization": "Bearer other-secret"}),
            upgrade("/ws", {**bearer, "Sec-WebSocket-Version": "7"}),
            head("GET", f"/metrics?token={TOKEN}"),
            head("GET", f"/api/status?token={TOKEN}&{'x=1&' * 200}"),
            head("BREW", f"/rpc?token={TOKEN}"),
            post(f"/api/execute_command?token={TOKEN}", b"{not json hush-hush"),
            post("/rpc", b"hush-hush", bearer),
            head("GET", f"/rpc?query-secret={'x' * 9000}", bearer),
            f"GET /?token={TOKEN} HTTP/9\r\n\r\n".encode(),
        ):
            await ask(port, request_)
        async with engine(port, connect=None) as peer:
            for auth in ({"token": "other-secret"}, {"token": TOKEN, "fail": 1, "x": "hush-hush"}):
                await peer.send(frame(1, b"40/ws," + json.dumps(auth).encode()))
                assert (await peer.frame()).payload.startswith(b"44/ws,")
            await peer.send(frame(1, b'40/ws,{"token":"hush-hush"'))
            assert (await peer.closed()).code == 1002
        async with raw(port, f"/ws?token={TOKEN}&since=query-secret") as peer:
            await peer.send(frame(1, b"\xff hush-hush"))
            assert (await peer.closed()).code == 1007
    shown = caplog.text + repr(server.config) + repr(manager)
    assert "evil.example" in caplog.text  # logs were captured
    assert not [secret for secret in SECRETS if secret in shown]


async def test_flood_of_refused_handshakes_logs_little(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "karna_ws")
    async with hardening_serving(WebSocketManager(), port=0) as server:
        for number in range(400):  # a page can make up origins as it likes
            answer = await ask(
                server.port, upgrade(headers={"Origin": f"http://e{number}.example"})
            )
            assert answer.status == 403
        for _ in range(50):
            await ask(server.port, upgrade(headers={"Host": "evil.example"}))
        assert len(server.manager.log_gate._counts) < 100
        assert (await get_metrics(server.port))["karna_refused_total{reason=forbidden}"] == 450
    refusals = [record for record in caplog.records if "refused" in record.getMessage()]
    assert 1 <= len(refusals) <= 60


async def test_bind_beyond_loopback_needs_a_token() -> None:
    for host in ("0.0.0.0", "::", ""):
        with pytest.raises(karna_ws.StartError, match="--token or KARNA_TOKEN"):
            async with hardening_serving(WebSocketManager(), host=host, port=0):
                pass
    for options in ({"token": TOKEN}, {"insecure_no_token": True}):
        async with hardening_serving(
            WebSocketManager(), host="0.0.0.0", port=0, **options
        ) as server:
            assert server.port


@pytest.mark.parametrize("token", ["", " ", " x", "x ", "x\n", "p\xe4ss", "\udcff", "a\x00b"])
def test_token_that_no_header_could_carry_is_refused(token: str) -> None:
    with pytest.raises(ValueError, match="token"):
        karna_ws.Config(token=token)


# --- raw HTTP ----------------------------------------------------------------------------------


async def test_head_split_at_every_byte_is_read_the_same() -> None:
    async with hardening_serving(WebSocketManager(), port=0) as server:
        for whole, expected in (
            (post("/api/execute_command", {"command": "echo hi"}), b'"result":"hi"'),
            (upgrade(), b"101 Switching"),
        ):
            for cut in range(1, len(whole)):
                async with dial(server.port) as peer:
                    peer.writer.write(whole[:cut])
                    await asyncio.sleep(0)
                    peer.writer.write(whole[cut:])
                    await peer.reader.readuntil(expected)


async def test_request_one_byte_at_a_time_is_read_the_same() -> None:
    async with hardening_serving(WebSocketManager(), port=0) as server, dial(server.port) as peer:
        peer.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        message = frame(1, json.dumps(command("echo hi", 7)).encode())
        for byte in upgrade() + message:
            peer.writer.write(bytes((byte,)))
            await asyncio.sleep(0)
        assert (await peer.answer()).status == 101
        assert (await peer.json())["data"]["result"] == "hi"


async def test_handshake_and_first_messages_may_come_in_one_piece() -> None:
    async with hardening_serving(WebSocketManager(), port=0) as server, dial(server.port) as peer:
        messages = [frame(1, json.dumps(command(f"echo {n}", n)).encode()) for n in range(3)]
        data = upgrade() + b"".join(messages)
        await peer.send(data)
        assert (await peer.answer()).status == 101
        assert [(await peer.json())["data"]["result"] for _ in range(3)] == ["0", "1", "2"]
        assert server.manager.bytes_in == len(data)


async def test_pipelined_requests_get_one_answer_and_the_end() -> None:
    async with hardening_serving(WebSocketManager(), port=0) as server:
        body = post("/api/execute_command", {"command": "echo once"})
        for first in (head("GET", "/health"), body, head("GET", "/nowhere")):
            async with dial(server.port) as peer:
                await peer.send(first + body * 200 + upgrade())
                answer = await peer.answer()
                assert answer.headers["connection"] == "close"
                assert await peer.at_end()
        await until(lambda: not server.manager.connections)


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
    (b"GET http://localhost/health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
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
    (upgrade("/ws", {"Transfer-Encoding": "chunked"}) + b"0\r\n\r\n", 411),
    (upgrade("/ws").replace(b"GET", b"POST"), 405),
    (upgrade("/ws").replace(b"HTTP/1.1", b"HTTP/1.0"), 505),
]


async def test_malformed_requests_get_their_status_and_an_error() -> None:
    async with hardening_serving(WebSocketManager(), port=0) as server:
        for data, status in BAD_HEADS:
            answer = await ask(server.port, data)
            assert answer.status == status, data
            if ENGINE.partition("?")[0].encode() not in data:  # socket.io has words of its own
                assert answer.error["code"] == "invalid_request", data
            assert answer.headers["cache-control"] == "no-store"
        assert (await ask(server.port, head("GET", "/health"))).status == 200


async def test_malformed_heads_split_at_every_byte_get_the_same_status() -> None:
    async with hardening_serving(WebSocketManager(), port=0) as server:
        for data, status in BAD_HEADS[::3]:
            if len(data) > 250:
                continue
            for cut in range(1, len(data), 7):
                async with dial(server.port) as peer:
                    peer.writer.write(data[:cut])
                    await asyncio.sleep(0)
                    peer.writer.write(data[cut:])
                    assert (await peer.answer()).status == status, data


async def test_refusals_tell_what_would_be_right() -> None:
    async with hardening_serving(WebSocketManager(), port=0) as server:
        port = server.port
        doors = (await ask(port, head("GET", "/nowhere"))).error["doors"]
        assert {"/ws", "/socket.io/", "/health", "/api/execute_command"} <= set(doors)
        for target, allow in (("/health", "GET, HEAD, OPTIONS"), ("/rpc", "POST, OPTIONS")):
            answer = await ask(port, head("DELETE", target))
            assert (answer.status, answer.headers["allow"]) == (405, allow)
            options = await ask(port, head("OPTIONS", target))
            assert (options.status, options.headers["allow"]) == (204, allow)
        answer = await ask(port, upgrade(headers={"Sec-WebSocket-Version": "12"}))
        assert (answer.status, answer.headers["upgrade"]) == (426, "websocket")
        assert answer.headers["sec-websocket-version"] == "13"  # RFC 6455, 4.2.2
        old = await ask(port, head("GET", "/health").replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert (old.status, old.json) == (200, {"status": "healthy"})


async def test_head_answers_as_get_without_the_body() -> None:
    async with hardening_serving(WebSocketManager(), port=0) as server:
        for path in ("/", "/health", "/api/status", "/nowhere", "/ws", "/rpc"):
            get = await ask(server.port, head("GET", path))
            without = await ask(server.port, head("HEAD", path))
            assert (without.status, without.body) == (get.status, b"")
            assert without.headers["content-type"] == get.headers["content-type"]
            assert without.headers["content-length"] == get.headers["content-length"]


BAD_LENGTHS: list[tuple[Headers, int]] = [
    ({"Content-Length": None}, 411),
    ({"Content-Length": None, "Transfer-Encoding": "chunked"}, 411),
    ({"Transfer-Encoding": "chunked"}, 411),
    ({"Transfer-Encoding": "identity"}, 411),
    ({"transfer-encoding": ""}, 411),
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
    async with hardening_serving(WebSocketManager(), port=0) as server:
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


async def test_expect_continue_is_answered_before_the_body_and_refusals_at_once() -> None:
    async with hardening_serving(WebSocketManager(), port=0, max_body_bytes=100) as server:
        body = b'{"command":"echo hi"}'
        for size, status in ((len(body), 100), (101, 413)):
            async with dial(server.port) as peer:
                expect = {"Expect": "100-continue", "Content-Length": size}
                await peer.send(post("/api/execute_command", b"", expect))
                assert (await peer.answer()).status == status
                if status == 100:
                    await peer.send(body)
                    assert (await peer.answer()).json["data"]["result"] == "hi"


# --- limits at their edges ---------------------------------------------------------------------


def in_fragments(opcode: int, payload: bytes, count: int) -> bytes:
    size = -(-len(payload) // count)
    parts = [payload[n * size : (n + 1) * size] for n in range(count)]
    return b"".join(
        frame(0 if number else opcode, part, fin=number == count - 1)
        for number, part in enumerate(parts)
    )


@pytest.mark.parametrize("limit", [128, 1000, 70_000])
async def test_message_limit_is_exact_for_frames_and_fragments(limit: int) -> None:
    async with hardening_serving(EchoManager(), port=0, max_message_bytes=limit) as server:
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


async def test_message_limit_needs_no_more_than_the_frame_head_to_be_enforced() -> None:
    async with hardening_serving(WebSocketManager(), port=0) as server:
        for size in (1024 * 1024 + 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1):
            for opcode in (1, 2):
                async with raw(server.port) as peer:
                    start = bytes((0x80 | opcode, 0xFF)) + size.to_bytes(8, "big")
                    await peer.send(start + b"\1\2\3\4")
                    assert (await peer.closed()).code == 1009


async def test_message_limit_holds_on_the_socket_io_door() -> None:
    async with hardening_serving(WebSocketManager(), port=0, max_message_bytes=1000) as server:
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
        (head("GET", "/health", {f"X-{n}": "y" for n in range(127)}), 200),  # and Host
        (head("GET", "/health", {f"X-{n}": "y" for n in range(128)}), 431),
        (head("GET", "/health", {f"X-{n}": "y" for n in range(3000)}), 431),
        (padded_head(65535), 200),
        (padded_head(65536), 200),
        (padded_head(65537), 431),
        (padded_head(150_000), 431),
    ]
    async with hardening_serving(WebSocketManager(), port=0) as server:
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
            hardening_serving(WebSocketManager(), port=0) as server,
            dial(server.port) as peer,
        ):
            for start in range(0, len(endless), 1000):
                peer.writer.write(endless[start : start + 1000])
                await asyncio.sleep(0)
            answer = await peer.answer()
            assert (answer.status, answer.error["code"]) == (status, "too_large")


async def test_body_limit_is_exact() -> None:
    async with hardening_serving(WebSocketManager(), port=0, max_body_bytes=100) as server:
        for size, status in ((99, 200), (100, 200), (101, 413)):
            body = json.dumps({"command": "time"}).encode()
            request_ = post("/api/execute_command", body + b" " * (size - len(body)))
            answer = await ask(server.port, request_)
            assert answer.status == status
            if status == 413:
                assert answer.error["code"] == "too_large"
                assert "100 bytes (--max-body)" in answer.error["message"]


async def test_refused_body_is_answered_though_it_is_still_being_sent() -> None:
    async with hardening_serving(WebSocketManager(), port=0) as server:
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
    async with hardening_serving(WebSocketManager(), port=0) as server:
        request_ = post("/api/execute_command", {"command": "echo hi"}) + b"x" * 100_000
        assert (await ask(server.port, request_)).json["data"]["result"] == "hi"


async def test_large_answer_reaches_a_slow_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(karna_ws, "LINGER_S", 0.2)
    manager = WebSocketManager()

    @manager.commands.command
    async def much() -> str:
        """Answer at length."""
        return "x" * 8_000_000

    # The whole answer takes about 1 s: five times what a peer has to read the end of one.
    async with (
        hardening_serving(manager, port=0, open_timeout_s=0.4) as server,
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
        hardening_serving(WebSocketManager(), port=0, open_timeout_s=0.4) as server,
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
    async with hardening_serving(WebSocketManager(), port=0, open_timeout_s=0.3) as server:
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


async def test_session_that_joins_no_namespace_is_closed() -> None:
    async with hardening_serving(
        WebSocketManager(), port=0, connect_timeout_s=0.2, token=TOKEN
    ) as server:
        async with engine(server.port, connect=None) as peer:
            closed = await peer.closed()
            assert (closed.code, closed.reason) == (1008, "no namespace joined in time")
        async with engine(server.port, connect=None) as peer:  # knocking is not joining
            with contextlib.suppress(ConnectionError):
                while not peer.reader.at_eof():
                    await peer.send(frame(1, b'40/ws,{"token":"wrong"}') + frame(1, b"3"))
                    if (await peer.frame()).opcode == 8:
                        break
            assert time.monotonic()


async def test_clients_beyond_the_limit_get_503_on_both_doors() -> None:
    async with hardening_serving(WebSocketManager(), port=0, max_clients=3) as server:
        port = server.port
        async with raw(port), engine(port, connect=None):
            async with raw(port) as third:
                for target in ("/ws", ENGINE):
                    answer = await ask(port, upgrade(target))
                    assert (answer.status, answer.error["code"]) == (503, "unavailable")
                    assert "--max-clients" in answer.error["message"]
                    assert int(answer.headers["retry-after"]) > 0
                assert (await ask(port, head("GET", "/health"))).status == 200
                await third.send(close_frame())
                await third.closed()
            await until(lambda: not server.manager.is_full)
            for target in ("/ws", ENGINE):
                assert (await ask(port, upgrade(target))).status == 101
                await until(lambda: not server.manager.is_full)


async def test_sockets_beyond_clients_and_handshakes_are_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(karna_ws, "PENDING_CONNECTIONS", 20)
    async with hardening_serving(WebSocketManager(), port=0, max_clients=10) as server:
        async with contextlib.AsyncExitStack() as stack:
            peers = [await stack.enter_async_context(dial(server.port)) for _ in range(30)]
            await until(lambda: len(server.manager.connections) == 30)
            for _ in range(50):
                async with dial(server.port) as late:
                    assert await late.at_end()
            assert len(server.manager.connections) == 30
            await peers[0].send(head("GET", "/health"))
            assert (await peers[0].answer()).status == 200
        await until(lambda: not server.manager.connections)
        assert (await ask(server.port, head("GET", "/health"))).status == 200


class Gates:
    """Commands that wait until the test lets them go on, and tell what has begun."""

    def __init__(self, manager: WebSocketManager) -> None:
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}
        manager.commands.command(self.gate)

    async def gate(self, name: str, pad: str = "") -> str:
        """Wait for the test."""
        self.begun.append(name)
        try:
            await self.gates.setdefault(name, asyncio.Event()).wait()
        finally:
            self.ended.append(name)
        return name

    def open(self, *names: str) -> None:
        for name in names:
            self.gates.setdefault(name, asyncio.Event()).set()


async def test_commands_beyond_the_limit_wait_in_order_while_status_and_cancel_go_on() -> None:
    manager = WebSocketManager()
    gates = Gates(manager)
    async with (
        hardening_serving(manager, port=0, max_running_commands=2) as server,
        raw(server.port) as peer,
        raw(server.port) as other,
    ):
        for name in ("a", "b", "c", "d", "e"):
            await peer.send_json(command(f"gate {name}", name))
        await peer.send_json(request("get_status", "s"))
        assert (await peer.json())["id"] == "s"
        assert gates.begun == ["a", "b"]
        await other.send_json(command("echo free", 1))
        assert (await other.json())["data"]["result"] == "free"
        await peer.send_json(request("cancel", "x", id="d"))  # one that waits
        answers = [await peer.json() for _ in range(2)]
        by_id = {answer["id"]: answer for answer in answers}
        assert by_id["d"]["data"]["code"] == "cancelled"
        assert by_id["x"]["data"] == {"cancelled": "d"}
        await peer.send_json(request("cancel", "y", id="a"))  # one that runs
        by_id = {answer["id"]: answer for answer in [await peer.json() for _ in range(2)]}
        assert by_id["a"]["data"]["code"] == "cancelled" and "y" in by_id
        await until(lambda: gates.begun == ["a", "b", "c"])
        gates.open("b", "c", "e")
        assert {(await peer.json())["id"] for _ in range(3)} == {"b", "c", "e"}
        assert gates.begun == ["a", "b", "c", "e"]


async def test_requests_without_id_run_one_after_another_in_order() -> None:
    manager = WebSocketManager()
    gates = Gates(manager)
    async with (
        hardening_serving(manager, port=0, max_running_commands=5) as server,
        raw(server.port) as peer,
    ):
        await peer.send_json(command("gate p", 1))
        for name in ("a", "b", "c"):
            await peer.send_json(command(f"gate {name}"))
        await peer.sync()
        assert gates.begun == ["p", "a"]
        gates.open("c", "b")
        await peer.sync()
        assert gates.begun == ["p", "a"]
        gates.open("a")
        assert [(await peer.json())["data"]["result"] for _ in range(3)] == ["a", "b", "c"]


@pytest.mark.parametrize("door", ["raw", "socket.io"])
async def test_client_is_not_read_past_256_waiting_requests_and_nothing_is_lost(door: str) -> None:
    manager = WebSocketManager()
    gates = Gates(manager)
    async with (
        hardening_serving(manager, port=0, max_running_commands=1) as server,
        (raw if door == "raw" else engine)(server.port) as peer,
    ):
        messages = [command("gate g", 0), *(command(f"echo {n}", n) for n in range(1, 600))]
        texts = [json.dumps(message).encode() for message in messages]
        if door == "socket.io":
            texts = [b'42/ws,%d["rpc",%b]' % (n, text) for n, text in enumerate(texts)]
        await peer.send(b"".join(frame(1, text) for text in texts))
        (connection,) = manager.connections
        await until(lambda: connection._holds)
        assert connection._holds == karna_ws.HOLD_CALLS
        assert connection.waiting == karna_ws.MAX_WAITING + 1
        gates.open("g")
        for number in range(600):
            received = (await peer.frame()).payload
            if door == "socket.io":
                prefix = b"43/ws,%d[" % number
                assert received.startswith(prefix)
                received = received[len(prefix) : -1]
            answer = json.loads(received)
            assert answer["id"] == number
            assert answer["data"]["result"] == ("g" if number == 0 else str(number))
        assert (connection.waiting, connection.waiting_bytes, connection._holds) == (0, 0, 0)


async def test_client_is_not_read_past_a_mebibyte_of_waiting_requests() -> None:
    manager = WebSocketManager()
    gates = Gates(manager)
    async with (
        hardening_serving(manager, port=0, max_running_commands=1) as server,
        raw(server.port) as peer,
    ):
        await peer.send_json(command("gate g", 0))
        sending = asyncio.create_task(
            peer.send(
                b"".join(
                    frame(1, json.dumps(command("gate h", n, pad="x" * 200_000)).encode())
                    for n in range(1, 150)
                )
            )
        )  # 30 MB
        (connection,) = manager.connections
        await until(lambda: connection._holds)
        assert 1024 * 1024 < connection.waiting_bytes < 1024 * 1024 + 201_000
        gates.open("g", "h")
        assert {(await peer.json())["id"] for _ in range(150)} == set(range(150))
        await sending
        assert (connection.waiting, connection.waiting_bytes) == (0, 0)


async def test_leaving_a_namespace_frees_the_places_of_what_waited() -> None:
    manager = WebSocketManager()
    gates = Gates(manager)
    async with (
        hardening_serving(manager, port=0, max_running_commands=1) as server,
        engine(server.port) as peer,
    ):
        for _ in range(4):  # 4 times 200 are more than may wait
            for number in range(200):
                text = json.dumps(command("gate g", number)).encode()
                await peer.send(frame(1, b'42/ws,["rpc",%b]' % text))
            await peer.send(frame(1, b"41/ws,") + frame(1, b"40/ws,"))
            assert (await peer.frame()).payload.startswith(b"40/ws,{")
        (connection,) = manager.connections
        assert (connection.waiting, connection.waiting_bytes) == (0, 0)
        await until(lambda: len(gates.ended) == 4)


async def test_command_time_is_limited_on_every_door() -> None:
    manager = WebSocketManager()
    gates = Gates(manager)
    async with hardening_serving(manager, port=0, command_timeout_s=0.15) as server:
        async with raw(server.port) as peer:
            await peer.send_json(command("gate a", 1))
            answer = await peer.json()
            assert answer["data"]["code"] == "timeout" and "0.15" in answer["data"]["message"]
            await peer.send_json(command("echo on", 2))
            assert (await peer.json())["data"]["result"] == "on"
        answer_ = await ask(server.port, post("/api/execute_command", {"command": "gate b"}))
        assert (answer_.status, answer_.error["code"]) == (504, "timeout")
        async with engine(server.port) as peer:
            await peer.send(frame(1, b'42/ws,3["rpc",%b]' % json.dumps(command("gate c")).encode()))
            assert b'"code":"timeout"' in (await peer.frame()).payload
    assert gates.ended == ["a", "b", "c"]


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

    async with hardening_serving(manager, port=0, max_unsent_bytes=64 * 1024) as server:
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
    async with hardening_serving(
        manager, port=0, max_unsent_bytes=4096, history_bytes=10**7
    ) as server:
        async with raw(server.port) as first:
            manager.broadcast("tick", 0)
            offset = (await first.json())["offset"]
        for number in range(100):
            manager.broadcast("tick", [number, "x" * 20_000])
        async with lazy(server.port, f"/ws?since={offset}") as peer:
            assert [(await peer.json())["data"][0] for _ in range(100)] == list(range(100))


def places_for(count: int) -> str:
    """The placeholders of so many attachments."""
    return ",".join(f'{{"_placeholder":true,"num":{number}}}' for number in range(count))


@pytest.mark.parametrize(("count", "code"), [(1, None), (10, None), (11, 1002), (100, 1002)])
async def test_attachments_are_limited_in_number(count: int, code: int | None) -> None:
    async with hardening_serving(WebSocketManager(), port=0) as server, engine(server.port) as peer:
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
        hardening_serving(WebSocketManager(), port=0, max_message_bytes=1000) as server,
        engine(server.port) as peer,
    ):
        places = places_for(len(sizes))
        packet = f'45{len(sizes)}-/ws,7["nothing",{places}]'.encode()
        await peer.send(frame(1, packet) + b"".join(frame(2, b"x" * size) for size in sizes))
        if code is None:
            assert (await peer.frame()).payload.startswith(b"43/ws,7[")
        else:
            assert (await peer.closed()).code == code


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
    async with hardening_serving(WebSocketManager(), port=0) as server:
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


BAD_MESSAGES: list[tuple[bytes, str]] = [
    (b"", "invalid_json"), (b" ", "invalid_json"), (b"x", "invalid_json"), (b"{", "invalid_json"),
    (b"{}}", "invalid_json"), (b"NaN", "invalid_json"), (b"Infinity", "invalid_json"),
    (b"'x'", "invalid_json"), (b"\xef\xbb\xbf{}", "invalid_json"), (b"[" * 5000, "invalid_json"),
    (b'{"a":' * 5000, "invalid_json"), (b'"\\ud800"', "invalid_json"),
    (b"1" * 5000, "invalid_json"),
    (b"null", "invalid_request"), (b"true", "invalid_request"), (b"1", "invalid_request"),
    (b"1e999", "invalid_json"), (b'"x"', "invalid_request"), (b"[]", "invalid_request"),
    (b"[1]", "invalid_request"), (b"[{}]", "invalid_request"), (b"{}", "invalid_request"),
    (b'{"method":null}', "invalid_request"), (b'{"method":1}', "invalid_request"),
    (b'{"method":["get_status"]}', "invalid_request"), (b'{"method":{}}', "invalid_request"),
    (b'{"method":"get_status","params":[]}', "invalid_request"),
    (b'{"method":"get_status","params":null}', "invalid_request"),
    (b'{"method":"get_status","params":"x"}', "invalid_request"),
    (b'{"method":"get_status","id":1.5}', "invalid_request"),
    (b'{"method":"get_status","id":true}', "invalid_request"),
    (b'{"method":"get_status","id":[]}', "invalid_request"),
    (b'{"method":"get_status","id":{}}', "invalid_request"),
    (b'{"method":"get_status","id":18446744073709551616}', "invalid_request"),
    (b'{"method":""}', "unknown_method"), (b'{"method":"__init__"}', "unknown_method"),
    (b'{"method":"get_status\\u0000"}', "unknown_method"),
    (b'{"method":"execute_command"}', "invalid_params"),
    (b'{"method":"execute_command","params":{}}', "invalid_params"),
    (b'{"method":"execute_command","params":{"command":1}}', "invalid_params"),
    (b'{"method":"execute_command","params":{"command":""}}', "invalid_params"),
    (b'{"method":"execute_command","params":{"command":" \\t\\n"}}', "invalid_params"),
    (b'{"method":"execute_command","params":{"command":["echo"]}}', "invalid_params"),
    (b'{"method":"execute_command","params":{"command":"no-such-command"}}', "unknown_command"),
    (b'{"method":"execute_command","params":{"command":"echo \\"open"}}', "usage"),
    (b'{"method":"execute_command","params":{"command":"time","x":1}}', "usage"),
    (b'{"method":"cancel"}', "invalid_params"),
    (b'{"method":"cancel","params":{"id":null}}', "invalid_params"),
    (b'{"method":"cancel","params":{"id":true}}', "invalid_params"),
    (b'{"method":"cancel","params":{"id":1.5}}', "invalid_params"),
    (b'{"method":"cancel","params":{"id":"none"}}', "invalid_params"),
]  # fmt: skip


@pytest.mark.parametrize("opcode", [1, 2])
async def test_bad_messages_get_one_error_each_and_the_connection_goes_on(opcode: int) -> None:
    async with hardening_serving(WebSocketManager(), port=0) as server, raw(server.port) as peer:
        await peer.send(b"".join(frame(opcode, message) for message, _ in BAD_MESSAGES))
        for message, code in BAD_MESSAGES:
            answer = await peer.json()
            assert (answer["type"], answer["data"]["code"]) == ("error", code), message
            assert answer["data"]["message"]
        if opcode == 2:  # bytes that are no text are no broken frame
            await peer.send(frame(2, b"\xff\xfe"))
            assert (await peer.json())["data"]["code"] == "invalid_json"
        await peer.send_json(request("get_status", "end"))
        assert (await peer.json())["id"] == "end"


async def test_history_is_limited_in_messages_and_bytes() -> None:
    for options, kept in (({"history_messages": 3}, 3), ({"history_bytes": 3 * 1100}, 3)):
        manager = WebSocketManager()
        async with hardening_serving(manager, port=0, **options) as server:
            async with raw(server.port) as peer:
                offsets = []
                for number in range(6):
                    manager.broadcast("tick", [number, "x" * 1000])
                    offsets.append((await peer.json())["offset"])
            async with raw(server.port, f"/ws?since={offsets[5 - kept]}") as back:
                got = [(await back.json())["data"][0] for _ in range(kept)]
                assert got == list(range(6 - kept, 6))
            for offset in (offsets[4 - kept], "unknown", "", "x" * 5000):
                async with raw(server.port, f"/ws?since={offset}") as back:
                    assert (await back.json())["data"]["code"] == "history_gap"


# --- frames ------------------------------------------------------------------------------------

LIMIT = 1000  # max_message_bytes below
# Name, bytes, close code; None: the stream ends without a close frame.
BAD_FRAMES: list[tuple[str, bytes, int]] = [
    ("text, not masked", frame(1, b"hello", is_masked=False), 1002),
    ("binary, not masked", frame(2, b"hello", is_masked=False), 1002),
    ("ping, not masked", frame(9, b"", is_masked=False), 1002),
    ("close, not masked", frame(8, b"\x03\xe8", is_masked=False), 1002),
    ("long text, not masked", frame(1, b"x" * 200, is_masked=False), 1002),
    *((f"opcode {n}", frame(n, b"x"), 1002) for n in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)),
    *((f"opcode {n}, not final", frame(n, b"x", fin=False), 1002) for n in (3, 7, 11, 15)),
    *((f"reserved bits {n}", frame(1, b"x", rsv=n), 1002) for n in range(1, 8)),
    ("binary with a reserved bit", frame(2, b"x", rsv=4), 1002),
    ("ping with a reserved bit", frame(9, b"x", rsv=1), 1002),
    ("close with a reserved bit", frame(8, b"\x03\xe8", rsv=2), 1002),
    ("continuation of nothing", frame(0, b"x"), 1002),
    ("continuation of nothing, not final", frame(0, b"x", fin=False), 1002),
    ("text in a fragmented text", frame(1, b"a", fin=False) + frame(1, b"b"), 1002),
    ("binary in a fragmented text", frame(1, b"a", fin=False) + frame(2, b"b"), 1002),
    ("text not final in one", frame(2, b"a", fin=False) + frame(1, b"b", fin=False), 1002),
    ("continuation with a reserved bit", frame(1, b"a", fin=False) + frame(0, b"b", rsv=1), 1002),
    ("ping not final", frame(9, b"x", fin=False), 1002),
    ("pong not final", frame(10, b"x", fin=False), 1002),
    ("close not final", frame(8, b"\x03\xe8", fin=False), 1002),
    ("ping of 126 bytes", frame(9, b"x" * 126), 1002),
    ("ping of 126 bytes, length in 8", frame(9, b"x" * 126, length_bytes=8), 1002),
    ("close of 126 bytes", frame(8, b"\x03\xe8" + b"x" * 124), 1002),
    ("close of one byte", frame(8, b"x"), 1002),
    *((f"close code {n}", close_frame(n), 1002)
      for n in (0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535)),
    ("close in a fragmented text", frame(1, b"a", fin=False) + close_frame(), 1002),
    ("close reason not UTF-8", close_frame(1000, b"\xff\xfe"), 1007),
    ("close reason cut in a character", close_frame(1000, b"\xe2\x82"), 1007),
    ("text not UTF-8", frame(1, b"\xff"), 1007),
    ("text with a surrogate", frame(1, b"\xed\xa0\x80"), 1007),
    ("text with an overlong form", frame(1, b"\xc0\xaf"), 1007),
    ("text beyond Unicode", frame(1, b"\xf4\x90\x80\x80"), 1007),
    ("text cut in a character", frame(1, b"x\xe2\x82"), 1007),
    ("long text not UTF-8", frame(1, b"x" * 300 + b"\x80"), 1007),
    ("fragmented text not UTF-8", frame(1, b"\xce", fin=False) + frame(0, b"x"), 1007),
    ("text too long", frame(1, b"x" * (LIMIT + 1)), 1009),
    ("binary too long", frame(2, b"x" * (LIMIT + 1)), 1009),
    ("text of 2^63 bytes", b"\x81\xff" + b"\x80" + b"\0" * 7 + b"\1\2\3\4", 1009),
    ("fragments too long", frame(1, b"x" * LIMIT, fin=False) + frame(0, b"x"), 1009),
    ("continuation too long", frame(2, b"x", fin=False) + frame(0, b"x" * LIMIT, fin=False), 1009),
]  # fmt: skip
GOOD_CLOSES = [b"", *(struct.pack("!H", n) for n in (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010,
               1011, 1012, 1013, 1014, 3000, 3999, 4000, 4999)), b"\x03\xe8\xe2\x82\xac",
               b"\x03\xe8" + b"x" * 123]  # fmt: skip


async def feed(peer: Peer, pieces: list[bytes], *, pause: int = 1) -> None:
    """Send each piece in a packet of its own, as far as that is ours to say."""
    peer.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for piece in pieces:
        peer.writer.write(piece)
        for _ in range(pause):
            await asyncio.sleep(0)


async def test_malformed_frames_close_with_their_code_wherever_they_are_cut() -> None:
    before, after = frame(1, b"before"), frame(1, b"after") + frame(9, b"ping")
    tried = 0
    async with hardening_serving(EchoManager(), port=0, max_message_bytes=LIMIT) as server:
        for name, bad, code in BAD_FRAMES:
            data = before + bad + after
            start, end = len(before), len(before) + min(len(bad), 24)
            for cut in {0, *range(start, end + 1), len(data) - len(after), len(data)}:
                async with raw(server.port) as peer:
                    await feed(peer, [data[:cut], data[cut:]])
                    assert await peer.frame() == (1, b"before"), (name, cut)
                    received = await peer.frame()  # nothing else in between
                    assert (received.opcode, received.code) == (8, code), (name, cut)
                    assert await peer.at_end()
                    tried += 1
    assert tried > 700
    assert not server.manager.connections


async def test_malformed_frames_one_byte_at_a_time_close_with_their_code() -> None:
    async with hardening_serving(EchoManager(), port=0, max_message_bytes=LIMIT) as server:
        for name, bad, code in BAD_FRAMES:
            if len(bad) > 400:
                continue
            async with raw(server.port) as peer:
                await feed(peer, [bytes((byte,)) for byte in bad])
                assert (await peer.frame()).code == code, name
                assert await peer.at_end()


async def test_malformed_frames_close_the_socket_io_door_too() -> None:
    async with hardening_serving(WebSocketManager(), port=0, max_message_bytes=LIMIT) as server:
        for name, bad, code in BAD_FRAMES:
            if "binary" in name or "fragment" in name or ("text" in name and code == 1002):
                continue  # a session ends with 1002 for what is no packet, too
            async with engine(server.port) as peer:
                await peer.send(bad)
                assert (await peer.frame()).code == code, name
                assert await peer.at_end()


async def test_close_frames_are_answered_with_their_own_code() -> None:
    async with hardening_serving(EchoManager(), port=0) as server:
        for payload in GOOD_CLOSES:
            for cut in range(len(frame(8, payload)) + 1):
                if 12 < cut < len(payload):
                    continue
                async with raw(server.port) as peer:
                    data = frame(8, payload)
                    await feed(
                        peer, [frame(1, b"last") + data[:cut], data[cut:] + frame(1, b"late")]
                    )
                    assert await peer.frames() == [(1, b"last"), (8, payload)]


async def test_stream_that_ends_anywhere_leaves_nothing_behind() -> None:
    data = upgrade() + frame(1, b"a") + in_fragments(1, b"bcd", 3) + frame(1, b"x" * 300)
    async with hardening_serving(EchoManager(), port=0) as server:
        for cut in range(0, len(data), 3):
            async with dial(server.port) as peer:
                peer.writer.write(data[:cut])
                peer.writer.write_eof()
                await peer.reader.read()
        for cut in range(0, len(data), 3):
            async with dial(server.port) as peer:
                await peer.send(data[:cut])  # and is reset
        await until(lambda: not server.manager.connections)
        assert not server.manager.raw and not server.manager.tasks


async def test_message_one_byte_at_a_time_is_read_the_same() -> None:
    async with hardening_serving(EchoManager(), port=0) as server, raw(server.port) as peer:
        for payload in (b"", b"x", b"x" * 125, b"x" * 126, b"x" * 3000):
            for data in (frame(1, payload), in_fragments(2, payload, 3)):
                await feed(peer, [bytes((byte,)) for byte in data])
                assert (await peer.frame()).payload == payload


async def test_partial_message_is_looked_at_once_not_with_every_piece(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = 0
    take, collect = karna_ws.Connection.take, karna_ws.Connection._collect

    def count_looks(connection: karna_ws.Connection, data: bytes) -> None:
        nonlocal looks
        looks += 1
        take(connection, data)

    def discount(connection: karna_ws.Connection, data: bytes) -> None:
        nonlocal looks
        looks -= 1  # it was not looked at, but handed on at once
        collect(connection, data)

    monkeypatch.setattr(karna_ws.Connection, "take", count_looks)
    monkeypatch.setattr(karna_ws.Connection, "_collect", discount)
    payload = b"x" * 1_000_000
    async with hardening_serving(EchoManager(), port=0) as server, raw(server.port) as peer:
        for data in (frame(1, payload), in_fragments(2, payload, 2)):
            before, reads = looks, server.manager.bytes_in
            cuts = [0, 1, 3, 9, *range(500, len(data), 500), len(data)]
            await feed(peer, [data[start:end] for start, end in itertools.pairwise(cuts)])
            assert (await peer.frame()).payload == payload
            assert server.manager.bytes_in - reads == len(data)
            assert looks - before < 10


async def test_tiny_fragments_are_bounded_in_number() -> None:
    async with hardening_serving(EchoManager(), port=0) as server:
        async with raw(server.port) as peer:
            exact = frame(1, b"", fin=False) + frame(0, b"", fin=False) * (
                karna_ws.MAX_FRAGMENTS - 2
            )
            await peer.send(exact + frame(0, b"end"))
            assert await peer.frame() == (1, b"end")
            await peer.send(exact + frame(0, b"", fin=False) + frame(0, b"end"))
            closed = await peer.closed()
            assert (closed.code, closed.reason) == (1009, "too many fragments")
        async with raw(server.port) as peer:
            flood = frame(1, b"", fin=False) + frame(0, b"", fin=False) * 200_000
            began = time.process_time()
            with contextlib.suppress(ConnectionError):
                await peer.send(flood)
            assert (await peer.frame()).code == 1009
            assert time.process_time() - began < 5


async def test_control_frames_between_fragments_are_answered_at_once() -> None:
    async with hardening_serving(EchoManager(), port=0) as server, raw(server.port) as peer:
        await peer.send(frame(1, b"a", fin=False) + frame(9, b"p") + frame(10, b"?"))
        assert await peer.frame() == (10, b"p")
        await peer.send(frame(0, b"b", fin=False) + frame(9, b"q" * 125) + frame(0, b"c"))
        assert await peer.frame() == (10, b"q" * 125)
        assert await peer.frame() == (1, b"abc")


async def test_pongs_keep_their_place_among_answers() -> None:
    async with hardening_serving(EchoManager(), port=0) as server, raw(server.port) as peer:
        data = b"".join(frame(1, b"%d" % n) + frame(9, b"%d" % n) for n in range(200))
        await peer.send(data)
        for number in range(200):
            assert await peer.frame() == (1, b"%d" % number)
            assert await peer.frame() == (10, b"%d" % number)


# The differential test: the same bytes, in any chunking, to this server and to a plain one of the
# websockets library. The plain one hands messages to a task, so what it still answers when a bad
# frame follows depends on timing: it gets the bytes frame by frame, each after the last one's echo.


def split_frames(data: bytes) -> list[tuple[bytes, bool]]:
    """`data` frame by frame, and whether an answer must follow; what is no frame stays in one."""
    found = []
    text_parts: bytes | None = None
    is_message = False
    while len(data) >= 2:
        size, start = data[1] & 127, 2
        if size > 125:
            start = 4 if size == 126 else 10
            size = int.from_bytes(data[2:start], "big")
        stop = start + 4 + size
        first = data[0]
        is_bad = not data[1] & 128 or first & 0x70 or (first & 15) not in (0, 1, 2, 9, 10)
        if is_bad or len(data) < start or size > LIMIT or len(data) < stop:
            break
        payload = websockets.frames.apply_mask(  # type: ignore[attr-defined]
            data[start + 4 : stop], data[start : start + 4]
        )
        opcode, fin = first & 15, bool(first & 128)
        if opcode >= 9:
            if not fin or size > 125:
                break
            answers = opcode == 9
        else:
            if (opcode == 0) != is_message:
                break
            if opcode:
                text_parts = b"" if opcode == 1 else None
            is_message = not fin
            if text_parts is not None:
                text_parts += payload
            answers = fin
        found.append((data[:stop], answers))
        data = data[stop:]
        if answers and opcode < 9 and text_parts is not None:
            try:
                text_parts.decode()
            except UnicodeDecodeError:
                return found  # what follows it is not compared: the plain server may see it first
    return [*found, (data, False)] if data else found


async def outcome(peer: Peer) -> list[tuple[int, bytes]]:
    """What a server sends up to the end: messages and pongs as they are, of a close its code."""
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        frames = await peer.frames()
        return [(f.opcode, f.payload[:2] if f.opcode == 8 else f.payload) for f in frames]
    return [(-1, b"the stream ended inside a frame")]


async def feed_plain(port: int, pieces: list[tuple[bytes, bool]]) -> list[tuple[int, bytes]]:
    async with raw(port, "/") as peer:
        got: list[tuple[int, bytes]] = []
        for data, answers in pieces:
            await peer.send(data)
            if answers and not await peer.at_end():
                received = await peer.frame()
                if received.opcode == 8:
                    got.append((8, received.payload[:2]))
                    break
                got.append(tuple(received))
        with contextlib.suppress(OSError):
            peer.writer.write_eof()
        return got + await outcome(peer)


async def feed_karna(port: int, data: bytes, sizes: list[int]) -> list[tuple[int, bytes]]:
    async with raw(port) as peer:
        pieces, start = [], 0
        for size in itertools.cycle(sizes):
            if start >= len(data):
                break
            pieces.append(data[start : start + size])
            start += size
        with contextlib.suppress(ConnectionError):
            await feed(peer, pieces)
            peer.writer.write_eof()
        return await outcome(peer)


async def plain_echo(websocket: Any) -> None:
    with contextlib.suppress(ConnectionClosed):
        async for message in websocket:
            await websocket.send(message)


def test_any_bytes_have_the_same_outcome_as_at_a_plain_server(
    caplog: pytest.LogCaptureFixture,
) -> None:
    needs("hypothesis")
    import hypothesis

    st = hypothesis.strategies
    caplog.set_level(logging.CRITICAL)

    small = st.binary(max_size=130) | st.text(max_size=40).map(str.encode)
    payload = st.one_of(
        small, small, st.integers(LIMIT - 2, LIMIT + 2).map(lambda size: b"x" * size),
        st.integers(120, 400).map(lambda size: b"y" * size),
    )  # fmt: skip
    masks = st.sampled_from([b"\0\0\0\0", b"\1\2\3\4", b"\xff\xff\xff\xff", b"\x81\x81\0\x88"])
    forms = st.sampled_from([None, None, None, 8])
    text = st.builds(
        lambda value, mask: frame(1, value.encode(), mask=mask), st.text(max_size=60), masks
    )
    message = st.builds(
        lambda opcode, value, mask, form: frame(opcode, value, mask=mask, length_bytes=form),
        st.sampled_from([1, 2, 2]), payload, masks, forms,
    )  # fmt: skip
    control = st.builds(
        lambda opcode, value: frame(opcode, value),
        st.sampled_from([9, 10]),
        st.binary(max_size=125),
    )
    fragmented = st.builds(
        lambda opcode, parts, between: b"".join(
            frame(opcode if n == 0 else 0, part, fin=n == len(parts) - 1)
            + (between if n < len(parts) - 1 else b"")
            for n, part in enumerate(parts)
        ),
        st.sampled_from([1, 2]), st.lists(payload, min_size=2, max_size=4), control | st.just(b""),
    )  # fmt: skip
    any_frame = st.builds(
        lambda opcode, value, fin, rsv, masked, form: frame(
            opcode, value, fin=fin, rsv=rsv, is_masked=masked, length_bytes=form
        ),
        st.integers(0, 15), st.binary(max_size=130), st.booleans(),
        st.sampled_from([0, 0, 0, 1, 2, 4]), st.sampled_from([True, True, True, False]),
        st.sampled_from([None, 2, 8]).map(lambda form: form),
    )  # fmt: skip
    close = st.builds(
        close_frame, st.sampled_from([999, 1000, 1001, 1005, 1006, 1011, 2999, 3000, 4999, 5000]),
        st.binary(max_size=20) | st.text(max_size=20).map(str.encode),
    ) | st.just(frame(8, b"")) | st.just(frame(8, b"x"))  # fmt: skip
    ends = st.one_of(close, any_frame, st.binary(max_size=40), st.just(b""))
    streams = st.builds(
        lambda parts, end, cut: (b"".join(parts) + end)[: -cut or None],
        st.lists(st.one_of(text, text, message, fragmented, control), max_size=6), ends,
        st.sampled_from([0, 0, 0, 0, 1, 3, 9]),
    )  # fmt: skip
    chunkings = st.lists(
        st.sampled_from([1, 2, 3, 5, 7, 14, 60, 131, 5000, 5000]), min_size=1, max_size=6
    )

    with asyncio.Runner() as runner:
        karna = hardening_serving(EchoManager(), port=0, max_message_bytes=LIMIT)
        server = runner.run(karna.__aenter__())
        plain = runner.run(start_plain())
        plain_port = plain.sockets[0].getsockname()[1]
        counts: dict[Any, int] = {}

        @hypothesis.settings(max_examples=300, deadline=None, database=None)
        @hypothesis.given(streams, chunkings)
        def compare(stream: bytes, sizes: list[int]) -> None:
            pieces = split_frames(stream)
            data = b"".join(piece for piece, _ in pieces)
            expected = runner.run(feed_plain(plain_port, pieces))
            assert runner.run(feed_karna(server.port, data, sizes)) == expected
            end = expected[-1] if expected and expected[-1][0] == 8 else None
            counts[end] = counts.get(end, 0) + 1

        compare()
        assert {None, (8, b"\x03\xea"), (8, b"\x03\xef"), (8, b"\x03\xf1"), (8, b"")} <= set(counts)
        runner.run(karna.__aexit__(None, None, None))
        plain.close()
        runner.run(plain.wait_closed())


async def start_plain() -> Any:
    return await plain_serve(
        plain_echo, "127.0.0.1", 0, max_size=LIMIT, compression=None, ping_interval=None
    )


# --- stuck, silent and greedy peers ------------------------------------------------------------


async def test_client_that_sends_without_reading_is_paused_and_loses_nothing() -> None:
    async with hardening_serving(WebSocketManager(), port=0) as server, lazy(server.port) as peer:
        peer.writer.transport.pause_reading()
        (connection,) = server.manager.connections
        count = 4000  # answers of about 5 KiB: 20 MB, of which buffers take a few
        data = b"".join(frame(1, json.dumps(command("help", n)).encode()) for n in range(count))
        sending = asyncio.create_task(peer.send(data))
        await until(lambda: connection._holds & karna_ws.HOLD_WRITES)
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
    async with hardening_serving(WebSocketManager(), port=0, close_timeout_s=1.0) as server:
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
async def test_silent_peer_is_gone_within_interval_and_timeout(door: str) -> None:
    # 0.0 open; 0.2 ping; 0.4 timeout; 0.45 swept at the latest.
    options = {"ping_interval_s": 0.2, "ping_timeout_s": 0.2}
    async with hardening_serving(WebSocketManager(), port=0, **options) as server:
        async with (raw if door == "raw" else engine)(server.port) as peer:
            began = time.monotonic()
            assert await peer.frame() == ((9, b"") if door == "raw" else (1, b"2"))
            await until(lambda: not server.manager.connections)
            assert 0.35 < time.monotonic() - began < 0.7
            assert not server.manager.count_clients()
        assert server.manager.metrics.drops == {"silent": 1}


@pytest.mark.parametrize("door", ["raw", "socket.io"])
@pytest.mark.parametrize("life", [
    frame(10), frame(9), frame(1, b"3"), frame(10, b"unasked"),
    frame(1, b"3", fin=False) + frame(0),
])  # fmt: skip
async def test_any_frame_counts_as_life(door: str, life: bytes) -> None:
    options = {"ping_interval_s": 0.1, "ping_timeout_s": 0.1}
    async with (
        hardening_serving(WebSocketManager(), port=0, **options) as server,
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
    gates = Gates(manager)
    options = {"ping_interval_s": 0.1, "ping_timeout_s": 0.1, "max_running_commands": 1}
    async with hardening_serving(manager, port=0, **options) as server, raw(server.port) as peer:
        texts = [json.dumps(command("gate g", n)).encode() for n in range(300)]
        await peer.send(b"".join(frame(1, text) for text in texts) + frame(10))
        (connection,) = manager.connections
        await until(lambda: connection._holds == karna_ws.HOLD_CALLS)
        await asyncio.sleep(0.4)  # it could not be heard in this time
        gates.open("g")
        for number in range(300):
            assert (await peer.json())["id"] == number


@pytest.mark.parametrize("reads", [True, False])
async def test_peer_that_ignores_the_close_is_cut(reads: bool) -> None:
    manager = WebSocketManager()
    async with (
        hardening_serving(manager, port=0, close_timeout_s=0.2) as server,
        lazy(server.port) as peer,
    ):
        if not reads:
            peer.writer.transport.pause_reading()
        (client,) = manager.raw
        began = time.monotonic()
        await client.disconnect("enough")
        await until(lambda: not manager.connections)
        assert 0.15 < time.monotonic() - began < 0.5
        if reads:
            assert await peer.frame() == (8, b"\x03\xe8enough")


async def test_shutdown_is_not_held_up_by_any_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(karna_ws, "SHUTDOWN_CLOSE_S", 0.3)
    manager = WebSocketManager()
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(hardening_serving(manager, port=0, grace_s=0.1))
        port = server.port
        stuck = await stack.enter_async_context(lazy(port))
        stuck.writer.transport.pause_reading()
        ignoring = await stack.enter_async_context(raw(port))
        session = await stack.enter_async_context(engine(port))
        half = await stack.enter_async_context(dial(port))
        await half.send(upgrade()[:-2])
        silent = await stack.enter_async_context(dial(port))
        await until(lambda: len(manager.connections) == 5)
        for _ in range(200):
            manager.broadcast("tick", "x" * 20_000)
            await asyncio.sleep(0)
        began = time.monotonic()
        await server.close()
        assert time.monotonic() - began < 1.0
        for peer in (ignoring, session):
            while (received := await peer.frame()).opcode != 8:
                pass
            assert (received.code, received.reason) == (1012, "service restart")
        assert await silent.at_end()


async def test_shutdown_does_not_wait_for_who_has_asked_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(karna_ws, "SHUTDOWN_CLOSE_S", 1000.0)
    manager = WebSocketManager()
    async with (
        hardening_serving(manager, port=0, close_timeout_s=1000.0) as server,
        dial(server.port) as silent, dial(server.port) as half,
    ):  # fmt: skip
        await half.send(upgrade()[:-2])
        await until(lambda: len(manager.connections) == 2)
        await server.close()
        assert await silent.at_end() and await half.at_end()


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


def resident_peak(pid: int) -> int:
    """The most bytes that a process has had resident."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) * 1024


@needs_proc
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_stuck_readers_cost_bounded_memory_and_others_get_everything(loop: str) -> None:
    if loop == "uvloop":
        needs("uvloop")
    stuck_count, messages, size = 40, 160, 100_000  # unbounded, they would cost 640 MB
    options = ["--close-timeout", "1", "--history-bytes", "0", "--loop", loop]
    async with process(*options) as karna, contextlib.AsyncExitStack() as stack:
        port = karna.port
        stuck = []
        for number in range(stuck_count):
            peer = await stack.enter_async_context(lazy(port, "/ws" if number % 2 else ENGINE))
            if number % 2 == 0:
                await peer.frame()
                await peer.send(frame(1, b"40/ws,"))
                await peer.frame()
            peer.writer.transport.pause_reading()
            stuck.append(peer)
        readers = [await stack.enter_async_context(raw(port)) for _ in range(3)]
        readers += [await stack.enter_async_context(engine(port)) for _ in range(3)]
        before = resident_peak(karna.pid)
        began = time.monotonic()

        async def read_all(peer: Peer) -> None:
            for number in range(messages):
                payload = (await peer.frame()).payload
                assert b'"message":"%d ' % number in payload[:120]

        async def publish() -> None:
            for number in range(messages):
                message = {"message": f"{number} " + "x" * size}
                assert (await ask(port, post("/api/notify", message))).status == 202

        await asyncio.gather(publish(), *map(read_all, readers))
        grown = resident_peak(karna.pid) - before
        # Each may hold its limit, one joined write and what the allocator rounds up.
        assert grown < stuck_count * 1.6 * 1024 * 1024 + 20_000_000, f"{grown / 1e6:.0f} MB"
        found = await get_metrics(port)
        assert found["karna_dropped_total{reason=slow}"] == stuck_count
        while found["karna_sockets"] > len(readers) + 1:  # and the one that asks
            await asyncio.sleep(0.05)
            found = await get_metrics(port)
        assert time.monotonic() - began < 8
        assert found["karna_clients{door=raw}"] + found["karna_clients{door=socket.io}"] == 6
        assert found["karna_deliveries_total"] >= messages * 6


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
                        await publisher.send_json(command(f"notify {number}", number))
                    while (got := await reader.json())["type"] != "notification":
                        pass
                    assert got["data"]["message"] == str(number)
            assert "Traceback" not in karna.log()


# --- handlers that do what they should not -----------------------------------------------------


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
    "refused": lambda: karna_ws.Refused("forbidden", "its own refusal"),
    "packet": lambda: karna_ws.BadPacket("its own"),
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
    if asyncio.iscoroutinefunction(function):

        async def handler(client: Client, name: str) -> Any:
            return await function(name)

        return handler
    return lambda client, name: function(name)


KINDS = ["coroutine", "at_once", "thread", "stream", "inline"]


@pytest.mark.parametrize("kind", KINDS)
async def test_handlers_that_fail_answer_their_client_once_and_bother_no_other(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    manager = WebSocketManager()
    misbehaving(manager)
    gates = Gates(manager)
    names = [*RAISED, *RETURNED]
    async with (
        hardening_serving(manager, port=0, max_running_commands=4) as server,
        raw(server.port) as other,
        raw(server.port) as peer,
        engine(server.port) as session,
    ):
        await other.send_json(command("gate other", "o"))
        for number, name in enumerate(names):
            await peer.send_json(command(f"{kind} {name}", number))
            await peer.send_json(request(f"method_{kind}", 1000 + number, name=name))
        answers: dict[Any, Any] = {}
        while len(answers) < 2 * len(names):
            answer = await peer.json()
            if answer["type"] == "command_progress":
                continue
            assert answer["id"] not in answers
            answers[answer["id"]] = answer
        for number, name in enumerate(names):
            for id in (number, 1000 + number):
                assert answers[id]["type"] == "error", (name, answers[id])
                assert answers[id]["data"]["message"], name
                expected = {"command_failed"} | ({"cancelled"} if name == "cancelled" else set())
                assert answers[id]["data"]["code"] in expected, (name, answers[id])
        if kind != "stream":
            for number, name in enumerate(names):
                event = json.dumps([f"event_{kind}", name]).encode()
                await session.send(frame(1, b"42/ws,%d%b" % (number, event)))
            acks = {}
            for _ in names:
                payload = (await session.frame()).payload
                id_, _, rest = payload.removeprefix(b"43/ws,").partition(b"[")
                assert int(id_) not in acks
                (acks[int(id_)],) = json.loads(b"[" + rest)
            for number, name in enumerate(names):
                assert acks[number]["type"] == "error", name
        await other.send_json(command("echo still here", 2))
        assert (await other.json())["data"]["result"] == "still here"
        gates.open("other")
        assert (await other.json())["id"] == "o"
        await peer.send_json(request("get_status", "end"))
        assert (await peer.json())["id"] == "end"
    assert "Exception in callback" not in caplog.text
    assert "never retrieved" not in caplog.text


async def test_http_answers_for_handlers_that_fail() -> None:
    manager = WebSocketManager()
    misbehaving(manager)
    async with hardening_serving(manager, port=0) as server:
        for kind in ("coroutine", "thread", "inline"):
            for name in [*RAISED, *RETURNED]:
                answer = await ask(
                    server.port, post("/api/execute_command", {"command": f"{kind} {name}"})
                )
                assert answer.status in (500, 409) and answer.error["code"], (kind, name)
                rpc = {"jsonrpc": "2.0", "method": f"method_{kind}", "params": [name], "id": 1}
                answer = await ask(server.port, post("/rpc", rpc))
                assert answer.status == 200 and answer.json["error"]["message"], (kind, name)


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

    async with hardening_serving(manager, port=0) as server:
        async with raw(server.port) as peer:
            assert (await peer.closed()).code == 1008
        async with engine(server.port, connect=None) as peer:
            await peer.send(frame(1, b'40/ws,{"fail":1}'))
            answer = (await peer.frame()).payload
            assert json.loads(answer.removeprefix(b"44/ws,"))["message"]
            await peer.send(frame(1, b"40/ws,"))
            assert (await peer.frame()).payload.startswith(b"40/ws,{")
        await until(lambda: not manager.connections)


async def test_queue_goes_on_past_a_request_that_can_not_be_prepared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manager = WebSocketManager()
    gates = Gates(manager)
    prepare = manager.commands.prepare

    def break_down(line: str, params: Any = None) -> Any:
        if line == "broken":
            raise RuntimeError("a bug")
        return prepare(line, params or {})

    monkeypatch.setattr(manager.commands, "prepare", break_down)
    async with (
        hardening_serving(manager, port=0, max_running_commands=1) as server,
        raw(server.port) as peer,
    ):
        for id, line in enumerate(("gate a", "broken", "echo on")):
            await peer.send_json(command(line, id))
        await peer.sync()
        gates.open("a")
        answers = [await peer.json() for _ in range(3)]
        assert [answer["id"] for answer in answers] == [0, 1, 2]
        assert answers[1]["data"]["code"] == "internal_error"


async def test_override_that_raises_is_an_internal_error_not_the_end() -> None:
    class Broken(WebSocketManager):
        def handle_message(self, client: Client, payload: bytes, is_text: bool) -> str:
            if payload in (b"surrogate", b"none"):
                return "\ud800"
            raise RAISED[payload.decode()]()

    async with hardening_serving(Broken(), port=0) as server, raw(server.port) as peer:
        for name in RAISED:
            if issubclass(type(RAISED[name]()), Exception):
                await peer.send(frame(1, name.encode()))
                assert (await peer.json())["data"]["code"] == "internal_error"
        for opcode in (1, 2):
            await peer.send(in_fragments(opcode, b"surrogate", 2))
            assert (await peer.json())["data"]["code"] == "internal_error"


async def test_blocking_command_holds_up_nobody() -> None:
    manager = WebSocketManager()
    release = threading.Event()

    @manager.commands.command
    def block() -> str:
        """Block a thread."""
        release.wait(10)
        return "done"

    async with hardening_serving(manager, port=0, command_timeout_s=0.3) as server:
        async with raw(server.port) as peer:
            await peer.send_json(command("block", 1))
            await peer.send_json(command("echo quick", 2))
            assert (await peer.json())["id"] == 2
            assert (await peer.json())["data"]["code"] == "timeout"
        release.set()


async def test_client_that_goes_away_has_its_commands_cancelled_hardening() -> None:
    manager = WebSocketManager()
    gates = Gates(manager)
    async with hardening_serving(manager, port=0) as server:
        for number, how in enumerate(("close", "eof", "reset", "http")):
            context = dial(server.port) if how == "http" else raw(server.port)
            async with context as peer:
                if how == "http":
                    await peer.send(post("/api/execute_command", {"command": "gate http"}))
                else:
                    await peer.send_json(command(f"gate {how}", 1))
                await until(lambda: len(gates.begun) == number + 1)
                if how == "close":
                    await peer.send(close_frame())
                if how == "eof":
                    peer.writer.write_eof()
            await until(lambda: gates.ended == ["close", "eof", "reset", "http"][: number + 1])
        await until(lambda: not manager.tasks)


# --- reading and writing sockets ourselves ----------------------------------------------------


@pytest.mark.parametrize("through", ["broadcast", "send"])
async def test_burst_of_one_turn_leaves_a_stuck_reader_no_more_than_its_limit(through: str) -> None:
    manager = WebSocketManager()
    options = {"max_unsent_bytes": 200_000, "close_timeout_s": 0.2}
    async with hardening_serving(manager, port=0, **options) as server:
        async with lazy(server.port) as stuck:
            stuck.writer.transport.pause_reading()
            [connection] = manager.connections
            [client] = manager.raw
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
        server = await stack.enter_async_context(hardening_serving(manager, port=0))
        peers = [await stack.enter_async_context(raw(server.port)) for _ in range(20)]
        faulty.bad = fault
        # All are written before the server reads any of them.
        for number, peer in enumerate(peers):
            message = request("get_status", number) if number == 3 else command("echo hi", number)
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
        server = await stack.enter_async_context(hardening_serving(manager, port=0))
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
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(hardening_serving(Picky(Strange), port=0))
        peers = [await stack.enter_async_context(raw(server.port)) for _ in range(20)]
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        for number, peer in enumerate(peers):
            peer.writer.write(frame(1, b"bad" if number == 3 else b"good"))
        for number, peer in enumerate(peers):
            if number == 3:
                assert await peer.at_end()
            else:
                assert (await peer.frame()).payload == b"good"


@pytest.mark.parametrize("inline", [True, False])
async def test_long_answer_is_no_sign_of_a_slow_client(inline: bool) -> None:
    manager = WebSocketManager()

    async def later(size: int) -> str:
        return "x" * size

    manager.commands.add(Command((lambda size: "x" * int(size)) if inline else later,
                                 name="long", inline=inline))  # fmt: skip
    async with hardening_serving(manager, port=0) as server, lazy(server.port) as peer:
        [client] = manager.raw
        peer.writer.transport.pause_reading()
        await peer.send_json(command("long 12000000", 1))
        await until(lambda: not client.connection.is_writable)
        manager.notify("news")
        manager.flush_broadcasts()
        peer.writer.transport.resume_reading()
        assert len((await peer.json())["data"]["result"]) == 12_000_000
        assert (await peer.json())["data"]["message"] == "news"


async def test_replay_of_many_small_broadcasts_does_not_drop_who_asked_for_it() -> None:
    count = 120_000
    manager = WebSocketManager()
    options = {"history_messages": count, "history_bytes": 2**27, "max_unsent_bytes": 1024}
    async with hardening_serving(manager, port=0, **options) as server:
        start = manager.history.last
        for number in range(count):
            manager.broadcast("n", number)
        manager.flush_broadcasts()
        async with lazy(server.port, ENGINE) as peer:
            await peer.frame()
            peer.writer.transport.pause_reading()
            auth = json.dumps({"pid": "p", "offset": start}).encode()
            await peer.send(frame(1, b"40/ws," + auth))
            [connection] = manager.connections
            await until(lambda: not connection.is_writable)
            peer.writer.transport.resume_reading()
            for number in range(count):
                received = await peer.frame()
                assert received.opcode == 1 and b'"data":%d,' % number in received.payload


async def test_counters_only_grow_when_clients_are_dropped() -> None:
    manager = WebSocketManager()
    options = {"max_unsent_bytes": 50_000, "close_timeout_s": 0.1}
    async with (
        hardening_serving(manager, port=0, **options) as server,
        lazy(server.port) as one, lazy(server.port) as other,
    ):  # fmt: skip
        one.writer.transport.pause_reading()
        other.writer.transport.pause_reading()
        before = (0, 0)
        while manager.raw:
            manager.broadcast("tick", "x" * 60_000)
            manager.flush_broadcasts()
            now = (manager.messages_out + manager.deliveries, manager.bytes_out)
            assert now[0] >= before[0] and now[1] >= before[1]
            before = now
        assert manager.messages_out >= 0


async def test_broadcast_just_before_the_end_still_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(karna_ws, "CLIENTS_A_TURN", 1)  # a flush waits as with many clients
    manager = WebSocketManager()
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(hardening_serving(manager, port=0))
        peers = [await stack.enter_async_context(raw(server.port)) for _ in range(8)]
        manager.notify("going down")
        closing = server.close()
        for peer in peers:
            assert (await peer.json())["data"]["message"] == "going down"
            assert (await peer.closed()).code == 1012
        await closing


async def test_broadcasts_of_the_next_turns_leave_together_when_clients_are_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(karna_ws, "CLIENTS_A_TURN", 1)
    manager = WebSocketManager()
    async with hardening_serving(manager, port=0) as server, contextlib.AsyncExitStack() as stack:
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


async def test_what_leaves_behind_other_frames_is_counted_once() -> None:
    manager = WebSocketManager()
    async with hardening_serving(manager, port=0) as server, raw(server.port) as peer:
        [client] = manager.raw

        def counters() -> tuple[int, int]:
            return manager.bytes_out, manager.messages_out + manager.deliveries

        before = counters()
        client.deliver(b"{}", None)  # queued until the next turn...
        manager.broadcast("tick", 1)
        manager.flush_broadcasts()  # ...and this behind it
        received = [await peer.frame() for _ in range(2)]
        size = sum(2 + len(each.payload) for each in received)
        assert tuple(b - a for a, b in zip(before, counters(), strict=True)) == (size, 2)


async def test_urgent_byte_between_two_requests_keeps_neither_back() -> None:
    async with hardening_serving(WebSocketManager(), port=0) as server, raw(server.port) as peer:
        client = peer.writer.get_extra_info("socket")
        texts = [json.dumps(command("echo hi", number)).encode() for number in range(2)]
        with socket.socket(fileno=os.dup(client.fileno())) as same:
            same.send(frame(1, texts[0]))
            same.send(b"!", socket.MSG_OOB)  # it is not part of the stream, and ends a read early
            same.send(frame(1, texts[1]))
        assert [(await peer.json())["id"] for _ in range(2)] == [0, 1]


async def test_descriptors_sent_along_keep_no_request_back() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/karna"
        async with hardening_serving(WebSocketManager(), unix=path), raw(path) as peer:
            client = peer.writer.get_extra_info("socket")
            texts = [json.dumps(command("echo hi", number)).encode() for number in range(3)]
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

    async with hardening_serving(manager, port=0) as server:
        for number in range(50):
            async with raw(server.port) as peer:
                text = json.dumps(command(f"hear {number}")).encode()
                peer.writer.write(frame(1, text))
                peer.writer.write_eof()
                assert await peer.frame()
        await until(lambda: not manager.connections)
    assert heard == list(range(50))


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
    async with hardening_serving(manager, port=0, **options) as server, lazy(server.port) as peer:
        [client] = manager.raw
        peer.writer.transport.pause_reading()
        task = asyncio.create_task(talk(client))
        for number in range(60):
            text = json.dumps(command(f"block {number}", number)).encode()
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
    async with hardening_serving(manager, port=0) as server, lazy(server.port) as peer:
        [client] = manager.raw
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


async def test_server_without_descriptors_for_its_reader_does_not_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: Any) -> Any:
        raise OSError(24, "Too many open files")

    manager = WebSocketManager()
    with monkeypatch.context() as patch:
        patch.setattr(karna_ws.select, "epoll", refuse, raising=False)
        with pytest.raises(StartError, match="can't watch sockets: Too many open files"):
            async with serving(manager, port=0):
                pass
    async with hardening_serving(manager, port=0) as server, raw(server.port) as peer:
        await peer.send_json(command("echo again", 1))
        assert (await peer.json())["data"]["result"] == "again"


async def test_idle_server_with_closed_and_half_closed_peers_rests() -> None:
    """An epoll that stays ready would turn the loop for ever."""
    manager = WebSocketManager()
    async with hardening_serving(manager, port=0, close_timeout_s=100.0) as server:
        port = server.port
        async with raw(port) as peer, raw(port) as gone, raw(port) as held:
            await peer.send(close_frame())  # and leaves the socket open
            assert (await peer.frame()).opcode == 8
            gone.writer.transport.abort()
            await until(lambda: len(manager.raw) == 1)
            [client] = manager.raw
            client.connection.hold(karna_ws.HOLD_CALLS)
            await held.send(frame(1, b"{}"))
            held.writer.write_eof()
            turns, loop = 0, asyncio.get_running_loop()
            select_once = loop._selector.select  # type: ignore[attr-defined]

            def count(timeout: float | None = None) -> Any:
                nonlocal turns
                turns += 1
                return select_once(timeout)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(loop._selector, "select", count)  # type: ignore[attr-defined]
                await asyncio.sleep(0.2)  # the sweep and the monitor turn it now and then
            assert turns < 50


async def test_program_may_remove_or_replace_the_commands_of_the_manager() -> None:
    manager = WebSocketManager()
    del manager.commands.commands["notify"]
    async with hardening_serving(manager, port=0) as server, raw(server.port) as peer:
        await peer.send_json(command("notify x", 1))
        assert (await peer.json())["data"]["code"] == "unknown_command"

    manager = WebSocketManager(CommandProcessor(builtins=False))

    @manager.commands.command
    async def notify(*words: str) -> str:
        return "mine"

    async with hardening_serving(manager, port=0) as server, raw(server.port) as peer:
        await peer.send_json(command("notify x", 1))
        assert (await peer.json())["data"]["result"] == "mine"


# --- metrics -----------------------------------------------------------------------------------


async def test_metrics_tell_what_happened() -> None:
    manager = WebSocketManager()
    Gates(manager)
    async with hardening_serving(manager, port=0, token=TOKEN, max_clients=2) as server:
        port = server.port
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        async with raw(port, headers=bearer) as peer, engine(port, bearer) as session:
            before = await get_metrics(port, bearer)
            assert before["karna_clients{door=raw}"] == before["karna_clients{door=socket.io}"] == 1
            texts = [frame(1, json.dumps(command("echo hi", n)).encode()) for n in range(5)]
            texts.append(frame(1, json.dumps(command("nonsense", 6)).encode()))
            texts.append(frame(1, json.dumps(command("gate g", 7)).encode()))
            texts.append(in_fragments(1, json.dumps(request("cancel", 8, id=7)).encode(), 2))
            await peer.send(b"".join(texts))
            received = [await peer.frame() for _ in range(8)]
            manager.notify("to both")
            received.append(await peer.frame())
            packet = (await session.frame()).payload
            for headers, reason in (({}, "unauthorized"), ({"Origin": "null"}, "forbidden"),
                                    ({"Host": "evil.example"}, "forbidden"),
                                    (bearer, "unavailable")):  # fmt: skip
                assert (await ask(port, upgrade(headers=headers))).error["code"] == reason
            after = await get_metrics(port, bearer)

        def grown(name: str) -> float:
            return after.get(name, 0) - before.get(name, 0)

        frames_out = sum(len(f.payload) + (2 if len(f.payload) < 126 else 4) for f in received)
        frames_out += len(packet) + (2 if len(packet) < 126 else 4)
        assert grown("karna_received_messages_total") == 8
        assert grown("karna_sent_messages_total") == 10
        assert grown("karna_sent_bytes_total") == frames_out
        assert grown("karna_broadcasts_total") == 1
        assert grown("karna_deliveries_total") == 2
        assert grown("karna_commands_total{result=ok}") == 5
        assert grown("karna_commands_total{result=cancelled}") == 1
        assert grown("karna_command_duration_seconds_count") == 1  # inline ones are not timed
        assert (
            after["karna_command_duration_seconds_bucket{le=+Inf}"]
            == after["karna_command_duration_seconds_count"]
        )
        assert grown("karna_refused_total{reason=unauthorized}") == 1
        assert grown("karna_refused_total{reason=forbidden}") == 2
        assert grown("karna_refused_total{reason=unavailable}") == 1
        assert after["karna_service_state{service=command,state=running}"] == 1
        assert 1e7 < after["karna_resident_memory_bytes"] < 1e9
        assert 0 <= after["karna_loop_lag_seconds"] < 5
        sizes = sum(map(len, texts))
        assert grown("karna_received_bytes_total") >= sizes
        await until(lambda: not manager.connections)
        assert (await get_metrics(port, bearer))["karna_clients{door=raw}"] == 0


async def test_metrics_labels_are_escaped() -> None:
    name = 'o"dd\\ na\nme'
    manager = WebSocketManager(services=[karna_ws.Service(name)])
    async with hardening_serving(manager, port=0) as server:
        found = await get_metrics(server.port)
        assert any(key.startswith(f"karna_service_state{{service={name},") for key in found)
        buckets = [value for key, value in found.items() if "_bucket{" in key]
        assert buckets == sorted(buckets) and len(buckets) == len(karna_ws.LATENCY_BUCKETS_S) + 1


# --- the library -------------------------------------------------------------------------------


def test_library_has_the_private_names_we_use() -> None:
    """Names of `websockets` that are no promise of its; see the banner of section 4."""
    import inspect

    from websockets.frames import CloseCode, Frame, Opcode
    from websockets.protocol import State
    from websockets.server import ServerProtocol

    missing: list[str] = []

    def need(holds: Any, what: str) -> None:
        if not holds:
            missing.append(what)

    for name in ("receive_data", "receive_eof", "events_received", "data_to_send", "send_close",
                 "fail", "parse"):  # fmt: skip
        need(callable(getattr(ServerProtocol, name, None)), f"ServerProtocol.{name}()")
    protocol = ServerProtocol(max_size=10)
    for name in ("state", "parser", "reader", "eof_sent", "current_size"):
        need(hasattr(protocol, name), f"ServerProtocol.{name}")
    need(hasattr(getattr(protocol, "reader", None), "eof"), "ServerProtocol.reader.eof")
    need(getattr(protocol, "current_size", 0) is None, "ServerProtocol.current_size None at first")
    for name in ("CONNECTING", "OPEN", "CLOSING", "CLOSED"):
        need(hasattr(State, name), f"State.{name}")
    fields = inspect.signature(Frame).parameters
    need({"opcode", "data", "fin"} <= set(fields), "Frame(opcode, data, fin)")
    for name in ("TEXT", "BINARY", "CONT"):
        need(getattr(Opcode, name) is getattr(websockets.frames, name, None), f"frames.{name}")
    need(CloseCode.TRY_AGAIN_LATER == 1013, "CloseCode.TRY_AGAIN_LATER")
    need(callable(getattr(websockets.frames, "apply_mask", None)), "frames.apply_mask()")
    parameters = inspect.signature(plain_serve).parameters
    for name in ("create_connection", "compression", "max_size", "logger", "ping_interval",
                 "open_timeout", "close_timeout"):  # fmt: skip
        need(name in parameters, f"serve({name}=)")
    assert not missing, f"websockets {websockets.__version__} has changed: {', '.join(missing)}"


# --- the life of the process -------------------------------------------------------------------


class Karna:
    """A server in a process of its own."""

    def __init__(self, child: subprocess.Popen[bytes], log_path: Path) -> None:
        self.child = child
        self.pid = child.pid
        self.log_path = log_path
        self.port = 0

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def is_running(self) -> bool:
        return self.child.poll() is None

    def stop(self, number: int = signal.SIGTERM) -> None:
        self.child.send_signal(number)

    async def ended(self) -> int:
        """The exit code, once there is one."""
        await until(lambda: self.child.poll() is not None)
        return self.child.returncode


ENVIRONMENT = {
    **{
        key: value for key, value in os.environ.items() if not key.startswith(("KARNA_", "LISTEN_"))
    },
    "PYTHONPATH": str(HERE),
    "PYTHONDONTWRITEBYTECODE": "1",
}
# Commands that a test needs beyond the built-in ones, and which limits the child has.
CHILD = """
import asyncio, sys
import karna_ws, services
services.CANCEL_WAIT_S = 0.5
make_manager = karna_ws.make_manager

def make(arguments):
    manager = make_manager(arguments)

    @manager.commands.command
    async def wait(seconds: float) -> str:
        "Wait."
        await asyncio.sleep(seconds)
        return "waited"

    @manager.commands.command
    async def stubborn() -> None:
        "Refuse to be cancelled."
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                pass
    return manager

karna_ws.make_manager = make
sys.exit(karna_ws.main(sys.argv[1:]))
"""


def start_process(arguments: list[str], **options: Any) -> subprocess.Popen[Any]:
    return subprocess.Popen(arguments, **options)  # starting one blocks, but not for long


@contextlib.asynccontextmanager
async def process(
    *flags: str, port: int | None = 0, environment: dict[str, str] | None = None, **options: Any
) -> AsyncIterator[Karna]:
    """A server as a subprocess, once it listens; killed at the end if it still runs."""
    directory = Path(os.environ.get("TMPDIR", "/tmp")) / f"karna-test-{os.getpid()}"
    directory.mkdir(exist_ok=True)
    log_path = directory / f"{time.monotonic_ns()}.log"
    if port == 0:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
    where = [] if port is None else ["--port", str(port)]
    with log_path.open("wb") as log:
        child = start_process(
            [sys.executable, "-c", CHILD, *where, *flags],
            **{"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "cwd": HERE,
               "env": {**ENVIRONMENT, **(environment or {})}, **options},
        )  # fmt: skip
    karna = Karna(child, log_path)
    try:
        if port is not None:
            karna.port = port
            await until(lambda: not karna.is_running() or answers_on(port))
            token = flags[flags.index("--token") + 1] if "--token" in flags else ""
            status = head("GET", "/api/status", {"Authorization": f"Bearer {token}"})
            while karna.is_running() and b'"starting"' in (await ask(port, status)).body:
                pass  # its services' states are broadcast until they have started
        yield karna
    finally:
        if karna.is_running():
            child.kill()
        child.wait()
        shutil.rmtree(directory, ignore_errors=True)


def answers_on(port: int | str) -> bool:
    with socket.socket(socket.AF_UNIX if isinstance(port, str) else socket.AF_INET) as probe:
        return probe.connect_ex(port if isinstance(port, str) else ("127.0.0.1", port)) == 0


AUTH = ["--token", TOKEN]


async def test_sigterm_lets_commands_end_then_cancels_them_and_says_1012() -> None:
    # 0.0 SIGTERM; 0.4 the short command ends; 0.8 the grace is over.
    async with process("--grace", "0.8", "--close-timeout", "1") as karna:
        port = karna.port
        async with raw(port) as peer, engine(port) as session, dial(port) as http:
            await peer.send_json(command("wait 0.4", "short"))
            await peer.send_json(command("wait 60", "long"))
            await peer.send_json(request("get_status", 1))
            assert (await peer.json())["id"] == 1
            text = json.dumps(command("wait 60")).encode()
            await session.send(frame(1, b'42/ws,5["rpc",%b]' % text))
            await http.send(post("/api/execute_command", {"command": "wait 60"}))
            while (await get_metrics(port))["karna_sockets"] < 4:
                pass
            began = time.monotonic()
            karna.stop()
            while (health := await ask(port, head("GET", "/health"))).status == 200:
                pass
            assert (health.status, health.json) == (503, {"status": "draining"})
            refused = await ask(port, upgrade())
            assert refused.status == 503 and "retry-after" in refused.headers
            await peer.send_json(command("echo late", 2))
            assert (await peer.json())["data"]["code"] == "unavailable"
            await peer.send_json(request("get_status", 3))
            assert (await peer.json())["id"] == 3
            answer = await peer.json()
            assert (answer["id"], answer["data"]["result"]) == ("short", "waited")
            answer = await peer.json()
            assert (answer["id"], answer["data"]["code"]) == ("long", "cancelled")
            assert b'"code":"cancelled"' in (await session.frame()).payload
            answer_ = await http.answer()
            assert (answer_.status, answer_.error["code"]) == (409, "cancelled")
            for each in (peer, session):
                closed = await each.closed()
                assert (closed.code, closed.reason) == (1012, "service restart")
            assert await http.at_end()
            assert await karna.ended() == 0
            assert 0.7 < time.monotonic() - began < 2.5
        assert "Traceback" not in karna.log()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_idle_server_ends_at_once_on_a_signal(number: signal.Signals) -> None:
    async with process() as karna, raw(karna.port) as peer:
        began = time.monotonic()
        karna.stop(number)
        assert (await peer.closed()).code == 1012
        peer.writer.close()
        assert await karna.ended() == 0
        assert time.monotonic() - began < 1.0
        assert number.name in karna.log()


async def test_second_signal_ends_the_process_at_once() -> None:
    async with process("--grace", "30") as karna, raw(karna.port) as peer:
        await peer.send_json(command("wait 60", 1))
        await peer.sync()
        karna.stop()
        while (await ask(karna.port, head("GET", "/health"))).status == 200:
            pass
        assert karna.is_running()
        karna.stop(signal.SIGINT)
        assert await karna.ended() == 128 + signal.SIGINT


async def test_second_signal_ends_programs_too() -> None:
    async with process("--grace", "30", "--allow-program", "sh") as karna, raw(karna.port) as peer:
        await peer.send_json(command("sh -c 'trap : TERM; echo $$; while :; do sleep 1; done'", 1))
        while (report := await peer.json())["type"] != "command_progress":
            pass
        shell = int(report["data"]["progress"]["line"])
        karna.stop()
        while (await ask(karna.port, head("GET", "/health"))).status == 200:
            pass
        assert is_alive(shell)
        karna.stop()
        assert await karna.ended() == 128 + signal.SIGTERM
        while is_alive(shell):
            await asyncio.sleep(0.01)


async def test_commands_that_wait_use_the_grace_too() -> None:
    async with (
        process("--grace", "10", "--max-running-commands", "1") as karna,
        raw(karna.port) as peer,
    ):
        for id in range(4):
            await peer.send_json(command("wait 0.1", id))
        await peer.sync()
        karna.stop()
        for id in range(4):
            answer = await peer.json()
            assert (answer["id"], answer["data"].get("result")) == (id, "waited")
        assert (await peer.closed()).code == 1012


async def test_command_that_refuses_to_be_cancelled_does_not_hold_up_the_end() -> None:
    async with (
        process("--grace", "0.1", "--close-timeout", "0.2") as karna,
        raw(karna.port) as peer,
    ):
        await peer.send_json(command("stubborn", 1))
        await peer.sync()
        karna.stop()
        answer = await peer.json()
        assert (answer["id"], answer["type"]) == (1, "error")
        assert (await peer.closed()).code == 1012
        assert await karna.ended() == 0


async def test_server_restarts_on_the_same_port_at_once() -> None:
    async with process() as first:
        port = first.port
        async with raw(port) as peer, raw(port):
            first.stop()
            await peer.closed()  # the server closed first: its side of the socket lingers
            assert await first.ended() == 0
        async with process(port=port) as second:
            assert (await ask(port, head("GET", "/health"))).status == 200
            second.stop(signal.SIGKILL)
            await second.ended()
        async with process(port=port):
            assert (await ask(port, head("GET", "/health"))).status == 200


def run_to_end(
    *flags: str, environment: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(HERE / "karna_ws.py"), *flags],
        **{"capture_output": True, "text": True, "timeout": 15, "stdin": subprocess.DEVNULL,
           "env": {**ENVIRONMENT, **(environment or {})}, **options},
    )  # fmt: skip


WRONG_STARTS: list[tuple[list[str], dict[str, str], str]] = [
    (["--host", "0.0.0.0"], {}, "--token or KARNA_TOKEN"),
    (["--host", "::"], {}, "--insecure-no-token"),
    (["--host", "no-such-host.invalid"], {}, "no-such-host.invalid"),
    (["--port", "x"], {}, "--port"),
    (["--port", "70000"], {}, "port"),
    (["--port", "-1"], {}, "port"),
    (["--no-such-flag"], {}, "--no-such-flag"),
    (["stray"], {}, "stray"),
    (["--token"], {}, "--token"),
    (["--token", ""], {}, "token"),
    (["--token", " "], {}, "token"),
    (["--log-level", "loud"], {}, "--log-level"),
    (["--loop", "tornado"], {}, "uvloop"),
    (["--max-clients", "0"], {}, "--max-clients"),
    (["--max-message", "nan"], {}, "--max-message"),
    (["--command-timeout", "nan"], {}, "--command-timeout"),
    (["--command-timeout", "inf"], {}, "--command-timeout"),
    (["--grace", "-1"], {}, "grace"),
    (["--allow-origin", "app.example"], {}, "https://app.example"),
    (["--allow-origin", "*"], {}, "https://app.example"),
    (["--allow-origin", "https://app.example/"], {}, "without a path"),
    (["--namespace", "chat"], {}, "namespace"),
    (["--certfile", "/nowhere/cert.pem"], {}, "/nowhere/cert.pem"),
    (["--keyfile", "/nowhere/key.pem"], {}, "certfile"),
    (["--unix", "/nowhere/karna.sock"], {}, "/nowhere/karna.sock"),
    (["--unix", "/etc/passwd"], {}, "/etc/passwd"),
    (["--allow-program", "no-such-program-here"], {}, "no-such-program-here"),
    (["--vision-url", "gopher://x"], {}, "http://localhost"),
    ([], {"KARNA_PORT": "x"}, "--port"),
    ([], {"KARNA_MAX_CLIENTS": "many"}, "--max-clients"),
    ([], {"KARNA_MAX_CLIENTS": "-3"}, "--max-clients"),
    ([], {"KARNA_REUSE_PORT": "perhaps"}, "KARNA_REUSE_PORT"),
    ([], {"KARNA_ALLOW_ORIGIN": "https://a.example,null"}, "null"),
    ([], {"KARNA_TOKEN": " "}, "token"),
    (["--allow-host", "karna.example:80"], {}, "without a port"),
    ([], {"KARNA_LOG_LEVEL": "loud"}, "--log-level"),
]


@pytest.mark.parametrize(("flags", "environment", "names"), WRONG_STARTS)
def test_wrong_start_ends_with_2_and_one_line_that_names_the_mend(
    flags: list[str], environment: dict[str, str], names: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(logging, "raiseExceptions", True)  # main() changes it; this brings it back
    monkeypatch.setenv("KARNA_PORT", "0")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    try:
        code: Any = karna_ws.main(flags)
    except SystemExit as ended:
        code = ended.code
    shown = capsys.readouterr()
    assert (code, shown.out) == (2, "")
    assert shown.err.startswith("karna_ws: ") and shown.err.count("\n") == 1
    assert names in shown.err


async def test_process_that_can_not_start_ends_with_2_and_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = await asyncio.to_thread(run_to_end, "--port", str(port))
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr == (
            f"karna_ws: 127.0.0.1:{port} is in use; choose another with --port\n"
        )
    ended = await asyncio.to_thread(run_to_end, "--host", "0.0.0.0", "--port", "0")
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)


async def test_flags_outrank_the_environment_and_lists_are_split() -> None:
    environment = {
        "KARNA_TOKEN": "from-elsewhere", "KARNA_MAX_CLIENTS": "1",
        "KARNA_ALLOW_ORIGIN": "https://a.example, https://b.example",
    }  # fmt: skip
    async with process("--token", TOKEN, environment=environment) as karna:
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        async with raw(karna.port, headers={**bearer, "Origin": "https://b.example"}):
            assert (await ask(karna.port, upgrade(headers=bearer))).status == 503
        wrong = {"Authorization": "Bearer from-elsewhere"}
        assert (await ask(karna.port, upgrade(headers=wrong))).status == 401
        karna.stop()
        assert await karna.ended() == 0
        assert TOKEN not in karna.log() and "from-elsewhere" not in karna.log()


async def test_unix_socket_is_its_owners_alone_and_gone_at_the_end(tmp_path: Path) -> None:
    socket_path = tmp_path / "karna.sock"
    path = str(socket_path)
    async with process("--unix", path, port=None) as karna:
        await until(lambda: socket_path.exists() and answers_on(path))
        assert socket_path.stat().st_mode & 0o777 == 0o600
        assert (await ask(path, head("GET", "/health"))).status == 200
        async with raw(path) as peer:
            await peer.send_json(command("echo unix", 1))
            assert (await peer.json())["data"]["result"] == "unix"
            ended = await asyncio.to_thread(
                run_to_end, "--unix", path
            )  # a live one is not taken over
            assert ended.returncode == 2 and ended.stderr.count("\n") == 1
            assert f"{path} is in use" in ended.stderr and "--unix" in ended.stderr
            await peer.send_json(command("echo still", 2))
            assert (await peer.json())["data"]["result"] == "still"
        for request_, status in (
            (upgrade(headers={"Host": "evil.example"}), 403),
            (upgrade(headers={"Origin": "http://evil.example"}), 403),
        ):
            assert (await ask(path, request_)).status == status
        karna.stop()
        assert await karna.ended() == 0
        assert not socket_path.exists()
    async with process("--unix", path, port=None) as karna:
        await until(lambda: socket_path.exists() and answers_on(path))
        karna.stop(signal.SIGKILL)
        await karna.ended()
        assert socket_path.exists()
    async with process("--unix", path, port=None) as karna:  # a dead one is
        await until(lambda: answers_on(path))
        assert (await ask(path, head("GET", "/health"))).status == 200


def make_certificate(directory: Path) -> tuple[str, str]:
    needs("openssl")
    cert, key = str(directory / "cert.pem"), str(directory / "key.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost",
         "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


async def test_tls_serves_every_door_and_refuses_what_is_no_tls(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)
    trusting = ssl.create_default_context(cafile=cert)
    tls = {"ssl": trusting, "server_hostname": "localhost"}
    options = {"certfile": cert, "keyfile": key, "open_timeout_s": 0.4, "close_timeout_s": 0.4}
    async with hardening_serving(WebSocketManager(), port=0, **options) as server:
        assert (await ask(server.port, head("GET", "/health"), **tls)).status == 200
        async with raw(server.port, headers={"Origin": "https://localhost"}, **tls) as peer:
            await peer.send_json(command("echo " + "x" * 100_000, 1))
            assert (await peer.json())["data"]["result"] == "x" * 100_000
            await peer.send(close_frame())
            assert (await peer.frame()).code == 1000
        answer = await ask(server.port, post("/api/execute_command", {"command": "time"}), **tls)
        assert answer.status == 200
        async with dial(server.port) as plain:
            await plain.send(head("GET", "/health"))
            assert b"200 OK" not in await plain.reader.read()
        async with dial(server.port) as silent:  # a handshake that never comes has its time, too
            began = time.monotonic()
            assert await silent.at_end()
            assert time.monotonic() - began < 1.5
    for bad in ({"certfile": key}, {"certfile": cert, "keyfile": cert}):
        with pytest.raises(karna_ws.StartError, match="TLS certificate"):
            async with hardening_serving(WebSocketManager(), port=0, **bad):
                pass


@contextlib.asynccontextmanager
async def activated(listening: socket.socket, *flags: str, count: str = "1") -> AsyncIterator[Any]:
    """A server that is given its listening socket as systemd gives it: descriptor 3."""
    child = start_process(
        ["sh", "-c", 'export LISTEN_PID=$$; exec "$0" "$@"', sys.executable,
         str(HERE / "karna_ws.py"), *flags],
        env={**ENVIRONMENT, "LISTEN_FDS": count, "LISTEN_FDNAMES": "karna.socket"},
        preexec_fn=lambda: os.dup2(listening.fileno(), 3), pass_fds=[3],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.communicate()


async def test_listening_socket_is_taken_over_from_systemd() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        async with activated(listening, "--port", "1") as child:  # the port is the socket's
            assert (await ask(port, head("GET", "/health"))).status == 200
            async with raw(port) as peer:
                child.send_signal(signal.SIGTERM)
                assert (await peer.closed()).code == 1012
            await until(lambda: child.poll() is not None)
            assert child.returncode == 0
        async with activated(listening) as child:  # the next one finds what has queued meanwhile
            assert (await ask(port, head("GET", "/health"))).status == 200


async def test_listening_socket_beyond_loopback_needs_a_token_too() -> None:
    with socket.create_server(("0.0.0.0", 0)) as listening:
        for flags, count, names in (([], "1", "--token"), (AUTH, "2", "LISTEN_FDS")):
            async with activated(listening, *flags, count=count) as child:
                await until(lambda: child.poll() is not None)
                assert child.returncode == 2
                error = child.stderr.read()
                assert names in error and error.count("\n") == 1


@pytest.mark.parametrize("closed", ["0<&- 1>&- 2>&-", "1>&-", "2>&-", "2>/dev/full", "1>/dev/full",
                                    "1>/dev/full 2>/dev/full"])  # fmt: skip
async def test_server_goes_on_without_anywhere_to_write(closed: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = [
        sys.executable,
        str(HERE / "karna_ws.py"),
        "--port",
        str(port),
        "--log-level",
        "debug",
    ]
    child = start_process(
        ["sh", "-c", f'exec "$0" "$@" {closed}', *arguments],
        env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        await until(lambda: child.poll() is not None or answers_on(port))
        for _ in range(3):
            assert (
                await ask(port, upgrade(headers={"Origin": "http://evil.example"}))
            ).status == 403
        async with raw(port) as peer, engine(port):
            await peer.send_json(command("nonsense", 1))
            assert (await peer.json())["data"]["code"] == "unknown_command"
            await peer.send_json(command("echo on", 2))
            assert (await peer.json())["data"]["result"] == "on"
            again = await asyncio.to_thread(
                subprocess.run, ["sh", "-c", f'exec "$0" "$@" {closed}', *arguments],
                env=ENVIRONMENT, capture_output=True,
            )  # fmt: skip
            assert again.returncode == 2  # in use, and nowhere to say so
            child.send_signal(signal.SIGTERM)
            assert (await peer.closed()).code == 1012
        await until(lambda: child.poll() is not None)
        assert child.returncode == 0
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_server_survives_the_lack_of_descriptors(loop: str) -> None:
    if loop == "uvloop":
        needs("uvloop")

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))

    async with process("--loop", loop, preexec_fn=few) as karna:
        async with raw(karna.port) as peer, contextlib.AsyncExitStack() as stack:
            for _ in range(60):  # the kernel completes them, whether they are accepted or not
                await stack.enter_async_context(dial(karna.port))
            for number in range(20):
                await peer.send_json(command(f"echo {number}", number))
                assert (await peer.json())["id"] == number
                await asyncio.sleep(0.02)
            assert karna.is_running()
        # Accepting pauses for a second after each failure, or libuv resets who comes too early.
        while True:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                assert (await ask(karna.port, head("GET", "/health"))).status == 200
                break
        assert karna.is_running()
        assert len(karna.log().splitlines()) < 60
        karna.stop()
        assert await karna.ended() == 0


@needs_proc
async def test_flood_of_hostile_connections_leaves_the_log_short_and_the_server_well() -> None:
    async with process("--log-level", "debug", "--max-clients", "5") as karna:
        port = karna.port
        before = resident_peak(karna.pid)

        async def attack(number: int) -> None:
            kinds = [
                upgrade(headers={"Origin": f"http://e{number}.example"}),
                upgrade(headers={"Host": f"h{number}.example"}),
                upgrade() + frame(3),
                upgrade(ENGINE) + frame(1, b"x%d" % number),
                upgrade() + frame(1, b"\xff"),
                b"GARBAGE %d\r\n\r\n" % number,
                b"\x16\x03\x01" + b"x" * 200,
                head("GET", f"/nowhere/{number}"),
                post("/rpc", b"{" * 1000),
            ]
            with contextlib.suppress(ConnectionError):
                async with dial(port) as peer:
                    await peer.send(kinds[number % len(kinds)])
                    await peer.reader.read(100)

        for start in range(0, 1500, 50):
            await asyncio.gather(*(attack(number) for number in range(start, start + 50)))
        assert (await ask(port, head("GET", "/health"))).status == 200
        found = await get_metrics(port)
        assert found["karna_refused_total{reason=forbidden}"] >= 300
        assert len(karna.log().splitlines()) < 200  # of 500 refusals, in two windows at most
        assert resident_peak(karna.pid) - before < 30_000_000
        assert "Traceback" not in karna.log()


# --- services ---------------------------------------------------------------------------------


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancelled handler is left behind after 50 ms, programs get as long between signals."""
    monkeypatch.setattr(services, "CANCEL_WAIT_S", 0.05)


async def services_execute(
    commands: CommandProcessor, line: str, context: Context | None = None, **params: Any
) -> Any:
    call = commands.prepare(line, params)
    return await asyncio.wait_for(commands.run(call, context or Context()), DEADLINE_S)


def processor(*functions: Callable[..., Any], **options: Any) -> CommandProcessor:
    commands = CommandProcessor(builtins=False, **options)
    for function in functions:
        commands.command(function)
    return commands


# ---- services --------------------------------------------------------------------------------


class Scripted(Service):
    """A service whose starts and checks do what a script says: an exception, or None to succeed."""

    def __init__(self, starts: list[Any] = [], checks: list[Any] = []) -> None:  # noqa: B006
        super().__init__("scripted")
        self.starts, self.checks = iter(starts), iter(checks)
        self.seen: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        self.on_change = lambda service: self.seen.put_nowait((service.state, service.detail))
        self.stopped = 0

    async def play(self, script: Iterator[Any]) -> None:
        step = next(script, None)
        if isinstance(step, BaseException):
            raise step
        if step is not None:
            await step()

    async def start(self) -> None:
        await self.play(self.starts)

    async def check(self) -> None:
        await self.play(self.checks)

    async def stop(self) -> None:
        self.stopped += 1


@contextlib.asynccontextmanager
async def monitoring(*watched: Service, **options: Any) -> AsyncIterator[Monitor]:
    """A monitor at 1/500 of its usual speed: 10 ms between checks, 2 ms to the first retry."""
    monitor = Monitor(watched, **{"interval_s": 0.01, "timeout_s": 0.05} | options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(services, "RETRY_FIRST_S", 0.002)
        patch.setattr(services, "RETRY_MAX_S", 0.02)
        monitor.start()
        try:
            yield monitor
        finally:
            await monitor.stop()


async def states(service: Scripted, count: int) -> list[tuple[str, str]]:
    return [await asyncio.wait_for(service.seen.get(), DEADLINE_S) for _ in range(count)]


def test_service_calls_back_only_when_something_changes() -> None:
    service, changes, touches = Service("s"), [], []
    service.on_change, service.on_touch = changes.append, lambda: touches.append(1)
    since = service.since = "2000-01-01T00:00:00.000Z"
    service.set_state("starting", "warming up")
    assert service.since == since  # the detail alone moves nothing
    service.set_state("starting", "warming up")
    service.set_state("running", "two\nlines\x00 of it")
    assert (len(changes), len(touches)) == (2, 2)
    assert service.get_status() == {
        "state": "running", "detail": "two lines of it", "since": service.since}  # fmt: skip
    assert service.since > since


def test_service_survives_callback_that_raises(caplog: pytest.LogCaptureFixture) -> None:
    service = Service("s")
    service.on_change = lambda service: 1 / 0  # type: ignore[assignment,return-value]
    service.set_state("running")
    assert "callback of service s" in caplog.text


def test_utc_now_is_rfc_3339_with_milliseconds() -> None:
    import datetime

    text = services.utc_now()
    told = datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=datetime.UTC)
    assert len(text) == 24 and abs(told.timestamp() - time.time()) < 5


async def test_monitor_runs_service_that_starts_and_checks() -> None:
    service = Scripted()
    async with monitoring(service):
        assert await states(service, 1) == [("running", "")]
    assert (service.state, service.stopped) == ("stopped", 1)


async def hang() -> None:
    await asyncio.Event().wait()


FAILING_STARTS = [
    (OSError("no disk"), "no disk"),
    (ValueError(), "ValueError"),
    (SystemExit(3), "3"),
    (KeyboardInterrupt(), "KeyboardInterrupt"),
    (asyncio.CancelledError(), "CancelledError"),
    (hang, "no answer to start within 0.05 s"),
]


@pytest.mark.parametrize(("start", "detail"), FAILING_STARTS, ids=lambda value: repr(value)[:30])
async def test_monitor_retries_start_that_fails(start: Any, detail: str) -> None:
    service = Scripted(starts=[start])
    async with monitoring(service):
        assert await states(service, 2) == [("failed", detail), ("running", "")]


@pytest.mark.parametrize(
    "check", [Unavailable("away"), OSError("away"), SystemExit("away")], ids=repr
)
async def test_monitor_degrades_service_whose_check_fails(check: BaseException) -> None:
    service = Scripted(checks=[None, check, check])
    async with monitoring(service):
        assert await states(service, 3) == [("running", ""), ("degraded", "away"), ("running", "")]


async def test_monitor_shows_no_running_before_first_check_has_failed() -> None:
    service = Scripted(checks=[Unavailable("away")])
    async with monitoring(service):
        assert await states(service, 2) == [("degraded", "away"), ("running", "")]


async def test_monitor_degrades_service_whose_check_hangs_and_swallows_cancellation(
    scaled: None,
) -> None:
    go = asyncio.Event()

    async def stubborn() -> None:
        while not go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await go.wait()

    service = Scripted(checks=[stubborn])
    async with monitoring(service):
        [(state, detail), (later, _)] = await states(service, 2)
        assert (state, later) == ("degraded", "running") and "0.05 s" in detail
        go.set()


async def test_monitor_believes_service_that_says_its_state() -> None:
    service = Scripted()

    async def say() -> None:
        service.set_state("degraded", "half of it works")

    service.checks = iter([say, say, None])
    async with monitoring(service):
        assert await states(service, 2) == [("degraded", "half of it works"), ("running", "")]


async def test_monitor_leaves_state_to_service_that_checks_nothing() -> None:
    service = Service("plain")
    changed: asyncio.Queue[str] = asyncio.Queue()
    service.on_change = lambda service: changed.put_nowait(service.state)
    async with monitoring(service) as monitor:
        assert await changed.get() == "running"
        service.set_state("failed", "its link broke")
        assert monitor._task is not None
        await monitor._task  # it has nothing left to watch
        assert service.state == "failed"


async def test_monitor_stops_while_check_hangs() -> None:
    checking = asyncio.Event()

    async def wait() -> None:
        checking.set()
        await hang()

    service = Scripted(checks=[wait])
    async with monitoring(service, timeout_s=DEADLINE_S):
        await checking.wait()
    assert service.state == "stopped"


async def test_monitor_doubles_delay_with_jitter_up_to_its_maximum() -> None:
    monitor = Monitor([], interval_s=5)
    for failures, nominal in [(1, 1), (2, 2), (5, 16), (6, 30), (10_000, 30)]:
        delays = {monitor._delay_s(failures) for _ in range(50)}
        assert len(delays) > 1 and all(0.75 * nominal <= d <= 1.25 * nominal for d in delays)
    assert monitor._delay_s(0) == 5


async def test_monitor_stops_services_in_reverse_each_bounded(scaled: None) -> None:
    stopped: list[str] = []

    class Stopping(Service):
        async def stop(self) -> None:
            stopped.append(self.name)
            if self.name == "b":
                await hang()
            if self.name == "a":
                raise SystemExit(1)

    watched = [Stopping("a"), Stopping("b"), Stopping("c")]
    async with monitoring(*watched):
        pass
    assert stopped == ["c", "b", "a"]
    assert [service.state for service in watched] == ["stopped"] * 3


# ---- commands: from a line to a call ---------------------------------------------------------

LINE = st.text(st.one_of(st.sampled_from(" \t\r\n\"'\\ab-="), st.characters()), max_size=30)


@settings(max_examples=200, deadline=None)
@given(LINE)
def test_split_words_is_shlex(line: str) -> None:
    try:
        expected = shlex.split(line)
    except ValueError:
        with pytest.raises(UsageError, match="no closing quote|nothing to escape"):
            services.split_words(line)
    else:
        assert services.split_words(line) == expected


@settings(max_examples=200, deadline=None)
@given(LINE)
def test_prepare_splits_as_shlex_does(line: str) -> None:
    commands = processor(services_lambda_any)
    try:
        expected = shlex.split("any " + line)[1:]
    except ValueError:
        with pytest.raises(UsageError):
            commands.prepare("any " + line)
    else:
        assert commands.prepare("any " + line).args == expected


def services_lambda_any(*words: Any) -> Any:
    return list(words)


services_lambda_any.__name__ = "any"


@pytest.mark.parametrize(
    "line", ["'a" * 200_000 + "'" * (200_000 % 2), '"' + "\\\\" * 400_000 + '"', "a" * 10**6]
)
def test_split_words_takes_linear_time(line: str) -> None:
    began = time.process_time()
    with contextlib.suppress(UsageError):
        services.split_words(line)
    assert time.process_time() - began < 1.5


def shapes() -> CommandProcessor:
    commands = CommandProcessor(builtins=False)

    @commands.command
    def move(
        x: int,
        y: float = 0.5,
        *tags: str | None,
        fast: bool = False,
        level: Literal["low", "high"] = "low",
    ) -> Any:
        return x, y, tags, fast, level

    @commands.command(name="set", aliases=("put", "let"))
    def set_(key: str, value: Optional[int] = None, *, dry_run: bool = True, by: str) -> Any:  # noqa: UP045
        return key, value, dry_run, by

    @commands.command
    def loose(a, b=2, *rest, **more) -> Any:  # type: ignore[no-untyped-def]
        return a, b, rest, more

    @commands.command
    def typed(n: int | str = 1, j: dict[str, Any] | None = None, l: list[int] | None = None, b: bytes | str = b"",  # noqa: E741
              c: Literal[1, True, "x", None] = None) -> Any:  # fmt: skip
        return n, j, l, b, c

    @commands.command
    def must(*, sure: bool, size: int, tone: Literal["a", None] = None) -> Any:
        return sure, size, tone

    @commands.command
    def total(*numbers: float) -> float:
        return sum(numbers)

    return commands


GOOD_LINES: list[tuple[str, dict[str, Any], Any]] = [
    ("move 3", {}, (3, 0.5, (), False, "low")),
    ("move -3 1e3 a b --fast", {}, (-3, 1000.0, ("a", "b"), True, "low")),
    ("move --level=high 3 --no-fast", {}, (3, 0.5, (), False, "high")),
    ("move --level high 3 --fast=on", {}, (3, 0.5, (), True, "high")),
    ("move 3 -- 1 --fast", {}, (3, 1.0, ("--fast",), False, "low")),
    ("move 3", {"fast": True, "level": "high"}, (3, 0.5, (), True, "high")),
    ("move", {"x": 1, "y": 2}, (1, 2.0, (), False, "low")),
    ("move", {"x": "1", "tags": ["a", "b"]}, (1, 0.5, ("a", "b"), False, "low")),
    ("move 1 2 --fast=no", {"tags": "a"}, (1, 2.0, ("a",), False, "low")),
    ("set k --by me", {}, ("k", None, True, "me")),
    ("put k 5 --by=me --no-dry-run", {}, ("k", 5, False, "me")),
    ("let '' --by ''", {"value": None}, ("", None, True, "")),
    ("loose 1", {}, ("1", 2, (), {})),
    ("loose 1 x y --z w --dash-ed=v", {"q": [1]}, ("1", "x", ("y",), {"z": "w", "dash_ed": "v", "q": [1]})),
    ("loose", {"a": b"raw", "b": None}, (b"raw", None, (), {})),
    ("typed 5", {}, (5, None, None, b"", None)),
    ("typed five", {"j": {"k": 1}, "l": [1, "2"], "b": b"\0"}, ("five", {"k": 1}, [1, 2], b"\0", None)),
    ("typed", {"c": True, "b": "text", "n": 7}, (7, None, None, "text", True)),
    ("typed", {"c": 1, "j": None}, (1, None, None, b"", 1)),
    ("typed", {"c": "x"}, (1, None, None, b"", "x")),
    ("must --no-sure --size 5", {"tone": None}, (False, 5, None)),
    ("total 1 2.5", {}, 3.5),
    ("total", {"numbers": [1, "2"]}, 3.0),
]  # fmt: skip


@pytest.mark.parametrize(("line", "params", "expected"), GOOD_LINES, ids=lambda v: str(v)[:40])
async def test_command_takes_words_options_and_params(
    line: str, params: dict[str, Any], expected: Any
) -> None:
    result = await services_execute(shapes(), line, **params)
    assert result == expected
    if isinstance(expected, tuple):
        assert [type(value) for value in result] == [type(value) for value in expected]


BAD_LINES: list[tuple[str, dict[str, Any], str]] = [
    ("move", {}, "X is missing"),
    ("move x", {}, "X must be a whole number, not 'x'"),
    ("move 1_000", {}, "whole number"),
    ("move ٣", {}, "whole number"),
    (f"move {'9' * 5_000}", {}, "whole number"),
    ("move 3 nan", {}, "Y must be a finite number"),
    ("move 3 -inf", {}, "finite"),
    ("move 3 1e999", {}, "finite"),
    ("move 3 1_0", {}, "finite"),
    ("move 3 --level", {}, "--level needs a value"),
    ("move 3 --level mid", {}, "--level must be one of low, high, not 'mid'"),
    ("move 3 --fast=perhaps", {}, "--fast must be true or false"),
    ("move 3 --fast --no-fast", {}, "--fast is given twice"),
    ("move 3 --quick", {}, "unknown option '--quick'"),
    ("move 3 --no-level", {}, "unknown option '--no-level'"),
    ("move 3 --x 4", {}, "unknown option '--x'"),
    ("move 3", {"x": 4}, "X is given twice"),
    ("move 3 --fast", {"fast": True}, "given twice"),
    ("move", {"x": True}, "X must be a whole number, not bool"),
    ("move", {"x": 1.5}, "not float"),
    ("move", {"x": None}, "not NoneType"),
    ("move 3", {"y": 10**400}, "Y must be a finite number"),
    ("move 3", {"y": True}, "finite"),
    ("move 3", {"fast": 1}, "--fast must be true or false"),
    ("move 3", {"level": 1}, "one of low, high"),
    ("move 3", {"speed": 1}, "unknown parameter 'speed'"),
    ("move 3", {"tags": [1]}, "TAGS must be a text"),
    ("set k", {}, "--by is missing"),
    ("set k 1 2 --by me", {}, "too many arguments, from '2' on"),
    ("set k", {"by": b"me"}, "--by must be a text, not bytes"),
    ("typed", {"l": [1, "x"]}, "L must be a whole number"),
    ("typed", {"l": "1"}, "L must be a list"),
    ("typed", {"j": [1]}, "J must be an object"),
    ("typed", {"b": 1}, "B must be bytes or must be a text"),
    ("typed", {"c": 2}, "C must be one of"),
    ("must --size 1", {}, "--sure is missing"),
    ("total", {}, "NUMBERS is missing"),
    ("loose 1 --a 2", {}, "unknown option '--a'"),
    ("loose 1", {"": 1}, "unknown parameter ''"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "params", "problem"), BAD_LINES, ids=lambda v: str(v)[:40])
def test_command_refuses_wrong_arguments(line: str, params: dict[str, Any], problem: str) -> None:
    commands = shapes()
    with pytest.raises(UsageError) as caught:
        commands.prepare(line, params)
    assert problem in str(caught.value)
    usage = commands.commands[line.split()[0]].usage
    assert caught.value.data == {"usage": usage} and str(caught.value).endswith(f"usage: {usage}")
    assert len(str(caught.value)) < 300


SERVICES_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["move", "set", "loose", "typed", "total"]),
    LINE,
    st.dictionaries(
        st.sampled_from(["x", "y", "tags", "fast", "by", "j", "l", "numbers", "zz"]),
        SERVICES_JSON,
        max_size=3,
    ),
)
def test_prepare_raises_nothing_but_service_errors(
    name: str, line: str, params: dict[str, Any]
) -> None:
    with contextlib.suppress(UsageError):
        call = SHAPES.prepare(f"{name} {line}", params)
        call.command.function(*call.args, **call.kwargs)  # what binds can be called


SHAPES = shapes()


def test_command_shows_usage_and_arguments() -> None:
    commands = shapes().commands
    assert commands["move"].usage == "move X [Y] [TAGS]... [--fast] [--level low|high]"
    assert commands["set"].usage == "set KEY [VALUE] [--no-dry-run] --by BY"
    assert commands["loose"].usage == "loose A [B] [REST]... [--NAME VALUE]..."
    assert commands["total"].usage == "total NUMBERS..."
    assert commands["must"].usage == "must --sure|--no-sure --size SIZE [--tone a]"
    assert commands["put"] is commands["set"]
    assert commands["move"].arguments == [
        {"name": "x", "type": "int", "required": True},
        {"name": "y", "type": "float", "required": False, "default": 0.5},
        {"name": "tags", "type": "str", "required": False, "repeated": True},
        {"name": "fast", "type": "bool", "required": False, "default": False, "option": "--fast"},
        {"name": "level", "type": "str", "required": False, "default": "low", "choices": ["low", "high"], "option": "--level"},
    ]  # fmt: skip


def test_command_without_options_takes_dashes_as_they_are() -> None:
    def say(first: str, *rest: str | None) -> None: ...

    assert processor(say).prepare("say --a -- -b --c=d").args == ["--a", "--", "-b", "--c=d"]


def test_prepare_keeps_inline_calls_and_no_others() -> None:
    commands = CommandProcessor()
    assert commands.prepare("echo a") is commands.prepare("echo a")
    assert commands.prepare("countdown 1").args is not commands.prepare("countdown 1").args
    assert commands.prepare("help", {"command": "echo"}).args == ["echo"]
    assert commands.prepare("help").args == [None]
    commands.add(Command(lambda *text: "mine", name="echo", inline=True))
    assert commands.call_inline(commands.prepare("echo a")) == "mine"


def test_prepare_keeps_a_bounded_number_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "MAX_PREPARED", 3)
    commands = CommandProcessor()
    for number in range(10):
        commands.prepare(f"echo {number}")
        assert len(commands.prepared) <= 3
    commands.prepare("echo " + "x" * services.MAX_PREPARED_CHARS)
    assert all(len(line) < 200 for line in commands.prepared)


@pytest.mark.parametrize("line", ["", "  \t\n", "\r"])
def test_prepare_refuses_empty_line(line: str) -> None:
    with pytest.raises(UsageError, match="empty"):
        CommandProcessor().prepare(line)


def test_prepare_suggests_near_names_for_unknown_command() -> None:
    commands = CommandProcessor()
    for word, near in [
        ("ehco", "echo"),
        ("hlep", "help"),
        ("tiem", "time"),
        ("countdwon", "countdown"),
        ("ECHO", "echo"),
    ]:
        with pytest.raises(UnknownCommand) as caught:
            commands.prepare(word)
        assert caught.value.data["suggestions"][0] == near and near in str(caught.value)
    with pytest.raises(UnknownCommand) as caught:
        commands.prepare("\x07" + "q" * 1_000_000)
    assert caught.value.data["suggestions"] == [] and len(str(caught.value)) < 200


def test_suggest_is_bounded_in_time() -> None:
    commands = CommandProcessor()
    for number in range(50):
        commands.add(Command(lambda: None, name=f"command-{number}"))
    began = time.process_time()
    commands.suggest("command-x " * 100_000)
    assert time.process_time() - began < 0.5


def test_command_refuses_at_registration_what_no_line_can_call() -> None:
    def odd(x: set[int]) -> None: ...
    def unknown(x: NoSuchName) -> None: ...  # type: ignore[name-defined]  # noqa: F821
    async def waits() -> None: ...
    def context(c: Context) -> None: ...
    def yields() -> Iterator[int]:
        yield 1

    wrong = [(odd, "parameter x"), (unknown, "NoSuchName"), (yields, "async def")]
    for function, problem in wrong:
        with pytest.raises(TypeError, match=problem):
            Command(function)
    for function, problem in [(waits, "plain functions"), (context, "no Context")]:
        with pytest.raises(TypeError, match=problem):
            Command(function, inline=True)
    for name in ["two words", "quo'te", "back\\slash", "a\x00"]:
        with pytest.raises(ValueError, match="one word"):
            Command(lambda: None, name=name)
    with pytest.raises(TypeError, match="from a function"):
        CommandProcessor().command("name")  # type: ignore[call-overload]


def test_processor_replaces_builtins_but_nothing_else() -> None:
    commands = CommandProcessor()
    commands.add(Command(lambda: "mine", name="echo"))
    assert commands.call_inline(commands.prepare("echo")) == "mine"
    with pytest.raises(ValueError, match="'echo' already"):
        commands.add(Command(lambda: None, name="other", aliases=("echo",)))
    assert "other" not in commands.commands


def test_prepare_is_quick_for_the_commonest_line() -> None:
    commands = CommandProcessor()
    began = time.process_time()
    for _ in range(20_000):
        commands.prepare("echo hello")
    assert (
        time.process_time() - began
    ) / 20_000 < 10e-6  # measured: 0.6 us; a loaded machine has room


# ---- commands: running -----------------------------------------------------------------------

SERVICES_RAISED = [
    (ValueError("no good"), "no good"),
    (ValueError(), "ValueError"),
    (KeyError("k"), "'k'"),
    (SystemExit(), "SystemExit"),
    (SystemExit(2), "2"),
    (KeyboardInterrupt(), "KeyboardInterrupt"),
    (asyncio.CancelledError(), "CancelledError"),
    (GeneratorExit(), "GeneratorExit"),
    (StopIteration(), "StopIteration"),
    (ValueError("x" * 10_000), "x" * 1_000),
    (type("Mute", (Exception,), {"__str__": lambda self: 1 / 0})(), "Mute"),
]


@pytest.mark.parametrize("way", ["inline", "async", "thread", "stream"])
@pytest.mark.parametrize(
    ("error", "text"), SERVICES_RAISED, ids=lambda value: repr(type(value))[:30]
)
async def test_handler_that_raises_anything_becomes_command_failed(
    way: str, error: BaseException, text: str
) -> None:
    def plain() -> None:
        raise error

    async def waits() -> None:
        raise error

    async def streams() -> AsyncIterator[int]:
        yield 1
        raise error

    commands = CommandProcessor(builtins=False)
    function = {"async": waits, "stream": streams}.get(way, plain)
    commands.add(Command(function, name="c", inline=way == "inline"))
    with pytest.raises(CommandFailed) as caught:
        if way == "inline":
            commands.call_inline(commands.prepare("c"))
        else:
            await services_execute(commands, "c")
    assert str(caught.value) == text or isinstance(error, StopIteration)
    assert (commands.running, commands.done, commands.failed) == (0, 0, 1)


async def test_handler_raising_service_error_passes_it_unchanged() -> None:
    error = Unavailable("later", retry_s=5)

    async def waits() -> None:
        raise error

    def blocks() -> None:
        raise error

    commands = processor(waits, blocks)
    for line in ["waits", "blocks"]:
        with pytest.raises(Unavailable) as caught:
            await services_execute(commands, line)
        assert caught.value is error


async def test_handler_that_raises_is_logged_with_traceback_at_debug_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fails() -> None:
        raise ValueError("no good")

    commands = processor(fails)
    for level, expected in [(logging.INFO, 0), (logging.DEBUG, 1)]:
        caplog.clear()
        caplog.set_level(level, "karna.services")
        with pytest.raises(CommandFailed):
            await services_execute(commands, "fails")
        assert caplog.text.count("Traceback") == expected


async def test_processor_runs_each_kind_of_function_and_counts() -> None:
    main = threading.get_ident()

    def blocks() -> bool:
        return threading.get_ident() != main

    async def waits() -> bool:
        await asyncio.sleep(0)
        return threading.get_ident() == main

    class Callable_:
        async def __call__(self) -> str:
            return "object"

    def wrapped() -> Any:
        return waits()

    commands = processor(blocks, waits, wrapped)
    commands.add(Command(Callable_(), name="object"))
    touched: list[int] = []
    commands.on_touch = lambda: touched.append(1)
    assert [
        await services_execute(commands, line) for line in ["blocks", "waits", "wrapped", "object"]
    ] == [
        True,
        True,
        True,
        "object",
    ]
    status = commands.get_status()
    assert {k: status[k] for k in ("running", "done", "failed", "commands")} == {
        "running": 0,
        "done": 4,
        "failed": 0,
        "commands": 4,
    }
    assert len(touched) == 8


async def test_inline_command_counts_and_touches() -> None:
    commands = CommandProcessor()
    touched: list[int] = []
    commands.on_touch = lambda: touched.append(1)
    assert commands.call_inline(commands.prepare("echo  a   b")) == "a b"
    assert await services_execute(commands, "echo 'a  b'") == "a  b"
    assert commands.done == 2 and len(touched) == 2  # of an inline call `done` tells


async def test_stream_reports_each_value_and_last_is_result() -> None:
    closed = asyncio.Event()

    async def count(n: int, context: Context) -> AsyncIterator[int]:
        try:
            for i in range(n):
                yield i
            assert context.client == "me"
        finally:
            closed.set()

    seen: list[Any] = []
    assert await services_execute(processor(count), "count 3", Context("me", seen.append)) == 2
    assert seen == [0, 1, 2] and closed.is_set()


async def test_progress_waits_for_slow_client() -> None:
    taken, go = [], asyncio.Event()

    async def send(value: Any) -> None:
        await go.wait()
        taken.append(value)

    async def one(context: Context) -> str:
        await context.progress(1)
        return "done"

    def two(context: Context) -> str:
        context.report(2)
        return "done"

    commands = processor(one, two)
    running = [
        asyncio.ensure_future(services_execute(commands, line, Context(None, send)))
        for line in ("one", "two")
    ]
    await asyncio.sleep(0.02)  # time enough for a wrong one to finish
    assert not any(task.done() for task in running)
    go.set()
    assert await asyncio.gather(*running) == ["done", "done"] and sorted(taken) == [1, 2]


async def test_report_on_loop_refuses_instead_of_hanging() -> None:
    async def wrong(context: Context) -> None:
        context.report(1)

    with pytest.raises(CommandFailed, match="await context.progress"):
        await services_execute(processor(wrong), "wrong")


async def test_context_refuses_progress_once_command_has_ended(scaled: None) -> None:
    late: asyncio.Queue[str] = asyncio.Queue()
    seen: list[Any] = []

    async def stubborn(context: Context) -> None:
        try:
            await hang()
        except asyncio.CancelledError:
            while True:
                try:
                    await asyncio.sleep(0.01)
                    await context.progress("late")
                except CommandFailed as error:
                    late.put_nowait(str(error))
                    return

    commands = processor(stubborn, timeout_s=0.02)
    with pytest.raises(CommandTimeout):
        await services_execute(commands, "stubborn", Context(None, seen.append))
    count = len(seen)
    assert await asyncio.wait_for(late.get(), DEADLINE_S) == "the command has ended"
    assert len(seen) == count


@pytest.mark.parametrize("way", ["async", "stream", "thread"])
async def test_time_limit_ends_command(way: str, scaled: None) -> None:
    closed, release = threading.Event(), threading.Event()

    async def waits() -> None:
        try:
            await hang()
        finally:
            closed.set()

    async def streams() -> AsyncIterator[int]:
        try:
            yield 1
            await hang()
        finally:
            closed.set()

    def blocks() -> None:
        release.wait(DEADLINE_S)

    commands = CommandProcessor(builtins=False, timeout_s=0.05)
    commands.add(Command({"async": waits, "stream": streams, "thread": blocks}[way], name="c"))
    with pytest.raises(CommandTimeout, match="c took longer than 0.05 s"):
        await services_execute(commands, "c")
    assert closed.is_set() or way == "thread"
    assert (commands.running, commands.failed) == (0, 1)
    release.set()


async def test_time_limit_ends_stream_that_never_waits() -> None:
    async def flood() -> AsyncIterator[int]:
        while True:
            yield 1

    with pytest.raises(CommandTimeout):
        await services_execute(processor(flood, timeout_s=0.05), "flood")


async def test_time_limit_holds_against_handler_that_swallows_cancellation(
    scaled: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    go = asyncio.Event()

    async def stubborn() -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await hang()
        await go.wait()
        return "never seen"

    commands = processor(stubborn, timeout_s=0.05)
    with pytest.raises(CommandTimeout):
        await services_execute(commands, "stubborn")
    assert "stubborn ignores its cancellation" in caplog.text
    go.set()
    await until(lambda: "stubborn has ended after all\n" in caplog.text)


@pytest.mark.parametrize("way", ["async", "stream", "thread"])
async def test_cancelling_run_cancels_handler(way: str, scaled: None) -> None:
    began, closed, release = asyncio.Event(), asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    async def waits() -> None:
        try:
            began.set()
            await hang()
        finally:
            closed.set()

    async def streams() -> AsyncIterator[int]:
        try:
            began.set()
            while True:
                yield 1
        finally:
            closed.set()

    def blocks() -> None:
        loop.call_soon_threadsafe(began.set)
        release.wait(DEADLINE_S)

    commands = CommandProcessor(builtins=False)
    commands.add(Command({"async": waits, "stream": streams, "thread": blocks}[way], name="c"))
    task = asyncio.ensure_future(commands.run(commands.prepare("c"), Context()))
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert closed.is_set() or way == "thread"
    assert (commands.running, commands.failed) == (0, 1)
    release.set()


async def test_thread_blocked_in_report_ends_when_command_is_cancelled() -> None:
    ended = threading.Event()
    sending, never = asyncio.Event(), asyncio.Event()

    async def send(value: Any) -> None:
        sending.set()
        await never.wait()

    def reports(context: Context) -> None:
        try:
            context.report(1)
        finally:
            ended.set()

    commands = processor(reports)
    task = asyncio.ensure_future(commands.run(commands.prepare("reports"), Context(None, send)))
    await sending.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(ended.is_set)
    assert not never.is_set()


async def test_threads_are_bounded_and_used_again() -> None:
    release, busy, most = threading.Semaphore(0), [], []

    def blocks() -> int:
        busy.append(1)
        most.append(len(busy))
        release.acquire(timeout=DEADLINE_S)
        busy.pop()
        return threading.get_ident()

    commands = processor(blocks, max_threads=2)
    running = [asyncio.ensure_future(services_execute(commands, "blocks")) for _ in range(6)]
    await until(lambda: len(busy) == 2)
    release.release(6)
    assert len(set(await asyncio.gather(*running))) == 2 and max(most) == 2


async def test_command_is_unavailable_when_system_has_no_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    commands = processor(services_lambda_any)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(Unavailable, match="no thread"):
            await services_execute(commands, "any")
    assert await services_execute(commands, "any 1") == ["1"]


def test_report_fails_when_loop_is_closed() -> None:
    context = Context(None, print)
    with pytest.raises(CommandFailed, match="has ended"):
        context.report(1)  # never begun

    async def begin() -> None:
        context.begin()

    asyncio.run(begin())
    raised: list[BaseException] = []

    def report() -> None:
        try:
            context.report(1)
        except CommandFailed as error:
            raised.append(error)

    thread = threading.Thread(target=report)
    thread.start()
    thread.join(DEADLINE_S)
    assert str(raised[0]) == "the command has ended"


async def test_waiting_for_thread_counts_against_time_limit() -> None:
    release, calls = threading.Event(), []

    def blocks() -> None:
        calls.append(1)
        release.wait(DEADLINE_S)

    commands = processor(blocks, max_threads=1, timeout_s=0.05)
    for _ in range(2):  # the second never gets the thread that the first one keeps
        with pytest.raises(CommandTimeout):
            await services_execute(commands, "blocks")
    release.set()
    commands.timeout_s = DEADLINE_S
    await services_execute(commands, "blocks")
    assert len(calls) == 2


async def test_thread_sees_context_variables_of_its_caller() -> None:
    variable = contextvars.ContextVar("variable", default="none")
    variable.set("mine")
    assert await services_execute(processor(variable_of(variable)), "get") == "mine"


def variable_of(variable: contextvars.ContextVar[str]) -> Callable[[], str]:
    def get() -> str:
        return variable.get()

    return get


STUCK_THREAD = """
import asyncio, sys, threading, time
sys.path.insert(0, sys.argv[1])
from services import CommandProcessor, Context
commands = CommandProcessor(timeout_s=0.05)
began = threading.Event()

@commands.command
def stuck():
    began.set()
    time.sleep(30 if sys.argv[2] == "stuck" else 0.2)

async def main():
    task = asyncio.ensure_future(commands.run(commands.prepare("stuck"), Context()))
    await asyncio.to_thread(began.wait)
    try:
        await task
    except Exception as error:
        print(type(error).__name__)

asyncio.run(main())
if sys.argv[2] != "stuck":
    time.sleep(0.4)  # the thread hands its result to a loop that is closed
"""


@pytest.mark.parametrize("way", ["stuck", "late"])
def test_thread_holds_neither_exit_nor_complains_of_closed_loop(way: str) -> None:
    folder = os.path.dirname(services.__file__)
    done = subprocess.run(
        [sys.executable, "-c", STUCK_THREAD, folder, way],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("CommandTimeout\n", "", 0)


async def test_stop_ends_running_commands_and_refuses_threads() -> None:
    began = asyncio.Event()

    async def waits() -> None:
        began.set()
        await hang()

    commands = processor(waits, services_lambda_any)
    await commands.start()
    assert commands.get_status()["state"] == "running"
    task = asyncio.ensure_future(services_execute(commands, "waits"))
    await began.wait()
    await commands.stop()
    for line in [task, services_execute(commands, "any")]:
        with pytest.raises(Unavailable, match="stopping"):
            await line
    await commands.start()
    assert await services_execute(commands, "any 1") == ["1"]


async def test_builtin_help_lists_and_explains() -> None:
    commands = CommandProcessor()
    listed = commands.call_inline(commands.prepare("help"))["commands"]
    assert [each["name"] for each in listed] == ["countdown", "echo", "help", "time"]
    assert {tuple(each) for each in listed} == {
        ("name", "usage", "summary", "aliases", "arguments")
    }
    one = commands.call_inline(commands.prepare("help echo"))
    assert (one["usage"], one["help"]) == ("echo TEXT...", "Answer with the text.")
    with pytest.raises(UnknownCommand) as caught:
        commands.call_inline(commands.prepare("help ehco"))
    assert caught.value.data["suggestions"] == ["echo"]


async def test_builtin_time_tells_utc() -> None:
    commands = CommandProcessor()
    told = commands.call_inline(commands.prepare("time"))
    assert abs(told["unix"] - time.time()) < 5 and told["utc"].endswith("Z")


async def test_builtin_countdown_reports_and_is_bounded() -> None:
    commands, seen = CommandProcessor(), []
    assert await services_execute(commands, "countdown 0.05", Context(None, seen.append)) == {
        "remaining": 0,
        "percent": 100,
    }
    assert seen == [{"remaining": 0.05, "percent": 0}, {"remaining": 0, "percent": 100}]
    assert await services_execute(commands, "countdown 0") == {"remaining": 0, "percent": 100}
    for seconds in ["-1", "3601"]:
        with pytest.raises(UsageError, match="0 to 3600; usage: countdown SECONDS"):
            await services_execute(commands, f"countdown {seconds}")


# ---- programs --------------------------------------------------------------------------------


def with_shell(**options: Any) -> CommandProcessor:
    commands = CommandProcessor(builtins=False, **options)
    commands.allow_program("sh")
    return commands


async def shell(script: str, *words: str, progress: Any = None, **options: Any) -> Any:
    line = shlex.join(["sh", "-c", script, "sh", *words])
    return await services_execute(with_shell(**options), line, Context(None, progress))


async def test_program_streams_lines_and_returns_output() -> None:
    seen: list[Any] = []
    result = await shell(
        "echo one; echo two >&2; printf 'thr\\303\\251e\\377\\r\\n'; printf four; exit 3",
        progress=seen.append,
    )
    assert sorted(map(str, seen)) == sorted(map(str, [
        {"stream": "stdout", "line": "one"}, {"stream": "stderr", "line": "two"},
        {"stream": "stdout", "line": "thrée\ufffd"}, {"stream": "stdout", "line": "four"}]))  # fmt: skip
    assert (result["exit_code"], result["truncated"], "signal" in result) == (3, False, False)
    assert sorted(result["output"].splitlines()) == ["four", "one", "thrée\ufffd", "two"]


@settings(max_examples=10, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8),
        max_size=4,
    )
)
def test_program_gets_arguments_exactly(words: list[str]) -> None:
    script = "for a; do printf '%s\\0' \"$a\"; done"
    result = asyncio.run(shell(script, *words))
    assert result["output"] == "".join(word + "\0" for word in words)


async def test_program_has_no_stdin_and_none_of_our_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ["KARNA_TOKEN", "OPENAI_API_KEY", "KARNA_VISION_KEY", "KARNA_BACKPLANE"]:
        monkeypatch.setenv(name, "hush")
    monkeypatch.setenv("HARMLESS", "kept")
    result = await shell("cat; env")
    assert "hush" not in result["output"] and "HARMLESS=kept" in result["output"]


async def test_program_output_is_bounded_and_long_lines_are_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []
    result = await shell(
        "head -c 150000 /dev/zero | tr '\\0' x; echo; i=0; while [ $i -lt 3 ]; do head -c 70000 /dev/zero | tr '\\0' y; echo; i=$((i+1)); done; echo end",
        progress=seen.append,
    )
    lengths = [len(each["line"]) for each in seen]
    assert max(lengths) <= services.MAX_LINE_CHARS and sum(lengths) == 150_000 + 210_000 + 3
    assert result["truncated"] is True and result["output"].endswith("yyy\nend\n")
    assert len(result["output"]) == services.MAX_OUTPUT_CHARS


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["stdout", "stderr"]),
            st.binary(max_size=12) | st.sampled_from([b"\n", b"\r\n", "é€".encode()]),
        ),
        max_size=12,
    )
)
def test_program_output_loses_nothing_however_it_is_cut(chunks: list[tuple[str, bytes]]) -> None:
    output = services.ProgramOutput()
    lines: dict[str, list[str]] = {"stdout": [], "stderr": []}
    for stream, data in chunks:
        lines[stream] += output.add(stream, data)
    for stream, line in output.rest():
        lines[stream].append(line)
    for stream in lines:
        text = b"".join(data for name, data in chunks if name == stream).decode("utf-8", "replace")
        expected = [line.removesuffix("\r") for line in text.split("\n")]
        last = text.split("\n")[-1]
        assert lines[stream] == expected[:-1] + ([last] if last else [])


def test_program_output_keeps_no_more_than_its_bound_in_memory() -> None:
    output = services.ProgramOutput()
    for data in [b"x" * 60_000 + b"\n", b"\n", b"y" * 200_000] * 100:
        output.add("stdout", data)
        assert len(output.kept) <= services.MAX_OUTPUT_CHARS
        assert len(output._rest["stdout"]) <= services.MAX_LINE_CHARS


async def test_program_is_not_read_while_client_does_not_and_loses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watches: list[Any] = []
    gate, count = asyncio.Event(), 0

    class Watch(services.ProgramWatch):
        def __init__(self) -> None:
            super().__init__()
            watches.append(self)

    async def send(value: Any) -> None:
        nonlocal count
        count += 1
        await gate.wait()

    monkeypatch.setattr(services, "ProgramWatch", Watch)
    script = "yes 0123456789012345678901234567890123456789 | head -n 30000"
    task = asyncio.ensure_future(shell(script, progress=send))
    await until(lambda: watches and watches[0]._is_paused)
    assert watches[0]._unread < services.MAX_UNREAD_BYTES + 2 * 256 * 1024  # one read is 256 KiB
    assert count == 1
    gate.set()
    assert (await task)["exit_code"] == 0 and count == 30_000


async def test_program_blocked_in_writing_is_ended_by_term_alone() -> None:
    lines: asyncio.Queue[Any] = asyncio.Queue(1)  # a client that takes one line
    task = asyncio.ensure_future(shell("yes; echo never", progress=lines.put))
    await until(lambda: lines.full())
    began = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - began < services.TERM_WAIT_S


async def test_program_is_killed_when_its_ending_is_cancelled() -> None:
    lines: asyncio.Queue[Any] = asyncio.Queue()
    call = with_shell().prepare(
        shlex.join(["sh", "-c", "trap '' TERM; sleep 60 & echo $!; wait; sleep 60"])
    )
    program = services.run_program("/bin/sh", call.args, Context(None, lines.put_nowait))
    task = asyncio.ensure_future(program)
    pid = int((await lines.get())["line"])
    for _ in range(2):  # the second comes while it waits for SIGTERM to work
        task.cancel()
        await asyncio.sleep(0.05)
    assert task.cancelled()
    await until(lambda: not is_alive(pid))


async def test_program_ended_by_signal_names_it() -> None:
    result = await shell("kill -KILL $$")
    assert (result["exit_code"], result["signal"]) == (-9, "SIGKILL")
    result = await shell("kill -35 $$")  # a real-time signal, which has no name
    assert (result["exit_code"], result["signal"]) == (-35, "signal 35")


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("trap", ["", "trap '' TERM;"], ids=["ends at TERM", "ignores TERM"])
@pytest.mark.parametrize("how", ["cancel", "timeout", "stop"])
async def test_program_is_ended_with_its_whole_group(
    how: str, trap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "TERM_WAIT_S", 0.1)
    lines: asyncio.Queue[Any] = asyncio.Queue()
    commands = with_shell(timeout_s=0.3 if how == "timeout" else DEADLINE_S)
    line = shlex.join(["sh", "-c", f"{trap} sleep 60 & echo $!; echo $$; wait; sleep 60"])
    task = asyncio.ensure_future(
        commands.run(commands.prepare(line), Context(None, lines.put_nowait))
    )
    pids = [int((await lines.get())["line"]) for _ in range(2)]
    assert all(map(is_alive, pids))
    if how == "cancel":
        task.cancel()
    if how == "stop":
        await commands.stop()
    with pytest.raises(
        {"cancel": asyncio.CancelledError, "timeout": CommandTimeout, "stop": Unavailable}[how]
    ):
        await task
    await until(lambda: not any(map(is_alive, pids)))


async def test_program_whose_child_holds_pipe_does_not_hang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(services, "PIPE_WAIT_S", 0.05)
    monkeypatch.setattr(services, "TERM_WAIT_S", 0.1)
    result = await shell("sleep 60 & echo $!")
    assert result["exit_code"] == 0
    await until(lambda: not is_alive(int(result["output"])))


async def test_program_refuses_what_cannot_be_passed_or_started(tmp_path: Any) -> None:
    commands = with_shell()
    for word in ["a\0b", "\ud800"]:
        with pytest.raises(UsageError, match="cannot be passed"):
            await services_execute(commands, "sh", argument=[word])
    gone = tmp_path / "tool"
    gone.write_text("#!/bin/sh\n")
    gone.chmod(0o755)
    commands.allow_program("tool", str(gone))
    assert commands.commands["tool"].usage == "tool [ARGUMENT]..."
    gone.unlink()
    with pytest.raises(Unavailable, match="No such file"):
        await services_execute(commands, "tool")
    for name, path in [("nothing-of-this-name", None), ("x", str(tmp_path / "none"))]:
        with pytest.raises(ValueError, match="no program"):
            commands.allow_program(name, path)


# ---- model server ----------------------------------------------------------------------------


def services_http(
    body: bytes | str,
    *,
    status: str = "200 OK",
    kind: str = "application/json",
    length: int | None = None,
) -> bytes:
    body = body.encode() if isinstance(body, str) else body
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n"
    return head.encode() + body


def events(*values: Any, done: bool = True) -> str:
    lines = [
        f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n" for value in values
    ]
    return ": a comment\n\n" + "".join(lines) + ("data: [DONE]\n\n" if done else "")


def token(text: Any, **more: Any) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}, **more}]}


def chunked(text: str) -> bytes:
    data = text.encode()
    half = len(data) // 2
    parts = b"".join(f"{len(p):x}\r\n".encode() + p + b"\r\n" for p in (data[:half], data[half:]))
    return (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        + parts
        + b"0\r\n\r\n"
    )


MODELS = services_http(json.dumps({"data": [{"id": "tiny"}, {"id": "other"}]}))
HELLO = chunked(events(token("Hel"), token(None), token("lo"), token("", finish_reason="stop")))


class ModelHost:
    """A little HTTP server: each path has its answer; None hangs, a list is dripped for ever."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {"/v1/models": MODELS, "/v1/chat/completions": HELLO}
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.asked = asyncio.Event()
        self.lost = asyncio.Event()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            first, *lines = head.strip().split("\r\n")
            headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            self.requests.append((first, headers, body))
            self.asked.set()
            answer = self.answers.get(first.split()[1], services_http("{}", status="404 Not Found"))
            if isinstance(answer, bytes):
                writer.write(answer)
                await writer.drain()
            while isinstance(answer, list):
                writer.write(answer[0])
                await writer.drain()
                await asyncio.sleep(0.005)
            if answer is None:
                await reader.read()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.lost.set()
            writer.close()


@pytest.fixture
async def host() -> AsyncIterator[Any]:
    model_host = ModelHost()
    server = await asyncio.start_server(model_host.handle, "127.0.0.1", 0)
    model_host.port = server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
    model_host.url = f"http://127.0.0.1:{model_host.port}"  # type: ignore[attr-defined]
    yield model_host
    server.close()


def asking(url: str, **options: Any) -> tuple[LanguageService, CommandProcessor]:
    language, commands = LanguageService(url=url, **options), CommandProcessor()
    language.register(commands)
    return language, commands


async def test_ask_streams_tokens(host: Any) -> None:
    for suffix in ["", "/", "/v1", "/v1/"]:
        language, commands = asking(host.url + suffix)
        await language.check()
        assert (language.state, language.detail) == (
            "running",
            f"model tiny at 127.0.0.1:{host.port}",
        )
        seen: list[Any] = []
        result = await services_execute(commands, "ask who are you", Context(None, seen.append))
        assert result == {"text": "Hello", "model": "tiny"} and seen == [
            {"token": "Hel"},
            {"token": "lo"},
        ]
    first, headers, body = host.requests[-1]
    assert first == "POST /v1/chat/completions HTTP/1.1" and "authorization" not in headers
    assert json.loads(body) == {
        "model": "tiny",
        "stream": True,
        "messages": [{"role": "user", "content": "who are you"}],
    }


async def test_ask_finds_model_itself_or_takes_configured_one(host: Any) -> None:
    _, commands = asking(host.url)
    assert (await services_execute(commands, "ask hi"))["model"] == "tiny"
    language, commands = asking(host.url, model="mine")
    assert (await services_execute(commands, "ask hi"))["model"] == "mine"
    assert "model mine at" in language.detail
    await language.check()
    assert "model mine at" in language.detail


async def test_ask_takes_plain_json_and_lone_surrogates(host: Any) -> None:
    _, commands = asking(host.url)
    host.answers["/v1/chat/completions"] = services_http(
        json.dumps({"choices": [{"message": {"content": "a\ud800b"}}]})
    )
    assert (await services_execute(commands, "ask hi"))["text"] == "a?b"


async def test_ask_ends_at_finish_reason_without_done(host: Any) -> None:
    _, commands = asking(host.url)
    text = events(
        token("a"), token("", finish_reason="stop"), {"choices": [], "usage": {}}, done=False
    )
    host.answers["/v1/chat/completions"] = services_http(
        text, kind="text/event-stream; charset=utf-8"
    )
    assert (await services_execute(commands, "ask hi"))["text"] == "a"


async def test_ask_without_model_server_says_how_to_configure_one() -> None:
    language, vision = LanguageService(), VisionService()
    commands = CommandProcessor()
    language.register(commands)
    await asyncio.gather(language.start(), vision.start(), language.check(), vision.check())
    assert (language.state, vision.state) == ("running", "running")
    assert vision.detail == "embedded: reads image headers" and "embedded" in language.detail
    with pytest.raises(Unavailable, match="--language-url URL .or KARNA_LANGUAGE_URL"):
        await services_execute(commands, "ask hi")


SERVICES_STREAM = "text/event-stream"
MISBEHAVIOURS: dict[str, tuple[Any, str]] = {
    "closes at once": (b"", "cannot be reached|makes no sense"),
    "speaks another protocol": (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "makes no sense"),
    "hangs": (None, "no answer within"),
    "HTTP 500": (services_http("boom", status="500 Oops"), "HTTP 500"),
    "HTTP 404 with message": (
        services_http('{"error":{"message":"no such model"}}', status="404 Not Found"),
        "HTTP 404: no such model",
    ),
    "redirect": (
        b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
        "HTTP 302",
    ),
    "HTML": (services_http("<html>hello</html>", kind="text/html"), "makes no sense"),
    "not JSON": (services_http("{nope"), "not JSON"),
    "wrong JSON": (services_http("[1]"), "makes no sense"),
    "no models": (services_http('{"data": [{"id": 5}]}'), "lists no model"),
    "deep JSON": (services_http("[" * 100_000), "not JSON"),
    "error in a 200": (services_http('{"error": "overloaded"}'), "overloaded|no list of models"),
    "body breaks off": (services_http('{"data": []}', length=1_000), "broke off"),
    "huge body": (services_http(b" " * (5 * 1024 * 1024)), "longer than"),
    "huge header": (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", "makes no sense"),
    "broken chunk": (
        f"HTTP/1.1 200 OK\r\nContent-Type: {SERVICES_STREAM}\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc".encode(),
        "broke off|not JSON|makes no sense",
    ),
}
STREAM_MISBEHAVIOURS: dict[str, tuple[Any, str]] = {
    "endless line": (services_http(b"data: " + b"x" * 400_000, kind=SERVICES_STREAM), "too long"),
    "event not JSON": (services_http(events("{nope"), kind=SERVICES_STREAM), "not JSON"),
    "event wrong": (services_http(events("[]"), kind=SERVICES_STREAM), "no choices"),
    "choice wrong": (services_http(events({"choices": [1]}), kind=SERVICES_STREAM), "without text"),
    "text wrong": (services_http(events(token(["x"])), kind=SERVICES_STREAM), "without text"),
    "error event": (services_http(events(token("a"), {"error": {"message": "out of memory"}}), kind=SERVICES_STREAM), "out of memory"),
    "breaks off": (services_http(events(token("a"), done=False), kind=SERVICES_STREAM), "broke off"),
    "chunk breaks off": (HELLO[: len(HELLO) // 2], "broke off"),
    "too many bytes": (services_http((events(token("x" * 1000), done=False) * 4_500), kind=SERVICES_STREAM), "too long"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISBEHAVIOURS)
async def test_check_degrades_when_endpoint_misbehaves_and_recovers(
    name: str, host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "MODEL_CHECK_S", 0.3)
    language, _ = asking(host.url)
    answer, problem = MISBEHAVIOURS[name]
    host.answers["/v1/models"] = answer
    with pytest.raises(Unavailable, match=problem) as caught:
        await language.check()
    assert (language.state, language.detail) == ("degraded", str(caught.value))
    assert (
        f"model server 127.0.0.1:{host.port}: " in language.detail and "\n" not in language.detail
    )
    host.answers["/v1/models"] = MODELS
    await language.check()
    assert language.state == "running"


@pytest.mark.parametrize("name", MISBEHAVIOURS | STREAM_MISBEHAVIOURS)
async def test_ask_is_unavailable_when_endpoint_misbehaves_and_recovers(
    name: str, host: Any
) -> None:
    language, commands = asking(host.url, timeout_s=0.3)
    await language.check()
    answer, problem = (MISBEHAVIOURS | STREAM_MISBEHAVIOURS)[name]
    host.answers["/v1/chat/completions"] = answer
    with pytest.raises(Unavailable, match=problem + "|makes no sense"):
        await services_execute(commands, "ask hi")
    assert language.state == "degraded"
    host.answers["/v1/chat/completions"] = HELLO
    assert (await services_execute(commands, "ask hi"))["text"] == "Hello"
    assert language.state == "running"


async def test_ask_blames_request_that_server_refuses(host: Any) -> None:
    language, commands = asking(host.url)
    await language.check()
    host.answers["/v1/chat/completions"] = services_http(
        '{"error":{"message":"prompt too long"}}', status="400 Bad Request"
    )
    with pytest.raises(CommandFailed, match="HTTP 400: prompt too long"):
        await services_execute(commands, "ask hi")
    assert language.state == "running"


async def test_endpoint_that_is_away_degrades_until_it_is_back() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    language, commands = asking(f"http://127.0.0.1:{port}/v1")
    changed: asyncio.Queue[str] = asyncio.Queue()
    language.on_change = lambda service: changed.put_nowait(service.state)
    async with monitoring(language, timeout_s=5.0):
        assert await changed.get() == "degraded" and "Connection refused" in language.detail
        with pytest.raises(Unavailable, match="Connection refused"):
            await services_execute(commands, "ask hi")
        server = await asyncio.start_server(ModelHost().handle, "127.0.0.1", port)
        assert await changed.get() == "running"
        server.close()


async def test_drip_of_bytes_ends_with_time_limit(host: Any) -> None:
    _, commands = asking(host.url)
    host.answers["/v1/chat/completions"] = [b"H"]
    commands.timeout_s = 0.1
    with pytest.raises(CommandTimeout):
        await services_execute(commands, "ask hi")
    await asyncio.wait_for(host.lost.wait(), DEADLINE_S)


async def test_cancelling_ask_closes_its_socket_and_frees_its_thread(host: Any) -> None:
    language, commands = asking(host.url)
    await language.check()
    host.answers["/v1/chat/completions"] = None
    host.asked.clear()
    host.lost.clear()
    task = asyncio.ensure_future(services_execute(commands, "ask hi"))
    await host.asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(host.lost.wait(), DEADLINE_S)
    pool = language.server._requests  # type: ignore[union-attr]
    await until(lambda: pool._idle == pool._threads)
    assert language.state == "running"


async def test_key_is_sent_and_never_shown(
    host: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-fallback")
    monkeypatch.setenv("KARNA_LANGUAGE_KEY", " sk-secret\n")
    language, commands = asking(host.url.replace("//", "//user:pa%24s@"))
    await language.check()
    assert host.requests[-1][1]["authorization"] == "Bearer sk-secret"
    host.answers["/v1/chat/completions"] = services_http(
        '{"error":"bad key sk-secret"}', status="401 No"
    )
    with pytest.raises(Unavailable, match=r"bad key \*\*\*") as caught:
        await services_execute(commands, "ask hi")
    for secret in ["sk-secret", "pa%24s", "pa$s", "user"]:
        assert secret not in caplog.text + str(caught.value) + str(language.get_status())
    assert VisionService(url=host.url).server.headers["Authorization"] == "Bearer sk-fallback"  # type: ignore[union-attr]


async def test_user_and_password_are_sent_when_there_is_no_key(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ["OPENAI_API_KEY", "KARNA_LANGUAGE_KEY"]:
        monkeypatch.delenv(name, raising=False)
    language, _ = asking(host.url.replace("//", "//user:pa%24s@"))
    await language.check()
    assert (
        host.requests[-1][1]["authorization"] == "Basic " + base64.b64encode(b"user:pa$s").decode()
    )


BAD_URLS = [
    "localhost:11434",
    "ftp://x",
    "http://",
    "http://x:port",
    "http://x:99999",
    "http://x/a b",
    "http://x/\r\nX: y",
    "http://é/",
]


@pytest.mark.parametrize("url", BAD_URLS)
def test_model_server_refuses_unusable_url(url: str) -> None:
    with pytest.raises(ValueError, match=r"URL|[Pp]ort"):
        LanguageService(url=url)


def test_model_server_refuses_key_no_header_can_hold() -> None:
    with pytest.raises(ValueError, match="key has characters") as caught:
        LanguageService(url="http://localhost", key="sk-sec\r\nret")
    assert "sk-sec" not in str(caught.value)


async def test_model_server_uses_no_proxy(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    language, _ = asking(host.url)
    await language.check()
    assert language.state == "running"


# ---- vision ----------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + header + struct.pack(">I", zlib.crc32(header))


def jpeg(width: int, height: int, marker: int = 0xC0, before: bytes = b"") -> bytes:
    frame = struct.pack(">BHHB", 8, height, width, 3) + bytes(9)
    return b"\xff\xd8" + before + bytes([0xFF, marker]) + struct.pack(">H", 2 + len(frame)) + frame


def gif(width: int, height: int, version: bytes = b"89a") -> bytes:
    return b"GIF" + version + struct.pack("<HH", width, height) + b"\0\0\0"


def webp(chunk: bytes, data: bytes) -> bytes:
    body = b"WEBP" + chunk + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def webp_lossy(width: int, height: int) -> bytes:
    return webp(
        b"VP8 ", b"\x10\x02\x00\x9d\x01\x2a" + struct.pack("<HH", width | 0x4000, height | 0x8000)
    )


def webp_lossless(width: int, height: int) -> bytes:
    return webp(b"VP8L", b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14 | 1 << 28))


def webp_extended(width: int, height: int) -> bytes:
    return webp(
        b"VP8X",
        b"\x10\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little"),
    )


def bmp(width: int, height: int, header: int = 40) -> bytes:
    return b"BM" + bytes(12) + struct.pack("<Iii", header, width, height) + bytes(header - 12)


def bmp_core(width: int, height: int) -> bytes:
    return b"BM" + bytes(12) + struct.pack("<IHHHH", 12, width, height, 1, 24)


EXIF = (
    b"\xff\xe1"
    + struct.pack(">H", 8)
    + b"Exif\0\0"
    + b"\xff\xdb\x00\x04\xff\xc0"
    + b"\xff\xff\xff\xfe\x00\x02"
    + b"\xff\x01"
)
IMAGES = (
    [("png", png(3, 5)), ("png", png(65_535, 4_096))]
    + [
        ("jpeg", jpeg(3, 5, marker))
        for marker in range(0xC0, 0xD0)
        if marker not in (0xC4, 0xC8, 0xCC)
    ]
    + [("jpeg", jpeg(3, 5, before=EXIF)), ("jpeg", jpeg(3, 5, before=b"\xff\xc4\x00\x03\x00"))]
    + [("gif", gif(3, 5)), ("gif", gif(3, 5, b"87a"))]
    + [("webp", make(3, 5)) for make in (webp_lossy, webp_lossless, webp_extended)]
    + [("bmp", bmp(3, 5, header)) for header in (16, 40, 52, 56, 64, 108, 124)]
    + [("bmp", bmp(3, -5)), ("bmp", bmp_core(3, 5))]
)


@pytest.mark.parametrize(
    ("name", "data"), IMAGES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_header_tells_format_and_size(name: str, data: bytes) -> None:
    width, height = (65_535, 4_096) if data == png(65_535, 4_096) else (3, 5)
    assert services.read_image_header(data) == {
        "format": name, "width": width, "height": height, "bytes": len(data)}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "data"), IMAGES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_header_cut_anywhere_is_an_error_or_the_same_answer(name: str, data: bytes) -> None:
    whole = services.read_image_header(data)
    for end in range(len(data)):
        try:
            assert services.read_image_header(data[:end]) == {**whole, "bytes": end}
        except CommandFailed as error:
            assert "no frame header" in str(error) or "header is broken" in str(error)


BROKEN_IMAGES = {
    "empty text": (b"hello", "is no PNG, JPEG, GIF, WebP or BMP"),
    "png without IHDR": (png(3, 5).replace(b"IHDR", b"JUNK"), "header is broken"),
    "png of no width": (png(0, 5), "0 x 5 pixels"),
    "png too wide": (png(65_536, 1), "too large: 65536 x 1"),
    "png bomb": (png(60_000, 60_000), "too large: 60000 x 60000"),
    "png of 2^32": (png(2**32 - 1, 2**32 - 1), "too large"),
    "jpeg scan first": (b"\xff\xd8\xff\xda\x00\x04\x00\x00", "no frame header"),
    "jpeg garbage": (b"\xff\xd8\xff\xe0\x00\x02garbage", "no frame header"),
    "jpeg segment of no length": (b"\xff\xd8\xff\xe0\x00\x00", "no frame header"),
    "jpeg of segments": (b"\xff\xd8" + b"\xff\xe0\x00\x02" * 10_000, "no frame header"),
    "jpeg of fill": (b"\xff\xd8" + b"\xff" * 100_000, "no frame header"),
    "jpeg of unknown height": (jpeg(3, 0), "3 x 0"),
    "webp of another kind": (webp(b"JUNK", bytes(20)), "header is broken"),
    "webp without start code": (webp_lossy(3, 5).replace(b"\x9d\x01", b"\0\0"), "header is broken"),
    "webp without signature": (webp(b"VP8L", bytes(8)), "header is broken"),
    "webp too large": (webp_extended(2**24, 2**24), "too large"),
    "bmp with odd header": (bmp(3, 5, 13), "header is broken"),
    "bmp of negative width": (bmp(-3, 5), "too large"),
    "bmp too high": (bmp(3, -(2**31)), "too large"),
}


@pytest.mark.parametrize("name", BROKEN_IMAGES)
def test_header_that_is_broken_is_a_clear_error(name: str) -> None:
    data, problem = BROKEN_IMAGES[name]
    with pytest.raises(CommandFailed, match=problem):
        services.read_image_header(data)


MAGIC = st.sampled_from(
    [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"BM"]
    + [data[:20] for _, data in IMAGES]
)


@settings(max_examples=250, deadline=None)
@given(MAGIC, st.binary(max_size=60))
def test_header_of_random_bytes_raises_nothing_else(magic: bytes, rest: bytes) -> None:
    with contextlib.suppress(CommandFailed):
        facts = services.read_image_header(magic + rest)
        assert 0 < facts["width"] <= services.MAX_IMAGE_SIDE and facts["height"] > 0


@settings(max_examples=150, deadline=None)
@given(
    st.text(max_size=40)
    | st.text(max_size=20).map("data:image/png;base64,".__add__)
    | st.text(max_size=20).map("data:".__add__)
)
def test_decode_image_of_random_text_raises_nothing_else(text: str) -> None:
    with contextlib.suppress(CommandFailed):
        assert isinstance(services.decode_image(text), bytes)


PICTURE = bmp_core(1018, 64_507)  # its base64 has both + and /
ENCODED = base64.b64encode(PICTURE).decode()
WAYS = {
    "bytes": PICTURE,
    "bytearray": bytearray(PICTURE),
    "base64": ENCODED,
    "unpadded": ENCODED.rstrip("="),
    "URL-safe": ENCODED.replace("+", "-").replace("/", "_"),
    "with blanks": " " + "\r\n".join(ENCODED[i : i + 7] for i in range(0, len(ENCODED), 7)) + "\t",
    "data URL": f"data:image/bmp;base64,{ENCODED}",
    "data URL in capitals": f"DATA:image/bmp;charset=x;BASE64,{ENCODED}",
}


def test_picture_of_these_tests_needs_both_special_characters() -> None:
    assert "/" in ENCODED or "+" in ENCODED
    assert ENCODED.endswith("=")


def seeing(**options: Any) -> tuple[VisionService, CommandProcessor]:
    vision, commands = VisionService(**options), CommandProcessor()
    vision.register(commands)
    return vision, commands


@pytest.mark.parametrize("way", WAYS)
async def test_describe_takes_image_in_every_way(way: str) -> None:
    _, commands = seeing()
    assert await services_execute(commands, "describe", image=WAYS[way]) == {
        "format": "bmp", "width": 1018, "height": 64_507, "bytes": len(PICTURE), "embedded": True}  # fmt: skip


async def test_describe_refuses_missing_and_broken_images(monkeypatch: pytest.MonkeyPatch) -> None:
    _, commands = seeing()
    assert commands.commands["describe"].usage == "describe [QUESTION]... [--image IMAGE]"
    for params in [{}, {"image": ""}, {"image": None}, {"image": b""}, {"image": 5}]:
        with pytest.raises(UsageError, match="usage: describe"):
            await services_execute(commands, "describe", **params)
    for image, problem in [
        ("!!!!", "not valid base64"),
        ("AAAAA", "not valid base64"),
        ("é", "not valid base64"),
        ("data:image/png", "no comma"),
        ("data:image/png,%89PNG", "not base64"),
        ("AAAA", "is no PNG"),
    ]:
        with pytest.raises(CommandFailed, match=problem):
            await services_execute(commands, "describe", image=image)
    monkeypatch.setattr(services, "MAX_IMAGE_BYTES", 20)
    for image in [PICTURE, ENCODED]:
        with pytest.raises(CommandFailed, match="longer than"):
            await services_execute(commands, "describe", image=image)


async def test_describe_asks_model_and_adds_header_facts(host: Any) -> None:
    vision, commands = seeing(url=host.url)
    result = await services_execute(commands, "describe what is this", image=png(3, 5))
    assert result == {
        "format": "png",
        "width": 3,
        "height": 5,
        "bytes": 33,
        "text": "Hello",
        "model": "tiny",
    }
    text, image = json.loads(host.requests[-1][2])["messages"][0]["content"]
    assert text == {"type": "text", "text": "what is this"}
    assert (
        image["image_url"]["url"] == "data:image/png;base64," + base64.b64encode(png(3, 5)).decode()
    )
    assert vision.state == "running"


async def test_describe_leaves_command_of_that_name_alone() -> None:
    commands = CommandProcessor()
    commands.add(Command(lambda: "mine", name="describe"))
    commands.add(Command(lambda: "mine", name="ask"))
    VisionService().register(commands)
    LanguageService().register(commands)
    assert (
        await services_execute(commands, "describe")
        == await services_execute(commands, "ask")
        == "mine"
    )
    assert "interpret" in commands.commands


# ---- language --------------------------------------------------------------------------------


def speaking() -> CommandProcessor:
    commands = CommandProcessor()
    for service in (LanguageService(), VisionService()):
        service.register(commands)
    return commands


SAYINGS = [
    ("what time is it", "time"),
    ("please count down five seconds", "countdown"),
    ("describe this picture", "describe"),
    ("help", "help"),
    ("HELP me", "help"),
    ("ecoh hello", "echo"),
    ("which jpeg or png image is this", "describe"),
    ("ask the model", "ask"),
]


@pytest.mark.parametrize(("text", "command"), SAYINGS)
def test_interpret_finds_nearest_command(text: str, command: str) -> None:
    commands = speaking()
    answer = commands.call_inline(commands.prepare(f"interpret {text}"))
    assert answer["text"] == text and answer["matches"][0]["command"] == command
    scores = [match["score"] for match in answer["matches"]]
    assert scores == sorted(scores, reverse=True) and all(0 < score <= 1 for score in scores)
    assert answer["matches"][0]["usage"] == commands.commands[command].usage
    assert answer == commands.call_inline(commands.prepare(f"interpret {text}"))


def test_interpret_of_nonsense_matches_nothing() -> None:
    commands = speaking()
    assert commands.call_inline(commands.prepare("interpret zzz qqq"))["matches"] == []
    assert LanguageService().interpret("help") == {"text": "help", "matches": []}


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=80))
def test_interpret_never_raises(text: str) -> None:
    assert len(SPEAKING.interpret(text)["matches"]) <= services.MAX_MATCHES


SPEAKING = LanguageService()
SPEAKING.register(CommandProcessor())


def test_interpret_is_bounded_in_time() -> None:
    text = "abcdefg hcount ecoh " * 50_000
    began = time.process_time()
    SPEAKING.interpret(text)
    assert time.process_time() - began < 0.3


def test_import_is_light() -> None:
    """Start-up time is measured: what only some commands need is imported when they run."""
    code = "import sys; import services; print([m for m in ('http.client', 'difflib', 'shlex', 'shutil', 'redis') if m in sys.modules])"
    folder = os.path.dirname(services.__file__)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.stdout == "[]\n"


# --- backplane --------------------------------------------------------------------------------

__all__ = ["deadline"]  # a fixture that every test uses


# --- backplane ---------------------------------------------------------------------------------
# A real redis-server, killed, hung and emptied; nodes in this process, or in their own where the
# process is the subject.


class RedisServer:
    """A redis-server on a Unix socket that keeps what it accepted, whatever ends it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.options: tuple[str, ...] = ()
        self.path = folder / "redis.sock"
        self.url = f"unix://{self.path}"
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it, and wait until it serves."""
        persistence = ["--save", "", "--appendonly", "yes", "--appendfsync", "always"]
        where = ["--port", "0", "--unixsocket", self.path, "--dir", self.folder]
        self.process = subprocess.Popen(
            ["redis-server", *where, *persistence, *self.options],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if "ready to accept connections" in line.lower():
                return
        pytest.fail("redis-server did not start")

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """End it as a power cut would."""
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.process = None

    def call(self, *words: str | bytes | int) -> Any:
        """One command; what it answers. The event loop stands still meanwhile, by intent."""
        import redis

        with redis.Redis(unix_socket_path=str(self.path), protocol=2) as client:
            return client.execute_command(*words)

    def add(self, **fields: str | bytes) -> str:
        """Put an entry into the stream as a foreign program would; its id."""
        words = [word for item in fields.items() for word in item]
        return str(self.call("XADD", STREAM, "*", *words).decode())

    def add_message(self, message: str) -> str:
        """Put a broadcast into the stream as a node would; its id."""
        return self.add(body=json.dumps({"type": "notification", "data": {"message": message}}))


@pytest.fixture
def stopped_redis() -> Iterator[RedisServer]:
    needs("redis-server", "redis")
    folder = Path(tempfile.mkdtemp(prefix="karna-redis-"))  # pytest's own paths are too long
    server = RedisServer(folder)
    try:
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder)


@pytest.fixture
def redis(stopped_redis: RedisServer) -> RedisServer:
    stopped_redis.start()
    return stopped_redis


class Node:
    """A server in a process of its own: `python karna_ws.py --port 0 ...`."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.port = port


@contextlib.asynccontextmanager
async def node(
    backplane: str, *flags: str, port: int = 0, log: int = asyncio.subprocess.DEVNULL
) -> AsyncIterator[Any]:
    """Run a node; at the end it must stop as it should."""
    arguments = ["--port", str(port), "--backplane", backplane, *flags]
    process = await asyncio.create_subprocess_exec(
        sys.executable, SERVER_FILE, *arguments, stdout=asyncio.subprocess.PIPE, stderr=log
    )
    try:
        assert process.stdout is not None
        while not (line := await process.stdout.readline()).strip().startswith(b"raw"):
            assert line, "it ended"
        yield Node(process, int(line.rpartition(b":")[2].partition(b"/")[0]))
        if process.returncode is None:
            process.terminate()
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


class Follower:
    """A client of either door that keeps every broadcast and can come back."""

    def __init__(self, door: str) -> None:
        self.door = door
        self.connection: ClientConnection | None = None
        self.seen: list[dict[str, Any]] = []  # all envelopes but answers to requests
        self.answer: dict[str, Any] = {}  # to the Socket.IO CONNECT
        self.offset: str | None = None

    async def follow(self, server: Any) -> None:
        """Connect, or come back with what was seen last; to whichever node."""
        if self.door == "raw":
            query = f"?since={self.offset}" if self.offset else ""
            url = f"ws://127.0.0.1:{server.port}/ws{query}"
            self.connection = await connect(url, max_queue=None)
            if not query:  # where a quiet stream stands
                await self.connection.send('{"method": "get_status"}')
                self.offset = (await self.next())["offset"]
                self.seen.clear()
            return
        url = f"ws://127.0.0.1:{server.port}/socket.io/?EIO=4&transport=websocket"
        self.connection = await connect(url, max_queue=None)
        auth = {"pid": self.answer["pid"], "offset": self.offset} if self.answer else {}
        await self.connection.send("40" + json.dumps({k: v for k, v in auth.items() if v}))
        self.answer = {}
        while not self.answer:
            await self.next()

    async def next(self) -> dict[str, Any]:
        """The next envelope; for Socket.IO the CONNECT answer counts as one."""
        assert self.connection is not None
        frame = str(await self.connection.recv())
        if self.door == "raw":
            envelope: dict[str, Any] = json.loads(frame)
            self.offset = envelope.get("offset", self.offset)
        elif frame.startswith("42"):
            _, envelope, *offset = json.loads(frame[2:])
            self.offset = offset[0] if offset else self.offset
        elif frame.startswith("40"):
            self.answer = json.loads(frame[2:])
            return self.answer
        else:
            assert frame[0] == "0", frame
            return {}
        self.seen.append(envelope)
        return envelope

    async def until(self, message: str) -> list[str]:
        """Read up to that notification; all notifications since the beginning."""
        if message not in self.messages:
            await self.until_type("notification", message=message)
        return self.messages

    async def until_type(self, type: str, **data: Any) -> dict[str, Any]:
        """Read up to an envelope of that type with (at least) that data; itself."""
        while True:
            envelope = await self.next()
            if envelope.get("type") == type and data.items() <= envelope["data"].items():
                return envelope

    @property
    def messages(self) -> list[str]:
        """The notifications seen; "GAP" where one was told."""
        found = []
        for envelope in self.seen:
            if envelope["type"] == "notification":
                found.append(envelope["data"]["message"])
            elif envelope["type"] == "error":
                assert envelope["data"]["code"] == "history_gap", envelope
                found.append("GAP")
        return found

    @property
    def offsets(self) -> list[str]:
        return [each["offset"] for each in self.seen if each["type"] == "notification"]

    async def leave(self) -> None:
        if self.connection is not None:
            await self.connection.close()
            self.connection = None


@contextlib.asynccontextmanager
async def following(*pairs: tuple[Any, str]) -> AsyncIterator[list[Follower]]:
    """Clients of (server, door), in that order."""
    followers = [Follower(door) for _, door in pairs]
    try:
        for follower, (server, _) in zip(followers, pairs, strict=True):
            await follower.follow(server)
        yield followers
    finally:
        for follower in followers:
            await follower.leave()


@pytest.fixture(params=["raw", "socket.io"])
def door(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def say(server: Any, message: str) -> None:
    """Publish a notification; it is accepted when this returns."""
    await server.manager.publish("notification", {"message": message})


def both_doors(*servers: Any) -> list[tuple[Any, str]]:
    return [(server, door) for server in servers for door in ("raw", "socket.io")]


async def test_broadcasts_have_one_order_and_offset_on_all_nodes_and_doors(
    redis: RedisServer,
) -> None:
    async def shout(server: Any, name: str) -> None:
        async with Raw.open(server) as client:
            for number in range(40):
                await client.run(f"notify {name}{number}")

    async with (
        node(redis.url) as a,
        node(redis.url) as b,
        following(*both_doors(a, b)) as followers,
    ):
        shouts = [(a, "a"), (b, "b"), (a, "c"), (b, "d")]
        await asyncio.gather(*(shout(*each) for each in shouts))
        async with Raw.open(a) as client:
            await client.run("notify end")
        orders = [await each.until("end") for each in followers]
        assert len(orders[0]) == 161
        assert sorted({order[0] for order in orders[0][:-1]}) == ["a", "b", "c", "d"]
        assert orders == [orders[0]] * 4
        assert [each.offsets for each in followers] == [followers[0].offsets] * 4
        for name in "abcd":
            own = [each for each in orders[0] if each[0] == name]
            assert own == [f"{name}{number}" for number in range(40)]


async def test_client_recovers_on_the_other_node(redis: RedisServer, door: str) -> None:
    async with (
        served(backplane=redis.url) as a,
        served(backplane=redis.url) as b,
        following((a, door)) as (follower,),
    ):
        await say(a, "1")
        await say(b, "2")
        await follower.until("2")
        sid = follower.answer.get("sid")
        await follower.leave()
        await say(a, "3")
        await say(b, "4")
        await follower.follow(b)
        await say(a, "5")
        assert await follower.until("5") == ["1", "2", "3", "4", "5"]
        assert follower.answer.get("sid") == sid


async def test_quiet_client_recovers_on_the_other_node(redis: RedisServer, door: str) -> None:
    """It has seen no broadcast: its offset is where the first node began, among foreign entries."""
    redis.add(foreign="1")
    async with served(backplane=redis.url) as a:
        offset = redis.add(foreign="2")
        await until(lambda: a.manager.backplane._last == offset)
        redis.call("XTRIM", STREAM, "MAXLEN", 1)
        async with served(backplane=redis.url) as b, following((b, door)) as (follower,):
            await follower.leave()
            redis.add(foreign="3")
            await say(a, "1")
            await follower.follow(a)
            assert await follower.until("1") == ["1"]


async def test_client_that_is_ahead_of_a_node_gets_nothing_twice(
    redis: RedisServer, door: str
) -> None:
    async with (
        served(backplane=redis.url) as a,
        served(backplane=redis.url) as b,
        following((a, door)) as (follower,),
    ):
        async with held_back(redis, b, a):
            await say(a, "1")
            await follower.until("1")
            await follower.leave()
            coming = asyncio.create_task(follower.follow(b))
            await until(lambda: b.manager.connections)
            await until(lambda: b.manager.tasks or coming.done())
        await coming
        await say(a, "2")
        assert await follower.until("2") == ["1", "2"]


@contextlib.asynccontextmanager
async def held_back(redis: RedisServer, server: Any, *others: Any) -> AsyncIterator[None]:
    """Meanwhile this node takes nothing from Redis, others do."""
    backplane = server.manager.backplane
    may_read = asyncio.Event()
    read = backplane._read

    async def wait_and_read(block_ms: int | None) -> None:
        await may_read.wait()
        await read(block_ms)

    backplane._read = wait_and_read
    redis.call("CLIENT", "KILL", "TYPE", "normal")  # ends the reading that is under way
    for each in (server, *others):
        await until(lambda it=each: it.manager.backplane.state == "degraded")
    for each in others:
        await until(lambda it=each: it.manager.backplane.state == "running")
    try:
        yield
    finally:
        may_read.set()


async def test_client_with_an_offset_of_the_future_gets_a_gap(
    redis: RedisServer, door: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("karna_ws.LAG_S", 0.05)
    async with served(backplane=redis.url) as a, following((a, door)) as (follower,):
        await say(a, "1")
        await follower.until("1")
        await follower.leave()
        follower.offset = "999999999999999-0"
        pid = follower.answer.get("pid")
        await follower.follow(a)
        if door == "raw":
            await follower.until_type("error", code="history_gap")
        await say(a, "2")
        assert await follower.until("2") == ["1", *(["GAP"] if door == "raw" else []), "2"]
        assert door == "raw" or follower.answer["pid"] != pid


async def test_status_update_stays_on_its_node_and_names_it(redis: RedisServer) -> None:
    async with served(backplane=redis.url) as a, served(backplane=redis.url) as b:
        async with following(*both_doors(a, b)) as followers:
            a.manager.services["vision"].set_state("degraded", "no lens")
            await say(a, "end")
            for follower in followers:
                await follower.until("end")
            for follower in followers[:2]:
                (update,) = [each for each in follower.seen if each["type"] == "status_update"]
                assert update["node"] == a.manager.epoch
                assert update["data"]["vision"]["detail"] == "no lens"
            for follower in followers[2:]:
                assert {each["type"] for each in follower.seen} == {"notification"}
        async with Raw.open(b) as client:
            answer = await client.ask("get_status")
            assert answer["node"] == b.manager.epoch != a.manager.epoch
            assert answer["offset"] == followers[3].offset


class Stream:
    """Numbered broadcasts by one way of publishing, and which of them were accepted."""

    def __init__(self, name: str, publish: Callable[[str], Awaitable[bool]]) -> None:
        self.name = name
        self.publish = publish
        self.accepted: list[str] = []
        self.refused: list[str] = []
        self.is_over = False

    async def run(self) -> None:
        number = 0
        while not self.is_over:
            message = f"{self.name}{number}"
            number += 1
            # Each is answered in bounded time, whatever Redis does.
            async with asyncio.timeout(services.PUBLISH_WAIT_S + 2.0):
                is_accepted = await self.publish(message)
            (self.accepted if is_accepted else self.refused).append(message)
            await asyncio.sleep(0.001 if is_accepted else 0.02)


async def publish_in_process(server: Any, message: str) -> bool:
    try:
        await say(server, message)
    except Unavailable:
        return False
    return True


async def publish_by_http(server: Any, message: str) -> bool:
    status, body = await http(server, "POST", "/api/notify", {"message": message})
    assert status == 202 or (status, body["data"]["code"]) == (503, "unavailable"), body
    return bool(status == 202)


async def publish_by_command(client: Raw, message: str) -> bool:
    answer = await client.ask("execute_command", command=f"notify {message}")
    assert answer["type"] == "command_response" or answer["data"]["code"] == "unavailable", answer
    return bool(answer["type"] == "command_response")


async def test_accepted_broadcasts_arrive_once_over_kills_of_redis(redis: RedisServer) -> None:
    async with (
        served(backplane=redis.url) as a,
        node(redis.url) as b,
        Raw.open(b) as client,
        following(*both_doors(a, b), *both_doors(a, b)) as followers,
    ):
        streams = [
            Stream("p", functools.partial(publish_in_process, a)),
            Stream("h", functools.partial(publish_by_http, b)),
            Stream("c", functools.partial(publish_by_command, client)),
        ]

        async def until_more_accepted() -> None:
            wanted = [len(stream.accepted) + 15 for stream in streams]
            for stream, count in zip(streams, wanted, strict=True):
                await until_or_ended(lambda s=stream, c=count: len(s.accepted) >= c, tasks)

        tasks = [asyncio.create_task(stream.run()) for stream in streams]
        returning = followers[4:]
        for _ in range(2):
            await until_more_accepted()
            redis.kill()
            for follower in returning:
                await follower.leave()
            for stream in streams:
                refusals = len(stream.refused)
                await until_or_ended(lambda s=stream, n=refusals: len(s.refused) > n, tasks)
            redis.start()
            await until_more_accepted()
            for follower, server in zip(returning, (b, b, a, a), strict=True):
                await follower.follow(server)
        for stream in streams:
            stream.is_over = True
        await asyncio.gather(*tasks)
        await say(a, "end")
        orders = [await each.until("end") for each in followers]

    assert orders == [orders[0]] * 8
    assert len(set(orders[0])) == len(orders[0]), "nothing arrives twice"
    for stream in streams:
        assert not set(stream.accepted) - set(orders[0]), "nothing accepted is missing"
        own = [each for each in orders[0] if each.startswith(stream.name)]
        assert own == sorted(own, key=lambda each: int(each[1:]))


async def until_or_ended(is_so: Callable[[], bool], tasks: Iterable[asyncio.Task[None]]) -> None:
    """Wait for `is_so`; fail with the error of a task that ended instead."""
    while not is_so():
        for task in tasks:
            assert not task.done(), task.exception()
        await asyncio.sleep(0.005)


async def test_hung_redis_delays_publishers_alone(redis: RedisServer) -> None:
    async with (
        served(backplane=redis.url) as a,
        Raw.open(a) as client,
        following((a, "raw")) as (follower,),
    ):
        redis.signal(signal.SIGSTOP)
        try:
            await client.send(
                execute("notify lost", id="notify"),
                execute("echo hello", id="echo"),
                {"method": "get_status", "id": "status"},
            )
            answers = [await client.next_where(lambda m: "id" in m) for _ in range(3)]
            assert sorted(each["id"] for each in answers[:2]) == ["echo", "status"]
            assert answers[2]["data"]["code"] == "unavailable"
            if a.manager.backplane.state != "degraded":
                await follower.until_type("status_update")
            status, health = await http(a, "GET", "/health")
            assert status == 503 and list(health["services"]) == ["backplane"]
            status, body = await http(a, "POST", "/api/notify", {"message": "lost too"})
            assert (status, body["data"]["code"]) == (503, "unavailable")
            answer = await client.ask("get_status")
            assert answer["data"]["backplane"]["state"] == "degraded"
            assert (await client.run("echo still")) == "still"
        finally:
            redis.signal(signal.SIGCONT)
        await until(lambda: a.manager.backplane.state == "running")
        assert await http(a, "GET", "/health") == (200, {"status": "healthy"})
        await say(a, "end")
        order = await follower.until("end")
        states = [
            each["data"]["backplane"]["state"]
            for each in follower.seen
            if each["type"] == "status_update"
        ]
        assert states == ["degraded", "running"]
        assert order in (["end"], ["lost", "end"]), "unknown is told as unavailable, once"


async def test_publishers_are_refused_in_bounded_time_while_redis_hangs(
    redis: RedisServer,
) -> None:
    async with served(backplane=redis.url) as a, following((a, "raw")) as (follower,):
        await say(a, "begin")
        redis.signal(signal.SIGSTOP)
        try:
            # Several times what goes to Redis at once: each part alone would wait for it.
            publishers = [say(a, str(number)) for number in range(4 * services.MAX_PIPELINE)]
            async with asyncio.timeout(services.PUBLISH_WAIT_S + 1.5):
                results = await asyncio.gather(*publishers, return_exceptions=True)
            assert {type(result) for result in results} == {Unavailable}
        finally:
            redis.signal(signal.SIGCONT)
        await until(lambda: a.manager.backplane.state == "running")
        await until(lambda: not a.manager.backplane._outbox)
        await say(a, "end")
        order = await follower.until("end")
        # What was on its way may come, once; what waited behind it was taken back.
        arrived = [int(each) for each in order[1:-1]]
        assert arrived == sorted(set(arrived))
        assert len(arrived) <= 2 * services.MAX_PIPELINE


async def test_server_stops_in_bounded_time_while_redis_hangs(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with served(backplane=redis.url) as a:
        backplane = a.manager.backplane
        redis.signal(signal.SIGSTOP)
        try:
            waiting = [asyncio.create_task(say(a, str(number))) for number in range(3)]
            await asyncio.sleep(0)
            async with asyncio.timeout(services.REDIS_TIMEOUT_S + 3.0):
                closing = a.close()
                await until(lambda: not backplane._is_running)
                with pytest.raises(Unavailable):
                    a.manager.notify("too late")
                await closing
            for task in waiting:
                with pytest.raises(Unavailable):
                    await task
        finally:
            redis.signal(signal.SIGCONT)
    assert "left behind" not in caplog.text


async def test_server_starts_without_redis_and_tells_a_gap_when_it_comes(
    stopped_redis: RedisServer,
) -> None:
    stopped_redis.start()
    stopped_redis.add_message("before")
    stopped_redis.kill()
    async with (
        served(backplane=stopped_redis.url) as a,
        Raw.open(a) as client,
        following(*both_doors(a)) as followers,
    ):
        assert a.manager.backplane.state == "degraded"
        assert (await client.run("echo hello")) == "hello"
        with pytest.raises(Unavailable, match="backplane"):
            a.manager.broadcast("notification", {"message": "lost"})
        error = await client.error_of(execute("notify lost"))
        assert error["code"] == "unavailable"
        assert (await http(a, "GET", "/health"))[0] == 503
        stopped_redis.start()
        await until(lambda: a.manager.backplane.state == "running")
        await say(a, "after")
        for follower in followers:  # others may have published while it was away
            assert await follower.until("after") == ["GAP", "after"]
        assert (await http(a, "GET", "/health"))[0] == 200


async def test_client_recovers_from_a_node_that_was_restarted(
    redis: RedisServer, door: str
) -> None:
    async with served(backplane=redis.url) as b:
        async with served(backplane=redis.url) as a, following((a, door)) as (follower,):
            await say(a, "1")
            await follower.until("1")
            await follower.leave()
            await say(a, "2")
        await say(b, "3")
        async with served(backplane=redis.url) as a:
            await follower.follow(a)
            await say(a, "4")
            assert await follower.until("4") == ["1", "2", "3", "4"]
            await follower.leave()


async def test_restarted_node_loads_as_much_as_history_keeps(redis: RedisServer) -> None:
    options = {"backplane": redis.url, "history_messages": 40}
    count = 3 * services.READ_ENTRIES
    ids = [redis.add_message(str(number)) for number in range(count)]
    async with served(**options) as a:
        manager = a.manager
        assert [offset for offset, _ in manager.history.entries] == ids[-40:]
        assert len(manager.history.since(ids[-41]) or ()) == 40
        assert manager.history.since(ids[-42]) is None
        async with Raw.open(a, f"/ws?since={ids[-3]}") as client:
            assert [(await client.next())["offset"] for _ in range(2)] == ids[-2:]
    async with served(**{**options, "history_messages": 0}) as a:
        assert not a.manager.history.entries
        async with following((a, "raw")) as (follower,):
            await say(a, "live")
            assert await follower.until("live") == ["live"]


TRIMS: list[tuple[str | int, ...]] = [
    ("XTRIM", STREAM, "MAXLEN", 0),
    ("XTRIM", STREAM, "MAXLEN", 1),
    ("DEL", STREAM),
    ("FLUSHALL",),
]
all_trims = pytest.mark.parametrize("trim", TRIMS, ids=lambda words: "-".join(map(str, words)))


@all_trims
async def test_trim_while_no_node_runs_gives_a_gap(
    redis: RedisServer, trim: tuple[str | int, ...]
) -> None:
    # The last two have seen no broadcast when they leave.
    async with (
        served(backplane=redis.url) as a,
        following(*both_doors(a), *both_doors(a)) as followers,
    ):
        await followers[2].leave()
        await followers[3].leave()
        await say(a, "1")
        for follower in followers[:2]:
            await follower.until("1")
            await follower.leave()
        await say(a, "2")
        await say(a, "3")
    redis.call(*trim)
    async with served(backplane=redis.url) as a:
        pids = [each.answer.get("pid") for each in followers]
        for follower in followers:
            await follower.follow(a)
        await say(a, "4")
        assert await followers[0].until("4") == ["1", "GAP", "4"]
        assert await followers[1].until("4") == ["1", "4"]
        assert await followers[2].until("4") == ["GAP", "4"]
        assert await followers[3].until("4") == ["4"]
        for number in (1, 3):  # socket.recovered is false
            assert followers[number].answer["pid"] != pids[number]
        for follower in followers:
            await follower.leave()


@all_trims
@pytest.mark.parametrize("is_cut", [False, True], ids=["connected", "reconnecting"])
async def test_trim_of_what_a_node_has_not_read_gives_a_gap(
    redis: RedisServer, trim: tuple[str | int, ...], is_cut: bool
) -> None:
    async with (
        served(backplane=redis.url) as a,
        following(*both_doors(a), *both_doors(a)) as followers,
    ):
        await say(a, "1")
        for follower in followers:
            await follower.until("1")
        for follower in followers[2:]:
            await follower.leave()
        # The loop stands still: the node reads the first alone, or none.
        if is_cut:
            redis.call("CLIENT", "KILL", "TYPE", "normal")
        for number in range(2, 6):
            redis.add_message(str(number))
        redis.call(*trim)
        redis.add_message("6")
        for follower in followers[:2]:
            order = await follower.until("6")
            if "2" in order:  # read at once, before it was trimmed
                order.remove("2")
            rest = ["5", "6"] if trim[-1] == 1 else ["6"]  # what is still there arrives
            assert order == ["1", "GAP", *rest]
        pid = followers[3].answer["pid"]
        for follower in followers[2:]:
            await follower.follow(a)
        await say(a, "7")
        assert await followers[2].until("7") == ["1", "GAP", "7"]
        assert await followers[3].until("7") == ["1", "7"]
        assert followers[3].answer["pid"] != pid


async def test_emptied_stream_is_noticed_while_nothing_is_published(redis: RedisServer) -> None:
    async with served(backplane=redis.url) as a, following(*both_doors(a)) as followers:
        await say(a, "1")
        for follower in followers:
            await follower.until("1")
        redis.call("FLUSHALL")
        for follower in followers:
            await follower.until_type("error", code="history_gap")
        await say(a, "2")
        for follower in followers:
            assert await follower.until("2") == ["1", "GAP", "2"]


async def test_trim_of_what_a_node_has_read_gives_no_gap(redis: RedisServer) -> None:
    async with served(backplane=redis.url) as a, following(*both_doors(a)) as followers:
        for number in range(3):
            await say(a, str(number))
        for follower in followers:
            await follower.until("2")
        redis.call("XTRIM", STREAM, "MAXLEN", 1)
        redis.call("CLIENT", "KILL", "TYPE", "normal")
        await until(lambda: a.manager.backplane.state == "degraded")
        redis.add_message("3")
        for follower in followers:
            assert await follower.until("3") == ["0", "1", "2", "3"]


FOREIGN: list[dict[str, str | bytes]] = [
    {"body": "no JSON"},
    {"body": ""},
    {"body": b"\xff\xfe\x00"},
    {"body": b"\x89PNG\r\n"},
    {"body": "[]"},
    {"body": "null"},
    {"body": "{}"},
    {"body": '{"type": "x"}'},
    {"body": '{"data": 1}'},
    {"body": '{"type": 5, "data": 1}'},
    {"body": '{"type": "x", "data": NaN}'},
    {"body": '{"type": "x", "data": "\\ud800"}'},
    {"body": '{"type": "x", "data": 1} '.ljust(5000)},
    {"body": '{"type": "x", "data": 1}{'},
    {"body": '{"type":"x","data":' + "[" * 300 + "]" * 300 + "}"},  # orjson reads it...
    {"body": '{"type":"x","data":' + "[" * 2000 + "]" * 2000 + "}"},  # ...and not this
    {"other": "field"},
    {"Body": "{}"},
    {b"\xff".decode("latin-1"): b"\x00"},
]


async def test_foreign_entries_are_skipped_and_harm_nothing(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="karna_ws")
    options = {"backplane": redis.url, "max_message_bytes": 1024, "max_body_bytes": 1024}
    async with served(**options) as a, following(*both_doors(a)) as followers:
        await say(a, "1")
        for follower in followers:
            await follower.until("1")
            await follower.leave()
        for fields in FOREIGN:
            redis.add(**fields)
        await say(a, "2")
        await until(lambda: a.manager.history.last == a.manager.backplane._last)
        lines = [record.getMessage() for record in caplog.records]
        skipped = [line for line in lines if line.startswith("skipped entry")]
        assert len(skipped) == a.manager.log_gate.BURST
        assert all(len(line) < 300 and line.isprintable() for line in skipped)
        assert a.manager.backplane.state == "running"
        async with served(**options) as b:  # they are in the history that it loads
            assert b.manager.backplane.state == "running"
            for fields in FOREIGN:
                redis.add(**fields)
            async with served(**options) as c:  # its newest entry is a foreign one
                for follower, server in zip(followers, (b, c), strict=True):
                    await follower.follow(server)
                    await say(a, f"3 {follower.door}")
                    await follower.until(f"3 {follower.door}")
            for follower in followers:
                types = {each["type"] for each in follower.seen}
                assert types == {"notification", "status_update"}
            orders = [each.messages for each in followers]
            assert orders == [["1", "2", "3 raw"], ["1", "2", "3 raw", "3 socket.io"]]


async def test_entry_with_more_fields_keeps_only_what_a_broadcast_has(redis: RedisServer) -> None:
    async with served(backplane=redis.url) as a, following((a, "raw")) as (follower,):
        body = {"type": "notification", "data": {"message": "1"}, "offset": "x", "id": 5, "node": 1}
        offset = redis.add(body=json.dumps(body), other="field")
        await follower.until("1")
        data = {"message": "1"}
        assert follower.seen == [{"type": "notification", "data": data, "offset": offset}]


async def test_longest_request_for_a_notification_arrives(redis: RedisServer) -> None:
    limits = {"max_message_bytes": 1500, "max_body_bytes": 2000}
    async with (
        served(backplane=redis.url, **limits) as a,
        following((a, "raw")) as (follower,),
        Raw.open(a) as client,
    ):
        message = "x" * (2000 - len('{"message":""}'))
        status, _ = await http(a, "POST", "/api/notify", {"message": message})
        assert status == 202
        await follower.until(message)
        request = json.dumps(execute("notify ", id=1))
        message = "y" * (1500 - len(request))
        await client.send(execute(f"notify {message}", id=1))
        assert (await client.final(1))["type"] == "command_response"
        await follower.until(message)
        for publish in (a.manager.broadcast, a.manager.publish):
            with pytest.raises(ValueError, match="bytes at most"):  # said, not lost
                await asyncio.ensure_future(publish("x", "z" * 4000))


async def test_publishers_are_refused_when_the_outbox_is_full(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "MAX_OUTBOX", 20)
    monkeypatch.setattr(services, "MAX_OUTBOX_BYTES", 100_000)
    async with served(backplane=redis.url) as a, following((a, "raw")) as (follower,):
        for number in range(20):  # nothing is sent before the loop goes on
            a.manager.notify(f"a{number}")
        with pytest.raises(Unavailable, match="too many"):
            a.manager.notify("refused")
        with pytest.raises(Unavailable, match="too many"):
            await say(a, "refused")
        await follower.until("a19")
        await until(lambda: not a.manager.backplane._outbox)
        for number in range(5):
            a.manager.notify(f"b{number}" + "x" * 30_000 * (number < 4))
            if a.manager.backplane._outbox_bytes > 100_000:
                break
        with pytest.raises(Unavailable, match="too many"):
            a.manager.notify("refused")
        await until(lambda: not a.manager.backplane._outbox)
        assert a.manager.backplane._outbox_bytes == 0
        await say(a, "end")
        order = [each[:3] for each in await follower.until("end")]
        assert order == [f"a{n}" for n in range(20)] + ["b0x", "b1x", "b2x", "b3x", "end"]


async def test_node_reads_as_fast_as_it_publishes(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what it published itself would be trimmed before it has read it."""
    monkeypatch.setattr(services, "STREAM_ENTRIES", 1000)

    async def shout(server: Any, numbers: Iterator[int]) -> None:
        for number in numbers:
            await say(server, str(number))

    async with served(backplane=redis.url) as a, following((a, "raw")) as (follower,):
        numbers = iter(range(6000))
        await asyncio.gather(*(shout(a, numbers) for _ in range(200)))
        await say(a, "end")
        assert await follower.until("end") == [*map(str, range(6000)), "end"]


async def test_redis_that_refuses_entries_is_logged_rarely(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with served(backplane=redis.url) as a, following((a, "raw")) as (follower,):
        redis.call("CONFIG", "SET", "maxmemory", 1)
        for number in range(30):
            with pytest.raises(Unavailable, match="not accept"):
                await say(a, str(number))
            a.manager.notify("nobody waits")
        await until(lambda: not a.manager.backplane._outbox)
        redis.call("CONFIG", "SET", "maxmemory", 0)
        await say(a, "end")
        assert await follower.until("end") == ["end"]
        assert len([r for r in caplog.records if "not accepted" in r.getMessage()]) == 1


async def test_backplane_recovers_from_what_a_late_monitor_says(redis: RedisServer) -> None:
    async with served(backplane=redis.url) as a:
        backplane = a.manager.backplane
        backplane.set_state("degraded", "no answer to check within 5 s")
        await backplane.check()
        assert (backplane.state, backplane.detail) == ("running", f"Redis at {redis.path}")


async def test_processes_share_a_port_and_broadcasts(redis: RedisServer) -> None:
    if not hasattr(__import__("socket"), "SO_REUSEPORT"):
        pytest.skip("needs SO_REUSEPORT")
    async with (
        node(redis.url, "--reuse-port") as a,
        node(redis.url, "--reuse-port", port=a.port) as b,
        contextlib.AsyncExitStack() as stack,
    ):
        assert a.port == b.port
        nodes: dict[str, Raw] = {}
        for _ in range(100):  # the kernel spreads them
            client = await stack.enter_async_context(Raw.open(a))
            nodes.setdefault((await client.ask("get_status"))["node"], client)
            if len(nodes) == 2:
                break
        first, second = nodes.values()
        assert (await http(a, "POST", "/api/notify", {"message": "hello"}))[0] == 202
        got = [await client.next_of("notification") for client in (first, second)]
        assert got[0] == got[1]


SECRET = "hunter2-secret"


@pytest.mark.parametrize("given", [SECRET, "wrong-" + SECRET, None], ids=["right", "wrong", "away"])
async def test_credentials_of_redis_appear_nowhere(
    stopped_redis: RedisServer, given: str | None
) -> None:
    stopped_redis.options = ("--requirepass", SECRET)
    if given is not None:
        stopped_redis.start()
    url = f"unix://default:{given or SECRET}@{stopped_redis.path}"
    async with node(url, "--log-level", "debug", log=asyncio.subprocess.PIPE) as a:
        async with Raw.open(a) as client:
            answers = [
                await client.ask("execute_command", command="notify hello"),
                await client.ask("get_status"),
                await client.ask("execute_command", command="help"),
            ]
        answers += [await http(a, "GET", path) for path in ("/health", "/api/status", "/metrics")]
        answers.append(await http(a, "POST", "/api/notify", {"message": "hello"}))
        a.process.terminate()
        printed, logged = await a.process.communicate()
    state = "running" if given == SECRET else "degraded"
    assert answers[1]["data"]["backplane"]["state"] == state
    assert answers[0]["type"] == ("command_response" if given == SECRET else "error")
    assert f"backplane is {state}".encode() in logged
    assert SECRET not in repr((answers, printed, logged))


@pytest.mark.parametrize(
    "url",
    [
        "http://user:SECRET@localhost", "user:SECRET@localhost:6379", "redis://user:SECRET@h:port",
        "redis://user:SEC/RET@localhost:6379", "redis://user:SECRET@localhost?nonsense=1",
        "redis://user:SECRET@localhost?db=SECRET", "redis://user:SECRET@localhost:70000",
        "redis://user:SECRET@[localhost",
    ],
)  # fmt: skip
async def test_bad_backplane_url_ends_the_start_with_one_line(url: str) -> None:
    needs("redis")
    code, text = await failing_start("--backplane", url)
    assert (code, text.count("\n")) == (2, 1)
    assert text.startswith("karna_ws: --backplane must look like redis://")
    assert "SEC" not in text


async def test_missing_redis_package_ends_the_start_with_one_line() -> None:
    code, text = await failing_start("--backplane", "redis://localhost", without="redis")
    assert (code, text) == (2, "karna_ws: --backplane needs the redis package: pip install redis\n")


async def failing_start(*flags: str, without: str = "_") -> tuple[int | None, str]:
    """Exit code and output of a server that should not start, where that package is missing."""
    program = "import sys; sys.modules[sys.argv[1]] = None; import karna_ws; sys.exit(karna_ws.main"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", f"{program}(sys.argv[2:]))", without, "--port", "0", *flags,
        cwd=SERVER_FILE.parent, env={**os.environ, "PYTHONPATH": str(SERVER_FILE.parent)},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await process.communicate()
    return process.returncode, output.decode()


# --- the real clients -------------------------------------------------------------------------

EXAMPLES = Path(karna_ws.__file__).resolve().parent / "examples"
FRONTEND = EXAMPLES / "frontend"

# What only the tests need from npm, beside the packages of examples/frontend.
NODE_TOOLS = {
    "playwright-core": "1.65.1",
    "socket.io-client-2": "npm:socket.io-client@2.5.0",
    "ws": "8.23.0",
}

# A 3x2 PNG.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAMAAAACCAIAAAASFvFNAAAAEElEQVR4nGP4z8AARAwQCgAf7gP9i18U1AAAAABJRU5E"
    "rkJggg=="
)


@pytest.fixture(scope="session")
def node_dir() -> Path:
    """A folder with the frontend's npm packages and NODE_TOOLS; installed once and kept."""
    needs("node", "npm")
    recipe = (FRONTEND / "package-lock.json").read_bytes() + json.dumps(NODE_TOOLS).encode()
    parent = Path(os.environ.get("KARNA_NODE_DIR", Path.home() / ".cache" / "karna-ws-tests"))
    folder = parent / hashlib.sha256(recipe).hexdigest()[:16]
    if not folder.exists():
        # Installed aside and renamed, so that a broken or concurrent install is never used.
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
        unfinished.mkdir(parents=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(FRONTEND / name, unfinished)
        tools = [f"{name}@{version}" for name, version in NODE_TOOLS.items()]
        quiet = ["--no-audit", "--no-fund", "--ignore-scripts"]
        run_npm(unfinished, "ci", *quiet)
        run_npm(unfinished, "install", "--no-save", *quiet, *tools)
        with contextlib.suppress(OSError):  # another run was faster
            unfinished.rename(folder)
    return folder


def run_npm(folder: Path, *arguments: str) -> None:
    done = subprocess.run(
        ["npm", *arguments], check=False, cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def karna_client_js(node_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples/karna-client.ts, type-checked strictly and compiled to JavaScript."""
    folder = tmp_path_factory.mktemp("karna-client")
    flags = "--strict --noUncheckedIndexedAccess --target es2022 --module esnext --lib es2022,dom"
    source = EXAMPLES / "karna-client.ts"
    tsc = node_dir / "node_modules/.bin/tsc"
    done = subprocess.run(
        [tsc, *flags.split(), "--types", "", "--outDir", folder, source],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "package.json").write_text('{"type": "module"}')
    return folder / "karna-client.js"


class Program:
    """A subprocess whose lines are events; those of Node programs are JSON: {"event", "data"}."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.seen: list[tuple[str, Any]] = []

    async def wait_for(self, event: str) -> Any:
        """The data of the next such event. Fails with all that was said, if it does not come."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                while True:
                    name, data = await self._next_event()
                    if name == event:
                        return data
        except (TimeoutError, EOFError) as error:
            raise AssertionError(f"no {event!r} ({error!r}); seen: {self.seen}") from None

    async def _next_event(self) -> tuple[str, Any]:
        assert self.process.stdout is not None
        line = (await self.process.stdout.readline()).decode()
        if not line:
            raise EOFError("the program ended")
        try:
            message = json.loads(line)
            event = (message["event"], message.get("data"))
        except (ValueError, TypeError, KeyError):
            event = ("line", line.rstrip("\n"))
        self.seen.append(event)
        return event

    async def wait_for_line(self, text: str) -> str:
        """The next plain line that contains the text."""
        while text not in (line := await self.wait_for("line")):
            pass
        return str(line)

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n".encode())

    def all(self, event: str) -> list[Any]:
        return [data for name, data in self.seen if name == event]

    async def ends(self, code: int = 0) -> None:
        """Read what is left until it exits by itself, with this code."""
        with contextlib.suppress(EOFError):
            async with asyncio.timeout(DEADLINE_S):
                while True:
                    await self._next_event()
        async with asyncio.timeout(DEADLINE_S):
            assert await self.process.wait() == code, self.seen


@contextlib.asynccontextmanager
async def running(
    *command: str | Path, cwd: Path | None = None, **environment: str
) -> AsyncIterator[Program]:
    """Run a program, its errors among its lines; killed with its children at the end."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=cwd,
        env=os.environ | environment,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        limit=1 << 20,
        start_new_session=True,
    )
    try:
        yield Program(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


# What every Node program starts with. `told(word)` waits for Program.tell(word).
NODE_PRELUDE = """
import readline from 'node:readline';
const say = (event, data) => console.log(JSON.stringify({ event, data }));
const url = process.argv[1];
const input = readline.createInterface({ input: process.stdin });
const words = [];
input.on('line', (line) => words.push(line));
const told = async (word) => {
  while (!words.includes(word)) await new Promise((resolve) => input.once('line', resolve));
};
const finish = () => input.close();
"""

SOCKET_IO = """
import { io } from 'socket.io-client';
const connectTo = (address, options) => {
  const socket = io(address, { transports: ['websocket'], reconnectionDelay: 20, ...options });
  socket.on('connect', () => {
    say('connect', { id: socket.id, recovered: socket.recovered === true });
  });
  socket.on('disconnect', (reason) => say('disconnect', reason));
  socket.on('connect_error', ({ message, data }) => {
    say('connect_error', { message, data, active: socket.active });
  });
  socket.on('rpc_response', (response) => say(response.type, response));
  return socket;
};
const run = (command, params) => ({ method: 'execute_command', params: { command, ...params } });
"""


@contextlib.asynccontextmanager
async def frontend_node(
    node_dir: Path, script: str, *arguments: str | Path
) -> AsyncIterator[Program]:
    """Run an ES module given as text; `node_dir` is where its imports come from."""
    text = NODE_PRELUDE + script
    command = ["node", "--input-type=module", "--eval", text, "--", *arguments]
    async with running(*command, cwd=node_dir) as program:
        yield program


async def notify(port: int, message: str) -> None:
    """Broadcast a notification as a shell script would, over HTTP."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/notify",
        data=json.dumps({"message": message}).encode(),
        headers={"Content-Type": "application/json"},
    )
    await asyncio.to_thread(lambda: urllib.request.urlopen(request, timeout=DEADLINE_S).close())


class Wire:
    """A TCP proxy to the server that can be cut, mended and frozen."""

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.port = 0
        self._is_cut = False
        self._frozen: set[asyncio.StreamWriter] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._carried = 0
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cut()
        self._listener.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Abort every connection, and every new one, until it is mended."""
        self._is_cut = True
        for writer in self._writers:
            writer.transport.abort()

    def mend(self) -> None:
        self._is_cut = False

    def freeze(self) -> None:
        """Swallow what passes over the connections of now, and keep them open: a dead peer."""
        self._frozen |= self._writers

    async def carries(self, count: int) -> None:
        """Wait until exactly so many connections are open."""
        async with asyncio.timeout(DEADLINE_S), self._changed:
            await self._changed.wait_for(lambda: self._carried == count)

    async def _carry(self, change: int) -> None:
        async with self._changed:
            self._carried += change
            self._changed.notify_all()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self._is_cut:
            writer.transport.abort()
            return
        try:
            back_reader, back_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, back_writer}
        await self._carry(1)
        pumps = [self._pump(reader, back_writer), self._pump(back_reader, writer)]
        await asyncio.gather(*pumps)
        await self._carry(-1)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                if sink not in self._frozen:
                    sink.write(data)
        if sink not in self._frozen:
            sink.close()


def ws_url(port: int, host: str = "localhost") -> str:
    return f"ws://{host}:{port}/ws"


# --- the cases of the public Socket.IO protocol test suite, websocket transport ------------------
#
# The same exchanges and expectations as in socketio/socket.io-protocol, folder test-suite, as one
# table: ">" is sent, "<" must come back (heartbeat pings aside, unless a ping is what is expected).

PING_INTERVAL_S, PING_TIMEOUT_S = 0.3, 0.2
SOCKET_IO_QUERY = "EIO=4&transport=websocket"


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


def connect_answer(prefix: str) -> Callable[[str | bytes], bool]:
    def is_connect_answer(frame: str | bytes) -> bool:
        assert isinstance(frame, str) and frame.startswith(prefix)
        fields = json.loads(frame.removeprefix(prefix))
        assert list(fields) == ["sid"] and isinstance(fields["sid"], str)
        return True

    return is_connect_answer


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


# --- socket.io-client 4 in Node -------------------------------------------------------------------


async def test_socket_io_client_gets_answers_as_event_or_as_ack(node_dir: Path) -> None:
    script = """
      const socket = connectTo(url);
      await new Promise((resolve) => socket.on('connect', resolve));
      for (const message of [{ method: 'get_status', params: {} }, run('echo one'), run('eccho')])
        await new Promise((resolve) => {
          socket.once('rpc_response', resolve);
          socket.emit('rpc', message);
        });
      say('acks');
      const two = { ...run('echo two'), id: 7 };
      for (const message of [{ method: 'get_status' }, two, run('eccho'), 5])
        say('ack', await socket.timeout(5000).emitWithAck('rpc', message));
      say('method', await socket.timeout(5000).emitWithAck('get_status', {}));
      say('unheard', await socket.timeout(5000).emitWithAck('no-such-event', 1));
      say('ready');
      await told('end');
      socket.disconnect();
      finish();
    """
    async with (
        serving(WebSocketManager(), port=0) as server,
        frontend_node(node_dir, SOCKET_IO + script, ws_url(server.port)) as program,
    ):
        await program.wait_for("acks")
        (status,) = program.all("status_update")
        assert {"vision", "language", "command"} <= set(status["data"])
        (echoed,) = program.all("command_response")
        assert echoed["data"] == {"command": "echo one", "result": "one"} and "id" not in echoed
        (error,) = program.all("error")
        assert error["data"]["code"] == "unknown_command"
        assert "echo" in error["data"]["suggestions"]

        await program.wait_for("ready")
        status, echoed, error, invalid = program.all("ack")
        assert status["type"] == "status_update" and status["data"]["command"]["state"]
        assert echoed["type"] == "command_response" and echoed["id"] == 7
        assert echoed["data"] == {"command": "echo two", "result": "two"}
        assert (error["type"], error["data"]["code"]) == ("error", "unknown_command")
        assert (invalid["type"], invalid["data"]["code"]) == ("error", "invalid_request")
        assert program.all("method")[0]["type"] == "status_update"
        assert program.all("unheard")[0]["type"] == "error"
        # With an ack, nothing came as an event besides.
        assert [len(program.all(kind)) for kind in ("command_response", "error")] == [1, 1]

        await notify(server.port, "hello all")
        notification = await program.wait_for("notification")
        assert notification["data"]["message"] == "hello all"
        assert notification["data"]["level"] == "info"
        assert isinstance(notification["offset"], str)
        program.tell("end")
        await program.ends()
        assert program.all("disconnect") == ["io client disconnect"]


async def test_socket_io_client_sends_image_as_bytes_to_describe(node_dir: Path) -> None:
    script = """
      const socket = connectTo(url);
      const image = Buffer.from(process.argv[2], 'base64');
      say('ack', await socket.timeout(5000).emitWithAck('rpc', run('describe', { image })));
      socket.emit('rpc', run('describe', { image }));
      socket.once('rpc_response', () => { socket.disconnect(); finish(); });
    """
    async with (
        serving(WebSocketManager(), port=0) as server,
        frontend_node(
            node_dir, SOCKET_IO + script, ws_url(server.port), base64.b64encode(PNG).decode()
        ) as program,
    ):
        await program.ends()
        (ack,), (event,) = program.all("ack"), program.all("command_response")
        for answer in (ack, event):
            result = answer["data"]["result"]
            assert (result["format"], result["width"], result["height"]) == ("png", 3, 2)
            assert result["bytes"] == len(PNG)


async def test_socket_io_client_reconnects_by_itself_after_server_restart(node_dir: Path) -> None:
    script = """
      const socket = connectTo(url);
      await told('again');
      say('ack', await socket.timeout(5000).emitWithAck('rpc', run('echo back')));
      socket.disconnect();
      finish();
    """
    async with contextlib.AsyncExitStack() as stack:
        async with serving(WebSocketManager(), port=0) as server:
            program = await stack.enter_async_context(
                frontend_node(node_dir, SOCKET_IO + script, ws_url(server.port))
            )
            first = await program.wait_for("connect")
            port = server.port
        # A 41 packet would be "io server disconnect", after which clients stay away.
        assert await program.wait_for("disconnect") == "transport close"
        async with serving(WebSocketManager(), port=port):
            second = await program.wait_for("connect")
            assert second["id"] != first["id"] and second["recovered"] is False
            program.tell("again")
            assert (await program.wait_for("ack"))["data"]["result"] == "back"
            await program.ends()


async def test_socket_io_client_needs_the_token(node_dir: Path) -> None:
    script = """
      const wrong = connectTo(url, { auth: { token: 'wrong' }, forceNew: true });
      const none = connectTo(url, { forceNew: true });
      const refused = (socket) => new Promise((resolve) => socket.on('connect_error', resolve));
      await Promise.all([refused(wrong), refused(none)]);
      say('refused');
      const right = connectTo(url, { auth: { token: 'sesame' }, forceNew: true });
      say('ack', await right.timeout(5000).emitWithAck('rpc', run('echo in')));
      for (const socket of [wrong, none, right]) socket.disconnect();
      finish();
    """
    async with (
        serving(WebSocketManager(), port=0, token="sesame") as server,
        frontend_node(node_dir, SOCKET_IO + script, ws_url(server.port)) as program,
    ):
        await program.wait_for("refused")
        assert program.all("connect") == []
        errors = program.all("connect_error")
        # Not active: refused by the server, so the client does not hammer it with a wrong token.
        assert [error["active"] for error in errors] == [False, False]
        assert all("token" in error["message"] for error in errors)
        assert (await program.wait_for("ack"))["data"]["result"] == "in"
        await program.ends()


async def test_socket_io_client_is_refused_an_unknown_namespace(node_dir: Path) -> None:
    script = """
      const known = connectTo(url);
      const unknown = connectTo(url.replace('/ws', '/elsewhere'));  // over the same connection
      await new Promise((resolve) => unknown.on('connect_error', resolve));
      say('ack', await known.timeout(5000).emitWithAck('rpc', run('echo here')));
      known.disconnect();
      unknown.disconnect();
      finish();
    """
    async with (
        serving(WebSocketManager(), port=0) as server,
        frontend_node(node_dir, SOCKET_IO + script, ws_url(server.port)) as program,
    ):
        error = await program.wait_for("connect_error")
        assert error["message"] == "Invalid namespace"
        assert (await program.wait_for("ack"))["data"]["result"] == "here"
        await program.ends()


async def test_socket_io_client_with_retries_gets_every_ack(node_dir: Path) -> None:
    # With `retries` one packet is under way at a time: a missing ack stalls the rest.
    script = """
      const socket = connectTo(url, { retries: 3, ackTimeout: 5000 });
      for (const number of [1, 2, 3])
        socket.emit('rpc', run(`echo ${number}`), (_, answer) => say('ack', answer.data.result));
      socket.emit('no-such-event', 1, (error, answer) => say('ack', answer.type));
      socket.emit('rpc', 'not a request', (error, answer) => say('ack', answer.data.code));
      socket.emit('rpc', run('echo last'), (error, answer) => {
        say('ack', answer.data.result);
        socket.disconnect();
        finish();
      });
    """
    async with (
        serving(WebSocketManager(), port=0) as server,
        frontend_node(node_dir, SOCKET_IO + script, ws_url(server.port)) as program,
    ):
        await program.ends()
        assert program.all("ack") == ["1", "2", "3", "error", "invalid_request", "last"]


@pytest.mark.parametrize("seen", ["a broadcast", "no broadcast", "an event of the program"])
async def test_socket_io_client_recovers_every_broadcast_over_network_cut(
    node_dir: Path, seen: str
) -> None:
    script = """
      const socket = connectTo(url);
      socket.on('greeting', (text) => say('greeting', text));
      told('greet').then(() => socket.emit('greet', 'Ada'));
      await told('end');
      socket.disconnect();
      finish();
    """
    manager = WebSocketManager()

    @manager.on("greet")
    async def greet(client: Any, name: str) -> None:
        await client.emit("greeting", f"Hello, {name}!")

    async with (
        serving(manager, port=0) as server,
        Wire(server.port) as wire,
        frontend_node(node_dir, SOCKET_IO + script, ws_url(wire.port)) as program,
    ):
        first = await program.wait_for("connect")
        assert first["recovered"] is False
        expected = ["missed 0", "missed 1", "missed 2", "after"]
        if seen != "no broadcast":  # without one it has no offset to send, only its pid
            await notify(server.port, "before")
            await program.wait_for("notification")
            expected.insert(0, "before")
        if seen == "an event of the program":  # whose last string the client takes for an offset
            program.tell("greet")
            assert await program.wait_for("greeting") == "Hello, Ada!"
        wire.cut()
        await program.wait_for("disconnect")
        for number in range(3):
            await notify(server.port, f"missed {number}")
        wire.mend()
        second = await program.wait_for("connect")
        assert second == {"id": first["id"], "recovered": True}
        await notify(server.port, "after")
        await wait_for_notification(program, "after")
        program.tell("end")
        await program.ends()
        messages = [response["data"]["message"] for response in program.all("notification")]
        assert messages == expected


async def wait_for_notification(program: Program, message: str) -> None:
    while (await program.wait_for("notification"))["data"]["message"] != message:
        pass


async def test_socket_io_client_2_is_told_to_upgrade(node_dir: Path) -> None:
    script = """
      import io from 'socket.io-client-2';
      const socket = io(url, { transports: ['websocket'], reconnection: false });
      socket.on('connect', () => say('connect'));
      socket.on('error', (error) => { say('told', error); socket.close(); finish(); });
      socket.on('connect_error', (error) => { say('connect_error', String(error)); finish(); });
    """
    async with (
        serving(WebSocketManager(), port=0) as server,
        frontend_node(node_dir, script, ws_url(server.port)) as program,
    ):
        told = await program.wait_for("told")
        assert re.search(r"socket\.io-client.*\b3\b|\bv?3\b.*socket\.io-client", str(told)), told
        await program.ends()


# --- python-socketio's client ---------------------------------------------------------------------


async def test_python_socketio_client_works_unmodified() -> None:
    needs("socketio", "aiohttp")
    import socketio

    responses: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    async with asyncio.timeout(DEADLINE_S), serving(WebSocketManager(), port=0) as server:
        client = socketio.AsyncClient(reconnection=False)

        # Broadcasts have their offset as a second argument, for clients that recover.
        def keep(answer: dict[str, Any], *offset: str) -> None:
            responses.put_nowait(answer)

        client.on("rpc_response", keep, namespace="/ws")
        await client.connect(
            f"http://127.0.0.1:{server.port}", namespaces=["/ws"], transports=["websocket"]
        )

        def command(line: str, **params: Any) -> dict[str, Any]:
            return {"method": "execute_command", "params": {"command": line, **params}}

        try:
            await client.emit("rpc", command("echo one"), namespace="/ws")
            assert (await responses.get())["data"] == {"command": "echo one", "result": "one"}
            ack = await client.call("rpc", command("echo two"), namespace="/ws")
            assert ack["data"] == {"command": "echo two", "result": "two"}
            described = await client.call("rpc", command("describe", image=PNG), namespace="/ws")
            assert described["data"]["result"]["width"] == 3
            await notify(server.port, "hello")
            assert (await responses.get())["data"]["message"] == "hello"
        finally:
            await client.disconnect()
        with pytest.raises(socketio.exceptions.ConnectionError, match="namespace"):
            await socketio.AsyncClient(reconnection=False).connect(
                f"http://127.0.0.1:{server.port}", namespaces=["/no"], transports=["websocket"]
            )


# --- examples/karna-client.ts ---------------------------------------------------------------------

KARNA_CLIENT = """
const { KarnaClient } = await import(process.argv[2]);
const { default: WebSocket } = await import('ws');
const start = (options) => {
  const karna = new KarnaClient(url, { WebSocket, minDelayMs: 20, ...options });
  for (const event of ['open', 'close', 'status', 'notification', 'gap', 'error'])
    karna.on(event, (value) => say(event, value));
  return karna;
};
const outcome = (promise) => promise.then(
  (value) => ({ value }),
  (error) => ({ error: error.name, code: error.code, message: error.message }),
);
"""


async def test_karna_client_runs_commands_with_progress_and_cancel(
    node_dir: Path, karna_client_js: Path
) -> None:
    script = """
      const karna = start();
      const progress = [];
      const onProgress = (value) => progress.push(value);
      say('outcomes', await Promise.all([
        karna.command('countdown 0.2', { onProgress }),  // asked before the connection is open
        karna.command('echo quick'),
        karna.request('get_status', {}),
        karna.command('eccho'),
        karna.request('no_such_method', {}),
        karna.command('echo never', { signal: AbortSignal.abort() }),
      ].map(outcome)));
      say('progress', progress);
      const stop = new AbortController();
      const long = outcome(karna.command('countdown 60', {
        signal: stop.signal,
        onProgress: () => stop.abort(new Error('enough')),
      }));
      say('aborted', await long);
      await told('end');
      say('lost', await Promise.all([outcome(karna.command('countdown 60')), karna.close()]));
      say('late', await outcome(karna.status()));
      finish();
    """
    manager = WebSocketManager()
    async with (
        serving(manager, port=0) as server,
        frontend_node(
            node_dir, KARNA_CLIENT + script, ws_url(server.port), karna_client_js
        ) as program,
    ):
        counted, quick, status, unknown, no_method, never = await program.wait_for("outcomes")
        assert counted["value"]["command"] == "countdown 0.2"
        assert quick["value"] == {"command": "echo quick", "result": "quick"}
        assert status["value"]["command"]["state"] in ("starting", "running")
        assert (unknown["error"], unknown["code"]) == ("KarnaError", "unknown_command")
        assert no_method["code"] == "unknown_method"
        assert never["error"] == "AbortError"
        progress = await program.wait_for("progress")
        assert progress and all({"remaining", "percent"} <= set(value) for value in progress)
        assert await program.wait_for("aborted") == {"error": "Error", "message": "enough"}
        await no_command_runs(server.port)
        program.tell("end")
        (lost, _) = await program.wait_for("lost")
        assert lost["code"] == "closed"
        assert (await program.wait_for("late"))["code"] == "closed"
        await program.ends()  # nothing of the client keeps Node alive
        assert [close.get("retryInMs") for close in program.all("close")] == [None]


async def no_command_runs(port: int) -> None:
    """Wait until the server says that no command runs: a cancelled one did not go on."""
    async with asyncio.timeout(DEADLINE_S), connect(ws_url(port, "127.0.0.1")) as connection:
        while True:
            await connection.send('{"method": "get_status", "id": 1}')
            status = json.loads(await connection.recv())
            if status["data"]["command"]["running"] == 0:
                return


async def test_karna_client_recovers_broadcasts_and_tells_of_gaps(
    node_dir: Path, karna_client_js: Path
) -> None:
    script = """
      const karna = start({ heartbeatMs: 150 });
      await told('end');
      karna.close();
      finish();
    """
    async with contextlib.AsyncExitStack() as stack:
        # The connection that is frozen below will not answer the server's close frame.
        async with serving(WebSocketManager(), port=0, close_timeout_s=0.2) as server:
            port = server.port
            wire = await stack.enter_async_context(Wire(port))
            program = await stack.enter_async_context(
                frontend_node(node_dir, KARNA_CLIENT + script, ws_url(wire.port), karna_client_js)
            )
            assert await program.wait_for("open") == {"resumed": False}
            await program.wait_for("status")  # brings the first offset, with no broadcast yet
            wire.cut()
            assert (await program.wait_for("close"))["retryInMs"] > 0
            for number in range(3):
                await notify(port, f"missed {number}")
            wire.mend()
            assert await program.wait_for("open") == {"resumed": True}
            await notify(port, "live")
            while (await program.wait_for("notification"))["message"] != "live":
                pass
            wire.freeze()  # nothing closes; the client must notice the silence by itself
            assert (await program.wait_for("close"))["code"] == 4000
            assert await program.wait_for("open") == {"resumed": True}
            await notify(port, "thawed")
            while (await program.wait_for("notification"))["message"] != "thawed":
                pass
        await program.wait_for("close")
        async with serving(WebSocketManager(), port=port):
            # Offsets of the earlier process are unknown to this one.
            gap = await program.wait_for("gap")
            assert gap["code"] == "history_gap"
            await program.wait_for("status")
            program.tell("end")
            await program.ends()
        messages = [notification["message"] for notification in program.all("notification")]
        assert messages == ["missed 0", "missed 1", "missed 2", "live", "thawed"]
        assert program.all("error") == []


async def test_karna_client_sends_the_token(node_dir: Path, karna_client_js: Path) -> None:
    script = """
      const refused = start({ token: 'wrong' });
      await new Promise((resolve) => refused.on('close', resolve));
      refused.close();
      const karna = start({ token: 'sesame & more' });
      say('outcome', await outcome(karna.command('echo in')));
      karna.close();
      finish();
    """
    async with (
        serving(WebSocketManager(), port=0, token="sesame & more") as server,
        frontend_node(
            node_dir, KARNA_CLIENT + script, ws_url(server.port), karna_client_js
        ) as program,
    ):
        outcome = await program.wait_for("outcome")
        assert outcome["value"]["result"] == "in"
        await program.ends()
        assert len(program.all("open")) == 1


# --- Chromium -------------------------------------------------------------------------------------

CHROMIUM = """
import { chromium } from 'playwright-core';
const browser = await chromium.launch({
  executablePath: process.argv[2],
  args: ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
    '--disable-background-networking', '--disable-component-update', '--disable-sync'],
});
const page = await browser.newPage();
page.setDefaultTimeout(10_000);
page.on('console', (m) => say('console', { type: m.type(), text: m.text() }));
page.on('pageerror', (error) => say('pageerror', String(error)));
"""


def chromium_path() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    needs("chromium")
    raise AssertionError("unreachable")


def complaints(program: Program) -> list[Any]:
    """Console errors, warnings and uncaught exceptions, but for one line that is no fault.

    StrictMode mounts, unmounts and mounts again: the first WebSocket is closed before it is open,
    which Chromium remarks on.
    """
    remarks = [line for line in program.all("console") if line["type"] in ("error", "warning")]
    known = "WebSocket is closed before the connection is established"
    return [line for line in remarks if known not in line["text"]] + program.all("pageerror")


async def test_karna_client_works_in_chromium(node_dir: Path, karna_client_js: Path) -> None:
    script = """
      import { readFileSync } from 'node:fs';
      import { createServer } from 'node:http';
      const module = readFileSync(process.argv[3]);
      // A page of another localhost port (Chromium keeps a page without a server off loopback).
      const web = createServer(({ url }, response) => {
        const type = url.endsWith('.js') ? 'text/javascript' : 'text/html';
        response.setHeader('Content-Type', type);
        const html = '<!doctype html><link rel="icon" href="data:,">';
        response.end(url.endsWith('.js') ? module : html);
      });
      await new Promise((resolve) => web.listen(0, '127.0.0.1', resolve));
      await page.goto(`http://localhost:${web.address().port}/`);
      const found = await page.evaluate(async (url) => {
        const { KarnaClient } = await import('/karna-client.js');
        const karna = new KarnaClient(url);
        const notified = new Promise((resolve) => karna.on('notification', resolve));
        const progress = [];
        const onProgress = (value) => progress.push(value);
        const counted = await karna.command('countdown 0.1', { onProgress });
        const stopped = await karna
          .command('countdown 60', { signal: AbortSignal.timeout(50) })
          .catch((error) => error.name);
        await karna.command('notify hello browser');
        const notification = await notified;
        const closed = new Promise((resolve) => karna.on('close', resolve));
        karna.close();
        return { counted, progress, stopped, notification, closed: await closed };
      }, url);
      say('found', found);
      await browser.close();
      web.close();
      finish();
    """
    async with (
        serving(WebSocketManager(), port=0) as server,
        frontend_node(
            node_dir, CHROMIUM + script, ws_url(server.port), chromium_path(), karna_client_js
        ) as program,
    ):
        found = await program.wait_for("found")
        assert found["counted"]["command"] == "countdown 0.1"
        assert "percent" in found["progress"][-1]
        assert found["stopped"] == "TimeoutError"
        assert found["notification"]["message"] == "hello browser"
        assert "retryInMs" not in found["closed"]
        await program.ends()
        assert complaints(program) == []


@pytest.fixture(scope="session")
def frontend_dir(node_dir: Path) -> Path:
    """examples/frontend beside its node_modules."""
    ignored = shutil.ignore_patterns("node_modules", "dist")
    shutil.copytree(FRONTEND, node_dir, dirs_exist_ok=True, ignore=ignored)
    return node_dir


async def test_frontend_type_checks_and_builds(frontend_dir: Path, tmp_path: Path) -> None:
    async with running("npm", "run", "check", cwd=frontend_dir) as check:
        await check.ends()
    build = ("node", "node_modules/vite/bin/vite.js", "build", "--outDir", tmp_path / "dist")
    async with running(*build, cwd=frontend_dir) as vite:
        await vite.ends()
    built = "".join(file.read_text() for file in (tmp_path / "dist" / "assets").glob("*.js"))
    assert "ws://localhost:8000/ws" in built  # the seed's address, unless told otherwise


def free_port(wanted: int) -> int:
    """This port if nobody listens on it, else another one."""
    for port in (wanted, 0):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)) as probe:
            return int(probe.getsockname()[1])
    raise AssertionError("no port to be had")


async def test_react_page_works_in_strict_mode_and_survives_restart(frontend_dir: Path) -> None:
    script = """
      const results = page.getByRole('region', { name: 'Results' });
      const notifications = page.getByRole('region', { name: 'Notifications' });
      const services = page.getByRole('list', { name: 'Services' });
      const enter = async (command) => {
        await page.getByLabel('Command').fill(command);
        await page.getByRole('button', { name: 'Run' }).click();
      };
      await page.goto(process.argv[3]);
      await page.getByText('connected', { exact: true }).waitFor();
      await services.getByText(/^command: /).waitFor();
      say('services', await services.getByRole('listitem').allInnerTexts());
      await told('commands');
      await enter('echo hello there');
      await results.locator('li', { hasText: 'echo hello there' }).locator('pre').waitFor();
      await enter('eccho');
      await results.getByRole('button', { name: 'echo' }).waitFor();
      await enter('countdown 0.5');
      await page.locator('.progress').waitFor();
      await results.locator('li', { hasText: 'countdown 0.5' }).waitFor();
      await page.locator('.progress').waitFor({ state: 'detached' });
      say('results', await results.getByRole('listitem').allInnerTexts());
      await notifications.getByText('hello page').waitFor();
      say('notified');
      await page.getByText('not connected', { exact: true }).waitFor();
      say('away', await page.getByRole('button', { name: 'Run' }).isDisabled());
      await page.getByText('connected', { exact: true }).waitFor();
      say('back');
      await enter('echo back again');
      await results.locator('li', { hasText: 'echo back again' }).waitFor();
      await notifications.getByText('hello once more').waitFor();
      say('recovered', await services.getByRole('listitem').allInnerTexts());
      await told('end');
      await browser.close();
      finish();
    """
    async with contextlib.AsyncExitStack() as stack:
        async with serving(WebSocketManager(), port=0) as server:
            port = server.port
            wire = await stack.enter_async_context(Wire(port))
            page_url = await stack.enter_async_context(
                vite_dev_server(frontend_dir, free_port(5173), wire)
            )
            arguments = (ws_url(wire.port), chromium_path(), page_url)
            program = await stack.enter_async_context(
                frontend_node(frontend_dir, CHROMIUM + script, *arguments)
            )
            services = await program.wait_for("services")
            assert {"vision", "language", "command"} <= {line.split(":")[0] for line in services}
            await wire.carries(1)  # StrictMode's first mount left nothing behind
            program.tell("commands")
            results = await program.wait_for("results")
            assert "hello there" in results[-1] and len(results) == 3
            await notify(port, "hello page")
            await program.wait_for("notified")
            assert complaints(program) == []

        assert await program.wait_for("away") is True
        async with serving(WebSocketManager(), port=port):
            await program.wait_for("back")
            await notify(port, "hello once more")
            assert len(await program.wait_for("recovered")) >= 3
            await wire.carries(1)
            program.tell("end")
            await program.ends()
        # Chromium itself remarks on every try to connect while the server was away.
        tried = "WebSocket connection to"
        assert [line for line in complaints(program) if tried not in str(line)] == []


@contextlib.asynccontextmanager
async def vite_dev_server(folder: Path, port: int, wire: Wire) -> AsyncIterator[str]:
    """Serve the page in development mode; gives its address."""
    command = ("node", "node_modules/vite/bin/vite.js", "--port", str(port), "--strictPort")
    async with running(*command, cwd=folder, VITE_KARNA_URL=ws_url(wire.port)) as vite:
        await vite.wait_for_line("Local")
        yield f"http://localhost:{port}/"


# --- the two example scripts ----------------------------------------------------------------------


async def test_client_mjs_uses_both_doors(node_dir: Path, tmp_path: Path) -> None:
    shutil.copy(EXAMPLES / "client.mjs", tmp_path)
    (tmp_path / "node_modules").symlink_to(node_dir / "node_modules")
    async with (
        serving(WebSocketManager(), port=0, token="sesame") as server,
        running(
            "node", "client.mjs", ws_url(server.port), cwd=tmp_path, KARNA_TOKEN="sesame"
        ) as program,
    ):
        await program.ends()
        lines = "\n".join(program.all("line"))
        for expected in (
            r"raw: command is \w+",
            r"raw: countdown 1 reports ",
            r"raw: echo hello -> hello",
            r"raw: refused with unknown_command: ",
            r"socket\.io: echo hello -> hello",
            r"socket\.io: describe -> .*png",
            r"socket\.io: notification: Hello from Node",
        ):
            assert re.search(expected, lines, re.DOTALL), f"no {expected} in:\n{lines}"


async def test_client_py_runs_commands_at_the_same_time() -> None:
    commands = ("countdown 0.3", "echo hello", "eccho")
    async with serving(WebSocketManager(), port=0) as server:
        url = ws_url(server.port)
        async with running(
            sys.executable, EXAMPLES / "client.py", "--url", url, *commands
        ) as program:
            await program.ends()
        lines = program.all("line")
        assert 'echo hello -> "hello"' in lines
        assert any(line.startswith("eccho -> unknown_command: ") for line in lines)
        assert any(line.startswith("countdown 0.3: {") and "percent" in line for line in lines)
        assert lines[-1].startswith("countdown 0.3 -> ")  # the slow one held up nobody


async def test_client_py_recovers_broadcasts_over_network_cut() -> None:
    async with (
        serving(WebSocketManager(), port=0, token="sesame") as server,
        Wire(server.port) as wire,
        running(
            sys.executable, EXAMPLES / "client.py", "--url", ws_url(wire.port), KARNA_TOKEN="sesame"
        ) as program,
    ):
        await program.wait_for_line("status: ")
        wire.cut()
        await program.wait_for_line("not connected: ")
        async with connect(f"{ws_url(server.port)}?token=sesame") as other:
            for number in range(3):
                line = f"notify missed {number}"
                request = {"method": "execute_command", "params": {"command": line}, "id": number}
                await other.send(json.dumps(request))
                while json.loads(await other.recv()).get("id") != number:
                    pass
        wire.mend()
        await program.wait_for_line("connected again")
        await program.wait_for_line("missed 2")
        told = [line for line in program.all("line") if line.startswith("notification: ")]
        assert told == [f"notification: missed {number}" for number in range(3)]


async def test_client_py_tells_why_it_was_refused() -> None:
    async with serving(WebSocketManager(), port=0, token="sesame") as server:
        url = ws_url(server.port)
        async with running(sys.executable, EXAMPLES / "client.py", "--url", url) as program:
            await program.wait_for_line("token")
            await program.ends(code=1)


# --- console page and examples ----------------------------------------------------------------

CONSOLE_HERE = Path(sys.modules["karna_ws"].__file__ or "").resolve().parent
CHROMIUM_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-sync", "--disable-background-networking", "--disable-component-update",
    "--remote-debugging-port=0",
]  # fmt: skip


# ---- a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def chromium() -> Iterator[str]:
    """One Chromium for all tests of the page; gives its DevTools address."""
    needs("chromium")
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        subprocess.Popen(
            ["chromium", *CHROMIUM_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        ) as process,
    ):  # fmt: skip
        lines = iter(process.stderr or ())
        # Drained for as long as it runs, or the browser would stop at a full pipe.
        drain = threading.Thread(target=lambda: list(lines))
        killer = threading.Timer(30, process.kill)
        killer.start()
        try:
            found = (re.search(r"DevTools listening on (\S+)", line) for line in lines)
            address = next((match[1] for match in found if match), None)
            killer.cancel()
            drain.start()
            assert address, "Chromium ended before it listened"
            yield address
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            drain.join()


KEYS = {
    "Enter": (13, "\r"), "Tab": (9, ""), "Escape": (27, ""), "ArrowUp": (38, ""),
    "ArrowDown": (40, ""), "Space": (32, " "),
}  # fmt: skip

# Resolves once an expression is true, looked at after every change of the document.
UNTIL = """new Promise((resolve) => {
  const look = () => { const value = (%s); if (value) { observer.disconnect(); resolve(value); } };
  const observer = new MutationObserver(look);
  const all = { subtree: true, childList: true, attributes: true, characterData: true };
  observer.observe(document, all);
  look();
})"""


class Page:
    """A tab of its own (own storage) and what a person can do with it."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.session = ""
        self.context = ""
        self.problems: list[str] = []  # console errors, exceptions, violations of the CSP
        self.answers: dict[int, asyncio.Future[Any]] = {}
        self.choosers: asyncio.Queue[int] = asyncio.Queue()
        self.loaded = asyncio.Event()

    async def read(self) -> None:
        async for text in self.socket:
            message = json.loads(text)
            if "id" in message:
                self.answers.pop(message["id"]).set_result(message)
            else:
                self.note(message["method"], message["params"])

    def note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.problems.append(json.dumps(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif method == "Audits.issueAdded":
            if params["issue"]["code"] == "ContentSecurityPolicyIssue":
                self.problems.append(json.dumps(params["issue"]))
        elif method == "Page.loadEventFired":
            self.loaded.set()
        elif method == "Page.fileChooserOpened":
            self.choosers.put_nowait(params["backendNodeId"])

    async def call(self, method: str, **params: Any) -> Any:
        number = len(self.answers) + random.getrandbits(30)
        self.answers[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        future = self.answers[number]
        await self.socket.send(json.dumps(message))
        answer = await asyncio.wait_for(future, DEADLINE_S)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    async def open(self, url: str, **look: Any) -> None:
        """Make the tab and load the page; `look` may give width, height, scheme."""
        self.context = (await self.call("Target.createBrowserContext"))["browserContextId"]
        made = await self.call(
            "Target.createTarget", url="about:blank", browserContextId=self.context
        )
        attached = await self.call("Target.attachToTarget", targetId=made["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM", "Accessibility", "Audits"):
            await self.call(f"{domain}.enable")
        await self.call("Emulation.setFocusEmulationEnabled", enabled=True)
        await self.look(**look)
        await self.load("Page.navigate", url=url)

    async def close(self) -> None:
        self.session = ""
        await self.call("Target.disposeBrowserContext", browserContextId=self.context)

    async def load(self, method: str = "Page.reload", **params: Any) -> None:
        self.loaded.clear()
        await self.call(method, **params)
        await asyncio.wait_for(self.loaded.wait(), DEADLINE_S)

    async def look(self, width: int = 1200, height: int = 760, scheme: str = "light") -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 500,
        )  # fmt: skip
        feature = {"name": "prefers-color-scheme", "value": scheme}
        await self.call("Emulation.setEmulatedMedia", features=[feature])

    async def evaluate(self, expression: str) -> Any:
        answer = await self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, expression: str) -> Any:
        """Wait until the expression is true; give its value."""
        try:
            return await self.evaluate(UNTIL % expression)
        except TimeoutError:
            text = await self.evaluate("document.body.innerText")
            raise AssertionError(f"never true: {expression}\n{text}") from None

    async def until_open(self) -> None:
        await self.until("$('link').dataset.state === 'open'")
        await self.until("$('prompt').dataset.commands")

    async def until_log(self, words: str) -> str:
        """Wait for a line of the broadcasts with these words; give all of its text."""
        found = "[...document.querySelectorAll('#log li')].map((li) => li.textContent)"
        return str(await self.until(f"{found}.find((text) => text.includes({json.dumps(words)}))"))

    async def until_entry(self, line: str, state: str) -> str:
        """Wait for the last run of a command to reach a state; give its text."""
        runs = "[...document.querySelectorAll('.entry')]"
        runs += f".filter((entry) => entry.ariaLabel === {json.dumps(line)})"
        is_there = f"{runs}.at(-1)?.dataset.state === {json.dumps(state)}"
        return str(await self.until(f"{is_there} && {runs}.at(-1).innerText"))

    async def node(self, role: str, name: str) -> int:
        """The element that assistive technology would find by this role and name."""
        root = (await self.call("DOM.getDocument", depth=0))["root"]["nodeId"]
        found = await self.call(
            "Accessibility.queryAXTree", nodeId=root, accessibleName=name, role=role
        )
        shown = [node for node in found["nodes"] if not node["ignored"]]
        assert shown, f"no {role} named {name!r}"
        return int(shown[-1]["backendDOMNodeId"])

    async def centre(self, node: int) -> tuple[float, float]:
        await self.call("DOM.scrollIntoViewIfNeeded", backendNodeId=node)
        quad = (await self.call("DOM.getContentQuads", backendNodeId=node))["quads"][0]
        return (quad[0] + quad[4]) / 2, (quad[1] + quad[5]) / 2

    async def click(self, role: str, name: str) -> None:
        x, y = await self.centre(await self.node(role, name))
        for kind in ("mousePressed", "mouseReleased"):
            await self.call(
                "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1
            )

    async def press(self, key: str, *, shift: bool = False) -> None:
        code, text = KEYS[key]
        shared = {"key": key if key != "Space" else " ", "code": key, "modifiers": 8 * shift}
        shared |= {"windowsVirtualKeyCode": code}
        down = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
        await self.call("Input.dispatchKeyEvent", **shared, **down)
        await self.call("Input.dispatchKeyEvent", **shared, type="keyUp")

    async def type(self, text: str) -> None:
        await self.call("Input.insertText", text=text)

    async def run(self, line: str) -> None:
        await self.evaluate("$('line').focus()")
        await self.type(line)
        await self.press("Enter")

    async def drop(self, path: Path) -> None:
        x, y = await self.centre(await self.node("region", "Commands and results"))
        data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            await self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    async def screenshot(self, name: str) -> bytes:
        """A PNG of what is seen; kept where KARNA_SCREENSHOTS names a directory."""
        shot = b64decode((await self.call("Page.captureScreenshot", format="png"))["data"])
        if directory := os.environ.get("KARNA_SCREENSHOTS"):
            await asyncio.to_thread(Path(directory, name).write_bytes, shot)
        return shot


@contextlib.asynccontextmanager
async def tab(chromium: str, port: int, path: str = "/", **look: Any) -> AsyncIterator[Page]:
    async with connect(chromium, max_size=None) as socket:
        page = Page(socket)
        reader = asyncio.create_task(page.read())
        try:
            await page.open(f"http://localhost:{port}{path}", **look)
            yield page
        finally:
            await page.close()
            reader.cancel()


# ---- a server with something to see ------------------------------------------------------------


class Host:
    """A manager with commands whose steps the test decides, and a service it can break."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.lock = Service("lock")
        self.commands = CommandProcessor()
        for function in (self.steps, self.tokens, self.lines, self.report, self.picture):
            self.commands.command(function)
        self.manager = WebSocketManager(commands=self.commands, services=[self.lock])

    async def steps(self) -> AsyncIterator[Any]:
        """Report a part, then wait."""
        try:
            yield {"percent": 40, "done": 2}
            await self.go_on.wait()
            yield {"percent": 100}
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise

    async def tokens(self) -> AsyncIterator[Any]:
        """Answer word by word."""
        for token in ("The ", "quick ", "fox"):
            yield {"token": token}
        yield {"text": "The quick fox"}

    async def lines(self) -> AsyncIterator[Any]:
        """Give many lines."""
        for number in range(600):
            yield {"line": f"line {number}"}
        yield {"exit": 0}

    def report(self) -> Any:
        """Give a nested value."""
        return {"title": "<b>bold</b>", "list": list(range(450)), "empty": None, "deep": {"x": [1]}}

    def picture(self) -> str:
        """Give an image."""
        return as_url(console_png(4, 3))


def console_png(width: int, height: int, *, noise: bool = False) -> bytes:
    """An RGB image, grey or of noise that no compression makes small."""
    row = 3 * width
    rows = (b"\0" + (random.randbytes(row) if noise else b"\x80" * row) for _ in range(height))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(b"".join(rows), 1)), (b"IEND", b"")]
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def as_url(image: bytes) -> str:
    return "data:image/png;base64," + b64encode(image).decode()


async def console_post(port: int, path: str, body: Any) -> tuple[int, Any]:
    """POST JSON as any HTTP client of another program would."""
    request = Request(
        f"http://localhost:{port}{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )

    def fetch() -> tuple[int, Any]:
        with urlopen(request, timeout=DEADLINE_S) as response:
            return response.status, json.load(response)

    return await asyncio.to_thread(fetch)


class Cable:
    """A TCP connection to the server that can be cut and mended, on one port."""

    def __init__(self, target: int) -> None:
        self.target, self.port = target, 0
        self.server: asyncio.Server | None = None
        self.writers: set[asyncio.StreamWriter] = set()

    async def mend(self) -> None:
        self.server = await asyncio.start_server(self.join, "127.0.0.1", self.port)
        self.port = self.server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        if self.server:
            self.server.close()
        for writer in list(self.writers):
            writer.transport.abort()

    async def join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        self.writers |= {writer, far_writer}
        await asyncio.gather(self.pump(reader, far_writer), self.pump(far_reader, writer))
        self.writers -= {writer, far_writer}

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()


# ---- the page ----------------------------------------------------------------------------------


async def test_page_runs_commands_and_shows_their_results(chromium: str) -> None:
    async with serving(Host().manager, port=0) as server, tab(chromium, server.port) as page:
        await page.until_open()
        await page.run("echo hello <b>world</b>")
        assert "hello <b>world</b>" in await page.until_entry("echo hello <b>world</b>", "done")
        await page.run("help")
        assert "countdown SECONDS" in await page.until_entry("help", "done")
        await page.run("tokens")
        text = await page.until_entry("tokens", "done")
        assert text.count("The quick fox") == 1  # streamed, and not shown again as the result
        await page.run("lines")
        await page.until_entry("lines", "done")
        lines = "[...document.querySelectorAll('.lines pre')].map((pre) => pre.innerText)"
        assert (await page.evaluate(lines)) == [f"line {n}" for n in range(100, 600)]
        await page.run("picture")
        await page.until_entry("picture", "done")
        assert await page.until("document.querySelector('.result img')?.naturalWidth === 4")
        assert page.problems == []


async def test_page_folds_large_values(chromium: str) -> None:
    async with serving(Host().manager, port=0) as server, tab(chromium, server.port) as page:
        await page.until_open()
        await page.run("report")
        text = await page.until_entry("report", "done")
        assert '"<b>bold</b>"' in text and '{ "x": [ 1 ] }' in text
        assert "list: [450 items]" in text and "199: 199" not in text
        await page.click("DisclosureTriangle", "list: [450 items]")
        await page.until("document.querySelector('.tree').innerText.includes('199: 199')")
        assert await page.evaluate(
            "!document.querySelector('.tree').innerText.includes('200: 200')"
        )
        await page.click("button", "show 200 more of 250")
        await page.click("button", "show 50 more of 50")
        await page.until("document.querySelector('.tree').innerText.includes('449')")
        assert page.problems == []


async def test_page_helps_after_a_mistake(chromium: str) -> None:
    async with serving(Host().manager, port=0) as server, tab(chromium, server.port) as page:
        await page.until_open()
        await page.run("ecoh hi")
        assert "unknown_command" in await page.until_entry("ecoh hi", "error")
        await page.click("button", "echo")
        assert await page.evaluate("$('line').value") == "echo "
        await page.run("countdown soon")  # after the "echo " that the button put there
        assert "soon" in await page.until_entry("echo countdown soon", "done")
        await page.run("countdown soon")
        assert "countdown SECONDS" in await page.until_entry("countdown soon", "error")


async def test_page_shows_progress_and_cancels(chromium: str) -> None:
    host = Host()
    async with serving(host.manager, port=0) as server, tab(chromium, server.port) as page:
        await page.until_open()
        await page.run("steps")
        await page.until("document.querySelector('progress')?.value === 40")
        assert "40 % · done 2" in await page.until_entry("steps", "running")
        await page.click("button", "Cancel steps")
        await page.until_entry("steps", "cancelled")
        await asyncio.wait_for(host.cancelled.wait(), DEADLINE_S)

        await page.run("steps")
        await page.until_entry("steps", "running")
        await page.press("Escape")
        await page.until_entry("steps", "cancelled")

        await page.run("steps")
        await page.until("document.querySelector('progress')?.value === 40")
        host.go_on.set()
        await page.until_entry("steps", "done")
        assert await page.evaluate("document.querySelectorAll('progress').length") == 0
        assert page.problems == []


async def test_page_logs_notifications_of_other_programs(chromium: str) -> None:
    async with serving(Host().manager, port=0) as server, tab(chromium, server.port) as page:
        await page.until_open()
        hostile = "<img src=x onerror=alert(1)><script>alert(2)</script>"
        assert (
            await console_post(server.port, "/api/notify", {"message": hostile, "level": "warning"})
        )[0] == 202
        text = await page.until_log(hostile)
        assert text.split("\n")[0][:2].isdigit() and "Warning" in text
        assert await page.evaluate("document.querySelectorAll('#log img, #log script').length") == 0
        await page.click("textbox", "Message")
        await page.type("tea is ready")
        await page.press("Enter")
        await page.until_log("tea is ready")
        await page.until(
            "document.querySelector('#notify [role=status]').innerText === 'Sent to 1 client.'"
        )
        await page.evaluate("$('least').value = 'warning'; $('least').onchange()")
        shown = "[...document.querySelectorAll('#log li')].filter((li) => li.offsetHeight).length"
        assert await page.evaluate(shown) == 1
        assert page.problems == []


async def test_page_keeps_last_500_broadcasts(chromium: str) -> None:
    host = Host()
    async with serving(host.manager, port=0) as server, tab(chromium, server.port) as page:
        await page.until_open()
        for number in range(600):
            host.manager.notify(f"number {number}.")
        await page.until_log("number 599.")
        texts = await page.evaluate(
            "[...document.querySelectorAll('#log .what')].map((e) => e.innerText)"
        )
        assert texts == [f"number {number}." for number in range(100, 600)]


async def test_badge_follows_service(chromium: str) -> None:
    host = Host()
    async with serving(host.manager, port=0) as server, tab(chromium, server.port) as page:
        await page.until_open()
        row = "document.querySelector('[data-name=lock]')"
        await page.until(f"{row}.querySelector('.badge').innerText === 'running'")
        host.lock.set_state("failed", "the bolt is stuck")
        await page.until(f"{row}.dataset.state === 'failed'")
        assert "the bolt is stuck" in await page.evaluate(f"{row}.innerText")
        assert "Error" in await page.until_log("lock is failed: the bolt is stuck")
        host.lock.set_state("running")
        await page.until(f"{row}.querySelector('.badge').innerText === 'running'")
        await page.until_log("lock is running")


async def test_page_gets_missed_messages_after_a_cut(chromium: str) -> None:
    host = Host()
    async with serving(host.manager, port=0) as server:
        cable = Cable(server.port)
        await cable.mend()
        async with tab(chromium, cable.port) as page:
            await page.until_open()
            host.manager.notify("before the cut")
            await page.until_log("before the cut")
            await page.run("steps")
            await page.until("document.querySelector('progress')?.value === 40")
            cable.cut()
            await page.until_log("Connection lost.")
            await page.until_entry("steps", "lost")
            await page.until("$('link-wait').innerText.includes('trying again in')")
            for number in range(3):
                host.manager.notify(f"missed {number}")
            await cable.mend()
            await page.click("button", "Connect now")
            await page.until_open()
            await page.until_log("Reconnected. 3 missed messages came back.")
            missed = (
                "[...document.querySelectorAll('#log .missed')].map((e) => e.parentNode.innerText)"
            )
            assert [text.split("\n")[0][:8] for text in await page.evaluate(missed)] == [
                "missed 0",
                "missed 1",
                "missed 2",
            ]
            assert "3 missed messages" in await page.evaluate("$('say').innerText")
            texts = await page.evaluate("$('log').innerText")
            assert texts.count("before the cut") == 1
        cable.cut()


async def test_page_recovers_from_restart_of_server(chromium: str) -> None:
    async with serving(Host().manager, port=0) as server:
        port = server.port
        context = tab(chromium, port)
        page = await context.__aenter__()
        try:
            await page.until_open()
            await console_post(port, "/api/notify", {"message": "first life"})
            await page.until_log("first life")
            await server.close()
            await page.until("$('link').dataset.state === 'waiting'")
            await page.until_log("Connection lost")
            second = Host()
            async with serving(second.manager, port=port):
                await page.until_open()  # by itself
                await page.until_log(
                    "Reconnected. The server no longer has what was sent in between."
                )
                second.manager.notify("second life")
                await page.until_log("second life")
                await page.run("echo again")
                await page.until_entry("echo again", "done")
        finally:
            await context.__aexit__(None, None, None)


async def test_page_asks_for_token_and_keeps_it_for_the_tab(chromium: str) -> None:
    host = Host()
    async with (
        serving(host.manager, port=0, token="sesame seed") as server,
        tab(chromium, server.port) as page,
    ):
        await page.until("$('ask').open")
        assert await page.evaluate("document.activeElement.type") == "password"
        await page.type("wrong")
        await page.press("Enter")
        await page.until("$('ask-why').innerText.includes('did not accept')")
        await page.until("$('ask').open")
        await page.type("sesame seed")
        await page.press("Enter")
        await page.until_open()
        assert not await page.evaluate("$('ask').open")
        await page.click("textbox", "Message")  # the token goes with HTTP too
        await page.type("with a token")
        await page.press("Enter")
        await page.until_log("with a token")
        await page.load()
        await page.until_open()
        assert await page.evaluate("localStorage.length") == 0
        await page.click("button", "Forget token")
        await page.until("$('ask').open")
        assert await page.evaluate("sessionStorage.getItem('karna-token')") is None
        await page.press("Escape")
        await page.until("!$('ask').open")
        await page.click("button", "Connect now")
        await page.until("$('ask').open")


async def test_page_takes_token_from_fragment(chromium: str) -> None:
    async with (
        serving(Host().manager, port=0, token="s3same") as server,
        tab(chromium, server.port, "/#token=s3same") as page,
    ):
        await page.until_open()
        assert await page.evaluate("location.hash") == ""
        assert page.problems == []


async def test_image_is_dropped_chosen_or_pasted_for_describe(
    chromium: str, tmp_path: Path
) -> None:
    small = tmp_path / "small.png"
    small.write_bytes(console_png(5, 4))
    async with serving(Host().manager, port=0) as server, tab(chromium, server.port) as page:
        await page.until_open()
        await page.drop(small)
        await page.until("!$('picture').hidden")
        assert "small.png" in await page.evaluate("$('picture').innerText")
        assert await page.evaluate("$('line').value") == "describe"
        await page.press("Enter")
        text = await page.until_entry("describe", "done")
        assert re.search(r"width: 5\b", text) and re.search(r"height: 4\b", text)
        assert await page.evaluate("$('picture').hidden")

        await page.call("Page.setInterceptFileChooserDialog", enabled=True)
        await page.click("button", "Attach an image")
        node = await asyncio.wait_for(page.choosers.get(), DEADLINE_S)
        await page.call("DOM.setFileInputFiles", files=[str(small)], backendNodeId=node)
        await page.until("!$('picture').hidden")
        await page.click("button", "Remove image")
        await page.until("$('picture').hidden")

        paste = (
            "const bytes = Uint8Array.from(atob('%s'), (c) => c.charCodeAt(0));"
            "const data = new DataTransfer();"
            "data.items.add(new File([bytes], '', {type: 'image/png'}));"
            "const all = {clipboardData: data, bubbles: true, cancelable: true};"
            "$('line').dispatchEvent(new ClipboardEvent('paste', all)); 0"
        )
        await page.evaluate(paste % b64encode(console_png(9, 2)).decode())
        await page.until("$('picture').innerText.includes('Pasted image')")
        await page.press("Enter")
        await page.until("document.querySelectorAll('.entry[data-state=done]').length === 2")
        assert re.search(r"width: 9\b", await page.until_entry("describe", "done"))
        assert page.problems == []


async def test_image_over_the_limit_is_made_smaller(chromium: str, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    large.write_bytes(console_png(800, 600, noise=True))
    assert large.stat().st_size > 1_400_000
    async with serving(Host().manager, port=0) as server, tab(chromium, server.port) as page:
        await page.until_open()
        await page.drop(large)
        await page.until("$('picture').innerText.includes('sent as JPEG')")
        await page.press("Enter")
        assert "jpeg" in await page.until_entry("describe", "done")


async def test_page_works_by_keyboard_alone(chromium: str) -> None:
    async with serving(Host().manager, port=0) as server, tab(chromium, server.port) as page:
        await page.until_open()
        value = "$('line').value"
        assert await page.evaluate("document.activeElement.id") == "line"
        await page.type("cou")
        options = "[...document.querySelectorAll('[role=option] code')].map((e) => e.innerText)"
        assert await page.evaluate(options) == ["countdown"]
        await page.press("Tab")
        assert await page.evaluate(value) == "countdown "
        assert await page.evaluate("document.querySelector('#usage .here').innerText") == "SECONDS"
        await page.type("0")
        await page.press("Enter")
        await page.until_entry("countdown 0", "done")

        await page.type("notify hi --")  # options and choices complete too
        await page.press("Tab")
        assert await page.evaluate(value) == "notify hi --level "
        await page.press("ArrowDown")
        await page.press("ArrowDown")
        chosen = "$($('line').getAttribute('aria-activedescendant')).innerText.trim()"
        assert await page.evaluate(chosen) == "warning"
        await page.press("Enter")
        assert await page.evaluate(value) == "notify hi --level warning "
        await page.press("Enter")
        await page.until_log("hi")

        await page.press("ArrowUp")
        assert await page.evaluate(value) == "notify hi --level warning"
        await page.press("ArrowUp")
        assert await page.evaluate(value) == "countdown 0"
        await page.press("ArrowDown")
        await page.press("ArrowDown")
        assert await page.evaluate(value) == ""

        seen = []
        for _ in range(30):  # Tab leaves the prompt when it has nothing to complete
            await page.press("Tab")
            seen.append(
                await page.evaluate(
                    "document.activeElement.ariaLabel || document.activeElement.innerText"
                )
            )
            if seen[-1] == "Message":
                break
        assert seen[-1] == "Message" and "Broadcasts" in seen
        await page.type("by keyboard")
        await page.press("Enter")
        await page.until_log("by keyboard")
        assert page.problems == []


async def test_page_has_names_for_assistive_technology(chromium: str) -> None:
    async with serving(Host().manager, port=0) as server, tab(chromium, server.port) as page:
        await page.until_open()
        nodes = (await page.call("Accessibility.getFullAXTree"))["nodes"]
        roles = ("button", "textbox", "combobox", "log", "region", "listbox", "img")
        unnamed = [
            node
            for node in nodes
            if not node["ignored"] and node["role"]["value"] in roles
            and not node.get("name", {}).get("value")
        ]  # fmt: skip
        assert unnamed == []
        live = "[...document.querySelectorAll('[role=status], [role=log]')].length"
        assert await page.evaluate(live) == 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_page_is_readable_in(chromium: str, scheme: str) -> None:
    contrast = """(() => {
      const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
      const light = (color) => {
        canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((c) => c / 255)
          .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const behind = (e) => { for (; e; e = e.parentElement) {
        const color = getComputedStyle(e).backgroundColor;
        if (color !== 'rgba(0, 0, 0, 0)') return color; } };
      const poor = [];
      for (const e of document.querySelectorAll('body *')) {
        const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
        if (!own || !e.offsetHeight || e.disabled) continue;
        const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort().reverse();
        const [high, low] = a > b ? [a, b] : [b, a];
        const ratio = (high + 0.05) / (low + 0.05);
        if (ratio < 4.5) poor.push(`${e.innerText.slice(0, 30)} ${ratio.toFixed(1)}`);
      }
      return poor; })()"""
    host = Host()
    async with (
        serving(host.manager, port=0) as server,
        tab(chromium, server.port, scheme=scheme) as page,
    ):
        await page.until_open()
        host.lock.set_state("degraded", "slow")
        for level in ("info", "warning", "error"):
            host.manager.notify(f"a notification of level {level}", level=level)
        for line in ("help", "report", "ecoh"):
            await page.run(line)
        await page.until_entry("ecoh", "error")
        await page.run("steps")
        await page.until("document.querySelector('progress')?.value === 40")
        await page.until_log("level error")
        assert await page.evaluate(contrast) == []
        bright = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", bright)[:3])) > 380) == (scheme == "light")
        assert (await page.screenshot(f"{scheme}.png")).startswith(b"\x89PNG")
        await page.click("button", "Theme: system")
        other = "Theme: dark" if scheme == "light" else "Theme: light"
        while await page.evaluate("$('theme').innerText") != other:
            await page.press("Enter")
        assert await page.evaluate("getComputedStyle(document.body).backgroundColor") != bright
        await page.load()
        await page.until_open()
        assert await page.evaluate("$('theme').innerText") == other
        assert page.problems == []


async def test_page_fits_narrow_screen(chromium: str) -> None:
    host = Host()
    async with (
        serving(host.manager, port=0) as server,
        tab(chromium, server.port, width=360, height=740) as page,
    ):
        await page.until_open()
        host.manager.notify("a" * 200)
        for line in ("help", "report", "echo " + "w" * 300, "notify hi --level loud"):
            await page.run(line)
        await page.until_entry("notify hi --level loud", "error")
        await page.run("steps")
        await page.until("document.querySelector('progress')?.value === 40")
        assert await page.evaluate("document.documentElement.scrollWidth") == 360
        clipped = """[...document.querySelectorAll('button, input, select')]
            .filter((e) => e.offsetHeight && e.getBoundingClientRect().right
              > e.closest('.panel, header').getBoundingClientRect().right)
            .map((e) => e.innerText)"""
        assert await page.evaluate(clipped) == []
        await page.screenshot("narrow.png")


def test_page_is_one_file_of_its_own() -> None:
    text = (CONSOLE_HERE / "web" / "console.html").read_text()
    assert text.count("<script") == text.count("<style") == 1
    assert "<script>" in text and "<style>" in text
    for risky in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
    ):
        assert risky not in text
    markup = text[: text.index("<style>")] + text[text.index("</style>") : text.index("<script>")]
    assert not re.search(r"\s(style|on\w+)=|https?://(?!www\.w3\.org/2000/svg)", markup)


# ---- examples ----------------------------------------------------------------------------------


async def rpc(ws: ClientConnection, method: str, params: dict[str, Any], wanted: str) -> Any:
    """Send a request; give the data of the next message of the wanted type."""
    await ws.send(json.dumps({"method": method, "params": params, "id": 1}))
    return await data_of(ws, wanted)


async def data_of(ws: ClientConnection, wanted: str, test: Any = None) -> Any:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            message = json.loads(await ws.recv())
            assert message["type"] == wanted or message["type"] != "error", message
            if message["type"] == wanted and (test is None or test(message["data"])):
                return message["data"]


@contextlib.asynccontextmanager
async def program(*words: str, ready: str, **options: Any) -> AsyncIterator[re.Match[str]]:
    """Run a program until a line of its output matches `ready`; stop it at the end."""
    process = await asyncio.create_subprocess_exec(
        *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, **options
    )
    assert process.stdout
    seen = []
    try:
        async with asyncio.timeout(DEADLINE_S):
            async for line in process.stdout:
                seen.append(line.decode())
                if match := re.search(ready, seen[-1]):
                    break
            else:
                raise AssertionError(f"{words[0]} ended: {''.join(seen)}")
        yield match
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.communicate()


async def test_lights_example_runs() -> None:
    lights = str(CONSOLE_HERE / "examples" / "lights.py")
    words = (sys.executable, lights, "--port", "0", "--left-on", "0.2")
    async with (
        program(*words, ready=r"localhost:(\d+)") as match,
        connect(f"ws://localhost:{match[1]}/ws") as ws,
    ):
        answer = await rpc(ws, "execute_command", {"command": "light porch on"}, "command_response")
        assert answer["result"]["porch"] == 100
        assert (await rpc(ws, "lights", {}, "command_response"))["porch"] == 100
        notice = await data_of(ws, "notification")
        assert notice["level"] == "warning" and "porch" in notice["message"]
        command = {"command": "sunrise hall --seconds 0.1"}
        progress = await rpc(ws, "execute_command", command, "command_progress")
        assert progress["progress"] == {"percent": 0, "lamp": "hall"}
        assert (await data_of(ws, "command_response"))["result"]["percent"] == 100
        await rpc(ws, "execute_command", {"command": "bus unplug"}, "command_response")
        status = await rpc(ws, "get_status", {}, "status_update")
        assert (status["bus"]["state"], status["bus"]["detail"]) == ("degraded", "unplugged")
        error = await rpc(ws, "execute_command", {"command": "light hall off"}, "error")
        assert error["code"] == "unavailable"
        await rpc(ws, "execute_command", {"command": "bus plug"}, "command_response")
        status = await rpc(ws, "get_status", {}, "status_update")
        assert status["bus"]["state"] == "running"


async def try_behind_proxy(port: int) -> None:
    """Page, socket, Socket.IO and HTTP through a proxy, by the name that the proxy serves."""
    name = "karna.example.org"
    request = Request(
        f"http://127.0.0.1:{port}/api/status",
        headers={"Host": name, "Authorization": "Bearer t0ken"},
    )
    with await asyncio.to_thread(urlopen, request, timeout=DEADLINE_S) as response:
        assert json.load(response)["command"]["state"] == "running"
    page = Request(f"http://127.0.0.1:{port}/", headers={"Host": name})
    with await asyncio.to_thread(urlopen, page, timeout=DEADLINE_S) as response:
        assert b"Karna WS" in response.read()
    way: dict[str, Any] = {"host": "127.0.0.1", "port": port, "origin": f"http://{name}"}
    async with connect(f"ws://{name}/ws?token=t0ken", **way) as ws:
        answer = await rpc(ws, "execute_command", {"command": "echo through"}, "command_response")
        assert answer["result"] == "through"
    async with connect(f"ws://{name}/socket.io/?EIO=4&transport=websocket", **way) as ws:
        assert str(await ws.recv()).startswith("0{")


async def test_nginx_example_proxies(tmp_path: Path) -> None:
    needs("nginx")
    # nginx takes over a socket that listens already, so there is nothing to wait for.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        port = listener.getsockname()[1]
        host = Host()
        async with serving(
            host.manager, port=0, token="t0ken", allow_host=("karna.example.org",)
        ) as server:
            site = (CONSOLE_HERE / "examples" / "nginx.conf").read_text()
            changes = {
                "listen 80;": f"listen 127.0.0.1:{port};",
                "127.0.0.1:8000": f"127.0.0.1:{server.port}",
                "/var/log/nginx/karna.log": f"{tmp_path}/access.log",
            }
            for old, new in changes.items():
                assert site.count(old) == 1
                site = site.replace(old, new)
            paths = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
            temporary = "".join(f"{path}_temp_path {tmp_path}/{path};" for path in paths)
            main = (
                f"daemon off; worker_processes 1; pid {tmp_path}/pid; error_log stderr notice;"
                f"events {{}} http {{ {temporary} {site} }}"
            )
            (tmp_path / "nginx.conf").write_text(main)
            words = ("nginx", "-e", "stderr", "-c", str(tmp_path / "nginx.conf"))
            inherited = {
                "pass_fds": (listener.fileno(),),
                "env": {**os.environ, "NGINX": f"{listener.fileno()};"},
            }
            async with program(*words, ready="using inherited sockets", **inherited):
                await try_behind_proxy(port)
    log = (tmp_path / "access.log").read_text()
    assert '"GET /ws" 101' in log and "t0ken" not in log


async def test_caddy_example_proxies(tmp_path: Path) -> None:
    needs("caddy")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    host = Host()
    async with serving(
        host.manager, port=0, token="t0ken", allow_host=("karna.example.org",)
    ) as server:
        site = (CONSOLE_HERE / "examples" / "Caddyfile").read_text()
        site = site.replace("karna.example.org {", f"http://karna.example.org:{port} {{")
        site = site.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
        (tmp_path / "Caddyfile").write_text("{\n\tadmin off\n}\n" + site)
        words = ("caddy", "run", "--config", str(tmp_path / "Caddyfile"), "--adapter", "caddyfile")
        home = {
            **os.environ,
            "HOME": str(tmp_path),
            "XDG_DATA_HOME": str(tmp_path),
            "XDG_CONFIG_HOME": str(tmp_path),
        }
        async with program(*words, ready="serving initial configuration", env=home):
            await try_behind_proxy(port)


def test_systemd_units_are_valid(tmp_path: Path) -> None:
    unit = (CONSOLE_HERE / "examples" / "karna.service").read_text()
    command = re.search(r"^ExecStart=(\S+) -m (\S+)$", unit, re.M)
    assert command and command[2] == "karna_ws"
    needs("systemd-analyze")
    unit = unit.replace(command[0], f"ExecStart={sys.executable} -m karna_ws")
    unit = unit.replace("/opt/karna", str(CONSOLE_HERE))
    (tmp_path / "karna.service").write_text(unit)
    shutil.copy(CONSOLE_HERE / "examples" / "karna.socket", tmp_path)
    found = subprocess.run(
        ["systemd-analyze", "verify", "./karna.service", "./karna.socket"],
        cwd=tmp_path, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    ours = [line for line in found.stderr.splitlines() if "karna" in line]
    assert found.returncode == 0 and ours == [], found.stderr


async def test_server_takes_socket_of_systemd() -> None:
    """As karna.socket does: the socket is there before the server, and clients wait in it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        waiting = asyncio.create_task(wait_for_status(port))
        hand_over = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3);"
            "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()));"
            "os.execv(sys.executable, [sys.executable, sys.argv[2]])"
        )
        server = str(CONSOLE_HERE / "karna_ws.py")
        words = (sys.executable, "-c", hand_over, str(listener.fileno()), server)
        async with program(*words, ready=str(port), pass_fds=(listener.fileno(),)):
            assert "command" in await waiting


async def wait_for_status(port: int) -> Any:
    """Ask before anybody accepts: the answer comes once the server runs."""
    async with connect(f"ws://127.0.0.1:{port}/ws") as ws:
        return await rpc(ws, "get_status", {}, "status_update")


# --- README -----------------------------------------------------------------------------------

ROOT = SERVER_FILE.resolve().parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def pattern_of(line: str) -> re.Pattern[str]:
    """A line of the README as a pattern: `...` stands for anything."""
    return re.compile(".*".join(map(re.escape, line.split("..."))))


async def say_and_compare(client: Raw, conversation: str) -> None:
    """Send the `>` lines of a block; what comes must be its `<` lines, in their order."""
    for line in conversation.splitlines():
        if line.startswith("> "):
            await client.send(line[2:])
        else:
            answer = await client.next_where(lambda message: "id" in message)
            assert pattern_of(line[2:]).fullmatch(orjson.dumps(answer).decode()), answer


def test_readme_conversations_are_found() -> None:
    assert len([block for block in blocks("text") if block.startswith(">")]) == 2
    assert len(blocks("python")) == 1
    assert len(blocks("typescript")) >= 3


async def test_readme_shows_what_the_wire_says() -> None:
    async with served() as server, Raw.open(server) as client:
        await say_and_compare(client, blocks("text")[0])


async def test_readme_embedding_runs_as_shown(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    (source,) = blocks("python")
    # Port 0, and word of which one it is: two tests may run on one machine.
    source = source.replace("asyncio.run(serve(manager, port=8000, ", "asyncio.run(told(manager, ")
    source = source.replace('if __name__ == "__main__":', EMBEDDED)
    program.write_text(source)
    async with readme_running(sys.executable, str(program)) as process:
        assert process.stdout is not None
        port = int(await process.stdout.readline())
        async with Raw.open(Port(port)) as client:
            await say_and_compare(client, blocks("text")[1])


EMBEDDED = """
async def told(manager, **options):
    from karna_ws import serving
    async with serving(manager, port=0, **options) as server:
        print(server.port, flush=True)
        await server.wait_closed()

if __name__ == "__main__":
"""


class Port:
    """What Raw.open needs of a server."""

    def __init__(self, port: int) -> None:
        self.port = port


@contextlib.asynccontextmanager
async def readme_running(*words: str, **options: Any) -> AsyncIterator[asyncio.subprocess.Process]:
    """A program that runs while the block does, with this project on its path."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = await asyncio.create_subprocess_exec(
        *words, stdout=subprocess.PIPE, env=environment, **options
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


def console_sessions() -> list[tuple[str, list[str]]]:
    """(command, lines that must come out) of every console block."""
    sessions: list[tuple[str, list[str]]] = []
    for block in blocks("console"):
        for line in block.splitlines():
            if line.startswith("$ "):
                sessions.append((line[2:], []))
            else:
                sessions[-1][1].append(line)
    return sessions


@pytest.mark.parametrize(
    ("command", "lines"), [s for s in console_sessions() if " -m websockets" not in s[0]]
)
async def test_readme_command_prints_what_is_shown(command: str, lines: list[str]) -> None:
    if command.startswith("curl"):
        needs("curl")
    async with served() as server:
        command = command.replace("localhost:8000", f"localhost:{server.port}")
        command = re.sub(r"^python ", f"{sys.executable} ", command)
        process = await asyncio.create_subprocess_shell(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        printed, _ = await process.communicate()
    shown = "\n".join(lines)
    assert pattern_of(shown).fullmatch(printed.decode().rstrip("\n")), printed.decode()


async def test_readme_first_client_gets_the_answer_shown() -> None:
    ((command, lines),) = [s for s in console_sessions() if " -m websockets" in s[0]]
    url = command.split()[-1]
    async with served() as server:
        url = url.replace("8000", str(server.port))
        words = (sys.executable, "-m", "websockets", url)
        async with readme_running(*words, stdin=subprocess.PIPE) as process:
            assert process.stdin is not None and process.stdout is not None
            seen = b""
            for line in lines:
                if line.startswith("> "):
                    process.stdin.write(line[2:].encode() + b"\n")
                    continue
                wanted = line.replace("8000", str(server.port)).encode()
                while wanted not in seen:
                    assert (more := await process.stdout.read(4096)), seen
                    seen += more


def test_readme_names_only_flags_that_exist() -> None:
    known = set(re.findall(r"--[a-z][a-z-]*", karna_ws.make_parser().format_help()))
    known |= set(re.findall(r'"(--[a-z][a-z-]*)"', (ROOT / "bench" / "run.py").read_text()))
    others = {"--allow-program", "--unix-socket", "--utc", "--level", "--strong", "--no-strong"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README))
    assert named - known - others == set()


def test_readme_links_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in slugs, target
        elif "://" not in target:
            assert (ROOT / target).exists(), target


def test_readme_limits_are_those_of_config() -> None:
    config = karna_ws.Config()
    assert f"| clients | {config.max_clients:,} |" in README
    assert f"| running commands of a client | {config.max_running_commands}, " in README
    assert f"| time of a command | {config.command_timeout_s:g} s |" in README
    assert f"The last {config.history_messages:,} broadcasts" in README


def test_readme_typescript_passes_the_strict_compiler(node_dir: Path, tmp_path: Path) -> None:
    for number, source in enumerate(blocks("typescript")):
        (tmp_path / f"snippet{number}.ts").write_text(source + "\nexport {};\n")
    (tmp_path / "node_modules").symlink_to(node_dir / "node_modules")
    flags = "--strict --noEmit --target es2022 --module esnext --moduleResolution bundler"
    done = subprocess.run(
        [node_dir / "node_modules/.bin/tsc", *flags.split(), "--types", "",
         *sorted(tmp_path.glob("snippet*.ts"))],
        check=False, cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
