"""Drivers of the native wire over sockets: the asyncio side. Bytes move here; every protocol rule is in `dynwire._frames`.

A connection reads its socket in the loop's thread straight into the codec's memory (``add_reader`` and ``recv``), lets the
codec call back for everything that is complete, and writes what was queued in the meantime at the end of the callback. No
thread, no task and no Python object per frame. docs/performance.md has the measurements behind this shape.
"""

from ._frames cimport WireConnection as Machine

include "_driver_libc.pxi"
include "_driver_async.pxi"
include "_semaphore.pxi"
include "_driver_blocking.pxi"
