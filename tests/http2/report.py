"""Writes docs/http2-conformance.md from the cases: ``python -m tests.http2.report``. A test checks that it is up to date."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import h2

from . import cases, deviations
from .peer import Case

FILE = Path(__file__).parents[2] / "docs" / "http2-conformance.md"

HEAD = """\
# HTTP/2 conformance

Written by `python -m tests.http2.report`; do not edit. Every line is a test: `tests/http2/test_conformance.py`.

Each case talks to one connection in raw frames, as an outside conformance suite does, and looks at what comes back: the code of
RST_STREAM or GOAWAY where the RFC lays one down, one of several where it leaves a choice. Sections `generic`, `http2`, `hpack`
and `client` have the structure, numbering and at least the number of cases of h2spec (sections of RFC 7540, some of which RFC
9113 has dropped; the second column names today's). `rfc9113` and `rfc7541` go beyond it. Cases marked `s` can be seen from
outside and are run over TCP as well (`tests/http2/over_socket.py`).

`native` is dynwire's own engine; `h2` is the same interface over the library h2 {version}, which is `engine="h2"`.

"""

OUTSIDE_SERVER = """
## h2spec

h2spec is a client that breaks one rule per case. `tests/interop/test_h2spec.py` runs it where it is on `PATH`, against a worker
of ours over h2c and over TLS, with the path of a page (`GET` is answered at once) and with that of an endpoint (`POST` is
answered when the body has come).

| | |
|---|---|
| version | summerwind/h2spec, files of commits 5fed2f6, b3a1814, d5dae34, 9c3f5c7, 480c4b6 and others (below) |
| built with | Go 1.19, golang.org/x/net 0.7.0 |
| date | 2026-11-24 |
| command | `h2spec --strict --verbose --host 127.0.0.1 --port N --path PATH`, over TLS with `--tls --insecure` |
| `PATH` | `/live`, and `/v1/rpc/f/w/echo` |
| cases | 147, native engine: 44 of `generic`, 95 of `http2`, 8 of `hpack` |
| result | 147 passed with each path, over h2c and over TLS |
| for information | `engine="h2"`: 147 passed, ten only because the connection was closed; the code was wrong, (1) and (8) above |
| the same build | against nghttpd 1.52.0: 146 passed, not `http2/5.1.1/2` |

No release could be had. Of every file it is the newest version that could be found, copied by hand without comments, with the
passages that cases share written from templates, and without the option `--ciphers`. So it is the logic of h2spec's cases, not a
binary of its authors; run theirs where you have it.

h2spec is content with a closed connection wherever it wants an error code. The test is not: except in the two cases below, h2spec
has to see the code that it asks for.

- `http2/3.5/2` sends something else than the preface. It is no HTTP/1.1 either, so the connection is closed without GOAWAY, which
  RFC 9113 section 3.4 allows.
- `http2/5.4.1/1` asks for the end of the connection.

One setting is not the default in the test: `DYN_HTTP2_MAX_FRAME_SIZE=16384`. `http2/4.2/3` sends HEADERS of 17 KB and wants
FRAME_SIZE_ERROR without looking at our SETTINGS, which allow 2^20 bytes by default; RFC 9113 section 4.2 makes it an error only
beyond the size that was announced. The cases on priorities (`generic/3.3`, `http2/5.3.1`, `http2/6.3`) test rules of RFC 7540
that RFC 9113 section 5.3 deprecates; we still keep them.

What it found, all fixed:

- `http2/8.1/1`, `8.1.2.1/3`, `8.1.2.6/1` and `/2` with the path of a page, `http2/5.1/8`, `5.1/9`, `6.9/2` and `6.9.1/3` with
  that of an endpoint: where a request was answered before its end, the stream was reset at once with NO_ERROR, and faults in the
  rest of the request went unnoticed. RFC 9113 section 8.1 allows the reset; now the rest may end by itself and is checked, up to
  64 KiB of it and eight such requests on a connection.
- `http2/5.4.1/1`, in one of 24 runs on a busy machine: the server closed its socket with bytes unread. That is a reset, which
  h2spec takes for an error and not for the end. What still comes is read and dropped now before the socket is closed.
"""

OUTSIDE_CLIENT = """
## h2specd

h2specd is the part of h2spec for clients: a server that breaks one rule per case. `tests/interop/test_h2specd.py` runs it where
it is on `PATH`, against the async client on asyncio's loop and on uvloop and against the blocking client, over h2c and over TLS.

| | |
|---|---|
| version | summerwind/h2spec, `client/` of commits c989746, 9998f88 and 14401b2; copied by hand, without comments |
| built with | Go 1.19, golang.org/x/net 0.7.0, and a `main` of our own that adds a report in JSON and nothing to the cases |
| date | 2026-11-24 |
| command | `h2specd --strict --verbose --from-port N --exec COMMAND` (`--strict` adds no case for clients) |
| cases | 57, native engine |
| result | 57 passed with each of the three clients, over h2c and over TLS |
| for information | `engine="h2"`, async client, h2c: 56 passed; not `client/5.1/8`, for the reason (9) above |

h2specd is content with a closed connection wherever it wants an error code. The test is not: except in the two cases below,
h2specd has to see the code that it asks for.

- `client/5.4.1/1` asks for the end of the connection.
- `client/4.3/1` writes the stream's number in the wrong byte order. HEADERS on stream 2^24 is PROTOCOL_ERROR (RFC 9113 section
  5.1.1) before its block is looked into. With the order put right the client answers COMPRESSION_ERROR, as asked.

