"""Where blocked threads and one event loop meet: calls go over in a queue, results come back through a semaphore per thread.

A blocking call on a plane that has asyncio code only costs little more than the two thread switches that it cannot do without:
no coroutine, no task and no `concurrent.futures.Future` per call. What many threads submit while the loop is busy or on its way
is one wake-up of the loop, and what one read of a socket completes wakes the threads together, at the end of the batch.
docs/performance.md has the measurements.

Threads share these objects under the GIL, which is released in system calls only: between two of them, code here is atomic.
"""

import asyncio
import concurrent.futures
import contextvars
import os
import threading
import weakref
from asyncio import CancelledError, iscoroutine

from libc.math cimport INFINITY

from ._awaitable cimport PENDING, ItemReader, ItemStream, Waiter
from ._context cimport loop_mark
from ._link cimport set_calls_follow

from .errors import ForkedManager, ManagerClosed

include "_semaphore.pxi"

cdef extern from *:
    """
    #include <sched.h>
    #include <stdint.h>
    #include <unistd.h>
    #include <sys/eventfd.h>
    static inline void dw_signal(int fd) { uint64_t one = 1; ssize_t n = write(fd, &one, 8); (void)n; }
    static inline void dw_unsignal(int fd) { uint64_t n; ssize_t r = read(fd, &n, 8); (void)r; }
    static inline int dw_load(int *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    static inline void dw_add(int *p, int value) { __atomic_add_fetch(p, value, __ATOMIC_ACQ_REL); }
    """
    int eventfd(unsigned int initial, int flags) nogil
    int EFD_NONBLOCK
    int EFD_CLOEXEC
    void dw_signal(int fd) nogil
    void dw_unsignal(int fd) nogil
    int dw_load(int *p) nogil
    void dw_add(int *p, int value) nogil
    int sched_yield() nogil
    int close(int fd) nogil

cdef extern from "Python.h":
    int PyErr_CheckSignals() except -1
    unsigned long PyThread_get_thread_ident()

# How long the main thread sleeps before it looks for Ctrl-C, which may come just before the sleep.
cdef double SIGNAL_SLICE_S = 0.1
# The longest that a submission relies on others to wake the loop. A sleep that ends before the kernel's next tick (1 to 10 ms)
# costs twice as much, because the processor's timer has to be set for it.
cdef double DEFERRED_S = 0.01
cdef long REFUND_BYTES = 32768       # taken items go back as credit in steps of this size, or when the reader has to wait

cdef unsigned long main_ident = threading.main_thread().ident
cdef object _hubs = weakref.WeakSet()
cdef object _thread_local = threading.local()


def _after_fork_in_child():
    global main_ident
    main_ident = PyThread_get_thread_ident()
    for hub in list(_hubs):
        (<Hub>hub).forked = True


os.register_at_fork(after_in_child=_after_fork_in_child)


cdef class Sleeper:
    """The semaphore of one thread."""
    cdef sem_t sem
    cdef bint parked                 # it sleeps, or is about to, and nobody has woken it yet
    cdef Hub woken_by

    def __cinit__(self):
        sem_init(&self.sem, 0, 0)

    def __dealloc__(self):
        sem_destroy(&self.sem)


cdef Sleeper my_sleeper():
    sleeper = getattr(_thread_local, "sleeper", None)
    if sleeper is None:
        sleeper = _thread_local.sleeper = Sleeper()
    return <Sleeper>sleeper


cdef enum:
    DO_CALL = 0
    DO_OPEN = 1                      # a stream
    DO_RUN = 2                       # a coroutine


OPEN_STREAM = DO_OPEN


cdef class Pending:
    """What a thread waits for. Called by whatever is awaited for it, on the loop, when that is done."""
    cdef Hub hub
    cdef Sleeper sleeper

    def __call__(self, future):
        self.hub.woke(self)

    cdef int begin(self) except -1:
        """On the loop: the thread has submitted it."""
        return 0

    cdef int abort(self) except -1:
        """On the loop, which ends."""
        return 0


