"""Karna WS: commands, status and broadcasts for browsers, scripts and local assistants.

One process, one asyncio loop, one `websockets.serve` on one port:

    WebSocket  /ws                     raw door: a JSON message a frame
    WebSocket  /socket.io/?EIO=4       Socket.IO door: the real socket.io-client
    HTTP       /                       console page, or a JSON index of the doors
    HTTP       /health /api/status     for monitors and scripts
    HTTP       /api/execute_command    one command by POST;  /api/notify  one broadcast by POST
    HTTP       /rpc                    JSON-RPC 2.0 by POST (the raw door speaks it too)
    HTTP       /mcp                    Model Context Protocol: commands as tools of assistants
    HTTP       /metrics                Prometheus text format

The file reads downhill:

    doors       who comes in: the raw door and the Socket.IO door
    manager     WebSocketManager: the connection set, who joins, broadcast and its history, status
    dispatch    a message to a method, a command to its answer, now or later
    routes      who may come in; an HTTP path to its answer, an upgrade to its door
    server      bind, serve, stop; main

Each detail has a room in `karna/`, whose docstring says what it is; requests and answers are
described in README.md.
"""

from __future__ import annotations

import karna.needs  # noqa: F401  (first: it says what has to be installed)

import asyncio
import functools
import gc
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack, cast, overload

from orjson import JSONDecodeError, dumps, loads
from websockets.frames import CloseCode

from karna import trace
from karna.access import TOKEN_TEXT, check_access, forwarded_for, is_authorized, token_matches
from karna.builtins import notification
from karna.calls import Client, Request, submit, submit_line
from karna.command import Call, Command, as_handler, decorator
from karna.config import Config, Options, make_config
from karna.connection import Connection
from karna.door import Door
from karna.endpoints import EndpointHub, answer_execute, answer_health, answer_metrics
from karna.endpoints import answer_notify, answer_rpc, answer_status, answer_ws
from karna.envelopes import HISTORY_GAP, INTERNAL_ERROR, INVALID_JSON, encode_error, encode_json
from karna.errors import FAULTS, InvalidParams, InvalidRequest, RequestError, StartError
from karna.errors import Unavailable, UsageError, name_stray
from karna.frames import PING_FRAME, frame_binary, frame_text
from karna.history import Entry, replay_bytes, with_group
from karna.http import Exchange, accept
from karna.jsonrpc import ID_TYPES, Methods, handle_json_rpc, is_json_rpc
from karna.listen import stopping_on_signals
from karna.server import Server
from karna.service import Service
from karna.socketio import EventRequest, SocketIoClient, SocketIoSession
from karna.socketio import check_engine_handshake, refuse_old_client
from karna.status import StatusBoard
from services import CommandProcessor, Function, LanguageService, Ready, VisionService

if TYPE_CHECKING:
    from karna.backplane import RedisBackplane
    from karna.mcp import Mcp
    from karna.reload import Parent

__version__ = "1.0.0"
__all__ = ["Client", "Config", "Server", "WebSocketManager", "serve", "serving"]

FULL_TEXT = "the server is full (--max-clients)"

# --- doors -------------------------------------------------------------------------------------
# A door turns messages into requests and answers into messages; a client is who asked. On the raw
# door one object is both. A Socket.IO session is a door with a client for each namespace.


class RawClient(Client, Door):
    """The raw door: each message is a JSON request or answer."""

    __slots__ = ()
    door = "raw"

    def __init__(self, connection: Connection, manager: WebSocketManager, since: str | None):
        super().__init__(connection, manager, connection.name)
        self.since = since

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

    def failed(self) -> bytes:
        return INTERNAL_ERROR

    def on_deadline(self, now: float) -> None:
        self.connection.heartbeat(now, self.manager.config.raw_ping_interval_s, PING_FRAME)

    def deliver(self, envelope: bytes, ack: int | None) -> None:
        self.connection.send_frame(frame_text(envelope))

    def welcome(self, missed: list[Entry] | None) -> None:
        """It is in: send what it missed."""
        if missed is not None:
            self.connection.allow(replay_bytes(missed))
            for entry in missed:
                self.send_missed(entry)
        elif self.since is not None:
            self.deliver(HISTORY_GAP, None)

    def send_missed(self, entry: Entry) -> None:
        """Send one broadcast of a replay."""
        self.deliver(entry.envelope, None)

    def send_question(self, number: int, event: str, args: tuple[Any, ...]) -> None:
        question = {"type": "call", "data": {"event": event, "args": args}, "call": number}
        self.deliver(encode_json(question), None)

    def refuse(self, message: str) -> None:
        """It may not come in."""
        self.connection.close(CloseCode.POLICY_VIOLATION, message)

    def end(self) -> None:
        self.manager.leave(self, "transport close")


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


