"""Model Context Protocol on the wire: both eras, streams, consent, and who means ill."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from typing import Any

import pytest

from karna.consent import Consents
from karna.mcp import CAPABILITIES_KEY, LEGACY, MAX_DETACHED, MODERN, SUPPORTED, VERSION_KEY
from karna.mcp import decode_header
from karna_ws import WebSocketManager
from support import http, served, until
from support_mcp import (
    ACCEPT,
    ELICITS,
    begin_stream,
    call,
    chunk,
    error_of,
    event,
    events,
    message,
    modern,
    open_session,
    posted,
    result_of,
    send,
    send_legacy,
    tool_manager,
)
from support_peers import TOKEN, Headers, Peer, ask, dial, get_metrics, head, post, small_buffers


# ---- the modern era ------------------------------------------------------------------------------


async def test_discover_tells_versions_capabilities_and_who_answers() -> None:
    async with served() as server:
        result = await result_of(server, modern("server/discover"))
        assert result["supportedVersions"] == SUPPORTED
        assert result["capabilities"] == {"tools": {}}
        assert result["resultType"] == "complete"
        assert result["ttlMs"] >= 0 and result["cacheScope"] in ("public", "private")
        info = result["_meta"]["io.modelcontextprotocol/serverInfo"]
        assert info["name"] == "karna-ws" and info["version"]


async def test_tools_list_has_the_programs_commands_and_what_helps_a_model() -> None:
    manager, _ = tool_manager()
    async with served(manager) as server:
        result = await result_of(server, modern("tools/list"))
        tools = {tool["name"]: tool for tool in result["tools"]}
        assert list(tools) == sorted(tools)
        assert {"add", "gate", "notify", "time", "describe"} <= set(tools)
        assert not {"help", "echo", "clients", "countdown", "ask", "interpret"} & set(tools)
        assert tools["add"] == {
            "name": "add", "description": "Add two numbers.",
            "annotations": {"readOnlyHint": True},
            "inputSchema": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer", "default": 1}},
                "required": ["a"], "additionalProperties": False,
            },
        }  # fmt: skip
        assert all("$schema" not in json.dumps(tool) for tool in tools.values())
        assert (result["resultType"], result["cacheScope"]) == ("complete", "private")


async def test_tools_list_changes_with_the_commands_and_names_are_what_clients_take() -> None:
    manager = WebSocketManager()
    async with served(manager) as server:
        first = await result_of(server, modern("tools/list"))
        assert first == await result_of(server, modern("tools/list"))
        for name in ("lamp.on", "lamp:on", "ü" * 90, "ß" * 90):
            manager.commands.command(name=name)(lambda: "lit")
        manager.commands.command(name="hidden", tool=False)(lambda: None)
        manager.commands.commands["countdown"].tool = True
        tools = (await result_of(server, modern("tools/list")))["tools"]
        added = [tool for tool in tools if tool not in first["tools"]]
        names = [tool["name"] for tool in added]
        assert names == ["countdown", "lamp_on", "lamp_on_2", "_" * 64, "_" * 56 + "_2"]
        assert added[1]["title"] == "lamp.on"
        assert (await result_of(server, call("lamp_on_2")))["content"][0]["text"] == "lit"
        assert (await send(server, call("hidden"))).json["error"]["code"] == -32602
        assert (await send(server, call("lamp.on"))).json["error"]["code"] == -32602


async def test_a_tool_runs_and_knows_its_door() -> None:
    manager, _ = tool_manager()
    async with served(manager) as server:
        result = await result_of(server, call("add", {"a": 1, "b": 2}))
        assert result["content"] == [{"type": "text", "text": "3"}]
        assert result["structuredContent"] == {"result": 3}
        assert result["resultType"] == "complete" and "isError" not in result
        assert (await result_of(server, call("door")))["content"][0]["text"] == "mcp"
        answer = await send(server, call("add", {"a": 1}, id="text id"))
        assert answer.json["id"] == "text id"
        assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("what", "kinds", "structured"),
    [
        ("text", ["text"], None), ("object", ["text"], {"a": [1]}),
        ("list", ["text"], {"result": [1, 2]}), ("none", ["text"], None),
        ("png", ["image"], None), ("url", ["image"], None),
        ("mixed", ["text", "image"], {"name": "dot", "image": "[image]"}),
        ("long", ["text"], None), ("longer", ["text"], None),
    ],
)  # fmt: skip
async def test_results_of_every_kind(what: str, kinds: list[str], structured: Any) -> None:
    manager, _ = tool_manager()
    async with served(manager) as server:
        result = await result_of(server, call("give", {"what": what}))
        assert [each["type"] for each in result["content"]] == kinds
        assert result.get("structuredContent") == structured
        for each in result["content"]:
            if each["type"] == "image":
                assert each["mimeType"] == "image/png"
                assert base64.b64decode(each["data"], validate=True)[:4] == b"\x89PNG"
            else:
                assert len(each["text"]) < 101_000
        if "long" in what:
            assert "[cut: these are the first 100000 of 3000" in result["content"][0]["text"]


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("add", {}, "A is missing"), ("add", {"a": "x"}, "whole number"),
        ("add", {"a": 1, "c": 2}, "unknown parameter 'c'"),
        ("give", {"what": "bytes"}, "can't be encoded"), ("give", {"what": "set"}, "encoded"),
        ("give", {"what": "nope"}, "nope"), ("forever", {}, "took longer than"),
        ("describe", {}, "params.image is missing"),
    ],
)  # fmt: skip
async def test_whatever_a_command_ends_with_is_a_result_for_the_model(
    name: str, arguments: dict[str, Any], words: str
) -> None:
    manager, _ = tool_manager()

    @manager.commands.command
    async def forever() -> None:
        await asyncio.Event().wait()

    async with served(manager, command_timeout_s=0.2 if name == "forever" else 10) as server:
        result = await result_of(server, call(name, arguments))
        assert result["isError"] is True and words in result["content"][0]["text"]
        headers = await open_session(server)
        params = {"name": name, "arguments": arguments}
        answer = await send_legacy(server, message("tools/call", params), headers)
        assert answer.status == 200 and words in answer.json["result"]["content"][0]["text"]


WHOLE = {VERSION_KEY: MODERN, CAPABILITIES_KEY: {}}


@pytest.mark.parametrize(
    ("meta", "headers", "expected"),
    [
        # each header: missing, doubled, wrong, of another case, of invalid characters
        (WHOLE, {"MCP-Protocol-Version": None}, (400, -32020)),
        (WHOLE, {"MCP-Protocol-Version": "2025-11-25"}, (400, -32020)),
        (WHOLE, {"MCP-Protocol-Version": [MODERN, MODERN]}, (400, -32020)),
        (WHOLE, {"MCP-Protocol-Version": ""}, (400, -32020)),
        (WHOLE, {"Mcp-Method": None}, (400, -32020)),
        (WHOLE, {"Mcp-Method": "tools/list"}, (400, -32020)),
        (WHOLE, {"Mcp-Method": "TOOLS/CALL"}, (400, -32020)),
        (WHOLE, {"Mcp-Method": ["tools/call", "tools/call"]}, (400, -32020)),
        (WHOLE, {"Mcp-Name": None}, (400, -32020)),
        (WHOLE, {"Mcp-Name": "door"}, (400, -32020)),
        (WHOLE, {"Mcp-Name": ["add", "add"]}, (400, -32020)),
        (WHOLE, {"Mcp-Name": ["add", "door"]}, (400, -32020)),
        (WHOLE, {"Mcp-Name": "=?base64?YWRk?="}, (200, None)),
        (WHOLE, {"Mcp-Name": "  add\t"}, (200, None)),
        (WHOLE, {"mcp-NAME": "add", "Mcp-Name": None}, (200, None)),
        (WHOLE, {"Mcp-Name": "=?BASE64?YWRk?="}, (400, -32020)),
        (WHOLE, {"Mcp-Name": "=?base64?YWR?="}, (400, -32020)),
        (WHOLE, {"Mcp-Name": "=?base64?YWRl?="}, (400, -32020)),
        (WHOLE, {"Mcp-Name": "=?base64?YW Rk?="}, (400, -32020)),
        (WHOLE, {"Mcp-Name": "=?base64?/w==?="}, (400, -32020)),
        (WHOLE, {"Mcp-Name": "=?base64?YWRk"}, (400, -32020)),
        (WHOLE, {"Mcp-Name": "=?base64?="}, (400, -32020)),
        # `_meta`
        (None, {}, (400, -32602)),
        ({}, {}, (400, -32602)),
        ({VERSION_KEY: MODERN}, {}, (400, -32602)),
        ({CAPABILITIES_KEY: {}}, {}, (400, -32602)),
        ({**WHOLE, CAPABILITIES_KEY: []}, {}, (400, -32602)),
        ({**WHOLE, VERSION_KEY: 5}, {}, (400, -32602)),
        ({**WHOLE, VERSION_KEY: None}, {}, (400, -32602)),
        ({**WHOLE, VERSION_KEY: {}}, {}, (400, -32602)),
        ([], {}, (400, -32602)),
        ("x", {}, (400, -32602)),
        # versions
        ({**WHOLE, VERSION_KEY: "1900-01-01"}, {}, (400, -32020)),
        ({**WHOLE, VERSION_KEY: "2025-11-25"}, {}, (400, -32020)),
        ({**WHOLE, VERSION_KEY: "v9"}, {"MCP-Protocol-Version": "v9"}, (400, -32022)),
        (None, {"MCP-Protocol-Version": "v9"}, (400, -32022)),
    ],
    ids=str,
)  # fmt: skip
async def test_envelope_that_is_not_whole_or_says_two_things_is_refused(
    meta: Any, headers: Headers, expected: tuple[int, int | None]
) -> None:
    manager, _ = tool_manager()
    request = message("tools/call", {"name": "add", "arguments": {"a": 1}}, 7)
    if meta is not None:
        request["params"]["_meta"] = meta
    async with served(manager) as server:
        answer = await send(server, request, headers)
        found = answer.json
        assert (answer.status, found.get("error", {}).get("code")) == expected
        assert found["id"] == 7
        if expected[1] == -32022:
            assert found["error"]["data"] == {"supported": SUPPORTED, "requested": "v9"}


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("door", "door"), ("=?base64?ZG9vcg==?=", "door"), ("=?base64??=", ""),
        ("=?base64?ZG9vch==?=", None), ("=?base64?ZG9vcg=?=", None), ("=?base64?ZG9vcg?=", None),
        ("=?base64?ZG9v cg==?=", None), ("=?base64?/w==?=", None), ("=?base64?\xe9?=", None),
        ("=?base64?ZG9vcg==", "=?base64?ZG9vcg=="), ("\xe9", None),
    ],
    ids=ascii,
)  # fmt: skip
def test_header_is_decoded_strictly(header: str, value: str | None) -> None:
    assert decode_header(header) == value


async def test_header_beyond_ascii_is_refused_even_where_it_looks_alike() -> None:
    async with served() as server:
        request = call("\xe9")
        assert await error_of(await send(server, request)) == (400, -32020)
        coded = "=?base64?" + base64.b64encode("\xe9".encode()).decode() + "?="
        assert await error_of(await send(server, request, {"Mcp-Name": coded})) == (200, -32602)


@pytest.mark.parametrize("method", ["initialize", "ping", "nope", "logging/setLevel", ""])
async def test_unknown_method_of_the_modern_era_is_404(method: str) -> None:
    async with served() as server:
        answer = await send(server, modern(method))
        assert await error_of(answer) == (404, -32601) and answer.json["id"] == 1


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", -32700), (b"{", -32700), (b"\xff", -32700), (b"null", -32600), (b"5", -32600),
        (b"[]", -32600), (b'[{"jsonrpc":"2.0","method":"ping","id":1}]', -32600),
        ({}, -32600), ({"jsonrpc": "1.0", "method": "ping", "id": 1}, -32600),
        ({"jsonrpc": "2.0", "id": 1}, -32600), ({"jsonrpc": "2.0", "method": 5, "id": 1}, -32600),
        (message("ping", id=True), -32600), (message("ping", id=1.5), -32600),
        ({**message("ping"), "id": None}, -32600), (message("ping", id=[]), -32600),
        ({**message("ping"), "params": []}, -32602), ({**message("ping"), "params": 5}, -32602),
        (message("ping", {"_meta": 5}), -32602),
    ],
    ids=str,
)  # fmt: skip
async def test_body_that_is_no_message_is_refused(body: Any, expected: int) -> None:
    async with served() as server:
        for headers in ({}, {"MCP-Protocol-Version": "2025-06-18"}):
            answer = await send_legacy(server, body, headers)
            assert await error_of(answer) == (400, expected)


@pytest.mark.parametrize(
    ("params", "code"),
    [
        ({}, -32602), ({"name": 5}, -32602), ({"name": None}, -32602),
        ({"name": "add", "arguments": []}, -32602), ({"name": "add", "arguments": "a"}, -32602),
        ({"name": "nope"}, -32602), ({"name": "Add", "arguments": {}}, -32602),
        ({"name": "help", "arguments": {}}, -32602), ({"name": "__class__"}, -32602),
    ],
    ids=str,
)  # fmt: skip
async def test_call_of_no_tool_is_an_error(params: dict[str, Any], code: int) -> None:
    manager, _ = tool_manager()
    async with served(manager) as server:
        headers = await open_session(server)
        answer = await send_legacy(server, message("tools/call", params), headers)
        assert await error_of(answer) == (200, code)
        if isinstance(params.get("name"), str):
            answer = await send(server, modern("tools/call", params))
            assert await error_of(answer) == (200, code)


async def test_tools_have_one_page() -> None:
    async with served() as server:
        answer = await send(server, modern("tools/list", {"cursor": "2"}))
        assert await error_of(answer) == (200, -32602)


# ---- the legacy era ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "given"),
    [*((version, version) for version in LEGACY), (MODERN, LEGACY[0]), ("2024-11-05", LEGACY[0]),
     ("x", LEGACY[0]), (None, LEGACY[0]), ([], LEGACY[0])],
)  # fmt: skip
async def test_initialize_negotiates_the_version(wanted: Any, given: str) -> None:
    async with served() as server:
        params = {"protocolVersion": wanted, "capabilities": {}, "clientInfo": 5}
        for headers in ({}, {"MCP-Protocol-Version": MODERN}):
            answer = await send_legacy(server, message("initialize", params), headers)
            result = answer.json["result"]
            assert (answer.status, result["protocolVersion"]) == (200, given)
            assert result["capabilities"] == {"tools": {}}
            assert result["serverInfo"]["name"] == "karna-ws"
            assert "resultType" not in result


async def test_legacy_session_lists_calls_and_pings_whatever_session_it_names() -> None:
    manager, _ = tool_manager()
    async with served(manager) as server:
        for headers in (
            await open_session(server),
            await open_session(server, "2025-03-26"),
            {},  # no version: 2025-03-26
            {"Mcp-Session-Id": "of an earlier process", "MCP-Protocol-Version": "2025-06-18"},
        ):
            answer = await send_legacy(server, message("ping"), headers)
            assert answer.json == {"jsonrpc": "2.0", "id": 1, "result": {}}
            answer = await send_legacy(server, message("tools/list"), headers)
            assert set(answer.json["result"]) == {"tools"}
            params = {"name": "add", "arguments": {"a": 5}}
            answer = await send_legacy(server, message("tools/call", params), headers)
            assert answer.json["result"]["structuredContent"] == {"result": 6}
            assert "resultType" not in answer.json["result"]
            answer = await send_legacy(server, message("prompts/list"), headers)
            assert await error_of(answer) == (200, -32601)


async def test_legacy_version_that_is_unknown_is_400() -> None:
    async with served() as server:
        for version in ("1900-01-01", "", "2025-11-25, 2025-11-25"):
            headers = {"MCP-Protocol-Version": version}
            answer = await send_legacy(server, message("ping"), headers)
            assert await error_of(answer) == (400, -32022)


async def test_notifications_and_answers_get_202_and_nothing() -> None:
    async with served() as server:
        for sent in (
            message("notifications/initialized", id=None),
            message("notifications/nope", id=None),
            message("notifications/cancelled", id=None),
            message("notifications/cancelled", {"requestId": {}}, None),
            {"jsonrpc": "2.0", "id": 1, "result": {}},
            {"jsonrpc": "2.0", "id": 1, "error": {"code": 1, "message": "x"}},
        ):
            for headers in ({}, {"MCP-Protocol-Version": MODERN}):
                answer = await send_legacy(server, sent, headers)
                assert (answer.status, answer.body) == (202, b"")


@pytest.mark.parametrize("path", ["/mcp", "/mcp/"])
async def test_other_methods_are_405(path: str) -> None:
    async with served() as server:
        for method in ("GET", "DELETE", "PUT", "HEAD"):
            headers = {**ACCEPT, "Mcp-Session-Id": "x"}
            answer = await ask(server.port, head(method, path, headers))
            assert (answer.status, answer.headers["allow"]) == (405, "POST, OPTIONS")
        assert (await ask(server.port, post(path, message("ping"), ACCEPT))).status == 200


# ---- who may come in -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://evil.example"}, 403), ({"Origin": "null"}, 403),
        ({"Host": "evil.example"}, 403), ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Content-Type": "text/plain"}, 415), ({"Content-Type": None}, 415),
        ({"Authorization": None}, 401), ({"Authorization": "Bearer wrong"}, 401),
        ({"Origin": "http://localhost:6274"}, 200), ({}, 200),
    ],
    ids=str,
)  # fmt: skip
async def test_rules_are_those_of_every_door(headers: Headers, status: int) -> None:
    manager, gate = tool_manager()
    async with served(manager, token=TOKEN) as server:
        given = {"Authorization": f"Bearer {TOKEN}", **headers}
        answer = await send(server, modern("tools/list"), given)
        assert answer.status == status
        if status == 401:
            assert answer.headers["www-authenticate"] == "Bearer"
        if "Origin" in headers and status == 200:
            assert answer.headers["access-control-allow-origin"] == headers["Origin"]
        assert not gate.begun


# ---- progress and streams ------------------------------------------------------------------------


async def test_progress_makes_the_answer_a_stream_and_the_connection_goes_on() -> None:
    manager, _ = tool_manager()
    async with served(manager) as server, dial(server.port) as peer:
        request = call("steps", {"count": 4}, progressToken="p")
        await peer.send(posted(request, {"Connection": "keep-alive"}))
        headers = await begin_stream(peer)
        assert headers["transfer-encoding"] == "chunked" and "connection" not in headers
        *reports, answer = await events(peer)
        params = [each["params"] for each in reports]
        assert {each["method"] for each in reports} == {"notifications/progress"}
        assert {each["progressToken"] for each in params} == {"p"}
        numbers = [each["progress"] for each in params]
        assert numbers == sorted(set(numbers)) and numbers[1:4] == [25, 50, 75]
        assert [each.get("total") for each in params] == [100, 100, 100, 100, None]
        assert [each["message"] for each in params][:2] == ["step 0", "step 1"]
        assert answer["id"] == 1 and answer["result"]["structuredContent"] == {"count": 4}
        await peer.send(posted(call("add", {"a": 1})))
        assert (await peer.answer()).json["result"]["structuredContent"] == {"result": 2}


@pytest.mark.parametrize("accept", [ACCEPT["Accept"], "application/json", None, "*/*"])
@pytest.mark.parametrize("token", [None, True, 1.5, {}, "p", 0])
async def test_progress_is_sent_to_who_asked_and_can_take_it(accept: Any, token: Any) -> None:
    manager, _ = tool_manager()
    async with served(manager) as server, dial(server.port) as peer:
        request = call("steps", {"count": 2}, **({} if token is None else {"progressToken": token}))
        await peer.send(posted(request, {"Accept": accept}))
        takes_it = accept is not None and accept != "application/json"
        if type(token) in (str, int) and takes_it:
            await begin_stream(peer)
            assert len(await events(peer)) == 4
        else:
            answer = await peer.answer()
            assert answer.json["result"]["structuredContent"] == {"count": 2}


async def test_stream_of_http_1_0_ends_with_its_connection() -> None:
    manager, _ = tool_manager()
    async with served(manager) as server, dial(server.port) as peer:
        request = posted(call("steps", {"count": 1}, progressToken=1))
        await peer.send(request.replace(b"HTTP/1.1", b"HTTP/1.0", 1))
        assert "transfer-encoding" not in await begin_stream(peer)
        text = await peer.reader.read(-1)
        assert text.count(b"event: message\ndata: {") == 3 and text.endswith(b"\n\n")


async def test_pipelined_requests_behind_a_stream_wait_for_its_end() -> None:
    manager, _ = tool_manager()
    async with served(manager) as server, dial(server.port) as peer:
        stream = posted(call("steps", {"count": 3}, progressToken=1), {"Connection": "keep-alive"})
        await peer.send(stream + stream + posted(call("add", {"a": 1})))
        for _ in range(2):
            await begin_stream(peer)
            assert len(await events(peer)) == 5
        assert (await peer.answer()).json["result"]["structuredContent"] == {"result": 2}
        assert await peer.at_end()


async def test_answer_that_takes_long_is_kept_alive_by_comments() -> None:
    # Comments each 0.1 s; the answer is a stream from the first of them on.
    manager, gate = tool_manager()
    async with served(manager, ping_interval_s=0.1) as server, dial(server.port) as peer:
        await peer.send(posted(call("gate", {"name": "a"})))
        await begin_stream(peer)
        assert [await chunk(peer) for _ in range(3)] == [b":\n\n"] * 3
        gate.let("a")
        assert (await event(peer))["result"]["content"][0]["text"] == "a"
        assert await event(peer) is None


async def test_client_that_takes_no_stream_waits_without_one() -> None:
    manager, gate = tool_manager()
    async with served(manager, ping_interval_s=0.05) as server, dial(server.port) as peer:
        await peer.send(posted(call("gate", {"name": "a"}), {"Accept": "application/json"}))
        await asyncio.sleep(0.2)  # four times as long as until a comment
        gate.let("a")
        assert (await peer.answer()).json["result"]["content"][0]["text"] == "a"


@contextlib.asynccontextmanager
async def lazy_peer(port: int) -> Any:
    """A peer whose socket takes little, and is read by nobody."""
    client = small_buffers()
    await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=client, limit=2048)
    try:
        yield Peer(reader, writer)
    finally:
        writer.transport.abort()


def waiting(manager: WebSocketManager) -> list[int]:
    """How many bytes wait for each connection to take them."""
    return [each.transport.get_write_buffer_size() for each in manager.connections] or [0]


async def test_streams_that_nobody_reads_are_bounded_and_dropped() -> None:
    # Dropped when between two comments, 0.1 s apart, nothing was taken.
    manager, _ = tool_manager()
    limits: Any = {"ping_interval_s": 0.1, "max_unsent_bytes": 1 << 30}
    async with served(manager, **limits) as server, contextlib.AsyncExitStack() as all_:
        peers = [await all_.enter_async_context(lazy_peer(server.port)) for _ in range(10)]
        for peer in peers:
            await peer.send(posted(call("flood", {"size": 1_000}, progressToken=1)))
        await until(lambda: len(manager.commands.tasks.running) == 10)
        await until(lambda: all(waiting(manager)))
        while manager.commands.tasks.running:
            # 64 KiB where asyncio's transports write, less where we do.
            assert max(waiting(manager)) < 80 * 1024, "a command waits until its report is taken"
            status, _ = await http(server, "GET", "/health")
            assert status == 200
        assert manager.metrics.drops["slow"] == 10
        await until(lambda: not manager.connections)


async def test_reports_that_do_not_wait_pass_the_limit_once() -> None:
    manager, _ = tool_manager()
    async with (
        served(manager, max_unsent_bytes=64 * 1024) as server,
        lazy_peer(server.port) as peer,
    ):
        await peer.send(posted(call("burst", {"count": 9_000, "size": 1_000}, progressToken=1)))
        await until(lambda: manager.metrics.drops["slow"] == 1)
        await until(lambda: not manager.connections and not manager.commands.tasks.running)


# ---- cancellation --------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [False, True])
async def test_modern_client_cancels_by_closing(streams: bool) -> None:
    manager, gate = tool_manager()
    options = {"ping_interval_s": 0.05} if streams else {}
    async with served(manager, **options) as server:
        async with dial(server.port) as peer:
            await peer.send(posted(call("gate", {"name": "a"})))
            if streams:
                await begin_stream(peer)
            await until(lambda: gate.running)
            peer.writer.write_eof()  # without a reset: its end is enough
            await until(lambda: gate.cancelled == ["a"])
        await until(lambda: not manager.connections)


async def test_legacy_client_cancels_by_notification_and_only_its_own() -> None:
    manager, gate = tool_manager()
    async with served(manager) as server:
        mine, other = await open_session(server), await open_session(server)
        params = {"name": "gate", "arguments": {"name": "a"}}
        running = asyncio.create_task(
            send_legacy(server, message("tools/call", params, id=3), mine)
        )
        await until(lambda: gate.running)

        async def cancel(id: Any, headers: Headers) -> None:
            sent = message("notifications/cancelled", {"requestId": id, "reason": "x"}, None)
            assert (await send_legacy(server, sent, headers)).status == 202

        await cancel(3, other)
        await cancel(3, {})
        await cancel(3, {"Mcp-Session-Id": "guessed"})
        await cancel(3, {**mine, "MCP-Protocol-Version": MODERN})  # not of this era
        for id in ("3", 3.0, True, None, [], 4):
            await cancel(id, mine)
        assert gate.running
        await cancel(3, mine)
        answer = await running
        assert answer.json["id"] == 3 and answer.json["result"]["isError"] is True
        assert gate.cancelled == ["a"]
        assert manager.mcp is not None and not manager.mcp.running


@pytest.fixture
def probing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that has ended its side is asked each 50 ms whether it is there."""
    monkeypatch.setattr("karna.http.PROBE_S", 0.05)


