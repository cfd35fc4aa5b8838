"""Karna's MCP door beside the SDK's own server: `python bench/assistants.py` (see bench/README.md).

The same two tools, each server on one core and the load on another. Plain HTTP is as fast as a
client can be; the SDK's own client is what hosts use, and is the slower side of both. Needs `mcp`.
Ends with 1 when a server did not answer rightly.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import NamedTuple

from servers import BENCH, PEERS, free_port, pick_cores, pinned

MODERN = "2026-07-28"
ACCEPT = "application/json, text/event-stream"
CLIENT = "io.modelcontextprotocol/clientInfo"
META = {
    "io.modelcontextprotocol/protocolVersion": MODERN,
    "io.modelcontextprotocol/clientCapabilities": {},
    CLIENT: {"name": "bench", "version": "1"},
}
PARAMS = {"name": "add", "arguments": {"a": 20, "b": 22}}
STARTS = 7

SERVERS: dict[str, tuple[str, list[str]]] = {
    "karna": ("Karna WS, asyncio", ["mcp_karna.py"]),
    "karna-uvloop": ("Karna WS, uvloop", ["mcp_karna.py", "uvloop"]),
    "sdk": ("the SDK's server, as documented", ["mcp_server.py"]),
    "sdk-json": ("the SDK's server, JSON, no sessions", ["mcp_server.py", "json"]),
}
ROOTS = {"karna": ["websockets", "orjson"], "sdk": ["mcp"]}


class Rate(NamedTuple):
    """How a load went; the processor time of the server says it whatever else the machine does."""

    calls_s: float
    p50_ms: float
    p99_ms: float
    calls: int
    cpu_us: float = 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description="Karna's MCP door beside the SDK's own server.")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one measurement (3)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of every work (3)")
    parser.add_argument("--only", default=",".join(SERVERS), help="servers, by comma")
    options = parser.parse_args()
    names = options.only.split(",")
    server_core, load_core = pick_cores()
    if load_core is not None:
        os.sched_setaffinity(0, {load_core})
    rows = {name: {"server": SERVERS[name][0]} for name in names}
    running = {}
    for name in names:
        running[name], rows[name]["start ms"] = start_often(name, server_core)
        rows[name]["resident MiB"] = f"{resident_mib(running[name][0].pid):.0f}"
    try:
        measure(options, rows, running)
        for name in names:
            rows[name]["after load MiB"] = f"{resident_mib(running[name][0].pid):.0f}"
            root = ROOTS[name.partition("-")[0]]
            rows[name]["installed MiB"] = f"{installed_mib(root):.1f}"
    finally:
        for process, _ in running.values():
            stop(process)
    print_table([*rows.values()])
    return 0


def measure(
    options: argparse.Namespace, rows: dict[str, dict[str, str]], running: dict[str, Running]
) -> None:
    """All works; in rounds, so that a busy moment of the machine falls on all servers."""
    for label, make in WORKS.items():
        found: dict[str, list[Rate]] = {name: [] for name in running}
        for _ in range(options.rounds):
            for name, (process, port) in running.items():
                before = cpu_s(process.pid)
                went = asyncio.run(make(port, options.seconds))
                cpu_us = (cpu_s(process.pid) - before) / went.calls * 1e6
                found[name].append(went._replace(cpu_us=cpu_us))
        for name, rates in found.items():
            best = max(rates)
            rows[name][f"{label}: calls/s"] = f"{best.calls_s:,.0f}"
            rows[name][f"{label}: p50, p99 ms"] = f"{best.p50_ms:.2f}, {best.p99_ms:.2f}"
            rows[name][f"{label}: server us a call"] = f"{min(r.cpu_us for r in rates):,.0f}"
        print(label, {name: max(rates) for name, rates in found.items()}, flush=True)


# ---- servers -------------------------------------------------------------------------------------

Running = tuple[subprocess.Popen[bytes], int]  # and its port


def start_often(name: str, core: int | None) -> tuple[Running, str]:
    """A server that runs; the shortest time to start, in milliseconds."""
    starts = []
    for number in range(STARTS):
        process, port, start_ms = start(SERVERS[name][1], core)
        starts.append(start_ms)
        if number < STARTS - 1:
            stop(process)
    return (process, port), f"{min(starts):,.0f}"


def start(arguments: list[str], core: int | None) -> tuple[subprocess.Popen[bytes], int, float]:
    """Start a server; it, its port, and the milliseconds to its first right answer."""
    port = free_port()
    command = [sys.executable, str(PEERS / arguments[0]), str(port), *arguments[1:]]
    began = time.perf_counter()
    with pinned(core):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=BENCH)
    while time.perf_counter() - began < 20:
        try:
            asyncio.run(http_load(port, 1, 0.0))
            return process, port, (time.perf_counter() - began) * 1000
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(0.002)
    raise SystemExit(f"assistants.py: {arguments} did not answer")


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def cpu_s(pid: int) -> float:
    """Processor time used so far, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mib(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) / 1024


def installed_mib(roots: list[str]) -> float:
    """What pip installs for these packages, all that they need included."""
    seen: set[str] = set()
    waiting = list(roots)
    size = 0
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another system
        if name in seen:
            continue
        seen.add(name)
        files = [Path(str(package.locate_file(file))) for file in package.files or ()]
        kept = [file for file in files if file.suffix != ".pyc" and file.exists()]
        size += sum(file.stat().st_size for file in kept)
        for needed in package.requires or ():
            if "extra ==" not in needed:
                waiting.append(re.split(r"[ ;<>=!~\[(]", needed, maxsplit=1)[0])
    if "websockets" in roots:
        ours = [BENCH.parent / "karna_ws.py", BENCH.parent / "services.py"]
        ours += (BENCH.parent / "karna").glob("*.py")
        size += sum(file.stat().st_size for file in ours)
    return size / 2**20


