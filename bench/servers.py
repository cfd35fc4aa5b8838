"""Starting and stopping Karna and its peers, each on its own core, and building what needs it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from probe import Door, Probe, WrongAnswer, check_answers

BENCH = Path(__file__).resolve().parent
PEERS = BENCH / "peers"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "karna-ws-bench"
NODE_PACKAGES = ("ws@8", "socket.io@4")
START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 5.0
MAX_CLIENTS = 20_000


class Skipped(Exception):
    """This server can't run here; the message says why."""


# ---- servers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """One row of the tables. `command(port)` may raise Skipped."""

    name: str
    title: str
    doors: tuple[Door, ...]
    command: Callable[[int], list[str]]
    works: tuple[str, ...] = ()  # the only ones to measure; empty for all of its doors
    folder: Path | None = None  # where it is started
    python_path: Path | None = None  # where it imports from
    is_karna: bool = False
    program: Server | None = None  # the same with the commands of commands.py


def python_peer(name: str) -> Callable[[int], list[str]]:
    return lambda port: [sys.executable, str(PEERS / f"{name}_server.py"), str(port)]


def node_peer(name: str) -> Callable[[int], list[str]]:
    return lambda port: ["node", str(node_home() / f"{name}.mjs"), str(port)]


def c_peer(port: int) -> list[str]:
    return [str(compiled(PEERS / "c_epoll.c")), str(port)]


def karna(loop: str, karna_ws: Path, *more: str) -> Callable[[int], list[str]]:
    def command(port: int) -> list[str]:
        if not karna_ws.exists():
            raise Skipped(f"{karna_ws} does not exist")
        options = ["--port", str(port), "--max-clients", str(MAX_CLIENTS), "--loop", loop]
        return [sys.executable, str(karna_ws), *options, *more]

    return command


def karna_module(port: int) -> list[str]:
    """The same as a module: Python keeps its bytecode, where it compiles a script each time."""
    return [sys.executable, "-m", "karna_ws", "--port", str(port), "--loop", "asyncio"]


def karna_program(loop: str, karna_ws: Path) -> Callable[[int], list[str]]:
    script = str(BENCH / "commands.py")
    if (karna_ws.parent / "karna").is_dir():
        return karna(loop, karna_ws, script)
    return lambda port: [sys.executable, script, "--port", str(port), "--loop", loop]


def karna_server(name: str, loop: str, karna_ws: Path) -> Server:
    """One copy of Karna on one event loop: alone, and with the commands of a program."""
    doors: tuple[Door, ...] = ("raw", "socket.io", "http")
    program = Server(
        f"{name}+commands",
        f"Karna WS, {loop}, bench/commands.py",
        doors,
        karna_program(loop, karna_ws),
        python_path=karna_ws.parent,
    )
    title, command = f"Karna WS, {loop}", karna(loop, karna_ws)
    return Server(name, title, doors, command, is_karna=True, program=program)


def servers_before(karna_ws: Path) -> list[Server]:
    """Another copy of Karna, to be compared with."""
    return [
        karna_server("before", "asyncio", karna_ws),
        karna_server("before-uvloop", "uvloop", karna_ws),
    ]


def all_servers(karna_ws: Path) -> list[Server]:
    raw: tuple[Door, ...] = ("raw",)
    return [
        karna_server("karna", "asyncio", karna_ws),
        karna_server("karna-uvloop", "uvloop", karna_ws),
        Server(
            "karna-module",
            "Karna WS, python -m karna_ws",
            raw,
            karna_module,
            works=("start", "resident"),
            folder=karna_ws.parent,
            is_karna=True,
        ),
        Server("fastapi", "FastAPI, uvicorn[standard]", ("raw", "http"), python_peer("fastapi")),
        Server("websockets", "websockets, as documented", raw, python_peer("websockets")),
        Server("aiohttp", "aiohttp", ("raw", "http"), python_peer("aiohttp")),
        Server("picows", "picows (Cython), uvloop", raw, python_peer("picows")),
        Server("socketify", "socketify (C++ core)", raw, python_peer("socketify")),
        Server("node-ws", "Node, ws", raw, node_peer("node_ws")),
        Server("c-epoll", "C epoll, fixed answers", raw, c_peer),
        Server("socketio", "python-socketio, uvicorn", ("socket.io",), python_peer("socketio")),
        Server("node-socketio", "Node, socket.io", ("socket.io",), node_peer("node_socketio")),
    ]


# ---- building ------------------------------------------------------------------------------------


