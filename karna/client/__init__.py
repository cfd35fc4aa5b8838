"""A client of the raw door for asyncio: commands, methods, broadcasts; it comes back by itself.

    async with connect("ws://localhost:8000/ws") as client:
        print(await client.execute("brew 2", on_progress=print))
        async for broadcast in client.broadcasts():
            print(broadcast.type, broadcast.data)

What holds whatever the network does:

- A request is sent once. If its connection breaks before the answer it fails with ConnectionLost:
  it may have been executed or not. One that finds no connection waits `wait_s` for the next, then
  fails with NotConnected: it was not sent, and may be tried again.
- Cancelling the task that awaits a request cancels it on the server too. Time limits are asyncio's:
  `async with asyncio.timeout(5)`.
- Broadcasts that were missed while it was away come first when it is back. Those that the server
  no longer has are told as one `Broadcast` with `is_gap`: ask for the `status()` then.
- Who is refused (401, 403, close code 1008) does not try again: everything raises Refused.

Everything belongs to the loop it was entered in. `python -m karna.client --help` is this client for
a shell. Stands on link; no room of the server uses it, and it uses none of theirs.
examples/karna-client.ts is its twin for browsers and Node.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Self, TypeVar

from orjson import dumps
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from karna.client.link import STATUS_ID, BadMessage, ClientError, Closed, Link, Message
from karna.client.link import NotConnected, Refused, end_of, is_call, log
from karna.text import one_line

__all__ = [
    "Broadcast", "Broadcasts", "Client", "ClientError", "CommandError", "ConnectionLost",
    "NotConnected", "Refused", "connect",
]  # fmt: skip

WAIT_S = 30.0  # of a request for a connection: as long as the longest pause of the link
# Commands without an answer; further ones wait here. The server lets as many wait before it stops
# reading, and then it would not answer our pings either.
MAX_UNANSWERED = 256
MAX_BROADCASTS = 1_000  # that an iterator has not taken: as many as the server keeps
# Calls of the server that run at the same time. Further ones are answered with an error, and past
# twice as many not at all: it does not read its answers.
MAX_CALLS = 64

Progress = Callable[[Any], object]
Handler = TypeVar("Handler", bound=Callable[..., Any])


class CommandError(ClientError):
    """The server answered with an error: `code` for programs, `message` for people, all `data`."""

    def __init__(self, code: str, message: str, data: dict[str, Any]) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.data = data


class ConnectionLost(ClientError):
    """The connection broke before the answer: the request may have been executed or not."""


# --- what comes unasked ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Broadcast:
    """What the server sent unasked: a broadcast, or a message to this client alone (no offset).

    is_gap: this client's own word that some are missing here, of type "gap"; data["code"] is
    "history_gap" (away for longer than the server remembers) or "slow_reader" (this iterator left
    too many untaken; the oldest were dropped, data["missed"] is their number).
    """

    type: str
    data: Any
    offset: str | None = None
    is_gap: bool = False


class Broadcasts:
    """An iterator over what comes from now on; it ends when the client is closed.

    It never holds up the client: who takes too slowly loses the oldest, and is told so.
    Raises Refused when there will be no more.
    """

    def __init__(self, link: Link, limit: int) -> None:
        self._link = link
        self._waiting: deque[Broadcast] = deque(maxlen=limit)
        self._missed = 0
        self._wake = asyncio.Event()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Broadcast:
        while not self._waiting:
            if isinstance(self._link.ended, Closed):
                raise StopAsyncIteration
            self._link.check()
            self._wake.clear()
            await self._wake.wait()
        if self._missed:
            missed, self._missed = self._missed, 0
            message = f"{missed} broadcasts were dropped: they were taken too slowly"
            return _gap({"code": "slow_reader", "message": message, "missed": missed})
        return self._waiting.popleft()

    def _put(self, broadcast: Broadcast) -> None:
        self._missed += len(self._waiting) == self._waiting.maxlen
        self._waiting.append(broadcast)
        self._wake.set()


def _gap(data: dict[str, Any]) -> Broadcast:
    return Broadcast("gap", data, is_gap=True)


def _is_history_gap(message: Message) -> bool:
    data = message["data"]
    is_error = message["type"] == "error" and type(data) is dict
    return is_error and data.get("code") == "history_gap"


# --- the client --------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class _Pending:
    """A request without its final answer, which is a message, or what to raise instead."""

    id: int
    connection: ClientConnection
    on_progress: Progress | None
    answer: asyncio.Future[Message | Exception] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Client:
    """What `connect()` gives; `async with` connects it, and closes it at the end."""

    def __init__(
        self, url: str, *, token: str | None, on_progress: Progress | None, wait_s: float
    ) -> None:
        token = os.environ.get("KARNA_TOKEN") if token is None else token
        self._link = Link(
            url, token, receive=self._receive, on_lost=self._on_lost, on_end=self._on_end
        )
        self._on_progress = on_progress
        self._wait_s = wait_s
        self._handlers: dict[str, Callable[..., Any]] = {}
        self._streams: weakref.WeakSet[Broadcasts] = weakref.WeakSet()
        self._ids = count(STATUS_ID + 1)
        self._slots = asyncio.Semaphore(MAX_UNANSWERED)
        self._pending: dict[int, _Pending] = {}
        self._calls: set[asyncio.Task[None]] = set()  # of the server; they end with the connection
        self._cancels: set[asyncio.Task[None]] = set()

    @property
    def is_connected(self) -> bool:
        """Would a request be sent at once?"""
        return self._link.connection is not None

    async def execute(
        self, command: str, /, *, on_progress: Progress | None = None, **params: Any
    ) -> Any:
        """Run a command line; its result. Further `params` reach the command by name.

        on_progress: called with each report of the running command, before this returns; a plain
        function that does not block. What it raises is raised here, and cancels the command.
        Raises CommandError, ConnectionLost, NotConnected; TypeError for what JSON can't hold.
        """
        params = {**params, "command": command}
        data = await self._request("execute_command", params, on_progress)
        if type(data) is not dict or "result" not in data:
            raise BadMessage("the server answered a command without a result")
        return data["result"]

    async def call(
        self, method: str, /, *, on_progress: Progress | None = None, **params: Any
    ) -> Any:
        """Call any method of the server; the `data` of its answer. All else as `execute`."""
        return await self._request(method, params, on_progress)

    async def status(self) -> dict[str, Any]:
        """The status of all services now."""
        status: dict[str, Any] = await self._request("get_status", {}, None)
        return status

    def broadcasts(self, limit: int = MAX_BROADCASTS) -> Broadcasts:
        """An iterator over all broadcasts from this call on; there may be several, each gets all.

        limit: how many may wait to be taken. Past it the oldest are dropped, and a gap is told.
        """
        if limit < 1:
            raise ValueError("limit must be 1 or more")
        stream = Broadcasts(self._link, limit)
        self._streams.add(stream)  # until it is dropped
        return stream

    def on(self, event: str) -> Callable[[Handler], Handler]:
        """Decorator: answer the server's calls of `event` with what the function returns.

        It gets the call's arguments. `async def` runs on the loop and is cancelled when the
        connection breaks; plain `def` runs in a thread, and may wait for a person. What it raises
        is the error that the server gets, and is logged. Register before connecting to miss none.
        """
        if not isinstance(event, str):
            raise TypeError('name the event: @client.on("confirm")')
        if event in self._handlers:
            raise ValueError(f"event {event!r} has a handler already")

        def register(function: Handler) -> Handler:
            self._handlers[event] = function
            return function

        return register

    async def settled(self) -> None:
        """Wait until the server has answered every request, those that were cancelled too."""
        while self._pending:
            await asyncio.wait([pending.answer for pending in self._pending.values()])

    async def __aenter__(self) -> Self:
        """Connect: one try. Raises Refused, NotConnected."""
        await self._link.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection for good; whatever waits fails. No task is left behind."""
        tasks = self._calls | self._cancels
        for task in tasks:
            task.cancel()
        await self._link.close()
        if tasks:
            await asyncio.wait(tasks)

    # Requests.

    async def _request(
        self, method: str, params: dict[str, Any], on_progress: Progress | None
    ) -> Any:
        """Send a request when there is a connection; the `data` of its answer."""
        on_progress = on_progress or self._on_progress
        if inspect.iscoroutinefunction(on_progress):
            raise TypeError("on_progress must be a plain function, not async")
        id = next(self._ids)
        text = dumps({"method": method, "params": params, "id": id})
        connection = await self._link.connected(self._wait_s)
        if method == "get_status":  # answered at once, whatever else waits
            return await self._exchange(text, _Pending(id, connection, on_progress))
        while True:
            async with self._slots:
                # It may have broken meanwhile: nobody holds a place while waiting for the next.
                if (now := self._link.connection) is not None:
                    return await self._exchange(text, _Pending(id, now, on_progress))
            await self._link.connected(self._wait_s)

    async def _exchange(self, text: bytes, pending: _Pending) -> Any:
        self._pending[pending.id] = pending
        try:
            await pending.connection.send(text, text=True)
            answer = await asyncio.shield(pending.answer)  # for `settled`, which waits for it too
        except ConnectionClosed as closed:  # `_on_lost` has forgotten it, or will
            raise _lost(str(end_of(closed))) from None
        except asyncio.CancelledError:
            pending.on_progress = None
            self._cancel(pending)
            raise
        if isinstance(answer, Exception):
            raise answer
        if answer["type"] == "error":
            data = answer["data"]
            raise CommandError(data["code"], data["message"], data)
        return answer["data"]

    def _cancel(self, pending: _Pending) -> None:
        """Tell the server that nobody waits for this answer any more."""
        request = {"method": "cancel", "params": {"id": pending.id}, "id": next(self._ids)}
        task = asyncio.create_task(_send(pending.connection, dumps(request)))
        self._cancels.add(task)
        task.add_done_callback(self._cancels.discard)

    # What the link tells.

    def _on_lost(self, reason: str) -> None:
        for pending in self._pending.values():
            pending.answer.set_result(_lost(reason))
        self._pending.clear()
        for task in self._calls:
            task.cancel()

    def _on_end(self) -> None:
        for stream in self._streams:
            stream._wake.set()

    def _receive(self, connection: ClientConnection, message: Message) -> None:
        """Take one message."""
        offset = message.get("offset")
        if "id" in message:
            self._take_answer(message)
        elif is_call(message):
            self._start_call(connection, message)
        elif offset is None and message["type"] in ("command_response", "command_progress"):
            pass  # to an answer of ours, which has no id
        elif offset is None and _is_history_gap(message):
            self._publish(_gap(message["data"]))
        else:
            self._publish(Broadcast(message["type"], message["data"], offset))

    def _take_answer(self, message: Message) -> None:
        pending = self._pending.get(message["id"])
        if pending is None:
            return  # it was given up
        outcome: Message | Exception = message
        if message["type"] == "command_progress":
            error = _report(pending.on_progress, message["data"]["progress"])
            if error is None:
                return
            self._cancel(pending)
            outcome = error
        del self._pending[pending.id]
        pending.answer.set_result(outcome)

    def _publish(self, broadcast: Broadcast) -> None:
        for stream in self._streams:
            stream._put(broadcast)

    # Calls of the server.

    def _start_call(self, connection: ClientConnection, message: Message) -> None:
        """Answer a call of the server in a task of its own."""
        id, event, args = message["call"], message["data"]["event"], message["data"]["args"]
        handler = self._handlers.get(event)
        running = len(self._calls)
        if running >= 2 * MAX_CALLS:
            return
        if handler is None:
            error = f"this client has no handler for {one_line(event, 60)!r}"
            work = _send(connection, _encode_answer(id, error=error))
        elif running >= MAX_CALLS:
            error = f"this client answers {MAX_CALLS} calls already"
            work = _send(connection, _encode_answer(id, error=error))
        else:
            work = _answer(connection, id, event, handler, args)
        task = asyncio.create_task(work)
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)


