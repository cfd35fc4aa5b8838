"""Services and their states; the monitor that starts, checks and stops them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest

from karna.service import Monitor
from karna_ws import WebSocketManager, serving
from services import Service, Unavailable
from support import DEADLINE_S, Gate, Lamp, Raw, error_log, execute, http, served, until
from support_commands import hang, monitoring


class Meter(Lamp):
    """A service whose status differs each time it is asked, without saying so."""

    asked = 0

    def get_status(self) -> dict[str, Any]:
        self.asked += 1
        return {**super().get_status(), "asked": self.asked}


async def test_status_is_never_stale() -> None:
    lamp = Lamp()
    manager = WebSocketManager(services=[lamp])
    gate = Gate(manager)

    async def counts(client: Raw) -> tuple[int, int, int]:
        before = (await http(server, "GET", "/api/status"))[1]["command"]
        status = (await client.ask("get_status"))["data"]["command"]
        after = (await http(server, "GET", "/api/status"))[1]["command"]
        assert before == status == after
        return status["running"], status["done"], status["failed"]

    async with served(manager) as server, Raw.open(server) as client:
        assert await counts(client) == (0, 0, 0)
        await client.run("echo hi")
        assert await counts(client) == (0, 1, 0)
        await client.send(execute("gate a", id=1))
        await until(lambda: gate.begun)
        assert await counts(client) == (1, 1, 0)
        gate.let("a")
        await client.final(1)
        assert await counts(client) == (0, 2, 0)
        await client.ask("execute_command", command="gate")  # a usage error is no call
        assert await counts(client) == (0, 2, 0)
        await client.ask("execute_command", command="describe not-an-image")
        assert await counts(client) == (0, 2, 1)
        lamp.set_state("failed", "dark")
        assert (await client.ask("get_status"))["data"]["lamp"]["detail"] == "dark"
        commands = (await client.ask("get_status"))["data"]["command"]["commands"]

        @manager.commands.command
        def another() -> None: ...

        status = await client.ask("get_status")
        assert status["data"]["command"]["commands"] == commands + 1


async def test_status_of_a_service_with_its_own_is_asked_each_time() -> None:
    manager = WebSocketManager(services=[Meter()])
    async with served(manager) as server, Raw.open(server) as client:
        asked = [(await client.ask("get_status"))["data"]["lamp"]["asked"] for _ in range(3)]
        assert asked[0] < asked[1] < asked[2]


async def test_status_of_a_service_that_raises_is_an_internal_error() -> None:
    class Broken(Lamp):
        def get_status(self) -> dict[str, Any]:
            raise RuntimeError("no status today")

    manager = WebSocketManager(services=[Broken()])
    async with served(manager, logs_errors=True) as server, Raw.open(server) as client:
        error = await client.ask("get_status")
        assert error["data"]["code"] == "internal_error"
        assert "today" not in json.dumps(error), "the text of a bug is for the log"
        assert await client.run("echo still here") == "still here"
        assert (await http(server, "GET", "/api/status"))[0] == 500


async def test_service_that_fails_to_start_takes_nothing_down() -> None:
    class Broken(Lamp):
        async def start(self) -> None:
            raise SystemExit("no lamp here")

    manager = WebSocketManager(services=[Broken()])
    async with served(manager) as server, Raw.open(server) as client:
        status = (await client.ask("get_status"))["data"]["lamp"]
        assert (status["state"], status["detail"]) == ("failed", "no lamp here")
        assert await client.run("echo fine") == "fine"


async def test_clients_may_connect_while_services_start() -> None:
    class Slow(Lamp):
        def __init__(self) -> None:
            super().__init__()
            self.may_start = asyncio.Event()

        async def start(self) -> None:
            await self.may_start.wait()

    slow = Slow()
    manager = WebSocketManager(services=[slow])
    with error_log():
        async with serving(manager, port=0) as server, Raw.open(server) as client:
            assert (await client.ask("get_status"))["data"]["lamp"]["state"] == "starting"
            assert await client.run("echo early") == "early"
            slow.may_start.set()
            while (await client.next_of("status_update"))["data"]["lamp"]["state"] != "running":
                pass


class Scripted(Service):
    """A service whose starts and checks do what a script says: an exception, or None to succeed."""

    def __init__(self, starts: list[Any] = [], checks: list[Any] = []) -> None:  # noqa: B006
        super().__init__("scripted")
        self.starts, self.checks = iter(starts), iter(checks)
        self.seen: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        self.on_change = lambda service: self.seen.put_nowait((service.state, service.detail))
        self.stopped = 0

    async def play(self, script: Iterator[Any]) -> None:
        step = next(script, None)
        if isinstance(step, BaseException):
            raise step
        if step is not None:
            await step()

    async def start(self) -> None:
        await self.play(self.starts)

    async def check(self) -> None:
        await self.play(self.checks)

    async def stop(self) -> None:
        self.stopped += 1


async def states(service: Scripted, count: int) -> list[tuple[str, str]]:
    return [await asyncio.wait_for(service.seen.get(), DEADLINE_S) for _ in range(count)]


def test_service_calls_back_only_when_something_changes() -> None:
    service, changes, touches = Service("s"), [], []
    service.on_change, service.on_touch = changes.append, lambda: touches.append(1)
    since = service.since = "2000-01-01T00:00:00.000Z"
    service.set_state("starting", "warming up")
    assert service.since == since  # the detail alone moves nothing
    service.set_state("starting", "warming up")
    service.set_state("running", "two\nlines\x00 of it")
    assert (len(changes), len(touches)) == (2, 2)
    assert service.get_status() == {
        "state": "running", "detail": "two lines of it", "since": service.since}  # fmt: skip
    assert service.since > since


def test_service_survives_callback_that_raises(caplog: pytest.LogCaptureFixture) -> None:
    service = Service("s")
    service.on_change = lambda service: 1 / 0  # type: ignore[assignment,return-value]
    service.set_state("running")
    assert "callback of service s" in caplog.text


async def test_monitor_runs_service_that_starts_and_checks() -> None:
    service = Scripted()
    async with monitoring(service):
        assert await states(service, 1) == [("running", "")]
    assert (service.state, service.stopped) == ("stopped", 1)


FAILING_STARTS = [
    (OSError("no disk"), "no disk"),
    (ValueError(), "ValueError"),
    (SystemExit(3), "3"),
    (KeyboardInterrupt(), "KeyboardInterrupt"),
    (asyncio.CancelledError(), "CancelledError"),
    (hang, "no answer to start within 0.05 s"),
]


@pytest.mark.parametrize(
    ("start", "detail"), FAILING_STARTS, ids=[detail for _, detail in FAILING_STARTS]
)
async def test_monitor_retries_start_that_fails(start: Any, detail: str) -> None:
    service = Scripted(starts=[start])
    async with monitoring(service):
        assert await states(service, 2) == [("failed", detail), ("running", "")]


@pytest.mark.parametrize(
    "check", [Unavailable("away"), OSError("away"), SystemExit("away")], ids=repr
)
async def test_monitor_degrades_service_whose_check_fails(check: BaseException) -> None:
    service = Scripted(checks=[None, check, check])
    async with monitoring(service):
        assert await states(service, 3) == [("running", ""), ("degraded", "away"), ("running", "")]


async def test_monitor_shows_no_running_before_first_check_has_failed() -> None:
    service = Scripted(checks=[Unavailable("away")])
    async with monitoring(service):
        assert await states(service, 2) == [("degraded", "away"), ("running", "")]


async def test_monitor_degrades_service_whose_check_hangs_and_swallows_cancellation(
    scaled: None,
) -> None:
    go = asyncio.Event()

    async def stubborn() -> None:
        while not go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await go.wait()

    service = Scripted(checks=[stubborn])
    async with monitoring(service):
        [(state, detail), (later, _)] = await states(service, 2)
        assert (state, later) == ("degraded", "running") and "0.05 s" in detail
        go.set()


async def test_monitor_believes_service_that_says_its_state() -> None:
    service = Scripted()

    async def say() -> None:
        service.set_state("degraded", "half of it works")

    service.checks = iter([say, say, None])
    async with monitoring(service):
        assert await states(service, 2) == [("degraded", "half of it works"), ("running", "")]


async def test_monitor_leaves_state_to_service_that_checks_nothing() -> None:
    service = Service("plain")
    changed: asyncio.Queue[str] = asyncio.Queue()
    service.on_change = lambda service: changed.put_nowait(service.state)
    async with monitoring(service) as monitor:
        assert await changed.get() == "running"
        service.set_state("failed", "its link broke")
        [watching] = monitor._watching
        await watching  # it has nothing left to watch
        assert service.state == "failed"


async def test_monitor_stops_while_check_hangs() -> None:
    checking = asyncio.Event()

    async def wait() -> None:
        checking.set()
        await hang()

    service = Scripted(checks=[wait])
    async with monitoring(service, timeout_s=DEADLINE_S):
        await checking.wait()
    assert service.state == "stopped"


async def test_monitor_doubles_delay_with_jitter_up_to_its_maximum() -> None:
    monitor = Monitor([], interval_s=5)
    for failures, nominal in [(1, 1), (2, 2), (5, 16), (6, 30), (10_000, 30)]:
        delays = {monitor._delay_s(failures) for _ in range(50)}
        assert len(delays) > 1 and all(0.75 * nominal <= d <= 1.25 * nominal for d in delays)
    assert monitor._delay_s(0) == 5


async def test_monitor_stops_services_in_reverse_each_bounded(scaled: None) -> None:
    stopped: list[str] = []

    class Stopping(Service):
        async def stop(self) -> None:
            stopped.append(self.name)
            if self.name == "b":
                await hang()
            if self.name == "a":
                raise SystemExit(1)

    watched = [Stopping("a"), Stopping("b"), Stopping("c")]
    async with monitoring(*watched):
        pass
    assert stopped == ["c", "b", "a"]
    assert [service.state for service in watched] == ["stopped"] * 3


async def test_monitor_backs_off_while_a_service_fails_and_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failures: list[int] = []

    def delay_s(monitor: Monitor, count: int) -> float:
        failures.append(count)
        return 0.0

    monkeypatch.setattr(Monitor, "_delay_s", delay_s)
    bad = RuntimeError("not yet")
    async with monitoring(Scripted([bad, bad, bad, None], [None, bad, bad, None, bad])):
        await until(lambda: len(failures) >= 9)
    assert failures[:9] == [1, 2, 3, 0, 1, 2, 0, 1, 0]


async def test_monitor_waits_as_long_as_its_back_off_says(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    sleep = asyncio.sleep

    async def fake(delay_s: float) -> None:
        slept.append(delay_s)
        await sleep(0 if len(slept) < 9 else 3600)

    monkeypatch.setattr("karna.service.asyncio", _Asyncio(fake))
    monkeypatch.setattr("karna.service.random.uniform", lambda low, high: 1.0)

    class Away(Service):
        async def start(self) -> None:
            raise RuntimeError("away")

    monitor = Monitor([Away("away")])
    monitor.start()
    await until(lambda: len(slept) == 9)
    await monitor.stop()
    assert slept == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0, 30.0]


class _Asyncio:
    """The module, with a clock of the test's own."""

    def __init__(self, sleep: Any) -> None:
        self.sleep = sleep

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)
