"""One socket: bytes to messages and back, back-pressure, heartbeat, close.

A Connection owns its socket's bytes. Its first door is an HTTP exchange, which takes them as they
are; an upgrade swaps the door, and from then on they are WebSocket frames. Whole, final, masked
data frames take the fast lane: they are unmasked and handled on the spot, and the answers of one
read leave in one write. Every other frame goes, whole, to the websockets library, which knows the
rest of RFC 6455.

The library's own machinery (a task, a queue and two futures per client) is bypassed. The names of
its that we rely on without a promise are used in this room only, and `frames.apply_mask`:

    ServerProtocol.receive_data, receive_eof, events_received, data_to_send, send_close, fail,
    state, reader.eof, eof_sent, current_size       Frame.opcode, .data, .fin

A transport keeps what a socket does not take, and closes it: ours where there is epoll, and then
one reader reads all sockets and a write goes straight to the socket while nothing waits before it;
asyncio's for TLS, and elsewhere.

Touches the hub it belongs to and the door it has; used by the doors and by the server.
"""

from __future__ import annotations

import asyncio
import sys
from time import perf_counter
from typing import Any, cast

from websockets.frames import BINARY, CONT, TEXT, CloseCode, Frame
from websockets.protocol import State
from websockets.server import ServerProtocol

from karna.door import (
    HOLD_CLOSED,
    HOLD_LEAVING,
    HOLD_TURN,
    HOLD_WRITES,
    NEVER,
    Door,
    Phase,
)
from karna.errors import FAULTS
from karna.frames import SHORT_TEXT_HEADS, apply_mask, frame_text
from karna.hub import Hub
from karna.log import library_log
from karna.reader import FLUSH_BYTES
from karna.sender import Sender
from karna.trace import closed, opened
from karna.transport import SocketTransport

MAX_FRAGMENTS = 4096  # in one message, as the websockets library: tiny fragments cost much memory
MAX_LEAVING = 4  # disconnect handlers of one connection at a time
MAX_MESSAGES = 32  # of one connection handled in a turn; then it waits behind the others...
SHARE_S = 0.001  # ...as it does after this long
LATE_BYTES = 2048  # of what still arrives while we close are read in a turn: 340 pings
LINGER_S = 2.0  # for a peer to read an HTTP answer before its socket is cut, and...
SLOWEST_READER_BYTES_S = 16 * 1024  # ...more for a long one: a poor mobile link still gets it

_USUAL_CLOSES = (b"", b"\x03\xe8", b"\x03\xe9")  # without a code, 1000, 1001
_NO_DOOR = Door()
_OPEN = Phase.OPEN  # a global: looking a member up in its Enum costs as much as a frame's header


