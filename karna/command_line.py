"""The command line: flags and variables made from the Config, and what a person reads at the start.

Nothing here serves; `karna_ws.main` puts it together. Touches the environment and the standard
streams.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NoReturn, cast

from karna.config import Config
from karna.errors import StartError
from karna.listen import is_loopback
from karna.log import log

if TYPE_CHECKING:
    import argparse

LOG_LEVELS = ("debug", "info", "warning", "error")
GROUPS = {
    "where": "where to listen", "who": "who may come in", "limits": "limits",
    "heartbeat": "heartbeat and Socket.IO", "recovery": "recovery and scale-out",
    "commands": "commands and models", "run": "running",
}  # fmt: skip


def make_parser(version: str) -> argparse.ArgumentParser:
    """The command line: one flag for each option, grouped."""
    import argparse

    class Help(argparse.HelpFormatter):
        def __init__(self, prog: str) -> None:  # with a width: to find one, argparse imports shutil
            super().__init__(prog, max_help_position=32, width=_columns())

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:  # without the usage: one line
            hint = _meant(message, self._option_string_actions)
            self.exit(2, f"karna_ws: {message}; {hint or '--help shows the flags'}\n")

    parser = Parser(
        prog="karna_ws.py",
        usage="karna_ws.py [FLAG ...] [PROGRAM.py]",
        description="Serve commands, status and broadcasts over WebSocket, Socket.IO and HTTP.",
        epilog="Every flag can be set as KARNA_NAME in the environment, such as KARNA_PORT=9000; "
        "lists are separated by commas there.",
        formatter_class=Help,
    )
    parser.add_argument(
        "program", nargs="?", metavar="PROGRAM.py",
        help="a file of your own that makes `manager = WebSocketManager()`: serve that",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"karna_ws {version}")
    groups = {key: parser.add_argument_group(title) for key, title in GROUPS.items()}
    for option in fields(Config):
        _add_flag(groups[option.metadata["group"]], option)
    _add_host_flags(groups)
    return parser


def _columns() -> int:
    """How wide the help is: as the terminal, or as COLUMNS says."""
    columns = 0
    with suppress(AttributeError, OSError, ValueError):
        columns = os.get_terminal_size(sys.stdout.fileno()).columns
    with suppress(ValueError):
        columns = int(os.environ.get("COLUMNS", columns))
    return (columns if columns > 0 else 100) - 2


def _meant(message: str, known: Iterable[str]) -> str:
    """The flag that an unknown one is near to."""
    _, _, unknown = message.partition("unrecognized arguments: ")
    for word in unknown.split():
        near = _nearest(word.partition("=")[0], known) if word.startswith("-") else None
        if near:
            return f"did you mean {near}?"
    return ""


def _nearest(word: str, known: Iterable[str]) -> str | None:
    from difflib import get_close_matches  # with the first mistake

    return next(iter(get_close_matches(word, known, 1, 0.7)), None)


def _reading(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """What argparse calls with the text of a flag, or of its variable."""

    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            if not isinstance(text, _Variable):
                raise argparse.ArgumentTypeError(f"must be {words}, not {text!r}") from None
            raise StartError(f"{text.name} must be {words}, not {str(text)!r}") from None

    import argparse

    words = "a whole number" if kind is int else "a number"
    return read


def _add_flag(group: Any, option: Any) -> None:
    default, metadata = option.default, option.metadata
    flag = _flag(option)
    given = _environment(flag)
    metavar = metadata["metavar"] or option.name.upper()
    more: dict[str, Any] = {"dest": option.name, "help": metadata["help"]}
    if isinstance(default, bool):
        flag, variable = "--no-" + flag[2:] if default else flag, flag
        more |= {"action": "store_const", "const": not default}
        more["default"] = default if given is None else _read_bool(variable, given)
    elif isinstance(default, tuple):
        parts = [part.strip() for part in (given or "").split(",")]
        more |= {"action": "append", "metavar": metavar, "default": [*filter(None, parts)]}
        more["help"] += " (repeatable)"
    else:
        kind = {"int": int, "float": float, "float | None": float}.get(str(option.type), str)
        more |= {"type": _reading(kind), "metavar": metavar}
        more["default"] = default if given is None else given
        more["help"] += "" if default is None else " (default: %(default)s)"
    group.add_argument(flag, **more)


def _flag(option: Any) -> str:
    name: str = option.metadata["flag"] or option.name.removesuffix("_s").replace("_", "-")
    return f"--{name}"


def _variable(flag: str) -> str:
    return "KARNA_" + flag.removeprefix("--").replace("-", "_").upper()


class _Variable(str):
    """The text of a variable, which takes the blame for what is wrong with it."""

    name: str


def _environment(flag: str) -> _Variable | None:
    name = _variable(flag)
    text = _Variable(os.environ.get(name, ""))
    text.name = name
    return text or None


def _read_bool(flag: str, text: str) -> bool:
    if text.lower() in ("1", "true", "yes"):
        return True
    if text.lower() in ("0", "false", "no"):
        return False
    raise ValueError(f"{_variable(flag)} must be 1 or 0, not {text!r}")


def _add_host_flags(groups: Mapping[str, Any]) -> None:
    """Flags of the program that are no options of `serve()`."""
    programs = _environment("--allow-program")
    groups["commands"].add_argument(
        "--allow-program", action="append", metavar="NAME[=PATH]",
        default=programs.split(",") if programs else [],
        help="make a program of this machine a command (repeatable)",
    )  # fmt: skip
    groups["commands"].add_argument(
        "--no-confirm-programs", action="store_const", const=False, dest="confirm_programs",
        default=_read_bool("--confirm-programs", _environment("--confirm-programs") or "1"),
        help="models run allowed programs unasked (as KARNA_CONFIRM_PROGRAMS=0)",
    )  # fmt: skip
    groups["commands"].add_argument(
        "--conversation-turns", type=int, metavar="N",
        default=_environment("--conversation-turns") or 8,
        help="turns with the language model kept for each client; 0 keeps none (default: 8)",
    )  # fmt: skip
    model = "its model (default: the first it lists); its key comes from"
    for flag, metavar, help in (
        ("--vision-url", "URL", "OpenAI-compatible model server for vision, such as "
         "http://localhost:11434"),
        ("--vision-model", "NAME", f"{model} KARNA_VISION_KEY"),
        ("--language-url", "URL", "the same for language"),
        ("--language-model", "NAME", f"{model} KARNA_LANGUAGE_KEY"),
    ):  # fmt: skip
        default = _environment(flag)
        groups["commands"].add_argument(flag, metavar=metavar, default=default, help=help)
    reloads = _environment("--reload")
    groups["run"].add_argument(
        "--reload", action="store_true", default=reloads and _read_bool("--reload", reloads),
        help="start again when PROGRAM.py, or a module beside it, has changed",
    )  # fmt: skip
    groups["run"].add_argument(
        "--log-level", metavar="LEVEL", type=str.lower,
        default=_environment("--log-level") or "info",
        help=f"{', '.join(LOG_LEVELS[:-1])} or {LOG_LEVELS[-1]} (default: info)",
    )  # fmt: skip


def warn_of_misspelt(environment: Iterable[str], arguments: Iterable[str]) -> None:
    """A variable that is nearly one of ours does nothing, and its owner should know."""
    given = [name for name in arguments if name != "program"]  # which no variable sets
    flags = [*map(_flag, fields(Config)), *given, "vision-key", "language-key"]
    known = {_variable(flag) for flag in flags}
    for name in environment:
        if name.startswith("KARNA_") and name not in known:
            meant = _nearest(name, known)
            if meant:
                log.warning("the variable %s means nothing; is it %s?", name, meant)


def in_terms_of_flags(error: Exception, arguments: Sequence[str] = ()) -> str:
    """An error's text; the option that it begins with as what its owner wrote: flag or variable."""
    name, _, rest = str(error).partition(" ")
    flags = {option.name: _flag(option) for option in fields(Config)}
    flags["conversation_turns"] = "--conversation-turns"
    flag = flags.get(name, name)
    is_flag = flag.startswith("--")
    if is_flag and _environment(flag) and not any(map(functools.partial(_is, flag), arguments)):
        flag = _variable(flag)
    return f"{flag} {rest}"


