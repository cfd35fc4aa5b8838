"""What README.md and karna/README.md show is what happens.

python tests/real/test_readme.py        prints the list of rooms for karna/README.md
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[number]) for number in (1, 2)]

import orjson
import pytest

from karna.calls import Client
from karna.command import Command
from karna.command_line import make_parser
from karna_ws import Config, WebSocketManager, serving
from services import CommandProcessor, Context, Service
from support import ROOT, Raw, needs, served
from support_clients import copy_server, program, running
from test_house import FILES, graph


README = (ROOT / "README.md").read_text()
ROOMS = (ROOT / "karna" / "README.md").read_text()
PAGES = {"README.md": README, "karna/README.md": ROOMS}


def blocks(language: str, page: str = README) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


def pattern_of(line: str) -> re.Pattern[str]:
    """A line of a page as a pattern: `...` stands for anything."""
    return re.compile(".*".join(map(re.escape, line.split("..."))))


def test_pages_show_what_is_tested_here() -> None:
    assert [block.startswith(">") for block in blocks("text")] == [True]
    assert [block.startswith(">") for block in blocks("text", ROOMS)] == [False, True]
    assert len(blocks("python")) == 3 and len(blocks("python", ROOMS)) == 1
    assert len(blocks("typescript")) == 2 and len(blocks("typescript", ROOMS)) == 2
    assert len(console_sessions()) == 6


# --- What is typed, and what comes out ---------------------------------------------------------


HELLO, CLIENT, HOME = blocks("python")


@contextlib.asynccontextmanager
async def served_as_shown(folder: Path, source: str, name: str) -> AsyncIterator[int]:
    """The port of `python karna_ws.py FILE` in a folder with what one copies, and no more."""
    copy_server(folder)
    (folder / name).write_text(source)
    words = (sys.executable, "karna_ws.py", name, "--port", "0")
    ready = r"raw +ws://localhost:(\d+)/ws"
    async with program(*words, ready=ready, cwd=folder, env=clean_environment()) as match:
        yield int(match[1])


def clean_environment() -> dict[str, str]:
    """A program finds only what lies beside it."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def console_sessions() -> list[tuple[str, list[str]]]:
    """(command, lines that must come out) of every console block."""
    sessions: list[tuple[str, list[str]]] = []
    for block in (each for page in PAGES.values() for each in blocks("console", page)):
        for line in block.splitlines():
            if line.startswith("$ "):
                sessions.append((line[2:], []))
            else:
                sessions[-1][1].append(line)
    return sessions


@pytest.mark.parametrize(("command", "lines"), console_sessions())
async def test_command_prints_what_is_shown(command: str, lines: list[str], tmp_path: Path) -> None:
    if command.startswith("curl"):
        needs("curl")
        command = command.replace("curl ", "curl -sS ", 1)
    async with served_as_shown(tmp_path, HELLO, "hello.py") as port:
        command = command.replace("-m karna.client", f"-m karna.client --url ws://localhost:{port}")
        command = command.replace("localhost:8000", f"localhost:{port}")
        command = re.sub(r"^python ", f"{sys.executable} ", command)
        process = await asyncio.create_subprocess_shell(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=clean_environment(),
        )  # fmt: skip
        printed, _ = await process.communicate()
    shown = "\n".join(lines)
    assert pattern_of(shown).fullmatch(printed.decode().rstrip("\n")), printed.decode()


def test_first_program_has_ten_lines() -> None:
    assert len([line for line in HELLO.splitlines() if line.strip()]) == 10


def test_starting_commands_install_and_start() -> None:
    assert blocks("sh")[0].splitlines() == [
        "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt",
        ".venv/bin/python karna_ws.py",
    ]
    assert sum(line.endswith(" -m pytest") for line in README.splitlines()) == 1, ".ci/run runs it"


# --- The wire ----------------------------------------------------------------------------------


async def say_and_compare(client: Raw, conversation: str) -> None:
    """Send the `>` lines of a block; what comes must be its `<` lines, in their order."""
    for line in conversation.splitlines():
        if line.startswith("> "):
            await client.send(line[2:])
        else:
            answer = await client.next_where(lambda message: message["type"] != "status_update"
                                             or "id" in message)  # fmt: skip
            assert pattern_of(line[2:]).fullmatch(orjson.dumps(answer).decode()), answer


async def test_wire_is_as_shown() -> None:
    async with served() as server, Raw.open(server) as client:
        await say_and_compare(client, blocks("text", ROOMS)[1])


class Port:
    """What Raw.open needs of a server."""

    def __init__(self, port: int) -> None:
        self.port = port


async def test_embedding_program_answers_as_shown(tmp_path: Path) -> None:
    async with (
        served_as_shown(tmp_path, HOME, "home.py") as port,
        Raw.open(Port(port)) as client,
    ):
        await say_and_compare(client, blocks("text")[0])


