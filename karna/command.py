"""A function made into a command: its name, arguments and help come from signature and docstring.

All that can be known about a command is worked out when it is made, so that a message costs one
look-up and the conversion of its words. Uses context, errors, kinds and words; used by services,
programs, and whoever calls a function of the program with a client's values.
"""

from __future__ import annotations

import dis
import functools
import inspect
import operator
import re
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextvars import copy_context
from enum import Enum
from typing import Any, NamedTuple, get_args

from orjson import dumps, loads

from karna.context import Context
from karna.errors import CommandFailed, UsageError
from karna.kinds import ANY, KINDS, MAX_ITEMS, Kind, Schema, kind_of, without_null, word_of
from karna.words import MAX_WORDS, cut_word, skip_blanks, stems_of, unquoted

_REQUIRED: Any = inspect.Parameter.empty
Bound = tuple[list[Any], dict[str, Any]]  # positional and keyword arguments of a function
MAX_PARAMS = 1_000  # that a call gives by name, two microseconds each where **kwargs takes them


class Parameter(NamedTuple):
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
        return self.is_option and self.kind is KINDS[bool]

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
        return text + "..." if self.is_repeated or self.is_text else text

    @property
    def is_text(self) -> bool:
        """Does it take the rest of the line?"""
        return self.kind.is_text and not self.is_option

    def describe(self) -> dict[str, Any]:
        """As `help` shows it."""
        shown = {"name": self.name, "type": self.kind.name, "required": self.is_required}
        if isinstance(self.told_default, str | int | float | None):
            shown["default"] = self.told_default
        if self.kind.choices:
            shown["choices"] = list(self.kind.choices)
        if self.is_repeated or self.is_text:
            shown["repeated"] = True
        if self.is_option:
            shown["option"] = self.label
        return shown

    def schema(self, description: str) -> Schema | None:
        """As JSON Schema tells it; None where JSON has no such value."""
        if self.kind.schema is None:
            return None
        if self.is_repeated:
            schema: Schema = {"type": "array", "items": without_null(self.kind.schema)}
            schema |= {"minItems": 1} if self.is_required else {}
        else:
            default = {"default": self.told_default} if self._has_default else {}
            schema = self.kind.schema | default
        return schema | ({"description": description} if description else {})

    @property
    def told_default(self) -> Any:
        """The default as a caller would give it."""
        return word_of(self.default) if isinstance(self.default, Enum) else self.default

    @property
    def _has_default(self) -> bool:
        """Is there a default that JSON can hold?"""
        if self.default is None:
            return self.kind.nullable
        try:
            told = self.told_default
            return bool(loads(dumps(told)) == told)  # nan becomes null
        except TypeError:
            return False

    def convert(self, value: Any) -> Any:
        """Convert one word or JSON value; ValueError with a sentence for the caller."""
        try:
            return self.kind.convert(value)
        except ValueError as problem:
            shown = repr(value[:40]) if isinstance(value, str) else type(value).__name__
            if isinstance(value, list):
                shown = f"a list of {len(value)}"
            raise ValueError(f"{self.label} {problem}, not {shown}") from None


