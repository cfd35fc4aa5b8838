"""The client for a shell: one command, the status, or the broadcasts as they come.

    python -m karna.client "brew 2"

stdout gets JSON alone, one value a line; stderr what is for people: progress, and one line when
something fails. Whatever a terminal would take for more than text is shown escaped.

On top of client, which starts it; nothing else uses it.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TextIO

from orjson import dumps

from karna.client import Client, ClientError, CommandError, connect
from karna.client.link import log
from karna.text import one_line

DEFAULT_URL = "ws://localhost:8000/ws"
CANCEL_WAIT_S = 2.0  # after Ctrl-C, for the cancelled command's answer
BAR_CELLS = 30
MAX_LINE_CHARS = 1_000  # of a report or an error
OK, FAILED, NO_ANSWER, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141

EPILOG = """\
The result is printed as JSON on stdout, a string too. Progress goes to stderr if that is a
terminal: a bar for reports with "percent", a line for others. Options stand before the command.
The token is taken from KARNA_TOKEN.

exit codes: 0 done, 1 the command failed, 2 wrong usage, or no connection or one that broke,
130 Ctrl-C, which cancels the command."""


def json_line(value: Any, encoding: str) -> str:
    """`value` as JSON on one line, with nothing in it that a terminal could take for a command."""
    text = dumps(value).decode()
    if text.isprintable() and _can_encode(text, encoding):
        return text
    return "".join(c if c.isprintable() and _can_encode(c, encoding) else _escape(c) for c in text)


def _can_encode(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _escape(character: str) -> str:
    """A character of a JSON string as \\uXXXX; two of them for one beyond 16 bits."""
    units = character.encode("utf-16-be")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))


def percent_of(progress: Any) -> float | None:
    """The percentage that a report tells, 0 to 100; None if it tells none."""
    percent = progress.get("percent") if isinstance(progress, dict) else None
    if isinstance(percent, bool) or not isinstance(percent, int | float):
        return None
    return percent if 0 <= percent <= 100 else None  # NaN is not


def bar(percent: float) -> str:
    """The bar for a percentage; its length is always the same."""
    filled = int(BAR_CELLS * percent / 100)
    return f"[{'#' * filled}{'.' * (BAR_CELLS - filled)}] {percent:5.1f} %"


class ProgressDisplay:
    """Reports of a command on a terminal: one bar that grows, and lines of whatever else comes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._has_bar = False

    def show(self, progress: Any) -> None:
        if not self._is_terminal:
            return
        percent = percent_of(progress)
        if percent is not None:
            self._write("\r" + bar(percent))
            self._has_bar = True
            return
        self.finish()
        is_text = isinstance(progress, str)
        self._write(f"{_shown(progress if is_text else dumps(progress).decode())}\n")

    def finish(self) -> None:
        """Leave the bar's line."""
        if self._has_bar:
            self._write("\n")
            self._has_bar = False

    def _write(self, text: str) -> None:
        with suppress(OSError):  # the terminal has gone; the command has not
            self._stream.write(text)
            self._stream.flush()


def _shown(text: str) -> str:
    return one_line(text, MAX_LINE_CHARS)


def print_json(value: Any) -> None:
    print(json_line(value, sys.stdout.encoding), flush=True)


async def execute(client: Client, line: str) -> None:
    """Run the command and print its result. Ctrl-C, which cancels this task, cancels it."""
    display = ProgressDisplay(sys.stderr)
    try:
        result = await client.execute(line, on_progress=display.show)
    except asyncio.CancelledError:
        with suppress(TimeoutError):
            async with asyncio.timeout(CANCEL_WAIT_S):
                await client.settled()
        raise
    finally:
        display.finish()
    print_json(result)


async def run(arguments: argparse.Namespace) -> None:
    """Do what the arguments say. Raises ClientError; ValueError for a wrong URL or token."""
    client = connect(arguments.url)
    broadcasts = client.broadcasts() if arguments.listen else None  # from the first one on
    async with client:
        if broadcasts is not None:
            async for broadcast in broadcasts:
                print_json({
                    "type": broadcast.type, "data": broadcast.data, "offset": broadcast.offset
                })  # fmt: skip
        elif arguments.status:
            print_json(await client.status())
        else:
            await execute(client, arguments.line)


async def run_until_interrupted(arguments: argparse.Namespace) -> None:
    """`run`, cancelled by the first Ctrl-C; the second ends the process as if nobody listened."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None

    def interrupt(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        loop.call_soon_threadsafe(task.cancel)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        await run(arguments)
    finally:
        signal.signal(signal.SIGINT, before)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m karna.client", description="Run one command of a Karna WS server.",
        usage="%(prog)s [-h] [--url URL] (COMMAND ... | --status | --listen)",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--url", default=DEFAULT_URL, help="default: %(default)s")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--status", action="store_true", help="print the status of all services")
    other.add_argument(
        "--listen", action="store_true",
        help="print broadcasts until Ctrl-C; type gap stands where some were missed",
    )  # fmt: skip
    parser.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="command", help="several words are joined"
    )
    arguments = parser.parse_args(argv)
    words = arguments.words[1:] if arguments.words[:1] == ["--"] else arguments.words
    arguments.line = " ".join(words)
    if bool(arguments.line.strip()) == (arguments.status or arguments.listen):
        parser.error("give either a command, or --status, or --listen")
    return arguments


def complain(text: str) -> None:
    """One line for a person."""
    with suppress(OSError):
        print(f"karna.client: {_shown(text)}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; its exit code."""
    arguments = parse_arguments(argv)
    if arguments.listen:  # then it says when it is away
        logging.basicConfig(format="karna.client: %(message)s")
        log.setLevel(logging.INFO)
    try:
        asyncio.run(run_until_interrupted(arguments))
    except (KeyboardInterrupt, asyncio.CancelledError):
        complain("interrupted")
        return INTERRUPTED
    except CommandError as error:
        complain(str(error))
        return FAILED
    except BrokenPipeError:  # who read stdout has gone, as with `| head`
        return BROKEN_PIPE
    except (ClientError, ValueError) as error:
        complain(str(error))
        return NO_ANSWER
    return OK


if __name__ == "__main__":
    sys.exit(main())
