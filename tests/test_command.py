"""Functions as commands: from a line to a call, and running it."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import enum
import inspect
import sys
import contextlib
import logging
import shlex
import threading
import time
import types
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, Literal, Optional
from unittest.mock import AsyncMock

import pytest

import services
from karna.errors import CommandTimeout, UnknownCommand
from karna_ws import WebSocketManager
from services import (
    Command,
    CommandFailed,
    CommandProcessor,
    Context,
    Text,
    Unavailable,
    UsageError,
)
from support import DEADLINE_S, Raw, served, until
from support_commands import LINE, any_words, hang, keep_line, processor, run_line
from support_property import given, settings, st


@settings(max_examples=200, deadline=None)
@given(LINE)
def test_prepare_splits_as_shlex_does(line: str) -> None:
    commands = processor(any_words)
    try:
        expected = shlex.split("any " + line)[1:]
    except ValueError:
        with pytest.raises(UsageError):
            commands.prepare("any " + line)
    else:
        assert commands.prepare("any " + line).args == expected


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"
    WARM = "red"  # noqa: PIE796  (another name of RED)


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Odd(enum.Enum):
    ON = True
    NAME = "ON"  # a value goes before a name
    BOTH = (1, 2)


def shapes() -> CommandProcessor:
    commands = CommandProcessor(builtins=False)

    @commands.command
    def move(
        x: int,
        y: float = 0.5,
        *tags: str | None,
        fast: bool = False,
        level: Literal["low", "high"] = "low",
    ) -> Any:
        return x, y, tags, fast, level

    @commands.command(name="set", aliases=("put", "let"))
    def set_(key: str, value: Optional[int] = None, *, dry_run: bool = True, by: str) -> Any:  # noqa: UP045
        return key, value, dry_run, by

    @commands.command
    def loose(a, b=2, *rest, **more) -> Any:  # type: ignore[no-untyped-def]
        return a, b, rest, more

    @commands.command
    def typed(n: int | str = 1, j: dict[str, Any] | None = None, l: list[int] | None = None, b: bytes | str = b"",  # noqa: E741
              c: Literal[1, True, "x", None] = None) -> Any:  # fmt: skip
        return n, j, l, b, c

    @commands.command
    def must(*, sure: bool, size: int, tone: Literal["a", None] = None) -> Any:
        return sure, size, tone

    @commands.command
    def paint(colour: Colour, level: Level | None = None, *, odd: Odd = Odd.BOTH) -> Any:
        return colour, level, odd

    @commands.command
    def total(*numbers: float) -> float:
        return sum(numbers)

    return commands


GOOD_LINES: list[tuple[str, dict[str, Any], Any]] = [
    ("move 3", {}, (3, 0.5, (), False, "low")),
    ("move -3 1e3 a b --fast", {}, (-3, 1000.0, ("a", "b"), True, "low")),
    ("move --level=high 3 --no-fast", {}, (3, 0.5, (), False, "high")),
    ("move --level high 3 --fast=on", {}, (3, 0.5, (), True, "high")),
    ("move 3 -- 1 --fast", {}, (3, 1.0, ("--fast",), False, "low")),
    ("move 3", {"fast": True, "level": "high"}, (3, 0.5, (), True, "high")),
    ("move", {"x": 1, "y": 2}, (1, 2.0, (), False, "low")),
    ("move", {"x": "1", "tags": ["a", "b"]}, (1, 0.5, ("a", "b"), False, "low")),
    ("move 1 2 --fast=no", {"tags": "a"}, (1, 2.0, ("a",), False, "low")),
    ("set k --by me", {}, ("k", None, True, "me")),
    ("put k 5 --by=me --no-dry-run", {}, ("k", 5, False, "me")),
    ("let '' --by ''", {"value": None}, ("", None, True, "")),
    ("loose 1", {}, ("1", 2, (), {})),
    ("loose 1 x y --z w --dash-ed=v", {"q": [1]}, ("1", "x", ("y",), {"z": "w", "dash_ed": "v", "q": [1]})),
    ("loose", {"a": b"raw", "b": None}, (b"raw", None, (), {})),
    ("typed 5", {}, (5, None, None, b"", None)),
    ("typed five", {"j": {"k": 1}, "l": [1, "2"], "b": b"\0"}, ("five", {"k": 1}, [1, 2], b"\0", None)),
    ("typed", {"c": True, "b": "text", "n": 7}, (7, None, None, "text", True)),
    ("typed", {"c": 1, "j": None}, (1, None, None, b"", 1)),
    ("typed", {"c": "x"}, (1, None, None, b"", "x")),
    ("must --no-sure --size 5", {"tone": None}, (False, 5, None)),
    ("paint red", {}, (Colour.RED, None, Odd.BOTH)),
    ("paint GREEN HIGH --odd BOTH", {}, (Colour.GREEN, Level.HIGH, Odd.BOTH)),
    ("paint WARM 1 --odd ON", {}, (Colour.RED, Level.LOW, Odd.NAME)),
    ("paint", {"colour": "green", "level": 2, "odd": True}, (Colour.GREEN, Level.HIGH, Odd.ON)),
    ("total 1 2.5", {}, 3.5),
    ("total", {"numbers": [1, "2"]}, 3.0),
]  # fmt: skip


@pytest.mark.parametrize(("line", "params", "expected"), GOOD_LINES, ids=lambda v: str(v)[:40])
async def test_command_takes_words_options_and_params(
    line: str, params: dict[str, Any], expected: Any
) -> None:
    result = await run_line(shapes(), line, **params)
    assert result == expected
    if isinstance(expected, tuple):
        assert [type(value) for value in result] == [type(value) for value in expected]


BAD_LINES: list[tuple[str, dict[str, Any], str]] = [
    ("move", {}, "X is missing"),
    ("move x", {}, "X must be a whole number, not 'x'"),
    ("paint blue", {}, "COLOUR must be one of red, green, not 'blue'"),
    ("paint Red", {}, "COLOUR must be one of red, green"),
    ("paint red 3", {}, "LEVEL must be one of LOW, HIGH"),
    ("paint red", {"level": True}, "LEVEL must be one of LOW, HIGH, not bool"),
    ("paint red", {"level": 1.0}, "LEVEL must be one of LOW, HIGH, not float"),
    ("paint red", {"level": [1]}, "LEVEL must be one of LOW, HIGH, not a list of 1"),
    ("move 1_000", {}, "whole number"),
    ("move ٣", {}, "whole number"),
    (f"move {'9' * 5_000}", {}, "whole number"),
    ("move 3 nan", {}, "Y must be a finite number"),
    ("move 3 -inf", {}, "finite"),
    ("move 3 1e999", {}, "finite"),
    ("move 3 1_0", {}, "finite"),
    ("move 3 --level", {}, "--level needs a value"),
    ("move 3 --level mid", {}, "--level must be one of low, high, not 'mid'"),
    ("move 3 --fast=perhaps", {}, "--fast must be true or false"),
    ("move 3 --fast --no-fast", {}, "--fast is given twice"),
    ("move 3 --quick", {}, "unknown option '--quick'"),
    ("move 3 --no-level", {}, "unknown option '--no-level'"),
    ("move 3 --x 4", {}, "unknown option '--x'"),
    ("move 3", {"x": 4}, "X is given twice"),
    ("move 3 --fast", {"fast": True}, "given twice"),
    ("move", {"x": True}, "X must be a whole number, not bool"),
    ("move", {"x": 1.5}, "not float"),
    ("move", {"x": None}, "not NoneType"),
    ("move 3", {"y": 10**400}, "Y must be a finite number"),
    ("move 3", {"y": True}, "finite"),
    ("move 3", {"fast": 1}, "--fast must be true or false"),
    ("move 3", {"level": 1}, "one of low, high"),
    ("move 3", {"speed": 1}, "unknown parameter 'speed'"),
    ("move 3", {"tags": [1]}, "TAGS must be a text"),
    ("set k", {}, "--by is missing"),
    ("set k 1 2 --by me", {}, "too many arguments, from '2' on"),
    ("set k", {"by": b"me"}, "--by must be a text, not bytes"),
    ("typed", {"l": [1, "x"]}, "L must be a whole number"),
    ("typed", {"l": "1"}, "L must be a list"),
    ("typed", {"j": [1]}, "J must be an object"),
    ("typed", {"b": 1}, "B must be bytes or must be a text"),
    ("typed", {"c": 2}, "C must be one of"),
    ("must --size 1", {}, "--sure is missing"),
    ("total", {}, "NUMBERS is missing"),
    ("loose 1 --a 2", {}, "unknown option '--a'"),
    ("loose 1", {"": 1}, "unknown parameter ''"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "params", "problem"), BAD_LINES, ids=lambda v: str(v)[:40])
def test_command_refuses_wrong_arguments(line: str, params: dict[str, Any], problem: str) -> None:
    commands = shapes()
    with pytest.raises(UsageError) as caught:
        commands.prepare(line, params)
    assert problem in str(caught.value)
    usage = commands.commands[line.split()[0]].usage
    assert caught.value.data == {"usage": usage} and str(caught.value).endswith(f"usage: {usage}")
    assert len(str(caught.value)) < 300


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["move", "set", "loose", "typed", "total"]),
    LINE,
    st.dictionaries(
        st.sampled_from(["x", "y", "tags", "fast", "by", "j", "l", "numbers", "zz"]),
        JSON_VALUES,
        max_size=3,
    ),
)
def test_prepare_raises_nothing_but_service_errors(
    name: str, line: str, params: dict[str, Any]
) -> None:
    with contextlib.suppress(UsageError):  # any other error fails the test
        call = SHAPES.prepare(f"{name} {line}", params)
        call.command.function(*call.args, **call.kwargs)  # what binds can be called


SHAPES = shapes()


def test_command_shows_usage_and_arguments() -> None:
    commands = shapes().commands
    assert commands["move"].usage == "move X [Y] [TAGS]... [--fast] [--level low|high]"
    assert commands["set"].usage == "set KEY [VALUE] [--no-dry-run] --by BY"
    assert commands["loose"].usage == "loose A [B] [REST]... [--NAME VALUE]..."
    assert commands["total"].usage == "total NUMBERS..."
    assert commands["must"].usage == "must --sure|--no-sure --size SIZE [--tone a]"
    assert commands["put"] is commands["set"]
    assert commands["move"].arguments == [
        {"name": "x", "type": "int", "required": True},
        {"name": "y", "type": "float", "required": False, "default": 0.5},
        {"name": "tags", "type": "str", "required": False, "repeated": True},
        {"name": "fast", "type": "bool", "required": False, "default": False, "option": "--fast"},
        {"name": "level", "type": "str", "required": False, "default": "low", "choices": ["low", "high"], "option": "--level"},
    ]  # fmt: skip


def test_command_without_options_takes_dashes_as_they_are() -> None:
    def say(first: str, *rest: str | None) -> None: ...

    assert processor(say).prepare("say --a -- -b --c=d").args == ["--a", "--", "-b", "--c=d"]


def test_lines_of_inline_commands_are_kept_once_they_come_again() -> None:
    commands = CommandProcessor()
    first = commands.prepare_plain("echo a")
    assert not commands.prepared
    second = commands.prepare_plain("echo a")
    assert first == second and first is not None and first[1:] == (["a"], {})
    assert commands.prepared == {"echo a": second}
    for line in ("nobody", "", "echo 'a'", "echo a\\ b", "echo\ta", "help a b", "countdown x"):
        assert commands.prepare_plain(line) is commands.prepare_plain(line) is None, line
    for _ in range(3):
        slow = commands.prepare_plain("countdown 1")
        assert slow is not None and slow[1:] == ([1.0], {})
    assert list(commands.prepared) == ["echo a"]
    commands.add(Command(lambda *text: "mine", name="echo", inline=True))
    assert not commands.prepared
    ready = commands.prepare_plain("echo a")
    assert ready is not None and commands.run_inline(ready) == "mine"


async def test_line_that_is_asked_again_and_again_is_kept_beside_others_that_are_not() -> None:
    async with served() as server, Raw.open(server) as client:
        for number in range(40):
            await client.run(f"echo {number}")
            await client.run("echo again")
        assert [*server.manager.prepared] in ([], ["echo again"])
        for _ in range(20):
            await client.run("echo again")
        assert [*server.manager.prepared] == ["echo again"]


@pytest.mark.parametrize("name", ["call_inline", "run_inline"])
async def test_override_of_how_inline_commands_run_sees_each_call(name: str) -> None:
    seen: list[Any] = []

    def see(commands: CommandProcessor, call: Any) -> Any:
        seen.append(call)
        return getattr(CommandProcessor, name)(commands, call)

    strict = type("Strict", (CommandProcessor,), {name: see})
    async with served(WebSocketManager(strict())) as server, Raw.open(server) as client:
        for count in range(1, 5):
            assert await client.run("echo hi") == "hi"
            assert len(seen) == count


async def test_prepare_that_is_overridden_decides_about_each_line() -> None:
    """The fast lane must not pass it by."""

    class Strict(CommandProcessor):
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []
            self.is_open = True

        def prepare(self, line: str, params: Any = types.MappingProxyType({})) -> Any:
            self.lines.append(line)
            if not self.is_open:
                raise UsageError("not now")
            return super().prepare(line, params)

    replaced: Any = Strict()
    original = replaced.prepare
    replaced.prepare = lambda line, params: original(line, params)  # an attribute, not a method
    for commands in (Strict(), replaced):
        manager = WebSocketManager(commands)
        async with served(manager) as server, Raw.open(server) as client:
            for _ in range(3):
                assert await client.run("echo hi") == "hi"
            assert commands.lines == ["echo hi"] * 3
            commands.is_open = False
            answer = await client.ask("execute_command", command="echo hi")
            assert (answer["data"]["code"], answer["data"]["message"]) == ("usage", "not now")


def test_prepare_forgets_lines_when_notify_changes_its_way() -> None:
    """Else the fast lane would go on without the backplane that came."""

    class Hall:
        def broadcast(self, type: str, data: Any) -> int:
            return 1

        async def publish(self, type: str, data: Any) -> int:
            return 2

    commands = CommandProcessor()
    hall: Any = Hall()
    commands.use_broadcaster(hall)
    assert commands.call_inline(commands.prepare("notify x")) == {"clients": 1}
    keep_line(commands, "notify x")
    commands.use_broadcaster(hall, waits=True)
    assert not commands.prepared
    for _ in range(3):
        assert commands.prepare_plain("notify x") and not commands.prepared, "it waits now"
    assert asyncio.run(commands.run(commands.prepare("notify x"), Context())) == {"clients": 2}
    commands.use_broadcaster(hall)
    assert commands.call_inline(commands.prepare("notify x")) == {"clients": 1}


@pytest.mark.parametrize(
    ("line", "params", "expected"),
    [
        ("tag", {}, {}),
        ("tag --color red", {}, {"color": "red"}),
        ("tag --color=red --dry-run yes", {}, {"color": "red", "dry_run": "yes"}),
        ("tag --color", {"size": 5}, "needs a value"),
        ("tag", {"color": "red", "size": 5}, {"color": "red", "size": 5}),
        ("tag --color red", {"color": "blue"}, "given twice"),
        ("tag --color red --color blue", {}, "given twice"),
        ("tag --context x", {}, "unknown option '--context'"),
        ("tag", {"context": "x"}, "unknown parameter 'context'"),
        ("tag red", {}, "too many arguments"),
        ("sizes --a 1 --b=2", {"c": 3}, {"a": 1, "b": 2, "c": 3}),
        ("sizes --a one", {}, "must be an integer|--a"),
    ],
)
async def test_options_that_only_kwargs_takes(line: str, params: Any, expected: Any) -> None:
    async def tag(context: Context, **labels: Any) -> Any:
        assert isinstance(context, Context)
        return labels

    async def sizes(**sizes: int) -> Any:
        return sizes

    commands = processor(tag, sizes)
    assert commands.commands["tag"].usage == "tag [--NAME VALUE]..."
    if isinstance(expected, dict):
        assert await commands.run(commands.prepare(line, params), Context()) == expected
    else:
        with pytest.raises(UsageError, match=expected):
            commands.prepare(line, params)


def test_prepare_keeps_a_bounded_number_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "MAX_PREPARED", 3)
    commands = CommandProcessor()
    for number in range(10):
        for _ in range(3):
            commands.prepare_plain(f"echo {number}")
        assert 0 < len(commands.prepared) <= 3 and len(commands._asked) <= 3
    for _ in range(3):
        commands.prepare_plain("echo " + "x" * 200)
    assert all(len(line) < 200 for line in commands.prepared)


@pytest.mark.parametrize("line", ["", "  \t\n", "\r"])
def test_prepare_refuses_empty_line(line: str) -> None:
    with pytest.raises(UsageError, match="empty"):
        CommandProcessor().prepare(line)


def test_prepare_suggests_near_names_for_unknown_command() -> None:
    commands = CommandProcessor()
    for word, near in [
        ("ehco", "echo"),
        ("hlep", "help"),
        ("tiem", "time"),
        ("countdwon", "countdown"),
        ("ECHO", "echo"),
    ]:
        with pytest.raises(UnknownCommand) as caught:
            commands.prepare(word)
        assert caught.value.data["suggestions"][0] == near and near in str(caught.value)
    with pytest.raises(UnknownCommand) as caught:
        commands.prepare("\x07" + "q" * 1_000_000)
    assert caught.value.data["suggestions"] == [] and len(str(caught.value)) < 200


def test_suggest_is_bounded_in_time() -> None:
    commands = CommandProcessor()
    for number in range(50):
        commands.add(Command(lambda: None, name=f"command-{number}"))
    began = time.process_time()
    commands.suggest("command-x " * 100_000)
    assert time.process_time() - began < 0.5


def test_command_refuses_at_registration_what_no_line_can_call() -> None:
    def odd(x: set[int]) -> None: ...
    def unknown(x: NoSuchName) -> None: ...  # type: ignore[name-defined]  # noqa: F821
    async def waits() -> None: ...
    def context(c: Context) -> None: ...
    def yields() -> Iterator[int]:
        yield 1

    wrong = [(odd, "parameter x"), (unknown, "NoSuchName"), (yields, "async def")]
    for function, problem in wrong:
        with pytest.raises(TypeError, match=problem):
            Command(function)
    for function, problem in [(waits, "plain functions"), (context, "no Context")]:
        with pytest.raises(TypeError, match=problem):
            Command(function, inline=True)
    for name in ["two words", "quo'te", "back\\slash", "a\x00"]:
        with pytest.raises(ValueError, match="one word"):
            Command(lambda: None, name=name)
    with pytest.raises(TypeError, match="from a function"):
        CommandProcessor().command("name")  # type: ignore[call-overload]


def test_processor_replaces_builtins_but_nothing_else() -> None:
    commands = CommandProcessor()
    commands.add(Command(lambda: "mine", name="echo"))
    assert commands.call_inline(commands.prepare("echo")) == "mine"
    with pytest.raises(ValueError, match="'echo' already"):
        commands.add(Command(lambda: None, name="other", aliases=("echo",)))
    assert "other" not in commands.commands


def test_prepare_is_quick_for_the_commonest_line() -> None:
    commands = CommandProcessor()
    began = time.process_time()
    for _ in range(20_000):
        commands.prepare("echo hello")
    assert (
        time.process_time() - began
    ) / 20_000 < 10e-6  # measured: 0.6 us; a loaded machine has room


RAISED = [
    (ValueError("no good"), "no good"),
    (ValueError(), "ValueError"),
    (KeyError("k"), "'k'"),
    (SystemExit(), "SystemExit"),
    (SystemExit(2), "2"),
    (KeyboardInterrupt(), "KeyboardInterrupt"),
    (asyncio.CancelledError(), "CancelledError"),
    (GeneratorExit(), "GeneratorExit"),
    (StopIteration(), "StopIteration"),
    (ValueError("x" * 10_000), "x" * 1_000),
    (type("Mute", (Exception,), {"__str__": lambda self: 1 / 0})(), "Mute"),
]


@pytest.mark.parametrize("way", ["inline", "async", "thread", "stream"])
@pytest.mark.parametrize(
    ("error", "text"), RAISED, ids=[f"{type(error).__name__}-{text[:8]}" for error, text in RAISED]
)
async def test_handler_that_raises_anything_becomes_command_failed(
    way: str, error: BaseException, text: str
) -> None:
    def plain() -> None:
        raise error

    async def waits() -> None:
        raise error

    async def streams() -> AsyncIterator[int]:
        yield 1
        raise error

    commands = CommandProcessor(builtins=False)
    function = {"async": waits, "stream": streams}.get(way, plain)
    commands.add(Command(function, name="c", inline=way == "inline"))
    with pytest.raises(CommandFailed) as caught:
        if way == "inline":
            commands.call_inline(commands.prepare("c"))
        else:
            await run_line(commands, "c")
    assert str(caught.value) == text or isinstance(error, StopIteration)
    assert (commands.running, commands.done, commands.failed) == (0, 0, 1)


async def test_handler_raising_service_error_passes_it_unchanged() -> None:
    error = Unavailable("later", retry_s=5)

    async def waits() -> None:
        raise error

    def blocks() -> None:
        raise error

    commands = processor(waits, blocks)
    for line in ["waits", "blocks"]:
        with pytest.raises(Unavailable) as caught:
            await run_line(commands, line)
        assert caught.value is error


async def test_command_that_raises_is_logged_with_its_traceback_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def waits() -> None:
        raise ValueError("no good")

    def blocks() -> None:
        {}["nothing"]  # type: ignore[index]

    commands = processor(waits, blocks)
    for _ in range(3):
        for line in ("waits", "blocks"):
            with pytest.raises(CommandFailed):
                await run_line(commands, line)
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("command waits failed: ValueError\n  | Traceback")
    assert second.startswith("command blocks failed: KeyError\n  | Traceback")
    assert 'raise ValueError("no good")' in first and '{}["nothing"]' in second


async def test_processor_runs_each_kind_of_function_and_counts() -> None:
    main = threading.get_ident()

    def blocks() -> bool:
        return threading.get_ident() != main

    async def waits() -> bool:
        await asyncio.sleep(0)
        return threading.get_ident() == main

    class Callable_:
        async def __call__(self) -> str:
            return "object"

    def wrapped() -> Any:
        return waits()

    commands = processor(blocks, waits, wrapped)
    commands.add(Command(Callable_(), name="object"))
    assert [
        await run_line(commands, line) for line in ["blocks", "waits", "wrapped", "object"]
    ] == [
        True,
        True,
        True,
        "object",
    ]
    status = commands.get_status()
    assert {k: status[k] for k in ("running", "done", "failed", "commands")} == {
        "running": 0,
        "done": 4,
        "failed": 0,
        "commands": 4,
    }


async def test_inline_command_counts() -> None:
    commands = CommandProcessor()
    assert commands.call_inline(commands.prepare("echo  a   b")) == "a b"
    assert await run_line(commands, "echo 'a  b'") == "a  b"
    assert commands.done == 2


async def test_stream_reports_each_value_and_last_is_result() -> None:
    closed = asyncio.Event()

    async def count(n: int, context: Context) -> AsyncIterator[int]:
        try:
            for i in range(n):
                yield i
            assert context.client == "me"
        finally:
            closed.set()

    seen: list[Any] = []
    assert await run_line(processor(count), "count 3", Context("me", seen.append)) == 2
    assert seen == [0, 1, 2] and closed.is_set()


async def test_progress_waits_for_slow_client() -> None:
    taken, go = [], asyncio.Event()

    async def send(value: Any) -> None:
        await go.wait()
        taken.append(value)

    async def one(context: Context) -> str:
        await context.progress(1)
        return "done"

    def two(context: Context) -> str:
        context.report(2)
        return "done"

    commands = processor(one, two)
    running = [
        asyncio.ensure_future(run_line(commands, line, Context(None, send)))
        for line in ("one", "two")
    ]
    await asyncio.sleep(0.02)  # time enough for a wrong one to finish
    assert not any(task.done() for task in running)
    go.set()
    assert await asyncio.gather(*running) == ["done", "done"] and sorted(taken) == [1, 2]


async def test_report_on_loop_refuses_instead_of_hanging() -> None:
    async def wrong(context: Context) -> None:
        context.report(1)

    with pytest.raises(CommandFailed, match="await context.progress"):
        await run_line(processor(wrong), "wrong")


async def test_context_refuses_progress_once_command_has_ended(scaled: None) -> None:
    late: asyncio.Queue[str] = asyncio.Queue()
    seen: list[Any] = []

    async def stubborn(context: Context) -> None:
        try:
            await hang()
        except asyncio.CancelledError:
            while True:
                try:
                    await asyncio.sleep(0.01)
                    await context.progress("late")
                except CommandFailed as error:
                    late.put_nowait(str(error))
                    return

    commands = processor(stubborn, timeout_s=0.02)
    with pytest.raises(CommandTimeout):
        await run_line(commands, "stubborn", Context(None, seen.append))
    count = len(seen)
    assert await asyncio.wait_for(late.get(), DEADLINE_S) == "the command has ended"
    assert len(seen) == count


@pytest.mark.parametrize("way", ["async", "stream", "thread"])
async def test_time_limit_ends_command(way: str, scaled: None) -> None:
    closed, release = threading.Event(), threading.Event()

    async def waits() -> None:
        try:
            await hang()
        finally:
            closed.set()

    async def streams() -> AsyncIterator[int]:
        try:
            yield 1
            await hang()
        finally:
            closed.set()

    def blocks() -> None:
        release.wait(DEADLINE_S)

    commands = CommandProcessor(builtins=False, timeout_s=0.05)
    commands.add(Command({"async": waits, "stream": streams, "thread": blocks}[way], name="c"))
    with pytest.raises(CommandTimeout, match="c took longer than 0.05 s"):
        await run_line(commands, "c")
    assert closed.is_set() or way == "thread"
    assert (commands.running, commands.failed) == (0, 1)
    release.set()


async def test_time_limit_ends_stream_that_never_waits() -> None:
    async def flood() -> AsyncIterator[int]:
        while True:
            yield 1

    with pytest.raises(CommandTimeout):
        await run_line(processor(flood, timeout_s=0.05), "flood")


async def test_time_limit_holds_against_handler_that_swallows_cancellation(
    scaled: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    go = asyncio.Event()

    async def stubborn() -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await hang()
        await go.wait()
        return "never seen"

    commands = processor(stubborn, timeout_s=0.05)
    with pytest.raises(CommandTimeout):
        await run_line(commands, "stubborn")
    assert "stubborn ignores its cancellation" in caplog.text
    go.set()
    await until(lambda: "stubborn has ended after all\n" in caplog.text)


@pytest.mark.parametrize("way", ["async", "stream", "thread"])
async def test_cancelling_run_cancels_handler(way: str, scaled: None) -> None:
    began, closed, release = asyncio.Event(), asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    async def waits() -> None:
        try:
            began.set()
            await hang()
        finally:
            closed.set()

    async def streams() -> AsyncIterator[int]:
        try:
            began.set()
            while True:
                yield 1
        finally:
            closed.set()

    def blocks() -> None:
        loop.call_soon_threadsafe(began.set)
        release.wait(DEADLINE_S)

    commands = CommandProcessor(builtins=False)
    commands.add(Command({"async": waits, "stream": streams, "thread": blocks}[way], name="c"))
    task = asyncio.ensure_future(commands.run(commands.prepare("c"), Context()))
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert closed.is_set() or way == "thread"
    assert (commands.running, commands.failed) == (0, 1)
    release.set()


def test_enum_is_told_as_the_choices_that_it_is() -> None:
    command = shapes().commands["paint"]
    assert command.usage == "paint red|green [LOW|HIGH] [--odd ON|BOTH]"
    colour, level, odd = command.describe()["arguments"]
    assert (colour["type"], colour["choices"]) == ("Colour", ["red", "green"])
    assert (level["default"], odd["default"]) == (None, "BOTH")
    schema = command.input_schema
    assert schema is not None and schema["properties"]["colour"] == {
        "type": "string", "enum": ["red", "green"]
    }  # fmt: skip
    assert schema["properties"]["odd"]["default"] == "BOTH"

    class Empty(enum.Enum): ...

    with pytest.raises(TypeError, match="parameter a: Empty has no members"):
        function: Any = lambda a: a  # noqa: E731
        function.__annotations__ = {"a": Empty}
        Command(function, name="x")


def test_command_from_a_text_is_told_where_its_name_goes() -> None:
    with pytest.raises(
        TypeError, match="not from 'lights-on'; its name goes into name='lights-on'"
    ):
        CommandProcessor().command("lights-on")  # type: ignore[call-overload]


def test_input_schema_is_made_from_the_signature() -> None:
    async def brew(
        cups: int,
        milk: float = 0.5,
        *extras: str | None,
        size: Literal["small", "large"] = "small",
        name: str | None = None,
        temperatures: list[float] | int = 90,
        odd: Any = float("nan"),
        image: bytes | str = b"",
        raw: bytes = b"",
        mode: Literal[1, "a", None] = None,
        context: Context | None = None,
    ) -> None:
        """Brew coffee.

        cups: how many
        milk (float): in parts of a cup
        :param size: of each
        *extras: what goes in
        unknown: nothing
        """

    assert Command(brew).input_schema == {
        "type": "object",
        "properties": {
            "cups": {"type": "integer", "description": "how many"},
            "milk": {"type": "number", "default": 0.5, "description": "in parts of a cup"},
            "extras": {
                "type": "array", "items": {"type": "string"}, "description": "what goes in",
            },
            "size": {
                "type": "string", "enum": ["small", "large"], "default": "small",
                "description": "of each",
            },
            "name": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
            "temperatures": {
                "anyOf": [{"type": "array", "items": {"type": "number"}}, {"type": "integer"}],
                "default": 90,
            },
            "odd": {},
            "image": {"type": "string"},
            "mode": {"anyOf": [{"enum": [1, "a"]}, {"type": "null"}], "default": None},
        },
        "required": ["cups"],
        "additionalProperties": False,
    }  # fmt: skip


def test_input_schema_always_has_an_object_at_the_top() -> None:
    def nothing() -> None: ...

    def anything(**more: Any) -> None: ...

    def numbers(*rest: int, **more: int) -> None: ...

    def raw(data: bytes) -> None: ...

    empty = {"type": "object", "properties": {}}
    assert Command(nothing).input_schema == {**empty, "additionalProperties": False}
    assert Command(anything).input_schema == {**empty, "additionalProperties": True}
    assert Command(numbers).input_schema == {
        "type": "object",
        "properties": {"rest": {"type": "array", "items": {"type": "integer"}, "minItems": 1}},
        "required": ["rest"],
        "additionalProperties": {"type": "integer"},
    }
    assert Command(raw).input_schema is None, "JSON has no bytes"


def test_whole_number_may_come_as_a_float() -> None:
    bound = shapes().commands["move"].bind([], {"x": 3.0})
    assert bound[0][0] == 3 and type(bound[0][0]) is int
    with pytest.raises(UsageError, match="whole number"):
        shapes().commands["move"].bind([], {"x": 2.0**60})


def values_of(schema: Any) -> Any:
    """What a schema of ours admits."""
    if "anyOf" in schema:
        return st.one_of([values_of(each) for each in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kinds = {
        "string": st.text(max_size=5), "boolean": st.booleans(), "null": st.none(),
        "integer": st.integers(-(2**63), 2**64 - 1) | st.integers(-99, 99).map(float),
        "number": st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False),
        "object": st.dictionaries(st.text(max_size=3), JSON_VALUES, max_size=3),
    }  # fmt: skip
    if schema.get("type") == "array":
        items = values_of(schema.get("items", {}))
        return st.lists(items, min_size=schema.get("minItems", 0), max_size=4)
    return kinds[schema["type"]] if "type" in schema else JSON_VALUES


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_what_the_schema_admits_binds(data: Any) -> None:
    command = data.draw(st.sampled_from(SHAPES.distinct()))
    schema = command.input_schema
    required = schema.get("required", [])
    fields = {name: values_of(each) for name, each in schema["properties"].items()}
    given_ = data.draw(st.fixed_dictionaries(
        {name: fields[name] for name in required},
        optional={name: each for name, each in fields.items() if name not in required},
    ))  # fmt: skip
    if schema["additionalProperties"] is not False:
        further = st.dictionaries(st.text("qrs", min_size=1, max_size=3), JSON_VALUES, max_size=2)
        given_ |= data.draw(further)
    args, kwargs = command.bind([], given_)
    command.function(*args, **kwargs)


def test_built_in_commands_are_tools_only_where_they_say_so() -> None:
    commands = CommandProcessor()
    assert [each.name for each in commands.distinct() if each.tool] == ["time"]
    revision = commands.revision
    commands.add(Command(lambda *text: "mine", name="echo"))
    assert commands.commands["echo"].tool is None and commands.revision > revision


def texts() -> CommandProcessor:
    commands = CommandProcessor(builtins=False)

    @commands.command
    def say(text: Text) -> Any:
        return text

    @commands.command
    def remind(minutes: int, text: Text = "tea", *, loud: bool = False, by: str = "bell") -> Any:
        return minutes, text, loud, by

    @commands.command
    def maybe(text: Text | None = None, *, by: str = "", **more: str) -> Any:
        return text, by, more

    return commands


TEXT_LINES: list[tuple[str, Any]] = [
    ("say what's up", "what's up"),
    ("say it's 5 o'clock", "it's 5 o'clock"),
    ('say "Hello" she said', '"Hello" she said'),
    ("say a  b\\ c\n\td", "a  b\\ c\n\td"),
    ("  say\n what's  up \t ", "what's  up"),
    ("say\twhat's", "what's"),
    ("'say' what  is", "what  is"),
    ("say --level -- 'x", "--level -- 'x"),
    # One word in quotes is what it was.
    ("say 'what is up'", "what is up"),
    ('say "a \\"b\\" \\\\ \'c\'"  ', "a \"b\" \\ 'c'"),
    ("say ''", ""),
    ("say 'a' 'b'", "'a' 'b'"),
    ("say 'a'b", "'a'b"),
    ("say 'a\\' b'", "'a\\' b'"),
    # Words and options before it, options behind it.
    ("remind 5", (5, "tea", False, "bell")),
    ("remind 5 mum's tea", (5, "mum's tea", False, "bell")),
    ("remind '5' 'mum is \"here\"'", (5, 'mum is "here"', False, "bell")),
    ("remind --loud 5 --by 'the bell' mum's", (5, "mum's", True, "the bell")),
    ("remind --by=x 5 --no-loud don't", (5, "don't", False, "x")),
    ("remind 5 don't --loud  --by me", (5, "don't", True, "me")),
    ("remind 5 'a  b' --by=me", (5, "a  b", False, "me")),
    ("remind 5 a --by me or not", (5, "a --by me or not", False, "bell")),
    ("remind 5 don't --by 'me'", (5, "don't --by 'me'", False, "bell")),
    ("remind 5 a --loud=x --nope x --by", (5, "a --loud=x --nope x --by", False, "bell")),
    ("remind -- 5 --loud it's --loud", (5, "--loud it's --loud", False, "bell")),
    ("remind 5 -- --loud", (5, "--loud", False, "bell")),
    ("remind 5 --loud -- 'a b'", (5, "a b", True, "bell")),
    ("maybe", (None, "", {})),
    ("maybe --by x --to=y it's", ("it's", "x", {"to": "y"})),
    ("maybe it's --to=y", ("it's --to=y", "", {})),
]


@pytest.mark.parametrize(("line", "expected"), TEXT_LINES)
def test_free_text_is_taken_as_it_was_typed(line: str, expected: Any) -> None:
    call = texts().prepare(line)
    assert call.command.function(*call.args, **call.kwargs) == expected


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("say", "TEXT is missing"), ("say  ", "TEXT is missing"), ("remind", "MINUTES is missing"),
        ("remind it's", "no closing quote"), ("remind --by 'x 5 a", "no closing quote"),
        ("remind --nope 5 a", "unknown option '--nope'"), ("remind 5 --by", "--by needs a value"),
        ("remind 5 --by x a --by y", "--by is given twice"),
        ("remind 5 a --by x --by y", "--by is given twice"), ("remind soon a", "whole number"),
    ],
)  # fmt: skip
def test_wrong_line_with_free_text_is_a_usage_error(line: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        texts().prepare(line)


@settings(max_examples=300, deadline=None)
@given(LINE)
def test_any_free_text_arrives_but_for_blanks_and_quotes_around_it(text: str) -> None:
    commands, stripped = texts(), text.strip(" \t\r\n")
    if not stripped:
        return
    (found,) = commands.prepare(f"say {text}").args
    if stripped[0] in "\"'":
        with contextlib.suppress(ValueError):
            words = shlex.split(stripped)
            assert found in (stripped, *words[:1])
    else:
        assert found == stripped
    assert commands.prepare("say", {"text": text}).args == [text]


def test_long_free_text_is_not_split() -> None:
    commands = texts()
    for text in ["it's " * 200_000, "--loud " * 150_000, "'a' " * 250_000, '"' + "\\" * 999_999]:
        began = time.process_time()
        (found,) = commands.prepare(f"say {text}").args
        assert found == text.strip()
        assert commands.prepare(f"remind 5 x {text} x").args == [5, f"x {text} x"]
        assert time.process_time() - began < 0.1
    with pytest.raises(UsageError):
        commands.prepare("remind " + "--by x " * 100_000)


def test_free_text_is_told_as_text() -> None:
    command = texts().commands["remind"]
    assert command.usage == "remind MINUTES [TEXT]... [--loud] [--by BY]"
    assert command.arguments[1] == {
        "name": "text", "type": "text", "required": False, "default": "tea", "repeated": True,
    }  # fmt: skip
    assert command.input_schema is not None
    assert command.input_schema["properties"]["text"] == {"type": "string", "default": "tea"}
    with pytest.raises(UsageError, match="must be a text"):
        texts().prepare("say", {"text": ["a"]})


def test_free_text_is_what_is_left() -> None:
    def early(text: Text, more: str) -> None: ...
    def words(text: Text, *more: str) -> None: ...
    def many(*text: Text) -> None: ...

    for function in (early, words, many):
        with pytest.raises(TypeError, match="a Text takes what is left"):
            Command(function)


def test_other_annotations_say_what_they_annotate() -> None:
    commands = processor()

    def count(number: Annotated[int, "how many"], *, note: Text = "") -> Any: ...

    commands.command(count)
    call = commands.prepare("count 3 --note 'a b'")
    assert (call.args, call.kwargs) == ([3], {"note": "a b"})


async def ready_at_once(number: int = 1) -> int:
    if number == 0:
        raise CommandFailed("nothing")
    return number + 1


async def waits_at_times(number: int = 1) -> int:
    if number > 1:
        await asyncio.sleep(0)
    return number + 1


async def waits_in_a_with() -> None:
    async with asyncio.Lock():
        pass


async def waits_in_a_loop(context: Context) -> None:
    async for _ in context.client:
        pass


async def has_context(context: Context) -> str:
    return "told nobody"


async def wants_its_task() -> Any:
    return asyncio.current_task()


async def is_nested() -> Any:
    async def inner() -> None:
        await asyncio.sleep(0)

    return inner.__name__


def test_coroutine_that_can_not_wait_needs_no_task() -> None:
    for function in (ready_at_once, is_nested):
        assert Command(function).inline, function
    marked: list[Any] = [AsyncMock(return_value=3, __name__="mock", __doc__="")]
    if sys.version_info >= (3, 12):
        marked.append(inspect.markcoroutinefunction(lambda: waits_at_times(2)))
    waiting: list[Any] = [waits_at_times, waits_in_a_with, waits_in_a_loop, has_context]
    for function in (*waiting, wants_its_task, *marked):
        assert not Command(function, name="waits").inline, function
    commands = processor(ready_at_once)
    ready = commands.prepare_plain("ready_at_once 5")
    assert ready is not None and commands.run_inline(ready) == 6
    with pytest.raises(CommandFailed, match="nothing"):
        commands.call_inline(commands.prepare("ready_at_once 0"))
    assert asyncio.run(commands.run(commands.prepare("ready_at_once"), Context())) == 2


async def test_what_a_decorator_made_of_a_coroutine_may_return_a_value_at_once() -> None:
    class Remembering:
        """As those of wrapt: it shows the attributes of what it wraps."""

        def __init__(self, function: Any) -> None:
            functools.update_wrapper(self, function)
            self.function = function
            self.seen: dict[Any, Any] = {}

        def __getattr__(self, name: str) -> Any:
            return getattr(self.__dict__["function"], name)

        def __call__(self, number: int) -> Any:
            return self.seen[number] if number in self.seen else self.find(number)

        async def find(self, number: int) -> int:
            self.seen[number] = await self.function(number)
            return self.seen[number]

    class Home:
        async def brew(self, number: int) -> int:
            await asyncio.sleep(0)
            return number

    assert Command(Home().brew).is_coroutine
    commands = CommandProcessor()
    commands.add(Command(Remembering(Home().brew), name="brew"))
    for _ in range(2):
        assert await run_line(commands, "brew 3") == 3


async def test_coroutine_that_can_not_wait_keeps_its_context_variables_to_itself() -> None:
    user: contextvars.ContextVar[str] = contextvars.ContextVar("user", default="nobody")

    async def log_in(name: str) -> str:
        user.set(name)
        return user.get()

    commands = processor(log_in)
    assert commands.commands["log_in"].inline
    assert commands.call_inline(commands.prepare("log_in ann")) == "ann"
    assert user.get() == "nobody"
