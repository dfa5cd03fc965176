"""The NATS client protocol, without I/O: what the server sends is parsed, what is published is written into a buffer.

The server's bytes are checked: sizes before anything is allocated, every line for its shape and length. What a message contains
was chosen by whoever published it: nothing in it may do more than be delivered.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memchr, memcmp, memcpy, memmove

from ._buffers cimport BLOCK_MIN_BYTES, Block, default_pool
from ._bytes cimport dw_buf_free, dw_buf_reserve, dw_chunk

from .errors import ConfigError, MessageTooLarge, ProtocolError

cdef extern from *:
    """
    /* Is every byte neither a blank nor a control character? Eight at a time: 0x80 is set in `low` for bytes below 0x21, and in
       `del` for 0x7f; a borrow from a byte that is found may find its neighbour wrongly, which changes nothing. */
    static int dw_visible(const unsigned char *p, size_t n) {
        const uint64_t ones = 0x0101010101010101ull, tops = 0x8080808080808080ull;
        uint64_t w, d;
        for (; n >= 8; p += 8, n -= 8) {
            memcpy(&w, p, 8);
            d = w ^ (ones * 0x7f);
            if ((((w - ones * 0x21) & ~w) | ((d - ones) & ~d)) & tops) return 0;
        }
        for (; n; p++, n--) if (*p <= 0x20 || *p == 0x7f) return 0;
        return 1;
    }
    """
    bint dw_visible(const unsigned char *p, size_t n) noexcept nogil

DOWN = PORT_DOWN
UP = PORT_UP
CLOSED = PORT_CLOSED

MSG = OP_MSG
INFO = OP_INFO
ERR = OP_ERR
PING = OP_PING
PONG = OP_PONG


cdef class MessageSink:
    """Gets the messages of one or several subscriptions. Subclasses say what happens."""

    cdef int on_message(self, const unsigned char *subject, size_t subject_n, const unsigned char *reply, size_t reply_n,
                        const unsigned char *headers, size_t headers_n, const unsigned char *payload, size_t n,
                        object owner) except -1:
        return 0

    cdef int on_batch(self, bint begin) except -1:
        return 0

    cdef int on_state(self, int state, object error) except -1:
        return 0

    cdef int on_writable(self) except -1:
        return 0


cdef class CallbackSink(MessageSink):
    """A sink written in Python, for tests and tools.

    ``on_message(subject, reply, headers, payload)`` gets bytes: ``reply`` is empty and ``headers`` None where there are none, a
    payload that came in a Block is that Block. ``on_batch(begin)``, ``on_state(state, error)`` and ``on_writable()`` are
    optional.
    """

    cdef object message, batch, state, writable

    def __init__(self, on_message, on_batch=None, on_state=None, on_writable=None):
        self.message = on_message
        self.batch = on_batch
        self.state = on_state
        self.writable = on_writable

    cdef int on_message(self, const unsigned char *subject, size_t subject_n, const unsigned char *reply, size_t reply_n,
                        const unsigned char *headers, size_t headers_n, const unsigned char *payload, size_t n,
                        object owner) except -1:
        self.message(
            subject[:subject_n], reply[:reply_n] if reply_n else b"", None if headers is NULL else headers[:headers_n],
            payload[:n] if owner is None else owner,
        )  # fmt: skip
        return 0

    cdef int on_batch(self, bint begin) except -1:
        if self.batch is not None:
            self.batch(begin)
        return 0

    cdef int on_state(self, int state, object error) except -1:
        if self.state is not None:
            self.state(state, error)
        return 0

    cdef int on_writable(self) except -1:
        if self.writable is not None:
            self.writable()
        return 0


cdef class MessagePort:
    """The way out to the NATS server."""

    def __cinit__(self):
        self.starving = []

    cdef int publish(self, bytes subject, bytes reply, const unsigned char *headers, size_t headers_n,
                     const unsigned char *payload, size_t n, object owner) except -1:
        return 0

    cdef int flush(self) except -1:
        return 0

    cdef size_t backlog(self):
        return 0


# --- from the server ----------------------------------------------------------------------------------------------------------


cdef inline bint is_blank(unsigned char c) noexcept nogil:
    return c == c" " or c == c"\t"


cdef inline bint number(const unsigned char *p, size_t n, uint64_t *value) noexcept nogil:
    """Decimal digits only, few enough for the result to be exact. False for anything else."""
    cdef uint64_t v = 0
    cdef size_t i
    if n == 0 or n > 18:
        return False
    for i in range(n):
        if p[i] < c"0" or p[i] > c"9":
            return False
        v = v * 10 + (p[i] - c"0")
    value[0] = v
    return True


cdef class NatsParser:
    """Turns what the server sends into calls of sinks and a list of other operations.

    ``feed(data)`` takes bytes at any cut. Messages of subscriptions with a sink are delivered before it returns; everything else
    is in ``others``, as tuples (see OP_MSG and its neighbours in the .pxd). Raises `ProtocolError`, after which nothing more is
    parsed. A sink that raises loses that message only: `sink_failed` is told.

    Not thread-safe. A sink may subscribe, unsubscribe and close within a call, but not feed.
    """

    def __cinit__(self, int64_t max_payload=1048576, dict sinks=None):
        self.buf = <unsigned char *>malloc(READ_BUFFER)
        if self.buf is NULL:
            raise MemoryError
        self.sinks = {} if sinks is None else sinks
        self.others = []
        self.batch = []
        self.max_payload = max_payload
        self.wanted = 1

    def __dealloc__(self):
        free(self.buf)
        dw_buf_free(&self.names)
        dw_buf_free(&self.header)

    # --- Python face, for tests and tools

    def add_sink(self, uint64_t sid, MessageSink sink not None):
        """Deliver messages of subscription ``sid`` to ``sink``."""
        self.sinks[sid] = sink
        self.last_sink = None

    def remove_sink(self, uint64_t sid):
        """Messages of ``sid`` are among the others from now on."""
        self.forget_sink(sid)

    def set_max_payload(self, int64_t max_payload):
        """Larger messages break the protocol; the server announces it."""
        self.max_payload = max_payload

    def take_others(self):
        """The other operations so far; they are then forgotten here."""
        others, self.others, self.others_bytes = self.others, [], 0
        return others

    def feed(self, data):
        """Parse ``data``. Raises `ProtocolError`."""
        cdef Py_buffer view
        cdef size_t at = 0
        cdef size_t room = 0
        cdef size_t n
        cdef unsigned char *to
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            while at < <size_t>view.len and not self.stopped:
                to = self.target(&room)
                n = min(room, <size_t>view.len - at)
                memcpy(to, <const unsigned char *>view.buf + at, n)
                at += n
                self.advance(n)
        finally:
            PyBuffer_Release(&view)
            self.end_batch()

    # ---

    cdef unsigned char *target(self, size_t *room) except NULL:
        """Where the next bytes from the server belong. Valid until `advance`, which says how many have come."""
        if self.large and self.header_have == self.header_n and self.start == self.end:
            if self.payload_n - self.payload_have > LAST_PIECE:
                self.into_block = True
                room[0] = self.payload_n - self.payload_have
                return self.block.data + self.payload_have
        self.into_block = False
        if self.start == self.end:
            self.start = self.end = 0
        elif READ_BUFFER - self.end < READ_BUFFER // 4:
            # What is left is less than a control line and a message below LARGE_MESSAGE: there is room behind it.
            memmove(self.buf, self.buf + self.start, self.end - self.start)
            self.end -= self.start
            self.start = 0
        room[0] = READ_BUFFER - self.end
        return self.buf + self.end

    cdef int advance(self, size_t n) except -1:
        """``n`` bytes have come where `target` said."""
        self.received += n
        if self.into_block:
            self.payload_have += n
            return 0
        self.end += n
        if self.end - self.start >= self.wanted and not self.stopped:
            self.parse()
        return 0

    cdef int end_batch(self) except -1:
        """Everything of this read has been delivered."""
        cdef MessageSink sink
        self.batch_sink = None
        while self.batch:
            sink = self.batch.pop()
            try:
                sink.on_batch(False)
            except Exception as error:
                self.sink_failed(sink, error)
        return 0

    cdef int parse(self) except -1:
        cdef const unsigned char *p
        cdef const unsigned char *newline
        cdef size_t n, line_n
        while not self.stopped:
            if self.large:
                if not self.fill_large():
                    break
                continue
            n = self.end - self.start
            if n == 0:
                self.wanted = 1
                break
            p = self.buf + self.start
            newline = <const unsigned char *>memchr(p, c"\n", n)
            if newline is NULL:
                self.check_beginning(p, n)
                self.wanted = n + 1
                break
            line_n = newline - p
            # the server splits words at a CR, so none is in the subjects that it tells
            if <const unsigned char *>memchr(p, c"\r", line_n) != newline - 1:
                self.broken("a line does not end with CR LF, or has a CR within")
            if line_n > CONTROL_LINE + LINE_SLACK and not (p[0] == c"I" and line_n <= INFO_LINE):
                self.broken(f"a line of {line_n} bytes; at most {CONTROL_LINE + LINE_SLACK} are allowed, {INFO_LINE} for INFO")
            if self.control_line(p, line_n - 1) == 0:
                break
        return 0

    cdef int check_beginning(self, const unsigned char *p, size_t n) except -1:
        """A line whose end has not come: is it one of the protocol, and not too long yet?"""
        cdef size_t limit = INFO_LINE if p[0] == c"I" else CONTROL_LINE + LINE_SLACK
        if n > limit:
            return self.broken(f"a line of more than {limit} bytes")
        cdef size_t three = n if n < 3 else 3
        cdef size_t four = n if n < 4 else 4
        if memcmp(p, b"MSG", three) and memcmp(p, b"HMSG", four) and memcmp(p, b"INFO", four) and memcmp(p, b"PING", four) and \
                memcmp(p, b"PONG", four) and memcmp(p, b"+OK", three) and memcmp(p, b"-ERR", four):
            return self.broken(f"unknown operation {bytes(p[:n])[:16]!r}")
        return 0

    cdef int control_line(self, const unsigned char *p, size_t n) except -1:
        """One line without its CR LF. Returns 0 when the message behind it has not come yet: the line stays where it is."""
        cdef size_t at
        if n >= 4 and memcmp(p, b"MSG", 3) == 0 and is_blank(p[3]):
            return self.message_line(p, n, False)
        if n >= 5 and memcmp(p, b"HMSG", 4) == 0 and is_blank(p[4]):
            return self.message_line(p, n, True)
        at = 4
        if n >= 4 and memcmp(p, b"PING", 4) == 0:
            op = (OP_PING,)
        elif n >= 4 and memcmp(p, b"PONG", 4) == 0:
            op = (OP_PONG,)
        elif n >= 3 and memcmp(p, b"+OK", 3) == 0:
            op = None
            at = 3
        elif n >= 5 and memcmp(p, b"INFO", 4) == 0 and is_blank(p[4]):
            op = (OP_INFO, p[5:n].strip())
            at = n
        elif n >= 4 and memcmp(p, b"-ERR", 4) == 0 and (n == 4 or is_blank(p[4])):
            op = (OP_ERR, p[4:n].strip())
            at = n
        else:
            return self.broken(f"unknown operation {bytes(p[:n])[:16]!r}")
        while at < n and is_blank(p[at]):
            at += 1
        if at < n:
            return self.broken(f"unknown operation {bytes(p[:n])[:16]!r}")
        self.start += n + 2
        if op is not None:
            self.others.append(op)
            self.others_bytes += n + 64
        return 1

    cdef int message_line(self, const unsigned char *p, size_t n, bint with_headers) except -1:
        cdef const unsigned char *words[5]
        cdef size_t lengths[5]
        cdef size_t at = 4 if with_headers else 3
        cdef size_t have
        cdef int count = 0
        cdef int fixed = 4 if with_headers else 3
        cdef uint64_t sid = 0
        cdef uint64_t header_n = 0
        cdef uint64_t total = 0
        cdef const unsigned char *reply = NULL
        cdef size_t reply_n = 0
        cdef const unsigned char *body
        cdef const unsigned char *blank
        cdef bint has_tab = memchr(p, c"\t", n) is not NULL
        while True:
            while at < n and is_blank(p[at]):
                at += 1
            if at == n:
                break
            if count == fixed + 1:
                return self.broken("a message line has too many words")
            words[count] = p + at
            blank = <const unsigned char *>memchr(p + at, c" ", n - at)
            at = n if blank is NULL else <size_t>(blank - p)
            if has_tab:
                blank = <const unsigned char *>memchr(words[count], c"\t", p + at - words[count])
                if blank is not NULL:
                    at = blank - p
            lengths[count] = p + at - words[count]
            count += 1
        if count < fixed:
            return self.broken("a message line has too few words")
        if count > fixed:
            reply = words[2]
            reply_n = lengths[2]
        if not number(words[1], lengths[1], &sid):
            return self.broken("a subscription id is not a number")
        if not number(words[count - 1], lengths[count - 1], &total):
            return self.broken("the size of a message is not a number")
        if with_headers and (not number(words[count - 2], lengths[count - 2], &header_n) or header_n > total):
            return self.broken("the size of headers is not a number, or larger than that of the message")
        if total > <uint64_t>self.max_payload + HEADER_SLACK:
            return self.broken(f"a message of {total} bytes, but the server announced max_payload {self.max_payload}")
        have = self.end - self.start - (n + 2)
        if have < total + 2:
            if total < LARGE_MESSAGE:
                self.wanted = n + 2 + total + 2
                return 0
            self.start_large(sid, words[0], lengths[0], reply, reply_n, header_n, total - header_n)
            self.start += n + 2
            return 1
        body = p + n + 2
        if body[total] != c"\r" or body[total + 1] != c"\n":
            return self.broken("a message does not end with CR LF where its size says")
        self.start += n + 2 + total + 2
        self.deliver(sid, words[0], lengths[0], reply, reply_n, body if with_headers else NULL, header_n, body + header_n,
                     total - header_n, None)
        return 1

    cdef int start_large(self, uint64_t sid, const unsigned char *subject, size_t subject_n, const unsigned char *reply,
                         size_t reply_n, size_t header_n, size_t payload_n) except -1:
        cdef unsigned char *to
        self.names.n = 0
        to = dw_buf_reserve(&self.names, subject_n + reply_n)
        if to is NULL:
            raise MemoryError
        memcpy(to, subject, subject_n)
        if reply_n:
            memcpy(to + subject_n, reply, reply_n)
        if header_n:
            self.header.n = 0
            if dw_buf_reserve(&self.header, header_n) is NULL:
                raise MemoryError
        self.block = default_pool.take(payload_n)
        self.subject_n = subject_n
        self.reply_n = reply_n
        self.header_n = header_n
        self.header_have = 0
        self.payload_n = payload_n
        self.payload_have = 0
        self.large_sid = sid
        self.large = True
        return 0

    cdef bint fill_large(self) except -1:
        """Move what has come of the large message where it belongs. True when it was complete and has been delivered."""
        cdef size_t n = min(self.end - self.start, self.header_n - self.header_have)
        cdef Block block
        if n:
            memcpy(self.header.p + self.header_have, self.buf + self.start, n)
            self.header_have += n
            self.start += n
        n = min(self.end - self.start, self.payload_n - self.payload_have)
        if n:
            memcpy(self.block.data + self.payload_have, self.buf + self.start, n)
            self.payload_have += n
            self.start += n
        self.wanted = 1
        if self.payload_have < self.payload_n or self.header_have < self.header_n:
            return False
        if self.end - self.start < 2:
            self.wanted = 2
            return False
        if self.buf[self.start] != c"\r" or self.buf[self.start + 1] != c"\n":
            self.broken("a message does not end with CR LF where its size says")
        self.start += 2
        self.large = False
        block, self.block = self.block, None
        self.deliver(self.large_sid, self.names.p, self.subject_n, self.names.p + self.subject_n if self.reply_n else NULL,
                     self.reply_n, self.header.p if self.header_n else NULL, self.header_n, block.data, self.payload_n, block)
        if self.header.cap > LARGE_MESSAGE:
            dw_buf_free(&self.header)
        return True

    cdef int deliver(self, uint64_t sid, const unsigned char *subject, size_t subject_n, const unsigned char *reply,
                     size_t reply_n, const unsigned char *headers, size_t headers_n, const unsigned char *payload, size_t n,
                     object owner) except -1:
        cdef MessageSink sink = self.last_sink
        if sink is None or sid != self.last_sid:
            sink = self.sinks.get(sid)
            if sink is None:
                # NULL with length 0 makes b""
                self.others.append((
                    OP_MSG, sid, subject[:subject_n], PyBytes_FromStringAndSize(<const char *>reply, reply_n),
                    payload[:n], None if headers is NULL else headers[:headers_n],
                ))  # fmt: skip
                self.others_bytes += subject_n + reply_n + n + headers_n + 128
                return 0
            self.last_sid = sid
            self.last_sink = sink
        try:
            if sink is not self.batch_sink:
                if not any([other is sink for other in self.batch]):
                    self.batch.append(sink)
                    sink.on_batch(True)
                self.batch_sink = sink
            self.messages += 1
            sink.on_message(subject, subject_n, reply, reply_n, headers, headers_n, payload, n, owner)
        except Exception as error:
            self.sink_failed(sink, error)
        return 0

    cdef int forget_sink(self, uint64_t sid) except -1:
        self.sinks.pop(sid, None)
        self.last_sink = None
        return 0

    cdef int sink_failed(self, MessageSink sink, object error) except -1:
        """A sink raised. Whoever runs the loop reports it; the connection goes on."""
        raise error

    cdef int broken(self, str what) except -1:
        self.stopped = True
        raise ProtocolError(
            f"what the NATS server sent is not its protocol: {what}", offset=self.received - (self.end - self.start)
        )

    cdef bytes line(self):
        """Take one line with its end, for the handshake; None when it has not come yet. Raises `ProtocolError` for a long one."""
        cdef size_t n = self.end - self.start
        cdef const unsigned char *newline = <const unsigned char *>memchr(self.buf + self.start, c"\n", n) if n else NULL
        cdef bytes out
        if newline is NULL:
            if n > INFO_LINE:
                self.broken(f"a line of more than {INFO_LINE} bytes")
            return None
        n = newline - (self.buf + self.start) + 1
        out = self.buf[self.start : self.start + n]
        self.start += n
        return out


# --- to the server ------------------------------------------------------------------------------------------------------------


@cython.final
@cython.no_gc
cdef class _Reference:
    """A payload that is written from where it lies; a read-only buffer over it."""

    cdef const unsigned char *data
    cdef size_t n
    cdef size_t at                       # how many bytes of the buffer come before it
    cdef object owner

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, <void *>self.data, self.n, 1, flags)

    def __len__(self):
        return self.n


cdef inline unsigned char *digits(unsigned char *to, size_t value) noexcept nogil:
    cdef unsigned char scratch[20]
    cdef int n = 0
    while True:
        scratch[n] = <unsigned char>(c"0" + value % 10)
        value //= 10
        n += 1
        if value == 0:
            break
    while n:
        n -= 1
        to[0] = scratch[n]
        to += 1
    return to


cdef int check_subject(bytes subject) except -1:
    """White space or control characters in it would be read as something else by the server."""
    cdef Py_ssize_t n = PyBytes_GET_SIZE(subject)
    if not dw_visible(<const unsigned char *>PyBytes_AS_STRING(subject), n):
        n = 0
    if n == 0:
        raise ConfigError(
            f"{subject!r} is not a NATS subject: one is not empty, and has neither white space nor control characters",
            name="subject", value=subject,
        )  # fmt: skip
    return 0


cdef class NatsWriter:
    """What goes to the server, in order: lines and small payloads in one growing buffer, large payloads by reference.

    A payload of at least 64 KiB with an ``owner`` is not copied: the owner is kept until it is sent, and must keep the memory
    unchanged until then.
    """

    def __cinit__(self):
        self.references = []

    def __dealloc__(self):
        dw_buf_free(&self.buf)

    # --- Python face, for tests and tools

    def add(self, bytes subject not None, data, reply=None, headers=None):
        """Publish ``data``; ``headers`` is the whole block."""
        cdef Py_buffer view
        cdef bytes block = headers
        cdef bytes back = reply
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            self.publish(
                subject, back, NULL if block is None else <const unsigned char *>PyBytes_AS_STRING(block),
                0 if block is None else PyBytes_GET_SIZE(block), <const unsigned char *>view.buf, view.len, data,
            )  # fmt: skip
        finally:
            PyBuffer_Release(&view)

    def add_raw(self, bytes data not None):
        """Any bytes of the protocol."""
        self.raw(<const unsigned char *>PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), data)

    def take(self):
        """Everything that waits, joined."""
        out = []
        while self.pending():
            out.append(bytes(self.piece()))
        return b"".join(out)

    def take_some(self, size_t n):
        """The next ``n`` bytes, or fewer, as a socket takes them that has no room for more."""
        cdef dw_chunk chunks[16]
        cdef int count = self.gather(chunks, 16)
        cdef int i
        out = []
        for i in range(count):
            piece = (<const unsigned char *>chunks[i].base)[: chunks[i].len]
            out.append(piece)
        joined = b"".join(out)[:n]
        self.sent(len(joined))
        return joined

    def pieces(self):
        """How many pieces of memory wait: one for lines and small payloads between two references, one for each of them."""
        cdef dw_chunk chunks[64]
        return self.gather(chunks, 64)

    # ---

    cdef int raw(self, const unsigned char *data, size_t n, object owner) except -1:
        cdef unsigned char *to
        if n >= BLOCK_MIN_BYTES and owner is not None:
            return self.refer(data, n, owner)
        to = dw_buf_reserve(&self.buf, n)
        if to is NULL:
            raise MemoryError
        memcpy(to, data, n)
        self.buf.n += n
        return 0

    cdef int refer(self, const unsigned char *data, size_t n, object owner) except -1:
        cdef _Reference reference = _Reference.__new__(_Reference)
        reference.data = data
        reference.n = n
        reference.at = self.buf.n
        reference.owner = owner
        self.references.append(reference)
        self.reference_bytes += n
        return 0

    cdef int publish(self, bytes subject, bytes reply, const unsigned char *headers, size_t headers_n,
                     const unsigned char *payload, size_t n, object owner) except -1:
        cdef size_t subject_n = PyBytes_GET_SIZE(subject)
        cdef size_t reply_n = 0 if reply is None else PyBytes_GET_SIZE(reply)
        cdef bint refer = n >= BLOCK_MIN_BYTES and owner is not None
        cdef unsigned char *to
        check_subject(subject)
        if reply_n:
            check_subject(reply)
        if subject_n + reply_n > CONTROL_LINE - 48:
            raise MessageTooLarge(
                f"subject and reply subject have {subject_n + reply_n} bytes; a NATS server reads lines of up to {CONTROL_LINE}",
                size=subject_n + reply_n, limit=CONTROL_LINE - 48, setting="max_control_line of the NATS server",
            )  # fmt: skip
        # operation, two numbers of up to 20 digits, blanks, and the end of line and message
        to = dw_buf_reserve(&self.buf, subject_n + reply_n + 64 + headers_n + (0 if refer else n))
        if to is NULL:
            raise MemoryError
        if headers is not NULL:
            to[0] = c"H"
            to += 1
        memcpy(to, b"PUB ", 4)
        to += 4
        memcpy(to, PyBytes_AS_STRING(subject), subject_n)
        to += subject_n
        to[0] = c" "
        to += 1
        if reply_n:
            memcpy(to, PyBytes_AS_STRING(reply), reply_n)
            to += reply_n
            to[0] = c" "
            to += 1
        if headers is not NULL:
            to = digits(to, headers_n)
            to[0] = c" "
            to += 1
        to = digits(to, headers_n + n)
        to[0] = c"\r"
        to[1] = c"\n"
        to += 2
        if headers is not NULL:
            memcpy(to, headers, headers_n)
            to += headers_n
        if refer:
            self.buf.n = to - self.buf.p
            self.refer(payload, n, owner)
        elif n:
            memcpy(to, payload, n)
            to += n
        to[0] = c"\r"
        to[1] = c"\n"
        self.buf.n = to + 2 - self.buf.p
        self.messages += 1
        return 0

    cdef size_t pending(self):
        return self.buf.n - self.head + self.reference_bytes

    cdef int gather(self, dw_chunk *chunks, int most):
        """What to write next, in at most ``most`` pieces. Valid until something is added or sent."""
        cdef size_t at = self.head
        cdef int n = 0
        cdef _Reference reference
        for reference in self.references:
            if n + 2 > most:
                return n
            if reference.at > at:
                chunks[n].base = self.buf.p + at
                chunks[n].len = reference.at - at
                at = reference.at
                n += 1
            chunks[n].base = reference.data
            chunks[n].len = reference.n
            n += 1
        if at < self.buf.n and n < most:
            chunks[n].base = self.buf.p + at
            chunks[n].len = self.buf.n - at
            n += 1
        return n

    cdef int sent(self, size_t n) except -1:
        """The first ``n`` bytes of what waits have left."""
        cdef _Reference reference
        cdef size_t step
        while n:
            reference = self.references[0] if self.references else None
            if reference is not None and reference.at == self.head:
                step = min(n, reference.n)
                reference.data += step
                reference.n -= step
                self.reference_bytes -= step
                if reference.n == 0:
                    self.references.pop(0)
            else:
                step = min(n, (self.buf.n if reference is None else reference.at) - self.head)
                self.head += step
            n -= step
        if self.head == self.buf.n and not self.references:
            self.clear()
        return 0

    cdef object piece(self):
        """Take the first piece of memory as an object with a buffer, for a transport that keeps what it cannot write at once."""
        cdef _Reference reference = self.references[0] if self.references else None
        cdef size_t until
        if reference is not None and reference.at == self.head:
            self.references.pop(0)
            self.reference_bytes -= reference.n
            out = memoryview(reference)  # asyncio wants one of its own types
        else:
            until = self.buf.n if reference is None else reference.at
            out = PyBytes_FromStringAndSize(<const char *>self.buf.p + self.head, until - self.head)
            self.head = until
        if self.head == self.buf.n and not self.references:
            self.clear()
        return out

    cdef int clear(self) except -1:
        self.head = 0
        self.buf.n = 0
        self.references.clear()
        self.reference_bytes = 0
        if self.buf.cap > 1048576:
            dw_buf_free(&self.buf)
        return 0
