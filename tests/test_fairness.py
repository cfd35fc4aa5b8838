"""What one client does, however cheap for it, is no other's loss: bounds, turns, places, truth."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import ssl
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from karna.errors import Unavailable
from karna.hub import PENDING_CONNECTIONS
from karna.listen import SPARE_DESCRIPTORS
from karna.service import Service
from karna_ws import Client, WebSocketManager, serving
from services import Context
from support import ROOT, Raw, Sio, execute, http, served, until
from support_peers import TOKEN, ask, dial, engine, frame, head, lazy, post, raw
from test_listen import make_certificate

# --- turns -----------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def counting_turns() -> AsyncIterator[Callable[[], int]]:
    """While the block runs, a function tells how often the loop has turned."""
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    try:
        yield lambda: turns
    finally:
        counting.cancel()


async def test_flood_of_one_client_is_handled_in_turns_with_the_others() -> None:
    """A read of 64 KiB holds some 9,000 messages; another's wait behind 32 of them at most."""
    handled: list[int] = []

    class Counting(WebSocketManager):
        def handle_message(self, client: Client, payload: bytes, is_text: bool) -> str:
            if payload == b"x":
                handled[-1] += 1
            return "ok"

    async with served(Counting()) as server, raw(server.port) as flood, raw(server.port) as other:
        await flood.send(frame(1, b"x") * 9000)
        for _ in range(20):
            handled.append(0)
            await other.send(frame(1, b"y"))
            assert (await other.frame()).payload == b"ok"
    # One turn may have begun already, and one may come before the reader looks at the other.
    assert sum(handled[1:]) and max(handled) < 3000


async def test_batch_is_handled_in_turns() -> None:
    """Others are served in the middle of a batch; it is whole in the end."""
    manager = WebSocketManager()
    handled: Counter[int] = Counter()

    async with served(manager) as server, Raw.open(server) as client, counting_turns() as turns:

        @manager.method("step", inline=True)
        def step() -> None:
            handled[turns()] += 1

        batch = [{"jsonrpc": "2.0", "method": "step", "id": n} for n in range(256)]
        await client.send(batch, execute("echo on", id=1))
        assert [answer["id"] for answer in await client.next()] == list(range(256))
        assert await client.final(1)
        status, answers = await http(server, "POST", "/rpc", batch)
        assert (status, len(answers)) == (200, 256)
    assert handled.total() == 512 and max(handled.values()) == 32


async def test_program_that_sends_to_a_client_that_left_is_told() -> None:
    manager = WebSocketManager()
    clients: list[Client] = []

    @manager.on("connect")
    async def greet(client: Client, auth: Any) -> None:
        clients.append(client)

    async with served(manager) as server:
        async with raw(server.port), engine(server.port, connect=b"40"):
            await until(lambda: len(manager.all_clients()) == 2)
        await until(lambda: not manager.connections)
        for client in clients:
            with pytest.raises(ConnectionError, match="has left"):
                await client.send("news", 1)
            with pytest.raises(ConnectionError, match="has left"):
                await client.emit("news", 1)


@pytest.mark.parametrize("door", ["raw", "http"])
async def test_command_that_reports_without_end_lets_others_in_and_meets_its_limit(
    door: str,
) -> None:
    manager = WebSocketManager()

    @manager.commands.command
    async def babble(context: Context) -> None:
        while True:
            await context.progress("x")

    async with served(manager, command_timeout_s=0.2) as server, Raw.open(server) as other:
        if door == "http":
            asking = asyncio.create_task(
                ask(server.port, post("/api/execute_command", {"command": "babble"}))
            )
            await until(lambda: manager.commands.running)
            assert await other.run("echo hi") == "hi"
            assert (await asking).error["code"] == "timeout"
            return
        async with Raw.open(server) as client:
            await client.send(execute("babble", id=1))
            await until(lambda: manager.commands.running)
            assert await other.run("echo hi") == "hi"
            assert (await client.final(1))["data"]["code"] == "timeout"


async def test_feeder_that_never_waits_lets_others_in() -> None:
    manager = WebSocketManager()
    fed: list[Client] = []

    @manager.on("connect")
    async def feed(client: Client, auth: Any) -> None:
        if not fed:
            fed.append(client)

    async def feeder() -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                await fed[0].send("x", 1)

    async with served(manager) as server, raw(server.port) as greedy:
        await until(lambda: fed and manager.raw)
        task = asyncio.create_task(feeder())
        async with Raw.open(server) as other:
            assert await other.run("echo hi") == "hi"
        greedy.writer.transport.abort()
        await task


