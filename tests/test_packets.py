"""Socket.IO packets: one table both ways, cut anywhere, and what is none."""

from __future__ import annotations

import contextlib
from typing import Any

import orjson
import pytest

from karna.errors import BadPacket
from karna.packets import (
    Packet,
    PacketType,
    decode_packet,
    encode_packet,
    insert_attachments,
)
from support_property import JSON, PROPERTY, given, settings, st


T = PacketType


PACKETS: list[tuple[bytes, list[bytes], Packet]] = [
    # text, attachments, packet
    (b"0", [], Packet(T.CONNECT)),
    (b"0/ws,", [], Packet(T.CONNECT, "/ws")),
    (b'0/ws,{"token":"abc"}', [], Packet(T.CONNECT, "/ws", {"token": "abc"})),
    (b'0{"sid":"x"}', [], Packet(T.CONNECT, "/", {"sid": "x"})),
    ("0/grüße,{}".encode(), [], Packet(T.CONNECT, "/grüße", {})),
    (b"1", [], Packet(T.DISCONNECT)),
    (b"1/ws,", [], Packet(T.DISCONNECT, "/ws")),
    (b'2["rpc"]', [], Packet(T.EVENT, "/", ["rpc"])),
    (b'2["a","b"]', [], Packet(T.EVENT, "/", ["a", "b"])),
    (b"2[1,null]", [], Packet(T.EVENT, "/", [1, None])),
    (b'2/ws,["rpc",{"method":"x"}]', [], Packet(T.EVENT, "/ws", ["rpc", {"method": "x"}])),
    (b'20["a"]', [], Packet(T.EVENT, "/", ["a"], 0)),
    (b'2/ws/,12["a"]', [], Packet(T.EVENT, "/ws/", ["a"], 12)),
    (b'2999999999999999["a"]', [], Packet(T.EVENT, "/", ["a"], 999999999999999)),
    (b"30[]", [], Packet(T.ACK, "/", [], 0)),
    (b'3/ws,7["ok",{"a":[1]}]', [], Packet(T.ACK, "/ws", ["ok", {"a": [1]}], 7)),
    (b'4{"message":"no"}', [], Packet(T.CONNECT_ERROR, "/", {"message": "no"})),
    (b'4/ws,{"message":"no"}', [], Packet(T.CONNECT_ERROR, "/ws", {"message": "no"})),
    (
        b'51-["a",{"_placeholder":true,"num":0}]', [b"\x00\xff"],
        Packet(T.BINARY_EVENT, "/", ["a", b"\x00\xff"], None, 1),
    ),
    (
        b'52-/ws,3["a",{"x":{"_placeholder":true,"num":0}},[{"_placeholder":true,"num":1}]]',
        [b"", b"two"],
        Packet(T.BINARY_EVENT, "/ws", ["a", {"x": b""}, [b"two"]], 3, 2),
    ),
    (
        b'61-/ws,4[{"_placeholder":true,"num":0}]', [b"x"],
        Packet(T.BINARY_ACK, "/ws", [b"x"], 4, 1),
    ),
]  # fmt: skip


PACKET_IDS = [text.decode() for text, _, _ in PACKETS]


def decode_whole(text: bytes, attachments: list[bytes]) -> Packet:
    packet = decode_packet(text)
    assert packet.attachments == len(attachments)
    if attachments:
        packet = packet._replace(data=insert_attachments(packet.data, attachments))
    return packet


@pytest.mark.parametrize(("text", "attachments", "packet"), PACKETS, ids=PACKET_IDS)
def test_packet_is_decoded_and_encoded(
    text: bytes, attachments: list[bytes], packet: Packet
) -> None:
    assert decode_whole(text, attachments) == packet
    assert encode_packet(packet) == [text, *attachments]


