"""What reaches the operator's log: bounded, and safe to print whatever a client chose.

Imports `text` alone; used by the hub for all sockets, and by whoever logs what a peer can cause.
"""

from __future__ import annotations

import logging
import traceback

from karna.text import one_line, printable

log = logging.getLogger("karna_ws")

MAX_TRACEBACK_LINES = 60  # of an error; the deepest calls say most


class LogGate:
    """Lets the first lines of each kind through and counts the rest: a flood can't fill a disk."""

    BURST = 5  # lines of one kind...
    WINDOW_S = 10.0  # ...in this time

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._until = 0.0

    def warning(self, kind: str, text: str, *values: object) -> None:
        """Log one line. `kind` is ours, never a peer's: invented ones would silence real ones."""
        if self.admits(kind):
            log.warning(text, *(one_line(str(value), 400) for value in values))

    def error(self, what: str, exc: BaseException) -> None:
        """Log an error of a program's code, or of ours, with its traceback."""
        if self.admits(f"error, {type(exc).__name__}"):
            log.error("%s: %s\n%s", one_line(what), type(exc).__name__, describe_error(exc))

    def admits(self, kind: str) -> bool:
        """May a line of this kind be logged now?"""
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


def describe_error(exc: BaseException) -> str:
    """A traceback of printable, indented lines: its text can't forge a line of the log."""
    try:
        lines = "".join(traceback.format_exception(exc)).splitlines()
    except BaseException:  # it looks at the error's attributes, and those of what it is about
        return "  | its traceback can't be shown"
    if len(lines) > MAX_TRACEBACK_LINES:
        lines = [*lines[:5], "...", *lines[5 - MAX_TRACEBACK_LINES :]]
    return "\n".join(f"  | {printable(line)}" for line in lines)
