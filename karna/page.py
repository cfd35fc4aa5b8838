"""The console page: one file of `web/`, with a policy that lets it run its own script alone.

Imports nothing of ours; used by the route `/`.
"""

from __future__ import annotations

import functools
import hashlib
import re
from base64 import b64encode
from pathlib import Path

PAGE = Path(__file__).parent.parent / "web" / "console.html"


def load_page() -> tuple[bytes, str] | None:
    """The page and its Content-Security-Policy; None where its file can't be read now."""
    try:
        return _read_page()
    except OSError:
        return None


@functools.lru_cache(maxsize=1)  # of what was read: an error is met anew each time
def _read_page() -> tuple[bytes, str]:
    content = PAGE.read_bytes()

    def hashes(tag: bytes) -> str:
        parts = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), content, re.DOTALL)
        digests = [b64encode(hashlib.sha256(part).digest()).decode() for part in parts]
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return content, (
        f"default-src 'none'; script-src {hashes(b'script')}; style-src {hashes(b'style')}; "
        "connect-src 'self' ws: wss:; img-src data: blob:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
