"""What calls and handlers need of a connection, whatever its wire: streams by number, timers, waiting requests.

`Link` is the base of the state machines (`dynwire._frames.WireConnection` for the tcp plane, `dynwire._httpwire.HttpWire` for the
http plane) and `StreamBase` the base of what has a stream: calls, item readers, handlers (`dynwire._awaitable`). The drivers
of the sockets are written against `Link` and compiled once for each machine.

Threads: one thread at a time, in the sense of the GIL. No method releases it.
"""

import collections

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.math cimport INFINITY
from libc.stdlib cimport free, realloc

from .errors import DynwireError, MessageTooLarge, Overloaded, PeerLost

cdef enum:
    LARGE_BYTES = 65536          # payloads from this size on are sent from their owner's memory


cdef bint _calls_follow = False


cdef bint calls_follow():
    return _calls_follow


cdef void set_calls_follow(bint more):
    """For who starts several calls in one callback of the loop. Another thread's loop that sees it writes a little later, too."""
    global _calls_follow
    _calls_follow = more


cdef class StreamBase:
    """State of one request on one connection. Subclasses say what happens; the connection calls them."""

    def __cinit__(self):
        self.timer = INFINITY

    cdef int on_item(self, object item, int kind, bint last) except -1:
        return 0

    cdef int on_end(self) except -1:
        return 0

    cdef int on_error(self, int code, bytes body) except -1:
        return 0

    cdef int on_fault(self, object error) except -1:
        return 0

    cdef int on_accept(self) except -1:
        return 0

    cdef int on_cancel(self, int kind) except -1:
        return 0

    cdef int on_stop_early(self) except -1:
        return 0

    cdef int on_credit(self) except -1:
        return 0

    cdef int on_sent(self) except -1:
        return 0

    cdef int on_timer(self, double now) except -1:
        self.timer = INFINITY
        return 0

    cdef int on_lost(self, object error) except -1:
        return 0

    cdef bint on_restart(self) except -1:
        """(client) The request is run anew: forget what has come of it. False if the application has had some of that already."""
        return True

    cdef int on_freed(self) except -1:
        return 0