class Command:
    """A function made into a command: its tables are compiled here, once.

    Positional parameters become words, keyword-only ones options (`--name VALUE`, `--name=VALUE`,
    `--flag`, `--no-flag`), and `*words` takes one word or more; none will do when its type allows
    None, as `*words: str | None` or no annotation does. A last one annotated `Text` takes the rest
    of the line as it was typed. Every parameter can be given by name in `params` instead. `inline`
    marks a plain function that never blocks and may be called at once, on the loop, without a
    task; an `async def` without any `await` is one. Functions with `yield` are `async def`.

    For assistants: `tool` says whether it is one of their tools (None: a program's commands are,
    built-in ones are not), `confirm` that a person has to agree to each call, `read_only` and
    `destructive` what a call does, as a hint.
    Raises TypeError or ValueError, at registration, for what no command line could call.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        aliases: Sequence[str] = (),
        inline: bool = False,
        tool: bool | None = None,
        confirm: bool = False,
        read_only: bool | None = None,
        destructive: bool | None = None,
    ) -> None:
        if not callable(function):
            hint = f"; its name goes into name={function!r}" if isinstance(function, str) else ""
            raise TypeError(f"a command is made from a function, not from {function!r}{hint}")
        self.function = function
        self.name = name or name_of(function)
        self.aliases = tuple(aliases)
        self.names = (self.name, *self.aliases)
        self.title = f"command {self.name}"  # in logs
        for each in self.names:
            if not re.fullmatch(r"[^\s\"'\\]+", each) or not each.isprintable():
                raise ValueError(f"a command's name is one word without quotes, not {each!r}")
        self.help = inspect.cleandoc(getattr(function, "__doc__", None) or "")
        self.summary = self.help.partition("\n")[0]
        self.inline = inline
        self.tool = tool
        self.confirm = confirm
        self.read_only = read_only
        self.destructive = destructive
        self.expected: tuple[type[Exception], ...] = ()  # that it raises to say no: no bugs
        self.is_handler = False  # of an event: it never waits for a thread that commands hold
        self.runs = self._way_to_run()
        self._read_signature()
        self.is_coroutine = self.context_name is None and _is_coroutine(function)
        if self.is_coroutine and _never_waits(function):
            self.inline, self.function = True, functools.partial(_finish, function)
            self.is_coroutine = False

    def _way_to_run(self) -> str:
        """How a task calls the function: 'stream', 'loop' or 'thread'."""
        forms = (self.function, getattr(self.function, "__call__", None))  # noqa: B004
        if any(map(inspect.isgeneratorfunction, forms)):
            raise TypeError(f"command {self.name}: make it `async def`, for its yields to report")
        is_stream = any(map(inspect.isasyncgenfunction, forms))
        is_async = any(map(inspect.iscoroutinefunction, forms))
        if self.inline and (is_stream or is_async):
            raise TypeError(f"command {self.name}: inline is for plain functions")
        if is_stream:
            return "stream"
        return "loop" if is_async or self.inline else "thread"

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
        self._options = {each.name for each in options}
        flags = [each for each in options if each.is_flag]
        self._flags = {"no_" + each.name: (each, False) for each in flags}
        self._flags |= {each.name: (each, True) for each in flags}
        self._has_options = bool(options) or self._extra is not None
        self._required = [each for each in self._by_name.values() if each.is_required]
        self.takes_text = any(each.is_text for each in self._words)
        before = self._words if self._repeated is not None else self._words[:-1]
        if any(each.is_text for each in before) or (self._repeated and self._repeated.is_text):
            raise TypeError(f"command {self.name}: a Text takes what is left, nothing can follow")
        # The commonest shapes take no tables: only words, nothing at all, a word each.
        any_words = self._repeated is not None and self._repeated.kind in (KINDS[str], ANY)
        self.takes_words = any_words and not self._words and not self._has_options
        self._bare = None if self._required else self._arrange({})[0]
        is_plain = self._repeated is None and not self._has_options
        self._converters = [each.kind.convert for each in self._words] if is_plain else []

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

    # What tells of it is worked out when somebody asks.

    @functools.cached_property
    def stems(self) -> set[str]:
        """The telling words of its docstring."""
        return stems_of(self.help)

    @functools.cached_property
    def arguments(self) -> list[dict[str, Any]]:
        """Its arguments, as `help` lists them."""
        return [each.describe() for each in self._by_name.values()]

    @functools.cached_property
    def usage(self) -> str:
        """The usage line."""
        extra = [] if self._extra is None else ["[--NAME VALUE]..."]
        return " ".join([self.name, *(each.usage for each in self._by_name.values()), *extra])

    def describe(self) -> dict[str, Any]:
        """As `help` lists it."""
        return {"name": self.name, "usage": self.usage, "summary": self.summary,
                "aliases": list(self.aliases), "arguments": self.arguments}  # fmt: skip

    @functools.cached_property
    def input_schema(self) -> Schema | None:
        """What `bind` takes by name, as JSON Schema; None where JSON can't hold what it needs.

        The top is always an object with properties: one tool without makes clients drop all.
        """
        described = _describe_parameters(self.help)
        found = {name: each.schema(described.get(name, "")) for name, each in self._by_name.items()}
        required = [each.name for each in self._required]
        if any(found[name] is None for name in required):
            return None
        properties = {name: schema for name, schema in found.items() if schema is not None}
        further = False if self._extra is None else self._extra.kind.schema
        schema: Schema = {"type": "object", "properties": properties}
        schema |= {"required": required} if required else {}
        return schema | {"additionalProperties": True if further == {} else further or False}

    def usage_error(self, problem: str) -> UsageError:
        return UsageError(f"{problem}; usage: {self.usage}", usage=self.usage)

    def split_text(self, line: str) -> list[str]:
        """The words of a line whose last one is free text, as `bind` takes them.

        Options stand before the text, or at its end where they are written without quotes; after
        a `--` all is text. A text that is one word in quotes goes without these. What is long is
        never split. Raises UsageError for a quote that is not closed before the text.
        """
        _, at = cut_word(line, skip_blanks(line, 0))
        words: list[str] = []
        places = len(self._words) - 1  # before the text
        while at < len(line) and len(words) < MAX_WORDS:
            is_option = self._has_options and line.startswith("--", at) and "--" not in words
            if not (is_option or places):
                break
            word, at = cut_word(line, at)
            words.append(word)
            if not is_option:
                places -= 1
            elif self._lacks_value(word) and at < len(line):
                word, at = cut_word(line, at)
                words.append(word)
        text = line[at:].rstrip(" \t\r\n")
        if text and self._has_options and "--" not in words:
            text, options = self._cut_options(text)
            words += [*options, "--"]
        return [*words, unquoted(text)] if text else words

    def _lacks_value(self, word: str) -> bool:
        """Is it an option whose value is the next word?"""
        return "=" not in word and word != "--" and word[2:].replace("-", "_") not in self._flags

    def _cut_options(self, text: str) -> tuple[str, list[str]]:
        """A text without the options at its end; those."""
        found: list[str] = []
        for _ in self._options:
            for count in (1, 2):
                head, *tail = ["", *text.rsplit(None, count)][-count - 1 :]
                if head and self._is_option(tail):
                    text, found = head, tail + found
                    break
        return text, found

    def _is_option(self, words: list[str]) -> bool:
        """Is this an option of ours with all that it needs?"""
        label = words[0].partition("=")[0]
        name = label[2:].replace("-", "_")
        if not label.startswith("--") or any(mark in "".join(words) for mark in "\"'\\"):
            return False
        is_known = name in self._options or (name in self._flags and label == words[0])
        return is_known and self._lacks_value(words[0]) == (len(words) == 2)

    def bind(self, words: list[str], params: Mapping[str, Any]) -> Bound:
        """Convert words and named parameters to the function's arguments; raises UsageError.

        The words are given away: they may become the arguments. The Context is not among these.
        """
        if not params:
            if words:
                if self.takes_words:
                    return words, {}
                if len(words) == len(self._converters):
                    try:
                        return list(map(operator.call, self._converters, words)), {}
                    except ValueError:
                        pass  # which is told below
            elif self._bare is not None:
                return self._bare[:], {}
        given: dict[str, Any] = {}
        try:
            rest = self._bind_options(words, given) if self._has_options else words
            self._bind_words(rest, given)
            self._bind_params(params, given)
            return self._arrange(given)
        except ValueError as problem:
            raise self.usage_error(str(problem)) from None

    def _bind_options(self, words: Sequence[str], given: dict[str, Any]) -> list[str]:
        """Take `--name VALUE` and its like out of the words, up to a `--`."""
        rest: list[str] = []
        left = iter(words)
        for word in left:
            if word == "--":
                rest.extend(left)
            elif word.startswith("--"):
                self._bind_option(word, left, given)
            else:
                rest.append(word)
        return rest

    def _bind_option(self, word: str, left: Iterator[str], given: dict[str, Any]) -> None:
        label, equals, text = word.partition("=")
        name = label[2:].replace("-", "_")
        if name in self._flags and not equals:
            parameter, value = self._flags[name]
            return self._set(parameter, value, given)
        option = self._by_name.get(name)
        if option is None or not option.is_option:
            option = self._extra_named(name, f"unknown option {label[:40]!r}")
        follows = text if equals else next(left, None)
        if follows is None:
            raise ValueError(f"{label[:40]} needs a value")
        return self._set(option, follows, given)

    def _bind_words(self, words: Sequence[str], given: dict[str, Any]) -> None:
        for parameter, word in zip(self._words, words, strict=False):
            given[parameter.name] = parameter.convert(word)
        further = words[len(self._words) :]
        if further and self._repeated is None:
            raise ValueError(f"too many arguments, from {further[0][:40]!r} on")
        if further and self._repeated is not None:
            given[self._repeated.name] = [self._repeated.convert(word) for word in further]

    def _bind_params(self, params: Mapping[str, Any], given: dict[str, Any]) -> None:
        if len(params) > MAX_PARAMS:
            raise ValueError(f"too many parameters: at most {MAX_PARAMS}")
        for name, value in params.items():
            parameter = self._by_name.get(name)
            if parameter is None:
                parameter = self._extra_named(name, f"unknown parameter {name[:40]!r}")
            self._set(parameter, value, given)

    def _extra_named(self, name: str, problem: str) -> Parameter:
        """The parameter that **kwargs makes of `name`; the Context's name is never a client's."""
        if self._extra is None or not name or name in {*self._by_name, self.context_name}:
            raise ValueError(problem)
        return Parameter(name, self._extra.kind, is_option=True)

    def _set(self, parameter: Parameter, value: Any, given: dict[str, Any]) -> None:
        if parameter.name in given:
            raise ValueError(f"{parameter.label} is given twice")
        if not parameter.is_repeated:
            given[parameter.name] = parameter.convert(value)
        elif value != []:
            values = value if isinstance(value, list) else [value]
            if len(values) > MAX_ITEMS:
                raise ValueError(f"{parameter.label} must have at most {MAX_ITEMS} items")
            given[parameter.name] = [parameter.convert(each) for each in values]

    def _arrange(self, given: dict[str, Any]) -> Bound:
        """Put what was given into the order of the signature; ValueError for what is missing."""
        for parameter in self._required:
            if parameter.name not in given:
                raise ValueError(f"{parameter.label} is missing")
        args = [given.pop(each.name, each.default) for each in self._words]
        if self._repeated is not None:
            args += given.pop(self._repeated.name, ())
        return args, given  # what is left are options


_AWAITS = dis.opmap["SEND"]  # in the code of each await, `async for` and `async with`


def _is_coroutine(function: Any) -> bool:
    """Is it an `async def`, and nothing that a decorator made of one?"""
    plain = function.__func__ if inspect.ismethod(function) else function
    return inspect.isfunction(plain) and bool(plain.__code__.co_flags & inspect.CO_COROUTINE)


def _never_waits(function: Any) -> bool:
    """Is this `async def` one in which nothing can wait? A task could do no more for it."""
    code = getattr(function, "__func__", function).__code__
    return _AWAITS not in code.co_code[::2] and "current_task" not in code.co_names


def _finish(function: Callable[..., Coroutine[Any, Any, Any]], *args: Any, **kwargs: Any) -> Any:
    """What a coroutine returns that never waits; in a context of its own, as in a task."""
    try:
        copy_context().run(function(*args, **kwargs).send, None)
    except StopIteration as end:
        return end.value
    raise RuntimeError("a coroutine without await has waited")


def _describe_parameters(text: str) -> dict[str, str]:
    """What a docstring says of each parameter, in lines such as 'city: where to look'."""
    return {match[1]: match[2] for match in re.finditer(_PARAMETER_LINE, text)}


_PARAMETER_LINE = r"(?m)^\s*(?::param )?\*{0,2}(\w+)(?: \([^)]*\))?: +(\S.*)$"


class Call:
    """A command with its arguments, ready to run once."""

    __slots__ = ("args", "command", "kwargs")

    def __init__(self, command: Command, args: list[Any], kwargs: dict[str, Any]) -> None:
        self.command = command
        self.args = args
        self.kwargs = kwargs


def decorator(register: Callable[[str, Any], None], given: Any) -> Any:
    """A decorator that registers functions, used bare or called with a name or without one.

    given: the function, the name, or None. The name is by default the function's own.
    """

    def decorate(function: Any) -> Any:
        register(given if isinstance(given, str) else name_of(function), function)
        return function

    if given is None or isinstance(given, str):
        return decorate
    if not callable(given):
        raise TypeError(f"a name is a text, not {given!r}")
    return decorate(given)


def name_of(function: Any) -> str:
    """The name that a function, or another thing to be called, was given where it was made."""
    return str(getattr(function, "__name__", type(function).__name__))


# What handlers are called with: of any other event with the client and the event's own values.
LIFE_EVENTS = {"connect": ("client", "auth"), "disconnect": ("client", "reason")}


def as_handler(function: Callable[..., Any], inline: bool, event: str = "") -> Command:
    """An event handler in a Command's clothes: called with the values as they are.

    Raises TypeError for one that could not be called with them.
    """

    def call(*args: Any) -> Any:
        try:
            return function(*args)
        except TypeError as error:
            if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
                raise
            # It was not even entered: the client sent more values, or fewer, than it takes.
            raise CommandFailed(str(error)) from None

    async def call_async(*args: Any) -> Any:
        return await call(*args)

    _check_handler(function, event)
    is_async = inspect.iscoroutinefunction(function)
    command = Command(call_async if is_async else call, name="handler", inline=inline)
    command.is_handler, command.title = True, f"handler of {event!r}"
    command.expected = (PermissionError,) if event == "connect" else ()
    return command


def _check_handler(function: Callable[..., Any], event: str) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # some written in C tell none
        return
    values = LIFE_EVENTS.get(event)
    bind = signature.bind if values else signature.bind_partial
    try:
        bind(*(values or ("client",)))
    except TypeError:
        wanted = ", ".join(values or ("client", "*args"))
        raise TypeError(f"a handler of {event!r} takes ({wanted}), not {signature}") from None
