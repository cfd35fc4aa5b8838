"""aiohttp's own server, compression off."""

import sys

import orjson
from aiohttp import WSMsgType, web
from work import answer

clients: set[web.WebSocketResponse] = set()


async def serve_client(request: web.Request) -> web.WebSocketResponse:
    websocket = web.WebSocketResponse(compress=False)
    await websocket.prepare(request)
    clients.add(websocket)
    try:
        async for message in websocket:
            if message.type is not WSMsgType.TEXT:
                continue
            envelope, news = answer(orjson.loads(message.data))
            if news:
                await broadcast(orjson.dumps(news).decode())
            await websocket.send_str(orjson.dumps(envelope).decode())
    finally:
        clients.discard(websocket)
    return websocket


async def broadcast(text: str) -> None:
    for websocket in list(clients):
        await websocket.send_str(text)


async def execute_command(request: web.Request) -> web.Response:
    params = orjson.loads(await request.read())
    envelope, _ = answer({"method": "execute_command", "params": params, "id": None})
    return web.Response(body=orjson.dumps(envelope), content_type="application/json")


app = web.Application()
app.add_routes([web.get("/ws", serve_client), web.post("/api/execute_command", execute_command)])
web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None, access_log=None)
