"""Services of Karna WS: what it can do, apart from how it is reached.

This file knows nothing of WebSockets or of the wire's JSON: it takes a command line with parameters
and gives back plain values, and it keeps a state for each service that a person can read.
Only the standard library is needed; nothing happens at import time.

Contents
    limits        every number with its unit and its reason
    errors        what a caller is told, each with its code
    services      Service: state, detail, status; Monitor: starts, checks and retries them
    commands      Context, Command, CommandProcessor: from a command line to a result
    programs      programs of this machine as commands (--allow-program)
    model server  client of any OpenAI-compatible HTTP endpoint
    vision        VisionService: `describe`
    language      LanguageService: `interpret` and `ask`
    backplane     RedisBackplane: broadcasts shared with other processes

A command is a function; its name, arguments and help come from its signature and docstring.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import codecs
import concurrent.futures
import contextlib
import contextvars
import functools
import inspect
import json
import logging
import math
import os
import random
import re
import signal
import socket
import struct
import sys
import threading
import time
import types
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar, Union
from typing import get_args, get_origin, overload
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from difflib import SequenceMatcher
    from http.client import HTTPConnection, HTTPResponse

__all__ = [
    "Call", "Command", "CommandFailed", "CommandProcessor", "CommandTimeout", "Context",
    "LanguageService", "Monitor", "RedisBackplane", "Service", "ServiceError", "Unavailable",
    "UnknownCommand", "UsageError", "VisionService",
]  # fmt: skip

log = logging.getLogger("karna.services")

Function = TypeVar("Function", bound=Callable[..., Any])
Value = TypeVar("Value")


# ---- limits ----------------------------------------------------------------------------------
# Read when they are used, so a test can scale them.

CANCEL_WAIT_S = 4.0  # a cancelled handler may clean up this long, then it is left behind
RETRY_FIRST_S, RETRY_MAX_S = 1.0, 30.0  # back-off of a failing service, doubled each time
IDLE_THREAD_S = 10.0  # a thread with nothing to do ends after this
MAX_NUMBER_DIGITS = 100  # int() takes quadratic time, and refuses more than 4,300 digits
MAX_ERROR_CHARS = 1_000  # of an exception's text in an answer
MAX_COUNTDOWN_S = 3_600.0
MAX_PREPARED, MAX_PREPARED_CHARS = 500, 200  # command lines kept as they were understood

TERM_WAIT_S = 2.0  # between SIGTERM and SIGKILL; below CANCEL_WAIT_S, which contains it
KILL_WAIT_S = 0.5  # for the kernel to end it and us to be told
PIPE_WAIT_S = 1.0  # for pipes that a child of an ended program still holds
MAX_LINE_CHARS = 64 * 1024  # of a program's output in one progress report
MAX_OUTPUT_CHARS = 256 * 1024  # of a program's output in the result: the last part is kept
MAX_UNREAD_BYTES = 64 * 1024  # of a program's output in memory before reading pauses

MODEL_CHECK_S = 4.0  # below the monitor's own limit, so that the detail names the server
MODEL_CONNECT_S = 5.0
MODEL_THREADS = 8  # requests to one model server at a time; further ones wait
MAX_MODEL_LINE_BYTES = 256 * 1024  # one event of a stream holds one token, or few
MAX_MODEL_BYTES = 4 * 1024 * 1024  # of one answer

MAX_IMAGE_BYTES = 32 * 1024 * 1024
MAX_IMAGE_SIDE = 65_535  # the most that JPEG and GIF can say
MAX_IMAGE_PIXELS = 2**28  # 1 GiB once decoded: more is a decompression bomb
MAX_JPEG_SEGMENTS = 1_000  # before the frame header; cameras write a few dozen

MAX_INTERPRET_CHARS = 1_000
MAX_INTERPRET_WORDS = 32
MAX_MATCHES = 5


# ---- errors ----------------------------------------------------------------------------------
# One small tree. Each becomes an error answer with its code in exactly one place, the dispatcher.


class ServiceError(Exception):
    """What a service tells its caller; `data` holds further fields for the answer."""

    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, **data: Any) -> None:
        super().__init__(message)
        self.data: dict[str, Any] = data


class UnknownCommand(ServiceError):
    """No command has this name; data["suggestions"] lists near names."""

    code = "unknown_command"


class UsageError(ServiceError):
    """The caller's arguments are wrong; data["usage"] is the usage line."""

    code = "usage"


class CommandFailed(ServiceError):
    """The handler raised, or cannot do what was asked."""

    code = "command_failed"


class CommandTimeout(ServiceError):
    """The command ran into its time limit."""

    code = "timeout"


class Unavailable(ServiceError):
    """A service, a model server or a program is not there now; later it may be."""

    code = "unavailable"


def explain(error: BaseException) -> str:
    """An exception's text, or its type's name when it has none (or cannot tell)."""
    try:
        text = str(error)
    except Exception:
        text = ""
    return text[:MAX_ERROR_CHARS] or type(error).__name__


def as_service_error(error: BaseException, who: str) -> ServiceError:
    """Turn whatever `who` raised into an error for its caller; a ServiceError stays as it is."""
    if isinstance(error, ServiceError):
        return error
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s raised", who, exc_info=error)
    return CommandFailed(explain(error))


# ---- services --------------------------------------------------------------------------------
# A service has a state that it, or the monitor that starts and checks it, sets. A failing service
# never takes the server down: it says so in its status and is tried again.

State = Literal["starting", "running", "degraded", "failed", "stopped"]
Action = Callable[[], Awaitable[None]]  # a service's start, stop or check


def utc_now() -> str:
    """The time as RFC 3339 in UTC with milliseconds, such as '2026-01-31T12:00:00.123Z'."""
    now = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"


def one_line(text: str, limit: int = 200) -> str:
    """`text` fit for a log or a status: printable, on one line, at most `limit` characters."""
    line = "".join(c if c.isprintable() else " " for c in text[: 4 * limit])
    return " ".join(line.split())[:limit]


class Service:
    """Something the server does, with a state and one line of detail for a person.

    Override `start`, `stop` and `check`; each is bounded in time by the monitor. Success of `start`
    or `check` means running; `check` raises Unavailable to say degraded. A service that calls
    `set_state` during `start` or `check` is believed.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: State = "starting"
        self.detail = ""
        self.since = utc_now()
        self.on_change: Callable[[Service], None] | None = None  # state or detail changed
        self.on_touch: Callable[[], None] | None = None  # get_status() answers differently
        self.times_set = 0  # how often set_state was called: the monitor compares

    async def start(self) -> None:
        """Get ready; raise anything to be tried again later."""

    async def stop(self) -> None:
        """Let go of everything; called once, also after a failed start."""

    async def check(self) -> None:
        """Find out whether the service still works; called every few seconds."""

    def set_state(self, state: State, detail: str = "") -> None:
        """Say how the service is; callbacks run only when something changed."""
        self.times_set += 1
        detail = one_line(detail)
        if (state, detail) == (self.state, self.detail):
            return
        if state != self.state:
            self.since = utc_now()
        self.state, self.detail = state, detail
        level = logging.WARNING if state in ("degraded", "failed") else logging.INFO
        log.log(level, "service %s is %s%s", self.name, state, detail and f": {detail}")
        try:
            self.touch()
            if self.on_change is not None:
                self.on_change(self)
        except Exception:  # ours, not the service's: it must not end the watching
            log.exception("a callback of service %s raised", self.name)

    def touch(self) -> None:
        """Tell that `get_status` answers differently now."""
        if self.on_touch is not None:
            self.on_touch()

    def get_status(self) -> dict[str, Any]:
        """{"state", "detail", "since"} and what a service adds."""
        return {"state": self.state, "detail": self.detail, "since": self.since}


class Tasks:
    """Tasks with an owner: each can be ended in bounded time, and none ends unnoticed."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()
        self._left: set[asyncio.Task[Any]] = set()  # ignored their cancellation

    def spawn(self, work: Coroutine[Any, Any, Value], name: str) -> asyncio.Task[Value]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        error = None if task.cancelled() else task.exception()  # looked at: asyncio is content
        if task in self._left:
            self._left.discard(task)
            outcome = f": {one_line(explain(error))}" if error else ""
            log.info("%s has ended after all%s", task.get_name(), outcome)

    async def end(self, *tasks: asyncio.Task[Any]) -> None:
        """Cancel tasks and wait a bounded time; one that ignores it is left behind, still owned."""
        for task in tasks:
            task.cancel()
        try:
            if tasks:
                await asyncio.wait(tasks, timeout=CANCEL_WAIT_S)
        finally:
            for task in tasks:
                if not task.done() and task not in self._left:
                    self._left.add(task)
                    log.warning("%s ignores its cancellation, left behind", task.get_name())

    async def end_all(self) -> None:
        await self.end(*(self._running - self._left))


