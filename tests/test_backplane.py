"""The Redis Stream: what it holds, what is trimmed, what is foreign to it, what is refused."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from karna.backplane import STREAM, RedisBackplane
from karna_ws import WebSocketManager
from services import Unavailable
from support import ROOT, Raw, Sio, execute, http, needs, served, until
from support_commands import keep_line
from support_redis import RedisServer, both_doors, following, node, say


TRIMS: list[tuple[str | int, ...]] = [
    ("XTRIM", STREAM, "MAXLEN", 0),
    ("XTRIM", STREAM, "MAXLEN", 1),
    ("DEL", STREAM),
    ("FLUSHALL",),
]


all_trims = pytest.mark.parametrize("trim", TRIMS, ids=lambda words: "-".join(map(str, words)))


@all_trims
async def test_trim_while_no_node_runs_gives_a_gap(
    redis: RedisServer, trim: tuple[str | int, ...]
) -> None:
    # The last two have seen no broadcast when they leave.
    async with (
        served(backplane=redis.url) as a,
        following(*both_doors(a), *both_doors(a)) as followers,
    ):
        await followers[2].leave()
        await followers[3].leave()
        await say(a, "1")
        for follower in followers[:2]:
            await follower.until("1")
            await follower.leave()
        await say(a, "2")
        await say(a, "3")
    redis.call(*trim)
    async with served(backplane=redis.url) as a:
        pids = [each.answer.get("pid") for each in followers]
        for follower in followers:
            await follower.follow(a)
        await say(a, "4")
        assert await followers[0].until("4") == ["1", "GAP", "4"]
        assert await followers[1].until("4") == ["1", "4"]
        assert await followers[2].until("4") == ["GAP", "4"]
        assert await followers[3].until("4") == ["4"]
        for number in (1, 3):  # socket.recovered is false
            assert followers[number].answer["pid"] != pids[number]
        for follower in followers:
            await follower.leave()


@all_trims
@pytest.mark.parametrize("is_cut", [False, True], ids=["connected", "reconnecting"])
async def test_trim_of_what_a_node_has_not_read_gives_a_gap(
    redis: RedisServer, trim: tuple[str | int, ...], is_cut: bool
) -> None:
    async with (
        served(backplane=redis.url) as a,
        following(*both_doors(a), *both_doors(a)) as followers,
    ):
        await say(a, "1")
        for follower in followers:
            await follower.until("1")
        for follower in followers[2:]:
            await follower.leave()
        # The loop stands still: the node reads the first alone, or none.
        if is_cut:
            redis.call("CLIENT", "KILL", "TYPE", "normal")
        for number in range(2, 6):
            redis.add_message(str(number))
        redis.call(*trim)
        redis.add_message("6")
        for follower in followers[:2]:
            order = await follower.until("6")
            if "2" in order:  # read at once, before it was trimmed
                order.remove("2")
            rest = ["5", "6"] if trim[-1] == 1 else ["6"]  # what is still there arrives
            assert order == ["1", "GAP", *rest]
        pid = followers[3].answer["pid"]
        for follower in followers[2:]:
            await follower.follow(a)
        await say(a, "7")
        assert await followers[2].until("7") == ["1", "GAP", "7"]
        assert await followers[3].until("7") == ["1", "7"]
        assert followers[3].answer["pid"] != pid


async def test_emptied_stream_is_noticed_while_nothing_is_published(redis: RedisServer) -> None:
    async with served(backplane=redis.url) as a, following(*both_doors(a)) as followers:
        await say(a, "1")
        for follower in followers:
            await follower.until("1")
        redis.call("FLUSHALL")
        for follower in followers:
            await follower.until_type("error", code="history_gap")
        await say(a, "2")
        for follower in followers:
            assert await follower.until("2") == ["1", "GAP", "2"]


async def test_trim_of_what_a_node_has_read_gives_no_gap(redis: RedisServer) -> None:
    async with served(backplane=redis.url) as a, following(*both_doors(a)) as followers:
        for number in range(3):
            await say(a, str(number))
        for follower in followers:
            await follower.until("2")
        redis.call("XTRIM", STREAM, "MAXLEN", 1)
        redis.call("CLIENT", "KILL", "TYPE", "normal")
        await until(lambda: a.manager.backplane.state == "degraded")
        redis.add_message("3")
        for follower in followers:
            assert await follower.until("3") == ["0", "1", "2", "3"]


FOREIGN: list[dict[str, str | bytes]] = [
    {"body": "no JSON"},
    {"body": ""},
    {"body": b"\xff\xfe\x00"},
    {"body": b"\x89PNG\r\n"},
    {"body": "[]"},
    {"body": "null"},
    {"body": "{}"},
    {"body": '{"type": "x"}'},
    {"body": '{"data": 1}'},
    {"body": '{"type": 5, "data": 1}'},
    {"body": '{"type": "x", "data": NaN}'},
    {"body": '{"type": "x", "data": "\\ud800"}'},
    {"body": '{"type": "x", "data": 1} '.ljust(5000)},
    {"body": '{"type": "x", "data": 1}{'},
    {"body": '{"type":"x","data":' + "[" * 300 + "]" * 300 + "}"},  # orjson reads it...
    {"body": '{"type":"x","data":' + "[" * 2000 + "]" * 2000 + "}"},  # ...and not this
    {"other": "field"},
    {"Body": "{}"},
    {b"\xff".decode("latin-1"): b"\x00"},
]


async def test_foreign_entries_are_skipped_and_harm_nothing(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="karna_ws")
    options = {"backplane": redis.url, "max_message_bytes": 1024, "max_body_bytes": 1024}
    async with served(**options) as a, following(*both_doors(a)) as followers:
        await say(a, "1")
        for follower in followers:
            await follower.until("1")
            await follower.leave()
        for fields in FOREIGN:
            redis.add(**fields)
        await say(a, "2")
        await until(lambda: a.manager.history.last == a.manager.backplane._last)
        lines = [record.getMessage() for record in caplog.records]
        skipped = [line for line in lines if line.startswith("skipped entry")]
        assert len(skipped) == a.manager.log_gate.BURST
        assert all(len(line) < 300 and line.isprintable() for line in skipped)
        assert a.manager.backplane.state == "running"
        async with served(**options) as b:  # they are in the history that it loads
            assert b.manager.backplane.state == "running"
            for fields in FOREIGN:
                redis.add(**fields)
            async with served(**options) as c:  # its newest entry is a foreign one
                for follower, server in zip(followers, (b, c), strict=True):
                    await follower.follow(server)
                    await say(a, f"3 {follower.door}")
                    await follower.until(f"3 {follower.door}")
            for follower in followers:
                types = {each["type"] for each in follower.seen}
                assert types == {"notification", "status_update"}
            orders = [each.messages for each in followers]
            assert orders == [["1", "2", "3 raw"], ["1", "2", "3 raw", "3 socket.io"]]


async def test_entry_with_more_fields_keeps_only_what_a_broadcast_has(redis: RedisServer) -> None:
    async with served(backplane=redis.url) as a, following((a, "raw")) as (follower,):
        body = {"type": "notification", "data": {"message": "1"}, "offset": "x", "id": 5, "node": 1}
        offset = redis.add(body=json.dumps(body), other="field")
        await follower.until("1")
        data = {"message": "1"}
        assert follower.seen == [{"type": "notification", "data": data, "offset": offset}]


async def test_longest_request_for_a_notification_arrives(redis: RedisServer) -> None:
    limits = {"max_message_bytes": 1500, "max_body_bytes": 2000}
    async with (
        served(backplane=redis.url, **limits) as a,
        following((a, "raw")) as (follower,),
        Raw.open(a) as client,
    ):
        message = "x" * (2000 - len('{"message":""}'))
        status, _ = await http(a, "POST", "/api/notify", {"message": message})
        assert status == 202
        await follower.until(message)
        request = json.dumps(execute("notify ", id=1))
        message = "y" * (1500 - len(request))
        await client.send(execute(f"notify {message}", id=1))
        assert (await client.final(1))["type"] == "command_response"
        await follower.until(message)
        for publish in (a.manager.broadcast, a.manager.publish):
            with pytest.raises(ValueError, match="bytes at most"):  # said, not lost
                await asyncio.ensure_future(publish("x", "z" * 4000))


async def test_publishers_are_refused_when_the_outbox_is_full(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("karna.backplane.MAX_OUTBOX", 20)
    monkeypatch.setattr("karna.backplane.MAX_OUTBOX_BYTES", 100_000)
    async with served(backplane=redis.url) as a, following((a, "raw")) as (follower,):
        for number in range(20):  # nothing is sent before the loop goes on
            a.manager.notify(f"a{number}")
        with pytest.raises(Unavailable, match="too many"):
            a.manager.notify("refused")
        with pytest.raises(Unavailable, match="too many"):
            await say(a, "refused")
        await follower.until("a19")
        await until(lambda: not a.manager.backplane._outbox)
        for number in range(5):
            a.manager.notify(f"b{number}" + "x" * 30_000 * (number < 4))
            if a.manager.backplane._outbox_bytes > 100_000:
                break
        with pytest.raises(Unavailable, match="too many"):
            a.manager.notify("refused")
        await until(lambda: not a.manager.backplane._outbox)
        assert a.manager.backplane._outbox_bytes == 0
        await say(a, "end")
        order = [each[:3] for each in await follower.until("end")]
        assert order == [f"a{n}" for n in range(20)] + ["b0x", "b1x", "b2x", "b3x", "end"]


async def test_node_reads_as_fast_as_it_publishes(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what it published itself would be trimmed before it has read it."""
    monkeypatch.setattr("karna.backplane.STREAM_ENTRIES", 1000)

    async def shout(server: Any, numbers: Iterator[int]) -> None:
        for number in numbers:
            await say(server, str(number))

    async with served(backplane=redis.url) as a, following((a, "raw")) as (follower,):
        numbers = iter(range(6000))
        await asyncio.gather(*(shout(a, numbers) for _ in range(200)))
        await say(a, "end")
        assert await follower.until("end") == [*map(str, range(6000)), "end"]


