# Connections of the asyncio side, client and server. Included by _tcpio.pyx and _httpio.pyx, which name the Machine: the state
# machine of their wire, a subclass of Link.


cdef class AsyncConnection(Machine):
    """A connection that lives on an event loop. Used from the loop's thread only."""

    cdef int fd
    cdef object sock
    cdef readonly object loop
    cdef bint reading
    cdef bint flush_scheduled
    cdef size_t flush_at
    cdef object timer_handle
    cdef double armed_at
    cdef object flush_callback
    cdef public object on_drained    # called once when everything queued has been written
    cdef public object on_closed     # called once with the error when the connection is gone
    cdef readonly object close_error
    cdef double spin_s
    cdef double spin_until
    cdef bint spinning
    cdef int spin_misses
    cdef TlsLayer tls
    cdef size_t read_bytes           # (server) most that is read at a time

    def __init__(self, bint is_client, loop, sock, peer, *, spin_us=0.0, tls=None, tls_hostname=None, **limits):
        super().__init__(is_client, **limits)
        if tls is not None:
            self.tls = TlsLayer(tls, not is_client, tls_hostname, peer)
        self.loop = loop
        self.sock = sock
        self.fd = sock.fileno()
        self.peer = peer
        self.armed_at = INFINITY
        self.last_rx = self.now = dw_now()
        self.flush_callback = self._flush_soon
        self.spin_s = spin_us * 1e-6
        self.read_bytes = <size_t>-1 if is_client else FIRST_READ

    def open(self):
        """Start to read, and write what is queued."""
        self.loop.add_reader(self.fd, self._on_readable)
        self.reading = True
        self.flush()

    def _on_readable(self):
        self._read(8)
        if self.spin_s > 0 and not self.spinning and not self.dead:
            self._start_spin()

    cdef int _read(self, int rounds) except -1:
        """Read what is there, at most ``rounds`` times a buffer, then write what that caused. Returns bytes read."""
        cdef dw_chunk targets[MAX_TARGETS]
        cdef int places
        cdef ssize_t n
        cdef int total = 0
        cdef double began = 0.0
        cdef double before, after
        if self.dead:
            return 0
        self.in_dispatch = True
        self.flush_at = EARLY_FLUSH
        try:
            while (rounds > 0 or self.tls is not None) and self.reading and not self.dead:
                rounds -= 1
                places = self.recv_targets(targets)
                if places == 1:  # a read into two places has to fill the first one
                    targets[0].len = min(targets[0].len, self.read_bytes)
                if self.tls is not None:
                    # A record may end anywhere: what has been read already has to be taken.
                    n = self.tls.recv(self.fd, &targets[0], rounds >= 0)
                    if n == TLS_EMPTY:
                        break
                else:
                    n = dw_recv(self.fd, targets, places, MSG_DONTWAIT)
                if n > 0:
                    total += n
                    before = dw_now()
                    self.received(n, before)
                    if self.to_wake:
                        wake_readers(self)
                    # One connection may not keep the others waiting, nor whatever else the loop has to do, with what it sends.
                    after = dw_now()
                    if began == 0.0:
                        began = before
                    if after > began + TURN_S:
                        rounds = 0
                    if after > before + TURN_S:
                        self.read_bytes = max(min(self.read_bytes, <size_t>n) // 2, <size_t>LEAST_READ)
                    elif <size_t>n == self.read_bytes and after < before + TURN_S / 4:
                        self.read_bytes *= 2
                    if <size_t>n < targets[0].len and self.tls is None:
                        break
                    if places == 2 and <size_t>n == targets[0].len and not self.more_expected():
                        break  # a payload is complete and nothing is behind it
                    continue
                if n == 0:
                    self.lost(PeerLost(f"{self.peer} closed the connection", peer=self.peer, sent="maybe"))
                elif errno == EINTR:
                    continue
                elif errno != EAGAIN:
                    self.lost(PeerLost(
                        f"the connection to {self.peer} broke while receiving: {read_error_text(errno)}",
                        peer=self.peer, sent="maybe",
                    ))  # fmt: skip
                break
        except DynwireError as error:
            self.protocol_failure(error)
        except Exception as error:
            self.loop.call_exception_handler({"message": f"reading from {self.peer} failed", "exception": error})
            self.lost(PeerLost(f"the connection to {self.peer} was given up: {error!r}", peer=self.peer, sent="maybe"))
        finally:
            if self.to_wake:
                wake_readers(self)  # what had come before an error is delivered
            self.in_dispatch = False
            if not self.is_client:
                leave_task(self.loop)
        if not self.dead:
            if (self.has_output() or self.tls is not None) and not self.writer_blocked:
                self.flush()
            if self.next_wakeup() < self.armed_at:
                self.set_timer()
        return total

    cdef int protocol_failure(self, object error) except -1:
        """The peer broke the protocol: tell it why, and close."""
        if self.dead:
            return 0
        self.farewell(str(error))
        self.flush()
        if self.is_client:
            # The end comes first: close() with unread bytes is a reset, which can overtake what flush() has sent.
            c_shutdown(self.fd, SHUT_RDWR)
        return self.lost(error)

    cdef int broken(self, object error) except -1:
        return self.protocol_failure(error)

    cdef int wrote(self) except -1:
        """Something was queued: write it at the end of the read callback or of this turn of the loop."""
        if self.writer_blocked:
            self.check_backlog()
            if self.next_wakeup() < self.armed_at:
                self.set_timer()
        elif self.in_dispatch:
            if self.output_backlog() >= self.flush_at and not self.dead:
                self.flush()
                self.flush_at = min(self.flush_at * 4, LAST_EARLY_FLUSH)
        elif not self.flush_scheduled and not self.writer_blocked and not self.dead:
            self.flush_scheduled = True
            self.loop.call_soon(self.flush_callback)
        return 0

    def _flush_soon(self):
        self.flush_scheduled = False
        if not self.dead:
            if not self.writer_blocked:
                self.flush()
            if self.next_wakeup() < self.armed_at:
                self.set_timer()
            if self.spin_s > 0 and not self.spinning and self.reading:
                self._start_spin()

    cdef int flush(self) except -1:
        cdef dw_chunk chunks[MAX_CHUNKS]
        cdef int n, i
        cdef size_t total
        cdef ssize_t written
        if self.tls is not None:
            return self.flush_tls()
        while self.has_output() and not self.dead:
            n = self.gather(chunks, 1048576)
            if n == 0:
                break
            total = 0
            for i in range(n):
                total += chunks[i].len
            written = dw_sendmsg(self.fd, chunks, n, MSG_DONTWAIT | MSG_NOSIGNAL)
            if written < 0:
                if errno == EINTR:
                    self.sent(0)
                    continue
                if errno == EAGAIN:
                    self.sent(0)
                    return self.wait_writable()
                code = errno
                self.sent(0)
                return self.lost(PeerLost(
                    f"the connection to {self.peer} broke while sending: {read_error_text(code)}", peer=self.peer, sent="maybe"
                ))  # fmt: skip
            self.sent(written)
            if <size_t>written < total:
                return self.wait_writable()
        if self.writer_blocked and not self.dead:
            self.writer_blocked = False
            self.loop.remove_writer(self.fd)
        return self.drained()

    cdef int flush_tls(self) except -1:
        cdef dw_chunk chunks[MAX_CHUNKS]
        cdef int n, i
        cdef size_t total
        cdef ssize_t pushed
        while not self.dead:
            pushed = self.tls.push(self.fd)
            if pushed < 0:
                return self.lost(PeerLost(
                    f"the connection to {self.peer} broke while sending: {read_error_text(errno)}", peer=self.peer, sent="maybe"
                ))  # fmt: skip
            if pushed == 0:
                return self.wait_writable()
            if self.tls.shaking or not self.has_output():
                break
            n = self.gather(chunks, 262144)
            if n == 0:
                break
            total = 0
            for i in range(n):
                total += chunks[i].len
            self.tls.encrypt(chunks, n)
            self.sent(total)
        if self.writer_blocked and not self.dead:
            self.writer_blocked = False
            self.loop.remove_writer(self.fd)
        return self.drained()

    cdef int wait_writable(self) except -1:
        if not self.writer_blocked and not self.dead:
            self.writer_blocked = True
            self.loop.add_writer(self.fd, self._on_writable)
        return self.check_backlog()

    cdef int check_backlog(self) except -1:
        cdef size_t backlog = self.output_backlog()
        if backlog > CONGESTED_BYTES:
            self.congested = True
            if backlog > STOP_READING_BYTES and self.reading and not self.is_client:
                # Whoever does not read its replies may not send more requests.
                self.reading = False
                self.loop.remove_reader(self.fd)
        elif self.congested and backlog < CONGESTED_BYTES // 4:
            self.drained()
        return 0

    def _on_writable(self):
        if not self.dead:
            self.now = dw_now()
            self.flush()

    cdef int drained(self) except -1:
        """The backlog is gone, or small enough."""
        if self.congested and not self.dead:
            if not self.reading:
                self.reading = True
                self.loop.add_reader(self.fd, self._on_readable)
                if self.tls is not None:
                    self.loop.call_soon(self._on_readable)  # for what it had read before it stopped
            self.writable_again()
        if self.on_drained is not None and not self.has_unsent():
            callback, self.on_drained = self.on_drained, None
            callback()
        return 0

    @property
    def unsent(self):
        """True while something waits for the socket, or for the peer to read."""
        return self.has_unsent() or self.tls is not None and self.tls.waiting()

    # ---- time ----

    cdef int set_timer(self) except -1:
        cdef double when = self.next_wakeup()
        cdef double delay
        if when >= self.armed_at or when == INFINITY or self.dead:
            return 0
        if self.timer_handle is not None:
            self.timer_handle.cancel()
        delay = when - dw_now()
        # Timers are rounded up to 2 ms, so that many deadlines close together are one wake-up.
        self.timer_handle = self.loop.call_later(delay if delay > 0.002 else 0.002, self._on_timer)
        self.armed_at = when
        return 0

    def _on_timer(self):
        cdef double now = dw_now()
        self.timer_handle = None
        self.armed_at = INFINITY
        if self.dead:
            return
        self.time_passed(now)
        if not self.dead:
            if self.has_output() and not self.writer_blocked:
                self.flush()
            self.set_timer()

    # ---- spinning ----

    cdef int _start_spin(self) except -1:
        if self.spin_misses >= 16:
            # Nothing came within the window many times in a row: it only burns the CPU. Try again after a while.
            self.spin_misses += 1
            if self.spin_misses < 1024:
                return 0
            self.spin_misses = 8
        self.spinning = True
        self.spin_until = dw_now() + self.spin_s
        self.loop.call_soon(self._spin)
        return 0

    def _spin(self):
        """Look for data instead of sleeping in the poll: waking an idle core costs more than a whole call on a busy one."""
        cdef double now
        if self.dead or not self.reading:
            self.spinning = False
            return
        if self._read(4):
            self.spin_misses = 0
            self.spin_until = dw_now() + self.spin_s
        else:
            now = dw_now()
            if now >= self.spin_until:
                self.spinning = False
                self.spin_misses += 1
                return
            with nogil:
                sched_yield()
        if self.dead:
            self.spinning = False
        else:
            self.loop.call_soon(self._spin)

    # ---- end ----

    cdef int lost(self, object error) except -1:
        """The connection is gone or given up. Every stream learns it; nothing is written any more."""
        cdef list streams
        if self.dead:
            return 0
        self.dead = True
        self.ready = False
        self.close_error = error
        if self.reading:
            self.loop.remove_reader(self.fd)
            self.reading = False
        if self.writer_blocked:
            self.loop.remove_writer(self.fd)
            self.writer_blocked = False
        if self.timer_handle is not None:
            self.timer_handle.cancel()
            self.timer_handle = None
        self.close_socket()
        streams = self.take_all_streams()
        self.before_lost(error)
        for stream in streams:
            (<StreamBase>stream).on_lost(error)
        drained, self.on_drained = self.on_drained, None
        if drained is not None:
            drained()
        callback, self.on_closed = self.on_closed, None
        if callback is not None:
            callback(self, error)
        return 0

    cdef int close_socket(self) except -1:
        self.sock.close()
        return 0

    cdef int before_lost(self, object error) except -1:
        return 0

    def close(self, error=None):
        """Close now; streams in flight end with ``error``."""
        if not self.dead:
            self.in_dispatch = True  # written below, also if the loop is closed already
            self.last_words()
            self.in_dispatch = False
            if not self.writer_blocked:
                self.flush()
                if self.tls is not None and not self.dead:
                    self.tls.say_goodbye()
                    self.tls.push(self.fd)
            self.lost(error or ManagerClosed(f"the connection to {self.peer} was closed", peer=self.peer, sent="maybe"))


cdef class AsyncClientConnection(AsyncConnection):
    """The calling side."""

    cdef object hello_waiter          # future that handshake() resolves when the server's HELLO has come
    cdef public object on_saturated   # called when a request had to wait
    cdef int accept_timeout_ms

    def __init__(self, loop, sock, peer, RequestOptions options, **limits):
        super().__init__(True, loop, sock, peer, spin_us=options.spin_s * 1e6, **limits)
        options.apply(self)
        self.accept_timeout_ms = <int>min(options.accept_timeout * 1000, 2e9)

    def handshake(self, waiter, *, str software, bytes connection_id, token):
        """Send preface and HELLO; ``waiter`` is a future that gets the server's limits, or the error."""
        self.hello_waiter = waiter
        self.start(software=software, connection_id=connection_id, token=token, accept_timeout_ms=self.accept_timeout_ms)
        self.open()
        if self.tls is not None:
            self._on_readable()  # begins the handshake

    cdef int on_hello(self, dict hello) except -1:
        waiter, self.hello_waiter = self.hello_waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(hello)
        return 0

    cdef int on_goaway(self, int code, uint32_t last_seq, str text) except -1:
        if code != GOAWAY_NORMAL or not self.ready:
            return self.lost(goaway_error(self, code, text))
        self.refuse_after(last_seq, not_taken(self, text))
        return self.on_saturation()

    cdef int on_saturation(self) except -1:
        callback = self.on_saturated
        if callback is not None:
            callback(self)
        return 0

    cdef int before_lost(self, object error) except -1:
        waiter, self.hello_waiter = self.hello_waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_exception(error)
        return 0

    @property
    def busy(self):
        """True while a further request would have to wait."""
        return bool(self.writer_blocked or self.pending)

    cdef int on_request_sent(self, StreamBase stream) except -1:
        return name_request(self, <Waiter>stream)

    cdef int start_call(self, Waiter call, ChannelBase channel, object data, int kind, bytes meta, str endpoint,
                        double now) except -1:
        self.submit(call, endpoint, data, kind, meta, call.total_deadline, min(call.total_deadline, call.phase_deadline), now)
        call.channel = channel
        channel.in_flight += 1
        if self.in_dispatch:
            self.wrote()
        elif self.live == 1 and not calls_follow() and not self.writer_blocked and not self.flush_scheduled:
            self.flush()  # nothing else is in flight, so there is nothing to wait for
            if self.next_wakeup() < self.armed_at:
                self.set_timer()
            if self.spin_s > 0 and not self.spinning and not self.dead:
                self._start_spin()
        else:
            self.wrote()
        return 0

    cdef int drained(self) except -1:
        self.blocked = 0
        return AsyncConnection.drained(self)

    cdef int time_passed(self, double now) except -1:
        AsyncConnection.time_passed(self, now)
        if not self.dead and not self.check_alive(now):
            self.lost(silent_error(self, now))
        return 0


cdef class AsyncSocketChannel(ChannelBase):
    """Calls to one instance over the connections to its address (see `dynwire.planes.base.AsyncChannel`)."""

    cdef AsyncClientConnection conn
    cdef readonly object pool         # the connections to the address, and how to open more
    cdef RequestOptions options
    cdef str endpoint
    cdef object loop

    def __init__(self, instance, pool, RequestOptions options, loop):
        self.instance = instance
        self.pool = pool
        self.options = options
        self.endpoint = instance.path
        self.loop = loop
        self.peer = instance.address

    cdef AsyncClientConnection pick(self):
        """A connection that can take a request now, or None."""
        cdef AsyncClientConnection conn = self.conn
        if conn is not None and conn.ready and not conn.draining and not conn.writer_blocked and not conn.pending:
            return conn
        self.conn = self.pool.best()
        return self.conn

    @property
    def ready(self):
        cdef AsyncClientConnection conn = self.conn
        if conn is not None and conn.ready and not conn.draining:
            return True
        return self.pick() is not None

    async def connect(self, timeout=None):
        await self.pool.connect(timeout)
        self.conn = self.pool.best()

    cdef int start(self, Waiter call, object payload, object timeouts, object reply_type, Context context) except -1:
        cdef AsyncClientConnection conn = self.pick()
        cdef int kind = 0
        cdef double now = dw_now()
        cdef bytes meta
        cdef object data
        if conn is None:
            raise ConnectError(f"not connected to {self.peer}", peer=self.peer)
        call.loop = self.loop
        call.reply_type = reply_type
        data = encode_payload(payload, &kind, self.options.kind)
        set_limits(call, self.options, timeouts, context, now)
        meta = request_meta(context)
        if context is not None:
            if context._flags & CTX_KILLED:
                raise Cancelled("the request was killed by its context before it was sent", peer=self.peer, sent="no")
            call.context = context
            context._canceller = call._cancel_request
        try:
            return conn.start_call(call, self, data, kind, meta, self.endpoint, now)
        except DynwireError:
            if context is not None:
                context._canceller = None
            raise

    def call(self, payload, timeouts=None, reply_type=None, Context context=None):
        cdef CallFuture call = CallFuture.__new__(CallFuture)
        self.start(call, payload, timeouts, reply_type, context)
        return call

    def stream(self, payload, timeouts=None, reply_type=None, Context context=None):
        cdef ItemReader reader = ItemReader.__new__(ItemReader)
        if context is None:
            context = inheriting_context()
        self.start(reader, payload, timeouts, reply_type, context)
        reader.source = reader.conn if reader.conn is not None else self.conn
        return make_item_stream(reader)


cdef class AsyncServerConnection(AsyncConnection):
    """The serving side. ``server`` has ``entries`` (name to EndpointEntry), ``token``, ``draining`` and ``software``."""

    cdef object server
    cdef dict entries
    cdef object base_context
    cdef HandlerTask spare           # of a handler that did not suspend, for the next request
    cdef bint tracebacks

    def __init__(self, loop, sock, peer, server, base_context, *, tracebacks=False, **limits):
        super().__init__(False, loop, sock, peer, **limits)
        self.server = server
        self.entries = server.entries
        self.base_context = base_context
        self.tracebacks = tracebacks

    cdef int on_hello(self, dict hello) except -1:
        token = self.server.token
        if token is not None and not hmac.compare_digest((hello["token"] or "").encode(), token.encode()):
            self.start(software=self.server.software)
            shown = "a wrong token" if hello["token"] else "no token"
            self.put_goaway(GOAWAY_UNAUTHENTICATED, f"{shown} was shown; set the worker's DYNWIRE_TOKEN on the caller's side")
            self.flush()
            return self.lost(Unauthenticated(f"{self.peer} showed {shown}", peer=self.peer))
        # A quarter of the caller's patience: early enough to arrive, late enough that fast calls cost no extra frame.
        self.accept_after = hello["accept_timeout_ms"] / 4000.0
        self.start(software=self.server.software)
        return 0

    cdef object resolve(self, str name):
        entry = self.entries.get(name)
        return name if entry is None else entry

    cdef StreamBase make_stream(self):
        task, self.spare = self.spare, None
        return HandlerTask.__new__(HandlerTask) if task is None else <HandlerTask>task

    cdef int on_request(self, StreamBase stream, object target, object payload, int kind, object meta,
                        uint32_t ms) except -1:
        cdef HandlerTask task = <HandlerTask>stream
        cdef EndpointEntry entry
        if self.draining and <int32_t>(stream.seq - self.goaway_seq) > 0:
            # It crossed our GOAWAY: the caller knows that it was not taken, and has closed the stream.
            return self.request_done(stream)
        entry = admit(self, self.entries, stream, target)
        if entry is None:
            return 0
        task.loop = self.loop
        task.tracebacks = self.tracebacks
        task.begin(
            self, entry, payload, kind, meta, self.now + ms * 0.001 if ms else INFINITY, self.now + self.accept_after,
            self.base_context,
        )
        # Two references are the caller's and ours, a third one is the entry of the loop's current task, which a step within a
        # read callback leaves in place; any further one is the user's, from current_task().
        if task.recyclable() and Py_REFCNT(task) == (3 if task.started and self.in_dispatch else 2):
            task.recycle()
            self.spare = task
        return 0

    cdef int protocol_failure(self, object error) except -1:
        """Tell the peer why, in words of its own protocol where it is another one."""
        if self.dead:
            return 0
        if isinstance(error, PlaneMismatch):
            text = str(error)
            theirs = error.theirs
            if theirs.startswith("HTTP/1"):
                body = text + "\n"
                answer = (
                    "HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain; charset=utf-8\r\nconnection: close\r\n"
                    f"content-length: {len(body.encode())}\r\n\r\n{body}"
                ).encode()
            elif theirs == "NATS":
                answer = f"-ERR '{text}'\r\n".encode()
            elif theirs.startswith("dynwire"):
                self.start(software=self.server.software)
                self.put_goaway(GOAWAY_VERSION, text)
                self.flush()
                return self.lost(error)
            elif theirs == "TLS":
                answer = b"\x15\x03\x01\x00\x02\x02\x46"  # fatal alert protocol_version
            else:
                answer = (text + "\n").encode()
            c_send(self.fd, <const char *>answer, len(answer), MSG_DONTWAIT | MSG_NOSIGNAL)
            return self.lost(error)
        return AsyncConnection.protocol_failure(self, error)

    def go_away(self, str text):
        """Refuse further requests on this connection; those in flight go on."""
        if not self.dead and not self.draining:
            self.in_dispatch = True  # written below, also if the loop is closed already
            self.put_goaway(GOAWAY_NORMAL, text)
            self.in_dispatch = False
            if not self.writer_blocked:
                self.flush()

    def tasks(self, entry=None):
        """Handlers that run for this connection, of one endpoint or all."""
        return tasks_of(self, entry)

    def kill_tasks(self, entry=None):
        """Cancel handlers because this worker ends them; returns how many."""
        return kill_tasks_of(self, entry)
