"""Context of a request: identity, deadline, headers and cancellation, the same on every plane and on both sides."""

import asyncio
import contextvars
import threading
import time

import msgspec
from cpython.object cimport PyObject
from libc.math cimport INFINITY

cdef extern from "Python.h":
    int PyContextVar_Get(object var, PyObject *default_value, PyObject **value) except -1
    void Py_DECREF(PyObject *)
    void PyErr_WriteUnraisable(object)

cdef extern from *:
    """
    static PyObject *dw_asyncgen_hook(void) { return PyThreadState_Get()->async_gen_finalizer; }
    """
    PyObject *dw_asyncgen_hook()

cdef object current_var = contextvars.ContextVar("dynwire_context", default=None)
cdef object _monotonic = time.monotonic
cdef object _unpack = msgspec.msgpack.decode


cpdef loop_mark():
    """An object that tells running event loops apart, or None in a thread that runs none.

    It is the hook that a running loop sets for async generators, read from the thread's state: up to Python 3.11
    ``asyncio._get_running_loop`` asks the system for the process id each time, which costs more than all else in a call.
    """
    cdef PyObject *hook = dw_asyncgen_hook()
    return None if hook is NULL else <object>hook


INHERITED_HEADERS = ("traceparent", "tracestate", "baggage")
"""Headers that a nested call takes over from the request it is made in (W3C Trace Context, W3C Baggage)."""


cpdef Context current_context():
    """The context of the request whose handler is running, or None outside of handlers.

    Works in the handler itself, in tasks it started and in threads started with its context variables.
    """
    cdef PyObject *value = NULL
    PyContextVar_Get(current_var, NULL, &value)
    if value is NULL:
        return None
    cdef object found = <object>value
    Py_DECREF(value)
    return <Context?>found if found is not None else None


cdef class Context:
    """Identity, deadline, headers and cancellation of one request.

    A handler receives one as its second argument; a caller may create one and pass it as ``context=``, to choose the request
    id or headers, or to stop or kill the request from elsewhere.

    ``stop()`` asks the handler to finish early (it sees ``is_stopped()``, and the caller still gets what it sends until it
    ends); ``kill()`` ends it now: an async handler is cancelled, a blocking one sees ``is_killed()``. Both may be called from
    any thread on the handler's side; on the caller's side from the thread or loop that made the call, for other threads use
    ``loop.call_soon_threadsafe(context.kill)``.
    """

    def __init__(self, *, id=None, headers=None, timeout=None, deadline=None):
        self._deadline = INFINITY
        if deadline is not None:
            self._deadline = deadline
        if timeout is not None:
            self._deadline = min(self._deadline, <double>_monotonic() + <double>timeout)
        self._id = None if id is None else str(id)
        if headers is not None:
            headers = {str(k).lower(): str(v) for k, v in dict(headers).items()}
        self._headers = headers
        self.delivery_count = 1

    @property
    def id(self):
        """Request id (str): the caller's, or one computed from connection and sequence number; the same on both sides."""
        if self._id is None:
            if self._headers is not None:
                self._id = self.headers.get("x-request-id")
            if self._id is None and self._connection_id is not None:
                self._id = f"{self._connection_id.hex()}-{self._seq:x}"
        return self._id

    @property
    def deadline(self):
        """Moment in ``time.monotonic()`` seconds by which the request ends, or None."""
        return None if self._deadline == INFINITY else self._deadline

    def time_remaining(self):
        """Seconds until the deadline, 0.0 when it has passed, or None without a deadline."""
        if self._deadline == INFINITY:
            return None
        cdef double left = self._deadline - <double>_monotonic()
        return left if left > 0 else 0.0

    @property
    def headers(self):
        """Headers of the request: dict of lower-case names to str. Changing it changes nothing on the wire."""
        if self._headers is None:
            self._headers = {}
        elif type(self._headers) is bytes:
            self._headers = _unpack(self._headers, type=dict[str, str])
        return self._headers

    cdef void set_cancelled(self, int kind):
        cdef list waiters
        self._flags |= kind | CTX_STOPPED
        if self._waiters is not None:
            waiters = self._waiters
            self._waiters = None
            for waiter in waiters:
                try:
                    waiter()
                except Exception:
                    # A user's callback; the request's end must not depend on it.
                    PyErr_WriteUnraisable(waiter)

    def stop(self):
        """Ask the handler to finish early."""
        if not self._flags & CTX_STOPPED:
            self.set_cancelled(CTX_STOPPED)
            if self._canceller is not None:
                self._canceller(1)

    def kill(self):
        """End the request now."""
        if not self._flags & CTX_KILLED:
            self.set_cancelled(CTX_KILLED)
            if self._canceller is not None:
                self._canceller(2)

    def is_stopped(self):
        """True after stop or kill, from either side."""
        return (self._flags & CTX_STOPPED) != 0

    def is_killed(self):
        """True after kill, from either side."""
        return (self._flags & CTX_KILLED) != 0

    def on_stop(self, callback):
        """Call ``callback()`` once, when the request is stopped or killed, in the thread that does it; at once if it is."""
        if self._flags & CTX_STOPPED:
            callback()
            return
        if self._waiters is None:
            self._waiters = []
        self._waiters.append(callback)

    async def stopped(self):
        """Wait until the request is stopped or killed (for async handlers)."""
        if self._flags & CTX_STOPPED:
            return
        loop = asyncio.get_running_loop()
        event = asyncio.Event()

        def wake():
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:
                if not loop.is_closed():
                    raise

        self.on_stop(wake)
        await event.wait()

    def wait_stopped(self, timeout=None):
        """Block until the request is stopped or killed, at most ``timeout`` seconds; returns whether it is."""
        if not self._flags & CTX_STOPPED:
            event = threading.Event()
            self.on_stop(event.set)
            event.wait(timeout)
        return (self._flags & CTX_STOPPED) != 0

    # For planes written in Python ---------------------------------------------------------------------------------------

    def _bind(self, canceller):
        """Route stop (1) and kill (2) to the transport; None unbinds. For planes."""
        self._canceller = canceller
        if canceller is not None and self._flags:
            canceller(2 if self._flags & CTX_KILLED else 1)

    def _cancelled_by_peer(self, int kind):
        """Record stop (1) or kill (2) that came from the other side. For planes."""
        if (self._flags & kind) == 0:
            self.set_cancelled(kind)

    def _enter(self):
        """Make this the current context; returns the token for `_exit`. For planes."""
        return current_var.set(self)

    def _exit(self, token):
        current_var.reset(token)

    def __repr__(self):
        state = "killed" if self._flags & CTX_KILLED else "stopped" if self._flags & CTX_STOPPED else "live"
        return f"<dynwire.Context {self.id} {state}>"
