from typing_extensions import disjoint_base

@disjoint_base
class StreamBase: ...

@disjoint_base
class Link:
    ready: bool
    draining: bool
    dead: bool
    peer: str | None
    connection_id: bytes
    last_rx: float
    in_dispatch: bool
    congested: bool
    channel_buffer: int
    keepalive_interval: float
    keepalive_timeout: float
    keepalive_setting: str
    @property
    def is_client(self) -> bool: ...
    @property
    def max_message(self) -> int: ...
    @property
    def peer_max_message(self) -> int: ...
    @property
    def max_streams(self) -> int: ...
    @property
    def rx_bytes(self) -> int: ...
    @property
    def tx_frames_bytes(self) -> int: ...
    @property
    def live(self) -> int: ...
