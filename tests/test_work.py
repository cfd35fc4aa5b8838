"""Threads and tasks of commands: bounded, owned, ended."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import gc
import logging
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

import services
from karna.command import Call, as_handler
from karna.errors import CommandTimeout
from karna.work import Job, Tasks, ThreadPool
from karna_ws import WebSocketManager
from services import CommandFailed, Context, Service, Unavailable
from support import DEADLINE_S, error_log, execute, served, until
from support_commands import any_words, hang, monitoring, processor, run_line
from support_peers import raw


async def test_blocking_command_holds_up_nobody() -> None:
    manager = WebSocketManager()
    release = threading.Event()

    @manager.commands.command
    def block() -> str:
        """Block a thread."""
        release.wait(10)
        return "done"

    async with served(manager, command_timeout_s=0.3) as server:
        async with raw(server.port) as peer:
            await peer.send_json(execute("block", 1))
            await peer.send_json(execute("echo quick", 2))
            assert (await peer.json())["id"] == 2
            assert (await peer.json())["data"]["code"] == "timeout"
        release.set()


async def test_thread_blocked_in_report_ends_when_command_is_cancelled() -> None:
    ended = threading.Event()
    sending, never = asyncio.Event(), asyncio.Event()

    async def send(value: Any) -> None:
        sending.set()
        await never.wait()

    def reports(context: Context) -> None:
        try:
            context.report(1)
        finally:
            ended.set()

    commands = processor(reports)
    task = asyncio.ensure_future(commands.run(commands.prepare("reports"), Context(None, send)))
    await sending.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(ended.is_set)
    assert not never.is_set()


async def test_threads_are_bounded_and_used_again() -> None:
    release, busy, most = threading.Semaphore(0), [], []

    def blocks() -> int:
        busy.append(1)
        most.append(len(busy))
        release.acquire(timeout=DEADLINE_S)
        busy.pop()
        return threading.get_ident()

    commands = processor(blocks, max_threads=2)
    running = [asyncio.ensure_future(run_line(commands, "blocks")) for _ in range(6)]
    await until(lambda: len(busy) == 2)
    release.release(6)
    assert len(set(await asyncio.gather(*running))) == 2 and max(most) == 2


async def test_command_is_unavailable_when_system_has_no_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    commands = processor(any_words)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(Unavailable, match="no thread"):
            await run_line(commands, "any")
    assert await run_line(commands, "any 1") == ["1"]


def test_report_fails_when_loop_is_closed() -> None:
    context = Context(None, print)
    with pytest.raises(CommandFailed, match="has ended"):
        context.report(1)  # never begun

    async def begin() -> None:
        context.begin()

    asyncio.run(begin())
    raised: list[BaseException] = []

    def report() -> None:
        try:
            context.report(1)
        except CommandFailed as error:
            raised.append(error)

    thread = threading.Thread(target=report)
    thread.start()
    thread.join(DEADLINE_S)
    assert str(raised[0]) == "the command has ended"


async def test_waiting_for_thread_counts_against_time_limit() -> None:
    release, calls = threading.Event(), []

    def blocks() -> None:
        calls.append(1)
        release.wait(DEADLINE_S)

    commands = processor(blocks, max_threads=1, timeout_s=0.05)
    for _ in range(2):  # the second never gets the thread that the first one keeps
        with pytest.raises(CommandTimeout):
            await run_line(commands, "blocks")
    release.set()
    commands.timeout_s = DEADLINE_S
    await run_line(commands, "blocks")
    assert len(calls) == 2


async def test_thread_sees_context_variables_of_its_caller() -> None:
    variable = contextvars.ContextVar("variable", default="none")
    variable.set("mine")
    assert await run_line(processor(variable_of(variable)), "get") == "mine"


def variable_of(variable: contextvars.ContextVar[str]) -> Callable[[], str]:
    def get() -> str:
        return variable.get()

    return get


STUCK_THREAD = """
import asyncio, sys, threading, time
sys.path.insert(0, sys.argv[1])
from services import CommandProcessor, Context
commands = CommandProcessor(timeout_s=0.05)
began = threading.Event()

@commands.command
def stuck():
    began.set()
    time.sleep(30 if sys.argv[2] == "stuck" else 0.2)

