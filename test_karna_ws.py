"""The contract of Karna WS, told once through its doors, in the order of the protocol:

the doors on the one port, the envelope, errors, methods, order, JSON-RPC 2.0, the status object,
the Socket.IO door, recovery, who may join, slow and hostile clients, who may come in, scale-out,
the life of the process, and the names that other programs rely on.

Every test here is a client: a WebSocket, an HTTP request, a started process. What stands behind the
doors is tested room by room in `tests/`, real clients and servers in `tests/real/`; the rules of
all these tests are in `tests/support.py`.
"""

from __future__ import annotations

import asyncio
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
from websockets.exceptions import ConnectionClosed

from karna_ws import Client, Server, WebSocketManager, serving
from services import CommandProcessor, Context
from support import (
    EXECUTE, Gate, Lamp, Raw, Sio, execute, failing_manager, http, limit_for, rpc_error,
    rpc_manager, rpc_result, served, until, without_words,
)  # fmt: skip
from support_peers import (
    DOORS, ENGINE, TOKEN, WELCOMED, ask, close_frame, dial, engine, frame, get_metrics, head, post,
    raw, request, upgrade,
)  # fmt: skip
from support_process import process, run_to_end
from support_redis import RedisServer, both_doors, following, node


async def count_clients(server: Server) -> int:
    """How many clients broadcasts go to, as the command `clients` says."""
    _, answer = await http(server, "POST", "/api/execute_command", {"command": "clients"})
    count: int = answer["data"]["result"]["count"]
    return count


async def has_clients(server: Server, count: int) -> None:
    """Wait until there are so many."""
    while await count_clients(server) != count:
        pass


# --- The doors on the one port -------------------------------------------------------------------


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


async def test_root_is_the_console_page_and_metrics_are_text() -> None:
    async with served() as server:
        page = await ask(server.port, head("GET", "/"))
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.body.startswith(b"<!doctype html>")
        assert page.headers["content-security-policy"].startswith("default-src 'none'")
        metrics = await ask(server.port, head("GET", "/metrics"))
        assert metrics.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert b"\nkarna_clients{door=" in metrics.body


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


async def test_http_connection_is_kept_until_either_side_says_close() -> None:
    keep = {"Connection": None}
    async with served() as server, dial(server.port) as peer:
        for each, status in (
            (head("GET", "/health", keep), 200), (head("HEAD", "/", keep), 200),
            (post("/api/execute_command", {"command": "echo hi"}, keep), 200),
            (post("/api/execute_command", {"command": "nope"}, keep), 404),
            (post("/api/execute_command", {"command": "countdown 0"}, keep), 200),
            (head("OPTIONS", "/rpc", keep), 204), (head("GET", "/nowhere", keep), 404),
        ):  # fmt: skip
            await peer.send(each)
            answer = await peer.answer(to_head=each.startswith(b"HEAD"))
            assert (answer.status, answer.headers.get("connection")) == (status, None), each
        await peer.send(head("GET", "/health", {"Connection": "close"}))
        answer = await peer.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert await peer.at_end()
        for last in (
            head("GET", "/health", keep).replace(b"HTTP/1.1", b"HTTP/1.0"),
            post("/rpc", b"x" * 2_000_000, keep),  # refused before its body was read
        ):
            answer = await ask(server.port, last)  # sees that the server ends the stream
            assert answer.headers["connection"] == "close"


async def test_load_balancers_and_proxies_are_understood() -> None:
    async with served() as server:
        for request_head, status in (
            (b"GET /health HTTP/1.0\r\n\r\n", 200), (b"GET /api/status HTTP/1.0\r\n\r\n", 400),
            (head("GET", "/health", {"Host": None}), 400),
            (head("GET", "http://localhost:80/health"), 200),
            (head("GET", "http://evil.example/health"), 403),  # which names the host, not `Host`
        ):  # fmt: skip
            assert (await ask(server.port, request_head)).status == status, request_head


