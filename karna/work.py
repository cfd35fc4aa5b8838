"""Work that has an owner: tasks, jobs with a time limit and one outcome, and threads.

Nothing here ends unnoticed, and whatever must end does so in bounded time. Uses errors, log and
text; used by service, models and backplane, by services, and by the hub for every other task.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import sys
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from karna.errors import NO_BUGS, CommandFailed, RequestError, Unavailable, as_request_error
from karna.errors import explain
from karna.log import LogGate, describe_error, log
from karna.text import one_line

CANCEL_WAIT_S = 4.0  # cancelled work may clean up this long, then it is left behind
IDLE_THREAD_S = 10.0  # a thread with nothing to do ends after this

Value = TypeVar("Value")


class RaisedInThread(CommandFailed):
    """What work in a thread raised, as its caller is told; `__cause__` is the error itself."""


def failure_of(
    who: str, error: BaseException, log_gate: LogGate, expected: tuple[type[Exception], ...] = ()
) -> RequestError:
    """What the caller of `who` is told of `error`; a bug is logged.

    expected: what `who` may raise besides, as its way to say no.
    """
    fault = error.__cause__ if isinstance(error, RaisedInThread) else error
    if fault is not None and not isinstance(fault, (*NO_BUGS, *expected)):
        log_gate.error(f"{who} failed", fault)
    return as_request_error(error)


Work = Callable[[], Awaitable[Any]]
Outcome = tuple[Any, BaseException | None]  # what work returned, or what it raised


async def _contain(work: Work) -> Outcome:
    """Do the work; what it raises is a result, for a task that raises SystemExit ends the loop."""
    try:
        return await work(), None
    except BaseException as error:
        return None, error


class Job:
    """One piece of work in one task: a time limit, and exactly one outcome in bounded time.

    Once `is_over`, `error` is None where the work succeeded and `value` is what it returned.
    When `is_cancelled` (by `cancel`) or `is_late` (past its time limit), whatever the work did
    about that is not looked at. Made by Tasks.start.
    """

    __slots__ = ("_limit", "_on_end", "_tasks", "_timer", "_waiting", "error", "is_cancelled",
                 "is_late", "is_over", "task", "timeout_s", "value")  # fmt: skip
    task: asyncio.Task[Outcome]

    def __init__(
        self, tasks: Tasks, timeout_s: float | None, on_end: Callable[[Job], None] | None
    ) -> None:
        self._tasks = tasks
        self._on_end = on_end
        self._waiting: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.timeout_s = timeout_s
        self.value: Any = None
        self.error: BaseException | None = None
        self.is_cancelled = self.is_late = self.is_over = False
        self._limit = None if timeout_s is None else tasks.limit_of(timeout_s)
        if self._limit is not None:
            self._limit.begin(self)

    def cancel(self) -> None:
        """End it: at once, or after CANCEL_WAIT_S when it ignores that. Too late is no error."""
        if not (self.task.done() or self.is_over or self.is_late or self.is_cancelled):
            self.is_cancelled = True
            self._interrupt()

    def expire(self) -> None:
        """Its time is over."""
        if not self.task.done():
            self.is_late = True
            self._interrupt()

    def _interrupt(self) -> None:
        self.task.cancel()
        if self._limit is not None:
            self._limit.end(self)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(CANCEL_WAIT_S, self._tasks.leave, self.task)

    async def wait(self) -> None:
        """Wait until it is over; when this is cancelled the job is, too, and ends first.

        One may wait for a job, no more.
        """
        try:
            await self._over()
        except asyncio.CancelledError:
            self.cancel()
            await self._over()
            raise

    async def _over(self) -> None:
        if not self.is_over:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting

    def conclude(self) -> None:
        """Called by its owner, once: the task has ended, or is left behind."""
        if self._limit is not None:
            self._limit.end(self)
        if self._timer is not None:
            self._timer.cancel()
        task = self.task
        if self.is_late:
            self.error = TimeoutError()
        elif self.is_cancelled or not task.done() or task.cancelled():
            self.error = asyncio.CancelledError()
        else:
            self.value, self.error = task.result()
        self.is_over = True
        on_end, self._on_end = self._on_end, None
        try:
            if on_end is not None:
                on_end(self)
        finally:
            if self._waiting is not None and not self._waiting.done():
                self._waiting.set_result(None)


class Limit:
    """The jobs that may take so long, by one timer: most end long before, and have not cost one."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._until: dict[Job, float] = {}  # the first to expire first
        self._loop: asyncio.AbstractEventLoop | None = None  # that will look at them

    def begin(self, job: Job) -> None:
        """Its time runs from now on."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self.timeout_s
        if self._loop is not loop:
            self._loop = loop
            self._until.clear()  # those of a loop that is closed can't be ended any more
            loop.call_at(until, self._look, loop)
        self._until[job] = until

    def end(self, job: Job) -> None:
        """It has ended, or is being ended."""
        self._until.pop(job, None)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            while self._until and (first := next(iter(self._until.items())))[1] <= loop.time():
                del self._until[first[0]]
                first[0].expire()
        finally:  # whatever became of one, the others have their limit
            if self._until:
                loop.call_at(next(iter(self._until.values())), self._look, loop)
            else:
                self._loop = None


class Tasks:
    """Tasks and jobs of one owner: each can be ended in bounded time, and none ends unnoticed.

    on_error: told the name and the error of a task that failed; by default that is logged. A
    RequestError is none: it has been somebody's answer.
    """

    def __init__(self, on_error: Callable[[str, BaseException], None] | None = None) -> None:
        self._on_error = on_error or _log_error
        self._running: dict[asyncio.Task[Any], Job | None] = {}
        self._left: set[asyncio.Task[Any]] = set()  # ignored their cancellation
        self._idle: asyncio.Event | None = None  # somebody waits for it
        self._limits: dict[float, Limit] = {}

    @property
    def running(self) -> tuple[asyncio.Task[Any], ...]:
        """The tasks that run now, without those left behind."""
        return tuple(self._running)

    def spawn(self, work: Coroutine[Any, Any, Value], name: str) -> asyncio.Task[Value]:
        """Run `work` in a task; from Python 3.12 on, at once to its first wait."""
        task = _make_task(work, name)
        self._own(task, None)
        return task

    def start(
        self,
        work: Work,
        name: str,
        timeout_s: float | None = None,
        on_end: Callable[[Job], None] | None = None,
    ) -> Job:
        """Call and await `work` as a Job; `on_end` is called once, by the loop, never from here."""
        job = Job(self, timeout_s, on_end)
        try:
            job.task = _make_task(_contain(work), name)
            self._own(job.task, job)
            return job
        finally:
            del job  # from Python 3.12 on it may have failed already, and its traceback has us

    def limit_of(self, timeout_s: float) -> Limit:
        """What jobs with this time limit share."""
        limit = self._limits.get(timeout_s)
        if limit is None:
            limit = self._limits[timeout_s] = Limit(timeout_s)
        return limit

    def _own(self, task: asyncio.Task[Any], job: Job | None) -> None:
        self._running[task] = job
        task.add_done_callback(self._ended)  # by the loop, should it have ended already

    def _ended(self, task: asyncio.Task[Any]) -> None:
        if self._left and task in self._left:
            self._left.discard(task)
            error = _error_of(task)
            outcome = f": {one_line(explain(error))}" if error else ""
            log.info("%s has ended after all%s", task.get_name(), outcome)
        else:
            self._conclude(task)

    def leave(self, task: asyncio.Task[Any]) -> None:
        """Give up waiting for a task that ignores its cancellation; it stays owned."""
        if task in self._running and not task.done():
            log.warning("%s ignores its cancellation, left behind", task.get_name())
            self._left.add(task)
            self._conclude(task)

    def _conclude(self, task: asyncio.Task[Any]) -> None:
        job = self._running[task]
        try:
            if job is not None:
                job.conclude()  # what waited for it may begin now: we are not idle in between
            elif task.done():
                self._report(task)
        except Exception as error:  # of on_end: ours, and it must not stop what follows
            self._on_error(f"the end of {task.get_name()}", error)
        finally:
            del self._running[task]
            if not self._running and self._idle is not None:
                self._idle.set()
                self._idle = None

    def _report(self, task: asyncio.Task[Any]) -> None:
        error = _error_of(task)  # looked at: asyncio is content
        if error is not None and not isinstance(error, RequestError):
            self._on_error(task.get_name(), error)

    async def wait(self, timeout_s: float) -> bool:
        """Wait until nothing runs, what begins meanwhile included; False when time is over."""
        if self._running:
            self._idle = self._idle or asyncio.Event()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._idle.wait()
        return not self._running

    async def end(self, *tasks: asyncio.Task[Any]) -> None:
        """Cancel tasks and wait a bounded time; one that ignores it is left behind, still owned."""
        for task in tasks:
            task.cancel()
        try:
            if tasks:
                await asyncio.wait(tasks, timeout=CANCEL_WAIT_S)
        finally:
            for task in tasks:
                self.leave(task)

    async def end_all(self) -> None:
        """`end` everything that runs now."""
        await self.end(*self._running)


_EAGER: dict[str, Any] = {"eager_start": True} if sys.version_info >= (3, 12) else {}


def _make_task(work: Coroutine[Any, Any, Value], name: str) -> asyncio.Task[Value]:
    return asyncio.Task(work, loop=asyncio.get_running_loop(), name=name, **_EAGER)


def _error_of(task: asyncio.Task[Any]) -> BaseException | None:
    """What a task, or the work of a job, raised; a cancellation is no error."""
    if task.cancelled():
        return None
    error = task.exception()
    if error is None and isinstance(outcome := task.result(), tuple):
        error = outcome[-1]  # of a job
    is_failure = isinstance(error, BaseException) and not isinstance(error, asyncio.CancelledError)
    return error if is_failure else None


def _log_error(name: str, error: BaseException) -> None:
    log.error("%s failed: %s\n%s", name, type(error).__name__, describe_error(error))


OWNER_SHARE = 4  # an owner gets at most max_threads through this


class _Errand:
    """Work for a thread, and who hears of its end."""

    def __init__(self, owner: object, future: asyncio.Future[Any], work: Callable[[], Any]) -> None:
        self.owner = owner
        self.future = future
        self.work = work

    def settle(self, value: Any, error: BaseException | None) -> None:
        """Tell who waits, if anybody still does; on the loop."""
        if not self.future.done():
            self.future.set_result(value) if error is None else self.future.set_exception(error)


class _Share:
    """What one owner has of the threads: how much, and what waits for its others to end."""

    def __init__(self) -> None:
        self.held = 0
        self.waiting: deque[_Errand] = deque()


def _outcome_of(work: Callable[[], Any]) -> Outcome:
    """Do the work; what it raises, SystemExit too, ends neither thread nor process."""
    try:
        return work(), None
    except BaseException as error:
        return None, _raised_in_thread(error)


def _raised_in_thread(error: BaseException) -> RequestError:
    if isinstance(error, RequestError):
        return error
    failure = RaisedInThread(explain(error))
    failure.__cause__ = error
    return failure


class ThreadPool:
    """At most `max_threads` daemon threads, started on demand and used again.

    No owner can hold them all: what is past its share waits, and keeps nobody else from starting.
    Work that goes on after its cancellation takes from the share until it ends by itself. Four
    owners that do that to their whole shares leave no thread: others' work waits, and its time
    limit goes on.
    Unlike those of concurrent.futures the threads never hold the exit of the process. Work that
    waits has no bound of its own: each client's running commands have one.
    """

    def __init__(self, max_threads: int, name: str) -> None:
        self.max_threads = max_threads
        self._name = name
        self._waiting: deque[_Errand] = deque()  # for a thread
        self._shares: dict[int, _Share] = {}  # by id: an owner need not be hashable
        # What has ended and is not told yet: each time a thread wakes the loop both want the GIL.
        self._ended: dict[asyncio.AbstractEventLoop, list[tuple[_Errand, Outcome]]] = {}
        self._news = threading.Condition()
        self._threads = self._idle = 0
        self._is_closed = False

    async def call(self, work: Callable[[], Value], owner: object = None) -> Value:
        """Run `work` in a thread with this task's context variables; raises only RequestErrors.

        owner: whose share it takes from; there is no bound for None.
        When the caller is cancelled, work that has not begun never begins; work that has keeps
        its thread, and its place in the share, until it ends by itself.
        """
        future: asyncio.Future[Value] = asyncio.get_running_loop().create_future()
        run = functools.partial(contextvars.copy_context().run, work)
        errand = _Errand(owner, future, run)
        with self._news:
            if self._is_closed:
                raise Unavailable("the server is stopping")
            self._submit(errand)
        try:
            return await future
        except asyncio.CancelledError:
            with self._news:
                self._take_back(errand)
            raise
        finally:
            del future, run, errand  # an error of theirs has this frame in its traceback

    def _submit(self, errand: _Errand) -> None:
        share = self._shares.get(id(errand.owner))
        most = max(self.max_threads // OWNER_SHARE, 1)
        if share is not None and share.held >= most and errand.owner is not None:
            share.waiting.append(errand)
            return
        if self._idle <= len(self._waiting) and self._threads < self.max_threads:
            self._start_thread()
        self._queue(errand)

    def _queue(self, errand: _Errand) -> None:
        self._shares.setdefault(id(errand.owner), _Share()).held += 1
        self._waiting.append(errand)
        self._news.notify()

    def _take_back(self, errand: _Errand) -> None:
        """Forget work that has not begun."""
        with contextlib.suppress(ValueError):  # it waits in one of both, or a thread has it
            self._waiting.remove(errand)
            return self._let_go(errand)
        share = self._shares.get(id(errand.owner))
        if share is not None:
            with contextlib.suppress(ValueError):
                share.waiting.remove(errand)
        return None

    def _let_go(self, errand: _Errand) -> None:
        """Its owner holds one less, which the next of its own may have."""
        share = self._shares[id(errand.owner)]
        share.held -= 1
        if share.waiting:
            self._queue(share.waiting.popleft())
        elif not share.held:
            del self._shares[id(errand.owner)]

    def _start_thread(self) -> None:
        name = f"{self._name}-{self._threads + 1}"
        try:
            threading.Thread(target=self._run, name=name, daemon=True).start()
        except RuntimeError:  # the system has no more of them
            raise Unavailable("no thread can be started") from None
        self._threads += 1

    def _run(self) -> None:
        while self._does_next():
            pass

    def _does_next(self) -> bool:
        """Do what waits longest; False when nothing came for long, which ends the thread."""
        errand = self._next()
        if errand is None:
            return False
        outcome = (None, None) if errand.future.cancelled() else _outcome_of(errand.work)
        loop = errand.future.get_loop()
        with self._news:
            self._let_go(errand)
            is_awake = loop in self._ended and not loop.is_closed()
            self._ended.setdefault(loop, []).append((errand, outcome))
        if not is_awake:
            try:
                loop.call_soon_threadsafe(self._tell, loop)
            except RuntimeError:  # it was closed: nobody waits
                del self._ended[loop]
        del errand, outcome  # the same
        return True

    def _tell(self, loop: asyncio.AbstractEventLoop) -> None:
        """Called by the loop: settle what has ended since it was woken."""
        with self._news:
            ended = self._ended.pop(loop)
        for errand, outcome in ended:
            errand.settle(*outcome)

    def _next(self) -> _Errand | None:
        with self._news:
            self._idle += 1
            self._news.wait_for(lambda: self._waiting or self._is_closed, timeout=IDLE_THREAD_S)
            self._idle -= 1
            if self._waiting and not self._is_closed:
                return self._waiting.popleft()
            self._threads -= 1
            return None

    def open(self) -> None:
        """Take work, again after `close`."""
        self._is_closed = False

    def close(self) -> None:
        """Let idle threads end and take no more work; busy threads are abandoned."""
        with self._news:
            self._is_closed = True
            for share in self._shares.values():
                share.waiting.clear()
            while self._waiting:
                self._let_go(self._waiting.popleft())
            self._news.notify_all()
