"""What others see while something floods the server: `python bench/witness.py --port 8000`.

One client of the raw door asks `echo`, and a monitor opens a connection for each GET /health, each
as soon as the last answer has come and PAUSE_S have gone by. Prints one JSON object: median, p99
and worst latency of both in ms; who gets no answer in time counts as TIMEOUT_S and as failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from floods import frame, upgrade

PAUSE_S = 0.005
TIMEOUT_S = 10.0
CONNECTION_S = 10.0  # a new one before the server's ping has to be answered
HEALTH = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"


@dataclass
class Record:
    seconds: list[float] = field(default_factory=list)
    failed: int = 0

    def summary(self) -> dict[str, float]:
        taken = sorted(self.seconds) or [TIMEOUT_S]
        figures = {
            "median_ms": statistics.median(taken),
            "p99_ms": taken[len(taken) * 99 // 100],
            "worst_ms": taken[-1],
        }
        rounded = {name: round(value * 1000, 3) for name, value in figures.items()}
        return {**rounded, "asked": len(self.seconds), "failed": self.failed}


def connect(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def read_until(connection: socket.socket, wanted: bytes) -> None:
    """Read until these bytes have come. Raises OSError at the end of the stream or too late."""
    deadline, kept = time.monotonic() + TIMEOUT_S, b""
    while wanted not in kept:
        received = connection.recv(1 << 20)
        if not received or time.monotonic() > deadline:
            raise ConnectionError("no answer")
        # Broadcasts by the megabyte may come before it: only its beginning is worth keeping.
        kept = kept[-len(wanted) :] + received


@contextlib.contextmanager
def timed(record: Record) -> Iterator[None]:
    began = time.monotonic()
    yield
    record.seconds.append(time.monotonic() - began)
    time.sleep(PAUSE_S)


def watch_raw(port: int, record: Record, until: float) -> None:
    """Ask on one connection for a while. Raises OSError when there is no answer."""
    until = min(until, time.monotonic() + CONNECTION_S)
    with contextlib.closing(connect(port)) as connection:
        connection.sendall(upgrade("raw"))
        read_until(connection, b"\r\n\r\n")
        while time.monotonic() < until:
            number = 10_000_000 + len(record.seconds)
            line = f"echo w{number}"
            request = {"method": "execute_command", "params": {"command": line}, "id": number}
            with timed(record):
                connection.sendall(frame(json.dumps(request)))
                read_until(connection, f'"id":{number}}}'.encode())


def watch_health(port: int, record: Record, until: float) -> None:
    """One GET; connecting is a part of it. Raises OSError when the answer is another one."""
    with timed(record), contextlib.closing(connect(port)) as connection:
        connection.sendall(HEALTH)
        read_until(connection, b'{"status":"healthy"}')


def watch(watch_once: Callable[[int, Record, float], None], port: int, until: float) -> Record:
    """Measure until then, whatever fails."""
    record = Record()
    while time.monotonic() < until:
        try:
            watch_once(port, record, until)
        except OSError:
            record.failed += 1
            record.seconds.append(TIMEOUT_S)
            time.sleep(10 * PAUSE_S)
    return record


def command(port: int, seconds: float) -> list[str]:
    """How to run this as a process of its own."""
    return [sys.executable, __file__, "--port", str(port), "--seconds", str(seconds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)  # who floods must not delay who measures
    until = time.monotonic() + options.seconds
    with ThreadPoolExecutor(2) as pool:
        raw = pool.submit(watch, watch_raw, options.port, until)
        health = pool.submit(watch, watch_health, options.port, until)
    print(json.dumps({"raw": raw.result().summary(), "health": health.result().summary()}))


if __name__ == "__main__":
    main()