def _is(flag: str, argument: str) -> bool:
    """Is this argument the flag, perhaps cut short?"""
    word = argument.partition("=")[0]
    return len(word) > 2 and flag.startswith(word)


def make_manager(arguments: argparse.Namespace, kind: type[Any]) -> Any:
    """The manager, of this class, that the command line describes.

    Raises ValueError that names the flag.
    """
    for service in ("vision", "language"):
        if getattr(arguments, f"{service}_model") and not getattr(arguments, f"{service}_url"):
            raise ValueError(f"--{service}-model needs --{service}-url")
    if arguments.program is None:
        manager = kind()
    else:
        from karna.program import load_manager

        manager = load_manager(arguments.program, kind)
    for service in ("vision", "language"):
        url, model = getattr(arguments, f"{service}_url"), getattr(arguments, f"{service}_model")
        if url and service in manager.brought:
            log.warning("--%s-url is not used: the program has its own service", service)
        elif url:
            manager.services[service].use_server(url, model=model)
    if "language" not in manager.brought:
        manager.services["language"].keep_turns(arguments.conversation_turns)
    for program in arguments.allow_program:
        name, _, path = program.partition("=")
        manager.commands.allow_program(name, path or None, confirm=arguments.confirm_programs)
    return manager


def describe_server(version: str, config: Config, listening: socket.socket) -> str:
    """What a person reads at the start: the doors, who may come in, what to try."""
    if config.unix is not None:
        base = socket_base = f"unix:{config.unix}"
    else:
        place = f"{_shown_host(listening)}:{listening.getsockname()[1]}"
        secure = "s" if config.certfile else ""
        base, socket_base = f"http{secure}://{place}", f"ws{secure}://{place}"
    return f"""\
Karna WS {version}
  console    {base}/
  raw        {socket_base}/ws
  Socket.IO  {socket_base}/ws  (socket.io-client 3 or 4, transports: ['websocket'])
  REST       {base}/api/status
  JSON-RPC   {base}/rpc
  MCP        {base}/mcp  (assistants: Model Context Protocol)
  metrics    {base}/metrics
  open to    {_shown_access(config)}
  try        {_shown_trial(config, base)}"""


