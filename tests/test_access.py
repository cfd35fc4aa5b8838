"""Who may come in: Host, Origin, token; and what the log may show of them."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from karna.access import forwarded_for
from karna.config import make_config
from karna.head import parse_head
from karna_ws import Client, WebSocketManager
from support import served
from support_peers import (
    DOORS,
    TOKEN,
    WELCOMED,
    Headers,
    ask,
    engine,
    frame,
    get_metrics,
    head,
    post,
    raw,
    upgrade,
)


BAD_HOSTS: list[tuple[Any, int, str | None]] = [
    (None, 400, None),
    (["localhost", "localhost"], 400, None),
    (["localhost", "evil.example"], 400, None),
    ("", 400, None),
    ("localhost evil.example", 400, None),
    ("localhost, evil.example", 400, None),
    ("localhost:", 400, None),
    ("localhost:x", 400, None),
    ("localhost:123456", 400, None),
    ("user@localhost", 400, None),
    ("localhost/evil", 400, None),
    ("http://localhost", 400, None),
    ("::1", 400, None),
    ("[::1", 400, None),
    ("[fe80::1%25eth0]", 400, None),
    ("löcalhost", 400, None),
    ("evil.example", 403, "--allow-host evil.example"),
    ("evil.example:8000", 403, "--allow-host evil.example"),
    ("EVIL.example", 403, "--allow-host evil.example"),
    ("localhost.evil.example", 403, "--allow-host localhost.evil.example"),
    ("evil.localhost", 403, "--allow-host evil.localhost"),
    ("localhost.", 403, "--allow-host localhost."),
    ("127.0.0.1.nip.io", 403, "--allow-host 127.0.0.1.nip.io"),
    ("127.1", 403, "--allow-host 127.1"),
    ("0x7f.0.0.1", 403, "--allow-host"),
    ("0177.0.0.1", 403, "--allow-host"),
    ("2130706433", 403, "--allow-host"),
    ("127.0.0.1.", 403, "--allow-host"),
    ("[127.0.0.1]", 403, "--allow-host"),
    ("karna.example.evil", 403, "--allow-host"),
]


GOOD_HOSTS = [
    "localhost", "localhost:8000", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:8000", "192.168.1.7:80",
    "[::1]", "[::1]:8000", "[::ffff:127.0.0.1]", "karna.example", "Karna.Example:443",
]  # fmt: skip


BAD_ORIGINS: list[Any] = [
    "", "null", "NULL", "*", "file://", "file:///etc/passwd", "about:blank", "data:text/html,x",
    "chrome-extension://abcdefghijklmnop", "moz-extension://11111111-2222", "vscode-webview://x",
    "http://evil.example", "https://evil.example", "http://evil.example:8000",
    "http://localhost.evil.example", "http://evil.localhost", "http://localhost.", "http://127.0.0.2",
    "http://127.1", "http://0.0.0.0", "http://[::]", "http://localhost@evil.example",
    "http://evil.example#localhost", "http://localhost/", "http://localhost:", "http://localhost:x",
    "http://localhost:123456", "ws://localhost", "wss://localhost", "ftp://localhost", "localhost",
    "localhost:8000", "//localhost", "HTTP://LOCALHOST", "http://localhost http://evil.example",
    "http://localhost, http://evil.example", "http://evil.example/http://localhost",
    "https://app.example.evil", "https://app.example:444", "http://app.example", "https://APP.example",
    "http://[::1", "http://\xe9vil.example", "http://evil.example\x9b31m", "a" * 6000,
    ["http://localhost", "http://localhost"], ["http://localhost", "http://evil.example"],
    ["null", "null"],
]  # fmt: skip


GOOD_ORIGINS = [
    None, "http://localhost", "https://localhost", "http://localhost:3000", "http://127.0.0.1:5173",
    "https://[::1]:1", "http://[::1]", "https://app.example",
]  # fmt: skip


@pytest.mark.parametrize("door", DOORS)
async def test_every_door_refuses_bad_hosts_and_takes_good_ones(door: str) -> None:
    async with served(allow_host=["karna.example"]) as server:
        for host, status, flag in BAD_HOSTS:
            answer = await ask(server.port, DOORS[door]({"Host": host}))
            code = "forbidden" if status == 403 else "invalid_request"
            assert (answer.status, answer.error["code"]) == (status, code), host
            assert flag is None or flag in answer.error["message"], host
            assert "access-control-allow-origin" not in answer.headers
        for host in GOOD_HOSTS:
            answer = await ask(server.port, DOORS[door]({"Host": host}))
            assert answer.status == WELCOMED.get(door, 200), host


@pytest.mark.parametrize("door", DOORS)
async def test_every_door_refuses_bad_origins_and_takes_good_ones(door: str) -> None:
    async with served(allow_origin=["https://app.example"]) as server:
        for origin in BAD_ORIGINS:
            answer = await ask(server.port, DOORS[door]({"Origin": origin}))
            assert (answer.status, answer.error["code"]) == (403, "forbidden"), origin
            assert "access-control-allow-origin" not in answer.headers
            assert answer.headers["vary"] == "Origin"
        for origin in GOOD_ORIGINS:
            answer = await ask(server.port, DOORS[door]({"Origin": origin}))
            assert answer.status == WELCOMED.get(door, 200), origin
            if answer.status != 101:
                assert answer.headers.get("access-control-allow-origin") == origin
                assert answer.headers["vary"] == "Origin"


async def test_refusal_names_the_flag_only_where_it_would_help() -> None:
    async with served() as server:
        for origin in ("https://evil.example", "chrome-extension://abc"):
            answer = await ask(server.port, upgrade(headers={"Origin": origin}))
            assert f"--allow-origin {origin} would" in answer.error["message"]
        for origin in ("null", "", "file://", "http://localhost/", "http://evil.example\x9b31m"):
            answer = await ask(server.port, upgrade(headers={"Origin": origin}))
            assert "--allow-origin" not in answer.error["message"], origin
            assert "\x9b" not in answer.error["message"]


BAD_TOKENS: list[Headers] = [
    {},
    {"Authorization": ""},
    {"Authorization": "Bearer"},
    {"Authorization": "Bearer "},
    {"Authorization": "Bearer wrong"},
    {"Authorization": f"Bearer {TOKEN}x"},
    {"Authorization": f"Bearer {TOKEN[:-1]}"},
    {"Authorization": f"Bearer {TOKEN.upper()}"},
    {"Authorization": f"Bearer {TOKEN}, Bearer {TOKEN}"},
    {"Authorization": [f"Bearer {TOKEN}", f"Bearer {TOKEN}"]},
    {"Authorization": ["Bearer wrong", f"Bearer {TOKEN}"]},
    {"Authorization": f"Basic {TOKEN}"},
    {"Authorization": TOKEN},
    {"Authorization": "Bearer \xff\xfe"},
    {"Cookie": f"token={TOKEN}"},
    {"X-Token": TOKEN},
]


NEEDS_TOKEN = ["raw", "get", "post", "rpc", "metrics"]


@pytest.mark.parametrize("door", NEEDS_TOKEN)
async def test_every_door_refuses_bad_tokens_and_takes_the_right_one(door: str) -> None:
    async with served(token=TOKEN) as server:
        for headers in BAD_TOKENS:
            answer = await ask(server.port, DOORS[door](headers))
            assert (answer.status, answer.error["code"]) == (401, "unauthorized"), headers
            assert answer.headers["www-authenticate"] == "Bearer"
            assert TOKEN not in str(answer)
        for scheme in ("Bearer", "bearer", "BEARER"):
            answer = await ask(server.port, DOORS[door]({"Authorization": f"{scheme} {TOKEN}"}))
            assert answer.status == WELCOMED.get(door, 200)


@pytest.mark.parametrize("query", ["EIO=4", "EIO=4&transport=websocket", "EIO=3", "EIO=", "eio=4"])
@pytest.mark.parametrize(
    "path", ["/ws", "/metrics", "/api/status", "/api/execute_command", "/rpc", "/nowhere"]
)
async def test_engine_query_on_another_path_does_not_bypass_the_token(
    path: str, query: str
) -> None:
    async with served(token=TOKEN) as server:
        target = f"{path}?{query}"
        for plain in (
            head("GET", target),
            post(target, {"command": "time", "jsonrpc": "2.0", "method": "get_status", "id": 1}),
            head("DELETE", target),
        ):
            answer = await ask(server.port, plain)
            assert answer.status in (400, 401) and b"time" not in answer.body
        answer = await ask(server.port, upgrade(target))
        if query != "EIO=4&transport=websocket":
            assert answer.status in (400, 401)
            return
        async with raw(server.port, target) as peer:  # the Socket.IO door, which asks at CONNECT
            assert (await peer.frame()).payload[:2] == b"0{"
            await peer.send(frame(1, b"40/ws,"))
            assert (await peer.frame()).payload.startswith(b"44/ws,")
            await peer.send(frame(1, b'42/ws,0["rpc",{"method":"get_status"}]'))
            assert (await peer.closed()).code == 1002


BAD_TYPES = [
    None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
    "application/jsonx", "application/json2; charset=utf-8", "text/plain; application/json",
    "text/plain, application/json", "application/json, text/plain", "application/ json", "json",
    ["text/plain", "application/json"], ["application/json", "text/plain"],
]  # fmt: skip


@pytest.mark.parametrize("target", ["/api/execute_command", "/api/notify", "/rpc"])
async def test_post_takes_json_alone(target: str) -> None:
    async with served() as server:
        for kind in BAD_TYPES:
            answer = await ask(server.port, post(target, {}, {"Content-Type": kind}))
            assert (answer.status, answer.error["code"]) == (415, "invalid_request"), kind
            assert "application/json" in answer.error["message"]
        for kind in ("application/json", "Application/JSON", "application/json;charset=utf-8"):
            answer = await ask(server.port, post(target, {}, {"Content-Type": kind}))
            assert answer.status != 415


async def test_cross_site_post_needs_an_allowed_origin() -> None:
    value = {"command": "time"}
    async with served(allow_origin=["https://app.example"]) as server:
        for site, origin, status in (
            ("cross-site", None, 403),
            ("cross-site", "https://evil.example", 403),
            ("cross-site", "null", 403),
            ("cross-site", "https://app.example", 200),
            (["cross-site", "cross-site"], None, 403),
            (["same-origin", "cross-site"], None, 403),
            ("same-origin", "https://evil.example", 403),
            ("same-origin", None, 200),
            ("same-site", None, 200),
            ("none", None, 200),
            (None, None, 200),
        ):
            for target in ("/api/execute_command",):
                headers = {"Sec-Fetch-Site": site, "Origin": origin}
                answer = await ask(server.port, post(target, value, headers))
                assert answer.status == status, (site, origin)
                if status == 403:
                    assert answer.error["code"] == "forbidden"


async def test_preflight_names_methods_headers_and_the_private_network() -> None:
    asked = {
        "Origin": "http://localhost:3000",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
        "Access-Control-Request-Private-Network": "true",
    }
    async with served(token=TOKEN) as server:
        answer = await ask(server.port, head("OPTIONS", "/api/execute_command", asked))
        assert (answer.status, answer.body) == (204, b"")
        assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"
        assert answer.headers["access-control-allow-methods"] == "POST, OPTIONS"
        allowed = answer.headers["access-control-allow-headers"]
        assert allowed.startswith("Authorization, Content-Type, Mcp-Method, Mcp-Name")
        assert answer.headers["access-control-allow-private-network"] == "true"
        assert answer.headers["vary"] == "Origin"
        assert "content-length" not in answer.headers  # RFC 9110, 8.6: not with 204
        refused = await ask(server.port, head("OPTIONS", "/rpc", {**asked, "Origin": "null"}))
        assert refused.status == 403
        assert not [name for name in refused.headers if name.startswith("access-control")]


async def test_refused_post_has_no_effect() -> None:
    manager, ran = WebSocketManager(), []

    @manager.commands.command
    def touch() -> None:
        """Leave a trace."""
        ran.append(1)

    refused: list[Headers] = [
        {"Origin": "https://evil.example"}, {"Host": "evil.example"},
        {"Content-Type": "text/plain"},
        {"Sec-Fetch-Site": "cross-site"}, {"Authorization": None}, {"Origin": ["null", "null"]},
    ]  # fmt: skip
    async with served(manager, token=TOKEN) as server:
        allowed: Headers = {"Authorization": f"Bearer {TOKEN}"}
        for headers in refused:
            request_ = post("/api/execute_command", {"command": "touch"}, {**allowed, **headers})
            assert (await ask(server.port, request_)).status in (400, 401, 403, 415)
        assert not ran
        answer = await ask(server.port, post("/api/execute_command", {"command": "touch"}, allowed))
        assert answer.status == 200 and ran == [1]


SECRETS = [TOKEN, "other-secret", "hush-hush", "query-secret", "from-elsewhere"]


async def test_logs_never_hold_tokens_queries_or_auth_payloads(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    manager = WebSocketManager()

    @manager.on("connect")
    async def connect(client: Client, auth: dict[str, Any]) -> None:
        if auth.get("fail"):
            raise RuntimeError("no")

    async with served(manager, token=TOKEN) as server:
        port = server.port
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        for request_ in (
            upgrade(f"/ws?token={TOKEN}&x=query-secret"),
            upgrade("/ws?token=other-secret"),
            upgrade("/nowhere?token=other-secret"),
            upgrade(f"/ws?token={TOKEN}", {"Origin": "https://evil.example"}),
            upgrade(f"/ws?token={TOKEN}", {"Host": "evil.example"}),
            upgrade("/ws", {"Authorization": "Bearer other-secret"}),
            upgrade("/ws", {**bearer, "Sec-WebSocket-Version": "7"}),
            head("GET", f"/metrics?token={TOKEN}"),
            head("GET", f"/api/status?token={TOKEN}&{'x=1&' * 200}"),
            head("BREW", f"/rpc?token={TOKEN}"),
            post(f"/api/execute_command?token={TOKEN}", b"{not json hush-hush"),
            post("/rpc", b"hush-hush", bearer),
            head("GET", f"/rpc?query-secret={'x' * 9000}", bearer),
            f"GET /?token={TOKEN} HTTP/9\r\n\r\n".encode(),
        ):
            await ask(port, request_)
        async with engine(port, connect=None) as peer:
            for auth in ({"token": "other-secret"}, {"token": TOKEN, "fail": 1, "x": "hush-hush"}):
                await peer.send(frame(1, b"40/ws," + json.dumps(auth).encode()))
                assert (await peer.frame()).payload.startswith(b"44/ws,")
            await peer.send(frame(1, b'40/ws,{"token":"hush-hush"'))
            assert (await peer.closed()).code == 1002
        async with raw(port, f"/ws?token={TOKEN}&since=query-secret") as peer:
            await peer.send(frame(1, b"\xff hush-hush"))
            assert (await peer.closed()).code == 1007
    shown = caplog.text + repr(server.config) + repr(manager)
    assert "evil.example" in caplog.text  # logs were captured
    assert not [secret for secret in SECRETS if secret in shown]


async def test_flood_of_refused_handshakes_logs_little(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "karna_ws")
    async with served() as server:
        for number in range(400):  # a page can make up origins as it likes
            answer = await ask(
                server.port, upgrade(headers={"Origin": f"http://e{number}.example"})
            )
            assert answer.status == 403
        for _ in range(50):
            await ask(server.port, upgrade(headers={"Host": "evil.example"}))
        assert len(server.manager.log_gate._counts) < 100
        assert (await get_metrics(server.port))["karna_refused_total{reason=forbidden}"] == 450
    refusals = [record for record in caplog.records if "refused" in record.getMessage()]
    assert 1 <= len(refusals) <= 60


@pytest.mark.parametrize("door", DOORS)
async def test_origin_that_equals_host_is_allowed_once_host_has_passed(door: str) -> None:
    same = [
        ("karna.example", "http://karna.example"),
        ("karna.example", "https://karna.example"),
        ("karna.example:80", "http://karna.example"),
        ("karna.example:443", "https://karna.example"),
        ("KARNA.example:8443", "https://karna.example:8443"),
        ("192.168.1.7:8000", "http://192.168.1.7:8000"),
    ]
    other = [
        ("evil.example", "http://evil.example"),  # the rebinding attack
        ("karna.example:8443", "https://karna.example"),
        ("karna.example", "ws://karna.example"),
        ("192.168.1.7:8000", "http://192.168.1.7:8001"),
    ]
    async with served(allow_host=["karna.example"]) as server:
        for host, origin in same:
            answer = await ask(server.port, DOORS[door]({"Host": host, "Origin": origin}))
            assert answer.status == WELCOMED.get(door, 200), (host, origin)
        for host, origin in other:
            answer = await ask(server.port, DOORS[door]({"Host": host, "Origin": origin}))
            assert answer.status == 403, (host, origin)


BAD_QUERIES = ["token=", "token=wrong", f"Token={TOKEN}", f"token=wrong&token={TOKEN}", "token=%ff"]


async def test_query_token_opens_the_doors_and_a_wrong_one_does_not() -> None:
    async with served(token=TOKEN) as server:
        for query in BAD_QUERIES:
            assert (await ask(server.port, upgrade(f"/ws?{query}"))).status == 401, query
            assert (await ask(server.port, head("GET", f"/metrics?{query}"))).status == 401, query
        assert (await ask(server.port, upgrade(f"/ws?token={TOKEN}"))).status == 101
        assert (await ask(server.port, upgrade(f"/ws/?since=x&token={TOKEN}"))).status == 101
        wrong_header = {"Authorization": "Bearer wrong"}
        assert (await ask(server.port, upgrade(f"/ws?token={TOKEN}", wrong_header))).status == 401


BAD_CONNECTS = [
    b"40/ws,", b"40", b"40/ws,{}", b'40/ws,{"token":null}', b'40/ws,{"token":""}',
    b'40/ws,{"token":"wrong"}', b'40/ws,{"token":["correct-horse"]}', b'40/ws,{"token":1}',
    b'40/ws,{"token":true}', b'40/ws,{"Token":"correct-horse"}',
    b'40/ws,{"token":"correct-hors\xc3\xa9"}',
    b'40/ws,{"token":"\\u0000correct-horse"}',
]  # fmt: skip


async def test_socket_io_token_is_asked_with_every_connect() -> None:
    good = b'{"token":"%b"}' % TOKEN.encode()
    async with served(token=TOKEN) as server:
        async with engine(server.port, connect=None) as peer:
            for connect in BAD_CONNECTS:
                await peer.send(frame(1, connect))
                answer = (await peer.frame()).payload
                prefix = b"44/ws," if b"/ws" in connect else b"44"
                error = json.loads(answer.removeprefix(prefix))
                assert error["data"] == {"code": "unauthorized"} and "token" in error["message"]
            await peer.send(frame(1, b"40/ws," + good))
            assert (await peer.frame()).payload.startswith(b'40/ws,{"sid"')
            await peer.send(frame(1, b"40"))  # another namespace, another CONNECT
            assert (await peer.frame()).payload.startswith(b"44{")
            await peer.send(frame(1, b"41/ws,") + frame(1, b"40/ws,"))
            assert (await peer.frame()).payload.startswith(b"44/ws,{")
        async with engine(server.port, {"Authorization": f"Bearer {TOKEN}"}) as peer:
            await peer.send(frame(1, b"40"))  # the handshake had it: no CONNECT needs it
            assert (await peer.frame()).payload.startswith(b"40{")


async def test_token_split_over_two_headers_gets_nobody_in() -> None:
    """A proxy that checks one of them must not be told apart from us."""
    token = "one, two"  # joined by ", ", as repeated headers are, two halves would make it
    async with served(token=token) as server:
        for door in ("raw", "get", "post", "rpc", "metrics"):
            for split in (["Bearer one", "two"], [f"Bearer {token}", ""], ["", f"Bearer {token}"]):
                answer = await ask(server.port, DOORS[door]({"Authorization": split}))
                assert (answer.status, answer.error["code"]) == (401, "unauthorized"), (door, split)
            answer = await ask(server.port, DOORS[door]({"Authorization": f"Bearer {token}"}))
            assert answer.status == WELCOMED.get(door, 200)
        async with engine(server.port, {"Authorization": ["Bearer one", "two"]}, None) as peer:
            await peer.send(frame(1, b"40/ws,"))
            assert b"unauthorized" in (await peer.frame()).payload


# Headers that decide who may come in, where a body ends or what a connection becomes: the two
# values of one that comes twice must not be read as one, whatever they say.
TWICE: list[tuple[str, list[str], dict[str, int]]] = [
    ("Host", ["localhost", "localhost"], {"raw": 400, "socket.io": 400, "get": 400, "post": 400}),
    ("Origin", ["http://localhost", "http://localhost"], {"raw": 403, "get": 403, "post": 403}),
    ("Content-Length", ["19", "19"], {"post": 400}),
    ("Content-Type", ["application/json", "application/json"], {"post": 415}),
    ("Sec-Fetch-Site", ["cross-site", "cross-site"], {"post": 403}),
    ("Upgrade", ["websocket", "websocket"], {"raw": 426, "socket.io": 426}),
    ("Sec-WebSocket-Version", ["13", "13"], {"raw": 426}),
    ("Sec-WebSocket-Key", ["dGhlIHNhbXBsZSBub25jZQ==", "dGhlIHNhbXBsZSBub25jZQ=="], {"raw": 400}),
]


@pytest.mark.parametrize(("name", "values", "doors"), TWICE, ids=[each[0] for each in TWICE])
async def test_header_that_comes_twice_is_refused(
    name: str, values: list[str], doors: dict[str, int]
) -> None:
    async with served() as server:
        for door, status in doors.items():
            answer = await ask(server.port, DOORS[door]({name: values}))
            assert answer.status == status, (door, answer)


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        ("10.0.0.9", "1.2.3.4", None),  # not from a proxy of ours: anybody's word
        ("10.0.0.1", None, None), ("10.0.0.1", "", None),
        ("10.0.0.1", "1.2.3.4", "1.2.3.4"), ("10.0.0.1", "6.6.6.6, 1.2.3.4", "1.2.3.4"),
        ("10.0.0.1", "6.6.6.6, 1.2.3.4 , 10.0.0.2,10.0.0.1", "1.2.3.4"),
        ("10.0.0.1", "10.0.0.2", None), ("10.0.0.1", "2001:db8::1", "2001:db8::1"),
        ("10.0.0.1", "1.2.3.4, evil\x1b[31m", None), ("10.0.0.1", "1.2.3.4, " + "1" * 50, None),
    ],
)  # fmt: skip
def test_address_behind_a_proxy_is_the_last_that_is_no_proxy_of_ours(
    peer: str, forwarded: str | None, expected: str | None
) -> None:
    config = make_config({"trust_proxy": ["10.0.0.1", "10.0.0.2"]})
    headers = {} if forwarded is None else {"x-forwarded-for": forwarded}
    asked = parse_head(head("GET", "/"))._replace(headers=headers)
    assert forwarded_for(config, peer, asked) == expected