async def main():
    task = asyncio.ensure_future(commands.run(commands.prepare("stuck"), Context()))
    await asyncio.to_thread(began.wait)
    try:
        await task
    except Exception as error:
        print(type(error).__name__)

asyncio.run(main())
if sys.argv[2] != "stuck":
    time.sleep(0.4)  # the thread hands its result to a loop that is closed
"""


@pytest.mark.parametrize("way", ["stuck", "late"])
def test_thread_holds_neither_exit_nor_complains_of_closed_loop(way: str) -> None:
    folder = os.path.dirname(services.__file__)
    done = subprocess.run(
        [sys.executable, "-c", STUCK_THREAD, folder, way],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("CommandTimeout\n", "", 0)


async def test_stop_ends_running_commands_and_refuses_threads() -> None:
    began = asyncio.Event()

    async def waits() -> None:
        began.set()
        await hang()

    commands = processor(waits, any_words)
    await commands.start()
    assert commands.get_status()["state"] == "running"
    task = asyncio.ensure_future(run_line(commands, "waits"))
    await began.wait()
    await commands.stop()
    for line in [task, run_line(commands, "any")]:
        with pytest.raises(Unavailable, match="stopping"):
            await line
    await commands.start()
    assert await run_line(commands, "any 1") == ["1"]


# --- Work in threads that never begins -------------------------------------------------------------


@pytest.mark.parametrize("how", ["waiting", "just taken"])
async def test_work_that_was_cancelled_before_it_began_never_runs(how: str) -> None:
    pool, release, ran = ThreadPool(1, "test"), threading.Event(), []

    class Taken(deque[Any]):
        """What waits, where a thread is always quicker to take it than we are to take it back."""

        def remove(self, entry: Any) -> None:
            raise ValueError

    if how == "just taken":
        pool._waiting = Taken()
    first = asyncio.ensure_future(pool.call(lambda: release.wait(DEADLINE_S)))
    await until(lambda: not pool._waiting and pool._threads)
    second = asyncio.ensure_future(pool.call(lambda: ran.append("second")))
    third = asyncio.ensure_future(pool.call(lambda: ran.append("third")))
    await until(lambda: len(pool._waiting) == 2)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    if how == "waiting":
        assert len(pool._waiting) == 1, "it holds nothing any more"
    release.set()
    await asyncio.gather(first, third)
    assert ran == ["third"]
    pool.close()


async def test_work_that_has_begun_keeps_its_thread_though_its_caller_is_gone() -> None:
    pool, release, ran = ThreadPool(1, "test"), threading.Event(), []
    first = asyncio.ensure_future(pool.call(lambda: (release.wait(DEADLINE_S), ran.append(1))))
    await until(lambda: not pool._waiting and pool._threads)
    first.cancel()
    second = asyncio.ensure_future(pool.call(lambda: ran.append(2)))
    await until(lambda: len(pool._waiting) == 1)
    release.set()
    await second
    assert ran == [1, 2]
    pool.close()


# --- Jobs ------------------------------------------------------------------------------------------


class Ends:
    """What a job's `on_end` was told, each time it was."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, str, bool, bool]] = []

    def __call__(self, job: Job) -> None:
        error = "" if job.error is None else type(job.error).__name__
        self.seen.append((job.value, error, job.is_cancelled, job.is_late))


async def fail(error: BaseException, *, wait: bool) -> None:
    if wait:
        await asyncio.sleep(0)
    raise error


async def succeed(value: int, *, wait: bool) -> int:
    if wait:
        await asyncio.sleep(0)
    return value


async def ignore_cancellation(until_: asyncio.Event) -> None:
    while not until_.is_set():
        with contextlib.suppress(asyncio.CancelledError):
            await until_.wait()
    raise ValueError("after all")


async def end_in_peace() -> str:
    with contextlib.suppress(asyncio.CancelledError):
        await hang()
    return "mine"


