"""The example programs run as they stand."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest
from websockets.asyncio.client import connect

from karna_ws import WebSocketManager, serving
from support import ROOT
from support_clients import (
    EXAMPLES,
    Wire,
    copy_server,
    data_of,
    program,
    rpc,
    running,
    ws_url,
)


async def test_client_mjs_uses_both_doors(node_dir: Path, tmp_path: Path) -> None:
    shutil.copy(EXAMPLES / "client.mjs", tmp_path)
    (tmp_path / "node_modules").symlink_to(node_dir / "node_modules")
    async with (
        serving(WebSocketManager(), port=0, token="sesame") as server,
        running(
            "node", "client.mjs", ws_url(server.port), cwd=tmp_path, KARNA_TOKEN="sesame"
        ) as program,
    ):
        await program.ends()
        lines = "\n".join(program.all("line"))
        for expected in (
            r"raw: command is \w+",
            r"raw: countdown 1 reports ",
            r"raw: echo hello -> hello",
            r"raw: refused with unknown_command: ",
            r"socket\.io: echo hello -> hello",
            r"socket\.io: describe -> .*png",
            r"socket\.io: notification: Hello from Node",
        ):
            assert re.search(expected, lines, re.DOTALL), f"no {expected} in:\n{lines}"


async def test_client_py_runs_commands_at_the_same_time() -> None:
    commands = ("countdown 0.3", "echo hello", "eccho")
    async with serving(WebSocketManager(), port=0) as server:
        url = ws_url(server.port)
        async with running(
            sys.executable, EXAMPLES / "client.py", *commands, KARNA_URL=url
        ) as program:
            await program.ends()
        lines = program.all("line")
        assert 'echo hello -> "hello"' in lines
        assert any(line.startswith("eccho -> unknown_command: ") for line in lines)
        assert any(line.startswith("countdown 0.3: {") and "percent" in line for line in lines)
        assert lines[-1].startswith("countdown 0.3 -> ")  # the slow one held up nobody


async def test_client_py_recovers_broadcasts_over_network_cut() -> None:
    manager = WebSocketManager()
    async with (
        serving(manager, port=0, token="sesame") as server,
        Wire(server.port) as wire,
        running(
            sys.executable, EXAMPLES / "client.py",
            KARNA_URL=ws_url(wire.port), KARNA_TOKEN="sesame",
        ) as program,
    ):  # fmt: skip
        await program.wait_for_line("connected")
        wire.cut()
        await program.wait_for_line("cannot connect to ")
        for number in range(3):
            manager.notify(f"missed {number}")
        wire.mend()
        await program.wait_for_line("missed 2")
        told = [line for line in program.all("line") if line.startswith("notification: ")]
        assert [f"missed {number}" in line for number, line in enumerate(told)] == [True] * 3
        assert not any("sesame" in line for line in program.all("line"))


async def test_client_py_tells_why_it_was_refused() -> None:
    async with serving(WebSocketManager(), port=0, token="sesame") as server:
        url = ws_url(server.port)
        async with running(sys.executable, EXAMPLES / "client.py", KARNA_URL=url) as program:
            await program.wait_for_line("token")
            await program.ends(code=1)


async def test_lights_example_runs() -> None:
    lights = str(ROOT / "examples" / "lights.py")
    words = (sys.executable, lights, "--port", "0", "--left-on", "0.2")
    async with (
        program(*words, ready=r"localhost:(\d+)") as match,
        connect(f"ws://localhost:{match[1]}/ws") as ws,
    ):
        answer = await rpc(ws, "execute_command", {"command": "light porch on"}, "command_response")
        assert answer["result"]["porch"] == 100
        assert (await rpc(ws, "lights", {}, "command_response"))["porch"] == 100
        notice = await data_of(ws, "notification")
        assert notice["level"] == "warning" and "porch" in notice["message"]
        command = {"command": "sunrise hall --seconds 0.1"}
        progress = await rpc(ws, "execute_command", command, "command_progress")
        assert progress["progress"] == {"percent": 0, "lamp": "hall"}
        assert (await data_of(ws, "command_response"))["result"]["percent"] == 100
        await rpc(ws, "execute_command", {"command": "bus unplug"}, "command_response")
        status = await rpc(ws, "get_status", {}, "status_update")
        assert (status["bus"]["state"], status["bus"]["detail"]) == ("degraded", "unplugged")
        error = await rpc(ws, "execute_command", {"command": "light hall off"}, "error")
        assert error["code"] == "unavailable"
        await rpc(ws, "execute_command", {"command": "bus plug"}, "command_response")
        status = await rpc(ws, "get_status", {}, "status_update")
        assert status["bus"]["state"] == "running"
        watched = await rpc(ws, "execute_command", {"command": "watch porch"}, "command_response")
        assert watched["result"] == ["porch"]
        for lamp in ("kitchen", "porch"):  # of the first one nothing is heard
            await ws.send(json.dumps({"method": "execute_command",
                                      "params": {"command": f"light {lamp} off"}}))  # fmt: skip
        assert await data_of(ws, "lamp") == {"lamp": "porch", "level": 0}


@pytest.mark.parametrize("words", [("karna_ws.py",), ("-m", "karna_ws")], ids=" ".join)
@pytest.mark.parametrize("more", [(), ("web",)], ids=str)
async def test_copied_files_are_the_whole_server(
    tmp_path: Path, words: tuple[str, ...], more: tuple[str, ...]
) -> None:
    copy_server(tmp_path, *more)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = (sys.executable, *words, "--port", "0")
    async with program(
        *command, ready=r"console +(http://localhost:\d+/)", cwd=tmp_path, env=clean
    ) as match:
        with await asyncio.to_thread(urlopen, match[1]) as answer:
            kind, body = answer.headers["Content-Type"], answer.read()
        if more:
            assert kind == "text/html; charset=utf-8" and b"Karna WS" in body
        else:
            assert json.loads(body)["name"] == "karna-ws"
        url = match[1].replace("http", "ws") + "ws"
        async with connect(url) as ws:
            describe = {"command": "describe", "image": "R0lGODlhAQABAAAAACw="}
            found = await rpc(ws, "execute_command", describe, "command_response")
            assert found["result"]["format"] == "gif", "a room that is imported when it is needed"
