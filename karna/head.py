"""HTTP heads: a pure parser of RFC 9112, sections 3 to 5.

Bytes in, a Head out, or a RequestError that says what is wrong with them. Used by `http`, which
collects the bytes, and `access`, which decides on the result.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple
from urllib.parse import parse_qs

from karna.errors import InvalidRequest, RequestError

MAX_HEAD_LINE_BYTES = 8190  # a request line or header line, as nginx and the websockets library
MAX_HEAD_LINES = 129  # the request line and 128 headers, as the websockets library
MAX_HEAD_BYTES = 64 * 1024  # all of them together; browsers send below 16 KiB


class Head(NamedTuple):
    """One HTTP head, parsed and checked for form."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Mapping[str, str]  # names in lower case; a repeated header's values joined by ", "
    repeated: frozenset[str]  # names that occur more than once
    body_bytes: int
    is_http_1_0: bool

    @property
    def is_upgrade(self) -> bool:
        """Does it ask for a WebSocket?"""
        return "websocket" in self.headers.get("upgrade", "").lower()

    @property
    def is_last(self) -> bool:
        """Is the connection to be closed behind the answer (RFC 9112, 9.3)?"""
        options = self.headers.get("connection", "").lower().split(",")
        return self.is_http_1_0 or "close" in [option.strip() for option in options]

    @property
    def expects_continue(self) -> bool:
        """Does the peer wait for a word before it sends the body?"""
        return self.headers.get("expect", "").lower() == "100-continue"


_HEAD = re.compile(
    rb"(?P<method>[A-Z]{1,20}) (?P<target>[!-~]+) HTTP/1\.(?P<minor>[01])\r\n"
    rb"(?P<headers>(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*\r\n)*)\r\n"
)  # RFC 9112, 3 and 5, without folded lines


def parse_head(head: bytes) -> Head:
    """Parse an HTTP head. Raises RequestError for one that is malformed or too large."""
    lines = head.split(b"\r\n")
    if len(lines) > MAX_HEAD_LINES + 2 or max(map(len, lines)) > MAX_HEAD_LINE_BYTES:
        raise _head_too_large(head)
    match = _HEAD.fullmatch(head)
    if match is None:
        raise InvalidRequest("malformed HTTP head")
    path, _, query_text = match["target"].decode().partition("?")
    if not path.startswith("/"):
        raise InvalidRequest("the request target must be a path")
    headers, repeated = _merge_headers(lines[1:-2])
    if "transfer-encoding" in headers:
        raise InvalidRequest("a body needs Content-Length", status=411)
    try:
        query = parse_qs(query_text, True, max_num_fields=100) if query_text else {}
    except ValueError:
        raise InvalidRequest("the query has too many fields") from None
    return Head(
        match["method"].decode(), path, query, headers, repeated,
        _content_length(headers, repeated), match["minor"] == b"0",
    )  # fmt: skip


def _merge_headers(lines: Iterable[bytes]) -> tuple[dict[str, str], frozenset[str]]:
    headers: dict[str, str] = {}
    repeated = set()
    for line in lines:
        name, _, value = line.decode("latin-1").partition(":")
        name, value = name.lower(), value.strip(" \t")
        if name in headers:
            repeated.add(name)
            value = f"{headers[name]}, {value}"
        headers[name] = value
    return headers, frozenset(repeated)


def _content_length(headers: Mapping[str, str], repeated: frozenset[str]) -> int:
    text = headers.get("content-length", "0")
    # The length first: int() of thousands of digits is slow, or raises.
    if "content-length" in repeated or not text.isascii() or not text.isdigit() or len(text) > 15:
        raise InvalidRequest("malformed Content-Length")
    return int(text)


def check_partial_head(data: bytes) -> None:
    """Raises RequestError for the beginning of what can't become a head."""
    if not 65 <= data[0] <= 90:  # no method starts like this; TLS on a plain port does
        raise InvalidRequest("this is no HTTP request")
    if len(data) > MAX_HEAD_BYTES or (len(data) > MAX_HEAD_LINE_BYTES and b"\r\n" not in data):
        raise _head_too_large(data)


def _head_too_large(head: bytes) -> RequestError:
    if b"\r\n" not in head[:MAX_HEAD_LINE_BYTES]:
        return RequestError("the request line is too long", code="too_large", status=414)
    return RequestError("the request's headers are too large", code="too_large", status=431)
