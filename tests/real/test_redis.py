"""Several nodes on one real redis-server, which is killed, hung and started late."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import pytest

from karna.backplane import MAX_PIPELINE, PUBLISH_WAIT_S, READ_ENTRIES, REDIS_TIMEOUT_S, STREAM
from services import Unavailable
from support import Raw, execute, http, served, until
from support_redis import RedisServer, both_doors, call_redis, following, node, redis_on_port, say


@pytest.mark.parametrize("door", ["raw", "socket.io"])
async def test_client_recovers_on_the_other_node(redis: RedisServer, door: str) -> None:
    async with (
        served(backplane=redis.url) as a,
        served(backplane=redis.url) as b,
        following((a, door)) as (follower,),
    ):
        await say(a, "1")
        await say(b, "2")
        await follower.until("2")
        sid = follower.answer.get("sid")
        await follower.leave()
        await say(a, "3")
        await say(b, "4")
        await follower.follow(b)
        await say(a, "5")
        assert await follower.until("5") == ["1", "2", "3", "4", "5"]
        assert follower.answer.get("sid") == sid


@pytest.mark.parametrize("door", ["raw", "socket.io"])
async def test_quiet_client_recovers_on_the_other_node(redis: RedisServer, door: str) -> None:
    """It has seen no broadcast: its offset is where the first node began, among foreign entries."""
    redis.add(foreign="1")
    async with served(backplane=redis.url) as a:
        offset = redis.add(foreign="2")
        await until(lambda: a.manager.backplane._last == offset)
        redis.call("XTRIM", STREAM, "MAXLEN", 1)
        async with served(backplane=redis.url) as b, following((b, door)) as (follower,):
            await follower.leave()
            redis.add(foreign="3")
            await say(a, "1")
            await follower.follow(a)
            assert await follower.until("1") == ["1"]


@pytest.mark.parametrize("door", ["raw", "socket.io"])
async def test_client_that_is_ahead_of_a_node_gets_nothing_twice(
    redis: RedisServer, door: str
) -> None:
    async with (
        served(backplane=redis.url) as a,
        served(backplane=redis.url) as b,
        following((a, door)) as (follower,),
    ):
        async with held_back(redis, b, a):
            await say(a, "1")
            await follower.until("1")
            await follower.leave()
            coming = asyncio.create_task(follower.follow(b))
            await until(lambda: b.manager.connections)
            await until(lambda: b.manager.tasks.running or coming.done())
        await coming
        await say(a, "2")
        assert await follower.until("2") == ["1", "2"]


@contextlib.asynccontextmanager
async def held_back(redis: RedisServer, server: Any, *others: Any) -> AsyncIterator[None]:
    """Meanwhile this node takes nothing from Redis, others do."""
    backplane = server.manager.backplane
    may_read = asyncio.Event()
    read = backplane._read

    async def wait_and_read(block_ms: int | None) -> None:
        await may_read.wait()
        await read(block_ms)

    backplane._read = wait_and_read
    redis.call("CLIENT", "KILL", "TYPE", "normal")  # ends the reading that is under way
    for each in (server, *others):
        await until(lambda it=each: it.manager.backplane.state == "degraded")
    for each in others:
        await until(lambda it=each: it.manager.backplane.state == "running")
    try:
        yield
    finally:
        may_read.set()


@pytest.mark.parametrize("door", ["raw", "socket.io"])
async def test_client_with_an_offset_of_the_future_gets_a_gap(
    redis: RedisServer, door: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("karna.admission.LAG_S", 0.05)
    async with served(backplane=redis.url) as a, following((a, door)) as (follower,):
        await say(a, "1")
        await follower.until("1")
        await follower.leave()
        follower.offset = "999999999999999-0"
        pid = follower.answer.get("pid")
        await follower.follow(a)
        if door == "raw":
            await follower.until_type("error", code="history_gap")
        await say(a, "2")
        assert await follower.until("2") == ["1", *(["GAP"] if door == "raw" else []), "2"]
        assert door == "raw" or follower.answer["pid"] != pid


async def test_status_update_stays_on_its_node_and_names_it(redis: RedisServer) -> None:
    async with served(backplane=redis.url) as a, served(backplane=redis.url) as b:
        async with following(*both_doors(a, b)) as followers:
            a.manager.services["vision"].set_state("degraded", "no lens")
            await say(a, "end")
            for follower in followers:
                await follower.until("end")
            for follower in followers[:2]:
                (update,) = [each for each in follower.seen if each["type"] == "status_update"]
                assert update["node"] == a.manager.node
                assert update["data"]["vision"]["detail"] == "no lens"
            for follower in followers[2:]:
                assert {each["type"] for each in follower.seen} == {"notification"}
        async with Raw.open(b) as client:
            answer = await client.ask("get_status")
            assert answer["node"] == b.manager.node != a.manager.node
            assert answer["offset"] == followers[3].offset


class Stream:
    """Numbered broadcasts by one way of publishing, and which of them were accepted."""

    def __init__(self, name: str, publish: Callable[[str], Awaitable[bool]]) -> None:
        self.name = name
        self.publish = publish
        self.accepted: list[str] = []
        self.refused: list[str] = []
        self.is_over = False

    async def run(self) -> None:
        number = 0
        while not self.is_over:
            message = f"{self.name}{number}"
            number += 1
            # Each is answered in bounded time, whatever Redis does.
            async with asyncio.timeout(PUBLISH_WAIT_S + 2.0):
                is_accepted = await self.publish(message)
            (self.accepted if is_accepted else self.refused).append(message)
            await asyncio.sleep(0.001 if is_accepted else 0.02)


async def publish_in_process(server: Any, message: str) -> bool:
    try:
        await say(server, message)
    except Unavailable:
        return False
    return True


async def publish_by_http(server: Any, message: str) -> bool:
    status, body = await http(server, "POST", "/api/notify", {"message": message})
    assert status == 202 or (status, body["data"]["code"]) == (503, "unavailable"), body
    return bool(status == 202)


async def publish_by_command(client: Raw, message: str) -> bool:
    answer = await client.ask("execute_command", command=f"notify {message}")
    assert answer["type"] == "command_response" or answer["data"]["code"] == "unavailable", answer
    return bool(answer["type"] == "command_response")


async def test_accepted_broadcasts_arrive_once_over_kills_of_redis(redis: RedisServer) -> None:
    async with (
        served(backplane=redis.url) as a,
        node(redis.url) as b,
        Raw.open(b) as client,
        following(*both_doors(a, b), *both_doors(a, b)) as followers,
    ):
        streams = [
            Stream("p", functools.partial(publish_in_process, a)),
            Stream("h", functools.partial(publish_by_http, b)),
            Stream("c", functools.partial(publish_by_command, client)),
        ]

        async def until_more_accepted() -> None:
            wanted = [len(stream.accepted) + 15 for stream in streams]
            for stream, count in zip(streams, wanted, strict=True):
                await until_or_ended(lambda s=stream, c=count: len(s.accepted) >= c, tasks)

        tasks = [asyncio.create_task(stream.run()) for stream in streams]
        returning = followers[4:]
        for _ in range(2):
            await until_more_accepted()
            redis.kill()
            for follower in returning:
                await follower.leave()
            for stream in streams:
                refusals = len(stream.refused)
                await until_or_ended(lambda s=stream, n=refusals: len(s.refused) > n, tasks)
            redis.start()
            await until_more_accepted()
            for follower, server in zip(returning, (b, b, a, a), strict=True):
                await follower.follow(server)
        for stream in streams:
            stream.is_over = True
        await asyncio.gather(*tasks)
        await say(a, "end")
        orders = [await each.until("end") for each in followers]

    assert orders == [orders[0]] * 8
    assert len(set(orders[0])) == len(orders[0]), "nothing arrives twice"
    for stream in streams:
        assert not set(stream.accepted) - set(orders[0]), "nothing accepted is missing"
        own = [each for each in orders[0] if each.startswith(stream.name)]
        assert own == sorted(own, key=lambda each: int(each[1:]))


async def until_or_ended(is_so: Callable[[], bool], tasks: Iterable[asyncio.Task[None]]) -> None:
    """Wait for `is_so`; fail with the error of a task that ended instead."""
    while not is_so():
        for task in tasks:
            assert not task.done(), task.exception()
        await asyncio.sleep(0.005)


async def test_hung_redis_delays_publishers_alone(redis: RedisServer) -> None:
    async with (
        served(backplane=redis.url) as a,
        Raw.open(a) as client,
        following((a, "raw")) as (follower,),
    ):
        redis.signal(signal.SIGSTOP)
        try:
            await client.send(
                execute("notify lost", id="notify"),
                execute("echo hello", id="echo"),
                {"method": "get_status", "id": "status"},
            )
            answers = [await client.next_where(lambda m: "id" in m) for _ in range(3)]
            assert sorted(each["id"] for each in answers[:2]) == ["echo", "status"]
            assert answers[2]["data"]["code"] == "unavailable"
            if a.manager.backplane.state != "degraded":
                await follower.until_type("status_update")
            status, health = await http(a, "GET", "/health")
            assert status == 503 and list(health["services"]) == ["backplane"]
            status, body = await http(a, "POST", "/api/notify", {"message": "lost too"})
            assert (status, body["data"]["code"]) == (503, "unavailable")
            answer = await client.ask("get_status")
            assert answer["data"]["backplane"]["state"] == "degraded"
            assert (await client.run("echo still")) == "still"
        finally:
            redis.signal(signal.SIGCONT)
        await until(lambda: a.manager.backplane.state == "running")
        assert await http(a, "GET", "/health") == (200, {"status": "healthy"})
        await say(a, "end")
        order = await follower.until("end")
        states = [
            each["data"]["backplane"]["state"]
            for each in follower.seen
            if each["type"] == "status_update"
        ]
        assert states == ["degraded", "running"]
        assert order in (["end"], ["lost", "end"]), "unknown is told as unavailable, once"


async def test_publishers_are_refused_in_bounded_time_while_redis_hangs(
    redis: RedisServer,
) -> None:
    async with served(backplane=redis.url) as a, following((a, "raw")) as (follower,):
        await say(a, "begin")
        redis.signal(signal.SIGSTOP)
        try:
            # Several times what goes to Redis at once: each part alone would wait for it.
            publishers = [say(a, str(number)) for number in range(4 * MAX_PIPELINE)]
            async with asyncio.timeout(PUBLISH_WAIT_S + 1.5):
                results = await asyncio.gather(*publishers, return_exceptions=True)
            assert {type(result) for result in results} == {Unavailable}
        finally:
            redis.signal(signal.SIGCONT)
        await until(lambda: a.manager.backplane.state == "running")
        await until(lambda: not a.manager.backplane._outbox)
        await say(a, "end")
        order = await follower.until("end")
        # What was on its way may come, once; what waited behind it was taken back.
        arrived = [int(each) for each in order[1:-1]]
        assert arrived == sorted(set(arrived))
        assert len(arrived) <= 2 * MAX_PIPELINE


async def test_server_stops_in_bounded_time_while_redis_hangs(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with served(backplane=redis.url) as a:
        backplane = a.manager.backplane
        redis.signal(signal.SIGSTOP)
        try:
            waiting = [asyncio.create_task(say(a, str(number))) for number in range(3)]
            await asyncio.sleep(0)
            async with asyncio.timeout(REDIS_TIMEOUT_S + 3.0):
                closing = a.close()
                await until(lambda: not backplane._is_running)
                with pytest.raises(Unavailable):
                    a.manager.notify("too late")
                await closing
            for task in waiting:
                with pytest.raises(Unavailable):
                    await task
        finally:
            redis.signal(signal.SIGCONT)
    assert "left behind" not in caplog.text


async def test_server_starts_without_redis_and_tells_a_gap_when_it_comes(
    stopped_redis: RedisServer,
) -> None:
    stopped_redis.start()
    stopped_redis.add_message("before")
    stopped_redis.kill()
    async with (
        served(backplane=stopped_redis.url) as a,
        Raw.open(a) as client,
        following(*both_doors(a)) as followers,
    ):
        assert a.manager.backplane.state == "degraded"
        assert (await client.run("echo hello")) == "hello"
        with pytest.raises(Unavailable, match="backplane"):
            a.manager.broadcast("notification", {"message": "lost"})
        error = await client.error_of(execute("notify lost"))
        assert error["code"] == "unavailable"
        assert (await http(a, "GET", "/health"))[0] == 503
        stopped_redis.start()
        await until(lambda: a.manager.backplane.state == "running")
        await say(a, "after")
        for follower in followers:  # others may have published while it was away
            assert await follower.until("after") == ["GAP", "after"]
        assert (await http(a, "GET", "/health"))[0] == 200


@pytest.mark.parametrize("door", ["raw", "socket.io"])
async def test_client_recovers_from_a_node_that_was_restarted(
    redis: RedisServer, door: str
) -> None:
    async with served(backplane=redis.url) as b:
        async with served(backplane=redis.url) as a, following((a, door)) as (follower,):
            await say(a, "1")
            await follower.until("1")
            await follower.leave()
            await say(a, "2")
        await say(b, "3")
        async with served(backplane=redis.url) as a:
            await follower.follow(a)
            await say(a, "4")
            assert await follower.until("4") == ["1", "2", "3", "4"]
            await follower.leave()


async def test_restarted_node_loads_as_much_as_history_keeps(redis: RedisServer) -> None:
    options = {"backplane": redis.url, "history_messages": 40}
    count = 3 * READ_ENTRIES
    ids = [redis.add_message(str(number)) for number in range(count)]
    async with served(**options) as a:
        manager = a.manager
        assert [entry.offset for entry in manager.history.entries] == ids[-40:]
        assert len(manager.history.since(ids[-41]) or ()) == 40
        assert manager.history.since(ids[-42]) is None
        async with Raw.open(a, f"/ws?since={ids[-3]}") as client:
            assert [(await client.next())["offset"] for _ in range(2)] == ids[-2:]
    async with served(**{**options, "history_messages": 0}) as a:
        assert not a.manager.history.entries
        async with following((a, "raw")) as (follower,):
            await say(a, "live")
            assert await follower.until("live") == ["live"]


async def test_processes_share_a_port_and_broadcasts(redis: RedisServer) -> None:
    if not hasattr(__import__("socket"), "SO_REUSEPORT"):
        pytest.skip("needs SO_REUSEPORT")
    async with (
        node(redis.url, "--reuse-port") as a,
        node(redis.url, "--reuse-port", port=a.port) as b,
        contextlib.AsyncExitStack() as stack,
    ):
        assert a.port == b.port
        nodes: dict[str, Raw] = {}
        for _ in range(100):  # the kernel spreads them
            client = await stack.enter_async_context(Raw.open(a))
            nodes.setdefault((await client.ask("get_status"))["node"], client)
            if len(nodes) == 2:
                break
        first, second = nodes.values()
        assert (await http(a, "POST", "/api/notify", {"message": "hello"}))[0] == 202
        got = [await client.next_of("notification") for client in (first, second)]
        assert got[0] == got[1]


async def test_failover_of_sentinels_is_followed() -> None:
    """A primary is killed; its replica takes its place within the second that Sentinel waits."""
    with contextlib.ExitStack() as stack:
        primary = contextlib.ExitStack()
        stack.enter_context(primary)
        first = primary.enter_context(redis_on_port())
        second = stack.enter_context(redis_on_port("--replicaof", f"127.0.0.1 {first}"))
        watching = stack.enter_context(redis_on_port(sentinel_of=first))
        while call_redis(second, "INFO", "replication")["master_link_status"] != "up":
            await asyncio.sleep(0.02)
        while not call_redis(watching, "SENTINEL", "REPLICAS", "karna"):
            await asyncio.sleep(0.02)
        url = f"redis+sentinel://127.0.0.1:1,127.0.0.1:{watching}/karna"  # one of them is away
        async with served(backplane=url) as a, following((a, "raw"), (a, "socket.io")) as followers:
            assert a.manager.backplane.state == "running"
            await say(a, "before")
            while call_redis(second, "XLEN", STREAM) < 2:
                await asyncio.sleep(0.02)
            primary.close()
            await until(lambda: a.manager.backplane.state == "degraded")
            with pytest.raises(Unavailable):
                await say(a, "lost")
            await until(lambda: a.manager.backplane.state == "running")
            assert call_redis(second, "ROLE")[0] == b"master"
            await say(a, "after")
            for follower in followers:
                assert await follower.until("after") == ["before", "after"]
