"""Engine.IO 4 and Socket.IO 5 packets: bytes in, values out.

Pure functions: no await, no logging, no state. All of them take and give bytes, because that is
what the socket has and what orjson reads and writes fastest. Used by `socketio`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

from orjson import JSONDecodeError, loads

from karna.envelopes import encode_json
from karna.errors import BadPacket

MAX_ATTACHMENTS = 10  # of one packet, as socket.io-parser
MAX_ACK_DIGITS = 15  # keeps ack ids exact in JavaScript and int() cheap
MAX_NAMESPACE_BYTES = 255  # longer than any real one
MAX_VALUES = 20_000  # beside attachments: their places are looked for, a quarter microsecond each
MAX_JSON_DEPTH = 100  # where we walk a value ourselves (attachments); Python's own limit is 1,000


class PacketType(IntEnum):
    """Socket.IO protocol 5, "Packet types"."""

    CONNECT, DISCONNECT, EVENT, ACK, CONNECT_ERROR, BINARY_EVENT, BINARY_ACK = range(7)


RESERVED_EVENTS = {
    "connect", "connect_error", "disconnect", "disconnecting", "newListener", "removeListener",
}  # fmt: skip


class Packet(NamedTuple):
    """One Socket.IO packet; `attachments` binary frames follow it."""

    type: PacketType
    namespace: str = "/"
    data: Any = None
    ack: int | None = None
    attachments: int = 0


_PACKET = re.compile(rb"([0-6])(?:(\d+)-)?(/[^,]*(?:,|\Z))?(\d+)?(.*)", re.DOTALL)


def decode_packet(text: bytes) -> Packet:
    """Parse one Socket.IO packet, such as b'2/chat,7["move",1]'.

    Attachments arrive as later binary frames; `Packet.attachments` says how many.
    Raises BadPacket (the peer's fault: the caller closes the session).
    Source: Socket.IO protocol 5, "Packet encoding".
    """
    match = _PACKET.fullmatch(text)
    if match is None:
        raise BadPacket("unknown packet type")
    digit, attachments, namespace, ack, data = match.groups()
    kind = PacketType(int(digit))
    return Packet(
        kind, _decode_namespace(namespace), _decode_data(kind, data), _decode_ack(kind, ack),
        _decode_attachments(kind, attachments),
    )  # fmt: skip


def _decode_namespace(text: bytes | None) -> str:
    if text is None:
        return "/"
    if len(text) > MAX_NAMESPACE_BYTES:
        raise BadPacket("namespace is too long")
    try:
        return text.rstrip(b",").decode()
    except UnicodeDecodeError:
        raise BadPacket("namespace is not UTF-8") from None


def _decode_ack(kind: PacketType, digits: bytes | None) -> int | None:
    if digits is None:
        if kind in (PacketType.ACK, PacketType.BINARY_ACK):
            raise BadPacket("ack without an id")
        return None
    if len(digits) > MAX_ACK_DIGITS:
        raise BadPacket("ack id is too long")
    return int(digits)


def _decode_attachments(kind: PacketType, digits: bytes | None) -> int:
    if (digits is not None) != (kind in (PacketType.BINARY_EVENT, PacketType.BINARY_ACK)):
        raise BadPacket("illegal attachments")
    # Length first: int() of a million digits would cost the loop seconds.
    if digits is not None and (len(digits) > 2 or int(digits) > MAX_ATTACHMENTS):
        raise BadPacket("too many attachments")
    return int(digits or 0)


def _decode_data(kind: PacketType, text: bytes) -> Any:
    try:
        data = loads(text) if text else None
    except JSONDecodeError:
        raise BadPacket("invalid payload") from None
    if not _DATA_RULES[kind](data):
        raise BadPacket("invalid payload")
    return data


def decode_event(text: bytes) -> list[Any]:
    """Parse the payload of an EVENT packet, such as b'["move",1]'. Raises BadPacket."""
    try:
        event: list[Any] = loads(text)
    except JSONDecodeError:
        raise BadPacket("invalid payload") from None
    if not event or (event[0] != "rpc" and not _is_event(event)):  # nearly all are "rpc"
        raise BadPacket("invalid payload")
    return event


def _is_event(data: Any) -> bool:
    name = data[0] if isinstance(data, list) and data else None
    return type(name) is int or (isinstance(name, str) and name not in RESERVED_EVENTS)


_DATA_RULES: dict[PacketType, Callable[[Any], bool]] = {
    PacketType.CONNECT: lambda data: data is None or isinstance(data, dict),
    PacketType.DISCONNECT: lambda data: data is None,
    PacketType.EVENT: _is_event,
    PacketType.ACK: lambda data: isinstance(data, list),
    PacketType.CONNECT_ERROR: lambda data: isinstance(data, dict),
    PacketType.BINARY_EVENT: _is_event,
    PacketType.BINARY_ACK: lambda data: isinstance(data, list),
}
EVENT_KINDS = (PacketType.EVENT, PacketType.BINARY_EVENT)  # without attachments, with them
_ACK_KINDS = (PacketType.ACK, PacketType.BINARY_ACK)
_KINDS = {kind: kinds for kinds in (EVENT_KINDS, _ACK_KINDS) for kind in kinds}


def encode_packet(packet: Packet) -> list[bytes]:
    """One Socket.IO packet as its text and, behind it, its attachments.

    Bytes anywhere in `data` become attachments and turn an event or ack into its binary kind.
    Raises TypeError or ValueError for data that JSON has no form for.
    """
    attachments: list[bytes] = []
    kind, data = packet.type, packet.data
    if kind in _KINDS:
        data = _extract_attachments(data, attachments)
        kind = _KINDS[kind][bool(attachments)]
    text = b"%d%b" % (kind, b"%d-" % len(attachments) if attachments else b"")
    text += encode_namespace(packet.namespace)
    if packet.ack is not None:
        text += b"%d" % packet.ack
    if data is not None:
        text += encode_json(data)
    return [text, *attachments]


def encode_namespace(name: str) -> bytes:
    """The namespace part of a packet: nothing for '/', else b'/name,'."""
    return b"" if name == "/" else name.encode() + b","


def _extract_attachments(value: Any, found: list[bytes], depth: int = 0) -> Any:
    """A copy of `value` with placeholders for bytes, which are appended to `found`."""
    if isinstance(value, bytes | bytearray | memoryview):
        if len(found) >= MAX_ATTACHMENTS:
            raise ValueError(f"a packet holds {MAX_ATTACHMENTS} attachments at most")
        found.append(bytes(value))
        return {"_placeholder": True, "num": len(found) - 1}
    if depth > MAX_JSON_DEPTH:
        raise ValueError("value is nested too deeply")
    if isinstance(value, list | tuple):
        return [_extract_attachments(item, found, depth + 1) for item in value]
    if isinstance(value, dict):
        return {key: _extract_attachments(item, found, depth + 1) for key, item in value.items()}
    return value


def insert_attachments(value: Any, given: Sequence[bytes]) -> Any:
    """A copy of `value` with its placeholders replaced by what was given; undoes encode_packet.

    Raises BadPacket for a placeholder without its attachment, deep nesting, or too many values.
    """
    left = MAX_VALUES

    def insert(value: Any, depth: int) -> Any:
        nonlocal left
        if not isinstance(value, list | dict):
            return value
        left -= len(value) + 1
        if left < 0:
            raise BadPacket(f"a payload with attachments has at most {MAX_VALUES} values")
        if depth > MAX_JSON_DEPTH:
            raise BadPacket("payload is nested too deeply")
        if isinstance(value, list):
            return [insert(item, depth + 1) for item in value]
        if value.get("_placeholder") is not True:
            return {key: insert(item, depth + 1) for key, item in value.items()}
        number = value.get("num")
        if type(number) is not int or not 0 <= number < len(given):
            raise BadPacket("illegal attachments")
        return given[number]

    return insert(value, 0)
