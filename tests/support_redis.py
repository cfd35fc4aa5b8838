"""A real redis-server that can be killed, hung and emptied; nodes and clients that follow them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect

from karna.backplane import STREAM
from support import SERVER_FILE, needs


class RedisServer:
    """A redis-server on a Unix socket that keeps what it accepted, whatever ends it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.options: tuple[str, ...] = ()
        self.path = folder / "redis.sock"
        self.url = f"unix://{self.path}"
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it, and wait until it serves."""
        persistence = ["--save", "", "--appendonly", "yes", "--appendfsync", "always"]
        where = ["--port", "0", "--unixsocket", self.path, "--dir", self.folder]
        self.process = subprocess.Popen(
            ["redis-server", *where, *persistence, *self.options],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if "ready to accept connections" in line.lower():
                return
        pytest.fail("redis-server did not start")

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """End it as a power cut would."""
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.process = None

    def call(self, *words: str | bytes | int) -> Any:
        """One command; what it answers. The event loop stands still meanwhile, by intent."""
        import redis

        with redis.Redis(unix_socket_path=str(self.path), protocol=2) as client:
            return client.execute_command(*words)

    def add(self, **fields: str | bytes) -> str:
        """Put an entry into the stream as a foreign program would; its id."""
        words = [word for item in fields.items() for word in item]
        return str(self.call("XADD", STREAM, "*", *words).decode())

    def add_message(self, message: str) -> str:
        """Put a broadcast into the stream as a node would; its id."""
        return self.add(body=json.dumps({"type": "notification", "data": {"message": message}}))


@contextlib.contextmanager
def redis_on_port(*options: str, tls: bool = False, sentinel_of: int = 0) -> Iterator[int]:
    """A redis-server on a TCP port; sentinel_of: a Sentinel that watches the one on that port."""
    needs("redis-server", "redis")
    with tempfile.TemporaryDirectory(prefix="karna-redis-") as folder:
        port = free_port()
        while port > 55_000:  # nodes of a cluster take another one, 10,000 above
            port = free_port()
        words = ["redis-server"]
        if sentinel_of:
            config = Path(folder, "sentinel.conf")
            config.write_text(
                f"sentinel monitor karna 127.0.0.1 {sentinel_of} 1\n"
                "sentinel down-after-milliseconds karna 300\n"
                "sentinel failover-timeout karna 2000\n"
            )
            words += [str(config), "--sentinel"]
        where = ["--port", "0", "--tls-port", str(port)] if tls else ["--port", str(port)]
        words += [*where, "--dir", folder, *options]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        drain = threading.Thread(target=process.stdout.read)
        try:
            ready = ("ready to accept connections", "+monitor master")
            assert any(any(r in line.lower() for r in ready) for line in process.stdout)
            drain.start()
            yield port
        finally:
            process.kill()
            process.wait()
            if drain.ident:
                drain.join()
            process.stdout.close()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def call_redis(port: int, *words: str | int) -> Any:
    """One command to the Redis on that port."""
    import redis

    with redis.Redis(port=port, protocol=2) as client:
        return client.execute_command(*words)


class Node:
    """A server in a process of its own: `python karna_ws.py --port 0 ...`."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.port = port


@contextlib.asynccontextmanager
async def node(
    backplane: str, *flags: str, port: int = 0, log: int = asyncio.subprocess.DEVNULL
) -> AsyncIterator[Any]:
    """Run a node; at the end it must stop as it should."""
    arguments = ["--port", str(port), "--backplane", backplane, *flags]
    process = await asyncio.create_subprocess_exec(
        sys.executable, SERVER_FILE, *arguments, stdout=asyncio.subprocess.PIPE, stderr=log
    )
    try:
        assert process.stdout is not None
        while not (line := await process.stdout.readline()).strip().startswith(b"raw"):
            assert line, "it ended"
        yield Node(process, int(line.rpartition(b":")[2].partition(b"/")[0]))
        if process.returncode is None:
            process.terminate()
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


