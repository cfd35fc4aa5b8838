"""Options: what each may be, said in one line; their defaults."""

from __future__ import annotations

import inspect
import math
import pkgutil
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from karna.config import Options, make_config
from karna.service import Monitor
from karna_ws import Config, serve
from support import DEADLINE_S, ROOT, needs
from support_process import ENVIRONMENT


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"port": "80"}, "port must be a whole number, not str"),
        ({"port": True}, "port must be a whole number, not bool"),
        ({"port": 80.5}, "port must be a whole number, not float"),
        ({"port": -1}, "port must be 0 or more, not -1"),
        ({"port": 65536}, "port must be 65535 at most, not 65536"),
        ({"host": None}, "host must be a text, not NoneType"),
        ({"max_clients": 0}, "max_clients must be 1 or more, not 0"),
        ({"max_clients": None}, "max_clients must be a whole number, not NoneType"),
        ({"max_message_bytes": 127}, "max_message_bytes must be 128 or more, not 127"),
        ({"max_unsent_bytes": 1023}, "max_unsent_bytes must be 1024 or more, not 1023"),
        ({"ping_timeout_s": math.nan}, "ping_timeout_s must be 0.01 or more, not nan"),
        ({"command_timeout_s": math.inf}, "command_timeout_s must be 0.001 or more, not inf"),
        ({"command_timeout_s": "60"}, "command_timeout_s must be a number, not str"),
        ({"ping_interval_s": 0}, "ping_interval_s must be 0.01 or more, not 0"),
        ({"reuse_port": 1}, "reuse_port must be True or False, not int"),
        ({"token": ""}, "token must be printable ASCII, without blanks around it"),
        ({"token": b"secret"}, "token must be a text, not bytes"),
        ({"keyfile": "key.pem"}, "keyfile needs certfile"),
        ({"loop": "trio"}, "loop must be auto, asyncio or uvloop, not 'trio'"),
        ({"allow_origin": 5}, "allow_origin must be a text or a list of texts, not int"),
        ({"allow_origin": [5]}, "allow_origin must be a text or a list of texts, not tuple"),
        (
            {"allow_origin": "https://a.example/"},
            "allow_origin must look like https://app.example, without a path: 'https://a.example/'",
        ),
        ({"namespaces": "chat"}, "namespaces must start with / and hold no comma: 'chat'"),
        ({"namespaces": ["/a,b"]}, "namespaces must start with / and hold no comma: '/a,b'"),
    ],
)
def test_config_refuses_wrong_value_in_one_line(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(complaint)}$"):
        make_config(options)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("prot", "port"), ("Port", "port"), ("max_message", "max_message_bytes"),
        ("max-body", "max_body_bytes"), ("grace", "grace_s"), ("namespace", "namespaces"),
        ("ping_interval", "ping_interval_s"), ("no_recovery", "recovery"),
        ("allow_origins", "allow_origin"), ("command_timeout", "command_timeout_s"),
    ],
)  # fmt: skip
def test_unknown_option_is_told_which_one_is_meant(given: str, meant: str) -> None:
    with pytest.raises(TypeError, match=f"^there is no option '{given}'; did you mean {meant}\\?$"):
        make_config({given: 1})


def test_unknown_option_that_is_near_to_none_is_told_all() -> None:
    with pytest.raises(
        TypeError, match="^there is no option 'colour'; there are host, port, unix,"
    ):
        make_config({"colour": 1})


# What may be given where Config keeps another type.
WIDER = {
    "tuple[str, ...]": "str | Iterable[str] | None",
    "str | None": "str | os.PathLike[str] | None",
}


def test_keyword_options_are_those_of_config_with_their_types() -> None:
    options = Options.__annotations__
    assert list(options) == [option.name for option in fields(Config)]
    assert Options.__required_keys__ == frozenset()
    for option in fields(Config):
        is_path = option.metadata["metavar"] == "PATH"
        is_wider = is_path or option.type == "tuple[str, ...]"
        wanted = WIDER[str(option.type)] if is_wider else option.type
        assert options[option.name].__forward_arg__ == wanted, option.name
    assert inspect.signature(serve).parameters["options"].annotation == "Unpack[Options]"


