"""Programs of this machine as commands (--allow-program).

A program runs without a shell, in a session of its own, so that it ends with all its children.
Nothing outside the process is executed unless allow_program was called. Uses command, context and
errors; imported by services when a program is allowed.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from shutil import which
from typing import Any

from karna.command import Command
from karna.context import Context
from karna.errors import Unavailable, UsageError


def program_command(name: str, path: str | None = None, *, confirm: bool = True) -> Command:
    """Make the program at `path` (by default, `name` on the PATH) a command; ValueError if none.

    confirm: no model runs it before a person has agreed.
    """
    found = which(path or name)
    if found is None:
        raise ValueError(f"no program {path or name!r} that can be executed")
    executable = os.path.abspath(found)

    async def program(context: Context, *argument: str | None) -> dict[str, Any]:
        return await run_program(executable, [str(each) for each in argument], context)

    program.__doc__ = f"""Run the program {name} of the server's machine.

        Its lines are reported as they come. The result has its exit code and its output, of which
        the last {MAX_OUTPUT_CHARS // 1024} Ki characters are kept."""
    return Command(program, name=name, confirm=confirm)


async def run_program(path: str, arguments: Sequence[str], context: Context) -> dict[str, Any]:
    """Run a program to its end, reporting {"stream", "line"} for each line of its output.

    Where lines come faster than REPORTS_A_SECOND, "line" holds several, and the program waits.
    The result is {"exit_code", "output", "truncated"}, and {"signal"} when one ended it (then the
    code is negative). When this coroutine is cancelled the whole process group is ended.
    Raises UsageError for arguments no program can take, Unavailable when it cannot be started.
    """
    loop, devnull = asyncio.get_running_loop(), asyncio.subprocess.DEVNULL
    # Without our secrets: our own variables (token, URLs with passwords), all that is called a key.
    secret = re.compile("KARNA_.*|.*_KEY")
    kept = {name: value for name, value in os.environ.items() if not secret.fullmatch(name)}
    try:
        transport, watch = await loop.subprocess_exec(
            ProgramWatch, path, *arguments, stdin=devnull, env=kept, start_new_session=True
        )
    except ValueError as error:  # a NUL, a lone surrogate
        raise UsageError(f"an argument cannot be passed to a program: {error}") from None
    except OSError as error:
        raise Unavailable(f"cannot start the program: {error.strerror or error}") from None
    _programs.add(transport)
    output, pace = ProgramOutput(), Pace()
    try:
        async for chunks in watch.batches():
            await _report(output.add_all(chunks), pace, context)
        for stream, line in output.rest():
            await _report({stream: [line]}, pace, context)
    finally:
        await _end_program(transport, watch)
    exit_code = transport.get_returncode() or 0
    result = {"exit_code": exit_code, "output": output.kept, "truncated": output.is_truncated}
    if exit_code < 0:
        known = {each.value: each.name for each in signal.Signals}
        result["signal"] = known.get(-exit_code, f"signal {-exit_code}")
    return result


REPORTS_A_SECOND = 20  # of one program; a person reads no faster, and others share the loop
REPORTS_AT_ONCE = 20  # that one which was silent for a second has saved


class Pace:
    """How many reports a program may send now; each second it earns some more."""

    def __init__(self) -> None:
        self._saved: float = REPORTS_AT_ONCE
        self._since = time.monotonic()

    def count_allowed(self) -> int:
        """How many may be sent without waiting."""
        now = time.monotonic()
        earned = (now - self._since) * REPORTS_A_SECOND
        self._saved, self._since = min(self._saved + earned, REPORTS_AT_ONCE), now
        return int(self._saved)

    async def wait(self) -> None:
        """Wait until one more report is allowed, and count it."""
        while not self.count_allowed():
            await asyncio.sleep((1 - self._saved) / REPORTS_A_SECOND)
        self._saved -= 1


async def _report(lines: Mapping[str, list[str]], pace: Pace, context: Context) -> None:
    """Report lines of each stream: one by one, or joined when there are more than is allowed."""
    for stream, found in lines.items():
        for text in found if len(found) <= pace.count_allowed() else _joined(found):
            await pace.wait()
            await context.progress({"stream": stream, "line": text})


def _joined(lines: list[str]) -> Iterator[str]:
    """As many lines together as MAX_LINE_CHARS hold."""
    text, at = "\n".join(lines), 0
    while len(text) - at > MAX_LINE_CHARS:
        end = text.rindex("\n", at, at + MAX_LINE_CHARS + 1)  # no line alone is longer
        yield text[at:end]
        at = end + 1
    yield text[at:]


PIPE_WAIT_S = 1.0  # for pipes that a child of an ended program still holds
MAX_UNREAD_BYTES = 64 * 1024  # of a program's output in memory before reading pauses
CHUNK_BYTES = 1024  # added for each: the pipe itself gathers short ones better


class ProgramWatch(asyncio.SubprocessProtocol):
    """Hears of a program's output and end. Reading pauses while nobody takes the output.

    Not asyncio.create_subprocess_exec: its streams have no public way to let go of a pipe that a
    grandchild holds, and in Python 3.11 its wait() waits for such a pipe.
    """

    def __init__(self) -> None:
        self._transport: Any = None
        self._chunks: list[tuple[int, bytes]] = []
        self._unread = 0
        self._open = {1, 2}
        self._is_paused = self._discards = self._has_exited = False
        self._news = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if self._discards:
            return
        self._chunks.append((fd, data))
        self._unread += len(data) + CHUNK_BYTES
        self._pause(self._unread > MAX_UNREAD_BYTES)
        self._news.set()

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self._open.discard(fd)
        self._news.set()

    def process_exited(self) -> None:
        self._has_exited = True
        self._news.set()

    def _pause(self, paused: bool) -> None:
        if paused == self._is_paused:
            return
        self._is_paused = paused
        for fd in self._open:
            pipe = self._transport.get_pipe_transport(fd)
            pipe.pause_reading() if paused else pipe.resume_reading()

    def discard(self) -> None:
        """Read on to the end of the pipes, but keep nothing."""
        self._discards = True
        self._chunks.clear()
        self._pause(False)

    @property
    def is_over(self) -> bool:
        return self._has_exited and not self._open

    async def batches(self) -> AsyncIterator[list[tuple[str, bytes]]]:
        """All ("stdout" or "stderr", bytes) there are, in order of arrival, until the program ends.

        Children that outlive it and hold its pipes are waited for PIPE_WAIT_S in all.
        """
        patience = PIPE_WAIT_S
        while True:
            while self._chunks:
                chunks, self._chunks, self._unread = self._chunks, [], 0
                yield [("stdout" if fd == 1 else "stderr", data) for fd, data in chunks]
            self._pause(False)
            if self.is_over or patience <= 0:
                return
            began, has_exited = time.monotonic(), self._has_exited
            await self.wait(patience if has_exited else None)
            if has_exited:
                patience -= time.monotonic() - began

    async def wait(self, timeout_s: float | None) -> None:
        """Wait for news of any kind."""
        self._news.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):  # Python 3.11's wait_for can lose a cancellation
                await self._news.wait()