OUTCOMES: list[tuple[Any, float | None, tuple[Any, str, bool, bool]]] = [
    # the work, its time limit, what is told of it: value, error, was it cancelled, was it late
    (lambda wait: succeed(5, wait=wait), None, (5, "", False, False)),
    (lambda wait: succeed(6, wait=wait), 10.0, (6, "", False, False)),
    (lambda wait: fail(ValueError("x"), wait=wait), None, (None, "ValueError", False, False)),
    (lambda wait: fail(SystemExit(3), wait=wait), None, (None, "SystemExit", False, False)),
    (lambda wait: fail(KeyboardInterrupt(), wait=wait), None,
     (None, "KeyboardInterrupt", False, False)),
    (lambda wait: fail(asyncio.CancelledError(), wait=wait), None,
     (None, "CancelledError", False, False)),
    (lambda wait: fail(TimeoutError(), wait=wait), 10.0, (None, "TimeoutError", False, False)),
    (lambda wait: hang(), 0.01, (None, "TimeoutError", False, True)),
    (lambda wait: end_in_peace(), 0.01, (None, "TimeoutError", False, True)),
]  # fmt: skip


@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize(("work", "timeout_s", "outcome"), OUTCOMES)
async def test_job_has_one_outcome(work: Any, timeout_s: Any, outcome: Any, wait: bool) -> None:
    tasks, ends = Tasks(), Ends()
    job = tasks.start(lambda: work(wait), "job", timeout_s, ends)
    assert not ends.seen, "never from within"
    assert not job.is_over and tasks.running == (job.task,)
    await job.wait()
    assert ends.seen == [outcome] and job.is_over and tasks.running == ()
    await job.wait()  # it is over: there is nothing to wait for
    job.cancel()  # too late is no error
    await asyncio.sleep(0)
    assert ends.seen == [outcome]


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("work", [hang, end_in_peace])
async def test_cancelled_job_is_told_so_whatever_it_did_about_that(work: Any, steps: int) -> None:
    tasks, ends = Tasks(), Ends()
    job = tasks.start(work, "job", 10.0, ends)
    for _ in range(steps):  # none: it is cancelled before its first step
        await asyncio.sleep(0)
    job.cancel()
    job.cancel()
    assert not ends.seen
    await job.wait()
    assert ends.seen == [(None, "CancelledError", True, False)]
    assert not tasks.running


async def test_job_that_ended_before_it_was_cancelled_succeeded() -> None:
    tasks, ends = Tasks(), Ends()

    async def succeed_just_before() -> int:
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(cancel)  # its task is done then, its end not yet told
        return 5

    def cancel() -> None:
        assert job.task.done() and not job.is_over
        job.cancel()

    job = tasks.start(succeed_just_before, "job", 10.0, ends)
    await tasks.wait(1.0)
    assert ends.seen == [(5, "", False, False)]


async def test_second_cancellation_leaves_the_cleaning_up_of_the_first_alone() -> None:
    tasks, ends, cleaned = Tasks(), Ends(), []

    async def clean_up() -> None:
        try:
            await hang()
        finally:
            await asyncio.sleep(0.02)
            cleaned.append(1)

    job = tasks.start(clean_up, "job", 0.05, ends)
    await asyncio.sleep(0)
    for _ in range(5):
        job.cancel()
        await asyncio.sleep(0)
    await job.wait()
    assert cleaned and ends.seen == [(None, "CancelledError", True, False)]


async def test_waiting_that_is_cancelled_cancels_the_job_and_outlasts_it() -> None:
    tasks, ends = Tasks(), Ends()
    job = tasks.start(end_in_peace, "job", None, ends)
    waiting = asyncio.ensure_future(job.wait())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert ends.seen == [(None, "CancelledError", True, False)] and job.is_over


@pytest.mark.parametrize("how", ["cancel", "late", "end_all", "wait"])
async def test_job_that_ignores_its_end_is_left_behind_with_an_outcome(
    how: str, scaled: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "karna_ws")
    tasks, ends, go = Tasks(), Ends(), asyncio.Event()
    limit_s = 0.01 if how == "late" else None
    job = tasks.start(lambda: ignore_cancellation(go), "stubborn", limit_s, ends)
    await asyncio.sleep(0)
    began = time.monotonic()
    if how == "cancel":
        job.cancel()
    elif how == "end_all":
        await tasks.end_all()
    if how == "wait":
        waiting = asyncio.ensure_future(job.wait())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    else:
        await job.wait()
    assert time.monotonic() - began < 1.0  # CANCEL_WAIT_S is 50 ms here
    error = "TimeoutError" if how == "late" else "CancelledError"
    assert ends.seen == [(None, error, how in ("cancel", "wait"), how == "late")]
    assert tasks.running == () and not job.task.done()
    assert await tasks.wait(0.0), "who is left behind is not waited for"
    assert "stubborn ignores its cancellation" in caplog.text
    go.set()
    await until(job.task.done)
    await asyncio.sleep(0)
    assert "stubborn has ended after all: after all" in caplog.text
    assert not tasks._left and len(ends.seen) == 1


