"""At level debug each socket, request and answer is a line: names and numbers, never what was said."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

import pytest

from karna_ws import Client, WebSocketManager
from support import Raw, Sio, http, served, until

SECRET = "correct-horse"


def program() -> WebSocketManager:
    manager = WebSocketManager()

    @manager.method
    async def look(what: str) -> str:
        return what

    @manager.on
    async def poke(client: Client, value: str) -> str:
        return value

    @manager.commands.command
    async def slow(what: str) -> str:
        await asyncio.sleep(0)
        return what

    return manager


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Without the times that it took, and without what other tests look at."""
    found = [record.getMessage() for record in caplog.records if record.levelno == logging.DEBUG
             and record.name == "karna_ws"]  # fmt: skip
    caplog.clear()
    return [re.sub(r", \d+\.\d ms$", ", TIME", line) for line in found]


async def test_debug_shows_each_request_and_its_answer(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "karna_ws")
    async with served(program()) as server:
        async with Raw.open(server) as client:
            for message in (
                {"method": "execute_command", "params": {"command": f"echo {SECRET}"}},
                {"method": "execute_command", "params": {"command": f"slow {SECRET}"}},
                {"method": "execute_command", "params": {"command": "slow"}},
                {"method": "execute_command", "params": {"command": "nope\x1b[2J " + SECRET}},
                {"method": "get_status"},
                {"method": "look", "params": {"what": SECRET}},
                {"method": "cancel", "params": {"id": SECRET}},
                {"method": "x" * 100},
                {"params": {}},
                {"jsonrpc": "2.0", "method": "get_status", "id": 1},
                {"jsonrpc": "2.0", "method": "look", "params": [SECRET], "id": 1},
            ):
                await client.send({"id": 1, **message})
                await client.next()
        await until(lambda: not server.manager.connections)
        shown = lines(caplog)
    names = [
        ("execute_command echo", "ok"), ("execute_command slow", "ok"),
        ("execute_command slow", "usage"), ("execute_command nope [2J", "unknown_command"),
        ("get_status", "ok"), ("look", "ok"), ("cancel", "invalid_params"),
        ("x" * 60, "unknown_method"), ("without a method", "invalid_request"),
        ("get_status", "ok"), ("look", "ok"),
    ]  # fmt: skip
    requests = [
        f"c1 {way}" for name, code in names for way in (f"> {name}", f"< {name}: {code}, TIME")
    ]
    assert shown == ["c1 127.0.0.1 connected", *requests, "c1 closed"]
    assert SECRET not in caplog.text


async def test_debug_shows_http_and_who_was_refused(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "karna_ws")
    async with served(program(), token=SECRET) as server:
        await http(server, "GET", f"/api/status?token=wrong-{SECRET}")
        bearer = {"Authorization": f"Bearer {SECRET}"}
        await http(server, "POST", "/api/execute_command", {"command": f"echo {SECRET}"}, **bearer)
        async with Sio.open(server) as socket:
            await socket.send('40{"token":"wrong"}')
            await socket.packet("44")
        await until(lambda: not server.manager.connections)
        shown = [line for line in lines(caplog) if "connected" not in line and "closed" not in line]
    assert shown == [
        "c1 GET /api/status: 401",
        "c2 > execute_command echo", "c2 < execute_command echo: ok, TIME",
        "c2 POST /api/execute_command: 200",
        "c3 refused: unauthorized",
    ]  # fmt: skip
    assert SECRET not in caplog.text


async def test_debug_shows_events_and_requests_of_socket_io(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "karna_ws")
    async with served(program()) as server, Sio.open(server, join="/") as socket:
        lines(caplog)
        await socket.send(f'421["poke","{SECRET}"]')
        await socket.packet("431")
        await socket.rpc({"method": "look", "params": {"what": SECRET}}, ack=2)
        await socket.send('42["poke"]', '423["poke"]')
        await socket.packet("433")
        poke = "handler of 'poke'"
        assert lines(caplog) == [
            f"c1 > {poke}", f"c1 < {poke}: ok, TIME", "c1 > look", "c1 < look: ok, TIME",
            f"c1 > {poke}", f"c1 > {poke}",
            f"c1 < {poke}: command_failed, TIME", f"c1 < {poke}: command_failed, TIME",
        ]  # fmt: skip


async def test_debug_shows_what_became_of_a_command_whose_client_left(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "karna_ws")
    manager = WebSocketManager()
    begun = asyncio.Event()

    @manager.commands.command
    async def wait(context: Any = None) -> None:
        begun.set()
        await asyncio.sleep(60)

    async with served(manager) as server:
        async with Raw.open(server) as client:
            await client.send({"method": "execute_command", "params": {"command": "wait"}})
            await begun.wait()
        await until(lambda: not manager.commands.tasks.running)
        assert "c1 < execute_command wait: cancelled, nobody waits for it, TIME" in lines(caplog)


async def test_nothing_is_made_for_a_level_that_is_off(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "karna_ws")

    def fail(*args: Any) -> None:
        raise AssertionError("called though its level is off")

    for name in ("opened", "closed", "refused", "asked"):
        monkeypatch.setattr(f"karna.trace.{name}", fail)
    for room, name in (("calls", "answered"), ("http", "responded"), ("connection", "opened"),
                       ("connection", "closed")):  # fmt: skip
        monkeypatch.setattr(f"karna.{room}.{name}", fail)
    async with (
        served(program()) as server,
        Raw.open(server) as client,
        Sio.open(server, join="/") as socket,
    ):
        assert await client.run("echo hello") == "hello" and await client.run("slow 1") == "1"
        assert (await http(server, "GET", "/health"))[0] == 200
        await socket.send('421["poke",1]')
        assert await socket.packet("431") == [1]
        assert server.manager.prepared is server.manager.commands.prepared, "the fast lane is open"
