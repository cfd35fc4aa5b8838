"""A server that runs: it binds, starts the services, and stops in good order.

Bind first, then start services; at the end let commands finish, tell every client to come back
(1012), and cut those that don't listen. Touches the listener, the monitor and the hub it serves;
made by `karna_ws.serving`.
"""

from __future__ import annotations

import asyncio
import functools
import time
from contextlib import suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, cast

from websockets.frames import CloseCode

from karna.admission import AdmissionHub
from karna.config import Config
from karna.connection import Connection
from karna.door import Phase
from karna.errors import StartError
from karna.http import Exchange
from karna.listen import Listener, fit_descriptors
from karna.log import log
from karna.service import Monitor, Service
from karna.text import count_of

if TYPE_CHECKING:
    from karna.backplane import RedisBackplane

SHUTDOWN_CLOSE_S = 2.0  # a peer that ignores our close must not hold up a restart
CANCEL_S = 5.0  # for cancelled commands to clean up; work.CANCEL_WAIT_S is inside
BACKPLANE_S = 1.0  # to load history from Redis before the first client is let in
# Is this code run by the loading of a program's file? Serving would begin before that is over.
is_loading: ContextVar[bool] = ContextVar("is_loading", default=False)


class ServedHub(AdmissionHub):
    """What the server needs of the manager at the top."""

    services: dict[str, Service]

    def configure(self, config: Config) -> None:
        """Take new options."""
        raise NotImplementedError

    def use_backplane(self, backplane: RedisBackplane | None) -> None:
        """Share broadcasts through `backplane`, or keep them in this process."""
        raise NotImplementedError

    def begin_draining(self) -> None:
        """Start no command any more; answer what runs."""
        raise NotImplementedError


class Server:
    """A server that runs: where it listens, and how to end it."""

    def __init__(self, manager: ServedHub, config: Config) -> None:
        self.manager = manager
        self.config = config
        self.listener = Listener(config)
        self._monitor = Monitor(())
        self._sweep: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The TCP port it listens on; 0 on a Unix socket."""
        name = self.listener.sockets[0].getsockname()
        return name[1] if isinstance(name, tuple) else 0

    async def start(self) -> None:
        """Bind, then start the services. Raises StartError, in one line that names the mend."""
        manager = self.manager
        if is_loading.get():
            guard = 'if __name__ == "__main__":'
            raise StartError(f"karna_ws.py serves this file: put its own serving under `{guard}`")
        if manager.loop is not None:
            raise StartError("this manager is served already")
        manager.configure(self.config)
        manager.max_clients = fit_descriptors(self.config.max_clients)
        manager.use_backplane(self._make_backplane())
        await self.listener.bind(functools.partial(Connection, manager))
        try:
            manager.begin(trusts_edges=not self.listener.is_unix)
        except StartError:
            self.listener.stop_accepting()
            self.listener.remove_unix_file()
            raise
        self._sweep = asyncio.create_task(manager.sweep(), name="sweep")
        self._sweep.add_done_callback(self._sweep_ended)
        self._monitor = Monitor(manager.services.values(), log_gate=manager.log_gate)
        self._monitor.start()
        try:
            if manager.backplane is not None:
                # Clients that come back at once would else find no history, as without Redis.
                with suppress(TimeoutError):
                    await asyncio.wait_for(manager.backplane.has_tried.wait(), BACKPLANE_S)
            await self.listener.start_accepting(manager.reader)
        except BaseException:  # cancelled: nobody has this server yet to close it
            await self.close()
            raise

    def _make_backplane(self) -> RedisBackplane | None:
        if self.config.backplane is None:
            return None
        from karna.backplane import make_backplane  # most start without

        return make_backplane(self.config.backplane)

    def _sweep_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self.manager.log_error("sweep ended", task.exception() or RuntimeError("without error"))
            self.close()

    def close(self) -> asyncio.Task[None]:
        """Begin to stop; the task it returns ends when everything has."""
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        return self._closing

    def make_way(self) -> None:
        """`close`, for another process with the same socket: who connects now waits for that."""
        self.listener.stop_accepting()
        self.close()

    async def wait_closed(self) -> None:
        """Wait until the server has stopped."""
        while self._closing is None:
            assert self._sweep is not None
            await asyncio.wait([self._sweep])
            await asyncio.sleep(0)
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        manager = self.manager
        manager.begin_draining()
        log.info("stopping: %s", count_of(manager.count_clients(), "client"))
        await self._finish_commands()
        self.listener.stop_accepting()
        for _ in range(3):  # turns in which what has arrived already is read and answered
            await asyncio.sleep(0)
        manager.flush_broadcasts()
        for connection in tuple(manager.connections):
            if not isinstance(connection, Connection):
                connection.abort()  # it is still in its TLS handshake
                continue
            connection.close(CloseCode.SERVICE_RESTART, "service restart")
            connection.flush()
            if connection.phase is Phase.HTTP and connection.door.is_idle:
                connection.abort()  # it has asked for nothing
        limit_s = min(self.config.close_timeout_s, SHUTDOWN_CLOSE_S)
        if manager.connections:
            shown = count_of(len(manager.connections), "connection")
            log.info("waiting for %s to close, at most %g s", shown, limit_s)
        await self._wait_for_peers(limit_s)
        for connection in tuple(manager.connections):
            connection.abort()
        await self._wait_for_peers(1.0)
        await self._monitor.stop()
        cast("asyncio.Task[None]", self._sweep).cancel()
        await manager.entering.end_all()
        await manager.tasks.end_all()
        await self.listener.wait_closed()
        manager.end()
        log.info("stopped")

    async def _finish_commands(self) -> None:
        """Running commands get their grace, then they are cancelled and their clients told."""
        manager = self.manager
        works = (manager.commands.tasks, manager.tasks)
        grace_s = self.config.grace_s
        until = time.monotonic() + grace_s
        running = len(manager.commands.tasks.running)
        if running and grace_s:
            log.info("waiting for %s, at most %g s", count_of(running, "command"), grace_s)
        for work in works:
            await work.wait(max(0.0, until - time.monotonic()))
        open_ones = [each for each in manager.connections if isinstance(each, Connection)]
        doors = [connection.door for connection in open_ones]
        left = len(manager.commands.tasks.running)
        if left:
            log.info("cancelling %s", count_of(left, "command"))
        asking = [door.client for door in doors if isinstance(door, Exchange) and door.client]
        for client in [*manager.all_clients(), *asking]:
            if client.calls is not None:
                client.calls.stop(client)
        for work in works:
            await work.wait(CANCEL_S)

    async def _wait_for_peers(self, limit_s: float) -> None:
        manager = self.manager
        manager.when_empty = asyncio.Event()
        if manager.connections:
            with suppress(TimeoutError):
                await asyncio.wait_for(manager.when_empty.wait(), limit_s)
