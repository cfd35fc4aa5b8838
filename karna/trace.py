"""What the log shows of clients: who came and went; at level debug each request and its answer.

Names and numbers alone, never what was said. Whoever calls `opened` or what follows it has looked
at `hub.traces` before, so that nothing is made for a level that is off. Imports log and text; used
by whoever has a client, a request or a socket.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from time import perf_counter
from typing import Any

from karna.log import log
from karna.text import one_line

MAX_NAME_CHARS = 60  # of a method and a command, which a client may have invented


def is_wanted() -> bool:
    """Is each request to be shown?"""
    return log.isEnabledFor(logging.DEBUG)


def came(client: Any) -> None:
    """A client was let in."""
    client.manager.log_gate.info(
        "clients that came", lambda: f"{client.connection.who} came: {_described(client)}"
    )


def went(client: Any, reason: str) -> None:
    """A client that was in has left."""
    name = client.connection.name
    client.manager.log_gate.info(
        "clients that went", lambda: f"{name} went: {_described(client)}: {reason}"
    )


def _described(client: Any) -> str:
    if client.door != "socket.io":
        return str(client.door)
    return f"socket.io {client.namespace}, {client.id}"


def opened(connection: Any) -> None:
    """A socket was accepted."""
    log.debug("%s connected", connection.who)


def closed(connection: Any) -> None:
    """A socket is closed."""
    log.debug("%s closed", connection.name)


def refused(connection: Any, code: str) -> None:
    """A Socket.IO client may not join; HTTP and the raw door say so by their response."""
    log.debug("%s refused: %s", connection.name, code)


def asked(request: Any, method: object, params: object) -> None:
    """A request has arrived."""
    name = method if isinstance(method, str) else "without a method"
    line = params.get("command") if isinstance(params, Mapping) else None
    if name == "execute_command" and isinstance(line, str):
        name += f" {line.lstrip()[:MAX_NAME_CHARS].partition(' ')[0]}"
    request.trace = one_line(name, MAX_NAME_CHARS), perf_counter()
    log.debug("%s > %s", request.client.connection.name, request.trace[0])


def answered(request: Any, outcome: str) -> None:
    """A request has its final answer: "ok", or the code of an error."""
    if request.trace is not None:
        (name, began), request.trace = request.trace, None
        took_ms, who = 1000 * (perf_counter() - began), request.client.connection.name
        log.debug("%s < %s: %s, %.1f ms", who, name, outcome, took_ms)


def responded(connection: Any, head: Any, status: int) -> None:
    """An HTTP request has its response. head: None where it could not be read."""
    what = "?" if head is None else one_line(f"{head.method} {head.path}", MAX_NAME_CHARS)
    log.debug("%s %s: %d", connection.name, what, status)
