from libc.stdint cimport int64_t, uint64_t

from ._natsproto cimport MessagePort, MessageSink, NatsParser, NatsWriter

cdef class PortParser(NatsParser):
    cdef object loop

cdef class PortSocket:
    """One connection to a server, from the open socket to its end."""

    cdef FastPort port
    cdef readonly PortParser parser
    cdef NatsWriter writer
    cdef object transport
    cdef int fd                        # for writing past the transport; -1: not possible (TLS)
    cdef readonly bint tls
    cdef bint handshake                # nats-py reads lines
    cdef bint eof                      # nothing more will come
    cdef readonly bint lost            # the transport is gone
    cdef bint closing
    cdef object error                  # why it was lost, or None
    cdef bint paused                   # the transport holds enough that the socket does not take
    cdef bint reading_paused           # nats-py does not keep up with what it gets
    cdef bint in_dispatch
    cdef bint flush_scheduled
    cdef size_t flush_at
    cdef object reader                 # future of nats-py's reading task
    cdef list drainers                 # futures of its drain() calls
    cdef object gone                   # future, resolved when the transport is gone

    cdef int dispatched(self) except -1
    cdef int flush(self) except -1
    cdef int failed(self, object error) except -1
    cdef int wrote(self) except -1
    cdef int wake_reader(self) except -1
    cdef size_t unsent(self)

cdef class PortBase(MessagePort):
    """What both ports share: who is told, and of what."""

    cdef readonly object loop
    cdef readonly object client                      # nats.aio.client.Client
    cdef dict sinks                         # subscription id -> MessageSink
    cdef readonly object error              # why the port is down
    cdef readonly uint64_t messages_out
    cdef bint writable_scheduled
    cdef public object on_denied             # called with operation and subject when the server refuses one

    cdef int go_down(self, object error) except -1
    cdef int now_writable(self) except -1
    cdef int refuse(self, size_t size) except -1

cdef class FastPort(PortBase):
    cdef readonly PortSocket socket
    cdef bint want_tls

cdef class PlainPort(PortBase):
    cdef object queue                       # deque of (subject, payload, reply, headers), or of a subscription that ends
    cdef size_t queued_bytes
    cdef object work                        # future that the pump waits for, or None
    cdef object pump_task
    cdef list arrived                       # (number, message), to be delivered from a callback of the loop
    cdef uint64_t next_id
    cdef object watch_handle                # timer of watch()
    cdef bint was_reconnecting
    cdef bint busy                          # the pump is handing something over

    cdef int wake_pump(self) except -1