@pytest.mark.usefixtures("probing")
async def test_legacy_client_that_disconnects_does_not_cancel_but_not_for_many() -> None:
    manager, gate = tool_manager()
    async with served(manager, close_timeout_s=0.2) as server:
        headers = {**await open_session(server), **ACCEPT}
        count = MAX_DETACHED + 3
        async with contextlib.AsyncExitStack() as stack:
            for number in range(count):
                peer = await stack.enter_async_context(dial(server.port))
                params = {"name": "gate", "arguments": {"name": f"n{number}"}}
                await peer.send(post("/mcp", message("tools/call", params, number), headers))
            await until(lambda: gate.running == count)
        await until(lambda: len(manager.connections) == 0)
        await until(lambda: len(gate.cancelled) == 3)
        assert gate.running == MAX_DETACHED
        assert manager.mcp is not None and len(manager.mcp.running) == MAX_DETACHED
        gate.let(*(f"n{number}" for number in range(count)))
        await until(lambda: not gate.running)
        await until(lambda: not manager.commands.tasks.running)
        assert not manager.mcp.running and not manager.mcp.detached


@pytest.mark.usefixtures("probing")
async def test_detached_commands_end_with_the_server() -> None:
    manager, gate = tool_manager()
    async with served(manager, close_timeout_s=0.2) as server:
        headers = {**await open_session(server), **ACCEPT}
        async with dial(server.port) as peer:
            params = {"name": "gate", "arguments": {"name": "a"}}
            await peer.send(post("/mcp", message("tools/call", params, 1), headers))
            await until(lambda: gate.running)
        await until(lambda: not manager.connections)
        assert gate.running
    assert gate.cancelled == ["a"]


