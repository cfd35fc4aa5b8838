"""Turning a result (the dict that results.json holds) into tables, Markdown and plots."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

from works import GOALS, WORKS, Goal

Result = dict[str, Any]
Sample = dict[str, Any]
PACKAGES = (
    "websockets",
    "orjson",
    "uvloop",
    "fastapi",
    "uvicorn",
    "python-socketio",
    "aiohttp",
    "picows",
    "socketify",
)


# ---- the machine ---------------------------------------------------------------------------------


def describe_machine() -> dict[str, Any]:
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": dict(installed_versions()),
        "node": output_of("node", "--version"),
        "compiler": output_of("cc", "--version").partition("\n")[0],
    }


def processor_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def installed_versions() -> Iterable[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


# ---- numbers -------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three digits are enough: rounds differ by more than that."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def spread(summary: dict[str, float]) -> str:
    if summary["rounds"] == 1:
        return number(summary["median"])
    return f"{number(summary['median'])} ({number(summary['low'])} to {number(summary['high'])})"


def median_of(work: str, server: str, result: Result) -> float | None:
    summary = result["summaries"].get(work, {}).get(server)
    return float(summary["median"]) if summary else None


def goal_value(goal: Goal, server: str, result: Result) -> float | None:
    """Karna's median, or its ratio to another one; None when one of them was not measured."""
    value = median_of(goal.work, server, result)
    if value is None or not (goal.peer or goal.base):
        return value
    other = median_of(goal.base or goal.work, goal.peer or server, result)
    return value / other if other else None


def paired_ratio(
    samples: list[Sample], others: list[Sample], figure: Callable[[Sample], float]
) -> str:
    """The median ratio of what was measured in the same round, with the lowest and the highest.

    A busy moment of the machine falls on both sides of a pair: this is steadier than medians are.
    """
    values = {other["round"]: figure(other) for other in others}
    ratios = [figure(each) / values[each["round"]] for each in samples if values.get(each["round"])]
    if not ratios:
        return ""
    text = f"{median(ratios):.2f}"
    return text if len(ratios) == 1 else f"{text} ({min(ratios):.2f} to {max(ratios):.2f})"


def value_of(sample: Sample) -> float:
    return float(sample["value"])


def cost_of(sample: Sample) -> float:
    """Microseconds of the server's processor for one unit; 0 where this is not measured."""
    return float(sample.get("server_cpu", 0.0) * 1e6 / max(sample["value"], 1))


def cost_ratio(goal: Goal, server: str, result: Result) -> float | None:
    """The ratio of a goal by processor time: as if each server had its core for itself."""
    samples = result["samples"]
    own = samples.get(goal.work, {}).get(server, [])
    other = samples.get(goal.base or goal.work, {}).get(goal.peer or server, [])
    costs = [median(map(cost_of, each)) for each in (own, other) if each]
    return costs[1] / costs[0] if len(costs) == 2 and all(costs) else None


def is_reached(goal: Goal, value: float) -> bool:
    more = next(work.better for work in WORKS if work.name == goal.work) == "more"
    return value >= goal.bound if more else value <= goal.bound


# ---- terminal ------------------------------------------------------------------------------------


def work_table(work: str, result: Result) -> str:
    title = next(each.title for each in WORKS if each.name == work)
    return f"{work}: {title}\n{aligned(work_rows(work, result))}"


def work_rows(work: str, result: Result) -> list[list[str]]:
    """One work, the best server first, without the columns that this work leaves empty."""
    about = next(each for each in WORKS if each.name == work)
    summaries = result["summaries"][work]
    names = sorted(summaries, key=lambda name: summaries[name]["median"])
    if about.better == "more":
        names.reverse()
    columns = ["p50 us", "p99 us", "server us each", "server cpu", "load cpu"]
    samples = result["samples"][work]
    own = list(dict.fromkeys(key for name in names for key in samples[name][0].get("columns", ())))
    rows = [["server", about.unit, "x karna", "x before", "us each x before", *columns, *own]]
    karna = median_of(work, "karna", result)
    for name in names:
        ratio = f"{summaries[name]['median'] / karna:.2f}" if karna else ""
        others = [] if name == before_of(name) else samples.get(before_of(name), [])
        before = [paired_ratio(samples[name], others, each) for each in (value_of, cost_of)]
        details = sample_cells(samples[name]) + own_cells(samples[name], own)
        rows.append([name, spread(summaries[name]), ratio, *before, *details])
    used = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    return [[row[i] for i in used] for row in rows]


def before_of(server: str) -> str:
    """The copy to compare with: the one on the same event loop."""
    return "before-uvloop" if server.endswith("-uvloop") else "before"


def own_cells(samples: list[dict[str, Any]], names: list[str]) -> list[str]:
    """Medians of the figures that only this work has."""
    return [number(median(each["columns"][name] for each in samples)) for name in names]


