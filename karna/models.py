"""Client of a model server: any HTTP endpoint that speaks as OpenAI's does, such as Ollama.

The standard library's client (TLS and chunks come with it) talks in a thread, which ends when its
socket is shut down. No redirect is followed and no proxy is used. Whatever an endpoint does wrong
is Unavailable. Uses errors, text and work; imported by services when a URL is given.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import re
import socket
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from karna.errors import CommandFailed, Unavailable, explain
from karna.text import one_line
from karna.work import ThreadPool

Value = TypeVar("Value")
Report = Callable[[Any], None]  # of one token, called in a thread


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


class ModelExchange:
    """One request to a model server, made in a thread; `close` from the loop ends it."""

    def __init__(self, server: ModelServer) -> None:
        self._server = server
        self._socket: socket.socket | None = None
        self._is_closed = False
        self.cleanup = contextlib.ExitStack()  # of the thread, when it is through

    def close(self) -> None:
        self._is_closed = True
        if self._socket is not None:
            with contextlib.suppress(OSError):  # closed already
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread, as close() would not

    def send(self, method: str, path: str, body: bytes | None = None) -> HTTPResponse:
        """Connect, send one request, and return the answer's head if it is a 200."""
        connection = self._server.connect()
        connection.response_class = _BoundedResponse
        self.cleanup.callback(connection.close)
        try:
            connection.connect()
        except TimeoutError:
            raise Unavailable(f"no connection within {connection.timeout:g} s") from None
        self._socket = connection.sock
        if self._is_closed:
            raise OSError("closed")
        connection.sock.settimeout(self._server.timeout_s)
        connection.request(method, self._server.path + path, body, self._server.headers)
        response = connection.getresponse()
        if response.status == 200:
            return response
        text = f"HTTP {response.status}"
        with contextlib.suppress(ValueError):
            problem = _model_error(_json_of(response.read(MAX_MODEL_LINE_BYTES)))
            text += problem and f": {problem}"
        if response.status in (400, 413, 422):  # this request's fault, the server is well
            raise CommandFailed(self._server.hide(f"the model server answered {text}"))
        raise Unavailable(text)


MODEL_CHECK_S = 4.0  # below the monitor's own limit, so that the detail names the server
MODEL_CONNECT_S = 5.0  # to connect; a host that is there answers in less than one
MODEL_THREADS = 8  # requests to one model server at a time; further ones wait


