"""Commands as tools of a model: what a model is told of them, and of what they gave.

Pure: values in, plain objects out. Used by mcp and choose.
"""

from __future__ import annotations

import base64
import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from orjson import Fragment

from karna.command import Command
from karna.envelopes import NOT_JSON, UNENCODABLE_PROGRESS, encode_json
from karna.errors import CommandFailed
from karna.text import encodable, printable

MAX_NAME_CHARS = 64  # of a tool, as the strictest clients
MAX_TEXT_CHARS = 100_000  # of a result: some 25,000 tokens, where hosts refuse it
MAX_MEDIA_BYTES = 5 * 1024 * 1024  # of one image or sound, as model APIs
MAX_PROGRESS_CHARS = 1_000  # of one report: hosts show a line


def name_tools(commands: Iterable[Command]) -> dict[str, Command]:
    """The commands that are tools, under names that every client takes."""
    tools: dict[str, Command] = {}
    for command in commands:
        if command.tool is False or command.input_schema is None:
            continue
        name = plain = re.sub(r"[^A-Za-z0-9_-]", "_", command.name)[:MAX_NAME_CHARS]
        number = 1
        while name in tools:
            number += 1
            name = f"{plain[: MAX_NAME_CHARS - 8]}_{number}"
        tools[name] = command
    return tools


def describe_tool(name: str, command: Command) -> dict[str, Any]:
    """A tool as tools/list tells it (server/tools, "Tool")."""
    hints = {"readOnlyHint": command.read_only, "destructiveHint": command.destructive}
    hints = {key: value for key, value in hints.items() if value is not None}
    tool: dict[str, Any] = {"name": name}
    if name != command.name:
        tool["title"] = command.name
    tool["description"] = command.help or f"usage: {command.usage}"
    tool["inputSchema"] = command.input_schema
    return {**tool, "annotations": hints} if hints else tool


def line_of(command: Command, arguments: Mapping[str, Any]) -> str:
    """The command line that calls a tool with these arguments, for a person to read.

    Nothing in it is hidden: what does not print is shown by its code, and no part is left out.
    """
    words, named = [command.name], set(arguments)
    places = [each for each in command.arguments if "option" not in each]
    while places and places[-1]["name"] not in named:
        places.pop()
    for each in command.arguments:
        if "option" in each and each["name"] in named:
            words += _option_words(each, arguments[each["name"]])
    for each in places:
        words += _place_words(each, arguments.get(each["name"], each.get("default")))
    extra = named - {each["name"] for each in command.arguments}
    words += [f"--{name}={_word(arguments[name])}" for name in arguments if name in extra]
    line = encodable(" ".join(words))
    return printable(line, len(line))


def _option_words(option: Mapping[str, Any], value: Any) -> list[str]:
    if option["type"] == "bool" and type(value) is bool:
        label: str = option["option"]
        return [label if value else f"--no-{label[2:]}"]
    return [option["option"], _word(value)]


def _place_words(place: Mapping[str, Any], value: Any) -> list[str]:
    if place["type"] == "text" and isinstance(value, str):
        is_plain = value[:1] not in ("", "'", '"', "-") and value == value.strip()
        return [value if is_plain and " --" not in value else _quoted(value)]
    values = value if place.get("repeated") and isinstance(value, list) else [value]
    return list(map(_word, values))


def _quoted(text: str) -> str:
    """A text as one word in quotes."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _word(value: Any) -> str:
    """A value as a word; what no word can say, as JSON."""
    return shlex.quote(value if isinstance(value, str) else json.dumps(value))


def content_of(value: Any) -> dict[str, Any]:
    """A command's result as that of a tool: text, images and sounds, and structured content.

    Images and sounds are bytes or data URLs: the value itself, or what a list or object holds.
    Raises TypeError for what JSON can't hold. Source: server/tools, "Tool Result".
    """
    media = _media_of(value)
    if media is not None:
        return {"content": [media]}
    if type(value) is str or value is None:
        return {"content": [_text_content("done" if value is None else value)]}
    value, found = _split_media(value)
    body = encode_json(value)
    result: dict[str, Any] = {"content": [_text_content(body.decode()), *found]}
    if len(body) <= MAX_TEXT_CHARS:
        whole = Fragment(body)
        result["structuredContent"] = whole if body[:1] == b"{" else {"result": whole}
    return result


def _text_content(text: str) -> dict[str, str]:
    if len(text) > MAX_TEXT_CHARS:
        word = f"[cut: these are the first {MAX_TEXT_CHARS} of {len(text)} characters]"
        text = f"{text[:MAX_TEXT_CHARS]}\n{word}"
    return {"type": "text", "text": text}


def _split_media(value: Any) -> tuple[Any, list[dict[str, str]]]:
    """A list or object without the images and sounds in it; those."""
    if type(value) not in (list, tuple, dict):
        return value, []
    parts = value if type(value) is dict else dict(enumerate(value))
    found = {key: media for key, each in parts.items() if (media := _media_of(each))}
    if not found:
        return value, []
    kept = {**parts, **{key: f"[{media['type']}]" for key, media in found.items()}}
    return (kept if type(value) is dict else [*kept.values()]), [*found.values()]


def _media_of(value: Any) -> dict[str, str] | None:
    """An image or sound as content; text about one that is too long; None for other values.

    Raises TypeError for bytes that are neither.
    """
    is_bytes = isinstance(value, bytes | bytearray)
    if not is_bytes and not (isinstance(value, str) and value[:11] in _MEDIA_URLS):
        return None
    if len(value) > MAX_MEDIA_BYTES * (1 if is_bytes else 4 / 3):
        return {"type": "text", "text": f"[too long for a model: a medium of {len(value)} bytes]"}
    if not is_bytes and value[:11] == "data:audio/":
        sound = _SOUND.fullmatch(value)
        return sound and {"type": "audio", "data": sound["data"], "mimeType": sound["type"]}
    from karna.images import decode_image, read_image_header  # with the first of them

    try:
        data = decode_image(value)
        kind = read_image_header(data)["format"]
    except CommandFailed:
        if is_bytes:
            raise TypeError("bytes that are no image") from None
        return None  # an image of another kind: text it stays
    return {
        "type": "image", "data": base64.b64encode(data).decode(), "mimeType": f"image/{kind}",
    }  # fmt: skip


_MEDIA_URLS = ("data:image/", "data:audio/")
_SOUND = re.compile(r"data:(?P<type>audio/[\w.+-]+);base64,(?P<data>[A-Za-z0-9+/]+={0,2})")


def describe_progress(value: Any, before: float) -> dict[str, Any]:
    """A report as progress, which must rise: a percentage where there is one, else a count.

    Source: basic/patterns/progress.
    """
    percent: Any = value.get("percent") if type(value) is dict else None
    if type(percent) in (int, float) and 0 <= percent <= 100:
        progress = percent if percent > before else math.nextafter(before, math.inf)
        report = {"progress": progress, "total": 100}
    else:
        report = {"progress": max(math.floor(before), 0) + 1}
    return {**report, "message": _message_of(value)[:MAX_PROGRESS_CHARS]}


def _message_of(value: Any) -> str:
    """What of a report a person reads: its text, or all of it."""
    if type(value) is dict:
        texts = [value.get(name) for name in ("message", "line", "token")]
        value = next((text for text in texts if type(text) is str), value)
    try:
        return value if type(value) is str else encode_json(value).decode()
    except NOT_JSON:
        raise CommandFailed(UNENCODABLE_PROGRESS) from None
