"""A line is split as a shell would, in linear time."""

from __future__ import annotations

import contextlib
import random
import shlex
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from karna.command import Command
from karna.errors import RequestError
from karna.words import MAX_WORDS, split_words
from services import CommandProcessor, LanguageService, UsageError
from support_commands import LINE
from support_property import given, settings


@settings(max_examples=200, deadline=None)
@given(LINE)
def test_split_words_is_shlex(line: str) -> None:
    try:
        expected = shlex.split(line)
    except ValueError:
        with pytest.raises(UsageError, match="no closing quote|nothing to escape"):
            split_words(line)
    else:
        assert split_words(line) == expected


@pytest.mark.parametrize(
    "line", ["'a" * 200_000 + "'" * (200_000 % 2), '"' + "\\\\" * 400_000 + '"', "a" * 10**6]
)
def test_split_words_takes_linear_time(line: str) -> None:
    began = time.process_time()
    with contextlib.suppress(UsageError):
        split_words(line)
    assert time.process_time() - began < 1.5


def speaking(count: int) -> CommandProcessor:
    """So many commands, with the names and the help of a house."""
    commands, chance = CommandProcessor(), random.Random(1)
    LanguageService().register(commands)
    words = [
        "list", "show", "delete", "create", "start", "stop", "restart", "light", "lamp", "camera",
        "kitchen", "record", "play", "status", "device", "temperature", "open", "close",
    ]  # fmt: skip
    while len(commands.distinct()) < count:
        name = "-".join(chance.sample(words, 2))
        if name not in commands.commands:
            command = Command(lambda *words: None, name=name)
            command.stems = set(chance.sample([word[:5] for word in words], 4))
            commands.add(command)
    return commands


def steps_of(work: Callable[[], Any]) -> int:
    """How many bytecodes of Python the work takes; no machine is too slow for that."""
    steps, tracer = 0, sys.gettrace()

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal steps
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        steps += event == "opcode"
        return trace

    sys.settrace(trace)
    try:
        with contextlib.suppress(RequestError):
            work()
    finally:
        sys.settrace(tracer)
    return steps


def least_seconds(work: Callable[[], Any]) -> float:
    """The quickest of some runs: what the work itself takes on a machine that has other work."""
    times = []
    for _ in range(30):
        began = time.process_time()
        with contextlib.suppress(RequestError):
            work()
        times.append(time.process_time() - began)
    return min(times)


STRANGERS = {
    "many parts": "x" + "".join(f"-ech{chr(97 + n % 26)}tim" for n in range(48)),
    "parts of names": "x-" + "start-lamp.list-kitchen.".join(map(str, range(14))),
    "ordinary": "ehco",
    "letters": "interpret " + " ".join("abcdefghijklmnopqrstuvwxyz" * 20)[:1000],
    "words near to names": "interpret " + "helq ecko timf notufy askk " * 40,
    "beginnings of names": "interpret " + "start-lam list-kitche.and the camera-status " * 30,
}


@pytest.mark.parametrize("count", [15, 200])
@pytest.mark.parametrize("line", STRANGERS.values(), ids=list(STRANGERS))
def test_unknown_commands_and_interpret_take_bounded_work(line: str, count: int) -> None:
    commands = speaking(count)

    def ask() -> None:
        commands.call_inline(commands.prepare(line))

    steps_of(ask)  # the index of names is made
    assert steps_of(ask) < 12_000  # up to 5,900; with difflib up to 70 times the time


@pytest.mark.parametrize("name", ["command-x", "command-71", "commnad-7", "comand-7"])
def test_names_that_many_commands_are_near_to_get_suggestions(name: str) -> None:
    commands = CommandProcessor()
    for number in range(70):
        commands.add(Command(lambda: None, name=f"command-{number}"))
    near = commands.suggest(name)
    assert near and all(each.startswith("command-") for each in near)
    assert "nad" not in name or near[0] == "command-7"
    assert near == commands.suggest(name)


def test_parts_and_beginnings_of_names_are_near() -> None:
    commands = speaking(15)
    for name in ["kitchen-light", "list-cameras"]:
        commands.add(Command(lambda: None, name=name, aliases=[name + "-alias"]))
    for text, name in [
        ("cameras", "list-cameras"), ("light", "kitchen-light"), ("kitchen-ligth", "kitchen-light"),
        ("kitchen-li", "kitchen-light"), ("countd", "countdown"), ("kitchenlight", "kitchen-light"),
    ]:  # fmt: skip
        assert name in commands.suggest(text), text


def ints(*numbers: int, x: list[int] | None = None) -> int:
    return sum(numbers) + sum(x or ())


def named(**words: str) -> int:
    return len(words)


MIB = 1024 * 1024
LONG_LINES = {
    "nothings": "echo " + "'' " * (MIB // 3), "glued": "echo " + "a''" * (MIB // 3),
    "letters": "echo " + "a " * (MIB // 2), "tabs": "echo " + "a\t" * (MIB // 2),
    "escapes": "echo " + "\\a" * (MIB // 2), "quotes": 'echo "' + '\\"' * (MIB // 2) + '"',
    "numbers": "ints " + "1 " * (MIB // 2), "options": "named " + "--a=1 " * (MIB // 6),
    "a word": "echo " + "a" * MIB, "blanks": "echo " + " " * MIB,
}  # fmt: skip


@pytest.mark.parametrize("line", LONG_LINES.values(), ids=list(LONG_LINES))
def test_longest_line_is_understood_or_refused_in_milliseconds(line: str) -> None:
    commands = CommandProcessor()
    commands.command(ints)
    commands.command(named)
    assert least_seconds(lambda: commands.prepare(line)) < 0.03  # 2 to 9 ms; it was up to 380 ms


@pytest.mark.parametrize(
    ("line", "params"),
    [("ints", {"x": ["1"] * 250_000}), ("ints", {"numbers": ["1"] * 250_000}),
     ("named", {f"k{n}": "" for n in range(90_000)})],
)  # fmt: skip
def test_longest_params_are_refused_in_milliseconds(line: str, params: dict[str, Any]) -> None:
    commands = CommandProcessor()
    commands.command(ints)
    commands.command(named)
    with pytest.raises(UsageError, match="at most"):
        commands.prepare(line, params)
    assert least_seconds(lambda: commands.prepare(line, params)) < 0.01


@pytest.mark.parametrize("mark", ["", "'", '"', "\t"])
def test_line_has_so_many_words_and_no_more(mark: str) -> None:
    commands = CommandProcessor()
    most = f"echo {mark}w{mark}" + " w" * (MAX_WORDS - 2)
    assert len(commands.prepare(most + "  ").args) == MAX_WORDS - 1
    with pytest.raises(UsageError, match="at most 1000 words"):
        commands.prepare(most + " w")
