"""What others see while one client floods: `python bench/fairness.py` (see bench/README.md).

Each flood of floods.py has a fresh server for itself, on 1 and on 30 connections, while a client of
the raw door and a monitor of /health measure their own latency (witness.py). The server runs on one
core, who floods and who measures on another.

    python bench/fairness.py --seconds 5 --karna karna_ws.py --vs /path/to/old/karna_ws.py

Ends with 1 when --limit-ms is given and an answer took longer.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import floods
import witness
from report import aligned, number
from servers import BENCH, Process, Server, Skipped, last_line, pick_cores, pinned

Figures = dict[str, Any]
Units = dict[str, int]  # by flood

BEFORE_S = 0.5  # the flood is under way when measuring begins
LATE_S = 60.0  # a witness may wait so much longer for its last answers
STOP_S = 10.0  # for the floods to end


def karna(karna_ws: Path, loop: str, name: str = "karna") -> Server:
    """Karna as it is started by default, with a program that prints without end."""

    def command(port: int) -> list[str]:
        options = ["--port", str(port), "--loop", loop, "--allow-program", "yes"]
        return [sys.executable, str(karna_ws), *options]

    return Server(name, "Karna WS", ("raw",), command)


@dataclass(frozen=True)
class Case:
    """One line of the table; without a flood, how it is when there is none."""

    server: Server
    flood: str | None
    sockets: int


# ---- measuring -----------------------------------------------------------------------------------


def start_in_core(
    core: int | None, command: list[str], stdin: int | None = None
) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    with pinned(core):
        return subprocess.Popen(command, stdin=stdin, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen[str], timeout_s: float) -> Figures:
    """What it printed. Raises Skipped when it ended with an error or not at all."""
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise Skipped("it did not end") from None
    if process.returncode:
        raise Skipped(last_line(errors))
    figures: Figures = json.loads(output)
    return figures


@contextlib.contextmanager
def flooded(port: int, names: list[str], sockets: int, core: int | None) -> Iterator[Units]:
    """Floods for the time of the block; afterwards `Units` tells how much was taken."""
    taken: Units = {}
    if not names:
        yield taken
        return
    command = floods.command(names, port, sockets)
    flooding = start_in_core(core, command, stdin=subprocess.PIPE)
    try:
        yield taken
        taken.update(finish(flooding, STOP_S))  # it ends when its input does
    finally:
        flooding.kill()


def watch(port: int, seconds: float, core: int | None) -> Figures:
    """What the witnesses saw."""
    return finish(start_in_core(core, witness.command(port, seconds)), seconds + LATE_S)


def measure(case: Case, seconds: float) -> Figures:
    """One flood against a fresh server. Raises Skipped."""
    server_core, load_core = pick_cores()
    process = Process(case.server, server_core)
    names = [case.flood] if case.flood else []
    try:
        memory_kib, began = process.resident_kib(), time.monotonic()
        with flooded(process.port, names, case.sockets, load_core) as taken:
            time.sleep(BEFORE_S)
            figures = watch(process.port, seconds, load_core)
            grown_kib = process.resident_kib() - memory_kib
        units = sum(taken.values()) / (time.monotonic() - began)
    finally:
        process.stop()
    return {**figures, "units_per_s": units, "grown_mib": grown_kib / 1024}


# ---- table ---------------------------------------------------------------------------------------

HEAD = [
    "flood", "sockets", "server", "raw p50", "p99", "worst ms", "/health p50", "p99", "worst ms",
    "failed", "units/s", "MiB more",
]  # fmt: skip
WITNESSES = ("raw", "health")


def row(case: Case, figures: Figures) -> list[str]:
    whats = ("median_ms", "p99_ms", "worst_ms")
    cells = [number(figures[who][what]) for who in WITNESSES for what in whats]
    failed = sum(figures[who]["failed"] for who in WITNESSES)
    return [
        case.flood or "none",
        str(case.sockets) if case.flood else "",
        case.server.name,
        *cells,
        str(failed or ""),
        number(figures["units_per_s"]) if case.flood else "",
        f"{figures['grown_mib']:.1f}",
    ]


def measure_all(cases: list[Case], seconds: float) -> tuple[list[list[str]], float]:
    """The rows of the table, and the worst latency of Karna itself in ms."""
    rows, worst_ms = [HEAD], 0.0
    for case in cases:
        try:
            figures = measure(case, seconds)
        except Skipped as reason:
            print(f"skipped {case.flood} {case.server.name}: {reason}", flush=True)
            continue
        rows.append(row(case, figures))
        print("  ".join(cell for cell in rows[-1] if cell), flush=True)
        if case.server.name == "karna":
            worst_ms = max(worst_ms, *(figures[who]["worst_ms"] for who in WITNESSES))
    return rows, worst_ms


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    known = ", ".join(floods.FLOODS)
    parser.add_argument("--floods", default=",".join(floods.FLOODS), help=f"by comma: {known}")
    parser.add_argument("--sockets", default="1,30", help="connections of a flood, by comma")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each")
    parser.add_argument("--loop", default="asyncio", choices=("asyncio", "uvloop"))
    parser.add_argument("--karna", type=Path, default=BENCH.parent / "karna_ws.py")
    parser.add_argument("--vs", type=Path, help="a copy of karna_ws.py to compare with: `before`")
    parser.add_argument("--limit-ms", type=float, help="the longest that an answer may take")
    options = parser.parse_args()
    servers = [karna(options.karna, options.loop)]
    if options.vs:
        servers.append(karna(options.vs, options.loop, "before"))
    names, counts = options.floods.split(","), map(int, options.sockets.split(","))
    shapes = [(None, 0), *itertools.product(names, counts)]
    cases = [Case(server, flood, sockets) for flood, sockets in shapes for server in servers]
    rows, worst_ms = measure_all(cases, options.seconds)
    print(f"\n{aligned(rows)}")
    return int(bool(options.limit_ms) and worst_ms > options.limit_ms)


if __name__ == "__main__":
    raise SystemExit(main())
