"""Broadcasts kept for clients that come back: offsets, replay, gaps.

Pure but for the History itself; imports nothing of ours. Used by the manager, and by the backplane
for the order of offsets.

An offset is "TIME-NUMBER", two decimal numbers, in their order: a Redis stream id has this form,
and so have the offsets that a process gives alone. Being ordered, one that another process gave
is understood even if no broadcast is kept under it.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable
from itertools import islice

from typing import NamedTuple

from orjson import dumps, loads

MAX_REPLAY_HEAD_BYTES = 400  # frame, event, namespace and offset around an envelope

Position = tuple[int, int]  # of an offset among others

# 20 digits hold any 64 bit number, as both parts of a Redis id are; int() of more could be slow.
_OFFSET = "([0-9]{1,20})-([0-9]{1,20})"


def parse_offset(text: str) -> Position:
    """The position of an offset such as '1700000000000-0'. Raises ValueError if it is none."""
    match = re.fullmatch(_OFFSET, text)
    if match is None:
        raise ValueError("an offset looks like 1700000000000-0")
    return int(match[1]), int(match[2])


class Entry(NamedTuple):
    """One broadcast: its envelope as sent, and whom it is for."""

    offset: str
    envelope: bytes
    group: str | None = None  # of clients; None: everybody


class History:
    """The latest broadcasts, each under its offset; bounded by count and by bytes.

    base: the offset just before the first. When a bound is passed the oldest go, and clients that
    last saw something older get a gap.
    """

    def __init__(self, max_messages: int, max_bytes: int, base: str) -> None:
        self.max_messages = max_messages
        self.max_bytes = max_bytes
        self.bytes = 0
        self.entries: deque[Entry] = deque()
        self.last = base
        self._base = self._newest = parse_offset(base)
        self._positions: deque[Position] = deque()  # of the entries

    def append(self, offset: str, envelope: bytes, group: str | None = None) -> None:
        """Add the newest broadcast; its offset is above all before."""
        self._newest = parse_offset(offset)
        self._positions.append(self._newest)
        self.entries.append(Entry(offset, envelope, group))
        self.last = offset
        self.bytes += len(envelope)
        while len(self.entries) > self.max_messages or self.bytes > self.max_bytes:
            self._base = self._positions.popleft()
            self.bytes -= len(self.entries.popleft().envelope)

    def since(self, offset: str) -> list[Entry] | None:
        """What followed `offset`, oldest first; None when that is unknown or too old."""
        try:
            position = parse_offset(offset)
        except ValueError:
            return None
        if not self._base <= position <= self._newest:
            return None
        count = len(self.entries) - bisect_right(self._positions, position)
        missed = list(islice(reversed(self.entries), count))  # most come back soon: from the end
        missed.reverse()
        return missed


def with_offset(body: bytes, offset: str) -> bytes:
    """The envelope of a broadcast: its type and data, and the offset it got."""
    return b'%b,"offset":"%b"}' % (body[:-1], offset.encode())


def with_group(body: bytes, group: str | None) -> bytes:
    """A broadcast as it is put into the backplane; undone by `checked_entry`."""
    return body if group is None else b'%b,"to":%b}' % (body[:-1], dumps(group))


def checked_entry(body: bytes, max_bytes: int) -> tuple[bytes, str | None]:
    """A broadcast as another process put it into the backplane, and the group it is for.

    Raises ValueError if it is none.
    """
    if len(body) > max_bytes:
        raise ValueError("too large")
    value = loads(body)
    if not isinstance(value, dict) or not isinstance(value.get("type"), str) or "data" not in value:
        raise ValueError("not a broadcast")
    group = value.get("to")
    if not isinstance(group, str | None):
        raise ValueError("not a broadcast")
    try:
        return dumps({"type": value["type"], "data": value["data"]}), group
    except TypeError as error:  # it reads deeper nesting than it writes
        raise ValueError(str(error)) from None


def replay_bytes(missed: Iterable[Entry]) -> int:
    """About what a replay takes on the wire."""
    return sum(len(each.envelope) + MAX_REPLAY_HEAD_BYTES for each in missed)
