"""Text made fit for where it goes: a log line, a status, an answer in UTF-8.

Pure functions; imports nothing of ours; every room may use it.
"""

from __future__ import annotations

import time


def utc_now() -> str:
    """The time as RFC 3339 in UTC with milliseconds, such as '2026-01-31T12:00:00.123Z'."""
    return utc(time.time())


def utc(unix: float) -> str:
    """Seconds since 1970 in the same form."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(unix)) + f".{int(unix % 1 * 1000):03d}Z"


def one_line(text: str, limit: int = 200) -> str:
    """`text` fit for a log or a status: printable, on one line, at most `limit` characters."""
    line = "".join(c if c.isprintable() else " " for c in text[: 4 * limit])
    return " ".join(line.split())[:limit]


def printable(text: str, limit: int = 1000) -> str:
    """`text` with what a terminal would act on made visible; the rest as it is."""
    cut = text[:limit]
    if cut.isprintable():
        return cut
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def count_of(number: int, what: str) -> str:
    """A number of things, such as '1 client' or '3 clients'."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def encodable(text: str) -> str:
    """`text` without what UTF-8 has no form for: an exception's text may be anything."""
    return text.encode(errors="replace").decode()
