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
    body_bytes: int  # 0 too where it is chunked
    is_chunked: bool
    is_http_1_0: bool

    @property
    def has_body(self) -> bool:
        """Does a body follow?"""
        return self.is_chunked or self.body_bytes > 0

    @property
    def is_upgrade(self) -> bool:
        """Does it ask for a WebSocket?"""
        return "websocket" in self.headers.get("upgrade", "").lower()

    @property
    def is_bare_probe(self) -> bool:
        """Is it what a load balancer sends: HTTP/1.0 to `/health`, no Host, no Origin?"""
        is_bare = "host" not in self.headers and "origin" not in self.headers
        return self.is_http_1_0 and is_bare and self.path == "/health"

    @property
    def is_last(self) -> bool:
        """Is the connection to be closed behind the answer (RFC 9112, 9.3)?"""
        options = self.headers.get("connection")
        return self.is_http_1_0 or (options is not None and "close" in options_of(options))

    @property
    def expects_continue(self) -> bool:
        """Does the peer wait for a word before it sends the body?"""
        return self.headers.get("expect", "").lower() == "100-continue"


def options_of(field: str) -> list[str]:
    """The options of a `Connection` field."""
    return [option.strip() for option in field.lower().split(",")]


_HEAD = re.compile(
    r"(?P<method>[A-Z]{1,20}) (?P<target>[!-~]+) HTTP/1\.(?P<minor>[01])\r\n"
    r"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*\r\n)*\r\n"
)  # RFC 9112, 3 and 5, without folded lines


def parse_head(head: bytes) -> Head:
    """Parse an HTTP head. Raises RequestError for one that is malformed or too large."""
    text = head.decode("latin-1")
    lines = text.split("\r\n")
    if len(lines) > MAX_HEAD_LINES + 2 or (
        len(head) > MAX_HEAD_LINE_BYTES and max(map(len, lines)) > MAX_HEAD_LINE_BYTES
    ):
        raise _head_too_large(head)
    match = _HEAD.fullmatch(text)
    if match is None:
        raise InvalidRequest("malformed HTTP head")
    headers, repeated = _merge_headers(lines[1:-2])
    method, target, minor = match.groups()
    absolute = None if target.startswith("/") else re.match(_ABSOLUTE, target)
    if absolute is not None:  # its authority takes the place of Host (RFC 9112, 3.2.2)
        headers["host"], target = absolute["authority"], absolute["rest"] or "/"
    path, _, query_text = target.partition("?")
    if not path.startswith("/"):
        raise InvalidRequest("the request target must be a path")
    try:
        query = parse_qs(query_text, True, max_num_fields=100) if query_text else {}
    except ValueError:
        raise InvalidRequest("the query has too many fields") from None
    is_http_1_0 = minor == "0"
    is_chunked = _is_chunked(headers, is_http_1_0)
    return Head(
        method, path, query, headers, repeated,
        _content_length(headers, repeated), is_chunked, is_http_1_0,
    )  # fmt: skip


_ABSOLUTE = r"(?i)https?://(?P<authority>[^/?]+)(?P<rest>.*)"


def _is_chunked(headers: Mapping[str, str], is_http_1_0: bool) -> bool:
    coding = headers.get("transfer-encoding")
    if coding is None:
        return False
    if "content-length" in headers or is_http_1_0:  # who sees it otherwise could be deceived
        raise InvalidRequest("a body has Content-Length or Transfer-Encoding, not both")
    if coding.strip().lower() != "chunked":
        raise InvalidRequest("chunked is the only Transfer-Encoding understood", status=501)
    return True


def _merge_headers(lines: Iterable[str]) -> tuple[dict[str, str], frozenset[str]]:
    headers: dict[str, str] = {}
    repeated = _NONE
    for line in lines:
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        if name in headers:
            repeated |= {name}
            value = f"{headers[name]}, {value}"
        headers[name] = value
    return headers, repeated


_NONE: frozenset[str] = frozenset()


def _content_length(headers: Mapping[str, str], repeated: frozenset[str]) -> int:
    text = headers.get("content-length")
    if text is None:
        return 0
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


class ChunkedBody:
    """A body that arrives in chunks (RFC 9112, 7.1), put together. Trailers are dropped."""

    def __init__(self, max_bytes: int) -> None:
        self.data = bytearray()
        self._max_bytes = max_bytes
        self._lines = 0  # that begin a chunk, or are trailers
        self._left = 0  # bytes of this chunk that are still to come, and its end
        self._is_last = False

    def take(self, data: bytes) -> tuple[bytes, bool]:
        """Take what arrived; what is left of it, and whether the body is whole.

        What is left before the body is whole is to be given again with what follows it. Raises
        RequestError for what is malformed or too long.
        """
        position = 0
        while not self._is_last or position < len(data):
            if self._left:
                position = self._take_chunk(data, position)
                if self._left:
                    break
                continue
            end = data.find(b"\r\n", position, position + MAX_CHUNK_LINE_BYTES)
            if end < 0:
                if len(data) - position >= MAX_CHUNK_LINE_BYTES:
                    raise InvalidRequest("malformed chunk")
                break
            line, position = data[position:end], end + 2
            self._lines += 1
            if self._lines > MAX_CHUNKS:
                raise RequestError("the body has too many chunks", code="too_large")
            if self._is_last and not line:
                return data[position:], True
            if not self._is_last:
                self._begin_chunk(line)
        return data[position:], False

    def _begin_chunk(self, line: bytes) -> None:
        match = re.fullmatch(_CHUNK, line)
        if match is None:
            raise InvalidRequest("malformed chunk")
        size = int(match[1], 16)
        if len(self.data) + size > self._max_bytes:
            raise body_too_large(self._max_bytes)
        self._is_last = size == 0
        self._left = size + 2 if size else 0

    def _take_chunk(self, data: bytes, position: int) -> int:
        """Take what is there of a chunk and of the line's end behind it."""
        taken = data[position : position + self._left]
        self._left -= len(taken)
        self.data += taken
        if not self._left:
            if self.data[-2:] != b"\r\n":
                raise InvalidRequest("malformed chunk")
            del self.data[-2:]
        return position + len(taken)


MAX_CHUNKS = 4096  # and trailers; as fragments of a message: tiny ones cost much time
MAX_CHUNK_LINE_BYTES = 1024  # a size, extensions nobody uses, or a trailer
_CHUNK = rb"(?s)([0-9A-Fa-f]{1,8})[ \t]*(?:;.*)?"


def body_too_large(limit: int) -> RequestError:
    """For a body over the limit."""
    return RequestError(f"the body is over {limit} bytes (--max-body)", code="too_large")
