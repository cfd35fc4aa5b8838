"""The log: bounded whatever happens, each error of the code shown once and counted, nothing forged."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest

from karna.errors import CommandFailed, Unavailable
from karna.log import COMINGS, MAX_FAULTS, REMEMBER_S, LogGate
from karna.service import Service
from karna_ws import Client, WebSocketManager
from support import Raw, Sio, http, served, until


@pytest.fixture(autouse=True)
def caught(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What has been logged since the last look, from level info on; of a traceback its ends."""
    caplog.set_level(logging.INFO)

    def look() -> list[str]:
        lines = [record.getMessage().splitlines() for record in caplog.records]
        caplog.clear()
        return [each[0] + (f" | {each[-1][4:]}" if len(each) > 1 else "") for each in lines]

    return look


Look = Callable[[], list[str]]


def fail(gate: LogGate, depth: int = 0) -> None:
    """An error of a place that is always the same, however deep."""
    if depth:
        return fail(gate, depth - 1)
    try:
        raise ValueError("as planned")
    except ValueError as error:
        gate.error("c1 failed", error)
    return None


def fail_elsewhere(gate: LogGate, how: str) -> None:
    try:
        exec(compile(how, "elsewhere.py", "exec"), {"ValueError": ValueError})
    except Exception as error:
        gate.error("c1 failed", error)


# --- The gate ------------------------------------------------------------------------------------


def test_error_of_one_place_is_shown_once_then_counted(caught: Look) -> None:
    gate = LogGate()
    gate.turn(100)
    for _ in range(4):
        fail(gate)
    assert caught() == ["c1 failed: ValueError | ValueError: as planned"]
    gate.turn(109)
    assert caught() == []
    gate.turn(110)
    assert caught() == ["c1 failed: ValueError: 3 more in 10 s"]
    fail(gate)
    gate.turn(129)
    assert caught() == []  # the window has doubled
    gate.turn(130)
    assert caught() == ["c1 failed: ValueError: 1 more in 20 s"]


def test_windows_of_an_error_that_goes_on_have_a_longest(caught: Look) -> None:
    gate, shown = LogGate(), 0
    for now in range(20_000):
        gate.turn(now)
        fail(gate)
        shown += len(caught())
    assert 30 < shown < 45  # one in 600 s at last, where a line each would be 20,000


def test_error_that_comes_again_much_later_is_shown_in_full(caught: Look) -> None:
    gate = LogGate()
    gate.turn(0)
    fail(gate)
    gate.turn(REMEMBER_S - 1)
    fail(gate)
    assert len(caught()) == 1
    gate.turn(REMEMBER_S)
    gate.turn(3 * REMEMBER_S)
    assert caught() == ["c1 failed: ValueError: 1 more in 10 s"]
    gate.turn(4 * REMEMBER_S)
    fail(gate)
    assert caught() == ["c1 failed: ValueError | ValueError: as planned"]


def test_error_that_comes_now_and_then_is_not_shown_in_full_each_time(caught: Look) -> None:
    gate, shown = LogGate(), []
    for now in range(0, 6000, 10):
        gate.turn(now)
        if now % 400 == 0:
            fail(gate)
        shown += caught()
    assert len([line for line in shown if "as planned" in line]) == 1
    assert len([line for line in shown if "more in" in line]) > 5


def test_errors_of_other_places_and_types_are_shown_too(caught: Look) -> None:
    gate = LogGate()
    for how in ("raise ValueError", "\nraise ValueError", "\n1 / 0", "\nraise ValueError"):
        fail_elsewhere(gate, how)
    assert [line.partition(" |")[0] for line in caught()] == [
        "c1 failed: ValueError", "c1 failed: ValueError", "c1 failed: ZeroDivisionError"
    ]  # fmt: skip


def test_depth_that_a_client_may_choose_makes_no_new_kind(caught: Look) -> None:
    gate = LogGate()

    def parse(depth: int) -> None:
        if not depth:
            raise ValueError("too deep")
        parse(depth - 1)

    for depth in range(1, 60):
        try:
            parse(depth)
        except ValueError as error:
            gate.error("c1 failed", error)
    assert len(caught()) == 1


def test_kinds_of_errors_are_bounded_and_the_last_ones_are_counted_together(caught: Look) -> None:
    gate = LogGate()
    gate.turn(0)
    for number in range(MAX_FAULTS + 50):
        fail_elsewhere(gate, "\n" * number + "raise ValueError")
    assert len(caught()) == MAX_FAULTS + 1
    gate.turn(10)
    assert caught() == ["c1 failed: ValueError: 49 more in 10 s"]


