from typing_extensions import disjoint_base

from ._http2 import Http2Engine

@disjoint_base
class LibraryEngine(Http2Engine):
    next_id: int
