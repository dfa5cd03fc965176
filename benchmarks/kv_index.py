#!/usr/bin/env python3
"""How fast is the index of the KV router beside the RadixTree of ai-dynamo-runtime, in one run?

64 workers, 10^6 blocks, stored by events of up to 1,000 blocks in the form that both read (JSON); then prompts of 1,000 blocks
are looked up. Rounds alternate between the two libraries, each in a process of its own; times are CPU times of that process,
medians over the rounds with minimum and maximum. The peer runs in an environment of its own (.venv-dynamo, made on first use): it
needs no part of this one, and 275 MB.

    python benchmarks/kv_index.py                    results to benchmarks/results/kv-index.json, and the table
    python benchmarks/kv_index.py --without-peer
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PEER = "ai-dynamo-runtime==1.6.1"
WORKERS, BLOCKS, PROMPT = 64, 1_000_000, 1_000
ROUTED_TOKENS, BLOCK_SIZE = 8192, 64


def events(rng: random.Random) -> tuple[list[tuple[int, bytes]], list[list[int]]]:
    """Encoded events with their workers, and the prompts that they store."""
    out, prompts = [], []
    for worker in range(WORKERS):
        left = BLOCKS // WORKERS
        while left:
            n = min(PROMPT, left)
            tokens = [rng.getrandbits(64) for _ in range(n)]
            blocks = [{"block_hash": rng.getrandbits(64), "tokens_hash": tokens_hash} for tokens_hash in tokens]
            data = {"stored": {"parent_hash": None, "blocks": blocks}}
            out.append((worker, json.dumps({"event_id": len(out) + 1, "data": data, "dp_rank": 0}).encode()))
            if n == PROMPT:
                prompts.append(tokens)
            left -= n
    return out, prompts


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(library: str) -> dict[str, float]:
    """One round in this process."""
    stored, prompts = events(random.Random(2))
    if library == "dynwire":
        from dynwire.kv_router import RadixTree
    else:
        from dynamo.llm import RadixTree
    random.Random(3).shuffle(prompts)
    tree = RadixTree()
    before = rss()
    count = sum(event.count(b"block_hash") for _, event in stored)
    started = time.process_time()
    for worker, event in stored:
        tree.apply_event(worker, event)
    tree.find_matches([1])  # the peer applies events in a thread of its own: this waits for it
    applied = time.process_time() - started
    out = {"apply_per_s": count / applied, "rss_per_block": (rss() - before) / count}
    started = time.process_time()
    for prompt in prompts:
        found = tree.find_matches(prompt)
        assert set(found.scores.values()) == {PROMPT}
    out["find_us"] = (time.process_time() - started) / len(prompts) * 1e6
    if library == "dynwire":
        from dynwire.kv_router import compute_block_hashes

        out["nbytes_per_block"] = tree.nbytes / tree.entries
        rng = random.Random(4)
        routed = [[rng.getrandbits(17) for _ in range(ROUTED_TOKENS)] for _ in range(50)]
        started = time.process_time()
        for tokens in routed:
            tree.find_matches(compute_block_hashes(tokens, BLOCK_SIZE))
        out["hash_and_find_8k_us"] = (time.process_time() - started) / len(routed) * 1e6
    return out


def peer_python() -> str:
    """An interpreter that has the peer; makes its environment if necessary."""
    place = ROOT / ".venv-dynamo"
    python = place / "bin" / "python"
    if not python.exists() or subprocess.run([python, "-c", "import dynamo.llm"], capture_output=True).returncode:
        print(f"making {place} for {PEER}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", PEER], check=True)
    return str(python)


def run(python: str, library: str) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([python, __file__, "--measure", library], env=environment, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without-peer", action="store_true")
    parser.add_argument("--measure", choices=("dynwire", "dynamo"), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "kv-index.json")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return 0
    pythons = {"dynwire": sys.executable}
    if not args.without_peer:
        pythons["dynamo"] = peer_python()
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in pythons}
    for number in range(args.rounds):
        order = list(pythons)
        for name in order[number % len(order) :] + order[: number % len(order)]:
            rounds[name].append(run(pythons[name], name))
    medians: dict[str, dict[str, Any]] = {}
    for name, results in rounds.items():
        medians[name] = {metric: statistics.median(r[metric] for r in results) for metric in results[0]}
        for metric, value in medians[name].items():
            values = [r[metric] for r in results]
            print(f"{name:8} {metric:20} {value:14,.1f}   ({min(values):,.1f} to {max(values):,.1f})")
    ours = medians["dynwire"]
    checks = [
        ("apply_event, blocks/s", ours["apply_per_s"], ">=", 1_000_000),
        ("find_matches of 1,000 blocks, us", ours["find_us"], "<=", 100),
        ("bytes per (block, worker)", ours["nbytes_per_block"], "<=", 120),
        ("hashes and matches of 8k tokens, us", ours["hash_and_find_8k_us"], "<=", 300),
    ]
    if "dynamo" in medians:
        checks += [
            ("apply_event, ratio to the peer", ours["apply_per_s"] / medians["dynamo"]["apply_per_s"], ">=", 1),
            ("find_matches, time to the peer's", ours["find_us"] / medians["dynamo"]["find_us"], "<=", 1),
        ]
    failed = 0
    for what, value, sign, limit in checks:
        met = value >= limit if sign == ">=" else value <= limit
        failed += not met
        print(f"{'met' if met else 'NOT MET':8} {what:40} {value:14,.2f} {sign} {limit:,}")
    args.output.write_text(json.dumps({"peer": PEER, "rounds": rounds, "medians": medians}, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
