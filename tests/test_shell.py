"""`python -m karna.client`: what it prints where, its exit codes, Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import json
import math
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest

import karna.client.__main__ as shell
from karna.client.__main__ import (
    ProgressDisplay,
    bar,
    json_line,
    main,
    parse_arguments,
    percent_of,
    run,
)
from karna_ws import WebSocketManager
from support import Gate, failing_manager, served, until
from support_clients import Wire
from support_link import Peer, scripted
from support_peers import TOKEN
from support_process import ENVIRONMENT
from support_property import JSON, PROPERTY, given, st

EVIL = "\x1b]0;owned\x07\x9b2J\r\n\u202e"

needs_terminal = pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")


class Shell:
    """The program as a process, its outputs apart; what it has written so far can be waited for."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.out = self.err = ""

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls, *words: str, stderr: int | None = None, **environment: str
    ) -> AsyncIterator[Shell]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "karna.client", *words,
            env={**ENVIRONMENT, **environment},
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE if stderr is None else stderr,
        )  # fmt: skip
        program = cls(process)
        try:
            yield program
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def line(self) -> Any:
        """The next line of stdout, which is JSON."""
        assert self.process.stdout is not None
        text = (await self.process.stdout.readline()).decode()
        self.out += text
        return json.loads(text)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    async def ended(self) -> int:
        """Wait for its end; the exit code."""
        out, err = await self.process.communicate()
        self.out += out.decode()
        self.err += (err or b"").decode()
        assert "Traceback" not in self.err
        assert self.process.returncode is not None
        return self.process.returncode


async def ran(port: int, *words: str, **environment: str) -> tuple[int, str, str]:
    """Run it to its end: exit code, stdout, stderr."""
    async with Shell.open("--url", f"ws://127.0.0.1:{port}", *words, **environment) as program:
        return await program.ended(), program.out, program.err


# --- what it shows -----------------------------------------------------------------------------


@given(JSON | st.text(), st.sampled_from(["utf-8", "ascii", "latin-1"]))
@PROPERTY
def test_json_line_is_json_that_a_terminal_shows(value: Any, encoding: str) -> None:
    line = json_line(value, encoding)
    assert line.isprintable()
    assert json.loads(line.encode(encoding).decode(encoding)) == value


def test_json_line_escapes_what_a_terminal_would_obey() -> None:
    assert json_line("a\x1b[2J\x9b1m\u202e😀ü", "utf-8") == r'"a\u001b[2J\u009b1m\u202e😀ü"'
    assert json_line("😀ü", "ascii") == r'"\ud83d\ude00\u00fc"'


@given(JSON | st.fixed_dictionaries({"percent": st.floats() | st.integers() | JSON}))
@PROPERTY
def test_percent_is_a_number_that_a_bar_can_show(progress: Any) -> None:
    percent = percent_of(progress)
    if percent is None:
        return
    assert math.isfinite(percent) and 0 <= percent <= 100
    shown = bar(percent)
    assert len(shown) == len(bar(0)) and shown.count("#") + shown.count(".") >= shell.BAR_CELLS


@pytest.mark.parametrize(
    ("progress", "percent"),
    [
        ({"percent": 0}, 0), ({"percent": 12.5, "lamp": "hall"}, 12.5), ({"percent": 100}, 100),
        ({"percent": 101}, None), ({"percent": -1}, None), ({"percent": True}, None),
        ({"percent": "50"}, None), ({"percent": math.nan}, None), ({}, None), (50, None),
        ("percent", None), (None, None), (["percent"], None), ({"percent": 10**400}, None),
    ],
)  # fmt: skip
def test_percent_is_found(progress: Any, percent: float | None) -> None:
    assert percent_of(progress) == percent


def test_bar_grows() -> None:
    assert bar(0) == f"[{'.' * 30}]   0.0 %"
    assert bar(50) == f"[{'#' * 15}{'.' * 15}]  50.0 %"
    assert bar(100) == f"[{'#' * 30}] 100.0 %"


class Terminal(io.StringIO):
    """A terminal that remembers what was written; `gone` is one that was closed."""

    gone = False

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.gone:
            raise OSError(errno.EIO, "the terminal has gone")
        return super().write(text)


