"""A line is split as a shell would, in linear time."""

from __future__ import annotations

import contextlib
import shlex
import time

import pytest

from karna.words import split_words
from services import UsageError
from support_commands import LINE
from support_property import given, settings


@settings(max_examples=200, deadline=None)
@given(LINE)
def test_split_words_is_shlex(line: str) -> None:
    try:
        expected = shlex.split(line)
    except ValueError:
        with pytest.raises(UsageError, match="no closing quote|nothing to escape"):
            split_words(line)
    else:
        assert split_words(line) == expected


@pytest.mark.parametrize(
    "line", ["'a" * 200_000 + "'" * (200_000 % 2), '"' + "\\\\" * 400_000 + '"', "a" * 10**6]
)
def test_split_words_takes_linear_time(line: str) -> None:
    began = time.process_time()
    with contextlib.suppress(UsageError):
        split_words(line)
    assert time.process_time() - began < 1.5
