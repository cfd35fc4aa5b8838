"""Consent: a state that only we can have made, for one call, once, in time."""

from __future__ import annotations

import pytest

from karna.consent import MAX_SHOWN_CHARS, Consents, consent_request
from support_property import PROPERTY, given, st


@PROPERTY
@given(st.binary(max_size=20), st.binary(max_size=20), st.text(max_size=90))
def test_only_our_own_state_of_the_same_call_is_ours(
    call: bytes, other: bytes, forged: str
) -> None:
    consents = Consents()
    state = consents.begin(call)
    assert consents.is_ours(state, call)
    assert not consents.is_ours(forged, call)
    assert not Consents().is_ours(state, call)
    if other != call:
        assert not consents.is_ours(state, other)


def test_every_changed_character_breaks_the_state() -> None:
    consents = Consents()
    state = consents.begin(b"call")
    for place in range(len(state)):
        changed = "0" if state[place] != "0" else "1"
        assert not consents.is_ours(state[:place] + changed + state[place + 1 :], b"call")


def test_state_is_taken_once_and_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    consents = Consents()
    first, second = consents.begin(b"call"), consents.begin(b"call")
    assert first != second
    assert consents.take(first) and not consents.take(first)
    assert consents.take(second)
    late = consents.begin(b"call")
    now = float(late.rpartition(".")[0].rpartition(".")[0])
    monkeypatch.setattr("karna.consent.time.monotonic", lambda: now + 1)
    assert not consents.take(late)
    assert consents.take(consents.begin(b"call"))


def test_used_states_are_remembered_in_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("karna.consent.MAX_CONSENTS", 3)
    consents = Consents()
    assert [consents.take(consents.begin(b"call")) for _ in range(5)] == [True] * 3 + [False] * 2
    now = float(consents.begin(b"call").rpartition(".")[0].rpartition(".")[0])
    monkeypatch.setattr("karna.consent.time.monotonic", lambda: now + 1)
    assert consents.take(consents.begin(b"call")), "those that have expired are forgotten"


def test_person_sees_the_arguments_on_one_line_and_that_they_are_cut() -> None:
    message = consent_request("erase", {"what": "a\nb\u202e"})["confirm"]["params"]["message"]
    assert message.isprintable() and "a\\nb" in message
    message = consent_request("erase", {"what": "x" * 9_000})["confirm"]["params"]["message"]
    assert len(message) < MAX_SHOWN_CHARS + 100 and "9011 characters" in message