def test_error_in_a_library_is_told_by_the_line_that_called_it(caught: Look) -> None:
    """Two commands that give `json` bad text are two faults, though it raises in one place."""
    gate = LogGate()
    for _ in range(2):
        for how in ("json.loads('{')", "\njson.loads('{')"):
            fail_elsewhere(gate, "import json;" + how)
    assert len(caught()) == 2


def test_what_was_not_summed_up_is_when_the_server_ends(caught: Look) -> None:
    gate = LogGate()
    for _ in range(8):
        fail(gate)
        gate.warning("trouble", "%s is in trouble", "c1")
    caught()
    gate.finish()
    assert caught() == ["trouble: 3 more in 10 s", "c1 failed: ValueError: 7 more"]
    fail(gate)
    assert len(caught()) == 1, "it may serve again"


def test_silenced_lines_are_summed_up_at_their_own_level(
    caught: Look, caplog: pytest.LogCaptureFixture
) -> None:
    gate = LogGate()
    gate.turn(0)
    for _ in range(COMINGS + 2):
        gate.info("clients that came", lambda: "c1\n\x1b came")
    assert {record.getMessage() for record in caplog.records} == {"c1 came"}
    assert len(caught()) == COMINGS
    gate.turn(10)
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "clients that came: 2 more in 10 s")
    ]  # fmt: skip


def test_line_for_a_level_that_is_off_is_not_even_counted(caplog: pytest.LogCaptureFixture) -> None:
    def loud() -> str:
        raise AssertionError("described")

    caplog.set_level(logging.WARNING)
    gate = LogGate()
    gate.info("clients that came", loud)
    assert gate._counts == {}


# --- Errors of a program's code ------------------------------------------------------------------


class Ill(Service):
    async def start(self) -> None:
        self.number = 1

    async def check(self) -> None:
        if self.number == 1:
            self.number = 0
            raise KeyError("wire")
        self.number /= 0


def broken() -> WebSocketManager:
    """A manager whose every part fails in a way of its own."""
    manager = WebSocketManager(services=[Ill("ill")])
    raising = {"bug": lambda: [][1], "no": lambda: (_ for _ in ()).throw(CommandFailed("no"))}

    @manager.commands.command
    def in_thread(how: str) -> Any:
        return raising[how]()

    @manager.commands.command
    async def on_loop(how: str) -> Any:
        return raising[how]()

    @manager.commands.command(inline=True)
    def at_once(how: str) -> Any:
        return raising[how]()

    @manager.commands.command
    async def stream(how: str) -> Any:
        yield 1
        raising[how]()

    @manager.method
    async def ask(how: str) -> Any:
        return raising[how]()

    @manager.on
    async def poke(client: Client, how: str) -> Any:
        return raising[how]()

    @manager.on
    async def add(client: Client, number: int) -> int:
        return number + "1"  # type: ignore[operator]  # a TypeError, but not of the call

    @manager.on("disconnect")
    def leave(client: Client, reason: str) -> None:
        raising["bug"]()

    return manager


WAYS = ("in_thread", "on_loop", "at_once", "stream")


async def test_errors_of_the_programs_own_code_are_logged_with_their_traceback(
    caught: Look,
) -> None:
    def bugs() -> list[str]:
        """Lines about errors, without what is the same in all of this test."""
        return [line.removesuffix(" | IndexError: list index out of range")
                for line in caught() if "failed" in line]  # fmt: skip

    async with served(broken()) as server:
        async with Raw.open(server) as client, Sio.open(server, join="/") as socket:
            bugs()
            for way in WAYS:
                for _ in range(2):
                    answer = await client.ask("execute_command", command=f"{way} bug")
                    assert answer["data"]["code"] == "command_failed"
                assert bugs() == [f"command {way} failed: IndexError"]
            await client.ask("ask", how="bug")
            await socket.send('42["poke","bug"]', '421["poke","no"]')
            await socket.packet("431")
            assert bugs() == [
                "method ask failed: IndexError",
                "handler of 'poke' failed: IndexError",
            ]
            await socket.send('422["add",1]')
            await socket.packet("432")
            assert [line.partition(" |")[0] for line in bugs()] == [
                "handler of 'add' failed: TypeError"
            ]
            assert (await http(server, "POST", "/api/execute_command", {"command": "on_loop bug"}))[
                0
            ] == 500
            assert bugs() == [], "it was shown"
        await until(lambda: not server.manager.count_clients())
        await until(lambda: not server.manager.commands.tasks.running)
        assert bugs() == ["handler of 'disconnect' failed: IndexError"]
    assert bugs()[:2] == [
        "command in_thread failed: IndexError: 1 more", "command on_loop failed: IndexError: 2 more"
    ]  # fmt: skip


