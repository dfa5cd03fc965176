"""Requests by way of a JetStream queue: what the nats plane's machine does otherwise in durable mode. Without I/O.

A caller publishes the request to the queue of its endpoint, with its own inbox as the reply subject: there the queue confirms
that the request is stored. The inbox stands in a header as well, because JetStream replaces the reply subject on the way to the
worker. From there on a request is answered as any other, over NATS core. Every message of an answer carries the attempt that it
belongs to, so that two workers that were given the same request cannot be confused.

docs/nats-wire.md specifies every byte, docs/nats.md what is promised.
"""

import functools

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.math cimport INFINITY

from ._buffers cimport Block
from ._link cimport META_LIMIT, S_ACCEPTED, S_ENDED, S_PENDING, S_STOP_EARLY, S_WRITTEN, StreamBase
from ._natsproto cimport PORT_UP, MessagePort
from ._natswire cimport (
    HEADERS_FOUND,
    HEADERS_NONE,
    HEADERS_STATUS,
    INBOX_LIMIT,
    SLOT_LIMIT,
    TOKEN_BYTES,
    NatsPeer,
    NatsTarget,
    NatsWire,
    fields,
    parse_headers,
    parse_token,
)

from .errors import DeadlineExceeded, DynwireError, MessageTooLarge, PeerLost
from .wire.faults import error_body

# A worker names itself to the caller of a request whose handler is not done at once: then it can be cancelled, and looked after.
# And it learns soon whether the caller is there at all.
cdef double ACCEPT_AFTER_S = 0.001
# It goes on for these 5 s with a request whose caller does not listen: he may be reconnecting, as the worker did.
cdef int ACCEPT_AGAIN = 20
cdef double ACCEPT_AGAIN_S = 0.25
cdef bytes _INBOX = b"\r\nDynwire-Inbox: "
cdef bytes _NAK = b"-NAK"
cdef object ACK = b"+ACK"
cdef object NAK = b"-NAK"
cdef object TERM = b"+TERM"


cdef class QueueTarget(NatsTarget):
    """``queue`` is the `dynwire.nats.caller.CallerQueue` of the endpoint, open."""

    def __init__(self, queue, unconfirmed):
        self.queue = queue
        self.unconfirmed = unconfirmed
        self.subject = queue.names.subject.encode()


cdef class QueueRequest(NatsTarget):
    def __init__(self, QueueTarget target not None, NatsPeer unnamed):
        self.target = target
        self.subject = target.subject
        self.peer = unnamed


cdef class QueueRun:
    def __init__(self, consumer, delivery):
        self.consumer = consumer
        self.delivery = delivery
        self.verdict = ACK


