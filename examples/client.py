"""A program that uses a Karna WS server: commands at the same time, broadcasts, a server that asks.

    python examples/client.py "echo hello" "countdown 3"    # run them, print what they tell, exit
    python examples/client.py                               # print broadcasts until Ctrl-C

KARNA_URL names another server, KARNA_TOKEN holds the token where the server wants one.
"""

import asyncio
import json
import logging
import os
import sys
from pathlib import Path

# karna/client/ needs karna/text.py alone: beside them it needs no such line.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from karna.client import Client, ClientError, CommandError, connect

logging.basicConfig(level=logging.INFO, format="%(message)s")  # it says when it is away
logging.getLogger("websockets").setLevel(logging.WARNING)

client = connect(os.environ.get("KARNA_URL", "ws://localhost:8000/ws"))


@client.on("confirm")
def confirm(question: str) -> bool:
    """The server asks; a plain function may wait for a person, as it runs in a thread."""
    return input(f"{question} [y/N] ").strip().lower() == "y"


async def run(client: Client, command: str) -> None:
    try:
        result = await client.execute(command, on_progress=lambda it: print(f"{command}: {it}"))
        print(f"{command} -> {json.dumps(result)}", flush=True)
    except CommandError as error:
        print(f"{command} -> {error}", flush=True)


async def listen(client: Client) -> None:
    async for broadcast in client.broadcasts():
        if broadcast.is_gap:  # away for too long: what is the state now?
            print("some were missed; the status is", await client.status(), flush=True)
        else:
            print(f"{broadcast.type}: {json.dumps(broadcast.data)}", flush=True)


async def main(commands: list[str]) -> None:
    async with client:
        print("connected", flush=True)
        if not commands:
            return await listen(client)
        await asyncio.gather(*(run(client, command) for command in commands))


if __name__ == "__main__":
    try:
        asyncio.run(main(sys.argv[1:]))
    except ClientError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        pass
