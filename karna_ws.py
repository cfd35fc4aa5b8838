"""Karna WS: commands, status and broadcasts for browsers, scripts and local assistants.

One process, one asyncio loop, one `websockets.serve` on one port:

    WebSocket  /ws                     raw door: a JSON message a frame
    WebSocket  /socket.io/?EIO=4       Socket.IO door: the real socket.io-client
    HTTP       /                       console page, or a JSON index of the doors
    HTTP       /health /api/status     for monitors and scripts
    HTTP       /api/execute_command    one command by POST;  /api/notify  one broadcast by POST
    HTTP       /rpc                    JSON-RPC 2.0 by POST (the raw door speaks it too)
    HTTP       /metrics                Prometheus text format

The wire formats are RFC 6455 (WebSocket), Engine.IO protocol 4, Socket.IO protocol 5 and
JSON-RPC 2.0. Requests and answers are described in README.md.

The file reads downhill:

    1 limits        every number with its unit and its reason; Config
    2 errors        whose fault it is, and the code that says so
    3 packets       Socket.IO and WebSocket framing: pure functions
    4 connections   bytes to messages and back: one Connection per socket
    5 clients       what a peer is once it is in: raw, Socket.IO or HTTP
    6 manager       WebSocketManager: who is connected, broadcast, history, heartbeat
    7 dispatch      a message to a method, a command to a task, an error to an answer
    8 http          who may come in; path to handler
    9 server        bind, serve, stop
   10 main          flags and environment to a running server
"""

from __future__ import annotations

import asyncio
import errno
import functools
import gc
import hashlib
import hmac
import inspect
import itertools
import logging
import math
import os
import re
import secrets
import select
import signal
import socket
import stat
import struct
import sys
import threading
import time
from base64 import b64encode, urlsafe_b64encode
from bisect import bisect_left, bisect_right
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterable
from collections.abc import Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from enum import Enum, IntEnum
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, NoReturn, cast, get_args
from urllib.parse import parse_qs

import websockets.frames
from orjson import OPT_NON_STR_KEYS, JSONDecodeError, dumps, loads
from websockets.asyncio.server import Server as WebSocketServer
from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as websockets_serve
from websockets.asyncio.server import unix_serve as websockets_unix_serve
from websockets.frames import BINARY, CONT, TEXT, CloseCode, Frame
from websockets.protocol import State
from websockets.server import ServerProtocol

from services import (
    Call,
    Command,
    CommandFailed,
    CommandProcessor,
    Context,
    LanguageService,
    Monitor,
    RedisBackplane,
    Service,
    ServiceError,
    Unavailable,
    UsageError,
    VisionService,
    stream_id,
    kill_programs,
    utc_now,
)

if TYPE_CHECKING:
    import argparse

__version__ = "1.0.0"
__all__ = ["Client", "Config", "Server", "WebSocketManager", "serve", "serving"]

log = logging.getLogger("karna_ws")
apply_mask = websockets.frames.apply_mask  # type: ignore[attr-defined]  # C, or Python without it


# --- 1 limits ----------------------------------------------------------------------------------
# What an operator may change is in Config, and every flag, environment variable and `--help` line
# is made from it. What follows here is fixed, because another value would be wrong.

MAX_HEAD_LINE_BYTES = 8190  # a request line or header line, as nginx and the websockets library
MAX_HEAD_LINES = 129  # the request line and 128 headers, as the websockets library
MAX_HEAD_BYTES = 64 * 1024  # all of them together; browsers send below 16 KiB
MAX_FRAGMENTS = 4096  # in one message, as the websockets library: tiny fragments cost much memory
MAX_ATTACHMENTS = 10  # of one Socket.IO packet, as socket.io-parser
MAX_ACK_DIGITS = 15  # keeps ack ids exact in JavaScript and int() cheap
MAX_NAMESPACE_BYTES = 255  # longer than any real one
MAX_JSON_DEPTH = 100  # where we walk a value ourselves (attachments); Python's own limit is 1,000
MAX_BATCH = 256  # JSON-RPC requests in one message
MAX_WAITING = 256  # requests of one client that wait for a running command to end...
MAX_WAITING_BYTES = 1024 * 1024  # ...past either we stop reading that client
MAX_PID_CHARS = 100  # of a private id that a Socket.IO client comes back with
MAX_REPLAY_HEAD_BYTES = 400  # frame, event, namespace and offset around an envelope of the history
ENVELOPE_BYTES = 1024  # more than a notification is longer than the request for it
LAG_S = 1.0  # to read from the backplane what another process has sent to a client already
PENDING_CONNECTIONS = 128  # sockets in handshake or HTTP beyond max_clients; more are cut at once
READ_BYTES = 64 * 1024  # taken from a socket at a time; malloc maps pages anew from 128 KiB on
MAX_READS = 128  # sockets read before the loop has another look at its timers
FLUSH_BYTES = 4096  # a longer read or frame does not wait for others
FLUSH_FRAMES = 64  # joined into one write before it leaves
CLIENTS_A_TURN = (
    100  # clients for whom a flush waits one more turn of the loop: 1 us in 400, and...
)
MAX_TURNS = 8  # ...never more than this
FLUSH_BROADCAST_BYTES = 256 * 1024  # broadcasts joined into one write before it leaves
LINGER_S = 2.0  # for a peer to read an HTTP answer before its socket is cut, and...
SLOWEST_READER_BYTES_S = 16 * 1024  # ...more for a long one: a poor mobile link still gets it
MIB = 1024 * 1024


def _option(
    group: str, default: Any, help: str, metavar: str | None = None, low: float = 0,
    *, flag: str | None = None, secret: bool = False,
) -> Any:  # fmt: skip
    """A field of Config with what the command line needs to know of it."""
    metadata = {"help": help, "group": group, "flag": flag, "metavar": metavar, "low": low}
    return field(default=default, metadata=metadata, repr=not secret)


_where, _who, _limit, _heartbeat, _recovery, _run = (
    functools.partial(_option, group)
    for group in ("where", "who", "limits", "heartbeat", "recovery", "run")
)


@dataclass(frozen=True)
class Config:
    """The options of `serve()`, of the command line and of the environment.

    Raises ValueError, in one line that names the option, for a value that can't be used.
    """

    # fmt: off
    host: str = _where("127.0.0.1", "address to listen on", "ADDRESS")
    port: int = _where(8000, "TCP port; 0 picks a free one")
    unix: str | None = _where(None, "listen on a Unix socket instead of TCP", "PATH")
    certfile: str | None = _where(
        None, "TLS certificate chain (PEM); makes it https and wss", "PATH")
    keyfile: str | None = _where(
        None, "TLS private key (PEM), if not in the certificate's file", "PATH")
    reuse_port: bool = _where(False, "let several processes share the port")

    token: str | None = _who(None, "secret that every client must present", "TOKEN", secret=True)
    allow_origin: tuple[str, ...] = _who(
        (), "origin of web pages that may connect, such as https://app.example", "ORIGIN")
    allow_host: tuple[str, ...] = _who(
        (), "host name this server is reached by, such as karna.example", "NAME")
    insecure_no_token: bool = _who(
        False, "listen beyond this machine without a token: anyone who reaches it may command it")

    max_clients: int = _limit(1000, "clients connected at a time", "N", 1)
    max_message_bytes: int = _limit(
        MIB, "longest WebSocket message", "BYTES", 128, flag="max-message")
    max_body_bytes: int = _limit(MIB, "longest HTTP body", "BYTES", 2, flag="max-body")
    max_running_commands: int = _limit(
        32, "commands of one client that run at a time; more wait", "N", 1)
    max_unsent_bytes: int = _limit(
        MIB, "bytes a slow client may leave unread before it is dropped", "BYTES", 1024,
        flag="max-unsent")
    command_timeout_s: float = _limit(60.0, "longest a command may run", "SECONDS", 0.001)
    open_timeout_s: float = _limit(
        10.0, "longest a handshake or an HTTP request may take to arrive", "SECONDS", 0.001)
    close_timeout_s: float = _limit(
        10.0, "longest to wait for a peer to close", "SECONDS", 0.001)
    grace_s: float = _limit(
        5.0, "longest running commands may go on at shutdown", "SECONDS")

    ping_interval_s: float | None = _heartbeat(
        None, "seconds between heartbeats (default: raw door 20, Socket.IO door 25)", "SECONDS",
        0.01)
    ping_timeout_s: float = _heartbeat(
        20.0, "silence after a heartbeat that drops a client", "SECONDS", 0.01)
    connect_timeout_s: float = _heartbeat(
        45.0, "longest a Socket.IO client may take to join a namespace", "SECONDS", 0.01)
    namespaces: tuple[str, ...] = _heartbeat(
        (), "Socket.IO namespace to serve besides /, /ws and /ws/", "NAME", flag="namespace")

    history_messages: int = _recovery(
        1000, "broadcasts kept for clients that reconnect; 0 turns it off", "N")
    history_bytes: int = _recovery(4 * MIB, "bytes of broadcasts kept for them", "BYTES")
    recovery: bool = _recovery(
        True, "no Socket.IO connection state recovery (as KARNA_RECOVERY=0)")
    backplane: str | None = _recovery(
        None, "share broadcasts with other processes, such as redis://host:6379", "URL",
        secret=True)
    loop: str = _run("auto", "event loop: auto (uvloop if installed), asyncio or uvloop", "NAME")
    # fmt: on

    def __post_init__(self) -> None:
        for option in fields(self):
            self._check(option.name, str(option.type), option.metadata["low"])
        if self.loop not in ("auto", "asyncio", "uvloop"):
            raise ValueError(f"loop must be auto, asyncio or uvloop, not {self.loop!r}")
        if self.port > 65535:
            raise ValueError(f"port must be 65535 at most, not {self.port}")
        if self.keyfile and not self.certfile:
            raise ValueError("keyfile needs certfile")
        if self.token is not None and not _TOKEN.fullmatch(self.token):
            # Of anything else the clients' HTTP libraries make different bytes.
            raise ValueError("token must be printable ASCII, without blanks around it")
        for origin in self.allow_origin:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"allow_origin must look like https://app.example, without a path: {origin!r}"
                )
        for name in self.allow_host:
            if not _HOST_NAME.fullmatch(name):
                raise ValueError(
                    f"allow_host must be a name such as karna.example, without a port: {name!r}"
                )
        for name in self.namespaces:
            if not name.startswith("/") or "," in name or len(name) > MAX_NAMESPACE_BYTES:
                raise ValueError(f"namespaces must start with / and hold no comma: {name!r}")

    def _check(self, name: str, declared: str, low: float) -> None:
        value = getattr(self, name)
        kinds, words = _OPTION_KINDS[declared.removesuffix(" | None")]
        if value is None and declared.endswith(" | None"):
            return
        is_kind = isinstance(value, kinds) and isinstance(value, bool) == (declared == "bool")
        items = value if isinstance(value, tuple) else ()
        if not is_kind or not all(isinstance(item, str) for item in items):
            raise ValueError(f"{name} must be {words}, not {type(value).__name__}")
        if isinstance(value, int | float) and not (math.isfinite(value) and value >= low):
            raise ValueError(f"{name} must be {low:g} or more, not {value}")

    @property
    def raw_ping_interval_s(self) -> float:
        """Seconds between WebSocket pings: 20, as the websockets library."""
        return 20.0 if self.ping_interval_s is None else self.ping_interval_s

    @property
    def engine_ping_interval_s(self) -> float:
        """Seconds between Engine.IO pings: 25, as socket.io."""
        return 25.0 if self.ping_interval_s is None else self.ping_interval_s


