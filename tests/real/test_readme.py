"""What README.md shows is what happens."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from karna.command_line import make_parser
from karna_ws import Config
from support import ROOT, Raw, needs, served
from support_clients import copy_server


README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def pattern_of(line: str) -> re.Pattern[str]:
    """A line of the README as a pattern: `...` stands for anything."""
    return re.compile(".*".join(map(re.escape, line.split("..."))))


async def say_and_compare(client: Raw, conversation: str) -> None:
    """Send the `>` lines of a block; what comes must be its `<` lines, in their order."""
    for line in conversation.splitlines():
        if line.startswith("> "):
            await client.send(line[2:])
        else:
            answer = await client.next_where(lambda message: "id" in message)
            assert pattern_of(line[2:]).fullmatch(orjson.dumps(answer).decode()), answer


def test_readme_conversations_are_found() -> None:
    assert len([block for block in blocks("text") if block.startswith(">")]) == 2
    assert len(blocks("python")) == 1
    assert len(blocks("typescript")) >= 3


async def test_readme_shows_what_the_wire_says() -> None:
    async with served() as server, Raw.open(server) as client:
        await say_and_compare(client, blocks("text")[0])


async def test_readme_embedding_runs_as_shown(tmp_path: Path) -> None:
    copy_server(tmp_path)
    program = tmp_path / "program.py"
    (source,) = blocks("python")
    # Port 0, and word of which one it is: two tests may run on one machine.
    source = source.replace("asyncio.run(serve(manager, port=8000, ", "asyncio.run(told(manager, ")
    source = source.replace('if __name__ == "__main__":', EMBEDDED)
    program.write_text(source)
    async with readme_running(sys.executable, str(program)) as process:
        assert process.stdout is not None
        port = int(await process.stdout.readline())
        async with Raw.open(Port(port)) as client:
            await say_and_compare(client, blocks("text")[1])


EMBEDDED = """
async def told(manager, **options):
    from karna_ws import serving
    async with serving(manager, port=0, **options) as server:
        print(server.port, flush=True)
        await server.wait_closed()

if __name__ == "__main__":
"""


class Port:
    """What Raw.open needs of a server."""

    def __init__(self, port: int) -> None:
        self.port = port


@contextlib.asynccontextmanager
async def readme_running(*words: str, **options: Any) -> AsyncIterator[asyncio.subprocess.Process]:
    """A program that runs while the block does; it finds only what lies beside it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = await asyncio.create_subprocess_exec(
        *words, stdout=subprocess.PIPE, env=environment, **options
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


def console_sessions() -> list[tuple[str, list[str]]]:
    """(command, lines that must come out) of every console block."""
    sessions: list[tuple[str, list[str]]] = []
    for block in blocks("console"):
        for line in block.splitlines():
            if line.startswith("$ "):
                sessions.append((line[2:], []))
            else:
                sessions[-1][1].append(line)
    return sessions


@pytest.mark.parametrize(
    ("command", "lines"), [s for s in console_sessions() if " -m websockets" not in s[0]]
)
async def test_readme_command_prints_what_is_shown(command: str, lines: list[str]) -> None:
    if command.startswith("curl"):
        needs("curl")
    async with served() as server:
        command = command.replace("localhost:8000", f"localhost:{server.port}")
        command = re.sub(r"^python ", f"{sys.executable} ", command)
        process = await asyncio.create_subprocess_shell(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        printed, _ = await process.communicate()
    shown = "\n".join(lines)
    assert pattern_of(shown).fullmatch(printed.decode().rstrip("\n")), printed.decode()


async def test_readme_first_client_gets_the_answer_shown() -> None:
    ((command, lines),) = [s for s in console_sessions() if " -m websockets" in s[0]]
    url = command.split()[-1]
    async with served() as server:
        url = url.replace("8000", str(server.port))
        words = (sys.executable, "-m", "websockets", url)
        async with readme_running(*words, stdin=subprocess.PIPE) as process:
            assert process.stdin is not None and process.stdout is not None
            seen = b""
            for line in lines:
                if line.startswith("> "):
                    process.stdin.write(line[2:].encode() + b"\n")
                    continue
                wanted = line.replace("8000", str(server.port)).encode()
                while wanted not in seen:
                    assert (more := await process.stdout.read(4096)), seen
                    seen += more


def test_readme_names_only_flags_that_exist() -> None:
    known = set(re.findall(r"--[a-z][a-z-]*", make_parser("1").format_help()))
    known |= set(re.findall(r'"(--[a-z][a-z-]*)"', (ROOT / "bench" / "run.py").read_text()))
    others = {"--allow-program", "--unix-socket", "--utc", "--level", "--strong", "--no-strong"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README))
    assert named - known - others == set()


def test_readme_links_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in slugs, target
        elif "://" not in target:
            assert (ROOT / target).exists(), target


def test_readme_limits_are_those_of_config() -> None:
    config = Config()
    assert f"| clients | {config.max_clients:,} |" in README
    assert f"| running commands of a client | {config.max_running_commands}, " in README
    assert f"| time of a command | {config.command_timeout_s:g} s |" in README
    assert f"The last {config.history_messages:,} broadcasts" in README


def test_readme_typescript_passes_the_strict_compiler(node_dir: Path, tmp_path: Path) -> None:
    for number, source in enumerate(blocks("typescript")):
        (tmp_path / f"snippet{number}.ts").write_text(source + "\nexport {};\n")
    (tmp_path / "node_modules").symlink_to(node_dir / "node_modules")
    flags = "--strict --noEmit --target es2022 --module esnext --moduleResolution bundler"
    done = subprocess.run(
        [node_dir / "node_modules/.bin/tsc", *flags.split(), "--types", "",
         *sorted(tmp_path.glob("snippet*.ts"))],
        check=False, cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