class ModelServer:
    """Client of one endpoint; `url` with or without its /v1, user and password as HTTP allows.

    Raises ValueError for an URL or a key that cannot be used. `host` is what may be shown.
    """

    def __init__(self, url: str, *, model: str | None, key: str | None, timeout_s: float) -> None:
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
        self.headers = {"Content-Type": "application/json", "Connection": "close"}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"
        elif parts.username is not None:
            user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self.headers["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
        password = parts.password or ""
        self._secrets = [each for each in (key, password, unquote(password)) if each]
        self.model = model
        self.timeout_s = timeout_s
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

    async def find_model(self) -> str:
        """Ask which models there are; the configured one, or else the first, is used from then."""
        try:
            async with asyncio.timeout(MODEL_CHECK_S):
                names = await self._talk(self._checks, _list_models)
        except TimeoutError:
            raise self._unavailable(f"no answer within {MODEL_CHECK_S:g} s") from None
        if self.model is None and not names:
            raise self._unavailable("lists no model")
        return self.model or names[0]

    async def chat(self, model: str, content: Any, report: Report | None) -> str:
        """Let the model answer one message; `report` gets each token. Returns the whole text."""
        messages = [{"role": "user", "content": content}]
        body = json.dumps({"model": model, "messages": messages, "stream": True}).encode()
        return await self._talk(self._requests, lambda e: _read_chat(e, body, report))

    async def _talk(self, threads: ThreadPool, work: Callable[[ModelExchange], Value]) -> Value:
        exchange = ModelExchange(self)
        try:
            return await threads.call(lambda: self._explained(exchange, work))
        finally:
            exchange.close()

    def _explained(self, exchange: ModelExchange, work: Callable[[ModelExchange], Value]) -> Value:
        """Do the work in this thread; every way it can go wrong becomes a RequestError."""
        try:
            with exchange.cleanup:
                return work(exchange)
        except Unavailable as error:
            raise self._unavailable(str(error)) from None
        except TimeoutError:
            raise self._unavailable(f"no answer within {self.timeout_s:g} s") from None
        except IncompleteRead:
            raise self._unavailable("its answer broke off") from None
        except OSError as error:
            raise self._unavailable(f"cannot be reached: {error.strerror or error}") from None
        except (HTTPException, ValueError) as error:
            raise self._unavailable(f"its answer makes no sense: {explain(error)}") from None

    def _unavailable(self, problem: str) -> Unavailable:
        return Unavailable(self.hide(f"model server {self.host}: {problem}"))


def _json_of(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None


def _model_error(value: Any) -> str:
    """The message of {"error": {"message": ...}} or {"error": ...}, if there is one."""
    error = value.get("error") if isinstance(value, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else "unknown error" if error else ""


def _read_bounded(response: HTTPResponse) -> Any:
    data = response.read(MAX_MODEL_JSON_BYTES + 1)
    if len(data) > MAX_MODEL_JSON_BYTES:
        raise ValueError(f"longer than {MAX_MODEL_JSON_BYTES // 2**20} MiB")
    if response.length:  # a plain read(n) does not tell
        raise Unavailable("its answer broke off")
    return _json_of(data)


def _list_models(exchange: ModelExchange) -> list[str]:
    answer = _read_bounded(exchange.send("GET", "/v1/models"))
    try:
        names = [each["id"] for each in answer["data"]]
    except (KeyError, TypeError):
        raise ValueError("no list of models") from None
    return [name for name in names if isinstance(name, str) and _is_name(name)]


def _is_name(text: str) -> bool:
    return 0 < len(text) <= MAX_MODEL_NAME_CHARS and text.isprintable()


def _read_chat(exchange: ModelExchange, body: bytes, report: Report | None) -> str:
    """Send a chat request and read the answer: events, or one JSON object from simple servers."""
    response = exchange.send("POST", "/v1/chat/completions", body)
    kind = (response.getheader("Content-Type") or "none").partition(";")[0].strip().lower()
    if kind == "application/json":
        return _text_of(_read_bounded(response), "message")[0]
    if kind != "text/event-stream":
        raise ValueError(f"content type {kind} where an event stream belongs")
    tokens: list[str] = []
    is_finished = False
    for event in _read_events(response):
        token, is_last = _text_of(event, "delta")
        is_finished = is_finished or is_last
        tokens.append(token)
        if token and report is not None:
            report({"token": token})
    if not is_finished:
        raise Unavailable("its answer broke off")
    return "".join(tokens)


_DONE = {"choices": [{"finish_reason": "stop"}]}


def _read_events(response: HTTPResponse) -> Iterator[Any]:
    """The JSON of each `data:` line of an event stream, up to [DONE] or its end."""
    while line := response.readline(MAX_MODEL_LINE_BYTES + 1):
        if len(line) > MAX_MODEL_LINE_BYTES:
            raise ValueError("an event is too long")
        if not line.startswith(b"data:"):
            continue  # an empty line, a comment, another field
        data = line[5:].strip()
        if data == b"[DONE]":
            yield _DONE
            return
        yield _json_of(data)


def _text_of(answer: Any, part: str) -> tuple[str, bool]:
    """The text of the first choice, and whether it is the last; ValueError for another shape."""
    problem = _model_error(answer)
    if problem:
        raise Unavailable(problem)
    try:
        choices = answer["choices"]
        choice = choices[0] if choices else {}  # usage comes with no choice
        text: str = (choice.get(part) or {}).get("content") or ""
        # A lone surrogate, which JSON can say, could not be sent on.
        return text.encode("utf-8", "replace").decode(), bool(choice.get("finish_reason"))
    except (AttributeError, KeyError, TypeError):
        raise ValueError("a choice without text") from None