# --- bounds ----------------------------------------------------------------------------------------


async def test_sockets_in_tls_handshake_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("karna.hub.PENDING_CONNECTIONS", 20)
    cert, key = make_certificate(tmp_path)
    trust = ssl.create_default_context(cafile=cert)
    async with (
        served(max_clients=10, certfile=cert, keyfile=key) as server,
        contextlib.AsyncExitStack() as stack,
    ):
        silent = [await stack.enter_async_context(dial(server.port)) for _ in range(31)]
        assert await silent[0].at_end()
        assert len(server.manager.connections) == 30
        options = {"ssl": trust, "server_hostname": "localhost"}
        for _ in range(3):  # who shakes hands gets in, silent ones give way
            assert (await ask(server.port, head("GET", "/health"), **options)).status == 200


async def test_tls_handshake_that_takes_too_long_is_cut(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)
    async with served(open_timeout_s=0.2, certfile=cert, keyfile=key) as server:
        async with dial(server.port) as silent, dial(server.port) as plain:
            await plain.send(head("GET", "/health"))
            assert await plain.at_end() and await silent.at_end()
        await until(lambda: not server.manager.connections)
        assert server.manager.metrics.refusals["TLS"] == 2


async def test_leaving_again_and_again_waits_for_disconnect_handlers() -> None:
    manager = WebSocketManager()
    gate = asyncio.Event()
    running = most = 0

    @manager.on("disconnect")
    async def tidy(client: Client, reason: str) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await gate.wait()
        running -= 1

    async with served(manager) as server, engine(server.port, connect=None) as peer:
        await peer.send(frame(1, b"40") + frame(1, b"41"))
        await peer.send((frame(1, b"40") + frame(1, b"41")) * 100)
        (connection,) = manager.connections
        await until(lambda: connection._holds and running)
        assert most <= 5
        gate.set()
        await until(lambda: not connection._holds and not running)
        assert most <= 5


async def test_client_whose_disconnect_handler_runs_keeps_its_place() -> None:
    """Else who reconnects in a loop starts such handlers without end."""
    manager = WebSocketManager()
    gate = asyncio.Event()

    @manager.on("disconnect")
    async def tidy(client: Client, reason: str) -> None:
        await gate.wait()

    async with served(manager, max_clients=2) as server:
        for _ in range(2):
            async with raw(server.port):
                pass
        await until(lambda: manager.leaving == 2)
        assert manager.is_full
        gate.set()
        await until(lambda: not manager.is_full)


async def test_one_attachment_named_a_thousand_times_is_not_sent_back_as_often() -> None:
    manager = WebSocketManager()

    @manager.on("mirror")
    async def mirror(client: Client, value: Any) -> Any:
        return value

    named = [{"_placeholder": True, "num": 0}] * 1000
    async with served(manager) as server, engine(server.port, connect=b"40") as peer:
        text = b"451-7" + json.dumps(["mirror", named]).encode()
        await peer.send(frame(1, text) + frame(2, b"x" * 100_000))
        answer = (await peer.frame()).payload
        assert answer.startswith(b"437[") and b"command_failed" in answer


async def test_rejoining_a_namespace_forgets_no_running_command() -> None:
    manager = WebSocketManager()
    begun = asyncio.Event()

    @manager.commands.command
    async def stubborn() -> None:
        begun.set()
        while not done.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await done.wait()

    done = asyncio.Event()
    async with served(manager, max_running_commands=1) as server, Sio.open(server) as client:
        await client.join("/")
        await client.send('42["rpc",' + json.dumps(execute("stubborn", id=1)) + "]")
        await begun.wait()
        await client.send("41")
        await client.join("/")
        await client.send('428["rpc",' + json.dumps(execute("countdown 0", id=2)) + "]")
        status = await client.rpc({"method": "get_status"}, ack=9)
        assert status["data"]["command"]["running"] == 1
        done.set()
        assert (await client.packet("42"))[1]["type"] == "command_progress"
        (answer,) = await client.packet("438")
        assert answer["type"] == "command_response"


