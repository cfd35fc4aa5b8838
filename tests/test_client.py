"""The Python client: requests that are sent once, cancellation, broadcasts, calls of the server."""

from __future__ import annotations

import asyncio
import gc
import itertools
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest

from karna.client import CommandError, ConnectionLost, NotConnected
from karna.frames import frame_text
from karna_ws import WebSocketManager
from support import Gate, failing_manager, offsets, served, until
from support_clients import Wire
from support_link import Peer, hurried, join, scripted, take
from support_process import ENVIRONMENT


async def test_client_runs_commands_and_methods_at_the_same_time() -> None:
    manager = failing_manager()
    gate = Gate(manager)
    async with served(manager) as server, join(server) as client:
        slow = asyncio.create_task(client.execute("gate a"))
        await until(lambda: gate.begun)
        assert await client.execute("echo 'a  b'") == "a  b"
        assert await client.execute("echo", text=["x", "y"]) == "x y"
        assert await client.call("double", number=4) == 8
        assert (await client.status())["command"]["state"] == "running"
        gate.let("a")
        assert await slow == "a"


async def test_result_may_be_any_json() -> None:
    manager = WebSocketManager()

    @manager.commands.command(inline=True)
    def mirror(value: Any) -> Any:
        return value

    async with served(manager) as server, join(server) as client:
        odd = "ü\0\u2028😀"
        for value in (None, True, 0, -1.5, "", odd, [], {}, {"result": [{"error": None}]}):
            assert await client.execute("mirror", value=value) == value


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("ecko hi", "unknown_command", "did you mean echo"),
        ("countdown", "usage", "countdown SECONDS"),
        ("fail value", "command_failed", "no luck"),
        ("fail away", "unavailable", "the lamp is away"),
        ("", "invalid_params", "command"),
    ],
)
async def test_error_answer_is_raised(line: str, code: str, message: str) -> None:
    async with served(failing_manager()) as server, join(server) as client:
        with pytest.raises(CommandError, match=message) as caught:
            await client.execute(line)
        assert caught.value.code == caught.value.data["code"] == code
        assert message in caught.value.message
        assert str(caught.value) == f"{code}: {caught.value.message}"
        assert await client.execute("echo still here") == "still here"


async def test_unknown_method_is_raised() -> None:
    async with served() as server, join(server) as client:
        with pytest.raises(CommandError) as caught:
            await client.call("nope")
        assert caught.value.code == "unknown_method"


async def test_params_that_json_cannot_hold_are_raised_and_nothing_is_sent() -> None:
    async with served() as server, join(server) as client:
        with pytest.raises(TypeError):
            await client.execute("echo", text={1})
        assert not client._pending
        assert await client.execute("echo x") == "x"


def reporting_manager() -> WebSocketManager:
    manager = WebSocketManager()

    @manager.commands.command
    async def report() -> AsyncIterator[Any]:
        """Report three times, the last with the result."""
        yield {"percent": 50}
        yield "half"
        yield None

    return manager


async def test_progress_comes_in_order_before_the_result() -> None:
    async with served(reporting_manager()) as server, join(server) as client:
        seen: list[Any] = []
        result = await client.execute("report", on_progress=seen.append)
        assert (seen, result) == ([{"percent": 50}, "half", None], None)
        assert await client.execute("report") is None  # nobody asked


async def test_progress_goes_to_the_default_where_there_is_no_other() -> None:
    default: list[Any] = []
    own: list[Any] = []
    async with (
        served(reporting_manager()) as server,
        join(server, on_progress=default.append) as client,
    ):
        await client.execute("report")
        await client.execute("report", on_progress=own.append)
    assert len(default) == len(own) == 3


@pytest.mark.parametrize("error", [ValueError("no more"), asyncio.CancelledError()])
async def test_error_of_on_progress_is_raised_and_cancels_the_command(error: Any) -> None:
    manager = WebSocketManager()
    cancelled = asyncio.Event()

    @manager.commands.command
    async def endless() -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    def fail(progress: Any) -> None:
        raise error

    async with served(manager) as server, join(server) as client:
        with pytest.raises((ValueError, RuntimeError), match="no more|CancelledError"):
            await client.execute("endless", on_progress=fail)
        await cancelled.wait()
        assert not client._pending


async def test_on_progress_that_is_async_is_refused() -> None:
    async def report(progress: Any) -> None: ...

    async with served() as server, join(server) as client:
        with pytest.raises(TypeError, match="not async"):
            await client.execute("report", on_progress=report)