Two settings are not the defaults in the test:

- `DYN_HTTP2_MAX_FRAME_SIZE=16384`: `client/4.2/2` and `/3` send a frame of 2^14 bytes and a few more without looking at the
  client's SETTINGS, which allow 2^20 by default.
- `DYN_HTTP2_ADAPTIVE_WINDOW=false`: `client/4.2/1` takes the first PING for the answer to its own. The adaptive window measures
  the path with PING frames of the client, which RFC 9113 section 6.7 allows at any time.

What it found, all fixed:

- `client/6.5/2`: a server that begins with SETTINGS on a stream got no GOAWAY, and the caller was told that it was on another
  plane.
- `client/6.5/1`: an acknowledgement with a payload as the first frame was answered with PROTOCOL_ERROR, not FRAME_SIZE_ERROR.
- `client/5.4.1/1`, rarely: the async client closed its socket with bytes unread. That is a reset without FIN, which h2specd takes
  for an error and not for the end, and which can overtake the GOAWAY before it. With `close()` made 10 ms late it failed in 3 of
  60 runs, and in none of 60 since.
"""


def outcome(case: Case, role: str, engine: str) -> bool:
    try:
        cases.run(case, role, engine)
    except AssertionError:
        return False
    return True


def render() -> str:
    return HEAD.format(version=h2.__version__) + "".join(f"{line}\n" for line in lines()) + OUTSIDE_SERVER + OUTSIDE_CLIENT


def lines() -> Iterator[str]:
    reasons = {reason: number for number, reason in enumerate(deviations.BY_REASON, 1)}
    results = {
        (role, case.id, engine): outcome(case, role, engine)
        for role, collection in cases.ROLES.items()
        for case in collection
        for engine in ("native", "h2")
    }
    passed = Counter((role, engine) for (role, _, engine), good in results.items() if good)
    yield "| role | cases | native | h2 |"
    yield "|---|---|---|---|"
    for role, collection in cases.ROLES.items():
        yield f"| {role} | {len(collection)} | {passed[role, 'native']} | {passed[role, 'h2']} |"
    yield ""
    yield f"Where h2 {h2.__version__} does something else, it"
    yield ""
    for reason, number in reasons.items():
        yield f"{number}. {reason};" if number < len(reasons) else f"{number}. {reason}."
    for role, collection in cases.ROLES.items():
        yield ""
        yield f"## {role.capitalize()}"
        yield ""
        yield "| case | section | requirement | | native | h2 |"
        yield "|---|---|---|---|---|---|"
        for case in collection:
            native = "pass" if results[role, case.id, "native"] else "**fail**"
            library = "pass" if results[role, case.id, "h2"] else f"no ({reasons.get(deviations.H2.get(case.id, ''), '?')})"
            requirement = case.requirement.replace("|", "\\|")
            over_tcp = "s" if role == "server" and case.socket else ""
            yield f"| {case.id} | {case.rfc} | {requirement} | {over_tcp} | {native} | {library} |"


if __name__ == "__main__":
    text = render()
    FILE.write_text(text)
    print(f"{FILE}: {text.count('| pass |')} lines", file=sys.stderr)