@pytest.mark.parametrize("text", [text for text, _, _ in PACKETS], ids=PACKET_IDS)
def test_packet_cut_anywhere_is_another_packet_or_bad(text: bytes) -> None:
    for stop in range(len(text)):
        for piece in (text[:stop], text[stop:]):
            with contextlib.suppress(BadPacket):
                assert isinstance(decode_packet(piece), Packet)
    if text.endswith((b"]", b"}")):  # a payload cut short is never taken for a whole one
        start = min(text.find(mark) for mark in (b"[", b"{") if mark in text)
        for stop in range(start + 1, len(text)):
            with pytest.raises(BadPacket):
                decode_packet(text[:stop])


@pytest.mark.parametrize(
    "text",
    [
        b"", b"7", b"9[]", b"x", b" 2", b"\xff", b"-1",
        b"0[]", b'0"x"', b"0{", b'0/ws,["a"]', b'0/ws{"a":1}' + b"/" * 300,
        b"0/\xff\xfe,", b"0/" + b"n" * 300 + b",", b"0/" + b"n" * 300,
        b"1{}", b'1["a"]', b"1/ws,[]",
        b"2", b"2{}", b'2"a"', b"2[]", b"2[null]", b"2[1.5]", b"2[true]", b"2[{}]", b"2[[]]",
        b'2["a"', b'2["a"]x', b'2["\xff"]', b'2["\\ud800"]', b"2[1e999]", b"2" + b"[" * 5000,
        b'2["connect"]', b'2["connect_error"]', b'2["disconnect"]', b'2["disconnecting"]',
        b'2["newListener"]', b'2["removeListener"]',
        b'2-1["a"]', b'2+1["a"]', b'21.5["a"]', b'2x["a"]', b'2 1["a"]',
        b'2' + b"1" * 16 + b'["a"]', b"2" + b"9" * 100_000 + b'["a"]',
        b"3[]", b"3", b"30", b"30{}", b"3/ws,[]",
        b"4", b"4[]", b'4"no"',
        b'5["a"]', b'5-["a"]', b'511-["a"]', b"5" + b"9" * 100_000 + b'-["a"]', b'51-["connect"]',
        b"61-[]", b"6[]", b'5-1["a"]', b'51-{"_placeholder":true,"num":0}',
        b'21-["a"]', b'31-0["a"]', b"01-", b"11-",
    ],
    ids=lambda text: repr(text[:24]),
)  # fmt: skip
def test_packet_that_breaks_the_protocol_is_bad(text: bytes) -> None:
    with pytest.raises(BadPacket):
        decode_packet(text)


def test_packet_bounds_are_exact() -> None:
    assert decode_packet(b'510-["a"]').attachments == 10
    assert decode_packet(b'50-["a"]').attachments == 0
    assert decode_packet(b"2" + b"1" * 15 + b'["a"]').ack == 111111111111111
    longest = b"/" + b"n" * (255 - 2)
    assert decode_packet(b"0" + longest + b",").namespace == longest.decode()
    deep = b'2["a",' + b"[" * 1000 + b"]" * 1000 + b"]"
    assert decode_packet(deep).type is T.EVENT


@pytest.mark.parametrize(
    "value",
    [
        [{"_placeholder": True, "num": 1}], [{"_placeholder": True, "num": -1}],
        [{"_placeholder": True, "num": True}], [{"_placeholder": True, "num": 0.0}],
        [{"_placeholder": True, "num": "0"}], [{"_placeholder": True}],
        {"a": [{"_placeholder": True, "num": 2**63}]},
    ],
    ids=str,
)  # fmt: skip
def test_placeholder_without_its_attachment_is_bad(value: Any) -> None:
    with pytest.raises(BadPacket):
        insert_attachments(value, [b"one"])


def test_attachments_in_deep_values_are_bounded() -> None:
    deep: Any = b"x"
    for _ in range(100 + 1):
        deep = [deep]
    with pytest.raises(ValueError, match="deep"):
        encode_packet(Packet(T.EVENT, "/", ["a", deep]))
    with pytest.raises(BadPacket):
        insert_attachments([orjson.loads(b"[" * 500 + b"]" * 500)], [b"x"])


