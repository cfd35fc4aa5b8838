"""Who is in: nobody is who was refused, has left, or is still being decided about."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from karna.errors import CommandFailed
from karna_ws import Client, WebSocketManager
from services import Context
from support import Raw, Sio, http, served, until
from support_peers import ENGINE, engine, frame, lazy, raw, request


def long_history(manager: WebSocketManager) -> str:
    """More than is replayed at once; the offset before it."""
    before = manager.history.last
    for _ in range(200):
        manager.broadcast("x", "y" * 20_000)
    return before


async def test_client_that_leaves_as_its_replay_begins_is_not_in_afterwards() -> None:
    """It stayed among the clients for ever, and a peer could make as many of it as it liked."""
    manager = WebSocketManager()
    async with served(manager) as server, engine(server.port, connect=None) as peer:
        before = long_history(manager)
        text = b'40/ws,{"pid":"me","offset":"%s"}' % before.encode()
        await peer.send(frame(1, text) + frame(1, b"41/ws,") + frame(1, b"40/ws/,"))
        while not (await peer.frame()).payload.startswith(b"40/ws/,"):
            pass
        await until(lambda: not manager.tasks.running)
        assert [each.namespace for each in manager.all_clients()] == ["/ws/"]
    await until(lambda: not manager.connections)
    assert manager.count_clients() == 0


async def test_client_that_is_sent_away_during_its_replay_is_not_in_afterwards() -> None:
    manager = WebSocketManager()
    came: list[Client] = []

    @manager.on("connect", inline=True)
    def remember(client: Client, auth: Any) -> None:
        came.append(client)

    async with served(manager) as server, lazy(server.port, ENGINE) as peer:
        before = long_history(manager)
        text = b'40/ws,{"pid":"me","offset":"%s"}' % before.encode()
        await peer.send(frame(1, text))
        await until(lambda: came and not came[0].connection.is_writable)
        await came[0].disconnect()
        while not (await peer.frame()).payload.startswith(b"44/ws,"):
            pass
        await until(lambda: not manager.tasks.running)
        assert manager.count_clients() == 0
        await peer.send(frame(1, b"40/ws,"))  # it is read again
        while not (await peer.frame()).payload.startswith(b"40/ws,"):
            pass


async def test_group_of_the_connect_handler_holds_whom_it_has_let_in() -> None:
    """One that it refused stayed in the group, and got what was broadcast there."""
    manager = WebSocketManager()
    go_on = asyncio.Event()
    came: list[Client] = []

    @manager.on("connect")
    async def decide(client: Client, auth: Any) -> None:
        client.join("group")
        came.append(client)
        await go_on.wait()
        if client.auth.get("is") != "welcome":
            raise ValueError("no")

    async with served(manager) as server, Sio.open(server) as bad, Sio.open(server) as good:
        await bad.send("40")
        await good.send('40{"is":"welcome"}')
        await until(lambda: len(came) == 2)
        assert manager.broadcast("x", "early", to="group") == 0
        go_on.set()
        assert (await bad.packet("44"))["message"] == "no"
        assert "sid" in await good.packet("40")
        assert manager.broadcast("x", "late", to="group") == 1
        assert (await good.packet("42"))[1]["data"] == "late"
        go_on.set()
        await bad.send("40")
        await bad.packet("44")  # next: nothing came in between
    assert not manager.groups


@pytest.mark.parametrize("door", ["http", "left"])
async def test_client_that_is_not_in_joins_no_group(door: str) -> None:
    """One of HTTP got WebSocket frames between its answers; one that had left stayed for ever."""
    manager = WebSocketManager()
    asked: list[Client] = []

    @manager.method("subscribe")
    async def subscribe(context: Context) -> None:
        asked.append(context.client)
        context.client.join("group")

    async with served(manager) as server:
        if door == "http":
            call = {"jsonrpc": "2.0", "id": 1, "method": "subscribe"}
            assert (await http(server, "POST", "/rpc", call))[0] == 200
        else:
            async with raw(server.port) as peer:
                await peer.send_json(request("subscribe", 1))
                await until(lambda: asked)
            await until(lambda: not manager.raw)
            asked[0].join("group")
        assert not manager.groups and manager.broadcast("x", 1, to="group") == 0


async def test_group_that_was_left_is_not_given_back_by_an_older_connection() -> None:
    """The one that is replaced kept what it had; its successor's successor got that."""
    manager = WebSocketManager()
    groups: list[set[str]] = []

    @manager.on("connect", inline=True)
    def decide(client: Client, auth: Any) -> None:
        groups.append(set(client.groups))
        if len(groups) == 1:
            client.join("admins")
        else:
            client.leave("admins")

    async with served(manager) as server:
        manager.broadcast("x", 1)
        auth = {"pid": "me", "offset": manager.history.last}
        async with Sio.open(server, join="/", auth=auth), Sio.open(server, join="/", auth=auth):
            pass
        await until(lambda: not manager.count_clients())
        async with Sio.open(server, join="/", auth=auth), Raw.open(server):
            assert groups == [set(), {"admins"}, set(), set()]


async def test_auth_that_is_kept_is_bounded() -> None:
    """As JSON of 1 MiB it took 25 MiB, in each namespace, as long as the client stayed."""
    async with served() as server, Sio.open(server) as client:
        await client.send("40/ws," + '{"token":"' + "x" * 17_000 + '"}')
        refused = await client.packet("44/ws,")
        assert refused["data"]["code"] == "too_large"
        assert "sid" in await client.join("/ws", {"token": "x" * 16_000})


async def test_answer_that_cannot_be_shown_is_an_answer() -> None:
    """Its question waited on, and the log told of a bug."""
    manager = WebSocketManager()
    async with served(manager) as server, Raw.open(server) as client:
        await client.run("echo x")
        asking = asyncio.create_task(manager.all_clients()[0].call("hi"))
        number = (await client.next_of("call"))["call"]
        deep = "[" * 990 + "]" * 990
        params = f'{{"call":{number},"error":{deep}}}'
        await client.send(f'{{"method":"answer","id":1,"params":{params}}}')
        assert (await client.final(1))["data"] == {"answered": number}
        with pytest.raises(CommandFailed, match="nested"):
            await asking


async def test_all_notifications_of_a_batch_by_post_are_handled() -> None:
    """Those past the first turn were dropped: their exchange had been answered by then."""
    manager, hits = WebSocketManager(), 0

    @manager.method("hit", inline=True)
    def hit() -> None:
        nonlocal hits
        hits += 1

    async with served(manager) as server:
        status, _ = await http(server, "POST", "/rpc", [{"jsonrpc": "2.0", "method": "hit"}] * 200)
        assert (status, hits) == (204, 200)
