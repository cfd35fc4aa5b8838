"""The service classes of services.py: the built-in commands, describe, interpret."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from typing import Any

import pytest

from karna.errors import UnknownCommand
from services import (
    Command,
    CommandFailed,
    CommandProcessor,
    Context,
    LanguageService,
    Unavailable,
    UsageError,
    VisionService,
)
from support_commands import bmp_core, png, run_line, seeing
from support_property import given, settings, st


async def test_builtin_help_lists_and_explains() -> None:
    commands = CommandProcessor()
    listed = commands.call_inline(commands.prepare("help"))["commands"]
    assert [each["name"] for each in listed] == ["countdown", "echo", "help", "time"]
    assert {tuple(each) for each in listed} == {
        ("name", "usage", "summary", "aliases", "arguments")
    }
    one = commands.call_inline(commands.prepare("help echo"))
    assert (one["usage"], one["help"]) == ("echo TEXT...", "Answer with the text.")
    with pytest.raises(UnknownCommand) as caught:
        commands.call_inline(commands.prepare("help ehco"))
    assert caught.value.data["suggestions"] == ["echo"]


async def test_builtin_time_tells_utc() -> None:
    commands = CommandProcessor()
    told = commands.call_inline(commands.prepare("time"))
    assert abs(told["unix"] - time.time()) < 5 and told["utc"].endswith("Z")


async def test_builtin_countdown_reports_and_is_bounded() -> None:
    commands, seen = CommandProcessor(), []
    assert await run_line(commands, "countdown 0.05", Context(None, seen.append)) == {
        "remaining": 0,
        "percent": 100,
    }
    assert seen == [{"remaining": 0.05, "percent": 0}, {"remaining": 0, "percent": 100}]
    assert await run_line(commands, "countdown 0") == {"remaining": 0, "percent": 100}
    for seconds in ["-1", "3601"]:
        with pytest.raises(UsageError, match="0 to 3600; usage: countdown SECONDS"):
            await run_line(commands, f"countdown {seconds}")


async def test_ask_without_model_server_says_how_to_configure_one() -> None:
    language, vision = LanguageService(), VisionService()
    commands = CommandProcessor()
    language.register(commands)
    await asyncio.gather(language.start(), vision.start(), language.check(), vision.check())
    assert (language.state, vision.state) == ("running", "running")
    assert vision.detail == "embedded: reads image headers" and "embedded" in language.detail
    with pytest.raises(Unavailable, match="--language-url URL .or KARNA_LANGUAGE_URL"):
        await run_line(commands, "ask hi")


PICTURE = bmp_core(1018, 65_535)  # its base64 has both + and /
ENCODED = base64.b64encode(PICTURE).decode()


WAYS = {
    "bytes": PICTURE,
    "bytearray": bytearray(PICTURE),
    "base64": ENCODED,
    "unpadded": ENCODED.rstrip("="),
    "URL-safe": ENCODED.replace("+", "-").replace("/", "_"),
    "with blanks": " " + "\r\n".join(ENCODED[i : i + 7] for i in range(0, len(ENCODED), 7)) + "\t",
    "data URL": f"data:image/bmp;base64,{ENCODED}",
    "data URL in capitals": f"DATA:image/bmp;charset=x;BASE64,{ENCODED}",
}


def test_picture_of_these_tests_needs_both_special_characters() -> None:
    assert "/" in ENCODED and "+" in ENCODED
    assert ENCODED.endswith("=")


@pytest.mark.parametrize("way", WAYS)
async def test_describe_takes_image_in_every_way(way: str) -> None:
    _, commands = seeing()
    assert await run_line(commands, "describe", image=WAYS[way]) == {
        "format": "bmp", "width": 1018, "height": 65_535, "bytes": len(PICTURE), "embedded": True}  # fmt: skip


async def test_describe_refuses_missing_and_broken_images(monkeypatch: pytest.MonkeyPatch) -> None:
    _, commands = seeing()
    assert commands.commands["describe"].usage == "describe [QUESTION]... [--image IMAGE]"
    for params in [{}, {"image": ""}, {"image": None}, {"image": b""}, {"image": 5}]:
        with pytest.raises(UsageError, match="usage: describe"):
            await run_line(commands, "describe", **params)
    for image, problem in [
        ("!!!!", "not valid base64"),
        ("AAAAA", "not valid base64"),
        ("é", "not valid base64"),
        ("data:image/png", "no comma"),
        ("data:image/png,%89PNG", "not base64"),
        ("AAAA", "is no PNG"),
    ]:
        with pytest.raises(CommandFailed, match=problem):
            await run_line(commands, "describe", image=image)
    monkeypatch.setattr("karna.images.MAX_IMAGE_BYTES", 20)
    for image in [PICTURE, ENCODED]:
        with pytest.raises(CommandFailed, match="longer than"):
            await run_line(commands, "describe", image=image)


async def test_describe_asks_model_and_adds_header_facts(host: Any) -> None:
    vision, commands = seeing(url=host.url)
    result = await run_line(commands, "describe what is this", image=png(3, 5))
    assert result == {
        "format": "png",
        "width": 3,
        "height": 5,
        "bytes": 33,
        "text": "Hello",
        "model": "tiny",
    }
    text, image = json.loads(host.requests[-1][2])["messages"][0]["content"]
    assert text == {"type": "text", "text": "what is this"}
    assert (
        image["image_url"]["url"] == "data:image/png;base64," + base64.b64encode(png(3, 5)).decode()
    )
    assert vision.state == "running"


async def test_describe_leaves_command_of_that_name_alone() -> None:
    commands = CommandProcessor()
    commands.add(Command(lambda: "mine", name="describe"))
    commands.add(Command(lambda: "mine", name="ask"))
    VisionService().register(commands)
    LanguageService().register(commands)
    assert await run_line(commands, "describe") == await run_line(commands, "ask") == "mine"
    assert "interpret" in commands.commands


def speaking() -> CommandProcessor:
    commands = CommandProcessor()
    for service in (LanguageService(), VisionService()):
        service.register(commands)
    return commands


SAYINGS = [
    ("what time is it", "time"),
    ("please count down five seconds", "countdown"),
    ("describe this picture", "describe"),
    ("help", "help"),
    ("HELP me", "help"),
    ("ecoh hello", "echo"),
    ("which jpeg or png image is this", "describe"),
    ("ask the model", "ask"),
]


@pytest.mark.parametrize(("text", "command"), SAYINGS)
def test_interpret_finds_nearest_command(text: str, command: str) -> None:
    commands = speaking()
    answer = commands.call_inline(commands.prepare(f"interpret {text}"))
    assert answer["text"] == text and answer["matches"][0]["command"] == command
    scores = [match["score"] for match in answer["matches"]]
    assert scores == sorted(scores, reverse=True) and all(0 < score <= 1 for score in scores)
    assert answer["matches"][0]["usage"] == commands.commands[command].usage
    assert answer == commands.call_inline(commands.prepare(f"interpret {text}"))


def test_interpret_of_nonsense_matches_nothing() -> None:
    commands = speaking()
    assert commands.call_inline(commands.prepare("interpret zzz qqq"))["matches"] == []
    assert LanguageService().interpret("help") == {"text": "help", "matches": []}


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=80))
def test_interpret_never_raises(text: str) -> None:
    assert len(SPEAKING.interpret(text)["matches"]) <= 5


SPEAKING = LanguageService()


def test_interpret_is_bounded_in_time() -> None:
    text = "abcdefg hcount ecoh " * 50_000
    began = time.process_time()
    SPEAKING.interpret(text)
    assert time.process_time() - began < 0.3
