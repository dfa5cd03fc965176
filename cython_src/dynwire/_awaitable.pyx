"""Calls, streams and handlers as the event loop sees them.

`CallFuture` and `ItemReader` are awaited by callers. They speak the future protocol of asyncio, and wake the awaiting task
directly from the read callback instead of through ``loop.call_soon``: half the cost of an asyncio.Future, see
docs/performance.md.

`HandlerTask` runs a handler on the server's side. It takes the place of `asyncio.Task` from the handler's first line:
``asyncio.current_task()`` returns it, and ``asyncio.timeout()``, ``TaskGroup``, context variables and cancellation work with it.
Unlike a Task it starts in the read callback, so a handler that does not suspend has replied before the callback ends. Python 3.12
has eager tasks, but only they would not do here: a Task costs more than the whole rest of a call.

All of this belongs to the thread of one event loop.
"""

import asyncio
import time

import msgspec
from asyncio import CancelledError, InvalidStateError
from asyncio.tasks import _current_tasks, _register_task, _unregister_task
from contextvars import copy_context

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_GET_SIZE
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.math cimport INFINITY
from libc.stdint cimport uint32_t
from libc.stdlib cimport free, realloc

from ._context cimport CTX_KILLED, CTX_STOPPED, Context, current_var, loop_mark
from ._link cimport (
    S_ACCEPTED,
    S_ENDED,
    S_PENDING,
    S_SENDING,
    S_STOP_EARLY,
    S_WRITTEN,
    Link,
    StreamBase,
)

from .calls import INHERIT
from .codec import encode, msgpack_encode, unpack
from .errors import (
    Cancelled,
    DeadlineExceeded,
    DecodeError,
    DynwireError,
    PeerLost,
    ProtocolError,
)
from .wire.faults import error_body, error_from_body, for_request, handler_error_body

cdef extern from *:
    """
    typedef int (*dw_sendfunc)(PyObject *, PyObject *, PyObject **);
    /* Cython has no spelling for am_send. With it, `await` on 3.11 takes results without a StopIteration object. */
    static void dw_set_am_send(PyObject *type, dw_sendfunc f) {
        ((PyTypeObject *)type)->tp_as_async->am_send = (sendfunc)f;
    }
    /* Is this the callback with which an asyncio.Task (the C one) waits for a future? */
    static PyCFunction dw_task_wakeup = NULL;
    static int dw_is_task_wakeup(PyObject *callback) {
        if (!PyCFunction_CheckExact(callback)) return 0;
        PyCFunction f = PyCFunction_GET_FUNCTION(callback);
        if (f == dw_task_wakeup) return 1;
        if (dw_task_wakeup != NULL || strcmp(((PyCFunctionObject *)callback)->m_ml->ml_name, "task_wakeup") != 0) return 0;
        dw_task_wakeup = f;
        return 1;
    }
    static PyObject *dw_anext(PyObject *agen) {
        PyAsyncMethods *m = Py_TYPE(agen)->tp_as_async;
        if (m == NULL || m->am_anext == NULL) {
            PyErr_SetString(PyExc_TypeError, "the streaming handler did not return an async generator");
            return NULL;
        }
        return m->am_anext(agen);
    }
    /* What the frame of an async generator yields is wrapped in an object of a private type, which refers to nothing else; what
       it awaits is not wrapped. Whoever sends to the generator itself, and not to what anext() returns, saves two objects and an
       exception for each item. */
    static int dw_drivable(PyObject *agen) {
    #if PY_VERSION_HEX < 0x030F0000
        return Py_IS_TYPE(agen, &PyAsyncGen_Type) && Py_TYPE(agen)->tp_as_async->am_send != NULL;
    #else
        return 0;
    #endif
    }
    static int dw_is_item(PyObject *o) {
        static PyTypeObject *wrapper = NULL;
        PyTypeObject *type = Py_TYPE(o);
        if (wrapper == NULL && !PyType_HasFeature(type, Py_TPFLAGS_HEAPTYPE)
                && strcmp(type->tp_name, "async_generator_wrapped_value") == 0) wrapper = type;
        return type == wrapper;
    }
    static int dw_first(PyObject *o, void *arg) { *(PyObject **)arg = o; return 1; }
    static PyObject *dw_item(PyObject *wrapped) {
        PyObject *item = NULL;
        Py_TYPE(wrapped)->tp_traverse(wrapped, dw_first, &item);
        return Py_XNewRef(item);
    }
    /* The variables of a contextvars.Context: an immutable mapping, replaced at every set. Python's headers do not show the
       struct; it is the same from 3.7 to 3.14, and dw_one_mapping looks at what is found there. */
    typedef struct { PyObject_HEAD PyObject *prev; PyObject *vars; } dw_pycontext;
    static PyObject *dw_context_vars(PyObject *context) {
    #if PY_VERSION_HEX < 0x030F0000 && !defined(Py_GIL_DISABLED)
        return ((dw_pycontext *)context)->vars;
    #else
        return NULL;
    #endif
    }
    static int dw_has_weakrefs(PyObject *o) {
        return *(PyObject **)((char *)o + Py_TYPE(o)->tp_weaklistoffset) != NULL;
    }
    struct dw_search { PyObject *wanted; PyObject *node; int depth; int found; };
    static int dw_visit(PyObject *o, void *arg) {
        struct dw_search *s = arg;
        if (s->depth == 0) s->node = o;
        else if (o == s->wanted) s->found = 1;
        return 0;
    }
    /* Does the mapping hold the value in its root node? Then whoever derives another mapping from it takes a reference of the
       value's own; below the root he would take one of a node only. */
    static int dw_one_mapping(PyObject *vars, PyObject *value) {
        struct dw_search s = {value, NULL, 0, 0};
        if (strcmp(Py_TYPE(vars)->tp_name, "hamt") != 0) return 0;
        Py_TYPE(vars)->tp_traverse(vars, dw_visit, &s);
        if (s.node == NULL || Py_TYPE(s.node)->tp_traverse == NULL) return 0;
        s.depth = 1;
        Py_TYPE(s.node)->tp_traverse(s.node, dw_visit, &s);
        return s.found;
    }
    """
    PyObject *dw_context_vars(object context)
    bint dw_has_weakrefs(object o)
    bint dw_one_mapping(PyObject *vars, object value)
    ctypedef int (*dw_sendfunc)(PyObject *, PyObject *, PyObject **)
    void dw_set_am_send(PyObject *type, dw_sendfunc f)
    object dw_anext(object agen)
    bint dw_drivable(object agen)
    bint dw_is_item(object o)
    object dw_item(object wrapped)
    bint dw_is_task_wakeup(object callback)