async def test_pipelined_requests_are_answered_in_order_and_an_upgrade_may_be_the_last() -> None:
    keep = {"Connection": None}
    manager = WebSocketManager()
    gate = Gate(manager)
    async with served(manager) as server, dial(server.port) as peer:
        lines = ["gate slow", "echo quick", "countdown 0"]
        posts = [post("/api/execute_command", {"command": line}, keep) for line in lines]
        hello = frame(1, json.dumps(execute("echo door", 1)).encode())
        await peer.send(b"".join([*posts, head("GET", "/health", keep), upgrade(), hello]))
        await until(lambda: gate.begun)
        assert (await ask(server.port, head("GET", "/health"))).status == 200
        gate.let("slow")
        assert [(await peer.answer()).json["data"]["command"] for _ in lines] == lines
        assert (await peer.answer()).json == {"status": "healthy"}
        assert (await peer.answer()).status == 101
        assert (await peer.json())["data"]["result"] == "door"


async def test_idle_http_connection_is_closed_after_the_open_timeout() -> None:
    # 0.0 answered; 0.2 idle for too long, swept by 0.25; a new request starts the time anew.
    async with served(open_timeout_s=0.2) as server, dial(server.port) as peer:
        for _ in range(2):
            await peer.send(head("GET", "/health", {"Connection": None}))
            assert (await peer.answer()).status == 200
            began = time.monotonic()
            await asyncio.sleep(0.1)
        assert await peer.at_end()
        assert 0.15 < time.monotonic() - began < 1.0


# --- The envelope --------------------------------------------------------------------------------


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
async def test_notification_has_message_level_time_and_offset(level: str) -> None:
    manager = WebSocketManager()
    async with served(manager) as server, Raw.open(server) as client:
        before = (await client.ask("get_status"))["offset"]
        manager.notify("build done", level)
        found = await client.next_of("notification")
        assert re.fullmatch(SINCE, found["data"].pop("time"))
        assert found["data"] == {"message": "build done", "level": level}
        after = (await client.ask("get_status"))["offset"]
        assert found["offset"] == after != before, "the snapshot and the stream line up"


SINCE = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


# --- Errors --------------------------------------------------------------------------------------


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


# --- Methods -------------------------------------------------------------------------------------


async def test_method_of_the_program_is_called_with_params() -> None:
    manager = failing_manager()

    @manager.method("who")
    async def who(context: Context, name: str = "nobody") -> dict[str, Any]:
        await context.progress("looking")
        return {"name": name, "door": context.client.door}

    with pytest.raises(ValueError, match="get_status"):
        manager.method("get_status")(who)
    with pytest.raises(ValueError, match="who"):
        manager.method("who")(who)
    async with served(manager) as server, Raw.open(server) as client:
        assert await client.ask("double", number=21) == {
            "type": "command_response", "data": 42, "id": "ask-1"
        }  # fmt: skip
        answer = await client.ask("who", name="Ada")
        assert answer["data"] == {"name": "Ada", "door": "raw"}
        (progress,) = client.kept
        assert (progress["type"], progress["id"]) == ("command_progress", answer["id"])


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


# --- Order ---------------------------------------------------------------------------------------


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
        await has_clients(server, 0)
        assert gate.begun == ["other", "a", "b", "socket"], "what waited never began"
        assert (await http(server, "GET", "/api/status"))[1]["command"]["running"] == 0


# --- JSON-RPC 2.0 --------------------------------------------------------------------------------


JSON_RPC: list[tuple[str, Any]] = [
    ('{"jsonrpc": "2.0", "method": "subtract", "params": [42, 23], "id": 1}', rpc_result(19, 1)),
    ('{"jsonrpc": "2.0", "method": "subtract", "params": {"subtrahend": 23, "minuend": 42}, '
     '"id": "x"}', rpc_result(19, "x")),
    ('{"jsonrpc": "2.0", "method": "update", "params": [1, 2, 3, 4, 5]}', None),
    ('{"jsonrpc": "2.0", "method": "foobar", "id": "1"}', rpc_error(-32601, "1")),
    ('{"jsonrpc": "2.0", "method": 1, "id": 2}', rpc_error(-32600, 2)),
    ('{"jsonrpc": "2.0", "method": "subtract", "params": [1], "id": 3}', rpc_error(-32602, 3)),
    ('[{"jsonrpc": "2.0", "method": "sum", "params": [1, 2, 4], "id": "1"}, {"foo": "boo"}, '
     '{"jsonrpc": "2.0", "method": "notify_hello", "params": [7]}]',
     [rpc_result(7, "1"), rpc_error(-32600, None)]),
    ('[{"jsonrpc": "2.0", "method": "notify_hello", "params": [8]}]', None),
]  # fmt: skip


