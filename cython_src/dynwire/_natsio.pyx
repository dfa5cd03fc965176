"""Drivers of the nats plane on an event loop: messages come through a sink and leave through a port (`dynwire._natsport`).

Every rule of the protocol is in `dynwire._natswire`. What a batch of messages completes is delivered within it: callers are woken
and handlers begin in the read callback, and what they publish leaves together at its end.
"""

import weakref

from cpython.bytes cimport PyBytes_FromStringAndSize, PyBytes_GET_SIZE

from ._link cimport S_WRITTEN, calls_follow
from ._natsproto cimport PORT_CLOSED, PORT_UP, MessagePort, MessageSink
from ._natsqueue cimport QueueRequest, QueueTarget, QueueWire
from ._natswire cimport HEADERS_STATUS, NatsPeer, NatsTarget, fields, header_lines, parse_headers

from .errors import PermissionDenied

include "_driver_calls.pxi"


cdef class LoopState:
    """What the links of one event loop know of each other: one batch may hold messages for several of them."""

    cdef bint task_left              # a handler's step has left its entry as the loop's current task
    cdef object __weakref__


cdef object _states = weakref.WeakKeyDictionary()

# A worker's connection comes back within a second of the server, or of what ended both (`dynwire.nats.connection`).
cdef double SETTLED_S = 2.0


cdef class LinkSink(MessageSink):
    """Hands a link its messages."""

    cdef NatsLink link

    cdef int on_message(self, const unsigned char *subject, size_t subject_n, const unsigned char *reply, size_t reply_n,
                        const unsigned char *headers, size_t headers_n, const unsigned char *payload, size_t n,
                        object owner) except -1:
        cdef NatsLink link = self.link
        if not link.is_client:
            link.shared.task_left = True
        elif link.shared.task_left:
            link.shared.task_left = False
            leave_task(link.loop)  # a task that is woken here could not be entered
        return link.receive(subject, subject_n, reply, reply_n, headers, headers_n, payload, n, owner)

    cdef int on_batch(self, bint begin) except -1:
        return self.link.batch(begin)

    cdef int on_state(self, int state, object error) except -1:
        return self.link.state_changed(state, error)

    cdef int on_writable(self) except -1:
        return self.link.writable()


cdef class NatsLink(QueueWire):
    """One side of the plane on an event loop. Used from the loop's thread only."""

    cdef readonly object loop
    cdef readonly LinkSink sink
    cdef LoopState shared
    cdef object timer_handle
    cdef double armed_at
    cdef readonly object close_error

    def __init__(self, bint is_client, bytes subject not None, loop, **limits):
        super().__init__(is_client, subject, **limits)
        self.loop = loop
        self.armed_at = INFINITY
        self.now = dw_now()
        self.sink = LinkSink()
        self.sink.link = self
        self.shared = _states.get(loop)
        if self.shared is None:
            self.shared = _states[loop] = LoopState()

    def attach(self, MessagePort port not None):
        """There is a connection, and the sink is subscribed."""
        self.port = port
        self.port_changed(dw_now())

    @property
    def attached(self):
        """True from the first connection until the last."""
        return self.port is not None and self.port.state != PORT_CLOSED and not self.dead

    cdef int batch(self, bint begin) except -1:
        if begin:
            self.now = dw_now()
            self.in_dispatch = True
            return 0
        if self.shared.task_left:
            self.shared.task_left = False
            leave_task(self.loop)
        try:
            if self.to_wake:
                wake_readers(self)
        finally:
            self.in_dispatch = False
        if self.next_wakeup() < self.armed_at:
            self.set_timer()
        return 0

    cdef int state_changed(self, int state, object error) except -1:
        if self.dead or self.port is None:
            return 0
        if state == PORT_CLOSED:
            return self.lost(error if isinstance(error, DynwireError) else ManagerClosed("the connection to NATS was closed"))
        if state == PORT_UP and error is not None:
            return self.denied(error)
        return self.port_changed(dw_now())

    cdef int denied(self, object error) except -1:
        return 0

    cdef int writable(self) except -1:
        if not self.dead:
            self.now = dw_now()
            self.writable_again()
            if self.is_client and self.pending:
                self.send_pending()
        return self.wrote()

    cdef int wrote(self) except -1:
        """The port writes at the end of the batch, or of this turn of the loop."""
        if not self.in_dispatch and self.next_wakeup() < self.armed_at:
            self.set_timer()
        return 0

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
        self.timer_handle = None
        self.armed_at = INFINITY
        if not self.dead:
            self.time_passed(dw_now())
            self.set_timer()

    # ---- end ----

    cdef int lost(self, object error) except -1:
        """Every stream learns that it is over; nothing is published any more."""
        if self.dead:
            return 0
        self.dead = True
        self.close_error = error
        if self.timer_handle is not None:
            self.timer_handle.cancel()
            self.timer_handle = None
        for stream in self.take_all_streams():
            (<StreamBase>stream).on_lost(error)
        return 0

    def forget(self, error):
        """Its loop is closed: nothing can be published, or waited for."""
        self.timer_handle = None
        self.port = None
        self.dead = True
        self.close_error = error
        self.take_all_streams()

    def close(self, error=None):
        """Close now; streams in flight end with ``error``."""
        cdef StreamBase stream
        if self.dead:
            return
        if self.up():
            if self.is_client:
                for stream in self.slots:
                    if stream is not None:
                        if type(stream.under) is QueueRequest:
                            self.take_back(stream, <QueueRequest>stream.under)
                        self.put_cancel(stream, 2)
            self.port.flush()
        self.lost(error or ManagerClosed("the connection was closed", peer=self.peer, sent="maybe"))