async def test_cancelling_the_awaiting_task_cancels_the_command() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    async with served(manager) as server, join(server) as client:
        task = asyncio.create_task(client.execute("gate a"))
        other = asyncio.create_task(client.execute("gate b"))
        await until(lambda: len(gate.begun) == 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: gate.cancelled == ["a"])
        gate.let("b")
        assert await other == "b"
        await client.settled()
        assert not client._pending and not client._cancels


async def test_cancelled_request_reports_no_more() -> None:
    seen: list[Any] = []

    async def script(peer: Peer) -> None:
        await peer.welcome()
        request = await peer.next()
        report = {"type": "command_progress", "data": {"progress": 1}, "id": request["id"]}
        await peer.send(report)
        await peer.next("cancel")
        error = {"code": "cancelled", "message": "cancelled"}
        await peer.send(report, {"type": "error", "data": error, "id": request["id"]})
        await peer.closed()

    async with scripted(script) as port, join(port) as client:
        task = asyncio.create_task(client.execute("brew", on_progress=seen.append))
        await until(lambda: seen)
        task.cancel()
        await client.settled()
    assert seen == [1] and task.cancelled()


async def test_asyncio_timeout_cancels_the_command() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    async with served(manager) as server, join(server) as client:

        async def expire() -> None:
            await until(lambda: gate.begun)
            limit.reschedule(0)

        expiring = asyncio.create_task(expire())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(None) as limit:
                await client.execute("gate a")
        await expiring
        await client.settled()
        assert gate.cancelled == ["a"]


async def test_settled_waits_for_the_answer_of_what_was_cancelled() -> None:
    answered = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.welcome()
        request, cancel = await peer.next(), await peer.next()
        assert (cancel["method"], cancel["params"]) == ("cancel", {"id": request["id"]})
        await peer.send({"type": "command_response", "data": {}, "id": cancel["id"]})
        await answered.wait()
        error = {"code": "cancelled", "message": "cancelled"}
        await peer.send({"type": "error", "data": error, "id": request["id"]})
        await peer.closed()

    async with scripted(script) as port, join(port) as client:
        task = asyncio.create_task(client.execute("brew"))
        await until(lambda: client._pending)
        task.cancel()
        settled = asyncio.create_task(client.settled())
        await until(lambda: not client._cancels and task.done())
        stream = client.broadcasts()
        assert not settled.done()
        answered.set()
        await settled
        del stream


async def test_request_whose_connection_breaks_fails_at_once_and_is_never_sent_again() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    async with (
        served(manager) as server,
        Wire(server.port) as wire,
        hurried(),
        join(wire.port) as client,
    ):
        tasks = [asyncio.create_task(client.execute(f"gate {name}")) for name in "abc"]
        await until(lambda: len(gate.begun) == 3)
        wire.cut()
        for task in tasks:
            with pytest.raises(ConnectionLost, match="may have been executed"):
                await task
        assert not client.is_connected  # it failed before the next connection
        wire.mend()
        gate.let("a", "b", "c", "d")
        assert await client.execute("gate d") == "d"
        assert gate.begun == ["a", "b", "c", "d"]


async def test_request_waits_for_the_connection_and_is_sent_once() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    gate.let("a", "b")
    async with (
        served(manager) as server,
        Wire(server.port) as wire,
        hurried(),
        join(wire.port) as client,
    ):
        wire.cut()
        await until(lambda: not client.is_connected)
        tasks = [asyncio.create_task(client.execute(f"gate {name}")) for name in "ab"]
        status = asyncio.create_task(client.status())
        given_up = asyncio.create_task(client.execute("gate never"))
        await asyncio.sleep(0)
        given_up.cancel()
        wire.mend()
        assert await asyncio.gather(*tasks) == ["a", "b"]
        assert "command" in await status
        assert sorted(gate.begun) == ["a", "b"]


async def test_request_that_finds_no_connection_in_time_fails_unsent() -> None:
    async with (
        served() as server,
        Wire(server.port) as wire,
        hurried(),
        join(wire.port, wait_s=0.03) as client,
    ):
        wire.cut()
        await until(lambda: not client.is_connected)
        for request in (client.execute("echo x"), client.status()):
            with pytest.raises(NotConnected, match="no connection to ws://.* for 0.03 s"):
                await request


