"""JSON-RPC 2.0: errors, batches, progress, and the examples of its specification."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from karna.jsonrpc import is_json_rpc
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
        await client.send([one] * (256 + 1))
        assert without_words(await client.next()) == rpc_error(-32600, None)
        await client.send([one] * 256)
        assert len(await client.next()) == 256


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


async def test_long_list_is_not_searched_to_its_end_for_json_rpc() -> None:
    """A list that can be no batch cost 20 ms, as it holds half a million numbers."""
    looked_at = 0

    class Item(dict[str, Any]):
        def __contains__(self, key: object) -> bool:
            nonlocal looked_at
            looked_at += 1
            return False

    assert not is_json_rpc([Item()] * 100_000)
    assert looked_at <= 256
