"""The server as a process of its own, and what can be seen of one from outside."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from support import ROOT, SERVER_FILE, until
from support_peers import TOKEN, ask, head


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


def resident_peak(pid: int) -> int:
    """The most bytes that a process has had resident."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) * 1024


class Karna:
    """A server in a process of its own."""

    def __init__(self, child: subprocess.Popen[bytes], log_path: Path) -> None:
        self.child = child
        self.pid = child.pid
        self.log_path = log_path
        self.port = 0

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def is_running(self) -> bool:
        return self.child.poll() is None

    def stop(self, number: int = signal.SIGTERM) -> None:
        self.child.send_signal(number)

    async def ended(self) -> int:
        """The exit code, once there is one."""
        await until(lambda: self.child.poll() is not None)
        return self.child.returncode


ENVIRONMENT = {
    **{
        key: value for key, value in os.environ.items() if not key.startswith(("KARNA_", "LISTEN_"))
    },
    "PYTHONPATH": str(ROOT),
    "PYTHONDONTWRITEBYTECODE": "1",
}


# Commands that a test needs beyond the built-in ones, and which limits the child has.
CHILD = """
import asyncio, sys
import karna.work, karna_ws
from karna import command_line
karna.work.CANCEL_WAIT_S = 0.5
make_manager = command_line.make_manager

def make(arguments, kind):
    manager = make_manager(arguments, kind)

    @manager.commands.command
    async def wait(seconds: float) -> str:
        "Wait."
        await asyncio.sleep(seconds)
        return "waited"

    @manager.commands.command
    async def stubborn() -> None:
        "Refuse to be cancelled."
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                pass
    return manager

command_line.make_manager = make
sys.exit(karna_ws.main(sys.argv[1:]))
"""


def start_process(arguments: list[str], **options: Any) -> subprocess.Popen[Any]:
    return subprocess.Popen(arguments, **options)  # starting one blocks, but not for long


@contextlib.asynccontextmanager
async def process(
    *flags: str, port: int | None = 0, environment: dict[str, str] | None = None,
    script: tuple[str, ...] = ("-c", CHILD), **options: Any,
) -> AsyncIterator[Karna]:  # fmt: skip
    """A server as a subprocess, once it listens; killed at the end if it still runs."""
    directory = Path(os.environ.get("TMPDIR", "/tmp")) / f"karna-test-{os.getpid()}"
    directory.mkdir(exist_ok=True)
    log_path = directory / f"{time.monotonic_ns()}.log"
    if port == 0:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
    where = [] if port is None else ["--port", str(port)]
    with log_path.open("wb") as log:
        child = start_process(
            [sys.executable, *script, *where, *flags],
            **{"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "cwd": ROOT,
               "env": {**ENVIRONMENT, **(environment or {})}, **options},
        )  # fmt: skip
    karna = Karna(child, log_path)
    try:
        if port is not None:
            karna.port = port
            await until(lambda: not karna.is_running() or answers_on(port))
            token = flags[flags.index("--token") + 1] if "--token" in flags else ""
            status = head("GET", "/api/status", {"Authorization": f"Bearer {token}"})
            while karna.is_running() and b'"starting"' in (await ask(port, status)).body:
                pass  # its services' states are broadcast until they have started
        yield karna
    finally:
        if karna.is_running():
            child.kill()
        child.wait()
        shutil.rmtree(directory, ignore_errors=True)


def answers_on(port: int | str) -> bool:
    with socket.socket(socket.AF_UNIX if isinstance(port, str) else socket.AF_INET) as probe:
        return probe.connect_ex(port if isinstance(port, str) else ("127.0.0.1", port)) == 0


AUTH = ["--token", TOKEN]


def run_to_end(
    *flags: str, environment: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SERVER_FILE), *flags],
        **{"capture_output": True, "text": True, "timeout": 20, "stdin": subprocess.DEVNULL,
           "env": {**ENVIRONMENT, **(environment or {})}, **options},
    )  # fmt: skip


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
