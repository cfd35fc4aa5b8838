"""The life of a server: served again, shut down, signals, greedy and hostile peers."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import pytest
from websockets.asyncio.client import connect

from karna.connection import Connection
from karna.errors import StartError
from karna.listen import Listener
from karna_ws import WebSocketManager, serve, serving
from support import (
    EXECUTE,
    SERVER_FILE,
    Gate,
    Lamp,
    Raw,
    Sio,
    error_log,
    execute,
    needs,
    served,
    settled,
    turns_in_a_while,
    until,
)
from support_commands import keep_line
from support_peers import (
    ENGINE,
    Peer,
    ask,
    dial,
    engine,
    frame,
    get_metrics,
    head,
    lazy,
    post,
    raw,
    upgrade,
)
from support_process import (
    ENVIRONMENT,
    answers_on,
    is_alive,
    needs_proc,
    process,
    resident_peak,
    start_process,
)


async def test_manager_is_served_again_after_its_close() -> None:
    manager = WebSocketManager(services=[Lamp()])
    gate = Gate(manager)
    times = []
    for turn in range(3):
        async with served(manager, history_messages=turn) as server, Raw.open(server) as client:
            times.append(int(manager.history.last.partition("-")[0]))
            status = (await client.ask("get_status"))["data"]
            assert {entry["state"] for entry in status.values()} == {"running"}
            gate.let(f"turn{turn}")
            assert await client.run(f"gate turn{turn}") == f"turn{turn}"
            assert manager.notify("again") == 1
            await client.next_of("notification")
            assert manager.config.history_messages == turn
        assert {service.state for service in manager.services.values()} == {"stopped"}
        assert not manager.connections and not manager.raw
        assert not manager.tasks.running and not manager.commands.tasks.running
        assert manager.loop is None
    assert times == sorted(set(times)), "offsets of a later history are above those before"
    assert manager.notify("nobody") == 0


async def test_manager_is_not_served_twice_at_once() -> None:
    manager = WebSocketManager()
    async with served(manager) as server, Raw.open(server) as client:
        with pytest.raises(StartError, match="already"):
            async with serving(manager, port=0):
                pass
        assert await client.run("echo unharmed") == "unharmed"


async def test_manager_that_could_not_start_can_be_served_later() -> None:
    manager = WebSocketManager()
    async with served() as other:
        with pytest.raises(StartError, match=f"{other.port} is in use"):
            async with serving(manager, port=other.port):
                pass
    async with served(manager) as server, Raw.open(server) as client:
        assert await client.run("echo now") == "now"


async def test_two_managers_in_one_loop_know_nothing_of_each_other() -> None:
    one, two = WebSocketManager(), WebSocketManager()

    @one.commands.command
    def only_one() -> str:
        return "one"

    async with (
        served(one) as first, served(two) as second,
        Raw.open(first) as a, Raw.open(second) as b,
    ):  # fmt: skip
        assert first.port != second.port
        assert one.notify("to one") == 1
        assert (await a.next_of("notification"))["data"]["message"] == "to one"
        assert await a.run("only_one") == "one"
        assert (await b.ask(EXECUTE, command="only_one"))["data"]["code"] == "unknown_command"
        assert await b.received() == []


async def test_server_closes_once_however_often_it_is_asked() -> None:
    manager = WebSocketManager()
    async with served(manager) as server, Raw.open(server) as client:
        port = server.port
        tasks = {server.close(), server.close()}
        assert len(tasks) == 1
        assert await client.closed() == (1012, "service restart")
        await asyncio.gather(server.close(), server.wait_closed(), *tasks)
        with pytest.raises(ConnectionRefusedError):
            await connect(f"ws://127.0.0.1:{port}/ws")


async def test_waiting_for_the_end_costs_no_turns_of_the_loop() -> None:
    async with served() as server:
        waiting = asyncio.create_task(server.wait_closed())
        assert await turns_in_a_while() < 50 and not waiting.done()
        server.close()
        await waiting


async def test_draining_server_starts_no_command_by_the_fast_lane_either() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    line = execute("echo hi", id=2)
    async with (
        served(manager, grace_s=20.0) as server,
        Raw.open(server) as client, Raw.open(server) as other, Sio.open(server, join="/") as session,
    ):  # fmt: skip
        for round in range(2):
            if round:
                keep_line(manager.commands, "echo hi")
            await other.send(line)
            assert (await other.final(2))["data"]["result"] == "hi"
            assert (await session.rpc(line))["data"]["result"] == "hi"
        await client.send(execute("gate a", id=1))
        await until(lambda: gate.begun)
        closing = server.close()
        await until(lambda: manager.is_draining)
        for answer in (await other.ask(EXECUTE, command="echo hi"), await session.rpc(line)):
            assert (answer["type"], answer["data"]["code"]) == ("error", "unavailable")
        assert (await other.ask("get_status"))["type"] == "status_update"
        gate.let("a")
        assert (await client.final(1))["data"]["result"] == "a"
        for each in (client, other, session):
            assert (await each.closed())[0] == 1012
        await closing


async def test_serve_runs_until_it_is_cancelled() -> None:
    manager = WebSocketManager()
    task = asyncio.create_task(serve(manager, port=0))
    await until(lambda: manager.loop is not None)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert manager.loop is None
    assert {service.state for service in manager.services.values()} == {"stopped"}


async def test_socket_that_never_asked_gives_way_to_a_new_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("karna.hub.PENDING_CONNECTIONS", 20)
    async with served(max_clients=10) as server:
        async with contextlib.AsyncExitStack() as stack:
            peers = [await stack.enter_async_context(dial(server.port)) for _ in range(30)]
            await until(lambda: len(server.manager.connections) == 30)
            for _ in range(5):
                assert (await ask(server.port, head("GET", "/health"))).status == 200
                assert len(server.manager.connections) <= 30
            assert await peers[0].at_end()
            await peers[-1].send(head("GET", "/health"))
            assert (await peers[-1].answer()).status == 200
        await until(lambda: not server.manager.connections)
        assert (await ask(server.port, head("GET", "/health"))).status == 200


async def test_shutdown_is_not_held_up_by_any_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("karna.server.SHUTDOWN_CLOSE_S", 0.3)
    manager = WebSocketManager()
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(served(manager, grace_s=0.1))
        port = server.port
        stuck = await stack.enter_async_context(lazy(port))
        stuck.writer.transport.pause_reading()
        ignoring = await stack.enter_async_context(raw(port))
        session = await stack.enter_async_context(engine(port))
        half = await stack.enter_async_context(dial(port))
        await half.send(upgrade()[:-2])
        silent = await stack.enter_async_context(dial(port))
        await until(lambda: len(manager.connections) == 5)
        for _ in range(200):
            manager.broadcast("tick", "x" * 20_000)
            await asyncio.sleep(0)
        began = time.monotonic()
        await server.close()
        assert time.monotonic() - began < 1.0
        for peer in (ignoring, session):
            while (received := await peer.frame()).opcode != 8:
                pass
            assert (received.code, received.reason) == (1012, "service restart")
        assert await silent.at_end()


async def test_request_that_has_arrived_at_the_end_is_still_answered() -> None:
    manager = WebSocketManager()
    async with serving(manager, port=0) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as peer:
            await until(lambda: manager.connections)
            peer.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await server.close()
            assert peer.recv(4096).startswith(b"HTTP/1.1 503 "), "draining"


async def test_shutdown_does_not_wait_for_who_has_asked_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("karna.server.SHUTDOWN_CLOSE_S", 1000.0)
    manager = WebSocketManager()
    async with (
        served(manager, close_timeout_s=1000.0) as server,
        dial(server.port) as silent, dial(server.port) as half,
    ):  # fmt: skip
        await half.send(upgrade()[:-2])
        await until(lambda: len(manager.connections) == 2)
        await server.close()
        assert await silent.at_end() and await half.at_end()


@needs_proc
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_stuck_readers_cost_bounded_memory_and_others_get_everything(loop: str) -> None:
    if loop == "uvloop":
        needs("uvloop")
    stuck_count, messages, size = 40, 160, 100_000  # unbounded, they would cost 640 MB
    options = ["--close-timeout", "1", "--history-bytes", "0", "--loop", loop]
    async with process(*options) as karna, contextlib.AsyncExitStack() as stack:
        port = karna.port
        stuck = []
        for number in range(stuck_count):
            peer = await stack.enter_async_context(lazy(port, "/ws" if number % 2 else ENGINE))
            if number % 2 == 0:
                await peer.frame()
                await peer.send(frame(1, b"40/ws,"))
                await peer.frame()
            peer.writer.transport.pause_reading()
            stuck.append(peer)
        readers = [await stack.enter_async_context(raw(port)) for _ in range(3)]
        readers += [await stack.enter_async_context(engine(port)) for _ in range(3)]
        before = resident_peak(karna.pid)
        began = time.monotonic()

        async def read_all(peer: Peer) -> None:
            for number in range(messages):
                payload = (await peer.frame()).payload
                assert b'"message":"%d ' % number in payload[:120]

        async def publish() -> None:
            for number in range(messages):
                message = {"message": f"{number} " + "x" * size}
                assert (await ask(port, post("/api/notify", message))).status == 202

        await asyncio.gather(publish(), *map(read_all, readers))
        grown = resident_peak(karna.pid) - before
        # Each may hold its limit, one joined write and what the allocator rounds up.
        assert grown < stuck_count * 1.6 * 1024 * 1024 + 20_000_000, f"{grown / 1e6:.0f} MB"
        found = await get_metrics(port)
        assert found["karna_dropped_total{reason=slow}"] == stuck_count
        while found["karna_sockets"] > len(readers) + 1:  # and the one that asks
            await asyncio.sleep(0.05)
            found = await get_metrics(port)
        assert time.monotonic() - began < 8
        assert found["karna_clients{door=raw}"] + found["karna_clients{door=socket.io}"] == 6
        assert found["karna_deliveries_total"] >= messages * 6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_idle_server_ends_at_once_on_a_signal(number: signal.Signals) -> None:
    async with process() as karna, raw(karna.port) as peer:
        began = time.monotonic()
        karna.stop(number)
        assert (await peer.closed()).code == 1012
        peer.writer.close()
        assert await karna.ended() == 0
        assert time.monotonic() - began < 1.0
        assert number.name in karna.log()


async def test_second_signal_ends_the_process_at_once() -> None:
    async with process("--grace", "30") as karna, raw(karna.port) as peer:
        await peer.send_json(execute("wait 60", 1))
        await peer.sync()
        karna.stop()
        while (await ask(karna.port, head("GET", "/health"))).status == 200:
            pass
        assert karna.is_running()
        karna.stop(signal.SIGINT)
        assert await karna.ended() == 128 + signal.SIGINT


async def test_second_signal_ends_programs_too() -> None:
    async with process("--grace", "30", "--allow-program", "sh") as karna, raw(karna.port) as peer:
        await peer.send_json(execute("sh -c 'trap : TERM; echo $$; while :; do sleep 1; done'", 1))
        while (report := await peer.json())["type"] != "command_progress":
            pass
        shell = int(report["data"]["progress"]["line"])
        karna.stop()
        while (await ask(karna.port, head("GET", "/health"))).status == 200:
            pass
        assert is_alive(shell)
        karna.stop()
        assert await karna.ended() == 128 + signal.SIGTERM
        while is_alive(shell):
            await asyncio.sleep(0.01)


async def test_commands_that_wait_use_the_grace_too() -> None:
    async with (
        process("--grace", "10", "--max-running-commands", "1") as karna,
        raw(karna.port) as peer,
    ):
        for id in range(4):
            await peer.send_json(execute("wait 0.1", id))
        await peer.sync()
        karna.stop()
        for id in range(4):
            answer = await peer.json()
            assert (answer["id"], answer["data"].get("result")) == (id, "waited")
        assert (await peer.closed()).code == 1012


async def test_command_that_refuses_to_be_cancelled_does_not_hold_up_the_end() -> None:
    async with (
        process("--grace", "0.1", "--close-timeout", "0.2") as karna,
        raw(karna.port) as peer,
    ):
        await peer.send_json(execute("stubborn", 1))
        await peer.sync()
        karna.stop()
        answer = await peer.json()
        assert (answer["id"], answer["type"]) == (1, "error")
        assert (await peer.closed()).code == 1012
        assert await karna.ended() == 0


@pytest.mark.parametrize("closed", ["0<&- 1>&- 2>&-", "1>&-", "2>&-", "2>/dev/full", "1>/dev/full",
                                    "1>/dev/full 2>/dev/full"])  # fmt: skip
async def test_server_goes_on_without_anywhere_to_write(closed: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = [
        sys.executable,
        str(SERVER_FILE),
        "--port",
        str(port),
        "--log-level",
        "debug",
    ]
    child = start_process(
        ["sh", "-c", f'exec "$0" "$@" {closed}', *arguments],
        env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        await until(lambda: child.poll() is not None or answers_on(port))
        for _ in range(3):
            assert (
                await ask(port, upgrade(headers={"Origin": "http://evil.example"}))
            ).status == 403
        async with raw(port) as peer, engine(port):
            await peer.send_json(execute("nonsense", 1))
            assert (await peer.json())["data"]["code"] == "unknown_command"
            await peer.send_json(execute("echo on", 2))
            assert (await peer.json())["data"]["result"] == "on"
            again = await asyncio.to_thread(
                subprocess.run, ["sh", "-c", f'exec "$0" "$@" {closed}', *arguments],
                env=ENVIRONMENT, capture_output=True,
            )  # fmt: skip
            assert again.returncode == 2  # in use, and nowhere to say so
            child.send_signal(signal.SIGTERM)
            assert (await peer.closed()).code == 1012
        await until(lambda: child.poll() is not None)
        assert child.returncode == 0
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_server_survives_the_lack_of_descriptors(loop: str) -> None:
    if loop == "uvloop":
        needs("uvloop")

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))

    async with process("--loop", loop, preexec_fn=few) as karna:
        async with raw(karna.port) as peer, contextlib.AsyncExitStack() as stack:
            for _ in range(60):  # the kernel completes them, whether they are accepted or not
                await stack.enter_async_context(dial(karna.port))
            for number in range(20):
                await peer.send_json(execute(f"echo {number}", number))
                assert (await peer.json())["id"] == number
                await asyncio.sleep(0.02)
            assert karna.is_running()
        # Accepting pauses for a second after each failure, or libuv resets who comes too early.
        while True:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                assert (await ask(karna.port, head("GET", "/health"))).status == 200
                break
        assert karna.is_running()
        assert len(karna.log().splitlines()) < 60
        karna.stop()
        assert await karna.ended() == 0


@needs_proc
async def test_flood_of_hostile_connections_leaves_the_log_short_and_the_server_well() -> None:
    async with process("--max-clients", "5") as karna:
        port = karna.port
        before = resident_peak(karna.pid)

        async def attack(number: int) -> None:
            kinds = [
                upgrade(headers={"Origin": f"http://e{number}.example"}),
                upgrade(headers={"Host": f"h{number}.example"}),
                upgrade() + frame(3),
                upgrade(ENGINE) + frame(1, b"x%d" % number),
                upgrade() + frame(1, b"\xff"),
                b"GARBAGE %d\r\n\r\n" % number,
                b"\x16\x03\x01" + b"x" * 200,
                head("GET", f"/nowhere/{number}"),
                post("/rpc", b"{" * 1000),
            ]
            with contextlib.suppress(ConnectionError):
                async with dial(port) as peer:
                    await peer.send(kinds[number % len(kinds)])
                    await peer.reader.read(100)

        for start in range(0, 1500, 50):
            await asyncio.gather(*(attack(number) for number in range(start, start + 50)))
        assert (await ask(port, head("GET", "/health"))).status == 200
        found = await get_metrics(port)
        assert found["karna_refused_total{reason=forbidden}"] >= 300
        assert len(karna.log().splitlines()) < 200  # of 500 refusals, in two windows at most
        assert resident_peak(karna.pid) - before < 30_000_000
        assert "Traceback" not in karna.log()


async def test_server_in_a_thread_leaves_signals_to_the_program() -> None:
    manager = WebSocketManager()
    before = signal.getsignal(signal.SIGTERM)

    async def run() -> None:
        running = asyncio.create_task(serve(manager, port=0))
        await until(lambda: manager.loop is not None)
        await settled(manager)
        assert not manager.is_draining and not running.done()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    await asyncio.to_thread(asyncio.run, run())
    assert manager.loop is None and signal.getsignal(signal.SIGTERM) is before


async def test_start_that_is_cancelled_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun = asyncio.Event()

    async def never(listener: Listener, reader: object) -> None:
        begun.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(Listener, "start_accepting", never)
    manager = WebSocketManager()
    starting = asyncio.create_task(serve(manager, port=0))
    await begun.wait()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert manager.loop is None and not manager.tasks.running
    monkeypatch.undo()
    async with served(manager) as server:
        assert (await ask(server.port, head("GET", "/health"))).status == 200


async def test_server_whose_sweep_dies_says_so_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(manager: WebSocketManager) -> None:
        raise LookupError("bug")

    monkeypatch.setattr(WebSocketManager, "sweep", broken)
    with error_log(expected=True) as errors:
        await serve(WebSocketManager(), port=0)
    assert "sweep ended" in errors.lines[0]


async def test_deadline_that_fails_ends_its_own_client_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 0.1 ping of both clients; that of the first one fails.
    heartbeat, failed = Connection.heartbeat, []

    def broken(connection: Connection, *args: Any) -> None:
        if not failed or failed == [connection]:
            failed[:] = [connection]
            raise LookupError("bug")
        heartbeat(connection, *args)

    monkeypatch.setattr(Connection, "heartbeat", broken)
    async with (
        served(ping_interval_s=0.1, logs_errors=True) as server,
        raw(server.port) as first, raw(server.port) as second,
    ):  # fmt: skip
        pings = await asyncio.gather(first.at_end(), second.at_end())
        assert sorted(pings) == [False, True], "one was cut, the other got its ping"


async def test_answer_that_waits_to_be_written_is_written_before_the_end() -> None:
    manager = WebSocketManager()
    async with served(manager) as server, dial(server.port) as peer:
        await peer.send(head("GET", "/health", {"Connection": None}))
        assert (await peer.answer()).status == 200
        [connection] = manager.connections
        connection.is_queueing = True  # as while what it has sent is handled
        connection.send_bytes(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nquick")
        assert not connection.is_dispensable, "nor does it give way to another"
        await server.close()
        assert (await peer.answer()).body == b"quick"
