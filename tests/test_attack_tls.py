"""A TLS handshake, however fast its first word comes."""

from __future__ import annotations

import asyncio
import importlib
import socket
import ssl
import time
from pathlib import Path

import pytest

from karna_ws import WebSocketManager, serving
from support import needs
from support_peers import head
from test_listen import make_certificate


def ask_at_once(port: int) -> bytes:
    """GET /health; the first word is sent as soon as the connection is there."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls, answer = context.wrap_bio(incoming, outgoing), b""
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    with socket.create_connection(("127.0.0.1", port), timeout=5.0) as peer:
        peer.sendall(outgoing.read())
        while b"healthy" not in answer:
            incoming.write(peer.recv(65536))
            try:
                tls.do_handshake()
                if not answer:
                    tls.write(head("GET", "/health"))
                    peer.sendall(outgoing.read())
                    answer = b"."
                answer += tls.read(65536)
            except ssl.SSLWantReadError:
                pass
    return answer


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_hello_that_comes_with_its_connection_is_heard(loop: str, tmp_path: Path) -> None:
    """uvloop reads a socket that was paused as it was made: the hello was lost, and waited for."""
    if loop == "uvloop":
        needs("uvloop")
    certificate, key = make_certificate(tmp_path)

    async def ask() -> bytes:
        options = {"certfile": certificate, "keyfile": key}
        async with serving(WebSocketManager(), port=0, **options) as server:
            asking = asyncio.create_task(asyncio.to_thread(ask_at_once, server.port))
            await asyncio.sleep(0)  # it has begun
            time.sleep(0.2)  # noqa: ASYNC251 - the loop stands still, and both are there then
            return await asking

    with asyncio.Runner(loop_factory=importlib.import_module(loop).new_event_loop) as runner:
        assert b"200 OK" in runner.run(ask())