async def test_end_that_raises_is_reported_and_stops_nothing() -> None:
    errors: list[tuple[str, str]] = []
    tasks = Tasks(lambda name, error: errors.append((name, str(error))))

    def on_end(job: Job) -> None:
        raise RuntimeError("boom")

    job = tasks.start(lambda: succeed(5, wait=True), "job", None, on_end)
    await job.wait()
    await asyncio.sleep(0)
    assert errors == [("the end of job", "boom")] and tasks.running == ()


async def test_what_the_end_of_a_job_starts_is_waited_for_too() -> None:
    tasks, ended = Tasks(), []

    def start_another(job: Job | None) -> None:
        ended.append(job)
        if len(ended) < 5:
            tasks.start(lambda: succeed(len(ended), wait=True), "next", None, start_another)

    start_another(None)
    assert await tasks.wait(DEADLINE_S)
    assert len(ended) == 5


# --- Tasks -----------------------------------------------------------------------------------------


async def test_task_that_fails_is_reported_but_not_what_was_somebodys_answer() -> None:
    errors: list[tuple[str, BaseException]] = []
    tasks = Tasks(lambda name, error: errors.append((name, error)))
    broken = ValueError("x")
    tasks.spawn(fail(broken, wait=True), "broken")
    tasks.spawn(fail(Unavailable("away"), wait=True), "answered")
    tasks.spawn(hang(), "cancelled").cancel()
    assert await tasks.spawn(succeed(5, wait=True), "fine") == 5
    assert await tasks.wait(DEADLINE_S)
    assert errors == [("broken", broken)]


async def test_task_that_fails_is_logged_by_default() -> None:
    with error_log(expected=True) as log:
        tasks = Tasks()
        tasks.spawn(fail(ValueError("x"), wait=True), "broken")
        assert await tasks.wait(DEADLINE_S)
    [line] = log.lines
    assert line.startswith("karna_ws: broken failed: ValueError") and "Traceback" in line


async def test_waiting_for_tasks_is_bounded_and_ending_them_too(scaled: None) -> None:
    tasks, go = Tasks(), asyncio.Event()
    assert await tasks.wait(0.0)
    quiet = tasks.spawn(hang(), "quiet")
    stubborn = tasks.spawn(ignore_cancellation(go), "stubborn")
    assert set(tasks.running) == {quiet, stubborn}
    assert not await tasks.wait(0.01)
    began = time.monotonic()
    await tasks.end(quiet)
    assert quiet.cancelled() and tasks.running == (stubborn,)
    await tasks.end_all()
    assert time.monotonic() - began < 1.0 and tasks.running == ()
    assert not stubborn.done()
    go.set()
    await until(stubborn.done)


async def test_several_may_wait_for_the_same_tasks() -> None:
    tasks = Tasks()
    task = tasks.spawn(hang(), "task")
    waiting = [asyncio.ensure_future(tasks.wait(DEADLINE_S)) for _ in range(3)]
    await asyncio.sleep(0)
    task.cancel()
    assert await asyncio.gather(*waiting) == [True] * 3
    # Idle again, and waited for again.
    task = tasks.spawn(hang(), "task")
    again = asyncio.ensure_future(tasks.wait(DEADLINE_S))
    await asyncio.sleep(0)
    assert not again.done()
    task.cancel()
    assert await again


def test_loop_that_closes_gives_its_jobs_their_end() -> None:
    ends = Ends()

    async def main() -> None:
        tasks = Tasks()
        for _ in range(2):
            tasks.start(hang, "job", 5.0, ends)

    asyncio.run(main())  # ends what runs; a warning of a coroutine never awaited would fail
    gc.collect()
    assert [error for _, error, _, _ in ends.seen] == ["CancelledError"] * 2


