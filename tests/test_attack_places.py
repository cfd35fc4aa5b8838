"""Places: who was let in keeps one, and nobody holds a socket that he was not let in for."""

from __future__ import annotations

import contextlib

import pytest

from support import served
from support_peers import TOKEN, Peer, ask, dial, frame, head, upgrade

PENDING = 128  # hub.PENDING_CONNECTIONS


@pytest.mark.parametrize("start", [
    head("GET", "/health", {"Content-Length": 9000}),
    head("GET", "/", {"Transfer-Encoding": "chunked"}) + b"1\r\nx\r\n",
    head("OPTIONS", "/rpc", {"Content-Length": 9000}),
], ids=["length", "chunked", "preflight"])  # fmt: skip
async def test_bodies_that_never_end_give_way_to_newcomers(start: bytes) -> None:
    """Without a token they held all sockets for as long as a request may take to arrive."""
    async with (
        served(token=TOKEN, max_clients=2, open_timeout_s=60.0) as server,
        contextlib.AsyncExitStack() as stack,
    ):
        for _ in range(PENDING + 4):
            await (await stack.enter_async_context(dial(server.port))).send(start)
        assert (await ask(server.port, head("GET", "/health"))).status == 200


async def test_sockets_that_never_end_their_closing_give_way_to_newcomers() -> None:
    """Neither seated nor pending, they held all sockets for the close timeout."""
    async with (
        served(max_clients=2, close_timeout_s=60.0) as server,
        contextlib.AsyncExitStack() as stack,
    ):
        for _ in range(PENDING + 4):
            peer: Peer = await stack.enter_async_context(dial(server.port))
            await peer.send(upgrade())
            assert (await peer.answer()).status == 101
            await peer.send(frame(8))
            assert (await peer.frame()).opcode == 8
        assert (await ask(server.port, head("GET", "/health"))).status == 200
