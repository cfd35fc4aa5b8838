"""The contract of Karna WS, told once through its doors, in the order of the protocol:

the doors on the one port, the envelope, errors, methods, order, JSON-RPC 2.0, the status object,
the Socket.IO door, recovery, slow and hostile clients, who may come in, scale-out, the life of the
process, and the names that other programs rely on.

Every test here is a client: a WebSocket, an HTTP request, a started process. What stands behind the
doors is tested room by room in `tests/`, real clients and servers in `tests/real/`; the rules of
all these tests are in `tests/support.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from karna.errors import StartError
from karna_ws import Client, WebSocketManager, serving
from services import CommandProcessor, Context
from support import (
    EXECUTE,
    Gate,
    Lamp,
    Raw,
    Sio,
    rpc_error,
    execute,
    failing_manager,
    http,
    limit_for,
    offsets,
    rpc_result,
    rpc_manager,
    served,
    until,
    without_words,
)
from support_peers import (
    DOORS,
    ENGINE,
    TOKEN,
    WELCOMED,
    EchoManager,
    ask,
    close_frame,
    dial,
    engine,
    frame,
    get_metrics,
    head,
    in_fragments,
    post,
    raw,
    request,
    upgrade,
)
from support_process import process, run_to_end
from support_redis import RedisServer, both_doors, following, node


# --- The doors on the one port ---------------------------------------------------------------------


async def test_raw_door_takes_text_and_binary_frames_and_answers_text() -> None:
    async with served() as server, Raw.open(server, "/ws/") as client:
        request = execute("echo grüße 🗝", id=1)
        await client.send(orjson.dumps(request), orjson.dumps(request).decode(), b" \n" + b"{}")
        one, two, three = [await client.next() for _ in range(3)]
        assert (
            one
            == two
            == {
                "type": "command_response",
                "data": {"command": "echo grüße 🗝", "result": "grüße 🗝"},
                "id": 1,
            }
        )
        assert three["data"]["code"] == "invalid_request"


@pytest.mark.parametrize("path", ["/socket.io/", "/socket.io", "/ws", "/ws/", "/anything/else"])
async def test_engine_session_opens_on_any_path(path: str) -> None:
    async with (
        served() as server,
        Sio.open(server, path=f"{path}?transport=websocket&EIO=4", join="/ws") as client,
    ):
        assert (await client.rpc(execute("echo hi"), namespace="/ws"))["data"]["result"] == "hi"


async def test_health_tells_which_service_failed() -> None:
    lamp = Lamp()
    manager = WebSocketManager(services=[lamp])
    async with served(manager) as server:
        assert await http(server, "GET", "/health") == (200, {"status": "healthy"})
        lamp.set_state("degraded", "one bulb is out")
        assert (await http(server, "GET", "/health"))[0] == 200
        lamp.set_state("failed", "dark")
        status, answer = await http(server, "GET", "/health")
        assert (status, answer["status"]) == (503, "unhealthy")
        assert answer["services"] == {"lamp": lamp.get_status()}
        lamp.set_state("running")
        assert (await http(server, "GET", "/health"))[0] == 200


async def test_rest_executes_a_command_as_the_raw_door_would() -> None:
    manager = WebSocketManager()

    @manager.commands.command
    async def greet(name: str, *, times: int = 1) -> str:
        return " ".join([f"hello {name}"] * times)

    async with served(manager) as server, Raw.open(server) as client:
        body = {"command": "greet", "name": "Ada", "times": 2}
        status, answer = await http(server, "POST", "/api/execute_command", body)
        assert status == 200
        assert answer == {
            "type": "command_response",
            "data": {"command": "greet", "result": "hello Ada hello Ada"},
        }
        await client.send({"method": EXECUTE, "params": body})
        assert await client.next() == answer
        status, answer = await http(
            server, "POST", "/api/execute_command", {"command": "countdown 0.01"}
        )
        assert (status, answer["data"]["result"]["percent"]) == (200, 100), "no progress"


@pytest.mark.parametrize("level", ["info", "warning", "error", None])
async def test_rest_notify_broadcasts_and_counts(level: str | None) -> None:
    async with (
        served() as server, Raw.open(server) as raw, Sio.open(server, join="/ws") as client
    ):  # fmt: skip
        body = {"message": "build done"} | ({"level": level} if level else {})
        assert await http(server, "POST", "/api/notify", body) == (202, {"clients": 2})
        data = (await raw.next_of("notification"))["data"]
        assert (data["message"], data["level"]) == ("build done", level or "info")
        assert (await client.packet("42/ws,"))[1]["data"] == data


async def test_head_answers_as_get_without_the_body() -> None:
    async with served() as server:
        for path in ("/", "/health", "/api/status", "/nowhere", "/ws", "/rpc"):
            get = await ask(server.port, head("GET", path))
            without = await ask(server.port, head("HEAD", path))
            assert (without.status, without.body) == (get.status, b"")
            assert without.headers["content-type"] == get.headers["content-type"]
            assert without.headers["content-length"] == get.headers["content-length"]


async def test_refusals_tell_what_would_be_right() -> None:
    async with served() as server:
        port = server.port
        doors = (await ask(port, head("GET", "/nowhere"))).error["doors"]
        assert {"/ws", "/socket.io/", "/health", "/api/execute_command"} <= set(doors)
        for target, allow in (("/health", "GET, HEAD, OPTIONS"), ("/rpc", "POST, OPTIONS")):
            answer = await ask(port, head("DELETE", target))
            assert (answer.status, answer.headers["allow"]) == (405, allow)
            options = await ask(port, head("OPTIONS", target))
            assert (options.status, options.headers["allow"]) == (204, allow)
        answer = await ask(port, upgrade(headers={"Sec-WebSocket-Version": "12"}))
        assert (answer.status, answer.headers["upgrade"]) == (426, "websocket")
        assert answer.headers["sec-websocket-version"] == "13"  # RFC 6455, 4.2.2
        old = await ask(port, head("GET", "/health").replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert (old.status, old.json) == (200, {"status": "healthy"})


# --- The envelope ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "id", ["x", "", "0", "\x00", "ключ 🗝", "a" * 1000, 0, 1, -1, 2**53 + 1, 2**63 - 1, -(2**63),
           2**64 - 1],
    ids=lambda id: repr(id)[:24],
)  # fmt: skip
async def test_raw_answer_repeats_the_id_as_it_was(id: str | int) -> None:
    async with served() as server, Raw.open(server) as client:
        for request, kind in (
            ({"method": "get_status", "id": id}, "status_update"),
            (execute("echo hi") | {"id": id}, "command_response"),
            (execute("countdown 0") | {"id": id}, "command_response"),
            (execute("nope") | {"id": id}, "error"),
            ({"method": "nope", "id": id}, "error"),
            ({"method": 5, "id": id}, "error"),
        ):
            await client.send(request)
            answer = await client.next_where(lambda each: each["type"] != "command_progress")
            assert answer["type"] == kind
            assert answer["id"] == id and isinstance(answer["id"], type(id))
            client.kept.clear()


async def test_raw_answer_has_no_id_when_the_request_had_none_or_null() -> None:
    async with served() as server, Raw.open(server) as client:
        for id in ({}, {"id": None}):
            for request in ({"method": "get_status"}, execute("echo hi"), {"method": "nope"}):
                await client.send(request | id)
                assert "id" not in await client.next()


async def test_progress_comes_before_the_response_and_the_last_is_the_result() -> None:
    manager = WebSocketManager()

    @manager.commands.command
    async def steps(count: int) -> AsyncIterator[int]:
        for number in range(count):
            yield number

    @manager.commands.command
    async def told(context: Context) -> str:
        await context.progress({"half": True})
        return "done"

    @manager.commands.command
    def told_by_thread(context: Context) -> str:
        context.report("from a thread")
        return "done"

    async with served(manager) as server, Raw.open(server) as client:
        for line, reports, result in (
            ("steps 3", [0, 1, 2], 2), ("steps 0", [], None), ("told", [{"half": True}], "done"),
            ("told_by_thread", ["from a thread"], "done"),
        ):  # fmt: skip
            for request in (execute(line, id="p"), execute(line)):
                await client.send(request)
                id = {key: request[key] for key in request if key == "id"}
                for report in reports:
                    data = {"command": line, "progress": report}
                    assert await client.next() == {"type": "command_progress", "data": data, **id}
                data = {"command": line, "result": result}
                assert await client.next() == {"type": "command_response", "data": data, **id}


@pytest.mark.parametrize("level", ["info", "warning", "error"])
async def test_notification_has_message_level_and_time(level: str) -> None:
    manager = WebSocketManager()
    async with served(manager) as server, Raw.open(server) as client:
        manager.notify("build done", level)
        found = await client.next_of("notification")
        assert found["offset"] == manager.history.last
        assert found["data"].pop("time").endswith("Z")
        assert found["data"] == {"message": "build done", "level": level}


# --- Errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "invalid_json"), (b"{", 400, "invalid_json"), (b"\xff", 400, "invalid_json"),
        (b"[" * 5000, 400, "invalid_json"),
        ([], 400, "invalid_request"), ("x", 400, "invalid_request"), (b"null", 400,
                                                                      "invalid_request"),
        ({}, 400, "invalid_params"), ({"command": 5}, 400, "invalid_params"),
        ({"command": " "}, 400, "invalid_params"),
        ({"command": "countdown"}, 400, "usage"), ({"command": "echo", "x": 1}, 400, "usage"),
        ({"command": "nope"}, 404, "unknown_command"),
        ({"command": "fail value"}, 500, "command_failed"),
        ({"command": "fail exit"}, 500, "command_failed"),
        ({"command": "fail_inline"}, 500, "command_failed"),
        ({"command": "give bytes"}, 500, "command_failed"),
        ({"command": "fail away"}, 503, "unavailable"), ({"command": "ask x"}, 503, "unavailable"),
        ({"command": "forever"}, 504, "timeout"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
async def test_rest_command_that_fails_has_a_fitting_status(
    body: Any, status: int, code: str
) -> None:
    async with served(failing_manager(), command_timeout_s=limit_for(code)) as server:
        answer = await http(server, "POST", "/api/execute_command", body)
        assert (answer[0], answer[1]["type"], answer[1]["data"]["code"]) == (status, "error", code)
        assert "Traceback" not in json.dumps(answer[1])
        assert (await http(server, "GET", "/health"))[0] == 200


async def test_message_handler_that_fails_answers_an_internal_error() -> None:
    class Broken(WebSocketManager):
        def handle_message(self, client: Client, payload: bytes, is_text: bool) -> Any:
            raise LookupError("bug")

    async with served(Broken(), logs_errors=True) as server, Raw.open(server) as client:
        for _ in range(2):
            await client.send("x")
            assert (await client.next())["data"]["code"] == "internal_error"


# --- Methods ---------------------------------------------------------------------------------------


async def test_method_of_the_program_is_called_with_params() -> None:
    manager = failing_manager()
    seen: list[Any] = []

    @manager.method("who")
    async def who(context: Context, name: str = "nobody") -> dict[str, Any]:
        seen.append(context.client)
        await context.progress("looking")
        return {"name": name}

    @manager.method("block")
    def block() -> bool:
        return threading.current_thread() is threading.main_thread()

    @manager.method("inline", inline=True)
    def inline(*, flag: bool = True) -> bool:
        return flag and threading.current_thread() is threading.main_thread()

    with pytest.raises(ValueError, match="get_status"):
        manager.method("get_status")(inline)
    with pytest.raises(ValueError, match="inline"):
        manager.method("inline")(inline)
    async with served(manager) as server, Raw.open(server) as client:
        assert await client.ask("double", number=21) == {
            "type": "command_response", "data": 42, "id": "ask-1"
        }  # fmt: skip
        answer = await client.ask("who", name="Ada")
        assert answer["data"] == {"name": "Ada"}
        (progress,) = client.kept
        assert (progress["type"], progress["id"]) == ("command_progress", answer["id"])
        assert isinstance(seen[0], Client) and seen[0].door == "raw"
        assert (await client.ask("block"))["data"] is False
        assert (await client.ask("inline"))["data"] is True
        assert (await client.ask("inline", flag=False))["data"] is False


@pytest.mark.parametrize("id", ["x", "", 5, 0, -(2**63), 2**64 - 1])
async def test_cancel_ends_the_running_command_of_that_id(id: str | int) -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    async with served(manager) as server, Raw.open(server) as client, Raw.open(server) as other:
        await client.send(execute("gate mine") | {"id": id}, execute("gate other", id="other"))
        await other.send(execute("gate theirs") | {"id": id})
        await until(lambda: len(gate.begun) == 3)
        unlike = str(id) if isinstance(id, int) else 12345
        assert (await client.ask("cancel", id=unlike))["data"]["code"] == "invalid_params"
        assert (await client.ask("cancel", id=id))["data"] == {"cancelled": id}
        answer = await client.final(id)
        assert answer["data"] == {
            "code": "cancelled", "message": "cancelled", "command": "gate mine"
        }  # fmt: skip
        assert gate.cancelled == ["mine"]
        assert (await client.ask("cancel", id=id))["data"]["code"] == "invalid_params"
        gate.let("other", "theirs")
        assert (await client.final("other"))["data"]["result"] == "other"
        assert (await other.final(id))["data"]["result"] == "theirs"


# --- Order -----------------------------------------------------------------------------------------


async def test_commands_without_id_run_one_after_another_and_are_answered_in_order() -> None:
    manager = failing_manager()
    gate = Gate(manager)
    async with served(manager) as server, Raw.open(server) as client:
        lines = ["gate a", "nope", "echo 1", "gate b", "countdown x", "fail value", "echo 2",
                 "fail_in_thread", "gate c", "echo 3"]  # fmt: skip
        await client.send(*(execute(line) for line in lines))
        gate.let("b", "c")
        assert (await client.ask("get_status"))["type"] == "status_update", "at once"
        assert await client.run("echo with an id") == "with an id"
        assert gate.begun == ["a"] and client.kept == []
        gate.let("a")
        answers = [await client.next() for _ in lines]
        assert [answer["data"]["command"] for answer in answers] == lines
        assert gate.begun == ["a", "b", "c"] and gate.most_running == 1
        assert [answer["data"].get("code") for answer in answers] == [
            None, "unknown_command", None, None, "usage", "command_failed", None, "command_failed",
            None, None,
        ]  # fmt: skip


async def test_commands_with_id_run_concurrently() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    async with served(manager) as server, Raw.open(server) as client:
        await client.send(*(execute(f"gate {name}", id=name) for name in "abc"))
        await client.send(execute("gate serial"))
        await until(lambda: len(gate.begun) == 4)
        for name in "cab":
            gate.let(name)
            assert (await client.next())["id"] == name
        gate.let("serial")
        assert (await client.next())["data"]["result"] == "serial"


async def test_commands_beyond_the_limit_wait_in_order() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    async with (
        served(manager, max_running_commands=2) as server,
        Raw.open(server) as client, Raw.open(server) as other,
    ):  # fmt: skip
        names = ["a", "b", "c", "d", "e"]
        await client.send(*(execute(f"gate {name}", id=name) for name in names))
        await client.send(execute("echo even this waits", id="echo"))
        await until(lambda: gate.begun == ["a", "b"])
        assert (await client.ask("get_status"))["data"]["command"]["running"] == 2
        assert await other.run("echo not mine") == "not mine", "the limit is per client"
        answer = await client.ask("cancel", id="d")
        assert answer["data"] == {"cancelled": "d"}
        assert (await client.final("d"))["data"]["code"] == "cancelled"
        gate.let("c", "e", "b")
        for name in ("b", "c", "e"):
            assert (await client.next())["id"] == name
        assert (await client.next())["id"] == "echo"
        assert gate.begun == ["a", "b", "c", "e"] and gate.most_running == 2
        gate.let("a")
        assert (await client.next())["id"] == "a"


async def test_client_that_goes_away_has_its_commands_cancelled() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    async with served(manager, max_running_commands=2) as server:
        async with Raw.open(server) as other:
            await other.send(execute("gate other", id=1))
            async with Raw.open(server) as client:
                await client.send(*(execute(f"gate {name}", id=name) for name in "abc"))
                await client.send(execute("gate serial"))
                await until(lambda: len(gate.begun) == 3)
            await until(lambda: sorted(gate.cancelled) == ["a", "b"])
            async with Sio.open(server, join="/ws") as socket:
                await socket.send(f'42/ws,["rpc",{json.dumps(execute("gate socket"))}]')
                await until(lambda: len(gate.begun) == 4)
                socket.connection.transport.abort()
                await until(lambda: gate.cancelled[2:] == ["socket"])
            gate.let("other")
            assert (await other.final(1))["data"]["result"] == "other"
        assert gate.begun == ["other", "a", "b", "socket"], "what waited never began"
        await until(lambda: not manager.tasks)


# --- JSON-RPC 2.0 ----------------------------------------------------------------------------------


# Section 7 of the specification, in its order; error messages and data are ours.
JSON_RPC_EXAMPLES: list[tuple[str, str, Any]] = [
    ("positional", '{"jsonrpc": "2.0", "method": "subtract", "params": [42, 23], "id": 1}',
     rpc_result(19, 1)),
    ("positional, swapped", '{"jsonrpc": "2.0", "method": "subtract", "params": [23, 42], "id": 2}',
     rpc_result(-19, 2)),
    ("named", '{"jsonrpc": "2.0", "method": "subtract", '
     '"params": {"subtrahend": 23, "minuend": 42}, "id": 3}', rpc_result(19, 3)),
    ("named, swapped", '{"jsonrpc": "2.0", "method": "subtract", '
     '"params": {"minuend": 42, "subtrahend": 23}, "id": 4}', rpc_result(19, 4)),
    ("notification", '{"jsonrpc": "2.0", "method": "update", "params": [1,2,3,4,5]}', None),
    ("unknown notification", '{"jsonrpc": "2.0", "method": "foobar"}', None),
    ("unknown method", '{"jsonrpc": "2.0", "method": "foobar", "id": "1"}', rpc_error(-32601, "1")),
    ("invalid request", '{"jsonrpc": "2.0", "method": 1, "params": "bar"}', rpc_error(-32600, None)),
    ("batch", '''[
        {"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"},
        {"jsonrpc": "2.0", "method": "notify_hello", "params": [7]},
        {"jsonrpc": "2.0", "method": "subtract", "params": [42,23], "id": "2"},
        {"foo": "boo"},
        {"jsonrpc": "2.0", "method": "foo.get", "params": {"name": "myself"}, "id": "5"},
        {"jsonrpc": "2.0", "method": "get_data", "id": "9"}
    ]''', [rpc_result(7, "1"), rpc_result(19, "2"), rpc_error(-32600, None), rpc_error(-32601, "5"),
           rpc_result(["hello", 5], "9")]),
    ("batch of notifications", '''[
        {"jsonrpc": "2.0", "method": "notify_sum", "params": [1,2,4]},
        {"jsonrpc": "2.0", "method": "notify_hello", "params": [7]}
    ]''', None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"), [each[1:] for each in JSON_RPC_EXAMPLES],
    ids=[each[0] for each in JSON_RPC_EXAMPLES],
)  # fmt: skip
async def test_json_rpc_example_of_the_specification_on_the_raw_door(
    text: str, expected: Any
) -> None:
    async with served(rpc_manager()) as server, Raw.open(server) as client:
        await client.send(text)
        if expected is None:
            assert await client.received() == []
        elif isinstance(expected, list):
            assert without_words(await client.next()) == sorted(expected, key=repr)
        else:
            assert without_words(await client.next()) == expected


# Those a raw-door message can't show, because nothing in it says that it is JSON-RPC.
JSON_RPC_HTTP_EXAMPLES: list[tuple[str, str, Any]] = [
    ("invalid JSON", '{"jsonrpc": "2.0", "method": "foobar, "params": "bar", "baz]',
     rpc_error(-32700, None)),
    ("batch, invalid JSON", '''[
        {"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"},
        {"jsonrpc": "2.0", "method"
    ]''', rpc_error(-32700, None)),
    ("empty batch", "[]", rpc_error(-32600, None)),
    ("invalid batch of one", "[1]", [rpc_error(-32600, None)]),
    ("invalid batch", "[1,2,3]", [rpc_error(-32600, None)] * 3),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"), [each[1:] for each in JSON_RPC_EXAMPLES + JSON_RPC_HTTP_EXAMPLES],
    ids=[each[0] for each in JSON_RPC_EXAMPLES + JSON_RPC_HTTP_EXAMPLES],
)  # fmt: skip
async def test_json_rpc_example_of_the_specification_over_http(text: str, expected: Any) -> None:
    async with served(rpc_manager()) as server:
        status, answer = await http(server, "POST", "/rpc", text.encode())
        if expected is None:
            assert (status, answer) == (204, b"")
        else:
            assert status == 200
            assert without_words(answer) == (
                sorted(expected, key=repr) if isinstance(expected, list) else expected
            )


async def test_json_rpc_notifications_are_carried_out() -> None:
    manager = rpc_manager()
    async with served(manager) as server, Raw.open(server) as client:
        await client.send(JSON_RPC_EXAMPLES[4][1], JSON_RPC_EXAMPLES[9][1])
        assert await client.received() == []
        await http(server, "POST", "/rpc", JSON_RPC_EXAMPLES[4][1].encode())
        assert manager.notified == [[1, 2, 3, 4, 5], 7, [1, 2, 3, 4, 5]]  # type: ignore


# --- The status object -----------------------------------------------------------------------------


SINCE = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


async def test_status_has_one_shape_everywhere() -> None:
    manager = WebSocketManager(services=[Lamp()])
    async with (
        served(manager) as server, Raw.open(server) as raw, Sio.open(server, join="/ws") as client
    ):  # fmt: skip
        status = (await raw.ask("get_status"))["data"]
        assert list(status) == ["vision", "language", "command", "lamp"]
        for entry in status.values():
            assert entry["state"] == "running"
            assert isinstance(entry["detail"], str) and "\n" not in entry["detail"]
            assert re.fullmatch(SINCE, entry["since"])
        assert status["command"].items() >= {"running": 0, "done": 0, "failed": 0}.items()
        assert (await http(server, "GET", "/api/status")) == (200, status)
        answer = await client.rpc({"method": "get_status"}, namespace="/ws")
        assert answer["data"] == status
        assert manager.status() == status


async def test_status_update_is_broadcast_on_each_change_of_a_service() -> None:
    lamp = Lamp()
    manager = WebSocketManager(services=[lamp])
    async with (
        served(manager) as server, Raw.open(server) as raw, Sio.open(server, join="/ws") as client
    ):  # fmt: skip
        changes = [("degraded", "one bulb is out"), ("degraded", "two\nbulbs"), ("failed", ""),
                   ("running", "")]  # fmt: skip
        since = []
        for state, detail in changes:
            lamp.set_state(state, detail)  # type: ignore[arg-type]
            lamp.set_state(state, detail)  # type: ignore[arg-type]  # no change, no broadcast
            update = await raw.next()
            assert update["type"] == "status_update"
            assert update["offset"] == manager.history.last
            assert list(update["data"]) == ["vision", "language", "command", "lamp"]
            entry = update["data"]["lamp"]
            assert (entry["state"], entry["detail"]) == (state, detail.replace("\n", " "))
            since.append(entry["since"])
            event = await client.packet("42/ws,")
            assert event == ["rpc_response", update, update["offset"]]
        assert since[0] == since[1], "the detail changed, the state did not"
        assert await raw.received() == []


# --- The Socket.IO door ----------------------------------------------------------------------------


async def test_engine_session_opens_with_the_fields_of_the_protocol() -> None:
    async with (
        served(max_message_bytes=5000, ping_timeout_s=7.5) as server,
        Sio.open(server) as client,
        Sio.open(server) as other,
    ):
        sid = client.handshake.pop("sid")
        assert client.handshake == {
            "upgrades": [], "pingInterval": 25000, "pingTimeout": 7500, "maxPayload": 5000,
        }  # fmt: skip
        answer = await client.join()
        second = await client.join("/ws")
        third = await other.join()
        sids = [sid, answer["sid"], second["sid"], other.handshake["sid"], third["sid"]]
        assert all(isinstance(each, str) and len(each) >= 20 for each in sids)
        assert len(set(sids)) == 5
        assert answer["pid"] not in sids


@pytest.mark.parametrize("namespace", ["/", "/ws", "/ws/", "/extra"])
@pytest.mark.parametrize("auth", [None, {}, {"token": "whatever", "name": "Ada"}])
async def test_socket_connects_to_served_namespace(namespace: str, auth: Any) -> None:
    async with (
        served(namespaces="/extra") as server,
        Sio.open(server, join=namespace, auth=auth) as client,
    ):
        answer = await client.rpc({"method": "get_status", "id": 5}, namespace=namespace, ack=3)
        assert answer["type"] == "status_update" and answer["id"] == 5


@pytest.mark.parametrize("namespace", ["/nope", "/wsx", "/ws//", "/WS", "/extra"])
async def test_socket_is_refused_other_namespaces_and_may_try_again(namespace: str) -> None:
    async with served() as server, Sio.open(server) as client:
        await client.send(f"40{namespace},")
        assert await client.packet(f"44{namespace},") == {"message": "Invalid namespace"}
        assert "sid" in await client.join("/ws")


async def test_rpc_is_answered_by_event_or_by_ack_alone() -> None:
    async with served() as server, Sio.open(server, join="/ws") as client:
        request = json.dumps(execute("echo hi", id="r"))
        envelope = {
            "type": "command_response", "data": {"command": "echo hi", "result": "hi"}, "id": "r"
        }  # fmt: skip
        await client.send(f'42/ws,["rpc",{request}]')
        assert await client.packet("42/ws,") == ["rpc_response", envelope]
        await client.send(f'42/ws,0["rpc",{request}]')
        assert await client.packet("43/ws,0") == [envelope]
        await client.send(f'42/ws,999999999999999["rpc",{request}]')
        assert await client.packet("43/ws,999999999999999") == [envelope]
        await client.send('42/ws,["rpc",{"method":"get_status"}]')
        assert (await client.packet("42/ws,"))[1]["type"] == "status_update"


async def test_unknown_event_is_acked_with_an_error_or_else_ignored() -> None:
    async with served() as server, Sio.open(server, join="/") as client:
        await client.send('42["nobody",1]', "42[7]", '425["nobody",1]', '426["nobody"]', "427[9]")
        for ack, name in ((5, "nobody"), (6, "nobody"), (7, "9")):
            (envelope,) = await client.packet(f"43{ack}")
            assert envelope["type"] == "error"
            assert envelope["data"]["code"] == "unknown_method"
            assert envelope["data"]["method"] == name


async def test_packet_1_ends_the_session() -> None:
    manager = WebSocketManager()
    async with served(manager) as server, Sio.open(server, join="/ws") as client:
        await client.send("1")
        assert (await client.closed())[0] == 1000
        await until(lambda: not manager.sessions and not manager.connections)
        assert manager.count_clients() == 0


async def test_old_socket_io_client_is_told_in_its_own_protocol() -> None:
    manager = WebSocketManager()
    path = "/socket.io/?EIO=3&transport=websocket"
    async with served(manager) as server, Sio.open(server, path=path) as client:
        assert await client.connection.recv() == "40"
        assert "socket.io-client 3 or later" in await client.packet("44/ws,")
        assert "socket.io-client 3 or later" in await client.packet("44")
        assert (await client.closed())[0] == 1008
        assert not manager.sessions


# --- Recovery --------------------------------------------------------------------------------------


async def notifications(client: Raw, count: int) -> list[dict[str, Any]]:
    return [await client.next_of("number") for _ in range(count)]


async def test_raw_client_gets_what_it_missed_in_order_then_goes_on_live() -> None:
    manager = WebSocketManager()
    async with served(manager) as server:
        async with Raw.open(server) as client:
            manager.broadcast("number", 0)
            last = (await client.next_of("number"))["offset"]
        await until(lambda: manager.count_clients() == 0)
        for number in range(1, 6):
            manager.broadcast("number", number)
        async with Raw.open(server, f"/ws?since={last}") as client:
            manager.broadcast("number", 6)
            numbers = await notifications(client, 6)
            assert [each["data"] for each in numbers] == [1, 2, 3, 4, 5, 6]
            assert [each["offset"] for each in numbers] == offsets(manager, 6)
            assert await client.received() == []
        async with Raw.open(server, f"/ws?since={manager.history.last}") as client:
            assert await client.received() == [], "nothing was missed"


@pytest.mark.parametrize(
    "since", ["", "nonsense", "-1", "0", "00000000-1", "x" * 5000, "%00", "%ff", "%F0%9F%97%9D",
              "EPOCH", "EPOCH-", "EPOCH--1", "EPOCH-01", "EPOCH-1e1", "EPOCH-999", "EPOCH-1%20"],
)  # fmt: skip
async def test_raw_client_with_unknown_offset_is_told_of_a_gap_once_then_is_live(
    since: str,
) -> None:
    manager = WebSocketManager()
    async with served(manager) as server:
        manager.broadcast("number", 1)
        since = since.replace("EPOCH", manager.epoch)
        async with Raw.open(server, f"/ws?since={since}") as client:
            first = await client.next()
            assert (first["type"], first["data"]["code"]) == ("error", "history_gap")
            manager.broadcast("number", 2)
            assert [each["data"] for each in await client.received()] == [2]


async def test_raw_client_of_an_earlier_process_is_told_of_a_gap() -> None:
    manager = WebSocketManager()
    async with served(manager) as server:
        manager.broadcast("number", 1)
        first = manager.history.last
    async with served(manager) as server:  # the offset's number exists here too
        manager.broadcast("number", 1)
        assert first != manager.history.last
        async with Raw.open(server, f"/ws?since={first}") as client:
            assert (await client.next())["data"]["code"] == "history_gap"


async def test_socket_recovers_with_pid_and_offset() -> None:
    manager = WebSocketManager()
    async with served(manager) as server:
        async with Sio.open(server) as client:
            first = await client.join("/ws")
            manager.broadcast("number", 0)
            _, _, offset = await client.packet("42/ws,")
        await until(lambda: manager.count_clients() == 0)
        for number in range(1, 4):
            manager.broadcast("number", number)
        async with Sio.open(server) as client:
            await client.send("40/ws," + json.dumps({"pid": first["pid"], "offset": offset}))
            for number in range(1, 4):  # before the CONNECT answer, as socket.io sends them
                event, envelope, trailing = await client.packet("42/ws,")
                assert (event, envelope["data"]) == ("rpc_response", number)
                assert trailing == envelope["offset"]
            assert await client.packet("40/ws,") == first, "sid and pid are kept"
            manager.broadcast("number", 4)
            assert (await client.packet("42/ws,"))[1]["data"] == 4


async def test_connect_handler_sees_auth_and_may_refuse() -> None:
    manager = WebSocketManager()
    seen: list[Any] = []

    @manager.on("connect")
    async def welcome(client: Client, auth: dict[str, Any]) -> None:
        seen.append((client.door, client.namespace, auth))
        if auth.get("name") == "Mallory":
            raise PermissionError("not you")
        await client.emit("welcome", {"name": auth.get("name")})

    async with served(manager) as server:
        async with Sio.open(server) as client:
            await client.send('40/ws,{"name":"Mallory"}')
            assert await client.packet("44/ws,") == {"message": "not you"}
            assert manager.count_clients() == 0
            answer = await client.join("/ws", {"name": "Ada", "pid": "x", "offset": "y"})
            assert "sid" in answer  # what the handler emitted follows the CONNECT answer
            assert await client.packet("42/ws,") == ["welcome", {"name": "Ada"}]
        async with Raw.open(server) as raw:
            assert await raw.next() == {"type": "welcome", "data": {"name": None}}
        assert seen[1:] == [("socket.io", "/ws", {"name": "Ada"}), ("raw", "/", {})]


async def test_connect_handler_that_refuses_closes_a_raw_client_with_its_reason() -> None:
    manager = WebSocketManager()

    @manager.on("connect")
    async def refuse(client: Client, auth: Any) -> None:
        raise PermissionError("members only")

    async with served(manager) as server, Raw.open(server) as raw:
        assert await raw.closed() == (1008, "members only")


# --- Slow and hostile clients ----------------------------------------------------------------------


@pytest.mark.parametrize("door", ["raw", "socket.io"])
async def test_slow_client_is_dropped_and_recovers_everything(door: str) -> None:
    manager = WebSocketManager()
    options = {"max_unsent_bytes": 64 * 1024, "history_messages": 5000, "history_bytes": 2**28}
    async with served(manager, **options) as server:
        url = f"ws://127.0.0.1:{server.port}"
        url += "/ws" if door == "raw" else "/socket.io/?EIO=4&transport=websocket"
        seen: list[int] = []
        offset = pid = ""

        def take(frame: Any) -> bool:
            """Note a broadcast; is this frame one?"""
            nonlocal offset
            is_broadcast = '"number"' in frame[:40]
            if is_broadcast:
                found = json.loads(frame[2:])[1] if door == "socket.io" else json.loads(frame)
                seen.append(found["data"][0])
                offset = found["offset"]
            return is_broadcast

        async with connect(url, compression=None, max_size=None, max_queue=(1, 0)) as client:
            if door == "socket.io":
                await client.recv()
                await client.send("40")
                pid = json.loads(str(await client.recv())[2:])["pid"]
            await until(lambda: manager.count_clients() == 1)
            number = 0
            while "slow" not in manager.metrics.drops:  # it does not read meanwhile
                manager.broadcast("number", [number, "x" * 20_000])
                number += 1
                await asyncio.sleep(0)
            with contextlib.suppress(ConnectionClosed):
                while True:
                    assert take(await client.recv())
            assert client.close_code == 1013
        assert 0 < len(seen) < number
        if door == "raw":
            url += f"?since={offset}"
        async with connect(url, compression=None, max_size=None) as client:
            if door == "socket.io":
                await client.recv()
                await client.send("40" + json.dumps({"pid": pid, "offset": offset}))
            manager.broadcast("number", [number, ""])
            while seen[-1] < number:
                take(await client.recv())
        assert seen == list(range(number + 1))


@pytest.mark.parametrize("door", ["raw", "socket.io"])
async def test_silent_peer_is_gone_within_interval_and_timeout(door: str) -> None:
    # 0.0 open; 0.2 ping; 0.4 timeout; 0.45 swept at the latest.
    options = {"ping_interval_s": 0.2, "ping_timeout_s": 0.2}
    async with served(**options) as server:
        async with (raw if door == "raw" else engine)(server.port) as peer:
            began = time.monotonic()
            assert await peer.frame() == ((9, b"") if door == "raw" else (1, b"2"))
            await until(lambda: not server.manager.connections)
            assert 0.35 < time.monotonic() - began < 0.7
            assert not server.manager.count_clients()
        assert server.manager.metrics.drops == {"silent": 1}


@pytest.mark.parametrize("limit", [128, 1000, 70_000])
async def test_message_limit_is_exact_for_frames_and_fragments(limit: int) -> None:
    async with served(EchoManager(), max_message_bytes=limit) as server:
        async with raw(server.port) as peer:
            for size in (0, limit - 1, limit):
                for opcode in (1, 2):
                    for count in (1, 2, 7):
                        await peer.send(in_fragments(opcode, b"x" * size, count))
                        assert await peer.frame() == (opcode, b"x" * size)
        for opcode, count in itertools.product((1, 2), (1, 2, 7)):
            async with raw(server.port) as peer:
                data = in_fragments(opcode, b"x" * (limit + 1), count)
                await peer.send(frame(1, b"before") + data)
                assert await peer.frame() == (1, b"before")
                closed = await peer.closed()
                assert closed.code == 1009 and str(limit) in closed.reason


async def test_body_limit_is_exact() -> None:
    async with served(max_body_bytes=100) as server:
        for size, status in ((99, 200), (100, 200), (101, 413)):
            body = json.dumps({"command": "time"}).encode()
            request_ = post("/api/execute_command", body + b" " * (size - len(body)))
            answer = await ask(server.port, request_)
            assert answer.status == status
            if status == 413:
                assert answer.error["code"] == "too_large"
                assert "100 bytes (--max-body)" in answer.error["message"]


async def test_clients_beyond_the_limit_get_503_on_both_doors() -> None:
    async with served(max_clients=3) as server:
        port = server.port
        async with raw(port), engine(port, connect=None):
            async with raw(port) as third:
                for target in ("/ws", ENGINE):
                    answer = await ask(port, upgrade(target))
                    assert (answer.status, answer.error["code"]) == (503, "unavailable")
                    assert "--max-clients" in answer.error["message"]
                    assert int(answer.headers["retry-after"]) > 0
                assert (await ask(port, head("GET", "/health"))).status == 200
                await third.send(close_frame())
                await third.closed()
            await until(lambda: not server.manager.is_full)
            for target in ("/ws", ENGINE):
                assert (await ask(port, upgrade(target))).status == 101
                await until(lambda: not server.manager.is_full)


# --- Who may come in -------------------------------------------------------------------------------


async def test_bind_beyond_loopback_needs_a_token() -> None:
    for host in ("0.0.0.0", "::", ""):
        with pytest.raises(StartError, match="--token or KARNA_TOKEN"):
            async with served(host=host):
                pass
    for options in ({"token": TOKEN}, {"insecure_no_token": True}):
        async with served(host="0.0.0.0", **options) as server:
            assert server.port


@pytest.mark.parametrize("door", DOORS)
async def test_origin_that_equals_host_is_allowed_once_host_has_passed(door: str) -> None:
    same = [
        ("karna.example", "http://karna.example"),
        ("karna.example", "https://karna.example"),
        ("karna.example:80", "http://karna.example"),
        ("karna.example:443", "https://karna.example"),
        ("KARNA.example:8443", "https://karna.example:8443"),
        ("192.168.1.7:8000", "http://192.168.1.7:8000"),
    ]
    other = [
        ("evil.example", "http://evil.example"),  # the rebinding attack
        ("karna.example:8443", "https://karna.example"),
        ("karna.example", "ws://karna.example"),
        ("192.168.1.7:8000", "http://192.168.1.7:8001"),
    ]
    async with served(allow_host=["karna.example"]) as server:
        for host, origin in same:
            answer = await ask(server.port, DOORS[door]({"Host": host, "Origin": origin}))
            assert answer.status == WELCOMED.get(door, 200), (host, origin)
        for host, origin in other:
            answer = await ask(server.port, DOORS[door]({"Host": host, "Origin": origin}))
            assert answer.status == 403, (host, origin)


BAD_QUERIES = ["token=", "token=wrong", f"Token={TOKEN}", f"token=wrong&token={TOKEN}", "token=%ff"]


async def test_query_token_opens_the_doors_and_a_wrong_one_does_not() -> None:
    async with served(token=TOKEN) as server:
        for query in BAD_QUERIES:
            assert (await ask(server.port, upgrade(f"/ws?{query}"))).status == 401, query
            assert (await ask(server.port, head("GET", f"/metrics?{query}"))).status == 401, query
        assert (await ask(server.port, upgrade(f"/ws?token={TOKEN}"))).status == 101
        assert (await ask(server.port, upgrade(f"/ws/?since=x&token={TOKEN}"))).status == 101
        wrong_header = {"Authorization": "Bearer wrong"}
        assert (await ask(server.port, upgrade(f"/ws?token={TOKEN}", wrong_header))).status == 401


BAD_CONNECTS = [
    b"40/ws,", b"40", b"40/ws,{}", b'40/ws,{"token":null}', b'40/ws,{"token":""}',
    b'40/ws,{"token":"wrong"}', b'40/ws,{"token":["correct-horse"]}', b'40/ws,{"token":1}',
    b'40/ws,{"token":true}', b'40/ws,{"Token":"correct-horse"}',
    b'40/ws,{"token":"correct-hors\xc3\xa9"}',
    b'40/ws,{"token":"\\u0000correct-horse"}',
]  # fmt: skip


async def test_socket_io_token_is_asked_with_every_connect() -> None:
    good = b'{"token":"%b"}' % TOKEN.encode()
    async with served(token=TOKEN) as server:
        async with engine(server.port, connect=None) as peer:
            for connect in BAD_CONNECTS:
                await peer.send(frame(1, connect))
                answer = (await peer.frame()).payload
                prefix = b"44/ws," if b"/ws" in connect else b"44"
                error = json.loads(answer.removeprefix(prefix))
                assert error["data"] == {"code": "unauthorized"} and "token" in error["message"]
            await peer.send(frame(1, b"40/ws," + good))
            assert (await peer.frame()).payload.startswith(b'40/ws,{"sid"')
            await peer.send(frame(1, b"40"))  # another namespace, another CONNECT
            assert (await peer.frame()).payload.startswith(b"44{")
            await peer.send(frame(1, b"41/ws,") + frame(1, b"40/ws,"))
            assert (await peer.frame()).payload.startswith(b"44/ws,{")
        async with engine(server.port, {"Authorization": f"Bearer {TOKEN}"}) as peer:
            await peer.send(frame(1, b"40"))  # the handshake had it: no CONNECT needs it
            assert (await peer.frame()).payload.startswith(b"40{")


async def test_health_page_and_preflight_need_no_token() -> None:
    async with served(token=TOKEN) as server:
        for request_head in (
            head("GET", "/health"), head("HEAD", "/health"), head("GET", "/"), head("HEAD", "/"),
            DOORS["preflight"]({"Origin": "http://localhost:3000"}),
        ):  # fmt: skip
            assert (await ask(server.port, request_head)).status in (200, 204)
        for path in ("/health/", "//health", "/Health", "/health%2f", "/.", "/index.html", "/ws"):
            assert (await ask(server.port, head("GET", path))).status == 401, path


# --- Scale-out -------------------------------------------------------------------------------------


async def test_broadcasts_have_one_order_and_offset_on_all_nodes_and_doors(
    redis: RedisServer,
) -> None:
    async def shout(server: Any, name: str) -> None:
        async with Raw.open(server) as client:
            for number in range(40):
                await client.run(f"notify {name}{number}")

    async with (
        node(redis.url) as a,
        node(redis.url) as b,
        following(*both_doors(a, b)) as followers,
    ):
        shouts = [(a, "a"), (b, "b"), (a, "c"), (b, "d")]
        await asyncio.gather(*(shout(*each) for each in shouts))
        async with Raw.open(a) as client:
            await client.run("notify end")
        orders = [await each.until("end") for each in followers]
        assert len(orders[0]) == 161
        assert sorted({order[0] for order in orders[0][:-1]}) == ["a", "b", "c", "d"]
        assert orders == [orders[0]] * 4
        assert [each.offsets for each in followers] == [followers[0].offsets] * 4
        for name in "abcd":
            own = [each for each in orders[0] if each[0] == name]
            assert own == [f"{name}{number}" for number in range(40)]


# --- Lifecycle -------------------------------------------------------------------------------------


async def test_sigterm_lets_commands_end_then_cancels_them_and_says_1012() -> None:
    # 0.0 SIGTERM; 0.4 the short command ends; 0.8 the grace is over.
    async with process("--grace", "0.8", "--close-timeout", "1") as karna:
        port = karna.port
        async with raw(port) as peer, engine(port) as session, dial(port) as http:
            await peer.send_json(execute("wait 0.4", "short"))
            await peer.send_json(execute("wait 60", "long"))
            await peer.send_json(request("get_status", 1))
            assert (await peer.json())["id"] == 1
            text = json.dumps(execute("wait 60")).encode()
            await session.send(frame(1, b'42/ws,5["rpc",%b]' % text))
            await http.send(post("/api/execute_command", {"command": "wait 60"}))
            while (await get_metrics(port))["karna_sockets"] < 4:
                pass
            began = time.monotonic()
            karna.stop()
            while (health := await ask(port, head("GET", "/health"))).status == 200:
                pass
            assert (health.status, health.json) == (503, {"status": "draining"})
            refused = await ask(port, upgrade())
            assert refused.status == 503 and "retry-after" in refused.headers
            await peer.send_json(execute("echo late", 2))
            assert (await peer.json())["data"]["code"] == "unavailable"
            await peer.send_json(request("get_status", 3))
            assert (await peer.json())["id"] == 3
            answer = await peer.json()
            assert (answer["id"], answer["data"]["result"]) == ("short", "waited")
            answer = await peer.json()
            assert (answer["id"], answer["data"]["code"]) == ("long", "cancelled")
            assert b'"code":"cancelled"' in (await session.frame()).payload
            answer_ = await http.answer()
            assert (answer_.status, answer_.error["code"]) == (409, "cancelled")
            for each in (peer, session):
                closed = await each.closed()
                assert (closed.code, closed.reason) == (1012, "service restart")
            assert await http.at_end()
            assert await karna.ended() == 0
            assert 0.7 < time.monotonic() - began < 2.5
        assert "Traceback" not in karna.log()


async def test_process_that_can_not_start_ends_with_2_and_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = await asyncio.to_thread(run_to_end, "--port", str(port))
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr == (
            f"karna_ws: 127.0.0.1:{port} is in use; choose another with --port\n"
        )
    ended = await asyncio.to_thread(run_to_end, "--host", "0.0.0.0", "--port", "0")
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)


async def test_server_restarts_on_the_same_port_at_once() -> None:
    async with process() as first:
        port = first.port
        async with raw(port) as peer, raw(port):
            first.stop()
            await peer.closed()  # the server closed first: its side of the socket lingers
            assert await first.ended() == 0
        async with process(port=port) as second:
            assert (await ask(port, head("GET", "/health"))).status == 200
            second.stop(signal.SIGKILL)
            await second.ended()
        async with process(port=port):
            assert (await ask(port, head("GET", "/health"))).status == 200


# --- Names other programs rely on ------------------------------------------------------------------


OPTIONS: dict[str, Any] = {
    "host": "127.0.0.1", "port": 0, "unix": None, "token": "sesame", "allow_origin": [],
    "allow_host": "karna.example", "namespaces": ["/chat"], "ping_interval_s": 20,
    "ping_timeout_s": 20, "connect_timeout_s": 45, "open_timeout_s": 10, "close_timeout_s": 1,
    "command_timeout_s": 60, "grace_s": 0, "max_message_bytes": 2**20, "max_body_bytes": 2**20,
    "max_clients": 1000, "max_running_commands": 32, "max_unsent_bytes": 2**20,
    "history_messages": 1000, "history_bytes": 2**22, "backplane": None, "reuse_port": False,
    "loop": "auto", "certfile": None, "keyfile": None,
}  # fmt: skip


async def test_program_serves_its_manager_with_options_by_name() -> None:
    manager = WebSocketManager(commands=CommandProcessor(), services=[Lamp()])
    async with serving(manager, **OPTIONS) as server:
        async with Raw.open(server, "/ws?token=sesame") as client:
            assert "lamp" in (await client.ask("get_status"))["data"]
        await server.close()


async def test_handlers_of_the_program_get_events_and_answer_acks() -> None:
    manager = WebSocketManager()
    got: list[Any] = []

    @manager.on("echo")
    async def echo(client: Client, *args: Any) -> Any:
        got.append((client.door, args))
        return args  # a tuple: several values

    @manager.on("sync")
    def sync(client: Client, value: Any) -> Any:
        return [threading.current_thread() is threading.main_thread(), value]

    @manager.on("inline", inline=True)
    def inline(client: Client) -> Any:
        return threading.current_thread() is threading.main_thread()

    @manager.on("nothing")
    async def nothing(client: Client) -> None:
        return None

    @manager.on("5")
    async def five(client: Client) -> str:
        return "by number"

    async with served(manager) as server, Sio.open(server, join="/") as client:
        for event, ack in (
            ('["echo",1,"two",{"3":[4]}]', '[1,"two",{"3":[4]}]'),
            ('["echo"]', "[]"),
            ('["sync",{"a":1}]', '[[false,{"a":1}]]'),
            ('["inline"]', "[true]"),
            ('["nothing"]', "[null]"),
            ("[5]", '["by number"]'),
        ):
            await client.send(f"421{event}")
            assert await client.next() == f"431{ack}"
        await client.send('42["echo","no ack"]')
        await client.send('451-2["echo",{"_placeholder":true,"num":0}]', b"bytes")
        assert await client.next() == '461-2[{"_placeholder":true,"num":0}]'
        assert await client.next() == b"bytes"
        assert got[-2:] == [("socket.io", ("no ack",)), ("socket.io", (b"bytes",))]


async def test_client_send_and_disconnect_reach_a_raw_client() -> None:
    manager = WebSocketManager()

    @manager.on("connect")
    async def welcome(client: Client, auth: Any) -> None:
        await client.send("welcome", {"door": client.door})
        await client.emit("two", 1, "x")

    @manager.method("leave")
    async def leave(context: Context) -> None:
        await context.client.disconnect("as you asked")

    async with served(manager) as server, Raw.open(server) as client:
        assert await client.next() == {"type": "welcome", "data": {"door": "raw"}}
        assert await client.next() == {"type": "two", "data": [1, "x"]}
        await client.send({"method": "leave", "id": 1})
        assert await client.closed() == (1000, "as you asked")


async def test_handle_message_can_be_overridden() -> None:
    class Echo(WebSocketManager):
        def handle_message(self, client: Client, payload: bytes, is_text: bool) -> Any:
            if payload == b"json":
                return None
            if payload == b"request":
                return super().handle_message(client, b'{"method":"cancel"}', is_text)
            return payload.decode() if is_text else payload

    async with served(Echo()) as server, Raw.open(server) as client:
        await client.send("text", b"\x00\xff", "json", "request", "last")
        received = [await client.connection.recv() for _ in range(4)]
        assert received[:2] == ["text", b"\x00\xff"]
        assert "invalid_params" in str(received[2])
        assert received[3] == "last"
