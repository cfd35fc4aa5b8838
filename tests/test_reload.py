"""`--reload`: the port stays bound, clients come back, mistakes are waited out, nothing hangs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from karna.listen import bind_socket, unlink_socket
from karna.config import Config
from karna.errors import StartError
from karna.watch import MAX_FILES, Watch
from support import SERVER_FILE, until
from support_peers import ask
from support_process import ENVIRONMENT, Karna, answers_on, is_alive, process, run_to_end
from test_program import execute

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs a Unix")

# A parent that looks more often and waits less, so that tests need not wait; its children too.
SCALED = """
import sys, karna.reload
karna.reload.POLL_S, karna.reload.KILL_AFTER_S, karna.reload.LAST_WORD_S = 0.02, 0.5, 0.1
import karna_ws
sys.exit(karna_ws.main(sys.argv[1:]))
"""

PATIENT = SCALED.replace("0.02, 0.5, 0.1", "0.02, 3600, 0.1")

PROGRAM = """\
import os, time
from karna_ws import WebSocketManager
from helper import HELP

manager = WebSocketManager()

@manager.commands.command(inline=True)
def tell() -> list:
    return ["VERSION", HELP, os.getpid()]

@manager.commands.command(inline=True)
def block() -> None:
    print("blocks", flush=True)
    time.sleep(3600)

@manager.commands.command
async def leave(code: int) -> None:
    os._exit(code)
"""


class Edited:
    """A program in a folder, which tests edit, and the server of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "lights.py"
        self.karna: Karna
        self.write("first")
        self.write_helper('HELP = "a"')

    def write(self, version: str, more: str = "") -> None:
        self.replace(self.file, PROGRAM.replace("VERSION", version) + more)

    def write_helper(self, text: str) -> None:
        self.replace(self.folder / "helper.py", text)

    def replace(self, file: Path, text: str) -> None:
        """As an editor does it: nobody sees half of it."""
        (file.with_suffix(".new")).write_text(text)
        file.with_suffix(".new").rename(file)

    async def tell(self) -> list[Any]:
        """The version that answers, its helper's, and its process; whoever answers waits."""
        answer = await ask(self.karna.port, execute("tell"))
        result: list[Any] = answer.json["data"]["result"]
        return result

    async def until_told(self, *wanted: str) -> int:
        """Wait until this version answers; its process."""
        while True:
            with contextlib.suppress(OSError, LookupError, EOFError):  # cut, or refused by who ends
                *told, pid = await self.tell()
                if told == list(wanted):
                    return int(pid)

    async def logs(self, text: str, count: int = 1) -> None:
        await until(lambda: self.karna.log().count(text) >= count)

    def restarts(self) -> int:
        return self.karna.log().count("has changed")


@contextlib.asynccontextmanager
async def reloading(folder: Path, *flags: str, **options: Any) -> AsyncIterator[Edited]:
    edited = Edited(folder)
    flags = (str(edited.file), "--reload", *flags)
    options = {"script": ("-c", SCALED), **options}
    async with process(*flags, **options) as edited.karna:
        yield edited


async def test_change_is_served_on_the_same_port_and_clients_are_told_to_come_back(
    tmp_path: Path,
) -> None:
    async with reloading(tmp_path) as edited:
        first = await edited.until_told("first", "a")
        async with connect(f"ws://127.0.0.1:{edited.karna.port}/ws") as client:
            edited.write("second")
            with pytest.raises(ConnectionClosed):
                while True:
                    await client.recv()
            assert client.close_code == 1012
        second = await edited.until_told("second", "a")
        edited.write_helper('HELP = "b"')  # a module beside it
        third = await edited.until_told("second", "b")
        assert len({first, second, third, edited.karna.pid}) == 4
        await until(lambda: not is_alive(first) and not is_alive(second))
        assert edited.restarts() == 2 and edited.karna.log().count("Karna WS ") == 1
        edited.karna.stop()
        assert await edited.karna.ended() == 0
        assert not is_alive(third) and not answers_on(edited.karna.port)
        assert "Traceback" not in edited.karna.log() and "WARNING" not in edited.karna.log()