async def test_redis_that_refuses_entries_is_logged_rarely(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with served(backplane=redis.url) as a, following((a, "raw")) as (follower,):
        redis.call("CONFIG", "SET", "maxmemory", 1)
        for number in range(30):
            with pytest.raises(Unavailable, match="not accept"):
                await say(a, str(number))
            with pytest.raises(Unavailable, match="out of memory"):
                a.manager.notify("nobody waits")  # who would not hear of it is told at once
        await until(lambda: not a.manager.backplane._outbox)
        redis.call("CONFIG", "SET", "maxmemory", 0)
        await say(a, "end")
        assert await follower.until("end") == ["end"]
        told = [r for r in caplog.records if "not accepted" in r.getMessage()]
        assert 1 <= len(told) <= 5  # of 30: as any kind of line


async def test_backplane_recovers_from_what_a_late_monitor_says(redis: RedisServer) -> None:
    async with served(backplane=redis.url) as a:
        backplane = a.manager.backplane
        backplane.set_state("degraded", "no answer to check within 5 s")
        await backplane.check()
        assert (backplane.state, backplane.detail) == ("running", f"Redis at {redis.path}")


SECRET = "hunter2-secret"


@pytest.mark.parametrize("given", [SECRET, "wrong-" + SECRET, None], ids=["right", "wrong", "away"])
async def test_credentials_of_redis_appear_nowhere(
    stopped_redis: RedisServer, given: str | None
) -> None:
    stopped_redis.options = ("--requirepass", SECRET)
    if given is not None:
        stopped_redis.start()
    url = f"unix://default:{given or SECRET}@{stopped_redis.path}"
    async with node(url, "--log-level", "debug", log=asyncio.subprocess.PIPE) as a:
        async with Raw.open(a) as client:
            answers = [
                await client.ask("execute_command", command="notify hello"),
                await client.ask("get_status"),
                await client.ask("execute_command", command="help"),
            ]
        answers += [await http(a, "GET", path) for path in ("/health", "/api/status", "/metrics")]
        answers.append(await http(a, "POST", "/api/notify", {"message": "hello"}))
        a.process.terminate()
        printed, logged = await a.process.communicate()
    state = "running" if given == SECRET else "degraded"
    assert answers[1]["data"]["backplane"]["state"] == state
    assert answers[0]["type"] == ("command_response" if given == SECRET else "error")
    assert f"backplane is {state}".encode() in logged
    assert SECRET not in repr((answers, printed, logged))


@pytest.mark.parametrize(
    "url",
    [
        "http://user:SECRET@localhost", "user:SECRET@localhost:6379", "redis://user:SECRET@h:port",
        "redis://user:SEC/RET@localhost:6379", "redis://user:SECRET@localhost?nonsense=1",
        "redis://user:SECRET@localhost?db=SECRET", "redis://user:SECRET@localhost:70000",
        "redis://user:SECRET@[localhost",
    ],
)  # fmt: skip
async def test_bad_backplane_url_ends_the_start_with_one_line(url: str) -> None:
    needs("redis")
    code, text = await failing_start("--backplane", url)
    assert (code, text.count("\n")) == (2, 1)
    assert text.startswith("karna_ws: --backplane must look like redis://")
    assert "SEC" not in text


async def test_missing_redis_package_ends_the_start_with_one_line() -> None:
    code, text = await failing_start("--backplane", "redis://localhost", without="redis")
    assert (code, text) == (2, "karna_ws: --backplane needs the redis package: pip install redis\n")


async def failing_start(*flags: str, without: str = "_") -> tuple[int | None, str]:
    """Exit code and output of a server that should not start, where that package is missing."""
    program = "import sys; sys.modules[sys.argv[1]] = None; import karna_ws; sys.exit(karna_ws.main"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", f"{program}(sys.argv[2:]))", without, "--port", "0", *flags,
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await process.communicate()
    return process.returncode, output.decode()