async def test_json_rpc_is_answered_in_its_own_form() -> None:
    manager = rpc_manager()
    async with served(manager) as server, Raw.open(server) as client:
        for text, expected in JSON_RPC:
            in_order = sorted(expected, key=repr) if isinstance(expected, list) else expected
            await client.send(text)
            if expected is None:
                assert await client.received() == []
            else:
                assert without_words(await client.next()) == in_order
            status, answer = await http(server, "POST", "/rpc", text.encode())
            if expected is None:
                assert (status, answer) == (204, b"")
            else:
                assert (status, without_words(answer)) == (200, in_order)
        status, answer = await http(server, "POST", "/rpc", b'{"jsonrpc": "2.0"')
        assert (status, without_words(answer)) == (200, rpc_error(-32700, None))
        # Whatever they ask for is carried out, though nobody is told.
        assert manager.notified == [[1, 2, 3, 4, 5]] * 2 + [7, 7, 8, 8]  # type: ignore


# --- The status object ---------------------------------------------------------------------------


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


async def test_status_update_is_broadcast_on_each_change_of_a_service() -> None:
    lamp = Lamp()
    manager = WebSocketManager(services=[lamp])
    async with (
        served(manager) as server, Raw.open(server) as raw, Sio.open(server, join="/ws") as client
    ):  # fmt: skip
        since = []
        for state, detail in (("degraded", "one bulb"), ("degraded", "two\nbulbs"), ("failed", "")):
            lamp.set_state(state, detail)  # type: ignore[arg-type]
            lamp.set_state(state, detail)  # type: ignore[arg-type]  # no change, no broadcast
            update = await raw.next_of("status_update")
            assert list(update["data"]) == ["vision", "language", "command", "lamp"]
            entry = update["data"]["lamp"]
            assert (entry["state"], entry["detail"]) == (state, detail.replace("\n", " "))
            since.append(entry["since"])
            event = await client.packet("42/ws,")
            assert event == ["rpc_response", update, update["offset"]]
        assert since[0] == since[1], "the detail changed, the state did not"
        assert await raw.received() == []


# --- The Socket.IO door --------------------------------------------------------------------------


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
async def test_socket_connects_to_served_namespace_and_to_no_other(
    namespace: str, auth: Any
) -> None:
    async with served(namespaces="/extra") as server, Sio.open(server) as client:
        for other in ("/nope", "/wsx", "/ws//", "/WS"):
            await client.send(f"40{other},")
            assert await client.packet(f"44{other},") == {"message": "Invalid namespace"}
        assert "sid" in await client.join(namespace, auth)
        answer = await client.rpc({"method": "get_status", "id": 5}, namespace=namespace, ack=3)
        assert answer["type"] == "status_update" and answer["id"] == 5


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


@pytest.mark.parametrize(
    "packet", ['42/ws,["rpc",{}]', "40/ws,", '42/ws,{"0":"rpc"}', '42/ws,x["rpc"]',
               '42/ws,["connect"]', "48/ws,", "9", b"stray"],
)  # fmt: skip
async def test_client_that_breaks_the_protocol_is_closed(packet: str | bytes) -> None:
    async with served() as server, Sio.open(server) as client:
        if packet != '42/ws,["rpc",{}]':  # that one comes before CONNECT
            await client.join("/ws")
        await client.send(packet)
        assert (await client.closed())[0] == 1002


async def test_packet_1_ends_the_session() -> None:
    async with served() as server, Sio.open(server, join="/ws") as client:
        await client.send("1")
        assert (await client.closed())[0] == 1000
        await has_clients(server, 0)


async def test_old_socket_io_client_is_told_in_its_own_protocol() -> None:
    path = "/socket.io/?EIO=3&transport=websocket"
    async with served() as server, Sio.open(server, path=path) as client:
        assert await client.connection.recv() == "40"
        assert "socket.io-client 3 or later" in await client.packet("44/ws,")
        assert "socket.io-client 3 or later" in await client.packet("44")
        assert (await client.closed())[0] == 1008