MAX_LINE_CHARS = 64 * 1024  # of a program's output in one progress report
MAX_OUTPUT_CHARS = 256 * 1024  # of a program's output in the result: the last part is kept


class ProgramOutput:
    """Cuts a program's output into lines, and keeps the last part of it."""

    def __init__(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")
        self._decoders = {"stdout": decoder("replace"), "stderr": decoder("replace")}
        self._rest = {"stdout": "", "stderr": ""}
        self.kept = ""
        self.is_truncated = False

    def add_all(self, chunks: Iterable[tuple[str, bytes]]) -> dict[str, list[str]]:
        """The lines of each stream that these chunks complete."""
        lines: dict[str, list[str]] = {}
        for stream, data in chunks:
            lines.setdefault(stream, []).extend(self.add(stream, data))
        return lines

    def add(self, stream: str, data: bytes, final: bool = False) -> list[str]:
        """The lines that `data` completes; a line longer than MAX_LINE_CHARS is split.

        Nothing here is done for each line but by str itself: there may be a flood of them.
        """
        text = self._rest[stream] + self._decoders[stream].decode(data, final)
        *lines, rest = text.replace("\r\n", "\n").split("\n")
        if max(map(len, lines), default=0) > MAX_LINE_CHARS:
            lines = [part for line in lines for part in _cut(line)]
        *more, rest = _cut(rest)
        if final and rest:
            more, rest = [*more, rest], ""
        self._keep(text[: len(text) - len(rest)])
        self._rest[stream] = rest
        return lines + more

    def rest(self) -> list[tuple[str, str]]:
        """The last lines, which no newline ended."""
        return [(stream, line) for stream in self._rest for line in self.add(stream, b"", True)]

    def _keep(self, text: str) -> None:
        self.is_truncated = self.is_truncated or len(self.kept) + len(text) > MAX_OUTPUT_CHARS
        self.kept = (self.kept + text)[-MAX_OUTPUT_CHARS:]


def _cut(line: str) -> list[str]:
    return [line[at : at + MAX_LINE_CHARS] for at in range(0, len(line), MAX_LINE_CHARS)] or [""]


TERM_WAIT_S = 2.0  # between SIGTERM and SIGKILL; below work.CANCEL_WAIT_S, which contains it
KILL_WAIT_S = 0.5  # for the kernel to end it and us to be told


async def _end_program(transport: asyncio.SubprocessTransport, watch: ProgramWatch) -> None:
    """End what is left of a program and its process group: SIGTERM, a bounded wait, SIGKILL."""
    if watch.is_over:
        transport.close()
        _programs.discard(transport)
        return
    watch.discard()
    try:
        for name, wait_s in (("SIGTERM", TERM_WAIT_S), ("SIGKILL", KILL_WAIT_S)):
            _signal_group(transport, name)
            deadline = time.monotonic() + wait_s
            while not watch.is_over and time.monotonic() < deadline:
                await watch.wait(deadline - time.monotonic())
    finally:  # also when this was cancelled; and for children that let go of the pipes
        _signal_group(transport, "SIGKILL")
        transport.close()
        _programs.discard(transport)


_programs: set[asyncio.SubprocessTransport] = set()  # that run, or leave children behind


def kill_programs() -> None:
    """End every program at once, for a process that is about to end itself so."""
    for transport in _programs:
        _signal_group(transport, "SIGKILL")


def _signal_group(transport: asyncio.SubprocessTransport, name: str) -> None:
    if sys.platform == "win32":
        transport.kill()
        return
    with contextlib.suppress(OSError):  # nobody left, or it changed its user
        os.killpg(transport.get_pid(), getattr(signal, name))