cdef class QueueWire(NatsWire):
    """The machine of the nats plane, with requests that go to queues and come from them beside the others."""

    def __cinit__(self):
        self.targets_ = []
        self.given_up = {}
        self.queue_at = INFINITY
        self.runs = {}
        self.lost_callers = {}
        self.finals = {}
        self.replied = {}
        self.marks = {}
        self.begun = {}
        self.unnamed = NatsPeer("nats:a.queue")
        self.unnamed.control = None

    # ---- (client) sending ------------------------------------------------------------------------------------------------

    cdef int submit(self, StreamBase stream, str endpoint, object data, int kind, bytes meta, double deadline, double due,
                    double now) except -1:
        if type(stream.under) is QueueRequest and self.up():
            self.check_size(data, bytes(QUEUE_ROOM) if meta is None else meta + bytes(QUEUE_ROOM))
        return NatsWire.submit(self, stream, endpoint, data, kind, meta, deadline, due, now)

    cdef int publish_request(self, StreamBase stream, NatsTarget target, bytes inbox, const unsigned char *headers,
                             size_t headers_n, const unsigned char *payload, size_t n, object owner) except -1:
        cdef QueueRequest request
        cdef fields f
        cdef size_t others
        if type(target) is not QueueRequest:
            return NatsWire.publish_request(self, stream, target, inbox, headers, headers_n, payload, n, owner)
        request = <QueueRequest>target
        if parse_headers(headers, headers_n, &f, &others) != HEADERS_FOUND or f.count < 5:
            raise RuntimeError("headers of our own that are none")
        request.codec = f.v[0]
        request.credit = f.v[2]
        request.accept_ms = f.v[4]
        request.deadline = self.now + f.v[3] * 0.001 if f.v[3] else INFINITY
        request.lines = PyBytes_FromStringAndSize(<const char *>headers + others, headers_n - 2 - others) if others else b""
        # Kept until the reply is there: it may have to be queued anew.
        request.payload = PyBytes_FromStringAndSize(<const char *>payload, n)
        self.enqueue(stream, request)
        return 0

    cdef int enqueue(self, StreamBase stream, QueueRequest request) except -1:
        """Publish a request to its queue, for the first time or with a further ``run``."""
        request.number = 0
        request.target.unconfirmed.published(stream, self.now)
        self.queue_at = min(self.queue_at, self.now)
        return self.publish_queued(stream, request)

    def publish_queued(self, StreamBase stream, QueueRequest request):
        """Hand a request to the NATS server; the same one again has the same id, and is stored once."""
        cdef double left = request.deadline - self.now
        cdef bytes inbox, head, body
        if not self.up():
            return 0  # when the connection is back, the queue is looked for and what it has not confirmed published again
        inbox = self.inbox_of(stream)
        head = b"NATS/1.0\r\nD: r %d 0 %d %d %d%b\r\nNats-Msg-Id: %b-%x-%d\r\n" % (
            request.codec, request.credit, 0 if left == INFINITY else min(int(max(left, 0.0) * 1000.0) + 1, 4294967295),
            request.accept_ms, b" %d %d" % (request.run, request.given) if request.run else b"",
            self.connection_id.hex().encode(), stream.seq, request.run,
        )  # fmt: skip
        if left != INFINITY and request.target.queue.queue.ttl:
            # The caller itself takes it back at the deadline; this is for callers that are gone by then.
            head += b"Nats-TTL: %ds\r\n" % (int(max(left, 0.0)) + 2)
        head += b"Dynwire-Inbox: %b\r\n%b\r\n" % (inbox, request.lines)
        body = request.payload
        self.port.publish(
            request.subject, inbox, <const unsigned char *>PyBytes_AS_STRING(head), PyBytes_GET_SIZE(head),
            <const unsigned char *>PyBytes_AS_STRING(body), PyBytes_GET_SIZE(body), body if len(body) >= 65536 else None,
        )  # fmt: skip
        return self.wrote()

    cdef int port_changed(self, double now) except -1:
        self.marks.clear()
        return NatsWire.port_changed(self, now)

    cdef double next_wakeup(self):
        return min(NatsWire.next_wakeup(self), self.queue_at)

    cdef int time_passed(self, double now) except -1:
        NatsWire.time_passed(self, now)
        if self.queue_at <= now:
            self.look_at_queues(now)
        return 0

    cdef int look_at_queues(self, double now) except -1:
        """Publish again what the queues have not confirmed."""
        cdef QueueTarget target
        cdef StreamBase stream
        self.now = now
        self.queue_at = INFINITY
        if not self.up():
            return 0
        for target in self.targets_:
            again, lost = target.unconfirmed.due(now)
            for stream in again:
                self.publish_queued(stream, <QueueRequest>stream.under)
            for stream in lost:
                self.lose(stream, DynwireError(
                    f"the queue of {target.queue.names.endpoint} did not confirm the request within "
                    f"{target.unconfirmed.window:.3g} s (DYNWIRE_NATS_QUEUE_DUPLICATE_WINDOW): repeating it could run it twice",
                    phase="send", sent="maybe",
                ))  # fmt: skip
            when = target.unconfirmed.next_due()
            if when is not None:
                self.queue_at = min(self.queue_at, <double>when)
        return 0

    def add_queue(self, QueueTarget target not None):
        """A channel to a queue was opened."""
        self.targets_.append(target)

    def waiting_in(self, QueueTarget target not None):
        """Numbers of the requests in a queue of which no worker has said that it has them."""
        cdef StreamBase stream
        cdef QueueRequest request
        cdef list out = []
        for stream in self.slots:
            if stream is not None and type(stream.under) is QueueRequest:
                request = <QueueRequest>stream.under
                if request.target is target and request.number and request.peer is self.unnamed:
                    out.append(request.number)
        return out

    def missing_in(self, QueueTarget target not None, set numbers, double now):
        """Requests that have left the queue, and whose reply has not come: it was lost on the way."""
        cdef StreamBase stream
        cdef QueueRequest request
        self.now = now
        for stream in list(self.slots):
            if stream is not None and type(stream.under) is QueueRequest:
                request = <QueueRequest>stream.under
                if request.target is target and request.number in numbers and request.peer is self.unnamed:
                    self.gaps += 1
                    request.taken = True
                    self.lose(stream, PeerLost(
                        f"the reply of a worker of {target.queue.names.endpoint} was lost while there was no connection to NATS",
                        sent="yes",
                    ))  # fmt: skip
        self.wrote()

    def queue_found(self, QueueTarget target not None, bint anew, double now):
        """The queue was looked for and is there: what it has not confirmed goes out again. ``anew``: it has lost what it had."""
        cdef StreamBase stream
        cdef QueueRequest request
        self.now = now
        target.unconfirmed.all_due(now)  # before others join them, which go out now
        if anew:
            for stream in list(self.slots):
                if stream is None or type(stream.under) is not QueueRequest:
                    continue
                request = <QueueRequest>stream.under
                if request.target is not target or not request.number:
                    continue
                request.number = 0
                if request.peer is self.unnamed and not self.run_again(stream, request):
                    self.lose(stream, PeerLost(
                        f"the queue of {target.queue.names.endpoint} was lost with the request in it", sent="yes"
                    ))  # fmt: skip
        self.queue_at = min(self.queue_at, now)
        self.look_at_queues(now)
        self.wrote()

    # ---- (client) receiving ----------------------------------------------------------------------------------------------

    cdef int from_worker(self, const unsigned char *subject, size_t subject_n, const unsigned char *reply, size_t reply_n,
                         const unsigned char *headers, size_t headers_n, const unsigned char *payload, size_t n,
                         object owner) except -1:
        cdef uint32_t slot, seq
        cdef StreamBase stream
        cdef QueueTarget target
        cdef size_t prefix_n = PyBytes_GET_SIZE(self.subject)
        if self.targets_ and subject_n == prefix_n + TOKEN_BYTES and parse_token(subject + prefix_n, &slot, &seq) and \
                slot != SLOT_LIMIT:
            stream = self.get_slot(slot)
            if stream is not None and stream.seq == seq:
                if type(stream.under) is QueueRequest:
                    return self.from_queue_worker(
                        stream, <QueueRequest>stream.under, reply, reply_n, headers, headers_n, payload, n, owner
                    )  # fmt: skip
            elif headers_n == 0 and self.given_up:
                target = self.given_up.pop(seq, None)
                if target is not None:
                    target.queue.confirmed_late(PyBytes_FromStringAndSize(<const char *>payload, n))
        return NatsWire.from_worker(self, subject, subject_n, reply, reply_n, headers, headers_n, payload, n, owner)

    cdef int from_queue_worker(self, StreamBase stream, QueueRequest request, const unsigned char *reply, size_t reply_n,
                               const unsigned char *headers, size_t headers_n, const unsigned char *payload, size_t n,
                               object owner) except -1:
        cdef fields f
        cdef size_t others
        cdef int found = parse_headers(headers, headers_n, &f, &others)
        cdef int at
        cdef uint32_t attempt
        cdef NatsPeer peer, worker
        if found == HEADERS_NONE:
            return self.confirmed(stream, request, PyBytes_FromStringAndSize(<const char *>payload, n))
        if found == HEADERS_STATUS:
            # 503: no stream takes this subject. It was deleted, or JetStream has lost its storage.
            request.target.queue.look()
            return 0
        at = 3 if f.kind == c"i" else 1 if f.kind == c"e" else 0
        if found != HEADERS_FOUND or f.kind not in (c"i", c"e", c"a", c"x", c"b") or f.count > at and f.v[at] > 0xFFFFFFFF:
            self.malformed += 1
            return 0
        attempt = <uint32_t>f.v[at] if f.count > at else stream.in_arg
        worker = self.worker_at(reply, reply_n) if reply_n else request.peer
        if not self.counts(stream, request, worker, attempt):
            # A whole reply is welcome from whoever is the first.
            if f.kind != c"i" or f.count < 3 or f.v[0] or f.v[2] != 1 or stream.mark:
                self.stale += 1
                return 0
        elif attempt != stream.in_arg or worker is not request.peer:
            if (request.peer is not self.unnamed or stream.mark) and not self.restart(stream, request, attempt):
                return 0
            stream.in_arg = attempt
            request.peer = worker
            if request.stop:
                self.put_cancel(stream, 1)
        if f.kind == c"b":
            # Its worker shuts down and has given it back.
            self.restart(stream, request, attempt)
            return 0
        if f.kind == c"a" and n and n <= INBOX_LIMIT:
            request.ack = PyBytes_FromStringAndSize(<const char *>payload, n)
        if f.kind == c"i" and f.count > at:
            f.v[at] = stream.in_arg
        peer = request.peer
        peer.heard = self.now
        peer.patience = self.probe_interval
        if f.kind == c"i":
            return self.item_came(stream, &f, payload, n, owner)
        if f.kind == c"a":
            stream.state |= S_ACCEPTED
            return stream.on_accept()
        if f.kind == c"x":
            stream.state |= S_ENDED
            self.free_slot(stream)
            return stream.on_error(0, PyBytes_FromStringAndSize(<const char *>payload, n))
        if f.count < 1 or f.v[0] != stream.mark:
            return self.lose(stream, self.hole(stream, f.v[0] if f.count else 0))
        stream.state |= S_ENDED
        self.free_slot(stream)
        return stream.on_end()

    cdef bint counts(self, StreamBase stream, QueueRequest request, NatsPeer worker, uint32_t attempt) except -1:
        """Is a message of the run that is to answer the request, or of one that takes its place?

        The queue's counting begins anew when its server was killed: then two workers may have the same attempt.
        """
        if attempt >> RUN_SHIFT < request.run:
            return False  # it was queued anew since
        if request.peer is self.unnamed:
            return worker is not request.lost or attempt > request.lost_attempt
        if worker is request.peer:
            return attempt >= stream.in_arg
        return attempt > stream.in_arg

    cdef int confirmed(self, StreamBase stream, QueueRequest request, bytes answer) except -1:
        """What the queue says to the request."""
        if stream not in request.target.unconfirmed:
            return 0  # to a repetition
        try:
            number = request.target.queue.answered(answer, len(request.payload))
        except DynwireError as error:
            request.target.unconfirmed.settled(stream)
            stream.state = (stream.state & ~S_WRITTEN) | S_ENDED
            self.free_slot(stream)
            return stream.on_lost(error)
        if number:
            request.target.unconfirmed.settled(stream)
            request.number = number
            if not stream.state & S_ACCEPTED:
                stream.state |= S_ACCEPTED
                return stream.on_accept()
        return 0

    cdef NatsPeer worker_at(self, const unsigned char *reply, size_t reply_n):
        """The worker that names itself with this reply subject (``subject._.token``)."""
        cdef bytes name = PyBytes_FromStringAndSize(<const char *>reply, reply_n)
        cdef str address
        at = name.rfind(b"._")
        if at < 0:
            return self.unnamed
        address = "nats:" + name[:at].decode("utf-8", "replace")
        found = self.peers.get(address)
        if found is None:
            try:
                found = self.peers[address] = NatsPeer(address)
            except DynwireError:
                self.malformed += 1
                return self.unnamed
        return found

    cdef bint restart(self, StreamBase stream, QueueRequest request, uint32_t attempt) except -1:
        """Another attempt takes the place of the one whose messages came so far. If that cannot be, the stream ends: False."""
        cdef uint32_t before
        if not stream.on_restart():
            self.lose(stream, PeerLost(
                f"the request was given to another worker after items had come from {request.peer.address}",
                peer=request.peer.address, sent="yes",
            ))  # fmt: skip
            return False
        if stream.mark or request.peer is not self.unnamed:
            self.restarted += 1
        before = stream.in_arg
        stream.mark = 0
        stream.in_arg = attempt
        self.granted += <int64_t>request.credit - stream.send_credit
        stream.send_credit = stream.cost = <int64_t>request.credit
        stream.refund = 0
        if request.peer is not self.unnamed:
            request.lost = request.peer
            request.lost_attempt = before
        request.peer = self.unnamed
        request.ack = None
        return True

    cdef bint run_again(self, StreamBase stream, QueueRequest request) except -1:
        """Queue the request anew: it is not in the queue any more, or its reply was lost on the way. False if that cannot be."""
        cdef uint32_t attempt
        if request.run >= MAX_RUNS or self.now >= request.deadline or not stream.on_restart():
            return False
        self.requeued += 1
        if request.number:
            request.target.queue.take_back(request.number)
        # Only what is certain: a request that was lost with its queue may not have been run.
        attempt = stream.in_arg if request.peer is not self.unnamed else request.lost_attempt
        request.given += max(attempt & MAX_DELIVERY if attempt >> RUN_SHIFT == request.run else 0, <uint32_t>request.taken)
        request.taken = False
        request.run += 1
        self.restart(stream, request, request.run << RUN_SHIFT | 1)
        self.enqueue(stream, request)
        return True

    cdef int lose(self, StreamBase stream, object error) except -1:
        cdef QueueRequest request
        if type(stream.under) is QueueRequest and stream.conn is self:
            request = <QueueRequest>stream.under
            if type(error) is PeerLost:
                self.put_cancel(stream, 2)  # of the run that is given up, if it is still going
                if self.run_again(stream, request):
                    return 0
            self.take_back(stream, request)
        return NatsWire.lose(self, stream, error)

    cdef int lose_peer(self, NatsPeer peer, object error) except -1:
        """A worker that is gone does not end requests that are in a queue: another one will get them."""
        cdef StreamBase stream
        cdef QueueRequest request
        for stream in list(self.slots):
            if stream is None or type(stream.under) is not QueueRequest or stream.conn is not self:
                continue
            request = <QueueRequest>stream.under
            if request.peer is not peer:
                continue
            if not request.number and stream not in request.target.unconfirmed:
                # The queue was lost while it ran.
                if not self.run_again(stream, request):
                    continue
            elif stream.on_restart():
                if request.ack is not None:
                    # What the worker can't say any more: without it the queue would wait for its silence to last.
                    self.put_bytes(request.ack, None, b"", _NAK)
                self.restart(stream, request, stream.in_arg)
                request.target.queue.verify(request.number)
            else:
                self.take_back(stream, request)
        return NatsWire.lose_peer(self, peer, error)

    cdef int take_back(self, StreamBase stream, QueueRequest request) except -1:
        """Nobody waits for the request any more: it need not be run, or not once more."""
        if request.number:
            request.target.queue.take_back(request.number)
            request.number = 0
        elif stream in request.target.unconfirmed:
            if len(self.given_up) >= 4096:
                self.given_up.clear()  # those end with their time to live
            self.given_up[stream.seq] = request.target
        return 0

    cdef int put_cancel(self, StreamBase stream, int kind) except -1:
        if kind == 1 and type(stream.under) is QueueRequest:
            (<QueueRequest>stream.under).stop = True  # also for a worker that is not known yet
        return NatsWire.put_cancel(self, stream, kind)

    cdef int abandon(self, StreamBase stream, int kind) except -1:
        if type(stream.under) is QueueRequest and stream.conn is self and not stream.state & S_ENDED:
            self.take_back(stream, <QueueRequest>stream.under)
        return NatsWire.abandon(self, stream, kind)

    # ---- (server) --------------------------------------------------------------------------------------------------------

    cdef int receive_queued(self, object consumer, object delivery, bytes subject, const unsigned char *headers, size_t headers_n,
                            const unsigned char *payload, size_t n, object owner) except -1:
        """A request from a queue. ``subject`` is what it would have in core mode, to any worker of the endpoint."""
        cdef fields f
        cdef size_t others
        cdef bytes head, inbox
        cdef StreamBase older
        cdef uint32_t number, given
        cdef Py_ssize_t at, end
        if self.dead or not self.has_room(subject):
            consumer.give_back(delivery)
            return 0
        head = PyBytes_FromStringAndSize(<const char *>headers, min(headers_n, <size_t>META_LIMIT + 2 * QUEUE_ROOM))
        at = head.find(_INBOX)
        end = head.find(b"\r\n", at + len(_INBOX)) if at >= 0 else -1
        if end < 0 or parse_headers(headers, headers_n, &f, &others) != HEADERS_FOUND or f.kind != c"r" or f.count < 4 or \
                f.count > 5 and f.v[5] > MAX_RUNS:
            self.malformed += 1  # nobody to tell
            consumer.finished(delivery, TERM)
            return 0
        inbox = head[at + len(_INBOX) : end]
        number = min(<uint32_t>delivery.attempt, <uint32_t>MAX_DELIVERY)
        self.arriving_attempt = <uint32_t>(f.v[5] if f.count > 5 else 0) << RUN_SHIFT | number
        # A server that was killed has forgotten some of its counting; what has begun here is known here.
        given = <uint32_t>min(f.v[6], <uint64_t>GIVEN_LIMIT) if f.count > 6 else 0
        self.arriving_deliveries = max(given + number, <uint32_t>self.begun.get(inbox, 0) + 1)
        if self.arriving_deliveries > 1 and number == 1:
            consumer.redelivered += 1  # which it could not know
        refused = consumer.refusal(delivery, f.v[3])
        if type(refused) is not int:
            if isinstance(refused, DeadlineExceeded):
                self.expired += 1
            else:
                self.poisonous += 1
            self.put_bytes(inbox, None, b"NATS/1.0\r\nD: x %d\r\n\r\n" % self.arriving_attempt, error_body(refused))
            consumer.finished(delivery, TERM)
            return self.wrote()
        self.arriving_ms = refused
        older = self.by_reply.get(inbox)
        if older is not None:
            # The caller has queued it anew, and we still have the run before.
            older.in_flags &= ~4  # F_KNOWN
            del self.by_reply[inbox]
            older.on_cancel(2)
        self.arriving = QueueRun(consumer, delivery)
        try:
            self.from_caller(
                <const unsigned char *>PyBytes_AS_STRING(subject), PyBytes_GET_SIZE(subject),
                <const unsigned char *>PyBytes_AS_STRING(inbox), PyBytes_GET_SIZE(inbox), headers, headers_n, payload, n, owner,
            )  # fmt: skip
        finally:
            if self.arriving is not None:
                self.arriving = None
                consumer.finished(delivery, TERM)  # it was answered with an error
        return 0

    cdef int before_request(self, StreamBase stream, fields *f) except -1:
        if self.arriving is not None:
            self.runs[stream] = self.arriving
            self.arriving = None
            stream.in_flags |= F_QUEUED
            stream.attempt = self.arriving_attempt
            stream.deliveries = self.arriving_deliveries
            self.begun.pop(stream.under, None)
            if len(self.begun) >= BEGUN_LIMIT:
                del self.begun[next(iter(self.begun))]
            self.begun[stream.under] = stream.deliveries
            f.v[3] = self.arriving_ms
            self.accept_after = min(self.accept_after, ACCEPT_AFTER_S)
        return 0

    cdef bint has_room(self, bytes subject):
        """Can this worker take a request for the endpoint now? If not, another one shall."""
        return self.live < self.max_streams

    cdef bint given_back(self, StreamBase stream):
        """Does the handler end because this worker does, before it has sent anything?"""
        return False

    cdef int put_item(self, StreamBase stream, const unsigned char *p, size_t n, object owner, int kind, bint last) except -1:
        cdef bytes head, reply
        cdef QueueRun run
        if not stream.in_flags & F_QUEUED or stream.state & S_ENDED or <int64_t>n > self.item_limit():
            return NatsWire.put_item(self, stream, p, n, owner, kind, last)
        stream.send_credit -= <int64_t>n + self.item_overhead
        head = b"NATS/1.0\r\nD: i %d %d %d %d\r\n\r\n" % (stream.mark, kind, last, stream.attempt)
        if last:
            stream.state |= S_ENDED
            run = self.runs[stream]
            if stream.mark == 0:
                run.inbox = <bytes>stream.under
                run.head = head
                run.body = owner if type(owner) is bytes and len(owner) == n else PyBytes_FromStringAndSize(<const char *>p, n)
            reply = self.final_reply(run)
        else:
            reply = self.own_reply(stream)
        stream.mark += 1
        return self.port.publish(
            <bytes>stream.under, reply, <const unsigned char *>PyBytes_AS_STRING(head), PyBytes_GET_SIZE(head), p, n,
            owner if n >= 65536 and type(owner) is bytes else memoryview(owner) if n >= 65536 else None,
        )  # fmt: skip

    cdef int put_end(self, StreamBase stream) except -1:
        if not stream.in_flags & F_QUEUED or stream.state & S_ENDED:
            return NatsWire.put_end(self, stream)
        stream.state |= S_ENDED
        return self.put_bytes(<bytes>stream.under, self.final_reply(self.runs[stream]),
                              b"NATS/1.0\r\nD: e %d %d\r\n\r\n" % (stream.mark, stream.attempt), b"")

    cdef int put_error(self, StreamBase stream, int code, bytes body) except -1:
        cdef QueueRun run
        if not stream.in_flags & F_QUEUED or stream.state & S_ENDED:
            return NatsWire.put_error(self, stream, code, body)
        run = self.runs[stream]
        if self.given_back(stream):
            stream.state |= S_ENDED
            run.verdict = NAK
            return self.put_bytes(<bytes>stream.under, self.own_reply(stream),
                                  b"NATS/1.0\r\nD: b %d\r\n\r\n" % stream.attempt, b"")
        if self.up() and len(body) + 64 > min(self.port.max_payload, self.max_payload):
            return NatsWire.put_error(self, stream, code, body)  # with another text
        stream.state |= S_ENDED
        run.inbox = <bytes>stream.under
        run.head = b"NATS/1.0\r\nD: x %d\r\n\r\n" % stream.attempt
        run.body = body
        return self.put_bytes(run.inbox, self.final_reply(run), run.head, body)

    cdef bytes final_reply(self, QueueRun run):
        """Where the NATS server answers if nobody listens for the last message. Until then it is not acknowledged."""
        self.final_no += 1
        run.delivery.final = self.final_no
        self.finals[self.final_no] = run
        if run.body is not None:
            self.replied[run.inbox] = run
        return self.subject + b"._.%06x%08x" % (FINAL_SLOT, self.final_no)

    def say_again(self, QueueRun run not None):
        """A reply that nobody listened for: its caller may be back."""
        if not self.dead:
            self.finals.pop(run.delivery.final, None)
            if self.fitting(run.head, run.body) is not run.body:
                # Another NATS server than the one that took it, with less room. The attempt is the last number of every head.
                run.head = b"NATS/1.0\r\nD: x %b\r\n\r\n" % run.head.split()[-1]
                run.body = self.fitting(run.head, run.body)
            self.put_bytes(run.inbox, self.final_reply(run), run.head, run.body)
            self.wrote()
            run.consumer.finished(run.delivery, ACK)

    def mark(self, callback):
        """Call ``callback()`` when the NATS server has dealt with all that was published before; never after a lost connection.

        A message to ourselves: what the server says about earlier ones comes before it, on the same connection.
        """
        if self.up():
            self.mark_no += 1
            self.marks[self.mark_no] = callback
            self.put_bytes(self.subject + b"._.%06x%08x" % (MARK_SLOT, self.mark_no), None, b"", b"")
            self.wrote()

    def forget_final(self, uint32_t number):
        """The request was acknowledged, or its caller is gone."""
        cdef QueueRun run = self.finals.pop(number, None)
        if run is not None and run.body is not None and self.replied.get(run.inbox) is run:
            del self.replied[run.inbox]

    cdef bytes answer_probe(self, const unsigned char *reply, size_t prefix_n, const unsigned char *payload, size_t n):
        """A reply that nobody has listened for is going to be published again: the request is not unknown."""
        cdef bytes answer = NatsWire.answer_probe(self, reply, prefix_n, payload, n)
        cdef bytes prefix
        if not self.replied or answer is None or b" -\n" not in answer:
            return answer
        prefix = PyBytes_FromStringAndSize(<const char *>reply, prefix_n)
        return b"".join([
            line[:TOKEN_BYTES] + b" 0\n" if line.endswith(b" -\n") and prefix + line[:TOKEN_BYTES] in self.replied else line
            for line in answer.splitlines(True)
        ])  # fmt: skip

    cdef int control_message(self, const unsigned char *rest, size_t rest_n, const unsigned char *reply, size_t reply_n,
                             int found, fields *f, const unsigned char *payload, size_t n) except -1:
        """The caller may be reconnecting, as after a restart of the server: what it did not hear has to be said once more."""
        cdef StreamBase stream
        cdef QueueRun run
        cdef uint32_t slot, seq
        if found == HEADERS_NONE and rest_n == 2 + TOKEN_BYTES and parse_token(rest + 2, &slot, &seq) and slot == MARK_SLOT:
            callback = self.marks.pop(seq, None)
            if callback is not None:
                callback()
            return 0
        if found == HEADERS_STATUS and rest_n == 2 + TOKEN_BYTES and parse_token(rest + 2, &slot, &seq):
            if slot == FINAL_SLOT:
                run = self.finals.get(seq)
                if run is not None:
                    self.unheard += 1
                    run.consumer.unheard(run.delivery, None if run.body is None else functools.partial(self.say_again, run))
                return 0
            stream = self.get_slot(slot)
            if stream is not None and stream.seq == seq and stream.in_flags & F_QUEUED:
                self.unheard += 1
                run = self.runs[stream]
                if stream.mark == 0 and run.unheard < ACCEPT_AGAIN:
                    # Nothing is lost yet but the news that it has begun: it goes on, and the news is told again.
                    run.unheard += 1
                    stream.state &= ~S_ACCEPTED
                    self.arm(stream, min(stream.timer, self.now + ACCEPT_AGAIN_S))
                    return 0
                del self.runs[stream]
                self.free_slot(stream)
                stream.on_lost(PeerLost("nobody listens to the caller's inbox: it is gone, or reconnecting", sent="yes"))
                run.consumer.unheard(run.delivery, None)
                return 0
        return NatsWire.control_message(self, rest, rest_n, reply, reply_n, found, f, payload, n)

    cdef int put_accept(self, StreamBase stream) except -1:
        if not stream.in_flags & F_QUEUED or stream.state & S_ENDED:
            return NatsWire.put_accept(self, stream)
        return self.put_bytes(<bytes>stream.under, self.own_reply(stream), b"NATS/1.0\r\nD: a %d\r\n\r\n" % stream.attempt,
                              (<QueueRun>self.runs[stream]).delivery.ack)

    cdef int free_slot(self, StreamBase stream) except -1:
        cdef QueueRun run = None
        cdef int freed
        if self.is_client:
            if type(stream.under) is QueueRequest and not stream.state & S_PENDING:
                (<QueueRequest>stream.under).target.unconfirmed.settled(stream)
        elif stream.in_flags & F_QUEUED:
            run = self.runs.pop(stream, None)
        freed = NatsWire.free_slot(self, stream)
        if run is not None:
            # Its last message was published before this: when the queue forgets the request, the reply is on its way.
            run.consumer.finished(run.delivery, run.verdict)
        return freed

    cdef list take_all_streams(self):
        self.runs.clear()  # whoever closes the connection gives them back
        self.finals.clear()
        self.replied.clear()
        self.marks.clear()
        self.given_up.clear()
        self.queue_at = INFINITY
        for target in self.targets_:
            target.unconfirmed.clear()
        return NatsWire.take_all_streams(self)

    cdef bint may_lose_caller(self, StreamBase stream) except -1:
        """A caller that is only slow to reconnect still waits, and its request is in no queue any more when we give it up."""
        cdef bytes prefix
        if not stream.in_flags & F_QUEUED:
            return True
        prefix = (<bytes>stream.under)[:-TOKEN_BYTES]
        if len(self.lost_callers) >= 4096:
            self.lost_callers.clear()
        since = self.lost_callers.setdefault(prefix, self.now)
        if self.now - <double>since > 4 * self.keepalive_timeout:
            self.lost_callers[prefix] = self.now  # it was lost before, and has come back since
            return False
        return self.now - <double>since > self.keepalive_timeout

    def requests(self):
        """(client) What is known of each request to a queue, for diagnostics."""
        cdef StreamBase stream
        cdef QueueRequest request
        cdef list out = []
        for stream in self.slots:
            if stream is not None and type(stream.under) is QueueRequest:
                request = <QueueRequest>stream.under
                out.append({
                    "queue": request.target.queue.names.endpoint, "number": request.number, "run": request.run,
                    "worker": None if request.peer is self.unnamed else request.peer.address, "attempt": stream.in_arg,
                    "items": stream.mark,
                })  # fmt: skip
        return out

    def stats(self):
        """As of the other machine, with what concerns queues."""
        found = NatsWire.stats(self)
        if self.is_client:
            found["unconfirmed"] = sum([len(target.unconfirmed) for target in self.targets_])
            found["requeued"] = self.requeued
            found["restarted"] = self.restarted
        else:
            found["queued"] = len(self.runs)
            found["expired"] = self.expired
            found["poisonous"] = self.poisonous
            found["unheard"] = self.unheard
        return found


