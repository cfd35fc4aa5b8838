"""Broadcasts shared by several processes, over one Redis Stream (Valkey works, too).

The stream's order is everybody's order, and its ids are everybody's offsets. An entry whose
acceptance is unknown is not sent again: its publisher is told so, and nobody gets anything twice.
Uses errors, faults, history (the order of offsets), log, service, text and work; made by who starts
the server with --backplane.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import deque
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote, urlsplit

from karna.errors import StartError, Unavailable
from karna.faults import describe_fault
from karna.history import parse_offset
from karna.log import LogGate, log
from karna.service import Service, State
from karna.text import utc_now
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
# Added with each reading, and never accepted: no id is so low. That nothing else is wrong with it
# shows that Redis would take another: it has memory, disk and permission, and is no replica.
PROBE_ID = "0-1"
PROBE_ANSWER = re.compile("equal or smaller than|Invalid stream ID")  # the latter before 6.2
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
        super().__init__("backplane")
        self._redis, self.address, self._others = make_client(url)
        self.receive: Callable[[str, bytes], None] = lambda offset, body: None
        self.restore: Callable[[str, list[tuple[str, bytes]]], None] = lambda base, entries: None
        self.log_gate = LogGate()  # or the one that all share
        self.history_messages = 1_000
        self.history_bytes = 4 * 1024 * 1024
        self._last: str | None = None  # the id of the last entry seen
        self._read_entries = READ_ENTRIES  # fewer where they do not arrive in time
        self._reading: tuple[State, str] = "starting", f"connecting to Redis at {self.address}"
        self._refusal: str | None = None  # why it takes no broadcast, though it can be read
        self._outbox: deque[tuple[bytes, asyncio.Future[None]]] = deque()
        self._outbox_bytes = 0
        self._news = asyncio.Event()
        self._tasks = Tasks()
        self._is_running = False
        self.has_tried = asyncio.Event()  # to load history, once: it is there, or Redis is away

    async def start(self) -> None:
        """Begin to read and to publish; Redis may come later."""
        if not self._is_running:
            self._is_running = True
            self._show()
            self._tasks.spawn(self._read_forever(), "backplane reader")
            self._tasks.spawn(self._publish_forever(), "backplane publisher")

    async def stop(self) -> None:
        self._is_running = False
        self.set_state("stopped")  # nothing enters the outbox any more
        for _, accepted in self._outbox:
            if not accepted.done():
                accepted.set_exception(Unavailable("the server stops"))
        await self._tasks.end_all()
        for client in (self._redis, *self._others):
            await client.aclose()

    async def check(self) -> None:
        """Say again what the reader found: the monitor would say it too late, or for ever."""
        self._show()

    def _show(self) -> None:
        """Degraded while Redis is away, and while it is there but takes no broadcast."""
        state, detail = self._reading
        if state == "running" and self._refusal is not None:
            state, detail = "degraded", f"Redis at {self.address} {self._refusal}"
        if self._is_running:
            self.set_state(state, detail)

    # Publishing.

    def enqueue(self, body: bytes) -> asyncio.Future[None]:
        """Hand over a broadcast; the result comes when Redis has accepted it.

        Raises Unavailable when Redis is away, refuses broadcasts, or too much waits already.
        """
        if self._refusal is not None:  # nobody would hear of the next refusal
            raise Unavailable(f"the backplane is {self.state}: {self.detail}")
        return self._enqueue(body)

    def _enqueue(self, body: bytes) -> asyncio.Future[None]:
        if not self._is_running or self._reading[0] != "running":
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
        """Hand over a broadcast and wait until it is accepted.

        It is tried while Redis refuses others. Raises Unavailable after a bounded time.
        """
        accepted = self._enqueue(body)
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
            self._complain(len(failures), describe_fault(failures[0]))
        if results:
            self._learn(results[-1])
        for (_, accepted), result in zip(some, results, strict=True):
            if accepted.done():
                continue
            if isinstance(result, Exception):
                reason = f"the broadcast was not accepted: Redis {describe_fault(result)}"
                accepted.set_exception(Unavailable(reason))
            else:
                accepted.set_result(None)

    def _complain(self, count: int, fault: str) -> None:
        """Log broadcasts that were not accepted; clients can cause them, so not each."""
        self.log_gate.turn(time.monotonic())
        if self.log_gate.admits("broadcasts not accepted by Redis"):
            log.warning("%d broadcasts not accepted: Redis %s", count, fault)

    def _learn(self, result: Any) -> None:
        """What came of adding an entry, or of the probe: does Redis take broadcasts?

        A lost connection says nothing of that; the reader meets it, too.
        """
        from redis.exceptions import ResponseError

        if isinstance(result, ResponseError) and not PROBE_ANSWER.search(str(result)):
            self._refusal = describe_fault(result)
        elif isinstance(result, ResponseError) or not isinstance(result, Exception):
            self._refusal = None
        self._show()

    # Reading.

    async def _read_forever(self) -> None:
        delay_s = RETRY_FIRST_S
        while self._is_running:
            try:
                if self._last is None:
                    await self._load()
                await self._read(None)
                self._found("running", f"Redis at {self.address}")
                delay_s = RETRY_FIRST_S
                while self._is_running:
                    await self._read(READ_BLOCK_MS)
                    self._read_entries = min(self._read_entries * 2, READ_ENTRIES)
            except Exception as error:  # see _publish_some
                self._found("degraded", f"Redis at {self.address} {describe_fault(error)}")
                self._read_entries = max(self._read_entries // 2, 1)
            await asyncio.sleep(delay_s * random.uniform(0.75, 1.25))
            delay_s = min(delay_s * 2, RETRY_MAX_S)

    def _found(self, state: State, detail: str) -> None:
        self._reading = state, detail
        self.has_tried.set()
        self._show()

    async def _read(self, block_ms: int | None) -> None:
        """Take what follows the last entry seen; wait for it at most `block_ms`."""
        async with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.xread({STREAM: self._last}, count=self._read_entries, block=block_ms)
            # Asked after the reading: while it is there, nothing that followed it was trimmed.
            pipeline.xrange(STREAM, self._last, self._last, count=1)
            pipeline.xadd(STREAM, {"begin": "probe"}, id=PROBE_ID, nomkstream=True)
            answer, last, probe = await pipeline.execute(raise_on_error=False)
        for each in (answer, last):
            if isinstance(each, Exception):
                raise each
        self._learn(probe)
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
        for offset, body in entries[len(old) :]:
            self._deliver(offset, body)

    async def _newest(self) -> list[Entry]:
        """As many of the newest entries as history keeps, or some more; oldest first."""
        entries: list[Entry] = []
        size, until = 0, "+"
        while True:
            page = await self._redis.xrevrange(STREAM, until, "-", count=self._read_entries)
            found = [_entry(each) for each in page]
            entries += found
            size += sum(len(body or b"") for _, body in found)
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


def make_client(url: str) -> tuple[Any, str, list[Any]]:
    """A client that does not connect yet, its address without secrets, and what to close with it.

    Raises ImportError without the `redis` package, ValueError for a bad URL.
    """
    from redis.asyncio import Redis
    from redis.asyncio.connection import parse_url
    from redis.asyncio.retry import Retry
    from redis.asyncio.sentinel import Sentinel
    from redis.backoff import NoBackoff

    url = re.sub("^valkey", "redis", url)  # its twin has the same protocol
    sentinels: list[tuple[str, int]] = []
    name = ""
    if url.startswith("redis+sentinel://"):
        sentinels, name, url = _split_sentinel_url(url)
    # Without retries of its own: a lost answer to XADD must not become a second entry.
    options: dict[str, Any] = {
        "protocol": 2, "retry": Retry(NoBackoff(), 0), "socket_timeout": REDIS_TIMEOUT_S,
        "socket_connect_timeout": REDIS_TIMEOUT_S,
    }  # fmt: skip
    where = {**options, **parse_url(url)}
    if sentinels:
        finder: Any = Sentinel(sentinels, sentinel_kwargs=options, **where)  # type: ignore[no-untyped-call]
        client, others = finder.master_for(name), finder.sentinels
        address = f"{name} (Sentinel {', '.join(f'{host}:{port}' for host, port in sentinels)})"
    else:
        client, others = Redis.from_url(url, **options), []
        address = f"{where.get('host', 'localhost')}:{where.get('port', 6379)}"
        address = str(where.get("path") or address)
    try:
        client.connection_pool.make_connection()  # only this looks at the URL's ?options
    except TypeError:
        raise ValueError("an unknown option in the URL") from None
    return client, address, others


def _split_sentinel_url(url: str) -> tuple[list[tuple[str, int]], str, str]:
    """The Sentinels, the name of the primary, and the URL of a Redis with all else."""
    # Not by urlsplit, which takes no other host beside one in brackets.
    url = re.sub(r"[\t\r\n]", "", url)
    parts = re.match(r"[^:]+://([^/?#]*@)?([^/?#]*)([^?#]*)(\?[^#]*)?", url)
    assert parts is not None, "whatever follows the scheme"
    found = [urlsplit(f"//{each}") for each in parts[2].split(",")]
    sentinels = [(each.hostname or "", each.port or 26379) for each in found]
    name = unquote(parts[3]).strip("/")
    if not name or not all(host for host, _ in sentinels):
        raise ValueError("no Sentinel, or no name of a primary")
    return sentinels, name, f"redis://{parts[1] or ''}{parts[4] or ''}"


def make_backplane(url: str) -> RedisBackplane:
    """The backplane of --backplane. Raises StartError."""
    try:
        return RedisBackplane(url)
    except ImportError:
        raise StartError("--backplane needs the redis package: pip install redis") from None
    except ValueError:  # its text may hold the password
        forms = "redis://host:6379 or redis+sentinel://host:26379/name"
        raise StartError(f"--backplane must look like {forms}") from None
