"""Who comes in, and who leaves: the connect handler decides, then a client is sent what it missed.

One way in for every door that has clients of its own. Until a client is in it is not counted, gets
no broadcast, and no disconnect handler runs for it. Touches the handlers of the program and the
history; the manager at the top extends AdmissionHub.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections import OrderedDict
from typing import Any

from websockets.frames import CloseCode

from karna.broadcasts import BroadcastHub
from karna.calls import NO_GROUPS, Client
from karna.command import Call, Command
from karna.context import Context
from karna.door import HOLD_CONNECT
from karna.envelopes import HISTORY_GAP
from karna.errors import RequestError, explain
from karna.history import Entry, replay_bytes
from karna.text import encodable
from karna.trace import came, went

LAG_S = 1.0  # to read from the backplane what another process has sent to a client already
REPLAY_AT_ONCE_BYTES = 64 * 1024  # of a replay; a longer one is sent as its client reads it


class AdmissionHub(BroadcastHub):
    """A hub whose program may refuse clients, and whose clients may come back."""

    def __init__(self) -> None:
        super().__init__()
        self.handlers: dict[str, Command] = {}  # of the program, by event
        self.deciding: set[Client] = set()  # who is here and whose connect handler runs
        self._parted: OrderedDict[Any, Any] = OrderedDict()  # state and groups of who may recover

    def send_status(self, client: Client) -> None:
        """Send the status, with the offset that it is current as of."""
        raise NotImplementedError

    def admit(self, client: Client) -> None:
        """A client asks to come in: its connect handler decides; then it is sent what it missed.

        Until then it is not counted and gets no broadcast.
        """
        if self._is_ahead(client.since):
            self.spawn(self._admit_later(client), f"{client.id} waits for the backplane")
        else:
            self._ask(client)

    async def _admit_later(self, client: Client) -> None:
        """Wait a bounded time, or the client would get again what it has seen elsewhere."""
        until = time.monotonic() + LAG_S
        while self._is_ahead(client.since) and time.monotonic() < until:
            await asyncio.sleep(0.01)
        self._ask(client)

    def _is_ahead(self, offset: str | None) -> bool:
        """Has another process sent this to a client, while it is still on its way to this one?"""
        return self.backplane is not None and offset is not None and self.backplane.is_ahead(offset)

    def _keep_state(self, client: Client) -> None:
        """For a client that may recover: what a program knows of it, and its groups."""
        if client._state or client.groups:
            self._parted[client.namespace, client.id] = client._state, client.groups
            while len(self._parted) > self.config.max_clients:
                self._parted.popitem(last=False)

    def _restore_state(self, client: Client) -> None:
        before = self._members(client).get(client.id)  # a connection not known to be dead yet
        parted = (None, NO_GROUPS) if before is None else (before._state, before.groups)
        client._state, groups = self._parted.pop((client.namespace, client.id), parted)
        for group in groups:
            client.join(group)

    def _ask(self, client: Client) -> None:
        if client.since is not None and client.door == "socket.io":
            self._restore_state(client)
        handler = self.handlers.get("connect")
        if handler is None or not client.is_present:
            return self._decided(client, None, None)
        if client.door == "raw":
            client.connection.hold(HOLD_CONNECT)
        self.deciding.add(client)
        call = Call(handler, [client, client.auth], {})
        decided = functools.partial(self._asked, client)
        self.commands.start_call(call, Context(client, owner=client.connection), decided)

    def _asked(self, client: Client, value: Any, error: RequestError | None) -> None:
        """Its connect handler has ended."""
        if client in self.deciding:
            self.deciding.discard(client)
        else:  # it has left meanwhile
            self.leaving -= 1
        self._decided(client, value, error)

    def _decided(self, client: Client, value: Any, error: RequestError | None) -> None:
        client.connection.release(HOLD_CONNECT)
        if not client.is_present:
            return  # it has left meanwhile
        if error is not None:
            self.log_gate.info(
                "clients that were not let in",
                lambda: f"{client.connection.who} was not let in by the connect handler",
            )
            return client.refuse(encodable(explain(error)))
        self.flush_broadcasts()  # to the others: this one gets them from the history
        since, missed = client.since, None
        if since is not None and not self._is_ahead(since):
            missed = self.history.since(since)
        if missed is not None and replay_bytes(missed) > REPLAY_AT_ONCE_BYTES:
            client.connection.hold(HOLD_CONNECT)
            self.entering.spawn(self._replay(client, missed), f"replay for {client.id}")
        else:
            self._enter(client, missed)

    async def _replay(self, client: Client, missed: list[Entry]) -> None:
        """Send a long replay as its client reads it; it is live when it has caught up.

        Until then it is not read: an answer would tell an offset that it has not come to.
        """
        longest_s = self.config.raw_ping_interval_s + self.config.ping_timeout_s
        left: list[Entry] | None = missed
        while client.is_present and left and replay_bytes(left) > REPLAY_AT_ONCE_BYTES:
            for entry in self.missed_by(client, left):
                client.send_missed(entry)
                await client.connection.written_within(longest_s)
                if not client.is_present:
                    break
            self.flush_broadcasts()
            left = self.history.since(left[-1].offset)
        self._enter(client, left)

    def _enter(self, client: Client, missed: list[Entry] | None) -> None:
        """It is live from now on, unless it has left."""
        client.connection.release(HOLD_CONNECT)
        if not client.is_present:
            return
        self._add(client)
        client.welcome(None if missed is None else self.missed_by(client, missed))
        if missed is not None and self.backplane is not None:
            # Status is not in the shared history: a client that returns gets it.
            self.send_status(client)

    def replay_group(self, client: Client, group: str, since: str) -> None:
        """Send what was broadcast to one group after an offset."""
        entries = self.history.since(since)
        if entries is None:
            return client.deliver(HISTORY_GAP, None)
        entries = [each for each in entries if each.group == group]
        if client.connection.is_writable:  # else it asks for more than it reads
            client.connection.allow(replay_bytes(entries))
        for entry in entries:
            client.send_missed(entry)

    def is_in(self, client: Client) -> bool:
        """Was it let in, and has not left?"""
        return self._members(client).get(client.id) is client

    def _members(self, client: Client) -> dict[str, Any]:
        if client.door == "socket.io":
            return self.sockets[client.namespace]
        return self.raw if client.door == "raw" else {}

    def _add(self, client: Client) -> None:
        members = self._members(client)
        before: Client | None = members.get(client.id)
        if before is not None:  # its own connection, which we did not know to be dead: it leaves
            before.connection.close(
                CloseCode.POLICY_VIOLATION, "the client came back by another connection"
            )
            self._parted.pop((client.namespace, client.id), None)  # this one has it already
        members[client.id] = client
        for group in client.groups:
            self.groups.setdefault(group, set()).add(client)
        came(client)

    def leave(self, client: Client, reason: str) -> None:
        """A client is gone; its disconnect handler runs if it was let in at all."""
        client.cancel_calls()
        if reason == "transport close" and client.door == "socket.io":
            self._keep_state(client)
        if client.groups:
            self.leave_groups(client, client.groups)
        if client in self.deciding:  # who comes and goes in turn starts no handlers without end
            self.deciding.discard(client)
            self.leaving += 1
        if not self.is_in(client):
            return
        del self._members(client)[client.id]
        went(client, reason)
        handler = self.handlers.get("disconnect")
        if handler is not None:
            self.leaving += 1
            client.connection.count_leaving(1)
            call = Call(handler, [client, reason], {})
            left = functools.partial(self._left, client)
            self.commands.start_call(call, Context(client, owner=client.connection), left)

    def _left(self, client: Client, value: Any, error: RequestError | None) -> None:
        self.leaving -= 1
        client.connection.count_leaving(-1)
