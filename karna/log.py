"""What reaches the operator's log, and how much of it: a flood must not fill a disk.

Imports nothing of ours; used by the hub for all sockets, and by the backplane.
"""

from __future__ import annotations

import logging

log = logging.getLogger("karna_ws")


class LogGate:
    """Lets the first lines of each kind through and counts the rest."""

    BURST = 5  # lines of one kind...
    WINDOW_S = 10.0  # ...in this time
    MAX_KINDS = 50  # a peer can make up kinds, such as origins; the rest are one kind together

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._until = 0.0

    def admits(self, kind: str) -> bool:
        """May a line of this kind be logged now?"""
        if kind not in self._counts and len(self._counts) >= self.MAX_KINDS:
            kind = "other lines"
        count = self._counts[kind] = self._counts.get(kind, 0) + 1
        return count <= self.BURST

    def turn(self, now: float) -> None:
        """Called now and then: a new window begins, and the old one's silence is summed up."""
        if now >= self._until:
            for kind, count in self._counts.items():
                if count > self.BURST:
                    log.warning("%s: %d more in %.0f s", kind, count - self.BURST, self.WINDOW_S)
            self._counts.clear()
            self._until = now + self.WINDOW_S
