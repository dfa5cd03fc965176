# Connections of the blocking side: callers' threads do the I/O themselves. Included by _tcpio.pyx and _httpio.pyx.
#
# One thread at a time reads a connection (the leader); it completes the calls of the others and wakes them. When its own call is
# done it hands the reading over to one that still waits. One thread at a time writes, and takes along what others have queued.
# All state is protected by the GIL, which is released in system calls only.

cdef extern from *:
    """
    static inline int dw_load(int *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    static inline void dw_store(int *p, int value) { __atomic_store_n(p, value, __ATOMIC_RELEASE); }
    """
    int dw_load(int *p) nogil
    void dw_store(int *p, int value) nogil

cdef enum:
    NOT_EXCHANGING = 0
    SENDING = 1                   # a thread is in `exchange` and has not sent yet
    HAS_SENT = 2                  # it has sent everything and now reads
    SLICE_MS = 100                # the longest that a thread sleeps in a system call before it looks at the clock again

cdef double STALE_S = 0.02        # a connection unused for longer is looked at before it is used: the peer may have closed it
cdef double STUCK_S = 5.0         # one whose peer has taken nothing for longer is replaced


cdef class Parker:
    """What a waiting thread sleeps on."""
    cdef sem_t sem
    cdef bint parked

    def __cinit__(self):
        sem_init(&self.sem, 0, 0)

    def __dealloc__(self):
        sem_destroy(&self.sem)


cdef int unpark(Parker parker) except -1:
    """Wake the thread that sleeps on it, if one does."""
    if parker is not None and parker.parked:
        parker.parked = False
        sem_post(&parker.sem)
    return 0


cdef class BlockingCall(CallFuture):
    cdef Parker parker

    cdef int wake(self, bint direct) except -1:
        unpark(self.parker)
        return 0


cdef class BlockingReader(ItemReader):
    cdef Parker parker

    cdef int wake(self, bint direct) except -1:
        unpark(self.parker)
        return 0