async def test_sessions_without_the_token_take_no_place_of_its_owners() -> None:
    async with (
        served(token=TOKEN, max_clients=3) as server,
        contextlib.AsyncExitStack() as stack,
    ):
        for _ in range(10):
            await stack.enter_async_context(Sio.open(server))
        for _ in range(3):
            await stack.enter_async_context(Raw.open(server, f"/ws?token={TOKEN}"))
        late = await stack.enter_async_context(Sio.open(server))
        await late.send("40" + json.dumps({"token": TOKEN}))
        error = await late.packet("44")
        assert error["data"]["code"] == "unavailable" and "full" in error["message"]
        assert (await ask(server.port, head("GET", "/health"))).status == 200


async def test_long_replay_waits_for_its_reader() -> None:
    manager = WebSocketManager()
    async with served(manager, history_bytes=2**24) as server, contextlib.AsyncExitStack() as stack:
        start = manager.history.last
        for number in range(30):
            manager.broadcast("news", [number, "x" * 500_000])
        path = f"/ws?since={start}"
        peers = [await stack.enter_async_context(lazy(server.port, path)) for _ in range(8)]
        for peer in peers:
            peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await until(lambda: len(manager.connections) == 8)
        await until(lambda: all(not each.is_writable for each in manager.connections))
        unsent = [each.transport.get_write_buffer_size() for each in manager.connections]
        assert max(unsent) < 1_500_000
        manager.broadcast("news", [30, ""])  # while the replay goes on
        for peer in peers[:2]:
            peer.writer.transport.resume_reading()  # type: ignore[attr-defined]
            numbers = [(await peer.json())["data"][0] for _ in range(31)]
            assert numbers == list(range(31))
        manager.broadcast("news", [31, ""])
        assert (await peers[0].json())["data"] == [31, ""]


async def test_replay_that_falls_behind_the_history_tells_of_the_gap() -> None:
    manager = WebSocketManager()
    async with served(manager, history_messages=10, history_bytes=2**24) as server:
        start = manager.history.last
        for number in range(10):
            manager.broadcast("news", [number, "x" * 1_000_000])
        async with lazy(server.port, f"/ws?since={start}") as peer:
            (connection,) = manager.connections
            await until(lambda: not connection.is_writable)
            for number in range(10, 30):
                manager.broadcast("news", [number, "x" * 1000])
            received = []
            while not received or received[-1].get("type") != "error":
                received.append(await peer.json())
            assert received[-1]["data"]["code"] == "history_gap"
            assert [each["data"][0] for each in received[:-1]] == list(range(10))
            manager.broadcast("news", [30, ""])
            assert (await peer.json())["data"][0] == 30


# --- truth -----------------------------------------------------------------------------------------


class Away(Service):
    """A backplane that takes nothing."""

    log_gate = receive = restore = history_messages = history_bytes = None

    def enqueue(self, body: bytes) -> None:
        raise Unavailable("Redis is away")

    def is_ahead(self, offset: str) -> bool:
        return False


async def test_broadcast_from_a_thread_hears_that_it_is_refused() -> None:
    manager = WebSocketManager()
    heard: list[Any] = []

    @manager.commands.command
    def tell() -> str:
        try:
            manager.notify("hello")
        except Unavailable as error:
            heard.append((str(error), threading.current_thread() is threading.main_thread()))
        return "told"

    async with served(manager) as server, Raw.open(server) as client:
        manager.use_backplane(Away("backplane"))  # type: ignore[arg-type]
        assert await client.run("tell") == "told"
    assert heard == [("Redis is away", False)]


async def test_disconnect_in_a_connect_handler_is_heard_on_every_door() -> None:
    manager = WebSocketManager()

    @manager.on("connect")
    async def turn_away(client: Client, auth: Any) -> None:
        assert client.id
        await client.disconnect("not today")

    async with served(manager) as server:
        async with Raw.open(server) as client:
            assert await client.closed() == (1000, "not today")
        async with Sio.open(server) as session:
            await session.send("40")
            assert (await session.packet("44"))["message"] == "not today"
        assert not manager.all_clients()


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)

    __repr__ = __str__


