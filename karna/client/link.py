"""A connection to the raw door that comes back by itself, and where it left off.

A Link dials, reads, and dials again with pauses that grow; what it reads goes to the client that
owns it. It knows of messages only whether they are envelopes, and their offsets.

Imports websockets and orjson, and of ours text alone. Used by client.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlencode, urlsplit, urlunsplit

from orjson import JSONDecodeError, dumps, loads
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as dial
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.frames import CloseCode

from karna.text import one_line

log = logging.getLogger("karna.client")

OPEN_TIMEOUT_S = 10.0  # for the handshake, and then for each message up to the first status
CLOSE_TIMEOUT_S = 2.0  # for the closing handshake
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0  # before a new try; the real one is random, from half up
STABLE_S = 5.0  # a connection that broke sooner counts as a failed try, so that pauses grow
MAX_MESSAGE_BYTES = 16 * 1024 * 1024  # results may be longer than what the server accepts
STATUS_ID = 0  # of the request that begins each connection; the client's own begin at 1

Message = dict[str, Any]


class ClientError(Exception):
    """Whatever the client raises for a request."""


class NotConnected(ClientError):
    """There is no connection; the request was not sent."""


class Refused(NotConnected):
    """The server does not let this client in; it will not be asked again."""


class Closed(NotConnected):
    """The client was closed by its own program."""


class BadMessage(ClientError):
    """The peer does not speak the protocol of the raw door; the connection is closed (1002)."""


# --- the wire ----------------------------------------------------------------------------------


def parse_url(url: str) -> str:
    """The raw door's URL: `http` means `ws`, and no path means /ws. Raises ValueError."""
    wrong = ValueError("the server's URL looks like ws://localhost:8000/ws")
    try:
        parts = urlsplit(url.strip())
        is_whole = bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none, brackets that don't match
        raise wrong from None
    scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
    if scheme not in ("ws", "wss") or not is_whole:
        raise wrong
    if "@" in parts.netloc:
        raise ValueError("the server's URL has no user and password; it takes a token")
    path = parts.path if parts.path.strip("/") else "/ws"
    return urlunsplit((scheme, parts.netloc, path, parts.query, ""))


def with_since(url: str, offset: str | None) -> str:
    """The URL that asks for the broadcasts after `offset`, if there is one."""
    if offset is None:
        return url
    return f"{url}{'&' if urlsplit(url).query else '?'}{urlencode({'since': offset})}"


def authorization(token: str | None) -> dict[str, str]:
    """The header that shows the token. Raises ValueError for one that no header can hold."""
    if not token:
        return {}
    if not (token.isascii() and token.isprintable()):
        raise ValueError("the token can't be sent: it must be printable ASCII")
    return {"Authorization": f"Bearer {token}"}


def decode_message(payload: bytes) -> Message:
    """One message of the server, with the fields that a client relies on. Raises BadMessage."""
    try:
        message = loads(payload)
    except JSONDecodeError:
        raise BadMessage("the server sent a message that is not JSON") from None
    if (
        type(message) is not dict
        or type(message.get("type")) is not str
        or "data" not in message
        or not isinstance(message.get("offset", ""), str)
        or type(message.get("id", 0)) not in (int, str)
    ):
        raise BadMessage("the server sent a message that is no envelope")
    # Without an id the type may be a program's own word, and its data anything.
    fields = _FIELDS.get(message["type"], {}) if "id" in message or is_call(message) else {}
    data = message["data"] if type(message["data"]) is dict else {}
    for name, kind in fields.items():
        if name not in data or not isinstance(data[name], kind):
            raise BadMessage(f"the server sent a message of type {message['type']} without {name}")
    return message


_FIELDS: dict[str, dict[str, type]] = {
    "error": {"code": str, "message": str},
    "command_progress": {"progress": object},
    "call": {"event": str, "args": list},
}


def is_call(message: Message) -> bool:
    """Does the server ask this client something?"""
    is_unasked = "id" not in message and "offset" not in message
    return is_unasked and message["type"] == "call" and "call" in message


