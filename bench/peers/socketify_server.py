"""socketify: uWebSockets (C++) with Python handlers, and its publish and subscribe."""

import sys
from typing import Any

import orjson
from socketify import App, OpCode
from work import answer

app = App()


def open_client(client: Any) -> None:
    client.subscribe("everyone")


def handle_message(client: Any, message: str, opcode: OpCode) -> None:
    envelope, news = answer(orjson.loads(message))
    if news:
        app.publish("everyone", orjson.dumps(news).decode(), OpCode.TEXT)
    client.send(orjson.dumps(envelope).decode(), OpCode.TEXT)


app.ws("/ws", {"open": open_client, "message": handle_message, "max_payload_length": 1 << 20})
app.listen(int(sys.argv[1]), lambda config: None)
app.run()
