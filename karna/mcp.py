"""Model Context Protocol: a program's commands as tools of every assistant, on `POST /mcp`.

Two eras are spoken on the one path. Modern (2026-07-28): a request says everything itself, its
headers mirror its body, and who closes the answer's stream cancels. Legacy (2025-03-26 to
2025-11-25): `initialize` first, and a notification cancels. One JSON-RPC message a POST; its answer
is one object, or from the first report of progress on a stream of events.

Nothing is kept between requests but what must be: consents that were used, and legacy requests that
run. Touches the exchanges it answers and the commands of the manager; loaded with the first
assistant. "Source" names a page of the specification's revision 2026-07-28.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Container, Mapping
from typing import Any

from orjson import OPT_SORT_KEYS, JSONDecodeError, dumps, loads

from karna.calls import Request, submit
from karna.command import Call, Command
from karna.consent import Consents, consent_request, decision_of
from karna.envelopes import NOT_JSON, REQUEST_FAILED, UNENCODABLE, UNENCODABLE_PROGRESS
from karna.envelopes import encode_json
from karna.errors import FAULTS, CommandFailed, RequestError, UsageError
from karna.http import Exchange, HttpClient
from karna.log import log
from karna.text import encodable, one_line
from karna.tools import content_of, describe_progress, describe_tool, name_tools

MODERN = "2026-07-28"
LEGACY = ("2025-11-25", "2025-06-18", "2025-03-26")  # the newest first
SUPPORTED = [MODERN, *LEGACY]

# Keys of `_meta` (basic/index, "_meta").
VERSION_KEY = "io.modelcontextprotocol/protocolVersion"
CAPABILITIES_KEY = "io.modelcontextprotocol/clientCapabilities"
CLIENT_KEY = "io.modelcontextprotocol/clientInfo"
SERVER_KEY = "io.modelcontextprotocol/serverInfo"

# Error codes (basic/index, "Error Codes"), and what metrics call them.
PARSE_ERROR, INVALID_REQUEST, NO_METHOD, INVALID_PARAMS = -32700, -32600, -32601, -32602
HEADER_MISMATCH, NO_CAPABILITY, NO_VERSION = -32020, -32021, -32022
INTERNAL_ERROR = -32603
CODES = {
    PARSE_ERROR: "invalid_json", NO_METHOD: "unknown_method", INVALID_PARAMS: "invalid_params",
    INTERNAL_ERROR: "internal_error",
}  # fmt: skip

# Of lists (server/utilities/caching): tools change when a program is started anew.
CACHEABLE = {"ttlMs": 10_000, "cacheScope": "private"}
MAX_DETACHED = 32  # commands that go on without their legacy client; with more, leaving cancels


class ProtocolError(RequestError):
    """A message that is answered with a JSON-RPC error.

    Its HTTP status is 400 where the specification says so, for what is wrong with the envelope.
    """

    def __init__(self, id: Any, number: int, message: str, status: int = 400, **data: Any) -> None:
        super().__init__(message, code=CODES.get(number, "invalid_request"), status=status)
        error = {"code": number, "message": encodable(message), **({"data": data} if data else {})}
        self.body = dumps({"jsonrpc": "2.0", "id": id, "error": error})


# --- one message ---------------------------------------------------------------------------------


class McpClient(HttpClient):
    """Who sent one message, for as long as it is answered."""

    __slots__ = ("on_leave",)
    door = "mcp"

    def __init__(self, exchange: Exchange, manager: Any) -> None:
        super().__init__(exchange, manager)
        self.on_leave: Callable[[], bool] | None = None  # true: what it began goes on

    def cancel_calls(self) -> None:
        if self.on_leave is None or not self.on_leave():
            super().cancel_calls()


class McpRequest(Request):
    """One JSON-RPC request or notification, and its answer as MCP wants it.

    Whatever a tool's command ends with is a result: the model is to read it and do better.
    """

    __slots__ = (
        "exchange", "is_modern", "mcp", "meta", "method", "params", "progress_at", "session",
    )  # fmt: skip
    client: McpClient

    def __init__(self, mcp: Mcp, exchange: Exchange, message: dict[str, Any], size: int) -> None:
        super().__init__(McpClient(exchange, mcp.manager), message.get("id"), None, size)
        self.mcp = mcp
        self.exchange = exchange
        self.method: str = message["method"]
        self.params = self._object(message.get("params"), "params")
        self.meta = self._object(self.params.get("_meta"), "_meta")
        self.is_modern = self._find_era()
        self.progress_at = -1.0
        self.session: str | None = exchange.head.headers.get("mcp-session-id")

    def _object(self, value: Any, name: str) -> dict[str, Any]:
        if value is None:
            return {}
        if type(value) is not dict:
            raise self.error(INVALID_PARAMS, f'"{name}" must be an object', status=400)
        return value

    def error(self, number: int, message: str, status: int = 200, **data: Any) -> ProtocolError:
        """The error that answers this message, to be raised."""
        return ProtocolError(self.id, number, message, status, **data)

    # The envelope.

    def _find_era(self) -> bool:
        """Is it a message of the modern era? (basic/versioning, "Backward Compatibility")"""
        version = self.exchange.head.headers.get("mcp-protocol-version")
        if VERSION_KEY in self.meta and self.meta[VERSION_KEY] not in LEGACY:
            return True
        if self.method == "initialize" or version is None or version in LEGACY:
            return False
        if version == MODERN:
            return True
        raise self._unsupported(version)

    def _unsupported(self, version: Any) -> ProtocolError:
        message = "unsupported protocol version"
        return self.error(NO_VERSION, message, 400, supported=SUPPORTED, requested=version)

    def check_envelope(self) -> None:
        """A modern request's `_meta` is whole and its headers say the same. Raises ProtocolError.

        Sources: basic/index, "Per-request protocol fields"; basic/transports/streamable-http,
        "Server Validation". The order is that of the SDKs.
        """
        version = self.meta.get(VERSION_KEY)
        if type(version) is not str or type(self.meta.get(CAPABILITIES_KEY)) is not dict:
            message = f'"_meta" must have {VERSION_KEY} and {CAPABILITIES_KEY}'
            raise self.error(INVALID_PARAMS, message, status=400)
        self._check_header("mcp-protocol-version", version)
        self._check_header("mcp-method", self.method)
        if self.method == "tools/call" and "name" in self.params:
            self._check_header("mcp-name", self.params["name"])
        if version != MODERN:
            raise self._unsupported(version)

    def _check_header(self, name: str, wanted: Any) -> None:
        given = self.exchange.head.headers.get(name)  # one that is repeated holds a comma
        if name == "mcp-name" and given is not None:
            given = decode_header(given)
        if given is None or given != wanted:
            message = f"header mismatch: one {name} must say what the body says"
            raise self.error(HEADER_MISMATCH, message, status=400)

    # Its answer.

    def complete(self, result: Mapping[str, Any]) -> bytes:
        """The answer with this result. Raises TypeError for what JSON can't hold."""
        return self.wrap(encode_json(self.mcp.whole(result, self.is_modern)))

    def wrap(self, result: bytes) -> bytes:
        """The answer with this result, which is whole and encoded."""
        return b'{"jsonrpc":"2.0","id":%b,"result":%b}' % (dumps(self.id), result)

    def result(self, value: Any) -> bytes | None:
        try:
            return self.complete(content_of(value))
        except NOT_JSON:
            return self.fail("command_failed", UNENCODABLE)

    def fail(self, code: str, message: str, data: Mapping[str, Any] | None = None) -> bytes | None:
        content = [{"type": "text", "text": encodable(message)}]
        return self.complete({"content": content, "isError": True})

    def progress(self, value: Any) -> None:
        """Send one report, if it was asked for and the client takes a stream."""
        token = self.meta.get("progressToken")
        if type(token) not in (str, int) or not self.takes_stream:
            return
        report = describe_progress(value, self.progress_at)
        self.progress_at = report["progress"]
        params = {"progressToken": token, **report}
        try:
            event = dumps({"jsonrpc": "2.0", "method": "notifications/progress", "params": params})
        except NOT_JSON:
            raise CommandFailed(UNENCODABLE_PROGRESS) from None
        self.exchange.send_event(event)

    @property
    def takes_stream(self) -> bool:
        """Does the client take an event stream?"""
        accepted = self.exchange.head.headers.get("accept", "")
        return "text/event-stream" in accepted or "*/*" in accepted

    def deliver(self, answer: bytes | None) -> None:
        self.mcp.forget(self)
        if answer is not None and self.exchange.is_streaming:
            self.exchange.end_stream(answer)
        elif answer is not None:
            self.exchange.answer(200, answer)


