"""A blocking client for one request: says when a server is up and whether it answers rightly.

Standard library only, and frames of up to 64 KiB; the load itself is load.c.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from http.client import HTTPConnection
from typing import Any, Literal, Self

Door = Literal["raw", "socket.io", "http"]

KEY = "dGhlIHNhbXBsZSBub25jZQ=="
PATHS: dict[Door, str] = {
    "raw": "/ws",
    "socket.io": "/socket.io/?EIO=4&transport=websocket",
    "http": "/api/execute_command",
}
HELLO = {"command": "echo hello"}
ECHO = {"method": "execute_command", "params": HELLO, "id": 10000000}
STATUS = {"method": "get_status", "id": 10000001}


class WrongAnswer(Exception):
    """The server answered, but not as it should."""


class Probe:
    """One client of a WebSocket door. Raises OSError when the server is not there or goes away."""

    def __init__(self, port: int, door: Door = "raw", timeout_s: float = 10.0) -> None:
        self.door = door
        self.buffer = b""
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=timeout_s)
        try:
            self._open(port)
        except BaseException:
            self.socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._send_frame(0x88, b"\x03\xe8")
        self.socket.close()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and return the envelope that answers it."""
        text = json.dumps(request, separators=(",", ":"))
        if self.door == "socket.io":
            text = f'42/ws,{request["id"]}["rpc",{text}]'
        self._send_frame(0x81, text.encode())
        while True:
            envelope = self._receive_envelope()
            if envelope.get("id") == request["id"]:
                return envelope

    def _open(self, port: int) -> None:
        self.socket.sendall(
            f"GET {PATHS[self.door]} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {KEY}\r\n"
            "Sec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        while b"\r\n\r\n" not in self.buffer:
            self._receive()
        head, self.buffer = self.buffer.split(b"\r\n\r\n", 1)
        if b" 101 " not in head.split(b"\r\n", 1)[0]:
            raise WrongAnswer(head.decode("latin-1"))
        if self.door == "socket.io":
            self._receive_text()
            self._send_frame(0x81, b"40/ws,")
            self._receive_text()

    def _receive_envelope(self) -> dict[str, Any]:
        text = self._receive_text()
        if self.door == "raw":
            envelope = json.loads(text)
        elif text.startswith("43/ws,"):
            [envelope] = json.loads(text[text.index("[") :])
        else:
            return {}
        if not isinstance(envelope, dict):
            raise WrongAnswer(text)
        return envelope

    def _receive_text(self) -> str:
        while True:
            opcode, payload = self._receive_frame()
            if opcode == 8:
                raise ConnectionError(f"closed by the server: {payload[2:].decode()}")
            if opcode == 1:
                return payload.decode()

    def _receive_frame(self) -> tuple[int, bytes]:
        self._receive_until(4)
        size, head = self.buffer[1] & 0x7F, 2
        if size == 126:
            size, head = int.from_bytes(self.buffer[2:4], "big"), 4
        self._receive_until(head + size)
        opcode, payload = self.buffer[0] & 15, self.buffer[head : head + size]
        self.buffer = self.buffer[head + size :]
        return opcode, payload

    def _receive_until(self, count: int) -> None:
        while len(self.buffer) < count:
            self._receive()

    def _receive(self) -> None:
        received = self.socket.recv(65536)
        if not received:
            raise ConnectionError("the server dropped the connection")
        self.buffer += received

    def _send_frame(self, first_byte: int, payload: bytes) -> None:
        if len(payload) > 125:
            raise ValueError("a probe sends small frames only")
        mask = os.urandom(4)
        masked = bytes(byte ^ mask[i & 3] for i, byte in enumerate(payload))
        self.socket.sendall(bytes([first_byte, 0x80 | len(payload)]) + mask + masked)


def check_answers(port: int, door: Door) -> None:
    """Raise WrongAnswer unless `echo hello` and `get_status` are answered as they should be."""
    if door == "http":
        return check_echo(post(port, HELLO))
    with Probe(port, door) as probe:
        echo, status = probe.ask(ECHO), probe.ask(STATUS)
    check_echo(echo)
    if status["type"] != "status_update" or "vision" not in status["data"]:
        raise WrongAnswer(f"get_status: {status}")


def check_echo(envelope: dict[str, Any]) -> None:
    if envelope["type"] != "command_response" or envelope["data"].get("result") != "hello":
        raise WrongAnswer(f"echo hello: {envelope}")


def post(port: int, body: dict[str, Any]) -> Any:
    """One command by POST."""
    with contextlib.closing(HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", PATHS["http"], json.dumps(body), headers)
        return json.loads(connection.getresponse().read())