async def test_results_that_come_while_the_loop_is_busy_wake_it_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool, loop, ended = ThreadPool(4, "test"), asyncio.get_running_loop(), threading.Semaphore(0)
    woken: list[Any] = []
    wake = loop.call_soon_threadsafe
    monkeypatch.setattr(
        loop, "call_soon_threadsafe", lambda *args: woken.append(args) or wake(*args)
    )

    def work(number: int) -> int:
        ended.release()
        return number

    for round in range(1, 4):
        calls = [asyncio.ensure_future(pool.call(functools.partial(work, n))) for n in range(20)]
        await asyncio.sleep(0)  # they are submitted
        for _ in calls:
            assert ended.acquire(timeout=DEADLINE_S)  # the loop stands still
        assert await asyncio.gather(*calls) == list(range(20))
        assert len(woken) <= 5 * round, "more than once only for the last work of each thread"


def test_result_for_a_loop_that_is_closed_is_dropped() -> None:
    pool, work = ThreadPool(4, "test"), Blocking()

    async def leave() -> None:
        for _ in range(2):
            work.call(pool, None)
        while len(work.began) < 2:
            await asyncio.sleep(0.001)

    asyncio.run(leave())
    work.release.set()
    limit = time.monotonic() + DEADLINE_S
    while (pool._shares or pool._ended) and time.monotonic() < limit:
        time.sleep(0.001)
    assert not pool._shares and not pool._ended
    assert asyncio.run(pool.call(lambda: 5)) == 5


class Blocking:
    """Work that holds its thread until it is released."""

    def __init__(self) -> None:
        self.began: list[Any] = []
        self.release = threading.Event()

    def call(self, pool: ThreadPool, owner: Any) -> asyncio.Future[Any]:
        return asyncio.ensure_future(pool.call(functools.partial(self._hold, owner), owner))

    def _hold(self, owner: Any) -> Any:
        self.began.append(owner)
        self.release.wait(DEADLINE_S)
        return owner


async def test_owner_gets_no_more_than_its_share_of_the_threads() -> None:
    pool, work = ThreadPool(8, "test"), Blocking()
    greedy = [work.call(pool, "greedy") for _ in range(20)]
    others = [work.call(pool, each) for each in "abc" for _ in range(2)]
    await until(lambda: len(work.began) == 8)
    assert sorted(work.began) == [*"aabbcc", "greedy", "greedy"]
    work.release.set()
    assert await asyncio.gather(*greedy, *others) == ["greedy"] * 20 + [*"aabbcc"]
    assert work.began.count("greedy") == 20
    await until(lambda: not pool._shares)


async def test_abandoned_work_takes_from_its_owners_share_until_it_ends() -> None:
    pool, work = ThreadPool(8, "test"), Blocking()
    for _ in range(40):  # a client that starts and cancels
        call = work.call(pool, "greedy")
        await asyncio.sleep(0.001)
        call.cancel()
    assert work.began == ["greedy"] * 2
    assert await asyncio.wait_for(pool.call(lambda: "quick", "newcomer"), 1.0) == "quick"
    later = work.call(pool, "greedy")
    await asyncio.sleep(0.01)
    assert work.began == ["greedy"] * 2 and not later.done()
    work.release.set()
    assert await later == "greedy"
    assert work.began == ["greedy"] * 3
    await until(lambda: not pool._shares)


async def test_cancelled_work_that_waited_makes_room_for_its_owners_next() -> None:
    pool, work = ThreadPool(4, "test"), Blocking()
    held = [work.call(pool, each) for each in "abcd"]
    await until(lambda: len(work.began) == 4)
    waiting = [work.call(pool, "e") for _ in range(3)]  # one for a thread, two past the share
    await asyncio.sleep(0)
    for call in (waiting[1], waiting[0]):
        call.cancel()
    await asyncio.sleep(0)
    work.release.set()
    assert await waiting[2] == "e" and work.began == [*"abcde"]
    await asyncio.gather(*held)
    await until(lambda: not pool._shares)


