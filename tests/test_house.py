"""The house itself: arrows go one way, a room is one idea of bounded size, private names stay in one.

The import graph is drawn from the sources: what runs at import, what only a type checker sees, and
what a function imports at first use. A circle of any of these is a circle in the reader's head.
"""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
import websockets
import websockets.frames
from websockets.asyncio.server import serve as plain_serve
from websockets.frames import CloseCode, Frame, Opcode
from websockets.protocol import State
from websockets.server import ServerProtocol

from support import DEADLINE_S, ROOT


ROOMS = sorted((ROOT / "karna").rglob("*.py"))
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in [ROOT / "karna_ws.py", ROOT / "services.py", *ROOMS]
}
MAX_LINES = 600


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports_of(path: Path) -> Iterator[str]:
    """Every module that this one imports, wherever the import stands; with what it takes of it."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}:{node.lineno}: imports say whole names"
            yield from (f"{node.module}.{each.name}" for each in node.names)


def module_of(name: str) -> str | None:
    """The file of ours that has this module, or this name of a module."""
    return next((each for each in (name, name.rpartition(".")[0]) if each in FILES), None)


def graph() -> dict[str, set[str]]:
    """Each file of ours and those that it imports."""
    found = {name: {module_of(each) for each in imports_of(path)} for name, path in FILES.items()}
    return {name: {each for each in targets if each} for name, targets in found.items()}


def arrows_up(of: dict[str, set[str]]) -> list[str]:
    """The imports that go the wrong way: from a room to the top, from the services to the server."""
    above = {"services": {"karna_ws"}, "karna_ws": set()}
    return [
        f"{name} imports {target}"
        for name, targets in of.items()
        for target in targets & above.get(name, {"karna_ws", "services"})
    ]


def test_no_import_goes_up_or_around() -> None:
    drawn = graph()
    assert len(drawn) == len(FILES) > 25 and drawn["karna_ws"] >= {"services", "karna.http"}
    assert "karna.backplane" in drawn["karna.server"], "imports inside functions count, too"
    assert arrows_up(drawn) == []
    try:
        TopologicalSorter(drawn).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(reversed(error.args[1]))}")


@pytest.mark.parametrize(
    "text",
    [
        "import karna_ws", "import karna_ws as top", "from karna_ws import WebSocketManager",
        "if TYPE_CHECKING:\n    from karna_ws import WebSocketManager",
        "def later():\n    import services", "def later():\n    from services import Service",
        "class Room:\n    def later(self):\n        if True:\n            from karna_ws import serve",
    ],
)  # fmt: skip
def test_graph_sees_an_import_wherever_it_stands(text: str, tmp_path: Path) -> None:
    path = tmp_path / "room.py"
    path.write_text(text)
    targets = {module_of(each) for each in imports_of(path)}
    assert arrows_up({"karna.room": {each for each in targets if each}}), text


def test_every_room_is_used() -> None:
    used = {target for targets in graph().values() for target in targets}
    assert sorted(set(FILES) - used - {"karna_ws", "karna", "karna.client.__main__"}) == []


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.stem)
def test_room_opens_with_what_it_is_and_has_a_bounded_size(path: Path) -> None:
    text = path.read_text()
    said = ast.get_docstring(tree_of(path))
    assert said and len(said.partition("\n")[0]) > 20, "what it is, what it touches, who uses it"
    assert text.startswith('"""'), "the docstring comes first of all"
    lines = text.count("\n")
    assert lines <= MAX_LINES, f"{lines} lines: it holds more than one idea"


def test_what_is_copied_is_the_whole_server() -> None:
    """Nothing but the standard library, the four requirements, what is optional, and ourselves."""
    known = {*sys.stdlib_module_names, "orjson", "websockets", "uvloop", "redis"}
    for name, path in FILES.items():
        foreign = {each.partition(".")[0] for each in imports_of(path) if not module_of(each)}
        assert foreign <= known | {"karna"}, f"{name}: {foreign - known}"


# --- The names of `websockets` that are no promise of its --------------------------------------------

CONNECTION = ROOT / "karna" / "connection.py"


def listed_names() -> set[str]:
    """The names of ServerProtocol that the docstring of karna/connection.py lists."""
    match = re.search(r"ServerProtocol\.([\w., \n]+?)  +Frame\.", CONNECTION.read_text())
    assert match, "the docstring lists them"
    return set(re.split(r",\s+", match[1].strip()))


