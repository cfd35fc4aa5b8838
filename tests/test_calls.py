"""A request from its arrival to its single answer: errors, waiting in order, cancellation."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest

from karna.command import Call
from karna.door import HOLD_CALLS
from karna.work import Job
from karna_ws import Client, WebSocketManager
from services import Command, CommandFailed, CommandProcessor, Context
from support import (
    EXECUTE,
    REQUEST_ERRORS,
    Gate,
    Raw,
    Sio,
    execute,
    failing_manager,
    limit_for,
    served,
    until,
)
from support_commands import keep_line
from support_peers import (
    RAISED,
    RETURNED,
    ask,
    close_frame,
    dial,
    engine,
    frame,
    in_fragments,
    misbehaving,
    post,
    raw,
    request,
)
from support_property import JSON, PROPERTY, example, given, settings, st


# --- Errors ----------------------------------------------------------------------------------------


BAD_MESSAGES: list[tuple[bytes, str]] = [
    (b"", "invalid_json"), (b" ", "invalid_json"), (b"x", "invalid_json"), (b"{", "invalid_json"),
    (b"{}}", "invalid_json"), (b"NaN", "invalid_json"), (b"Infinity", "invalid_json"),
    (b"'x'", "invalid_json"), (b"\xef\xbb\xbf{}", "invalid_json"), (b"[" * 5000, "invalid_json"),
    (b'{"a":' * 5000, "invalid_json"), (b'"\\ud800"', "invalid_json"),
    (b"1" * 5000, "invalid_json"),
    (b"null", "invalid_request"), (b"true", "invalid_request"), (b"1", "invalid_request"),
    (b"1e999", "invalid_json"), (b'"x"', "invalid_request"), (b"[]", "invalid_request"),
    (b"[1]", "invalid_request"), (b"[{}]", "invalid_request"), (b"{}", "invalid_request"),
    (b'{"method":null}', "invalid_request"), (b'{"method":1}', "invalid_request"),
    (b'{"method":["get_status"]}', "invalid_request"), (b'{"method":{}}', "invalid_request"),
    (b'{"method":"get_status","params":[]}', "invalid_request"),
    (b'{"method":"get_status","params":null}', "invalid_request"),
    (b'{"method":"get_status","params":"x"}', "invalid_request"),
    (b'{"method":"get_status","id":1.5}', "invalid_request"),
    (b'{"method":"get_status","id":true}', "invalid_request"),
    (b'{"method":"get_status","id":[]}', "invalid_request"),
    (b'{"method":"get_status","id":{}}', "invalid_request"),
    (b'{"method":"get_status","id":18446744073709551616}', "invalid_request"),
    (b'{"method":""}', "unknown_method"), (b'{"method":"__init__"}', "unknown_method"),
    (b'{"method":"get_status\\u0000"}', "unknown_method"),
    (b'{"method":"execute_command"}', "invalid_params"),
    (b'{"method":"execute_command","params":{}}', "invalid_params"),
    (b'{"method":"execute_command","params":{"command":1}}', "invalid_params"),
    (b'{"method":"execute_command","params":{"command":""}}', "invalid_params"),
    (b'{"method":"execute_command","params":{"command":" \\t\\n"}}', "invalid_params"),
    (b'{"method":"execute_command","params":{"command":["echo"]}}', "invalid_params"),
    (b'{"method":"execute_command","params":{"command":"no-such-command"}}', "unknown_command"),
    (b'{"method":"execute_command","params":{"command":"echo \\"open"}}', "usage"),
    (b'{"method":"execute_command","params":{"command":"time","x":1}}', "usage"),
    (b'{"method":"cancel"}', "invalid_params"),
    (b'{"method":"cancel","params":{"id":null}}', "invalid_params"),
    (b'{"method":"cancel","params":{"id":true}}', "invalid_params"),
    (b'{"method":"cancel","params":{"id":1.5}}', "invalid_params"),
    (b'{"method":"cancel","params":{"id":"none"}}', "invalid_params"),
]  # fmt: skip


@pytest.mark.parametrize("opcode", [1, 2])
async def test_bad_messages_get_one_error_each_and_the_connection_goes_on(opcode: int) -> None:
    async with served() as server, raw(server.port) as peer:
        await peer.send(b"".join(frame(opcode, message) for message, _ in BAD_MESSAGES))
        for message, code in BAD_MESSAGES:
            answer = await peer.json()
            assert (answer["type"], answer["data"]["code"]) == ("error", code), message
            assert answer["data"]["message"]
        if opcode == 2:  # bytes that are no text are no broken frame
            await peer.send(frame(2, b"\xff\xfe"))
            assert (await peer.json())["data"]["code"] == "invalid_json"
        await peer.send_json(request("get_status", "end"))
        assert (await peer.json())["id"] == "end"


@pytest.mark.parametrize(("message", "code", "part"), REQUEST_ERRORS, ids=lambda v: str(v)[:50])
async def test_raw_request_that_fails_is_answered_with_its_code(
    message: Any, code: str, part: str
) -> None:
    async with (
        served(failing_manager(), command_timeout_s=limit_for(code)) as server,
        Raw.open(server) as client,
    ):
        error = await client.error_of(message)
        assert error["code"] == code
        assert part in json.dumps(error).replace('\\"', '"')
        assert "Traceback" not in json.dumps(error)
        if isinstance(message, dict) and message.get("method") == EXECUTE:
            line = (message.get("params") or {}).get("command")
            if code not in ("invalid_params", "invalid_request"):
                assert error["command"] == line
        assert await client.run("echo still here") == "still here"
        assert all(each["type"] == "command_progress" for each in client.kept)


async def test_error_answers_carry_the_id_unless_the_id_is_what_is_wrong() -> None:
    async with (
        served(failing_manager(), command_timeout_s=0.5) as server,
        Raw.open(server) as client,
    ):
        for message, code, _ in REQUEST_ERRORS:
            if isinstance(message, dict) and "id" not in message:
                await client.send({**message, "id": 7})
                assert (await client.final(7))["data"]["code"] == code
        await client.send({"method": "get_status", "id": [7]})
        assert "id" not in await client.next_of("error")


async def test_internal_error_is_logged_and_tells_the_client_nothing() -> None:
    class Buggy(CommandProcessor):
        def prepare(self, line: str, params: Any = None) -> Any:
            if line == "bug":
                raise LookupError("of the program's own processor")
            return super().prepare(line, params or {})

    manager = WebSocketManager(Buggy())
    gate = Gate(manager)
    async with served(manager, logs_errors=True) as server, Raw.open(server) as client:
        await client.send(execute("bug", id=1))
        first = await client.final(1)
        assert first["data"]["code"] == "internal_error"
        assert "own" not in json.dumps(first)
        # The same for one that has waited for its turn; those behind it get theirs.
        await client.send(execute("gate a"), execute("bug"), execute("echo behind"))
        await until(lambda: gate.begun)
        gate.let("a")
        assert (await client.next())["data"]["result"] == "a"
        assert (await client.next())["data"]["code"] == "internal_error"
        assert (await client.next())["data"]["result"] == "behind"


def failing_commands() -> WebSocketManager:
    """A command of each kind that ends with an error, at its first step or later."""
    manager = WebSocketManager()

    async def at_once(text: str, context: Context) -> None:
        raise CommandFailed("no")

    async def coroutine(text: str) -> None:
        await asyncio.sleep(0)
        raise CommandFailed("no")

    async def reporting(text: str, context: Context) -> None:
        await asyncio.sleep(0)
        raise CommandFailed("no")

    async def stream(text: str) -> AsyncIterator[int]:
        yield 1
        raise CommandFailed("no")

    def thread(text: str) -> None:
        raise CommandFailed("no")

    for function in (at_once, coroutine, reporting, stream, thread):
        manager.commands.command(function)
    return manager


@pytest.mark.parametrize("name", ["at_once", "coroutine", "reporting", "stream", "thread"])
async def test_command_that_fails_leaves_nothing_that_only_the_collector_finds(name: str) -> None:
    """Its request may be a mebibyte, and the collector comes after thousands of objects."""
    async with served(failing_commands()) as server, Raw.open(server) as client:
        for round in range(2):
            for _ in range(20):
                answer = await client.ask("execute_command", command=f"{name} x")
                assert answer["data"]["code"] == "command_failed"
            await asyncio.sleep(0)
            if not round:  # what the first ones have made stays
                gc.collect()
                gc.disable()
        try:
            assert gc.collect() < 20
        finally:
            gc.enable()


async def test_override_of_how_commands_start_gets_their_context_and_may_raise() -> None:
    class Counting(CommandProcessor):
        def start_call(self, call: Call, context: Context | None, on_end: Any) -> Job:
            assert context is not None
            if "fail" in call.args:
                raise LookupError(context.client.id)
            return super().start_call(call, context, on_end)

    manager = WebSocketManager(Counting())

    @manager.commands.command
    async def say(text: str) -> str:
        await asyncio.sleep(0)
        return text

    async with (
        served(manager, logs_errors=True, max_running_commands=2) as server,
        Raw.open(server) as client,
    ):
        for id in (1, 2, 3, None, None):
            await client.send(execute("say fail", id=id))
            assert (await client.next())["data"]["code"] == "internal_error"
        for id in (4, None):
            await client.send(execute("say well", id=id))
            assert (await client.next())["data"]["result"] == "well"


async def test_line_that_can_not_be_bound_by_a_fault_is_answered_on_every_door() -> None:
    class Broken(Command):
        def bind(self, words: list[str], params: Any) -> Any:
            raise LookupError("a bug")

    async def say(text: str) -> str:
        await asyncio.sleep(0)
        return text

    manager = WebSocketManager()
    manager.commands.add(Broken(say))
    async with served(manager, logs_errors=True) as server:
        async with Raw.open(server) as client:
            await client.send(execute("say x", id=7))
            answer = await client.final(7)
            assert (answer["data"]["code"], answer["data"]["command"]) == (
                "internal_error",
                "say x",
            )
        async with Sio.open(server, join="/") as socket:
            answer = await socket.rpc(execute("say x", id=7))
            assert answer["data"]["code"] == "internal_error"


async def test_override_that_raises_is_an_internal_error_not_the_end() -> None:
    class Broken(WebSocketManager):
        def handle_message(self, client: Client, payload: bytes, is_text: bool) -> str:
            if payload in (b"surrogate", b"none"):
                return "\ud800"
            raise RAISED[payload.decode()]()

    async with served(Broken(), logs_errors=True) as server, raw(server.port) as peer:
        for name in RAISED:
            if issubclass(type(RAISED[name]()), Exception):
                await peer.send(frame(1, name.encode()))
                assert (await peer.json())["data"]["code"] == "internal_error"
        for opcode in (1, 2):
            await peer.send(in_fragments(opcode, b"surrogate", 2))
            assert (await peer.json())["data"]["code"] == "internal_error"


KINDS = ["coroutine", "at_once", "thread", "stream", "inline"]


@pytest.mark.parametrize("kind", KINDS)
async def test_handlers_that_fail_answer_their_client_once_and_bother_no_other(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    manager = WebSocketManager()
    misbehaving(manager)
    gate = Gate(manager)
    names = [*RAISED, *RETURNED]
    async with (
        served(manager, max_running_commands=4) as server,
        raw(server.port) as other,
        raw(server.port) as peer,
        engine(server.port) as session,
    ):
        await other.send_json(execute("gate other", "o"))
        for number, name in enumerate(names):
            await peer.send_json(execute(f"{kind} {name}", number))
            await peer.send_json(request(f"method_{kind}", 1000 + number, name=name))
        answers: dict[Any, Any] = {}
        while len(answers) < 2 * len(names):
            answer = await peer.json()
            if answer["type"] == "command_progress":
                continue
            assert answer["id"] not in answers
            answers[answer["id"]] = answer
        for number, name in enumerate(names):
            for id in (number, 1000 + number):
                assert answers[id]["type"] == "error", (name, answers[id])
                assert answers[id]["data"]["message"], name
                expected = {"command_failed"} | ({"cancelled"} if name == "cancelled" else set())
                if name == "refused":  # a RequestError says itself what it is
                    expected = {"forbidden"}
                assert answers[id]["data"]["code"] in expected, (name, answers[id])
        if kind != "stream":
            for number, name in enumerate(names):
                event = json.dumps([f"event_{kind}", name]).encode()
                await session.send(frame(1, b"42/ws,%d%b" % (number, event)))
            acks = {}
            for _ in names:
                payload = (await session.frame()).payload
                id_, _, rest = payload.removeprefix(b"43/ws,").partition(b"[")
                assert int(id_) not in acks
                (acks[int(id_)],) = json.loads(b"[" + rest)
            for number, name in enumerate(names):
                assert acks[number]["type"] == "error", name
        await other.send_json(execute("echo still here", 2))
        assert (await other.json())["data"]["result"] == "still here"
        gate.let("other")
        assert (await other.json())["id"] == "o"
        await peer.send_json(request("get_status", "end"))
        assert (await peer.json())["id"] == "end"
    assert "Exception in callback" not in caplog.text
    assert "never retrieved" not in caplog.text


# --- One final answer ------------------------------------------------------------------------------


async def test_params_reach_the_command_by_name() -> None:
    manager = WebSocketManager()

    @manager.commands.command
    async def greet(
        name: str, times: int = 1, *, loud: bool = False, tags: list[str] | None = None
    ) -> str:
        text = " ".join([f"hello {name}"] * times) + "".join(tags or [])
        return text.upper() if loud else text

    async with served(manager) as server, Raw.open(server) as client:
        for line, params, result in (
            ("greet Ada", {}, "hello Ada"),
            ("greet", {"name": "Ada Lovelace"}, "hello Ada Lovelace"),
            ("greet", {"name": "'", "times": 2}, "hello ' hello '"),
            ("greet Ada", {"times": "2"}, "hello Ada hello Ada"),
            ("greet Ada --loud", {"times": 1}, "HELLO ADA"),
            ("greet 'Ada L'", {"loud": True, "tags": ["!", "?"]}, "HELLO ADA L!?"),
            ("greet --no-loud", {"name": ""}, "hello "),
        ):
            assert await client.run(line, **params) == result
        for line, params in (
            ("greet Ada", {"name": "Ada"}), ("greet Ada", {"loud": "loud"}),
            ("greet Ada", {"times": 1.5}), ("greet Ada", {"times": True}),
            ("greet Ada", {"tags": "x"}), ("greet Ada", {"tags": [1]}),
            ("greet", {"name": None}), ("greet", {"name": 5}), ("greet", {}),
            ("greet Ada", {"more": 1}),
        ):  # fmt: skip
            answer = await client.ask(EXECUTE, command=line, **params)
            assert answer["data"]["code"] == "usage", (line, params)


async def test_pipelined_requests_are_each_answered_once() -> None:
    manager = failing_manager()
    lines = ["echo x", "countdown 0", "fail value", "fail_in_thread", "nope", "countdown x", "help"]
    async with served(manager) as server, Raw.open(server) as client:
        ids = list(range(700))
        requests = [execute(lines[id % len(lines)], id=id + 1) for id in ids]
        texts = [json.dumps(request).encode() for request in requests]
        frames = [
            (bytes((0x81, 0x80 | len(text))) if len(text) < 126
             else bytes((0x81, 0xFE)) + len(text).to_bytes(2, "big")) + b"\0\0\0\0" + text
            for text in texts
        ]  # fmt: skip
        data = b"".join(frames)
        for start in range(0, len(data), 10_007):  # frames are cut anywhere
            client.connection.transport.write(data[start : start + 10_007])
        finals: list[int] = []
        while len(finals) < len(ids):
            answer = await client.next()
            if answer["type"] != "command_progress":
                finals.append(answer["id"])
        assert sorted(finals) == [id + 1 for id in ids]
        assert [each for each in await client.received() if each["type"] != "x"] == []


METHODS = st.sampled_from(
    ["get_status", EXECUTE, EXECUTE, EXECUTE, "cancel", "double", "break", "nope", "rpc.discover"]
)


LINES = st.sampled_from(
    ["echo hi", "countdown 0", "time", "help", "nope", "", " ", 'echo "', "fail value", "fail exit",
     "give deep", "give bytes", "fail_in_thread", "clients", "interpret hi", "ask x", "describe x"]
) | st.text(max_size=10)  # fmt: skip


PARAMS = st.fixed_dictionaries(
    {}, optional={"command": LINES | JSON, "id": JSON, "number": JSON, "text": JSON, "how": JSON}
)


REQUESTS = st.fixed_dictionaries(
    {},
    optional={"method": METHODS | JSON, "params": PARAMS | JSON,
              "id": st.integers(0, 5) | st.text(max_size=2) | JSON},
)  # fmt: skip


@settings(PROPERTY, max_examples=60)
@given(st.lists(REQUESTS | JSON | st.binary(max_size=20), max_size=12), st.booleans())
@example([{"id": 2**63}, {"method": [], "id": "x"}, [], None, b"\xff"], True)
async def test_every_request_gets_one_final_answer_and_the_connection_stays(
    messages: list[Any], is_binary: bool
) -> None:
    async with served(failing_manager()) as server, Raw.open(server) as client:
        for message in messages:
            data = message if isinstance(message, bytes) else orjson.dumps(message)
            await client.send(data if is_binary or data == message else data.decode())
        answers = []
        while len(answers) < len(messages):
            answer = await client.next()
            if answer["type"] != "command_progress":
                answers.append(answer)
        assert await client.received() == []
        for answer in answers:
            assert answer["type"] in ("command_response", "status_update", "error")
        ids = [each.get("id") for each in messages if isinstance(each, dict)]
        wanted = [id for id in ids if type(id) in (int, str)]
        key = repr
        assert sorted((each["id"] for each in answers if "id" in each), key=key) == sorted(
            wanted, key=key
        )


# --- Waiting in order ------------------------------------------------------------------------------


async def test_commands_beyond_the_limit_wait_in_order_while_status_and_cancel_go_on() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    async with (
        served(manager, max_running_commands=2) as server,
        raw(server.port) as peer,
        raw(server.port) as other,
    ):
        for name in ("a", "b", "c", "d", "e"):
            await peer.send_json(execute(f"gate {name}", name))
        await peer.send_json(request("get_status", "s"))
        assert (await peer.json())["id"] == "s"
        assert gate.begun == ["a", "b"]
        await other.send_json(execute("echo free", 1))
        assert (await other.json())["data"]["result"] == "free"
        await peer.send_json(request("cancel", "x", id="d"))  # one that waits
        answers = [await peer.json() for _ in range(2)]
        by_id = {answer["id"]: answer for answer in answers}
        assert by_id["d"]["data"]["code"] == "cancelled"
        assert by_id["x"]["data"] == {"cancelled": "d"}
        await peer.send_json(request("cancel", "y", id="a"))  # one that runs
        by_id = {answer["id"]: answer for answer in [await peer.json() for _ in range(2)]}
        assert by_id["a"]["data"]["code"] == "cancelled" and "y" in by_id
        await until(lambda: gate.begun == ["a", "b", "c"])
        gate.let("b", "c", "e")
        assert {(await peer.json())["id"] for _ in range(3)} == {"b", "c", "e"}
        assert gate.begun == ["a", "b", "c", "e"]


async def test_requests_without_id_run_one_after_another_in_order() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    async with (
        served(manager, max_running_commands=5) as server,
        raw(server.port) as peer,
    ):
        await peer.send_json(execute("gate p", 1))
        for name in ("a", "b", "c"):
            await peer.send_json(execute(f"gate {name}"))
        await peer.sync()
        assert gate.begun == ["p", "a"]
        gate.let("c", "b")
        await peer.sync()
        assert gate.begun == ["p", "a"]
        gate.let("a")
        assert [(await peer.json())["data"]["result"] for _ in range(3)] == ["a", "b", "c"]


async def test_queue_goes_on_past_a_request_that_can_not_be_prepared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    prepare = manager.commands.prepare

    def break_down(line: str, params: Any = None) -> Any:
        if line == "broken":
            raise RuntimeError("a bug")
        return prepare(line, params or {})

    monkeypatch.setattr(manager.commands, "prepare", break_down)
    async with (
        served(manager, logs_errors=True, max_running_commands=1) as server,
        raw(server.port) as peer,
    ):
        for id, line in enumerate(("gate a", "broken", "echo on")):
            await peer.send_json(execute(line, id))
        await peer.sync()
        gate.let("a")
        answers = [await peer.json() for _ in range(3)]
        assert [answer["id"] for answer in answers] == [0, 1, 2]
        assert answers[1]["data"]["code"] == "internal_error"


async def test_client_with_too_many_waiting_is_not_read_until_some_have_ended() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    count = 256 + 50
    async with served(manager) as server, Raw.open(server) as client:
        await client.send(execute("gate a"))
        await client.send(*(execute(f"echo {number}") for number in range(count)))
        await client.send({"method": "get_status", "id": "s"})
        (connection,) = manager.connections
        await until(lambda: connection._holds & HOLD_CALLS)
        assert connection.waiting == 256 + 1
        gate.let("a")
        messages = [await client.next() for _ in range(count + 2)]
        results = [each["data"]["result"] for each in messages if "id" not in each]
        assert results == ["a", *map(str, range(count))]
        await until(lambda: not connection._holds)
        assert (connection.waiting, connection.waiting_bytes) == (0, 0)


async def test_client_whose_waiting_requests_are_large_is_not_read_either() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    async with served(manager) as server, Raw.open(server) as client:
        await client.send(execute("gate a"))
        for _ in range(5):
            await client.send(execute("echo", text="x" * 300_000))
        (connection,) = manager.connections
        await until(lambda: connection._holds & HOLD_CALLS)
        assert connection.waiting < 5
        gate.let("a")
        assert len([await client.next() for _ in range(6)]) == 6
        assert connection.waiting_bytes == 0


@pytest.mark.parametrize("door", ["raw", "socket.io"])
async def test_client_is_not_read_past_256_waiting_requests_and_nothing_is_lost(door: str) -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    async with (
        served(manager, max_running_commands=1) as server,
        (raw if door == "raw" else engine)(server.port) as peer,
    ):
        messages = [execute("gate g", 0), *(execute(f"echo {n}", n) for n in range(1, 600))]
        texts = [json.dumps(message).encode() for message in messages]
        if door == "socket.io":
            texts = [b'42/ws,%d["rpc",%b]' % (n, text) for n, text in enumerate(texts)]
        await peer.send(b"".join(frame(1, text) for text in texts))
        (connection,) = manager.connections
        await until(lambda: connection._holds == HOLD_CALLS)  # it has had a few turns by then
        assert connection.waiting == 256 + 1
        gate.let("g")
        for number in range(600):
            received = (await peer.frame()).payload
            if door == "socket.io":
                prefix = b"43/ws,%d[" % number
                assert received.startswith(prefix)
                received = received[len(prefix) : -1]
            answer = json.loads(received)
            assert answer["id"] == number
            assert answer["data"]["result"] == ("g" if number == 0 else str(number))
        assert (connection.waiting, connection.waiting_bytes, connection._holds) == (0, 0, 0)


async def test_request_that_waits_takes_not_much_more_than_it_was_sent_as() -> None:
    """A line is short beside the words it is split into."""
    manager, count = WebSocketManager(), 250
    gate = Gate(manager)
    line = "echo" + " aa" * 600
    async with served(manager) as server, raw(server.port) as peer:
        await peer.send_json(execute("gate a"))  # what has no id runs one after another
        await peer.sync()
        tracemalloc.start()
        try:
            for _ in range(count):
                await peer.send_json(execute(line))
            await peer.sync()
            grown, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert grown < 2 * count * len(line)
        gate.let("a")
        for _ in range(1 + count):
            await peer.json()


async def test_client_is_not_read_past_a_mebibyte_of_waiting_requests() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    async with (
        served(manager, max_running_commands=1) as server,
        raw(server.port) as peer,
    ):
        await peer.send_json(execute("gate g", 0))
        sending = asyncio.create_task(
            peer.send(
                b"".join(
                    frame(1, json.dumps(execute("gate h", n, pad="x" * 200_000)).encode())
                    for n in range(1, 150)
                )
            )
        )  # 30 MB
        (connection,) = manager.connections
        await until(lambda: connection._holds == HOLD_CALLS)
        assert 1024 * 1024 < connection.waiting_bytes < 1024 * 1024 + 201_000
        gate.let("g", "h")
        assert {(await peer.json())["id"] for _ in range(150)} == set(range(150))
        await sending
        assert (connection.waiting, connection.waiting_bytes) == (0, 0)


# --- The end of a command --------------------------------------------------------------------------


async def test_cancel_ends_all_commands_of_an_id_that_was_used_twice() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    async with served(manager, max_running_commands=1) as server, Raw.open(server) as client:
        await client.send(execute("gate a", id=1), execute("gate b", id=1))
        await until(lambda: gate.begun)
        await client.ask("cancel", id=1)
        for _ in range(2):
            assert (await client.final(1))["data"]["code"] == "cancelled"
        assert gate.begun == ["a"]


async def test_command_time_is_limited_on_every_door() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    async with served(manager, command_timeout_s=0.15) as server:
        async with raw(server.port) as peer:
            await peer.send_json(execute("gate a", 1))
            answer = await peer.json()
            assert answer["data"]["code"] == "timeout" and "0.15" in answer["data"]["message"]
            await peer.send_json(execute("echo on", 2))
            assert (await peer.json())["data"]["result"] == "on"
        answer_ = await ask(server.port, post("/api/execute_command", {"command": "gate b"}))
        assert (answer_.status, answer_.error["code"]) == (504, "timeout")
        async with engine(server.port) as peer:
            await peer.send(frame(1, b'42/ws,3["rpc",%b]' % json.dumps(execute("gate c")).encode()))
            assert b'"code":"timeout"' in (await peer.frame()).payload
    assert gate.ended == ["a", "b", "c"]


async def test_command_is_cancelled_however_its_client_goes_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("karna.http.PROBE_S", 0.05)
    manager = WebSocketManager()
    gate = Gate(manager)
    async with served(manager, close_timeout_s=0.2) as server:  # a sweep each 50 ms
        for number, how in enumerate(("close", "eof", "reset", "http")):
            context = dial(server.port) if how == "http" else raw(server.port)
            async with context as peer:
                if how == "http":
                    await peer.send(post("/api/execute_command", {"command": "gate http"}))
                else:
                    await peer.send_json(execute(f"gate {how}", 1))
                await until(lambda: len(gate.begun) == number + 1)
                if how == "close":
                    await peer.send(close_frame())
                if how == "eof":
                    peer.writer.write_eof()
            await until(lambda: gate.ended == ["close", "eof", "reset", "http"][: number + 1])
        await until(lambda: not manager.commands.tasks.running)
    assert gate.cancelled == ["close", "eof", "reset", "http"]


async def test_method_runs_in_a_thread_or_on_the_loop_as_it_was_registered() -> None:
    manager = WebSocketManager()

    @manager.method("block")
    def block() -> bool:
        return threading.current_thread() is threading.main_thread()

    @manager.method("inline", inline=True)
    def inline(*, flag: bool = True) -> bool:
        return flag and threading.current_thread() is threading.main_thread()

    async with served(manager) as server, Raw.open(server) as client:
        assert (await client.ask("block"))["data"] is False
        assert (await client.ask("inline"))["data"] is True
        assert (await client.ask("inline", flag=False))["data"] is False


async def test_line_said_again_fails_as_it_did_the_first_time() -> None:
    """The second time it is a prepared one."""
    manager = failing_manager()

    @manager.commands.command(inline=True)
    def odd(kind: str) -> Any:
        return {"bytes": b"x", "keys": {1: 2}}[kind]

    async with served(manager) as server, Raw.open(server) as client, Sio.open(server) as socket:
        await socket.join()
        for id in ({}, {"id": 5}):
            for line in ("fail_inline", "odd bytes", "odd keys", "odd none"):
                answers = []
                for round in range(3):
                    if round:
                        keep_line(manager.commands, line)
                    await client.send(execute(line) | id)
                    answers.append(await client.next())
                    if line != "odd bytes":  # which the Socket.IO door can send
                        assert await socket.rpc(execute(line) | id) == answers[0]
                assert answers == [answers[0]] * 3
                is_error = line != "odd keys"
                assert (answers[0]["type"] == "error") == is_error
                assert answers[0]["data"].get("code") == ("command_failed" if is_error else None)
                assert answers[0]["data"]["command"] == line


async def test_sending_to_a_client_that_has_left_raises() -> None:
    manager = WebSocketManager()
    clients: list[Client] = []

    @manager.on("connect")
    async def keep(client: Client, auth: Any) -> None:
        clients.append(client)

    async with served(manager) as server:
        async with Raw.open(server), Sio.open(server, join="/"):
            await until(lambda: manager.count_clients() == 2)
        await until(lambda: not manager.count_clients())
        for client in clients:
            with pytest.raises(ConnectionError, match=client.id):
                await client.send("hello", 1)
            with pytest.raises(ConnectionError, match=client.id):
                await client.emit("hello", 1)
