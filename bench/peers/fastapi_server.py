"""FastAPI under uvicorn[standard] (httptools), with the ConnectionManager of its documentation."""

import json
import sys
from typing import Any

import uvicorn
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from pydantic import BaseModel
from work import answer


class ConnectionManager:
    def __init__(self) -> None:
        self.active_connections: list[WebSocket] = []

    async def connect(self, websocket: WebSocket) -> None:
        await websocket.accept()
        self.active_connections.append(websocket)

    def disconnect(self, websocket: WebSocket) -> None:
        self.active_connections.remove(websocket)

    async def broadcast(self, message: str) -> None:
        for connection in self.active_connections:
            await connection.send_text(message)


app = FastAPI()
manager = ConnectionManager()


@app.websocket("/ws")
async def serve_client(websocket: WebSocket) -> None:
    await manager.connect(websocket)
    try:
        while True:
            envelope, news = answer(await websocket.receive_json())
            if news:
                await manager.broadcast(json.dumps(news, separators=(",", ":")))
            await websocket.send_json(envelope)
    except WebSocketDisconnect:
        manager.disconnect(websocket)


class Command(BaseModel):
    command: str


@app.post("/api/execute_command")
async def execute_command(command: Command) -> dict[str, Any]:
    request = {"method": "execute_command", "params": {"command": command.command}, "id": None}
    envelope, _ = answer(request)
    return envelope


uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error")
