"""grpcio, blocking: one channel shared by all threads, a server with 32 threads, generic handlers on raw bytes."""

from concurrent.futures import ThreadPoolExecutor

import common
import grpc
from common import DONE

OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1), ("grpc.so_reuseport", 0)]


def bulk(request, context):
    items, size = common.parse_stream_request(request)
    item = b"x" * size
    for _ in range(items):
        yield item


def server(setup):
    methods = {
        "echo": grpc.unary_unary_rpc_method_handler(lambda request, context: request),
        "sink": grpc.unary_unary_rpc_method_handler(lambda request, context: DONE),
        "bulk": grpc.unary_stream_rpc_method_handler(bulk),
    }
    serving = grpc.server(ThreadPoolExecutor(32), options=OPTIONS)
    serving.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", methods),))
    port = serving.add_insecure_port("127.0.0.1:0")
    serving.start()
    common.serve_in_thread(serving.wait_for_termination, port)


class Client(common.SyncClient):
    def __init__(self, port):
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS)
        self.calls = {k: self.channel.unary_unary(f"/bench/{k}") for k in ("echo", "sink")}
        self.bulk = self.channel.unary_stream("/bench/bulk")

    def caller(self, thread, kind):
        return self.calls[kind]

    def consume(self, kind, payload):
        return sum(1 for _ in self.bulk(payload))

    def close(self):
        self.channel.close()


def client(setup):
    common.sync_client(setup, Client(setup["port"]))


if __name__ == "__main__":
    common.entry(server, client)