async def test_server_that_stops_ends_its_streams_with_an_answer() -> None:
    manager, _ = tool_manager()
    async with served(manager, grace_s=0.1, ping_interval_s=0.05) as server:
        async with dial(server.port) as peer:
            await peer.send(posted(call("gate", {"name": "a"}), {"Connection": "keep-alive"}))
            await begin_stream(peer)
            closing = server.close()
            answer = await event(peer)
            assert answer["result"]["isError"] is True
            assert await event(peer) is None and await peer.at_end()
        await closing


# ---- consent -------------------------------------------------------------------------------------

AGREED = {"confirm": {"action": "accept", "content": {"confirm": True}}}


def erase(params: dict[str, Any] | None = None, what: str = "all", **options: Any) -> Any:
    options = {"capabilities": ELICITS, **options}
    return call("erase", {"what": what}, params=params or {}, **options)


async def test_confirmed_command_asks_a_person_and_runs_once() -> None:
    manager, _ = tool_manager()
    async with served(manager) as server:
        asked = await result_of(server, erase())
        assert asked["resultType"] == "input_required"
        wanted = asked["inputRequests"]["confirm"]
        assert wanted["method"] == "elicitation/create"
        assert '{"what":"all"}' in wanted["params"]["message"]
        retry = {"requestState": asked["requestState"], "inputResponses": AGREED}
        result = await result_of(server, erase(retry, id=2))
        assert result["content"] == [{"type": "text", "text": "erased all"}]
        replayed = await send(server, erase(retry, id=3))
        assert await error_of(replayed) == (200, -32602)


