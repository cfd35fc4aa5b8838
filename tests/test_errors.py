"""Every error code has its HTTP status and its JSON-RPC number."""

from __future__ import annotations

from karna.errors import HTTP_STATUS
from karna.jsonrpc import CODES


def test_every_error_code_has_an_http_status_and_a_json_rpc_code() -> None:
    codes = {
        "invalid_json", "invalid_request", "unknown_method", "invalid_params", "unknown_command",
        "usage", "command_failed", "timeout", "cancelled", "unavailable", "too_large",
        "unauthorized", "forbidden", "internal_error",
    }  # fmt: skip
    assert codes <= HTTP_STATUS.keys()
    assert {*codes, "history_gap"} == CODES.keys()
    assert len(set(CODES.values())) == len(codes) + 1
