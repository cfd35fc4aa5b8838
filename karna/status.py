"""The status object of all services, encoded once for all who ask.

Touches the services it is given; owned by the manager.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

from karna.envelopes import encode_json
from karna.service import Service


class Counting(Protocol):
    """What runs inline commands: it counts them, and does not say so each time."""

    done: int


class StatusBoard:
    """What services say of themselves, kept until one of them changes.

    makers: those `get_status` that change only when `touch` is called, or with `commands.done`. A
    status that others make up may change at any time: it is never kept.
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
        self._done = -1  # the count of inline commands that both were made at

    def touch(self) -> None:
        """A service answers differently now."""
        self._json = self._answer = None

    def forget_answer(self) -> None:
        """The offset that answers are current as of has changed."""
        self._answer = None

    def status(self) -> dict[str, Any]:
        """The status object: one entry for each service."""
        return {name: service.get_status() for name, service in self._services.items()}

    def encode(self) -> bytes:
        """The status object as JSON."""
        if self._json is None or self._done != self._commands.done:
            self._done = self._commands.done if self._is_stable else -1
            self._json = encode_json(self.status())
            self._answer = None  # made from the one before
        return self._json

    def encode_answer(self, offset: str, node: str | None) -> bytes:
        """The answer to `get_status` up to its id."""
        if self._answer is None or self._done != self._commands.done:
            answer = b'{"type":"status_update","data":%b,"offset":"%b"' % (
                self.encode(), offset.encode()
            )  # fmt: skip
            if node is not None:
                answer += b',"node":"%b"' % node.encode()
            self._answer = answer
        return self._answer