@pytest.mark.parametrize("many", ["[]", "{}", "0"])
def test_payload_with_attachments_has_a_bounded_number_of_values(many: str) -> None:
    """We look at each of them: 1 MiB of empty lists stopped everybody for 150 ms."""
    value = orjson.loads(f"[{many}" + f",{many}" * 30_000 + "]")
    with pytest.raises(BadPacket, match="values"):
        insert_attachments(value, [b"x"])
    assert insert_attachments([value[:5_000]], [b"x"]) == [value[:5_000]]


def test_only_true_makes_a_placeholder() -> None:
    value = [{"_placeholder": 1, "num": 0}, {"_placeholder": False}, {"num": 0}]
    assert insert_attachments(value, [b"x"]) == value


@pytest.mark.parametrize("data", [["a", {1, 2}], ["a", object()], ["a", "\ud800"], ["a", 2**64]])
def test_packet_that_json_cannot_hold_is_refused(data: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        encode_packet(Packet(T.EVENT, "/", data))


def test_packet_takes_any_kind_of_bytes_and_odd_keys() -> None:
    packet = Packet(T.EVENT, "/", ["a", bytearray(b"1"), memoryview(b"2"), {5: (1,)}])
    text, *attachments = encode_packet(packet)
    assert text.endswith(b',{"5":[1]}]')
    assert attachments == [b"1", b"2"]


def test_binary_packet_without_bytes_is_encoded_as_a_plain_one() -> None:
    assert encode_packet(decode_packet(b'50-["a"]')) == [b'2["a"]']
    assert encode_packet(decode_packet(b"60-3[]")) == [b"33[]"]


def assert_stable(text: bytes) -> None:
    """Whatever can be decoded can be encoded, and means the same once more decoded."""
    try:
        packet = decode_packet(text)
    except BadPacket:
        return
    try:
        again, *attachments = encode_packet(packet)
    except (TypeError, ValueError):  # too deep for orjson to write
        assert text.count(b"[") + text.count(b"{") > 90
        return
    assert not attachments
    plain = {T.BINARY_EVENT: T.EVENT, T.BINARY_ACK: T.ACK}.get(packet.type, packet.type)
    assert decode_packet(again) == packet._replace(type=plain, attachments=0)
    assert encode_packet(decode_packet(again)) == [again]


@PROPERTY
@given(st.one_of(st.binary(max_size=64), st.text('0123456789-/,[]{}"a:trueonl ').map(str.encode)))
def test_decoder_never_raises_anything_but_bad_packet_for_random_bytes(text: bytes) -> None:
    assert_stable(text)


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    """A valid packet with a few bytes changed, put in, taken out or said twice."""
    text = bytearray(draw(st.sampled_from(PACKETS))[0])
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        piece = draw(st.one_of(st.binary(max_size=3), st.sampled_from([b"[", b'"', b",", b"/"])))
        end = min(len(text), at + draw(st.integers(0, 4)))
        text[at:end] = piece * draw(st.sampled_from([1, 1, 1, 2, 50]))
    return bytes(text)


@settings(PROPERTY, max_examples=300)
@given(mutations())
def test_decoder_never_raises_anything_but_bad_packet_for_mutations(text: bytes) -> None:
    assert_stable(text)


@PROPERTY
@given(
    st.sampled_from([T.EVENT, T.ACK]),
    st.sampled_from(["/", "/ws", "/a/b?c"]),
    st.integers(0, 10**15 - 1),
    st.lists(st.recursive(JSON | st.binary(max_size=8), lambda inner: st.lists(inner, max_size=3)),
             max_size=4),
)  # fmt: skip
def test_packet_survives_encoding_and_decoding(
    kind: PacketType, namespace: str, ack: int, values: list[Any]
) -> None:
    packet = Packet(kind, namespace, ["event", *values], ack)
    try:
        text, *attachments = encode_packet(packet)
    except ValueError as error:
        assert "10 attachments at most" in str(error)
        return
    if b"_placeholder" in text.replace(b'{"_placeholder":true', b""):
        return
    assert decode_whole(text, attachments)[1:4] == packet[1:4]
