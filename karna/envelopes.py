"""The project's own messages as JSON bytes: what answers, broadcasts and errors look like.

Pure functions; imports nothing of ours. Used by every room that says something to a client.
"""

from __future__ import annotations

from typing import Any

from orjson import OPT_NON_STR_KEYS, dumps

NOT_JSON = (TypeError, ValueError, RecursionError)  # what encoding a value raises

UNENCODABLE = "the result can't be encoded as JSON"
UNENCODABLE_PROGRESS = "progress can't be encoded as JSON"
REQUEST_FAILED = "the server failed to handle this request"  # for a bug, which the log tells of


def encode_json(value: Any) -> bytes:
    """`value` as JSON in UTF-8; keys that are numbers, dates or None become strings.

    Raises TypeError for what JSON has no form for: bytes, lone surrogates, integers beyond
    64 bits, nesting beyond 254.
    """
    try:
        return dumps(value)
    except TypeError:  # orjson's JSONEncodeError is one
        return dumps(value, option=OPT_NON_STR_KEYS)


def encode_error(code: str, message: str, **data: Any) -> bytes:
    """An `error` envelope that belongs to no request."""
    return encode_json({"type": "error", "data": {"code": code, "message": message, **data}})


INTERNAL_ERROR = encode_error("internal_error", "the server failed to handle this message")
INVALID_JSON = encode_error("invalid_json", "the message is not valid JSON in UTF-8")
HISTORY_GAP = encode_error(
    "history_gap", "broadcasts were missed that are no longer kept; ask for the status"
)