def decode_header(value: str) -> str | None:
    """A header's value, from its Base64 form if it has that; None for a malformed one.

    Source: basic/transports/streamable-http, "Value Encoding".
    """
    if not (value.startswith("=?base64?") and value.endswith("?=")):
        return value if value.isascii() else None
    given = value[len("=?base64?") : -len("?=")]
    try:
        decoded = base64.b64decode(given, validate=True)
        is_canonical = base64.b64encode(decoded).decode() == given
        return decoded.decode() if is_canonical else None
    except ValueError:  # binascii.Error and UnicodeDecodeError are
        return None


# --- the door ------------------------------------------------------------------------------------


class Mcp:
    """The MCP door of a manager: its tools, and what must be remembered between requests."""

    def __init__(self, manager: Any, version: str) -> None:
        self.manager = manager
        self.info = {"name": "karna-ws", "version": version}
        self.consents = Consents()
        self.running: dict[tuple[str, Any], McpRequest] = {}  # legacy ones, by session and id
        self.detached: set[McpRequest] = set()  # those whose client is gone
        self._revision = -1
        self._tools: dict[str, Command] = {}
        self._lists: dict[bool, bytes] = {}  # the result of tools/list, by era

    def answer(self, exchange: Exchange, body: bytes) -> None:
        """Answer one POST, now or later. Raises RequestError."""
        try:
            message = loads(body)
        except JSONDecodeError:
            raise ProtocolError(None, PARSE_ERROR, "the body is not JSON in UTF-8") from None
        check_message(message)
        if "method" not in message:  # an answer to a request of ours: we make none
            return exchange.answer(202, b"")
        request = McpRequest(self, exchange, message, len(body))
        if "id" not in message:
            self._take_notification(request)
            return exchange.answer(202, b"")
        answer = self._answer_request(request)
        if answer is not None:
            request.deliver(answer)

    def _take_notification(self, request: McpRequest) -> None:
        """In the modern era there are none over HTTP (streamable-http, "Sending Messages")."""
        self._count(request, NOTIFICATIONS)
        if not request.is_modern and request.method == "notifications/cancelled":
            self._cancel(request.session, request.params.get("requestId"))

    def _answer_request(self, request: McpRequest) -> bytes | None:
        if request.is_modern:
            request.check_envelope()
        methods = MODERN_METHODS if request.is_modern else LEGACY_METHODS
        self._count(request, methods)
        method = methods.get(request.method)
        if method is None:
            message = f"no such method; there are {', '.join(methods)}"
            raise request.error(NO_METHOD, message, status=404 if request.is_modern else 200)
        try:
            return method(self, request)
        except RequestError:
            raise
        except FAULTS as exc:
            self.manager.log_error(f"{request.client.id} mcp request failed", exc)
            raise request.error(INTERNAL_ERROR, REQUEST_FAILED) from None

    def _count(self, request: McpRequest, known: Container[str]) -> None:
        method = request.method if request.method in known else "other"  # they may make up many
        self.manager.metrics.mcp_requests["modern" if request.is_modern else "legacy", method] += 1

    # Tools.

    def tools(self) -> dict[str, Command]:
        """The commands that are tools, by the tools' names."""
        commands = self.manager.commands
        if self._revision != commands.revision:
            self._tools = name_tools(commands.distinct())
            self._lists.clear()
            self._revision = commands.revision
        return self._tools

    def list_tools(self, is_modern: bool) -> bytes:
        """The result of tools/list, encoded; the same until a command is added."""
        tools = self.tools()
        if is_modern not in self._lists:
            result: dict[str, Any] = {"tools": [describe_tool(*item) for item in tools.items()]}
            result |= CACHEABLE if is_modern else {}
            self._lists[is_modern] = encode_json(self.whole(result, is_modern))
        return self._lists[is_modern]

    def whole(self, result: Mapping[str, Any], is_modern: bool) -> Mapping[str, Any]:
        """A result with what every one has (basic/index, "Result Responses" and "_meta")."""
        if not is_modern:
            return result
        return {"resultType": "complete", **result, "_meta": {SERVER_KEY: self.info}}

    def greet(self, request: McpRequest, client: Any) -> None:
        """Log who comes, in the words it has for itself."""
        if type(client) is dict and self.manager.log_gate.admits("mcp client"):
            era = "modern" if request.is_modern else "legacy"
            name = one_line(f"{client.get('name')} {client.get('version')}", 80)
            log.info("%s is an assistant by mcp (%s): %s", request.client.id, era, name)

    # Requests that run.

    def keep(self, request: McpRequest) -> None:
        """A request's command runs: the stream of its answer is kept alive, and it can be ended."""
        if request.takes_stream:
            request.exchange.allow_stream()
        if request.is_modern:  # who closes the stream cancels (basic/patterns/cancellation)
            request.exchange.ends_with_peer = True
            return
        request.client.on_leave = lambda: self._detach(request)
        if request.session is not None:
            self.running[request.session, request.id] = request

    def _detach(self, request: McpRequest) -> bool:
        """A legacy client is gone, which does not cancel (2025-11-25, basic/transports)."""
        if request.client.calls is None or len(self.detached) >= MAX_DETACHED:
            self.forget(request)
            return False
        self.detached.add(request)
        return True

    def forget(self, request: McpRequest) -> None:
        """It has its answer."""
        if request.session is not None and self.running:
            key = request.session, request.id
            if self.running.get(key) is request:
                del self.running[key]
        self.detached.discard(request)
        request.client.on_leave = None  # which holds the request

    def _cancel(self, session: str | None, wanted: Any) -> None:
        """Cancel what the same session asked under this id; else it is ignored.

        Ids are small numbers, and all hosts of a machine have one address: the session id, which
        is ours and cannot be guessed, says whose they are.
        """
        if session is None or type(wanted) not in (str, int):
            return
        request = self.running.get((session, wanted))
        if request is not None and request.client.calls is not None:
            request.client.calls.cancel(request.client, request.id)

    def stop(self) -> None:
        """The server stops: nobody waits for what is detached."""
        for request in tuple(self.detached):
            if request.client.calls is not None:
                request.client.calls.stop(request.client)