def _shown_host(listening: socket.socket) -> str:
    name = listening.getsockname()
    if not isinstance(name, tuple) or name[0] in ("127.0.0.1", "0.0.0.0", "::", "::1"):
        return "localhost"
    return f"[{name[0]}]" if ":" in name[0] else str(name[0])


def _shown_access(config: Config) -> str:
    if config.unix is not None:
        who = "the owner of the socket's file"
    elif is_loopback(config.host):
        who = "this machine, and pages served from it"
    else:
        who = f"everyone who reaches {config.host or 'this machine'}"
    pages = f", and pages of {', '.join(config.allow_origin)}" if config.allow_origin else ""
    return f"{who}{pages}; {'with the token' if config.token else 'without a token'}"


def _shown_trial(config: Config, base: str) -> str:
    token = ' -H "Authorization: Bearer $KARNA_TOKEN"' if config.token else ""
    unix = f" --unix-socket {config.unix}" if config.unix else ""
    url = "http://localhost" if config.unix else base
    body = """ -H 'Content-Type: application/json' -d '{"command": "help"}'"""
    return f"curl{unix}{token}{body} {url}/api/execute_command"


def say(text: str, stream: Any = None) -> None:
    """Print for a person; a closed stdout or stderr must not end the server."""
    with suppress(OSError, ValueError):
        print(text, file=stream, flush=True)


def open_standard_files() -> None:
    """Put /dev/null where stdin, stdout or stderr is closed; else a socket takes that number.

    What libraries write to stderr would go to a client then, and libuv aborts the process.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def set_up_logging(level: str) -> None:
    """One line an event on stderr; a log that can't be written is no reason to fail."""
    if level not in LOG_LEVELS:
        raise ValueError(f"--log-level must be one of {', '.join(LOG_LEVELS)}, not {level!r}")
    logging.raiseExceptions = False
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)-7s %(message)s")


def new_event_loop(name: str) -> asyncio.AbstractEventLoop:
    """The event loop of that name; "auto" is uvloop where it is installed. Raises StartError."""
    if name != "asyncio":
        try:
            import uvloop

            return cast(asyncio.AbstractEventLoop, uvloop.new_event_loop())
        except ImportError:
            if name == "uvloop":
                raise StartError("uvloop is not installed: pip install uvloop") from None
    return asyncio.new_event_loop()