class Monitor:
    """Starts services, checks them every `interval_s`, and tries failing ones again.

    Nothing a service raises comes out of here, SystemExit included; each call of a service ends
    after `timeout_s`. Delays after failures double from RETRY_FIRST_S to RETRY_MAX_S, with jitter.
    """

    def __init__(
        self, services: Iterable[Service], *, interval_s: float = 5.0, timeout_s: float = 5.0
    ) -> None:
        self.services = list(services)
        self.interval_s, self.timeout_s = interval_s, timeout_s
        self._tasks = Tasks()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to start and to watch the services, in one task of its own."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._watch_all(), name="monitor")

    async def stop(self) -> None:
        """End the watching, then stop the services, the last one first."""
        if self._task is not None:
            task, self._task = self._task, None
            task.cancel()
            await asyncio.wait({task})
        await self._tasks.end_all()
        for service in reversed(self.services):
            error = await self._attempt(service, service.stop)
            service.set_state("stopped", "" if error is None else explain(error))

    async def _watch_all(self) -> None:
        await asyncio.gather(*map(self._watch, self.services))

    async def _watch(self, service: Service) -> None:
        failures, started = 0, False
        while True:
            started = started or await self._step(service, service.start, "failed")
            healthy = started and await self._step(service, service.check, "degraded")
            if healthy and type(service).check is Service.check:
                return  # nothing to check: from here on the service itself says how it is
            failures = 0 if healthy else failures + 1
            await asyncio.sleep(self._delay_s(failures))

    async def _step(self, service: Service, action: Action, otherwise: State) -> bool:
        """Do one start or check and set the state it shows; false when it failed."""
        times_set = service.times_set
        error = await self._attempt(service, action)
        if error is not None:
            service.set_state(otherwise, explain(error))
        elif service.times_set == times_set and action == service.check:
            # Only now: a start that succeeds before a check that fails is no change to "running".
            service.set_state("running", service.detail if service.state == "running" else "")
        return error is None

    async def _attempt(self, service: Service, action: Action) -> BaseException | None:
        """Call `action` for at most `timeout_s`; what it raised is the result."""
        task = self._tasks.spawn(_outcome(action), f"service {service.name} {action.__name__}")
        try:
            done, _ = await asyncio.wait({task}, timeout=self.timeout_s)
        except asyncio.CancelledError:
            await self._tasks.end(task)
            raise
        if done:
            return asyncio.CancelledError() if task.cancelled() else task.result()
        await self._tasks.end(task)
        return Unavailable(f"no answer to {action.__name__} within {self.timeout_s:g} s")

    def _delay_s(self, failures: int) -> float:
        if not failures:
            return self.interval_s
        delay = min(RETRY_FIRST_S * 2.0 ** min(failures - 1, 30), RETRY_MAX_S)
        return delay * random.uniform(0.75, 1.25)  # jitter: nodes that failed together part


async def _outcome(action: Action) -> BaseException | None:
    """Await `action` and return what it raised: a task that raises SystemExit ends the loop."""
    try:
        await action()
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        log.debug("a service raised", exc_info=True)
        return error
    return None


# ---- commands --------------------------------------------------------------------------------
# Everything that can be known about a command is worked out when it is registered, so that a
# message costs one split, one look-up and the conversion of its words.


class Context:
    """What a command may ask for: its client, and a way to report progress.

    A parameter annotated `Context` receives it; it is not part of the usage. `send_progress` may
    return an awaitable: a client slow to read slows its command. Once the command has ended, both
    ways of reporting raise CommandFailed, which ends a handler that ignored its cancellation and
    a thread that cannot be cancelled at all.
    """

    __slots__ = ("_ended", "_loop", "_loop_thread", "_report", "_send", "client")

    def __init__(
        self,
        client: Any = None,
        send_progress: Callable[[Any], Awaitable[None] | None] | None = None,
    ) -> None:
        self.client = client
        self._send = send_progress
        self._ended = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread = 0
        self._report: Any = None  # the future a thread waits for in report()

    async def progress(self, value: Any) -> None:
        """Report from an `async def` command; waits while the client is slow to read."""
        if self._ended:
            raise CommandFailed("the command has ended")
        if self._send is not None:
            waiting = self._send(value)
            if waiting is not None:
                await waiting

    def report(self, value: Any) -> None:
        """Report from a plain `def` command, in its thread; blocks until the value is taken."""
        if self._ended or self._loop is None:
            raise CommandFailed("the command has ended")
        if threading.get_ident() == self._loop_thread:
            raise RuntimeError("report() is for threads: use `await context.progress(...)` here")
        progress = self.progress(value)
        try:
            self._report = asyncio.run_coroutine_threadsafe(progress, self._loop)
        except RuntimeError:  # the loop was closed meanwhile
            progress.close()
            raise CommandFailed("the command has ended") from None
        if self._ended:  # between the first look and the assignment
            self._report.cancel()
        try:
            self._report.result()
        except concurrent.futures.CancelledError:
            raise CommandFailed("the command has ended") from None

    def begin(self) -> None:
        """Called when the command starts, on the loop that runs it."""
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()

    def end(self) -> None:
        """Called when the command has its outcome: nothing may be reported after it."""
        self._ended = True
        if self._report is not None:
            self._report.cancel()


class Kind(NamedTuple):
    """A type of argument; `take` converts a word, and checks a JSON value.

    It raises ValueError with the words that follow the argument's name ("must be ...").
    """

    name: str
    take: Callable[[Any], Any]
    nullable: bool = False
    choices: tuple[Any, ...] = ()


def _exactly(problem: str, *kinds: type) -> Callable[[Any], Any]:
    def take(value: Any) -> Any:
        if type(value) not in kinds:  # exactly: bool is an int, and not meant here
            raise ValueError(problem)
        return value

    return take


def _whole_number(value: Any) -> int:
    if isinstance(value, str) and len(value) <= MAX_NUMBER_DIGITS:
        value = int(value) if re.fullmatch("[+-]?[0-9]+", value) else value
    if type(value) is not int:
        raise ValueError("must be a whole number")
    return value


def _finite(value: Any) -> float:
    try:
        if isinstance(value, str) and ("_" in value or len(value) > MAX_NUMBER_DIGITS):
            raise ValueError
        number = float(value) if type(value) in (str, int, float) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("must be a finite number")
    return number


_BOOLS = {"true": True, "yes": True, "on": True, "1": True,
          "false": False, "no": False, "off": False, "0": False}  # fmt: skip


def _yes_or_no(value: Any) -> bool:
    answer = _BOOLS.get(value.lower()) if isinstance(value, str) else value
    if type(answer) is not bool:
        raise ValueError("must be true or false")
    return answer


_ANY = Kind("any", lambda value: value, nullable=True)
_KINDS: dict[Any, Kind] = {
    inspect.Parameter.empty: _ANY,
    Any: _ANY,
    object: _ANY,
    str: Kind("str", _exactly("must be a text", str)),
    int: Kind("int", _whole_number),
    float: Kind("float", _finite),
    bool: Kind("bool", _yes_or_no),
    bytes: Kind("bytes", _exactly("must be bytes", bytes, bytearray)),
    list: Kind("list", _exactly("must be a list", list)),
    dict: Kind("dict", _exactly("must be an object", dict)),
}


