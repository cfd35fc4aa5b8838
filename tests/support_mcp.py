"""Messages of the Model Context Protocol as bytes, and what answers them."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Any

from karna.mcp import CAPABILITIES_KEY, MODERN, VERSION_KEY
from karna_ws import Server, WebSocketManager
from services import Context
from support import Gate
from support_peers import Answer, Headers, Peer, ask, post

ACCEPT = {"Accept": "application/json, text/event-stream"}
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJg"
    "gg=="
)
ELICITS: dict[str, Any] = {"elicitation": {}}


def message(method: str, params: dict[str, Any] | None = None, id: Any = 1) -> dict[str, Any]:
    """A request, or a notification where the id is None."""
    found: dict[str, Any] = {"jsonrpc": "2.0", "method": method}
    found |= {} if params is None else {"params": params}
    return found if id is None else {**found, "id": id}


def modern(
    method: str, params: dict[str, Any] | None = None, id: Any = 1,
    capabilities: dict[str, Any] | None = None, **meta: Any,
) -> dict[str, Any]:  # fmt: skip
    """A request of the modern era, whose `_meta` is whole."""
    whole = {VERSION_KEY: MODERN, CAPABILITIES_KEY: capabilities or {}, **meta}
    return message(method, {**(params or {}), "_meta": whole}, id)


def call(name: str, arguments: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """A tools/call of the modern era."""
    further = options.pop("params", {})
    return modern("tools/call", {"name": name, "arguments": arguments or {}, **further}, **options)


def mirrored(request: Any) -> Headers:
    """The headers that a modern request must have."""
    headers = {**ACCEPT, "MCP-Protocol-Version": MODERN, "Mcp-Method": request["method"]}
    name = request.get("params", {}).get("name")
    return headers if name is None else {**headers, "Mcp-Name": name}


def posted(request: Any, headers: Headers | None = None) -> bytes:
    """A modern request as bytes."""
    return post("/mcp", request, {**mirrored(request), **(headers or {})})


async def send(server: Server, request: Any, headers: Headers | None = None) -> Answer:
    """Send a modern request; its answer."""
    return await ask(server.port, posted(request, headers))


async def send_legacy(server: Server, request: Any, headers: Headers | None = None) -> Answer:
    """Send a message of the legacy era; its answer."""
    return await ask(server.port, post("/mcp", request, {**ACCEPT, **(headers or {})}))


async def open_session(server: Server, version: str = "2025-11-25") -> Headers:
    """Initialize in the legacy era; the headers that later requests have."""
    params = {"protocolVersion": version, "capabilities": {}, "clientInfo": {"name": "t"}}
    answer = await send_legacy(server, message("initialize", params))
    session = answer.headers["mcp-session-id"]
    headers = {"Mcp-Session-Id": session, "MCP-Protocol-Version": version}
    done = await send_legacy(server, message("notifications/initialized", id=None), headers)
    assert (done.status, done.body) == (202, b"")
    return headers


async def result_of(server: Server, request: Any, headers: Headers | None = None) -> Any:
    """Send a modern request; its result."""
    answer = await send(server, request, headers)
    assert answer.status == 200, answer
    return answer.json["result"]


async def error_of(answer: Answer) -> tuple[int, int]:
    """HTTP status and error code of a refusal."""
    assert answer.json["jsonrpc"] == "2.0" and answer.json["error"]["message"]
    return answer.status, answer.json["error"]["code"]


async def begin_stream(peer: Peer) -> dict[str, str]:
    """Read the head of an answer that is a stream of events; its headers."""
    lines = (await peer.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    assert lines[0] == "HTTP/1.1 200 OK", lines
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
    assert headers["content-type"] == "text/event-stream"
    assert headers["x-accel-buffering"] == "no"
    return headers


async def chunk(peer: Peer) -> bytes:
    """The next chunk; empty at the end of the stream."""
    size = int(await peer.reader.readuntil(b"\r\n"), 16)
    data = await peer.reader.readexactly(size + 2)
    assert data[-2:] == b"\r\n"
    return data[:-2]


async def event(peer: Peer) -> Any:
    """The next event's message; comments are passed over, None is the end."""
    while (data := await chunk(peer)) == b":\n\n":
        pass
    if not data:
        return None
    assert data.startswith(b"event: message\ndata: ") and data.endswith(b"\n\n")
    return json.loads(data[len(b"event: message\ndata: ") :])


async def events(peer: Peer) -> list[Any]:
    """All messages of a stream, to its end."""
    found = []
    while (each := await event(peer)) is not None:
        found.append(each)
    return found


def tool_manager() -> tuple[WebSocketManager, Gate]:
    """A manager with a tool of every kind."""
    manager = WebSocketManager()
    gate = Gate(manager)

    @manager.commands.command(inline=True, read_only=True)
    def add(a: int, b: int = 1) -> int:
        """Add two numbers."""
        return a + b

    @manager.commands.command
    async def steps(count: int, size: int = 0) -> AsyncIterator[Any]:
        for number in range(count):
            yield {"percent": 100 * number // count, "message": f"step {number}" + "x" * size}
        yield {"count": count}

    @manager.commands.command
    async def flood(context: Context, size: int) -> str:
        while True:
            await context.progress("x" * size)

    @manager.commands.command
    async def burst(context: Context, count: int, size: int) -> None:
        await asyncio.gather(*[context.progress("x" * size) for _ in range(count)])

    @manager.commands.command
    async def give(what: str) -> Any:
        values = {
            "text": "plain", "object": {"a": [1]}, "list": [1, 2], "none": None, "png": PNG,
            "url": "data:image/png;base64," + base64.b64encode(PNG).decode(),
            "mixed": {"name": "dot", "image": PNG}, "bytes": b"no image", "set": {1},
            "long": "x" * 300_000, "longer": ["x" * 300_000],
        }  # fmt: skip
        return values[what]

    @manager.commands.command(confirm=True)
    async def erase(what: str) -> str:
        return f"erased {what}"

    @manager.commands.command
    async def door(context: Context) -> str:
        return str(context.client.door)

    return manager, gate
