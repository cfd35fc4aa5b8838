"""JSON-RPC 2.0: the same methods under another form of request and answer.

Spoken by the raw door and by `POST /rpc`. Which methods there are, and what they do, is given by
the top: `handle` runs one request, `parameters` names what a method takes by position.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from orjson import dumps

from karna.calls import Client, Request, count_waiting
from karna.connection import MAX_MESSAGES
from karna.door import HOLD_BATCH
from karna.envelopes import encode_json
from karna.trace import answered

MAX_BATCH = 256  # requests in one message

CODES = {
    "invalid_json": -32700, "invalid_request": -32600, "unknown_method": -32601,
    "invalid_params": -32602, "internal_error": -32603, "command_failed": -32000,
    "unknown_command": -32001, "usage": -32002, "timeout": -32003, "cancelled": -32004,
    "unavailable": -32005, "too_large": -32006, "unauthorized": -32007, "forbidden": -32008,
    "history_gap": -32009,
}  # fmt: skip
ID_TYPES = frozenset((int, str, type(None)))


class Methods(NamedTuple):
    """What the top gives: how a request is run, and the parameters of a method in their order."""

    handle: Callable[[Request, dict[str, Any]], bytes | None]
    parameters: Callable[[str], Sequence[str] | None]  # None: there is no such method


class JsonRpcRequest(Request):
    """A JSON-RPC 2.0 request or notification; in a batch its answer goes there."""

    __slots__ = ("batch", "is_notification")

    def __init__(self, client: Client, message: Any, size: int, batch: Batch | None) -> None:
        wanted = message.get("id") if isinstance(message, dict) else None
        super().__init__(client, wanted, None, size)
        self.batch = batch
        self.is_notification = is_notification(message)

    def encode(self, type: str, data: Any) -> bytes | None:
        if type == "command_progress":
            return self._encode_progress(data)
        if self.is_notification:
            return None
        if type != "error":
            return encode_json({"jsonrpc": "2.0", "result": data, "id": self.id})
        details = dict(data)
        code = CODES.get(details["code"], -32000)
        error = {"code": code, "message": details.pop("message"), "data": details}
        return encode_json({"jsonrpc": "2.0", "error": error, "id": self.id})

    def _encode_progress(self, data: dict[str, Any]) -> bytes | None:
        if self.is_notification or self.batch is not None or self.client.door == "http":
            return None
        params = {**data, "id": self.id}
        return encode_json({"jsonrpc": "2.0", "method": "command_progress", "params": params})

    def answer_status(self, envelope: bytes, status: bytes) -> bytes | None:
        if self.trace is not None:
            answered(self, "ok")
        if self.is_notification:
            return None
        return b'{"jsonrpc":"2.0","result":%b,"id":%b}' % (status, dumps(self.id))

    def deliver(self, answer: bytes | None) -> None:
        super().deliver(answer if self.batch is None else self.batch.add(answer))


class Batch:
    """The requests of one batch, handled some a turn, and their answers, sent together."""

    __slots__ = (
        "_answers", "_client", "_item_bytes", "_items", "_kept_bytes", "_methods", "_wanted",
    )  # fmt: skip

    def __init__(self, client: Client, items: list[Any], item_bytes: int, methods: Methods) -> None:
        self._client = client
        self._items = iter(items)
        self._item_bytes = item_bytes  # of one on average, for the bound on what waits
        self._methods = methods
        self._answers: list[bytes] = []
        self._kept_bytes = 0  # of them
        self._wanted = sum(not is_notification(item) for item in items)

    def add(self, answer: bytes | None) -> bytes | None:
        """Add one answer; the whole batch once it is complete."""
        if answer is None:
            return None
        self._answers.append(answer)
        connection = self._client.connection
        if len(self._answers) < self._wanted:  # as long as one of them runs the others are kept
            self._kept_bytes += len(answer)
            count_waiting(connection, 0, len(answer))
            return None
        count_waiting(connection, 0, -self._kept_bytes)
        return b"[" + b",".join(self._answers) + b"]"

    def go_on(self) -> bytes | None:
        """Handle the next requests; the whole answer, if it is complete by then."""
        whole, connection = None, self._client.connection
        for item in itertools.islice(self._items, MAX_MESSAGES):
            request = JsonRpcRequest(self._client, item, self._item_bytes, self)
            whole = self.add(_handle_one(request, item, self._methods)) or whole
        if operator.length_hint(self._items):
            connection.hold(HOLD_BATCH)
            connection.hub.turns.wait(self._have_turn)
        return whole

    def _have_turn(self) -> None:
        self._client.connection.release(HOLD_BATCH)
        if self._client.is_present:
            whole = self.go_on()
            if whole is not None:
                self._client.connection.allow(len(whole))
                self._client.deliver(whole, None)


def is_json_rpc(message: Any) -> bool:
    """Does anything in this message say that it is JSON-RPC?"""
    items = message[:MAX_BATCH] if isinstance(message, list) else [message]
    return any(isinstance(item, dict) and "jsonrpc" in item for item in items)


def is_notification(message: Any) -> bool:
    """Is this a notification, which gets no answer?"""
    if not isinstance(message, dict) or "id" in message:
        return False
    return message.get("jsonrpc") == "2.0" and isinstance(message.get("method"), str)


def handle_json_rpc(client: Client, message: Any, size: int, methods: Methods) -> bytes | None:
    """Answer a request or a batch, now or later."""
    if not isinstance(message, list):
        return _handle_one(JsonRpcRequest(client, message, size, None), message, methods)
    if not message or len(message) > MAX_BATCH:
        request = JsonRpcRequest(client, None, size, None)
        return request.fail("invalid_request", f"a batch holds 1 to {MAX_BATCH} requests")
    return Batch(client, message, size // len(message), methods).go_on()


def refuse_json(client: Client, size: int) -> bytes | None:
    """The answer to a message that is no JSON."""
    request = JsonRpcRequest(client, None, size, None)
    return request.fail("invalid_json", "the message is not valid JSON in UTF-8")


def _handle_one(request: JsonRpcRequest, message: Any, methods: Methods) -> bytes | None:
    if not isinstance(message, dict) or message.get("jsonrpc") != "2.0":
        if type(request.id) not in ID_TYPES:
            request.id = None
        return request.fail("invalid_request", 'a request is an object with "jsonrpc": "2.0"')
    method, params = message.get("method"), message.get("params")
    if isinstance(params, list) and isinstance(method, str):
        names = methods.parameters(method)
        if names is not None and len(params) > len(names):
            return request.fail("invalid_params", f"at most {len(names)} params by position")
        message = {**message, "params": dict(zip(names or (), params, strict=False))}
    return methods.handle(request, message)
