"""Flags, variables, help, and the one line that a wrong start ends with."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import pytest

import karna_ws
import services
from karna.command_line import GROUPS, make_manager, make_parser, warn_of_misspelt
from karna.config import make_config
from karna_ws import Config, main
from support import DEADLINE_S
from support_peers import TOKEN, ask, raw, upgrade
from support_process import process, run_to_end


def parsed(*arguments: str) -> Config:
    """The Config that these flags and the present environment make."""
    found = vars(make_parser("1.0.0").parse_args(arguments))
    return make_config({name: found[name] for name in Config.__dataclass_fields__})


# Every option: its flag with a value, and what that value means.
FLAGS: dict[str, tuple[str, Any]] = {
    "host": ("--host=::1", "::1"),
    "port": ("--port=9000", 9000),
    "unix": ("--unix=/tmp/k.sock", "/tmp/k.sock"),
    "certfile": ("--certfile=cert.pem", "cert.pem"),
    "keyfile": ("--keyfile=key.pem", "key.pem"),
    "reuse_port": ("--reuse-port", True),
    "token": ("--token=secret", "secret"),
    "allow_origin": ("--allow-origin=https://a.example", ("https://a.example",)),
    "allow_host": ("--allow-host=a.example", ("a.example",)),
    "trust_proxy": ("--trust-proxy=10.0.0.1", ("10.0.0.1",)),
    "insecure_no_token": ("--insecure-no-token", True),
    "max_clients": ("--max-clients=5", 5),
    "max_message_bytes": ("--max-message=2000", 2000),
    "max_body_bytes": ("--max-body=2000", 2000),
    "max_running_commands": ("--max-running-commands=5", 5),
    "max_unsent_bytes": ("--max-unsent=2000", 2000),
    "command_timeout_s": ("--command-timeout=1.5", 1.5),
    "open_timeout_s": ("--open-timeout=1.5", 1.5),
    "close_timeout_s": ("--close-timeout=1.5", 1.5),
    "grace_s": ("--grace=0", 0),
    "ping_interval_s": ("--ping-interval=0.5", 0.5),
    "ping_timeout_s": ("--ping-timeout=0.5", 0.5),
    "connect_timeout_s": ("--connect-timeout=0.5", 0.5),
    "namespaces": ("--namespace=/chat", ("/chat",)),
    "history_messages": ("--history-messages=0", 0),
    "history_bytes": ("--history-bytes=0", 0),
    "recovery": ("--no-recovery", False),
    "backplane": ("--backplane=redis://localhost", "redis://localhost"),
    "loop": ("--loop=asyncio", "asyncio"),
}


def test_every_option_has_a_flag_and_an_environment_variable(
    clean_environment: pytest.MonkeyPatch,
) -> None:
    assert set(FLAGS) == set(Config.__dataclass_fields__)
    assert asdict(parsed()) == asdict(Config())
    for name, (flag, value) in FLAGS.items():
        needed = ["--certfile=cert.pem"] if name == "keyfile" else []
        assert getattr(parsed(flag, *needed), name) == value, flag
        variable, _, text = flag.removeprefix("--").partition("=")
        if name == "recovery":
            variable, text = "recovery", "0"
        variable = "KARNA_" + variable.replace("-", "_").upper()
        clean_environment.setenv(variable, text or "1")
        assert getattr(parsed(*needed), name) == value, variable
        clean_environment.delenv(variable)


def test_flag_wins_over_environment_and_lists_add_up(
    clean_environment: pytest.MonkeyPatch,
) -> None:
    clean_environment.setenv("KARNA_PORT", "9000")
    clean_environment.setenv("KARNA_ALLOW_HOST", "a.example, b.example,")
    clean_environment.setenv("KARNA_MAX_CLIENTS", "")
    config = parsed("--port", "9001", "--allow-host", "c.example")
    assert (config.port, config.max_clients) == (9001, 1000)
    assert config.allow_host == ("a.example", "b.example", "c.example")
    assert parsed().allow_host == ("a.example", "b.example"), "parsing leaves no trace"


def test_help_names_every_option_in_its_group() -> None:
    shown = run_to_end("--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    for flag, _ in FLAGS.values():
        assert flag.partition("=")[0] in shown.stdout
    for flag in ("--allow-program", "--no-confirm-programs", "--conversation-turns", "--vision-url", "--vision-model", "--language-url",
                 "--language-model", "--log-level", "--version"):  # fmt: skip
        assert flag in shown.stdout
    for title in GROUPS.values():
        assert f"\n{title}:\n" in shown.stdout
    assert run_to_end("--version").stdout == f"karna_ws {karna_ws.__version__}\n"


@pytest.mark.parametrize(("columns", "widest"), [("60", 58), ("0", 98), ("-5", 98), ("wide", 98)])
def test_help_is_as_wide_as_columns_says(columns: str, widest: int) -> None:
    shown = run_to_end("--help", environment={"COLUMNS": columns}).stdout.splitlines()
    longest = max(len(line) for line in shown if not line.startswith("  --"))
    assert widest - 20 < longest <= widest


@pytest.mark.parametrize(
    ("arguments", "environment", "part"),
    [
        (["--nope"], {}, "--nope"),
        (["stray"], {}, "stray"),
        (["--port", "high"], {}, "--port"),
        (["--port", "99999"], {}, "--port must be 65535 at most"),
        (["--max-clients", "0"], {}, "--max-clients must be 1 or more"),
        (["--ping-timeout", "nan"], {}, "--ping-timeout must be"),
        (["--grace", "-1"], {}, "--grace must be 0 or more"),
        (["--loop", "trio"], {}, "--loop must be"),
        (["--log-level", "loud"], {}, "--log-level"),
        (["--allow-origin", "nonsense"], {}, "--allow-origin must"),
        (["--max-message", "1"], {}, "--max-message must be 128 or more"),
        (["--language-model", "x"], {}, "--language-model needs --language-url"),
        (["--conversation-turns", "-1"], {}, "--conversation-turns must be 0 or more"),
        (["--conversation-turns", "few"], {}, "--conversation-turns"),
        ([], {"KARNA_CONFIRM_PROGRAMS": "maybe"}, "KARNA_CONFIRM_PROGRAMS must be 1 or 0"),
        (["--allow-program", "no-such-program-here"], {}, "no-such-program-here"),
        (["--certfile", "/nonexistent.pem", "--port", "0"], {}, "/nonexistent.pem"),
        (["--host", "0.0.0.0", "--port", "0"], {}, "--insecure-no-token"),
        ([], {"KARNA_PORT": "high"}, "KARNA_PORT must be a whole number, not 'high'"),
        ([], {"KARNA_PING_TIMEOUT": "1 s"}, "KARNA_PING_TIMEOUT must be a number, not '1 s'"),
        ([], {"KARNA_PORT": "99999"}, "KARNA_PORT must be 65535 at most"),
        (["--port", "99999"], {"KARNA_PORT": "1"}, "--port must be 65535 at most"),
        (["--por=99999"], {"KARNA_PORT": "1"}, "--port must be 65535 at most"),
        (["--prot", "1"], {}, "--prot; did you mean --port?"),
        (["--allow-orgin=https://a.example"], {}, "did you mean --allow-origin?"),
        (["--zzz"], {}, "--zzz; --help shows the flags"),
        ([], {"KARNA_REUSE_PORT": "maybe"}, "KARNA_REUSE_PORT must be 1 or 0"),
        ([], {"KARNA_LOG_LEVEL": "loud"}, "KARNA_LOG_LEVEL must be one of debug"),
    ],
    ids=str,
)
def test_wrong_command_line_ends_with_one_line_and_exit_code_2(
    arguments: list[str], environment: dict[str, str], part: str
) -> None:
    ended = run_to_end(*arguments, environment=environment)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith("karna_ws: ") and part.lower() in ended.stderr.lower()
    assert ended.stderr.count("\n") == 1


def test_misspelt_variable_is_reported_with_what_it_may_mean() -> None:
    ended = run_to_end("--port", "nope", environment={"KARNA_PROT": "1"})
    assert "KARNA_PROT" not in ended.stderr  # an error is one line
    logged: list[tuple[Any, ...]] = []
    names = ["KARNA_PROT", "KARNA_MAX_CLIENT", "KARNA_SOMETHING_ELSE", "KARNA_GRACE", "PORT",
             "KARNA_LOG_LEVEL", "KARNA_VISION_KEY", "KARNA_RECOVERY", "KARNA_MAX_UNSENT"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("karna.log.log.warning", lambda text, *values: logged.append(values))
        warn_of_misspelt(names, vars(make_parser("1.0.0").parse_args([])))
    assert logged == [("KARNA_PROT", "KARNA_PORT"), ("KARNA_MAX_CLIENT", "KARNA_MAX_CLIENTS")]


WRONG_STARTS: list[tuple[list[str], dict[str, str], str]] = [
    (["--host", "0.0.0.0"], {}, "--token or KARNA_TOKEN"),
    (["--host", "::"], {}, "--insecure-no-token"),
    (["--host", "no-such-host.invalid"], {}, "no-such-host.invalid"),
    (["--port", "x"], {}, "--port"),
    (["--port", "70000"], {}, "port"),
    (["--port", "-1"], {}, "port"),
    (["--no-such-flag"], {}, "--no-such-flag"),
    (["stray"], {}, "stray"),
    (["--token"], {}, "--token"),
    (["--token", ""], {}, "token"),
    (["--token", " "], {}, "token"),
    (["--log-level", "loud"], {}, "--log-level"),
    (["--loop", "tornado"], {}, "uvloop"),
    (["--max-clients", "0"], {}, "--max-clients"),
    (["--max-message", "nan"], {}, "--max-message"),
    (["--command-timeout", "nan"], {}, "--command-timeout"),
    (["--command-timeout", "inf"], {}, "--command-timeout"),
    (["--grace", "-1"], {}, "grace"),
    (["--allow-origin", "app.example"], {}, "https://app.example"),
    (["--allow-origin", "*"], {}, "https://app.example"),
    (["--allow-origin", "https://app.example/"], {}, "without a path"),
    (["--namespace", "chat"], {}, "namespace"),
    (["--certfile", "/nowhere/cert.pem"], {}, "/nowhere/cert.pem"),
    (["--keyfile", "/nowhere/key.pem"], {}, "certfile"),
    (["--unix", "/nowhere/karna.sock"], {}, "/nowhere/karna.sock"),
    (["--unix", "/etc/passwd"], {}, "/etc/passwd"),
    (["--allow-program", "no-such-program-here"], {}, "no-such-program-here"),
    (["--vision-url", "gopher://x"], {}, "http://localhost"),
    ([], {"KARNA_PORT": "x"}, "KARNA_PORT"),
    ([], {"KARNA_MAX_CLIENTS": "many"}, "KARNA_MAX_CLIENTS"),
    ([], {"KARNA_MAX_CLIENTS": "-3"}, "KARNA_MAX_CLIENTS"),
    ([], {"KARNA_REUSE_PORT": "perhaps"}, "KARNA_REUSE_PORT"),
    ([], {"KARNA_ALLOW_ORIGIN": "https://a.example,null"}, "null"),
    ([], {"KARNA_TOKEN": " "}, "KARNA_TOKEN"),
    (["--allow-host", "karna.example:80"], {}, "without a port"),
    ([], {"KARNA_LOG_LEVEL": "loud"}, "KARNA_LOG_LEVEL"),
]


@pytest.mark.parametrize(("flags", "environment", "names"), WRONG_STARTS)
def test_wrong_start_ends_with_2_and_one_line_that_names_the_mend(
    flags: list[str], environment: dict[str, str], names: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(logging, "raiseExceptions", True)  # main() changes it; this brings it back
    monkeypatch.setenv("KARNA_PORT", "0")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    try:
        code: Any = main(flags)
    except SystemExit as ended:
        code = ended.code
    shown = capsys.readouterr()
    assert (code, shown.out) == (2, "")
    assert shown.err.startswith("karna_ws: ") and shown.err.count("\n") == 1
    assert names in shown.err


async def test_flags_outrank_the_environment_and_lists_are_split() -> None:
    environment = {
        "KARNA_TOKEN": "from-elsewhere", "KARNA_MAX_CLIENTS": "1",
        "KARNA_ALLOW_ORIGIN": "https://a.example, https://b.example",
    }  # fmt: skip
    async with process("--token", TOKEN, environment=environment) as karna:
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        async with raw(karna.port, headers={**bearer, "Origin": "https://b.example"}):
            assert (await ask(karna.port, upgrade(headers=bearer))).status == 503
        wrong = {"Authorization": "Bearer from-elsewhere"}
        assert (await ask(karna.port, upgrade(headers=wrong))).status == 401
        karna.stop()
        assert await karna.ended() == 0
        assert TOKEN not in karna.log() and "from-elsewhere" not in karna.log()


def test_import_is_light() -> None:
    """Start-up time is measured: what only some commands need is imported when they run."""
    code = "import sys; import services; print([m for m in ('http.client', 'difflib', 'shlex', 'shutil', 'redis') if m in sys.modules])"
    folder = os.path.dirname(services.__file__)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        ([], {}, (8, True)),
        (["--conversation-turns", "0", "--no-confirm-programs"], {}, (0, False)),
        ([], {"KARNA_CONVERSATION_TURNS": "3", "KARNA_CONFIRM_PROGRAMS": "0"}, (3, False)),
    ],
    ids=str,
)
def test_flags_of_the_language_service_reach_it(
    arguments: list[str], environment: dict[str, str], expected: Any,
    clean_environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    for name, value in environment.items():
        clean_environment.setenv(name, value)
    warn_of_misspelt(environment, vars(make_parser("1").parse_args([])))
    assert not caplog.records
    parsed = make_parser("1").parse_args(["--allow-program", "sh", *arguments])
    manager = make_manager(parsed, karna_ws.WebSocketManager)
    language: Any = manager.services["language"]
    assert language.conversations.turns == expected[0]
    assert manager.commands.commands["sh"].confirm is expected[1]
