"""One HTTP exchange: a request and its one answer; the first door of every socket.

The websockets library refuses request bodies, answers in plain text and takes 40 microseconds a
handshake, so HTTP is read and answered here. A connection is kept for the next request unless
either side says `close`; each request has an Exchange of its own, and they are answered in order.
An answer comes whole, or as a stream of events.

Touches its connection; knows no path: `route`, given by the top, upgrades or answers. `accept` at
the end is the WebSocket handshake.
"""

from __future__ import annotations

import functools
import hashlib
import re
from base64 import b64encode
from collections.abc import Callable, Mapping
from enum import Enum
from http import HTTPStatus
from typing import Any

from karna.calls import Client, Request
from karna.connection import SLOWEST_READER_BYTES_S, Connection
from karna.door import HOLD_ANSWER, NEVER, Door, Phase
from karna.envelopes import INTERNAL_ERROR, encode_error
from karna.errors import HTTP_STATUS, InvalidRequest, RequestError, explain
from karna.head import MAX_HEAD_BYTES, ChunkedBody, Head, body_too_large, check_partial_head
from karna.head import options_of, parse_head
from karna.text import encodable
from karna.trace import responded

MAX_PIPELINED_BYTES = 64 * 1024  # that wait for an answer; then the connection is not read
PROBE_S = 2.0  # how often a peer that sends no more is asked whether it still listens

Handler = Callable[["Exchange", bytes], None]  # answers an exchange, whose body it gets


class Stage(Enum):
    """How far an exchange has come."""

    HEAD = "head"  # the head is arriving
    BODY = "body"  # the body is arriving
    ANSWERING = "answering"
    STREAMING = "streaming"  # the answer has begun, and comes in events
    DONE = "done"


