"""Threads and tasks of commands: bounded, owned, ended."""

from __future__ import annotations

import asyncio
import contextvars
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

import services
from karna.errors import CommandTimeout
from karna_ws import WebSocketManager
from services import CommandFailed, Context, Unavailable
from support import DEADLINE_S, execute, served, until
from support_commands import any_words, hang, processor, run_line
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
