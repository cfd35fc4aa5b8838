"""Programs of one's own: a file that makes `manager` is served, and its mistakes say where they are."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import karna_ws
from karna.command_line import make_manager, make_parser
from karna.errors import StartError
from karna.program import FALLBACK, is_own, load_manager
from karna_ws import WebSocketManager
from support import ROOT, SERVER_FILE
from support_peers import ask, head
from support_process import process, run_to_end

HELLO = '''\
import asyncio

from helper import cups_of

from karna_ws import WebSocketManager, serve

manager = WebSocketManager()


@manager.commands.command
def brew(cups: int = 1) -> dict[str, object]:
    """Make tea."""
    import karna_ws
    import __main__

    return {"made": cups_of(cups), "is_one": karna_ws is __main__, "name": __name__}


if __name__ == "__main__":
    asyncio.run(serve(manager, port=PORT))
'''
HELPER = 'def cups_of(count):\n    return f"{count} cups"\n'


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder for a program; what loading it leaves in this process is taken away again."""
    modules, path = set(sys.modules), list(sys.path)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def written(folder: Path, text: str, name: str = "lights.py") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def execute(line: str) -> bytes:
    body = b'{"command": "%b"}' % line.encode()
    fields = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    return head("POST", "/api/execute_command", fields) + body


async def test_file_is_served_by_the_module_that_runs_with_flags_variables_and_signals(
    folder: Path,
) -> None:
    written(folder, HELPER, "helper.py")
    file = written(folder, HELLO, "hello.py")
    flags = ("--log-level", "debug", "--allow-program", "true", file)
    variables = {"KARNA_MAX_BODY": "100"}
    async with process(*flags, script=(str(SERVER_FILE),), environment=variables) as karna:
        answer = (await ask(karna.port, execute("brew 2"))).json
        assert answer["data"]["result"] == {"made": "2 cups", "is_one": True, "name": "hello"}
        assert (await ask(karna.port, execute("true"))).status == 200
        assert (await ask(karna.port, execute("echo " + "x" * 100))).status == 413
        karna.stop()
        assert await karna.ended() == 0
        assert "SIGTERM: stopping" in karna.log() and "console " in karna.log()


async def test_file_serves_itself_too(folder: Path) -> None:
    written(folder, HELPER, "helper.py")
    text = "import sys\n" + HELLO.replace("PORT", "int(sys.argv[2])")
    async with process(script=(written(folder, text),)) as karna:
        answer = (await ask(karna.port, execute("brew"))).json
        assert answer["data"]["result"] == {"made": "1 cups", "is_one": False, "name": "__main__"}


@pytest.mark.parametrize("file", ["examples/lights.py", "bench/commands.py"])
async def test_programs_of_ours_are_such_files(file: str) -> None:
    async with process(str(ROOT / file), script=(str(SERVER_FILE),)) as karna:
        assert (await ask(karna.port, head("GET", "/health"))).status == 200
        commands = (await ask(karna.port, execute("help"))).json["data"]["result"]["commands"]
        assert {"light", "add"} & {each["name"] for each in commands}


MISTAKES: list[tuple[str, str]] = [
    ("x = 1", "lights.py: it makes no `manager`, such as manager = WebSocketManager()"),
    ("manager = 1", "lights.py: its `manager` is no WebSocketManager but int"),
    (
        "from karna_ws import WebSocketManager\napp = WebSocketManager()",
        "lights.py: the WebSocketManager that it makes must be called `manager`, not `app`",
    ),
    ("\nx = (", "lights.py, line 2: SyntaxError: '(' was never closed"),
    ("\n\nmanger.go()", "lights.py, line 3: NameError: name 'manger' is not defined"),
    ("import nowhere_at_all", "lights.py, line 1: ModuleNotFoundError: No module named 'nowhere_at_all'"),
    ("\nimport helper", "helper.py, line 2: ZeroDivisionError: division by zero"),
    ("import sys\nsys.exit()", "lights.py, line 2: SystemExit"),
    ("import ast\n\nast.parse('x x')", "lights.py, line 3: SyntaxError: invalid syntax"),
    ("def f(x): raise ValueError('a\\nb\\x1b')\nf(1)", "lights.py, line 1: ValueError: a b"),
    (
        "from karna_ws import WebSocketManager\nmanager = WebSocketManager()\n"
        "@manager.commands.command\nasync def f(x: set): ...",
        "lights.py, line 3: TypeError: command f, parameter x: <class 'set'> is no type of an argument",
    ),
    (
        "import asyncio\nfrom karna_ws import WebSocketManager, serve\n"
        "manager = WebSocketManager()\nasyncio.run(serve(manager))",
        "lights.py, line 4: karna_ws.py serves this file: put its own serving under "
        '`if __name__ == "__main__":`',
    ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "complaint"), MISTAKES)