class SocketIoDoor(SocketIoSession):
    """The Socket.IO door: what a session asks of the manager."""

    __slots__ = ()

    def connect(self, namespace: str, auth: dict[str, Any]) -> None:
        manager = self.manager
        if namespace not in manager.sockets:
            return self.refuse(namespace, "Invalid namespace")
        if not self.is_authorized:
            if not token_matches(manager.config.token, auth.get("token")):
                manager.metrics.refusals["token"] += 1
                if manager.traces:
                    trace.refused(self.connection, "unauthorized")
                return self.refuse(namespace, "unauthorized: " + TOKEN_TEXT, code="unauthorized")
            if self.connection not in manager.seats:
                if manager.is_full:
                    return self.refuse(namespace, FULL_TEXT, code="unavailable")
                manager.seat(self.connection)
        client = self.clients[namespace] = SocketIoClient(self, namespace, auth)
        manager.admit(client)

    def handle_event(
        self, client: SocketIoClient, event: list[Any], ack: int | None, size: int
    ) -> bytes | None:
        if event[0] != "rpc":
            return handle_event(client, event, ack, size)
        message = event[1] if len(event) > 1 and type(event[1]) is dict else _NO_PARAMS
        answer = handle_rpc(client, message, ack, size)
        return None if answer is None else client.wrap(answer, ack)

    def left(self, client: SocketIoClient, reason: str) -> None:
        self.manager.leave(client, reason)

    def end(self) -> None:
        self.manager.sessions.discard(self)
        super().end()


# --- manager -----------------------------------------------------------------------------------
# WebSocketManager knows who is connected and what a program registered. A broadcast is encoded
# once, framed once for each door, joined with the others of the same loop iteration, and written
# to every client without waiting for any. The history of broadcasts answers clients that return.


