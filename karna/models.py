"""Client of a model server: any HTTP endpoint that speaks as OpenAI's does, such as Ollama.

The standard library's client (TLS and chunks come with it) talks in a thread, which ends when its
socket is shut down. No redirect is followed and no proxy is used. Whatever an endpoint does wrong
is Unavailable. Connections are kept for the next request. Uses answers, errors, text and work;
imported by services when a URL is given.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import re
import socket
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from karna.answers import Answer, Message, Reader, check_no_error, json_of, problem_of, refusal
from karna.errors import RequestError, Unavailable, explain
from karna.text import one_line
from karna.work import ThreadPool

Value = TypeVar("Value")
Report = Callable[[Any], None]  # of one token, called in a thread
Tools = Sequence[dict[str, Any]]  # as the servers' API has them


MAX_MODEL_BYTES = 4 * 1024 * 1024  # of one answer, its heads, chunks and trailers included
MAX_MODEL_LINE_BYTES = 256 * 1024  # one event of a stream holds one token, or few
MAX_MODEL_JSON_BYTES = 1024 * 1024  # of one value; to parse it no other thread runs, up to 70 ms
MAX_MODEL_NAME_CHARS = 200  # it is in each answer


class _BoundedFile(io.RawIOBase):
    """What a socket gives, up to MAX_MODEL_BYTES."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw
        self._left = MAX_MODEL_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        count: int | None = self._raw.readinto(buffer)
        self._left -= count or 0
        if self._left < 0:
            raise HTTPException(f"longer than {MAX_MODEL_BYTES // 2**20} MiB")
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _BoundedResponse(HTTPResponse):
    """One whose endless parts end: `100 Continue` again and again, chunk extensions, trailers."""

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        raw = _BoundedFile(self.fp.detach())
        self.fp = io.BufferedReader(raw)


MAX_IDLE = 4  # connections to one model server that are kept
MAX_IDLE_S = 4.0  # below the 5 s after which uvicorn (vLLM) and llama.cpp close them
MAX_TAIL_BYTES = 1024  # that may follow the last event: blank lines, trailers
END_WAIT_S = 0.02  # for the end of a stream whose last event has come, to keep its connection


class IdleConnections:
    """Connections that wait for a next request; used from any thread."""

    def __init__(self) -> None:
        self._kept: list[tuple[HTTPConnection, float]] = []
        weakref.finalize(self, _close_all, self._kept)  # __del__ may come after the sockets' own

    def take(self) -> HTTPConnection | None:
        """One that its server has not closed."""
        while self._kept:
            try:
                connection, since = self._kept.pop()
            except IndexError:  # another thread took it
                break
            if time.monotonic() - since < MAX_IDLE_S and not _has_news(connection.sock):
                return connection
            connection.close()
        return None

    def keep(self, connection: HTTPConnection) -> None:
        self._kept.append((connection, time.monotonic()))
        while len(self._kept) > MAX_IDLE:
            self._kept.pop(0)[0].close()

    def close(self) -> None:
        _close_all(self._kept)


def _close_all(kept: list[tuple[HTTPConnection, float]]) -> None:
    while kept:
        kept.pop()[0].close()


def _has_news(sock: socket.socket) -> bool:
    """Has the peer sent anything while nothing was asked? That is its end, or makes no sense."""
    sock.setblocking(False)
    try:
        socket.socket.recv(sock, 1, socket.MSG_PEEK)  # of TLS, too, the bytes as they come
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


class _StaleError(Exception):
    """The kept connection has ended: not a byte answers the request.

    Nobody read it, or a server that fell with it; so it is sent again, once, by a new connection.
    llama.cpp closes idle connections whenever others wait for its threads.
    """