async def test_module_that_changes_twice_in_a_second_is_no_old_one_from_a_cache(
    tmp_path: Path,
) -> None:
    """Compiled files are told apart by seconds and size alone."""
    async with reloading(tmp_path, environment={"PYTHONDONTWRITEBYTECODE": ""}) as edited:
        await edited.until_told("first", "a")
        before = os.stat(edited.folder / "helper.py")
        for text in ("b", "c"):
            (edited.folder / "next.py").write_text(f'HELP = "{text}"')
            os.utime(edited.folder / "next.py", ns=(before.st_atime_ns, before.st_mtime_ns))
            (edited.folder / "next.py").rename(edited.folder / "helper.py")
            await edited.until_told("first", text)


async def test_mistake_is_shown_with_its_line_and_who_connects_waits_for_the_mended_file(
    tmp_path: Path,
) -> None:
    async with reloading(tmp_path) as edited:
        await edited.until_told("first", "a")
        edited.write("second", "\nx = (")
        await edited.logs("lights.py, line 20: SyntaxError: '(' was never closed")
        await edited.logs("the server can't start; waiting for a change of its files")
        waiting = asyncio.create_task(edited.tell())
        edited.write_helper("HELP = 1 / 0")
        await edited.logs("waiting for a change", 2)
        edited.write("third")
        await edited.logs("helper.py, line 1: ZeroDivisionError: division by zero")
        assert not waiting.done()
        edited.write_helper('HELP = "c"')
        assert (await waiting)[:2] == ["third", "c"]


async def test_first_start_with_a_mistake_is_waited_out_too(tmp_path: Path) -> None:
    edited = Edited(tmp_path)
    edited.write_helper("HELP = nothing")
    async with process(
        str(edited.file),
        "--reload",
        port=None,
        script=("-c", SCALED),
        environment={"KARNA_PORT": "0"},
    ) as edited.karna:
        await edited.logs("waiting for a change")
        edited.write_helper('HELP = "b"')
        await edited.logs(
            "console "
        )  # the text of the first start comes with the first that serves
        edited.karna.stop(signal.SIGINT)
        assert await edited.karna.ended() == 0


async def test_file_that_never_ends_to_load_is_ended_at_once(tmp_path: Path) -> None:
    async with reloading(tmp_path, script=("-c", PATIENT)) as edited:
        await edited.until_told("first", "a")
        edited.write("second", "\nprint('loads', flush=True)\nwhile True: pass")
        await edited.logs("loads")
        edited.write("third")
        await edited.until_told("third", "a")


async def test_child_that_does_not_end_is_killed(tmp_path: Path) -> None:
    async with reloading(tmp_path, "--grace", "0") as edited:
        first = await edited.until_told("first", "a")
        blocking = asyncio.create_task(ask(edited.karna.port, execute("block")))
        await edited.logs("blocks")
        edited.write("second")
        await edited.until_told("second", "a")
        assert not is_alive(first) and "the server does not end: killed" in edited.karna.log()
        await asyncio.wait([blocking])


async def test_running_command_holds_up_no_reload_and_who_connects_meanwhile_waits(
    tmp_path: Path,
) -> None:
    """--grace is an hour; a reload has a shorter one of its own: a second, not scaled down here."""
    async with reloading(tmp_path, "--grace", "3600", "--log-level", "debug") as edited:
        await edited.until_told("first", "a")
        running = asyncio.create_task(ask(edited.karna.port, execute("countdown 3600")))
        await edited.logs("> execute_command countdown")
        edited.write("second")
        await edited.logs("waiting for 1 command, at most 1 s")
        assert (await edited.tell())[:2] == ["second", "a"]  # and no 503 of the first
        assert b"cancelled" in (await running).body or b"shutting down" in (await running).body


async def test_server_that_ends_by_itself_is_waited_for(tmp_path: Path) -> None:
    async with reloading(tmp_path) as edited:
        await edited.until_told("first", "a")
        leaving = asyncio.create_task(ask(edited.karna.port, execute("leave 3")))
        await edited.logs(
            "the server has ended with exit code 3; waiting for a change of its files"
        )
        edited.write("second")
        await edited.until_told("second", "a")
        await asyncio.wait([leaving])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_signal_ends_all_of_it_quickly(number: int, tmp_path: Path) -> None:
    async with reloading(tmp_path) as edited:
        pid = await edited.until_told("first", "a")
        async with connect(f"ws://127.0.0.1:{edited.karna.port}/ws") as client:
            edited.karna.stop(number)
            with pytest.raises(ConnectionClosed):
                while True:
                    await client.recv()
            assert client.close_code == 1012
        assert await edited.karna.ended() == 0
        assert not is_alive(pid) and not answers_on(edited.karna.port)


