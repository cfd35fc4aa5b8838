"""What is measured: the works, how a server is put through one, and the goals for Karna.

A work yields one number for a server and round, with the load's whole report kept beside it.
"""

from __future__ import annotations

import contextlib
import json
import resource
import shlex
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from probe import Door
from servers import BENCH, Process, Server, Skipped, compiled, last_line, pick_cores, pinned

Sample = dict[str, Any]  # {"value": the number, ...the load's report}

LOAD_TIMEOUT_S = 120.0
IDLE_CLIENTS = 2_000
BROADCAST_CLIENTS = 1_000


class LoadFailed(Exception):
    """A wrong, missing or doubled answer, or a lost connection; the message says which."""


# ---- bench ---------------------------------------------------------------------------------------


@dataclass
class Bench:
    """The started servers, the load program, and the cores they are pinned to."""

    seconds: float = 1.0
    warmup_s: float = 0.3
    processes: dict[str, Process] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.server_core, self.load_core = pick_cores()
        self.load_program = compiled(BENCH / "load.c")

    def process(self, server: Server) -> Process:
        """The running process of this server, started when it is not. Raises Skipped."""
        found = self.processes.get(server.name)
        if found is None or not found.is_running():
            found = self.processes[server.name] = Process(server, self.server_core)
        return found

    @contextlib.contextmanager
    def fresh_process(self, server: Server) -> Iterator[Process]:
        process = Process(server, self.server_core)
        try:
            yield process
        finally:
            process.stop()

    def load(self, process: Process, door: Door, *options: str) -> Sample:
        """Run the load against a server and return its report. Raises LoadFailed."""
        report = self._run(process, door, *options)
        process.wait_until_idle()
        return report

    def load_all(
        self, process: Process, parts: Mapping[str, tuple[Door, str]]
    ) -> dict[str, Sample]:
        """Run several loads at once; their reports by name. Raises LoadFailed."""
        with ThreadPoolExecutor(len(parts)) as pool:
            runs = {
                name: pool.submit(self._run, process, door, *options.split())
                for name, (door, options) in parts.items()
            }
        process.wait_until_idle()
        return {name: run.result() for name, run in runs.items()}

    def _run(self, process: Process, door: Door, *options: str) -> Sample:
        with pinned(self.load_core):
            result = subprocess.run(
                self._load_command(process, door, *options),
                capture_output=True, text=True, timeout=LOAD_TIMEOUT_S, check=False,
            )  # fmt: skip
        if result.returncode:
            raise LoadFailed(last_line(result.stderr))
        report: Sample = json.loads(result.stdout)
        if "--clients" in options and not report["requests"]:
            raise LoadFailed("not one answer in the measured time")
        return report

    @contextlib.contextmanager
    def idle_clients(self, process: Process, door: Door, count: int) -> Iterator[None]:
        """Keep `count` clients connected for the time of the block."""
        command = self._load_command(process, door, "--listeners", str(count), "--hold", "1")
        pipe = subprocess.PIPE
        with (
            pinned(self.load_core),
            subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as load,
        ):
            assert load.stdin and load.stdout and load.stderr
            if not load.stdout.readline():
                raise LoadFailed(last_line(load.stderr.read()))
            try:
                yield
            finally:
                load.stdin.close()

    def stop(self) -> None:
        for process in self.processes.values():
            process.stop()

    def _load_command(self, process: Process, door: Door, *options: str) -> list[str]:
        fixed = {
            "--port": process.port,
            "--pid": process.pid,
            "--socketio": int(door == "socket.io"),
            "--http": int(door == "http"),
            "--milliseconds": int(self.seconds * 1000),
            "--warmup-ms": int(self.warmup_s * 1000),
        }
        words = [str(word) for pair in fixed.items() for word in pair]
        return [str(self.load_program), *words, *options]