async def test_pool_that_was_closed_holds_nothing_for_what_waited() -> None:
    pool, work = ThreadPool(4, "test"), Blocking()
    calls = [work.call(pool, owner) for owner in [*"abcd", *"eeee"]]
    await until(lambda: len(work.began) == 4)
    pool.close()
    work.release.set()
    for call in calls[4:]:
        call.cancel()
    assert await asyncio.gather(*calls[:4]) == [*"abcd"]
    await until(lambda: not pool._shares)
    pool.open()
    assert await pool.call(lambda: 1, "e") == 1


async def test_client_that_starts_and_cancels_blocking_commands_leaves_threads_to_others() -> None:
    release, began = threading.Event(), []

    def blocks() -> None:
        began.append(1)
        release.wait(DEADLINE_S)

    commands = processor(blocks, any_words, timeout_s=DEADLINE_S)
    greedy = object()
    try:
        for _ in range(40):
            context = Context("client of a connection", owner=greedy)
            task = asyncio.ensure_future(commands.run(commands.prepare("blocks"), context))
            await asyncio.sleep(0.002)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert len(began) == 8  # of 32
        assert await run_line(commands, "any 1", Context("another")) == ["1"]
        waits = asyncio.ensure_future(run_line(commands, "any 1", Context("c", owner=greedy)))
        await asyncio.sleep(0.02)
        assert not waits.done()
    finally:
        release.set()
    assert await waits == ["1"]


async def test_handlers_never_wait_for_threads_that_commands_hold() -> None:
    release = threading.Event()
    commands = processor(lambda: None, max_threads=4, timeout_s=DEADLINE_S)

    def blocks() -> None:
        release.wait(DEADLINE_S)

    commands.command(blocks)
    running = [
        asyncio.ensure_future(run_line(commands, "blocks", Context(owner))) for owner in "abcdef"
    ]
    await asyncio.sleep(0.02)
    handler = as_handler(lambda client, auth: f"{client} comes in", inline=False)
    try:
        call = Call(handler, ["newcomer", {}], {})
        value = await asyncio.wait_for(commands.run(call, Context("newcomer")), 1.0)
        assert value == "newcomer comes in"
    finally:
        release.set()
    await asyncio.gather(*running)


async def floods_progress(context: Context) -> None:
    while True:
        await context.progress(1)


async def floods_yields() -> AsyncIterator[int]:
    while True:
        yield 1


def floods_reports(context: Context) -> None:
    while True:
        context.report(1)


def take(value: Any) -> None:
    """Progress that is sent at once, as by a connection that is written to."""


@pytest.mark.parametrize("flood", [floods_progress, floods_yields, floods_reports])
@pytest.mark.parametrize("send", [None, take])
async def test_flood_of_progress_lets_others_turn_and_ends_at_the_time_limit(
    flood: Any, send: Any
) -> None:
    commands = processor(flood, timeout_s=0.2)
    began, turns = time.monotonic(), 0
    task = asyncio.ensure_future(run_line(commands, flood.__name__, Context(None, send)))
    while not task.done():
        await asyncio.sleep(0)
        turns += 1
    with pytest.raises(CommandTimeout):
        await task
    assert time.monotonic() - began < 1.0 and turns > 100


class Nasty(Exception):
    """Text that nobody can read: it ends whoever asks for it."""

    def __init__(self, end: type[BaseException]) -> None:
        self.end = end

    def __str__(self) -> str:
        raise self.end("from __str__")

    __repr__ = __str__


class Mirror:
    """What looks for a misspelt attribute here does not come back."""

    def __dir__(self) -> list[str]:
        raise SystemExit("from __dir__")