def sample_cells(samples: list[dict[str, Any]]) -> list[str]:
    """Medians over the rounds of what the load reported; empty where it is not of this work.

    Where "server cpu" is far from 100 %, something else ran on that core: then "server us each"
    (processor time for one request, delivery or handshake) is the column to compare.
    """
    if "load_cpu" not in samples[0]:
        return [""] * 5
    latency = [each.get("latency_us") or each.get("flush_us") or {} for each in samples]
    p50, p99 = (median(each.get(key, 0.0) for each in latency) for key in ("p50", "p99"))
    each = median(map(cost_of, samples))
    cpus = (median(sample[key] for sample in samples) for key in ("server_cpu", "load_cpu"))
    return [number(p50), number(p99), number(each), *(f"{cpu:.0%}" for cpu in cpus)]


def aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *others = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([first, *(cell.strip().rjust(len(cell)) for cell in others)]))
    return "\n".join(line.rstrip() for line in lines)


def goals_rows(result: Result) -> list[list[str]]:
    known = ("karna", "karna-uvloop", "karna-module")
    measured = {name for summaries in result["summaries"].values() for name in summaries}
    servers = [name for name in known if name in measured]
    rows = [["work", "wanted", *servers, "karna, by cpu"]]
    for goal in GOALS:
        values = [goal_value(goal, server, result) for server in servers]
        by_cpu = cost_ratio(goal, "karna", result) if goal.peer or goal.base else None
        if all(value is None for value in values):
            continue
        work = next(each for each in WORKS if each.name == goal.work)
        sign = "at least" if work.better == "more" else "at most"
        other = goal.peer or goal.base
        unit = f"x {other}" if other else work.unit
        cells = [
            "" if v is None else number(v) + ("" if is_reached(goal, v) else " (no)")
            for v in values
        ]
        last = "" if by_cpu is None else number(by_cpu)
        rows.append([goal.work, f"{sign} {goal.bound:g} {unit}", *cells, last])
    return rows


def growth_rows(lines: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["what grows", "cost of one", "at each step", "last / least"]]
    for line in lines:
        costs = [cost for _, cost in line["points"] if isinstance(cost, float)]
        steps = ", ".join(
            f"{step:,}: {number(cost) if isinstance(cost, float) else cost}"
            for step, cost in line["points"]
        )
        growth = f"{costs[-1] / min(costs):.1f}" if costs and min(costs) > 0 else ""
        rows.append([line["title"], line["unit"], steps, growth])
    return rows


GOALS_NOTE = (
    "Command lines all differ, but in same1 and same16, which ask one line again and again."
)

# ---- Markdown ------------------------------------------------------------------------------------


def markdown_table(rows: list[list[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(result: Result) -> str:
    machine = result["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    run = f"{result['rounds']} rounds of {result['seconds']:g} s, medians (lowest to highest)."
    where = f"{machine['processor']}, {machine['cores']} cores, {machine['system']}"
    what = f"Python {machine['python']}, {packages}, Node {machine['node'] or 'none'}"
    parts = [
        "# Bench result",
        f"`{result['command']}`, {result['date']}: {run}",
        f"{where}. {what}. {pinning(result)}",
    ]
    rows = goals_rows(result)
    if len(rows) > 1:
        parts += ["## Goals", GOALS_NOTE, markdown_table(rows)]
    for work in (work for work in WORKS if work.name in result["summaries"]):
        title = f"## {work.name}: {work.title}"
        parts += [title, markdown_table(work_rows(work.name, result))]
    for name, lines in result["growth"].items():
        parts += [
            f"## How cost grows: {name}",
            "Processor time of the server, divided by the work done: flat means linear.",
            markdown_table(growth_rows(lines)),
        ]
    if result["curves"]:
        parts += ["## Plots", *(f"![along {along}]({along}.svg)" for along in result["curves"])]
    if result["skipped"]:
        rows = [["not measured", "because"], *([n, why] for n, why in result["skipped"].items())]
        parts += ["## Skipped", markdown_table(rows)]
    return "\n\n".join(parts) + "\n"


def pinning(result: Result) -> str:
    server, load = result["cores"]
    if server is None:
        return "Nothing was pinned to a core: the load took time from the servers."
    return f"Servers on core {server}, load on core {load}."


# ---- plots ---------------------------------------------------------------------------------------


def draw_plots(result: Result, directory: Path) -> list[Path]:
    """Throughput and latency against clients and message size, as SVG. Raises ImportError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = []
    for along, curves in result["curves"].items():
        figure, (throughput, latency) = pyplot.subplots(1, 2, figsize=(11, 4.5))
        for i, (name, points) in enumerate(curves.items()):
            x, colour = [point["x"] for point in points], f"C{i}"
            width = 2.5 if name.startswith("karna") else 1.2
            style = {"color": colour, "linewidth": width, "marker": "."}
            throughput.plot(x, [p["requests_per_s"] for p in points], label=name, **style)
            latency.plot(x, [p["p50_us"] for p in points], **style)
            latency.plot(x, [p["p99_us"] for p in points], linestyle="dotted", **style)
        throughput.set(title="requests/s", xlabel=along, xscale="log", yscale="log")
        latency.set(title="p50 (line) and p99 (dots), us", xlabel=along, xscale="log", yscale="log")
        throughput.legend(fontsize="small")
        for axes in (throughput, latency):
            axes.grid(alpha=0.3)
        figure.tight_layout()
        path = directory / f"{along}.svg"
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
        drawn.append(path)
    return drawn
