# What every driver needs to make calls and to run handlers, whatever carries them. Included by _driver_libc.pxi and _natsio.pyx.

import msgspec
from cpython.bytes cimport PyBytes_CheckExact
from libc.math cimport INFINITY
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from ._awaitable cimport (
    CallFuture,
    ChannelBase,
    EndpointEntry,
    HandlerTask,
    ItemReader,
    Waiter,
    leave_task,
    make_item_stream,
    wake_readers,
)
from ._context cimport CTX_KILLED, Context, current_context
from ._link cimport Link, StreamBase

from ._context import INHERITED_HEADERS
from .codec import encode as _encode_with, msgpack_encode
from .errors import (
    Cancelled,
    ConfigError,
    ConnectError,
    DeadlineExceeded,
    DynwireError,
    EndpointNotFound,
    ManagerClosed,
    Overloaded,
    PeerLost,
)
from .types import Timeouts
from .wire.faults import error_body, for_request

cdef extern from *:
    """
    #include <time.h>
    static inline double dw_now(void) {
        struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
    }
    """
    double dw_now() nogil

cdef extern from "Python.h":
    int PyObject_CheckBuffer(object)
    Py_ssize_t Py_REFCNT(object)

cdef object _msgpack_encode = msgpack_encode


cdef class RequestOptions:
    """Settings of a client that every call needs, unpacked once."""
    cdef double accept_timeout
    cdef double connect_timeout
    cdef double total_timeout
    cdef int kind                  # codec of objects: 1 msgpack, 2 json
    cdef int channel_buffer
    cdef double keepalive_interval
    cdef double keepalive_timeout
    cdef str keepalive_setting     # its name, for the error
    cdef double spin_s

    def __init__(self, *, accept_timeout, connect_timeout=3.0, total_timeout=None, codec="msgpack", channel_buffer=100,
                 keepalive_interval=10.0, keepalive_timeout=10.0, keepalive_setting="DYNWIRE_TCP_KEEPALIVE_TIMEOUT",
                 spin_us=0.0):
        self.accept_timeout = accept_timeout
        self.connect_timeout = connect_timeout
        self.total_timeout = INFINITY if total_timeout is None else total_timeout
        self.kind = 2 if codec == "json" else 1
        self.channel_buffer = channel_buffer
        self.keepalive_interval = keepalive_interval
        self.keepalive_timeout = keepalive_timeout
        self.keepalive_setting = keepalive_setting
        self.spin_s = spin_us * 1e-6

    cdef apply(self, Link conn):
        conn.channel_buffer = self.channel_buffer
        conn.keepalive_interval = self.keepalive_interval
        conn.keepalive_timeout = self.keepalive_timeout
        conn.keepalive_setting = self.keepalive_setting


cdef inline double _or_infinity(object value) except? -1.0:
    return INFINITY if value is None else <double>value


cdef object encode_payload(object payload, int *kind, int default_kind):
    """The bytes-like form of a payload, and the number of its codec."""
    if PyBytes_CheckExact(payload) or PyObject_CheckBuffer(payload):
        kind[0] = 0
        return payload
    kind[0] = default_kind
    if default_kind == 1:
        try:
            return _msgpack_encode(payload)
        except (TypeError, ValueError, OverflowError, RecursionError, NotImplementedError, msgspec.MsgspecError):
            return _encode_with(payload, "msgpack")  # raises a DecodeError that names the type
    return _encode_with(payload, "json")