cdef class Ticket(Pending):
    """A call, the opening of a stream, or a coroutine."""
    cdef int kind
    cdef bint done
    cdef bint given_up               # the thread has gone
    cdef object face                 # the channel's blocking face; of a coroutine: the coroutine
    cdef object payload
    cdef object timeouts
    cdef object reply_type
    cdef object context              # of the request; of a coroutine: its context variables
    cdef object future
    cdef object value
    cdef object error

    def __call__(self, future):
        if self.done:
            return
        # Taken here, so that the thread does not get to free a task: the callbacks of weak references to it are Python code, and
        # a Ctrl-C that falls into one is lost.
        self.future = None
        try:
            self.value = future.result()
        except CancelledError as error:
            # In the thread nothing was cancelled; asyncio's class is no Exception and would end the thread in silence.
            self.error = concurrent.futures.CancelledError()
            self.error.__cause__ = error
        except BaseException as error:
            self.error = error
        self.done = True
        self.hub.live.discard(self)
        self.hub.woke(self)

    cdef int begin(self) except -1:
        cdef object awaitable, channel
        cdef Waiter waiter
        if self.given_up:
            if self.future is not None and not self.done:
                self.future.cancel()
            elif self.kind == DO_RUN and self.face is not None:
                self.face.close()
            return 0
        try:
            if self.kind == DO_RUN:
                awaitable = self.hub.loop.create_task(self.face, context=self.context)
                self.face = None
            else:
                channel = self.face._channel
                if channel is None or not channel.ready:
                    awaitable = self.face._connect_first(self.kind, self.payload, self.timeouts, self.reply_type, self.context)
                elif self.kind == DO_CALL:
                    awaitable = channel.call(self.payload, self.timeouts, self.reply_type, self.context)
                else:
                    self.value = channel.stream(self.payload, self.timeouts, self.reply_type, self.context)
                    self.done = True
                    return self.hub.woke(self)
                if iscoroutine(awaitable):
                    awaitable = self.hub.loop.create_task(awaitable, context=self.hub.task_variables.copy())
        except BaseException as error:
            # Whatever it is, it belongs to the thread that made the call.
            self.error = error
            self.done = True
            return self.hub.woke(self)
        self.future = awaitable
        self.payload = None
        self.hub.live.add(self)
        if isinstance(awaitable, Waiter):
            waiter = <Waiter>awaitable
            if waiter.outcome == PENDING and waiter.callback is None:
                waiter.callback = self
                waiter.callback_context = self.hub.callback_variables
                return 0
        awaitable.add_done_callback(self, context=self.hub.callback_variables)
        return 0

    cdef int abort(self) except -1:
        if not self.done:
            self.done = True
            self.error = closed_during()
            if self.future is not None:
                self.future.cancel()
            elif self.kind == DO_RUN and self.face is not None:
                self.face.close()
            self.hub.woke(self)
        return 0

    cdef object outcome(self):
        if self.error is not None:
            try:
                raise self.error
            finally:
                self.error = None  # its traceback refers to us
        return self.value


cdef class Feed(Pending):
    """The items of one stream, between the reader on the loop and the thread that takes them."""
    cdef ItemStream items
    cdef ItemReader reader
    cdef long taken                  # cost of items taken that the connection does not know of
    cdef bint queued
    cdef bint waits                  # the reader is to start the timer between two items
    cdef bint closing

    cdef int begin(self) except -1:
        cdef ItemReader reader = self.reader
        cdef long taken = self.taken
        self.queued = False
        self.taken = 0
        if taken and reader.source is not None and not reader.source.dead:
            reader.source.consumed(reader, taken)
        if self.closing:
            self.items.close()
        elif self.waits:
            self.waits = False
            if reader.waiting:
                reader.await_item()
        return 0

    cdef int abort(self) except -1:
        return self.hub.woke(self)

    cdef bint has_news(self):
        if self.closing:
            return self.reader.closed  # what has come meanwhile is dropped
        return self.reader.head < len(self.reader.items) or self.reader.finished or self.reader.closed


cdef object closed_during():
    return ManagerClosed("the background event loop was closed during this call")


