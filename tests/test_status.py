"""The status object: encoded once for all who ask, never stale."""

from __future__ import annotations

import json
from typing import Any

import pytest

from karna.service import Service
from karna.status import StatusBoard
from services import CommandProcessor


class Counted(Service):
    """Says how often it was asked, which only the tests want to know."""

    asked = 0

    def get_status(self) -> dict[str, Any]:
        self.asked += 1
        return super().get_status()


class Counts:
    """Runs commands, and does not say so each time."""

    done = failed = running = 0


def board_of(service: Service, *, is_stable: bool = True) -> tuple[StatusBoard, Counts]:
    counts = Counts()
    makers = (type(service).get_status,) if is_stable else (Service.get_status,)
    return StatusBoard({service.name: service}, counts, makers), counts


def test_status_is_asked_of_services_once_until_one_of_them_changes() -> None:
    service = Counted("lamp")
    board, _ = board_of(service)
    service.on_touch = board.touch
    first = board.encode()
    for _ in range(3):
        assert board.encode() is first
        assert board.encode_answer("5-1", None) is board.encode_answer("5-1", None)
    assert service.asked == 1
    service.set_state("failed", "dark")
    assert json.loads(board.encode())["lamp"]["detail"] == "dark"
    assert json.loads(board.encode_answer("5-1", None) + b"}")["data"]["lamp"]["detail"] == "dark"
    assert service.asked == 2
    service.set_state("failed", "dark")  # nothing has changed
    assert board.encode() and service.asked == 2


def test_answer_has_the_offset_it_is_current_as_of() -> None:
    service = Counted("lamp")
    board, _ = board_of(service)
    assert json.loads(board.encode_answer("5-1", None) + b"}") == {
        "type": "status_update", "data": {"lamp": Service.get_status(service)}, "offset": "5-1",
    }  # fmt: skip
    board.forget_answer()
    answer = json.loads(board.encode_answer("5-2", "abc") + b"}")
    assert (answer["offset"], answer["node"]) == ("5-2", "abc")
    assert service.asked == 1, "the services have not changed for that"


@pytest.mark.parametrize("name", ["done", "failed", "running"])
def test_commands_count_without_a_word(name: str) -> None:
    service = Counted("lamp")
    board, counts = board_of(service)
    for ask in (board.encode, lambda: board.encode_answer("5-1", None)):
        before = service.asked
        setattr(counts, name, getattr(counts, name) + 1)
        ask()
        ask()
        assert service.asked == before + 1
    # Whichever was asked first, the other is as new.
    setattr(counts, name, getattr(counts, name) + 1)
    board.encode()
    answer = board.encode_answer("5-9", None)
    assert b"5-9" in answer and service.asked == 3


def test_status_of_the_programs_own_making_is_never_kept() -> None:
    service = Counted("lamp")
    board, _ = board_of(service, is_stable=False)
    for count in range(1, 4):
        board.encode()
        assert service.asked == count
    for count in range(4, 7):
        board.encode_answer("5-1", None)
        assert service.asked == count


def test_status_of_the_processor_follows_its_calls() -> None:
    commands = CommandProcessor()
    makers = (Service.get_status, CommandProcessor.get_status)
    board = StatusBoard({"command": commands}, commands, makers)
    commands.on_touch = board.touch
    assert json.loads(board.encode())["command"]["done"] == 0
    commands.call_inline(commands.prepare("echo a"))
    assert json.loads(board.encode())["command"]["done"] == 1
    assert board.status()["command"]["done"] == 1