class Exchange(Door):
    """One HTTP request on a connection, and its one answer.

    route: called once the head is there; it raises RequestError, upgrades the connection, or calls
    `serve`. client: who asked for a command that runs, if one does. ends_with_peer: a peer that
    ends its side has lost interest in the answer.
    """

    __slots__ = (
        "_chunks", "_handler", "_has_begun", "_has_ended", "_is_first", "_is_timed", "_may_stream",
        "_rest", "_stage", "client", "connection", "ends_with_peer", "head", "is_last", "origin",
        "route",
    )  # fmt: skip
    head: Head  # from the end of Stage.HEAD on
    _handler: Handler
    _chunks: ChunkedBody | None

    def __init__(self, connection: Connection, route: Callable[[Exchange], None]) -> None:
        self.connection = connection
        self.route = route
        self.client: Client | None = None
        self.origin: str | None = None  # the allowed origin that a CORS answer names
        self.is_last = True  # until a head that is well formed says otherwise
        self.ends_with_peer = self._may_stream = False
        self._stage = Stage.HEAD
        self._rest = b""  # what arrived behind this request
        self._is_first = self._is_timed = True  # of its connection, which has a deadline
        self._has_begun = False  # to arrive
        self._has_ended = False  # the peer sends no more

    # Reading.

    def take(self, data: bytes) -> None:
        if self._stage is Stage.HEAD:
            self._take_head(data)
        elif self._stage is Stage.BODY:
            self._take_body(data)
        else:  # a pipelined request waits for the answer to this one
            self._rest += data
            if len(self._rest) > MAX_PIPELINED_BYTES:
                self.connection.hold(HOLD_ANSWER)

    def _take_head(self, data: bytes) -> None:
        """Collect the head; once it is whole, route the request or refuse it."""
        self._has_begun = True
        try:
            end = data.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES)
            if end < 0:
                check_partial_head(data)
                return self._wait_for(data)
            self.head = parse_head(data[: end + 4])
            self._rest = data[end + 4 :]
            self._stage = Stage.BODY if self.head.has_body else Stage.ANSWERING
            self.route(self)
        except Exception as exc:
            self.fail(exc)

    def serve(self, wanted: str, handler: Handler) -> None:
        """Let `handler` answer, with the body, if the method is the wanted one.

        Raises RequestError; answers OPTIONS, and HEAD where GET is wanted.
        """
        head = self.head
        self.is_last = head.is_last
        allow = "GET, HEAD, OPTIONS" if wanted == "GET" else "POST, OPTIONS"
        if head.method == "OPTIONS":
            handler = self._preflight(allow)
        elif head.method != wanted and (head.method, wanted) != ("HEAD", "GET"):
            message = f"{head.path} takes {allow}"
            raise InvalidRequest(message, status=405, headers={"Allow": allow})
        elif wanted == "POST":
            self._check_body()
        limit = self.connection.hub.config.max_body_bytes
        if head.body_bytes > limit:
            raise body_too_large(limit)
        if head.expects_continue and (head.is_chunked or len(self._rest) < head.body_bytes):
            self.connection.send_bytes(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._handler = handler
        self._chunks = ChunkedBody(limit) if head.is_chunked else None
        self._take_body(self._rest)

    def _check_body(self) -> None:
        """What a POST announces must be what we take."""
        kind = self.head.headers.get("content-type", "")
        if kind not in JSON_TYPES and kind.partition(";")[0].strip().lower() not in JSON_TYPES:
            message = "the body must be JSON, with Content-Type: application/json"
            raise InvalidRequest(message, status=415)
        if "content-length" not in self.head.headers and not self.head.is_chunked:
            raise InvalidRequest("a body needs Content-Length", status=411)

    def _take_body(self, data: bytes) -> None:
        """Collect the body, by the deadline of the head; handle the request when it is whole."""
        if self._chunks is not None:
            return self._take_chunks(data, self._chunks)
        size = self.head.body_bytes
        if len(data) < size:
            return self._wait_for(data, size)
        return self._handle(data[:size], data[size:])

    def _take_chunks(self, data: bytes, chunks: ChunkedBody) -> None:
        try:
            rest, is_whole = chunks.take(data)
        except RequestError as error:
            return self.fail(error)
        return self._handle(bytes(chunks.data), rest) if is_whole else self._wait_for(rest)

    def _handle(self, body: bytes, rest: bytes) -> None:
        self._stage = Stage.ANSWERING
        self._rest = rest
        self.connection.deadline = NEVER  # the command's own time limit holds
        if self._has_ended:
            self._set_probe()
        try:
            self._handler(self, body)
        except Exception as exc:
            self.fail(exc)

    def _wait_for(self, data: bytes, need: int = 0) -> None:
        """Keep what has arrived, unless nothing can follow it."""
        if self._has_ended:
            return self.connection.close_http(0, has_ended=True)
        if not self._is_timed:  # its connection was idle until now
            self._is_timed = True
            self._set_deadline(0)
        return self.connection.keep(data, need)

    def take_end(self) -> bool:
        """An answer that is still to come reaches a peer that has only ended its own side."""
        self._has_ended = True
        is_answering = self._stage in (Stage.ANSWERING, Stage.STREAMING) and not self.ends_with_peer
        waits_for_its_turn = not self._has_begun and self.connection.has_kept
        if not (is_answering or waits_for_its_turn):
            return False
        if not self.connection.transport.can_write_eof():
            return False
        if self._stage is Stage.ANSWERING:
            self._set_probe()
        return True

    def _set_probe(self) -> None:
        if not self.head.is_http_1_0:
            self.connection.deadline = self.connection.loop.time() + PROBE_S

    # Answering.

    def answer(
        self, status: int, body: bytes, content_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """Send the one answer; then the next request has its turn, or the socket is closed."""
        connection = self.connection
        if self._stage is Stage.DONE or connection.phase is not Phase.HTTP:
            return
        if self._stage is Stage.STREAMING:  # too late to say something else
            return connection.abort()
        self._decide_on_next()
        head = self._encode_head(status, len(body), content_type, headers or {})
        request = getattr(self, "head", None)
        connection.send_bytes(head if request and request.method == "HEAD" else head + body)
        if connection.hub.traces:
            responded(connection, request, status)
        self._finish(len(body))

    def _decide_on_next(self) -> None:
        """Before the head of the answer: may another request follow on this connection?"""
        if self._stage is not Stage.ANSWERING or self.connection.hub.is_draining:
            self.is_last = True  # what may still arrive is no request
        self.is_last = self.is_last or (self._has_ended and not self._rest)

    def _finish(self, answer_bytes: int) -> None:
        """The answer is written: the next request has its turn, or the socket is closed."""
        self._stage = Stage.DONE
        self.client = None  # which holds on to this
        if self.is_last:
            self.connection.close_http(answer_bytes, has_ended=self._has_ended)
        else:
            self._set_deadline(answer_bytes)
            self._give_way()

    def allow_stream(self) -> None:
        """The answer may take long: events or comments show the peer that it is still to come.

        Behind a proxy an answer that says nothing for a minute is given up.
        """
        self._may_stream = True
        self._set_keep_alive(self.connection.loop.time())

    def _set_keep_alive(self, now: float) -> None:
        self.connection.deadline = now + self.connection.hub.config.raw_ping_interval_s

    @property
    def is_streaming(self) -> bool:
        """Has a stream of events begun? Then the answer is its last one, by `end_stream`."""
        return self._stage is Stage.STREAMING

    def send_event(self, data: bytes) -> None:
        """Send one server-sent event; the first makes the answer a stream of them.

        Never waits: who sends in a loop awaits `connection.written()`. A peer whose unsent bytes
        pass their limit is dropped.
        """
        connection = self.connection
        if self._is_open and not connection.is_writable and connection.is_behind:
            connection.hub.drop(connection.name, "slow")
            connection.abort()
        elif self._is_open:
            connection.send_bytes(self._framed(_event(data)))

    def end_stream(self, data: bytes) -> None:
        """Send the last event of a stream that has begun."""
        if self._is_open:
            piece = self._framed(_event(data))
            self.connection.send_bytes(piece if self.head.is_http_1_0 else piece + b"0\r\n\r\n")
            self.is_last = self.is_last or self.connection.hub.is_draining
            self._finish(len(data))

    @property
    def _is_open(self) -> bool:
        stage, phase = self._stage, self.connection.phase
        return stage in (Stage.ANSWERING, Stage.STREAMING) and phase is Phase.HTTP

    def _framed(self, piece: bytes) -> bytes:
        """A piece of a stream as it is sent; before the first one the head.

        Chunked (RFC 9112, 7.1): the connection is kept for the next request, and a stream that was
        cut is told from one that has ended. HTTP/1.0 has no chunks, and its connection closes.
        """
        head = b"" if self.is_streaming else self._begin_stream()
        if self.head.is_http_1_0:
            return head + piece
        return b"%b%x\r\n%b\r\n" % (head, len(piece), piece)

    def _begin_stream(self) -> bytes:
        self._decide_on_next()
        self._stage = Stage.STREAMING
        self._set_keep_alive(self.connection.loop.time())
        headers = {} if self.head.is_http_1_0 else {"Transfer-Encoding": "chunked"}
        headers["X-Accel-Buffering"] = "no"  # nginx would keep events until it has a page of them
        return self._encode_head(200, None, "text/event-stream", headers)

    def _give_way(self) -> None:
        """The next request of the connection has its turn."""
        connection, follower = self.connection, Exchange(self.connection, self.route)
        follower._is_first = follower._is_timed = False
        follower._has_ended = self._has_ended
        connection.door = follower
        if self._rest:
            connection.keep(self._rest)
            if len(self._rest) > MAX_PIPELINED_BYTES:
                connection.wait_for_turn()  # without reading on
            else:
                connection.hub.turns.wait(connection.read_kept)
        connection.release(HOLD_ANSWER)

    def _set_deadline(self, answer_bytes: int) -> None:
        """For a request to arrive, once the peer had time to read the answer before it."""
        limit_s = self.connection.hub.config.open_timeout_s
        now = self.connection.loop.time()
        self.connection.deadline = now + limit_s + answer_bytes / SLOWEST_READER_BYTES_S

    def _encode_head(
        self, status: int, size: int | None, content_type: str, headers: Mapping[str, str]
    ) -> bytes:
        if status == 200 and size is not None and not headers and self.origin is None:
            return _usual_head(content_type, self.is_last) % size
        more = dict(headers)
        if self.origin is not None:
            more["Access-Control-Allow-Origin"] = self.origin
        length = None if size is None else str(size)
        return _encode_head(status, length, content_type, self.is_last, more)

    def _preflight(self, allow: str) -> Handler:
        """A CORS preflight; its Origin has been checked."""
        headers = {"Allow": allow}
        if self.origin is not None:
            headers["Access-Control-Allow-Methods"] = allow
            headers["Access-Control-Allow-Headers"] = ALLOWED_HEADERS
            headers["Access-Control-Max-Age"] = "600"
            if "access-control-request-private-network" in self.head.headers:
                headers["Access-Control-Allow-Private-Network"] = "true"
        return lambda exchange, body: exchange.answer(204, b"", headers=headers)

    def fail(self, exc: Exception) -> None:
        """Answer with what went wrong: an error envelope; a bug of ours is logged."""
        hub = self.connection.hub
        if self._stage is Stage.ANSWERING:  # all of the request was read: the next may follow
            self.is_last = self.head.is_last
        if not isinstance(exc, RequestError):
            hub.log_error(f"{self.connection.name} HTTP request failed", exc)
            return self.answer(500, INTERNAL_ERROR)
        text = explain(exc)
        hub.metrics.refusals[exc.code] += 1
        if exc.code == "forbidden":
            hub.log_gate.warning("refused", "%s refused: %s", self.connection.who, text)
        body = exc.body or encode_error(exc.code, encodable(text), **exc.data)
        return self.answer(exc.status, body, headers=exc.headers)

    # Its end.

    def on_deadline(self, now: float) -> None:
        """The head or the body did not arrive in time; or nobody may wait for the answer."""
        connection = self.connection
        if self._stage is Stage.STREAMING or (self._may_stream and not self._has_ended):
            return self._keep_alive(now)
        if self._stage is Stage.ANSWERING:  # the peer has ended its side: is it there at all?
            connection.deadline = now + PROBE_S
            return connection.send_bytes(b"HTTP/1.1 102 Processing\r\n\r\n")
        if self._stage is Stage.HEAD and not connection.has_kept:
            if self._is_first:  # it never said a word
                connection.hub.metrics.refusals["timeout"] += 1
            return connection.abort()
        limit_s = connection.hub.config.open_timeout_s
        message = f"the request took longer than {limit_s:g} s to arrive (--open-timeout)"
        return self.fail(RequestError(message, code="timeout", status=408))

    def _keep_alive(self, now: float) -> None:
        """Show by a comment that we live; who takes nothing between two of them is dropped."""
        connection = self.connection
        if connection.is_writable:
            connection.send_bytes(self._framed(b":\n\n"))
        elif connection.heard:
            connection.heard = False  # until it takes what waits for it
        else:
            connection.hub.drop(connection.name, "slow")
            return connection.abort()
        self._set_keep_alive(now)

    @property
    def is_idle(self) -> bool:
        """Has it asked for nothing, or not to the end? Who sends for ever must not keep a place."""
        return self._stage in (Stage.HEAD, Stage.BODY)

    @property
    def is_done(self) -> bool:
        """Has it been answered?"""
        return self._stage is Stage.DONE

    @property
    def rest(self) -> bytes:
        """What arrived behind the request: of a WebSocket, its first frames."""
        return self._rest

    def end(self) -> None:
        if self.client is not None:
            self.client.cancel_calls()
            self.client = None


@functools.lru_cache
def _usual_head(content_type: str, is_last: bool) -> bytes:
    """The head that most answers have, but for its length."""
    return _encode_head(200, "%d", content_type, is_last, {})


def _encode_head(
    status: int, length: str | None, content_type: str, is_last: bool, more: Mapping[str, str]
) -> bytes:
    fields = {"Cache-Control": "no-store", "Vary": "Origin"}
    if is_last:
        fields["Connection"] = "close"
    if status != 204:  # which has no body to describe (RFC 9110, 8.6)
        fields |= {} if length is None else {"Content-Length": length}
        fields |= {"Content-Type": content_type, "X-Content-Type-Options": "nosniff"}
    fields |= more
    text = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
    text += "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{text}\r\n".encode("latin-1")


def _event(data: bytes) -> bytes:
    return b"event: message\ndata: %b\n\n" % data


JSON_TYPES = ("application/json", "application/json-rpc")
# Of requests by pages of an allowed origin; MCP's mirror what its bodies say.
ALLOWED_HEADERS = (
    "Authorization, Content-Type, Mcp-Method, Mcp-Name, MCP-Protocol-Version, Mcp-Session-Id"
)


class HttpClient(Client):
    """Who made one HTTP request that runs commands."""

    __slots__ = ("exchange", "status")
    door = "http"

    def __init__(self, exchange: Exchange, manager: Any) -> None:
        super().__init__(exchange.connection, manager, exchange.connection.name)
        self.exchange = exchange
        self.status = 200
        exchange.client = self

    @property
    def is_present(self) -> bool:
        """Does it still wait for its answer?"""
        return self.exchange.connection.phase is Phase.HTTP and not self.exchange.is_done

    def deliver(self, envelope: bytes, ack: int | None) -> None:
        self.exchange.answer(self.status, envelope)

    def join(self, group: str, *, since: str | None = None) -> None:
        """A client that does not stay hears no broadcasts. Raises ConnectionError."""
        raise ConnectionError(f"a client of the {self.door} door can't join a group")

    async def send(self, type: str, data: Any) -> None:
        """HTTP has one answer, the request's own: nothing is sent."""
        await self._sent()


class HttpRequest(Request):
    """A request whose answer is an HTTP response, with the status that fits it."""

    __slots__ = ()
    client: HttpClient

    def fail(self, code: str, message: str, data: Mapping[str, Any] | None = None) -> bytes | None:
        self.client.status = HTTP_STATUS.get(code, 500)
        return super().fail(code, message, data)

    def progress(self, value: Any) -> None:
        pass  # HTTP has one answer


HttpClient.request_type = HttpRequest


def upgrade_required() -> RequestError:
    """For a plain request where a WebSocket is meant."""
    return InvalidRequest(
        "this is a WebSocket; connect with a WebSocket client",
        status=426, headers={"Upgrade": "websocket", "Sec-WebSocket-Version": "13"},
    )  # fmt: skip


def accept(head: Head) -> bytes:
    """The answer to a WebSocket handshake (RFC 6455, 4.2). Raises RequestError."""
    headers = head.headers
    if head.method != "GET":
        raise InvalidRequest("use GET", status=405, headers={"Allow": "GET"})
    if head.is_http_1_0:
        raise InvalidRequest("a WebSocket needs HTTP/1.1", status=505)
    options = options_of(headers.get("connection", ""))
    is_asked = headers["upgrade"].lower() == "websocket" and "upgrade" in options
    if not is_asked or headers.get("sec-websocket-version") != "13":
        raise upgrade_required()
    key = headers.get("sec-websocket-key", "")
    if not _WEBSOCKET_KEY.fullmatch(key):
        raise InvalidRequest("malformed Sec-WebSocket-Key")
    digest = b64encode(hashlib.sha1(key.encode() + _WEBSOCKET_GUID).digest())
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: %b\r\n\r\n" % digest
    )


_WEBSOCKET_KEY = re.compile(r"[A-Za-z0-9+/]{21}[AQgw]==")  # 16 bytes
_WEBSOCKET_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