cdef extern from "Python.h":
    int PyIter_Send(object iter, object arg, PyObject **result) except? -1
    int PyContext_Enter(object ctx) except -1
    int PyContext_Exit(object ctx) except -1
    object PyContext_Copy(object ctx)
    object PyContextVar_Set(object var, object value)
    int PyObject_GetBuffer(object, Py_buffer *, int) except -1
    void PyBuffer_Release(Py_buffer *)
    int PyObject_CheckBuffer(object)
    int PyDict_SetItem(object, object, object) except -1
    Py_ssize_t dw_refcnt "Py_REFCNT"(PyObject *)
    unsigned long PyThread_get_thread_ident()

cdef enum:
    PYGEN_RETURN = 0
    PYGEN_ERROR = -1
    PYGEN_NEXT = 1

cdef dict _tasks = _current_tasks


cdef int leave_task(object loop) except -1:
    """No handler is running on the loop any more."""
    _tasks.pop(loop, None)
    return 0


cdef int wake_readers(Link conn) except -1:
    """Wake those for whom items have come since the last call."""
    cdef ItemReader reader
    cdef list readers = conn.to_wake
    conn.to_wake = []
    for item in readers:
        reader = item
        reader.wake_queued = False
        reader.wake(True)
    return 0


cdef object _msgpack_decode = msgspec.msgpack.Decoder().decode
cdef object _msgpack_encode = msgpack_encode
cdef object _monotonic = time.monotonic
cdef object _INHERIT = INHERIT
cdef tuple _KINDS = ("raw", "msgpack", "json")


cdef inline object decode_item(object item, int kind, object reply_type):
    """What arrived, in the form that the caller wants. Raises `DecodeError`."""
    if reply_type is None:
        if kind == 0:
            return item
        if kind == 1:
            try:
                return _msgpack_decode(item)
            except (msgspec.MsgspecError, ValueError, RecursionError):
                pass  # once more below, for the error
    try:
        return unpack(kind, item, reply_type)
    except DecodeError:
        raise
    except Exception as error:  # of a type's own hooks, or a type that msgspec does not support
        raise DecodeError(f"decoding as {reply_type!r} raised {type(error).__name__}: {error}") from error


cdef class ChannelBase:
    pass


cdef class BlockingCaller:
    """The hot path of `dynwire.client.Client.call`; everything that is not a reply of the channel whose turn it is, is in _call.

    Keyword arguments that are not given cost a dictionary lookup each in a Python function, more than the rest of this one.
    """

    def call(self, payload, *, timeout=None, reply_type=None, headers=None, context=None, instance=None, deadline=_INHERIT):
        """Send a request, wait for its only reply item and return it; keywords as for `AsyncClient.call`. Any thread.

        Ctrl-C ends the wait and kills the handler. Raises any `DynwireError`, and `RuntimeError` in a thread that runs an
        event loop.
        """
        cdef object first = None
        cdef object started = 0.0
        cdef object route = self._home
        cdef object turn, channel
        if timeout is None:
            timeout = self._default_timeout
        if timeout is not None:
            started = _monotonic()
        if (
            route is not None and headers is None and context is None and instance is None and deadline is _INHERIT
            and loop_mark() is None
        ):  # fmt: skip
            turn = route.turn
            if turn is not None:
                channel = None
                try:
                    channel = turn()
                    return channel.call(payload, timeout, reply_type)
                except DynwireError as error:
                    first = route.after_turn(channel, error)
        return self._call(payload, timeout, reply_type, headers, context, instance, deadline, started, first)


# A task that is woken asks the future for its outcome, and for any but asyncio's own kind of future looks the method up by its
# name as a C string, which costs as much as the rest of the wake-up. The outcome is taken when the awaitable is resumed
# anyway, so the task is shown this finished future instead.
class _NoLoop:
    def get_debug(self):
        return False


cdef object _done = asyncio.Future(loop=_NoLoop())
_done.set_result(None)


