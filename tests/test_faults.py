"""What is wrong with a Redis is said in one line that names the mend: real ones, each with its fault."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from karna.backplane import STREAM, make_backplane, make_client
from karna.errors import StartError
from karna.faults import describe_fault
from karna_ws import WebSocketManager, serving
from support import http, needs, served, until
from support_redis import call_redis, redis_on_port
from test_listen import make_certificate


async def detail_of(url: str, wanted: str) -> str:
    """How the backplane is, once it says what is wanted; the port opens before long."""
    began = time.monotonic()
    async with serving(WebSocketManager(), port=0, backplane=url) as a:
        assert time.monotonic() - began < 1.5
        backplane = a.manager.backplane
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(6.0):
                await until(lambda: wanted in backplane.detail)
        status, health = await http(a, "GET", "/health")
        assert status == 503 and list(health["services"]) == ["backplane"]
        detail = str(backplane.detail)
        assert detail.isprintable() and "hunter2" not in detail + repr(health)
        return detail


@contextlib.contextmanager
def plain() -> Iterator[str]:
    with redis_on_port() as port:
        yield f"redis://127.0.0.1:{port}"


@contextlib.contextmanager
def locked(url: str) -> Iterator[str]:
    with redis_on_port("--requirepass", "right") as port:
        yield url.replace("PORT", str(port))


@contextlib.contextmanager
def cluster() -> Iterator[str]:
    """Two nodes; the first has one slot of which the stream is not."""
    both = ("--cluster-enabled", "yes", "--cluster-require-full-coverage", "no")
    with redis_on_port(*both) as first, redis_on_port(*both) as second:
        call_redis(first, "CLUSTER", "ADDSLOTS", 0)
        call_redis(second, "CLUSTER", "ADDSLOTSRANGE", 1, 16383)
        call_redis(first, "CLUSTER", "MEET", "127.0.0.1", second)
        while b"slots_assigned:16384" not in call_redis(first, "CLUSTER", "INFO"):
            time.sleep(0.02)
        yield f"redis://127.0.0.1:{first}"


@contextlib.contextmanager
def alone_in_cluster() -> Iterator[str]:
    with redis_on_port("--cluster-enabled", "yes") as port:
        yield f"redis://127.0.0.1:{port}"


@contextlib.contextmanager
def sentinel(form: str) -> Iterator[str]:
    with redis_on_port() as port, redis_on_port(sentinel_of=port) as watching:
        yield form.format(redis=port, sentinel=watching)


@contextlib.contextmanager
def weak_user(*rules: str) -> Iterator[str]:
    with redis_on_port() as port:
        call_redis(port, "XADD", STREAM, "*", "begin", "x")
        call_redis(port, "ACL", "SETUSER", "weak", "on", ">hunter2", *rules)
        yield f"redis://weak:hunter2@127.0.0.1:{port}"


@contextlib.contextmanager
def full_disk() -> Iterator[str]:
    with redis_on_port("--dbfilename", "taken", "--save", "3600 1") as port:
        Path(call_redis(port, "CONFIG", "GET", "dir")[1].decode(), "taken").mkdir()
        call_redis(port, "XADD", STREAM, "*", "begin", "x")
        call_redis(port, "BGSAVE")
        while call_redis(port, "INFO", "persistence")["rdb_last_bgsave_status"] != "err":
            time.sleep(0.02)
        yield f"redis://127.0.0.1:{port}"


@contextlib.contextmanager
def something_else() -> Iterator[str]:
    with redis_on_port() as port:
        call_redis(port, "SET", STREAM, "text")
        yield f"redis://127.0.0.1:{port}"


@contextlib.contextmanager
def at(url: str) -> Iterator[str]:
    needs("redis")
    yield url


FAULTS: dict[str, tuple[Any, str]] = {
    "no password": (lambda: locked("redis://127.0.0.1:PORT"), "wants a password"),
    "wrong password": (lambda: locked("redis://:hunter2@127.0.0.1:PORT"), "user and password"),
    "unknown user": (lambda: locked("redis://u:hunter2@127.0.0.1:PORT"), "user and password"),
    "no name": (lambda: at("redis://no-such-host.invalid"), "no host of this name"),
    "nobody": (lambda: at("redis://127.0.0.1:1"), "nothing listens there"),
    "no socket": (lambda: at("unix:///nowhere/redis.sock"), "nothing listens there"),
    "no XADD": (lambda: weak_user("~*", "+@read"), "ACL SETUSER"),
    "no key": (lambda: weak_user("~other", "+@all"), "~karna:broadcasts"),
    "disk": (full_disk, "disk"),
    "cluster": (cluster, "another has the stream: name 127.0.0.1:"),
    "cluster without slots": (alone_in_cluster, "CLUSTER INFO"),
    "Sentinel's port": (lambda: sentinel("redis://127.0.0.1:{sentinel}"), "redis+sentinel://"),
    "no Sentinel": (lambda: sentinel("redis+sentinel://127.0.0.1:{redis}/karna"), "no Sentinel"),
    "no such primary": (lambda: sentinel("redis+sentinel://127.0.0.1:{sentinel}/x"), "name after /"),
    "Sentinel away": (lambda: at("redis+sentinel://127.0.0.1:1/karna"), "check their hosts"),
    "TLS on a plain port": (lambda: sentinel("rediss://127.0.0.1:{redis}"), "redis:// instead of"),
    "text": (something_else, "something else under the name"),
    "no database": (lambda: sentinel("redis://127.0.0.1:{redis}/99"), "no such database"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
async def test_fault_of_redis_names_its_mend(fault: str) -> None:
    make, wanted = FAULTS[fault]
    with make() as url:
        detail = await detail_of(url, wanted)
    assert wanted in detail and detail.startswith("Redis at ")


async def test_tls_of_redis_is_spoken_and_its_faults_named(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)
    files = ["--tls-cert-file", cert, "--tls-key-file", key, "--tls-ca-cert-file", cert]
    with redis_on_port(*files, "--tls-auth-clients", "no", tls=True) as port:
        for url, wanted in [
            (f"redis://localhost:{port}", "wants TLS"),
            (f"rediss://localhost:{port}", "not trusted: ?ssl_ca_certs=FILE"),
        ]:
            assert wanted in await detail_of(url, wanted)
        for scheme in ("rediss", "valkeys"):
            url = f"{scheme}://localhost:{port}?ssl_ca_certs={cert}"
            async with served(backplane=url) as a:
                assert a.manager.backplane.state == "running"


async def test_silent_server_delays_the_start_little() -> None:
    needs("redis")

    async def keep_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1024):
            pass
        writer.close()

    server = await asyncio.start_server(keep_silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    wanted = "does not answer in time"
    assert wanted in await detail_of(f"redis://127.0.0.1:{port}", wanted)
    server.close()


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://u:hunter2@h:1/2", "h:1"),
        ("valkey://u:hunter2@h", "h:6379"),
        ("valkeys://u:hunter2@h", "h:6379"),
        ("unix://u:hunter2@/run/redis.sock", "/run/redis.sock"),
        ("redis+sentinel://u:hunter2@h/main", "main (Sentinel h:26379)"),
        ("valkey+sentinel://h:1,[::1]:2,k/main?db=3", "main (Sentinel h:1, ::1:2, k:26379)"),
        ("redis+sentinel://h/%2Fmy%20main\n", "my main (Sentinel h:26379)"),
    ],
)
def test_url_of_redis_is_understood(url: str, address: str) -> None:
    needs("redis")
    client, shown, others = make_client(url)
    assert shown == address and len(others) == url.count(",") + ("sentinel" in url)
    where = client.connection_pool.connection_kwargs
    assert where.get("password") == ("hunter2" if "hunter2" in url else None)
    assert where["socket_timeout"] and where["protocol"] == 2
    assert ("SSL" in client.connection_pool.connection_class.__name__) == url.startswith("valkeys")
    assert where.get("db") in (None, 0, 2, 3)


@pytest.mark.parametrize(
    "url",
    ["redis+sentinel://h", "redis+sentinel:///main", "redis+sentinel://h,/main",
     "redis+sentinel://h:x/main", "redis+sentinel://h/main?nonsense=1", "rediss+sentinel://h/main"],
)  # fmt: skip
def test_bad_url_of_sentinels_is_refused(url: str) -> None:
    needs("redis")
    with pytest.raises(StartError, match="redis\\+sentinel://host:26379/name"):
        make_backplane(url)


def test_fault_that_nobody_foresaw_is_told_on_one_line() -> None:
    error = RuntimeError("odd\nERROR forged\x1b[2J" + "x" * 1000)
    text = describe_fault(error)
    assert text.startswith("is away: odd ERROR forged") and text.isprintable() and len(text) < 220
