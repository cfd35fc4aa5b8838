"""Commands and services without a server; a model server that misbehaves as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from karna.service import Monitor
from services import CommandProcessor, Context, LanguageService, Service, VisionService
from support import DEADLINE_S
from support_property import st


def keep_line(commands: CommandProcessor, line: str) -> None:
    """As if the line had come again and again."""
    for _ in range(2):
        ready = commands.prepare_plain(line)
        assert ready is not None
        commands._remember(line, ready)
    assert line in commands.prepared


async def run_line(
    commands: CommandProcessor, line: str, context: Context | None = None, **params: Any
) -> Any:
    call = commands.prepare(line, params)
    return await asyncio.wait_for(commands.run(call, context or Context()), DEADLINE_S)


def processor(*functions: Callable[..., Any], **options: Any) -> CommandProcessor:
    commands = CommandProcessor(builtins=False, **options)
    for function in functions:
        commands.command(function)
    return commands


@contextlib.asynccontextmanager
async def monitoring(*watched: Service, **options: Any) -> AsyncIterator[Monitor]:
    """A monitor at 1/500 of its usual speed: 10 ms between checks, 2 ms to the first retry."""
    monitor = Monitor(watched, **{"interval_s": 0.01, "timeout_s": 0.05} | options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("karna.service.RETRY_FIRST_S", 0.002)
        patch.setattr("karna.service.RETRY_MAX_S", 0.02)
        monitor.start()
        try:
            yield monitor
        finally:
            await monitor.stop()


async def hang() -> None:
    await asyncio.Event().wait()


LINE = st.text(st.one_of(st.sampled_from(" \t\r\n\"'\\ab-="), st.characters()), max_size=30)


def any_words(*words: Any) -> Any:
    return list(words)


any_words.__name__ = "any"


def http_answer(
    body: bytes | str,
    *,
    status: str = "200 OK",
    kind: str = "application/json",
    length: int | None = None,
) -> bytes:
    body = body.encode() if isinstance(body, str) else body
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n"
    return head.encode() + body


def events(*values: Any, done: bool = True) -> str:
    lines = [
        f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n" for value in values
    ]
    return ": a comment\n\n" + "".join(lines) + ("data: [DONE]\n\n" if done else "")


def token(text: Any, **more: Any) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}, **more}]}


def chunked(text: str) -> bytes:
    data = text.encode()
    half = len(data) // 2
    parts = b"".join(f"{len(p):x}\r\n".encode() + p + b"\r\n" for p in (data[:half], data[half:]))
    return (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        + parts
        + b"0\r\n\r\n"
    )


MODELS = http_answer(json.dumps({"data": [{"id": "tiny"}, {"id": "other"}]}))
HELLO = chunked(events(token("Hel"), token(None), token("lo"), token("", finish_reason="stop")))


def is_whole(answer: Any) -> bool:
    """May another request follow this answer on its connection?"""
    head, _, body = answer.partition(b"\r\n\r\n") if isinstance(answer, bytes) else (b"",) * 3
    if b"\r\nConnection: close" in head:
        return False
    if b"Transfer-Encoding: chunked" in head:
        return bool(answer.endswith(b"\r\n0\r\n\r\n"))
    length = head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0]
    return length == str(len(body)).encode()


class ModelHost:
    """A little HTTP server that keeps connections: each path has its answer.

    Bytes are sent as they are, None hangs, a list is dripped for ever, a deque gives an answer to
    each request, a function is told the request's JSON and returns the answer's.
    """

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {"/v1/models": MODELS, "/v1/chat/completions": HELLO}
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.connections = 0
        self.writers: set[asyncio.StreamWriter] = set()
        self.asked = asyncio.Event()
        self.lost = asyncio.Event()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.add(writer)
        try:
            while await self._answer(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        except asyncio.CancelledError:  # the test is over; asyncio would log it as an error
            pass
        finally:
            self.lost.set()
            self.writers.discard(writer)
            writer.close()

    def close_all(self) -> None:
        """Close every connection, as a server does with those that are idle."""
        for writer in self.writers:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        self.requests.append((first, headers, body))
        self.asked.set()
        answer = self.answers.get(first.split()[1], http_answer("{}", status="404 Not Found"))
        if isinstance(answer, deque):
            answer = answer.popleft()
        if callable(answer):
            answer = answer(json.loads(body))
            answer = answer if isinstance(answer, bytes) else http_answer(json.dumps(answer))
        if isinstance(answer, bytes):
            writer.write(answer)
            await writer.drain()
        while isinstance(answer, list):
            writer.write(answer[0])
            await writer.drain()
            await asyncio.sleep(0.005)
        if answer is None:
            await reader.read()
        return is_whole(answer)

    @property
    def chats(self) -> list[Any]:
        """What the chat requests asked."""
        return [json.loads(body) for first, _, body in self.requests if "/chat/" in first]


def asking(url: str, **options: Any) -> tuple[LanguageService, CommandProcessor]:
    language, commands = LanguageService(url=url, **options), CommandProcessor()
    language.register(commands)
    return language, commands


def png(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + header + struct.pack(">I", zlib.crc32(header))


def bmp_core(width: int, height: int) -> bytes:
    return b"BM" + bytes(12) + struct.pack("<IHHHH", 12, width, height, 1, 24)


def seeing(**options: Any) -> tuple[VisionService, CommandProcessor]:
    vision, commands = VisionService(**options), CommandProcessor()
    vision.register(commands)
    return vision, commands