async def test_interrupt_from_a_terminal_reaches_both_and_ends_all_with_0(tmp_path: Path) -> None:
    async with reloading(tmp_path, start_new_session=True) as edited:
        pid = await edited.until_told("first", "a")
        os.killpg(edited.karna.pid, signal.SIGINT)
        assert await edited.karna.ended() == 0
        assert not is_alive(pid) and "Traceback" not in edited.karna.log()


async def test_signal_while_a_mistake_is_waited_out_ends_it(tmp_path: Path) -> None:
    async with reloading(tmp_path) as edited:
        await edited.until_told("first", "a")
        edited.write("second", "\nx = (")
        await edited.logs("waiting for a change")
        edited.karna.stop()
        assert await edited.karna.ended() == 0


async def test_second_signal_does_not_wait(tmp_path: Path) -> None:
    environment = {"KARNA_GRACE": "1"}
    async with reloading(tmp_path, script=("-c", PATIENT), environment=environment) as edited:
        pid = await edited.until_told("first", "a")
        blocking = asyncio.create_task(ask(edited.karna.port, execute("block")))
        await edited.logs("blocks")
        edited.karna.stop(signal.SIGTERM)
        edited.karna.stop(signal.SIGINT)
        assert await edited.karna.ended() in (128 + signal.SIGTERM, 128 + signal.SIGINT)
        assert not is_alive(pid)
        await asyncio.wait([blocking])


async def test_child_ends_when_its_parent_was_killed(tmp_path: Path) -> None:
    async with reloading(tmp_path) as edited:
        pid = await edited.until_told("first", "a")
        edited.karna.stop(signal.SIGKILL)
        await edited.karna.ended()
        await until(lambda: not is_alive(pid))
        assert not answers_on(edited.karna.port)


async def test_unix_socket_stays_and_is_gone_at_the_end(tmp_path: Path) -> None:
    path = str(tmp_path / "karna.sock")
    edited = Edited(tmp_path)
    async with process(
        str(edited.file), "--reload", "--unix", path, port=None, script=("-c", SCALED)
    ) as edited.karna:
        edited.karna.port = path  # type: ignore[assignment]
        await edited.until_told("first", "a")
        assert os.stat(path).st_mode & 0o777 == 0o600
        number = os.stat(path).st_ino
        edited.write("second")
        await edited.until_told("second", "a")
        assert os.stat(path).st_ino == number
        edited.karna.stop()
        assert await edited.karna.ended() == 0
        assert not Path(path).exists()  # noqa: ASYNC240


async def test_variable_turns_it_on_and_programs_of_the_child_know_nothing_of_it(
    tmp_path: Path,
) -> None:
    edited = Edited(tmp_path)
    async with process(
        str(edited.file),
        "--allow-program",
        "env",
        script=("-c", SCALED),
        environment={"KARNA_RELOAD": "1"},
    ) as edited.karna:
        await edited.until_told("first", "a")
        answer = await ask(edited.karna.port, execute("env"))
        assert answer.status == 200 and b"_FD" not in answer.body
        edited.write("second")
        await edited.until_told("second", "a")
        assert "means nothing" not in edited.karna.log()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "--reload needs a program: karna_ws.py PROGRAM.py --reload"),
        (
            ("/nowhere/lights.py",),
            "can't read the program /nowhere/lights.py: No such file or directory",
        ),
        (("{file}", "--host", "0.0.0.0"), "--insecure-no-token"),
        (("{file}", "--port", "{taken}"), "is in use; choose another with --port"),
        (("{file}", "--unix", "/nowhere/karna.sock"), "can't listen on /nowhere/karna.sock"),
        (("{file}", "--host", "no-such-host.invalid"), "no-such-host.invalid"),
        (("{file}", "--max-clients", "0"), "--max-clients must be 1 or more"),
    ],
)
def test_what_no_change_of_a_file_can_mend_ends_with_exit_code_2(
    flags: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    file = Edited(tmp_path).file
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run_to_end("--reload", *(flag.format(file=file, taken=port) for flag in flags))
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert said in ended.stderr


# --- What the parent binds -----------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", ""])
def test_parent_binds_what_its_config_says(host: str) -> None:
    config = Config(host=host, port=0, insecure_no_token=True)
    with contextlib.closing(bind_socket(config)) as bound:
        address, port, *_ = bound.getsockname()
        assert address == {"localhost": "127.0.0.1", "": "::"}.get(host, host) and port
        reached = {"": ["127.0.0.1", "::1"]}.get(host, [address])
        for each in reached:
            socket.create_connection((each, port)).close()
        with pytest.raises(StartError, match="is in use; choose another with --port"):
            bind_socket(Config(host=host, port=port, insecure_no_token=True))


def test_parent_binds_the_ipv4_address_of_a_name_that_has_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = [
        (socket.AF_INET6, 1, 6, "", ("::1", 0, 0, 0)),
        (socket.AF_INET, 1, 6, "", ("127.0.0.1", 0)),
    ]
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **options: found)
    with contextlib.closing(bind_socket(Config(host="localhost", port=0))) as bound:
        assert bound.getsockname()[0] == "127.0.0.1"


