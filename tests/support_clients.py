"""Programs as clients: Node, npm, a browser; a network that can be cut; a server with a page to see."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import urllib.request
import zlib
from base64 import b64encode
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self

from websockets.asyncio.client import ClientConnection

from karna_ws import WebSocketManager
from services import CommandProcessor, Service
from support import DEADLINE_S, ROOT, needs


EXAMPLES = ROOT / "examples"
FRONTEND = EXAMPLES / "frontend"


# What only the tests need from npm, beside the packages of examples/frontend.
NODE_TOOLS = {
    "axe-core": "4.14.1",
    "playwright-core": "1.65.1",
    "socket.io-client-2": "npm:socket.io-client@2.5.0",
    "ws": "8.23.0",
}


# A 3x2 PNG.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAMAAAACCAIAAAASFvFNAAAAEElEQVR4nGP4z8AARAwQCgAf7gP9i18U1AAAAABJRU5E"
    "rkJggg=="
)


def run_npm(folder: Path, *arguments: str) -> None:
    done = subprocess.run(
        ["npm", *arguments], check=False, cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


class Program:
    """A subprocess whose lines are events; those of Node programs are JSON: {"event", "data"}."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.seen: list[tuple[str, Any]] = []

    async def wait_for(self, event: str) -> Any:
        """The data of the next such event. Fails with all that was said, if it does not come."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                while True:
                    name, data = await self._next_event()
                    if name == event:
                        return data
        except (TimeoutError, EOFError) as error:
            raise AssertionError(f"no {event!r} ({error!r}); seen: {self.seen}") from None

    async def _next_event(self) -> tuple[str, Any]:
        assert self.process.stdout is not None
        line = (await self.process.stdout.readline()).decode()
        if not line:
            raise EOFError("the program ended")
        try:
            message = json.loads(line)
            event = (message["event"], message.get("data"))
        except (ValueError, TypeError, KeyError):
            event = ("line", line.rstrip("\n"))
        self.seen.append(event)
        return event

    async def wait_for_line(self, text: str) -> str:
        """The next plain line that contains the text."""
        while text not in (line := await self.wait_for("line")):
            pass
        return str(line)

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n".encode())

    def all(self, event: str) -> list[Any]:
        return [data for name, data in self.seen if name == event]

    async def ends(self, code: int = 0) -> None:
        """Read what is left until it exits by itself, with this code."""
        with contextlib.suppress(EOFError):
            async with asyncio.timeout(DEADLINE_S):
                while True:
                    await self._next_event()
        async with asyncio.timeout(DEADLINE_S):
            assert await self.process.wait() == code, self.seen


@contextlib.asynccontextmanager
async def running(
    *command: str | Path, cwd: Path | None = None, **environment: str
) -> AsyncIterator[Program]:
    """Run a program, its errors among its lines; killed with its children at the end."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=cwd,
        env=os.environ | environment,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        limit=1 << 20,
        start_new_session=True,
    )
    try:
        yield Program(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


# What every Node program starts with. `told(word)` waits for Program.tell(word).
NODE_PRELUDE = """
import readline from 'node:readline';
const say = (event, data) => console.log(JSON.stringify({ event, data }));
const url = process.argv[1];
const input = readline.createInterface({ input: process.stdin });
const words = [];
input.on('line', (line) => words.push(line));
const told = async (word) => {
  while (!words.includes(word)) await new Promise((resolve) => input.once('line', resolve));
};
const finish = () => input.close();
"""


SOCKET_IO = """
import { io } from 'socket.io-client';
const connectTo = (address, options) => {
  const socket = io(address, { transports: ['websocket'], reconnectionDelay: 20, ...options });
  socket.on('connect', () => {
    say('connect', { id: socket.id, recovered: socket.recovered === true });
  });
  socket.on('disconnect', (reason) => say('disconnect', reason));
  socket.on('connect_error', ({ message, data }) => {
    say('connect_error', { message, data, active: socket.active });
  });
  socket.on('rpc_response', (response) => say(response.type, response));
  return socket;
};
const run = (command, params) => ({ method: 'execute_command', params: { command, ...params } });
"""


@contextlib.asynccontextmanager
async def frontend_node(
    node_dir: Path, script: str, *arguments: str | Path
) -> AsyncIterator[Program]:
    """Run an ES module given as text; `node_dir` is where its imports come from."""
    text = NODE_PRELUDE + script
    command = ["node", "--input-type=module", "--eval", text, "--", *arguments]
    async with running(*command, cwd=node_dir) as program:
        yield program


async def notify(port: int, message: str) -> None:
    """Broadcast a notification as a shell script would, over HTTP."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/notify",
        data=json.dumps({"message": message}).encode(),
        headers={"Content-Type": "application/json"},
    )
    await asyncio.to_thread(lambda: urllib.request.urlopen(request, timeout=DEADLINE_S).close())


class Wire:
    """A TCP proxy to the server that can be cut, mended and frozen."""

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.port = 0
        self._is_cut = False
        self._frozen: set[asyncio.StreamWriter] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._carried = 0
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cut()
        self._listener.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Abort every connection, and every new one, until it is mended."""
        self._is_cut = True
        for writer in self._writers:
            writer.transport.abort()

    def mend(self) -> None:
        self._is_cut = False

    def freeze(self) -> None:
        """Swallow what passes over the connections of now, and keep them open: a dead peer."""
        self._frozen |= self._writers

    @property
    def connections_made(self) -> int:
        """To the server, since the beginning."""
        return len(self._writers) // 2

    async def carries(self, count: int) -> None:
        """Wait until exactly so many connections are open."""
        async with asyncio.timeout(DEADLINE_S), self._changed:
            await self._changed.wait_for(lambda: self._carried == count)

    async def _carry(self, change: int) -> None:
        async with self._changed:
            self._carried += change
            self._changed.notify_all()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self._is_cut:
            writer.transport.abort()
            return
        try:
            back_reader, back_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, back_writer}
        await self._carry(1)
        pumps = [self._pump(reader, back_writer), self._pump(back_reader, writer)]
        await asyncio.gather(*pumps)
        await self._carry(-1)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                if sink not in self._frozen:
                    sink.write(data)
        if sink not in self._frozen:
            sink.close()


