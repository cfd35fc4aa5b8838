"""A Socket.IO session: the packets of one client, its namespaces, its heartbeat.

Engine.IO protocol 4 and Socket.IO protocol 5 over the websocket transport. A session is the door
of its connection, with one client for each namespace it has joined. Who may join and what an event
does is decided above: the top extends SocketIoSession by `connect`, `handle_event` and `left`.

Touches its connection; packets come from `packets`, requests go to `calls`.
"""

from __future__ import annotations

import hashlib
import secrets
from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

from orjson import dumps
from websockets.frames import CloseCode

from karna.calls import Client, Request
from karna.connection import Connection
from karna.door import HOLD_CONNECT, NEVER, Door
from karna.envelopes import encode_json
from karna.errors import BadPacket, RequestError
from karna.frames import ENGINE_PING_FRAME, frame_binary, frame_text
from karna.head import Head
from karna.history import Entry, replay_bytes
from karna.packets import (
    EVENT_KINDS,
    MAX_ACK_DIGITS,
    Packet,
    PacketType,
    decode_event,
    decode_packet,
    encode_namespace,
    encode_packet,
    insert_attachments,
)

MAX_AUTH_BYTES = 16 * 1024  # a token, and what a program asks for: it is kept as long as the client
MAX_PID_CHARS = 100  # of a private id that a client comes back with


class Standing(Enum):
    """Where a session stands in a namespace."""

    ABSENT = "absent"
    CONNECTING = "connecting"  # the CONNECT answer is still to come
    CONNECTED = "connected"


class SocketIoClient(Client):
    """One session in one namespace.

    Its private id (`pid`) is what it recovers with; its public id is made from that, so that it
    keeps it on any node. The id is known before the connect handler is asked.
    """

    __slots__ = ("_held", "ack_head", "event_head", "namespace", "pid", "session")
    door = "socket.io"

    def __init__(self, session: SocketIoSession, namespace: str, auth: dict[str, Any]) -> None:
        hidden = {key: auth.pop(key, None) for key in ("pid", "offset")}
        self.pid, since = _recovery_of(**hidden)
        super().__init__(session.connection, session.manager, _public_id(self.pid))
        self.since = since if self.manager.recovers else None
        self.session = session
        self.namespace = namespace
        self.auth = auth
        prefix = encode_namespace(namespace)
        self.event_head = b"42" + prefix + b'["rpc_response",'
        self.ack_head = b"43" + prefix
        self._held: list[bytes] | None = []  # frames that must follow the CONNECT answer

    @property
    def is_present(self) -> bool:
        """Has it not left its namespace?"""
        return self.session.clients.get(self.namespace) is self

    @property
    def standing(self) -> Standing:
        """CONNECTING until it is welcome."""
        return Standing.CONNECTED if self._held is None else Standing.CONNECTING

    # Who comes in.

    def welcome(self, missed: list[Entry] | None) -> None:
        """Send what the client missed, the CONNECT answer, and what was held back for it.

        missed: None where it does not recover.
        """
        held, self._held = self._held or (), None
        self.session.connect_deadline = NEVER
        self.connection.allow(replay_bytes(missed or ()))
        self.session.connected[encode_namespace(self.namespace)] = self
        for entry in missed or ():
            self.send_missed(entry)
        answer = {"sid": self.id}
        if self.manager.recovers:
            if missed is None:  # with its old pid it would take itself for recovered
                # The offset is for a client that is cut off before it has seen one.
                self.pid = f"{self.pid.partition('.')[0]}.{self.manager.flushed}"
            answer["pid"] = self.pid
        self.send_packet(Packet(PacketType.CONNECT, self.namespace, answer))
        for frame in held:
            self.send_frame(frame)

    def send_missed(self, entry: Entry) -> None:
        """Send one broadcast of a replay: before the CONNECT answer, as its client wants it."""
        text = encode_broadcast(self.event_head, entry.envelope, entry.offset)
        self.connection.send_frame(frame_text(text))

    def refuse(self, message: str) -> None:
        """Answer its CONNECT with an error; it is no client any more."""
        self.session.clients.pop(self.namespace, None)
        self.session.refuse(self.namespace, message)

    # What is sent.

    async def emit(self, event: str, *args: Any) -> None:
        ack = None
        if self.manager.recovers and isinstance(args[-1] if args else event, str):
            # socket.io-client takes an event's last string for its recovery offset; with an ack
            # that nobody waits for, a function is the last.
            ack = self.questions.next_number()
        self.send_packet(Packet(PacketType.EVENT, self.namespace, [event, *args], ack))
        await self._sent()

    def send_question(self, number: int, event: str, args: tuple[Any, ...]) -> None:
        self.send_packet(Packet(PacketType.EVENT, self.namespace, [event, *args], number))

    def answered(self, number: int | None, values: list[Any]) -> None:
        """The ack of a question: one value as it is, several as a list, or an error envelope."""
        value = values[0] if len(values) == 1 else values or None
        error = None
        if isinstance(value, dict) and value.get("type") == "error" and "data" in value:
            data = value["data"]
            error = data.get("message", data) if isinstance(data, dict) else data
        self.questions.answer(number, value, error)

    async def disconnect(self, reason: str = "") -> None:
        """End this namespace's connection; the session may hold others."""
        if self.standing is Standing.CONNECTING:
            return self.refuse(reason or "disconnected by the server")
        self.send_packet(Packet(PacketType.DISCONNECT, self.namespace))
        self.session.remove(self, "server namespace disconnect")

    def deliver(self, envelope: bytes, ack: int | None) -> None:
        self.send_frame(frame_text(self.wrap(envelope, ack)))

    def wrap(self, envelope: bytes, ack: int | None) -> bytes:
        """An envelope as the text of an ack or of an `rpc_response` event."""
        if ack is None:
            return self.event_head + envelope + b"]"
        return b"".join((self.ack_head, b"%d[" % ack, envelope, b"]"))

    def deliver_special(self, values: list[Any], ack: int | None) -> None:
        if ack is None:
            values = ["rpc_response", *values]
        kind = PacketType.EVENT if ack is None else PacketType.ACK
        self.send_packet(Packet(kind, self.namespace, values, ack))

    def send_packet(self, packet: Packet) -> None:
        """Send a packet with its attachments. Raises TypeError or ValueError if it has no form."""
        text, *attachments = encode_packet(packet)
        self.send_frame(b"".join([frame_text(b"4" + text), *map(frame_binary, attachments)]))

    def send_frame(self, frame: bytes) -> None:
        """Send frames now, or behind the CONNECT answer while that is still to come."""
        if self._held is not None:
            self._held.append(frame)
        elif self.is_present:
            self.connection.send_frame(frame)


