"""What all sockets of a server share: counters, the gate of the log, deadlines, tasks.

`WebSocketManager` extends it; the rooms below name it, so that none of them has to know the
manager. Touches the config and the work of others; knows sockets by four members only.
"""

from __future__ import annotations

import asyncio
import itertools
import select
import threading
from collections.abc import Coroutine
from typing import Any, Protocol

from karna.config import Config
from karna.errors import StartError
from karna.log import LogGate, log
from karna.metrics import Metrics
from karna.reader import EpollReader, Readable, Turns
from karna.work import Tasks

PENDING_CONNECTIONS = 128  # sockets in handshake or HTTP beyond max_clients; more are cut at once


class Swept(Protocol):
    """What the hub needs of a socket."""

    name: str
    deadline: float

    def on_deadline(self, now: float) -> None:
        """`deadline`, in the loop's time, has passed."""

    def abort(self) -> None:
        """Cut the connection."""


class Hub:
    """The sockets of one server, and what they count, log and wait for together."""

    reader: EpollReader | None  # where the system has epoll
    turns: Turns  # while it serves

    def __init__(self) -> None:
        self.connections: set[Any] = set()  # of Swept; each room knows them by what it needs
        self.names = itertools.count(1)  # of connections, in logs
        self.bytes_in = self.bytes_out = self.messages_in = self.messages_out = 0
        self.metrics = Metrics()
        self.log_gate = LogGate()
        self.tasks = Tasks(self.log_error)
        self.is_draining = False
        self.loop: asyncio.AbstractEventLoop | None = None  # while it serves
        self.thread = 0  # of that loop
        self.reader = None
        self.when_empty: asyncio.Event | None = None  # set when the last socket is closed
        self.config = Config()
        self.max_message_bytes = self.config.max_message_bytes

    def first_door(self, connection: Any) -> Any:
        """What a new connection hands its bytes to."""
        raise NotImplementedError

    def begin(self, *, trusts_edges: bool) -> None:
        """Serve, on the loop that runs. Raises StartError where sockets can't be watched."""
        loop = asyncio.get_running_loop()
        self.turns = Turns(loop)
        if hasattr(select, "epoll"):  # elsewhere asyncio's transports read
            try:
                self.reader = EpollReader(loop, self._count_bytes_in, self._reading_failed)
            except OSError as error:
                raise StartError(f"can't watch sockets: {error.strerror}") from None
            if trusts_edges:
                self.reader.trust_edges()
        self.loop, self.thread = loop, threading.get_ident()

    def end(self) -> None:
        """Undo `begin`."""
        self.loop = None
        if self.reader is not None:
            self.reader.close()
            self.reader = None

    def _count_bytes_in(self, count: int) -> None:
        self.bytes_in += count

    def _reading_failed(self, connection: Readable, exc: BaseException) -> None:
        self.log_error("reading a connection failed", exc)

    # Sockets.

    def adopt(self, connection: Swept) -> None:
        """A socket was accepted."""
        if len(self.connections) >= self.config.max_clients + PENDING_CONNECTIONS:
            self.metrics.refusals["too many sockets"] += 1
            if self.log_gate.admits("too many sockets"):
                log.warning("%s cut: too many sockets (--max-clients)", connection.name)
            connection.abort()
        self.connections.add(connection)

    def release(self, connection: Swept) -> None:
        """A socket is closed."""
        self.connections.discard(connection)
        if not self.connections and self.when_empty is not None:
            self.when_empty.set()

    def drop(self, name: str, reason: str) -> None:
        """Count and log that a connection is closed for a fault of its peer."""
        self.metrics.drops[reason] += 1
        if self.log_gate.admits(f"dropped, {reason}"):
            log.warning("%s dropped: %s", name, reason)

    def log_error(self, what: str, exc: BaseException) -> None:
        """Log a bug of ours, or of a program's code, with its traceback."""
        if self.log_gate.admits("error"):
            # The traceback ends with the exception's text, or says that it has none to show.
            log.error("%s: %s", what, type(exc).__name__, exc_info=exc)

    def log_loop_error(
        self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]
    ) -> None:
        """What asyncio could tell nobody else, such as no descriptors left to accept with."""
        exc = context.get("exception")
        if self.log_gate.admits(f"loop, {type(exc).__name__}"):
            log.error("%s: %s", context["message"], exc)

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run `work` in a task of this server, which ends with it."""
        return self.tasks.spawn(work, name)

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
