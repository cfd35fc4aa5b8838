"""The status object of all services, encoded once for all who ask.

Touches the services it is given; owned by the manager.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

from karna.envelopes import encode_json
from karna.service import Service


class Counting(Protocol):
    """What runs commands: it counts them, and does not say so each time."""

    done: int
    failed: int
    running: int


class StatusBoard:
    """What services say of themselves, kept until one of them changes.

    makers: those `get_status` that change only when `touch` is called, or with the counts of
    `commands`. A status that others make up may change at any time: it is never kept.
    """

    def __init__(
        self, services: Mapping[str, Service], commands: Counting,
        makers: Collection[Callable[..., dict[str, Any]]],
    ) -> None:  # fmt: skip
        self._services = services
        self._commands = commands
        self._is_stable = all(type(each).get_status in makers for each in services.values())
        self._json: bytes | None = None
        self._answer: bytes | None = None
        self._counts: object = None  # those that both were made at

    def touch(self) -> None:
        """A service answers differently now."""
        self._json = self._answer = None

    def forget_answer(self) -> None:
        """The offset that answers are current as of has changed."""
        self._answer = None

    def status(self) -> dict[str, Any]:
        """The status object: one entry for each service."""
        return {name: service.get_status() for name, service in self._services.items()}

    def _counted(self) -> tuple[int, int, int]:
        commands = self._commands
        return commands.done, commands.failed, commands.running

    def encode(self) -> bytes:
        """The status object as JSON."""
        if self._json is None or self._counts != self._counted():
            self._counts = self._counted() if self._is_stable else None
            self._json = encode_json(self.status())
            self._answer = None  # made from the one before
        return self._json

    def encode_answer(self, offset: str, node: str | None) -> bytes:
        """The answer to `get_status` up to its id."""
        if self._answer is None or self._counts != self._counted():
            answer = b'{"type":"status_update","data":%b,"offset":"%b"' % (
                self.encode(), offset.encode()
            )  # fmt: skip
            if node is not None:
                answer += b',"node":"%b"' % node.encode()
            self._answer = answer
        return self._answer