cdef class BlockingConnection(Machine):
    """A client connection without an event loop. Any thread may use it."""

    cdef int fd
    cdef object sock
    cdef bint reader_active
    cdef bint writer_active
    cdef size_t exchanged            # bytes that it sends
    cdef int exchanging              # state of a thread in `exchange`, which changes it without the GIL
    cdef list parkers                # of threads that wait while another one reads
    cdef readonly object close_error
    cdef double spin_s
    cdef int spin_misses
    cdef double idle_since
    cdef double blocked_at           # since when the socket has taken nothing; infinity while it takes everything
    cdef bint is_idle                # in the pool's list
    cdef TlsLayer tls
    cdef readonly object owner       # pool, until the connection is gone

    def __init__(self, sock, peer, RequestOptions options, owner, *, tls=None, tls_hostname=None, **limits):
        super().__init__(True, **limits)
        if tls is not None:
            self.tls = TlsLayer(tls, False, tls_hostname, peer)
        options.apply(self)
        self.sock = sock
        self.fd = sock.fileno()
        self.peer = peer
        self.parkers = []
        self.spin_s = options.spin_s
        self.blocked_at = INFINITY
        self.owner = owner
        self.last_rx = self.now = dw_now()

    def handshake(self, *, str software, bytes connection_id, token, double accept_timeout, double timeout):
        """Exchange HELLO within ``timeout`` seconds. Raises what ended the connection, `TimeoutError` when nothing came."""
        cdef double deadline = dw_now() + timeout
        cdef double left
        self.start(software=software, connection_id=connection_id, token=token,
                   accept_timeout_ms=<int>min(accept_timeout * 1000, 2e9))  # fmt: skip
        if self.tls is not None:
            self.read_in(0)  # begins the TLS handshake
        self.write_out(None)
        while not self.ready and not self.dead:
            left = deadline - dw_now()
            if left <= 0:
                self.lost(PeerLost(f"{self.peer} did not answer", peer=self.peer))
                raise TimeoutError
            if self.has_output() or self.tls is not None:
                self.write_out(None)
            self.read_in(min(left, SLICE_MS * 0.001))
        if self.dead:
            raise self.close_error

    cdef int on_hello(self, dict hello) except -1:
        return 0

    cdef int on_goaway(self, int code, uint32_t last_seq, str text) except -1:
        if code != GOAWAY_NORMAL or not self.ready:
            return self.lost(goaway_error(self, code, text))
        return self.refuse_after(last_seq, not_taken(self, text))

    cdef int on_request_sent(self, StreamBase stream) except -1:
        return name_request(self, <Waiter>stream)

    # ---- writing ----

    cdef int write_out(self, Waiter call) except -1:
        """Write what is queued, unless another thread is at it.

        With a ``call``, waits for the socket until everything is written or the call is over; without, never waits.
        """
        cdef dw_chunk chunks[MAX_CHUNKS]
        cdef int n, i
        cdef size_t total
        cdef ssize_t written
        cdef int fd = self.fd
        cdef int code
        if self.exchanging and not self.dead:
            self.end_exchange()
        if self.writer_active or self.dead:
            return 0
        self.writer_active = True
        try:
            while self.tls is not None and not self.dead:
                written = self.tls.push(fd)
                if written < 0:
                    return self.send_failed(errno)
                if written == 0:
                    self.blocked_at = min(self.blocked_at, dw_now())
                    if call is None or settled(call):
                        return 0
                    self.writer_blocked = True
                    self.now = dw_now()
                    self.wait_writable()
                    continue
                self.blocked_at = INFINITY
                if self.tls.shaking or not self.has_output():
                    return 0
                n = self.gather(chunks, 262144)
                if n == 0:
                    return 0
                total = 0
                for i in range(n):
                    total += chunks[i].len
                self.tls.encrypt(chunks, n)
                self.sent(total)
            while self.has_output() and not self.dead:
                n = self.gather(chunks, 1048576)
                if n == 0:
                    break
                total = 0
                for i in range(n):
                    total += chunks[i].len
                self.handed_bytes = self.handed_upto()
                with nogil:
                    written = dw_sendmsg(fd, chunks, n, MSG_DONTWAIT | MSG_NOSIGNAL)
                    code = errno
                if self.dead:
                    return 0
                self.handed_bytes = 0
                if written >= 0:
                    self.sent(written)
                    self.blocked_at = INFINITY
                    if <size_t>written == total:
                        continue
                else:
                    self.sent(0)
                    if code == EINTR:
                        PyErr_CheckSignals()
                        continue
                    if code != EAGAIN:
                        return self.send_failed(code)
                self.blocked_at = min(self.blocked_at, dw_now())
                if call is None or settled(call):
                    return 0
                self.writer_blocked = True
                self.now = dw_now()
                self.wait_writable()
                if settled(call):
                    return 0
        finally:
            self.writer_active = False
            self.writer_blocked = False
            self.blocked = 0
            if self.dead:
                self.close_descriptor()
        return 0

    cdef int wait_writable(self) except -1:
        """The socket is full. Read meanwhile: the peer may be waiting for that before it reads on."""
        cdef pollfd p
        cdef int r
        cdef double left = SLICE_MS
        p.fd = self.fd
        p.events = POLLOUT if self.reader_active else POLLOUT | POLLIN
        p.revents = 0
        with nogil:
            r = poll(&p, 1, <int>left)
        PyErr_CheckSignals()
        if self.dead:
            return 0
        if r > 0 and p.revents & POLLIN and not self.reader_active:
            self.read_in(0)
            self.hand_over()  # somebody may have seen that we read, and sleeps
        self.tick(dw_now())
        return 0

    cdef int send_failed(self, int code) except -1:
        return self.lost(PeerLost(
            f"the connection to {self.peer} broke while sending: {read_error_text(code)}", peer=self.peer, sent="maybe"
        ))  # fmt: skip

    cdef int exchange(self, double now) except -1:
        """Send what is queued and wait for the first bytes that come, with one release of the GIL for both.

        Does nothing when others use the connection too, or when there is more to it; what it leaves undone is for `write_out`
        and `wait`. While it reads, `write_out` of another thread notes on its behalf that it has sent.
        """
        cdef dw_chunk chunks[MAX_CHUNKS]
        cdef dw_chunk targets[MAX_TARGETS]
        cdef int places, parts
        cdef ssize_t written, n = -1
        cdef int code = EAGAIN
        cdef int fd = self.fd
        cdef double spin_until
        if (
            self.dead or self.tls is not None or self.writer_active or self.reader_active or self.live != 1
            or not self.one_piece() or self.next_wakeup() - now < SLICE_MS * 0.001
        ):  # fmt: skip
            return 0
        self.writer_active = True  # a machine may let other threads run meanwhile
        try:
            parts = self.gather(chunks, 1048576)
        finally:
            self.writer_active = False
        if parts != 1 or self.dead or self.reader_active:
            return 0
        places = self.recv_targets(targets)
        self.exchanged = chunks[0].len
        self.handed_bytes = self.tx_frames_bytes + self.exchanged
        self.writer_active = self.reader_active = True
        self.exchanging = SENDING
        try:
            with nogil:
                written = c_send(fd, chunks[0].base, chunks[0].len, MSG_DONTWAIT | MSG_NOSIGNAL)
                if written == <ssize_t>chunks[0].len:
                    dw_store(&self.exchanging, HAS_SENT)
                    if self.spin_s > 0 and self.spin_misses < 16:
                        spin_until = dw_now() + self.spin_s
                        while True:
                            n = dw_recv(fd, targets, places, MSG_DONTWAIT)
                            code = errno
                            if n >= 0 or code != EAGAIN or dw_now() >= spin_until:
                                break
                            sched_yield()
                        self.spin_misses = self.spin_misses + 1 if n < 0 and code == EAGAIN else 0
                    if n < 0 and code == EAGAIN:
                        n = dw_recv(fd, targets, places, 0)  # the socket's own timeout is one slice
                        code = errno
                else:
                    code = errno
            if self.exchanging == HAS_SENT:
                self.end_exchange()
            elif self.exchanging == SENDING:  # the socket took only a part, or nothing
                self.exchanging = NOT_EXCHANGING
                self.writer_active = False
                if not self.dead:
                    self.handed_bytes = 0
                    self.sent(max(written, 0))
                    if written < 0 and code != EAGAIN and code != EINTR:
                        self.send_failed(code)
                return 0
            if self.dead:
                return 0
            return self.take_in(n, code)
        finally:
            self.reader_active = False
            if self.dead:
                self.close_descriptor()

    cdef int end_exchange(self) except -1:
        """Note what a thread in `exchange` has sent, so that others can send too. That is a matter of microseconds."""
        while dw_load(&self.exchanging) == SENDING:
            with nogil:
                sched_yield()
        if self.exchanging == HAS_SENT:
            self.exchanging = NOT_EXCHANGING
            self.writer_active = False
            if not self.dead:
                self.handed_bytes = 0
                self.sent(self.exchanged)
        return 0

    cdef int wrote(self) except -1:
        return 0  # whoever is reading or calling writes before it sleeps

    # ---- reading ----

    cdef int read_in(self, double seconds) except -1:
        """Read once, waiting at most ``seconds``; the caller is the leader or the only user."""
        cdef dw_chunk targets[MAX_TARGETS]
        cdef int places
        cdef ssize_t n = -1
        cdef pollfd p
        cdef int fd = self.fd
        cdef int code = EAGAIN
        cdef int r = 1
        cdef double spin_until
        if self.dead:
            return 0
        self.reader_active = True
        try:
            if self.tls is not None:
                return self.read_in_tls(seconds)
            places = self.recv_targets(targets)
            with nogil:
                if self.spin_s > 0 and seconds > 0 and self.spin_misses < 16:
                    spin_until = dw_now() + self.spin_s
                    while True:
                        n = dw_recv(fd, targets, places, MSG_DONTWAIT)
                        code = errno
                        if n >= 0 or code != EAGAIN or dw_now() >= spin_until:
                            break
                        sched_yield()
                    if n < 0 and code == EAGAIN:
                        self.spin_misses += 1
                    else:
                        self.spin_misses = 0
                if n < 0 and code == EAGAIN:
                    if seconds < SLICE_MS * 0.001:
                        p.fd = fd
                        p.events = POLLIN
                        p.revents = 0
                        r = poll(&p, 1, <int>(seconds * 1000 + 0.999))
                        code = errno
                        if r > 0:
                            n = dw_recv(fd, targets, places, MSG_DONTWAIT)
                            code = errno
                        elif r == 0:
                            code = EAGAIN
                    else:
                        n = dw_recv(fd, targets, places, 0)  # the socket's own timeout is one slice
                        code = errno
            if self.dead:
                return 0
            # Still the leader: what is called back may run Python code, and with it other threads.
            return self.take_in(n, code)
        finally:
            self.reader_active = False
            if self.dead:
                self.close_descriptor()

    cdef int read_in_tls(self, double seconds) except -1:
        """`read_in` over TLS; the caller has made itself the reader."""
        cdef dw_chunk targets[MAX_TARGETS]
        cdef pollfd p
        cdef ssize_t n
        cdef int code
        cdef int came = 0
        cdef bint waited = False
        while not self.dead:
            self.recv_targets(targets)
            try:
                n = self.tls.recv(self.fd, &targets[0], not came)
                code = errno
            except ConnectError as error:
                self.lost(error)
                return came
            if n > 0:
                came = 1
                self.take_in(n, 0)
                continue
            if self.tls.waiting():
                self.write_out(None)  # of the handshake, say
            if n == TLS_EMPTY:
                return came  # the reader's own call may be over: others take their turn
            if n == 0 or code != EAGAIN:
                self.take_in(n, code)
                return came
            if waited or came or seconds <= 0:
                return came
            waited = True
            p.fd = self.fd
            p.events = POLLIN
            p.revents = 0
            with nogil:
                poll(&p, 1, <int>(seconds * 1000 + 0.999))
            PyErr_CheckSignals()
        return came

    cdef int take_in(self, ssize_t n, int code) except -1:
        """Deal with the outcome of a read. Returns 1 if something came."""
        if n > 0:
            try:
                self.received(n, dw_now())
            except DynwireError as error:
                self.broken(error)
            except Exception as error:
                self.lost(PeerLost(f"the connection to {self.peer} was given up: {error!r}", peer=self.peer, sent="maybe"))
                raise
            return 1
        if n == 0:
            self.lost(PeerLost(f"{self.peer} closed the connection", peer=self.peer, sent="maybe"))
        elif code == EINTR or code == EAGAIN:
            PyErr_CheckSignals()  # also after a slice: a signal may have come just before the system call
        else:
            self.lost(PeerLost(
                f"the connection to {self.peer} broke while receiving: {read_error_text(code)}", peer=self.peer, sent="maybe"
            ))  # fmt: skip
        return 0

    cdef int broken(self, object error) except -1:
        self.farewell(str(error))
        self.write_out(None)
        return self.lost(error)

    cdef int tick(self, double now) except -1:
        """Timers of all calls on the connection, and the keep-alive ping."""
        if now >= self.next_wakeup() and not self.dead:
            self.time_passed(now)
            if not self.dead and not self.check_alive(now):
                self.lost(silent_error(self, now))
        return 0

    cdef int wait(self, Waiter call) except -1:
        """Until the call is settled: read, or sleep while another thread reads."""
        cdef double now, left
        cdef Parker parker = None
        while not settled(call):
            if (self.has_output() or self.tls is not None and self.tls.waiting()) and not self.dead:
                self.write_out(call)
                if settled(call):
                    break
            if self.dead or self.reader_active:
                # Another thread reads, or is in lost() and will settle the call.
                if parker is None:
                    parker = my_parker()
                    set_parker(call, parker)
                else:
                    self.park(parker)
                continue
            now = dw_now()
            left = self.next_wakeup() - now
            if left <= 0:
                self.tick(now)
                continue
            self.read_in(min(left, SLICE_MS * 0.001))
        self.hand_over()
        return 0

    cdef int park(self, Parker parker) except -1:
        """Sleep until somebody wakes this thread: its call is settled, or it is to read on. Half a second at the most."""
        cdef int r
        self.parkers.append(parker)
        parker.parked = True
        with nogil:
            r = dw_sem_wait(&parker.sem, 0.5)
        self.parkers.remove(parker)
        if not parker.parked and r != 0:
            sem_trywait(&parker.sem)  # woken and timed out at once: the count must not stay
        parker.parked = False
        if r != 0:
            PyErr_CheckSignals()
        return 0

    cdef int hand_over(self) except -1:
        """Wake one waiting thread, so that somebody reads on."""
        if self.parkers and not self.reader_active:
            unpark(<Parker>self.parkers[0])
        return 0

    cdef int look(self) except -1:
        """Take notice of what has come while nobody was reading: the end of the connection, say."""
        cdef pollfd p
        cdef int r = 1
        while r > 0 and not self.dead and not self.reader_active:
            p.fd = self.fd
            p.events = POLLIN
            p.revents = 0
            r = poll(&p, 1, 0)
            if r > 0:
                self.read_in(0)
        if self.has_output() and not self.dead:
            self.write_out(None)
        return self.hand_over()

    # ---- end ----

    cdef int lost(self, object error) except -1:
        cdef list streams
        if self.dead:
            return 0
        self.dead = True
        self.ready = False
        self.close_error = error
        # Wakes a thread that sleeps in recv or poll on it; the descriptor itself is closed when nobody can be using it.
        c_shutdown(self.fd, SHUT_RDWR)
        streams = self.take_all_streams()
        for stream in streams:
            (<StreamBase>stream).on_lost(error)
        for parker in list(self.parkers):
            unpark(<Parker>parker)
        owner, self.owner = self.owner, None
        if owner is not None:
            owner.gone(self)
        return self.close_descriptor()

    cdef int close_descriptor(self) except -1:
        """Close it if no thread can be in a system call on it; otherwise that thread does so when it comes back."""
        if not self.reader_active and not self.writer_active:
            self.sock.close()
        return 0

    def close(self, error=None):
        """Close now; calls in flight end with ``error``."""
        self.lost(error or ManagerClosed(f"the connection to {self.peer} was closed", peer=self.peer, sent="maybe"))

    def forget(self):
        """Close our copy of the descriptor and tell nobody: for the child after a fork."""
        error = ForkedManager(f"the connection to {self.peer} belongs to the process before fork()", peer=self.peer, sent="maybe")
        self.dead = True
        self.close_error = error
        for stream in self.take_all_streams():
            (<StreamBase>stream).on_lost(error)
        self.reader_active = self.writer_active = False
        self.exchanging = NOT_EXCHANGING
        self.sock.close()