async def test_requests_that_wait_for_an_answer_and_then_a_connection_fail_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("karna.client.MAX_UNANSWERED", 1)
    manager = WebSocketManager()
    gate = Gate(manager)
    wait_s = 0.2
    loop = asyncio.get_running_loop()
    async with (
        served(manager) as server,
        Wire(server.port) as wire,
        hurried(),
        join(wire.port, wait_s=wait_s) as client,
    ):
        tasks = [asyncio.create_task(client.execute(f"gate {name}")) for name in "abcd"]
        await until(lambda: gate.begun)
        wire.cut()
        began = loop.time()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        # 0: a is lost, the others begin to wait; 0.2: they fail. One after the other: 0.6.
        assert [type(each) for each in outcomes] == [ConnectionLost] + 3 * [NotConnected]
        assert wait_s <= loop.time() - began < 2 * wait_s
        assert gate.begun == ["a"]


async def test_client_outside_its_block_says_so() -> None:
    async with served() as server:
        client = join(server)
        with pytest.raises(NotConnected, match="async with"):
            await client.execute("echo x")
        async with client:
            pass
        with pytest.raises(NotConnected, match="closed"):
            await client.status()


async def test_close_fails_what_is_unanswered_and_what_waits() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    async with served(manager) as server, Wire(server.port) as wire:
        async with hurried():
            async with join(wire.port) as client:
                sent = asyncio.create_task(client.execute("gate a"))
                await until(lambda: gate.begun)
            with pytest.raises(ConnectionLost, match="closed"):
                await sent
            async with join(wire.port) as client:
                wire.cut()
                await until(lambda: not client.is_connected)
                waiting = asyncio.create_task(client.execute("gate b"))
                await asyncio.sleep(0)
            with pytest.raises(NotConnected, match="closed"):
                await waiting
        assert gate.begun == ["a"]


async def test_request_that_is_being_written_when_the_connection_breaks_fails() -> None:
    async def deaf(peer: Peer) -> None:
        await peer.welcome()
        if peer.number == 0:
            peer.connection.transport.pause_reading()
            await until(lambda: client._pending)
            peer.connection.transport.abort()
        else:
            await peer.answer({"result": "short"})

    async with scripted(deaf) as port, hurried():
        client = join(port)
        await client.__aenter__()
        with pytest.raises(ConnectionLost, match="may have been executed"):
            await client.execute("x" * 20_000_000)  # more than any socket's buffer holds
        assert await client.execute("brew") == "short"
        assert not client._pending
        await client.close()


async def test_answers_that_nobody_waits_for_are_dropped() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        request = await peer.next()
        answer = {"type": "command_response", "data": {"result": 1}, "id": request["id"]}
        progress = {"type": "command_progress", "data": {"progress": 1}, "id": request["id"]}
        others = [{**answer, "id": id} for id in ("1", "x", 0, -1, 99)]
        mine = [{**answer, "id": request["id"]}, answer, progress]
        without_id = [
            {"type": "command_response", "data": {}},
            {"type": "command_progress", "data": 1},
        ]
        await peer.send(*others, *without_id, *mine, {"type": "end", "data": None})
        await peer.answer({"result": 2})

    async with scripted(script) as port, join(port) as client:
        stream = client.broadcasts()
        assert await client.execute("one") == 1
        assert (await anext(stream)).type == "end"
        assert await client.execute("two") == 2


async def test_requests_beyond_the_limit_wait_for_an_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("karna.client.MAX_UNANSWERED", 2)
    manager = WebSocketManager()
    gate = Gate(manager)
    async with served(manager) as server, join(server) as client:
        tasks = [asyncio.create_task(client.execute(f"gate {name}")) for name in "abcd"]
        await until(lambda: len(gate.begun) == 2)
        assert await client.status()  # is answered whatever waits
        assert len(gate.begun) == 2
        tasks[0].cancel()
        await until(lambda: len(gate.begun) == 3)
        gate.let("b", "c", "d")
        assert await asyncio.gather(*tasks[1:]) == ["b", "c", "d"]


# --- broadcasts --------------------------------------------------------------------------------


async def test_every_iterator_gets_every_broadcast() -> None:
    manager = WebSocketManager()
    async with served(manager) as server:
        client = join(server)
        early = client.broadcasts()  # before it is connected
        async with client:
            late = client.broadcasts()
            manager.notify("hello")
            manager.broadcast("number", 1)
            for stream in (early, late):
                first, second = await anext(stream), await anext(stream)
                assert (first.type, first.data["message"]) == ("notification", "hello")
                assert (second.type, second.data, second.is_gap) == ("number", 1, False)
                assert [first.offset, second.offset] == offsets(manager, 2)


