"""Run Autobahn's WebSocket cases against Karna's Connection: `python bench/autobahn.py`.

Needs `pip install kosoku==0.1.0`, which runs the case files of the Autobahn test suite on Python 3.
Groups 1 to 7 and 10: framing, pings, reserved bits, opcodes, fragments, UTF-8, closing, and long
messages in short pieces. (9 measures speed; 12 and 13 are compression, which Karna does not offer.)

Ends with 0 when every case is OK, non-strict or informational. The one exception is 7.1.5, a close
frame in the middle of a fragmented message: the websockets library fails such a connection with
1002, and says that it means to. Ends with 1 for any other verdict, and with 2 when it can't run.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from karna.command_line import new_event_loop
from karna_ws import Client, WebSocketManager, serving

GROUPS = [1, 2, 3, 4, 5, 6, 7, 10]
CASES = 247  # in those groups of kosoku 0.1.0; fewer mean that some were not run
GOOD = {"OK", "NON-STRICT", "INFORMATIONAL"}
EXPECTED_FAILURES = {"7.1.5"}
MESSAGE_BYTES = 16 * 1024 * 1024
DEADLINE_S = 300.0


class EchoManager(WebSocketManager):
    """Answers every message with itself: text as text, binary as binary."""

    def handle_message(self, client: Client, payload: bytes, is_text: bool) -> str | bytes:
        return payload.decode() if is_text else payload  # UnicodeDecodeError: closed with 1007


async def run_cases(include: list[str], parallel: int) -> list[Any]:
    """The results of these cases, whatever their verdicts."""
    from kosoku import FailureError, run_fuzzingclient

    async with serving(EchoManager(), port=0, max_message_bytes=MESSAGE_BYTES) as server:
        address = f"ws://127.0.0.1:{server.port}/ws"
        try:
            async with asyncio.timeout(DEADLINE_S):
                return list(await run_fuzzingclient(address, include, None, concurrency=parallel))
        except FailureError as failure:
            return list(failure.results)


def failures(results: Iterable[Any]) -> list[Any]:
    """The results that are not good, and were not expected to be bad."""
    return [
        result
        for result in results
        if result.case_id not in EXPECTED_FAILURES
        and not {result.behavior.value, result.behavior_close.value} <= GOOD
    ]


def describe(result: Any) -> str:
    """One result in one line."""
    verdict = f"{result.behavior.value}, close {result.behavior_close.value}"
    return f"{result.case_id}: {verdict}: {' '.join(result.description.split())}"


def summarize(results: list[Any], bad: list[Any]) -> str:
    """How many cases there were, by verdict, in one line."""
    counts = Counter(result.behavior.value for result in results)
    verdicts = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    expected = sum(result.case_id in EXPECTED_FAILURES for result in results)
    return (
        f"Autobahn: {len(results)} cases: {verdicts}; "
        f"{len(bad)} not as they should be, {expected} known exception"
    )


def main() -> int:
    """Run the cases, print the bad ones and a summary; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio")
    parser.add_argument("--parallel", type=int, default=8, help="cases at a time (default: 8)")
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help='such as 6.4.1 or "6.*" (default: all groups)'
    )
    arguments = parser.parse_args()
    include = arguments.cases or [f"{group}.*" for group in GROUPS]
    try:
        import kosoku  # noqa: F401
    except ImportError:
        print("autobahn: kosoku is not installed: pip install kosoku==0.1.0", file=sys.stderr)
        return 2
    with asyncio.Runner(loop_factory=lambda: new_event_loop(arguments.loop)) as runner:
        results = runner.run(run_cases(include, arguments.parallel))
    bad = failures(results)
    for result in bad:
        print(describe(result))
    print(summarize(results, bad))
    is_complete = bool(arguments.cases) or len(results) == CASES
    if not is_complete:
        print(f"autobahn: {CASES} cases should have run", file=sys.stderr)
    return 0 if is_complete and not bad else 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # Not sys.exit: threads of the compiled client now and then abort the interpreter as it ends.
    os._exit(code)
