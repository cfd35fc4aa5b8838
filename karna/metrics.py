"""Counters, and their text for Prometheus (exposition format 0.0.4).

Hot counters are plain integers of the hub; the rest is here, by label. Imports nothing of ours;
used by the hub, and by the route `/metrics`.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

LATENCY_BUCKETS_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0)


class Metrics:
    """What is counted by label, and how long commands took that are not inline."""

    def __init__(self) -> None:
        self.errors: defaultdict[str, int] = defaultdict(int)
        self.refusals: defaultdict[str, int] = defaultdict(int)
        self.drops: defaultdict[str, int] = defaultdict(int)
        self.mcp_requests: defaultdict[tuple[str, str], int] = defaultdict(int)  # era, method
        self.latency_buckets = [0] * (len(LATENCY_BUCKETS_S) + 1)
        self.latency_sum_s = 0.0
        self.loop_lag_s = 0.0

    def count_task(self, result: str, seconds: float) -> None:
        """One command that was no inline one ended: with "ok" or an error code."""
        if result != "ok":
            self.errors[result] += 1
        self.latency_sum_s += seconds
        self.latency_buckets[bisect_left(LATENCY_BUCKETS_S, seconds)] += 1

    def histogram(self) -> dict[str, float]:
        """The buckets as samples, each counting those below it."""
        limits = [*map("{:g}".format, LATENCY_BUCKETS_S), "+Inf"]
        counts = itertools.accumulate(self.latency_buckets)
        buckets = {f'_bucket{{le="{x}"}}': n for x, n in zip(limits, counts, strict=True)}
        total = sum(self.latency_buckets)
        return {**buckets, "_sum": self.latency_sum_s, "_count": total}


class Metric(NamedTuple):
    """One metric: its samples by their labels, or the only one."""

    name: str
    kind: str  # counter, gauge or histogram
    help: str
    values: float | Mapping[str, float]


def render(metrics: Iterable[Metric]) -> bytes:
    """Metrics as the text that Prometheus reads."""
    lines: list[str] = []
    for name, kind, help, values in metrics:
        lines += [f"# HELP karna_{name} {help}", f"# TYPE karna_{name} {kind}"]
        samples = values if isinstance(values, Mapping) else {"": values}
        lines += [f"karna_{name}{labels} {value}" for labels, value in samples.items()]
    return ("\n".join(lines) + "\n").encode()


def describe(
    hub: Any, doors: Mapping[str, int], states: Mapping[str, str], commands_done: int
) -> bytes:
    """All that a server counts. doors: clients by door; states: of services, by name."""
    metrics: Metrics = hub.metrics
    sent = hub.messages_out + hub.deliveries
    results = {"ok": commands_done, **metrics.errors}
    service_states = {labels(service=name, state=state): 1 for name, state in states.items()}
    mcp = {labels(era=era, method=name): n for (era, name), n in metrics.mcp_requests.items()}
    listed = [
        Metric("clients", "gauge", "Clients connected, by door.", by("door", doors)),
        Metric("sockets", "gauge", "Sockets open, HTTP and handshakes included.",
               len(hub.connections)),
        Metric("received_bytes_total", "counter", "Bytes read from sockets.", hub.bytes_in),
        Metric("received_messages_total", "counter", "WebSocket messages read.", hub.messages_in),
        Metric("sent_messages_total", "counter", "Answers and broadcasts written.", sent),
        Metric("sent_bytes_total", "counter", "Bytes written to WebSockets.", hub.bytes_out),
        Metric("broadcasts_total", "counter", "Broadcasts accepted.", hub.broadcasts),
        Metric("deliveries_total", "counter", "Broadcasts written, each client one.",
               hub.deliveries),
        Metric("commands_total", "counter",
               "Commands, methods and events that were started, by result.", by("result", results)),
        Metric("command_duration_seconds", "histogram", "How long those took that are not inline.",
               metrics.histogram()),
        Metric("dropped_total", "counter", "Clients dropped, by reason.",
               by("reason", metrics.drops)),
        Metric("refused_total", "counter", "Requests refused, by reason.",
               by("reason", metrics.refusals)),
        Metric("mcp_requests_total", "counter", "Messages of assistants, by era and method.", mcp),
        Metric("service_state", "gauge", "1 for the state each service is in.", service_states),
        Metric("loop_lag_seconds", "gauge", "How late the loop's last tick was.",
               metrics.loop_lag_s),
        Metric("tasks", "gauge", "Tasks of the event loop.", len(asyncio.all_tasks())),
    ]  # fmt: skip
    resident = resident_bytes()
    if resident is not None:
        help = "Resident memory of the process."
        listed.append(Metric("resident_memory_bytes", "gauge", help, resident))
    return render(listed)


def by(label: str, values: Mapping[str, float]) -> dict[str, float]:
    """Samples that differ in one label."""
    return {labels(**{label: key}): value for key, value in values.items()}


def labels(**values: str) -> str:
    """Labels as a sample shows them, such as '{door="raw"}'."""
    shown = (f'{name}="{_escape(value)}"' for name, value in values.items())
    return f"{{{','.join(shown)}}}"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def resident_bytes() -> int | None:
    """Resident memory of this process; None where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None
