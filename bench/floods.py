"""Clients that send as fast as the server takes it, each kind what is cheap to send and dear to do.

    python bench/floods.py --port 8000 --seconds 5 --sockets 30 unknown interpret

runs these floods at once, each on that many connections, and prints how many units of each the
server took. fairness.py and soak.py run it as a process of its own, so that its work does not
delay who measures. A flood never ends by itself: cut by the server, it connects again.

Sections: wire, what is sent, floods, main.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import itertools
import json
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from probe import KEY, PATHS, Door

CHUNK_BYTES = 128 * 1024  # written at once: two reads of the server
READ_BYTES = 1 << 20
PAUSE_S = 0.05  # before it connects again

# ---- wire ----------------------------------------------------------------------------------------

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Count = Callable[[int], None]  # told of units that left for the server


def frame(text: str) -> bytes:
    """One masked text frame; a mask of zeros is as valid as any, and costs no work."""
    payload = text.encode()
    size = len(payload)
    if size < 126:
        head = bytes([0x81, 0x80 | size])
    elif size < 65536:
        head = b"\x81\xfe" + size.to_bytes(2, "big")
    else:
        head = b"\x81\xff" + size.to_bytes(8, "big")
    return head + b"\0\0\0\0" + payload


def upgrade(door: Door) -> bytes:
    return (
        f"GET {PATHS[door]} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\nSec-WebSocket-Key: {KEY}\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ).encode()


def http_post(path: str, body: str) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


@contextlib.asynccontextmanager
async def connected(port: int, door: Door) -> AsyncIterator[Streams]:
    """A connection that may send at once. Raises OSError or EOFError when it is refused."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=READ_BYTES)
    try:
        if door != "http":
            writer.write(upgrade(door))
            await reader.readuntil(b"\r\n\r\n")
        yield reader, writer
    finally:
        writer.transport.abort()


async def read_all(reader: asyncio.StreamReader) -> None:
    """Take whatever comes, until the server ends the connection."""
    while await reader.read(READ_BYTES):
        pass


# ---- what is sent --------------------------------------------------------------------------------

dice = random.Random(1)
ids = itertools.count(1)


def request(line: str) -> str:
    message = {"method": "execute_command", "params": {"command": line}, "id": next(ids)}
    return json.dumps(message)


def word(length: int) -> str:
    return "".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=length))


def unknown() -> bytes:
    return frame(request(word(385)))


def interpret() -> bytes:
    return frame(request("interpret " + " ".join(word(9) for _ in range(100))))


def batch() -> bytes:
    """As many calls as Karna takes at a time, 384 bytes each."""
    calls = [CALL | {"params": [word(318)]} for _ in range(256)]
    return frame(json.dumps(calls, separators=(",", ":")))


CALL = {"jsonrpc": "2.0", "method": "execute_command", "id": 1}