def test_display_leaves_the_line_of_its_bar_before_another() -> None:
    terminal = Terminal()
    display = ProgressDisplay(terminal)
    for progress in ({"percent": 0}, {"percent": 50}, "grinding" + EVIL, {"a": 1}, {"percent": 60}):
        display.show(progress)
    display.finish()
    display.finish()
    first, text, other, last, rest = terminal.getvalue().split("\n")
    assert (first, other, last, rest) == (f"\r{bar(0)}\r{bar(50)}", '{"a":1}', f"\r{bar(60)}", "")
    assert text.startswith("grinding ]0;owned 2J") and text.isprintable()
    terminal.gone = True
    display.show("nobody sees this")  # and the command goes on


async def test_run_does_one_thing(capsys: pytest.CaptureFixture[str]) -> None:
    manager = WebSocketManager()
    async with served(manager) as server:
        url = f"ws://127.0.0.1:{server.port}"
        await run(parse_arguments(["--url", url, "echo", "hi"]))
        assert capsys.readouterr() == ('"hi"\n', "")
        await run(parse_arguments(["--url", url, "--status"]))
        assert "command" in json.loads(capsys.readouterr().out)
        listening = asyncio.create_task(run(parse_arguments(["--url", url, "--listen"])))
        await until(lambda: manager.raw)
        manager.broadcast("tick", 1)
        printed = ""
        while not (printed := printed + capsys.readouterr().out):
            await asyncio.sleep(0)
        listening.cancel()
        assert {**json.loads(printed), "offset": ""} == {"type": "tick", "data": 1, "offset": ""}
        with pytest.raises(asyncio.CancelledError):
            await listening


async def test_run_that_is_cancelled_waits_for_the_answer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    async with served(manager) as server:
        words = ["--url", f"ws://127.0.0.1:{server.port}", "gate a"]
        running = asyncio.create_task(run(parse_arguments(words)))
        await until(lambda: gate.begun)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert gate.cancelled == ["a"] and capsys.readouterr().out == ""


# --- one command -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "out", "error"),
    [
        (["echo hi"], 0, '"hi"\n', ""),
        (["echo", "a", "b"], 0, '"a b"\n', ""),
        (["--", "echo", "x"], 0, '"x"\n', ""),
        (["echo", "'a  b'"], 0, '"a  b"\n', ""),
        (["give huge"], 1, "", "command_failed: the result can't be encoded"),
        (["ecko hi"], 1, "", "unknown_command: no command 'ecko'; did you mean echo?"),
        (["countdown"], 1, "", "usage: "),
        (["fail", "value"], 1, "", "command_failed: no luck"),
    ],
)
async def test_command_prints_its_result_or_one_line(
    words: list[str], code: int, out: str, error: str
) -> None:
    async with served(failing_manager()) as server:
        found, printed, complaint = await ran(server.port, *words)
    assert (found, printed) == (code, out)
    assert complaint.count("\n") == bool(error)
    assert complaint.startswith(f"karna.client: {error}" if error else "")


async def test_result_is_printed_where_the_terminal_knows_few_characters() -> None:
    async with served() as server:
        found = await ran(server.port, "echo ü😀", PYTHONIOENCODING="ascii")
    assert found == (0, '"\\u00fc\\ud83d\\ude00"\n', "")


async def test_status_is_printed() -> None:
    async with served() as server:
        code, out, complaint = await ran(server.port, "--status")
    assert (code, complaint) == (0, "")
    assert {"vision", "language", "command"} <= set(json.loads(out))


