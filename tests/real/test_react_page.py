"""examples/frontend: type-checked, built, and used in Chromium."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

from karna_ws import WebSocketManager, serving
from support_clients import (
    CHROMIUM,
    Wire,
    chromium_path,
    complaints,
    frontend_node,
    notify,
    running,
    ws_url,
)


async def test_frontend_type_checks_and_builds(frontend_dir: Path, tmp_path: Path) -> None:
    async with running("npm", "run", "check", cwd=frontend_dir) as check:
        await check.ends()
    build = ("node", "node_modules/vite/bin/vite.js", "build", "--outDir", tmp_path / "dist")
    async with running(*build, cwd=frontend_dir) as vite:
        await vite.ends()
    built = "".join(file.read_text() for file in (tmp_path / "dist" / "assets").glob("*.js"))
    assert "ws://localhost:8000/ws" in built  # the seed's address, unless told otherwise


def free_port(wanted: int) -> int:
    """This port if nobody listens on it, else another one."""
    for port in (wanted, 0):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)) as probe:
            return int(probe.getsockname()[1])
    raise AssertionError("no port to be had")


async def test_react_page_works_in_strict_mode_and_survives_restart(frontend_dir: Path) -> None:
    script = """
      const results = page.getByRole('region', { name: 'Results' });
      const notifications = page.getByRole('region', { name: 'Notifications' });
      const services = page.getByRole('list', { name: 'Services' });
      const enter = async (command) => {
        await page.getByLabel('Command').fill(command);
        await page.getByRole('button', { name: 'Run' }).click();
      };
      await page.goto(process.argv[3]);
      await page.getByText('connected', { exact: true }).waitFor();
      await services.getByText(/^command: /).waitFor();
      say('services', await services.getByRole('listitem').allInnerTexts());
      await told('commands');
      await enter('echo hello there');
      await results.locator('li', { hasText: 'echo hello there' }).locator('pre').waitFor();
      await enter('eccho');
      await results.getByRole('button', { name: 'echo' }).waitFor();
      await enter('countdown 0.5');
      await page.locator('.progress').waitFor();
      await results.locator('li', { hasText: 'countdown 0.5' }).waitFor();
      await page.locator('.progress').waitFor({ state: 'detached' });
      say('results', await results.getByRole('listitem').allInnerTexts());
      await notifications.getByText('hello page').waitFor();
      say('notified');
      await page.getByText('not connected', { exact: true }).waitFor();
      say('away', await page.getByRole('button', { name: 'Run' }).isDisabled());
      await page.getByText('connected', { exact: true }).waitFor();
      say('back');
      await enter('echo back again');
      await results.locator('li', { hasText: 'echo back again' }).waitFor();
      await notifications.getByText('hello once more').waitFor();
      say('recovered', await services.getByRole('listitem').allInnerTexts());
      await told('end');
      await browser.close();
      finish();
    """
    async with contextlib.AsyncExitStack() as stack:
        async with serving(WebSocketManager(), port=0) as server:
            port = server.port
            wire = await stack.enter_async_context(Wire(port))
            page_url = await stack.enter_async_context(
                vite_dev_server(frontend_dir, free_port(5173), wire)
            )
            arguments = (ws_url(wire.port), chromium_path(), page_url)
            program = await stack.enter_async_context(
                frontend_node(frontend_dir, CHROMIUM + script, *arguments)
            )
            services = await program.wait_for("services")
            assert {"vision", "language", "command"} <= {line.split(":")[0] for line in services}
            await wire.carries(1)  # StrictMode's first mount left nothing behind
            program.tell("commands")
            results = await program.wait_for("results")
            assert "hello there" in results[-1] and len(results) == 3
            await notify(port, "hello page")
            await program.wait_for("notified")
            assert complaints(program) == []

        assert await program.wait_for("away") is True
        async with serving(WebSocketManager(), port=port):
            await program.wait_for("back")
            await notify(port, "hello once more")
            assert len(await program.wait_for("recovered")) >= 3
            await wire.carries(1)
            program.tell("end")
            await program.ends()
        # Chromium itself remarks on every try to connect while the server was away.
        tried = "WebSocket connection to"
        assert [line for line in complaints(program) if tried not in str(line)] == []


@contextlib.asynccontextmanager
async def vite_dev_server(folder: Path, port: int, wire: Wire) -> AsyncIterator[str]:
    """Serve the page in development mode; gives its address."""
    command = ("node", "node_modules/vite/bin/vite.js", "--port", str(port), "--strictPort")
    async with running(*command, cwd=folder, VITE_KARNA_URL=ws_url(wire.port)) as vite:
        await vite.wait_for_line("Local")
        yield f"http://localhost:{port}/"