def check_message(message: Any) -> None:
    """One JSON-RPC message is taken, and no batch. Raises ProtocolError."""
    if type(message) is not dict or message.get("jsonrpc") != "2.0":
        text = 'the body must be one JSON-RPC message, {"jsonrpc": "2.0", ...}'
        raise ProtocolError(None, INVALID_REQUEST, text)
    if "id" in message and type(message["id"]) not in (str, int):
        raise ProtocolError(None, INVALID_REQUEST, '"id" must be a string or an integer')
    is_answer = "method" not in message and ("result" in message or "error" in message)
    if not is_answer and type(message.get("method")) is not str:
        raise ProtocolError(message.get("id"), INVALID_REQUEST, '"method" must be a string')


def discover(mcp: Mcp, request: McpRequest) -> bytes:
    """server/discover: versions and capabilities (server/discover)."""
    mcp.greet(request, request.meta.get(CLIENT_KEY))
    offered: dict[str, Any] = {"supportedVersions": SUPPORTED, "capabilities": {"tools": {}}}
    return request.complete(offered | CACHEABLE)


def initialize(mcp: Mcp, request: McpRequest) -> None:
    """initialize of the legacy era: the version that was asked for, or the newest we have.

    The session id is a name for the client's ids, nothing more: none is ever refused, so that a
    restart ends no session.
    """
    mcp.greet(request, request.params.get("clientInfo"))
    wanted = request.params.get("protocolVersion")
    version = wanted if wanted in LEGACY else LEGACY[0]
    result: Any = {"protocolVersion": version, "capabilities": {"tools": {}}}
    result["serverInfo"] = mcp.info
    headers = {"Mcp-Session-Id": os.urandom(16).hex()}
    headers["Access-Control-Expose-Headers"] = "Mcp-Session-Id"  # to a page of an allowed origin
    request.exchange.answer(200, request.complete(result), headers=headers)


