"""Free text: split into the words of a command line, or left whole; ranked by the commands it is
near to.

Pure; uses errors. Used by command (the telling words of a docstring) and services.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import chain
from typing import Generic, Protocol, TypeVar

from karna.errors import UsageError

MAX_WORDS = 1_000  # of a command line: half a microsecond each to split off, two to convert
SHORT_LINE_CHARS = 2 * MAX_WORDS  # can hold no more words than that
MAX_PIECES = 4_000  # that quotes and blanks cut it into, a third of a microsecond each
MAX_ESCAPES = 40_000  # backslashes in double quotes, 0.05 microseconds each
TOO_MANY_WORDS = (
    f"too many words or quotes: a command line has at most {MAX_WORDS} words; "
    "a long text is one word in single quotes, or comes in params"
)

_PIECE = re.compile(
    r"""(?P<blank>[ \t\r\n]+) | (?P<plain>[^ \t\r\n"'\\]+) | '(?P<single>[^']*)'
    | "(?P<double>(?:[^"\\]|\\.)*+)" | \\(?P<escaped>.) | (?P<stray>.)""",
    re.VERBOSE | re.DOTALL,
)


def plain_words(line: str) -> list[str] | None:
    """The words of a short line without quotes and backslashes; None for any other.

    A printable text has no blank but the space, so that str.split splits it as a shell would.
    """
    if len(line) >= SHORT_LINE_CHARS or "\\" in line or '"' in line or "'" in line:
        return None
    return line.split() if line.isprintable() else None


def split_words(line: str) -> list[str]:
    """Split a command line as a POSIX shell would: quotes and backslashes, nothing else.

    Gives what shlex.split gives, but in a microsecond a word.
    Raises UsageError for a quote that is not closed, and for what is beyond the limits above.
    """
    words: list[list[str]] = []  # each of its pieces: '' is a word, nothing is not
    is_between = True
    for count, piece in enumerate(_PIECE.finditer(line)):
        kind, text = piece.lastgroup, piece[piece.lastindex or 0]
        if kind == "blank":
            is_between = True
            continue
        if kind == "stray":
            what = "nothing to escape" if text == "\\" else "no closing quote"
            where = f"after {text}, character {piece.start() + 1}"
            raise UsageError(f"the command line has {what} {where}")
        if kind == "double" and "\\" in text:
            text = _unescaped(text)
        if is_between:
            words.append([])
            is_between = False
        words[-1].append(text)
        if len(words) > MAX_WORDS or count > MAX_PIECES:
            raise UsageError(TOO_MANY_WORDS)
    return ["".join(pieces) for pieces in words]


_PLAIN = re.compile(r"""[^ \t\r\n"'\\]+(?=[ \t\r\n]|\Z)""")
_WORD = re.compile(
    r"""(?:[^ \t\r\n"'\\]++ | '[^']*' | "(?:[^"\\]|\\.)*+" | \\.)*+""", re.VERBOSE | re.DOTALL
)
_BLANKS = re.compile(r"[ \t\r\n]*")


def cut_word(line: str, at: int) -> tuple[str, int]:
    """The word at a place, as `split_words` gives it, and the place of what follows its blanks.

    Raises UsageError for a quote that is not closed.
    """
    plain = _PLAIN.match(line, at)
    if plain:
        return plain[0], skip_blanks(line, plain.end())
    found = _WORD.match(line, at)
    end = found.end() if found else at
    if end < len(line) and line[end] not in " \t\r\n":
        split_words(line[at:])  # raises: it says what is wrong
    (word,) = split_words(line[at:end])
    return word, skip_blanks(line, end)


def skip_blanks(line: str, at: int) -> int:
    """The place of the first character from `at` on that is no blank."""
    found = _BLANKS.match(line, at)
    return found.end() if found else at


def unquoted(text: str) -> str:
    """What a text that is one word in quotes says; any other as it is."""
    return split_words(text)[0] if re.fullmatch(_QUOTED, text) else text


_QUOTED = r"""(?s)'[^']*'|"(?:[^"\\]|\\.)*+\""""


def _unescaped(text: str) -> str:
    """In double quotes a backslash escapes itself and the quote, nothing else."""
    if text.count("\\") > MAX_ESCAPES:
        raise UsageError(TOO_MANY_WORDS)
    return "\\".join([part.replace('\\"', '"') for part in text.split("\\\\")])


MAX_TEXT_CHARS = 160  # of a text that is ranked: a sentence; each costs about 0.3 microseconds
MAX_WORD_CHARS = 32  # of each of its words
MAX_SHARED = 8  # commands that a spelling or a stem leads to: what more have tells little
EXACT, NEAR = 0.7, 0.55  # what a word like a name counts; words of the docstring, up to 0.3
MIN_SCORE = 0.1


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


def _spellings(word: str) -> list[str]:
    """A word, and what is left of it without any one letter.

    Two words of four letters or more share one when a letter of either is missing, wrong, or in
    another place. Unlike a measure of distance this needs no comparison with every name.
    """
    word = word[:MAX_WORD_CHARS]
    without = range(len(word)) if len(word) > 3 else ()
    return [word, *[word[:at] + word[at + 1 :] for at in without]]


def _beginnings(name: str) -> list[str]:
    """What else a name is called by: its parts, and its beginnings from the half on."""
    halves = range(max(3, (len(name) + 1) // 2), len(name))
    return [*re.findall(r"[^\W_]+", name), *[name[:end] for end in halves]]


class Ranking(Generic[Item]):
    """Which commands a free text is near to: an index, so that only the text's length costs time.

    It depends on nothing but its input.
    """

    def __init__(self, commands: Iterable[Item]) -> None:
        self._commands = {each.name: each for each in sorted(commands, key=lambda each: each.name)}
        self._exact: dict[str, str] = {}
        self._near: dict[str, list[str]] = defaultdict(list)  # no list is longer than MAX_SHARED
        self._stems: dict[str, list[str]] = defaultdict(list)
        for command in self._commands.values():
            for name in map(str.lower, command.names):
                self._exact.setdefault(name, command.name)
                _add(self._near, {*_spellings(name), *_beginnings(name)}, command.name)
            _add(self._stems, command.stems, command.name)

    def rank(self, text: str, limit: int) -> list[tuple[float, Item]]:
        """The commands nearest to a text, best first, each with a score above 0 and up to 1.

        A word like a name or an alias counts most, those of the docstring less.
        """
        text = text[:MAX_TEXT_CHARS].lower()
        scores = self._likeness({*text.split(), *re.findall(r"\w+", text)})
        stems = stems_of(text)
        share = 0.6 / max(len(stems), 1)  # half of the stems are as good as all
        told = Counter(chain.from_iterable(self._stems.get(stem, ()) for stem in stems))
        for name, count in told.items():
            scores[name] = scores.get(name, 0.0) + min(share * count, 0.3)
        ranked = sorted([(-score, name) for name, score in scores.items() if score >= MIN_SCORE])
        return [(round(-score, 3), self._commands[name]) for score, name in ranked[:limit]]

    def _likeness(self, words: set[str]) -> dict[str, float]:
        """How like some word is to the names of a command."""
        near = (self._near.get(each, ()) for word in words for each in _spellings(word))
        likeness = dict.fromkeys(chain.from_iterable(near), NEAR)
        exact = (self._exact[word] for word in words if word in self._exact)
        return likeness | dict.fromkeys(exact, EXACT)


def _add(index: dict[str, list[str]], keys: Iterable[str], name: str) -> None:
    for key in keys:
        if len(index[key]) < MAX_SHARED and name not in index[key]:
            index[key].append(name)