async def test_messages_to_this_client_alone_are_among_the_broadcasts() -> None:
    manager = WebSocketManager()

    @manager.on("connect")
    async def greet(client: Any, auth: Any) -> None:
        await client.send("greeting", {"id": client.id})

    async with served(manager) as server:
        client = join(server)
        stream = client.broadcasts()
        async with client:
            found = await anext(stream)
            assert (found.type, found.offset) == ("greeting", None)


async def test_program_may_use_the_protocols_own_words() -> None:
    manager = WebSocketManager()
    async with served(manager) as server, join(server) as client:
        stream = client.broadcasts()
        for type in ("error", "call", "command_response", "gap", "command_progress"):
            for data in ("text", {"code": "history_gap", "message": "mine"}, None):
                manager.broadcast(type, data)
                found = await anext(stream)
                assert (found.type, found.data, found.is_gap) == (type, data, False)


async def test_iterator_that_takes_too_slowly_loses_the_oldest_and_is_told() -> None:
    manager = WebSocketManager()
    async with served(manager) as server, join(server) as client:
        slow, quick = client.broadcasts(limit=3), client.broadcasts()
        for number in range(5):
            manager.broadcast("number", number)
        assert await take(quick, 5) == [0, 1, 2, 3, 4]
        gap = await anext(slow)
        assert (gap.type, gap.is_gap, gap.data["code"], gap.data["missed"]) == (
            "gap", True, "slow_reader", 2,
        )  # fmt: skip
        assert await take(slow, 3) == [2, 3, 4]
        manager.broadcast("number", 5)
        assert await take(slow, 1) == [5]
        with pytest.raises(ValueError, match="limit"):
            client.broadcasts(limit=0)


async def test_iterator_ends_with_the_client_after_what_is_left() -> None:
    manager = WebSocketManager()
    async with served(manager) as server:
        async with join(server) as client:
            stream, seen = client.broadcasts(), client.broadcasts()
            waiting = asyncio.create_task(anext(client.broadcasts()))
            manager.broadcast("number", 1)
            await take(seen, 1)
            assert (await waiting).data == 1
            waiting = asyncio.create_task(anext(seen, "end"))
            await asyncio.sleep(0)
        assert [each.data async for each in stream] == [1]
        assert await waiting == "end"


async def test_iterator_that_is_cancelled_loses_nothing() -> None:
    manager = WebSocketManager()
    async with served(manager) as server, join(server) as client:
        stream, seen = client.broadcasts(), client.broadcasts()
        waiting = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        manager.broadcast("number", 1)
        waiting.cancel()
        await take(seen, 1)
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await take(stream, 1) == [1]


async def test_iterator_may_be_shared_by_tasks() -> None:
    manager = WebSocketManager()
    async with served(manager) as server, join(server) as client:
        stream = client.broadcasts()
        tasks = [asyncio.create_task(take(stream, 2)) for _ in range(3)]
        await asyncio.sleep(0)
        for number in range(6):
            manager.broadcast("number", number)
        assert sorted(itertools.chain(*await asyncio.gather(*tasks))) == list(range(6))


async def test_iterator_that_was_dropped_is_forgotten() -> None:
    async with served() as server, join(server) as client:
        client.broadcasts()
        gc.collect()
        assert len(client._streams) == 0


# --- calls of the server -----------------------------------------------------------------------


def question(number: Any, event: str, *args: Any) -> dict[str, Any]:
    return {"type": "call", "data": {"event": event, "args": list(args)}, "call": number}


async def test_call_of_the_server_is_answered() -> None:
    answers: dict[Any, Any] = {}
    calls = [
        question(1, "add", 2, 3), question("two", "where"), question(3, "fail"),
        question(4, "unknown\x1b[2J"), question(5, "odd"), question(6, "add", 1),
        question(7, "later"), question(8, "cancel"),
    ]  # fmt: skip

    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.send(*calls)
        for _ in calls:
            answer = await peer.next("answer")
            assert set(answer) == {"method", "params"}
            params = answer["params"]
            answers[params.pop("call")] = params
        await peer.answer({"result": "asked"})

    async with scripted(script) as port:
        client = join(port)

        @client.on("add")
        async def add(one: int, other: int) -> int:
            return one + other

        @client.on("where")
        def where() -> bool:
            return threading.current_thread() is threading.main_thread()

        @client.on("fail")
        async def fail() -> None:
            raise ValueError("no\nluck")

        @client.on("odd")
        async def odd() -> Any:
            return {1}

        @client.on("later")
        def later() -> Any:
            return add(4, 5)

        @client.on("cancel")
        async def cancel() -> None:
            raise asyncio.CancelledError

        async with client:
            assert await client.execute("ask") == "asked"
    assert answers.pop(6)["error"].startswith("test_call_of")  # a missing argument
    assert answers == {
        1: {"data": 5}, "two": {"data": False}, 3: {"error": "no luck"},
        4: {"error": r"this client has no handler for 'unknown [2J'"},
        5: {"error": "Type is not JSON serializable: set"}, 7: {"data": 9},
        8: {"error": "CancelledError"},
    }  # fmt: skip