def test_mistake_of_a_file_says_where_it_is_in_one_line(
    text: str, complaint: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    written(folder, "\nx = 1 / 0", "helper.py")
    written(folder, text)
    with pytest.raises(StartError) as caught:
        load_manager("lights.py", WebSocketManager)
    assert str(caught.value).startswith(complaint) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("nowhere.py", None, "can't read the program {}: No such file or directory"),
        (
            "lights.py",
            b"x = '\xff'",
            "{}, line 1: SyntaxError: ",  # which Python 3.14 words anew
        ),
        ("lights.py", b"\0", "{}: SyntaxError: source code string cannot contain null bytes"),
        ("lights.py", b"raise KeyError", "{}, line 1: KeyError\n"),
    ],
)
def test_file_that_fails_ends_with_exit_code_2_and_one_line(
    name: str, text: bytes | None, complaint: str, folder: Path
) -> None:
    if text is not None:
        (folder / name).write_bytes(text)
    ended = run_to_end(str(folder / name))
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert ended.stderr.startswith("karna_ws: " + complaint.format(folder / name))


def test_name_of_a_module_is_never_taken_by_a_program(folder: Path) -> None:
    """A program may be called `calendar.py`: what the library imports later is still its own."""
    text = "from karna_ws import WebSocketManager\nmanager = WebSocketManager()"
    load_manager(written(folder, text, "calendar.py"), WebSocketManager)
    assert "calendar.py" in str(sys.modules[FALLBACK].__file__)
    assert "calendar" not in sys.modules or sys.modules["calendar"] is not sys.modules[FALLBACK]


def test_file_is_its_own_module_for_who_imports_it(folder: Path) -> None:
    written(folder, "import lights\nseen = lights.number", "helper.py")
    text = "from karna_ws import WebSocketManager\nnumber = 5\nimport helper\nmanager = WebSocketManager()"
    manager = load_manager(written(folder, text), WebSocketManager)
    assert sys.modules["helper"].seen == 5 and sys.modules["lights"].manager is manager  # type: ignore[attr-defined]


def test_change_within_a_second_is_no_old_one_from_a_cache(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled files are told apart by seconds and size alone."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    text = "from karna_ws import WebSocketManager\nclass M(WebSocketManager): number = {}\nmanager = M()"
    for number in range(3):
        manager: Any = load_manager(written(folder, text.format(number)), WebSocketManager)
        assert manager.number == number
        del sys.modules["lights"]


def made(*arguments: str) -> WebSocketManager:
    parsed = make_parser("1.0.0").parse_args(arguments)
    manager: WebSocketManager = make_manager(parsed, WebSocketManager)
    return manager


PLAIN = "from karna_ws import WebSocketManager\nmanager = WebSocketManager()\n"
OWN_VISION = (
    "from karna_ws import WebSocketManager\nfrom services import VisionService\n"
    "manager = WebSocketManager(services=[VisionService()])\n"
)


def test_flags_set_up_the_services_of_the_program(folder: Path) -> None:
    urls = ("--vision-url", "http://localhost:11434", "--vision-model", "eye",
            "--language-url", "http://localhost:11435")  # fmt: skip
    services = made(written(folder, PLAIN), *urls).services
    vision, language = services["vision"], services["language"]
    assert isinstance(vision, karna_ws.VisionService) and vision.server is not None
    assert isinstance(language, karna_ws.LanguageService) and language.server is not None
    assert (vision._model, language._model) == ("eye", None)


def test_service_of_the_program_is_left_as_it_is_and_the_log_says_so(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        file = written(folder, OWN_VISION)
        services = made(file, "--vision-url", "http://localhost:11434").services
    assert isinstance(services["vision"], karna_ws.VisionService)
    assert services["vision"].server is None
    assert "--vision-url is not used: the program has its own service" in caplog.text


@pytest.mark.parametrize(
    ("path", "is_so"),
    [
        ("lights.py", True), ("package/deep/room.py", True), ("../other.py", False),
        (".venv/lib/python3.11/site.py", False), ("venv/x.py", False),
        ("env/lib/python3.11/site-packages/x.py", False), ("node_modules/gyp/x.py", False),
        ("<frozen importlib._bootstrap>", False),
    ],
)  # fmt: skip
def test_libraries_are_no_part_of_a_program(path: str, is_so: bool, tmp_path: Path) -> None:
    assert is_own((tmp_path / path).resolve(), tmp_path.resolve()) == is_so


def test_our_own_files_are_no_part_of_a_program_beside_them() -> None:
    ours = [ROOT / "karna_ws.py", ROOT / "services.py", ROOT / "karna" / "hub.py"]
    assert not any(is_own(path, ROOT) for path in ours)
    assert is_own(ROOT / "lights.py", ROOT)