def ws_url(port: int, host: str = "localhost") -> str:
    return f"ws://{host}:{port}/ws"


async def wait_for_notification(program: Program, message: str) -> None:
    while (await program.wait_for("notification"))["data"]["message"] != message:
        pass


CHROMIUM = """
import { chromium } from 'playwright-core';
const browser = await chromium.launch({
  executablePath: process.argv[2],
  args: ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
    '--disable-background-networking', '--disable-component-update', '--disable-sync'],
});
const page = await browser.newPage();
page.setDefaultTimeout(10_000);
page.on('console', (m) => say('console', { type: m.type(), text: m.text() }));
page.on('pageerror', (error) => say('pageerror', String(error)));
"""


def chromium_path() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    needs("chromium")
    raise AssertionError("unreachable")


def complaints(program: Program) -> list[Any]:
    """Console errors, warnings and uncaught exceptions, but for one line that is no fault.

    StrictMode mounts, unmounts and mounts again: the first WebSocket is closed before it is open,
    which Chromium remarks on.
    """
    remarks = [line for line in program.all("console") if line["type"] in ("error", "warning")]
    known = "WebSocket is closed before the connection is established"
    return [line for line in remarks if known not in line["text"]] + program.all("pageerror")


class Host:
    """A manager with commands whose steps the test decides, and a service it can break."""

    def __init__(self, make: type[WebSocketManager] = WebSocketManager) -> None:
        self.go_on = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.lock = Service("lock")
        self.commands = CommandProcessor()
        for function in (self.steps, self.tokens, self.lines, self.report, self.picture):
            self.commands.command(function)
        self.manager = make(commands=self.commands, services=[self.lock])

    async def steps(self) -> AsyncIterator[Any]:
        """Report a part, then wait."""
        try:
            yield {"percent": 40, "done": 2}
            await self.go_on.wait()
            yield {"percent": 100}
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise

    async def tokens(self) -> AsyncIterator[Any]:
        """Answer word by word."""
        for token in ("The ", "quick ", "fox"):
            yield {"token": token}
        yield {"text": "The quick fox"}

    async def lines(self) -> AsyncIterator[Any]:
        """Give many lines."""
        for number in range(600):
            yield {"line": f"line {number}"}
        yield {"exit": 0}

    def report(self) -> Any:
        """Give a nested value."""
        return {"title": "<b>bold</b>", "list": list(range(450)), "empty": None, "deep": {"x": [1]}}

    def picture(self) -> str:
        """Give an image."""
        return as_url(make_png(4, 3))


def make_png(width: int, height: int, *, noise: bool = False) -> bytes:
    """An RGB image, grey or of noise that no compression makes small."""
    row = 3 * width
    rows = (b"\0" + (random.randbytes(row) if noise else b"\x80" * row) for _ in range(height))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(b"".join(rows), 1)), (b"IEND", b"")]
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def as_url(image: bytes) -> str:
    return "data:image/png;base64," + b64encode(image).decode()


async def rpc(ws: ClientConnection, method: str, params: dict[str, Any], wanted: str) -> Any:
    """Send a request; give the data of the next message of the wanted type."""
    await ws.send(json.dumps({"method": method, "params": params, "id": 1}))
    return await data_of(ws, wanted)


async def data_of(ws: ClientConnection, wanted: str, test: Any = None) -> Any:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            message = json.loads(await ws.recv())
            assert message["type"] == wanted or message["type"] != "error", message
            if message["type"] == wanted and (test is None or test(message["data"])):
                return message["data"]


def copy_server(folder: Path, *more: str) -> None:
    """Put into the folder what one copies to have the server, and `more` of the project."""
    for name in ("karna_ws.py", "services.py", "karna", *more):
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder)


@contextlib.asynccontextmanager
async def program(*words: str, ready: str, **options: Any) -> AsyncIterator[re.Match[str]]:
    """Run a program until a line of its output matches `ready`; stop it at the end."""
    process = await asyncio.create_subprocess_exec(
        *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, **options
    )
    assert process.stdout
    seen = []
    try:
        async with asyncio.timeout(DEADLINE_S):
            async for line in process.stdout:
                seen.append(line.decode())
                if match := re.search(ready, seen[-1]):
                    break
            else:
                raise AssertionError(f"{words[0]} ended: {''.join(seen)}")
        yield match
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.communicate()