@pytest.mark.parametrize("inline", [True, False])
async def test_error_that_can_not_be_told_is_answered(inline: bool) -> None:
    manager = WebSocketManager()

    def fail() -> None:
        raise Unspeakable

    manager.commands.command(inline=inline)(fail)
    manager.method("fail", inline=inline)(fail)
    async with served(manager) as server, Raw.open(server) as client:
        for answer in (
            await client.ask("execute_command", command="fail"),
            await client.ask("fail"),
        ):
            assert answer["data"]["code"] == "command_failed"
            assert answer["data"]["message"] == "Unspeakable"
        assert await client.run("echo on") == "on"


# --- the log ---------------------------------------------------------------------------------------


async def test_text_of_a_client_forges_no_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(WebSocketManager):
        def handle_message(self, client: Client, payload: bytes, is_text: bool) -> str:
            raise ValueError(payload.decode())

    evil = "x\n2026-01-01 00:00:00,000 INFO    all is well\x1b[2J\r\u2028end"
    with caplog.at_level(logging.INFO):
        async with served(Broken(), logs_errors=True) as server, Raw.open(server) as client:
            await client.send(evil)
            await client.next()
    text = caplog.text
    assert "\\x1b[2J" in text and "\x1b" not in text and "\u2028" not in text
    assert not [line for line in text.splitlines() if line.startswith("2026-01-01")]


async def test_invented_origins_do_not_silence_other_lines(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with served() as server:
        for number in range(80):
            origin = f"https://x{number}.example"
            assert (await ask(server.port, head("GET", "/", {"Origin": origin}))).status == 403
        server.manager.drop("c1 127.0.0.1", "slow")
    assert "c1 127.0.0.1 dropped: slow" in caplog.text
    assert caplog.text.count("is not allowed") == 5


async def test_log_names_the_address_that_a_trusted_proxy_tells(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def refused(**options: Any) -> str:
        caplog.clear()
        headers = {
            "Origin": "https://a.example",
            "X-Forwarded-For": "6.6.6.6, 192.0.2.7, 127.0.0.1",
        }
        async with served(**options) as server:
            assert (await ask(server.port, head("GET", "/", headers))).status == 403
        return next(line for line in caplog.text.splitlines() if "refused" in line)

    assert " 127.0.0.1 refused" in await refused()
    assert " 192.0.2.7 refused" in await refused(trust_proxy="127.0.0.1")
    assert " 127.0.0.1 refused" in await refused(trust_proxy="10.0.0.1")


async def test_two_servers_of_one_loop_serve_side_by_side() -> None:
    async with (
        serving(WebSocketManager(), port=0) as one,
        serving(WebSocketManager(), port=0) as two,
    ):
        for server in (one, two):
            assert (await http(server, "GET", "/health"))[0] == 200


DESCRIPTORS = """
import logging, resource
from karna.listen import fit_descriptors
logging.basicConfig(format="%(message)s")
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))
print(fit_descriptors(1000))
"""


def test_clients_are_as_many_as_there_are_descriptors_and_the_operator_is_told() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", DESCRIPTORS], cwd=ROOT, capture_output=True, text=True, timeout=20
    )
    assert ended.stdout == f"{300 - PENDING_CONNECTIONS - SPARE_DESCRIPTORS}\n"
    assert "not 1000: the system allows 300 descriptors (ulimit -n)" in ended.stderr


TWO_SERVERS = """
import asyncio, os, signal
from karna.listen import _stops
from karna_ws import WebSocketManager, serve

async def main():
    tasks = [asyncio.create_task(serve(WebSocketManager(), port=0)) for _ in range(2)]
    while len(_stops.get(asyncio.get_running_loop(), ())) < 2:
        await asyncio.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.gather(*tasks)
    print("both ended")

asyncio.run(main())
"""


def test_sigterm_ends_every_server_of_the_loop() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", TWO_SERVERS], cwd=ROOT, capture_output=True, text=True, timeout=20
    )
    assert "both ended" in ended.stdout, ended.stderr


async def test_client_that_takes_nothing_of_its_replay_is_dropped() -> None:
    """0.2 s after the last byte it took: its ping interval and the time to answer."""
    manager = WebSocketManager()
    options = {"ping_interval_s": 0.1, "ping_timeout_s": 0.1, "close_timeout_s": 0.1}
    async with served(manager, history_bytes=2**25, **options) as server:
        start = manager.history.last
        for number in range(10):
            manager.broadcast("news", [number, "x" * 1_000_000])
        async with lazy(server.port, f"/ws?since={start}") as peer:
            peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await until(lambda: not manager.connections)
    assert manager.metrics.drops["slow"] == 1
