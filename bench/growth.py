"""How cost grows: points along clients, message size, fragments, pipelining and partial reads.

`measure_growth` divides the server's processor time by the work done, so that a flat column means
linear growth. `measure_curves` gives throughput and latency for the plots.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from probe import Door
from servers import Server
from works import Bench, LoadFailed, Sample, most_clients

CLIENTS = (1, 10, 100, 1_000, 10_000)
SIZES = (100, 1_024, 4_096, 16_384, 65_536)
Point = dict[str, Any]


@dataclass(frozen=True)
class Growth:
    """One line of the table: the load's options for each step, and the cost of one unit of work."""

    title: str
    unit: str
    steps: tuple[int, ...]
    options: Callable[[int], str]
    cost: Callable[[Sample, int], float]
    door: Door = "raw"


def per_request(report: Sample, step: int) -> float:
    return float(report["server_us_per_request"])


def per_delivery(report: Sample, step: int) -> float:
    return float(report["server_cpu"] * 1e6 / max(report["deliveries_per_s"], 1))


def per_kib(report: Sample, step: int) -> float:
    return per_request(report, step) / (step / 1024)


def per_step(report: Sample, step: int) -> float:
    return per_request(report, step) / step


def busy_clients(count: int) -> str:
    """One request in flight each; many clients need longer, for each to have its turn."""
    return f"--clients {count}" + (" --milliseconds 3000" if count >= 10_000 else "")


# fmt: off
GROWTHS = [
    Growth("clients, 1 request in flight each", "us a request", CLIENTS,
           busy_clients, per_request),
    Growth("idle clients beside 64 busy ones", "us a request", (1, 100, 1_000, 10_000),
           lambda n: f"--clients 64 --listeners {n}", per_request),
    Growth("clients of a broadcast, one at a time", "us a delivery", CLIENTS[1:],
           lambda n: f"--listeners {n} --publish 1", per_delivery),
    Growth("clients of a broadcast, 8 in flight", "us a delivery", CLIENTS[1:],
           lambda n: f"--listeners {n} --publish 8", per_delivery),
    Growth("bytes of a request", "us a KiB", SIZES,
           lambda n: f"--clients 16 --size {n}", per_kib),
    Growth("requests in flight on one connection", "us a request", (1, 4, 16, 64, 256, 1_024),
           lambda n: f"--clients 1 --inflight {n}", per_request),
    Growth("POSTs in flight on one connection", "us a request", (1, 4, 16, 64, 256),
           lambda n: f"--clients 1 --inflight {n}", per_request, "http"),
    Growth("fragments of a 64 KiB request", "us a fragment", (1, 16, 256, 1_024, 3_800),
           lambda n: f"--clients 1 --size 65536 --fragments {n}", per_step),
    Growth("bytes of a request that comes byte by byte", "us a byte", (100, 400, 1_600, 6_400),
           lambda n: f"--clients 1 --size {n} --drip-us 15", per_step),
    Growth("KiB of a request cut into 1 KiB fragments", "us a KiB", (16, 64, 256, 960),
           lambda n: f"--clients 1 --size {n * 1024} --fragments {n}", per_step),
    Growth("attachments of 1 KiB of a Socket.IO request", "us an attachment", (1, 2, 5, 10),
           lambda n: f"--clients 1 --attachments {n} --attachment-bytes 1024", per_step,
           "socket.io"),
    Growth("KiB of the 10 attachments of a Socket.IO request", "us a KiB", (10, 100, 1_000),
           lambda n: f"--clients 1 --attachments 10 --attachment-bytes {n * 102}", per_step,
           "socket.io"),
]
# fmt: on


def measure_growth(bench: Bench, server: Server) -> list[dict[str, Any]]:
    """One dict a line: title, unit, and the points as [step, cost]; a failed step says why."""
    lines = []
    for growth in GROWTHS:
        points: list[list[Any]] = []
        for step in growth.steps:
            if "clients" in growth.title and step + 64 > most_clients():
                continue
            try:
                process, options = bench.process(server), growth.options(step).split()
                report = bench.load(process, growth.door, *options)
                points.append([step, round(growth.cost(report, step), 4)])
            except LoadFailed as reason:
                points.append([step, str(reason)])
        lines.append({"title": growth.title, "unit": growth.unit, "points": points})
    return lines


CURVES: dict[str, tuple[tuple[int, ...], Callable[[int], str]]] = {
    "clients": (CLIENTS, busy_clients),
    "bytes": (SIZES, lambda n: f"--clients 64 --size {n}"),
}


def measure_curve(
    bench: Bench, servers: list[Server], along: str, rounds: int
) -> dict[str, list[Point]]:
    """For each server its points {"x", "requests_per_s", "p50_us", "p99_us"}, medians of rounds.

    The servers take turns at each step, as in the works. Steps a server fails are left out.
    """
    steps, options = CURVES[along]
    curves: dict[str, list[Point]] = {server.name: [] for server in servers}
    for step in steps:
        if along == "clients" and step > most_clients():
            continue
        taken: dict[str, list[Sample]] = defaultdict(list)
        for server in servers * rounds:
            try:
                report = bench.load(bench.process(server), "raw", *options(step).split())
                taken[server.name].append(report)
            except LoadFailed as reason:
                print(f"  {server.name} at {step:,} {along}: {reason}", flush=True)
        for name, reports in taken.items():
            curves[name].append({"x": step, **point(reports)})
    return curves


def point(reports: list[Sample]) -> Point:
    return {
        "requests_per_s": median(report["requests_per_s"] for report in reports),
        "p50_us": median(report["latency_us"]["p50"] for report in reports),
        "p99_us": median(report["latency_us"]["p99"] for report in reports),
    }