cdef class Hub:
    """The meeting place of one event loop. Made in any thread; `open`, `shut` and `close` run on the loop."""

    cdef object loop
    cdef list queue                  # what the loop is to do next: Pending or callable
    cdef list woken                  # Pending whose threads are to be woken at the end of this batch
    cdef set live                    # Pending that somebody waits for
    cdef bint signalled              # the loop has been told that there is something in the queue
    cdef bint in_drain
    cdef bint flush_scheduled
    cdef int resuming                # threads that were woken and do not run yet
    cdef int fd
    cdef int writers                 # threads that are about to write to fd; changed without the GIL
    cdef bint closed
    cdef bint forked
    cdef object task_variables       # context variables of tasks, callbacks, and of the queue: none. They must not be those of
    cdef object callback_variables   # whichever thread happened to wake the loop
    cdef object queue_variables
    cdef object drain_
    cdef object flush_
    cdef object __weakref__

    def __cinit__(self):
        self.fd = -1

    def __init__(self, loop):
        self.loop = loop
        self.queue = []
        self.woken = []
        self.live = set()
        self.task_variables = contextvars.Context()
        self.callback_variables = contextvars.Context()
        self.queue_variables = contextvars.Context()
        self.fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        if self.fd < 0:
            raise OSError("eventfd failed: too many open files?")
        self.drain_ = self._drain
        self.flush_ = self._flush
        _hubs.add(self)

    def __dealloc__(self):
        if self.fd >= 0:
            close(self.fd)

    # ---- the loop's side ----

    def open(self):
        """Begin to take what threads submit."""
        self.queue_variables.run(self.loop.add_reader, self.fd, self.drain_)

    def shut(self):
        """End every wait with `ManagerClosed`, now and from now on."""
        self.closed = True
        self.in_drain = True
        queue, self.queue = self.queue, []
        for item in queue:
            if isinstance(item, Ticket):
                (<Ticket>item).abort()
            elif isinstance(item, Feed):
                (<Feed>item).begin()
        live, self.live = self.live, set()
        for item in live:
            (<Pending>item).abort()
        self.in_drain = False
        self._flush()

    def close(self):
        """Give the descriptor back; after `shut`."""
        cdef int fd = self.fd
        self.loop.remove_reader(fd)
        with nogil:
            while dw_load(&self.writers):
                sched_yield()
        self.fd = -1
        close(fd)

    def _drain(self):
        cdef list queue
        dw_unsignal(self.fd)
        self.signalled = False
        self.in_drain = True
        try:
            while self.queue:
                queue, self.queue = self.queue, []
                set_calls_follow(len(queue) > 1)
                for item in queue:
                    try:
                        if isinstance(item, Pending):
                            (<Pending>item).begin()
                        else:
                            item()
                    except Exception as error:
                        self.loop.call_exception_handler({"message": f"{item!r} failed on the loop", "exception": error})
        finally:
            set_calls_follow(False)
            self.in_drain = False
            if self.woken:
                self._flush()

    cdef int woke(self, Pending pending) except -1:
        """Wake the thread at the end of this batch."""
        self.woken.append(pending)
        if not self.in_drain and not self.flush_scheduled:
            self.flush_scheduled = True
            self.loop.call_soon(self.flush_, context=self.queue_variables)
        return 0

    def _flush(self):
        """Wake the threads of this batch, without the GIL: a thread that finds it taken goes back to sleep at once."""
        cdef list woken = self.woken
        cdef list sleepers = []          # keeps them until sem_post has returned, when their threads may be gone
        cdef sem_t *sems[64]
        cdef int n = 0, i
        cdef Sleeper sleeper
        self.flush_scheduled = False
        self.woken = []
        for pending in woken:
            sleeper = (<Pending>pending).sleeper
            if sleeper is not None and sleeper.parked:
                sleeper.parked = False
                sleeper.woken_by = self
                self.resuming += 1
                sleepers.append(sleeper)
                sems[n] = &sleeper.sem
                n += 1
                if n == 64:
                    with nogil:
                        for i in range(n):
                            sem_post(sems[i])
                    n = 0
        with nogil:
            for i in range(n):
                sem_post(sems[i])

    # ---- the threads' side ----

    cpdef check(self):
        """Raise if this thread cannot wait for the loop."""
        if loop_mark() is not None:
            if asyncio.get_running_loop() is self.loop:
                raise RuntimeError(
                    "a blocking call of dynwire was made on its own background event loop (by an async handler or a callback); "
                    "it would wait for itself: use AsyncNetworkManager there, or a plain function as handler"
                )
            raise RuntimeError(
                "a blocking call of dynwire was made in a thread that runs an event loop, which would stop while it waits; "
                "use AsyncNetworkManager with await there, or make the call in a thread (asyncio.to_thread)"
            )
        if self.closed:
            raise ManagerClosed("the background event loop is closed")
        if self.forked:
            raise ForkedManager("this object belongs to the process before fork(); make a new one in the child")

    cdef int push(self, object item) except -1:
        """Have the loop deal with something; nobody waits for it."""
        self.queue.append(item)
        if not self.signalled:
            self.signalled = True
            dw_signal(self.fd)
        return 0

    def post(self, callback):
        """Have the loop call ``callback()``; ignored when it is closed."""
        if not self.closed and not self.forked:
            self.push(callback)

    cdef int sleep(self, Sleeper sleeper, double seconds, bint signal) except -1:
        """Sleep until woken, after waking the loop if ``signal``. The GIL goes first: whoever is woken needs it."""
        cdef int r
        cdef int fd = self.fd
        cdef Hub waker
        cdef bint is_main = PyThread_get_thread_ident() == main_ident
        if is_main and seconds > SIGNAL_SLICE_S:
            seconds = SIGNAL_SLICE_S
        sleeper.parked = True
        if signal:
            dw_add(&self.writers, 1)
        with nogil:
            if signal:
                dw_signal(fd)
                dw_add(&self.writers, -1)
            r = sem_wait(&sleeper.sem) if seconds == INFINITY else dw_sem_wait(&sleeper.sem, seconds)
        if sleeper.parked:
            sleeper.parked = False
        else:
            if r != 0:
                sem_trywait(&sleeper.sem)  # woken and timed out at once: the count must not stay
            waker, sleeper.woken_by = sleeper.woken_by, None
            waker.resuming -= 1
            if waker.resuming == 0 and waker.queue and not waker.signalled and not waker.closed:
                # Those that were woken before us have left this to the last. With the GIL held: the loop gets it when this thread
                # waits for something, and that may well be its next call, which then leaves with the others.
                waker.signalled = True
                dw_signal(waker.fd)
        if r != 0 and is_main:
            PyErr_CheckSignals()
        return 0

    cdef object wait(self, Ticket ticket):
        """Submit it, sleep until it is done, and return or raise its outcome."""
        cdef Sleeper sleeper = my_sleeper()
        cdef bint signal = False
        cdef double seconds = INFINITY
        self.check()
        ticket.hub = self
        ticket.sleeper = sleeper
        self.queue.append(ticket)
        if not self.signalled:
            if self.resuming == 0:
                self.signalled = signal = True
            else:
                # Other threads have been woken and are about to run; they may have something to submit too. The last one
                # wakes the loop.
                seconds = DEFERRED_S
        try:
            while not ticket.done:
                self.sleep(sleeper, seconds, signal)
                signal = False
                if not ticket.done:
                    seconds = INFINITY
                    if self.queue and not self.signalled and not self.closed:
                        self.signalled = signal = True
        except BaseException:
            # Ctrl-C, say: nobody waits any more.
            ticket.given_up = True
            if not self.closed and not ticket.done:
                self.push(ticket)
            raise
        finally:
            ticket.sleeper = None
        return ticket.outcome()

    def call(self, face, payload, timeouts, reply_type, context):
        """Have ``face._channel`` make a call, or ``face._connect_first`` where it is not ready, and wait for the reply."""
        cdef Ticket ticket = Ticket.__new__(Ticket)
        ticket.face = face
        ticket.payload = payload
        ticket.timeouts = timeouts
        ticket.reply_type = reply_type
        ticket.context = context
        return self.wait(ticket)

    def open_stream(self, face, payload, timeouts, reply_type, context):
        """The same for a stream; returns what the channel's ``stream`` does."""
        cdef Ticket ticket = Ticket.__new__(Ticket)
        ticket.kind = DO_OPEN
        ticket.face = face
        ticket.payload = payload
        ticket.timeouts = timeouts
        ticket.reply_type = reply_type
        ticket.context = context
        return self.wait(ticket)

    def run(self, coroutine, variables):
        """Run a coroutine as a task with these context variables, and wait for its result."""
        cdef Ticket ticket = Ticket.__new__(Ticket)
        ticket.kind = DO_RUN
        ticket.face = coroutine
        ticket.context = variables
        try:
            self.check()
        except BaseException:
            coroutine.close()
            raise
        return self.wait(ticket)


