"""One request from its arrival to its single final answer.

A Client is who asked; a Request is what it asked, with the form of its answer; Calls is what a
client has running and waiting. Errors become answers in `Request.refuse` and `Calls._on_end`,
nowhere else.

Touches the connection that answers leave by and the commands that the manager runs; every door
has its own Client or Request on top.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from time import perf_counter
from typing import Any, ClassVar, Protocol

from orjson import dumps
from websockets.frames import CloseCode

from karna.command import Call
from karna.connection import SHARE_S, Connection
from karna.door import HOLD_CALLS, Phase
from karna.context import Context
from karna.envelopes import NOT_JSON, REQUEST_FAILED, UNENCODABLE, UNENCODABLE_PROGRESS
from karna.envelopes import encode_json
from karna.errors import FAULTS, ClientLeft, CommandFailed, RequestError, Unavailable, explain
from karna.history import Entry
from karna.hub import Hub
from karna.questions import Questions
from karna.text import encodable
from karna.trace import answered
from karna.work import Job

NO_GROUPS: frozenset[str] = frozenset()
MAX_WAITING = 256  # requests of one client that wait for a running command to end...
MAX_WAITING_BYTES = 1024 * 1024  # ...past either we stop reading that client


class Commands(Protocol):
    """What runs a call; services.CommandProcessor does."""

    def call_inline(self, call: Call) -> Any:
        """Run a call that never waits. Raises RequestError."""

    def start_call(
        self,
        call: Call,
        context: Context | None,
        on_end: Callable[[Any, RequestError | None], None],
    ) -> Job:
        """Run a call in a task; `on_end` gets its one outcome."""


class CommandHub(Hub):
    """A hub whose clients run commands."""

    commands: Any  # Commands; a program may put its own processor there
    gives_contexts = False  # to every call, also of those commands that take none


class Client:
    """One peer, as commands, handlers and embedding programs see it.

    `id` names it in logs; `door` is "raw", "socket.io", "http" or "mcp"; `auth` is what a Socket.IO
    client gave when it connected.
    """

    __slots__ = (
        "__weakref__", "_questions", "_state", "auth", "calls", "connection", "groups", "id",
        "manager", "since",
    )  # fmt: skip
    door: ClassVar[str] = ""
    request_type: ClassVar[type[Request]]  # what its requests are, with their form of answer
    namespace = "/"

    def __init__(self, connection: Connection, manager: Any, id: str) -> None:
        self.connection = connection
        self.manager = manager
        self.id = id
        self.auth: dict[str, Any] = {}
        self.since: str | None = None  # the offset that it comes back with, if it does
        self.groups: frozenset[str] = NO_GROUPS  # that it has joined
        self._state: dict[str, Any] | None = None
        self._questions: Questions | None = None  # made with the first
        self.calls: Calls | None = None  # its connection's, while it has something running there

    @property
    def state(self) -> dict[str, Any]:
        """What a program keeps of this client. It survives a Socket.IO recovery in this process."""
        if self._state is None:
            self._state = {}
        return self._state

    def join(self, group: str, *, since: str | None = None) -> None:
        """From now on the client gets what is broadcast to this group.

        A group joined in a connect handler is replayed with the rest to a client that comes back.
        since: the offset from which a group that is joined later is replayed now; where that is
        no longer kept, the client gets an `error` with code `history_gap`.
        Raises ConnectionError for a client that does not stay, such as one of the HTTP door.
        """
        self.manager.join_group(self, group)
        if since is not None:
            self.manager.replay_group(self, group, since)

    def leave(self, group: str) -> None:
        """From now on the client gets nothing more that is broadcast to this group."""
        self.manager.leave_groups(self, (group,))

    @property
    def is_present(self) -> bool:
        """Can it still be reached?"""
        return self.connection.phase is Phase.OPEN

    async def send(self, type: str, data: Any) -> None:
        """Send one envelope; wait while the client reads more slowly than it is written to.

        Raises ConnectionError once the client has left, TypeError for data that JSON can't hold.
        """
        self.deliver(encode_json({"type": type, "data": data}), None)
        await self._sent()

    async def _sent(self) -> None:
        """What every sending ends with: a program that sends in a loop must not be the only one."""
        if not self.is_present:
            raise ClientLeft(f"client {self.id} has left")
        await self.connection.written()

    async def emit(self, event: str, *args: Any) -> None:
        """Send a Socket.IO event; to a raw client, an envelope of that type.

        Raises TypeError for arguments that can't be encoded, ConnectionError as `send`.
        """
        await self.send(event, args[0] if len(args) == 1 else list(args))

    async def call(self, event: str, *args: Any, timeout_s: float = 10.0) -> Any:
        """Ask the client, and wait for what it answers; once its connect handler has let it in.

        Raises ConnectionError when it leaves or can't be asked, CommandFailed when it answers an
        error, TimeoutError after `timeout_s`, TypeError for arguments that can't be encoded.
        On the raw door it gets {"type": "call", "data": {"event", "args"}, "call": ID} and sends
        {"method": "answer", "params": {"call": ID, "data": ...}}, or "error" with a text in place
        of "data"; on the Socket.IO door it is an event with an ack.
        """
        if not self.manager.is_in(self):  # no client of the HTTP door ever is
            text = f"client {self.id} ({self.door}) can't be asked: it is not in, or has left"
            raise ClientLeft(text)
        return await self.questions.ask(self, event, args, timeout_s)

    @property
    def questions(self) -> Questions:
        """What it was asked and has not answered."""
        if self._questions is None:
            self._questions = Questions()
        return self._questions

    def send_question(self, number: int, event: str, args: tuple[Any, ...]) -> None:
        """Send a question in the door's own form."""
        raise NotImplementedError

    def welcome(self, missed: list[Entry] | None) -> None:
        """It is in: send what it missed; None where that is not known, or it does not come back."""
        raise NotImplementedError

    def refuse(self, message: str) -> None:
        """It may not come in."""
        raise NotImplementedError

    def send_missed(self, entry: Entry) -> None:
        """Send one broadcast of a replay."""
        raise NotImplementedError

    async def disconnect(self, reason: str = "") -> None:
        """Close this client's connection."""
        self.connection.close(CloseCode.NORMAL_CLOSURE, reason)

    def deliver(self, envelope: bytes, ack: int | None) -> None:
        """Send one encoded envelope: as the ack of that id, or as a message."""
        raise NotImplementedError

    def deliver_special(self, values: list[Any], ack: int | None) -> None:
        """Send what JSON can't hold in the door's own form. Raises TypeError if it has none."""
        raise TypeError(UNENCODABLE)

    def cancel_calls(self) -> None:
        """The client is gone: cancel its running commands, forget its waiting ones."""
        if self._questions is not None:
            self._questions.abandon()
        if self.calls is not None:
            self.calls.abandon(self)


