"""The engine interface of `dynwire._http2` over the h2 library: chosen with ``engine="h2"``.

It is the second opinion of the differential tests and a fallback; it is not made to be fast. Frames, states, windows and field
rules are h2's. Around them stands what h2 leaves to its user: queues behind the peer's windows, streams that are gone by the
time somebody replies on them, deadlines.

Where h2 is not followed:

* Bytes go into h2 frame by frame. Events of the frames before a bad one would otherwise be lost with the exception, and a
  frame longer than allowed would be buffered before it is refused.
* GOAWAY, in both directions, is handled here. h2 closes its state machine at the first one, which makes draining impossible.

Differences to `NativeEngine`, besides those of error scope that tests/http2 lists: the limits against abuse are h2's own
(HTTP2.md section 3: few), no 431 or 414 is sent, and data are copied always. h2 4.4.1 ends the connection when an informational
response arrives on a stream that was reset in the meantime.
"""

import collections

from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.math cimport INFINITY
from libc.stdint cimport int64_t, uint32_t, uint64_t

from ._bytes cimport dw_chunk, dw_ld24be, dw_ld32be, dw_ld64be, dw_st64be
from ._hpack cimport hpack_intern
from ._http2 cimport (
    CONNECTION_BACKLOG,
    K_INFORMATIONAL,
    K_REQUEST,
    K_RESPONSE,
    K_TRAILERS,
    ST_CLOSED,
    ST_HALF_LOCAL,
    ST_HALF_REMOTE,
    ST_IDLE,
    ST_OPEN,
    STREAM_BACKLOG,
    Http2Engine,
    Http2Stream,
)

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    DataReceived,
    InformationalResponseReceived,
    PingAckReceived,
    RemoteSettingsChanged,
    RequestReceived,
    ResponseReceived,
    SettingsAcknowledged,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)
from h2.exceptions import ProtocolError, StreamClosedError, TooManyStreamsError
from h2.settings import SettingCodes, Settings
from hyperframe.frame import GoAwayFrame

from ._http2 import Http2ConnectionError

cdef enum:
    INBOX = 65536                # bytes read at a time
    PREFACE_BYTES = 24
    HEADER_BYTES = 9
    FRAME_DATA = 0
    FRAME_GOAWAY = 7
    DATA_CUT = 16384             # DATA frames are not longer than this, so that streams take turns
    FRAME_AHEAD = 262144         # framed bytes from which data wait on their streams, where they take turns
    MAX_ID = 0x7FFFFFFF
    LAST_CLIENT_ID = 0x40000000  # a client opens no stream from here on

cdef enum:                       # Http2Stream.bits
    B_END = 1                    # END_STREAM is due when the queue is empty
    B_FULL = 2                   # room() said no
    B_GONE = 4                   # on_closed was called
    B_COUNTS = 8                 # towards `live`
    B_NO_BODY = 16               # (server) answer to HEAD, or a status without content
    B_ANSWERED = 32              # (server) the final status is sent

# SETTINGS_NO_RFC7540_PRIORITIES (RFC 9218 section 2.1); h2 has no name for it
cdef int _NO_PRIORITIES = 9