cdef int set_limits(Waiter call, RequestOptions options, object timeouts, Context context, double now) except -1:
    """Resolve the caller's argument, the client's defaults and the surrounding request into the call's deadlines."""
    cdef double total = options.total_timeout
    cdef double accept = options.accept_timeout
    cdef double first_item = INFINITY
    cdef double between_items = INFINITY
    cdef double deadline
    cdef Context parent
    if timeouts is not None:
        if type(timeouts) is float or type(timeouts) is int:
            total = timeouts
        elif isinstance(timeouts, Timeouts):
            if timeouts.total is not None:
                total = timeouts.total
            if timeouts.accept is not None:
                accept = timeouts.accept
            first_item = _or_infinity(timeouts.first_item)
            between_items = _or_infinity(timeouts.between_items)
        else:
            raise ConfigError(f"timeout is a number of seconds or a Timeouts, got {timeouts!r}", name="timeout", value=timeouts)
        if not (total > 0 and accept > 0 and first_item > 0 and between_items > 0):
            raise DeadlineExceeded(
                f"the timeout of {total:.3g} s had passed before the request was sent", timeout=total, sent="no"
            )
    call.total_timeout = total
    deadline = now + total
    if context is None:
        parent = current_context()
    else:
        parent = context
    if parent is not None and parent._deadline < deadline:
        deadline = parent._deadline
        call.total_timeout = deadline - now
        if deadline <= now:
            raise DeadlineExceeded(
                "the deadline had passed before the request was sent", timeout=call.total_timeout, sent="no",
                phase="total",
            )  # fmt: skip
    call.total_deadline = deadline
    call.phase = "accept"
    call.phase_timeout = accept
    call.phase_deadline = now + accept
    if type(call) is not CallFuture and isinstance(call, ItemReader):
        (<ItemReader>call).first_item_timeout = first_item
        (<ItemReader>call).between_items_timeout = between_items
        if first_item < accept:
            call.phase = "first_item"
            call.phase_timeout = first_item
            call.phase_deadline = now + first_item
    return 0


cdef dict inherited_headers(Context parent):
    headers = parent.headers
    return {name: headers[name] for name in INHERITED_HEADERS if name in headers}


cdef Context inheriting_context():
    """A context for a stream whose caller gave none: deadline and trace are those of the surrounding request, if there is one."""
    cdef Context context = Context.__new__(Context)
    cdef Context parent = current_context()
    context._deadline = INFINITY
    if parent is not None:
        context._deadline = parent._deadline
        if parent._headers is not None:
            context._headers = inherited_headers(parent)
    return context


cdef int keep_id(Context context) except -1:
    """A context that was sent before, with a request that nobody took: it keeps the id that its owner may have seen."""
    if context is not None and context._connection_id is not None:
        context._id = context.id
        context._connection_id = None
    return 0


cdef int name_request(Link conn, Waiter call) except -1:
    """Let the request's context know its id, which connection and sequence number make."""
    if call.context is not None and call.context._connection_id is None:
        call.context._connection_id = conn.connection_id
        call.context._seq = call.seq
    return 0


# ---- serving -------------------------------------------------------------------------------------------------------------------


cdef int refuse(Link conn, StreamBase stream, object error) except -1:
    """The request's only answer is an error of the server's own."""
    conn.put_error(stream, 0, error_body(error))
    conn.request_done(stream)
    return conn.wrote()


cdef EndpointEntry admit(Link conn, dict entries, StreamBase stream, object target):
    """The endpoint of a request that may run; otherwise the request is refused, and None. ``target`` is an entry or a name."""
    cdef EndpointEntry entry
    if type(target) is not EndpointEntry or (<EndpointEntry>target).removed:
        name = target if type(target) is str else (<EndpointEntry>target).name
        target = entries.get(name)
        if target is None:
            known = sorted(entries)
            refuse(conn, stream, EndpointNotFound(
                f"{name} is not served here (served: {', '.join(known[:20]) or 'nothing'})", endpoint=name, sent="no",
                retryable=True,  # the record that led here is stale; another instance may serve it
            ))  # fmt: skip
            return None
    entry = target
    if entry.draining or conn.draining:
        refuse(conn, stream, Overloaded(
            f"{entry.name} is shutting down here", depth=entry.in_flight, limit=0, sent="no", phase="accept"
        ))  # fmt: skip
        return None
    if entry.in_flight >= entry.max_in_flight:
        refuse(conn, stream, Overloaded(
            f"{entry.name} already has {entry.in_flight} requests in flight (limit max_in_flight={entry.max_in_flight})",
            depth=entry.in_flight, limit=entry.max_in_flight, sent="no", phase="accept",
        ))  # fmt: skip
        return None
    return entry


cdef list tasks_of(Link conn, object entry):
    """Handlers that run for this connection, of one endpoint or all."""
    cdef HandlerTask task
    cdef list out = []
    for stream in conn.slots:
        if type(stream) is HandlerTask:
            task = stream
            if task.entry is not None and (entry is None or task.entry is entry):
                out.append(task)
    return out


cdef int kill_tasks_of(Link conn, object entry) except -1:
    """Cancel handlers because this worker ends them; returns how many."""
    cdef HandlerTask task
    cdef int count = 0
    for item in tasks_of(conn, entry):
        task = item
        if not task.done_:
            task.evicted = True
            task.context.set_cancelled(CTX_KILLED)
            task.kill()
            count += 1
    return count
