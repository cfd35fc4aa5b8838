"""What HTTP paths answer: a handler takes an exchange and its body.

`karna_ws.ROUTES` says which path is whose. Uses the hub it answers for, as EndpointHub says, and
http; the page and MCP have rooms of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from orjson import JSONDecodeError, dumps, loads

from karna.builtins import notification
from karna.door import HOLD_BATCH
from karna.envelopes import encode_json
from karna.errors import InvalidParams, InvalidRequest, RequestError
from karna.http import Exchange, HttpClient, upgrade_required
from karna.jsonrpc import Methods, handle_json_rpc, is_notification, refuse_json
from karna.server import ServedHub
from karna.status import StatusBoard


class EndpointHub(ServedHub):
    """What the endpoints need of the manager at the top."""

    board: StatusBoard
    handle_rpc: Callable[[Any, dict[str, Any], int | None, int], bytes | None]
    json_rpc: Methods
    sessions: set[Any]  # of Socket.IO

    async def publish(self, type: str, data: Any) -> int:
        """Broadcast; how many clients of this process it went to."""
        raise NotImplementedError


def answer_health(manager: EndpointHub, exchange: Exchange, body: bytes) -> None:
    """GET /health: 200 while everything works, 503 with the reason otherwise."""
    if manager.is_draining:
        return exchange.answer(503, dumps({"status": "draining"}))
    ill = {
        name: service.get_status()
        for name, service in manager.services.items()
        if service.state == "failed"
        # Degraded, a service still serves; but a backplane loses what others broadcast.
        or (service.state == "degraded" and service is manager.backplane)
    }
    if ill:
        return exchange.answer(503, encode_json({"status": "unhealthy", "services": ill}))
    return exchange.answer(200, b'{"status":"healthy"}')


def answer_status(manager: EndpointHub, exchange: Exchange, body: bytes) -> None:
    """GET /api/status: the status object."""
    exchange.answer(200, manager.board.encode())


def answer_ws(manager: EndpointHub, exchange: Exchange, body: bytes) -> None:
    """GET /ws without an upgrade."""
    raise upgrade_required()


def read_object(body: bytes) -> dict[str, Any]:
    """A JSON body that must be an object. Raises RequestError."""
    try:
        value = loads(body)
    except JSONDecodeError:
        message = "the body is not valid JSON in UTF-8"
        raise RequestError(message, code="invalid_json") from None
    if not isinstance(value, dict):
        raise InvalidRequest("the body must be a JSON object")
    return value


def answer_execute(manager: EndpointHub, exchange: Exchange, body: bytes) -> None:
    """POST /api/execute_command: run a command, answer as the raw door would."""
    params = read_object(body)
    client = HttpClient(exchange, manager)
    message = {"method": "execute_command", "params": params}
    answer = manager.handle_rpc(client, message, None, len(body))
    if answer is not None:
        client.deliver(answer, None)


def answer_notify(manager: EndpointHub, exchange: Exchange, body: bytes) -> None:
    """POST /api/notify: broadcast a notification; 202 with how many clients it went to."""
    given = read_object(body)
    try:
        data = notification(given.get("message"), given.get("level", "info"))
    except ValueError as error:
        raise InvalidParams(str(error)) from None
    manager.spawn(_publish_notification(manager, exchange, data), "POST /api/notify")


async def _publish_notification(
    manager: EndpointHub, exchange: Exchange, data: dict[str, str]
) -> None:
    try:
        clients = await manager.publish("notification", data)
    except Exception as exc:
        return exchange.fail(exc)
    return exchange.answer(202, dumps({"clients": clients}))


def answer_rpc(manager: EndpointHub, exchange: Exchange, body: bytes) -> None:
    """POST /rpc: JSON-RPC 2.0; its status is 200 whatever the answer says."""
    client = HttpClient(exchange, manager)
    try:
        message = loads(body)
    except JSONDecodeError:
        answer = refuse_json(client, len(body))
    else:
        answer = handle_json_rpc(client, message, len(body), manager.json_rpc)
        messages = message if isinstance(message, list) else [message]
        if answer is None and all(map(is_notification, messages)):
            return _answer_notified(exchange)
    if answer is not None:
        client.deliver(answer, None)
    return None


def _answer_notified(exchange: Exchange) -> None:
    """204, once the last notification of a batch has been handled."""
    connection = exchange.connection
    if connection.is_held(HOLD_BATCH):
        connection.hub.turns.wait(functools.partial(_answer_notified, exchange))
    else:
        exchange.answer(204, b"")


def answer_metrics(manager: EndpointHub, exchange: Exchange, body: bytes) -> None:
    """GET /metrics: Prometheus text format 0.0.4."""
    from karna.metrics import describe

    doors = {"raw": len(manager.raw), "socket.io": len(manager.sessions)}
    states = {name: service.state for name, service in manager.services.items()}
    text = describe(manager, doors, states, manager.commands.done)
    exchange.answer(200, text, "text/plain; version=0.0.4; charset=utf-8")
