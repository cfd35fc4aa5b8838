"""web/console.html in a real Chromium, as a person uses it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest
from websockets.asyncio.client import ClientConnection, connect

from karna_ws import WebSocketManager, serving
from services import CommandProcessor, Context, Service
from support import DEADLINE_S, ROOT, needs
from support_clients import Wire, Host, make_png


KEYS = {
    "Enter": (13, "\r"), "Tab": (9, ""), "Escape": (27, ""), "ArrowUp": (38, ""),
    "ArrowDown": (40, ""), "Space": (32, " "),
}  # fmt: skip


# Resolves once an expression is true, looked at after every change of the document.
UNTIL = """new Promise((resolve) => {
  const look = () => { const value = (%s); if (value) { observer.disconnect(); resolve(value); } };
  const observer = new MutationObserver(look);
  const all = { subtree: true, childList: true, attributes: true, characterData: true };
  observer.observe(document, all);
  look();
})"""


class Page:
    """A tab of its own (own storage) and what a person can do with it."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.session = ""
        self.context = ""
        self.problems: list[str] = []  # console errors, exceptions, violations of the CSP
        self.answers: dict[int, asyncio.Future[Any]] = {}
        self.choosers: asyncio.Queue[int] = asyncio.Queue()
        self.loaded = asyncio.Event()

    async def read(self) -> None:
        async for text in self.socket:
            message = json.loads(text)
            if "id" in message:
                self.answers.pop(message["id"]).set_result(message)
            else:
                self.note(message["method"], message["params"])

    def note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.problems.append(json.dumps(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif method == "Audits.issueAdded":
            if params["issue"]["code"] == "ContentSecurityPolicyIssue":
                self.problems.append(json.dumps(params["issue"]))
        elif method == "Page.loadEventFired":
            self.loaded.set()
        elif method == "Page.fileChooserOpened":
            self.choosers.put_nowait(params["backendNodeId"])

    async def call(self, method: str, **params: Any) -> Any:
        number = len(self.answers) + random.getrandbits(30)
        self.answers[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        future = self.answers[number]
        await self.socket.send(json.dumps(message))
        answer = await asyncio.wait_for(future, DEADLINE_S)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    async def open(self, url: str, **look: Any) -> None:
        """Make the tab and load the page; `look` may give width, height, scheme."""
        self.context = (await self.call("Target.createBrowserContext"))["browserContextId"]
        made = await self.call(
            "Target.createTarget", url="about:blank", browserContextId=self.context
        )
        attached = await self.call("Target.attachToTarget", targetId=made["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM", "Accessibility", "Audits"):
            await self.call(f"{domain}.enable")
        await self.call("Emulation.setFocusEmulationEnabled", enabled=True)
        await self.look(**look)
        await self.load("Page.navigate", url=url)

    async def close(self) -> None:
        self.session = ""
        await self.call("Target.disposeBrowserContext", browserContextId=self.context)

    async def load(self, method: str = "Page.reload", **params: Any) -> None:
        self.loaded.clear()
        await self.call(method, **params)
        await asyncio.wait_for(self.loaded.wait(), DEADLINE_S)

    async def look(self, width: int = 1200, height: int = 760, scheme: str = "light") -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 500,
        )  # fmt: skip
        feature = {"name": "prefers-color-scheme", "value": scheme}
        await self.call("Emulation.setEmulatedMedia", features=[feature])

    async def evaluate(self, expression: str) -> Any:
        answer = await self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, expression: str) -> Any:
        """Wait until the expression is true; give its value."""
        try:
            return await self.evaluate(UNTIL % expression)
        except TimeoutError:
            text = await self.evaluate("document.body.innerText")
            raise AssertionError(f"never true: {expression}\n{text}") from None

    async def until_open(self) -> None:
        await self.until("$('link').dataset.state === 'open'")
        await self.until("$('prompt').dataset.commands")

    async def until_reopened(self) -> None:
        """Wait for a connection that came by itself after one was lost."""
        await self.until("!document.body.hasAttribute('data-away') && isOpen()")

    async def copied(self) -> str:
        """What the clipboard of this tab's own context holds."""
        return str(await self.evaluate("navigator.clipboard.readText()"))

    async def allow_clipboard(self) -> None:
        session, self.session = self.session, ""
        await self.call(
            "Browser.grantPermissions",
            permissions=["clipboardReadWrite", "clipboardSanitizedWrite"],
            browserContextId=self.context,
        )
        self.session = session

    async def until_log(self, words: str) -> str:
        """Wait for a line of the broadcasts with these words; give all of its text."""
        found = "[...document.querySelectorAll('#log li')].map((li) => li.textContent)"
        return str(await self.until(f"{found}.find((text) => text.includes({json.dumps(words)}))"))

    async def until_entry(self, line: str, state: str) -> str:
        """Wait for the last run of a command to reach a state; give its text."""
        runs = "[...document.querySelectorAll('.entry')]"
        runs += f".filter((entry) => entry.ariaLabel === {json.dumps(line)})"
        is_there = f"{runs}.at(-1)?.dataset.state === {json.dumps(state)}"
        return str(await self.until(f"{is_there} && {runs}.at(-1).innerText"))

    async def node(self, role: str, name: str) -> int:
        """The element that assistive technology would find by this role and name."""
        root = (await self.call("DOM.getDocument", depth=0))["root"]["nodeId"]
        found = await self.call(
            "Accessibility.queryAXTree", nodeId=root, accessibleName=name, role=role
        )
        shown = [node for node in found["nodes"] if not node["ignored"]]
        assert shown, f"no {role} named {name!r}"
        return int(shown[-1]["backendDOMNodeId"])

    async def centre(self, node: int) -> tuple[float, float]:
        await self.call("DOM.scrollIntoViewIfNeeded", backendNodeId=node)
        quad = (await self.call("DOM.getContentQuads", backendNodeId=node))["quads"][0]
        return (quad[0] + quad[4]) / 2, (quad[1] + quad[5]) / 2

    async def click(self, role: str, name: str) -> None:
        x, y = await self.centre(await self.node(role, name))
        for kind in ("mousePressed", "mouseReleased"):
            await self.call(
                "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1
            )

    async def press(self, key: str, *, shift: bool = False) -> None:
        code, text = KEYS[key]
        shared = {"key": key if key != "Space" else " ", "code": key, "modifiers": 8 * shift}
        shared |= {"windowsVirtualKeyCode": code}
        down = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
        await self.call("Input.dispatchKeyEvent", **shared, **down)
        await self.call("Input.dispatchKeyEvent", **shared, type="keyUp")

    async def type(self, text: str) -> None:
        await self.call("Input.insertText", text=text)

    async def run(self, line: str) -> None:
        await self.evaluate("$('line').focus()")
        await self.type(line)
        await self.press("Enter")

    async def drop(self, path: Path) -> None:
        x, y = await self.centre(await self.node("region", "Commands and results"))
        data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            await self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    async def screenshot(self, name: str) -> bytes:
        """A PNG of what is seen; kept where KARNA_SCREENSHOTS names a directory."""
        shot = b64decode((await self.call("Page.captureScreenshot", format="png"))["data"])
        if directory := os.environ.get("KARNA_SCREENSHOTS"):
            await asyncio.to_thread(Path(directory, name).write_bytes, shot)
        return shot


@contextlib.asynccontextmanager
async def tab(chromium: str, port: int, path: str = "/", **look: Any) -> AsyncIterator[Page]:
    async with connect(chromium, max_size=None) as socket:
        page = Page(socket)
        reader = asyncio.create_task(page.read())
        try:
            await page.open(f"http://localhost:{port}{path}", **look)
            yield page
        finally:
            await page.close()
            reader.cancel()


async def post_json(port: int, path: str, body: Any) -> tuple[int, Any]:
    """POST JSON as any HTTP client of another program would."""
    request = Request(
        f"http://localhost:{port}{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )

    def fetch() -> tuple[int, Any]:
        with urlopen(request, timeout=DEADLINE_S) as response:
            return response.status, json.load(response)

    return await asyncio.to_thread(fetch)


async def test_page_runs_commands_and_shows_their_results(chromium: str) -> None:
    async with serving(Host().manager, port=0) as server, tab(chromium, server.port) as page:
        await page.until_open()
        await page.click("button", "time")  # one that is offered to try
        assert await page.evaluate("$('line').value") == "time"
        await page.press("Enter")
        await page.until_entry("time", "done")
        await page.run("echo hello <b>world</b>")
        assert "hello <b>world</b>" in await page.until_entry("echo hello <b>world</b>", "done")
        await page.run("help")
        assert "countdown SECONDS" in await page.until_entry("help", "done")
        await page.run("tokens")
        text = await page.until_entry("tokens", "done")
        assert text.count("The quick fox") == 1  # streamed, and not shown again as the result
        await page.run("lines")
        await page.until_entry("lines", "done")
        lines = "[...document.querySelectorAll('.lines pre')].map((pre) => pre.innerText)"
        assert (await page.evaluate(lines)) == [f"line {n}" for n in range(100, 600)]
        await page.run("picture")
        await page.until_entry("picture", "done")
        assert await page.until("document.querySelector('.result img')?.naturalWidth === 4")
        assert page.problems == []


async def test_page_folds_large_values(chromium: str) -> None:
    async with serving(Host().manager, port=0) as server, tab(chromium, server.port) as page:
        await page.until_open()
        await page.run("report")
        text = await page.until_entry("report", "done")
        assert '"<b>bold</b>"' in text and '{ "x": [ 1 ] }' in text
        assert "list: [450 items]" in text and "199: 199" not in text
        await page.click("DisclosureTriangle", "list: [450 items]")
        await page.until("document.querySelector('.tree').innerText.includes('199: 199')")
        assert await page.evaluate(
            "!document.querySelector('.tree').innerText.includes('200: 200')"
        )
        await page.click("button", "show 200 more of 250")
        await page.click("button", "show 50 more of 50")
        await page.until("document.querySelector('.tree').innerText.includes('449')")
        assert page.problems == []


async def test_page_helps_after_a_mistake(chromium: str) -> None:
    async with serving(Host().manager, port=0) as server, tab(chromium, server.port) as page:
        await page.until_open()
        await page.run("ecoh hi")
        assert "unknown_command" in await page.until_entry("ecoh hi", "error")
        await page.click("button", "echo")
        assert await page.evaluate("$('line').value") == "echo "
        await page.run("countdown soon")  # after the "echo " that the button put there
        assert "soon" in await page.until_entry("echo countdown soon", "done")
        await page.run("countdown soon")
        assert "countdown SECONDS" in await page.until_entry("countdown soon", "error")


async def test_page_shows_progress_and_cancels(chromium: str) -> None:
    host = Host()
    async with serving(host.manager, port=0) as server, tab(chromium, server.port) as page:
        await page.until_open()
        await page.run("steps")
        await page.until("document.querySelector('progress')?.value === 40")
        assert "40 % · done 2" in await page.until_entry("steps", "running")
        await page.click("button", "Cancel steps")
        await page.until_entry("steps", "cancelled")
        await asyncio.wait_for(host.cancelled.wait(), DEADLINE_S)

        await page.run("steps")
        await page.until_entry("steps", "running")
        await page.press("Escape")
        await page.until_entry("steps", "cancelled")

        await page.run("steps")
        await page.until("document.querySelector('progress')?.value === 40")
        host.go_on.set()
        await page.until_entry("steps", "done")
        assert await page.evaluate("document.querySelectorAll('progress').length") == 0
        assert page.problems == []


async def test_page_logs_notifications_of_other_programs(chromium: str) -> None:
    async with serving(Host().manager, port=0) as server, tab(chromium, server.port) as page:
        await page.until_open()
        hostile = "<img src=x onerror=alert(1)><script>alert(2)</script>"
        assert (
            await post_json(server.port, "/api/notify", {"message": hostile, "level": "warning"})
        )[0] == 202
        text = await page.until_log(hostile)
        assert text.split("\n")[0][:2].isdigit() and "Warning" in text
        assert await page.evaluate("document.querySelectorAll('#log img, #log script').length") == 0
        await page.click("textbox", "Message")
        await page.type("tea is ready")
        await page.press("Enter")
        await page.until_log("tea is ready")
        await page.until(
            "document.querySelector('#notify [role=status]').innerText === 'Sent to 1 client.'"
        )
        await page.evaluate("$('least').value = 'warning'; $('least').onchange()")
        shown = "[...document.querySelectorAll('#log li')].filter((li) => li.offsetHeight).length"
        assert await page.evaluate(shown) == 1
        assert page.problems == []


async def test_page_keeps_last_500_broadcasts(chromium: str) -> None:
    host = Host()
    async with serving(host.manager, port=0) as server, tab(chromium, server.port) as page:
        await page.until_open()
        for number in range(600):
            host.manager.notify(f"number {number}.")
        await page.until_log("number 599.")
        texts = await page.evaluate(
            "[...document.querySelectorAll('#log .what')].map((e) => e.innerText)"
        )
        assert texts == [f"number {number}." for number in range(100, 600)]


async def test_badge_follows_service(chromium: str) -> None:
    host = Host()
    async with serving(host.manager, port=0) as server, tab(chromium, server.port) as page:
        await page.until_open()
        row = "document.querySelector('[data-name=lock]')"
        await page.until(f"{row}.querySelector('.badge').innerText === 'running'")
        host.lock.set_state("failed", "the bolt is stuck")
        await page.until(f"{row}.dataset.state === 'failed'")
        assert "the bolt is stuck" in await page.evaluate(f"{row}.innerText")
        assert "Error" in await page.until_log("lock is failed: the bolt is stuck")
        host.lock.set_state("running")
        await page.until(f"{row}.querySelector('.badge').innerText === 'running'")
        await page.until_log("lock is running")


async def test_page_gets_missed_messages_after_a_cut(chromium: str) -> None:
    host = Host()
    async with (
        serving(host.manager, port=0) as server,
        Wire(server.port) as wire,
        tab(chromium, wire.port) as page,
    ):
        await page.until_open()
        host.manager.notify("before the cut")
        await page.until_log("before the cut")
        await page.run("steps")
        await page.until("document.querySelector('progress')?.value === 40")
        wire.cut()
        await page.until_log("Connection lost.")
        await page.until_entry("steps", "lost")
        await page.until("$('link-wait').innerText.includes('reconnecting in')")
        for number in range(3):
            host.manager.notify(f"missed {number}")
        wire.mend()
        await page.click("button", "Connect now")
        await page.until_open()
        await page.until_log("Reconnected. 3 missed messages came back.")
        missed = "[...document.querySelectorAll('#log .missed')].map((e) => e.parentNode.innerText)"
        assert [text.split("\n")[0][:8] for text in await page.evaluate(missed)] == [
            "missed 0",
            "missed 1",
            "missed 2",
        ]
        assert "3 missed messages" in await page.evaluate("$('say').innerText")
        texts = await page.evaluate("$('log').innerText")
        assert texts.count("before the cut") == 1


async def test_page_recovers_from_restart_of_server(chromium: str) -> None:
    async with serving(Host().manager, port=0) as server:
        port = server.port
        context = tab(chromium, port)
        page = await context.__aenter__()
        try:
            await page.until_open()
            await post_json(port, "/api/notify", {"message": "first life"})
            await page.until_log("first life")
            await server.close()
            await page.until("$('link').dataset.state === 'waiting'")
            await page.until_log("Connection lost")
            second = Host()
            async with serving(second.manager, port=port):
                await page.until_open()  # by itself
                await page.until_log(
                    "Reconnected. The server no longer has what was sent in between."
                )
                second.manager.notify("second life")
                await page.until_log("second life")
                await page.run("echo again")
                await page.until_entry("echo again", "done")
                lives = re.findall(r"\w+ life", await page.evaluate("$('log').innerText"))
                assert sorted(lives) == ["first life", "second life"]
        finally:
            await context.__aexit__(None, None, None)


async def test_page_away_from_server_says_so_and_loses_nothing(chromium: str) -> None:
    host = Host()
    badges = "[...document.querySelectorAll('.badge')].map((e) => getComputedStyle(e).color)"
    async with (
        serving(host.manager, port=0) as server,
        Wire(server.port) as wire,
        tab(chromium, wire.port) as page,
    ):
        await page.until_open()
        await page.until("document.querySelectorAll('.badge').length >= 4")
        grey = await page.evaluate("getComputedStyle($('forget')).color")
        assert grey not in await page.evaluate(badges)
        assert await page.evaluate("$('run').innerText + $('send').innerText") == "RunSend"

        wire.cut()
        await page.until("document.body.hasAttribute('data-away')")
        await page.until("$('usage').innerText.match(/^Offline: reconnecting in \\d+ s/)")
        assert set(await page.evaluate(badges)) == {grey}
        assert "last seen" in await page.evaluate("$('services').innerText")
        assert await page.evaluate("$('run').innerText + $('send').innerText") == "OfflineOffline"
        assert await page.evaluate("$('line').placeholder") == "Offline"

        await page.run("echo kept")  # refused, clearly, and not lost
        await page.until("$('usage').innerText.startsWith('Not sent, it stays here. Offline')")
        assert await page.evaluate("$('line').value") == "echo kept"
        assert await page.evaluate("document.querySelectorAll('.entry').length") == 0
        await page.click("button", "Offline")
        assert "Not sent" in await page.evaluate("$('say').innerText")
        await page.click("textbox", "Message")
        await page.type("kept too")
        await page.press("Enter")
        await page.until("$('notify').innerText.includes('Not sent. Offline')")

        await page.screenshot("offline.png")
        host.manager.notify("said meanwhile")
        wire.mend()
        await page.until_reopened()  # by itself, and with what was missed
        await page.until_log("said meanwhile")
        assert grey not in await page.evaluate(badges)
        assert await page.evaluate("$('seen').innerText + $('run').innerText") == "Run"
        assert await page.evaluate("document.querySelector('[name=message]').value") == "kept too"
        await page.evaluate("$('line').focus()")
        await page.press("Enter")
        await page.until_entry("echo kept", "done")
        assert await page.evaluate("document.querySelectorAll('.entry').length") == 1


async def test_page_tells_how_much_it_left_out(chromium: str) -> None:
    host = Host()

    @host.commands.command
    async def flood() -> AsyncIterator[Any]:
        for _ in range(5):
            yield {"token": "x" * 50_000}
        yield None

    async with serving(host.manager, port=0) as server, tab(chromium, server.port) as page:
        await page.until_open()
        told = "document.querySelector('%s').dataset.trimmed"
        seen = "getComputedStyle(document.querySelector('%s'), '::before').content"
        await page.run("lines")
        await page.until_entry("lines", "done")
        assert await page.evaluate(told % ".lines") == "… 100 earlier lines left out"
        assert await page.evaluate(seen % ".lines") == '"… 100 earlier lines left out"'
        await page.run("flood")
        await page.until_entry("flood", "done")
        assert await page.evaluate(told % ".prose") == "… 50,000 earlier characters left out"
        for number in range(501):
            host.manager.notify(f"number {number}.")
        await page.until_log("number 500.")
        await page.until("document.querySelector('#log [data-trimmed]')")
        assert "earlier broadcast" in await page.evaluate(told % "#log ol")
        await page.evaluate("for (let n = 0; n < 499; n++) run(`echo ${n}`)")
        await page.until_entry("echo 498", "done")
        assert await page.evaluate(told % "#entries") == "… 1 earlier command left out"
        await page.click("button", "Clear broadcasts")
        assert await page.evaluate(told % "#log ol") is None
        assert page.problems == []


async def test_transcript_survives_reload_and_can_be_copied_and_cleared(chromium: str) -> None:
    host = Host()

    @host.commands.command
    def huge() -> list[str]:
        return ["y" * 100] * 4000

    texts = "[...document.querySelectorAll('.entry')].map((entry) => entry.innerText)"
    async with serving(host.manager, port=0) as server, tab(chromium, server.port) as page:
        await page.until_open()
        for line in ("echo hello", "report", "tokens", "lines", "nope", "picture", "huge"):
            await page.run(line)
            await page.until_entry(line, "error" if line == "nope" else "done")
        before = await page.evaluate(texts)
        await page.run("steps")
        await page.until("document.querySelector('progress')?.value === 40")
        await page.type("a draft")
        await page.load()
        await page.until_open()
        after = await page.evaluate(texts)
        assert after[:5] == before[:5]
        assert "(an image)" in after[5]
        assert "too many to keep over a reload" in after[6]
        assert "lost" in after[7] and "before the answer came" in after[7]
        assert len(after) == 8
        assert await page.evaluate("$('line').value") == "a draft"
        trimmed = "document.querySelector('.lines').dataset.trimmed"
        assert await page.evaluate(trimmed) == "… 100 earlier lines left out"
        kept = "sessionStorage.getItem('karna-transcript').length"
        assert await page.evaluate(kept) < 1_000_000

        await page.allow_clipboard()
        await page.click("button", "Copy commands and results")
        await page.until("$('copy').innerText === 'Copied'")
        text = await page.copied()
        assert text.startswith("> echo hello\nhello\n\n> report\n{")
        assert text.count("The quick fox") == 1 and "\nline 599\n" in text
        assert "100 earlier lines left out" in text and "unknown_command: no command" in text
        # A page of an origin that is not secure has no clipboard of its own.
        await page.evaluate("navigator.clipboard.writeText('')")
        await page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined}); 0")
        await page.click("button", "Copy commands and results")
        await page.until("$('say').innerText === 'Copied.'")
        await page.load()
        await page.until_open()
        assert await page.copied() == text

        await page.evaluate("$('line').value = ''")
        await page.run("steps")
        await page.until("document.querySelector('progress')?.value === 40")
        await page.click("button", "Clear commands and results")
        assert len(await page.evaluate(texts)) == 1  # the one that runs stays
        host.go_on.set()
        await page.until_entry("steps", "done")
        await page.click("button", "Clear commands and results")
        assert not await page.evaluate("$('welcome').hidden")
        await page.load()
        await page.until_open()
        assert await page.evaluate(texts) == []
        assert page.problems == []


@pytest.mark.parametrize("stored", ["{", "[]", "null", '{"entries": [{}, 1]}', '{"entries": 5}'])
async def test_page_opens_whatever_is_in_its_storage(chromium: str, stored: str) -> None:
    async with serving(Host().manager, port=0) as server, tab(chromium, server.port) as page:
        await page.until_open()
        await page.evaluate("keep = () => {}")  # or it would be put right when the page goes
        await page.evaluate(f"sessionStorage.setItem('karna-transcript', {json.dumps(stored)})")
        await page.load()
        await page.until_open()
        await page.run("echo on")
        await page.until_entry("echo on", "done")
        assert page.problems == []


class Asking(WebSocketManager):
    """Asks its raw client questions, and keeps the answers."""

    client: Any

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.answers: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.error: dict[str, str] | None = None

    def handle_message(self, client: Any, payload: bytes, is_text: bool) -> str | bytes | None:
        self.client, message = client, json.loads(payload)
        if message["method"] != "answer":
            return super().handle_message(client, payload, is_text)
        self.answers.put_nowait(message["params"])
        kind = "error" if self.error else "command_response"
        return json.dumps({"type": kind, "data": self.error, "id": message["id"]})

    def ask(self, call: Any, event: str, *args: Any) -> None:
        question = {"type": "call", "data": {"event": event, "args": args}, "call": call}
        self.client.deliver(json.dumps(question).encode(), None)

    async def answer(self) -> dict[str, Any]:
        return await asyncio.wait_for(self.answers.get(), DEADLINE_S)


async def test_question_of_server_is_shown_and_answered(chromium: str) -> None:
    manager = Asking()
    asked = "document.querySelector('[data-state=asking]')"
    async with serving(manager, port=0) as server, tab(chromium, server.port) as page:
        await page.until_open()
        manager.ask(1, "confirm", "Open the <b>door</b>?")
        await page.until(asked)
        assert "Open the <b>door</b>?" in await page.evaluate(f"{asked}.innerText")
        assert "The server asks" in await page.evaluate("$('say').innerText")
        assert await page.evaluate("document.activeElement.id") == "line"  # not taken away
        await page.press("Escape")  # which is for commands
        await page.screenshot("question.png")
        await page.click("button", "Yes")
        assert await manager.answer() == {"call": 1, "data": True}
        text = await page.until_entry("Open the <b>door</b>?", "done")
        assert "Yes" in text and "answered" in text

        manager.ask("b", "confirm", "Sure?")
        await page.until(asked)
        await page.press("Tab", shift=True)  # the keyboard reaches it from the prompt
        while await page.evaluate("document.activeElement.innerText") != "No":
            await page.press("Tab", shift=True)
        await page.press("Enter")
        assert await manager.answer() == {"call": "b", "data": False}

        manager.ask(3, "prompt", "Which colour?", "blue")
        await page.until(asked)
        await page.click("textbox", "Which colour?")
        assert await page.evaluate("document.activeElement.value") == "blue"
        await page.type("-green")
        await page.press("Enter")
        answer = await manager.answer()
        assert answer["call"] == 3 and "-green" in answer["data"]

        for number, refuse in ((4, "Cancel"), (5, "Escape")):
            manager.ask(number, "prompt", "Which size?")
            await page.until(asked)
            if refuse == "Cancel":
                await page.click("button", "Cancel")
            else:
                await page.click("textbox", "Which size?")
                await page.press("Escape")
            assert await manager.answer() == {"call": number, "data": None}

        manager.ask(6, "dance")
        answer = await manager.answer()
        assert answer["call"] == 6 and "dance" in answer["error"] and "data" not in answer

        manager.error = {"code": "invalid_params", "message": "too late"}
        manager.ask(7, "confirm", "Still there?")
        await page.until(asked)
        await page.click("button", "Yes")
        assert "too late" in await page.until_entry("Still there?", "error")
        assert page.problems == []


async def test_command_asks_the_page_that_ran_it(chromium: str) -> None:
    host = Host()

    @host.commands.command
    async def unlock(context: Context) -> str:
        return "open" if await context.client.call("confirm", "Unlock it?") else "shut"

    async with serving(host.manager, port=0) as server, tab(chromium, server.port) as page:
        await page.until_open()
        for word, result in (("Yes", "open"), ("No", "shut")):
            await page.run("unlock")
            await page.until("document.querySelector('[data-state=asking]')")
            await page.click("button", word)
            assert result in await page.until_entry("unlock", "done")
        assert page.problems == []


async def test_question_is_seen_wherever_one_reads_and_closed_with_its_server(
    chromium: str,
) -> None:
    manager = Asking()
    in_view = """(() => {
      const box = $('transcript').getBoundingClientRect();
      const own = document.querySelector('[data-state=asking]').getBoundingClientRect();
      return own.height > 40 && own.top >= box.top - 1 && own.bottom <= box.bottom + 1; })()"""
    async with (
        serving(manager, port=0) as server,
        Wire(server.port) as wire,
        tab(chromium, wire.port) as page,
    ):
        await page.until_open()
        await page.evaluate("for (let n = 0; n < 40; n++) run(`echo ${n}`)")
        await page.until_entry("echo 39", "done")
        # In a frame of its own: the page has followed the last answer by then.
        await page.evaluate("new Promise(requestAnimationFrame)")
        await page.evaluate("$('transcript').scrollTop = 0")
        manager.ask(1, "confirm", "Go on?")
        await page.until("document.querySelector('[data-state=asking]')")
        assert await page.evaluate("$('transcript').scrollTop") == 0  # the reader stays there
        assert await page.evaluate(in_view)
        await page.evaluate("for (let n = 0; n < 40; n++) run(`echo again ${n}`)")
        await page.until_entry("echo again 39", "done")
        assert await page.evaluate(in_view)
        end = "Math.abs(box.scrollHeight - box.clientHeight - box.scrollTop) < 2"
        manager.ask(2, "confirm", "And further?")  # who reads at the end stays there
        at_end = f"new Promise(requestAnimationFrame).then(() => {{ const box = $('transcript'); return {end}; }})"
        await page.until("document.querySelectorAll('[data-state=asking]').length === 2")
        assert await page.evaluate(at_end)
        wire.cut()
        text = await page.until_entry("Go on?", "lost")
        assert "before this was answered" in text
        assert await page.evaluate("document.querySelectorAll('[data-state=asking]').length") == 0
        wire.mend()
        await page.until_reopened()
        assert manager.answers.empty()


CONFIRM = r"Confirm unlock <i>\u{202e}"  # what would turn the text around is shown as it is written


def add_deciding(commands: CommandProcessor) -> list[str]:
    """Add `do` and `confirm` as the language service has them with a model; what was confirmed."""
    confirmed: list[str] = []

    @commands.command
    async def do(*text: str) -> AsyncIterator[Any]:
        steps = [
            {"step": 1, "command": "light kitchen --on", "result": {"on": True}},
            {"step": 2, "command": "light hall --off", "result": "is off"},
        ]
        for step in steps:
            yield step
        words = {"text": f"Done: {' '.join(text)}.", "steps": steps, "model": "tiny"}
        proposal = {
            "proposal": "k3jf",
            "command": "unlock <i>\u202e",
            "expires": "2099-01-01T00:00:00Z",
        }
        yield words | (proposal if "door" in text else {})

    @commands.command
    def confirm(id: str) -> str:
        confirmed.append(id)
        return "unlocked"

    return confirmed


async def test_sentence_is_offered_to_the_model_whose_steps_and_proposal_are_shown(
    chromium: str,
) -> None:
    commands = CommandProcessor()
    confirmed = add_deciding(commands)
    language = Service("language")
    manager = WebSocketManager(commands=commands, services=[language])
    offers = "[...document.querySelectorAll('.entry button')].map((e) => e.innerText)"
    offered = f"{offers}.filter((text) => text === 'Let the model do it').length"
    async with (
        serving(manager, port=0) as server,
        Wire(server.port) as wire,
        tab(chromium, wire.port) as page,
    ):
        await page.until_open()
        await page.run("open the door")  # without a model nothing is offered
        await page.until_entry("open the door", "error")
        assert await page.evaluate(offered) == 0
        language.set_state("running", "model tiny at localhost:11434")
        await page.until("services.language?.detail.startsWith('model')")
        await page.run("notify x --level loud")  # nor for another mistake
        await page.until_entry("notify x --level loud", "error")
        assert await page.evaluate(offered) == 0

        await page.run("open the door")
        await page.until_entry("open the door", "error")
        await page.click("button", "Let the model do it")
        text = await page.until_entry("do open the door", "done")
        assert "Done: open the door." in text and "by tiny" in text
        steps = "[...document.querySelectorAll('.steps > li')].map((e) => e.innerText)"
        assert [step.split("\n")[0] for step in await page.evaluate(steps)] == [
            "light kitchen --on",
            "light hall --off",
        ]
        assert "unlock <i>\\u{202e}" in text and "until" in text and not confirmed
        await page.screenshot("proposal.png")

        wire.cut()
        await page.until("document.body.hasAttribute('data-away')")
        await page.click("button", CONFIRM)
        await page.until("$('usage').innerText.startsWith('Not sent')")
        assert not await page.evaluate("document.querySelector('.card button').disabled")
        wire.mend()
        await page.until_reopened()
        await page.load()
        await page.until_open()
        await page.click("button", CONFIRM)  # it survives a reload
        assert "unlocked" in await page.until_entry("confirm k3jf", "done")
        assert confirmed == ["k3jf"]
        assert await page.evaluate("document.querySelector('.card button').disabled")


async def test_page_tells_how_to_use_the_server_from_elsewhere(chromium: str) -> None:
    needs("curl")
    shown = """Object.fromEntries([...document.querySelectorAll('#elsewhere .all > div')].map(
      (box) => [box.querySelector('.row').firstChild.innerText, box.querySelector('pre').innerText]
    ))"""
    async with (
        serving(Host().manager, port=0) as server,
        tab(chromium, server.port) as page,
    ):
        base = f"http://localhost:{server.port}"
        await page.until_open()
        await page.click("DisclosureTriangle", "Use from elsewhere")
        await page.until("$('elsewhere').open")
        doors = await page.evaluate(shown)
        assert doors["WebSocket"] == f"ws://localhost:{server.port}/ws"
        assert doors["JSON-RPC 2.0"] == f"{base}/rpc"
        assert f'io("ws://localhost:{server.port}/ws"' in doors["Socket.IO"]
        assert await run_shell(doors["HTTP"]) == {"command": "echo hello", "result": "hello"}
        async with connect(doors["WebSocket"]) as ws:
            await ws.send('{"method": "get_status"}')
            assert json.loads(await ws.recv())["type"] == "status_update"
        for name in ("Status", "Metrics"):
            assert (await asyncio.to_thread(urlopen, doors[name])).status == 200
        assert urlsplit(doors["Model Context Protocol"]).path == "/mcp"

        assert list(doors.values())[-1] == await mcp_setup(page, "Cursor and most hosts")
        setups = {
            "Cursor and most hosts": {"mcpServers": {"karna": {"url": f"{base}/mcp"}}},
            "VS Code": {"servers": {"karna": {"type": "http", "url": f"{base}/mcp"}}},
        }
        for host, setup in setups.items():
            assert json.loads(await mcp_setup(page, host)) == setup
        command = f"claude mcp add --transport http karna {base}/mcp"
        assert await mcp_setup(page, "Claude Code") == command
        await page.allow_clipboard()
        await page.click("button", "Copy the setup")
        await page.until("$('say').innerText === 'Copied.'")
        assert await page.copied() == command
        await page.screenshot("elsewhere.png")
        assert page.problems == []


async def test_addresses_mention_the_token_without_showing_it(chromium: str) -> None:
    needs("curl")
    async with (
        serving(Host().manager, port=0, token="s3same") as server,
        tab(chromium, server.port, "/#token=s3same") as page,
    ):
        await page.until_open()
        text = await page.evaluate("$('elsewhere').textContent")
        assert "Authorization: Bearer TOKEN" in text and "s3same" not in text
        curl = "[...document.querySelectorAll('#elsewhere pre')][2].textContent"
        answer = await run_shell(await page.evaluate(curl), KARNA_TOKEN="s3same")
        assert answer["result"] == "hello"
        server_of = json.loads(await mcp_setup(page, "VS Code"))["servers"]["karna"]
        assert server_of["headers"] == {"Authorization": "Bearer TOKEN"}
        assert "$KARNA_TOKEN" in await mcp_setup(page, "Claude Code")


async def mcp_setup(page: Page, host: str) -> str:
    """What the page says for this MCP host."""
    choice = "document.querySelector('#elsewhere select')"
    await page.evaluate(f"{choice}.value = {json.dumps(host)}; {choice}.onchange()")
    setup = "document.querySelector('#elsewhere .all > :last-child pre').textContent"
    return str(await page.evaluate(setup))


async def run_shell(line: str, **environment: str) -> Any:
    """Run what the page says as a person would; the data of the answer."""
    process = await asyncio.create_subprocess_exec(
        "sh", "-c", line,
        env=os.environ | environment,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    output, _ = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    return json.loads(output)["data"]


AXE = """axe.run(document, {
  runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice'],
}).then(({violations}) => violations.map(({id, nodes}) =>
  `${id}: ${nodes.map(({html}) => html.slice(0, 120)).join(' | ')}`))"""


@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_page_passes_axe(chromium: str, node_dir: Path, width: int, scheme: str) -> None:
    axe = (node_dir / "node_modules/axe-core/axe.min.js").read_text()
    host = Host(Asking)
    add_deciding(host.commands)
    manager: Any = host.manager
    async with (
        serving(manager, port=0) as server,
        Wire(server.port) as wire,
        tab(chromium, wire.port, width=width, height=844, scheme=scheme) as page,
    ):
        await page.until_open()
        await page.evaluate(axe + "; 0")
        assert await page.evaluate(AXE) == []  # empty
        for level in ("info", "warning", "error"):
            manager.notify(f"of level {level}", level=level)
        for line in ("help", "report", "lines", "ecoh", "do open the door"):
            await page.run(line)
            await page.until_entry(line, "error" if line == "ecoh" else "done")
        await page.run("steps")
        await page.until("document.querySelector('progress')?.value === 40")
        manager.ask(1, "prompt", "Which colour?")
        await page.until("document.querySelector('[data-state=asking]')")
        await page.evaluate("$('elsewhere').open = true")
        await page.type("cou")
        await page.until("!$('list').hidden")
        assert await page.evaluate(AXE) == []
        wire.cut()
        await page.until("document.body.hasAttribute('data-away')")
        assert await page.evaluate(AXE) == []


async def test_prompt_stays_in_view_on_a_small_screen(chromium: str) -> None:
    in_view = """(() => {
      const {top, bottom, right} = $('line').getBoundingClientRect();
      return top > innerHeight / 2 && bottom <= innerHeight && right <= innerWidth; })()"""
    async with (
        serving(Host().manager, port=0) as server,
        tab(chromium, server.port, width=390, height=844) as page,
    ):
        await page.until_open()
        assert await page.evaluate("scrollY") == 0
        for line in ("help", "report", "lines"):
            await page.run(line)
            await page.until_entry(line, "done")
        assert await page.evaluate("scrollY") == 0  # neither focus nor typing moves the page
        assert await page.evaluate("document.documentElement.scrollWidth") == 390
        for height in (844, 430):  # 430: what a keyboard on the screen leaves
            await page.look(390, height)
            for place in ("0", "document.body.scrollHeight / 2", "document.body.scrollHeight"):
                await page.evaluate(f"scrollTo(0, {place})")
                assert await page.evaluate(in_view), (height, place)
        await page.evaluate("$('elsewhere').open = true")
        await page.evaluate("scrollTo(0, document.body.scrollHeight)")
        await page.run("echo seen")  # from the page's end: its answer is brought into view
        await page.until_entry("echo seen", "done")
        answer = "[...document.querySelectorAll('.entry')].at(-1).getBoundingClientRect()"
        below = "$('prompt').getBoundingClientRect().top"
        assert await page.evaluate(f"{answer}.top >= 0 && {answer}.bottom <= {below}")
        # A keyboard that covers the page, as on iOS, lifts the prompt.
        cover = "Object.defineProperty(visualViewport, 'height', {value: innerHeight - 100});"
        await page.evaluate(cover + "visualViewport.dispatchEvent(new Event('resize'))")
        bottom = "innerHeight - $('prompt').getBoundingClientRect().bottom"
        assert round(await page.evaluate(bottom)) == 100


async def test_focus_is_visible(chromium: str) -> None:
    async with serving(Asking(), port=0) as server, tab(chromium, server.port) as page:
        await page.until_open()
        await page.run("ecoh")
        await page.until_entry("ecoh", "error")
        await page.evaluate("$('elsewhere').open = true")
        seen, plain = set(), []
        for _ in range(60):
            await page.press("Tab")
            name, style = await page.evaluate(
                "(({activeElement: e}) => [e.ariaLabel || e.innerText || e.id,"
                " getComputedStyle(e).outlineStyle])(document)"
            )
            seen.add(name)
            if style == "none" and name != "":
                plain.append(name)
        assert {"Run", "Commands and results", "Use from elsewhere", "MCP host"} <= seen
        assert not [name for name in plain if not name.startswith("Karna WS")]  # the body itself


async def test_page_asks_for_token_and_keeps_it_for_the_tab(chromium: str) -> None:
    host = Host()
    async with (
        serving(host.manager, port=0, token="sesame seed") as server,
        tab(chromium, server.port) as page,
    ):
        await page.until("$('ask').open")
        assert await page.evaluate("document.activeElement.type") == "password"
        await page.type("wrong")
        await page.press("Enter")
        await page.until("$('ask-why').innerText.includes('did not accept')")
        await page.until("$('ask').open")
        await page.type("sesame seed")
        await page.press("Enter")
        await page.until_open()
        assert not await page.evaluate("$('ask').open")
        await page.click("textbox", "Message")  # the token goes with HTTP too
        await page.type("with a token")
        await page.press("Enter")
        await page.until_log("with a token")
        await page.load()
        await page.until_open()
        assert await page.evaluate("localStorage.length") == 0
        await page.click("button", "Forget token")
        await page.until("$('ask').open")
        assert await page.evaluate("sessionStorage.getItem('karna-token')") is None
        await page.press("Escape")
        await page.until("!$('ask').open")
        await page.click("button", "Connect now")
        await page.until("$('ask').open")


async def test_page_takes_token_from_fragment(chromium: str) -> None:
    async with (
        serving(Host().manager, port=0, token="s3same") as server,
        tab(chromium, server.port, "/#token=s3same") as page,
    ):
        await page.until_open()
        assert await page.evaluate("location.hash") == ""
        assert page.problems == []


async def test_image_is_dropped_chosen_or_pasted_for_describe(
    chromium: str, tmp_path: Path
) -> None:
    small = tmp_path / "small.png"
    small.write_bytes(make_png(5, 4))
    async with serving(Host().manager, port=0) as server, tab(chromium, server.port) as page:
        await page.until_open()
        await page.drop(small)
        await page.until("!$('picture').hidden")
        assert "small.png" in await page.evaluate("$('picture').innerText")
        assert await page.evaluate("$('line').value") == "describe"
        await page.press("Enter")
        text = await page.until_entry("describe", "done")
        assert re.search(r"width: 5\b", text) and re.search(r"height: 4\b", text)
        assert await page.evaluate("$('picture').hidden")

        await page.call("Page.setInterceptFileChooserDialog", enabled=True)
        await page.click("button", "Attach an image")
        node = await asyncio.wait_for(page.choosers.get(), DEADLINE_S)
        await page.call("DOM.setFileInputFiles", files=[str(small)], backendNodeId=node)
        await page.until("!$('picture').hidden")
        await page.click("button", "Remove image")
        await page.until("$('picture').hidden")

        paste = (
            "const bytes = Uint8Array.from(atob('%s'), (c) => c.charCodeAt(0));"
            "const data = new DataTransfer();"
            "data.items.add(new File([bytes], '', {type: 'image/png'}));"
            "const all = {clipboardData: data, bubbles: true, cancelable: true};"
            "$('line').dispatchEvent(new ClipboardEvent('paste', all)); 0"
        )
        await page.evaluate(paste % b64encode(make_png(9, 2)).decode())
        await page.until("$('picture').innerText.includes('Pasted image')")
        await page.press("Enter")
        await page.until("document.querySelectorAll('.entry[data-state=done]').length === 2")
        assert re.search(r"width: 9\b", await page.until_entry("describe", "done"))
        assert page.problems == []


async def test_image_over_the_limit_is_made_smaller(chromium: str, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    large.write_bytes(make_png(800, 600, noise=True))
    assert large.stat().st_size > 1_400_000
    async with serving(Host().manager, port=0) as server, tab(chromium, server.port) as page:
        await page.until_open()
        await page.drop(large)
        await page.until("$('picture').innerText.includes('sent as JPEG')")
        await page.press("Enter")
        assert "jpeg" in await page.until_entry("describe", "done")


async def test_page_works_by_keyboard_alone(chromium: str) -> None:
    async with serving(Host().manager, port=0) as server, tab(chromium, server.port) as page:
        await page.until_open()
        value = "$('line').value"
        assert await page.evaluate("document.activeElement.id") == "line"
        await page.type("cou")
        options = "[...document.querySelectorAll('[role=option] code')].map((e) => e.innerText)"
        assert await page.evaluate(options) == ["countdown"]
        await page.press("Tab")
        assert await page.evaluate(value) == "countdown "
        assert await page.evaluate("document.querySelector('#usage .here').innerText") == "SECONDS"
        await page.type("0")
        await page.press("Enter")
        await page.until_entry("countdown 0", "done")

        await page.type("notify hi --")  # options and choices complete too
        await page.press("Tab")
        assert await page.evaluate(value) == "notify hi --level "
        await page.press("ArrowDown")
        await page.press("ArrowDown")
        chosen = "$($('line').getAttribute('aria-activedescendant')).innerText.trim()"
        assert await page.evaluate(chosen) == "warning"
        await page.press("Enter")
        assert await page.evaluate(value) == "notify hi --level warning "
        await page.press("Enter")
        await page.until_log("hi")

        await page.press("ArrowUp")
        assert await page.evaluate(value) == "notify hi --level warning"
        await page.press("ArrowUp")
        assert await page.evaluate(value) == "countdown 0"
        await page.press("ArrowDown")
        await page.press("ArrowDown")
        assert await page.evaluate(value) == ""

        seen = []
        for _ in range(30):  # Tab leaves the prompt when it has nothing to complete
            await page.press("Tab")
            seen.append(
                await page.evaluate(
                    "document.activeElement.ariaLabel || document.activeElement.innerText"
                )
            )
            if seen[-1] == "Message":
                break
        assert seen[-1] == "Message" and "Broadcasts" in seen
        await page.type("by keyboard")
        await page.press("Enter")
        await page.until_log("by keyboard")
        assert page.problems == []


async def test_page_has_names_for_assistive_technology(chromium: str) -> None:
    async with serving(Host().manager, port=0) as server, tab(chromium, server.port) as page:
        await page.until_open()
        nodes = (await page.call("Accessibility.getFullAXTree"))["nodes"]
        roles = ("button", "textbox", "combobox", "log", "region", "listbox", "img")
        unnamed = [
            node
            for node in nodes
            if not node["ignored"] and node["role"]["value"] in roles
            and not node.get("name", {}).get("value")
        ]  # fmt: skip
        assert unnamed == []
        live = "[...document.querySelectorAll('[role=status], [role=log]')].length"
        assert await page.evaluate(live) == 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_page_is_readable_in(chromium: str, scheme: str) -> None:
    contrast = """(() => {
      const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
      const light = (color) => {
        canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((c) => c / 255)
          .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const behind = (e) => { for (; e; e = e.parentElement) {
        const color = getComputedStyle(e).backgroundColor;
        if (color !== 'rgba(0, 0, 0, 0)') return color; } };
      const poor = [];
      for (const e of document.querySelectorAll('body *')) {
        const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
        if (!own || !e.offsetHeight || e.disabled) continue;
        const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort().reverse();
        const [high, low] = a > b ? [a, b] : [b, a];
        const ratio = (high + 0.05) / (low + 0.05);
        if (ratio < 4.5) poor.push(`${e.innerText.slice(0, 30)} ${ratio.toFixed(1)}`);
      }
      return poor; })()"""
    host = Host()
    async with (
        serving(host.manager, port=0) as server,
        tab(chromium, server.port, scheme=scheme) as page,
    ):
        await page.until_open()
        host.lock.set_state("degraded", "slow")
        for level in ("info", "warning", "error"):
            host.manager.notify(f"a notification of level {level}", level=level)
        for line in ("help", "report", "ecoh"):
            await page.run(line)
        await page.until_entry("ecoh", "error")
        await page.run("steps")
        await page.until("document.querySelector('progress')?.value === 40")
        await page.until_log("level error")
        assert await page.evaluate(contrast) == []
        bright = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", bright)[:3])) > 380) == (scheme == "light")
        assert (await page.screenshot(f"{scheme}.png")).startswith(b"\x89PNG")
        await page.click("button", "Theme: system")
        other = "Theme: dark" if scheme == "light" else "Theme: light"
        while await page.evaluate("$('theme').innerText") != other:
            await page.press("Enter")
        assert await page.evaluate("getComputedStyle(document.body).backgroundColor") != bright
        await page.load()
        await page.until_open()
        assert await page.evaluate("$('theme').innerText") == other
        assert page.problems == []


async def test_page_fits_narrow_screen(chromium: str) -> None:
    host = Host()
    async with (
        serving(host.manager, port=0) as server,
        tab(chromium, server.port, width=360, height=740) as page,
    ):
        await page.until_open()
        host.manager.notify("a" * 200)
        for line in ("help", "report", "echo " + "w" * 300, "notify hi --level loud"):
            await page.run(line)
        await page.until_entry("notify hi --level loud", "error")
        await page.run("steps")
        await page.until("document.querySelector('progress')?.value === 40")
        assert await page.evaluate("document.documentElement.scrollWidth") == 360
        clipped = """[...document.querySelectorAll('button, input, select')]
            .filter((e) => e.offsetHeight && e.getBoundingClientRect().right
              > e.closest('.panel, header').getBoundingClientRect().right)
            .map((e) => e.innerText)"""
        assert await page.evaluate(clipped) == []
        await page.screenshot("narrow.png")


def test_page_is_one_file_of_its_own() -> None:
    text = (ROOT / "web" / "console.html").read_text()
    assert text.count("<script") == text.count("<style") == 1
    assert "<script>" in text and "<style>" in text
    for risky in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
    ):
        assert risky not in text
    markup = text[: text.index("<style>")] + text[text.index("</style>") : text.index("<script>")]
    assert not re.search(r"\s(style|on\w+)=|https?://(?!www\.w3\.org/2000/svg)", markup)