cdef class LibraryEngine(Http2Engine):
    """One connection, run by ``h2.connection.H2Connection``."""

    cdef object conn
    cdef object waiting              # ids with queued data, in the order of their turns
    cdef bytearray inbox             # between recv_target and received only
    cdef bytearray partial           # beginning of a frame
    cdef size_t preface_left
    cdef bytearray out               # framed, not gathered
    cdef bytes writing               # gathered
    cdef size_t written              # how much of it
    cdef dict announced              # the peer's settings
    cdef public uint32_t next_id     # client; tests set it near the end
    cdef uint32_t last_inbound       # highest stream of the peer that the owner was told about
    cdef uint32_t ignore_above       # server: after the final GOAWAY
    cdef bint flushing
    cdef int64_t unannounced         # connection: bytes consumed and not yet granted
    cdef uint64_t flow_received      # bytes of DATA frames
    cdef double preface_at, ack_at

    def __init__(self, owner, bint is_client, **limits):
        super().__init__(owner, is_client, **limits)
        config = H2Configuration(
            client_side=is_client,
            header_encoding=None,
            validate_inbound_headers=True,
            normalize_inbound_headers=False,  # joins cookie fields, and moves them
            # what the owner sends is its own business, as with NativeEngine
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
        )
        self.conn = H2Connection(config)
        initial = {
            SettingCodes.INITIAL_WINDOW_SIZE: self.stream_window,
            SettingCodes.MAX_FRAME_SIZE: self.max_frame_size,
            SettingCodes.MAX_HEADER_LIST_SIZE: self.max_header_list,
            _NO_PRIORITIES: 1,
        }
        if is_client:
            initial[SettingCodes.ENABLE_PUSH] = 0
        else:
            initial[SettingCodes.MAX_CONCURRENT_STREAMS] = self.max_concurrent_streams
        # as of now and not from the acknowledgement on: the peer cannot use more than it was told; but see start()
        self.conn.local_settings = Settings(client=is_client, initial_values=initial)
        self.conn.max_inbound_frame_size = self.max_frame_size
        self.conn.decoder.max_header_list_size = self.max_header_list
        self.streams = {}
        self.waiting = collections.deque()
        self.partial = bytearray()
        self.preface_left = 0 if is_client else PREFACE_BYTES
        self.out = bytearray()
        self.writing = b""
        self.announced = {}
        self.next_id = 1
        self.ignore_above = MAX_ID
        self.preface_at = INFINITY
        self.ack_at = INFINITY

    # ---- receiving -----------------------------------------------------------------------------------------------------

    cdef void recv_target(self, unsigned char **base, size_t *size):
        if self.inbox is None:
            self.inbox = bytearray(INBOX)
        base[0] = <unsigned char *>PyByteArray_AS_STRING(self.inbox)
        size[0] = INBOX

    cdef int received(self, size_t n, double now) except -1:
        cdef bytearray inbox = self.inbox
        cdef size_t at = 0, take
        cdef uint32_t length
        self.inbox = None
        self.now = now
        if n == 0 or self.dead:
            return 0
        self.rx_bytes += n
        self.last_rx = now
        if self.preface_left:
            at = min(n, self.preface_left)
            self.feed(bytes(inbox[:at]))
            self.preface_left -= at
        while at < n and not self.dead:
            if len(self.partial) < HEADER_BYTES:
                take = min(n - at, HEADER_BYTES - <size_t>len(self.partial))
                self.partial += inbox[at:at + take]
                at += take
                if len(self.partial) < HEADER_BYTES:
                    break
            length = dw_ld24be(<unsigned char *>PyByteArray_AS_STRING(self.partial))
            if length > self.max_frame_size:
                self.fail(ErrorCodes.FRAME_SIZE_ERROR, f"a frame of {length} bytes, {self.max_frame_size} are allowed")
            take = min(n - at, HEADER_BYTES + length - <size_t>len(self.partial))
            self.partial += inbox[at:at + take]
            at += take
            if <size_t>len(self.partial) == HEADER_BYTES + length:
                frame = bytes(self.partial)
                self.partial.clear()
                if frame[3] == FRAME_DATA:
                    self.flow_received += length
                self.feed_frame(frame)
        return self.pump()

    cdef int feed_frame(self, bytes frame) except -1:
        cdef const unsigned char *p = <const unsigned char *>PyBytes_AS_STRING(frame)
        # inside of a header block it is h2's to refuse
        if (p[3] == FRAME_GOAWAY and dw_ld32be(p + 5) & MAX_ID == 0 and dw_ld24be(p) >= 8
                and not self.conn.incoming_buffer._headers_buffer):
            return self.received_goaway(dw_ld32be(p + 9) & MAX_ID, dw_ld32be(p + 13), frame[17:])
        return self.feed(frame)

    cdef int feed(self, bytes data) except -1:
        try:
            events = self.conn.receive_data(data)
        except ProtocolError as error:
            self.collect()  # h2 has queued GOAWAY, except for a bad preface
            self.fail(None, str(error) or type(error).__name__, error)
        for event in events:
            self.dispatch(event)
        return self.collect()

    cdef int fail(self, code, str text, error=None) except -1:
        """End the connection. Without ``code`` h2 has raised ``error`` and has queued GOAWAY itself."""
        self.dead = True
        if code is None:
            code = error.error_code
        else:
            self.queue_goaway(self.last_inbound, code, b"")
        self.collect()
        raise Http2ConnectionError(int(code), text) from error

    cdef int dispatch(self, object event) except -1:
        cdef Http2Stream s
        cdef int64_t padding
        kind = type(event)
        if kind is DataReceived:
            s = self.streams.get(event.stream_id)
            if s is None:
                return self.consumed(None, event.flow_controlled_length)
            padding = event.flow_controlled_length - len(event.data)
            if padding:
                self.consumed(s, padding)
            return self.data_received(s, event.data, event.stream_ended is not None)
        if kind is RequestReceived:
            if event.stream_id > self.ignore_above:
                return 0
            s = Http2Stream.__new__(Http2Stream)
            s.id = event.stream_id
            s.state = ST_OPEN
            s.bits = B_COUNTS
            s.progress = self.now
            self.streams[s.id] = s
            self.live += 1
            self.last_inbound = s.id
            if (b":method", b"HEAD") in event.headers:
                s.bits |= B_NO_BODY
            return self.headers_received(s, event, K_REQUEST)
        if kind is ResponseReceived or kind is InformationalResponseReceived or kind is TrailersReceived:
            s = self.streams.get(event.stream_id)
            if s is None:
                return 0
            if kind is ResponseReceived:
                return self.headers_received(s, event, K_RESPONSE)
            return self.headers_received(s, event, K_TRAILERS if kind is TrailersReceived else K_INFORMATIONAL)
        if kind is StreamReset:
            s = self.streams.get(event.stream_id)
            if s is None:
                return 0
            self.drop_queue(s)
            self.owner.on_reset(s, int(event.error_code), event.remote_reset)
            return self.close(s)
        if kind is RemoteSettingsChanged:
            self.announced.update((int(key), change.new_value) for key, change in event.changed_settings.items())
            self.ready = True
            self.preface_at = INFINITY
            self.owner.on_settings()
            return self.capacity()
        if kind is SettingsAcknowledged:
            self.ack_at = INFINITY
            return self.owner.on_settings_ack()
        if kind is PingAckReceived:
            return self.owner.on_pong(dw_ld64be(<const unsigned char *>PyBytes_AS_STRING(bytes(event.ping_data))))
        if kind is WindowUpdated:
            return 0  # the queues get their turn when everything is read
        return 0

    cdef int headers_received(self, Http2Stream s, object event, int kind) except -1:
        cdef bint end = kind != K_INFORMATIONAL and event.stream_ended is not None
        # The owner tells known names by their identity, and hpack makes a new object of a name that came as a literal.
        headers = []
        for name, value in event.headers:
            name = bytes(name)
            headers.append((hpack_intern(<const unsigned char *>PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name)), bytes(value)))
        if end:
            self.remote_end(s)
        self.owner.on_headers(s, headers, kind, end)
        return self.close(s) if s.state == ST_CLOSED else 0

    cdef int data_received(self, Http2Stream s, bytes data, bint end) except -1:
        if not data and not end:
            return 0
        if end:
            self.remote_end(s)
        self.owner.on_data(s, <const unsigned char *>PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), end)
        return self.close(s) if s.state == ST_CLOSED else 0

    cdef int remote_end(self, Http2Stream s) except -1:
        s.state = ST_CLOSED if s.state == ST_HALF_LOCAL else ST_HALF_REMOTE
        return 0

    cdef int received_goaway(self, uint32_t last_id, uint32_t code, bytes debug) except -1:
        cdef Http2Stream s
        self.draining = True
        if self.is_client:
            for s in [stream for sid, stream in self.streams.items() if sid > last_id]:
                # h2 goes on to count them as open, which does not matter: no new stream is opened on this connection
                self.drop_queue(s)
                self.owner.on_reset(s, ErrorCodes.REFUSED_STREAM, True)
                self.close(s)
        return self.owner.on_goaway(last_id, code, debug)

    # ---- streams -------------------------------------------------------------------------------------------------------

    cdef int close(self, Http2Stream s) except -1:
        if s.bits & B_GONE:
            return 0
        s.state = ST_CLOSED
        s.bits |= B_GONE
        self.streams.pop(s.id, None)
        if self.is_client:
            self.uncount(s)
        self.owner.on_closed(s)
        return self.capacity() if self.is_client else 0

    cdef int uncount(self, Http2Stream s) except -1:
        if s.bits & B_COUNTS:
            s.bits &= ~B_COUNTS
            self.live -= 1
        return 0

    cdef uint32_t stream_limit(self):
        if not self.ready:
            return 100
        return min(self.announced.get(int(SettingCodes.MAX_CONCURRENT_STREAMS), MAX_ID), MAX_ID)

    cdef int capacity(self) except -1:
        if self.wants_capacity and not self.draining and not self.exhausted and self.live < self.stream_limit():
            self.wants_capacity = False
            self.owner.on_capacity()
        return 0

    cdef Http2Stream open_stream(self):
        cdef Http2Stream s
        if self.next_id >= LAST_CLIENT_ID:
            self.exhausted = True
        if self.dead or self.draining or self.exhausted or self.live >= self.stream_limit():
            self.wants_capacity = True
            return None
        s = Http2Stream.__new__(Http2Stream)
        s.id = self.next_id
        s.state = ST_IDLE
        s.bits = B_COUNTS
        s.progress = self.now
        self.next_id += 2
        if self.next_id >= LAST_CLIENT_ID:
            self.exhausted = True  # with the last stream, so that the owner looks for another connection in time
        self.live += 1
        self.streams[s.id] = s
        return s

    cdef list take_streams(self):
        cdef list out = Http2Engine.take_streams(self)
        cdef Http2Stream s
        for s in out:
            s.bits |= B_GONE
            self.uncount(s)
        self.waiting.clear()
        return out

    cdef int reset(self, Http2Stream s, uint32_t code) except -1:
        if self.dead or s.bits & B_GONE:
            return 0
        self.drop_queue(s)
        if s.state != ST_IDLE:
            try:
                self.conn.reset_stream(s.id, error_code=code)
            except StreamClosedError:
                pass  # closed for h2 already
        self.close(s)
        return self.collect()

    cdef int release(self, Http2Stream s) except -1:
        return 0 if self.is_client else self.uncount(s)

    # ---- sending -------------------------------------------------------------------------------------------------------

    cdef int start(self, double now) except -1:
        self.now = now
        self.preface_at = now + self.handshake_s
        self.ack_at = now + self.handshake_s
        self.conn.initiate_connection()
        if self.stream_window < 65535:
            # the peer counts on 65,535 until it has read our SETTINGS (RFC 9113 section 6.9.2); h2 has no way to say so
            self.conn.local_settings._settings[SettingCodes.INITIAL_WINDOW_SIZE] = collections.deque([65535, self.stream_window])
        if self.connection_window > 65535:
            self.conn.increment_flow_control_window(self.connection_window - 65535)
        return self.collect()

    cdef int collect(self) except -1:
        """Take over what h2 wants to send."""
        cdef bint idle = not self.has_output()
        data = self.conn.data_to_send()
        if data:
            self.out += data
        if idle and self.has_output():
            self.owner.on_output()
        return 0

    cdef int send_headers(self, Http2Stream s, list headers, bint end) except -1:
        if self.dead or s.bits & B_GONE or s.state == ST_HALF_LOCAL or s.bits & B_END or s.trailers is not None:
            return 0
        if s.queued:
            s.trailers = headers
            return 0
        if not self.is_client and not s.bits & B_ANSWERED:
            status = headers[0][1]
            if not status.startswith(b"1"):
                s.bits |= B_ANSWERED
                if s.bits & B_NO_BODY or status == b"204" or status == b"304":
                    end = True
        try:
            self.conn.send_headers(s.id, headers, end_stream=end)
        except StreamClosedError:
            return 0
        except TooManyStreamsError:
            # the peer has lowered its limit between open_stream and now
            self.owner.on_reset(s, ErrorCodes.REFUSED_STREAM, False)
            return self.close(s)
        if s.state == ST_IDLE:
            s.state = ST_OPEN
        if end:
            self.local_end(s)
        return self.collect()

    cdef int local_end(self, Http2Stream s) except -1:
        if s.state == ST_HALF_REMOTE:
            return self.close(s)
        s.state = ST_HALF_LOCAL
        return 0

    cdef int send_data(self, Http2Stream s, const unsigned char *p, size_t n, object keep, bint end) except -1:
        if (self.dead or s.bits & (B_GONE | B_END) or s.trailers is not None
                or (s.state != ST_OPEN and s.state != ST_HALF_REMOTE)):
            return 0
        if n == 0 and not end:
            return 0
        if n:
            if s.pieces is None:
                s.pieces = []
            s.pieces.append(PyBytes_FromStringAndSize(<char *>p, n))
            if not s.queued:
                s.progress = self.now
            s.queued += n
        if end:
            s.bits |= B_END
        if s.id not in self.waiting:
            self.waiting.append(s.id)
        return self.pump()

    cdef int drop_queue(self, Http2Stream s) except -1:
        s.pieces = None
        s.trailers = None
        s.queued = 0
        s.bits &= ~B_END
        return 0

    cdef int pump(self) except -1:
        """Frame queued data as far as windows and the backlog allow, in turns of one frame."""
        cdef Http2Stream s
        cdef size_t blocked = 0
        if self.flushing or self.dead:
            return self.collect() if self.dead else 0
        self.flushing = True
        try:
            while self.waiting and blocked < <size_t>len(self.waiting) and self.backlog() < FRAME_AHEAD:
                sid = self.waiting.popleft()
                s = self.streams.get(sid)
                if s is None:
                    continue
                if self.frame_some(s):
                    blocked = 0
                else:
                    blocked += 1
                if not s.bits & B_GONE and (s.queued or s.bits & B_END or s.trailers is not None):
                    self.waiting.append(sid)
                if s.bits & B_FULL and not s.bits & B_GONE and self.room_now(s):
                    s.bits &= ~B_FULL
                    self.owner.on_room(s)
        finally:
            self.flushing = False
        return self.collect()

    cdef bint frame_some(self, Http2Stream s) except -1:
        """One frame of the stream; False when its window, or that of the connection, is empty."""
        cdef int64_t window
        cdef size_t take
        cdef bint end
        cdef list headers
        try:
            if s.queued:
                window = self.conn.local_flow_control_window(s.id)
                if window <= 0:
                    return False
                piece = s.pieces[0]
                take = min(<size_t>len(piece), <size_t>window, <size_t>DATA_CUT)
                if take == <size_t>len(piece):
                    del s.pieces[0]
                else:
                    s.pieces[0] = piece[take:]
                s.queued -= take
                end = s.queued == 0 and s.bits & B_END != 0
                self.conn.send_data(s.id, piece[:take], end_stream=end)
                s.progress = self.now
            elif s.bits & B_END:
                end = True
                self.conn.send_data(s.id, b"", end_stream=True)
            else:
                end = False
            if not s.queued and s.trailers is not None:
                headers = s.trailers
                s.trailers = None
                end = True
                self.conn.send_headers(s.id, headers, end_stream=True)
        except StreamClosedError:
            self.drop_queue(s)  # h2 has reset it; its event follows
            return True
        self.collect()
        if end:
            s.bits &= ~B_END
            self.local_end(s)
        return True

    cdef bint room_now(self, Http2Stream s):
        return s.queued <= STREAM_BACKLOG and self.backlog() <= CONNECTION_BACKLOG

    cdef bint room(self, Http2Stream s):
        if s.bits & B_GONE or self.dead:
            return False
        if self.room_now(s):
            return True
        s.bits |= B_FULL
        return False

    cdef int consumed(self, Http2Stream s, size_t n) except -1:
        cdef int64_t increment
        if self.dead or n == 0:
            return 0
        self.unannounced += n
        if self.unannounced * 2 >= self.connection_window:
            increment = self.unannounced
            self.unannounced = 0
            self.conn.increment_flow_control_window(increment)
        if s is not None and not s.bits & B_GONE and (s.state == ST_OPEN or s.state == ST_HALF_LOCAL):
            s.unannounced += n
            if s.unannounced * 2 >= self.stream_window:
                increment = s.unannounced
                s.unannounced = 0
                try:
                    self.conn.increment_flow_control_window(increment, s.id)
                except (StreamClosedError, KeyError):
                    pass  # closed for h2 already
        return self.collect()

    cdef int set_windows(self, uint32_t stream, uint64_t connection) except -1:
        if self.dead:
            return 0
        if stream > self.stream_window and stream <= MAX_ID:
            self.stream_window = stream
            self.conn.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: stream})
            if self.ack_at == INFINITY:
                self.ack_at = self.now + self.handshake_s
        if connection > <uint64_t>self.connection_window and connection <= MAX_ID:
            self.conn.increment_flow_control_window(connection - self.connection_window)
            self.connection_window = connection
        return self.collect()

    cdef int ping(self, uint64_t payload) except -1:
        cdef unsigned char raw[8]
        if self.dead:
            return 0
        dw_st64be(raw, payload)
        self.conn.ping(PyBytes_FromStringAndSize(<char *>raw, 8))
        return self.collect()

    cdef int queue_goaway(self, uint32_t last_id, code, bytes debug) except -1:
        self.collect()
        frame = GoAwayFrame(0, last_stream_id=last_id, error_code=int(code), additional_data=debug)
        cdef bint idle = not self.has_output()
        self.out += frame.serialize()
        return self.owner.on_output() if idle else 0

    cdef int goaway(self, uint32_t code, bytes debug, bint final) except -1:
        if self.dead:
            return 0
        self.draining = True
        if final and not self.is_client:
            self.ignore_above = self.last_inbound
        return self.queue_goaway(self.last_inbound if final else MAX_ID, code, debug)

    # ---- output --------------------------------------------------------------------------------------------------------

    cdef bint has_output(self):
        return self.backlog() > 0

    cdef size_t backlog(self):
        return len(self.out) + PyBytes_GET_SIZE(self.writing) - self.written

    cdef int gather(self, dw_chunk *chunks, size_t limit):
        if self.written == <size_t>PyBytes_GET_SIZE(self.writing):
            self.writing = bytes(self.out)
            self.out.clear()
            self.written = 0
        if self.written == <size_t>PyBytes_GET_SIZE(self.writing):
            return 0
        chunks[0].base = PyBytes_AS_STRING(self.writing) + self.written
        chunks[0].len = PyBytes_GET_SIZE(self.writing) - self.written
        return 1

    cdef int sent(self, size_t n) except -1:
        cdef Http2Stream s
        self.written += n
        self.pump()
        if not self.dead and self.backlog() <= CONNECTION_BACKLOG:
            for s in [s for s in self.streams.values() if s.bits & B_FULL and self.room_now(s)]:
                s.bits &= ~B_FULL
                self.owner.on_room(s)
        return 0

    # ---- time ----------------------------------------------------------------------------------------------------------

    cdef double next_wakeup(self):
        cdef Http2Stream s
        cdef double at = min(self.preface_at, self.ack_at)
        if self.dead:
            return INFINITY
        for s in self.streams.values():
            if s.queued:
                at = min(at, s.progress + self.stall_s)
        return at

    cdef int on_time(self, double now) except -1:
        cdef Http2Stream s
        self.now = now
        if self.dead:
            return 0
        if now >= self.preface_at:
            self.fail(ErrorCodes.PROTOCOL_ERROR if self.is_client else ErrorCodes.SETTINGS_TIMEOUT,
                      f"no HTTP/2 preface within {self.handshake_s:g} s")
        if now >= self.ack_at:
            self.fail(ErrorCodes.SETTINGS_TIMEOUT, f"SETTINGS not acknowledged within {self.handshake_s:g} s")
        for s in [s for s in self.streams.values() if s.queued and now >= s.progress + self.stall_s]:
            self.drop_queue(s)
            self.conn.reset_stream(s.id, error_code=ErrorCodes.CANCEL)
            self.owner.on_reset(s, ErrorCodes.CANCEL, False)
            self.close(s)
        return self.collect()

    # ---- for tests and diagnostics -------------------------------------------------------------------------------------

    cdef dict peer_settings(self):
        return dict(self.announced)

    cdef dict counters(self):
        cdef Http2Stream s
        streams = {}
        for sid, s in self.streams.items():
            inner = self.conn.streams.get(sid)
            streams[sid] = {
                "send_window": inner.outbound_flow_control_window if inner else 0,
                "recv_window": inner.inbound_flow_control_window if inner else 0,
                "queued": s.queued,
            }
        return {
            "send_window": self.conn.outbound_flow_control_window,
            "recv_window": self.conn.inbound_flow_control_window,
            # h2 gives back by itself what comes on streams that have been reset, so only the sum is known
            "granted": self.flow_received + self.conn.inbound_flow_control_window,
            "held": self.backlog() + len(self.partial) + (0 if self.inbox is None else INBOX),
            "received": self.flow_received,
            "queued": sum(item["queued"] for item in streams.values()),
            "backlog": self.backlog(),
            "streams": streams,
        }