class WebSocketManager(EndpointHub):
    """The clients of one server, the methods and commands they may use, and broadcast.

    commands: the CommandProcessor to use; a new one with the built-in commands by default.
    services: further services, or replacements for those named "vision" and "language".

    A program registers what it adds before it serves:

        manager = WebSocketManager()

        @manager.commands.command
        async def greet(name: str) -> str:
            "Greet somebody."
            return f"Hello, {name}!"

        if __name__ == "__main__":  # or: python karna_ws.py THIS_FILE.py
            asyncio.run(serve(manager, port=8000))
    """

    commands: CommandProcessor

    def __init__(
        self, commands: CommandProcessor | None = None, services: Iterable[Service] = ()
    ) -> None:
        super().__init__()
        self.commands = commands if commands is not None else CommandProcessor()
        self.services = self._make_services(services)
        makers = (Service.get_status, CommandProcessor.get_status)
        self.board = StatusBoard(self.services, self.commands, makers)
        self.commands.use_broadcaster(self)
        self.commands.log_gate = self.log_gate
        self.methods: dict[str, Command] = {}
        self.sessions: set[SocketIoSession] = set()
        self.handle_rpc = handle_rpc
        self.json_rpc = Methods(handle_request, functools.partial(parameters_of, self))
        self.mcp: Mcp | None = None  # from the first assistant on
        self._route = functools.partial(route, self)
        self.configure(Config())

    def _make_services(self, given: Iterable[Service]) -> dict[str, Service]:
        services = {service.name: service for service in given}
        self.brought = frozenset(services)  # by the program: flags leave them as they are
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
        """Take new options, and begin a new history. A server that runs keeps those it has."""
        self.config = config
        self.is_draining = False
        self.begin_history()
        self.max_message_bytes = config.max_message_bytes
        self.commands.timeout_s = config.command_timeout_s
        # What the fast lane may run, unless a program decides about each line or call itself.
        ours = (CommandProcessor.prepare, CommandProcessor.call_inline)
        is_ours = all(_function_of(getattr(self.commands, one.__name__)) is one for one in ours)
        # Who starts calls in a way of its own may count on a Context.
        start_call = _function_of(self.commands.start_call)
        self.gives_contexts = start_call is not CommandProcessor.start_call
        self.traces = trace.is_wanted()
        has_lane = is_ours and not self.traces
        self.prepared: dict[str, Ready] = self.commands.prepared if has_lane else {}
        self.prepare_plain = self.commands.prepare_plain if has_lane else _prepare_nothing
        is_ours = _function_of(self.handle_message) is WebSocketManager.handle_message
        self.raw_client = RawClient if is_ours else OverriddenRawClient
        self.board.touch()

    def use_backplane(self, backplane: RedisBackplane | None) -> None:
        """Share broadcasts through `backplane`, or keep them in this process."""
        self.services.pop("backplane", None)
        self.backplane = backplane
        self.commands.use_broadcaster(self, waits=backplane is not None)
        if backplane is not None:
            self.services["backplane"] = backplane
            self._watch(backplane)
            backplane.receive = self.receive_entry
            backplane.restore = self.restore_history
            backplane.log_gate = self.log_gate
            backplane.history_messages = self.config.history_messages
            backplane.history_bytes = self.config.history_bytes

    def begin_draining(self) -> None:
        """Start no command any more; answer what runs."""
        self.is_draining = True
        self.prepared = {}
        self.prepare_plain = _prepare_nothing
        if self.mcp is not None:
            self.mcp.stop()

    # What an embedding program registers.

    @overload
    def method(self, name: Function, /) -> Function: ...

    @overload
    def method(
        self, name: str | None = None, *, inline: bool = False
    ) -> Callable[[Function], Function]: ...

    def method(self, name: Any = None, *, inline: bool = False) -> Any:
        """Decorator: clients may call the function as RPC method `name`, or by its own name.

        `params` reach its parameters by name and type; one annotated Context gets the call's
        Context. What it returns is the answer's `data`. `async def` runs on the loop, plain `def`
        in a thread, with `inline=True` at once on the loop (it must never block).
        """

        def register(name: str, function: Any) -> None:
            if name in BUILT_IN_METHODS or name in self.methods:
                raise ValueError(f"method {name!r} exists already")
            command = self.methods[name] = Command(function, name=name, inline=inline)
            command.title = f"method {name}"

        return decorator(register, name)

    @overload
    def on(self, event: Function, /) -> Function: ...

    @overload
    def on(
        self, event: str | None = None, *, inline: bool = False
    ) -> Callable[[Function], Function]: ...

    def on(self, event: Any = None, *, inline: bool = False) -> Any:
        """Decorator: handle `event` of Socket.IO clients, or any client's coming and going.

        connect      handler(client, auth); raising refuses the client with the error's message
                     (PermissionError: without a traceback in the log)
        disconnect   handler(client, reason)
        any event    handler(client, *args); what it returns is the ack, a tuple several values

        Without a name it is the event that the function is named after.
        """

        def register(event: str, function: Any) -> None:
            if event == "rpc" or event in self.handlers:
                raise ValueError(f"event {event!r} has a handler already")
            self.handlers[event] = as_handler(function, inline, event)

        return decorator(register, event)

    def handle_message(self, client: Client, payload: bytes, is_text: bool) -> str | bytes | None:
        """Answer one message of the raw door: text for str, binary for bytes, nothing for None.

        A program that speaks a protocol of its own overrides this; it takes the place of requests,
        commands and JSON. It must not block. `payload` is as received: text is not yet checked
        to be UTF-8, and a UnicodeDecodeError raised for such text closes with 1007.
        """
        answer = RawClient.receive(cast(RawClient, client), payload, is_text)
        return None if answer is None else answer.decode()

    # Broadcast.

    def broadcast(self, type: str, data: Any, *, to: str | None = None) -> int:
        """Send an envelope to every client, or to a group; how many of this process will get it.

        Never waits for a client; may be called from any thread. With a backplane it goes to the
        clients of every process, once Redis has taken it. Raises TypeError for data that JSON
        can't hold, Unavailable when the backplane is away, ValueError for what is too long for it.
        """
        body = self._encode_broadcast(type, data)
        if self.loop is None or threading.get_ident() == self.thread:
            self._accept_broadcast(body, to)
        else:  # a plain `def` command: it hears of a refusal, too
            accepting = self._accept_from_thread(body, to)
            asyncio.run_coroutine_threadsafe(accepting, self.loop).result()
        return self.count_of(to)

    async def _accept_from_thread(self, body: bytes, to: str | None) -> None:
        self._accept_broadcast(body, to)

    def _accept_broadcast(self, body: bytes, to: str | None) -> None:
        if self.backplane is not None:
            self.backplane.enqueue(with_group(body, to))
        else:
            self.receive_broadcast(self.next_offset(), body, to)

    async def publish(self, type: str, data: Any, *, to: str | None = None) -> int:
        """`broadcast`, and wait until the backplane has accepted it."""
        if self.backplane is None:
            return self.broadcast(type, data, to=to)
        await self.backplane.publish(with_group(self._encode_broadcast(type, data), to))
        return self.count_of(to)

    def _encode_broadcast(self, type: str, data: Any) -> bytes:
        body = encode_json({"type": type, "data": data})
        if self.backplane is not None and len(body) > self.max_entry_bytes:
            # No process would take it from the backplane.
            raise ValueError(f"a broadcast must have {self.max_entry_bytes} bytes at most")
        return body

    def notify(self, message: str, level: str = "info", *, to: str | None = None) -> int:
        """Broadcast a `notification`. Raises ValueError for a level that does not exist."""
        return self.broadcast("notification", notification(message, level), to=to)

    # Status.

    def status(self) -> dict[str, Any]:
        """The status object: one entry for each service."""
        return self.board.status()

    def encode_status_answer(self) -> bytes:
        """The answer to `get_status` up to its id, with the offset that it is current as of."""
        node = None if self.backplane is None else self.node
        return self.board.encode_answer(self.flushed, node)

    def send_status(self, client: Client) -> None:
        client.deliver(self.encode_status_answer() + b"}", None)

    def offset_changed(self) -> None:
        self.board.forget_answer()

    def _status_touched(self) -> None:
        self.board.touch()

    def _service_changed(self, service: Service) -> None:
        """Tell every client of this process the whole status."""
        self.board.touch()
        if self.backplane is None:
            self.broadcast("status_update", self.status())
            return
        # Status is per node: it does not enter the shared stream, and leaves offsets as they are.
        body = encode_json({"type": "status_update", "data": self.status(), "node": self.node})
        self.receive_broadcast(self.history.last, body, is_kept=False)

    # Who comes and goes.

    def first_door(self, connection: Connection) -> Exchange:
        return Exchange(connection, self._route)