class Request:
    """One request on its way to its single final answer, in the project's own envelope.

    id: what the client calls it, if it does; ack: the Socket.IO ack it asked for.
    line: the command line of an `execute_command`, which answers repeat.
    """

    __slots__ = ("ack", "client", "id", "is_done", "job", "line", "size", "started", "trace")
    is_done: bool
    job: Job | None
    started: float

    def __init__(
        self, client: Client, id: Any, ack: int | None, size: int, line: str | None = None
    ) -> None:
        self.client = client
        self.id = id
        self.ack = ack
        self.size = size
        self.line = line
        self.trace: tuple[str, float] | None = None  # its name and time, where the log shows it
        # started, job and is_done are set by Calls.run: most requests never need them.

    @property
    def is_serial(self) -> bool:
        """Must it wait for its like? So that a client that can't correlate needs not."""
        return self.line is not None and self.id is None and self.ack is None

    # What it is answered with. None: nothing is to be sent, or it has been.

    def result(self, value: Any) -> bytes | None:
        """The final answer of a call that succeeded."""
        if self.line is not None:
            value = {"command": self.line, "result": value}
        try:
            answer = self.encode("command_response", value)
        except NOT_JSON:
            answer = self._special("command_response", value, self.ack)
        if self.trace is not None:
            answered(self, "ok")
        return answer

    def fail(self, code: str, message: str, data: Mapping[str, Any] | None = None) -> bytes | None:
        """The final answer of a request that did not succeed."""
        if self.trace is not None:
            answered(self, code)
        error = {"code": code, "message": message}
        if self.line is not None:
            error["command"] = self.line
        try:
            return self.encode("error", {**error, **(data or {})})
        except NOT_JSON:
            return self.encode("error", {**error, "message": encodable(message)})

    def _special(self, type: str, data: Any, ack: int | None) -> bytes | None:
        """Send what JSON can't hold, such as bytes, in the door's own form, if it has one."""
        try:
            self.client.deliver_special(self._values(type, data), ack)
        except NOT_JSON:
            return self.fail("command_failed", UNENCODABLE)
        return None

    def refuse(self, exc: BaseException) -> bytes | None:
        """The final answer of a request that met `exc`; a bug, ours or the program's, is logged."""
        if isinstance(exc, RequestError):
            return self.fail(exc.code, explain(exc), exc.data)
        self.client.manager.log_error(f"{self.client.id} request failed", exc)
        return self.fail("internal_error", REQUEST_FAILED)

    def answer_status(self, envelope: bytes, status: bytes) -> bytes | None:
        """The answer to `get_status`: the envelope as encoded up to its id; the object alone."""
        if self.trace is not None:
            answered(self, "ok")
        if self.id is None:
            return envelope + b"}"
        return b'%b,"id":%b}' % (envelope, dumps(self.id))

    def progress(self, value: Any) -> None:
        """Send one report of the running command."""
        data = {"command": self.line, "progress": value}
        try:
            answer = self.encode("command_progress", data)
            if answer is not None:
                self.client.deliver(answer, None)
        except NOT_JSON:
            self._special_progress(data)

    def _special_progress(self, data: dict[str, Any]) -> None:
        try:
            self.client.deliver_special(self._values("command_progress", data), None)
        except NOT_JSON:
            raise CommandFailed(UNENCODABLE_PROGRESS) from None

    def deliver(self, answer: bytes | None) -> None:
        """Send the final answer, when it comes later than its request's own read."""
        if answer is not None:
            self.client.connection.allow(len(answer))
            self.client.deliver(answer, self.ack)

    # Its form.

    def encode(self, type: str, data: Any) -> bytes | None:
        """The message that says so; None where this request gets none.

        Raises TypeError or ValueError for what JSON can't hold.
        """
        envelope = {"type": type, "data": data}
        if self.id is not None:
            envelope["id"] = self.id
        return encode_json(envelope)

    def _values(self, type: str, data: Any) -> list[Any]:
        """What an ack holds."""
        envelope = {"type": type, "data": data}
        return [envelope if self.id is None else {**envelope, "id": self.id}]


