"""The client of OpenAI-compatible servers, asked through `ask`."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import socket
from collections import deque
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
    png,
    run_line,
    seeing,
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
    # http.client has limits of its own, from Python 3.14 on.
    with pytest.raises(Unavailable, match="longer than 4 MiB|more than 100"):
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


# ---- habits of servers ------------------------------------------------------------------------


def in_chunks(text: str, size: int) -> bytes:
    """A stream whose chunks end anywhere, in the middle of a character too."""
    data = text.encode()
    parts = [data[at : at + size] for at in range(0, len(data), size)]
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    return head + b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in parts) + b"0\r\n\r\n"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
async def test_stream_cut_anywhere_is_put_together(size: int, host: Any) -> None:
    _, commands = asking(host.url)
    text = 'data: {"choices":[{"delta":{"content":"Grüße 🎈"}}]}\r\n\r\ndata:[DONE]\r\n\r\n'
    host.answers["/v1/chat/completions"] = in_chunks(": still here\n\n" * 3 + text, size)
    for _ in range(2):
        assert (await run_line(commands, "ask hi"))["text"] == "Grüße 🎈"
    assert host.connections == 1


async def test_slow_first_token_is_waited_for_while_comments_come() -> None:
    """Silence may last 0.2 s; 20 comments, 15 ms apart, are longer than that together."""

    async def slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
        )
        for _ in range(20):
            writer.write(b": keep-alive\n\n")
            await asyncio.sleep(0.015)
        writer.write(events(token("slow")).encode())
        writer.close()

    server = await asyncio.start_server(slowly, "127.0.0.1", 0)
    _, commands = asking(
        f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", model="tiny", timeout_s=0.2
    )
    assert (await run_line(commands, "ask hi"))["text"] == "slow"
    server.close()


def test_silence_is_bounded_by_the_command_s_own_limit_first() -> None:
    server: Any = LanguageService(url="http://localhost").server
    assert server.timeout_s >= 60, "a large model reads for long before its first token"


STREAM_ERRORS: dict[str, tuple[Any, type[Exception], str]] = {
    "an event": ({"error": {"message": "out of memory"}}, Unavailable, "out of memory"),
    "an event with a code": ({"error": {"code": 400, "message": "too long"}}, CommandFailed, "HTTP 400: too long"),
    "an object": ({"object": "error", "message": "no luck", "code": 500}, Unavailable, "no luck"),
    "a line of its own": ('x\nerror: {"message": "no slot"}', Unavailable, "no slot"),
}  # fmt: skip


@pytest.mark.parametrize("name", STREAM_ERRORS)
async def test_error_in_the_middle_of_a_stream_ends_it(name: str, host: Any) -> None:
    event, kind, problem = STREAM_ERRORS[name]
    language, commands = asking(host.url)
    text = events(token("a"), done=False)
    text += events(event) if isinstance(event, dict) else event.partition("\n")[2] + "\n\n"
    host.answers["/v1/chat/completions"] = http_answer(text, kind=STREAM_TYPE)
    seen: list[Any] = []
    with pytest.raises(kind, match=problem):
        await run_line(commands, "ask hi", Context(None, seen.append))
    assert seen == [{"token": "a"}]
    assert language.state == ("running" if kind is CommandFailed else "degraded")


NO_IMAGES = {
    "llama.cpp": ("500 Oops", "image input is not supported - hint: you may need the mmproj"),
    "vLLM": ("400 Bad Request", "tiny is not a multimodal model"),
    "Ollama": ("500 Oops", "this model is missing data required for image input"),
}


@pytest.mark.parametrize("name", NO_IMAGES)
async def test_image_for_a_model_that_cannot_see_is_that_request_s_failure(
    name: str, host: Any
) -> None:
    status, text = NO_IMAGES[name]
    vision, commands = seeing(url=host.url)
    await vision.check()
    answer = http_answer(json.dumps({"error": {"message": text}}), status=status)
    host.answers["/v1/chat/completions"] = answer
    with pytest.raises(CommandFailed, match="the model takes no images") as caught:
        await run_line(commands, "describe what's this", image=png(3, 5))
    assert text in str(caught.value) and vision.state == "running"
    # The same of a request that had no image, or as another status, is the server's trouble.
    _, commands = asking(host.url)
    if status.startswith("500"):
        with pytest.raises(Unavailable):
            await run_line(commands, "ask hi")
    answer = http_answer(json.dumps({"error": {"message": text}}), status="503 Busy")
    host.answers["/v1/chat/completions"] = answer
    vision, commands = seeing(url=host.url)
    with pytest.raises(Unavailable):
        await run_line(commands, "describe", image=png(3, 5))
    assert vision.state == "degraded"


async def test_model_that_is_not_listed_is_warned_of(
    host: Any, caplog: pytest.LogCaptureFixture
) -> None:
    language, commands = asking(host.url, model="mine")
    for _ in range(3):
        await language.check()
    place = f"model mine at 127.0.0.1:{host.port} is not listed; there are tiny, other"
    assert (language.state, language.detail) == ("running", place)
    await run_line(commands, "ask hi")
    assert language.detail == place
    warnings = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert warnings == ["service language: model mine is not listed; there are tiny, other"]
    host.answers["/v1/models"] = http_answer('{"data": [{"id": "mine:latest"}]}')
    await language.check()
    assert language.detail == f"model mine at 127.0.0.1:{host.port}"
    host.answers["/v1/models"] = http_answer('{"data": []}')
    await language.check()
    assert language.detail.endswith("is not listed; there are none")


async def test_server_that_came_back_with_another_model_is_asked_for_its_name(host: Any) -> None:
    language, commands = asking(host.url)
    assert (await run_line(commands, "ask hi"))["model"] == "tiny"
    host.answers["/v1/chat/completions"] = b""
    with pytest.raises(Unavailable):
        await run_line(commands, "ask hi")
    host.answers["/v1/chat/completions"] = HELLO
    host.answers["/v1/models"] = http_answer('{"data": [{"id": "second"}]}')
    assert (await run_line(commands, "ask hi"))["model"] == "second"
    assert "model second at" in language.detail


async def test_answer_shows_its_model_though_another_request_failed_meanwhile(host: Any) -> None:
    language, commands = asking(host.url)
    await language.check()
    failing = asyncio.Event()

    async def slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if b"fail" in head + await reader.read(1000):
            failing.set()
        else:
            await failing.wait()
            await until(lambda: language.state == "degraded")
            writer.write(HELLO)
        writer.close()

    server = await asyncio.start_server(slowly, "127.0.0.1", 0)
    language.server._address = server.sockets[0].getsockname()[:2]  # type: ignore[union-attr]
    language.server.close()  # type: ignore[union-attr]
    good = asyncio.ensure_future(run_line(commands, "ask hi"))
    with pytest.raises(Unavailable):
        await run_line(commands, "ask fail")
    assert (await good)["model"] == "tiny" and "model tiny at" in language.detail
    server.close()


# ---- kept connections -------------------------------------------------------------------------


async def test_connection_is_kept_for_the_next_request(host: Any) -> None:
    language, commands = asking(host.url)
    for _ in range(5):
        await language.check()
        await run_line(commands, "ask hi")
    assert host.connections == 1 and len(host.requests) == 10
    await asyncio.gather(*[run_line(commands, "ask hi") for _ in range(12)])
    idle: Any = language.server.idle  # type: ignore[union-attr]
    assert 1 <= len(idle._kept) <= 4
    await language.stop()
    assert not idle._kept


async def test_connection_that_the_server_closed_is_not_used(host: Any) -> None:
    _, commands = asking(host.url, model="tiny")
    for count in range(1, 4):
        assert (await run_line(commands, "ask hi"))["text"] == "Hello"
        assert host.connections == count
        host.lost.clear()
        host.close_all()
        await asyncio.wait_for(host.lost.wait(), DEADLINE_S)


@pytest.mark.parametrize("way", ["before it is sent", "when it was sent"])
async def test_request_to_a_kept_connection_that_ends_without_a_byte_is_sent_again_once(
    way: str, host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    language, commands = asking(host.url, model="tiny")
    await run_line(commands, "ask hi")
    if way == "before it is sent":  # it looked alive
        monkeypatch.setattr("karna.models._has_news", lambda sock: sock.shutdown(socket.SHUT_WR))
    else:
        host.answers["/v1/chat/completions"] = deque([b"", HELLO])
    assert (await run_line(commands, "ask hi"))["text"] == "Hello"
    assert host.connections == 2 and language.state == "running"
    # A server that falls with the request is not asked a third time; nor is a new connection's
    # request sent again.
    count = len(host.requests)
    monkeypatch.setattr("karna.models._has_news", lambda sock: False)
    host.answers["/v1/chat/completions"] = b""
    with pytest.raises(Unavailable):
        await run_line(commands, "ask hi")
    assert len(host.requests) == count + 2 and language.state == "degraded"
    with pytest.raises(Unavailable):
        await run_line(commands, "ask hi")
    assert len(host.requests) == count + 3


@pytest.mark.parametrize("way", ["idle too long", "not all read", "the server says close"])
async def test_connection_is_not_kept(way: str, host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, commands = asking(host.url, model="tiny")
    if way == "idle too long":
        monkeypatch.setattr("karna.models.MAX_IDLE_S", 0.0)
    elif way == "not all read":
        text = events(token("Hello")) + "data: more\n\n" * 200
        host.answers["/v1/chat/completions"] = http_answer(text, kind=STREAM_TYPE)
    else:
        closing = HELLO.replace(b"Content-Type", b"Connection: close\r\nContent-Type")
        host.answers["/v1/chat/completions"] = closing
    for _ in range(2):
        assert (await run_line(commands, "ask hi"))["text"] == "Hello"
    assert host.connections == 2


async def test_no_client_holds_all_requests_to_a_model_server(host: Any) -> None:
    """Of 16 at a time one owner has 4; another's is answered meanwhile."""
    _, commands = asking(host.url, model="tiny")
    host.answers["/v1/chat/completions"] = None
    greedy = object()
    lines = [
        asyncio.ensure_future(run_line(commands, "ask x", Context(owner=greedy))) for _ in range(20)
    ]
    await until(lambda: len(host.requests) == 4)
    host.answers["/v1/chat/completions"] = HELLO
    assert (await run_line(commands, "ask hi", Context(owner=object())))["text"] == "Hello"
    assert len(host.requests) == 5
    for line in lines:
        line.cancel()
    await asyncio.gather(*lines, return_exceptions=True)
