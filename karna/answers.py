"""What model servers answer, read as their many makers write it: text, and the tools it chose.

Pure: JSON values in, an Answer out. Uses errors; used by models and choose.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from karna.errors import CommandFailed, RequestError, Unavailable

Message = dict[str, Any]  # of a conversation, as the servers' API has it


class TakesNoTools(CommandFailed):
    """The model, or its server, cannot be given tools."""


class TakesNoImages(CommandFailed):
    """The model cannot see."""


@dataclass(slots=True)
class ToolCall:
    """A tool that a model chose; `arguments` is an object, or the text that is none."""

    id: str
    name: str
    arguments: Any


@dataclass(slots=True)
class Answer:
    """One answer of a model."""

    text: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    @property
    def message(self) -> Message:
        """As the next request tells it. Arguments that are no object would break some servers."""
        calls = [
            {"id": call.id, "type": "function", "function": {
                "name": call.name,
                "arguments": json.dumps(call.arguments if type(call.arguments) is dict else {}),
            }}
            for call in self.calls
        ]  # fmt: skip
        said: Message = {"role": "assistant", "content": self.text}
        return {**said, "tool_calls": calls} if calls else said


def json_of(data: bytes | str) -> Any:
    """The value of a JSON text. Raises ValueError."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None


# ---- errors ----------------------------------------------------------------------------------

_BLAMELESS = (400, 413, 422)  # statuses that say: this request is wrong, the server is well
_ABOUT_OTHERS = (401, 403, 429, 503)  # whatever their text names
_ABOUT_TOOLS = re.compile(r"\btools?\b|tool[_-]|function.call", re.IGNORECASE)
_ABOUT_IMAGES = re.compile(r"image|vision|multi-?modal|mmproj", re.IGNORECASE)


def refusal(status: int, problem: str, sent: Collection[str]) -> RequestError:
    """What an answer of this status means: the request's failure, or a server that is not well.

    sent: what of "tools" and "images" the request had. A server may call these 500, too.
    """
    text = f"HTTP {status}" + (f": {problem}" if problem else "")
    if status not in _ABOUT_OTHERS:
        if "images" in sent and _ABOUT_IMAGES.search(problem):
            return TakesNoImages(f"the model takes no images; its server answered {text}")
        if "tools" in sent and _ABOUT_TOOLS.search(problem):
            return TakesNoTools(f"the model takes no tools; its server answered {text}")
    if status in _BLAMELESS:
        return CommandFailed(f"the model server answered {text}")
    return Unavailable(text)


def problem_of(value: Any) -> str:
    """The message of an error: {"error": {"message"}}, {"error": text}, {"object": "error"}."""
    if not isinstance(value, dict):
        return ""
    error = value if value.get("object") == "error" else value.get("error")
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else "unknown error" if error else ""


def check_no_error(value: Any, sent: Collection[str]) -> None:
    """Raise what an error means that comes where an answer belongs, with its own status if any."""
    problem = problem_of(value)
    if not problem:
        return
    error = value.get("error")
    status = (error if isinstance(error, dict) else value).get("code")
    found = refusal(status if type(status) is int else 500, problem, sent)
    raise found if isinstance(found, CommandFailed) else Unavailable(problem)


# ---- answers ---------------------------------------------------------------------------------


class Reader:
    """Puts an answer together: from one message, or from the parts of a stream."""

    def __init__(self, sent: Collection[str] = ()) -> None:
        self.is_finished = False  # has some part said that it is the last? Not every server does
        self._sent = sent
        self._texts: list[str] = []
        self._calls: list[dict[str, Any]] = []  # {"index", "id", "name", "arguments"}

    def add(self, value: Any, part: str = "delta") -> str:
        """Take one value, whose `part` is a "delta" or the whole "message"; the text it adds.

        Raises ValueError for another shape, RequestError for an error.
        """
        check_no_error(value, self._sent)
        try:
            choices = value["choices"]
            choice = choices[0] if choices else {}  # usage comes with no choice
            said = choice.get(part) or {}
            text = _text_of(said.get("content"))
            for call in said.get("tool_calls") or ():
                self._add_call(call, is_whole=part == "message")
        except (AttributeError, KeyError, TypeError):
            raise ValueError("a choice without text") from None
        self.is_finished = self.is_finished or bool(choice.get("finish_reason"))
        self._texts.append(text)
        return text

    def _add_call(self, part: dict[str, Any], is_whole: bool) -> None:
        """One call, or a further part of one: by its index, its id, or the lack of a new name."""
        function = part.get("function") or {}
        id, name = part.get("id"), function.get("name")
        id = id if isinstance(id, str) and id else None
        name = name if isinstance(name, str) else ""
        index = part.get("index")
        call = None if is_whole else self._begun(index, id, name)
        if call is None:
            call = {"index": index, "id": id, "name": name, "arguments": ""}
            self._calls.append(call)
        call["name"] = call["name"] or name
        given = function.get("arguments")
        if isinstance(given, str) and isinstance(call["arguments"], str):
            call["arguments"] += given
        elif given:
            call["arguments"] = given

    def _begun(self, index: Any, id: str | None, name: str) -> dict[str, Any] | None:
        """The call that a part goes on with, if it is no new one.

        Some servers give every call the index 0, some give none, some repeat id and name.
        """
        for call in reversed(self._calls):
            if type(index) is not int:  # the last one, or none
                return call if (not name if id is None else id == call["id"]) else None
            if call["index"] == index:
                return call if id in (None, call["id"]) or not name else None
        return None

    def answer(self) -> Answer:
        """The whole answer. What it chose is told by its calls alone, never by a finish_reason."""
        calls = [
            ToolCall(call["id"] or f"call_{number}", call["name"], _object_of(call["arguments"]))
            for number, call in enumerate(self._calls, 1)
        ]
        return Answer("".join(self._texts), calls)


def _text_of(content: Any) -> str:
    """The text of a message; a lone surrogate, which JSON can say, could not be sent on."""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part.get("type") == "text")
    text: str = content or ""
    return text.encode("utf-8", "replace").decode()


def _object_of(arguments: Any) -> Any:
    """Arguments from an object, from JSON text, or from JSON text in JSON text; else as it came."""
    for _ in range(2):
        if isinstance(arguments, str):
            try:
                arguments = json_of(arguments) if arguments.strip() else {}
            except ValueError:
                break
    return {} if arguments is None else arguments