ENDS = [SystemExit, KeyboardInterrupt, asyncio.CancelledError, GeneratorExit, RecursionError]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("level", [logging.INFO, logging.DEBUG])
async def test_command_is_answered_whatever_its_error_does_when_it_is_read(
    end: type[BaseException], level: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(level)

    def in_thread() -> None:
        raise Nasty(end)

    async def on_loop() -> None:
        raise Nasty(end)

    async def yields() -> AsyncIterator[int]:
        yield 1
        raise Nasty(end)

    def misspelt() -> None:
        Mirror().mistake  # type: ignore[attr-defined]  # noqa: B018

    commands = processor(in_thread, on_loop, yields, misspelt, max_threads=1)
    commands.command(inline=True, name="inline")(in_thread)
    for _ in range(2):  # the thread has lived through it
        for line in ["in_thread", "on_loop", "yields"]:
            with pytest.raises(CommandFailed, match="Nasty"):
                await run_line(commands, line)
        with pytest.raises(CommandFailed, match="Nasty"):
            commands.call_inline(commands.prepare("inline"))
        with pytest.raises(CommandFailed, match="no attribute 'mistake'"):
            await run_line(commands, "misspelt")
    assert commands.running == 0 and commands.failed == 10


FORGED = "x\n2026-01-01 12:00:00 ERROR karna_ws: forged\x1b[2J"


async def test_text_of_an_error_forges_no_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def fails() -> None:
        raise ValueError(FORGED)

    class Ill(Service):
        async def check(self) -> None:
            raise Unavailable(FORGED)

    ill = Ill("ill")
    ill.on_change = lambda service: 1 / len(FORGED[:0])  # a callback of ours that fails
    with pytest.raises(CommandFailed):
        await run_line(processor(fails), "fails")
    tasks = Tasks()
    tasks.spawn(fails(), "a task")
    await until(lambda: not tasks.running)
    async with monitoring(ill):
        await until(lambda: ill.state == "degraded")
    lines = [line for record in caplog.records for line in record.getMessage().split("\n")]
    assert sum("forged" in line for line in lines) >= 3  # it is there, and cannot be mistaken
    assert all(line.startswith(("  | ", "service ill is")) for line in lines if "forged" in line)
    assert all(line.isprintable() for line in lines)
    assert not any(record.exc_info for record in caplog.records)


async def test_jobs_that_share_a_limit_expire_each_in_its_own_time() -> None:
    tasks, ended = Tasks(), []

    def start(name: str, seconds: float, limit_s: float) -> None:
        def note(job: Job) -> None:
            ended.append((name, job.is_late))

        tasks.start(lambda: asyncio.sleep(seconds), name, limit_s, note)

    start("late", 60, 0.05)
    start("quick", 0, 0.05)
    start("other limit", 60, 0.01)
    start("later", 60, 0.05)
    await until(lambda: len(ended) == 4)
    assert ended == [("quick", False), ("other limit", True), ("late", True), ("later", True)]
    start("again", 60, 0.05)
    start("ends", 0, 30)
    await until(lambda: len(ended) == 6)
    assert not any(limit._until for limit in tasks._limits.values()), "nothing is kept"
    assert ended.pop(-2) == ("ends", False)
    assert ended[-1] == ("again", True)


def test_limit_forgets_jobs_of_a_loop_that_was_closed() -> None:
    tasks = Tasks()

    async def begin() -> None:
        tasks.start(asyncio.Event().wait, "left", 0.01)
        await asyncio.sleep(0)

    reported: list[Any] = []

    async def go_on() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, one: reported.append(one))
        for _ in range(2):
            job = tasks.start(asyncio.Event().wait, "late", 0.01)
            await job.wait()
            assert job.is_late
        assert not reported

    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin())
    left: Any = tasks.running[0]
    left._log_destroy_pending = False  # that it never ends is what this is about
    loop.close()
    asyncio.run(go_on())


async def test_limit_of_others_holds_whatever_becomes_of_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tasks, expire = Tasks(), Job.expire
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)

    def failing(job: Job) -> None:
        monkeypatch.setattr(Job, "expire", expire)
        raise RuntimeError("once")

    monkeypatch.setattr(Job, "expire", failing)
    jobs = [tasks.start(asyncio.Event().wait, "late", 0.01) for _ in range(2)]
    await jobs[1].wait()
    assert jobs[1].is_late and not jobs[0].is_over
    jobs[0].cancel()
    await until(lambda: jobs[0].is_over)


def test_limit_goes_on_in_the_next_loop() -> None:
    tasks, late = Tasks(), []

    async def serve() -> None:
        tasks.start(lambda: asyncio.sleep(60), "quick", 0.01, lambda job: late.append(job.is_late))
        if not late:
            await tasks.end_all()  # its timer goes with the loop
        else:
            await until(lambda: len(late) == 2)

    asyncio.run(serve())
    asyncio.run(serve())
    assert late == [False, True]
