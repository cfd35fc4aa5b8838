"""`ask`, `do` and `describe` with a real llama.cpp server."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from karna_ws import WebSocketManager
from services import LanguageService, VisionService
from support import Raw, execute, needs, served
from support_llama import ENDLESS, WORDS, LlamaServer, make_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs("xllamacpp", "gguf")
    path = tmp_path_factory.mktemp("llama") / "tiny.gguf"
    make_model(path)
    return path


@pytest.fixture
def llama(model: Path) -> Iterator[LlamaServer]:
    server = LlamaServer(model)
    server.start()
    yield server
    server.kill()


def manager_of(llama: LlamaServer, **options: Any) -> WebSocketManager:
    services = [VisionService(url=llama.url, **options), LanguageService(url=llama.url, **options)]
    return WebSocketManager(services=services)


@pytest.fixture
async def client(llama: LlamaServer) -> AsyncIterator[Raw]:
    async with served(manager_of(llama)) as server, Raw.open(server) as client:
        yield client


async def state_of(client: Raw, service: str) -> Any:
    return (await client.ask("get_status"))["data"][service]


def count_busy_slots(llama: LlamaServer) -> int:
    with urllib.request.urlopen(llama.url + "/slots", timeout=5) as answer:
        return sum(slot["is_processing"] for slot in json.load(answer))


async def test_ask_streams_its_tokens(client: Raw) -> None:
    await client.send(execute("ask what's up", id=1))
    answer = await client.final(1)
    assert answer["data"]["result"] == {"text": WORDS, "model": "tiny"}
    tokens = [each["data"]["progress"]["token"] for each in client.kept
              if each["type"] == "command_progress"]  # fmt: skip
    assert len(tokens) > 2 and "".join(tokens) == WORDS
    assert "model tiny at 127.0.0.1" in (await state_of(client, "language"))["detail"]


async def test_do_runs_the_tool_that_is_chosen(client: Raw) -> None:
    result = await client.run("do tell me what's the time")
    assert (result["text"], result["model"]) == (WORDS, "tiny")
    (step,) = result["steps"]
    assert step["command"] == "time" and step["result"]["utc"].endswith("Z")
    (progress,) = [each for each in client.kept if each["type"] == "command_progress"]
    assert progress["data"]["progress"] == step


async def test_image_for_a_model_that_cannot_see_fails_that_request_alone(client: Raw) -> None:
    image = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAMAAAAFCAYAAACAcVaiAAAAAElFTkSuQmCC"
    error = await client.error_of(execute("describe what's this", image=image))
    assert error["code"] == "command_failed" and "image input is not supported" in error["message"]
    assert (await state_of(client, "vision"))["state"] == "running"
    result = await client.run("do tell me what's this", image=image)
    assert result["text"] == WORDS and len(result["steps"]) == 1


async def test_cancel_frees_the_slot(client: Raw, llama: LlamaServer) -> None:
    await client.send(execute("ask go on forever", id=1))
    token = await client.next_of("command_progress")
    assert token["data"]["progress"]["token"] in ENDLESS
    assert await asyncio.to_thread(count_busy_slots, llama) == 1
    await client.ask("cancel", id=1)
    assert (await client.final(1))["data"]["code"] == "cancelled"
    while await asyncio.to_thread(count_busy_slots, llama):
        await asyncio.sleep(0.01)
    assert await client.run("ask again") == {"text": WORDS, "model": "tiny"}


async def test_server_killed_in_mid_answer_comes_back_with_another_model(
    client: Raw, llama: LlamaServer
) -> None:
    await client.send(execute("ask go on forever", id=1))
    await client.next_of("command_progress")
    await asyncio.to_thread(llama.kill)
    error = (await client.final(1))["data"]
    assert error["code"] == "unavailable" and llama.url[7:] in error["message"]
    assert (await state_of(client, "language"))["state"] == "degraded"
    assert "refused" in (await client.error_of(execute("do tell the time")))["message"]
    await asyncio.to_thread(llama.start, "second")
    assert await client.run("ask hi") == {"text": WORDS, "model": "second"}
    assert "model second at" in (await state_of(client, "language"))["detail"]
    assert (await client.run("do tell the time"))["model"] == "second"


async def test_key_is_asked_for(model: Path) -> None:
    llama = LlamaServer(model)
    await asyncio.to_thread(llama.start, "tiny", "sk-secret")
    try:
        for key, code in [("sk-secret", None), ("sk-wrong", "unavailable")]:
            manager = manager_of(llama, key=key)
            async with served(manager) as server, Raw.open(server) as client:
                if code is None:
                    assert (await client.run("ask hi"))["text"] == WORDS
                else:
                    assert (await client.error_of(execute("ask hi")))["code"] == code
    finally:
        llama.kill()


async def test_ten_at_a_time_and_a_long_answer(client: Raw) -> None:
    for number in range(10):
        await client.send(execute(f"ask number {number}", id=number))
    answers = [await client.final(number) for number in range(10)]
    told = [each["data"].get("result") or each["data"] for each in answers]
    assert told == [{"text": WORDS, "model": "tiny"}] * 10
    await client.send(execute("ask go on forever", id="long"))
    for _ in range(3_000):
        await client.next_of("command_progress")
    await client.ask("cancel", id="long")


async def test_model_that_is_not_listed_is_told(llama: LlamaServer) -> None:
    manager = manager_of(llama, model="other")
    async with served(manager) as server, Raw.open(server) as client:
        language = await state_of(client, "language")
        assert language["state"] == "running"
        assert language["detail"].endswith("is not listed; there are tiny")