cdef inline bint settled(Waiter call):
    """Is there something to hand to the waiting thread?"""
    if type(call) is BlockingCall:
        return call.outcome != PENDING
    return (<ItemReader>call).head < len((<ItemReader>call).items) or (<ItemReader>call).finished


cdef inline int set_parker(Waiter call, Parker parker) except -1:
    if type(call) is BlockingCall:
        (<BlockingCall>call).parker = parker
    else:
        (<BlockingReader>call).parker = parker
    return 0


cdef object _thread_local = threading.local()


cdef Parker my_parker():
    """The calling thread's semaphore."""
    parker = getattr(_thread_local, "parker", None)
    if parker is None:
        parker = _thread_local.parker = Parker()
    return <Parker>parker


cdef class BlockingPool:
    """Connections to one address. An idle one is used first, then a new one is opened up to the limit, then calls share.

    ``open_connection(pool, timeout)`` returns a connected `BlockingConnection` or raises.
    """

    cdef BlockingConnection top      # not in use, the last used; the list without it
    cdef list idle                   # not in use, the last used at the end
    cdef list connections            # all
    cdef int opening
    cdef readonly int limit
    cdef object open_connection
    cdef object changed              # condition: a connection was opened, or could not be
    cdef readonly str address
    cdef bint closed
    cdef double idle_timeout         # an unused connection is closed after this long, when the next call ends
    cdef int max_idle                # and at once beyond this number of them

    def __init__(self, str address, int limit, open_connection, *, double idle_timeout=60.0, int max_idle=65535):
        self.address = address
        self.limit = limit
        self.idle_timeout = idle_timeout
        self.max_idle = max_idle
        self.open_connection = open_connection
        self.changed = threading.Condition()
        self.idle = []
        self.connections = []

    cdef BlockingConnection acquire(self, double limit, bint fresh, double now):
        """A connection to send on, within ``limit`` seconds; ``release`` it when the call or stream has ended.

        ``fresh``: look at an idle one in any case, not only when it was idle for long.
        """
        cdef BlockingConnection conn
        cdef double deadline = now + limit
        cdef double left
        while True:
            while self.top is not None or self.idle:
                if self.top is not None:
                    conn, self.top = self.top, None
                else:
                    conn = self.idle.pop()
                conn.is_idle = False
                if now - conn.idle_since > self.idle_timeout:
                    self.discard(conn)
                    continue
                if not conn.dead and not conn.draining and (fresh or now - conn.idle_since > STALE_S):
                    conn.look()
                elif conn.has_output():
                    conn.write_out(None)  # credit, which the last call's end has left behind
                # What still waits to be written is in the hands of another thread, or the peer is busy for a moment.
                if conn.dead or conn.draining or (conn.has_output() and now - conn.blocked_at > STUCK_S):
                    self.discard(conn)
                    continue
                return conn
            if self.closed:
                raise ManagerClosed("the client is closed", peer=self.address)
            left = deadline - dw_now()
            if len(self.connections) + self.opening < self.limit:
                self.opening += 1
                try:
                    conn = self.open_connection(self, left)
                finally:
                    self.opening -= 1
                    with self.changed:
                        self.changed.notify_all()
                if self.closed:
                    conn.close()
                    raise ManagerClosed("the client is closed", peer=self.address)
                if conn.dead:
                    raise conn.close_error
                self.connections.append(conn)
                return conn
            best = None
            for candidate in self.connections:
                conn = candidate
                if not conn.dead and not conn.draining and (best is None or conn.live < (<BlockingConnection>best).live):
                    best = conn
            if best is not None:
                return <BlockingConnection>best
            if left <= 0:
                raise ConnectError(
                    f"no usable connection to {self.address} within {limit:.3g} s: all {self.limit} (DYN_TCP_POOL_SIZE) are "
                    "being opened or closed",
                    peer=self.address,
                )
            with self.changed:
                self.changed.wait(min(left, 0.1))

    cdef int release(self, BlockingConnection conn) except -1:
        cdef BlockingConnection first
        if conn.dead or conn.draining and conn.live == 0:
            self.discard(conn)
        elif conn.live == 0 and not conn.is_idle:
            if self.max_idle == 0:
                return self.discard(conn)
            conn.is_idle = True
            conn.idle_since = conn.now  # of its last event
            if self.top is not None:
                self.idle.append(self.top)
            self.top = conn
            if self.idle:
                first = <BlockingConnection>self.idle[0]
                if <int>len(self.idle) >= self.max_idle or self.top.now - first.idle_since > self.idle_timeout:
                    self.idle.pop(0)
                    self.discard(first)
        return 0

    cdef int discard(self, BlockingConnection conn) except -1:
        if conn in self.connections:
            self.connections.remove(conn)
        if not conn.dead:
            conn.close()
        return 0

    def gone(self, conn):
        """A connection has ended."""
        if conn is self.top:
            self.top = None
        if conn in self.idle:
            self.idle.remove(conn)
        if conn in self.connections:
            self.connections.remove(conn)

    def connect(self, timeout=None):
        """Make sure that there is a connection; raises what `open_connection` raises."""
        if not self.connections:
            self.release(self.acquire(3.0 if timeout is None else timeout, True, dw_now()))

    def close(self):
        self.closed = True
        for conn in list(self.connections):
            (<BlockingConnection>conn).close()
        self.top = None
        self.idle.clear()

    def forget(self):
        """Drop everything without telling the peers: for the child after a fork."""
        self.closed = True
        for conn in self.connections:
            (<BlockingConnection>conn).forget()
        self.connections = []
        self.top = None
        self.idle = []

    def stats(self):
        return [(<BlockingConnection>conn).stats() for conn in list(self.connections)]


