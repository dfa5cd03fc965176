#!/usr/bin/env python3
"""What does KV-aware routing bring? Four simulated workers, a multi-turn trace with shared system prompts, in simulated time.

The trace is generated from a seed: conversations of several turns that begin with one of a few system prompts; a turn comes when
the answer to the one before has been read. The same trace is run with round robin, with the KV router fed by events, with the KV
router without events (approximate), and on one worker that has the sum of the caches. The engines are those of
``dynwire.mocker``, the decisions those of ``dynwire.kv_router``; only the network is left out.

    python benchmarks/kv_routing.py [--seed 1] [--conversations 200]
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynwire.kv_router import RadixTree, compute_block_hashes, sequence_hashes
from dynwire.kv_router.approximate import ApproximateIndex
from dynwire.kv_router.cost import CostSettings, choose, costs
from dynwire.kv_router.load import ActiveLoad
from dynwire.mocker import TINY_MODEL
from dynwire.mocker.scheduler import EngineConfig, Scheduler, Sequence
from dynwire.mocker.worker import storyteller
from dynwire.wire.kv_events import as_cache_event

HERE = Path(__file__).resolve().parent
WORKERS = 4
BLOCK_SIZE = 64


@dataclass
class Conversation:
    number: int
    starts: float
    tokens: list[int]
    turns: list[tuple[int, int, float]]
    """new tokens of the user, tokens of the answer, seconds until the next turn"""


def trace(seed: int, conversations: int, rate: float) -> list[Conversation]:
    """Conversations that start at ``rate`` per second."""
    rng = random.Random(seed)
    systems = [[rng.randrange(3, 1000) for _ in range(rng.randrange(1024, 3072))] for _ in range(8)]
    out, now = [], 0.0
    for number in range(conversations):
        now += rng.expovariate(rate)
        turns = [(rng.randrange(200, 3000), rng.randrange(50, 300), rng.expovariate(1 / 4.0)) for _ in range(rng.randrange(3, 9))]
        out.append(Conversation(number, now, list(rng.choice(systems)), turns))
    return out


@dataclass
class Result:
    ttft: list[float] = field(default_factory=list)
    prompt_blocks: int = 0
    hit_blocks: int = 0
    busy: list[float] = field(default_factory=list)
    predicted_right: int = 0

    @property
    def hit_rate(self) -> float:
        return self.hit_blocks / self.prompt_blocks

    @property
    def worst_load(self) -> float:
        return max(self.busy) / statistics.mean(self.busy)


class Routing:
    """Chooses a worker for a prompt. ``kind`` is round_robin, kv or approximate."""

    def __init__(self, kind: str, workers: int, seed: int, settings: CostSettings) -> None:
        self.kind = kind
        self.settings = settings
        self.workers = [(worker, 0) for worker in range(workers)]
        self.tree = RadixTree()
        self.approximate = ApproximateIndex()
        self.load = ActiveLoad()
        self.rng = random.Random(seed)
        self.turn = 0

    def on_event(self, event: dict[str, Any]) -> None:
        self.tree.apply_event(event["worker_id"], as_cache_event(event["event"]))

    def choose(self, request: str, tokens: list[int], now: float) -> tuple[int, int]:
        """(worker, blocks that it is expected to have)"""
        if self.kind == "round_robin":
            self.turn += 1
            return self.turn % len(self.workers), 0
        blocks = compute_block_hashes(tokens, BLOCK_SIZE)
        sequence = sequence_hashes(blocks)
        if self.kind == "approximate":
            self.approximate.expire(now)
        matches = (self.approximate.tree if self.kind == "approximate" else self.tree).find_matches(blocks)
        found = costs(self.workers, len(tokens), BLOCK_SIZE, matches.scores, sequence, self.load, self.settings)
        choice = choose(found, self.settings, matches.tree_sizes, self.rng)
        self.load.book(request, choice.worker, choice.prefill_tokens, sequence, 1)
        if self.kind == "approximate":
            self.approximate.routed(choice.worker, blocks, sequence, now)
        return choice.worker[0], choice.overlap_blocks


def run(kind: str, conversations: list[Conversation], workers: int, blocks: int, seed: int, settings: CostSettings) -> Result:
    """One run of the trace."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json"))
    text = storyteller(lambda line: tokenizer.encode(line, add_special_tokens=False).ids, seed)
    routing = Routing(kind, workers, seed, settings)
    config = EngineConfig(num_blocks=blocks, block_size=BLOCK_SIZE)
    engines = [Scheduler(config, text, routing.on_event, worker, 0) for worker in range(workers)]
    result = Result(busy=[0.0] * workers)
    steps: list[Any] = [None] * workers
    queue: list[tuple[float, int, str, Any]] = []
    order = 0

    def at(moment: float, what: str, subject: Any) -> None:
        nonlocal order
        order += 1
        heapq.heappush(queue, (moment, order, what, subject))

    history = {c.number: list(c.tokens) for c in conversations}
    running: dict[Sequence, tuple[Conversation, int, float, int, str]] = {}
    for conversation in conversations:
        at(conversation.starts, "turn", (conversation, 0))

    def proceed(worker: int, now: float) -> None:
        if steps[worker] is None and not engines[worker].idle:
            step = engines[worker].schedule(now)
            if step is not None:
                steps[worker] = step
                result.busy[worker] += step.duration
                at(now + step.duration, "step", worker)

    while queue:
        now, _, what, subject = heapq.heappop(queue)
        if what == "turn":
            conversation, number = subject
            tokens = history[conversation.number]
            rng = random.Random(f"{seed}-{conversation.number}-{number}")
            tokens += [rng.randrange(3, 1000) for _ in range(conversation.turns[number][0])]
            request = f"{conversation.number}-{number}"
            worker, expected = routing.choose(request, tokens, now)
            sequence = Sequence(tokens, max_tokens=conversation.turns[number][1])
            engines[worker].add(sequence, now)
            running[sequence] = (conversation, number, now, expected, request)
            result.prompt_blocks += len(tokens) // BLOCK_SIZE
            proceed(worker, now)
            continue
        worker = subject
        step, steps[worker] = steps[worker], None
        for sequence in engines[worker].complete(step, now):
            conversation, number, arrived, expected, request = running[sequence]
            if sequence.generated == 1:
                result.ttft.append(now - arrived)
                result.hit_blocks += sequence.cached_tokens // BLOCK_SIZE
                result.predicted_right += sequence.cached_tokens // BLOCK_SIZE == expected
                routing.load.first_token(request)
            if sequence.finish_reason is not None:
                del running[sequence]
                routing.load.finish(request)
                history[conversation.number] = sequence.tokens[: sequence.length].tolist()
                if number + 1 < len(conversation.turns):
                    at(now + conversation.turns[number][2], "turn", (conversation, number + 1))
        proceed(worker, now)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--conversations", type=int, default=200)
    parser.add_argument("--rate", type=float, default=3.0, help="conversations that start per second")
    parser.add_argument("--blocks", type=int, default=8000, help="of each worker's cache")
    parser.add_argument("--overlap-score-weight", type=float, default=20.0)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "kv-routing.json")
    args = parser.parse_args()
    settings = CostSettings(args.overlap_score_weight)
    conversations = trace(args.seed, args.conversations, args.rate)
    runs = {
        "round_robin": run("round_robin", conversations, WORKERS, args.blocks, args.seed, settings),
        "approximate": run("approximate", conversations, WORKERS, args.blocks, args.seed, settings),
        "kv": run("kv", conversations, WORKERS, args.blocks, args.seed, settings),
        "single": run("kv", conversations, 1, args.blocks * WORKERS, args.seed, settings),
    }
    for name, result in runs.items():
        print(
            f"{name:12} hit rate {result.hit_rate:6.3f}   TTFT mean {statistics.mean(result.ttft) * 1e3:8.1f} ms   "
            f"busiest worker {result.worst_load:5.2f} × mean   {len(result.ttft)} requests"
        )
    kv, approximate, plain, single = (runs[name] for name in ("kv", "approximate", "round_robin", "single"))
    mean = {name: statistics.mean(result.ttft) for name, result in runs.items()}
    checks = [
        ("hit rate to that of one worker with all caches", kv.hit_rate / single.hit_rate, ">=", 0.95),
        ("mean TTFT to that of round robin", mean["kv"] / mean["round_robin"], "<=", 0.5),
        ("busiest worker to the mean", kv.worst_load, "<=", 1.3),
        ("approximate hit rate, to that of kv", approximate.hit_rate / kv.hit_rate, "<=", 1.0),
        ("approximate hit rate, to that of round robin", approximate.hit_rate / plain.hit_rate, ">=", 1.0),
        ("requests whose hits were predicted exactly", kv.predicted_right / len(kv.ttft), ">=", 0.95),
    ]
    failed = 0
    for what, value, sign, limit in checks:
        met = value >= limit if sign == ">=" else value <= limit
        failed += not met
        print(f"{'met' if met else 'NOT MET':8} {what:52} {value:8.3f} {sign} {limit}")
    stored = {
        name: {"hit_rate": r.hit_rate, "ttft": r.ttft, "busy": r.busy, "predicted_right": r.predicted_right}
        for name, r in runs.items()
    }
    args.output.write_text(json.dumps({"settings": {k: str(v) for k, v in vars(args).items()}, "runs": stored}) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
