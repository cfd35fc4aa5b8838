"""A service has a state that a person can read; the Monitor starts, checks and retries services.

A failing service never takes the server down: it says so in its status and is tried again. Uses
errors, log, text and work; used by backplane, services, and who starts the server.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Literal

from karna.errors import RequestError, Unavailable, explain
from karna.log import LogGate, describe_error, log
from karna.text import one_line, utc_now
from karna.work import Tasks

RETRY_FIRST_S, RETRY_MAX_S = 1.0, 30.0  # back-off of a failing service, doubled each time

State = Literal["starting", "running", "degraded", "failed", "stopped"]
Action = Callable[[], Awaitable[None]]  # a service's start, stop or check


class Service:
    """Something the server does, with a state and one line of detail for a person.

    Override `start`, `stop` and `check`; each is bounded in time by the monitor. Success of `start`
    or `check` means running; `check` raises Unavailable to say degraded. A service that calls
    `set_state` during `start` or `check` is believed.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: State = "starting"
        self.detail = ""
        self.since = utc_now()
        self.on_change: Callable[[Service], None] | None = None  # state or detail changed
        self.on_touch: Callable[[], None] | None = None  # get_status() answers differently
        self.times_set = 0  # how often set_state was called: the monitor compares

    async def start(self) -> None:
        """Get ready; raise anything to be tried again later."""

    async def stop(self) -> None:
        """Let go of everything; called once, also after a failed start."""

    async def check(self) -> None:
        """Find out whether the service still works; called every few seconds."""

    def set_state(self, state: State, detail: str = "") -> None:
        """Say how the service is; callbacks run only when something changed."""
        self.times_set += 1
        detail = one_line(detail)
        if (state, detail) == (self.state, self.detail):
            return
        if state != self.state:
            self.since = utc_now()
        self.state, self.detail = state, detail
        level = logging.WARNING if state in ("degraded", "failed") else logging.INFO
        log.log(level, "service %s is %s%s", self.name, state, detail and f": {detail}")
        try:
            self.touch()
            if self.on_change is not None:
                self.on_change(self)
        except Exception as error:  # ours, not the service's: it must not end the watching
            log.error("a callback of service %s raised\n%s", self.name, describe_error(error))

    def touch(self) -> None:
        """Tell that `get_status` answers differently now."""
        if self.on_touch is not None:
            self.on_touch()

    def get_status(self) -> dict[str, Any]:
        """{"state", "detail", "since"} and what a service adds."""
        return {"state": self.state, "detail": self.detail, "since": self.since}


class Monitor:
    """Starts services, checks them every `interval_s`, and tries failing ones again.

    Nothing a service raises comes out of here, SystemExit included; each call of a service ends
    after `timeout_s`. Delays after failures double from RETRY_FIRST_S to RETRY_MAX_S, with jitter.
    """

    def __init__(
        self, services: Iterable[Service], *, interval_s: float = 5.0, timeout_s: float = 5.0,
        log_gate: LogGate | None = None,
    ) -> None:  # fmt: skip
        self.services = list(services)
        self.interval_s, self.timeout_s = interval_s, timeout_s
        self._log_gate = log_gate or LogGate()  # the one that all share
        self._tasks = Tasks()
        self._watching: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to start and to watch the services, each in a task of its own."""
        if not self._watching:
            spawn = self._tasks.spawn
            self._watching = [spawn(self._watch(each), f"monitor {each.name}")
                              for each in self.services]  # fmt: skip

    async def stop(self) -> None:
        """End the watching, then stop the services, the last one first."""
        watching, self._watching = self._watching, []
        for task in watching:
            task.cancel()
        if watching:
            await asyncio.wait(watching)  # bounded, as what they wait for is
        for service in reversed(self.services):
            error = await self._attempt(service, service.stop)
            service.set_state("stopped", "" if error is None else explain(error))

    async def _watch(self, service: Service) -> None:
        failures, started = 0, False
        while True:
            started = started or await self._step(service, service.start, "failed")
            healthy = started and await self._step(service, service.check, "degraded")
            if healthy and type(service).check is Service.check:
                return  # nothing to check: from here on the service itself says how it is
            failures = 0 if healthy else failures + 1
            await asyncio.sleep(self._delay_s(failures))

    async def _step(self, service: Service, action: Action, otherwise: State) -> bool:
        """Do one start or check and set the state it shows; false when it failed."""
        times_set = service.times_set
        error = await self._attempt(service, action)
        if error is not None:
            service.set_state(otherwise, explain(error))
        elif service.times_set == times_set and action == service.check:
            # Only now: a start that succeeds before a check that fails is no change to "running".
            service.set_state("running", service.detail if service.state == "running" else "")
        return error is None

    async def _attempt(self, service: Service, action: Action) -> BaseException | None:
        """Call `action` for at most `timeout_s`; what it raised is the result."""
        name = f"service {service.name} {action.__name__}"
        job = self._tasks.start(action, name, self.timeout_s)
        await job.wait()
        if job.is_late:
            return Unavailable(f"no answer to {action.__name__} within {self.timeout_s:g} s")
        if job.error is not None and not isinstance(job.error, RequestError):
            self._log_gate.error(f"{name} failed", job.error)
        return job.error

    def _delay_s(self, failures: int) -> float:
        if not failures:
            return self.interval_s
        delay = min(RETRY_FIRST_S * 2.0 ** min(failures - 1, 30), RETRY_MAX_S)
        return delay * random.uniform(0.75, 1.25)  # jitter: nodes that failed together part