cdef class Waiter(StreamBase):
    def __cinit__(self):
        self.total_deadline = INFINITY
        self.phase_deadline = INFINITY

    # ---- future protocol, as asyncio.Task uses it ----

    def get_loop(self):
        return self.loop

    @property
    def _loop(self):
        return self.loop

    def add_done_callback(self, callback, *, context=None):
        if context is None:
            context = copy_context()
        if self.settled():
            self.loop.call_soon(callback, self, context=context)
        elif self.callback is None:
            self.callback = callback
            self.callback_context = context
        else:
            if self.more_callbacks is None:
                self.more_callbacks = []
            self.more_callbacks.append((callback, context))

    # asyncio.gather and wait_for look at these two

    @property
    def _cancel_message(self):
        return self.cancel_message

    def _make_cancelled_error(self):
        return CancelledError() if self.cancel_message is None else CancelledError(self.cancel_message)

    def remove_done_callback(self, callback):
        cdef int removed = 0
        if self.more_callbacks is not None:
            kept = [pair for pair in self.more_callbacks if pair[0] != callback]
            removed = len(self.more_callbacks) - len(kept)
            self.more_callbacks = kept
        if self.callback is not None and self.callback == callback:
            removed += 1
            self.callback = None
            self.callback_context = None
            if self.more_callbacks:
                self.callback, self.callback_context = self.more_callbacks.pop(0)
        return removed

    def settled(self):
        return self.outcome != PENDING

    cdef int wake(self, bint direct) except -1:
        """Run the callbacks. ``direct`` only from a read callback, where no task is running: a task cannot be entered twice."""
        cdef object callback = self.callback
        cdef object context = self.callback_context
        if callback is None:
            return 0
        self.callback = None
        self.callback_context = None
        more, self.more_callbacks = self.more_callbacks, None
        if direct and more is None:
            PyContext_Enter(context)
            try:
                if _done is not None and self.outcome != FAILED and dw_is_task_wakeup(callback):
                    callback(_done)
                else:
                    callback(self)
            except (KeyboardInterrupt, SystemExit) as error:
                # Let the loop see it, after the callback has dealt with the rest of what was received.
                self.loop.call_soon(_raise, error)
            except Exception as error:
                self.loop.call_exception_handler({"message": f"a done callback raised: {callback!r}", "exception": error})
            finally:
                PyContext_Exit(context)
            return 0
        self.loop.call_soon(callback, self, context=context)
        if more is not None:
            for callback, context in more:
                self.loop.call_soon(callback, self, context=context)
        return 0

    # ---- request ----

    cdef int settle(self) except -1:
        """The request is over: uncount it."""
        if self.channel is not None:
            self.channel.in_flight -= 1
            self.channel = None
        if self.context is not None:
            self.context._canceller = None
        self.payload = None
        return 0

    cdef str request_id(self):
        if self.request_id_ is None and self.context is not None:
            self.request_id_ = self.context.id
        if self.request_id_ is None and self.conn is not None and self.seq:
            self.request_id_ = f"{self.conn.connection_id.hex()}-{self.seq:x}"
        return self.request_id_

    cdef str sent_state(self):
        if self.state & S_ACCEPTED:
            return "yes"
        if not self.state & S_WRITTEN:
            return "no"
        return "maybe"

    cdef int fail_with(self, object error, bint direct) except -1:
        return 0

    cdef int rearm(self) except -1:
        cdef double when = min(self.total_deadline, self.phase_deadline)
        if self.conn is not None:
            if when < self.timer or self.timer == INFINITY:
                self.conn.arm(self, when)
                if when != INFINITY and not self.conn.in_dispatch:
                    self.conn.wrote()  # a driver looks at its timer when it has read or written
            else:
                self.timer = when  # the sweep will come early and find nothing to do
        return 0

    cdef object timeout_error(self, double now):
        cdef bint total = now >= self.total_deadline
        cdef double timeout = self.total_timeout if total else self.phase_timeout
        peer = self.channel.peer if self.channel is not None else None
        phase = "total" if total else self.phase
        remedy = {
            "total": self.total_setting or "timeout=",
            "accept": "DYN_TCP_REQUEST_TIMEOUT or Timeouts(accept=…)",
            "first_item": "Timeouts(first_item=…)",
            "between_items": "Timeouts(between_items=…)",
        }[phase]
        what = {
            "total": "the request did not finish",
            "accept": "the worker did not accept the request",
            "first_item": "no first item came",
            "between_items": "no further item came",
        }[phase]
        return DeadlineExceeded(
            f"{what} within {timeout:.3g} s (peer {peer}; set by {remedy})",
            timeout=timeout, phase=phase, peer=peer, sent=self.sent_state(), request_id=self.request_id(),
        )  # fmt: skip

    cdef int on_accept(self) except -1:
        if self.phase == "accept":
            self.phase_deadline = INFINITY
            self.rearm()
        return 0

    cdef int on_timer(self, double now) except -1:
        cdef Link conn = self.conn
        self.timer = INFINITY
        if now < min(self.total_deadline, self.phase_deadline):
            self.timer = min(self.total_deadline, self.phase_deadline)
            return 0
        error = self.timeout_error(now)
        self.fail_with(error, False)
        self.give_up(conn)
        return 0

    cdef int give_up(self, Link conn) except -1:
        """Nobody waits for the reply any more."""
        if conn is not None:
            if self.state & S_PENDING:
                conn.forget_pending(self)
            else:
                conn.abandon(self, 2)
        return 0

    cdef int ask_to_stop(self, Link conn) except -1:
        if conn is None:
            return 0
        if self.state & S_PENDING:
            self.state |= S_STOP_EARLY  # there is no stream to name yet: it is told right after the request
            return 0
        conn.put_cancel(self, 1)
        return conn.wrote()

    cdef int on_error(self, int code, bytes body) except -1:
        error = error_from_body(body, peer=self.channel.peer if self.channel is not None else None, request_id=self.request_id())
        return self.fail_with(error, True)

    cdef int on_fault(self, object error) except -1:
        return self.fail_with(error, True)

    cdef int on_lost(self, object error) except -1:
        return self.fail_with(for_request(error, sent=self.sent_state(), request_id=self.request_id()), False)


def _raise(error):
    raise error


cdef class CallFuture(Waiter):
    """One unary call in flight; awaited by exactly one task, or used like a future by gather, wait_for and the like."""

    cdef int on_item(self, object item, int kind, bint last) except -1:
        cdef Link conn
        if self.outcome != PENDING:
            return 0
        if not last:
            conn = self.conn
            if self.value is not None:
                error = ProtocolError(
                    f"the handler at {self.channel.peer} streams several items; use stream() instead of call()",
                    peer=self.channel.peer, phase="reply", sent="yes", request_id=self.request_id(), retryable=False,
                )  # fmt: skip
                conn.abandon(self, 2)
                return self.fail_with(error, False)
            # A streaming handler: keep the item until the end shows that it is the only one.
            self.state |= S_ACCEPTED
            self.on_accept()
            self.value = (item, kind)
            return 0
        if self.value is not None:
            return self.fail_with(ProtocolError(
                f"the handler at {self.channel.peer} streams several items; use stream() instead of call()",
                peer=self.channel.peer, phase="reply", sent="yes", request_id=self.request_id(), retryable=False,
            ), True)  # fmt: skip
        return self._succeed(item, kind)

    cdef bint on_restart(self) except -1:
        self.value = None
        return True

    cdef int _succeed(self, object item, int kind) except -1:
        if kind == 0 and self.reply_type is None:
            self.value = item
        else:
            try:
                self.value = decode_item(item, kind, self.reply_type)
            except DecodeError as error:
                error.peer = self.channel.peer
                error.sent = "yes"
                error.request_id = self.request_id()
                return self.fail_with(error, True)
        self.outcome = RESULT
        self.settle()
        return self.wake(True)

    cdef int on_end(self) except -1:
        if self.value is not None:
            item, kind = self.value
            return self._succeed(item, kind)
        return self.fail_with(ProtocolError(
            f"the handler at {self.channel.peer} ended without a reply item; use stream() for handlers that may send none",
            peer=self.channel.peer, phase="reply", sent="yes", request_id=self.request_id(), retryable=False,
        ), True)  # fmt: skip

    cdef int fail_with(self, object error, bint direct) except -1:
        if self.outcome != PENDING:
            return 0
        self.outcome = FAILED
        self.value = error
        self.settle()
        return self.wake(direct and self.conn is None)

    def _cancel_request(self, int kind):
        """``context.stop()`` (1) or ``context.kill()`` (2) on the caller's side."""
        cdef Link conn = self.conn
        if self.outcome != PENDING:
            return
        if kind == 1:
            self.ask_to_stop(conn)
            return
        error = Cancelled("the call was killed by its context", peer=self.channel.peer, sent=self.sent_state(),
                          request_id=self.request_id())  # fmt: skip
        self.fail_with(error, False)
        self.give_up(conn)

    # ---- future protocol ----

    def done(self):
        return self.outcome != PENDING

    def cancelled(self):
        return self.outcome == CANCELLED

    def cancel(self, msg=None):
        cdef Link conn = self.conn
        if self.outcome != PENDING:
            return False
        self.outcome = CANCELLED
        self.cancel_message = msg
        self.value = None
        self.give_up(conn)
        self.settle()
        self.wake(False)
        return True

    def result(self):
        if self.outcome == RESULT:
            return self.value
        if self.outcome == FAILED:
            raise self.value
        if self.outcome == CANCELLED:
            raise CancelledError() if self.cancel_message is None else CancelledError(self.cancel_message)
        raise InvalidStateError("Result is not ready.")

    def exception(self):
        if self.outcome == RESULT:
            return None
        if self.outcome == FAILED:
            return self.value
        if self.outcome == CANCELLED:
            raise CancelledError() if self.cancel_message is None else CancelledError(self.cancel_message)
        raise InvalidStateError("Exception is not set.")

    def __await__(self):
        return self

    def __iter__(self):
        return self

    def __next__(self):
        cdef PyObject *result = NULL
        cdef int state = _call_send(self, None, &result)
        value = <object>result
        Py_DECREF(value)
        if state == PYGEN_NEXT:
            return value
        raise StopIteration(value)

    def send(self, value):
        return self.__next__()

    def throw(self, *args):
        _throw(args)

    def close(self):
        pass