def _prepare_nothing(line: str) -> Ready | None:
    """Where the fast lane is closed."""
    return None


def _function_of(method: Any) -> Any:
    return getattr(method, "__func__", None)


# --- dispatch ----------------------------------------------------------------------------------
# One call takes a message and returns its answer if there is one now, or starts a task that will
# send it. Every request gets exactly one final answer.


def handle_rpc(client: Client, message: dict[str, Any], ack: int | None, size: int) -> bytes | None:
    """Answer one request of our own form, now or later. Never raises.

    The fast lane: a command line of plain words needs no other look at it, and a command that
    needs no task needs no Request either.
    """
    params, wanted = message.get("params"), message.get("id")
    if type(params) is dict and len(params) == 1 and message.get("method") == "execute_command":
        line, manager, calls = params.get("command"), client.manager, client.calls
        ready = None
        if type(line) is str and type(wanted) in ID_TYPES:
            if calls is None:
                ready = manager.prepared.get(line) or manager.prepare_plain(line)
            elif not (calls.serial or calls.parallel):
                ready = manager.prepare_plain(line)
        if ready is not None:
            if calls is not None or not ready[0].inline:
                request = client.request_type(client, wanted, ack, size, line)
                return submit_line(request, Call(*ready))
            try:
                value = manager.commands.run_inline(ready)
                data = {"command": line, "result": value}
                if wanted is None:
                    return dumps({"type": "command_response", "data": data})
                return dumps({"type": "command_response", "data": data, "id": wanted})
            except RequestError as error:
                manager.metrics.errors[error.code] += 1
                return client.request_type(client, wanted, ack, size, line).refuse(error)
            except TypeError:  # `value` is not what orjson takes at once
                return client.request_type(client, wanted, ack, size, line).result(value)
    return handle_request(client.request_type(client, wanted, ack, size), message)


