"""Ports to a NATS server: the compiled one, which takes the place of nats-py's transport and parser, and one over its public API.

The fast port sits where nats-py 2.16 has its seams: ``Client._transport`` and ``Client._ps``. Connecting, authentication, TLS,
reconnecting, JetStream and everything else stay nats-py's and go through it in order. What comes for a subscription with a sink
is delivered in the callback of the loop that read it; every other operation waits for nats-py's reading task.

All of it belongs to the thread of the loop.
"""

import asyncio
import collections
import json
import logging
import re

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memchr, memcmp

from ._bytes cimport dw_chunk
from ._natsproto cimport (
    OP_INFO,
    OP_MSG,
    OP_PING,
    OP_PONG,
    PORT_CLOSED,
    PORT_DOWN,
    PORT_UP,
    MessagePort,
    MessageSink,
    NatsParser,
    NatsWriter,
    check_subject,
)

from .errors import ManagerClosed, MessageTooLarge, PeerLost, ProtocolError

logger = logging.getLogger("dynwire.nats")

DENIED = re.compile(r"permissions violation for (publish|subscription) to \"([^\"]*)\"", re.IGNORECASE)

cdef extern from *:
    """
    #include <string.h>
    #include <sys/socket.h>
    #include <sys/uio.h>
    /* dw_chunk has the layout of struct iovec, by construction on Linux: pointer, then size_t. */
    _Static_assert(sizeof(dw_chunk) == sizeof(struct iovec), "dw_chunk must match struct iovec");
    static inline ssize_t port_send(int fd, dw_chunk *chunks, int n) {
        if (n == 1) return send(fd, chunks[0].base, chunks[0].len, MSG_DONTWAIT | MSG_NOSIGNAL);
        struct msghdr m; memset(&m, 0, sizeof m);
        m.msg_iov = (struct iovec *)chunks; m.msg_iovlen = (size_t)n;
        return sendmsg(fd, &m, MSG_DONTWAIT | MSG_NOSIGNAL);
    }
    """
    ssize_t port_send(int fd, dw_chunk *chunks, int n) nogil

cdef extern from "Python.h":
    object PyMemoryView_FromMemory(char *mem, Py_ssize_t size, int flags)
    int PyBUF_WRITE

cdef enum:
    CONGESTED_BYTES = 262144      # what the socket does not take, from which producers wait
    WRITABLE_BYTES = 65536        # and down to which they wait
    EARLY_FLUSH = 4096            # first of the geometric thresholds (x4 each) at which a read callback writes before its end
    LAST_EARLY_FLUSH = 65536      # the last one, and the one outside of read callbacks
    OTHERS_BYTES = 4194304        # operations that wait for nats-py, from which the socket is not read
    CHUNKS = 16
    QUEUE_OVERHEAD = 256          # what a message in the plain port's queue costs beside its payload

cdef double CLOSE_GRACE_S = 0.5   # for what is unsent when nats-py closes a connection; a frozen server would never take it


cdef int report_sink(object loop, MessageSink sink, object error) except -1:
    loop.call_exception_handler({
        "message": f"a message from the NATS server was lost: {type(sink).__name__} raised", "exception": error,
    })  # fmt: skip
    return 0


cdef class PortParser(NatsParser):
    cdef int sink_failed(self, MessageSink sink, object error) except -1:
        report_sink(self.loop, sink, error)
        return 0