def _recovery_of(pid: Any, offset: Any) -> tuple[str, str | None]:
    """The pid of a client, and what it saw last if it comes back with one that can be."""
    if not isinstance(pid, str) or not 0 < len(pid) <= MAX_PID_CHARS:
        return new_id(), None
    return pid, offset if isinstance(offset, str) else pid.partition(".")[2]


def new_id() -> str:
    """A session id or pid that can't be guessed: 20 characters, as socket.io's."""
    return secrets.token_urlsafe(15)


def _public_id(pid: str) -> str:
    secret = pid.partition(".")[0]
    return urlsafe_b64encode(hashlib.sha256(secret.encode(errors="replace")).digest()[:15]).decode()


def encode_broadcast(event_head: bytes, envelope: bytes, offset: str | None) -> bytes:
    """A broadcast as Socket.IO text; the trailing offset is what its client recovers with."""
    if offset is None:
        return event_head + envelope + b"]"
    return event_head + envelope + b',"' + offset.encode() + b'"]'


class SocketIoSession(Door):
    """One Engine.IO session."""

    __slots__ = (
        "attachments", "attachments_bytes", "clients", "connect_deadline", "connected",
        "connection", "is_authorized", "manager", "pending", "sid",
    )  # fmt: skip

    def __init__(self, connection: Connection, manager: Any, *, is_authorized: bool) -> None:
        self.connection = connection
        self.manager = manager
        self.sid = new_id()
        self.clients: dict[str, SocketIoClient] = {}  # connecting ones too
        self.connected: dict[bytes, SocketIoClient] = {}  # by the namespace as packets have it
        self.is_authorized = is_authorized  # by the handshake; else each CONNECT needs the token
        self.pending: Packet | None = None  # a packet whose attachments are still to come
        self.attachments: list[bytes] = []
        self.attachments_bytes = 0
        self.connect_deadline = connection.loop.time() + connection.hub.config.connect_timeout_s

    # What the top decides.

    def connect(self, namespace: str, auth: dict[str, Any]) -> None:
        """A CONNECT packet: answer it, now or later."""
        raise NotImplementedError

    def handle_event(
        self, client: SocketIoClient, event: list[Any], ack: int | None, size: int
    ) -> bytes | None:
        """Answer an event: the text to send now, if any."""
        raise NotImplementedError

    def left(self, client: SocketIoClient, reason: str) -> None:
        """A client has left its namespace."""
        raise NotImplementedError

    # Frames.

    def start(self) -> None:
        """Send the Engine.IO open packet."""
        config = self.connection.hub.config
        handshake = {
            "sid": self.sid,
            "upgrades": [],
            "pingInterval": round(config.engine_ping_interval_s * 1000),
            "pingTimeout": round(config.ping_timeout_s * 1000),
            "maxPayload": config.max_message_bytes,
        }
        self.connection.send_frame(frame_text(b"0" + dumps(handshake)))
        self.connection.deadline = min(self.connection.deadline, self.connect_deadline)

    def receive(self, payload: bytes, is_text: bool) -> bytes | None:
        try:
            if not is_text:
                return self._receive_attachment(payload)
            start = payload.find(b"[")
            if start > 0 and payload.startswith(b"42") and self.pending is None:
                # The fast lane, for `42/ws,7["rpc",{...}]`.
                head = payload[2:start]
                prefix = head.rstrip(b"0123456789")
                client = self.connected.get(prefix)
                if client is not None and len(head) - len(prefix) <= MAX_ACK_DIGITS:
                    ack = int(head[len(prefix) :]) if len(head) > len(prefix) else None
                    event = decode_event(payload[start:])
                    return self.handle_event(client, event, ack, len(payload))
            handler = _ENGINE_HANDLERS.get(payload[:1])
            if handler is None:
                raise BadPacket("unknown packet type")
            return handler(self, payload)
        except BadPacket as bad:
            if is_text:
                payload.decode()  # UnicodeDecodeError: 1007 rather than 1002
            self.connection.hub.drop(self.connection.who, "protocol")
            self.connection.close(CloseCode.PROTOCOL_ERROR, str(bad))
        return None

    def _receive_message(self, payload: bytes) -> bytes | None:
        if self.pending is not None:
            raise BadPacket("text while attachments are pending")
        packet = decode_packet(payload[1:])
        handler = self._find_handler(packet)  # first: what may not be sent is not kept either
        if packet.attachments:
            self.pending = packet
            return None
        return handler(self, packet, len(payload))

    def _receive_attachment(self, payload: bytes) -> bytes | None:
        if self.pending is None:
            raise BadPacket("binary frame without a packet")
        self.attachments.append(payload)
        self.attachments_bytes += len(payload)
        if self.attachments_bytes > self.connection.hub.config.max_message_bytes:
            self.connection.close(CloseCode.MESSAGE_TOO_BIG, "attachments are too large")
            return None
        if len(self.attachments) < self.pending.attachments:
            return None
        packet, attachments, size = self.pending, self.attachments, self.attachments_bytes
        self.pending, self.attachments, self.attachments_bytes = None, [], 0
        packet = packet._replace(data=insert_attachments(packet.data, attachments))
        return self._find_handler(packet)(self, packet, size)

    # Packets.

    def _find_handler(self, packet: Packet) -> PacketHandler:
        client = self.clients.get(packet.namespace)
        standing = Standing.ABSENT if client is None else client.standing
        handler = _PACKET_HANDLERS.get((standing, packet.type))
        if handler is None and packet.type in EVENT_KINDS:
            raise BadPacket("event before connect")
        if handler is None:
            raise BadPacket(f"{packet.type.name} while {standing.value}")
        return handler

    def _connect(self, packet: Packet, size: int) -> None:
        if size > MAX_AUTH_BYTES:
            text = f"auth has over {MAX_AUTH_BYTES} bytes"
            return self.refuse(packet.namespace, text, code="too_large")
        return self.connect(packet.namespace, packet.data or {})

    def _event(self, packet: Packet, size: int) -> bytes | None:
        return self.handle_event(self.clients[packet.namespace], packet.data, packet.ack, size)

    def _ack(self, packet: Packet, size: int) -> None:
        self.clients[packet.namespace].answered(packet.ack, packet.data)

    def _disconnect(self, packet: Packet, size: int) -> None:
        self.remove(self.clients[packet.namespace], "client namespace disconnect")

    def _give_up(self, packet: Packet, size: int) -> None:
        """Leave before the connect handler has decided; until it has, nothing more is read.

        Else a peer that joins and leaves in turn would start such handlers without end.
        """
        self.connection.hold(HOLD_CONNECT)
        self._disconnect(packet, size)

    def refuse(self, namespace: str, message: str, **data: Any) -> None:
        """Answer a CONNECT with CONNECT_ERROR, which is always an object."""
        error = {"message": message, "data": data} if data else {"message": message}
        [text] = encode_packet(Packet(PacketType.CONNECT_ERROR, namespace, error))
        self.connection.send_frame(frame_text(b"4" + text))

    def remove(self, client: SocketIoClient, reason: str) -> None:
        """A client leaves its namespace; the session goes on."""
        if client.is_present:
            del self.clients[client.namespace]
            self.connected.pop(encode_namespace(client.namespace), None)
            self.left(client, reason)

    def end(self) -> None:
        self.pending, self.attachments = None, []
        for client in tuple(self.clients.values()):
            self.remove(client, "transport close")

    def on_deadline(self, now: float) -> None:
        if not self.clients and now >= self.connect_deadline:
            self.connection.hub.drop(self.connection.who, "no namespace")
            return self.connection.close(CloseCode.POLICY_VIOLATION, "no namespace joined in time")
        interval_s = self.connection.hub.config.engine_ping_interval_s
        self.connection.heartbeat(now, interval_s, ENGINE_PING_FRAME)
        if not self.clients:
            self.connection.deadline = min(self.connection.deadline, self.connect_deadline)


