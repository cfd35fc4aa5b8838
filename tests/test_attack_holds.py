"""Reading is held and released for many reasons at once: no wake-up is lost, nothing unanswered."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest

from karna_ws import Client, WebSocketManager
from support import Sio, execute, served, until
from support_peers import frame, raw

SEEDS = range(12)


def busy_manager(dice: random.Random) -> WebSocketManager:
    manager = WebSocketManager()

    @manager.commands.command
    async def nap(text: str) -> str:
        for _ in range(dice.randrange(4)):
            await asyncio.sleep(0.001 * dice.randrange(2))
        return text

    @manager.on("connect")
    async def connect(client: Client, auth: Any) -> None:
        await asyncio.sleep(0.002 * dice.randrange(3))

    @manager.on("disconnect")
    async def disconnect(client: Client, reason: str) -> None:
        await asyncio.sleep(0.002 * dice.randrange(3))

    return manager


def a_message(dice: random.Random, number: int) -> tuple[Any, int]:
    """A message, and how many requests of it are to be answered."""
    kind = dice.randrange(6)
    if kind == 0:
        calls = [
            {"jsonrpc": "2.0", "id": f"{number}.{n}", "method": "execute_command",
             "params": [dice.choice(["echo x", "nap x", "nonsense"])]}
            for n in range(dice.choice([1, 40, 120]))
        ]  # fmt: skip
        return calls, len(calls)
    if kind == 1:
        return {"method": "get_status", "id": number}, 1
    if kind == 2:
        return {"method": "cancel", "params": {"id": number - 3}, "id": number}, 1
    if kind == 3:
        return execute("echo " + "y" * dice.choice([1, 100, 30_000]), number), 1
    return execute(dice.choice(["nap x", "echo x", "interpret x y z"]), number), 1


@pytest.mark.parametrize("seed", SEEDS)
async def test_raw_client_is_answered_once_whatever_held_it(seed: int) -> None:
    dice = random.Random(seed)
    manager = busy_manager(dice)
    options = {"max_running_commands": dice.choice([1, 4, 32])}
    async with served(manager, **options) as server, raw(server.port) as peer:
        messages = [a_message(dice, number) for number in range(600)]
        wanted = sum(count for _, count in messages)
        stream = b"".join(
            frame(1, json.dumps(message).encode()) + (frame(9) if dice.random() < 0.2 else b"")
            for message, _ in messages
        )

        async def send() -> None:
            at = 0
            while at < len(stream):
                size = dice.choice([1, 500, 5_000, 200_000])
                await peer.send(stream[at : at + size])
                at += size
                if dice.random() < 0.3:
                    await asyncio.sleep(0.001)
                    manager.broadcast("x", "z" * dice.choice([1, 20_000]))

        sending = asyncio.create_task(send())
        seen: list[Any] = []
        while len(seen) < wanted:
            received = await peer.frame()
            if received.opcode != 1:
                continue
            for answer in received.json if isinstance(received.json, list) else [received.json]:
                if "id" in answer and answer.get("type") != "command_progress":
                    seen.append(answer["id"])
            if dice.random() < 0.01:
                await asyncio.sleep(0.005)  # it reads slowly
        await sending
        assert len(set(seen)) == len(seen) == wanted
        await peer.sync()
        [client] = manager.raw.values()
        await until(lambda: not client.connection._holds)
        assert (client.calls, client.connection.waiting, client.connection.waiting_bytes) == (
            None, 0, 0)  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
async def test_session_goes_on_however_its_namespaces_come_and_go(seed: int) -> None:
    dice = random.Random(seed)
    manager = busy_manager(dice)
    async with served(manager) as server, Sio.open(server) as client:
        for _ in range(100):
            manager.broadcast("x", "y" * 2_000)
        offset = manager.history.entries[0].offset
        for number in range(60):
            name = dice.choice(["/", "/ws", "/ws/"])
            prefix = "" if name == "/" else name + ","
            auth = dice.choice(["", json.dumps({"pid": f"p{number % 5}", "offset": offset})])
            await client.send(f"40{prefix}{auth}")
            if dice.random() < 0.5:
                while not (await client.next()).startswith(f"40{prefix}" + "{"):
                    pass
                await client.send(f'42{prefix}7["rpc",' + json.dumps(execute("nap x", 1)) + "]")
                while dice.random() < 0.5 and not (await client.next()).startswith(f"43{prefix}7"):
                    pass
            await client.send(f"41{prefix}")
        await client.send("40/ws,")
        await until(lambda: manager.count_clients() == 1 and not manager.leaving)
        connection = manager.all_clients()[0].connection
        await until(lambda: not connection._holds & ~1)
        assert not manager.deciding and not manager.groups
    await until(lambda: not manager.connections and not manager.leaving)
    assert manager.count_clients() == 0
