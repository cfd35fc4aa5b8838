"""Assistants' own client library in each era, and the public conformance suite."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from karna_ws import Server, WebSocketManager
from support import needs, served, until
from support_clients import run_npm
from support_mcp import PNG, tool_manager
from support_peers import TOKEN

HERE = Path(__file__).resolve().parent
# The suite of both eras; it wants a Node that not every system has.
CONFORMANCE = {"@modelcontextprotocol/conformance": "0.2.0-alpha.12", "node": "22.23.3"}


@pytest.fixture(params=["auto", "legacy", "2026-07-28"])
def mode(request: pytest.FixtureRequest) -> str:
    needs("mcp")
    return str(request.param)


def connect(server: Server, mode: str, **options: Any) -> Any:
    """The library's client."""
    from mcp import Client

    return Client(f"http://127.0.0.1:{server.port}/mcp", mode=mode, **options)


async def test_client_lists_tools_whose_schemas_are_valid(mode: str) -> None:
    manager, _ = tool_manager()
    async with served(manager) as server, connect(server, mode) as client:
        assert client.protocol_version == ("2025-11-25" if mode == "legacy" else "2026-07-28")
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert {"add", "notify", "time"} <= set(tools) and "help" not in tools
        assert tools["add"].annotations.read_only_hint is True
        from jsonschema import Draft202012Validator

        for tool in tools.values():
            Draft202012Validator.check_schema(tool.input_schema)


async def test_client_calls_with_results_of_every_kind(mode: str) -> None:
    manager, _ = tool_manager()
    async with served(manager) as server, connect(server, mode) as client:
        result = await client.call_tool("add", {"a": 1, "b": 2})
        assert (result.content[0].text, result.structured_content) == ("3", {"result": 3})
        text, image = (await client.call_tool("give", {"what": "mixed"})).content
        assert "dot" in text.text and base64.b64decode(image.data) == PNG
        assert (await client.call_tool("door")).content[0].text == "mcp"


async def test_client_is_told_errors(mode: str) -> None:
    from mcp import MCPError

    manager, _ = tool_manager()
    async with served(manager) as server, connect(server, mode) as client:
        result = await client.call_tool("add", {"a": "x"})
        assert result.is_error and "whole number" in result.content[0].text
        with pytest.raises(MCPError, match="no tool 'nope'") as caught:
            await client.call_tool("nope", {})
        assert caught.value.code == -32602


async def test_client_gets_progress(mode: str) -> None:
    manager, _ = tool_manager()
    seen: list[tuple[float, float | None, str | None]] = []

    async def on_progress(progress: float, total: float | None, message: str | None) -> None:
        seen.append((progress, total, message))

    async with served(manager) as server, connect(server, mode) as client:
        result = await client.call_tool("steps", {"count": 2}, progress_callback=on_progress)
        assert result.structured_content == {"count": 2}
        assert seen[:2] == [(0, 100, "step 0"), (50, 100, "step 1")] and len(seen) == 3


async def test_client_cancels(mode: str) -> None:
    manager, gate = tool_manager()
    async with served(manager) as server, connect(server, mode) as client:
        call = asyncio.create_task(client.call_tool("gate", {"name": "a"}))
        await until(lambda: gate.running)
        other = asyncio.create_task(client.call_tool("gate", {"name": "b"}))
        await until(lambda: gate.running == 2)
        call.cancel()
        await until(lambda: gate.cancelled == ["a"])
        gate.let("b")
        assert (await other).content[0].text == "b"


async def test_clients_make_forty_calls_at_a_time(mode: str) -> None:
    manager, gate = tool_manager()
    names = [str(number) for number in range(40)]
    async with (
        served(manager) as server,
        connect(server, mode) as first,
        connect(server, mode) as second,
    ):
        calls = [
            asyncio.create_task(client.call_tool("gate", {"name": name}))
            for client in (first, second)
            for name in names
        ]
        await until(lambda: gate.running == 80)
        gate.let(*names)
        results = await asyncio.gather(*calls)
        assert [result.content[0].text for result in results] == names * 2