cdef class NatsClientLink(NatsLink):
    """The calling side: the requests of one client to all workers."""

    def __init__(self, bytes subject not None, loop, RequestOptions options, **limits):
        super().__init__(True, subject, loop, accept_ms=<int>min(options.accept_timeout * 1000, 2e9), **limits)
        options.apply(self)

    cdef int on_request_sent(self, StreamBase stream) except -1:
        return name_request(self, <Waiter>stream)

    cdef int on_peer(self, NatsPeer peer, object error) except -1:
        cdef list waiters
        if peer.waiters:
            waiters, peer.waiters = peer.waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(error)
        return 0

    cdef int lost(self, object error) except -1:
        cdef bint was_dead = self.dead
        NatsLink.lost(self, error)
        if not was_dead:
            for peer in list(self.peers.values()):
                self.on_peer(<NatsPeer>peer, error)  # whoever waits to hear from it
        return 0

    @property
    def unsettled(self):
        """True when the connection has come back so lately that a worker's may still be on its way."""
        return self.came_back and dw_now() < self.up_at + SETTLED_S

    def ask_peer(self, NatsPeer peer not None):
        """A future that gets None when the worker has answered, or a `ConnectError` when it is not there."""
        future = self.loop.create_future()
        peer.waiters = [waiter for waiter in peer.waiters if not waiter.done()]
        peer.waiters.append(future)
        if self.up():
            self.ping(peer, dw_now())
            self.port.flush()
        return future

    cdef int denied(self, object error) except -1:
        """The NATS server does not let this user publish to an endpoint: its requests were not sent."""
        cdef StreamBase stream
        details = error.details if isinstance(error, PermissionDenied) else {}
        if details.get("operation") != "publish":
            return 0
        for stream in list(self.slots):
            if stream is None or stream.conn is not self:
                continue
            # nats-py's errors are in lower case
            if (<NatsTarget>stream.under).subject.decode().lower() == str(details.get("subject")).lower():
                stream.state &= ~S_WRITTEN
                self.lose(stream, error)
        return 0

    cdef int start_call(self, Waiter call, ChannelBase channel, object data, int kind, bytes meta, str endpoint,
                        double now) except -1:
        self.submit(call, endpoint, data, kind, meta, call.total_deadline, min(call.total_deadline, call.phase_deadline), now)
        call.channel = channel
        channel.in_flight += 1
        if not self.in_dispatch:
            if self.live == 1 and not calls_follow() and self.port.state == PORT_UP:
                self.port.flush()  # nothing else is in flight, so there is nothing to wait for
            if self.next_wakeup() < self.armed_at:
                self.set_timer()
        return 0


