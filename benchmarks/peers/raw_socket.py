"""Blocking sockets in pure Python: length, id and kind; one connection and one server thread for each calling thread."""

import socket
import struct
import threading

import common
from common import DONE, KINDS, SINK

HEADER = struct.Struct("<IIB")  # payload length, id, kind
LARGE = 65536


class Reader:
    """Frames of one connection: small ones out of one recv, large ones straight into a bytearray of their own."""

    def __init__(self, connection):
        self.recv = connection.recv
        self.recv_into = connection.recv_into
        self.rest = b""

    def frame(self):
        """Returns (id, kind, payload)."""
        data = self.rest
        while len(data) < 9:
            more = self.recv(LARGE)
            if not more:
                raise EOFError
            data = data + more if data else more
        length, call_id, kind = HEADER.unpack_from(data)
        end = 9 + length
        if len(data) < end and length >= LARGE:
            payload = bytearray(length)
            view = memoryview(payload)
            got = len(data) - 9
            view[:got] = data[9:]
            while got < length:
                n = self.recv_into(view[got:])
                if not n:
                    raise EOFError
                got += n
            self.rest = b""
            return call_id, kind, payload
        while len(data) < end:
            more = self.recv(LARGE)
            if not more:
                raise EOFError
            data += more
        self.rest = data[end:]
        return call_id, kind, data[9:end]


def send_frame(connection, call_id, kind, payload):
    header = HEADER.pack(len(payload), call_id, kind)
    if len(payload) < LARGE:
        connection.sendall(header + payload)
    else:
        sent = connection.sendmsg([header, payload]) - 9
        if sent < len(payload):
            connection.sendall(memoryview(payload)[max(sent, 0) :])


class Client(common.SyncClient):
    def __init__(self, port):
        self.port = port
        self.connections = {}

    def caller(self, thread, kind):
        if thread not in self.connections:
            connection = socket.create_connection(("127.0.0.1", self.port))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connections[thread] = connection
        connection, code, next_id = self.connections[thread], KINDS[kind], 0
        read = Reader(connection).frame

        def call(payload):
            nonlocal next_id
            next_id = (next_id + 1) & 0xFFFFFFFF
            send_frame(connection, next_id, code, payload)
            call_id, _, reply = read()
            if call_id != next_id:
                raise RuntimeError("reply to another call")
            return reply

        return call


def serve_connection(connection):
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    read = Reader(connection).frame
    try:
        while True:
            call_id, kind, payload = read()
            send_frame(connection, call_id, kind, DONE if kind == SINK else payload)
    except (EOFError, ConnectionError):
        connection.close()


def server(setup):
    listening = socket.create_server(("127.0.0.1", 0))

    def accept():
        while True:
            connection, _ = listening.accept()
            threading.Thread(target=serve_connection, args=(connection,), daemon=True).start()

    common.serve_in_thread(accept, listening.getsockname()[1])


def client(setup):
    common.sync_client(setup, Client(setup["port"]))


if __name__ == "__main__":
    common.entry(server, client)
