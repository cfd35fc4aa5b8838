"""Where a server listens, and what ends it: TCP, Unix and systemd sockets, TLS, signals.

Touches the operating system and the config; used by the Server.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, cast

from websockets.asyncio.server import Server as WebSocketServer
from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as websockets_serve
from websockets.asyncio.server import unix_serve as websockets_unix_serve

from karna.access import is_ip_address
from karna.config import Config
from karna.errors import StartError
from karna.hub import PENDING_CONNECTIONS
from karna.log import library_log, log
from karna.reader import EpollReader
from karna.transport import BACKLOG, Acceptor

SPARE_DESCRIPTORS = 64  # for programs, model servers, Redis, files, and who is being closed


class Listener:
    """The listening sockets of a server: `websockets.serve` on what the config asks for."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.server: WebSocketServer | None = None
        self._create: Callable[[], Any] = object
        self._acceptors: list[Acceptor] = []
        self._unix_file: os.stat_result | None = None

    @property
    def sockets(self) -> list[socket.socket]:
        """Those that clients connect to."""
        return list(self.server.sockets) if self.server else []

    async def bind(self, create: Callable[[], Any]) -> None:
        """Bind, without accepting yet; `create` makes the protocol of an accepted socket.

        Raises StartError, in one line that names the mend.
        """
        config = self.config
        check_binding(config)
        if config.certfile:
            from karna.tls import entrances  # with ssl; most start without

            create = entrances(config, create)
        self._create = create
        options: dict[str, Any] = {
            # Not a connection of the library's, which would make a task, a queue, two futures, and
            # with compression 64 KiB.
            "create_connection": lambda protocol, server, **options: create(),
            "backlog": BACKLOG,
            "logger": library_log,
            "start_serving": False,
        }
        try:
            self.server = await self._bind(options)
        except OSError as error:
            raise StartError(_explain_bind(config, error)) from None

    async def _bind(self, options: dict[str, Any]) -> WebSocketServer:
        config = self.config
        inherited = inherited_socket()
        if inherited is not None:
            name = inherited.getsockname()
            if isinstance(name, tuple):
                check_binding(replace(config, host=name[0]))
                return await websockets_serve(_unused_handler, sock=inherited, **options)
            if sys.version_info >= (3, 13):
                options["cleanup_socket"] = False  # the file is who bound it's to remove
            return await websockets_unix_serve(_unused_handler, sock=inherited, **options)
        if config.unix is not None:
            return await self._bind_unix(config.unix, options)
        if config.reuse_port:
            options["reuse_port"] = True
        return await websockets_serve(_unused_handler, config.host, config.port, **options)

    async def _bind_unix(self, path: str, options: dict[str, Any]) -> WebSocketServer:
        if _is_served(path):
            raise StartError(f"{path} is in use by another server; choose another with --unix")
        mask = os.umask(0o177)  # who can write to the socket can execute commands: its owner only
        try:
            server = await websockets_unix_serve(_unused_handler, path, **options)
        finally:
            os.umask(mask)
        self._unix_file = os.stat(path)
        return server

    @property
    def is_unix(self) -> bool:
        """Does it listen on a Unix socket?"""
        return self.sockets[0].family == socket.AF_UNIX

    async def start_accepting(self, reader: EpollReader | None) -> None:
        """From now on clients get in; with a reader without asyncio's help."""
        assert self.server is not None
        if reader is None or self.config.certfile:
            return await self.server.start_serving()
        loop = asyncio.get_running_loop()
        for listening in self.sockets:
            self._acceptors.append(Acceptor(loop, reader, listening, self._create))
        return None

    def stop_accepting(self) -> None:
        """Accept nobody any more; who is connected stays."""
        while self._acceptors:
            self._acceptors.pop().close()
        if self.server is not None:
            self.server.close(close_connections=False)

    async def wait_closed(self) -> None:
        """Wait until all that `stop_accepting` began has ended, and clean up."""
        if self.server is not None:
            await self.server.wait_closed()
        self.remove_unix_file()

    def remove_unix_file(self) -> None:
        """Remove the file of a Unix socket, unless it is a successor's by now."""
        if self._unix_file is not None:
            path = cast(str, self.config.unix)
            with suppress(OSError):  # gone already
                if os.path.samestat(os.stat(path), self._unix_file):
                    os.unlink(path)