def _throw(args):
    if len(args) == 1:
        raise args[0]
    error = args[1] if isinstance(args[1], BaseException) else args[0]() if args[1] is None else args[0](args[1])
    raise error


cdef int _call_send(object self_, object arg, PyObject **result) except? -1:
    cdef CallFuture self = <CallFuture>self_
    if self.outcome == PENDING:
        self._asyncio_future_blocking = True
        Py_INCREF(self)
        result[0] = <PyObject *>self
        return PYGEN_NEXT
    if self.outcome == RESULT:
        Py_INCREF(self.value)
        result[0] = <PyObject *>self.value
        return PYGEN_RETURN
    self.result()
    return PYGEN_ERROR


cdef class ItemReader(Waiter):
    """Items of one streamed reply. Iterator and awaitable in one object; one task at a time may wait."""

    def __cinit__(self):
        self.items = []
        self.keeps_items = True

    def __dealloc__(self):
        free(self.costs)

    @property
    def request_context(self):
        return self.context

    # ---- from the connection ----

    cdef int on_item(self, object item, int kind, bint last) except -1:
        cdef Py_ssize_t cost = len(item) + self.source.item_overhead
        if self.closed:
            if not self.source.dead:
                self.source.consumed(self, cost)
            return 0
        if kind or self.reply_type is not None:
            try:
                item = decode_item(item, kind, self.reply_type)
            except DecodeError as error:
                error.peer = self.channel.peer
                error.sent = "yes"
                error.request_id = self.request_id()
                conn = self.conn
                self.finish(error)
                self.give_up(conn)
                if not self.source.dead:
                    self.source.consumed(self, cost)
                return self.wake(False)
        self.add(item, cost)
        if last:
            self.finish(None)
        else:
            # The next gap is timed from when the caller waits for an item: while it is busy, the worker may have to wait.
            self.state |= S_ACCEPTED
            if self.phase_deadline != INFINITY:
                self.set_phase("between_items", INFINITY)
        if self.waiting and self.callback is not None:
            # Once for all items that have come together, not once for each.
            if self.source.in_dispatch:
                if not self.wake_queued:
                    self.wake_queued = True
                    self.source.to_wake.append(self)
                return 0
        if self.waiting:
            return self.wake(True)
        return 0

    cdef bint on_restart(self) except -1:
        if self.delivered or self.closed:
            return False
        # Their credit goes with them: the new run begins with a full window.
        self.items.clear()
        self.head = 0
        if self.phase == "between_items":
            self.set_phase("first_item", self.first_item_timeout)
        return True

    cdef int add(self, object item, Py_ssize_t cost) except -1:
        cdef Py_ssize_t n = len(self.items)
        cdef uint32_t *costs
        if n >= self.costs_cap:
            costs = <uint32_t *>realloc(self.costs, (self.costs_cap * 2 + 16) * sizeof(uint32_t))
            if costs is NULL:
                raise MemoryError()
            self.costs = costs
            self.costs_cap = self.costs_cap * 2 + 16
        self.costs[n] = <uint32_t>cost
        self.items.append(item)
        return 0

    cdef int await_item(self) except -1:
        """The caller begins to wait for an item."""
        self.waiting = True
        if self.between_items_timeout != INFINITY and self.delivered and self.phase_deadline == INFINITY:
            self.set_phase("between_items", self.between_items_timeout)
        return 0

    cdef int set_phase(self, str phase, double timeout) except -1:
        self.phase = phase
        self.phase_timeout = timeout
        if timeout == INFINITY:
            self.phase_deadline = INFINITY
        else:
            self.phase_deadline = <double>_monotonic() + timeout
        return self.rearm()

    cdef int on_accept(self) except -1:
        if self.phase == "accept":
            self.set_phase("first_item", self.first_item_timeout)
        return 0

    cdef int on_end(self) except -1:
        self.finish(None)
        return self.wake(True) if self.waiting else 0

    cdef int finish(self, object error) except -1:
        if not self.finished:
            self.finished = True
            self.outcome = RESULT
            if error is not None and "delivered" in error.own_fields:
                error.delivered = self.delivered + len(self.items) - self.head
            self.value = error
            self.settle()
        return 0

    cdef int fail_with(self, object error, bint direct) except -1:
        if self.finished:
            return 0
        self.finish(error)
        if self.waiting:
            return self.wake(direct)
        return 0

    def _cancel_request(self, int kind):
        cdef Link conn = self.conn
        if self.finished:
            return
        if kind == 1:
            self.ask_to_stop(conn)
            return
        self.fail_with(
            Cancelled("the stream was killed by its context", peer=self.channel.peer, sent=self.sent_state(),
                      request_id=self.request_id()),
            False,
        )
        self.give_up(conn)

    def close(self):
        """Give up: kills the handler if it still runs, drops queued items. May be called twice."""
        cdef Link conn = self.conn
        cdef Py_ssize_t i
        cdef long cost = 0
        if self.closed:
            return
        self.closed = True
        for i in range(self.head, len(self.items)):
            cost += self.costs[i]
        self.items = []
        self.head = 0
        if not self.finished:
            self.finish(self.closed_error())
            if self.loop is None or not self.loop.is_closed():
                self.give_up(conn)
        if cost and self.source is not None and not self.source.dead and (self.loop is None or not self.loop.is_closed()):
            self.source.consumed(self, cost)
        if self.waiting:
            self.wake(False)

    cdef object closed_error(self):
        """For whoever waits for an item, or asks for one later: a stream that was cut must not look complete."""
        return Cancelled("the stream was closed before its end", sent=self.sent_state(), request_id=self.request_id())

    # ---- async iteration ----

    def __await__(self):
        return self

    def __iter__(self):
        return self

    def __next__(self):
        cdef PyObject *result = NULL
        cdef int state = _items_send(self, None, &result)
        value = <object>result
        Py_DECREF(value)
        if state == PYGEN_NEXT:
            return value
        raise StopIteration(value)

    def send(self, value):
        return self.__next__()

    def throw(self, *args):
        self.waiting = False
        _throw(args)

    cdef object pop(self, long *cost):
        """The next item, which has arrived, and what it costs in credit: the caller sees to ``source.consumed``."""
        cdef Py_ssize_t head = self.head
        cdef object item = self.items[head]
        cost[0] = self.costs[head]
        self.items[head] = None
        self.head = head + 1
        if self.head == len(self.items):
            self.items.clear()
            self.head = 0
        self.delivered += 1
        return item

    cdef int take(self, PyObject **result) except? -1:
        cdef long cost = 0
        cdef object item = self.pop(&cost)
        if self.source is not None:
            self.source.consumed(self, cost)
        Py_INCREF(item)
        result[0] = <PyObject *>item
        return PYGEN_RETURN

    # ---- future protocol; `result` only tells the waiting task to look again ----

    def done(self):
        return self.head < len(self.items) or self.finished or self.wait_cancelled

    def settled(self):
        return self.head < len(self.items) or self.finished or self.wait_cancelled

    def cancelled(self):
        return self.wait_cancelled

    def cancel(self, msg=None):
        if not self.waiting or self.settled():
            return False
        self.wait_cancelled = True
        self.cancel_message = msg
        self.wake(False)
        return True

    def result(self):
        if self.wait_cancelled:
            self.wait_cancelled = False
            self.waiting = False
            raise CancelledError() if self.cancel_message is None else CancelledError(self.cancel_message)
        return None

    def exception(self):
        return None