def test_parent_takes_the_place_of_a_dead_unix_socket_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "karna.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    with contextlib.closing(bind_socket(Config(unix=path))) as bound:
        with pytest.raises(StartError, match="is in use by another server"):
            bind_socket(Config(unix=path))
        unlink_socket(bound)
        unlink_socket(bound)
    assert not os.path.exists(path)


# --- What is watched -----------------------------------------------------------------------------


def touch(path: Path, text: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_watch_sees_what_changes_comes_and_goes(tmp_path: Path) -> None:
    program, helper = touch(tmp_path / "lights.py"), touch(tmp_path / "package" / "deep" / "a.py")
    watch = Watch(program)
    assert watch.change() is None
    before = os.stat(helper)
    touch(helper, "y")  # of the same size
    os.utime(helper, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert watch.change() == helper and watch.change() is None
    new = touch(tmp_path / "b.py")
    assert watch.change() == new and watch.change() is None
    new.unlink()
    assert watch.change() == new
    touch(program, "other"), touch(tmp_path / "a.py")
    assert watch.change() == program, "it is named first"
    program.unlink()
    assert watch.change() == program and watch.change() is None


@pytest.mark.parametrize(
    "path",
    [
        "notes.txt", ".git/hook.py", "__pycache__/lights.py", "node_modules/gyp/a.py",
        ".venv/a.py", "venv/a.py", "env/lib/python3.11/site-packages/a.py", "other/bin/a.py",
    ],
)  # fmt: skip
def test_watch_looks_at_nothing_that_is_no_part_of_the_program(path: str, tmp_path: Path) -> None:
    touch(tmp_path / "other" / "pyvenv.cfg")
    watch = Watch(touch(tmp_path / "lights.py"))
    touch(tmp_path / path)
    assert watch.change() is None


def test_watch_is_bounded_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    program = touch(tmp_path / "zz.py")
    for number in range(MAX_FILES - 1):
        touch(tmp_path / "many" / f"m{number}.py", "")
    watch = Watch(program)
    assert caplog.text == ""
    late = touch(tmp_path / "more" / "late.py")
    assert watch.change() is None and watch.change() is None
    assert caplog.text.count("holds too much: only part of it is watched") == 1
    touch(program, "other"), touch(late, "other")
    assert watch.change() == program


def test_watch_survives_links_in_circles_and_folders_it_may_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("circle", "other", "third"):
        (tmp_path / name).symlink_to(tmp_path)
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere.py")
    (tmp_path / "locked").mkdir(mode=0)
    watch = Watch(touch(tmp_path / "lights.py"))
    assert watch.change() is None
    (tmp_path / "locked").rmdir()
    assert watch.change() is None and caplog.text == ""


def test_server_that_is_no_child_has_no_parent() -> None:
    code = "import karna.reload; print(karna.reload.find_parent())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        cwd=SERVER_FILE.parent,
    )
    assert done.stdout == "None\n"
