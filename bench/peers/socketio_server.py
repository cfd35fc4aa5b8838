"""python-socketio's asyncio server as an ASGI application under uvicorn[standard]."""

import sys
from typing import Any

import socketio
import uvicorn
from work import answer

sio = socketio.AsyncServer(async_mode="asgi", namespaces=["/ws"])


@sio.event(namespace="/ws")
async def rpc(sid: str, request: dict[str, Any]) -> dict[str, Any]:
    """The value returned is the ack."""
    envelope, news = answer(request)
    if news:
        await sio.emit("rpc_response", news, namespace="/ws")
    return envelope


uvicorn.run(socketio.ASGIApp(sio), host="127.0.0.1", port=int(sys.argv[1]), log_level="error")
