"""What one's own commands cost: the same sum in each of the four ways to declare a command.

`python karna_ws.py bench/commands.py` serves such a file; this one serves itself, too, for copies
of Karna that do not know how: `python bench/commands.py --port 8000` with Karna on the PYTHONPATH.
"""

from __future__ import annotations

import argparse
import asyncio

from karna_ws import WebSocketManager, serve

manager = WebSocketManager()
command = manager.commands.command


@command(inline=True)
def add(a: int, b: int) -> int:
    """Add two numbers at once, on the loop."""
    return a + b


@command
async def add0(a: int, b: int) -> int:
    """Add two numbers in a coroutine that never waits."""
    return a + b


@command
async def add1(a: int, b: int) -> int:
    """Add two numbers in a coroutine that waits once."""
    await asyncio.sleep(0)
    return a + b


@command
def add_in_thread(a: int, b: int) -> int:
    """Add two numbers in a thread."""
    return a + b


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--loop", default="asyncio", choices=("asyncio", "uvloop"))
    options = parser.parse_args()
    if options.loop == "uvloop":
        import uvloop

        uvloop.run(serve(manager, port=options.port))
    else:
        asyncio.run(serve(manager, port=options.port))


if __name__ == "__main__":
    main()
