"""python-socketio's client, unmodified."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from karna_ws import WebSocketManager, serving
from support import DEADLINE_S, needs
from support_clients import PNG, notify


async def test_python_socketio_client_works_unmodified() -> None:
    needs("socketio", "aiohttp")
    import socketio

    responses: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    async with asyncio.timeout(DEADLINE_S), serving(WebSocketManager(), port=0) as server:
        client = socketio.AsyncClient(reconnection=False)

        # Broadcasts have their offset as a second argument, for clients that recover.
        def keep(answer: dict[str, Any], *offset: str) -> None:
            responses.put_nowait(answer)

        client.on("rpc_response", keep, namespace="/ws")
        await client.connect(
            f"http://127.0.0.1:{server.port}", namespaces=["/ws"], transports=["websocket"]
        )

        def command(line: str, **params: Any) -> dict[str, Any]:
            return {"method": "execute_command", "params": {"command": line, **params}}

        try:
            await client.emit("rpc", command("echo one"), namespace="/ws")
            assert (await responses.get())["data"] == {"command": "echo one", "result": "one"}
            ack = await client.call("rpc", command("echo two"), namespace="/ws")
            assert ack["data"] == {"command": "echo two", "result": "two"}
            described = await client.call("rpc", command("describe", image=PNG), namespace="/ws")
            assert described["data"]["result"]["width"] == 3
            await notify(server.port, "hello")
            assert (await responses.get())["data"]["message"] == "hello"
        finally:
            await client.disconnect()
        with pytest.raises(socketio.exceptions.ConnectionError, match="namespace"):
            await socketio.AsyncClient(reconnection=False).connect(
                f"http://127.0.0.1:{server.port}", namespaces=["/no"], transports=["websocket"]
            )


async def test_python_socketio_client_is_asked_and_keeps_the_arity_of_events() -> None:
    """An event that ends in a string has an ack id that nobody waits for: no argument more."""
    needs("socketio", "aiohttp")
    import socketio

    manager = WebSocketManager()
    told: asyncio.Queue[tuple[Any, ...]] = asyncio.Queue()
    async with asyncio.timeout(DEADLINE_S), serving(manager, port=0) as server:
        client = socketio.AsyncClient(reconnection=False)
        client.on("told", lambda *args: told.put_nowait(args), namespace="/ws")
        client.on("confirm", lambda question: question == "burn?", namespace="/ws")
        await client.connect(
            f"http://127.0.0.1:{server.port}", namespaces=["/ws"], transports=["websocket"]
        )
        try:
            (peer,) = manager.all_clients()
            for args in (("colour?",), (1,), (), ("a", "b")):
                await peer.emit("told", *args)
                assert await told.get() == args
            assert await peer.call("confirm", "burn?") is True
            assert await peer.call("confirm", "freeze?") is False
        finally:
            await client.disconnect()