# ---- plain HTTP ----------------------------------------------------------------------------------


def open_session(port: int) -> str:
    """Initialize in the legacy era; the session's id, where there is one."""
    params = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": META[CLIENT]}
    body = {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": params}
    headers = {"Content-Type": "application/json", "Accept": ACCEPT}
    url, data = f"http://127.0.0.1:{port}/mcp", json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as answer:
        session: str = answer.headers.get("Mcp-Session-Id") or ""
    body = {"jsonrpc": "2.0", "method": "notifications/initialized"}
    headers |= {"Mcp-Session-Id": session} if session else {}
    data = json.dumps(body).encode()
    urllib.request.urlopen(urllib.request.Request(url, data, headers)).close()
    return session


def request(port: int, session: str | None, id: int) -> bytes:
    """One tools/call as bytes: of the modern era, or of the legacy one in a session."""
    version = MODERN if session is None else None
    params = PARAMS if version is None else {**PARAMS, "_meta": META}
    body = json.dumps({"jsonrpc": "2.0", "id": id, "method": "tools/call", "params": params})
    headers = {
        "Host": f"127.0.0.1:{port}", "Content-Type": "application/json",
        "Accept": ACCEPT, "Content-Length": str(len(body)),
    }  # fmt: skip
    if version is None:
        headers["MCP-Protocol-Version"] = "2025-11-25"
        headers |= {"Mcp-Session-Id": session} if session else {}
    else:
        mirrored = {"MCP-Protocol-Version": version, "Mcp-Method": "tools/call", "Mcp-Name": "add"}
        headers |= mirrored
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST /mcp HTTP/1.1\r\n{head}\r\n{body}".encode()


class Caller(asyncio.Protocol):
    """One connection with one call in flight."""

    def __init__(self, sent: bytes, until: float, took: list[float], done: Done) -> None:
        self.sent, self.until, self.took, self.done = sent, until, took, done
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self._send()

    def _send(self) -> None:
        self.began = time.perf_counter()
        self.transport.write(self.sent)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if not self._is_whole():
            return
        if b'"text":"42"' not in self.buffer.replace(b": ", b":"):
            raise SystemExit(f"assistants.py: a wrong answer: {self.buffer!r}")
        self.buffer = b""
        now = time.perf_counter()
        self.took.append(now - self.began)
        if now < self.until:
            self._send()
        else:
            self.transport.close()
            self.done.count(-1)

    def _is_whole(self) -> bool:
        head, end, body = self.buffer.partition(b"\r\n\r\n")
        if not end:
            return False
        match = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        if match:
            return len(body) >= int(match[1])
        return body.endswith(b"0\r\n\r\n")  # chunked

    def connection_lost(self, error: Exception | None) -> None:
        if self.buffer or time.perf_counter() < self.until:
            self.done.fail(error or ConnectionResetError("closed"))


class Done:
    """Told when every caller has ended."""

    def __init__(self, callers: int) -> None:
        self.callers = callers
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def count(self, change: int) -> None:
        self.callers += change
        if not self.callers and not self.future.done():
            self.future.set_result(None)

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


async def http_load(port: int, clients: int, seconds: float, session: str | None = None) -> Rate:
    """Calls by keep-alive connections, each with one in flight. Raises OSError."""
    loop, took, done = asyncio.get_running_loop(), [], Done(clients)
    began = time.perf_counter()
    for id in range(clients):  # an SDK's session takes one call of an id at a time
        caller = Caller(request(port, session, id), began + seconds, took, done)
        await loop.create_connection(lambda caller=caller: caller, "127.0.0.1", port)
    await done.future
    return rate(took, time.perf_counter() - began)


def rate(took: list[float], seconds: float) -> Rate:
    took.sort()
    p99 = took[min(len(took) - 1, len(took) * 99 // 100)]
    return Rate(len(took) / seconds, took[len(took) // 2] * 1000, p99 * 1000, len(took))


# ---- the SDK's client ----------------------------------------------------------------------------


async def sdk_load(port: int, tasks: int, seconds: float) -> Rate:
    """Calls by one client of the SDK, so many at a time."""
    from mcp import Client

    took: list[float] = []
    async with Client(f"http://127.0.0.1:{port}/mcp", mode=MODERN) as client:
        await client.list_tools()
        began = time.perf_counter()

        async def call() -> None:
            while time.perf_counter() < began + seconds:
                start = time.perf_counter()
                result = await client.call_tool("add", PARAMS["arguments"])
                assert result.content[0].text == "42"
                took.append(time.perf_counter() - start)

        await asyncio.gather(*(call() for _ in range(tasks)))
        return rate(took, time.perf_counter() - began)


Run = Callable[[int, float], Coroutine[None, None, Rate]]
WORKS: dict[str, Run] = {
    "HTTP, 1 client": lambda port, s: http_load(port, 1, s),
    "HTTP, 64 clients": lambda port, s: http_load(port, 64, s),
    "HTTP, 64 legacy clients": lambda port, s: http_load(port, 64, s, open_session(port)),
    "SDK client, 1 at a time": lambda port, s: sdk_load(port, 1, s),
    "SDK client, 16 at a time": lambda port, s: sdk_load(port, 16, s),
}


def print_table(rows: list[dict[str, str]]) -> None:
    """Works as rows, servers as columns: for a README."""
    print("\n| |" + "|".join(f" {row['server']} " for row in rows) + "|")
    print("| --- |" + " ---: |" * len(rows))
    for label in rows[0]:
        if label != "server":
            print(f"| {label} |" + "|".join(f" {row[label]} " for row in rows) + "|")


if __name__ == "__main__":
    sys.exit(main())
