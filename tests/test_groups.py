"""Groups, questions to clients, and what a program keeps of a client."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from karna.client import CommandError, connect
from karna_ws import Client, WebSocketManager
from services import CommandFailed, Context
from support import Raw, Sio, execute, http, served, until

# --- groups ----------------------------------------------------------------------------------------


class Rooms(WebSocketManager):
    """Clients join what the query, the auth or a method names."""

    def __init__(self) -> None:
        super().__init__()

        @self.on("connect", inline=True)
        def enter(client: Client, auth: Any) -> None:
            for group in auth.get("rooms", self.rooms_of_new):
                client.join(group)

        @self.method("join")
        async def join(context: Context, group: str, since: str | None = None) -> list[str]:
            context.client.join(group, since=since)
            return sorted(context.client.groups)

        @self.method("leave")
        async def leave(context: Context, group: str) -> list[str]:
            context.client.leave(group)
            return sorted(context.client.groups)

    rooms_of_new: tuple[str, ...] = ()


def heard(messages: list[dict[str, Any]]) -> list[Any]:
    return [each["data"] for each in messages if each["type"] == "news"]


async def test_group_gets_its_broadcasts_in_the_common_order_and_nobody_else_does() -> None:
    manager = Rooms()
    async with (
        served(manager) as server,
        Raw.open(server) as one, Raw.open(server) as two, Raw.open(server) as none,
        Sio.open(server, join="/", auth={"rooms": ["a", "b"]}) as both,
    ):  # fmt: skip
        assert (await one.ask("join", group="a"))["data"] == ["a"]
        assert (await two.ask("join", group="b"))["data"] == ["b"]
        counts = [
            manager.broadcast("news", number, to=group)
            for number, group in enumerate(["a", "b", None, "a", "nobody", None, "b"])
        ]
        assert counts == [2, 2, 4, 2, 0, 4, 2]
        assert heard(await one.received()) == [0, 2, 3, 5]
        assert heard(await two.received()) == [1, 2, 5, 6]
        assert heard(await none.received()) == [2, 5]
        assert [(await both.packet("42"))[1]["data"] for _ in range(6)] == [0, 1, 2, 3, 5, 6]
        assert (await one.ask("leave", group="a"))["data"] == []
        manager.notify("only b", to="a")
        manager.broadcast("news", 7)
        assert heard(await one.received()) == [7]
        assert (await both.packet("42"))[1]["data"]["message"] == "only b"


async def test_group_is_left_with_the_client() -> None:
    manager = Rooms()
    async with served(manager) as server:
        async with Raw.open(server) as client:
            await client.ask("join", group="a")
            assert manager.groups
        await until(lambda: not manager.connections)
        assert not manager.groups and manager.broadcast("news", 1, to="a") == 0


async def test_joining_and_leaving_line_up_with_what_is_broadcast_in_the_same_turn() -> None:
    manager = Rooms()

    @manager.commands.command
    async def turn(context: Context) -> None:
        manager.broadcast("news", "before", to="a")
        context.client.join("a")
        manager.broadcast("news", "within", to="a")
        context.client.leave("a")
        manager.broadcast("news", "after", to="a")

    async with served(manager) as server, Raw.open(server) as client:
        await client.run("turn")
        assert heard(await client.received()) == ["within"]


@pytest.mark.parametrize("size", [1, 3000])
async def test_replay_holds_what_was_for_the_client_and_its_groups(size: int) -> None:
    """Short, and so long that it is sent as its client reads it."""
    manager = Rooms()
    async with served(manager) as server:
        start = manager.history.last
        for number in range(60):
            group = ("a", "b", None)[number % 3]
            manager.broadcast("news", [number, "x" * size], to=group)
        for rooms, wanted in ((("a",), {0, 2}), ((), {2}), (("a", "b"), {0, 1, 2})):
            manager.rooms_of_new = rooms
            async with Raw.open(server, f"/ws?since={start}") as client:
                numbers = [each[0] for each in heard(await client.received())]
                assert numbers == [n for n in range(60) if n % 3 in wanted]


async def test_group_joined_later_is_replayed_from_an_offset() -> None:
    manager = Rooms()
    async with served(manager) as server, Raw.open(server) as client:
        start = manager.history.last
        for number in range(6):
            manager.broadcast("news", number, to="ab"[number % 2])
        await client.ask("join", group="a", since=start)
        assert heard(await client.received()) == [0, 2, 4]
        await client.ask("join", group="b", since="1-1")
        assert [m["data"]["code"] for m in await client.received()] == ["history_gap"]


# --- questions -------------------------------------------------------------------------------------


def asking(timeout_s: float = 10.0) -> WebSocketManager:
    manager = WebSocketManager()

    @manager.commands.command
    async def consent(context: Context, what: str) -> Any:
        return await context.client.call("confirm", what, 1, timeout_s=timeout_s)

    return manager


async def test_raw_client_answers_a_question_of_a_command() -> None:
    async with served(asking()) as server, Raw.open(server) as client:
        for data in (True, None, {"a": [1]}):
            await client.send(execute("consent burn", id=1))
            question = await client.next_of("call")
            assert question["data"] == {"event": "confirm", "args": ["burn", 1]}
            answer = await client.ask("answer", call=question["call"], data=data)
            assert answer["data"] == {"answered": question["call"]}
            assert (await client.final(1))["data"]["result"] == data
        late = await client.ask("answer", call=question["call"], data=1)
        assert late["data"]["code"] == "invalid_params"


async def test_client_that_answers_an_error_or_late_or_leaves_fails_the_question() -> None:
    manager = asking(timeout_s=0.1)
    failed: list[Any] = []

    @manager.on("disconnect")
    async def note(client: Client, reason: str) -> None:
        try:
            await client.call("anything")
        except ConnectionError as error:
            failed.append(str(error))

    async with served(manager) as server:
        async with Raw.open(server) as client:
            await client.send(execute("consent burn", id=1))
            question = await client.next_of("call")
            await client.ask("answer", call=question["call"], error="no way\n")
            error = (await client.final(1))["data"]
            assert (error["code"], error["message"]) == (
                "command_failed", "the client answered: no way"
            )  # fmt: skip
            await client.send(execute("consent burn", id=2))
            assert (
                "no answer to 'confirm' within 0.1 s" in (await client.final(2))["data"]["message"]
            )
        await until(lambda: failed)
    assert "has left" in failed[0]


async def test_question_ends_when_its_client_leaves() -> None:
    manager = WebSocketManager()
    ended: list[BaseException] = []

    async def ask(client: Client) -> None:
        try:
            await client.call("confirm", timeout_s=1000)
        except ConnectionError as error:
            ended.append(error)

    async with served(manager) as server:
        async with Raw.open(server) as client, Sio.open(server, join="/") as session:
            tasks = [asyncio.create_task(ask(each)) for each in manager.all_clients()]
            await client.next_of("call")
            await session.packet("421")
        await asyncio.wait(tasks)
    assert len(ended) == 2


async def test_socket_io_client_answers_by_the_ack() -> None:
    async with served(asking()) as server, Sio.open(server, join="/ws") as client:
        for values, result in (
            ([True], True), ([], None), ([1, 2], [1, 2]), ([{"type": "x"}], {"type": "x"}),
        ):  # fmt: skip
            await client.send('42/ws,7["rpc",' + json.dumps(execute("consent burn", id=1)) + "]")
            frame = await client.next()
            number, _, question = frame.removeprefix("42/ws,").partition("[")
            assert json.loads("[" + question) == ["confirm", "burn", 1]
            await client.send(f"43/ws,{number}" + json.dumps(values))
            assert (await client.packet("43/ws,7"))[0]["data"]["result"] == result
        await client.send('42/ws,7["rpc",' + json.dumps(execute("consent burn", id=1)) + "]")
        number = int((await client.next()).removeprefix("42/ws,").partition("[")[0])
        refusal = {"type": "error", "data": {"message": "no"}}
        await client.send(f"43/ws,{number}" + json.dumps([refusal]))
        assert (await client.packet("43/ws,7"))[0]["data"]["message"] == "the client answered: no"
        await client.send("43/ws,999[1]")  # an answer to nothing is nobody's
        assert (await client.rpc({"method": "get_status"}, namespace="/ws"))["data"]


async def test_client_in_python_answers_a_question() -> None:
    manager = asking()
    async with served(manager) as server, connect(f"ws://127.0.0.1:{server.port}/ws") as client:

        @client.on("confirm")
        async def confirm(what: str, times: int) -> bool:
            if what == "nothing":
                raise ValueError("nothing to confirm")
            return what == "burn" and times == 1

        assert await client.execute("consent burn") is True
        assert await client.execute("consent freeze") is False
        with pytest.raises(CommandError, match="nothing to confirm"):
            await client.execute("consent nothing")


async def test_http_client_can_not_be_asked() -> None:
    async with served(asking()) as server:
        status, answer = await http(
            server, "POST", "/api/execute_command", execute("consent x")["params"]
        )
        assert status == 500 and "can't be asked" in answer["data"]["message"]


async def test_http_client_can_not_join_a_group() -> None:
    manager = Rooms()
    async with served(manager) as server:
        status, answer = await http(
            server, "POST", "/rpc", {"jsonrpc": "2.0", "method": "join", "params": ["a"], "id": 1}
        )
        assert (status, answer["error"]["data"]["code"]) == (200, "command_failed")
        assert "can't join a group" in answer["error"]["message"]
        assert not manager.groups and manager.broadcast("news", 1, to="a") == 0


async def test_questions_to_one_client_are_bounded() -> None:
    async with served(WebSocketManager()) as server, Raw.open(server, max_queue=None):
        (client,) = server.manager.all_clients()
        asked = [asyncio.create_task(client.call("q")) for _ in range(256)]
        await asyncio.sleep(0)
        with pytest.raises(CommandFailed, match="256 questions"):
            await client.call("q")
        for task in asked:
            task.cancel()
        await asyncio.wait(asked)
        assert not client.questions._waiting


async def test_emitted_string_keeps_its_arity() -> None:
    """socket.io-client takes an event's last string for its offset: then a function is the last."""
    async with served(WebSocketManager()) as server, Sio.open(server, join="/") as client:
        (peer,) = server.manager.all_clients()
        await peer.emit("question", "colour?")
        await peer.emit("poked", 1)
        await peer.emit("ping")
        assert await client.packet("421") == ["question", "colour?"]
        assert await client.packet("42") == ["poked", 1]
        assert await client.packet("422") == ["ping"]
        await client.send('431["ignored"]')
        assert (await client.rpc({"method": "get_status"}))["data"]


# --- state -----------------------------------------------------------------------------------------


async def test_state_and_groups_survive_a_socket_io_recovery() -> None:
    manager = WebSocketManager()
    seen: list[Any] = []

    @manager.on("connect")
    async def enter(client: Client, auth: Any) -> None:
        seen.append(dict(client.state))
        client.state.setdefault("user", "ada")

    async with served(manager) as server:
        async with Sio.open(server) as first:
            joined = await first.join("/")
            (client,) = manager.all_clients()
            client.join("a")
            manager.broadcast("news", 1)
            _, _, offset = await first.packet("42")
        await until(lambda: not manager.connections)
        manager.broadcast("news", 2, to="a")
        async with Sio.open(server) as second:
            auth = {"pid": joined["pid"], "offset": offset}
            await second.send("40" + json.dumps(auth))
            assert (await second.packet("42"))[1]["data"] == 2
            assert (await second.packet("40"))["sid"] == joined["sid"]
            (client,) = manager.all_clients()
            assert client.state == {"user": "ada"} and client.groups == {"a"}
        async with Sio.open(server, join="/"):
            pass
    assert seen == [{}, {"user": "ada"}, {}]
