"""Commands that every server has: help, echo, time, countdown, notify and clients.

A command of the program takes the place of one of the same name. Uses command, context, errors and
text; offered by the CommandProcessor, which is known here by what they need of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any, Literal, Protocol, get_args

from karna.command import Command
from karna.context import Context
from karna.errors import UnknownCommand, UsageError
from karna.kinds import Text
from karna.text import utc_now

Level = Literal["info", "warning", "error"]


class Registry(Protocol):
    """What holds the commands."""

    commands: dict[str, Command]

    def offer(self, command: Command) -> None:
        """Register a built-in command."""

    def distinct(self) -> list[Command]:
        """Each command once, by name."""

    def unknown(self, name: str) -> UnknownCommand:
        """The error for a name that no command has."""


class Broadcaster(Protocol):
    """Whom the commands `notify` and `clients` reach: the WebSocketManager."""

    def broadcast(self, type: str, data: Any) -> int:
        """Send to every client, at once; how many there are."""

    async def publish(self, type: str, data: Any) -> int:
        """`broadcast`, and wait until all processes will get it."""

    def all_clients(self) -> Sequence[Any]:
        """Every client, with `id`, `door` and `namespace`."""


def add_builtins(commands: Registry) -> None:
    """Offer `help`, `echo`, `time` and `countdown`."""

    def help_(command: str | None = None) -> dict[str, Any]:
        """List the commands, or tell all about one."""
        if command is None:
            return {"commands": [each.describe() for each in commands.distinct()]}
        found = commands.commands.get(command)
        if found is None:
            raise commands.unknown(command)
        return {**found.describe(), "help": found.help}

    commands.offer(Command(help_, name="help", inline=True))
    commands.offer(Command(echo, inline=True))
    commands.offer(Command(tell_time, name="time", inline=True, tool=True, read_only=True))
    commands.offer(Command(countdown))


def echo(*text: str) -> str:
    """Answer with the text."""
    return " ".join(text)


def tell_time() -> dict[str, Any]:
    """Tell the server's time in UTC."""
    return {"utc": utc_now(), "unix": time.time()}


MAX_COUNTDOWN_S = 3_600.0  # an hour: it is there to be tried


async def countdown(seconds: float) -> AsyncIterator[dict[str, Any]]:
    """Count seconds down and report progress; something to cancel."""
    if not 0 <= seconds <= MAX_COUNTDOWN_S:
        usage = "countdown SECONDS"
        raise UsageError(f"SECONDS must be 0 to {MAX_COUNTDOWN_S:g}; usage: {usage}", usage=usage)
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


def notification(message: Any, level: Any = "info") -> dict[str, str]:
    """The data of a `notification`. Raises ValueError for a wrong message or level."""
    if not isinstance(message, str) or not message:
        raise ValueError('"message" must be a string that is not empty')
    if level not in get_args(Level):
        raise ValueError(f'"level" must be one of {", ".join(get_args(Level))}')
    return {"message": message, "level": level, "time": utc_now()}


def notify_command(broadcaster: Broadcaster) -> Command:
    """The command `notify`; where it is not inline it waits for the backplane."""

    def notify(
        message: Text, *, level: Level = "info"
    ) -> dict[str, int] | Awaitable[dict[str, int]]:
        """Send a notification to every client.

        message: what people read
        """
        data = notification(message, level)
        if command.inline:
            return {"clients": broadcaster.broadcast("notification", data)}
        return published(data)

    async def published(data: dict[str, str]) -> dict[str, int]:
        return {"clients": await broadcaster.publish("notification", data)}

    command = Command(notify, inline=True, tool=True, destructive=False)
    return command


MAX_LISTED = 100  # clients by `clients`: thousands would be a long answer


def clients_command(broadcaster: Broadcaster) -> Command:
    """The command `clients`."""

    async def clients(context: Context) -> dict[str, Any]:
        """List who is connected."""
        everyone = broadcaster.all_clients()
        shown = everyone[:MAX_LISTED]
        listed = [{"id": c.id, "door": c.door, "namespace": c.namespace} for c in shown]
        you = getattr(context.client, "id", None)
        return {"count": len(everyone), "you": you, "clients": listed}

    return Command(clients)