@pytest.mark.parametrize(
    "responses",
    [
        {"confirm": {"action": "decline"}}, {"confirm": {"action": "cancel"}},
        {"confirm": {"action": "accept"}}, {"confirm": {"action": "accept", "content": {}}},
        {"confirm": {"action": "accept", "content": {"confirm": "true"}}},
        {"confirm": {"action": "accept", "content": {"confirm": 1}}},
        {"confirm": {"action": "accept", "content": [True]}},
    ],
    ids=str,
)  # fmt: skip
async def test_command_that_nobody_agreed_to_does_not_run(responses: Any) -> None:
    manager, _ = tool_manager()
    async with served(manager) as server:
        asked = await result_of(server, erase())
        retry = {"requestState": asked["requestState"], "inputResponses": responses}
        result = await result_of(server, erase(retry))
        assert result["isError"] is True and "did not agree" in result["content"][0]["text"]
        again = {**retry, "inputResponses": AGREED}
        assert await error_of(await send(server, erase(again))) == (200, -32602)


@pytest.mark.parametrize(
    "responses", [None, {}, {"other": {"action": "accept"}}, {"confirm": 5}, 5, [],
                  {"confirm": {"action": ["accept"]}}], ids=str
)  # fmt: skip
async def test_answer_that_is_missing_is_asked_for_again(responses: Any) -> None:
    manager, _ = tool_manager()
    async with served(manager) as server:
        for state in (None, (await result_of(server, erase()))["requestState"]):
            retry = {"inputResponses": responses, "requestState": state}
            asked = await result_of(server, erase(retry))
            assert asked["resultType"] == "input_required"