def back_off() -> Iterator[float]:
    """Seconds to wait before each new try: they double, and half of each is random.

    After a restart of the server not all of its clients come at once.
    """
    pause = FIRST_PAUSE_S
    while True:
        yield pause * random.uniform(0.5, 1.0)
        pause = min(2 * pause, LONGEST_PAUSE_S)


# --- the link ----------------------------------------------------------------------------------


class Link:
    """One connection after the other, until it is closed or the server refuses it.

    receive: gets each message and the connection it came by.
    on_lost: a connection has ended, and why; whatever hangs on it fails now.
    on_end: there will be no other; `ended` says why.
    """

    def __init__(
        self, url: str, token: str | None, *,
        receive: Callable[[ClientConnection, Message], None],
        on_lost: Callable[[str], None], on_end: Callable[[], None],
    ) -> None:  # fmt: skip
        self._url = parse_url(url)
        self._headers = authorization(token)
        self._receive, self._on_lost, self._on_end = receive, on_lost, on_end
        self._offset: str | None = None
        self.connection: ClientConnection | None = None  # while requests can be sent
        self.ended: ClientError | None = None
        self._changed = asyncio.Event()  # set while there is a connection, or will be none
        self._task: asyncio.Task[None] | None = None

    @property
    def place(self) -> str:
        """The server, for people: without the query, which may hold a token."""
        return self._url.partition("?")[0]

    async def open(self) -> None:
        """Connect: one try. Raises Refused, NotConnected."""
        if self._task is not None or self.ended is not None:
            raise RuntimeError("a client is entered once; connect() makes a new one")
        connection = await self._come_in()
        self._task = asyncio.create_task(self._stay_connected(connection))
        self._use(connection)

    async def connected(self, wait_s: float) -> ClientConnection:
        """The connection, as soon as there is one. Raises NotConnected when that takes too long."""
        if self._task is None and self.ended is None:
            raise NotConnected("the client is not connected: use `async with connect(...)`")
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while self.connection is None and self.ended is None:
                    await self._changed.wait()
        self.check()
        if self.connection is None:
            raise NotConnected(f"no connection to {self.place} for {wait_s:g} s")
        return self.connection

    def check(self) -> None:
        """Raise why there will be no connection any more, if so: each time a new exception."""
        if self.ended is not None:
            raise type(self.ended)(*self.ended.args)

    async def close(self) -> None:
        """End the connection for good, with a closing handshake if there is time for one."""
        connection = self.connection
        self._disconnected("the client was closed")
        self._end(Closed("the client is closed"))
        try:
            if self._task is not None:
                self._task.cancel()
                await asyncio.wait([self._task])
            if connection is not None:  # open still if the task had not begun
                await connection.close()
        except asyncio.CancelledError:
            if connection is not None:
                connection.transport.abort()
            raise

    # Coming in.

    async def _come_in(self) -> ClientConnection:
        """One try to connect, and to take what was missed. Raises Refused, NotConnected.

        It begins with a request for the status. Its answer follows the replay, shows that a
        `connect` handler has let us in, and has the offset to come back with next time.
        """
        connection = await self._dial()
        try:
            request = {"method": "get_status", "params": {}, "id": STATUS_ID}
            await connection.send(dumps(request), text=True)
            is_in = False
            while not is_in:
                async with asyncio.timeout(OPEN_TIMEOUT_S):
                    message = await self._next(connection)
                is_in = message.get("id") == STATUS_ID and message["type"] != "command_progress"
        except BaseException as error:
            connection.transport.abort()
            self._on_lost("the connection did not come about")  # calls of the server may run
            if isinstance(error, ConnectionClosed):
                raise end_of(error) from None
            if isinstance(error, TimeoutError):
                raise NotConnected(f"{self.place} does not answer") from None
            if isinstance(error, BadMessage):
                raise NotConnected(f"{self.place} is no such server: {error}") from None
            raise
        return connection

    async def _dial(self) -> ClientConnection:
        try:
            return await dial(
                with_since(self._url, self._offset), additional_headers=self._headers,
                compression=None, max_size=MAX_MESSAGE_BYTES,
                open_timeout=OPEN_TIMEOUT_S, close_timeout=CLOSE_TIMEOUT_S,
            )  # fmt: skip
        except InvalidStatus as error:
            kind = Refused if error.response.status_code in (401, 403) else NotConnected
            raise kind(f"{self.place} answers {_refusal(error)}") from None
        # ValueError: a host that can't be looked up.
        except (OSError, WebSocketException, ValueError) as error:
            reason = one_line(str(error)) or type(error).__name__
            raise NotConnected(f"cannot connect to {self.place}: {reason}") from None

    async def _next(self, connection: ClientConnection) -> Message:
        """The next message, which the client has got when this returns."""
        message = decode_message(await connection.recv(decode=False))
        self._offset = message.get("offset", self._offset)
        self._receive(connection, message)
        return message

    # Staying.

    async def _stay_connected(self, connection: ClientConnection) -> None:
        """The link's own task: read, and come back whenever the connection ends."""
        clock = asyncio.get_running_loop().time
        pauses = back_off()
        try:
            while True:
                opened = clock()
                log.info("%s", await self._read(connection))
                if clock() - opened >= STABLE_S:
                    pauses = back_off()
                connection = await self._come_back(pauses)
                self._use(connection)
        except Refused as error:
            self._end(error)
        except Exception:
            log.exception("the client has failed")
            self._end(NotConnected("the client has failed; its log tells why"))

    async def _read(self, connection: ClientConnection) -> str:
        """Take messages until the connection ends; why it did. Raises Refused if for good."""
        code, error = CloseCode.NORMAL_CLOSURE, ClientError("the client has failed")
        try:
            while True:
                await self._next(connection)
        except ConnectionClosed as closed:
            error = end_of(closed)
        except BadMessage as bad:
            code, error = CloseCode.PROTOCOL_ERROR, bad
        finally:
            self._disconnected(str(error))
            await connection.close(code)
        if isinstance(error, Refused):
            raise error
        return str(error)

    async def _come_back(self, pauses: Iterator[float]) -> ClientConnection:
        """Try until there is a connection. Raises Refused."""
        while True:
            pause = next(pauses)
            log.info("connecting again in %.1f s", pause)
            await asyncio.sleep(pause)
            try:
                connection = await self._come_in()
                log.info("connected again")
                return connection
            except Refused:
                raise
            except NotConnected as error:
                log.info("%s", error)

    def _use(self, connection: ClientConnection) -> None:
        """Requests can be sent now."""
        self.connection = connection
        self._changed.set()

    def _disconnected(self, reason: str) -> None:
        """What was sent fails at once; what comes now waits for the next connection."""
        if self.connection is not None:
            self.connection = None
            self._changed.clear()
            self._on_lost(reason)

    def _end(self, error: ClientError) -> None:
        if self.ended is None:
            self.ended = error
            self._changed.set()
            self._on_end()


def _refusal(error: InvalidStatus) -> str:
    """The status of a refused handshake, and the message of the server's error envelope."""
    message: Any = error.response.reason_phrase
    with suppress(JSONDecodeError, LookupError, TypeError):
        message = loads(error.response.body or b"")["data"]["message"]
    return f"{error.response.status_code}: {one_line(str(message))}"


def end_of(closed: ConnectionClosed) -> ClientError:
    """The end of a connection: for good if the server's policy is against this client."""
    frame = closed.rcvd or closed.sent
    code, reason = (1006, "") if frame is None else (frame.code, one_line(frame.reason))
    is_final = closed.rcvd is not None and code == CloseCode.POLICY_VIOLATION
    text = f"the connection ended ({code}{' ' if reason else ''}{reason})"
    return (Refused if is_final else NotConnected)(text)
