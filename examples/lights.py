"""Lights: a program of one's own. Run it, open http://localhost:8000/.

    python karna_ws.py examples/lights.py --reload      with every flag of the command line
    python examples/lights.py --port 8000               by itself

It adds commands (`light kitchen on`, `sunrise hall --seconds 5`), a group for each lamp (`watch
kitchen`), a service whose badge follows the lamps' bus, the RPC method `lights`, and a service that
notifies everybody of a lamp left on.
"""

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

# For the second way: karna_ws.py, services.py and karna/ beside this file need no such line.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from karna_ws import WebSocketManager, serving
from services import CommandFailed, CommandProcessor, Context, Service, Unavailable

lamps = {"kitchen": 0, "hall": 0, "porch": 0}  # brightness, 0 to 100
commands = CommandProcessor()


class Bus(Service):
    """The wire to the lamps. `bus unplug` plays a cable that is pulled out."""

    plugged = True

    async def check(self) -> None:
        if not self.plugged:
            raise Unavailable("the bus does not answer")

    def set(self, lamp: str, level: int) -> dict[str, int]:
        if not self.plugged:
            raise Unavailable("the bus does not answer")
        if lamp not in lamps:
            raise CommandFailed(f"no lamp {lamp!r}; there are {', '.join(lamps)}")
        lamps[lamp] = level
        manager.broadcast("lamp", {"lamp": lamp, "level": level}, to=lamp)  # who watches it
        return lamps


class Reminder(Service):
    """Tells every client of a lamp that was on at two looks in a row."""

    left_on_s = 20.0

    async def start(self) -> None:  # where what runs beside the commands begins
        self._task = asyncio.create_task(self._remind())

    async def stop(self) -> None:
        self._task.cancel()

    async def _remind(self) -> None:
        before: set[str] = set()
        while True:
            await asyncio.sleep(self.left_on_s)
            now = {lamp for lamp, level in lamps.items() if level}
            for lamp in sorted(now & before):
                manager.notify(f"The light in the {lamp} is still on.", level="warning")
            before = now


bus, reminder = Bus("bus"), Reminder("reminder")
manager = WebSocketManager(commands=commands, services=[bus, reminder])


@commands.command
async def light(lamp: str, state: Literal["on", "off"]) -> dict[str, int]:
    """Turn a lamp on or off."""
    return bus.set(lamp, 100 if state == "on" else 0)


@commands.command
async def sunrise(lamp: str, *, seconds: float = 5.0) -> AsyncIterator[dict[str, Any]]:
    """Brighten a lamp slowly; cancelled, it stays as bright as it is."""
    for percent in range(0, 101, 5):
        bus.set(lamp, percent)
        yield {"percent": percent, "lamp": lamp}
        await asyncio.sleep(seconds / 20)


@commands.command
async def watch(lamp: Literal["kitchen", "hall", "porch"], context: Context) -> list[str]:
    """Hear of each change of a lamp, as broadcasts of type `lamp`; tells what you watch."""
    context.client.join(lamp)
    return sorted(context.client.groups)


@commands.command(name="bus")
async def plug(action: Literal["plug", "unplug"]) -> str:
    """Plug the cable in or pull it out, and see the badge change."""
    bus.plugged = action == "plug"
    bus.set_state("running" if bus.plugged else "degraded", "" if bus.plugged else "unplugged")
    return bus.state


@manager.method("lights")
async def lights() -> dict[str, int]:
    """The brightness of every lamp: {"method": "lights"} on any door."""
    return lamps


async def main(port: int, left_on_s: float) -> None:
    reminder.left_on_s = left_on_s
    async with serving(manager, port=port) as server:
        print(f"lights: http://localhost:{server.port}/", flush=True)
        await server.wait_closed()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Lamps over Karna WS.")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--left-on", type=float, default=20.0, metavar="SECONDS", help="time until a reminder"
    )
    flags = parser.parse_args()
    try:
        asyncio.run(main(flags.port, flags.left_on))
    except KeyboardInterrupt:
        pass