TYPED = """
from typing import Any, assert_type
from karna.calls import Client
from karna_ws import WebSocketManager, serve, serving

manager = WebSocketManager()

@manager.method
async def add(a: int, b: int) -> int: return a + b

@manager.method("other", inline=True)
def other(a: int) -> str: return ""

@manager.on
async def poke(client: Client, *args: int) -> int: return 1

@manager.on("connect")
def hello(client: Client, auth: dict[str, Any]) -> None: ...

@manager.commands.command
def brew(cups: int) -> str: return ""

async def main(client: Client) -> None:
    assert_type(await add(1, 2), int)
    assert_type(await poke(client, 2), int)
    assert_type((other(1), hello(client, {}), brew(2)), tuple[str, None, str])
    await serve(manager, port=1, allow_host=["a"], max_message_bytes=500, unix=None)
    async with serving(manager, port=0) as server:
        assert_type(server.port, int)
    await add("1", 2)  # wrong
    await poke(client, "2")  # wrong
    other("1")  # wrong
    await serve(manager, port="1")  # wrong
    await serve(manager, max_message=500)  # wrong
    async with serving(manager, prot=0): ...  # wrong
    manager.method(5)  # wrong
"""


def test_options_and_decorated_functions_are_known_to_mypy(tmp_path: Path) -> None:
    needs("mypy")
    (tmp_path / "typed.py").write_text(TYPED)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--no-error-summary",
        "--hide-error-context",
    ]
    done = subprocess.run(
        [*command, str(tmp_path / "typed.py")], cwd=ROOT, env={**ENVIRONMENT, "MYPYPATH": str(ROOT)},
        capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    wrong = {number for number, line in enumerate(TYPED.splitlines(), 1) if "# wrong" in line}
    found = {int(n) for n in re.findall(r"typed\.py:(\d+): error", done.stdout)}
    assert found == wrong, done.stdout + done.stderr


def test_config_takes_one_text_or_several_for_a_list() -> None:
    assert make_config({"allow_host": "a.example"}).allow_host == ("a.example",)
    assert make_config({"allow_host": ["a.example", "b"]}).allow_host == ("a.example", "b")
    assert make_config({"namespaces": {"/chat"}}).namespaces == ("/chat",)
    assert make_config({"allow_origin": None}).allow_origin == ()


def test_config_never_shows_secrets() -> None:
    shown = repr(Config(token="t0ps3cret", backplane="redis://:pa55w0rd@host"))
    assert "t0ps3cret" not in shown and "pa55w0rd" not in shown


def test_config_has_the_options_of_the_contract_with_their_defaults() -> None:
    promised = """host, port, unix, token, allow_origin, allow_host, namespaces, ping_interval_s,
    ping_timeout_s, connect_timeout_s, open_timeout_s, close_timeout_s, command_timeout_s, grace_s,
    max_message_bytes, max_body_bytes, max_clients, max_running_commands, max_unsent_bytes,
    history_messages, history_bytes, backplane, reuse_port, loop, certfile, keyfile"""
    config = Config()
    for name in promised.replace(",", " ").split():
        assert hasattr(config, name), name
    assert (config.host, config.port) == ("127.0.0.1", 8000)
    assert (config.history_messages, config.history_bytes) == (1000, 4 * 1024 * 1024)
    assert (config.max_message_bytes, config.max_body_bytes) == (1024 * 1024, 1024 * 1024)
    assert (config.max_running_commands, config.max_clients) == (32, 1000)
    assert (config.raw_ping_interval_s, config.engine_ping_interval_s) == (20, 25)
    assert (config.ping_timeout_s, config.connect_timeout_s) == (20, 45)
    assert (config.command_timeout_s, config.open_timeout_s, config.grace_s) == (60, 10, 5)
    assert (config.close_timeout_s, config.max_unsent_bytes) == (10, 1024 * 1024)
    assert (config.token, config.allow_origin, config.allow_host, config.namespaces) == (
        None, (), (), ()
    )  # fmt: skip
    assert (config.insecure_no_token, config.reuse_port, config.recovery) == (False, False, True)


# Numbers that README, PROTOCOL.md or a message to a client gives, and no option changes; tests of
# what they limit take them from here or say them again. A test that names the constant can't fail.
LIMITS: dict[str, float] = {
    "karna.backplane.MAX_OUTBOX": 1_000,
    "karna.backplane.PUBLISH_WAIT_S": 3,
    "karna.backplane.STREAM_ENTRIES": 10_000,
    "karna.calls.MAX_WAITING": 256,
    "karna.calls.MAX_WAITING_BYTES": 1_048_576,
    "karna.connection.MAX_FRAGMENTS": 4_096,
    "karna.connection.MAX_MESSAGES": 32,
    "karna.head.MAX_HEAD_BYTES": 65_536,
    "karna.head.MAX_HEAD_LINES": 129,
    "karna.head.MAX_HEAD_LINE_BYTES": 8_190,
    "karna.http.MAX_PIPELINED_BYTES": 65_536,
    "karna.http.PROBE_S": 2,
    "karna.hub.PENDING_CONNECTIONS": 128,
    "karna.images.MAX_IMAGE_BYTES": 33_554_432,
    "karna.jsonrpc.MAX_BATCH": 256,
    "karna.log.LogGate.BURST": 5,
    "karna.log.LogGate.WINDOW_S": 10,
    "karna.models.MAX_MODEL_BYTES": 4_194_304,
    "karna.packets.MAX_ACK_DIGITS": 15,
    "karna.packets.MAX_ATTACHMENTS": 10,
    "karna.packets.MAX_NAMESPACE_BYTES": 255,
    "karna.programs.MAX_LINE_CHARS": 65_536,
    "karna.programs.MAX_OUTPUT_CHARS": 262_144,
    "karna.reader.TURN_S": 0.002,
    "karna.server.SHUTDOWN_CLOSE_S": 2,
    "karna.service.RETRY_FIRST_S": 1,
    "karna.service.RETRY_MAX_S": 30,
    "karna.socketio.MAX_PID_CHARS": 100,
    "karna.work.CANCEL_WAIT_S": 4,
    "karna.builtins.MAX_COUNTDOWN_S": 3_600,
    "karna.builtins.MAX_LISTED": 100,
    "services.MAX_MATCHES": 5,
}


def test_limits_have_the_values_that_were_promised() -> None:
    assert {name: pkgutil.resolve_name(name) for name in LIMITS} == LIMITS


def test_limits_of_time_lie_within_each_other() -> None:
    """Who waits for something waits longer than that may take."""
    limit = pkgutil.resolve_name
    programs = limit("karna.programs.TERM_WAIT_S") + limit("karna.programs.KILL_WAIT_S")
    assert programs < limit("karna.work.CANCEL_WAIT_S") < limit("karna.server.CANCEL_S")
    assert limit("karna.backplane.READ_BLOCK_MS") / 1000 < limit("karna.backplane.REDIS_TIMEOUT_S")
    assert limit("karna.backplane.REDIS_TIMEOUT_S") < limit("karna.backplane.PUBLISH_WAIT_S")
    assert limit("karna.models.MODEL_CHECK_S") < Monitor(()).timeout_s


@pytest.mark.parametrize("token", ["", " ", " x", "x ", "x\n", "p\xe4ss", "\udcff", "a\x00b"])
def test_token_that_no_header_could_carry_is_refused(token: str) -> None:
    with pytest.raises(ValueError, match="token"):
        Config(token=token)