@pytest.mark.parametrize(
    "offset", ["", "x", "5", "5-", "-5", "5-5-5", "9" * 30 + "-0", "%00", "5e1-0"]
)
async def test_offset_that_is_no_stream_id_is_a_gap_at_once(
    redis: RedisServer, offset: str
) -> None:
    async with served(backplane=redis.url) as a:
        await say(a, "before")
        async with Raw.open(a, f"/ws?since={offset}") as client:
            gap = await client.next()
            assert (gap["type"], gap["data"]["code"]) == ("error", "history_gap")
            await say(a, "after")
            assert (await client.next())["data"]["message"] == "after"
        async with Sio.open(a) as session:
            answer = await session.join("/ws", {"pid": "mine", "offset": offset})
            assert answer["pid"] != "mine", "it is told that it did not recover"


def test_backplane_knows_which_offsets_are_ahead() -> None:
    needs("redis")
    backplane = RedisBackplane("redis://localhost")
    assert not backplane.is_ahead("6-0"), "it has read nothing yet"
    backplane._last = "5-7"
    ahead = {"5-7": False, "5-6": False, "4-9": False, "5-8": True, "6-0": True, "10-0": True,
             "x": False, "": False, "6": False}  # fmt: skip
    assert {offset: backplane.is_ahead(offset) for offset in ahead} == ahead


