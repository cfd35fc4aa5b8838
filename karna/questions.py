"""What the server asks a client, until it is answered.

Imports errors and text alone; each client that was ever asked has one, and its door sends them.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Any, Protocol

from karna.errors import ClientLeft, ClientSilent, CommandFailed
from karna.text import one_line

MAX_QUESTIONS = 256  # to one client at a time; a program that asks more often would fill its memory


class Asked(Protocol):
    """What a question needs of a client."""

    id: str

    def send_question(self, number: int, event: str, args: tuple[Any, ...]) -> None:
        """Send it. Raises TypeError for what can't be encoded."""


class Questions:
    """The questions to one client that wait for their answers."""

    __slots__ = ("_numbers", "_waiting")

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}

    def next_number(self) -> int:
        """Of a question; or of an ack that nobody waits for."""
        return next(self._numbers)

    async def ask(self, client: Asked, event: str, args: tuple[Any, ...], timeout_s: float) -> Any:
        """Send a question and wait for its answer; errors are those of `Client.call`."""
        if len(self._waiting) >= MAX_QUESTIONS:
            raise CommandFailed(f"client {client.id} has {MAX_QUESTIONS} questions to answer")
        number, answer = self.next_number(), asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            client.send_question(number, event, args)
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise ClientSilent(f"no answer to {event!r} within {timeout_s:g} s") from None
        finally:
            del self._waiting[number]

    def answer(self, number: Any, data: Any, error: Any = None) -> bool:
        """The client has answered, with data or with the text of an error; was it asked?"""
        waiting = self._waiting.get(number) if type(number) is int else None
        if waiting is None or waiting.done():
            return False
        if error is None:
            waiting.set_result(data)
        else:
            try:
                text = one_line(str(error))
            except RecursionError:
                text = "something nested too deeply"
            waiting.set_exception(CommandFailed(f"the client answered: {text}"))
        return True

    def abandon(self) -> None:
        """The client is gone."""
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(ClientLeft("the client has left"))