_HOST_NAME = re.compile(r"[A-Za-z0-9._-]+")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:(?![/?#])[!-~])+", re.IGNORECASE)
_TOKEN = re.compile(r"[!-~](?:[ -~]*[!-~])?")
_OPTION_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "bool": ((bool,), "True or False"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "str": ((str, os.PathLike), "a text"),
    "tuple[str, ...]": ((tuple,), "a text or a list of texts"),
}


# --- 2 errors ----------------------------------------------------------------------------------
# Blame decides the type. The peer broke a wire format: BadPacket, and its session ends. The peer
# asked for something that can't be had: Refused, and it gets an answer. A command or service
# failed: services.ServiceError, and it gets an answer. We can't start: StartError, exit code 2.
# Anything else is our own fault: it is logged with its traceback and answered without one.


class BadPacket(Exception):
    """The peer broke the Socket.IO or Engine.IO protocol; the caller closes the session."""


class Refused(Exception):
    """A request is answered with an error: `code` for programs, the message for people.

    `status` is used where the answer is an HTTP response, `headers` go with it.
    """

    def __init__(
        self, code: str, message: str, *, status: int | None = None,
        headers: Mapping[str, str] | None = None, **data: Any,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.code = code
        self.status = HTTP_STATUS.get(code, 500) if status is None else status
        self.headers = dict(headers or {})
        self.data = data


class StartError(Exception):
    """The server can't start; the message is one line that names the mend."""


HTTP_STATUS = {
    "invalid_json": 400, "invalid_request": 400, "invalid_params": 400, "usage": 400,
    "unauthorized": 401, "forbidden": 403, "unknown_method": 404, "unknown_command": 404,
    "cancelled": 409, "too_large": 413, "command_failed": 500, "internal_error": 500,
    "unavailable": 503, "timeout": 504,
}  # fmt: skip


# --- 3 packets ---------------------------------------------------------------------------------
# Pure functions: no await, no logging, no state. All of them take and give bytes, because that is
# what the socket has and what orjson reads and writes fastest.


class PacketType(IntEnum):
    """Socket.IO protocol 5, "Packet types"."""

    CONNECT, DISCONNECT, EVENT, ACK, CONNECT_ERROR, BINARY_EVENT, BINARY_ACK = range(7)


RESERVED_EVENTS = {
    "connect", "connect_error", "disconnect", "disconnecting", "newListener", "removeListener",
}  # fmt: skip


class Packet(NamedTuple):
    """One Socket.IO packet; `attachments` binary frames follow it."""

    type: PacketType
    namespace: str = "/"
    data: Any = None
    ack: int | None = None
    attachments: int = 0


_PACKET = re.compile(rb"([0-6])(?:(\d+)-)?(/[^,]*(?:,|\Z))?(\d+)?(.*)", re.DOTALL)


def decode_packet(text: bytes) -> Packet:
    """Parse one Socket.IO packet, such as b'2/chat,7["move",1]'.

    Attachments arrive as later binary frames; `Packet.attachments` says how many.
    Raises BadPacket (the peer's fault: the caller closes the session).
    Source: Socket.IO protocol 5, "Packet encoding".
    """
    match = _PACKET.fullmatch(text)
    if match is None:
        raise BadPacket("unknown packet type")
    digit, attachments, namespace, ack, data = match.groups()
    kind = PacketType(int(digit))
    return Packet(
        kind, _decode_namespace(namespace), _decode_data(kind, data), _decode_ack(kind, ack),
        _decode_attachments(kind, attachments),
    )  # fmt: skip


def _decode_namespace(text: bytes | None) -> str:
    if text is None:
        return "/"
    if len(text) > MAX_NAMESPACE_BYTES:
        raise BadPacket("namespace is too long")
    try:
        return text.rstrip(b",").decode()
    except UnicodeDecodeError:
        raise BadPacket("namespace is not UTF-8") from None


def _decode_ack(kind: PacketType, digits: bytes | None) -> int | None:
    if digits is None:
        if kind in (PacketType.ACK, PacketType.BINARY_ACK):
            raise BadPacket("ack without an id")
        return None
    if len(digits) > MAX_ACK_DIGITS:
        raise BadPacket("ack id is too long")
    return int(digits)


def _decode_attachments(kind: PacketType, digits: bytes | None) -> int:
    if (digits is not None) != (kind in (PacketType.BINARY_EVENT, PacketType.BINARY_ACK)):
        raise BadPacket("illegal attachments")
    # Length first: int() of a million digits would cost the loop seconds.
    if digits is not None and (len(digits) > 2 or int(digits) > MAX_ATTACHMENTS):
        raise BadPacket("too many attachments")
    return int(digits or 0)


def _decode_data(kind: PacketType, text: bytes) -> Any:
    try:
        data = loads(text) if text else None
    except JSONDecodeError:
        raise BadPacket("invalid payload") from None
    if not _DATA_RULES[kind](data):
        raise BadPacket("invalid payload")
    return data


def decode_event(text: bytes) -> list[Any]:
    """Parse the payload of an EVENT packet, such as b'["move",1]'. Raises BadPacket."""
    try:
        event: list[Any] = loads(text)
    except JSONDecodeError:
        raise BadPacket("invalid payload") from None
    if not event or (event[0] != "rpc" and not _is_event(event)):  # nearly all are "rpc"
        raise BadPacket("invalid payload")
    return event


def _is_event(data: Any) -> bool:
    name = data[0] if isinstance(data, list) and data else None
    return type(name) is int or (isinstance(name, str) and name not in RESERVED_EVENTS)


_DATA_RULES: dict[PacketType, Callable[[Any], bool]] = {
    PacketType.CONNECT: lambda data: data is None or isinstance(data, dict),
    PacketType.DISCONNECT: lambda data: data is None,
    PacketType.EVENT: _is_event,
    PacketType.ACK: lambda data: isinstance(data, list),
    PacketType.CONNECT_ERROR: lambda data: isinstance(data, dict),
    PacketType.BINARY_EVENT: _is_event,
    PacketType.BINARY_ACK: lambda data: isinstance(data, list),
}
_EVENT_KINDS = (PacketType.EVENT, PacketType.BINARY_EVENT)  # without attachments, with them
_ACK_KINDS = (PacketType.ACK, PacketType.BINARY_ACK)
_KINDS = {kind: kinds for kinds in (_EVENT_KINDS, _ACK_KINDS) for kind in kinds}


def encode_packet(packet: Packet) -> list[bytes]:
    """One Socket.IO packet as its text and, behind it, its attachments.

    Bytes anywhere in `data` become attachments and turn an event or ack into its binary kind.
    Raises TypeError or ValueError for data that JSON has no form for.
    """
    attachments: list[bytes] = []
    kind, data = packet.type, packet.data
    if kind in _KINDS:
        data = _extract_attachments(data, attachments)
        kind = _KINDS[kind][bool(attachments)]
    text = b"%d%b" % (kind, b"%d-" % len(attachments) if attachments else b"")
    text += encode_namespace(packet.namespace)
    if packet.ack is not None:
        text += b"%d" % packet.ack
    if data is not None:
        text += encode_json(data)
    return [text, *attachments]


def encode_namespace(name: str) -> bytes:
    """The namespace part of a packet: nothing for '/', else b'/name,'."""
    return b"" if name == "/" else name.encode() + b","


def _extract_attachments(value: Any, found: list[bytes], depth: int = 0) -> Any:
    """A copy of `value` with placeholders for bytes, which are appended to `found`."""
    if isinstance(value, bytes | bytearray | memoryview):
        found.append(bytes(value))
        return {"_placeholder": True, "num": len(found) - 1}
    if depth > MAX_JSON_DEPTH:
        raise ValueError("value is nested too deeply")
    if isinstance(value, list | tuple):
        return [_extract_attachments(item, found, depth + 1) for item in value]
    if isinstance(value, dict):
        return {key: _extract_attachments(item, found, depth + 1) for key, item in value.items()}
    return value


def insert_attachments(value: Any, given: Sequence[bytes], depth: int = 0) -> Any:
    """A copy of `value` with its placeholders replaced by what was given; undoes encode_packet.

    Raises BadPacket for a placeholder without its attachment, or deep nesting.
    """
    if depth > MAX_JSON_DEPTH:
        raise BadPacket("payload is nested too deeply")
    if isinstance(value, list):
        return [insert_attachments(item, given, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("_placeholder") is not True:
        return {key: insert_attachments(item, given, depth + 1) for key, item in value.items()}
    number = value.get("num")
    if type(number) is not int or not 0 <= number < len(given):
        raise BadPacket("illegal attachments")
    return given[number]


def encode_json(value: Any) -> bytes:
    """`value` as JSON in UTF-8; keys that are numbers, dates or None become strings.

    Raises TypeError for what JSON has no form for: bytes, lone surrogates, integers beyond
    64 bits, nesting beyond 254.
    """
    try:
        return dumps(value)
    except TypeError:  # orjson's JSONEncodeError is one
        return dumps(value, option=OPT_NON_STR_KEYS)


def encodable(text: str) -> str:
    """`text` without what UTF-8 has no form for: an exception's text may be anything."""
    return text.encode(errors="replace").decode()


_SHORT_TEXT_HEADS = [bytes((0x81, size)) for size in range(126)]


def frame_text(payload: bytes) -> bytes:
    """One unmasked, final WebSocket text frame (RFC 6455, 5.2)."""
    size = len(payload)
    return (_SHORT_TEXT_HEADS[size] if size < 126 else _long_head(0x81, size)) + payload


def frame_binary(payload: bytes) -> bytes:
    """One unmasked, final WebSocket binary frame (RFC 6455, 5.2)."""
    size = len(payload)
    return (bytes((0x82, size)) if size < 126 else _long_head(0x82, size)) + payload


_pack_16_bits = struct.Struct("!BBH").pack
_pack_64_bits = struct.Struct("!BBQ").pack


def _long_head(first: int, size: int) -> bytes:
    return _pack_16_bits(first, 126, size) if size < 65536 else _pack_64_bits(first, 127, size)


PING_FRAME = b"\x89\x00"  # WebSocket ping, for the raw door
ENGINE_PING_FRAME = frame_text(b"2")  # Engine.IO ping, for the Socket.IO door


# --- 4 connections -----------------------------------------------------------------------------
# A Connection owns its socket's bytes: the HTTP head, then WebSocket frames. Whole, final, masked
# data frames take the fast lane: they are unmasked and handled on the spot, and the answers of
# one read leave in one write. Every other frame goes, whole, to the websockets library, which
# knows the rest of RFC 6455. The library's own machinery (a task, a queue and two futures per
# client) is bypassed; the names of its that we rely on without a promise are gathered here, and
# `test_library_has_the_private_names_we_use` says so when a release changes them.
#
# asyncio accepts, closes, keeps what a socket does not take, and does TLS and HTTP. Where there is
# epoll, open WebSockets are read and written by us: one SocketReader for all of them, and a write
# straight to the socket while nothing waits before it.
#
#   ServerProtocol.receive_data, receive_eof, events_received, data_to_send, send_close, fail,
#   state, parse, parser, reader.eof, eof_sent, current_size       Frame.opcode, .data, .fin


class Phase(Enum):
    """Where a socket is in its life; what arrives is read accordingly."""

    HEAD = "head"  # the HTTP head is arriving
    BODY = "body"  # the body of a POST is arriving
    ANSWERING = "answering"  # an HTTP answer is being made
    OPEN = "open"  # WebSocket frames
    CLOSING = "closing"  # a close frame or HTTP answer is out; the peer may still read
    CLOSED = "closed"


# Reasons not to read a client, as bits.
HOLD_WRITES = 1  # it does not read: its answers pile up
HOLD_CALLS = 2  # too many of its requests wait for running commands
HOLD_CONNECT = 4  # its connect handler is still deciding
HOLD_CLOSED = 8  # nothing that still arrives counts

NEVER = math.inf
# What a program's code may raise on the loop, and must not end other clients or the process. A
# KeyboardInterrupt is not its doing.
FAULTS = (Exception, asyncio.CancelledError, SystemExit)
_OPEN = Phase.OPEN  # a global: looking a member up in its Enum costs as much as a frame's header


class SocketReader:
    """Reads the open WebSockets of a server, all in one callback of the loop.

    The loop watches one epoll of ours in place of every socket: a read costs no Handle, no Context
    and none of asyncio's four calls. Answers leave when all that is ready has been read: peers
    that the first one wakes are awake for the rest, and waking was a fifth of a write's cost.
    """

    def __init__(self, manager: WebSocketManager, loop: asyncio.AbstractEventLoop) -> None:
        self.manager = manager
        self._loop = loop
        self._connections: dict[int, Connection] = {}
        self._epoll = select.epoll()
        self._events = select.EPOLLIN | select.EPOLLPRI | select.EPOLLRDHUP
        loop.add_reader(self._epoll.fileno(), self._read)

    def trust_edges(self) -> None:
        """Look at a socket that was read empty only when more arrives.

        Not for Unix sockets: a read of theirs also ends early where descriptors were sent along.
        """
        self._events |= select.EPOLLET

    def add(self, connection: Connection) -> None:
        """Read this connection from now on."""
        self._connections[connection.fd] = connection
        self._epoll.register(connection.fd, self._events)

    def remove(self, connection: Connection) -> None:
        """Read it no more; what arrives stays in its socket."""
        if self._connections.get(connection.fd) is connection:
            del self._connections[connection.fd]
            self._epoll.unregister(connection.fd)

    def close(self) -> None:
        """Read nothing any more."""
        self._connections.clear()
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    def _read(self) -> None:
        connections, read, only_data = self._connections, os.read, select.EPOLLIN
        answered: list[Connection] = []
        received = 0
        try:
            for fd, events in self._epoll.poll(0, MAX_READS):
                connection = connections.get(fd)
                if connection is None:
                    continue  # one that was read before it has ended it
                try:
                    data = read(fd, READ_BYTES)
                except BlockingIOError:
                    continue
                except OSError:  # the peer is gone
                    connection.abort()
                    continue
                answered.append(connection)
                size = len(data)
                received += size
                try:
                    connection.take(data) if data else connection.take_end()
                except KeyboardInterrupt:  # the loop ends; should it go on, all are looked at again
                    for each in connections:
                        self._epoll.modify(each, self._events)
                    raise
                except BaseException as exc:  # a bug ends this client, not the others
                    self.manager.log_error(f"{connection.name} failed", exc)
                    connection.abort()
                if size > FLUSH_BYTES:
                    connection.flush()
                if (events != only_data or size == READ_BYTES) and fd in connections:
                    self._epoll.modify(fd, self._events)  # more may be there: raise the edge again
        finally:
            self.manager.bytes_in += received
            for connection in answered:
                connection.flush()


class Connection(ServerConnection):
    """One socket, from its HTTP head to its close."""

    # Slots for our own attributes: past 30 keys CPython stops sharing instance dicts (1.4 KiB).
    __slots__ = (
        "_drained", "_holds", "_need", "_parts", "_parts_are_text", "_queue", "_tail", "allowance",
        "deadline", "door", "fd", "head", "heard", "is_queueing", "loop", "manager", "name",
        "next_ping", "origin", "phase", "pinged_at", "protocol", "reader", "transport", "waiting",
        "waiting_bytes",
    )  # fmt: skip

    def __init__(
        self, manager: WebSocketManager, protocol: ServerProtocol, server: WebSocketServer,
        **options: Any,
    ) -> None:  # fmt: skip
        # Not super(): it makes futures, queues and loggers for the machinery we go around, 2 KiB
        # and 10 microseconds a client.
        self.protocol = protocol
        self.loop = asyncio.get_running_loop()
        self.manager = manager
        self.name = f"c{next(manager.names)}"  # in logs
        self.door: Door | None = None
        self.phase = Phase.HEAD
        self.deadline = self.loop.time() + manager.config.open_timeout_s
        self.heard = True
        self.fd = -1  # of its socket, if we may use that ourselves
        self.reader: SocketReader | None = None  # who reads it in place of the transport
        self.next_ping = NEVER
        self.pinged_at: float | None = None
        self.head: Any = None  # while an HTTP request is read and answered: its head
        self.origin: str | None = None  # the allowed origin that a CORS answer names
        self.allowance = 0  # unsent bytes beyond the limit: a replay is no fault of the client's
        self.waiting = 0  # requests, all namespaces together, that wait for a command to end
        self.waiting_bytes = 0
        self.is_queueing = False  # until the next flush frames are queued, to leave together
        self._queue: list[bytes] = []
        self._drained: asyncio.Future[None] | None = None
        self._holds = 0
        self._tail: bytearray | None = None  # what arrived of the next frame, head or body
        self._need = 0  # bytes that `_tail` must have before another look at it is worth while
        self._parts: list[bytes] | None = None  # of a fragmented message
        self._parts_are_text = False

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not super(): it would start the library's handler task.
        self.transport = cast(asyncio.Transport, transport)
        if self.manager.reader is not None and not transport.get_extra_info("ssl_object"):
            self.fd = transport.get_extra_info("socket").fileno()
            self.transport.set_write_buffer_limits(0)
        self.manager.adopt(self)

    def data_received(self, data: bytes) -> None:
        self.manager.bytes_in += len(data)
        self.take(data)
        self.flush()

    def eof_received(self) -> None:
        self._begin_closing()
        if self.protocol.state is not State.CONNECTING:
            self.protocol.receive_eof()
            self._send_library_data()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.reader is not None:
            self.reader.remove(self)
        self.fd = -1  # it may soon be another's
        if self.phase in (_OPEN, Phase.ANSWERING) and self.door is not None:
            self.door.leave()
        self.phase = Phase.CLOSED
        self.deadline = NEVER
        self._holds = HOLD_CLOSED
        self._tail = self._parts = None
        self.manager.release(self)
        self._wake_writers()

    def pause_writing(self) -> None:
        self.hold(HOLD_WRITES)

    def resume_writing(self) -> None:
        self.allowance = 0
        self.heard = True  # who takes what we write lives, even if we can't listen meanwhile
        self.release(HOLD_WRITES)
        self._wake_writers()

    # Bytes to frames, frames to messages.

    def take_end(self) -> None:
        """The peer sends no more: what asyncio does then."""
        self._pause_reading()
        self.eof_received()
        self.transport.close()

    def _collect(self, data: bytes) -> None:
        """Take what is not simply the next frames of an open WebSocket."""
        if self._tail is not None:
            self._tail += data
            if len(self._tail) < self._need or self._head_is_partial(self._tail, len(data)):
                return
            data, self._tail = bytes(self._tail), None
        if self.phase is _OPEN:
            self.take(data)
        else:
            _READERS[self.phase](self, data)

    def _head_is_partial(self, tail: bytearray, arrived: int) -> bool:
        """Can't the bytes that just arrived have ended the HTTP head?"""
        if self.phase is not Phase.HEAD or len(tail) > MAX_HEAD_BYTES:
            return False
        return tail.find(b"\r\n\r\n", max(0, len(tail) - arrived - 3)) < 0

    def keep(self, data: bytes, need: int = 0) -> None:
        """Keep what has arrived of something until it has `need` bytes."""
        if data:
            self._tail = bytearray(data)
            self._need = need

    def take(self, data: bytes) -> None:
        """Handle every whole frame in `data`, keep the rest; the answers are queued."""
        self.heard = True
        if self._tail is not None or self.phase is not _OPEN:
            return self._collect(data)
        assert self.door is not None
        self.is_queueing = True
        receive, answers, heads = self.door.receive, self._queue, _SHORT_TEXT_HEADS
        limit = self.manager.max_message_bytes
        position, end, need, messages = 0, len(data), 0, 0
        while not self._holds:
            if end - position < 2:
                need = 2
                break
            first, second = data[position], data[position + 1]
            if 128 <= second < 254:  # the mask bit, and a length of up to 125
                body = position + 6
                stop = body + second - 128
            elif second < 128:  # not masked
                return self._fail_slowly(data[position:])
            else:
                size_bytes = 2 if second == 254 else 8
                if end - position < 2 + size_bytes:
                    need = 2 + size_bytes
                    break
                body = position + 6 + size_bytes
                stop = body + int.from_bytes(data[position + 2 : position + 2 + size_bytes], "big")
            is_data = (first == 0x81 or first == 0x82) and self._parts is None
            if is_data and stop - body <= limit:
                if stop > end:
                    need = stop - position
                    break
                payload = apply_mask(data[body:stop], data[body - 4 : body])
                position = stop
                messages += 1
                try:
                    answer = receive(payload, first == 0x81)
                except FAULTS as exc:
                    self._receive_failed(payload, first == 0x81, exc)
                else:
                    if answer is None:
                        continue
                    size = len(answer)
                    if size < 126:
                        answers.append(heads[size] + answer)
                    else:  # of long ones not all that a read asks for may wait
                        if size > FLUSH_BYTES:
                            self.allow(size)
                        self.send_frame(frame_text(answer))
            else:
                if self._is_doomed(first, stop - body):
                    return self._fail_slowly(data[position:])
                if stop > end:
                    need = stop - position
                    break
                self._feed_library(data[position:stop])
                position = stop
        self.manager.messages_in += messages
        if self.phase is not _OPEN:
            self._read_late(data[position:])
        elif position < end:
            self._tail = bytearray(memoryview(data)[position:])
            self._need = sys.maxsize if self._holds else need

    def _is_doomed(self, first: int, size: int) -> bool:
        """Will the library fail the connection for this frame, whatever its payload?"""
        opcode = first & 0x0F
        if opcode >= 8:
            return first & 0xF0 != 0x80 or opcode > 10 or size > 125
        limit = self.manager.config.max_message_bytes - (self.protocol.current_size or 0)
        return first & 0x70 != 0 or opcode > 2 or size > limit

    def _fail_slowly(self, data: bytes) -> None:
        """Let the library see a frame that it will refuse, byte by byte as it arrives."""
        self._begin_closing()
        self._read_late(data)

    def _read_late(self, data: bytes) -> None:
        """What arrives once we are closing: only the library's close handshake matters."""
        is_websocket = self.protocol.state is not State.CONNECTING
        if data and is_websocket and not self.protocol.reader.eof:
            self.protocol.receive_data(data)
            self.protocol.events_received()
            self._send_library_data()

    def _feed_library(self, frame: bytes) -> None:
        self.protocol.receive_data(frame)
        for event in self.protocol.events_received():
            if isinstance(event, Frame) and event.opcode in (TEXT, BINARY, CONT):
                self._assemble(event)
        self._send_library_data()

    def _assemble(self, frame: Frame) -> None:
        """Collect the fragments of a message; handle it when it is whole."""
        if self._parts is None:
            self._parts = []
            self._parts_are_text = frame.opcode is TEXT
        if len(self._parts) >= MAX_FRAGMENTS:
            return self._fail(CloseCode.MESSAGE_TOO_BIG, "too many fragments")
        self._parts.append(bytes(frame.data))
        if not frame.fin:
            return
        payload, self._parts = b"".join(self._parts), None
        self.manager.messages_in += 1
        assert self.door is not None
        try:
            answer = self.door.receive(payload, self._parts_are_text)
        except FAULTS as exc:
            self._receive_failed(payload, self._parts_are_text, exc)
        else:
            if answer is not None:
                self.send_frame(frame_text(answer))

    def _receive_failed(self, payload: bytes, is_text: bool, exc: BaseException) -> None:
        """Text that is not UTF-8 ends the connection (RFC 6455, 8.1); a bug of ours does not."""
        try:
            if is_text:
                payload.decode()
        except UnicodeDecodeError as bad:
            self._fail(CloseCode.INVALID_DATA, f"{bad.reason} at position {bad.start}")
        else:
            self.manager.log_error(f"{self.name} message failed", exc)
            if not isinstance(self.door, SocketSession):  # there it would be no packet
                self.send_frame(frame_text(INTERNAL_ERROR))

    def _fail(self, code: CloseCode, reason: str) -> None:
        if self.protocol.state is State.OPEN:
            self.protocol.fail(code, reason)
        self._send_library_data()

    # Messages to frames.

    def send_frame(self, frame: bytes, *, is_delivery: bool = False) -> None:
        """Send one or more frames, behind the answers of this read or of this turn of the loop.

        Never waits. A client whose unsent bytes are over its limit gets no more: it is dropped.
        """
        if self.phase is not _OPEN:
            return
        if self._holds & HOLD_WRITES and self.is_behind:
            return self.manager.drop_slow(self)
        if not self.is_queueing:
            self.is_queueing = True
            self.loop.call_soon(self.flush)
        self._queue.append(frame)
        if is_delivery:
            self.manager.messages_out -= 1  # the flush will count it, and so do deliveries
        if len(frame) > FLUSH_BYTES or len(self._queue) >= FLUSH_FRAMES:
            self.flush()
            self.is_queueing = True  # as the read or the callback that will flush the rest expects

    def write(self, data: bytes) -> None:
        """Give the socket what it takes at once, and the transport the rest."""
        fd = self.fd
        if fd < 0 or self._holds & HOLD_WRITES:
            return self.transport.write(data)
        try:
            sent = os.write(fd, data)
        except BlockingIOError:
            sent = 0
        except OSError:
            return self.abort()  # the peer is gone
        if sent < len(data):
            self.transport.write(memoryview(data)[sent:])

    def abort(self) -> None:
        """Cut the connection; nothing that has arrived is read any more."""
        if self.reader is not None:
            self.reader.remove(self)
        self._holds |= HOLD_CLOSED
        self.transport.abort()

    def allow(self, size: int) -> None:
        """That much more may be unsent: it was asked for, and is no sign of a slow client."""
        self.allowance = size + (0 if self.is_writable else self.allowance)

    @property
    def is_behind(self) -> bool:
        """Has its socket left more bytes untaken than it may?"""
        limit = self.manager.config.max_unsent_bytes + self.allowance
        return self.transport.get_write_buffer_size() > limit

    @property
    def is_writable(self) -> bool:
        """Does the client read as fast as we write?"""
        return not self._holds & HOLD_WRITES

    async def drained(self) -> None:
        """Wait while the client reads more slowly than we write to it."""
        if self._holds & HOLD_WRITES and self.phase is Phase.OPEN:
            if self._drained is None:
                self._drained = self.loop.create_future()
            await asyncio.shield(self._drained)

    def _wake_writers(self) -> None:
        if self._drained is not None:
            self._drained.set_result(None)
            self._drained = None

    def flush(self) -> None:
        """Write what is queued, in one piece."""
        self.is_queueing = False
        queue, manager = self._queue, self.manager
        count = len(queue)
        if count == 1:
            frames = queue.pop()
        elif count:
            frames = b"".join(queue)
            queue.clear()
        if count and self.phase is _OPEN:
            manager.messages_out += count
            manager.bytes_out += len(frames)
            self.write(frames)

    def _send_library_data(self) -> None:
        """Write what the library has to say, behind our own answers; follow it into closing."""
        pieces = self.protocol.data_to_send()
        if self.protocol.state is State.OPEN:
            if pieces:  # pongs, which keep their place among the answers
                self.send_frame(b"".join(pieces))
            return
        self.flush()
        # Behind a close frame come pongs alone; who does not read them gets no more.
        if pieces and (self.phase is Phase.OPEN or not self.is_behind):
            self.write(b"".join(pieces))
        self._begin_closing()
        if self.protocol.eof_sent and pieces and not pieces[-1]:
            self._half_close()

    def _half_close(self) -> None:
        """Say that nothing more comes; the peer's own end closes the socket, or the deadline."""
        try:
            if self.transport.can_write_eof():
                self.transport.write_eof()
            else:  # TLS
                self.transport.close()
        except (OSError, RuntimeError):
            self.abort()  # the peer is gone already

    # Back-pressure.

    def hold(self, reason: int) -> None:
        """Stop reading this client, for one of the HOLD_ reasons."""
        if not self._holds:
            self._pause_reading()
        self._holds |= reason

    def release(self, reason: int) -> None:
        """Undo `hold`; reading goes on when no reason is left."""
        if not self._holds & reason:
            return
        self._holds &= ~reason
        if not self._holds and not self.transport.is_closing():
            self._resume_reading()
            self._need = 0
            # Not now: the caller may be in the middle of handling another message.
            self.loop.call_soon(self._read_held)

    def _pause_reading(self) -> None:
        if self.reader is not None:
            self.reader.remove(self)
        elif not self.transport.is_closing():
            self.transport.pause_reading()

    def _resume_reading(self) -> None:
        if self.transport.is_closing():
            return
        if self.reader is not None:
            self.reader.add(self)
        else:
            self.transport.resume_reading()

    def _read_held(self) -> None:
        if self._tail is not None and not self._holds and self.phase is Phase.OPEN:
            self.data_received(b"")

    # Heartbeat and closing.

    def open(self, door: Door, ping_interval_s: float) -> None:
        """The handshake is done: from here on `door` gets the messages."""
        self.protocol.state = State.OPEN
        self.protocol.parser = self.protocol.parse()  # past the HTTP head, which was ours
        next(self.protocol.parser)
        self.door = door
        self.phase = Phase.OPEN
        if self.fd >= 0:
            self._pause_reading()
            self.reader = self.manager.reader
            if not self._holds:
                self._resume_reading()
        self.next_ping = self.deadline = self.loop.time() + ping_interval_s

    def on_deadline(self, now: float) -> None:
        """Called by the manager's sweep when `deadline` has passed."""
        if self.phase is Phase.OPEN and self.door is not None:
            self.door.on_deadline(now)
        elif self.phase in (Phase.HEAD, Phase.BODY):
            refuse_late_request(self)
        else:
            self.abort()

    def heartbeat(self, now: float, interval_s: float, frame: bytes) -> None:
        """Ping when it is time, drop the peer when the last ping met only silence."""
        timeout_s = self.manager.config.ping_timeout_s
        if self.heard or self._holds & ~HOLD_WRITES:  # while we don't read it, we can't hear it
            self.pinged_at = None
        if self.pinged_at is not None and now >= self.pinged_at + timeout_s:
            self.manager.count_drop(self, "silent")
            self.close(CloseCode.INTERNAL_ERROR, "keepalive ping timeout")
            return self.abort()
        if now >= self.next_ping:
            self.next_ping = now + interval_s
            self.heard = False
            if self.pinged_at is None:
                self.pinged_at = now
            self.send_frame(frame)
        silence = NEVER if self.pinged_at is None else self.pinged_at + timeout_s
        self.deadline = min(self.next_ping, silence)

    def close(self, code: int, reason: str = "") -> None:  # type: ignore[override]
        """Start the closing handshake; the socket is cut if the peer does not answer in time."""
        if self.phase is Phase.OPEN and self.protocol.state is State.OPEN:
            # 125 bytes hold the code and a reason of 123 (RFC 6455, 5.5).
            self.protocol.send_close(code, reason.encode()[:123].decode(errors="ignore"))
            self._send_library_data()

    def _begin_closing(self) -> None:
        if self.phase is not Phase.OPEN or self.door is None:
            return
        self.flush()
        self.phase = Phase.CLOSING  # first: nothing that leaving causes may follow the close
        self.door.leave()
        self.deadline = self.loop.time() + self.manager.config.close_timeout_s
        if self._holds:
            self._resume_reading()  # for the peer's own close frame
        self._holds |= HOLD_CLOSED
        tail, self._tail = self._tail, None
        if tail:
            self._read_late(bytes(tail))


_READERS: dict[Phase, Callable[[Connection, bytes], None]] = {
    Phase.HEAD: lambda connection, data: read_head(connection, data),
    Phase.BODY: lambda connection, data: read_body(connection, data),
    Phase.ANSWERING: lambda connection, data: None,  # a pipelined request: a socket serves one
    Phase.CLOSING: Connection._read_late,
    Phase.CLOSED: lambda connection, data: None,
}


# --- 5 clients ---------------------------------------------------------------------------------
# What a peer is once it is in. A door turns messages into requests and answers into messages;
# a client is who asked. On the raw door and over HTTP one object is both. A Socket.IO session is
# a door with one client for each namespace it has joined.


class Door:
    """What a Connection hands its messages to."""

    __slots__ = ()

    def receive(self, payload: bytes, is_text: bool) -> bytes | None:
        """Handle one message; the text to send now, if any. May raise: the message is answered."""
        raise NotImplementedError

    def on_deadline(self, now: float) -> None:
        """The connection's deadline has passed: heartbeat, or time-outs of the door's own."""
        raise NotImplementedError

    def leave(self) -> None:
        """The connection closes: cancel what runs for it."""
        raise NotImplementedError


class Client:
    """One peer, as commands, handlers and embedding programs see it.

    `id` names it in logs; `door` is "raw", "socket.io" or "http"; `auth` is what a Socket.IO client
    gave when it connected.
    """

    __slots__ = ("__weakref__", "auth", "calls", "connection", "id", "manager")
    door: ClassVar[str] = ""
    namespace = "/"

    def __init__(self, connection: Connection, id: str) -> None:
        self.connection = connection
        self.manager = connection.manager
        self.id = id
        self.auth: dict[str, Any] = {}
        self.calls: Calls | None = None  # made when the first command does not end at once

    async def send(self, type: str, data: Any) -> None:
        """Send one envelope; wait while the client reads more slowly than it is written to."""
        self.deliver(encode_json({"type": type, "data": data}), None)
        await self.connection.drained()

    async def emit(self, event: str, *args: Any) -> None:
        """Send a Socket.IO event; to a raw client, an envelope of that type.

        Raises TypeError for arguments that can't be encoded.
        """
        await self.send(event, args[0] if len(args) == 1 else list(args))

    async def disconnect(self, reason: str = "") -> None:
        """Close this client's connection."""
        self.connection.close(CloseCode.NORMAL_CLOSURE, reason)

    def deliver(self, envelope: bytes, ack: int | None) -> None:
        """Send one encoded envelope: as the ack of that id, or as a message."""
        raise NotImplementedError

    def encode_special(self, envelope: dict[str, Any], ack: int | None) -> bool:
        """Send an answer that JSON can't hold in a form of the door's own, if it has one."""
        return False

    def cancel_calls(self) -> None:
        """The client is gone: cancel its running commands, forget its waiting ones."""
        if self.calls is not None:
            self.calls.abandon()


class RawClient(Client, Door):
    """The raw door: each message is a JSON request or answer."""

    __slots__ = ()
    door = "raw"

    def receive(self, payload: bytes, is_text: bool) -> bytes | None:
        try:
            message = loads(payload)
        except JSONDecodeError:
            if is_text:
                payload.decode()  # UnicodeDecodeError: the connection ends with 1007
            return INVALID_JSON
        if type(message) is dict and "jsonrpc" not in message:
            return handle_rpc(self, message, None, len(payload))
        return handle_other(self, message, len(payload))

    def on_deadline(self, now: float) -> None:
        self.connection.heartbeat(now, self.manager.config.raw_ping_interval_s, PING_FRAME)

    def deliver(self, envelope: bytes, ack: int | None) -> None:
        self.connection.send_frame(frame_text(envelope))

    def leave(self) -> None:
        self.manager.leave(self, self.manager.raw, "transport close")


class OverriddenRawClient(RawClient):
    """The raw door of a manager whose `handle_message` was overridden by its program."""

    __slots__ = ()

    def receive(self, payload: bytes, is_text: bool) -> bytes | None:
        answer = self.manager.handle_message(self, payload, is_text)
        if isinstance(answer, str):
            return answer.encode()
        if answer is not None:
            self.connection.send_frame(frame_binary(answer))
        return None


class HttpClient(Client, Door):
    """One HTTP request whose answer comes when its command has ended."""

    __slots__ = ()
    door = "http"

    def deliver(self, envelope: bytes, ack: int | None) -> None:
        message = loads(envelope)
        if message["type"] != "command_progress":  # HTTP has one answer
            is_error = message["type"] == "error"
            status = HTTP_STATUS.get(message["data"]["code"], 500) if is_error else 200
            send_response(self.connection, status, envelope)

    async def send(self, type: str, data: Any) -> None:
        pass  # HTTP has one answer, the request's own

    def leave(self) -> None:
        self.cancel_calls()


class Standing(Enum):
    """Where a Socket.IO session stands in a namespace."""

    ABSENT = "absent"
    CONNECTING = "connecting"  # the CONNECT answer is still to come
    CONNECTED = "connected"


class SocketClient(Client):
    """A Socket.IO client: one session in one namespace."""

    __slots__ = ("_held", "ack_head", "event_head", "namespace", "pid", "recovered", "session")
    door = "socket.io"

    def __init__(self, session: SocketSession, namespace: str, auth: dict[str, Any]) -> None:
        super().__init__(session.connection, "")
        self.session = session
        self.namespace = namespace
        self.auth = auth
        prefix = encode_namespace(namespace)
        self.event_head = b"42" + prefix + b'["rpc_response",'
        self.ack_head = b"43" + prefix
        self.pid: str | None = None
        self.recovered = False
        self._held: list[bytes] | None = []  # frames that must follow the CONNECT answer

    async def emit(self, event: str, *args: Any) -> None:
        values = [event, *args]
        if self.manager.recovers and isinstance(values[-1], str):
            # socket.io-client takes an event's last string for its recovery offset.
            values.append(self.manager.flushed)
        self.send_packet(Packet(PacketType.EVENT, self.namespace, values))
        await self.connection.drained()

    async def disconnect(self, reason: str = "") -> None:
        """End this namespace's connection; the session may hold others."""
        self.send_packet(Packet(PacketType.DISCONNECT, self.namespace))
        self.session.remove(self, "server namespace disconnect")

    def deliver(self, envelope: bytes, ack: int | None) -> None:
        self.send_frame(frame_text(self.wrap(envelope, ack)))

    def wrap(self, envelope: bytes, ack: int | None) -> bytes:
        """An envelope as the text of an ack or of an `rpc_response` event."""
        if ack is None:
            return self.event_head + envelope + b"]"
        return b"".join((self.ack_head, b"%d[" % ack, envelope, b"]"))

    def encode_special(self, envelope: dict[str, Any], ack: int | None) -> bool:
        packet = Packet(PacketType.ACK, self.namespace, [envelope], ack)
        if ack is None:
            packet = Packet(PacketType.EVENT, self.namespace, ["rpc_response", envelope])
        try:
            self.send_packet(packet)
        except (TypeError, ValueError):
            return False
        return True

    def send_packet(self, packet: Packet) -> None:
        """Send a packet with its attachments. Raises TypeError or ValueError if it has no form."""
        text, *attachments = encode_packet(packet)
        self.send_frame(b"".join([frame_text(b"4" + text), *map(frame_binary, attachments)]))

    def send_frame(self, frame: bytes) -> None:
        """Send frames now, or behind the CONNECT answer while that is still to come."""
        if self._held is not None:
            self._held.append(frame)
        elif self.is_present:
            self.connection.send_frame(frame)

    def accept(self, missed: Iterable[tuple[str, bytes]]) -> None:
        """Send what the client missed, the CONNECT answer, and what was held back for it."""
        held, self._held = self._held or (), None
        self.session.connected[encode_namespace(self.namespace)] = self
        for offset, envelope in missed:
            self.send_frame(frame_text(encode_broadcast(self.event_head, envelope, offset)))
        answer = {"sid": self.id} if self.pid is None else {"sid": self.id, "pid": self.pid}
        self.send_packet(Packet(PacketType.CONNECT, self.namespace, answer))
        for frame in held:
            self.send_frame(frame)

    @property
    def is_present(self) -> bool:
        """Has it not left its namespace?"""
        return self.session.clients.get(self.namespace) is self

    @property
    def standing(self) -> Standing:
        """CONNECTING until it is accepted."""
        return Standing.CONNECTED if self._held is None else Standing.CONNECTING


def encode_broadcast(event_head: bytes, envelope: bytes, offset: str | None) -> bytes:
    """A broadcast as Socket.IO text; the trailing offset is what its client recovers with."""
    if offset is None:
        return event_head + envelope + b"]"
    return event_head + envelope + b',"' + offset.encode() + b'"]'


def new_id() -> str:
    """A session id or pid that can't be guessed: 20 characters, as socket.io's."""
    return secrets.token_urlsafe(15)


def sid_of(pid: str) -> str:
    """The public Socket.IO id of a private one: a recovered client keeps its id on any node."""
    return urlsafe_b64encode(hashlib.sha256(pid.encode()).digest()[:15]).decode()


class SocketSession(Door):
    """One Engine.IO session: the packets of a Socket.IO client, its namespaces, its heartbeat."""

    __slots__ = (
        "attachments", "attachments_bytes", "clients", "connect_deadline", "connected",
        "connection", "is_authorized", "manager", "pending", "sid",
    )  # fmt: skip

    def __init__(self, connection: Connection, is_authorized: bool) -> None:
        self.connection = connection
        self.manager = connection.manager
        self.sid = new_id()
        self.clients: dict[str, SocketClient] = {}  # connecting ones too
        self.connected: dict[bytes, SocketClient] = {}  # by the namespace as packets have it
        self.is_authorized = is_authorized  # by the handshake; else each CONNECT needs the token
        self.pending: Packet | None = None  # a packet whose attachments are still to come
        self.attachments: list[bytes] = []
        self.attachments_bytes = 0
        self.connect_deadline = connection.loop.time() + self.manager.config.connect_timeout_s

    def start(self) -> None:
        """Send the Engine.IO open packet."""
        config = self.manager.config
        handshake = {
            "sid": self.sid,
            "upgrades": [],
            "pingInterval": round(config.engine_ping_interval_s * 1000),
            "pingTimeout": round(config.ping_timeout_s * 1000),
            "maxPayload": config.max_message_bytes,
        }
        self.connection.send_frame(frame_text(b"0" + dumps(handshake)))
        self.connection.deadline = min(self.connection.deadline, self.connect_deadline)

    def receive(self, payload: bytes, is_text: bool) -> bytes | None:
        try:
            if not is_text:
                return self._receive_attachment(payload)
            start = payload.find(b"[")
            if start > 0 and payload.startswith(b"42") and self.pending is None:
                # The fast lane, for `42/ws,7["rpc",{...}]`.
                head = payload[2:start]
                prefix = head.rstrip(b"0123456789")
                client = self.connected.get(prefix)
                if client is not None and len(head) - len(prefix) <= MAX_ACK_DIGITS:
                    ack = int(head[len(prefix) :]) if len(head) > len(prefix) else None
                    return handle_event(client, decode_event(payload[start:]), ack, len(payload))
            handler = _ENGINE_HANDLERS.get(payload[:1])
            if handler is None:
                raise BadPacket("unknown packet type")
            return handler(self, payload)
        except BadPacket as bad:
            if is_text:
                payload.decode()  # UnicodeDecodeError: 1007 rather than 1002
            self.manager.count_drop(self.connection, "protocol")
            self.connection.close(CloseCode.PROTOCOL_ERROR, str(bad))
        return None

    # Engine.IO packets.

    def _receive_message(self, payload: bytes) -> bytes | None:
        if self.pending is not None:
            raise BadPacket("text while attachments are pending")
        packet = decode_packet(payload[1:])
        handler = self._find_handler(packet)  # first: what may not be sent is not kept either
        if packet.attachments:
            self.pending = packet
            return None
        return handler(self, packet, len(payload))

    def _receive_attachment(self, payload: bytes) -> bytes | None:
        if self.pending is None:
            raise BadPacket("binary frame without a packet")
        self.attachments.append(payload)
        self.attachments_bytes += len(payload)
        if self.attachments_bytes > self.manager.config.max_message_bytes:
            self.connection.close(CloseCode.MESSAGE_TOO_BIG, "attachments are too large")
            return None
        if len(self.attachments) < self.pending.attachments:
            return None
        packet, attachments, size = self.pending, self.attachments, self.attachments_bytes
        self.pending, self.attachments, self.attachments_bytes = None, [], 0
        packet = packet._replace(data=insert_attachments(packet.data, attachments))
        return self._find_handler(packet)(self, packet, size)

    # Socket.IO packets.

    def _find_handler(self, packet: Packet) -> SocketHandler:
        client = self.clients.get(packet.namespace)
        standing = Standing.ABSENT if client is None else client.standing
        handler = _SOCKET_HANDLERS.get((standing, packet.type))
        if handler is None and packet.type in _EVENT_KINDS:
            raise BadPacket("event before connect")
        if handler is None:
            raise BadPacket(f"{packet.type.name} while {standing.value}")
        return handler

    def _connect(self, packet: Packet, size: int) -> None:
        self.manager.connect_socket(self, packet.namespace, packet.data or {})

    def _event(self, packet: Packet, size: int) -> bytes | None:
        return handle_event(self.clients[packet.namespace], packet.data, packet.ack, size)

    def _disconnect(self, packet: Packet, size: int) -> None:
        self.remove(self.clients[packet.namespace], "client namespace disconnect")

    def _give_up(self, packet: Packet, size: int) -> None:
        """Leave before the connect handler has decided; until it has, nothing more is read.

        Else a peer that joins and leaves in turn would start such handlers without end.
        """
        self.connection.hold(HOLD_CONNECT)
        self._disconnect(packet, size)

    def refuse(self, namespace: str, message: str, **data: Any) -> None:
        """Answer a CONNECT with CONNECT_ERROR, which is always an object."""
        error = {"message": message, "data": data} if data else {"message": message}
        [text] = encode_packet(Packet(PacketType.CONNECT_ERROR, namespace, error))
        self.connection.send_frame(frame_text(b"4" + text))

    def remove(self, client: SocketClient, reason: str) -> None:
        """A client leaves its namespace; the session goes on."""
        if self.clients.get(client.namespace) is client:
            del self.clients[client.namespace]
            self.connected.pop(encode_namespace(client.namespace), None)
            self.manager.leave(client, self.manager.sockets[client.namespace], reason)

    def leave(self) -> None:
        self.manager.sessions.discard(self)
        self.pending, self.attachments = None, []
        for client in tuple(self.clients.values()):
            self.remove(client, "transport close")

    def on_deadline(self, now: float) -> None:
        if not self.clients and now >= self.connect_deadline:
            self.manager.count_drop(self.connection, "no namespace")
            return self.connection.close(CloseCode.POLICY_VIOLATION, "no namespace joined in time")
        interval_s = self.manager.config.engine_ping_interval_s
        self.connection.heartbeat(now, interval_s, ENGINE_PING_FRAME)
        if not self.clients:
            self.connection.deadline = min(self.connection.deadline, self.connect_deadline)


# State machines as data; what is absent is the peer's mistake.
SocketHandler = Callable[[SocketSession, Packet, int], "bytes | None"]
_ENGINE_HANDLERS: dict[bytes, Callable[[SocketSession, bytes], bytes | None]] = {
    b"1": lambda session, payload: session.connection.close(CloseCode.NORMAL_CLOSURE),
    b"3": lambda session, payload: None,  # a pong: any frame counts as life
    b"4": SocketSession._receive_message,
}
_SOCKET_HANDLERS: dict[tuple[Standing, PacketType], SocketHandler] = {
    (Standing.ABSENT, PacketType.CONNECT): SocketSession._connect,
    (Standing.CONNECTING, PacketType.DISCONNECT): SocketSession._give_up,
    (Standing.CONNECTED, PacketType.DISCONNECT): SocketSession._disconnect,
    (Standing.CONNECTED, PacketType.EVENT): SocketSession._event,
    (Standing.CONNECTED, PacketType.BINARY_EVENT): SocketSession._event,
    (Standing.CONNECTED, PacketType.ACK): lambda session, packet, size: None,  # we ask for none
    (Standing.CONNECTED, PacketType.BINARY_ACK): lambda session, packet, size: None,
}


# --- 6 manager ---------------------------------------------------------------------------------
# WebSocketManager knows who is connected and what a program registered. A broadcast is encoded
# once, framed once for each door, joined with the others of the same loop iteration, and written
# to every client without waiting for any. The history of broadcasts answers clients that return.


class History:
    """The latest broadcasts, each under its offset; bounded by count and by bytes.

    When a bound is passed the oldest go, and clients that last saw something older get a gap.
    """

    def __init__(self, max_messages: int, max_bytes: int, start: str) -> None:
        self.max_messages = max_messages
        self.max_bytes = max_bytes
        self.bytes = 0
        self.entries: deque[tuple[str, bytes]] = deque()
        self.last = start
        self._base = start  # the offset just before the first entry
        self._first = 0  # the number of the first entry
        self._numbers = {start: 0}  # offset -> number of the entry that follows it

    def append(self, offset: str, envelope: bytes) -> None:
        """Add the newest broadcast."""
        self.entries.append((offset, envelope))
        self.bytes += len(envelope)
        self._numbers[offset] = self._first + len(self.entries)
        self.last = offset
        while len(self.entries) > self.max_messages or self.bytes > self.max_bytes:
            del self._numbers[self._base]
            self._base, oldest = self.entries.popleft()
            self.bytes -= len(oldest)
            self._first += 1

    def since(self, offset: str) -> list[tuple[str, bytes]] | None:
        """What followed `offset`, oldest first; None when it is unknown or too old."""
        number = self._numbers.get(offset)
        if number is None:
            return None
        count = self._first + len(self.entries) - number
        return list(self.entries)[-count:] if count else []


class StreamHistory(History):
    """History whose offsets are ids of a stream that several processes share.

    They have an order, so an offset that another process gave a client is understood even if no
    broadcast is kept under it: that process may have begun there, or skipped a foreign entry.
    """

    def since(self, offset: str) -> list[tuple[str, bytes]] | None:
        missed = super().since(offset)
        if missed is not None:
            return missed
        try:
            wanted = stream_id(offset)
        except ValueError:
            return None  # of another kind of history
        if wanted < stream_id(self._base):
            return None
        entries = list(self.entries)
        return entries[bisect_right(entries, wanted, key=lambda entry: stream_id(entry[0])) :]


class LogGate:
    """Lets the first lines of each kind through and counts the rest: a flood can't fill a disk."""

    BURST = 5  # lines of one kind...
    WINDOW_S = 10.0  # ...in this time
    MAX_KINDS = 50  # a peer can make up kinds, such as origins; the rest are one kind together

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._until = 0.0

    def admits(self, kind: str) -> bool:
        """May a line of this kind be logged now?"""
        if kind not in self._counts and len(self._counts) >= self.MAX_KINDS:
            kind = "other lines"
        count = self._counts[kind] = self._counts.get(kind, 0) + 1
        return count <= self.BURST

    def turn(self, now: float) -> None:
        """Called now and then: a new window begins, and the old one's silence is summed up."""
        if now >= self._until:
            for kind, count in self._counts.items():
                if count > self.BURST:
                    log.warning("%s: %d more in %.0f s", kind, count - self.BURST, self.WINDOW_S)
            self._counts.clear()
            self._until = now + self.WINDOW_S


LATENCY_BUCKETS_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0)


class Metrics:
    """Counters for `/metrics`, by label. Hot ones are plain integers of the manager."""

    def __init__(self) -> None:
        self.errors: defaultdict[str, int] = defaultdict(int)
        self.refusals: defaultdict[str, int] = defaultdict(int)
        self.drops: defaultdict[str, int] = defaultdict(int)
        self.latency_buckets = [0] * (len(LATENCY_BUCKETS_S) + 1)
        self.latency_sum_s = 0.0
        self.loop_lag_s = 0.0

    def count_task(self, result: str, seconds: float) -> None:
        """One command that was no inline one ended: with "ok" or an error code."""
        if result != "ok":
            self.errors[result] += 1
        self.latency_sum_s += seconds
        self.latency_buckets[bisect_left(LATENCY_BUCKETS_S, seconds)] += 1


class WebSocketManager:
    """The clients of one server, the methods and commands they may use, and broadcast.

    commands: the CommandProcessor to use; a new one with the built-in commands by default.
    services: further services, or replacements for those named "vision" and "language".

    A program registers what it adds before it serves:

        manager = WebSocketManager()

        @manager.commands.command
        async def greet(name: str) -> str:
            "Greet somebody."
            return f"Hello, {name}!"

        asyncio.run(serve(manager, port=8000))
    """

    def __init__(
        self, commands: CommandProcessor | None = None, services: Iterable[Service] = ()
    ) -> None:
        self.commands = commands if commands is not None else CommandProcessor()
        self.services = self._make_services(services)
        self.methods: dict[str, Command] = {}
        self.handlers: dict[str, Command] = {}
        self.notify_commands: tuple[Command, Command]  # without and with a backplane
        add_manager_commands(self)
        self.connections: set[Connection] = set()
        self.raw: set[RawClient] = set()
        self.sessions: set[SocketSession] = set()
        self.tasks: set[asyncio.Task[Any]] = set()
        self.names = itertools.count(1)  # of connections, in logs
        self.bytes_in = self.bytes_out = self.messages_in = self.messages_out = 0
        self.broadcasts = self.deliveries = 0
        self.metrics = Metrics()
        self.log_gate = LogGate()
        self.started_at = utc_now()
        self.is_draining = False
        self.backplane: RedisBackplane | None = None
        self.loop: asyncio.AbstractEventLoop | None = None  # while it serves
        self._thread = 0  # of that loop
        self.reader: SocketReader | None = None  # where the system has epoll
        self.when_empty: asyncio.Event | None = None  # set when the last socket is closed
        self.configure(Config())

    def _make_services(self, given: Iterable[Service]) -> dict[str, Service]:
        services = {service.name: service for service in given}
        vision = services.pop("vision", None) or VisionService()
        language = services.pop("language", None) or LanguageService()
        for service in (vision, language):
            if isinstance(service, VisionService | LanguageService):
                service.register(self.commands)
        # The order in which people read them; the order of status objects too.
        named = {"vision": vision, "language": language, "command": self.commands, **services}
        for service in named.values():
            self._watch(service)
        return named

    def _watch(self, service: Service) -> None:
        service.on_change = self._service_changed
        service.on_touch = self._status_touched

    def configure(self, config: Config) -> None:
        """Take new options. `serve()` does this; a server that runs keeps those it has."""
        self.config = config
        self.epoch = secrets.token_hex(4)
        self.history = History(config.history_messages, config.history_bytes, f"{self.epoch}-0")
        self.flushed = self.history.last  # the offset up to which clients have been written to
        self.sockets: dict[str, set[SocketClient]] = {
            namespace: set() for namespace in ("/", "/ws", "/ws/", *config.namespaces)
        }
        self.max_message_bytes = config.max_message_bytes
        self.max_connections = config.max_clients + PENDING_CONNECTIONS
        # Longest broadcast in the backplane: what came in as a request fits.
        self.max_entry_bytes = max(config.max_message_bytes, config.max_body_bytes) + ENVELOPE_BYTES
        self.commands.timeout_s = config.command_timeout_s
        # What the fast lane may run, unless a program decides about each line itself.
        prepare = getattr(self.commands.prepare, "__func__", None)
        is_ours = prepare is CommandProcessor.prepare
        self.prepared = self.commands.prepared if is_ours else {}
        self.raw_client = RawClient
        if getattr(self.handle_message, "__func__", None) is not WebSocketManager.handle_message:
            self.raw_client = OverriddenRawClient
        # A status that only our own services make up changes only when they say so.
        makers = {type(service).get_status for service in self.services.values()}
        self._status_is_stable = makers <= {Service.get_status, CommandProcessor.get_status}
        self._status_json: bytes | None = None
        self._status_answer: bytes | None = None
        self._status_done = -1  # the count of inline commands that both were made at
        self._offset_number = 0
        self._pending: list[tuple[str, bytes]] = []
        self._pending_bytes = 0

    def use_backplane(self, backplane: RedisBackplane | None) -> None:
        """Share broadcasts through `backplane`, or keep them in this process."""
        self.services.pop("backplane", None)
        self.backplane = backplane
        if self.commands.commands.get("notify") in self.notify_commands:  # no program's own
            # Only with a backplane there is something to wait for.
            self.commands.commands["notify"] = self.notify_commands[backplane is not None]
            self.commands.prepared.clear()
        if backplane is not None:
            self.services["backplane"] = backplane
            self._watch(backplane)
            backplane.receive = self.receive_entry
            backplane.restore = self.restore_history
            backplane.history_messages = self.config.history_messages
            backplane.history_bytes = self.config.history_bytes

    # What an embedding program registers.

    def method(self, name: str, *, inline: bool = False) -> Callable[[Any], Any]:
        """Decorator: clients may call the function as RPC method `name`.

        `params` reach its parameters by name and type; one annotated Context gets the call's
        Context. What it returns is the answer's `data`. `async def` runs on the loop, plain `def`
        in a thread, with `inline=True` at once on the loop (it must never block).
        """

        def register(function: Any) -> Any:
            if name in BUILT_IN_METHODS or name in self.methods:
                raise ValueError(f"method {name!r} exists already")
            self.methods[name] = Command(function, name=name, inline=inline)
            return function

        return register

    def on(self, event: str, *, inline: bool = False) -> Callable[[Any], Any]:
        """Decorator: handle `event` of Socket.IO clients, or any client's coming and going.

        connect      handler(client, auth); raising refuses the client with the error's message
        disconnect   handler(client, reason)
        any event    handler(client, *args); what it returns is the ack, a tuple several values
        """

        def register(function: Any) -> Any:
            if event == "rpc" or event in self.handlers:
                raise ValueError(f"event {event!r} has a handler already")
            self.handlers[event] = as_handler(function, inline)
            return function

        return register

    def handle_message(self, client: Client, payload: bytes, is_text: bool) -> str | bytes | None:
        """Answer one message of the raw door: text for str, binary for bytes, nothing for None.

        A program that speaks a protocol of its own overrides this; it takes the place of requests,
        commands and JSON. It must not block. `payload` is as received: text is not yet checked
        to be UTF-8, and a UnicodeDecodeError raised for such text closes with 1007.
        """
        answer = RawClient.receive(cast(RawClient, client), payload, is_text)
        return None if answer is None else answer.decode()

    # Broadcast.

    def broadcast(self, type: str, data: Any) -> int:
        """Send an envelope to every client; how many of this process will get it.

        Never waits; may be called from any thread. With a backplane it goes to the clients of
        every process, once Redis has taken it. Raises TypeError for data that JSON can't hold,
        Unavailable when the backplane is away, ValueError for what is too long for it.
        """
        body = self._encode_broadcast(type, data)
        if self.loop is None or threading.get_ident() == self._thread:
            self._accept_broadcast(body)
        else:  # a plain `def` command
            self.loop.call_soon_threadsafe(self._accept_broadcast, body)
        return self.count_clients()

    def _accept_broadcast(self, body: bytes) -> None:
        if self.backplane is not None:
            self.backplane.enqueue(body)
        else:
            self._offset_number += 1
            self.receive_broadcast(f"{self.epoch}-{self._offset_number}", body)

    async def publish(self, type: str, data: Any) -> int:
        """`broadcast`, and wait until the backplane has accepted it."""
        if self.backplane is None:
            return self.broadcast(type, data)
        await self.backplane.publish(self._encode_broadcast(type, data))
        return self.count_clients()

    def _encode_broadcast(self, type: str, data: Any) -> bytes:
        body = encode_json({"type": type, "data": data})
        if self.backplane is not None and len(body) > self.max_entry_bytes:
            # No process would take it from the backplane.
            raise ValueError(f"a broadcast must have {self.max_entry_bytes} bytes at most")
        return body

    def notify(self, message: str, level: str = "info") -> int:
        """Broadcast a `notification`. Raises ValueError for a level that does not exist."""
        return self.broadcast("notification", notification(message, level))

    def count_clients(self) -> int:
        """Clients that a broadcast goes to: a Socket.IO session counts once a namespace."""
        return len(self.raw) + sum(map(len, self.sockets.values()))

    def receive_broadcast(self, offset: str, body: bytes, *, is_kept: bool = True) -> None:
        """A broadcast is accepted: keep it and send it to the clients of this process."""
        envelope = with_offset(body, offset)
        if is_kept:
            self.history.append(offset, envelope)
        self._pending.append((offset, envelope))
        self._pending_bytes += len(envelope)
        self.broadcasts += 1
        if self.loop is None:  # nobody is served yet
            self.flush_broadcasts()
        elif len(self._pending) == 1:
            turns = min(len(self.connections) // CLIENTS_A_TURN, MAX_TURNS)
            self.loop.call_soon(self._flush_soon, self.broadcasts, turns)
        elif self._pending_bytes > FLUSH_BROADCAST_BYTES:
            self.flush_broadcasts()

    def receive_entry(self, offset: str, body: bytes) -> None:
        """An entry of the shared stream arrives: any process that reaches Redis may have put it."""
        try:
            body = checked_entry(body, self.max_entry_bytes)
        except ValueError as error:
            if self.log_gate.admits("foreign entry"):
                log.warning("skipped entry %s of the backplane: %s", offset, error)
            return
        self.receive_broadcast(offset, body)

    def restore_history(self, base: str, entries: list[tuple[str, bytes]]) -> None:
        """History is loaded from the backplane: who is a client already may have missed some."""
        self.flush_broadcasts()
        config = self.config
        self.history = StreamHistory(config.history_messages, config.history_bytes, base)
        for offset, body in entries:
            with suppress(ValueError):  # a foreign entry
                body = checked_entry(body, self.max_entry_bytes)
                self.history.append(offset, with_offset(body, offset))
        self.flushed = self.history.last
        self._status_touched()
        gap = encode_error("history_gap", _GAP_TEXT)
        for client in self.all_clients():
            client.deliver(gap, None)

    def all_clients(self) -> list[Client]:
        """Every client that broadcasts go to."""
        return [*self.raw, *(client for members in self.sockets.values() for client in members)]

    def _flush_soon(self, first: int, turns: int) -> None:
        """Flush after some turns of the loop: what is about to be broadcast leaves with it.

        first: the number of the oldest broadcast that waits, unless others have flushed it.
        """
        if self.broadcasts - len(self._pending) + 1 != first:
            return
        if turns:
            cast("asyncio.AbstractEventLoop", self.loop).call_soon(
                self._flush_soon, first, turns - 1
            )
        else:
            self.flush_broadcasts()

    def flush_broadcasts(self) -> None:
        """Write what was broadcast in this iteration of the loop: one write a client."""
        pending, self._pending = self._pending, []
        self._pending_bytes = 0
        if not pending:
            return
        self.flushed = pending[-1][0]
        self._status_answer = None
        self._write_all(b"".join([frame_text(envelope) for _, envelope in pending]), self.raw)
        recovers = self.recovers
        for namespace, clients in self.sockets.items():
            if clients:
                head = b"42" + encode_namespace(namespace) + b'["rpc_response",'
                frames = [
                    frame_text(encode_broadcast(head, envelope, offset if recovers else None))
                    for offset, envelope in pending
                ]
                self._write_all(b"".join(frames), clients)
        self.deliveries += len(pending) * self.count_clients()

    def _write_all(self, frames: bytes, clients: Collection[Client]) -> None:
        write, size, written = os.write, len(frames), 0
        for client in tuple(clients):  # a snapshot: a slow client is dropped while we iterate
            connection = client.connection
            if connection._holds or connection.is_queueing:
                connection.send_frame(frames, is_delivery=True)
                continue
            written += 1
            try:
                sent = write(connection.fd, frames)  # as Connection.write, without the call
            except OSError:  # it takes nothing now, is gone, or its transport has to write
                connection.write(frames)
            else:
                if sent < size:
                    connection.transport.write(memoryview(frames)[sent:])
        self.bytes_out += size * written  # those of the others count when they leave

    @property
    def recovers(self) -> bool:
        """Do Socket.IO clients get offsets and connection state recovery?"""
        return self.config.recovery and self.config.history_messages > 0

    # Status.

    def status(self) -> dict[str, Any]:
        """The status object: one entry for each service."""
        return {name: service.get_status() for name, service in self.services.items()}

    def encode_status(self) -> bytes:
        """The status object as JSON; kept until a service changes."""
        if self._status_json is None or self._status_done != self.commands.done:
            # A status that others make up may change at any time: it is never kept.
            self._status_done = self.commands.done if self._status_is_stable else -1
            self._status_json = encode_json(self.status())
            self._status_answer = None  # made from the one before
        return self._status_json

    def encode_status_answer(self) -> bytes:
        """The answer to `get_status` up to its id; kept until the status or the offset changes."""
        if self._status_answer is None or self._status_done != self.commands.done:
            answer = b'{"type":"status_update","data":%b,"offset":"%b"' % (
                self.encode_status(), self.flushed.encode()
            )  # fmt: skip
            if self.backplane is not None:
                answer += b',"node":"%b"' % self.epoch.encode()
            self._status_answer = answer
        return self._status_answer

    def _status_touched(self) -> None:
        self._status_json = self._status_answer = None

    def _service_changed(self, service: Service) -> None:
        """Tell every client of this process the whole status."""
        self._status_touched()
        if self.backplane is None:
            self.broadcast("status_update", self.status())
            return
        # Status is per node: it does not enter the shared stream, and leaves offsets as they are.
        body = encode_json({"type": "status_update", "data": self.status(), "node": self.epoch})
        self.receive_broadcast(self.history.last, body, is_kept=False)

    # Who comes and goes.

    def adopt(self, connection: Connection) -> None:
        """A socket was accepted."""
        if len(self.connections) >= self.max_connections:
            self.metrics.refusals["too many sockets"] += 1
            if self.log_gate.admits("too many sockets"):
                log.warning("%s cut: too many sockets (--max-clients)", connection.name)
            connection.abort()
        self.connections.add(connection)

    def release(self, connection: Connection) -> None:
        """A socket is closed."""
        self.connections.discard(connection)
        if not self.connections and self.when_empty is not None:
            self.when_empty.set()

    @property
    def is_full(self) -> bool:
        """Are there as many clients as there may be?"""
        return len(self.raw) + len(self.sessions) >= self.config.max_clients

    def join_raw(self, client: RawClient, since: str | None) -> None:
        """A raw client is in: replay what it missed, then it is live."""
        if since is not None and self._is_ahead(since):
            self.spawn(self._join_raw_later(client, since))
        else:
            self._join_raw(client, since)

    async def _join_raw_later(self, client: RawClient, since: str) -> None:
        await self._until_read(since)
        if client.connection.phase is Phase.OPEN:
            self._join_raw(client, since)

    def _join_raw(self, client: RawClient, since: str | None) -> None:
        self.flush_broadcasts()  # to the others: this one gets them from the history
        self.raw.add(client)
        if since is not None:
            missed = self._missed(since)
            if missed is None:
                client.deliver(encode_error("history_gap", _GAP_TEXT), None)
            else:
                client.connection.allow(_replay_bytes(missed))
                for _, envelope in missed:
                    client.deliver(envelope, None)
                self._catch_up(client)
        if "connect" in self.handlers:
            client.connection.hold(HOLD_CONNECT)
            self.spawn(self._welcome_raw(client))

    async def _welcome_raw(self, client: RawClient) -> None:
        error = await self._run_handler("connect", client, client.auth)
        if error is not None:
            client.connection.close(CloseCode.POLICY_VIOLATION, error)
        client.connection.release(HOLD_CONNECT)

    def connect_socket(self, session: SocketSession, namespace: str, auth: dict[str, Any]) -> None:
        """A Socket.IO client asks for a namespace: answer, now or when its handler has decided."""
        if namespace not in self.sockets:
            return session.refuse(namespace, "Invalid namespace")
        if not session.is_authorized and not token_matches(self.config.token, auth.get("token")):
            self.metrics.refusals["token"] += 1
            return session.refuse(namespace, "unauthorized: " + _TOKEN_TEXT, code="unauthorized")
        client = SocketClient(session, namespace, auth)
        session.clients[namespace] = client
        if "connect" in self.handlers or self._is_ahead(_offset_of(client)):
            self.spawn(self._welcome_socket(client))
        else:
            self._join_socket(client)

    async def _welcome_socket(self, client: SocketClient) -> None:
        await self._until_read(_offset_of(client))
        error = None
        if "connect" in self.handlers and client.is_present:
            hidden = ("pid", "offset")
            auth = {key: value for key, value in client.auth.items() if key not in hidden}
            error = await self._run_handler("connect", client, auth)
        if not client.is_present:
            client.connection.release(HOLD_CONNECT)  # it has left meanwhile, and is read again
        elif error is None:
            self._join_socket(client)
        else:
            del client.session.clients[client.namespace]
            client.session.refuse(client.namespace, error)

    def _join_socket(self, client: SocketClient) -> None:
        client.session.connect_deadline = NEVER  # not earlier: the handler may have refused it
        self.flush_broadcasts()  # to the others, as for a raw client
        offset = _offset_of(client)
        pid, _ = client.auth.pop("pid", None), client.auth.pop("offset", None)
        missed = self._missed(offset) if self.recovers and offset else None
        if self.recovers:
            # The offset is for a client that is cut off before it has seen one.
            client.pid = pid if missed is not None else f"{new_id()}.{self.flushed}"
        client.id = new_id() if client.pid is None else sid_of(client.pid)
        client.recovered = missed is not None
        self.sockets[client.namespace].add(client)
        client.connection.allow(_replay_bytes(missed or ()))
        client.accept(missed or ())
        if missed is not None:
            self._catch_up(client)

    def _missed(self, offset: str) -> list[tuple[str, bytes]] | None:
        """What a client that returns has not seen; it is not among those flushed to yet."""
        return None if self._is_ahead(offset) else self.history.since(offset)

    def _is_ahead(self, offset: str) -> bool:
        """Has another process sent this to a client, while it is still on its way to this one?"""
        return self.backplane is not None and self.backplane.is_ahead(offset)

    async def _until_read(self, offset: str) -> None:
        """Wait a bounded time, or the client would get again what it has seen elsewhere."""
        until = time.monotonic() + LAG_S
        while self._is_ahead(offset) and time.monotonic() < until:
            await asyncio.sleep(0.01)

    def _catch_up(self, client: Client) -> None:
        """Status is not in the shared history of a backplane: a client that returns gets it."""
        if self.backplane is not None:
            client.deliver(Request(client, None, None, 0).encode_status(), None)

    def leave(self, client: Client, members: set[Any], reason: str) -> None:
        """A client is gone from `members`, if it was let in at all."""
        client.cancel_calls()
        if client in members:
            members.remove(client)
            if "disconnect" in self.handlers:
                self.spawn(self._run_handler("disconnect", client, reason))

    async def _run_handler(self, event: str, client: Client, value: Any) -> str | None:
        """Run a connect or disconnect handler; the message of its error, if any."""
        try:
            call = Call(self.handlers[event], [client, value], {})
            await self.commands.run(call, Context(client))
        except ServiceError as error:
            return encodable(str(error))
        return None

    def drop_slow(self, connection: Connection) -> None:
        """A client reads too slowly: it gets no more, and may come back through its offset."""
        self.count_drop(connection, "slow")
        limit = self.config.max_unsent_bytes
        connection.close(CloseCode.TRY_AGAIN_LATER, f"over {limit} bytes unread (--max-unsent)")

    def count_drop(self, connection: Connection, reason: str) -> None:
        """A client is dropped by us."""
        self.metrics.drops[reason] += 1
        if self.log_gate.admits(f"dropped, {reason}"):
            log.warning("%s dropped: %s", connection.name, reason)

    def log_error(self, what: str, exc: BaseException) -> None:
        """Log a bug of ours, or of a handler, with its traceback."""
        if self.log_gate.admits("error"):
            # The traceback ends with the exception's text, or says that it has none to show.
            log.error("%s: %s", what, type(exc).__name__, exc_info=exc)

    # Tasks.

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run `work` in a task of this manager; from Python 3.12 on, at once to its first wait."""
        eager: dict[str, Any] = {"eager_start": True} if sys.version_info >= (3, 12) else {}
        task = asyncio.Task(work, loop=asyncio.get_running_loop(), **eager)
        if not task.done():
            self.tasks.add(task)
            task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, ServiceError):  # those have been answered
            self.log_error("task failed", error)

    async def sweep(self) -> None:
        """Until cancelled: every deadline of every socket, from one task instead of one each."""
        config = self.config
        shortest = min(
            config.raw_ping_interval_s, config.engine_ping_interval_s, config.ping_timeout_s,
            config.connect_timeout_s, config.open_timeout_s, config.close_timeout_s,
        )  # fmt: skip
        tick = min(1.0, shortest / 4)
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + tick
            await asyncio.sleep(tick)
            now = loop.time()
            self.metrics.loop_lag_s = max(0.0, now - due)
            self.log_gate.turn(now)
            for connection in tuple(self.connections):
                if connection.deadline > now:
                    continue
                try:
                    connection.on_deadline(now)
                except Exception as exc:
                    self.log_error(f"{connection.name} deadline failed", exc)
                    connection.abort()


def _offset_of(client: SocketClient) -> str:
    """What a Socket.IO client saw last, or else was given with its pid; "" if it has no pid."""
    pid, offset = client.auth.get("pid"), client.auth.get("offset")
    if not isinstance(pid, str) or not 0 < len(pid) <= MAX_PID_CHARS:
        return ""
    return offset if isinstance(offset, str) else pid.partition(".")[2]


def _replay_bytes(missed: Iterable[tuple[str, bytes]]) -> int:
    return sum(len(envelope) + MAX_REPLAY_HEAD_BYTES for _, envelope in missed)


def with_offset(body: bytes, offset: str) -> bytes:
    """The envelope of a broadcast: its type and data, and the offset it got."""
    return b'%b,"offset":"%b"}' % (body[:-1], offset.encode())


def checked_entry(body: bytes, max_bytes: int) -> bytes:
    """A broadcast as another process put it into the backplane. Raises ValueError if it is none."""
    if len(body) > max_bytes:
        raise ValueError("too large")
    value = loads(body)
    if not isinstance(value, dict) or not isinstance(value.get("type"), str) or "data" not in value:
        raise ValueError("not a broadcast")
    try:
        return dumps({"type": value["type"], "data": value["data"]})
    except TypeError as error:  # it reads deeper nesting than it writes
        raise ValueError(str(error)) from None


_GAP_TEXT = "broadcasts were missed that are no longer kept; ask for the status"
_TOKEN_TEXT = "this server needs its token"
Level = Literal["info", "warning", "error"]


def notification(message: Any, level: Any = "info") -> dict[str, str]:
    """The data of a `notification`. Raises ValueError for a wrong message or level."""
    if not isinstance(message, str) or not message:
        raise ValueError('"message" must be a string that is not empty')
    if level not in get_args(Level):
        raise ValueError(f'"level" must be one of {", ".join(get_args(Level))}')
    return {"message": message, "level": level, "time": utc_now()}


def as_handler(function: Callable[..., Any], inline: bool) -> Command:
    """An event handler in a Command's clothes: called with the values as they are."""

    async def call_async(*args: Any) -> Any:
        return await function(*args)

    def call(*args: Any) -> Any:
        return function(*args)

    is_async = inspect.iscoroutinefunction(function)
    return Command(call_async if is_async else call, name="handler", inline=inline)


def add_manager_commands(manager: WebSocketManager) -> None:
    """The built-in commands that need the manager: notify and clients."""

    def notify(*message: str, level: Level = "info") -> dict[str, int]:
        """Send a notification to every client.

        The message is put together from all words.
        """
        return {"clients": manager.broadcast("notification", joined(message, level))}

    async def publish(*message: str, level: Level = "info") -> dict[str, int]:
        return {"clients": await manager.publish("notification", joined(message, level))}

    def joined(message: tuple[str, ...], level: str) -> dict[str, str]:
        if not message:
            raise UsageError(f"usage: {manager.notify_commands[0].usage}")
        return notification(" ".join(message), level)

    async def clients(context: Context) -> dict[str, Any]:
        """List who is connected."""
        everyone = manager.all_clients()
        listed = [{"id": c.id, "door": c.door, "namespace": c.namespace} for c in everyone[:100]]
        you = getattr(context.client, "id", None)
        return {"count": len(everyone), "you": you, "clients": listed}

    publish.__doc__ = notify.__doc__
    manager.notify_commands = (Command(notify, inline=True), Command(publish, name="notify"))
    for command in (manager.notify_commands[0], Command(clients)):
        if command.name not in manager.commands.commands:
            manager.commands.add(command, gives_way=True)


# --- 7 dispatch --------------------------------------------------------------------------------
# One call takes a message and returns its answer if there is one now, or starts a task that will
# send it. Errors become answers in `Request.refuse` and `Calls._conclude`, nowhere else. Every
# request gets exactly one final answer.


def encode_error(code: str, message: str, **data: Any) -> bytes:
    """An `error` envelope that belongs to no request."""
    return encode_json({"type": "error", "data": {"code": code, "message": message, **data}})


INTERNAL_ERROR = encode_error("internal_error", "the server failed to handle this message")
INVALID_JSON = encode_error("invalid_json", "the message is not valid JSON in UTF-8")
UNENCODABLE = "the result can't be encoded as JSON"
NOT_JSON = (TypeError, ValueError, RecursionError)  # what encoding a value raises


class Request:
    """One request on its way to its single final answer, in the project's own envelope.

    id: what the client calls it, if it does; ack: the Socket.IO ack it asked for.
    line: the command line of an `execute_command`, which answers repeat.
    """

    __slots__ = ("ack", "client", "id", "is_done", "line", "size", "started", "task")
    is_done: bool
    started: float
    task: asyncio.Task[Any]

    def __init__(
        self, client: Client, id: Any, ack: int | None, size: int, line: str | None = None
    ) -> None:
        self.client = client
        self.id = id
        self.ack = ack
        self.size = size
        self.line = line
        # started, task and is_done are set by Calls.run: most requests never need them.

    @property
    def is_serial(self) -> bool:
        """Must it wait for its like? So that a client that can't correlate needs not."""
        return self.line is not None and self.id is None and self.ack is None

    def encode(self, type: str, data: Any) -> bytes | None:
        """The envelope of an answer; None where the answer went out in a form of its own."""
        envelope = {"type": type, "data": data}
        if self.id is not None:
            envelope["id"] = self.id
        try:
            return dumps(envelope)
        except TypeError:
            return self._encode_special(envelope)

    def _encode_special(self, envelope: dict[str, Any]) -> bytes | None:
        try:
            return dumps(envelope, option=OPT_NON_STR_KEYS)
        except TypeError:
            # The ack is for the final answer alone.
            ack = None if envelope["type"] == "command_progress" else self.ack
            if self.client.encode_special(envelope, ack):
                return None
            raise

    def encode_status(self) -> bytes:
        """The answer to `get_status`, with the offset that it is current as of."""
        manager = self.client.manager
        if self.id is None:
            return manager.encode_status_answer() + b"}"
        return b'%b,"id":%b}' % (manager.encode_status_answer(), dumps(self.id))

    def result(self, value: Any) -> bytes | None:
        """The final answer of a call that succeeded."""
        if self.line is not None:
            value = {"command": self.line, "result": value}
        try:
            return self.encode("command_response", value)
        except NOT_JSON:
            return self.fail("command_failed", UNENCODABLE)

    def fail(self, code: str, message: str, data: Mapping[str, Any] | None = None) -> bytes | None:
        """The final answer of a request that did not succeed."""
        error = {"code": code, "message": message}
        if self.line is not None:
            error["command"] = self.line
        try:
            return self.encode("error", {**error, **(data or {})})
        except NOT_JSON:
            return self.encode("error", {**error, "message": encodable(message)})

    def refuse(self, exc: BaseException) -> bytes | None:
        """The final answer of a request that met `exc`; a bug, ours or the program's, is logged."""
        if isinstance(exc, Refused | ServiceError):
            return self.fail(exc.code, str(exc), exc.data)
        self.client.manager.log_error(f"{self.client.id} request failed", exc)
        return self.fail("internal_error", "the server failed to handle this request")

    def progress(self, value: Any) -> None:
        """Send one report of the running command."""
        try:
            envelope = self.encode_progress(value)
        except NOT_JSON:
            raise CommandFailed("progress can't be encoded as JSON") from None
        if envelope is not None:
            self.client.deliver(envelope, None)

    def encode_progress(self, value: Any) -> bytes | None:
        return self.encode("command_progress", {"command": self.line, "progress": value})

    def deliver(self, answer: bytes | None) -> None:
        """Send the final answer, when it comes later than its request's own read."""
        if answer is not None:
            self.client.connection.allow(len(answer))
            self.client.deliver(answer, self.ack)


def handle_rpc(client: Client, message: dict[str, Any], ack: int | None, size: int) -> bytes | None:
    """Answer one request of our own form, now or later. Never raises.

    The fast lane: a command line that is ready to run, and needs no task, needs no Request either.
    """
    params, wanted = message.get("params"), message.get("id")
    if type(params) is dict and len(params) == 1 and message.get("method") == "execute_command":
        line, manager = params.get("command"), client.manager
        call = manager.prepared.get(line) if type(line) is str else None
        is_id = type(wanted) is int or type(wanted) in _ID_TYPES  # the first is quicker
        if call is not None and client.calls is None and is_id:
            try:
                value = manager.commands.call_inline(call)
                data = {"command": line, "result": value}
                if wanted is None:
                    return dumps({"type": "command_response", "data": data})
                return dumps({"type": "command_response", "data": data, "id": wanted})
            except ServiceError as error:
                manager.metrics.errors[error.code] += 1
                return Request(client, wanted, ack, size, line).refuse(error)
            except TypeError:  # `value` is not what orjson takes at once
                return Request(client, wanted, ack, size, line).result(value)
    return handle_request(Request(client, wanted, ack, size), message)


def handle_request(request: Request, message: dict[str, Any]) -> bytes | None:
    """Answer one request, now or later. Never raises."""
    try:
        if type(request.id) not in _ID_TYPES:
            request.id = None
            raise Refused("invalid_request", '"id" must be a string or an integer')
        method = message.get("method")
        if type(method) is not str:
            raise Refused("invalid_request", '"method" must be a string, such as "get_status"')
        params = message.get("params", _NO_PARAMS)
        if type(params) is not dict:
            raise Refused("invalid_request", '"params" must be an object')
        handler = BUILT_IN_METHODS.get(method)
        if handler is not None:
            return handler(request, params)
        return call_method(request, method, params)
    except FAULTS as exc:
        return request.refuse(exc)


_NO_PARAMS: dict[str, Any] = {}
_ID_TYPES = frozenset((int, str, type(None)))


def get_status(request: Request, params: dict[str, Any]) -> bytes | None:
    """RPC method: the status object, at once, whatever else runs."""
    return request.encode_status()


def execute_command(request: Request, params: dict[str, Any]) -> bytes | None:
    """RPC method: run the command line `command`; other params reach the command by name."""
    line = params.get("command")
    if type(line) is not str or not line or line.isspace():
        raise Refused("invalid_params", '"command" must be a string that is not empty')
    request.line = line
    others = _NO_PARAMS
    if len(params) > 1:
        others = {name: value for name, value in params.items() if name != "command"}
    return submit(request, request.client.manager.commands.prepare, line, others)


def cancel(request: Request, params: dict[str, Any]) -> bytes | None:
    """RPC method: cancel this client's running or waiting request of id `id`."""
    wanted = params.get("id")
    if not isinstance(wanted, int | str) or isinstance(wanted, bool):
        raise Refused("invalid_params", '"id" must be the id of a running command')
    calls = request.client.calls
    if calls is None or not calls.cancel(wanted):
        raise Refused("invalid_params", f"no command with id {wanted!r} is running")
    return request.encode("command_response", {"cancelled": wanted})


BUILT_IN_METHODS: dict[str, Callable[[Request, dict[str, Any]], bytes | None]] = {
    "get_status": get_status, "execute_command": execute_command, "cancel": cancel,
}  # fmt: skip


def is_method(manager: WebSocketManager, name: str) -> bool:
    """Is there an RPC method of that name?"""
    return name in BUILT_IN_METHODS or name in manager.methods


def call_method(request: Request, method: str, params: dict[str, Any]) -> bytes | None:
    """Call a method that the embedding program registered."""
    methods = request.client.manager.methods
    command = methods.get(method)
    if command is None:
        known = ", ".join([*BUILT_IN_METHODS, *methods])
        text = f"no such method; there are {known}"
        if method in request.client.manager.commands.commands:
            text += f"; {method} is a command, which execute_command runs"
        raise Refused("unknown_method", text, method=method)
    return submit(request, bind_method, command, params)


def bind_method(command: Command, params: dict[str, Any]) -> Call:
    """A call of an RPC method. Raises Refused invalid_params when the params don't fit."""
    try:
        return Call(command, *command.bind((), params))
    except UsageError as error:
        raise Refused("invalid_params", str(error), method=command.name) from None


def handle_event(
    client: SocketClient, event: list[Any], ack: int | None, size: int
) -> bytes | None:
    """Answer one Socket.IO event: the text to send now, if any."""
    if event[0] == "rpc":
        message = event[1] if len(event) > 1 and type(event[1]) is dict else _NO_PARAMS
        answer = handle_rpc(client, message, ack, size)
        return None if answer is None else client.wrap(answer, ack)
    name, args = str(event[0]), event[1:]  # the protocol allows a number as a name
    handler = client.manager.handlers.get(name)
    if handler is not None:
        request = EventRequest(client, None, ack, size)
        try:
            return submit(request, Call, handler, [client, *args], {})
        except Exception as exc:
            return request.refuse(exc)
    is_known = is_method(client.manager, name)
    if not is_known and ack is None:
        return None  # as socket.io does with an event that nobody handles
    params = args[0] if is_known and args else {}
    answer = handle_request(Request(client, None, ack, size), {"method": name, "params": params})
    return None if answer is None else client.wrap(answer, ack)


class EventRequest(Request):
    """An event with a handler of the program: the ack is what it returned, not an envelope."""

    __slots__ = ()

    def encode(self, type: str, data: Any) -> None:
        client, gate = cast(SocketClient, self.client), self.client.manager.log_gate
        if self.ack is not None:
            values = data if isinstance(data, tuple) else (data,)
            if type == "error":
                values = ({"type": type, "data": data},)
            client.send_packet(Packet(PacketType.ACK, client.namespace, list(values), self.ack))
        elif type == "error" and data["code"] != "cancelled" and gate.admits("event handler"):
            log.warning("%s event handler: %s", client.id, data["message"])

    def progress(self, value: Any) -> None:
        pass  # an event has no progress in the protocol


def submit(request: Request, prepare: Callable[..., Call], *args: Any) -> bytes | None:
    """Run the call that `prepare(*args)` gives: now, or behind what its client already runs."""
    client = request.client
    if client.manager.is_draining:
        raise Unavailable("the server is shutting down")
    calls = client.calls
    if calls is None:
        call = prepare(*args)
        if call.command.inline:
            return call_inline(request, call)
        client.calls = Calls(client)
        client.calls.run(request, call)
        return None
    return calls.submit(request, functools.partial(prepare, *args))


def call_inline(request: Request, call: Call) -> bytes | None:
    """Run a command that never waits; the answer leaves with this read's others."""
    manager = request.client.manager
    try:
        return request.result(manager.commands.call_inline(call))
    except ServiceError as error:
        manager.metrics.errors[error.code] += 1
        raise


class Calls:
    """What a client has running and waiting: its order, its limit, its cancellation.

    Requests run concurrently up to a limit and then wait in order; serial ones, which their client
    could not tell apart, run one after another. When too many wait, the client is not read.
    """

    __slots__ = ("client", "parallel", "running", "serial", "serial_running")

    def __init__(self, client: Client) -> None:
        self.client = client
        self.running: set[Request] = set()
        self.serial_running: Request | None = None
        self.serial: deque[tuple[Request, Callable[[], Call]]] = deque()
        self.parallel: deque[tuple[Request, Callable[[], Call]]] = deque()

    def submit(self, request: Request, prepare: Callable[[], Call]) -> bytes | None:
        """Start the request, or let it wait. Raises what `prepare` raises."""
        queue = self.serial if request.is_serial else self.parallel
        must_wait = queue or (request.is_serial and self.serial_running is not None)
        if not must_wait and not self._is_full:
            return self._start(request, prepare)
        queue.append((request, prepare))
        self._count_waiting(1, request.size)
        return None

    @property
    def _is_full(self) -> bool:
        return len(self.running) >= self.client.manager.config.max_running_commands

    def _start(self, request: Request, prepare: Callable[[], Call]) -> bytes | None:
        call = prepare()
        if call.command.inline:
            return call_inline(request, call)
        self.run(request, call)
        return None

    def run(self, request: Request, call: Call) -> None:
        """Run the call in a task of its own."""
        manager = self.client.manager
        request.started, request.is_done = time.perf_counter(), False
        context = Context(self.client, functools.partial(self._progress, request))
        request.task = manager.spawn(manager.commands.run(call, context))
        self.running.add(request)
        if request.is_serial:
            self.serial_running = request
        request.task.add_done_callback(functools.partial(self._on_done, request))

    def _progress(self, request: Request, value: Any) -> Awaitable[None] | None:
        """One report; the command waits when its client reads slowly."""
        if request.is_done:
            return None
        request.progress(value)
        if self.client.connection.is_writable:
            return None
        return self.client.connection.drained()

    def _on_done(self, request: Request, task: asyncio.Task[Any]) -> None:
        answer = self._conclude(request, task)
        if self.client.calls is self:  # not when the client is gone
            request.deliver(answer)
            self._start_waiting()
            if not self.running:  # nothing waits either: the shorter way is open again
                self.client.calls = None

    def _conclude(self, request: Request, task: asyncio.Task[Any]) -> bytes | None:
        """The final answer of a task that has ended, however it did."""
        self.running.discard(request)
        if self.serial_running is request:
            self.serial_running = None
        request.is_done = True
        error = None if task.cancelled() else task.exception()
        code, message = "internal_error", "the server failed to run this command"
        data: Mapping[str, Any] | None = None
        if task.cancelled():
            code = message = "cancelled"
        elif error is None:
            code = "ok"
        elif isinstance(error, ServiceError):  # the task's owner logs any other
            code, message, data = error.code, str(error), error.data
        self.client.manager.metrics.count_task(code, time.perf_counter() - request.started)
        return request.result(task.result()) if code == "ok" else request.fail(code, message, data)

    def _start_waiting(self) -> None:
        while not self._is_full:
            if self.serial and self.serial_running is None:
                request, prepare = self.serial.popleft()
            elif self.parallel:
                request, prepare = self.parallel.popleft()
            else:
                break
            self._count_waiting(-1, -request.size)
            try:
                answer = self._start(request, prepare)
            except Exception as exc:  # what waits behind it must go on
                answer = request.refuse(exc)
            request.deliver(answer)

    def _count_waiting(self, count: int, size: int) -> None:
        connection = self.client.connection
        connection.waiting += count
        connection.waiting_bytes += size
        if connection.waiting > MAX_WAITING or connection.waiting_bytes > MAX_WAITING_BYTES:
            connection.hold(HOLD_CALLS)
        else:
            connection.release(HOLD_CALLS)

    def cancel(self, wanted: int | str) -> bool:
        """Cancel the running or waiting requests of this id; were there any?"""
        running = [request for request in self.running if request.id == wanted]
        waiting = [entry for entry in self.parallel if entry[0].id == wanted]
        for request in running:
            request.task.cancel()
        for entry in waiting:
            self.parallel.remove(entry)
            self._count_waiting(-1, -entry[0].size)
            entry[0].deliver(entry[0].fail("cancelled", "cancelled before it began"))
        return bool(running or waiting)

    def stop(self) -> None:
        """The server stops: refuse what waits, cancel what runs, and let the client know."""
        for request, _ in (*self.serial, *self.parallel):
            request.deliver(request.fail("unavailable", "the server is shutting down"))
        self._end()

    def abandon(self) -> None:
        """The client is gone: nobody waits for an answer any more."""
        self.client.calls = None
        self._end()

    def _end(self) -> None:
        for request in self.running:
            request.task.cancel()
        waiting = [request for request, _ in (*self.serial, *self.parallel)]
        self.serial.clear()
        self.parallel.clear()
        # Its connection may go on, with other namespaces or with this one again.
        self._count_waiting(-len(waiting), -sum(request.size for request in waiting))


def handle_other(client: Client, message: Any, size: int) -> bytes | None:
    """Answer a message that is no plain request: JSON-RPC, or a mistake."""
    items = message if isinstance(message, list) else [message]
    if any(isinstance(item, dict) and "jsonrpc" in item for item in items):
        return handle_json_rpc(client, message, size)
    return encode_error("invalid_request", 'a request is an object, such as {"method": "..."}')


# JSON-RPC 2.0: the same methods under another form of request and answer.

JSON_RPC_CODES = {
    "invalid_json": -32700, "invalid_request": -32600, "unknown_method": -32601,
    "invalid_params": -32602, "internal_error": -32603, "command_failed": -32000,
    "unknown_command": -32001, "usage": -32002, "timeout": -32003, "cancelled": -32004,
    "unavailable": -32005, "too_large": -32006, "unauthorized": -32007, "forbidden": -32008,
    "history_gap": -32009,
}  # fmt: skip


class JsonRpcRequest(Request):
    """A JSON-RPC 2.0 request or notification; in a batch its answer goes there."""

    __slots__ = ("batch", "is_notification")

    def __init__(self, client: Client, message: Any, size: int, batch: Batch | None) -> None:
        wanted = message.get("id") if isinstance(message, dict) else None
        super().__init__(client, wanted, None, size)
        self.batch = batch
        self.is_notification = _is_notification(message)

    def encode(self, type: str, data: Any) -> bytes | None:
        if self.is_notification:
            return None
        if type != "error":
            return encode_json({"jsonrpc": "2.0", "result": data, "id": self.id})
        details = dict(data)
        code = JSON_RPC_CODES.get(details["code"], -32000)
        error = {"code": code, "message": details.pop("message"), "data": details}
        return encode_json({"jsonrpc": "2.0", "error": error, "id": self.id})

    def encode_status(self) -> bytes | None:  # type: ignore[override]
        return self.encode("status_update", self.client.manager.status())

    def encode_progress(self, value: Any) -> bytes | None:
        if self.is_notification or self.batch is not None or self.client.door == "http":
            return None
        params = {"command": self.line, "progress": value, "id": self.id}
        return encode_json({"jsonrpc": "2.0", "method": "command_progress", "params": params})

    def deliver(self, answer: bytes | None) -> None:
        super().deliver(answer if self.batch is None else self.batch.add(answer))


class Batch:
    """The answers of one JSON-RPC batch, sent together when the last one is there."""

    __slots__ = ("answers", "size")

    def __init__(self, size: int) -> None:
        self.answers: list[bytes] = []
        self.size = size

    def add(self, answer: bytes | None) -> bytes | None:
        """Add one answer; the whole batch once it is complete."""
        if answer is None:
            return None
        self.answers.append(answer)
        is_whole = len(self.answers) == self.size
        return b"[" + b",".join(self.answers) + b"]" if is_whole else None


def handle_json_rpc(client: Client, message: Any, size: int) -> bytes | None:
    """Answer a JSON-RPC 2.0 request or batch, now or later."""
    if not isinstance(message, list):
        return _handle_one_json_rpc(JsonRpcRequest(client, message, size, None), message)
    if not message or len(message) > MAX_BATCH:
        request = JsonRpcRequest(client, None, size, None)
        return request.fail("invalid_request", f"a batch holds 1 to {MAX_BATCH} requests")
    batch = Batch(sum(not _is_notification(item) for item in message))
    whole = None
    for item in message:
        request = JsonRpcRequest(client, item, size // len(message), batch)
        whole = batch.add(_handle_one_json_rpc(request, item)) or whole
    return whole


def _is_notification(message: Any) -> bool:
    """Is this a JSON-RPC notification, which gets no answer?"""
    if not isinstance(message, dict) or "id" in message:
        return False
    return message.get("jsonrpc") == "2.0" and isinstance(message.get("method"), str)


def _handle_one_json_rpc(request: JsonRpcRequest, message: Any) -> bytes | None:
    if not isinstance(message, dict) or message.get("jsonrpc") != "2.0":
        if type(request.id) not in _ID_TYPES:
            request.id = None
        return request.fail("invalid_request", 'a request is an object with "jsonrpc": "2.0"')
    manager, method = request.client.manager, message.get("method")
    if method == "rpc.discover":
        return request.encode("", describe_rpc(manager))
    params = message.get("params")
    if isinstance(params, list) and isinstance(method, str):
        names = [argument["name"] for argument in _arguments_of(manager, method)]
        if len(params) > len(names) and is_method(manager, method):
            return request.fail("invalid_params", f"at most {len(names)} params by position")
        message = {**message, "params": dict(zip(names, params, strict=False))}
    return handle_request(request, message)


def _arguments_of(manager: WebSocketManager, method: str) -> list[dict[str, Any]]:
    if method in BUILT_IN_METHODS:
        return _BUILT_IN_ARGUMENTS[method]
    return manager.methods[method].arguments if method in manager.methods else []


_BUILT_IN_ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "get_status": [],
    "execute_command": [{"name": "command", "type": "str", "required": True}],
    "cancel": [{"name": "id", "type": "any", "required": True}],
}
_JSON_TYPES = {
    "str": "string", "int": "integer", "float": "number", "bool": "boolean", "list": "array",
    "dict": "object",
}  # fmt: skip


def describe_rpc(manager: WebSocketManager) -> dict[str, Any]:
    """The OpenRPC document of what clients may call, made from the tables that dispatch uses."""
    usages = "; ".join(command.usage for command in manager.commands.distinct())
    summaries = {
        "get_status": "The state of every service.",
        "execute_command": "Run a command line; further params reach the command by name. "
        f"Commands: {usages}",
        "cancel": "Cancel a running request.",
        **{command.name: command.summary for command in manager.methods.values()},
    }
    return {
        "openrpc": "1.3.2",
        "info": {"title": "Karna WS", "version": __version__},
        "methods": [
            _describe_method(name, summary, _arguments_of(manager, name))
            for name, summary in summaries.items()
        ],
    }


def _describe_method(name: str, summary: str, arguments: list[dict[str, Any]]) -> dict[str, Any]:
    params = []
    for argument in arguments:
        kind = _JSON_TYPES.get(argument["type"])
        schema = {} if kind is None else {"type": kind}
        if "choices" in argument:
            schema["enum"] = argument["choices"]
        required = bool(argument["required"])
        params.append({"name": argument["name"], "required": required, "schema": schema})
    return {
        "name": name, "summary": summary, "paramStructure": "either", "params": params,
        "result": {"name": "result", "schema": {}},
    }  # fmt: skip


# --- 8 http ------------------------------------------------------------------------------------
# The websockets library refuses request bodies, answers in plain text and takes 40 microseconds a
# handshake, so the HTTP head is read and answered here. `check_access` decides for every door who
# may come in: this server executes commands, and any page open in the user's browser can reach it.
# Each socket serves one HTTP request and is closed.


def read_head(connection: Connection, data: bytes) -> None:
    """Collect an HTTP head; once it is whole refuse it, upgrade it, or answer it."""
    try:
        end = data.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES)
        if end < 0:
            check_partial_head(data)
            return connection.keep(data)
        request = connection.head = parse_head(data[: end + 4])
        check_access(connection, request)
        go_on = upgrade if request.is_upgrade else start_request
        go_on(connection, request, data[end + 4 :])
    except Exception as exc:
        answer_error(connection, exc)


def check_partial_head(data: bytes) -> None:
    """Raises Refused for the beginning of what can't become a head."""
    if not 65 <= data[0] <= 90:  # no method starts like this; TLS on a plain port does
        raise Refused("invalid_request", "this is no HTTP request")
    if len(data) > MAX_HEAD_BYTES or (len(data) > MAX_HEAD_LINE_BYTES and b"\r\n" not in data):
        raise _head_too_large(data)


def _head_too_large(head: bytes) -> Refused:
    if b"\r\n" not in head[:MAX_HEAD_LINE_BYTES]:
        return Refused("too_large", "the request line is too long", status=414)
    return Refused("too_large", "the request's headers are too large", status=431)


def answer_error(connection: Connection, exc: Exception) -> None:
    """Answer a request with what went wrong; a bug of ours is logged."""
    if isinstance(exc, EngineRefused):
        code, message = exc.args
        send_response(connection, 400, dumps({"code": code, "message": message}))
    elif isinstance(exc, Refused):
        refuse_http(connection, exc)
    elif isinstance(exc, ServiceError):
        refuse_http(connection, Refused(exc.code, str(exc)))
    else:
        connection.manager.log_error(f"{connection.name} HTTP request failed", exc)
        send_response(connection, 500, INTERNAL_ERROR)


class HttpRequest(NamedTuple):
    """One HTTP head, parsed and checked for form."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Mapping[str, str]  # names in lower case; a repeated header's values joined by ", "
    repeated: frozenset[str]  # names that occur more than once
    body_bytes: int
    is_http_1_0: bool

    @property
    def is_upgrade(self) -> bool:
        """Does it ask for a WebSocket?"""
        return "websocket" in self.headers.get("upgrade", "").lower()


_HEAD = re.compile(
    rb"(?P<method>[A-Z]{1,20}) (?P<target>[!-~]+) HTTP/1\.(?P<minor>[01])\r\n"
    rb"(?P<headers>(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*\r\n)*)\r\n"
)  # RFC 9112, 3 and 5, without folded lines


def parse_head(head: bytes) -> HttpRequest:
    """Parse an HTTP head. Raises Refused for one that is malformed or too large."""
    lines = head.split(b"\r\n")
    if len(lines) > MAX_HEAD_LINES + 2 or max(map(len, lines)) > MAX_HEAD_LINE_BYTES:
        raise _head_too_large(head)
    match = _HEAD.fullmatch(head)
    if match is None:
        raise Refused("invalid_request", "malformed HTTP head")
    path, _, query_text = match["target"].decode().partition("?")
    if not path.startswith("/"):
        raise Refused("invalid_request", "the request target must be a path")
    headers, repeated = _merge_headers(lines[1:-2])
    if "transfer-encoding" in headers:
        raise Refused("invalid_request", "a body needs Content-Length", status=411)
    try:
        query = parse_qs(query_text, True, max_num_fields=100) if query_text else {}
    except ValueError:
        raise Refused("invalid_request", "the query has too many fields") from None
    return HttpRequest(
        match["method"].decode(), path, query, headers, repeated,
        _content_length(headers, repeated), match["minor"] == b"0",
    )  # fmt: skip


def _merge_headers(lines: Iterable[bytes]) -> tuple[dict[str, str], frozenset[str]]:
    headers: dict[str, str] = {}
    repeated = set()
    for line in lines:
        name, _, value = line.decode("latin-1").partition(":")
        name, value = name.lower(), value.strip(" \t")
        if name in headers:
            repeated.add(name)
            value = f"{headers[name]}, {value}"
        headers[name] = value
    return headers, frozenset(repeated)


def _content_length(headers: Mapping[str, str], repeated: frozenset[str]) -> int:
    text = headers.get("content-length", "0")
    # The length first: int() of thousands of digits is slow, or raises.
    if "content-length" in repeated or not text.isascii() or not text.isdigit() or len(text) > 15:
        raise Refused("invalid_request", "malformed Content-Length")
    return int(text)


def check_access(connection: Connection, request: HttpRequest) -> None:
    """Decide, for every door, whether this request may come in. Raises Refused.

    Host: a web page whose name was rebound to this address names itself there. Origin: the page
    that asks. Token: what a page or a process that was let in must still know.
    """
    config = connection.manager.config
    check_host(config, request)
    connection.origin = check_origin(config, request)
    if request.method == "OPTIONS" or (request.path in _OPEN_PATHS and not request.is_upgrade):
        return
    if not is_authorized(config, request) and "EIO" not in request.query:
        # The Socket.IO door takes its token with CONNECT.
        raise Refused("unauthorized", _TOKEN_TEXT, headers={"WWW-Authenticate": "Bearer"})


_OPEN_PATHS = ("/", "/health")


def check_host(config: Config, request: HttpRequest) -> None:
    """Exactly one Host, naming localhost, an IP address, or a name that was allowed."""
    host = request.headers.get("host")
    if host is None or "host" in request.repeated:
        raise Refused("invalid_request", "a request needs exactly one Host header")
    match = _HOST.fullmatch(host)
    if match is None:
        raise Refused("invalid_request", "malformed Host header")
    name = match[1].lower()
    if name == "localhost" or is_ip_address(name):
        return
    if name not in [each.lower() for each in config.allow_host]:
        message = f"Host {name} is not allowed; --allow-host {name} would allow it"
        raise Refused("forbidden", message)


_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::\d{1,5})?")


def is_ip_address(name: str) -> bool:
    """Is this an IPv4 address, or an IPv6 address in brackets?"""
    family = socket.AF_INET6 if name.startswith("[") else socket.AF_INET
    try:
        socket.inet_pton(family, name.strip("[]"))
    except OSError:
        return False
    return True


def check_origin(config: Config, request: HttpRequest) -> str | None:
    """The allowed origin that asks, None when it is no browser. Raises Refused."""
    origin = request.headers.get("origin")
    if origin is None:
        if request.method == "POST" and request.headers.get("sec-fetch-site") == "cross-site":
            raise Refused("forbidden", "cross-site request without an allowed Origin")
        return None
    if "origin" in request.repeated:
        raise Refused("forbidden", "a request has one Origin at most")
    if origin in config.allow_origin or _LOOPBACK_ORIGIN.fullmatch(origin):
        return origin
    scheme, _, authority = origin.partition("://")
    port = {"http": ":80", "https": ":443"}.get(scheme)
    host = request.headers["host"].lower()
    if port is not None and authority.removesuffix(port) == host.removesuffix(port):
        return origin
    if not _ORIGIN.fullmatch(origin) or len(origin) > 300:
        raise Refused("forbidden", "an Origin of this form, such as null, is never allowed")
    message = f"Origin {origin} is not allowed; --allow-origin {origin} would allow it"
    raise Refused("forbidden", message)


_LOOPBACK_ORIGIN = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?")


def is_authorized(config: Config, request: HttpRequest) -> bool:
    """Does the request carry the token, in its header or its query?"""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and "authorization" not in request.repeated:
        return token_matches(config.token, given.strip())
    return token_matches(config.token, request.query.get("token", [None])[0])


def token_matches(token: str | None, given: Any) -> bool:
    """Is `given` the token, if there is one? Takes the same time for every wrong one."""
    if token is None or not isinstance(given, str):
        return token is None
    return hmac.compare_digest(token.encode(), given.encode(errors="replace"))


# Upgrades.


class EngineRefused(Exception):
    """An Engine.IO handshake is refused, with the code and message of socket.io."""


def check_engine_handshake(request: HttpRequest) -> None:
    """Refuse what is no Engine.IO handshake over websocket, in the order socket.io does."""
    if request.query.get("transport", [""])[0] != "websocket":
        raise EngineRefused(0, "Transport unknown")
    if "sid" in request.query:  # sessions begin here; none moves over from polling
        raise EngineRefused(1, "Session ID unknown")
    if request.method != "GET":
        raise EngineRefused(2, "Bad handshake method")
    if not request.is_upgrade:
        raise EngineRefused(3, "Bad request")
    if request.query["EIO"][0] not in ("3", "4"):
        raise EngineRefused(5, "Unsupported protocol version")


def upgrade(connection: Connection, request: HttpRequest, rest: bytes) -> None:
    """Answer a WebSocket handshake and open the door it asked for."""
    manager = connection.manager
    if request.body_bytes:
        raise Refused("invalid_request", "a WebSocket handshake has no body")
    is_engine = "EIO" in request.query
    if is_engine:
        check_engine_handshake(request)
    elif request.path not in ("/ws", "/ws/"):
        raise _not_found()
    if manager.is_draining or manager.is_full:
        what = "shutting down" if manager.is_draining else "full (--max-clients)"
        raise Refused("unavailable", f"the server is {what}", headers={"Retry-After": "5"})
    handshake = accept_handshake(request)
    connection.head = None  # 1.7 KiB that nobody needs any more
    connection._queue.append(handshake)
    connection.is_queueing = True  # what follows it leaves in the same write
    (_open_engine if is_engine else _open_raw)(connection, request)
    connection.flush()
    if rest:
        manager.bytes_in -= len(rest)  # counted with the head that it came with
        connection.data_received(rest)


def accept_handshake(request: HttpRequest) -> bytes:
    """The answer to a WebSocket handshake (RFC 6455, 4.2). Raises Refused for a malformed one."""
    headers = request.headers
    if request.method != "GET":
        raise Refused("invalid_request", "use GET", status=405, headers={"Allow": "GET"})
    if request.is_http_1_0:
        raise Refused("invalid_request", "a WebSocket needs HTTP/1.1", status=505)
    options = [option.strip() for option in headers.get("connection", "").lower().split(",")]
    is_asked = headers["upgrade"].lower() == "websocket" and "upgrade" in options
    if not is_asked or headers.get("sec-websocket-version") != "13":
        raise _upgrade_required()
    key = headers.get("sec-websocket-key", "")
    if not _WEBSOCKET_KEY.fullmatch(key):
        raise Refused("invalid_request", "malformed Sec-WebSocket-Key")
    accept = b64encode(hashlib.sha1(key.encode() + _WEBSOCKET_GUID).digest())
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: %b\r\n\r\n" % accept
    )


_WEBSOCKET_KEY = re.compile(r"[A-Za-z0-9+/]{21}[AQgw]==")  # 16 bytes
_WEBSOCKET_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def _open_raw(connection: Connection, request: HttpRequest) -> None:
    manager = connection.manager
    client = manager.raw_client(connection, connection.name)
    connection.open(client, manager.config.raw_ping_interval_s)
    manager.join_raw(client, request.query.get("since", [None])[0])


def _open_engine(connection: Connection, request: HttpRequest) -> None:
    manager = connection.manager
    session = SocketSession(connection, is_authorized(manager.config, request))
    connection.open(session, manager.config.engine_ping_interval_s)
    if request.query["EIO"][0] == "3":
        return refuse_old_client(session)
    manager.sessions.add(session)
    session.start()


def refuse_old_client(session: SocketSession) -> None:
    """Tell a socket.io-client 2 in its own protocol what it is; a plain refusal shows it nothing.

    Source: Engine.IO protocol 3, Socket.IO protocol 4: open, connected to '/', error in '/ws'.
    """
    text = dumps("this server needs socket.io-client 3 or later (Engine.IO protocol 4)")
    handshake = {"sid": session.sid, "upgrades": [], "pingInterval": 25000, "pingTimeout": 20000}
    for packet in (b"0" + dumps(handshake), b"40", b"44/ws," + text, b"44" + text):
        session.connection.send_frame(frame_text(packet))
    session.connection.flush()
    session.connection.close(CloseCode.POLICY_VIOLATION, "Engine.IO protocol 4 is needed")


# Plain HTTP.


def start_request(connection: Connection, request: HttpRequest, rest: bytes) -> None:
    """Find the handler of a plain request; read its body first if it has one."""
    if "EIO" in request.query:
        check_engine_handshake(request)
    if request.path not in ROUTES:
        raise _not_found()
    wanted, handler, _ = ROUTES[request.path]
    allow = "GET, HEAD, OPTIONS" if wanted == "GET" else "POST, OPTIONS"
    if request.method == "OPTIONS":
        send_preflight(connection, allow)
    elif request.method != wanted and (request.method, wanted) != ("HEAD", "GET"):
        message = f"{request.path} takes {allow}"
        raise Refused("invalid_request", message, status=405, headers={"Allow": allow})
    elif wanted == "POST":
        start_body(connection, request, rest)
    else:
        handler(connection, b"")


def start_body(connection: Connection, request: HttpRequest, rest: bytes) -> None:
    """Check what a POST announces, then collect it; the deadline of the head goes on."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = "the body must be JSON, with Content-Type: application/json"
        raise Refused("invalid_request", message, status=415)
    if "content-length" not in request.headers:
        raise Refused("invalid_request", "a body needs Content-Length", status=411)
    limit = connection.manager.config.max_body_bytes
    if request.body_bytes > limit:
        raise Refused("too_large", f"the body is over {limit} bytes (--max-body)")
    if request.headers.get("expect", "").lower() == "100-continue":
        connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    connection.phase = Phase.BODY
    read_body(connection, rest)


def read_body(connection: Connection, data: bytes) -> None:
    """Collect the body; handle the request when it is whole."""
    request: HttpRequest = connection.head
    if len(data) < request.body_bytes:
        return connection.keep(data, request.body_bytes)
    connection.phase = Phase.ANSWERING
    connection.deadline = NEVER  # the command's own time limit holds
    try:
        ROUTES[request.path][1](connection, data[: request.body_bytes])
    except Exception as exc:
        answer_error(connection, exc)
    return None


def _not_found() -> Refused:
    return Refused("invalid_request", "no such path", status=404, doors=DOORS)


def _upgrade_required() -> Refused:
    return Refused(
        "invalid_request", "this is a WebSocket; connect with a WebSocket client",
        status=426, headers={"Upgrade": "websocket", "Sec-WebSocket-Version": "13"},
    )  # fmt: skip


def send_response(
    connection: Connection, status: int, body: bytes, content_type: str = "application/json",
    headers: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Send the one answer of this socket and close it once the peer has had time to read it."""
    if connection.phase in (Phase.CLOSING, Phase.CLOSED):
        return
    fields = {"Connection": "close", "Cache-Control": "no-store", "Vary": "Origin"}
    if status != 204:  # which has no body to describe (RFC 9110, 8.6)
        fields |= {"Content-Length": str(len(body)), "Content-Type": content_type}
        fields["X-Content-Type-Options"] = "nosniff"
    fields |= headers or {}
    if connection.origin is not None:
        fields["Access-Control-Allow-Origin"] = connection.origin
    head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    is_head = connection.head is not None and connection.head.method == "HEAD"
    connection.phase = Phase.CLOSING
    connection.deadline = connection.loop.time() + LINGER_S + len(body) / SLOWEST_READER_BYTES_S
    connection.write(f"{head}\r\n".encode("latin-1") + (b"" if is_head else body))
    connection._half_close()


def refuse_http(connection: Connection, refused: Refused) -> None:
    """Answer with an error envelope, count it, and log it as far as the log can bear."""
    manager = connection.manager
    manager.metrics.refusals[refused.code] += 1
    text = str(refused)
    if refused.code == "forbidden" and manager.log_gate.admits(text[:300]):
        log.warning("%s refused: %s", connection.name, text)
    body = encode_error(refused.code, text, **refused.data)
    send_response(connection, refused.status, body, headers=refused.headers)


def refuse_late_request(connection: Connection) -> None:
    """The head or body did not arrive in time."""
    manager = connection.manager
    if connection.phase is Phase.HEAD and connection._tail is None:
        manager.metrics.refusals["timeout"] += 1
        return connection.abort()  # it never said a word
    limit_s = manager.config.open_timeout_s
    message = f"the request took longer than {limit_s:g} s to arrive (--open-timeout)"
    return refuse_http(connection, Refused("timeout", message, status=408))


def send_preflight(connection: Connection, allow: str) -> None:
    """Answer a CORS preflight; its Origin has been checked."""
    headers = {"Allow": allow}
    if connection.origin is not None:
        headers["Access-Control-Allow-Methods"] = allow
        headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type"
        headers["Access-Control-Max-Age"] = "600"
        if "access-control-request-private-network" in connection.head.headers:
            headers["Access-Control-Allow-Private-Network"] = "true"
    send_response(connection, 204, b"", headers=headers)


# Handlers: (connection, body) -> None; they answer, or start what will.


def answer_page(connection: Connection, body: bytes) -> None:
    """GET /: the console page, or a JSON index of the doors where that file is not there."""
    page = load_page()
    if page is None:
        index = {"name": "karna-ws", "version": __version__, "doors": DOORS}
        return send_response(connection, 200, dumps(index))
    content, policy = page
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
    return send_response(connection, 200, content, "text/html; charset=utf-8", headers)


@functools.lru_cache(maxsize=1)
def load_page() -> tuple[bytes, str] | None:
    """The console page and its Content-Security-Policy, which names its script and style."""
    try:
        content = (Path(__file__).parent / "web" / "console.html").read_bytes()
    except OSError:
        return None

    def hashes(tag: bytes) -> str:
        parts = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), content, re.DOTALL)
        digests = [b64encode(hashlib.sha256(part).digest()).decode() for part in parts]
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return content, (
        f"default-src 'none'; script-src {hashes(b'script')}; style-src {hashes(b'style')}; "
        "connect-src 'self' ws: wss:; img-src data: blob:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


def answer_health(connection: Connection, body: bytes) -> None:
    """GET /health: 200 while everything works, 503 with the reason otherwise."""
    manager = connection.manager
    if manager.is_draining:
        return send_response(connection, 503, dumps({"status": "draining"}))
    ill = {
        name: service.get_status()
        for name, service in manager.services.items()
        if service.state == "failed"
        # Degraded, a service still serves; but a backplane loses what others broadcast.
        or (service.state == "degraded" and service is manager.backplane)
    }
    if ill:
        return send_response(connection, 503, encode_json({"status": "unhealthy", "services": ill}))
    return send_response(connection, 200, b'{"status":"healthy"}')


def answer_status(connection: Connection, body: bytes) -> None:
    """GET /api/status: the status object."""
    send_response(connection, 200, connection.manager.encode_status())


def answer_ws(connection: Connection, body: bytes) -> None:
    """GET /ws without an upgrade."""
    raise _upgrade_required()


def read_object(body: bytes) -> dict[str, Any]:
    """A JSON body that must be an object. Raises Refused."""
    try:
        value = loads(body)
    except JSONDecodeError:
        raise Refused("invalid_json", "the body is not valid JSON in UTF-8") from None
    if not isinstance(value, dict):
        raise Refused("invalid_request", "the body must be a JSON object")
    return value


def answer_execute(connection: Connection, body: bytes) -> None:
    """POST /api/execute_command: run a command, answer as the raw door would."""
    params = read_object(body)
    client = connection.door = HttpClient(connection, connection.name)
    request = Request(client, None, None, len(body))
    answer = handle_request(request, {"method": "execute_command", "params": params})
    request.deliver(answer)


def answer_notify(connection: Connection, body: bytes) -> None:
    """POST /api/notify: broadcast a notification; 202 with how many clients it went to."""
    given = read_object(body)
    try:
        data = notification(given.get("message"), given.get("level", "info"))
    except ValueError as error:
        raise Refused("invalid_params", str(error)) from None
    connection.manager.spawn(_publish_notification(connection, data))


async def _publish_notification(connection: Connection, data: dict[str, str]) -> None:
    try:
        clients = await connection.manager.publish("notification", data)
    except Exception as exc:
        return answer_error(connection, exc)
    return send_response(connection, 202, dumps({"clients": clients}))


def answer_rpc(connection: Connection, body: bytes) -> None:
    """POST /rpc: JSON-RPC 2.0."""
    client = connection.door = JsonRpcHttpClient(connection, connection.name)
    try:
        message = loads(body)
    except JSONDecodeError:
        request = JsonRpcRequest(client, None, len(body), None)
        answer = request.fail("invalid_json", "the body is not valid JSON in UTF-8")
    else:
        answer = handle_json_rpc(client, message, len(body))
        messages = message if isinstance(message, list) else [message]
        if all(map(_is_notification, messages)) and answer is None:
            return send_response(connection, 204, b"")
    if answer is not None:
        client.deliver(answer, None)
    return None


class JsonRpcHttpClient(HttpClient):
    """One POST to /rpc; its status is 200 whatever the answer says."""

    __slots__ = ()

    def deliver(self, envelope: bytes, ack: int | None) -> None:
        send_response(self.connection, 200, envelope)


def answer_metrics(connection: Connection, body: bytes) -> None:
    """GET /metrics: Prometheus text format 0.0.4."""
    manager, metrics = connection.manager, connection.manager.metrics
    lines: list[str] = []
    add = functools.partial(_add_metric, lines)
    doors = {"raw": len(manager.raw), "socket.io": len(manager.sessions)}
    add("clients", "gauge", "Clients connected, by door.", _by("door", doors))
    add("sockets", "gauge", "Sockets open, HTTP and handshakes included.", len(manager.connections))
    add("received_bytes_total", "counter", "Bytes read from sockets.", manager.bytes_in)
    add("received_messages_total", "counter", "WebSocket messages read.", manager.messages_in)
    add("sent_messages_total", "counter", "Answers and broadcasts written.",
        manager.messages_out + manager.deliveries)  # fmt: skip
    add("sent_bytes_total", "counter", "Bytes written to WebSockets.", manager.bytes_out)
    add("broadcasts_total", "counter", "Broadcasts accepted.", manager.broadcasts)
    add("deliveries_total", "counter", "Broadcasts written, each client one.", manager.deliveries)
    add("commands_total", "counter", "Commands, methods and events that were started, by result.",
        _by("result", {"ok": manager.commands.done, **metrics.errors}))  # fmt: skip
    add("command_duration_seconds", "histogram", "How long those took that are not inline.",
        _histogram(metrics))  # fmt: skip
    add("dropped_total", "counter", "Clients dropped, by reason.", _by("reason", metrics.drops))
    add("refused_total", "counter", "Requests refused, by reason.", _by("reason", metrics.refusals))
    states = [(_label(name), service.state) for name, service in manager.services.items()]
    add("service_state", "gauge", "1 for the state each service is in.",
        {f'{{service="{name}",state="{state}"}}': 1 for name, state in states})  # fmt: skip
    add("loop_lag_seconds", "gauge", "How late the loop's last tick was.", metrics.loop_lag_s)
    add("tasks", "gauge", "Tasks of the event loop.", len(asyncio.all_tasks()))
    add("resident_memory_bytes", "gauge", "Resident memory of the process.", resident_bytes())
    text = "\n".join(lines) + "\n"
    send_response(connection, 200, text.encode(), "text/plain; version=0.0.4; charset=utf-8")


def _add_metric(
    lines: list[str], name: str, kind: str, help: str, values: float | Mapping[str, float]
) -> None:
    lines += [f"# HELP karna_{name} {help}", f"# TYPE karna_{name} {kind}"]
    samples = values if isinstance(values, Mapping) else {"": values}
    lines += [f"karna_{name}{labels} {value}" for labels, value in samples.items()]


def _by(label: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f'{{{label}="{_label(key)}"}}': value for key, value in values.items()}


def _label(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _histogram(metrics: Metrics) -> dict[str, float]:
    limits = [*map("{:g}".format, LATENCY_BUCKETS_S), "+Inf"]
    counts = itertools.accumulate(metrics.latency_buckets)
    buckets = {f'_bucket{{le="{x}"}}': n for x, n in zip(limits, counts, strict=True)}
    total = sum(metrics.latency_buckets)
    return {**buckets, "_sum": metrics.latency_sum_s, "_count": total}


def resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


# Path -> the method it takes, its handler, and what tells of it.
ROUTES: dict[str, tuple[str, Callable[[Connection, bytes], None], str]] = {
    "/": ("GET", answer_page, "GET: console page"),
    "/health": ("GET", answer_health, "GET: is everything well"),
    "/api/status": ("GET", answer_status, "GET: status of the services"),
    "/api/execute_command": (
        "POST", answer_execute, 'POST {"command": "...", ...params}: run a command'),
    "/api/notify": (
        "POST", answer_notify, 'POST {"message": "...", "level": "info"}: notify every client'),
    "/rpc": ("POST", answer_rpc, "POST: JSON-RPC 2.0"),
    "/metrics": ("GET", answer_metrics, "GET: Prometheus metrics"),
    "/ws": ("GET", answer_ws, "WebSocket: JSON requests, one a message"),
    "/ws/": ("GET", answer_ws, ""),
}  # fmt: skip
DOORS = {
    "/socket.io/": "Socket.IO: websocket transport, namespaces / and /ws",
    **{path: text for path, (_, _, text) in ROUTES.items() if text},
}


# --- 9 server ----------------------------------------------------------------------------------
# Bind first, then start services; at the end let commands finish, tell every client to come back
# (1012), and cut those that don't listen.

SHUTDOWN_CLOSE_S = 2.0  # a peer that ignores our close must not hold up a restart
CANCEL_S = 5.0  # for cancelled commands to clean up; services.CANCEL_WAIT_S is inside
BACKPLANE_S = 2.0  # to load history from Redis before the first client is let in
BACKLOG = 512  # connections the kernel completes while we are busy


class Server:
    """A server that runs: where it listens, and how to end it."""

    def __init__(self, manager: WebSocketManager, config: Config) -> None:
        self.manager = manager
        self.config = config
        self.sockets: list[socket.socket] = []
        self._websocket_server: WebSocketServer | None = None
        self._monitor = Monitor(())
        self._sweep: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._unix_file: os.stat_result | None = None

    @property
    def port(self) -> int:
        """The TCP port it listens on; 0 on a Unix socket."""
        name = self.sockets[0].getsockname()
        return name[1] if isinstance(name, tuple) else 0

    async def start(self) -> None:
        """Bind, then start the services. Raises StartError, in one line that names the mend."""
        manager = self.manager
        if manager.loop is not None:
            raise StartError("this manager is served already")
        check_binding(self.config)
        manager.configure(self.config)
        manager.use_backplane(make_backplane(self.config))
        manager.is_draining = False
        self._websocket_server = await self._bind()
        self.sockets = list(self._websocket_server.sockets)
        manager.reader = self._make_reader()
        manager.loop, manager._thread = asyncio.get_running_loop(), threading.get_ident()
        self._sweep = asyncio.create_task(manager.sweep(), name="sweep")
        self._sweep.add_done_callback(self._sweep_ended)
        self._monitor = Monitor(manager.services.values())
        self._monitor.start()
        try:
            if manager.backplane is not None:
                # Clients that come back at once would else find no history, as without Redis.
                with suppress(TimeoutError):
                    await asyncio.wait_for(manager.backplane.is_loaded.wait(), BACKPLANE_S)
            await self._websocket_server.start_serving()
        except BaseException:  # cancelled: nobody has this server yet to close it
            await self.close()
            raise

    def _make_reader(self) -> SocketReader | None:
        """What reads the WebSockets; None where asyncio's transports have to."""
        if not hasattr(select, "epoll"):  # not Linux
            return None
        try:
            reader = SocketReader(self.manager, asyncio.get_running_loop())
        except OSError as error:
            cast(WebSocketServer, self._websocket_server).close()
            self._remove_unix_file()
            raise StartError(f"can't watch sockets: {error.strerror}") from None
        if self.sockets[0].family != socket.AF_UNIX:
            reader.trust_edges()
        return reader

    async def _bind(self) -> WebSocketServer:
        config = self.config
        options: dict[str, Any] = {
            "create_connection": functools.partial(Connection, self.manager),
            "compression": None,  # 64 KiB a client, and a small message could unpack to gigabytes
            "ping_interval": None,  # one sweep pings all
            "max_size": config.max_message_bytes,
            "open_timeout": config.open_timeout_s,
            "close_timeout": config.close_timeout_s,
            "logger": _library_log,
            "backlog": BACKLOG,
            "start_serving": False,
        }
        if config.certfile:
            options["ssl"] = make_tls_context(config)
        try:
            inherited = inherited_socket()
            if inherited is not None:
                name = inherited.getsockname()
                if isinstance(name, tuple):
                    check_binding(replace(config, host=name[0]))
                    return await websockets_serve(_unused_handler, sock=inherited, **options)
                return await websockets_unix_serve(_unused_handler, sock=inherited, **options)
            if config.unix is not None:
                return await self._bind_unix(config.unix, options)
            if config.reuse_port:
                options["reuse_port"] = True
            return await websockets_serve(_unused_handler, config.host, config.port, **options)
        except OSError as error:
            raise StartError(_explain_bind(config, error)) from None

    async def _bind_unix(self, path: str, options: dict[str, Any]) -> WebSocketServer:
        if _is_served(path):
            raise StartError(f"{path} is in use by another server; choose another with --unix")
        mask = os.umask(0o177)  # who can write to the socket can execute commands: its owner only
        try:
            server = await websockets_unix_serve(_unused_handler, path, **options)
        finally:
            os.umask(mask)
        self._unix_file = os.stat(path)
        return server

    def _sweep_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self.manager.log_error("sweep ended", task.exception() or RuntimeError("without error"))
            self.close()

    def close(self) -> asyncio.Task[None]:
        """Begin to stop; the task it returns ends when everything has."""
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        return self._closing

    async def wait_closed(self) -> None:
        """Wait until the server has stopped."""
        while self._closing is None:
            assert self._sweep is not None
            await asyncio.wait([self._sweep])
            await asyncio.sleep(0)
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        manager = self.manager
        manager.is_draining = True
        manager.prepared = {}
        log.info("stopping: %d clients", manager.count_clients())
        await self._finish_commands()
        assert self._websocket_server is not None
        self._websocket_server.close(close_connections=False)
        manager.flush_broadcasts()
        for connection in tuple(manager.connections):
            connection.close(CloseCode.SERVICE_RESTART, "service restart")
            if connection.phase is Phase.HEAD:  # it has asked for nothing yet
                connection.abort()
        await self._wait_for_peers(min(self.config.close_timeout_s, SHUTDOWN_CLOSE_S))
        for connection in tuple(manager.connections):
            connection.abort()
        await self._wait_for_peers(1.0)
        await self._monitor.stop()
        tasks = [*manager.tasks, cast("asyncio.Task[None]", self._sweep)]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=CANCEL_S)
        await self._websocket_server.wait_closed()
        self._remove_unix_file()
        manager.loop = None
        if manager.reader is not None:
            manager.reader.close()
            manager.reader = None
        log.info("stopped")

    async def _finish_commands(self) -> None:
        """Running commands get their grace, then they are cancelled and their clients told."""
        manager = self.manager
        until = time.monotonic() + self.config.grace_s
        # Again and again: what waited for a running command begins when that ends.
        while manager.tasks and (left_s := until - time.monotonic()) > 0:
            await asyncio.wait(tuple(manager.tasks), timeout=left_s)
        doors = [connection.door for connection in manager.connections]
        asking = [door for door in doors if isinstance(door, HttpClient)]
        for client in [*manager.all_clients(), *asking]:
            if client.calls is not None:
                client.calls.stop()
        if manager.tasks:
            await asyncio.wait(tuple(manager.tasks), timeout=CANCEL_S)

    async def _wait_for_peers(self, limit_s: float) -> None:
        manager = self.manager
        manager.when_empty = asyncio.Event()
        if manager.connections:
            with suppress(TimeoutError):
                await asyncio.wait_for(manager.when_empty.wait(), limit_s)

    def _remove_unix_file(self) -> None:
        if self._unix_file is not None:
            path = cast(str, self.config.unix)
            with suppress(OSError):  # gone already
                if os.path.samestat(os.stat(path), self._unix_file):  # not a successor's
                    os.unlink(path)


_library_log = logging.getLogger("karna_ws.websockets")
_library_log.setLevel(logging.ERROR)  # it would log each connection twice


async def _unused_handler(connection: ServerConnection) -> None:
    """`websockets.serve` wants a handler; a Connection never calls it."""


def check_binding(config: Config) -> None:
    """Refuse to listen beyond this machine without a token. Raises StartError."""
    is_guarded = config.unix is not None or config.token is not None or config.insecure_no_token
    if not is_guarded and not is_loopback(config.host):
        raise StartError(
            f"listening on {config.host or 'all addresses'} lets others command this machine: set "
            "a token (--token or KARNA_TOKEN), or accept that with --insecure-no-token"
        )


def is_loopback(host: str) -> bool:
    """Do all addresses of this host belong to this machine alone?"""
    if not host:
        return False
    if is_ip_address(host) or is_ip_address(f"[{host}]"):  # most are: saves the codecs for names
        return host.startswith("127.") or host == "::1"
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        reason = error.strerror or error
        raise StartError(f"host {host!r} is no address of this machine: {reason}") from None
    addresses = [str(address[0]) for *_, address in found]
    return all(address.startswith("127.") or address == "::1" for address in addresses)


def inherited_socket() -> socket.socket | None:
    """The listening socket that systemd passed, if it did (sd_listen_fds)."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    if os.environ.get("LISTEN_FDS") != "1":
        raise StartError("exactly one socket can be taken over (LISTEN_FDS)")
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)  # not for programs that we start
    inherited = socket.socket(fileno=3)
    inherited.set_inheritable(False)
    return inherited


def _is_served(path: str) -> bool:
    """Does a server accept connections on this Unix socket?"""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                raise StartError(f"{path} exists and is no socket; choose another with --unix")
            probe.settimeout(1.0)
            probe.connect(path)
        except OSError:
            return False
    return True


def _explain_bind(config: Config, error: OSError) -> str:
    where = config.unix or f"{config.host}:{config.port}"
    flag = "--unix" if config.unix else "--port"
    if error.errno == errno.EADDRINUSE:
        return f"{where} is in use; choose another with {flag}"
    if error.errno == errno.EACCES:
        wanted = flag if config.unix else f"{flag}, 1024 or more"
        return f"not allowed to listen on {where}; choose another with {wanted}"
    # asyncio's own text would name the address again; getaddrinfo's numbers are negative.
    number = error.errno or 0
    reason = os.strerror(number) if number > 0 else error.strerror or error
    return f"can't listen on {where}: {reason}"


def make_tls_context(config: Config) -> Any:
    """The TLS context of --certfile and --keyfile. Raises StartError."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cast(str, config.certfile), config.keyfile)
    except (OSError, ssl.SSLError) as error:
        reason = error.strerror or error
        raise StartError(f"can't use the TLS certificate {config.certfile}: {reason}") from None
    return context


def make_backplane(config: Config) -> RedisBackplane | None:
    """The backplane of --backplane. Raises StartError."""
    if config.backplane is None:
        return None
    try:
        return RedisBackplane(config.backplane)
    except ImportError:
        raise StartError("--backplane needs the redis package: pip install redis") from None
    except ValueError:  # its text may hold the password
        raise StartError("--backplane must look like redis://host:6379") from None


def make_config(options: Mapping[str, Any]) -> Config:
    """Config from keyword options. Raises TypeError or ValueError that names the option."""
    values = dict(options)
    for name in values.keys() & {"allow_origin", "allow_host", "namespaces"}:
        given = values[name] or ()
        given = (given,) if isinstance(given, str) else given
        values[name] = tuple(given) if isinstance(given, Iterable) else given
    return Config(**values)


@asynccontextmanager
async def serving(manager: WebSocketManager, **options: Any) -> AsyncIterator[Server]:
    """Serve while the block runs: `async with serving(manager, port=0) as server`.

    Options are those of Config. Raises StartError when the server can't start, ValueError or
    TypeError for a wrong option.
    """
    server = Server(manager, make_config(options))
    await server.start()
    try:
        yield server
    finally:
        await server.close()


async def serve(manager: WebSocketManager, **options: Any) -> None:
    """Serve until SIGTERM, SIGINT or cancellation, then stop gracefully.

    Options and errors are those of `serving`. A second signal ends the process at once.
    """
    async with serving(manager, **options) as server:
        with stopping_on_signals(server):
            await server.wait_closed()


@contextmanager
def stopping_on_signals(server: Server) -> Iterator[None]:
    """While the block runs, SIGTERM and SIGINT stop the server."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals; the program decides
        return
    loop = asyncio.get_running_loop()

    def stop(number: int) -> None:
        if server.manager.is_draining:
            kill_programs()
            os._exit(128 + number)
        log.info("%s: stopping", signal.Signals(number).name)
        server.close()

    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, stop, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


# --- 10 main -----------------------------------------------------------------------------------
# Flags and environment variables are made from the fields of Config.

LAST_RESORT_S = 1.0  # after the last client has gone, for tasks that ignore their cancellation
LOG_LEVELS = ("debug", "info", "warning", "error")
GROUPS = {
    "where": "where to listen", "who": "who may come in", "limits": "limits",
    "heartbeat": "heartbeat and Socket.IO", "recovery": "recovery and scale-out",
    "commands": "commands and models", "run": "running",
}  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    """The command line: one flag for each option, grouped."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:  # without the usage: one line
            self.exit(2, f"karna_ws: {message}; --help shows the flags\n")

    parser = Parser(
        prog="karna_ws.py",
        usage="karna_ws.py [FLAG ...]",
        description="Serve commands, status and broadcasts over WebSocket, Socket.IO and HTTP.",
        epilog="Every flag can be set as KARNA_NAME in the environment, such as KARNA_PORT=9000; "
        "lists are separated by commas there.",
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=32),
    )
    parser.add_argument("--version", action="version", version=f"karna_ws {__version__}")
    groups = {key: parser.add_argument_group(title) for key, title in GROUPS.items()}
    for option in fields(Config):
        _add_flag(groups[option.metadata["group"]], option)
    _add_host_flags(groups)
    return parser


def _add_flag(group: Any, option: Any) -> None:
    default, metadata = option.default, option.metadata
    flag = _flag(option)
    given = _environment(flag)
    metavar = metadata["metavar"] or option.name.upper()
    more: dict[str, Any] = {"dest": option.name, "help": metadata["help"]}
    if isinstance(default, bool):
        flag, variable = "--no-" + flag[2:] if default else flag, flag
        more |= {"action": "store_const", "const": not default}
        more["default"] = default if given is None else _read_bool(variable, given)
    elif isinstance(default, tuple):
        parts = [part.strip() for part in (given or "").split(",")]
        more |= {"action": "append", "metavar": metavar, "default": [*filter(None, parts)]}
        more["help"] += " (repeatable)"
    else:
        kind = {"int": int, "float": float, "float | None": float}.get(str(option.type), str)
        more |= {"type": kind, "metavar": metavar, "default": default if given is None else given}
        more["help"] += "" if default is None else " (default: %(default)s)"
    group.add_argument(flag, **more)


def _flag(option: Any) -> str:
    name: str = option.metadata["flag"] or option.name.removesuffix("_s").replace("_", "-")
    return f"--{name}"


def _variable(flag: str) -> str:
    return "KARNA_" + flag.removeprefix("--").replace("-", "_").upper()


def _environment(flag: str) -> str | None:
    return os.environ.get(_variable(flag)) or None


def _read_bool(flag: str, text: str) -> bool:
    if text.lower() in ("1", "true", "yes"):
        return True
    if text.lower() in ("0", "false", "no"):
        return False
    raise ValueError(f"{_variable(flag)} must be 1 or 0, not {text!r}")


def _add_host_flags(groups: Mapping[str, Any]) -> None:
    """Flags of the program that are no options of `serve()`."""
    programs = _environment("--allow-program")
    groups["commands"].add_argument(
        "--allow-program", action="append", metavar="NAME[=PATH]",
        default=programs.split(",") if programs else [],
        help="make a program of this machine a command (repeatable)",
    )  # fmt: skip
    model = "its model (default: the first it lists); its key comes from"
    for flag, metavar, help in (
        ("--vision-url", "URL", "OpenAI-compatible model server for vision, such as "
         "http://localhost:11434"),
        ("--vision-model", "NAME", f"{model} KARNA_VISION_KEY"),
        ("--language-url", "URL", "the same for language"),
        ("--language-model", "NAME", f"{model} KARNA_LANGUAGE_KEY"),
    ):  # fmt: skip
        default = _environment(flag)
        groups["commands"].add_argument(flag, metavar=metavar, default=default, help=help)
    groups["run"].add_argument(
        "--log-level", metavar="LEVEL", type=str.lower,
        default=_environment("--log-level") or "info",
        help=f"{', '.join(LOG_LEVELS[:-1])} or {LOG_LEVELS[-1]} (default: info)",
    )  # fmt: skip


def make_manager(arguments: argparse.Namespace) -> WebSocketManager:
    """The manager that the command line describes. Raises ValueError that names the flag."""
    for service in ("vision", "language"):
        if getattr(arguments, f"{service}_model") and not getattr(arguments, f"{service}_url"):
            raise ValueError(f"--{service}-model needs --{service}-url")
    vision = VisionService(url=arguments.vision_url, model=arguments.vision_model)
    language = LanguageService(url=arguments.language_url, model=arguments.language_model)
    manager = WebSocketManager(services=[vision, language])
    for program in arguments.allow_program:
        name, _, path = program.partition("=")
        manager.commands.allow_program(name, path or None)
    return manager


def warn_of_misspelt(environment: Iterable[str], arguments: Iterable[str]) -> None:
    """A variable that is nearly one of ours does nothing, and its owner should know."""
    flags = [*map(_flag, fields(Config)), *arguments, "vision-key", "language-key"]
    known = {_variable(flag) for flag in flags}
    for name in environment:
        if name.startswith("KARNA_") and name not in known:
            from difflib import get_close_matches

            for meant in get_close_matches(name, known, 1, 0.8):
                log.warning("the variable %s means nothing; is it %s?", name, meant)


def in_terms_of_flags(error: Exception) -> str:
    """An error's text; the option that it begins with as the flag that people know."""
    name, _, rest = str(error).partition(" ")
    flags = {option.name: _flag(option) for option in fields(Config)}
    return f"{flags.get(name, name)} {rest}"


def new_event_loop(name: str) -> asyncio.AbstractEventLoop:
    """The event loop of that name; "auto" is uvloop where it is installed."""
    if name != "asyncio":
        try:
            import uvloop

            return cast(asyncio.AbstractEventLoop, uvloop.new_event_loop())
        except ImportError:
            if name == "uvloop":
                raise StartError("uvloop is not installed: pip install uvloop") from None
    return asyncio.new_event_loop()


def describe_server(server: Server) -> str:
    """What a person reads at the start: the doors, who may come in, what to try."""
    config = server.config
    if config.unix is not None:
        base = socket_base = f"unix:{config.unix}"
    else:
        place = f"{_shown_host(server.sockets[0])}:{server.port}"
        secure = "s" if config.certfile else ""
        base, socket_base = f"http{secure}://{place}", f"ws{secure}://{place}"
    return f"""\
Karna WS {__version__}
  console    {base}/
  raw        {socket_base}/ws
  Socket.IO  {socket_base}/ws  (socket.io-client 3 or 4, transports: ['websocket'])
  REST       {base}/api/status
  JSON-RPC   {base}/rpc
  metrics    {base}/metrics
  open to    {_shown_access(config)}
  try        {_shown_trial(config, base)}"""


def _shown_host(listening: socket.socket) -> str:
    name = listening.getsockname()
    if not isinstance(name, tuple) or name[0] in ("127.0.0.1", "0.0.0.0", "::", "::1"):
        return "localhost"
    return f"[{name[0]}]" if ":" in name[0] else str(name[0])


def _shown_access(config: Config) -> str:
    if config.unix is not None:
        who = "the owner of the socket's file"
    elif is_loopback(config.host):
        who = "this machine, and pages served from it"
    else:
        who = f"everyone who reaches {config.host or 'this machine'}"
    pages = f", and pages of {', '.join(config.allow_origin)}" if config.allow_origin else ""
    return f"{who}{pages}; {'with the token' if config.token else 'without a token'}"


def _shown_trial(config: Config, base: str) -> str:
    token = ' -H "Authorization: Bearer $KARNA_TOKEN"' if config.token else ""
    unix = f" --unix-socket {config.unix}" if config.unix else ""
    url = "http://localhost" if config.unix else base
    body = """ -H 'Content-Type: application/json' -d '{"command": "help"}'"""
    return f"curl{unix}{token}{body} {url}/api/execute_command"


def say(text: str, stream: Any = None) -> None:
    """Print for a person; a closed stdout or stderr must not end the server."""
    with suppress(OSError, ValueError):
        print(text, file=stream, flush=True)


def open_standard_files() -> None:
    """Put /dev/null where stdin, stdout or stderr is closed; else a socket takes that number.

    What libraries write to stderr would go to a client then, and libuv aborts the process.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def set_up_logging(level: str) -> None:
    """One line an event on stderr; a log that can't be written is no reason to fail."""
    if level not in LOG_LEVELS:
        raise ValueError(f"--log-level must be one of {', '.join(LOG_LEVELS)}, not {level!r}")
    logging.raiseExceptions = False
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)-7s %(message)s")


async def run(manager: WebSocketManager, options: Mapping[str, Any]) -> None:
    """Serve as `serve()` does, and say so."""
    asyncio.get_running_loop().set_exception_handler(functools.partial(log_loop_error, manager))
    async with serving(manager, **options) as server:
        with stopping_on_signals(server):
            say(describe_server(server))
            await server.wait_closed()


def log_loop_error(
    manager: WebSocketManager, loop: asyncio.AbstractEventLoop, context: dict[str, Any]
) -> None:
    """What asyncio could not tell anybody else, such as no descriptors left to accept with."""
    exc = context.get("exception")
    if manager.log_gate.admits(f"loop, {type(exc).__name__}"):
        log.error("%s: %s", context["message"], exc)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server from flags and environment; the exit code."""
    gc.freeze()  # what is loaded by now stays: full collections need not walk it
    open_standard_files()
    try:
        arguments = make_parser().parse_args(argv)
        set_up_logging(arguments.log_level)
        warn_of_misspelt(os.environ, vars(arguments))
        options = {option.name: getattr(arguments, option.name) for option in fields(Config)}
        config = make_config(options)
        manager = make_manager(arguments)
        loop_factory = functools.partial(new_event_loop, config.loop)
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(run(manager, options))
            # Closing the runner waits for every task, even one that ignores its cancellation.
            last_resort = threading.Timer(LAST_RESORT_S, os._exit, (0,))
            last_resort.daemon = True
            last_resort.start()
        last_resort.cancel()
    except (StartError, ValueError) as error:
        say(f"karna_ws: {in_terms_of_flags(error)}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
