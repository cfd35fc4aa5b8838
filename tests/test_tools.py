"""Commands as tools: what a model is told of progress and results, and a person of a call."""

from __future__ import annotations

import base64
from typing import Any

import orjson
import pytest

from karna.errors import CommandFailed
from karna.tools import MAX_MEDIA_BYTES, content_of, describe_progress, line_of
from services import CommandProcessor, Text
from support_mcp import PNG
from support_property import JSON, PROPERTY, given, settings, st

URL = "data:image/png;base64," + base64.b64encode(PNG).decode()
SOUND = "data:audio/wav;base64,UklGRg=="


@pytest.mark.parametrize(
    ("value", "before", "expected"),
    [
        ("warm", -1.0, {"progress": 1, "message": "warm"}),
        ("warm", 3, {"progress": 4, "message": "warm"}),
        ({"percent": 0}, -1.0, {"progress": 0, "total": 100, "message": '{"percent":0}'}),
        ({"percent": 12.5, "line": "x"}, 10, {"progress": 12.5, "total": 100, "message": "x"}),
        ({"percent": 101}, 10, {"progress": 11, "message": '{"percent":101}'}),
        ({"percent": "9"}, 10, {"progress": 11, "message": '{"percent":"9"}'}),
        ({"percent": True}, 10, {"progress": 11, "message": '{"percent":true}'}),
        ({"token": "a", "n": 1}, 0, {"progress": 1, "message": "a"}),
        ({"message": 5}, 0, {"progress": 1, "message": '{"message":5}'}),
        ([1], 0.5, {"progress": 1, "message": "[1]"}),
        ("x" * 5_000, 0, {"progress": 1, "message": "x" * 1_000}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_progress_rises_and_says_what_is_reported(value: Any, before: float, expected: Any) -> None:
    assert describe_progress(value, before) == expected


def test_progress_rises_even_where_the_percentage_does_not() -> None:
    at = -1.0
    for percent in (0, 0, 50, 50, 20, 100, 100, float("nan"), float("inf"), -1):
        report = describe_progress({"percent": percent}, at)
        assert report["progress"] > at
        at = report["progress"]


def test_progress_that_json_cannot_hold_is_refused() -> None:
    with pytest.raises(CommandFailed):
        describe_progress({1, 2}, 0)


@PROPERTY
@given(JSON)
def test_any_json_is_content(value: Any) -> None:
    result = orjson.loads(orjson.dumps(content_of(value)))
    (text,) = [each["text"] for each in result["content"] if each["type"] == "text"]
    if isinstance(value, str):
        assert text == value
    elif value is not None:
        assert orjson.loads(text) == value
        assert result["structuredContent"] == (value if type(value) is dict else {"result": value})


def test_images_and_sounds_are_content_of_their_own() -> None:
    image = {"type": "image", "data": base64.b64encode(PNG).decode(), "mimeType": "image/png"}
    sound = {"type": "audio", "data": "UklGRg==", "mimeType": "audio/wav"}
    assert content_of(PNG) == content_of(bytearray(PNG)) == content_of(URL) == {"content": [image]}
    assert content_of(SOUND) == {"content": [sound]}
    text = {"type": "text", "text": '["a","[image]","[audio]"]'}
    assert content_of(["a", URL, SOUND])["content"] == [text, image, sound]
    both = content_of({"b": PNG, "c": {"not looked into": 1}})
    assert both["content"][1:] == [image]


@pytest.mark.parametrize(
    "text",
    ["data:image/svg+xml;base64,PHN2Zy8+", "data:image/png;base64,!", "data:image/png", "data:audio/wav,x",
     "data:text/plain;base64,eA==", "data:"],
)  # fmt: skip
def test_text_that_is_no_image_stays_text(text: str) -> None:
    assert content_of(text) == {"content": [{"type": "text", "text": text}]}


def test_image_that_is_too_long_is_told() -> None:
    for value in (
        b"x" * (MAX_MEDIA_BYTES + 1),
        "data:image/png;base64," + "A" * 2 * MAX_MEDIA_BYTES,
    ):
        (content,) = content_of(value)["content"]
        assert content["type"] == "text" and "too long for a model" in content["text"]


@pytest.mark.parametrize("value", [b"no image", {"a": b"no image"}, {1}, object(), "\ud800", 2**70])
def test_what_json_cannot_hold_is_refused(value: Any) -> None:
    with pytest.raises(TypeError):
        orjson.dumps(content_of(value))


def lines() -> CommandProcessor:
    commands = CommandProcessor(builtins=False)

    @commands.command
    def move(
        x: int, y: float = 0.5, *tags: str | None, fast: bool = False, to: str = ""
    ) -> Any: ...

    @commands.command
    def say(minutes: int, text: Text = "", *, by: str = "", loud: bool = True) -> Any: ...

    @commands.command
    def free(what: Any, **more: Any) -> Any: ...

    return commands


LINES: list[tuple[str, dict[str, Any], str]] = [
    ("move", {"x": 3}, "move 3"),
    ("move", {"x": 3, "tags": ["a", "b c"], "fast": True}, "move --fast 3 0.5 a 'b c'"),
    ("move", {"x": 3, "y": 1, "to": "it's", "fast": False}, "move --no-fast --to 'it'\"'\"'s' 3 1"),
    ("say", {"minutes": 5, "text": "it's \"late\""}, "say 5 it's \"late\""),
    ("say", {"minutes": 5, "text": "'quoted'"}, "say 5 \"'quoted'\""),
    ("say", {"minutes": 5, "text": "-- a \\ \""}, 'say 5 "-- a \\\\ \\""'),
    ("say", {"minutes": 5, "text": "a --by b", "loud": False}, 'say --no-loud 5 "a --by b"'),
    ("say", {"minutes": 5, "text": " a "}, 'say 5 " a "'),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "line"), LINES)
def test_line_of_a_call_is_what_a_person_would_type(
    name: str, arguments: dict[str, Any], line: str
) -> None:
    commands = lines()
    command = commands.commands[name]
    assert line_of(command, arguments) == line
    typed = commands.prepare(line)
    assert (typed.args, typed.kwargs) == command.bind([], arguments)


def test_line_of_a_call_hides_nothing() -> None:
    free = lines().commands["free"]
    assert line_of(free, {"what": {"a": [1, None]}, "x": 2}) == "free '{\"a\": [1, null]}' --x=2"
    assert line_of(free, {"what": "a\n\u202eb\x00\ud800"}) == "free 'a\\n\\u202eb\\x00?'"
    assert len(line_of(free, {"what": "x" * 10_000})) == 10_005


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_any_text_that_prints_can_be_typed_again(text: str) -> None:
    if text.isprintable() and text.strip():
        commands = lines()
        line = line_of(commands.commands["say"], {"minutes": 1, "text": text})
        assert commands.prepare(line).args == [1, text]