class Follower:
    """A client of either door that keeps every broadcast and can come back."""

    def __init__(self, door: str, **options: Any) -> None:
        self.door = door
        self.options = {"max_queue": None, **options}
        self.connection: ClientConnection | None = None
        self.seen: list[dict[str, Any]] = []  # all envelopes but answers to requests
        self.answer: dict[str, Any] = {}  # to the Socket.IO CONNECT
        self.offset: str | None = None

    async def follow(self, server: Any) -> None:
        """Connect, or come back with what was seen last; to whichever node."""
        if self.door == "raw":
            query = f"?since={self.offset}" if self.offset else ""
            url = f"ws://127.0.0.1:{server.port}/ws{query}"
            self.connection = await connect(url, **self.options)
            if not query:  # where a quiet stream stands
                await self.connection.send('{"method": "get_status"}')
                self.offset = (await self.next())["offset"]
                self.seen.clear()
            return
        url = f"ws://127.0.0.1:{server.port}/socket.io/?EIO=4&transport=websocket"
        self.connection = await connect(url, **self.options)
        auth = {"pid": self.answer["pid"], "offset": self.offset} if self.answer else {}
        await self.connection.send("40" + json.dumps({k: v for k, v in auth.items() if v}))
        self.answer = {}
        while not self.answer:
            await self.next()

    async def next(self) -> dict[str, Any]:
        """The next envelope; for Socket.IO the CONNECT answer counts as one."""
        assert self.connection is not None
        frame = str(await self.connection.recv())
        if self.door == "raw":
            envelope: dict[str, Any] = json.loads(frame)
            self.offset = envelope.get("offset", self.offset)
        elif frame.startswith("42"):
            _, envelope, *offset = json.loads(frame[2:])
            self.offset = offset[0] if offset else self.offset
        elif frame.startswith("40"):
            self.answer = json.loads(frame[2:])
            return self.answer
        else:
            assert frame[0] == "0", frame
            return {}
        self.seen.append(envelope)
        return envelope

    async def until(self, message: str) -> list[str]:
        """Read up to that notification; all notifications since the beginning."""
        if message not in self.messages:
            await self.until_type("notification", message=message)
        return self.messages

    async def until_type(self, type: str, **data: Any) -> dict[str, Any]:
        """Read up to an envelope of that type with (at least) that data; itself."""
        while True:
            envelope = await self.next()
            if envelope.get("type") == type and data.items() <= envelope["data"].items():
                return envelope

    @property
    def messages(self) -> list[str]:
        """The notifications seen; "GAP" where one was told."""
        found = []
        for envelope in self.seen:
            if envelope["type"] == "notification":
                found.append(envelope["data"]["message"])
            elif envelope["type"] == "error":
                assert envelope["data"]["code"] == "history_gap", envelope
                found.append("GAP")
        return found

    @property
    def offsets(self) -> list[str]:
        return [each["offset"] for each in self.seen if each["type"] == "notification"]

    async def leave(self) -> None:
        if self.connection is not None:
            await self.connection.close()
            self.connection = None


@contextlib.asynccontextmanager
async def following(*pairs: tuple[Any, str], **options: Any) -> AsyncIterator[list[Follower]]:
    """Clients of (server, door), in that order; options are those of `connect`."""
    followers = [Follower(door, **options) for _, door in pairs]
    try:
        for follower, (server, _) in zip(followers, pairs, strict=True):
            await follower.follow(server)
        yield followers
    finally:
        for follower in followers:
            await follower.leave()


async def say(server: Any, message: str) -> None:
    """Publish a notification; it is accepted when this returns."""
    await server.manager.publish("notification", {"message": message})


def both_doors(*servers: Any) -> list[tuple[Any, str]]:
    return [(server, door) for server in servers for door in ("raw", "socket.io")]