async def test_notify_of_a_prepared_line_reaches_the_backplane_that_came(
    redis: RedisServer,
) -> None:
    manager = WebSocketManager()
    async with served(manager) as server, Raw.open(server) as client:
        keep_line(manager.commands, "notify hello")
        assert await client.run("notify hello") == {"clients": 1}
    async with (
        served(manager, backplane=redis.url) as a,
        served(backplane=redis.url) as b,
        following((b, "raw")) as (follower,),
        Raw.open(a) as client,
    ):
        assert await client.run("notify hello") == {"clients": 1}
        assert await follower.until("hello") == ["hello"]


REFUSALS = {
    "memory": (("CONFIG", "SET", "maxmemory", 1), ("CONFIG", "SET", "maxmemory", 0), "maxmemory"),
    "user": (
        ("ACL", "SETUSER", "default", "-xadd"), ("ACL", "SETUSER", "default", "+xadd"), "SETUSER"
    ),
    "replica": (("REPLICAOF", "127.0.0.1", 1), ("REPLICAOF", "NO", "ONE"), "read-only replica"),
}  # fmt: skip


@pytest.mark.parametrize("refusal", REFUSALS)
async def test_backplane_is_degraded_while_redis_refuses_every_broadcast(
    redis: RedisServer, refusal: str
) -> None:
    begin, end, text = REFUSALS[refusal]
    async with served(backplane=redis.url) as a, following((a, "raw")) as (follower,):
        backplane = a.manager.backplane
        await say(a, "before")
        redis.call(*begin)
        await until(lambda: text in backplane.detail)  # nobody has published meanwhile
        status, health = await http(a, "GET", "/health")
        assert status == 503 and text in health["services"]["backplane"]["detail"]
        with pytest.raises(Unavailable, match=text):
            await say(a, "refused")
        with pytest.raises(Unavailable, match=text):
            a.manager.notify("refused")
        await asyncio.sleep(0)
        assert backplane.state == "degraded"
        redis.call(*end)
        await until(lambda: backplane.state == "running")
        assert (await http(a, "GET", "/health"))[0] == 200
        await say(a, "after")
        assert await follower.until("after") == ["before", "after"]
        assert redis.call("XLEN", STREAM) == 3  # the mark and two broadcasts: no trace of probes