def ping(mcp: Mcp, request: McpRequest) -> bytes:
    """ping of the legacy era."""
    return request.complete({})


def list_tools(mcp: Mcp, request: McpRequest) -> bytes:
    """tools/list: all on one page."""
    if request.params.get("cursor") is not None:
        raise request.error(INVALID_PARAMS, "no such cursor: there is one page")
    return request.wrap(mcp.list_tools(request.is_modern))


def call_tool(mcp: Mcp, request: McpRequest) -> bytes | None:
    """tools/call: run the command. Its limits and its end are those of every other door."""
    name, arguments = request.params.get("name"), request.params.get("arguments")
    arguments = {} if arguments is None else arguments
    if type(name) is not str or type(arguments) is not dict:
        message = '"name" must be a string and "arguments" an object'
        raise request.error(INVALID_PARAMS, message)
    command = mcp.tools().get(name)
    if command is None:
        message = f"no tool {one_line(name, 64)!r}; tools/list lists them"
        raise request.error(INVALID_PARAMS, message)
    try:
        if command.confirm:
            asked = ask_consent(mcp, request, name, command, arguments)
            if asked is not None:
                return asked
        answer = submit(request, bind_tool, command, arguments)
    except ProtocolError:
        raise
    except FAULTS as exc:
        return request.refuse(exc)
    if answer is None:
        mcp.keep(request)
    return answer


