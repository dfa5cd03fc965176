# Part of _http2.pyx: NativeEngine.

# ---- native engine -----------------------------------------------------------------------------------------------------

cdef unsigned char *_spare[READ_SPARE]
cdef int _spares = 0


cdef class Piece:
    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)
        dw_buf_free(&self.own)


cdef void _trim(NativeEngine e) noexcept:
    """Without streams, no more than a few KiB stay: a burst should not keep its peak for the life of the connection."""
    if e.live:
        return
    if e.wbuf.cap > IDLE_BYTES and e.wpos == e.wbuf.n:
        dw_buf_free(&e.wbuf)
        e.wpos = 0
    if e.obuf.cap > IDLE_BYTES and e.obuf.n == 0:
        dw_buf_free(&e.obuf)


cdef class NativeEngine(Http2Engine):
    """The state machine of this package."""

    def __init__(self, Http2Owner owner not None, bint is_client, **limits):
        super().__init__(owner, is_client, **limits)
        self.decoder = HpackDecoder(4096, self.max_header_list, self.max_header_fields)
        self.encoder = HpackEncoder(4096)
        self.settings_sent = collections.deque()
        self.ring = collections.deque()
        self.ref_pieces = []
        self.roomless = []
        self.peer_values = {}
        self.recv_window = self.send_window = self.peer_initial = 65535
        self.granted = 65535
        # Until our SETTINGS have been acknowledged the peer may still count on 65,535 (RFC 9113 6.9.2).
        self.local_initial = max(self.stream_window, <uint32_t>65535)
        self.peer_max_frame = 16384
        # RFC 9113 6.5.2 sets no limit before SETTINGS; 100 is the least that it recommends, so what servers will have
        self.peer_max_streams = 100
        self.next_id = 1
        self.goaway_last = 0x7FFFFFFF
        self.started_at = self.stall_at = INFINITY
        if not is_client:
            self.next_id = 2
        else:
            self.preface_at = _PREFACE_SIZE

    def __dealloc__(self):
        free(self.rbuf)
        free(self.reset_ring)
        dw_buf_free(&self.block)
        dw_buf_free(&self.obuf)
        dw_buf_free(&self.wbuf)

    # ---- receiving -----------------------------------------------------------------------------------------------------

    cdef void recv_target(self, unsigned char **base, size_t *size):
        global _spares
        cdef size_t have = self.rend - self.rpos
        cdef unsigned char *p
        if self.rbuf is NULL:
            if _spares:
                _spares -= 1
                self.rbuf = _spare[_spares]
            else:
                self.rbuf = <unsigned char *>malloc(READ_BYTES)
            self.rcap = READ_BYTES
            if self.rbuf is NULL:  # the caller sees a buffer without room
                self.rcap = 0
        elif self.rpos:
            if have:
                memmove(self.rbuf, self.rbuf + self.rpos, have)
            self.rpos = 0
            self.rend = have
        if self.need > self.rcap and self.rbuf is not NULL:  # a header block, see _headers for the limit
            p = <unsigned char *>realloc(self.rbuf, self.need)
            if p is not NULL:
                self.rbuf = p
                self.rcap = self.need
        base[0] = self.rbuf + self.rend
        size[0] = self.rcap - self.rend

    cdef int received(self, size_t n, double now) except -1:
        global _spares
        self.now = now
        if n:
            self.reads += 1
            self.rx_bytes += n
            self.last_rx = now
            self.rend += n
        try:
            if n and not self.dead:
                self.parse()
        finally:
            if self.dead or self.rpos == self.rend:
                self.rpos = self.rend = self.need = 0
                if self.rbuf is not NULL:
                    # The next read, of whichever connection, finds it in the processor's cache.
                    if _spares < READ_SPARE and self.rcap == READ_BYTES:
                        _spare[_spares] = self.rbuf
                        _spares += 1
                    else:
                        free(self.rbuf)
                    self.rbuf = NULL
                    self.rcap = 0
                _trim(self)
        return 0

    cdef int fail(self, uint32_t code, str text) except -1:
        """Connection error (RFC 9113 5.4.1): GOAWAY, and nothing after it."""
        cdef unsigned char body[8]
        cdef bytes debug = text.encode()
        if not self.dead:
            debug = bytes(8) + debug
            dw_st32be(body, min(self.last_peer_id, self.goaway_last))
            dw_st32be(body + 4, code)
            memcpy(PyBytes_AS_STRING(debug), body, 8)
            self._put(T_GOAWAY, 0, 0, <const unsigned char *>PyBytes_AS_STRING(debug), PyBytes_GET_SIZE(debug))
            self.dead = True
            self.draining = True
            self.data_stream = None
            self.ring.clear()
            for stream in self.streams.values():
                (<Http2Stream>stream).bits &= ~SB_READY
                self._drop_queue(<Http2Stream>stream)
            self.owner.on_output()
        raise Http2ConnectionError(code, text)

    cdef int parse(self) except -1:
        cdef size_t avail, take
        cdef const unsigned char *p
        cdef uint32_t length
        if self.preface_at < _PREFACE_SIZE:
            if not self._preface():
                return 0
        while not self.dead:
            avail = self.rend - self.rpos
            if self.data_stream is not None:
                if avail == 0:
                    break
                self._data_bytes()
                continue
            if self.skip_left:
                take = min(self.skip_left, avail)
                self.rpos += take
                self.skip_left -= take
                if self.skip_left:
                    break
                continue
            if avail < FRAME_HEAD:
                self.need = FRAME_HEAD
                break
            p = self.rbuf + self.rpos
            length = dw_ld24be(p)
            if self._frame(p, length, p[3], p[4], dw_ld32be(p + 5) & 0x7FFFFFFF):
                break
        return 0

    cdef int _preface(self) except -1:
        """Compare what has come with the client's preface (RFC 9113 3.4); returns whether all of it has."""
        cdef size_t n = min(_PREFACE_SIZE - self.preface_at, self.rend - self.rpos)
        if memcmp(self.rbuf + self.rpos, PyBytes_AS_STRING(_PREFACE) + self.preface_at, n):
            self.fail(E_PROTOCOL, "expected the HTTP/2 preface")
        self.rpos += n
        self.preface_at += n
        return self.preface_at == _PREFACE_SIZE

    cdef int _frame(self, const unsigned char *p, uint32_t length, uint8_t type, uint8_t flags, uint32_t sid) except -1:
        """Deal with the frame at ``p``; returns 1 when more of it has to come first."""
        cdef size_t whole = FRAME_HEAD + <size_t>length
        cdef size_t avail = self.rend - self.rpos
        cdef int situation
        cdef Http2Stream s
        if not self.ready and (type != T_SETTINGS or (flags & F_ACK and not length)):
            # RFC 9113 3.4: the first frame of either side. 6.5 has a code for an acknowledgement with a payload: below
            if self.is_client and memcmp(p, "HTTP/1.", 7) == 0:
                self.fail(E_PROTOCOL, "the peer spoke HTTP/1.1, expected HTTP/2")
            self.fail(E_PROTOCOL, "the first frame was not SETTINGS")
        if length > self.max_frame_size:
            self.fail(E_FRAME_SIZE, f"a frame of {length} bytes, {self.max_frame_size} are allowed")
        if self.block_sid and (type != T_CONTINUATION or sid != self.block_sid):
            self.fail(E_PROTOCOL, "a header block was interrupted")  # 6.2
        if type == T_DATA:
            return self._data(p, length, flags, sid)
        if type == T_HEADERS or type == T_CONTINUATION:
            if type == T_CONTINUATION:
                if not self.block_sid:
                    self.fail(E_PROTOCOL, "CONTINUATION without a header block")
                if self.block_frames == self.continuation_frames:
                    self.fail(E_CALM, "too_many_continuations")
            elif sid == 0 or not sid & 1:
                self.fail(E_PROTOCOL, f"HEADERS on stream {sid}")
            if self.block.n + length > <size_t>MAX_BLOCK_FACTOR * self.max_header_list + 261:  # padding, priority
                self.fail(E_CALM, "header_list_way_too_large")
            if avail < whole:
                self.need = whole
                return 1
            self.rpos += whole
            self._headers(p, length, flags, sid)
            return 0
        if type == T_WINDOW_UPDATE:
            if length != 4:
                self.fail(E_FRAME_SIZE, "WINDOW_UPDATE has 4 bytes")
            if avail < whole:
                return 1
            self.rpos += whole
            return self._window_update(sid, dw_ld32be(p + FRAME_HEAD) & 0x7FFFFFFF)
        if type == T_RST_STREAM:
            if length != 4:
                self.fail(E_FRAME_SIZE, "RST_STREAM has 4 bytes")
            if avail < whole:
                return 1
            self.rpos += whole
            if sid == 0:
                self.fail(E_PROTOCOL, "RST_STREAM on stream 0")
            s = self._find(sid)
            if self._verdict(<int>s.state if s is not None else self._situation(sid), I_RST, sid, s):
                return 0
            if not self.is_client and self._rapid(s):
                self._charge("too_many_resets")
            s.state = ST_CLOSED  # nothing that the owner does in the callback is sent any more
            self.owner.on_reset(s, dw_ld32be(p + FRAME_HEAD), True)
            self._close(s, X_RESET_BY_PEER)
            return 0
        if type == T_SETTINGS:
            if sid:
                self.fail(E_PROTOCOL, "SETTINGS on a stream")
            if length % 6 or (flags & F_ACK and length):
                self.fail(E_FRAME_SIZE, "SETTINGS has entries of 6 bytes, its acknowledgement none")
            if length > 6 * self.settings_entries:
                self.fail(E_CALM, "too_many_settings")
            if avail < whole:
                return 1
            self.rpos += whole
            self._settings(p + FRAME_HEAD, length, flags)
            return 0
        if type == T_PING:
            if sid:
                self.fail(E_PROTOCOL, "PING on a stream")
            if length != 8:
                self.fail(E_FRAME_SIZE, "PING has 8 bytes")
            if avail < whole:
                return 1
            self.rpos += whole
            self._glitch("too_many_pings")
            if flags & F_ACK:
                self.owner.on_pong(dw_ld64be(p + FRAME_HEAD))
            else:
                self._put_control(T_PING, F_ACK, 0, p + FRAME_HEAD, 8)
                self.owner.on_output()
            return 0
        if type == T_GOAWAY:
            if sid:
                self.fail(E_PROTOCOL, "GOAWAY on a stream")
            if length < 8:
                self.fail(E_FRAME_SIZE, "GOAWAY has 8 bytes or more")
            if avail < min(whole, <size_t>(FRAME_HEAD + 8 + GOAWAY_DEBUG)):
                return 1
            self.skip_left = whole - min(whole, avail)
            self.rpos += min(whole, avail)
            self._goaway(p + FRAME_HEAD, min(length, <uint32_t>(8 + GOAWAY_DEBUG)))
            return 0
        if type == T_PRIORITY:
            # RFC 9113 5.3.2 deprecates it; what RFC 7540 5.3.1 and 6.3 call errors still is
            if sid == 0:
                self.fail(E_PROTOCOL, "PRIORITY on stream 0")
            if length == 5 and avail < whole:
                return 1
            self._glitch("too_many_priorities")
            s = self._find(sid)
            situation = <int>s.state if s is not None else self._situation(sid)
            if length != 5:
                if situation == ST_IDLE:  # where RST_STREAM would be an error of ours
                    self.fail(E_FRAME_SIZE, "PRIORITY has 5 bytes")
                self.skip_left = whole
                self._stream_error(sid, s, E_FRAME_SIZE)
                return 0
            self.rpos += whole
            if dw_ld32be(p + FRAME_HEAD) & 0x7FFFFFFF == sid:
                if situation == ST_IDLE:
                    self.fail(E_PROTOCOL, "a stream that depends on itself")
                self._stream_error(sid, s, E_PROTOCOL)
            return 0
        if type == T_PUSH_PROMISE:
            # 8.4: a client cannot push, and we do not allow it to a server
            self.fail(E_PROTOCOL, "PUSH_PROMISE")
        self._glitch("too_many_unknown_frames")  # 4.1: unknown types are ignored
        self.skip_left = whole
        return 0

    cdef int _glitch(self, str text) except -1:
        """Charge the peer for a frame that has no use by itself; what goes with the data that we send is free."""
        if self.credit > 0:
            self.credit -= 1
        elif not dw_bucket_take(&self.glitches, self.now, 1.0):
            self.fail(E_CALM, text)
        return 0

    cdef int _charge(self, str text) except -1:
        """Charge the peer for a stream that was reset, whoever did it (CVE-2023-44487, CVE-2025-8671)."""
        if not dw_bucket_take(&self.resets, self.now, 1.0):
            self.fail(E_CALM, text)
        return 0

    cdef bint _rapid(self, Http2Stream s):
        """(server) Whether the peer resets the stream before it can have seen a response, and soon: that is how more handlers are
        started than MAX_CONCURRENT_STREAMS allows. A head that was sent during this very read has not been seen."""
        return (s.answered == 0 or s.answered == self.reads) and self.now < s.progress + RAPID_S

    cdef Http2Stream _find(self, uint32_t sid):
        cdef PyObject *found
        if self.hot is not None and self.hot.id == sid:
            return self.hot
        found = PyDict_GetItem(self.streams, sid)
        if found is NULL:
            return None
        self.hot = <Http2Stream>found
        return self.hot

    cdef int _situation(self, uint32_t sid):
        """Where a stream that is not in `streams` stands."""
        cdef uint32_t i, entry
        if not sid & 1:
            return ST_IDLE  # pushed streams do not exist
        if self.is_client:
            if sid > self.highest_sent:
                return ST_IDLE
        elif sid > self.last_peer_id:
            return X_RESET_BY_US if sid > self.goaway_last else ST_IDLE
        if sid > self.goaway_last:
            return X_RESET_BY_US
        for i in range(min(self.ended_at, <uint32_t>32)):
            if self.ended_ring[i] == sid:
                return X_ENDED
        for i in range(min(self.reset_at, self.reset_cap)):
            entry = self.reset_ring[i]
            if entry | 1 == sid:
                return X_RESET_BY_US if entry & 1 else X_RESET_BY_PEER
        # A client has opened every id up to its highest, so the stream was closed; it may have been cancelled long ago.
        return X_RESET_BY_US if self.is_client else X_FORGOTTEN

    cdef int _remember(self, uint32_t sid, int reason) except -1:
        cdef uint32_t cap
        cdef uint32_t *ring
        if reason == X_ENDED:
            self.ended_ring[self.ended_at & 31] = sid
            self.ended_at += 1
            return 0
        if self.reset_at >= self.reset_cap < RESET_RING:
            cap = max(self.reset_cap * 4, <uint32_t>16)
            ring = <uint32_t *>realloc(self.reset_ring, cap * sizeof(uint32_t))
            if ring is NULL:
                raise MemoryError()
            self.reset_ring = ring
            self.reset_cap = cap
        # stream ids of peers and ours that have been used are odd: the lowest bit is free
        self.reset_ring[self.reset_at & (self.reset_cap - 1)] = sid if reason == X_RESET_BY_US else sid - 1
        self.reset_at += 1
        return 0

    cdef int _verdict(self, int situation, int kind, uint32_t sid, Http2Stream s) except -1:
        """Do what the table says; returns whether the frame is done with."""
        cdef int verdict = VERDICTS[situation][kind]
        if verdict == V_OK and (s is not None or kind == I_HEADERS):
            return 0
        if verdict == V_IGNORE:
            self._glitch("too_many_frames_on_closed_streams")
        elif verdict == V_STREAM_CLOSED:
            self._stream_error(sid, s, E_STREAM_CLOSED)
        elif verdict == V_CLOSED:
            self.fail(E_STREAM_CLOSED, f"a frame on stream {sid}, which has ended")
        else:
            self.fail(E_PROTOCOL, f"a frame on stream {sid}, which is not open")
        return 1

    cdef int _stream_error(self, uint32_t sid, Http2Stream s, uint32_t code) except -1:
        """RST_STREAM because of what the peer did."""
        self._charge("too_many_internal_resets")
        self._put_rst(sid, code)
        self.owner.on_output()
        if s is None:
            if self._situation(sid) != X_RESET_BY_US:
                self._remember(sid, X_RESET_BY_US)
        else:
            s.state = ST_CLOSED
            self.owner.on_reset(s, code, False)
            self._close(s, X_RESET_BY_US)
        return 0

    cdef Http2Stream _new_stream(self, uint32_t sid):
        cdef Http2Stream s = Http2Stream.__new__(Http2Stream)
        s.id = sid
        s.send_window = self.peer_initial
        s.recv_window = self.local_initial
        s.expected = -1
        s.progress = self.now
        self.streams[sid] = s
        s.counted = True
        self.live += 1
        return s

    cdef int _uncount(self, Http2Stream s) except -1:
        """The stream does not count any more. The owner may release it while it is being told of the end, so this comes twice."""
        if s.counted:
            s.counted = False
            self.live -= 1
        return 0

    cdef int _close(self, Http2Stream s, int reason) except -1:
        """The stream is over. The caller has told of a reset before."""
        s.state = ST_CLOSED
        if self.streams.pop(s.id, None) is None:
            return 0
        if self.hot is s:
            self.hot = None
        if not self.is_client or s.id <= self.highest_sent:
            self._remember(s.id, reason)
        if s.queued or s.pieces is not None:
            self._drop_queue(s)
        if s.bits & SB_READY:
            self._unready(s)
        if self.data_stream is s:
            # in the middle of a DATA frame: nobody takes the rest
            self.data_stream = None
            self.skip_left = self.data_left + self.pad_left
            self._give_back(None, self.data_left)
        if self.is_client or s.bits & SB_RELEASED:
            self._uncount(s)
        s.trailers = None
        self.owner.on_closed(s)
        if self.wants_capacity and self.live < self.peer_max_streams:
            self.wants_capacity = False
            self.owner.on_capacity()
        return 0

    # ---- DATA and windows ------------------------------------------------------------------------------------------------

    cdef int _data(self, const unsigned char *p, uint32_t length, uint8_t flags, uint32_t sid) except -1:
        """A DATA frame begins (RFC 9113 6.1, 6.9)."""
        cdef uint32_t padding = 0
        cdef uint32_t head = FRAME_HEAD
        cdef uint32_t size = length
        cdef bint end = flags & F_END_STREAM
        cdef int situation
        cdef Http2Stream s
        if sid == 0:
            self.fail(E_PROTOCOL, "DATA on stream 0")
        if flags & F_PADDED:
            if length == 0:
                self.fail(E_FRAME_SIZE, "DATA without its pad length")
            if self.rend - self.rpos < FRAME_HEAD + 1:
                self.need = FRAME_HEAD + 1
                return 1
            padding = p[FRAME_HEAD]
            if padding >= length:
                self.fail(E_PROTOCOL, "DATA with more padding than bytes")
            head += 1
            size = length - 1 - padding
        if length > self.recv_window:
            self.fail(E_FLOW_CONTROL, "DATA beyond the connection's window")
        self.rpos += head
        self.recv_window -= length
        self.flow_received += length
        s = self._find(sid)
        situation = <int>s.state if s is not None else self._situation(sid)
        if VERDICTS[situation][I_DATA] != V_OK or s is None:
            # the bytes count for the connection, or its window would leak (6.9)
            self.skip_left = size + padding
            self._verdict(situation, I_DATA, sid, s)
            return self._give_back(None, length)
        s.arrived += size
        if (
            (length and length > s.recv_window)  # a window below zero allows END_STREAM without bytes
            or (self.is_client and not s.bits & SB_GOT_HEADERS)
            or (s.expected >= 0 and (s.arrived > s.expected or (end and s.arrived != s.expected)))
            or (size and s.bits & SB_NO_BODY_IN)
        ):
            # 6.9.1; 8.1: a response begins with HEADERS; 8.1.1: content-length; RFC 9110 9.3.2, 15.3.5, 15.4.5: no content
            self.skip_left = size + padding
            self._give_back(None, length)
            self._stream_error(sid, s, E_FLOW_CONTROL if length and length > s.recv_window else E_PROTOCOL)
            return 0
        s.recv_window -= length
        if size == 0 and not end and not dw_bucket_take(&self.empty, self.now, 1.0):
            self.fail(E_CALM, "too_many_data_frames")
        if flags & F_PADDED:
            self._give_back(s, padding + 1)
        self.data_stream = s
        self.data_left = size
        self.pad_left = padding
        self.data_end = end
        if size == 0:
            self._data_bytes()
        return 0

    cdef int _data_bytes(self) except -1:
        """Hand on what has come of the current DATA frame."""
        cdef Http2Stream s = self.data_stream
        cdef size_t take = min(self.data_left, self.rend - self.rpos)
        cdef const unsigned char *p = self.rbuf + self.rpos
        self.rpos += take
        self.data_left -= take
        self.unread += take
        if self.data_left:
            self.owner.on_data(s, p, take, False)
            return 0
        self.data_stream = None
        self.skip_left = self.pad_left
        if not self.data_end:
            if take:
                self.owner.on_data(s, p, take, False)
            return 0
        if s.state == ST_OPEN:
            s.state = ST_HALF_REMOTE
            self.owner.on_data(s, p, take, True)
            return 0
        self.owner.on_data(s, p, take, True)
        if s.state == ST_HALF_LOCAL:
            self._close(s, X_ENDED)
        return 0

    cdef int _give_back(self, Http2Stream s, int64_t n) except -1:
        """Grant ``n`` bytes again, at half the window."""
        if n == 0:
            return 0
        self.unannounced += n
        if self.unannounced * 2 >= self.connection_window and not self.dead:
            self._put_update(0, <uint32_t>self.unannounced)
            self.recv_window += self.unannounced
            self.granted += self.unannounced
            self.unannounced = 0
            self.owner.on_output()
        if s is not None and (s.state == ST_OPEN or s.state == ST_HALF_LOCAL):
            s.unannounced += n
            if s.unannounced * 2 >= self.stream_window and not self.dead:
                self._put_update(s.id, <uint32_t>s.unannounced)
                s.recv_window += s.unannounced
                s.unannounced = 0
                self.owner.on_output()
        return 0

    cdef int consumed(self, Http2Stream s, size_t n) except -1:
        n = min(n, <size_t>self.unread)
        self.unread -= n
        return self._give_back(s, n)

    cdef int set_windows(self, uint32_t stream, uint64_t connection) except -1:
        cdef int64_t delta, now
        stream = min(stream, <uint32_t>MAX_WINDOW)
        if stream > self.stream_window and not self.dead:
            now = max(stream, self.local_initial)
            delta = now - self.local_initial
            self.stream_window = stream
            self._put_settings([(S_INITIAL_WINDOW, stream)], stream)
            # The peer counts on the smaller window until it reads this; allowing more for that time does no harm.
            self.local_initial = now
            for item in self.streams.values():
                (<Http2Stream>item).recv_window += delta
            self.owner.on_output()
        connection = min(connection, <uint64_t>MAX_WINDOW)
        if <int64_t>connection > self.connection_window and not self.dead:
            delta = <int64_t>connection - self.connection_window
            self.connection_window = connection
            if self.started_at != INFINITY:
                self._put_update(0, <uint32_t>delta)
                self.recv_window += delta
                self.granted += delta
                self.owner.on_output()
        return 0

    cdef int _window_update(self, uint32_t sid, uint32_t increment) except -1:
        """RFC 9113 6.9."""
        cdef Http2Stream s
        cdef int situation
        if sid == 0:
            self._glitch("too_many_window_updates")
            if increment == 0:
                self.fail(E_PROTOCOL, "WINDOW_UPDATE of 0")
            if self.send_window + increment > MAX_WINDOW:
                self.fail(E_FLOW_CONTROL, "the connection's window exceeds 2^31-1")
            self.send_window += increment
            if self.ring and self.send_window > 0:
                self.owner.on_output()
            return 0
        s = self._find(sid)
        situation = <int>s.state if s is not None else self._situation(sid)
        if self._verdict(situation, I_WINDOW, sid, s):
            return 0
        self._glitch("too_many_window_updates")
        if increment == 0:
            return self._stream_error(sid, s, E_PROTOCOL)
        if s.send_window + increment > MAX_WINDOW:
            return self._stream_error(sid, s, E_FLOW_CONTROL)
        s.send_window += increment
        if s.queued and s.send_window > 0:
            self._make_ready(s)
            if self.send_window > 0:
                self.owner.on_output()
        return 0

    # ---- header blocks ---------------------------------------------------------------------------------------------------

    cdef int _headers(self, const unsigned char *p, uint32_t length, uint8_t flags, uint32_t sid) except -1:
        """A HEADERS or CONTINUATION frame (RFC 9113 6.2, 6.10), complete."""
        cdef uint32_t padding = 0
        cdef bint selfdep = False
        cdef unsigned char *room
        cdef size_t n
        cdef bint first = p[3] == T_HEADERS
        p += FRAME_HEAD
        if first:
            if flags & F_PADDED:
                if length == 0:
                    self.fail(E_FRAME_SIZE, "HEADERS without its pad length")
                padding = p[0]
                p += 1
                length -= 1
            if flags & F_PRIORITY:
                if length < 5:
                    self.fail(E_FRAME_SIZE, "HEADERS without its priority")
                selfdep = dw_ld32be(p) & 0x7FFFFFFF == sid
                p += 5
                length -= 5
            if padding > length:
                self.fail(E_PROTOCOL, "HEADERS with more padding than bytes")
            length -= padding
            if flags & F_END_HEADERS:
                return self._block(p, length, flags, sid, selfdep)
            self.block_sid = sid
            self.block_flags = flags
            self.block_selfdep = selfdep
            self.block_frames = 0
        else:
            self.block_frames += 1
        room = dw_buf_reserve(&self.block, length)
        if room is NULL:
            raise MemoryError()
        memcpy(room, p, length)
        self.block.n += length
        if not first and flags & F_END_HEADERS:
            self.block_sid = 0
            n = self.block.n
            self.block.n = 0
            try:
                self._block(self.block.p, n, self.block_flags, sid, self.block_selfdep)
            finally:
                dw_buf_free(&self.block)
        return 0

    cdef int _block(self, const unsigned char *p, size_t n, uint8_t flags, uint32_t sid, bint selfdep) except -1:
        """A complete header block. It is decoded whatever becomes of it: both tables have to stay equal (RFC 9113 4.3)."""
        cdef list headers
        cdef bint end = flags & F_END_STREAM
        cdef int situation, overflow
        cdef Http2Stream s
        try:
            headers = self.decoder.decode(p, n)
        except HpackError as error:
            self.fail(E_COMPRESSION, str(error))
        overflow = self.decoder.overflow
        if overflow == 2:
            self.fail(E_CALM, "header_list_way_too_large")
        s = self._find(sid)
        if s is None and not self.is_client and sid > self.last_peer_id:
            return self._request(headers, end, sid, overflow, selfdep)
        situation = <int>s.state if s is not None else self._situation(sid)
        if self.is_client and situation == ST_IDLE:
            self.fail(E_PROTOCOL, f"HEADERS on stream {sid}, which is idle")
        if self._verdict(situation, I_HEADERS, sid, s):
            return 0
        if selfdep:
            return self._stream_error(sid, s, E_PROTOCOL)
        if overflow:
            if not self.is_client and not s.bits & SB_SENT_HEADERS:
                self.send_headers(s, [(N_STATUS, b"431")], True)
                if s.state != ST_CLOSED:
                    self._stream_error(sid, s, E_NO_ERROR)
                return 0
            return self._stream_error(sid, s, E_CALM)
        if s.bits & SB_GOT_HEADERS:
            # 8.1: trailers end the stream and have no pseudo-header fields
            if not end or self._check_trailers(headers) or (s.expected >= 0 and s.arrived != s.expected):
                return self._stream_error(sid, s, E_PROTOCOL)
            return self._ended(s, headers, K_TRAILERS)
        return self._response(s, headers, end)

    cdef int _ended(self, Http2Stream s, list headers, int kind) except -1:
        """Hand on a block with END_STREAM."""
        if s.state == ST_OPEN:
            s.state = ST_HALF_REMOTE
            return self.owner.on_headers(s, headers, kind, True)
        self.owner.on_headers(s, headers, kind, True)
        if s.state == ST_HALF_LOCAL:
            self._close(s, X_ENDED)
        return 0

    cdef int _request(self, list headers, bint end, uint32_t sid, int overflow, bint selfdep) except -1:
        """(server) HEADERS with a new id."""
        cdef Http2Stream s
        cdef int check
        self.last_peer_id = sid
        if sid > self.goaway_last:  # 6.8: "any frames that alter connection state cannot be completely ignored"
            return self._glitch("too_many_frames_on_closed_streams")
        if sid == 0x7FFFFFFF and not self.draining:
            self.goaway(E_NO_ERROR, b"stream ids are used up", True)
        if self.live >= self.max_concurrent_streams:
            return self._stream_error(sid, None, E_REFUSED)  # 5.1.2; the client may repeat the request
        if selfdep:
            return self._stream_error(sid, None, E_PROTOCOL)
        if overflow:
            return self._answer(sid, b"431", end)  # RFC 6585
        if headers is not self.valid_request:
            check = self._check_request(headers)
            if check == C_MALFORMED:
                return self._stream_error(sid, None, E_PROTOCOL)
            if check == C_PATH_TOO_LONG:
                return self._answer(sid, b"414", end)
            if check == C_CONNECT:
                return self._answer(sid, b"501", end)
            self.valid_request = headers
            self.valid_length = self.v_length
            self.valid_head = self.v_head
        if end and self.valid_length > 0:
            return self._stream_error(sid, None, E_PROTOCOL)
        s = self._new_stream(sid)
        self.hot = s
        s.state = ST_HALF_REMOTE if end else ST_OPEN
        s.bits = SB_GOT_HEADERS | (SB_NO_BODY_OUT if self.valid_head else 0)
        s.expected = self.valid_length
        self.credit += 4
        return self.owner.on_headers(s, headers, K_REQUEST, end)

    cdef int _answer(self, uint32_t sid, bytes status, bint end) except -1:
        """(server) Answer a request of which the owner does not learn."""
        self._put_block(sid, [(N_STATUS, status)], True)
        self.owner.on_output()
        if end:
            self._remember(sid, X_ENDED)
            return self._glitch("too_many_bad_requests")
        # 8.1: the whole response was sent, the rest of the request is of no use
        return self._stream_error(sid, None, E_NO_ERROR)

    cdef int _response(self, Http2Stream s, list headers, bint end) except -1:
        """(client) The first block after the request, or after informational ones."""
        cdef int status
        if headers is not self.valid_response:
            if self._check_response(headers):
                return self._stream_error(s.id, s, E_PROTOCOL)
            self.valid_response = headers
            self.valid_response_length = self.v_length
            self.valid_status = self.v_status
        status = self.valid_status
        if status < 200:
            # 8.1: not the final one; 8.6: HTTP/2 has no 101
            if end or status == 101:
                return self._stream_error(s.id, s, E_PROTOCOL)
            self._glitch("too_many_informational_responses")
            return self.owner.on_headers(s, headers, K_INFORMATIONAL, False)
        s.bits |= SB_GOT_HEADERS
        if status == 204 or status == 304:
            s.bits |= SB_NO_BODY_IN
        if not s.bits & SB_NO_BODY_IN:
            s.expected = self.valid_response_length
            if end and s.expected > 0:
                return self._stream_error(s.id, s, E_PROTOCOL)
        if end:
            return self._ended(s, headers, K_RESPONSE)
        return self.owner.on_headers(s, headers, K_RESPONSE, False)

    # ---- fields ----------------------------------------------------------------------------------------------------------

    cdef int _check_request(self, list headers) except -1:
        """RFC 9113 8.2, 8.3.1. Also sets v_length and v_head."""
        cdef tuple pair
        cdef object name, value
        cdef object method = None, scheme = None, path = None, authority = None, host = None
        cdef const unsigned char *p
        cdef const unsigned char *v
        cdef Py_ssize_t n, size
        cdef int64_t length
        cdef bint regular = False
        cdef bint star
        self.v_length = -1
        self.v_head = False
        for pair in headers:
            name = <object>PyTuple_GET_ITEM(pair, 0)
            value = <object>PyTuple_GET_ITEM(pair, 1)
            p = <const unsigned char *>PyBytes_AS_STRING(name)
            n = PyBytes_GET_SIZE(name)
            v = <const unsigned char *>PyBytes_AS_STRING(value)
            size = PyBytes_GET_SIZE(value)
            if n and p[0] == 0x3A:
                if regular:
                    return C_MALFORMED
                if name is N_METHOD:
                    if method is not None or not _good_bytes(v, size, 4):
                        return C_MALFORMED
                    method = value
                elif name is N_PATH:
                    if path is not None or not _good_bytes(v, size, 2):
                        return C_MALFORMED
                    path = value
                elif name is N_SCHEME:
                    if scheme is not None:
                        return C_MALFORMED
                    scheme = value
                elif name is N_AUTHORITY:
                    if authority is not None or not _good_bytes(v, size, 8):
                        return C_MALFORMED
                    authority = value
                else:
                    return C_MALFORMED
                continue
            regular = True
            if not _good_name(p, n) or not _good_value(v, size) or _forbidden(p, n, v, size):
                return C_MALFORMED
            if name is N_LENGTH:
                length = _length(v, size)
                if length < 0 or (self.v_length >= 0 and length != self.v_length):
                    return C_MALFORMED
                self.v_length = length
            elif name is N_HOST:
                if host is not None or not _good_bytes(v, size, 8):
                    return C_MALFORMED
                host = value
        if method is None or (authority is None and host is None):
            return C_MALFORMED
        if authority is not None and host is not None and authority != host:
            return C_MALFORMED
        if method == b"CONNECT":  # 8.5: without :scheme and :path
            return C_MALFORMED if scheme is not None or path is not None or authority is None else C_CONNECT
        if path is None or not (scheme == b"http" or scheme == b"https"):
            return C_MALFORMED
        if PyBytes_AS_STRING(path)[0] != 0x2F:
            star = PyBytes_GET_SIZE(path) == 1 and PyBytes_AS_STRING(path)[0] == 0x2A
            if not star or method != b"OPTIONS":
                return C_MALFORMED
        if PyBytes_GET_SIZE(path) > PATH_LIMIT:
            return C_PATH_TOO_LONG
        self.v_head = method == b"HEAD"
        return C_OK

    cdef int _check_response(self, list headers) except -1:
        """RFC 9113 8.2, 8.3.2. Also sets v_length and v_status."""
        cdef tuple pair
        cdef object name, value
        cdef const unsigned char *p
        cdef const unsigned char *v
        cdef Py_ssize_t n, size
        cdef int64_t length
        cdef bint regular = False
        self.v_length = -1
        self.v_status = 0
        for pair in headers:
            name = <object>PyTuple_GET_ITEM(pair, 0)
            value = <object>PyTuple_GET_ITEM(pair, 1)
            p = <const unsigned char *>PyBytes_AS_STRING(name)
            n = PyBytes_GET_SIZE(name)
            v = <const unsigned char *>PyBytes_AS_STRING(value)
            size = PyBytes_GET_SIZE(value)
            if n and p[0] == 0x3A:
                if regular or name is not N_STATUS or self.v_status or size != 3:
                    return C_MALFORMED
                self.v_status = <int>_length(v, size)
                if self.v_status < 100:
                    return C_MALFORMED
                continue
            regular = True
            if not _good_name(p, n) or not _good_value(v, size) or _forbidden(p, n, v, size):
                return C_MALFORMED
            if name is N_LENGTH:
                length = _length(v, size)
                if length < 0 or (self.v_length >= 0 and length != self.v_length):
                    return C_MALFORMED
                self.v_length = length
        return C_OK if self.v_status else C_MALFORMED

    cdef int _check_trailers(self, list headers) except -1:
        cdef tuple pair
        cdef object name, value
        cdef const unsigned char *p
        cdef const unsigned char *v
        cdef Py_ssize_t n, size
        for pair in headers:
            name = <object>PyTuple_GET_ITEM(pair, 0)
            value = <object>PyTuple_GET_ITEM(pair, 1)
            p = <const unsigned char *>PyBytes_AS_STRING(name)
            n = PyBytes_GET_SIZE(name)
            v = <const unsigned char *>PyBytes_AS_STRING(value)
            size = PyBytes_GET_SIZE(value)
            if not _good_name(p, n) or not _good_value(v, size) or _forbidden(p, n, v, size):  # a colon is no name byte
                return C_MALFORMED
        return C_OK

    # ---- connection frames -----------------------------------------------------------------------------------------------

    cdef int _settings(self, const unsigned char *p, uint32_t length, uint8_t flags) except -1:
        """RFC 9113 6.5."""
        cdef uint32_t at = 0
        cdef uint32_t code, value
        cdef int64_t window = -1
        cdef bint first = not self.ready
        if flags & F_ACK:
            if not self.settings_sent:
                return self._glitch("too_many_settings")
            window = <int64_t>self.settings_sent.popleft()[1]
            if 0 <= window < self.local_initial and window == self.stream_window:
                # only the first SETTINGS can have made it smaller: from 65,535
                for item in self.streams.values():
                    (<Http2Stream>item).recv_window += window - self.local_initial
                self.local_initial = window
            return self.owner.on_settings_ack()
        self._glitch("too_many_settings")
        while at < length:
            code = dw_ld16be(p + at)
            value = dw_ld32be(p + at + 2)
            at += 6
            if code == S_INITIAL_WINDOW:
                if value > MAX_WINDOW:
                    self.fail(E_FLOW_CONTROL, "SETTINGS_INITIAL_WINDOW_SIZE above 2^31-1")
                window = value
            elif code == S_MAX_FRAME:
                if not 16384 <= value <= 16777215:
                    self.fail(E_PROTOCOL, "SETTINGS_MAX_FRAME_SIZE outside of 16384 to 16777215")
                self.peer_max_frame = value
            elif code == S_TABLE_SIZE:
                self.encoder.set_table_limit(value)
            elif code == S_MAX_STREAMS:
                self.peer_max_streams = value
            elif code == S_ENABLE_PUSH:
                if value > 1 or (value and self.is_client):
                    self.fail(E_PROTOCOL, "SETTINGS_ENABLE_PUSH")
            elif code > 0x20:
                continue  # unknown ones are ignored, and not remembered
            self.peer_values[code] = value
        if window >= 0:
            self._shift_windows(window - self.peer_initial)
            self.peer_initial = window
        self.ready = True
        if first and S_MAX_STREAMS not in self.peer_values:
            self.peer_max_streams = 0x7FFFFFFF
        self._put_control(T_SETTINGS, F_ACK, 0, NULL, 0)
        self.owner.on_output()
        self.owner.on_settings()
        if self.wants_capacity and self.live < self.peer_max_streams:
            self.wants_capacity = False
            self.owner.on_capacity()
        return 0

    cdef int _shift_windows(self, int64_t delta) except -1:
        """The peer's initial window has changed: windows of open streams move with it, below zero too (RFC 9113 6.9.2)."""
        cdef Http2Stream s
        if delta == 0:
            return 0
        for s in self.streams.values():
            s.send_window += delta
            if s.send_window > MAX_WINDOW:
                self.fail(E_FLOW_CONTROL, "SETTINGS_INITIAL_WINDOW_SIZE takes a window above 2^31-1")
            if s.queued:
                if s.send_window > 0:
                    self._make_ready(s)
                elif s.bits & SB_READY:
                    self._unready(s)
        return 0

    cdef int _goaway(self, const unsigned char *p, uint32_t length) except -1:
        """RFC 9113 6.8."""
        cdef uint32_t last = dw_ld32be(p) & 0x7FFFFFFF
        cdef uint32_t code = dw_ld32be(p + 4)
        cdef bytes debug = PyBytes_FromStringAndSize(<char *>p + 8, length - 8)
        cdef Http2Stream s
        self.draining = True
        self._glitch("too_many_goaways")
        if self.is_client:
            for sid in sorted(self.streams):
                if sid > last:
                    s = self.streams.get(sid)
                    if s is not None:
                        s.state = ST_CLOSED
                        self.owner.on_reset(s, E_REFUSED, True)
                        self._close(s, X_RESET_BY_US)  # what the peer still sends on it is ignored
        return self.owner.on_goaway(last, code, debug)

    # ---- sending ---------------------------------------------------------------------------------------------------------

    cdef unsigned char *_reserve(self, size_t n) except NULL:
        cdef unsigned char *p = dw_buf_reserve(&self.obuf, n)
        if p is NULL:
            raise MemoryError()
        return p

    cdef int _put(self, uint8_t type, uint8_t flags, uint32_t sid, const unsigned char *body, size_t n) except -1:
        cdef unsigned char *p
        if self.dead:
            return 0
        p = self._reserve(FRAME_HEAD + n)
        dw_st24be(p, <uint32_t>n)
        p[3] = type
        p[4] = flags
        dw_st32be(p + 5, sid)
        if n:
            memcpy(p + FRAME_HEAD, body, n)
        self.obuf.n += FRAME_HEAD + n
        self.last_sid = 0
        return 0

    cdef int _put_control(self, uint8_t type, uint8_t flags, uint32_t sid, const unsigned char *body, size_t n) except -1:
        """A frame that the peer made us send. It has to read them, too."""
        self.control_o += 1
        if self.control_o + self.control_w > self.control_backlog:
            self.fail(E_CALM, "too_many_unread_answers")
        return self._put(type, flags, sid, body, n)

    cdef int _put_rst(self, uint32_t sid, uint32_t code) except -1:
        cdef unsigned char body[4]
        dw_st32be(body, code)
        return self._put_control(T_RST_STREAM, 0, sid, body, 4)

    cdef int _put_own_rst(self, uint32_t sid, uint32_t code) except -1:
        cdef unsigned char body[4]
        dw_st32be(body, code)
        return self._put(T_RST_STREAM, 0, sid, body, 4)

    cdef int _put_update(self, uint32_t sid, uint32_t increment) except -1:
        cdef unsigned char body[4]
        dw_st32be(body, increment)
        return self._put(T_WINDOW_UPDATE, 0, sid, body, 4)

    cdef int _put_settings(self, list pairs, int64_t window) except -1:
        cdef bytes body = b"".join([int(code).to_bytes(2, "big") + int(value).to_bytes(4, "big") for code, value in pairs])
        self._put(T_SETTINGS, 0, 0, <const unsigned char *>PyBytes_AS_STRING(body), PyBytes_GET_SIZE(body))
        self.settings_sent.append((self.now, window))
        return 0

    cdef int start(self, double now) except -1:
        cdef list pairs = []
        self.now = now
        self.started_at = now
        self.resets.at = self.glitches.at = self.empty.at = now
        if self.is_client:
            memcpy(self._reserve(_PREFACE_SIZE), PyBytes_AS_STRING(_PREFACE), _PREFACE_SIZE)
            self.obuf.n += _PREFACE_SIZE
            pairs.append((S_ENABLE_PUSH, 0))
        else:
            pairs.append((S_MAX_STREAMS, self.max_concurrent_streams))
        pairs.append((S_INITIAL_WINDOW, self.stream_window))
        pairs.append((S_MAX_FRAME, self.max_frame_size))
        pairs.append((S_MAX_LIST, self.max_header_list))
        pairs.append((S_NO_PRIORITIES, 1))
        self._put_settings(pairs, self.stream_window)
        if self.connection_window > 65535:
            self._put_update(0, <uint32_t>(self.connection_window - 65535))
            self.recv_window += self.connection_window - 65535
            self.granted += self.connection_window - 65535
        return self.owner.on_output()

    cdef Http2Stream open_stream(self):
        cdef Http2Stream s
        if not self.is_client:
            raise RuntimeError("only a client opens streams")
        if self.next_id >= CLIENT_IDS_END:
            self.exhausted = True
        if self.dead or self.draining or self.exhausted:
            return None
        if self.live >= self.peer_max_streams:
            self.wants_capacity = True
            return None
        s = self._new_stream(self.next_id)
        self.next_id += 2
        if self.next_id >= CLIENT_IDS_END:
            self.exhausted = True  # with the last stream, so that the owner looks for another connection in time
        return s

    cdef int _put_block(self, uint32_t sid, list headers, bint end) except -1:
        """HEADERS, and CONTINUATION where the peer's frames are too small for the block."""
        cdef size_t start = self.obuf.n
        cdef size_t size, at, part
        cdef Py_ssize_t frames, i
        cdef uint8_t flags
        cdef unsigned char *p
        if self.dead:
            return 0
        self._reserve(FRAME_HEAD)
        self.obuf.n += FRAME_HEAD
        try:
            self.encoder.encode(headers, &self.obuf)
        except BaseException:  # noqa: BLE001 - the frame's head must not stay
            self.obuf.n = start
            raise
        self.last_sid = 0
        size = self.obuf.n - start - FRAME_HEAD
        frames = 1 + (size - 1) // self.peer_max_frame if size else 1
        if frames > 1:
            self._reserve((frames - 1) * FRAME_HEAD)
            self.obuf.n += (frames - 1) * FRAME_HEAD
        p = self.obuf.p + start
        for i in range(frames - 1, -1, -1):
            at = <size_t>i * self.peer_max_frame
            part = min(size - at, <size_t>self.peer_max_frame)
            if i:
                memmove(p + at + (i + 1) * FRAME_HEAD, p + FRAME_HEAD + at, part)
            flags = F_END_HEADERS if i == frames - 1 else 0
            if i == 0 and end:
                flags |= F_END_STREAM
            dw_st24be(p + at + i * FRAME_HEAD, <uint32_t>part)
            p[at + i * FRAME_HEAD + 3] = T_CONTINUATION if i else T_HEADERS
            p[at + i * FRAME_HEAD + 4] = flags
            dw_st32be(p + at + i * FRAME_HEAD + 5, sid)
        return 0

    cdef int send_headers(self, Http2Stream s, list headers, bint end) except -1:
        cdef tuple pair
        cdef bytes status
        if s.state == ST_CLOSED or s.state == ST_HALF_LOCAL or s.bits & SB_END_QUEUED or self.dead:
            return 0
        self.credit += 4
        if s.bits & SB_SENT_HEADERS:
            # trailers, which always end the stream
            if s.queued:
                s.trailers = headers
                s.bits |= SB_END_QUEUED
                return 0
            self._put_block(s.id, headers, True)
            self.owner.on_output()
            return self._local_end(s)
        if self.is_client:
            if s.id < self.highest_sent:
                raise RuntimeError(f"stream {s.id} begins after {self.highest_sent}: that has closed it (RFC 9113 5.1.1)")
            for pair in headers:
                if pair[0] == b":method":
                    if pair[1] == b"HEAD":
                        s.bits |= SB_NO_BODY_IN
                    break
            self._put_block(s.id, headers, end)
            s.bits |= SB_SENT_HEADERS
            s.state = ST_OPEN
            self.highest_sent = s.id
        else:
            status = headers[0][1]
            if status.startswith(b"1"):
                self._put_block(s.id, headers, False)
                return self.owner.on_output()
            if s.bits & SB_NO_BODY_OUT or status == b"204" or status == b"304":
                end = True
            self._put_block(s.id, headers, end)
            s.bits |= SB_SENT_HEADERS
            s.answered = self.reads
        self.owner.on_output()
        return self._local_end(s) if end else 0

    cdef int _local_end(self, Http2Stream s) except -1:
        """END_STREAM was framed."""
        if s.state == ST_OPEN:
            s.state = ST_HALF_LOCAL
        elif s.state == ST_HALF_REMOTE:
            self._close(s, X_ENDED)
        return 0

    cdef int send_data(self, Http2Stream s, const unsigned char *p, size_t n, object keep, bint end) except -1:
        cdef bint told
        if s.state == ST_CLOSED or s.state == ST_HALF_LOCAL or s.bits & SB_END_QUEUED or self.dead or (n == 0 and not end):
            return 0
        if not s.bits & SB_SENT_HEADERS:
            raise RuntimeError(f"data on stream {s.id} before its headers")
        if s.queued == 0 and (
            n == 0
            or (
                <int64_t>n <= s.send_window
                and <int64_t>n <= self.send_window
                and (n < REFERENCE_FROM or keep is None)
                and self.obuf.n < COPY_BACKLOG
                # others wait for the connection's window: they get the end of it
                and (<int64_t>n + CUT_ALONE <= self.send_window or not self.ring)
            )
        ):
            told = self.last_sid == s.id  # what is appended to a frame that waits to be written needs no second word
            self._put_data(s, p, n, end)
            if not told:
                self.owner.on_output()
            return self._local_end(s) if end else 0
        if end:
            s.bits |= SB_END_QUEUED
        if n:
            self._queue(s, p, n, keep)
        if s.bits & SB_READY and self.send_window > 0:
            self.owner.on_output()
        return 0

    cdef int _put_data(self, Http2Stream s, const unsigned char *p, size_t n, bint end) except -1:
        """Frame bytes that the windows allow. They are added to the frame before them if that is DATA of the same stream."""
        cdef size_t cut = min(<size_t>self.peer_max_frame, <size_t>CUT_SHARED)
        cdef size_t part, before
        cdef unsigned char *q
        cdef bint first = True
        s.send_window -= n
        self.send_window -= n
        if self.last_sid == s.id:
            q = self.obuf.p + self.last_at
            before = dw_ld24be(q)
            if before + n <= cut:
                if n:
                    memcpy(self._reserve(n), p, n)
                    self.obuf.n += n
                    q = self.obuf.p + self.last_at
                    dw_st24be(q, <uint32_t>(before + n))
                if end:
                    q[4] = F_END_STREAM
                    self.last_sid = 0
                return 0
        if not self.ring:
            cut = min(<size_t>self.peer_max_frame, <size_t>CUT_ALONE)
        while n or first:
            first = False
            part = min(n, cut)
            self.last_at = self.obuf.n
            n -= part
            self._put(T_DATA, F_END_STREAM if end and n == 0 else 0, s.id, p, part)
            self.credit += 20
            p += part
        self.last_sid = 0 if end else s.id
        return 0

    cdef int _queue(self, Http2Stream s, const unsigned char *p, size_t n, object keep) except -1:
        cdef Piece piece = None
        cdef unsigned char *q
        if s.pieces is None:
            s.pieces = []
        if n >= REFERENCE_FROM and keep is not None:
            piece = Piece.__new__(Piece)
            PyObject_GetBuffer(keep, &piece.view, PyBUF_SIMPLE)
            piece.held = True
            piece.base = p
            piece.size = n
            s.pieces.append(piece)
        else:
            if s.pieces:
                piece = s.pieces[-1]
            if piece is None or piece.held:
                piece = Piece.__new__(Piece)
                s.pieces.append(piece)
            elif piece.offset * 2 > piece.own.n:  # otherwise a queue that is never empty would keep all that it has sent
                memmove(piece.own.p, piece.own.p + piece.offset, piece.own.n - piece.offset)
                piece.own.n -= piece.offset
                piece.size -= piece.offset
                piece.offset = 0
            q = dw_buf_reserve(&piece.own, n)
            if q is NULL:
                raise MemoryError()
            memcpy(q, p, n)
            piece.own.n += n
            piece.size += n
        if s.queued == 0:
            s.progress = self.now
            self.stall_at = min(self.stall_at, self.now + self.stall_s)
        s.queued += n
        self.queued_total += n
        if s.send_window > 0:
            self._make_ready(s)
        return 0

    cdef int _make_ready(self, Http2Stream s) except -1:
        if not s.bits & SB_READY:
            s.bits |= SB_READY
            self.ring.append(s)
        return 0

    cdef int _unready(self, Http2Stream s) except -1:
        if s.bits & SB_READY:
            s.bits &= ~SB_READY
            if s in self.ring:
                self.ring.remove(s)
        return 0

    cdef int _drop_queue(self, Http2Stream s) except -1:
        self.queued_total -= s.queued
        s.queued = 0
        s.pieces = None
        return 0

    cdef int _framed(self, Http2Stream s, size_t n) except -1:
        """``n`` queued bytes of the stream at the head of the ring were framed; windows have been counted."""
        s.queued -= n
        self.queued_total -= n
        s.progress = self.now
        self.ring.popleft()
        s.bits &= ~SB_READY
        if s.queued:
            if s.send_window > 0:
                self._make_ready(s)
            return 0
        s.pieces = None
        if s.bits & SB_END_QUEUED:
            if s.trailers is not None:
                self._put_block(s.id, s.trailers, True)
                s.trailers = None
            return self._local_end(s)
        return 0

    cdef int _frame_copies(self) except -1:
        """Frame queued bytes that were copied, streams taking turns, into obuf."""
        cdef Http2Stream s
        cdef Piece piece
        cdef size_t n
        cdef size_t passed = 0  # streams in a row whose next bytes are sent from their own memory
        while passed < <size_t>len(self.ring) and self.obuf.n < COPY_BACKLOG and self.send_window > 0:
            s = self.ring[0]
            piece = s.pieces[0]
            if piece.held:
                self.ring.rotate(-1)
                passed += 1
                continue
            passed = 0
            n = piece.size - piece.offset
            if len(self.ring) > 1:
                n = min(n, <size_t>CUT_SHARED)
            n = min(n, min(<size_t>self.peer_max_frame, <size_t>CUT_ALONE))
            n = min(n, <size_t>min(s.send_window, self.send_window))
            self._put_data(s, piece.own.p + piece.offset, n,
                           n == s.queued and s.bits & SB_END_QUEUED and s.trailers is None)
            piece.offset += n
            if piece.offset == piece.size:
                s.pieces.pop(0)
            self._framed(s, n)
        return 0

    cdef int _frame_refs(self, size_t limit) except -1:
        """Frame queued bytes in their own memory, streams taking turns. Stops when
        obuf is in use: trailers, or what a callback sends, may belong to a stream that comes next, and is written later."""
        cdef Http2Stream s
        cdef Piece piece
        cdef size_t n
        cdef size_t passed = 0
        cdef size_t total = 0
        cdef RefFrame *ref
        while passed < <size_t>len(self.ring) and self.ref_n < 7 and total < limit and self.send_window > 0 and self.obuf.n == 0:
            s = self.ring[0]
            piece = s.pieces[0]
            if not piece.held:
                self.ring.rotate(-1)
                passed += 1
                continue
            passed = 0
            n = min(piece.size - piece.offset, <size_t>(CUT_SHARED if len(self.ring) > 1 else CUT_ALONE))
            n = min(min(n, <size_t>self.peer_max_frame), limit - total)
            n = min(n, <size_t>min(s.send_window, self.send_window))
            ref = &self.refs[self.ref_n]
            ref.base = piece.base + piece.offset
            ref.size = n
            dw_st24be(ref.head, <uint32_t>n)
            ref.head[3] = T_DATA
            ref.head[4] = F_END_STREAM if n == s.queued and s.bits & SB_END_QUEUED and s.trailers is None else 0
            dw_st32be(ref.head + 5, s.id)
            self.ref_pieces.append(piece)
            self.ref_n += 1
            self.ref_bytes += FRAME_HEAD + n
            total += n
            s.send_window -= n
            self.send_window -= n
            self.credit += 20
            piece.offset += n
            if piece.offset == piece.size:
                s.pieces.pop(0)
            self._framed(s, n)
        return 0

    cdef bint room(self, Http2Stream s):
        cdef size_t limit = STREAM_BACKLOG if self.queued_total < QUEUED_TOTAL else CUT_SHARED
        if self.dead:
            return False  # what is sent goes nowhere, so a producer would never have to stop
        if s.queued <= limit and self.backlog() <= CONNECTION_BACKLOG:
            return True
        if s.state != ST_CLOSED and not s.bits & SB_WANTS_ROOM:
            s.bits |= SB_WANTS_ROOM
            self.roomless.append(s)
        return False

    cdef int _tell_room(self) except -1:
        cdef list waiting
        cdef Http2Stream s
        cdef size_t limit = STREAM_BACKLOG // 2 if self.queued_total < QUEUED_TOTAL else CUT_SHARED
        if self.backlog() > CONNECTION_BACKLOG // 2:
            return 0
        waiting = self.roomless
        self.roomless = []
        for s in waiting:
            if s.state == ST_CLOSED:
                s.bits &= ~SB_WANTS_ROOM
            elif s.queued > limit:
                self.roomless.append(s)
            else:
                s.bits &= ~SB_WANTS_ROOM
                self.owner.on_room(s)
        return 0

    cdef int reset(self, Http2Stream s, uint32_t code) except -1:
        if s.state == ST_CLOSED:
            return 0
        if s.state != ST_IDLE:
            # our own decision, not an answer to the peer: not counted as one
            self._put_own_rst(s.id, code)
            self.owner.on_output()
        return self._close(s, X_RESET_BY_US)

    cdef int release(self, Http2Stream s) except -1:
        if not s.bits & SB_RELEASED:
            s.bits |= SB_RELEASED
            if s.state == ST_CLOSED and not self.is_client:
                self._uncount(s)
                _trim(self)
        return 0

    cdef int ping(self, uint64_t payload) except -1:
        cdef unsigned char body[8]
        dw_st64be(body, payload)
        self._put(T_PING, 0, 0, body, 8)
        self.credit += 1  # for its answer
        return self.owner.on_output()

    cdef int goaway(self, uint32_t code, bytes debug, bint final) except -1:
        cdef bytes body
        if self.dead:
            return 0
        if final and not self.is_client:
            self.goaway_last = min(self.goaway_last, self.last_peer_id)
        last = 0 if self.is_client and final else self.goaway_last
        self.draining = True
        body = int(last).to_bytes(4, "big") + int(code).to_bytes(4, "big") + debug
        self._put(T_GOAWAY, 0, 0, <const unsigned char *>PyBytes_AS_STRING(body), PyBytes_GET_SIZE(body))
        return self.owner.on_output()

    cdef bint has_output(self):
        return (
            self.obuf.n > 0
            or self.wpos < self.wbuf.n
            or self.ref_i < self.ref_n
            or (self.send_window > 0 and not self.dead and len(self.ring) > 0)
        )

    cdef size_t backlog(self):
        return self.obuf.n + self.wbuf.n - self.wpos + self.ref_bytes

    cdef int gather(self, dw_chunk *chunks, size_t limit):
        """Order: the rest of what was named before, then everything in obuf, then frames in their own memory in turn."""
        cdef int n = 0
        cdef int i
        cdef size_t done
        cdef dw_buf swap
        if self.wpos == self.wbuf.n and self.ref_i == self.ref_n:
            self.ref_i = self.ref_n = 0
            if self.ring and not self.dead:
                self._frame_copies()
            swap = self.wbuf
            self.wbuf = self.obuf
            self.obuf = swap
            self.obuf.n = 0
            self.wpos = 0
            self.last_sid = 0
            self.control_w = self.control_o
            self.control_o = 0
            if self.ring and not self.dead:
                self._frame_refs(max(limit, <size_t>CUT_SHARED))
        if self.wpos < self.wbuf.n:
            chunks[n].base = self.wbuf.p + self.wpos
            chunks[n].len = self.wbuf.n - self.wpos
            n += 1
        done = self.ref_done
        for i in range(self.ref_i, self.ref_n):
            if done < FRAME_HEAD:
                chunks[n].base = self.refs[i].head + done
                chunks[n].len = FRAME_HEAD - done
                n += 1
                done = FRAME_HEAD
            chunks[n].base = self.refs[i].base + (done - FRAME_HEAD)
            chunks[n].len = self.refs[i].size - (done - FRAME_HEAD)
            n += 1
            done = 0
        return n

    cdef int sent(self, size_t n) except -1:
        cdef size_t take = min(n, self.wbuf.n - self.wpos)
        self.wpos += take
        n -= take
        if self.wpos == self.wbuf.n:
            self.control_w = 0
            if self.wbuf.cap > COPY_BACKLOG:
                dw_buf_free(&self.wbuf)
                self.wpos = 0
            _trim(self)
        while n:
            take = min(n, FRAME_HEAD + self.refs[self.ref_i].size - self.ref_done)
            self.ref_done += take
            self.ref_bytes -= take
            n -= take
            if self.ref_done == FRAME_HEAD + self.refs[self.ref_i].size:
                self.ref_done = 0
                self.ref_i += 1
                if self.ref_i == self.ref_n:
                    self.ref_pieces.clear()
        if self.roomless and not self.dead:
            self._tell_room()
        return 0

    # ---- time ------------------------------------------------------------------------------------------------------------

    cdef double next_wakeup(self):
        cdef double when = INFINITY
        if self.dead:
            return when
        if not self.ready:
            when = self.started_at + self.handshake_s
        if self.settings_sent:
            when = min(when, <double>self.settings_sent[0][0] + self.handshake_s)
        if self.queued_total:
            when = min(when, self.stall_at)
        return when

    cdef int on_time(self, double now) except -1:
        cdef Http2Stream s
        self.now = now
        if self.dead:
            return 0
        if not self.ready and now >= self.started_at + self.handshake_s:
            self.fail(E_PROTOCOL if self.preface_at < _PREFACE_SIZE else E_SETTINGS_TIMEOUT,
                      f"no {'SETTINGS' if self.preface_at == _PREFACE_SIZE else 'preface'} within {self.handshake_s:g} s")
        if self.settings_sent and now >= <double>self.settings_sent[0][0] + self.handshake_s:
            self.fail(E_SETTINGS_TIMEOUT, f"SETTINGS were not acknowledged within {self.handshake_s:g} s")
        if now < self.stall_at:
            return 0
        self.stall_at = INFINITY
        if not self.queued_total:
            return 0
        for s in list(self.streams.values()):
            if not s.queued:
                continue
            if now >= s.progress + self.stall_s:
                self._put_own_rst(s.id, E_CANCEL)
                self.owner.on_output()
                s.state = ST_CLOSED
                self.owner.on_reset(s, E_CANCEL, False)
                self._close(s, X_RESET_BY_US)
            else:
                self.stall_at = min(self.stall_at, s.progress + self.stall_s)
        return 0

    # ---- for tests and diagnostics -------------------------------------------------------------------------------------

    cdef list take_streams(self):
        cdef list out = Http2Engine.take_streams(self)
        cdef Http2Stream s
        self.ring.clear()
        self.roomless.clear()
        self.hot = self.data_stream = None
        for s in out:
            self._uncount(s)
        return out

    cdef dict peer_settings(self):
        return dict(self.peer_values)

    cdef dict counters(self):
        cdef Http2Stream s
        streams = {}
        for s in self.streams.values():
            streams[s.id] = {
                "send_window": s.send_window, "recv_window": s.recv_window, "unannounced": s.unannounced, "queued": s.queued,
                "arrived": s.arrived,
            }  # fmt: skip
        return {
            "send_window": self.send_window, "recv_window": self.recv_window, "unannounced": self.unannounced,
            "granted": self.granted, "received": self.flow_received, "unread": self.unread, "queued": self.queued_total,
            "backlog": self.backlog(), "streams": streams,
            "held": self.rcap + self.block.cap + self.obuf.cap + self.wbuf.cap,
        }  # fmt: skip
