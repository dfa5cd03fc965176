"""The test vectors in docs/wire.md, against the compiled codec and the plain one, in both directions."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dynwire._frames import FRAME_TYPES, LIMITS, EventConnection

from . import oracle as o
from . import script

DOCUMENT = (Path(__file__).parents[2] / "docs" / "wire.md").read_text()
MATCH = re.search(r"```text vectors\n(.*?)```", DOCUMENT, re.S)
assert MATCH, "docs/wire.md has no block of test vectors"
VECTORS = MATCH[1]


def rows() -> list[tuple[str, str, bytes, list[object]]]:
    """Name, sender, bytes, events, as the document has them."""
    found: list[tuple[str, str, bytes, list[object]]] = []
    for line in VECTORS.splitlines():
        word, _, rest = line.partition(" ")
        if word == "#":
            found.append((rest, "", b"", []))
        elif word == "event":
            found[-1][3].append(json.loads(rest))
        else:
            name, _, data, events = found[-1]
            found[-1] = (name, word, data + script.expand(rest.replace("|", " ")), events)
    return found


def test_the_table_is_what_the_codec_does() -> None:
    """Encoding (the sender's bytes) and decoding (the receiver's events) of a whole dialogue."""
    assert [(name, sender, data, events) for name, sender, data, events in script.play()] == rows()


@pytest.mark.parametrize("row", rows(), ids=[f"{i}-{name}" for i, (name, *_) in enumerate(rows())])
def test_oracle_reads_and_writes_the_same_bytes(row: tuple[str, str, bytes, list[object]]) -> None:
    data = row[2].removeprefix(o.PREFACE)
    assert o.encode(*o.parse(data)) == data


def test_oracle_makes_the_same_events() -> None:
    """The plain assembler on the documented bytes, HELLO and what causes no event apart."""
    assemblers = {"client": o.Assembler(), "server": o.Assembler()}
    for name, sender, data, events in rows():
        if data.startswith(o.PREFACE):
            continue
        found = [script.plain(event) for event in assemblers[sender].feed(o.parse(data))]
        assert found == [e for e in events if e[0] != "credit"], name  # type: ignore[index]


def test_every_frame_type_has_a_vector_and_a_section() -> None:
    seen = {frame.type for _, _, data, _ in rows() for frame in o.parse(data.removeprefix(o.PREFACE))}
    assert seen == set(FRAME_TYPES)
    for name in FRAME_TYPES.values():
        assert re.search(rf"^### {name}\b", DOCUMENT, re.M), f"docs/wire.md has no section on {name}"


def test_limits_table_names_the_codecs_numbers() -> None:
    table = dict(re.findall(r"^\| `(\w+)` \| ([\d,]+) \|", DOCUMENT, re.M))
    assert {name: int(value.replace(",", "")) for name, value in table.items()} == LIMITS


def test_oracle_builds_what_the_codec_builds() -> None:
    """The helpers that the other tests use, against the compiled encoder."""
    client, server = EventConnection(True), EventConnection(False)
    for conn in (client, server):
        conn.receive(o.PREFACE + o.encode(o.hello()))
    client.request("x.y", b"abc", kind=1, meta=b"m", timeout_ms=7)
    client.on_time(1.0)  # the small request is forgotten
    client.request("x.y", b"z" * 70000)
    payload = b"z" * 70000
    want = [
        o.request(0, b"abc", name=b"x.y", kind=1, meta=b"m", timeout_ms=7),
        o.request(1, announce=70000),
        *o.fragments(1, payload),
    ]
    out = client.output()
    assert out == o.encode(*want)
    server.receive(out)
    server.send_item(0, b"q", kind=2)
    server.send_item(1, payload, last=True)
    server.send_end(0)
    server.on_time(1.0)  # the small item is forgotten
    assert server.output() == o.encode(
        o.item(0, b"q", kind=2), o.item(1, last=True, announce=70000), o.Frame(o.END, stream=0), *o.fragments(1, payload)
    )
