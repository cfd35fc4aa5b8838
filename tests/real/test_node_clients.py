"""socket.io-client and examples/karna-client.ts, in Node and in Chromium."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect

from karna_ws import WebSocketManager, serving
from services import Context
from support import DEADLINE_S
from support_clients import (
    CHROMIUM,
    PNG,
    SOCKET_IO,
    Wire,
    chromium_path,
    complaints,
    frontend_node,
    notify,
    wait_for_notification,
    ws_url,
)


async def test_socket_io_client_gets_answers_as_event_or_as_ack(node_dir: Path) -> None:
    script = """
      const socket = connectTo(url);
      await new Promise((resolve) => socket.on('connect', resolve));
      for (const message of [{ method: 'get_status', params: {} }, run('echo one'), run('eccho')])
        await new Promise((resolve) => {
          socket.once('rpc_response', resolve);
          socket.emit('rpc', message);
        });
      say('acks');
      const two = { ...run('echo two'), id: 7 };
      for (const message of [{ method: 'get_status' }, two, run('eccho'), 5])
        say('ack', await socket.timeout(5000).emitWithAck('rpc', message));
      say('method', await socket.timeout(5000).emitWithAck('get_status', {}));
      say('unheard', await socket.timeout(5000).emitWithAck('no-such-event', 1));
      say('ready');
      await told('end');
      socket.disconnect();
      finish();
    """
    async with (
        serving(WebSocketManager(), port=0) as server,
        frontend_node(node_dir, SOCKET_IO + script, ws_url(server.port)) as program,
    ):
        await program.wait_for("acks")
        (status,) = program.all("status_update")
        assert {"vision", "language", "command"} <= set(status["data"])
        (echoed,) = program.all("command_response")
        assert echoed["data"] == {"command": "echo one", "result": "one"} and "id" not in echoed
        (error,) = program.all("error")
        assert error["data"]["code"] == "unknown_command"
        assert "echo" in error["data"]["suggestions"]

        await program.wait_for("ready")
        status, echoed, error, invalid = program.all("ack")
        assert status["type"] == "status_update" and status["data"]["command"]["state"]
        assert echoed["type"] == "command_response" and echoed["id"] == 7
        assert echoed["data"] == {"command": "echo two", "result": "two"}
        assert (error["type"], error["data"]["code"]) == ("error", "unknown_command")
        assert (invalid["type"], invalid["data"]["code"]) == ("error", "invalid_request")
        assert program.all("method")[0]["type"] == "status_update"
        assert program.all("unheard")[0]["type"] == "error"
        # With an ack, nothing came as an event besides.
        assert [len(program.all(kind)) for kind in ("command_response", "error")] == [1, 1]

        await notify(server.port, "hello all")
        notification = await program.wait_for("notification")
        assert notification["data"]["message"] == "hello all"
        assert notification["data"]["level"] == "info"
        assert isinstance(notification["offset"], str)
        program.tell("end")
        await program.ends()
        assert program.all("disconnect") == ["io client disconnect"]


async def test_socket_io_client_sends_image_as_bytes_to_describe(node_dir: Path) -> None:
    script = """
      const socket = connectTo(url);
      const image = Buffer.from(process.argv[2], 'base64');
      say('ack', await socket.timeout(5000).emitWithAck('rpc', run('describe', { image })));
      socket.emit('rpc', run('describe', { image }));
      socket.once('rpc_response', () => { socket.disconnect(); finish(); });
    """
    async with (
        serving(WebSocketManager(), port=0) as server,
        frontend_node(
            node_dir, SOCKET_IO + script, ws_url(server.port), base64.b64encode(PNG).decode()
        ) as program,
    ):
        await program.ends()
        (ack,), (event,) = program.all("ack"), program.all("command_response")
        for answer in (ack, event):
            result = answer["data"]["result"]
            assert (result["format"], result["width"], result["height"]) == ("png", 3, 2)
            assert result["bytes"] == len(PNG)


async def test_socket_io_client_reconnects_by_itself_after_server_restart(node_dir: Path) -> None:
    script = """
      const socket = connectTo(url);
      await told('again');
      say('ack', await socket.timeout(5000).emitWithAck('rpc', run('echo back')));
      socket.disconnect();
      finish();
    """
    async with contextlib.AsyncExitStack() as stack:
        async with serving(WebSocketManager(), port=0) as server:
            program = await stack.enter_async_context(
                frontend_node(node_dir, SOCKET_IO + script, ws_url(server.port))
            )
            first = await program.wait_for("connect")
            port = server.port
        # A 41 packet would be "io server disconnect", after which clients stay away.
        assert await program.wait_for("disconnect") == "transport close"
        async with serving(WebSocketManager(), port=port):
            second = await program.wait_for("connect")
            assert first["recovered"] is second["recovered"] is False
            program.tell("again")
            assert (await program.wait_for("ack"))["data"]["result"] == "back"
            await program.ends()


async def test_socket_io_client_needs_the_token(node_dir: Path) -> None:
    script = """
      const wrong = connectTo(url, { auth: { token: 'wrong' }, forceNew: true });
      const none = connectTo(url, { forceNew: true });
      const refused = (socket) => new Promise((resolve) => socket.on('connect_error', resolve));
      await Promise.all([refused(wrong), refused(none)]);
      say('refused');
      const right = connectTo(url, { auth: { token: 'sesame' }, forceNew: true });
      say('ack', await right.timeout(5000).emitWithAck('rpc', run('echo in')));
      for (const socket of [wrong, none, right]) socket.disconnect();
      finish();
    """
    async with (
        serving(WebSocketManager(), port=0, token="sesame") as server,
        frontend_node(node_dir, SOCKET_IO + script, ws_url(server.port)) as program,
    ):
        await program.wait_for("refused")
        assert program.all("connect") == []
        errors = program.all("connect_error")
        # Not active: refused by the server, so the client does not hammer it with a wrong token.
        assert [error["active"] for error in errors] == [False, False]
        assert all("token" in error["message"] for error in errors)
        assert (await program.wait_for("ack"))["data"]["result"] == "in"
        await program.ends()


async def test_socket_io_client_is_refused_an_unknown_namespace(node_dir: Path) -> None:
    script = """
      const known = connectTo(url);
      const unknown = connectTo(url.replace('/ws', '/elsewhere'));  // over the same connection
      await new Promise((resolve) => unknown.on('connect_error', resolve));
      say('ack', await known.timeout(5000).emitWithAck('rpc', run('echo here')));
      known.disconnect();
      unknown.disconnect();
      finish();
    """
    async with (
        serving(WebSocketManager(), port=0) as server,
        frontend_node(node_dir, SOCKET_IO + script, ws_url(server.port)) as program,
    ):
        error = await program.wait_for("connect_error")
        assert error["message"] == "Invalid namespace"
        assert (await program.wait_for("ack"))["data"]["result"] == "here"
        await program.ends()


async def test_socket_io_client_with_retries_gets_every_ack(node_dir: Path) -> None:
    # With `retries` one packet is under way at a time: a missing ack stalls the rest.
    script = """
      const socket = connectTo(url, { retries: 3, ackTimeout: 5000 });
      for (const number of [1, 2, 3])
        socket.emit('rpc', run(`echo ${number}`), (_, answer) => say('ack', answer.data.result));
      socket.emit('no-such-event', 1, (error, answer) => say('ack', answer.type));
      socket.emit('rpc', 'not a request', (error, answer) => say('ack', answer.data.code));
      socket.emit('rpc', run('echo last'), (error, answer) => {
        say('ack', answer.data.result);
        socket.disconnect();
        finish();
      });
    """
    async with (
        serving(WebSocketManager(), port=0) as server,
        frontend_node(node_dir, SOCKET_IO + script, ws_url(server.port)) as program,
    ):
        await program.ends()
        assert program.all("ack") == ["1", "2", "3", "error", "invalid_request", "last"]


@pytest.mark.parametrize("seen", ["a broadcast", "no broadcast", "an event of the program"])
async def test_socket_io_client_recovers_every_broadcast_over_network_cut(
    node_dir: Path, seen: str
) -> None:
    script = """
      const socket = connectTo(url);
      socket.on('greeting', (text) => say('greeting', text));
      told('greet').then(() => socket.emit('greet', 'Ada'));
      await told('end');
      socket.disconnect();
      finish();
    """
    manager = WebSocketManager()

    @manager.on("greet")
    async def greet(client: Any, name: str) -> None:
        await client.emit("greeting", f"Hello, {name}!")

    async with (
        serving(manager, port=0) as server,
        Wire(server.port) as wire,
        frontend_node(node_dir, SOCKET_IO + script, ws_url(wire.port)) as program,
    ):
        first = await program.wait_for("connect")
        assert first["recovered"] is False
        expected = ["missed 0", "missed 1", "missed 2", "after"]
        if seen != "no broadcast":  # without one it has no offset to send, only its pid
            await notify(server.port, "before")
            await program.wait_for("notification")
            expected.insert(0, "before")
        if seen == "an event of the program":  # whose last string the client takes for an offset
            program.tell("greet")
            assert await program.wait_for("greeting") == "Hello, Ada!"
        wire.cut()
        await program.wait_for("disconnect")
        for number in range(3):
            await notify(server.port, f"missed {number}")
        wire.mend()
        second = await program.wait_for("connect")
        assert second == {"id": first["id"], "recovered": True}
        await notify(server.port, "after")
        await wait_for_notification(program, "after")
        program.tell("end")
        await program.ends()
        messages = [response["data"]["message"] for response in program.all("notification")]
        assert messages == expected


async def test_socket_io_client_answers_questions_and_is_told_as_much_as_was_said(
    node_dir: Path,
) -> None:
    """An event that ends in a string brings one argument more, a function nobody waits for."""
    script = """
      const socket = connectTo(url);
      socket.on('confirm', (question, answer) => answer(question === 'burn?'));
      socket.on('choose', (a, b, answer) => answer(a, b));
      socket.on('told', (...args) => say('told', args.filter((each) => typeof each !== 'function')));
      await told('end');
      socket.disconnect();
      finish();
    """
    manager = WebSocketManager()
    async with (
        serving(manager, port=0) as server,
        frontend_node(node_dir, SOCKET_IO + script, ws_url(server.port)) as program,
    ):
        await program.wait_for("connect")
        (client,) = manager.all_clients()
        assert await client.call("confirm", "burn?") is True
        assert await client.call("confirm", "freeze?") is False
        assert await client.call("choose", 1, "x") == [1, "x"]
        for args in (["colour?"], [1], [], ["a", "b"]):
            await client.emit("told", *args)
            assert await program.wait_for("told") == args
        program.tell("end")
        await program.ends()


async def test_socket_io_client_2_is_told_to_upgrade(node_dir: Path) -> None:
    script = """
      import io from 'socket.io-client-2';
      const socket = io(url, { transports: ['websocket'], reconnection: false });
      socket.on('connect', () => say('connect'));
      socket.on('error', (error) => { say('told', error); socket.close(); finish(); });
      socket.on('connect_error', (error) => { say('connect_error', String(error)); finish(); });
    """
    async with (
        serving(WebSocketManager(), port=0) as server,
        frontend_node(node_dir, script, ws_url(server.port)) as program,
    ):
        told = await program.wait_for("told")
        assert re.search(r"socket\.io-client.*\b3\b|\bv?3\b.*socket\.io-client", str(told)), told
        await program.ends()


KARNA_CLIENT = """
const { KarnaClient } = await import(process.argv[2]);
const { default: WebSocket } = await import('ws');
const start = (options) => {
  const karna = new KarnaClient(url, { WebSocket, minDelayMs: 20, ...options });
  for (const event of ['open', 'close', 'status', 'notification', 'gap', 'error'])
    karna.on(event, (value) => say(event, value));
  return karna;
};
const outcome = (promise) => promise.then(
  (value) => ({ value }),
  (error) => ({ error: error.name, code: error.code, message: error.message }),
);
"""


async def test_karna_client_runs_commands_with_progress_and_cancel(
    node_dir: Path, karna_client_js: Path
) -> None:
    script = """
      const karna = start();
      const progress = [];
      const onProgress = (value) => progress.push(value);
      say('outcomes', await Promise.all([
        karna.command('countdown 0.2', { onProgress }),  // asked before the connection is open
        karna.command('echo quick'),
        karna.request('get_status', {}),
        karna.command('eccho'),
        karna.request('no_such_method', {}),
        karna.command('echo never', { signal: AbortSignal.abort() }),
      ].map(outcome)));
      say('progress', progress);
      const stop = new AbortController();
      const long = outcome(karna.command('countdown 60', {
        signal: stop.signal,
        onProgress: () => stop.abort(new Error('enough')),
      }));
      say('aborted', await long);
      await told('end');
      say('lost', await Promise.all([outcome(karna.command('countdown 60')), karna.close()]));
      say('late', await outcome(karna.status()));
      finish();
    """
    manager = WebSocketManager()
    async with (
        serving(manager, port=0) as server,
        frontend_node(
            node_dir, KARNA_CLIENT + script, ws_url(server.port), karna_client_js
        ) as program,
    ):
        counted, quick, status, unknown, no_method, never = await program.wait_for("outcomes")
        assert counted["value"]["command"] == "countdown 0.2"
        assert quick["value"] == {"command": "echo quick", "result": "quick"}
        assert status["value"]["command"]["state"] in ("starting", "running")
        assert (unknown["error"], unknown["code"]) == ("KarnaError", "unknown_command")
        assert no_method["code"] == "unknown_method"
        assert never["error"] == "AbortError"
        progress = await program.wait_for("progress")
        assert progress and all({"remaining", "percent"} <= set(value) for value in progress)
        assert await program.wait_for("aborted") == {"error": "Error", "message": "enough"}
        await no_command_runs(server.port)
        program.tell("end")
        (lost, _) = await program.wait_for("lost")
        assert lost["code"] == "closed"
        assert (await program.wait_for("late"))["code"] == "closed"
        await program.ends()  # nothing of the client keeps Node alive
        assert [close.get("retryInMs") for close in program.all("close")] == [None]


async def no_command_runs(port: int) -> None:
    """Wait until the server says that no command runs: a cancelled one did not go on."""
    async with asyncio.timeout(DEADLINE_S), connect(ws_url(port, "127.0.0.1")) as connection:
        while True:
            await connection.send('{"method": "get_status", "id": 1}')
            status = json.loads(await connection.recv())
            if status["data"]["command"]["running"] == 0:
                return


async def test_karna_client_recovers_broadcasts_and_tells_of_gaps(
    node_dir: Path, karna_client_js: Path
) -> None:
    script = """
      const karna = start({ heartbeatMs: 150 });
      await told('end');
      karna.close();
      finish();
    """
    async with contextlib.AsyncExitStack() as stack:
        # The connection that is frozen below will not answer the server's close frame.
        async with serving(WebSocketManager(), port=0, close_timeout_s=0.2) as server:
            port = server.port
            wire = await stack.enter_async_context(Wire(port))
            program = await stack.enter_async_context(
                frontend_node(node_dir, KARNA_CLIENT + script, ws_url(wire.port), karna_client_js)
            )
            assert await program.wait_for("open") == {"resumed": False}
            await program.wait_for("status")  # brings the first offset, with no broadcast yet
            wire.cut()
            assert (await program.wait_for("close"))["retryInMs"] > 0
            for number in range(3):
                await notify(port, f"missed {number}")
            wire.mend()
            assert await program.wait_for("open") == {"resumed": True}
            await notify(port, "live")
            while (await program.wait_for("notification"))["message"] != "live":
                pass
            wire.freeze()  # nothing closes; the client must notice the silence by itself
            assert (await program.wait_for("close"))["code"] == 4000
            assert await program.wait_for("open") == {"resumed": True}
            await notify(port, "thawed")
            while (await program.wait_for("notification"))["message"] != "thawed":
                pass
        await program.wait_for("close")
        async with serving(WebSocketManager(), port=port):
            # Offsets of the earlier process are unknown to this one.
            gap = await program.wait_for("gap")
            assert gap["code"] == "history_gap"
            await program.wait_for("status")
            program.tell("end")
            await program.ends()
        messages = [notification["message"] for notification in program.all("notification")]
        assert messages == ["missed 0", "missed 1", "missed 2", "live", "thawed"]
        assert program.all("error") == []


async def test_karna_client_sends_the_token(node_dir: Path, karna_client_js: Path) -> None:
    script = """
      const refused = start({ token: 'wrong' });
      await new Promise((resolve) => refused.on('close', resolve));
      refused.close();
      const karna = start({ token: 'sesame & more' });
      say('outcome', await outcome(karna.command('echo in')));
      karna.close();
      finish();
    """
    async with (
        serving(WebSocketManager(), port=0, token="sesame & more") as server,
        frontend_node(
            node_dir, KARNA_CLIENT + script, ws_url(server.port), karna_client_js
        ) as program,
    ):
        outcome = await program.wait_for("outcome")
        assert outcome["value"]["result"] == "in"
        await program.ends()
        assert len(program.all("open")) == 1


async def test_karna_client_answers_what_the_server_asks(
    node_dir: Path, karna_client_js: Path
) -> None:
    script = """
      const karna = start();
      karna.answer('confirm', async (question) => question === 'Really?');
      karna.answer('never', () => { throw new Error('I will not'); });
      karna.answer('nothing', () => {});
      for (const event of ['confirm', 'nothing', 'never', 'unheard'])
        say('outcome', await outcome(karna.command(`ask ${event} Really?`)));
      karna.close();
      finish();
    """
    manager = WebSocketManager()

    @manager.commands.command
    async def ask(event: str, question: str, context: Context) -> Any:
        return await context.client.call(event, question)

    async with (
        serving(manager, port=0) as server,
        frontend_node(
            node_dir, KARNA_CLIENT + script, ws_url(server.port), karna_client_js
        ) as program,
    ):
        await program.ends()
        agreed, nothing, refused, unheard = program.all("outcome")
        assert agreed["value"]["result"] is True
        assert nothing["value"]["result"] is None
        assert (refused["code"], unheard["code"]) == ("command_failed",) * 2
        assert "I will not" in refused["message"] and "unheard" in unheard["message"]
        assert program.all("error") == []


async def test_karna_client_comes_back_where_no_close_tells_of_a_failure(
    node_dir: Path, karna_client_js: Path
) -> None:
    """Node 22's WebSocket fires `error` alone when a connection was never made."""
    script = """
      let tries = 0;
      class Silent {
        constructor(url) {
          if (++tries === 3) return new WebSocket(url);
          setTimeout(() => this.onerror({}), 1);
        }
        close() {}
      }
      const karna = start({ WebSocket: Silent });
      say('outcome', await outcome(karna.command('echo back')));
      karna.close();
      finish();
    """
    async with (
        serving(WebSocketManager(), port=0) as server,
        frontend_node(
            node_dir, KARNA_CLIENT + script, ws_url(server.port), karna_client_js
        ) as program,
    ):
        assert (await program.wait_for("outcome"))["value"]["result"] == "back"
        await program.ends()
        assert [each["code"] for each in program.all("close")] == [1006, 1006, 1000]


