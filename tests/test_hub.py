"""What all sockets share: counters and metrics."""

from __future__ import annotations

import json

from karna.metrics import LATENCY_BUCKETS_S
from karna_ws import WebSocketManager
from services import Service
from support import Gate, execute, served, until
from support_peers import (
    TOKEN,
    ask,
    engine,
    frame,
    get_metrics,
    in_fragments,
    lazy,
    raw,
    request,
    upgrade,
)


async def test_counters_only_grow_when_clients_are_dropped() -> None:
    manager = WebSocketManager()
    options = {"max_unsent_bytes": 50_000, "close_timeout_s": 0.1}
    async with (
        served(manager, **options) as server,
        lazy(server.port) as one, lazy(server.port) as other,
    ):  # fmt: skip
        one.writer.transport.pause_reading()
        other.writer.transport.pause_reading()
        before = (0, 0)
        while manager.raw:
            manager.broadcast("tick", "x" * 60_000)
            manager.flush_broadcasts()
            now = (manager.messages_out + manager.deliveries, manager.bytes_out)
            assert now[0] >= before[0] and now[1] >= before[1]
            before = now
        assert manager.messages_out >= 0


async def test_metrics_tell_what_happened() -> None:
    manager = WebSocketManager()
    Gate(manager)
    async with served(manager, token=TOKEN, max_clients=2) as server:
        port = server.port
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        async with raw(port, headers=bearer) as peer, engine(port, bearer) as session:
            before = await get_metrics(port, bearer)
            assert before["karna_clients{door=raw}"] == before["karna_clients{door=socket.io}"] == 1
            texts = [frame(1, json.dumps(execute("echo hi", n)).encode()) for n in range(5)]
            texts.append(frame(1, json.dumps(execute("nonsense", 6)).encode()))
            texts.append(frame(1, json.dumps(execute("gate g", 7)).encode()))
            texts.append(in_fragments(1, json.dumps(request("cancel", 8, id=7)).encode(), 2))
            await peer.send(b"".join(texts))
            received = [await peer.frame() for _ in range(8)]
            manager.notify("to both")
            received.append(await peer.frame())
            packet = (await session.frame()).payload
            for headers, reason in (({}, "unauthorized"), ({"Origin": "null"}, "forbidden"),
                                    ({"Host": "evil.example"}, "forbidden"),
                                    (bearer, "unavailable")):  # fmt: skip
                assert (await ask(port, upgrade(headers=headers))).error["code"] == reason
            after = await get_metrics(port, bearer)

        def grown(name: str) -> float:
            return after.get(name, 0) - before.get(name, 0)

        frames_out = sum(len(f.payload) + (2 if len(f.payload) < 126 else 4) for f in received)
        frames_out += len(packet) + (2 if len(packet) < 126 else 4)
        assert grown("karna_received_messages_total") == 8
        assert grown("karna_sent_messages_total") == 10
        assert grown("karna_sent_bytes_total") == frames_out
        assert grown("karna_broadcasts_total") == 1
        assert grown("karna_deliveries_total") == 2
        assert grown("karna_commands_total{result=ok}") == 5
        assert grown("karna_commands_total{result=cancelled}") == 1
        assert grown("karna_command_duration_seconds_count") == 1  # inline ones are not timed
        assert (
            after["karna_command_duration_seconds_bucket{le=+Inf}"]
            == after["karna_command_duration_seconds_count"]
        )
        assert grown("karna_refused_total{reason=unauthorized}") == 1
        assert grown("karna_refused_total{reason=forbidden}") == 2
        assert grown("karna_refused_total{reason=unavailable}") == 1
        assert after["karna_service_state{service=command,state=running}"] == 1
        assert 1e7 < after["karna_resident_memory_bytes"] < 1e9
        assert 0 <= after["karna_loop_lag_seconds"] < 5
        sizes = sum(map(len, texts))
        assert grown("karna_received_bytes_total") >= sizes
        await until(lambda: not manager.connections)
        assert (await get_metrics(port, bearer))["karna_clients{door=raw}"] == 0


async def test_metrics_labels_are_escaped() -> None:
    name = 'o"dd\\ na\nme'
    manager = WebSocketManager(services=[Service(name)])
    async with served(manager) as server:
        found = await get_metrics(server.port)
        assert any(key.startswith(f"karna_service_state{{service={name},") for key in found)
        buckets = [value for key, value in found.items() if "_bucket{" in key]
        assert buckets == sorted(buckets) and len(buckets) == len(LATENCY_BUCKETS_S) + 1
