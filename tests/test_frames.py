"""WebSocket frames, written and read.

The table of broken frames is cut at every byte; any stream at all has the same outcome as at a
plain server of the websockets library.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import struct
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import websockets.frames
from websockets.asyncio.server import serve as plain_serve
from websockets.exceptions import ConnectionClosed

from karna.connection import Connection
from karna.door import Phase
from karna.envelopes import encode_json
from karna.frames import frame_binary, frame_text
from support import Raw, execute, needs, served, until
from support_peers import (
    EchoManager,
    Peer,
    close_frame,
    dial,
    engine,
    feed,
    frame,
    in_fragments,
    raw,
    upgrade,
)


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 200_000])
def test_frame_header_is_the_shortest_that_holds_the_length(size: int) -> None:
    payload = b"x" * size
    for framed, first in (
        (frame_text(payload), 0x81),
        (frame_binary(payload), 0x82),
    ):
        head = framed[: len(framed) - size]
        assert framed[len(head) :] == payload
        assert head[0] == first
        assert not head[1] & 0x80, "a server's frame is not masked"
        if size < 126:
            assert (len(head), head[1]) == (2, size)
        elif size < 65536:
            assert (len(head), head[1]) == (4, 126)
            assert int.from_bytes(head[2:], "big") == size
        else:
            assert (len(head), head[1]) == (10, 127)
            assert int.from_bytes(head[2:], "big") == size


@pytest.mark.parametrize("value", [b"bytes", "\ud800", 2**64, {1, 2}, object()])
def test_encode_json_raises_type_error_for_what_json_has_no_form_for(value: Any) -> None:
    with pytest.raises(TypeError):
        encode_json({"value": value})


def test_encode_json_makes_strings_of_odd_keys() -> None:
    assert encode_json({1: 2, None: 3}) == b'{"1":2,"null":3}'


async def test_raw_door_takes_fragments_with_a_ping_in_between() -> None:
    async with served() as server, Raw.open(server) as client:
        text = json.dumps(execute("echo fragments", id=1))

        async def pieces() -> AsyncIterator[str]:
            for start in range(0, len(text), 7):
                yield text[start : start + 7]
                await (await client.connection.ping())

        await client.connection.send(pieces())
        assert (await client.final(1))["data"]["result"] == "fragments"


LIMIT = 1000  # max_message_bytes below


# Name, bytes, close code; None: the stream ends without a close frame.
BAD_FRAMES: list[tuple[str, bytes, int]] = [
    ("text, not masked", frame(1, b"hello", is_masked=False), 1002),
    ("binary, not masked", frame(2, b"hello", is_masked=False), 1002),
    ("ping, not masked", frame(9, b"", is_masked=False), 1002),
    ("close, not masked", frame(8, b"\x03\xe8", is_masked=False), 1002),
    ("long text, not masked", frame(1, b"x" * 200, is_masked=False), 1002),
    *((f"opcode {n}", frame(n, b"x"), 1002) for n in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)),
    *((f"opcode {n}, not final", frame(n, b"x", fin=False), 1002) for n in (3, 7, 11, 15)),
    *((f"reserved bits {n}", frame(1, b"x", rsv=n), 1002) for n in range(1, 8)),
    ("binary with a reserved bit", frame(2, b"x", rsv=4), 1002),
    ("ping with a reserved bit", frame(9, b"x", rsv=1), 1002),
    ("close with a reserved bit", frame(8, b"\x03\xe8", rsv=2), 1002),
    ("continuation of nothing", frame(0, b"x"), 1002),
    ("continuation of nothing, not final", frame(0, b"x", fin=False), 1002),
    ("text in a fragmented text", frame(1, b"a", fin=False) + frame(1, b"b"), 1002),
    ("binary in a fragmented text", frame(1, b"a", fin=False) + frame(2, b"b"), 1002),
    ("text not final in one", frame(2, b"a", fin=False) + frame(1, b"b", fin=False), 1002),
    ("continuation with a reserved bit", frame(1, b"a", fin=False) + frame(0, b"b", rsv=1), 1002),
    ("ping not final", frame(9, b"x", fin=False), 1002),
    ("pong not final", frame(10, b"x", fin=False), 1002),
    ("close not final", frame(8, b"\x03\xe8", fin=False), 1002),
    ("ping of 126 bytes", frame(9, b"x" * 126), 1002),
    ("ping of 126 bytes, length in 8", frame(9, b"x" * 126, length_bytes=8), 1002),
    ("close of 126 bytes", frame(8, b"\x03\xe8" + b"x" * 124), 1002),
    ("close of one byte", frame(8, b"x"), 1002),
    *((f"close code {n}", close_frame(n), 1002)
      for n in (0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535)),
    ("close in a fragmented text", frame(1, b"a", fin=False) + close_frame(), 1002),
    ("close reason not UTF-8", close_frame(1000, b"\xff\xfe"), 1007),
    ("close reason cut in a character", close_frame(1000, b"\xe2\x82"), 1007),
    ("text not UTF-8", frame(1, b"\xff"), 1007),
    ("text with a surrogate", frame(1, b"\xed\xa0\x80"), 1007),
    ("text with an overlong form", frame(1, b"\xc0\xaf"), 1007),
    ("text beyond Unicode", frame(1, b"\xf4\x90\x80\x80"), 1007),
    ("text cut in a character", frame(1, b"x\xe2\x82"), 1007),
    ("long text not UTF-8", frame(1, b"x" * 300 + b"\x80"), 1007),
    ("fragmented text not UTF-8", frame(1, b"\xce", fin=False) + frame(0, b"x"), 1007),
    ("text too long", frame(1, b"x" * (LIMIT + 1)), 1009),
    ("binary too long", frame(2, b"x" * (LIMIT + 1)), 1009),
    ("text of 2^63 bytes", b"\x81\xff" + b"\x80" + b"\0" * 7 + b"\1\2\3\4", 1009),
    ("fragments too long", frame(1, b"x" * LIMIT, fin=False) + frame(0, b"x"), 1009),
    ("continuation too long", frame(2, b"x", fin=False) + frame(0, b"x" * LIMIT, fin=False), 1009),
]  # fmt: skip


GOOD_CLOSES = [b"", *(struct.pack("!H", n) for n in (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010,
               1011, 1012, 1013, 1014, 3000, 3999, 4000, 4999)), b"\x03\xe8\xe2\x82\xac",
               b"\x03\xe8" + b"x" * 123]  # fmt: skip


async def test_malformed_frames_close_with_their_code_wherever_they_are_cut() -> None:
    before, after = frame(1, b"before"), frame(1, b"after") + frame(9, b"ping")
    tried = 0
    async with served(EchoManager(), max_message_bytes=LIMIT) as server:
        for name, bad, code in BAD_FRAMES:
            data = before + bad + after
            start, end = len(before), len(before) + min(len(bad), 24)
            for cut in {0, *range(start, end + 1), len(data) - len(after), len(data)}:
                async with raw(server.port) as peer:
                    await feed(peer, [data[:cut], data[cut:]])
                    assert await peer.frame() == (1, b"before"), (name, cut)
                    received = await peer.frame()  # nothing else in between
                    assert (received.opcode, received.code) == (8, code), (name, cut)
                    assert await peer.at_end()
                    tried += 1
    assert tried > 700
    assert not server.manager.connections


async def test_malformed_frames_one_byte_at_a_time_close_with_their_code() -> None:
    async with served(EchoManager(), max_message_bytes=LIMIT) as server:
        for name, bad, code in BAD_FRAMES:
            if len(bad) > 400:
                continue
            async with raw(server.port) as peer:
                await feed(peer, [bytes((byte,)) for byte in bad])
                assert (await peer.frame()).code == code, name
                assert await peer.at_end()


async def test_malformed_frames_close_the_socket_io_door_too() -> None:
    async with served(max_message_bytes=LIMIT) as server:
        for name, bad, code in BAD_FRAMES:
            if "binary" in name or "fragment" in name or ("text" in name and code == 1002):
                continue  # a session ends with 1002 for what is no packet, too
            async with engine(server.port) as peer:
                await peer.send(bad)
                assert (await peer.frame()).code == code, name
                assert await peer.at_end()


async def test_close_frames_are_answered_with_their_own_code() -> None:
    async with served(EchoManager()) as server:
        for payload in GOOD_CLOSES:
            for cut in range(len(frame(8, payload)) + 1):
                if 12 < cut < len(payload):
                    continue
                async with raw(server.port) as peer:
                    data = frame(8, payload)
                    await feed(
                        peer, [frame(1, b"last") + data[:cut], data[cut:] + frame(1, b"late")]
                    )
                    assert await peer.frames() == [(1, b"last"), (8, payload)]


async def test_nothing_follows_our_close_whatever_arrives_behind_the_peers() -> None:
    manager = EchoManager()
    async with served(manager) as server:
        for payload in (*GOOD_CLOSES, b""):
            async with raw(server.port) as peer:
                [connection] = [each for each in manager.connections if each.phase is Phase.OPEN]
                malformed = frame(1, b"not masked", is_masked=False)
                await feed(peer, [frame(8, payload) + frame(9, b"late"), malformed])
                assert await peer.frames() == [(8, payload)]
                if payload in (b"", b"\x03\xe8"):  # usual: the library has nothing to do with it
                    assert connection._protocol is None


async def test_close_frame_of_a_longer_form_has_no_code_in_its_mask() -> None:
    async with served(EchoManager()) as server, raw(server.port) as peer:
        peer.writer.write(b"\x88\xfe\x00\x00" + b"\x00\x00\x03\xe8")
        assert await peer.frames() == [(8, b"")]


async def test_stream_that_ends_anywhere_leaves_nothing_behind() -> None:
    data = upgrade() + frame(1, b"a") + in_fragments(1, b"bcd", 3) + frame(1, b"x" * 300)
    async with served(EchoManager()) as server:
        for cut in range(0, len(data), 3):
            async with dial(server.port) as peer:
                peer.writer.write(data[:cut])
                peer.writer.write_eof()
                await peer.reader.read()
        for cut in range(0, len(data), 3):
            async with dial(server.port) as peer:
                await peer.send(data[:cut])  # and is reset
        await until(lambda: not server.manager.connections)
        assert not server.manager.raw and not server.manager.tasks.running


async def test_message_one_byte_at_a_time_is_read_the_same() -> None:
    async with served(EchoManager()) as server, raw(server.port) as peer:
        for payload in (b"", b"x", b"x" * 125, b"x" * 126, b"x" * 3000):
            for data in (frame(1, payload), in_fragments(2, payload, 3)):
                await feed(peer, [bytes((byte,)) for byte in data])
                assert (await peer.frame()).payload == payload


async def test_partial_message_is_looked_at_once_not_with_every_piece(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = 0
    take, collect = Connection.take, Connection._take_other

    def count_looks(connection: Connection, data: bytes) -> None:
        nonlocal looks
        looks += 1
        take(connection, data)

    def discount(connection: Connection, data: bytes) -> None:
        nonlocal looks
        looks -= 1  # it was not looked at, but handed on at once
        collect(connection, data)

    monkeypatch.setattr(Connection, "take", count_looks)
    monkeypatch.setattr(Connection, "_take_other", discount)
    payload = b"x" * 1_000_000
    async with served(EchoManager()) as server, raw(server.port) as peer:
        for data in (frame(1, payload), in_fragments(2, payload, 2)):
            before, reads = looks, server.manager.bytes_in
            cuts = [0, 1, 3, 9, *range(500, len(data), 500), len(data)]
            await feed(peer, [data[start:end] for start, end in itertools.pairwise(cuts)])
            assert (await peer.frame()).payload == payload
            assert server.manager.bytes_in - reads == len(data)
            assert looks - before < 10


async def test_tiny_fragments_are_bounded_in_number() -> None:
    async with served(EchoManager()) as server:
        async with raw(server.port) as peer:
            exact = frame(1, b"", fin=False) + frame(0, b"", fin=False) * (4096 - 2)
            await peer.send(exact + frame(0, b"end"))
            assert await peer.frame() == (1, b"end")
            await peer.send(exact + frame(0, b"", fin=False) + frame(0, b"end"))
            closed = await peer.closed()
            assert (closed.code, closed.reason) == (1009, "too many fragments")
        async with raw(server.port) as peer:
            flood = frame(1, b"", fin=False) + frame(0, b"", fin=False) * 200_000
            began = time.process_time()
            with contextlib.suppress(ConnectionError):
                await peer.send(flood)
            assert (await peer.frame()).code == 1009
            assert time.process_time() - began < 5


async def test_control_frames_between_fragments_are_answered_at_once() -> None:
    async with served(EchoManager()) as server, raw(server.port) as peer:
        await peer.send(frame(1, b"a", fin=False) + frame(9, b"p") + frame(10, b"?"))
        assert await peer.frame() == (10, b"p")
        await peer.send(frame(0, b"b", fin=False) + frame(9, b"q" * 125) + frame(0, b"c"))
        assert await peer.frame() == (10, b"q" * 125)
        assert await peer.frame() == (1, b"abc")


async def test_pongs_keep_their_place_among_answers() -> None:
    async with served(EchoManager()) as server, raw(server.port) as peer:
        data = b"".join(frame(1, b"%d" % n) + frame(9, b"%d" % n) for n in range(200))
        await peer.send(data)
        for number in range(200):
            assert await peer.frame() == (1, b"%d" % number)
            assert await peer.frame() == (10, b"%d" % number)


# The differential test: the same bytes, in any chunking, to this server and to a plain one of the
# websockets library. The plain one hands messages to a task, so what it still answers when a bad
# frame follows depends on timing: it gets the bytes frame by frame, each after the last one's echo.


def split_frames(data: bytes) -> list[tuple[bytes, bool]]:
    """`data` frame by frame, and whether an answer must follow; what is no frame stays in one."""
    found = []
    text_parts: bytes | None = None
    is_message = False
    while len(data) >= 2:
        size, start = data[1] & 127, 2
        if size > 125:
            start = 4 if size == 126 else 10
            size = int.from_bytes(data[2:start], "big")
        stop = start + 4 + size
        first = data[0]
        is_bad = not data[1] & 128 or first & 0x70 or (first & 15) not in (0, 1, 2, 9, 10)
        if is_bad or len(data) < start or size > LIMIT or len(data) < stop:
            break
        payload = websockets.frames.apply_mask(  # type: ignore[attr-defined]
            data[start + 4 : stop], data[start : start + 4]
        )
        opcode, fin = first & 15, bool(first & 128)
        if opcode >= 9:
            if not fin or size > 125:
                break
            answers = opcode == 9
        else:
            if (opcode == 0) != is_message:
                break
            if opcode:
                text_parts = b"" if opcode == 1 else None
            is_message = not fin
            if text_parts is not None:
                text_parts += payload
            answers = fin
        found.append((data[:stop], answers))
        data = data[stop:]
        if answers and opcode < 9 and text_parts is not None:
            try:
                text_parts.decode()
            except UnicodeDecodeError:
                return found  # what follows it is not compared: the plain server may see it first
    return [*found, (data, False)] if data else found


async def outcome(peer: Peer) -> list[tuple[int, bytes]]:
    """What a server sends up to the end: messages and pongs as they are, of a close its code."""
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        frames = await peer.frames()
        return [(f.opcode, f.payload[:2] if f.opcode == 8 else f.payload) for f in frames]
    return [(-1, b"the stream ended inside a frame")]


async def feed_plain(port: int, pieces: list[tuple[bytes, bool]]) -> list[tuple[int, bytes]]:
    async with raw(port, "/") as peer:
        got: list[tuple[int, bytes]] = []
        for data, answers in pieces:
            await peer.send(data)
            if answers and not await peer.at_end():
                received = await peer.frame()
                if received.opcode == 8:
                    got.append((8, received.payload[:2]))
                    break
                got.append(tuple(received))
        with contextlib.suppress(OSError):
            peer.writer.write_eof()
        return got + await outcome(peer)


async def feed_karna(port: int, data: bytes, sizes: list[int]) -> list[tuple[int, bytes]]:
    async with raw(port) as peer:
        pieces, start = [], 0
        for size in itertools.cycle(sizes):
            if start >= len(data):
                break
            pieces.append(data[start : start + size])
            start += size
        with contextlib.suppress(ConnectionError):
            await feed(peer, pieces)
            peer.writer.write_eof()
        return await outcome(peer)


async def plain_echo(websocket: Any) -> None:
    with contextlib.suppress(ConnectionClosed):
        async for message in websocket:
            await websocket.send(message)


def test_any_bytes_have_the_same_outcome_as_at_a_plain_server(
    caplog: pytest.LogCaptureFixture,
) -> None:
    needs("hypothesis")
    import hypothesis

    st = hypothesis.strategies
    caplog.set_level(logging.CRITICAL)

    small = st.binary(max_size=130) | st.text(max_size=40).map(str.encode)
    payload = st.one_of(
        small, small, st.integers(LIMIT - 2, LIMIT + 2).map(lambda size: b"x" * size),
        st.integers(120, 400).map(lambda size: b"y" * size),
    )  # fmt: skip
    masks = st.sampled_from([b"\0\0\0\0", b"\1\2\3\4", b"\xff\xff\xff\xff", b"\x81\x81\0\x88"])
    forms = st.sampled_from([None, None, None, 8])
    text = st.builds(
        lambda value, mask: frame(1, value.encode(), mask=mask), st.text(max_size=60), masks
    )
    message = st.builds(
        lambda opcode, value, mask, form: frame(opcode, value, mask=mask, length_bytes=form),
        st.sampled_from([1, 2, 2]), payload, masks, forms,
    )  # fmt: skip
    control = st.builds(
        lambda opcode, value: frame(opcode, value),
        st.sampled_from([9, 10]),
        st.binary(max_size=125),
    )
    fragmented = st.builds(
        lambda opcode, parts, between: b"".join(
            frame(opcode if n == 0 else 0, part, fin=n == len(parts) - 1)
            + (between if n < len(parts) - 1 else b"")
            for n, part in enumerate(parts)
        ),
        st.sampled_from([1, 2]), st.lists(payload, min_size=2, max_size=4), control | st.just(b""),
    )  # fmt: skip
    any_frame = st.builds(
        lambda opcode, value, fin, rsv, masked, form: frame(
            opcode, value, fin=fin, rsv=rsv, is_masked=masked, length_bytes=form
        ),
        st.integers(0, 15), st.binary(max_size=130), st.booleans(),
        st.sampled_from([0, 0, 0, 1, 2, 4]), st.sampled_from([True, True, True, False]),
        st.sampled_from([None, 2, 8]).map(lambda form: form),
    )  # fmt: skip
    close = st.builds(
        close_frame, st.sampled_from([999, 1000, 1001, 1005, 1006, 1011, 2999, 3000, 4999, 5000]),
        st.binary(max_size=20) | st.text(max_size=20).map(str.encode),
    ) | st.just(frame(8, b"")) | st.just(frame(8, b"x"))  # fmt: skip
    ends = st.one_of(close, any_frame, st.binary(max_size=40), st.just(b""))
    streams = st.builds(
        lambda parts, end, cut: (b"".join(parts) + end)[: -cut or None],
        st.lists(st.one_of(text, text, message, fragmented, control), max_size=6), ends,
        st.sampled_from([0, 0, 0, 0, 1, 3, 9]),
    )  # fmt: skip
    chunkings = st.lists(
        st.sampled_from([1, 2, 3, 5, 7, 14, 60, 131, 5000, 5000]), min_size=1, max_size=6
    )

    with asyncio.Runner() as runner:
        karna = served(EchoManager(), max_message_bytes=LIMIT)
        server = runner.run(karna.__aenter__())
        plain = runner.run(start_plain())
        plain_port = plain.sockets[0].getsockname()[1]
        counts: dict[Any, int] = {}

        @hypothesis.settings(max_examples=300, deadline=None, database=None)
        @hypothesis.given(streams, chunkings)
        def compare(stream: bytes, sizes: list[int]) -> None:
            pieces = split_frames(stream)
            data = b"".join(piece for piece, _ in pieces)
            expected = runner.run(feed_plain(plain_port, pieces))
            assert runner.run(feed_karna(server.port, data, sizes)) == expected
            end = expected[-1] if expected and expected[-1][0] == 8 else None
            counts[end] = counts.get(end, 0) + 1

        compare()
        assert {None, (8, b"\x03\xea"), (8, b"\x03\xef"), (8, b"\x03\xf1"), (8, b"")} <= set(counts)
        runner.run(karna.__aexit__(None, None, None))
        plain.close()
        runner.run(plain.wait_closed())


async def start_plain() -> Any:
    return await plain_serve(
        plain_echo, "127.0.0.1", 0, max_size=LIMIT, compression=None, ping_interval=None
    )
