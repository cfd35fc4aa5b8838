"""Unix sockets, TLS, and sockets taken over from systemd."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from karna.config import Config
from karna.errors import StartError
from karna.tls import make_tls_context
from support import SERVER_FILE, execute, needs, served, until
from support_peers import ask, close_frame, dial, head, post, raw, upgrade
from support_process import AUTH, ENVIRONMENT, answers_on, process, run_to_end, start_process


async def test_unix_socket_is_its_owners_alone_and_gone_at_the_end(tmp_path: Path) -> None:
    socket_path = tmp_path / "karna.sock"
    path = str(socket_path)
    async with process("--unix", path, port=None) as karna:
        await until(lambda: socket_path.exists() and answers_on(path))
        assert socket_path.stat().st_mode & 0o777 == 0o600
        assert (await ask(path, head("GET", "/health"))).status == 200
        async with raw(path) as peer:
            await peer.send_json(execute("echo unix", 1))
            assert (await peer.json())["data"]["result"] == "unix"
            ended = await asyncio.to_thread(
                run_to_end, "--unix", path
            )  # a live one is not taken over
            assert ended.returncode == 2 and ended.stderr.count("\n") == 1
            assert f"{path} is in use" in ended.stderr and "--unix" in ended.stderr
            await peer.send_json(execute("echo still", 2))
            assert (await peer.json())["data"]["result"] == "still"
        for request_, status in (
            (upgrade(headers={"Host": "evil.example"}), 403),
            (upgrade(headers={"Origin": "http://evil.example"}), 403),
        ):
            assert (await ask(path, request_)).status == status
        karna.stop()
        assert await karna.ended() == 0
        assert not socket_path.exists()
    async with process("--unix", path, port=None) as karna:
        await until(lambda: socket_path.exists() and answers_on(path))
        karna.stop(signal.SIGKILL)
        await karna.ended()
        assert socket_path.exists()
    async with process("--unix", path, port=None) as karna:  # a dead one is
        await until(lambda: answers_on(path))
        assert (await ask(path, head("GET", "/health"))).status == 200


async def test_file_of_a_successors_unix_socket_is_not_removed(tmp_path: Path) -> None:
    socket_path = tmp_path / "karna.sock"
    path = str(socket_path)
    async with served(unix=path) as first:
        socket_path.unlink()  # as a script that makes room for a successor
        async with served(unix=path) as second:
            await first.close()
            assert socket_path.exists()
            assert (await ask(path, head("GET", "/health"))).status == 200
            await second.close()
            assert not socket_path.exists()
    # Moved away, there is none to remove; another's file stays, whatever it is.
    async with served(unix=path) as third:
        socket_path.unlink()
        socket_path.write_text("mine")
        await third.close()
        assert socket_path.read_text() == "mine"


def make_certificate(directory: Path) -> tuple[str, str]:
    needs("openssl")
    cert, key = str(directory / "cert.pem"), str(directory / "key.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost",
         "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


async def test_tls_serves_every_door_and_refuses_what_is_no_tls(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)
    trusting = ssl.create_default_context(cafile=cert)
    tls = {"ssl": trusting, "server_hostname": "localhost"}
    options = {"certfile": cert, "keyfile": key, "open_timeout_s": 0.4, "close_timeout_s": 0.4}
    async with served(**options) as server:
        assert (await ask(server.port, head("GET", "/health"), **tls)).status == 200
        async with raw(server.port, headers={"Origin": "https://localhost"}, **tls) as peer:
            await peer.send_json(execute("echo " + "x" * 100_000, 1))
            assert (await peer.json())["data"]["result"] == "x" * 100_000
            await peer.send(close_frame())
            assert (await peer.frame()).code == 1000
        answer = await ask(server.port, post("/api/execute_command", {"command": "time"}), **tls)
        assert answer.status == 200
        async with dial(server.port) as plain:
            await plain.send(head("GET", "/health"))
            assert b"200 OK" not in await plain.reader.read()
        async with dial(server.port) as silent:  # a handshake that never comes has its time, too
            began = time.monotonic()
            assert await silent.at_end()
            assert time.monotonic() - began < 1.5


def test_bad_certificate_file_is_named_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, key = make_certificate(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    make_certificate(tmp_path / "other")
    Path("text.pem").write_text("hello")
    Path("cut.pem").write_text(Path(cert).read_text()[:-60] + "\n-----END CERTIFICATE-----\n")
    Path("both.pem").write_text(Path(cert).read_text() + Path(key).read_text())
    secret = ["openssl", "pkey", "-in", key, "-aes128", "-passout", "pass:x", "-out", "secret.pem"]
    subprocess.run(secret, check=True, capture_output=True)
    complaints = {
        ("none.pem", None): "can't read --certfile none.pem: No such file or directory",
        ("cert.pem", "none.pem"): "can't read --keyfile none.pem: No such file or directory",
        ("other", None): "can't read --certfile other: Is a directory",
        ("text.pem", None): "--certfile text.pem is no PEM file (its text begins with -----BEGIN)",
        (
            "cert.pem",
            None,
        ): "--certfile cert.pem holds no private key: name its file with --keyfile",
        ("key.pem", "cert.pem"): "--certfile key.pem holds no certificate",
        ("cert.pem", "cert.pem"): "--keyfile cert.pem holds no private key",
        ("cut.pem", "key.pem"): "can't use the TLS certificate cut.pem: it, or its key, is damaged",
        ("cert.pem", "other/key.pem"): "can't use the TLS certificate cert.pem: the private key is "
        "another certificate's (--keyfile)",
        ("cert.pem", "secret.pem"): "can't use the TLS certificate cert.pem: its key wants a "
        "passphrase: `openssl pkey -in KEY -out PLAIN` takes it away",
    }
    for (certfile, keyfile), complaint in complaints.items():
        with pytest.raises(StartError) as caught:
            make_tls_context(Config(certfile=certfile, keyfile=keyfile))
        assert str(caught.value) == complaint
    make_tls_context(Config(certfile="both.pem"))


@contextlib.asynccontextmanager
async def activated(listening: socket.socket, *flags: str, count: str = "1") -> AsyncIterator[Any]:
    """A server that is given its listening socket as systemd gives it: descriptor 3."""
    child = start_process(
        ["sh", "-c", 'export LISTEN_PID=$$; exec "$0" "$@"', sys.executable,
         str(SERVER_FILE), *flags],
        env={**ENVIRONMENT, "LISTEN_FDS": count, "LISTEN_FDNAMES": "karna.socket"},
        preexec_fn=lambda: os.dup2(listening.fileno(), 3), pass_fds=[3],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.communicate()


async def test_listening_socket_is_taken_over_from_systemd() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        async with activated(listening, "--port", "1") as child:  # the port is the socket's
            assert (await ask(port, head("GET", "/health"))).status == 200
            async with raw(port) as peer:
                child.send_signal(signal.SIGTERM)
                assert (await peer.closed()).code == 1012
            await until(lambda: child.poll() is not None)
            assert child.returncode == 0
        async with activated(listening) as child:  # the next one finds what has queued meanwhile
            assert (await ask(port, head("GET", "/health"))).status == 200


async def test_listening_socket_beyond_loopback_needs_a_token_too() -> None:
    with socket.create_server(("0.0.0.0", 0)) as listening:
        for flags, count, names in (([], "1", "--token"), (AUTH, "2", "LISTEN_FDS")):
            async with activated(listening, *flags, count=count) as child:
                await until(lambda: child.poll() is not None)
                assert child.returncode == 2
                error = child.stderr.read()
                assert names in error and error.count("\n") == 1