# --- Recovery ------------------------------------------------------------------------------------


async def numbers(client: Raw, count: int) -> list[Any]:
    return [(await client.next_of("number"))["data"] for _ in range(count)]


async def test_raw_client_gets_what_it_missed_in_order_then_goes_on_live() -> None:
    manager = WebSocketManager()
    async with served(manager) as server:
        async with Raw.open(server) as witness:
            async with Raw.open(server) as client:
                manager.broadcast("number", 0)
                last = (await client.next_of("number"))["offset"]
            for number in range(1, 6):
                manager.broadcast("number", number)
            async with Raw.open(server, f"/ws?since={last}") as client:
                manager.broadcast("number", 6)
                seen = [each for each in await witness.received() if each["data"] != 0]
                assert [each["data"] for each in seen] == [1, 2, 3, 4, 5, 6]
                assert [await client.next() for _ in seen] == seen, "offsets and all"
                assert await client.received() == []
        async with Raw.open(server, f"/ws?since={seen[-1]['offset']}") as client:
            assert await client.received() == [], "nothing was missed"


async def test_raw_client_with_unknown_offset_is_told_of_a_gap_once_then_is_live() -> None:
    manager = WebSocketManager()
    async with served(manager) as server:
        manager.broadcast("number", 1)
        async with Raw.open(server) as client:
            earlier = (await client.ask("get_status"))["offset"]
    async with served(manager, history_messages=2) as server:  # as good as another process
        async with Raw.open(server) as client:
            old = (await client.ask("get_status"))["offset"]
        for _ in range(3):  # one more than are kept
            manager.broadcast("number", 1)
        for since in (earlier, old, "", "nonsense", "0-0", "9" * 19 + "-0", "%ff"):
            async with Raw.open(server, f"/ws?since={since}") as client:
                first = await client.next()
                assert (first["type"], first["data"]["code"]) == ("error", "history_gap"), since
                manager.broadcast("number", 2)
                assert await numbers(client, 1) == [2]
                assert await client.received() == []


async def test_socket_recovers_with_pid_and_offset() -> None:
    manager = WebSocketManager()
    async with served(manager) as server:
        async with Sio.open(server) as client:
            first = await client.join("/ws")
            manager.broadcast("number", 0)
            _, _, offset = await client.packet("42/ws,")
        await has_clients(server, 0)
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


# --- Who may join --------------------------------------------------------------------------------


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
            assert await count_clients(server) == 0
            answer = await client.join("/ws", {"name": "Ada", "pid": "x", "offset": "y"})
            assert "sid" in answer  # what the handler emitted follows the CONNECT answer
            assert await client.packet("42/ws,") == ["welcome", {"name": "Ada"}]
        async with Raw.open(server) as raw:
            assert await raw.next() == {"type": "welcome", "data": {"name": None}}
        assert seen[1:] == [("socket.io", "/ws", {"name": "Ada"}), ("raw", "/", {})]


async def test_client_is_nobody_until_its_connect_handler_has_let_it_in() -> None:
    manager = WebSocketManager()
    gate, left = Gate(manager), []

    @manager.on("connect")
    async def ask_at_the_gate(client: Client, auth: Any) -> None:
        if await gate.gate(client.door):
            raise PermissionError("members only")

    @manager.on("disconnect")
    async def note(client: Client, reason: str) -> None:
        left.append(reason)

    async with served(manager) as server:
        manager.broadcast("number", 1)
        async with Raw.open(server, "/ws?since=0-0") as client, Sio.open(server) as socket:
            await socket.send("40")
            await until(lambda: len(gate.begun) == 2)
            assert await count_clients(server) == 0
            manager.broadcast("number", 2)
            gate.let("raw", "socket.io")
            assert await client.closed() == (1008, "members only") and client.kept == []
            assert await socket.packet("44") == {"message": "members only"}
        assert await count_clients(server) == 0
    assert left == []


# --- Slow and hostile clients --------------------------------------------------------------------


