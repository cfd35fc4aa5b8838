"""Every option with its default, flag, unit, bounds and reason.

`serve()`, the command line with its `--help`, and the `KARNA_*` variables are all made from this
one table. Imports nothing of ours; used by whoever needs an option.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict

from karna.packets import MAX_NAMESPACE_BYTES

MIB = 1024 * 1024


def _option(
    group: str, default: Any, help: str, metavar: str | None = None, low: float = 0,
    *, flag: str | None = None, secret: bool = False,
) -> Any:  # fmt: skip
    """A field of Config with what the command line needs to know of it."""
    metadata = {"help": help, "group": group, "flag": flag, "metavar": metavar, "low": low}
    return field(default=default, metadata=metadata, repr=not secret)


_where, _who, _limit, _heartbeat, _recovery, _run = (
    functools.partial(_option, group)
    for group in ("where", "who", "limits", "heartbeat", "recovery", "run")
)


@dataclass(frozen=True, eq=False)
class Config:
    """The options of `serve()`, of the command line and of the environment.

    Raises ValueError, in one line that names the option, for a value that can't be used.
    """

    # fmt: off
    host: str = _where("127.0.0.1", "address to listen on", "ADDRESS")
    port: int = _where(8000, "TCP port; 0 picks a free one")
    unix: str | None = _where(None, "listen on a Unix socket instead of TCP", "PATH")
    certfile: str | None = _where(
        None, "TLS certificate chain (PEM); makes it https and wss", "PATH")
    keyfile: str | None = _where(
        None, "TLS private key (PEM), if not in the certificate's file", "PATH")
    reuse_port: bool = _where(False, "let several processes share the port")

    token: str | None = _who(None, "secret that every client must present", "TOKEN", secret=True)
    allow_origin: tuple[str, ...] = _who(
        (), "origin of web pages that may connect, such as https://app.example", "ORIGIN")
    allow_host: tuple[str, ...] = _who(
        (), "host name this server is reached by, such as karna.example", "NAME")
    trust_proxy: tuple[str, ...] = _who(
        (), "address of a reverse proxy whose X-Forwarded-For names clients in the log",
        "ADDRESS")
    insecure_no_token: bool = _who(
        False, "listen beyond this machine without a token: anyone who reaches it may command it")

    max_clients: int = _limit(1000, "clients connected at a time", "N", 1)
    max_message_bytes: int = _limit(
        MIB, "longest WebSocket message", "BYTES", 128, flag="max-message")
    max_body_bytes: int = _limit(MIB, "longest HTTP body", "BYTES", 2, flag="max-body")
    max_running_commands: int = _limit(
        32, "commands of one client that run at a time; more wait", "N", 1)
    max_unsent_bytes: int = _limit(
        MIB, "bytes a slow client may leave unread before it is dropped", "BYTES", 1024,
        flag="max-unsent")
    command_timeout_s: float = _limit(60.0, "longest a command may run", "SECONDS", 0.001)
    open_timeout_s: float = _limit(
        10.0, "longest a handshake or an HTTP request may take to arrive", "SECONDS", 0.001)
    close_timeout_s: float = _limit(
        10.0, "longest to wait for a peer to close", "SECONDS", 0.001)
    grace_s: float = _limit(
        5.0, "longest running commands may go on at shutdown", "SECONDS")

    ping_interval_s: float | None = _heartbeat(
        None, "seconds between heartbeats (default: raw door 20, Socket.IO door 25)", "SECONDS",
        0.01)
    ping_timeout_s: float = _heartbeat(
        20.0, "silence after a heartbeat that drops a client", "SECONDS", 0.01)
    connect_timeout_s: float = _heartbeat(
        45.0, "longest a Socket.IO client may take to join a namespace", "SECONDS", 0.01)
    namespaces: tuple[str, ...] = _heartbeat(
        (), "Socket.IO namespace to serve besides /, /ws and /ws/", "NAME", flag="namespace")

    history_messages: int = _recovery(
        1000, "broadcasts kept for clients that reconnect; 0 turns it off", "N")
    history_bytes: int = _recovery(4 * MIB, "bytes of broadcasts kept for them", "BYTES")
    recovery: bool = _recovery(
        True, "no Socket.IO connection state recovery (as KARNA_RECOVERY=0)")
    backplane: str | None = _recovery(
        None, "share broadcasts with other processes, such as redis://host:6379", "URL",
        secret=True)
    loop: str = _run("auto", "event loop: auto (uvloop if installed), asyncio or uvloop", "NAME")
    # fmt: on

    def __post_init__(self) -> None:
        for option in fields(self):
            self._check(option.name, str(option.type), option.metadata["low"])
        if self.loop not in ("auto", "asyncio", "uvloop"):
            raise ValueError(f"loop must be auto, asyncio or uvloop, not {self.loop!r}")
        if self.port > 65535:
            raise ValueError(f"port must be 65535 at most, not {self.port}")
        if self.keyfile and not self.certfile:
            raise ValueError("keyfile needs certfile")
        if self.token is not None and not re.fullmatch(_TOKEN, self.token):
            # Of anything else the clients' HTTP libraries make different bytes.
            raise ValueError("token must be printable ASCII, without blanks around it")
        for origin in self.allow_origin:
            if not re.fullmatch(ORIGIN, origin):
                raise ValueError(
                    f"allow_origin must look like https://app.example, without a path: {origin!r}"
                )
        for name in self.allow_host:
            if not re.fullmatch(_HOST_NAME, name):
                raise ValueError(
                    f"allow_host must be a name such as karna.example, without a port: {name!r}"
                )
        for name in self.namespaces:
            if not name.startswith("/") or "," in name or len(name) > MAX_NAMESPACE_BYTES:
                raise ValueError(f"namespaces must start with / and hold no comma: {name!r}")

    def _check(self, name: str, declared: str, low: float) -> None:
        value = getattr(self, name)
        kinds, words = _OPTION_KINDS[declared.removesuffix(" | None")]
        if value is None and declared.endswith(" | None"):
            return
        is_kind = isinstance(value, kinds) and isinstance(value, bool) == (declared == "bool")
        items = value if isinstance(value, tuple) else ()
        if not is_kind or not all(isinstance(item, str) for item in items):
            raise ValueError(f"{name} must be {words}, not {type(value).__name__}")
        if isinstance(value, int | float) and not (math.isfinite(value) and value >= low):
            raise ValueError(f"{name} must be {low:g} or more, not {value}")

    @property
    def raw_ping_interval_s(self) -> float:
        """Seconds between WebSocket pings: 20, as the websockets library."""
        return 20.0 if self.ping_interval_s is None else self.ping_interval_s

    @property
    def engine_ping_interval_s(self) -> float:
        """Seconds between Engine.IO pings: 25, as socket.io."""
        return 25.0 if self.ping_interval_s is None else self.ping_interval_s


class Options(TypedDict, total=False):
    """The keyword options of `serve()` and `serving()`: those of Config, for editors and mypy."""

    host: str
    port: int
    unix: str | os.PathLike[str] | None
    certfile: str | os.PathLike[str] | None
    keyfile: str | os.PathLike[str] | None
    reuse_port: bool
    token: str | None
    allow_origin: str | Iterable[str] | None
    allow_host: str | Iterable[str] | None
    trust_proxy: str | Iterable[str] | None
    insecure_no_token: bool
    max_clients: int
    max_message_bytes: int
    max_body_bytes: int
    max_running_commands: int
    max_unsent_bytes: int
    command_timeout_s: float
    open_timeout_s: float
    close_timeout_s: float
    grace_s: float
    ping_interval_s: float | None
    ping_timeout_s: float
    connect_timeout_s: float
    namespaces: str | Iterable[str] | None
    history_messages: int
    history_bytes: int
    recovery: bool
    backplane: str | None
    loop: str


# Patterns that a start does not need are compiled with their first use.
_HOST_NAME = r"[A-Za-z0-9._-]+"
ORIGIN = r"(?i)[a-z][a-z0-9+.-]*://(?:(?![/?#])[!-~])+"
_TOKEN = r"[!-~](?:[ -~]*[!-~])?"
_OPTION_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "bool": ((bool,), "True or False"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "str": ((str, os.PathLike), "a text"),
    "tuple[str, ...]": ((tuple,), "a text or a list of texts"),
}


def make_config(options: Mapping[str, Any]) -> Config:
    """Config from keyword options. Raises TypeError or ValueError that names the option."""
    values = dict(options)
    known = [option.name for option in fields(Config)]
    for name in sorted(values.keys() - set(known)):
        raise TypeError(f"there is no option {name!r}{_suggestion(name, known)}")
    for name in values.keys() & {"allow_origin", "allow_host", "trust_proxy", "namespaces"}:
        given = values[name] or ()
        given = (given,) if isinstance(given, str) else given
        values[name] = tuple(given) if isinstance(given, Iterable) else given
    return Config(**values)


def _suggestion(name: str, known: Sequence[str]) -> str:
    """Which option is meant: flags have names that are near enough, too."""
    from difflib import get_close_matches  # with the first mistake

    word = name.lower().replace("-", "_").strip("_").removeprefix("no_")
    near = get_close_matches(word, known, 1, 0.7)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