# ---- Python face -------------------------------------------------------------------------------------------------------


cdef class EventPort(MessagePort):
    """Keeps what is published in ``sent``, as ``(subject, reply, headers, payload)``."""

    cdef readonly list sent

    def __init__(self, max_payload=1048576):
        self.sent = []
        self.state = PORT_UP
        self.max_payload = max_payload

    def set(self, *, state=None, congested=None, max_payload=None):
        self.state = self.state if state is None else state
        self.congested = self.congested if congested is None else congested
        self.max_payload = self.max_payload if max_payload is None else max_payload

    cdef int publish(self, bytes subject, bytes reply, const unsigned char *headers, size_t headers_n,
                     const unsigned char *payload, size_t n, object owner) except -1:
        if self.state != PORT_UP:
            raise PeerLost("published while there is no connection", sent="no")
        if <int64_t>(headers_n + n) > self.max_payload:
            raise MessageTooLarge("more than the NATS server takes", size=headers_n + n, limit=self.max_payload)
        self.sent.append((
            subject, reply, headers[:headers_n], PyBytes_FromStringAndSize(<const char *>payload, n)
        ))  # fmt: skip
        return 0


cdef class EventStream(StreamBase):
    """A stream of an `EventWire`. Its events are tuples ``(name, number, …)``; the number is the same on both sides."""

    cdef readonly NatsWire owner
    cdef readonly bint killed        # (server) by the client, or because the request came anew
    cdef public bint untouched       # (client) the application has taken nothing: another run may take the place of this one

    cdef int add(self, tuple event) except -1:
        (<EventWire>self.owner).events.append(event)
        return 0

    cdef int on_item(self, object item, int kind, bint last) except -1:
        return self.add(("item", self.seq, bytes(item), kind, last))

    cdef int on_end(self) except -1:
        return self.add(("end", self.seq))

    cdef int on_error(self, int code, bytes body) except -1:
        return self.add(("error", self.seq, body))

    cdef int on_accept(self) except -1:
        return self.add(("accept", self.seq))

    cdef int on_cancel(self, int kind) except -1:
        self.killed |= kind == 2
        return self.add(("cancel", self.seq, kind))

    cdef int on_credit(self) except -1:
        return self.add(("credit", self.seq))

    cdef int on_lost(self, object error) except -1:
        return self.add(("lost", self.seq, type(error).__name__, bool(self.state & S_WRITTEN), str(error)))

    cdef bint on_restart(self) except -1:
        event = ("restart", self.seq)
        if self.untouched and event not in (<EventWire>self.owner).events[-1:]:
            self.add(event)
        return self.untouched

    cdef int on_timer(self, double now) except -1:
        self.timer = INFINITY
        return self.add(("timer", self.seq, now))

    @property
    def number(self):
        return self.seq

    @property
    def open(self):
        return self.conn is not None

    @property
    def waiting(self):
        """(client) not sent yet"""
        return bool(self.state & S_PENDING)

    @property
    def request_(self):
        """(client) what is known of a request that goes to a queue, or the target of another one"""
        return self.under

    @property
    def sent(self):
        """(server) items so far"""
        return self.mark

    @property
    def delivery_count(self):
        """(server) what the handler of a request from a queue sees"""
        return self.deliveries

    @property
    def window(self):
        """(client) what the worker may have sent and the application not taken; (server) what may be sent"""
        return self.send_credit

    @property
    def inbox(self):
        """(client) reply subject of its request"""
        return self.owner.inbox_of(self)

    def stop_early(self):
        """(client) Ask to stop before the request was sent."""
        self.state |= S_STOP_EARLY