class ModelExchange:
    """One request to a model server, made in a thread; `close` from the loop ends it."""

    def __init__(self, server: ModelServer, sent: Sequence[str] = ()) -> None:
        self._server = server
        self._socket: socket.socket | None = None
        self._connection: HTTPConnection | None = None
        self._response: HTTPResponse | None = None
        self._is_closed = False
        self.sent = sent  # which of "tools" and "images" the request has

    def close(self) -> None:
        self._is_closed = True
        if self._socket is not None:
            with contextlib.suppress(OSError):  # closed already
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread, as close() would not

    def end(self) -> None:
        """Of the thread, when it is through: keep the connection, or close it."""
        connection, self._connection, self._socket = self._connection, None, None
        if connection is None:
            return
        if self._is_whole(connection) and not self._is_closed:
            self._server.idle.keep(connection)
        else:
            connection.close()

    def _is_whole(self, connection: HTTPConnection) -> bool:
        """Has all of the answer been read, and may a further request follow?"""
        response = self._response
        if response is None or connection.sock is None:  # http.client lets go of one that closes
            return False
        try:
            connection.sock.settimeout(END_WAIT_S)
            response.read(MAX_TAIL_BYTES)
            return response.isclosed()
        except (OSError, HTTPException, ValueError):
            return False

    def send(self, method: str, path: str, body: bytes = b"") -> HTTPResponse:
        """Send one request, and return the answer's head if it is a 200."""
        connection = self._server.idle.take()
        if connection is not None:
            try:
                return self._ask(connection, method, path, body, is_kept=True)
            except _StaleError:
                connection.close()
        if self._is_closed:
            raise OSError("closed")
        connection = self._server.connect()
        connection.response_class = _BoundedResponse
        self._connection = connection
        try:
            connection.connect()
        except TimeoutError:
            raise Unavailable(f"no connection within {connection.timeout:g} s") from None
        return self._ask(connection, method, path, body)

    def _ask(
        self, connection: HTTPConnection, method: str, path: str, body: bytes, is_kept: bool = False
    ) -> HTTPResponse:
        self._connection, self._socket = connection, connection.sock
        if self._is_closed:
            raise OSError("closed")
        connection.sock.settimeout(self._server.timeout_s)
        connection.putrequest(method, self._server.path + path)
        for name, value in self._server.headers.items():
            connection.putheader(name, value)
        if body:
            connection.putheader("Content-Length", str(len(body)))
        try:
            connection.endheaders()
            connection.send(body)
            self._response = response = connection.getresponse()
        except ConnectionError:  # RemoteDisconnected is one
            if is_kept:
                raise _StaleError from None
            raise
        if response.status == 200:
            return response
        problem = ""
        with contextlib.suppress(ValueError):
            problem = problem_of(json_of(response.read(MAX_MODEL_LINE_BYTES)))
        raise refusal(response.status, problem, self.sent)


MODEL_CHECK_S = 4.0  # below the monitor's own limit, so that the detail names the server
MODEL_CONNECT_S = 5.0  # to connect; a host that is there answers in less than one
MODEL_THREADS = 16  # requests to one model server at a time, of one client 4; further ones wait
MODEL_SILENCE_S = 600.0  # a large model on a CPU reads a long prompt for minutes before it speaks