async def test_client_lets_a_person_decide(mode: str) -> None:
    from mcp_types import ElicitResult

    manager, _ = tool_manager()
    asked: list[str] = []

    async def decide(context: Any, params: Any) -> ElicitResult:
        asked.append(params.message)
        agrees = '"this"' in params.message
        content = {"confirm": True} if agrees else None
        return ElicitResult(action="accept" if agrees else "decline", content=content)

    async with (
        served(manager) as server,
        connect(server, mode, elicitation_callback=decide) as client,
    ):
        result = await client.call_tool("erase", {"what": "this"})
        if mode == "legacy":
            assert result.is_error and "confirmed by a person" in result.content[0].text
            return
        assert result.content[0].text == "erased this"
        result = await client.call_tool("erase", {"what": "that"})
        assert result.is_error and len(asked) == 2


async def test_client_shows_its_token(mode: str) -> None:
    from mcp.client.streamable_http import streamable_http_client
    from mcp.shared._httpx_utils import create_mcp_http_client

    async with served(token=TOKEN) as server:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with create_mcp_http_client(headers=headers) as http:
            from mcp import Client

            url = f"http://127.0.0.1:{server.port}/mcp"
            async with Client(streamable_http_client(url, http_client=http), mode=mode) as client:
                assert "utc" in (await client.call_tool("time")).structured_content


# ---- the conformance suite -----------------------------------------------------------------------


@pytest.fixture(scope="session")
def conformance() -> list[str]:
    """The command that runs the suite; installed once and kept."""
    needs("node", "npm")
    parent = Path(os.environ.get("KARNA_NODE_DIR", Path.home() / ".cache" / "karna-ws-tests"))
    folder = parent / ("mcp-" + "-".join(CONFORMANCE.values()))
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
        unfinished.mkdir(parents=True)
        allowed = {"allowScripts": {"node": True}}  # npm 12 asks for it
        (unfinished / "package.json").write_text(json.dumps(allowed))
        packages = [f"{name}@{version}" for name, version in CONFORMANCE.items()]
        run_npm(unfinished, "install", "--no-audit", "--no-fund", *packages)
        try:
            unfinished.rename(folder)
        except OSError:  # another run was faster
            shutil.rmtree(unfinished)
    modules = folder / "node_modules"
    suite = modules / "@modelcontextprotocol" / "conformance" / "dist" / "index.js"
    return [str(modules / ".bin" / "node"), str(suite)]


@pytest.fixture
def long_deadline(deadline: None) -> None:
    """Node's first look at the suite takes seconds on a slow disk."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 30.0, 1.0)


def fixture_manager() -> WebSocketManager:
    """The tools that the suite calls by name, as far as they are offered."""
    manager = WebSocketManager()
    image = "data:image/png;base64," + base64.b64encode(PNG).decode()
    given = {
        "test_simple_text": "This is a simple text response for testing.",
        "test_image_content": image, "test_audio_content": "data:audio/wav;base64,UklGRg==",
    }  # fmt: skip
    for name, value in given.items():
        manager.commands.command(name=name, inline=True)(lambda value=value: value)

    @manager.commands.command
    async def test_error_handling() -> None:
        raise ValueError("This tool intentionally returns an error for testing")

    @manager.commands.command
    async def test_tool_with_progress() -> AsyncIterator[dict[str, int]]:
        for percent in (0, 50, 100):
            yield {"percent": percent}

    @manager.commands.command(confirm=True)
    async def test_input_required_result_tampered_state() -> str:
        return "untampered"

    return manager


@pytest.mark.usefixtures("long_deadline")
@pytest.mark.parametrize("revision", ["2025-11-25", "2026-07-28"])
async def test_conformance_suite_finds_what_is_offered_right(
    conformance: list[str], revision: str, tmp_path: Path
) -> None:
    async with served(fixture_manager()) as server:
        url = f"http://127.0.0.1:{server.port}/mcp"
        flags = ["--requirements", revision, "--expected-failures", HERE / "mcp-not-offered.yaml"]
        suite = await asyncio.create_subprocess_exec(
            *conformance, "server", "--url", url, *flags, cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            said, _ = await suite.communicate()
        finally:
            if suite.returncode is None:
                suite.kill()
                await suite.wait()
        summary = said.decode().partition("=== SUMMARY ===")[2]
        assert suite.returncode == 0 and "all failures are expected" in summary, summary