cdef class ThreadItems:
    """Items of one streamed reply, for a thread: takes those that have arrived, and sleeps only when there are none.

    One thread at a time may iterate; any thread may close. What the thread takes is what is refunded to the worker as credit.

    ``again(error, context)`` is called, if it is set, when the request fails before its first item: it returns the stream of
    another attempt, with which this one goes on, or raises.
    """

    cdef Feed feed
    cdef object bridge
    cdef public object again
    cdef bint over
    cdef bint closed

    def __init__(self, Hub hub, ItemStream items, bridge):
        self.feed = Feed.__new__(Feed)
        self.feed.hub = hub
        self.feed.items = items
        self.feed.reader = items.reader
        self.bridge = bridge

    @property
    def context(self):
        return self.bridge.outer

    @property
    def delivered(self):
        """Items handed out so far."""
        return self.feed.reader.delivered

    def __iter__(self):
        return self

    def __next__(self):
        cdef Feed feed = self.feed
        cdef ItemReader reader = feed.reader
        cdef long cost = 0
        while reader.head >= len(reader.items) or feed.closing:
            self.wait()
            if reader.head >= len(reader.items):
                self.end()
                if reader.value is not None:
                    error, reader.value = reader.value, None
                    if self.again is None or reader.delivered or self.closed:
                        raise error
                    self.take_over(self.again(error, self.bridge.outer))
                    feed = self.feed
                    reader = feed.reader
                    continue
                raise StopIteration
            break
        item = reader.pop(&cost)
        feed.taken += cost
        if feed.taken >= REFUND_BYTES:
            self.tell()
        return item

    cdef int take_over(self, ThreadItems other) except -1:
        self.feed, self.bridge = other.feed, other.bridge
        self.over = False
        other.feed = None
        if self.closed:  # by another thread, meanwhile
            self.close()
        return 0

    cdef int wait(self) except -1:
        cdef Feed feed = self.feed
        cdef ItemReader reader = feed.reader
        cdef Hub hub = feed.hub
        cdef Sleeper sleeper = None
        cdef bint signal = False
        if feed.has_news():
            return 0
        hub.check()
        if reader.waiting:
            raise RuntimeError("another thread is already waiting for an item of this stream")
        sleeper = my_sleeper()
        feed.sleeper = sleeper
        reader.waiting = True
        hub.live.add(feed)
        try:
            while not feed.has_news():
                if hub.closed:
                    raise closed_during()
                if reader.callback is None:
                    reader.callback = feed
                    reader.callback_context = hub.callback_variables
                feed.waits = reader.between_items_timeout != INFINITY and reader.delivered > 0
                if (feed.waits or feed.taken) and not feed.queued:
                    feed.queued = True
                    hub.queue.append(feed)
                signal = False
                if hub.queue and not hub.signalled:
                    hub.signalled = signal = True
                hub.sleep(sleeper, INFINITY, signal)
        except BaseException:
            self.close()
            raise
        finally:
            hub.live.discard(feed)
            feed.sleeper = None
            feed.waits = False
            reader.waiting = False
            reader.callback = None
            reader.callback_context = None
        return 0

    cdef int end(self) except -1:
        """Everything has been taken."""
        cdef Feed feed = self.feed
        self.over = True
        self.bridge.end()
        if not feed.closing:
            feed.closing = feed.reader.closed = True  # there is nothing that the loop would have to close
            if feed.taken:
                self.tell()
        return 0

    cdef int tell(self) except -1:
        """Have the loop look at the feed."""
        cdef Feed feed = self.feed
        if not feed.queued and not feed.hub.closed and not feed.hub.forked:
            feed.queued = True
            feed.hub.push(feed)
        return 0

    def close(self):
        """Give up: kills the handler if it still runs, drops queued items. May be called twice."""
        cdef Feed feed = self.feed
        self.closed = True
        if not self.over:
            self.over = True
            self.bridge.end()
        if not feed.closing:
            feed.closing = True
            self.tell()

    def __del__(self):
        if self.feed is not None and self.bridge is not None:
            self.close()
