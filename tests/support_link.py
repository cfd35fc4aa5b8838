"""The Python client's other side: a peer that says what the test wants, and a client that is quick.

A real server is better wherever it can be made to do what the test needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from karna.client import Broadcasts, Client, connect
from karna_ws import Server

HELLO = {"type": "status_update", "data": {}, "id": 0, "offset": "1-0"}  # answers its first request


def join(port: int | Server, **options: Any) -> Client:
    """A client of a server on this machine; no token unless the test gives one."""
    number = port.port if isinstance(port, Server) else port
    return connect(f"ws://127.0.0.1:{number}/ws", **{"token": "", **options})


@contextlib.asynccontextmanager
async def hurried(
    *, first_s: float = 0.002, longest_s: float = 0.02, **limits: float
) -> AsyncIterator[None]:
    """Pauses between tries at 1/250 of their length, or less; other limits of link by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("karna.client.link.FIRST_PAUSE_S", first_s)
        patch.setattr("karna.client.link.LONGEST_PAUSE_S", longest_s)
        for name, value in limits.items():
            patch.setattr(f"karna.client.link.{name}", value)
        yield


class Peer:
    """One connection as the peer sees it."""

    def __init__(self, connection: ServerConnection, number: int) -> None:
        self.connection = connection
        self.number = number  # 0 for the first of the test
        self.kept: list[Any] = []
        self.path = connection.request.path if connection.request is not None else ""

    async def next(self, method: str | None = None) -> Any:
        """The client's next message, or its next of this method; those passed over are kept."""
        for place, message in enumerate(self.kept):
            if method in (None, message["method"]):
                return self.kept.pop(place)
        while method not in (None, (message := json.loads(await self.connection.recv()))["method"]):
            self.kept.append(message)
        return message

    async def send(self, *messages: Any) -> None:
        """Send messages: str and bytes as they are, all else as JSON."""
        for message in messages:
            is_plain = isinstance(message, str | bytes)
            await self.connection.send(message if is_plain else json.dumps(message))

    async def welcome(self) -> None:
        """Answer the request that begins each connection."""
        assert (await self.next())["method"] == "get_status"
        await self.send(HELLO)

    async def answer(self, data: Any, type: str = "command_response") -> Any:
        """Answer the client's next request; the request."""
        request = await self.next()
        await self.send({"type": type, "data": data, "id": request["id"]})
        return request

    async def close(self, code: int = 1000, reason: str = "") -> None:
        await self.connection.close(code, reason)

    async def closed(self) -> int | None:
        """Wait until the client closes; its code. What it sends until then is dropped."""
        with contextlib.suppress(ConnectionClosed):
            while True:
                await self.connection.recv()
        return self.connection.close_code


@contextlib.asynccontextmanager
async def scripted(script: Callable[[Peer], Awaitable[None]]) -> AsyncIterator[int]:
    """A server that runs the script for each connection; its port. A script's error is raised."""
    errors: list[BaseException] = []
    number = 0

    async def handle(connection: ServerConnection) -> None:
        nonlocal number
        peer, number = Peer(connection, number), number + 1
        try:
            await script(peer)
        except ConnectionClosed:
            pass  # the client has left
        except BaseException as error:
            errors.append(error)
            raise

    async with serve(handle, "127.0.0.1", 0) as server:
        yield next(iter(server.sockets)).getsockname()[1]
    for error in errors:
        if not isinstance(error, asyncio.CancelledError):
            raise error


async def take(stream: Broadcasts, count: int) -> list[Any]:
    """The data of the next broadcasts."""
    return [(await anext(stream)).data for _ in range(count)]
