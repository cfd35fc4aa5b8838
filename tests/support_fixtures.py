"""The fixtures of all tests; `.pytest.ini` loads this as a plugin, so that they hold at the top too."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

if os.environ.get("KARNA_TEST_WITHOUT_EPOLL"):
    import select

    del select.epoll  # asyncio has taken its own already

pytest.register_assert_rewrite(
    "support", "support_clients", "support_commands", "support_link", "support_llama",
    "support_mcp", "support_peers", "support_process", "support_redis",
)  # fmt: skip

from support import DEADLINE_S, needs  # noqa: E402
from support_clients import EXAMPLES, FRONTEND, NODE_TOOLS, run_npm  # noqa: E402
from support_commands import ModelHost  # noqa: E402
from support_redis import RedisServer  # noqa: E402


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    """Fail a test that takes too long; a busy loop too, which no timer of asyncio would end."""
    if not hasattr(signal, "setitimer"):  # Windows
        yield
        return

    def fail(number: int, frame: Any) -> None:
        pytest.fail(f"not done within {DEADLINE_S:g} s")

    before = signal.signal(signal.SIGALRM, fail)
    # Again each second: the first may meet code that swallows it.
    signal.setitimer(signal.ITIMER_REAL, DEADLINE_S, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in os.environ:
        if name.startswith("KARNA_"):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancelled handler is left behind after 50 ms, programs get as long between signals."""
    monkeypatch.setattr("karna.work.CANCEL_WAIT_S", 0.05)


@pytest.fixture
async def host() -> AsyncIterator[Any]:
    model_host = ModelHost()
    server = await asyncio.start_server(model_host.handle, "127.0.0.1", 0)
    model_host.port = server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
    model_host.url = f"http://127.0.0.1:{model_host.port}"  # type: ignore[attr-defined]
    yield model_host
    server.close()


@pytest.fixture
def stopped_redis() -> Iterator[RedisServer]:
    needs("redis-server", "redis")
    folder = Path(tempfile.mkdtemp(prefix="karna-redis-"))  # pytest's own paths are too long
    server = RedisServer(folder)
    try:
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder)


@pytest.fixture
def redis(stopped_redis: RedisServer) -> RedisServer:
    stopped_redis.start()
    return stopped_redis


@pytest.fixture(scope="session")
def node_dir() -> Path:
    """A folder with the frontend's npm packages and NODE_TOOLS; installed once and kept."""
    needs("node", "npm")
    recipe = (FRONTEND / "package-lock.json").read_bytes() + json.dumps(NODE_TOOLS).encode()
    parent = Path(os.environ.get("KARNA_NODE_DIR", Path.home() / ".cache" / "karna-ws-tests"))
    folder = parent / hashlib.sha256(recipe).hexdigest()[:16]
    if not folder.exists():
        # Installed aside and renamed, so that a broken or concurrent install is never used.
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
        unfinished.mkdir(parents=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(FRONTEND / name, unfinished)
        tools = [f"{name}@{version}" for name, version in NODE_TOOLS.items()]
        quiet = ["--no-audit", "--no-fund", "--ignore-scripts"]
        run_npm(unfinished, "ci", *quiet)
        run_npm(unfinished, "install", "--no-save", *quiet, *tools)
        with contextlib.suppress(OSError):  # another run was faster
            unfinished.rename(folder)
    return folder


@pytest.fixture(scope="session")
def karna_client_js(node_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples/karna-client.ts, type-checked strictly and compiled to JavaScript."""
    folder = tmp_path_factory.mktemp("karna-client")
    flags = "--strict --noUncheckedIndexedAccess --target es2022 --module esnext --lib es2022,dom"
    source = EXAMPLES / "karna-client.ts"
    tsc = node_dir / "node_modules/.bin/tsc"
    done = subprocess.run(
        [tsc, *flags.split(), "--types", "", "--outDir", folder, source],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "package.json").write_text('{"type": "module"}')
    return folder / "karna-client.js"


@pytest.fixture(scope="session")
def frontend_dir(node_dir: Path) -> Path:
    """examples/frontend beside its node_modules."""
    ignored = shutil.ignore_patterns("node_modules", "dist")
    shutil.copytree(FRONTEND, node_dir, dirs_exist_ok=True, ignore=ignored)
    return node_dir


CHROMIUM_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-sync", "--disable-background-networking", "--disable-component-update",
    "--remote-debugging-port=0",
]  # fmt: skip


@pytest.fixture(scope="session")
def chromium() -> Iterator[str]:
    """One Chromium for all tests of the page; gives its DevTools address."""
    needs("chromium")
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        subprocess.Popen(
            ["chromium", *CHROMIUM_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        ) as process,
    ):  # fmt: skip
        lines = iter(process.stderr or ())
        # Drained for as long as it runs, or the browser would stop at a full pipe.
        drain = threading.Thread(target=lambda: list(lines))
        killer = threading.Timer(30, process.kill)
        killer.start()
        try:
            found = (re.search(r"DevTools listening on (\S+)", line) for line in lines)
            address = next((match[1] for match in found if match), None)
            killer.cancel()
            drain.start()
            assert address, "Chromium ended before it listened"
            yield address
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            drain.join()
