"""The plain way to use `websockets`: a task for each client, and its own broadcast()."""

import asyncio
import sys

import orjson
from websockets.asyncio.server import ServerConnection, broadcast, serve
from work import answer

clients: set[ServerConnection] = set()


async def serve_client(websocket: ServerConnection) -> None:
    clients.add(websocket)
    try:
        async for message in websocket:
            envelope, news = answer(orjson.loads(message))
            if news:
                broadcast(clients, orjson.dumps(news).decode())
            await websocket.send(orjson.dumps(envelope).decode())
    finally:
        clients.discard(websocket)


async def main() -> None:
    async with serve(serve_client, "127.0.0.1", int(sys.argv[1]), compression=None) as server:
        await server.serve_forever()


asyncio.run(main())