async def test_error_of_a_handler_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.send(question(1, "fail"))
        assert (await peer.next("answer"))["params"]["error"] == "no luck"
        await peer.answer({"result": 1})

    async with scripted(script) as port:
        client = join(port)

        @client.on("fail")
        async def fail() -> None:
            raise ValueError("no luck")

        async with client:
            await client.execute("wait")
    assert "ValueError: no luck" in caplog.text and "'fail'" in caplog.text


async def test_handler_is_cancelled_when_the_connection_breaks() -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.welcome()
        if peer.number == 0:
            await peer.send(question(1, "slow"))
            await begun.wait()
            peer.connection.transport.abort()
        else:
            await peer.answer({"result": "no answer came but this"})

    async with scripted(script) as port:
        client = join(port)

        @client.on("slow")
        async def slow() -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        async with hurried(), client:
            await cancelled.wait()
            assert await client.execute("x") == "no answer came but this"
            assert not client._calls


async def test_close_cancels_handlers_and_waits_for_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    begun, over = asyncio.Event(), []

    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.send(question(1, "slow"))
        await peer.closed()

    async with scripted(script) as port:
        client = join(port)

        @client.on("slow")
        async def slow() -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0.05)  # the closing handshake takes 1/50 of it
                over.append("tidied up")

        async with client:
            await begun.wait()
        assert over == ["tidied up"] and not client._calls
    assert not [each for each in caplog.records if each.levelname == "ERROR"]


async def test_calls_before_the_welcome_end_when_it_never_comes() -> None:
    begun = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.send(question(1, "slow"))
        await begun.wait()
        await peer.close(1008, "no")

    async with scripted(script) as port:
        client = join(port)

        @client.on("slow")
        async def slow() -> None:
            begun.set()
            await asyncio.Event().wait()

        with pytest.raises(NotConnected):
            await client.__aenter__()
        await until(lambda: not client._calls)


async def test_too_many_calls_are_answered_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("karna.client.MAX_CALLS", 2)
    answers: list[tuple[int, Any]] = []
    begun: list[int] = []
    free = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.welcome()
        # In one read, so that none is answered before the last has come: 4 and 5 never are.
        peer.connection.transport.write(b"".join(map(frame_of, range(6))))
        for _ in range(4):
            params = (await peer.next("answer"))["params"]
            answers.append((params.pop("call"), params))
            if len(answers) == 2:
                free.set()
        await peer.send(question(6, "wait", 6))  # there is room again
        assert (await peer.next("answer"))["params"] == {"call": 6, "data": "done"}
        await peer.answer({"result": 1})

    def frame_of(number: int) -> bytes:
        return frame_text(orjson.dumps(question(number, "wait", number)))

    async with scripted(script) as port:
        client = join(port)

        @client.on("wait")
        async def wait(number: int) -> str:
            begun.append(number)
            await free.wait()
            return "done"

        async with client:
            await client.execute("x")
    busy = {"error": "this client answers 2 calls already"}
    assert sorted(answers[:2]) == [(2, busy), (3, busy)]
    assert sorted(answers[2:]) == [(0, {"data": "done"}), (1, {"data": "done"})]
    assert begun == [0, 1, 6]


async def test_on_is_used_with_a_name_once() -> None:
    client = join(1)
    with pytest.raises(TypeError, match=r'@client.on\("confirm"\)'):
        client.on(lambda: None)  # type: ignore[arg-type]

    @client.on("confirm")
    def confirm() -> bool:
        return True

    assert confirm() is True  # the decorator gives the function back
    with pytest.raises(ValueError, match="already"):
        client.on("confirm")


def test_server_does_not_load_the_client() -> None:
    code = "import sys, karna_ws; print([n for n in sys.modules if n in sys.argv])"
    rooms = ["karna.client", "karna.client.link", "karna.client.__main__"]
    words = [sys.executable, "-c", code, *rooms]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