@pytest.mark.parametrize("door", ["raw", "socket.io"])
async def test_slow_client_is_dropped_and_recovers_everything(door: str) -> None:
    manager = WebSocketManager()
    options = {"max_unsent_bytes": 64 * 1024, "history_messages": 5000, "history_bytes": 2**28}
    async with (
        served(manager, **options) as server,
        following((server, door), max_queue=(1, 0)) as (slow,),
    ):
        sent: list[str] = []
        while await count_clients(server):  # it does not read meanwhile
            for _ in range(20):
                sent.append(f"{len(sent)}: {'x' * 20_000}")
                manager.notify(sent[-1])
        with pytest.raises(ConnectionClosed) as closed:
            await slow.until("end")
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1013
        assert "--max-unsent" in closed.value.rcvd.reason
        assert 0 < len(slow.messages) < len(sent)
        await slow.follow(server)
        manager.notify("end")
        assert await slow.until("end") == [*sent, "end"]


@pytest.mark.parametrize("door", ["raw", "socket.io"])
async def test_silent_peer_is_gone_within_interval_and_timeout(door: str) -> None:
    # 0.0 open; 0.2 ping; 0.4 timeout; 0.45 swept at the latest.
    async with served(ping_interval_s=0.2, ping_timeout_s=0.2) as server:
        async with (raw if door == "raw" else engine)(server.port) as peer:
            began = time.monotonic()
            assert await peer.frame() == ((9, b"") if door == "raw" else (1, b"2"))
            await peer.frames()  # up to the end of the stream
            assert 0.35 < time.monotonic() - began < 0.7
            assert await count_clients(server) == 0
        assert (await get_metrics(server.port))["karna_dropped_total{reason=silent}"] == 1


async def test_message_and_body_limits_are_exact_and_named() -> None:
    async with served(max_message_bytes=200, max_body_bytes=100) as server:
        for size in (200, 201):
            async with raw(server.port) as peer:
                text = json.dumps(execute("echo hi", 1))
                await peer.send(frame(1, text.ljust(size).encode()))
                if size == 200:
                    assert (await peer.json())["data"]["result"] == "hi"
                else:
                    closed = await peer.closed()
                    assert closed.code == 1009 and "200" in closed.reason
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
        async with raw(port), engine(port):
            async with raw(port) as third:
                for target in ("/ws", ENGINE):
                    answer = await ask(port, upgrade(target))
                    assert (answer.status, answer.error["code"]) == (503, "unavailable")
                    assert "--max-clients" in answer.error["message"]
                    assert int(answer.headers["retry-after"]) > 0
                assert (await ask(port, head("GET", "/health"))).status == 200
                await third.send(close_frame())
                await third.closed()
            for target in ("/ws", ENGINE):  # there is a place again, until it is taken
                while (await ask(port, upgrade(target))).status != 101:
                    pass


# --- Who may come in -----------------------------------------------------------------------------


async def test_bind_beyond_loopback_needs_a_token() -> None:
    for host in ("0.0.0.0", "::", ""):
        ended = await asyncio.to_thread(run_to_end, "--host", host, "--port", "0")
        assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
        assert "--token or KARNA_TOKEN" in ended.stderr
    for options in ({"token": TOKEN}, {"insecure_no_token": True}):
        async with served(host="0.0.0.0", **options) as server:
            assert server.port


@pytest.mark.parametrize("door", DOORS)
async def test_every_door_asks_for_host_and_origin(door: str) -> None:
    page = "http://localhost:3000"
    allowed = [
        ("localhost", None), ("127.0.0.1:8000", page), ("[::1]:1", "https://[::1]"),
        ("192.168.1.7", "http://192.168.1.7"), ("karna.example", "https://karna.example"),
        ("karna.example:8443", "https://karna.example:8443"), ("localhost", "https://app.example"),
    ]  # fmt: skip
    refused = [
        (None, None, 400), (["localhost", "localhost"], None, 400), ("local host", page, 400),
        ("evil.example", "http://evil.example", 403),  # a name that was rebound to this machine
        ("localhost", "https://evil.example", 403), ("localhost", "null", 403),
        ("localhost", "", 403), ("localhost", "file://", 403), ("localhost", [page, page], 403),
        ("localhost", "http://evil.localhost", 403), ("localhost", "https://app.example:1", 403),
    ]  # fmt: skip
    async with served(allow_host=["karna.example"], allow_origin=["https://app.example"]) as server:
        for host, origin in allowed:
            answer = await ask(server.port, DOORS[door]({"Host": host, "Origin": origin}))
            assert answer.status == WELCOMED.get(door, 200), (host, origin)
            if answer.status != 101:
                assert answer.headers.get("access-control-allow-origin") == origin
                assert answer.headers["vary"] == "Origin"
        for host, origin, status in refused:
            answer = await ask(server.port, DOORS[door]({"Host": host, "Origin": origin}))
            code = "forbidden" if status == 403 else "invalid_request"
            assert (answer.status, answer.error["code"]) == (status, code), (host, origin)
            assert "access-control-allow-origin" not in answer.headers