async def test_embedding_program_runs_by_itself(tmp_path: Path) -> None:
    copy_server(tmp_path)
    # Port 0, and word of which one it is: two tests may run on one machine.
    source = HOME.replace("asyncio.run(serve(manager, port=8000, ", "asyncio.run(told(manager, ")
    assert "told" in source
    (tmp_path / "home.py").write_text(source.replace('if __name__ == "__main__":', TOLD))
    words = (sys.executable, "home.py")
    async with (
        program(*words, ready=r"^(\d+)$", cwd=tmp_path, env=clean_environment()) as match,
        Raw.open(Port(int(match[1]))) as client,
    ):
        await say_and_compare(client, blocks("text")[0])


TOLD = """
async def told(manager, **options):
    from karna_ws import serving
    async with serving(manager, port=0, **options) as server:
        print(server.port, flush=True)
        await server.wait_closed()

if __name__ == "__main__":
"""


# --- Clients -----------------------------------------------------------------------------------


def asking_manager() -> WebSocketManager:
    """`brew` reports progress, and asks before it ends."""
    manager = WebSocketManager(commands=CommandProcessor())

    @manager.commands.command
    async def brew(cups: int, context: Context) -> str:
        await context.progress({"percent": 0})
        agreed = await context.client.call("confirm", "Unlock the front?")
        return f"{cups} cups, agreed: {agreed}"

    return manager


