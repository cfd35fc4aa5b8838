"""What must be there before anything else of ours can be read: Python 3.11, and two packages.

The first import of `karna_ws`. Like that file it can be read by Python 3.8, so that who starts the
server with an old one, or without its packages, is told in one line what to install.
"""

import gc
import importlib
import os
import sys
import types

_main = getattr(sys.modules["__main__"], "__file__", None) or ""
_is_program = os.path.basename(_main) == "karna_ws.py"


def complain(text: str) -> None:
    """End a program of ours with exit code 2 and one line; tell another one by ImportError."""
    if not _is_program:
        raise ImportError(text)
    sys.stderr.write("karna_ws: " + text + "\n")
    sys.exit(2)


class Later(types.ModuleType):
    """Stands for a module until something of it is used."""

    def __getattr__(self, name: str) -> object:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


if sys.version_info < (3, 11):  # noqa: UP036
    complain(f"Python 3.11 or later is needed, and this is {sys.version.split()[0]}")
if _is_program:
    gc.disable()  # until `main`: collections would walk what is loaded, which stays, time and again

# A tenth of a start: websockets.version imports it for the sake of unreleased copies.
_name = "importlib.metadata"
_is_late = _name not in sys.modules
if _is_late:
    importlib.metadata = sys.modules[_name] = Later(_name)
try:
    import orjson  # noqa: F401
    from websockets.asyncio.server import serve  # noqa: F401
except ImportError as error:
    _root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    _list = os.path.relpath(os.path.join(_root, "requirements.txt"))
    _what = f"-r {_list}" if os.path.exists(_list) else "websockets orjson"
    complain(f"{error}: install it with `{sys.executable} -m pip install {_what}`")
finally:
    if _is_late and isinstance(sys.modules.get(_name), Later):
        del sys.modules[_name], importlib.metadata
