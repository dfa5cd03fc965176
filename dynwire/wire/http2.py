"""HTTP/2 without I/O. The state machine itself is compiled: `dynwire._http2`."""

from .._http2 import Http2Connection, Http2ConnectionError, error_name

__all__ = ["Http2Connection", "Http2ConnectionError", "error_name"]