cdef class BlockingSocketChannel(ChannelBase):
    """Blocking calls to one instance (see `dynwire.planes.base.Channel`). Any thread may call."""

    cdef readonly BlockingPool pool
    cdef RequestOptions options
    cdef str endpoint

    def __init__(self, instance, BlockingPool pool, RequestOptions options):
        self.instance = instance
        self.pool = pool
        self.options = options
        self.endpoint = instance.path
        self.peer = instance.address

    cdef BlockingConnection start(self, Waiter call, object payload, object timeouts, object reply_type, Context context):
        cdef BlockingConnection conn
        cdef int kind = 0
        cdef double now, limit
        cdef bytes meta
        cdef object data = encode_payload(payload, &kind, self.options.kind)
        call.reply_type = reply_type
        now = dw_now()
        set_limits(call, self.options, timeouts, context, now)
        meta = request_meta(context)
        if context is not None and context._flags & CTX_KILLED:
            raise Cancelled("the request was killed by its context before it was sent", peer=self.peer, sent="no")
        limit = self.options.connect_timeout
        if timeouts is not None and isinstance(timeouts, Timeouts) and timeouts.connect is not None:
            limit = timeouts.connect
        conn = self.pool.acquire(min(limit, call.total_deadline - now), type(call) is BlockingReader, now)
        now = dw_now()
        if now >= call.total_deadline:
            self.pool.release(conn)
            raise call.timeout_error(now)
        if call.phase_deadline < now + call.phase_timeout:
            call.phase_deadline = now + call.phase_timeout  # opening a connection does not count towards the accept timeout
        if context is not None:
            call.context = context
            context._canceller = call._cancel_request
        try:
            conn.submit(
                call, self.endpoint, data, kind, meta, call.total_deadline, min(call.total_deadline, call.phase_deadline), now
            )
        except BaseException:
            if context is not None:
                context._canceller = None
            self.pool.release(conn)
            raise
        call.channel = self
        self.in_flight += 1
        return conn

    def call(self, payload, timeouts=None, reply_type=None, Context context=None):
        cdef BlockingCall call = BlockingCall.__new__(BlockingCall)
        cdef BlockingConnection conn
        conn = self.start(call, payload, timeouts, reply_type, context)
        try:
            conn.exchange(conn.now)
            if call.outcome == PENDING:
                conn.write_out(call)
                conn.wait(call)
            else:
                conn.hand_over()
        except BaseException:
            # Ctrl-C, say: nobody waits any more.
            if call.outcome == PENDING:
                call.outcome = CANCELLED
                call.give_up(call.conn)
                call.settle()
                if not conn.dead:
                    conn.write_out(call)
            conn.hand_over()
            self.pool.release(conn)
            raise
        if call.outcome != RESULT and not conn.dead:
            conn.write_out(None)  # if it was given up, the handler is to know now and not with the next request
        self.pool.release(conn)
        if call.outcome == RESULT:
            return call.value
        raise call.value or PeerLost(f"the connection to {self.peer} is gone", peer=self.peer, sent="maybe")

    def stream(self, payload, timeouts=None, reply_type=None, Context context=None):
        cdef BlockingReader reader = BlockingReader.__new__(BlockingReader)
        cdef BlockingConnection conn
        cdef BlockingItemStream stream
        if context is None:
            context = inheriting_context()
        conn = self.start(reader, payload, timeouts, reply_type, context)
        reader.source = conn
        stream = BlockingItemStream.__new__(BlockingItemStream)
        stream.reader = reader
        stream.conn = conn
        stream.pool = self.pool
        conn.write_out(reader)
        return stream