async def test_error_of_a_service_is_logged_and_unavailable_is_not(
    caught: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("karna.service.RETRY_FIRST_S", 0.001)

    class Away(Service):
        async def check(self) -> None:
            raise Unavailable("gone")

    ill = Ill("ill")
    async with served(WebSocketManager(services=[ill, Away("away")])):
        await until(lambda: "division" in ill.detail)
        lines = [line for line in caught() if "failed" in line]
    assert lines == [
        "service ill check failed: KeyError | KeyError: 'wire'",
        "service ill check failed: ZeroDivisionError | ZeroDivisionError: division by zero",
    ]


async def test_what_a_client_did_wrong_is_not_logged(caught: Look) -> None:
    manager = broken()

    @manager.on("connect")
    async def check(client: Client, auth: Any) -> None:
        if auth:
            raise PermissionError("members only")

    @manager.commands.command
    async def send_to_who_left(number: int) -> None:
        await gone[number].send("late", 1)

    @manager.commands.command
    async def ask_who_is_silent(context: Any) -> Any:
        (client,) = manager.raw.values()
        return await client.call("hello", timeout_s=0.001)

    gone: list[Any] = []
    async with served(manager) as server, Raw.open(server) as client:
        async with Raw.open(server):
            await until(lambda: len(manager.raw) == 2)
            gone += manager.all_clients()
        await until(lambda: len(manager.raw) == 1)
        (left,) = [number for number, each in enumerate(gone) if not each.is_present]
        await until(lambda: not manager.commands.tasks.running)
        caught()
        for line in (*(f"{way} no" for way in WAYS), "on_loop", "nope", "'", f"send_to_who_left {left}",
                     "ask_who_is_silent x"):  # fmt: skip
            answer = await client.ask("execute_command", command=line)
            assert answer["type"] == "error", line
        for message in ({}, [], {"method": "nope"}, {"method": "ask"}, {"method": "cancel"}):
            await client.error_of(message)
        await client.error_of("{")
        async with Sio.open(server) as socket:
            await socket.send('40{"name":"x"}')
            assert (await socket.packet("44"))["message"] == "members only"
        async with Sio.open(server, join="/") as socket:
            await socket.send('421["poke"]', '422["poke",1,2,3]', '42["poke"]', '423["poke","no"]')
            for number, said in ((1, "missing 1 required"), (2, "takes 2 positional"), (3, "no")):
                (envelope,) = await socket.packet(f"43{number}")
                assert envelope["data"]["code"] == "command_failed"
                assert said in envelope["data"]["message"]
        lines = [line for line in caught() if "came" not in line and "went" not in line]
        assert [line.partition(" ")[2] for line in lines] == [
            "127.0.0.1 was not let in by the connect handler"
        ]


async def test_connect_handler_with_a_bug_is_logged(caught: Look) -> None:
    manager = WebSocketManager()

    @manager.on("connect")
    async def check(client: Client, auth: Any) -> None:
        auth["name"]

    async with served(manager) as server, Raw.open(server) as client:
        assert (await client.closed())[0] == 1008
        first, second = [line for line in caught() if "service" not in line]
    assert first == "handler of 'connect' failed: KeyError | KeyError: 'name'"
    assert second == "c1 127.0.0.1 was not let in by the connect handler"


# --- Who comes and goes --------------------------------------------------------------------------


async def test_info_shows_who_came_and_went_and_nothing_else(caught: Look) -> None:
    async with served() as server:
        caught()
        async with Raw.open(server) as client, Sio.open(server, join="/ws") as socket:
            await client.run("echo hello")
            (sid,) = server.manager.sockets["/ws"]
            await http(server, "GET", "/health")
            await socket.send("41/ws,")
            await until(lambda: not server.manager.sockets["/ws"])
        await until(lambda: not server.manager.raw)
        assert caught() == [
            "c1 127.0.0.1 came: raw",
            f"c2 127.0.0.1 came: socket.io /ws, {sid}",
            f"c2 went: socket.io /ws, {sid}: client namespace disconnect",
            "c1 went: raw: transport close",
        ]


async def test_shutdown_says_what_it_waits_for(caught: Look) -> None:
    manager = WebSocketManager()
    begun = asyncio.Event()

    @manager.commands.command
    async def wait() -> None:
        begun.set()
        await asyncio.sleep(60)

    async with served(manager, grace_s=0.01) as server, Raw.open(server) as client:
        await client.send({"method": "execute_command", "params": {"command": "wait"}, "id": 1})
        await begun.wait()
        caught()
        await server.close()
        lines = [line for line in caught() if "service" not in line]
    assert lines[:4] == [
        "stopping: 1 client", "waiting for 1 command, at most 0.01 s", "cancelling 1 command",
        "c1 went: raw: transport close",
    ]  # fmt: skip
    assert lines[4:] == ["waiting for 1 connection to close, at most 2 s", "stopped"]
