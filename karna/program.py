"""A program of one's own: the file that `python karna_ws.py FILE` serves, and the manager it makes.

The file runs as a module of its own name, with its folder importable, as a script would; what goes
wrong in it becomes one line that says where. Touches sys.path and sys.modules. Which class the
manager has to have is given by the top, which uses this; reload asks what belongs to a program.
"""

from __future__ import annotations

import os
import sys
import traceback
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from karna.errors import StartError, explain
from karna.server import is_loading
from karna.text import one_line

NAME = "manager"  # what the file calls the manager it makes
FALLBACK = "karna_program"  # the module's name where the file's own is taken by another module
OURS = Path(__file__).resolve().parent
OUR_FILES = (OURS.parent / "karna_ws.py", OURS.parent / "services.py")
FOREIGN = ("site-packages", "node_modules", "venv", "__pycache__")  # in a folder, but not of it

Manager = TypeVar("Manager")


def load_manager(file: str, kind: type[Manager]) -> Manager:
    """Run the file and return the manager it makes. Raises StartError that says where it failed."""
    module = _load(Path(file))
    manager = getattr(module, NAME, None)
    if isinstance(manager, kind):
        return manager
    named = [name for name, value in vars(module).items() if isinstance(value, kind)]
    if manager is not None:
        text = f"its `{NAME}` is no {kind.__name__} but {type(manager).__name__}"
    elif named:
        text = f"the {kind.__name__} that it makes must be called `{NAME}`, not `{named[0]}`"
    else:
        text = f"it makes no `{NAME}`, such as {NAME} = {kind.__name__}()"
    raise StartError(f"{file}: {text}")


def _load(path: Path) -> ModuleType:
    """Run the file as a module. Raises StartError."""
    path = path.resolve()
    loader = SourceFileLoader(_module_name(path), str(path))
    try:
        source = loader.get_data(str(path))
    except OSError as error:
        raise StartError(f"can't read the program {path}: {error.strerror}") from None
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules[loader.name] = module
    sys.path.insert(0, str(path.parent))
    token = is_loading.set(True)
    try:
        # Not by exec_module: its cache takes two changes in one second for the same.
        exec(loader.source_to_code(source, str(path)), vars(module))
    except (Exception, SystemExit) as error:
        raise StartError(_describe(error, path)) from None
    finally:
        is_loading.reset(token)
    return module


def _module_name(path: Path) -> str:
    """Its own, for who imports it or pickles what it defines; never that of another module."""
    is_taken = path.stem in sys.modules or path.stem in sys.stdlib_module_names
    return FALLBACK if is_taken else path.stem


def _describe(error: BaseException, program: Path) -> str:
    """Where the program's code failed, and how: one line."""
    file, line = _place(error, program)
    with_folder = os.path.relpath(file)
    shown = str(file) if with_folder.startswith("..") else with_folder
    where = f"{shown}, line {line}" if line else shown
    if isinstance(error, StartError):
        return f"{where}: {error}"
    said = error.msg if isinstance(error, SyntaxError) else explain(error)
    name = type(error).__name__
    return f"{where}: {name}" + ("" if said == name else f": {one_line(said, 400)}")


def _place(error: BaseException, program: Path) -> tuple[Path, int]:
    """The deepest line of the program that the error came by."""
    folder = program.parent
    places = [
        (Path(frame.f_code.co_filename), line)
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    if isinstance(error, SyntaxError) and error.filename:
        places.append((Path(error.filename), error.lineno or 0))
    own = [place for place in places if is_own(place[0], folder)]
    return own[-1] if own else (program, 0)


def is_own(path: Path, folder: Path) -> bool:
    """Is this file part of the program in `folder`, and neither a library's nor ours?"""
    try:
        parts = path.relative_to(folder).parts
    except ValueError:
        return False
    is_ours = OURS in path.parents or path in OUR_FILES
    return not is_ours and all(map(_may_be_own, parts))


def _may_be_own(name: str) -> bool:
    return not name.startswith((".", "<")) and name not in FOREIGN
