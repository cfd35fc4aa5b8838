"""From words to commands: a model chooses among the tools, its choices are run step by step.

What the model reads (results, images) may steer it, so nothing depends on its good will: it can run
what every client may run unasked, and a command that asks for consent ends the run as a proposal.
Uses answers, command, context, envelopes, errors, text and tools; used by the language service.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from karna.answers import Answer, Message, TakesNoImages, ToolCall
from karna.command import Call, Command
from karna.context import Context
from karna.envelopes import NOT_JSON, UNENCODABLE, encode_json
from karna.errors import CommandFailed, RequestError, UsageError, explain
from karna.text import encodable, one_line
from karna.tools import content_of, describe_tool, line_of, name_tools

MAX_STEPS = 5  # of one `do`; each costs a turn of the model
MAX_MISTAKES = 1  # that are told to the model, for it to do better
MAX_LINE_CHARS = 4_000  # of a command line that a person agrees to; of others this much is shown
MAX_RESULT_CHARS = 8_000  # of a result that the model reads: some 2,000 tokens of few thousand
BLIND = (
    "\n\n(An image came with this, which you cannot see. Tools that take an image are given it.)"
)

# Asks the model: the messages, the tools, and whether it may choose some.
Ask = Callable[[list[Message], list[dict[str, Any]], bool], Awaitable[Answer]]


class Commands(Protocol):
    """What has the commands and runs them; services.CommandProcessor does."""

    def distinct(self) -> Sequence[Command]:
        """Each command once."""

    async def run(self, call: Call, context: Context) -> Any:
        """Run a call; its end is that of whoever awaits it."""


class Steps:
    """What a model does with one request, in at most MAX_STEPS steps.

    image: the data URL of an image that came with it, which tools that take one are given.
    """

    def __init__(self, commands: Commands, context: Context, image: str | None = None) -> None:
        self._commands = commands
        self._context = context
        self._image = image
        self._tools = name_tools(commands.distinct())
        self._mistakes = 0
        self.done: list[dict[str, Any]] = []
        self.proposed: tuple[Call, str] | None = None  # what needs consent, and its command line

    async def run(self, text: str, before: Sequence[Message], ask: Ask) -> str:
        """Let the model do what a text asks for; its last words. Raises RequestError."""
        if not self._tools:
            raise CommandFailed("there is no command that a model may run")
        tools = [_as_function(*each) for each in self._tools.items()]
        messages = [*before, _request(text, self._image)]
        answer = await self._ask_first(messages, tools, ask)
        while answer.calls and len(self.done) < MAX_STEPS:
            messages.append(answer.message)
            for call in answer.calls:
                told = await self._take(call)
                if self.proposed is not None:
                    return answer.text
                messages.append({"role": "tool", "tool_call_id": call.id, "content": told})
            answer = await ask(messages, tools, len(self.done) < MAX_STEPS)
        return answer.text

    async def _ask_first(
        self, messages: list[Message], tools: list[dict[str, Any]], ask: Ask
    ) -> Answer:
        """A model that cannot see is told so: another one may look for it, by a tool."""
        try:
            return await ask(messages, tools, True)
        except TakesNoImages:
            if not any(map(_takes_image, self._tools.values())):
                raise
            text = messages[-1]["content"][0]["text"]
            messages[-1] = _request(text + BLIND, None)
            return await ask(messages, tools, True)

    async def _take(self, call: ToolCall) -> str:
        """Run, propose or refuse what the model chose; what it is told of that."""
        if len(self.done) >= MAX_STEPS:
            return f"not run: there are at most {MAX_STEPS} steps"
        try:
            bound, line = self._bind(call)
        except UsageError as mistake:
            self._mistakes += 1
            if self._mistakes > MAX_MISTAKES:
                raise CommandFailed(f"the model chose wrongly again: {mistake}") from None
            return f"error: {mistake}"
        if bound.command.confirm:
            self.proposed = bound, line
            return ""
        return await self._step(bound, line)

    def _bind(self, call: ToolCall) -> tuple[Call, str]:
        """The call and its command line. Raises UsageError for a mistake of the model."""
        command = self._tools.get(call.name)
        if command is None:
            names = ", ".join(self._tools)
            raise UsageError(f"no tool {one_line(call.name, 64)!r}; there are {names}")
        if type(call.arguments) is not dict:
            raise UsageError(f"the arguments of {call.name} are not one JSON object")
        arguments = call.arguments
        if self._image is not None and _takes_image(command):
            shown = {name: value for name, value in arguments.items() if name != "image"}
            arguments = {**shown, "image": self._image}
        else:
            shown = arguments
        bound, line = Call(command, *command.bind([], arguments)), line_of(command, shown)
        if command.confirm and len(line) > MAX_LINE_CHARS:
            raise UsageError(f"the arguments of {call.name} are too long for a person to agree to")
        return bound, line

    async def _step(self, call: Call, line: str) -> str:
        shown = line if len(line) <= MAX_LINE_CHARS else f"{line[:MAX_LINE_CHARS]} ..."
        step = {"step": len(self.done) + 1, "command": shown}

        def report(value: Any) -> Awaitable[None]:
            return self._context.progress({**step, "progress": value})

        context = Context(self._context.client, report, owner=self._context.owner)
        try:
            value, told = _outcome(await self._commands.run(call, context))
            step["result"] = value
        except RequestError as error:
            told = encodable(explain(error))
            step["error"] = {"code": error.code, "message": told}
            told = f"error: {told}"
        self.done.append(step)
        await self._context.progress(step)
        return told


def _request(text: str, image: str | None) -> Message:
    if image is None:
        return {"role": "user", "content": text}
    shown = {"type": "image_url", "image_url": {"url": image}}
    return {"role": "user", "content": [{"type": "text", "text": text}, shown]}


def _as_function(name: str, command: Command) -> dict[str, Any]:
    """A tool as model servers take it."""
    told = describe_tool(name, command)
    function = {"name": name, "description": told["description"]}
    return {"type": "function", "function": {**function, "parameters": told["inputSchema"]}}


def _takes_image(command: Command) -> bool:
    return any(each["name"] == "image" for each in command.arguments)


def _outcome(value: Any) -> tuple[Any, str]:
    """A result as clients are told it, and as the model reads it. Raises CommandFailed."""
    try:
        parts = content_of(value)["content"]
        told = "\n".join(part.get("text", f"[{part['type']}]") for part in parts)
    except NOT_JSON:
        raise CommandFailed(UNENCODABLE) from None
    try:
        encode_json(value)
    except NOT_JSON:  # bytes of an image, lone surrogates
        value = told = encodable(told)
    if len(told) > MAX_RESULT_CHARS:
        told = f"{told[:MAX_RESULT_CHARS]}\n[cut: {MAX_RESULT_CHARS} of {len(told)} characters]"
    return value, told
