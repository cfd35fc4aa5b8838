"""An asyncio client of the raw door: ids, progress, and reconnecting without losing a broadcast.

    python examples/client.py "echo hello" "countdown 3"   # run them at the same time, print, exit
    python examples/client.py                              # print broadcasts until Ctrl-C

`--url` names another server; KARNA_TOKEN holds the token where the server wants one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
from typing import Any
from urllib.parse import urlencode

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0


async def run_commands(url: str, commands: list[str]) -> None:
    """Send all commands at once and print each answer; the id tells which command it belongs to."""
    async with connect(address(url)) as connection:
        for number, command in enumerate(commands):
            await request(connection, "execute_command", {"command": command}, number)
        unanswered = set(range(len(commands)))
        while unanswered:
            answer = json.loads(await connection.recv())
            number = answer.get("id")
            if number is None:
                continue  # a broadcast
            if answer["type"] == "command_progress":
                print(f"{commands[number]}: {json.dumps(answer['data']['progress'])}", flush=True)
                continue
            unanswered.remove(number)
            print(f"{commands[number]} -> {outcome(answer)}", flush=True)


async def watch(url: str) -> None:
    """Print broadcasts for ever. After a broken connection, `since` brings what was missed."""
    offset: str | None = None
    failures = 0
    while True:
        try:
            async with connect(address(url, since=offset)) as connection:
                print(f"connected{' again' if offset else ''}", flush=True)
                failures = 0
                if offset is None:  # the answer brings the first offset
                    await request(connection, "get_status", {}, "status")
                async for text in connection:
                    message = json.loads(text)
                    offset = message.get("offset", offset)
                    print_broadcast(message)
                    if message["type"] == "error" and message["data"]["code"] == "history_gap":
                        await request(connection, "get_status", {}, "status")
        except (OSError, ConnectionClosed, TimeoutError) as error:
            print(f"not connected: {error}", flush=True)
        except InvalidStatus as error:
            if error.response.status_code < 500:  # a wrong token or address: no use to try again
                raise SystemExit(f"refused: {error.response.body.decode()}") from None
            print(f"not connected: {error}", flush=True)
        except InvalidHandshake as error:
            print(f"not connected: {error}", flush=True)
        # The pause doubles, and half of it is random: after a restart not all clients come at once.
        pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**failures)
        failures = min(failures + 1, 10)
        await asyncio.sleep(pause * random.uniform(0.5, 1.0))


def address(url: str, since: str | None = None) -> str:
    """The URL with the query the server understands: `since` and `token`, where there are any."""
    query = {"since": since, "token": os.environ.get("KARNA_TOKEN")}
    known = {name: value for name, value in query.items() if value}
    return f"{url}?{urlencode(known)}" if known else url


async def request(
    connection: ClientConnection, method: str, params: dict[str, Any], request_id: str | int
) -> None:
    await connection.send(json.dumps({"method": method, "params": params, "id": request_id}))


def outcome(answer: dict[str, Any]) -> str:
    """One line for a final answer."""
    data = answer["data"]
    if answer["type"] == "error":
        return f"{data['code']}: {data['message']}"
    return json.dumps(data["result"])


def print_broadcast(message: dict[str, Any]) -> None:
    data = message["data"]
    if message["type"] == "status_update":
        states = ", ".join(f"{name} {service['state']}" for name, service in data.items())
        print(f"status: {states}", flush=True)
    else:
        print(f"{message['type']}: {data.get('message', data)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("commands", nargs="*", help="command lines to run")
    parser.add_argument("--url", default="ws://localhost:8000/ws")
    options = parser.parse_args()
    try:
        if options.commands:
            asyncio.run(run_commands(options.url, options.commands))
        else:
            asyncio.run(watch(options.url))
    except KeyboardInterrupt:
        pass
    except (OSError, ConnectionClosed, InvalidHandshake) as error:
        raise SystemExit(f"cannot talk to {options.url}: {error}") from None


if __name__ == "__main__":
    main()