def handle_request(request: Request, message: dict[str, Any]) -> bytes | None:
    """Answer one request, now or later. Never raises."""
    if request.client.manager.traces:
        trace.asked(request, message.get("method"), message.get("params"))
    try:
        if type(request.id) not in ID_TYPES:
            request.id = None
            raise InvalidRequest('"id" must be a string or an integer')
        method = message.get("method")
        if type(method) is not str:
            raise InvalidRequest('"method" must be a string, such as "get_status"')
        params = message.get("params", _NO_PARAMS)
        if type(params) is not dict:
            raise InvalidRequest('"params" must be an object')
        handler = BUILT_IN_METHODS.get(method)
        if handler is not None:
            return handler(request, params)
        return call_method(request, method, params)
    except InvalidParams as error:
        names = parameters_of(request.client.manager, message["method"])
        return request.refuse(name_stray(error, message, names))
    except FAULTS as exc:
        return request.refuse(exc)


_NO_PARAMS: dict[str, Any] = {}


def get_status(request: Request, params: dict[str, Any]) -> bytes | None:
    """RPC method: the status object, at once, whatever else runs."""
    manager = request.client.manager
    return request.answer_status(manager.encode_status_answer(), manager.board.encode())


def execute_command(request: Request, params: dict[str, Any]) -> bytes | None:
    """RPC method: run the command line `command`; other params reach the command by name."""
    line = params.get("command")
    if type(line) is not str or not line or line.isspace():
        raise InvalidParams('"command" must be a string that is not empty')
    request.line = line
    others = _NO_PARAMS
    if len(params) > 1:
        others = {name: value for name, value in params.items() if name != "command"}
    return submit(request, request.client.manager.commands.prepare, line, others)


def cancel(request: Request, params: dict[str, Any]) -> bytes | None:
    """RPC method: cancel this client's running or waiting request of id `id`."""
    wanted = params.get("id")
    if not isinstance(wanted, int | str) or isinstance(wanted, bool):
        raise InvalidParams('"id" in "params" must be the id of a running command')
    calls = request.client.calls
    if calls is None or not calls.cancel(request.client, wanted):
        raise InvalidParams(f"no command with id {wanted!r} is running")
    return request.result({"cancelled": wanted})


def answer(request: Request, params: dict[str, Any]) -> bytes | None:
    """RPC method: the client answers a question of ours, by its number."""
    number = params.get("call")
    if not request.client.questions.answer(number, params.get("data"), params.get("error")):
        raise InvalidParams(f"no question {number!r} waits for an answer")
    return request.result({"answered": number})


BUILT_IN_METHODS: dict[str, Callable[[Request, dict[str, Any]], bytes | None]] = {
    "get_status": get_status, "execute_command": execute_command, "cancel": cancel,
    "answer": answer,
}  # fmt: skip
_BUILT_IN_PARAMETERS = {
    "get_status": [], "execute_command": ["command"], "cancel": ["id"], "answer": ["call", "data"],
}  # fmt: skip


def parameters_of(manager: WebSocketManager, method: str) -> Sequence[str] | None:
    """What a method takes, by position; None if there is no such method."""
    if method in manager.methods:
        return [argument["name"] for argument in manager.methods[method].arguments]
    return _BUILT_IN_PARAMETERS.get(method)


def call_method(request: Request, method: str, params: dict[str, Any]) -> bytes | None:
    """Call a method that the embedding program registered."""
    methods = request.client.manager.methods
    command = methods.get(method)
    if command is None:
        known = ", ".join([*BUILT_IN_METHODS, *methods])
        text = f"no such method; there are {known}"
        if method in request.client.manager.commands.commands:
            text += f"; {method} is a command, which execute_command runs"
        raise RequestError(text, code="unknown_method", method=method)
    return submit(request, bind_method, command, params)


def bind_method(command: Command, params: dict[str, Any]) -> Call:
    """A call of an RPC method. Raises InvalidParams when the params don't fit."""
    try:
        return Call(command, *command.bind([], params))
    except UsageError as error:
        raise InvalidParams(str(error), method=command.name) from None


def handle_event(
    client: SocketIoClient, event: list[Any], ack: int | None, size: int
) -> bytes | None:
    """Answer one Socket.IO event other than `rpc`: the text to send now, if any."""
    name, args = str(event[0]), event[1:]  # the protocol allows a number as a name
    handler = client.manager.handlers.get(name)
    if handler is not None:
        answer = handle_program_event(EventRequest(client, None, ack, size), handler, args)
    elif parameters_of(client.manager, name) is not None:
        message = {"method": name, "params": args[0] if args else {}}
        answer = handle_request(Request(client, None, ack, size), message)
    elif ack is not None:
        answer = handle_request(Request(client, None, ack, size), {"method": name})
    else:
        return None  # as socket.io does with an event that nobody handles
    return None if answer is None else client.wrap(answer, ack)


