"""A contrastive batch larger than memory: embed it chunk by chunk, twice, with the gradient of embedding it at once.

Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"
(https://arxiv.org/abs/2101.06983). The first pass embeds every chunk and keeps rows alone; the loss, over the rows of
all chunks and ranks, gives each row its gradient; the second pass embeds each chunk once more, from the same random
state and so under the same dropout, and takes its rows' gradient back through it. Chunks whose graph is kept from the
first pass, by default the last one, are not embedded again: of n chunks a step costs n forward passes, n backward
passes and n - 1 further forward passes.

    two_pass = TwoPass(encoders)               # first pass
    loss(*two_pass.rows).backward()            # collectives and all
    two_pass.finish()                          # second pass

Encoders must call no collective: ranks may have different numbers of chunks. They draw random numbers from torch's own
generators only (of the CPU and of the device), which `finish` leaves as the first pass did, so that a step consumes the
same numbers however many chunks are kept.

Shapes: R rows of a chunk, B rows of all chunks, E embedding.
"""

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distributed.training_state import pack_rng, restore_rng

Encoder = Callable[[], tuple[Tensor, ...]]
"""Embeds one chunk: one tensor [R, E] a kind of row (clips, strings, ...), the same kinds from every encoder."""


@dataclass
class _Cached:
    """A chunk that was embedded without a graph."""

    encode: Encoder
    random_state: dict[str, Tensor]
    rows: tuple[Tensor, ...]  # leaves that collect the gradient


class TwoPass:
    """`rows`: for each kind the rows [B, E] of all chunks, in order, differentiable.

    num_kept: how many chunks, from the last, keep their graph; all of them is the step in one pass.
    """

    def __init__(self, encoders: Sequence[Encoder], num_kept: int = 1) -> None:
        assert encoders, "no chunk: an empty batch is one chunk of no rows"
        assert num_kept >= 0, num_kept
        first_kept = max(0, len(encoders) - num_kept)
        self._cached: list[_Cached] = []
        chunks: list[tuple[Tensor, ...]] = []
        for encode in encoders[:first_kept]:
            random_state = pack_rng()
            with torch.no_grad():
                rows = tuple(part_RE.detach().requires_grad_() for part_RE in encode())
            self._cached.append(_Cached(encode, random_state, rows))
            chunks.append(rows)
        # The kept ones come last: nothing but their own graphs stands in memory beside the loss.
        chunks += [encode() for encode in encoders[first_kept:]]
        self.rows = tuple(torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*chunks, strict=True))

    def finish(self) -> None:
        """The second pass; to be called once, after the backward pass of the loss over `rows`."""
        if not self._cached:
            return
        random_state_after = pack_rng()
        while self._cached:
            chunk = self._cached.pop(0)
            restore_rng(chunk.random_state)
            again = chunk.encode()
            assert [a.shape for a in again] == [b.shape for b in chunk.rows], (
                "an encoder gave other rows the second time"
            )
            pairs = [
                (new_RE, leaf_RE.grad)
                for new_RE, leaf_RE in zip(again, chunk.rows, strict=True)
                if new_RE.requires_grad and leaf_RE.grad is not None
            ]
            if pairs:
                torch.autograd.backward([new_RE for new_RE, _ in pairs], [grad_RE for _, grad_RE in pairs])
            del again, pairs
        restore_rng(random_state_after)


def chunk_bounds(weights: Sequence[int], num_chunks: int) -> list[tuple[int, int]]:
    """(start, stop) of each chunk of consecutive items: of weights as equal as can be, some chunks may be empty.

    With weights of one, no chunk has more than ceil(items / chunks).
    """
    assert num_chunks >= 1, num_chunks
    ends = list(itertools.accumulate(weights))
    total = ends[-1] if ends else 0
    inner = [bisect.bisect_right(ends, i * total // num_chunks) for i in range(1, num_chunks)]
    return list(itertools.pairwise([0, *inner, len(ends)]))