async def test_karna_client_works_in_chromium(node_dir: Path, karna_client_js: Path) -> None:
    script = """
      import { readFileSync } from 'node:fs';
      import { createServer } from 'node:http';
      const module = readFileSync(process.argv[3]);
      // A page of another localhost port (Chromium keeps a page without a server off loopback).
      const web = createServer(({ url }, response) => {
        const type = url.endsWith('.js') ? 'text/javascript' : 'text/html';
        response.setHeader('Content-Type', type);
        const html = '<!doctype html><link rel="icon" href="data:,">';
        response.end(url.endsWith('.js') ? module : html);
      });
      await new Promise((resolve) => web.listen(0, '127.0.0.1', resolve));
      await page.goto(`http://localhost:${web.address().port}/`);
      const found = await page.evaluate(async (url) => {
        const { KarnaClient } = await import('/karna-client.js');
        const karna = new KarnaClient(url);
        const notified = new Promise((resolve) => karna.on('notification', resolve));
        const progress = [];
        const onProgress = (value) => progress.push(value);
        const counted = await karna.command('countdown 0.1', { onProgress });
        const stopped = await karna
          .command('countdown 60', { signal: AbortSignal.timeout(50) })
          .catch((error) => error.name);
        await karna.command('notify hello browser');
        const notification = await notified;
        const closed = new Promise((resolve) => karna.on('close', resolve));
        karna.close();
        return { counted, progress, stopped, notification, closed: await closed };
      }, url);
      say('found', found);
      await browser.close();
      web.close();
      finish();
    """
    async with (
        serving(WebSocketManager(), port=0) as server,
        frontend_node(
            node_dir, CHROMIUM + script, ws_url(server.port), chromium_path(), karna_client_js
        ) as program,
    ):
        found = await program.wait_for("found")
        assert found["counted"]["command"] == "countdown 0.1"
        assert "percent" in found["progress"][-1]
        assert found["stopped"] == "TimeoutError"
        assert found["notification"]["message"] == "hello browser"
        assert "retryInMs" not in found["closed"]
        await program.ends()
        assert complaints(program) == []
