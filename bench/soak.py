"""Hundreds of clients of both doors that talk, cancel, stall, vanish, and outlive a restart.

`python bench/soak.py --seconds 300 --clients 300`, or `--seconds 10` in CI. Ends with 1 and a line
for each thing that is wrong: a request answered twice, wrongly or never, an unexpected close code,
a restart that was not clean, memory that grows, or a client, command, task, thread or descriptor
that is left over when all clients are gone. The same --seed makes the same choices.

With --floods other clients flood all doors meanwhile (floods.py), through the restart, too, and
witnesses measure how long an answer takes.

Sections: ledger, clients, behaviours, floods, server, checks, main.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from fairness import flooded, watch
from floods import FLOODS
from probe import PATHS, Door
from servers import BENCH, Process, Server, Skipped, karna, pick_cores

Envelope = dict[str, Any]

ANSWER_TIMEOUT_S = 30.0
SETTLE_TIMEOUT_S = 15.0
STOP_LIMIT_S = 10.0
FLOODED_STOP_LIMIT_S = 20.0  # commands have 5 s to end, then clients that do not read 10 s to close
DOORS: tuple[Door, ...] = ("raw", "socket.io")
# 1000: we closed. 1012: the restart. 1013: we read too slowly. 1006: cut, by us or in the restart.
EXPECTED_CLOSES = {1000, 1005, 1006, 1012, 1013}

# ---- ledger --------------------------------------------------------------------------------------


@dataclass
class Ledger:
    """What was asked, what came back, and what should not have happened."""

    counts: Counter[str] = field(default_factory=Counter)
    closes: Counter[int] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    stopping: bool = False  # the server is being restarted, and may answer that it is

    def problem(self, text: str) -> None:
        self.problems[text] += 1

    def expect(self, ok: bool, what: str, envelope: Envelope) -> None:
        if not ok and not self.stopping:
            self.problem(f"expected {what}: {str(envelope)[:80]}")


# ---- clients -------------------------------------------------------------------------------------


class ConnectionLost(Exception):
    """The connection ended before the answer came; the restart and `vanish` do that."""


class Client:
    """One connection of either door, with a task that files every answer under its request."""

    def __init__(self, websocket: ClientConnection, door: Door, ledger: Ledger) -> None:
        self.websocket = websocket
        self.door = door
        self.ledger = ledger
        self.next_id = 0
        self.waiting: dict[int, asyncio.Future[Envelope]] = {}
        self.answered: set[int] = set()
        self.reads = asyncio.Event()
        self.reads.set()
        self.reader = asyncio.create_task(self._read())

    async def ask(self, method: str, **params: Any) -> asyncio.Future[Envelope]:
        """Send a request; the future gets its final answer, or ConnectionLost."""
        request_id = self.next_id
        self.next_id += 1
        request: Envelope = {"method": method, "id": request_id}
        if params:
            request["params"] = params
        future = self.waiting[request_id] = asyncio.get_running_loop().create_future()
        # An answer nobody waits for any more is no error.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        self.ledger.counts["asked"] += 1
        try:
            await self.websocket.send(self._encode(request))
        except ConnectionClosed:
            raise ConnectionLost from None
        return future

    async def answer(self, method: str, **params: Any) -> Envelope:
        future = await self.ask(method, **params)
        try:
            return await asyncio.wait_for(future, ANSWER_TIMEOUT_S)
        except TimeoutError:
            self.ledger.problem(f"{self.door}: no answer to {method} {str(params)[:60]}")
            raise ConnectionLost from None

    def vanish(self) -> None:
        """Cut the connection without a word."""
        self.websocket.transport.abort()

    async def close(self) -> None:
        self.reads.set()
        await self.websocket.close()
        await self.reader

    def _encode(self, request: Envelope) -> str:
        text = json.dumps(request)
        if self.door == "raw":
            return text
        # Odd ids ask for an ack, even ones for an `rpc_response`.
        ack = request["id"] if request["id"] % 2 else ""
        return f'42/ws,{ack}["rpc",{text}]'

    async def _read(self) -> None:
        try:
            while True:
                message = await self.websocket.recv()
                await self._handle(str(message))
                await self.reads.wait()
        except ConnectionClosed:
            pass
        finally:
            for future in self.waiting.values():
                if not future.done():
                    future.set_exception(ConnectionLost())
            self.ledger.counts["lost"] += len(self.waiting)
            self.ledger.closes[self.websocket.close_code or 1006] += 1

    async def _handle(self, message: str) -> None:
        if self.door == "raw":
            self._file(json.loads(message))
        elif message == "2":
            await self.websocket.send("3")
        elif message.startswith("42/ws,"):
            self._file(json.loads(message[6:])[1])
        elif message.startswith("43/ws,"):
            self._file(json.loads(message[message.index("[") :])[0])
        else:
            self.ledger.problem(f"an unexpected packet: {message[:60]}")

    def _file(self, envelope: Envelope) -> None:
        self.ledger.counts["messages"] += 1
        request_id = envelope.get("id")
        if request_id is None or envelope["type"] == "command_progress":
            return
        future = self.waiting.pop(request_id, None)
        if future is None:
            kind = "twice" if request_id in self.answered else "without being asked"
            self.ledger.problem(f"{self.door}: answered {kind}: {str(envelope)[:80]}")
            return
        self.answered.add(request_id)
        self.ledger.counts["answered"] += 1
        if not future.done():
            future.set_result(envelope)


@contextlib.asynccontextmanager
async def connected(port: int, door: Door, ledger: Ledger) -> AsyncIterator[Client]:
    """A client for the time of the block. Raises ConnectionLost when the server is not there."""
    uri = f"ws://127.0.0.1:{port}{PATHS[door]}"
    try:
        # A small queue: a client that does not read holds the server back at once.
        websocket = await connect(uri, compression=None, max_queue=4, proxy=None, close_timeout=5)
        if door == "socket.io":
            await websocket.recv()
            await websocket.send("40/ws,")
            await websocket.recv()
    except (OSError, InvalidHandshake, ConnectionClosed, TimeoutError):
        raise ConnectionLost from None
    ledger.counts["connections"] += 1
    client = Client(websocket, door, ledger)
    try:
        yield client
    finally:
        await client.close()


# ---- behaviours ----------------------------------------------------------------------------------


async def talk(client: Client, chance: random.Random) -> None:
    """Several requests at once, of every kind; each answer must be the right one."""
    text = "x" * chance.choice((1, 100, 3_000, 70_000))
    wanted = [
        (await client.ask("execute_command", command=f"echo {text}"), "command_response"),
        (await client.ask("get_status"), "status_update"),
        (await client.ask("execute_command", command="countdown 0.1"), "command_response"),
        (await client.ask("execute_command", command="no_such_command"), "error"),
        (await client.ask("no_such_method"), "error"),
    ]
    for future, kind in wanted:
        envelope = await asyncio.wait_for(future, ANSWER_TIMEOUT_S)
        client.ledger.expect(envelope["type"] == kind, kind, envelope)
    echo = await wanted[0][0]
    client.ledger.expect(echo["data"].get("result") == text, f"{len(text)} bytes back", echo)


async def cancel(client: Client, chance: random.Random) -> None:
    """Start slow commands and take them back; both the command and the cancel are answered."""
    for _ in range(chance.randint(1, 5)):
        request_id = client.next_id
        slow = await client.ask("execute_command", command="countdown 60")
        await asyncio.sleep(chance.random() / 20)
        confirmed = await client.answer("cancel", id=request_id)
        envelope = await asyncio.wait_for(slow, ANSWER_TIMEOUT_S)
        expect, code = client.ledger.expect, envelope["data"].get("code")
        expect(code == "cancelled", "a cancelled command", envelope)
        expect(confirmed["data"].get("cancelled") == request_id, "a confirmed cancel", confirmed)


async def stall(client: Client, chance: random.Random) -> None:
    """Ask for megabytes without reading, then read on (all must come) or vanish."""
    client.reads.clear()
    text = "y" * 20_000
    sending = asyncio.create_task(ask_many(client, 200, text))
    await asyncio.sleep(chance.uniform(0.2, 1.0))
    if chance.random() < 0.5:
        client.vanish()
    client.reads.set()
    for future in await sending:
        await asyncio.wait_for(future, ANSWER_TIMEOUT_S)


async def ask_many(client: Client, count: int, text: str) -> list[asyncio.Future[Envelope]]:
    return [await client.ask("execute_command", command=f"echo {text}") for _ in range(count)]


async def vanish(client: Client, chance: random.Random) -> None:
    """Go away with commands running and answers unread."""
    for _ in range(chance.randint(1, 20)):
        await client.ask("execute_command", command="countdown 60")
        await client.ask("execute_command", command="echo " + "z" * 1_000)
    await asyncio.sleep(chance.random() / 10)
    client.vanish()


async def listen(client: Client, chance: random.Random) -> None:
    """Do nothing for a while, and tell everyone now and then."""
    await asyncio.sleep(chance.uniform(0.5, 2.0))
    if chance.random() < 0.2:
        await client.answer("execute_command", command=f"notify {'n' * chance.randint(1, 4_000)}")


Behaviour = Callable[[Client, random.Random], Awaitable[None]]
BEHAVIOURS: dict[Behaviour, int] = {talk: 6, cancel: 3, listen: 4, vanish: 2, stall: 1}


async def stumble(port: int, chance: random.Random) -> None:
    """A connection that never becomes a client: half a head, nonsense, or nothing."""
    heads = (b"", b"GET /ws HTTP/1.1\r\nHost: 127.0.0.1\r\n", b"\x00\xff\r\n\r\n")
    with contextlib.suppress(OSError):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(chance.choice(heads))
        await asyncio.sleep(chance.random() / 2)
        writer.transport.abort()


async def live(port: int, ledger: Ledger, chance: random.Random, over: asyncio.Event) -> None:
    """One inhabitant: a new connection and another behaviour, until the time is over."""
    while not over.is_set():
        behaviour = chance.choices(list(BEHAVIOURS), list(BEHAVIOURS.values()))[0]
        if chance.random() < 0.05:
            await stumble(port, chance)
        try:
            async with connected(port, chance.choice(DOORS), ledger) as client:
                ledger.counts[behaviour.__name__] += 1
                await behaviour(client, chance)
        except ConnectionLost:
            await asyncio.sleep(chance.uniform(0.05, 0.3))
        except TimeoutError:
            ledger.problem(f"{behaviour.__name__}: no answer within {ANSWER_TIMEOUT_S:.0f} s")
        await asyncio.sleep(chance.uniform(0.0, 0.2))


# ---- floods --------------------------------------------------------------------------------------

# Hundreds of our clients would hear every `notify`, and no Python can read so much.
SOAK_FLOODS = [name for name in FLOODS if name != "notify"]


@contextlib.asynccontextmanager
async def floods_beside(options: argparse.Namespace, port: int) -> AsyncIterator[None]:
    """Floods for the time of the block, if they are wanted; the restart does not end them."""
    if not options.floods:
        yield
        return
    _, core = pick_cores()
    with contextlib.ExitStack() as stack:
        names, sockets = options.floods.split(","), options.flood_sockets
        taken = stack.enter_context(flooded(port, names, sockets, core))
        yield
        await asyncio.to_thread(stack.close)
    print("floods: " + ", ".join(f"{count:,} {name}" for name, count in taken.items()), flush=True)


async def live_on(options: argparse.Namespace, port: int, ledger: Ledger) -> None:
    """Let half of the time go by; with floods, witnesses measure meanwhile."""
    if not options.floods:
        return await asyncio.sleep(options.seconds / 2)
    _, core = pick_cores()
    try:
        figures = await asyncio.to_thread(watch, port, options.seconds / 2, core)
    except Skipped as reason:
        return ledger.problem(f"the witnesses failed: {reason}")
    for name, each in figures.items():
        print(f"{name}: " + ", ".join(f"{key} {value:g}" for key, value in each.items()))
        if each["failed"]:
            ledger.problem(f"{each['failed']} of {each['asked']} had no answer in time: {name}")
    return None


# ---- server --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Footprint:
    """What a server holds at one moment."""

    clients: float
    sockets: float
    tasks: float
    running_commands: int
    descriptors: int
    threads: int
    resident_mib: float


def footprint(process: Process) -> Footprint:
    base = f"http://127.0.0.1:{process.port}"
    metrics = fetch(f"{base}/metrics")
    status = json.loads(fetch(f"{base}/api/status"))
    proc = Path(f"/proc/{process.pid}")
    threads = re.search(r"^Threads:\s*(\d+)", (proc / "status").read_text(), re.M)
    return Footprint(
        clients=sum_of("karna_clients", metrics),
        sockets=sum_of("karna_sockets", metrics),
        tasks=sum_of("karna_tasks", metrics),
        running_commands=status["command"]["running"],
        descriptors=len(list((proc / "fd").iterdir())),
        threads=int(threads[1]) if threads else 0,
        resident_mib=process.resident_kib() / 1024,
    )


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:
        body: bytes = response.read()
        return body.decode()


def sum_of(metric: str, text: str) -> float:
    """All samples of one metric, over its labels; 0 when there is none."""
    lines = re.findall(rf"^{metric}(?:\{{.*\}})? (\S+)$", text, re.M)
    return sum(float(value) for value in lines)


async def restart(
    old: Process, start: Callable[[], Process], ledger: Ledger, limit_s: float
) -> Process:
    """Stop and start again on the same port, with all clients there."""
    began, ledger.stopping = time.monotonic(), True
    code = await asyncio.to_thread(old.stop, 2 * limit_s)
    took = time.monotonic() - began
    if code != 0:
        ledger.problem(f"the server ended with {code} on SIGTERM")
    if took > limit_s:
        ledger.problem(f"the server took {took:.1f} s to stop")
    process = await asyncio.to_thread(start)
    ledger.stopping = False
    return process


# ---- checks --------------------------------------------------------------------------------------


async def settle(process: Process, fresh: Footprint) -> Footprint:
    """Wait until nothing is left over, at most SETTLE_TIMEOUT_S; returns what there is then."""
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while True:
        now = await asyncio.to_thread(footprint, process)
        if not left_over(now, fresh) or time.monotonic() > deadline:
            return now
        await asyncio.sleep(0.2)


def left_over(now: Footprint, fresh: Footprint) -> list[str]:
    """What the server holds more than when it had just started."""
    names = ("clients", "sockets", "tasks", "running_commands", "descriptors", "threads")
    return [
        f"{getattr(now, name) - getattr(fresh, name):g} {name} left over"
        for name in names
        if getattr(now, name) > getattr(fresh, name)
    ]


def memory_problem(samples: list[float], end_mib: float, allowed_mib: float) -> list[str]:
    """Compares the end with the first third of the samples: by then every kind of client came."""
    early = max(samples[: max(1, len(samples) // 3)])
    if end_mib <= early + allowed_mib:
        return []
    return [f"memory grew from {early:.1f} to {end_mib:.1f} MiB"]


async def watch_memory(process: Process, samples: list[float]) -> None:
    while True:
        samples.append(process.resident_kib() / 1024)
        await asyncio.sleep(0.5)


# ---- main ----------------------------------------------------------------------------------------


async def soak(options: argparse.Namespace) -> list[str]:
    """Run it all and return the problems."""
    core, _ = pick_cores()
    more = ("--allow-program", "yes") if options.floods else ()
    server = Server("karna", "Karna WS", DOORS, karna(options.loop, options.karna, *more))
    ledger, samples, over = Ledger(), list[float](), asyncio.Event()
    process = Process(server, core)
    port = process.port
    try:
        dice = [random.Random(f"{options.seed}.{i}") for i in range(options.clients)]
        crowd = [asyncio.create_task(live(port, ledger, each, over)) for each in dice]
        async with floods_beside(options, port):
            await live_on(options, port, ledger)
            print(f"restart: {summary(ledger)}", flush=True)
            limit_s = FLOODED_STOP_LIMIT_S if options.floods else STOP_LIMIT_S
            process = await restart(process, lambda: Process(server, core, port), ledger, limit_s)
            watcher = asyncio.create_task(watch_memory(process, samples))
            await live_on(options, port, ledger)
        over.set()
        watcher.cancel()
        await finish(crowd, ledger, 3 * ANSWER_TIMEOUT_S)
        fresh = await fresh_footprint(server, core)
        end = await settle(process, fresh)
        print(f"end: {summary(ledger)}\nclose codes: {dict(ledger.closes)}\n{end}", flush=True)
        code = await asyncio.to_thread(process.stop)
    finally:
        process.stop()
    unexpected = [code for code in ledger.closes if code not in EXPECTED_CLOSES]
    return [
        *(f"{count} x {text}" for text, count in ledger.problems.items()),
        *(f"{ledger.closes[code]} connections closed with {code}" for code in unexpected),
        *left_over(end, fresh),
        *memory_problem(samples, end.resident_mib, options.max_growth_mib),
        *([f"the server ended with {code} at the end"] if code else []),
    ]


async def fresh_footprint(server: Server, core: int | None) -> Footprint:
    """A server that had no clients yet, measured the same way: what is no leak."""
    process = await asyncio.to_thread(Process, server, core)
    try:
        await asyncio.to_thread(footprint, process)
        return await asyncio.to_thread(footprint, process)
    finally:
        await asyncio.to_thread(process.stop)


async def finish(crowd: list[asyncio.Task[None]], ledger: Ledger, timeout_s: float) -> None:
    done, late = await asyncio.wait(crowd, timeout=timeout_s)
    for task in late:
        task.cancel()
        ledger.problem("a client could not come to its end")
    for task in done:
        if error := task.exception():
            ledger.problem(f"a client failed: {error!r}")


def summary(ledger: Ledger) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(ledger.counts.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description="Many unlucky clients and a restart.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--loop", default="auto", choices=("auto", "asyncio", "uvloop"))
    parser.add_argument(
        "--floods",
        nargs="?",
        default="",
        const=",".join(SOAK_FLOODS),
        metavar="NAMES",
        help="other clients flood all doors (floods.py)",
    )
    parser.add_argument("--flood-sockets", type=int, default=1, help="connections of each flood")
    parser.add_argument("--max-growth-mib", type=float, default=16.0)
    parser.add_argument("--karna", type=Path, default=BENCH.parent / "karna_ws.py")
    try:
        problems = asyncio.run(soak(parser.parse_args()))
    except Skipped as reason:
        problems = [f"the server does not start: {reason}"]
    for problem in problems:
        print(f"soak: {problem}")
    print("soak: failed" if problems else "soak: ok")
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(main())