cdef class BlockingItemStream:
    """Items of one streamed reply, for a blocking caller. One thread at a time may iterate; any thread may close.

    ``again(error, context)`` is called, if it is set, when the request fails before its first item: it returns the stream of
    another attempt, with which this one goes on, or raises.
    """

    cdef BlockingReader reader
    cdef BlockingConnection conn
    cdef BlockingPool pool
    cdef public object again
    cdef bint closed

    def __init__(self):
        raise TypeError("made by a channel only")

    @property
    def context(self):
        return self.reader.context

    @property
    def delivered(self):
        """Items handed out so far."""
        return self.reader.delivered

    def __iter__(self):
        return self

    def __next__(self):
        cdef BlockingReader reader = self.reader
        cdef BlockingConnection conn = self.conn
        cdef PyObject *result = NULL
        while reader.head >= len(reader.items):
            if reader.finished or reader.closed or conn is None:
                self.end()
                if reader.value is not None:
                    error = reader.value
                    reader.value = None
                    if self.again is None or reader.delivered or self.closed:
                        raise error
                    self.take_over(self.again(error, reader.context))
                    reader, conn = self.reader, self.conn
                    continue
                raise StopIteration
            reader.await_item()
            try:
                conn.wait(reader)
            except BaseException:
                self.close()
                conn.hand_over()
                raise
            finally:
                reader.waiting = False
                reader.parker = None
        reader.take(&result)
        item = <object>result
        Py_DECREF(item)
        return item

    cdef int take_over(self, BlockingItemStream other) except -1:
        self.reader, self.conn, self.pool = other.reader, other.conn, other.pool
        other.reader = other.conn = None
        if self.closed:  # by another thread, meanwhile
            self.close()
        return 0

    cdef int end(self) except -1:
        cdef BlockingConnection conn = self.conn
        self.conn = None
        if conn is not None:
            if conn.has_output() and not conn.dead:
                conn.write_out(None)
            self.pool.release(conn)
        return 0

    def close(self):
        """Give up: kills the handler if it still runs, drops queued items. May be called twice."""
        self.closed = True
        self.reader.close()
        self.end()

    def __del__(self):
        if self.reader is not None and not self.reader.closed:
            self.close()