def quotes() -> bytes:
    room = (1 << 20) - len(request("echo "))
    return frame(request("echo " + "'' " * (room // 3)))


def rejoin() -> bytes:
    return frame("40/ws,") + frame("41/ws,")


def notify() -> bytes:
    return frame(request("notify " + word(100)))


def post() -> bytes:
    return http_post(PATHS["http"], json.dumps({"command": word(385)}))


def big_echo() -> bytes:
    return frame(request("echo " + "y" * 20_000))


def ping() -> bytes:
    return b"\x89\x80\0\0\0\0"


def shred() -> bytes:
    """A message in fragments of nothing."""
    return b"\x01\x80\0\0\0\0" + b"\0\x80\0\0\0\0" * 1000 + b"\x80\x80\0\0\0\0"


EMPTY_LISTS = "[" + "[]," * 349_000 + "[]]"  # nearly 1 MiB; each costs an object


def lists() -> bytes:
    return frame(EMPTY_LISTS)


def attached() -> bytes:
    """A namespace is joined, an event with an attachment sent there, and the namespace left."""
    event = f'451-/ws,["nobody",{EMPTY_LISTS}]'
    return frame("40/ws,") + frame(event) + b"\x82\x80\0\0\0\0" + frame("41/ws,")


TRAILERS = "a\r\n" * 80_000


def trailers() -> bytes:
    """An empty body, and what may follow it."""
    head = "GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    return f"{head}0\r\n{TRAILERS}\r\n".encode()


@functools.cache
def chunk_of(make: Callable[[], bytes]) -> tuple[bytes, int]:
    """As many different units as are written at once, one at least, and how many they are."""
    units = [make()]
    while sum(map(len, units)) < CHUNK_BYTES:
        units.append(make())
    return b"".join(units), len(units)


# ---- floods --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flood:
    """`run` floods on one connection until the server ends it, or for ever."""

    name: str
    title: str
    run: Callable[[int, Count], Awaitable[None]]


def pump(name: str, title: str, make: Callable[[], bytes], door: Door = "raw") -> Flood:
    """Units without a pause, and all answers are read."""

    async def run(port: int, count: Count) -> None:
        chunk, units = chunk_of(make)
        async with connected(port, door) as (reader, writer):
            reading = asyncio.create_task(read_all(reader))
            try:
                while not reading.done():
                    writer.write(chunk)
                    await writer.drain()
                    count(units)
            finally:
                reading.cancel()

    return Flood(name, title, run)


async def run_deaf(port: int, count: Count) -> None:
    chunk, units = chunk_of(big_echo)
    async with connected(port, "raw") as (_, writer):
        while not writer.is_closing():
            writer.write(chunk)
            await writer.drain()
            count(units)


async def run_late(port: int, count: Count) -> None:
    """A packet that ends the session, and pings behind it while that is closed."""
    async with connected(port, "socket.io") as (reader, writer):
        reading = asyncio.create_task(read_all(reader))
        try:
            writer.write(frame("9"))
            while not reading.done():
                writer.write(ping() * 20_000)
                await writer.drain()
                count(20_000)
        finally:
            reading.cancel()


async def run_queue(port: int, count: Count) -> None:
    """Commands that wait for others to end, and then begin all at once."""
    async with connected(port, "raw") as (reader, writer):
        reading = asyncio.create_task(read_all(reader))
        try:
            while not reading.done():
                writer.write(b"".join(frame(request("countdown 0.05")) for _ in range(32)))
                writer.write(b"".join(interpret() for _ in range(250)))
                await writer.drain()
                count(250)
                await asyncio.sleep(0.1)
        finally:
            reading.cancel()


async def run_half(port: int, count: Count) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(50):
            _, writer = await stack.enter_async_context(connected(port, "http"))
            writer.write(upgrade("raw")[:60])
            count(1)
        await asyncio.sleep(1.0)


async def run_program(port: int, count: Count) -> None:
    async with connected(port, "raw") as (reader, writer):
        writer.write(frame(request("yes ''")))
        count(1)
        await read_all(reader)


async def run_bursts(port: int, count: Count) -> None:
    async with connected(port, "raw") as (reader, writer):
        reading = asyncio.create_task(read_all(reader))
        try:
            while not reading.done():
                writer.write(b"".join(notify() for _ in range(20)))
                await writer.drain()
                count(20)
                await asyncio.sleep(1.0)
        finally:
            reading.cancel()


FLOODS = {
    flood.name: flood
    for flood in (
        pump("unknown", "unknown commands of 385 bytes, pipelined", unknown),
        pump("interpret", "`interpret` of 1,000 characters, pipelined", interpret),
        pump("batch", "JSON-RPC batches of 96 KiB of unknown commands", batch),
        pump("quotes", "a line of 1 MiB, all of its words empty", quotes),
        pump("post", "POST of unknown commands, pipelined", post, "http"),
        pump("rejoin", "CONNECT and DISCONNECT of a namespace, pipelined", rejoin, "socket.io"),
        pump("notify", "`notify`, pipelined", notify),
        pump("ping", "pings, pipelined", ping),
        pump("shred", "messages in 1,000 fragments without a byte", shred),
        pump("lists", "messages of 1 MiB, all of it empty lists", lists),
        pump("attached", "events of 1 MiB with an attachment", attached, "socket.io"),
        pump("trailers", "GET with 80,000 trailers", trailers, "http"),
        Flood("late", "pings behind what ends the session", run_late),
        Flood("queue", "250 `interpret` that wait for 32 commands to end", run_queue),
        Flood("deaf", "answers of 20 KB that are never read", run_deaf),
        Flood("half", "handshakes that are never finished", run_half),
        Flood("program", "`yes ''`: a program that prints as fast as it can", run_program),
        Flood("bursts", "20 notifications at once, each second", run_bursts),
    )
}


async def keep_on(flood: Flood, port: int, taken: Counter[str]) -> None:
    def count(units: int) -> None:
        taken[flood.name] += units

    while True:
        with contextlib.suppress(OSError, EOFError):
            await flood.run(port, count)
        await asyncio.sleep(PAUSE_S)


# ---- main ----------------------------------------------------------------------------------------


async def flood_all(
    floods: list[Flood], port: int, sockets: int, seconds: float | None
) -> Counter[str]:
    """Run each flood on so many connections; how many units of it the server took.

    Without a time it runs until the standard input ends.
    """
    taken: Counter[str] = Counter()
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(keep_on(flood, port, taken))
            for flood in floods
            for _ in range(sockets)
        ]
        await (input_ended() if seconds is None else asyncio.sleep(seconds))
        for task in tasks:
            task.cancel()
    return taken


async def input_ended() -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin, ended.set)
    await ended.wait()


def command(floods: list[str], port: int, sockets: int) -> list[str]:
    """How to run these floods as a process of its own, until its input ends."""
    return [sys.executable, __file__, "--port", str(port), "--sockets", str(sockets), *floods]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--seconds", type=float, help="default: until the standard input ends")
    parser.add_argument("--sockets", type=int, default=1, help="connections of each flood")
    parser.add_argument("floods", nargs="+", choices=FLOODS, metavar="FLOOD", help=" ".join(FLOODS))
    options = parser.parse_args()
    floods = [FLOODS[name] for name in options.floods]
    taken = asyncio.run(flood_all(floods, options.port, options.sockets, options.seconds))
    print(json.dumps(taken))


if __name__ == "__main__":
    main()