def kind_of(annotation: Any) -> Kind:
    """The Kind of an annotation; TypeError when no command could be given such a value."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return _kind_of_literal(inner)
    if origin in (Union, types.UnionType):
        return _kind_of_union(inner)
    if origin is list:
        item, take_list = kind_of(inner[0]), _KINDS[list].take
        return Kind(f"list[{item.name}]", lambda value: list(map(item.take, take_list(value))))
    try:
        return _KINDS[origin or annotation]
    except (KeyError, TypeError):
        raise TypeError(f"{annotation!r} is no type of an argument: use str, int, float, bool, "
                        "bytes, list, dict, Literal, Optional or Any") from None  # fmt: skip


def _kind_of_literal(values: tuple[Any, ...]) -> Kind:
    choices = tuple(value for value in values if value is not None)
    words = {str(c).lower() if isinstance(c, bool) else str(c): c for c in choices}

    def take(value: Any) -> Any:
        if any(type(value) is type(each) and value == each for each in values):  # 1 is not True
            return value
        if not isinstance(value, str) or value not in words:
            raise ValueError(f"must be one of {', '.join(words)}")
        return words[value]

    return Kind(type(choices[0]).__name__, take, len(choices) < len(values), choices)


def _kind_of_union(members: tuple[Any, ...]) -> Kind:
    kinds = [kind_of(member) for member in members if member is not type(None)]
    nullable = type(None) in members or any(kind.nullable for kind in kinds)

    def take(value: Any) -> Any:
        if value is None and nullable:
            return None
        problems = []
        for kind in kinds:
            try:
                return kind.take(value)
            except ValueError as problem:
                problems.append(str(problem))
        raise ValueError(" or ".join(problems))

    choices = tuple(choice for kind in kinds for choice in kind.choices)
    return Kind("|".join(kind.name for kind in kinds), take, nullable, choices)


_REQUIRED: Any = inspect.Parameter.empty
Bound = tuple[list[Any], dict[str, Any]]  # positional and keyword arguments of a function


@dataclass(frozen=True, slots=True)
class Parameter:
    """One argument of a command, as its function declares it."""

    name: str
    kind: Kind
    default: Any = _REQUIRED
    is_option: bool = False
    is_repeated: bool = False

    @property
    def is_required(self) -> bool:
        return not self.kind.nullable if self.is_repeated else self.default is _REQUIRED

    @property
    def is_flag(self) -> bool:
        return self.is_option and self.kind is _KINDS[bool]

    @property
    def label(self) -> str:
        """As messages name it: 'TEXT' or '--level'."""
        return "--" + self.name.replace("_", "-") if self.is_option else self.name.upper()

    @property
    def usage(self) -> str:
        """As the usage line shows it: 'TEXT...', '[NAME]', '[--level info|warning]'."""
        text = "|".join(map(str, self.kind.choices)) or self.name.upper()
        if self.is_flag:
            off = "--no-" + self.label[2:]
            text = {True: off, False: self.label}.get(self.default, f"{self.label}|{off}")
        elif self.is_option:
            text = f"{self.label} {text}"
        if not self.is_required:
            text = f"[{text}]"
        return text + "..." if self.is_repeated else text

    def describe(self) -> dict[str, Any]:
        """As `help` shows it."""
        shown = {"name": self.name, "type": self.kind.name, "required": self.is_required}
        if isinstance(self.default, str | int | float | None):
            shown["default"] = self.default
        if self.kind.choices:
            shown["choices"] = list(self.kind.choices)
        if self.is_repeated:
            shown["repeated"] = True
        if self.is_option:
            shown["option"] = self.label
        return shown

    def take(self, value: Any) -> Any:
        """Convert one word or JSON value; ValueError with a sentence for the caller."""
        try:
            return self.kind.take(value)
        except ValueError as problem:
            shown = repr(value[:40]) if isinstance(value, str) else type(value).__name__
            raise ValueError(f"{self.label} {problem}, not {shown}") from None


_COMMON_STEMS = {"the", "and", "for", "with", "that", "this", "what", "are", "you", "can", "from",
                 "into"}  # fmt: skip


def _stems(text: str) -> set[str]:
    """The telling words of a text, cut to five letters: 'counts' and 'counting' are one."""
    return {word[:5] for word in re.findall(r"\w{3,}", text.lower())} - _COMMON_STEMS


class Command:
    """A function made into a command: its tables are compiled here, once.

    Positional parameters become words, keyword-only ones options (`--name VALUE`, `--name=VALUE`,
    `--flag`, `--no-flag`), and `*words` takes one word or more; none will do when its type allows
    None, as `*words: str | None` or no annotation does. Every parameter can be given by name in
    `params` instead. `inline` marks a plain function that never blocks and runs on the loop;
    functions with `yield` are `async def`.
    Raises TypeError or ValueError, at registration, for what no command line could call.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        aliases: Sequence[str] = (),
        inline: bool = False,
    ) -> None:
        if not callable(function):
            raise TypeError(f"a command is made from a function, not from {function!r}")
        self.function = function
        self.name = name or str(getattr(function, "__name__", type(function).__name__))
        self.aliases = tuple(aliases)
        self.names = (self.name, *self.aliases)
        for each in self.names:
            if not re.fullmatch(r"[^\s\"'\\]+", each) or not each.isprintable():
                raise ValueError(f"a command's name is one word without quotes, not {each!r}")
        self.help = inspect.cleandoc(getattr(function, "__doc__", None) or "")
        self.summary = self.help.partition("\n")[0]
        self.stems = _stems(self.help)
        self.inline = inline
        self.runs = self._way_to_run()
        self._read_signature()
        self.arguments = [each.describe() for each in self._by_name.values()]
        self.usage = " ".join([self.name, *(each.usage for each in self._by_name.values())])
        if self._extra is not None:
            self.usage += " [--NAME VALUE]..."

    def _way_to_run(self) -> str:
        """How the function is called: 'stream', 'async', 'inline' or 'thread'."""
        forms = (self.function, getattr(self.function, "__call__", None))  # noqa: B004
        if any(map(inspect.isgeneratorfunction, forms)):
            raise TypeError(f"command {self.name}: make it `async def`, for its yields to report")
        is_stream = any(map(inspect.isasyncgenfunction, forms))
        is_async = any(map(inspect.iscoroutinefunction, forms))
        if self.inline and (is_stream or is_async):
            raise TypeError(f"command {self.name}: inline is for plain functions")
        if is_stream or is_async:
            return "stream" if is_stream else "async"
        return "inline" if self.inline else "thread"

    def _read_signature(self) -> None:
        try:
            signature = inspect.signature(self.function, eval_str=True)
        except NameError as error:
            raise TypeError(f"command {self.name}: unknown annotation: {error}") from None
        self._by_name: dict[str, Parameter] = {}
        self._words: list[Parameter] = []
        self._repeated: Parameter | None = None
        self._extra: Parameter | None = None  # what **kwargs takes
        self.context_at: int | None = None
        self.context_name: str | None = None
        for declared in signature.parameters.values():
            if Context in (declared.annotation, *get_args(declared.annotation)):
                self._read_context(declared)
            else:
                self._read_parameter(declared)
        options = [each for each in self._by_name.values() if each.is_option]
        flags = [each for each in options if each.is_flag]
        self._flags = {"no_" + each.name: (each, False) for each in flags}
        self._flags |= {each.name: (each, True) for each in flags}
        self._has_options = bool(options) or self._extra is not None
        self._required = [each for each in self._by_name.values() if each.is_required]
        # The two commonest shapes are bound without a loop: only words, and nothing at all.
        any_words = self._repeated is not None and self._repeated.kind in (_KINDS[str], _ANY)
        self._only_words = any_words and not self._words and not self._has_options
        self._bare = None if self._required else self._arrange({})[0]

    def _read_context(self, declared: inspect.Parameter) -> None:
        if self.inline:
            raise TypeError(f"command {self.name}: an inline command has no Context")
        self.context_name = declared.name
        if declared.kind is not declared.KEYWORD_ONLY:
            self.context_at = len(self._words)

    def _read_parameter(self, declared: inspect.Parameter) -> None:
        try:
            kind = kind_of(declared.annotation)
        except TypeError as error:
            raise TypeError(f"command {self.name}, parameter {declared.name}: {error}") from None
        is_option = declared.kind is declared.KEYWORD_ONLY
        is_repeated = declared.kind is declared.VAR_POSITIONAL
        parameter = Parameter(declared.name, kind, declared.default, is_option, is_repeated)
        if declared.kind is declared.VAR_KEYWORD:
            self._extra = parameter
            return
        self._by_name[parameter.name] = parameter
        if parameter.is_repeated:
            self._repeated = parameter
        elif not parameter.is_option:
            self._words.append(parameter)

    def describe(self) -> dict[str, Any]:
        """As `help` lists it."""
        return {"name": self.name, "usage": self.usage, "summary": self.summary,
                "aliases": list(self.aliases), "arguments": self.arguments}  # fmt: skip

    def usage_error(self, problem: str) -> UsageError:
        return UsageError(f"{problem}; usage: {self.usage}", usage=self.usage)

    def bind(self, words: Sequence[str], params: Mapping[str, Any]) -> Bound:
        """Convert words and named parameters to the function's arguments; raises UsageError.

        The Context is not among them: `run` puts it in.
        """
        if not params:
            if words:
                if self._only_words:
                    return list(words), {}
            elif self._bare is not None:
                return self._bare[:], {}
        given: dict[str, Any] = {}
        try:
            rest = self._take_options(words, given) if self._has_options else words
            self._take_words(rest, given)
            self._take_params(params, given)
            return self._arrange(given)
        except ValueError as problem:
            raise self.usage_error(str(problem)) from None

    def _take_options(self, words: Sequence[str], given: dict[str, Any]) -> list[str]:
        """Take `--name VALUE` and its like out of the words, up to a `--`."""
        rest: list[str] = []
        left = iter(words)
        for word in left:
            if word == "--":
                rest.extend(left)
            elif word.startswith("--"):
                self._take_option(word, left, given)
            else:
                rest.append(word)
        return rest

    def _take_option(self, word: str, left: Iterator[str], given: dict[str, Any]) -> None:
        label, equals, text = word.partition("=")
        name = label[2:].replace("-", "_")
        if name in self._flags and not equals:
            parameter, value = self._flags[name]
            return self._give(parameter, value, given)
        option = self._by_name.get(name)
        if option is None or not option.is_option:
            option = self._extra_named(name, f"unknown option {label[:40]!r}")
        follows = text if equals else next(left, None)
        if follows is None:
            raise ValueError(f"{label[:40]} needs a value")
        return self._give(option, follows, given)

    def _take_words(self, words: Sequence[str], given: dict[str, Any]) -> None:
        for parameter, word in zip(self._words, words, strict=False):
            given[parameter.name] = parameter.take(word)
        further = words[len(self._words) :]
        if further and self._repeated is None:
            raise ValueError(f"too many arguments, from {further[0][:40]!r} on")
        if further and self._repeated is not None:
            given[self._repeated.name] = [self._repeated.take(word) for word in further]

    def _take_params(self, params: Mapping[str, Any], given: dict[str, Any]) -> None:
        for name, value in params.items():
            parameter = self._by_name.get(name)
            if parameter is None:
                parameter = self._extra_named(name, f"unknown parameter {name[:40]!r}")
            self._give(parameter, value, given)

    def _extra_named(self, name: str, problem: str) -> Parameter:
        """The parameter that **kwargs makes of `name`; the Context's name is never a client's."""
        if self._extra is None or not name or name in {*self._by_name, self.context_name}:
            raise ValueError(problem)
        return Parameter(name, self._extra.kind, is_option=True)

    def _give(self, parameter: Parameter, value: Any, given: dict[str, Any]) -> None:
        if parameter.name in given:
            raise ValueError(f"{parameter.label} is given twice")
        if not parameter.is_repeated:
            given[parameter.name] = parameter.take(value)
        elif value != []:
            values = value if isinstance(value, list) else [value]
            given[parameter.name] = [parameter.take(each) for each in values]

    def _arrange(self, given: dict[str, Any]) -> Bound:
        """Put what was given into the order of the signature; ValueError for what is missing."""
        for parameter in self._required:
            if parameter.name not in given:
                raise ValueError(f"{parameter.label} is missing")
        args = [given.pop(each.name, each.default) for each in self._words]
        if self._repeated is not None:
            args += given.pop(self._repeated.name, ())
        return args, given  # what is left are options


