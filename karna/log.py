"""What reaches the operator's log: bounded, and safe to print whatever a client chose.

Imports `text` alone; used by the hub for all sockets, and by whoever logs what a peer can cause.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Callable

from karna.text import one_line, printable

log = logging.getLogger("karna_ws")
library_log = logging.getLogger("karna_ws.websockets")
library_log.setLevel(logging.ERROR)  # it would log each connection twice

MAX_TRACEBACK_LINES = 60  # of an error; the deepest calls say most
MAX_FAULTS = 200  # places in the code whose errors are told apart; the others are one
REMEMBER_S = 600.0  # after its last error a place is forgotten, and its next one shown in full
COMINGS = 20  # lines about clients that come, and about those that go, in a window of the gate

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_LIBRARIES = (
    os.path.dirname(os.__file__),
    *(os.path.join(_ROOT, name) for name in ("karna" + os.sep, "karna_ws.py", "services.py")),
)


class _Fault:
    """A place in the code whose error was shown; further ones are counted."""

    def __init__(self, what: str, window_s: float, now: float) -> None:
        self.what = what
        self.window_s = window_s
        self.until = now + window_s  # the end of the window in which they are counted
        self.seen = now
        self.count = 0


class LogGate:
    """Lets the first lines of each kind through and counts the rest: a flood can't fill a disk."""

    BURST = 5  # lines of one kind...
    WINDOW_S = 10.0  # ...in this time; for an error that goes on it doubles, up to REMEMBER_S

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._silenced: dict[tuple[str, int], int] = {}  # lines, by kind and level
        self._faults: dict[object, _Fault] = {}
        self._now = self._until = 0.0

    def warning(self, kind: str, text: str, *values: object) -> None:
        """Log one line. `kind` is ours, never a peer's: invented ones would silence real ones."""
        if self.admits(kind):
            log.warning(text, *(one_line(str(value), 400) for value in values))

    def info(self, kind: str, describe: Callable[[], str]) -> None:
        """Log one line about what is well, such as a client that comes; made if it is logged."""
        if log.isEnabledFor(logging.INFO) and self.admits(kind, COMINGS, logging.INFO):
            log.info("%s", one_line(describe(), 400))

    def error(self, what: str, exc: BaseException) -> None:
        """Log an error of a program's code, or of ours.

        The first of a place in the code is shown with its traceback, those that follow are
        counted: the count comes after each window.
        """
        name = type(exc).__name__
        kind: object = (name, *_places(exc))
        if kind not in self._faults and len(self._faults) >= MAX_FAULTS:
            kind = "others"
        fault = self._faults.get(kind)
        if fault is not None:
            fault.count += 1
            fault.seen = self._now
            return
        shown = f"{one_line(what)}: {name}"
        self._faults[kind] = _Fault(shown, self.WINDOW_S, self._now)
        log.error("%s\n%s", shown, describe_error(exc))

    def admits(self, kind: str, burst: int = BURST, level: int = logging.WARNING) -> bool:
        """May a line of this kind be logged now?"""
        count = self._counts[kind] = self._counts.get(kind, 0) + 1
        if count <= burst:
            return True
        self._silenced[kind, level] = count - burst
        return False

    def turn(self, now: float) -> None:
        """Called now and then: a new window begins, and the old one's silence is summed up."""
        self._now = now
        for kind, fault in tuple(self._faults.items()):
            if now >= fault.until:
                self._turn_fault(kind, fault)
        if now >= self._until:
            self._sum_up()
            self._until = now + self.WINDOW_S

    def _turn_fault(self, kind: object, fault: _Fault) -> None:
        if fault.count:
            log.error("%s: %d more in %.0f s", fault.what, fault.count, fault.window_s)
            fault.count = 0
            fault.window_s = min(fault.window_s * 2, REMEMBER_S)
        elif self._now - fault.seen >= REMEMBER_S:
            del self._faults[kind]
        fault.until = self._now + fault.window_s

    def _sum_up(self) -> None:
        for (kind, level), count in self._silenced.items():
            log.log(level, "%s: %d more in %.0f s", kind, count, self.WINDOW_S)
        self._counts.clear()
        self._silenced.clear()

    def finish(self) -> None:
        """The server ends: sum up what was not yet."""
        self._sum_up()
        for fault in self._faults.values():
            if fault.count:
                log.error("%s: %d more", fault.what, fault.count)
        self._faults.clear()


def _places(exc: BaseException) -> tuple[object, ...]:
    """Where an error came from: the program's outermost and deepest lines, and the deepest of all.

    Three lines, and not each: how deep a function calls itself, a client may choose.
    """
    frames = [(frame.f_code.co_filename, line)
              for frame, line in traceback.walk_tb(exc.__traceback__)]  # fmt: skip
    own = [place for place in frames if not _is_library(place[0])] or frames
    return (own[0], own[-1], frames[-1]) if frames else ()


def _is_library(file: str) -> bool:
    """Is it ours, or a library's, and so called from many places?"""
    return "site-packages" in file or os.path.abspath(file).startswith(_LIBRARIES)


def describe_error(exc: BaseException) -> str:
    """A traceback of printable, indented lines: its text can't forge a line of the log."""
    try:
        lines = "".join(traceback.format_exception(exc)).splitlines()
    except BaseException:  # it looks at the error's attributes, and those of what it is about
        return "  | its traceback can't be shown"
    if len(lines) > MAX_TRACEBACK_LINES:
        lines = [*lines[:5], "...", *lines[5 - MAX_TRACEBACK_LINES :]]
    return "\n".join(f"  | {printable(line)}" for line in lines)
