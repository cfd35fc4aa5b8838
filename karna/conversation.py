"""Conversations with a model: the last turns of each client, kept here alone and gone with it.

Touches nothing; used by the language service.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from karna.answers import Message

MAX_CONVERSATION_BYTES = 32 * 1024  # of one client: some 8,000 tokens, what small models hold
_PASSING_DOORS = ("http", "mcp")  # where a client is there for one request


def lasting(client: Any) -> Any:
    """The client, if it is one that can ask again; else None."""
    return None if getattr(client, "door", None) in _PASSING_DOORS else client


class Conversations:
    """What each client and the model have said, the latest `turns` of them."""

    def __init__(self, turns: int) -> None:
        self.turns = turns
        self._kept: WeakKeyDictionary[Any, list[tuple[str, str]]] = WeakKeyDictionary()

    def messages(self, client: Any) -> list[Message]:
        """What was said before, as a request tells it."""
        pairs = self._kept.get(client, ()) if client is not None else ()
        return [
            {"role": role, "content": text}
            for said, answered in pairs
            for role, text in (("user", said), ("assistant", answered))
        ]

    def add(self, client: Any, said: str, answered: str) -> None:
        """Keep one turn; the oldest ones go when there are too many, or too long ones."""
        if lasting(client) is None or not self.turns:
            return
        pairs = [*self._kept.get(client, ()), (said, answered)][-self.turns :]
        while pairs and _size(pairs) > MAX_CONVERSATION_BYTES:
            del pairs[0]
        self._kept[client] = pairs

    def forget(self, client: Any) -> int:
        """Begin anew; how many turns are forgotten."""
        return len(self._kept.pop(client, ())) if client is not None else 0


def _size(pairs: Sequence[tuple[str, str]]) -> int:
    return sum(len(text.encode(errors="replace")) for pair in pairs for text in pair)