async def test_consent_without_or_with_a_forged_state_is_none() -> None:
    manager, _ = tool_manager()
    async with served(manager) as server:
        asked = await result_of(server, erase({"inputResponses": AGREED}))
        assert asked["resultType"] == "input_required", "no state: it was never asked"
        state = asked["requestState"]
        time_, nonce, mac = state.rsplit(".", 2)
        later = f"{float(time_) + 1e6:.3f}"
        for forged in (
            "", "x", 5, True, [], {}, state + "0", state[1:], state.upper(), "\xe9" + state,
            f"{later}.{nonce}.{mac}", f"{time_}.{'0' * 24}.{mac}", f"{time_}.{nonce}.{'0' * 64}",
            f"{time_}.{nonce}.", f"{time_}.{nonce}", "..", Consents().begin(b'["erase",{"what":"all"}]'),
        ):  # fmt: skip
            retry = {"requestState": forged, "inputResponses": AGREED}
            assert await error_of(await send(server, erase(retry))) == (200, -32602)
        # Of another call.
        retry = {"requestState": state, "inputResponses": AGREED}
        assert await error_of(await send(server, erase(retry, "one"))) == (200, -32602)
        # Still good for its own.
        assert (await result_of(server, erase(retry)))["content"][0]["text"] == "erased all"


