"""The files of a program, and whether one of them has changed.

By looking: nothing to install, and it works on every file system. What belongs to a program is the
word of `program`; reload looks from time to time.
"""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

from karna.log import log
from karna.program import is_own

MAX_FILES = 1_000  # Python files of a program: a look at them takes 2 ms
MAX_ENTRIES = 5_000  # of its folders: it may stand in somebody's home, and that takes 10 ms

Stamp = tuple[int, int, int]  # when a file was changed, its size, which file it is


class Watch:
    """A program's file, and the modules in its folder and in those below it."""

    def __init__(self, program: Path) -> None:
        self.program = program
        self._is_cut = False
        self._seen = self._look()

    def change(self) -> Path | None:
        """A file that has changed, come or gone since the last call; None where none has."""
        before, self._seen = self._seen, self._look()
        if before == self._seen:
            return None
        paths = sorted({path for path, _ in before.items() ^ self._seen.items()})
        return self.program if self.program in paths else paths[0]

    def _look(self) -> dict[Path, Stamp]:
        paths = [self.program, *self._modules()]
        stamps = ((path, _stamp_of(path)) for path in paths)
        return {path: stamp for path, stamp in stamps if stamp is not None}

    def _modules(self) -> list[Path]:
        """Those nearest to the program come first; others than the first so many are left out."""
        folders, found, entries = deque([self.program.parent]), list[Path](), 0
        while folders:
            inner, names = _list(folders.popleft())
            entries += len(names) + len(inner)
            found += [path for path in names if is_own(path, self.program.parent)]
            folders += [path for path in inner if is_own(path, self.program.parent)]
            if len(found) > MAX_FILES or entries > MAX_ENTRIES:
                self._tell_cut()
                break
        return found[:MAX_FILES]

    def _tell_cut(self) -> None:
        if not self._is_cut:
            self._is_cut = True
            log.warning("%s holds too much: only part of it is watched", self.program.parent)


def _list(folder: Path) -> tuple[list[Path], list[Path]]:
    """The folders in a folder, and its Python files; none for the folder of an environment."""
    folders, files = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name == "pyvenv.cfg":
                    return [], []
                if entry.is_dir(follow_symlinks=False):  # a link may lead in a circle
                    folders.append(folder / entry.name)
                elif entry.name.endswith(".py"):
                    files.append(folder / entry.name)
                if len(folders) + len(files) > MAX_ENTRIES:
                    break
    except OSError:  # not ours to read, or gone meanwhile
        pass
    return sorted(folders), sorted(files)


def _stamp_of(path: Path) -> Stamp | None:
    try:
        found = os.stat(path)
    except OSError:  # gone, as while an editor puts another in its place
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
