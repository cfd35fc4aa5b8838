"""What one client sends is handled in turns with the others', whatever it is made of."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest
from websockets.server import ServerProtocol

from karna_ws import WebSocketManager
from support import Gate, Raw, execute, served, until
from support_peers import engine, frame, raw
from test_fairness import counting_turns

READ_BYTES = 64 * 1024  # of pings: some 10,000


@pytest.fixture
def bytes_in_turns(monkeypatch: pytest.MonkeyPatch) -> Any:
    """How many bytes the library was given in each turn of the loop, once `turns` is there."""
    given: Counter[int] = Counter()
    turns: list[Any] = [lambda: 0]
    receive_data = ServerProtocol.receive_data

    def count(protocol: ServerProtocol, data: bytes) -> None:
        given[turns[0]()] += len(data)
        receive_data(protocol, data)

    monkeypatch.setattr(ServerProtocol, "receive_data", count)
    return given, turns


@pytest.mark.parametrize("what", ["pings", "fragments"])
async def test_flood_of_frames_that_are_no_messages_is_handled_in_turns(
    what: str, bytes_in_turns: Any
) -> None:
    """10,000 pings of one read stopped everybody for 150 ms."""
    given, turns = bytes_in_turns
    frames, answers = frame(9) * 12_000, 0
    if what == "fragments":
        frames, answers = (frame(1, fin=False) + frame(0, fin=False) * 1000 + frame(0)) * 12, 12
    async with served() as server, raw(server.port) as flood, counting_turns() as turn:
        turns[0] = turn
        await flood.send(frames + frame(1, b"{}"))
        while answers >= 0:
            answers -= (await flood.frame()).opcode == 1
    assert sum(given.values()) == len(frames)
    assert max(given.values()) < READ_BYTES / 4  # a share of the time; machines differ


async def test_flood_behind_what_ends_a_session_is_handled_in_turns(bytes_in_turns: Any) -> None:
    given, turns = bytes_in_turns
    frames = frame(9) * 30_000
    async with served() as server, engine(server.port) as flood, counting_turns() as turn:
        turns[0] = turn
        await flood.send(frame(1, b"9") + frames + frame(8, b"\x03\xe8"))
        assert (await flood.frames())[-1].opcode in (8, 10)
    assert sum(given.values()) >= len(frames)
    assert max(given.values()) < READ_BYTES / 4


async def test_commands_that_waited_begin_in_turns() -> None:
    """250 that waited for one to end began at once when it did, and stopped everybody meanwhile."""
    manager = WebSocketManager()
    gate = Gate(manager)
    done: Counter[int] = Counter()
    async with (
        served(manager, max_running_commands=1) as server,
        Raw.open(server) as client,
        counting_turns() as turn,
    ):

        @manager.commands.command(inline=True)
        def work(number: int) -> int:
            time.sleep(0.0005)
            done[turn()] += 1
            return number

        await client.send(execute("gate a", id="gate"))
        await client.send(*(execute(f"work {number}", id=number) for number in range(200)))
        await until(lambda: next(iter(manager.raw.values())).connection.waiting == 200)
        gate.let("a")
        await client.final("gate")
        for number in range(200):  # in their order
            assert (await client.next())["data"]["result"] == number
        assert await client.run("echo x") == "x"
        assert next(iter(manager.raw.values())).calls is None  # nothing waits: the short way again
    assert sum(done.values()) == 200 and max(done.values()) < 20