@dataclass(slots=True, eq=False)
class Call:
    """A command with its arguments, ready to run once."""

    command: Command
    args: list[Any]
    kwargs: dict[str, Any]


_PIECE = re.compile(
    r"""(?P<blank>[ \t\r\n]+) | (?P<plain>[^ \t\r\n"'\\]+) | '(?P<single>[^']*)'
    | "(?P<double>(?:[^"\\]|\\.)*+)" | \\(?P<escaped>.) | (?P<stray>.)""",
    re.VERBOSE | re.DOTALL,
)


def split_words(line: str) -> list[str]:
    """Split a command line as a POSIX shell would: quotes and backslashes, nothing else.

    Gives what shlex.split gives, but in microseconds a word: a line may be 1 MiB long.
    Raises UsageError for a quote that is not closed.
    """
    words: list[list[str]] = []  # each of its pieces: '' is a word, nothing is not
    is_between = True
    for piece in _PIECE.finditer(line):
        kind, text = piece.lastgroup, piece[piece.lastindex or 0]
        if kind == "stray":
            what = "nothing to escape" if text == "\\" else "no closing quote"
            where = f"after {text}, character {piece.start() + 1}"
            raise UsageError(f"the command line has {what} {where}")
        if kind == "double":  # here a backslash escapes itself and the quote, nothing else
            text = re.sub(r'\\(["\\])', r"\1", text)
        if kind != "blank":
            if is_between:
                words.append([])
            words[-1].append(text)
        is_between = kind == "blank"
    return ["".join(pieces) for pieces in words]


def rank(text: str, commands: Iterable[Command]) -> list[tuple[float, Command]]:
    """Commands near to a free text, best first, each with a score above 0 and up to 1.

    A word like a name or an alias counts most, words of the docstring less. The result depends on
    nothing but its input; time is bounded by the limits on characters and words.
    """
    from difflib import SequenceMatcher

    text = text[:MAX_INTERPRET_CHARS].lower()
    words, stems = re.findall(r"\w+", text)[:MAX_INTERPRET_WORDS], _stems(text)
    matchers = [SequenceMatcher(b=word, autojunk=False) for word in dict.fromkeys(words)]
    ranked = []
    for command in commands:
        name = max((_likeness(m, n.lower()) for m in matchers for n in command.names), default=0.0)
        told = len(stems & command.stems) / len(stems) if stems else 0.0
        score = round(0.7 * name + 0.3 * min(told * 2, 1.0), 3)
        if score >= 0.1:
            ranked.append((score, command))
    return sorted(ranked, key=lambda pair: (-pair[0], pair[1].name))


def _likeness(matcher: SequenceMatcher[str], name: str) -> float:
    """How like a word is to a name, 0 to 1; anything below 0.7 ('image', 'time') is 0."""
    matcher.set_seq1(name)
    if matcher.real_quick_ratio() < 0.7 or matcher.quick_ratio() < 0.7:
        return 0.0  # cheap upper bounds first
    ratio = matcher.ratio()
    return ratio if ratio >= 0.7 else 0.0


class ThreadPool:
    """At most `max_threads` daemon threads, started on demand and used again.

    Unlike those of concurrent.futures they never hold the exit of the process. Work that waits for
    a thread has no bound of its own: each client's running commands have one.
    """

    def __init__(self, max_threads: int, name: str) -> None:
        self.max_threads = max_threads
        self._name = name
        self._jobs: deque[tuple[concurrent.futures.Future[Any], Callable[[], Any]]] = deque()
        self._news = threading.Condition()
        self._threads = self._idle = 0
        self._closed = False

    async def call(self, work: Callable[[], Value]) -> Value:
        """Run `work` in a thread with this task's context variables; raises only ServiceErrors.

        When the caller is cancelled, work that has not begun never begins; work that has keeps
        its thread, and its place among `max_threads`, until it ends by itself.
        """
        future: concurrent.futures.Future[Value] = concurrent.futures.Future()
        job = future, functools.partial(contextvars.copy_context().run, work)
        with self._news:
            if self._closed:
                raise Unavailable("the server is stopping")
            if self._idle <= len(self._jobs) and self._threads < self.max_threads:
                self._start_thread()
            self._jobs.append(job)
            self._news.notify()
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            with self._news, contextlib.suppress(ValueError):
                self._jobs.remove(job)
            raise

    def _start_thread(self) -> None:
        name = f"{self._name}-{self._threads + 1}"
        try:
            threading.Thread(target=self._work, name=name, daemon=True).start()
        except RuntimeError:  # the system has no more of them
            raise Unavailable("no thread can be started") from None
        self._threads += 1

    def _work(self) -> None:
        while self._next_job_done():
            pass

    def _next_job_done(self) -> bool:
        """Do one job; false when there is none for long, which ends the thread."""
        with self._news:
            self._idle += 1
            self._news.wait_for(lambda: self._jobs or self._closed, timeout=IDLE_THREAD_S)
            self._idle -= 1
            if not self._jobs or self._closed:
                self._threads -= 1
                return False
            future, work = self._jobs.popleft()
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(work())
            except BaseException as error:  # SystemExit too: it ends neither thread nor process
                future.set_exception(as_service_error(error, "a thread's command"))
        return True

    def open(self) -> None:
        self._closed = False

    def close(self) -> None:
        """Let idle threads end and take no more work; busy threads are abandoned."""
        with self._news:
            self._closed = True
            self._jobs.clear()
            self._news.notify_all()


class CommandProcessor(Service):
    """A registry of commands, and what runs them.

    Plain `def` runs in a bounded pool of threads, `async def` on the loop; of an async generator
    each value is reported as progress and the last one is the result.
    """

    def __init__(
        self, *, builtins: bool = True, timeout_s: float | None = 60.0, max_threads: int = 32
    ) -> None:
        super().__init__("command")
        self.commands: dict[str, Command] = {}  # by name and by alias
        self.timeout_s = timeout_s
        self.running = self.done = self.failed = 0
        self._threads = ThreadPool(max_threads, "karna-command")
        self._tasks = Tasks()
        self.prepared: dict[str, Call] = {}  # recent lines of inline commands, ready to run
        self._replaceable: set[str] = set()  # a program may have its own `echo`
        if builtins:
            _add_builtins(self)
            self._replaceable = set(self.commands)

    @overload
    def command(self, function: Function) -> Function: ...

    @overload
    def command(
        self, *, name: str | None = None, aliases: Sequence[str] = (), inline: bool = False
    ) -> Callable[[Function], Function]: ...

    def command(self, function: Callable[..., Any] | None = None, **options: Any) -> Any:
        """Decorator, with or without parentheses, that makes a function a command."""

        def register(function: Function) -> Function:
            self.add(Command(function, **options))
            return function

        return register if function is None else register(function)

    def add(self, command: Command, *, gives_way: bool = False) -> None:
        """Register a command; ValueError when one of its names is taken.

        gives_way: a later command may take its names, as it may those of built-in ones.
        """
        for name in command.names:
            if name in self.commands and name not in self._replaceable:
                raise ValueError(f"there is a command {name!r} already")
        for name in command.names:
            self.commands[name] = command
            (self._replaceable.add if gives_way else self._replaceable.discard)(name)
        self.prepared.clear()
        self.touch()

    def prepare(self, line: str, params: Mapping[str, Any] = types.MappingProxyType({})) -> Call:
        """Find the command of a line and bind its arguments; raises UnknownCommand, UsageError.

        Called for every message. A printable text has no blank but the space, so that str.split
        splits it as a shell would, unless there are quotes or backslashes.
        """
        if not params:
            call = self.prepared.get(line)
            if call is not None:
                return call
        if line.isprintable() and "\\" not in line and '"' not in line and "'" not in line:
            words = line.split()
        else:
            words = split_words(line)
        if not words:
            raise UsageError("the command line is empty", usage="COMMAND [ARGUMENT]...")
        name = words.pop(0)
        command = self.commands.get(name)
        if command is None:
            raise self._unknown(name)
        call = Call(command, *command.bind(words, params))
        if command.inline and not params and len(line) <= MAX_PREPARED_CHARS:
            # Clients say the same again; an inline call has no Context and may run many times.
            if len(self.prepared) >= MAX_PREPARED:
                self.prepared.clear()
            self.prepared[line] = call
        return call

    def _unknown(self, name: str) -> UnknownCommand:
        near = self.suggest(name)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; `help` lists the commands"
        return UnknownCommand(f"no command {one_line(name, 40)!r}{hint}", suggestions=near)

    def suggest(self, text: str, limit: int = 3) -> list[str]:
        """Names of commands near to a text, best first."""
        return [command.name for _, command in rank(text, self.distinct())[:limit]]

    def distinct(self) -> list[Command]:
        """Each command once, by name."""
        return [command for name, command in sorted(self.commands.items()) if name == command.name]

    def call_inline(self, call: Call) -> Any:
        """Run an inline command now; whatever it raises comes out as a ServiceError."""
        try:
            value = call.command.function(*call.args, **call.kwargs)
        except BaseException as error:
            self.failed += 1
            self.touch()
            raise as_service_error(error, call.command.name) from None
        self.done += 1  # without touch(): who keeps a status compares `done`, which is cheaper
        return value

    async def run(self, call: Call, context: Context) -> Any:
        """Run a command within the time limit and return its result.

        Raises CommandTimeout, CommandFailed or what ServiceError the handler raised. When this
        coroutine is cancelled the handler is too. A handler that goes on regardless is left
        behind after CANCEL_WAIT_S: the caller gets its one outcome in bounded time.
        """
        self.running += 1
        self.touch()
        context.begin()
        task = self._tasks.spawn(self._perform(call, context), f"command {call.command.name}")
        try:
            value = await self._outcome(task, call.command)
            self.done += 1
            return value
        except BaseException:
            self.failed += 1
            raise
        finally:
            context.end()
            self.running -= 1
            self.touch()

    async def _outcome(self, task: asyncio.Task[Any], command: Command) -> Any:
        try:
            done, _ = await asyncio.wait({task}, timeout=self.timeout_s)
        except asyncio.CancelledError:
            await self._tasks.end(task)
            raise
        if not done:
            await self._tasks.end(task)
            raise CommandTimeout(f"{command.name} took longer than {self.timeout_s:g} s")
        if task.cancelled():  # not by us: the handler raised it, or stop() ended everything
            if self.state == "stopped":
                raise Unavailable("the server is stopping")
            raise CommandFailed("CancelledError")
        error = task.exception()
        if error is not None:
            raise as_service_error(error, command.name) from None
        return task.result()

    async def _perform(self, call: Call, context: Context) -> Any:
        command = call.command
        if command.context_at is not None:
            call.args.insert(command.context_at, context)
        elif command.context_name is not None:
            call.kwargs[command.context_name] = context
        try:
            if command.runs == "stream":
                return await _last_value(command.function(*call.args, **call.kwargs), context)
            function = functools.partial(command.function, *call.args, **call.kwargs)
            value = await self._threads.call(function) if command.runs == "thread" else function()
            return await value if inspect.isawaitable(value) else value
        except (SystemExit, KeyboardInterrupt) as error:  # a task that raises them ends the loop
            raise as_service_error(error, command.name) from None

    async def start(self) -> None:
        self._threads.open()
        self.set_state("running", f"{len(self.distinct())} commands")

    async def stop(self) -> None:
        """End running commands and their programs; threads that go on are abandoned."""
        self.set_state("stopped")
        self._threads.close()
        await self._tasks.end_all()

    def get_status(self) -> dict[str, Any]:
        """Adds "running", "done" and "failed", counts of calls, and "commands", of commands."""
        counts = {"running": self.running, "done": self.done, "failed": self.failed}
        return super().get_status() | counts | {"commands": len(set(self.commands.values()))}

    def allow_program(self, name: str, path: str | None = None) -> None:
        """Make a program of this machine a command; ValueError when there is no such program."""
        from shutil import which

        found = which(path or name)
        if found is None:
            raise ValueError(f"no program {path or name!r} that can be executed")
        self.add(_program_command(name, os.path.abspath(found)))