def handle_program_event(request: Request, handler: Command, args: list[Any]) -> bytes | None:
    """Run the handler that a program has for an event."""
    if request.client.manager.traces:
        trace.asked(request, handler.title, None)
    try:
        return submit(request, Call, handler, [request.client, *args], {})
    except FAULTS as exc:
        return request.refuse(exc)


def handle_other(client: Client, message: Any, size: int) -> bytes | None:
    """Answer a message that is no plain request: JSON-RPC, or a mistake."""
    if is_json_rpc(message):
        return handle_json_rpc(client, message, size, client.manager.json_rpc)
    return encode_error("invalid_request", 'a request is an object, such as {"method": "..."}')


# --- routes ------------------------------------------------------------------------------------
# `check_access` decides for every door who may come in: this server executes commands, and any
# page open in the user's browser can reach it.


def route(manager: WebSocketManager, exchange: Exchange) -> None:
    """Take an HTTP request whose head is there to what answers it. Raises RequestError."""
    head = exchange.head
    config, connection = manager.config, exchange.connection
    if config.trust_proxy:
        connection.forwarded_for = forwarded_for(config, connection.peer, head)
    is_near = head.is_http_1_0 and connection.is_near
    exchange.origin = check_access(config, head, is_near=is_near)
    if head.is_upgrade:
        return upgrade(manager, exchange)
    if "EIO" in head.query:
        check_engine_handshake(head)
    found = ROUTES.get(head.path)
    if found is None:
        raise _not_found()
    return exchange.serve(found.method, functools.partial(found.handler, manager))


def _not_found() -> RequestError:
    return InvalidRequest("no such path", status=404, doors=DOORS)


def upgrade(manager: WebSocketManager, exchange: Exchange) -> None:
    """Answer a WebSocket handshake and open the door it asked for."""
    connection, head = exchange.connection, exchange.head
    if head.has_body:
        raise InvalidRequest("a WebSocket handshake has no body")
    is_engine = "EIO" in head.query
    if is_engine:
        check_engine_handshake(head)
    elif head.path not in ("/ws", "/ws/"):
        raise _not_found()
    # The Socket.IO door takes its token with CONNECT; for all others it was asked already.
    may_come_in = not is_engine or is_authorized(manager.config, head)
    if manager.is_draining or (manager.is_full and may_come_in):
        text = "the server is shutting down" if manager.is_draining else FULL_TEXT
        raise Unavailable(text, headers={"Retry-After": "5"})
    handshake = accept(head)
    if may_come_in:
        manager.seat(connection)
    (_open_socket_io if is_engine else _open_raw)(manager, exchange, handshake)
    if exchange.rest:
        connection.take(exchange.rest)


def _open_raw(manager: WebSocketManager, exchange: Exchange, handshake: bytes) -> None:
    since = exchange.head.query.get("since", [None])[0]
    client = manager.raw_client(exchange.connection, manager, since)
    exchange.connection.upgrade(handshake, client, manager.config.raw_ping_interval_s)
    manager.admit(client)


def _open_socket_io(manager: WebSocketManager, exchange: Exchange, handshake: bytes) -> None:
    head = exchange.head
    is_seated = exchange.connection in manager.seats
    session = SocketIoDoor(exchange.connection, manager, is_authorized=is_seated)
    exchange.connection.upgrade(handshake, session, manager.config.engine_ping_interval_s)
    if head.query["EIO"][0] == "3":
        return refuse_old_client(session)
    manager.sessions.add(session)
    session.start()


def answer_page(manager: WebSocketManager, exchange: Exchange, body: bytes) -> None:
    """GET /: the console page, or a JSON index of the doors where that file is not there."""
    from karna.page import load_page  # with the first browser

    page = load_page()
    if page is None:
        index = {"name": "karna-ws", "version": __version__, "doors": DOORS}
        return exchange.answer(200, dumps(index))
    content, policy = page
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
    return exchange.answer(200, content, "text/html; charset=utf-8", headers)


def answer_mcp(manager: WebSocketManager, exchange: Exchange, body: bytes) -> None:
    """POST /mcp: Model Context Protocol."""
    if manager.mcp is None:
        from karna.mcp import Mcp  # with the first assistant

        manager.mcp = Mcp(manager, __version__)
    manager.mcp.answer(exchange, body)