class ModelServer:
    """Client of one endpoint; `url` with or without its /v1, user and password as HTTP allows.

    Raises ValueError for an URL or a key that cannot be used. `host` is what may be shown.
    """

    def __init__(self, url: str, *, key: str | None, timeout_s: float) -> None:
        parts = urlsplit(url)
        is_http = parts.scheme in ("http", "https") and re.fullmatch("[!-~]+", url)
        if not is_http or not parts.hostname:
            raise ValueError("a model server's URL looks like http://localhost:11434")
        if key is not None and not re.fullmatch("[!-~]+", key):
            raise ValueError("the model server's key has characters that no HTTP header can hold")
        self._address = parts.hostname, parts.port
        self._is_tls = parts.scheme == "https"
        self.host = parts.netloc.rpartition("@")[2]
        self.path = parts.path.rstrip("/").removesuffix("/v1")
        self.headers = {"Content-Type": "application/json"}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"
        elif parts.username is not None:
            user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self.headers["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
        password = parts.password or ""
        self._secrets = [each for each in (key, password, unquote(password)) if each]
        self.timeout_s = timeout_s
        self.idle = IdleConnections()
        self._requests = ThreadPool(MODEL_THREADS, f"karna-model-{self.host}")
        self._checks = ThreadPool(1, f"karna-model-check-{self.host}")  # never behind requests

    def connect(self) -> HTTPConnection:
        """A connection that is not made yet."""
        maker = HTTPSConnection if self._is_tls else HTTPConnection
        return maker(*self._address, timeout=min(MODEL_CONNECT_S, self.timeout_s))

    def hide(self, text: str) -> str:
        """`text` on one line and without our secrets, should the server have sent them back."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return one_line(text)

    async def list_models(self) -> list[str]:
        """The names of the models that there are; at least one."""
        try:
            async with asyncio.timeout(MODEL_CHECK_S):
                names = await self._talk(self._checks, ModelExchange(self), _list_models)
        except TimeoutError:
            raise self._unavailable(f"no answer within {MODEL_CHECK_S:g} s") from None
        return names

    async def chat(
        self, model: str, messages: Sequence[Message], report: Report | None = None, *,
        tools: Tools = (), may_choose: bool = True, owner: object = None,
    ) -> Answer:  # fmt: skip
        """Let the model answer; `report` gets each token of its text.

        With tools it is asked without a stream, where servers differ most; unless it may choose,
        they are there only because the messages tell of them. owner: whose share of the threads.
        """
        asked: dict[str, Any] = {"model": model, "messages": messages, "stream": not tools}
        if tools:
            asked |= {"tools": tools, **({} if may_choose else {"tool_choice": "none"})}
        sent = ["tools"] * bool(tools) + ["images"] * _has_image(messages)
        exchange, body = ModelExchange(self, sent), json.dumps(asked).encode()
        return await self._talk(
            self._requests, exchange, lambda each: _read_chat(each, body, report), owner
        )

    def close(self) -> None:
        """Close the connections that are kept."""
        self.idle.close()

    async def _talk(
        self, threads: ThreadPool, exchange: ModelExchange,
        work: Callable[[ModelExchange], Value], owner: object = None,
    ) -> Value:  # fmt: skip
        try:
            return await threads.call(lambda: self._explained(exchange, work), owner)
        finally:
            exchange.close()

    def _explained(self, exchange: ModelExchange, work: Callable[[ModelExchange], Value]) -> Value:
        """Do the work in this thread; every way it can go wrong becomes a RequestError."""
        try:
            return work(exchange)
        except Unavailable as error:
            raise self._unavailable(str(error)) from None
        except RequestError as error:
            raise type(error)(self.hide(str(error))) from None
        except TimeoutError:
            raise self._unavailable(f"no answer within {self.timeout_s:g} s") from None
        except IncompleteRead:
            raise self._unavailable("its answer broke off") from None
        except OSError as error:
            raise self._unavailable(f"cannot be reached: {error.strerror or error}") from None
        except (HTTPException, ValueError) as error:
            raise self._unavailable(f"its answer makes no sense: {explain(error)}") from None
        finally:
            exchange.end()

    def _unavailable(self, problem: str) -> Unavailable:
        return Unavailable(self.hide(f"model server {self.host}: {problem}"))


def _has_image(messages: Sequence[Message]) -> bool:
    contents = (each.get("content") for each in messages)
    return any(part.get("type") == "image_url" for each in contents if type(each) is list
               for part in each)  # fmt: skip


def _read_bounded(response: HTTPResponse) -> Any:
    data = response.read(MAX_MODEL_JSON_BYTES + 1)
    if len(data) > MAX_MODEL_JSON_BYTES:
        raise ValueError(f"longer than {MAX_MODEL_JSON_BYTES // 2**20} MiB")
    if response.length:  # a plain read(n) does not tell
        raise Unavailable("its answer broke off")
    return json_of(data)


def _list_models(exchange: ModelExchange) -> list[str]:
    answer = _read_bounded(exchange.send("GET", "/v1/models"))
    try:
        names = [each["id"] for each in answer["data"]]
    except (KeyError, TypeError):
        raise ValueError("no list of models") from None
    return [name for name in names if isinstance(name, str) and _is_name(name)]


def _is_name(text: str) -> bool:
    return 0 < len(text) <= MAX_MODEL_NAME_CHARS and text.isprintable()


def _read_chat(exchange: ModelExchange, body: bytes, report: Report | None) -> Answer:
    """Send a chat request and read the answer: one JSON object, or events, whatever was asked."""
    response = exchange.send("POST", "/v1/chat/completions", body)
    kind = (response.getheader("Content-Type") or "none").partition(";")[0].strip().lower()
    reader = Reader(exchange.sent)
    if kind == "application/json":
        reader.add(_read_bounded(response), "message")
        return reader.answer()
    if kind != "text/event-stream":
        raise ValueError(f"content type {kind} where an event stream belongs")
    for event in _read_events(response):
        token = reader.add(event)
        if token and report is not None:
            report({"token": token})
    if not reader.is_finished:
        raise Unavailable("its answer broke off")
    return reader.answer()


_DONE = {"choices": [{"finish_reason": "stop"}]}


def _read_events(response: HTTPResponse) -> Iterator[Any]:
    """The JSON of each `data:` line of an event stream, up to [DONE] or its end.

    llama.cpp has told errors in lines of their own: `error: {...}`.
    """
    while line := response.readline(MAX_MODEL_LINE_BYTES + 1):
        if len(line) > MAX_MODEL_LINE_BYTES:
            raise ValueError("an event is too long")
        field, _, data = line.partition(b":")
        if field == b"error":
            check_no_error({"error": json_of(data)}, ())
        if field != b"data":
            continue  # an empty line, a comment, another field
        if data.strip() == b"[DONE]":
            yield _DONE
            return
        yield json_of(data)
