"""Programs of this machine as commands."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import time
from pathlib import Path
from typing import Any

import pytest

from karna.errors import CommandTimeout
from karna import programs
from karna.programs import (
    MAX_LINE_CHARS,
    MAX_UNREAD_BYTES,
    REPORTS_A_SECOND,
    REPORTS_AT_ONCE,
    ProgramOutput,
    ProgramWatch,
    run_program,
)
from services import CommandProcessor, Context, Unavailable, UsageError
from support import DEADLINE_S, until
from support_commands import run_line
from support_process import is_alive
from support_property import given, settings, st


def with_shell(**options: Any) -> CommandProcessor:
    commands = CommandProcessor(builtins=False, **options)
    commands.allow_program("sh")
    return commands


async def shell(script: str, *words: str, progress: Any = None, **options: Any) -> Any:
    line = shlex.join(["sh", "-c", script, "sh", *words])
    return await run_line(with_shell(**options), line, Context(None, progress))


async def test_program_streams_lines_and_returns_output() -> None:
    seen: list[Any] = []
    result = await shell(
        "echo one; echo two >&2; printf 'thr\\303\\251e\\377\\r\\n'; printf four; exit 3",
        progress=seen.append,
    )
    assert sorted(map(str, seen)) == sorted(map(str, [
        {"stream": "stdout", "line": "one"}, {"stream": "stderr", "line": "two"},
        {"stream": "stdout", "line": "thrée\ufffd"}, {"stream": "stdout", "line": "four"}]))  # fmt: skip
    assert (result["exit_code"], result["truncated"], "signal" in result) == (3, False, False)
    assert sorted(result["output"].splitlines()) == ["four", "one", "thrée\ufffd", "two"]


@settings(max_examples=10, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8),
        max_size=4,
    )
)
def test_program_gets_arguments_exactly(words: list[str]) -> None:
    script = "for a; do printf '%s\\0' \"$a\"; done"
    result = asyncio.run(shell(script, *words))
    assert result["output"] == "".join(word + "\0" for word in words)


async def test_program_has_no_stdin_and_none_of_our_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ["KARNA_TOKEN", "OPENAI_API_KEY", "KARNA_VISION_KEY", "KARNA_BACKPLANE"]:
        monkeypatch.setenv(name, "hush")
    monkeypatch.setenv("HARMLESS", "kept")
    result = await shell("cat; env")
    assert "hush" not in result["output"] and "HARMLESS=kept" in result["output"]


async def test_program_output_is_bounded_and_long_lines_are_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []
    result = await shell(
        "head -c 150000 /dev/zero | tr '\\0' x; echo; i=0; while [ $i -lt 3 ]; do head -c 70000 /dev/zero | tr '\\0' y; echo; i=$((i+1)); done; echo end",
        progress=seen.append,
    )
    lengths = [len(each["line"]) for each in seen]
    assert max(lengths) <= 64 * 1024 and sum(lengths) == 150_000 + 210_000 + 3
    assert result["truncated"] is True and result["output"].endswith("yyy\nend\n")
    assert len(result["output"]) == 256 * 1024


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["stdout", "stderr"]),
            st.binary(max_size=12) | st.sampled_from([b"\n", b"\r\n", "é€".encode()]),
        ),
        max_size=12,
    )
)
def test_program_output_loses_nothing_however_it_is_cut(chunks: list[tuple[str, bytes]]) -> None:
    output = ProgramOutput()
    lines: dict[str, list[str]] = {"stdout": [], "stderr": []}
    for stream, data in chunks:
        lines[stream] += output.add(stream, data)
    for stream, line in output.rest():
        lines[stream].append(line)
    for stream in lines:
        text = b"".join(data for name, data in chunks if name == stream).decode("utf-8", "replace")
        expected = [line.removesuffix("\r") for line in text.split("\n")]
        last = text.split("\n")[-1]
        assert lines[stream] == expected[:-1] + ([last] if last else [])


def test_program_output_keeps_no_more_than_its_bound_in_memory() -> None:
    output = ProgramOutput()
    for data in [b"x" * 60_000 + b"\n", b"\n", b"y" * 200_000] * 100:
        output.add("stdout", data)
        assert len(output.kept) <= 256 * 1024
        assert len(output._rest["stdout"]) <= 64 * 1024


async def test_program_is_not_read_while_client_does_not_and_loses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watches: list[Any] = []
    gate, lines = asyncio.Event(), []

    class Watch(ProgramWatch):
        def __init__(self) -> None:
            super().__init__()
            watches.append(self)

    async def send(value: Any) -> None:
        lines.append(value["line"])
        await gate.wait()

    monkeypatch.setattr("karna.programs.ProgramWatch", Watch)
    script = "yes 0123456789012345678901234567890123456789 | head -n 30000"
    task = asyncio.ensure_future(shell(script, progress=send))
    await until(lambda: lines and watches[0]._is_paused)
    assert watches[0]._unread < 64 * 1024 + 2 * 256 * 1024  # one read is 256 KiB
    assert len(lines) == 1
    gate.set()
    assert (await task)["exit_code"] == 0
    assert "\n".join(lines).split("\n") == ["0123456789" * 4] * 30_000


async def test_program_blocked_in_writing_is_ended_by_term_alone() -> None:
    lines: asyncio.Queue[Any] = asyncio.Queue(1)  # a client that takes one line
    task = asyncio.ensure_future(shell("yes; echo never", progress=lines.put))
    await until(lambda: lines.full())
    began = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - began < 2.0


async def test_program_is_killed_when_its_ending_is_cancelled() -> None:
    lines: asyncio.Queue[Any] = asyncio.Queue()
    call = with_shell().prepare(
        shlex.join(["sh", "-c", "trap '' TERM; sleep 60 & echo $!; wait; sleep 60"])
    )
    program = run_program("/bin/sh", call.args, Context(None, lines.put_nowait))
    task = asyncio.ensure_future(program)
    pid = int((await lines.get())["line"])
    for _ in range(2):  # the second comes while it waits for SIGTERM to work
        task.cancel()
        await asyncio.sleep(0.05)
    assert task.cancelled()
    await until(lambda: not is_alive(pid))


async def test_program_ended_by_signal_names_it() -> None:
    result = await shell("kill -KILL $$")
    assert (result["exit_code"], result["signal"]) == (-9, "SIGKILL")
    result = await shell("kill -35 $$")  # a real-time signal, which has no name
    assert (result["exit_code"], result["signal"]) == (-35, "signal 35")


@pytest.mark.parametrize("trap", ["", "trap '' TERM;"], ids=["ends at TERM", "ignores TERM"])
@pytest.mark.parametrize("how", ["cancel", "timeout", "stop"])
async def test_program_is_ended_with_its_whole_group(
    how: str, trap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("karna.programs.TERM_WAIT_S", 0.1)
    lines: asyncio.Queue[Any] = asyncio.Queue()
    commands = with_shell(timeout_s=0.3 if how == "timeout" else DEADLINE_S)
    line = shlex.join(["sh", "-c", f"{trap} sleep 60 & echo $!; echo $$; wait; sleep 60"])
    task = asyncio.ensure_future(
        commands.run(commands.prepare(line), Context(None, lines.put_nowait))
    )
    pids = [int((await lines.get())["line"]) for _ in range(2)]
    assert all(map(is_alive, pids))
    if how == "cancel":
        task.cancel()
    if how == "stop":
        await commands.stop()
    with pytest.raises(
        {"cancel": asyncio.CancelledError, "timeout": CommandTimeout, "stop": Unavailable}[how]
    ):
        await task
    await until(lambda: not any(map(is_alive, pids)))


async def test_program_whose_child_holds_pipe_does_not_hang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("karna.programs.PIPE_WAIT_S", 0.05)
    monkeypatch.setattr("karna.programs.TERM_WAIT_S", 0.1)
    result = await shell("sleep 60 & echo $!")
    assert result["exit_code"] == 0
    await until(lambda: not is_alive(int(result["output"])))


async def test_program_refuses_what_cannot_be_passed_or_started(tmp_path: Any) -> None:
    commands = with_shell()
    for word in ["a\0b", "\ud800"]:
        with pytest.raises(UsageError, match="cannot be passed"):
            await run_line(commands, "sh", argument=[word])
    gone = tmp_path / "tool"
    gone.write_text("#!/bin/sh\n")
    gone.chmod(0o755)
    commands.allow_program("tool", str(gone))
    assert commands.commands["tool"].usage == "tool [ARGUMENT]..."
    gone.unlink()
    with pytest.raises(Unavailable, match="No such file"):
        await run_line(commands, "tool")
    for name, path in [("nothing-of-this-name", None), ("x", str(tmp_path / "none"))]:
        with pytest.raises(ValueError, match="no program"):
            commands.allow_program(name, path)


async def test_what_a_program_prints_late_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    # The wait is for pipes that others hold once it has ended. 0.0 starts; 0.05 the wait would be
    # over; 0.3 prints. Both streams; the program's own child holds them, too, while it runs.
    monkeypatch.setattr("karna.programs.PIPE_WAIT_S", 0.05)
    seen: list[Any] = []
    script = "echo early; sleep 0.3; echo late; echo late >&2; (sleep 0.02; echo child) & exit 0"
    result = await shell(script, progress=seen.append)
    assert result["exit_code"] == 0 and "signal" not in result
    assert sorted(result["output"].split()) == ["child", "early", "late", "late"]
    assert seen[0]["line"] == "early" and len(seen) == 4


class Witness:
    """How long others have to wait for their turn of the loop."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    async def watch(self) -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0.001)
            self.waits.append(time.perf_counter() - began - 0.001)


