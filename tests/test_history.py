"""Broadcasts that are kept: bounded in number and bytes, each offset found or told as a gap."""

from __future__ import annotations

from karna.history import History
from karna_ws import WebSocketManager
from support import Raw, Sio, served
from support_peers import raw


async def test_history_is_trimmed_by_count() -> None:
    manager = WebSocketManager()
    async with served(manager, history_messages=3) as server:
        known = [manager.history.last]
        for number in range(5):
            manager.broadcast("number", number)
            known.append(manager.history.last)
        for place, offset in enumerate(known):
            async with Raw.open(server, f"/ws?since={offset}") as client:
                found = await client.received()
                if place < 2:
                    assert [each["data"]["code"] for each in found] == ["history_gap"]
                else:
                    assert [each["data"] for each in found] == list(range(place, 5))


async def test_history_is_trimmed_by_bytes() -> None:
    manager = WebSocketManager()
    async with served(manager, history_bytes=1100) as server:
        known = [manager.history.last]
        for number in range(5):
            manager.broadcast("number", [number, "x" * 270])  # three fit, four do not
            known.append(manager.history.last)
        assert manager.history.bytes <= 1100
        for place, offset in enumerate(known):
            async with Raw.open(server, f"/ws?since={offset}") as client:
                found = await client.received()
                if place < 2:
                    assert [each["data"]["code"] for each in found] == ["history_gap"]
                else:
                    assert [each["data"][0] for each in found] == list(range(place, 5))
        manager.broadcast("number", "x" * 2000)  # alone larger than all that is kept
        assert (manager.history.bytes, len(manager.history.entries)) == (0, 0)
        async with Raw.open(server, f"/ws?since={known[-1]}") as client:
            assert (await client.next())["data"]["code"] == "history_gap"


async def test_history_of_zero_keeps_nothing() -> None:
    manager = WebSocketManager()
    async with served(manager, history_messages=0) as server:
        before = manager.history.last
        manager.broadcast("number", 1)
        assert not manager.history.entries and not manager.history._positions
        async with Raw.open(server, f"/ws?since={before}") as client:
            assert (await client.next())["data"]["code"] == "history_gap"
        async with Sio.open(server) as client2:
            assert list(await client2.join("/ws")) == ["sid"]


async def test_history_forgets_as_it_goes() -> None:
    history = History(10, 10**6, "5-0")
    for number in range(1, 1001):
        history.append(f"5-{number}", b"x" * 10)
    assert (len(history.entries), len(history._positions), history.bytes) == (10, 10, 100)
    assert [entry.offset for entry in history.since("5-997") or ()] == ["5-998", "5-999", "5-1000"]
    assert history.since("5-990") is not None and history.since("5-989") is None


async def test_history_is_limited_in_messages_and_bytes() -> None:
    for options, kept in (({"history_messages": 3}, 3), ({"history_bytes": 3 * 1100}, 3)):
        manager = WebSocketManager()
        async with served(manager, **options) as server:
            async with raw(server.port) as peer:
                offsets = []
                for number in range(6):
                    manager.broadcast("tick", [number, "x" * 1000])
                    offsets.append((await peer.json())["offset"])
            async with raw(server.port, f"/ws?since={offsets[5 - kept]}") as back:
                got = [(await back.json())["data"][0] for _ in range(kept)]
                assert got == list(range(6 - kept, 6))
            for offset in (offsets[4 - kept], "unknown", "", "x" * 5000):
                async with raw(server.port, f"/ws?since={offset}") as back:
                    assert (await back.json())["data"]["code"] == "history_gap"