Client.request_type = Request


def submit(request: Request, prepare: Callable[..., Call], *args: Any) -> bytes | None:
    """Run the call that `prepare(*args)` gives: now, or behind what its client already runs."""
    client = request.client
    if client.manager.is_draining:
        raise Unavailable("the server is shutting down")
    call = None
    if client.calls is None:
        call = prepare(*args)
        if call.command.inline:
            return call_inline(request, call)
    return calls_of(client).submit(request, call, prepare, args)


def submit_line(request: Request, call: Call) -> bytes | None:
    """`submit` what the line of the request was prepared to already. Never raises."""
    client = request.client
    try:
        calls = client.calls or calls_of(client)
        return calls.submit(request, call, client.manager.commands.prepare, (request.line,))
    except FAULTS as exc:
        return request.refuse(exc)


def calls_of(client: Client) -> Calls:
    """What runs on the client's connection; from now on its requests are counted there."""
    connection = client.connection
    if connection.calls is None:
        connection.calls = Calls(connection, client.manager)
    client.calls = connection.calls
    client.calls.clients.add(client)
    return client.calls


def call_inline(request: Request, call: Call) -> bytes | None:
    """Run a command that never waits; the answer leaves with this read's others."""
    manager = request.client.manager
    try:
        return request.result(manager.commands.call_inline(call))
    except RequestError as error:
        manager.metrics.errors[error.code] += 1
        raise


