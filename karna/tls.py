"""A socket in its TLS handshake: counted, bounded in time, and owned like any other.

asyncio's own TLS server would tell us of a connection only once its handshake is over. So the
listener accepts plain TCP, and this is what it hands a socket to first. Touches the hub; used by
the listener.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import cast

from karna.config import Config
from karna.connection import Connection
from karna.door import NEVER
from karna.errors import StartError
from karna.hub import Hub
from karna.text import one_line
from karna.sender import peer_address

MAX_EARLY_BYTES = 64 * 1024  # that arrive with the handshake's last packet; asyncio reads no more


def entrances(config: Config, create: Callable[[], Connection]) -> Callable[[], TlsEntrance]:
    """What makes the protocol of an accepted socket. Raises StartError for a bad certificate."""
    context = make_tls_context(config)

    return lambda: TlsEntrance(create(), context)


def make_tls_context(config: Config) -> ssl.SSLContext:
    """The TLS context of --certfile and --keyfile. Raises StartError."""
    certfile = cast(str, config.certfile)
    keyfile = config.keyfile or certfile
    _look_into(certfile, "--certfile", b"CERTIFICATE", "certificate")
    flag, what = "--keyfile", "private key"
    if not config.keyfile:
        flag, what = "--certfile", "private key: name its file with --keyfile"
    _look_into(keyfile, flag, b"PRIVATE KEY", what)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certfile, keyfile, _passphrase)
    except (OSError, ValueError) as error:
        known = (text for sign, text in _REASONS.items() if sign in str(error))
        reason = next(known, f"OpenSSL says {one_line(str(error))}")
        raise StartError(f"can't use the TLS certificate {certfile}: {reason}") from None
    return context


_REASONS = {
    "KEY_VALUES_MISMATCH": "the private key is another certificate's (--keyfile)",
    "EE_KEY_TOO_SMALL": "its key is too short to be safe: 2048 bits or more",
    "CA_MD_TOO_WEAK": "its signature is too weak to be safe: SHA-256 or more",
    "PEM lib": "it, or its key, is damaged",
    "passphrase": "its key wants a passphrase: `openssl pkey -in KEY -out PLAIN` takes it away",
}


def _passphrase() -> str:
    raise ValueError("passphrase")  # else OpenSSL would ask for it at the terminal


def _look_into(path: str, flag: str, mark: bytes, what: str) -> None:
    """Does a PEM file hold what it should? OpenSSL tells neither that nor whose fault it is."""
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise StartError(f"can't read {flag} {path}: {error.strerror}") from None
    if b"-----BEGIN " not in content:
        raise StartError(f"{flag} {path} is no PEM file (its text begins with -----BEGIN)")
    if mark + b"-----" not in content:
        raise StartError(f"{flag} {path} holds no {what}")


class TlsEntrance(asyncio.Protocol):
    """One socket until its handshake is over; then its connection takes it."""

    is_dispensable = True
    deadline = NEVER  # asyncio has one of its own

    def __init__(self, connection: Connection, context: ssl.SSLContext) -> None:
        self.hub: Hub = connection.hub
        self._connection = connection
        self._context = context
        self._early = b""
        self._has_ended = False

    @property
    def who(self) -> str:
        """As logs name it."""
        return f"{self._connection.name} {peer_address(self.transport)}"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.pause_reading()  # what arrives belongs to the handshake
        self.hub.adopt(self)
        self.hub.entering.spawn(self._shake_hands(), "TLS handshake")

    def data_received(self, data: bytes) -> None:
        self._early += data
        if len(self._early) > MAX_EARLY_BYTES:
            self.abort()

    def eof_received(self) -> None:
        self._has_ended = True

    def on_deadline(self, now: float) -> None:
        """Never: see `deadline`."""

    def abort(self) -> None:
        """Cut the connection."""
        self.transport.abort()

    def _hand_over(self, early: bytes) -> None:
        """Give what has arrived to asyncio's TLS, which has taken our place by now."""
        protocol = cast(asyncio.BufferedProtocol, self.transport.get_protocol())
        while early:
            buffer = cast(memoryview, protocol.get_buffer(len(early)))
            size = min(len(buffer), len(early))
            buffer[:size], early = early[:size], early[size:]
            protocol.buffer_updated(size)

    async def _shake_hands(self) -> None:
        loop, timeout_s = asyncio.get_running_loop(), self.hub.config.open_timeout_s
        if self._early:  # uvloop reads on in spite of the pause
            loop.call_soon(self._hand_over, self._early)  # before the handshake begins
            self._early = b""
        try:
            transport = await loop.start_tls(
                self.transport, self, self._context, server_side=True,
                ssl_handshake_timeout=timeout_s,
            )  # fmt: skip
        except OSError:  # no TLS, an old version, too slow, gone
            self.hub.metrics.refusals["TLS"] += 1
            return self.transport.abort()
        except BaseException:  # cancelled: the server ends
            self.transport.abort()
            raise
        finally:
            self.hub.release(self)
        if transport is None or transport.is_closing() or self._has_ended:
            return self.transport.abort()
        transport.set_protocol(self._connection)
        self._connection.connection_made(transport)
        if self._early:
            self._connection.data_received(self._early)
