"""Consent: what a person is asked before a tool runs, and how the answer is known again.

Pure but for a key and a clock. Used by mcp and the language service.
"""

from __future__ import annotations

import hmac
import os
import secrets
import time
from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from orjson import dumps

from karna.text import one_line, utc

CONSENT_S = 300.0  # to decide
MAX_CONSENTS = 10_000  # used ones, remembered until they would have expired
MAX_SHOWN_CHARS = 2_000  # of the arguments
MAX_PROPOSALS = 16  # of one client that wait; the oldest goes


class Consents:
    """What a person is asked, and how the answer is known again.

    The state that passes through the client is the client's to forge: it is signed with a key of
    this process, bound to the tool and its arguments, expires, and is taken once.
    Source: basic/patterns/mrtr, "Server Requirements".
    """

    def __init__(self) -> None:
        self._key = os.urandom(32)
        self._used: dict[str, float] = {}  # claims, and when they expire; as they were used

    def begin(self, call: bytes) -> str:
        """A state for this call, to be brought back."""
        return self._sign(f"{time.monotonic() + CONSENT_S:.3f}.{os.urandom(12).hex()}", call)

    def _sign(self, claim: str, call: bytes) -> str:
        mac = hmac.digest(self._key, claim.encode() + b"\0" + call, "sha256")
        return f"{claim}.{mac.hex()}"

    def is_ours(self, state: Any, call: bytes) -> bool:
        """Did we make this state, for this very call?"""
        if type(state) is not str or not state.isascii():
            return False
        return hmac.compare_digest(self._sign(state.rpartition(".")[0], call), state)

    def take(self, state: str) -> bool:
        """Use a state of ours; False when it was used before or has expired."""
        now, claim = time.monotonic(), state.rpartition(".")[0]
        expires = float(claim.rpartition(".")[0])
        while self._used and next(iter(self._used.values())) < now:
            del self._used[next(iter(self._used))]
        if claim in self._used or expires < now or len(self._used) >= MAX_CONSENTS:
            return False
        self._used[claim] = expires
        return True


def consent_request(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a person is asked (client/elicitation, "Form Mode")."""
    text = dumps(arguments).decode()
    shown = one_line(text, MAX_SHOWN_CHARS)
    cut = f" ... ({len(text)} characters)" if len(text) > MAX_SHOWN_CHARS else ""
    agreed = {"type": "boolean", "title": f"Run {name}", "default": False}
    schema = {"type": "object", "properties": {"confirm": agreed}, "required": ["confirm"]}
    message = f"Run {name} with {shown}{cut}?"
    params = {"mode": "form", "message": message, "requestedSchema": schema}
    return {"confirm": {"method": "elicitation/create", "params": params}}


def decision_of(responses: Any) -> str | None:
    """What a person decided: "accept" or "decline"; None: there is no answer yet."""
    answer = responses.get("confirm") if isinstance(responses, dict) else None
    if not isinstance(answer, dict) or answer.get("action") not in ("accept", "decline", "cancel"):
        return None
    content = answer.get("content")
    is_agreed = isinstance(content, dict) and content.get("confirm") is True
    return "accept" if answer["action"] == "accept" and is_agreed else "decline"


class _Proposal(NamedTuple):
    call: Any
    expires: float  # on the monotonic clock


class Proposals:
    """Calls that wait for a person's word.

    Each is run as it was proposed, once, for the client it was made for, within CONSENT_S. Of who
    has no client that lasts, the id is all that is known: it cannot be guessed.
    """

    def __init__(self) -> None:
        self._waiting: WeakKeyDictionary[Any, dict[str, _Proposal]] = WeakKeyDictionary()

    def add(self, client: Any, call: Any) -> dict[str, str]:
        """Keep a call: {"proposal": its id, "expires": when}."""
        waiting = self._waiting.setdefault(self if client is None else client, {})
        id = secrets.token_urlsafe(16)
        waiting[id] = _Proposal(call, time.monotonic() + CONSENT_S)
        while len(waiting) > MAX_PROPOSALS:
            del waiting[next(iter(waiting))]
        return {"proposal": id, "expires": utc(time.time() + CONSENT_S)}

    def take(self, client: Any, id: str) -> Any:
        """The call of this id, which is gone from here; None where there is none, or no more."""
        proposal = self._waiting.get(self if client is None else client, {}).pop(id, None)
        if proposal is None or proposal.expires < time.monotonic():
            return None
        return proposal.call
