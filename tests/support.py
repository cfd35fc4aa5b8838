"""What most tests need: a server, clients of its doors, commands that wait for the test.

The rules of all tests:

- Real sockets on port 0, real clients, real programs. What is faked is a clock or a model server.
- A test waits for events, never for time. Where time is the subject, its limits are scaled down and
  a comment gives the timeline. "Nothing more arrives" is shown by something sent afterwards that
  arrives first.
- Every test has a deadline (`support_fixtures.deadline`): a hanging one fails, alone.
- A server that logged an error of ours fails its test, unless the test said that it expects one (`served`).
- Names are subject, verb, condition. Codec cases are one table, used both ways.
- A test is trusted once it was seen to fail: break the code, run it, mend the code.
- `KARNA_TEST_WITHOUT_EPOLL=1` runs everything as on a system without epoll, where asyncio's own
  transports read; CI runs the tests both ways.
- What a machine may lack (Node, a browser, Redis, a library) is asked for with `needs`: such a test
  is skipped with the reason, but in CI, where everything is installed, it fails.

Two kinds of clients: `Raw`, `Sio` and `http` here speak in messages, for tests of what is said;
those of `support_peers` write bytes, for tests of how it is said.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import orjson
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

import karna_ws
from karna_ws import Server, WebSocketManager, serving
from services import Service, Unavailable


DEADLINE_S = 30.0
ROOT = Path(karna_ws.__file__).resolve().parent
SERVER_FILE = ROOT / "karna_ws.py"


MODULES = {
    "aiohttp", "gguf", "hypothesis", "jsonrpc_websocket", "jsonrpcclient", "mcp", "mypy",
    "prometheus_client", "redis", "socketio", "uvloop", "xllamacpp",
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


# Bugs of the program's code: many tests have commands that fail on purpose.
OF_A_PROGRAM = ("command ", "method ", "handler of ", "service ")


class ErrorLog(logging.Handler):
    """Collects the lines that say a server met a bug of ours."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith(OF_A_PROGRAM):
            return
        trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else ""
        self.lines.append(f"{record.name}: {record.getMessage()}\n{trace}")


@contextlib.contextmanager
def error_log(*, expected: bool = False) -> Iterator[ErrorLog]:
    """While the block runs no error may be logged; or, if expected, at least one must be."""
    handler = ErrorLog()
    loggers = [logging.getLogger(name) for name in ("karna_ws", "asyncio")]
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
    fields = {"Host": "localhost", "Connection": "close", "Content-Type": "application/json"}
    fields |= headers
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
    """A command `gate NAME` that says when it has begun, and goes on when the test lets it.

    A command that is cancelled before its first step has not begun: wait for `begun` first.
    """

    def __init__(self, manager: WebSocketManager) -> None:
        self.begun: list[str] = []
        self.cancelled: list[str] = []
        self.ended: list[str] = []  # the cancelled ones too
        self.opened: dict[str, asyncio.Event] = {}
        self.running = self.most_running = 0
        manager.commands.command(self.gate)

    async def gate(self, name: str, pad: str = "") -> str:
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
            self.ended.append(name)
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


def offsets(manager: WebSocketManager, count: int) -> list[str]:
    """The offsets of the latest broadcasts, oldest first."""
    return [entry.offset for entry in manager.history.entries][-count:]


class Lamp(Service):
    """A program's own service."""

    def __init__(self, name: str = "lamp") -> None:
        super().__init__(name)


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


def rpc_result(value: Any, id: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "result": value, "id": id}


def rpc_error(code: int, id: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "error": {"code": code}, "id": id}


def without_words(answer: Any) -> Any:
    """An answer without the texts of errors; a batch in one order."""
    if isinstance(answer, list):
        return sorted(map(without_words, answer), key=repr)
    if "error" in answer:
        assert isinstance(answer["error"]["message"], str)
        assert isinstance(answer["error"]["data"]["code"], str)
        return {**answer, "error": {"code": answer["error"]["code"]}}
    return answer


async def turns_in_a_while() -> int:
    """How often the loop turns in 0.2 s in which nothing is asked of it."""
    turns, loop = 0, asyncio.get_running_loop()
    select_once = loop._selector.select  # type: ignore[attr-defined]

    def count(timeout: float | None = None) -> Any:
        nonlocal turns
        turns += 1
        return select_once(timeout)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._selector, "select", count)  # type: ignore[attr-defined]
        await asyncio.sleep(0.2)  # the sweep and the monitor turn it now and then
    return turns