cdef class PortSocket:
    """The asyncio protocol of one connection; see `_SocketProtocol`."""

    def __init__(self, FastPort port):
        self.port = port
        self.parser = PortParser(port.max_payload, port.sinks)
        self.parser.loop = port.loop
        self.writer = NatsWriter()
        self.fd = -1
        self.handshake = True
        self.flush_at = LAST_EARLY_FLUSH
        self.drainers = []
        self.gone = port.loop.create_future()

    # --- what the transport calls

    def connection_made(self, transport):
        self.attach(transport, False)

    def attach(self, transport, bint tls):
        self.transport = transport
        self.tls = tls
        transport.set_write_buffer_limits(high=CONGESTED_BYTES, low=WRITABLE_BYTES)
        self.fd = -1 if tls else transport.get_extra_info("socket").fileno()

    def get_buffer(self, hint):
        cdef size_t room = 0
        cdef unsigned char *to = self.parser.target(&room)
        return PyMemoryView_FromMemory(<char *>to, room, PyBUF_WRITE)

    def buffer_updated(self, Py_ssize_t n):
        if self.closing:
            return
        if self.handshake:
            self.parser.stopped = True  # the bytes are kept, nothing is parsed
            self.parser.advance(n)
            self.parser.stopped = False
            self.wake_reader()
            return
        self.in_dispatch = True
        self.flush_at = EARLY_FLUSH
        try:
            self.parser.advance(n)
        except (ProtocolError, MemoryError) as error:
            self.failed(error)
        finally:  # also when Ctrl-C comes in a sink
            self.dispatched()

    cdef int dispatched(self) except -1:
        """The messages of one read have been delivered: write what they caused."""
        try:
            self.parser.end_batch()
        finally:
            self.in_dispatch = False
            self.flush_at = LAST_EARLY_FLUSH
        if not self.lost:
            self.flush()
        if self.parser.others:
            self.wake_reader()
            if self.parser.others_bytes > OTHERS_BYTES and not self.reading_paused and not self.closing:
                self.reading_paused = True
                self.transport.pause_reading()
        return 0

    def begin(self):
        """The handshake is over: parse what came behind it. Called from the loop."""
        if self.handshake and not self.closing:
            self.handshake = False
            self.in_dispatch = True
            self.flush_at = EARLY_FLUSH
            try:
                self.parser.parse()
            except (ProtocolError, MemoryError) as error:
                self.failed(error)
            finally:
                self.dispatched()

    def eof_received(self):
        self.eof = True
        self.fd = -1  # the transport may close it before connection_lost(), and the number may belong to somebody else then
        self.wake_reader()
        return None  # the transport closes itself

    def connection_lost(self, error):
        self.lost = True
        self.eof = True
        self.fd = -1
        if error is not None and self.error is None:
            self.error = error
        self.writer.clear()
        self.wake_reader()
        drainers, self.drainers = self.drainers, []
        for future in drainers:
            if not future.done():
                future.set_result(None)
        if not self.gone.done():
            self.gone.set_result(None)
        if self.port.socket is self:
            self.port.go_down(self.error)

    def pause_writing(self):
        self.paused = True
        if self.port.socket is self:
            self.port.congested = True

    def resume_writing(self):
        self.paused = False
        self.flush()
        if not self.paused:
            drainers, self.drainers = self.drainers, []
            for future in drainers:
                if not future.done():
                    future.set_result(None)
            if self.port.socket is self and self.port.congested:
                self.port.now_writable()

    # ---

    cdef int wake_reader(self) except -1:
        reader, self.reader = self.reader, None
        if reader is not None and not reader.done():
            reader.set_result(None)
        return 0

    cdef int failed(self, object error) except -1:
        """Give the connection up; nats-py learns the reason when it reads."""
        if self.error is None:
            self.error = error
        self.parser.stopped = True
        self.eof = True
        self.fd = -1
        if self.transport is not None:
            self.transport.abort()
        return self.wake_reader()

    cdef size_t unsent(self):
        if self.lost or self.transport is None:
            return 0
        return self.writer.pending() + <size_t>self.transport.get_write_buffer_size()

    cdef int wrote(self) except -1:
        """Something was added to the writer: it leaves at the end of the read callback or of this turn of the loop."""
        if self.paused:
            return 0
        if self.writer.pending() >= self.flush_at:
            self.flush()
            if self.in_dispatch:
                self.flush_at = min(self.flush_at * 4, LAST_EARLY_FLUSH)
        elif not self.in_dispatch and not self.flush_scheduled:
            self.flush_scheduled = True
            self.port.loop.call_soon(self.flush_soon)
        return 0

    def flush_soon(self):
        self.flush_scheduled = False
        self.flush()

    cdef int flush(self) except -1:
        cdef dw_chunk chunks[CHUNKS]
        cdef ssize_t written
        cdef size_t total
        cdef int n, i
        if self.lost or self.transport is None:
            self.writer.clear()
            return 0
        if self.fd >= 0 and not self.closing and self.writer.pending() and not self.transport.get_write_buffer_size():
            while True:
                n = self.writer.gather(chunks, CHUNKS)
                if n == 0:
                    break
                total = 0
                for i in range(n):
                    total += chunks[i].len
                written = port_send(self.fd, chunks, n)
                if written < 0:
                    if errno == EINTR:
                        continue
                    if errno != EAGAIN:
                        code = errno
                        self.writer.clear()
                        return self.failed(OSError(code, "sending to the NATS server failed"))
                    written = 0
                self.writer.sent(written)
                if <size_t>written < total:
                    break
        while self.writer.pending() and not self.paused and not self.lost:
            self.transport.write(self.writer.piece())
        return 0