def fit_descriptors(max_clients: int) -> int:
    """Get descriptors for so many clients, as far as the system allows; for how many there are.

    The soft limit of this process is raised, as web servers do. A socket that can't be accepted
    for want of a descriptor would be cut without a word, `/health` included.
    """
    try:
        import resource
    except ImportError:  # Windows: no such limit
        return max_clients
    wanted = max_clients + PENDING_CONNECTIONS + SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_endless = hard == resource.RLIM_INFINITY
    if soft != resource.RLIM_INFINITY and soft < wanted:
        granted = wanted if is_endless else min(wanted, hard)
        with suppress(OSError, ValueError):  # macOS has another limit besides
            resource.setrlimit(resource.RLIMIT_NOFILE, (granted, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return max_clients
    fitting = max(1, soft - PENDING_CONNECTIONS - SPARE_DESCRIPTORS)
    text = "room for %d clients only, not %d: the system allows %d descriptors (ulimit -n)"
    log.warning(text, fitting, max_clients, soft)
    return fitting


async def _unused_handler(connection: ServerConnection) -> None:
    """`websockets.serve` wants a handler; a Connection never calls it."""


def check_binding(config: Config) -> None:
    """Refuse to listen beyond this machine without a token. Raises StartError."""
    is_guarded = config.unix is not None or config.token is not None or config.insecure_no_token
    if not is_guarded and not is_loopback(config.host):
        raise StartError(
            f"listening on {config.host or 'all addresses'} lets others command this machine: set "
            "a token (--token or KARNA_TOKEN), or accept that with --insecure-no-token"
        )


def is_loopback(host: str) -> bool:
    """Do all addresses of this host belong to this machine alone?"""
    if not host:
        return False
    if is_ip_address(host) or is_ip_address(f"[{host}]"):  # most are: saves the codecs for names
        return host.startswith("127.") or host == "::1"
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        reason = error.strerror or error
        raise StartError(f"host {host!r} is no address of this machine: {reason}") from None
    addresses = [str(address[0]) for *_, address in found]
    return all(address.startswith("127.") or address == "::1" for address in addresses)


PASSED_SOCKET = "_KARNA_LISTEN_FD"  # by a parent of ours; the number is no promise


def inherited_socket() -> socket.socket | None:
    """The listening socket that systemd passed, if it did (sd_listen_fds), or a parent of ours."""
    if PASSED_SOCKET in os.environ:
        passed = socket.socket(fileno=int(os.environ.pop(PASSED_SOCKET)))
        passed.set_inheritable(False)
        return passed
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    if os.environ.get("LISTEN_FDS") != "1":
        raise StartError("exactly one socket can be taken over (LISTEN_FDS)")
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)  # not for programs that we start
    inherited = socket.socket(fileno=3)
    inherited.set_inheritable(False)
    return inherited


def bind_socket(config: Config) -> socket.socket:
    """The one listening socket that the config asks for, for children to serve on.

    Of a name's addresses it is the first, IPv4 before IPv6. Raises StartError.
    """
    check_binding(config)
    try:
        return _bind_unix(config.unix) if config.unix is not None else _bind_tcp(config)
    except OSError as error:
        raise StartError(_explain_bind(config, error)) from None


def _bind_tcp(config: Config) -> socket.socket:
    options: dict[str, Any] = {"backlog": BACKLOG, "reuse_port": config.reuse_port}
    if not config.host and socket.has_dualstack_ipv6():
        options |= {"family": socket.AF_INET6, "dualstack_ipv6": True}
        return socket.create_server(("", config.port), **options)
    host = config.host or "0.0.0.0"
    found = socket.getaddrinfo(host, config.port, type=socket.SOCK_STREAM)
    family, *_, address = min(found, key=lambda each: each[0] != socket.AF_INET)
    return socket.create_server((str(address[0]), config.port), family=family, **options)


def _bind_unix(path: str) -> socket.socket:
    if _is_served(path):
        raise StartError(f"{path} is in use by another server; choose another with --unix")
    with suppress(FileNotFoundError):
        os.unlink(path)  # of a server that was killed
    listening = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o177)  # as for a server of one process
    try:
        listening.bind(path)
    finally:
        os.umask(mask)
    listening.listen(BACKLOG)
    return listening


def unlink_socket(listening: socket.socket) -> None:
    """Remove the file of a Unix socket that `bind_socket` made."""
    with suppress(OSError):
        os.unlink(listening.getsockname())


def _is_served(path: str) -> bool:
    """Does a server accept connections on this Unix socket?"""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                raise StartError(f"{path} exists and is no socket; choose another with --unix")
            probe.settimeout(1.0)
            probe.connect(path)
        except OSError:
            return False
    return True


def _explain_bind(config: Config, error: OSError) -> str:
    where = config.unix or f"{config.host}:{config.port}"
    flag = "--unix" if config.unix else "--port"
    if error.errno == errno.EADDRINUSE:
        return f"{where} is in use; choose another with {flag}"
    if error.errno == errno.EACCES:
        wanted = flag if config.unix else f"{flag}, 1024 or more"
        return f"not allowed to listen on {where}; choose another with {wanted}"
    # asyncio's own text would name the address again; getaddrinfo's numbers are negative.
    number = error.errno or 0
    reason = os.strerror(number) if number > 0 else error.strerror or error
    return f"can't listen on {where}: {reason}"


@contextmanager
def stopping_on_signals(stop: Callable[[], Any], kill: Callable[[], None]) -> Iterator[None]:
    """While the block runs, SIGTERM and SIGINT call `stop`; a second one ends the process at once.

    Several servers may do so in one loop: one signal stops them all.
    kill: what must end with the process, such as programs that it started.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals; the program decides
        return
    loop = asyncio.get_running_loop()
    stops = _stops.setdefault(loop, {})
    stops[stop] = True
    for number in _SIGNALS:
        loop.add_signal_handler(number, _on_signal, loop, number, kill)
    try:
        yield
    finally:
        del stops[stop]
        if not stops:
            del _stops[loop]
            for number in _SIGNALS:
                loop.remove_signal_handler(number)


_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# What is to be stopped, of each loop that serves; false once it was told.
_stops: dict[asyncio.AbstractEventLoop, dict[Callable[[], Any], bool]] = {}


def _on_signal(loop: asyncio.AbstractEventLoop, number: int, kill: Callable[[], None]) -> None:
    stops = _stops[loop]
    waiting = [stop for stop, is_new in stops.items() if is_new]
    if not waiting:
        kill()
        os._exit(128 + number)
    log.info("%s: stopping", signal.Signals(number).name)
    for stop in waiting:
        stops[stop] = False
        stop()