# State machines as data; what is absent is the peer's mistake.
PacketHandler = Callable[[SocketIoSession, Packet, int], "bytes | None"]
_ENGINE_HANDLERS: dict[bytes, Callable[[SocketIoSession, bytes], bytes | None]] = {
    b"1": lambda session, payload: session.connection.close(CloseCode.NORMAL_CLOSURE),
    b"3": lambda session, payload: None,  # a pong: any frame counts as life
    b"4": SocketIoSession._receive_message,
}
_PACKET_HANDLERS: dict[tuple[Standing, PacketType], PacketHandler] = {
    (Standing.ABSENT, PacketType.CONNECT): SocketIoSession._connect,
    (Standing.CONNECTING, PacketType.DISCONNECT): SocketIoSession._give_up,
    (Standing.CONNECTED, PacketType.DISCONNECT): SocketIoSession._disconnect,
    (Standing.CONNECTED, PacketType.EVENT): SocketIoSession._event,
    (Standing.CONNECTED, PacketType.BINARY_EVENT): SocketIoSession._event,
    (Standing.CONNECTED, PacketType.ACK): SocketIoSession._ack,
    (Standing.CONNECTED, PacketType.BINARY_ACK): SocketIoSession._ack,
}


_TOLD = ("cancelled", "command_failed", "internal_error")  # a bug has been logged already