async def _answer(
    connection: ClientConnection, id: Any, event: str, handler: Callable[..., Any], args: list[Any]
) -> None:
    """Run the handler of a call, on the loop or in a thread, and send what it returned or raised.

    A CancelledError of its own making is an error like others: only ours ends without an answer.
    """
    try:
        if inspect.iscoroutinefunction(handler):
            value = await handler(*args)
        else:
            value = await asyncio.to_thread(handler, *args)
            value = await value if inspect.isawaitable(value) else value
        text = _encode_answer(id, data=value)
    except (Exception, asyncio.CancelledError) as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        log.error("the handler of %r failed", event, exc_info=error)
        text = _encode_answer(id, error=one_line(str(error), 1_000) or type(error).__name__)
    await _send(connection, text)


def _encode_answer(id: Any, **outcome: Any) -> bytes:
    """The answer to a call: `data`, or `error` with a message. TypeError for what is no JSON."""
    return dumps({"method": "answer", "params": {"call": id, **outcome}})


async def _send(connection: ClientConnection, text: bytes) -> None:
    """Send what nobody waits for: on a connection that has ended it has no use."""
    with suppress(ConnectionClosed):
        await connection.send(text, text=True)


def _report(on_progress: Progress | None, progress: Any) -> Exception | None:
    """Hand over a report; what that raised, if it did."""
    try:
        if on_progress is not None:
            on_progress(progress)
    except Exception as error:
        return error
    except asyncio.CancelledError as error:  # of its own making: nobody cancelled us in here
        return RuntimeError(f"on_progress raised {error!r}")
    return None


def _lost(reason: str) -> ConnectionLost:
    return ConnectionLost(f"{reason} before the answer came; it may have been executed")


def connect(
    url: str, *, token: str | None = None, on_progress: Progress | None = None,
    wait_s: float = WAIT_S,
) -> Client:  # fmt: skip
    """A client of the server at `url`, such as "ws://localhost:8000/ws", for `async with`.

    token: what the server wants to see; by default KARNA_TOKEN, "" sends none.
    on_progress: for requests that have none of their own.
    wait_s: how long a request waits while there is no connection.
    Raises ValueError for a wrong URL or token.
    """
    return Client(url, token=token, on_progress=on_progress, wait_s=wait_s)