cdef class NatsChannel(ChannelBase):
    """Calls to one instance (see `dynwire.planes.base.AsyncChannel`). ``client`` has ``connect(timeout, peer)``."""

    cdef NatsClientLink link
    cdef NatsPeer peer_
    cdef NatsTarget target
    cdef readonly object client
    cdef RequestOptions options
    cdef str endpoint
    cdef object loop

    def __init__(self, instance, client, NatsClientLink link not None, NatsPeer peer not None, RequestOptions options not None):
        self.instance = instance
        self.client = client
        self.link = link
        self.options = options
        self.endpoint = instance.path
        self.peer_ = peer
        self.target = NatsTarget(peer, self.endpoint)
        self.loop = link.loop
        self.peer = instance.address

    @property
    def ready(self):
        cdef NatsClientLink link = self.link
        return link.up() and not link.dead and link.fresh(self.peer_, dw_now())

    async def connect(self, timeout=None):
        await self.client.connect(timeout, self.peer_)

    cdef int aim(self, Waiter call, object timeouts, double now) except -1:
        """Say where the call goes."""
        call.under = self.target
        return 0

    cdef int start(self, Waiter call, object payload, object timeouts, object reply_type, Context context) except -1:
        cdef NatsClientLink link = self.link
        cdef int kind = 0
        cdef double now = dw_now()
        cdef bytes meta
        cdef object data
        if link.dead:
            raise ManagerClosed("the client is closed", peer=self.peer)
        if link.port is None:
            raise ConnectError(f"not connected to NATS, and so not to {self.peer}", peer=self.peer)
        call.loop = self.loop
        call.reply_type = reply_type
        call.under = self.target
        data = encode_payload(payload, &kind, self.options.kind)
        set_limits(call, self.options, timeouts, context, now)
        self.aim(call, timeouts, now)
        meta = request_lines(context, link.token)
        if context is not None:
            if context._flags & CTX_KILLED:
                raise Cancelled("the request was killed by its context before it was sent", peer=self.peer, sent="no")
            call.context = context
            context._canceller = call._cancel_request
        try:
            return link.start_call(call, self, data, kind, meta, self.endpoint, now)
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
        reader.source = self.link
        return make_item_stream(reader)


cdef class QueueChannel(NatsChannel):
    """Calls by way of the queue of an endpoint, to whichever worker takes them. ``client`` has ``queue(endpoint, timeout)``."""

    cdef QueueTarget queue               # None until it was found

    @property
    def ready(self):
        # Also while the connection is being restored: requests then wait, within their deadlines and the channel buffer.
        return self.queue is not None and not self.link.dead and self.link.port.state != PORT_CLOSED

    async def connect(self, timeout=None):
        await self.client.connect(timeout)
        if self.queue is None:
            self.queue = await self.client.queue(self.endpoint, timeout)

    cdef int aim(self, Waiter call, object timeouts, double now) except -1:
        """A request ends with what the queue keeps. The queue accepts it, which may take as long as a restart of the server."""
        cdef double age
        if self.queue is None:
            raise ConnectError(f"the queue of {self.endpoint} was not opened", peer=self.peer)
        call.under = QueueRequest(self.queue, self.link.unnamed)
        age = self.queue.queue.queue.max_age
        if call.total_deadline > now + age:
            call.total_deadline = now + age
            call.total_timeout = age
            call.total_setting = "DYNWIRE_NATS_QUEUE_MAX_AGE"
        if call.phase == "accept" and not (isinstance(timeouts, Timeouts) and timeouts.accept is not None):
            call.phase_deadline = INFINITY
        return 0


cdef bytes request_lines(Context context, bytes token):
    """Headers and id that travel with a request: those of its own context, or the trace of the surrounding request."""
    cdef Context parent
    if context is not None:
        keep_id(context)
        if context._headers is None and token is None and context._id is None:
            return None
        return header_lines(context.headers, context._id, token)
    parent = current_context()
    if parent is None or parent._headers is None:
        return None if token is None else header_lines(None, None, token)
    return header_lines(inherited_headers(parent), None, token)