async def flood(script: str, seconds: float, progress: Any = None) -> tuple[list[Any], list[float]]:
    """The reports of a program that never ends, with the time of each; how long others waited."""
    seen: list[Any] = []
    witness = Witness()
    watching = asyncio.ensure_future(witness.watch())
    began = time.monotonic()
    task = asyncio.ensure_future(shell(script, progress=lambda value: seen.append(value)))
    while time.monotonic() < began + seconds:
        await asyncio.sleep(0.01)
    for each in (task, watching):
        each.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await each
    return seen, witness.waits


@pytest.mark.parametrize(
    "script",
    ["yes", "yes ''", "yes 'x\r'", "while :; do echo out; echo err >&2; done",
     "yes & yes >&2", "tr '\\0' x </dev/zero", "while :; do printf x; done"],
)  # fmt: skip
async def test_flood_of_output_is_joined_and_holds_up_nobody(script: str) -> None:
    seen, waits = await flood(script, 1.0)
    assert len(seen) <= REPORTS_AT_ONCE + 1.5 * REPORTS_A_SECOND  # 45,000 of `yes` in a second
    assert max(len(each["line"]) for each in seen or [{"line": ""}]) <= MAX_LINE_CHARS
    assert sorted(waits)[len(waits) // 2] < 0.002  # a turn of the loop: 0.2 ms


async def test_joined_lines_lose_nothing_and_come_before_the_result() -> None:
    seen: list[Any] = []
    result = await shell("seq 40000; printf end", progress=seen.append)
    text = "\n".join(each["line"] for each in seen)
    assert text.split("\n") == [*map(str, range(1, 40_001)), "end"]
    assert len(seen) < 40 and result["output"].endswith("\n39999\n40000\nend")
    assert result["truncated"] is False


async def test_lines_that_come_slowly_are_reported_one_by_one_at_once(tmp_path: Path) -> None:
    """The program goes on when its line has been reported, no sooner."""
    seen: list[str] = []

    def report(value: dict[str, Any]) -> None:
        seen.append(value["line"])
        (tmp_path / value["line"]).touch()

    wait = f"while [ ! -e {tmp_path}/a$i ]; do sleep 0.005; done"
    await shell(f"for i in 1 2 3 4 5; do echo a$i; {wait}; done", progress=report)
    assert seen == ["a1", "a2", "a3", "a4", "a5"]


async def test_program_is_not_read_faster_than_it_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    most = 0
    received = programs.ProgramWatch.pipe_data_received

    def receive(watch: Any, fd: int, data: bytes) -> None:
        nonlocal most
        received(watch, fd, data)
        most = max(most, sum(len(data) for _, data in watch._chunks))

    monkeypatch.setattr(programs.ProgramWatch, "pipe_data_received", receive)
    await flood("yes", 0.5)
    assert most <= MAX_UNREAD_BYTES + 256 * 1024  # one read more


def test_program_that_takes_the_place_of_a_built_in_command_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    commands = CommandProcessor()
    commands.allow_program("true")
    assert caplog.text == ""
    commands.allow_program("echo")
    assert "the program echo takes the place of the built-in command" in caplog.text
    with pytest.raises(ValueError, match="there is a command 'echo' already"):
        commands.allow_program("echo")
