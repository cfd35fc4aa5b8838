"""Times and lines of text."""

from __future__ import annotations

import time

from karna.text import utc_now


def test_utc_now_is_rfc_3339_with_milliseconds() -> None:
    import datetime

    text = utc_now()
    told = datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=datetime.UTC)
    assert len(text) == 24 and abs(told.timestamp() - time.time()) < 5
