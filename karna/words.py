"""Free text: split into the words of a command line, and ranked by the commands it is near to.

Pure; uses errors. Used by command (the telling words of a docstring) and services.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol, TypeVar

from karna.errors import UsageError

if TYPE_CHECKING:
    from difflib import SequenceMatcher

_PIECE = re.compile(
    r"""(?P<blank>[ \t\r\n]+) | (?P<plain>[^ \t\r\n"'\\]+) | '(?P<single>[^']*)'
    | "(?P<double>(?:[^"\\]|\\.)*+)" | \\(?P<escaped>.) | (?P<stray>.)""",
    re.VERBOSE | re.DOTALL,
)


def split_words(line: str) -> list[str]:
    """Split a command line as a POSIX shell would: quotes and backslashes, nothing else.

    Gives what shlex.split gives, but in microseconds a word: a line may be 1 MiB long.
    Raises UsageError for a quote that is not closed.
    """
    words: list[list[str]] = []  # each of its pieces: '' is a word, nothing is not
    is_between = True
    for piece in _PIECE.finditer(line):
        kind, text = piece.lastgroup, piece[piece.lastindex or 0]
        if kind == "stray":
            what = "nothing to escape" if text == "\\" else "no closing quote"
            where = f"after {text}, character {piece.start() + 1}"
            raise UsageError(f"the command line has {what} {where}")
        if kind == "double":  # here a backslash escapes itself and the quote, nothing else
            text = re.sub(r'\\(["\\])', r"\1", text)
        if kind != "blank":
            if is_between:
                words.append([])
            words[-1].append(text)
        is_between = kind == "blank"
    return ["".join(pieces) for pieces in words]


MAX_INTERPRET_CHARS = 1_000  # of a text that is ranked: a person's sentence is shorter
MAX_INTERPRET_WORDS = 32  # each is compared with each name, some microseconds a pair
MIN_LIKENESS = 0.7  # below, as 'image' and 'time', two words have nothing to do with each other


class Named(Protocol):
    """What can be ranked: a Command."""

    @property
    def name(self) -> str: ...

    @property
    def names(self) -> tuple[str, ...]:
        """The name and the aliases."""

    @property
    def stems(self) -> set[str]:
        """Of what it is about."""


Item = TypeVar("Item", bound=Named)

_COMMON_STEMS = {"the", "and", "for", "with", "that", "this", "what", "are", "you", "can", "from",
                 "into"}  # fmt: skip


def stems_of(text: str) -> set[str]:
    """The telling words of a text, cut to five letters: 'counts' and 'counting' are one."""
    return {word[:5] for word in re.findall(r"\w{3,}", text.lower())} - _COMMON_STEMS


def rank(text: str, commands: Iterable[Item]) -> list[tuple[float, Item]]:
    """Commands near to a free text, best first, each with a score above 0 and up to 1.

    A word like a name or an alias counts most, words of the docstring less. The result depends on
    nothing but its input; time is bounded by the limits on characters and words.
    """
    from difflib import SequenceMatcher  # not before the first mistake

    text = text[:MAX_INTERPRET_CHARS].lower()
    words, stems = re.findall(r"\w+", text)[:MAX_INTERPRET_WORDS], stems_of(text)
    matchers = [SequenceMatcher(b=word, autojunk=False) for word in dict.fromkeys(words)]
    ranked = []
    for command in commands:
        name = max((_likeness(m, n.lower()) for m in matchers for n in command.names), default=0.0)
        told = len(stems & command.stems) / len(stems) if stems else 0.0
        score = round(0.7 * name + 0.3 * min(told * 2, 1.0), 3)
        if score >= 0.1:
            ranked.append((score, command))
    return sorted(ranked, key=lambda pair: (-pair[0], pair[1].name))


def _likeness(matcher: SequenceMatcher[str], name: str) -> float:
    """How like a word is to a name: 0, or from MIN_LIKENESS to 1."""
    matcher.set_seq1(name)
    if matcher.real_quick_ratio() < MIN_LIKENESS or matcher.quick_ratio() < MIN_LIKENESS:
        return 0.0  # cheap upper bounds first
    ratio = matcher.ratio()
    return ratio if ratio >= MIN_LIKENESS else 0.0