@pytest.mark.parametrize(
    "words",
    [[], [" "], ["--status", "echo"], ["--listen", "echo"], ["--status", "--listen"], ["--nope"]],
)
def test_usage_is_shown_when_nothing_or_too_much_is_asked(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "python -m karna.client: error: " in capsys.readouterr().err


def test_options_stand_before_the_command() -> None:
    found = parse_arguments(["--url", "ws://a", "light", "hall", "--url", "x", "--", "-y"])
    assert (found.url, found.line) == ("ws://a", "light hall --url x -- -y")
    assert parse_arguments(["--", "--odd"]).line == "--odd"


def test_help_tells_what_is_printed_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for told in ("JSON", "KARNA_TOKEN", "130 Ctrl-C", "1 the command failed", "--listen"):
        assert told in text


async def test_server_that_is_away_or_wrong_is_one_line() -> None:
    async with served() as server, Wire(server.port) as wire:
        wire.cut()
        code, out, complaint = await ran(wire.port, "echo hi")
        assert (code, out) == (2, "")
        assert re.fullmatch(r"karna.client: cannot connect to ws://[^\n]*\n", complaint)


def test_url_that_is_wrong_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", "localhost:8000", "echo"]) == 2
    complaint = "karna.client: the server's URL looks like ws://localhost:8000/ws\n"
    assert capsys.readouterr().err == complaint


async def test_token_comes_from_the_environment_and_is_never_shown() -> None:
    async with served(token=TOKEN) as server:
        assert await ran(server.port, "echo in", KARNA_TOKEN=TOKEN) == (0, '"in"\n', "")
        for given_token in ("", "wrong-token"):
            code, out, complaint = await ran(server.port, "echo in", KARNA_TOKEN=given_token)
            assert (code, out) == (2, "") and "401" in complaint
            assert "wrong-token" not in complaint and complaint.count("\n") == 1


async def test_connection_that_breaks_is_one_line_and_no_second_try() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    async with (
        served(manager) as server,
        Wire(server.port) as wire,
        Shell.open("--url", f"ws://127.0.0.1:{wire.port}", "gate a") as program,
    ):
        await until(lambda: gate.begun)
        wire.cut()
        assert await program.ended() == 2
    assert "may have been executed" in program.err and program.err.count("\n") == 1
    assert gate.begun == ["a"]


async def test_nothing_of_the_server_reaches_the_terminal_as_a_command() -> None:
    async def result(peer: Peer) -> None:
        await peer.welcome()
        await peer.answer({"result": {EVIL: EVIL}})

    async def error(peer: Peer) -> None:
        await peer.welcome()
        await peer.answer({"code": EVIL, "message": EVIL}, type="error")

    async def refusal(peer: Peer) -> None:
        await peer.close(1008, EVIL)

    for script, expected in ((result, 0), (error, 1), (refusal, 2)):
        async with scripted(script) as port:
            code, out, complaint = await ran(port, "brew")
        assert code == expected
        assert (out + complaint).count("\n") == 1
        assert (out + complaint).replace("\n", "").isprintable()
        if out:
            assert json.loads(out) == {EVIL: EVIL}


# --- progress on a terminal --------------------------------------------------------------------


async def read_terminal(master: int) -> str:
    """All that was written to a pseudo-terminal, once its other side is closed."""
    written = b""
    with contextlib.suppress(OSError):  # how Linux says that it is closed
        while more := await asyncio.to_thread(os.read, master, 65536):
            written += more
    return written.decode()


@contextlib.contextmanager
def terminal() -> Any:
    master, slave = os.openpty()
    try:
        yield master, slave
    finally:
        os.close(master)


@needs_terminal
async def test_progress_is_a_bar_and_lines_on_a_terminal() -> None:
    manager = WebSocketManager()

    @manager.commands.command
    async def brew(cups: int) -> AsyncIterator[Any]:
        yield {"percent": 0}
        yield {"percent": 50, "cups": cups}
        yield "grinding" + EVIL
        yield {"step": 1, "note": EVIL}
        yield {"percent": 100}
        yield {"cups": cups}

    async with served(manager) as server:
        with terminal() as (master, slave):
            url = f"ws://127.0.0.1:{server.port}"
            async with Shell.open("--url", url, "brew 2", stderr=slave) as program:
                os.close(slave)
                shown, code = await asyncio.gather(read_terminal(master), program.ended())
    assert code == 0 and json.loads(program.out) == {"cups": 2}
    lines = shown.split("\r\n")
    assert lines[0] == f"\r{bar(0)}\r{bar(50)}"
    assert lines[1].startswith("grinding ]0;owned 2J") and lines[2].startswith('{"step":1,"note":"')
    assert lines[3] == f"\r{bar(100)}"
    assert lines[4].startswith('{"cups":2}') and lines[5:] == [""]  # a report as the result is
    assert all(line.replace("\r", "").isprintable() for line in lines)


@needs_terminal
async def test_error_stands_below_the_bar() -> None:
    manager = WebSocketManager()

    @manager.commands.command
    async def spill() -> AsyncIterator[Any]:
        yield {"percent": 20}
        raise ValueError("spilt")

    async with served(manager) as server:
        with terminal() as (master, slave):
            url = f"ws://127.0.0.1:{server.port}"
            async with Shell.open("--url", url, "spill", stderr=slave) as program:
                os.close(slave)
                shown, code = await asyncio.gather(read_terminal(master), program.ended())
    assert (code, program.out) == (1, "")
    assert shown == f"\r{bar(20)}\r\nkarna.client: command_failed: spilt\r\n"


async def test_progress_is_not_shown_where_there_is_no_terminal() -> None:
    async with served() as server:
        assert await ran(server.port, "countdown 0") == (0, '{"remaining":0,"percent":100}\n', "")


# --- Ctrl-C ------------------------------------------------------------------------------------


async def test_ctrl_c_cancels_the_command_and_waits_for_its_answer() -> None:
    happened: list[str] = []
    begun = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.welcome()
        request = await peer.next()
        begun.set()
        cancel = await peer.next()
        assert (cancel["method"], cancel["params"]) == ("cancel", {"id": request["id"]})
        happened.append("cancel came")
        await peer.send({"type": "command_response", "data": {}, "id": cancel["id"]})
        await peer.connection.ping()
        assert not closed.done()
        happened.append("still there")
        error = {"code": "cancelled", "message": "cancelled"}
        await peer.send({"type": "error", "data": error, "id": request["id"]})
        happened.append(f"closed {await peer.closed()}")

    closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    async with (
        scripted(script) as port,
        Shell.open("--url", f"ws://127.0.0.1:{port}", "brew") as program,
    ):
        await begun.wait()
        program.interrupt()
        assert await program.ended() == 130
    assert (program.out, program.err) == ("", "karna.client: interrupted\n")
    assert happened == ["cancel came", "still there", "closed 1000"]


async def test_ctrl_c_ends_the_command_on_a_real_server() -> None:
    manager = WebSocketManager()
    gate = Gate(manager)
    async with served(manager) as server:
        async with Shell.open("--url", f"ws://127.0.0.1:{server.port}", "gate a") as program:
            await until(lambda: gate.begun)
            program.interrupt()
            assert await program.ended() == 130
        assert gate.cancelled == ["a"]


async def test_second_ctrl_c_ends_at_once() -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def stubborn(peer: Peer) -> None:
        await peer.welcome()
        await peer.next()
        begun.set()
        await peer.next("cancel")
        cancelled.set()
        await peer.connection.wait_closed()

    loop = asyncio.get_running_loop()
    async with (
        scripted(stubborn) as port,
        Shell.open("--url", f"ws://127.0.0.1:{port}", "brew") as program,
    ):
        await begun.wait()
        program.interrupt()
        await cancelled.wait()
        before = loop.time()
        program.interrupt()
        assert await program.ended() == -signal.SIGINT  # which shells call 130
        assert loop.time() - before < shell.CANCEL_WAIT_S / 2


async def test_ctrl_c_while_it_connects() -> None:
    arrived = asyncio.Event()

    async def silent(peer: Peer) -> None:
        await peer.next()
        arrived.set()
        await peer.closed()

    async with (
        scripted(silent) as port,
        Shell.open("--url", f"ws://127.0.0.1:{port}", "brew") as program,
    ):
        await arrived.wait()
        program.interrupt()
        assert await program.ended() == 130
    assert program.err == "karna.client: interrupted\n"


# --- broadcasts --------------------------------------------------------------------------------


async def test_listen_prints_broadcasts_as_they_come() -> None:
    manager = WebSocketManager()
    async with (
        served(manager, history_messages=1) as server,
        Wire(server.port) as wire,
        Shell.open("--url", f"ws://127.0.0.1:{wire.port}", "--listen") as program,
    ):
        await until(lambda: manager.raw)
        manager.notify("Tea " + EVIL)
        found = await program.line()
        assert found["data"]["message"] == "Tea " + EVIL
        assert set(found) == {"type", "data", "offset"}
        wire.cut()
        await until(lambda: not manager.raw)
        manager.notify("missed")
        manager.notify("missed too")
        wire.mend()
        gap = await program.line()
        assert (gap["type"], gap["data"]["code"]) == ("gap", "history_gap")
        manager.notify("after")
        assert (await program.line())["data"]["message"] == "after"
        program.interrupt()
        assert await program.ended() == 130
    assert "the connection ended (1006)" in program.err and "connected again" in program.err
    assert program.out.replace("\n", "").isprintable()


async def test_listen_ends_quietly_when_nobody_reads() -> None:
    manager = WebSocketManager()
    async with (
        served(manager) as server,
        Shell.open("--url", f"ws://127.0.0.1:{server.port}", "--listen") as program,
    ):
        await until(lambda: manager.raw)
        manager.notify("read")
        await program.line()
        program.process._transport.get_pipe_transport(1).close()  # type: ignore[attr-defined]
        manager.notify("not read")
        assert await program.ended() == 141
    assert program.err == ""


async def test_listen_ends_when_it_is_refused() -> None:
    async with served(token=TOKEN) as server:
        code, out, complaint = await ran(server.port, "--listen")
    assert (code, out) == (2, "") and "401" in complaint and complaint.count("\n") == 1
