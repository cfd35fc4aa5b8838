"""What every Python peer does with a request, so that only the server around it differs.

The commands are the ones the load asks for: `echo` and `notify`, and the method `get_status`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

Envelope = dict[str, Any]

STARTED = datetime.now(UTC).isoformat()
SERVICES = ("vision", "language", "command")


def answer(request: Envelope) -> tuple[Envelope, Envelope | None]:
    """The envelope for the client that asked, and one for all clients if the command makes one."""
    method, request_id = request["method"], request["id"]
    if method == "get_status":
        return {"type": "status_update", "data": status(), "id": request_id}, None
    if method != "execute_command":
        return error("unknown_method", method, request_id), None
    line = request["params"]["command"]
    command, _, text = line.partition(" ")
    data = {"command": line, "result": text}
    response = {"type": "command_response", "data": data, "id": request_id}
    if command == "echo":
        return response, None
    if command == "notify":
        return response, notification(text)
    return error("unknown_command", line, request_id), None


def status() -> Envelope:
    state = {"state": "running", "detail": "", "since": STARTED}
    return dict.fromkeys(SERVICES, state)


def notification(text: str) -> Envelope:
    time = datetime.now(UTC).isoformat()
    return {"type": "notification", "data": {"message": text, "level": "info", "time": time}}


def error(code: str, message: str, request_id: Any) -> Envelope:
    return {"type": "error", "data": {"code": code, "message": message}, "id": request_id}