async def test_consent_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("karna.consent.CONSENT_S", -1.0)
    manager, _ = tool_manager()
    async with served(manager) as server:
        asked = await result_of(server, erase())
        retry = {"requestState": asked["requestState"], "inputResponses": AGREED}
        assert await error_of(await send(server, erase(retry))) == (200, -32602)


async def test_client_that_cannot_ask_is_refused_with_the_reason() -> None:
    manager, _ = tool_manager()
    async with served(manager) as server:
        for capabilities in ({"elicitation": {"url": {}}}, {"sampling": {}}, {"elicitation": 5}):
            answer = await send(server, erase(capabilities=capabilities))
            assert await error_of(answer) == (400, -32021)
            assert answer.json["error"]["data"]["requiredCapabilities"]["elicitation"]
        headers = await open_session(server)
        params = {"name": "erase", "arguments": {"what": "x"}}
        answer = await send_legacy(server, message("tools/call", params), headers)
        result = answer.json["result"]
        assert result["isError"] is True and "confirmed by a person" in result["content"][0]["text"]
        wrong = await result_of(server, call("erase", capabilities=ELICITS))
        assert "WHAT is missing" in wrong["content"][0]["text"], "what can't run is not asked about"


# ---- many ----------------------------------------------------------------------------------------


async def test_many_calls_at_once_get_their_own_answers() -> None:
    manager, gate = tool_manager()
    async with served(manager) as server:
        calls = [send(server, call("gate", {"name": f"{n}"}, id=n)) for n in range(100)]
        waiting = [asyncio.create_task(each) for each in calls]
        await until(lambda: gate.running == 100)
        gate.let(*map(str, range(100)))
        for number, answer in enumerate(await asyncio.gather(*waiting)):
            assert answer.json["id"] == number
            assert answer.json["result"]["content"][0]["text"] == str(number)


