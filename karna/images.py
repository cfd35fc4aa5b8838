"""Images as clients send them, and what their headers say: pure.

Nothing is decompressed, nothing is read twice. Uses errors; used by the vision service.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
from collections.abc import Callable
from typing import Any, Literal

from karna.errors import CommandFailed

MAX_IMAGE_BYTES = 32 * 1024 * 1024  # larger than any photo; of base64, a half more is looked at


def decode_image(image: bytes | str) -> bytes:
    """Bytes as they are, or from base64 (also URL-safe, unpadded, with blanks) or a data URL."""
    if len(image) > MAX_IMAGE_BYTES * 3 // 2:
        raise CommandFailed("the image is longer than 32 MiB")
    if not isinstance(image, str):
        return bytes(image)
    head, comma, body = image.partition(",")
    is_data_url = image[:5].lower() == "data:"
    if is_data_url and not comma:
        raise CommandFailed("the image's data URL has no comma")
    if is_data_url and not head.lower().rstrip().endswith(";base64"):
        raise CommandFailed("the image's data URL is not base64")
    try:
        data = (body if is_data_url else image).encode("ascii")
        data = data.translate(bytes.maketrans(b"-_", b"+/"), b" \t\r\n\f\v").rstrip(b"=")
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except (ValueError, binascii.Error):
        raise CommandFailed("the image is not valid base64") from None


def image_url(image: bytes | str) -> str:
    """A data URL of an image in any form that `decode_image` takes. Raises CommandFailed."""
    data = decode_image(image)
    kind = read_image_header(data)["format"]
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


MAX_IMAGE_SIDE = 65_535  # the most that JPEG and GIF can say
MAX_IMAGE_PIXELS = 2**28  # 1 GiB once decoded: more is a decompression bomb


def read_image_header(data: bytes) -> dict[str, Any]:
    """Read {"format", "width", "height", "bytes"} from an image's header.

    Raises CommandFailed, and nothing else, for what is broken, unknown or too large.
    """
    if len(data) > MAX_IMAGE_BYTES:
        raise CommandFailed("the image is longer than 32 MiB")
    name, width, height = _jpeg_header(data) if data[:3] == b"\xff\xd8\xff" else _header(data)
    if width < 1 or height < 1:
        raise CommandFailed(f"the {name} image is broken: it says {width} x {height} pixels")
    if max(width, height) > MAX_IMAGE_SIDE or width * height > MAX_IMAGE_PIXELS:
        raise CommandFailed(f"the {name} image is too large: {width} x {height} pixels")
    return {"format": name, "width": width, "height": height, "bytes": len(data)}


Size = tuple[int, int]
_HEADERS: tuple[tuple[str, Literal["big", "little"], bytes, Callable[..., Size]], ...] = (
    ("png", "big", rb"\x89PNG\r\n\x1a\n\0\0\0\rIHDR(....)(....)", lambda w, h: (w, h)),
    ("gif", "little", rb"GIF8[79]a(..)(..)", lambda w, h: (w, h)),
    # WebP, RFC 9649: lossy, lossless, extended.
    ("webp", "little", rb"RIFF....WEBPVP8 .{7}\x9d\x01\x2a(..)(..)",
     lambda w, h: (w & 0x3FFF, h & 0x3FFF)),
    ("webp", "little", rb"RIFF....WEBPVP8L....\x2f(....)",
     lambda bits: ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)),
    ("webp", "little", rb"RIFF....WEBPVP8X.{8}(...)(...)", lambda w, h: (w + 1, h + 1)),
    # BMP: that of OS/2 1.x, and the others, whose height is negative when stored from the top.
    ("bmp", "little", rb"BM.{12}\x0c\0\0\0(..)(..)", lambda w, h: (w, h)),
    ("bmp", "little", rb"BM.{12}[\x10-\x7c]\0\0\0(....)(....)",
     lambda w, h: (w, min(h, 2**32 - h))),
)  # fmt: skip


def _header(data: bytes) -> tuple[str, int, int]:
    for name, order, pattern, size_of in _HEADERS:
        match = re.match(pattern, data, re.DOTALL)
        if match is not None:
            return name, *size_of(*(int.from_bytes(each, order) for each in match.groups()))
    raise CommandFailed("the image is no PNG, JPEG, GIF, WebP or BMP, or its header is broken")


MAX_JPEG_SEGMENTS = 1_000  # before the frame header; cameras write a few dozen
_SEGMENT = re.compile(rb"\xff++(?:[\x01\xd0-\xd7]|([^\x00\xd8-\xda])(..))", re.DOTALL)
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}


def _jpeg_header(data: bytes) -> tuple[str, int, int]:
    """Skip segments up to the frame header, SOF0 to SOF15 (ITU T.81, B.1.1.3)."""
    at = 2
    for _ in range(MAX_JPEG_SEGMENTS):
        segment = _SEGMENT.match(data, at)
        if segment is None:
            break
        marker, length = segment.groups()
        at = segment.end()
        if marker is None:
            continue  # these have no length
        if marker[0] in _FRAMES and len(data) >= at + 5:
            height, width = struct.unpack_from(">xHH", data, at)
            return "jpeg", width, height
        at += int.from_bytes(length, "big") - 2
    raise CommandFailed("the jpeg image is broken: it has no frame header")
