"""Broadcasts shared by several processes, over one Redis Stream (Valkey works, too).

The stream's order is everybody's order, and its ids are everybody's offsets. An entry whose
acceptance is unknown is not sent again: its publisher is told so, and nobody gets anything twice.
Uses errors, history (the order of offsets), log, service, text and work; made by who starts the
server with --backplane.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from karna.errors import StartError, Unavailable, explain
from karna.history import parse_offset
from karna.log import LogGate, log
from karna.service import Service, State
from karna.text import one_line, utc_now
from karna.work import Tasks

STREAM = "karna:broadcasts"
STREAM_ENTRIES = 10_000  # kept in Redis, about; far more than any node's history
PUBLISH_WAIT_S = 3.0  # for Redis to accept an entry, then the publisher gets Unavailable
READ_BLOCK_MS = 1_000  # of one XREAD; an empty answer shows that Redis is alive
REDIS_TIMEOUT_S = 2.5  # above the block: silence for so long means that Redis is away
MAX_OUTBOX = 1_000  # broadcasts that wait to be accepted; when it is full, publishers are refused
MAX_OUTBOX_BYTES = 16 * 1024 * 1024  # of them together
MAX_PIPELINE = 100  # entries in one round trip
READ_ENTRIES = 2 * MAX_PIPELINE  # in one answer: a node must not publish faster than it reads
RETRY_FIRST_S, RETRY_MAX_S = 0.25, 10.0  # between attempts to reach Redis, doubled each time

Entry = tuple[str, bytes | None]  # stream id, body; none for the mark at the stream's beginning


def _id_before(offset: str) -> str:
    milliseconds, number = parse_offset(offset)
    return f"{milliseconds}-{number - 1}" if number else f"{milliseconds - 1}-{2**64 - 1}"


class RedisBackplane(Service):
    """Shares broadcasts with other processes. It starts, fails, recovers and has a status.

    receive: called with (offset, body) for each accepted broadcast, this node's own included.
    restore: called with (offset before the first, entries) when history is loaded from Redis, at
    the start and whenever entries may have been missed: whoever is a client then has a gap.
    """

    def __init__(self, url: str) -> None:
        """Raises ImportError without the `redis` package, ValueError for a bad URL."""
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        super().__init__("backplane")
        # Without retries of its own: a lost answer to XADD must not become a second entry.
        self._redis: Any = Redis.from_url(
            url, protocol=2, retry=Retry(NoBackoff(), 0), socket_timeout=REDIS_TIMEOUT_S,
            socket_connect_timeout=REDIS_TIMEOUT_S,
        )  # fmt: skip
        pool: Any = self._redis.connection_pool
        try:
            pool.make_connection()  # without connecting: only this looks at the URL's ?options
        except TypeError:
            raise ValueError("an unknown option in the URL") from None
        where = pool.connection_kwargs
        host, port = where.get("host", "localhost"), where.get("port", 6379)
        self.address = str(where.get("path") or f"{host}:{port}")
        self.receive: Callable[[str, bytes], None] = lambda offset, body: None
        self.restore: Callable[[str, list[tuple[str, bytes]]], None] = lambda base, entries: None
        self.log_gate = LogGate()  # or the one that all share
        self.history_messages = 1_000
        self.history_bytes = 4 * 1024 * 1024
        self._last: str | None = None  # the id of the last entry seen
        self._read_entries = READ_ENTRIES  # fewer where they do not arrive in time
        self._health: tuple[State, str] = "starting", f"connecting to Redis at {self.address}"
        self._outbox: deque[tuple[bytes, asyncio.Future[None]]] = deque()
        self._outbox_bytes = 0
        self._news = asyncio.Event()
        self._tasks = Tasks()
        self._is_running = False
        self.is_loaded = asyncio.Event()  # history was loaded once

    async def start(self) -> None:
        """Begin to read and to publish; Redis may come later."""
        if not self._is_running:
            self._is_running = True
            self.set_state(*self._health)
            self._tasks.spawn(self._read_forever(), "backplane reader")
            self._tasks.spawn(self._publish_forever(), "backplane publisher")

    async def stop(self) -> None:
        self._is_running = False
        self.set_state("stopped")  # nothing enters the outbox any more
        for _, accepted in self._outbox:
            if not accepted.done():
                accepted.set_exception(Unavailable("the server stops"))
        await self._tasks.end_all()
        await self._redis.aclose()

    async def check(self) -> None:
        """Say again what the reader found: the monitor would say it too late, or for ever."""
        self.set_state(*self._health)

    # Publishing.

    def enqueue(self, body: bytes) -> asyncio.Future[None]:
        """Hand over a broadcast; the result comes when Redis has accepted it.

        Raises Unavailable when Redis is away or too much waits already.
        """
        if self.state != "running":
            raise Unavailable(f"the backplane is {self.state}: {self.detail}")
        if len(self._outbox) >= MAX_OUTBOX or self._outbox_bytes > MAX_OUTBOX_BYTES:
            raise Unavailable("too many broadcasts wait for Redis")
        accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        accepted.add_done_callback(_mark_as_seen)
        self._outbox.append((body, accepted))
        self._outbox_bytes += len(body)
        self._news.set()
        return accepted

    async def publish(self, body: bytes) -> None:
        """`enqueue`, and wait until it is accepted; raises Unavailable after a bounded time."""
        accepted = self.enqueue(body)
        try:
            await asyncio.wait_for(accepted, PUBLISH_WAIT_S)
        except TimeoutError:
            raise Unavailable("Redis did not accept the broadcast in time") from None

    async def _publish_forever(self) -> None:
        while self._is_running:  # the redis package can swallow a cancellation
            await self._news.wait()
            self._news.clear()
            while self._outbox and self._is_running:
                count = min(len(self._outbox), MAX_PIPELINE)
                taken = [self._outbox[index] for index in range(count)]
                # One whose publisher has given up is not sent: it has been told so.
                await self._publish_some([each for each in taken if not each[1].done()])
                for _ in taken:
                    self._outbox_bytes -= len(self._outbox.popleft()[0])

    async def _publish_some(self, some: list[tuple[bytes, asyncio.Future[None]]]) -> None:
        try:
            async with self._redis.pipeline(transaction=False) as pipeline:
                for body, _ in some:
                    pipeline.xadd(STREAM, {"body": body}, maxlen=STREAM_ENTRIES, approximate=True)
                results = await pipeline.execute(raise_on_error=False)
        except Exception as error:  # the redis package has many, all of them mean the same here
            results = [error] * len(some)
        failures = [result for result in results if isinstance(result, Exception)]
        if failures:
            self._complain(len(failures), failures[0])
        for (_, accepted), result in zip(some, results, strict=True):
            if accepted.done():
                continue
            if isinstance(result, Exception):
                accepted.set_exception(Unavailable(f"Redis did not accept it: {explain(result)}"))
            else:
                accepted.set_result(None)

    def _complain(self, count: int, error: Exception) -> None:
        """Log broadcasts that were not accepted; clients can cause them, so not each."""
        self.log_gate.turn(time.monotonic())
        if self.log_gate.admits("broadcasts not accepted by Redis"):
            reason = one_line(explain(error))
            log.warning("%d broadcasts not accepted by Redis: %s", count, reason)

    # Reading.

    async def _read_forever(self) -> None:
        delay_s = RETRY_FIRST_S
        while self._is_running:
            try:
                await self._read(None)
                self._found("running", f"Redis at {self.address}")
                delay_s = RETRY_FIRST_S
                while self._is_running:
                    await self._read(READ_BLOCK_MS)
                    self._read_entries = min(self._read_entries * 2, READ_ENTRIES)
            except Exception as error:  # see _publish_some
                self._found("degraded", f"Redis at {self.address} is away: {explain(error)}")
                self._read_entries = max(self._read_entries // 2, 1)
            await asyncio.sleep(delay_s * random.uniform(0.75, 1.25))
            delay_s = min(delay_s * 2, RETRY_MAX_S)

    def _found(self, state: State, detail: str) -> None:
        if self._is_running:
            self._health = state, detail
            self.set_state(state, detail)

    async def _read(self, block_ms: int | None) -> None:
        """Take what follows the last entry seen; wait for it at most `block_ms`."""
        if self._last is None:
            return await self._load()
        async with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.xread({STREAM: self._last}, count=self._read_entries, block=block_ms)
            # Asked after the reading: while it is there, nothing that followed it was trimmed.
            pipeline.xrange(STREAM, self._last, self._last, count=1)
            answer, last = await pipeline.execute()
        if not last:
            return await self._load()
        for _, entries in answer or ():
            for entry in entries:
                self._deliver(*_entry(entry))

    def _deliver(self, offset: str, body: bytes | None) -> None:
        self._last = offset
        if body is not None:
            self.receive(offset, body)

    async def _load(self) -> None:
        """Load history: at the start, or when what we saw last is no longer in the stream.

        What is there and newer than what we saw last is delivered.
        """
        entries = await self._newest() or [await self._begin()]
        seen = self._last
        old = [entry for entry in entries if seen is None or not _is_after(entry[0], seen)]
        base = _id_before(entries[0][0])  # that nothing lies between them is all we know
        self._last = old[-1][0] if old else base
        self.restore(base, [(offset, body) for offset, body in old if body is not None])
        self.is_loaded.set()
        for offset, body in entries[len(old) :]:
            self._deliver(offset, body)

    async def _newest(self) -> list[Entry]:
        """As many of the newest entries as history keeps, or some more; oldest first."""
        entries: list[Entry] = []
        size, until = 0, "+"
        while True:
            page = await self._redis.xrevrange(STREAM, until, "-", count=self._read_entries)
            entries += map(_entry, page)
            size += sum(len(_entry(each)[1] or b"") for each in page)
            is_enough = len(entries) > self.history_messages or size > self.history_bytes
            if is_enough or len(page) < self._read_entries:
                return entries[::-1]
            until = _id_before(entries[-1][0])

    async def _begin(self) -> Entry:
        """Put a mark into an empty stream: offsets before it are older than the stream."""
        offset = await self._redis.xadd(STREAM, {"begin": utc_now()})
        return offset.decode(), None

    def is_ahead(self, offset: str) -> bool:
        """Can another process have read this entry, while this one has not yet?"""
        try:
            return self._last is not None and _is_after(offset, self._last)
        except ValueError:
            return False


def _is_after(offset: str, other: str) -> bool:
    return parse_offset(offset) > parse_offset(other)


def _mark_as_seen(accepted: asyncio.Future[None]) -> None:
    """For a broadcast that nobody waits for: asyncio takes its error as seen."""
    if not accepted.cancelled():
        accepted.exception()


def _entry(found: tuple[bytes, dict[bytes, bytes]]) -> Entry:
    """An entry of the stream; one of another program has a body that is no broadcast."""
    offset, values = found
    is_mark = b"begin" in values and b"body" not in values
    return offset.decode(), None if is_mark else values.get(b"body", b"null")


def make_backplane(url: str) -> RedisBackplane:
    """The backplane of --backplane. Raises StartError."""
    try:
        return RedisBackplane(url)
    except ImportError:
        raise StartError("--backplane needs the redis package: pip install redis") from None
    except ValueError:  # its text may hold the password
        raise StartError("--backplane must look like redis://host:6379") from None
