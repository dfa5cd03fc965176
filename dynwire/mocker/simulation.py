"""A whole run in simulated time, as fast as the machine allows: for tests, and to try out settings without waiting."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .scheduler import Scheduler, Sequence


@dataclass(slots=True)
class Outcome:
    """What became of one request; times in simulated seconds from the beginning of the run."""

    sequence: Sequence
    arrived: float
    token_times: list[float] = field(default_factory=list)

    @property
    def answer(self) -> list[int]:
        return self.sequence.tokens[self.sequence.prompt_length : self.sequence.length].tolist()

    @property
    def ttft(self) -> float:
        return self.token_times[0] - self.arrived


def simulate(scheduler: Scheduler, arrivals: Iterable[tuple[float, Sequence]]) -> list[Outcome]:
    """Run requests that arrive at given times (rising) to their end; the outcomes in the order of arrival."""
    outcomes: dict[Sequence, Outcome] = {}
    pending = [(at, sequence) for at, sequence in arrivals]
    pending.reverse()
    now = 0.0
    while pending or not scheduler.idle:
        while pending and pending[-1][0] <= now:
            at, sequence = pending.pop()
            scheduler.add(sequence, at)
            outcomes[sequence] = Outcome(sequence, at)
        step = scheduler.schedule(now)
        if step is None:
            now = pending[-1][0]
            continue
        now += step.duration
        for sequence in scheduler.complete(step, now):
            outcomes[sequence].token_times.append(now)
    return list(outcomes.values())