class _SocketProtocol(PortSocket, asyncio.BufferedProtocol):
    """Loops look for a subclass of asyncio's own class; the methods are those of the compiled one."""


cdef class PortBase(MessagePort):
    """What both ports share."""

    def __init__(self, client, loop):
        self.client = client
        self.loop = loop
        self.sinks = {}
        self.state = PORT_DOWN
        self.max_payload = 1048576  # the server's default, until it says

    def tell(self, int state, error):
        """Every sink learns the state. Called from the loop."""
        cdef MessageSink sink
        for sink in list(dict.fromkeys(self.sinks.values())):
            try:
                sink.on_state(state, error)
            except Exception as failure:
                self.loop.call_exception_handler({
                    "message": f"{type(sink).__name__} raised when it was told of the connection's state", "exception": failure,
                })  # fmt: skip

    def tell_writable(self):
        cdef MessageSink sink
        self.writable_scheduled = False
        if self.congested or self.state != PORT_UP:
            return
        for sink in list(dict.fromkeys(self.sinks.values())):
            try:
                sink.on_writable()
            except Exception as failure:
                self.loop.call_exception_handler({
                    "message": f"{type(sink).__name__} raised when it was told that it may write", "exception": failure,
                })  # fmt: skip

    cdef int now_writable(self) except -1:
        self.congested = False
        if not self.writable_scheduled:
            self.writable_scheduled = True
            self.loop.call_soon(self.tell_writable)
        return 0

    cdef int go_down(self, object error) except -1:
        """The connection is gone: whoever looks sees it at once, sinks are told from the loop."""
        if self.state != PORT_UP:
            return 0
        self.state = PORT_DOWN
        self.error = error
        self.congested = False
        self.loop.call_soon(self.tell, PORT_DOWN, error)
        return 0

    def close_for_good(self, error=None):
        """No connection will come any more."""
        if self.state != PORT_CLOSED:
            self.state = PORT_CLOSED
            self.error = error
            self.congested = False
            if not self.loop.is_closed():
                self.loop.call_soon(self.tell, PORT_CLOSED, error)

    def go_away(self):
        """nats-py says that the connection is lost."""
        self.go_down(self.error)

    def refused(self, error):
        """The server refused something that was done over this port, and keeps the connection."""
        self.loop.call_soon(self.tell, self.state, error)

    cdef int refuse(self, size_t size) except -1:
        if self.state == PORT_CLOSED:
            raise ManagerClosed("the connection to the NATS server is closed")
        if self.state != PORT_UP:
            raise PeerLost("there is no connection to the NATS server at the moment", sent="no", phase="send")
        raise MessageTooLarge(
            f"a message of {size} bytes (headers and payload) exceeds the {self.max_payload} bytes that the NATS server takes",
            size=size, limit=self.max_payload, setting="max_payload of the NATS server",
        )  # fmt: skip

    def send(self, bytes subject not None, data=b"", reply=None, headers=None):
        """`publish` for Python code and tests; ``headers`` is the whole block."""
        cdef bytes block = headers
        cdef const unsigned char[::1] view = data
        self.publish(
            subject, reply, NULL if block is None else <const unsigned char *>PyBytes_AS_STRING(block),
            0 if block is None else PyBytes_GET_SIZE(block), &view[0] if view.shape[0] else NULL, view.shape[0], data,
        )  # fmt: skip

    def flush_now(self):
        """`flush` for Python code and tests."""
        self.flush()

    @property
    def unsent(self):
        """`backlog` for Python code and tests."""
        return self.backlog()


