"""pyzmq, blocking. ``pattern`` rep: REQ/REP; router: a DEALER per thread, one ROUTER loop, a correlation id in its own frame.

Messages of 64 KiB and more go with ``copy=False``.
"""

import struct

import common
import zmq
from common import DONE

ID = struct.Struct("<I")
LARGE = 65536


def server(setup):
    pattern, large = setup["options"].get("pattern", "rep"), setup["options"].get("large", False)
    socket = zmq.Context.instance().socket(zmq.REP if pattern == "rep" else zmq.ROUTER)
    socket.set_hwm(0)
    port = socket.bind_to_random_port("tcp://127.0.0.1")

    def serve_rep():
        if large:
            while True:
                kind, payload = socket.recv_multipart(copy=False)
                if kind.bytes == b"s":
                    socket.send(DONE)
                else:
                    socket.send(payload, copy=False)
                del payload
        recv, send = socket.recv, socket.send
        while True:
            send(recv())

    def serve_router():
        recv, send = socket.recv_multipart, socket.send_multipart
        while True:
            send(recv())

    common.serve_in_thread(serve_rep if pattern == "rep" else serve_router, port)


class Client(common.SyncClient):
    def __init__(self, setup):
        self.pattern, self.large = setup["options"].get("pattern", "rep"), setup["options"].get("large", False)
        self.address = f"tcp://127.0.0.1:{setup['port']}"
        self.context = zmq.Context.instance()
        self.sockets = {}

    def socket(self, thread):
        if thread not in self.sockets:
            self.sockets[thread] = self.context.socket(zmq.REQ if self.pattern == "rep" else zmq.DEALER)
            self.sockets[thread].set_hwm(0)
            self.sockets[thread].connect(self.address)
        return self.sockets[thread]

    def caller(self, thread, kind):
        socket = self.socket(thread)
        if self.pattern == "rep":
            if self.large:
                code = b"s" if kind == "sink" else b"e"

                def call(payload):
                    socket.send_multipart((code, payload), copy=False)
                    return socket.recv(copy=False).buffer

            else:
                send, recv = socket.send, socket.recv

                def call(payload):
                    send(payload)
                    return recv()

            return call

        send, recv, next_id = socket.send_multipart, socket.recv_multipart, 0

        def call_dealer(payload):
            nonlocal next_id
            next_id = (next_id + 1) & 0xFFFFFFFF
            head = ID.pack(next_id)
            send((head, payload))
            reply_head, reply = recv()
            if reply_head != head:
                raise RuntimeError("reply to another call")
            return reply

        return call_dealer

    def pipeline(self, payload, in_flight, count, latencies):
        socket, born, now = self.socket(0), {}, common.now_ns
        send, recv = socket.send_multipart, socket.recv_multipart
        for sent in range(min(in_flight, count)):
            head = ID.pack(sent)
            born[head] = now()
            send((head, payload))
        sent = min(in_flight, count)
        for _ in range(count):
            head, _ = recv()
            latencies.append(now() - born.pop(head))
            if sent < count:
                head = ID.pack(sent & 0xFFFFFFFF)
                born[head] = now()
                send((head, payload))
                sent += 1

    def close(self):
        self.context.destroy(linger=0)


def client(setup):
    common.sync_client(setup, Client(setup))


if __name__ == "__main__":
    common.entry(server, client)
