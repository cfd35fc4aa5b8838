"""Programs of this machine as commands."""

from __future__ import annotations

import asyncio
import shlex
import time
from typing import Any

import pytest

from karna.errors import CommandTimeout
from karna.programs import (
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
    gate, count = asyncio.Event(), 0

    class Watch(ProgramWatch):
        def __init__(self) -> None:
            super().__init__()
            watches.append(self)

    async def send(value: Any) -> None:
        nonlocal count
        count += 1
        await gate.wait()

    monkeypatch.setattr("karna.programs.ProgramWatch", Watch)
    script = "yes 0123456789012345678901234567890123456789 | head -n 30000"
    task = asyncio.ensure_future(shell(script, progress=send))
    await until(lambda: watches and watches[0]._is_paused)
    assert watches[0]._unread < 64 * 1024 + 2 * 256 * 1024  # one read is 256 KiB
    assert count == 1
    gate.set()
    assert (await task)["exit_code"] == 0 and count == 30_000


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