class Connection(Sender):
    """One socket, from its first byte to its close."""

    # Slots for our own attributes: past 30 keys CPython stops sharing instance dicts (1.4 KiB).
    __slots__ = (
        "_is_deaf", "_need", "_parts", "_parts_are_text", "_protocol", "_tail", "calls",
        "deadline", "door", "heard", "leaving", "next_ping", "pinged_at", "waiting",
        "waiting_bytes",
    )  # fmt: skip

    def __init__(self, hub: Hub) -> None:
        super().__init__(hub)
        self._protocol: ServerProtocol | None = None
        self._is_deaf = True  # nothing that arrives once we are closing counts
        self.deadline = self.loop.time() + hub.config.open_timeout_s
        self.heard = True
        self.next_ping = NEVER
        self.pinged_at: float | None = None
        self.calls: Any = None  # what its clients have running and waiting, while there is any
        self.leaving = 0  # its disconnect handlers that run
        # Requests, of all namespaces, that wait for a command to end; and answers, in a batch.
        self.waiting = 0
        self.waiting_bytes = 0
        self._tail: bytearray | None = None  # what arrived of the next frame or request
        self._need = 0  # bytes that `_tail` must have before another look at it is worth while
        self._parts: list[bytes] | None = None  # of a fragmented message
        self._parts_are_text = False
        self.door: Door = hub.first_door(self)

    @property
    def is_dispensable(self) -> bool:
        """May it give way to a newcomer, if it has not been let in?"""
        return self.phase is not Phase.HTTP or (self.door.is_idle and not self._queue)

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        if type(transport) is SocketTransport:
            self.fd = transport.fd
        self.hub.adopt(self)
        if self.fd >= 0:
            self.transport.resume_reading()
        if self.hub.traces:
            opened(self)

    def data_received(self, data: bytes) -> None:
        self.hub.bytes_in += len(data)
        self.take(data)
        self.flush()

    def eof_received(self) -> bool:
        """Nothing more arrives; true: an answer is still to come, the transport stays open."""
        if self.phase is Phase.HTTP:
            return self.door.take_end()
        self._begin_closing()
        if not self._is_deaf:
            self.protocol.receive_eof()
            self._send_library_data()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.fd = -1  # it may soon be another's
        if self.phase in (Phase.HTTP, Phase.OPEN):
            self.door.end()
        self.phase = Phase.CLOSED
        self.deadline = NEVER
        self._holds = HOLD_CLOSED
        self._tail = self._parts = None
        self.door = _NO_DOOR  # or all of it would stay until the collector comes
        self.hub.release(self)
        if self.hub.traces:
            closed(self)
        self._wake_writers()

    def pause_writing(self) -> None:
        self.hold(HOLD_WRITES)

    def resume_writing(self) -> None:
        self.allowance = 0
        self.heard = True  # who takes what we write lives, even if we can't listen meanwhile
        self.release(HOLD_WRITES)
        self._wake_writers()

    # Bytes to frames, frames to messages.

    def take_end(self) -> None:
        """The peer sends no more: what asyncio does then."""
        cast(SocketTransport, self.transport).end_reading()
        if not self.eof_received():
            self.transport.close()

    def keep(self, data: bytes, need: int = 0) -> None:
        """Keep what has arrived of something until it has `need` bytes."""
        if data:
            self._tail = bytearray(data)
            self._need = need

    def take(self, data: bytes) -> None:
        """Handle whole frames in `data`, keep the rest; the answers are queued."""
        self.heard = True
        if self._tail is not None or self.phase is not _OPEN:
            return self._take_other(data)
        self.is_queueing = True
        receive, answers, heads = self.door.receive, self._queue, SHORT_TEXT_HEADS
        limit, has_parts = self.hub.max_message_bytes, self._parts is not None
        position, end, need, messages, others, until = 0, len(data), 0, 0, 0, 0.0
        while not self._holds:
            if end - position < 2:
                need = 2
                break
            first, second = data[position], data[position + 1]
            if 128 <= second < 254:  # the mask bit, and a length of up to 125
                body = position + 6
                stop = body + second - 128
            elif second < 128:  # not masked
                return self._fail_slowly(data[position:])
            else:
                size_bytes = 2 if second == 254 else 8
                if end - position < 2 + size_bytes:
                    need = 2 + size_bytes
                    break
                body = position + 6 + size_bytes
                stop = body + int.from_bytes(data[position + 2 : position + 2 + size_bytes], "big")
            if (first == 0x81 or first == 0x82) and stop - body <= limit and not has_parts:
                if stop > end:
                    need = stop - position
                    break
                if messages & 7 == 0 and messages:
                    until = until or perf_counter() + SHARE_S
                    if messages == MAX_MESSAGES or perf_counter() > until:
                        self.wait_for_turn()
                        break
                payload = apply_mask(data[body:stop], data[body - 4 : body])
                position = stop
                messages += 1
                try:
                    answer = receive(payload, first == 0x81)
                except FAULTS as exc:
                    self._receive_failed(payload, first == 0x81, exc)
                else:
                    if answer is None:
                        continue
                    size = len(answer)
                    if size < 126:
                        answers.append(heads[size] + answer)
                    elif size <= FLUSH_BYTES:
                        answers.append(frame_text(answer))
                    else:
                        self._send_long(answer)
            else:
                if self._is_doomed(first, stop - body):
                    return self._fail_slowly(data[position:])
                if stop > end:
                    need = stop - position
                    break
                others += 1
                if others & 7 == 0:  # the library takes 10 microseconds for a ping
                    until = until or perf_counter() + SHARE_S
                    if perf_counter() > until:
                        self.wait_for_turn()
                        break
                self._take_rare(data[position:stop])
                position, has_parts = stop, self._parts is not None
        self.hub.messages_in += messages
        if self.phase is not _OPEN:
            self._read_late(data[position:])
        elif position < end:
            self._tail = bytearray(memoryview(data)[position:])
            self._need = sys.maxsize if self._holds else need

    def _take_other(self, data: bytes) -> None:
        """Take what is not simply the next frames of an open WebSocket."""
        if self.phase is Phase.CLOSING:
            return self._read_late(data)
        if self._tail is not None:
            self._tail += data
            if len(self._tail) < self._need:
                return
            data, self._tail = bytes(self._tail), None
        if self.phase is _OPEN:
            self.take(data)
        elif self.phase is Phase.HTTP and not self._holds & HOLD_CLOSED:
            self.is_queueing = True
            self.door.take(data)

    def wait_for_turn(self) -> None:
        """Others first: however much one client sends at once, it gets its share of the loop."""
        self.hold(HOLD_TURN)
        self.hub.turns.wait(self._have_turn)

    def _have_turn(self) -> None:
        if self._holds & HOLD_TURN and self.phase in (Phase.OPEN, Phase.HTTP):
            self._holds &= ~HOLD_TURN
            if not self._holds:
                self._resume_reading()
                self._need = 0
                self.read_kept()

    def _send_long(self, answer: bytes) -> None:
        """Of long answers not all that a read asks for may wait."""
        self.allow(len(answer))
        self.send_frame(frame_text(answer))

    def _is_doomed(self, first: int, size: int) -> bool:
        """Will the library fail the connection for this frame, whatever its payload?"""
        opcode = first & 0x0F
        if opcode >= 8:
            return first & 0xF0 != 0x80 or opcode > 10 or size > 125
        limit = self.hub.config.max_message_bytes - (self.protocol.current_size or 0)
        return first & 0x70 != 0 or opcode > 2 or size > limit

    def _fail_slowly(self, data: bytes) -> None:
        """Let the library see a frame that it will refuse, byte by byte as it arrives."""
        self._begin_closing()
        self._read_late(data)

    @property
    def protocol(self) -> ServerProtocol:
        """The library's side of an open WebSocket; from the first frame on that it has to see."""
        if self._protocol is None:
            limit = self.hub.config.max_message_bytes
            self._protocol = ServerProtocol(state=State.OPEN, max_size=limit, logger=library_log)
        return self._protocol

    def _read_late(self, data: bytes) -> None:
        """What arrives once we are closing: only the library's close handshake matters.

        Some of it in each turn, for it may be as many frames as before.
        """
        if self._tail is not None:
            self._tail += data
        elif data and not self._is_deaf and not self.protocol.reader.eof:
            self.protocol.receive_data(data[:LATE_BYTES])
            self.protocol.events_received()
            self._send_library_data()
            if len(data) > LATE_BYTES:
                self.keep(data[LATE_BYTES:])
                self._pause_reading()
                self.hub.turns.wait(self._have_late_turn)

    def _have_late_turn(self) -> None:
        tail, self._tail = self._tail, None
        if tail is not None:  # else it was cut meanwhile
            self._resume_reading()
            self._read_late(bytes(tail))

    def _take_rare(self, frame: bytes) -> None:
        """Take a control frame or a fragment."""
        if frame[0] == 0x88 and frame[1] < 254 and self._parts is None:
            payload = apply_mask(frame[6:], frame[2:6])
            if payload in _USUAL_CLOSES:
                return self._echo_close(payload)
        self.protocol.receive_data(frame)
        for event in self.protocol.events_received():
            if isinstance(event, Frame) and event.opcode in (TEXT, BINARY, CONT):
                self._assemble(event)
        self._send_library_data()

    def _echo_close(self, payload: bytes) -> None:
        """The peer closes (RFC 6455, 5.5.1)."""
        self.flush()
        self.write(b"\x88%c%b" % (len(payload), payload))
        self._is_deaf = True
        self._begin_closing()
        self._half_close()

    def _assemble(self, frame: Frame) -> None:
        """Collect the fragments of a message; handle it when it is whole."""
        if self._parts is None:
            self._parts = []
            self._parts_are_text = frame.opcode is TEXT
        if len(self._parts) >= MAX_FRAGMENTS:
            return self._fail(CloseCode.MESSAGE_TOO_BIG, "too many fragments")
        self._parts.append(bytes(frame.data))
        if not frame.fin:
            return
        payload, self._parts = b"".join(self._parts), None
        self.hub.messages_in += 1
        try:
            answer = self.door.receive(payload, self._parts_are_text)
        except FAULTS as exc:
            self._receive_failed(payload, self._parts_are_text, exc)
        else:
            if answer is not None:
                self.send_frame(frame_text(answer))

    def _receive_failed(self, payload: bytes, is_text: bool, exc: BaseException) -> None:
        """Text that is not UTF-8 ends the connection (RFC 6455, 8.1); a bug of ours does not."""
        try:
            if is_text:
                payload.decode()
        except UnicodeDecodeError as bad:
            self._fail(CloseCode.INVALID_DATA, f"{bad.reason} at position {bad.start}")
        else:
            self.hub.log_error(f"{self.name} message failed", exc)
            answer = self.door.failed()
            if answer is not None:
                self.send_frame(frame_text(answer))

    def _fail(self, code: CloseCode, reason: str) -> None:
        if self.protocol.state is State.OPEN:
            self.protocol.fail(code, reason)
        self._send_library_data()

    def abort(self) -> None:
        """Cut the connection; nothing that has arrived is read any more."""
        self._holds |= HOLD_CLOSED
        self.transport.abort()

    def _send_library_data(self) -> None:
        """Write what the library has to say, behind our own answers; follow it into closing."""
        pieces = self.protocol.data_to_send()
        if self.protocol.state is State.OPEN:
            if pieces:  # pongs, which keep their place among the answers
                self.send_frame(b"".join(pieces))
            return
        self.flush()
        # Behind a close frame come pongs alone; who does not read them gets no more.
        if pieces and (self.phase is _OPEN or not self.is_behind):
            self.write(b"".join(pieces))
        self._begin_closing()
        if self.protocol.eof_sent and pieces and not pieces[-1]:
            self._half_close()

    def _half_close(self) -> None:
        """Say that nothing more comes; the peer's own end closes the socket, or the deadline."""
        try:
            if self.transport.can_write_eof():
                self.transport.write_eof()
            else:  # TLS
                self.transport.close()
        except (OSError, RuntimeError):
            self.abort()  # the peer is gone already

    # Back-pressure.

    def hold(self, reason: int) -> None:
        """Stop reading this client, for one of the HOLD_ reasons."""
        if not self._holds:
            self._pause_reading()
        self._holds |= reason

    def release(self, reason: int) -> None:
        """Undo `hold`; reading goes on when no reason is left."""
        if not self._holds & reason:
            return
        self._holds &= ~reason
        if not self._holds and not self.transport.is_closing():
            self._resume_reading()
            self._need = 0
            # Not now: the caller may be in the middle of handling another message.
            self.hub.turns.wait(self.read_kept)

    def is_held(self, reason: int) -> bool:
        """Is it not read, for this reason?"""
        return bool(self._holds & reason)

    def count_leaving(self, count: int) -> None:
        """Disconnect handlers begin or end: who joins and leaves in turn waits for them."""
        self.leaving += count
        if self.leaving > MAX_LEAVING:
            self.hold(HOLD_LEAVING)
        else:
            self.release(HOLD_LEAVING)

    def _pause_reading(self) -> None:
        if not self.transport.is_closing():
            self.transport.pause_reading()

    def _resume_reading(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()

    @property
    def has_kept(self) -> bool:
        """Has something arrived that is not whole yet?"""
        return self._tail is not None

    def read_kept(self) -> None:
        """Handle what was kept while the client was held."""
        if self._tail is not None and not self._holds and self.phase in (Phase.OPEN, Phase.HTTP):
            try:
                self.take(b"")
                self.hub.outbox.add(self)
            except FAULTS as exc:
                self.hub.log_error(f"{self.name} failed", exc)
                self.abort()

    # Heartbeat and closing.

    def upgrade(self, handshake: bytes, door: Door, ping_interval_s: float) -> None:
        """Answer the handshake: from here on `door` gets the messages."""
        self._is_deaf = False
        self.door = door
        self.phase = _OPEN
        self._queue.append(handshake)
        self.is_queueing = True  # what follows it leaves in the same write
        self.next_ping = self.deadline = self.loop.time() + ping_interval_s

    def on_deadline(self, now: float) -> None:
        """Called by the hub's sweep when `deadline` has passed."""
        if self.phase in (Phase.HTTP, Phase.OPEN):
            self.door.on_deadline(now)
        else:
            self.abort()

    def heartbeat(self, now: float, interval_s: float, frame: bytes) -> None:
        """Ping when it is time, drop the peer when the last ping met only silence."""
        timeout_s = self.hub.config.ping_timeout_s
        if self.heard or self._holds & ~HOLD_WRITES:  # while we don't read it, we can't hear it
            self.pinged_at = None
        if self.pinged_at is not None and now >= self.pinged_at + timeout_s:
            self.hub.drop(self.who, "silent")
            self.close(CloseCode.INTERNAL_ERROR, "keepalive ping timeout")
            return self.abort()
        if now >= self.next_ping:
            self.next_ping = now + interval_s
            self.heard = False
            if self.pinged_at is None:
                self.pinged_at = now
            self.send_frame(frame)
        silence = NEVER if self.pinged_at is None else self.pinged_at + timeout_s
        self.deadline = min(self.next_ping, silence)

    def close(self, code: int, reason: str = "") -> None:
        """Start the closing handshake; the socket is cut if the peer does not answer in time."""
        if self.phase is _OPEN and self.protocol.state is State.OPEN:
            # 125 bytes hold the code and a reason of 123 (RFC 6455, 5.5).
            self.protocol.send_close(code, reason.encode()[:123].decode(errors="ignore"))
            self._send_library_data()

    def close_http(self, answer_bytes: int, *, has_ended: bool) -> None:
        """The last answer is sent: close once the peer, if it has not, had time to read it."""
        self.flush()
        self.phase = Phase.CLOSING
        linger_s = LINGER_S + answer_bytes / SLOWEST_READER_BYTES_S
        self.deadline = self.loop.time() + linger_s
        self.transport.close() if has_ended else self._half_close()

    def _begin_closing(self) -> None:
        if self.phase is not _OPEN:
            return
        self.flush()
        self.phase = Phase.CLOSING  # first: nothing that leaving causes may follow the close
        self.hub.unseat(self)
        self.door.end()
        self.deadline = self.loop.time() + self.hub.config.close_timeout_s
        if self._holds:
            self._resume_reading()  # for the peer's own close frame
        self._holds |= HOLD_CLOSED
        tail, self._tail = self._tail, None
        if tail:
            self._read_late(bytes(tail))
