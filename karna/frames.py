"""WebSocket frames as bytes (RFC 6455, 5.2): pure, imports nothing of ours.

Servers send unmasked frames, each whole: a head of 2 to 10 bytes and the payload. Used by every
room that writes to a WebSocket; `connection` reads frames itself, where speed wants it inline.
"""

from __future__ import annotations

import struct

import websockets.frames

apply_mask = websockets.frames.apply_mask  # type: ignore[attr-defined]  # C, or Python without it

SHORT_TEXT_HEADS = [bytes((0x81, size)) for size in range(126)]


def frame_text(payload: bytes) -> bytes:
    """One unmasked, final WebSocket text frame (RFC 6455, 5.2)."""
    size = len(payload)
    return (SHORT_TEXT_HEADS[size] if size < 126 else _long_head(0x81, size)) + payload


def frame_binary(payload: bytes) -> bytes:
    """One unmasked, final WebSocket binary frame (RFC 6455, 5.2)."""
    size = len(payload)
    return (bytes((0x82, size)) if size < 126 else _long_head(0x82, size)) + payload


_pack_16_bits = struct.Struct("!BBH").pack
_pack_64_bits = struct.Struct("!BBQ").pack


def _long_head(first: int, size: int) -> bytes:
    return _pack_16_bits(first, 126, size) if size < 65536 else _pack_64_bits(first, 127, size)


PING_FRAME = b"\x89\x00"  # WebSocket ping, for the raw door
ENGINE_PING_FRAME = frame_text(b"2")  # Engine.IO ping, for the Socket.IO door