cdef int _items_send(object self_, object arg, PyObject **result) except? -1:
    cdef ItemReader self = <ItemReader>self_
    if self.head < len(self.items):
        self.waiting = False
        return self.take(result)
    if self.finished or self.closed:
        self.waiting = False
        if self.value is not None:
            error = self.value
            self.value = None  # raised once; afterwards the stream is over
            raise error
        raise StopAsyncIteration
    if self.waiting and self.callback is not None:
        raise RuntimeError("another task is already waiting for an item of this stream")
    self.await_item()
    self._asyncio_future_blocking = True
    Py_INCREF(self)
    result[0] = <PyObject *>self
    return PYGEN_NEXT


cdef class ItemStream:
    """Items of one streamed reply: what the caller holds. Dropping it kills the handler, as ``close()`` does.

    ``__anext__`` hands out the reader itself, so an item that has arrived costs no further object.

    ``again(stream)`` is awaited for the first item in its place, if it is set and the item has not arrived: it may `take_over`
    the stream of another attempt. It must not refer to this object, which is closed when the last reference to it goes.
    """

    def __init__(self):
        raise TypeError("made by a channel only")

    @property
    def context(self):
        return self.reader.context

    @property
    def delivered(self):
        """Items handed out so far."""
        return self.reader.delivered

    @property
    def ready(self):
        """True if `__anext__` has something to return or to raise at once."""
        return self.reader.head < len(self.reader.items) or self.reader.finished

    def __aiter__(self):
        return self

    def __anext__(self):
        cdef ItemReader reader = self.reader
        if self.again is None:
            return reader
        if reader.delivered or reader.head < len(reader.items):
            self.again = None
            return reader
        return self.again(self)

    def take_over(self, ItemStream other not None):
        """Go on as ``other``, which is of no use afterwards. If this was closed, so is that."""
        cdef ItemReader reader = self.reader
        self.reader = other.reader
        other.reader = None
        if reader.closed:
            self.reader.close()

    def close(self):
        """Give up: kills the handler if it still runs, drops queued items. May be called twice."""
        self.reader.close()

    def __del__(self):
        if self.reader is None or self.reader.closed or self.reader.source is None:
            return
        if PyThread_get_thread_ident() == self.thread:
            self.reader.close()
        elif not self.reader.loop.is_closed():  # collected by another thread
            self.reader.loop.call_soon_threadsafe(self.reader.close)


cdef ItemStream make_item_stream(ItemReader reader):
    cdef ItemStream stream = ItemStream.__new__(ItemStream)
    stream.reader = reader
    stream.thread = PyThread_get_thread_ident()
    return stream


dw_set_am_send(<PyObject *>CallFuture, <dw_sendfunc>_call_send)
dw_set_am_send(<PyObject *>ItemReader, <dw_sendfunc>_items_send)


# ---- handlers ----------------------------------------------------------------------------------------------------------


cdef class EndpointEntry:
    """A served endpoint: the prepared handler and its counters."""

    def __init__(self, str name, handler):
        self.name = name
        self.handler = handler
        self.function = handler.function
        self.streaming = handler.streaming
        self.takes_context = handler.takes_context
        self.request_type = handler.request_type
        self.codec = handler.codec
        self.max_in_flight = handler.max_in_flight