cdef class Link:
    """One connection as its streams see it. Machines and drivers subclass it."""

    def __cinit__(self):
        self.min_timer = INFINITY
        self.accept_after = INFINITY
        self.waiting_credit = collections.deque()
        self.waiting_writer = collections.deque()
        self.slots = []
        self.to_wake = []
        self.pending = collections.deque()
        self.channel_buffer = 100
        self.keepalive_interval = INFINITY
        self.keepalive_timeout = INFINITY
        self.ping_at = INFINITY
        self.ping_sent = -1.0

    def __dealloc__(self):
        free(self.free_slots)

    # ---- what drivers override -----------------------------------------------------------------------------------------

    cdef int on_hello(self, dict hello) except -1:
        return 0

    cdef object resolve(self, str name):
        return name

    cdef StreamBase make_stream(self):
        return StreamBase.__new__(StreamBase)

    cdef int on_request(self, StreamBase stream, object target, object payload, int kind, object meta,
                        uint32_t timeout_ms) except -1:
        return 0

    cdef int on_goaway(self, int code, uint32_t last_seq, str text) except -1:
        return 0

    cdef int on_slot_free(self) except -1:
        return self.send_pending() if self.pending else 0

    cdef int on_saturation(self) except -1:
        return 0

    cdef int on_request_sent(self, StreamBase stream) except -1:
        return 0

    cdef int wrote(self) except -1:
        return 0

    cdef int broken(self, object error) except -1:
        """The peer broke the protocol, as a timer found out: tell it, and close."""
        return 0

    # ---- what machines implement ---------------------------------------------------------------------------------------

    cdef int recv_targets(self, dw_chunk *targets):
        """Where the next bytes from the peer go, at most MAX_TARGETS places in turn; returns how many."""
        return 0

    cdef bint more_expected(self):
        """Is a payload on its way, of which the next bytes are due?"""
        return True

    cdef int received(self, size_t n, double now) except -1:
        """``n`` bytes were put where `recv_targets` said. Calls back for everything that is complete."""
        return 0

    cdef bint has_output(self):
        return False

    cdef size_t output_backlog(self):
        """Bytes in the buffers for frames; large payloads in their owners' memory do not count."""
        return 0

    cdef uint64_t handed_upto(self):
        """``tx_frames_bytes`` as it will be if all frames that `gather` named are written."""
        return self.tx_frames_bytes

    cdef bint one_piece(self):
        """Is there nothing large under way in either direction, so that what `gather` names is likely one piece?"""
        return False

    cdef int gather(self, dw_chunk *chunks, size_t limit):
        """Fill in what to write next, about ``limit`` bytes; returns the number of chunks. Memory stays put until `sent`."""
        return 0

    cdef int sent(self, size_t n) except -1:
        """The first ``n`` bytes of what `gather` named were written."""
        return 0

    cdef bint may_send(self, StreamBase stream) except -1:
        """(server) May the stream send an item now? If not, ``on_credit`` or ``on_sent`` is called when it may try again."""
        return False

    cdef int put_item(self, StreamBase stream, const unsigned char *p, size_t n, object owner, int kind, bint last) except -1:
        """(server) Send an item; the caller has asked `may_send`. Large ones are sent from ``owner``'s memory."""
        return 0

    cdef int put_end(self, StreamBase stream) except -1:
        return 0

    cdef int put_error(self, StreamBase stream, int code, bytes body) except -1:
        return 0

    cdef int put_accept(self, StreamBase stream) except -1:
        """(server) Tell the caller that its request has been taken, before the first item."""
        return 0

    cdef int request_done(self, StreamBase stream) except -1:
        """(server) The last frame of the stream is queued."""
        return 0

    cdef bint may_request(self):
        """(client) Is there a free stream, and credit?"""
        return False

    cdef int large_waiting(self):
        """(client) Large payloads that wait for the peer to read."""
        return 0

    cdef int send_request(self, StreamBase stream, str endpoint, object data, int kind, bytes meta, double deadline,
                          double due, double now) except -1:
        return 0

    cdef int put_cancel(self, StreamBase stream, int kind) except -1:
        return 0

    cdef int consumed(self, StreamBase stream, int64_t cost) except -1:
        """(client) The application has taken items of this cost."""
        return 0

    cdef int abandon(self, StreamBase stream, int kind) except -1:
        """(client) Nobody waits for the stream any more: cancel it and swallow what still comes."""
        return 0

    cdef int put_ping(self) except -1:
        return 0

    cdef int put_goaway(self, int code, str text) except -1:
        return 0

    cdef int farewell(self, str text) except -1:
        """The peer broke the protocol: tell it so, as far as its wire has words for that."""
        return 0

    cdef int last_words(self) except -1:
        """This side is about to close: queue what tells the peer which of its requests were not taken."""
        return 0

    cdef bint has_unsent(self):
        """Is there anything that the peer has not got yet, be it because the peer does not read?"""
        return self.has_output()

    cdef double next_wakeup(self):
        """When `sweep` and `check_alive` want to be called."""
        return min(self.min_timer, self.ping_at if self.live else INFINITY)

    cdef int time_passed(self, double now) except -1:
        """`next_wakeup` has come."""
        if self.min_timer <= now:
            self.sweep(now)
        return 0

    # ---- streams -------------------------------------------------------------------------------------------------------

    cdef int take_slot(self, StreamBase stream) except -1:
        """(client) Give the stream a number; returns 0 when none is free."""
        cdef uint32_t sid
        if self.free_len:
            self.free_len -= 1
            sid = self.free_slots[self.free_len]
        elif self.live < self.max_streams:
            sid = self.live
        else:
            return 0
        self.put_slot(stream, sid)
        return 1

    cdef int put_slot(self, StreamBase stream, uint32_t sid) except -1:
        cdef uint32_t cap
        cdef uint32_t *free_slots
        if sid >= <uint32_t>len(self.slots):
            cap = max(<uint32_t>len(self.slots) * 2, <uint32_t>16)
            while cap <= sid:
                cap *= 2
            free_slots = <uint32_t *>realloc(self.free_slots, cap * sizeof(uint32_t))
            if free_slots is NULL:
                raise MemoryError()
            self.free_slots = free_slots
            self.slots.extend([None] * (cap - len(self.slots)))
        self.slots[sid] = stream
        stream.sid = sid
        stream.conn = self
        self.live += 1
        return 0

    cdef StreamBase get_slot(self, uint32_t sid):
        if sid < <uint32_t>len(self.slots):
            return <StreamBase>self.slots[sid]
        return None

    cdef int free_slot(self, StreamBase stream) except -1:
        """The stream's number may be used again; returns 0 if it was free already."""
        cdef uint32_t sid = stream.sid
        if sid >= <uint32_t>len(self.slots) or self.slots[sid] is not stream:
            return 0
        if stream.state & S_QUEUED:
            stream.state &= ~S_QUEUED
            for waiting in (self.waiting_credit, self.waiting_writer):
                if stream in waiting:
                    waiting.remove(stream)
        self.slots[sid] = None
        self.live -= 1
        if self.is_client:
            self.free_slots[self.free_len] = sid
            self.free_len += 1
        stream.conn = None
        stream.timer = INFINITY
        if self.is_client:
            self.on_slot_free()
        return 1

    cdef int arm(self, StreamBase stream, double when) except -1:
        stream.timer = when
        if when < self.min_timer:
            self.min_timer = when
        return 0

    cdef int sweep(self, double now) except -1:
        """Call every stream whose timer has passed, and find the next moment to sweep (``min_timer``)."""
        cdef uint32_t i
        cdef StreamBase stream
        cdef double next_timer = INFINITY
        self.now = now
        if self.live:
            self.min_timer = INFINITY  # a timer armed in a callback counts too
            for i in range(<uint32_t>len(self.slots)):
                stream = <StreamBase>self.slots[i]
                if stream is not None:
                    if stream.timer <= now:
                        stream.on_timer(now)
                    if stream.timer < next_timer:
                        next_timer = stream.timer
        self.min_timer = min(next_timer, self.min_timer) if self.live else INFINITY
        if self.pending:
            for entry in list(self.pending):
                stream = entry[0]
                if stream.timer <= now:
                    stream.on_timer(now)
                if stream.timer < self.min_timer and stream.state & S_PENDING:
                    self.min_timer = stream.timer
        return 0

    cdef list take_all_streams(self):
        """Empty the table; for a connection that is gone."""
        cdef list out = []
        cdef uint32_t i
        cdef StreamBase stream
        for i in range(<uint32_t>len(self.slots)):
            stream = <StreamBase>self.slots[i]
            if stream is not None:
                self.slots[i] = None
                if stream.mark >= max(self.tx_frames_bytes, self.handed_bytes):
                    stream.state &= ~S_WRITTEN  # still in our buffer: the peer has seen nothing of it
                stream.conn = None
                stream.timer = INFINITY
                stream.in_block = None
                stream.in_target = None
                out.append(stream)
        for entry in self.pending:
            stream = entry[0]
            stream.state &= ~S_PENDING
            out.append(stream)
        self.pending.clear()
        self.live = 0
        self.free_len = 0
        self.waiting_credit.clear()
        self.waiting_writer.clear()
        self.min_timer = INFINITY
        return out

    cdef int writable_again(self) except -1:
        cdef StreamBase stream
        self.congested = False
        while self.waiting_writer and not self.congested:
            stream = self.waiting_writer.popleft()
            stream.state &= ~S_QUEUED
            if stream.conn is self:
                stream.on_credit()
        return 0

    # ---- requests (client) -----------------------------------------------------------------------------------------------

    cdef int submit(self, StreamBase stream, str endpoint, object data, int kind, bytes meta, double deadline, double due,
                    double now) except -1:
        """Send a request, or let it wait for a free stream or credit. ``due`` is when the stream's timer fires first.

        Raises `MessageTooLarge` and `Overloaded`, both before anything was sent.
        """
        cdef int waiting
        cdef Py_ssize_t size = len(data) if type(data) is bytes else size_of(data)
        self.now = now
        if self.dead:  # since it was picked
            raise PeerLost(f"the connection to {self.peer} is gone", peer=self.peer, sent="no")
        if size > self.max_message:
            raise MessageTooLarge(
                f"a request of {size} bytes exceeds this side's limit of {self.max_message} bytes; raise "
                "DYN_TCP_MAX_MESSAGE_SIZE",
                size=size, limit=self.max_message, setting="DYN_TCP_MAX_MESSAGE_SIZE", peer=self.peer, sent="no",
            )  # fmt: skip
        if size > self.peer_max_message:
            raise MessageTooLarge(
                f"a request of {size} bytes exceeds the limit of {self.peer_max_message} bytes that {self.peer} accepts; raise "
                "DYN_TCP_MAX_MESSAGE_SIZE on the worker's side or send less",
                size=size, limit=self.peer_max_message, setting="DYN_TCP_MAX_MESSAGE_SIZE", peer=self.peer, sent="no",
            )  # fmt: skip
        if self.writer_blocked:
            if self.blocked >= self.channel_buffer:
                raise self.overloaded(
                    self.blocked, f"{self.peer} does not read; {self.blocked} requests wait for its connection's writer"
                )
            self.blocked += 1
        waiting = self.large_waiting() if size >= LARGE_BYTES else 0
        if waiting >= self.channel_buffer:
            raise self.overloaded(waiting, f"{waiting} large payloads already wait for {self.peer} to read")
        if self.pending or not self.may_request():
            if len(self.pending) >= self.channel_buffer:
                raise self.overloaded(
                    len(self.pending), f"{len(self.pending)} requests already wait for a free stream or credit of {self.peer}"
                )
            stream.state |= S_PENDING
            stream.conn = self
            stream.timer = due
            self.pending.append((stream, endpoint, data, kind, meta, deadline))
            self.min_timer = min(self.min_timer, due)
            return self.on_saturation()
        return self.send_request(stream, endpoint, data, kind, meta, deadline, due, now)

    cdef int send_pending(self) except -1:
        """Send requests that waited, as far as streams and credit go."""
        cdef StreamBase stream
        while self.pending and self.may_request() and not self.dead:
            stream, endpoint, data, kind, meta, deadline = self.pending.popleft()
            stream.state &= ~S_PENDING
            try:
                self.send_request(stream, endpoint, data, kind, meta, deadline, stream.timer, self.now)
            except (DynwireError, BufferError, ValueError) as error:
                # The request's own failure, not that of the frame that made room for it.
                stream.conn = None
                stream.on_lost(error if isinstance(error, DynwireError) else DynwireError(f"the payload cannot be sent: {error}"))
                continue
            if stream.state & S_STOP_EARLY:
                self.put_cancel(stream, 1)
            self.wrote()
        return 0

    cdef int forget_pending(self, StreamBase stream) except -1:
        """Nobody waits any more for a request that was not sent."""
        if stream.state & S_PENDING:
            stream.state &= ~S_PENDING
            stream.conn = None
            self.pending = collections.deque([entry for entry in self.pending if entry[0] is not stream])
        return 0

    cdef int refuse_after(self, uint32_t last_seq, object error) except -1:
        """The server has said that it takes no request after ``last_seq``: those can be repeated elsewhere."""
        cdef StreamBase stream
        # Aside first: a freed slot would send them to the server that is leaving.
        waiting, self.pending = self.pending, collections.deque()
        self.refuse_streams(last_seq, error)
        for entry in waiting:
            stream = entry[0]
            stream.state &= ~S_PENDING
            stream.conn = None
            stream.on_lost(error)
        return 0

    cdef int refuse_streams(self, uint32_t last_seq, object error) except -1:
        return 0

    cdef object overloaded(self, int depth, str text):
        return Overloaded(
            f"{text} (limit {self.channel_buffer}, set by DYN_TCP_CHANNEL_BUFFER)", depth=depth, limit=self.channel_buffer,
            peer=self.peer, sent="no",
        )  # fmt: skip

    cdef object item_too_large(self, int64_t size, int64_t limit, str endpoint):
        """(server) An item exceeds what one of the two sides takes."""
        side = "caller" if self.peer_max_message == limit else "worker"
        return MessageTooLarge(
            f"a reply item of {size} bytes from {endpoint} exceeds the {side}'s limit of {limit} bytes; "
            f"raise DYN_TCP_MAX_MESSAGE_SIZE on the {side}'s side",
            size=size, limit=limit, setting="DYN_TCP_MAX_MESSAGE_SIZE", phase="reply", sent="yes",
        )  # fmt: skip

    cdef bint check_alive(self, double now) except -1:
        """Ping a silent peer while calls wait for it. Returns False when it has not answered in time."""
        cdef double quiet_since
        if not self.live or self.keepalive_interval == INFINITY:
            self.ping_at = INFINITY
            return True
        # A large payload that is moving on is a sign of life too: the PING may stand behind megabytes of it.
        quiet_since = max(self.last_rx, self.live_since, self.last_tx)
        if self.ping_sent > quiet_since:
            self.ping_at = self.ping_sent + self.keepalive_timeout
            return now < self.ping_at
        if now >= quiet_since + self.keepalive_interval:
            self.put_ping()
            self.ping_sent = now
            # An answer does not move this: with a timeout longer than the interval the next PING would have to wait for it.
            self.ping_at = now + min(self.keepalive_timeout, self.keepalive_interval)
        else:
            self.ping_at = quiet_since + self.keepalive_interval
        return True


cdef Py_ssize_t size_of(object data) except -1:
    cdef Py_buffer view
    cdef Py_ssize_t size
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    size = view.len
    PyBuffer_Release(&view)
    return size
