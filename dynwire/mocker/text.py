"""Which tokens the simulated engine answers with: sentences that read like a text, chosen by what stands before."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from .._kvhash import xxh3

WINDOW = 64
"""tokens before a sentence that decide which one it is; enough to reach from the end of a chat template into the question"""

ENDS_ONE_IN = 8
"""an answer of open length ends after a sentence with this chance"""


class Storyteller:
    """Continues any sequence of tokens; what comes next depends on the tokens before it, the seed, and nothing else.

    So a request whose prompt ends with a part of an answer gets the rest of that answer, on whichever worker. ``sentences`` are
    token lists, none empty.
    """

    def __init__(self, sentences: Sequence[Sequence[int]], seed: int = 0) -> None:
        self._sentences = [array("I", sentence) for sentence in sentences]
        self._firsts = frozenset(sentence[0] for sentence in self._sentences)
        self._lasts = frozenset(sentence[-1] for sentence in self._sentences)
        self._longest = max(map(len, self._sentences))
        self._seed = seed

    def _dice(self, tokens: array[int], at: int, seed: int) -> int:
        return xxh3(tokens[max(0, at - WINDOW) : at].tobytes(), ((self._seed ^ seed) + at) & 0xFFFFFFFFFFFFFFFF)

    def rest(self, tokens: array[int], seed: int = 0, may_end: bool = False) -> array[int]:
        """The tokens up to the end of the sentence that ``tokens`` are in the middle of, or a new sentence.

        Empty if the answer is complete, which happens with ``may_end`` only.
        """
        length = len(tokens)
        start = max(0, length - self._longest + 1)
        firsts = self._firsts
        # In the middle of a sentence? The one that began first counts, so that appending its next tokens changes nothing.
        for begin, token in enumerate(tokens[start:], start):
            if token in firsts:
                sentence = self._sentences[self._dice(tokens, begin, seed) % len(self._sentences)]
                done = length - begin
                if done < len(sentence) and sentence[:done] == tokens[begin:]:
                    return sentence[done:]
        dice = self._dice(tokens, length, seed)
        if may_end and length and tokens[-1] in self._lasts and (dice >> 32) % ENDS_ONE_IN == 0:
            return array("I")
        return self._sentences[dice % len(self._sentences)]
