"""Services of Karna WS: what it can do, apart from how it is reached.

CommandProcessor   runs commands: a command is a function, and its name, arguments and help come
                   from its signature and docstring
VisionService      `describe`: what an image's header says, in words with a model server
LanguageService    `interpret`: the commands that a free text is near to; `ask` a model server

This file knows nothing of WebSockets or of the wire's JSON: it takes a command line with parameters
and gives back plain values. What it stands on is in `karna/`; nothing happens at import time.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import types
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, overload

from karna.builtins import Broadcaster, add_builtins, clients_command, notify_command
from karna.command import Call, Command
from karna.consent import Proposals
from karna.context import Context
from karna.conversation import Conversations, lasting
from karna.errors import (
    FAULTS,
    Cancelled,
    CommandFailed,
    CommandTimeout,
    RequestError,
    Unavailable,
    UnknownCommand,
    UsageError,
)
from karna.kinds import Text
from karna.log import LogGate, log
from karna.model_service import ModelService
from karna.service import Service
from karna.text import one_line
from karna.words import Ranking, plain_words, split_words
from karna.work import Job, Tasks, ThreadPool, Work, failure_of

if TYPE_CHECKING:
    from karna.answers import Answer
    from karna.models import ModelServer

__all__ = [
    "Command", "CommandFailed", "CommandProcessor", "Context", "LanguageService", "Service",
    "Text", "Unavailable", "UsageError", "VisionService",
]  # fmt: skip

Function = TypeVar("Function", bound=Callable[..., Any])
Ready = tuple[Command, list[Any], dict[str, Any]]  # a command and its arguments
Ended = Callable[[Any, RequestError | None], None]  # told a result, or why there is none


# ---- commands --------------------------------------------------------------------------------


MAX_NAME_CHARS = 40  # of an unknown name that are compared and shown
NO_PARAMS: Mapping[str, Any] = types.MappingProxyType({})
MAX_PREPARED, MAX_PREPARED_CHARS = 500, 200  # command lines kept as they were understood


class CommandProcessor(Service):
    """A registry of commands, and what runs them.

    Plain `def` runs in a bounded pool of threads, `async def` on the loop; of an async generator
    each value is reported as progress and the last one is the result. Handlers of events have as
    many threads of their own: who comes in never waits for commands.
    """

    def __init__(
        self, *, builtins: bool = True, timeout_s: float | None = 60.0, max_threads: int = 32
    ) -> None:
        super().__init__("command")
        self.commands: dict[str, Command] = {}  # by name and by alias
        self.revision = 0  # of `commands`: who keeps what it made of them compares it
        self.timeout_s = timeout_s
        self.running = self.done = self.failed = 0  # who keeps a status compares them: no touch()
        self._threads = ThreadPool(max_threads, "karna-command")
        self._handler_threads = ThreadPool(max_threads, "karna-handler")
        self.tasks = Tasks()  # running commands
        self.log_gate = LogGate()  # or the one that all share
        self.prepared: dict[str, Ready] = {}  # lines of inline commands that came again
        self._asked: set[str] = set()  # those that came once
        self._replaceable: set[str] = set()  # a program may have its own `echo`
        self._ranking: Ranking[Command] | None = None  # made when it is asked
        self._notify: Command | None = None  # ours, which waits where a backplane does
        if builtins:
            add_builtins(self)

    @overload
    def command(self, function: Function) -> Function: ...

    @overload
    def command(
        self, *, name: str | None = None, aliases: Sequence[str] = (), inline: bool = False,
        tool: bool | None = None, confirm: bool = False,
        read_only: bool | None = None, destructive: bool | None = None,
    ) -> Callable[[Function], Function]: ...  # fmt: skip

    def command(self, function: Callable[..., Any] | None = None, **options: Any) -> Any:
        """Decorator, with or without parentheses, that makes a function a command."""

        def register(function: Function) -> Function:
            self.add(Command(function, **options))
            return function

        return register if function is None else register(function)

    def add(self, command: Command) -> None:
        """Register a command; ValueError when one of its names is taken, but by a built-in one."""
        for name in command.names:
            if name in self.commands and name not in self._replaceable:
                raise ValueError(f"there is a command {name!r} already")
        for name in command.names:
            self.commands[name] = command
            self._replaceable.discard(name)
        self.revision += 1
        self.prepared.clear()
        self._ranking = None
        self.touch()

    def offer(self, command: Command) -> None:
        """Register a built-in command: one of the program, sooner or later, takes its place.

        It is a tool of assistants only if it says so.
        """
        if command.name not in self.commands:
            command.tool = bool(command.tool)
            self.add(command)
            self._replaceable.update(command.names)

    def use_broadcaster(self, broadcaster: Broadcaster, *, waits: bool = False) -> None:
        """Offer `notify` and `clients`, which reach the clients of `broadcaster`.

        waits: `publish` takes time (there is a backplane). Then `notify` is answered from a task
        once that is through; else it is inline. May be called again when that changes.
        """
        if self._notify is None:
            self._notify = notify_command(broadcaster)
            self.offer(self._notify)
            self.offer(clients_command(broadcaster))
        self._notify.inline = not waits
        self.prepared.clear()

    def prepare(self, line: str, params: Mapping[str, Any] = NO_PARAMS) -> Call:
        """Find the command of a line and bind its arguments; raises UnknownCommand, UsageError."""
        words = plain_words(line)
        if words is None:
            words = line.split(None, 1)[:1]
            found = self.commands.get(words[0]) if words else None
            if found is None or not found.takes_text:
                words = split_words(line)
        if not words:
            raise UsageError("the command line is empty", usage="COMMAND [ARGUMENT]...")
        name = words.pop(0)
        command = self.commands.get(name)
        if command is None:
            raise self.unknown(name)
        if command.takes_text:
            words = command.split_text(line)
        return Call(command, *command.bind(words, params))

    def prepare_plain(self, line: str) -> Ready | None:
        """The commonest lines, ready to run: plain words that their command takes.

        None for all others, which `prepare` takes. A line that comes again and again is kept in
        `prepared` if its command is inline: that has no Context, and may run many times.
        """
        words = plain_words(line)
        command = self.commands.get(words[0]) if words else None
        if command is None or words is None:
            return None
        del words[0]
        if words and command.takes_words:  # as `bind` would say: a seventh of all this
            ready: Ready = command, words, {}
        else:
            try:
                if command.takes_text:
                    words = command.split_text(line)
                ready = command, *command.bind(words, NO_PARAMS)
            except FAULTS:  # `prepare` meets it again, where it is answered
                return None
        if not command.inline:
            return ready
        if not self.done & 7:  # of eight lines one: those that all differ never come again
            self._remember(line, ready)
        return ready

    def _remember(self, line: str, ready: Ready) -> None:
        """Keep a line that was remembered before."""
        if line not in self._asked:
            if len(self._asked) >= MAX_PREPARED:
                self._asked.clear()
            self._asked.add(line)
        elif len(line) <= MAX_PREPARED_CHARS:
            if len(self.prepared) >= MAX_PREPARED:
                self.prepared.clear()
            self.prepared[line] = ready

    def unknown(self, name: str) -> UnknownCommand:
        """The error for a name that no command has."""
        near = self.suggest(name[:MAX_NAME_CHARS])
        hint = f"; did you mean {' or '.join(near)}?" if near else "; `help` lists the commands"
        shown = one_line(name, MAX_NAME_CHARS)
        return UnknownCommand(f"no command {shown!r}{hint}", suggestions=near)

    def suggest(self, text: str, limit: int = 3) -> list[str]:
        """Names of commands near to a text, best first."""
        return [command.name for _, command in self.rank(text, limit)]

    def rank(self, text: str, limit: int) -> list[tuple[float, Command]]:
        """Commands near to a text with their scores, best first."""
        if self._ranking is None:
            self._ranking = Ranking(self.distinct())
        return self._ranking.rank(text, limit)

    def distinct(self) -> list[Command]:
        """Each command once, by name."""
        return [command for name, command in sorted(self.commands.items()) if name == command.name]

    def call_inline(self, call: Call) -> Any:
        """Run an inline command now; whatever it raises comes out as a RequestError."""
        return self.run_inline((call.command, call.args, call.kwargs))

    def run_inline(self, ready: Ready) -> Any:
        """`call_inline`, of what `prepare_plain` gives."""
        command, args, kwargs = ready
        try:
            value = command.function(*args, **kwargs) if kwargs else command.function(*args)
        except BaseException as error:
            self.failed += 1
            raise self._failure_of(command, error) from None
        self.done += 1
        return value

    def start_call(self, call: Call, context: Context | None, on_end: Ended) -> Job:
        """Run a command in one task within the time limit; `on_end` is told how it ended, once.

        It is told (result, None) or (None, error): CommandTimeout, Cancelled (by `job.cancel()`),
        what RequestError the handler raised, or CommandFailed. A handler that ignores its end is
        left behind, so that the outcome comes in bounded time. `on_end` is called by the loop
        later; the handler may begin, and report progress, before this returns.
        context: may be None for a command that `is_coroutine`, which is called as it is.
        """
        command = call.command
        self.running += 1
        if context is not None:
            context.begin()
        if command.is_coroutine:
            work: Work = functools.partial(command.function, *call.args, **call.kwargs)
        else:
            assert context is not None
            work = functools.partial(self._perform, call, context)
        ended = functools.partial(self._call_ended, command, context, on_end)
        return self.tasks.start(work, command.title, self.timeout_s, ended)

    def _call_ended(
        self, command: Command, context: Context | None, on_end: Ended, job: Job
    ) -> None:
        if context is not None:
            context.end()
        self.running -= 1
        error = self._error_of(job, command)
        if error is None:
            self.done += 1
        else:
            self.failed += 1
        on_end(job.value, error)

    def _error_of(self, job: Job, command: Command) -> RequestError | None:
        if job.error is None:
            return None
        if job.is_late:
            return CommandTimeout(f"{command.name} took longer than {job.timeout_s:g} s")
        if job.is_cancelled:
            return Cancelled("cancelled")
        if isinstance(job.error, asyncio.CancelledError) and self.state == "stopped":
            return Unavailable("the server is stopping")
        return self._failure_of(command, job.error)

    def _failure_of(self, command: Command, error: BaseException) -> RequestError:
        return failure_of(command.title, error, self.log_gate, command.expected)

    async def run(self, call: Call, context: Context) -> Any:
        """`start_call`, and wait: its result, or its error raised. Cancelled with this."""
        ended: list[tuple[Any, RequestError | None]] = []
        job = self.start_call(call, context, lambda *outcome: ended.append(outcome))
        await job.wait()
        value, error = ended[0]
        if error is not None:
            raise error
        return value

    async def _perform(self, call: Call, context: Context) -> Any:
        command = call.command
        args, kwargs = call.args, call.kwargs
        if command.context_at is not None:
            args.insert(command.context_at, context)
        elif command.context_name is not None:
            kwargs[command.context_name] = context
        if command.runs == "stream":
            return await _last_value(command.function(*args, **kwargs), context)
        if command.runs == "loop":
            value = command.function(*args, **kwargs)
            if type(value) is types.CoroutineType:
                return await value
        else:
            threads = self._handler_threads if command.is_handler else self._threads
            function = functools.partial(command.function, *args, **kwargs)
            value = await threads.call(function, context.owner)
        return await value if inspect.isawaitable(value) else value

    async def start(self) -> None:
        self._threads.open()
        self._handler_threads.open()
        self.set_state("running", f"{len(self.distinct())} commands")

    async def stop(self) -> None:
        """End running commands and their programs; threads that go on are abandoned."""
        self.set_state("stopped")
        self._threads.close()
        self._handler_threads.close()
        await self.tasks.end_all()

    def get_status(self) -> dict[str, Any]:
        """Adds "running", "done" and "failed", counts of calls, and "commands", of commands."""
        counts = {"running": self.running, "done": self.done, "failed": self.failed}
        return super().get_status() | counts | {"commands": len(set(self.commands.values()))}

    def allow_program(self, name: str, path: str | None = None, *, confirm: bool = True) -> None:
        """Make a program of this machine a command; ValueError when there is no such program.

        confirm: no model runs it before a person has agreed.
        """
        from karna.programs import program_command  # few allow any

        command = program_command(name, path, confirm=confirm)
        if command.name in self._replaceable:
            log.warning("the program %s takes the place of the built-in command", command.name)
        self.add(command)


async def _last_value(values: AsyncIterator[Any], context: Context) -> Any:
    """Report each value of an async generator; its last one is the result."""
    value = None
    async with contextlib.aclosing(values) as stream:  # type: ignore[type-var]
        async for value in stream:
            await context.progress(value)
    return value


# ---- vision and language ---------------------------------------------------------------------


class VisionService(ModelService):
    """Describes images: format and size from their headers, in words from a model server."""

    kind = "vision"
    embedded = "embedded: reads image headers"

    def register(self, commands: CommandProcessor) -> None:
        """Offer the command `describe`."""

        async def describe(question: Text = "", *, image: bytes | str | None = None) -> Any:
            """Describe an image: a PNG, JPEG, GIF, WebP or BMP.

            The image is given as params.image: base64, a data URL, or bytes.
            With a model server it answers the question, too.
            """
            if not image:
                raise command.usage_error("params.image is missing: base64, a data URL or bytes")
            return await self.describe(image, question)

        command = Command(describe, tool=True, read_only=True)
        commands.offer(command)

    async def describe(self, image: bytes | str, question: str = "") -> dict[str, Any]:
        """{"format", "width", "height", "bytes"} and "embedded": true, or "text" and "model".

        Raises CommandFailed for what is no image, Unavailable when the model server is away.
        """
        from karna.images import decode_image, image_url, read_image_header  # with the first

        data = decode_image(image)
        facts = read_image_header(data)
        if self.server is None:
            return {**facts, "embedded": True}
        url = image_url(data)
        text = {"type": "text", "text": question or "Describe this image."}
        content = [text, {"type": "image_url", "image_url": {"url": url}}]
        answer, model = await self.chat(self.server, [{"role": "user", "content": content}])
        return {**facts, "text": answer.text, "model": model}


MAX_MATCHES = 5  # of `interpret`: what a person looks at


class LanguageService(ModelService):
    """Maps free text to commands; a model server answers prompts and chooses commands.

    conversation_turns: how many of each client's last turns the model is told again.
    """

    kind = "language"
    embedded = "embedded: matches text with commands"
    _commands: CommandProcessor | None = None

    def __init__(self, *, conversation_turns: int = 8, **options: Any) -> None:
        super().__init__(**options)
        self.keep_turns(conversation_turns)
        self.proposals = Proposals()

    def keep_turns(self, conversation_turns: int) -> None:
        """Tell the model so many turns again, from now on; 0: none. Raises ValueError."""
        if conversation_turns < 0:
            raise ValueError(f"conversation_turns must be 0 or more, not {conversation_turns}")
        self.conversations = Conversations(conversation_turns)

    def register(self, commands: CommandProcessor) -> None:
        """Offer the commands `interpret`, `ask`, `do`, `confirm` and `reset`."""
        self._commands = commands

        def interpret(text: Text) -> dict[str, Any]:
            """Tell which commands a free text is nearest to."""
            return self.interpret(text)

        async def ask(context: Context, prompt: Text) -> dict[str, Any]:
            """Ask the language model; reports its tokens as they come."""
            return await self.ask(prompt, context)

        async def do(
            context: Context, text: Text, *, image: bytes | str | None = None
        ) -> dict[str, Any]:
            """Let the language model run the commands that a text asks for; reports each step.

            What must not run unasked is proposed: `confirm` runs it.
            """
            return await self.do(text, context, image or None)

        async def confirm(context: Context, id: str) -> Any:
            """Run what `do` has proposed."""
            return await self.confirm(id, context)

        async def reset(context: Context) -> dict[str, int]:
            """Forget what was said to the language model."""
            return {"forgotten": self.conversations.forget(context.client)}

        commands.offer(Command(interpret, inline=True))
        for function in (ask, do, confirm, reset):
            commands.offer(Command(function))

    def interpret(self, text: str) -> dict[str, Any]:
        """{"text", "matches": [{"command", "usage", "score"}]}, at most five, the best first."""
        ranked = [] if self._commands is None else self._commands.rank(text, MAX_MATCHES)
        matches = [
            {"command": command.name, "usage": command.usage, "score": score}
            for score, command in ranked
        ]
        return {"text": text, "matches": matches}

    def _needed_server(self) -> ModelServer:
        if self.server is None:
            way = "--language-url URL (or KARNA_LANGUAGE_URL), such as http://localhost:11434"
            raise Unavailable(f"no language model: start the server with {way}")
        return self.server

    async def ask(self, prompt: str, context: Context) -> dict[str, Any]:
        """{"text", "model"}; each token is reported as {"token"}. Raises Unavailable."""
        before = self.conversations.messages(context.client)
        messages = [*before, {"role": "user", "content": prompt}]
        answer, model = await self.chat(
            self._needed_server(), messages, context.report, owner=context.owner
        )
        self.conversations.add(context.client, prompt, answer.text)
        return {"text": answer.text, "model": model}

    async def do(
        self, text: str, context: Context, image: bytes | str | None = None
    ) -> dict[str, Any]:
        """Let the model choose commands and run them: {"text", "steps", "model"}.

        Each step is reported as {"step", "command", "result"}, or "error" for its result. What
        needs consent is not run: the result has {"proposal", "command", "expires"}, too.
        """
        from karna.choose import Steps  # with the first, as images
        from karna.images import image_url

        server, model = self._needed_server(), ""

        async def ask(messages: list[Any], tools: list[Any], may_choose: bool) -> Answer:
            nonlocal model
            options = {"tools": tools, "may_choose": may_choose, "owner": context.owner}
            answer, model = await self.chat(server, messages, **options)
            return answer

        assert self._commands is not None, "registered"
        steps = Steps(self._commands, context, None if image is None else image_url(image))
        last = await steps.run(text, self.conversations.messages(context.client), ask)
        result = {"text": last, "steps": steps.done, "model": model}
        if steps.proposed is not None:
            call, line = steps.proposed
            result |= self.proposals.add(lasting(context.client), call) | {"command": line}
            last = last or f"(proposed: {line})"
        self.conversations.add(context.client, text, last)
        return result

    async def confirm(self, id: str, context: Context) -> Any:
        """Run what was proposed to this client under an id, once: its result."""
        call = self.proposals.take(lasting(context.client), id)
        if call is None or self._commands is None:
            raise CommandFailed("nothing is proposed to you under this id: it was run, or expired")
        inner = Context(context.client, context.progress, owner=context.owner)
        return await self._commands.run(call, inner)
