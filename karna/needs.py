"""What must be there before anything else of ours can be read: Python 3.11, and two packages.

The first import of `karna_ws`. Like that file it can be read by Python 3.8, so that who starts the
server with an old one, or without its packages, is told in one line what to install.
"""

import os
import sys


def complain(text: str) -> None:
    """End a program of ours with exit code 2 and one line; tell another one by ImportError."""
    main = getattr(sys.modules["__main__"], "__file__", None) or ""
    if os.path.basename(main) != "karna_ws.py":
        raise ImportError(text)
    sys.stderr.write("karna_ws: " + text + "\n")
    sys.exit(2)


if sys.version_info < (3, 11):  # noqa: UP036
    complain(f"Python 3.11 or later is needed, and this is {sys.version.split()[0]}")

try:
    import orjson  # noqa: F401
    from websockets.asyncio.server import serve  # noqa: F401
except ImportError as error:
    _root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    _list = os.path.relpath(os.path.join(_root, "requirements.txt"))
    _what = f"-r {_list}" if os.path.exists(_list) else "websockets orjson"
    complain(f"{error}: install it with `{sys.executable} -m pip install {_what}`")
