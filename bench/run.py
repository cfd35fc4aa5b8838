"""Measure Karna and its peers on this machine: `python bench/run.py` (see bench/README.md).

Every server is pinned to one core and the load to another; the works go round the servers in
several short rounds, so that a busy moment of the machine falls on all of them.
Ends with 1 when Karna did not start, or lost, doubled or garbled an answer; with 2 on a bad
flag or without a C compiler.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from growth import CURVES, measure_curve, measure_growth
from report import (
    Result,
    aligned,
    describe_machine,
    draw_plots,
    goals_rows,
    growth_rows,
    markdown,
    work_table,
)
from servers import BENCH, Server, Skipped, all_servers, servers_before
from works import (
    QUICK_SERVERS,
    QUICK_WORKS,
    WORKS,
    Bench,
    LoadFailed,
    Sample,
    Work,
    find_skips,
    summarise,
)

Named = TypeVar("Named", Server, Work)


def main() -> int:
    options = parse_options()
    known = all_servers(options.karna)
    if options.vs:
        known[2:2] = servers_before(options.vs)
    servers = chosen(options.only, known)
    works = chosen(options.work, WORKS)
    try:
        bench = Bench(options.seconds, options.warmup)
    except Skipped as reason:
        print(f"run.py: {reason}", file=sys.stderr)
        return 2
    try:
        result = measure(options, bench, servers, works)
    finally:
        bench.stop()
    write(result, options.out)
    lost = any(server.startswith("karna") for _, server, _ in result["failures"])
    return int(lost or "karna" in result["skipped"])


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure Karna and its peers on this machine.")
    names = ", ".join(work.name for work in WORKS)
    parser.add_argument("--quick", action="store_true", help="one short round, under a minute")
    parser.add_argument("--only", help="servers, by comma: karna,picows")
    parser.add_argument("--work", help=f"works, by comma: {names}; or none")
    parser.add_argument("--rounds", type=int, help="rounds of every work (5)")
    parser.add_argument("--seconds", type=float, help="length of one measurement (1.0)")
    parser.add_argument("--growth", action=argparse.BooleanOptionalAction, help="how cost grows")
    parser.add_argument("--curves", action=argparse.BooleanOptionalAction, help="the plots")
    parser.add_argument("--karna", type=Path, default=BENCH.parent / "karna_ws.py")
    parser.add_argument("--vs", type=Path, help="a copy of karna_ws.py to compare with: `before`")
    parser.add_argument("--out", type=Path, default=BENCH / "results", help="where results go")
    options = parser.parse_args()
    quick, all_of_it = options.quick, not (options.quick or options.work)
    options.rounds = options.rounds or (1 if quick else 5)
    options.seconds = options.seconds or (0.3 if quick else 1.0)
    options.warmup = 0.15 if quick else 0.3
    options.work = options.work or (QUICK_WORKS if quick else None)
    pair = "karna,before" if options.vs else None
    options.only = options.only or pair or (QUICK_SERVERS if quick else None)
    options.growth = all_of_it if options.growth is None else options.growth
    options.curves = all_of_it if options.curves is None else options.curves
    return options


def chosen(names: str | None, known: Sequence[Named]) -> list[Named]:
    """Those named; all without names. Ends the program with 2 when a name is unknown."""
    if names is None:
        return list(known)
    wanted = [] if names == "none" else names.split(",")
    unknown = set(wanted) - {each.name for each in known}
    if unknown:
        print(f"run.py: unknown: {', '.join(sorted(unknown))}", file=sys.stderr)
        print(f"  known: {', '.join(each.name for each in known)}", file=sys.stderr)
        raise SystemExit(2)
    return [each for each in known if each.name in wanted]


# ---- measuring -----------------------------------------------------------------------------------


def measure(
    options: argparse.Namespace, bench: Bench, servers: list[Server], works: list[Work]
) -> Result:
    skipped = find_skips(bench, servers)
    for name, reason in skipped.items():
        print(f"skipped {name}: {reason}", flush=True)
    servers = [server for server in servers if server.name not in skipped]
    result: Result = {
        "command": shlex.join(["python", "bench/run.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "cores": [bench.server_core, bench.load_core],
        "rounds": options.rounds,
        "seconds": options.seconds,
        "skipped": skipped,
        "failures": [],
        "samples": defaultdict(lambda: defaultdict(list)),
        "summaries": {},
        "growth": {},
        "curves": {},
    }
    measure_works(bench, servers, works, result)
    if options.growth:
        measure_growths(bench, servers, result)
    if options.curves:
        measure_curves(bench, servers, result)
    return result


def can_do(server: Server, work: Work) -> bool:
    if (work.karna_only and not server.is_karna) or (work.needs_program and not server.program):
        return False
    return work.door in server.doors and work.name in (server.works or [work.name])


def measure_works(bench: Bench, servers: list[Server], works: list[Work], result: Result) -> None:
    for work in works:
        able = [server for server in servers if can_do(server, work)]
        samples: dict[str, list[Sample]] = result["samples"][work.name]
        for round_number in range(min(result["rounds"], work.rounds)):
            # There and back: a drift of the machine's speed then falls on all alike.
            for server in able if round_number % 2 == 0 else reversed(able):
                try:
                    sample = work.measure(bench, server)
                    samples[server.name].append({"round": round_number, **sample})
                except (LoadFailed, Skipped) as reason:
                    result["failures"].append([work.name, server.name, str(reason)])
                    print(f"failed {work.name} {server.name}: {reason}", flush=True)
        result["summaries"][work.name] = {
            name: asdict(summarise(taken)) for name, taken in samples.items()
        }
        print(f"\n{work_table(work.name, result)}", flush=True)


def measure_growths(bench: Bench, servers: list[Server], result: Result) -> None:
    for server in servers:
        if server.name.startswith("karna") and not server.works:
            lines = result["growth"][server.name] = measure_growth(bench, server)
            print(f"\nHow cost grows: {server.name}\n{aligned(growth_rows(lines))}", flush=True)


def measure_curves(bench: Bench, servers: list[Server], result: Result) -> None:
    """The C server stays out: it answers the same few bytes whatever it is sent."""
    raw = [s for s in servers if "raw" in s.doors and not s.works and s.name != "c-epoll"]
    for along in CURVES:
        print(f"\ncurves along {along}", flush=True)
        rounds = min(result["rounds"], 3)
        result["curves"][along] = measure_curve(bench, raw, along, rounds)


def write(result: Result, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    (directory / "results.md").write_text(markdown(result))
    rows = goals_rows(result)
    if len(rows) > 1:
        print(f"\n{aligned(rows)}")
    try:
        draw_plots(result, directory)
    except ImportError as error:
        print(f"no plots: {error}")
    print(f"\nwritten to {directory}")


if __name__ == "__main__":
    raise SystemExit(main())