async def test_python_client_runs_as_shown(tmp_path: Path) -> None:
    for name in ("karna/client", "karna/text.py"):  # all that it needs
        (tmp_path / name).parent.mkdir(exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    manager = asking_manager()
    async with serving(manager, port=0) as server:
        source = CLIENT.replace("localhost:8000", f"localhost:{server.port}")
        (tmp_path / "client.py").write_text(source)
        async with running(
            sys.executable, "-u", "client.py", cwd=tmp_path, PYTHONPATH=""
        ) as client:
            client.tell("y")
            await client.wait_for_line("{'percent': 0}")
            await client.wait_for_line("2 cups, agreed: True")
            while not any("dinner" in line for line in client.all("line")):
                manager.notify("dinner is ready")  # it listens from some moment on
                await client.wait_for("line")


async def run_typescript(folder: Path, node_dir: Path, number: int, port: int) -> list[str]:
    """Compile the snippet of README.md strictly and run it in Node; what it prints."""
    shutil.copy(ROOT / "examples" / "karna-client.ts", folder)
    source = blocks("typescript")[number].replace("localhost:8000", f"localhost:{port}")
    (folder / "snippet.ts").write_text(source)
    (folder / "package.json").write_text('{"type": "module"}')
    (folder / "node_modules").symlink_to(node_dir / "node_modules")
    await asyncio.to_thread(compile_typescript, folder, node_dir, "snippet.ts")
    # Node 20 has no WebSocket of its own.
    (folder / "start.js").write_text(
        "import WebSocket from 'ws'; globalThis.WebSocket ??= WebSocket;"
        "await import('./snippet.js'); console.log('end'); process.exit();"
    )
    async with running("node", "start.js", cwd=folder) as client:
        await client.ends()
        return client.all("line")


def compile_typescript(folder: Path, node_dir: Path, *names: str) -> None:
    flags = (
        "--strict --target es2022 --module esnext --moduleResolution bundler"
        " --rewriteRelativeImportExtensions"
    )
    done = subprocess.run(
        [node_dir / "node_modules/.bin/tsc", *flags.split(), "--types", "", *names],
        check=False, cwd=folder, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


async def test_typescript_client_runs_as_shown(node_dir: Path, tmp_path: Path) -> None:
    async with serving(asking_manager(), port=0) as server:
        lines = await run_typescript(tmp_path, node_dir, 0, server.port)
    assert "{ percent: 0 }" in lines and lines[-1] == "end"


async def test_socket_io_client_runs_as_shown(node_dir: Path, tmp_path: Path) -> None:
    async with serving(asking_manager(), port=0) as server:
        lines = await run_typescript(tmp_path, node_dir, 1, server.port)
    assert "recovered: false" in lines and lines[-1] == "end"
    assert any(line.startswith("command_progress ") and "percent: 0" in line for line in lines)


async def test_clients_say_what_the_program_hears(node_dir: Path, tmp_path: Path) -> None:
    """Both TypeScript snippets answer the question."""
    heard: list[str] = []
    manager = asking_manager()
    commands = manager.commands.commands
    brew = commands["brew"].function

    async def brew_and_tell(cups: int, context: Context) -> str:
        heard.append(await brew(cups, context))
        return heard[-1]

    commands["brew"].function = brew_and_tell
    async with serving(manager, port=0) as server:
        for number in (0, 1):
            (folder := tmp_path / str(number)).mkdir()
            await run_typescript(folder, node_dir, number, server.port)
    assert heard == ["2 cups, agreed: True"] * 2


def test_typescript_of_the_rooms_page_passes_the_strict_compiler(
    node_dir: Path, tmp_path: Path
) -> None:
    names = [f"snippet{number}.ts" for number in range(2)]
    for name, source in zip(names, blocks("typescript", ROOMS), strict=True):
        (tmp_path / name).write_text(source + "\nexport {};\n")
    compile_typescript(tmp_path, node_dir, *names)


def test_assistants_are_told_what_the_page_says() -> None:
    manager = WebSocketManager()
    (source,) = blocks("python", ROOMS)
    exec("from typing import Literal\n" + source, {"manager": manager})
    temperature, unlock = (manager.commands.commands[each] for each in ("temperature", "unlock"))
    assert temperature.read_only and unlock.confirm
    assert temperature.input_schema is not None
    (room,) = temperature.input_schema["properties"].values()
    assert room["enum"] == ["kitchen", "bath"] and room["description"] == "where to look"
    for page in PAGES.values():
        inline = re.findall(r"`(\{\"(?:servers|mcpServers).*?)`", page)
        for text in [*blocks("json", page), *inline]:
            assert "http://localhost:8000/mcp" in str(orjson.loads(text))


# --- What is named -----------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_page_names_only_flags_that_exist(page: str) -> None:
    known = set(re.findall(r"--[a-z][a-z-]*", make_parser("1").format_help()))
    others = {"--transport", "--header", "--utc", "--level", "--strong", "--no-strong", "--help"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", PAGES[page]))
    assert named - known - others == set()


def slugs(page: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", [*PAGES, "bench/README.md", "examples/frontend/README.md"])
def test_links_lead_somewhere(name: str) -> None:
    here = ROOT / name
    for target in re.findall(r"\]\(([^)]+)\)", here.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = here.parent / path if path else here
        assert found.exists(), target
        if anchor:
            assert anchor in slugs(found.read_text()), target


def table_under(heading: str, page: str) -> list[list[str]]:
    """The cells of the first table under a heading."""
    lines = page[page.index(f"# {heading}\n") :].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def shown(name: str) -> str:
    """A default as the table of options has it."""
    value = getattr(Config(), name)
    if name == "ping_interval_s":
        return "20, Socket.IO 25"
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, str):
        return f"`{value}`"
    if value % (1024 * 1024) == 0:
        return f"{value // (1024 * 1024)} MiB"
    return f"{value:g}" if name == "port" or isinstance(value, float) else f"{value:,}"


def test_options_and_defaults_are_those_of_config() -> None:
    names = []
    for cell, default, _ in table_under("Options", README):
        row = re.findall(r"`(\w+)`", cell)
        assert default == ", ".join(dict.fromkeys(filter(None, map(shown, row)))), cell
        names += row
    assert sorted(names) == sorted(Config.__dataclass_fields__)


def test_table_of_the_api_names_what_there_is() -> None:
    things: dict[str, Any] = {"manager": WebSocketManager, "client": Client, "Service": Service}
    text = "\n".join(row[0] for row in table_under("What a program uses", README))
    for owner, name in re.findall(r"\b(manager|client|Service)\.(\w+)", text):
        if (owner, name) != ("manager", "commands"):
            assert hasattr(things[owner], name), name
    for name in re.findall(r"`\.(\w+)`", text):
        assert hasattr(Client, name), name
    (row,) = [row for row in table_under("What a program uses", README) if "command`" in row[0]]
    known = inspect.signature(Command).parameters
    assert {*re.findall(r"`(\w+)`", row[1])} == {*known} - {"function"}


def test_limits_are_those_of_config() -> None:
    config = Config()
    assert f"| clients | {config.max_clients:,} |" in ROOMS
    assert f"| running commands of a client | {config.max_running_commands}, " in ROOMS
    assert f"| time of a command | {config.command_timeout_s:g} s |" in ROOMS


def test_first_page_is_short() -> None:
    words = [word for word in README.split() if re.search(r"\w", word)]
    assert len(words) < 2_150, "the wire, speed and design have pages of their own"


# --- The rooms ---------------------------------------------------------------------------------


def list_rooms() -> str:
    """Each file with the first line of its docstring, below those that it imports."""
    arrows = graph()
    depth: dict[str, int] = {}

    def depth_of(name: str) -> int:
        if name not in depth:
            depth[name] = 1 + max(map(depth_of, arrows[name] - {name}), default=0)
        return depth[name]

    names = sorted(FILES, key=lambda name: (depth_of(name), name))
    lines = []
    for name in names:
        path = FILES[name].relative_to(ROOT)
        said = ast.get_docstring(ast.parse(FILES[name].read_text()))
        assert said is not None
        lines.append(f"{path!s:26}{said.partition(chr(10))[0]}\n")
    return "".join(lines)


def test_rooms_are_those_there_are() -> None:
    assert blocks("text", ROOMS)[0] == list_rooms(), "python tests/real/test_readme.py"


if __name__ == "__main__":
    print(list_rooms(), end="")
