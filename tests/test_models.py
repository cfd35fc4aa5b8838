"""The client of OpenAI-compatible servers, asked through `ask`."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import socket
from typing import Any

import pytest

from karna.errors import CommandTimeout
from services import CommandFailed, Context, LanguageService, Unavailable, VisionService
from support import DEADLINE_S, until
from support_commands import (
    HELLO,
    MODELS,
    ModelHost,
    asking,
    chunked,
    events,
    http_answer,
    monitoring,
    run_line,
    token,
)


async def test_ask_streams_tokens(host: Any) -> None:
    for suffix in ["", "/", "/v1", "/v1/"]:
        language, commands = asking(host.url + suffix)
        await language.check()
        assert (language.state, language.detail) == (
            "running",
            f"model tiny at 127.0.0.1:{host.port}",
        )
        seen: list[Any] = []
        result = await run_line(commands, "ask who are you", Context(None, seen.append))
        assert result == {"text": "Hello", "model": "tiny"} and seen == [
            {"token": "Hel"},
            {"token": "lo"},
        ]
    first, headers, body = host.requests[-1]
    assert first == "POST /v1/chat/completions HTTP/1.1" and "authorization" not in headers
    assert json.loads(body) == {
        "model": "tiny",
        "stream": True,
        "messages": [{"role": "user", "content": "who are you"}],
    }


async def test_ask_finds_model_itself_or_takes_configured_one(host: Any) -> None:
    _, commands = asking(host.url)
    assert (await run_line(commands, "ask hi"))["model"] == "tiny"
    language, commands = asking(host.url, model="mine")
    assert (await run_line(commands, "ask hi"))["model"] == "mine"
    assert "model mine at" in language.detail
    await language.check()
    assert "model mine at" in language.detail


async def test_ask_takes_plain_json_and_lone_surrogates(host: Any) -> None:
    _, commands = asking(host.url)
    host.answers["/v1/chat/completions"] = http_answer(
        json.dumps({"choices": [{"message": {"content": "a\ud800b"}}]})
    )
    assert (await run_line(commands, "ask hi"))["text"] == "a?b"


async def test_ask_ends_at_finish_reason_without_done(host: Any) -> None:
    _, commands = asking(host.url)
    text = events(
        token("a"), token("", finish_reason="stop"), {"choices": [], "usage": {}}, done=False
    )
    host.answers["/v1/chat/completions"] = http_answer(
        text, kind="text/event-stream; charset=utf-8"
    )
    assert (await run_line(commands, "ask hi"))["text"] == "a"


STREAM_TYPE = "text/event-stream"


MISBEHAVIOURS: dict[str, tuple[Any, str]] = {
    "closes at once": (b"", "cannot be reached|makes no sense"),
    "speaks another protocol": (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "makes no sense"),
    "hangs": (None, "no answer within"),
    "HTTP 500": (http_answer("boom", status="500 Oops"), "HTTP 500"),
    "HTTP 404 with message": (
        http_answer('{"error":{"message":"no such model"}}', status="404 Not Found"),
        "HTTP 404: no such model",
    ),
    "redirect": (
        b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
        "HTTP 302",
    ),
    "HTML": (http_answer("<html>hello</html>", kind="text/html"), "makes no sense"),
    "not JSON": (http_answer("{nope"), "not JSON"),
    "wrong JSON": (http_answer("[1]"), "makes no sense"),
    "no models": (http_answer('{"data": [{"id": 5}]}'), "lists no model"),
    "deep JSON": (http_answer("[" * 100_000), "not JSON"),
    "error in a 200": (http_answer('{"error": "overloaded"}'), "overloaded|no list of models"),
    "body breaks off": (http_answer('{"data": []}', length=1_000), "broke off"),
    "huge body": (http_answer(b" " * (5 * 1024 * 1024)), "longer than"),
    "huge header": (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", "makes no sense"),
    "broken chunk": (
        f"HTTP/1.1 200 OK\r\nContent-Type: {STREAM_TYPE}\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc".encode(),
        "broke off|not JSON|makes no sense",
    ),
}


STREAM_MISBEHAVIOURS: dict[str, tuple[Any, str]] = {
    "endless line": (http_answer(b"data: " + b"x" * 400_000, kind=STREAM_TYPE), "too long"),
    "event not JSON": (http_answer(events("{nope"), kind=STREAM_TYPE), "not JSON"),
    "event wrong": (http_answer(events("[]"), kind=STREAM_TYPE), "no choices"),
    "choice wrong": (http_answer(events({"choices": [1]}), kind=STREAM_TYPE), "without text"),
    "text wrong": (http_answer(events(token(["x"])), kind=STREAM_TYPE), "without text"),
    "error event": (http_answer(events(token("a"), {"error": {"message": "out of memory"}}), kind=STREAM_TYPE), "out of memory"),
    "breaks off": (http_answer(events(token("a"), done=False), kind=STREAM_TYPE), "broke off"),
    "chunk breaks off": (HELLO[: len(HELLO) // 2], "broke off"),
    "too many bytes": (http_answer((events(token("x" * 1000), done=False) * 4_500), kind=STREAM_TYPE), "too long"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISBEHAVIOURS)
async def test_check_degrades_when_endpoint_misbehaves_and_recovers(
    name: str, host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("karna.models.MODEL_CHECK_S", 0.3)
    language, _ = asking(host.url)
    answer, problem = MISBEHAVIOURS[name]
    host.answers["/v1/models"] = answer
    with pytest.raises(Unavailable, match=problem) as caught:
        await language.check()
    assert (language.state, language.detail) == ("degraded", str(caught.value))
    assert (
        f"model server 127.0.0.1:{host.port}: " in language.detail and "\n" not in language.detail
    )
    host.answers["/v1/models"] = MODELS
    await language.check()
    assert language.state == "running"


@pytest.mark.parametrize("name", MISBEHAVIOURS | STREAM_MISBEHAVIOURS)
async def test_ask_is_unavailable_when_endpoint_misbehaves_and_recovers(
    name: str, host: Any
) -> None:
    language, commands = asking(host.url, timeout_s=0.3)
    await language.check()
    answer, problem = (MISBEHAVIOURS | STREAM_MISBEHAVIOURS)[name]
    host.answers["/v1/chat/completions"] = answer
    with pytest.raises(Unavailable, match=problem + "|makes no sense"):
        await run_line(commands, "ask hi")
    assert language.state == "degraded"
    host.answers["/v1/chat/completions"] = HELLO
    assert (await run_line(commands, "ask hi"))["text"] == "Hello"
    assert language.state == "running"


async def test_ask_blames_request_that_server_refuses(host: Any) -> None:
    language, commands = asking(host.url)
    await language.check()
    host.answers["/v1/chat/completions"] = http_answer(
        '{"error":{"message":"prompt too long"}}', status="400 Bad Request"
    )
    with pytest.raises(CommandFailed, match="HTTP 400: prompt too long"):
        await run_line(commands, "ask hi")
    assert language.state == "running"


async def test_endpoint_that_is_away_degrades_until_it_is_back() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    language, commands = asking(f"http://127.0.0.1:{port}/v1")
    changed: asyncio.Queue[str] = asyncio.Queue()
    language.on_change = lambda service: changed.put_nowait(service.state)
    async with monitoring(language, timeout_s=5.0):
        assert await changed.get() == "degraded" and "Connection refused" in language.detail
        with pytest.raises(Unavailable, match="Connection refused"):
            await run_line(commands, "ask hi")
        server = await asyncio.start_server(ModelHost().handle, "127.0.0.1", port)
        assert await changed.get() == "running"
        server.close()


async def test_drip_of_bytes_ends_with_time_limit(host: Any) -> None:
    _, commands = asking(host.url)
    host.answers["/v1/chat/completions"] = [b"H"]
    commands.timeout_s = 0.1
    with pytest.raises(CommandTimeout):
        await run_line(commands, "ask hi")
    await asyncio.wait_for(host.lost.wait(), DEADLINE_S)


async def test_cancelling_ask_closes_its_socket_and_frees_its_thread(host: Any) -> None:
    language, commands = asking(host.url)
    await language.check()
    host.answers["/v1/chat/completions"] = None
    host.asked.clear()
    host.lost.clear()
    task = asyncio.ensure_future(run_line(commands, "ask hi"))
    await host.asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(host.lost.wait(), DEADLINE_S)
    pool = language.server._requests  # type: ignore[union-attr]
    await until(lambda: pool._idle == pool._threads)
    assert language.state == "running"


async def test_key_is_sent_and_never_shown(
    host: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-fallback")
    monkeypatch.setenv("KARNA_LANGUAGE_KEY", " sk-secret\n")
    language, commands = asking(host.url.replace("//", "//user:pa%24s@"))
    await language.check()
    assert host.requests[-1][1]["authorization"] == "Bearer sk-secret"
    host.answers["/v1/chat/completions"] = http_answer(
        '{"error":"bad key sk-secret"}', status="401 No"
    )
    with pytest.raises(Unavailable, match=r"bad key \*\*\*") as caught:
        await run_line(commands, "ask hi")
    for secret in ["sk-secret", "pa%24s", "pa$s", "user"]:
        assert secret not in caplog.text + str(caught.value) + str(language.get_status())
    assert VisionService(url=host.url).server.headers["Authorization"] == "Bearer sk-fallback"  # type: ignore[union-attr]


async def test_user_and_password_are_sent_when_there_is_no_key(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ["OPENAI_API_KEY", "KARNA_LANGUAGE_KEY"]:
        monkeypatch.delenv(name, raising=False)
    language, _ = asking(host.url.replace("//", "//user:pa%24s@"))
    await language.check()
    assert (
        host.requests[-1][1]["authorization"] == "Basic " + base64.b64encode(b"user:pa$s").decode()
    )


BAD_URLS = [
    "localhost:11434",
    "ftp://x",
    "http://",
    "http://x:port",
    "http://x:99999",
    "http://x/a b",
    "http://x/\r\nX: y",
    "http://é/",
]


@pytest.mark.parametrize("url", BAD_URLS)
def test_model_server_refuses_unusable_url(url: str) -> None:
    with pytest.raises(ValueError, match=r"URL|[Pp]ort"):
        LanguageService(url=url)


def test_model_server_refuses_key_no_header_can_hold() -> None:
    with pytest.raises(ValueError, match="key has characters") as caught:
        LanguageService(url="http://localhost", key="sk-sec\r\nret")
    assert "sk-sec" not in str(caught.value)


async def test_model_server_uses_no_proxy(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    language, _ = asking(host.url)
    await language.check()
    assert language.state == "running"


async def test_ask_ends_at_done_without_a_finish_reason(host: Any) -> None:
    """As some servers end a stream that a stop word of theirs cut."""
    _, commands = asking(host.url)
    host.answers["/v1/chat/completions"] = chunked(events(token("Hel"), token("lo")))
    seen: list[Any] = []
    assert (await run_line(commands, "ask hi", Context(None, seen.append)))["text"] == "Hello"
    assert seen == [{"token": "Hel"}, {"token": "lo"}]
    # What follows [DONE] is not read.
    text = events(token("a")) + events("{nope")
    host.answers["/v1/chat/completions"] = http_answer(text, kind=STREAM_TYPE)
    assert (await run_line(commands, "ask hi"))["text"] == "a"


CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n"
TEXT = b'{"choices":[{"message":{"content":"x"}}]}'
ENDLESS: dict[str, tuple[bytes, bytes]] = {  # what it begins with, and repeats
    "heads": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
    "trailers": (
        CHUNKED % b"application/json" + b"%x\r\n" % len(TEXT) + TEXT + b"\r\n0\r\n",
        b"X: y\r\n" * 1000,
    ),
    "chunk extensions": (CHUNKED % STREAM_TYPE.encode(), b"1;" + b"x" * 50_000 + b"\r\n:\r\n"),
    "comments": (CHUNKED % STREAM_TYPE.encode(), b"2000\r\n" + b": a comment\n\n\n\n\n" * 512 + b"\r\n"),
    "tokens": (http_answer("", kind=STREAM_TYPE, length=10**9), events(token("x" * 900), done=False).encode()),
}  # fmt: skip


class EndlessHost:
    """A model server whose answer never ends; how much of it was taken."""

    def __init__(self, begin: bytes, repeated: bytes) -> None:
        self.begin, self.repeated, self.sent = begin, repeated, 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(self.begin)
            while True:
                writer.write(self.repeated)
                await writer.drain()
                self.sent += len(self.repeated)
        writer.close()


@pytest.mark.parametrize("name", ENDLESS)
async def test_answer_that_never_ends_is_given_up_after_some_bytes(name: str) -> None:
    endless = EndlessHost(*ENDLESS[name])
    server = await asyncio.start_server(endless.handle, "127.0.0.1", 0)
    _, commands = asking(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", model="tiny")
    with pytest.raises(Unavailable, match="longer than 4 MiB"):
        await run_line(commands, "ask hi")
    assert endless.sent < 16 * 1024 * 1024  # 4 MiB, and what the kernel holds
    server.close()


@pytest.mark.parametrize("name", ["x" * 1_000_000, "lone \ud800", "two\nlines", ""])
async def test_model_name_that_nobody_could_be_told_is_not_taken(name: str, host: Any) -> None:
    host.answers["/v1/models"] = http_answer(json.dumps({"data": [{"id": name}]}))
    _, commands = asking(host.url)
    with pytest.raises(Unavailable, match="lists no model|longer than"):
        await run_line(commands, "ask hi")
    host.answers["/v1/models"] = http_answer(json.dumps({"data": [{"id": name}, {"id": "tiny"}]}))
    if len(name) < 1000:
        assert (await run_line(commands, "ask hi"))["model"] == "tiny"


async def test_json_too_long_to_be_parsed_while_others_wait_is_not(host: Any) -> None:
    _, commands = asking(host.url, model="tiny")
    many = "[" + "[]," * 700_000 + "[]]"
    host.answers["/v1/chat/completions"] = http_answer(many)
    with pytest.raises(Unavailable, match="longer than 1 MiB"):
        await run_line(commands, "ask hi")