class Route(NamedTuple):
    """What a path answers, and what tells of it."""

    method: str
    handler: Callable[[WebSocketManager, Exchange, bytes], None]
    help: str = ""


ROUTES = {
    "/": Route("GET", answer_page, "GET: console page"),
    "/health": Route("GET", answer_health, "GET: is everything well"),
    "/api/status": Route("GET", answer_status, "GET: status of the services"),
    "/api/execute_command": Route(
        "POST", answer_execute, 'POST {"command": "...", ...params}: run a command'),
    "/api/notify": Route(
        "POST", answer_notify, 'POST {"message": "...", "level": "info"}: notify every client'),
    "/rpc": Route("POST", answer_rpc, "POST: JSON-RPC 2.0"),
    "/mcp": Route("POST", answer_mcp, "POST: Model Context Protocol, for assistants"),
    "/mcp/": Route("POST", answer_mcp),
    "/metrics": Route("GET", answer_metrics, "GET: Prometheus metrics"),
    "/ws": Route("GET", answer_ws, "WebSocket: JSON requests, one a message"),
    "/ws/": Route("GET", answer_ws),
}  # fmt: skip
DOORS = {
    "/socket.io/": "Socket.IO: websocket transport, namespaces / and /ws",
    **{path: each.help for path, each in ROUTES.items() if each.help},
}


# --- server ------------------------------------------------------------------------------------
# Bind first, then start services; at the end let commands finish, tell every client to come back
# (1012), and cut those that don't listen.

YOUNG_OBJECTS = 10_000  # that wait for a collection: a thousand commands hold as many, and end soon
LAST_RESORT_S = 1.0  # after the last client has gone, for tasks that ignore their cancellation


@asynccontextmanager
async def serving(manager: WebSocketManager, **options: Unpack[Options]) -> AsyncIterator[Server]:
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


async def serve(manager: WebSocketManager, **options: Unpack[Options]) -> None:
    """Serve until SIGTERM, SIGINT or cancellation, then stop gracefully.

    Options and errors are those of `serving`. A second signal ends the process at once.
    """
    async with serving(manager, **options) as server:
        await _serve_until_stopped(server)


def _kill_programs() -> None:
    from karna.programs import kill_programs  # loaded already, if one was ever allowed

    kill_programs()


async def _serve_until_stopped(server: Server) -> None:
    with stopping_on_signals(server.close, _kill_programs):
        await server.wait_closed()


async def run(
    manager: WebSocketManager, options: Mapping[str, Any], parent: Parent | None = None
) -> None:
    """Serve as `serve()` does, and say so. parent: who may start us again."""
    from karna.command_line import describe_server, say

    asyncio.get_running_loop().set_exception_handler(manager.log_loop_error)
    async with serving(manager, **options) as server:
        if parent is None or parent.is_first:
            say(describe_server(__version__, server.config, server.listener.sockets[0]))
        if parent is not None:
            parent.obey(server.make_way)
        await _serve_until_stopped(server)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server from flags and environment; the exit code."""
    from karna import command_line

    gc.freeze()  # what is loaded by now stays: full collections need not walk it
    gc.set_threshold(YOUNG_OBJECTS)
    gc.enable()
    command_line.open_standard_files()
    try:
        arguments = command_line.make_parser(__version__).parse_args(argv)
        command_line.set_up_logging(arguments.log_level)
        command_line.warn_of_misspelt(os.environ, vars(arguments))
        options = {option.name: getattr(arguments, option.name) for option in fields(Config)}
        config, parent = make_config(options), None
        if arguments.reload:
            from karna import reload

            parent = reload.find_parent()
            if parent is None:
                return reload.supervise(arguments.program, config)
            options["grace_s"] = min(config.grace_s, reload.GRACE_S)
        manager = command_line.make_manager(arguments, WebSocketManager)
        loop_factory = functools.partial(command_line.new_event_loop, config.loop)
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(run(manager, options, parent))
            # Closing the runner waits for every task, even one that ignores its cancellation.
            last_resort = threading.Timer(LAST_RESORT_S, os._exit, (0,))
            last_resort.daemon = True
            last_resort.start()
        last_resort.cancel()
    except (StartError, ValueError) as error:
        given = sys.argv[1:] if argv is None else argv
        command_line.say(f"karna_ws: {command_line.in_terms_of_flags(error, given)}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.modules["karna_ws"] = sys.modules["__main__"]  # a program's import is no second copy
    sys.exit(main())