def bind_tool(command: Command, arguments: Mapping[str, Any]) -> Call:
    """A call of a tool. Raises UsageError."""
    return Call(command, *command.bind([], arguments))


def ask_consent(
    mcp: Mcp, request: McpRequest, name: str, command: Command, arguments: dict[str, Any]
) -> bytes | None:
    """Ask a person whether the tool may run; None once one has agreed. Raises RequestError."""
    bind_tool(command, arguments)  # what can't run is not asked about
    check_can_ask(request, name)
    state, call = request.params.get("requestState"), dumps([name, arguments], None, OPT_SORT_KEYS)
    if state is not None:
        if not mcp.consents.is_ours(state, call):
            raise request.error(INVALID_PARAMS, "requestState is not that of this call")
        decision = decision_of(request.params.get("inputResponses"))
        if decision is not None and not mcp.consents.take(state):
            raise request.error(INVALID_PARAMS, "this consent has been used, or has expired")
        if decision == "accept":
            return None
        if decision is not None:
            return request.fail("forbidden", f"{name} was not run: a person did not agree")
    asked = {"inputRequests": consent_request(name, arguments)}
    return request.complete(
        {**asked, "resultType": "input_required", "requestState": mcp.consents.begin(call)}
    )


def check_can_ask(request: McpRequest, name: str) -> None:
    """Is there a way to ask a person through this client? Raises RequestError."""
    if not request.is_modern:
        message = "has to be confirmed by a person, which needs MCP 2026-07-28 with elicitation"
        raise UsageError(f"{name} {message}; or run it from the console page")
    asks = request.meta[CAPABILITIES_KEY].get("elicitation")
    # An empty object means forms (client/elicitation, "Capabilities").
    if type(asks) is not dict or (asks and "form" not in asks):
        message = f"{name} has to be confirmed by a person, and this client can't ask one"
        needed: Any = {"elicitation": {"form": {}}}
        raise request.error(NO_CAPABILITY, message, 400, requiredCapabilities=needed)


Method = Callable[[Mcp, McpRequest], bytes | None]
MODERN_METHODS: dict[str, Method] = {
    "server/discover": discover, "tools/list": list_tools, "tools/call": call_tool,
}  # fmt: skip
LEGACY_METHODS: dict[str, Method] = {
    "initialize": initialize, "ping": ping, "tools/list": list_tools, "tools/call": call_tool,
}  # fmt: skip
NOTIFICATIONS = ("notifications/initialized", "notifications/cancelled")