def compiled(source: Path) -> Path:
    """Compile one C file into the cache, once for each content. Raises Skipped."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if not compiler:
        raise Skipped("no C compiler: install cc (gcc or clang)")
    CACHE.mkdir(parents=True, exist_ok=True)
    program = CACHE / f"{source.stem}-{hashlib.sha256(source.read_bytes()).hexdigest()[:12]}"
    if not program.exists():
        building = program.with_suffix(f".{os.getpid()}")
        result = run_quietly([compiler, "-O2", "-o", str(building), str(source)])
        if result.returncode:
            raise Skipped(f"{source.name} does not compile: {last_line(result.stderr)}")
        building.rename(program)
    return program


def node_home() -> Path:
    """Copy the Node peers beside their packages: Node looks for these next to the file it runs."""
    if not shutil.which("node") or not shutil.which("npm"):
        raise Skipped("node and npm are not installed")
    home = CACHE / "node"
    home.mkdir(parents=True, exist_ok=True)
    packages = [home / "node_modules" / package.split("@")[0] for package in NODE_PACKAGES]
    if not all(package.exists() for package in packages):
        install = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(home)]
        result = run_quietly([*install, *NODE_PACKAGES])
        if result.returncode:
            raise Skipped(f"npm install failed: {last_line(result.stderr)}")
    for script in PEERS.glob("*.mjs"):
        shutil.copy(script, home)
    return home


def run_quietly(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else "no message"


# ---- cores ---------------------------------------------------------------------------------------


def pick_cores() -> tuple[int | None, int | None]:
    """A core for the server and one for the load; None where there is but one or no pinning."""
    if not hasattr(os, "sched_getaffinity"):
        return None, None
    server, *others = sorted(os.sched_getaffinity(0))
    # A hyperthread shares its core: the load would slow the server down.
    free = [core for core in others if core not in siblings(server)] or others
    return (server, free[0]) if free else (None, None)


def siblings(core: int) -> set[int]:
    path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    found: set[int] = set()
    if path.exists():
        for part in path.read_text().strip().split(","):
            first, _, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    return found


@contextlib.contextmanager
def pinned(core: int | None) -> Iterator[None]:
    """Children started inside inherit the core from their first instruction on."""
    if core is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


# ---- processes -----------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class Process:
    """A started server that has answered once.

    `start_ms` is from its start to its first right answer. Raises Skipped when it ends before that.
    """

    def __init__(self, server: Server, core: int | None, port: int | None = None) -> None:
        self.server = server
        self.port = port or free_port()
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        command = server.command(self.port)
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(CACHE / "pycache")}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        if server.python_path is not None:
            environment["PYTHONPATH"] = str(server.python_path)
        began = time.perf_counter()
        with pinned(core):
            self.process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=self.errors, env=environment,
                cwd=server.folder,
            )  # fmt: skip
        try:
            self._wait_for_answer()
            self.start_ms = (time.perf_counter() - began) * 1000
            for door in server.doors:
                check_answers(self.port, door)
        except BaseException as error:
            self.stop()
            if isinstance(error, (WrongAnswer, OSError, ValueError, KeyError)):
                raise Skipped(f"it answers wrongly: {error!r}") from error
            raise

    @property
    def pid(self) -> int:
        return self.process.pid

    def is_running(self) -> bool:
        return self.process.poll() is None

    def resident_kib(self) -> int:
        """Resident memory, from /proc; 0 on systems without it."""
        status = Path(f"/proc/{self.pid}/status")
        if not status.exists():
            return 0
        return next(int(line.split()[1]) for line in status.open() if line.startswith("VmRSS"))

    def cpu_s(self) -> float:
        """Processor time used so far, all threads; 0 on systems that don't say."""
        stat = Path(f"/proc/{self.pid}/stat")
        if not stat.exists():
            return 0.0
        fields = stat.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def wait_until_idle(self, timeout_s: float = 3.0) -> None:
        """Wait until the work of the last load (its clients leaving) is done."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            before = self.cpu_s()
            time.sleep(0.05)
            if self.cpu_s() - before <= 0.01:
                return

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Ask it to end, insist after a while; returns its exit code."""
        if self.is_running():
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            self.errors.close()

    def complaint(self) -> str:
        self.errors.seek(0)
        return last_line(self.errors.read())

    def _wait_for_answer(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                with Probe(self.port, self.server.doors[0]) as probe:
                    probe.ask({"method": "get_status", "id": 10000000})
                    return
            except OSError:
                if not self.is_running():
                    raise Skipped(f"it ended at once: {self.complaint()}") from None
                time.sleep(0.001)
        raise Skipped(f"no answer within {START_TIMEOUT_S:.0f} s")