cdef class HandlerTask(StreamBase):
    """A running handler: the current task of its code, and the server's end of the stream."""

    def __init__(self):
        raise TypeError("made by the server only")

    cdef int begin(self, Link conn, EndpointEntry entry, object payload, int kind, object meta, double deadline,
                   double accept_at, object base_context) except -1:
        cdef Context context = self.context if self.pycontext is not None else Context.__new__(Context)
        cdef object request
        self.entry = entry
        self.peer = conn.peer
        self.deadline = deadline
        self.reply_kind = self.reply_kind_ or kind
        self._log_destroy_pending = True
        context._deadline = deadline
        context._headers = meta
        context._id = self.in_id
        context._connection_id = conn.connection_id
        context._seq = self.seq
        # Runs that the caller began anew, and deliveries of the last of them.
        context.delivery_count = self.deliveries or 1
        self.context = context
        entry.in_flight += 1
        entry.started += 1
        conn.arm(self, min(deadline, accept_at))
        if kind == 0 and entry.request_type is None:
            request = payload
        else:
            try:
                request = decode_item(payload, kind, entry.request_type)
            except DecodeError as error:
                error.phase = "decode"
                return self.finish_error(error, True)
        if self.state & S_STOP_EARLY:
            context.set_cancelled(CTX_STOPPED)
        if self.pycontext is None:
            self.set_variables(base_context)
        try:
            self.coro = entry.function(request, context) if entry.takes_context else entry.function(request)
        except Exception as error:  # noqa: BLE001 - user code
            return self.finish_error(error, False)
        if not entry.streaming:
            self.awaitable = self.coro
        return self.step(None)

    cdef int set_variables(self, object base_context) except -1:
        """Give the handler context variables of its own, with the request's context among them."""
        cdef PyObject *variables
        self.pycontext = PyContext_Copy(base_context)
        PyContext_Enter(self.pycontext)
        try:
            PyContextVar_Set(current_var, self.context)
        finally:
            PyContext_Exit(self.pycontext)
        variables = dw_context_vars(self.pycontext)
        self.variables = None if variables is NULL else <object>variables
        return 0

    cdef int step(self, object error) except -1:
        """Run the handler until it suspends, ends, or has to wait for credit."""
        cdef PyObject *result = NULL
        cdef int state
        cdef object value
        cdef bint batch
        cdef Link conn
        if self.done_:
            return 0
        if self._must_cancel:
            if not isinstance(error, CancelledError):
                error = CancelledError() if self.cancel_message_ is None else CancelledError(self.cancel_message_)
            self._must_cancel = False
        self.waiting_for = None
        self.started = True
        self.running = True
        conn = self.conn
        batch = conn is not None and conn.in_dispatch
        if conn is not None:
            conn.stepping = True
        PyContext_Enter(self.pycontext)
        # What asyncio's _enter_task and _leave_task do, less their checks: current_task() of the handler's code is this object.
        # Within a read callback the entry is left for the next handler to overwrite; the callback's end removes it.
        PyDict_SetItem(_tasks, self.loop, self)
        try:
            while True:
                if self.awaitable is None:
                    # Between two items of a generator.
                    if error is not None:
                        self.awaitable = self.coro.athrow(error)
                        self.closing = True
                        error = None
                    elif self.driven:
                        self.awaitable = self.coro
                    else:
                        self.awaitable = dw_anext(self.coro)
                elif error is not None and self.driven and self.awaitable is self.coro:
                    self.awaitable = self.coro.athrow(error)  # at its await; it has no throw() of its own
                    error = None
                if error is not None:
                    raised, error = error, None
                    try:
                        value = self.awaitable.throw(raised)
                        state = PYGEN_NEXT
                    except StopIteration as stop:
                        value = stop.value
                        state = PYGEN_RETURN
                    finally:
                        raised = None
                else:
                    state = PyIter_Send(self.awaitable, None, &result)
                    value = <object>result
                    Py_DECREF(value)
                if self.driven and self.awaitable is self.coro:
                    if state == PYGEN_RETURN:
                        self.awaitable = None
                        self.finish_ok(None)
                        return 0
                    if dw_is_item(value):
                        value = dw_item(value)
                        state = PYGEN_RETURN
                if state == PYGEN_NEXT:
                    self.suspend(value)
                    return 0
                if not self.entry.streaming:
                    self.awaitable = None
                    self.finish_ok(value)
                    return 0
                self.awaitable = None
                if self.closing:
                    raise RuntimeError("the streaming handler yielded an item after it was killed")
                # The first step went through anext(), which tells the loop of the generator (sys.set_asyncgen_hooks).
                self.driven = dw_drivable(self.coro)
                if not self.emit(value, False):
                    return 0
                if self._must_cancel:
                    self._must_cancel = False
                    error = CancelledError() if self.cancel_message_ is None else CancelledError(self.cancel_message_)
        except StopAsyncIteration as stop:
            self.awaitable = None
            if self.entry.streaming:
                self.finish_ok(None)
            else:
                self.finish_error(stop, False)  # raised by the handler's own code, for example by anext()
        except (KeyboardInterrupt, SystemExit) as fatal:
            self.finish_error(fatal, False)
            self.loop.call_soon(_raise, fatal)
        except BaseException as failure:  # noqa: BLE001 - whatever the handler raised goes to the caller
            self.finish_error(failure, False)
        finally:
            self.running = False
            if conn is not None:
                conn.stepping = False
            if not batch:
                leave_task(self.loop)
            PyContext_Exit(self.pycontext)
            if self._must_cancel and not self.done_ and self.waiting_for is None and self.awaitable is None:
                self.loop.call_soon(self._step_killed)  # killed by its own step, e.g. because the connection broke while writing
        return 0

    cdef int suspend(self, object future) except -1:
        """The handler awaits ``future``: what Task.__step does with what a coroutine yields."""
        cdef object blocking
        if not self.registered:
            self.registered = True
            _register_task(self)
        if future is None:  # a bare yield, as in asyncio.sleep(0)
            self.loop.call_soon(self._wakeup_bare, context=self.pycontext)
            return 0
        blocking = getattr(future, "_asyncio_future_blocking", None)
        if blocking is None or not blocking:
            problem = RuntimeError(
                f"the handler yielded {future!r}, which is not a future" if blocking is None
                else f"yield was used instead of yield from in {self!r} with {future!r}"
            )  # fmt: skip
        elif future is self:
            problem = RuntimeError(f"Task cannot await on itself: {self!r}")
        elif future.get_loop() is not self.loop:
            problem = RuntimeError(f"{self!r} got Future {future!r} attached to a different loop")
        else:
            future._asyncio_future_blocking = False
            if self.wakeup_ is None:
                self.wakeup_ = self._wakeup
            future.add_done_callback(self.wakeup_, context=self.pycontext)
            self.waiting_for = future
            if self._must_cancel and future.cancel(self.cancel_message_):
                self._must_cancel = False
            return 0
        self.loop.call_soon(self._throw_in, problem, context=self.pycontext)
        return 0

    # The loop (or a future of ours) runs these inside self.pycontext, which cannot be entered twice: leave it for the step.

    def _wakeup(self, future):
        error = None
        try:
            future.result()
        except BaseException as raised:  # noqa: BLE001 - the handler gets it at its await
            error = raised
        self._run(error)

    def _wakeup_bare(self):
        self._run(None)

    def _throw_in(self, error):
        self._run(error)

    cdef int _run(self, object error) except -1:
        PyContext_Exit(self.pycontext)
        try:
            self.step(error)
        finally:
            PyContext_Enter(self.pycontext)
        return 0

    cdef int emit(self, object item, bint last) except -1:
        """Send an item, or hold it until there is credit. Returns whether the next one may be produced."""
        cdef Py_buffer view
        cdef bint viewed = not PyBytes_CheckExact(item)
        cdef Link conn = self.conn
        cdef int kind = 0
        if conn is None:
            return 0 if last else 1  # the caller is gone; the handler has been killed and will notice
        if viewed:
            try:
                if not PyObject_CheckBuffer(item):
                    kind = self.reply_kind
                    if kind == 0:
                        kind = 2 if self.entry.codec == "json" else 1
                    if kind == 1:
                        try:
                            item = _msgpack_encode(item)
                        except (TypeError, ValueError, OverflowError, RecursionError, NotImplementedError, msgspec.MsgspecError):
                            item = encode(item, "msgpack")  # raises a DecodeError that names the type
                    else:
                        item = encode(item, "json")
                PyObject_GetBuffer(item, &view, 0)
            except DecodeError as error:
                error.sent = "yes"
                self.finish_error(error, True)
                return 0
            except (BufferError, ValueError) as error:
                self.finish_error(error, False)
                return 0
        else:  # tokens, mostly: the buffer protocol costs more than what it says here
            view.buf = PyBytes_AS_STRING(item)
            view.len = PyBytes_GET_SIZE(item)
        try:
            limit = min(conn.peer_max_message, conn.max_message)
            if view.len > limit:
                self.finish_error(conn.item_too_large(view.len, limit, self.entry.name), True)
                return 0
            if self.held is not None or not conn.may_send(self):
                self.held = item
                self.held_kind = kind
                self.held_last = last
                return 0
            self.item_sent = True
            conn.put_item(self, <const unsigned char *>view.buf, view.len, item, kind, last)
        finally:
            if viewed:
                PyBuffer_Release(&view)
        conn.wrote()
        if last:
            if not self.state & S_SENDING:
                conn.request_done(self)
            return 0
        return self.conn is not None and not self.state & S_SENDING

    cdef int emit_held(self) except -1:
        cdef Py_buffer view
        cdef Link conn = self.conn
        cdef object item = self.held
        if conn is None or not conn.may_send(self):
            return 0
        self.held = None
        PyObject_GetBuffer(item, &view, 0)
        try:
            self.item_sent = True
            conn.put_item(self, <const unsigned char *>view.buf, view.len, item, self.held_kind, self.held_last)
        finally:
            PyBuffer_Release(&view)
        conn.wrote()
        if self.held_last and not self.state & S_SENDING:
            conn.request_done(self)
        return 1

    cdef int on_credit(self) except -1:
        """Credit, the socket, or the end of a large item: go on where it stopped."""
        if self.held is not None:
            if not self.emit_held() or self.held_last:
                return 0
        if self.done_ or self.running or self.awaitable is not None or not self.entry.streaming:
            return 0
        if self.state & S_SENDING:
            return 0
        if self.conn is not None and self.conn.in_dispatch and not self.conn.stepping:
            return self.step(None)
        self.loop.call_soon(self._resume)
        return 0

    def _resume(self):
        if self.done_ or self.running or self.awaitable is not None or self.held is not None or self.waiting_for is not None:
            return
        if self.conn is not None and self.state & S_SENDING:
            return
        self.step(None)

    cdef int on_sent(self) except -1:
        if self.state & S_ENDED:
            if self.conn is not None:
                self.conn.request_done(self)
            return 0
        return self.on_credit()

    cdef int finish_ok(self, object result) except -1:
        self.done_ = True
        self.result_ = result
        if not self.entry.streaming:
            self.emit(result, True)
        elif self.conn is not None:
            self.conn.put_end(self)
            self.conn.wrote()
            self.conn.request_done(self)
        return self.settle()

    cdef int finish_error(self, object error, bint ours) except -1:
        """End with an error: one that the handler raised, or (``ours``) one of the server's own."""
        cdef Link conn = self.conn
        cdef object shown = error
        self.done_ = True
        self.held = None
        self.awaitable = None
        if isinstance(error, CancelledError):
            self.cancelled_ = True
            self.exception_ = error
            if self.timed_out:
                shown = DeadlineExceeded(
                    f"the handler of {self.entry.name} was still running at the request's deadline", phase="total", sent="yes"
                )
            elif self.evicted:
                shown = PeerLost(f"the worker is shutting down and ended its handler of {self.entry.name}", sent="yes")
            else:
                how = "was killed" if self.context._flags & CTX_KILLED else "cancelled itself"
                shown = Cancelled(f"the handler of {self.entry.name} {how}", sent="yes")
        else:
            self.exception_ = error
        self.entry.failed += 1
        if conn is not None:
            if not ours and shown is error and not getattr(error, "handler_untouched", False):
                # Also an error of ours that a nested call in the handler met: it says nothing about this request.
                body = handler_error_body(error, with_traceback=self.tracebacks)
            else:
                body = error_body(shown)
            conn.put_error(self, 0, body)
            conn.wrote()
            conn.request_done(self)
        return self.settle()

    cdef int settle(self) except -1:
        """The handler's code has ended."""
        if self.settled_:
            return 0
        self.settled_ = True
        if self.registered:
            _unregister_task(self)
        if self.conn is None:
            self.release()
        self.coro = None if self.coro is None or not self.running else self.coro
        self.wakeup_ = None
        if self.callbacks is not None:
            callbacks, self.callbacks = self.callbacks, None
            for callback, context in callbacks:
                self.loop.call_soon(callback, self, context=context)
        return 0

    cdef int release(self) except -1:
        """Code and reply have both gone: the request is no longer in flight."""
        cdef EndpointEntry entry = self.entry
        if self.released or entry is None:
            return 0
        self.released = True
        entry.in_flight -= 1
        if entry.in_flight == 0 and entry.on_idle is not None:
            entry.on_idle()
        return 0

    cdef int on_freed(self) except -1:
        if self.settled_:
            self.release()
        return 0

    cdef bint recyclable(self):
        """Has the handler ended without suspending, with its reply sent, so that nothing refers to it?"""
        return (
            self.released and self.conn is None and self.held is None and not self.registered and self.callbacks is None
            and self.name is None and not self.state & S_SENDING
        )  # fmt: skip

    cdef bint variables_untouched(self):
        """Did the handler neither keep its context or its context variables nor change them, so that the next may have them?

        A task or a callback that it started has a copy of the variables, which shares the mapping: then that is referred to
        by more than the original and us.
        """
        return (
            self.variables is not None and dw_refcnt(<PyObject *>self.pycontext) == 1
            and dw_refcnt(<PyObject *>self.context) == 2 and dw_refcnt(<PyObject *>self.variables) == 2
            and dw_context_vars(self.pycontext) == <PyObject *>self.variables
            and not dw_has_weakrefs(self.pycontext) and not dw_has_weakrefs(self.context)
            and (self.shown or dw_one_mapping(<PyObject *>self.variables, self.context))
        )  # fmt: skip

    cdef int recycle(self) except -1:
        """Back to the state of a new object, but for a context that nobody has seen any more of than its handler."""
        if self.variables_untouched():
            self.shown = True
            self.context._flags = 0
            self.context._id = None
            self.context._canceller = None
            self.context._waiters = None
        else:
            self.variables = None
            self.pycontext = None
            self.context = None
            self.shown = False
        self.entry = None
        self.coro = None
        self.awaitable = None
        self.result_ = None
        self.exception_ = None
        self.cancel_message_ = None
        self.in_meta = None
        self.in_id = None
        self.under = None
        self.reply_kind_ = 0
        self.attempt = 0
        self.deliveries = 0
        self.state = 0
        self.refund = 0
        self.timer = INFINITY
        self._must_cancel = False
        self._asyncio_future_blocking = False
        self.cancels = 0
        self.started = False
        self.running = False
        self.done_ = False
        self.settled_ = False
        self.released = False
        self.cancelled_ = False
        self.item_sent = False
        self.timed_out = False
        self.evicted = False
        self.closing = False
        self.driven = False
        return 0

    cdef int kill(self) except -1:
        """Cancel the handler, from outside of it."""
        if self.done_:
            return 0
        self.cancel()
        return 0

    def _step_killed(self):
        if not self.done_ and not self.running and self.waiting_for is None and self.awaitable is None:
            self.step(None)

    cdef int on_cancel(self, int kind) except -1:
        if not self.context._flags & kind:
            self.context.set_cancelled(CTX_KILLED if kind == 2 else CTX_STOPPED)
        if kind == 2:
            if self.done_ and self.held is not None:
                # The reply is waiting for credit and nobody wants it any more.
                self.held = None
                self.conn.put_end(self)
                self.conn.wrote()
                self.conn.request_done(self)
                return 0
            if self.done_ and self.conn is not None and self.state & S_SENDING:
                self.conn.put_error(self, 0, error_body(Cancelled("killed while the reply was being sent", sent="yes")))
                self.conn.wrote()
                self.conn.request_done(self)
                return 0
            return self.kill()
        return 0

    cdef int on_timer(self, double now) except -1:
        self.timer = INFINITY
        if self.entry is None:
            return self.upload_late()
        if self.done_ and self.held is None:
            return 0
        if now >= self.deadline:
            self.timed_out = True
            if self.done_:
                return self.on_cancel(2)
            self.context.set_cancelled(CTX_KILLED)
            return self.kill()
        if not self.item_sent and not self.state & S_ACCEPTED:
            self.state |= S_ACCEPTED
            self.conn.put_accept(self)
            self.conn.wrote()
        if self.deadline != INFINITY:
            self.conn.arm(self, self.deadline)
        return 0

    cdef int upload_late(self) except -1:
        """The request's payload was announced and did not arrive in time: give its memory back."""
        cdef Link conn = self.conn
        if conn is None:
            return 0
        self.in_target = None
        conn.put_error(self, 0, error_body(DeadlineExceeded(
            f"of the request's {self.in_total} bytes only {self.in_have} arrived in time", phase="send", sent="no"
        )))  # fmt: skip
        conn.request_done(self)
        return conn.wrote()

    cdef int on_lost(self, object error) except -1:
        """The connection is gone: the caller cannot be reached any more."""
        self.held = None
        if self.entry is None:
            return 0  # the request had not arrived completely
        if self.settled_:
            return self.release()
        if not self.done_:
            self.context.set_cancelled(CTX_KILLED)
            return self.kill()
        return 0

    # ---- what asyncio.Task offers ----

    def cancel(self, msg=None):
        if self.done_:
            return False
        self.cancels += 1
        if self.waiting_for is not None and self.waiting_for.cancel(msg):
            return True
        self._must_cancel = True
        self.cancel_message_ = msg
        if self.waiting_for is None and self.awaitable is None and not self.running and self.started:
            # A generator between two items, waiting for credit.
            self.held = None
            self.loop.call_soon(self._step_killed)
        return True

    def cancelling(self):
        return self.cancels

    def uncancel(self):
        if self.cancels > 0:
            self.cancels -= 1
            if self.cancels == 0:
                self._must_cancel = False
        return self.cancels

    def done(self):
        return self.done_

    def cancelled(self):
        return self.cancelled_

    def result(self):
        if not self.done_:
            raise InvalidStateError("Result is not ready.")
        if self.exception_ is not None:
            raise self.exception_
        return self.result_

    def exception(self):
        if not self.done_:
            raise InvalidStateError("Exception is not set.")
        if self.cancelled_:
            raise self.exception_
        return self.exception_

    def add_done_callback(self, callback, *, context=None):
        if context is None:
            context = copy_context()
        if self.done_:
            self.loop.call_soon(callback, self, context=context)
            return
        if self.callbacks is None:
            self.callbacks = []
        self.callbacks.append((callback, context))

    def remove_done_callback(self, callback):
        if self.callbacks is None:
            return 0
        kept = [pair for pair in self.callbacks if pair[0] != callback]
        removed = len(self.callbacks) - len(kept)
        self.callbacks = kept
        return removed

    def get_loop(self):
        return self.loop

    @property
    def _loop(self):
        return self.loop

    # asyncio.gather and wait_for look at these two

    @property
    def _cancel_message(self):
        return self.cancel_message_

    def _make_cancelled_error(self):
        return CancelledError() if self.cancel_message_ is None else CancelledError(self.cancel_message_)

    @property
    def _fut_waiter(self):
        return self.waiting_for

    def get_coro(self):
        return self.coro

    def get_context(self):
        return self.pycontext

    def get_name(self):
        return self.name or f"dynwire-{self.entry.name}-{self.seq}"

    def set_name(self, value):
        self.name = str(value)

    def get_stack(self, *, limit=None):
        frame = getattr(self.coro, "cr_frame", None) or getattr(self.coro, "ag_frame", None)
        return [] if frame is None or self.done_ else [frame]

    def print_stack(self, *, limit=None, file=None):
        import traceback

        for frame in self.get_stack():
            traceback.print_stack(frame, limit=limit, file=file)

    def __await__(self):
        if not self.done_:
            self._asyncio_future_blocking = True
            yield self
        if not self.done_:
            raise RuntimeError("await wasn't used with future")
        return self.result()

    def __repr__(self):
        state = "cancelled" if self.cancelled_ else "finished" if self.done_ else "pending"
        return f"<HandlerTask {self.get_name()} {state}>"