cdef class NatsServerLink(NatsLink):
    """The serving side: the requests of all callers to one server. ``entries`` maps endpoint names to `EndpointEntry`."""

    cdef dict entries
    cdef object base_context
    cdef HandlerTask spare           # of a handler that did not suspend, for the next request
    cdef bint tracebacks

    def __init__(self, bytes subject not None, loop, dict entries not None, base_context, *, tracebacks=False, **limits):
        super().__init__(False, subject, loop, **limits)
        self.entries = entries
        self.base_context = base_context
        self.tracebacks = tracebacks

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
        if self.draining:
            return refuse(self, stream, PeerLost(
                "the worker is shutting down and did not take the request", sent="no", phase="accept", details={"refused": True}
            ))  # fmt: skip
        entry = admit(self, self.entries, stream, target)
        if entry is None:
            return 0
        task.loop = self.loop
        task.tracebacks = self.tracebacks
        task.begin(
            self, entry, payload, kind, meta, self.now + ms * 0.001 if ms else INFINITY, self.now + self.accept_after,
            self.base_context,
        )
        # The caller's and our references, and the entry of the loop's current task, which a step within a batch leaves in place;
        # any further one is the user's, from current_task().
        if task.recyclable() and Py_REFCNT(task) == (3 if task.started and self.in_dispatch else 2):
            task.recycle()
            self.spare = task
        return 0

    cdef bint given_back(self, StreamBase stream):
        cdef HandlerTask task = <HandlerTask>stream
        return task.evicted and not task.item_sent and not task.timed_out

    cdef bint has_room(self, bytes subject):
        cdef EndpointEntry entry = self.entries.get(subject[PyBytes_GET_SIZE(self.queue_subject):].decode())
        return (
            entry is not None and not entry.draining and not entry.removed and not self.draining
            and entry.in_flight < entry.max_in_flight and self.live < self.max_streams
        )  # fmt: skip

    def endpoints_changed(self):
        """``entries`` has others than before."""
        self.forget_targets()

    def go_away(self):
        """Refuse further requests, and tell the callers; requests in flight go on."""
        self.draining = True
        self.put_goodbye()
        if self.up():
            self.port.flush()

    def tasks(self, entry=None):
        """Handlers that run, of one endpoint or all."""
        return tasks_of(self, entry)

    def kill_tasks(self, entry=None):
        """Cancel handlers because this worker ends them; returns how many."""
        return kill_tasks_of(self, entry)


cdef class QueueSink(MessageSink):
    """Takes what the queue of one endpoint sends to this worker. ``consumer`` is a `dynwire.nats.pull.QueueConsumer`."""

    cdef NatsServerLink link
    cdef public object consumer
    cdef bytes subject               # the endpoint's in core mode, to any worker

    def __init__(self, NatsServerLink link not None, str endpoint):
        self.link = link
        self.subject = link.queue_subject + endpoint.encode()

    cdef int on_message(self, const unsigned char *subject, size_t subject_n, const unsigned char *reply, size_t reply_n,
                        const unsigned char *headers, size_t headers_n, const unsigned char *payload, size_t n,
                        object owner) except -1:
        cdef fields f
        cdef size_t others
        if parse_headers(headers, headers_n, &f, &others) == HEADERS_STATUS:
            self.consumer.on_status(f.kind, PyBytes_FromStringAndSize(<const char *>headers, headers_n))
            return 0
        delivery = self.consumer.take(PyBytes_FromStringAndSize(<const char *>reply, reply_n))
        if delivery is None:
            return 0
        self.link.shared.task_left = True
        self.link.receive_queued(self.consumer, delivery, self.subject, headers, headers_n, payload, n, owner)
        return 0

    cdef int on_batch(self, bint begin) except -1:
        return self.link.batch(begin)

    cdef int on_state(self, int state, object error) except -1:
        if state == PORT_UP and error is None:
            self.consumer.connected()  # after the link, whose replies go first
        return 0
