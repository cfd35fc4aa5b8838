"""How many broadcasts go through Redis, at what cost, and how much later they arrive.

    python bench/backplane.py [always|everysec|no]      # appendfsync of the Redis it starts

Two nodes share a Redis on this machine; one publishes with 200 `publish()` calls waiting, raw
clients of it count what arrives, the other node only reads along. Needs redis-server and the redis
and uvloop packages.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import redis
from websockets.asyncio.client import connect

NODE = """
import asyncio, sys, karna_ws
from karna.command_line import new_event_loop
manager = karna_ws.WebSocketManager()

@manager.commands.command
async def flood(count: int, width: int, text: str) -> int:
    async def lane(numbers):
        for _ in numbers:
            await manager.publish("notification", {"message": text, "level": "info"})
    numbers = iter(range(count))
    await asyncio.gather(*(lane(numbers) for _ in range(width)))
    return count

backplane = sys.argv[1] or None
async def main():
    async with karna_ws.serving(manager, port=0, backplane=backplane) as server:
        print(server.port, flush=True)
        await server.wait_closed()
runner = asyncio.Runner(loop_factory=lambda: new_event_loop("auto"))
runner.run(main())
"""
TEXT = "x" * 60
ROOT = Path(__file__).resolve().parent.parent
STREAM = "karna:broadcasts"


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Sink(asyncio.Protocol):
    """A raw client that only counts."""

    def __init__(self, target: int) -> None:
        self.target, self.count, self.tail = target, 0, b""
        self.done: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        key = "dGhlIHNhbXBsZSBub25jZQ=="
        transport.write(
            f"GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )

    def data_received(self, data: bytes) -> None:
        data = self.tail + data
        self.count += data.count(b'"notification"')
        self.tail = data[-13:]  # shorter than what is counted
        if self.count >= self.target and not self.done.done():
            self.done.set_result(time.perf_counter())

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(RuntimeError("cut"))


async def throughput(
    port: int, pids: list[int], clients: int, count: int, width: int
) -> tuple[float, list[float]]:
    """Broadcasts a second, and the share of a core that each process took."""
    loop = asyncio.get_running_loop()
    sinks = [
        (await loop.create_connection(lambda: Sink(count), "127.0.0.1", port))[1]
        for _ in range(clients)
    ]
    before = [cpu_s(pid) for pid in pids]
    body = json.dumps({"command": f"flood {count} {width} {TEXT}"})
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    began = time.perf_counter()
    writer.write(
        f"POST /api/execute_command HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        f"Content-Type: application/json\r\n\r\n{body}".encode()
    )
    ended = max(await asyncio.gather(*(sink.done for sink in sinks)))
    writer.close()
    wall = ended - began
    shares = [(cpu_s(pid) - b) / wall for pid, b in zip(pids, before, strict=True)]
    for sink in sinks:
        sink.transport.close()
    await asyncio.sleep(0.2)
    return count / wall, shares


async def latency(port: int, samples: int) -> list[float]:
    """Seconds from sending `notify` to the notification; the client is alone."""
    found = []
    async with connect(f"ws://127.0.0.1:{port}/ws") as ws:
        request = json.dumps({"method": "execute_command", "params": {"command": "notify x"}})
        for _ in range(samples):
            began = time.perf_counter()
            await ws.send(request)
            got = 0
            for _ in range(2):  # the answer and the notification, in whichever order
                if '"notification"' in await ws.recv():
                    got = time.perf_counter()
            found.append(got - began)
            await asyncio.sleep(0.002)
    return found


async def best_latency(port: int) -> list[float]:
    rounds = [await latency(port, 300) for _ in range(8)]
    return min(rounds, key=statistics.median)


@contextlib.asynccontextmanager
async def node(url: str) -> AsyncIterator[tuple[int, int]]:
    """A node that runs while the block does: its pid and port."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", NODE, url, stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    try:
        assert process.stdout is not None
        yield process.pid, int(await process.stdout.readline())
    finally:
        process.kill()
        await process.wait()


@contextlib.contextmanager
def redis_server(mode: str) -> Iterator[tuple[int, redis.Redis]]:
    """A Redis that runs while the block does: its pid and a client."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/redis.sock"
        keep = ["--appendonly", "no" if mode == "no" else "yes"]
        keep += [] if mode == "no" else ["--appendfsync", mode]
        process = subprocess.Popen(
            ["redis-server", "--port", "0", "--unixsocket", path, "--save", "", *keep,
             "--dir", folder, "--loglevel", "warning"],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            client = redis.Redis(unix_socket_path=path)
            until = time.monotonic() + 10
            while time.monotonic() < until:
                with contextlib.suppress(redis.ConnectionError):
                    client.ping()
                    break
                time.sleep(0.01)
            yield process.pid, client
        finally:
            process.kill()
            process.wait()


async def measure(pid: int, client: redis.Redis) -> None:
    """Print one line for each load, and the latencies."""
    path = client.connection_pool.connection_kwargs["path"]
    url = f"unix://{path}"
    async with node(url) as (own_pid, port):
        shared = await best_latency(port)
        async with node(url) as (other_pid, _):
            for clients, count in ((1, 20_000), (100, 10_000)):
                pids = [pid, own_pid, other_pid]
                runs = [await throughput(port, pids, clients, count, 200) for _ in range(5)]
                rate, shares = max(runs)
                redis_us, own_us, other_us = (share / rate * 1e6 for share in shares)
                print(
                    f"{clients:4} clients: {rate:7,.0f} broadcasts/s through Redis; "
                    f"CPU a broadcast: "
                    f"Redis {redis_us:.0f} us, this node {own_us:.0f}, the other {other_us:.0f}"
                )
    entries = client.xlen(STREAM)
    size = client.memory_usage(STREAM, samples=0)
    newest = client.xrevrange(STREAM, count=1)[0][1][b"body"]
    print(f"{size / entries:.0f} bytes of Redis an entry of {len(newest)} bytes, {entries} kept")
    async with node("") as (_, port):
        alone = await best_latency(port)
        for clients, count in ((1, 20_000), (100, 10_000)):
            rates = [(await throughput(port, [], clients, count, 200))[0] for _ in range(3)]
            print(f"{clients:4} clients: {max(rates):7,.0f} broadcasts/s in one process")
    for name, found in (("through Redis", shared), ("in one process", alone)):
        found.sort()
        median, p99 = statistics.median(found), found[len(found) * 99 // 100]
        print(f"latency {name}: median {median * 1e6:.0f} us, p99 {p99 * 1e6:.0f} us")


if __name__ == "__main__":
    mode = sys.argv[1] if len(sys.argv) > 1 else "everysec"
    with redis_server(mode) as (pid, client):
        print(f"appendfsync {mode}")
        asyncio.run(measure(pid, client))