cdef class FastPort(PortBase):
    """Takes the place of nats-py's transport and parser: ``client._transport = client._ps = port`` before it connects."""

    def __init__(self, client, loop):
        super().__init__(client, loop)
        self.fast = True

    # --- the port

    cdef int publish(self, bytes subject, bytes reply, const unsigned char *headers, size_t headers_n,
                     const unsigned char *payload, size_t n, object owner) except -1:
        cdef PortSocket socket = self.socket
        if self.state != PORT_UP or <int64_t>(headers_n + n) > self.max_payload:
            self.refuse(headers_n + n)
        socket.writer.publish(subject, reply, headers, headers_n, payload, n, owner)
        self.messages_out += 1
        return socket.wrote()

    cdef int flush(self) except -1:
        if self.socket is not None and not self.socket.paused:
            self.socket.flush()
        return 0

    cdef size_t backlog(self):
        return 0 if self.socket is None else self.socket.unsent()

    def up(self):
        """nats-py has connected, and told the server of its subscriptions. False if the connection is gone again."""
        cdef PortSocket socket = self.socket
        if socket is None or socket.eof or socket.closing or self.state == PORT_CLOSED:
            return False
        self.max_payload = self.client.max_payload
        socket.parser.max_payload = self.max_payload
        self.congested = socket.paused
        self.error = None
        self.state = PORT_UP
        self.loop.call_soon(self.tell, PORT_UP, None)
        return True

    async def subscribe(self, str subject, MessageSink sink not None, str queue=""):
        """Deliver the messages of ``subject`` to ``sink``. Returns a `PortSubscription`."""
        # nats-py numbers subscriptions before it first waits; the sink has to be known before the first message can come
        cdef uint64_t sid = self.client._sid + 1
        self.sinks[sid] = sink
        try:
            subscription = await self.client.subscribe(subject, queue=queue)
            if subscription._id != sid:
                raise RuntimeError(f"nats-py numbered a subscription {subscription._id}, expected was {sid}")
        except BaseException:
            self.sinks.pop(sid, None)
            raise
        return PortSubscription(self, sid, subscription)

    def stop(self, uint64_t sid, subscription):
        """End a subscription at the server."""
        cdef PortSocket socket = self.socket
        cdef bytes line
        if self.client._subs.pop(sid, None) is not None:
            subscription._closed = True
            subscription._stop_processing()
            if socket is not None and not socket.lost and not socket.handshake:
                line = b"UNSUB %d\r\n" % sid
                socket.writer.raw(<const unsigned char *>PyBytes_AS_STRING(line), PyBytes_GET_SIZE(line), None)
                socket.wrote()

    def drop(self, uint64_t sid, subscription):
        """End a subscription; effective at once."""
        self.sinks.pop(sid, None)
        if self.socket is not None:
            self.socket.parser.forget_sink(sid)
        self.stop(sid, subscription)

    def abort(self):
        """Give the present connection up without a word; nats-py reconnects, unless it is closing."""
        if self.socket is not None and not self.socket.lost:
            self.socket.failed(ConnectionAbortedError("given up"))

    async def settle(self):
        """Let a PING that follows be behind all that was told to nats-py: it writes PING at once, and the rest in a task."""
        cdef PortSocket socket = self.socket
        client = self.client
        if client._pending_data_size > 0 and client.is_connected and socket is not None and not socket.handshake:
            pending, client._pending = client._pending, []
            client._pending_data_size = 0
            self.writelines(pending)

    async def finished(self):
        """Wait until nothing of it is on the loop any more."""
        if self.socket is not None:
            await self.wait_closed()

    # --- nats-py's transport

    def __bool__(self):
        return True

    async def connect(self, uri, buffer_size, connect_timeout):
        self.want_tls = uri.scheme == "tls"
        self.abort()  # nats-py leaves it open when an attempt to reconnect has failed
        self.socket = None
        socket = _SocketProtocol(self)
        async with asyncio.timeout(connect_timeout):
            await self.loop.create_connection(lambda: socket, uri.hostname, uri.port)
        self.socket = socket

    async def connect_tls(self, uri, ssl_context, buffer_size, connect_timeout):
        cdef PortSocket socket = self.socket
        if socket.parser.end != socket.parser.start:
            # whoever can add bytes before the handshake could speak in the server's name
            raise ConnectionError("the NATS server sent more than its INFO line before the TLS handshake")
        async with asyncio.timeout(connect_timeout):
            transport = await self.loop.start_tls(
                socket.transport, socket, ssl_context, server_hostname=uri if isinstance(uri, str) else uri.hostname,
                ssl_handshake_timeout=connect_timeout,
            )  # fmt: skip
        socket.attach(transport, True)

    def write(self, payload):
        cdef PortSocket socket = self.socket
        cdef bytes data
        if socket is None or socket.lost or socket.closing:
            return
        if socket.handshake and self.want_tls and not socket.tls:
            # nats-py 2.16 would send the credentials in the clear
            raise ConnectionError("the URL asks for TLS (tls://), but the NATS server does not offer it")
        data = payload if type(payload) is bytes else bytes(payload)
        socket.writer.raw(<const unsigned char *>PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), data)
        socket.wrote()

    def writelines(self, payload):
        for data in payload:
            self.write(data)

    async def drain(self):
        cdef PortSocket socket = self.socket
        if socket is None:
            return
        if not socket.paused:
            socket.flush()
        if socket.paused and not socket.lost and not self.client.is_closed:  # closing is bounded by wait_closed()
            future = self.loop.create_future()
            socket.drainers.append(future)
            await future
        if socket.lost and not socket.closing:
            raise ConnectionResetError("the connection to the NATS server is lost")

    async def readline(self):
        cdef PortSocket socket = self.socket
        while True:
            try:
                line = socket.parser.line()
            except ProtocolError as error:
                raise ConnectionError(str(error)) from error  # what nats-py takes for a failed attempt
            if line is not None:
                return line
            if socket.eof:
                if isinstance(socket.error, OSError):
                    raise socket.error
                return b""
            future = socket.reader = self.loop.create_future()
            await future

    async def read(self, buffer_size):
        """Wait for something to `parse`."""
        cdef PortSocket socket = self.socket
        if socket.handshake:
            self.loop.call_soon(socket.begin)  # sinks are called from the loop, not from nats-py's task
        while not socket.parser.others and not socket.eof:
            future = socket.reader = self.loop.create_future()
            await future
        if socket.parser.others:
            return b"+"
        error = socket.error
        if isinstance(error, OSError):
            raise error
        if error is not None:
            from nats.errors import ProtocolError as NatsProtocolError

            logger.warning("the connection to the NATS server is given up: %s", error)
            raise NatsProtocolError from error
        return b""

    def at_eof(self):
        return self.socket is None or self.socket.eof and not self.socket.parser.others and self.socket.error is None

    def close(self):
        cdef PortSocket socket = self.socket
        if socket is None or socket.closing:
            return
        if not socket.lost:
            if not socket.paused:
                socket.flush()
            socket.closing = True
            socket.parser.stopped = True
            socket.eof = True
            while socket.writer.pending() and not socket.lost:  # the transport keeps what the socket does not take
                socket.transport.write(socket.writer.piece())
            socket.transport.close()
            socket.wake_reader()
        self.go_down(socket.error)

    async def wait_closed(self):
        cdef PortSocket socket = self.socket
        if socket is None:
            return
        if not socket.lost:
            await asyncio.wait([socket.gone], timeout=CLOSE_GRACE_S)
        if not socket.lost:
            socket.transport.abort()
            await socket.gone

    # --- nats-py's parser

    def reset(self):
        """A new connection has a parser of its own."""

    async def parse(self, data=b""):
        """Hand nats-py what came for it, in order."""
        cdef PortSocket socket = self.socket
        if socket is None or not socket.parser.others:
            return
        client = self.client
        while socket.parser.others:
            for operation in socket.parser.take_others():
                if socket is not self.socket or client.is_closed:
                    return
                kind = operation[0]
                if kind == OP_MSG:
                    await self.give(*operation[1:])
                elif kind == OP_PING:
                    await client._process_ping()
                elif kind == OP_PONG:
                    if client._pongs and client._pongs[0].done():
                        # its flush() has timed out; nats-py 2.16 would trip over it and stop reading
                        client._pongs.pop(0)
                        client._pongs_received += 1
                        client._pings_outstanding = 0
                    else:
                        await client._process_pong()
                elif kind == OP_INFO:
                    await self.informed(operation[1])
                else:
                    await self.server_error(operation[1])
        if socket.reading_paused and not socket.lost and not socket.closing:
            socket.reading_paused = False
            socket.transport.resume_reading()

    async def give(self, sid, subject, reply, payload, headers):
        """A message of a subscription of nats-py's own. What it would stop reading for is dropped here, with a log line."""
        try:
            subject.decode()
            reply.decode()
        except UnicodeDecodeError:
            logger.warning("a message with a subject that is not UTF-8 is dropped: %r", subject)
            return
        if headers is not None and (len(headers) < 12 or not headers.startswith(b"NATS/1.0")):
            logger.warning("headers that are none are dropped from a message on %r", subject)
            headers = None
        await self.client._process_msg(sid, subject, reply, payload, headers)

    async def informed(self, text):
        from nats.errors import ProtocolError as NatsProtocolError

        try:
            info = json.loads(text)
        except ValueError as error:
            raise NatsProtocolError from error
        if not isinstance(info, dict):
            raise NatsProtocolError
        announced = info.get("max_payload")
        if isinstance(announced, int) and announced > 0:  # changed while the server runs
            self.client._max_payload = self.max_payload = announced
            self.socket.parser.max_payload = announced
        await self.client._process_info(info)

    async def server_error(self, text):
        """-ERR."""
        words = text.decode(errors="replace").strip("'")
        denied = DENIED.search(words)
        if denied is not None and self.on_denied is not None:
            self.on_denied(denied[1].lower(), denied[2])
        elif not self.client.is_reconnecting:
            await self.client._process_err(words.lower())


