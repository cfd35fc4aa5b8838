"""JSON-RPC 2.0 beyond the examples of its specification: errors, batches, progress."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from karna.jsonrpc import MAX_BATCH
from karna_ws import WebSocketManager
from support import (
    EXECUTE,
    Gate,
    Raw,
    rpc_error,
    failing_manager,
    http,
    limit_for,
    rpc_result,
    rpc_manager,
    served,
    until,
    without_words,
)


async def test_json_rpc_request_with_id_null_is_no_notification() -> None:
    async with served(rpc_manager()) as server, Raw.open(server) as client:
        request = {"jsonrpc": "2.0", "method": "get_data", "id": None}
        await client.send(request)
        assert await client.next() == rpc_result(["hello", 5], None)
        assert await http(server, "POST", "/rpc", request) == (200, rpc_result(["hello", 5], None))
        batch = [request, {"jsonrpc": "2.0", "method": "notify_hello", "params": [7]}]
        assert await http(server, "POST", "/rpc", batch) == (200, [rpc_result(["hello", 5], None)])


@pytest.mark.parametrize(
    ("message", "ours", "code"),
    [
        ({"method": "get_status", "params": 5}, "invalid_request", -32600),
        ({"method": "nope"}, "unknown_method", -32601),
        ({"method": "nope", "params": [1]}, "unknown_method", -32601),
        ({"method": [], "params": [1]}, "invalid_request", -32600),
        ({"method": "subtract", "params": [1]}, "invalid_params", -32602),
        ({"method": "subtract", "params": [1, 2, 3]}, "invalid_params", -32602),
        ({"method": "subtract", "params": ["x", 2]}, "invalid_params", -32602),
        ({"method": "get_status", "params": [1]}, "invalid_params", -32602),
        ({"method": EXECUTE}, "invalid_params", -32602),
        ({"method": "cancel", "params": ["nope"]}, "invalid_params", -32602),
        ({"method": EXECUTE, "params": ["fail value"]}, "command_failed", -32000),
        ({"method": EXECUTE, "params": ["nope"]}, "unknown_command", -32001),
        ({"method": EXECUTE, "params": ["countdown"]}, "usage", -32002),
        ({"method": EXECUTE, "params": ["forever"]}, "timeout", -32003),
        ({"method": EXECUTE, "params": ["ask why"]}, "unavailable", -32005),
    ],
    ids=str,
)  # fmt: skip
async def test_json_rpc_error_has_its_number_and_our_code(
    message: dict[str, Any], ours: str, code: int
) -> None:
    manager = failing_manager()

    @manager.method("subtract")
    async def subtract(minuend: int, subtrahend: int) -> int:
        return minuend - subtrahend

    limit = limit_for(ours)
    async with served(manager, command_timeout_s=limit) as server, Raw.open(server) as client:
        request = {"jsonrpc": "2.0", "id": "x", **message}
        await client.send(request)
        answer = await client.next()
        assert (answer["jsonrpc"], answer["id"]) == ("2.0", "x")
        assert answer["error"]["code"] == code
        assert answer["error"]["data"]["code"] == ours
        if ours == "unknown_command":
            assert answer["error"]["data"]["suggestions"] == []
        assert await http(server, "POST", "/rpc", request) == (200, answer)


@pytest.mark.parametrize(
    ("message", "id"),
    [
        ({"jsonrpc": "1.0", "method": "get_status", "id": 1}, 1),
        ({"jsonrpc": 2.0, "method": "get_status", "id": "a"}, "a"),
        ({"jsonrpc": None}, None),
        ({"jsonrpc": "2.0"}, None),
        ({"jsonrpc": "2.0", "id": 5}, 5),
        ({"jsonrpc": "2.0", "method": "get_status", "id": {}}, None),
        ({"jsonrpc": "2.0", "method": "get_status", "id": 1.5}, None),
        ({"jsonrpc": "2.0", "method": "get_status", "id": True}, None),
        ({"jsonrpc": "1.0", "method": "get_status", "id": [1]}, None),
    ],
    ids=str,
)
async def test_json_rpc_request_of_wrong_form_is_invalid(message: Any, id: Any) -> None:
    async with served() as server, Raw.open(server) as client:
        await client.send(message)
        assert without_words(await client.next()) == rpc_error(-32600, id)


async def test_json_rpc_runs_commands_and_tells_progress_and_cancels() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)

    @manager.commands.command
    async def steps() -> AsyncIterator[int]:
        yield 1
        yield 2

    async with served(manager) as server, Raw.open(server) as client:
        call = {"jsonrpc": "2.0", "method": EXECUTE, "id": 1}
        await client.send({**call, "params": {"command": "steps"}})
        for number in (1, 2):
            assert await client.next() == {
                "jsonrpc": "2.0", "method": "command_progress",
                "params": {"command": "steps", "progress": number, "id": 1},
            }  # fmt: skip
        assert await client.next() == rpc_result({"command": "steps", "result": 2}, 1)
        await client.send({**call, "params": ["gate a"]})
        await until(lambda: gate.begun)
        await client.send({"jsonrpc": "2.0", "method": "cancel", "params": [1], "id": "c"})
        answers = [await client.next(), await client.next()]
        assert rpc_result({"cancelled": 1}, "c") in answers
        assert rpc_error(-32004, 1) in list(map(without_words, answers))
        await client.send({"jsonrpc": "2.0", "method": "get_status", "id": "s"})
        assert (await client.next())["result"] == manager.status()


async def test_json_rpc_batch_is_answered_when_all_of_it_is() -> None:
    manager = rpc_manager()
    gate = Gate(manager)
    async with served(manager, max_running_commands=1) as server, Raw.open(server) as client:
        call = {"jsonrpc": "2.0", "method": EXECUTE}
        await client.send([
            {**call, "params": ["gate a"], "id": "a"},
            {**call, "params": ["gate b"], "id": "b"},
            {**call, "params": ["gate c"], "id": "c"},
            {**call, "params": ["gate silent"]},
            {**call, "params": ["countdown 0"], "id": "d"},
        ])  # fmt: skip
        await until(lambda: gate.begun)
        await client.send({"jsonrpc": "2.0", "method": "cancel", "params": ["b"], "id": "x"})
        assert (await client.next())["result"] == {"cancelled": "b"}
        gate.let("a", "c", "silent")
        batch = await client.next()
        assert sorted(each["id"] for each in batch) == ["a", "b", "c", "d"]
        assert [each["error"]["code"] for each in batch if "error" in each] == [-32004]
        assert await client.received() == [], "no progress of a batch"


async def test_json_rpc_batch_is_bounded() -> None:
    async with served() as server, Raw.open(server) as client:
        one = {"jsonrpc": "2.0", "method": "get_status", "id": 1}
        await client.send([one] * (MAX_BATCH + 1))
        assert without_words(await client.next()) == rpc_error(-32600, None)
        await client.send([one] * MAX_BATCH)
        assert len(await client.next()) == MAX_BATCH


@pytest.mark.parametrize("text", ["command_progress", "status_update", "error", "jsonrpc"])
async def test_json_rpc_result_over_http_may_be_any_text(text: str) -> None:
    async with served(rpc_manager()) as server:
        request = {"jsonrpc": "2.0", "method": "later", "params": [text], "id": 1}
        assert await http(server, "POST", "/rpc", request) == (200, rpc_result(text, 1))
        batch = (200, [rpc_result(text, 1)])
        assert await http(server, "POST", "/rpc", [request]) == batch


async def test_json_rpc_over_http_leaves_progress_out() -> None:
    async with served() as server:
        request = {"jsonrpc": "2.0", "method": EXECUTE, "params": ["countdown 0.01"], "id": 1}
        status, answer = await http(server, "POST", "/rpc", request)
        assert (status, answer["result"]["result"]) == (200, {"remaining": 0, "percent": 100})


async def test_json_rpc_method_of_a_reserved_name_is_unknown() -> None:
    async with served(rpc_manager()) as server, Raw.open(server) as client:
        await client.send({"jsonrpc": "2.0", "method": "rpc.discover", "id": 1})
        assert without_words(await client.next()) == rpc_error(-32601, 1)
