"""Continuous batching over a paged cache. Sans-IO: time comes in as an argument, in seconds of the simulation.

One step: `Scheduler.schedule` decides what is computed and how long that takes, `Scheduler.complete` makes it so at the end
of that time. In between requests may come (`add`) and go (`cancel`). Everything is deterministic.
"""

from __future__ import annotations

import collections
from array import array
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from .._kvhash import compute_block_hashes, sequence_hashes
from .blocks import BlockPool
from .events import KvEvents, KvEventSink
from .text import Storyteller
from .timing import Timing

NEVER = 1 << 62


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes and switches of one simulated engine; the defaults are those of REQUEST_PLANES §5."""

    num_blocks: int = 16384
    block_size: int = 64
    max_num_seqs: int = 256
    """sequences that run at once; the others wait"""
    max_num_batched_tokens: int = 8192
    """new tokens per step"""
    max_model_len: int = 32768
    """tokens of prompt and answer together"""
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    timing: Timing = field(default_factory=Timing)

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed is 1 or more")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, less than max_num_seqs {self.max_num_seqs}: "
                "every running sequence needs one token per step"
            )
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.limit:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, a sequence may have {self.limit} tokens, and without "
                "chunked prefill they have to fit into one step"
            )

    @property
    def limit(self) -> int:
        """Tokens that one sequence may have: what the model allows, and what fits into the cache."""
        return min(self.max_model_len, self.num_blocks * self.block_size)

    def check_prompt(self, length: int) -> None:
        """Raises `ValueError` if such a prompt can never be answered."""
        if length < 1:
            raise ValueError("the prompt is empty")
        if length >= self.limit:
            what = (
                f"max_model_len is {self.max_model_len}"
                if self.limit == self.max_model_len
                else f"the cache holds {self.limit} ({self.num_blocks} blocks of {self.block_size})"
            )
            raise ValueError(f"the prompt has {length} tokens, and one more would not fit: {what}")


def _nobody() -> None:
    pass


class Sequence:
    """One request: its tokens, and how far the engine has come with them. Made by the caller, changed by the scheduler."""

    __slots__ = (
        "_block_hashes",
        "_end",
        "_end_reason",
        "_event_at",
        "_hashes",
        "_private",
        "_published",
        "arrived",
        "cached_tokens",
        "computed",
        "delivered",
        "eos_id",
        "finish_reason",
        "first_token_at",
        "length",
        "max_tokens",
        "may_end",
        "min_tokens",
        "preemptions",
        "prompt_length",
        "running",
        "seed",
        "stop_ids",
        "tokens",
        "wake",
    )

    def __init__(
        self,
        tokens: Items[int],
        *,
        max_tokens: int | None = None,
        min_tokens: int = 0,
        stop_ids: Items[int] = (),
        eos_id: int | None = None,
        seed: int = 0,
        may_end: bool = False,
    ) -> None:
        """``stop_ids`` end the answer, with ``eos_id`` among them if it counts; ``may_end``: the text may end by itself."""
        self.tokens = array("I", tokens)
        """prompt and answer, and behind ``length`` what will come next"""
        self.prompt_length = len(self.tokens)
        self.length = self.prompt_length
        self.max_tokens = max_tokens
        self.min_tokens = min_tokens
        self.stop_ids = frozenset(stop_ids)
        self.eos_id = eos_id
        self.seed = seed
        self.may_end = may_end and eos_id is not None
        self.computed = 0
        """tokens whose keys and values are in the cache"""
        self.delivered = self.prompt_length
        """for whoever hands the tokens on: those before are gone already"""
        self.wake: Callable[[], object] = _nobody
        """for whoever hands the tokens on: called when there are new ones"""
        self.running = False
        self.arrived = 0.0
        self.first_token_at: float | None = None
        self.finish_reason: str | None = None
        self.cached_tokens = 0
        """tokens of the prompt that were in the cache when the request began to run for the first time"""
        self.preemptions = 0
        self._block_hashes: list[int] = []
        self._hashes: list[int] = []
        self._published = 0
        self._private = 0
        self._event_at = 0
        self._end = NEVER
        self._end_reason = ""

    @property
    def generated(self) -> int:
        return self.length - self.prompt_length

    @property
    def blocks(self) -> int:
        """Blocks that it holds."""
        return self._published + self._private


@dataclass(slots=True)
class Step:
    """What is being computed."""

    duration: float
    """seconds"""
    prefills: list[tuple[Sequence, int]]
    """sequences that read a part of their prompt, and how many tokens of it"""
    decodes: int
    """sequences that get their next token"""
    preempted: int = 0


class Scheduler:
    """One rank of an engine. One thread at a time."""

    def __init__(
        self,
        config: EngineConfig,
        text: Storyteller,
        sink: KvEventSink | None = None,
        worker_id: int | None = None,
        dp_rank: int = 0,
    ) -> None:
        self.config = config
        self.events = KvEvents(sink, worker_id, dp_rank)
        self.pool = BlockPool(config.num_blocks, config.block_size, self.events)
        self.waiting: collections.deque[Sequence] = collections.deque()
        self._text = text
        # both in the order of admission; the newest is preempted first
        self._prefilling: dict[Sequence, None] = {}
        self._decoding: dict[Sequence, None] = {}
        # of those that decode: the ones whose next token needs a new block
        self._growing: dict[Sequence, None] = {}
        # tokens in the cache of all that decode
        self._context = 0
        self.generated_tokens = 0
        self.prompt_tokens = 0
        """of requests that began to run; counted again after a preemption, as `hit_tokens`"""
        self.hit_tokens = 0
        """of those, the ones that were found in the cache"""
        self.preemptions = 0

    # Coming and going

    def add(self, sequence: Sequence, now: float) -> None:
        """Queue a request. Raises `ValueError` if it can never be answered."""
        config = self.config
        config.check_prompt(sequence.length)
        sequence.arrived = now
        if sequence.max_tokens is not None and sequence.max_tokens < 1:
            raise ValueError(f"max_tokens is {sequence.max_tokens}; allowed is 1 or more")
        sequence._end = config.limit
        if sequence.max_tokens is not None:
            sequence._end = min(sequence._end, sequence.prompt_length + sequence.max_tokens)
        sequence._end_reason = "length"
        if config.enable_prefix_caching:
            sequence._block_hashes = compute_block_hashes(sequence.tokens, config.block_size)
            sequence._hashes = sequence_hashes(sequence._block_hashes)
        self.waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Forget a request; its blocks are free at once. Nothing happens if it has finished."""
        if sequence.finish_reason is not None:
            return
        sequence.finish_reason = "cancelled"
        if sequence.running:
            self._leave(sequence)
        else:
            self.waiting.remove(sequence)

    @property
    def active(self) -> int:
        """Sequences that run."""
        return len(self._prefilling) + len(self._decoding)

    @property
    def idle(self) -> bool:
        return not (self.waiting or self._prefilling or self._decoding)

    # One step

    def schedule(self, now: float) -> Step | None:
        """Decide what the next step computes; None if there is nothing to do."""
        preempted = self._grow() if self._growing else 0
        decodes = len(self._decoding)
        prefills: list[tuple[Sequence, int]] = []
        if self._prefilling or (self.waiting and not preempted):
            preempted += self._plan_prefills(prefills, self.config.max_num_batched_tokens - decodes, bool(preempted))
            decodes = len(self._decoding)
        if not decodes and not prefills:
            return None
        tokens, pairs = decodes, 0.0
        for sequence, count in prefills:
            tokens += count
            pairs += count * (sequence.computed + count / 2)
        return Step(self.config.timing.step(tokens, pairs, self._context), prefills, decodes, preempted)

    def _grow(self) -> int:
        """Get every decoding sequence the block that its next token needs; returns how many were put aside for that."""
        preempted = 0
        for sequence in list(self._growing):
            while sequence.running and not self.pool.allocate(1):
                self._preempt(self._newest())
                preempted += 1
            if sequence.running:
                sequence._private += 1
        self._growing.clear()
        return preempted

    def _plan_prefills(self, prefills: list[tuple[Sequence, int]], budget: int, full: bool) -> int:
        preempted = 0
        config, pool = self.config, self.pool
        block_size = config.block_size
        for sequence in list(self._prefilling):
            if not sequence.running:
                continue  # put aside for one of the others
            count = min(budget, sequence.length - sequence.computed)
            if count < 1:
                break
            missing = -(-(sequence.computed + count) // block_size) - sequence.blocks
            while not pool.allocate(missing):
                newest = self._newest()
                self._preempt(newest)
                preempted += 1
                if newest is sequence:
                    break
            if not sequence.running:
                break
            sequence._private += missing
            prefills.append((sequence, count))
            budget -= count
        if not preempted and not full:  # otherwise those that were put aside would come back at once
            self._admit(prefills, budget)
        return preempted

    def _admit(self, prefills: list[tuple[Sequence, int]], budget: int) -> None:
        config, pool, waiting = self.config, self.pool, self.waiting
        block_size = config.block_size
        while waiting and budget > 0 and self.active < config.max_num_seqs:
            sequence = waiting[0]
            # at least one token is computed, because the next one comes out of that
            known = pool.match(sequence._hashes[: (sequence.length - 1) // block_size])
            cached = known * block_size
            count = min(budget, sequence.length - cached)
            if not config.enable_chunked_prefill and count < sequence.length - cached:
                return
            missing = -(-(cached + count) // block_size) - known
            if not pool.acquire(sequence._hashes[:known], missing):
                return
            waiting.popleft()
            sequence._published, sequence._private = known, missing
            sequence.computed = cached
            sequence.running = True
            if not sequence.preemptions:
                sequence.cached_tokens = cached
            self._prefilling[sequence] = None
            self.prompt_tokens += sequence.length
            self.hit_tokens += cached
            prefills.append((sequence, count))
            budget -= count

    def complete(self, step: Step, now: float) -> list[Sequence]:
        """The step is over: returns the sequences that got a token; those with a ``finish_reason`` have left."""
        decoding = self._decoding
        got = list(decoding)
        self._context += len(got)
        self.generated_tokens += len(got)
        for sequence in got:
            length = sequence.length = sequence.length + 1
            if length >= sequence._event_at:
                sequence.computed = length - 1
                self._arrived_at(sequence)
        for sequence, count in step.prefills:
            if not sequence.running:
                continue  # cancelled meanwhile
            sequence.computed += count
            self._publish(sequence)
            if sequence.computed < sequence.length:
                continue
            del self._prefilling[sequence]
            decoding[sequence] = None
            self._context += sequence.length
            sequence.length += 1
            self.generated_tokens += 1
            if sequence.first_token_at is None:
                sequence.first_token_at = now
            self._arrived_at(sequence)
            got.append(sequence)
        return got

    # Parts of it

    def _arrived_at(self, sequence: Sequence) -> None:
        """A decoding sequence, ``computed`` being up to date, got a token that is more than just one more."""
        length, block_size = sequence.length, self.config.block_size
        if length > len(sequence.tokens):
            self._write(sequence)
        if sequence.computed % block_size == 0:
            self._publish(sequence)
        if length >= sequence._end:
            sequence.finish_reason = sequence._end_reason
            del sequence.tokens[length:]
            self._leave(sequence)
            return
        if sequence.computed % block_size == 0 and sequence.blocks * block_size <= sequence.computed:
            self._growing[sequence] = None
        at_block = length + block_size - sequence.computed % block_size
        sequence._event_at = min(at_block, len(sequence.tokens) + 1, sequence._end)

    def _write(self, sequence: Sequence) -> None:
        """Find out what comes next, and whether the answer ends there."""
        tokens = sequence.tokens
        begin = len(tokens)
        more = self._text.rest(tokens, sequence.seed, sequence.may_end and sequence.generated > sequence.min_tokens)
        if more:
            tokens.extend(more)
        else:
            assert sequence.eos_id is not None
            tokens.append(sequence.eos_id)
        if not sequence.stop_ids.isdisjoint(tokens[begin:]):
            first = max(begin, sequence.prompt_length + sequence.min_tokens - 1)
            for at in range(first, min(len(tokens), sequence._end)):
                if tokens[at] in sequence.stop_ids:
                    sequence._end = at + 1
                    sequence._end_reason = "stop"
                    break

    def _publish(self, sequence: Sequence) -> None:
        """Let others know of the blocks that are full by now."""
        if not self.config.enable_prefix_caching:
            return
        block_size = self.config.block_size
        full = sequence.computed // block_size
        begin = sequence._published
        if full <= begin:
            return
        self._hash(sequence, full)
        hashes, locals_ = sequence._hashes, sequence._block_hashes
        sequence._published = full
        sequence._private -= full - begin
        parent = hashes[begin - 1] if begin else None
        self.pool.publish(parent, list(zip(hashes[begin:full], locals_[begin:full], strict=True)))

    def _newest(self) -> Sequence:
        """The sequence that was admitted last."""
        return next(reversed(self._prefilling or self._decoding))

    def _preempt(self, sequence: Sequence) -> None:
        """Take all blocks from a sequence and put it at the head of the queue; it will read its own tokens again."""
        self._leave(sequence)
        sequence.computed = 0
        sequence.preemptions += 1
        self.preemptions += 1
        if self.config.enable_prefix_caching:
            self._hash(sequence, sequence.length // self.config.block_size)
        self.waiting.appendleft(sequence)

    def _hash(self, sequence: Sequence, blocks: int) -> None:
        """Compute the hashes of its first ``blocks`` blocks, as far as that has not been done."""
        block_size = self.config.block_size
        hashes = sequence._hashes
        done = len(hashes)
        if done < blocks:
            more = compute_block_hashes(sequence.tokens[done * block_size : blocks * block_size], block_size)
            sequence._block_hashes += more
            hashes += sequence_hashes(more, hashes[-1] if hashes else None)

    def _leave(self, sequence: Sequence) -> None:
        """Stop running: give back the blocks."""
        sequence.running = False
        if sequence in self._decoding:
            del self._decoding[sequence]
            self._context -= sequence.length - 1
        else:
            del self._prefilling[sequence]
        self.pool.release(sequence._hashes[: sequence._published], sequence._private)
        sequence._published = sequence._private = 0