cdef dict headers_dict(const unsigned char *headers, size_t n):
    """What nats-py wants headers as. Of a name that stands there twice the last one stays: nats-py knows one value per name."""
    cdef dict out = {}
    cdef const unsigned char *value_
    cdef size_t value_n
    if n > 17 and memcmp(headers, b"NATS/1.0\r\nD: ", 13) == 0:
        value_ = headers + 13
        value_n = n - 17
        if memchr(value_, c"\r", value_n) is NULL and memcmp(value_ + value_n, b"\r\n\r\n", 4) == 0:
            return {"D": value_[:value_n].decode("utf-8", "replace")}  # the usual message of a stream
    for line in headers[:n].split(b"\r\n")[1:]:
        name, colon, value = line.partition(b":")
        if colon:
            out[name.strip().decode("ascii", "replace")] = value.strip().decode("utf-8", "replace")
    return out


cdef bytes headers_block(object headers):
    """The block that nats-py has taken apart, as near as it can be known."""
    if len(headers) == 1 and (value := headers.get("D")) is not None:
        return f"NATS/1.0\r\nD: {value}\r\n\r\n".encode("utf-8", "replace")
    status = headers.get("Status")
    # nats-py 2.16 takes the first header for the description where there is none: it then begins with a line feed
    description = (headers.get("Description") or "").partition("\n")[0].strip()
    first = "NATS/1.0"
    if status is not None:
        first += f" {status}"
        if description:
            first += f" {description}"
    lines = [first]
    lines += [f"{name}: {value}" for name, value in headers.items() if name not in ("Status", "Description")]
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "replace")


