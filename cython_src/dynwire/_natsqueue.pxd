from libc.stdint cimport int64_t, uint32_t, uint64_t

from ._link cimport StreamBase
from ._natswire cimport NatsPeer, NatsTarget, NatsWire, fields

cdef enum:
    F_QUEUED = 8                 # in_flags of a stream at the server: it came from a queue, to which its end is reported
    RUN_SHIFT = 10               # an attempt is a number: run << 10 | delivery of the queue
    MAX_DELIVERY = 1023
    FINAL_SLOT = 0xFFFFFE        # as a slot: the reply subject of the last message of a queued request
    MARK_SLOT = 0xFFFFFD         # … and of a message to ourselves
    MAX_RUNS = 16                # times that a caller queues a request whose reply was lost
    BEGUN_LIMIT = 4096           # requests that a worker remembers to have run
    GIVEN_LIMIT = 1048576        # a caller's word for how often its request was run; more is nonsense
    QUEUE_ROOM = 512             # bytes of headers that a queued request needs more than another

cdef class QueueTarget(NatsTarget):
    """The queue of one endpoint, as a target of requests."""
    cdef readonly object queue           # dynwire.nats.caller.CallerQueue
    cdef readonly object unconfirmed     # dynwire.nats.confirm.Unconfirmed: streams

cdef class QueueRequest(NatsTarget):
    """One request to a queue: what it takes to queue it once more, and what is known of its way. ``peer`` is its worker."""
    cdef readonly QueueTarget target
    cdef readonly bytes lines            # headers of the caller's
    cdef readonly bytes payload
    cdef readonly bytes ack              # where the acknowledgement of its run goes; None: its worker has not said so
    cdef readonly uint64_t number        # of the message in the queue; 0: not confirmed, or not there any more
    cdef uint64_t codec, credit, accept_ms
    cdef readonly double deadline
    cdef readonly uint32_t run           # how often it was queued anew
    cdef readonly uint32_t given         # how often workers were given it before that, as far as we know
    cdef bint taken                      # it has left the queue: a worker had it, whoever that was
    cdef NatsPeer lost                   # the worker that had it last …
    cdef uint32_t lost_attempt           # … and as which attempt; what still comes of that counts no more
    cdef bint stop                       # its worker is to be told to finish early

cdef class QueueRun:
    """(server) A request that came from a queue."""
    cdef object consumer                 # dynwire.nats.pull.QueueConsumer
    cdef object delivery                 # dynwire.nats.queue.Delivery
    cdef bytes inbox, head, body         # the reply, if it is one message
    cdef object verdict
    cdef int unheard                     # how often nobody listened to the news that it has begun

cdef class QueueWire(NatsWire):
    # (client)
    cdef readonly list targets_          # QueueTarget
    cdef NatsPeer unnamed                # whom requests have as long as no worker has named itself
    cdef dict given_up                   # sequence number of a request that was given up unconfirmed -> QueueTarget
    cdef double queue_at                 # when requests have to be published again
    cdef readonly uint64_t requeued      # requests that were queued anew, because the reply or the queue was lost
    cdef readonly uint64_t restarted     # requests of which another run has replaced one that had begun
    # (server)
    cdef QueueRun arriving
    cdef uint32_t arriving_attempt, arriving_deliveries, arriving_ms
    cdef dict begun                      # inbox -> which delivery was run here last; the newest at the end
    cdef dict runs                       # stream -> QueueRun
    cdef dict lost_callers               # prefix of inboxes -> when the NATS server first said that nobody listens there
    cdef uint32_t final_no
    cdef dict finals                     # number in the reply subject of a last message -> QueueRun, until it is acknowledged
    cdef uint32_t mark_no
    cdef dict marks                      # number of a message to ourselves -> what to call when it has come back
    cdef dict replied                    # inbox -> QueueRun of which that is so, and whose reply is one message
    cdef readonly uint64_t unheard       # messages that no caller listened for
    cdef readonly uint64_t expired       # requests that were over when they came
    cdef readonly uint64_t poisonous     # requests that were given to too many workers

    cdef int from_queue_worker(self, StreamBase stream, QueueRequest request, const unsigned char *reply, size_t reply_n,
                               const unsigned char *headers, size_t headers_n, const unsigned char *payload, size_t n,
                               object owner) except -1
    cdef int confirmed(self, StreamBase stream, QueueRequest request, bytes answer) except -1
    cdef bint counts(self, StreamBase stream, QueueRequest request, NatsPeer worker, uint32_t attempt) except -1
    cdef NatsPeer worker_at(self, const unsigned char *reply, size_t reply_n)
    cdef bint restart(self, StreamBase stream, QueueRequest request, uint32_t attempt) except -1
    cdef bint run_again(self, StreamBase stream, QueueRequest request) except -1
    cdef int enqueue(self, StreamBase stream, QueueRequest request) except -1
    cdef int take_back(self, StreamBase stream, QueueRequest request) except -1
    cdef int look_at_queues(self, double now) except -1
    cdef int receive_queued(self, object consumer, object delivery, bytes subject, const unsigned char *headers, size_t headers_n,
                            const unsigned char *payload, size_t n, object owner) except -1
    cdef bytes final_reply(self, QueueRun run)
    cdef bint given_back(self, StreamBase stream)
    cdef bint has_room(self, bytes subject)
