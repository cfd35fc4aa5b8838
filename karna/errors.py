"""One tree of errors: whose fault it is, the code that says so, the HTTP status that fits.

A request that can't be answered as asked is answered with a RequestError: what is wrong with it,
with a command, or with a service. A peer that breaks a wire format raises BadPacket, and its
session ends. A server that can't start raises StartError, exit code 2. Anything else is a bug,
ours or the program's: it is logged with its traceback and answered without one.

Imports nothing of ours; every room may use it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

MAX_ERROR_CHARS = 1_000  # of an exception's text in an answer

# What a program's code may raise on the loop, and must not end other clients or the process. A
# KeyboardInterrupt is not its doing.
FAULTS = (Exception, asyncio.CancelledError, SystemExit)

HTTP_STATUS = {
    "invalid_json": 400, "invalid_request": 400, "invalid_params": 400, "usage": 400,
    "unauthorized": 401, "forbidden": 403, "unknown_method": 404, "unknown_command": 404,
    "cancelled": 409, "too_large": 413, "command_failed": 500, "internal_error": 500,
    "unavailable": 503, "timeout": 504,
}  # fmt: skip


class RequestError(Exception):
    """What a request is answered with in place of a result.

    code: for programs; the message is for people. data: further fields of the answer.
    status: where the answer is an HTTP response (the code's own by default); headers go with it,
    and `body`, if it has one, takes the place of the envelope.
    """

    code: str = "internal_error"
    body: bytes | None = None

    def __init__(
        self, message: str, *, code: str | None = None, status: int | None = None,
        headers: Mapping[str, str] | None = None, **data: Any,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.code = code or self.code
        self.status = HTTP_STATUS.get(self.code, 500) if status is None else status
        self.headers = dict(headers or {})
        self.data = data


class InvalidRequest(RequestError):
    """The request has a wrong form."""

    code = "invalid_request"


class InvalidParams(RequestError):
    """The method exists, but not with these params."""

    code = "invalid_params"


class Forbidden(RequestError):
    """The request may not come in from where it comes."""

    code = "forbidden"


class UnknownCommand(RequestError):
    """No command has this name; data["suggestions"] lists near names."""

    code = "unknown_command"


class UsageError(RequestError):
    """The caller's arguments are wrong; data["usage"] is the usage line."""

    code = "usage"


class CommandFailed(RequestError):
    """The handler raised, or cannot do what was asked."""

    code = "command_failed"


class CommandTimeout(RequestError):
    """The command ran into its time limit."""

    code = "timeout"


class Cancelled(RequestError):
    """The command was cancelled by who asked for it."""

    code = "cancelled"


class Unavailable(RequestError):
    """A service, a model server or a program is not there now; later it may be."""

    code = "unavailable"


class ClientLeft(ConnectionError):
    """A client that something was to be sent to, or asked, has left."""


class ClientSilent(TimeoutError):
    """A client has not answered what it was asked."""


# What a program's code may let out without a bug of anybody's.
NO_BUGS = (RequestError, ClientLeft, ClientSilent)


class BadPacket(Exception):
    """The peer broke the Socket.IO or Engine.IO protocol; the caller closes the session."""


class StartError(Exception):
    """The server can't start; the message is one line that names the mend."""


def explain(error: BaseException) -> str:
    """An exception's text, or its type's name when it has none (or cannot tell)."""
    try:
        text = str(error)[:MAX_ERROR_CHARS]
    except BaseException:  # whatever its __str__ does; it is a program's, like the error itself
        text = ""
    return text or type(error).__name__


def name_stray(error: InvalidParams, message: Mapping[str, Any], names: Any) -> InvalidParams:
    """The error, with a word about a parameter (one of `names`) that stands beside `params`."""
    stray = next((name for name in names or () if name in message and name != "id"), None)
    if stray is None:
        return error
    return InvalidParams(f'{error}; "{stray}" stands outside "params"', **error.data)


def as_request_error(error: BaseException) -> RequestError:
    """Whatever a program's code raised, as what its caller is told."""
    return error if isinstance(error, RequestError) else CommandFailed(explain(error))
