#!/usr/bin/env python3
"""How fast is dynwire's nats plane beside nats-py used by hand, through the same nats-server, at the same minute?

One nats-server for all, which may use every core. A worker's process runs on the first core, its caller's on the second. A round
runs every contestant once, in turn; the next round starts with another one. Reported are medians over rounds with minimum and
maximum, and at the end the ratios that are promised (promises.py).

    python benchmarks/compare_nats.py --short                  every promised ratio, under 2 minutes
    python benchmarks/compare_nats.py                          more workloads and rounds
    python benchmarks/compare_nats.py --only 'c256' --check
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE / "peers")]

import common  # noqa: E402 - lies in peers/
import compare  # noqa: E402 - lies beside this script
from compare import KIB, Peer  # noqa: E402
from promises import NATS_PROMISES  # noqa: E402

from dynwire.errors import DynwireError  # noqa: E402 - of the tree that this script lies in
from dynwire.nats.server import NatsServer, binary_version  # noqa: E402


def _dynwire(about: str, port: str, **options: Any) -> Peer:
    return Peer("dynwire_peer.py", about, options, {"DYNWIRE_NATS_PORT": port})


PEERS: dict[str, Peer] = {
    "dynwire": _dynwire("dynwire on its nats plane, asyncio on both sides", "fast"),
    "dynwire-plain": _dynwire("the same through the public API of nats-py only (DYNWIRE_NATS_PORT=plain)", "plain"),
    "dynwire-sync": _dynwire("dynwire, blocking client with one manager, asyncio worker", "fast", face="sync"),
    "dynwire-plain-sync": _dynwire("the same through the public API of nats-py only", "plain", face="sync"),
    "nats-py": Peer("nats_py.py", "nats-py by hand: request, respond, and streams published to an inbox", needs="nats"),
}


@dataclasses.dataclass(frozen=True)
class NatsRow(compare.Row):
    @property
    def name(self) -> str:
        return f"{self.label}/{self.placement}"


def all_rows() -> list[NatsRow]:
    def row(
        level: int, label: str, contestants: str, workload: str, kind: str, concurrency: int, *, size: int = 64, items: int = 0,
        placement: str = "split",
    ) -> NatsRow:  # fmt: skip
        who = tuple(contestants.split())
        return NatsRow(workload, kind, size, concurrency, who, level, label, kind, placement, "uvloop", "default", items=items)

    everyone = "dynwire dynwire-plain nats-py"
    rows = []
    for placement, level in (("split", 0), ("free", 1), ("one", 1)):
        for concurrency in (1, 32, 256):
            rows.append(row(level, f"unary-64B-c{concurrency}", everyone, "unary", "echo", concurrency, placement=placement))
        for threads in (1, 8, 32):
            who = "dynwire dynwire-sync" + (" dynwire-plain dynwire-plain-sync" if level or threads != 8 else "")
            at = 0 if threads == 8 and level == 0 else 1
            rows.append(row(at, f"threads-64B-t{threads}", who, "threads", "echo", threads, placement=placement))
        rows.append(row(1, "unary-1KiB-c32", everyone, "unary", "echo", 32, size=KIB, placement=placement))
        for at_once in (1, 8):
            rows.append(
                row(level, f"stream-64B-x{at_once}", everyone, "stream", "bulk", at_once, items=1000, placement=placement)
            )
        rows.append(row(level, "tick-64B-x64", everyone, "stream", "tick", 64, items=100, placement=placement))
        rows.append(row(1, "stream-64B-sync", "dynwire dynwire-sync", "stream", "bulk", 1, items=1000, placement=placement))
        rows.append(row(1, "suspend-64B-c256", everyone, "unary", "suspend", 256, placement=placement))
    return rows


def select_rows(args: argparse.Namespace) -> list[NatsRow]:
    chosen = []
    for row in all_rows():
        if row.level > (0 if args.short else 1) or (args.only and not re.search(args.only, row.name)):
            continue
        contestants = tuple(c for c in row.contestants if compare.takes_part(c, args))
        if contestants:
            chosen.append(dataclasses.replace(row, contestants=contestants))
    return sorted(chosen, key=lambda row: ("split", "free", "one").index(row.placement))  # rows that share processes


class NatsPair(compare.Pair):
    bench: NatsBench

    def more_setup(self) -> dict[str, Any]:
        return {"nats": self.bench.server.url, "broker_pid": self.bench.server.pid}

    def workload(self, row: compare.Row) -> str:
        # threads beside as many tasks
        return "unary" if row.workload == "threads" else row.workload

    def cpu_s(self) -> float:
        return super().cpu_s() + common.process_cpu_s(self.bench.server.pid)


class NatsBench(compare.Bench):
    peers = PEERS

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.server = NatsServer()

    def rows(self) -> list[compare.Row]:
        return list(select_rows(self.args))

    def make_pair(self, peer_name: str, row: compare.Row) -> NatsPair:
        return NatsPair(peer_name, row, self)

    def prepare(self, rows: list[compare.Row]) -> list[compare.Row]:
        if importlib.util.find_spec("nats") is None:
            raise SystemExit("nats-py is not installed: pip install 'dynwire[nats]'")
        try:
            self.server.start()
        except DynwireError as error:
            raise SystemExit(f"no nats-server: {error}") from error
        return rows

    def close(self) -> None:
        super().close()
        self.server.stop()


def markdown(report: dict[str, Any], stem: str) -> str:
    remarks = [
        "Placement: split = worker on one core, caller on another; one = both on one core; free = not pinned. The nats-server",
        "may use every core in all of them, and its CPU stands beside theirs. Streams count items, and their latency is that of",
        "a whole stream. Others: share of the machine that other processes used meanwhile.",
    ]
    return compare.page(report, stem, "dynwire's nats plane beside nats-py", remarks, PEERS)


CHARTS = [
    ("64 B calls, 256 in flight", r"^unary-64B-c256/split", "rate", "calls/s"),
    ("64 B calls, 32 in flight", r"^unary-64B-c32/split", "rate", "calls/s"),
    ("64 B call, p50", r"^unary-64B-c1/split", "p50_us", "µs (less is better)"),
    ("64 B items, 8 streams", r"^stream-64B-x8/split", "rate", "items/s"),
    ("64 B item per tick, 64 streams", r"^tick-64B-x64/split", "rate", "items/s"),
    ("64 B, 8 blocking threads and 8 tasks", r"^threads-64B-t8/split", "rate", "calls/s"),
]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = compare.common_options(
        (__doc__ or "").split("\n\n")[0], "short 3, else 5", "short 0.4, else 1", "short 110, else 1200"
    )
    args = parser.parse_args(argv)
    return compare.complete(parser, args, "compare-nats", *((3, 0.4, 110.0) if args.short else (5, 1.0, 1200.0)))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.list:
        compare.list_rows(list(select_rows(args)))
        return 0
    env = compare.environment(("dynwire", "nats-py", "uvloop", "msgspec", "Cython"))
    try:
        env["versions"]["nats-server"] = binary_version()
    except DynwireError as error:
        raise SystemExit(f"no nats-server: {error}") from error
    return compare.execute(args, NatsBench(args), env, NATS_PROMISES, markdown, CHARTS)


if __name__ == "__main__":
    sys.exit(main())
