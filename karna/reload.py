"""`--reload`: a parent that holds the port, and a child that serves and is begun anew.

The parent binds, hands the socket on and starts itself again as its child; it never serves. When
a file of the program changes the child is asked to stop, as at any shutdown, so that clients are
closed with 1012; the next one takes over the same socket. Who connects in between waits in its
backlog, also while a mistake in the file is shown. A child that does not end is killed.

Between the two is one socket: the child says by it that it serves; where it is cut the child stops,
also when its parent was killed. Touches signals, processes and the log; used by the top.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from karna.config import Config
from karna.errors import StartError
from karna.listen import PASSED_SOCKET, bind_socket, inherited_socket, unlink_socket
from karna.log import log
from karna.watch import Watch

POLL_S = 0.3  # between two looks at the files: one edit, one reload, soon enough for a person
MAX_SHARE = 10  # of the time: a look that takes long is followed by a longer pause
GRACE_S = 1.0  # for running commands; a person waits for each reload
KILL_AFTER_S = 2.0  # longer than that grace a child has to close its clients and end
LAST_WORD_S = 0.3  # for a child that was told for the last time, to take its programs with it

CONTROL = "_KARNA_CONTROL_FD"  # the child's end of the socket between both, by number
FIRST, AGAIN, SERVES = b"1", b"2", b"s"


class Parent:
    """What a child knows of its parent."""

    def __init__(self, control: socket.socket) -> None:
        control.setblocking(False)
        control.set_inheritable(False)
        self._control = control
        with suppress(OSError):
            self.is_first = control.recv(1) != AGAIN  # no child has served before

    def obey(self, stop: Callable[[], Any]) -> None:
        """Say that we serve; from now on stop when the parent wants it, or is no more."""
        loop = asyncio.get_running_loop()
        with suppress(OSError):
            self._control.send(SERVES)

        def heard() -> None:
            loop.remove_reader(self._control)
            stop()

        loop.add_reader(self._control, heard)


def find_parent() -> Parent | None:
    """The parent of this process, if it is such a child."""
    number = os.environ.pop(CONTROL, None)
    if number is None:
        return None
    # Compiled files are told apart by seconds and sizes: too coarse for who edits and reloads.
    sys.dont_write_bytecode = True
    return Parent(socket.socket(fileno=int(number)))


def supervise(program: str | None, config: Config) -> int:
    """Serve the program by children until a signal comes; the exit code. Raises StartError."""
    if os.name == "nt":
        raise StartError("--reload needs Linux, macOS or another Unix")
    if program is None:
        raise StartError("--reload needs a program: karna_ws.py PROGRAM.py --reload")
    path = Path(program).resolve()
    try:
        path.open("rb").close()
    except OSError as error:
        raise StartError(f"can't read the program {path}: {error.strerror}") from None
    inherited = inherited_socket()
    listening = inherited or bind_socket(config)
    try:
        return Supervisor(path, listening, min(config.grace_s, GRACE_S)).run()
    finally:
        if inherited is None and config.unix is not None:
            unlink_socket(listening)
        listening.close()


class Child:
    """A process that serves, as this one was started, with the listening socket."""

    def __init__(self, listening: socket.socket, *, is_first: bool) -> None:
        self._control, theirs = socket.socketpair()
        self._control.setblocking(False)
        self._control.send(FIRST if is_first else AGAIN)
        numbers = listening.fileno(), theirs.fileno()
        passed = {PASSED_SOCKET: str(numbers[0]), CONTROL: str(numbers[1])}
        self.process = subprocess.Popen(
            [sys.executable, *sys.orig_argv[1:]], env={**os.environ, **passed}, pass_fds=numbers
        )
        theirs.close()
        self._has_served = False

    @property
    def has_served(self) -> bool:
        """Has it ever?"""
        with suppress(OSError):
            self._has_served = self._has_served or self._control.recv(1) == SERVES
        return self._has_served

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def ask(self) -> None:
        """Let it end in good order; where it has not come to serve, there is none to keep."""
        if self.has_served:
            with suppress(OSError):
                self._control.shutdown(socket.SHUT_WR)
        else:
            self.process.terminate()

    def close(self) -> None:
        self._control.close()


class Supervisor:
    """Runs children, one after another, until the first signal."""

    def __init__(self, program: Path, listening: socket.socket, grace_s: float) -> None:
        self._watch = Watch(program)
        self._listening = listening
        self._grace_s = grace_s
        self._signals: list[int] = []  # those that end it
        self._is_first = True
        self._wakeup, self._waker = socket.socketpair()

    def run(self) -> int:
        """Until a signal comes; 0, or what a second signal makes of it."""
        for each in (self._wakeup, self._waker):
            each.setblocking(False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)  # the number comes by the socket
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        try:
            while not self._signals:
                self._watch.change()  # what has changed by now is what it will read
                child = Child(self._listening, is_first=self._is_first)
                try:
                    self._run(child)
                finally:
                    self._end(child)
        finally:
            signal.set_wakeup_fd(-1)
        return 0 if len(self._signals) == 1 else 128 + self._signals[1]

    def _run(self, child: Child) -> None:
        """Until the child is to be ended: by a signal, or as a file has changed."""
        is_told = False
        while not self._signals:
            began = time.monotonic()
            changed = self._watch.change()
            if changed is not None:
                return log.info("%s has changed", os.path.relpath(changed))
            self._wait(max(POLL_S, MAX_SHARE * (time.monotonic() - began)))
            if child.has_served:
                self._is_first = False
            if child.has_ended and not is_told and not self._signals:
                is_told = True
                how = _describe(child.process.returncode)
                log.warning("%s; waiting for a change of its files", how)
        return None

    def _wait(self, seconds: float) -> None:
        """Wait until a signal comes, that of a child's end included, or time is over."""
        if select.select([self._wakeup], [], [], seconds)[0]:
            numbers = self._wakeup.recv(1024)
            self._signals += [each for each in numbers if each != signal.SIGCHLD]

    def _end(self, child: Child) -> None:
        """Ask, tell it twice to end at once, as a person would, and kill it."""
        patience_s = self._grace_s + KILL_AFTER_S
        terminate, kill = child.process.terminate, child.process.kill
        ways = [(child.ask, patience_s), *2 * [(terminate, LAST_WORD_S)], (kill, patience_s)]
        for way, limit_s in ways:
            if child.has_ended:
                break
            if way == kill:
                log.warning("the server does not end: killed")
            way()
            self._wait_for(child, time.monotonic() + limit_s, is_patient=way == child.ask)
        child.close()

    def _wait_for(self, child: Child, until: float, *, is_patient: bool) -> None:
        while not child.has_ended and time.monotonic() < until:
            if is_patient and len(self._signals) > 1:
                break
            self._wait(max(0.0, until - time.monotonic()))


def _describe(code: int) -> str:
    if code == 2:  # it has said why
        return "the server can't start"
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"the server has ended with {how}"
