"""Size classes of packs: a bounded set of shapes, which packs of any lengths are padded up to.

What runs in a CUDA graph must have one shape each time. A pack is filled up with dummy sequences behind its own, and
what the towers make of them is cut off:

    tokens     | own sequences: P        | dummies as long as may be | a shorter one |          P' of the class
    sequences  | own: N                  | these dummies                             | empty |  N' of the class

P' has 16 steps an octave, 32 from 4,096 tokens on, where a token costs time: a class wastes 2 % on average, a large
one 1 %. N' follows from P' by a power of two, and so does the longest length, since empty sequences and a high bound
cost next to nothing. Pure arithmetic on the host.
"""

from collections.abc import Sequence
from dataclasses import dataclass

STEPS_PER_OCTAVE = 16
MANY_TOKENS = 4096
"""From here on twice the steps."""
LEAST_STEP = 16
"""Tokens. Small packs are bound by reading the weights, so that a few rows more cost nothing."""
_FEWEST_SEQUENCES = 512
"""Least number of sequences in a class: one in so many tokens."""


def rounded_up(count: int) -> int:
    """The least size of a class that holds `count` tokens."""
    octave = 1 << (count.bit_length() - 1)
    step = max(LEAST_STEP, octave // (STEPS_PER_OCTAVE if octave < MANY_TOKENS else 2 * STEPS_PER_OCTAVE))
    return -(-count // step) * step


@dataclass(frozen=True)
class SizeClass:
    """A shape. `pool` is 2 for a tower that averages token pairs at its end, else 1."""

    num_tokens: int
    num_sequences: int
    max_len: int
    pool: int = 1

    @classmethod
    def of(cls, lengths: Sequence[int], shortest: int, limit: int, pool: int = 1) -> "SizeClass":
        """The class of a pack. The longest sequence is rounded up to a power of two, within `shortest` and `limit`."""
        max_len = min(max(shortest, 1 << (int(max(lengths, default=1)) - 1).bit_length()), limit)
        num_tokens = rounded_up(int(sum(lengths)) + 1)  # a dummy token at least, for pooled tokens that are left over
        num_pooled = sum(max(1, length // pool) for length in lengths)
        size = cls(num_tokens, -(-num_tokens // _FEWEST_SEQUENCES), max_len, pool)
        while not size.holds(len(lengths), int(sum(lengths)), num_pooled):
            size = cls(num_tokens, 2 * size.num_sequences, max_len, pool)
        return size

    @property
    def num_pooled(self) -> int:
        """Pooled tokens, with room for one more a sequence, as a single token is not halved."""
        return self.num_tokens if self.pool == 1 else (self.num_tokens + self.num_sequences) // 2

    @property
    def max_pooled(self) -> int:
        return max(1, self.max_len // self.pool)

    @property
    def num_slots(self) -> int:
        """Mel slots: a clip of t tokens takes 2 t + 4, or two fewer at the tower's reach (see model/packing.py)."""
        return 2 * self.num_tokens + 4 * self.num_sequences

    def holds(self, num_sequences: int, num_tokens: int, num_pooled: int) -> bool:
        """Whether dummies within max_len fill this class up behind so many sequences of so many tokens in all."""
        num_free = self.num_sequences - num_sequences
        return (
            num_free * self.max_len >= self.num_tokens - num_tokens
            and num_free * self.max_pooled >= self.num_pooled - num_pooled >= 0
        )

    def filled(self, lengths: Sequence[int]) -> list[int]:
        """The lengths, then those of the dummies; `num_sequences` in all, `num_tokens` together."""
        return self._filled(lengths, self.num_tokens, self.max_len)

    def filled_pooled(self, lengths: Sequence[int]) -> list[int]:
        """The same of pooled tokens; a dummy need not have as many as its tokens would make."""
        return self._filled(lengths, self.num_pooled, self.max_pooled)

    def _filled(self, lengths: Sequence[int], total: int, max_len: int) -> list[int]:
        num_whole, rest = divmod(total - sum(lengths), max_len)
        filled = [*lengths, *[max_len] * num_whole, *([rest] if rest else [])]
        assert len(filled) <= self.num_sequences, (len(filled), self)
        return filled + [0] * (self.num_sequences - len(filled))