cdef double WATCH_S = 1.0


cdef class PlainPort(PortBase):
    """The same over nats-py's public API: for versions of it and for WebSockets, whose inside the fast port does not know.

    nats-py publishes in coroutines only, so what is published waits in a queue for one task. Its limits on what a subscription
    may hold are off, because it drops what exceeds them: the credit that sinks give bounds what arrives.
    """

    def __init__(self, client, loop):
        super().__init__(client, loop)
        self.fast = False
        self.queue = collections.deque()
        self.arrived = []

    cdef int publish(self, bytes subject, bytes reply, const unsigned char *headers, size_t headers_n,
                     const unsigned char *payload, size_t n, object owner) except -1:
        if self.state != PORT_UP or <int64_t>(headers_n + n) > self.max_payload:
            self.refuse(headers_n + n)
        check_subject(subject)
        if reply is not None:
            check_subject(reply)
        self.queue.append((
            subject.decode(), PyBytes_FromStringAndSize(<const char *>payload, n), "" if reply is None else reply.decode(),
            None if headers is NULL else headers_dict(headers, headers_n),
        ))  # fmt: skip
        self.queued_bytes += n + QUEUE_OVERHEAD
        self.messages_out += 1
        if self.queued_bytes > CONGESTED_BYTES:
            self.congested = True
        return self.wake_pump()

    cdef size_t backlog(self):
        return self.queued_bytes + <size_t>self.client.pending_data_size

    cdef int wake_pump(self) except -1:
        work, self.work = self.work, None
        if work is not None and not work.done():
            work.set_result(None)
        return 0

    async def pump(self):
        """Hands nats-py what was published, in order. nats-py makes it wait while the server does not read."""
        from nats.errors import Error

        while True:
            while self.queue:
                item = self.queue.popleft()
                self.busy = True
                try:
                    if type(item) is tuple:
                        self.queued_bytes -= len(item[1]) + QUEUE_OVERHEAD
                        await self.client.publish(*item)
                    else:
                        await item.unsubscribe()
                except Error as error:  # it lost its connection in the meantime, or the subscription has ended with it
                    logger.debug("nats-py did not take something: %r", error)
                if self.congested and self.queued_bytes < WRITABLE_BYTES:
                    self.now_writable()
            self.busy = False
            self.work = self.loop.create_future()
            await self.work

    def up(self):
        """nats-py has connected. False if the connection is gone again."""
        if self.state == PORT_CLOSED or not self.client.is_connected:
            return False
        self.max_payload = self.client.max_payload
        self.error = None
        self.state = PORT_UP
        if self.pump_task is None:
            self.pump_task = self.loop.create_task(self.pump(), name="dynwire-nats-port")
            self.watch()
        self.loop.call_soon(self.tell, PORT_UP, None)
        return True

    def go_away(self):
        """nats-py says that the connection is lost: what it was not given is not sent later, when nobody waits for it."""
        subscriptions = [item for item in self.queue if type(item) is not tuple]
        self.queue.clear()
        self.queue.extend(subscriptions)
        self.queued_bytes = 0
        self.go_down(None)

    def watch(self):
        """nats-py 2.16 waits for a frozen server to take what is unsent before it reconnects: end that."""
        reconnecting = self.state == PORT_UP and self.client.is_reconnecting
        if reconnecting and self.was_reconnecting:
            self.abort()
        self.was_reconnecting = reconnecting
        self.watch_handle = None if self.state == PORT_CLOSED else self.loop.call_later(WATCH_S, self.watch)

    async def subscribe(self, str subject, MessageSink sink not None, str queue=""):
        """Deliver the messages of ``subject`` to ``sink``. Returns a `PortSubscription`."""
        number = self.next_id
        self.next_id += 1
        self.sinks[number] = sink
        try:
            subscription = await self.client.subscribe(
                subject, queue=queue, cb=taker(self, number), pending_msgs_limit=0, pending_bytes_limit=0
            )
        except BaseException:
            self.sinks.pop(number, None)
            raise
        return PortSubscription(self, number, subscription)

    def take(self, number, message):
        """A message has come. Called from a task of nats-py's; sinks are called from the loop."""
        if not self.arrived:
            self.loop.call_soon(self.deliver)
        self.arrived.append((number, message))

    def deliver(self):
        """Hand what has arrived to the sinks."""
        cdef MessageSink sink
        cdef bytes subject, reply, payload, headers
        arrived, self.arrived = self.arrived, []
        cdef list batch = []
        for number, message in arrived:
            sink = self.sinks.get(number)
            if sink is None:
                continue
            subject = message.subject.encode()
            reply = message.reply.encode()
            payload = message.data
            headers = None if message.headers is None else headers_block(message.headers)
            try:
                if not any([other is sink for other in batch]):
                    batch.append(sink)
                    sink.on_batch(True)
                sink.on_message(
                    <const unsigned char *>PyBytes_AS_STRING(subject), PyBytes_GET_SIZE(subject),
                    <const unsigned char *>PyBytes_AS_STRING(reply), PyBytes_GET_SIZE(reply),
                    NULL if headers is None else <const unsigned char *>PyBytes_AS_STRING(headers),
                    0 if headers is None else PyBytes_GET_SIZE(headers),
                    <const unsigned char *>PyBytes_AS_STRING(payload), PyBytes_GET_SIZE(payload), None,
                )  # fmt: skip
            except Exception as error:
                report_sink(self.loop, sink, error)
        for sink in batch:
            try:
                sink.on_batch(False)
            except Exception as error:
                report_sink(self.loop, sink, error)

    def stop(self, number, subscription):
        """nats-py forgets at once what has come and was not processed: this waits for `drop`."""

    def drop(self, number, subscription):
        """End a subscription; effective at once."""
        self.sinks.pop(number, None)
        if self.state != PORT_CLOSED:
            self.queue.append(subscription)
            self.wake_pump()

    def abort(self):
        """Give the present connection up; nats-py reconnects, unless it is closing. It has no public way for that."""
        writer = getattr(getattr(self.client, "_transport", None), "_io_writer", None)
        if writer is not None:
            writer.transport.abort()

    async def settle(self):
        """Wait until nats-py has everything and has written it: it writes PING at once, and the rest in a task."""
        turns = 0
        while self.client.is_connected and (self.queue or self.busy or self.client.pending_data_size):
            turns += 1
            await asyncio.sleep(0 if turns < 20 else 0.005)

    async def finished(self):
        """Wait until nothing of it is on the loop any more."""
        if self.watch_handle is not None:
            self.watch_handle.cancel()
        if self.pump_task is not None:
            self.pump_task.cancel()
            await asyncio.wait([self.pump_task])
        await asyncio.sleep(0)  # the transport's last callback


def taker(port, number):
    """A callback for nats-py, which wants a coroutine function."""

    async def take(message):
        port.take(number, message)

    return take


@cython.final
cdef class PortSubscription:
    """One subscription of a sink."""

    cdef object port
    cdef uint64_t sid
    cdef object subscription           # nats-py's

    def __init__(self, port, sid, subscription):
        self.port = port
        self.sid = sid
        self.subscription = subscription

    def stop(self):
        """Tell the server to send no more; what it has sent already is delivered until `unsubscribe`. (The plain port cannot.)"""
        if self.port is not None:
            self.port.stop(self.sid, self.subscription)

    def unsubscribe(self):
        """No message of it is delivered any more; a batch that has begun is still ended. May be called twice."""
        port, self.port = self.port, None
        if port is not None:
            port.drop(self.sid, self.subscription)
