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
from karna.errors import StartError, explain
from karna.log import LogGate
from karna.metrics import Metrics
from karna.reader import EpollReader, Outbox, Readable, Turns
from karna.work import Tasks

PENDING_CONNECTIONS = 128  # sockets in handshake or HTTP beyond max_clients; the oldest give way
MAX_LOOKS = 256  # at sockets that might give way to a new one; more would take a turn's time


class Swept(Protocol):
    """What the hub needs of a socket."""

    deadline: float

    @property
    def who(self) -> str:
        """As logs name it."""

    @property
    def is_dispensable(self) -> bool:
        """May it give way to a newcomer, if it has not been let in?"""

    def on_deadline(self, now: float) -> None:
        """`deadline`, in the loop's time, has passed."""

    def abort(self) -> None:
        """Cut the connection."""


class Hub:
    """The sockets of one server, and what they count, log and wait for together."""

    reader: EpollReader | None  # where the system has epoll
    turns: Turns  # while it serves
    outbox: Outbox  # the same

    def __init__(self) -> None:
        self.connections: set[Any] = set()  # of Swept; each room knows them by what it needs
        self.pending: dict[Any, None] = {}  # those not let in yet, the oldest first
        self.seats: set[Any] = set()  # those that were let in, and have not left
        self.leaving = 0  # handlers that run for who has left: each keeps its client's place
        self.names = itertools.count(1)  # of connections, in logs
        self.bytes_in = self.bytes_out = self.messages_in = self.messages_out = 0
        self.metrics = Metrics()
        self.log_gate = LogGate()
        self.traces = False  # does the log show each request? Told when it begins to serve
        self.tasks = Tasks(self.log_error)
        self.entering = Tasks(self.log_error)  # handshakes and replays: no stop waits for their end
        self.is_draining = False
        self.loop: asyncio.AbstractEventLoop | None = None  # while it serves
        self.thread = 0  # of that loop
        self.reader = None
        self.when_empty: asyncio.Event | None = None  # set when the last socket is closed
        self.config = Config()
        self.max_clients = self.config.max_clients  # fewer where there are no more descriptors
        self.max_message_bytes = self.config.max_message_bytes

    def first_door(self, connection: Any) -> Any:
        """What a new connection hands its bytes to."""
        raise NotImplementedError

    def begin(self, *, trusts_edges: bool) -> None:
        """Serve, on the loop that runs. Raises StartError where sockets can't be watched."""
        loop = asyncio.get_running_loop()
        self.turns = Turns(loop)
        self.outbox = Outbox(loop)
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
        self.log_gate.finish()
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
        """A socket was accepted. Where there are too many, who was not let in gives way."""
        self.connections.add(connection)
        self.pending[connection] = None
        if len(self.connections) > self.max_clients + PENDING_CONNECTIONS:
            oldest = itertools.islice(self.pending, MAX_LOOKS)
            victim = next((each for each in oldest if each.is_dispensable), connection)
            self.metrics.refusals["too many sockets"] += 1
            text = "%s cut: too many sockets (--max-clients)"
            self.log_gate.warning("too many sockets", text, victim.who)
            self.release(victim)  # now: it may take a turn of the loop until it is closed
            victim.abort()

    def seat(self, connection: Swept) -> None:
        """A peer may come in: its place is its own until it leaves."""
        self.pending.pop(connection, None)
        self.seats.add(connection)

    def unseat(self, connection: Swept) -> None:
        """A peer is on its way out: its place is another's, and its socket may give way."""
        if connection in self.seats:
            self.seats.discard(connection)
            self.pending[connection] = None

    @property
    def is_full(self) -> bool:
        """Are there as many clients as there may be?"""
        return len(self.seats) + self.leaving >= self.max_clients

    def release(self, connection: Swept) -> None:
        """A socket is closed."""
        self.connections.discard(connection)
        self.pending.pop(connection, None)
        self.seats.discard(connection)
        if not self.connections and self.when_empty is not None:
            self.when_empty.set()

    def drop(self, name: str, reason: str) -> None:
        """Count and log that a connection is closed for a fault of its peer."""
        self.metrics.drops[reason] += 1
        self.log_gate.warning(f"dropped, {reason}", "%s dropped: %s", name, reason)

    def log_error(self, what: str, exc: BaseException) -> None:
        """Log a bug of ours, or of a program's code, with its traceback."""
        self.log_gate.error(what, exc)

    def log_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """What asyncio could tell nobody else, such as no descriptors left to accept with."""
        exc = context.get("exception")
        kind = f"loop, {type(exc).__name__}"
        self.log_gate.warning(kind, "%s: %s", context["message"], explain(exc) if exc else "")

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
                    self.log_error(f"{connection.who} deadline failed", exc)
                    connection.abort()