class EventRequest(Request):
    """An event with a handler of the program: the ack is what it returned, not an envelope."""

    __slots__ = ()

    def encode(self, type: str, data: Any) -> bytes | None:
        """The values of the ack as JSON, without the brackets that `wrap` puts around them."""
        return None if self.ack is None else encode_json(self._values(type, data))[1:-1]

    def _values(self, type: str, data: Any) -> list[Any]:
        if type == "error":
            return [{"type": type, "data": data}]
        return list(data) if isinstance(data, tuple) else [data]

    def fail(self, code: str, message: str, data: Mapping[str, Any] | None = None) -> bytes | None:
        if self.ack is None and code not in _TOLD:  # nobody else hears of it
            gate = self.client.manager.log_gate
            gate.warning("event handler", "%s event handler: %s", self.client.id, message)
        return super().fail(code, message, data)

    def progress(self, value: Any) -> None:
        pass  # an event has no progress in the protocol


# Handshakes.


class EngineRefused(RequestError):
    """An Engine.IO handshake is refused, with the code and message of socket.io."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message, code="invalid_request", status=400)
        self.body = dumps({"code": number, "message": message})


def check_engine_handshake(head: Head) -> None:
    """Refuse what is no Engine.IO handshake over websocket, in the order socket.io does."""
    if head.query.get("transport", [""])[0] != "websocket":
        raise EngineRefused(0, "Transport unknown")
    if "sid" in head.query:  # sessions begin here; none moves over from polling
        raise EngineRefused(1, "Session ID unknown")
    if head.method != "GET":
        raise EngineRefused(2, "Bad handshake method")
    if not head.is_upgrade:
        raise EngineRefused(3, "Bad request")
    if head.query["EIO"][0] not in ("3", "4"):
        raise EngineRefused(5, "Unsupported protocol version")


def refuse_old_client(session: SocketIoSession) -> None:
    """Tell a socket.io-client 2 in its own protocol what it is; a plain refusal shows it nothing.

    Source: Engine.IO protocol 3, Socket.IO protocol 4: open, connected to '/', error in '/ws'.
    """
    text = dumps("this server needs socket.io-client 3 or later (Engine.IO protocol 4)")
    handshake = {"sid": session.sid, "upgrades": [], "pingInterval": 25000, "pingTimeout": 20000}
    for packet in (b"0" + dumps(handshake), b"40", b"44/ws," + text, b"44" + text):
        session.connection.send_frame(frame_text(packet))
    session.connection.close(CloseCode.POLICY_VIOLATION, "Engine.IO protocol 4 is needed")
