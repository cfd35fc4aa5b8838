"""Broadcasts on their way to all clients: kept, joined, framed once for each door, written to all.

A broadcast that was accepted, here or by the backplane, enters the history and waits for the
others of its turn of the loop; then each client gets them in one write, and nobody is waited for.
Touches the history and the members of each door; the manager at the top extends BroadcastHub.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from operator import attrgetter
from typing import TYPE_CHECKING, Any, cast

from karna.calls import Client, CommandHub
from karna.sender import write_all
from karna.envelopes import HISTORY_GAP
from karna.frames import frame_text
from karna.history import Entry, History, checked_entry, with_offset
from karna.packets import encode_namespace
from karna.socketio import encode_broadcast

if TYPE_CHECKING:
    from karna.backplane import RedisBackplane

ENVELOPE_BYTES = 1024  # more than a notification is longer than the request for it
CLIENTS_A_TURN = 100  # for whom a flush waits one more turn of the loop: 1 us in 400, and...
MAX_TURNS = 8  # ...never more than this
FLUSH_BROADCAST_BYTES = 256 * 1024  # broadcasts joined into one write before it leaves

_connection_of = attrgetter("connection")


class BroadcastHub(CommandHub):
    """A hub whose clients hear broadcasts."""

    def __init__(self) -> None:
        super().__init__()
        self.raw: dict[str, Any] = {}  # clients of the raw door, by id
        self.sockets: dict[str, dict[str, Any]] = {}  # those of each Socket.IO namespace, by id
        self.groups: dict[str, set[Client]] = {}  # those that have members, by name
        self.backplane: RedisBackplane | None = None
        self.broadcasts = self.deliveries = 0

    def begin_history(self) -> None:
        """Forget what was, and take the options there are now."""
        config = self.config
        self._started_ns = time.time_ns()
        self.node = f"{self._started_ns:x}"[-8:]  # names this process in its status
        self._offset_number = 0
        self.history = self._make_history(f"{self._started_ns}-0")
        self.flushed = self.history.last  # the offset up to which clients have been written to
        self.sockets = {name: {} for name in ("/", "/ws", "/ws/", *config.namespaces)}
        # Longest broadcast in the backplane: what came in as a request fits.
        self.max_entry_bytes = max(config.max_message_bytes, config.max_body_bytes) + ENVELOPE_BYTES
        self._pending: list[Entry] = []  # of this turn of the loop
        self._pending_bytes = 0

    def _make_history(self, base: str) -> History:
        return History(self.config.history_messages, self.config.history_bytes, base)

    @property
    def recovers(self) -> bool:
        """Do Socket.IO clients get offsets and connection state recovery?"""
        return self.config.recovery and self.config.history_messages > 0

    def next_offset(self) -> str:
        """Of a broadcast of this process; in the order in which they are accepted."""
        self._offset_number += 1
        return f"{self._started_ns}-{self._offset_number}"

    def offset_changed(self) -> None:
        """`flushed` has: what was encoded with it is old."""

    def count_clients(self) -> int:
        """Clients that a broadcast goes to: a Socket.IO session counts once a namespace."""
        return len(self.raw) + sum(map(len, self.sockets.values()))

    def all_clients(self) -> list[Client]:
        """Every client that broadcasts go to."""
        sockets = (client for members in self.sockets.values() for client in members.values())
        return [*self.raw.values(), *sockets]

    def receive_broadcast(
        self, offset: str, body: bytes, group: str | None = None, *, is_kept: bool = True
    ) -> None:
        """A broadcast is accepted: keep it and send it to the clients of this process."""
        envelope = with_offset(body, offset)
        if is_kept:
            self.history.append(offset, envelope, group)
        self._pending.append(Entry(offset, envelope, group))
        self._pending_bytes += len(envelope)
        self.broadcasts += 1
        if self.loop is None:  # nobody is served yet
            self.flush_broadcasts()
        elif len(self._pending) == 1:
            turns = min(len(self.connections) // CLIENTS_A_TURN, MAX_TURNS)
            self.loop.call_soon(self._flush_soon, self.broadcasts, turns)
        elif self._pending_bytes > FLUSH_BROADCAST_BYTES:
            self.flush_broadcasts()

    def receive_entry(self, offset: str, body: bytes) -> None:
        """An entry of the shared stream arrives: any process that reaches Redis may have put it."""
        try:
            body, group = checked_entry(body, self.max_entry_bytes)
        except ValueError as error:
            text = "skipped entry %s of the backplane: %s"
            return self.log_gate.warning("foreign entry", text, offset, error)
        self.receive_broadcast(offset, body, group)

    def restore_history(self, base: str, entries: list[tuple[str, bytes]]) -> None:
        """History is loaded from the backplane: who is a client already may have missed some."""
        self.flush_broadcasts()
        self.history = self._make_history(base)
        for offset, body in entries:
            with suppress(ValueError):  # a foreign entry
                body, group = checked_entry(body, self.max_entry_bytes)
                self.history.append(offset, with_offset(body, offset), group)
        self.flushed = self.history.last
        self.offset_changed()
        for client in self.all_clients():
            client.deliver(HISTORY_GAP, None)

    def _flush_soon(self, first: int, turns: int) -> None:
        """Flush after some turns of the loop: what is about to be broadcast leaves with it.

        first: the number of the oldest broadcast that waits, unless others have flushed it.
        """
        if self.broadcasts - len(self._pending) + 1 != first:
            return
        if turns and self.loop is not None:
            self.loop.call_soon(self._flush_soon, first, turns - 1)
        else:
            self.flush_broadcasts()

    def flush_broadcasts(self) -> None:
        """Write what was broadcast in this iteration of the loop: one write a client."""
        pending, self._pending = self._pending, []
        self._pending_bytes = 0
        if not pending:
            return
        self.flushed = pending[-1][0]
        self.offset_changed()
        if self.groups or any(entry.group is not None for entry in pending):
            for entries, clients in self._shares(pending):
                self._write(entries, clients)
        else:
            self._write(pending, self.all_clients())

    def _shares(self, pending: list[Entry]) -> Iterator[tuple[list[Entry], list[Client]]]:
        """Who gets what, where some of it is for groups: each share, and its clients."""
        wanted = {entry.group for entry in pending}
        clients = self.all_clients() if None in wanted else self._members_of(wanted)
        shares: defaultdict[frozenset[str | None], list[Client]] = defaultdict(list)
        for client in clients:
            shares[frozenset(wanted.intersection(client.groups))].append(client)
        for groups, sharers in shares.items():
            yield [each for each in pending if each.group is None or each.group in groups], sharers

    def _members_of(self, groups: Iterable[str | None]) -> set[Client]:
        return {client for group in groups for client in self.groups.get(cast(str, group), ())}

    def _write(self, entries: list[Entry], clients: Sequence[Client]) -> None:
        """Write the same broadcasts to these clients, framed once for each door."""
        if not entries or not clients:
            return
        by_door: defaultdict[str, list[Client]] = defaultdict(list)
        for client in clients:
            by_door["" if client.door == "raw" else client.namespace].append(client)
        recovers = self.recovers
        for namespace, sharers in by_door.items():
            if namespace:
                head = b"42" + encode_namespace(namespace) + b'["rpc_response",'
                texts = [
                    encode_broadcast(head, envelope, offset if recovers else None)
                    for offset, envelope, _ in entries
                ]
            else:
                texts = [entry.envelope for entry in entries]
            frames = b"".join(map(frame_text, texts))
            write_all([*map(_connection_of, sharers)], frames)
        self.deliveries += len(entries) * len(clients)

    def is_in(self, client: Client) -> bool:
        """Was it let in, and has not left?"""
        raise NotImplementedError

    # Groups.

    def count_of(self, group: str | None) -> int:
        """Clients of this process that a broadcast to this group goes to; None: to all."""
        return self.count_clients() if group is None else len(self.groups.get(group, ()))

    def join_group(self, client: Client, group: str) -> None:
        """From now on the client gets what is broadcast to the group; once it has been let in.

        One that has left, or that HTTP has only lent, joins nothing.
        """
        self.flush_broadcasts()  # to those who are in it
        client.groups = client.groups | {group}
        if self.is_in(client):
            self.groups.setdefault(group, set()).add(client)

    def leave_groups(self, client: Client, groups: Iterable[str]) -> None:
        """From now on the client gets nothing more that is broadcast to these groups."""
        self.flush_broadcasts()
        for group in client.groups.intersection(groups):
            members = self.groups.get(group, set())  # without it, if it was not let in
            members.discard(client)
            if not members and group in self.groups:
                del self.groups[group]
        client.groups = client.groups.difference(groups)

    def missed_by(self, client: Client, entries: list[Entry]) -> list[Entry]:
        """What of these broadcasts is for the client."""
        groups = client.groups
        return [each for each in entries if each.group is None or each.group in groups]
