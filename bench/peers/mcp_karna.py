"""Karna WS with the tools of mcp_server.py; "uvloop" chooses that loop."""

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from karna_ws import WebSocketManager, serve

manager = WebSocketManager()


@manager.commands.command
async def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@manager.commands.command
async def echo(text: str) -> str:
    """Answer with the text."""
    return text


if sys.argv[2:] == ["uvloop"]:
    import uvloop

    uvloop.run(serve(manager, port=int(sys.argv[1])))
else:
    asyncio.run(serve(manager, port=int(sys.argv[1])))
