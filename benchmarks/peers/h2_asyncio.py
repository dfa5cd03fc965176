"""A client by hand on h2 and an asyncio Protocol: futures by stream id, what one turn of the loop makes leaves in one write."""

import asyncio

import common
import h2.config
import h2.connection
import h2.events
import h2.settings


class Connection(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport
        self.loop = asyncio.get_running_loop()
        self.pending = {}  # stream id: [future, status, parts]
        self.scheduled = False
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding=None))
        self.h2.local_settings.update({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 1 << 20})
        self.h2.initiate_connection()
        self.h2.increment_flow_control_window(1 << 24)
        self.flush()

    def flush(self):
        self.scheduled = False
        data = self.h2.data_to_send()
        if data:
            self.transport.write(data)

    def call(self, payload):
        connection = self.h2
        stream = connection.get_next_available_stream_id()
        connection.send_headers(stream, self.headers)
        connection.send_data(stream, payload, end_stream=True)  # smaller than any window here
        future = self.loop.create_future()
        self.pending[stream] = [future, b"", []]
        if not self.scheduled:
            self.scheduled = True
            self.loop.call_soon(self.flush)
        return future

    def data_received(self, data):
        for event in self.h2.receive_data(data):
            kind = type(event)
            if kind is h2.events.DataReceived:
                self.pending[event.stream_id][2].append(event.data)
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif kind is h2.events.StreamEnded:
                future, status, parts = self.pending.pop(event.stream_id)
                if status == b"200":
                    future.set_result(parts[0] if len(parts) == 1 else b"".join(parts))
                else:
                    future.set_exception(RuntimeError(f"status {status.decode()}"))
            elif kind is h2.events.ResponseReceived:
                self.pending[event.stream_id][1] = dict(event.headers)[b":status"]
            elif kind is h2.events.StreamReset:
                self.pending.pop(event.stream_id)[0].set_exception(ConnectionError(f"reset {event.error_code}"))
            elif kind is h2.events.ConnectionTerminated:
                self.connection_lost(ConnectionError(f"GOAWAY {event.error_code}"))
        self.flush()

    def connection_lost(self, exc):
        for future, _, _ in self.pending.values():
            if not future.done():
                future.set_exception(exc or ConnectionError("closed"))
        self.pending.clear()


class Client(common.AsyncClient):
    def __init__(self, connection):
        self.connection = connection

    def caller(self, kind):
        return self.connection.call

    async def close(self):
        self.connection.transport.close()


def client(setup):
    async def main():
        _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", setup["port"])
        connection.headers = [
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":authority", b"127.0.0.1:%d" % setup["port"]),
            (b":path", common.ECHO_PATH.encode()),
            (b"content-type", common.OCTETS.encode()),
        ]
        await common.async_client(setup, Client(connection))

    common.run_loop(setup, main())


if __name__ == "__main__":
    common.entry(None, client)