async def _last_value(values: AsyncIterator[Any], context: Context) -> Any:
    """Report each value of an async generator; its last one is the result."""
    value = None
    async with contextlib.aclosing(values) as stream:  # type: ignore[type-var]
        async for value in stream:
            await context.progress(value)
            await asyncio.sleep(0)  # one that never waits must not stall the other clients
    return value


def _add_builtins(commands: CommandProcessor) -> None:
    @commands.command(name="help", inline=True)
    def help_(command: str | None = None) -> dict[str, Any]:
        """List the commands, or tell all about one."""
        if command is None:
            return {"commands": [each.describe() for each in commands.distinct()]}
        found = commands.commands.get(command)
        if found is None:
            raise commands._unknown(command)
        return {**found.describe(), "help": found.help}

    @commands.command(inline=True)
    def echo(*text: str) -> str:
        """Answer with the text."""
        return " ".join(text)

    @commands.command(name="time", inline=True)
    def time_() -> dict[str, Any]:
        """Tell the server's time in UTC."""
        return {"utc": utc_now(), "unix": time.time()}

    @commands.command
    async def countdown(seconds: float) -> AsyncIterator[dict[str, Any]]:
        """Count seconds down and report progress; something to cancel."""
        if not 0 <= seconds <= MAX_COUNTDOWN_S:
            command = commands.commands["countdown"]
            raise command.usage_error(f"SECONDS must be 0 to {MAX_COUNTDOWN_S:g}")
        end, remaining = time.monotonic() + seconds, seconds
        while remaining > 0:
            percent = round(100 * (1 - remaining / seconds), 1)
            yield {"remaining": _short(remaining), "percent": _short(percent)}
            remaining = max(remaining - 1, 0)
            await asyncio.sleep(end - remaining - time.monotonic())
        yield {"remaining": 0, "percent": 100}


def _short(number: float) -> float:
    """3 for 3.0 and 0.3 for 0.30000000000000004."""
    number = round(number, 3)
    return int(number) if number.is_integer() else number


# ---- programs --------------------------------------------------------------------------------
# A program runs without a shell, in a session of its own, so that it ends with all its children.
# Nothing outside the process is ever executed unless allow_program was called.


def _program_command(name: str, path: str) -> Command:
    async def program(context: Context, *argument: str | None) -> dict[str, Any]:
        return await run_program(path, [str(each) for each in argument], context)

    program.__doc__ = f"""Run the program {name} of the server's machine.

        Its lines are reported as they come. The result has its exit code and its output, of which
        the last {MAX_OUTPUT_CHARS // 1024} Ki characters are kept."""
    return Command(program, name=name)


