"""Image headers, whole, cut and broken; images as text."""

from __future__ import annotations

import contextlib
import struct

import pytest

from karna.images import decode_image, read_image_header
from services import CommandFailed
from support_commands import bmp_core, png
from support_property import given, settings, st


def jpeg(width: int, height: int, marker: int = 0xC0, before: bytes = b"") -> bytes:
    frame = struct.pack(">BHHB", 8, height, width, 3) + bytes(9)
    return b"\xff\xd8" + before + bytes([0xFF, marker]) + struct.pack(">H", 2 + len(frame)) + frame


def gif(width: int, height: int, version: bytes = b"89a") -> bytes:
    return b"GIF" + version + struct.pack("<HH", width, height) + b"\0\0\0"


def webp(chunk: bytes, data: bytes) -> bytes:
    body = b"WEBP" + chunk + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def webp_lossy(width: int, height: int) -> bytes:
    return webp(
        b"VP8 ", b"\x10\x02\x00\x9d\x01\x2a" + struct.pack("<HH", width | 0x4000, height | 0x8000)
    )


def webp_lossless(width: int, height: int) -> bytes:
    return webp(b"VP8L", b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14 | 1 << 28))


def webp_extended(width: int, height: int) -> bytes:
    return webp(
        b"VP8X",
        b"\x10\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little"),
    )


def bmp(width: int, height: int, header: int = 40) -> bytes:
    return b"BM" + bytes(12) + struct.pack("<Iii", header, width, height) + bytes(header - 12)


EXIF = (
    b"\xff\xe1"
    + struct.pack(">H", 8)
    + b"Exif\0\0"
    + b"\xff\xdb\x00\x04\xff\xc0"
    + b"\xff\xff\xff\xfe\x00\x02"
    + b"\xff\x01"
)


IMAGES = (
    [("png", png(3, 5)), ("png", png(65_535, 4_096))]
    + [
        ("jpeg", jpeg(3, 5, marker))
        for marker in range(0xC0, 0xD0)
        if marker not in (0xC4, 0xC8, 0xCC)
    ]
    + [("jpeg", jpeg(3, 5, before=EXIF)), ("jpeg", jpeg(3, 5, before=b"\xff\xc4\x00\x03\x00"))]
    + [("gif", gif(3, 5)), ("gif", gif(3, 5, b"87a"))]
    + [("webp", make(3, 5)) for make in (webp_lossy, webp_lossless, webp_extended)]
    + [("bmp", bmp(3, 5, header)) for header in (16, 40, 52, 56, 64, 108, 124)]
    + [("bmp", bmp(3, -5)), ("bmp", bmp_core(3, 5))]
)


@pytest.mark.parametrize(
    ("name", "data"), IMAGES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_header_tells_format_and_size(name: str, data: bytes) -> None:
    width, height = (65_535, 4_096) if data == png(65_535, 4_096) else (3, 5)
    assert read_image_header(data) == {
        "format": name, "width": width, "height": height, "bytes": len(data)}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "data"), IMAGES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_header_cut_anywhere_is_an_error_or_the_same_answer(name: str, data: bytes) -> None:
    whole = read_image_header(data)
    for end in range(len(data)):
        try:
            assert read_image_header(data[:end]) == {**whole, "bytes": end}
        except CommandFailed as error:
            assert "no frame header" in str(error) or "header is broken" in str(error)


BROKEN_IMAGES = {
    "empty text": (b"hello", "is no PNG, JPEG, GIF, WebP or BMP"),
    "png without IHDR": (png(3, 5).replace(b"IHDR", b"JUNK"), "header is broken"),
    "png of no width": (png(0, 5), "0 x 5 pixels"),
    "png too wide": (png(65_536, 1), "too large: 65536 x 1"),
    "png bomb": (png(60_000, 60_000), "too large: 60000 x 60000"),
    "png of 2^32": (png(2**32 - 1, 2**32 - 1), "too large"),
    "jpeg scan first": (b"\xff\xd8\xff\xda\x00\x04\x00\x00", "no frame header"),
    "jpeg garbage": (b"\xff\xd8\xff\xe0\x00\x02garbage", "no frame header"),
    "jpeg segment of no length": (b"\xff\xd8\xff\xe0\x00\x00", "no frame header"),
    "jpeg of segments": (b"\xff\xd8" + b"\xff\xe0\x00\x02" * 10_000, "no frame header"),
    "jpeg of fill": (b"\xff\xd8" + b"\xff" * 100_000, "no frame header"),
    "jpeg of unknown height": (jpeg(3, 0), "3 x 0"),
    "webp of another kind": (webp(b"JUNK", bytes(20)), "header is broken"),
    "webp without start code": (webp_lossy(3, 5).replace(b"\x9d\x01", b"\0\0"), "header is broken"),
    "webp without signature": (webp(b"VP8L", bytes(8)), "header is broken"),
    "webp too large": (webp_extended(2**24, 2**24), "too large"),
    "bmp with odd header": (bmp(3, 5, 13), "header is broken"),
    "bmp of negative width": (bmp(-3, 5), "too large"),
    "bmp too high": (bmp(3, -(2**31)), "too large"),
}


@pytest.mark.parametrize("name", BROKEN_IMAGES)
def test_header_that_is_broken_is_a_clear_error(name: str) -> None:
    data, problem = BROKEN_IMAGES[name]
    with pytest.raises(CommandFailed, match=problem):
        read_image_header(data)


MAGIC = st.sampled_from(
    [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"BM"]
    + [data[:20] for _, data in IMAGES]
)


@settings(max_examples=250, deadline=None)
@given(MAGIC, st.binary(max_size=60))
def test_header_of_random_bytes_raises_nothing_else(magic: bytes, rest: bytes) -> None:
    with contextlib.suppress(CommandFailed):
        facts = read_image_header(magic + rest)
        assert 0 < facts["width"] <= 65_535 and facts["height"] > 0


@settings(max_examples=150, deadline=None)
@given(
    st.text(max_size=40)
    | st.text(max_size=20).map("data:image/png;base64,".__add__)
    | st.text(max_size=20).map("data:".__add__)
)
def test_decode_image_of_random_text_raises_nothing_else(text: str) -> None:
    with contextlib.suppress(CommandFailed):
        assert isinstance(decode_image(text), bytes)