async def test_flood_on_one_connection_lets_others_be_served() -> None:
    manager, _ = tool_manager()
    async with served(manager) as server, dial(server.port) as flooder:
        request = posted(call("add", {"a": 1}), {"Connection": "keep-alive"})
        flooder.writer.write(request * 5_000)
        reading = asyncio.create_task(flooder.reader.readuntil(b"never" * 10))
        for _ in range(20):
            began = asyncio.get_running_loop().time()
            assert (await send(server, call("add", {"a": 1}))).status == 200
            assert asyncio.get_running_loop().time() - began < 0.5
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError, asyncio.LimitOverrunError):
            await reading


async def test_metrics_and_log_name_the_door(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "karna_ws")
    async with served() as server:
        info = {"io.modelcontextprotocol/clientInfo": {"name": "a\nb", "version": "1"}}
        await send(server, modern("server/discover", **info))
        await send(server, modern("made/up"))
        await open_session(server)
        found = await get_metrics(server.port)
        assert found["karna_mcp_requests_total{era=modern,method=server/discover}"] == 1
        assert found["karna_mcp_requests_total{era=modern,method=other}"] == 1
        assert found["karna_mcp_requests_total{era=legacy,method=initialize}"] == 1
        assert found["karna_refused_total{reason=unknown_method}"] == 1
    assert "is an assistant by mcp (modern): a b 1" in caplog.text


async def test_bug_of_ours_is_an_internal_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise LookupError("as planned")

    async with served(logs_errors=True) as server:
        await send(server, modern("tools/list"))
        monkeypatch.setattr(server.manager.mcp, "list_tools", broken)  # type: ignore[attr-defined]
        answer = await send(server, modern("tools/list"))
        assert await error_of(answer) == (200, -32603)
        assert "planned" not in answer.body.decode()