async def test_refusal_is_found_at_the_start_and_the_first_broadcast_accepted_ends_it(
    redis: RedisServer,
) -> None:
    redis.add_message("before")
    redis.call("CONFIG", "SET", "maxmemory", 1)
    async with served(backplane=redis.url) as a:
        backplane = a.manager.backplane
        assert backplane.state == "degraded" and "maxmemory" in backplane.detail
        assert len(a.manager.history.entries) == 1  # it can be read
        redis.call("CONFIG", "SET", "maxmemory", 0)
        await say(a, "accepted")
        assert backplane.state == "running"


@pytest.mark.parametrize("newest", ["9999999999999999-0", "18446744073709551615-7"])
async def test_long_stream_ids_are_understood(redis: RedisServer, newest: str) -> None:
    body = json.dumps({"type": "notification", "data": {"message": "1"}})
    redis.call("XADD", STREAM, newest, "body", body)
    async with served(backplane=redis.url) as a, following(*both_doors(a)) as followers:
        assert a.manager.backplane.state == "running"
        assert [entry.offset for entry in a.manager.history.entries] == [newest]
        await say(a, "2")
        for follower in followers:
            assert await follower.until("2") == ["2"]
            await follower.leave()
        await say(a, "3")
        for follower in followers:
            await follower.follow(a)
            assert await follower.until("3") == ["2", "3"]


async def test_stream_that_cannot_go_on_says_so(redis: RedisServer) -> None:
    redis.call("XADD", STREAM, f"{2**64 - 1}-{2**64 - 1}", "begin", "x")
    async with served(backplane=redis.url) as a:
        await until(lambda: "DEL karna:broadcasts" in a.manager.backplane.detail)
        redis.call("DEL", STREAM)
        await until(lambda: a.manager.backplane.state == "running")
        await say(a, "1")
