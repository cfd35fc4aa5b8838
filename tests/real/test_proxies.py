"""Behind nginx, Caddy and systemd, with the files of examples/."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from websockets.asyncio.client import connect

from karna_ws import serving
from support import DEADLINE_S, ROOT, SERVER_FILE, needs
from support_clients import Host, Wire, program, rpc


async def try_behind_proxy(port: int, wire: Wire | None = None) -> None:
    """Page, socket, Socket.IO and HTTP through a proxy, by the name that the proxy serves.

    wire: between the proxy and the server.
    """
    name = "karna.example.org"
    request = Request(
        f"http://127.0.0.1:{port}/api/status",
        headers={"Host": name, "Authorization": "Bearer t0ken"},
    )
    with await asyncio.to_thread(urlopen, request, timeout=DEADLINE_S) as response:
        assert json.load(response)["command"]["state"] == "running"
    body = b'{"command": "echo through"}'
    headers = {**request.headers, "Content-Type": "application/json"}
    post = Request(f"http://127.0.0.1:{port}/api/execute_command", body, headers)
    for _ in range(20):
        with await asyncio.to_thread(urlopen, post, timeout=DEADLINE_S) as response:
            assert json.load(response)["data"]["result"] == "through"
    assert wire is None or wire.connections_made <= 2, (
        "the proxy keeps its connections to the server"
    )
    page = Request(f"http://127.0.0.1:{port}/", headers={"Host": name})
    with await asyncio.to_thread(urlopen, page, timeout=DEADLINE_S) as response:
        assert b"Karna WS" in response.read()
    way: dict[str, Any] = {"host": "127.0.0.1", "port": port, "origin": f"http://{name}"}
    async with connect(f"ws://{name}/ws?token=t0ken", **way) as ws:
        answer = await rpc(ws, "execute_command", {"command": "echo through"}, "command_response")
        assert answer["result"] == "through"
    async with connect(f"ws://{name}/socket.io/?EIO=4&transport=websocket", **way) as ws:
        assert str(await ws.recv()).startswith("0{")


async def test_nginx_example_proxies(tmp_path: Path) -> None:
    needs("nginx")
    # nginx takes over a socket that listens already, so there is nothing to wait for.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        port = listener.getsockname()[1]
        host = Host()
        async with (
            serving(
                host.manager, port=0, token="t0ken", allow_host=("karna.example.org",)
            ) as server,
            Wire(server.port) as wire,
        ):
            site = (ROOT / "examples" / "nginx.conf").read_text()
            changes = {
                "listen 80;": f"listen 127.0.0.1:{port};",
                "127.0.0.1:8000": f"127.0.0.1:{wire.port}",
                "/var/log/nginx/karna.log": f"{tmp_path}/access.log",
            }
            for old, new in changes.items():
                assert site.count(old) == 1
                site = site.replace(old, new)
            paths = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
            temporary = "".join(f"{path}_temp_path {tmp_path}/{path};" for path in paths)
            main = (
                f"daemon off; worker_processes 1; pid {tmp_path}/pid; error_log stderr notice;"
                f"events {{}} http {{ {temporary} {site} }}"
            )
            (tmp_path / "nginx.conf").write_text(main)
            words = ("nginx", "-e", "stderr", "-c", str(tmp_path / "nginx.conf"))
            inherited = {
                "pass_fds": (listener.fileno(),),
                "env": {**os.environ, "NGINX": f"{listener.fileno()};"},
            }
            async with program(*words, ready="using inherited sockets", **inherited):
                await try_behind_proxy(port, wire)
    log = (tmp_path / "access.log").read_text()
    assert '"GET /ws" 101' in log and "t0ken" not in log


async def test_caddy_example_proxies(tmp_path: Path) -> None:
    needs("caddy")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    host = Host()
    async with (
        serving(host.manager, port=0, token="t0ken", allow_host=("karna.example.org",)) as server,
        Wire(server.port) as wire,
    ):
        site = (ROOT / "examples" / "Caddyfile").read_text()
        site = site.replace("karna.example.org {", f"http://karna.example.org:{port} {{")
        site = site.replace("127.0.0.1:8000", f"127.0.0.1:{wire.port}")
        (tmp_path / "Caddyfile").write_text("{\n\tadmin off\n}\n" + site)
        words = ("caddy", "run", "--config", str(tmp_path / "Caddyfile"), "--adapter", "caddyfile")
        home = {
            **os.environ,
            "HOME": str(tmp_path),
            "XDG_DATA_HOME": str(tmp_path),
            "XDG_CONFIG_HOME": str(tmp_path),
        }
        async with program(*words, ready="serving initial configuration", env=home):
            await try_behind_proxy(port, wire)


async def test_haproxy_example_proxies_and_sees_who_is_well(tmp_path: Path) -> None:
    """Its health check is HTTP/1.0 without a Host; a node that drains gets nobody new."""
    needs("haproxy")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    options = {
        "port": 0, "token": "t0ken", "allow_host": ("karna.example.org",),
        "trust_proxy": ("127.0.0.1",),
    }  # fmt: skip
    one, two = Host(), Host()
    async with (
        serving(one.manager, **options) as first,
        serving(two.manager, **options) as second,
    ):
        site = (ROOT / "examples" / "haproxy.cfg").read_text()
        changes = {
            "bind :80": f"bind 127.0.0.1:{port}",
            "127.0.0.1:8001": f"127.0.0.1:{first.port}",
            "127.0.0.1:8002": f"127.0.0.1:{second.port}",
            "inter 2s": "inter 50ms",
        }
        for old, new in changes.items():
            assert old in site
            site = site.replace(old, new)
        # What it says of its nodes goes to a socket of the test's, for there is no other sign.
        events = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        events.bind(str(tmp_path / "log"))
        events.setblocking(False)
        site = f"global\n    log {tmp_path}/log local0 notice\n\n{site}".replace(
            "defaults\n", "defaults\n    log global\n", 1
        )
        (tmp_path / "haproxy.cfg").write_text(site)
        loop = asyncio.get_running_loop()
        with events:
            words = ("haproxy", "-W", "-f", str(tmp_path / "haproxy.cfg"))
            async with program(*words, ready="Loading success"):
                await try_behind_proxy(port)
                two.manager.begin_draining()
                while b"nodes/two is DOWN" not in await loop.sock_recv(events, 4096):
                    pass
                before = one.manager.metrics.refusals.copy()
                for _ in range(10):
                    status = Request(
                        f"http://127.0.0.1:{port}/api/status",
                        headers={"Host": "karna.example.org", "Authorization": "Bearer t0ken"},
                    )
                    with await asyncio.to_thread(urlopen, status, timeout=DEADLINE_S) as response:
                        assert response.status == 200
                assert one.manager.metrics.refusals == before, "no health check is refused"


def test_systemd_units_are_valid(tmp_path: Path) -> None:
    unit = (ROOT / "examples" / "karna.service").read_text()
    command = re.search(r"^ExecStart=(\S+) -m (\S+)$", unit, re.M)
    assert command and command[2] == "karna_ws"
    needs("systemd-analyze")
    unit = unit.replace(command[0], f"ExecStart={sys.executable} -m karna_ws")
    unit = unit.replace("/opt/karna", str(ROOT))
    (tmp_path / "karna.service").write_text(unit)
    shutil.copy(ROOT / "examples" / "karna.socket", tmp_path)
    found = subprocess.run(
        ["systemd-analyze", "verify", "./karna.service", "./karna.socket"],
        cwd=tmp_path, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    ours = [line for line in found.stderr.splitlines() if "karna" in line]
    assert found.returncode == 0 and ours == [], found.stderr


async def test_server_takes_socket_of_systemd() -> None:
    """As karna.socket does: the socket is there before the server, and clients wait in it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        waiting = asyncio.create_task(wait_for_status(port))
        hand_over = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3);"
            "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()));"
            "os.execv(sys.executable, [sys.executable, sys.argv[2]])"
        )
        server = str(SERVER_FILE)
        words = (sys.executable, "-c", hand_over, str(listener.fileno()), server)
        async with program(*words, ready=str(port), pass_fds=(listener.fileno(),)):
            assert "command" in await waiting


async def wait_for_status(port: int) -> Any:
    """Ask before anybody accepts: the answer comes once the server runs."""
    async with connect(f"ws://127.0.0.1:{port}/ws") as ws:
        return await rpc(ws, "get_status", {}, "status_update")
