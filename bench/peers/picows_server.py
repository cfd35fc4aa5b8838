"""picows: framing in Cython, a callback for each frame, on uvloop."""

import sys

import orjson
import uvloop
from picows import WSFrame, WSListener, WSMsgType, WSTransport, WSUpgradeRequest, ws_create_server
from work import answer

clients: set[WSTransport] = set()


class Client(WSListener):
    def on_ws_connected(self, transport: WSTransport) -> None:
        clients.add(transport)

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        clients.discard(transport)

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type == WSMsgType.CLOSE:
            transport.send_close(frame.get_close_code())
            transport.disconnect()
        elif frame.msg_type == WSMsgType.TEXT:
            envelope, news = answer(orjson.loads(frame.get_payload_as_memoryview()))
            if news:
                broadcast(orjson.dumps(news))
            transport.send(WSMsgType.TEXT, orjson.dumps(envelope))


def broadcast(payload: bytes) -> None:
    for transport in clients:
        transport.send(WSMsgType.TEXT, payload)


def accept(request: WSUpgradeRequest) -> WSListener:
    return Client()


async def main() -> None:
    server = await ws_create_server(accept, "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()


uvloop.run(main())
