"""What a running command may ask for: its client, and a way to report progress.

Uses errors; command recognises it in signatures, services begin and end it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from karna.errors import CommandFailed


class Context:
    """What a command may ask for: its client, and a way to report progress.

    A parameter annotated `Context` receives it; it is not part of the usage. `send_progress` may
    return an awaitable: a client slow to read slows its command. Once the command has ended, both
    ways of reporting raise CommandFailed, which ends a handler that ignored its cancellation and
    a thread that cannot be cancelled at all.
    """

    __slots__ = ("_ended", "_loop", "_loop_thread", "_report", "_send", "client",
                 "owner")  # fmt: skip

    def __init__(
        self,
        client: Any = None,
        send_progress: Callable[[Any], Awaitable[None] | None] | None = None,
        *,
        owner: Any = None,
    ) -> None:
        self.client = client
        self.owner = client if owner is None else owner  # whose share of the threads it takes
        self._send = send_progress
        self._ended = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread = 0
        self._report: Any = None  # the future a thread waits for in report()

    async def progress(self, value: Any) -> None:
        """Report from an `async def` command; waits while the client is slow to read.

        In a loop it lets others have their turn, and the command's time limit come.
        """
        if self._ended:
            raise CommandFailed("the command has ended")
        waiting = None if self._send is None else self._send(value)
        await (asyncio.sleep(0) if waiting is None else waiting)

    def report(self, value: Any) -> None:
        """Report from a plain `def` command, in its thread; blocks until the value is taken."""
        if self._ended or self._loop is None:
            raise CommandFailed("the command has ended")
        if threading.get_ident() == self._loop_thread:
            raise RuntimeError("report() is for threads: use `await context.progress(...)` here")
        progress = self.progress(value)
        try:
            self._report = asyncio.run_coroutine_threadsafe(progress, self._loop)
        except RuntimeError:  # the loop was closed meanwhile
            progress.close()
            raise CommandFailed("the command has ended") from None
        if self._ended:  # between the first look and the assignment
            self._report.cancel()
        try:
            self._report.result()
        except concurrent.futures.CancelledError:
            raise CommandFailed("the command has ended") from None

    def begin(self) -> None:
        """Called when the command starts, on the loop that runs it."""
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()

    def end(self) -> None:
        """Called when the command has its outcome: nothing may be reported after it."""
        self._ended = True
        if self._report is not None:
            self._report.cancel()