def count_waiting(connection: Connection, count: int, size: int) -> None:
    """More, or less, waits for commands to end; when it is too much the client is not read."""
    connection.waiting += count
    connection.waiting_bytes += size
    if connection.waiting > MAX_WAITING or connection.waiting_bytes > MAX_WAITING_BYTES:
        connection.hold(HOLD_CALLS)
    else:
        connection.release(HOLD_CALLS)


class Calls:
    """What a connection has running and waiting: its order, its limit, its cancellation.

    Requests run concurrently up to a limit and then wait in order; serial ones, which their client
    could not tell apart, run one after another. When too many wait, the connection is not read.
    All its clients share this, those that have left included: what still runs of them counts.
    """

    __slots__ = (
        "clients", "connection", "manager", "parallel", "running", "serial", "serial_running",
        "waits_for_turn",
    )  # fmt: skip

    def __init__(self, connection: Connection, manager: Any) -> None:
        self.connection = connection
        self.manager = manager
        self.clients: set[Client] = set()  # that are here and have asked
        self.running: set[Request] = set()
        self.serial_running: Request | None = None
        self.serial: deque[tuple[Request, Callable[[], Call]]] = deque()
        self.parallel: deque[tuple[Request, Callable[[], Call]]] = deque()
        self.waits_for_turn = False

    def submit(
        self,
        request: Request,
        call: Call | None,
        prepare: Callable[..., Call],
        args: tuple[Any, ...],
    ) -> bytes | None:
        """Start the request, or let it wait. Raises what `prepare(*args)` raises.

        call: what that gave already. It does not wait: bound arguments take more than `args`.
        """
        is_serial = request.is_serial
        queue = self.serial if is_serial else self.parallel
        must_wait = queue or (is_serial and self.serial_running is not None)
        if not must_wait and not self._is_full:
            return self._start(request, call or prepare(*args))
        queue.append((request, functools.partial(prepare, *args)))
        self._count_waiting(1, request.size)
        return None

    @property
    def _is_full(self) -> bool:
        limit: int = self.manager.config.max_running_commands
        return len(self.running) >= limit

    def _start(self, request: Request, call: Call) -> bytes | None:
        if call.command.inline:
            return call_inline(request, call)
        self._run(request, call)
        return None

    def _run(self, request: Request, call: Call) -> None:
        """Run the call in a task of its own."""
        request.started, request.is_done, request.job = perf_counter(), False, None
        self.running.add(request)
        if request.is_serial:
            self.serial_running = request
        context = None
        if self.manager.gives_contexts or not call.command.is_coroutine:
            progress = functools.partial(self._progress, request)
            context = Context(request.client, progress, owner=self.connection)
        on_end = functools.partial(self._on_end, request)
        try:
            request.job = self.manager.commands.start_call(call, context, on_end)
        except BaseException:  # of one that a program overrides
            self._forget(request)
            raise
        if request.client.calls is not self:  # from Python 3.12 on it has begun: its client left
            request.job.cancel()

    def _progress(self, request: Request, value: Any) -> Awaitable[None] | None:
        """One report; the command waits when its client reads slowly, and lets others turn."""
        if request.is_done:
            return None
        request.progress(value)
        return self.connection.written()

    def _on_end(self, request: Request, value: Any, error: RequestError | None) -> None:
        """A command has ended, however it did: answer it, and start what waited for it."""
        self._forget(request)
        # Whoever raised holds on to frames, these to the request, and that to its job.
        request.is_done, request.job = True, None
        code = "ok" if error is None else error.code
        self.manager.metrics.count_task(code, perf_counter() - request.started)
        if request.client.calls is self:  # it is still there
            request.deliver(self._answer_to(request, value, error))
        elif request.trace is not None:
            answered(request, f"{code}, nobody waits for it")
        if not self.waits_for_turn:
            self._go_on()

    def _forget(self, request: Request) -> None:
        self.running.discard(request)
        if self.serial_running is request:
            self.serial_running = None

    def _go_on(self) -> None:
        """Start what waits, as far as it may; others first when that takes long."""
        self.waits_for_turn = False
        if self.serial or self.parallel:
            self._start_waiting()
        if self.waits_for_turn:
            self.manager.turns.wait(self._go_on)
        elif not self.running:  # nothing waits either: the shorter way is open again
            for client in self.clients:
                client.calls = None
            self.connection.calls = None

    def _answer_to(self, request: Request, value: Any, error: RequestError | None) -> bytes | None:
        try:
            return request.result(value) if error is None else request.refuse(error)
        except FAULTS as exc:
            return request.refuse(exc)

    def _start_waiting(self) -> None:
        until = perf_counter() + SHARE_S
        while not self._is_full:
            if perf_counter() > until:
                self.waits_for_turn = True
                break
            if self.serial and self.serial_running is None:
                request, prepare = self.serial.popleft()
            elif self.parallel:
                request, prepare = self.parallel.popleft()
            else:
                break
            self._count_waiting(-1, -request.size)
            try:
                answer = self._start(request, prepare())
            except FAULTS as exc:  # what waits behind it must go on
                answer = request.refuse(exc)
            request.deliver(answer)

    def _count_waiting(self, count: int, size: int) -> None:
        count_waiting(self.connection, count, size)

    def cancel(self, client: Client, wanted: int | str) -> bool:
        """Cancel the client's running or waiting requests of this id; were there any?"""
        running = [each for each in self._running_of(client) if each.id == wanted]
        for request in running:
            _cancel(request)
        waiting = self._forget_waiting(client, lambda each: each.id == wanted)
        for request in waiting:
            request.deliver(request.fail("cancelled", "cancelled before it began"))
        return bool(running or waiting)

    def stop(self, client: Client) -> None:
        """The server stops: refuse what waits, cancel what runs, and let the client know."""
        for request in self._forget_waiting(client):
            request.deliver(request.fail("unavailable", "the server is shutting down"))
        for request in self._running_of(client):
            _cancel(request)

    def abandon(self, client: Client) -> None:
        """The client is gone: nobody waits for its answers any more."""
        client.calls = None
        self.clients.discard(client)
        self._forget_waiting(client)
        for request in self._running_of(client):
            _cancel(request)

    def _running_of(self, client: Client) -> list[Request]:
        return [request for request in self.running if request.client is client]

    def _forget_waiting(
        self, client: Client, is_meant: Callable[[Request], bool] = lambda request: True
    ) -> list[Request]:
        """Take requests of a client out of the queues; the connection may go on with others."""
        forgotten: list[Request] = []
        for queue in (self.serial, self.parallel):
            for _ in range(len(queue)):  # once round
                entry = queue.popleft()
                if entry[0].client is client and is_meant(entry[0]):
                    forgotten.append(entry[0])
                else:
                    queue.append(entry)
        self._count_waiting(-len(forgotten), -sum(request.size for request in forgotten))
        return forgotten


def _cancel(request: Request) -> None:
    if request.job is not None:
        request.job.cancel()