async def run_program(path: str, arguments: Sequence[str], context: Context) -> dict[str, Any]:
    """Run a program to its end, reporting {"stream", "line"} for each line of its output.

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
    output = ProgramOutput()
    try:
        async for stream, data in watch.chunks():
            for line in output.add(stream, data):
                await context.progress({"stream": stream, "line": line})
            await asyncio.sleep(0)  # a flood of lines must not stall the other clients
        for stream, line in output.rest():
            await context.progress({"stream": stream, "line": line})
    finally:
        await _end_program(transport, watch)
    exit_code = transport.get_returncode() or 0
    result = {"exit_code": exit_code, "output": output.kept, "truncated": output.is_truncated}
    if exit_code < 0:
        known = {each.value: each.name for each in signal.Signals}
        result["signal"] = known.get(-exit_code, f"signal {-exit_code}")
    return result


class ProgramWatch(asyncio.SubprocessProtocol):
    """Hears of a program's output and end. Reading pauses while nobody takes the output.

    Not asyncio.create_subprocess_exec: its streams have no public way to let go of a pipe that a
    grandchild holds, and in Python 3.11 its wait() waits for such a pipe.
    """

    def __init__(self) -> None:
        self._transport: Any = None
        self._chunks: deque[tuple[int, bytes]] = deque()
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
        self._unread += len(data)
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

    async def chunks(self) -> AsyncIterator[tuple[str, bytes]]:
        """("stdout" or "stderr", bytes) in order of arrival, until the program has ended.

        Children that outlive it and hold its pipes are waited for PIPE_WAIT_S in all.
        """
        patience = PIPE_WAIT_S
        while True:
            while self._chunks:
                fd, data = self._chunks.popleft()
                self._unread -= len(data)
                yield ("stdout" if fd == 1 else "stderr"), data
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


class ProgramOutput:
    """Cuts a program's output into lines, and keeps the last part of it."""

    def __init__(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")
        self._decoders = {"stdout": decoder("replace"), "stderr": decoder("replace")}
        self._rest = {"stdout": "", "stderr": ""}
        self.kept = ""
        self.is_truncated = False

    def add(self, stream: str, data: bytes, final: bool = False) -> list[str]:
        """The lines that `data` completes; a line longer than MAX_LINE_CHARS is split."""
        text = self._rest[stream] + self._decoders[stream].decode(data, final)
        *lines, rest = text.split("\n")
        parts = [part for line in lines for part in _cut(line.removesuffix("\r"))]
        *more, rest = _cut(rest)
        if final and rest:
            more, rest = [*more, rest], ""
        self._keep(text[: len(text) - len(rest)])
        self._rest[stream] = rest
        return parts + more

    def rest(self) -> list[tuple[str, str]]:
        """The last lines, which no newline ended."""
        return [(stream, line) for stream in self._rest for line in self.add(stream, b"", True)]

    def _keep(self, text: str) -> None:
        self.is_truncated = self.is_truncated or len(self.kept) + len(text) > MAX_OUTPUT_CHARS
        self.kept = (self.kept + text)[-MAX_OUTPUT_CHARS:]


def _cut(line: str) -> list[str]:
    return [line[at : at + MAX_LINE_CHARS] for at in range(0, len(line), MAX_LINE_CHARS)] or [""]


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


# ---- model server ----------------------------------------------------------------------------
# Any HTTP endpoint that speaks as OpenAI's does: Ollama, llama.cpp, vLLM. The standard library's
# client (TLS and chunks come with it) talks in a thread, which ends when its socket is shut down.
# No redirect is followed and no proxy is used. Whatever an endpoint does wrong is Unavailable.

Report = Callable[[Any], None]  # of one token, called in a thread


class Exchange:
    """One request to a model server, made in a thread; `close` from the loop ends it."""

    def __init__(self, server: ModelServer) -> None:
        self._server = server
        self._socket: socket.socket | None = None
        self._is_closed = False
        self.cleanup = contextlib.ExitStack()  # of the thread, when it is through

    def close(self) -> None:
        self._is_closed = True
        if self._socket is not None:
            with contextlib.suppress(OSError):  # closed already
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread, as close() would not

    def send(self, method: str, path: str, body: bytes | None = None) -> HTTPResponse:
        """Connect, send one request, and return the answer's head if it is a 200."""
        connection = self._server.connect()
        self.cleanup.callback(connection.close)
        try:
            connection.connect()
        except TimeoutError:
            raise Unavailable(f"no connection within {connection.timeout:g} s") from None
        self._socket = connection.sock
        if self._is_closed:
            raise OSError("closed")
        connection.sock.settimeout(self._server.timeout_s)
        connection.request(method, self._server.path + path, body, self._server.headers)
        response = connection.getresponse()
        if response.status == 200:
            return response
        text = f"HTTP {response.status}"
        with contextlib.suppress(ValueError):
            problem = _model_error(_json_of(response.read(MAX_MODEL_LINE_BYTES)))
            text += problem and f": {problem}"
        if response.status in (400, 413, 422):  # this request's fault, the server is well
            raise CommandFailed(self._server.hide(f"the model server answered {text}"))
        raise Unavailable(text)


class ModelServer:
    """Client of one endpoint; `url` with or without its /v1, user and password as HTTP allows.

    Raises ValueError for an URL or a key that cannot be used. `host` is what may be shown.
    """

    def __init__(self, url: str, *, model: str | None, key: str | None, timeout_s: float) -> None:
        parts = urlsplit(url)
        is_http = parts.scheme in ("http", "https") and re.fullmatch("[!-~]+", url)
        if not is_http or not parts.hostname:
            raise ValueError("a model server's URL looks like http://localhost:11434")
        if key is not None and not re.fullmatch("[!-~]+", key):
            raise ValueError("the model server's key has characters that no HTTP header can hold")
        self._address = parts.hostname, parts.port
        self._is_tls = parts.scheme == "https"
        self.host = parts.netloc.rpartition("@")[2]
        self.path = parts.path.rstrip("/").removesuffix("/v1")
        self.headers = {"Content-Type": "application/json", "Connection": "close"}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"
        elif parts.username is not None:
            user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self.headers["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
        password = parts.password or ""
        self._secrets = [each for each in (key, password, unquote(password)) if each]
        self.model = model
        self.timeout_s = timeout_s
        self._requests = ThreadPool(MODEL_THREADS, f"karna-model-{self.host}")
        self._checks = ThreadPool(1, f"karna-model-check-{self.host}")  # never behind requests

    def connect(self) -> HTTPConnection:
        """A connection that is not made yet."""
        from http.client import HTTPConnection, HTTPSConnection

        maker = HTTPSConnection if self._is_tls else HTTPConnection
        return maker(*self._address, timeout=min(MODEL_CONNECT_S, self.timeout_s))

    def hide(self, text: str) -> str:
        """`text` on one line and without our secrets, should the server have sent them back."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return one_line(text)

    async def find_model(self) -> str:
        """Ask which models there are; the configured one, or else the first, is used from then."""
        try:
            async with asyncio.timeout(MODEL_CHECK_S):
                names = await self._talk(self._checks, _list_models)
        except TimeoutError:
            raise self._unavailable(f"no answer within {MODEL_CHECK_S:g} s") from None
        if self.model is None and not names:
            raise self._unavailable("lists no model")
        return self.model or names[0]

    async def chat(self, model: str, content: Any, report: Report | None) -> str:
        """Let the model answer one message; `report` gets each token. Returns the whole text."""
        messages = [{"role": "user", "content": content}]
        body = json.dumps({"model": model, "messages": messages, "stream": True}).encode()
        return await self._talk(self._requests, lambda e: _read_chat(e, body, report))

    async def _talk(self, threads: ThreadPool, work: Callable[[Exchange], Value]) -> Value:
        exchange = Exchange(self)
        try:
            return await threads.call(lambda: self._explained(exchange, work))
        finally:
            exchange.close()

    def _explained(self, exchange: Exchange, work: Callable[[Exchange], Value]) -> Value:
        """Do the work in this thread; every way it can go wrong becomes a ServiceError."""
        from http.client import HTTPException, IncompleteRead

        try:
            with exchange.cleanup:
                return work(exchange)
        except Unavailable as error:
            raise self._unavailable(str(error)) from None
        except TimeoutError:
            raise self._unavailable(f"no answer within {self.timeout_s:g} s") from None
        except IncompleteRead:
            raise self._unavailable("its answer broke off") from None
        except OSError as error:
            raise self._unavailable(f"cannot be reached: {error.strerror or error}") from None
        except (HTTPException, ValueError) as error:
            raise self._unavailable(f"its answer makes no sense: {explain(error)}") from None

    def _unavailable(self, problem: str) -> Unavailable:
        return Unavailable(self.hide(f"model server {self.host}: {problem}"))


def _json_of(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None


def _model_error(value: Any) -> str:
    """The message of {"error": {"message": ...}} or {"error": ...}, if there is one."""
    error = value.get("error") if isinstance(value, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else "unknown error" if error else ""


def _read_bounded(response: HTTPResponse) -> Any:
    data = response.read(MAX_MODEL_BYTES + 1)
    if len(data) > MAX_MODEL_BYTES:
        raise ValueError("longer than 4 MiB")
    if response.length:  # a plain read(n) does not tell
        raise Unavailable("its answer broke off")
    return _json_of(data)


def _list_models(exchange: Exchange) -> list[str]:
    answer = _read_bounded(exchange.send("GET", "/v1/models"))
    try:
        names = [each["id"] for each in answer["data"]]
    except (KeyError, TypeError):
        raise ValueError("no list of models") from None
    return [name for name in names if isinstance(name, str) and name]


def _read_chat(exchange: Exchange, body: bytes, report: Report | None) -> str:
    """Send a chat request and read the answer: events, or one JSON object from simple servers."""
    response = exchange.send("POST", "/v1/chat/completions", body)
    kind = (response.getheader("Content-Type") or "none").partition(";")[0].strip().lower()
    if kind == "application/json":
        return _text_of(_read_bounded(response), "message")[0]
    if kind != "text/event-stream":
        raise ValueError(f"content type {kind} where an event stream belongs")
    tokens: list[str] = []
    is_finished = False
    for event in _read_events(response):
        token, is_last = _text_of(event, "delta")
        is_finished = is_finished or is_last
        tokens.append(token)
        if token and report is not None:
            report({"token": token})
    if not is_finished:
        raise Unavailable("its answer broke off")
    return "".join(tokens)


_DONE = {"choices": [{"finish_reason": "stop"}]}


def _read_events(response: HTTPResponse) -> Iterator[Any]:
    """The JSON of each `data:` line of an event stream, up to [DONE] or its end."""
    total = 0
    while line := response.readline(MAX_MODEL_LINE_BYTES + 1):
        total += len(line)
        if len(line) > MAX_MODEL_LINE_BYTES or total > MAX_MODEL_BYTES:
            raise ValueError("too long")
        if not line.startswith(b"data:"):
            continue  # an empty line, a comment, another field
        data = line[5:].strip()
        if data == b"[DONE]":
            yield _DONE
            return
        yield _json_of(data)


def _text_of(answer: Any, part: str) -> tuple[str, bool]:
    """The text of the first choice, and whether it is the last; ValueError for another shape."""
    problem = _model_error(answer)
    if problem:
        raise Unavailable(problem)
    try:
        choices = answer["choices"]
        choice = choices[0] if choices else {}  # usage comes with no choice
        text: str = (choice.get(part) or {}).get("content") or ""
        # A lone surrogate, which JSON can say, could not be sent on.
        return text.encode("utf-8", "replace").decode(), bool(choice.get("finish_reason"))
    except (AttributeError, KeyError, TypeError):
        raise ValueError("a choice without text") from None


class ModelService(Service):
    """A service with an embedded default and, when a URL is given, a model server."""

    kind: ClassVar[str]
    embedded: ClassVar[str]  # the detail without a model server

    def __init__(
        self,
        *,
        url: str | None = None,
        model: str | None = None,
        key: str | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        super().__init__(self.kind)
        variables = (f"KARNA_{self.kind.upper()}_KEY", "OPENAI_API_KEY")
        key = key or next(filter(None, map(os.environ.get, variables)), None)
        self._model: str | None = model or None
        self.server: ModelServer | None = None
        if url:
            key = key and key.strip()
            self.server = ModelServer(url, model=self._model, key=key, timeout_s=timeout_s)

    async def start(self) -> None:
        if self.server is None:
            self.set_state("running", self.embedded)

    async def check(self) -> None:
        """Ask the model server for its models; raises Unavailable and is degraded without."""
        if self.server is not None:
            await self._find_model(self.server)

    async def _find_model(self, server: ModelServer) -> str:
        with self._showing(server):
            self._model = await server.find_model()
            return self._model

    async def chat(
        self, server: ModelServer, content: Any, report: Report | None = None
    ) -> dict[str, Any]:
        """Let the model answer one message: {"text", "model"}; the state follows how it went."""
        model = self._model or await self._find_model(server)
        with self._showing(server):
            text = await server.chat(model, content, report)
        return {"text": text, "model": model}

    @contextlib.contextmanager
    def _showing(self, server: ModelServer) -> Iterator[None]:
        """Set the state that an exchange with the server shows."""
        try:
            yield
        except Unavailable as error:
            self.set_state("degraded", str(error))
            raise
        self.set_state("running", f"model {one_line(self._model or '', 100)} at {server.host}")


# ---- vision ----------------------------------------------------------------------------------
# Without a model: what an image's header says. Nothing is decompressed, nothing is read twice.


class VisionService(ModelService):
    """Describes images: format and size from their headers, in words from a model server."""

    kind = "vision"
    embedded = "embedded: reads image headers"

    def register(self, commands: CommandProcessor) -> None:
        """Add the command `describe`, unless there is one."""

        async def describe(*question: str | None, image: bytes | str | None = None) -> Any:
            """Describe an image: a PNG, JPEG, GIF, WebP or BMP.

            The image is given as params.image: base64, a data URL, or bytes.
            With a model server it answers the question, too.
            """
            if not image:
                raise command.usage_error("params.image is missing: base64, a data URL or bytes")
            return await self.describe(image, " ".join(map(str, question)))

        command = Command(describe)
        if command.name not in commands.commands:
            commands.add(command)

    async def describe(self, image: bytes | str, question: str = "") -> dict[str, Any]:
        """{"format", "width", "height", "bytes"} and "embedded": true, or "text" and "model".

        Raises CommandFailed for what is no image, Unavailable when the model server is away.
        """
        data = decode_image(image)
        facts = read_image_header(data)
        if self.server is None:
            return {**facts, "embedded": True}
        url = f"data:image/{facts['format']};base64,{base64.b64encode(data).decode()}"
        text = {"type": "text", "text": question or "Describe this image."}
        content = [text, {"type": "image_url", "image_url": {"url": url}}]
        return {**facts, **await self.chat(self.server, content)}


def decode_image(image: bytes | str) -> bytes:
    """Bytes as they are, or from base64 (also URL-safe, unpadded, with blanks) or a data URL."""
    if len(image) > MAX_IMAGE_BYTES * 3 // 2:
        raise CommandFailed("the image is longer than 32 MiB")
    if not isinstance(image, str):
        return bytes(image)
    head, comma, body = image.partition(",")
    is_data_url = image[:5].lower() == "data:"
    if is_data_url and not comma:
        raise CommandFailed("the image's data URL has no comma")
    if is_data_url and not head.lower().rstrip().endswith(";base64"):
        raise CommandFailed("the image's data URL is not base64")
    try:
        data = (body if is_data_url else image).encode("ascii")
        data = data.translate(bytes.maketrans(b"-_", b"+/"), b" \t\r\n\f\v").rstrip(b"=")
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except (ValueError, binascii.Error):
        raise CommandFailed("the image is not valid base64") from None


def read_image_header(data: bytes) -> dict[str, Any]:
    """Read {"format", "width", "height", "bytes"} from an image's header.

    Raises CommandFailed, and nothing else, for what is broken, unknown or too large.
    """
    if len(data) > MAX_IMAGE_BYTES:
        raise CommandFailed("the image is longer than 32 MiB")
    name, width, height = _jpeg_header(data) if data[:3] == b"\xff\xd8\xff" else _header(data)
    if width < 1 or height < 1:
        raise CommandFailed(f"the {name} image is broken: it says {width} x {height} pixels")
    if max(width, height) > MAX_IMAGE_SIDE or width * height > MAX_IMAGE_PIXELS:
        raise CommandFailed(f"the {name} image is too large: {width} x {height} pixels")
    return {"format": name, "width": width, "height": height, "bytes": len(data)}


Size = tuple[int, int]
_HEADERS: tuple[tuple[str, Literal["big", "little"], bytes, Callable[..., Size]], ...] = (
    ("png", "big", rb"\x89PNG\r\n\x1a\n\0\0\0\rIHDR(....)(....)", lambda w, h: (w, h)),
    ("gif", "little", rb"GIF8[79]a(..)(..)", lambda w, h: (w, h)),
    # WebP, RFC 9649: lossy, lossless, extended.
    ("webp", "little", rb"RIFF....WEBPVP8 .{7}\x9d\x01\x2a(..)(..)",
     lambda w, h: (w & 0x3FFF, h & 0x3FFF)),
    ("webp", "little", rb"RIFF....WEBPVP8L....\x2f(....)",
     lambda bits: ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)),
    ("webp", "little", rb"RIFF....WEBPVP8X.{8}(...)(...)", lambda w, h: (w + 1, h + 1)),
    # BMP: that of OS/2 1.x, and the others, whose height is negative when stored from the top.
    ("bmp", "little", rb"BM.{12}\x0c\0\0\0(..)(..)", lambda w, h: (w, h)),
    ("bmp", "little", rb"BM.{12}[\x10-\x7c]\0\0\0(....)(....)",
     lambda w, h: (w, min(h, 2**32 - h))),
)  # fmt: skip


def _header(data: bytes) -> tuple[str, int, int]:
    for name, order, pattern, size_of in _HEADERS:
        match = re.match(pattern, data, re.DOTALL)
        if match is not None:
            return name, *size_of(*(int.from_bytes(each, order) for each in match.groups()))
    raise CommandFailed("the image is no PNG, JPEG, GIF, WebP or BMP, or its header is broken")


_SEGMENT = re.compile(rb"\xff++(?:[\x01\xd0-\xd7]|([^\x00\xd8-\xda])(..))", re.DOTALL)
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}


def _jpeg_header(data: bytes) -> tuple[str, int, int]:
    """Skip segments up to the frame header, SOF0 to SOF15 (ITU T.81, B.1.1.3)."""
    at = 2
    for _ in range(MAX_JPEG_SEGMENTS):
        segment = _SEGMENT.match(data, at)
        if segment is None:
            break
        marker, length = segment.groups()
        at = segment.end()
        if marker is None:
            continue  # these have no length
        if marker[0] in _FRAMES and len(data) >= at + 5:
            height, width = struct.unpack_from(">xHH", data, at)
            return "jpeg", width, height
        at += int.from_bytes(length, "big") - 2
    raise CommandFailed("the jpeg image is broken: it has no frame header")


# ---- language --------------------------------------------------------------------------------
# Without a model: which command a free text is nearest to, the same ranking that suggests names
# for an unknown command.


class LanguageService(ModelService):
    """Maps free text to commands, and passes prompts to a model server."""

    kind = "language"
    embedded = "embedded: matches text with commands"
    _commands: CommandProcessor | None = None

    def register(self, commands: CommandProcessor) -> None:
        """Add the commands `interpret` and `ask`, unless there are such."""
        self._commands = commands

        def interpret(*text: str) -> dict[str, Any]:
            """Tell which commands a free text is nearest to."""
            return self.interpret(" ".join(text))

        async def ask(context: Context, *prompt: str) -> dict[str, Any]:
            """Ask the language model; reports its tokens as they come."""
            return await self.ask(" ".join(prompt), context)

        for command in (Command(interpret, inline=True), Command(ask)):
            if command.name not in commands.commands:
                commands.add(command)

    def interpret(self, text: str) -> dict[str, Any]:
        """{"text", "matches": [{"command", "usage", "score"}]}, at most five, the best first."""
        commands = [] if self._commands is None else self._commands.distinct()
        matches = [
            {"command": command.name, "usage": command.usage, "score": score}
            for score, command in rank(text, commands)[:MAX_MATCHES]
        ]
        return {"text": text, "matches": matches}

    async def ask(self, prompt: str, context: Context) -> dict[str, Any]:
        """{"text", "model"}; each token is reported as {"token"}. Raises Unavailable."""
        if self.server is None:
            way = "--language-url URL (or KARNA_LANGUAGE_URL), such as http://localhost:11434"
            raise Unavailable(f"no language model: start the server with {way}")
        return await self.chat(self.server, prompt, context.report)


# ---- backplane -------------------------------------------------------------------------------
# Broadcasts shared by several processes, over one Redis Stream: the stream's order is everybody's
# order, and its ids are everybody's offsets. An entry whose acceptance is unknown is not sent
# again: its publisher is told so, and nobody gets anything twice.

STREAM = "karna:broadcasts"
STREAM_ENTRIES = 10_000  # kept in Redis, about; far more than any node's history
PUBLISH_WAIT_S = 3.0  # for Redis to accept an entry, then the publisher gets Unavailable
READ_BLOCK_MS = 1_000  # of one XREAD; an empty answer shows that Redis is alive
REDIS_TIMEOUT_S = 2.5  # above the block: silence for so long means that Redis is away
MAX_OUTBOX = 1_000  # broadcasts that wait to be accepted; when it is full, publishers are refused
MAX_OUTBOX_BYTES = 16 * 1024 * 1024  # of them together
MAX_PIPELINE = 100  # entries in one round trip
READ_ENTRIES = 2 * MAX_PIPELINE  # in one answer: a node must not publish faster than it reads
COMPLAIN_S = 10.0  # between two lines in the log about broadcasts that were not accepted

Entry = tuple[str, bytes | None]  # stream id, body; none for the mark at the stream's beginning
_STREAM_ID = re.compile(r"(\d{1,15})-(\d{1,20})")


def stream_id(offset: str) -> tuple[int, int]:
    """A stream id such as '1700000000000-0' in its order. Raises ValueError if it is none."""
    match = _STREAM_ID.fullmatch(offset)
    if match is None:
        raise ValueError("not a stream id")
    return int(match[1]), int(match[2])


def _id_before(offset: str) -> str:
    milliseconds, number = stream_id(offset)
    return f"{milliseconds}-{number - 1}" if number else f"{milliseconds - 1}-{2**64 - 1}"


class RedisBackplane(Service):
    """Shares broadcasts with other processes. It starts, fails, recovers and has a status.

    receive: called with (offset, body) for each accepted broadcast, this node's own included.
    restore: called with (offset before the first, entries) when history is loaded from Redis, at
    the start and whenever entries may have been missed: whoever is a client then has a gap.
    """

    def __init__(self, url: str) -> None:
        """Raises ImportError without the `redis` package, ValueError for a bad URL."""
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        super().__init__("backplane")
        # Without retries of its own: a lost answer to XADD must not become a second entry.
        self._redis: Any = Redis.from_url(
            url, protocol=2, retry=Retry(NoBackoff(), 0), socket_timeout=REDIS_TIMEOUT_S,
            socket_connect_timeout=REDIS_TIMEOUT_S,
        )  # fmt: skip
        pool: Any = self._redis.connection_pool
        try:
            pool.make_connection()  # without connecting: only this looks at the URL's ?options
        except TypeError:
            raise ValueError("an unknown option in the URL") from None
        where = pool.connection_kwargs
        host, port = where.get("host", "localhost"), where.get("port", 6379)
        self.address = str(where.get("path") or f"{host}:{port}")
        self.receive: Callable[[str, bytes], None] = lambda offset, body: None
        self.restore: Callable[[str, list[tuple[str, bytes]]], None] = lambda base, entries: None
        self.history_messages = 1_000
        self.history_bytes = 4 * 1024 * 1024
        self._last: str | None = None  # the id of the last entry seen
        self._read_entries = READ_ENTRIES  # fewer where they do not arrive in time
        self._health: tuple[State, str] = "starting", f"connecting to Redis at {self.address}"
        self._outbox: deque[tuple[bytes, asyncio.Future[None]]] = deque()
        self._outbox_bytes = 0
        self._complain_at = 0.0
        self._news = asyncio.Event()
        self._tasks = Tasks()
        self._is_running = False
        self.is_loaded = asyncio.Event()  # history was loaded once

    async def start(self) -> None:
        """Begin to read and to publish; Redis may come later."""
        if not self._is_running:
            self._is_running = True
            self.set_state(*self._health)
            self._tasks.spawn(self._read_forever(), "backplane reader")
            self._tasks.spawn(self._publish_forever(), "backplane publisher")

    async def stop(self) -> None:
        self._is_running = False
        self.set_state("stopped")  # nothing enters the outbox any more
        for _, accepted in self._outbox:
            if not accepted.done():
                accepted.set_exception(Unavailable("the server stops"))
        await self._tasks.end_all()
        await self._redis.aclose()

    async def check(self) -> None:
        """Say again what the reader found: the monitor would say it too late, or for ever."""
        self.set_state(*self._health)

    # Publishing.

    def enqueue(self, body: bytes) -> asyncio.Future[None]:
        """Hand over a broadcast; the result comes when Redis has accepted it.

        Raises Unavailable when Redis is away or too much waits already.
        """
        if self.state != "running":
            raise Unavailable(f"the backplane is {self.state}: {self.detail}")
        if len(self._outbox) >= MAX_OUTBOX or self._outbox_bytes > MAX_OUTBOX_BYTES:
            raise Unavailable("too many broadcasts wait for Redis")
        accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        accepted.add_done_callback(_look_at)
        self._outbox.append((body, accepted))
        self._outbox_bytes += len(body)
        self._news.set()
        return accepted

    async def publish(self, body: bytes) -> None:
        """`enqueue`, and wait until it is accepted; raises Unavailable after a bounded time."""
        accepted = self.enqueue(body)
        try:
            await asyncio.wait_for(accepted, PUBLISH_WAIT_S)
        except TimeoutError:
            raise Unavailable("Redis did not accept the broadcast in time") from None

    async def _publish_forever(self) -> None:
        while self._is_running:  # the redis package can swallow a cancellation
            await self._news.wait()
            self._news.clear()
            while self._outbox and self._is_running:
                count = min(len(self._outbox), MAX_PIPELINE)
                taken = [self._outbox[index] for index in range(count)]
                # One whose publisher has given up is not sent: it has been told so.
                await self._publish_some([each for each in taken if not each[1].done()])
                for _ in taken:
                    self._outbox_bytes -= len(self._outbox.popleft()[0])

    async def _publish_some(self, some: list[tuple[bytes, asyncio.Future[None]]]) -> None:
        try:
            async with self._redis.pipeline(transaction=False) as pipeline:
                for body, _ in some:
                    pipeline.xadd(STREAM, {"body": body}, maxlen=STREAM_ENTRIES, approximate=True)
                results = await pipeline.execute(raise_on_error=False)
        except Exception as error:  # the redis package has many, all of them mean the same here
            results = [error] * len(some)
        failures = [result for result in results if isinstance(result, Exception)]
        if failures:
            self._complain(len(failures), failures[0])
        for (_, accepted), result in zip(some, results, strict=True):
            if accepted.done():
                continue
            if isinstance(result, Exception):
                accepted.set_exception(Unavailable(f"Redis did not accept it: {explain(result)}"))
            else:
                accepted.set_result(None)

    def _complain(self, count: int, error: Exception) -> None:
        """Log broadcasts that were not accepted; clients can cause them, so not each."""
        now = time.monotonic()
        level = logging.WARNING if now >= self._complain_at else logging.DEBUG
        log.log(level, "%d broadcasts not accepted by Redis: %s", count, one_line(explain(error)))
        if level == logging.WARNING:
            self._complain_at = now + COMPLAIN_S

    # Reading.

    async def _read_forever(self) -> None:
        delay_s = RETRY_FIRST_S / 4
        while self._is_running:
            try:
                await self._read(None)
                self._find("running", f"Redis at {self.address}")
                delay_s = RETRY_FIRST_S / 4
                while self._is_running:
                    await self._read(READ_BLOCK_MS)
                    self._read_entries = min(self._read_entries * 2, READ_ENTRIES)
            except Exception as error:  # see _publish_some
                self._find("degraded", f"Redis at {self.address} is away: {explain(error)}")
                self._read_entries = max(self._read_entries // 2, 1)
            await asyncio.sleep(delay_s * random.uniform(0.75, 1.25))
            delay_s = min(delay_s * 2, RETRY_MAX_S / 3)

    def _find(self, state: State, detail: str) -> None:
        if self._is_running:
            self._health = state, detail
            self.set_state(state, detail)

    async def _read(self, block_ms: int | None) -> None:
        """Take what follows the last entry seen; wait for it at most `block_ms`."""
        if self._last is None:
            return await self._load()
        async with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.xread({STREAM: self._last}, count=self._read_entries, block=block_ms)
            # Asked after the reading: while it is there, nothing that followed it was trimmed.
            pipeline.xrange(STREAM, self._last, self._last, count=1)
            answer, last = await pipeline.execute()
        if not last:
            return await self._load()
        for _, entries in answer or ():
            for entry in entries:
                self._take(*_entry(entry))

    def _take(self, offset: str, body: bytes | None) -> None:
        self._last = offset
        if body is not None:
            self.receive(offset, body)

    async def _load(self) -> None:
        """Load history: at the start, or when what we saw last is no longer in the stream.

        What is there and newer than what we saw last is delivered.
        """
        entries = await self._newest() or [await self._begin()]
        seen = self._last
        old = [each for each in entries if seen is None or stream_id(each[0]) <= stream_id(seen)]
        base = _id_before(entries[0][0])  # that nothing lies between them is all we know
        self._last = old[-1][0] if old else base
        self.restore(base, [(offset, body) for offset, body in old if body is not None])
        self.is_loaded.set()
        for offset, body in entries[len(old) :]:
            self._take(offset, body)

    async def _newest(self) -> list[Entry]:
        """As many of the newest entries as history keeps, or some more; oldest first."""
        entries: list[Entry] = []
        size, until = 0, "+"
        while True:
            page = await self._redis.xrevrange(STREAM, until, "-", count=self._read_entries)
            entries += map(_entry, page)
            size += sum(len(_entry(each)[1] or b"") for each in page)
            is_enough = len(entries) > self.history_messages or size > self.history_bytes
            if is_enough or len(page) < self._read_entries:
                return entries[::-1]
            until = _id_before(entries[-1][0])

    async def _begin(self) -> Entry:
        """Put a mark into an empty stream: offsets before it are older than the stream."""
        offset = await self._redis.xadd(STREAM, {"begin": utc_now()})
        return offset.decode(), None

    def is_ahead(self, offset: str) -> bool:
        """Can another process have read this entry, while this one has not yet?"""
        try:
            return self._last is not None and stream_id(offset) > stream_id(self._last)
        except ValueError:
            return False


def _look_at(accepted: asyncio.Future[None]) -> None:
    """For a broadcast that nobody waits for: asyncio takes its error as seen."""
    if not accepted.cancelled():
        accepted.exception()


def _entry(found: tuple[bytes, dict[bytes, bytes]]) -> Entry:
    """An entry of the stream; one of another program has a body that is no broadcast."""
    offset, values = found
    is_mark = b"begin" in values and b"body" not in values
    return offset.decode(), None if is_mark else values.get(b"body", b"null")