def used_names(path: Path) -> set[str]:
    """What this room takes of a connection's `protocol`, and of its `reader`."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute):
            if node.value.attr == "protocol":
                found.add(node.attr)
            owner = node.value.value
            if isinstance(owner, ast.Attribute) and owner.attr == "protocol":
                found.add(f"{node.value.attr}.{node.attr}")
    return found - {each.partition(".")[0] for each in found if "." in each}


def test_private_names_of_the_library_are_used_in_one_room_and_listed_there() -> None:
    assert used_names(CONNECTION) == listed_names()
    assert {path.name: used_names(path) for path in FILES.values() if used_names(path)} == {
        "connection.py": listed_names()
    }


# Whatever else a room takes of the library is a promise of its.
PUBLIC = {
    "websockets.frames.CloseCode", "websockets.asyncio.server.Server",
    "websockets.asyncio.server.ServerConnection", "websockets.asyncio.server.serve",
    "websockets.asyncio.server.unix_serve", "websockets.asyncio.client.ClientConnection",
    "websockets.asyncio.client.connect", "websockets.exceptions.ConnectionClosed",
    "websockets.exceptions.WebSocketException", "websockets.exceptions.InvalidStatus",
}  # fmt: skip
IN_ONE_ROOM = {
    "connection.py": {
        "websockets.frames.BINARY", "websockets.frames.CONT", "websockets.frames.TEXT",
        "websockets.frames.Frame", "websockets.protocol.State", "websockets.server.ServerProtocol",
    },
    "frames.py": {"websockets.frames"},  # for apply_mask
}  # fmt: skip


def test_rooms_import_of_the_library_what_it_promises() -> None:
    for path in FILES.values():
        taken = {each for each in imports_of(path) if each.partition(".")[0] == "websockets"}
        assert taken - PUBLIC == IN_ONE_ROOM.get(path.name, set()), path.name
        masks = "apply_mask" in {
            node.attr for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute)
        }
        assert masks == (path.name == "frames.py")


def test_library_has_the_private_names_we_use() -> None:
    missing: list[str] = []

    def need(holds: Any, what: str) -> None:
        if not holds:
            missing.append(what)

    protocol = ServerProtocol(max_size=10)
    for name in listed_names():
        value: Any = protocol
        for part in name.split("."):
            need(hasattr(value, part), f"ServerProtocol.{name}")
            value = getattr(value, part, None)
    for name in ("receive_data", "receive_eof", "events_received", "data_to_send", "send_close",
                 "fail", "parse"):  # fmt: skip
        need(callable(getattr(protocol, name, None)), f"ServerProtocol.{name}()")
    need(getattr(protocol, "current_size", 0) is None, "ServerProtocol.current_size None at first")
    for name in ("CONNECTING", "OPEN", "CLOSING", "CLOSED"):
        need(hasattr(State, name), f"State.{name}")
    fields = inspect.signature(Frame).parameters
    need({"opcode", "data", "fin"} <= set(fields), "Frame(opcode, data, fin)")
    for name in ("TEXT", "BINARY", "CONT"):
        need(getattr(Opcode, name) is getattr(websockets.frames, name, None), f"frames.{name}")
    need(CloseCode.TRY_AGAIN_LATER == 1013, "CloseCode.TRY_AGAIN_LATER")
    need(callable(getattr(websockets.frames, "apply_mask", None)), "frames.apply_mask()")
    parameters = inspect.signature(plain_serve).parameters
    for name in ("create_connection", "compression", "max_size", "logger", "ping_interval",
                 "open_timeout", "close_timeout"):  # fmt: skip
        need(name in parameters, f"serve({name}=)")
    assert not missing, f"websockets {websockets.__version__} has changed: {', '.join(missing)}"


NOT_AT_START = """
import subprocess
import sys
import karna_ws
assert "importlib.metadata" not in sys.modules
import importlib.metadata
print(importlib.metadata.version("websockets"))
from karna.needs import Later
sys.modules["colorsys"] = Later("colorsys")
import colorsys
assert colorsys.rgb_to_hsv(1, 0, 0) == (0, 1, 1)
assert type(sys.modules["colorsys"]) is not Later
"""


def test_what_the_start_does_not_need_is_imported_when_it_is_used() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", NOT_AT_START], cwd=ROOT, capture_output=True, text=True,
        timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout.strip()) == (0, websockets.__version__), ran.stderr