def most_clients() -> int:
    """How many clients one process may hold here, by its limit of descriptors."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 100


# ---- works ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    name: str
    title: str
    unit: str
    door: Door
    better: Literal["more", "less"]
    measure: Callable[[Bench, Server], Sample]
    rounds: int = 99  # at most; the slow ones need fewer
    karna_only: bool = False
    needs_program: bool = False  # the commands of commands.py


def measure_load(bench: Bench, server: Server, door: Door, unit: str, options: str) -> Sample:
    """One run of the load; the value is the figure of its report that `unit` names."""
    report = bench.load(bench.process(server), door, *shlex.split(options))
    return {"value": report[unit.replace("/", "_per_")], **report}


def load_work(name: str, title: str, door: Door, unit: str, options: str) -> Work:
    def measure(bench: Bench, server: Server) -> Sample:
        return measure_load(bench, server, door, unit, options)

    return Work(name, title, unit, door, "more", measure)


def rpc_work(name: str, title: str, door: Door, inflight: int, line: str = "") -> Work:
    """Requests that all differ, or the same line again and again."""
    title = f"{title}, 64 clients, {inflight} in flight"
    options = f"--clients 64 --inflight {inflight}"
    return load_work(
        name, title, door, "requests/s", f"{options} --line '{line}'" if line else options
    )


def command_work(name: str, title: str, command: str, inflight: int) -> Work:
    """Commands of commands.py: two numbers that differ each time, and their sum."""
    options = f"--clients 64 --inflight {inflight} --answer '\"result\":20000000}}'"
    options += f" --line '{command} 10000000 10000000'"

    def measure(bench: Bench, server: Server) -> Sample:
        assert server.program
        return measure_load(bench, server.program, "raw", "requests/s", options)

    title = f"{title}, 64 clients, {inflight} in flight"
    return Work(
        name, title, "requests/s", "raw", "more", measure, karna_only=True, needs_program=True
    )


# Each part is a load of its own.
MIX: dict[str, tuple[Door, str]] = {
    "raw": ("raw", "--clients 32 --inflight 4"),
    "socket.io": ("socket.io", "--clients 32 --inflight 4"),
    "post": ("http", "--clients 16"),
    "broadcast": ("raw", "--listeners 200 --publish-every-us 20000"),
}


def measure_mix(bench: Bench, server: Server) -> Sample:
    """All doors at once: the value is the sum of their requests, with the p99 of each."""
    reports = bench.load_all(bench.process(server), MIX)
    latency = {
        name: report.get("latency_us") or report["flush_us"] for name, report in reports.items()
    }
    return {
        "value": sum(report["requests_per_s"] for report in reports.values()),
        "columns": {f"{name} p99 us": each["p99"] for name, each in latency.items()},
        **reports,
    }


def broadcast_work(name: str, title: str, door: Door, inflight: int) -> Work:
    title = f"{title}, {'one at a time' if inflight == 1 else f'{inflight} in flight'}"
    options = f"--listeners {BROADCAST_CLIENTS} --publish {inflight}"
    return load_work(name, title, door, "deliveries/s", options)


def handshake_work(name: str, title: str, door: Door) -> Work:
    return load_work(name, title, door, "handshakes/s", "--handshakes 500 --inflight 64")


def memory_work(name: str, title: str, door: Door) -> Work:
    def measure(bench: Bench, server: Server) -> Sample:
        with bench.fresh_process(server) as process:
            before = process.resident_kib()
            with bench.idle_clients(process, door, IDLE_CLIENTS):
                process.wait_until_idle()
                grown = process.resident_kib() - before
        return {"value": grown / IDLE_CLIENTS, "before_kib": before, "grown_kib": grown}

    return Work(name, title, "KiB", door, "less", measure, rounds=3)


def measure_start(bench: Bench, server: Server) -> Sample:
    with bench.fresh_process(server) as process:
        return {"value": process.start_ms}


def measure_resident(bench: Bench, server: Server) -> Sample:
    with bench.fresh_process(server) as process:
        return {"value": process.resident_kib() / 1024}


def start_work(
    name: str, title: str, unit: str, measure: Callable[[Bench, Server], Sample]
) -> Work:
    return Work(name, title, unit, "raw", "less", measure, rounds=5)


def measure_calm(bench: Bench, server: Server) -> Sample:
    """p99 of get_status, one each millisecond: alone, then under broadcasts and slow commands.

    The value is the busy p99 in parts of what is allowed: two idle p99 and one broadcast flush.
    """
    process = bench.process(server)
    status = ["--clients", "1", "--every-us", "1000", "--status", "1"]
    status += ["--listeners", str(BROADCAST_CLIENTS)]
    idle = bench.load(process, "raw", *status)
    busy = bench.load(process, "raw", *status, "--publish-every-us", "20000", "--slow", "8")
    idle_p99, busy_p99 = idle["latency_us"]["p99"], busy["latency_us"]["p99"]
    allowed = 2 * idle_p99 + busy["flush_us"]["p50"]
    return {
        "value": busy_p99 / allowed,
        "idle_p99_us": idle_p99,
        "busy_p99_us": busy_p99,
        "one_flush_us": busy["flush_us"]["p50"],
        "idle": idle,
        "busy": busy,
    }


WORKS = [
    # Lines that all differ.
    rpc_work("rpc1", "raw RPC", "raw", 1),
    rpc_work("rpc16", "raw RPC", "raw", 16),
    rpc_work("sio1", "Socket.IO rpc with ack", "socket.io", 1),
    rpc_work("sio16", "Socket.IO rpc with ack", "socket.io", 16),
    rpc_work("post1", "POST, kept alive", "http", 1),
    rpc_work("post16", "POST, kept alive and pipelined", "http", 16),
    # The same line again and again.
    rpc_work("same1", "raw RPC, one line", "raw", 1, "echo hello"),
    rpc_work("same16", "raw RPC, one line", "raw", 16, "echo hello"),
    # One's own commands.
    command_work("typed1", "two integers, inline", "add", 1),
    command_work("typed16", "two integers, inline", "add", 16),
    command_work("async0", "two integers, a coroutine that never waits", "add0", 16),
    command_work("async1", "two integers, a coroutine that waits once", "add1", 16),
    command_work("thread", "two integers, in a thread", "add_in_thread", 16),
    Work("mix", "all doors at once, 50 broadcasts a second", "requests/s", "raw", "more",
         measure_mix, karna_only=True),
    broadcast_work("cast1", "broadcast to 1,000 raw clients", "raw", 1),
    broadcast_work("cast8", "broadcast to 1,000 raw clients", "raw", 8),
    broadcast_work("siocast1", "broadcast to 1,000 Socket.IO clients", "socket.io", 1),
    broadcast_work("siocast8", "broadcast to 1,000 Socket.IO clients", "socket.io", 8),
    load_work("sessions", "connect, one request, close; 64 at a time", "raw", "sessions/s",
              "--clients 64 --sessions 1"),
    handshake_work("handshakes", "opening handshakes, raw door", "raw"),
    handshake_work("siohandshakes", "opening handshakes, Socket.IO door", "socket.io"),
    memory_work("memory", "memory of an idle client, 2,000 raw clients", "raw"),
    memory_work("siomemory", "memory of an idle client, 2,000 Socket.IO clients", "socket.io"),
    start_work("start", "start to first answer", "ms", measure_start),
    start_work("resident", "resident memory at the first answer", "MiB", measure_resident),
    Work("calm", "p99 of get_status while 1,000 clients hear broadcasts, of what is allowed",
         "x", "raw", "less", measure_calm, karna_only=True),
]  # fmt: skip
QUICK_WORKS = "rpc1,rpc16,sio16,post1,same16,cast1,cast8,sessions"
QUICK_SERVERS = "karna,karna-uvloop,fastapi,websockets,picows,socketify,c-epoll,socketio"


# ---- summaries and goals -------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """The rounds of one server in one work."""

    median: float
    low: float
    high: float
    rounds: int


def summarise(samples: list[Sample]) -> Summary:
    values = [sample["value"] for sample in samples]
    return Summary(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True)
class Goal:
    """Karna's median is to reach `bound`: in parts of the peer's, or of its own in another work."""

    work: str
    bound: float
    peer: str = ""
    base: str = ""


GOALS = [
    # Lines that all differ.
    Goal("rpc16", 10, "fastapi"),
    Goal("rpc16", 3, "picows"),
    Goal("rpc16", 2, "socketify"),
    Goal("rpc1", 5, "fastapi"),
    Goal("rpc1", 1.05, "picows"),
    Goal("sio16", 20, "socketio"),
    Goal("sio16", 2, "node-socketio"),
    Goal("post1", 5, "fastapi"),
    Goal("post16", 5, "fastapi"),
    Goal("async0", 0.8, base="typed16"),
    Goal("async1", 0.5, base="typed16"),
    Goal("sessions", 1.1, "picows"),
    Goal("handshakes", 3, "fastapi"),
    Goal("handshakes", 1.4, "websockets"),
    Goal("start", 1.1, "websockets"),
    Goal("resident", 1.15, "websockets"),
    # The same line again and again.
    Goal("same16", 10, "fastapi"),
    Goal("same16", 3, "picows"),
    Goal("same16", 2, "socketify"),
    Goal("same1", 1, "picows"),
    Goal("cast1", 5, "fastapi"),
    Goal("cast1", 0.8, "c-epoll"),
    Goal("cast8", 30, "fastapi"),
    Goal("cast8", 1, "socketify"),
    Goal("memory", 9),
    Goal("siomemory", 12),
    Goal("calm", 1),
]


def find_skips(bench: Bench, servers: list[Server]) -> dict[str, str]:
    """Start every server once; those that can't run here, by name, with the reason."""
    skipped: dict[str, str] = {}
    for server in servers:
        try:
            bench.process(server)
        except Skipped as reason:
            skipped[server.name] = str(reason)
    return skipped