cdef class EventWire(QueueWire):
    """The state machine with a Python face, for tests and tools.

    ``deliver`` takes a message and returns events, ``output`` what was published. Events: ``("request", number, endpoint,
    payload, kind, headers, request_id, timeout_ms)``, ``("item", number, bytes, kind, last)``, ``("end", number)``,
    ``("error", number, body)``, ``("accept", number)``, ``("cancel", number, kind)``, ``("credit", number)``,
    ``("lost", number, class, written, text)``, ``("restart", number)``, ``("timer", number, now)``.
    In ``heard_of`` stands which workers have answered a probe or ping, and which are gone: ``(address, class of the error or
    None)``.
    """

    cdef readonly list events
    cdef readonly list heard_of
    cdef readonly set served
    cdef public bint full            # (server) takes nothing from queues
    cdef public bint evicting        # (server) handlers end because the worker does

    def __init__(self, bint is_client, bytes subject not None, *, keepalive=10.0, buffer=100, served=(), **limits):
        super().__init__(is_client, subject, **limits)
        self.port = EventPort()
        self.events = []
        self.heard_of = []
        self.served = set(served)
        self.keepalive_timeout = keepalive
        self.keepalive_setting = "DYNWIRE_NATS_KEEPALIVE_TIMEOUT"
        self.channel_buffer = buffer
        if not is_client:
            self.peer_max_message = min(self.max_message, self.item_limit())

    cdef StreamBase make_stream(self):
        cdef EventStream stream = EventStream.__new__(EventStream)
        stream.owner = self
        return stream

    cdef object resolve(self, str name):
        return (name,) if name in self.served else name

    cdef int on_request(self, StreamBase stream, object target, object payload, int kind, object meta,
                        uint32_t timeout_ms) except -1:
        name = target[0] if type(target) is tuple else target
        self.events.append(("request", stream.seq, name, bytes(payload), kind, meta, stream.in_id, timeout_ms))
        return 0

    @property
    def port_(self):
        return self.port

    def take_events(self):
        out, self.events = self.events, []
        return out

    def deliver(self, bytes subject, bytes reply, headers, payload, double now=0.0):
        """One message; returns the events it causes. A `Block` as payload counts as one that arrived in its own memory."""
        cdef const unsigned char *h = NULL
        cdef size_t h_n = 0
        cdef const unsigned char[::1] view
        cdef Block block
        cdef bytes r = reply or b""
        if headers is not None:
            h = <const unsigned char *>PyBytes_AS_STRING(headers)
            h_n = len(headers)
        self.now = now
        if type(payload) is Block:
            block = payload
            self.receive(<const unsigned char *>PyBytes_AS_STRING(subject), len(subject),
                         <const unsigned char *>PyBytes_AS_STRING(r), len(r), h, h_n, block.data, block.size, block)
        else:
            view = payload or b"\0"
            self.receive(<const unsigned char *>PyBytes_AS_STRING(subject), len(subject),
                         <const unsigned char *>PyBytes_AS_STRING(r), len(r), h, h_n, &view[0], len(payload), None)
        return self.take_events()

    def deliver_queued(self, consumer, delivery, bytes subject, bytes headers, bytes payload, double now=0.0):
        """(server) One request from a queue; returns the events it causes."""
        self.now = now
        self.receive_queued(consumer, delivery, subject, <const unsigned char *>PyBytes_AS_STRING(headers), len(headers),
                            <const unsigned char *>PyBytes_AS_STRING(payload), len(payload), None)
        return self.take_events()

    cdef bint has_room(self, bytes subject):
        return not self.full and QueueWire.has_room(self, subject)

    cdef bint given_back(self, StreamBase stream):
        return self.evicting and stream.mark == 0

    def share_port(self, EventWire other not None):
        """Use the connection of another client."""
        self.port = other.port

    def output(self):
        """What was published since the last call."""
        cdef EventPort port = self.port
        out, port.sent = port.sent, []
        return out

    def set_port(self, double now=0.0, **options):
        """Change the port (``state``, ``congested``, ``max_payload``) and tell the machine; returns events."""
        self.port.set(**options)
        if "congested" in options and not options["congested"]:
            self.writable_again()
            if self.is_client and self.pending:
                self.send_pending()
        if "state" in options:
            self.port_changed(now)
        return self.take_events()

    def request(self, NatsTarget target, payload=b"", *, int kind=0, meta=None, double timeout=INFINITY, bint reader=True,
                double now=0.0):
        """(client) Start a request; ``timeout`` in s. Raises what `submit` raises."""
        cdef EventStream stream = EventStream.__new__(EventStream)
        stream.owner = self
        stream.untouched = True
        stream.keeps_items = reader
        stream.under = QueueRequest(target, self.unnamed) if type(target) is QueueTarget else target
        self.submit(stream, "the endpoint", payload, kind, meta, now + timeout, now + timeout, now)
        return stream

    def ping_peer(self, NatsPeer peer, double now=0.0):
        """(client) Ask whether it is there."""
        self.ping(peer, now)

    def is_fresh(self, NatsPeer peer, double now=0.0):
        """(client) Was it there a moment ago?"""
        return self.fresh(peer, now)

    def say_goodbye(self):
        """(server) Tell the callers."""
        self.put_goodbye()

    cdef int on_peer(self, NatsPeer peer, object error) except -1:
        self.heard_of.append((peer.address, None if error is None else type(error).__name__))
        return 0

    def stream(self, uint32_t number, bint killed=False):
        """The open stream with that number, or None; one that was killed is found if that is said, or if it is the only one."""
        cdef EventStream stream
        found = [stream for stream in self.slots if stream is not None and stream.seq == number]
        found.sort(key=lambda stream: (<EventStream>stream).killed != killed)
        return found[0] if found else None

    def _open(self, uint32_t number):
        stream = self.stream(number)
        if stream is None:
            raise KeyError(f"stream {number} is not open")
        return stream

    def send_item(self, uint32_t number, payload=b"", *, int kind=0, bint last=False):
        """(server) Send an item; returns False when it has to wait."""
        cdef StreamBase stream = self._open(number)
        cdef const unsigned char[::1] view = payload or b"\0"
        if not self.may_send(stream):
            return False
        self.put_item(stream, &view[0], len(payload), payload, kind, last)
        if last:
            self.request_done(stream)
        return True

    def send_end(self, uint32_t number):
        cdef StreamBase stream = self._open(number)
        self.put_end(stream)
        self.request_done(stream)

    def send_error(self, uint32_t number, bytes body, bint killed=False):
        cdef StreamBase stream = self.stream(number, killed)
        self.put_error(stream, 0, body)
        self.request_done(stream)

    def send_accept(self, uint32_t number):
        self.put_accept(self._open(number))

    def cancel(self, uint32_t number, int kind):
        """(client) 1: ask to stop, 2: kill and forget."""
        cdef StreamBase stream = self._open(number)
        if kind == 2:
            self.abandon(stream, kind)
        else:
            self.put_cancel(stream, kind)

    def take(self, uint32_t number, int64_t cost):
        """(client) The application has taken items of this cost (payload + overhead each)."""
        self.consumed(self._open(number), cost)

    def on_time(self, double now):
        """Let timers fire; returns the events. ``next_timer`` is when to call again."""
        self.time_passed(now)
        return self.take_events()

    def lost(self):
        """Give everything up; returns the numbers of the streams."""
        self.dead = True
        return [(<StreamBase>stream).seq for stream in self.take_all_streams()]

    @property
    def next_timer(self):
        return self.next_wakeup()

    @property
    def waiting_requests(self):
        return len(self.pending)

    @property
    def kept(self):
        """Messages that wait for the connection."""
        return len(self.outbox)
