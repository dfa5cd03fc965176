from cpython.object cimport PyObject
from libc.stdint cimport uint32_t

from ._context cimport Context
from ._link cimport Link, StreamBase

cdef class ChannelBase:

    cdef readonly object instance
    cdef readonly int in_flight
    cdef readonly object peer

cdef class BlockingCaller:

    cdef public object _home
    cdef public object _default_timeout

cdef enum:
    PENDING = 0
    RESULT = 1
    FAILED = 2
    CANCELLED = 3

cdef class Waiter(StreamBase):

    cdef object loop
    cdef object callback
    cdef object callback_context
    cdef list more_callbacks
    cdef public bint _asyncio_future_blocking
    cdef int outcome
    cdef object value                # result, or the exception
    cdef object cancel_message
    cdef ChannelBase channel
    cdef Context context             # of the request, or None
    cdef object reply_type
    cdef object payload              # (pending) what waits to be written
    cdef double total_deadline
    cdef double phase_deadline
    cdef double total_timeout
    cdef str total_setting           # what set it, if that was not the call; for the error
    cdef double phase_timeout
    cdef str phase
    cdef object request_id_

    cdef int wake(self, bint direct) except -1
    cdef int settle(self) except -1
    cdef str request_id(self)
    cdef str sent_state(self)
    cdef int fail_with(self, object error, bint direct) except -1
    cdef int rearm(self) except -1
    cdef int give_up(self, Link conn) except -1
    cdef int ask_to_stop(self, Link conn) except -1
    cdef object timeout_error(self, double now)

cdef class CallFuture(Waiter):
    cdef int _succeed(self, object item, int kind) except -1

cdef class ItemReader(Waiter):
    cdef list items                  # decoded items that nobody has taken yet, from `head` on
    cdef uint32_t *costs             # what each of them costs in credit; same indexes
    cdef Py_ssize_t costs_cap
    cdef int add(self, object item, Py_ssize_t cost) except -1
    cdef int await_item(self) except -1
    cdef Py_ssize_t head
    cdef bint waiting
    cdef bint wake_queued
    cdef bint wait_cancelled
    cdef bint finished               # no more items will come; `value` is None or the error
    cdef bint closed
    cdef readonly long delivered
    cdef double first_item_timeout
    cdef double between_items_timeout
    cdef Link source       # its connection, also after the last item has arrived
    cdef object pop(self, long *cost)
    cdef int take(self, PyObject **result) except? -1
    cdef int finish(self, object error) except -1
    cdef object closed_error(self)
    cdef int set_phase(self, str phase, double timeout) except -1

cdef class ItemStream:
    cdef readonly ItemReader reader
    cdef public object again         # what gets the first item, while the request may be tried elsewhere; None: nobody
    cdef unsigned long thread

cdef ItemStream make_item_stream(ItemReader reader)

cdef class EndpointEntry:
    cdef readonly str name
    cdef readonly object handler
    cdef object function
    cdef bint streaming
    cdef bint takes_context
    cdef object request_type
    cdef object codec
    cdef readonly int in_flight
    cdef readonly int max_in_flight
    cdef public bint draining
    cdef public bint removed
    cdef public object on_idle
    cdef readonly long started
    cdef readonly long failed

cdef class HandlerTask(StreamBase):
    cdef object __weakref__
    cdef object loop
    cdef EndpointEntry entry
    cdef Context context
    cdef object pycontext
    cdef object variables            # what pycontext holds, as long as it was not changed
    cdef bint shown                  # that variables hold the context where it is counted, see dw_one_mapping
    cdef object coro                 # coroutine or async generator
    cdef object awaitable            # what is being driven: coro itself, or the awaitable of one step of the generator
    cdef object waiting_for          # future that it is suspended on
    cdef object wakeup_
    cdef object name
    cdef list callbacks
    cdef object result_
    cdef object exception_
    cdef object cancel_message_
    cdef public bint _asyncio_future_blocking
    cdef public bint _must_cancel
    cdef public bint _log_destroy_pending
    cdef int cancels
    cdef bint started
    cdef bint running
    cdef bint registered
    cdef bint done_
    cdef bint settled_               # the handler's code has ended
    cdef bint released               # and its reply has left: not in flight any more
    cdef bint cancelled_
    cdef bint item_sent
    cdef bint timed_out
    cdef bint evicted                # killed because this worker is shutting down
    cdef bint closing                # the generator is being closed
    cdef bint driven                 # the generator is sent to without an awaitable for each item
    cdef object held                 # encoded item that waits for credit
    cdef int held_kind
    cdef bint held_last
    cdef int reply_kind              # codec of the request, for replies
    cdef double deadline
    cdef object peer
    cdef bint tracebacks

    cdef int begin(self, Link conn, EndpointEntry entry, object payload, int kind, object meta, double deadline,
                   double accept_at, object base_context) except -1
    cdef int set_variables(self, object base_context) except -1
    cdef bint variables_untouched(self)
    cdef int step(self, object error) except -1
    cdef int suspend(self, object future) except -1
    cdef int emit(self, object item, bint last) except -1
    cdef int emit_held(self) except -1
    cdef int finish_ok(self, object result) except -1
    cdef int finish_error(self, object error, bint ours) except -1
    cdef int settle(self) except -1
    cdef int kill(self) except -1
    cdef int _run(self, object error) except -1
    cdef bint recyclable(self)
    cdef int release(self) except -1
    cdef int upload_late(self) except -1
    cdef int recycle(self) except -1

cdef int leave_task(object loop) except -1
cdef int wake_readers(Link conn) except -1