async def test_post_that_a_page_could_send_unasked_is_refused() -> None:
    async with served() as server:
        for headers, status in (
            ({}, 200), ({"Content-Type": "text/plain"}, 415), ({"Content-Type": None}, 415),
            ({"Sec-Fetch-Site": "cross-site"}, 403), ({"Sec-Fetch-Site": "same-origin"}, 200),
            ({"Sec-Fetch-Site": "cross-site", "Origin": "http://localhost:3000"}, 200),
        ):  # fmt: skip
            answer = await ask(server.port, DOORS["post"](headers))
            assert answer.status == status, headers


async def test_token_opens_every_door_and_a_wrong_one_none() -> None:
    bearer, wrong = {"Authorization": f"Bearer {TOKEN}"}, {"Authorization": "Bearer wrong"}
    async with served(token=TOKEN) as server:
        port = server.port
        for door in ("raw", "get", "post", "rpc", "metrics"):
            for headers in ({}, wrong):
                answer = await ask(port, DOORS[door](headers))
                assert (answer.status, answer.error["code"]) == (401, "unauthorized")
                assert "token" in answer.error["message"]
            assert (await ask(port, DOORS[door](bearer))).status == WELCOMED.get(door, 200)
        for query, status in ((f"token={TOKEN}", 101), ("token=wrong", 401), ("token=", 401)):
            assert (await ask(port, upgrade(f"/ws?{query}"))).status == status
        async with Sio.open(server) as client:
            for auth in (None, {}, {"token": "wrong"}, {"token": [TOKEN]}):
                await client.send("40/ws," + ("" if auth is None else json.dumps(auth)))
                error = await client.packet("44/ws,")
                assert error["data"] == {"code": "unauthorized"} and "token" in error["message"]
            assert "sid" in await client.join("/ws", {"token": TOKEN})
            await client.send("40")  # another namespace, another CONNECT
            assert "token" in (await client.packet("44"))["message"]
        async with engine(port, bearer, connect=b"40"):
            pass  # the handshake had it: no CONNECT needs it
        origin = {"Origin": "http://localhost:3000"}
        for free in (head("GET", "/health"), head("HEAD", "/"), DOORS["preflight"](origin)):
            assert (await ask(port, free)).status in (200, 204)
        for path in ("/health/", "//health", "/Health", "/health%2f", "/.", "/index.html", "/ws"):
            assert (await ask(port, head("GET", path))).status == 401, path


# --- Scale-out -----------------------------------------------------------------------------------


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


# --- Lifecycle -----------------------------------------------------------------------------------


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
    for flags in (["--prot", "1"], ["--port", "x"], ["--certfile", "/none", "--keyfile", "/none"]):
        ended = await asyncio.to_thread(run_to_end, *flags)
        assert (ended.returncode, ended.stdout) == (2, "") and "Traceback" not in ended.stderr
        assert flags[0] in ended.stderr or flags[1] in ended.stderr.splitlines()[-1]


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


# --- Names other programs rely on ----------------------------------------------------------------


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

    async with served(manager) as server, Sio.open(server, join="/") as client:
        for event, ack in (
            ('["echo",1,"two",{"3":[4]}]', '[1,"two",{"3":[4]}]'), ('["echo"]', "[]"),
            ('["sync",{"a":1}]', '[[false,{"a":1}]]'), ('["inline"]', "[true]"),
        ):  # fmt: skip
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
